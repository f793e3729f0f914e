"""How requests travel: the ioctl's structure and errors, and a socket whose other end may do anything."""

from __future__ import annotations

import ctypes
import errno
import os
import socket
import struct
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import cbor2
import pytest

from enclave.nsm import (
    MAX_RESPONSE,
    DeviceTransport,
    Nsm,
    NsmError,
    NsmErrorCode,
    NsmUnavailable,
    SocketTransport,
    open_nsm,
)
from vsockrpc.address import TcpAddress, UnixAddress

LOCKED = cbor2.dumps("LockPCR")


class Ioctl:
    """A driver that keeps what it was given, and answers or fails as told."""

    def __init__(self, response: bytes = LOCKED, *, claims: int | None = None, fails: int | None = None) -> None:
        self.response = response
        self.claims = len(response) if claims is None else claims
        self.fails = fails
        self.calls: list[tuple[int, int, bytes, int]] = []

    def __call__(self, descriptor: int, command: int, argument: bytearray) -> int:
        request_at, request_length, response_at, capacity = struct.unpack("=QQQQ", argument)
        self.calls.append((descriptor, command, ctypes.string_at(request_at, request_length), capacity))
        if self.fails is not None:
            raise OSError(self.fails, os.strerror(self.fails))
        ctypes.memmove(response_at, self.response, len(self.response))
        argument[24:32] = self.claims.to_bytes(8, sys.byteorder)
        return 0


def device(ioctl: Ioctl) -> Nsm:
    return Nsm(DeviceTransport("/dev/null", ioctl=ioctl))


def test_ioctl_passes_both_buffers_by_address() -> None:
    ioctl = Ioctl()
    with device(ioctl) as nsm:
        nsm.lock_pcr(17)
    ((descriptor, command, request, capacity),) = ioctl.calls
    assert descriptor > 2
    assert command == 0xC0200A00
    assert request == b"\xa1\x67LockPCR\xa1\x65index\x11"
    assert capacity == 0x3000


def test_ioctl_answer_is_as_long_as_the_driver_says() -> None:
    with device(Ioctl(LOCKED + b"left from an earlier answer", claims=len(LOCKED))) as nsm:
        nsm.lock_pcr(17)


@pytest.mark.parametrize(
    ("number", "code"),
    [
        (errno.EMSGSIZE, NsmErrorCode.INPUT_TOO_LARGE),
        (errno.EINVAL, NsmErrorCode.INTERNAL_ERROR),
        (errno.ETIMEDOUT, NsmErrorCode.INTERNAL_ERROR),
        (errno.EFAULT, NsmErrorCode.INTERNAL_ERROR),
    ],
)
def test_ioctl_errno(number: int, code: NsmErrorCode) -> None:
    with device(Ioctl(fails=number)) as nsm, pytest.raises(NsmError) as raised:
        nsm.lock_pcr(17)
    assert raised.value.code == code


def test_ioctl_that_claims_more_than_the_buffer() -> None:
    with device(Ioctl(claims=MAX_RESPONSE + 1)) as nsm, pytest.raises(NsmError) as raised:
        nsm.lock_pcr(17)
    assert raised.value.code == NsmErrorCode.INTERNAL_ERROR


def test_ioctl_answer_cut_off_by_the_buffer() -> None:
    """The driver copies what fits and says nothing: the rest is missing, so the answer cannot be read."""
    whole = cbor2.dumps({"Attestation": {"document": bytes(MAX_RESPONSE)}})
    with device(Ioctl(whole[:MAX_RESPONSE])) as nsm, pytest.raises(NsmError) as raised:
        nsm.attestation()
    assert raised.value.code == NsmErrorCode.INTERNAL_ERROR


def test_no_device(tmp_path: Path) -> None:
    with pytest.raises(NsmUnavailable) as raised:
        open_nsm(f"device:{tmp_path / 'nsm'}")
    assert raised.value.code == "nsm_unavailable"


@pytest.mark.parametrize("mode", [0o666, 0o660, 0o600, 0o444])
def test_a_device_is_kept_from_others(tmp_path: Path, mode: int) -> None:
    path = tmp_path / "nsm"
    path.touch()
    path.chmod(mode)
    if os.geteuid() != 0 and not mode & 0o200:
        pytest.skip("only root opens this")
    transport = DeviceTransport(str(path))
    transport.keep_from_others()
    transport.close()
    assert path.stat().st_mode & 0o7777 == 0o600
    assert path.stat().st_uid == os.geteuid()


def test_a_device_that_cannot_be_kept_from_others() -> None:
    transport = DeviceTransport("/dev/null")
    transport.close()
    with pytest.raises(NsmUnavailable, match="cannot be kept from other users"):
        transport.keep_from_others()


def test_closing_twice_is_closing_once() -> None:
    nsm = device(Ioctl())
    nsm.close()
    nsm.close()
    with pytest.raises(NsmUnavailable):
        nsm.lock_pcr(17)


def test_device_that_is_no_nsm() -> None:
    """The real ioctl: /dev/null knows none."""
    with open_nsm("device:/dev/null") as nsm, pytest.raises(NsmError) as raised:
        nsm.get_random()
    assert raised.value.code == NsmErrorCode.INTERNAL_ERROR


# --- Sockets -----------------------------------------------------------------------------------------------------

Behaviour = Callable[[socket.socket], None]


def read_request(connection: socket.socket) -> bytes:
    head = connection.recv(4, socket.MSG_WAITALL)
    return connection.recv(int.from_bytes(head), socket.MSG_WAITALL)


def answers(raw: bytes) -> Behaviour:
    def behave(connection: socket.socket) -> None:
        read_request(connection)
        connection.sendall(raw)

    return behave


@pytest.fixture
def peer(tmp_path: Path) -> Iterator[Callable[..., SocketTransport]]:
    """Starts a peer that treats each connection as the next behaviour in its list says."""
    threads: list[threading.Thread] = []
    listeners: list[socket.socket] = []

    def start(*behaviours: Behaviour, timeout: float = 10.0) -> SocketTransport:
        path = tmp_path / f"{len(listeners)}.sock"
        listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        listener.bind(str(path))
        listener.listen()

        def serve() -> None:
            for behave in behaviours:
                connection, _ = listener.accept()
                with connection:
                    behave(connection)

        thread = threading.Thread(target=serve)
        thread.start()
        threads.append(thread)
        listeners.append(listener)
        return SocketTransport(UnixAddress(str(path)), timeout=timeout)

    yield start
    for thread in threads:
        thread.join(30)
        assert not thread.is_alive()
    for listener in listeners:
        listener.close()


def framed(content: bytes) -> bytes:
    return len(content).to_bytes(4) + content


def test_socket_frames_both_ways(peer: Callable[..., SocketTransport]) -> None:
    asked: list[bytes] = []

    def behave(connection: socket.socket) -> None:
        asked.append(read_request(connection))
        for byte in framed(LOCKED):
            connection.sendall(bytes([byte]))

    Nsm(peer(behave)).lock_pcr(16)
    assert asked == [b"\xa1\x67LockPCR\xa1\x65index\x10"]


def test_socket_that_announces_too_long_an_answer(peer: Callable[..., SocketTransport]) -> None:
    for length in (MAX_RESPONSE + 1, 0xFFFF_FFFF):
        with pytest.raises(NsmError) as raised:
            Nsm(peer(answers(length.to_bytes(4)))).get_random()
        assert raised.value.code == NsmErrorCode.INTERNAL_ERROR


def test_socket_answer_that_is_no_cbor(peer: Callable[..., SocketTransport]) -> None:
    for content in (b"", b"\xff", b"HTTP/1.1 400 Bad Request"):
        with pytest.raises(NsmError) as raised:
            Nsm(peer(answers(framed(content)))).get_random()
        assert raised.value.code == NsmErrorCode.INTERNAL_ERROR


@pytest.mark.parametrize("sent", [b"", b"\x00\x00", framed(LOCKED)[:-1]])
def test_socket_closed_in_the_middle_then_found_again(peer: Callable[..., SocketTransport], sent: bytes) -> None:
    nsm = Nsm(peer(answers(sent), answers(framed(LOCKED))))
    with pytest.raises(NsmUnavailable):
        nsm.lock_pcr(16)
    nsm.lock_pcr(16)


def test_socket_that_never_answers(peer: Callable[..., SocketTransport]) -> None:
    gone = threading.Event()

    def behave(connection: socket.socket) -> None:
        read_request(connection)
        assert connection.recv(1) == b""  # the client gives up and closes
        gone.set()

    with pytest.raises(NsmUnavailable, match="did not answer"):
        Nsm(peer(behave, timeout=0.05)).get_random()
    assert gone.wait(30)


def test_socket_that_drips_without_end(peer: Callable[..., SocketTransport]) -> None:
    """The deadline is for the whole exchange: each byte alone comes in time."""

    def behave(connection: socket.socket) -> None:
        try:
            read_request(connection)
            connection.sendall(MAX_RESPONSE.to_bytes(4))
            while True:
                connection.sendall(b"\x00")
                threading.Event().wait(0.01)
        except OSError:
            return

    with pytest.raises(NsmUnavailable, match="did not answer"):
        Nsm(peer(behave, timeout=0.1)).get_random()


def test_socket_with_nobody_behind_it(tmp_path: Path) -> None:
    with pytest.raises(NsmUnavailable) as raised:
        open_nsm(f"unix:{tmp_path / 'absent.sock'}").get_random()
    assert "absent.sock" in raised.value.message


def test_socket_with_a_full_backlog_is_waited_for(tmp_path: Path) -> None:
    with ExitStack() as stack:
        listener = stack.enter_context(socket.socket(socket.AF_UNIX, socket.SOCK_STREAM))
        listener.bind(str(tmp_path / "nsm.sock"))
        listener.listen(0)
        waiting = stack.enter_context(socket.socket(socket.AF_UNIX, socket.SOCK_STREAM))
        waiting.connect(str(tmp_path / "nsm.sock"))
        with pytest.raises(NsmUnavailable, match="did not answer"):
            open_nsm(f"unix:{tmp_path / 'nsm.sock'}", timeout=0.05).get_random()

        def serve() -> None:
            for _ in range(2):
                connection, _address = listener.accept()
                with connection:
                    if connection.recv(1, socket.MSG_PEEK):
                        answers(framed(LOCKED))(connection)

        waiting.shutdown(socket.SHUT_WR)
        thread = threading.Thread(target=serve)
        thread.start()
        open_nsm(f"unix:{tmp_path / 'nsm.sock'}").lock_pcr(16)
        thread.join(30)


def test_socket_over_tcp() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def serve() -> None:
            connection, _ = listener.accept()
            with connection:
                answers(framed(LOCKED))(connection)

        thread = threading.Thread(target=serve)
        thread.start()
        Nsm(SocketTransport(TcpAddress("127.0.0.1", listener.getsockname()[1]))).lock_pcr(16)
        thread.join(30)


def test_socket_over_vsock_without_a_peer() -> None:
    try:
        socket.socket(socket.AF_VSOCK, socket.SOCK_STREAM).close()
    except OSError:
        pytest.skip("no vsock on this machine")
    with pytest.raises(NsmUnavailable):
        open_nsm("vsock:1:4294967294", timeout=1.0).get_random()
