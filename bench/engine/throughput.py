"""Tokens per second: by streams, by context, of prompts, and on the portable build."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import Final

from bench import Row
from bench.engine import sides as servers
from bench.engine.load import (
    Clients,
    Heard,
    percentile,
    prompt_tokens_per_second,
    tokens_per_second,
    tokens_per_second_between,
)
from bench.engine.measuring import RECORD, Bar, Bench, Figure, alone, compare
from bench.engine.prompts import essay, repetition
from bench.engine.session import through_session
from bench.engine.sides import Side, Sizes
from strongroom.prepare import Settings

PROMPT: Final = 40
"""Tokens, about, of a short prompt."""
STREAMS: Final = (1, 2, 4, 8, 16)
CONTEXT: Final = 512
PYTHON_STREAMS: Final = (1, 8)
"""llama-cpp-python's server answers one after the other: two levels say all."""
OURS, PACED, PEER, OPENMP, PYTHON = (
    "Strongroom", "Strongroom, default tick", "llama-server", "llama-server, OpenMP", "llama_cpp.server",
)  # fmt: skip
FITTED: Final = "llama-server, a slot a stream"
"""It takes the slot that has rested longest, and computes those that do not lie side by side in several passes: with
slots to spare, and after other numbers of streams, that is not its best.
"""


@dataclass(frozen=True, slots=True)
class Round:
    """All answers of one turn, and the CPU seconds of each process in it."""

    answers: Sequence[Heard]
    cpu: Mapping[str, float]

    @property
    def rate(self) -> float:
        return tokens_per_second(self.answers)

    @property
    def rate_between(self) -> float:
        return tokens_per_second_between(self.answers)


async def play_essays(side: Side, clients: Clients, number: int, streams: int, prompt: int, tokens: int) -> Round:
    """``streams`` essays at once, of numbers from ``number`` on."""
    before = side.cpu_seconds()
    asks = [essay(number + index, prompt, answer=tokens) for index in range(streams)]
    answers = await clients.play(asks)
    after = side.cpu_seconds()
    return Round(answers, {name: after[name] - before[name] for name in before})


def number_of(run: int, level: int) -> int:
    """Where the prompts of a round begin: no two rounds of a part share one."""
    return 1 + (run + 1) * 10_000 + level * 100


# --- Streams ----------------------------------------------------------------------------------------------------------


def streams(bench: Bench) -> Iterator[Row]:
    sizes = Sizes(model=bench.gguf(), context=CONTEXT, parallel=max(STREAMS))
    with ExitStack() as stack:
        ours = stack.enter_context(servers.ours(bench.native, sizes))
        paced = stack.enter_context(servers.ours(bench.native, sizes, name=PACED, tick_ms=Settings().tick_ms))
        peers = [stack.enter_context(servers.llama_server(bench.llama_server, sizes))]
        if bench.openmp:
            build = bench.llama_server_openmp
            peers.append(stack.enter_context(servers.llama_server(build, sizes, name=OPENMP)))
        python = stack.enter_context(servers.llama_cpp_server(bench.llama_cpp_server, sizes))
        for level in STREAMS:
            sides = [ours, paced, *peers, *([python] if level in PYTHON_STREAMS else [])]
            with ExitStack() as fitted:
                if 1 < level < sizes.parallel:
                    fitting = replace(sizes, parallel=level)
                    sides.append(fitted.enter_context(servers.llama_server(bench.llama_server, fitting, name=FITTED)))
                yield from _level(bench, sides, level)
        yield from _session(bench, ours)


def _level(bench: Bench, sides: Sequence[Side], level: int) -> Iterator[Row]:
    tokens = bench.answer

    async def play(side: Side, clients: Clients, run: int) -> Round:
        return await play_essays(side, clients, number_of(run, level), level, PROMPT, tokens)

    rounds = bench.alternate(sides, play)
    what = f"{bench.model}, {streams_text(level)}"
    rates = {name: _kept(bench, f"{what}: tokens/s", name, [each.rate for each in of]) for name, of in rounds.items()}
    bar = Bar(0.95) if level <= 4 else Bar(1.0)
    yield compare(f"{what}: tokens/s, pacing off", rates[OURS], rates[PEER], PEER, bar)
    if FITTED in rates:
        yield compare(f"{what}: tokens/s, pacing off", rates[OURS], rates[FITTED], FITTED, bar)
    yield compare(f"{what}: tokens/s, default tick", rates[PACED], rates[PEER], PEER)
    if OPENMP in rates:
        yield compare(f"{what}: tokens/s, pacing off", rates[OURS], rates[OPENMP], OPENMP)
    if PYTHON in rates:
        bar_python = Bar(1.8) if level == 8 else None
        yield compare(f"{what}: tokens/s, pacing off", rates[OURS], rates[PYTHON], PYTHON, bar_python)
    between = {
        name: _kept(bench, f"{what}: tokens/s after the first", name, [each.rate_between for each in of])
        for name, of in rounds.items()
    }
    yield compare(f"{what}: tokens/s from first text to last, pacing off", between[OURS], between[PEER], PEER)
    yield from _described(bench, what, rounds, tokens)


def _described(bench: Bench, what: str, rounds: Mapping[str, Sequence[Round]], tokens: int) -> Iterator[Row]:
    """What the figures were made of: lengths, delivered tokens, events, waits and CPU seconds."""
    for name, of in rounds.items():
        answers = [answer for each in of for answer in each.answers]
        firsts = bench.keep(f"{what}: time to first token", name, [1000 * answer.first for answer in answers], "ms")
        delivered = sum(answer.completion_tokens for answer in answers)
        events = sum(len(answer.events) for answer in answers)
        short = sum(answer.completion_tokens < tokens for answer in answers)
        gap = 1000 * max(answer.longest_gap for answer in answers)
        cpu = {process: sum(each.cpu[process] for each in of) / len(of) for process in of[0].cpu}
        lengths = sorted({answer.prompt_tokens for answer in answers})
        prompts = f"{lengths[0]}..{lengths[-1]}" if lengths[-1] else "not said"
        yield Row(
            f"{what}: {name}",
            f"first token p50 {percentile(firsts, 50):.0f} ms, p95 {percentile(firsts, 95):.0f} ms; "
            f"longest gap {gap:.0f} ms",
            f"prompt tokens {prompts}; {delivered} of {len(answers) * tokens} tokens delivered, "
            f"{short} answers ended early; {events / max(1, delivered):.2f} events a token",
            "CPU s a round: " + ", ".join(f"{process} {seconds:.2f}" for process, seconds in cpu.items()),
            RECORD,
        )


def _session(bench: Bench, ours: Side) -> Iterator[Row]:
    """The same through a session of Python, without the gateway."""
    tokens = bench.answer
    for level in (1, 8):

        async def play(side: Side, clients: Clients, run: int, level: int = level) -> tuple[float, float]:
            number = number_of(run, 50 + level)
            played = await play_essays(side, clients, number, level, PROMPT, tokens)
            asks = [essay(number + 50 + index, PROMPT, answer=tokens) for index in range(level)]
            return tokens_per_second(await through_session(side, asks)), played.rate

        pairs = bench.alternate([ours], play)[OURS]
        session = _kept(bench, f"{bench.model}, {level}: tokens/s", "a Session of Python", [pair[0] for pair in pairs])
        gateway = Figure([pair[1] for pair in pairs], "tokens/s")
        yield compare(
            f"{bench.model}, {streams_text(level)}: a Session of Python", session, gateway, "through the gateway"
        )


def _kept(bench: Bench, what: str, side: str, values: Sequence[float], unit: str = "tokens/s") -> Figure:
    return Figure(bench.keep(what, side, values, unit), unit)


def streams_text(count: int) -> str:
    return "1 stream" if count == 1 else f"{count} streams"


# --- The portable build -----------------------------------------------------------------------------------------------

GATE: Final = 10.0
"""Tokens a second that the reference asks of the 1.5 B shape, in one stream."""


def portable(bench: Bench) -> Iterator[Row]:
    sizes = Sizes(model=bench.gguf(), context=CONTEXT, parallel=8)
    with ExitStack() as stack:
        sides = [
            stack.enter_context(servers.ours(bench.native, sizes)),
            stack.enter_context(servers.ours(bench.portable, sizes, name="Strongroom, portable build")),
        ]
        for level in (1, 8):

            async def play(
                side: Side, clients: Clients, run: int, level: int = level, tokens: int = bench.answer
            ) -> Round:
                return await play_essays(side, clients, number_of(run, level), level, PROMPT, tokens)

            rounds = bench.alternate(sides, play)
            what = f"{bench.model}, {streams_text(level)}, portable build"
            rates = [
                _kept(bench, f"{what}: tokens/s", side.name, [each.rate for each in rounds[side.name]])
                for side in sides
            ]
            yield compare(f"{what}: tokens/s", rates[1], rates[0], "native build")
            if level == 1 and bench.model == "1.5b":
                least = min(each.rate_between for each in rounds[sides[1].name])
                held = f"{least:.1f} tokens/s, the least of {bench.runs} prompts"
                yield Row(f"{what}: the reference's gate", held, "", "", f"> {GATE:g} tokens/s", least > GATE)


# --- Prompts ----------------------------------------------------------------------------------------------------------

PREFILLS: Final = (256, 1024, 2000)


def prefill(bench: Bench) -> Iterator[Row]:
    """Tokens of a prompt up to the first token of its answer: one prompt at a time."""
    sizes = Sizes(model=bench.gguf(), context=2304, parallel=1)
    with ExitStack() as stack:
        sides = [
            stack.enter_context(servers.ours(bench.native, sizes)),
            stack.enter_context(servers.llama_server(bench.llama_server, sizes)),
        ]
        for index, length in enumerate(PREFILLS):

            async def play(side: Side, clients: Clients, run: int, index: int = index, length: int = length) -> Heard:
                return await clients.listen(essay(number_of(run, index), length, answer=2))

            answers = bench.alternate(sides, play)
            tokens = answers[OURS][0].prompt_tokens
            what = f"{bench.model}, a prompt of {tokens} tokens: prompt tokens/s"
            rates = {
                name: _kept(bench, what, name, [prompt_tokens_per_second(each) for each in of])
                for name, of in answers.items()
            }
            yield compare(what, rates[OURS], rates[PEER], PEER)


# --- Growth -----------------------------------------------------------------------------------------------------------

CONTEXTS: Final = (256, 512, 1024, 2048, 4096, 8192)
GROWN_STREAMS: Final = (1, 2, 4, 8, 16, 32)
TAIL: Final = 48
"""Tokens of an answer at the end of a context."""
_TEMPLATE: Final = 64
"""Tokens that a chat template adds, and more."""


def growth(bench: Bench) -> Iterator[Row]:
    yield from _contexts(bench)
    yield from _many(bench)


def _contexts(bench: Bench) -> Iterator[Row]:
    """Of one prompt for each length, which both sides keep: what is measured comes after it."""
    lengths = [length for length in CONTEXTS if length <= bench.longest]
    sizes = Sizes(model=bench.gguf(), context=max(lengths), parallel=1)
    with ExitStack() as stack:
        sides = [
            stack.enter_context(servers.ours(bench.native, sizes, caches=True)),
            stack.enter_context(servers.llama_server(bench.llama_server, sizes, caches=True)),
        ]
        for index, length in enumerate(lengths):

            async def play(side: Side, clients: Clients, run: int, index: int = index, length: int = length) -> Heard:
                return await clients.listen(essay(number_of(0, index), length - TAIL - _TEMPLATE, answer=TAIL))

            answers = bench.alternate(sides, play)
            what = f"{bench.model}, at the end of a context of {length} tokens: tokens/s"
            rates = {
                name: _kept(bench, what, name, [tokens_per_second_between([each]) for each in of])
                for name, of in answers.items()
            }
            yield compare(what, rates[OURS], rates[PEER], PEER)


def _many(bench: Bench) -> Iterator[Row]:
    sizes = Sizes(model=bench.gguf(), context=256, parallel=max(GROWN_STREAMS))
    with ExitStack() as stack:
        sides = [
            stack.enter_context(servers.ours(bench.native, sizes)),
            stack.enter_context(servers.llama_server(bench.llama_server, sizes)),
        ]
        for level in GROWN_STREAMS:

            async def play(side: Side, clients: Clients, run: int, level: int = level) -> Round:
                return await play_essays(side, clients, number_of(run, level), level, PROMPT, TAIL)

            rounds = bench.alternate(sides, play)
            what = (
                f"{bench.model}, {streams_text(level)} of {max(GROWN_STREAMS)} slots: tokens/s from first text to last"
            )
            rates = {name: _kept(bench, what, name, [each.rate_between for each in of]) for name, of in rounds.items()}
            yield compare(what, rates[OURS], rates[PEER], PEER)


# --- Speculation ------------------------------------------------------------------------------------------------------

SPECULATIONS: Final = ("ngram-simple", "ngram-map-k", "ngram-mod")


def speculation(bench: Bench) -> Iterator[Row]:
    """What llama-server gains by guessing tokens from text that has been: one stream of natural text that recurs."""
    sizes = Sizes(model=bench.gguf(), context=1024, parallel=1)
    with ExitStack() as stack:
        ours = stack.enter_context(servers.ours(bench.native, sizes))
        plain = stack.enter_context(servers.llama_server(bench.llama_server, sizes))
        guessing = [
            stack.enter_context(
                servers.llama_server(
                    bench.llama_server, sizes, name=f"llama-server, {kind}", more=["--spec-type", kind]
                )
            )
            for kind in SPECULATIONS
        ]

        async def play(side: Side, clients: Clients, run: int) -> float:
            return tokens_per_second([await clients.listen(repetition(run + 2, answer=2 * bench.tokens))])

        what = f"{bench.model}, 1 stream of natural text that recurs: tokens/s"
        values = bench.alternate([ours, plain, *guessing], play)
        rates = {name: _kept(bench, what, name, of) for name, of in values.items()}
        yield compare(what, rates[OURS], rates[PEER], f"{PEER}, speculation off")
        for side in guessing:
            kind = side.name.rpartition(" ")[2]
            yield compare(f"{what}; the peer guesses, we do not", rates[OURS], rates[side.name], f"{PEER}, {kind}")
            gain = [a / b if b else 0.0 for a, b in zip(values[side.name], values[PEER], strict=True)]
            yield alone(f"what {PEER} gains by {kind}", Figure(gain, "times", 2))
