"""Container layers, one above the other, as one root file system (OCI image specification, "Image Layer Filesystem
Changeset").

A layer is never unpacked to disk: its members are entries whose content is a part of the layer's file. So there is no
link to follow and nothing to escape to; a path through what is no directory is refused by :class:`Tree`.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Final

from parent.image.source import LINK_MODE, without_bytecode
from parent.image.spool import open_part
from parent.image.tar import Kind, Member, read_members
from parent.image.tree import Device, Directory, Entry, File, ImageBuildError, Symlink, Tree, encode_path

WHITEOUT: Final = ".wh."
OPAQUE: Final = ".wh..wh..opq"
MAX_MEMBERS: Final = 1_000_000
"""Of all layers together."""
MAX_NAMES_SIZE: Final = 256 << 20
"""Bytes of all their paths, links' targets and names of attributes, which are held in memory. A large distribution has
20 MB of them."""
_SHOWN_ATTRIBUTES: Final = 5
"""Names of extended attributes that are kept and told of."""


def flatten(layers: Sequence[Path]) -> tuple[Tree, tuple[str, ...]]:
    """The root file system of ``layers``, the lowest first, and notes on what it lacks of them.

    The files stay in use. Raises ImageBuildError: ``malformed_archive``, ``malformed_layer``, and those of Tree.
    """
    merged: dict[str, Entry] = {}
    attributes: dict[str, tuple[str, ...]] = {}
    count = size = 0
    for number, path in enumerate(layers):
        with path.open("rb") as file:
            layer = _Layer(path, number, merged)
            for member in read_members(file):
                count, size = count + 1, size + _names_size(member)
                if count > MAX_MEMBERS or size > MAX_NAMES_SIZE:
                    expected = f"{MAX_MEMBERS} files, {MAX_NAMES_SIZE} bytes of names"
                    raise ImageBuildError("malformed_layer", "too much in all layers", expected=f"at most {expected}")
                layer.take(member)
        merged = layer.merged()
        attributes = {path: names for path, names in attributes.items() if path in merged} | layer.attributes
    entries, notes = without_bytecode(merged.values())
    lost = {path: names for path, names in attributes.items() if names and path in merged}
    return Tree.of(entries), (*notes, *_attribute_notes(lost))


class _Layer:
    def __init__(self, path: Path, number: int, lower: Mapping[str, Entry]) -> None:
        self._path, self._number, self._lower = path, number, lower
        self._upper: dict[str, Entry] = {}
        self._removed: set[str] = set()
        self._opaque: set[str] = set()
        self._linked: dict[str, str] = {}
        self.attributes: dict[str, tuple[str, ...]] = {}

    def take(self, member: Member) -> None:
        folder, _, name = member.path.rpartition("/")
        if name.startswith(WHITEOUT):
            self._white_out(member, folder, name)
            return
        if not member.path:
            if member.kind is not Kind.DIRECTORY:
                raise self._malformed(member, "the root is no directory", got=member.kind.name)
            return  # an enclave's root has the mode and owner of its own
        entry = self._entry(member)
        before = self._upper.get(member.path)
        if before is not None and not (isinstance(entry, Directory) and before == entry):
            raise self._malformed(member, "it is there twice")
        self._upper[member.path] = entry
        self.attributes[member.path] = member.extended_attributes[:_SHOWN_ATTRIBUTES]

    def merged(self) -> dict[str, Entry]:
        """The entries of all layers to this one."""
        for path, target in self._linked.items():
            if self._hidden(target):
                raise ImageBuildError(
                    "malformed_layer", f"layer {self._number}: {path!a} is a link to what the layer removes"
                )
        return {path: entry for path, entry in self._lower.items() if not self._hidden(path)} | self._upper

    def _white_out(self, member: Member, folder: str, name: str) -> None:
        if member.kind is not Kind.FILE or member.size:
            raise self._malformed(member, "a whiteout is no empty file", got=member.kind.name)
        if name == OPAQUE:
            self._opaque.add(folder)
            return
        name = name.removeprefix(WHITEOUT)
        if name in ("", ".", "..") or name.startswith(WHITEOUT):
            raise self._malformed(member, "a whiteout of nothing that can be there")
        self._removed.add(f"{folder}/{name}" if folder else name)

    def _hidden(self, path: str) -> bool:
        """Whether what lower layers have at ``path`` is gone: itself or with a directory that it lies in. What this
        layer has there besides is not meant.
        """
        if path in self._removed or "" in self._opaque:
            return True
        for folder in _folders(path):
            above = self._upper.get(folder)
            if folder in self._removed or folder in self._opaque:
                return True
            if above is not None and not isinstance(above, Directory):
                return True
        return False

    def _entry(self, member: Member) -> Entry:
        owner = {"uid": member.uid, "gid": member.gid}
        match member.kind:
            case Kind.DIRECTORY:
                return Directory(member.path, member.mode, **owner)
            case Kind.FILE:
                part = partial(open_part, self._path, member.offset, member.size)
                return File(member.path, member.mode, member.size, part, **owner)
            case Kind.SYMLINK:
                return Symlink(member.path, LINK_MODE, member.target, **owner)
            case Kind.HARD_LINK:
                return self._link(member)
            case Kind.FIFO:
                return Device(member.path, member.mode, "fifo", **owner)
            case Kind.CHAR:
                return Device(member.path, member.mode, "char", member.major, member.minor, **owner)
            case Kind.BLOCK:
                return Device(member.path, member.mode, "block", member.major, member.minor, **owner)

    def _link(self, member: Member) -> Entry:
        """A hard link is another name for the same content: in an image, a file of its own."""
        target = self._upper.get(member.target)
        if target is None:
            target = self._lower.get(member.target)
            self._linked[member.path] = member.target
        if target is None or isinstance(target, Directory):
            expected = "a file before it in its layer, or in a layer below"
            raise self._malformed(member, "a hard link to no file", expected=expected, got=ascii(member.target)[:100])
        return replace(target, path=member.path)

    def _malformed(
        self, member: Member, message: str, *, expected: str | None = None, got: str | None = None
    ) -> ImageBuildError:
        where = f"layer {self._number}, {ascii(member.path)[:100]}"
        return ImageBuildError("malformed_layer", f"{where}: {message}", expected=expected, got=got)


def _names_size(member: Member) -> int:
    return sum(len(encode_path(text)) for text in (member.path, member.target, *member.extended_attributes))


def _folders(path: str) -> Iterator[str]:
    while path := path.rpartition("/")[0]:
        yield path


def _attribute_notes(lost: Mapping[str, Iterable[str]]) -> Iterator[str]:
    """An initramfs has no extended attributes: a file capability among them is lost."""
    if lost:
        names: AbstractSet[str] = {name for each in lost.values() for name in each}
        listed = ", ".join(ascii(name)[1:-1] for name in sorted(names)[:_SHOWN_ATTRIBUTES])
        yield f"extended attributes of {len(lost)} files were left out: an enclave's root has none ({listed})"
