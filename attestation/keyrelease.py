"""What a KMS key releases to, and who may change that: steps 16 to 21 of PROTOCOL.md section 3.

A key whose policy lets somebody else decrypt protects nothing, however good an enclave's Evidence is. So where a policy
names keys, what KMS says of them is judged in the same call and enters the same verdict
(:func:`attestation.verifier.verify`). Where there is no enclave to ask, because a prompt is to wait or a model is to be
encrypted, it is judged alone (:func:`judge_key`).

Asking KMS is not done here: :class:`KeyFacts` is what it answered.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import KW_ONLY, InitVar, dataclass
from datetime import datetime, timedelta
from typing import Final, NoReturn, final

from attestation.checklist import Checklist
from attestation.checks import KEY_STEPS, Check, Label, Status
from attestation.envelope import EnvelopeError, EnvelopePurpose, require_header
from attestation.errors import PolicyError
from attestation.keypolicy.answers import Grant, KeyMetadata
from attestation.keypolicy.attested import ReleasedTo
from attestation.keypolicy.document import KeyArn, KeyPolicy
from attestation.keypolicy.findings import Finding, Severity
from attestation.keypolicy.lint import lint
from attestation.keypolicy.mutability import Locked, Mutability, mutability
from attestation.policy import AppraisalPolicy
from attestation.reference import PCR_CONFIGURATION, PCR_MODEL, ZERO_PCR, once_extended
from attestation.rules import Ignore, KeyRule, Measures, Require, SignedReleases, WrappedKeyFile


@dataclass(frozen=True, slots=True)
class KeyFacts:
    """What KMS says of a key now: the answers of DescribeKey, GetKeyPolicy and ListGrants."""

    metadata: KeyMetadata
    """What it is, and which one: DescribeKey."""
    policy: KeyPolicy
    """Its policy, ``default``: GetKeyPolicy."""
    grants: tuple[Grant, ...]
    """All of them: ListGrants to its last page."""


@final
class _Proof:
    """Held by this module alone."""


_PROVEN: Final = _Proof()


@final
@dataclass(frozen=True, slots=True)
class KeyRelease:
    """The verdict that a key releases to what the policy accepts and to nothing else: something may be sealed to it.

    Made by :func:`judge_key` alone.
    """

    key: KeyArn
    """To which something may be sealed."""
    purpose: EnvelopePurpose
    """What may be sealed to it."""
    rule: KeyRule
    """The policy's, by which it was judged."""
    mutability: Mutability
    """LOCKED, or who may change later what was judged now. The policy trusts them."""
    models: tuple[bytes, ...]
    """Digests of the manifests that the policy accepts, 48 bytes each: for an envelope's terms."""
    configurations: tuple[bytes, ...]
    """The same of configurations, 48 bytes each."""
    labels: frozenset[Label]
    """What must be said wherever this is shown: that the policy's enclaves are EMULATED."""
    checks: tuple[Check, ...]
    """Every step that was taken, in order; none has failed."""
    _: KW_ONLY
    proof: InitVar[_Proof]

    def __post_init__(self, proof: _Proof) -> None:
        if proof is not _PROVEN:
            raise TypeError("only judge_key makes a verdict")

    def __reduce_ex__(self, protocol: object, /) -> NoReturn:
        raise TypeError("a KeyRelease does not travel; judge again")

    def as_json(self) -> dict[str, object]:
        """For programs."""
        return {
            "verdict": "accepted",
            "labels": sorted(self.labels),
            "key": self.key.text,
            "purpose": self.purpose.value,
            "mutability": str(self.mutability),
            "checks": [check.as_json() for check in self.checks],
        }


def judge_key(policy: AppraisalPolicy, purpose: EnvelopePurpose, facts: KeyFacts, *, at: datetime) -> KeyRelease:
    """Steps 16 to 21 for the policy's key of ``purpose``, without Evidence of an enclave, ``at`` (with a time zone).

    Of signed releases it is asked here that they are issued and have not expired: where there is Evidence, step 11 does
    so. The wrapped key in use is not judged: a new one is about to be made.

    Raises PolicyError ``missing_field`` when the policy names no such key, ReleaseError ``expired_release`` and
    ``unissued_release``, and AppraisalError with every check.
    """
    rule = policy.kms.get(purpose)
    if rule is None:
        raise PolicyError("missing_field", "the policy names no key for this", field=f"kms.{purpose.table}", got="none")
    if isinstance(policy.releases, SignedReleases):
        policy.releases.history.require_in_force(at, leeway=timedelta(seconds=policy.leeway_seconds))
    checklist = Checklist(KEY_STEPS, *((Label.EMULATED,) if policy.anchor.is_emulated else ()))
    judgement = _Judgement(checklist, purpose, rule)
    mutable = judgement.key(policy, facts)
    judgement.no_wrapped_key("a new one is about to be made")
    checklist.require_accepted("this key")
    return KeyRelease(
        rule.key,
        purpose,
        rule,
        mutable,
        policy.accepted_models,
        policy.accepted_configurations,
        checklist.labels,
        checklist.complete(),
        proof=_PROVEN,
    )


def judge_keys(checklist: Checklist, policy: AppraisalPolicy, facts: Mapping[KeyArn, KeyFacts]) -> None:
    """Enters steps 16 to 21 for every key that ``policy`` names; ``facts`` has them all (:func:`require_facts`)."""
    for purpose, rule in policy.kms.items():
        judgement = _Judgement(checklist, purpose, rule)
        judgement.key(policy, facts[rule.key])
        judgement.wrapped_key()


def require_facts(policy: AppraisalPolicy, facts: Mapping[KeyArn, KeyFacts]) -> None:
    """Raises PolicyError ``key_facts_missing`` unless ``facts`` has every key that ``policy`` names."""
    for purpose, rule in policy.kms.items():
        if rule.key not in facts:
            raise PolicyError(
                "key_facts_missing",
                "the policy names a KMS key: what KMS says of it must be judged as well",
                field=f"kms.{purpose.table}.key",
                expected=rule.key.text,
                got="nothing",
            )


def released_to(policy: AppraisalPolicy, purpose: EnvelopePurpose) -> Iterator[ReleasedTo]:
    """What the key's own policy has to ask for, release by release; one or more, where ``policy`` names a key.

    PCR16 is still open when a model's key is released, so that it is asked of prompts alone. Rules for further
    registers are asked as well, where they name values. That a register is zero is left to Evidence: no other code runs
    for it.
    """
    further = {
        index: rule.values
        for index, rule in policy.pcrs.items()
        if isinstance(rule, Require | Measures) and ZERO_PCR not in rule.values
    }
    for release in policy.accepted_releases:
        models, configurations = policy.models_of(release), policy.configurations_of(release)
        if models and configurations:  # else nothing may run in it
            registers = further | {index: (value,) for index, value in release.pcrs.as_registers().items()}
            registers[PCR_CONFIGURATION] = tuple(map(once_extended, configurations))
            if purpose is EnvelopePurpose.PROMPT:
                registers[PCR_MODEL] = tuple(map(once_extended, models))
            yield ReleasedTo(release.name, registers)


_STEPS: Final = {
    **dict.fromkeys(("not_enabled", "wrong_key", "foreign_material"), 16),
    **dict.fromkeys(("multi_region", "unseen_copy"), 17),
    "grant_opens": 19,
}
"""The linter's findings by the step that they fail; all others that are errors fail 18."""

_FIT: Final = "Enabled, ENCRYPT_DECRYPT, SYMMETRIC_DEFAULT, origin AWS_KMS, managed by CUSTOMER"
"""What a key must be, in KMS's own words."""

_CODES: Final = {17: "copied_key", 18: "open_key_policy", 19: "granted_key"}

_EXPECTED: Final = {
    17: "a key of one region",
    18: "a policy that releases to the accepted releases and to nothing else",
    19: "no grant that opens the key",
}

_MEANING: Final = {
    "wrong_key": "KMS describes another key than the policy names",
    "unusable_key": "the key is not in use, or not one that a data key can be wrapped under safely",
    "copied_key": "another region may have the key under a policy that nobody has judged",
    "open_key_policy": "KMS would release to something else than the policy accepts",
    "granted_key": "somebody has a permission beside the key's policy, which asks for no attestation",
    "mutable_key": "what was judged now may be changed later by somebody whom the policy does not trust",
    "wrong_wrapped_key": "the wrapped key is not there, or not the one that the policy is about",
    "rolled_back": "an older wrapped key: somebody may be playing back what was replaced",
}


class _Judgement:
    """Steps 16 to 21 for one key, as they are entered."""

    def __init__(self, checklist: Checklist, purpose: EnvelopePurpose, rule: KeyRule) -> None:
        self._checklist = checklist
        self._purpose = purpose
        self._rule = rule

    def key(self, policy: AppraisalPolicy, facts: KeyFacts) -> Mutability:
        """16 to 20, by what KMS says of the key; who can change it."""
        findings = lint(
            facts.policy,
            metadata=facts.metadata,
            releases=tuple(released_to(policy, self._purpose)),
            purpose=self._purpose,
            context=self._rule.context,
            grants=facts.grants,
            administrators=self._rule.administrators,
        )
        mutable = mutability(facts.policy, facts.metadata, facts.grants)
        self._metadata(facts.metadata, findings)
        for step in (17, 18, 19):
            self._findings(step, findings)
        self._mutability(mutable)
        return mutable

    def _metadata(self, metadata: KeyMetadata, findings: Sequence[Finding]) -> None:
        """16. The key that is named, in use and made by KMS."""
        expected = f"{self._rule.key.text}: {_FIT}"
        got = f"{metadata.arn.text}: {_kind(metadata)}"
        code = None
        if metadata.arn != self._rule.key:
            code = "wrong_key"
        elif got != expected or any(_step(finding) == 16 for finding in findings):
            code = "unusable_key"
        self._enter(16, expected, got, code)

    def _findings(self, step: int, findings: Sequence[Finding]) -> None:
        """17 to 19. The linter finds nothing wrong."""
        wrong = "; ".join(
            f"{finding.statement or 'the key'}: {finding.detail} ({finding.rule})"
            for finding in findings
            if _step(finding) == step
        )
        self._enter(step, _EXPECTED[step], wrong or _EXPECTED[step], _CODES[step] if wrong else None)

    def _mutability(self, mutable: Mutability) -> None:
        """20. LOCKED, or MUTABLE-BY those whom the policy trusts."""
        administrators = self._rule.administrators
        expected = f"LOCKED, or MUTABLE-BY({', '.join(administrators)})" if administrators else "LOCKED"
        trusted = isinstance(mutable, Locked) or not mutable.untrusted(administrators)
        self._enter(20, expected, str(mutable), None if trusted else "mutable_key")

    def wrapped_key(self) -> None:
        """21. The wrapped key in use is under this key, for this purpose and context, and not an older one."""
        wrapped = self._rule.wrapped_key
        if wrapped is None:
            self.no_wrapped_key("each prompt has a wrapped key of its own")
        elif isinstance(wrapped, Ignore):
            self._checklist.add(Check(21, self._name(21), Status.IGNORED, explanation=wrapped.reason))
        else:
            self._wrapped_key(wrapped)

    def no_wrapped_key(self, reason: str) -> None:
        """21, where there is none yet to judge."""
        self._checklist.add(Check(21, self._name(21), Status.NOT_APPLICABLE, explanation=reason))

    def _wrapped_key(self, wrapped: WrappedKeyFile) -> None:
        rule, header = self._rule, wrapped.header
        expected = (
            f"for a {self._purpose.value}, under {rule.key.text},"
            f" context {rule.context}, version {rule.minimum_version} or later"
        )
        if header is None:
            self._enter(21, expected, f"no file {wrapped.file}", "wrong_wrapped_key")
            return
        got = (
            f"for a {header.purpose.value}, under {header.key.text}, context {header.context}, version {header.version}"
        )
        code = None
        try:
            require_header(
                header,
                purpose=self._purpose,
                key=rule.key,
                context=rule.context,
                minimum_version=rule.minimum_version,
            )
        except EnvelopeError as error:
            code = "rolled_back" if error.code == "rolled_back" else "wrong_wrapped_key"
        self._enter(21, expected, f"{got} ({wrapped.file})", code)

    def _enter(self, step: int, expected: str, got: str, code: str | None) -> None:
        status = Status.PASSED if code is None else Status.FAILED
        meaning = None if code is None else _MEANING[code]
        self._checklist.add(Check(step, self._name(step), status, expected, got, code, meaning))

    def _name(self, step: int) -> str:
        return f"{KEY_STEPS[step]} ({self._purpose.table})"


def _kind(metadata: KeyMetadata) -> str:
    """What ``_FIT`` is compared with."""
    in_use = metadata.state if metadata.enabled else f"{metadata.state} (not enabled)"
    return f"{in_use}, {metadata.usage}, {metadata.spec}, origin {metadata.origin}, managed by {metadata.manager}"


def _step(finding: Finding) -> int | None:
    """Which step a finding fails. None: something to know, or a change that step 20 judges by its own measure."""
    if finding.rule in _STEPS:
        return _STEPS[finding.rule]
    if finding.severity is not Severity.ERROR or finding.rule == "untrusted_administrator":
        return None
    return 18
