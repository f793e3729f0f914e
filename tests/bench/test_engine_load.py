"""The engine's load generator: what it counts, as pure functions, and what it does with a server that follows a
script.
"""

from __future__ import annotations

import asyncio
import itertools
import json
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bench.engine import latency, residence, threads, throughput
from bench.engine.latency import Mixed
from bench.engine.load import (
    CUT,
    Ask,
    Clients,
    Heard,
    LoadError,
    Target,
    longest_gap,
    percentile,
    prompt_tokens_per_second,
    tokens_per_second,
    tokens_per_second_between,
)
from bench.engine.measuring import Bar, Bench, Figure, compare, order, paired_ratio
from bench.engine.prompts import essay, repetition, second_turn

HEARD = Heard(
    asked=10.0,
    events=(10.5, 10.6, 11.0),
    ended=11.25,
    text="abc",
    prompt_tokens=30,
    completion_tokens=3,
    cached_tokens=0,
    finish_reason="length",
)

# --- Arithmetic -------------------------------------------------------------------------------------------------------


def test_an_answer_s_times_are_its_own() -> None:
    assert HEARD.first == pytest.approx(0.5)
    assert HEARD.longest_gap == pytest.approx(0.4)


def test_an_answer_without_text_has_waited_to_its_end() -> None:
    assert replace(HEARD, events=()).first == pytest.approx(1.25)
    assert replace(HEARD, events=()).longest_gap == 0


@pytest.mark.parametrize(("times", "gap"), [((), 0), ((3.0,), 0), ((1.0, 2.0, 5.0, 5.5), 3)])
def test_the_longest_gap(times: Sequence[float], gap: float) -> None:
    assert longest_gap(times) == gap


@pytest.mark.parametrize(("percent", "value"), [(0, 1), (50, 3), (25, 2), (95, 4.8), (100, 5)])
def test_a_percentile_lies_between_the_nearest(percent: float, value: float) -> None:
    assert percentile([5, 1, 4, 2, 3], percent) == pytest.approx(value)


def test_a_percentile_of_nothing() -> None:
    with pytest.raises(ValueError, match="nothing"):
        percentile([], 50)


@given(st.lists(st.floats(-1e6, 1e6), min_size=1), st.floats(0, 100))
def test_a_percentile_is_within_its_values(values: list[float], percent: float) -> None:
    assert min(values) - 1e-6 <= percentile(values, percent) <= max(values) + 1e-6


def test_rates_are_those_of_all_answers_together() -> None:
    other = replace(HEARD, asked=10.5, events=(11.0, 12.0), ended=12.5, completion_tokens=7)
    assert tokens_per_second([HEARD, other]) == pytest.approx(10 / 2.5)
    assert tokens_per_second_between([HEARD, other]) == pytest.approx((2 + 6) / 1.5)


def test_a_rate_needs_time_between_two_events() -> None:
    assert tokens_per_second_between([replace(HEARD, events=())]) == 0
    assert tokens_per_second_between([replace(HEARD, events=(1.0,))]) == 0


def test_a_prompt_s_rate_leaves_out_what_was_kept() -> None:
    assert prompt_tokens_per_second(HEARD) == pytest.approx(60)
    assert prompt_tokens_per_second(replace(HEARD, cached_tokens=20)) == pytest.approx(20)


def test_ratios_are_of_runs_beside_each_other() -> None:
    assert paired_ratio([10, 20, 60], [10, 10, 20]) == 2
    assert paired_ratio([10], [0]) == 0


@pytest.mark.parametrize(
    ("bar", "holds", "said"),
    [
        (Bar(0.5), True, ("0.500", ">= 0.5")),
        (Bar(0.95), False, ("0.500, missed by 0.450", ">= 0.95")),
        (Bar(0.2, at_least=False), False, ("0.500, missed by 0.300", "<= 0.2")),
        (None, None, ("0.500", "for the record")),
    ],
)
def test_a_row_says_by_how_much_a_bar_is_missed(bar: Bar | None, holds: bool | None, said: tuple[str, str]) -> None:
    row = compare("what", Figure([1, 2, 3], "ms"), Figure([2, 4, 6], "ms"), "a peer", bar)
    assert (row.compared, row.bar) == said
    assert row.holds is holds
    assert (row.ours, row.peer) == ("2.0 ms (1.0..3.0)", "4.0 ms (2.0..6.0) (a peer)")


def test_who_goes_first_goes_last_in_the_next_run() -> None:
    assert [list(order("AB", run)) for run in range(-1, 3)] == [["B", "A"], ["A", "B"], ["B", "A"], ["A", "B"]]


def test_a_mixed_round_is_judged_by_its_short_streams() -> None:
    long = replace(HEARD, events=(30.0, 40.0), ended=40.0)
    mixed = Mixed.of([HEARD, replace(HEARD, events=(10.0, 10.7)), long])
    assert (mixed.gap, mixed.first, mixed.rate) == pytest.approx((0.7, 20.0, 9 / 30))


def test_llama_server_s_best_batch_keeps_its_tokens_or_has_the_shortest_gap() -> None:
    def of(gap: float, rate: float) -> list[Mixed]:
        return [Mixed(gap, 2.0, rate)]

    bench = Bench(runs=1, tokens=8, longest=0, openmp=False)
    results = {
        "Strongroom": of(0.3, 49.0),
        latency.FINE: of(0.1, 42.0),
        "llama-server": of(5.0, 50.0),
        "llama-server -b 64": of(0.2, 40.0),
        "llama-server -b 128": of(0.6, 48.0),
        "llama-server -b 256": of(1.0, 49.0),
    }
    assert latency.best_batch(results, keeps=0.95) == "llama-server -b 128"
    assert latency.best_batch(results, keeps=0.0) == "llama-server -b 64"
    rows = list(latency.mixed_rows(bench, "m", results))
    default, short, best, other, fine = (row for row in rows if "longest gap" in row.what)
    assert (default.compared, default.holds) == ("0.060", True)
    assert (short.compared, short.holds) == ("1.500, missed by 0.500", False)
    assert "its shortest at any price" in short.peer
    assert (best.compared, best.holds) == ("0.500", True)
    assert "its best with 0.95 of the default's tokens/s" in best.peer
    assert other.holds is None
    rates = [row.holds for row in rows if "tokens/s of all" in row.what]
    assert rates == [True, None, None, None, None]
    assert (fine.compared, fine.holds) == ("0.500", None)
    assert len(bench.figures) == 3 * len(results)


def test_nothing_but_the_default_may_keep_its_tokens() -> None:
    results = {"llama-server": [Mixed(5.0, 2.0, 50.0)], "llama-server -b 64": [Mixed(0.2, 2.0, 40.0)]}
    assert latency.best_batch(results, keeps=0.95) == "llama-server"


def test_samples_are_shares_by_innermost_function() -> None:
    raw = "run (enclave/worker/loop.py:1);decode (enclave/worker/llama.py:240) 970\n" + "".join(
        f"run (enclave/worker/loop.py:1);{name} (enclave/worker/sampler.py:9) {count}\n"
        for name, count in (("sample", 28), ("x", 2))
    )
    assert threads.shares_of(raw) == "decode (llama.py) 97.0 %, sample (sampler.py) 2.8 %, others 0.2 %"
    assert threads.shares_of("") == "py-spy saw nothing"


def test_no_two_rounds_share_a_prompt() -> None:
    levels = range(100)
    numbers = [throughput.number_of(run, level) for run in range(-1, 8) for level in levels]
    assert len(set(numbers)) == len(numbers)
    assert min(after - before for before, after in itertools.pairwise(numbers)) >= max(throughput.GROWN_STREAMS)


def test_the_bounds_of_memory_are_the_issue_s() -> None:
    assert [layout.most_gib for layout in residence.LAYOUTS] == [2.0, 2.4, None]


# --- Prompts ----------------------------------------------------------------------------------------------------------


def test_prompts_differ_from_their_first_word_on_and_have_their_length() -> None:
    asks = [essay(number, 500, answer=1).messages for number in range(50)]
    assert len({system["content"].split()[0] for system, _ in asks}) == len(asks)
    assert {len(user["content"].split()) for _, user in asks} <= set(range(470, 500))
    assert essay(7, 500, answer=1) == essay(7, 500, answer=1)
    assert "notes" not in essay(7, 40, answer=1).messages[1]["content"]


def test_a_second_turn_goes_on_from_the_first() -> None:
    first = essay(3, 100, answer=16)
    second = second_turn(first, "an answer", 3, 32, reply=8)
    assert second.messages[:2] == first.messages
    assert second.messages[2] == {"role": "assistant", "content": "an answer"}
    assert len(second.messages[3]["content"].split()) == 32
    assert repetition(1, answer=8) != repetition(2, answer=8)


# --- Against a server -------------------------------------------------------------------------------------------------

PIECE = {"choices": [{"delta": {"content": "x"}}]}
START = {"choices": [{"delta": {"role": "assistant", "content": ""}}]}
END = {"choices": [{"delta": {}, "finish_reason": "length"}]}
USAGE: dict[str, Any] = {
    "choices": [],
    "usage": {"prompt_tokens": 12, "completion_tokens": 5, "prompt_tokens_details": {"cached_tokens": 4}},
}
HOLD = object()
"""In a script: the server waits here until the client goes."""


@dataclass
class Scripted:
    """A server that answers the n-th request by the n-th script, the last one for all that follow."""

    scripts: list[Sequence[object]]
    status: int = 200
    bodies: list[dict[str, Any]] = field(default_factory=list)
    asked: list[asyncio.Event] = field(default_factory=lambda: [asyncio.Event() for _ in range(3)])
    """Set with each of the first requests."""

    async def answer(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while head := await reader.readuntil(b"\r\n\r\n"):
                length = next(
                    int(line.split(b":")[1]) for line in head.split(b"\r\n") if b"content-length" in line.lower()
                )
                self.bodies.append(json.loads(await reader.readexactly(length)))
                number = len(self.bodies)
                if number <= len(self.asked):
                    self.asked[number - 1].set()
                script = self.scripts[min(number, len(self.scripts)) - 1]
                await self._answer(writer, script)
                if HOLD in script:
                    await reader.read()
                    return
        except asyncio.IncompleteReadError:
            pass  # the client is done
        finally:
            writer.close()

    async def _answer(self, writer: asyncio.StreamWriter, script: Sequence[object]) -> None:
        head = f"HTTP/1.1 {self.status} X\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n"
        writer.write(head.encode())
        for event in script:
            if event is HOLD:
                await writer.drain()
                return
            text = event if isinstance(event, str) else json.dumps(event)
            data = f": a comment\n\ndata: {text}\n\n".encode()
            writer.write(b"%x\r\n%s\r\n" % (len(data), data))
            await writer.drain()
        writer.write(b"0\r\n\r\n")
        await writer.drain()


@asynccontextmanager
async def serving(server: Scripted, clock: Callable[[], float] | None = None) -> AsyncIterator[Clients]:
    listener = await asyncio.start_server(server.answer, "127.0.0.1", 0)
    port = listener.sockets[0].getsockname()[1]
    target = Target(f"http://127.0.0.1:{port}", "a model", {"cache_prompt": False})
    try:
        async with Clients(target, clock=clock or counting()) as clients:
            yield clients
    finally:
        listener.close()
        await listener.wait_closed()


def counting() -> Callable[[], float]:
    """A clock that goes on by a second each time that it is read."""
    ticks: Iterator[int] = iter(range(1 << 30))
    return lambda: float(next(ticks))


ASK = Ask(({"role": "user", "content": "Hello"},), 5)


async def test_an_answer_is_heard_as_it_comes() -> None:
    server = Scripted([[START, PIECE, PIECE, END, USAGE, "[DONE]"]])
    async with serving(server) as clients:
        heard = await clients.listen(ASK)
    assert heard == Heard(0.0, (1.0, 2.0), 3.0, "xx", 12, 5, 4, "length")
    assert server.bodies == [
        {
            "model": "a model",
            "messages": [{"role": "user", "content": "Hello"}],
            "max_tokens": 5,
            "temperature": 0,
            "stream": True,
            "stream_options": {"include_usage": True},
            "cache_prompt": False,
        }
    ]


async def test_reasoning_is_heard_and_is_no_text() -> None:
    thought = {"choices": [{"delta": {"reasoning_content": "hm"}}]}
    async with serving(Scripted([[START, thought, PIECE, END, "[DONE]"]])) as clients:
        heard = await clients.listen(ASK)
    assert (len(heard.events), heard.text) == (2, "x")


async def test_without_usage_events_are_counted() -> None:
    async with serving(Scripted([[START, PIECE, PIECE, PIECE, END, "[DONE]"]])) as clients:
        heard = await clients.listen(ASK)
    assert (heard.completion_tokens, heard.prompt_tokens) == (3, 0)


async def test_a_round_is_played_at_once_and_who_waits_comes_last() -> None:
    server = Scripted([[START, PIECE, PIECE, END, USAGE, "[DONE]"]])
    async with serving(server) as clients:
        asks = [replace(ASK, waits=2), ASK, replace(ASK, tokens=6)]
        answers = await clients.play(asks)
    assert [body["max_tokens"] for body in server.bodies].count(6) == 1
    assert server.bodies[2]["max_tokens"] == 5
    assert answers[0].asked > max(answer.events[1] for answer in answers[1:])


async def test_who_waits_for_more_events_than_come_is_let_go_at_the_end() -> None:
    async with serving(Scripted([[START, PIECE, END, "[DONE]"]])) as clients:
        waiting, other = await clients.play([replace(ASK, waits=100), ASK])
    assert waiting.asked > other.events[0]


async def test_an_answer_that_takes_too_long_is_cut() -> None:
    server = Scripted([[START, PIECE, HOLD]])
    async with serving(server) as clients:
        (heard,) = await clients.play([ASK], seconds=0.2)
    assert (heard.finish_reason, heard.completion_tokens) == (CUT, 1)


async def test_the_background_goes_on_until_the_block_ends() -> None:
    server = Scripted([[START, PIECE, END, "[DONE]"], [START, PIECE, HOLD]])
    async with serving(server) as clients, clients.background(lambda number: replace(ASK, tokens=number + 1), 2):
        await server.asked[2].wait()
    assert sorted(body["max_tokens"] for body in server.bodies) == [1, 2, 3]


async def test_a_background_that_fails_is_no_background() -> None:
    async with serving(Scripted([["nothing"]], status=500)) as clients:
        with pytest.raises(LoadError, match="answers 500"):
            async with clients.background(lambda number: ASK, 1):
                raise AssertionError("it has not begun")


@pytest.mark.parametrize(
    ("script", "status", "message"),
    [
        ([START, PIECE, {"error": {"message": "no more"}}], 200, "breaks off.*no more"),
        (["{}"], 429, "answers 429"),
    ],
)
async def test_a_refusal_is_an_error(script: Sequence[object], status: int, message: str) -> None:
    async with serving(Scripted([script], status=status)) as clients:
        with pytest.raises(LoadError, match=message):
            await clients.listen(ASK)


async def test_a_server_that_is_not_there_is_an_error() -> None:
    async with Clients(Target("http://127.0.0.1:1", "none")) as clients:
        with pytest.raises(LoadError, match=r"127\.0\.0\.1"):
            await clients.listen(ASK)


async def test_what_comes_after_the_end_is_not_heard() -> None:
    async with serving(Scripted([[PIECE, "[DONE]", PIECE]])) as clients:
        assert (await clients.listen(ASK)).text == "x"
