from __future__ import annotations

import asyncio
import hashlib
import threading

import pytest

from vsockrpc.digest import HashingSink

KIB = 1024


@pytest.mark.parametrize("algorithm", ["sha256", "sha384"])
async def test_digest_and_writes_in_order(algorithm: str) -> None:
    pieces = [bytes([i]) * size for i, size in enumerate((1, 9000 * KIB, 3, 0, 70_000, 2))]
    written: list[bytes] = []
    threads: set[int] = set()

    def write(piece: bytes | memoryview) -> None:
        written.append(bytes(piece))
        threads.add(threading.get_ident())

    with HashingSink(algorithm, write) as sink:
        for piece in pieces:
            await sink.feed(memoryview(piece))
        digest = await sink.finish()
    assert digest == hashlib.new(algorithm, b"".join(pieces)).digest()
    assert b"".join(written) == b"".join(pieces)
    assert len(threads) == 1
    assert threading.get_ident() not in threads


async def test_nothing_at_all() -> None:
    with HashingSink("sha384") as sink:
        assert await sink.finish() == hashlib.sha384().digest()


async def test_what_write_raises_is_raised_here_and_nothing_is_written_behind_it() -> None:
    writes = 0

    def full(piece: bytes | memoryview) -> None:
        nonlocal writes
        writes += 1
        raise OSError(28, "No space left on device")

    with HashingSink("sha256", full, backlog=2 * KIB) as sink:
        with pytest.raises(OSError, match="No space"):
            for _ in range(4):
                await sink.feed(bytes(KIB))
        with pytest.raises(OSError, match="No space"):
            await sink.finish()
        with pytest.raises(OSError, match="No space"):
            await sink.feed(b"x")
    assert writes == 1


async def test_a_slow_thread_holds_the_feeder_back() -> None:
    go_on = threading.Event()
    fed = 0

    async def feed(sink: HashingSink) -> None:
        nonlocal fed
        for _ in range(10):
            await sink.feed(bytes(KIB))
            fed += 1

    with HashingSink("sha256", lambda piece: go_on.wait(), backlog=4 * KIB) as sink:
        feeding = asyncio.create_task(feed(sink))
        for _ in range(20):
            await asyncio.sleep(0)
        assert fed == 4
        feeding.cancel()
        await asyncio.gather(feeding, return_exceptions=True)
        go_on.set()
        digest = await sink.finish()
    # The piece at which the feeder was cancelled had been taken.
    assert digest == hashlib.sha256(bytes(5 * KIB)).digest()


async def test_leaving_the_block_ends_the_thread() -> None:
    before = threading.active_count()
    with pytest.raises(ValueError, match="elsewhere"), HashingSink("sha256") as sink:
        for _ in range(50):
            await sink.feed(bytes(70_000))
        raise ValueError("something went wrong elsewhere")
    assert threading.active_count() == before
