"""Ramdisks: the files in an enclave image, read as Linux unpacks them, and more strictly.

A ramdisk is one cpio archive after another (``newc``; Linux, driver-api/early-userspace/buffer-format.rst), each plain
or within gzip, with zeros between. Everything is read once, a piece at a time; what a header claims is never allocated.
What Linux would skip, guess at or stop at without a word is an ImageError here: a file that nobody sees in
the list must not be there at the start either.
"""

from __future__ import annotations

import re
import stat
import zlib
from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from enum import StrEnum
from typing import Final, Protocol

from attestation.eif import ImageError

PIECE_SIZE: Final = 256 << 10
"""Bytes that are read, and that a file's content comes in, at most."""
MAX_ENTRIES: Final = 1 << 18
"""Files, folders and the rest, of all ramdisks of one image."""
MAX_NAMES: Final = 64 << 20
"""Bytes of the paths and the links' targets of all of them together: what a list of them holds in memory."""
MAX_NAME: Final = 4096
"""Bytes of a path or of a link's target, with the final NUL: Linux's PATH_MAX."""
MAX_PART: Final = 255
"""Bytes of a name between two slashes: Linux's NAME_MAX."""
MAX_UNPACKED: Final = 1 << 36
"""Bytes that one ramdisk may come to: 64 GiB. A gzip stream can be a thousandth of what it claims to hold."""

HEADER_SIZE: Final = 110
TRAILER: Final = b"TRAILER!!!"
"""The name that ends an archive."""
_MAGIC, _MAGIC_WITH_SUM = b"070701", b"070702"
_GZIP: Final = b"\x1f\x8b"
_ALIGNMENT: Final = 4
_FIELDS: Final = re.compile(rb"[0-9A-Fa-f]{104}")
_OTHERS: Final = {
    b"\xfd7zXZ\x00": "xz",
    b"\x28\xb5\x2f\xfd": "zstd",
    b"BZh": "bzip2",
    b"\x02\x21\x4c\x18": "lz4",
    b"\x5d\x00\x00": "lzma",
    b"\x89LZO": "lzo",
}
"""By their first bytes, what Linux may also take and no builder of enclaves writes."""


class RamdiskError(ImageError):
    """A ramdisk that cannot be listed, or that lists what nobody should unpack.

    Codes: ``unknown_ramdisk``, ``truncated_ramdisk``, ``malformed_ramdisk``, ``malformed_gzip``, ``unsafe_path``,
    ``ramdisk_too_large``. Within gzip ``offset`` is where the compressed data begin in the file, and the text says at
    which byte of what they unpack to.
    """


class Kind(StrEnum):
    """What an entry is."""

    FILE = "file"
    DIRECTORY = "directory"
    SYMLINK = "symlink"
    CHARACTER_DEVICE = "character device"
    BLOCK_DEVICE = "block device"
    FIFO = "fifo"
    SOCKET = "socket"


_KINDS: Final = {
    stat.S_IFREG: Kind.FILE,
    stat.S_IFDIR: Kind.DIRECTORY,
    stat.S_IFLNK: Kind.SYMLINK,
    stat.S_IFCHR: Kind.CHARACTER_DEVICE,
    stat.S_IFBLK: Kind.BLOCK_DEVICE,
    stat.S_IFIFO: Kind.FIFO,
    stat.S_IFSOCK: Kind.SOCKET,
}


@dataclass(frozen=True, slots=True)
class RamdiskEntry:
    """One entry of an archive, as its header has it."""

    path: str
    """Relative to the root, without ``.`` and ``..``; the root itself is empty. UTF-8, else by ``surrogateescape``."""
    kind: Kind
    """What it is."""
    mode: int
    """Permissions, set-user-id, set-group-id and sticky: 12 bits."""
    uid: int
    """The number of the owner, 32 bits."""
    gid: int
    """The number of the group, 32 bits."""
    mtime: int
    """Seconds since 1970."""
    size: int
    """Bytes of content; of a link those of its target."""
    device: tuple[int, int] | None
    """Major and minor number, 32 bits each, of what a device stands for."""
    target: str | None
    """Where a symbolic link leads, as ``path`` is encoded."""
    links: int
    """The number of names that the file has. Of several, all but one have no content."""
    inode: tuple[int, int, int]
    """Number, and major and minor device number, 32 bits each: names with the same, in one archive, are one file."""
    archive: int
    """The number of the archive within the ramdisk, from 0."""


class Unpacking:
    """What the ramdisks of one image make when Linux unpacks them one over the other: their readers share one.

    Linux (init/initramfs.c) says nothing of an entry for which there is no folder, goes through a link on its way, and
    of two with one name keeps the first or the last, by their kinds. Here each of these is wrong.
    """

    def __init__(self) -> None:
        """Of an empty root."""
        self._kinds = {"": Kind.DIRECTORY}
        self.entries = 0
        """The number of files, folders and the rest."""
        self.names = 0
        """Bytes of their paths, each with its NUL, and of the links' targets."""
        self.size = 0
        """Bytes of the ramdisks that are being read or were: Linux has them one behind the other."""

    def kind(self, path: str) -> Kind | None:
        """What is at ``path``, as in :class:`RamdiskEntry`, by now; None: nothing."""
        return self._kinds.get(path)

    def place(self, path: str, kind: Kind) -> str:
        """The next entry. Returns what is wrong with its place; nothing where Linux makes it as its header says."""
        folder = self._kinds.get(path.rpartition("/")[0])
        if folder is None:
            return "in a folder that does not come before it"
        if folder is not Kind.DIRECTORY:
            return f"within a {folder}"
        before = self._kinds.get(path)
        if before is not None and not before is kind is Kind.DIRECTORY:
            return f"of a name that a {before} has already"
        self._kinds[path] = kind
        return ""


class Readable(Protocol):
    """A file, as far as one is needed here."""

    def read(self, size: int, /) -> bytes:
        """At most ``size`` bytes; none at the end."""


class RamdiskReader:
    """Iterates over the entries of one ramdisk, in their order. :meth:`content` is that of the entry that came last.

    What is raised on the way is :class:`RamdiskError`, and what ``file.read`` raises.
    """

    def __init__(self, file: Readable, size: int, *, offset: int = 0, unpacking: Unpacking | None = None) -> None:
        """``size`` bytes from ``file``'s position on are the ramdisk, which begins at ``offset`` of the image.

        ``unpacking`` is what the ramdisks before it made; None: there are none.
        """
        self._unpacking = Unpacking() if unpacking is None else unpacking
        self._stream = _Stream(file, size, offset, self._unpacking.size)
        self._unpacking.size += size
        self._content: Iterator[bytes] = iter(())
        self._entries = self._read()
        self._archives = 0

    def __iter__(self) -> Iterator[RamdiskEntry]:
        return self._entries

    def content(self) -> Iterator[bytes]:
        """The content of the entry that came last, once, in pieces; what is not taken is passed over."""
        return self._content

    def _read(self) -> Iterator[RamdiskEntry]:
        stream = self._stream
        while first := stream.after_zeros():
            if first.startswith(_GZIP):
                unpacked = _Unpacked(stream)
                while unpacked.after_zeros():
                    yield from self._archive(unpacked)
            else:
                yield from self._archive(stream)

    def _archive(self, source: _Bytes) -> Iterator[RamdiskEntry]:
        """One archive, to its trailer."""
        if source.position % _ALIGNMENT or (source.before + source.position) % _ALIGNMENT:
            raise source.error("malformed_ramdisk", "an archive begins askew", expected="a multiple of 4 bytes")
        self._archives += 1
        while (made := self._header(source)) is not None:
            entry, checksum = made
            content = self._pieces(source, entry, checksum)
            self._content = iter(()) if entry.kind is Kind.SYMLINK else content
            yield entry
            for _ in self._content:
                pass

    def _header(self, source: _Bytes) -> tuple[RamdiskEntry, int | None] | None:
        at = source.position
        magic = source.take(len(_MAGIC))
        if magic not in (_MAGIC, _MAGIC_WITH_SUM):
            found = next((name for start, name in _OTHERS.items() if magic.startswith(start)), None)
            got = f"{magic.hex()}{'' if found is None else f', which {found} begins with'}"
            expected = "a cpio archive (newc: 303730373031), or gzip (1f8b)"
            raise source.error("unknown_ramdisk", "no archive that is known", at=at, expected=expected, got=got)
        fields = source.take(HEADER_SIZE - len(_MAGIC))
        if not _FIELDS.fullmatch(fields):
            raise source.error("malformed_ramdisk", "a header is no number", at=at, expected="hexadecimal digits")
        inode, mode, uid, gid, links, mtime, size, *devices, name_size, checksum = (
            int(fields[start : start + 8], 16) for start in range(0, len(fields), 8)
        )
        if not 1 < name_size <= MAX_NAME:
            raise source.error(
                "malformed_ramdisk", "a name's length", at=at, expected=f"2 to {MAX_NAME} bytes", got=name_size
            )
        name = source.take(name_size)
        source.pad()
        if name == TRAILER + b"\0":
            if size:
                raise source.error("malformed_ramdisk", "a trailer with content", at=at, expected="none", got=size)
            if stat.S_ISLNK(mode):  # which Linux makes, and goes on with the archive's inode numbers
                raise source.error("malformed_ramdisk", "a trailer that is a link", at=at, got=f"{mode:o}")
            return None
        kind = _KINDS.get(stat.S_IFMT(mode))
        if kind is None or mode > 0o177777:
            raise source.error("malformed_ramdisk", "a mode that is none of a file", at=at, got=f"{mode:o}")
        path = _path(source, at, name, is_folder=kind is Kind.DIRECTORY)
        self._count(source, at, name_size + (size if kind is Kind.SYMLINK else 0))
        target = None
        if kind is Kind.SYMLINK:
            target = _target(source, at, size)
        elif kind is not Kind.FILE and size:
            raise source.error("malformed_ramdisk", f"a {kind} with content", at=at, expected="none", got=size)
        if links > 1 and kind not in (Kind.FILE, Kind.DIRECTORY, Kind.SYMLINK):
            raise source.error("unsafe_path", f"a {kind} with several names", at=at, expected="one", got=links)
        if wrong := self._unpacking.place(path, kind):
            expected, got = "each name once, behind its folder", ascii(path)[1:-1][:80]
            raise source.error("unsafe_path", f"an entry {wrong}", at=at, expected=expected, got=got)
        *device, major, minor = devices
        is_device = kind in (Kind.CHARACTER_DEVICE, Kind.BLOCK_DEVICE)
        entry = RamdiskEntry(
            path=path,
            kind=kind,
            mode=stat.S_IMODE(mode),
            uid=uid,
            gid=gid,
            mtime=mtime,
            size=size,
            device=(major, minor) if is_device else None,
            target=target,
            links=links,
            inode=(inode, device[0], device[1]),
            archive=self._archives - 1,
        )
        return entry, checksum if magic == _MAGIC_WITH_SUM and kind is Kind.FILE else None

    def _count(self, source: _Bytes, at: int, names: int) -> None:
        """One more entry, with so many bytes of path and target."""
        found = self._unpacking
        found.entries += 1
        found.names += names
        for what, count, most in (("entries", found.entries, MAX_ENTRIES), ("bytes of names", found.names, MAX_NAMES)):
            if count > most:
                expected = f"at most {most} {what} in an image"
                raise source.error("ramdisk_too_large", f"too many {what}", at=at, expected=expected, got="more")

    @staticmethod
    def _pieces(source: _Bytes, entry: RamdiskEntry, checksum: int | None) -> Iterator[bytes]:
        at, total = source.position, 0
        for piece in source.pieces(entry.size):
            if checksum is not None:
                total += sum(piece)
            yield piece
        source.pad()
        if checksum is not None and total & 0xFFFFFFFF != checksum:
            got = f"{total & 0xFFFFFFFF:08x}"
            raise source.error("malformed_ramdisk", "a file's sum is wrong", at=at, expected=f"{checksum:08x}", got=got)


def _path(source: _Bytes, at: int, name: bytes, *, is_folder: bool) -> str:
    """``name`` as Linux resolves it from the root, where there is but one way to do so."""
    text, nul, rest = name.partition(b"\0")
    if not text or not nul or rest:
        raise source.error("malformed_ramdisk", "a name that does not end with its NUL", at=at, got=ascii(name[:80]))
    parts = text.removeprefix(b"/").split(b"/")
    if parts[0] == b".":
        parts = parts[1:] or [b""]  # as find(1) writes them
    if len(parts) > 1 and is_folder and not parts[-1]:
        parts.pop()  # the slash that tar puts behind folders
    if parts == [b""] and is_folder:
        return ""  # the root
    if any(part in (b"", b".", b"..") or len(part) > MAX_PART for part in parts):
        message, expected = "a path with ., .., an empty or a long part", f"names alone, of at most {MAX_PART} bytes"
        raise source.error("unsafe_path", message, at=at, expected=expected, got=ascii(text)[1:][:80])
    return b"/".join(parts).decode("utf-8", "surrogateescape")


def _target(source: _Bytes, at: int, size: int) -> str:
    if not 0 < size < MAX_NAME:
        raise source.error(
            "malformed_ramdisk", "a link's length", at=at, expected=f"1 to {MAX_NAME - 1} bytes", got=size
        )
    target = source.take(size)
    source.pad()
    if b"\0" in target:
        raise source.error("malformed_ramdisk", "a link with a NUL in it", at=at, got=ascii(target[:80]))
    return target.decode("utf-8", "surrogateescape")


class _Bytes(ABC):
    """A sequence of bytes, read once, with a look ahead."""

    def __init__(self, before: int = 0) -> None:
        """``before`` is bytes that Linux has unpacked when it comes to the first."""
        self.position, self.before = 0, before
        self._buffer, self._used = b"", 0

    @abstractmethod
    def _fill(self) -> bytes:
        """At most ``PIECE_SIZE`` more bytes; none at the end."""

    @abstractmethod
    def error(
        self,
        code: str,
        message: str,
        *,
        at: int | None = None,
        expected: object | None = None,
        got: object | None = None,
    ) -> RamdiskError:
        """Of the byte ``at``, by default the present one."""

    def read(self, size: int) -> bytes:
        """At most ``size`` bytes; none at the end."""
        if self._used == len(self._buffer):
            self._buffer, self._used = self._fill(), 0
        data = self._buffer[self._used : self._used + size]
        self._skip(len(data))
        return data

    def put_back(self, data: bytes) -> None:
        """The last bytes of what was read last are still to be read."""
        self._skip(-len(data))

    def _skip(self, size: int) -> None:
        self._used += size
        self.position += size

    def pieces(self, size: int) -> Iterator[bytes]:
        """The next ``size`` bytes, as they are there."""
        end = self.position + size
        while self.position < end:
            piece = self.read(end - self.position)
            if not piece:
                message, missing = "the archive ends too early", end - self.position
                raise self.error("truncated_ramdisk", message, expected=f"{missing} bytes more", got="none")
            yield piece

    def take(self, size: int) -> bytes:
        return b"".join(self.pieces(size))

    def pad(self) -> None:
        """Passes over the zeros up to the next multiple of four."""
        at = self.position
        padding = self.take(-at % _ALIGNMENT)
        if padding.strip(b"\0"):
            raise self.error("malformed_ramdisk", "what fills up is not zero", at=at, got=padding.hex())

    def after_zeros(self) -> bytes:
        """Passes over zeros; the first bytes of what follows, which are still to be read, and none at the end."""
        while data := self.read(PIECE_SIZE):
            if left := data.lstrip(b"\0"):
                self.put_back(left)
                while len(left) < len(_GZIP) and (more := self._fill()):
                    left += more
                    self._buffer, self._used = left, 0
                return left[: len(_GZIP)]
        return b""


class _Stream(_Bytes):
    """The ramdisk as it stands in the file."""

    def __init__(self, file: Readable, size: int, offset: int, before: int) -> None:
        super().__init__(before)
        self._file, self._left, self._offset = file, size, offset

    def _fill(self) -> bytes:
        data = self._file.read(min(PIECE_SIZE, self._left))
        self._left -= len(data)
        return data

    def error(
        self,
        code: str,
        message: str,
        *,
        at: int | None = None,
        expected: object | None = None,
        got: object | None = None,
    ) -> RamdiskError:
        offset = self._offset + (self.position if at is None else at)
        return RamdiskError(code, message, offset=offset, expected=expected, got=got)


class _Unpacked(_Bytes):
    """What one member of gzip (RFC 1952) in ``stream`` unpacks to; zlib checks its CRC and its length."""

    def __init__(self, stream: _Stream) -> None:
        super().__init__()
        self._stream, self._begin = stream, stream.position
        self._inflate = zlib.decompressobj(wbits=16 + zlib.MAX_WBITS)
        self._packed = b""
        self._unpacked = 0

    def _fill(self) -> bytes:
        while not self._has_ended():
            packed = self._packed or self._stream.read(PIECE_SIZE)
            try:
                data = self._inflate.decompress(packed, PIECE_SIZE)
            except zlib.error as error:
                raise self.error("malformed_gzip", f"the gzip stream is broken ({error})") from error
            self._packed = self._inflate.unconsumed_tail
            self._unpacked += len(data)
            if self._unpacked > MAX_UNPACKED:
                expected = f"at most {MAX_UNPACKED} bytes"
                raise self.error("ramdisk_too_large", "the gzip stream holds too much", expected=expected, got="more")
            if self._has_ended():
                self._stream.put_back(self._inflate.unused_data)
            elif not packed and not data:
                raise self.error("truncated_ramdisk", "the gzip stream ends too early")
            if data:
                return data
        return b""

    def _has_ended(self) -> bool:
        return self._inflate.eof

    def error(
        self,
        code: str,
        message: str,
        *,
        at: int | None = None,
        expected: object | None = None,
        got: object | None = None,
    ) -> RamdiskError:
        message = f"{message}, at byte {self.position if at is None else at} of what gzip holds"
        return self._stream.error(code, message, at=self._begin, expected=expected, got=got)
