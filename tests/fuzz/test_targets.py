"""Every fuzz target, for a bounded number of inputs: under atheris where there is a build of it for this Python, else
over mutated seeds.
"""

from __future__ import annotations

import importlib
import importlib.util
import random
import subprocess
import sys
from pathlib import Path

import pytest

from fuzz.__main__ import targets

RUNS = 1000
"""Inputs of the smoke test; `make fuzz` has the time for more."""
MUTATIONS = 300
ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("name", targets())
def test_seeds_and_their_mutations_are_no_bug(name: str) -> None:
    target = importlib.import_module(f"fuzz.fuzz_{name}")
    chance = random.Random(name)
    seeds = [*target.seeds(), b""]
    for seed in seeds:
        target.one_input(seed)
    for _ in range(MUTATIONS):
        data = bytearray(chance.choice(seeds))
        for _ in range(chance.randint(1, 4)):
            at = chance.randint(0, len(data))
            data[at : at + chance.randint(0, 3)] = chance.randbytes(chance.randint(0, 3))
        target.one_input(bytes(data))


@pytest.mark.skipif(importlib.util.find_spec("atheris") is None, reason="atheris has no build for this Python")
@pytest.mark.parametrize("name", targets())
def test_coverage_guided_inputs_are_no_bug(name: str) -> None:
    command = [sys.executable, "-m", "fuzz", "--runs", str(RUNS), name]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stdout[-2000:] + run.stderr[-4000:]
