"""docs/key-policies.md has every rule of the linter, under its severity and in its words, and no other."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from attestation.keypolicy.findings import RULES, Severity

PAGE = (Path(__file__).resolve().parents[2] / "docs/key-policies.md").read_text()


@pytest.mark.parametrize("severity", Severity)
def test_the_rules_of_a_severity(severity: Severity) -> None:
    (section,) = re.findall(rf"^## {severity.value.capitalize()}s\n(.*?)(?=^## |\Z)", PAGE, re.MULTILINE | re.DOTALL)
    told = re.findall(r"^\| `(\w+)` \| (.+) \| (.+) \|$", section, re.MULTILINE)
    assert told == [(code, rule.means, rule.fix) for code, rule in RULES.items() if rule.severity is severity]
