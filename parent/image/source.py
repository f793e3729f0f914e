"""What every source of an image comes to: a root file system, what to run in it, and where both are from."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Final, TypeAlias

from attestation.strict_json import Json
from parent.image.tree import Device, Directory, Entry, File, Symlink, Tree, encode_path

LINK_MODE: Final = 0o777
"""Of every symbolic link: Linux asks nobody for it, and some archives have another."""
Progress: TypeAlias = Callable[[str, int, int], None]
"""Told what goes on, bytes done and bytes in all (0: not known)."""

_BYTECODE_FOLDER: Final = "__pycache__"
_BYTECODE: Final = re.compile(r"\.py[co]\Z")


@dataclass(frozen=True, slots=True)
class Material:
    """One input of a build, by its digests: what in-toto calls a resource descriptor."""

    name: str
    digest: Mapping[str, str]
    """Hexadecimal, by algorithm."""
    annotations: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Source:
    """A root file system with what a container's configuration says of it."""

    tree: Tree
    entrypoint: tuple[str, ...] = ()
    cmd: tuple[str, ...] = ()
    env: tuple[str, ...] = ()
    """``NAME=value``, in the order of the configuration."""
    working_dir: str = ""
    user: str = ""
    digest: str = ""
    """``sha256:HEX``: of a container's manifest (docker's archives: of its configuration), of a folder's tree."""
    materials: tuple[Material, ...] = ()
    notes: tuple[str, ...] = ()
    """What was left out or will not take effect, for a person."""
    docker_info: Mapping[str, Json] = field(default_factory=dict)
    """The container's own description: what the image's metadata have as DockerInfo."""

    @property
    def command(self) -> tuple[str, ...]:
        """What a container engine would run: the entry point with the command as its arguments."""
        return self.entrypoint + self.cmd


def without_bytecode(entries: Iterable[Entry]) -> tuple[list[Entry], tuple[str, ...]]:
    """``entries`` without Python's bytecode caches, which hold the times of the sources, and a note that says so."""
    kept: list[Entry] = []
    dropped = 0
    for entry in entries:
        cache = _BYTECODE_FOLDER in entry.path.split("/")
        if cache or (isinstance(entry, File) and _BYTECODE.search(entry.path)):
            dropped += isinstance(entry, File)
        else:
            kept.append(entry)
    return kept, (f"{dropped} Python bytecode caches were left out",) if dropped else ()


def tree_digest(tree: Tree) -> str:
    """SHA-256 over the tree in canonical order, hexadecimal: each entry's path, mode, owner, kind, and target, device
    number, or size and SHA-256 of its content; NUL-separated, a newline after each.

    Raises as :meth:`File.pieces`.
    """
    digest = hashlib.sha256()
    for entry in tree.values():
        match entry:
            case Directory():
                of_kind = [b"directory"]
            case File():
                of_kind = [b"file", b"%d" % entry.size, file_digest(entry).encode()]
            case Symlink():
                of_kind = [b"symlink", encode_path(entry.target)]
            case Device():
                of_kind = [entry.kind.encode(), b"%d:%d" % (entry.major, entry.minor)]
            case _:
                raise AssertionError(type(entry))
        fields = [encode_path(entry.path), b"%o" % entry.mode, b"%d:%d" % (entry.uid, entry.gid), *of_kind]
        digest.update(b"\0".join(fields) + b"\n")
    return digest.hexdigest()


def file_digest(entry: File) -> str:
    """SHA-256 of a file's content, hexadecimal. Raises as :meth:`File.pieces`."""
    digest = hashlib.sha256()
    for piece in entry.pieces():
        digest.update(piece)
    return digest.hexdigest()
