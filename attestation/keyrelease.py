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
from typing import Final, NoReturn, final

from attestation.checklist import Checklist
from attestation.checks import KEY_STEPS, Check, Status
from attestation.envelope import EnvelopeError, EnvelopePurpose, require_header
from attestation.errors import AppraisalError, PolicyError
from attestation.keypolicy.answers import Grant, KeyMetadata
from attestation.keypolicy.attested import ReleasedTo
from attestation.keypolicy.document import KeyArn, KeyPolicy
from attestation.keypolicy.findings import Finding, Severity
from attestation.keypolicy.lint import lint
from attestation.keypolicy.mutability import Locked, Mutability, mutability
from attestation.policy import AppraisalPolicy
from attestation.reference import PCR_CONFIGURATION, PCR_MODEL, once_extended
from attestation.rules import Ignore, KeyRule


@dataclass(frozen=True, slots=True)
class KeyFacts:
    """What KMS says of a key now: the answers of DescribeKey, GetKeyPolicy and ListGrants."""

    metadata: KeyMetadata
    policy: KeyPolicy
    grants: tuple[Grant, ...]


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
    purpose: EnvelopePurpose
    rule: KeyRule
    mutability: Mutability
    """LOCKED, or who may change later what was judged now. The policy trusts them."""
    models: tuple[bytes, ...]
    configurations: tuple[bytes, ...]
    """Digests of manifests and configurations that the policy accepts: an envelope's grant."""
    checks: tuple[Check, ...]
    _: KW_ONLY
    proof: InitVar[_Proof]

    def __post_init__(self, proof: _Proof) -> None:
        if proof is not _PROVEN:
            raise TypeError("only judge_key makes a verdict")

    def __reduce_ex__(self, protocol: object, /) -> NoReturn:
        raise TypeError("a KeyRelease does not travel; judge again")

    def as_json(self) -> dict[str, object]:
        return {
            "verdict": "accepted",
            "key": self.key.text,
            "purpose": self.purpose.value,
            "mutability": str(self.mutability),
            "checks": [check.as_json() for check in self.checks],
        }


def judge_key(policy: AppraisalPolicy, purpose: EnvelopePurpose, facts: KeyFacts) -> KeyRelease:
    """Steps 16 to 21 for the policy's key of ``purpose``, without Evidence of an enclave.

    Raises PolicyError ``missing_field`` when the policy names no such key, and AppraisalError with every check.
    """
    rule = policy.kms.get(purpose)
    if rule is None:
        raise PolicyError("missing_field", "the policy names no key for this", field=f"kms.{purpose.table}", got="none")
    checklist = Checklist(KEY_STEPS)
    mutable = _judge(checklist, policy, rule, purpose, facts)
    checklist.add(Check(21, KEY_STEPS[21], Status.NOT_APPLICABLE, explanation="a new one is about to be made"))
    failures = checklist.failures()
    if failures:
        names = ", ".join(check.name for check in failures)
        first = failures[0]
        error = AppraisalError(
            first.code or "", f"the policy refuses this key: {names}", expected=first.expected, got=first.got
        )
        error.checks = checklist.complete()
        raise error
    return KeyRelease(
        rule.key,
        purpose,
        rule,
        mutable,
        policy.accepted_models,
        policy.accepted_configurations,
        checklist.complete(),
        proof=_PROVEN,
    )


def judge_keys(checklist: Checklist, policy: AppraisalPolicy, facts: Mapping[KeyArn, KeyFacts]) -> None:
    """Enters steps 16 to 21 for every key that ``policy`` names; ``facts`` has them all (:func:`require_facts`)."""
    for purpose, rule in policy.kms.items():
        _judge(checklist, policy, rule, purpose, facts[rule.key])
        _Judgement(checklist, purpose).wrapped_key(rule)


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
    """What the key's own policy has to ask for, release by release: PCR16 is still open when a model's key is
    released.
    """
    for release in policy.accepted_releases:
        registers: dict[int, tuple[bytes, ...]] = {
            index: (value,) for index, value in release.pcrs.as_registers().items()
        }
        registers[PCR_CONFIGURATION] = tuple(map(once_extended, policy.configurations_of(release)))
        if purpose is EnvelopePurpose.PROMPT:
            registers[PCR_MODEL] = tuple(map(once_extended, policy.models_of(release)))
        if all(registers.values()):  # else nothing may run in it
            yield ReleasedTo(release.name, registers)


_STEPS = {"wrong_key": 16, "foreign_material": 16, "multi_region": 17, "unseen_copy": 17, "grant_opens": 19}
"""The linter's findings by the step that they fail; all others that are errors fail 18."""

_CODES = {17: "copied_key", 18: "open_key_policy", 19: "granted_key"}

_EXPECTED = {
    17: "a key of one region",
    18: "a policy that releases to the accepted releases and to nothing else",
    19: "no grant that opens the key",
}

_MEANING = {
    "wrong_key": "KMS describes another key than the policy names",
    "unusable_key": "the key is not in use, or not one that a data key can be wrapped under safely",
    "copied_key": "another region may have the key under a policy that nobody has judged",
    "open_key_policy": "KMS would release to something else than the policy accepts",
    "granted_key": "somebody has a permission beside the key's policy, which asks for no attestation",
    "mutable_key": "what was judged now may be changed later by somebody whom the policy does not trust",
    "wrong_wrapped_key": "the wrapped key is not the one that the policy is about",
    "rolled_back": "an older wrapped key: somebody may be playing back what was replaced",
}


def _judge(
    checklist: Checklist, policy: AppraisalPolicy, rule: KeyRule, purpose: EnvelopePurpose, facts: KeyFacts
) -> Mutability:
    findings = lint(
        facts.policy,
        metadata=facts.metadata,
        releases=tuple(released_to(policy, purpose)),
        purpose=purpose,
        context=rule.context,
        grants=facts.grants,
        administrators=rule.administrators,
    )
    mutable = mutability(facts.policy, facts.metadata, facts.grants)
    judgement = _Judgement(checklist, purpose)
    judgement.metadata(rule.key, facts.metadata, findings)
    for step in (17, 18, 19):
        judgement.findings(step, findings)
    judgement.mutability(rule, mutable)
    return mutable


class _Judgement:
    """Steps 16 to 21 for one key, as they are entered."""

    def __init__(self, checklist: Checklist, purpose: EnvelopePurpose) -> None:
        self._checklist = checklist
        self._purpose = purpose

    def metadata(self, key: KeyArn, metadata: KeyMetadata, findings: Sequence[Finding]) -> None:
        """16. The key that is named, in use and made by KMS."""
        expected = f"{key.text}: Enabled"
        wrong = "; ".join(finding.why for finding in findings if _step(finding) == 16)
        if metadata.arn != key:
            self._enter(16, expected, metadata.arn.text, "wrong_key")
        elif not metadata.enabled or metadata.state != "Enabled":
            self._enter(16, expected, f"{key.text}: {metadata.state}", "unusable_key")
        else:
            self._enter(16, expected, wrong or expected, "unusable_key" if wrong else None)

    def findings(self, step: int, findings: Sequence[Finding]) -> None:
        """17 to 19. The linter finds nothing wrong."""
        wrong = "; ".join(
            f"{finding.statement or 'the key'}: {finding.why} ({finding.rule})"
            for finding in findings
            if _step(finding) == step
        )
        self._enter(step, _EXPECTED[step], wrong or _EXPECTED[step], _CODES[step] if wrong else None)

    def mutability(self, rule: KeyRule, mutable: Mutability) -> None:
        """20. LOCKED, or MUTABLE-BY those whom the policy trusts."""
        expected = "LOCKED"
        if rule.administrators:
            expected += f", or MUTABLE-BY({', '.join(rule.administrators)})"
        trusted = isinstance(mutable, Locked) or not mutable.untrusted(rule.administrators)
        self._enter(20, expected, str(mutable), None if trusted else "mutable_key")

    def wrapped_key(self, rule: KeyRule) -> None:
        """21. The wrapped key in use is under this key, for this purpose and context, and not an older one."""
        wrapped = rule.wrapped_key
        if wrapped is None:
            reason = "each prompt has a wrapped key of its own"
            self._checklist.add(Check(21, self._name(21), Status.NOT_APPLICABLE, explanation=reason))
        elif isinstance(wrapped, Ignore):
            self._checklist.add(Check(21, self._name(21), Status.IGNORED, explanation=wrapped.reason))
        else:
            header, code = wrapped.header, None
            expected = f"{rule.key.text}, context {rule.context}, version {rule.minimum_version} or later"
            if header is None:
                self._enter(21, expected, f"no file {wrapped.file}", "wrong_wrapped_key")
                return
            got = f"{header.key.text}, context {header.context}, version {header.version} ({wrapped.file})"
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
            self._enter(21, expected, got, code)

    def _enter(self, step: int, expected: str, got: str, code: str | None) -> None:
        status = Status.PASSED if code is None else Status.FAILED
        meaning = None if code is None else _MEANING[code]
        self._checklist.add(Check(step, self._name(step), status, expected, got, code, meaning))

    def _name(self, step: int) -> str:
        return f"{KEY_STEPS[step]} ({self._purpose.table})"


def _step(finding: Finding) -> int | None:
    """Which step a finding fails. None: something to know, or a change that step 20 judges by its own measure."""
    if finding.rule in _STEPS:
        return _STEPS[finding.rule]
    if finding.severity is not Severity.ERROR or finding.rule == "untrusted_administrator":
        return None
    return 18
