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

PAGE = (Path(__file__).resolve().parents[2] / "docs/memory.md").read_text()


def test_the_tables_are_what_the_planner_says(capsys: pytest.CaptureFixture[str]) -> None:
    assert "\n".join(lines()) in PAGE
    assert main() == 0
    assert capsys.readouterr().out in PAGE


def test_the_defaults_are_those_of_the_code() -> None:
    told = dict(re.findall(r"^\| `(\w+)` \| `?([\w ]+?)`? \|", PAGE, re.MULTILINE))
    work = {key: str(value).lower() for key, value in asdict(Work()).items()}
    assert told == {**work, "cells": "all contexts"}


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
