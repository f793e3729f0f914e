"""Addresses of stream endpoints: ``vsock:CID:PORT``, ``unix:PATH``, ``tcp:HOST:PORT``. PROTOCOL.md section 5.

Parsing and ``str`` are inverse to each other: every address has one spelling.
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from typing import TypeAlias

from vsockrpc.errors import AddressError

VMADDR_CID_ANY = 0xFFFF_FFFF
UNIX_PATH_LIMIT = 107
"""Bytes of a Unix socket's path: ``sun_path`` in Linux's ``sockaddr_un`` is 108, one of them the terminating zero."""
_MAX_HOST = 253
"""Characters of a host name, RFC 1035 section 2.3.4."""
_NUMBER = re.compile(r"0|[1-9][0-9]{0,9}", re.ASCII)
_HOST = re.compile(r"[A-Za-z0-9._-]+|\[[0-9A-Fa-f.]*:[0-9A-Fa-f:.]*(%[A-Za-z0-9._-]+)?\]", re.ASCII)


@dataclass(frozen=True, slots=True)
class VsockAddress:
    """A VM's context identifier and port. CID 2 is the parent; ``VMADDR_CID_ANY``, written ``any``, is for
    listening.
    """

    cid: int
    port: int

    def __post_init__(self) -> None:
        _check_range("vsock CID", self.cid, 1, VMADDR_CID_ANY)
        _check_range("vsock port", self.port, 1, 0xFFFF_FFFE)

    def __str__(self) -> str:
        return f"vsock:{'any' if self.cid == VMADDR_CID_ANY else self.cid}:{self.port}"


@dataclass(frozen=True, slots=True)
class UnixAddress:
    """A socket in the file system. ``path`` may be relative; the abstract namespace, which has no permissions, is
    not offered.
    """

    path: str

    def __post_init__(self) -> None:
        if not self.path or "\0" in self.path:
            raise AddressError("a Unix socket needs a path without NUL", got=ascii(self.path))
        try:
            size = len(os.fsencode(self.path))
        except UnicodeEncodeError as error:
            raise AddressError("the path of a Unix socket has no encoding here", got=ascii(self.path)) from error
        if size > UNIX_PATH_LIMIT:
            raise AddressError(
                "the path of a Unix socket is too long", expected=f"at most {UNIX_PATH_LIMIT} bytes", got=size
            )

    def __str__(self) -> str:
        return f"unix:{self.path}"


@dataclass(frozen=True, slots=True)
class TcpAddress:
    """A host name or literal address, and a port. IPv6 literals are written in brackets; ``host`` holds them without.

    Port 0 lets the system choose when listening.
    """

    host: str
    port: int

    def __post_init__(self) -> None:
        written = f"[{self.host}]" if ":" in self.host else self.host
        if len(self.host) > _MAX_HOST or not _HOST.fullmatch(written):
            raise AddressError("no host name or address", expected="a name, IPv4 or [IPv6]", got=ascii(self.host))
        _check_range("TCP port", self.port, 0, 0xFFFF)

    def __str__(self) -> str:
        return f"tcp:[{self.host}]:{self.port}" if ":" in self.host else f"tcp:{self.host}:{self.port}"


Address: TypeAlias = VsockAddress | UnixAddress | TcpAddress


def parse_address(text: str) -> Address:
    """The address that ``text`` spells. Raises AddressError."""
    scheme, colon, rest = text.partition(":")
    if colon:
        match scheme:
            case "vsock":
                cid, _, port = rest.partition(":")
                return VsockAddress(
                    VMADDR_CID_ANY if cid == "any" else _number("vsock CID", cid, below=VMADDR_CID_ANY),
                    _number("vsock port", port),
                )
            case "unix":
                return UnixAddress(rest)
            case "tcp":
                host, _, port = rest.rpartition(":")
                if not _HOST.fullmatch(host):
                    raise AddressError("no host name or address", expected="a name, IPv4 or [IPv6]", got=ascii(host))
                return TcpAddress(host.removeprefix("[").removesuffix("]"), _number("TCP port", port))
    raise AddressError("not an address", expected="vsock:CID:PORT, unix:PATH or tcp:HOST:PORT", got=ascii(text))


def _number(what: str, text: str, *, below: int = 1 << 32) -> int:
    if not _NUMBER.fullmatch(text) or int(text) >= below:
        raise AddressError(f"no {what}", expected=f"a decimal number below {below}", got=ascii(text))
    return int(text)


def _check_range(what: str, value: int, low: int, high: int) -> None:
    if not low <= value <= high:
        raise AddressError(f"{what} out of range", expected=f"{low}..{high}", got=value)
