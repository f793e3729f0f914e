"""The verdict: one way to it, one way out of it, and nothing that looks like it."""

from __future__ import annotations

import copy
import itertools
import json
import pickle
from collections.abc import Mapping
from dataclasses import replace
from datetime import UTC, datetime, timedelta, timezone
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from mypy import api as mypy

from attestation import chain
from attestation.anchors import AWS_NITRO_G1
from attestation.chain import Anchor, Trust
from attestation.checks import STEPS, Label, Status
from attestation.commitment import Entropy
from attestation.errors import AppraisalError, EvidenceError
from attestation.policy import AppraisalPolicy
from attestation.reference import ZERO_PCR, once_extended
from attestation.rules import DocumentBinding, Ignore, NameRule, RegisterRule, Require
from attestation.verifier import (
    AttestationResult,
    AuthenticDocument,
    authenticate,
    verify,
    verify_archived,
    verify_document,
)
from tests.pki import forge

REPOSITORY = Path(__file__).resolve().parents[2]


def _verify(policy: AppraisalPolicy, evidence: bytes | None = None, at: datetime = forge.NOW) -> AttestationResult:
    return verify(forge.evidence() if evidence is None else evidence, policy=policy, nonce=forge.NONCE, at=at)


def _evidence(**changes: Any) -> bytes:
    return forge.evidence(forge.document(forge.payload_fields(None, forge.GOOD_CHAIN, **changes)))


# --- what a result says -----------------------------------------------------------------------------------------------


def test_a_result_says_what_was_proven(policy: AppraisalPolicy) -> None:
    result = _verify(policy)
    assert result.commitment == forge.COMMITMENT
    assert result.claims.module_id == "i-0123456789abcdef0-enc0123456789abcdef"
    assert result.claims.timestamp == forge.NOW
    assert result.claims.pcrs == forge.PCRS
    assert result.release == "one"
    assert result.labels == {Label.EMULATED}
    ignored = [check for check in result.checks if check.status is Status.IGNORED]
    assert [(check.name, check.explanation) for check in ignored] == [("module id", "it changes at every start")]


def test_a_report_can_be_read_by_a_program(policy: AppraisalPolicy) -> None:
    report = json.loads(json.dumps(_verify(policy).as_json()))
    assert report["verdict"] == "accepted"
    assert report["labels"] == ["EMULATED"]
    assert report["model"] == f"sha384:{forge.COMMITMENT.model.hex()}"
    assert report["purpose"] == "channel"
    assert report["anchor"] == {"trust": "EMULATED", "sha256": policy.anchor.fingerprint}
    assert report["at"] == forge.NOW.isoformat()
    assert report["pcrs"]["0"] == forge.PCRS[0].hex()
    assert {check["step"] for check in report["checks"]} == set(STEPS)
    assert {check["status"] for check in report["checks"]} == {"passed", "ignored"}


@pytest.mark.parametrize(
    ("age", "lifetime", "valid"),
    [
        pytest.param(0, 600, 300, id="the maximum age ends it"),
        pytest.param(100, 600, 200, id="the document was old already"),
        pytest.param(0, 60, 60, id="the lifetime ends it"),
        pytest.param(-60, 600, 300, id="the client's clock is slow"),
        pytest.param(300, 600, 0, id="at the maximum age"),
        pytest.param(420, 600, 0, id="accepted by the leeway alone"),
    ],
)
def test_for_how_long(policy: AppraisalPolicy, age: int, lifetime: int, valid: float) -> None:
    commitment = replace(forge.COMMITMENT, lifetime=lifetime).encode()
    evidence = forge.evidence(forge.document(forge.payload_fields(commitment)), commitment)
    assert _verify(policy, evidence, forge.NOW + timedelta(seconds=age)).valid_seconds == valid


def test_time_zones_do_not_matter_but_must_be_there(policy: AppraisalPolicy) -> None:
    elsewhere = forge.NOW.astimezone(timezone(timedelta(hours=-7)))
    assert _verify(policy, at=elsewhere).valid_seconds == 300
    for naive in (forge.NOW.replace(tzinfo=None), datetime(2026, 3, 1, 12)):
        with pytest.raises(ValueError, match="time zone"):
            _verify(policy, at=naive)
        with pytest.raises(ValueError, match="time zone"):
            authenticate(forge.document(), anchor=policy.anchor, at=naive)


@pytest.mark.parametrize("size", [0, 16, 31, 33])
def test_the_nonce_has_one_size(policy: AppraisalPolicy, size: int) -> None:
    evidence = _evidence(nonce=bytes(size) or None)
    with pytest.raises(ValueError, match="nonce"):
        verify(evidence, policy=policy, nonce=bytes(size), at=forge.NOW)


# --- a forged root, under every combination of what a policy can say --------------------------------------------------


@pytest.mark.parametrize("copied_root", [False, True], ids=["own root", "copied root"])
def test_a_forged_root_fails_under_every_policy(policy: AppraisalPolicy, copied_root: bool) -> None:
    forged = forge.chain(root=replace(forge.ROOT, key="a forger"))
    if copied_root:
        forged = replace(forged, cabundle=(forge.ROOT_DER, *forged.cabundle[1:]))
    evidences = [
        forge.evidence(forge.document(forge.payload_fields(chain=forged, pcrs=pcrs), key=forged.key))
        for pcrs in (forge.PCRS, forge.DEBUG_PCRS)
    ]
    anything = Ignore("a test")
    no_rules: Mapping[int, RegisterRule] = dict.fromkeys(set(range(3, 32)) - {16, 17}, anything)
    modules: tuple[NameRule, ...] = (anything, Require(("another",)))
    combinations = itertools.product(
        (policy.anchor, AWS_NITRO_G1),
        (0, 600),
        (None, "a test"),
        (policy.model, anything),
        (policy.configuration, anything),
        (policy.pcrs, no_rules),
        modules,
    )
    for anchor, leeway, debug, model, configuration, pcrs, module_id in combinations:
        lenient = replace(
            policy,
            anchor=anchor,
            leeway_seconds=leeway,
            accept_debug=debug,
            model=model,
            configuration=configuration,
            pcrs=pcrs,
            module_id=module_id,
        )
        for evidence in evidences:
            with pytest.raises(EvidenceError) as caught:
                _verify(lenient, evidence)
            assert caught.value.code == "untrusted_chain"


# --- appraisal: everything is judged, everything is listed ------------------------------------------------------------


def test_every_failure_is_listed(policy: AppraisalPolicy) -> None:
    commitment = replace(forge.COMMITMENT, model=bytes(48), configuration=bytes(48))
    encoded = commitment.encode()
    pcrs = {
        **forge.DEBUG_PCRS,
        3: forge.measured("a role"),
        9: forge.measured("more"),
        16: once_extended(commitment.model),
        17: once_extended(commitment.configuration),
    }
    evidence = forge.evidence(forge.document(forge.payload_fields(encoded, pcrs=pcrs)), encoded)
    strict = replace(policy, module_id=Require(("i-another",)))
    with pytest.raises(AppraisalError) as caught:
        _verify(strict, evidence)
    error = caught.value
    failed = [(check.step, check.name, check.code) for check in error.checks if check.status is Status.FAILED]
    assert failed == [
        (10, "debug mode", "debug_mode"),
        (11, "image", "wrong_image"),
        (12, "model", "wrong_model"),
        (13, "configuration", "wrong_configuration"),
        (14, "PCR3", "wrong_pcr"),
        (14, "other PCRs", "wrong_pcr"),
        (14, "module id", "wrong_module"),
    ]
    assert error.code == "debug_mode"
    assert all(check.explanation for check in error.checks if check.status is Status.FAILED)
    assert Status.NOT_REACHED not in {check.status for check in error.checks}


def test_an_accepted_debug_mode_is_said_everywhere(policy: AppraisalPolicy) -> None:
    result = _verify(replace(policy, accept_debug="to read its console"), _evidence(pcrs=forge.DEBUG_PCRS))
    assert result.labels == {Label.EMULATED, Label.DEBUG}
    assert result.release is None
    ignored = {check.step: check.explanation for check in result.checks if check.status is Status.IGNORED}
    assert ignored[10] == ignored[11] == "to read its console"


def test_accepting_debug_mode_changes_nothing_for_a_measured_image(policy: AppraisalPolicy) -> None:
    lenient = replace(policy, accept_debug="to read its console")
    assert _verify(lenient).labels == {Label.EMULATED}
    assert _verify(lenient).release == "one"
    with pytest.raises(AppraisalError) as caught:
        _verify(lenient, _evidence(pcrs={**forge.PCRS, 2: forge.measured("a changed file")}))
    assert caught.value.code == "wrong_image"


def test_what_is_ignored_says_why(policy: AppraisalPolicy) -> None:
    reason = Ignore("not known yet")
    lenient = replace(policy, model=reason, configuration=reason, pcrs={**policy.pcrs, 4: reason})
    evidence = _evidence(pcrs={**forge.PCRS, 4: forge.measured("anywhere")})
    ignored = {check.name for check in _verify(lenient, evidence).checks if check.explanation == reason.reason}
    assert ignored == {"model", "configuration", "PCR4"}


def test_a_module_can_be_named(policy: AppraisalPolicy) -> None:
    named = replace(policy, module_id=Require(("another", "i-0123456789abcdef0-enc0123456789abcdef")))
    assert _verify(named).release == "one"


def test_a_register_that_is_absent_is_not_a_required_zero(policy: AppraisalPolicy) -> None:
    """A register that was never locked is in no document: nobody vouches for its being zero."""
    rules = {**policy.pcrs, 20: Require((ZERO_PCR,))}
    with pytest.raises(AppraisalError) as caught:
        _verify(replace(policy, pcrs=rules))
    assert (caught.value.code, caught.value.got) == ("wrong_pcr", "absent")
    _verify(replace(policy, pcrs=rules), _evidence(pcrs={**forge.PCRS, 20: ZERO_PCR}))


# --- the anchor's name ------------------------------------------------------------------------------------------------


@pytest.fixture
def hardware_policy(policy: AppraisalPolicy, monkeypatch: pytest.MonkeyPatch) -> AppraisalPolicy:
    """The test PKI in the place of AWS's: which no policy can name, for Anchor knows AWS's root by its fingerprint."""
    monkeypatch.setattr(chain, "AWS_NITRO_G1_SHA256", policy.anchor.fingerprint)
    return replace(policy, anchor=Anchor(Trust.AWS_NITRO_G1, forge.ROOT_DER))


def test_the_hosts_entropy_is_refused_unless_emulated(hardware_policy: AppraisalPolicy) -> None:
    with pytest.raises(AppraisalError) as caught:
        _verify(hardware_policy)
    assert caught.value.code == "host_entropy"
    assert [check.step for check in caught.value.checks if check.status is Status.FAILED] == [15]


@pytest.mark.parametrize("emulated", [False, True])
def test_the_hardwares_entropy_is_good_everywhere(
    policy: AppraisalPolicy, hardware_policy: AppraisalPolicy, emulated: bool
) -> None:
    commitment = replace(forge.COMMITMENT, entropy=Entropy.NSM_HWRNG).encode()
    evidence = forge.evidence(forge.document(forge.payload_fields(commitment)), commitment)
    result = _verify(policy if emulated else hardware_policy, evidence)
    assert result.labels == ({Label.EMULATED} if emulated else set())


# --- authenticate -----------------------------------------------------------------------------------------------------


def test_an_authentic_document_is_no_verdict(policy: AppraisalPolicy) -> None:
    document = forge.document(forge.payload_fields(pcrs=forge.DEBUG_PCRS, nonce=None, user_data=None))
    authentic = authenticate(document, anchor=policy.anchor, at=forge.NOW + timedelta(hours=2))
    assert authentic.claims.pcrs == forge.DEBUG_PCRS
    assert authentic.labels == {Label.EMULATED, Label.DEBUG}
    assert [check.step for check in authentic.checks] == [1, 2, 3, 4, 5]


@pytest.mark.parametrize("field", ["nonce", "user_data", "public_key"])
@pytest.mark.parametrize("size", [0, 1, 512, 513, 746, 1024])
def test_optional_fields_up_to_their_bound(policy: AppraisalPolicy, field: str, size: int) -> None:
    changes: dict[str, Any] = {field: bytes(size)}
    document = forge.document(forge.payload_fields(None, forge.GOOD_CHAIN, **changes))
    claims = authenticate(document, anchor=policy.anchor, at=forge.NOW).claims
    assert getattr(claims, field) == bytes(size)


def test_a_document_is_bounded_before_it_is_read(policy: AppraisalPolicy) -> None:
    with pytest.raises(EvidenceError) as caught:
        authenticate(bytes(16_385), anchor=policy.anchor, at=forge.NOW)
    assert (caught.value.code, caught.value.got) == ("malformed_cbor", "16385 bytes")
    assert [check.status for check in caught.value.checks] == [Status.FAILED, *[Status.NOT_REACHED] * 4]


def test_archives_have_no_leeway(policy: AppraisalPolicy) -> None:
    with pytest.raises(EvidenceError):
        authenticate(forge.document(), anchor=policy.anchor, at=forge.NOW - timedelta(seconds=4))
    authenticate(forge.document(), anchor=policy.anchor, at=forge.NOW - timedelta(seconds=3))


# --- only the verifier makes results ----------------------------------------------------------------------------------


def test_a_result_cannot_be_constructed_elsewhere(policy: AppraisalPolicy) -> None:
    result = _verify(policy)
    fields: dict[str, Any] = {
        name: getattr(result, name) for name in AttestationResult.__dataclass_fields__ if name != "proof"
    }
    for proof in ({}, {"proof": None}, {"proof": object()}):
        with pytest.raises(TypeError):
            AttestationResult(**fields, **proof)
    with pytest.raises(TypeError):
        AuthenticDocument(result.claims, result.anchor, result.at, frozenset(), (), proof=object())  # type: ignore[arg-type]


def test_a_result_cannot_be_copied_into_another(policy: AppraisalPolicy) -> None:
    result = _verify(policy)
    with pytest.raises((TypeError, ValueError)):
        replace(result, release="another")  # type: ignore[call-arg]
    for copying in (copy.copy, copy.deepcopy, pickle.dumps):
        with pytest.raises(TypeError, match="does not travel"):
            copying(result)
    with pytest.raises(AttributeError):
        result.release = "another"  # type: ignore[misc]


def test_a_result_constructed_elsewhere_does_not_type_check(tmp_path: Path) -> None:
    def complaints(body: str) -> str:
        snippet = tmp_path / f"snippet_{len(list(tmp_path.iterdir()))}.py"  # mypy remembers files by name and size
        snippet.write_text(
            "from attestation.verifier import ArchivedResult, AttestationResult, AuthenticDocument, DocumentResult\n"
            "def open_channel(result: AttestationResult) -> None: ...\n"
            "def use(genuine: AttestationResult, authentic: AuthenticDocument, archived: ArchivedResult,\n"
            f"        document: DocumentResult) -> None:\n    {body}\n"
        )
        options = ["--strict", "--follow-imports=silent", "--cache-dir", str(REPOSITORY / ".mypy_cache" / "snippets")]
        out, _, _ = mypy.run([*options, "--config-file", str(REPOSITORY / "pyproject.toml"), str(snippet)])
        return out

    made = (
        "open_channel(AttestationResult(claims=genuine.claims, commitment=genuine.commitment, release='x', "
        "labels=frozenset(), checks=(), valid_seconds=1.0{}))"
    )
    assert "Success" in complaints("open_channel(genuine)")
    assert 'Missing named argument "proof"' in complaints(made.format(""))
    assert 'Argument "proof" to "AttestationResult" has incompatible type' in complaints(made.format(", proof=None"))
    assert 'incompatible type "AuthenticDocument"' in complaints("open_channel(authentic)")
    assert 'incompatible type "ArchivedResult"' in complaints("open_channel(archived)")
    assert 'incompatible type "DocumentResult"' in complaints("open_channel(document)")


# --- whatever comes in ------------------------------------------------------------------------------------------------


@given(st.binary(max_size=300))
def test_any_bytes_give_the_typed_error(policy: AppraisalPolicy, data: bytes) -> None:
    for evidence in (data, forge.evidence(data), forge.evidence(commitment=data or b"\x00")):
        with pytest.raises(EvidenceError):
            _verify(policy, evidence)
    with pytest.raises(EvidenceError):
        authenticate(data, anchor=policy.anchor, at=forge.NOW)


@settings(max_examples=300)
@given(data=st.data())
def test_mutated_evidence_never_verifies(policy: AppraisalPolicy, data: st.DataObject) -> None:
    evidence = bytearray(forge.evidence())
    for _ in range(data.draw(st.integers(1, 3))):
        evidence[data.draw(st.integers(0, len(evidence) - 1))] ^= data.draw(st.integers(1, 255))
    if bytes(evidence) == forge.evidence():
        return
    with pytest.raises(EvidenceError) as caught:
        _verify(policy, bytes(evidence))
    assert [check.step for check in caught.value.checks] == list(STEPS)


@given(
    pcrs=st.dictionaries(st.integers(0, 31), st.sampled_from([ZERO_PCR, *forge.PCRS.values()]), min_size=1),
    module_id=st.sampled_from(["a", "i-0123456789abcdef0-enc0123456789abcdef"]),
)
def test_genuine_documents_of_anything_give_a_result_or_a_typed_error(
    policy: AppraisalPolicy, pcrs: dict[int, bytes], module_id: str
) -> None:
    try:
        result = _verify(policy, _evidence(pcrs=pcrs, module_id=module_id))
    except (EvidenceError, AppraisalError):
        return
    assert result.claims.pcrs == {**forge.PCRS, **dict.fromkeys(pcrs.keys() - forge.PCRS.keys(), ZERO_PCR)} | pcrs


def test_the_real_clock_is_not_asked(policy: AppraisalPolicy) -> None:
    """Time is the caller's: a document of 2026 is as good as ever at its own time."""
    assert forge.NOW.tzinfo is UTC
    assert _verify(policy).valid_seconds == 300


# --- the signer, where no release was matched -------------------------------------------------------------------------


def test_a_signer_is_shown_with_a_refused_image_and_judged_without_one(policy: AppraisalPolicy) -> None:
    signed = replace(
        policy,
        releases=policy.accepted_releases[1:],
        pcrs={index: rule for index, rule in policy.pcrs.items() if index != 8},
    )

    def failures(by: AppraisalPolicy, **changes: Any) -> list[tuple[int, str]]:
        with pytest.raises(AppraisalError) as caught:
            _verify(by, _evidence(**changes))
        return [(check.step, check.name) for check in caught.value.checks if check.status is Status.FAILED]

    signer = {8: forge.measured("a signer")}
    assert failures(signed, pcrs={**forge.PCRS, **signer}) == [(11, "image")]
    assert failures(policy, pcrs={**forge.PCRS, 1: forge.measured("x"), **signer}) == [(11, "image"), (14, "PCR8")]
    accepting = replace(signed, accept_debug="a test")
    assert failures(accepting, pcrs={**forge.DEBUG_PCRS, **signer}) == [(14, "other PCRs")]


def test_a_cache_is_used(policy: AppraisalPolicy, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[object] = []
    validate = chain.validate

    def seeing(*arguments: Any, **options: Any) -> Any:
        seen.append(options["cache"])
        return validate(*arguments, **options)

    monkeypatch.setattr(chain, "validate", seeing)
    cache = chain.ChainCache()
    document = replace(policy, binding=DocumentBinding(Ignore("a test"), Ignore("a test")))
    verify(forge.evidence(), policy=policy, nonce=forge.NONCE, at=forge.NOW, cache=cache)
    verify_document(forge.document(), policy=document, nonce=forge.NONCE, at=forge.NOW, cache=cache)
    verify_archived(forge.evidence(), policy=policy, cache=cache)
    authenticate(forge.document(), anchor=policy.anchor, at=forge.NOW, cache=cache)
    assert seen == [cache] * 4
