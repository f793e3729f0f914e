"""Containers written without any code of ours: layers by Python's tarfile, and around them what the OCI image layout
and ``docker save`` have.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import tarfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from io import BytesIO
from pathlib import Path
from typing import Any

MANIFEST = "application/vnd.oci.image.manifest.v1+json"
INDEX = "application/vnd.oci.image.index.v1+json"
LAYER = "application/vnd.oci.image.layer.v1.tar"
CONFIG = "application/vnd.oci.image.config.v1+json"

Content = bytes | tarfile.TarInfo | None
"""Of a member: a file's bytes, a header of any kind, or None for a directory."""


def member(kind: bytes, target: str = "", **fields: Any) -> tarfile.TarInfo:
    info = tarfile.TarInfo()
    info.type, info.linkname = kind, target
    for name, value in fields.items():
        setattr(info, name, value)
    return info


def symlink(target: str, **fields: Any) -> tarfile.TarInfo:
    return member(tarfile.SYMTYPE, target, **fields)


def hard_link(target: str) -> tarfile.TarInfo:
    return member(tarfile.LNKTYPE, target)


def tar(members: Mapping[str, Content] | Sequence[tuple[str, Content]], format: int = tarfile.PAX_FORMAT) -> bytes:
    out = BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=format) as archive:
        for path, content in members.items() if isinstance(members, Mapping) else members:
            match content:
                case bytes():
                    info = tarfile.TarInfo(path)
                    info.size, info.mtime = len(content), 1_700_000_000
                    archive.addfile(info, BytesIO(content))
                case tarfile.TarInfo():
                    content.name = path
                    archive.addfile(content)
                case None:
                    info = tarfile.TarInfo(path)
                    info.type, info.mode = tarfile.DIRTYPE, 0o755
                    archive.addfile(info)
    return out.getvalue()


def sha256(data: bytes) -> str:
    return "sha256:" + hashlib.sha256(data).hexdigest()


@dataclass
class Container:
    """``layers`` are plain archives, the lowest first."""

    layers: Sequence[bytes]
    runs: Mapping[str, Any] = field(default_factory=lambda: {"Cmd": ["/bin/hello"], "Env": ["PATH=/bin"]})
    architecture: str = "amd64"
    packed: bool = True

    @property
    def config(self) -> bytes:
        rootfs = {"type": "layers", "diff_ids": [sha256(layer) for layer in self.layers]}
        value = {"architecture": self.architecture, "os": "linux", "config": self.runs, "rootfs": rootfs}
        return json.dumps({**value, "created": "2024-01-01T00:00:00Z", "history": []}).encode()


class Layout:
    """The files of an OCI layout, and what may be changed of them before they are written."""

    def __init__(self) -> None:
        self.files: dict[str, bytes] = {"oci-layout": b'{"imageLayoutVersion": "1.0.0"}'}
        self.manifests: list[dict[str, Any]] = []

    def blob(self, data: bytes, kind: str) -> dict[str, Any]:
        digest = sha256(data)
        self.files[f"blobs/sha256/{digest[7:]}"] = data
        return {"mediaType": kind, "digest": digest, "size": len(data)}

    def add(self, container: Container, **said: Any) -> dict[str, Any]:
        """Puts a container in, and its manifest's descriptor, with ``said`` in it, into the index."""
        descriptor = {**self.manifest(container), **said}
        self.manifests.append(descriptor)
        return descriptor

    def manifest(self, container: Container, **said: Any) -> dict[str, Any]:
        layers = [
            self.blob(gzip.compress(layer, mtime=0), f"{LAYER}+gzip") if container.packed else self.blob(layer, LAYER)
            for layer in container.layers
        ]
        config = self.blob(container.config, CONFIG)
        value = {"schemaVersion": 2, "mediaType": MANIFEST, "config": config, "layers": layers, **said}
        return self.blob(json.dumps(value).encode(), MANIFEST)

    def all(self) -> dict[str, bytes]:
        index = {"schemaVersion": 2, "mediaType": INDEX, "manifests": self.manifests}
        return {"index.json": json.dumps(index).encode(), **self.files}

    def write(self, folder: Path) -> Path:
        for name, data in self.all().items():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_bytes(data)
        return folder


def layout(container: Container) -> Layout:
    made = Layout()
    made.add(container)
    return made


def docker_archive(*containers: tuple[Container, Sequence[str]], **extra: Content) -> bytes:
    """As ``docker save`` wrote it before docker had OCI layouts."""
    members: dict[str, Content] = {}
    manifest = []
    for container, tags in containers:
        name = f"{sha256(container.config)[7:]}.json"
        members[name] = container.config
        layers = []
        for layer in container.layers:
            folder = sha256(layer)[7:]
            members[f"{folder}/"] = None
            members[f"{folder}/layer.tar"] = layer
            layers.append(f"{folder}/layer.tar")
        manifest.append({"Config": name, "RepoTags": list(tags), "Layers": layers})
    return tar({**members, "manifest.json": json.dumps(manifest).encode(), **extra})
