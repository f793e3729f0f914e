"""Every vector of tests/vectors/evidence: one thing wrong in each, and one verdict."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from attestation.chain import Anchor
from attestation.checks import STEPS, Check, Status
from attestation.errors import AppraisalError, EvidenceError
from attestation.policy import AppraisalPolicy
from attestation.verifier import authenticate, verify, verify_document
from conformance.vectors import ACCEPTED, Subject, Vector, load
from scripts import vectors_evidence
from tests.pki import forge

REPOSITORY = Path(__file__).resolve().parents[2]
FOLDER = REPOSITORY / "tests" / "vectors" / "evidence"
VECTORS = dict(load(FOLDER))
DOCUMENTS = {name: vector for name, vector in VECTORS.items() if vector.subject is Subject.DOCUMENT}
APPRAISALS = {name: vector for name, vector in VECTORS.items() if vector.subject is Subject.APPRAISAL}
EVIDENCE = {name: vector for name, vector in VECTORS.items() if vector.subject is Subject.EVIDENCE}


@pytest.mark.parametrize("name", DOCUMENTS)
def test_document(name: str) -> None:
    vector = DOCUMENTS[name]
    anchor = Anchor.emulated((FOLDER / vector.anchor).read_bytes())
    try:
        checks = authenticate(vector.payload, anchor=anchor, at=vector.time).checks
    except EvidenceError as error:
        _require_refusal(vector, error, last=5)
    else:
        _require_acceptance(vector, checks, last=5)


@pytest.mark.parametrize("name", APPRAISALS)
def test_appraisal(name: str) -> None:
    vector = APPRAISALS[name]
    assert vector.policy is not None
    assert vector.nonce is not None
    policy = AppraisalPolicy.load(FOLDER / vector.policy)
    try:
        result = verify_document(vector.payload, policy=policy, nonce=vector.nonce, at=vector.time)
    except (EvidenceError, AppraisalError) as error:
        _require_refusal(vector, error, last=max(STEPS))
    else:
        _require_acceptance(vector, result.checks, last=max(STEPS))


@pytest.mark.parametrize("name", EVIDENCE)
def test_vector(name: str) -> None:
    vector = EVIDENCE[name]
    assert vector.policy is not None
    assert vector.nonce is not None
    policy = AppraisalPolicy.load(FOLDER / vector.policy)
    assert policy.anchor.der == (FOLDER / vector.anchor).read_bytes()
    try:
        result = verify(vector.payload, policy=policy, nonce=vector.nonce, at=vector.time)
    except (EvidenceError, AppraisalError) as error:
        _require_refusal(vector, error, last=max(STEPS))
    else:
        _require_acceptance(vector, result.checks, last=max(STEPS))


@pytest.mark.parametrize("name", [name for name, vector in DOCUMENTS.items() if vector.expect != ACCEPTED])
def test_a_refused_document_is_refused_in_evidence(name: str) -> None:
    """By ``verify`` too, at the same step with the same code; where the policy's anchor and leeway leave it bad."""
    vector = DOCUMENTS[name]
    if vector.anchor != "root.der" or vector.time != forge.NOW or len(vector.payload) > 16_384:
        return
    policy = AppraisalPolicy.load(FOLDER / "policy.toml")
    with pytest.raises(EvidenceError) as caught:
        verify(forge.evidence(vector.payload), policy=policy, nonce=forge.NONCE, at=vector.time)
    _require_refusal(vector, caught.value, last=max(STEPS))


def _require_acceptance(vector: Vector, checks: tuple[Check, ...], last: int) -> None:
    assert vector.expect == ACCEPTED
    assert {check.step for check in checks} == set(range(1, last + 1))
    assert {check.status for check in checks} <= {Status.PASSED, Status.IGNORED, Status.NOT_APPLICABLE}


def _require_refusal(vector: Vector, error: EvidenceError | AppraisalError, last: int) -> None:
    failed = [check for check in error.checks if check.status is Status.FAILED]
    assert error.code == vector.expect == failed[0].code
    assert failed[0].step == vector.step
    assert str(error).isprintable()
    assert {check.step for check in error.checks} == set(range(1, last + 1))
    assert [check.step for check in error.checks] == sorted(check.step for check in error.checks)
    if isinstance(error, EvidenceError):
        assert failed[0].step <= 9
        behind = [check for check in error.checks if check.step > failed[0].step]
        assert {check.status for check in behind} <= {Status.NOT_REACHED}
        before = [check for check in error.checks if check.step < failed[0].step]
        assert {check.status for check in before} <= {Status.PASSED}
    else:
        # A debug enclave has no image either, and a signer of no release breaks the rule for PCR8 as well; everything
        # else is one failure.
        others = [check.step for check in failed if check.step != vector.step]
        is_signer = vector is EVIDENCE.get("11-signer")
        assert others == ([11] if vector.step == 10 else [14] if is_signer else [])
        assert len(failed) == 1 + len(others)
        assert failed[0].expected is not None
        assert failed[0].got is not None


def test_every_step_and_every_code_has_a_vector() -> None:
    table = (REPOSITORY / "PROTOCOL.md").read_text().partition("\n## 3.")[2].partition("\n## 4.")[0]
    listed = {
        (int(step), code)
        for step, codes in re.findall(r"^\| (\d+) \|.*\| ([^|]+) \|$", table, re.MULTILINE)
        for code in re.findall(r"`(\w+)`", codes)
        if int(step) in STEPS  # those of KMS keys are about what KMS says: tests/attestation/test_keyrelease.py
    }
    assert {step for step, _ in listed} == set(STEPS)
    shown = {(vector.step, vector.expect) for vector in VECTORS.values() if vector.expect != ACCEPTED}
    # An emulated anchor forgives randomness of the host's, and AWS signs no vectors; nor does one carry a history.
    not_shown = {(15, "host_entropy"), (11, "expired_release"), (11, "unissued_release")}
    assert shown == listed - not_shown


def test_the_vectors_are_those_that_the_script_makes() -> None:
    assert {path.name: path.read_bytes() for path in FOLDER.iterdir()} == dict(vectors_evidence.files())
