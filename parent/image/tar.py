"""Tar archives read strictly: container layers, and the archives that container tools save.

Readers of tar disagree about the same bytes: which of two names counts, whether a link may carry data, what follows the
end. An image is measured from what *this* reader sees, and looked at with others; so whatever two readers could see
differently is refused here. The formats are POSIX.1-2017 (ustar, and pax under ``pax``), and GNU's long names and large
numbers. Python's ``tarfile`` is lenient where this must not be (it allocates what a header claims, and skips what it
cannot read).
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from enum import Enum
from typing import BinaryIO, Final

from parent.image.tree import MAX_PATH, ImageBuildError

BLOCK: Final = 512
MAX_PAX_SIZE: Final = 1 << 20
"""Bytes of one member's extended header."""
MAX_MEMBERS: Final = 1_000_000
"""In one archive."""
XATTR: Final = "SCHILY.xattr."
"""What the extended header's names of extended attributes begin with."""
MAX_ATTRIBUTE_NAME: Final = 255
"""Bytes of an extended attribute's name: Linux's XATTR_NAME_MAX."""
MAX_ATTRIBUTES: Final = 64
"""Extended attributes of one member."""

_NAME_SIZE: Final = 100
_POSIX, _GNU, _OLD = b"ustar\x0000", b"ustar  \x00", bytes(8)
_IGNORED: Final = frozenset(
    ("atime", "ctime", "mtime", "uname", "gname", "comment", "charset", "SCHILY.dev", "SCHILY.ino", "SCHILY.nlink")
)
_IGNORED_PREFIX: Final = "LIBARCHIVE."
_TAKEN: Final = frozenset(("path", "linkpath", "size", "uid", "gid"))
_RECORD: Final = re.compile(rb"([1-9][0-9]{0,6}) ")
_DECIMAL: Final = re.compile(r"[0-9]{1,18}")
_OCTAL: Final = re.compile(rb"[ ]*([0-7]*)[ \x00]*")


class Kind(Enum):
    """What a member is; the values are ustar's type flags."""

    FILE = b"0"
    HARD_LINK = b"1"
    SYMLINK = b"2"
    CHAR = b"3"
    BLOCK = b"4"
    DIRECTORY = b"5"
    FIFO = b"6"


@dataclass(frozen=True, slots=True)
class Member:
    """One member. Its data are ``size`` bytes of the archive from ``offset`` on; only a file has any."""

    path: str
    """Relative, without ``.``, ``..`` and empty names; empty for the root itself."""
    kind: Kind
    mode: int
    """Permission bits."""
    uid: int
    gid: int
    size: int
    offset: int
    target: str
    """A symbolic link's as it stands there; a hard link's as a ``path``."""
    major: int
    minor: int
    extended_attributes: tuple[str, ...]
    """Their names."""


def read_members(file: BinaryIO) -> Iterator[Member]:
    """The members of the archive that is all of ``file``, which can seek, in their order.

    Between two of them the file may be moved. Raises ImageBuildError ``malformed_archive``, never anything else but
    what ``file`` raises.
    """
    end = file.seek(0, os.SEEK_END)
    position, count = 0, 0
    extended: dict[str, str] | None = None
    long: dict[bytes, str] = {}
    while True:
        header = _take(file, position, BLOCK, end)
        at, position = position, position + BLOCK
        if not any(header):
            if extended is not None or long:
                raise _malformed(at, "an extended header without its member")
            return _require_zeros(file, position, end)
        fields = _Header(header, at)
        own = fields.number(124, 12, "size") if extended is None or "size" not in extended else int(extended["size"])
        following = position + own + -own % BLOCK
        if following > end:
            raise _malformed(at, "data beyond the archive's end", f"at most {end - position} bytes", own)
        match fields.type:
            case b"x" | b"g":
                records = _pax(_bounded(file, position, own, MAX_PAX_SIZE, at, end), at)
                if fields.type == b"g":
                    if not records.keys() <= _IGNORED:
                        raise _malformed(at, "an extended header for all members that says more than their times")
                elif extended is not None or long:
                    raise _malformed(at, "two extended headers of one member")
                else:
                    extended = records
            case b"L" | b"K":
                if extended is not None or fields.type in long:
                    raise _malformed(at, "two extended headers of one member")
                text = _bounded(file, position, own, MAX_PATH + 1, at, end)
                long[fields.type] = _text(text.removesuffix(b"\0"), at)
            case _:
                count += 1
                if count > MAX_MEMBERS:
                    raise _malformed(at, "too many members", f"at most {MAX_MEMBERS}")
                yield _member(fields, extended or {}, long, own, position)
                extended, long = None, {}
        position = following


class _Header:
    """One block of 512 bytes whose checksum is right."""

    def __init__(self, block: bytes, at: int) -> None:
        self._block, self._at = block, at
        claimed = self.number(148, 8, "checksum")
        if claimed != sum(block) - sum(block[148:156]) + 8 * 0x20:
            raise _malformed(at, "a header with a wrong checksum")
        magic = block[257:265]
        if magic not in (_POSIX, _GNU, _OLD):
            raise _malformed(at, "a format that is not known", "ustar, pax, GNU or V7", ascii(magic))
        self._prefixed = magic == _POSIX
        self.type = block[156:157]

    def number(self, start: int, size: int, what: str) -> int:
        """Octal digits, or GNU's base 256, in which the first byte is 0x80."""
        field = self._block[start : start + size]
        if field[0] == 0x80:
            value = int.from_bytes(field[1:], "big")
            if value >> 63:
                raise _malformed(self._at, f"a {what} that is too large", "63 bits", hex(value))
            return value
        octal = _OCTAL.fullmatch(field)
        if octal is None:
            raise _malformed(self._at, f"a {what} that is no number", "octal digits", ascii(field))
        return int(octal[1] or b"0", 8)

    def text(self, start: int, size: int) -> str:
        return _text(self._block[start : start + size].partition(b"\0")[0], self._at)

    @property
    def name(self) -> str:
        name = self.text(0, _NAME_SIZE)
        prefix = self.text(345, 155) if self._prefixed else ""
        return f"{prefix}/{name}" if prefix else name


def _member(header: _Header, extended: Mapping[str, str], long: Mapping[bytes, str], size: int, offset: int) -> Member:
    at = offset - BLOCK
    name = extended.get("path") or long.get(b"L") or header.name
    target = extended.get("linkpath") or long.get(b"K") or header.text(157, _NAME_SIZE)
    flag = header.type if header.type != b"\0" else b"0"
    if flag == b"0" and name.endswith("/"):
        flag = b"5"  # as V7 has directories
    try:
        kind = Kind(flag)
    except ValueError:
        raise _malformed(at, "a kind of member that has no place in an image", "0 to 6", ascii(flag)) from None
    if size and kind is not Kind.FILE:
        raise _malformed(at, "data in what is no file: some readers skip them, some do not", "0 bytes", size)
    if kind in (Kind.HARD_LINK, Kind.SYMLINK) and not target:
        raise _malformed(at, "a link without a target")
    device = kind in (Kind.CHAR, Kind.BLOCK)
    return Member(
        path=_path(name, at),
        kind=kind,
        mode=header.number(100, 8, "mode") & 0o7777,  # GNU's tar keeps the file's type in the bits above
        uid=_integer(extended, "uid", at, header.number(108, 8, "uid")),
        gid=_integer(extended, "gid", at, header.number(116, 8, "gid")),
        size=size,
        offset=offset,
        target=_path(target, at) if kind is Kind.HARD_LINK else target,
        major=header.number(329, 8, "device number") if device else 0,
        minor=header.number(337, 8, "device number") if device else 0,
        extended_attributes=tuple(sorted(key.removeprefix(XATTR) for key in extended if key.startswith(XATTR))),
    )


def _path(text: str, at: int) -> str:
    """Tools write ``./a``, ``a/`` and, for the root, ``./`` or ``/``; nothing else may stand beside the names."""
    if text.startswith("/") and text != "/":
        raise _malformed(at, "an absolute path", "a path from the root, without / in front", ascii(text)[:100])
    names = [name for name in text.split("/") if name not in ("", ".")]
    if ".." in names or not text:
        raise _malformed(at, "a path that leads out", "names without ..", ascii(text)[:100])
    return "/".join(names)


def _pax(data: bytes, at: int) -> dict[str, str]:
    """Records ``LENGTH KEY=VALUE`` and a newline, each key once, each one known."""
    records: dict[str, str] = {}
    position = 0
    while position < len(data):
        length = _RECORD.match(data, position)
        end = position + int(length[1]) if length else 0
        if length is None or not length.end() < end <= len(data) or data[end - 1 : end] != b"\n":
            raise _malformed(at, "an extended header that is no list of records")
        key, equals, value = data[length.end() : end - 1].partition(b"=")
        name = _text(key, at)
        if not equals or name in records:
            raise _malformed(at, "an extended header with a key without value, or twice", got=ascii(name)[:100])
        attribute = name.startswith(XATTR)
        if len(key) > len(XATTR) + MAX_ATTRIBUTE_NAME:
            raise _malformed(at, "an extended header with a name that is too long", got=ascii(name[:100]))
        if not (attribute or name in _TAKEN or name in _IGNORED or name.startswith(_IGNORED_PREFIX)):
            raise _malformed(at, "an extended header that says what is not known", got=ascii(name)[:100])
        records[name] = "" if attribute else _text(value, at)
        position = end
    if "size" in records:
        records["size"] = str(_integer(records, "size", at, 0))
    if sum(name.startswith(XATTR) for name in records) > MAX_ATTRIBUTES:
        raise _malformed(at, "too many extended attributes", f"at most {MAX_ATTRIBUTES}")
    return {name: value for name, value in records.items() if value or name.startswith(XATTR)}


def _integer(records: Mapping[str, str], key: str, at: int, otherwise: int) -> int:
    text = records.get(key)
    if text is None:
        return otherwise
    if not _DECIMAL.fullmatch(text):
        raise _malformed(at, f"a {key} that is no number", "decimal digits", ascii(text)[:100])
    return int(text)


def _text(data: bytes, at: int) -> str:
    if b"\0" in data:
        raise _malformed(at, "a text with NUL in it, at which some readers stop")
    return data.decode("utf-8", "surrogateescape")


def _bounded(file: BinaryIO, position: int, size: int, most: int, at: int, end: int) -> bytes:
    if size > most:
        raise _malformed(at, "an extended header that is too large", f"at most {most} bytes", size)
    return _take(file, position, size, end)


def _take(file: BinaryIO, position: int, size: int, end: int) -> bytes:
    if position + size > end:
        raise _malformed(position, "the archive ends early", "a block of zeros at its end", f"{end} bytes")
    file.seek(position)
    data = file.read(size)
    if len(data) != size:
        raise _malformed(position, "the archive ends early", f"{size} bytes", len(data))
    return data


def _require_zeros(file: BinaryIO, position: int, end: int) -> None:
    file.seek(position)
    while data := file.read(1 << 16):
        if any(data):
            raise _malformed(position, "something follows the archive's end", "zeros", "other bytes")
    if end % BLOCK:
        raise _malformed(end, "the archive ends within a block", f"a multiple of {BLOCK} bytes", end)


def _malformed(at: int, message: str, expected: object | None = None, got: object | None = None) -> ImageBuildError:
    return ImageBuildError("malformed_archive", f"tar, at byte {at}: {message}", expected=expected, got=got)
