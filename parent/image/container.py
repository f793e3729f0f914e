"""A container as its layers and its configuration: what OCI layouts and docker's archives have in common."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Final, Protocol, final

from attestation.eif import Architecture
from attestation.errors import EvidenceError
from attestation.strict_json import Json, decode_foreign
from parent.image.layers import flatten
from parent.image.source import Source
from parent.image.spool import HashingReader, Spool, compression_of
from parent.image.tree import ImageBuildError

MAX_JSON_SIZE: Final = 4 << 20
"""Bytes of an index, a manifest or a configuration: what the distribution specification has registries accept."""
MAX_JSON_DEPTH: Final = 32
MAX_LAYERS: Final = 512
PLATFORMS: Final = {Architecture.X86_64: "amd64", Architecture.AARCH64: "arm64"}
"""What containers call the architectures."""

_DIGEST: Final = re.compile(r"sha256:[0-9a-f]{64}|sha512:[0-9a-f]{128}")
_CONFIG_KEPT: Final = ("Cmd", "Entrypoint", "Env", "Labels", "User", "WorkingDir")


class Files(Protocol):
    """Where a container's files are."""

    def open(self, name: str) -> BinaryIO:
        """A file that can seek, at its beginning. Raises ImageBuildError ``missing_blob``, OSError."""
        ...


@dataclass(frozen=True, slots=True)
class Wanted:
    """Which of a source's containers is meant."""

    architecture: Architecture = Architecture.X86_64
    tag: str | None = None
    """None: there is only one."""


@dataclass(frozen=True, slots=True)
class Digest:
    """Written ``sha256:HEX`` or ``sha512:HEX``."""

    algorithm: str
    hex: str

    @classmethod
    def parse(cls, text: str, what: str) -> Digest:
        """Raises ImageBuildError ``malformed_container``."""
        if not _DIGEST.fullmatch(text):
            raise malformed(f"{what}: not a digest", expected="sha256:HEX or sha512:HEX", got=ascii(text)[:160])
        algorithm, _, digits = text.partition(":")
        return cls(algorithm, digits)

    def __str__(self) -> str:
        return f"{self.algorithm}:{self.hex}"


@dataclass(frozen=True, slots=True)
class Layer:
    """A layer's file in a source."""

    name: str
    digest: Digest | None = None
    """Of the file as it is. None: only the configuration's digest of the unpacked layer is known."""
    size: int | None = None
    compression: str | None = None
    """As :meth:`Spool.store` takes it. None: what its first bytes say."""


@final
class Fields:
    """A JSON object, and what it is called in errors. Every reader raises ImageBuildError ``malformed_container``."""

    def __init__(self, value: Json, what: str) -> None:
        if not isinstance(value, dict):
            raise malformed(what, expected="an object", got=type(value).__name__)
        self.all, self._what = value, what

    @classmethod
    def decode(cls, data: bytes, what: str) -> Fields:
        return cls(read_json(data, what), what)

    def text(self, name: str) -> str:
        """Absent and null are empty, as tools write them."""
        value = self.all.get(name)
        if value is not None and not isinstance(value, str):
            raise malformed(f"{self._what}.{name}", expected="a text", got=type(value).__name__)
        return value or ""

    def size(self, name: str) -> int:
        value = self.all.get(name)
        if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value < 1 << 63:
            raise malformed(f"{self._what}.{name}", expected="a number of bytes", got=ascii(value)[:100])
        return value

    def array(self, name: str) -> list[Json]:
        """Absent and null are empty."""
        value = self.all.get(name)
        if value is not None and not isinstance(value, list):
            raise malformed(f"{self._what}.{name}", expected="an array", got=type(value).__name__)
        return value or []

    def texts(self, name: str) -> tuple[str, ...]:
        items = self.array(name)
        texts = tuple(item for item in items if isinstance(item, str))
        if len(texts) != len(items):
            raise malformed(f"{self._what}.{name}", expected="texts", got="something else among them")
        return texts

    def object(self, name: str) -> Fields:
        """Absent and null are empty."""
        value = self.all.get(name)
        return Fields({} if value is None else value, f"{self._what}.{name}")

    def named_texts(self, name: str) -> Mapping[str, str]:
        """An object of texts."""
        fields = self.object(name)
        return {key: fields.text(key) for key in fields.all}


def read_json(data: bytes, what: str) -> Json:
    """Raises ImageBuildError ``malformed_container``."""
    try:
        return decode_foreign(data, code="malformed_container", max_depth=MAX_JSON_DEPTH)
    except EvidenceError as error:
        raise malformed(f"{what}: {error.message}") from error


def read_small(files: Files, name: str) -> bytes:
    """A file of JSON, whole. Raises ImageBuildError ``malformed_container``, and as ``files``."""
    with files.open(name) as file:
        data = file.read(MAX_JSON_SIZE + 1)
    if len(data) > MAX_JSON_SIZE:
        raise malformed(f"{name!a} is too large", expected=f"at most {MAX_JSON_SIZE} bytes", got="more")
    return data


def read_container(files: Files, layers: Sequence[Layer], config: bytes, wanted: Wanted, spool: Spool) -> Source:
    """The container of ``layers``, the lowest first, whose configuration is ``config`` (OCI image specification, "Image
    Configuration"; docker's has the same fields). The layers' files lie in the spool.

    Raises ImageBuildError: ``malformed_container``, ``missing_blob``, ``wrong_digest``, ``no_such_container``, and
    those of :class:`Spool` and :func:`flatten`.
    """
    fields = Fields.decode(config, "configuration")
    system, architecture = fields.text("os"), fields.text("architecture")
    if (system, architecture) != ("linux", PLATFORMS[wanted.architecture]):
        raise ImageBuildError(
            "no_such_container",
            "the container is of another platform",
            expected=f"linux/{PLATFORMS[wanted.architecture]}",
            got=ascii(f"{system}/{architecture}")[1:-1][:100],
        )
    diff_ids = fields.object("rootfs").texts("diff_ids")
    if len(diff_ids) != len(layers) or not 0 < len(layers) <= MAX_LAYERS:
        raise malformed(
            "the configuration and the manifest do not agree on the layers",
            expected=f"1 to {MAX_LAYERS} layers, as many as diff_ids",
            got=f"{len(layers)} layers and {len(diff_ids)} diff_ids",
        )
    unpacked = []
    for number, (layer, diff_id) in enumerate(zip(layers, diff_ids, strict=True), start=1):
        what = f"unpacking layer {number} of {len(layers)}"
        unpacked.append(_unpack(files, layer, Digest.parse(diff_id, "diff_ids"), spool, what))
    tree, notes = flatten(unpacked)
    runs = fields.object("config")
    return Source(
        tree=tree,
        entrypoint=runs.texts("Entrypoint"),
        cmd=runs.texts("Cmd"),
        env=runs.texts("Env"),
        working_dir=runs.text("WorkingDir"),
        user=runs.text("User"),
        notes=notes,
        docker_info={
            "Architecture": architecture,
            "Os": system,
            "Config": {name: runs.all[name] for name in _CONFIG_KEPT if runs.all.get(name)},
        },
    )


def _unpack(files: Files, layer: Layer, diff_id: Digest, spool: Spool, what: str) -> Path:
    """The layer as a plain archive in the spool, held to both of its digests."""
    with files.open(layer.name) as file:
        size = file.seek(0, 2)
        file.seek(0)
        if layer.size is not None and size != layer.size:
            raise wrong_digest(layer.name, f"{layer.size} bytes", f"{size} bytes")
        compression = compression_of(file) if layer.compression is None else layer.compression
        reader = HashingReader(file, size, "sha256" if layer.digest is None else layer.digest.algorithm)
        stored = spool.store(reader, compression=compression, what=what, algorithm=diff_id.algorithm)
        packed = reader.finish()
    if layer.digest is not None and packed != layer.digest.hex:
        raise wrong_digest(layer.name, layer.digest.hex, packed)
    if stored.digest != diff_id.hex:
        raise wrong_digest(f"{layer.name}, unpacked,", diff_id.hex, stored.digest)
    return stored.path


def wrong_digest(what: str, expected: object, got: object) -> ImageBuildError:
    """Bytes that are not those that were named."""
    return ImageBuildError(
        "wrong_digest", f"{ascii(what)[1:-1]} is not what it is named for", expected=expected, got=got
    )


def malformed(message: str, *, expected: object | None = None, got: object | None = None) -> ImageBuildError:
    """A container that no tool writes."""
    return ImageBuildError("malformed_container", message, expected=expected, got=got)
