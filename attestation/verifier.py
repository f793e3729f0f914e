"""The verifier: Evidence and a policy in, one verdict out.

``verify`` runs the checklist of PROTOCOL.md section 3; the numbers beside the code are its numbers. It returns an
``AttestationResult`` or raises; nothing here returns a boolean, and nothing but this module can make a result.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import KW_ONLY, InitVar, dataclass
from datetime import UTC, datetime, timedelta
from enum import StrEnum
from typing import NoReturn, final

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.utils import encode_dss_signature
from cryptography.hazmat.primitives.hashes import SHA384

from attestation import cbor, chain
from attestation.chain import Anchor
from attestation.checks import STEPS, Check, Checklist, Finding, Status
from attestation.commitment import MAX_DOCUMENT, MAX_EVIDENCE, Commitment, Entropy, Evidence, Purpose, UserData
from attestation.cose import COSE_SIGN1_TAG, SIGNATURE_SIZE, CoseSign1, payload_of
from attestation.document import PCR_COUNT, AttestationDocument
from attestation.errors import AppraisalError, EvidenceError
from attestation.policy import AppraisalPolicy, DigestRule, Forbid, Ignore, RegisterRule, Release
from attestation.reference import (
    PCR_APPLICATION,
    PCR_BOOT,
    PCR_CONFIGURATION,
    PCR_IMAGE,
    PCR_MODEL,
    PCR_SIGNER,
    ZERO_PCR,
    once_extended,
)

NONCE_SIZE = 32
"""Bytes that a client draws for each request."""


class Label(StrEnum):
    """What must be said wherever a result is shown."""

    EMULATED = "EMULATED"
    DEBUG = "DEBUG"


class _Proof:
    """The right to construct a result."""


_PROVEN = _Proof()


class _Proven:
    """What only this module constructs, and what neither copying nor unpickling can make."""

    __slots__ = ()

    def __reduce_ex__(self, protocol: object, /) -> NoReturn:
        raise TypeError(f"an {type(self).__name__} does not travel; verify again")


def _require_proof(proof: object) -> None:
    if proof is not _PROVEN:
        raise TypeError("only the verifier constructs a result")


@final
@dataclass(frozen=True, slots=True)
class AuthenticDocument(_Proven):
    """A document that the anchor vouches for (steps 1 to 5). No verdict: it may be old, replayed, or of anything."""

    claims: AttestationDocument
    labels: frozenset[Label]
    checks: tuple[Check, ...]
    _: KW_ONLY
    proof: InitVar[_Proof]

    def __post_init__(self, proof: _Proof) -> None:
        _require_proof(proof)


@final
@dataclass(frozen=True, slots=True)
class AttestationResult(_Proven):
    """The verdict that a channel may be opened: all fifteen steps hold, or are ignored by the policy's own words."""

    claims: AttestationDocument
    commitment: Commitment
    release: str | None
    """The policy's name for the image. None under an accepted debug mode, where no image is measured."""
    labels: frozenset[Label]
    checks: tuple[Check, ...]
    valid_seconds: float
    """For how long, on the client's monotonic clock, counted from the moment of the request. It may be 0."""
    _: KW_ONLY
    proof: InitVar[_Proof]

    def __post_init__(self, proof: _Proof) -> None:
        _require_proof(proof)

    def as_json(self) -> dict[str, object]:
        return {
            "verdict": "accepted",
            "labels": sorted(self.labels),
            "release": self.release,
            "module_id": self.claims.module_id,
            "timestamp": self.claims.timestamp.isoformat(),
            "pcrs": {str(index): value.hex() for index, value in sorted(self.claims.pcrs.items())},
            "model": self.commitment.model.hex(),
            "configuration": self.commitment.configuration.hex(),
            "key_id": self.commitment.key_id.hex(),
            "valid_seconds": self.valid_seconds,
            "checks": [check.as_json() for check in self.checks],
        }


def authenticate(document: bytes, *, anchor: Anchor, at: datetime) -> AuthenticDocument:
    """Steps 1 to 5: what ``document`` says, and that it said so under ``anchor``, whose chain must hold at ``at``.

    For archives, and for whoever judges documents by other rules than a policy's. ``at`` has a time zone. Raises
    EvidenceError.
    """
    checklist = Checklist(last=5)
    with checklist.proving(1) as finding:
        finding.expected, finding.got = f"at most {MAX_DOCUMENT} bytes", f"{len(document)} bytes"
        outer, payload = _decode(document)
    claims = _prove_document(checklist, outer, payload, anchor, _utc(at), leeway=timedelta(0))
    return AuthenticDocument(claims, _anchor_labels(anchor), checklist.complete(), proof=_PROVEN)


def verify(evidence: bytes, *, policy: AppraisalPolicy, nonce: bytes, at: datetime) -> AttestationResult:
    """The verdict on the ``evidence`` that answers the request with ``nonce``, judged at ``at`` (with a time zone).

    Raises EvidenceError when it proves nothing (steps 1 to 9) and AppraisalError when what it proves is not what the
    policy accepts (steps 10 to 15); both carry the checks. ValueError for a nonce that is not ``NONCE_SIZE`` bytes.
    """
    if len(nonce) != NONCE_SIZE:
        raise ValueError(f"nonce: expected {NONCE_SIZE} bytes, got {len(nonce)}")
    at = _utc(at)
    max_age, leeway = timedelta(seconds=policy.max_age_seconds), timedelta(seconds=policy.leeway_seconds)
    checklist = Checklist(last=max(STEPS))

    # 1. A bounded deterministic map; the document in it bounded, strict CBOR throughout.
    with checklist.proving(1) as finding:
        finding.expected, finding.got = f"at most {MAX_EVIDENCE} bytes", f"{len(evidence)} bytes"
        parts = Evidence.decode(evidence)
        outer, payload = _decode(parts.document)

    # 2 to 5.
    claims = _prove_document(checklist, outer, payload, policy.anchor, at, leeway)

    # 6. The nonce is the one that was sent.
    with checklist.proving(6) as finding:
        finding.expected, finding.got = _hex(nonce), _hex(claims.nonce)
        if claims.nonce != nonce:
            _refuse("wrong_nonce", "the document answers another request, or none", finding)

    # 7. Neither too old nor from the future.
    age = at - claims.timestamp
    with checklist.proving(7) as finding:
        finding.expected = f"0 to {policy.max_age_seconds} s old, with a leeway of {policy.leeway_seconds} s"
        finding.got = f"{age.total_seconds():.3f} s old"
        if age > max_age + leeway:
            _refuse("stale", "the document is too old", finding)
        if age < -leeway:
            _refuse("from_the_future", "the document is from the future; is the clock right?", finding)

    # 8. The document is for a channel, and for this commitment as received; it carries no key of its own.
    with checklist.proving(8) as finding:
        finding.expected, finding.got = "no public_key", _hex(claims.public_key)
        if claims.public_key is not None:
            _refuse("wrong_binding", "the document of a channel carries no public_key", finding)
        digest = hashlib.sha384(parts.commitment).digest()
        finding.expected, finding.got = f"{Purpose.CHANNEL.value}, sha384:{digest.hex()}", _hex(claims.user_data)
        if claims.user_data is None:
            _refuse("wrong_binding", "the document binds nothing", finding)
        binding = UserData.decode(claims.user_data)
        finding.got = f"{binding.purpose.value}, sha384:{binding.commitment_digest.hex()}"
        if finding.got != finding.expected:
            _refuse("wrong_binding", "the document is not for this channel", finding)

    # 9. The commitment is well formed, and the locked registers say the same of model and configuration.
    with checklist.proving(9) as finding:
        commitment = Commitment.decode(parts.commitment)
        committed = {
            PCR_MODEL: once_extended(commitment.model),
            PCR_CONFIGURATION: once_extended(commitment.configuration),
        }
        finding.expected, finding.got = _registers(committed), _registers(claims.pcrs, committed)
        if finding.got != finding.expected:
            _refuse("wrong_binding", "the registers do not follow from the commitment", finding)

    # 10 to 15: all are judged, every failure is listed.
    debug = _judge_debug(checklist, policy, claims)
    release = _judge_image(checklist, policy, claims, debug)
    _judge_digest(checklist, 12, policy.model, commitment.model, "wrong_model")
    _judge_digest(checklist, 13, policy.configuration, commitment.configuration, "wrong_configuration")
    _judge_registers(checklist, policy, claims, release)
    _judge_module(checklist, policy, claims)
    _judge_entropy(checklist, policy, commitment)
    checks = checklist.complete()
    failures = [check for check in checks if check.status is Status.FAILED]
    if failures:
        first = failures[0]
        names = ", ".join(check.name for check in failures)
        error = AppraisalError(
            first.code or "", f"the policy refuses this enclave: {names}", expected=first.expected, got=first.got
        )
        error.checks = checks
        raise error
    return AttestationResult(
        claims=claims,
        commitment=commitment,
        release=None if release is None else release.name,
        labels=_anchor_labels(policy.anchor) | ({Label.DEBUG} if debug else set()),
        checks=checks,
        valid_seconds=max(0.0, min((max_age - age).total_seconds(), float(commitment.lifetime))),
        proof=_PROVEN,
    )


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


def _prove_document(
    checklist: Checklist, outer: cbor.Value, payload: cbor.Value, anchor: Anchor, at: datetime, leeway: timedelta
) -> AttestationDocument:
    # 2. COSE_Sign1 with ES384.
    with checklist.proving(2) as finding:
        finding.expected, finding.got = "COSE_Sign1, ES384", "COSE_Sign1, ES384"
        signed = CoseSign1.from_cbor(outer)

    # 3. The payload's fields.
    with checklist.proving(3) as finding:
        document = AttestationDocument.from_cbor(payload)
        finding.expected = "the known fields, each within its bounds"
        finding.got = f"{document.module_id}, {document.timestamp.isoformat()}"

    # 4. The chain, at the verification time. A client's clock that is slow by no more than the leeway would find a
    # leaf that was issued seconds ago not yet valid: then the document's own time stands in.
    with checklist.proving(4) as finding:
        chain_time = document.timestamp if timedelta(0) < document.timestamp - at <= leeway else at
        key = chain.validate(document.certificate, document.cabundle, anchor=anchor, at=chain_time)
        finding.expected = f"{anchor.trust.value}, sha256 {anchor.fingerprint}"
        finding.got = f"{len(document.cabundle) + 1} certificates to it, valid at {chain_time.isoformat()}"

    # 5. The signature over the received bytes, with the key that the chain has proven.
    with checklist.proving(5) as finding:
        finding.expected, finding.got = "signed by the leaf", "signed by the leaf"
        _require_signature(signed, key)
    return document


def _require_signature(signed: CoseSign1, key: ec.EllipticCurvePublicKey) -> None:
    # Raw r || s; either of the two values of s is good, and AWS emits both.
    r, s = (
        int.from_bytes(half, "big")
        for half in (signed.signature[: SIGNATURE_SIZE // 2], signed.signature[SIGNATURE_SIZE // 2 :])
    )
    try:
        key.verify(encode_dss_signature(r, s), signed.signed_bytes(), ec.ECDSA(SHA384()))
    except InvalidSignature as error:
        raise EvidenceError(
            "bad_signature", "the document was altered", expected="signed by the leaf", got="not signed by it"
        ) from error


def _judge_debug(checklist: Checklist, policy: AppraisalPolicy, claims: AttestationDocument) -> bool:
    """10. Whether the enclave is in debug mode, which the policy must accept by name."""
    registers = (PCR_IMAGE, PCR_BOOT, PCR_APPLICATION)
    debug = all(claims.pcrs.get(index) == ZERO_PCR for index in registers)
    expected, got = "PCR0, PCR1 and PCR2 not all zero", "all zero" if debug else "not all zero"
    if debug and policy.accept_debug is not None:
        checklist.add(Check(10, STEPS[10], Status.IGNORED, expected, got, explanation=policy.accept_debug))
    elif debug:
        explanation = "an enclave in debug mode: its host can read its memory"
        checklist.add(Check(10, STEPS[10], Status.FAILED, expected, got, "debug_mode", explanation))
    else:
        checklist.add(Check(10, STEPS[10], Status.PASSED, expected, got))
    return debug


def _judge_image(
    checklist: Checklist, policy: AppraisalPolicy, claims: AttestationDocument, debug: bool
) -> Release | None:
    """11. The release whose registers are, together, those of the document."""
    for release in policy.releases:
        registers = release.pcrs.as_registers()
        if all(claims.pcrs.get(index) == value for index, value in registers.items()):
            expected = f"release {release.name} ({_registers(registers)})"
            checklist.add(Check(11, STEPS[11], Status.PASSED, expected, _registers(claims.pcrs, registers)))
            return release
    named = sorted({index for release in policy.releases for index in release.pcrs.as_registers()})
    expected = " or ".join(
        f"release {release.name} ({_registers(release.pcrs.as_registers())})" for release in policy.releases
    )
    got = _registers(claims.pcrs, named)
    if debug and policy.accept_debug is not None:
        checklist.add(Check(11, STEPS[11], Status.IGNORED, expected, got, explanation=policy.accept_debug))
    else:
        explanation = "no release of the policy has these registers together"
        checklist.add(Check(11, STEPS[11], Status.FAILED, expected, got, "wrong_image", explanation))
    return None


def _judge_digest(checklist: Checklist, step: int, rule: DigestRule, value: bytes, code: str) -> None:
    """12 and 13. The digest that step 9 tied to its register."""
    got = f"sha384:{value.hex()}"
    if isinstance(rule, Ignore):
        checklist.add(Check(step, STEPS[step], Status.IGNORED, None, got, explanation=rule.reason))
    else:
        expected = " or ".join(f"sha384:{digest.hex()}" for digest in rule.values)
        checklist.add(_judged(step, STEPS[step], value in rule.values, expected, got, code))


def _judge_registers(
    checklist: Checklist, policy: AppraisalPolicy, claims: AttestationDocument, release: Release | None
) -> None:
    """14, for registers. One that is absent from a document was never locked; nothing is known to be in it."""
    elsewhere = {PCR_IMAGE, PCR_BOOT, PCR_APPLICATION, PCR_MODEL, PCR_CONFIGURATION}
    if any(one.pcrs.pcr8 is not None for one in (policy.releases if release is None else (release,))):
        elsewhere.add(PCR_SIGNER)  # judged with the image
    unnamed = set(range(PCR_COUNT)) - elsewhere - policy.pcrs.keys()
    for index, rule in sorted(policy.pcrs.items()):
        if index not in elsewhere:
            _judge_register(checklist, rule, index, claims.pcrs.get(index))
    used = [index for index in sorted(unnamed) if claims.pcrs.get(index, ZERO_PCR) != ZERO_PCR]
    got = _registers(claims.pcrs, used) or "zero"
    checklist.add(_judged(14, "other PCRs", not used, "zero", got, "wrong_pcr"))


def _judge_register(checklist: Checklist, rule: RegisterRule, index: int, value: bytes | None) -> None:
    name, got = f"PCR{index}", _register(value)
    if isinstance(rule, Ignore):
        checklist.add(Check(14, name, Status.IGNORED, None, got, explanation=rule.reason))
    elif isinstance(rule, Forbid):
        checklist.add(_judged(14, name, value in (None, ZERO_PCR), "zero", got, "wrong_pcr"))
    else:
        expected = " or ".join(map(_register, rule.values))
        checklist.add(_judged(14, name, value in rule.values, expected, got, "wrong_pcr"))


def _judge_module(checklist: Checklist, policy: AppraisalPolicy, claims: AttestationDocument) -> None:
    """14, for the module."""
    rule = policy.module_id
    if isinstance(rule, Ignore):
        checklist.add(Check(14, "module id", Status.IGNORED, None, claims.module_id, explanation=rule.reason))
    else:
        accepted = claims.module_id in rule.values
        checklist.add(_judged(14, "module id", accepted, " or ".join(rule.values), claims.module_id, "wrong_module"))


def _judge_entropy(checklist: Checklist, policy: AppraisalPolicy, commitment: Commitment) -> None:
    """15. Randomness that the host chose is fit for an emulated enclave alone."""
    accepted = tuple(Entropy) if policy.anchor.is_emulated else (Entropy.NSM_HWRNG,)
    expected, got = " or ".join(accepted), commitment.entropy.value
    checklist.add(_judged(15, STEPS[15], commitment.entropy in accepted, expected, got, "host_entropy"))


def _judged(step: int, name: str, accepted: bool, expected: str, got: str, code: str) -> Check:
    if accepted:
        return Check(step, name, Status.PASSED, expected, got)
    return Check(step, name, Status.FAILED, expected, got, code, _MEANING[code])


_MEANING = {
    "wrong_model": "the enclave runs a model that the policy does not name",
    "wrong_configuration": "the enclave runs under a configuration that the policy does not name",
    "wrong_pcr": "something was measured that the policy does not accept",
    "wrong_module": "another enclave than the policy names",
    "host_entropy": "the host chose the enclave's randomness, and so can know its keys",
}


def _refuse(code: str, message: str, finding: Finding) -> NoReturn:
    raise EvidenceError(code, message, expected=finding.expected, got=finding.got)


def _anchor_labels(anchor: Anchor) -> frozenset[Label]:
    return frozenset({Label.EMULATED}) if anchor.is_emulated else frozenset()


def _utc(at: datetime) -> datetime:
    if at.tzinfo is None:
        raise ValueError("at: a time without a time zone could be any of twenty-four")
    return at.astimezone(UTC)


def _hex(value: bytes | None) -> str:
    return "absent" if value is None else cbor.shown(value)


def _register(value: bytes | None) -> str:
    if value is None:
        return "absent"
    return "zero" if value == ZERO_PCR else value.hex()


def _registers(registers: Mapping[int, bytes], indexes: Iterable[int] | None = None) -> str:
    """The registers of these indexes, or all of them, on one line."""
    wanted = registers if indexes is None else indexes
    return ", ".join(f"PCR{index} {_register(registers.get(index))}" for index in wanted)
