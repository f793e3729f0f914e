"""The client of the Nitro Secure Module: seven requests over the device's ioctl or, emulated, over a socket.

The bytes are those of AWS's ``aws-nitro-enclaves-nsm-api`` (serde's externally tagged CBOR): a request or response
without fields is a bare text string, any other a map of one entry. On a socket each message is ``u32 big-endian length
|| CBOR``, one request a connection.

The API blocks; a server calls it on a thread. One :class:`Nsm` may be used by several threads: the module serialises
requests itself.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
import socket
import struct
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from enum import StrEnum
from io import BytesIO
from typing import Protocol, Self, TypeVar

import cbor2

from attestation.errors import StrongroomError
from attestation.reference import DIGEST_SIZE
from vsockrpc.address import Address, TcpAddress, UnixAddress, VsockAddress, parse_address

MAX_REQUEST = 0x1000
"""Bytes: the driver answers EMSGSIZE above."""
MAX_RESPONSE = 0x3000
"""Bytes of the response buffer."""
MAX_FIELD = 1024
"""Bytes of ``user_data``, ``nonce`` and ``public_key`` each: the document's CDDL. The module itself lets more pass,
verifiers do not."""
MAX_MODULE_ID = 100
"""Bytes: the buffer that AWS's libnsm has for it."""
PCRS = 32

NSM_IOCTL_RAW = 0xC020_0A00
"""``_IOWR(0x0A, 0, struct nsm_raw)``."""
NSM_RAW = struct.Struct("QQQQ")
"""``struct nsm_raw``: address and length of the request, address and length of the response."""

_TIMEVAL = struct.Struct("ll")

_T = TypeVar("_T")


class NsmErrorCode(StrEnum):
    """What the module answers instead of a result; the names on the wire, and :attr:`NsmError.code`."""

    INVALID_ARGUMENT = "InvalidArgument"
    INVALID_INDEX = "InvalidIndex"
    INVALID_RESPONSE = "InvalidResponse"
    READ_ONLY_INDEX = "ReadOnlyIndex"
    INVALID_OPERATION = "InvalidOperation"
    BUFFER_TOO_SMALL = "BufferTooSmall"
    INPUT_TOO_LARGE = "InputTooLarge"
    INTERNAL_ERROR = "InternalError"


_CODES = frozenset(NsmErrorCode)


class NsmError(StrongroomError):
    """The module refused, or its answer cannot be used. As in AWS's library, an answer that does not decode is
    ``InternalError`` and a well-formed answer to something else ``InvalidResponse``."""


class NsmUnavailable(NsmError):
    """No module at the address, or it went away in the middle of a request (code ``nsm_unavailable``).

    Whether the request took effect is unknown, so it is never sent a second time: extending a register twice is not
    extending it once.
    """

    def __init__(self, message: str) -> None:
        super().__init__("nsm_unavailable", message)


@dataclass(frozen=True, slots=True)
class NsmDescription:
    version_major: int
    version_minor: int
    version_patch: int
    module_id: str
    max_pcrs: int
    locked_pcrs: tuple[int, ...]
    digest: str


@dataclass(frozen=True, slots=True)
class PcrDescription:
    lock: bool
    data: bytes


class Transport(Protocol):
    """Carries one request to the module and its response back, both as raw CBOR of at most MAX_REQUEST and MAX_RESPONSE
    bytes."""

    def exchange(self, request: bytes) -> bytes: ...

    def close(self) -> None: ...


class Nsm:
    """The module's seven requests. Each raises :class:`NsmError`."""

    def __init__(self, transport: Transport) -> None:
        self.transport = transport

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        self.transport.close()

    def describe_nsm(self) -> NsmDescription:
        fields = self._call("DescribeNSM")
        return NsmDescription(
            version_major=fields.u16("version_major"),
            version_minor=fields.u16("version_minor"),
            version_patch=fields.u16("version_patch"),
            module_id=fields.text("module_id", MAX_MODULE_ID),
            max_pcrs=fields.u16("max_pcrs"),
            locked_pcrs=fields.u16s("locked_pcrs"),
            digest=fields.text("digest", 16),
        )

    def get_random(self) -> bytes:
        """256 bytes from AWS's module; at least one here."""
        return self._call("GetRandom").data("random", 1, MAX_RESPONSE)

    def describe_pcr(self, index: int) -> PcrDescription:
        fields = self._call("DescribePCR", {"index": _u16(index)})
        return PcrDescription(fields.boolean("lock"), fields.data("data", DIGEST_SIZE, DIGEST_SIZE))

    def extend_pcr(self, index: int, data: bytes) -> bytes:
        """The register's new value, ``SHA-384(old || data)``. ``ReadOnlyIndex`` when it is locked."""
        return self._call("ExtendPCR", {"index": _u16(index), "data": data}).data("data", DIGEST_SIZE, DIGEST_SIZE)

    def lock_pcr(self, index: int) -> None:
        """``ReadOnlyIndex`` when it is locked already."""
        self._call("LockPCR", {"index": _u16(index)})

    def lock_pcrs(self, count: int) -> None:
        """Locks the registers below ``count`` (the request's ``range``), those already locked included."""
        self._call("LockPCRs", {"range": _u16(count)})

    def attestation(
        self, *, user_data: bytes | None = None, nonce: bytes | None = None, public_key: bytes | None = None
    ) -> bytes:
        """A fresh signed document over these fields, of at most :data:`MAX_FIELD` bytes each, and the *locked*
        registers."""
        arguments = {"user_data": user_data, "nonce": nonce, "public_key": public_key}
        for name, value in arguments.items():
            if value is not None and len(value) > MAX_FIELD:
                raise NsmError(
                    NsmErrorCode.INPUT_TOO_LARGE,
                    f"{name} is too long for an attestation document",
                    expected=f"at most {MAX_FIELD} bytes",
                    got=len(value),
                )
        return self._call("Attestation", arguments).data("document", 1, MAX_RESPONSE)

    def _call(self, request: str, arguments: Mapping[str, int | bytes | None] | None = None) -> Fields:
        encoded = encode_request(request, arguments)
        if len(encoded) > MAX_REQUEST:
            raise NsmError(
                NsmErrorCode.INPUT_TOO_LARGE,
                f"the NSM request {request} is too long",
                expected=f"at most {MAX_REQUEST} bytes",
                got=len(encoded),
            )
        return decode_response(request, self.transport.exchange(encoded))


# --- Codec -------------------------------------------------------------------------------------------------------


def encode_request(request: str, arguments: Mapping[str, int | bytes | None] | None = None) -> bytes:
    """A request's CBOR: fields in the order given, None as null."""
    return cbor2.dumps(request if arguments is None else {request: dict(arguments)})


def decode_response(request: str, response: bytes) -> Fields:
    """The fields of a response to ``request``; raises the :class:`NsmError` that it carries or that it is."""
    stream = BytesIO(response)
    try:
        value = cbor2.CBORDecoder(stream, allow_duplicate_keys=False, max_depth=4).decode()
    except cbor2.CBORDecodeError as error:
        raise _undecodable(request, "it is no CBOR") from error
    if stream.tell() != len(response):
        raise _undecodable(request, "bytes follow it")
    name: object
    content: object
    if isinstance(value, str):
        name, content = value, {}
    elif isinstance(value, dict) and len(value) == 1:
        ((name, content),) = value.items()
    else:
        raise _undecodable(request, "it has another shape")
    if name == "Error":
        raise _refusal(request, content)
    if name != request:
        raise NsmError(
            NsmErrorCode.INVALID_RESPONSE, "the NSM answered another request", expected=request, got=repr(name)[:40]
        )
    if not isinstance(content, dict):
        raise _undecodable(request, "it has another shape")
    return Fields(request, content)


class Fields:
    """A response's fields, each read with its type and bounds. Further fields are ignored, as AWS's own library
    does."""

    def __init__(self, request: str, fields: Mapping[object, object]) -> None:
        self._request = request
        self._fields = fields

    def u16(self, name: str) -> int:
        return self._checked_u16(name, self._get(name, int))

    def u16s(self, name: str) -> tuple[int, ...]:
        items = self._get(name, list)
        if len(items) > PCRS:
            raise _undecodable(self._request, f"{name} is too long")
        return tuple(self._checked_u16(name, item) for item in items)

    def text(self, name: str, longest: int) -> str:
        text = self._get(name, str)
        if not 1 <= len(text) <= longest:
            raise _undecodable(self._request, f"{name} has the wrong length")
        return text

    def data(self, name: str, shortest: int, longest: int) -> bytes:
        data = self._get(name, bytes)
        if not shortest <= len(data) <= longest:
            raise _undecodable(self._request, f"{name} has the wrong length")
        return data

    def boolean(self, name: str) -> bool:
        return self._get(name, bool)

    def _get(self, name: str, kind: type[_T]) -> _T:
        value = self._fields.get(name)
        if type(value) is not kind:  # not isinstance: a bool is an int
            raise _undecodable(self._request, f"{name} is missing or of another type")
        return value

    def _checked_u16(self, name: str, value: object) -> int:
        if type(value) is not int or not 0 <= value <= 0xFFFF:
            raise _undecodable(self._request, f"{name} is out of range")
        return value


def _u16(value: int) -> int:
    if not 0 <= value <= 0xFFFF:
        raise NsmError(
            NsmErrorCode.INVALID_ARGUMENT, "the NSM's numbers are of 16 bits", expected="0..65535", got=value
        )
    return value


def _undecodable(request: str, why: str) -> NsmError:
    return NsmError(NsmErrorCode.INTERNAL_ERROR, f"the NSM's answer to {request} cannot be read: {why}")


def _refusal(request: str, code: object) -> NsmError:
    if not isinstance(code, str) or code not in _CODES:
        return _undecodable(request, "its error code is unknown")
    return NsmError(code, f"the NSM refused {request}")


# --- Transports --------------------------------------------------------------------------------------------------

Ioctl = Callable[[int, int, bytearray], int]


class DeviceTransport:
    """``/dev/nsm``: one ioctl a request, which passes the addresses of two buffers. ``ioctl`` is :func:`fcntl.ioctl` or
    a stand-in."""

    def __init__(self, path: str = "/dev/nsm", *, ioctl: Ioctl = fcntl.ioctl) -> None:
        """Raises :class:`NsmUnavailable` when the device cannot be opened."""
        self._ioctl = ioctl
        try:
            self._descriptor = os.open(path, os.O_RDWR | os.O_CLOEXEC)
        except OSError as error:
            raise NsmUnavailable(f"cannot open the NSM at {path}: {error.strerror}") from error

    def keep_from_others(self) -> None:
        """From here on only this process's user can open the device, whatever made it: mode 0600. A document that the
        engine could ask for would speak for the enclave. Raises :class:`NsmUnavailable`.
        """
        try:
            os.fchown(self._descriptor, os.geteuid(), os.getegid())
            os.fchmod(self._descriptor, 0o600)
        except OSError as error:
            raise NsmUnavailable(f"the NSM's device cannot be kept from other users: {error.strerror}") from error

    def exchange(self, request: bytes) -> bytes:
        if self._descriptor < 0:
            raise NsmUnavailable("the NSM's device was closed")
        sent = ctypes.create_string_buffer(request, max(len(request), 1))
        received = ctypes.create_string_buffer(MAX_RESPONSE)
        raw = bytearray(NSM_RAW.pack(ctypes.addressof(sent), len(request), ctypes.addressof(received), MAX_RESPONSE))
        try:
            self._ioctl(self._descriptor, NSM_IOCTL_RAW, raw)
        except OSError as error:
            if error.errno == errno.EMSGSIZE:
                raise NsmError(NsmErrorCode.INPUT_TOO_LARGE, "the NSM's driver refused the request's size") from error
            raise NsmError(NsmErrorCode.INTERNAL_ERROR, f"the NSM's driver failed: {error.strerror}") from error
        *_, length = NSM_RAW.unpack(raw)
        if length > MAX_RESPONSE:
            raise NsmError(
                NsmErrorCode.INTERNAL_ERROR,
                "the NSM's driver claims to have written past the buffer",
                expected=f"at most {MAX_RESPONSE} bytes",
                got=length,
            )
        return received.raw[:length]

    def close(self) -> None:
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1


class SocketTransport:
    """A software NSM behind a stream socket. Each request has a connection of its own, so a module that was restarted
    is found again.

    ``timeout``: seconds for one request, from connecting to the last byte of the response.
    """

    def __init__(self, address: Address, *, timeout: float = 20.0) -> None:
        self._address = address
        self._timeout = timeout

    def exchange(self, request: bytes) -> bytes:
        deadline = time.monotonic() + self._timeout
        try:
            with _connected(self._address, self._timeout) as connection:
                connection.settimeout(_left(deadline))
                connection.sendall(len(request).to_bytes(4) + request)
                length = int.from_bytes(_received(connection, 4, deadline))
                if length > MAX_RESPONSE:
                    raise NsmError(
                        NsmErrorCode.INTERNAL_ERROR,
                        "the software NSM announced too long an answer",
                        expected=f"at most {MAX_RESPONSE} bytes",
                        got=length,
                    )
                return _received(connection, length, deadline)
        except TimeoutError as error:
            raise NsmUnavailable(f"the NSM at {self._address} did not answer within {self._timeout:g} s") from error
        except OSError as error:
            raise NsmUnavailable(f"no NSM at {self._address}: {error.strerror or error}") from error

    def close(self) -> None:
        """Nothing is kept between requests."""


def _connected(address: Address, timeout: float) -> socket.socket:
    target: str | tuple[int, int]
    match address:
        case TcpAddress(host, port):
            return socket.create_connection((host, port), timeout)
        case UnixAddress(path):
            family, target = socket.AF_UNIX, path
        case VsockAddress(cid, port):
            family, target = socket.AF_VSOCK, (cid, port)
    connection = socket.socket(family, socket.SOCK_STREAM)
    try:
        if family == socket.AF_UNIX:
            # With Python's own timeout the socket does not block, and a full backlog is an error at once (unix(7)).
            seconds, rest = divmod(timeout, 1)
            connection.setsockopt(
                socket.SOL_SOCKET, socket.SO_SNDTIMEO, _TIMEVAL.pack(int(seconds), int(rest * 1e6) + 1)
            )
        else:
            connection.settimeout(timeout)
        connection.connect(target)
    except BlockingIOError as error:
        connection.close()
        raise TimeoutError from error
    except OSError:
        connection.close()
        raise
    return connection


def _received(connection: socket.socket, length: int, deadline: float) -> bytes:
    """Exactly ``length`` bytes, which the caller has bounded."""
    received = bytearray()
    while len(received) < length:
        connection.settimeout(_left(deadline))
        chunk = connection.recv(length - len(received))
        if not chunk:
            raise ConnectionResetError(errno.ECONNRESET, "it closed the connection in the middle of an answer")
        received += chunk
    return bytes(received)


def _left(deadline: float) -> float:
    left = deadline - time.monotonic()
    if left <= 0:
        raise TimeoutError
    return left


def open_nsm(address: str, *, timeout: float = 20.0) -> Nsm:
    """The NSM at ``device:PATH``, ``unix:PATH``, ``vsock:CID:PORT`` or ``tcp:HOST:PORT``.

    Raises the address's own error for a text that is none, and :class:`NsmUnavailable` for a device that cannot be
    opened. A socket is not tried before the first request. ``timeout`` is in seconds, for one request over a socket;
    the driver has its own of 120 s.
    """
    scheme, _, path = address.partition(":")
    if scheme == "device":
        return Nsm(DeviceTransport(path))
    return Nsm(SocketTransport(parse_address(address), timeout=timeout))
