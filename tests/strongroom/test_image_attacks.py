"""Images that were made to deceive: what each command says of them, and what it never does."""

from __future__ import annotations

import errno
import os
import stat
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

import pytest

from attestation.image_files import ImageFileError
from attestation.measure import measure_image
from strongroom.image.files import unpack
from tests.cpio_files import Member, archive, device, folder, link
from tests.eif_files import CMDLINE, CMDLINE_TEXT, KERNEL, Eif, Part, Signer
from tests.sound_images import BOOT, ROOT, bzimage, sound
from tests.terminal import Ran, Terminal

AS_ROOT = ("--section", "files", "--as-root", "--json")
needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="devices and owners are for root")


@pytest.fixture
def run(strongroom: Terminal, monkeypatch: pytest.MonkeyPatch) -> Terminal:
    monkeypatch.setenv("COLUMNS", "200")
    return strongroom


def moved(size: int) -> Eif:
    """An image of which ``size`` bytes of the command line are behind the kernel: no register is another one."""
    text = CMDLINE_TEXT.encode()
    return sound().having(Part(KERNEL, bzimage(text[:size]))).having(Part(CMDLINE, text[size:]))


def holding(*root: Member) -> Eif:
    """An application's ramdisk with ``root`` in it, too."""
    return sound(archive(*BOOT), archive(*ROOT, *root))


def kept(path: Path, of: Eif, name: str = "enclave.eif") -> str:
    (path / name).write_bytes(of.encode())
    return str(path / name)


def test_diff_says_loudly_that_a_boundary_was_moved(run: Terminal, tmp_path: Path) -> None:
    before, after = kept(tmp_path, sound()), kept(tmp_path, moved(14), "moved.eif")
    ran = run("image", "diff", before, after)
    assert ran.code == 1
    assert "A BOUNDARY WAS MOVED: kernel, cmdline changed, and PCR0 PCR1 did not" in ran.out
    assert "the second image boots otherwise" in ran.out
    assert "every register is the same" not in ran.out
    seen = run("image", "diff", before, after, "--json").json
    assert seen["boundaries_moved"] == {"kernel": ["PCR0", "PCR1"], "cmdline": ["PCR0", "PCR1"]}
    assert seen["registers"] == {}


# --- verify
# ------------------------------------------------------------------------------------------------


def checks(run: Terminal, file: str) -> dict[str, str]:
    return {check["name"]: check["status"] for check in run("image", "verify", file, "--json").json["checks"]}


def test_the_image_that_the_others_are_made_of_is_verified(run: Terminal, tmp_path: Path) -> None:
    assert set(checks(run, kept(tmp_path, sound())).values()) == {"ok", "n/a"}


ANOTHER_LINE = archive(folder("rootfs"), Member("cmdline", b"random.trust_cpu=on"))
NOT_WHAT_RUNS: dict[str, tuple[Eif, str]] = {
    "a decoy with a dot": (sound(archive(*BOOT, Member("init/.", b"decoy")), archive(*ROOT)), "files"),
    "a line for the init of a later ramdisk": (sound(archive(*BOOT[1:]), ANOTHER_LINE), "layout"),
    "a line for the init over that of the first": (sound(archive(*BOOT), ANOTHER_LINE), "files"),
    "a line with another name": (sound(archive(replace(BOOT[0], links=2), *BOOT[1:]), archive(*ROOT)), "command line"),
    "a line that is a link": (sound(archive(link("cmdline", CMDLINE_TEXT), *BOOT[1:]), archive(*ROOT)), "command line"),
    "another init": (holding(Member("init", b"another")), "files"),
    "a file in no folder": (holding(Member("rootfs/usr/bin", b"x")), "files"),
    "a file through a link": (holding(link("rootfs/usr", "etc"), Member("rootfs/usr/x", b"x")), "files"),
    "a name that Linux does not take": (holding(Member(f"rootfs/{'x' * 256}")), "files"),
}


@pytest.mark.parametrize("name", NOT_WHAT_RUNS)
def test_an_image_of_which_a_list_misleads_is_broken(run: Terminal, tmp_path: Path, name: str) -> None:
    of, check = NOT_WHAT_RUNS[name]
    file = kept(tmp_path, of)
    assert run("image", "verify", file).code == 3
    assert [each for each, status in checks(run, file).items() if status == "failed"] == [check]


def test_without_the_init_s_copy_the_line_is_not_vouched_for(run: Terminal, tmp_path: Path) -> None:
    ran = run("image", "verify", kept(tmp_path, sound(archive(*BOOT[1:]), archive(*ROOT))))
    assert ran.code == 0
    assert "n/a     command line" in ran.out
    assert "fit any boundary between kernel and command line" in ran.out


# --- extract
# ------------------------------------------------------------------------------------------------


def test_modes_let_nobody_else_write(run: Terminal, tmp_path: Path) -> None:
    loose = (folder("rootfs/tmp", 0o1777), Member("rootfs/tmp/x", mode=0o106777))
    out, umask = tmp_path / "out", os.umask(0)
    try:
        assert run("image", "extract", kept(tmp_path, holding(*loose)), "-o", str(out), "--section", "files").code == 0
    finally:
        os.umask(umask)
    modes = [stat.S_IMODE((out / path).stat().st_mode) for path in ("", "rootfs", "rootfs/tmp", "rootfs/tmp/x")]
    assert modes == [0o755] * 4


@needs_root
@pytest.mark.parametrize("sections", [("files",), ("files", "kernel")])
def test_what_root_unpacked_is_for_root_alone(run: Terminal, tmp_path: Path, sections: tuple[str, ...]) -> None:
    out, options = tmp_path / "out", [option for name in sections for option in ("--section", name)]
    file = kept(tmp_path, holding(Member("rootfs/su", b"su", mode=0o104755)))
    assert run("image", "extract", file, "-o", str(out), *options, "--as-root").code == 0
    assert stat.S_IMODE(out.stat().st_mode) == 0o700
    [program] = out.rglob("su")
    assert stat.S_IMODE(program.stat().st_mode) == 0o4755


@needs_root
def test_an_image_never_writes_to_a_device(run: Terminal, tmp_path: Path) -> None:
    """The first name of a file is replaced by a device, and the second would be written through it."""
    first = Member("rootfs/x", links=2, inode=7)
    attack = (first, device("rootfs/x", 1, 3), replace(first, name="rootfs/y", data=b"to the device"))
    ran = run("image", "extract", kept(tmp_path, holding(*attack)), "-o", str(tmp_path / "out"), *AS_ROOT)
    assert (ran.code, ran.json["error"]["code"]) == (2, "unsafe_path")
    assert os.listdir(tmp_path) == ["enclave.eif"]


@needs_root
@pytest.mark.parametrize("kind", [stat.S_IFCHR, stat.S_IFIFO, stat.S_IFLNK, stat.S_IFDIR])
def test_what_somebody_else_put_there_is_not_written_to(
    tmp_path: Path, kind: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between two names of one file the first is replaced, by somebody who can write to the folder."""
    root = tmp_path / "root"
    root.mkdir()
    entries = Member("x", b"one", links=2), Member("y", b"two", links=2)
    with open(kept(tmp_path, sound(archive(*BOOT), archive(*entries))), "rb") as file:
        link_as_it_is = os.link

        def link_another(source: str, target: str, **options: int) -> None:
            Path(root, source).unlink()
            match kind:
                case stat.S_IFLNK:
                    Path(root, source).symlink_to("/dev/null")
                case stat.S_IFDIR:
                    Path(root, target).mkdir()
                case _:
                    os.mknod(root / source, kind | 0o600, os.makedev(1, 3))
            if kind != stat.S_IFDIR:
                link_as_it_is(source, target, **options)  # type: ignore[arg-type]

        monkeypatch.setattr(os, "link", link_another)
        with pytest.raises((ImageFileError, OSError)) as caught:
            unpack(measure_image(file), file, root, as_root=True, most=1 << 20)
    expected = {stat.S_IFCHR: None, stat.S_IFIFO: errno.ENXIO, stat.S_IFLNK: errno.ELOOP, stat.S_IFDIR: errno.EISDIR}
    assert getattr(caught.value, "errno", None) == expected[kind]


@pytest.mark.parametrize("part", [0, 1])
def test_a_folder_where_names_lead_elsewhere(tmp_path: Path, part: int) -> None:
    """As in a file system that ignores case, where a link and a folder may be one."""
    root = tmp_path / "root"
    root.mkdir()
    (root / "elsewhere").mkdir()
    (root / ("rootfs", "cmd")[part]).symlink_to("elsewhere")
    with (
        open(kept(tmp_path, holding(Member("rootfs/x"))), "rb") as file,
        pytest.raises(ImageFileError) as caught,
    ):
        unpack(measure_image(file), file, root, as_root=False, most=1 << 20)
    assert caught.value.code == "unsafe_entry"
    assert os.listdir(root / "elsewhere") == []


def test_files_are_unpacked_up_to_a_size(tmp_path: Path) -> None:
    size = sum(len(member.data) for member in (*BOOT, *ROOT))
    (tmp_path / "all").mkdir()
    (tmp_path / "part").mkdir()
    with open(kept(tmp_path, sound()), "rb") as file:
        image = measure_image(file)
        assert unpack(image, file, tmp_path / "all", as_root=False, most=size).entries == len(BOOT) + len(ROOT)
        with pytest.raises(ImageFileError) as caught:
            unpack(image, file, tmp_path / "part", as_root=False, most=size - 1)
    assert (caught.value.code, caught.value.expected) == ("files_too_large", f"at most {size - 1} bytes")


def test_a_size_is_compared_before_anything_is_written(run: Terminal, tmp_path: Path) -> None:
    file = kept(tmp_path, holding(replace(Member("rootfs/x"), size=(1 << 32) - 1)))
    ran = run("image", "extract", file, "--file", "/x", "--max-size", "1")
    assert (ran.code, "[file_too_large]" in ran.err) == (2, True)
    ran = run("image", "extract", file, "-o", str(tmp_path / "out"), "--section", "files", "--max-size", "1", "--json")
    assert (ran.code, ran.json["error"]["code"]) == (2, "files_too_large")
    assert os.listdir(tmp_path) == ["enclave.eif"]


# --- policy
# ------------------------------------------------------------------------------------------------

TOML = b"""version = 1
[nsm]
address = "device:/dev/nsm"
entropy = "nsm-hwrng"
[model]
manifest = "sha384:%s"
""" % (b"ab" * 48)
STRONGROOM = (folder("rootfs/etc/strongroom"), Member("rootfs/etc/strongroom/enclave.toml", TOML))
IGNORING = ("--ignore-model", "any", "--ignore-configuration", "any")


def written(run: Terminal, tmp_path: Path, of: Eif, command: str) -> Ran:
    """What is said when a policy is made of this image."""
    file, out = kept(tmp_path, of), ("--output", str(tmp_path / "policy.toml"), "--json")
    if command == "init":
        return run("policy", "init", "--from-eif", file, *IGNORING, *out)
    return run("image", "policy", file, *out)


@pytest.mark.parametrize("command", ["init", "image"])
@pytest.mark.parametrize("name", ["a boundary that was moved", *NOT_WHAT_RUNS, "a signer of before"])
def test_no_policy_comes_from_a_broken_image(run: Terminal, tmp_path: Path, name: str, command: str) -> None:
    if name in NOT_WHAT_RUNS:
        of, check = NOT_WHAT_RUNS[name]
    elif name == "a signer of before":
        of, check = sound().signed(Signer(not_after=datetime(2020, 1, 1, tzinfo=UTC))), "signature"
    else:
        of, check = moved(14), "kernel"
    ran = written(run, tmp_path, of, command)
    assert (ran.code, ran.json["error"]["code"]) == (2, "broken_image")
    assert f"vouches for nothing: {check}: " in ran.json["error"]["message"]
    assert not (tmp_path / "policy.toml").exists()


@pytest.mark.parametrize("command", ["init", "image"])
def test_a_policy_says_that_no_init_compares_the_line(run: Terminal, tmp_path: Path, command: str) -> None:
    said = "these registers fit any boundary between kernel and command line"
    ran = written(run, tmp_path, sound(archive(*BOOT[1:]), archive(*ROOT, *STRONGROOM)), command)
    assert ran.code == 0
    assert "movable_boundary" in [warning["code"] for warning in ran.json["warnings"]]
    assert said in " ".join((tmp_path / "policy.toml").read_text().replace("\n#", "").split())
    (tmp_path / "policy.toml").unlink()
    ran = written(run, tmp_path, sound(archive(*BOOT), archive(*ROOT, *STRONGROOM)), command)
    assert "movable_boundary" not in [warning["code"] for warning in ran.json["warnings"]]
    assert said not in (tmp_path / "policy.toml").read_text()
