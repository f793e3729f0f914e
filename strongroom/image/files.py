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
from attestation.image_files import ImageFileError, ramdisks
from attestation.measure import EnclaveImage, SectionReader
from attestation.parallel_hashes import CHUNK_SIZE
from attestation.ramdisk import Kind, RamdiskEntry
from strongroom.files import require_new

_NEW: Final = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
_AGAIN: Final = os.O_WRONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
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
def new_folder(path: Path, *, mode: int = 0o755) -> Iterator[Path]:
    """A folder that is not there yet, to be filled in the block: under its name, with ``mode``, when that is left, or
    not at all.

    Raises FileExistsError, OSError.
    """
    require_new(path)
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(8)}")
    temporary.mkdir(mode=0o700)
    try:
        yield temporary
        temporary.chmod(mode)
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


def unpack(image: EnclaveImage, file: BinaryIO, folder: Path, *, as_root: bool, most: int) -> Unpacked:
    """All ramdisks, one over the other as when an enclave starts, into ``folder``, which is empty: at most ``most``
    bytes of files.

    Nothing is written through a link or to a device. Unless ``as_root`` devices and owners are left out, and so are
    set-user-id bits and what would let others write. Raises ImageFileError ``files_too_large``, and ``unsafe_entry``
    where the folder has something else than was made in it; ImageError, OSError.
    """
    done, left = Unpacked(), most
    for reader in ramdisks(image, file):
        with _Tree(folder, as_root) as tree:
            for entry in reader:
                if entry.kind in _NODES and not as_root:
                    done.left_out.append(entry.path)
                    continue
                left -= entry.size
                if left < 0:
                    message, expected = "the image's files are too large together", f"at most {most} bytes"
                    raise ImageFileError("files_too_large", message, expected=expected, got="more")
                tree.add(entry, reader.content())
                done.entries += 1
    return done


class _Tree:
    """A folder into which entries are unpacked. Modes of folders are set at the end: one may forbid to write in it.

    The reader has refused whatever would not be made as it is listed. That a name leads elsewhere all the same, in a
    file system that ignores case or because somebody changes the folder meanwhile, is an error here.
    """

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
                    if self._as_root:
                        os.fchown(folder, entry.uid, entry.gid)
                    os.fchmod(folder, self._mode(entry) | (0 if self._as_root else 0o700))
        finally:
            os.close(self._root)

    def add(self, entry: RamdiskEntry, content: Iterator[bytes]) -> None:
        if not entry.path:
            return
        *parents, name = entry.path.split("/")
        with self._opened(parents, entry.path) as parent:
            if entry.kind is Kind.DIRECTORY:
                with contextlib.suppress(FileExistsError):  # what is there is opened as a folder, or not at all
                    os.mkdir(name, 0o700, dir_fd=parent)
                self._folders[entry.path] = entry
                return
            try:
                self._make(parent, name, entry, content)
            except FileExistsError as error:
                raise _unsafe(entry.path) from error

    def _make(self, parent: int, name: str, entry: RamdiskEntry, content: Iterator[bytes]) -> None:
        if entry.kind is Kind.FILE:
            self._write(parent, name, entry, content)
            return
        if entry.kind is Kind.SYMLINK:
            os.symlink(entry.target or "", name, dir_fd=parent)
        else:
            device = 0 if entry.device is None else os.makedev(*entry.device)
            os.mknod(name, _NODES[entry.kind] | entry.mode, device, dir_fd=parent)
        if self._as_root:
            os.chown(name, entry.uid, entry.gid, dir_fd=parent, follow_symlinks=False)
            if entry.kind is not Kind.SYMLINK:
                os.chmod(name, entry.mode, dir_fd=parent)  # what was just made is no link

    def _write(self, parent: int, name: str, entry: RamdiskEntry, content: Iterator[bytes]) -> None:
        """Names of one file are links to the first of them; content that comes with one is that of all."""
        inode = entry.archive, entry.inode
        known = self._names.get(inode) if entry.links > 1 else None
        if entry.links > 1:
            self._names.setdefault(inode, entry.path)
        if known is None:
            descriptor = os.open(name, _NEW, 0o600, dir_fd=parent)
        else:
            *parents, other = known.split("/")
            with self._opened(parents, entry.path) as folder:
                os.link(other, name, src_dir_fd=folder, dst_dir_fd=parent, follow_symlinks=False)
            descriptor = os.open(name, _AGAIN, dir_fd=parent)
        with os.fdopen(descriptor, "wb") as out:
            if not stat.S_ISREG(os.fstat(descriptor).st_mode):
                raise _unsafe(entry.path)
            if entry.size:
                out.truncate(0)
            out.writelines(content)
            out.flush()
            if self._as_root:
                os.fchown(descriptor, entry.uid, entry.gid)
            os.fchmod(descriptor, self._mode(entry) | (0 if self._as_root else 0o600))  # a change of owner clears bits
            os.utime(descriptor, (entry.mtime, entry.mtime))

    def _mode(self, entry: RamdiskEntry) -> int:
        return entry.mode if self._as_root else entry.mode & 0o755

    @contextlib.contextmanager
    def _opened(self, parents: Sequence[str], path: str) -> Iterator[int]:
        """The folder at ``parents``, which holds ``path``: no part of the way is a link."""
        folder = os.dup(self._root)
        try:
            for part in parents:
                try:
                    inner = os.open(part, _FOLDER, dir_fd=folder)
                except OSError as error:
                    if error.errno not in (errno.ELOOP, errno.ENOTDIR):
                        raise
                    raise _unsafe(path) from error
                os.close(folder)
                folder = inner
            yield folder
        finally:
            os.close(folder)


def _unsafe(path: str) -> ImageFileError:
    message, expected = "something else is in the folder than was unpacked into it", "a file system that keeps names"
    return ImageFileError("unsafe_entry", message, expected=expected, got=ascii(path)[1:-1])
