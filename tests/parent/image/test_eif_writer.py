"""Images as they are written: three readers find what was meant, byte for byte, and a failure leaves nothing."""

from __future__ import annotations

import hashlib
import io
import json
import os
import subprocess
import sys
import tracemalloc
from collections.abc import Callable, Sequence
from dataclasses import replace
from io import BytesIO
from pathlib import Path
from typing import Any, BinaryIO

import pytest
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from hypothesis import given
from hypothesis import strategies as st

from attestation.eif import Architecture, ImageError, SectionType
from attestation.measure import measure_image, read_image
from attestation.reference import PcrSet, once_extended
from attestation.release_signing import LocalSigner
from parent.image.eif_writer import ImageMetadata, replacing, sign_image, write_image
from parent.image.ramdisks import boot_ramdisk, customer_ramdisk
from parent.image.signature import ImageSigner, make_certificate
from parent.image.tree import Directory, File, ImageBuildError, Tree
from tests import eif_files
from tests.parent.image.independent import (
    CMDLINE_TEXT,
    arm64_image,
    bzimage,
    read_by_table,
    read_in_order,
    unpack,
)
from tests.parent.image.test_cpio import trees
from tests.pki.forge import NOW, private_key

REPOSITORY = Path(__file__).resolve().parents[3]
EMPTY_PCR2 = "21b9efbc184807662e966d34f390821309eeac6802309798826296bf3e8bec7c10edb30948c90ba67310f7b964fc500a"
"""Of real documents, from enclaves with one ramdisk."""
METADATA = ImageMetadata(
    name="strongroom", version="1.0", built_at=1_772_366_400, tool_version="0.1.0", kernel_version="6.12.9"
)
BOOT = boot_ramdisk(init=b"init", cmdline=CMDLINE_TEXT)
CUSTOMER = customer_ramdisk(Tree.of([File.holding("bin/app", b"an application", 0o755)]), cmd=["/bin/app"])
KEY = private_key("image signer")
SIGNER = ImageSigner.from_pem(
    KEY.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()), make_certificate(KEY, "Releases", NOW, 30)
)


def build(out: BinaryIO, **changes: Any) -> PcrSet:
    parts: dict[str, Any] = {
        "kernel": bzimage(),
        "cmdline": CMDLINE_TEXT,
        "ramdisks": [BOOT, CUSTOMER],
        "metadata": METADATA,
        "architecture": Architecture.X86_64,
    }
    return write_image(out, **{**parts, **changes})


def built(**changes: Any) -> tuple[bytes, PcrSet]:
    out = BytesIO()
    pcrs = build(out, **changes)
    return out.getvalue(), pcrs


def refused(code: str, make: Callable[[], object]) -> ImageBuildError:
    with pytest.raises(ImageBuildError) as caught:
        make()
    assert caught.value.code == code
    assert str(caught.value).isprintable()
    return caught.value


# --- What readers find ---------------------------------------------------------------------------------------------


@given(
    st.binary(max_size=40),
    st.text(st.characters(min_codepoint=32, max_codepoint=126), max_size=40),
    st.lists(trees, min_size=1, max_size=4),
    st.sampled_from([None, SIGNER]),
)
def test_all_readers_find_what_was_meant(
    code: bytes, cmdline: str, ramdisks: list[Tree], signer: ImageSigner | None
) -> None:
    image, pcrs = built(kernel=bzimage(code), cmdline=cmdline, ramdisks=ramdisks, signer=signer)
    ours = measure_image(BytesIO(image), at=NOW)
    in_order, by_table = read_in_order(image), read_by_table(image)
    assert in_order == by_table
    assert pcrs == ours.measurements
    assert {index: value.hex() for index, value in pcrs.as_registers().items() if index < 3} == in_order.pcrs
    assert pcrs.pcr8 == (None if signer is None else signer.certificate.pcr8)
    assert ours.signer == (None if signer is None else signer.certificate)
    ours.require_boundary()
    kernel, line, metadata, *rest = in_order.sections
    assert (kernel[1], line[1].decode(), metadata[1]) == (bzimage(code), cmdline, METADATA.encode())
    for tree, (_, data) in zip(ramdisks, rest, strict=False):
        assert set(unpack(data)) == {path.encode() for path in tree}


def test_it_is_the_file_of_another_writer() -> None:
    image, pcrs = built()
    sections = read_in_order(image).sections
    other = eif_files.Eif(tuple(eif_files.Part(kind, data) for kind, data in sections))
    assert other.encode() == image
    assert other.registers() == (pcrs.pcr0, pcrs.pcr1, pcrs.pcr2)


def test_sections_stand_in_the_order_of_aws() -> None:
    image, _ = built(signer=SIGNER)
    assert [section.type.name for section in measure_image(BytesIO(image)).sections] == [
        *("KERNEL", "CMDLINE", "METADATA", "RAMDISK", "RAMDISK", "SIGNATURE")
    ]


def test_header_defaults() -> None:
    read = measure_image(BytesIO(built()[0]))
    assert (read.version, read.default_memory, read.default_cpus) == (4, 1 << 30, 2)


def test_one_ramdisk_leaves_the_register_of_nothing() -> None:
    _, pcrs = built(ramdisks=[BOOT])
    assert pcrs.pcr2.hex() == EMPTY_PCR2
    assert pcrs.pcr0 == pcrs.pcr1


def test_the_signers_register_is_over_the_certificate() -> None:
    _, pcrs = built(signer=SIGNER)
    assert pcrs.pcr8 == once_extended(hashlib.sha384(SIGNER.certificate.der).digest())
    assert replace(pcrs, pcr8=None) == built()[1]


def test_an_image_for_aarch64() -> None:
    image, _ = built(kernel=arm64_image(), architecture=Architecture.AARCH64)
    assert measure_image(BytesIO(image)).architecture is Architecture.AARCH64
    assert read_by_table(image) == read_in_order(image)


def test_progress_is_told_to_the_end() -> None:
    told: list[tuple[int, int]] = []
    image, _ = built(signer=SIGNER, progress=lambda done, total: told.append((done, total)))
    assert told == sorted(told)
    assert told[-1] == (len(image), len(image))


# --- The parts -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kernel", "architecture"),
    [
        (b"", Architecture.X86_64),
        (b"MZ" + bytes(2000), Architecture.X86_64),
        (arm64_image(), Architecture.X86_64),
        (bzimage(), Architecture.AARCH64),
        (b"", Architecture.AARCH64),
        (bzimage() + b" quiet", Architecture.X86_64),
        (bzimage()[:-1], Architecture.X86_64),
    ],
)
def test_a_kernel_that_is_none_or_that_is_not_as_long_as_it_says(kernel: bytes, architecture: Architecture) -> None:
    out = BytesIO()
    refused("bad_kernel", lambda: build(out, kernel=kernel, architecture=architecture))
    assert out.getvalue() == b""


def test_what_may_move_between_kernel_and_command_line_is_refused() -> None:
    """Both files would have the same registers: PITFALLS, "no boundary in the measurement"."""
    refused("bad_kernel", lambda: build(BytesIO(), kernel=bzimage() + b"init=/evil ", cmdline="quiet"))
    refused("bad_kernel", lambda: build(BytesIO(), kernel=bzimage()[:-4], cmdline="quiet"))


@pytest.mark.parametrize("cmdline", ["é", "a\n", "a\0b", "\ud800", "\x7f"])
def test_a_command_line_that_is_none(cmdline: str) -> None:
    refused("bad_cmdline", lambda: build(BytesIO(), cmdline=cmdline))


def test_the_longest_command_line() -> None:
    assert measure_image(BytesIO(built(cmdline="x" * 2047)[0])).cmdline == "x" * 2047
    error = refused("bad_cmdline", lambda: build(BytesIO(), cmdline="x" * 2048))
    assert (error.expected, error.got) == ("at most 2047 bytes", "2048 bytes")


def test_the_number_of_ramdisks() -> None:
    empty = Tree.of([])
    image, _ = built(ramdisks=[empty] * 28, signer=SIGNER)
    assert len(measure_image(BytesIO(image)).sections) == 32
    refused("wrong_sections", lambda: build(BytesIO(), ramdisks=[empty] * 29, signer=SIGNER))
    refused("wrong_sections", lambda: build(BytesIO(), ramdisks=[empty] * 30))
    refused("wrong_sections", lambda: build(BytesIO(), ramdisks=[]))


def test_the_metadata() -> None:
    described = replace(METADATA, docker_info={"b": [1, 2.5], "a": "é"}, custom=None)
    assert json.loads(described.encode()) == {
        "ImageName": "strongroom",
        "ImageVersion": "1.0",
        "BuildMetadata": {
            "BuildTime": "2026-03-01T12:00:00+00:00",
            "BuildTool": "strongroom",
            "BuildToolVersion": "0.1.0",
            "OperatingSystem": "Linux",
            "KernelVersion": "6.12.9",
        },
        "DockerInfo": {"b": [1, 2.5], "a": "é"},
        "CustomMetadata": None,
    }
    assert described.encode().endswith(
        '"DockerInfo":{"a":"é","b":[1,2.5]},"ImageName":"strongroom","ImageVersion":"1.0"}'.encode()
    )
    image, _ = built(metadata=described)
    assert dict(measure_image(BytesIO(image)).metadata or {}) == json.loads(described.encode())


def nested(depth: int) -> Any:
    return [nested(depth - 1)] if depth else []


@pytest.mark.parametrize(
    "changes",
    [
        {"built_at": 10**20},
        {"built_at": -(10**20)},
        {"custom": float("nan")},
        {"custom": "\ud800"},
        {"custom": nested(40)},
        {"custom": "x" * (256 << 10)},
    ],
    ids=["late", "early", "nan", "surrogate", "deep", "long"],
)
def test_metadata_that_no_reader_takes(changes: dict[str, Any]) -> None:
    refused("bad_metadata", lambda: replace(METADATA, **changes).encode())


def test_a_file_that_changes_meanwhile() -> None:
    growing = Tree.of([File("a", 0o644, 2, lambda: BytesIO(b"abc"))])
    refused("changed_file", lambda: build(BytesIO(), ramdisks=[growing]))


def test_a_large_file_is_not_held() -> None:
    class Zeros(io.RawIOBase):
        left = 64 << 20

        def readable(self) -> bool:
            return True

        def read(self, size: int = -1) -> bytes:
            size = min(size, self.left)
            self.left -= size
            return bytes(size)

    class Nowhere(io.BytesIO):
        def write(self, data: Any) -> int:
            return len(data)

    large = Tree.of([File("a", 0o644, 64 << 20, Zeros)])  # type: ignore[arg-type]
    tracemalloc.start()
    try:
        build(Nowhere(), ramdisks=[BOOT, large])
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 8 << 20


# --- Signing later -------------------------------------------------------------------------------------------------


def test_signed_at_once_and_signed_later_are_one_file(tmp_path: Path) -> None:
    unsigned, pcrs = built()
    signed, signed_pcrs = built(signer=SIGNER)
    source, target = tmp_path / "a.eif", tmp_path / "b.eif"
    source.write_bytes(unsigned)
    assert sign_image(source, target, SIGNER) == signed_pcrs
    assert target.read_bytes() == signed
    assert source.read_bytes() == unsigned
    assert signed_pcrs == replace(pcrs, pcr8=SIGNER.certificate.pcr8)


def test_another_signature_takes_the_place_of_the_first(tmp_path: Path) -> None:
    path = tmp_path / "a.eif"
    path.write_bytes(built(signer=SIGNER)[0])
    other = eif_files.Signer(ec.SECP521R1())
    told: list[tuple[int, int]] = []
    pem = other.key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()) + other.pem()
    pcrs = sign_image(path, path, ImageSigner.from_pem(pem), progress=lambda *each: told.append(each))
    assert os.listdir(tmp_path) == ["a.eif"]
    assert pcrs.pcr8 == other.pcr8()
    image = path.read_bytes()
    assert told[-1] == (len(image), len(image))
    assert read_image(path).measurements == pcrs
    assert read_in_order(image) == read_by_table(image)
    parts = [eif_files.Part(kind, data) for kind, data in read_in_order(built()[0]).sections]
    assert eif_files.Eif(tuple(parts)).signed(other).encode() == image


@pytest.mark.parametrize("place", [0, 2, 4])
@pytest.mark.parametrize("version", [3, 4])
def test_a_signature_within_the_file_keeps_its_place(tmp_path: Path, place: int, version: int) -> None:
    plain = eif_files.image(version=version)
    old = eif_files.Part(eif_files.SIGNATURE, eif_files.Signer(name="An older key").section(plain.registers()[0]))
    parts = [*plain.parts[:place], old, *plain.parts[place:]]
    path, target = tmp_path / "a.eif", tmp_path / "b.eif"
    image = replace(plain, parts=tuple(parts), flags=eif_files.AARCH64, memory=5, cpus=7)
    path.write_bytes(image.encode())
    sign_image(path, target, SIGNER)
    new = eif_files.Part(eif_files.SIGNATURE, SIGNER.section(plain.registers()[0]))
    assert target.read_bytes() == image.having(new).encode()


def test_a_key_that_another_holds_signs_too(tmp_path: Path) -> None:
    (tmp_path / "a.eif").write_bytes(built()[0])
    remote = ImageSigner.from_signer(LocalSigner(KEY), make_certificate(KEY, "Releases", NOW, 30))
    assert sign_image(tmp_path / "a.eif", tmp_path / "b.eif", remote).pcr8 == SIGNER.certificate.pcr8
    assert read_image(tmp_path / "b.eif", at=NOW).signer == SIGNER.certificate


def test_what_is_no_good_image_is_not_signed(tmp_path: Path) -> None:
    image = eif_files.image()
    broken = {
        "not_eif": b"no image",
        "wrong_crc": replace(image, crc=1).encode(),
        "wrong_payload": image.having(
            eif_files.Part(eif_files.SIGNATURE, eif_files.Signer().section(bytes(48)))
        ).encode(),
    }
    for code, data in broken.items():
        (tmp_path / "a.eif").write_bytes(data)
        with pytest.raises(ImageError) as caught:
            sign_image(tmp_path / "a.eif", tmp_path / "b.eif", SIGNER)
        assert caught.value.code == code
    full = eif_files.image(ramdisks=[b"x"] * 29)
    (tmp_path / "a.eif").write_bytes(full.encode())
    refused("wrong_sections", lambda: sign_image(tmp_path / "a.eif", tmp_path / "b.eif", SIGNER))
    assert os.listdir(tmp_path) == ["a.eif"]


def test_an_image_that_changes_while_it_is_signed(tmp_path: Path) -> None:
    path = tmp_path / "a.eif"
    path.write_bytes(built(ramdisks=[BOOT, Tree.of([File.holding("a", bytes(1 << 20))])])[0])

    def change(done: int, total: int) -> None:
        with path.open("r+b") as file:
            file.seek(-1000, os.SEEK_END)
            file.write(b"changed")

    with pytest.raises(ImageError) as caught:
        sign_image(path, tmp_path / "b.eif", SIGNER, progress=change)
    assert caught.value.code == "changed_image"
    assert os.listdir(tmp_path) == ["a.eif"]


# --- Whole or absent -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("error", [OSError("disk full"), KeyboardInterrupt(), SystemExit(1)], ids=["os", "int", "exit"])
@pytest.mark.parametrize("before", [None, b"the image of yesterday"])
def test_a_failure_leaves_what_was_there(tmp_path: Path, error: BaseException, before: bytes | None) -> None:
    target = tmp_path / "enclave.eif"
    if before is not None:
        target.write_bytes(before)

    def fail() -> BinaryIO:
        assert len(os.listdir(tmp_path)) == (1 if before is None else 2)
        raise error

    with pytest.raises(type(error)), replacing(target) as out:
        build(out, ramdisks=[BOOT, Tree.of([File("a", 0o644, 1, fail)])])
    assert os.listdir(tmp_path) == ([] if before is None else ["enclave.eif"])
    assert before is None or target.read_bytes() == before


def test_the_target_is_replaced_at_the_end(tmp_path: Path) -> None:
    target = tmp_path / ("x" * 251 + ".eif")
    target.write_bytes(b"old")
    with replacing(target) as out:
        pcrs = build(out)
        assert target.read_bytes() == b"old"
    assert read_image(target).measurements == pcrs
    assert os.listdir(tmp_path) == [target.name]


def test_a_target_that_cannot_be(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    with pytest.raises(IsADirectoryError), replacing(tmp_path / "folder") as out:
        build(out)
    with pytest.raises(FileNotFoundError), replacing(tmp_path / "absent" / "a.eif"):
        pytest.fail("there is no such folder")
    assert os.listdir(tmp_path) == ["folder"]


# --- The same bytes ------------------------------------------------------------------------------------------------


BUILD = """
import hashlib, os, sys, tempfile
from pathlib import Path
from tests.parent.image.test_eif_writer import build, replacing, BOOT, SIGNER
from parent.image.ramdisks import customer_ramdisk
from parent.image.tree import Directory, File, Tree
order = int(sys.argv[1])
if os.getuid() == 0 and order < 0:
    os.setgid(65534)
    os.setuid(65534)
entries = [File.holding("b", b"2"), Directory("a", 0o700), File.holding("a/x", b"1", 0o755), File.holding("é", b"3")]
with tempfile.TemporaryDirectory() as folder:
    with replacing(Path(folder, "a.eif")) as out:
        build(out, ramdisks=[BOOT, customer_ramdisk(Tree.of(entries[::order]), cmd=["/a/x"])], signer=SIGNER)
    print(hashlib.sha256(Path(folder, "a.eif").read_bytes()).hexdigest())
"""


def test_time_umask_order_place_and_user_do_not_matter(tmp_path: Path) -> None:
    def digest(order: int, umask: int, zone: str, seed: str, folder: Path) -> str:
        environment = {
            "TZ": zone,
            "PYTHONHASHSEED": seed,
            "PYTHONPATH": str(REPOSITORY),
            "LC_ALL": "C",
            "TMPDIR": "/tmp",
        }
        command = [sys.executable, "-B", "-c", BUILD, str(order)]
        run = subprocess.run(
            command, env=environment, umask=umask, cwd=folder, capture_output=True, text=True, check=True
        )
        return run.stdout

    assert digest(1, 0o022, "UTC", "1", tmp_path) == digest(-1, 0o077, "Asia/Kolkata", "2", Path("/"))


def test_an_empty_directory_is_kept() -> None:
    image, _ = built(ramdisks=[BOOT, Tree.of([Directory("empty", 0o711)])])
    (_, data) = [section for section in read_in_order(image).sections if section[0] == SectionType.RAMDISK][1]
    assert unpack(data)[b"empty"].mode == 0o711


def test_every_byte_of_a_part_is_in_a_register() -> None:
    _, one = built()
    changed: Sequence[dict[str, Any]] = (
        {"kernel": bzimage(b"codf")},
        {"cmdline": CMDLINE_TEXT + " quiet"},
        {"ramdisks": [boot_ramdisk(init=b"inis", cmdline=CMDLINE_TEXT), CUSTOMER]},
        {"ramdisks": [BOOT, customer_ramdisk(Tree.of([File.holding("bin/app", b"another")]), cmd=["/bin/app"])]},
    )
    assert len({built(**each)[1].pcr0 for each in changed} | {one.pcr0}) == 5
    assert built(**changed[3])[1].pcr1 == one.pcr1
    assert all(built(**each)[1].pcr2 == one.pcr2 for each in changed[:3])
    assert built(metadata=replace(METADATA, name="another"))[1] == one
