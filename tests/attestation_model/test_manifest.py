"""The model manifest: one encoding, one digest, and nothing read that is not exactly that."""

from __future__ import annotations

import hashlib
from dataclasses import replace
from pathlib import Path
from typing import Any

import cbor2
import pytest
from hypothesis import given
from hypothesis import strategies as st

from attestation.gguf import ModelError
from attestation.manifest import MAX_FILE_SIZE, MAX_MANIFEST_SIZE, MAX_TEMPLATE_SIZE, ManifestFile, ModelManifest
from tests.gguf_files import CHAT_TEMPLATE, tiny_model

FILE = ManifestFile("tiny.gguf", 1000, bytes(range(48)))
MANIFEST = ModelManifest("tiny", (FILE,), CHAT_TEMPLATE, 7)


def as_map() -> dict[str, object]:
    decoded: dict[str, object] = cbor2.loads(MANIFEST.encode())
    return decoded


def refused(data: bytes) -> ModelError:
    with pytest.raises(ModelError) as caught:
        ModelManifest.decode(data)
    assert caught.value.code == "malformed_manifest"
    return caught.value


def test_the_encoding_is_deterministic_and_the_digest_has_a_domain() -> None:
    encoded = MANIFEST.encode()
    assert ModelManifest.decode(encoded) == MANIFEST
    assert [key for key, _ in cbor2.loads(encoded).items()] == ["v", "name", "files", "version", "chat_template"]
    assert MANIFEST.digest() == hashlib.sha384(b"strongroom/1 model manifest\x00" + encoded).digest()


@pytest.mark.parametrize(
    "change",
    [
        {"v": 2},
        {"name": ""},
        {"name": "x" * 129},
        {"name": "two\nlines"},
        {"files": []},
        {"files": [{"name": "a", "size": 1}]},
        {"files": [{"name": "../a", "size": 1, "sha384": bytes(48)}]},
        {"files": [{"name": "..", "size": 1, "sha384": bytes(48)}]},
        {"files": [{"name": "a", "size": 0, "sha384": bytes(48)}]},
        {"files": [{"name": "a", "size": 1, "sha384": bytes(47)}]},
        {"files": [{"name": str(index), "size": 1, "sha384": bytes(48)} for index in range(2)]},
        {"files": [{"name": str(index), "size": 1, "sha384": bytes(48)} for index in range(65)]},
        {"chat_template": ""},
        {"chat_template": b"bytes"},
        {"chat_template": "x" * (MAX_TEMPLATE_SIZE + 1)},
        {"version": -1},
        {"version": 2**63},
        {"another": 1},
    ],
)
def test_a_manifest_out_of_its_bounds_is_refused(change: dict[str, object]) -> None:
    refused(cbor2.dumps({**as_map(), **change}, canonical=True))


@pytest.mark.parametrize(
    "change",
    [
        {"name": ""},
        {"name": "x" * 129},
        {"name": "two\nlines"},
        {"files": ()},
        {"files": (FILE, FILE)},
        {"chat_template": ""},
        {"chat_template": "é" * (MAX_TEMPLATE_SIZE // 2 + 1)},
        {"chat_template": "\ud800"},
        {"version": -1},
        {"version": 2**63},
    ],
)
def test_a_manifest_out_of_its_bounds_is_not_made(change: dict[str, Any]) -> None:
    with pytest.raises(ModelError) as caught:
        replace(MANIFEST, **change)
    assert caught.value.code == "malformed_manifest"


@pytest.mark.parametrize(
    "change",
    [
        {"name": "../a"},
        {"name": "a\\b"},
        {"name": "."},
        {"name": "x" * 129},
        {"size": 0},
        {"size": MAX_FILE_SIZE + 1},
        {"sha384": bytes(47)},
        {"sha384": bytes(49)},
    ],
)
def test_a_file_out_of_its_bounds_is_not_named(change: dict[str, Any]) -> None:
    with pytest.raises(ModelError) as caught:
        replace(FILE, **change)
    assert caught.value.code == "malformed_manifest"


def test_the_largest_of_everything_is_accepted() -> None:
    file = ManifestFile("x" * 128, MAX_FILE_SIZE, FILE.sha384)
    largest = ModelManifest("y" * 128, (file,), "é" * (MAX_TEMPLATE_SIZE // 2), 2**63 - 1)
    assert ModelManifest.decode(largest.encode()) == largest


def test_another_encoding_of_the_same_map_is_refused() -> None:
    encoded = MANIFEST.encode()
    refused(encoded + b"\x00")
    refused(encoded[:-1])
    refused(cbor2.dumps(dict(reversed(as_map().items()))))
    refused(cbor2.dumps(as_map(), canonical=True, indefinite_containers=True))
    refused(encoded.replace(b"gversion\x07", b"gversion\x18\x07"))
    refused(bytes(MAX_MANIFEST_SIZE + 1))


@given(st.binary(max_size=200))
def test_garbage_is_a_typed_error(data: bytes) -> None:
    refused(data)


def test_a_gguf_file_is_described_as_it_is_hashed(tmp_path: Path) -> None:
    path = tmp_path / "tiny-1.gguf"
    data = tiny_model().encode()
    path.write_bytes(data)
    progress: list[tuple[int, int]] = []
    manifest = ModelManifest.from_gguf(path, progress=lambda done, total: progress.append((done, total)))
    assert manifest.name == "tiny-1"
    assert manifest.files == (ManifestFile("tiny-1.gguf", len(data), hashlib.sha384(data).digest()),)
    assert manifest.chat_template == CHAT_TEMPLATE
    assert progress[-1] == (len(data), len(data))
    named = ModelManifest.from_gguf(path, name="another", version=3)
    assert (named.name, named.version) == ("another", 3)


def test_a_file_without_a_template_says_so(tmp_path: Path) -> None:
    path = tmp_path / "base.gguf"
    path.write_bytes(tiny_model(chat_template=None).encode())
    with pytest.raises(ModelError, match="carries no chat template") as caught:
        ModelManifest.from_gguf(path)
    assert caught.value.code == "no_chat_template"


def test_a_file_that_is_not_there_or_broken_is_a_typed_error(tmp_path: Path) -> None:
    with pytest.raises(ModelError) as caught:
        ModelManifest.from_gguf(tmp_path / "none.gguf")
    assert caught.value.code == "unreadable_model"
    with pytest.raises(ModelError) as caught:
        ModelManifest.from_gguf(tmp_path)
    assert caught.value.code == "unreadable_model"
    broken = tmp_path / "broken.gguf"
    broken.write_bytes(tiny_model().encode()[:-1000])
    with pytest.raises(ModelError) as caught:
        ModelManifest.from_gguf(broken)
    assert caught.value.code == "truncated_gguf"
