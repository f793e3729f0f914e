"""docs/memory.md says what the code counts."""

from __future__ import annotations

import re
from dataclasses import asdict
from pathlib import Path

import pytest

from attestation.gguf import TENSOR_TYPES
from attestation.model_memory import MIB, Work, engine_memory
from bench.memory_table import ORDER, WORKS, lines, main, shape_of
from bench.model_shapes import SHAPES
from enclave.config import EnclaveConfiguration
from strongroom.profiles import PROFILES

SMALLEST = f"""
version = 1
[rpc]
listen = "vsock:any:5000"
[nsm]
address = "device:/dev/nsm"
entropy = "nsm-hwrng"
[model]
store = "vsock:3:5001"
manifest = "sha384:{"00" * 48}"
""".encode()
PAGE = (Path(__file__).resolve().parents[2] / "docs/memory.md").read_text()


def test_the_tables_are_what_the_planner_says(capsys: pytest.CaptureFixture[str]) -> None:
    assert "\n".join(lines()) in PAGE
    assert main() == 0
    assert capsys.readouterr().out in PAGE


def test_the_defaults_are_those_of_the_code() -> None:
    """Every key of [engine], in the order of EngineSettings, and no other."""
    told = re.findall(r"^\| `(\w+)` \| `?([\w ]+?)`? \|", PAGE, re.MULTILINE)
    engine = EnclaveConfiguration.parse(SMALLEST).engine
    assert engine.cells == engine.context * engine.parallel
    defaults = {key: str(value).lower() for key, value in asdict(engine).items()} | {"cells": "all contexts"}
    assert told == list(defaults.items())


def test_the_profile_is_the_one_of_the_code() -> None:
    [told] = re.findall(r"`strongroom init --profile (\w+)` writes such a pair: ([^\n]+?), four at once", PAGE)
    profile = PROFILES[told[0]]
    numbers = [int(found.replace(",", "")) for found in re.findall(r"[\d,]*\d", told[1])]
    assert numbers == [profile.prompt_tokens, profile.answer_tokens, profile.context]
    assert profile.parallel == 4


def test_the_shares_of_quantised_keys_and_values_are_ggmls() -> None:
    sizes = {name: size / elements / 2 for name, elements, size in TENSOR_TYPES.values()}
    assert (sizes["Q8_0"], sizes["Q4_0"]) == (17 / 32, 9 / 32)


def test_the_targets_stand_in_the_tables() -> None:
    """4,096 cells shared by 4 sequences below 2.0 GiB, 4 x 4,096 below 2.4, and a row without the second copy."""
    shape = shape_of(SHAPES["1.5b"])
    bounds = {Work(4096, cells=4096): 2.0, Work(4096): 2.4, Work(4096, cells=4096, repack=False): 1.4}
    assert bounds.keys() <= set(WORKS)
    for work, gib in bounds.items():
        assert engine_memory(shape, work).resident < gib * 1024 * MIB


def test_every_shape_has_its_table() -> None:
    assert set(ORDER) == set(SHAPES)


def test_what_was_measured_is_no_more_than_was_planned() -> None:
    rows = re.findall(
        r"^\| .+ \| ([\d,]+) \| ([\d,]+) \|$", PAGE.partition("## Held against llama.cpp")[2], re.MULTILINE
    )
    assert len(rows) >= 4
    for measured, planned in rows:
        assert int(measured.replace(",", "")) <= int(planned.replace(",", "")) <= 1.15 * int(measured.replace(",", ""))
