"""A root file system as a value: canonical order, implied directories, and what is refused."""

from __future__ import annotations

from io import BytesIO
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from parent.image.tree import (
    CHUNK_SIZE,
    MAX_ID,
    MAX_MAJOR,
    MAX_MINOR,
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


def file(path: str) -> File:
    return File.holding(path, b"content")


def test_order_is_that_of_the_bytes_and_parents_are_implied() -> None:
    tree = Tree.of([file("b/c"), file("b.c"), file("é"), file("a/x/y"), file("z")])
    assert list(tree) == ["a", "a/x", "a/x/y", "b", "b.c", "b/c", "z", "é"]
    assert tree["a/x"] == Directory("a/x", 0o755)
    assert len(tree) == 8
    assert tree.size == 5 * 7
    assert repr(tree) == "Tree(8 entries)"


def test_a_named_directory_keeps_its_mode_and_owner_in_any_order() -> None:
    own = Directory("a", 0o1777, uid=5, gid=6)
    for entries in ([own, file("a/b")], [file("a/b"), own]):
        assert Tree.of(entries)["a"] is own


def test_under_a_folder() -> None:
    tree = Tree.of([file("a/b"), Symlink("c", 0o777, "/a/b")]).under("rootfs/x")
    assert list(tree) == ["rootfs", "rootfs/x", "rootfs/x/a", "rootfs/x/a/b", "rootfs/x/c"]
    assert tree["rootfs/x/c"] == Symlink("rootfs/x/c", 0o777, "/a/b")


def test_the_empty_tree() -> None:
    assert list(Tree.of([])) == []
    assert Tree.of([]).size == 0


def test_content_is_given_anew_each_time(tmp_path: Path) -> None:
    (tmp_path / "f").write_bytes(b"abc")
    made = [File.holding("f", b"abc"), File.copied("f", tmp_path / "f")]
    for one in [*made, File.of("f", b"abc"), File.of("f", tmp_path / "f")]:
        assert (one.size, one.mode, one.uid, one.gid) == (3, 0o644, 0, 0)
        assert b"".join(one.pieces()) == b"abc"
        for _ in range(2):
            with one.open() as content:
                assert content.read() == b"abc"


@pytest.mark.parametrize(("size", "got"), [(0, "at least 1 bytes"), (2, "at least 3 bytes"), (4, "3 bytes")])
def test_a_file_that_changes_meanwhile(size: int, got: str) -> None:
    with pytest.raises(ImageBuildError) as caught:
        list(File("f", 0o644, size, lambda: BytesIO(b"abc")).pieces())
    assert (caught.value.code, caught.value.expected, caught.value.got) == ("changed_file", f"{size} bytes", got)


def test_a_file_is_never_held_whole() -> None:
    content = bytes(2 * CHUNK_SIZE + 1)
    assert [len(piece) for piece in File.holding("f", content).pieces()] == [CHUNK_SIZE, CHUNK_SIZE, 1]


@pytest.mark.parametrize(
    "path",
    [
        *("", "/", "/a", "a/", "a//b", ".", "..", "a/../b", "a/.", "a\0b", "\ud800", "\udcc3\udca9"),
        *("x" * 256, "/".join(["x" * 255] * 16) + "/y"),
    ],
)
def test_bad_paths(path: str) -> None:
    with pytest.raises(ImageBuildError) as caught:
        Directory(path, 0o755)
    assert caught.value.code == "bad_path"
    assert caught.value.exit_code == 2
    assert str(caught.value).isprintable()


def test_the_longest_paths() -> None:
    path = "/".join(["x" * 255] * 16)
    assert len(path) == MAX_PATH
    assert len(Tree.of([file(path)])) == 16
    with pytest.raises(ImageBuildError) as caught:
        Tree.of([file(path)]).under("r")
    assert caught.value.code == "bad_path"


def test_names_that_are_not_utf_8_keep_their_bytes() -> None:
    assert encode_path(Tree.of([file("a\udcff")])["a\udcff"].path) == b"a\xff"


@pytest.mark.parametrize(
    "make",
    [
        lambda: Directory("a", 0o10000),
        lambda: Directory("a", -1),
        lambda: Directory("a", 0, uid=-1),
        lambda: Directory("a", 0, gid=MAX_ID + 1),
        lambda: File("a", 0, -1, file("a").open),
        lambda: Symlink("a", 0o777, ""),
        lambda: Symlink("a", 0o777, "b\0"),
        lambda: Symlink("a", 0o777, "b" * (MAX_PATH + 1)),
        lambda: Device("a", 0, "fifo", 1),
        lambda: Device("a", 0, "char", MAX_MAJOR + 1),
        lambda: Device("a", 0, "block", 0, MAX_MINOR + 1),
        lambda: Device("a", 0, "block", -1),
    ],
)
def test_bad_entries(make: object) -> None:
    assert callable(make)
    with pytest.raises(ImageBuildError) as caught:
        make()
    assert caught.value.code == "bad_entry"


def test_a_path_twice() -> None:
    with pytest.raises(ImageBuildError) as caught:
        Tree.of([file("a"), Directory("a", 0o755)])
    assert caught.value.code == "duplicate_path"


@pytest.mark.parametrize("parent", [file("a"), Symlink("a", 0o777, "b"), Device("a", 0o644, "fifo")])
def test_only_a_directory_holds_something(parent: Entry) -> None:
    with pytest.raises(ImageBuildError) as caught:
        Tree.of([file("a/b/c"), parent])
    assert caught.value.code == "not_a_directory"
    assert caught.value.got == type(parent).__name__


@given(st.text())
def test_any_text_is_a_path_or_refused(path: str) -> None:
    try:
        entry = Directory(path, 0o755)
    except ImageBuildError:
        return
    (*_, last) = Tree.of([entry])
    assert encode_path(last).decode("utf-8", "surrogateescape") == path


@given(st.lists(st.sampled_from(["a", "b", "a/b", "a-b", "a/b/c", "b/é"]), unique=True), st.randoms())
def test_order_of_the_entries_does_not_matter(paths: list[str], random: object) -> None:
    assert hasattr(random, "shuffle")
    entries = [Directory(path, 0o700) for path in paths]
    shuffled = list(entries)
    random.shuffle(shuffled)
    assert list(Tree.of(entries).items()) == list(Tree.of(shuffled).items())
    assert list(Tree.of(entries)) == sorted(Tree.of(entries), key=encode_path)
