"""The catalogue of events is closed, and the log that keeps them is bounded."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import fields, is_dataclass
from typing import get_args, get_type_hints

import pytest
from hypothesis import given
from hypothesis import strategies as st

from attestation.model_family import CallFormat, Family
from enclave import log
from enclave.kms.errors import KMS_CODES
from enclave.log import (
    EngineLost,
    EngineStarted,
    Event,
    EventLog,
    Halted,
    InternalError,
    KeyOffered,
    NsmFailed,
    Phase,
    PhaseReached,
    Totals,
    WeightsReceived,
)

# --- The catalogue ------------------------------------------------------------------------------------------------

TEXTS = {
    (KeyOffered, "key_id"): "the public name of a key, in hexadecimal",
    (NsmFailed, "code"): "an error's code",
    (InternalError, "kind"): "the name of an exception's class",
    (EngineLost, "kind"): "the same",
    (Halted, "code"): "an error's code",
    (Halted, "message"): "an error of the boot, before any client is served",
    (Halted, "expected"): "the same",
    (Halted, "got"): "the same",
}
"""Every field that is a text, and why no byte of a client can be in it. Whoever adds one answers for it here."""

EXAMPLES: dict[type, Event] = {
    type(event): event
    for event in (
        PhaseReached(Phase.SERVING),
        Halted(Phase.ENTROPY, "entropy_missing", "the kernel is not seeded by the NSM", "nsm-hwrng", "tpm-rng"),
        WeightsReceived(1, 2),
        EngineStarted(True, False, Family.QWEN2, False, CallFormat.HERMES),
        EngineLost("EngineRefused"),
        KeyOffered("00" * 16),
        NsmFailed("InternalError"),
        InternalError("ValueError"),
        Totals(1, 2, 3, 4, 5, 6, 7, 8, {"kms_denied": 9}),
    )
}


def test_the_union_names_every_event_of_the_module() -> None:
    declared = {kind for kind in vars(log).values() if isinstance(kind, type) and hasattr(kind, "event")}
    assert set(get_args(Event)) == declared == EXAMPLES.keys()
    names = [kind.event for kind in declared]
    assert len(set(names)) == len(names)


@pytest.mark.parametrize("kind", EXAMPLES)
def test_a_field_is_a_number_a_flag_or_of_a_fixed_set(kind: type) -> None:
    assert is_dataclass(kind)
    hints = get_type_hints(kind)
    for field in fields(kind):
        if hints[field.name] not in (int, bool, Phase, Family, CallFormat | None, dict[str, int]):
            assert (kind, field.name) in TEXTS, f"{kind.__name__}.{field.name} could carry a text"
            assert hints[field.name] in (str, str | None)


def test_there_is_no_text_that_the_catalogue_does_not_have() -> None:
    assert all(field in {each.name for each in fields(kind)} for kind, field in TEXTS)


def test_what_concerns_requests_are_counts_alone() -> None:
    hints = {name: hint for name, hint in get_type_hints(Totals).items() if name != "event"}
    assert hints.pop("kms") == dict[str, int]
    assert set(hints.values()) == {int}
    assert [
        (kind, name) for kind in EXAMPLES for name, hint in get_type_hints(kind).items() if "dict" in str(hint)
    ] == [(Totals, "kms")]


def test_why_keys_did_not_come_is_counted_under_codes_of_a_closed_list() -> None:
    totals = Totals()
    for code in (*KMS_CODES, "kms_denied", "overloaded", "what KMS said", ""):
        totals.count_kms(code)
    assert totals.kms == dict.fromkeys(KMS_CODES, 1) | {"kms_denied": 2}


@pytest.mark.parametrize("event", EXAMPLES.values(), ids=lambda event: event.event)
async def test_an_event_is_one_line_of_json_with_its_name_and_its_fields(event: Event) -> None:
    written = EventLog()
    written.write(event)
    [line] = await everything(written)
    assert "\n" not in line
    read = json.loads(line)
    assert read["event"] == event.event
    assert read.keys() == {"event", "at"} | {field.name for field in fields(event)}


# --- Keeping and following ----------------------------------------------------------------------------------------


async def everything(written: EventLog) -> list[str]:
    written.close()
    return [line async for line in written.follow()]


def received(line: str) -> int:
    number = json.loads(line)["received"]
    assert isinstance(number, int)
    return number


async def test_one_who_asks_late_gets_the_last_events_in_order() -> None:
    written = EventLog(capacity=3)
    for number in range(10):
        written.write(WeightsReceived(number, 10))
    assert [received(line) for line in await everything(written)] == [7, 8, 9]


async def test_a_follower_gets_what_was_and_then_what_comes() -> None:
    written = EventLog()
    written.write(WeightsReceived(0, 3))
    async with aclosing(written.follow()) as lines:
        assert received(await anext(lines)) == 0
        waiting = asyncio.ensure_future(anext(lines))
        await asyncio.sleep(0)
        assert not waiting.done()
        written.write(WeightsReceived(1, 3))
        assert received(await waiting) == 1


async def test_two_followers_do_not_share() -> None:
    written = EventLog()
    async with aclosing(written.follow()) as first, aclosing(written.follow()) as second:
        written.write(WeightsReceived(0, 1))
        assert received(await anext(first)) == received(await anext(second)) == 0


async def test_a_follower_who_is_too_slow_misses_some_and_goes_on() -> None:
    written = EventLog(capacity=2)
    written.write(WeightsReceived(0, 9))
    async with aclosing(written.follow()) as lines:
        assert received(await anext(lines)) == 0
        for number in range(1, 6):
            written.write(WeightsReceived(number, 9))
        assert [received(await anext(lines)) for _ in range(2)] == [4, 5]


async def test_closing_ends_followers_after_the_last_event() -> None:
    written = EventLog()
    lines = written.follow()
    waiting = asyncio.ensure_future(rest(lines))
    await asyncio.sleep(0)
    written.write(WeightsReceived(0, 1))
    written.close()
    assert [received(line) for line in await waiting] == [0]


async def test_closing_ends_a_follower_who_waits() -> None:
    written = EventLog()
    waiting = asyncio.ensure_future(rest(written.follow()))
    await asyncio.sleep(0)
    written.close()
    assert await waiting == []


async def rest(lines: AsyncGenerator[str]) -> list[str]:
    return [line async for line in lines]


@given(st.integers(1, 5), st.lists(st.integers(0, 4), max_size=12))
def test_whoever_follows_gets_a_subsequence_that_ends_with_the_last(capacity: int, batches: list[int]) -> None:
    """Batches are written, one line is read between two of them: nothing comes twice, nothing out of order."""

    async def scenario() -> list[int]:
        written = EventLog(capacity=capacity)
        got, number = [], 0
        async with aclosing(written.follow()) as lines:
            for batch in batches:
                for _ in range(batch):
                    written.write(WeightsReceived(number, 99))
                    number += 1
                if batch:
                    got.append(received(await anext(lines)))
            written.close()
            got += [received(line) async for line in lines]
        assert got[-1:] == ([number - 1] if number else [])
        return got

    got = asyncio.run(scenario())
    assert got == sorted(set(got))


# --- Totals -------------------------------------------------------------------------------------------------------


async def test_an_interval_without_a_request_is_written_too() -> None:
    written = EventLog()
    written.totals.requests += 2
    written.totals.count_kms("kms_no_credentials")
    written.close_interval()
    written.close_interval()
    read = [json.loads(line) for line in await everything(written)]
    assert [totals["requests"] for totals in read] == [2, 0]
    assert [totals["kms"] for totals in read] == [{"kms_no_credentials": 1}, {}]
