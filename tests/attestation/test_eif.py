"""Enclave image files: true ones are measured as AWS measures them, and each lie is refused by a typed error."""

from __future__ import annotations

import base64
import hashlib
import io
import json
import tracemalloc
from collections.abc import Callable
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING

import cbor2
import pytest
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec, ed25519
from cryptography.hazmat.primitives.serialization import Encoding
from hypothesis import given
from hypothesis import strategies as st

from attestation import eif
from attestation.eif import (
    Architecture,
    ImageError,
    SectionType,
    SigningCertificate,
    measurements_from_nitro_cli,
)
from attestation.measure import EnclaveImage, measure_image, read_image
from attestation.parallel_hashes import BUFFERS, CHUNK_SIZE
from attestation.reference import ZERO_PCR, PcrSet, once_extended
from tests import eif_files
from tests.eif_files import CMDLINE, KERNEL, METADATA, RAMDISK, SIGNATURE, Eif, Part, Signer, image
from tests.pki.forge import NOW, private_key

if TYPE_CHECKING:  # collections.abc has it from Python 3.12 on
    from _typeshed import WriteableBuffer as Buffer


VECTORS = Path(__file__).parents[3] / "shared" / "vectors" / "nitro"
GOOD = image()
SIGNED = GOOD.signed()
PLAIN, WITH_SIGNATURE = GOOD.encode(), SIGNED.encode()


def read(data: bytes) -> EnclaveImage:
    return measure_image(io.BytesIO(data))


def refused(data: bytes) -> ImageError:
    with pytest.raises(ImageError) as caught:
        read(data)
    return caught.value


# --- What a true image says
# ------------------------------------------------------------------------------------------------


def test_a_whole_image_is_described() -> None:
    found = read(PLAIN)
    assert (found.version, found.architecture) == (4, Architecture.X86_64)
    assert (found.default_memory, found.default_cpus) == (1 << 30, 2)
    assert found.cmdline == eif_files.CMDLINE_TEXT
    assert found.metadata == eif_files.METADATA_FIELDS
    assert found.signer is None
    assert found.measurements == PcrSet(*GOOD.registers())
    assert found.sha384 is None
    assert measure_image(io.BytesIO(PLAIN), digest_file=True).sha384 == hashlib.sha384(PLAIN).digest()


def test_sections_are_where_the_file_has_them() -> None:
    found = read(WITH_SIGNATURE)
    kinds = ["KERNEL", "CMDLINE", "METADATA", "RAMDISK", "RAMDISK", "RAMDISK", "SIGNATURE"]
    assert [section.type.name for section in found.sections] == kinds
    for section, part in zip(found.sections, SIGNED.parts, strict=True):
        begin = section.offset + eif.SECTION_HEADER.size
        assert WITH_SIGNATURE[begin : begin + section.size] == part.data
        assert section.sha384 == hashlib.sha384(part.data).digest()
    assert begin + section.size == len(WITH_SIGNATURE)


def test_the_constants_are_the_formats() -> None:
    assert (eif.HEADER.size, eif.SECTION_HEADER.size) == (548, 12)
    assert [kind.value for kind in SectionType] == [1, 2, 3, 4, 5]


@pytest.mark.parametrize("count", [1, 2, 3, 5])
def test_the_first_ramdisk_boots_and_the_others_are_the_application(count: int) -> None:
    made = image(ramdisks=[b"disk %d" % number for number in range(count)])
    assert read(made.encode()).measurements == PcrSet(*made.registers())


def test_an_image_of_aarch64() -> None:
    found = read(replace(GOOD, flags=eif_files.AARCH64).encode())
    assert found.architecture is Architecture.AARCH64
    assert found.measurements == PcrSet(*GOOD.registers())


@pytest.mark.parametrize("signed", [False, True])
def test_version_3_has_no_metadata(signed: bool) -> None:
    made = image(version=3)
    found = read((made.signed() if signed else made).encode())
    assert (found.version, found.metadata) == (3, None)
    assert found.measurements == PcrSet(*made.registers(), *([Signer().pcr8()] if signed else []))


def test_metadata_and_signature_may_stand_anywhere_and_are_not_measured() -> None:
    kernel, cmdline, metadata, *disks, signature = SIGNED.parts
    for parts in [
        (signature, metadata, kernel, cmdline, *disks),
        (kernel, signature, cmdline, disks[0], metadata, *disks[1:]),
    ]:
        assert read(Eif(parts).encode()).measurements == read(WITH_SIGNATURE).measurements


def test_defaults_are_read_and_not_measured() -> None:
    found = read(replace(GOOD, memory=2**64 - 1, cpus=0).encode())
    assert (found.default_memory, found.default_cpus) == (2**64 - 1, 0)
    assert found.measurements == PcrSet(*GOOD.registers())


def test_sections_have_no_boundary_in_the_measurement() -> None:
    # Why nothing less than PCR0, 1 and 2 together is compared: a byte that moves from the kernel to the command line
    # changes no register. What the pieces were is seen in the sections.
    moved = GOOD.having(Part(KERNEL, b"a kerne")).having(Part(CMDLINE, b"l" + eif_files.CMDLINE_TEXT.encode()))
    found = read(moved.encode())
    assert found.measurements == read(PLAIN).measurements
    assert found.sections != read(PLAIN).sections


def test_it_is_printed_as_nitro_cli_prints_it() -> None:
    pcr0, pcr1, pcr2 = (value.hex() for value in GOOD.registers())
    registers = {"HashAlgorithm": "Sha384 { ... }", "PCR0": pcr0, "PCR1": pcr1, "PCR2": pcr2}
    assert read(PLAIN).as_nitro_cli() == {"Measurements": registers}
    signed = read(WITH_SIGNATURE).as_nitro_cli()
    assert signed == {"Measurements": {**registers, "PCR8": Signer().pcr8().hex()}}
    assert measurements_from_nitro_cli(json.dumps(signed).encode()) == read(WITH_SIGNATURE).measurements


def test_a_file_is_read_and_progress_told(tmp_path: Path) -> None:
    path = tmp_path / "enclave.eif"
    path.write_bytes(PLAIN)
    told: list[tuple[int, int]] = []
    assert read_image(path, progress=lambda done, total: told.append((done, total))) == read(PLAIN)
    assert told == sorted(told)
    assert told[-1] == (len(PLAIN), len(PLAIN))


@pytest.mark.parametrize("name", ["absent.eif", "."])
def test_a_file_that_cannot_be_read_is_a_typed_error(tmp_path: Path, name: str) -> None:
    with pytest.raises(ImageError) as caught:
        read_image(tmp_path / name)
    assert (caught.value.code, caught.value.exit_code) == ("unreadable_image", 2)


class _Trickle(io.RawIOBase):
    """A pipe: it gives what it has, and cannot seek."""

    def __init__(self, data: bytes) -> None:
        self._left = data

    def readinto(self, buffer: Buffer, /) -> int:
        view = memoryview(buffer)
        size = min(len(view), 7, len(self._left))
        view[:size], self._left = self._left[:size], self._left[size:]
        return size


def test_short_reads_are_no_end() -> None:
    assert measure_image(_Trickle(WITH_SIGNATURE)) == read(WITH_SIGNATURE)  # type: ignore[arg-type]  # as much as is used


class _Sparse(io.RawIOBase):
    """An image with one long ramdisk of zeros, which is nowhere in memory."""

    def __init__(self, size: int) -> None:
        made = image(ramdisks=[b"boot", b""])
        last = len(made.parts) - 1
        lying = replace(made, parts=(*made.parts[:-1], Part(RAMDISK, b"", size=size)), sizes={last: size})
        self._head, self._zeros = io.BytesIO(lying.encode()), size

    def readinto(self, buffer: Buffer, /) -> int:
        view = memoryview(buffer)
        if size := self._head.readinto(view):
            return size
        size = min(len(view), self._zeros)
        self._zeros -= size
        view[:size] = bytes(size)
        return size


def test_memory_does_not_grow_with_the_image() -> None:
    size = 64 << 20
    tracemalloc.start()
    try:
        with pytest.raises(ImageError) as caught:
            measure_image(_Sparse(size))  # type: ignore[arg-type]  # as much as is used
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert caught.value.code == "wrong_crc"  # read to the end
    assert peak < (BUFFERS + 4) * CHUNK_SIZE


# --- One lie each
# ------------------------------------------------------------------------------------------------


def without(kind: int) -> Eif:
    return replace(GOOD, parts=tuple(part for part in GOOD.parts if part.kind != kind))


def ordered(*kinds: int) -> Eif:
    by_kind = {part.kind: part for part in GOOD.parts}
    return replace(GOOD, parts=tuple(by_kind[kind] for kind in kinds))


def lying_part(*, kind: int = KERNEL, flags: int = 0, size: int | None = None) -> Eif:
    """With a lie in the kernel's section header."""
    return replace(GOOD, parts=(Part(kind, GOOD.parts[0].data, flags, size), *GOOD.parts[1:]))


def larger(kind: int, size: int) -> Eif:
    return GOOD.having(Part(kind, b"x" * size))


LIES: dict[str, tuple[Callable[[], Eif | bytes], str, str]] = {
    "empty": (lambda: b"", "truncated_eif", "ends"),
    "another format": (lambda: b"PK\x03\x04" + bytes(600), "not_eif", "begins otherwise"),
    "another magic": (lambda: replace(GOOD, magic=b".EIF"), "not_eif", "not an enclave image"),
    "version 2": (lambda: image(version=2), "unsupported_eif", "version"),
    "version 5": (lambda: replace(GOOD, version=5), "unsupported_eif", "version"),
    "another flag": (lambda: replace(GOOD, flags=2), "unsupported_eif", "flags"),
    "reserved field": (lambda: replace(GOOD, reserved=1), "malformed_eif", "reserved"),
    "unused field": (lambda: replace(GOOD, unused=1), "malformed_eif", "reserved"),
    "no sections": (lambda: Eif(()), "malformed_eif", "number of sections"),
    "two sections": (lambda: ordered(KERNEL, CMDLINE), "malformed_eif", "number of sections"),
    "33 sections": (lambda: image(ramdisks=[b"x"] * 30), "malformed_eif", "number of sections"),
    "65,535 sections": (lambda: replace(GOOD, count=65_535), "malformed_eif", "number of sections"),
    "fewer sections than there are": (lambda: replace(GOOD, count=5), "malformed_eif", "table"),
    "more sections than there are": (lambda: replace(GOOD, count=7), "malformed_eif", "section 6"),
    "a section more in the table": (
        lambda: replace(GOOD, count=7, offsets={6: len(PLAIN)}),
        "truncated_eif",
        "ends too early",
    ),
    "an offset behind the last": (lambda: replace(GOOD, offsets={31: 1}), "malformed_eif", "table"),
    "a size behind the last": (lambda: replace(GOOD, sizes={6: 1}), "malformed_eif", "table"),
    "first offset": (lambda: replace(GOOD, offsets={0: 549}), "malformed_eif", "section 0"),
    "two offsets swapped": (lambda: replace(GOOD, offsets={4: 1000, 5: 900}), "malformed_eif", "section 4"),
    "offset of 2^64-1": (lambda: replace(GOOD, offsets={3: 2**64 - 1}), "malformed_eif", "section 3"),
    "size in the table": (lambda: replace(GOOD, sizes={5: 12}), "malformed_eif", "another size"),
    "size in the section": (lambda: lying_part(size=7), "malformed_eif", "another size"),
    "size of 2^64-1 in both": (
        lambda: replace(GOOD, parts=(*GOOD.parts[:-1], Part(RAMDISK, b"", size=2**64 - 1)), sizes={5: 2**64 - 1}),
        "truncated_eif",
        "ends too early",
    ),
    "section flags": (lambda: lying_part(flags=1), "malformed_eif", "reserved"),
    "type 0": (lambda: lying_part(kind=0), "malformed_eif", "type"),
    "type 6": (lambda: lying_part(kind=6), "malformed_eif", "type"),
    "no kernel": (lambda: without(KERNEL), "wrong_sections", "before KERNEL"),
    "no command line": (lambda: without(CMDLINE), "wrong_sections", "before CMDLINE"),
    "no ramdisk": (lambda: without(RAMDISK), "wrong_sections", "no RAMDISK"),
    "no metadata": (lambda: without(METADATA), "wrong_sections", "no METADATA"),
    "metadata in version 3": (lambda: replace(GOOD, version=3), "wrong_sections", "not of version 3"),
    "two kernels": (lambda: ordered(KERNEL, KERNEL, CMDLINE, METADATA, RAMDISK), "wrong_sections", "another KERNEL"),
    "two command lines": (
        lambda: ordered(KERNEL, CMDLINE, RAMDISK, METADATA, CMDLINE),
        "wrong_sections",
        "another CMDLINE",
    ),
    "two sets of metadata": (
        lambda: ordered(METADATA, KERNEL, CMDLINE, METADATA, RAMDISK),
        "wrong_sections",
        "another METADATA",
    ),
    "two signatures": (
        lambda: replace(SIGNED, parts=(*SIGNED.parts, SIGNED.parts[-1])),
        "wrong_sections",
        "another SIGNATURE",
    ),
    "command line before the kernel": (
        lambda: ordered(CMDLINE, KERNEL, RAMDISK, METADATA),
        "wrong_sections",
        "CMDLINE comes before KERNEL",
    ),
    "ramdisk before the command line": (
        lambda: ordered(KERNEL, RAMDISK, CMDLINE, METADATA),
        "wrong_sections",
        "RAMDISK comes before CMDLINE",
    ),
    "wrong CRC": (lambda: replace(GOOD, crc=0), "wrong_crc", "damaged"),
    "a byte behind the end": (lambda: PLAIN + b"\0", "trailing_bytes", "bytes follow"),
    "a section behind the end": (lambda: PLAIN + GOOD.parts[0].encode(), "trailing_bytes", "bytes follow"),
    "command line of 2,048 bytes": (lambda: larger(CMDLINE, 2048), "malformed_eif", "too large"),
    "command line with NUL": (lambda: GOOD.having(Part(CMDLINE, b"quiet\0init=/sh")), "bad_cmdline", "no line"),
    "command line of two lines": (lambda: GOOD.having(Part(CMDLINE, b"quiet\n")), "bad_cmdline", "no line"),
    "command line that is not ASCII": (lambda: GOOD.having(Part(CMDLINE, "ä".encode())), "bad_cmdline", "no line"),
    "metadata of 256 KiB and one": (lambda: larger(METADATA, (256 << 10) + 1), "malformed_eif", "too large"),
    "signature of 32 KiB and one": (lambda: larger(SIGNATURE, 32_769), "malformed_eif", "too large"),
}


@pytest.mark.parametrize("name", LIES)
def test_an_image_that_lies_is_refused(name: str) -> None:
    make, code, said = LIES[name]
    made = make()
    error = refused(made.encode() if isinstance(made, Eif) else made)
    assert (error.code, error.exit_code) == (code, 2)
    assert said in error.message
    assert str(error).isprintable()


def test_expected_and_got_are_said() -> None:
    error = refused(replace(GOOD, offsets={0: 549}).encode())
    assert (error.expected, error.got, error.offset) == ("548", "549", 28)
    error = refused(PLAIN[:600])
    assert (error.expected, error.got, error.offset) == ("at least 649 bytes", "600 bytes", 600)


@pytest.mark.parametrize("size", [0, 2047])
def test_a_command_line_of_any_length_that_linux_takes(size: int) -> None:
    assert read(larger(CMDLINE, size).encode()).cmdline == "x" * size


def test_the_most_sections_are_read() -> None:
    assert len(read(image(ramdisks=[b"x"] * 29).encode()).sections) == 32


def test_every_truncation_is_a_typed_error() -> None:
    for size in range(len(WITH_SIGNATURE)):
        assert refused(WITH_SIGNATURE[:size]).code == "truncated_eif"


def test_every_changed_byte_is_an_error() -> None:
    # A CRC-32 sees every change of up to 32 bits in a row, its own included.
    for at in range(len(PLAIN)):
        damaged = bytearray(PLAIN)
        damaged[at] ^= 1 << at % 8
        refused(bytes(damaged))


@given(st.data())
def test_changed_bytes_are_an_error_and_never_other_measurements(data: st.DataObject) -> None:
    damaged = bytearray(WITH_SIGNATURE)
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, len(damaged) - 1))
        damaged[at : at + data.draw(st.integers(0, 2))] = data.draw(st.binary(max_size=2))
    if damaged != WITH_SIGNATURE:
        refused(bytes(damaged))


@given(
    st.binary(max_size=50),
    st.text("abc=. ", max_size=50),
    st.lists(st.binary(max_size=50), min_size=1, max_size=5),
    st.booleans(),
)
def test_every_image_is_measured_as_the_writer_says(
    kernel: bytes, cmdline: str, ramdisks: list[bytes], signed: bool
) -> None:
    made = image(ramdisks=ramdisks).having(Part(KERNEL, kernel)).having(Part(CMDLINE, cmdline.encode()))
    found = read((made.signed() if signed else made).encode())
    assert found.measurements == PcrSet(*made.registers(), Signer().pcr8() if signed else None)


# --- Metadata
# ------------------------------------------------------------------------------------------------

FIELDS = eif_files.METADATA_FIELDS
BUILD = FIELDS["BuildMetadata"]
assert isinstance(BUILD, dict)


def metadata(value: object) -> Eif:
    return GOOD.having(Part(METADATA, value if isinstance(value, bytes) else json.dumps(value).encode()))


def nested(depth: int) -> bytes:
    """A document of so many levels."""
    inner = b"[" * (depth - 1) + b"]" * (depth - 1)
    return (
        json.dumps({**FIELDS, "CustomMetadata": 0})
        .encode()
        .replace(b'"CustomMetadata": 0', b'"CustomMetadata": ' + inner)
    )


BAD_METADATA: dict[str, tuple[object, str]] = {
    "empty": (b"", "strict JSON"),
    "not UTF-8": (b'"\xff"', "strict JSON"),
    "UTF-16": (json.dumps(FIELDS).encode("utf-16"), "strict JSON"),
    "byte order mark": (b"\xef\xbb\xbf" + json.dumps(FIELDS).encode(), "strict JSON"),
    "trailing text": (json.dumps(FIELDS).encode() + b"{}", "strict JSON"),
    "a key twice": (json.dumps(FIELDS).encode()[:-1] + b', "ImageName": "x"}', "a key stands twice"),
    "NaN": (metadata({**FIELDS, "CustomMetadata": float("nan")}).parts[2].data, "strict JSON"),
    "infinity": (json.dumps(FIELDS).encode().replace(b"1.5", b"1e999"), "strict JSON"),
    "lone surrogate": ({**FIELDS, "CustomMetadata": "\ud800"}, "strict JSON"),
    "5,000 digits": (json.dumps(FIELDS).encode().replace(b"1.5", b"1" * 5000), "strict JSON"),
    "33 levels": (nested(33), "nested more than 32 deep"),
    "100,000 levels": (b"[" * 100_000 + b"]" * 100_000, "strict JSON"),
    "an array": ([FIELDS], "fields of an image"),
    "no name": ({name: value for name, value in FIELDS.items() if name != "ImageName"}, "ImageName"),
    "a version that is a number": ({**FIELDS, "ImageVersion": 1}, "ImageVersion"),
    "no DockerInfo": ({name: value for name, value in FIELDS.items() if name != "DockerInfo"}, "fields of an image"),
    "no BuildMetadata": ({**FIELDS, "BuildMetadata": None}, "fields of an image"),
    "no build time": ({**FIELDS, "BuildMetadata": {**BUILD, "BuildTime": None}}, "BuildTime"),
}


@pytest.mark.parametrize("name", BAD_METADATA)
def test_metadata_that_aws_could_not_read_is_refused(name: str) -> None:
    value, said = BAD_METADATA[name]
    error = refused(metadata(value).encode())
    assert error.code == "malformed_metadata"
    assert said in error.message
    assert str(error).isprintable()


def test_metadata_of_32_levels_and_of_any_other_field_is_read() -> None:
    assert read(metadata(nested(32)).encode()).metadata is not None
    found = read(metadata({**FIELDS, "CustomMetadata": {"a": [1, 1.5, True, None, "ä"]}, "Else": 1}).encode())
    assert found.metadata is not None
    assert found.metadata["CustomMetadata"] == {"a": [1, 1.5, True, None, "ä"]}


# --- Signatures
# ------------------------------------------------------------------------------------------------

CURVES = [ec.SECP256R1(), ec.SECP384R1(), ec.SECP521R1()]
PCR0 = GOOD.registers()[0]


@pytest.mark.parametrize("curve", CURVES, ids=lambda curve: curve.name)
def test_a_signed_image_has_its_signer_and_pcr8(curve: ec.EllipticCurve) -> None:
    signer = Signer(curve)
    found = read(GOOD.signed(signer).encode())
    assert found.measurements == PcrSet(*GOOD.registers(), signer.pcr8())
    assert found.signer is not None
    assert found.signer.subject == "CN=A release engineer"
    assert (found.signer.not_before, found.signer.not_after) == (signer.not_before, signer.not_after)
    assert found.signer.key == signer.key.public_key()
    assert found.signer.pcr8 == signer.pcr8()


def test_the_certificates_period_is_judged_at_a_time_alone() -> None:
    period = {"not_before": NOW, "not_after": NOW + timedelta(hours=1)}
    data = GOOD.signed(replace(Signer(), **period)).encode()  # type: ignore[arg-type]  # both are times
    second = timedelta(seconds=1)
    assert read(data).signer is not None
    for at in (NOW, NOW + timedelta(hours=1)):
        assert measure_image(io.BytesIO(data), at=at) == read(data)
    for at in (NOW - second, NOW + timedelta(hours=1) + second):
        with pytest.raises(ImageError) as caught:
            measure_image(io.BytesIO(data), at=at)
        assert caught.value.code == "signer_not_valid"
        assert caught.value.got == at.isoformat()
    assert measure_image(io.BytesIO(PLAIN), at=NOW).signer is None


def test_a_name_cannot_move_a_terminals_cursor() -> None:
    signer = read(GOOD.signed(Signer(name="A\x1b[2J\nB")).encode()).signer
    assert signer is not None
    assert signer.subject.isprintable()
    assert "A\\x1b[2J\\nB" in signer.subject


@pytest.mark.parametrize("label", [b"CERTIFICATE", b"TRUSTED CERTIFICATE", b"EC PARAMETERS"])
@pytest.mark.parametrize("first", [True, False])
def test_of_two_blocks_none_is_the_signer(label: bytes, first: bool) -> None:
    """Tools differ in which of them they take, and PCR8 would with them."""
    other = eif_files.certificate(private_key("another"), "another").replace(b"CERTIFICATE", label)
    mine = Signer().pem()
    section = eif_files.section(mine + other if first else other + mine, Signer().sign1(PCR0))
    with pytest.raises(ImageError) as caught:
        read(GOOD.having(Part(SIGNATURE, section)).encode())
    assert (caught.value.code, caught.value.got) == ("malformed_signature", "2 blocks of PEM")


def signature(entry: object) -> Callable[[], bytes]:
    return lambda: cbor2.dumps([entry])


def with_sign1(value: object) -> Callable[[], bytes]:
    return lambda: eif_files.section(Signer().pem(), cbor2.dumps(value))


def part_of_sign1(index: int, value: object) -> Callable[[], bytes]:
    def make() -> bytes:
        parts = cbor2.loads(Signer().sign1(PCR0))
        parts[index] = value
        return eif_files.section(Signer().pem(), cbor2.dumps(parts))

    return make


def signed_by(signer: Signer, pcr0: bytes = PCR0) -> Callable[[], bytes]:
    return lambda: signer.section(pcr0)


def certified_by(pem: Callable[[], bytes]) -> Callable[[], bytes]:
    return lambda: eif_files.section(pem(), Signer().sign1(PCR0))


def changed_certificate(old: str, new: str) -> Callable[[], bytes]:
    def make() -> bytes:
        der = x509.load_pem_x509_certificate(Signer().pem()).public_bytes(Encoding.DER)
        assert der.count(bytes.fromhex(old)) == 1
        der = der.replace(bytes.fromhex(old), bytes.fromhex(new))
        return b"-----BEGIN CERTIFICATE-----\n" + base64.encodebytes(der) + b"-----END CERTIFICATE-----\n"

    return certified_by(make)


GOOD_ENTRY = {"signing_certificate": [1], "signature": [1]}
BAD_SIGNATURES: dict[str, tuple[Callable[[], bytes], str]] = {
    "empty": (lambda: b"", "malformed_signature"),
    "trailing bytes": (lambda: Signer().section(PCR0) + b"\0", "malformed_signature"),
    "no array": (lambda: cbor2.dumps(GOOD_ENTRY), "malformed_signature"),
    "no entry": (lambda: cbor2.dumps([]), "malformed_signature"),
    "two entries": (signed_by(Signer(entries=2)), "malformed_signature"),
    "entry that is no map": (signature(1), "malformed_signature"),
    "unknown field": (signature({**GOOD_ENTRY, "x": 1}), "malformed_signature"),
    "missing field": (signature({"signature": [1]}), "malformed_signature"),
    "byte string": (signature({**GOOD_ENTRY, "signing_certificate": Signer().pem()}), "malformed_signature"),
    "integer of 256": (signature({**GOOD_ENTRY, "signing_certificate": [256]}), "malformed_signature"),
    "integer of -1": (signature({**GOOD_ENTRY, "signing_certificate": [-1]}), "malformed_signature"),
    "text for an integer": (signature({**GOOD_ENTRY, "signing_certificate": ["a"]}), "malformed_signature"),
    "no certificate": (signature(GOOD_ENTRY), "malformed_signature"),
    "PEM of nothing": (
        certified_by(lambda: b"-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n"),
        "malformed_signature",
    ),
    "certificate of version 5": (changed_certificate("a003020102", "a003020104"), "malformed_signature"),
    "serial number 0": (changed_certificate("a003020102020101", "a003020102020100"), "malformed_signature"),
    "curve of no name": (changed_certificate("2b81040022", "2b8104007f"), "malformed_signature"),
    "month 99": (changed_certificate(b"260331".hex(), b"269931".hex()), "malformed_signature"),
    "Ed25519": (
        certified_by(lambda: eif_files.certificate(ed25519.Ed25519PrivateKey.from_private_bytes(bytes(32)), "x")),
        "malformed_signature",
    ),
    "secp256k1": (
        certified_by(lambda: eif_files.certificate(private_key("x", ec.SECP256K1()), "x")),
        "malformed_signature",
    ),
    "COSE that is no CBOR": (lambda: eif_files.section(Signer().pem(), b"\xff"), "malformed_signature"),
    "COSE that is no array": (with_sign1({}), "malformed_signature"),
    "COSE of three": (with_sign1([b"\xa1\x01\x38\x22", {}, b""]), "malformed_signature"),
    "tagged COSE": (
        lambda: eif_files.section(Signer().pem(), b"\xd2" + Signer().sign1(PCR0)),
        "malformed_signature",
    ),
    "algorithm of another curve": (signed_by(Signer(protected=cbor2.dumps({1: -7}))), "malformed_signature"),
    "no algorithm": (signed_by(Signer(protected=b"")), "malformed_signature"),
    "more in the header": (signed_by(Signer(protected=cbor2.dumps({1: -35, 4: 1}))), "malformed_signature"),
    "unprotected header": (signed_by(Signer(unprotected={4: 1})), "malformed_signature"),
    "unprotected that is no map": (part_of_sign1(1, None), "malformed_signature"),
    "payload absent": (part_of_sign1(2, None), "malformed_signature"),
    "signature of 95 bytes": (part_of_sign1(3, bytes(95)), "malformed_signature"),
    "signature of 97 bytes": (part_of_sign1(3, bytes(97)), "malformed_signature"),
    "PCR0 of another image": (signed_by(Signer(), image(ramdisks=[b"x"]).registers()[0]), "wrong_payload"),
    "another register": (signed_by(Signer(index=1)), "wrong_payload"),
    "register as a byte string": (
        part_of_sign1(2, cbor2.dumps({"register_index": 0, "register_value": PCR0})),
        "wrong_payload",
    ),
    "signature of zeros": (part_of_sign1(3, bytes(96)), "bad_signature"),
    "signature of ones": (part_of_sign1(3, b"\xff" * 96), "bad_signature"),
    "another's certificate": (
        certified_by(lambda: eif_files.certificate(private_key("another"), "another")),
        "bad_signature",
    ),
}


@pytest.mark.parametrize("name", BAD_SIGNATURES)
def test_a_signature_that_does_not_hold_is_an_error(name: str) -> None:
    make, code = BAD_SIGNATURES[name]
    error = refused(GOOD.having(Part(SIGNATURE, make())).encode())
    assert error.code == code
    assert str(error).isprintable()


def test_a_signature_moved_to_another_image_is_an_error() -> None:
    other = image(ramdisks=[b"init and nsm.ko", b"another rootfs"]).having(SIGNED.parts[-1])
    assert refused(other.encode()).code == "wrong_payload"


# --- Known answers
# ------------------------------------------------------------------------------------------------

EMPTY_PCR2 = "21b9efbc184807662e966d34f390821309eeac6802309798826296bf3e8bec7c10edb30948c90ba67310f7b964fc500a"
"""As AWS's modules signed it, of images with one ramdisk."""
INSTANCE = "i-026ae32a18c80f866"
INSTANCE_PCR4 = "6e32db11ec7af5927b05c4d9059edfae96f45f50f8b54f59f19f0a093db9085049b01a9759cacbc5922db5aaba0be067"
"""As AWS's module signed it in 2021 on that instance."""
OWN_PCR8 = "eb55f1c0dd1757df2e6411ab905bb0edee56828967d7ff46c07304ace215291ee6d6398dfea7fb243e07c3ca57c679f5"
"""By OpenSSL, of a certificate of our own: the SHA-384 of its DER behind 48 zero bytes, hashed once more."""
OWN_SIGNER = Path(__file__).parents[1] / "vectors/eif/signed-p384.json"


def test_the_registers_that_are_known_without_any_file() -> None:
    assert read(image(ramdisks=[b"everything"]).encode()).measurements.pcr2.hex() == EMPTY_PCR2
    assert once_extended(INSTANCE.encode("ascii")).hex() == INSTANCE_PCR4
    parts = json.loads(OWN_SIGNER.read_text())["parts"]
    certificate = parts["signer"][parts["signer"].index("-----BEGIN CERTIFICATE") :]
    assert SigningCertificate.from_pem(certificate.encode()).pcr8.hex() == OWN_PCR8
    signed = read_image(OWN_SIGNER.with_suffix(".eif")).measurements
    assert signed.pcr8 is not None
    assert signed.pcr8.hex() == OWN_PCR8


needs_vectors = pytest.mark.skipif(
    not VECTORS.is_dir(), reason="AWS's collected documents are not beside this repository: ../shared/vectors/nitro"
)


@needs_vectors
def test_pcr2_of_an_image_without_an_application_ramdisk_is_that_of_real_documents() -> None:
    answers = json.loads((VECTORS / "pcr-known-answers.json").read_text())
    found = read(image(ramdisks=[b"everything"]).encode()).measurements
    assert found.pcr2.hex() == answers["pcr2_without_application_ramdisk"]["value"]
    assert found.pcr0 == found.pcr1


@needs_vectors
def test_pcr8_of_a_real_signing_certificate_is_that_of_its_document() -> None:
    for answer in json.loads((VECTORS / "pcr-known-answers.json").read_text())["pcr8"]:
        der = (VECTORS / answer["certificate"]).read_bytes()
        pem = x509.load_der_x509_certificate(der).public_bytes(Encoding.PEM)
        signer = SigningCertificate.from_pem(pem)
        assert signer.der == der
        assert signer.pcr8.hex() == answer["pcr8"]


# --- What nitro-cli prints
# ------------------------------------------------------------------------------------------------

REGISTERS = {"PCR0": "0a" * 48, "PCR1": "0b" * 48, "PCR2": "0c" * 48}
PRINTED = {"HashAlgorithm": "Sha384 { ... }", **REGISTERS}


def printed(fields: object) -> bytes:
    return json.dumps({"Measurements": fields}, indent=2).encode()


def test_build_output_is_read() -> None:
    registers = PcrSet(b"\x0a" * 48, b"\x0b" * 48, b"\x0c" * 48)
    assert measurements_from_nitro_cli(printed(PRINTED)) == registers
    assert measurements_from_nitro_cli(printed({**PRINTED, "PCR0": "0A" * 48})) == registers
    assert measurements_from_nitro_cli(printed({**PRINTED, "PCR8": "0d" * 48})) == replace(registers, pcr8=b"\x0d" * 48)


DESCRIBED = {
    "EnclaveName": "x",
    "EnclaveID": "i-0-enc0",
    "State": "RUNNING",
    "Flags": "DEBUG_MODE",
    "Measurements": PRINTED,
}
BAD_OUTPUT: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "malformed_measurements"),
    "text before it": (b"Start building the Enclave Image...\n" + printed(PRINTED), "malformed_measurements"),
    "a key twice": (
        b'{"Measurements": {"PCR0": "", %s' % json.dumps(PRINTED).encode()[1:] + b"}",
        "malformed_measurements",
    ),
    "too large": (printed(PRINTED) + b" " * (256 << 10), "malformed_measurements"),
    "a number": (b"1", "malformed_measurements"),
    "no measurements": (b"{}", "malformed_measurements"),
    "measurements that are no object": (printed([]), "malformed_measurements"),
    "describe-eif": (json.dumps({"EifVersion": 4, "Measurements": PRINTED}).encode(), "malformed_measurements"),
    "no PCR2": (printed({**PRINTED, "PCR2": None}), "malformed_measurements"),
    "PCR2 missing": (printed({"HashAlgorithm": "Sha384 { ... }", "PCR0": "0a" * 48}), "malformed_measurements"),
    "PCR4": (printed({**PRINTED, "PCR4": "0a" * 48}), "malformed_measurements"),
    "47 bytes": (printed({**PRINTED, "PCR1": "0a" * 47}), "malformed_measurements"),
    "a space": (printed({**PRINTED, "PCR1": "0a" * 47 + " a"}), "malformed_measurements"),
    "a line's end": (printed({**PRINTED, "PCR1": "0a" * 48 + "\n"}), "malformed_measurements"),
    "digits of another script": (printed({**PRINTED, "PCR1": "٠" * 96}), "malformed_measurements"),
    "PCR8 null": (printed({**PRINTED, "PCR8": None}), "malformed_measurements"),
    "SHA-256": (printed({**PRINTED, "HashAlgorithm": "Sha256 { ... }"}), "unknown_hash"),
    "no hash": (printed({**PRINTED, "HashAlgorithm": None}), "unknown_hash"),
    "zero": (printed({**PRINTED, "PCR0": "00" * 48}), "not_reference_values"),
    "describe-enclaves": (json.dumps([{**DESCRIBED, "Metadata": {"a": True}}]).encode(), "not_reference_values"),
    "describe-enclaves, none": (b"[]", "not_reference_values"),
    "one of describe-enclaves": (json.dumps(DESCRIBED).encode(), "not_reference_values"),
    "its identifier": (json.dumps({"EnclaveID": "x", "Measurements": PRINTED}).encode(), "not_reference_values"),
    "its flags": (json.dumps({"Flags": "NONE", "Measurements": PRINTED}).encode(), "not_reference_values"),
}


@pytest.mark.parametrize("name", BAD_OUTPUT)
def test_output_that_is_no_reference_is_refused(name: str) -> None:
    text, code = BAD_OUTPUT[name]
    with pytest.raises(ImageError) as caught:
        measurements_from_nitro_cli(text)
    assert caught.value.code == code
    assert str(caught.value).isprintable()


def test_a_register_is_never_zero() -> None:
    assert ZERO_PCR not in read(WITH_SIGNATURE).measurements.as_registers().values()
    assert read(image(ramdisks=[b""]).encode()).measurements.pcr2 == once_extended(hashlib.sha384(b"").digest())
