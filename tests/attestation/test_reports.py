"""Reports, whole: what a program reads of every kind of verdict is what it read yesterday."""

from __future__ import annotations

import json
from pathlib import Path

from scripts import vectors_reports

FOLDER = Path(__file__).resolve().parents[1] / "vectors" / "reports"


def test_every_report_is_as_it_was() -> None:
    made = vectors_reports.files()
    assert {path.name for path in FOLDER.iterdir()} == made.keys()
    for name, report in made.items():
        assert json.loads(report) == json.loads((FOLDER / name).read_bytes()), name
