"""Files that are written whole or not at all, and errors that name the file that a person named."""

from __future__ import annotations

import errno
import io
import os
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from attestation.bundle import MAX_BUNDLE
from strongroom.files import FileError, new_file, read_bounded, read_evidence, replace, require_new, write_new


def test_what_is_too_large_is_not_read_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "file"
    path.write_bytes(bytes(11))
    assert read_bounded(path, 11) == bytes(11)
    with pytest.raises(FileError) as caught:
        read_bounded(path, 10)
    assert (caught.value.code, caught.value.expected) == ("too_large", "at most 10 bytes")
    path.write_bytes(bytes(MAX_BUNDLE + 2))
    assert len(read_evidence(path)) == MAX_BUNDLE + 1
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(bytes(MAX_BUNDLE + 2))))
    assert len(read_evidence(Path("-"))) == MAX_BUNDLE + 1


def test_a_new_file_is_new(tmp_path: Path) -> None:
    path = tmp_path / "file"
    require_new(path)
    write_new(path, b"one", mode=0o600)
    assert (path.read_bytes(), path.stat().st_mode & 0o777) == (b"one", 0o600)
    with pytest.raises(FileExistsError, match="never replaced"):
        require_new(path, why="it is never replaced")
    with pytest.raises(FileExistsError):
        write_new(path, b"two")
    assert path.read_bytes() == b"one"
    with pytest.raises(FileNotFoundError, match="No such folder"):
        require_new(tmp_path / "nowhere" / "file")


def test_a_large_file_is_whole_under_its_name_or_not_there(tmp_path: Path) -> None:
    path = tmp_path / "file"
    with new_file(path, mode=0o600) as file:
        file.write(b"one")
        file.flush()
        assert path.read_bytes() == b""  # the name is taken
        with pytest.raises(FileExistsError), new_file(path):
            pass
        file.write(b"two")
    assert (path.read_bytes(), path.stat().st_mode & 0o777) == (b"onetwo", 0o600)
    assert list(tmp_path.iterdir()) == [path]
    other = tmp_path / "other"
    with pytest.raises(ZeroDivisionError), new_file(other) as file:
        file.write(bytes(1 << 20))
        raise ZeroDivisionError
    assert list(tmp_path.iterdir()) == [path]


def test_a_folder_of_somebody_elses(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "access", lambda *_: False)
    with pytest.raises(PermissionError) as caught:
        require_new(tmp_path / "file")
    assert caught.value.filename == str(tmp_path)


def write_in_pieces(path: Path, data: bytes) -> None:
    with new_file(path) as file:
        file.write(data)


@pytest.mark.parametrize("write", [write_new, replace, write_in_pieces])
def test_a_full_disk_leaves_nothing_behind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, write: Callable[[Path, bytes], None]
) -> None:
    def refuse(_: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", refuse)
    with pytest.raises(OSError, match="No space left on device; nothing was changed") as caught:
        write(tmp_path / "file", b"content")
    assert (caught.value.errno, caught.value.filename) == (errno.ENOSPC, str(tmp_path / "file"))
    assert list(tmp_path.iterdir()) == []


def test_an_error_names_no_temporary_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In a folder that cannot be written."""
    path = tmp_path / "file"
    path.write_bytes(b"before")

    def refuse(name: object, *_: object) -> int:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(name))

    monkeypatch.setattr(os, "open", refuse)
    with pytest.raises(PermissionError) as caught:
        replace(path, b"after")
    assert (caught.value.filename, caught.value.strerror) == (str(path), "Permission denied; nothing was changed")
    assert path.read_bytes() == b"before"
