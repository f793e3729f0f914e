"""AWS's two ramdisks: what lies where, and what no init would read as it was meant."""

from __future__ import annotations

from pathlib import Path

import pytest

from parent.image.ramdisks import MAX_LINE, MAX_LINES, MAX_LINES_SIZE, boot_ramdisk, customer_ramdisk
from parent.image.tree import Device, Directory, Entry, File, ImageBuildError, Symlink, Tree

ROOT = Tree.of([File.holding("usr/bin/python3", b"python", 0o755), Directory("tmp", 0o1777)])


def content(tree: Tree, path: str) -> bytes:
    entry = tree[path]
    assert isinstance(entry, File)
    return b"".join(entry.pieces())


def test_the_boot_ramdisk_of_aws(tmp_path: Path) -> None:
    (tmp_path / "nsm.ko").write_bytes(b"module")
    tree = boot_ramdisk(init=b"init", nsm=tmp_path / "nsm.ko")
    assert {path: oct(entry.mode) for path, entry in tree.items()} == {
        "dev": "0o755",
        "init": "0o755",
        "nsm.ko": "0o755",
    }
    assert (content(tree, "init"), content(tree, "nsm.ko")) == (b"init", b"module")


def test_our_boot_ramdisk() -> None:
    tree = boot_ramdisk(init=b"init", cmdline="panic=-1 quiet")
    assert list(tree) == ["cmdline", "dev", "init"]
    assert content(tree, "cmdline") == b"panic=-1 quiet"


def test_the_customer_ramdisk() -> None:
    tree = customer_ramdisk(ROOT, cmd=["/usr/bin/python3", "-c", "", "é"], env=["PATH=/usr/bin", "EMPTY=", "A=b=c"])
    assert list(tree) == [
        *("cmd", "env", "rootfs", "rootfs/dev", "rootfs/proc", "rootfs/run", "rootfs/sys", "rootfs/tmp"),
        *("rootfs/usr", "rootfs/usr/bin", "rootfs/usr/bin/python3", "rootfs/var"),
    ]
    assert content(tree, "cmd") == "/usr/bin/python3\n-c\n\né\n".encode()
    assert content(tree, "env") == b"PATH=/usr/bin\nEMPTY=\nA=b=c\n"
    assert {tree[name].mode for name in ("cmd", "env")} == {0o644}
    assert tree["rootfs/tmp"].mode == 0o1777
    assert tree["rootfs/dev"].mode == 0o755


def test_no_variables() -> None:
    assert content(customer_ramdisk(ROOT, cmd=["a"]), "env") == b""


@pytest.mark.parametrize("cmd", [[], [""], ["a\nb"], ["a", "b\0"], ["a", "x" * (MAX_LINE + 1)], ["\ud800"]])
def test_bad_commands(cmd: list[str]) -> None:
    with pytest.raises(ImageBuildError) as caught:
        customer_ramdisk(ROOT, cmd=cmd)
    assert caught.value.code == "bad_command"
    assert str(caught.value).isascii()


@pytest.mark.parametrize("env", ["", "A", "=a", "A=\n", "A=\0", "A=\ud800", "A=" + "x" * MAX_LINE])
def test_bad_variables(env: str) -> None:
    with pytest.raises(ImageBuildError) as caught:
        customer_ramdisk(ROOT, cmd=["a"], env=["GOOD=1", env])
    assert caught.value.code == "bad_environment"


def test_no_more_than_the_init_reads() -> None:
    halves = ["x" * MAX_LINE, "x" * (MAX_LINES_SIZE - MAX_LINE - 2)]
    assert len(content(customer_ramdisk(ROOT, cmd=halves), "cmd")) == MAX_LINES_SIZE
    assert content(customer_ramdisk(ROOT, cmd=["a"] * MAX_LINES), "cmd") == b"a\n" * MAX_LINES
    for cmd in ([*halves, ""], ["a"] * (MAX_LINES + 1)):
        with pytest.raises(ImageBuildError) as caught:
            customer_ramdisk(ROOT, cmd=cmd)
        assert caught.value.code == "bad_command"


def test_a_variable_twice() -> None:
    with pytest.raises(ImageBuildError) as caught:
        customer_ramdisk(ROOT, cmd=["a"], env=["A=1", "B=2", "A=3"])
    assert (caught.value.code, caught.value.got) == ("bad_environment", "'A'")


@pytest.mark.parametrize(
    "entry",
    [Symlink("run", 0o777, "/x"), File.holding("dev", b""), Device("proc", 0o600, "fifo")],
    ids=lambda entry: entry.path,
)
def test_the_mount_points_are_directories(entry: Entry) -> None:
    with pytest.raises(ImageBuildError) as caught:
        customer_ramdisk(Tree.of([entry]), cmd=["a"])
    assert caught.value.code == "not_a_directory"
    assert caught.value.got == type(entry).__name__
