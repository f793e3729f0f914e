"""The archive of a tree: what Linux unpacks from it is the tree, and the same tree has the same bytes."""

from __future__ import annotations

import os
import shutil
import stat
import subprocess
from io import BytesIO
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from attestation.ramdisk import Kind, RamdiskReader
from parent.image.cpio import MAX_FILE_SIZE, archive, archive_size
from parent.image.tree import (
    MAX_PATH,
    Device,
    Directory,
    Entry,
    File,
    ImageBuildError,
    Symlink,
    Tree,
    encode_path,
)
from tests.parent.image.independent import Unpacked, unpack

names = st.text(st.characters(blacklist_characters="/\0", blacklist_categories=["Cs"]), min_size=1, max_size=6).filter(
    lambda name: name not in (".", "..")
)
paths = st.lists(names, min_size=1, max_size=3).map("/".join).filter(lambda path: path != "TRAILER!!!")
modes = st.integers(0, 0o7777)
ids = st.sampled_from([0, 1, 1000, 65534, 0xFFFF_FFFE])
kinds: st.SearchStrategy[Entry] = st.one_of(
    st.builds(lambda path, mode, uid, gid: Directory(path, mode, uid=uid, gid=gid), paths, modes, ids, ids),
    st.builds(lambda path, data, mode: File.holding(path, data, mode), paths, st.binary(max_size=9), modes),
    st.builds(lambda path, to: Symlink(path, 0o777, to), paths, paths),
    st.builds(lambda path, major: Device(path, 0o600, "char", major, 3), paths, st.integers(0, 4095)),
    st.builds(lambda path: Device(path, 0o600, "fifo"), paths),
)


def tree_of(entries: list[Entry]) -> Tree | None:
    """The tree of those entries that go together."""
    try:
        return Tree.of({entry.path: entry for entry in entries}.values())
    except ImageBuildError:
        return None


trees = st.lists(kinds, max_size=8).map(tree_of).filter(lambda tree: tree is not None)


def unpacked(entry: Entry) -> Unpacked:
    match entry:
        case Directory():
            return Unpacked(stat.S_IFDIR, entry.mode, entry.uid, entry.gid)
        case File():
            return Unpacked(stat.S_IFREG, entry.mode, entry.uid, entry.gid, b"".join(entry.pieces()))
        case Symlink():
            return Unpacked(stat.S_IFLNK, 0o777, entry.uid, entry.gid, encode_path(entry.target))
        case Device(kind=kind):
            bits = {"char": stat.S_IFCHR, "block": stat.S_IFBLK, "fifo": stat.S_IFIFO}[kind]
            return Unpacked(bits, entry.mode, entry.uid, entry.gid, device=(entry.major, entry.minor))
    raise AssertionError


@given(trees)
def test_what_linux_unpacks_is_the_tree(tree: Tree) -> None:
    data = b"".join(archive(tree))
    assert len(data) == archive_size(tree)
    assert len(data) % 4 == 0
    assert unpack(data) == {encode_path(path): unpacked(entry) for path, entry in tree.items()}
    assert list(unpack(data)) == sorted(unpack(data))


@given(trees)
def test_the_reader_finds_the_same(tree: Tree) -> None:
    data = b"".join(archive(tree))
    reader = RamdiskReader(BytesIO(data), len(data))
    found = {}
    for each in reader:
        content = b"".join(reader.content()) if each.kind is Kind.FILE else b""
        found[each.path] = (each.mode, each.uid, each.gid, content)
    expected = {}
    for path, entry in tree.items():
        one = unpacked(entry)
        content = one.content if isinstance(entry, File) else b""
        expected[path] = (one.mode, one.uid, one.gid, content)
    assert found == expected


def test_two_archives_follow_one_another() -> None:
    first, second = Tree.of([File.holding("init", b"x")]), Tree.of([File.holding("rootfs/a", b"y")])
    both = b"".join([*archive(first), *archive(second)])
    assert list(unpack(both)) == [b"init", b"rootfs", b"rootfs/a"]


def test_the_smallest_archive() -> None:
    data = b"".join(archive(Tree.of([])))
    assert data == b"070701" + b"0" * 32 + b"00000001" + b"0" * 48 + b"0000000B" + b"0" * 8 + b"TRAILER!!!\0" + bytes(3)
    assert archive_size(Tree.of([])) == len(data) == 124


def test_known_bytes() -> None:
    (folder, header, content, padding, _) = archive(Tree.of([File.holding("a/b", b"hello", 0o4750)]))
    assert (
        folder == b"070701" + b"00000001000041ED" + b"0" * 16 + b"00000002" + b"0" * 48 + b"0000000200000000" + b"a\0"
    )
    assert header[:110] == (
        b"070701"
        + b"00000002000089E8"
        + b"0" * 16
        + b"0000000100000000"
        + b"00000005"
        + b"0" * 32
        + b"0000000400000000"
    )
    assert (header[110:], content, padding) == (b"a/b\0" + bytes(2), b"hello", bytes(3))


def test_a_link_has_one_mode_whatever_its_source_says() -> None:
    (here, there) = (b"".join(archive(Tree.of([Symlink("a", mode, "b")]))) for mode in (0o777, 0o755))
    assert here == there


def test_the_longest_name_and_target() -> None:
    longest = "/".join(["x" * 255] * 16)
    tree = Tree.of([Symlink(longest, 0o777, "t" * MAX_PATH)])
    assert unpack(b"".join(archive(tree)))[longest.encode()].content == b"t" * MAX_PATH


def test_names_that_are_not_utf_8() -> None:
    assert list(unpack(b"".join(archive(Tree.of([File.holding("\udcff", b"")]))))) == [b"\xff"]


@pytest.mark.parametrize("size", [MAX_FILE_SIZE, MAX_FILE_SIZE + 1])
def test_a_field_has_32_bits(size: int) -> None:
    tree = Tree.of([File("model.gguf", 0o644, size, BytesIO)])
    if size == MAX_FILE_SIZE:
        assert archive_size(tree) == 124 + 124 + size + 1
        return
    for act in (archive_size, lambda tree: list(archive(tree))):
        with pytest.raises(ImageBuildError) as caught:
            act(tree)
        assert caught.value.code == "too_large"
        assert "model store" in str(caught.value)


def test_no_file_ends_the_archive() -> None:
    for act in (archive_size, lambda tree: list(archive(tree))):
        with pytest.raises(ImageBuildError) as caught:
            act(Tree.of([File.holding("TRAILER!!!", b"")]))
        assert caught.value.code == "bad_path"
    assert unpack(b"".join(archive(Tree.of([File.holding("a/TRAILER!!!", b"x")]))))[b"a/TRAILER!!!"].content == b"x"


def test_a_file_that_grows_meanwhile() -> None:
    with pytest.raises(ImageBuildError) as caught:
        list(archive(Tree.of([File("a", 0o644, 2, lambda: BytesIO(b"abc"))])))
    assert caught.value.code == "changed_file"


@pytest.mark.skipif(shutil.which("cpio") is None, reason="there is no cpio(1) here")
def test_cpio_unpacks_it(tmp_path: Path) -> None:
    entries = [
        File.holding("bin/run", b"#!\n", 0o755),
        File.holding("bin/empty", b"", 0o600),
        Directory("tmp", 0o1777),
        Symlink("sh", 0o777, "bin/run"),
        Device("pipe", 0o640, "fifo"),
    ]
    listing = subprocess.run(
        ["cpio", "-idm", "--quiet", "--no-absolute-filenames", "--no-preserve-owner"],
        input=b"".join(archive(Tree.of(entries))),
        cwd=tmp_path,
        capture_output=True,
        check=False,
    )
    assert (listing.returncode, listing.stderr) == (0, b"")
    assert sorted(str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*")) == sorted(Tree.of(entries))
    assert (tmp_path / "bin/run").read_bytes() == b"#!\n"
    assert stat.S_IMODE((tmp_path / "bin/run").stat().st_mode) == 0o755
    assert stat.S_IMODE((tmp_path / "tmp").stat().st_mode) == 0o1777
    assert (tmp_path / "bin/run").stat().st_mtime == 0
    assert os.readlink(tmp_path / "sh") == "bin/run"
    assert stat.S_ISFIFO((tmp_path / "pipe").stat().st_mode)
