"""Writes ramdisks, true ones and lies: cpio archives (newc) from the format's description, without any code of the
reader.
"""

from __future__ import annotations

import gzip
import stat
from dataclasses import dataclass, replace


@dataclass(frozen=True)
class Member:
    """One entry to be. What is None follows from the rest; what is given may be a lie."""

    name: str | bytes
    data: bytes = b""
    mode: int = stat.S_IFREG | 0o644
    uid: int = 0
    gid: int = 0
    links: int = 1
    mtime: int = 0
    device: tuple[int, int] = (0, 0)
    inode: int = 1
    magic: bytes = b"070701"
    size: int | None = None
    name_size: int | None = None
    checksum: int = 0
    padding: bytes = b"\0"
    end: bytes = b"\0"
    """Of the name."""

    def encode(self) -> bytes:
        name = (self.name.encode() if isinstance(self.name, str) else self.name) + self.end
        fields = (
            *(self.inode, self.mode, self.uid, self.gid, self.links, self.mtime),
            *(len(self.data) if self.size is None else self.size, 0, 0, *self.device),
            *(len(name) if self.name_size is None else self.name_size, self.checksum),
        )
        head = self.magic + b"".join(b"%08X" % field for field in fields) + name
        return self._padded(head) + self._padded(self.data)

    def _padded(self, data: bytes) -> bytes:
        return data + self.padding * (-len(data) % 4)

    def summed(self) -> Member:
        """In the form that has a sum."""
        return replace(self, magic=b"070702", checksum=sum(self.data) & 0xFFFFFFFF)


TRAILER = Member("TRAILER!!!", mode=0)


def folder(name: str, mode: int = 0o755) -> Member:
    return Member(name, mode=stat.S_IFDIR | mode)


def link(name: str, target: str) -> Member:
    return Member(name, target.encode(), mode=stat.S_IFLNK | 0o777)


def device(name: str, major: int, minor: int) -> Member:
    return Member(name, mode=stat.S_IFCHR | 0o666, device=(major, minor))


def archive(*members: Member) -> bytes:
    return b"".join(member.encode() for member in (*members, TRAILER))


def packed(data: bytes) -> bytes:
    """gzip; the same bytes for the same data."""
    return gzip.compress(data, mtime=0)
