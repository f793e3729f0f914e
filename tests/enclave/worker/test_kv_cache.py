"""What is kept of finished requests, for whom, and what goes first."""

from __future__ import annotations

import pytest

from enclave.worker.kv_cache import Copy, KvCache, Slot, Truncate, tokens_of

A, B = b"a" * 32, b"b" * 32


def take(cache: KvCache, tokens: list[int], namespace: bytes | None) -> Slot:
    return cache.take(tokens_of(tokens), namespace)


def filled(cache: KvCache, tokens: list[int], namespace: bytes | None) -> Slot:
    """A request that has been answered."""
    slot = take(cache, tokens, namespace)
    assert cache.make_room(len(tokens) - len(slot.tokens))
    slot.tokens[:] = tokens_of(tokens)
    cache.put_back(slot)
    cache.take_edits()
    return slot


def test_the_next_turn_goes_on_in_its_slot() -> None:
    cache = KvCache(slots=3, cells=300)
    first = filled(cache, [1, 2, 3, 4], A)
    slot = take(cache, [1, 2, 3, 4, 5, 6], A)
    assert slot is first
    assert list(slot.tokens) == [1, 2, 3, 4]
    assert cache.take_edits() == ()


def test_the_last_token_of_a_prompt_is_always_decoded() -> None:
    cache = KvCache(slots=1, cells=300)
    filled(cache, [1, 2, 3, 4], A)
    assert list(take(cache, [1, 2, 3, 4], A).tokens) == [1, 2, 3]
    assert cache.take_edits() == (Truncate(0, 3),)


@pytest.mark.parametrize("namespace", [B, None])
def test_what_is_another_s_is_not_there(namespace: bytes | None) -> None:
    cache = KvCache(slots=1, cells=300)
    filled(cache, [1, 2, 3, 4], A)
    assert list(take(cache, [1, 2, 3, 4, 5], namespace).tokens) == []
    assert cache.take_edits() == (Truncate(0, 0),)


def test_what_has_no_namespace_goes_at_once() -> None:
    cache = KvCache(slots=1, cells=300)
    slot = take(cache, [1, 2], None)
    slot.tokens.extend([1, 2])
    cache.put_back(slot)
    assert cache.take_edits() == (Truncate(0, 0),)
    assert cache.free == 300


def test_a_beginning_in_common_is_copied_and_the_other_conversation_kept() -> None:
    cache = KvCache(slots=2, cells=300)
    long = filled(cache, [*range(10), *range(100, 120)], A)
    slot = take(cache, [*range(10), 200, 201], A)
    assert slot is not long
    assert list(slot.tokens) == list(range(10))
    assert cache.take_edits() == (Copy(long.index, slot.index), Truncate(slot.index, 10))
    assert len(long.tokens) == 30


def test_what_is_at_work_is_copied_too() -> None:
    cache = KvCache(slots=2, cells=300)
    busy = take(cache, [1, 2, 3, 4], A)
    busy.tokens.extend([1, 2, 3, 4])
    slot = take(cache, [1, 2, 3, 9], A)
    assert slot is not busy
    assert list(slot.tokens) == [1, 2, 3]
    assert list(busy.tokens) == [1, 2, 3, 4]


def test_the_only_free_slot_is_cut_whatever_it_had_beside() -> None:
    cache = KvCache(slots=1, cells=300)
    filled(cache, [*range(10), *range(100, 120)], A)
    assert list(take(cache, [*range(10), 200], A).tokens) == list(range(10))


def test_a_copy_that_has_no_room_is_not_made() -> None:
    cache = KvCache(slots=2, cells=30)
    busy = take(cache, [*range(20)], A)
    busy.tokens.extend(range(20))
    slot = take(cache, [*range(19), 99], A)
    assert list(slot.tokens) == []
    assert cache.take_edits() == ()


def test_the_least_recently_used_goes_first() -> None:
    cache = KvCache(slots=3, cells=30)
    one, two, three = (filled(cache, [10 * number + 1, 10 * number + 2], A) for number in range(3))
    again = take(cache, [1, 2, 3], A)
    assert again is one
    cache.put_back(again)
    assert take(cache, [77], None) is two
    assert cache.make_room(30 - 2)
    assert (list(one.tokens), list(three.tokens)) == ([1, 2], [])


def test_nothing_goes_while_there_is_an_empty_slot_and_of_these_the_foremost_is_taken() -> None:
    cache = KvCache(slots=4, cells=30)
    kept = filled(cache, [1, 2], A)
    for slot in [take(cache, [3], None) for _ in range(3)]:
        cache.put_back(slot)  # empty, and used later than what is kept
    assert [take(cache, [9], B).index for _ in range(3)] == [1, 2, 3]
    assert list(kept.tokens) == [1, 2]
    assert take(cache, [9], B) is kept


def test_what_is_at_work_does_not_go() -> None:
    cache = KvCache(slots=2, cells=10)
    busy = take(cache, [1, 2, 3], A)
    busy.tokens.extend([1, 2, 3])
    filled(cache, [5, 6], A)
    assert not cache.make_room(8)
    assert cache.make_room(7)
    assert list(busy.tokens) == [1, 2, 3]


def test_a_memory_that_cannot_be_cut_is_not_reused() -> None:
    cache = KvCache(slots=1, cells=30, reuses=False)
    filled(cache, [1, 2, 3], A)
    assert cache.free == 30
    assert list(take(cache, [1, 2, 3, 4], A).tokens) == []


def test_slots_and_cells_are_counted() -> None:
    cache = KvCache(slots=2, cells=30)
    assert (cache.free, cache.reclaimable, cache.free_slots) == (30, 0, 2)
    one = take(cache, [1, 2, 3], A)
    one.tokens.extend([1, 2])
    two = take(cache, [5], A)
    assert (cache.free, cache.reclaimable, cache.free_slots) == (28, 0, 0)
    cache.put_back(one)
    cache.put_back(two)
    assert (cache.free, cache.reclaimable, cache.free_slots) == (28, 2, 2)
