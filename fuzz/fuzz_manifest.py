"""Bytes are a manifest in exactly its own encoding, or a ModelError."""

from __future__ import annotations

from attestation.gguf import ModelError
from attestation.manifest import ManifestFile, ModelManifest


def one_input(data: bytes) -> None:
    try:
        manifest = ModelManifest.decode(data)
    except ModelError:
        return
    assert manifest.encode() == data, "two encodings of one manifest"


def seeds() -> list[bytes]:
    file = ManifestFile("model.gguf", 98_362_432, bytes(48))
    return [
        ModelManifest("m", (file,), "{{ messages }}").encode(),
        ModelManifest("Grüße 7B", (file,), "x", version=2**40).encode(),
    ]
