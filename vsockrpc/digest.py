"""Hashing on a thread while the next bytes arrive. A model of many GB comes this way."""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import Callable
from queue import SimpleQueue
from threading import Thread
from types import TracebackType
from typing import Self, TypeAlias

Piece: TypeAlias = bytes | memoryview

BACKLOG = 4_194_304
"""Bytes that may wait for the thread. Deep enough that it never runs dry while the feeder wakes up: waking costs more
than hashing a small piece.
"""


class HashingSink:
    """Hashes pieces in order, and gives each to ``write`` first, on a thread of its own.

    What ``write`` raises is raised by ``feed`` and ``finish``, and nothing more is written. Use it as a context
    manager, inside a running loop: leaving the block ends the thread.
    """

    def __init__(
        self, algorithm: str, write: Callable[[Piece], object] | None = None, *, backlog: int = BACKLOG
    ) -> None:
        self._hash = hashlib.new(algorithm)
        self._write = write
        self._backlog = backlog
        self._loop = asyncio.get_running_loop()
        self._queue: SimpleQueue[Piece | None] = SimpleQueue()
        self._fed = 0
        # Written by the thread alone.
        self._done = 0
        self._error: Exception | None = None
        # Written by the feeder alone: at how many bytes done it wants to be woken.
        self._waiting: tuple[int, asyncio.Future[None]] | None = None
        self._abandoned = False
        self._thread = Thread(target=self._run, name="hashing", daemon=True)
        self._thread.start()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._abandoned = True
        self._queue.put(None)
        self._thread.join()

    async def feed(self, piece: Piece) -> None:
        """Take a piece, which must not change. Waits while more than ``backlog`` bytes are in hand."""
        self._raise_error()
        self._queue.put(piece)
        self._fed += len(piece)
        if self._fed - self._done > self._backlog:
            await self._until(self._fed - self._backlog // 2)
            self._raise_error()

    async def finish(self) -> bytes:
        """The digest of everything."""
        await self._until(self._fed)
        self._raise_error()
        return self._hash.digest()

    async def _until(self, done: int) -> None:
        woken: asyncio.Future[None] = self._loop.create_future()
        self._waiting = done, woken
        # Looked at only now, so that the thread has either seen who waits or done enough already.
        if self._done < done:
            await woken
        self._waiting = None

    def _raise_error(self) -> None:
        if self._error is not None:
            raise self._error

    def _run(self) -> None:
        while (piece := self._queue.get()) is not None:
            if self._error is None and not self._abandoned:
                try:
                    if self._write is not None:
                        self._write(piece)
                    self._hash.update(piece)
                except Exception as error:
                    self._error = error
            self._done += len(piece)
            waiting = self._waiting
            if waiting is not None and self._done >= waiting[0]:
                self._loop.call_soon_threadsafe(_wake, waiting[1])


def _wake(future: asyncio.Future[None]) -> None:
    if not future.done():
        future.set_result(None)
