"""Sides that take turns on a machine which is not ours alone."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

TURN, TURNS = 10, 40
DISTURBED = 1.05
MAX_SECONDS = 30.0


def in_turns(*sides: Callable[[], object]) -> tuple[float, ...]:
    """The median time of each, in milliseconds; the last side is the peer.

    In a turn a side is called ``TURN`` times in a row, as by whoever verifies many documents, and its best time counts.
    A shared machine is slower for seconds at a time, and an interpreter more than arithmetic: turns count in which the
    peer, whatever ours did, was within ``DISTURBED`` of its own best. It goes on until there are ``TURNS`` of them, or
    for ``MAX_SECONDS``.
    """
    turns: list[tuple[float, ...]] = []
    calm: list[tuple[float, ...]] = []
    until = time.monotonic() + MAX_SECONDS
    while len(calm) < TURNS and time.monotonic() < until:
        turns.append(tuple(min(timed(side) for _ in range(TURN)) for side in sides))
        best = min(turn[-1] for turn in turns)
        calm = [turn for turn in turns if turn[-1] <= best * DISTURBED]
    return tuple(statistics.median(taken) for taken in zip(*calm, strict=True))


def timed(side: Callable[[], object]) -> float:
    """Milliseconds."""
    begun = time.perf_counter()
    side()
    return since(begun)


def since(begun: float) -> float:
    """Milliseconds from ``time.perf_counter()`` to now."""
    return (time.perf_counter() - begun) * 1e3
