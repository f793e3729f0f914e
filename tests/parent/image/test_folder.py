"""A root file system in a folder: all of it, with its modes, and nothing of the machine that it lies on."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable
from pathlib import Path

import pytest

from parent.image.folder import read_folder
from parent.image.source import tree_digest
from parent.image.tree import Device, Directory, File, ImageBuildError, Symlink


def filled(root: Path) -> Path:
    (root / "bin").mkdir(parents=True)
    (root / "bin" / "tool").write_bytes(b"tool")
    (root / "bin" / "tool").chmod(0o4755)
    (root / "sh").symlink_to("/bin/../bin/tool")
    (root / "empty").touch(mode=0o600)
    os.link(root / "bin" / "tool", root / "other name")
    os.mkfifo(root / "pipe", mode=0o640)
    return root


def test_all_of_it_is_there(tmp_path: Path) -> None:
    tree = read_folder(filled(tmp_path / "root")).tree
    assert [(path, type(entry)) for path, entry in tree.items()] == [
        ("bin", Directory),
        ("bin/tool", File),
        ("empty", File),
        ("other name", File),
        ("pipe", Device),
        ("sh", Symlink),
    ]
    assert {entry.mode for path, entry in tree.items() if "tool" in path} == {0o4755}
    assert {(entry.uid, entry.gid) for entry in tree.values()} == {(0, 0)}
    link, tool = tree["sh"], tree["bin/tool"]
    assert isinstance(link, Symlink)
    assert link.target == "/bin/../bin/tool"
    assert isinstance(tool, File)
    assert b"".join(tool.pieces()) == b"tool"


def test_its_digest_is_of_what_goes_into_an_image_alone(tmp_path: Path) -> None:
    one, two = (read_folder(filled(tmp_path / name)) for name in ("one", "two"))
    os.utime(tmp_path / "two" / "bin", (1, 1))
    assert one.digest == two.digest == f"sha256:{tree_digest(one.tree)}"
    assert dict(one.materials[0].digest) == {"sha256": one.digest[7:]}
    digests = {one.digest}
    changes: list[Callable[[Path], object]] = [
        lambda root: (root / "bin" / "tool").chmod(0o755),
        lambda root: (root / "empty").write_bytes(b"x"),
        lambda root: (root / "new").mkdir(),
        lambda root: (root / "sh").unlink(),
    ]
    for change in changes:
        change(tmp_path / "two")
        digests.add(read_folder(tmp_path / "two").digest)
    assert len(digests) == 5


@pytest.mark.skipif(os.geteuid() != 0, reason="only root makes device files")
def test_device_files(tmp_path: Path) -> None:
    os.mknod(tmp_path / "null", 0o020666, os.makedev(1, 3))
    os.mknod(tmp_path / "disk", 0o060600, os.makedev(8, 0))
    tree = read_folder(tmp_path).tree
    assert [(entry.kind, entry.major, entry.minor) for entry in tree.values() if isinstance(entry, Device)] == [
        ("block", 8, 0),
        ("char", 1, 3),
    ]


def test_bytecode_is_left_out_and_told(tmp_path: Path) -> None:
    (tmp_path / "lib" / "__pycache__").mkdir(parents=True)
    for name in ("a.py", "b.pyc", "c.pyo", "__pycache__/a.cpython-311.pyc", "__pycache__/a.cpython-311.opt-1.pyc"):
        (tmp_path / "lib" / name).write_bytes(b"x")
    source = read_folder(tmp_path)
    assert list(source.tree) == ["lib", "lib/a.py"]
    assert source.notes == ("4 Python bytecode caches were left out",)


def test_a_socket_has_no_place_in_an_image(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind("sock")
    with pytest.raises(ImageBuildError, match="unusable_file"):
        read_folder(tmp_path)


def test_a_folder_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(ImageBuildError, match="unreadable_source"):
        read_folder(tmp_path / "none")


def test_what_cannot_be_read_is_not_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "secret").write_bytes(b"x")

    def refuse(path: str, *rest: object) -> int:
        raise PermissionError(13, "Permission denied", path)

    monkeypatch.setattr("parent.image.folder.os.open", refuse)  # root may read everything
    with pytest.raises(ImageBuildError, match="unreadable_source"):
        read_folder(tmp_path)


@pytest.mark.parametrize("change", ["another file", "another content", "a link", "a pipe"])
def test_a_file_that_changes_meanwhile_is_noticed(tmp_path: Path, change: str) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"before")
    entry = read_folder(tmp_path).tree["file"]
    assert isinstance(entry, File)
    if change == "another content":
        path.write_bytes(b"behind")
        os.utime(path, (1, 1))
    else:
        (tmp_path / "new").write_bytes(b"before")
        path.unlink()
        if change == "another file":
            (tmp_path / "new").rename(path)
        elif change == "a link":
            path.symlink_to("new")
        else:
            os.mkfifo(path)
    with pytest.raises((ImageBuildError, OSError)):
        list(entry.pieces())
