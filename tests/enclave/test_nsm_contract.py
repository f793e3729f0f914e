"""The contract of the Nitro Secure Module on the core in process, the emulator's process behind a socket, the ioctl
path over a stand-in for the driver, and the device itself where there is one. ``tests/boot`` holds the device of an
emulated machine to it.
"""

from __future__ import annotations

import ctypes
import errno
import json
import os
import struct
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from emulator.nsm import SoftwareNsm, boot_registers, new_module_id
from emulator.pki import DevelopmentRoot, ensure_development_root
from enclave.nsm import MAX_REQUEST, NSM_IOCTL_RAW, DeviceTransport, Nsm, Transport, open_nsm
from tests.nsm_contract import IMAGE, INSTANCE, Backend, NsmContract

DEVICE = Path("/dev/nsm")


class InProcess:
    """The core as a transport: what the process does, without a socket."""

    def __init__(self, nsm: SoftwareNsm) -> None:
        self._nsm = nsm

    def exchange(self, request: bytes) -> bytes:
        return self._nsm.handle(request)

    def close(self) -> None:
        """Nothing is open."""


class Driver:
    """Stands in for the kernel's driver: reads and writes the caller's memory at the addresses of ``struct
    nsm_raw``."""

    def __init__(self, nsm: SoftwareNsm) -> None:
        self._nsm = nsm

    def ioctl(self, _descriptor: int, command: int, argument: bytearray) -> int:
        if command != NSM_IOCTL_RAW:
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        request_at, request_length, response_at, capacity = struct.unpack("=QQQQ", argument)
        if request_length > MAX_REQUEST:
            raise OSError(errno.EMSGSIZE, os.strerror(errno.EMSGSIZE))
        response = self._nsm.handle(ctypes.string_at(request_at, request_length))[:capacity]
        ctypes.memmove(response_at, response, len(response))
        argument[24:32] = len(response).to_bytes(8, sys.byteorder)
        return 0


def software(directory: Path) -> tuple[SoftwareNsm, DevelopmentRoot]:
    root = ensure_development_root(directory)
    registers = boot_registers(IMAGE, instance_id=INSTANCE)
    return SoftwareNsm(root, registers, module_id=new_module_id(INSTANCE)), root


@pytest.fixture(scope="module")
def pki(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("pki")


@pytest.fixture(params=["core", "process", "ioctl", *(["device"] if DEVICE.exists() else [])])
def backend(request: pytest.FixtureRequest, pki: Path, tmp_path: Path) -> Iterator[Backend]:
    transport: Transport
    match request.param:
        case "core":
            core, root = software(pki)
            transport = InProcess(core)
            yield Backend(Nsm(transport), transport, root)
        case "process":
            address = f"unix:{tmp_path / 'nsm.sock'}"
            pcrs = [f"--pcr{index}={value.hex()}" for index, value in IMAGE.as_registers().items()]
            command = [sys.executable, "-m", "emulator.nsm", f"--listen={address}", f"--pki={pki}", *pcrs]
            with subprocess.Popen([*command, f"--instance-id={INSTANCE}"], stdout=subprocess.PIPE) as process:
                try:
                    assert process.stdout is not None
                    assert json.loads(process.stdout.readline())["event"] == "ready"
                    nsm = open_nsm(address)
                    yield Backend(nsm, nsm.transport, ensure_development_root(pki))
                finally:
                    process.terminate()
            assert process.returncode == 0
        case "ioctl":
            core, root = software(pki)
            transport = DeviceTransport("/dev/null", ioctl=Driver(core).ioctl)
            with Nsm(transport) as nsm:
                yield Backend(nsm, transport, root)
        case "device":
            with open_nsm(f"device:{DEVICE}") as nsm:
                yield Backend(nsm, nsm.transport, None)


def test_device_is_among_the_backends() -> None:
    if not DEVICE.exists():
        pytest.skip(f"the contract was not run on a Nitro Secure Module: this machine has no {DEVICE}")


class TestNsm(NsmContract):
    """On the backends of this file."""
