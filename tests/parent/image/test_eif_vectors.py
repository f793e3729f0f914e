"""Images against tests/vectors/eif, which ``scripts/vectors_eif.py`` makes from PROTOCOL.md without the reader and
without the writer: three implementations of one page.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from io import BytesIO
from pathlib import Path
from typing import Any

import pytest

from attestation.eif import Architecture, ImageError
from attestation.measure import read_image
from parent.image.eif_writer import ImageMetadata, sign_image, write_image
from parent.image.signature import ImageSigner
from parent.image.tree import Device, Directory, Entry, File, Symlink, Tree
from tests.parent.image.independent import read_by_table, read_in_order

VECTORS = Path(__file__).resolve().parents[3] / "tests" / "vectors" / "eif"
ALL = {path.stem: json.loads(path.read_text()) for path in sorted(VECTORS.glob("*.json"))}
ACCEPTED = [name for name, said in ALL.items() if said["expect"] == "accepted"]
WRITTEN = [name for name in ACCEPTED if "parts" in ALL[name]]


def test_each_image_has_its_description() -> None:
    assert {path.stem for path in VECTORS.glob("*.eif")} == ALL.keys()
    assert len(ACCEPTED) > 8
    assert len(WRITTEN) > 6


@pytest.mark.parametrize("name", ALL)
def test_the_reader(name: str) -> None:
    said = ALL[name]
    if said["expect"] != "accepted":
        with pytest.raises(ImageError) as caught:
            read_image(VECTORS / f"{name}.eif")
        assert caught.value.code == said["expect"]
        return
    image = read_image(VECTORS / f"{name}.eif")
    registers = {str(index): value.hex() for index, value in image.measurements.as_registers().items()}
    assert registers == said["pcrs"]
    if said["boundary"]:
        image.require_boundary()
        return
    with pytest.raises(ImageError) as caught:
        image.require_boundary()
    assert caught.value.code == "no_boundary"


@pytest.mark.parametrize("name", [name for name in ACCEPTED if not name.startswith("version-3")])
def test_both_kinds_of_readers(name: str) -> None:
    data = (VECTORS / f"{name}.eif").read_bytes()
    assert read_in_order(data) == read_by_table(data)
    assert {str(index): value for index, value in read_in_order(data).pcrs.items()}.items() <= ALL[name]["pcrs"].items()


def entry(said: Mapping[str, Any]) -> Entry:
    path, mode, owner = said["path"], said["mode"], {"uid": said["uid"], "gid": said["gid"]}
    match said["kind"]:
        case "directory":
            return Directory(path, mode, **owner)
        case "file":
            content = bytes.fromhex(said["content"])
            return File(path, mode, len(content), lambda: BytesIO(content), **owner)
        case "link":
            return Symlink(path, mode, said["target"], **owner)
        case kind:
            return Device(path, mode, kind, said["major"], said["minor"], **owner)


@pytest.mark.parametrize("name", WRITTEN)
def test_the_writer(name: str) -> None:
    parts = ALL[name]["parts"]
    out = BytesIO()
    pcrs = write_image(
        out,
        kernel=bytes.fromhex(parts["kernel"]),
        cmdline=parts["cmdline"],
        ramdisks=[Tree.of(entry(said) for said in reversed(entries)) for entries in parts["ramdisks"]],
        metadata=ImageMetadata(
            name="strongroom",
            version="1.0",
            built_at=parts["built_at"],
            tool_version="0.1.0",
            kernel_version="6.12.9",
        ),
        architecture=Architecture(parts["architecture"]),
        signer=ImageSigner.from_pem(parts["signer"].encode()) if "signer" in parts else None,
    )
    assert out.getvalue() == (VECTORS / f"{name}.eif").read_bytes()
    assert {str(index): value.hex() for index, value in pcrs.as_registers().items()} == ALL[name]["pcrs"]


@pytest.mark.parametrize("curve", ["p256", "p384", "p521"])
def test_signing_what_is_there(tmp_path: Path, curve: str) -> None:
    signer = ImageSigner.from_pem(ALL[f"signed-{curve}"]["parts"]["signer"].encode())
    for source in ("two-ramdisks", "signed-p256"):
        sign_image(VECTORS / f"{source}.eif", tmp_path / "signed.eif", signer)
        assert (tmp_path / "signed.eif").read_bytes() == (VECTORS / f"signed-{curve}.eif").read_bytes()
