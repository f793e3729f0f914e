"""Readers of what the writers write, straight from the formats' descriptions and without any code of ours: cpio as
Linux unpacks it, and an image as each of the two kinds of readers goes through it.
"""

from __future__ import annotations

import hashlib
import json
import stat
import struct
import zlib
from dataclasses import dataclass
from typing import Any, Final

KERNEL, CMDLINE, RAMDISK, SIGNATURE, METADATA = 1, 2, 3, 4, 5
CMDLINE_TEXT: Final = "reboot=k panic=30 pci=off console=ttyS0 random.trust_cpu=on"


def bzimage(code: bytes = b"code", setup_sectors: int = 3) -> bytes:
    """A file with the fields of the x86 boot protocol, and nothing that would boot."""
    code += bytes(-len(code) % 16)
    setup = bytearray((setup_sectors + 1) * 512)
    setup[0x1F1] = setup_sectors
    setup[0x1F4:0x1F8] = (len(code) // 16).to_bytes(4, "little")
    setup[0x1FE:0x200] = b"\x55\xaa"
    setup[0x202:0x206] = b"HdrS"
    setup[0x206:0x208] = (0x20F).to_bytes(2, "little")
    setup[0x211] = 1
    return bytes(setup) + code


def arm64_image() -> bytes:
    return bytes(56) + b"ARM\x64" + bytes(100)


# --- cpio ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Unpacked:
    """One entry, as it is after Linux has unpacked it."""

    kind: int
    mode: int
    uid: int
    gid: int
    content: bytes = b""
    device: tuple[int, int] = (0, 0)


def unpack(data: bytes) -> dict[bytes, Unpacked]:
    """All archives in ``data``, one behind the other, as init/initramfs.c does; and strict where it is lenient."""
    found: dict[bytes, Unpacked] = {}
    at = 0
    while at < len(data):
        if data[at] == 0:
            at += 1
            continue
        assert at % 4 == 0
        at = _unpack_one(data, at, found)
    return found


def _unpack_one(data: bytes, at: int, found: dict[bytes, Unpacked]) -> int:
    number = 0
    while True:
        assert data[at : at + 6] == b"070701"
        digits = [data[at + 6 + 8 * field : at + 14 + 8 * field] for field in range(13)]
        assert all(len(each) == 8 and each.upper() == each for each in digits)
        inode, mode, uid, gid, links, time, size, major, minor, to_major, to_minor, name_size, checksum = (
            int(each, 16) for each in digits
        )
        assert time == major == minor == checksum == 0
        assert 0 < name_size <= 4096
        name = data[at + 110 : at + 110 + name_size]
        assert name.endswith(b"\0")
        at += 110 + name_size
        assert not any(data[at : at + -at % 4])
        at += -at % 4
        content = data[at : at + size]
        assert len(content) == size
        at += size
        assert not any(data[at : at + -at % 4])
        at += -at % 4
        path = name[:-1]
        if path == b"TRAILER!!!":
            assert size == inode == mode == 0
            return at
        number += 1
        kind = stat.S_IFMT(mode)
        assert inode == number
        assert links == (2 if kind == stat.S_IFDIR else 1)
        assert size == 0 or kind in (stat.S_IFREG, stat.S_IFLNK)
        folder = path.rpartition(b"/")[0]
        assert not folder or found[folder].kind == stat.S_IFDIR
        assert path not in found
        found[path] = Unpacked(kind, stat.S_IMODE(mode), uid, gid, content, (to_major, to_minor))


# --- Images --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Read:
    """What a reader found: sections with their data, and the registers that it computes."""

    sections: list[tuple[int, bytes]]
    pcrs: dict[int, str]
    metadata: Any
    signature: bytes | None


def _register(data: bytes) -> str:
    return hashlib.sha384(bytes(48) + hashlib.sha384(data).digest()).hexdigest()


def _result(sections: list[tuple[int, bytes]]) -> Read:
    ramdisks = [data for kind, data in sections if kind == RAMDISK]
    base = b"".join(data for kind, data in sections if kind in (KERNEL, CMDLINE))
    measured = b"".join(data for kind, data in sections if kind in (KERNEL, CMDLINE, RAMDISK))
    pcrs = {0: _register(measured), 1: _register(base + ramdisks[0]), 2: _register(b"".join(ramdisks[1:]))}
    by_kind = dict(sections)
    return Read(sections, pcrs, json.loads(by_kind[METADATA]), by_kind.get(SIGNATURE))


def read_in_order(image: bytes) -> Read:
    """As AWS's reader: from one section to the next until the file ends, without a look at the table."""
    sections = []
    crc = zlib.crc32(image[:544])
    at = 548
    while at < len(image):
        kind, flags, size = struct.unpack_from(">HHQ", image, at)
        assert kind in (KERNEL, CMDLINE, RAMDISK, SIGNATURE, METADATA)
        assert flags == 0
        data = image[at + 12 : at + 12 + size]
        assert len(data) == size
        crc = zlib.crc32(image[at : at + 12 + size], crc)
        sections.append((kind, data))
        at += 12 + size
    assert struct.unpack_from(">I", image, 544) == (crc,)
    return _result(sections)


def read_by_table(image: bytes) -> Read:
    """As QEMU's: every section is where the header says that it is."""
    magic, version, flags, _, _, zero, count = struct.unpack_from(">4sHHQQHH", image)
    offsets, sizes = struct.unpack_from(">32Q", image, 28), struct.unpack_from(">32Q", image, 284)
    unused, said = struct.unpack_from(">II", image, 540)
    assert (magic, zero, unused) == (b".eif", 0, 0)
    assert version >= 4
    assert flags in (0, 1)
    assert count <= 32
    sections = []
    crc = zlib.crc32(image[:544])
    for index in range(count):
        kind, flags, size = struct.unpack_from(">HHQ", image, offsets[index])
        assert flags == 0
        assert size == sizes[index]
        data = image[offsets[index] + 12 : offsets[index] + 12 + size]
        assert len(data) == size
        crc = zlib.crc32(data, zlib.crc32(image[offsets[index] : offsets[index] + 12], crc))
        sections.append((kind, data))
    assert crc == said
    kinds = [kind for kind, _ in sections]
    assert kinds.count(KERNEL) == kinds.count(CMDLINE) == 1
    assert RAMDISK in kinds
    assert not any((*offsets[count:], *sizes[count:]))
    return _result(sections)
