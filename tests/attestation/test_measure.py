"""Measuring on several threads gives what measuring in one piece does, in constant memory, and leaves no thread."""

from __future__ import annotations

import hashlib
import io
import threading
import tracemalloc
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from attestation import parallel_hashes
from attestation.eif import (
    KERNEL_HEAD,
    Architecture,
    ImageError,
    SectionType,
    bzimage_length,
)
from attestation.measure import SectionReader, measure_image, read_image
from attestation.parallel_hashes import BUFFERS, CHUNK_SIZE
from attestation.reference import PcrSet
from tests.eif_files import AARCH64, CMDLINE, CMDLINE_TEXT, KERNEL, RAMDISK, Eif, Part, Signer, image

if TYPE_CHECKING:  # collections.abc has it from Python 3.12 on
    from _typeshed import WriteableBuffer as Buffer


LARGE = bytes(range(251)) * 10_000  # some pieces, and no multiple of one


def kernel(*, sectors: int = 15, paragraphs: int = 100, length: int | None = None, protocol: int = 0x20F) -> bytes:
    """A bzImage, as far as its header says so."""
    head = bytearray(KERNEL_HEAD)
    head[0x1F1] = sectors
    head[0x1F4:0x1F8] = paragraphs.to_bytes(4, "little")
    head[0x1FE:0x200] = b"\x55\xaa"
    head[0x202:0x206] = b"HdrS"
    head[0x206:0x208] = protocol.to_bytes(2, "little")
    head[0x211] = 1
    whole = (sectors + 1) * 512 + paragraphs * 16 if length is None else length
    return bytes(head) + b"k" * (whole - len(head))


# --- Threads
# ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [1, 2, 3])
@pytest.mark.parametrize("digest_file", [False, True])
def test_large_sections_are_measured_alike(count: int, digest_file: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parallel_hashes, "CHUNK_SIZE", 100_000)
    disks = [LARGE[number:] for number in range(count)]
    made = image(ramdisks=disks).having(Part(KERNEL, LARGE)).signed()
    data = made.encode()
    found = measure_image(io.BytesIO(data), digest_file=digest_file)
    assert found.measurements == PcrSet(*made.registers(), Signer().pcr8())
    assert [section.sha384 for section in found.sections] == [hashlib.sha384(part.data).digest() for part in made.parts]
    assert found.sha384 == (hashlib.sha384(data).digest() if digest_file else None)


@pytest.mark.parametrize("size", [CHUNK_SIZE - 1, CHUNK_SIZE, CHUNK_SIZE + 1, 64 << 10, (64 << 10) - 1])
def test_every_size_of_piece(size: int) -> None:
    made = image(ramdisks=[b"boot", bytes(size), b"x" * size])
    assert measure_image(io.BytesIO(made.encode())).measurements == PcrSet(*made.registers())


@pytest.mark.parametrize("damage", [lambda data: data[:-1], lambda data: data + b"x", lambda data: data[:-1] + b"x"])
def test_no_thread_stays(damage: Callable[[bytes], bytes]) -> None:
    before = threading.active_count()
    with pytest.raises(ImageError):
        measure_image(io.BytesIO(damage(image(ramdisks=[LARGE, LARGE]).encode())))
    assert threading.active_count() == before


def test_an_interruption_ends_the_threads() -> None:
    class Interrupted(io.BytesIO):
        def readinto(self, buffer: Buffer, /) -> int:
            if self.tell() > len(LARGE):
                raise KeyboardInterrupt
            return super().readinto(buffer)

    before = threading.active_count()
    with pytest.raises(KeyboardInterrupt):
        measure_image(Interrupted(image(ramdisks=[LARGE, LARGE]).encode()))
    assert threading.active_count() == before


class _NotYet(io.BytesIO):
    """A file that does not block: for a while it has nothing more than its first ``there`` bytes."""

    def __init__(self, data: bytes, there: int) -> None:
        super().__init__(data)
        self._there = there

    def readinto(self, buffer: Buffer, /) -> int:
        left = self._there - self.tell()
        return super().readinto(memoryview(buffer)[:left]) if left else None  # type: ignore[return-value]

    def read(self, size: int | None = -1, /) -> bytes:
        return super().read(size) if self.tell() < self._there else None  # type: ignore[return-value]


@pytest.mark.parametrize("behind", [0, 1, 40, CHUNK_SIZE + 1])
def test_a_file_that_does_not_wait_is_no_image(behind: int) -> None:
    data = image(ramdisks=[LARGE, LARGE]).encode()
    with pytest.raises(ImageError) as caught:
        measure_image(_NotYet(data, len(data) - behind))
    assert (caught.value.code, caught.value.offset) == ("unreadable_image", len(data) - behind)


class _Sparse(io.RawIOBase):
    """An image of which the last section is zeros that are nowhere in memory, and that claims more of them."""

    def __init__(self, claimed: int, there: int) -> None:
        made = image(ramdisks=[b"boot", b""])
        last = len(made.parts) - 1
        lying = replace(made, parts=(*made.parts[:-1], Part(RAMDISK, b"", size=claimed)), sizes={last: claimed})
        self._head, self._zeros = io.BytesIO(lying.encode()), there

    def readinto(self, buffer: Buffer, /) -> int:
        view = memoryview(buffer)
        if size := self._head.readinto(view):
            return size
        size = min(len(view), self._zeros)
        self._zeros -= size
        view[:size] = bytes(size)
        return size


@pytest.mark.parametrize("claimed", [64 << 20, 64 << 30, 1 << 63, (1 << 64) - 1])
def test_a_claim_is_not_allocated(claimed: int) -> None:
    tracemalloc.start()
    try:
        with pytest.raises(ImageError) as caught:
            measure_image(_Sparse(claimed, 32 << 20))  # type: ignore[arg-type]  # as much as is used
        assert tracemalloc.get_traced_memory()[1] < (BUFFERS + 4) * CHUNK_SIZE
    finally:
        tracemalloc.stop()
    assert caught.value.code == "truncated_eif"
    assert caught.value.got == f"{caught.value.offset} bytes"


# --- Where an error shows
# ------------------------------------------------------------------------------------------------

GOOD = image()
PLAIN = GOOD.encode()
OFFSETS: dict[str, tuple[Callable[[], bytes], int]] = {
    "magic": (lambda: replace(GOOD, magic=b".EIF").encode(), 0),
    "version": (lambda: replace(GOOD, version=5).encode(), 4),
    "flags": (lambda: replace(GOOD, flags=2).encode(), 6),
    "reserved": (lambda: replace(GOOD, reserved=1).encode(), 24),
    "count": (lambda: replace(GOOD, count=33).encode(), 26),
    "an offset": (lambda: replace(GOOD, offsets={2: 1}).encode(), 28 + 2 * 8),
    "an offset behind": (lambda: replace(GOOD, offsets={6: 1}).encode(), 28 + 6 * 8),
    "a size behind": (lambda: replace(GOOD, sizes={7: 1}).encode(), 284 + 7 * 8),
    "unused": (lambda: replace(GOOD, unused=1).encode(), 540),
    "crc": (lambda: replace(GOOD, crc=0).encode(), 544),
    "type": (lambda: replace(GOOD, parts=(Part(9, b"a kernel"), *GOOD.parts[1:])).encode(), 548),
    "section flags": (lambda: replace(GOOD, parts=(Part(KERNEL, b"a kernel", 1), *GOOD.parts[1:])).encode(), 550),
    "section size": (lambda: replace(GOOD, parts=(Part(KERNEL, b"kernel", 0, 7), *GOOD.parts[1:])).encode(), 552),
    "command line": (lambda: GOOD.having(Part(CMDLINE, b"quiet\ninit=/x")).encode(), 548 + 12 + 8 + 12 + 5),
    "metadata": (
        lambda: replace(
            GOOD, parts=tuple(replace(part, data=b"{") if part.kind == 5 else part for part in GOOD.parts)
        ).encode(),
        548 + 12 + 8 + 12 + len(CMDLINE_TEXT) + 12,
    ),
    "signature": (lambda: GOOD.having(Part(4, b"\x80")).encode(), len(PLAIN) + 12),
    "the end": (lambda: PLAIN[:700], 700),
    "behind the end": (lambda: PLAIN + b"x", len(PLAIN)),
    "no ramdisk": (
        lambda: replace(GOOD, parts=GOOD.parts[:3]).encode(),
        len(replace(GOOD, parts=GOOD.parts[:3]).encode()),
    ),
}


@pytest.mark.parametrize("name", OFFSETS)
def test_an_error_says_at_which_byte_it_shows(name: str) -> None:
    make, offset = OFFSETS[name]
    with pytest.raises(ImageError) as caught:
        measure_image(io.BytesIO(make()))
    error = caught.value
    assert error.offset == offset
    assert error.message == f"{error.said}, at byte {offset}"
    assert error.as_json()["offset"] == str(offset)
    assert error.of("a.eif").message == f"a.eif: {error.message}"
    assert error.of("a.eif").offset == offset


def test_an_error_without_a_place_says_none(tmp_path: Path) -> None:
    with pytest.raises(ImageError) as caught:
        read_image(tmp_path / "absent")
    assert (caught.value.offset, caught.value.as_json()["offset"]) == (None, None)


@pytest.mark.parametrize(
    ("offset", "said"), [(600, "leaves a gap"), (549, "leaves a gap"), (500, "overlaps"), (0, "overlaps")]
)
def test_gaps_and_overlaps_are_told_apart(offset: int, said: str) -> None:
    with pytest.raises(ImageError) as caught:
        measure_image(io.BytesIO(replace(GOOD, offsets={0: offset}).encode()))
    assert said in caught.value.message


# --- Where the kernel ends
# ------------------------------------------------------------------------------------------------


def with_kernel(data: bytes, **header: int) -> Eif:
    return replace(GOOD.having(Part(KERNEL, data)), **header)  # type: ignore[arg-type]  # fields of integers


@pytest.mark.parametrize(("sectors", "states"), [(15, 16 * 512), (0, 5 * 512), (1, 2 * 512)])
def test_a_bzimage_states_its_length(sectors: int, states: int) -> None:
    data = kernel(sectors=sectors, length=states + 1600)
    found = measure_image(io.BytesIO(with_kernel(data).encode()))
    assert found.kernel_length == len(data)
    found.require_boundary()


def test_a_part_of_the_command_line_behind_the_kernel_is_found() -> None:
    data = kernel()
    honest = with_kernel(data)
    moved = with_kernel(data + b"init=/bin/sh ").having(Part(CMDLINE, CMDLINE_TEXT.encode()))
    joined = honest.having(Part(CMDLINE, b"init=/bin/sh " + CMDLINE_TEXT.encode()))
    assert moved.registers() == joined.registers()
    with pytest.raises(ImageError) as caught:
        measure_image(io.BytesIO(moved.encode())).require_boundary()
    error = caught.value
    assert (error.code, error.offset) == ("no_boundary", 560)
    assert (error.expected, error.got) == (f"{len(data)} bytes", f"{len(data) + 13} bytes")


def test_a_kernel_that_is_too_short_is_found() -> None:
    with pytest.raises(ImageError, match="no_boundary"):
        measure_image(io.BytesIO(with_kernel(kernel()[:-16]).encode())).require_boundary()


@pytest.mark.parametrize(
    "data",
    [b"", kernel()[: KERNEL_HEAD - 1], kernel(protocol=0x203), bytes(2000), kernel().replace(b"HdrS", b"HdrT")],
)
def test_what_is_no_bzimage_has_no_boundary(data: bytes) -> None:
    assert bzimage_length(data[:KERNEL_HEAD]) is None
    with pytest.raises(ImageError) as caught:
        measure_image(io.BytesIO(with_kernel(data).encode())).require_boundary()
    assert (caught.value.code, caught.value.expected) == ("no_boundary", "a bzImage")


def test_an_old_zimage_is_none() -> None:
    data = bytearray(kernel())
    data[0x211] = 0
    assert bzimage_length(bytes(data)) is None


def test_of_aarch64_nothing_is_asked() -> None:
    found = measure_image(io.BytesIO(with_kernel(b"anything", flags=AARCH64).encode()))
    assert found.architecture is Architecture.AARCH64
    found.require_boundary()


# --- A section, read again
# ------------------------------------------------------------------------------------------------


def test_sections_have_names() -> None:
    found = measure_image(io.BytesIO(GOOD.signed().encode()))
    names = ["kernel", "cmdline", "metadata", "ramdisk0", "ramdisk1", "ramdisk2", "signature"]
    assert list(found.named_sections()) == names
    assert found.named_sections()["ramdisk1"] == found.sections[4]
    assert found.sections[4].type is SectionType.RAMDISK


def test_a_section_is_read_again_as_it_was_measured() -> None:
    file = io.BytesIO(PLAIN)
    found = measure_image(file)
    told: list[tuple[int, int]] = []
    for section, part in zip(found.sections, GOOD.parts, strict=True):
        reader = SectionReader(
            file, section, progress=lambda done, total: told.append((done, total)), before=1, total=9
        )
        data = b""
        while piece := reader.read(5):
            data += piece
        reader.finish()
        assert data == part.data
        assert told[-1] == (1 + section.size, 9)


@pytest.mark.parametrize("change", [lambda data: data[:-1] + b"x", lambda data: data[:-3], lambda data: b""])
def test_a_section_that_changed_meanwhile_is_refused(change: Callable[[bytes], bytes]) -> None:
    found = measure_image(io.BytesIO(PLAIN))
    reader = SectionReader(io.BytesIO(change(PLAIN)), found.sections[-1])
    with pytest.raises(ImageError) as caught:
        reader.finish()
    assert (caught.value.code, caught.value.offset) == ("changed_image", found.sections[-1].offset)
