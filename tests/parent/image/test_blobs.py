"""Where kernel, init and command line come from."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from attestation.eif import Architecture
from parent.image import blobs
from parent.image.blobs import BlobChoice, Blobs, find_blobs
from parent.image.tree import ImageBuildError
from tests.parent.image.independent import bzimage


def put(folder: Path, **files: bytes) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for name, data in files.items():
        (folder / name.replace("_", ".")).write_bytes(data)
    return folder


@pytest.fixture(autouse=True)
def nothing_installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The cache's folder."""
    monkeypatch.setattr(blobs, "AWS_FOLDER", tmp_path / "aws")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "strongroom"


def aws(folder: Path) -> Path:
    config = b"#\n# Linux/x86_64 6.6.79 Kernel Configuration\n#\n"
    return put(
        folder, bzImage=bzimage(), init=b"init", cmdline=b"reboot=k panic=30\n", nsm_ko=b"nsm", bzImage_config=config
    )


def find(**choice: object) -> Blobs:
    return find_blobs(BlobChoice(**choice), Architecture.X86_64)  # type: ignore[arg-type]


def test_those_of_nitro_cli_where_they_are_installed(tmp_path: Path) -> None:
    folder = aws(tmp_path / "aws")
    for found in (find(), find(folder="aws"), find(folder=str(folder))):
        assert (found.kernel, found.init, found.nsm_module) == (folder / "bzImage", folder / "init", folder / "nsm.ko")
        assert (found.cmdline, found.kernel_version, found.cmdline_copy) == ("reboot=k panic=30", "6.6.79", False)
        assert str(folder) in found.origin
        assert [each.name for each in found.materials()] == ["kernel", "init", "cmdline", "nsm.ko"]


def test_ours_from_the_cache(tmp_path: Path, nothing_installed: Path) -> None:
    for number, key in enumerate(("0" * 16, "1" * 16)):
        put(
            nothing_installed / f"kernel-{key}",
            bzImage=bzimage(key.encode()),
            kernel_json=b'{"compiler": "gcc", "n": 1}',
        )
        put(nothing_installed / f"init-{key}", init=b"init", cmdline=b"console=ttyS0")
        for kind in ("kernel", "init"):
            os.utime(nothing_installed / f"{kind}-{key}", (number, number))
    put(nothing_installed / ("kernel-" + "2" * 16))
    found = find()
    assert found.kernel.read_bytes() == bzimage(b"1" * 16)
    assert (found.cmdline, found.cmdline_copy, found.nsm_module) == ("console=ttyS0", True, None)
    assert dict(next(found.materials()).annotations) == {"compiler": "gcc"}
    aws(tmp_path / "aws")
    assert find().origin == f"in {tmp_path / 'aws'}"
    assert find(folder="own").origin == "ours, from the cache"


def test_single_ones_take_the_place_of_others(tmp_path: Path) -> None:
    aws(tmp_path / "aws")
    other = put(tmp_path / "other", kernel=bzimage(b"other"), init=b"other", module=b"other")
    found = find(kernel=other / "kernel", cmdline="x=1", nsm_module=other / "module")
    assert (found.kernel, found.cmdline, found.nsm_module) == (other / "kernel", "x=1", other / "module")
    assert not found.cmdline_copy
    assert find(init=other / "init").cmdline_copy
    assert not find(init=other / "init", cmdline_copy=False).cmdline_copy
    assert find(cmdline_copy=True).cmdline_copy


def test_all_given_one_by_one(tmp_path: Path) -> None:
    other = put(tmp_path / "other", kernel=bzimage(), init=b"other")
    assert find(kernel=other / "kernel", init=other / "init", cmdline="x=1").origin == "given one by one"


@pytest.mark.parametrize("missing", ["bzImage", "init", "cmdline"])
@pytest.mark.parametrize("own", [True, False])
def test_what_is_missing_is_said(tmp_path: Path, nothing_installed: Path, missing: str, own: bool) -> None:
    if own:
        kernel, init = nothing_installed / "kernel-1", nothing_installed / "init-1"
        put(kernel, bzImage=bzimage())
        put(init, init=b"init", cmdline=b"x")
        (kernel / missing if missing == "bzImage" else init / missing).unlink()
    else:
        (aws(tmp_path / "given") / missing).unlink()
    with pytest.raises(ImageBuildError, match="missing_blobs") as caught:
        find(folder="own" if own else str(tmp_path / "given"))
    assert own == ("scripts/machine" in str(caught.value)) or missing == "cmdline"


def test_nothing_anywhere() -> None:
    with pytest.raises(ImageBuildError, match="scripts/machine/kernel"):
        find()


def test_the_version_of_a_kernel_without_its_configuration(tmp_path: Path) -> None:
    kernel = bytearray(bzimage())
    kernel[0x20E:0x210] = (0x100).to_bytes(2, "little")
    kernel[0x300:0x320] = b"6.12.9 (strongroom@strongroom)\0\0"
    folder = put(tmp_path / "given", bzImage=bytes(kernel), init=b"init", cmdline=b"x")
    assert find(folder=str(folder)).kernel_version == "6.12.9"
    for data in (bzimage(), b"", b"\xff" * 2000):
        (folder / "bzImage").write_bytes(data)
        assert find(folder=str(folder)).kernel_version == "unknown"


@pytest.mark.parametrize("data", [b"[]", b"{", b"\xff", b'{"a": {"b": {"c": 1}}}'])
def test_a_description_that_no_script_wrote(tmp_path: Path, data: bytes) -> None:
    folder = put(aws(tmp_path / "aws"), kernel_json=data)
    with pytest.raises(ImageBuildError, match="bad_description"):
        list(find(folder=str(folder)).materials())
