"""Images that were made to deceive: what each command says of them, and what it never does."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.cpio_files import Member, archive, folder
from tests.eif_files import CMDLINE, KERNEL, Eif, Part, image
from tests.terminal import Terminal

TEXT = "console=ttyS0 reboot=t random.trust_cpu=on"
BOOT = (Member("cmdline", TEXT.encode()), folder("dev"), Member("init", b"\x7fELF init", mode=0o100755))
ROOT = (Member("cmd", b"/usr/bin/python3\n"), Member("env"), folder("rootfs"), folder("rootfs/etc"))


@pytest.fixture
def run(strongroom: Terminal, monkeypatch: pytest.MonkeyPatch) -> Terminal:
    monkeypatch.setenv("COLUMNS", "200")
    return strongroom


def kernel() -> bytes:
    """A bzImage of one setup sector and two paragraphs."""
    head = bytearray(1056)
    head[0x1F1], head[0x1F4], head[0x211] = 1, 2, 1
    head[0x1FE:0x206] = b"\x55\xaa" + bytes(2) + b"HdrS"
    head[0x206:0x208] = (0x20F).to_bytes(2, "little")
    return bytes(head)


def made(*disks: bytes, moved: int = 0) -> Eif:
    """An image of ``disks``, or of what was tried first; ``moved`` bytes of its command line are behind its kernel."""
    whole = image(ramdisks=disks or [archive(*BOOT), archive(*ROOT)])
    text = TEXT.encode()
    return whole.having(Part(KERNEL, kernel() + text[:moved])).having(Part(CMDLINE, text[moved:]))


def kept(path: Path, of: Eif, name: str = "enclave.eif") -> str:
    (path / name).write_bytes(of.encode())
    return str(path / name)


def test_diff_says_loudly_that_a_boundary_was_moved(run: Terminal, tmp_path: Path) -> None:
    before, after = kept(tmp_path, made()), kept(tmp_path, made(moved=14), "moved.eif")
    ran = run("image", "diff", before, after)
    assert ran.code == 1
    assert "A BOUNDARY WAS MOVED: kernel, cmdline changed, and PCR0 PCR1 did not" in ran.out
    assert "the second image boots otherwise" in ran.out
    assert "every register is the same" not in ran.out
    seen = run("image", "diff", before, after, "--json").json
    assert seen["boundaries_moved"] == {"kernel": ["PCR0", "PCR1"], "cmdline": ["PCR0", "PCR1"]}
    assert seen["registers"] == {}
