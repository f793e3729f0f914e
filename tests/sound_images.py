"""An image with which nothing is wrong: what an auditor's tools do not call broken."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta

from tests.cpio_files import Member, archive, folder
from tests.eif_files import CMDLINE_TEXT, KERNEL, Eif, Part, Signer, image

SIGNER = Signer(not_before=datetime.now(UTC) - timedelta(days=1), not_after=datetime.now(UTC) + timedelta(days=1))
"""Whose certificate is valid while the tests run."""


def bzimage(extra: bytes = b"") -> bytes:
    """A kernel of one setup sector and two paragraphs, as its header says, and what stands behind it."""
    head = bytearray(1056)
    head[0x1F1], head[0x1F4], head[0x211] = 1, 2, 1
    head[0x1FE:0x206] = b"\x55\xaa" + bytes(2) + b"HdrS"
    head[0x206:0x208] = (0x20F).to_bytes(2, "little")
    return bytes(head) + extra


BOOT = (Member("cmdline", CMDLINE_TEXT.encode()), folder("dev"), Member("init", b"\x7fELF init", mode=0o100755))
ROOT = (Member("cmd", b"/usr/bin/python3\n"), Member("env"), folder("rootfs"), folder("rootfs/etc"))


def sound(boot: bytes = archive(*BOOT), *disks: bytes) -> Eif:
    """With these ramdisks."""
    return image(ramdisks=[boot, *(disks or [archive(*ROOT)])]).having(Part(KERNEL, bzimage()))
