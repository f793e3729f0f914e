"""The engine process seen from the server: how it is confined, and what its death, its silence and its lies cost."""

from __future__ import annotations

import asyncio
import errno
import os
import signal
import struct
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import aclosing, asynccontextmanager, suppress
from dataclasses import replace
from pathlib import Path

import llama_cpp
import pytest

from attestation.gguf import ModelError
from attestation.manifest import ModelManifest
from attestation.model_family import Family, ModelFamily
from enclave.config import EngineSettings
from enclave.engine import MAX_RETRY_SECONDS, LlamaEngine
from enclave.generation import (
    EngineError,
    EngineFailed,
    EngineRefused,
    GenerationEvent,
    InvalidRequest,
    NotRead,
    Overloaded,
    Unavailable,
)
from enclave.pipe import Counted, End, Load, Piece, PipeError, Ready, ToServer
from enclave.process import MAX_UNREAD, PAUSE_ABOVE, RESUME_BELOW, Answer, EngineProcess
from tests.enclave.conftest import sealed
from tests.engines import engine_settings
from tests.gguf_files import CHAT_TEMPLATE, TEXT, tiny_model
from vsockrpc.chat import ChatMessage, ChatRequest, CompletionRequest, GenerationRequest
from vsockrpc.messages import Alternative, Delta, Done, TokenLogprob, ToolCallDelta, Usage

UID = 64001
ROOT = os.geteuid() == 0
SETTINGS = engine_settings(context=4096, parallel=2, threads=1, queue=4, uid=UID)
LONG = ChatRequest((ChatMessage("user", "hello"),), temperature=0)
SHORT = ChatRequest((ChatMessage("user", "hello"),), temperature=0, max_tokens=3)


class Events:
    def __init__(self) -> None:
        self.started: list[Ready] = []
        self.exits = 0
        self.lost: list[str] = []

    def exited(self) -> None:
        self.exits += 1


@pytest.fixture
def events() -> Events:
    return Events()


@pytest.fixture
async def engine(tiny_weights: int, events: Events) -> AsyncIterator[LlamaEngine]:
    engine = LlamaEngine(
        tiny_weights, CHAT_TEMPLATE, SETTINGS, on_start=events.started.append, on_exit=events.exited, stall_seconds=2
    )
    await engine.start()
    yield engine
    await engine.close()


async def finish(engine: LlamaEngine, request: GenerationRequest) -> Usage:
    """The counts of a whole answer."""
    *_, done = [event async for event in engine.generate(request)]
    assert isinstance(done, Done)
    return done.usage


def status(pid: int) -> dict[str, list[str]]:
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return {name: values.split() for name, _, values in (line.partition(":") for line in lines)}


def pid_of(engine: LlamaEngine) -> int:
    assert engine.pid is not None
    return engine.pid


# --- Confinement
# -------------------------------------------------------------------------------------------------------


async def test_the_process_has_given_up_what_it_can(engine: LlamaEngine, events: Events) -> None:
    [ready] = events.started
    pid = pid_of(engine)
    fields = status(pid)
    assert ready.own_user == ROOT
    assert ready.model == ModelFamily(Family.UNKNOWN, False, False, None)
    if ROOT:
        assert fields["Uid"] == fields["Gid"] == [str(UID)] * 4
        assert fields["Groups"] == []
        assert fields["CapEff"] == fields["CapPrm"] == ["0" * 16]
    assert fields["NoNewPrivs"] == ["1"]
    if ready.seccomp:
        assert fields["Seccomp"] == ["2"]
    limits = Path(f"/proc/{pid}/limits").read_text().splitlines()
    assert [line.split()[4:6] for line in limits if line.startswith("Max core file size")] == [["0", "0"]]
    assert [line.split()[3:5] for line in limits if line.startswith("Max open files")] == [["1", "1"]]


@pytest.mark.skipif(not ROOT, reason="only root may look into a process that is not dumpable")
async def test_the_process_has_one_pipe_and_no_streams(engine: LlamaEngine) -> None:
    pid = pid_of(engine)
    descriptors = {int(entry.name): os.readlink(entry) for entry in Path(f"/proc/{pid}/fd").iterdir()}
    assert [descriptors[number] for number in (0, 1, 2)] == ["/dev/null"] * 3
    others = [target for number, target in descriptors.items() if number > 2]
    assert sum(target.startswith("socket:") for target in others) == 1
    assert all(target.startswith(("socket:", "/memfd:weights")) for target in others)
    environment = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
    assert {entry.partition(b"=")[0] for entry in environment if entry} == {b"LC_ALL", b"OPENBLAS_NUM_THREADS"}


async def test_a_template_that_fails_for_the_first_time_behind_the_filter_is_a_typed_error(tiny_weights: int) -> None:
    template = CHAT_TEMPLATE + "{% if messages|length > 1 %}{{ nothing.at.all }}{% endif %}"
    engine = LlamaEngine(tiny_weights, template, SETTINGS)
    await engine.start()
    try:
        pid = engine.pid
        with pytest.raises(InvalidRequest, match="UndefinedError"):
            await finish(engine, ChatRequest((ChatMessage("user", "a"), ChatMessage("user", "b"))))
        assert (await finish(engine, SHORT)).completion_tokens == 3
        assert engine.pid == pid
    finally:
        await engine.close()


# --- Death, silence, lies --------------------------------------------------------------------------------------------


async def test_a_process_killed_in_mid_answer_fails_what_was_in_flight_and_nothing_else(
    engine: LlamaEngine, events: Events
) -> None:
    first = pid_of(engine)
    async with aclosing(engine.generate(LONG)) as answer:
        assert isinstance(await anext(answer), Delta)
        waiting = asyncio.create_task(finish(engine, SHORT))
        await asyncio.sleep(0)
        os.kill(first, signal.SIGKILL)
        with pytest.raises(EngineFailed) as caught:
            while True:
                await anext(answer)
    assert caught.value.code == "engine_failed"
    with pytest.raises(EngineFailed):
        await waiting
    assert (await finish(engine, SHORT)).completion_tokens == 3
    assert engine.pid != first
    assert events.exits == 1
    assert len(events.started) == 1  # what happens later is no event of its own
    assert not Path(f"/proc/{first}").exists()


async def test_a_process_that_hangs_is_killed(engine: LlamaEngine) -> None:
    first = pid_of(engine)
    async with aclosing(engine.generate(LONG)) as answer:
        await anext(answer)
        os.kill(first, signal.SIGSTOP)
        with pytest.raises(EngineFailed, match="silent"):
            while True:
                await anext(answer)
    assert (await finish(engine, SHORT)).completion_tokens == 3
    assert engine.pid != first


async def test_the_process_dies_with_its_pipe(tiny_weights: int) -> None:
    engine = LlamaEngine(tiny_weights, CHAT_TEMPLATE, SETTINGS)
    await engine.start()
    pid = pid_of(engine)
    await engine.close()
    assert engine.pid is None
    assert not Path(f"/proc/{pid}").exists()


SERVER = """
import asyncio, os, signal, sys
from enclave.engine import MAX_RETRY_SECONDS, LlamaEngine
from tests.engines import engine_settings

async def main():
    weights = os.open(sys.argv[1], os.O_RDONLY)
    engine = LlamaEngine(weights, sys.argv[2], engine_settings(context=64, threads=1))
    await engine.start()
    print(engine.pid, flush=True)
    os.kill(os.getpid(), signal.SIGKILL)

asyncio.run(main())
"""


def test_the_process_does_not_outlive_a_killed_server(tmp_path: Path) -> None:
    path = tmp_path / "tiny.gguf"
    path.write_bytes(tiny_model().encode())
    tmp_path.chmod(0o755)
    command = [sys.executable, "-c", SERVER, str(path), CHAT_TEMPLATE]
    server = subprocess.run(command, stdout=subprocess.PIPE, check=False)
    assert server.returncode == -signal.SIGKILL
    worker = Path(f"/proc/{int(server.stdout)}/stat")
    with suppress(FileNotFoundError, ProcessLookupError):
        while worker.read_text().rpartition(")")[2].split()[0] != "Z":  # it is somebody else's child now
            time.sleep(0.01)


@pytest.mark.parametrize(
    "lie",
    [
        b"\xff\xff\xff\xff",
        struct.pack(">I", 1) + b"\xa0",
        struct.pack(">I", 4) + b"\xff\xff\xff\xff",
        Piece(99, Delta("x")).encode(),
    ],
    ids=["length", "empty map", "no CBOR", "an answer that nobody asked for"],
)
async def test_a_process_that_breaks_the_protocol_is_replaced(
    engine: LlamaEngine, monkeypatch: pytest.MonkeyPatch, lie: bytes
) -> None:
    worker = engine._worker
    assert worker is not None
    async with aclosing(engine.generate(LONG)) as answer:
        await anext(answer)
        worker._stream.feed_data(lie * 100_000)  # as if it came from the process, wherever in its stream that hits
        with pytest.raises(EngineFailed, match="protocol"):
            while True:
                await anext(answer)
    assert (await finish(engine, SHORT)).completion_tokens == 3
    assert engine._worker is not worker


def of(usage: Usage) -> End:
    return End(0, Done("stop", usage))


@asynccontextmanager
async def answerless(engine: LlamaEngine) -> AsyncIterator[EngineProcess]:
    """A process with an answer in work that it cannot end: it is stopped before it is asked."""
    worker = engine._worker
    assert worker is not None
    os.kill(pid_of(engine), signal.SIGSTOP)
    asked = asyncio.create_task(finish(engine, LONG))
    await until(lambda: 0 in worker._answers)
    yield worker
    asked.cancel()
    with suppress(asyncio.CancelledError):
        await asked


@pytest.mark.parametrize(
    "lie",
    [
        Counted(0, 5),
        of(Usage(5000, 1)),
        of(Usage(1, 5000)),
        of(Usage(5, 5, 6)),
        of(Usage(5, 5, 0, 6)),
    ],
    ids=["a count", "a prompt of too many", "an answer of too many", "more cached than read", "more thought than said"],
)
async def test_what_no_answer_can_be_is_a_lie(engine: LlamaEngine, lie: ToServer) -> None:
    async with answerless(engine) as worker:
        with pytest.raises(PipeError):
            worker._take(lie)


@pytest.mark.parametrize("lie", [of(Usage(41, 1)), of(Usage(1, 31))])
async def test_what_is_over_a_budget_is_a_lie(tiny_weights: int, lie: ToServer) -> None:
    engine = LlamaEngine(tiny_weights, CHAT_TEMPLATE, replace(SETTINGS, prompt_tokens=40, answer_tokens=30))
    await engine.start()
    async with answerless(engine) as worker:
        with pytest.raises(PipeError, match="more tokens"):
            worker._take(lie)
    await engine.close()


@pytest.mark.parametrize("lie", [Piece(0, Delta("x")), of(Usage(1, 1))])
async def test_what_no_count_can_be_is_a_lie(engine: LlamaEngine, lie: ToServer) -> None:
    worker = engine._worker
    assert worker is not None
    answer = await worker.count(SHORT)
    with pytest.raises(PipeError, match="another kind"):
        worker._take(lie)
    assert await answer.number_of_tokens() > 0  # what the process itself says of it


@pytest.mark.parametrize(
    "delta",
    [
        Delta("x"),
        Delta(reasoning="x"),
        Delta(tool_calls=(ToolCallDelta(0, ""),)),
        Delta(tool_calls=(ToolCallDelta(0, ""),) * 100),
        Delta(logprobs=(TokenLogprob(b"", 0.0),)),
        Delta(logprobs=(TokenLogprob(b"x" * 1024, 0.0, (Alternative(b"x" * 1024, 0.0),) * 20),) * 16),
    ],
)
def test_no_answer_fills_the_server_s_memory(delta: Delta) -> None:
    """Whatever an answer's deltas are made of, a few hundred are too many for one token."""
    answer = Answer(0, 1)
    with pytest.raises(PipeError, match="more text"):
        for _ in range(300):
            answer.add(delta)


def test_an_answer_of_the_longest_tokens_has_room() -> None:
    answer = Answer(0, 100)
    longest = TokenLogprob(b"x" * 128, -1.0, (Alternative(b"x" * 128, -1.0),) * 20)
    for _ in range(100):
        answer.add(Delta("x" * 128, logprobs=(longest,)))


async def test_an_answer_that_begins_with_its_prompt_has_room_for_it(tiny_weights: int) -> None:
    engine = LlamaEngine(tiny_weights, CHAT_TEMPLATE, replace(SETTINGS, context=16384, cells=2 * 16384))
    prompt = "x" * 16000
    request = CompletionRequest(prompt=prompt, echo=True, max_tokens=1, temperature=0)
    await engine.start()
    try:
        assert text_of([event async for event in engine.generate(request)]).startswith(prompt)
    finally:
        await engine.close()


# --- Slow readers ----------------------------------------------------------------------------------------------------

HEAVY = Delta(logprobs=(TokenLogprob(b"x" * 128, 0.0, (Alternative(b"x" * 128, 0.0),) * 20),) * 16)
"""About 84 KiB."""
ALL_LOGGED = CompletionRequest(prompt="hello", temperature=0, top_logprobs=20)


async def until(condition: Callable[[], bool]) -> None:
    while not condition():  # noqa: ASYNC110 - nobody tells
        await asyncio.sleep(0.01)


async def test_an_answer_that_is_not_read_pauses_and_goes_on_when_it_is() -> None:
    flow: list[bool] = []
    answer = Answer(0, 10_000, on_flow=lambda answer: flow.append(answer.is_paused))
    while not answer.is_paused:
        answer.add(HEAVY)
    assert PAUSE_ABOVE < answer.unread < PAUSE_ABOVE + 100_000
    answer.add(HEAVY)  # it was on its way
    events = aiter(answer)
    while flow != [True, False]:
        await anext(events)
    assert answer.unread <= RESUME_BELOW
    with pytest.raises(PipeError, match="was to pause"):
        for _ in range(200):
            answer.add(HEAVY)


async def test_the_process_makes_no_more_of_what_is_not_read(engine: LlamaEngine) -> None:
    """Whoever reads nothing neither fills the server's memory nor holds up others, and misses nothing."""
    async with aclosing(engine.generate(ALL_LOGGED)) as slow:
        events = [await anext(slow)]
        assert engine._worker is not None
        [answer] = engine._worker._answers.values()
        await until(lambda: answer.is_paused)
        assert (await finish(engine, SHORT)).completion_tokens == 3
        assert PAUSE_ABOVE < answer.unread < MAX_UNREAD
        events += [event async for event in slow]
    done = events.pop()
    assert isinstance(done, Done)
    assert sum(len(event.logprobs) for event in events if isinstance(event, Delta)) == done.usage.completion_tokens
    assert done.usage.completion_tokens > 3000


async def test_a_paused_answer_is_no_silence(engine: LlamaEngine) -> None:
    """The process owes nothing then, and may be quiet for longer than one that has hung."""
    pid = engine.pid
    async with aclosing(engine.generate(ALL_LOGGED)) as slow:
        await anext(slow)
        await asyncio.sleep(2.5)
        assert [type(event) async for event in slow][-1] is Done
    assert engine.pid == pid


async def test_a_process_that_rested_has_all_of_its_time_for_the_next_request(
    engine: LlamaEngine, events: Events
) -> None:
    await asyncio.sleep(1.5)
    os.kill(pid_of(engine), signal.SIGSTOP)
    asked = asyncio.create_task(finish(engine, SHORT))
    await asyncio.sleep(1)  # 2.5 s of silence, 1 s of them with something to do
    os.kill(pid_of(engine), signal.SIGCONT)
    assert (await asked).completion_tokens == 3
    assert events.exits == 0


async def test_whoever_leaves_an_answer_paused_for_too_long_gets_no_more_of_it(
    engine: LlamaEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("enclave.process.PAUSE_SECONDS", 0.05)
    async with aclosing(engine.generate(ALL_LOGGED)) as slow:
        await anext(slow)
        await until(lambda: engine._requests == 0)
        with pytest.raises(NotRead) as caught:
            await anext(slow)
    assert caught.value.code == "deadline_exceeded"
    assert (await finish(engine, SHORT)).completion_tokens == 3


async def test_an_answer_that_is_whole_takes_no_place_however_slowly_it_is_read(tiny_weights: int) -> None:
    engine = LlamaEngine(tiny_weights, CHAT_TEMPLATE, replace(SETTINGS, parallel=1, cells=4096, queue=0))
    await engine.start()
    try:
        async with aclosing(engine.generate(replace(SHORT, max_tokens=50))) as slow:
            await anext(slow)
            await until(lambda: engine._requests == 0)
            assert (await finish(engine, SHORT)).completion_tokens == 3
            assert isinstance([event async for event in slow][-1], Done)
    finally:
        await engine.close()


async def test_of_too_much_that_nobody_reads_the_oldest_goes(
    engine: LlamaEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("enclave.engine.MAX_UNREAD_TOGETHER", 10_000)
    request = replace(SHORT, max_tokens=20, top_logprobs=1)
    async with aclosing(engine.generate(request)) as first, aclosing(engine.generate(request)) as second:
        for slow in (first, second):
            await anext(slow)
            await until(lambda: engine._requests == 0)
        with pytest.raises(NotRead):
            await anext(first)
        assert isinstance([event async for event in second][-1], Done)
    assert not engine._unread


@asynccontextmanager
async def crowded(engine: LlamaEngine) -> AsyncIterator[None]:
    """One is answered and another waits: all that an engine takes with ``parallel`` and ``queue`` of 1."""
    async with aclosing(engine.generate(LONG)) as first:
        await anext(first)
        second = asyncio.create_task(finish(engine, SHORT))
        await asyncio.sleep(0)
        yield
    await second


async def test_whoever_is_one_too_many_is_told_when_to_come_again(tiny_weights: int) -> None:
    engine = LlamaEngine(tiny_weights, CHAT_TEMPLATE, replace(SETTINGS, parallel=1, cells=4096, queue=1))
    await engine.start()
    try:
        async with crowded(engine):
            with pytest.raises(Overloaded) as caught:
                await finish(engine, SHORT)
            with pytest.raises(Overloaded):
                await engine.count(SHORT)
        assert caught.value.retry_seconds in [1 << power for power in range(12)]
        assert (caught.value.expected, caught.value.got) == ("<= 2 at once", "3")
    finally:
        await engine.close()


@pytest.mark.parametrize(("counts", "seconds"), [(True, 1), (False, MAX_RETRY_SECONDS)])
async def test_a_count_says_nothing_of_how_long_an_answer_takes(
    tiny_weights: int, monkeypatch: pytest.MonkeyPatch, counts: bool, seconds: int
) -> None:
    settings = replace(SETTINGS, parallel=1, cells=4096, queue=1)
    engine = LlamaEngine(tiny_weights, CHAT_TEMPLATE, settings, stall_seconds=1e9)
    await engine.start()
    loop, finished, late = asyncio.get_running_loop(), Answer.finish, 0.0
    real = loop.time

    def finish_late(answer: Answer, end: Done | int | EngineError) -> None:
        nonlocal late
        late += 100_000
        finished(answer, end)

    monkeypatch.setattr(loop, "time", lambda: real() + late)
    monkeypatch.setattr(Answer, "finish", finish_late)
    try:
        await (engine.count(SHORT) if counts else finish(engine, SHORT))
        async with crowded(engine):
            with pytest.raises(Overloaded) as caught:
                await finish(engine, SHORT)
        assert caught.value.retry_seconds == seconds
    finally:
        await engine.close()


@pytest.mark.parametrize(
    ("seconds", "requests", "hint"),
    [(0.0, 4, 1), (0.01, 64, 1), (2.0, 4, 4), (2.0, 12, 8), (2.0, 20, 16), (2.0, 64, 64), (30.0, 4, 64), (1e9, 64, 64)],
)
async def test_the_more_are_there_the_later_is_another_to_come_again(
    tiny_weights: int, seconds: float, requests: int, hint: int
) -> None:
    """By what the last answers took: all that are there have theirs then, four at a time. A minute at most, about."""
    engine = LlamaEngine(tiny_weights, CHAT_TEMPLATE, replace(SETTINGS, parallel=4, queue=requests - 4))
    engine._requests, engine._seconds = requests, seconds
    with pytest.raises(Overloaded) as caught:
        await finish(engine, SHORT)
    assert caught.value.retry_seconds == hint


async def test_answers_that_give_up_their_cells_lose_nothing(tiny_weights: int) -> None:
    """Each answer goes on until the context ends, and that is all cells that there are, of llama.cpp's too: so whoever
    had begun before another ended had to give up its own.
    """
    everything = engine_settings(context=256, parallel=3, cells=256, batch=64, prefill=32, threads=1, queue=4, uid=UID)
    engine = LlamaEngine(tiny_weights, CHAT_TEMPLATE, everything)
    requests = [ChatRequest((ChatMessage("user", letter * 40),), temperature=0) for letter in "abc"]
    order: list[tuple[str, int]] = []

    async def answer(number: int) -> list[GenerationEvent]:
        events: list[GenerationEvent] = []
        async for event in engine.generate(requests[number]):
            if not events:
                order.append(("begins", number))
            events.append(event)
        order.append(("ends", number))
        return events

    await engine.start()
    try:
        alone = [await answer(number) for number in range(3)]
        order.clear()
        together = await asyncio.gather(*(answer(number) for number in range(3)))
    finally:
        await engine.close()
    assert order[:3] == [("begins", 0), ("begins", 1), ("begins", 2)]
    for events, expected in zip(together, alone, strict=True):
        assert text_of(events) == text_of(expected)
        assert events[-1] == expected[-1]
        assert isinstance(events[-1], Done)
        usage = events[-1].usage
        assert usage.prompt_tokens + usage.completion_tokens == everything.cells


@pytest.mark.parametrize(("threads", "expected"), [(0, 3), (1, 1), (2, 2)])
async def test_as_many_threads_as_the_process_has_cpus_unless_it_is_told(
    tiny_weights: int, monkeypatch: pytest.MonkeyPatch, threads: int, expected: int
) -> None:
    loads: list[Load] = []

    async def launch(weights: int, load: Load, stall_seconds: float) -> EngineProcess:
        loads.append(load)
        raise OSError(errno.ENOMEM, "none")

    monkeypatch.setattr(EngineProcess, "launch", launch)
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {1, 5, 6} if pid == 0 else set())
    with pytest.raises(EngineRefused):
        await LlamaEngine(tiny_weights, CHAT_TEMPLATE, replace(SETTINGS, threads=threads)).start()
    assert [load.settings.threads for load in loads] == [expected]


async def test_each_thread_has_a_cpu_of_its_own_where_there_are_as_many(tiny_weights: int) -> None:
    cpus = os.sched_getaffinity(0)
    for threads in {len(cpus), 1}:
        engine = LlamaEngine(tiny_weights, CHAT_TEMPLATE, replace(SETTINGS, threads=threads))
        await engine.start()
        try:
            tasks = [int(entry.name) for entry in Path(f"/proc/{pid_of(engine)}/task").iterdir()]
            may_use = [os.sched_getaffinity(task) for task in tasks]
        finally:
            await engine.close()
        if threads == len(cpus):
            assert sorted(may_use, key=sorted) == [{cpu} for cpu in sorted(cpus)]
        else:
            assert may_use == [cpus]
    assert os.sched_getaffinity(0) == cpus


async def test_requests_do_not_wait_for_ever_for_a_process(tiny_weights: int, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = LlamaEngine(tiny_weights, CHAT_TEMPLATE, SETTINGS, wait_seconds=0.01)
    await engine.start()
    try:
        first = pid_of(engine)
        monkeypatch.setattr("enclave.engine.FIRST_PAUSE_SECONDS", 3600)
        monkeypatch.setattr("enclave.engine.LAST_PAUSE_SECONDS", 3600)
        os.kill(first, signal.SIGKILL)
        with pytest.raises(EngineFailed):
            while True:  # until its death is noticed
                await finish(engine, SHORT)
        with pytest.raises(Unavailable, match="in time"):
            await finish(engine, SHORT)
    finally:
        await engine.close()


async def test_after_too_many_failed_starts_no_other_is_tried(
    tiny_weights: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    lost: list[str] = []
    engine = LlamaEngine(tiny_weights, CHAT_TEMPLATE, SETTINGS, on_lost=lost.append)
    await engine.start()
    try:
        monkeypatch.setattr("enclave.engine.FIRST_PAUSE_SECONDS", 0)
        monkeypatch.setattr(engine, "_template", "{% broken")
        os.kill(pid_of(engine), signal.SIGKILL)
        with pytest.raises(EngineFailed):
            while True:
                await finish(engine, SHORT)
        with pytest.raises(Unavailable, match="cannot be started"):
            await finish(engine, SHORT)
        assert engine.ended
        assert lost == ["EngineRefused"]
    finally:
        await engine.close()


async def test_a_start_that_the_system_refuses_is_tried_again(
    tiny_weights: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    launch, refusals = EngineProcess.launch, iter([OSError(errno.EMFILE, "too many"), OSError(errno.ENOMEM, "none")])

    async def launch_at_last(weights: int, load: Load, stall_seconds: float) -> EngineProcess:
        for refusal in refusals:
            raise refusal
        return await launch(weights, load, stall_seconds)

    engine = LlamaEngine(tiny_weights, CHAT_TEMPLATE, SETTINGS)
    await engine.start()
    try:
        monkeypatch.setattr("enclave.engine.FIRST_PAUSE_SECONDS", 0)
        monkeypatch.setattr(EngineProcess, "launch", launch_at_last)
        os.kill(pid_of(engine), signal.SIGKILL)
        with pytest.raises(EngineFailed):
            while True:  # until its death is noticed
                await finish(engine, SHORT)
        assert (await finish(engine, SHORT)).completion_tokens == 3
        assert next(refusals, None) is None
        assert not engine.ended
    finally:
        await engine.close()
    assert engine.ended


async def test_a_thousand_deaths_are_followed_by_another_start(
    tiny_weights: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("enclave.engine.FIRST_PAUSE_SECONDS", 1e-9)
    engine = LlamaEngine(tiny_weights, CHAT_TEMPLATE, SETTINGS)
    worker = await engine._spawn_again(deaths=2000)
    await worker.end("the test is over")


async def test_a_defect_of_the_keeper_is_told_and_ends_the_engine(
    tiny_weights: int, events: Events, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def serve(_: EngineProcess) -> str:
        raise ZeroDivisionError("what the person said")

    monkeypatch.setattr(EngineProcess, "serve", serve)
    engine = LlamaEngine(tiny_weights, CHAT_TEMPLATE, SETTINGS, on_lost=events.lost.append)
    await engine.start()
    try:
        assert engine._keeper is not None
        await engine._keeper
        assert engine.ended
        assert events.lost == ["ZeroDivisionError"]
        with pytest.raises(Unavailable, match="cannot be started"):
            await finish(engine, SHORT)
    finally:
        await engine.close()


# --- Starts that fail
# ----------------------------------------------------------------------------------------------------


async def refused(data: bytes, *, template: str = CHAT_TEMPLATE, settings: EngineSettings = SETTINGS) -> Exception:
    descriptor = sealed(data)
    engine = LlamaEngine(descriptor, template, settings)
    try:
        with pytest.raises((ModelError, EngineRefused)) as caught:
            await engine.start()
    finally:
        await engine.close()
        os.close(descriptor)
    assert engine.pid is None
    return caught.value


def _truncated() -> bytes:
    return tiny_model().encode()[:-4096]


def _lying_count() -> bytes:
    data = bytearray(tiny_model().encode())
    struct.pack_into("<Q", data, 16, 2**62)
    return bytes(data)


@pytest.mark.parametrize(
    ("broken", "code"), [(_truncated, "truncated_gguf"), (_lying_count, "malformed_gguf"), (lambda: b"PK", "not_gguf")]
)
async def test_llama_cpp_never_sees_a_broken_file(
    broken: Callable[[], bytes], code: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def launch(*_: object) -> None:
        raise AssertionError("a process was started")

    monkeypatch.setattr("enclave.engine.EngineProcess.launch", launch)
    error = await refused(broken())
    assert isinstance(error, ModelError)
    assert error.code == code


async def test_a_sound_file_that_llama_cpp_refuses_is_a_typed_error() -> None:
    model = tiny_model()
    model.metadata[0] = ("general.architecture", TEXT, "no such architecture")
    error = await refused(model.encode())
    assert isinstance(error, EngineRefused)
    assert error.code == "model_refused"


async def test_a_file_on_which_llama_cpp_aborts_is_a_typed_error() -> None:
    model = tiny_model()
    model.metadata = [entry for entry in model.metadata if entry[0] != "tokenizer.ggml.tokens"]
    assert isinstance(await refused(model.encode()), EngineRefused)


async def test_a_context_longer_than_the_model_s_is_refused_with_both_numbers() -> None:
    settings = engine_settings(context=4096, threads=1)
    error = await refused(tiny_model(context=1024).encode(), settings=settings)
    assert isinstance(error, EngineRefused)
    assert (error.code, error.expected, error.got) == ("context_exceeded", "<= 1024", "4096")


async def test_a_template_that_is_none_is_a_typed_error() -> None:
    error = await refused(tiny_model().encode(), template="{% for %}")
    assert isinstance(error, EngineRefused)
    assert error.code == "bad_template"


# --- The real model
# ------------------------------------------------------------------------------------------------------


@pytest.mark.model
async def test_the_real_model_says_what_llama_cpp_says_and_survives_a_kill(smollm2: Path) -> None:
    manifest = ModelManifest.from_gguf(smollm2)
    descriptor = sealed(smollm2.read_bytes())
    settings = engine_settings(context=512, parallel=2, batch=128, prefill=64, queue=1)
    engine = LlamaEngine(descriptor, manifest.chat_template, settings)
    question = "Tell me a long story about a fox and a river."
    greedy = ChatRequest((ChatMessage("user", question),), temperature=0, max_tokens=32)
    try:
        await engine.start()
        events = [event async for event in engine.generate(greedy)]
        sampled = ChatRequest(greedy.messages, temperature=0.8, top_k=40, top_p=0.9, min_p=0.05, seed=7, max_tokens=8)
        first = [event async for event in engine.generate(sampled)]
        second = [event async for event in engine.generate(sampled)]
        # How the text is cut into events depends on the clock; the text and the counts do not.
        assert (text_of(first), first[-1]) == (text_of(second), second[-1])
        async with aclosing(engine.generate(ChatRequest(greedy.messages, temperature=0))) as answer:
            await anext(answer)
            os.kill(pid_of(engine), signal.SIGKILL)
            with pytest.raises(EngineFailed):
                while True:
                    await anext(answer)
        assert text_of([event async for event in engine.generate(greedy)]) == text_of(events)
    finally:
        await engine.close()
        os.close(descriptor)
    direct = llama_cpp.Llama(str(smollm2), n_ctx=512, n_batch=128, n_threads=2, flash_attn=True, verbose=False)
    try:
        reply = direct.create_chat_completion([{"role": "user", "content": question}], temperature=0.0, max_tokens=32)
    finally:
        direct.close()
    assert isinstance(reply, dict)
    assert text_of(events) == reply["choices"][0]["message"]["content"]
    assert events[-1] == Done("length", Usage(reply["usage"]["prompt_tokens"], 32))


def text_of(events: Sequence[GenerationEvent]) -> str:
    return "".join(event.content for event in events if isinstance(event, Delta))
