"""The benchmarks of the enclave's image, as far as no image has to be booted: what they say where image or machine is
not to be had, how files are told apart, and the moments of a boot.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from pathlib import Path

import pytest

import parent.image.blobs
from bench import Row, image_boot, image_build
from bench.__main__ import PARTS as EVERY_PART
from bench.image_house import LAYOUT, lacking
from parent.launch.qemu import QemuMachine
from parent.registry import Instance, Registry
from tests.cpio_files import Member, archive, folder, link
from tests.eif_files import KERNEL, image
from tests.machines import stand_in_tools

CONFIGURATION = """
[rpc]
listen = "vsock:any:5005"
[nsm]
address = "vsock:3:5008"
[model]
store = "vsock:3:5006"
manifest = "sha384:00"
"""
PACKAGES = "rootfs/usr/local/lib/python3.11/dist-packages"


# --- Where nothing can be measured ------------------------------------------------------------------------------------


@pytest.fixture
def bare(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A user's machine without an image, or anything to make or boot one; the folder that stands for a layout."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    for variable in (LAYOUT, "STRONGROOM_QEMU", "STRONGROOM_VSOCK_DEVICE"):
        monkeypatch.delenv(variable, raising=False)
    layout = tmp_path / "layout"
    layout.mkdir()
    return layout


def only_row(rows: list[Row]) -> Row:
    [row] = rows
    assert (row.ours, row.holds) == ("not measured", None)
    return row


def test_both_are_parts() -> None:
    assert {"image_build", "image_boot"} < set(EVERY_PART)


@pytest.mark.usefixtures("bare")
@pytest.mark.parametrize("rows", [image_build.rows, image_boot.rows])
def test_without_a_layout_one_row_says_how_to_get_one(rows: Callable[[], list[Row]]) -> None:
    row = only_row(rows())
    assert row.peer.startswith(LAYOUT)
    assert "scripts/test-boot" in row.peer


def test_a_layout_that_is_none_is_said(bare: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(LAYOUT, str(bare))
    assert "no OCI layout" in only_row(image_build.rows()).peer


def test_a_missing_part_names_the_script_that_makes_it(bare: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(LAYOUT, str(bare))
    monkeypatch.setattr(parent.image.blobs, "SOURCES", bare)  # as where there is no checkout: any init will do
    (bare / "oci-layout").touch()
    assert "scripts/machine/kernel" in only_row(image_boot.rows()).peer
    for name in ("bzImage", "init", "cmdline"):
        entry = bare.parent / "strongroom" / f"{'kernel' if name == 'bzImage' else 'init'}-{'0' * 16}"
        entry.mkdir(parents=True, exist_ok=True)
        (entry / name).write_text("reboot=k" if name == "cmdline" else "")
    assert "scripts/machine/qemu" in only_row(image_boot.rows()).peer
    assert lacking(machine=False) is None


# --- Sizes ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("path", "part"),
    [
        ("init", "init"),
        ("cmd", "init"),
        ("rootfs/usr/bin/python3.11", "Python"),
        ("rootfs/usr/lib/python3.11/asyncio/__init__.py", "Python"),
        ("rootfs/usr/lib/python3.11/lib-dynload/_ssl.cpython-311-x86_64-linux-gnu.so", "Python"),
        ("rootfs/usr/lib64/libpython3.11.so.1.0", "Python"),
        ("rootfs/usr/lib/x86_64-linux-gnu/libpython3.11.so.1.0", "Python"),
        ("rootfs/usr/lib/x86_64-linux-gnu/libcrypto.so.3", "shared libraries"),
        ("rootfs/usr/lib64/ld-linux-x86-64.so.2", "shared libraries"),
        (f"{PACKAGES}/numpy/__init__.py", "numpy"),
        (f"{PACKAGES}/numpy.libs/libscipy_openblas64_.so", "numpy"),
        (f"{PACKAGES}/llama_cpp/lib/libllama.so", "llama.cpp"),
        (f"{PACKAGES}/llama_cpp_python-0.3.36.dist-info/METADATA", "llama.cpp"),
        (f"{PACKAGES}/cryptography/x509/name.py", "cryptography"),
        (f"{PACKAGES}/botocore/data/endpoints.json", "botocore"),
        (f"{PACKAGES}/_cffi_backend.cpython-311-x86_64-linux-gnu.so", "other packages"),
        ("rootfs/usr/lib/python3.11/site-packages/six.py", "other packages"),
        (f"{PACKAGES}/enclave/server.py", "our code"),
        (f"{PACKAGES}/vsockrpc/frames.py", "our code"),
        ("rootfs/etc/ssl/certs/ca-certificates.crt", "others"),
        ("rootfs/opt/strongroom/model.gguf", "others"),
    ],
)
def test_a_file_s_part(path: str, part: str) -> None:
    assert image_build.part_of(path) == part


def test_sizes_are_those_of_kernel_and_files(tmp_path: Path) -> None:
    boot = archive(folder("dev"), Member("init", b"i" * 700))
    on_the_way = [PACKAGES.rsplit("/", up)[0] for up in range(PACKAGES.count("/"), 0, -1)]
    root = archive(
        *(folder(path) for path in (*on_the_way, PACKAGES, f"{PACKAGES}/numpy", "rootfs/usr/lib")),
        link("rootfs/lib", "usr/lib"),
        Member("rootfs/usr/lib/libc.so.6", b"c" * 5000),
        Member(f"{PACKAGES}/numpy/core.so", b"n" * 9000),
    )
    eif = image(ramdisks=(boot, root))
    path = tmp_path / "enclave.eif"
    path.write_bytes(eif.encode())
    sizes = image_build.sizes_of(path)
    expected = {"kernel": len(eif.data(KERNEL)[0]), "init": 700, "shared libraries": 5000, "numpy": 9000}
    assert sizes == dict.fromkeys(image_build.PARTS, 0) | expected | {"others": len("usr/lib")}


@pytest.mark.parametrize(("size", "holds"), [(299_999_999, True), (300_000_000, False)])
def test_an_image_has_a_largest_size(size: int, holds: bool) -> None:
    whole, parts = image_build.size_rows(dict.fromkeys(image_build.PARTS, 0) | {"numpy": size}, 1)
    assert (whole.holds, parts.holds) == (holds, None)
    assert "numpy 286.1" in parts.ours


# --- Moments ----------------------------------------------------------------------------------------------------------


def test_boots_are_compared_by_their_medians() -> None:
    def seconds(unit: float) -> dict[str, float]:
        return {moment: unit * number for number, moment in enumerate(image_boot.ROWS, 1)}

    rows = image_boot.rows_of([(seconds(8), seconds(1)), (seconds(10), seconds(2)), (seconds(30), seconds(6))])
    assert [row.ours for row in rows] == ["10.00 s", "20.00 s", "30.00 s", "40.00 s"]
    assert [row.compared for row in rows] == ["", "5.0", "5.0", "5.0"]
    assert rows[1].peer == "4.00 s (as processes of this host)"
    assert {row.holds for row in rows} == {None}


@pytest.fixture
def instance(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Instance:
    """In a home with a path short enough for sockets, with stand-ins for QEMU and its device."""
    home = tmp_path_factory.mktemp("h")
    monkeypatch.setenv("STRONGROOM_HOME", str(home))
    stand_in_tools(home, monkeypatch)
    made = Registry.of_user().create("t")
    made.configuration.write_text(CONFIGURATION)
    (made.directory / "enclave.eif").write_bytes(image().encode())
    return made


async def test_a_boot_tells_when_it_begins_and_when_its_init_has_come_up(
    instance: Instance, capsys: pytest.CaptureFixture[str]
) -> None:
    machine = image_boot.Told(QemuMachine(instance, instance.directory / "enclave.eif", memory=1 << 30))
    told: list[tuple[str, float]] = []
    async with machine.boot(await machine.measure()):
        while len(told) < 2:
            await asyncio.sleep(0.01)
            told += [tuple(json.loads(line)) for line in capsys.readouterr().out.splitlines()]
    assert [moment for moment, _ in told] == [image_boot.BEGUN, image_boot.HEARTBEAT]
    assert told[0][1] <= told[1][1]
