"""Hashing on a thread while the next bytes arrive. A model of many GB comes this way."""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from types import TracebackType
from typing import Self, TypeAlias

Piece: TypeAlias = bytes | memoryview

BATCH = 1_048_576
"""Bytes handed to the thread at once: enough that the handing over costs little beside the hashing."""


class HashingSink:
    """Hashes pieces in order, and gives each to ``write`` first, on a thread of its own, at most two batches behind.

    What ``write`` raises is raised by the next ``feed`` or ``finish``. Leave the block in any case: it ends the thread.
    """

    def __init__(self, algorithm: str, write: Callable[[Piece], object] | None = None) -> None:
        self._hash = hashlib.new(algorithm)
        self._write = write
        self._batch: list[Piece] = []
        self._size = 0
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="hashing")
        self._under_way: asyncio.Future[None] | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._thread.shutdown(wait=True)

    async def feed(self, piece: Piece) -> None:
        """Take a piece, which must not change. Waits while the thread is a batch behind."""
        self._batch.append(piece)
        self._size += len(piece)
        if self._size >= BATCH:
            await self._hand_over()

    async def finish(self) -> bytes:
        """The digest of everything."""
        await self._hand_over()
        await self._hand_over()
        return self._hash.digest()

    async def _hand_over(self) -> None:
        if self._under_way is not None:
            await asyncio.shield(self._under_way)  # whoever waits may be cancelled; the work goes on
        batch, self._batch, self._size = self._batch, [], 0
        self._under_way = asyncio.get_running_loop().run_in_executor(self._thread, self._absorb, batch)

    def _absorb(self, batch: list[Piece]) -> None:
        for piece in batch:
            if self._write is not None:
                self._write(piece)
            self._hash.update(piece)
