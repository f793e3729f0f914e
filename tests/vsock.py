"""Vsock as a server sees it, on machines without: a Unix socket whose callers have the CIDs that a test says."""

from __future__ import annotations

import socket
from collections.abc import Iterable
from pathlib import Path

import pytest

from vsockrpc import transport
from vsockrpc.address import Address, UnixAddress, VsockAddress
from vsockrpc.sockets import Listener, listen_socket


def pretend_vsock(monkeypatch: pytest.MonkeyPatch, directory: Path, cids: Iterable[int]) -> UnixAddress:
    """Servers that listen over vsock are reached at the address returned; their callers have ``cids``, one a
    connection."""
    there = UnixAddress(str(directory / "vsock"))
    callers = iter(cids)

    class Accepting(socket.socket):
        def accept(self) -> tuple[socket.socket, tuple[int, int]]:
            sock, _ = super().accept()
            return sock, (next(callers), 1024)

    async def listen_over(address: Address) -> Listener:
        assert isinstance(address, VsockAddress)
        listener = await listen_socket(there)
        accepting = Accepting(fileno=listener.sock.detach())
        accepting.setblocking(False)
        return Listener(accepting, address)

    monkeypatch.setattr(transport, "listen_socket", listen_over)
    return there
