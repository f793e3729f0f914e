"""Stream sockets for addresses: vsock, Unix and TCP go one way from here on. All of them are non-blocking."""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
import stat
from collections.abc import Iterator

from vsockrpc.address import VMADDR_CID_ANY, Address, TcpAddress, UnixAddress, VsockAddress
from vsockrpc.errors import AddressError, ConnectionLost

SEND_BUFFER = 1_048_576
"""Bytes of a Unix socket's buffer, as far as the kernel allows; with its default of 208 KiB bulk transfers crawl."""
BACKLOG = 128
"""Connections that the kernel may hold before they are accepted."""
_RETRY = 0.005
"""Seconds between attempts while a Unix listener's backlog is full."""


async def dial_socket(address: Address) -> socket.socket:
    """A connected socket. The caller bounds the wait.

    Raises ConnectionLost ``unreachable``, or AddressError for a family that this system lacks.
    """
    try:
        match address:
            case UnixAddress(path):
                return await _dial_unix(path)
            case VsockAddress(cid, port):
                if cid == VMADDR_CID_ANY:
                    raise AddressError("vsock:any is for listening", expected="a CID", got=address)
                return await _dial(_vsock(), (cid, port))
            case TcpAddress():
                return await _dial_tcp(address)
    except OSError as error:
        reason = error.strerror or str(error)
        raise ConnectionLost(f"nothing answers at {address}: {reason}", code="unreachable") from error


async def _dial(sock: socket.socket, target: tuple[object, ...]) -> socket.socket:
    with _closed_on_failure(sock):
        await asyncio.get_running_loop().sock_connect(sock, target)
        prepare(sock)
    return sock


async def _dial_unix(path: str) -> socket.socket:
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
    with _closed_on_failure(sock):
        while True:
            try:
                sock.connect(path)
                prepare(sock)
                return sock
            except BlockingIOError:
                # The backlog is full, and unlike with TCP nothing is under way: sock_connect would see success.
                await asyncio.sleep(_RETRY)


async def _dial_tcp(address: TcpAddress) -> socket.socket:
    loop = asyncio.get_running_loop()
    found = await loop.getaddrinfo(address.host, address.port, type=socket.SOCK_STREAM)
    refused: OSError | None = None
    for family, kind, protocol, _, target in found:
        try:
            sock = await _dial(socket.socket(family, kind | socket.SOCK_NONBLOCK, protocol), target)
        except OSError as error:
            refused = error
            continue
        return sock
    raise refused or OSError("the name has no address")


def prepare(sock: socket.socket) -> None:
    """What an accepted or connected socket needs: no call on it blocks, and small frames leave at once."""
    sock.setblocking(False)
    if sock.family == socket.AF_UNIX:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SEND_BUFFER)
    if sock.family in (socket.AF_INET, socket.AF_INET6):
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)


class Listener:
    """A listening socket, and the file that it leaves in the file system when it is a Unix socket."""

    def __init__(self, sock: socket.socket, address: Address) -> None:
        self.sock = sock
        self.address = address
        """Where it listens; for TCP with the port that the system chose."""
        self._file = _identity(address.path) if isinstance(address, UnixAddress) else None

    def close(self) -> None:
        """Stop listening, and remove the socket's file unless it is no longer this listener's."""
        self.sock.close()
        if isinstance(self.address, UnixAddress) and self._file and _identity(self.address.path) == self._file:
            os.unlink(self.address.path)


async def listen_socket(address: Address) -> Listener:
    """A listening socket. Raises AddressError when the system refuses the address or someone listens there already.

    A Unix socket's file gets mode 0600 as it is made; a file that a dead listener left is replaced, any other is not.
    """
    try:
        match address:
            case UnixAddress(path):
                return Listener(_listen_unix(path), address)
            case VsockAddress(cid, port):
                return Listener(_bind(_vsock(), (cid, port)), address)
            case TcpAddress(host, port):
                found = await asyncio.get_running_loop().getaddrinfo(host, port, type=socket.SOCK_STREAM)
                family, kind, protocol, _, target = found[0]
                sock = _bind(socket.socket(family, kind, protocol), target)
                return Listener(sock, TcpAddress(host, sock.getsockname()[1]))
    except OSError as error:
        raise AddressError(f"cannot listen at {address}: {error.strerror or error}") from error


def _bind(sock: socket.socket, target: tuple[object, ...] | str) -> socket.socket:
    with _closed_on_failure(sock):
        if sock.family in (socket.AF_INET, socket.AF_INET6):
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.setblocking(False)
        sock.bind(target)
        sock.listen(BACKLOG)
    return sock


def _listen_unix(path: str) -> socket.socket:
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    # Linux gives the file the mode of the socket's own inode, less the umask: no moment at which others could connect.
    os.fchmod(sock.fileno(), 0o600)
    with _closed_on_failure(sock):
        _remove_stale(path)
    return _bind(sock, path)


def _remove_stale(path: str) -> None:
    found = _identity(path)
    if found is None:
        return
    if not stat.S_ISSOCK(os.lstat(path).st_mode):
        raise AddressError("a file that is no socket is in the way", got=path)
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK) as probe:
        try:
            probe.connect(path)
        except ConnectionRefusedError:
            if _identity(path) == found:
                os.unlink(path)
            return
        except BlockingIOError:
            pass  # a full backlog: someone listens
    raise AddressError("someone listens there already", got=path)


def _identity(path: str) -> tuple[int, int] | None:
    try:
        status = os.lstat(path)
    except FileNotFoundError:
        return None
    return status.st_dev, status.st_ino


def _vsock() -> socket.socket:
    try:
        return socket.socket(socket.AF_VSOCK, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
    except OSError as error:
        raise AddressError("this system has no vsock", got=error.strerror) from error


@contextlib.contextmanager
def _closed_on_failure(sock: socket.socket) -> Iterator[None]:
    try:
        yield
    except BaseException:
        sock.close()
        raise
