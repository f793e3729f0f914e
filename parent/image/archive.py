"""Containers in one file: what ``docker save`` and ``podman save`` write, and OCI layouts as an archive."""

from __future__ import annotations

import hashlib
import posixpath
import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import BinaryIO, Final

from parent.image.container import (
    Fields,
    Layer,
    Wanted,
    malformed,
    read_container,
    read_json,
    read_small,
    wrong_digest,
)
from parent.image.oci import LAYOUT_FILE, read_files
from parent.image.source import Material, Source
from parent.image.spool import HashingReader, Spool, compression_of, open_part
from parent.image.tar import Kind, Member, read_members
from parent.image.tree import ImageBuildError

DOCKER_MANIFEST: Final = "manifest.json"

_CONFIG: Final = re.compile(r"(?:blobs/sha256/)?([0-9a-f]{64})(?:\.json)?")


def read_archive(path: Path, wanted: Wanted, spool: Spool) -> Source:
    """The container in the archive at ``path``, which may be packed with gzip. It and its layers then lie in the spool.

    Raises ImageBuildError: ``unreadable_source``, ``malformed_archive``, and those of :func:`oci.read_files`.
    """
    try:
        return _read(path, wanted, spool)
    except OSError as error:
        where = ascii(str(error.filename or path))
        raise ImageBuildError("unreadable_source", f"{where} cannot be read: {error.strerror or error}") from error


def _read(path: Path, wanted: Wanted, spool: Spool) -> Source:
    with path.open("rb") as file:
        size = file.seek(0, 2)
        file.seek(0)
        compression = compression_of(file)
        reader = HashingReader(file, size, "sha256")
        stored = spool.store(reader, compression=compression, what="reading the archive")
        material = Material("archive", {"sha256": reader.finish()}, {"kind": "container archive"})
    files = ArchiveFiles(stored.path)
    found = read_files(files, wanted, spool) if LAYOUT_FILE in files else _read_docker(files, wanted, spool)
    return replace(found, materials=(material, *found.materials))


class ArchiveFiles:
    """The files of an archive, by name. Raises ImageBuildError ``malformed_archive``."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._members: dict[str, Member] = {}
        with path.open("rb") as file:
            for member in read_members(file):
                if member.kind is Kind.DIRECTORY:
                    continue
                if member.path in self._members:
                    message = f"{ascii(member.path)[:100]} is there twice"
                    raise ImageBuildError("malformed_archive", message)
                self._members[member.path] = member

    def __contains__(self, name: str) -> bool:
        return name in self._members

    def open(self, name: str) -> BinaryIO:
        member = self._members.get(name)
        if member is not None and member.kind is Kind.SYMLINK:
            # Older dockers save a layer that is there twice as a link to the first: ../ID/layer.tar.
            member = self._members.get(posixpath.normpath(posixpath.join(posixpath.dirname(name), member.target)))
        if member is None or member.kind is not Kind.FILE:
            raise ImageBuildError("missing_blob", f"the archive has no file {ascii(name)[:200]}")
        return open_part(self._path, member.offset, member.size)


def _read_docker(files: ArchiveFiles, wanted: Wanted, spool: Spool) -> Source:
    """As docker describes it (moby, image/spec/spec.md, "Combined Image JSON + Filesystem Changeset Format")."""
    if DOCKER_MANIFEST not in files:
        expected = f"{LAYOUT_FILE}, or {DOCKER_MANIFEST} of docker save"
        raise malformed("the archive is no container", expected=expected, got="neither")
    value = read_json(read_small(files, DOCKER_MANIFEST), DOCKER_MANIFEST)
    if not isinstance(value, list):
        raise malformed(DOCKER_MANIFEST, expected="an array", got=type(value).__name__)
    every = [Fields(each, DOCKER_MANIFEST) for each in value]
    found = {each.text("Config"): each for each in every if wanted.tag is None or wanted.tag in each.texts("RepoTags")}
    if len(found) != 1:
        tags = ascii(", ".join(tag for each in every for tag in each.texts("RepoTags")) or "no tags")[1:-1][:400]
        if found:
            code, message = "ambiguous_container", "the archive has several containers: name one by its tag"
        else:
            code, message = "no_such_container", "the archive has no such container"
        raise ImageBuildError(code, message, expected="one" if wanted.tag is None else ascii(wanted.tag), got=tags)
    [(name, fields)] = found.items()
    config = read_small(files, name)
    digest = hashlib.sha256(config).hexdigest()
    said = _CONFIG.fullmatch(name)
    if said is None:
        raise malformed(f"{DOCKER_MANIFEST}: Config", expected="a file named by its digest", got=ascii(name)[:200])
    if digest != said[1]:
        raise wrong_digest(name, said[1], digest)
    layers = [Layer(each) for each in fields.texts("Layers")]
    return replace(
        read_container(files, layers, config, wanted, spool),
        digest=f"sha256:{digest}",
        materials=(Material("container", {"sha256": digest}, _KIND),),
    )


_KIND: Final[Mapping[str, str]] = {"kind": "container configuration (docker's image id)"}
