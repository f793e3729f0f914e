"""What init believes of the bytes it is given (enclave/machine/checks.h), compiled alone."""

from __future__ import annotations

import ctypes
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

MACHINE = Path(__file__).resolve().parents[2] / "enclave/machine"
OURS = (MACHINE / "cmdline").read_bytes().rstrip(b"\n")
QEMU = b" virtio_mmio.device=512@0xfeb00e00:12 virtio_mmio.device=512@0xfeb00c00:11"
FIRECRACKER = b" virtio_mmio.device=4K@0xd0000000:5"

_LIBRARY = """
#include "checks.h"
const char *cmdline(const char *a, size_t n, const char *m, size_t k, uint32_t *c)
{ return check_cmdline(a, n, m, k, c); }
const char *lines(char *t, size_t n, char **e, size_t most) { return split_lines(t, n, e, most); }
const char *environment(char *const *e) { return check_environment(e); }
"""
_NUMBER = rb"(?:0x[0-9a-f]{1,16}|[0-9]{1,10})"
_DEVICE = rb"virtio_mmio\.device=%b[KM]?@%b:%b(?::%b)?" % ((_NUMBER,) * 4)
_BEHIND = re.compile(rb"(?: +(?:parent_cid=[1-9][0-9]{0,9}|%b))* *\n?" % _DEVICE)


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    folder = tmp_path_factory.mktemp("checks")
    (folder / "library.c").write_text(_LIBRARY)
    warnings = ["-Wall", "-Wextra", "-Werror", "-Wconversion", "-Wshadow"]
    trap = ["-fsanitize=undefined", "-fsanitize-undefined-trap-on-error"]
    target = ["-std=c11", "-O1", "-shared", "-fPIC", f"-I{MACHINE}", "-o", "checks.so", "library.c"]
    subprocess.run(["cc", *warnings, *trap, *target], cwd=folder, check=True)
    loaded = ctypes.CDLL(str(folder / "checks.so"))
    for function in (loaded.cmdline, loaded.lines, loaded.environment):
        function.restype = ctypes.c_char_p
    return loaded


def check(library: ctypes.CDLL, actual: bytes, measured: bytes = OURS) -> tuple[str | None, int]:
    """The reason to halt, or None; and the parent's CID."""
    cid = ctypes.c_uint32(0)
    sizes = ctypes.c_size_t(len(actual)), ctypes.c_size_t(len(measured))
    reason = library.cmdline(actual, sizes[0], measured, sizes[1], ctypes.byref(cid))
    return (None if reason is None else reason.decode()), cid.value


@pytest.mark.parametrize(
    ("behind", "cid"),
    [
        (b"", 3),
        (b"\n", 3),
        (b"  \n", 3),
        (QEMU + b"\n", 3),
        (b" parent_cid=2" + QEMU + b"\n", 2),
        (b" " + QEMU + b"\n", 3),  # QEMU without -append leaves two spaces
        (FIRECRACKER, 3),
        (FIRECRACKER + b" parent_cid=16\n", 16),
        (b" virtio_mmio.device=1M@4096:7:0", 3),
        (b" parent_cid=4294967294", 4294967294),
    ],
)
def test_what_a_hypervisor_adds(library: ctypes.CDLL, behind: bytes, cid: int) -> None:
    assert check(library, OURS + behind) == (None, cid)


@pytest.mark.parametrize(
    "actual",
    [
        b"",
        b"\n",
        OURS[1:],
        OURS[:-1],
        b" " + OURS,
        OURS[14:] + b" " + OURS,
        OURS + b"x",
        OURS + b"\n\n",
        OURS + b"\t",
        OURS + b" \0",
        OURS + b" quiet",
        OURS + b" rdinit=/rootfs/bin/sh",
        OURS + b" parent_cid",
        OURS + b" parent_cid=",
        OURS + b" parent_cid=-2",
        OURS + b" parent_cid=0x2",
        OURS + b" parent_cid=0",
        OURS + b" parent_cid=02",
        OURS + b" parent_cid=1",
        OURS + b" parent_cid=4294967295",
        OURS + b" parent_cid=4294967298",
        OURS + b" parent_cid=18446744073709551618",
        OURS + b" parent_cid=2x",
        OURS + b' parent_cid="2"',
        OURS + b" parent_cid=2 parent_cid=2",
        OURS + b" parent_cid=2,parent_cid=3",
        OURS + b"parent_cid=2",
        OURS + b" virtio_mmio.device=",
        OURS + b" virtio_mmio.device=512",
        OURS + b" virtio_mmio.device=512@",
        OURS + b" virtio_mmio.device=512@0x",
        OURS + b" virtio_mmio.device=512@0xfeb00e00",
        OURS + b" virtio_mmio.device=512@0xfeb00e00:",
        OURS + b" virtio_mmio.device=512@0xfeb00e00:12:",
        OURS + b" virtio_mmio.device=512@0xfeb00e00:12:1:2",
        OURS + b" virtio_mmio.device=512@0xfeb00e00:12 quiet",
        OURS + b" virtio_mmio.device=512KM@0xfeb00e00:12",
        OURS + b" virtio_mmio.device=512@0xFEB00E00:12",
        OURS + b" virtio_mmio.device=512@0x00000000000000001:12",
        OURS + b" virtio_mmio.device=512@0xfeb00e00:12\0quiet",
        OURS + b"070701",  # the first bytes of a ramdisk
    ],
)
def test_whatever_else_halts(library: ctypes.CDLL, actual: bytes) -> None:
    reason, _ = check(library, actual)
    assert reason is not None


@pytest.mark.parametrize("measured", [b"", b"two\nlines", b"a\0b", b"\xc3\xa9", b"tab\t", b"\x7f"])
def test_a_measured_line_that_is_none(library: ctypes.CDLL, measured: bytes) -> None:
    assert check(library, measured, measured)[0] is not None


_tokens = st.sampled_from(
    [
        b" ",
        b"parent_cid=",
        b"2",
        b"0x",
        b"virtio_mmio.device=",
        b"512",
        b"4K",
        b"@",
        b":",
        b"0xfeb00e00",
        b"a",
        b"\n",
        b"\0",
    ]
)


@given(prefix=st.sampled_from([OURS, OURS[:-1], b"a", b""]), behind=st.lists(_tokens, max_size=14).map(b"".join))
def test_it_agrees_with_a_pattern(library: ctypes.CDLL, prefix: bytes, behind: bytes) -> None:
    actual = prefix + behind
    reason, cid = check(library, actual)
    named = [int(digits) for digits in re.findall(rb" parent_cid=([0-9]+)", behind)]
    fits = actual.startswith(OURS) and _BEHIND.fullmatch(actual[len(OURS) :]) is not None
    assert (reason is None) == (fits and len(named) <= 1 and all(2 <= cid < 2**32 - 1 for cid in named))
    if reason is None:
        assert cid == (named[0] if named else 3)


@given(actual=st.binary(max_size=80), measured=st.binary(max_size=40))
def test_any_bytes_get_an_answer(library: ctypes.CDLL, actual: bytes, measured: bytes) -> None:
    reason, _ = check(library, actual, measured)
    assert reason is not None or actual.startswith(measured)


@given(cut=st.integers(1, len(OURS)), appended=st.sampled_from([b"", b" parent_cid=2"]))
def test_a_line_that_begins_later_halts(library: ctypes.CDLL, cut: int, appended: bytes) -> None:
    """The attack: its first bytes lie behind the kernel, where PCR0 and PCR1 count them alike."""
    assert check(library, OURS[cut:] + appended + QEMU + b"\n")[0] is not None


def split(library: ctypes.CDLL, text: bytes, most: int = 64) -> tuple[str | None, list[bytes]]:
    buffer = ctypes.create_string_buffer(text, len(text) + 1)
    entries = (ctypes.c_char_p * most)()
    reason = library.lines(buffer, ctypes.c_size_t(len(text)), entries, ctypes.c_size_t(most))

    def found() -> Iterator[bytes]:
        for entry in entries:
            if entry is None:
                return
            yield entry

    return (None, list(found())) if reason is None else (reason.decode(), [])


@given(st.lists(st.binary(max_size=12).filter(lambda line: b"\n" not in line and b"\0" not in line), max_size=8))
def test_one_entry_a_line(library: ctypes.CDLL, lines: list[bytes]) -> None:
    """As AWS's init reads them: empty lines are entries, and the last line needs no end."""
    assert split(library, b"".join(line + b"\n" for line in lines)) == (None, lines)
    if lines and lines[-1]:
        assert split(library, b"\n".join(lines)) == (None, lines)


def test_no_more_lines_than_there_is_room_for(library: ctypes.CDLL) -> None:
    assert split(library, b"a\nb\nc", most=4) == (None, [b"a", b"b", b"c"])
    assert split(library, b"a\nb\nc\nd", most=4) == ("it has too many lines", [])
    assert split(library, b"a\0b") == ("it has a NUL byte", [])
    assert split(library, b"") == (None, [])


@pytest.mark.parametrize(
    ("lines", "good"),
    [([], True), ([b"A=b", b"C="], True), ([b"A=b=c"], True), ([b"A"], False), ([b"=b"], False), ([b""], False)],
)
def test_an_environment_has_names(library: ctypes.CDLL, lines: list[bytes], good: bool) -> None:
    entries = (ctypes.c_char_p * (len(lines) + 1))(*lines, None)
    assert (library.environment(entries) is None) == good


def test_our_command_line_is_one_line() -> None:
    assert (MACHINE / "cmdline").read_bytes() == OURS + b"\n"
    assert re.fullmatch(rb"[!-~]+(?: [!-~]+)*", OURS)


def test_the_fragment_names_each_option_once() -> None:
    lines = [line for line in (MACHINE / "kernel.config").read_text().splitlines() if line and not line.startswith("#")]
    names = [re.fullmatch(r"(CONFIG_[A-Z0-9_]+)=(?:y|-?\d+|\"[a-z]*\")", line) for line in lines]
    assert all(names)
    assert len({name[1] for name in names if name}) == len(lines)
