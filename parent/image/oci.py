"""Containers in the OCI image layout (OCI image specification 1.1), in a folder or in an archive.

From ``index.json`` on, every byte is held to the digest by which it was named; only what the index itself says is taken
on its word, and the source's digest says which container was taken.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import BinaryIO, Final

from attestation.strict_json import Json
from parent.image.container import (
    MAX_JSON_SIZE,
    PLATFORMS,
    Digest,
    Fields,
    Files,
    Layer,
    Wanted,
    malformed,
    read_container,
    read_small,
    wrong_digest,
)
from parent.image.source import Material, Source
from parent.image.spool import Spool
from parent.image.tree import ImageBuildError

MAX_INDEXES: Final = 64
"""Indexes within indexes, in all."""
LAYOUT_FILE: Final = "oci-layout"

INPUT: Final = "strongroom.input."
"""What annotations begin with that name an input of the build and its digest."""

_INDEXES: Final = (
    "application/vnd.oci.image.index.v1+json",
    "application/vnd.docker.distribution.manifest.list.v2+json",
)
_MANIFESTS: Final = (
    "application/vnd.oci.image.manifest.v1+json",
    "application/vnd.docker.distribution.manifest.v2+json",
)
_LAYERS: Final = {
    "application/vnd.oci.image.layer.v1.tar": "",
    "application/vnd.oci.image.layer.v1.tar+gzip": "gzip",
    "application/vnd.oci.image.layer.v1.tar+zstd": "zstd",
    "application/vnd.docker.image.rootfs.diff.tar": "",
    "application/vnd.docker.image.rootfs.diff.tar.gzip": "gzip",
}
"""How each media type of a layer is packed. Layers that only their vendor may distribute are not among them."""
_TAGS: Final = ("org.opencontainers.image.ref.name", "io.containerd.image.name")
SAID: Final = "strongroom.said."
"""What annotations begin with that say something of the build in words: which variant, which compiler."""

_BASE_NAME: Final = "org.opencontainers.image.base.name"
_BASE_DIGEST: Final = "org.opencontainers.image.base.digest"
_REVISION: Final = "org.opencontainers.image.revision"
_COMMIT: Final = re.compile(r"[0-9a-f]{40}|[0-9a-f]{64}")
_LOCAL: Final = "localhost/"
_ATTESTATION: Final = "vnd.docker.reference.type"


@dataclass(frozen=True, slots=True)
class Descriptor:
    """Content by its digest (OCI image specification, "OCI Content Descriptors")."""

    media_type: str
    digest: Digest
    size: int
    platform: tuple[str, str] | None
    """Operating system and architecture."""
    annotations: Mapping[str, str]

    @classmethod
    def read(cls, value: Json, what: str) -> Descriptor:
        """Raises ImageBuildError ``malformed_container``."""
        fields = Fields(value, what)
        platform = fields.object("platform")
        return cls(
            media_type=fields.text("mediaType"),
            digest=Digest.parse(fields.text("digest"), f"{what}.digest"),
            size=fields.size("size"),
            platform=(platform.text("os"), platform.text("architecture")) if platform.all else None,
            annotations=fields.named_texts("annotations"),
        )

    @property
    def blob(self) -> str:
        """Its file in a layout."""
        return f"blobs/{self.digest.algorithm}/{self.digest.hex}"


class LayoutFolder:
    """A layout in a folder."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def open(self, name: str) -> BinaryIO:
        path = self._folder / name
        if not path.is_file():
            raise ImageBuildError("missing_blob", f"the OCI layout has no file {name}")
        return path.open("rb")


def read_layout(folder: Path, wanted: Wanted, spool: Spool) -> Source:
    """The container in the layout at ``folder``. Raises as :func:`read_files`, and ImageBuildError
    ``unreadable_source``.
    """
    try:
        return read_files(LayoutFolder(folder), wanted, spool)
    except OSError as error:
        where = ascii(str(error.filename or folder))
        raise ImageBuildError("unreadable_source", f"{where} cannot be read: {error.strerror or error}") from error


def read_files(files: Files, wanted: Wanted, spool: Spool) -> Source:
    """The container in the layout of ``files``, whose layers then lie in the spool.

    Raises ImageBuildError: ``ambiguous_container``, ``unsupported_container``, and those of :func:`read_container`.
    """
    version = Fields.decode(read_small(files, LAYOUT_FILE), LAYOUT_FILE).text("imageLayoutVersion")
    if version != "1.0.0":
        raise malformed(f"{LAYOUT_FILE}: an unknown version", expected="1.0.0", got=ascii(version)[:100])
    descriptor = _choose(files, wanted)
    manifest = Fields.decode(_read_blob(files, descriptor), "manifest")
    config = Descriptor.read(manifest.all.get("config"), "manifest.config")
    layers = [_layer(Descriptor.read(each, "manifest.layers")) for each in manifest.array("layers")]
    annotations = manifest.named_texts("annotations")
    said = {key.removeprefix(SAID): text for key, text in sorted(annotations.items()) if key.startswith(SAID)}
    container = Material("container", _by_algorithm(descriptor.digest), {**said, "kind": "OCI image manifest"})
    return replace(
        read_container(files, layers, _read_blob(files, config), wanted, spool),
        digest=str(descriptor.digest),
        materials=(container, *_told(annotations)),
    )


def _choose(files: Files, wanted: Wanted) -> Descriptor:
    """The one container of the platform, with the tag where one is wanted."""
    platform = "linux", PLATFORMS[wanted.architecture]
    tagged = [
        each
        for each in _index(read_small(files, "index.json"), "index.json")
        if wanted.tag is None or wanted.tag in map(each.annotations.get, _TAGS)
    ]
    found: dict[Digest, Descriptor] = {}
    others: list[str] = []
    for descriptor in _manifests(files, tagged):
        if _ATTESTATION in descriptor.annotations:
            continue  # what a builder says of a container, beside it
        if descriptor.platform is None or descriptor.platform == platform:
            found.setdefault(descriptor.digest, descriptor)
        else:
            others.append("/".join(descriptor.platform))
    if len(found) == 1:
        return next(iter(found.values()))
    expected = "linux/" + platform[1] + ("" if wanted.tag is None else f", tagged {wanted.tag!a}")
    if not found:
        got = ascii(", ".join(others) or "none")[1:-1][:200]
        raise ImageBuildError("no_such_container", "the layout has no such container", expected=expected, got=got)
    names = (next(filter(None, map(each.annotations.get, _TAGS)), str(each.digest)) for each in found.values())
    raise ImageBuildError(
        "ambiguous_container",
        "the layout has several such containers: name one by its tag",
        expected=f"one for {expected}",
        got=ascii(", ".join(names))[1:-1][:400],
    )


def _manifests(files: Files, descriptors: Sequence[Descriptor]) -> Iterator[Descriptor]:
    """The manifests among ``descriptors``, and in the indexes among them."""
    waiting, indexes = list(descriptors), 0
    while waiting:
        descriptor = waiting.pop(0)
        if descriptor.media_type in _MANIFESTS:
            yield descriptor
        elif descriptor.media_type in _INDEXES:
            indexes += 1
            if indexes > MAX_INDEXES:
                raise malformed("too many indexes within indexes", expected=f"at most {MAX_INDEXES}")
            waiting += _index(_read_blob(files, descriptor), "index")


def _index(data: bytes, what: str) -> list[Descriptor]:
    return [Descriptor.read(each, f"{what}.manifests") for each in Fields.decode(data, what).array("manifests")]


def _read_blob(files: Files, descriptor: Descriptor) -> bytes:
    """A small blob, which is what its descriptor says."""
    if descriptor.size > MAX_JSON_SIZE:
        expected = f"at most {MAX_JSON_SIZE} bytes"
        raise malformed(f"{descriptor.blob} is too large", expected=expected, got=descriptor.size)
    data = read_small(files, descriptor.blob)
    got = hashlib.new(descriptor.digest.algorithm, data).hexdigest()
    if got != descriptor.digest.hex:
        raise wrong_digest(descriptor.blob, descriptor.digest.hex, got)
    if len(data) != descriptor.size:
        raise wrong_digest(descriptor.blob, f"{descriptor.size} bytes", f"{len(data)} bytes")
    return data


def _layer(descriptor: Descriptor) -> Layer:
    if descriptor.media_type not in _LAYERS:
        raise ImageBuildError(
            "unsupported_container",
            "a layer of another kind",
            expected="a layer as tar, plain or packed with gzip",
            got=ascii(descriptor.media_type)[1:-1][:100],
        )
    return Layer(descriptor.blob, descriptor.digest, descriptor.size, _LAYERS[descriptor.media_type])


def _told(annotations: Mapping[str, str]) -> Iterator[Material]:
    """What the container was made from, where its builder has put it into the manifest: the base image, as buildah
    does, the commit of its source, and, from ours, the digests of what else went in. It is the builder's word.
    """
    if text := annotations.get(_BASE_DIGEST):
        name = annotations.get(_BASE_NAME)
        if name is not None and name.startswith(_LOCAL):
            name = None  # buildah's name of a folder on this machine
        digest = _by_algorithm(Digest.parse(text, _BASE_DIGEST))
        yield Material("base image", digest, {"name": name} if name else {})
    if revision := annotations.get(_REVISION):
        if not _COMMIT.fullmatch(revision):
            raise malformed(_REVISION, expected="a commit of git", got=ascii(revision)[:100])
        yield Material("source", {"gitCommit": revision})
    for key, text in sorted(annotations.items()):
        if key.startswith(INPUT):
            yield Material(key.removeprefix(INPUT), _by_algorithm(Digest.parse(text, ascii(key)[:100])))


def _by_algorithm(digest: Digest) -> Mapping[str, str]:
    return {digest.algorithm: digest.hex}
