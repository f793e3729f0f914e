"""A ramdisk's archive: cpio in the format ``newc`` (SVR4 without checksums), the same bytes for the same tree.

Held to what unpacks it, Linux's ``init/initramfs.c`` (torvalds/linux at ff12055f9820): a name and its final NUL have at
most PATH_MAX bytes, else the entry is skipped in silence; a directory comes before what it holds; the name
``TRAILER!!!`` ends the archive; only entries with two or more links are looked up by their inode number, so a number
has no effect on any other; and where archives follow one another each begins at a multiple of 4 bytes.
"""

from __future__ import annotations

import stat
from collections.abc import Iterator
from typing import Final

from parent.image.tree import Device, Directory, Entry, File, ImageBuildError, Symlink, Tree, encode_path

MAGIC: Final = b"070701"
TRAILER: Final = "TRAILER!!!"
ALIGNMENT: Final = 4
"""Bytes: what header and name, and what the content, are padded to with zeros."""
MAX_FILE_SIZE: Final = (1 << 32) - 1
"""Bytes. The field has eight hexadecimal digits."""

_DEVICES: Final = {"char": stat.S_IFCHR, "block": stat.S_IFBLK, "fifo": stat.S_IFIFO}


def archive(tree: Tree) -> Iterator[bytes]:
    """The archive of ``tree``, a piece at a time; files are opened as their turn comes.

    Every time is 0, inode numbers count from 1, no entry has a device. Raises ImageBuildError ``too_large``,
    ``bad_path``, ``changed_file``, and what reading a file raises.
    """
    for number, entry in enumerate(tree.values(), start=1):
        yield _header(number, entry)
        match entry:
            case File():
                yield from entry.pieces()
                yield _padding(entry.size)
            case Symlink():
                target = encode_path(entry.target)
                yield target + _padding(len(target))
    yield _encoded(TRAILER, links=1)


def archive_size(tree: Tree) -> int:
    """Bytes that :func:`archive` gives. Raises ImageBuildError ``too_large``, ``bad_path``."""
    sizes = (len(_header(number, entry)) + _aligned(_size(entry)) for number, entry in enumerate(tree.values()))
    return sum(sizes) + len(_encoded(TRAILER, links=1))


def _header(number: int, entry: Entry) -> bytes:
    """The header and the name of an entry, padded."""
    if entry.path == TRAILER:
        raise ImageBuildError("bad_path", "a file of this name would end the archive", got=TRAILER)
    kind, links, major, minor, mode = stat.S_IFREG, 1, 0, 0, entry.mode
    match entry:
        case Directory():
            kind, links = stat.S_IFDIR, 2
        case Symlink():
            kind, mode = stat.S_IFLNK, 0o777  # Linux keeps no other for a link
        case Device():
            kind, major, minor = _DEVICES[entry.kind], entry.major, entry.minor
        case File() if entry.size > MAX_FILE_SIZE:
            raise ImageBuildError(
                "too_large",
                f"{entry.path!a} is too large for a ramdisk: large files, such as weights, come from the model store",
                expected=f"at most {MAX_FILE_SIZE} bytes",
                got=f"{entry.size} bytes",
            )
    return _encoded(
        entry.path,
        number=number,
        mode=kind | mode,
        links=links,
        uid=entry.uid,
        gid=entry.gid,
        size=_size(entry),
        major=major,
        minor=minor,
    )


def _encoded(
    path: str,
    *,
    number: int = 0,
    mode: int = 0,
    links: int,
    uid: int = 0,
    gid: int = 0,
    size: int = 0,
    major: int = 0,
    minor: int = 0,
) -> bytes:
    name = encode_path(path) + b"\0"
    time = device_major = device_minor = checksum = 0
    numbers = (number, mode, uid, gid, links, time, size, device_major, device_minor, major, minor, len(name), checksum)
    encoded = MAGIC + b"".join(b"%08X" % value for value in numbers) + name
    return encoded + _padding(len(encoded))


def _size(entry: Entry) -> int:
    match entry:
        case File():
            return entry.size
        case Symlink():
            return len(encode_path(entry.target))
    return 0


def _aligned(size: int) -> int:
    return size + -size % ALIGNMENT


def _padding(size: int) -> bytes:
    return bytes(-size % ALIGNMENT)
