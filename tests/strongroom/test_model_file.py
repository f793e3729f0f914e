"""Encrypting a model's file: what is opened is the file of the manifest, and nothing is left of what failed."""

from __future__ import annotations

import errno
import os
from io import FileIO
from pathlib import Path

import pytest

from attestation.envelope import EnvelopeError, EnvelopeHeader, EnvelopePurpose
from attestation.envelope_records import Opener
from attestation.gguf import ModelError
from attestation.keypolicy.document import KeyArn
from attestation.manifest import ModelManifest
from attestation.secret import Secret
from strongroom import model_file
from strongroom.model_file import ModelChanged, encrypt_model
from tests.gguf_files import tiny_model

KEY = KeyArn.parse("arn:aws:kms:us-east-1:111122223333:key/1234abcd-12ab-34cd-56ef-1234567890ab")
HEADER = EnvelopeHeader(EnvelopePurpose.MODEL, KEY, "production", 3, b"wrapped", 4096)
DATA_KEY = Secret(bytes(range(32)))
CONFIGURATION = b"c" * 48


@pytest.fixture
def model(tmp_path: Path) -> Path:
    folder = tmp_path / "from"
    folder.mkdir()
    path = folder / "tiny.gguf"
    path.write_bytes(tiny_model().encode())
    return path


def encrypt(source: Path, destination: Path, manifest: ModelManifest, header: EnvelopeHeader = HEADER) -> None:
    encrypt_model(
        source, destination, manifest=manifest, header=header, configurations=[CONFIGURATION], data_key=DATA_KEY
    )


@pytest.mark.parametrize("piece", [4 << 20, 1000])
def test_the_enclave_of_the_manifest_opens_the_file(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, piece: int
) -> None:
    monkeypatch.setattr(model_file, "_PIECE", piece)
    manifest, told = ModelManifest.from_gguf(model), list[tuple[int, int]]()
    destination = tmp_path / "tiny.gguf.sealed"
    encrypt_model(
        model,
        destination,
        manifest=manifest,
        header=HEADER,
        configurations=[CONFIGURATION, bytes(48)],
        data_key=DATA_KEY,
        progress=lambda done, total: told.append((done, total)),
    )
    envelope = destination.read_bytes()
    header, at = EnvelopeHeader.split(envelope)
    assert header == HEADER
    for configuration in (CONFIGURATION, bytes(48)):
        opener = Opener(header, DATA_KEY, model=manifest.digest(), configuration=configuration)
        assert b"".join([*opener.feed(envelope[at:]), opener.finish()]) == model.read_bytes()
    size = model.stat().st_size
    assert [done for done, _ in told] == [min(end, size) for end in range(piece, size + piece, piece)]
    assert {total for _, total in told} == {size}
    assert destination.stat().st_mode & 0o777 == 0o644 & ~_umask()


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


@pytest.mark.parametrize("change", ["changed", "longer", "shorter", "much longer"])
def test_a_model_that_is_not_what_was_hashed(model: Path, tmp_path: Path, change: str) -> None:
    manifest, content = ModelManifest.from_gguf(model), model.read_bytes()
    model.write_bytes(
        {
            "changed": content[:-1] + bytes([content[-1] ^ 1]),
            "longer": content + b"\0",
            "shorter": content[:-1],
            "much longer": content + bytes(9 << 20),
        }[change]
    )
    with pytest.raises(ModelChanged) as caught:
        encrypt(model, tmp_path / "out", manifest)
    assert caught.value.code == "model_changed"
    [file] = manifest.files
    assert caught.value.expected == f"{file.size} bytes, sha384:{file.sha384.hex()}"
    assert list(tmp_path.iterdir()) == [model.parent]


def test_what_is_there_stays(model: Path, tmp_path: Path) -> None:
    destination = tmp_path / "out"
    destination.write_bytes(b"before")
    with pytest.raises(FileExistsError):
        encrypt(model, destination, ModelManifest.from_gguf(model))
    assert destination.read_bytes() == b"before"


def test_a_model_that_cannot_be_read(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    manifest, destination = ModelManifest.from_gguf(model), tmp_path / "out"

    class Broken(FileIO):
        def readinto(self, buffer: object) -> int:
            raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(model_file, "_opened", lambda source: Broken(source))
    with pytest.raises(ModelError, match=r"tiny\.gguf: Input/output error") as caught:
        encrypt(model, destination, manifest)
    assert caught.value.code == "unreadable_model"
    monkeypatch.undo()
    model.unlink()
    with pytest.raises(ModelError, match=r"tiny\.gguf: No such file") as caught:
        encrypt(model, destination, manifest)
    assert caught.value.code == "unreadable_model"
    assert list(tmp_path.iterdir()) == [model.parent]


def test_a_header_of_a_prompt(model: Path, tmp_path: Path) -> None:
    prompt = EnvelopeHeader(EnvelopePurpose.PROMPT, KEY, "production", 3, b"wrapped", 4096)
    with pytest.raises(EnvelopeError) as caught:
        encrypt(model, tmp_path / "out", ModelManifest.from_gguf(model), prompt)
    assert caught.value.code == "wrong_purpose"
    assert list(tmp_path.iterdir()) == [model.parent]
