"""Every vector of tests/vectors/evidence: one thing wrong in each, and one verdict."""

from __future__ import annotations

import base64
import json
import runpy
from datetime import datetime
from pathlib import Path

import pytest

from attestation.checks import STEPS, Status
from attestation.errors import AppraisalError, EvidenceError
from attestation.policy import AppraisalPolicy
from attestation.verifier import verify

REPOSITORY = Path(__file__).resolve().parents[2]
VECTORS = REPOSITORY / "tests" / "vectors" / "evidence"


@pytest.mark.parametrize("path", sorted(VECTORS.glob("*.json")), ids=lambda path: path.stem)
def test_vector(path: Path) -> None:
    vector = json.loads(path.read_text())
    policy = AppraisalPolicy.load(VECTORS / vector["policy"])
    evidence, nonce = base64.b64decode(vector["evidence"]), bytes.fromhex(vector["nonce"])
    at = datetime.fromisoformat(vector["at"])

    if vector["expect"] == "accepted":
        result = verify(evidence, policy=policy, nonce=nonce, at=at)
        assert {check.step for check in result.checks} == set(STEPS)
        assert {check.status for check in result.checks} <= {Status.PASSED, Status.IGNORED}
        assert 0 <= result.valid_seconds <= result.commitment.lifetime
        return

    with pytest.raises((EvidenceError, AppraisalError)) as caught:
        verify(evidence, policy=policy, nonce=nonce, at=at)
    error = caught.value
    assert isinstance(error, EvidenceError | AppraisalError)
    failed = [check for check in error.checks if check.status is Status.FAILED]
    assert error.code == vector["expect"] == failed[0].code
    assert failed[0].step == vector["step"]
    assert {check.step for check in error.checks} == set(STEPS)
    assert [check.step for check in error.checks] == sorted(check.step for check in error.checks)
    if isinstance(error, EvidenceError):
        assert failed[0].step <= 9
        behind = [check for check in error.checks if check.step > failed[0].step]
        assert {check.status for check in behind} == {Status.NOT_REACHED}
        before = [check for check in error.checks if check.step < failed[0].step]
        assert {check.status for check in before} <= {Status.PASSED}
    else:
        # A debug enclave has no image either; everything else is one failure.
        assert [check.step for check in failed] == ([10, 11] if vector["step"] == 10 else [vector["step"]])
        assert failed[0].step >= 10
        assert failed[0].expected is not None
        assert failed[0].got is not None


def test_the_vectors_are_those_that_the_script_makes() -> None:
    script = runpy.run_path(str(REPOSITORY / "scripts" / "make-vectors"))
    made = script["evidence"]()
    assert {path.name: path.read_bytes() for path in VECTORS.iterdir()} == dict(made)
