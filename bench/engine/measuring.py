"""What all parts share: which builds and models there are, sides that take turns, and rows with median and spread."""

from __future__ import annotations

import asyncio
import statistics
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Final, TypeVar

from bench import Row
from bench.engine import peers
from bench.engine.load import Clients
from bench.engine.peers import Build, PeerError
from bench.engine.sides import Side
from bench.house import model_file
from bench.model_shapes import SHAPES
from bench.synthesize import TEMPLATE, VOCABULARY, Narrator, Vocabulary, synthesize

SETTLE_SECONDS: Final = 0.3
"""Before each turn: what has been measured before may have threads that still spin."""
SMOLLM2: Final = "smollm2"
T = TypeVar("T")


@dataclass(slots=True)
class Used:
    """A server that was measured, for the report."""

    side: str
    build: str
    commands: tuple[str, ...]


class Bench:
    """One run of the benchmarks: its options, and everything that it finds."""

    def __init__(self, *, runs: int, tokens: int, longest: int, openmp: bool) -> None:
        """``tokens`` is the length of answers, half of that where the model is a large one; ``longest`` that of
        contexts.
        """
        self.runs = runs
        self.tokens = tokens
        self.longest = longest
        self.openmp = openmp
        self.begin("", SMOLLM2)

    def begin(self, part: str, model: str) -> None:
        """What is used and found from here on is that part's, with that model."""
        self.part, self.model = part, model
        self.used: list[Used] = []
        self.figures: list[dict[str, object]] = []

    @property
    def builds(self) -> list[Build]:
        """Those that have been used."""
        return [value for value in vars(self).values() if isinstance(value, Build)]

    # --- What there is -----------------------------------------------------------------------------------------------

    @cached_property
    def native(self) -> Build:
        return peers.native()

    @cached_property
    def portable(self) -> Build:
        return peers.portable()

    @cached_property
    def llama_server(self) -> Build:
        return peers.llama_server()

    @cached_property
    def llama_server_openmp(self) -> Build:
        return peers.llama_server(openmp=True)

    @cached_property
    def llama_cpp_server(self) -> Build:
        return peers.llama_cpp_server()

    def gguf(self) -> Path:
        """The model's file: SmolLM2's, or one of the shape that it names, which is made up when it is not there.
        Raises PeerError.
        """
        name = self.model
        if name == SMOLLM2:
            return model_file()
        path = peers.WORK / f"{name}.gguf"
        if not path.is_file():
            if not (VOCABULARY.is_file() and TEMPLATE.is_file()):
                raise PeerError(f"{path} is not there: python -m bench.synthesize --shape {name} --out {path}")
            peers.say(f"making up {path.name}")
            path.parent.mkdir(parents=True, exist_ok=True)
            synthesize(
                SHAPES[name],
                path,
                vocabulary=Vocabulary.read(VOCABULARY),
                chat_template=TEMPLATE.read_text(encoding="utf-8"),
                seed=0,
                progress=Narrator(),
            )
        return path

    @property
    def answer(self) -> int:
        """Tokens of an answer."""
        return self.tokens if self.model == SMOLLM2 else max(1, self.tokens // 2)

    # --- Turns -------------------------------------------------------------------------------------------------------

    def alternate(
        self, sides: Sequence[Side], play: Callable[[Side, Clients, int], Awaitable[T]], *, runs: int | None = None
    ) -> dict[str, list[T]]:
        """What ``play`` returns for each run of each side, by its name: A-B-B-A, after one round that warms up, which
        has the number -1.
        """
        for side in sides:
            used = Used(side.name, side.build.name, side.commands)
            if used not in self.used:
                self.used.append(used)
        return asyncio.run(alternate(sides, play, self.runs if runs is None else runs))

    def keep(self, what: str, side: str, values: Sequence[float], unit: str) -> list[float]:
        """Notes the figures of all runs for the JSON report, and returns them."""
        numbers = [float(value) for value in values]
        self.figures.append({"what": what, "side": side, "unit": unit, "values": numbers})
        return numbers


async def alternate(
    sides: Sequence[Side], play: Callable[[Side, Clients, int], Awaitable[T]], runs: int
) -> dict[str, list[T]]:
    results: dict[str, list[T]] = {side.name: [] for side in sides}
    async with AsyncExitStack() as stack:
        clients = {side.name: await stack.enter_async_context(Clients(side.target)) for side in sides}
        for run in range(-1, runs):
            for side in order(sides, run):
                await asyncio.sleep(SETTLE_SECONDS)
                result = await play(side, clients[side.name], run)
                if run >= 0:
                    results[side.name].append(result)
    return results


def order(sides: Sequence[T], run: int) -> Iterator[T]:
    """Who goes first goes last in the next run."""
    return iter(sides) if run % 2 == 0 else reversed(sides)


# --- Rows -------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Figure:
    """Values of several runs."""

    values: Sequence[float]
    unit: str
    digits: int = 1

    @property
    def median(self) -> float:
        return statistics.median(self.values)

    def __str__(self) -> str:
        """The median, and the least and the greatest."""
        low, high = min(self.values), max(self.values)
        spread = "" if len(self.values) == 1 else f" ({low:.{self.digits}f}..{high:.{self.digits}f})"
        return f"{self.median:.{self.digits}f} {self.unit}{spread}"


@dataclass(frozen=True, slots=True)
class Bar:
    """What the ratio of ours to the peer's has to be."""

    value: float
    at_least: bool = True

    def holds(self, ratio: float) -> bool:
        return ratio >= self.value if self.at_least else ratio <= self.value

    def __str__(self) -> str:
        return f"{'>=' if self.at_least else '<='} {self.value:g}"


RECORD: Final = "for the record"


def compare(what: str, ours: Figure, peer: Figure, peer_name: str, bar: Bar | None = None) -> Row:
    """The ratio is the median of those of all runs, each with the one beside it."""
    ratio = paired_ratio(ours.values, peer.values)
    if bar is None:
        return Row(what, str(ours), f"{peer} ({peer_name})", f"{ratio:.3f}", RECORD)
    missed = "" if bar.holds(ratio) else f", missed by {abs(bar.value - ratio):.3f}"
    return Row(what, str(ours), f"{peer} ({peer_name})", f"{ratio:.3f}{missed}", str(bar), bar.holds(ratio))


def paired_ratio(ours: Sequence[float], peer: Sequence[float]) -> float:
    """0 where the peer has nothing to be compared with."""
    return statistics.median(a / b if b else 0.0 for a, b in zip(ours, peer, strict=True))


def alone(what: str, figure: Figure, note: str = "") -> Row:
    return Row(what, str(figure), note or RECORD, bar=RECORD)
