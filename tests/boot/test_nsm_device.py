"""Our client of ``/dev/nsm``, in the machine, on the module that the machine emulates: real ioctls through Linux's
driver, held to the contract that every backend is held to.
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import socket
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import cbor2
import pytest

from attestation.reference import PCR_INSTANCE, ZERO_PCR, PcrSet, once_extended
from enclave.nsm import Nsm, NsmError, NsmErrorCode
from parent.image.build import ImagePlan, OciLayout, build_image
from parent.launch.qemu import QemuMachine
from parent.registry import Instance
from tests.boot.conftest import PATIENCE_SECONDS
from tests.end_to_end.conftest import Home
from tests.nsm_contract import Backend, NsmContract, payload
from vsockrpc.address import Address, UnixAddress

RELAY = Path(__file__).with_name("relay.py")
RPC_PORT = "5005"
MEMORY = 1 << 30
"""Bytes."""
MODULE = "i-0123456789abcdef0"


@dataclass(frozen=True, slots=True)
class Relay:
    """A transport to the device in the machine."""

    address: UnixAddress

    def exchange(self, request: bytes) -> bytes:
        with socket.socket(socket.AF_UNIX) as connection:
            connection.settimeout(PATIENCE_SECONDS)
            connection.connect(self.address.path)
            connection.sendall(len(request).to_bytes(4, "big") + request)
            with connection.makefile("rb") as stream:
                length = stream.read(4)
                if len(length) < 4:
                    raise ConnectionError("the machine does not listen")
                reply = cbor2.loads(stream.read(int.from_bytes(length, "big")))
        if "code" in reply:
            raise NsmError(reply["code"], reply["message"])
        assert isinstance(reply["response"], bytes)
        return reply["response"]

    def close(self) -> None:
        """A connection lasts for one request."""


@contextlib.contextmanager
def booted(machine: QemuMachine) -> Iterator[PcrSet]:
    """Runs the machine on a thread of its own for as long as the block lasts; yields what was measured."""
    running, leaving = threading.Event(), asyncio.Event()
    measured: list[PcrSet] = []
    failed: list[BaseException] = []
    loop = asyncio.new_event_loop()

    async def run() -> None:
        measured.append(await machine.measure())
        async with machine.boot(measured[0]) as enclave:
            running.set()
            ended = asyncio.ensure_future(enclave.wait())
            left = asyncio.ensure_future(leaving.wait())
            await asyncio.wait({ended, left}, return_when=asyncio.FIRST_COMPLETED)
            assert not ended.done(), ended.result()
            ended.cancel()
            await asyncio.gather(ended, return_exceptions=True)

    def thread() -> None:
        try:
            loop.run_until_complete(run())
        except BaseException as error:  # it is raised where the block is left
            failed.append(error)
        finally:
            running.set()
            loop.close()

    runner = threading.Thread(target=thread)
    runner.start()
    try:
        running.wait()
        if measured:
            yield measured[0]
    finally:
        if not loop.is_closed():
            with contextlib.suppress(RuntimeError):  # it ended meanwhile
                loop.call_soon_threadsafe(leaving.set)
        runner.join()
        if failed:
            raise failed[0]


@dataclass(frozen=True, slots=True)
class Booted:
    measured: PcrSet
    rpc: Address


@pytest.fixture(scope="module")
def machine(home: Home, model: Path, layout: Path) -> Iterator[Booted]:
    """A machine that runs the relay in the enclave's own root file system."""
    home.run("init", "--target", "nitro", "--model", str(model), "--directory", str(home.folder / "device"))
    configuration = home.folder / "device" / "enclave.toml"
    code = base64.b64encode(RELAY.read_bytes()).decode()
    command = ("/usr/bin/python3", "-I", "-B", "-c", f"exec(__import__('base64').b64decode({code!r}))", RPC_PORT)
    image = home.folder / "device.eif"
    plan = ImagePlan(source=OciLayout(layout), configuration=configuration, cmd=command)
    build_image(plan, image, progress=lambda *_: None)
    instance = Instance(home.folder / "device")
    qemu = QemuMachine(instance, image, memory=MEMORY, cpus=2)
    with booted(qemu) as measured:
        assert isinstance(qemu.places.rpc, UnixAddress)
        nsm = Nsm(Relay(qemu.places.rpc))
        deadline = time.monotonic() + PATIENCE_SECONDS
        while True:
            try:
                nsm.describe_nsm()
            except (ConnectionError, FileNotFoundError):
                assert time.monotonic() < deadline, "the relay never answered"
                time.sleep(0.2)
            else:
                break
        yield Booted(measured, qemu.places.rpc)


@pytest.fixture
def backend(machine: Booted) -> Backend:
    assert isinstance(machine.rpc, UnixAddress)
    transport = Relay(machine.rpc)
    return Backend(Nsm(transport), transport, None)


class TestDevice(NsmContract):
    """The contract, on QEMU's module."""

    beyond_8_bits = NsmErrorCode.INVALID_OPERATION


def test_registers_are_what_the_image_measures(machine: Booted, backend: Backend) -> None:
    registers = payload(backend.nsm.attestation())["pcrs"]
    assert isinstance(registers, dict)
    for index, value in machine.measured.as_registers().items():
        assert backend.nsm.describe_pcr(index).data == value
        assert registers[index] == value
    assert registers[PCR_INSTANCE] in (ZERO_PCR, once_extended(MODULE.encode()))
