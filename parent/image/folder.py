"""A root file system that lies in a folder."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import BinaryIO

from parent.image.source import LINK_MODE, Material, Source, tree_digest, without_bytecode
from parent.image.tree import Device, Directory, Entry, File, ImageBuildError, Symlink, Tree


def read_folder(folder: Path) -> Source:
    """The files of ``folder``, owned by 0:0, with the modes that they have.

    Hard links become files of their own. A socket has no place in an image, and what cannot be read would be missing
    from it: both are errors. Raises ImageBuildError: ``unreadable_source``, ``unusable_file``, ``changed_file``, and
    those of :class:`Tree`.
    """
    if not folder.is_dir():
        raise ImageBuildError("unreadable_source", f"{str(folder)!a} is no folder", expected="a root file system")
    try:
        entries, notes = without_bytecode(list_folder(folder))
        tree = Tree.of(entries)
        digest = tree_digest(tree)
    except OSError as error:
        raise ImageBuildError(
            "unreadable_source", f"{str(error.filename)!a} cannot be read: {error.strerror}"
        ) from error
    material = Material("rootfs", {"sha256": digest}, {"kind": "canonical listing of a root file system"})
    return Source(tree, digest=f"sha256:{digest}", materials=(material,), notes=notes)


def list_folder(folder: Path) -> Iterator[Entry]:
    """All that is in ``folder``, as :func:`read_folder` has it. Raises ImageBuildError ``unusable_file``, OSError."""
    return _entries(os.fspath(folder), "")


def _entries(folder: str, path: str) -> Iterator[Entry]:
    with os.scandir(folder) as found:
        names = sorted(entry.name for entry in found)
    for name in names:
        yield from _entry(os.path.join(folder, name), f"{path}/{name}" if path else name)


def _entry(where: str, path: str) -> Iterator[Entry]:
    status = os.lstat(where)
    mode = stat.S_IMODE(status.st_mode)
    match stat.S_IFMT(status.st_mode):
        case stat.S_IFDIR:
            yield Directory(path, mode)
            yield from _entries(where, path)
        case stat.S_IFREG:
            yield File(path, mode, status.st_size, partial(_open, where, path, _identity(status)))
        case stat.S_IFLNK:
            yield Symlink(path, LINK_MODE, os.readlink(where))
        case stat.S_IFIFO:
            yield Device(path, mode, "fifo")
        case stat.S_IFCHR | stat.S_IFBLK as kind:
            numbers = os.major(status.st_rdev), os.minor(status.st_rdev)
            yield Device(path, mode, "char" if kind == stat.S_IFCHR else "block", *numbers)
        case _:
            raise ImageBuildError(
                "unusable_file", f"{path!a} has no place in an image: remove it", expected="no sockets"
            )


def _identity(status: os.stat_result) -> tuple[int, ...]:
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns


def _open(where: str, path: str, identity: tuple[int, ...]) -> BinaryIO:
    """The file that was looked at, and no other that has taken its place."""
    file = os.fdopen(os.open(where, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC), "rb")
    if _identity(os.fstat(file.fileno())) != identity:
        file.close()
        what = f"{path!a} is not the file that it was a moment ago, or not the same version of it"
        raise ImageBuildError("changed_file", what)
    return file
