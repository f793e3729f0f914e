"""The QEMU launcher: an enclave image in an emulated machine, the same image that a Nitro host would run.

QEMU's nitro-enclave machine loads the image as Nitro's hypervisor does, measures it on its own and emulates the NSM's
device, whose documents nobody signs; an image whose configuration names a vsock port for its NSM gets the software NSM
instead. There is no network device in the machine, no disk and no display: only memory, CPUs, a console, the NSM and
vsock. It keeps nothing from its host, and is for trying and testing.
"""

from __future__ import annotations

import asyncio
import contextlib
import math
import os
import re
import subprocess
import tempfile
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path

from attestation.eif import Architecture
from attestation.measure import read_image
from attestation.reference import PcrSet
from parent.cache import cache_home, newest
from parent.config import LaunchConfiguration, LaunchConfigurationError
from parent.image.sizing import EIF_FACTOR
from parent.launch.child import BoundedLog, Recording, child, jailed, last_words
from parent.launch.machine import LaunchError, Places
from parent.launch.vsock_device import HEARTBEAT_PORT, VHOST_SOCKET, bridge, heartbeat, host_port, vsock_device
from parent.registry import Instance
from vsockrpc.address import VMADDR_CID_ANY, Address, UnixAddress, VsockAddress

PARENT_CID = 3
"""Of the parent on Nitro, as images name it. The device knows the host as 2 only: the kernel's command line says so,
behind what is measured, and our init and the enclave take 2 for 3."""
RPC_SOCKET = "rpc.sock"
CONSOLE = "console.log"

MIB = 1 << 20
GIB = 1 << 30

HEARTBEAT_SECONDS = 300.0
"""For the image's init to come up. With plain ramdisks it takes 2 to 5 s on two cores, with compressed ones 15."""
MAX_CONSOLE = 1 << 20
"""Bytes of the console that are kept, at most."""
SHOWN_CONSOLE = 400
"""Characters of its end that an error shows."""
_UNUSABLE = re.compile(r"^init: (halt: .*|the command exited with status 2)$", re.MULTILINE)
"""What our init says when a boot cannot go on, and when the enclave could not begin, for its configuration or because
it cannot listen: starting it again would not help. The machine itself only ends, in either case."""


# --- The tools --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Tools:
    """What an emulated machine is made of."""

    qemu: Path
    firmware: Path
    """A folder."""
    vsock_device: Path

    @classmethod
    def find(cls) -> Tools:
        """``$STRONGROOM_QEMU`` and ``$STRONGROOM_VSOCK_DEVICE`` name folders as the scripts make them; else it is the
        newest in the cache. Raises LaunchError ``missing_tool``.
        """
        qemu = _made_by("qemu", "STRONGROOM_QEMU", "bin/qemu-system-x86_64")
        device = _made_by("vsock-device", "STRONGROOM_VSOCK_DEVICE", "bin/vhost-device-vsock")
        return cls(qemu / "bin/qemu-system-x86_64", qemu / "firmware", device / "bin/vhost-device-vsock")


def _made_by(script: str, variable: str, program: str) -> Path:
    """A script's result, which is there as a whole or not at all."""
    named = os.environ.get(variable)
    found = Path(named).absolute() if named else newest(script, program)
    if found is None or not (found / program).is_file():
        raise LaunchError(
            "missing_tool",
            f"{Path(program).name} is not there: scripts/machine/{script} makes it",
            expected=f"${variable} or {cache_home()}/{script}-*",
            got=named or "no such folder",
        )
    return found


# --- The machine ------------------------------------------------------------------------------------------------------


class QemuMachine:
    """An enclave in an emulated machine."""

    launcher = "qemu"
    listen_seconds = 600.0
    """Without hardware acceleration about 10 s, on two cores of its own; a busy host has taken ten times that."""

    def __init__(self, instance: Instance, image: Path, *, memory: int, cpus: int | None = None) -> None:
        """``image`` is an EIF of x86_64, ``instance`` has its configuration. ``memory`` is bytes, of which the machine
        gets whole MiB, and ``cpus`` a count; None takes the CPUs that this process may use.

        Raises LaunchError ``missing_tool``, ``unreadable_image``, ``too_little_memory``; LaunchConfigurationError for
        addresses that an emulated machine does not have; AddressError for a folder whose path is too long.
        """
        self._instance = instance
        self._image = image.absolute()
        self._tools = Tools.find()
        self._memory = machine_memory(image_size(image), memory)
        self._cpus = cpus or len(os.sched_getaffinity(0))
        configuration = LaunchConfiguration.load(instance.configuration)
        self._rpc_port = _guest_port(configuration.listen)
        self.places = places_of(configuration, instance)

    async def measure(self) -> PcrSet:
        image = await asyncio.to_thread(read_image, self._image)
        if image.architecture is not Architecture.X86_64:
            raise LaunchError(
                "wrong_architecture",
                "the emulated machine runs images of another architecture",
                expected=Architecture.X86_64,
                got=image.architecture,
            )
        return image.measurements

    @contextlib.asynccontextmanager
    async def boot(self, measured: PcrSet) -> AsyncIterator[RunningMachine]:
        instance = self._instance
        command = jailed(self.command(), "--no-network")
        console, said = Console(instance.directory / CONSOLE), BoundedLog(instance)
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
        with tempfile.TemporaryDirectory(prefix="image-", dir=instance.directory) as temporary:
            # QEMU writes kernel and ramdisks into files there, and leaves them when it ends before it has loaded them.
            environment = {"TMPDIR": temporary}
            async with (
                heartbeat(host_port(instance, HEARTBEAT_PORT)) as heard,
                bridge(rpc_socket(instance), instance, self._rpc_port, heard),
                vsock_device(instance, self._tools.vsock_device) as device,
                console,
                said,
                child(instance, command, environment=environment, **pipes) as qemu,
            ):
                console.record(qemu.stdout)
                said.record(qemu.stderr)
                yield RunningMachine(instance, qemu, device, heard, console, said)

    def command(self) -> list[str]:
        """QEMU's command line; it is to run in the instance's folder."""
        return [
            *(str(self._tools.qemu), "-L", str(self._tools.firmware), "-nodefaults", "-no-user-config", "-no-reboot"),
            *("-M", f"nitro-enclave,vsock=vsock,id=i-emulated-enc-{self._instance.name}", "-accel", "tcg,thread=multi"),
            # The default CPU of QEMU has no AVX; this one has AVX2, FMA, F16C and BMI2, and no AVX-512.
            *("-cpu", "max", "-smp", str(self._cpus), "-m", f"{self._memory // MIB}M"),
            *("-display", "none", "-monitor", "none", "-serial", "stdio"),
            *("-chardev", f"socket,id=vsock,path={VHOST_SOCKET}"),
            *("-kernel", str(self._image), "-append", "parent_cid=2"),
        ]


def image_size(image: Path) -> int:
    """Bytes. Raises LaunchError ``unreadable_image``."""
    try:
        return image.stat().st_size
    except OSError as error:
        raise LaunchError("unreadable_image", f"{image}: {error.strerror}") from error


def machine_memory(image: int, wanted: int) -> int:
    """``wanted`` bytes, in whole MiB, for an image's file of so many bytes: as much as nitro-cli asks for, and what the
    image takes to be unpacked. Raises LaunchError ``too_little_memory``.
    """
    least = EIF_FACTOR * image
    if wanted < least:
        raise LaunchError(
            "too_little_memory",
            f"an enclave needs {EIF_FACTOR} times the size of its image, which is {_mib(image)} MiB",
            expected=f">= {_mib(least)} MiB (--memory-gib {math.ceil(least / GIB * 100) / 100})",
            got=f"{wanted / MIB:g} MiB",
        )
    return _mib(wanted) * MIB


def _mib(size: int) -> int:
    return -(-size // MIB)


def places_of(configuration: LaunchConfiguration, instance: Instance) -> Places:
    """The sockets in an instance's folder that stand for an enclave's addresses. Raises LaunchConfigurationError for
    those that no emulated machine has, AddressError for a folder whose path is too long.
    """

    def served(key: str, address: Address) -> UnixAddress:
        if not isinstance(address, VsockAddress) or address.cid != PARENT_CID:
            raise LaunchConfigurationError(
                key, "a machine reaches its host by vsock", expected=f"vsock:{PARENT_CID}:PORT", got=str(address)
            )
        return host_port(instance, address.port)

    _guest_port(configuration.listen)
    store, kms, nsm = configuration.store, configuration.kms, configuration.nsm
    return Places(
        rpc=rpc_socket(instance),
        store=None if store is None else served("model.store", store),
        egress=None if kms is None else served("kms.egress", kms.egress),
        nsm=None if nsm is None else served("nsm.address", nsm),
    )


def rpc_socket(instance: Instance) -> UnixAddress:
    return UnixAddress(str(instance.directory / RPC_SOCKET))


def _guest_port(address: Address) -> int:
    if not isinstance(address, VsockAddress) or address.cid != VMADDR_CID_ANY:
        raise LaunchConfigurationError(
            "rpc.listen", "a machine is reached by vsock", expected="vsock:any:PORT", got=str(address)
        )
    return address.port


# --- What runs --------------------------------------------------------------------------------------------------------


class Console(Recording):
    """What a machine writes to its console, in a file of at most :data:`MAX_CONSOLE` bytes: when half of that is full,
    it takes the place of the half before it. The guest writes it, so nothing in it is believed or shown as it stands.
    """

    def __init__(self, path: Path) -> None:
        super().__init__()
        self._path = path
        self._older = path.with_name(path.name + ".1")
        self._size = 0
        self._end = b""
        for old in (self._path, self._older):
            old.unlink(missing_ok=True)

    def take(self, data: bytes) -> None:
        self._end = (self._end + data)[-SHOWN_CONSOLE:]
        if self._size + len(data) > MAX_CONSOLE // 2:
            self._path.replace(self._older)
            self._size = 0
        self._size += len(data)
        with self._path.open("ab", buffering=0) as file:
            file.write(data)

    def end(self) -> str:
        """The last of it, as text that a terminal can be shown."""
        lines = self._end.decode("ascii", "replace").splitlines()
        shown = ["".join(each if each.isascii() and each.isprintable() else "." for each in line) for line in lines]
        return "\n".join(line for line in shown if line.strip("."))


@dataclass(frozen=True, slots=True)
class RunningMachine:
    """QEMU and its vsock device. The end of one is that of both."""

    instance: Instance
    qemu: asyncio.subprocess.Process
    device: asyncio.subprocess.Process
    heard: asyncio.Event
    """The image's init has come up."""
    console: Console
    said: Recording
    """What QEMU itself says."""

    async def network(self) -> str:
        """The machine has no network device."""
        return "none"

    async def wait(self) -> LaunchError | None:
        ends = [asyncio.ensure_future(process.wait()) for process in (self.qemu, self.device)]
        came_up = asyncio.ensure_future(self.heard.wait())
        try:
            await asyncio.wait([*ends, came_up], timeout=HEARTBEAT_SECONDS, return_when=asyncio.FIRST_COMPLETED)
            if came_up.done():
                await asyncio.wait(ends, return_when=asyncio.FIRST_COMPLETED)
            if self.qemu.returncode is not None:
                await self.console.ended()
                await self.said.ended()
        finally:
            for end in (*ends, came_up):
                end.cancel()
            await asyncio.gather(*ends, came_up, return_exceptions=True)
        return self._reason()

    def _reason(self) -> LaunchError | None:
        """Of the end, where another boot would come to the same one."""
        said = self.console.end() or "nothing was said"
        if self.qemu.returncode is None and self.device.returncode is None:
            return LaunchError(
                "no_heartbeat",
                f"the image's init sent no heartbeat within {HEARTBEAT_SECONDS:g} s; an init of AWS reaches its "
                "parent on Nitro only: build the image with ours",
                expected=f"one byte at port {HEARTBEAT_PORT}",
                got=said,
            )
        if self.qemu.returncode == 1 and not self.heard.is_set():
            return LaunchError("qemu_refused", "QEMU does not run this image", got=last_words(self.instance))
        if _UNUSABLE.search(said):
            return LaunchError("enclave_unusable", "the image's init ended the machine", got=said)
        ended = "QEMU" if self.qemu.returncode is not None else "the vsock device"
        with contextlib.suppress(OSError), self.instance.log.open("a") as log:
            when = "" if self.heard.is_set() else " before the image's init came up"
            log.write(f"strongroom: {ended} ended{when}; the end of {CONSOLE}:\n{said}\n")
        return None
