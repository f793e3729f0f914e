"""Answers on their beat, on a clock that jumps to whatever is due next: nothing here waits, and every time is exact."""

from __future__ import annotations

import asyncio
import selectors
from collections.abc import Awaitable, Callable, Coroutine
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any, TypeVar, cast

import pytest
from hypothesis import given
from hypothesis import strategies as st

from attestation.errors import StrongroomError
from attestation.secret import Secret
from enclave.config import PacingSettings
from enclave.pacing import DRAIN_SECONDS, MAX_PENDING, PacedAnswer
from vsockrpc.errors import ConnectionLost
from vsockrpc.messages import Answer, Delta, Done, Failure, MessageReader, Usage, decode_answer
from vsockrpc.sealed import ANSWER_SALT_SIZE, HEADER_SIZE, TAG_SIZE, AnswerOpener, ExchangeKeys
from vsockrpc.transport import Fault, IncomingCall

T = TypeVar("T")

RECORD, BUCKET, TICK_MS = 128, 4, 50
TICK = TICK_MS / 1000
CAPACITY = RECORD - 2
ON_THE_WIRE = HEADER_SIZE + RECORD + TAG_SIZE
PACED = PacingSettings(TICK_MS, RECORD, BUCKET)
UNPACED = PacingSettings(0, RECORD, BUCKET)
SECONDS = 60.0
DONE = Done("stop", Usage(1, 1)).encode()


# --- A clock that jumps -------------------------------------------------------------------------------------------


class _Jump(selectors.SelectSelector):
    """Where the loop would sleep, time passes instead."""

    now = 0.0

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        events = super().select(0)
        if not events:
            assert timeout is not None, "nothing will ever happen"
            self.now += timeout
        return events


class JumpingLoop(asyncio.SelectorEventLoop):
    def __init__(self) -> None:
        self._jump = _Jump()
        super().__init__(self._jump)

    def time(self) -> float:
        return self._jump.now


def run(scenario: Coroutine[Any, Any, T]) -> T:
    with asyncio.Runner(loop_factory=JumpingLoop) as runner:
        return runner.run(scenario)


# --- A call, and both its ends ------------------------------------------------------------------------------------


@dataclass
class Wire:
    """Stands where the call is: keeps each record with the time at which it left. ``take`` is how the client reads."""

    take: Callable[[], Awaitable[None]] = lambda: asyncio.sleep(0)
    replied: list[float] = field(default_factory=list)
    records: list[bytes] = field(default_factory=list)
    times: list[float] = field(default_factory=list)
    ends: list[bool] = field(default_factory=list)

    async def reply(self, meta: object) -> None:
        self.replied.append(asyncio.get_running_loop().time())

    async def send(self, data: bytes, *, end: bool = False) -> None:
        self.times.append(asyncio.get_running_loop().time())
        self.records.append(data)
        self.ends.append(end)
        await self.take()


class Exchange:
    def __init__(self, pacing: PacingSettings, wire: Wire | None = None, *, seconds: float = SECONDS) -> None:
        keys = ExchangeKeys(Secret(b"s" * 32), b"sealed")
        self.wire = wire or Wire()
        self.defects = 0
        self.answer = PacedAnswer(cast(IncomingCall, self.wire), keys, pacing, seconds=seconds, on_defect=self._count)
        self._opener = AnswerOpener(keys)

    def _count(self) -> None:
        self.defects += 1

    async def run(self, *messages: bytes) -> bool:
        """Work that writes ``messages`` and ends."""

        async def work() -> None:
            for message in messages:
                await self.answer.write(message)

        return await self.answer.run(work)

    def read(self) -> list[Answer]:
        """What the client makes of the records: a whole answer, or an error."""
        content = b"".join(self._opener.feed(record) for record in self.wire.records)
        self._opener.finish()
        assert self.wire.ends == [False] * (len(self.wire.records) - 1) + [True]
        return [decode_answer(message) for message in MessageReader().feed(content)]

    def sizes(self) -> list[int]:
        """Bytes of each record; the first also carries the salt."""
        first, *others = (len(record) for record in self.wire.records)
        return [first - ANSWER_SALT_SIZE, *others]


# --- On the beat --------------------------------------------------------------------------------------------------


async def _written(schedule: list[tuple[float, int]], rest: float = 0.0) -> Exchange:
    exchange = Exchange(PACED)

    async def work() -> None:
        for pause, size in schedule:
            await asyncio.sleep(pause)
            await exchange.answer.write(Delta("x" * size).encode())
        await asyncio.sleep(rest)

    assert await exchange.answer.run(work)
    return exchange


@given(st.lists(st.tuples(st.floats(0, 0.4), st.integers(1, 300)), max_size=12), st.floats(0, 1))
def test_records_leave_one_a_tick_whatever_is_in_them(schedule: list[tuple[float, int]], rest: float) -> None:
    exchange = run(_written(schedule, rest))
    count = len(exchange.wire.records)
    assert exchange.wire.times == pytest.approx([TICK * (index + 1) for index in range(count)])
    assert set(exchange.sizes()) == {ON_THE_WIRE}
    assert count % BUCKET == 0
    worked = sum(pause for pause, _ in schedule) + rest
    content = sum(len(Delta("x" * size).encode()) for _, size in schedule)
    # One bucket less would have been too short for the time, or for the text that came as late as it did.
    assert (count - BUCKET) * TICK <= worked + content / CAPACITY * TICK + 2 * TICK
    assert (count + 1) * TICK >= worked
    assert exchange.read() == [Delta("x" * size) for _, size in schedule]


@given(st.lists(st.floats(0, 1), min_size=1, max_size=8), st.lists(st.integers(0, 40), min_size=1, max_size=8))
def test_two_answers_of_one_duration_look_the_same(pauses: list[float], sizes: list[int]) -> None:
    """One that says nothing and ends, and one whose tokens come as they please: an observer sees the same."""
    total = 1.01 * sum(pauses) + 0.2
    schedule = [(pause, sizes[index % len(sizes)]) for index, pause in enumerate(pauses)]
    spoken, silent = run(_written(schedule, total - sum(pauses))), run(_written([], total))
    assert spoken.sizes() == silent.sizes()
    assert spoken.wire.times == pytest.approx(silent.wire.times)


def test_the_beat_begins_with_the_acceptance_and_not_with_the_first_token() -> None:
    exchange = run(_written([], 10 * TICK + TICK / 2))
    assert exchange.wire.replied == [0.0]
    assert exchange.wire.times[0] == pytest.approx(TICK)
    assert len(exchange.wire.records) == 12


def test_a_slow_client_gets_no_burst_afterwards() -> None:
    """Records that a burst brings at once would tell how many ticks the text had been waiting."""
    slow = iter([0.0, 7 * TICK, 0.0, 0.0])

    async def scenario() -> list[float]:
        exchange = Exchange(PACED, Wire(lambda: asyncio.sleep(next(slow, 0.0))))
        await exchange.run(b"".join(Delta("x" * 100).encode() for _ in range(8)), DONE)
        assert exchange.read()[-1] == Done("stop", Usage(1, 1))
        return exchange.wire.times

    times = run(scenario())
    pauses = [later - sooner for sooner, later in pairwise(times)]
    assert min(pauses[:1] + pauses[2:]) >= TICK - 1e-9
    assert pauses[1] == pytest.approx(7 * TICK)


# --- Without pacing -----------------------------------------------------------------------------------------------


def test_without_a_tick_each_message_leaves_at_once() -> None:
    async def scenario() -> Exchange:
        exchange = Exchange(UNPACED)
        seen: list[int] = []

        async def work() -> None:
            for text in ("one", "two", "three"):
                await exchange.answer.write(Delta(text).encode())
                await asyncio.sleep(1)
                seen.append(len(exchange.wire.records))

        assert await exchange.answer.run(work)
        assert seen == [1, 2, 3]
        return exchange

    exchange = run(scenario())
    assert exchange.wire.times == [0.0, 1.0, 2.0, 3.0]
    assert exchange.read() == [Delta("one"), Delta("two"), Delta("three")]


@given(st.lists(st.integers(1, 400), max_size=8))
def test_without_a_tick_the_number_of_records_is_rounded_too(sizes: list[int]) -> None:
    async def scenario() -> Exchange:
        exchange = Exchange(UNPACED)
        assert await exchange.run(*(Delta("x" * size).encode() for size in sizes))
        return exchange

    exchange = run(scenario())
    content = sum(len(Delta("x" * size).encode()) for size in sizes)
    needed = max(1, -(-content // CAPACITY))
    assert len(exchange.wire.records) == -(-needed // BUCKET) * BUCKET
    assert set(exchange.sizes()) == {ON_THE_WIRE}
    assert exchange.wire.times[-1] == 0.0
    assert exchange.read() == [Delta("x" * size) for size in sizes]


# --- Back-pressure ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("pacing", [PACED, UNPACED], ids=["paced", "unpaced"])
def test_work_that_is_too_fast_waits(pacing: PacingSettings) -> None:
    message = Delta("x" * 5000).encode()

    async def scenario() -> None:
        exchange = Exchange(pacing, seconds=3600)
        most = 0

        async def work() -> None:
            nonlocal most
            for count in range(1, 101):
                await exchange.answer.write(message)
                most = max(most, count * len(message) - len(exchange.wire.records) * CAPACITY)

        assert await exchange.answer.run(work)
        assert MAX_PENDING < most <= MAX_PENDING + len(message) + CAPACITY
        assert len(exchange.read()) == 100

    run(scenario())


# --- How it ends --------------------------------------------------------------------------------------------------


async def _failed(error: Exception, pacing: PacingSettings = UNPACED) -> Exchange:
    exchange = Exchange(pacing)

    async def work() -> None:
        await exchange.answer.write(Delta("so far").encode())
        raise error

    assert not await exchange.answer.run(work)
    return exchange


@pytest.mark.parametrize("pacing", [PACED, UNPACED], ids=["paced", "unpaced"])
def test_a_failure_is_told_sealed_after_what_came_before(pacing: PacingSettings) -> None:
    error = StrongroomError("engine_failed", "the engine process ended", expected="an answer", got="nothing")
    exchange = run(_failed(error, pacing))
    failure = Failure("engine_failed", "the engine process ended", "an answer", "nothing")
    assert exchange.read() == [Delta("so far"), failure]
    assert exchange.defects == 0


def test_a_defect_is_counted_and_told_without_its_text() -> None:
    exchange = run(_failed(RuntimeError("a prompt that got into a message")))
    assert exchange.read()[-1] == Failure("internal", "the enclave failed at this request")
    assert exchange.defects == 1
    assert b"prompt" not in b"".join(exchange.wire.records)


def test_a_failures_text_is_no_longer_than_a_client_accepts() -> None:
    exchange = run(_failed(StrongroomError("c" * 100, "m" * 9000, expected="e" * 9000, got="g" * 9000)))
    assert exchange.read()[-1] == Failure("c" * 64, "m" * 4096, "e" * 4096, "g" * 4096)


@pytest.mark.parametrize("pacing", [PACED, UNPACED], ids=["paced", "unpaced"])
def test_failures_and_answers_of_one_length_look_the_same(pacing: PacingSettings) -> None:
    failed = run(_failed(StrongroomError("overloaded", "the engine's queue is full"), pacing))
    spoken = Exchange(pacing)
    assert run(spoken.run(Delta("so far").encode(), DONE))
    assert failed.sizes() == spoken.sizes()
    assert failed.wire.times == spoken.wire.times


def test_work_that_takes_too_long_is_ended_and_told_so() -> None:
    async def scenario() -> Exchange:
        exchange = Exchange(PACED, seconds=5.0)
        ended = asyncio.Event()

        async def work() -> None:
            await exchange.answer.write(Delta("so far").encode())
            try:
                await asyncio.Event().wait()
            finally:
                ended.set()

        assert not await exchange.answer.run(work)
        assert ended.is_set()
        return exchange

    exchange = run(scenario())
    assert exchange.read() == [
        Delta("so far"),
        Failure("deadline_exceeded", "the request took too long", "<= 5 s"),
    ]
    assert 5.0 <= exchange.wire.times[-1] <= 5.0 + (BUCKET + 1) * TICK


def test_a_client_that_does_not_read_is_given_up() -> None:
    async def scenario() -> float:
        exchange = Exchange(UNPACED, Wire(_never), seconds=5.0)
        with pytest.raises(Fault) as caught:
            await exchange.run(DONE)
        assert caught.value.code == "deadline_exceeded"
        return asyncio.get_running_loop().time()

    assert run(scenario()) == pytest.approx(5.0 + DRAIN_SECONDS)


async def _never() -> None:
    await asyncio.Event().wait()


def test_the_slowest_beat_that_can_be_configured_comes_to_its_end() -> None:
    """What waits for its tick, and the ticks that fill the bucket, are no delay of the client's."""
    slowest = PacingSettings(tick_ms=10_000, record_bytes=64, bucket_records=1024)

    async def scenario() -> Exchange:
        exchange = Exchange(slowest, seconds=1.0)
        message = Delta("x" * 60_000).encode()
        assert await exchange.run(message)
        return exchange

    exchange = run(scenario())
    assert exchange.read() == [Delta("x" * 60_000)]
    assert len(exchange.wire.records) == 1024


def test_a_client_that_leaves_stops_the_work() -> None:
    async def scenario() -> None:
        exchange = Exchange(PACED)
        working, stopped = asyncio.Event(), asyncio.Event()

        async def work() -> None:
            working.set()
            try:
                await asyncio.Event().wait()
            finally:
                stopped.set()

        answering = asyncio.ensure_future(exchange.answer.run(work))
        await working.wait()
        answering.cancel()
        left = asyncio.get_running_loop().time()
        with pytest.raises(asyncio.CancelledError):
            await answering
        assert stopped.is_set()
        assert asyncio.get_running_loop().time() == left
        sent = len(exchange.wire.records)
        await asyncio.sleep(100 * TICK)
        assert len(exchange.wire.records) == sent

    run(scenario())


def test_work_that_waits_for_room_is_stopped_too() -> None:
    async def scenario() -> None:
        exchange = Exchange(UNPACED, Wire(_never))
        stopped = asyncio.Event()

        async def work() -> None:
            try:
                while True:
                    await exchange.answer.write(bytes(MAX_PENDING))
            finally:
                stopped.set()

        answering = asyncio.ensure_future(exchange.answer.run(work))
        await asyncio.sleep(1)
        answering.cancel()
        left = asyncio.get_running_loop().time()
        with pytest.raises(asyncio.CancelledError):
            await answering
        assert stopped.is_set()
        assert asyncio.get_running_loop().time() == left

    run(scenario())


def test_a_lost_connection_ends_the_work_and_is_said_as_it_is() -> None:
    async def lost() -> None:
        raise ConnectionLost("the other side closed the connection")

    async def scenario() -> None:
        exchange = Exchange(PACED, Wire(lost))
        stopped = asyncio.Event()

        async def work() -> None:
            try:
                await asyncio.Event().wait()
            finally:
                stopped.set()

        with pytest.raises(ConnectionLost):
            await exchange.answer.run(work)
        assert stopped.is_set()
        assert asyncio.get_running_loop().time() == TICK

    run(scenario())


def test_no_work_begins_for_a_client_that_has_left_already() -> None:
    class Gone(Wire):
        async def reply(self, meta: object) -> None:
            raise ConnectionLost("closed")

    async def scenario() -> None:
        exchange = Exchange(PACED, Gone())
        began = asyncio.Event()

        async def work() -> None:
            began.set()

        with pytest.raises(ConnectionLost):
            await exchange.answer.run(work)
        assert not began.is_set()
        assert exchange.wire.records == []

    run(scenario())
