"""The vsock of an emulated machine, on the host's side: the device, the ports at which its guest reaches this host, and
the way to the guest's own.

The device is rust-vmm's vhost-device-vsock, which speaks Firecracker's protocol over Unix sockets: a connection to
the guest begins with a line that names the port, and a connection of the guest to CID 2, port P, arrives at the socket
of the same name with ``_P`` behind it. All of it stands in the enclave's own folder.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
import socket
import subprocess
from collections.abc import AsyncIterator, Awaitable, Callable
from functools import partial
from pathlib import Path

from parent.launch.child import BoundedLog, child, jailed, last_words
from parent.launch.machine import LaunchError
from parent.registry import Instance
from vsockrpc.address import UnixAddress
from vsockrpc.errors import ConnectionLost
from vsockrpc.sockets import Listener, dial_socket, listen_socket, prepare

VHOST_SOCKET = "vhost.sock"
"""At which the machine takes the device, in the instance's folder."""
VSOCK = "vsock"
"""At which the host reaches the guest; with ``_PORT`` behind it the guest reaches the host. Kept short, as paths of
sockets are."""
GUEST_CID = 4
"""Of every guest: the device serves one, and no other device knows of it. 4 is the first that Nitro gives."""
ENVIRONMENT = {"RUST_LOG": "error"}
"""Of the device: a guest can make it warn as often as it likes."""
TX_BUFFER_SIZE = 32_768
"""Bytes. With the device's own default, what a guest writes beyond 32 KiB is dropped, and the connection hangs."""

HEARTBEAT_PORT = 9000
"""At which AWS's init, and ours, tell the parent that the image has come up (aws-nitro-enclaves-sdk-bootstrap)."""
HEARTBEAT = b"\xb7"

DEVICE_SECONDS = 10.0
"""For the device to listen."""
DIAL_SECONDS = 10.0
"""For a connection to the guest, and for a heartbeat."""
STALL_SECONDS = 60.0
"""In which a reader has to take some of what it is sent."""
MAX_CONNECTIONS = 256
"""Of one listener at once; further ones wait."""
ACCEPT_PAUSE_SECONDS = 0.5
"""Without accepting, after the system had no descriptor or memory left for one more connection."""
CHUNK_SIZE = 65_536
"""Bytes in flight of each direction of a connection."""

_ANSWER = re.compile(rb"OK [0-9]{1,10}\n")
_MAX_ANSWER = 14
_LISTENS = 0x10000
"""``__SO_ACCEPTCON`` of Linux, in the flags of /proc/net/unix."""


# --- The device -------------------------------------------------------------------------------------------------------


def host_port(instance: Instance, port: int) -> UnixAddress:
    """Where the host has to listen for what the guest sends to its parent's ``port``. Raises AddressError."""
    return UnixAddress(str(instance.directory / f"{VSOCK}_{port}"))


@contextlib.asynccontextmanager
async def vsock_device(instance: Instance, program: Path) -> AsyncIterator[asyncio.subprocess.Process]:
    """The device's process, once a machine may connect to it. Raises LaunchError ``vsock_device_failed``."""
    for name in (VHOST_SOCKET, VSOCK):  # of the boot before: the device does not replace them
        (instance.directory / name).unlink(missing_ok=True)
    device = f"guest-cid={GUEST_CID},socket={VHOST_SOCKET},uds-path={VSOCK},tx-buffer-size={TX_BUFFER_SIZE}"
    command = jailed([str(program), "--vm", device], "--no-network")
    async with (
        BoundedLog(instance) as said,
        child(instance, command, stderr=subprocess.PIPE, environment=ENVIRONMENT) as process,
    ):
        said.record(process.stderr)
        try:
            async with asyncio.timeout(DEVICE_SECONDS):
                while not _listens(process.pid, VHOST_SOCKET):
                    if process.returncode is not None:
                        await said.ended()
                        raise LaunchError(
                            "vsock_device_failed", "the vsock device did not start", got=last_words(instance)
                        )
                    await asyncio.sleep(0.01)
        except TimeoutError:
            raise LaunchError(
                "vsock_device_failed",
                f"the vsock device did not listen within {DEVICE_SECONDS:g} s",
                got=last_words(instance),
            ) from None
        yield process


def _listens(pid: int, path: str) -> bool:
    """Whether a process has a listening socket of this name. To connect, only to see, would use the device up: it takes
    one machine.
    """
    try:
        table = Path(f"/proc/{pid}/net/unix").read_bytes()  # the process's own: it is in another network namespace
    except FileNotFoundError:
        return False
    sockets = (line.split(maxsplit=7) for line in table.splitlines()[1:])
    name = os.fsencode(path)
    return any(len(each) == 8 and each[7] == name and int(each[3], 16) & _LISTENS for each in sockets)


# --- Accepting --------------------------------------------------------------------------------------------------------


class _Acceptor:
    """Answers each connection in a task of its own, at most :data:`MAX_CONNECTIONS` at once. What happens to one of
    them concerns no other.
    """

    def __init__(self, listener: Listener, answer: Callable[[socket.socket], Awaitable[None]]) -> None:
        self._listener = listener
        self._answer = answer
        self._tasks: set[asyncio.Task[None]] = set()
        self._closing = False
        self._loop = asyncio.get_running_loop()
        self._resume()

    def _resume(self) -> None:
        if not self._closing and len(self._tasks) < MAX_CONNECTIONS:
            self._loop.add_reader(self._listener.sock, self._accept)

    def _accept(self) -> None:
        try:
            sock, _ = self._listener.sock.accept()
        except (BlockingIOError, InterruptedError, ConnectionAbortedError):
            return
        except OSError:  # out of descriptors, most likely: the listener stays readable, so look again a little later
            self._loop.remove_reader(self._listener.sock)
            self._loop.call_later(ACCEPT_PAUSE_SECONDS, self._resume)
            return
        task = self._loop.create_task(self._serve(sock))
        self._tasks.add(task)
        task.add_done_callback(self._ended)
        if len(self._tasks) == MAX_CONNECTIONS:
            self._loop.remove_reader(self._listener.sock)

    async def _serve(self, sock: socket.socket) -> None:
        with sock:
            prepare(sock)
            with contextlib.suppress(OSError, ConnectionLost):  # the peer sees it end
                await self._answer(sock)

    def _ended(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        self._resume()

    async def close(self) -> None:
        self._closing = True
        self._loop.remove_reader(self._listener.sock)
        self._listener.close()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)


@contextlib.asynccontextmanager
async def _accepting(address: UnixAddress, answer: Callable[[socket.socket], Awaitable[None]]) -> AsyncIterator[None]:
    acceptor = _Acceptor(await listen_socket(address), answer)
    try:
        yield
    finally:
        await acceptor.close()


# --- The heartbeat ----------------------------------------------------------------------------------------------------


@contextlib.asynccontextmanager
async def heartbeat(address: UnixAddress) -> AsyncIterator[asyncio.Event]:
    """Answers the init's heartbeat at ``address``, and yields the event that it has come. Raises AddressError."""
    heard = asyncio.Event()

    async def answer(sock: socket.socket) -> None:
        loop = asyncio.get_running_loop()
        async with asyncio.timeout(DIAL_SECONDS):
            if await loop.sock_recv(sock, 1) == HEARTBEAT:
                await loop.sock_sendall(sock, HEARTBEAT)
                heard.set()

    async with _accepting(address, answer):
        yield heard


# --- To the guest -----------------------------------------------------------------------------------------------------


@contextlib.asynccontextmanager
async def bridge(listen: UnixAddress, instance: Instance, port: int, ready: asyncio.Event) -> AsyncIterator[None]:
    """Carries connections at ``listen`` to the guest's vsock ``port``. Until ``ready`` is set they wait, for at most
    :data:`DIAL_SECONDS`: what is sent to a guest that has no driver yet is lost. A connection to a port at which
    nobody listens is closed. Raises AddressError.
    """
    guest = UnixAddress(str(instance.directory / VSOCK))
    async with _accepting(listen, partial(_carry, guest, port, ready)):
        yield


async def _carry(address: UnixAddress, port: int, ready: asyncio.Event, host: socket.socket) -> None:
    """The end of either direction is that of both. The RPC takes it for the same, and the device would lose what the
    guest has yet to say to a host that has only finished sending.
    """
    async with asyncio.timeout(DIAL_SECONDS):
        await ready.wait()
        guest = await dial_guest(address, port)
    with guest:
        try:
            async with asyncio.TaskGroup() as ways:
                ways.create_task(_copy(host, guest))
                ways.create_task(_copy(guest, host))
        except* (EOFError, OSError):
            pass


async def dial_guest(address: UnixAddress, port: int) -> socket.socket:
    """A connection to the guest's vsock ``port``, by the device at ``address``. The caller bounds the wait.

    Raises ConnectionLost ``unreachable``.
    """
    loop = asyncio.get_running_loop()
    sock = await dial_socket(address)
    try:
        await loop.sock_sendall(sock, f"CONNECT {port}\n".encode())
        answer = b""
        # Byte by byte: behind the line come the guest's own.
        while not answer.endswith(b"\n") and len(answer) < _MAX_ANSWER:
            byte = await loop.sock_recv(sock, 1)
            if not byte:
                raise ConnectionLost(f"nobody listens at the guest's port {port}", code="unreachable")
            answer += byte
        if not _ANSWER.fullmatch(answer):
            raise ConnectionLost(f"the vsock device does not connect: {answer!a}", code="unreachable")
    except OSError as error:
        sock.close()
        raise ConnectionLost(f"the vsock device ended the connection: {error}", code="unreachable") from error
    except BaseException:
        sock.close()
        raise
    return sock


async def _copy(source: socket.socket, sink: socket.socket) -> None:
    """Raises EOFError at the end of ``source``, TimeoutError when ``sink`` takes nothing, and OSError."""
    loop = asyncio.get_running_loop()
    buffer = memoryview(bytearray(CHUNK_SIZE))
    while count := await loop.sock_recv_into(source, buffer):
        async with asyncio.timeout(STALL_SECONDS):
            await loop.sock_sendall(sink, buffer[:count])
    raise EOFError
