"""Verdicts that open no channel: on bare documents, and on what is archived."""

from __future__ import annotations

import json
from dataclasses import replace
from datetime import datetime, timedelta, timezone
from typing import Any

import pytest

from attestation.checks import STEPS, Label, Status
from attestation.errors import AppraisalError, EvidenceError, PolicyError
from attestation.manifest import ManifestFile, ModelManifest
from attestation.policy import AppraisalPolicy
from attestation.reference import once_extended
from attestation.rules import (
    ChannelBinding,
    DocumentBinding,
    FieldRule,
    Forbid,
    Ignore,
    Manifests,
    Measures,
    ModelRule,
    Released,
    Require,
)
from attestation.verifier import (
    ArchivedResult,
    AttestationResult,
    DocumentResult,
    verify,
    verify_archived,
    verify_document,
)
from tests.pki import forge

LATER = forge.NOW + timedelta(days=2000)


@pytest.fixture
def document_policy(policy: AppraisalPolicy) -> AppraisalPolicy:
    return replace(policy, binding=DocumentBinding(Forbid(), Ignore("a test")))


def _document(**changes: Any) -> bytes:
    return forge.document(forge.payload_fields(None, forge.GOOD_CHAIN, **changes))


def _verify(
    policy: AppraisalPolicy, document: bytes | None = None, nonce: bytes = forge.NONCE, at: datetime = forge.NOW
) -> DocumentResult:
    return verify_document(_document() if document is None else document, policy=policy, nonce=nonce, at=at)


def _failures(caught: pytest.ExceptionInfo[AppraisalError]) -> list[tuple[int, str, str | None]]:
    return [(check.step, check.name, check.code) for check in caught.value.checks if check.status is Status.FAILED]


# --- bare documents ---------------------------------------------------------------------------------------------------


def test_a_document_is_judged_without_a_channel(document_policy: AppraisalPolicy) -> None:
    result = _verify(document_policy)
    assert (result.release, result.valid_seconds) == ("one", 300)
    assert result.labels == {Label.EMULATED}
    assert {check.step for check in result.checks} == set(STEPS)
    assert [check.step for check in result.checks] == sorted(check.step for check in result.checks)
    beside = [check.step for check in result.checks if check.status is Status.NOT_APPLICABLE]
    assert beside == [8, 9, 15]
    report = json.loads(json.dumps(result.as_json()))
    assert (report["verdict"], report["public_key"]) == ("accepted", None)
    assert report["user_data"] == forge.payload_fields()["user_data"].hex()  # type: ignore[attr-defined]
    assert "key_id" not in report


@pytest.mark.parametrize("at", [300, 420])
def test_a_document_grows_old(document_policy: AppraisalPolicy, at: int) -> None:
    assert _verify(document_policy, at=forge.NOW + timedelta(seconds=at)).valid_seconds == 0
    with pytest.raises(EvidenceError) as caught:
        _verify(document_policy, at=forge.NOW + timedelta(seconds=421))
    assert caught.value.code == "stale"


@pytest.mark.parametrize("size", [0, 15, 1025])
def test_a_nonce_is_never_optional(document_policy: AppraisalPolicy, size: int) -> None:
    with pytest.raises(ValueError, match="nonce"):
        _verify(document_policy, _document(nonce=bytes(size)), bytes(size))
    with pytest.raises(EvidenceError) as caught:
        _verify(document_policy, _document(nonce=None))
    assert caught.value.code == "wrong_nonce"


@pytest.mark.parametrize("size", [16, 512, 1024])
def test_a_document_answers_nonces_of_other_sizes(document_policy: AppraisalPolicy, size: int) -> None:
    assert _verify(document_policy, _document(nonce=bytes(size)), bytes(size)).claims.nonce == bytes(size)


@pytest.mark.parametrize(
    ("rule", "value", "accepted"),
    [
        (Require((b"one", b"two")), b"two", True),
        (Require((b"one",)), b"two", False),
        (Require((b"one",)), None, False),
        (Forbid(), None, True),
        (Forbid(), b"", False),
        (Forbid(), b"one", False),
        (Ignore("a test"), b"one", True),
        (Ignore("a test"), None, True),
    ],
    ids=str,
)
@pytest.mark.parametrize("field", ["public_key", "user_data"])
def test_what_a_document_carries(
    policy: AppraisalPolicy, field: str, rule: FieldRule, value: bytes | None, accepted: bool
) -> None:
    other = "user_data" if field == "public_key" else "public_key"
    rules: dict[str, FieldRule] = {field: rule, other: Ignore("a test")}
    judged = replace(policy, binding=DocumentBinding(**rules))
    document = _document(**{field: value})
    if accepted:
        assert getattr(_verify(judged, document).claims, field) == value
        return
    with pytest.raises(AppraisalError) as caught:
        _verify(judged, document)
    assert _failures(caught) == [(14, field.replace("_", " "), f"wrong_{field}")]


def test_every_failure_of_a_document_is_listed(document_policy: AppraisalPolicy) -> None:
    pcrs = {**forge.DEBUG_PCRS, 9: forge.measured("more")}
    strict = replace(document_policy, module_id=Require(("i-another",)))
    document = _document(pcrs={**pcrs, 16: bytes(48), 17: bytes(48)}, public_key=b"key")
    with pytest.raises(AppraisalError) as caught:
        _verify(strict, document)
    assert _failures(caught) == [
        (10, "debug mode", "debug_mode"),
        (11, "image", "wrong_image"),
        (12, "model", "wrong_model"),
        (13, "configuration", "wrong_configuration"),
        (14, "other PCRs", "wrong_pcr"),
        (14, "module id", "wrong_module"),
        (14, "public key", "wrong_public_key"),
    ]


def test_registers_that_no_commitment_explains(document_policy: AppraisalPolicy) -> None:
    """A bare document of somebody else's enclave has no PCR16 and 17: a policy may say so, and must say why."""
    pcrs = {index: value for index, value in forge.PCRS.items() if index < 16}
    with pytest.raises(AppraisalError) as caught:
        _verify(document_policy, _document(pcrs=pcrs))
    assert [check.got for check in caught.value.checks if check.step in (12, 13)] == ["register absent"] * 2
    lenient = replace(document_policy, model=Ignore("no model"), configuration=Ignore("no configuration"))
    ignored = [check for check in _verify(lenient, _document(pcrs=pcrs)).checks if check.step in (12, 13)]
    assert [(check.status, check.explanation) for check in ignored] == [
        (Status.IGNORED, "no model"),
        (Status.IGNORED, "no configuration"),
    ]


@pytest.mark.parametrize(
    "at",
    [
        datetime.max.replace(tzinfo=timezone(timedelta(hours=-14))),
        datetime.min.replace(tzinfo=timezone(timedelta(hours=14))),
    ],
    ids=["last", "first"],
)
def test_a_time_of_no_calendar_is_a_mistake(policy: AppraisalPolicy, at: datetime) -> None:
    with pytest.raises(ValueError, match="calendar"):
        verify(forge.evidence(), policy=policy, nonce=forge.NONCE, at=at)


def test_a_policy_judges_what_it_is_for(policy: AppraisalPolicy, document_policy: AppraisalPolicy) -> None:
    with pytest.raises(PolicyError) as caught:
        _verify(policy)
    assert (caught.value.code, caught.value.expected, caught.value.got) == ("wrong_purpose", "document", "channel")
    with pytest.raises(PolicyError) as caught:
        verify(forge.evidence(), policy=document_policy, nonce=forge.NONCE, at=forge.NOW)
    assert (caught.value.code, caught.value.expected, caught.value.got) == ("wrong_purpose", "channel", "document")


# --- archives ---------------------------------------------------------------------------------------------------------


def test_archived_evidence_says_so(policy: AppraisalPolicy) -> None:
    result = verify_archived(forge.evidence(), policy=policy)
    assert result.labels == {Label.ARCHIVED, Label.EMULATED}
    assert result.commitment == forge.COMMITMENT
    ignored = {check.step: check.explanation for check in result.checks if check.status is Status.IGNORED}
    assert set(ignored) == {6, 7, 14}
    assert ignored[6] == ignored[7] == "archived: judged at the document's own time"
    report = json.loads(json.dumps(result.as_json()))
    assert report["verdict"] == "accepted_when_made"
    assert report["labels"] == ["ARCHIVED", "EMULATED"]
    assert report["key_id"] == forge.COMMITMENT.key_id.hex()
    assert "valid_seconds" not in report


def test_an_archived_document_says_so(document_policy: AppraisalPolicy) -> None:
    result = verify_archived(_document(), policy=document_policy)
    assert result.labels == {Label.ARCHIVED, Label.EMULATED}
    assert result.commitment is None
    assert "user_data" in result.as_json()


def test_an_archive_is_not_live(policy: AppraisalPolicy) -> None:
    with pytest.raises(EvidenceError):
        verify(forge.evidence(), policy=policy, nonce=forge.NONCE, at=LATER)
    assert isinstance(verify_archived(forge.evidence(), policy=policy), ArchivedResult)


def test_an_archives_nonce_is_judged_when_it_is_known(policy: AppraisalPolicy) -> None:
    result = verify_archived(forge.evidence(), policy=policy, nonce=forge.NONCE)
    assert [check.status for check in result.checks if check.step == 6] == [Status.PASSED]
    with pytest.raises(EvidenceError) as caught:
        verify_archived(forge.evidence(), policy=policy, nonce=bytes(32))
    assert caught.value.code == "wrong_nonce"


@pytest.mark.parametrize(
    "make",
    [
        lambda: forge.evidence(forge.document(forge.payload_fields(timestamp=int(LATER.timestamp() * 1000)))),
        lambda: forge.evidence(forge.document(signature=bytes(96))),
        lambda: forge.evidence(commitment=replace(forge.COMMITMENT, lifetime=1).encode()),
    ],
    ids=["made after its chain had expired", "signature", "another commitment"],
)
def test_an_archive_is_proven_like_anything_else(policy: AppraisalPolicy, make: Any) -> None:
    with pytest.raises(EvidenceError):
        verify_archived(make(), policy=policy)


def test_an_archive_is_judged_like_anything_else(policy: AppraisalPolicy) -> None:
    with pytest.raises(AppraisalError) as caught:
        verify_archived(forge.evidence(_document(pcrs=forge.DEBUG_PCRS)), policy=policy)
    assert caught.value.code == "debug_mode"
    accepting = replace(policy, accept_debug="a test")
    debug = verify_archived(forge.evidence(_document(pcrs=forge.DEBUG_PCRS)), policy=accepting)
    assert debug.labels == {Label.ARCHIVED, Label.DEBUG, Label.EMULATED}
    assert debug.release is None


# --- models and configurations by release, by manifest ----------------------------------------------------------------

MANIFEST = ModelManifest("one", (ManifestFile("one.gguf", 1, bytes(48)),), "{{ template }}", version=3)


def _with_model(policy: AppraisalPolicy, rule: ModelRule, digest: bytes, release: tuple[bytes, ...] = ()) -> None:
    """Judges an enclave that runs the model of ``digest`` by ``rule``, once with a commitment and once without."""
    one = replace(policy.accepted_releases[0], models=release, configurations=(forge.COMMITMENT.configuration,))
    judged = replace(policy, releases=(one, *policy.accepted_releases[1:]), model=rule, configuration=Released())
    commitment = replace(forge.COMMITMENT, model=digest).encode()
    pcrs = {**forge.PCRS, 16: once_extended(digest)}
    document = forge.document(forge.payload_fields(commitment, pcrs=pcrs))
    for binding in (ChannelBinding(), DocumentBinding(Forbid(), Ignore("a test"))):
        bound = replace(judged, binding=binding)
        if isinstance(binding, ChannelBinding):
            verify(forge.evidence(document, commitment), policy=bound, nonce=forge.NONCE, at=forge.NOW)
        else:
            _verify(bound, document)


def test_a_release_names_its_models(policy: AppraisalPolicy) -> None:
    one, other = bytes([1] * 48), bytes([2] * 48)
    _with_model(policy, Released(), one, (other, one))
    with pytest.raises(AppraisalError) as caught:
        _with_model(policy, Released(), one, (other,))
    assert _failures(caught) == [(12, "model", "wrong_model")]


def test_without_its_release_no_model_is_known(policy: AppraisalPolicy) -> None:
    one = replace(policy.accepted_releases[0], models=(forge.COMMITMENT.model,))
    judged = replace(policy, releases=(one,), model=Released())
    document = _document(pcrs={**forge.PCRS, 0: forge.measured("another")})
    with pytest.raises(AppraisalError) as caught:
        verify(forge.evidence(document), policy=judged, nonce=forge.NONCE, at=forge.NOW)
    assert [code for _, _, code in _failures(caught)] == ["wrong_image", "wrong_model"]


@pytest.mark.parametrize(("minimum", "accepted"), [(0, True), (3, True), (4, False)])
def test_a_manifest_has_a_minimum_version(policy: AppraisalPolicy, minimum: int, accepted: bool) -> None:
    newer = replace(MANIFEST, version=4)
    rule = Manifests((("one.manifest", MANIFEST), ("newer.manifest", newer)), minimum)
    _with_model(policy, rule, newer.digest())
    if accepted:
        _with_model(policy, rule, MANIFEST.digest())
        return
    with pytest.raises(AppraisalError) as caught:
        _with_model(policy, rule, MANIFEST.digest())
    assert caught.value.expected == f"newer.manifest version 4 (sha384:{newer.digest().hex()})"


def test_a_register_that_measures_a_text(policy: AppraisalPolicy) -> None:
    judged = replace(policy, pcrs={**policy.pcrs, 4: Measures(("i-another", "i-0123456789abcdef0"))})
    assert isinstance(verify(forge.evidence(), policy=judged, nonce=forge.NONCE, at=forge.NOW), AttestationResult)
    with pytest.raises(AppraisalError) as caught:
        other = replace(policy, pcrs={**policy.pcrs, 4: Measures(("i-another",))})
        verify(forge.evidence(), policy=other, nonce=forge.NONCE, at=forge.NOW)
    assert _failures(caught) == [(14, "PCR4", "wrong_pcr")]


def test_none_of_them_is_made_elsewhere(policy: AppraisalPolicy, document_policy: AppraisalPolicy) -> None:
    archived, document = verify_archived(forge.evidence(), policy=policy), _verify(document_policy)
    for result in (archived, document):
        fields = {name: getattr(result, name) for name in type(result).__dataclass_fields__ if name != "proof"}
        for proof in ({}, {"proof": None}, {"proof": object()}):
            with pytest.raises(TypeError):
                type(result)(**fields, **proof)
