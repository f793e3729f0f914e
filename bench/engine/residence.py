"""Memory of the engine, its peak included, with every sequence full."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Final

from bench import Row
from bench.engine import sides as servers
from bench.engine.load import Clients, Heard
from bench.engine.measuring import RECORD, Bench
from bench.engine.prompts import essay
from bench.engine.sides import Side, Sizes
from bench.engine.throughput import OURS, PEER, number_of

GIB: Final = 1 << 30

SEQUENCES: Final = 4


@dataclass(frozen=True, slots=True)
class Layout:
    """One way to give sequences their cells."""

    what: str
    context: int
    cells: int | None
    repack: bool
    most_gib: float | None
    """What the 1.5 B shape may take, peak included."""


LAYOUTS: Final = (
    Layout("4,096 cells shared by 4 sequences", 4096, 4096, True, 2.0),
    Layout("4 x 4,096 cells", 4096, None, True, 2.4),
    Layout("4,096 cells shared by 4 sequences, weights not repacked", 4096, 4096, False, None),
)


def memory(bench: Bench) -> Iterator[Row]:
    for layout in LAYOUTS:
        sizes = Sizes(
            model=bench.gguf(),
            context=layout.context,
            parallel=SEQUENCES,
            cells=layout.cells,
            repack=layout.repack,
        )
        with ExitStack() as stack:
            sides = [
                stack.enter_context(servers.ours(bench.native, sizes)),
                stack.enter_context(servers.llama_server(bench.llama_server, sizes)),
            ]
            yield from _memory_rows(bench, f"{bench.model}, {layout.what}", layout, sides)


def _memory_rows(bench: Bench, what: str, layout: Layout, sides: Sequence[Side]) -> Iterator[Row]:
    async def play(side: Side, clients: Clients, run: int) -> list[Heard]:
        asks = [essay(number_of(run, 0) + index, 900, answer=64) for index in range(SEQUENCES)]
        return await clients.play(asks)

    bench.alternate(sides, play, runs=1)
    ours, peer = (side.memory() for side in sides)
    now, most = ours["engine"]
    peer_now, peer_most = peer["engine"]
    bench.keep(f"{what}: resident", OURS, [now, most], "bytes now and at most")
    bench.keep(f"{what}: resident", PEER, [peer_now, peer_most], "bytes now and at most")
    limit = layout.most_gib if bench.model == "1.5b" else None
    holds = None if limit is None else most < limit * GIB
    missed = "" if holds is not False or limit is None else f", missed by {most / GIB - limit:.2f} GiB"
    yield Row(
        f"{what}: the engine process, resident",
        f"{now / GIB:.2f} GiB, peak {most / GIB:.2f} GiB",
        f"{peer_now / GIB:.2f} GiB, peak {peer_most / GIB:.2f} GiB ({PEER})",
        f"{most / peer_most:.3f}{missed}",
        RECORD if limit is None else f"peak < {limit:g} GiB",
        holds,
    )
    others = ", ".join(f"{name} {size / (1 << 20):.0f}" for name, (size, _) in ours.items() if name != "engine")
    yield Row(f"{what}: our other processes, resident, MiB", others, "", bar=RECORD)
