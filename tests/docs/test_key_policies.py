"""docs/key-policies.md has every rule of the linter, under its severity and in its words, and no other; PROTOCOL.md
section 3.2 has the actions that open a key and those that change it.
"""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from attestation.keypolicy.actions import POWERS, PREFIX, Power
from attestation.keypolicy.findings import RULES, Severity

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs/key-policies.md").read_text()
PROTOCOL = (ROOT / "PROTOCOL.md").read_text()


@pytest.mark.parametrize("severity", Severity)
def test_the_rules_of_a_severity(severity: Severity) -> None:
    (section,) = re.findall(rf"^## {severity.value.capitalize()}s\n(.*?)(?=^## |\Z)", PAGE, re.MULTILINE | re.DOTALL)
    told = re.findall(r"^\| `(\w+)` \| (.+) \| (.+) \|$", section, re.MULTILINE)
    assert told == [(code, rule.means, rule.fix) for code, rule in RULES.items() if rule.severity is severity]


@pytest.mark.parametrize("power", [Power.OPENS, Power.CHANGES])
def test_the_actions_of_a_power(power: Power) -> None:
    (row,) = re.findall(rf"^\| {power.name.lower()}: [^|]+\| (.+) \|$", PROTOCOL, re.MULTILINE)
    told = re.findall(r"`(\w+)`", row)
    assert told == sorted(action.removeprefix(PREFIX) for action, has in POWERS.items() if has is power)
