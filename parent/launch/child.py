"""A process that belongs to an enclave on this host: in the enclave's folder, without our environment, and ended with
what started it."""

from __future__ import annotations

import asyncio
import contextlib
import os
import subprocess
import sys
from collections.abc import AsyncIterator, Mapping, Sequence
from typing import Self

from parent.registry import Instance

STOP_SECONDS = 10
RECORD_SECONDS = 5.0
"""For the last words of a process to be read, once it has ended."""
MAX_SAID = 1 << 20
"""Bytes that one process adds to the log, where it is one that a guest can make talk."""
LAST_WORDS = 500
"""Characters of the log's end that an error shows."""
_TAIL_SIZE = 4096
_READ_SIZE = 65_536
ENVIRONMENT = {"PATH": os.defpath, "LANG": "C.UTF-8", "OPENBLAS_NUM_THREADS": "1"}


@contextlib.asynccontextmanager
async def child(
    instance: Instance,
    command: Sequence[str],
    *,
    stdout: int = subprocess.DEVNULL,
    stderr: int | None = None,
    environment: Mapping[str, str] | None = None,
) -> AsyncIterator[asyncio.subprocess.Process]:
    """Runs ``command`` in the instance's folder; its standard error goes to the supervisor's log, or to ``stderr``. On
    the way out it is asked to end, and killed when it does not within :data:`STOP_SECONDS`. Raises OSError when it
    cannot be started.
    """
    with instance.log.open("ab") as log:
        process = await asyncio.create_subprocess_exec(
            *command,
            cwd=instance.directory,
            env={**ENVIRONMENT, **(environment or {})},
            stdin=subprocess.DEVNULL,
            stdout=stdout,
            stderr=log if stderr is None else stderr,
        )
    try:
        yield process
    finally:
        if process.returncode is None:
            process.terminate()
            try:
                async with asyncio.timeout(STOP_SECONDS):
                    await process.wait()
            except TimeoutError:
                process.kill()
                await process.wait()


def jailed(command: Sequence[str], *limits: str) -> list[str]:
    """``command``, started by :mod:`parent.launch.jail` with ``limits``: it ends when this process does."""
    jail = ["-m", "parent.launch.jail", "--parent", str(os.getpid()), *limits]
    return [sys.executable, "-I", *jail, "--", *command]


class Recording:
    """Takes what a process says, as it says it, for as long as it lives: a process whose pipe is full stands still.

    A context that the process ends in: it is left when everything has been read.
    """

    def __init__(self) -> None:
        self._recording: asyncio.Future[None] | None = None

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.ended()
        if self._recording is not None:
            self._recording.cancel()

    def record(self, stream: asyncio.StreamReader | None) -> None:
        """Begins with that, and ends with ``stream``, a pipe of the process."""
        assert stream is not None
        self._recording = asyncio.ensure_future(self._record(stream))

    async def ended(self) -> None:
        """Returns when all has been read that a process said that has ended, or is not to be had."""
        if self._recording is not None:
            await asyncio.wait([self._recording], timeout=RECORD_SECONDS)

    async def _record(self, stream: asyncio.StreamReader) -> None:
        """A full disk loses the text and nothing else."""
        while data := await stream.read(_READ_SIZE):
            with contextlib.suppress(OSError):
                self.take(data)

    def take(self, data: bytes) -> None:
        """Keeps what it may of it. Raises OSError."""
        raise NotImplementedError


class BoundedLog(Recording):
    """The standard error of a process that a guest can make talk: its first :data:`MAX_SAID` bytes go to the log."""

    def __init__(self, instance: Instance) -> None:
        super().__init__()
        self._log, self._left = instance.log, MAX_SAID

    def take(self, data: bytes) -> None:
        kept, self._left = data[: self._left], max(0, self._left - len(data))
        if kept:
            with self._log.open("ab", buffering=0) as log:
                log.write(kept)
                if not self._left:
                    log.write(b"\nstrongroom: a process said more than is kept\n")


def last_words(instance: Instance) -> str:
    """The end of what an instance's processes wrote to the log."""
    with contextlib.suppress(FileNotFoundError), instance.log.open("rb") as log:
        log.seek(max(0, log.seek(0, os.SEEK_END) - _TAIL_SIZE))
        return log.read(_TAIL_SIZE).decode("utf-8", "replace").strip()[-LAST_WORDS:]
    return ""
