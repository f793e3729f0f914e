"""Judging what has been proven: steps 10 to 15 of PROTOCOL.md section 3, policy against claims.

Every step is judged and every failure is listed. Nothing here proves anything: the verifier calls it with claims that
steps 1 to 9 vouch for, and makes the result.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from datetime import datetime, timedelta

from attestation import cbor
from attestation.checklist import Checklist
from attestation.checks import STEPS, Check, Status
from attestation.commitment import Commitment, Entropy
from attestation.document import AttestationDocument
from attestation.keypolicy.document import KeyArn
from attestation.keyrelease import KeyFacts, judge_keys
from attestation.policy import AppraisalPolicy
from attestation.reference import (
    PCR_APPLICATION,
    PCR_BOOT,
    PCR_CONFIGURATION,
    PCR_IMAGE,
    PCR_MODEL,
    PCR_SIGNER,
    ZERO_PCR,
    digest_text,
    once_extended,
)
from attestation.rules import (
    DigestRule,
    DocumentBinding,
    FieldRule,
    Forbid,
    Ignore,
    Manifests,
    ModelRule,
    RegisterRule,
    Release,
    Released,
    ReleasesInForce,
)

IMAGE_REGISTERS = (PCR_IMAGE, PCR_BOOT, PCR_APPLICATION)
_JUDGED_WITH_IMAGE_AND_COMMITMENT = frozenset((*IMAGE_REGISTERS, PCR_MODEL, PCR_CONFIGURATION))


def appraise(
    checklist: Checklist,
    policy: AppraisalPolicy,
    claims: AttestationDocument,
    commitment: Commitment | None,
    at: datetime | None,
    keys: Mapping[KeyArn, KeyFacts] | None = None,
) -> Release | None:
    """Steps 10 to 15, and 16 to 21 for the policy's KMS keys where there are ``keys``, entered into ``checklist``; the
    release that the image is, or None where debug mode is accepted.

    ``commitment`` is None for a bare document: then the registers themselves are judged. ``at`` is None for what is
    archived: then the releases judge that were in force at its own time. Raises AppraisalError with every check when
    one has failed.
    """
    debug = _judge_debug(checklist, policy, claims)
    in_force = policy.releases_in_force(claims.timestamp if at is None else None)
    release = _judge_image(checklist, policy, claims, debug, in_force, claims.timestamp if at is None else at)
    model = _Committed(claims.pcrs.get(PCR_MODEL), None if commitment is None else commitment.model)
    _judge_model(checklist, policy.model, release, model)
    configuration = _Committed(
        claims.pcrs.get(PCR_CONFIGURATION), None if commitment is None else commitment.configuration
    )
    _judge_configuration(checklist, policy.configuration, release, configuration)
    _judge_registers(checklist, policy, claims, release, debug)
    _judge_module(checklist, policy, claims)
    if isinstance(policy.binding, DocumentBinding):
        _judge_field(checklist, "public key", policy.binding.public_key, claims.public_key, "wrong_public_key")
        _judge_field(checklist, "user data", policy.binding.user_data, claims.user_data, "wrong_user_data")
    _judge_entropy(checklist, policy, commitment)
    if keys is not None:
        judge_keys(checklist, policy, keys)
    checklist.require_accepted("this enclave")
    return release


def is_debug(pcrs: Mapping[int, bytes]) -> bool:
    """Whether these are the registers of debug mode: nothing was measured, and the enclave's host reads its memory."""
    return all(pcrs.get(index) == ZERO_PCR for index in IMAGE_REGISTERS)


def _judge_debug(checklist: Checklist, policy: AppraisalPolicy, claims: AttestationDocument) -> bool:
    """10. Whether the enclave is in debug mode, which the policy must accept by name."""
    debug = is_debug(claims.pcrs)
    expected, got = "PCR0, PCR1 and PCR2 not all zero", "all zero" if debug else "not all zero"
    if debug and policy.accept_debug is not None:
        checklist.add(Check(10, STEPS[10], Status.IGNORED, expected, got, explanation=policy.accept_debug))
    else:
        checklist.add(_judged(10, STEPS[10], not debug, expected, got, "debug_mode"))
    return debug


def _judge_image(
    checklist: Checklist,
    policy: AppraisalPolicy,
    claims: AttestationDocument,
    debug: bool,
    in_force: ReleasesInForce,
    at: datetime,
) -> Release | None:
    """11. The release whose registers are, together, those of the document; signed releases count for a time."""
    for release in in_force.releases:
        registers = release.pcrs.as_registers()
        if all(claims.pcrs.get(index) == value for index, value in registers.items()):
            got = registers_text(registers)
            expected, code = f"release {release.name} ({got})", "wrong_image"
            if in_force.expires is not None and at >= in_force.expires:
                expected, code = f"a release that is accepted at {at.isoformat()}", "expired_release"
                got = f"release {release.name}, accepted before {in_force.expires.isoformat()}"
            elif in_force.issued is not None and at + timedelta(seconds=policy.leeway_seconds) < in_force.issued:
                expected, code = f"a release that is accepted at {at.isoformat()}", "unissued_release"
                got = f"release {release.name}, accepted from {in_force.issued.isoformat()}"
            checklist.add(_judged(11, STEPS[11], code == "wrong_image", expected, got, code))
            return release
    named = sorted({index for release in in_force.releases for index in release.pcrs.as_registers()} or IMAGE_REGISTERS)
    expected = " or ".join(
        f"release {release.name} ({registers_text(release.pcrs.as_registers())})" for release in in_force.releases
    )
    got = registers_text(claims.pcrs, named)
    if debug and policy.accept_debug is not None:
        checklist.add(Check(11, STEPS[11], Status.IGNORED, expected, got, explanation=policy.accept_debug))
    else:
        checklist.add(_judged(11, STEPS[11], False, expected or "a release of that time", got, "wrong_image"))
    return None


class _Committed:
    """A register that was extended once with a digest: the digest where it is known, and the register in any case."""

    def __init__(self, register: bytes | None, digest: bytes | None) -> None:
        self._register = register
        self._digest = digest

    def __str__(self) -> str:
        return f"register {_register(self._register)}" if self._digest is None else digest_text(self._digest)

    def is_of(self, digest: bytes) -> bool:
        if self._digest is None:
            return self._register == once_extended(digest)
        return self._digest == digest


def _judge_model(checklist: Checklist, rule: ModelRule, release: Release | None, got: _Committed) -> None:
    """12. What PCR16 commits to; step 9 has tied a channel's digest to it."""
    if isinstance(rule, Manifests):
        texts = [f"{name} version {each.version} ({digest_text(each.digest())})" for name, each in rule.accepted]
        accepted = any(got.is_of(manifest.digest()) for _, manifest in rule.accepted)
        checklist.add(_judged(12, STEPS[12], accepted, " or ".join(texts), str(got), "wrong_model"))
    elif isinstance(rule, Ignore):
        checklist.add(Check(12, STEPS[12], Status.IGNORED, None, str(got), explanation=rule.reason))
    else:
        named = release.models if release is not None else ()
        digests = named if isinstance(rule, Released) else rule.values
        _judge_digest(checklist, 12, digests, got, "wrong_model")


def _judge_configuration(checklist: Checklist, rule: DigestRule, release: Release | None, got: _Committed) -> None:
    """13. What PCR17 commits to."""
    if isinstance(rule, Ignore):
        checklist.add(Check(13, STEPS[13], Status.IGNORED, None, str(got), explanation=rule.reason))
    else:
        named = release.configurations if release is not None else ()
        digests = named if isinstance(rule, Released) else rule.values
        _judge_digest(checklist, 13, digests, got, "wrong_configuration")


def _judge_digest(checklist: Checklist, step: int, digests: tuple[bytes, ...], got: _Committed, code: str) -> None:
    expected = (
        " or ".join(map(digest_text, digests)) or "what the release names, and no release was matched that names one"
    )
    checklist.add(_judged(step, STEPS[step], any(map(got.is_of, digests)), expected, str(got), code))


def _judge_registers(
    checklist: Checklist, policy: AppraisalPolicy, claims: AttestationDocument, release: Release | None, debug: bool
) -> None:
    """14, for registers. One that is absent from a document was never locked; nothing is known to be in it."""
    elsewhere = _JUDGED_WITH_IMAGE_AND_COMMITMENT
    # With the image: where the matched release names PCR8, and where a refused image's registers were all shown.
    matched = release is not None and release.pcrs.pcr8 is not None
    refused = release is None and not debug and PCR_SIGNER not in policy.pcrs
    if matched or refused:
        elsewhere |= {PCR_SIGNER}
    for index, rule in sorted(policy.pcrs.items()):
        if index not in elsewhere:
            _judge_register(checklist, rule, index, claims.pcrs.get(index))
    named = elsewhere | policy.pcrs.keys()
    used = sorted(index for index, value in claims.pcrs.items() if value != ZERO_PCR and index not in named)
    got = registers_text(claims.pcrs, used) or "zero"
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


def _judge_field(checklist: Checklist, name: str, rule: FieldRule, value: bytes | None, code: str) -> None:
    """14, for what a bare document carries."""
    got = field_text(value)
    if isinstance(rule, Ignore):
        checklist.add(Check(14, name, Status.IGNORED, None, got, explanation=rule.reason))
    elif isinstance(rule, Forbid):
        checklist.add(_judged(14, name, value is None, "absent", got, code))
    else:
        checklist.add(_judged(14, name, value in rule.values, " or ".join(map(field_text, rule.values)), got, code))


_ANY_ENTROPY = tuple(Entropy)


def _judge_entropy(checklist: Checklist, policy: AppraisalPolicy, commitment: Commitment | None) -> None:
    """15. Randomness that the host chose is fit for an emulated enclave alone."""
    if commitment is None:
        checklist.passes_by(15, "a bare document does not say where its enclave's randomness comes from")
        return
    accepted = _ANY_ENTROPY if policy.anchor.is_emulated else (Entropy.NSM_HWRNG,)
    expected, got = " or ".join(accepted), commitment.entropy.value
    checklist.add(_judged(15, STEPS[15], commitment.entropy in accepted, expected, got, "host_entropy"))


def _judged(step: int, name: str, accepted: bool, expected: str, got: str, code: str) -> Check:
    if accepted:
        return Check(step, name, Status.PASSED, expected, got)
    return Check(step, name, Status.FAILED, expected, got, code, _MEANING[code])


_MEANING = {
    "debug_mode": "an enclave in debug mode: its host can read its memory",
    "wrong_image": "no release of the policy has these registers together",
    "expired_release": "the signed releases have expired: a newer history is needed, or somebody is holding it back",
    "unissued_release": "the signed releases are from the future; is the clock right?",
    "wrong_model": "the enclave runs a model that the policy does not name",
    "wrong_configuration": "the enclave runs under a configuration that the policy does not name",
    "wrong_pcr": "something was measured that the policy does not accept",
    "wrong_module": "another enclave than the policy names",
    "wrong_public_key": "the document carries another public key than the policy names, or one that it forbids",
    "wrong_user_data": "the document carries other user data than the policy names, or data that it forbids",
    "host_entropy": "the host chose the enclave's randomness, and so can know its keys",
}


def field_text(value: bytes | None) -> str:
    """A document's field for a report."""
    return "absent" if value is None else cbor.shown(value)


def registers_text(registers: Mapping[int, bytes], indexes: Iterable[int] | None = None) -> str:
    """The registers of these indexes, or all of them, on one line."""
    wanted = registers if indexes is None else indexes
    return ", ".join(f"PCR{index} {_register(registers.get(index))}" for index in wanted)


def _register(value: bytes | None) -> str:
    if value is None:
        return "absent"
    return "zero" if value == ZERO_PCR else value.hex()
