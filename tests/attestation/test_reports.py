"""Reports, whole: what a program reads of every kind of verdict is what it read yesterday."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from scripts import vectors_reports

FOLDER = Path(__file__).resolve().parents[1] / "vectors" / "reports"
MADE = vectors_reports.files()


def test_there_is_a_report_of_each_kind() -> None:
    assert {path.name for path in FOLDER.iterdir()} == MADE.keys()


@pytest.mark.parametrize("name", sorted(MADE))
def test_a_report_is_as_it_was(name: str) -> None:
    assert json.loads(MADE[name]) == json.loads((FOLDER / name).read_bytes())
