"""How long a person waits: for the first token, beside a long prompt, and for a conversation's next turn."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Final

from bench import Row
from bench.engine import sides as servers
from bench.engine.load import Ask, Clients, Heard, percentile, tokens_per_second
from bench.engine.measuring import Bar, Bench, Figure, compare, paired_ratio
from bench.engine.prompts import essay, second_turn
from bench.engine.sides import Side, Sizes
from bench.engine.throughput import OURS, PACED, PEER, number_of
from strongroom.prepare import Settings

# --- Time to first token ----------------------------------------------------------------------------------------------

PROBES: Final = 8
"""Requests of a round, one after the other."""
PROBE_PROMPT: Final = 128
PROBE_TOKENS: Final = 8
LOAD: Final = 4
"""Streams in the background."""


def first_token(bench: Bench) -> Iterator[Row]:
    sizes = Sizes(model=bench.gguf(), context=1024, parallel=8)
    with ExitStack() as stack:
        sides = [
            stack.enter_context(servers.ours(bench.native, sizes)),
            stack.enter_context(servers.ours(bench.native, sizes, name=PACED, tick_ms=Settings().tick_ms)),
            stack.enter_context(servers.llama_server(bench.llama_server, sizes)),
        ]
        for streams in (0, LOAD):

            async def play(side: Side, clients: Clients, run: int, streams: int = streams) -> list[float]:
                number = number_of(run, streams)
                if not streams:
                    return await _probes(clients, number)

                def ask(index: int) -> Ask:
                    return essay(number + 1000 + index, 64, answer=800)

                async with clients.background(ask, streams):
                    return await _probes(clients, number)

            results = bench.alternate(sides, play)
            load = f"beside {streams} streams" if streams else "without load"
            what = f"{bench.model}, time to first token, a prompt of about {PROBE_PROMPT} tokens, {load}"
            for name, runs in results.items():
                bench.keep(what, name, [1000 * each for run in runs for each in run], "ms")
            for name in (OURS, PACED):
                for percent in (50, 95):
                    yield _percentiles(f"{what}, p{percent}, {name}", results[name], results[PEER], percent)


async def _probes(clients: Clients, number: int) -> list[float]:
    asks = [essay(number + index, PROBE_PROMPT, answer=PROBE_TOKENS) for index in range(PROBES)]
    return [(await clients.listen(ask)).first for ask in asks]


def _percentiles(what: str, ours: Sequence[Sequence[float]], peer: Sequence[Sequence[float]], percent: float) -> Row:
    """Each run's own percentile, of which there are as many as runs. ``ours`` and ``peer`` are seconds."""
    mine, theirs = (Figure([1000 * percentile(run, percent) for run in runs], "ms", 0) for runs in (ours, peer))
    return compare(what, mine, theirs, PEER)


# --- A long prompt among short streams --------------------------------------------------------------------------------

SHORT: Final = 4
LONG_PROMPT: Final = 2000
LONG_ANSWER: Final = 32
BEGUN: Final = 8
"""Events of each short stream, after which the long prompt comes."""
BATCHES: Final = (32, 64, 128, 256, 512)
"""llama-server's ``-b``: a smaller one shortens the gap and costs tokens of all."""
FINE_PREFILL: Final = BATCHES[0] - SHORT + 1
"""``prefill`` with which our step has as much of a prompt as llama-server's with the smallest of these: what the short
streams leave of it, and one that goes with their rows.
"""
FINE: Final = f"{OURS}, prefill = {FINE_PREFILL}"
KEPT: Final = 0.95
"""The share of default llama-server's tokens per second that a side keeps to count for its gap."""
SHORT_ANSWERS: Final = 4
"""How many times as long as elsewhere the answers of the short streams are: the long prompt is read beside them."""


@dataclass(frozen=True, slots=True)
class Mixed:
    """Seconds, and tokens a second of all together."""

    gap: float
    """The longest between two pieces of text of any short stream."""
    first: float
    """Of the long prompt."""
    rate: float

    @classmethod
    def of(cls, answers: Sequence[Heard]) -> Mixed:
        """The last answer is the long prompt's."""
        *short, long = answers
        return cls(max(each.longest_gap for each in short), long.first, tokens_per_second(answers))


def mixed(bench: Bench) -> Iterator[Row]:
    """Against llama-server as it is by itself, and with each ``-b`` that could be its best."""
    sizes = Sizes(model=bench.gguf(), context=2304, parallel=SHORT + 1)
    what = f"{bench.model}, {SHORT} short streams and a prompt of about {LONG_PROMPT} tokens"
    with ExitStack() as stack:
        sides = [
            stack.enter_context(servers.ours(bench.native, sizes)),
            stack.enter_context(servers.ours(bench.native, sizes, name=FINE, engine={"prefill": FINE_PREFILL})),
            stack.enter_context(servers.llama_server(bench.llama_server, sizes)),
        ]
        for batch in BATCHES:
            name, more = f"{PEER} -b {batch}", ["-b", str(batch)]
            sides.append(stack.enter_context(servers.llama_server(bench.llama_server, sizes, name=name, more=more)))

        async def play(side: Side, clients: Clients, run: int, tokens: int = SHORT_ANSWERS * bench.answer) -> Mixed:
            number = number_of(run, 0)
            short = [essay(number + index, 64, answer=tokens) for index in range(SHORT)]
            long = essay(number + 90, LONG_PROMPT, answer=LONG_ANSWER)
            return Mixed.of(await clients.play([*short, Ask(long.messages, long.tokens, waits=BEGUN)]))

        yield from mixed_rows(bench, what, bench.alternate(sides, play))


def best_batch(results: Mapping[str, Sequence[Mixed]], *, keeps: float) -> str:
    """Which of llama-server's had the shortest gap, of those that kept so much of the default's tokens per second."""
    rates = {name: paired_ratio(_rates(of), _rates(results[PEER])) for name, of in results.items()}
    gaps = {name: statistics.median(each.gap for each in results[name]) for name in results if name not in (OURS, FINE)}
    return min((name for name in gaps if rates[name] >= keeps), key=gaps.__getitem__)


def _rates(of: Sequence[Mixed]) -> list[float]:
    return [each.rate for each in of]


def mixed_rows(bench: Bench, what: str, results: Mapping[str, Sequence[Mixed]]) -> Iterator[Row]:
    """The gap is held to the shortest that llama-server has where it keeps as many tokens per second as ours has to,
    and to the shortest that it has at any price.
    """
    figures = _figures(bench, what, results)
    at_rate, at_any = best_batch(results, keeps=KEPT), best_batch(results, keeps=0.0)
    gap, first, rate = figures[OURS]
    for name, (peer_gap, peer_first, peer_rate) in figures.items():
        if name in (OURS, FINE):
            continue
        titles = [name]
        if name == PEER:
            titles.append("default")
        if name == at_rate:
            titles.append(f"its best with {KEPT:g} of the default's tokens/s")
        if name == at_any:
            titles.append("its shortest at any price")
        title = ", ".join(titles)
        longest = Bar(1.0, at_least=False) if name in {at_rate, at_any} else None
        if name == PEER:
            longest = Bar(0.2, at_least=False)
        yield compare(f"{what}: longest gap of a short stream", gap, peer_gap, title, longest)
        yield compare(f"{what}: tokens/s of all together", rate, peer_rate, title, Bar(KEPT) if name == PEER else None)
        yield compare(f"{what}: the long prompt's first token", first, peer_first, title)
    gap, _, rate = figures[FINE]
    peer_gap, _, peer_rate = figures[at_any]
    yield compare(f"{what}: longest gap of a short stream, prefill = {FINE_PREFILL}", gap, peer_gap, at_any)
    yield compare(f"{what}: tokens/s of all together, prefill = {FINE_PREFILL}", rate, peer_rate, at_any)


def _figures(
    bench: Bench, what: str, results: Mapping[str, Sequence[Mixed]]
) -> dict[str, tuple[Figure, Figure, Figure]]:
    """The longest gap, the long prompt's first token, and tokens a second, by side."""

    def kept(kind: str, name: str, values: list[float], unit: str, digits: int) -> Figure:
        return Figure(bench.keep(f"{what}: {kind}", name, values, unit), unit, digits)

    return {
        name: (
            kept("longest gap", name, [1000 * each.gap for each in of], "ms", 0),
            kept("first token", name, [1000 * each.first for each in of], "ms", 0),
            kept("tokens/s", name, [each.rate for each in of], "tokens/s", 1),
        )
        for name, of in results.items()
    }


# --- A conversation's second turn -------------------------------------------------------------------------------------

HISTORY: Final = 1000
MORE: Final = 32
REPLY: Final = 16


@dataclass(frozen=True, slots=True)
class Turn:
    """Two second turns: one after its first, and one of a conversation that nobody has seen."""

    warm: Heard
    cold: Heard


def second_turns(bench: Bench) -> Iterator[Row]:
    sizes = Sizes(model=bench.gguf(), context=2048, parallel=4)
    with ExitStack() as stack:
        sides = [
            stack.enter_context(servers.ours(bench.native, sizes, caches=True)),
            stack.enter_context(servers.llama_server(bench.llama_server, sizes, caches=True)),
        ]

        async def play(side: Side, clients: Clients, run: int) -> Turn:
            number = number_of(run, 0)
            known, unknown = (essay(number + index, HISTORY - 2 * REPLY, answer=REPLY) for index in range(2))
            answer = await clients.listen(known)
            text = answer.text or "And so on."
            cold = await clients.listen(second_turn(unknown, text, number + 1, MORE, reply=REPLY))
            return Turn(await clients.listen(second_turn(known, text, number, MORE, reply=REPLY)), cold)

        results = bench.alternate(sides, play)
        yield from _turn_rows(bench, results)


def _turn_rows(bench: Bench, results: Mapping[str, Sequence[Turn]]) -> Iterator[Row]:
    ours = results[OURS]
    history, cached = ours[0].warm.prompt_tokens, ours[0].warm.cached_tokens
    theirs = results[PEER][0].warm.cached_tokens
    what = f"{bench.model}, second turn, {history} tokens of which {cached} are kept: first token"

    def figure(name: str, kind: str, values: list[float]) -> Figure:
        return Figure(bench.keep(f"{what}, {kind}", name, [1000 * value for value in values], "ms"), "ms", 0)

    warm = {name: figure(name, "warm", [each.warm.first for each in of]) for name, of in results.items()}
    cold = {name: figure(name, "cold", [each.cold.first for each in of]) for name, of in results.items()}
    yield compare(what, warm[OURS], cold[OURS], "cold, ours", Bar(0.15, at_least=False))
    yield compare(what, warm[OURS], warm[PEER], f"{PEER}, keeps {theirs}", Bar(1.0, at_least=False))
    yield compare(f"{what}, cold", cold[OURS], cold[PEER], PEER)
    yield compare(f"{bench.model}, second turn, {PEER}'s own", warm[PEER], cold[PEER], f"cold, {PEER}")
