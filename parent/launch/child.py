"""A process that belongs to an enclave on this host: in the enclave's folder, without our environment, and ended with
what started it."""

from __future__ import annotations

import asyncio
import contextlib
import os
import subprocess
import sys
from collections.abc import AsyncIterator, Mapping, Sequence

from parent.registry import Instance

STOP_SECONDS = 10
ENVIRONMENT = {"PATH": os.defpath, "LANG": "C.UTF-8", "OPENBLAS_NUM_THREADS": "1"}


@contextlib.asynccontextmanager
async def child(
    instance: Instance,
    command: Sequence[str],
    *,
    stdout: int = subprocess.DEVNULL,
    environment: Mapping[str, str] | None = None,
) -> AsyncIterator[asyncio.subprocess.Process]:
    """Runs ``command`` in the instance's folder; its standard error goes to the supervisor's log. On the way out it is
    asked to end, and killed when it does not within :data:`STOP_SECONDS`. Raises OSError when it cannot be started.
    """
    with instance.log.open("ab") as log:
        process = await asyncio.create_subprocess_exec(
            *command,
            cwd=instance.directory,
            env={**ENVIRONMENT, **(environment or {})},
            stdin=subprocess.DEVNULL,
            stdout=stdout,
            stderr=log,
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


def last_words(instance: Instance) -> str:
    """The end of what an instance's processes wrote to the log."""
    with contextlib.suppress(FileNotFoundError):
        return instance.log.read_text(errors="replace").strip()[-500:]
    return ""
