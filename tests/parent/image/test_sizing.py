"""The size of an enclave: what an image and a Nitro parent add to what a model takes."""

from __future__ import annotations

from collections.abc import Mapping

import pytest

from attestation.model_memory import KERNEL, KERNEL_SHARE, SERVER, ModelShape, SizingError, Work, engine_memory
from parent.image.sizing import (
    ASSUMED_IMAGE,
    EIF_FACTOR,
    GIB,
    HUGE_PAGE,
    MAX_CPUS,
    MIB,
    ImageSize,
    Plan,
    plan,
)

SMALL = ModelShape("llama", GIB, 0, ((64, 64),), 64, 192, 1000, 1500, 4096)


def mib(planned: Plan) -> Mapping[str, float]:
    return {part.name: part.size / MIB for part in planned.parts}


def test_a_models_parts_come_first_then_the_image_and_the_kernel() -> None:
    planned = plan(SMALL, Work(1024))
    assert planned.parts[:-2] == engine_memory(SMALL, Work(1024)).parts
    assert [part.name for part in planned.parts[-2:]] == ["image", "kernel"]


def test_the_sum_of_the_parts_leaves_the_kernel_its_share() -> None:
    planned = plan(SMALL, Work(4096))
    kernel = {part.name: part.size for part in planned.parts}["kernel"]
    assert planned.running == sum(part.size for part in planned.parts)
    assert kernel >= KERNEL + planned.running // KERNEL_SHARE
    assert kernel <= KERNEL + planned.running // KERNEL_SHARE + 2


@pytest.mark.parametrize(
    ("image", "decided_by"),
    [
        (ImageSize(MIB, MIB), "running"),
        (ImageSize(GIB, 2 * GIB), "boot"),
        (ImageSize(2 * GIB, GIB), "nitro-cli"),
    ],
)
def test_the_largest_of_three_decides(image: ImageSize, decided_by: str) -> None:
    planned = plan(SMALL, Work(1024), image)
    assert planned.decided_by == decided_by
    assert planned.boot == 2 * image.unpacked + image.file
    assert planned.demanded == EIF_FACTOR * image.file
    for need in (planned.running, planned.boot, planned.demanded):
        assert planned.memory * MIB >= need
    assert planned.memory * MIB - max(planned.running, planned.boot, planned.demanded) < HUGE_PAGE


def test_memory_is_whole_huge_pages() -> None:
    planned = plan(SMALL, Work(1024), ImageSize(MIB + 1, MIB + 1))
    giant, huge = planned.hugepages
    assert giant * 1024 + huge * 2 == planned.memory
    assert huge < 512


@pytest.mark.parametrize(
    ("weights", "asked", "cpus"),
    [
        (1, None, 2),
        (GIB, None, 2),
        (GIB + 1, None, 4),
        (90 * GIB, None, MAX_CPUS),
        (GIB, 1, 2),
        (GIB, 5, 6),
        (1, 64, 64),
    ],
)
def test_cpus_are_whole_cores(weights: int, asked: int | None, cpus: int) -> None:
    shape = ModelShape("llama", weights, 0, ((64, 64),), 64, 192, 1000, 1500, 4096)
    assert plan(shape, Work(1024), cpus=asked).cpus == cpus


def test_what_the_engine_would_refuse_is_refused() -> None:
    with pytest.raises(SizingError) as caught:
        plan(SMALL, Work(4097))
    assert caught.value.code == "context_exceeded"


def test_where_no_image_is_named_the_largest_of_ours_is_assumed() -> None:
    assert plan(SMALL, Work(1024)) == plan(SMALL, Work(1024), ASSUMED_IMAGE)
    assert mib(plan(SMALL, Work(1024)))["server"] == SERVER / MIB
