"""Where kernel, init and command line come from."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path

import pytest

from attestation.eif import Architecture
from parent.cache import CacheError
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
    monkeypatch.setattr(blobs, "SOURCES", tmp_path / "no-checkout")
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
        assert found.nsm_module is not None
        paths = [each.path for each in (found.kernel, found.init, found.nsm_module)]
        assert paths == [folder / "bzImage", folder / "init", folder / "nsm.ko"]
        assert (found.cmdline, found.kernel_version, found.cmdline_copy) == ("reboot=k panic=30", "6.6.79", False)
        assert str(folder) in found.origin
        assert [each.name for each in found.materials()] == ["kernel", "init", "cmdline", "nsm.ko"]


def test_ours_from_the_cache(tmp_path: Path, nothing_installed: Path) -> None:
    for number, key in enumerate(("0" * 16, "1" * 16)):
        put(
            nothing_installed / f"kernel-{key}",
            bzImage=bzimage(key.encode()),
            kernel_json=b'{"compiler": "gcc", "n": 1}',
            recipe=b"of the kernel",
        )
        put(nothing_installed / f"init-{key}", init=b"init", cmdline=b"console=ttyS0", recipe=b"of the init")
        for kind in ("kernel", "init"):
            os.utime(nothing_installed / f"{kind}-{key}", (number, number))
    put(nothing_installed / ("kernel-" + "2" * 16))
    found = find()
    assert found.kernel.data == bzimage(b"1" * 16)
    assert (found.cmdline, found.cmdline_copy, found.nsm_module) == ("console=ttyS0", True, None)
    assert dict(next(found.materials()).annotations) == {"compiler": "gcc"}
    aws(tmp_path / "aws")
    assert find().origin == f"in {tmp_path / 'aws'}"
    assert find(folder="own").origin == "ours, from the cache"


def test_single_ones_take_the_place_of_others(tmp_path: Path) -> None:
    aws(tmp_path / "aws")
    other = put(tmp_path / "other", kernel=bzimage(b"other"), init=b"other", module=b"other")
    found = find(kernel=other / "kernel", cmdline="x=1", nsm_module=other / "module")
    assert found.nsm_module is not None
    paths = found.kernel.path, found.cmdline, found.nsm_module.path
    assert paths == (other / "kernel", "x=1", other / "module")
    assert not found.cmdline_copy
    assert find(init=other / "init").cmdline_copy
    assert not find(init=other / "init", cmdline_copy=False).cmdline_copy
    assert find(cmdline_copy=True).cmdline_copy


def test_all_given_one_by_one(tmp_path: Path) -> None:
    other = put(tmp_path / "other", kernel=bzimage(), init=b"other")
    assert find(kernel=other / "kernel", init=other / "init", cmdline="x=1").origin == "given one by one"


# --- Which of ours ----------------------------------------------------------------------------------------------------


def cached(cache: Path, script: str, key: str, *, recipe: bytes | None = None, **files: bytes) -> Path:
    ours = {"bzImage": bzimage(key.encode())} if script == "kernel" else {"init": b"init", "cmdline": b"x"}
    entry = put(cache / f"{script}-{key * 16}", **{**ours, **files})
    if recipe is not None:
        (entry / "recipe").write_bytes(recipe)
    return entry


@pytest.mark.parametrize("recipes", [(b"a", b"b"), (None, None), (b"a", None)])
@pytest.mark.parametrize("script", ["kernel", "init"])
def test_of_several_recipes_none_is_guessed(
    nothing_installed: Path, script: str, recipes: tuple[bytes | None, ...]
) -> None:
    cached(nothing_installed, "kernel" if script == "init" else "init", "0")
    one, _ = (cached(nothing_installed, script, key, recipe=each) for key, each in zip("12", recipes, strict=True))
    with pytest.raises(ImageBuildError) as caught:
        find(folder="own")
    assert caught.value.code == "ambiguous_blobs"
    assert f"--{script} FILE" in str(caught.value)
    named = {"kernel": one / "bzImage"} if script == "kernel" else {"init": one / "init", "cmdline": "x"}
    found = find(folder="own", **named)
    assert (found.kernel if script == "kernel" else found.init).path.parent == one
    assert found.cmdline_copy


def described(init_c: bytes, checks: bytes = b"checks", cmdline: bytes = b"x") -> bytes:
    said = {"init_c_sha256": init_c, "checks_h_sha256": checks, "cmdline_sha256": cmdline, "init_sha256": b"init"}
    return json.dumps({name: hashlib.sha256(data).hexdigest() for name, data in said.items()}).encode()


def test_in_a_checkout_the_init_is_of_its_sources(
    tmp_path: Path, nothing_installed: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sources = put(tmp_path / "checkout", init_c=b"now", checks_h=b"checks", cmdline=b"x\n")
    monkeypatch.setattr(blobs, "SOURCES", sources)
    cached(nothing_installed, "kernel", "0")
    for key, data in (("1", described(b"before")), ("2", described(b"now", b"other checks"))):
        cached(nothing_installed, "init", key, init_json=data)
    cached(nothing_installed, "init", "3")
    with pytest.raises(ImageBuildError) as caught:
        find()
    assert (caught.value.code, caught.value.expected) == (
        "stale_blobs",
        f"init.c {hashlib.sha256(b'now').hexdigest()}",
    )
    right = cached(nothing_installed, "init", "4", init_json=described(b"now"))
    os.utime(right, (0, 0))
    assert find().init.path == right / "init"


@pytest.mark.parametrize(
    ("script", "files"),
    [
        ("kernel", {"kernel_json": b'{"image_sha256": "00"}'}),
        ("init", {"init_json": b'{"init_sha256": "00"}'}),
        ("init", {"init_json": described(b"", cmdline=b"y")}),
    ],
)
def test_what_is_not_what_its_description_says(nothing_installed: Path, script: str, files: dict[str, bytes]) -> None:
    for each in ("kernel", "init"):
        cached(nothing_installed, each, "0", **(files if each == script else {}))
    with pytest.raises(ImageBuildError) as caught:
        find()
    assert caught.value.code == "bad_blob"


def test_a_blob_is_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(blobs, "MAX_BLOB", 3)
    with pytest.raises(ImageBuildError, match="bad_blob"):
        find(folder=str(aws(tmp_path / "given")))


def test_what_is_recorded_is_what_was_read(tmp_path: Path) -> None:
    """Whatever becomes of the file between the reading and the writing."""
    found = find(folder=str(aws(tmp_path / "given")))
    (tmp_path / "given" / "init").write_bytes(b"another")
    assert found.init.data == b"init"
    assert [dict(each.digest) for each in found.materials()][1] == {"sha256": hashlib.sha256(b"init").hexdigest()}


@pytest.mark.parametrize("loose", [".", "init-" + "0" * 16, "init-" + "0" * 16 + "/init"])
def test_a_cache_of_others_is_refused(nothing_installed: Path, loose: str) -> None:
    for script in ("kernel", "init"):
        cached(nothing_installed, script, "0")
    assert find().cmdline == "x"
    (nothing_installed / loose).chmod(0o777)
    with pytest.raises(CacheError) as caught:
        find()
    assert (caught.value.code, caught.value.exit_code) == ("unsafe_cache", 2)
    assert "remove it" in str(caught.value)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root gives files away")
def test_a_cache_of_another_user_is_refused(nothing_installed: Path) -> None:
    for script in ("kernel", "init"):
        cached(nothing_installed, script, "0")
    os.chown(nothing_installed / ("kernel-" + "0" * 16) / "bzImage", 65534, 65534)
    with pytest.raises(CacheError, match="got uid 65534"):
        find()


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
        find(folder=str(folder))
