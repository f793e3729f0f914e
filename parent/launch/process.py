"""The process launcher: an emulated enclave as processes on this host.

It measures the files that it is about to run, as the hypervisor measures an image, and starts the enclave without
network and under limits. What it starts is what it measured: bytecode comes from a cache of its own, never from beside
the sources.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
import sys
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path

from attestation.process_image import measure_process_image
from attestation.reference import PcrSet
from parent.config import LaunchConfiguration, LaunchConfigurationError
from parent.launch.child import child, jailed, last_words
from parent.launch.machine import LaunchError, Places
from parent.registry import Instance, state_home
from vsockrpc.address import Address, UnixAddress

UNUSABLE = 2
"""The exit code of an enclave that could not begin, for its configuration or because it cannot listen: starting it
again would not help.
"""
MEMORY_SLACK = 6 << 30
"""Address space besides twice the model: Python, llama.cpp's buffers and the reserve of its threads' stacks."""


class ProcessMachine:
    """An enclave as processes. ``memory`` is bytes of address space of each, ``cpus`` a count; 0 takes all CPUs."""

    launcher = "process"
    listen_seconds = 60.0

    def __init__(self, instance: Instance, *, memory: int, cpus: int = 0) -> None:
        """Raises LaunchConfigurationError for a configuration that a process cannot have."""
        self._instance = instance
        self._memory = memory
        self._cpus = cpus
        configuration = LaunchConfiguration.load(instance.configuration)
        nsm = configuration.nsm
        if nsm is None:
            raise LaunchConfigurationError(
                "nsm.address", "a process has no NSM device", expected="unix:NAME", got="device"
            )
        self.places = Places(
            rpc=self._beside("rpc.listen", configuration.listen),
            store=None if configuration.store is None else self._beside("model.store", configuration.store),
            egress=None if configuration.kms is None else self._beside("kms.egress", configuration.kms.egress),
            nsm=self._beside("nsm.address", nsm),
        )

    def _beside(self, key: str, address: Address) -> UnixAddress:
        """An emulated enclave's sockets stand in its own folder, so that the same file, and so the same PCRs, serves
        wherever that folder is."""
        if not isinstance(address, UnixAddress) or Path(address.path).name != address.path:
            raise LaunchConfigurationError(
                key,
                "the process launcher needs a socket in the enclave's own folder",
                expected="unix:NAME",
                got=str(address),
            )
        return UnixAddress(str(self._instance.directory / address.path))

    async def measure(self) -> PcrSet:
        return await asyncio.to_thread(measure_process_image, Path(sys.executable), self._instance.configuration)

    @contextlib.asynccontextmanager
    async def boot(self, measured: PcrSet) -> AsyncIterator[RunningProcess]:
        limits = ["--no-network", "--address-space", str(self._memory)]
        if self._cpus:
            limits += ["--cpus", str(self._cpus)]
        # The measured interpreter, isolated from the environment, with a bytecode cache that nothing else writes.
        python = [sys.executable, "-I", "-X", f"pycache_prefix={bytecode_cache(measured)}"]
        command = [*python, "-m", "enclave", "--config", self._instance.configuration.name]
        async with child(self._instance, jailed(command, *limits)) as process:
            yield RunningProcess(self._instance, process)


@dataclass(frozen=True, slots=True)
class RunningProcess:
    """The enclave's first process."""

    instance: Instance
    process: asyncio.subprocess.Process

    async def network(self) -> str:
        """``none`` for a process in a network namespace of its own, else ``host``. The jail needs a moment to enter
        it."""
        ours = os.readlink("/proc/self/ns/net")
        for _ in range(20):
            with contextlib.suppress(OSError):
                if os.readlink(f"/proc/{self.process.pid}/ns/net") != ours:
                    return "none"
            await asyncio.sleep(0.05)
        return "host"

    async def wait(self) -> LaunchError | None:
        if await self.process.wait() != UNUSABLE:
            return None
        return LaunchError("enclave_unusable", last_words(self.instance))


def bytecode_cache(measured: PcrSet) -> Path:
    """A folder for compiled bytecode that only these very files fill: Python compares a cache with its source by time
    and size alone. Those of other measurements are removed.
    """
    caches = state_home() / "bytecode"
    ours = caches / measured.pcr0.hex()[:32]
    for other in caches.glob("*"):
        if other != ours:
            shutil.rmtree(other, ignore_errors=True)
    return ours
