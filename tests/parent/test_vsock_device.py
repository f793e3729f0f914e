"""The host's side of an emulated machine's vsock, over real sockets, with the guest in this process."""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

import parent.launch.vsock_device
from parent.launch.machine import LaunchError
from parent.launch.vsock_device import bridge, dial_guest, heartbeat, host_port, vsock_device
from parent.registry import Instance
from tests.machines import Guest, device_in_this_process, processes_of, stand_in_tools
from vsockrpc.address import UnixAddress
from vsockrpc.errors import AddressError, ConnectionLost
from vsockrpc.transport import IncomingCall, Limits, connect, serve

PORT = 5005
pytestmark = pytest.mark.usefixtures("no_descriptor_is_left")


@pytest.fixture
def no_descriptor_is_left() -> object:
    before = set(os.listdir("/proc/self/fd"))
    yield
    assert len(set(os.listdir("/proc/self/fd"))) <= len(before)


@pytest.fixture
def instance(tmp_path_factory: pytest.TempPathFactory) -> Instance:
    return Instance(tmp_path_factory.mktemp("v"))


def rpc(instance: Instance) -> UnixAddress:
    return UnixAddress(str(instance.directory / "rpc.sock"))


def now() -> asyncio.Event:
    ready = asyncio.Event()
    ready.set()
    return ready


async def echo(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    while data := await reader.read(65536):
        writer.write(data)
        await writer.drain()


@contextlib.asynccontextmanager
async def bridged(
    instance: Instance, guest: Guest, *, ready: asyncio.Event | None = None, answer: bytes = b"OK 7\n"
) -> AsyncIterator[None]:
    async with (
        device_in_this_process(instance, guest, answer=answer),
        bridge(rpc(instance), instance, PORT, ready or now()),
    ):
        yield


@contextlib.asynccontextmanager
async def caller(address: UnixAddress) -> AsyncIterator[tuple[asyncio.StreamReader, asyncio.StreamWriter]]:
    reader, writer = await asyncio.open_unix_connection(address.path)
    try:
        yield reader, writer
    finally:
        writer.close()
        with contextlib.suppress(ConnectionError):
            await writer.wait_closed()


# --- The heartbeat ----------------------------------------------------------------------------------------------------


async def test_a_heartbeat_is_answered_and_told(instance: Instance) -> None:
    address = host_port(instance, 9000)
    async with heartbeat(address) as heard, caller(address) as (reader, writer):
        assert not heard.is_set()
        writer.write(b"\xb7")
        assert await reader.read() == b"\xb7"
        assert heard.is_set()
    assert not os.path.exists(address.path)


@pytest.mark.parametrize("sent", [b"", b"\x00", b"\xb6\xb7"])
async def test_what_is_no_heartbeat_gets_no_answer(instance: Instance, sent: bytes) -> None:
    address = host_port(instance, 9000)
    async with heartbeat(address) as heard, caller(address) as (reader, writer):
        writer.write(sent)
        writer.write_eof()
        with contextlib.suppress(ConnectionResetError):  # a byte that nobody took was under way
            assert await reader.read() == b""
        assert not heard.is_set()


async def test_who_says_nothing_is_not_waited_for(instance: Instance, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parent.launch.vsock_device, "DIAL_SECONDS", 0.01)
    address = host_port(instance, 9000)
    async with heartbeat(address) as heard, caller(address) as (reader, _):
        assert await reader.read() == b""
        assert not heard.is_set()


async def test_the_folder_is_this_instances_alone(instance: Instance) -> None:
    address = host_port(instance, 9000)
    async with heartbeat(address):
        with pytest.raises(AddressError):
            await heartbeat(address).__aenter__()


def test_a_path_that_no_socket_can_have_is_said(tmp_path: Path) -> None:
    with pytest.raises(AddressError):
        host_port(Instance(tmp_path / ("x" * 107)), 9000)


# --- To the guest -----------------------------------------------------------------------------------------------------


async def test_bytes_go_both_ways(instance: Instance) -> None:
    sent = os.urandom(3_000_001)
    async with bridged(instance, echo), caller(rpc(instance)) as (reader, writer):
        writer.write(sent)
        assert await reader.readexactly(len(sent)) == sent


async def test_what_the_guest_says_with_the_answer_is_not_lost(instance: Instance) -> None:
    async def greet(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"hello")
        await reader.read()

    async with bridged(instance, greet), caller(rpc(instance)) as (reader, _):
        assert await reader.readexactly(5) == b"hello"


async def test_all_that_the_guest_said_arrives_before_its_end(instance: Instance) -> None:
    said = os.urandom(2_000_000)

    async def speak(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(said)
        await writer.drain()

    async with bridged(instance, speak), caller(rpc(instance)) as (reader, _):
        assert await reader.read() == said


async def test_a_host_that_ends_its_half_ends_the_connection(instance: Instance) -> None:
    """The guest gets all that was said before."""
    heard: asyncio.Future[bytes] = asyncio.get_running_loop().create_future()

    async def listen(reader: asyncio.StreamReader, _: asyncio.StreamWriter) -> None:
        heard.set_result(await reader.read())

    async with bridged(instance, listen), caller(rpc(instance)) as (reader, writer):
        writer.write(b"goodbye")
        writer.write_eof()
        assert await reader.read() == b""
        assert await heard == b"goodbye"


async def test_a_port_at_which_nobody_listens_ends_the_connection(instance: Instance) -> None:
    async with (
        device_in_this_process(instance, echo),
        bridge(rpc(instance), instance, PORT + 1, now()),
        caller(rpc(instance)) as (reader, _),
    ):
        assert await reader.read() == b""


async def test_a_device_that_is_gone_ends_the_connection(instance: Instance) -> None:
    async with bridge(rpc(instance), instance, PORT, now()), caller(rpc(instance)) as (reader, _):
        assert await reader.read() == b""


async def test_nothing_is_sent_to_a_guest_that_has_not_come_up(instance: Instance) -> None:
    ready = asyncio.Event()
    dialled: list[bool] = []

    async def told(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        dialled.append(ready.is_set())
        await echo(reader, writer)

    async with bridged(instance, told, ready=ready), caller(rpc(instance)) as (reader, writer):
        writer.write(b"x")
        await asyncio.sleep(0.01)
        ready.set()
        assert await reader.readexactly(1) == b"x"
    assert dialled == [True]


async def test_a_guest_that_does_not_come_up_is_not_waited_for(
    instance: Instance, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(parent.launch.vsock_device, "DIAL_SECONDS", 0.01)
    async with bridged(instance, echo, ready=asyncio.Event()), caller(rpc(instance)) as (reader, _):
        assert await reader.read() == b""


async def test_a_guest_that_takes_nothing_is_given_up(instance: Instance, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its caller may have left long ago, and nobody would see."""
    monkeypatch.setattr(parent.launch.vsock_device, "STALL_SECONDS", 0.05)

    async def idle(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await asyncio.Event().wait()

    async with bridged(instance, idle), caller(rpc(instance)) as (reader, writer):
        writer.write(bytes(8_000_000))
        with contextlib.suppress(ConnectionResetError):
            assert await reader.read() == b""


async def test_no_more_connections_than_the_bound_are_held(instance: Instance, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parent.launch.vsock_device, "MAX_CONNECTIONS", 2)
    at_once = most = 0

    async def counted(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal at_once, most
        at_once += 1
        most = max(most, at_once)
        await reader.readexactly(1)
        at_once -= 1
        writer.write(b"x")

    async def call() -> bytes:
        async with caller(rpc(instance)) as (reader, writer):
            writer.write(b"x")
            return await reader.read()

    async with bridged(instance, counted):
        assert await asyncio.gather(*(call() for _ in range(20))) == [b"x"] * 20
    assert most <= 2


async def test_out_of_descriptors_it_tries_again(instance: Instance, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parent.launch.vsock_device, "ACCEPT_PAUSE_SECONDS", 0.01)
    accept, refusals = socket.socket.accept, [OSError(24, "Too many open files")] * 3

    def scarce(sock: socket.socket) -> tuple[socket.socket, object]:
        if refusals and sock.getsockname() == rpc(instance).path:
            raise refusals.pop()
        return accept(sock)

    monkeypatch.setattr(socket.socket, "accept", scarce)
    async with bridged(instance, echo), caller(rpc(instance)) as (reader, writer):
        writer.write(b"x")
        assert await reader.readexactly(1) == b"x"
    assert not refusals


async def test_its_end_ends_what_is_open(instance: Instance) -> None:
    async with contextlib.AsyncExitStack() as stack:
        async with bridged(instance, echo):
            reader, writer = await stack.enter_async_context(caller(rpc(instance)))
            writer.write(b"x")
            assert await reader.readexactly(1) == b"x"
        assert await reader.read() == b""
    assert not os.path.exists(rpc(instance).path)


@given(st.binary(max_size=40) | st.binary(max_size=20).map(lambda rest: b"OK 5\n" + rest))
def test_whatever_the_device_answers_gives_a_connection_or_says_that_there_is_none(
    tmp_path_factory: pytest.TempPathFactory, answer: bytes
) -> None:
    instance = Instance(tmp_path_factory.mktemp("v"))

    async def end(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write_eof()

    async def dial() -> bytes | str:
        async with device_in_this_process(instance, end, answer=answer):
            try:
                sock = await dial_guest(UnixAddress(str(instance.directory / "vsock")), PORT)
            except ConnectionLost as error:
                return error.code
            with sock:
                return await asyncio.get_running_loop().sock_recv(sock, 100)

    line, newline, rest = answer.partition(b"\n")
    is_answer = newline and line.startswith(b"OK ") and line[3:].isdigit() and len(line) <= 13
    assert asyncio.run(dial()) == (rest if is_answer else "unreachable")


async def test_the_rpc_over_it(instance: Instance) -> None:
    """A whole call, and a caller's graceful end, which would wait for the other side's as long as it may."""

    async def double(call: IncomingCall) -> None:
        await call.reply({})
        async for chunk in call:
            await call.send(bytes(chunk) * 2)

    async def into_guest(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        there, back = await asyncio.open_unix_connection(inside.path)

        async def copy(source: asyncio.StreamReader, sink: asyncio.StreamWriter) -> None:
            while data := await source.read(65536):
                sink.write(data)
            sink.close()

        await asyncio.gather(copy(reader, back), copy(there, writer))
        await back.wait_closed()

    inside = UnixAddress(str(instance.directory / "guest"))
    patient = Limits(drain=3_600)
    defects: list[BaseException] = []
    async with (
        serve(inside, {"double": double}, on_error=defects.append),
        bridged(instance, into_guest),
        connect(rpc(instance), limits=patient) as client,
        client.call("double", {}) as call,
    ):
        await call.send(b"x" * 100_000, end=True)
        assert b"".join([bytes(chunk) async for chunk in call]) == b"x" * 200_000
    assert not defects


# --- The device -------------------------------------------------------------------------------------------------------


@pytest.fixture
def device(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    stand_in_tools(tmp_path, monkeypatch)
    return tmp_path / "vhost-device-vsock/bin/vhost-device-vsock"


async def test_the_device_listens_and_ends_with_its_context(instance: Instance, device: Path) -> None:
    for _ in range(2):  # the second time, what the first one left is in the way
        async with vsock_device(instance, device) as process:
            socket_file = instance.directory / "vhost.sock"
            with socket.socket(socket.AF_UNIX) as machine:
                machine.connect(str(socket_file))
            assert list(processes_of(instance)) == [process.pid]
            assert b"RUST_LOG=error" in Path(f"/proc/{process.pid}/environ").read_bytes().split(b"\0")
        assert process.returncode is not None
        assert list(processes_of(instance)) == []


async def test_a_device_that_does_not_start_says_why(instance: Instance, device: Path) -> None:
    (instance.directory / "no-device").write_text("GLIBC_2.38 not found")
    with pytest.raises(LaunchError) as caught:
        await vsock_device(instance, device).__aenter__()
    assert (caught.value.code, caught.value.got) == ("vsock_device_failed", "GLIBC_2.38 not found")


async def test_a_device_that_never_listens_is_ended(
    instance: Instance, device: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its socket's file is there, so only the system knows."""
    (instance.directory / "deaf-device").touch()
    monkeypatch.setattr(parent.launch.vsock_device, "DEVICE_SECONDS", 0.3)
    with pytest.raises(LaunchError) as caught:
        await vsock_device(instance, device).__aenter__()
    assert caught.value.code == "vsock_device_failed"
    assert list(processes_of(instance)) == []
