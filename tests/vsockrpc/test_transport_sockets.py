"""Listening and dialling: what each kind of address brings with it."""

from __future__ import annotations

import asyncio
import contextlib
import os
import resource
import socket
import stat
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from vsockrpc.address import VMADDR_CID_ANY, TcpAddress, UnixAddress, VsockAddress
from vsockrpc.errors import AddressError
from vsockrpc.transport import ConnectionLost, IncomingCall, Limits, connect, dial, listen, serve

LIMITS = Limits(handshake=5, drain=0.2)


async def nothing(call: IncomingCall) -> None:
    """Answer."""


def unexpected(error: BaseException) -> None:
    raise AssertionError("the server failed") from error


def test_vsock_is_among_the_transports_that_are_tested_here() -> None:
    try:
        with socket.socket(socket.AF_VSOCK, socket.SOCK_STREAM) as sock:
            sock.bind((1, 0x20000))
    except OSError as error:
        pytest.skip(f"it is not: this kernel has no vsock loopback ({error.strerror})")


async def test_a_unix_socket_is_its_owners_alone(folder: Path) -> None:
    path = folder / "s"
    old = os.umask(0)
    try:
        async with serve(UnixAddress(str(path)), {}, on_error=unexpected):
            assert stat.S_IMODE(path.lstat().st_mode) == 0o600
    finally:
        os.umask(old)
    assert not path.exists()


async def test_a_stale_socket_is_replaced_and_a_live_one_is_not(folder: Path) -> None:
    path = folder / "s"
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(str(path))
    address = UnixAddress(str(path))
    async with serve(address, {"m": nothing}, on_error=unexpected, limits=LIMITS):
        with pytest.raises(AddressError, match="someone listens"):
            await listen(address, {}, on_error=unexpected)
        async with connect(address, limits=LIMITS) as client, client.call("m", {}) as call:
            await call.reply()


@pytest.mark.parametrize("kind", ["file", "folder", "link"])
async def test_what_is_no_socket_is_not_removed(folder: Path, kind: str) -> None:
    path = folder / "s"
    match kind:
        case "file":
            path.write_text("precious")
        case "folder":
            path.mkdir()
        case "link":
            path.symlink_to(folder / "elsewhere")
    with pytest.raises(AddressError, match="no socket"):
        await listen(UnixAddress(str(path)), {}, on_error=unexpected)
    assert path.is_symlink() or path.exists()


async def test_closing_leaves_a_socket_that_took_the_place(folder: Path) -> None:
    path = folder / "s"
    server = await listen(UnixAddress(str(path)), {}, on_error=unexpected)
    path.unlink()
    with socket.socket(socket.AF_UNIX) as other:
        other.bind(str(path))
        await server.close()
        assert path.exists()


async def test_addresses_that_cannot_be_listened_at(folder: Path) -> None:
    for address in (UnixAddress(str(folder / "none" / "s")), TcpAddress("192.0.2.1", 1), TcpAddress("no.invalid", 1)):
        with pytest.raises(AddressError) as caught:
            await listen(address, {}, on_error=unexpected)
        assert str(address) in str(caught.value)


async def test_nobody_there(folder: Path) -> None:
    path = str(folder / "s")
    with socket.socket(socket.AF_UNIX) as dead, socket.socket() as tcp:
        dead.bind(path)
        tcp.bind(("127.0.0.1", 0))
        port = tcp.getsockname()[1]
        for address in (UnixAddress(path), UnixAddress(path + "x"), TcpAddress("127.0.0.1", port)):
            with pytest.raises(ConnectionLost) as caught:
                await dial(address)
            assert caught.value.code == "unreachable"
            assert str(address) in str(caught.value)


async def test_vsock_any_is_for_listening() -> None:
    with pytest.raises(AddressError):
        await dial(VsockAddress(VMADDR_CID_ANY, 5005))


async def test_somebody_there_who_says_nothing(folder: Path) -> None:
    address = UnixAddress(str(folder / "s"))
    with socket.socket(socket.AF_UNIX) as mute:
        mute.bind(address.path)
        mute.listen()
        with pytest.raises(ConnectionLost) as caught:
            await dial(address, limits=replace(LIMITS, handshake=0.05))
        assert caught.value.code == "unreachable"


async def test_a_full_backlog_is_waited_for(folder: Path) -> None:
    """connect() on a Unix socket says EAGAIN then, and nothing is under way."""
    path = str(folder / "s")
    address = UnixAddress(path)
    async with serve(address, {"m": nothing}, on_error=unexpected, limits=LIMITS) as server:
        server._loop.remove_reader(server._listener.sock)
        with contextlib.ExitStack() as crowd:
            with contextlib.suppress(BlockingIOError):
                while True:
                    sock = crowd.enter_context(socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK))
                    sock.connect(path)
            with pytest.raises(ConnectionLost):
                await dial(address, limits=replace(LIMITS, handshake=0.05))
            dialling = asyncio.create_task(dial(address, limits=LIMITS))
            await asyncio.sleep(0)
        server._loop.add_reader(server._listener.sock, server._accept)
        client = await dialling
        async with client.call("m", {}) as call:
            await call.reply()
        await client.close()


@contextlib.contextmanager
def no_descriptor_left() -> Iterator[None]:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    highest = max(int(name) for name in os.listdir("/proc/self/fd"))
    with contextlib.ExitStack() as filled:
        resource.setrlimit(resource.RLIMIT_NOFILE, (highest + 1, hard))
        try:
            with contextlib.suppress(OSError):
                while True:
                    filled.enter_context(open(os.devnull))
            yield
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


async def test_a_server_out_of_descriptors_goes_on_when_it_has_some(folder: Path) -> None:
    errors: list[BaseException] = []
    failed = asyncio.Event()

    def on_error(error: BaseException) -> None:
        errors.append(error)
        failed.set()

    path = str(folder / "s")
    async with serve(UnixAddress(path), {}, on_error=on_error, limits=LIMITS):
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK) as sock:
            sock.connect(path)
            with no_descriptor_left():
                await failed.wait()
            assert [type(error) for error in errors] == [OSError]
            assert await asyncio.get_running_loop().sock_recv(sock, 1) == b"\x00"  # HELLO


async def test_the_port_that_the_system_chose() -> None:
    async with serve(TcpAddress("127.0.0.1", 0), {}, on_error=unexpected) as server:
        assert isinstance(server.address, TcpAddress)
        assert server.address.port > 0
