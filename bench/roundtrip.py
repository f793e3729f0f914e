"""A sealed call without the model: what the path itself costs. Client, HTTP, proxy, RPC, HPKE, records, and back.

The call is ``describe``: its answer is as small as one token. Its peer is a bare HTTP request through the same kind of
server, answered in the proxy itself (``/healthz``), so that the difference is what attested sealing and the second hop
add.
"""

from __future__ import annotations

import asyncio
import statistics
import time
from collections.abc import Awaitable, Callable

import httpx2

from attestation.policy import AppraisalPolicy
from bench import Row
from bench.house import House, house
from strongroom.prepare import Settings
from strongroom.session import Session

CALLS = 1000


async def timed(call: Callable[[], Awaitable[object]], concurrent: int, calls: int) -> list[float]:
    """Milliseconds of each of ``calls`` calls, ``concurrent`` at a time."""
    left = iter(range(calls))
    times: list[float] = []

    async def caller() -> None:
        for _ in left:
            begun = time.perf_counter()
            await call()
            times.append(1000 * (time.perf_counter() - begun))

    await asyncio.gather(*(caller() for _ in range(concurrent)))
    return times


async def measure(ours: House) -> list[Row]:
    table = []
    async with (
        Session(ours.url, AppraisalPolicy.load(ours.policy)) as session,
        httpx2.AsyncClient(trust_env=False) as http,
    ):

        async def bare() -> None:
            (await http.get(f"{ours.url}/healthz")).raise_for_status()

        await session.verify()
        for concurrent in (1, 64):
            await timed(session.describe, concurrent, concurrent * 4)
            sealed, plain = [], []
            for _ in range(4):
                sealed += await timed(session.describe, concurrent, CALLS // 4)
                plain += await timed(bare, concurrent, CALLS // 4)
            table.append(
                Row(
                    f"sealed round trip without the model, {concurrent} at once",
                    quantiles(sealed),
                    f"{quantiles(plain)} (bare HTTP answered by the proxy)",
                    f"{statistics.median(sealed) - statistics.median(plain):+.2f} ms at p50",
                    "for the record",
                )
            )
    return table


def quantiles(times: list[float]) -> str:
    cuts = statistics.quantiles(times, n=100)
    return f"p50 {cuts[49]:.2f} ms, p99 {cuts[98]:.2f} ms"


def rows() -> list[Row]:
    with house(Settings(context=256, threads=2, tick_ms=0)) as ours:
        return asyncio.run(measure(ours))


if __name__ == "__main__":
    for row in rows():
        print(row)
