"""The parts of an enclave image on disk, and its files unpacked where nothing of them can do harm.

Every byte that leaves here was measured: a section that is no longer what it was is ImageError ``changed_image``, and
what had been written of it is taken back.
"""

from __future__ import annotations

import contextlib
import errno
import os
import secrets
import shutil
import stat
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO, Final

from attestation.eif import Section
from attestation.image_files import ramdisks, unsafe_entry
from attestation.measure import CHUNK_SIZE, EnclaveImage, SectionReader
from attestation.ramdisk import Kind, RamdiskEntry
from strongroom.files import require_new

_NEW: Final = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
_FOLDER: Final = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
_NODES: Final = {
    Kind.CHARACTER_DEVICE: stat.S_IFCHR,
    Kind.BLOCK_DEVICE: stat.S_IFBLK,
    Kind.FIFO: stat.S_IFIFO,
    Kind.SOCKET: stat.S_IFSOCK,
}


@dataclass(slots=True)
class Unpacked:
    """What was made of an image."""

    wrote: list[Path] = field(default_factory=list)
    """The files of sections, and the folders of ramdisks."""
    entries: int = 0
    """The number of files, folders and links that were unpacked."""
    left_out: list[str] = field(default_factory=list)
    """Paths of devices, pipes and sockets that were not made."""


@contextlib.contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """A folder that is not there yet, to be filled in the block: under its name when that is left, or not at all.

    Raises FileExistsError, OSError.
    """
    require_new(path)
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(8)}")
    temporary.mkdir(mode=0o700)
    try:
        yield temporary
        temporary.chmod(0o755)
        if os.path.lexists(path):  # rename would put it in place of an empty one
            raise FileExistsError(errno.EEXIST, "File exists; nothing was changed", str(path))
        temporary.rename(path)
    except BaseException:
        _remove(temporary)
        raise


def _remove(folder: Path) -> None:
    for name, _, _ in os.walk(folder):  # what was unpacked may lack the permission to be listed
        Path(name).chmod(0o700)
    shutil.rmtree(folder)


def write_section(file: BinaryIO, section: Section, path: Path) -> None:
    """The data of one section. Raises ImageError ``changed_image``, OSError."""
    data = SectionReader(file, section)
    with path.open("xb") as out:
        while piece := data.read(CHUNK_SIZE):
            out.write(piece)


def unpack(image: EnclaveImage, file: BinaryIO, folder: Path, *, as_root: bool) -> Unpacked:
    """All ramdisks, one over the other as when an enclave starts, into ``folder``, which is empty.

    Nothing is written through a link, and set-user-id bits, owners and devices are left out unless ``as_root``. Raises
    ImageFileError ``unsafe_entry``, ImageError, OSError.
    """
    done = Unpacked()
    for reader in ramdisks(image, file):
        with _Tree(folder, as_root) as tree:
            for entry in reader:
                if entry.kind in _NODES and not as_root:
                    done.left_out.append(entry.path)
                    continue
                tree.add(entry, reader.content())
                done.entries += 1
    return done


class _Tree:
    """A folder into which entries are unpacked. Modes of folders are set at the end: one may forbid to write in it."""

    def __init__(self, folder: Path, as_root: bool) -> None:
        self._root = os.open(folder, _FOLDER)
        self._as_root = as_root
        self._folders: dict[str, RamdiskEntry] = {}
        self._names: dict[tuple[int, tuple[int, int, int]], str] = {}

    def __enter__(self) -> _Tree:
        return self

    def __exit__(self, *_: object) -> None:
        try:
            for path, entry in sorted(self._folders.items(), reverse=True):
                with self._opened(path.split("/"), path) as folder:
                    os.fchmod(folder, self._mode(entry) if self._as_root else entry.mode & 0o777 | 0o700)
        finally:
            os.close(self._root)

    def add(self, entry: RamdiskEntry, content: Iterator[bytes]) -> None:
        if not entry.path:
            return
        *parents, name = entry.path.split("/")
        with self._opened(parents, entry.path) as parent:
            self._make(parent, name, entry, content)
            if self._as_root:
                os.chown(name, entry.uid, entry.gid, dir_fd=parent, follow_symlinks=False)
                if entry.kind is not Kind.SYMLINK:  # after the owner: a change of owner clears set-user-id
                    os.chmod(name, self._mode(entry), dir_fd=parent)  # what was just made is no link

    def _make(self, parent: int, name: str, entry: RamdiskEntry, content: Iterator[bytes]) -> None:
        if entry.kind is Kind.DIRECTORY:
            try:
                os.mkdir(name, 0o700, dir_fd=parent)
            except FileExistsError as error:  # a folder may come twice; a link is not one, wherever it leads
                if not stat.S_ISDIR(os.stat(name, dir_fd=parent, follow_symlinks=False).st_mode):
                    raise unsafe_entry(entry.path, "takes the place of what is no folder") from error
            self._folders[entry.path] = entry
            return
        self._replace(parent, name, entry)
        if entry.kind is Kind.SYMLINK:
            os.symlink(entry.target or "", name, dir_fd=parent)
        elif entry.kind in _NODES:
            device = 0 if entry.device is None else os.makedev(*entry.device)
            os.mknod(name, _NODES[entry.kind] | self._mode(entry), device, dir_fd=parent)
        else:
            self._write(parent, name, entry, content)

    def _write(self, parent: int, name: str, entry: RamdiskEntry, content: Iterator[bytes]) -> None:
        known = self._names.get((entry.archive, entry.inode)) if entry.links > 1 else None
        if known is None:
            self._names[entry.archive, entry.inode] = entry.path
            descriptor = os.open(name, _NEW, self._mode(entry) | 0o600, dir_fd=parent)
        else:
            *parents, other = known.split("/")
            with self._opened(parents, entry.path) as folder:
                os.link(other, name, src_dir_fd=folder, dst_dir_fd=parent, follow_symlinks=False)
            flags = os.O_WRONLY | os.O_NOFOLLOW | os.O_CLOEXEC | (os.O_TRUNC if entry.size else 0)
            descriptor = os.open(name, flags, dir_fd=parent)
        with os.fdopen(descriptor, "wb") as out:
            out.writelines(content)
            out.flush()
            os.utime(descriptor, (entry.mtime, entry.mtime))

    def _replace(self, parent: int, name: str, entry: RamdiskEntry) -> None:
        """What comes later under the same name takes its place, but not that of a folder."""
        try:
            os.unlink(name, dir_fd=parent)
        except FileNotFoundError:
            return
        except (IsADirectoryError, PermissionError) as error:
            raise unsafe_entry(entry.path, "takes the place of a folder") from error

    def _mode(self, entry: RamdiskEntry) -> int:
        return entry.mode if self._as_root else entry.mode & 0o777

    @contextlib.contextmanager
    def _opened(self, parents: Sequence[str], path: str) -> Iterator[int]:
        """The folder at ``parents``, which holds ``path``: no part of the way is a link."""
        folder = os.dup(self._root)
        try:
            for part in parents:
                try:
                    inner = os.open(part, _FOLDER, dir_fd=folder)
                except FileNotFoundError as error:
                    raise unsafe_entry(path, "is in a folder that does not come before it") from error
                except OSError as error:
                    if error.errno not in (errno.ELOOP, errno.ENOTDIR):
                        raise
                    raise unsafe_entry(path, "is within what is no folder, or a link to one") from error
                os.close(folder)
                folder = inner
            yield folder
        finally:
            os.close(folder)
