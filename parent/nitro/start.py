"""Starting an enclave: what is wanted, whether this host can give it, said in numbers before nitro-cli is asked, and
whether what runs then is what was wanted.
"""

from __future__ import annotations

import asyncio
import contextlib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from attestation.reference import PcrSet
from parent.image.sizing import EIF_FACTOR
from parent.nitro.cli import NitroCli, RunningEnclave
from parent.nitro.errors import ALLOCATOR_FILE, ALLOCATOR_UNIT, NitroError
from parent.nitro.resources import MIB, EnclaveResources, Free, node_for
from vsockrpc.address import VMADDR_CID_ANY

LOWEST_MIB: Final = 64
"""The driver gives no enclave less."""
FIRST_CID: Final = 4
"""0 is the hypervisor, 1 the same machine, 2 the host of a guest, 3 the parent: none is an enclave's."""
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}", re.ASCII)


@dataclass(frozen=True, slots=True)
class EnclaveRequest:
    """One enclave. Raises NitroError ``bad_request``, ``bad_cid``, ``bad_cpus``, ``memory_too_small``."""

    image: Path
    name: str
    memory_mib: int
    cpus: int
    cid: int | None = None
    """None lets the driver choose."""
    debug: bool = False
    """Its console is open to the host and its registers are zero: nothing in it is protected."""

    def __post_init__(self) -> None:
        if not _NAME.fullmatch(self.name):
            raise NitroError(
                "bad_request", "an enclave's name is short and plain", expected=_NAME.pattern, got=ascii(self.name)
            )
        if self.cid is not None and not FIRST_CID <= self.cid < VMADDR_CID_ANY:
            raise NitroError(
                "bad_cid",
                "CIDs 0 to 3 and the highest are never an enclave's",
                expected=f"{FIRST_CID}..{VMADDR_CID_ANY - 1}",
                got=self.cid,
            )
        if self.cpus < 1:
            raise NitroError("bad_cpus", "an enclave has CPUs", expected="at least 1", got=self.cpus)

    def arguments(self) -> list[str]:
        """Of ``nitro-cli``."""
        given = ["run-enclave", "--eif-path", str(self.image), "--enclave-name", self.name]
        given += ["--memory", str(self.memory_mib), "--cpu-count", str(self.cpus)]
        given += [] if self.cid is None else ["--enclave-cid", str(self.cid)]
        return given + (["--debug-mode"] if self.debug else [])

    def __str__(self) -> str:
        cid = "" if self.cid is None else f", CID {self.cid}"
        return f"{self.memory_mib} MiB, {self.cpus} CPUs{cid} for {self.image.name}"


def lowest_memory_mib(image_size: int) -> int:
    """MiB that an enclave of an image of ``image_size`` bytes has at least."""
    return max(LOWEST_MIB, -(-EIF_FACTOR * image_size // MIB))


def require_memory(request: EnclaveRequest, image_size: int) -> None:
    """Raises NitroError ``memory_too_small``."""
    lowest = lowest_memory_mib(image_size)
    if request.memory_mib < lowest:
        raise NitroError(
            "memory_too_small",
            f"the enclave's memory is less than {EIF_FACTOR} times its image of {-(-image_size // MIB)} MiB",
            expected=f"--memory-mib {lowest} at least",
            got=f"{request.memory_mib} MiB",
        )


def require_possible(
    request: EnclaveRequest, image_size: int, host: EnclaveResources, running: Sequence[RunningEnclave]
) -> None:
    """Raises NitroError for what this host cannot give: ``memory_too_small``, ``cid_in_use``, ``bad_cpus``,
    ``cpus_missing``, ``numa_split``, ``hugepages_missing``, each with what there is and what was wanted.
    """
    require_memory(request, image_size)
    for other in running:
        if other.cid == request.cid:
            raise NitroError(
                "cid_in_use",
                f"the enclave {other.name or other.id} has this CID: take another, or leave --cid out",
                expected=f"none of {', '.join(str(each.cid) for each in running)}",
                got=request.cid,
            )
    if request.cpus % host.threads_per_core:
        raise NitroError(
            "bad_cpus",
            "an enclave has whole cores, with all of their threads",
            expected=f"a multiple of {host.threads_per_core}",
            got=request.cpus,
        )
    free = host.free(running)
    node = node_for(free, request.cpus)
    if node is None:
        raise _no_cpus(request, host, free)
    memory = free[node].memory
    if request.memory_mib > memory.free:
        elsewhere = sum(each.memory.free for each in free.values() if len(each.cpus) < request.cpus)
        beside = f" ({elsewhere} MiB are free on other nodes, where its CPUs are not)" if elsewhere else ""
        raise NitroError(
            "hugepages_missing",
            f"too little memory is free for enclaves in huge pages{beside}: `strongroom nitro bootstrap --memory-mib "
            f"{memory.reserved - memory.free + request.memory_mib} --cpus {len(host.pool)}` reserves more",
            expected=f"{request.memory_mib} MiB on NUMA node {node}",
            got=f"{memory.free} MiB free of {memory.reserved} MiB reserved",
        )


def _no_cpus(request: EnclaveRequest, host: EnclaveResources, free: Mapping[int, Free]) -> NitroError:
    """What to say where no NUMA node has as many CPUs free for enclaves as are wanted."""
    count = sum(len(each.cpus) for each in free.values())
    if request.cpus <= count:
        by_node = {node: ",".join(map(str, free[node].cpus)) or "none" for node in host.nodes}
        return NitroError(
            "numa_split",
            f"the CPUs that are free for enclaves are of several NUMA nodes: write cpu_count, not cpu_pool, into "
            f"{ALLOCATOR_FILE} and restart {ALLOCATOR_UNIT}",
            expected=f"{request.cpus} CPUs of one node",
            got="; ".join(f"node {node}: {cpus}" for node, cpus in by_node.items()),
        )
    return NitroError(
        "cpus_missing",
        f"too few CPUs are free for enclaves: `strongroom nitro bootstrap --cpus "
        f"{len(host.pool) - count + request.cpus} --memory-mib N` reserves more",
        expected=f"{request.cpus} CPUs",
        got=f"{count} free of the {len(host.pool)} in the pool",
    )


async def start_enclave(cli: NitroCli, request: EnclaveRequest, measured: PcrSet) -> RunningEnclave:
    """Starts it and returns it as nitro-cli knows it, once it has reported that it is up.

    nitro-cli measures the file again while it loads it: an enclave whose file was another one by then is terminated.
    Where the caller gives up meanwhile, or nitro-cli does not come back, what it may have started is terminated too.
    Raises NitroError.
    """
    try:
        started = await cli.start(request.arguments(), memory_mib=request.memory_mib, asked=str(request))
        known = {each.id: each for each in await cli.describe()}
        enclave = known.get(started.id)
        if enclave is None:
            raise NitroError("boot_failed", "the enclave ended as soon as it had started", got=started.id)
        require_same(enclave, measured)
        if enclave.debug != request.debug:
            raise NitroError("bad_nitro_cli_output", "the enclave's mode is not the one that was asked for")
    except BaseException:
        with contextlib.suppress(NitroError):  # what failed first is what there is to say
            await asyncio.shield(terminate_named(cli, request.name))
        raise
    return enclave


def require_same(enclave: RunningEnclave, measured: PcrSet) -> None:
    """Raises NitroError ``measurements_differ`` when nitro-cli loaded another file than was measured. An older one that
    says no measurements is believed: a client is told by the enclave's own Evidence.
    """
    said = {name: register.lower() for name, register in enclave.measurements.items()}
    ours = {f"PCR{index}": value.hex() for index, value in measured.as_registers().items()}
    for name in said.keys() & ours.keys():
        if said[name] != ours[name]:
            raise NitroError(
                "measurements_differ",
                "the image changed while it was loaded, and the enclave was terminated",
                expected=f"{name} {ours[name]}",
                got=said[name],
            )


async def terminate_named(cli: NitroCli, name: str) -> None:
    """Ends every enclave of this name. One that is gone meanwhile is no error. Raises NitroError."""
    for enclave in await cli.describe():
        if enclave.name == name:
            await terminate_if_there(cli, enclave.id)


async def terminate_if_there(cli: NitroCli, enclave_id: str) -> bool:
    """False when it was gone already. nitro-cli says of another user's enclave, which it may not end, the same as of
    one that is gone: so one that is still there is an error. Raises NitroError.
    """
    try:
        await cli.terminate(enclave_id)
    except NitroError as error:
        gone = error.code in ("no_such_enclave", "enclave_unanswering")
        if not gone or any(each.id == enclave_id for each in await cli.describe()):
            raise
        return False
    return True
