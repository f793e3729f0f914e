"""How Linux unpacks ramdisks (init/initramfs.c), errors and all that it does not say: a file system in memory, to which
the entries of ``tests.cpio_files`` are done one after the other. Without any code of the reader.
"""

from __future__ import annotations

import stat
from collections.abc import Sequence
from dataclasses import dataclass, field

from tests.cpio_files import Member

MAX_LINKS = 40


@dataclass
class Node:
    """An inode."""

    kind: int
    data: bytes = b""
    """Of a link the target."""
    names: dict[str, Node] = field(default_factory=dict)
    parent: Node | None = None


def new_root() -> Node:
    return Node(stat.S_IFDIR)


class Linux:
    """The root file system while ramdisks are unpacked over it."""

    def __init__(self) -> None:
        self.root = new_root()

    def unpack(self, members: Sequence[Member]) -> None:
        """One archive."""
        linked: dict[tuple[int, tuple[int, int], int], str] = {}
        for member in members:
            assert isinstance(member.name, str)
            kind = stat.S_IFMT(member.mode)
            if kind == stat.S_IFLNK:
                self._clean(member.name, 0)
                self._make(member.name, Node(kind, member.data))
                continue
            self._clean(member.name, kind)
            if kind == stat.S_IFDIR:
                self._make(member.name, Node(kind))
                continue
            old = None
            if member.links > 1:
                key = member.inode, (0, 0), kind
                old = linked.get(key)
                if old is None:
                    linked[key] = member.name
            if old is not None:
                self._clean(member.name, 0)
                source = self._find(old, follow_last=False)
                if source is None or source.kind == stat.S_IFDIR or not self._make(member.name, source):
                    continue
            if kind != stat.S_IFREG:
                if old is None:
                    self._make(member.name, Node(kind))
                continue
            found = self._find(member.name, follow_last=True)
            if found is None:
                found = Node(kind)
                if not self._make(member.name, found):
                    continue
            if found.kind == stat.S_IFREG:
                found.data = member.data + (
                    found.data[len(member.data) :] if old is not None and not member.data else b""
                )

    def read(self, path: str) -> bytes | None:
        """Of the file at ``path``, absolute, once ``/rootfs`` has been made the root."""
        root = self._find("rootfs", follow_last=True)
        if root is None or root.kind != stat.S_IFDIR:
            return None
        root.parent = None
        self.root = root
        found = self._find(path, follow_last=True)
        return None if found is None or found.kind != stat.S_IFREG else found.data

    def files(self) -> dict[str, bytes | None]:
        """What regular files have; None for everything else. The root is left out."""
        found, left = dict[str, bytes | None](), [("", self.root)]
        while left:
            above, folder = left.pop()
            for name, node in folder.names.items():
                found[above + name] = node.data if node.kind == stat.S_IFREG else None
                left.append((f"{above}{name}/", node))
        return found

    def _clean(self, path: str, kind: int) -> None:
        place = self._place(path)
        if place is not None:
            folder, name = place
            found = folder.names.get(name)
            if found is not None and found.kind != kind and not found.names:
                del folder.names[name]

    def _make(self, path: str, node: Node) -> bool:
        place = self._place(path)
        if place is None or place[1] in place[0].names:
            return False
        place[0].names[place[1]] = node
        if node.kind == stat.S_IFDIR:
            node.parent = place[0]
        return True

    def _place(self, path: str) -> tuple[Node, str] | None:
        above, _, name = path.rpartition("/")
        folder = self._find(above, follow_last=True)
        return None if folder is None or folder.kind != stat.S_IFDIR else (folder, name)

    def _find(self, path: str, *, follow_last: bool) -> Node | None:
        parts, at, followed = path.split("/"), self.root, 0
        while parts:
            part = parts.pop(0)
            if part in ("", "."):
                continue
            if at.kind != stat.S_IFDIR:
                return None
            if part == "..":
                at = at.parent or at
                continue
            found = at.names.get(part)
            if found is None:
                return None
            if found.kind == stat.S_IFLNK and (parts or follow_last):
                followed += 1
                if followed > MAX_LINKS:
                    return None
                target = found.data.decode()
                parts = [*target.split("/"), *parts]
                at = self.root if target.startswith("/") else at
                continue
            at = found
        return at
