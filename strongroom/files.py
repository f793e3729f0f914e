"""Files that a person names: read within a bound, written whole or not at all, and never over one that is there."""

from __future__ import annotations

import contextlib
import errno
import os
import secrets
import stat
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO, Final

from attestation.bundle import MAX_BUNDLE
from attestation.errors import StrongroomError

NEW_FILE_MODE: Final = 0o644


class FileError(StrongroomError):
    """A file that cannot be what it was given as: ``too_large``."""

    exit_code = 2


def read_bounded(path: Path, limit: int) -> bytes:
    """A whole file of at most ``limit`` bytes. Raises FileError, OSError."""
    with path.open("rb") as file:
        data = file.read(limit + 1)
    if len(data) > limit:
        raise FileError("too_large", f"{path} is too large", expected=f"at most {limit} bytes", got="more")
    return data


def read_evidence(path: Path) -> bytes:
    """What is to be read as a bundle, Evidence or a document: from a file, or from standard input for ``-``.

    One byte more than a bundle may have, where there are more, so that its reader refuses it. Raises OSError.
    """
    if str(path) == "-":
        return sys.stdin.buffer.read(MAX_BUNDLE + 1)
    with path.open("rb") as file:
        return file.read(MAX_BUNDLE + 1)


def require_new(path: Path, *, why: str = "nothing was changed") -> None:
    """That ``path`` can be written, and is not there yet: to be asked before there is something to lose.

    Raises FileExistsError, which says ``why`` it is not replaced; FileNotFoundError, PermissionError.
    """
    if os.path.lexists(path):
        raise FileExistsError(errno.EEXIST, f"File exists; {why}", str(path))
    folder = path.parent
    if not folder.is_dir():
        raise FileNotFoundError(errno.ENOENT, "No such folder", str(folder))
    if not os.access(folder, os.W_OK | os.X_OK):
        raise PermissionError(errno.EACCES, "Nothing can be written into this folder", str(folder))


def holds(path: Path, data: bytes) -> bool:
    """Whether a file is there already, with just these bytes. Raises OSError when it cannot be read."""
    if not path.is_file():
        return False
    with path.open("rb") as file:
        return file.read(len(data) + 1) == data


def write_new(path: Path, data: bytes, *, mode: int = NEW_FILE_MODE) -> None:
    """Writes a file that is not there yet, whole or not at all. Raises FileExistsError, OSError of ``path``."""
    with _said_of(path):
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, mode)
        try:
            with os.fdopen(descriptor, "wb") as file:
                _write(file, data)
        except BaseException:
            path.unlink(missing_ok=True)
            raise


@contextlib.contextmanager
def new_file(path: Path, *, mode: int = NEW_FILE_MODE) -> Iterator[BinaryIO]:
    """A large file that is not there yet, to be written in the block: under its name when that is left, whole; or none.

    Until then an empty file keeps the name. Raises FileExistsError, OSError of ``path``: what the block does besides
    raises errors of its own kind.
    """
    with _said_of(path):
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
        os.close(os.open(path, flags, mode))
        temporary = path.with_name(f".{path.name}.{secrets.token_hex(8)}")
        try:
            with os.fdopen(os.open(temporary, flags, mode), "wb") as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            temporary.replace(path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            path.unlink(missing_ok=True)
            raise


def replace(path: Path, data: bytes) -> None:
    """Writes a file whole, in place of what is there, with that one's mode; or changes nothing.

    Raises OSError of ``path``.
    """
    with _said_of(path):
        mode = stat.S_IMODE(path.stat().st_mode) if path.exists() else NEW_FILE_MODE
        temporary = path.with_name(f".{path.name}.{secrets.token_hex(8)}")
        descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        try:
            with os.fdopen(descriptor, "wb") as file:
                os.fchmod(file.fileno(), mode)
                _write(file, data)
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)


def _write(file: BinaryIO, data: bytes) -> None:
    file.write(data)
    file.flush()
    os.fsync(file.fileno())


@contextlib.contextmanager
def _said_of(path: Path) -> Iterator[None]:
    """The system's error, of the file that a person has named: one within may be of another, or of none."""
    try:
        yield
    except OSError as error:
        raise OSError(error.errno, f"{error.strerror}; nothing was changed", str(path)) from error
