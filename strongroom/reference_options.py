"""Reference values as people give them on a command line: digits, or a file to compute them from."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

import click

from attestation.eif import MAX_JSON_SIZE, measurements_from_nitro_cli
from attestation.manifest import MAX_MANIFEST_SIZE, ModelManifest
from attestation.parallel_hashes import CHUNK_SIZE
from attestation.reference import DIGEST_PREFIX, DIGEST_SIZE, PcrSet, configuration_digest
from attestation.release_signing import PublicKey, ReleaseError
from attestation.releases import MAX_NAME
from strongroom.files import read_bounded
from strongroom.options import Octets, err
from strongroom.render import hashing_bar

MANIFEST_SUFFIX = ".manifest"
MAX_CONFIGURATION = 1 << 20
"""Bytes of an ``enclave.toml``."""

ANY_FILE = click.Path(path_type=Path, dir_okay=False)


class PinnedKey(click.ParamType[PublicKey]):
    """``ed25519:HEX`` or ``ecdsa-p384:HEX``."""

    name = "key"

    def convert(self, value: object, param: click.Parameter | None, ctx: click.Context | None) -> PublicKey:
        try:
            return PublicKey.parse(str(value))
        except ReleaseError as error:
            self.fail(f"{error.message}; expected {error.expected}", param, ctx)


class Product(click.ParamType[str]):
    """What a release history is about: 1 to ``MAX_NAME`` printable characters (PROTOCOL.md section 4.1)."""

    name = "name"

    def convert(self, value: object, param: click.Parameter | None, ctx: click.Context | None) -> str:
        text = str(value)
        if not 0 < len(text) <= MAX_NAME or not text.isprintable() or text != text.strip():
            self.fail(f"a name has 1 to {MAX_NAME} printable characters", param, ctx)
        return text


class DigestOrFile(click.ParamType[bytes | Path]):
    """``sha384:HEX``, or a file."""

    name = "file|sha384:hex"

    def convert(self, value: object, param: click.Parameter | None, ctx: click.Context | None) -> bytes | Path:
        if isinstance(value, bytes | Path):
            return value
        text = str(value)
        if text.startswith(DIGEST_PREFIX):
            return Octets([DIGEST_SIZE]).convert(text.removeprefix(DIGEST_PREFIX), param, ctx)
        path: Path = ANY_FILE.convert(text, param, ctx)
        return path


def model_digest(given: bytes | Path) -> bytes:
    """The digest of a model's manifest: as given, or of a manifest's file, or of the manifest of a GGUF file.

    Raises ModelError, FileError, OSError.
    """
    if isinstance(given, bytes):
        return given
    if given.suffix == MANIFEST_SUFFIX:
        return read_manifest(given).digest()
    with hashing_bar(err, "model") as progress:
        return ModelManifest.from_gguf(given, progress=progress).digest()


def read_manifest(path: Path) -> ModelManifest:
    """Raises ModelError, FileError, OSError."""
    return ModelManifest.decode(read_bounded(path, MAX_MANIFEST_SIZE))


def configuration(given: bytes | Path) -> bytes:
    """The digest of a configuration: as given, or of an ``enclave.toml``. Raises FileError, OSError."""
    return given if isinstance(given, bytes) else configuration_digest(read_bounded(given, MAX_CONFIGURATION))


def image_file_digest(path: Path) -> bytes:
    """SHA-384 of an image file that is not measured: 48 bytes. Raises OSError."""
    digest, done = hashlib.sha384(), 0
    with path.open("rb") as file, hashing_bar(err, "image") as progress:
        size = os.fstat(file.fileno()).st_size
        while piece := file.read(CHUNK_SIZE):
            digest.update(piece)
            done += len(piece)
            progress(done, size)
    return digest.digest()


def measurements(path: Path) -> PcrSet:
    """What ``nitro-cli build-enclave`` printed. Raises ImageError, FileError, OSError."""
    return measurements_from_nitro_cli(read_bounded(path, MAX_JSON_SIZE))
