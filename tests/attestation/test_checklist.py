"""The checklist: one line a step, and nothing of what is no finding."""

from __future__ import annotations

import pytest

from attestation.checklist import Checklist
from attestation.checks import STEPS, Status
from attestation.errors import EvidenceError


def test_a_step_that_holds_and_one_that_does_not() -> None:
    checklist = Checklist({step: STEPS[step] for step in range(1, 5)})
    with checklist.proving(1) as finding:
        finding.expected, finding.got = "one", "one"
    with pytest.raises(EvidenceError) as caught, checklist.proving(2):
        raise EvidenceError("malformed_cose", "not two", expected="two", got="three")
    statuses = [(check.step, check.status, check.expected, check.got, check.code) for check in caught.value.checks]
    assert statuses == [
        (1, Status.PASSED, "one", "one", None),
        (2, Status.FAILED, "two", "three", "malformed_cose"),
        (3, Status.NOT_REACHED, None, None, None),
        (4, Status.NOT_REACHED, None, None, None),
    ]


def test_a_defect_is_no_finding() -> None:
    """It leaves as it is, and no check says that the step held."""
    checklist = Checklist({step: STEPS[step] for step in range(1, 3)})
    with pytest.raises(ZeroDivisionError), checklist.proving(1):
        raise ZeroDivisionError
    assert [check.status for check in checklist.complete()] == [Status.NOT_REACHED, Status.NOT_REACHED]
