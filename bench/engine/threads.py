"""Threads that decode beside busy neighbours, and where an engine's time goes."""

from __future__ import annotations

import asyncio
import contextlib
import re
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Final

from bench import Row
from bench.engine import peers
from bench.engine import sides as servers
from bench.engine.load import Ask, Clients, tokens_per_second
from bench.engine.measuring import RECORD, Bench, Figure, compare
from bench.engine.prompts import essay
from bench.engine.sides import Side, Sizes
from bench.engine.throughput import OPENMP, OURS, PEER, PROMPT, number_of, play_essays, streams_text
from enclave.worker.__main__ import NICENESS

# --- Neighbours -------------------------------------------------------------------------------------------------------

NEIGHBOURS: Final = (0, 1, 2)
NEIGHBOUR_TOKENS: Final = 32
NEIGHBOUR_SECONDS: Final = 60.0
"""After which a round is cut: decoding may all but stop."""


@contextlib.contextmanager
def busy(count: int) -> Iterator[None]:
    """So many processes that do nothing but use a core."""
    spinning = [subprocess.Popen([sys.executable, "-I", "-S", "-c", "while True: pass"]) for _ in range(count)]
    try:
        yield
    finally:
        for process in spinning:
            process.kill()
            process.wait()


def neighbours(bench: Bench) -> Iterator[Row]:
    """Both with as many threads as there are cores, and with one fewer; llama-server also as nice as our engine process
    makes itself, since a neighbour that is not takes more of a core from whoever is.
    """
    with ExitStack() as stack:
        ours, theirs, openmp = list[Side](), list[Side](), list[Side]()
        for threads in (2, 1):
            sizes = Sizes(model=bench.gguf(), context=512, parallel=4, threads=threads)
            suffix = f", {threads} {'threads' if threads > 1 else 'thread'}"
            ours.append(stack.enter_context(servers.ours(bench.native, sizes, name=OURS + suffix)))
            theirs.append(stack.enter_context(servers.llama_server(bench.llama_server, sizes, name=PEER + suffix)))
            theirs.append(
                stack.enter_context(
                    servers.llama_server(
                        bench.llama_server, sizes, name=f"{PEER}, nice {NICENESS}{suffix}", niceness=NICENESS
                    )
                )
            )
            if bench.openmp:
                build = bench.llama_server_openmp
                openmp.append(stack.enter_context(servers.llama_server(build, sizes, name=OPENMP + suffix)))
        for streams in (1, 4):
            for count in NEIGHBOURS:
                yield from _beside(bench, streams, count, ours, theirs, openmp)


def _beside(
    bench: Bench, streams: int, count: int, ours: list[Side], theirs: list[Side], openmp: list[Side]
) -> Iterator[Row]:
    async def play(side: Side, clients: Clients, run: int) -> float:
        number = number_of(run, 10 * streams + count)
        asks = [essay(number + index, PROMPT, answer=NEIGHBOUR_TOKENS) for index in range(streams)]
        with busy(count):
            return tokens_per_second(await clients.play(asks, seconds=NEIGHBOUR_SECONDS))

    values = bench.alternate([*ours, *theirs, *openmp], play)
    what = f"{bench.model}, {streams_text(streams)}, {count} busy neighbours: tokens/s"
    rates = {name: Figure(bench.keep(what, name, of, "tokens/s"), "tokens/s") for name, of in values.items()}
    for mine in ours:
        suffix = mine.name.rpartition(", ")[2]
        for peer in (*theirs, *openmp):
            if peer.name.endswith(suffix):
                yield compare(
                    f"{what}, {suffix}", rates[mine.name], rates[peer.name], peer.name.removesuffix(f", {suffix}")
                )


# --- Where the time goes ----------------------------------------------------------------------------------------------

PROFILE_SECONDS: Final = 15


def profile(bench: Bench) -> Iterator[Row]:
    """Samples of the engine process under load, by the innermost function of Python: what runs in llama.cpp counts
    for the line that called it.
    """
    program = peers.profiler()
    sizes = Sizes(model=bench.gguf(), context=512, parallel=16)
    for streams in (1, 8):
        with ExitStack() as stack:
            side = stack.enter_context(servers.ours(bench.native, sizes))
            shares = _sampled(bench, program, side, streams)
            yield Row(f"{bench.model}, {streams_text(streams)}: where the engine's time goes", shares, "", bar=RECORD)


def _sampled(bench: Bench, program: Path, side: Side, streams: int) -> str:
    found = list[str]()

    async def play(side: Side, clients: Clients, run: int) -> None:
        if run < 0:
            await play_essays(side, clients, number_of(run, 1), streams, PROMPT, 16)
            return

        def ask(index: int) -> Ask:
            return essay(number_of(run, 1) + index, PROMPT, answer=400)

        async with clients.background(ask, streams):
            command = [str(program), "record", "--pid", str(side.processes["engine"]), "--format", "raw"]
            options = ["--duration", str(PROFILE_SECONDS), "--rate", "200", "--output", "/dev/stdout", "--nonblocking"]
            process = await asyncio.create_subprocess_exec(
                *command, *options, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.DEVNULL
            )
            said, _ = await process.communicate()
            found.append(said.decode())

    bench.alternate([side], play, runs=1)
    return shares_of(found[0])


def shares_of(raw: str) -> str:
    """py-spy's folded stacks, by innermost function, in per cent; what is below 0.5 is one."""
    counts: dict[str, int] = {}
    for line in raw.splitlines():
        stack, _, count = line.rpartition(" ")
        if match := re.fullmatch(r"(.*?) \((.*?)(:\d+)?\)", stack.rpartition(";")[2]):
            name = f"{match[1]} ({match[2].rpartition('/')[2]})"
            counts[name] = counts.get(name, 0) + int(count)
    total = sum(counts.values())
    if not total:
        return "py-spy saw nothing"
    shares = {name: 100 * count / total for name, count in counts.items()}
    said = [
        f"{name} {share:.1f} %" for name, share in sorted(shares.items(), key=lambda each: -each[1]) if share >= 0.5
    ]
    rest = sum(share for share in shares.values() if share < 0.5)
    return ", ".join([*said, f"others {rest:.1f} %"])
