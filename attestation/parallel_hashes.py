"""Feeds one stream of bytes to several hashes at once, on all processors and in constant memory.

``hashlib`` and ``zlib`` leave the interpreter to other threads while they work. There are as many workers as there are
processors, and a free one takes the hash that is furthest behind. With a thread for each hash, of two processors the
one that has the reading to do as well would be the last, and the other would wait for it: a tenth of the time.
"""

from __future__ import annotations

import os
import threading
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Final, TypeAlias

CHUNK_SIZE: Final = 1 << 20
"""Bytes of a buffer."""
BUFFERS: Final = 8
"""Buffers in use at a time: with ``CHUNK_SIZE`` the memory that hashing takes."""
MAX_WORKERS: Final = 4
"""More than any image has hashes that are long at once: two registers, the file and its CRC."""
_WORTH_A_THREAD: Final = 64 << 10
"""Bytes. What is shorter is hashed before another thread would have begun."""

Update: TypeAlias = Callable[[memoryview], object]
"""Of a hash. It leaves the data as they are, and does not keep them."""


@dataclass(slots=True)
class _Piece:
    """Data in a buffer, which is free again when no hash is left to see them."""

    buffer: memoryview
    data: memoryview
    unseen: int


@dataclass(slots=True)
class _Line:
    """Pieces that wait for their hash, in their order."""

    waiting: deque[tuple[Update, _Piece]] = field(default_factory=deque)
    is_taken: bool = False
    """A worker feeds the hash the piece that was first."""


class ParallelHashes:
    """A context manager: its workers end with it. Once a hash has raised something, so does every method."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._fed = threading.Condition(self._lock)
        self._seen = threading.Condition(self._lock)
        self._lines: dict[int, _Line] = {}
        self._free: list[memoryview] = []
        self._pending = 0
        """Pieces that some hash has not seen."""
        self._error: Exception | None = None
        self._is_over = False
        self._workers: list[threading.Thread] = []

    def __enter__(self) -> ParallelHashes:
        return self

    def __exit__(self, *_: object) -> None:
        with self._lock:
            self._is_over = True
            self._fed.notify_all()
        for worker in self._workers:
            worker.join()

    def buffer(self) -> memoryview:
        """``CHUNK_SIZE`` bytes to be read into. What was in them is in all the hashes."""
        with self._lock:
            if not self._free and self._pending < BUFFERS:
                return memoryview(bytearray(CHUNK_SIZE))
            self._wait(lambda: bool(self._free))
            return self._free.pop()

    def feed(self, buffer: memoryview, data: memoryview, updates: Sequence[Update | None]) -> None:
        """``data``, which begin ``buffer``. A hash, or one that follows it, sees the pieces in their order if its
        update always has the same place among ``updates``.
        """
        wanted = [(place, update) for place, update in enumerate(updates) if update is not None]
        if not wanted or len(data) < _WORTH_A_THREAD:
            self.finish()
            for _, update in wanted:
                update(data)
            self._free.append(buffer)
            return
        if not self._workers:
            self._start()
        with self._lock:
            piece = _Piece(buffer, data, len(wanted))
            for place, update in wanted:
                self._lines.setdefault(place, _Line()).waiting.append((update, piece))
            self._pending += 1
            self._fed.notify(len(wanted))

    def finish(self) -> None:
        """All that was fed is in the hashes."""
        with self._lock:
            self._wait(lambda: not self._pending)

    def _wait(self, until: Callable[[], bool]) -> None:
        self._seen.wait_for(lambda: until() or self._error is not None)
        if self._error is not None:
            raise self._error

    def _start(self) -> None:
        for number in range(min(MAX_WORKERS, os.cpu_count() or 1)):
            worker = threading.Thread(target=self._work, name=f"hash-{number}", daemon=True)
            self._workers.append(worker)
            worker.start()

    def _work(self) -> None:
        while (line := self._take()) is not None:
            update, piece = line.waiting[0]
            try:
                update(piece.data)
            except Exception as error:  # whoever waits for this piece has it
                self._error = error
            self._give_back(line)

    def _take(self) -> _Line | None:
        """The line that is furthest behind, of those that nobody has; None when there is nothing more to do."""
        with self._lock:
            while not self._is_over and self._error is None:
                lines = [line for line in self._lines.values() if line.waiting and not line.is_taken]
                if lines:
                    line = max(lines, key=lambda line: len(line.waiting))
                    line.is_taken = True
                    return line
                self._fed.wait()
        return None

    def _give_back(self, line: _Line) -> None:
        with self._lock:
            line.is_taken = False
            _, piece = line.waiting.popleft()
            piece.unseen -= 1
            if not piece.unseen:
                self._pending -= 1
                self._free.append(piece.buffer)
            if not piece.unseen or self._error is not None:
                self._seen.notify()
