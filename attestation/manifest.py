"""The model manifest: what is pinned when somebody pins a model. PROTOCOL.md section 4.

It names the model's file with its size and SHA-384, and carries the chat template, so that the one digest over its
bytes decides the weights and how a conversation becomes a prompt. The digest is committed to PCR16.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Final

import cbor2

from attestation.cbor import Record, decode
from attestation.errors import EvidenceError
from attestation.gguf import ModelError, read_header
from attestation.reference import DIGEST_SIZE, h384

MANIFEST_LABEL: Final = "strongroom/1 model manifest"
MANIFEST_VERSION: Final = 1

MAX_MANIFEST_SIZE: Final = 128 << 10
MAX_TEMPLATE_SIZE: Final = 64 << 10
"""Bytes of a chat template in UTF-8."""
MAX_NAME_CHARACTERS: Final = 128
MAX_FILE_SIZE: Final = 1 << 42
_CODE: Final = "malformed_manifest"
_PIECE: Final = 4 << 20

Progress = Callable[[int, int], None]
"""Called with bytes done and bytes in all."""


@dataclass(frozen=True, slots=True)
class ManifestFile:
    """One file of the model: ``name`` without a path, ``size`` in bytes (1 to 2^42), ``sha384`` (48 bytes) over all of
    it.

    Raises ModelError ``malformed_manifest``.
    """

    name: str
    size: int
    sha384: bytes

    def __post_init__(self) -> None:
        _require_name(self.name, "the name of a file")
        if "/" in self.name or "\\" in self.name or self.name in (".", ".."):
            raise ModelError(_CODE, "the name of a file is a path", expected="a plain name", got=ascii(self.name))
        if not 0 < self.size <= MAX_FILE_SIZE:
            raise ModelError(
                _CODE, "the size of a file is out of range", expected=f"1..{MAX_FILE_SIZE} bytes", got=self.size
            )
        if len(self.sha384) != DIGEST_SIZE:
            raise ModelError(_CODE, "the digest of a file has a wrong size", expected=DIGEST_SIZE, got=len(self.sha384))


@dataclass(frozen=True, slots=True)
class ModelManifest:
    """A model, as it is pinned. Construction checks every bound and raises ModelError (``malformed_manifest``)."""

    name: str
    """What clients call the model."""
    files: tuple[ManifestFile, ...]
    """Exactly one in this version, a GGUF file."""
    chat_template: str
    """A Jinja template, as in GGUF's ``tokenizer.chat_template``."""
    version: int = 1
    """The publisher's own count of versions, which a configuration may hold to a minimum."""

    def __post_init__(self) -> None:
        _require_name(self.name, "the model's name")
        if len(self.files) != 1:
            raise ModelError(_CODE, "wrong number of files", expected=1, got=len(self.files))
        if not 0 <= self.version < 1 << 63:
            raise ModelError(_CODE, "the version is out of range", expected="0..2^63-1", got=self.version)
        try:
            size = len(self.chat_template.encode("utf-8"))
        except UnicodeEncodeError as error:
            raise ModelError(
                _CODE, "the chat template holds a lone surrogate", expected="Unicode scalar values"
            ) from error
        if not 0 < size <= MAX_TEMPLATE_SIZE:
            raise ModelError(
                _CODE, "the chat template has a wrong size", expected=f"1..{MAX_TEMPLATE_SIZE} bytes", got=size
            )

    def encode(self) -> bytes:
        """Deterministic CBOR: the bytes that the digest is over."""
        manifest = {
            "v": MANIFEST_VERSION,
            "name": self.name,
            "files": [{"name": file.name, "size": file.size, "sha384": file.sha384} for file in self.files],
            "chat_template": self.chat_template,
            "version": self.version,
        }
        return cbor2.dumps(manifest, canonical=True)

    def digest(self) -> bytes:
        """48 bytes, committed to PCR16."""
        return h384(MANIFEST_LABEL, self.encode())

    @classmethod
    def decode(cls, data: bytes) -> ModelManifest:
        """Reads a manifest strictly: deterministic CBOR, exactly the known keys, every bound. Raises ModelError
        (``malformed_manifest``).
        """
        if len(data) > MAX_MANIFEST_SIZE:
            raise ModelError(
                _CODE, "the manifest is too large", expected=f"<= {MAX_MANIFEST_SIZE} bytes", got=len(data)
            )
        try:
            return cls._read(data)
        except EvidenceError as error:
            raise ModelError(_CODE, error.message, expected=error.expected, got=error.got) from error

    @classmethod
    def _read(cls, data: bytes) -> ModelManifest:
        keys = {"v", "name", "files", "chat_template", "version"}
        value = decode(data, deterministic=True, code=_CODE)
        top = Record(value, "manifest", required=keys, code=_CODE)
        top.literal("v", MANIFEST_VERSION)
        files = []
        for entry in top.array("files"):
            file = Record(entry, "manifest, files", required={"name", "size", "sha384"}, code=_CODE)
            name, size = file.text("name", MAX_NAME_CHARACTERS), file.integer("size", 1, MAX_FILE_SIZE)
            files.append(ManifestFile(name, size, file.octets("sha384", DIGEST_SIZE, DIGEST_SIZE)))
        template = value["chat_template"] if isinstance(value, dict) else None
        if not isinstance(template, str):
            raise ModelError(_CODE, "the chat template is no text", expected="text", got=type(template).__name__)
        version = top.integer("version", 0, (1 << 63) - 1)
        return cls(top.text("name", MAX_NAME_CHARACTERS), tuple(files), template, version)

    @classmethod
    def from_gguf(
        cls, path: Path, *, name: str | None = None, version: int = 1, progress: Progress | None = None
    ) -> ModelManifest:
        """Describes a GGUF file: checks its header, takes its chat template, and hashes it as a stream.

        ``name`` defaults to the file's name without ``.gguf``. Raises ModelError: what :func:`read_header` raises,
        ``no_chat_template``, and ``unreadable_model`` when the file cannot be opened or read.
        """
        try:
            with path.open("rb") as file:
                return cls.of_open_gguf(file, path.name, name=name, version=version, progress=progress)
        except OSError as error:
            raise ModelError("unreadable_model", f"{path}: {error.strerror or type(error).__name__}") from error

    @classmethod
    def of_open_gguf(
        cls,
        file: BinaryIO,
        file_name: str,
        *,
        name: str | None = None,
        version: int = 1,
        progress: Progress | None = None,
    ) -> ModelManifest:
        """As :meth:`from_gguf`, of a file that is open and goes by ``file_name``: what is described here can be loaded
        from the same descriptor. Raises ModelError, and OSError when it cannot be read.
        """
        header = read_header(file)
        template = header.text("tokenizer.chat_template")
        if template is None:
            raise ModelError(
                "no_chat_template",
                f"{file_name} carries no chat template, so no conversation can be put to it",
                expected="the metadata text tokenizer.chat_template",
                got="none",
            )
        digest, size = _hash(file, progress)
        return cls(name or file_name.removesuffix(".gguf"), (ManifestFile(file_name, size, digest),), template, version)


def _hash(file: BinaryIO, progress: Progress | None) -> tuple[bytes, int]:
    """SHA-384 and size of the whole file."""
    total = file.seek(0, 2)
    file.seek(0)
    digest, piece, done = hashlib.sha384(), bytearray(_PIECE), 0
    while count := file.readinto(piece):  # type: ignore[attr-defined]  # every binary file of the standard library has it
        digest.update(memoryview(piece)[:count])
        done += count
        if progress is not None:
            progress(done, total)
    return digest.digest(), done


def _require_name(name: str, what: str) -> None:
    if not 0 < len(name) <= MAX_NAME_CHARACTERS or not name.isprintable():
        raise ModelError(
            _CODE,
            f"{what} is not usable",
            expected=f"1..{MAX_NAME_CHARACTERS} printable characters",
            got=ascii(name)[:200],
        )
