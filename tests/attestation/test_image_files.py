"""The files of an image: the one that the enclave will read, or an error."""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import replace
from typing import Final

import pytest
from hypothesis import given
from hypothesis import strategies as st

from attestation.eif import ImageError
from attestation.errors import StrongroomError
from attestation.image_files import (
    CONFIGURATION_PATH,
    MAX_CONFIGURATION,
    ImageFileError,
    copy_file,
    ramdisks,
    read_configuration,
)
from attestation.measure import measure_image
from attestation.ramdisk import Kind, RamdiskError
from tests.cpio_files import Member, archive, device, folder, link, packed
from tests.eif_files import Eif, image
from tests.linux_ramdisks import Linux

BOOT: Final = (folder("dev"), Member("init", b"init"))
FOLDERS: Final = (folder("rootfs"), folder("rootfs/etc"), folder("rootfs/etc/strongroom"))
PATH: Final = "rootfs/etc/strongroom/enclave.toml"
TOML: Final = Member(PATH, b"version = 1\n")


def made(*disks: Sequence[Member]) -> Eif:
    return image(ramdisks=[packed(archive(*each)) for each in (BOOT, *disks)])


def configuration(*disks: Sequence[Member]) -> bytes:
    file = io.BytesIO(made(*disks).encode())
    return read_configuration(measure_image(file), file)


def refused(*disks: Sequence[Member]) -> StrongroomError:
    with pytest.raises((ImageFileError, RamdiskError)) as caught:
        configuration(*disks)
    return caught.value


def test_the_configuration_is_read() -> None:
    assert configuration((*FOLDERS, TOML, Member("cmd"))) == TOML.data
    assert configuration(FOLDERS, (TOML,)) == TOML.data
    assert configuration((folder("."), *FOLDERS, *FOLDERS, replace(TOML, links=0))) == TOML.data
    assert configuration((*FOLDERS, replace(TOML, data=b"x" * MAX_CONFIGURATION))) == b"x" * MAX_CONFIGURATION


def test_a_file_is_copied_up_to_the_limit() -> None:
    file, out = io.BytesIO(made((*FOLDERS, TOML)).encode()), io.BytesIO()
    found = measure_image(file)
    copy_file(found, file, CONFIGURATION_PATH, out, limit=len(TOML.data))
    assert out.getvalue() == TOML.data
    with pytest.raises(ImageFileError) as caught:
        copy_file(found, file, CONFIGURATION_PATH, out, limit=len(TOML.data) - 1)
    assert caught.value.code == "file_too_large"
    assert out.getvalue() == TOML.data


LARGE: Final = replace(TOML, data=b"#" * (MAX_CONFIGURATION + 1))
NOT_READ: dict[str, tuple[Sequence[Sequence[Member]], str, str]] = {
    "none": ([FOLDERS], "no_such_file", "no such file"),
    "no folders either": ([()], "no_such_file", "no such file"),
    "outside of the root file system": ([[*FOLDERS, Member("enclave.toml")]], "no_such_file", "no such file"),
    "too large": ([[*FOLDERS, LARGE]], "file_too_large", "too large"),
    "two": ([[*FOLDERS, TOML, TOML]], "unsafe_path", "a file has already"),
    "two, in two ramdisks": ([[*FOLDERS, TOML], [TOML]], "unsafe_path", "a file has already"),
    "a decoy": ([[*FOLDERS, TOML, replace(TOML, name=f"{PATH}/.")]], "unsafe_path", "a path with ."),
    "a link": ([[*FOLDERS, link(PATH, "/etc/hosts")]], "not_a_file", "got symlink, to '/etc/hosts'"),
    "a link later": ([[*FOLDERS, TOML], [link(PATH, "other")]], "unsafe_path", "a file has already"),
    "a link before": ([[*FOLDERS, link(PATH, "other"), TOML]], "not_a_file", "got symlink, to 'other'"),
    "a device": ([[*FOLDERS, device(PATH, 1, 3)]], "not_a_file", "got character device"),
    "a folder": ([[*FOLDERS, folder(PATH)]], "not_a_file", "got directory"),
    "one of two names": ([[*FOLDERS, replace(TOML, links=2)]], "not_a_file", "got one of 2 names of a file"),
    "a folder later": ([[*FOLDERS, TOML], [folder(PATH)]], "unsafe_path", "a file has already"),
    "a link instead of its folder": (
        [[*FOLDERS, TOML], [link("rootfs/etc", "other")]],
        "unsafe_path",
        "a directory has already",
    ),
    "a link to its folder": (
        [[*FOLDERS[:2], folder("rootfs/other"), link(FOLDERS[2].name, "../other"), TOML]],  # type: ignore[arg-type]
        "unsafe_path",
        "within a symlink",
    ),
    "another way to it": (
        [[*FOLDERS, TOML, link("rootfs/alias", "etc/strongroom")], [Member("rootfs/alias/enclave.toml", b"other")]],
        "unsafe_path",
        "within a symlink",
    ),
    "a folder is missing": ([[*FOLDERS[:2], TOML]], "unsafe_path", "a folder that does not come before it"),
    "within the file": ([[*FOLDERS, TOML, Member(PATH + "/x")]], "unsafe_path", "within a file"),
    "a link on the way": ([[FOLDERS[0], link("rootfs/etc", "usr")]], "not_a_file", "on the way"),
    "a file on the way": ([[Member("rootfs")]], "not_a_file", "got file"),
}


@pytest.mark.parametrize("name", NOT_READ)
def test_what_is_not_read(name: str) -> None:
    disks, code, said = NOT_READ[name]
    error = refused(*disks)
    assert error.code == code
    assert said in str(error)
    assert error.exit_code == 2


def test_a_name_cannot_move_a_cursor() -> None:
    assert "\x1b" not in str(refused([*FOLDERS, Member("rootfs/\x1b[2J/x")]))


def test_what_is_read_was_measured() -> None:
    data = image(ramdisks=[archive(*BOOT), archive(*FOLDERS, TOML)]).encode()
    found = measure_image(io.BytesIO(data))
    with pytest.raises(ImageError) as caught:
        read_configuration(found, io.BytesIO(data.replace(b"version = 1", b"version = 2")))
    assert caught.value.code == "changed_image"


# --- Held to what Linux does
# ------------------------------------------------------------------------------------------------

FOLDER_PATHS = ("rootfs", "rootfs/etc", "rootfs/etc/strongroom", "rootfs/a", "rootfs/a/strongroom", "b")
FILE_PATHS = (PATH, PATH, "rootfs/etc/strongroom/x", "rootfs/c", "rootfs/a/enclave.toml", "b/enclave.toml", f"{PATH}/x")
TARGETS = ("etc", "a", "/etc", "/rootfs/etc", "/rootfs/etc/strongroom", "enclave.toml", "../a", f"/{PATH}", "x")


@st.composite
def members(draw: st.DrawFn) -> Member:
    is_folder = draw(st.booleans())
    likely = FOLDER_PATHS if is_folder else FILE_PATHS
    name = draw(st.sampled_from([*likely * 4, *FOLDER_PATHS, *FILE_PATHS]))
    if is_folder:
        return folder(name)
    match draw(st.integers(0, 9)):
        case 0 | 1:
            return link(draw(st.sampled_from([name, *FOLDER_PATHS, "rootfs/d"])), draw(st.sampled_from(TARGETS)))
        case 2:
            return device(name, 1, 3)
    data = draw(st.sampled_from([b"", b"one", b"three"]))
    return Member(name, data, links=draw(st.sampled_from([1, 1, 2])), inode=draw(st.integers(1, 2)))


@given(st.lists(st.lists(members(), max_size=4), min_size=1, max_size=2), st.integers(0, 9), st.booleans())
def test_what_is_read_is_what_linux_makes(disks: list[list[Member]], folders: int, has_file: bool) -> None:
    disks[0] = [*FOLDERS[:folders], *([TOML] if has_file else []), *disks[0]]
    linux = Linux()
    for disk in (BOOT, *disks):
        linux.unpack(disk)
    try:
        read: bytes | None = configuration(*disks)
    except RamdiskError:
        return
    except ImageFileError as error:
        if error.code != "no_such_file":
            return
        read = None
    assert linux.read(CONFIGURATION_PATH) == read


@given(st.lists(st.lists(members(), max_size=4), min_size=1, max_size=2), st.integers(0, 9))
def test_what_is_listed_is_what_linux_makes(disks: list[list[Member]], folders: int) -> None:
    disks[0] = [*FOLDERS[:folders], *disks[0]]
    linux = Linux()
    for disk in (BOOT, *disks):
        linux.unpack(disk)
    file, listed = io.BytesIO(made(*disks).encode()), {}
    try:
        for reader in ramdisks(measure_image(file), file):
            for entry in reader:
                listed[entry.path] = entry, b"".join(reader.content())
    except RamdiskError:
        return
    files = linux.files()
    assert files.keys() == listed.keys()
    for path, (entry, content) in listed.items():
        if entry.kind is not Kind.FILE or entry.links < 2:  # of several names the content is that of all of them
            assert files[path] == (content if entry.kind is Kind.FILE else None)
