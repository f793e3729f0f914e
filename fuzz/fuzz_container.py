"""Bytes that pretend to be a container, or a part of one whose digests are right, are a root file system or an
ImageBuildError.
"""

from __future__ import annotations

import hashlib
import io
import json
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO

from parent.image.archive import read_archive
from parent.image.container import Wanted
from parent.image.oci import read_files
from parent.image.source import Source
from parent.image.spool import Spool
from parent.image.tar import read_members
from parent.image.tree import File, ImageBuildError
from tests.parent.image.containers import (
    Container,
    Layout,
    docker_archive,
    hard_link,
    layout,
    symlink,
    tar,
)

LAYER = tar({"bin/": None, "bin/hello": b"hello", "l": symlink("bin"), "h": hard_link("bin/hello"), ".wh.x": b""})


class Memory:
    """A layout's files, of which each blob is named for what it is."""

    def __init__(self, made: Layout) -> None:
        self._files = made.all()

    def open(self, name: str) -> BinaryIO:
        if name not in self._files:
            raise ImageBuildError("missing_blob", name)
        return io.BytesIO(self._files[name])


def one_input(data: bytes) -> None:
    _members(data)
    _read(lambda folder: read_archive(_written(folder, data), Wanted(), Spool(folder, _quiet, most=1 << 20)))
    for made in (_as_layer(data), _as_config(data), _as_manifest(data), _as_index(data)):
        _read(lambda folder, made=made: read_files(Memory(made), Wanted(), Spool(folder, _quiet, most=1 << 20)))  # type: ignore[misc]


def _members(data: bytes) -> None:
    try:
        members = list(read_members(io.BytesIO(data)))
    except ImageBuildError as error:
        _hold_printable(error)
        return
    for member in members:
        assert member.offset + member.size <= len(data), "a file with more than there is"
        assert not member.path.startswith("/"), "an absolute path"
        assert ".." not in member.path.split("/"), "a path that leads out"


def _read(read: Callable[[Path], Source]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        try:
            source = read(Path(folder))
        except ImageBuildError as error:
            _hold_printable(error)
            return
        for entry in source.tree.values():
            if isinstance(entry, File):
                assert sum(map(len, entry.pieces())) == entry.size, "a file of another size"


def _hold_printable(error: ImageBuildError) -> None:
    assert str(error).isprintable(), "an error that can move a terminal's cursor"


def _written(folder: Path, data: bytes) -> Path:
    path = folder / "archive"
    path.write_bytes(data)
    return path


def _as_layer(data: bytes) -> Layout:
    return layout(Container([LAYER, data], packed=False))


def _as_config(data: bytes) -> Layout:
    made = Layout()
    value = {"config": made.blob(data, ""), "layers": [made.blob(LAYER, "application/vnd.oci.image.layer.v1.tar")]}
    made.manifests = [made.blob(json.dumps(value).encode(), "application/vnd.oci.image.manifest.v1+json")]
    return made


def _as_manifest(data: bytes) -> Layout:
    made = layout(Container([LAYER], packed=False))
    made.manifests = [made.blob(data, "application/vnd.oci.image.manifest.v1+json")]
    return made


def _as_index(data: bytes) -> Layout:
    made = layout(Container([LAYER], packed=False))
    made.files["index.json"] = data
    return made


def _quiet(what: str, done: int, total: int) -> None:
    pass


def seeds() -> list[bytes]:
    container = Container([LAYER], packed=False)
    made = layout(container)
    manifest = made.manifests[0]["digest"][7:]
    assert hashlib.sha256(made.files[f"blobs/sha256/{manifest}"]).hexdigest() == manifest
    return [
        LAYER,
        tar(made.all()),
        docker_archive((container, ["hello:1"])),
        container.config,
        made.files[f"blobs/sha256/{manifest}"],
        made.all()["index.json"],
    ]
