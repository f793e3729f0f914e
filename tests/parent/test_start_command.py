"""What ``strongroom start`` decides before a machine boots: how much memory it has, and whether the image is for it."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st

import parent.launch.nitro
from attestation.gguf import read_header
from attestation.model_memory import ModelShape, SizingError, Work
from parent.config import LaunchConfiguration, LaunchConfigurationError
from parent.image.facts import read_facts
from parent.image.size_command import size
from parent.image.sizing import MIB, ImageSize, plan
from parent.launch.qemu import QemuMachine
from parent.registry import Instance, Registry
from parent.start_command import make_machine, needed_memory, start
from tests.cpio_files import Member, archive, folder
from tests.eif_files import image
from tests.gguf_files import tiny_model
from tests.machines import stand_in_tools
from tests.terminal import AS_FROM_THE_FRONT_DOOR

CONFIGURATION = """
[rpc]
listen = "vsock:any:5005"
[nsm]
address = "{nsm}"
[model]
store = "{store}"
manifest = "sha384:00"
[engine]
context = {context}
"""
NSM, STORE = "device:/dev/nsm", "vsock:3:5006"
KMS = """
[kms]
endpoint = "kms.eu-west-1.amazonaws.com:443"
egress = "vsock:3:5007"
[kms.model]
"""


def configured(*, context: int = 4096, nsm: str = NSM, store: str = STORE, more: str = "") -> bytes:
    return (CONFIGURATION.format(context=context, nsm=nsm, store=store) + more).encode()


def written(path: Path, configuration: bytes, *, weights: int = 0) -> Path:
    """An image with this configuration in it, and so many bytes beside it."""
    folders = (folder(each) for each in ("rootfs", "rootfs/etc", "rootfs/etc/strongroom"))
    files = Member("rootfs/etc/strongroom/enclave.toml", configuration), Member("rootfs/model.gguf", bytes(weights))
    path.write_bytes(image(ramdisks=[archive(folder("dev")), archive(*folders, *files)]).encode())
    return path


@pytest.fixture
def eif(tmp_path: Path) -> Path:
    return written(tmp_path / "enclave.eif", configured())


@pytest.fixture
def model(tmp_path: Path) -> Path:
    path = tmp_path / "tiny.gguf"
    path.write_bytes(tiny_model().encode())
    return path


@pytest.fixture
def instance(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Instance:
    """In a home with a path short enough for sockets, with stand-ins for QEMU and its device."""
    home = tmp_path_factory.mktemp("h")
    monkeypatch.setenv("STRONGROOM_HOME", str(home))
    stand_in_tools(home, monkeypatch)
    made = Registry.of_user().create("t")
    made.configuration.write_bytes(configured())
    return made


# --- Memory -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("context", [64, 4096, 16384])
def test_the_memory_that_nobody_named_is_what_image_size_says(eif: Path, model: Path, context: int) -> None:
    asked = ["--model", str(model), "--image", str(eif), "--context", str(context), "--json"]
    said = json.loads(CliRunner().invoke(size, asked, **AS_FROM_THE_FRONT_DOOR).output)["memory_mib"]
    assert needed_memory(eif, model, LaunchConfiguration.parse(configured(context=context))) == said * MIB


def test_both_machines_get_it(instance: Instance, eif: Path, model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    needed = needed_memory(eif, model, LaunchConfiguration.parse(configured()))
    qemu = make_machine("qemu", instance, eif, model, memory=None, cpus=None)
    assert isinstance(qemu, QemuMachine)
    assert f"{needed // MIB}M" in qemu.command()
    given: dict[str, Any] = {}
    monkeypatch.setattr(parent.launch.nitro, "NitroMachine", lambda *_, **how: given.update(how))
    make_machine("nitro", instance, eif, model, memory=None, cpus=2)
    assert given == {"memory": needed, "cpus": 2}
    make_machine("nitro", instance, eif, model, memory=5 << 30, cpus=None)
    assert given == {"memory": 5 << 30, "cpus": None}


def test_a_context_that_the_model_does_not_have_is_said(eif: Path, model: Path) -> None:
    with pytest.raises(SizingError) as caught:
        needed_memory(eif, model, LaunchConfiguration.parse(configured(context=1 << 20)))
    assert caught.value.code == "context_exceeded"


def test_of_an_encrypted_model_the_most_is_expected(eif: Path, model: Path, tmp_path: Path) -> None:
    sealed = tmp_path / "sealed"
    sealed.write_bytes(bytes(100 * MIB))
    work, facts = Work(4096), read_facts(eif).size
    encrypted = LaunchConfiguration.parse(configured(more=KMS))
    assert needed_memory(eif, sealed, encrypted) == plan(ModelShape.unseen(100 * MIB), work, facts).memory * MIB
    assert needed_memory(eif, model, encrypted) > needed_memory(eif, model, LaunchConfiguration.parse(configured()))


def test_so_it_is_of_a_model_that_does_not_say_its_shape(eif: Path, model: Path) -> None:
    gguf = tiny_model()
    gguf.metadata = [each for each in gguf.metadata if not each[0].endswith("block_count")]
    model.write_bytes(gguf.encode())
    unseen = plan(ModelShape.unseen(model.stat().st_size), Work(4096), read_facts(eif).size)
    assert needed_memory(eif, model, LaunchConfiguration.parse(configured())) == unseen.memory * MIB


def test_weights_in_the_image_are_counted_once_as_what_is_unpacked(tmp_path: Path) -> None:
    configuration = configured(store="file:/model.gguf")
    eif = written(tmp_path / "whole.eif", configuration, weights=64 * MIB)
    needed, facts = needed_memory(eif, None, LaunchConfiguration.parse(configuration)), read_facts(eif).size
    assert facts.unpacked > 64 * MIB
    shape = replace(ModelShape.unseen(facts.unpacked), weights=0)
    parts = {part.name: part.size for part in plan(shape, Work(4096), facts).parts}
    assert (parts["weights"], parts["image"], parts["repacked weights"]) == (0, facts.unpacked, facts.unpacked)
    assert needed >= max(4 * facts.file, sum(parts.values()))


@given(weights=st.integers(0, 1 << 40), context=st.integers(64, 1 << 20))
def test_what_is_unseen_has_its_weights_twice_and_a_cache(weights: int, context: int) -> None:
    needed = plan(ModelShape.unseen(weights), Work(context, 1), ImageSize(0, 0))
    cache = next(part.size for part in needed.parts if part.name == "key-value cache")
    assert cache >= weights // 4096 * context - 3 * (context + 256)  # whole numbers of a row
    assert needed.running >= 2 * weights + cache


def test_what_can_be_seen_needs_less(model: Path) -> None:
    with model.open("rb") as file:
        shape = ModelShape.of(read_header(file))
    seen, unseen = (plan(each, Work(2048)).running for each in (shape, ModelShape.unseen(shape.weights)))
    assert seen < unseen


# --- The image --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("launcher", "changed", "key", "advice"),
    [
        ("nitro", {"nsm": "vsock:3:5008"}, "nsm.address", "strongroom init --target nitro"),
        ("qemu", {"nsm": "unix:nsm.sock"}, "nsm.address", "vsock:3:PORT"),
        ("qemu", {"store": "vsock:2:5006"}, "model.store", "vsock:3:PORT"),
    ],
)
def test_an_image_for_another_machine_is_refused_before_the_model_is_read(
    instance: Instance, tmp_path: Path, launcher: str, changed: dict[str, str], key: str, advice: str
) -> None:
    eif = written(tmp_path / "enclave.eif", configured(nsm=changed.get("nsm", NSM), store=changed.get("store", STORE)))
    unread = tmp_path / "no-model.gguf"
    unread.write_bytes(b"whoever reads this says that it is no model")
    asked = ["--launcher", launcher, "--image", str(eif), "--model", str(unread), "--name", "t", "--foreground"]
    error = CliRunner().invoke(start, asked, **AS_FROM_THE_FRONT_DOOR).exception
    assert isinstance(error, LaunchConfigurationError)
    assert error.message.startswith(f"{key}: ")
    assert advice in str(error)
    assert instance.configuration.exists()  # what was there of this name stays
