"""The table of instance types, against what EC2 was recorded to answer, and who fits into what."""

from __future__ import annotations

import gzip
import json
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from attestation.model_memory import ModelShape, Work
from parent.image.instance_types import INSTANCE_TYPES, InstanceType, fitting
from parent.image.sizing import GIB, ImageSize, Plan, plan

ARCHITECTURES = {"x86_64": "x86_64", "arm64": "aarch64"}


def recorded() -> dict[str, dict[str, Any]]:
    """The answers that moto keeps for its own EC2."""
    spec = find_spec("moto")
    assert spec is not None
    assert spec.origin is not None
    path = Path(spec.origin).parent / "ec2/resources/instance_types.json.gz"
    answers: dict[str, dict[str, Any]] = json.loads(gzip.decompress(path.read_bytes()))
    return answers


def needing(weights: int, cpus: int = 2) -> Plan:
    shape = ModelShape("llama", weights, 0, ((64, 64),), 64, 192, 1000, 1500, 4096)
    return plan(shape, Work(1024), ImageSize(0, 0), cpus=cpus)


def test_every_type_is_what_ec2_answers() -> None:
    answers = recorded()
    for each in INSTANCE_TYPES:
        answer = answers[each.name]
        (architecture,) = answer["ProcessorInfo"]["SupportedArchitectures"]
        assert answer["NitroEnclavesSupport"] == "supported", each.name
        assert each == InstanceType(
            answer["VCpuInfo"]["DefaultVCpus"],
            answer["MemoryInfo"]["SizeInMiB"],
            each.name,
            answer["VCpuInfo"]["DefaultThreadsPerCore"],
            ARCHITECTURES[architecture],
        )


def test_no_size_of_a_family_is_missing() -> None:
    largest = max(each.cpus for each in INSTANCE_TYPES)
    families = {each.name.partition(".")[0] for each in INSTANCE_TYPES}
    there = {
        name
        for name, answer in recorded().items()
        if name.partition(".")[0] in families
        and answer["NitroEnclavesSupport"] == "supported"
        and answer["VCpuInfo"]["DefaultVCpus"] <= largest
    }
    assert there == {each.name for each in INSTANCE_TYPES}


def test_the_smallest_comes_first() -> None:
    names = [each.name for each in fitting(needing(GIB))]
    assert names[0] == "c5.xlarge"
    assert "m7i.xlarge" in names
    sizes = [(each.cpus, each.memory) for each in fitting(needing(GIB))]
    assert sizes == sorted(sizes)


@pytest.mark.parametrize(
    ("cpus", "smallest"), [(2, 4), (4, 8), (6, 8), (8, 16), (14, 16), (16, 32), (30, 32), (32, 36), (46, 48)]
)
def test_two_cpus_stay_with_the_parent(cpus: int, smallest: int) -> None:
    assert fitting(needing(GIB, cpus))[0].cpus == smallest


def test_memory_stays_with_the_parent() -> None:
    xlarge = next(each for each in INSTANCE_TYPES if each.name == "c6i.xlarge")  # 8 GiB
    assert xlarge.fits(needing(5 * GIB))
    assert not xlarge.fits(needing(6 * GIB))


def test_what_is_too_large_fits_nowhere() -> None:
    assert fitting(needing(400 * GIB)) == []
    assert fitting(needing(GIB, 48)) == []


def test_another_architecture_has_its_own_types() -> None:
    assert fitting(needing(GIB), "aarch64")[0].name == "c6g.xlarge"
    assert not {each.name for each in fitting(needing(GIB), "aarch64")} & {each.name for each in fitting(needing(GIB))}
