from __future__ import annotations

import os
import socket
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from vsockrpc.address import Address, TcpAddress, UnixAddress, VsockAddress

VMADDR_CID_LOCAL = 1
VSOCK_PORT = 0x10000 + os.getpid()


def has_vsock_loopback() -> bool:
    try:
        with socket.socket(socket.AF_VSOCK, socket.SOCK_STREAM) as sock:
            sock.bind((VMADDR_CID_LOCAL, VSOCK_PORT))
    except OSError:
        return False
    return True


@pytest.fixture
def folder() -> Iterator[Path]:
    """A folder whose path is short enough for a Unix socket."""
    with tempfile.TemporaryDirectory(prefix="rpc") as path:
        yield Path(path)


@pytest.fixture(params=["unix", "tcp", *(["vsock"] if has_vsock_loopback() else [])])
def address(request: pytest.FixtureRequest, folder: Path) -> Address:
    """Where to listen, on each kind of transport that this machine has."""
    match request.param:
        case "unix":
            return UnixAddress(str(folder / "s"))
        case "tcp":
            return TcpAddress("127.0.0.1", 0)
        case _:
            return VsockAddress(VMADDR_CID_LOCAL, VSOCK_PORT)
