"""The real init as process 1 of a PID namespace, as far as it comes without a parent."""

from __future__ import annotations

import errno
import os
import shutil
import stat
import subprocess
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[2]
MACHINE = REPOSITORY / "enclave/machine"
needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="mounting in a namespace of its own needs root")


@pytest.fixture(scope="module")
def init(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Compiled against whatever C library is here; the warnings are those of scripts/machine/init."""
    path = tmp_path_factory.mktemp("init") / "init"
    warnings = ["-Wall", "-Wextra", "-Wpedantic", "-Werror", "-Wshadow", "-Wconversion", "-Wvla"]
    subprocess.run(["cc", "-std=c11", "-Os", "-static", *warnings, "-o", path, MACHINE / "init.c"], check=True)
    return path


@pytest.fixture
def ramdisk(tmp_path: Path, init: Path) -> Path:
    """With the command line that this machine was booted with, as if it had been measured."""
    (tmp_path / "dev").mkdir()
    shutil.copy(init, tmp_path / "init")
    (tmp_path / "cmdline").write_bytes(Path("/proc/cmdline").read_bytes().rstrip(b"\n"))
    return tmp_path


def boot(ramdisk: Path) -> str:
    """What it says until it ends: a reboot inside a PID namespace kills the namespace and nothing else."""
    command = ["unshare", "--mount", "--pid", "--fork", f"--root={ramdisk}", "/init"]
    ended = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, timeout=120, check=False)
    assert ended.returncode != 0
    return (ended.stdout + ended.stderr).decode()


def test_it_is_process_1_or_nothing(init: Path) -> None:
    """Who tries it at a prompt does not reboot his machine."""
    ended = subprocess.run([init], capture_output=True, timeout=60, check=False)
    assert (ended.returncode, ended.stdout, ended.stderr) == (2, b"", b"")


@needs_root
def test_without_a_parent_it_halts(ramdisk: Path) -> None:
    assert boot(ramdisk).startswith("init: halt: heartbeat: ")


@needs_root
def test_another_command_line_halts(ramdisk: Path) -> None:
    (ramdisk / "cmdline").write_bytes(b"x" + (ramdisk / "cmdline").read_bytes())
    wrong = "the kernel's command line does not begin with the measured one"
    assert boot(ramdisk) == f"init: halt: /proc/cmdline: {wrong}\n"


@needs_root
def test_a_longer_command_line_halts(ramdisk: Path) -> None:
    line = (ramdisk / "cmdline").read_bytes()
    (ramdisk / "cmdline").write_bytes(line[: line.rindex(b" ")])
    wrong = "the kernel's command line has more than parent_cid and virtio devices behind the measured one"
    assert boot(ramdisk) == f"init: halt: /proc/cmdline: {wrong}\n"


@needs_root
def test_a_ramdisk_without_the_copy_halts(ramdisk: Path) -> None:
    (ramdisk / "cmdline").unlink()
    assert boot(ramdisk) == "init: halt: /cmdline: No such file or directory\n"


@needs_root
@pytest.mark.parametrize("kind", ["link", "second name", "pipe", "folder", "device"])
def test_a_copy_that_is_no_file_of_its_own_halts(ramdisk: Path, kind: str) -> None:
    copy = ramdisk / "cmdline"
    line = copy.rename(ramdisk / "line")
    why = "it is no regular file with one name"
    match kind:
        case "link":
            copy.symlink_to(line.name)
            why = os.strerror(errno.ELOOP)
        case "second name":
            copy.hardlink_to(line)
        case "pipe":
            os.mkfifo(copy)
        case "folder":
            copy.mkdir()
        case "device":
            os.mknod(copy, stat.S_IFCHR, os.makedev(1, 3))
    assert boot(ramdisk) == f"init: halt: /cmdline: {why}\n"


@needs_root
def test_a_copy_without_end_halts(ramdisk: Path) -> None:
    (ramdisk / "cmdline").write_bytes(b"a" * 4096)
    assert boot(ramdisk) == "init: halt: /cmdline: it is too long\n"


@needs_root
def test_a_module_that_is_none_halts(ramdisk: Path) -> None:
    (ramdisk / "nsm.ko").write_bytes(b"no module")
    assert boot(ramdisk).startswith("init: halt: /nsm.ko: ")


@needs_root
@pytest.mark.parametrize(
    ("options", "fill"),
    [("size=8m", "cat /dev/zero >rest"), ("nr_inodes=40", "for n in $(seq 60); do touch rest$n || break; done")],
)
def test_a_root_that_was_cut_off_halts(ramdisk: Path, options: str, fill: str) -> None:
    """Ramdisks in too little memory: the kernel goes on with the files that fitted."""
    mounted = ramdisk / "mounted"
    mounted.mkdir()
    unpack = f"mount -t tmpfs -o {options} none {mounted} && cp -a {ramdisk}/init {ramdisk}/cmdline {mounted}"
    script = f"{unpack} && cd {mounted} && mkdir dev && {{ {fill}; }} 2>/dev/null; exec chroot {mounted} /init"
    command = ["unshare", "--mount", "--pid", "--fork", "sh", "-c", script]
    ended = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, timeout=120, check=False)
    assert ended.stderr == b"init: halt: /: the ramdisks did not fit: the machine needs more memory\n"


@pytest.mark.skipif(shutil.which("musl-gcc") is None, reason="musl-gcc is missing: apt-get install musl-tools")
def test_the_same_bytes_in_another_folder(tmp_path: Path) -> None:
    copy = tmp_path / "elsewhere"
    for part in ("enclave/machine", "scripts/machine"):
        shutil.copytree(REPOSITORY / part, copy / part)
    built: list[Path] = []
    for where in (REPOSITORY, copy):
        environment = {**os.environ, "XDG_CACHE_HOME": str(tmp_path / f"cache-{len(built)}")}
        ran = subprocess.run([where / "scripts/machine/init"], env=environment, capture_output=True, check=True)
        built.append(Path(ran.stdout.decode().strip()))
    first, second = built
    assert first != second
    for name in ("init", "cmdline", "init.json"):
        assert (first / name).read_bytes() == (second / name).read_bytes()
    assert (first / "init").stat().st_size < 64 * 1024
