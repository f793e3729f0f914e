"""The verifier: Evidence and a policy in, one verdict out.

The checklist is that of PROTOCOL.md section 3; the numbers beside the code are its numbers. Each function returns a
result or raises; nothing here returns a boolean, and nothing but this module can make a result. What a result opens is
decided by its type: a channel takes an :class:`AttestationResult`, and no other.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import KW_ONLY, InitVar, dataclass
from datetime import UTC, datetime, timedelta
from types import MappingProxyType
from typing import NoReturn, final

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.utils import encode_dss_signature
from cryptography.hazmat.primitives.hashes import SHA384

from attestation import cbor, chain
from attestation.appraisal import appraise, field_text, is_debug, registers_text
from attestation.chain import Anchor, ChainCache
from attestation.checklist import Checklist, Finding
from attestation.checks import KEY_STEPS, STEPS, Check, Label, Status
from attestation.commitment import MAX_DOCUMENT, MAX_EVIDENCE, Commitment, Evidence, Purpose, UserData
from attestation.cose import COSE_SIGN1_TAG, SIGNATURE_SIZE, CoseSign1, payload_of
from attestation.document import MAX_FIELD, AttestationDocument
from attestation.errors import EvidenceError, PolicyError
from attestation.keypolicy.document import KeyArn
from attestation.keyrelease import KeyFacts, require_facts
from attestation.policy import AppraisalPolicy
from attestation.reference import PCR_CONFIGURATION, PCR_MODEL, digest_text, once_extended
from attestation.rules import Binding, ChannelBinding, DocumentBinding, Release

NONCE_SIZE = 32
"""Bytes that a client draws for each request."""

MIN_NONCE = 16
"""Bytes: the shortest nonce that a bare document is asked with. A shorter one might be met again."""


AUTHENTICATION = {step: name for step, name in STEPS.items() if step <= 5}
"""The steps of a document that nobody judges."""
NO_KEYS: Mapping[KeyArn, KeyFacts] = MappingProxyType({})


class _Proof:
    """The right to construct a result."""


_PROVEN = _Proof()


@dataclass(frozen=True, slots=True)
class _Proven:
    """What only this module constructs, and what neither copying nor unpickling can make."""

    claims: AttestationDocument
    """What the document says."""
    anchor: Anchor
    """Whose word it is."""
    at: datetime
    """The verification time, UTC: what it is as of."""
    labels: frozenset[Label]
    """What must be said wherever this is shown."""
    checks: tuple[Check, ...]
    """Every step that was taken, in order; none has failed."""
    _: KW_ONLY
    proof: InitVar[_Proof]

    def __post_init__(self, proof: _Proof) -> None:
        if proof is not _PROVEN:
            raise TypeError("only the verifier constructs a result")

    def __reduce_ex__(self, protocol: object, /) -> NoReturn:
        raise TypeError(f"an {type(self).__name__} does not travel; verify again")


@final
@dataclass(frozen=True, slots=True)
class AuthenticDocument(_Proven):
    """A document that the anchor vouches for (steps 1 to 5). No verdict: it may be old, replayed, or of anything."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Appraised(_Proven):
    """What every verdict says."""

    release: str | None
    """The policy's name for the image. None under an accepted debug mode, where no image is measured."""

    def as_json(self) -> dict[str, object]:
        """For programs: digests in hexadecimal, times as RFC 3339, seconds as numbers."""
        return {
            "verdict": "accepted",
            "labels": sorted(self.labels),
            "anchor": {"trust": self.anchor.trust.value, "sha256": self.anchor.fingerprint},
            "at": self.at.isoformat(),
            "release": self.release,
            "module_id": self.claims.module_id,
            "timestamp": self.claims.timestamp.isoformat(),
            "pcrs": {str(index): value.hex() for index, value in sorted(self.claims.pcrs.items())},
            "checks": [check.as_json() for check in self.checks],
        }


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class AttestationResult(_Appraised):
    """The verdict that a channel may be opened: all fifteen steps hold, and those of every KMS key that the policy
    names, or are ignored by the policy's own words.
    """

    commitment: Commitment
    """The channel's keys, and what the enclave behind them runs."""
    valid_seconds: float
    """For how long, on the client's monotonic clock, counted from the moment of the request. It may be 0."""

    def as_json(self) -> dict[str, object]:
        said = _Appraised.as_json(self)
        return {**said, **_committed(self.commitment), "valid_seconds": self.valid_seconds}


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class DocumentResult(_Appraised):
    """The verdict on a bare document: fresh, and what the policy accepts. It opens no channel."""

    valid_seconds: float
    """For how long, counted as in :class:`AttestationResult`: until the document is too old. It may be 0."""

    def as_json(self) -> dict[str, object]:
        said = _Appraised.as_json(self)
        return {**said, **_carried(self.claims), "valid_seconds": self.valid_seconds}


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class ArchivedResult(_Appraised):
    """The verdict that Evidence or a document was acceptable when it was made. It says nothing about now, and opens
    nothing.
    """

    commitment: Commitment | None
    """None for a bare document."""

    def as_json(self) -> dict[str, object]:
        said = {**_Appraised.as_json(self), "verdict": "accepted_when_made"}
        return {**said, **(_carried(self.claims) if self.commitment is None else _committed(self.commitment))}


def authenticate(
    document: bytes, *, anchor: Anchor, at: datetime, cache: ChainCache | None = None
) -> AuthenticDocument:
    """Steps 1 to 5: what ``document`` says, and that it said so under ``anchor``, whose chain must hold at ``at``.

    For whoever judges documents by other rules than a policy's. ``at`` has a time zone, else ValueError. A ``cache``
    remembers certificates between calls, as in the functions below. Raises EvidenceError.
    """
    verification = _Verification(anchor, _utc(at), timedelta(0), cache, steps=AUTHENTICATION)
    claims = verification.prove(document)
    return AuthenticDocument(*verification.conclude(claims), proof=_PROVEN)


def verify(
    evidence: bytes,
    *,
    policy: AppraisalPolicy,
    nonce: bytes,
    at: datetime,
    cache: ChainCache | None = None,
    keys: Mapping[KeyArn, KeyFacts] = NO_KEYS,
) -> AttestationResult:
    """The verdict on the ``evidence`` that answers the request with ``nonce``, judged at ``at`` (with a time zone).

    ``keys`` is what KMS says now of each key that the policy names: they are judged in the same verdict.

    Raises EvidenceError when the Evidence proves nothing (steps 1 to 9), AppraisalError when what it proves is not what
    the policy accepts (steps 10 to 15, and 16 to 21 for each KMS key), both with the checks; PolicyError
    ``wrong_purpose`` for a policy that judges bare documents, ``key_facts_missing`` for one that names a key which is
    not in ``keys``; ValueError for a nonce that is not ``NONCE_SIZE`` bytes.
    """
    if len(nonce) != NONCE_SIZE:
        raise ValueError(f"nonce: expected {NONCE_SIZE} bytes, got {len(nonce)}")
    _require_binding(policy, ChannelBinding)
    require_facts(policy, keys)
    verification = _Verification.of(policy, at, cache)
    claims, encoded = verification.prove_evidence(evidence)
    verification.require_nonce(claims, nonce)
    age = verification.require_fresh(claims, policy)
    commitment = verification.require_commitment(claims, encoded)
    release = appraise(verification.checklist, policy, claims, commitment, verification.at, keys)
    return AttestationResult(
        *verification.conclude(claims),
        release=_name(release),
        commitment=commitment,
        valid_seconds=min(_seconds_left(policy, age, verification.at), float(commitment.lifetime)),
        proof=_PROVEN,
    )


def verify_document(
    document: bytes, *, policy: AppraisalPolicy, nonce: bytes, at: datetime, cache: ChainCache | None = None
) -> DocumentResult:
    """The verdict on a bare ``document`` of any Nitro enclave that was asked for with ``nonce``, judged at ``at``.

    ``document`` is the NSM's COSE_Sign1, as bytes. The steps about a channel's commitment are not applicable. Raises as
    :func:`verify`; PolicyError ``wrong_purpose`` for a policy that judges channels; ValueError for a nonce that is not
    ``MIN_NONCE`` to ``MAX_FIELD`` bytes.
    """
    if not MIN_NONCE <= len(nonce) <= MAX_FIELD:
        raise ValueError(f"nonce: expected {MIN_NONCE} to {MAX_FIELD} bytes, got {len(nonce)}")
    _require_binding(policy, DocumentBinding)
    verification = _Verification.of(policy, at, cache)
    claims = verification.prove(document)
    verification.require_nonce(claims, nonce)
    age = verification.require_fresh(claims, policy)
    verification.pass_by_commitment()
    release = appraise(verification.checklist, policy, claims, None, verification.at)
    return DocumentResult(
        *verification.conclude(claims),
        release=_name(release),
        valid_seconds=_seconds_left(policy, age, verification.at),
        proof=_PROVEN,
    )


def verify_archived(
    archived: bytes, *, policy: AppraisalPolicy, nonce: bytes | None = None, cache: ChainCache | None = None
) -> ArchivedResult:
    """Whether ``archived`` would have been accepted at the time that it states itself.

    Evidence under a policy for channels, a document under one for documents. Its age is not judged, and its nonce only
    if one is given: both stand as ignored. So does everything that the years since have shown: a key that leaked, a
    release that was withdrawn. Raises EvidenceError and AppraisalError as :func:`verify`.
    """
    verification = _Verification.of(policy, None, cache)
    if isinstance(policy.binding, ChannelBinding):
        claims, encoded = verification.prove_evidence(archived)
    else:
        claims, encoded = verification.prove(archived), None
    if nonce is None:
        verification.ignore(6, field_text(claims.nonce))
    else:
        verification.require_nonce(claims, nonce)
    verification.ignore(7, claims.timestamp.isoformat())
    if encoded is None:
        commitment = None
        verification.pass_by_commitment()
    else:
        commitment = verification.require_commitment(claims, encoded)
    release = appraise(verification.checklist, policy, claims, commitment, None)
    return ArchivedResult(
        *verification.conclude(claims),
        release=_name(release),
        commitment=commitment,
        proof=_PROVEN,
    )


class _Verification:
    """One walk through steps 1 to 9. Each step enters itself into the checklist, or ends the walk with its error."""

    def __init__(
        self,
        anchor: Anchor,
        at: datetime | None,
        leeway: timedelta,
        cache: ChainCache | None,
        *,
        steps: Mapping[int, str] = STEPS,
    ) -> None:
        """``at`` is None for an archived document: its own time is the verification time."""
        labels = {Label.EMULATED: anchor.is_emulated, Label.ARCHIVED: at is None}
        self.checklist = Checklist(steps, *(label for label, holds in labels.items() if holds))
        self._anchor = anchor
        self._at = at
        self._leeway = leeway
        self._cache = cache

    @classmethod
    def of(cls, policy: AppraisalPolicy, at: datetime | None, cache: ChainCache | None) -> _Verification:
        leeway = timedelta(seconds=policy.leeway_seconds)
        steps = STEPS | KEY_STEPS if policy.kms and at is not None else STEPS
        return cls(policy.anchor, None if at is None else _utc(at), leeway, cache, steps=steps)

    @property
    def at(self) -> datetime:
        assert self._at is not None  # archived Evidence is judged at its own time instead
        return self._at

    def prove_evidence(self, evidence: bytes) -> tuple[AttestationDocument, bytes]:
        """Steps 1 to 5: the claims, and the commitment as it was received."""
        # 1. A bounded deterministic map; the document in it bounded, strict CBOR throughout.
        with self.checklist.proving(1) as finding:
            finding.expected, finding.got = f"at most {MAX_EVIDENCE} bytes", f"{len(evidence)} bytes"
            parts = Evidence.decode(evidence)
            outer, payload = _decode(parts.document)
        return self._prove_document(outer, payload), parts.commitment

    def prove(self, document: bytes) -> AttestationDocument:
        """Steps 1 to 5 for a bare document."""
        with self.checklist.proving(1) as finding:
            finding.expected, finding.got = f"at most {MAX_DOCUMENT} bytes", f"{len(document)} bytes"
            outer, payload = _decode(document)
        return self._prove_document(outer, payload)

    def _prove_document(self, outer: cbor.Value, payload: cbor.Value) -> AttestationDocument:
        # 2. COSE_Sign1 with ES384.
        with self.checklist.proving(2) as finding:
            finding.expected, finding.got = "COSE_Sign1, ES384", "COSE_Sign1, ES384"
            signed = CoseSign1.from_cbor(outer)

        # 3. The payload's fields.
        with self.checklist.proving(3) as finding:
            claims = AttestationDocument.from_cbor(payload)
            finding.expected = "the known fields, each within its bounds"
            finding.got = f"{claims.module_id}, {claims.timestamp.isoformat()}"

        # 4. The chain, at the verification time.
        with self.checklist.proving(4) as finding:
            at = self._chain_time(claims)
            key = chain.validate(claims.certificate, claims.cabundle, anchor=self._anchor, at=at, cache=self._cache)
            finding.expected = f"{self._anchor.trust.value}, sha256 {self._anchor.fingerprint}"
            finding.got = f"{len(claims.cabundle) + 1} certificates to it, valid at {at.isoformat()}"

        # 5. The signature over the received bytes, with the key that the chain has proven.
        with self.checklist.proving(5) as finding:
            finding.expected, finding.got = "signed by the leaf", "signed by the leaf"
            _require_signature(signed, key)
        if is_debug(claims.pcrs):
            self.checklist.labels |= {Label.DEBUG}
        return claims

    def _chain_time(self, claims: AttestationDocument) -> datetime:
        """A client's clock that is slow by no more than the leeway would find a leaf that was issued seconds ago not
        yet valid: then the document's own time stands in.
        """
        if self._at is None or timedelta(0) < claims.timestamp - self._at <= self._leeway:
            return claims.timestamp
        return self._at

    def require_nonce(self, claims: AttestationDocument, nonce: bytes) -> None:
        """6. The nonce is the one that was sent."""
        with self.checklist.proving(6) as finding:
            finding.expected, finding.got = field_text(nonce), field_text(claims.nonce)
            if claims.nonce != nonce:
                _refuse("wrong_nonce", "the document answers another request, or none", finding)

    def require_fresh(self, claims: AttestationDocument, policy: AppraisalPolicy) -> timedelta:
        """7. Neither too old nor from the future; its age."""
        age = self.at - claims.timestamp
        with self.checklist.proving(7) as finding:
            finding.expected = f"0 to {policy.max_age_seconds} s old, with a leeway of {policy.leeway_seconds} s"
            finding.got = f"{age.total_seconds():.3f} s old"
            if age > timedelta(seconds=policy.max_age_seconds) + self._leeway:
                _refuse("stale", "the document is too old", finding)
            if age < -self._leeway:
                _refuse("from_the_future", "the document is from the future; is the clock right?", finding)
        return age

    def require_commitment(self, claims: AttestationDocument, encoded: bytes) -> Commitment:
        """8 and 9: the document binds this commitment, and the commitment says what the registers say."""
        # 8. The document is for a channel, and for this commitment as received; it carries no key of its own.
        with self.checklist.proving(8) as finding:
            finding.expected, finding.got = "no public_key", field_text(claims.public_key)
            if claims.public_key is not None:
                _refuse("wrong_binding", "the document of a channel carries no public_key", finding)
            wanted = UserData(Purpose.CHANNEL, hashlib.sha384(encoded).digest())
            finding.expected = finding.got = str(wanted)
            if claims.user_data is None:
                finding.got = field_text(None)
                _refuse("wrong_binding", "the document binds nothing", finding)
            if claims.user_data != wanted.encode():  # deterministic: what is bound has one encoding
                finding.got = str(UserData.decode(claims.user_data))
                _refuse("wrong_binding", "the document is not for this channel", finding)

        # 9. The commitment is well formed, and the locked registers say the same of model and configuration.
        with self.checklist.proving(9) as finding:
            commitment = Commitment.decode(encoded)
            committed = {
                PCR_MODEL: once_extended(commitment.model),
                PCR_CONFIGURATION: once_extended(commitment.configuration),
            }
            finding.expected = finding.got = registers_text(committed)
            if any(claims.pcrs.get(index) != value for index, value in committed.items()):
                finding.got = registers_text(claims.pcrs, committed)
                _refuse("wrong_binding", "the registers do not follow from the commitment", finding)
        return commitment

    def pass_by_commitment(self) -> None:
        """8 and 9 for a bare document; what it carries is judged in step 14."""
        for step in (8, 9):
            self.checklist.passes_by(step, "a bare document commits to no channel")

    def ignore(self, step: int, got: str) -> None:
        """6 and 7 for archived Evidence."""
        reason = "archived: judged at the document's own time"
        self.checklist.add(Check(step, STEPS[step], Status.IGNORED, None, got, explanation=reason))

    def conclude(
        self, claims: AttestationDocument
    ) -> tuple[AttestationDocument, Anchor, datetime, frozenset[Label], tuple[Check, ...]]:
        """What every result says, once no step has failed."""
        at = claims.timestamp if self._at is None else self._at
        return claims, self._anchor, at, self.checklist.labels, self.checklist.complete()


def _decode(document: bytes) -> tuple[cbor.Value, cbor.Value]:
    """Step 1 for a document: the COSE object and its payload, decoded and not yet judged."""
    if len(document) > MAX_DOCUMENT:
        raise EvidenceError(
            "malformed_cbor",
            "the document is too large",
            expected=f"at most {MAX_DOCUMENT} bytes",
            got=f"{len(document)} bytes",
        )
    outer = cbor.decode(document, optional_tag=COSE_SIGN1_TAG)
    payload = payload_of(outer)
    return outer, None if payload is None else cbor.decode(payload, indefinite_top_map=True)


_ES384 = ec.ECDSA(SHA384())


def _require_signature(signed: CoseSign1, key: ec.EllipticCurvePublicKey) -> None:
    # Raw r || s; either of the two values of s is good, and AWS emits both.
    half = SIGNATURE_SIZE // 2
    r, s = (int.from_bytes(part, "big") for part in (signed.signature[:half], signed.signature[half:]))
    try:
        key.verify(encode_dss_signature(r, s), signed.signed_bytes(), _ES384)
    except InvalidSignature as error:
        raise EvidenceError(
            "bad_signature",
            "the document was altered, or another key has signed it",
            expected="signed by the leaf",
            got="not signed by it",
        ) from error


def _require_binding(policy: AppraisalPolicy, wanted: type[Binding]) -> None:
    if not isinstance(policy.binding, wanted):
        purposes = {ChannelBinding: "channel", DocumentBinding: "document"}
        raise PolicyError(
            "wrong_purpose",
            "the policy judges another kind of Evidence",
            field="binding.purpose",
            expected=purposes[wanted],
            got=purposes[type(policy.binding)],
        )


def _seconds_left(policy: AppraisalPolicy, age: timedelta, at: datetime) -> float:
    """Until the document is too old, or the releases expire by which it was judged; never longer than the maximum age,
    however far ahead the enclave's clock is.
    """
    left = min(policy.max_age_seconds - age.total_seconds(), float(policy.max_age_seconds))
    if policy.expires is not None:
        left = min(left, (policy.expires - at).total_seconds())
    return max(0.0, left)


def _name(release: Release | None) -> str | None:
    return None if release is None else release.name


def _committed(commitment: Commitment) -> dict[str, object]:
    return {
        "purpose": "channel",
        "model": digest_text(commitment.model),
        "configuration": digest_text(commitment.configuration),
        "key_id": commitment.key_id.hex(),
    }


def _carried(claims: AttestationDocument) -> dict[str, object]:
    return {
        "purpose": "document",
        "public_key": None if claims.public_key is None else claims.public_key.hex(),
        "user_data": None if claims.user_data is None else claims.user_data.hex(),
    }


def _refuse(code: str, message: str, finding: Finding) -> NoReturn:
    raise EvidenceError(code, message, expected=finding.expected, got=finding.got)


def _utc(at: datetime) -> datetime:
    if at.tzinfo is None:
        raise ValueError("at: a time without a time zone could be any of twenty-four")
    try:
        return at.astimezone(UTC)
    except OverflowError as error:
        raise ValueError("at: beyond every calendar") from error
