"""What is in the enclave's root file system, and what is not; nothing is booted for it."""

from __future__ import annotations

from pathlib import Path, PurePosixPath

import pytest

from parent.image.build import ImagePlan, OciLayout, read_source
from parent.image.spool import Spool
from parent.image.tree import Device, File, Tree

LIMIT = 300_000_000
"""Bytes, unpacked and without weights."""
SHELLS_AND_MANAGERS = ("sh", "bash", "dash", "busybox", "apt", "apt-get", "dpkg", "pip", "pip3", "perl", "env")
OUR_ROOMS = ("attestation", "enclave", "vsockrpc")


@pytest.fixture(scope="module")
def root(layout: Path, tmp_path_factory: pytest.TempPathFactory) -> Tree:
    return read_source(ImagePlan(source=OciLayout(layout)), Spool(tmp_path_factory.mktemp("s"), lambda *_: None)).tree


def test_it_is_small(root: Tree) -> None:
    assert root.size < LIMIT


def test_there_is_nothing_to_run_but_the_interpreter(root: Tree) -> None:
    programs = [path for path, entry in root.items() if isinstance(entry, File) and entry.mode & 0o111]
    assert [path for path in programs if "/bin/" in f"/{path}"] == ["usr/bin/python3.11"]
    assert {PurePosixPath(path).name for path in root}.isdisjoint(SHELLS_AND_MANAGERS)


def test_nothing_gives_rights_or_stands_for_a_device(root: Tree) -> None:
    assert not [path for path, entry in root.items() if isinstance(entry, File) and entry.mode & 0o6000]
    assert not [path for path, entry in root.items() if isinstance(entry, Device)]
    assert not [path for path, entry in root.items() if isinstance(entry, File) and entry.mode & 0o022]


def test_our_rooms_and_no_others_are_there_without_bytecode(root: Tree) -> None:
    site = next(PurePosixPath(path).parent for path in root if path.endswith("/enclave/boot.py")).parent
    for room in OUR_ROOMS:
        assert str(site / room / "__init__.py") in root
    for other in ("emulator", "parent", "strongroom", "moto", "pytest", "click"):
        assert str(site / other) not in root
    assert not [path for path in root if path.endswith((".pyc", "/__pycache__"))]


def test_configuration_authorities_and_the_last_file_are_there(root: Tree) -> None:
    assert {"etc/strongroom/enclave.toml", "etc/ssl/certs/ca-certificates.crt", "etc/passwd"} <= set(root)
    assert list(root)[-1] == "~last"
