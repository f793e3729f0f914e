"""``strongroom image size``, and what an image says of itself."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from attestation.eif import Architecture, ImageError
from attestation.gguf import ModelError
from attestation.image_files import ImageFileError
from attestation.model_memory import SizingError
from parent.config import LaunchConfigurationError
from parent.image.cpio import archive
from parent.image.facts import CPU_FEATURES, MAX_FEATURES_SIZE, read_facts
from parent.image.instance_types import DATE
from parent.image.size_command import size
from parent.image.tree import File, Tree
from tests.eif_files import image
from tests.gguf_files import tiny_model
from tests.terminal import AS_FROM_THE_FRONT_DOOR


@pytest.fixture
def model(tmp_path: Path) -> Path:
    (tmp_path / "model.gguf").write_bytes(tiny_model().encode())
    return tmp_path / "model.gguf"


def ramdisk(sizes: dict[str, int]) -> bytes:
    return b"".join(archive(Tree.of(File.of(path, bytes(count)) for path, count in sizes.items())))


@pytest.fixture
def eif(tmp_path: Path) -> Path:
    """Two ramdisks of 5 and 3 MiB, the second packed to almost nothing."""
    plain, packed = ramdisk({"init": 5 << 20}), gzip.compress(ramdisk({"rootfs/a": 1 << 20, "rootfs/b": 2 << 20}))
    (tmp_path / "enclave.eif").write_bytes(image(ramdisks=(plain, packed)).encode())
    return tmp_path / "enclave.eif"


def run(*arguments: object) -> Result:
    return CliRunner().invoke(size, [str(each) for each in arguments], catch_exceptions=True, **AS_FROM_THE_FRONT_DOOR)


def test_an_image_is_as_large_as_its_ramdisks_unpacked(eif: Path) -> None:
    facts = read_facts(eif)
    assert facts.architecture is Architecture.X86_64
    assert facts.size.file == eif.stat().st_size
    assert 8 << 20 <= facts.size.unpacked <= (8 << 20) + 16_384


@pytest.mark.parametrize("data", [b"", b"no image", image(ramdisks=(b"no ramdisk",)).encode()])
def test_what_is_no_image_is_an_error(tmp_path: Path, data: bytes) -> None:
    (tmp_path / "enclave.eif").write_bytes(data)
    with pytest.raises(ImageError):
        read_facts(tmp_path / "enclave.eif")


@pytest.mark.parametrize("size", [MAX_FEATURES_SIZE, MAX_FEATURES_SIZE + 1])
def test_a_statement_of_features_has_an_end(tmp_path: Path, size: int) -> None:
    ramdisk = b"".join(archive(Tree.of([File.holding(f"rootfs/usr{CPU_FEATURES}", b"avx2".ljust(size, b"\n"))])))
    (tmp_path / "enclave.eif").write_bytes(image(ramdisks=(ramdisk,)).encode())
    if size == MAX_FEATURES_SIZE:
        assert read_facts(tmp_path / "enclave.eif").cpu_features == frozenset({"avx2"})
        return
    with pytest.raises(ImageFileError) as caught:
        read_facts(tmp_path / "enclave.eif")
    assert caught.value.code == "file_too_large"


def test_an_image_that_cannot_be_read_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ImageError) as caught:
        read_facts(tmp_path)
    assert caught.value.code == "unreadable_image"


def test_the_account_is_printed_for_people(model: Path, eif: Path) -> None:
    result = run("--model", model, "--image", eif)
    assert result.exit_code == 0
    assert "4 x 2048 tokens, 1 layers, f16" in result.output
    memory = json.loads(run("--model", model, "--image", eif, "--json").output)["memory_mib"]
    assert f"nitro-cli run-enclave --memory {memory} " in result.output
    assert "--cpu-count 2" in result.output
    assert DATE in result.output
    assert "c7i.xlarge" in result.output
    assert "assumed" not in result.output
    assert max(map(len, result.output.splitlines())) <= 120


def test_an_image_that_is_not_named_is_assumed_and_said(model: Path) -> None:
    assert "no --image: 287 MiB assumed" in run("--model", model).output


def configured(path: Path, text: bytes) -> Path:
    """An image with this ``enclave.toml``."""
    tree = Tree.of([File.holding("rootfs/etc/strongroom/enclave.toml", text)])
    path.write_bytes(image(ramdisks=(b"".join(archive(tree)),)).encode())
    return path


def cache(*arguments: object) -> str:
    """The line of the account that has the cells."""
    (line,) = (line for line in run(*arguments).output.splitlines() if line.startswith("key-value cache"))
    return line.partition("MiB")[2].strip()


def test_the_images_configuration_counts_and_options_above_it(tmp_path: Path, model: Path) -> None:
    text = b'[engine]\ncontext = 512\nparallel = 3\ncells = 1000\nkv_type = "q8_0"\nrepack = false\nbatch = 32\n'
    eif = configured(tmp_path / "enclave.eif", text)
    asked = ("--model", model, "--image", eif)
    assert read_facts(eif).configuration == text
    assert cache(*asked) == "1024 tokens, shared by 3, 1 layers, q8_0"
    assert cache(*asked, "--cells", 600) == "768 tokens, shared by 3, 1 layers, q8_0"
    assert cache(*asked, "--parallel", 2, "--kv-type", "f16") == "2 x 512 tokens, 1 layers, f16"
    said = run(*asked).output
    assert "none: repack = false" in said
    assert "33 tokens a step" in said
    assert "none: repack" not in run(*asked, "--repack", "--batch", "64").output
    said = run("--model", model, "--context", "300", "--cells", "1000", "--no-repack").output
    assert "1024 tokens, shared by 4" in said
    assert "none: repack = false" in said


@pytest.mark.parametrize("text", [b"\xff", b"engine = 1", b"[engine]\ncontext = 0", b"[engine]\ncells = 1"])
def test_a_configuration_that_no_enclave_takes_is_an_error(tmp_path: Path, model: Path, text: bytes) -> None:
    eif = configured(tmp_path / "enclave.eif", text)
    assert isinstance(run("--model", model, "--image", eif).exception, LaunchConfigurationError)


def test_json_has_every_number(model: Path, eif: Path) -> None:
    answer = json.loads(run("--model", model, "--image", eif, "--kv-type", "q8_0", "--json").output)
    assert answer["running_bytes"] == sum(part["bytes"] for part in answer["parts"])
    assert answer["memory_mib"] % 2 == 0
    assert answer["hugepages"]["1GiB"] * 1024 + answer["hugepages"]["2MiB"] * 2 == answer["memory_mib"]
    assert answer["image"] == {
        "assumed": False,
        "file_bytes": eif.stat().st_size,
        "unpacked_bytes": read_facts(eif).size.unpacked,
        "architecture": "x86_64",
    }
    first = answer["instance_types"]["fitting"][0]
    assert first == {"name": "c5.xlarge", "vcpus": 4, "memory_mib": 8192}


def test_more_cpus_than_any_type_has_are_said(model: Path) -> None:
    assert "no instance type in the table" in run("--model", model, "--cpus", 256).output


def test_errors_are_typed(tmp_path: Path, model: Path) -> None:
    (tmp_path / "broken.gguf").write_bytes(b"GGUF")
    assert isinstance(run("--model", tmp_path / "broken.gguf").exception, ModelError)
    for wrong in (("--context", 1 << 20), ("--cells", 100), ("--batch", 16, "--parallel", 17)):
        assert isinstance(run("--model", model, *wrong).exception, SizingError)
