"""The whole path (client, HTTP, proxy, RPC, sealed channel, engine process) against the same model in one process.

Both sides get the same distinct prompts, greedy, with cold caches, alternately: A-B-B-A. The enclaves and the peer are
loaded all the time and only one of them works at a time.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass

from attestation.policy import AppraisalPolicy
from bench import Row
from bench.house import House, house
from strongroom.prepare import Settings
from strongroom.session import Session
from vsockrpc.chat import ChatMessage, ChatRequest
from vsockrpc.messages import Delta, Done

CONTEXT = 1024
TOKENS = 96
THREADS = 2
SUBJECTS = (
    "tides", "bread", "glaciers", "violins", "bees", "bridges", "volcanoes", "paper", "chess", "coffee",
    "deserts", "lenses", "rivers", "clocks", "forests", "salt", "kites", "magnets", "silk", "thunder",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Timing:
    """Seconds to the first token, and tokens a second from the first to the last."""

    first: float
    rate: float


def prompt_of(number: int) -> str:
    subject = SUBJECTS[number % len(SUBJECTS)]
    essay = f"write a long and detailed essay about {subject}. Begin with its history and do not stop early."
    return f"Number {number}: {essay}"


class Direct:
    """The peer's process."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self._process = process

    def ask(self, prompt: str) -> Timing:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps({"prompt": prompt, "tokens": TOKENS}) + "\n")
        self._process.stdin.flush()
        answer = json.loads(self._process.stdout.readline())
        return Timing(answer["first"], answer["rate"])


@contextlib.contextmanager
def direct() -> Iterator[Direct]:
    command = [sys.executable, "-m", "bench.direct", str(THREADS), str(CONTEXT)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdout.readline()
        yield Direct(process)
        process.stdin.close()


async def ask(session: Session, prompt: str) -> Timing:
    request = ChatRequest((ChatMessage("user", prompt),), max_tokens=TOKENS, temperature=0.0)
    asked = time.perf_counter()
    first: float | None = None
    ended, tokens = 0.0, 0
    async for answer in session.chat(request):
        match answer:
            case Delta():
                first = first or time.perf_counter()
            case Done():
                ended, tokens = time.perf_counter(), answer.usage.completion_tokens
    assert first is not None
    return Timing(first - asked, (tokens - 1) / (ended - first))


def compare(peer: Direct, ours: House, runs: int) -> tuple[list[Timing], list[Timing]]:
    """Timings of both sides, alternating, over a verified session."""

    async def run() -> tuple[list[Timing], list[Timing]]:
        sides: tuple[list[Timing], list[Timing]] = ([], [])
        async with Session(ours.url, AppraisalPolicy.load(ours.policy)) as session:
            await session.verify()
            for number in range(-1, runs):
                prompt = prompt_of(number + 1)
                for ours_next in (number % 2 == 0, number % 2 != 0):
                    timing = await ask(session, prompt) if ours_next else await asyncio.to_thread(peer.ask, prompt)
                    if number >= 0:  # the first pair warms up
                        sides[0 if ours_next else 1].append(timing)
        return sides

    return asyncio.run(run())


def rows(runs: int = 11) -> list[Row]:
    table = []
    settings = Settings(context=CONTEXT, threads=THREADS)
    with direct() as peer:
        for title, tick_ms in (("pacing off", 0), ("default pacing", Settings().tick_ms)):
            with house(Settings(context=settings.context, threads=settings.threads, tick_ms=tick_ms)) as ours:
                mine, theirs = compare(peer, ours, runs)
            table += _rows(title, mine, theirs, paced=tick_ms > 0)
    return table


def _rows(title: str, mine: list[Timing], theirs: list[Timing], *, paced: bool) -> list[Row]:
    rate, peer_rate = (statistics.median(timing.rate for timing in side) for side in (mine, theirs))
    ratio = statistics.median(a.rate / b.rate for a, b in zip(mine, theirs, strict=True))
    first, peer_first = (1000 * statistics.median(timing.first for timing in side) for side in (mine, theirs))
    added = 1000 * statistics.median(a.first - b.first for a, b in zip(mine, theirs, strict=True))
    return [
        Row(
            f"tokens per second, {title}", f"{rate:.1f} tokens/s", f"{peer_rate:.1f} tokens/s (Llama, one process)",
            f"{ratio:.3f}", ">= 0.97", ratio >= 0.97,
        ),
        Row(
            f"time to first token, {title}", f"{first:.1f} ms", f"{peer_first:.1f} ms (Llama, one process)",
            f"{added:+.1f} ms", "for the record" if paced else "<= +5 ms", None if paced else added <= 5,
        ),
    ]  # fmt: skip


if __name__ == "__main__":
    for row in rows():
        print(row)
