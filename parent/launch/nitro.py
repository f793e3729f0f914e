"""The nitro launcher: an enclave of AWS's, started by nitro-cli on the host that it belongs to.

Model store and egress listen on vsock here, and the enclave's RPC is at its CID. An enclave outlives the process that
started it, so one that a supervisor left behind is ended before the next is started, and its own whatever happens.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Final

from attestation.measure import read_image
from attestation.reference import PcrSet
from parent.config import LaunchConfiguration, LaunchConfigurationError
from parent.launch.machine import LaunchError, Places
from parent.nitro.cli import NitroCli, RunningEnclave
from parent.nitro.errors import NitroError
from parent.nitro.resources import MIB, EnclaveResources
from parent.nitro.start import (
    EnclaveRequest,
    require_possible,
    start_enclave,
    terminate_if_there,
    terminate_named,
)
from parent.registry import Instance
from vsockrpc.address import VMADDR_CID_ANY, Address, VsockAddress

PARENT_CID: Final = 3
"""As an enclave sees its host."""
FIRST_CID: Final = 0x1_0000
"""Of the CIDs that this launcher gives: above those that people choose by hand."""
POLL_SECONDS: Final = 2.0
SILENT_POLLS: Final = 5
"""So often in a row nitro-cli may fail to say which enclaves run, before ours is taken to have ended."""
ATTEMPTS: Final = 3
PAUSE_SECONDS: Final = 2.0
PASSING: Final = frozenset(("another_start", "start_refused"))
"""Why a start fails that may succeed a moment later."""


class NitroMachine:
    """One enclave from one image. What it needs of this host is looked at before each boot."""

    def __init__(
        self,
        instance: Instance,
        image: Path,
        *,
        memory: int,
        cpus: int | None,
        cli: NitroCli | None = None,
        root: Path = Path("/"),
        poll: float = POLL_SECONDS,
    ) -> None:
        """``memory`` is bytes, ``cpus`` a count; None takes the CPUs that are free for enclaves. ``root`` stands for
        ``/``, ``poll`` is in seconds. Raises LaunchConfigurationError.
        """
        self._image = image
        self._cli = cli or NitroCli()
        self._root = root
        self._poll = poll
        self._name = f"strongroom-{instance.name}"
        self._memory_mib = -(-memory // MIB)
        self._cpus = cpus
        self._places = places_of(LaunchConfiguration.load(instance.configuration), cid_of(instance.name))

    @property
    def launcher(self) -> str:
        return "nitro"

    @property
    def listen_seconds(self) -> float:
        return 120.0

    @property
    def places(self) -> Places:
        return self._places

    async def measure(self) -> PcrSet:
        """Of the image's file. Raises ImageError."""
        return (await asyncio.to_thread(read_image, self._image)).measurements

    @contextlib.asynccontextmanager
    async def boot(self, measured: PcrSet) -> AsyncIterator[_RunningEnclave]:
        """Raises LaunchError, under the codes of NitroError."""
        try:
            enclave = await self._start(measured)
        except NitroError as error:
            raise LaunchError.of(error.as_json()) from error
        try:
            yield _RunningEnclave(self._cli, enclave, self._poll)
        finally:
            await asyncio.shield(self._end(enclave))

    async def _start(self, measured: PcrSet) -> RunningEnclave:
        for attempt in range(1, ATTEMPTS + 1):
            await terminate_named(self._cli, self._name)
            running = await self._cli.describe()
            request = self._request(EnclaveResources.read(self._root), running)
            try:
                return await start_enclave(self._cli, request, measured)
            except NitroError as error:
                if error.code not in PASSING or attempt == ATTEMPTS:
                    raise
                await asyncio.sleep(PAUSE_SECONDS * attempt)
        raise AssertionError("the last attempt returns or raises")

    def _request(self, host: EnclaveResources, running: list[RunningEnclave]) -> EnclaveRequest:
        """Raises NitroError."""
        size = self._image.stat().st_size
        cpus = self._cpus or max(self._free_cpus(host, running), host.threads_per_core)
        assert isinstance(self._places.rpc, VsockAddress)
        request = EnclaveRequest(self._image, self._name, self._memory_mib, cpus, self._places.rpc.cid)
        require_possible(request, size, host, running)
        return request

    def _free_cpus(self, host: EnclaveResources, running: list[RunningEnclave]) -> int:
        """As many as one NUMA node has, if it can be one that has the memory."""
        free = list(host.free(running).values())
        roomy = [each for each in free if each.cpus and each.memory.free >= self._memory_mib]
        return max((len(each.cpus) for each in roomy or free), default=0)

    async def _end(self, enclave: RunningEnclave) -> None:
        """Whatever it raises here would hide why the boot ended."""
        with contextlib.suppress(NitroError):
            await terminate_if_there(self._cli, enclave.id)


class _RunningEnclave:
    """Until nitro-cli no longer knows it."""

    def __init__(self, cli: NitroCli, enclave: RunningEnclave, poll: float) -> None:
        self._cli = cli
        self._enclave = enclave
        self._poll = poll

    async def network(self) -> str:
        """An enclave has vsock, and no network."""
        return "none"

    async def wait(self) -> LaunchError | None:
        silent = 0
        while silent < SILENT_POLLS:
            await asyncio.sleep(self._poll)
            try:
                known = {each.id: each.state for each in await self._cli.describe()}
            except NitroError:
                silent += 1
            else:
                silent = 0
                if known.get(self._enclave.id) != self._enclave.state:
                    break
        return None


def places_of(configuration: LaunchConfiguration, cid: int) -> Places:
    """The host's side of an enclave's addresses. Raises LaunchConfigurationError for those that no enclave has."""
    listen = configuration.listen
    if not isinstance(listen, VsockAddress) or listen.cid != VMADDR_CID_ANY:
        raise LaunchConfigurationError(
            "rpc.listen",
            "an enclave listens on vsock: `strongroom init --target nitro` writes such a configuration",
            expected="vsock:any:PORT",
            got=listen,
        )
    if configuration.nsm is not None:
        raise LaunchConfigurationError(
            "nsm.address",
            "a Nitro enclave has a device: write the configuration with `strongroom init --target nitro`, and build "
            "the image with it",
            expected="device:/dev/nsm",
            got=configuration.nsm,
        )
    store = None if configuration.store is None else _served("model.store", configuration.store)
    egress = None if configuration.kms is None else _served("kms.egress", configuration.kms.egress)
    return Places(VsockAddress(cid, listen.port), store, egress, nsm=None)


def _served(key: str, address: Address) -> VsockAddress:
    if not isinstance(address, VsockAddress) or address.cid != PARENT_CID:
        raise LaunchConfigurationError(key, "an enclave reaches its host alone", expected="vsock:3:PORT", got=address)
    return VsockAddress(VMADDR_CID_ANY, address.port)


def cid_of(name: str) -> int:
    """The same for one name every time, so that who knows the enclave's address keeps it when it boots again."""
    return FIRST_CID + int.from_bytes(hashlib.sha256(name.encode()).digest()[:3])
