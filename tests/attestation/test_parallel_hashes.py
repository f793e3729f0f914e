"""Several hashes over one stream: each sees all of its own, in order, whichever worker feeds it."""

from __future__ import annotations

import os
import threading

import pytest
from hypothesis import given
from hypothesis import strategies as st

from attestation import parallel_hashes as module
from attestation.parallel_hashes import BUFFERS, MAX_WORKERS, ParallelHashes

LONG, SHORT = 64 << 10, 5


@pytest.fixture(params=[None, 1, 2, 3, 64], autouse=True)
def processors(request: pytest.FixtureRequest) -> object:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "cpu_count", lambda: request.param)
        patch.setattr(module, "CHUNK_SIZE", LONG)
        yield request.param


@given(st.lists(st.tuples(st.sampled_from([SHORT, LONG]), st.sets(st.integers(0, 3))), max_size=4 * BUFFERS))
def test_each_hash_sees_its_pieces_in_their_order(feeds: list[tuple[int, set[int]]]) -> None:
    seen: list[list[bytes]] = [[] for _ in range(4)]
    expected: list[list[bytes]] = [[] for _ in range(4)]
    updates = [lambda data, mine=mine: mine.append(bytes(data[:SHORT])) for mine in seen]
    with ParallelHashes() as hashes:
        buffers = set()
        for number, (size, chosen) in enumerate(feeds):
            buffer = hashes.buffer()
            buffers.add(id(buffer.obj))
            buffer[:SHORT] = number.to_bytes(SHORT, "big")
            hashes.feed(buffer, buffer[:size], [update if at in chosen else None for at, update in enumerate(updates)])
            for at in chosen:
                expected[at].append(number.to_bytes(SHORT, "big"))
        hashes.finish()
        assert seen == expected
        assert len(buffers) <= BUFFERS


def test_there_are_as_many_workers_as_processors_and_none_stays(processors: int | None) -> None:
    before = threading.active_count()
    with ParallelHashes() as hashes:
        buffer = hashes.buffer()
        hashes.feed(buffer, buffer[:SHORT], [len])
        assert threading.active_count() == before
        for _ in range(3):
            buffer = hashes.buffer()
            hashes.feed(buffer, buffer, [len] * 4)
        assert threading.active_count() - before == min(MAX_WORKERS, processors or 1)
    assert threading.active_count() == before


def test_what_a_hash_raises_is_raised_where_it_is_waited_for() -> None:
    """An error on another thread is no digest, not even of what another hash saw."""

    def refuse(_: memoryview) -> None:
        raise MemoryError("no room")

    with ParallelHashes() as hashes:
        buffer = hashes.buffer()
        hashes.feed(buffer, buffer, [len, refuse])
        with pytest.raises(MemoryError, match="no room"):
            hashes.finish()
        with pytest.raises(MemoryError, match="no room"):
            hashes.finish()
        with pytest.raises(MemoryError, match="no room"):
            for _ in range(BUFFERS + 1):
                buffer = hashes.buffer()
                hashes.feed(buffer, buffer, [len])


def test_a_reader_that_is_ahead_waits_for_the_slowest() -> None:
    """Memory stays constant: the buffer that one hash has not seen is not read into."""
    may_go = threading.Event()
    seen: list[int] = []

    def slow(data: memoryview) -> None:
        may_go.wait(60)
        seen.append(data[0])

    with ParallelHashes() as hashes:
        for number in range(BUFFERS):
            buffer = hashes.buffer()
            buffer[0] = number
            hashes.feed(buffer, buffer, [slow])
        threading.Timer(0.05, may_go.set).start()
        hashes.buffer()[0] = 255
        assert seen[:1] == [0]
        hashes.finish()
    assert seen == list(range(BUFFERS))
