"""Many releases at once, of one enclave: against a KMS whose answers wait, and as many as the processors bear."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from statistics import median

from attestation.secret import Secret
from bench import Row
from bench.kms_house import CONTEXT, PLAINTEXT, KmsHouse
from bench.turns import since
from enclave.kms.release import GuardedKms
from enclave.kms.service import Kms

TOGETHER, MAX_RATIO = 8, 2.0
"""So many releases at once may take less than so many times as long as one."""
MORE_TOGETHER = (30, 64)
VSOCK_PROXY = "AWS's vsock-proxy: up to 7 s for 30 at once, on their user's host (aws-nitro-enclaves-cli#413)"

Burst = Callable[[int], Awaitable[float]]


@contextlib.asynccontextmanager
async def _both(house: KmsHouse) -> AsyncIterator[tuple[Burst, Burst]]:
    """So many releases as prompts have them, and so many plain decrypts on threads, at once: the milliseconds until all
    are there."""
    plain = house.plain_client()
    kms = await asyncio.to_thread(Kms, house.settings(), house.nsm())
    threads = ThreadPoolExecutor(max(MORE_TOGETHER))
    loop = asyncio.get_running_loop()
    named = house.request()
    guarded = GuardedKms(kms)

    async def releases(count: int) -> float:
        begun = time.perf_counter()
        waiting = (guarded.decrypt(house.wrapped, key=house.key, context=CONTEXT) for _ in range(count))
        released = await asyncio.gather(*waiting)
        taken = since(begun)
        assert released == [Secret(PLAINTEXT)] * count
        return taken

    async def decrypts(count: int) -> float:
        begun = time.perf_counter()
        await asyncio.gather(*(loop.run_in_executor(threads, lambda: plain.decrypt(**named)) for _ in range(count)))
        return since(begun)

    try:
        yield releases, decrypts
    finally:
        await kms.close()
        threads.shutdown()
        plain.close()


async def at_once(house: KmsHouse, latency_ms: int, turns: int) -> list[Row]:
    """Against a KMS whose answers wait so long."""
    counts = (1, TOGETHER, *MORE_TOGETHER)
    ours: dict[int, list[float]] = {count: [] for count in counts}
    theirs: dict[int, list[float]] = {count: [] for count in counts}
    new: dict[int, list[float]] = {1: [], TOGETHER: []}
    async with _both(house) as (releases, decrypts):
        for turn in range(-1, turns):
            for count in counts:
                taken, plain = await releases(count), await decrypts(count)
                if turn >= 0:
                    ours[count].append(taken)
                    theirs[count].append(plain)
    for _ in range(turns):
        for count, taken_by in new.items():
            async with _both(house) as (releases, _):
                taken_by.append(await releases(count))

    def ratio(measured: dict[int, list[float]], count: int) -> float:
        return median(many / one for many, one in zip(measured[count], measured[1], strict=True))

    wait = f"{latency_ms} ms of injected latency"
    kept, cold = ratio(ours, TOGETHER), ratio(new, TOGETHER)
    found = [
        Row(
            f"{TOGETHER} releases at once, {wait}, kept connections",
            f"{median(ours[TOGETHER]):.0f} ms",
            f"{median(ours[1]):.0f} ms (one release)",
            f"{kept:.2f}",
            f"< {MAX_RATIO:g}",
            kept < MAX_RATIO,
        ),
        Row(
            f"{TOGETHER} at once, {wait}, the first of a boot: each makes its connection",
            f"{median(new[TOGETHER]):.0f} ms",
            f"{median(new[1]):.0f} ms (one release, the first of a boot)",
            f"{cold:.2f}",
            f"< {MAX_RATIO:g}",
            cold < MAX_RATIO,
        ),
    ]
    for count in MORE_TOGETHER:
        theirs_text = f"{median(theirs[count]):.0f} ms (boto3 decrypt on {count} threads)"
        note = f"; {VSOCK_PROXY}" if count == 30 else ""
        found.append(
            Row(f"{count} at once, {wait}", f"{median(ours[count]):.0f} ms", theirs_text + note,
                f"{ratio(ours, count):.2f} of one release", "for the record")
        )  # fmt: skip
    return found


async def at_full_speed(house: KmsHouse, turns: int) -> list[Row]:
    """As many as the processors bear: KMS, NSM and egress have the same ones."""
    count = max(MORE_TOGETHER)

    async def spent(burst: Burst) -> tuple[float, float]:
        """Milliseconds of each of ``count``: of the clock, and of this process's CPU."""
        begun = time.process_time()
        taken = await burst(count)
        return taken / count, (time.process_time() - begun) * 1e3 / count

    async with _both(house) as (releases, decrypts):
        pairs = [(await spent(releases), await spent(decrypts)) for _ in range(turns + 1)][1:]
    (mine, cpu), (theirs, their_cpu) = (
        [median(each) for each in zip(*side, strict=True)] for side in zip(*pairs, strict=True)
    )
    return [
        Row(
            f"{count} at once, no latency, emulated KMS on the same processors",
            f"{1e3 / mine:.0f} releases/s, {cpu:.1f} ms of CPU each",
            f"{1e3 / theirs:.0f} decrypts/s (boto3 on {count} threads), {their_cpu:.1f} ms of CPU each",
            f"{median(plain[0] / ours[0] for ours, plain in pairs):.2f}",
            "for the record",
        )
    ]
