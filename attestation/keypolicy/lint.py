"""Judges whether a key opens to the accepted releases and to nothing else.

The rule behind the rules is a whitelist: a statement that could allow to open the key passes only if every request
that it allows comes from one and the same release. That is computed, from its own conditions and from what is denied
to everybody. Whatever else is reported says why it does not pass, or what weakens a policy that does.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import Final

from attestation.envelope import EnvelopePurpose
from attestation.keypolicy.actions import POWERS, PREFIX, WITH_OTHER_KEYS, Power, covered, matching
from attestation.keypolicy.answers import Grant, KeyMetadata
from attestation.keypolicy.attested import (
    CONTEXT_KEY,
    PURPOSE_KEY,
    VARIABLE,
    Gap,
    Registers,
    ReleasedTo,
    asked,
    both,
    digest_of,
    gap,
    gap_of_one,
    is_of_nitro_tpm,
    meant,
    operator_of,
    register_key,
    register_of,
    withheld,
)
from attestation.keypolicy.conditions import Operator, Quantifier, Truth, arn_matches
from attestation.keypolicy.document import (
    Condition,
    Effect,
    KeyArn,
    KeyPolicy,
    Principal,
    PrincipalKind,
    Statement,
)
from attestation.keypolicy.findings import Finding
from attestation.keypolicy.mutability import (
    MADE_BY_KMS,
    Locked,
    is_everybody,
    label,
    mutability,
    name_of,
)
from attestation.reference import PCR_IMAGE, ZERO_PCR

_ACCOUNT: Final = re.compile(r"[0-9]{12}|arn:[a-z-]+:iam::[0-9]{12}:root")
_OF_ACCOUNT: Final = re.compile(r"arn:[^:]*:[a-z]+::(?P<account>[0-9]{12}):.*")
_EVERY_ACTION: Final = frozenset(("*", f"{PREFIX}*"))
_OF_ACTION: Final = {
    f"{PREFIX}ReEncryptFrom": "reencrypt",
    f"{PREFIX}CreateGrant": "create_grant",
    f"{PREFIX}ReplicateKey": "replicate_key",
    f"{PREFIX}ImportKeyMaterial": "import_key_material",
    f"{PREFIX}UpdatePrimaryRegion": "primary_region",
    f"{PREFIX}SynchronizeMultiRegionKey": "primary_region",
    **dict.fromkeys(sorted(WITH_OTHER_KEYS), "unfit_action"),
}
_USE: Final = (Power.OPENS, Power.SEALS)
_ADMINISTRATION: Final = (Power.CHANGES, Power.COPIES, Power.DESTROYS)


def lint(
    policy: KeyPolicy,
    *,
    releases: Sequence[ReleasedTo] | None,
    purpose: EnvelopePurpose | None,
    context: str | None,
    administrators: Collection[str] = (),
    metadata: KeyMetadata | None = None,
    grants: Sequence[Grant] = (),
    account: str | None = None,
    copies: Collection[KeyArn] = (),
) -> tuple[Finding, ...]:
    """Every finding, in the order of the policy's statements, then of the grants, then of the key itself.

    ``releases``, one or more, is what the appraisal policy accepts; without it each statement is judged for having the
    shape of one release, whichever. ``purpose`` and ``context`` are what the key is for; without them each statement's
    own are taken. ``administrators`` are the ARNs of those who are trusted to change what the key opens to.
    ``metadata`` and ``grants`` are those of the key; for a policy that no key has yet, ``account`` is the one it is
    meant for. ``copies`` are the key's copies in other regions whose policies the caller judges as well, by calls of
    their own.

    Raises KeyPolicyError with ``unpinned_register`` for a release that accepts any model or configuration; ValueError
    for releases of which there is none.
    """
    if releases is not None and not releases:
        raise ValueError("a key policy is held against one release or more")
    judge = _Judge(
        policy=policy,
        releases=releases,
        purpose=purpose,
        context=context,
        administrators=frozenset(administrators),
        key=None if metadata is None else metadata.arn,
        account=account if metadata is None else metadata.account,
    )
    return (
        *judge.statements(),
        *judge.whole(),
        *judge.changers(metadata, grants),
        *_grants(grants),
        *(() if metadata is None else _key(metadata, copies)),
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class _Judge:
    """One policy, and what it is held against."""

    policy: KeyPolicy
    releases: Sequence[ReleasedTo] | None
    purpose: EnvelopePurpose | None
    context: str | None
    administrators: frozenset[str]
    key: KeyArn | None
    account: str | None

    def statements(self) -> Iterator[Finding]:
        for index, statement in enumerate(self.policy.statements):
            where = label(index, statement)
            yield from self._wherever(statement, where)
            if statement.effect is Effect.ALLOW:
                yield from self._allow(statement, where)
            else:
                yield from self._deny(statement, where)

    def whole(self) -> Iterator[Finding]:
        """What no single statement shows."""
        administrators, users = (self._holders(powers) for powers in (_ADMINISTRATION, _USE))
        for name in sorted(administrators & users):
            yield Finding("administers_and_uses", None, name)
        for release in self.releases or ():
            if not any(self._opens_to(statement, release) for statement in self.policy.statements):
                yield Finding("release_without_statement", None, f"release {release.name}: KMS refuses its enclaves")

    def changers(self, metadata: KeyMetadata | None, grants: Sequence[Grant]) -> Iterator[Finding]:
        found = mutability(self.policy, metadata, grants)
        for changer in () if isinstance(found, Locked) else found.changers:
            rule = "changeable" if changer.principal in self.administrators else "untrusted_administrator"
            yield Finding(rule, changer.statement, f"{changer.principal} may {_list(changer.actions)}")

    # Any statement

    def _wherever(self, statement: Statement, where: str) -> Iterator[Finding]:
        for condition in statement.conditions:
            if operator_of(condition) is None:
                yield Finding("unknown_operator", where, _shown(condition))
            if (key := meant(condition.key)) is not None:
                yield Finding("misspelt_key", where, f"{condition.key}: the nearest that KMS has is {key}")
        for resource in statement.resources:
            if resource.startswith("alias/") or ":alias/" in resource:
                yield Finding("alias_resource", where, resource)
            elif not self._may_be_this_key(resource):
                yield Finding("other_resource", where, resource)

    def _may_be_this_key(self, resource: str) -> bool:
        if resource == "*" or VARIABLE in resource:
            return True
        if self.key is None:
            return resource.startswith("arn:")
        return arn_matches(resource, self.key.text) is Truth.YES

    # Deny

    def _deny(self, statement: Statement, where: str) -> Iterator[Finding]:
        """Nothing that is denied opens the key; but somebody may rely on more than what is denied."""
        known, _ = covered(statement)
        is_meant = any(POWERS[action] is Power.OPENS for action in known) and any(
            operator is not None and operator.is_negated and register_of(condition.key) is not None
            for condition in statement.conditions
            for operator in [operator_of(condition)]
        )
        if is_meant and not self._withheld(statement):
            why = "it does not deny a request without attestation, or not every other value"
            if len(statement.conditions) > 1:
                why = "all of its conditions must hold: it denies only what differs in each of them"
            elif not is_everybody(statement):
                why = "it denies some principals, and not everybody"
            yield Finding("weak_deny", where, f"{why}: {'; '.join(map(_shown, statement.conditions))}")

    def _withheld(self, statement: Statement) -> Registers:
        """What a Deny leaves to everybody, of the one register that it is about."""
        is_of_key = "*" in statement.resources or (self.key is not None and self.key.text in statement.resources)
        if len(statement.conditions) == 1 and is_of_key and is_everybody(statement):
            return withheld(statement.conditions[0])
        return {}

    def _left_by_denials(self, action: str, statement: Statement) -> Registers:
        """What every Deny together leaves to the principals of an Allow; a Deny of everybody may spare services."""
        left: Registers = {}
        if statement.principals and all(each.kind is PrincipalKind.AWS for each in statement.principals):
            for deny in self.policy.statements:
                if deny.effect is Effect.DENY and action in covered(deny)[0]:
                    left = both(left, self._withheld(deny))
        return left

    # Allow

    def _allow(self, statement: Statement, where: str) -> Iterator[Finding]:
        known, unknown = covered(statement)
        opened = sorted(action for action in known if POWERS[action] is Power.OPENS)
        short = self._gap(statement, opened)
        for action in sorted(unknown):
            yield Finding("unknown_action", where, action)
        accounts = [name_of(each) for each in statement.principals if _is_account(each)]
        changed = sorted(action for action in known if POWERS[action] is Power.CHANGES)
        if accounts and (short is not None or (changed and not self.administrators.issuperset(accounts))):
            powers = [*(opened if short is not None else ()), *changed]
            yield Finding("root_delegation", where, f"{_list(accounts)} may {_list(powers)}")
            return
        yield from self._principals(statement, where)
        yield from self._actions(statement, where)
        if opened:
            yield from self._opening(statement, where, opened, short)
        elif any(POWERS[action] is Power.SEALS for action in known) and None in self._context_of(statement):
            yield Finding("unconditioned_sealing", where, f"{_principals_of(statement)} may encrypt")

    def _principals(self, statement: Statement, where: str) -> Iterator[Finding]:
        for name in map(name_of, statement.not_principals):
            yield Finding("not_principal", where, f"everybody but {name}")
        for principal in statement.principals:
            found = _OF_ACCOUNT.fullmatch(principal.value)
            if "*" in principal.value:
                yield Finding("wildcard_principal", where, name_of(principal))
            elif _is_account(principal) or principal.kind is not PrincipalKind.AWS:
                yield Finding("broad_principal", where, name_of(principal))
            elif found and self.account is not None and found["account"] != self.account:
                yield Finding("other_account", where, f"{principal.value}; the key's account is {self.account}")

    def _actions(self, statement: Statement, where: str) -> Iterator[Finding]:
        for pattern in statement.not_actions:
            yield Finding("not_action", where, f"everything but {pattern}")
        for resource in statement.not_resources:
            yield Finding("not_resource", where, f"everything but {resource}")
        named: set[str] = set()
        for pattern in statement.actions:
            actions = matching(pattern)
            exact = len(actions) == 1 and not {"*", "?"} & set(pattern)
            strong = sorted(action for action in actions if POWERS[action] in (Power.OPENS, Power.CHANGES))
            if strong and not exact:
                yield Finding("wildcard_action", where, f"{pattern} covers {_list(strong)}")
            if exact or pattern not in _EVERY_ACTION:
                named |= actions if exact else actions - WITH_OTHER_KEYS
        for action in sorted(named & _OF_ACTION.keys()):
            yield Finding(_OF_ACTION[action], where, f"{_principals_of(statement)} may {action}")
        if ending := sorted(action for action in named if POWERS[action] is Power.DESTROYS):
            yield Finding("can_destroy", where, f"{_principals_of(statement)} may {_list(ending)}")

    # Allow, of what opens

    def _gap(self, statement: Statement, opened: Sequence[str]) -> Gap | None:
        """Between what is certain of those whom the statement lets open the key, and one release."""
        gaps = (self._shortfall(self._found(statement, action), statement) for action in opened)
        return next((each for each in gaps if each is not None), None)

    def _found(self, statement: Statement, action: str) -> Registers:
        return both(asked(statement.conditions), self._left_by_denials(action, statement))

    def _shortfall(self, found: Registers, statement: Statement) -> Gap | None:
        purpose = self._purpose_of(statement)
        if self.releases is None:
            return gap_of_one(found, purpose)
        return gap(found, [release.registers(purpose) for release in self.releases])

    def _opening(self, statement: Statement, where: str, opened: Sequence[str], short: Gap | None) -> Iterator[Finding]:
        about = [each for each in statement.conditions if register_of(each.key) is not None]
        others = [each for each in statement.conditions if is_of_nitro_tpm(each.key)]
        for condition in others:
            yield Finding("nitro_tpm", where, condition.key)
        for condition in about:
            yield from _of_register(condition, where)
        may = f"{_principals_of(statement)} may {_list(opened)}"
        own = asked(statement.conditions)
        if short is None and self._shortfall(own, statement) is not None:
            yield Finding("bound_by_deny", where, may)
        elif short is not None:
            mentioned = {register_of(each.key) for each in about}
            missing = [register_key(index) for index in short.missing if index not in mentioned]
            if missing and not (about or others or any(map(meant, (each.key for each in statement.conditions)))):
                beside = [each for each in self.policy.statements if each is not statement and asked(each.conditions)]
                void = ", and makes void what other statements ask for" if beside else ""
                yield Finding("unattested", where, f"{may}{void}")
            elif missing:
                rule = "image_alone" if mentioned == {PCR_IMAGE} else "missing_register"
                yield Finding(rule, where, f"{may} without {_list(missing)}")
            for index, values in short.foreign.items():
                rest = values - own.get(index, frozenset()) if values == {ZERO_PCR} else values
                if rest:
                    rule = "mixed_releases" if short.is_mixed else "unknown_release"
                    yield Finding(rule, where, f"{register_key(index)}: {_list(sorted(each.hex() for each in rest))}")
        yield from self._context(statement, where)

    def _context_of(self, statement: Statement) -> tuple[tuple[str, ...] | None, tuple[str, ...] | None]:
        """The purposes and the contexts that a statement asks for; None for what it does not ask for."""
        plain = {
            each.key.lower(): each.values
            for each in statement.conditions
            if each.operator == "StringEquals" and not any(VARIABLE in value for value in each.values)
        }
        return plain.get(PURPOSE_KEY.lower()), plain.get(CONTEXT_KEY.lower())

    def _purpose_of(self, statement: Statement) -> EnvelopePurpose:
        """What a statement opens the key for: the purpose that asks for more, where that is not clear."""
        purposes, _ = self._context_of(statement)
        return self.purpose or (
            EnvelopePurpose.MODEL if purposes == (EnvelopePurpose.MODEL.value,) else EnvelopePurpose.PROMPT
        )

    def _context(self, statement: Statement, where: str) -> Iterator[Finding]:
        purposes, contexts = self._context_of(statement)
        known = tuple(EnvelopePurpose) if self.purpose is None else (self.purpose,)
        for key, values, accepted in (
            (PURPOSE_KEY, purposes, [each.value for each in known]),
            (CONTEXT_KEY, contexts, contexts if self.context is None else [self.context]),
        ):
            if values is None:
                yield Finding("unconditioned_context", where, f"{key} is not asked for")
            elif len(values) > 1 or values[0] not in (accepted or ()):
                expected = f"; expected {_list(accepted or ())}" if len(values) == 1 else "; expected one"
                yield Finding("wrong_context", where, f"{key}: {_list(values)}{expected}")

    # The policy as a whole

    def _holders(self, powers: Collection[Power]) -> set[str]:
        """The principals by name, accounts left out, that are allowed something of these powers."""
        return {
            name_of(principal)
            for statement in self.policy.statements
            if statement.effect is Effect.ALLOW and any(POWERS[action] in powers for action in covered(statement)[0])
            for principal in statement.principals
            if principal.kind is PrincipalKind.AWS and "*" not in principal.value and not _is_account(principal)
        }

    def _opens_to(self, statement: Statement, release: ReleasedTo) -> bool:
        decrypt = f"{PREFIX}Decrypt"
        if statement.effect is Effect.DENY or decrypt not in covered(statement)[0]:
            return False
        found, registers = self._found(statement, decrypt), release.registers(self._purpose_of(statement))
        return all(found.get(index, values) & values for index, values in registers.items())


def _of_register(condition: Condition, where: str) -> Iterator[Finding]:
    """What is wrong with one condition on a register, in an Allow."""
    operator = operator_of(condition)
    if operator is None:
        return
    if (rule := _against(operator)) is not None:
        yield Finding(rule, where, _shown(condition))
        return
    for value in condition.values:
        if VARIABLE in value:
            yield Finding("policy_variable", where, f"{condition.key}: {value}")
        elif (digest := digest_of(value)) is None:
            yield Finding("malformed_register", where, f"{condition.key}: {value}")
        elif digest == ZERO_PCR:
            yield Finding("zero_register", where, condition.key)
    if operator == Operator("StringEquals"):
        upper = any(value != value.lower() for value in condition.values)
        why = "in upper case, so that it never holds" if upper else "in lower case, as KMS writes them today"
        yield Finding("case_sensitive", where, f"{condition.key}: digits {why}")


def _against(operator: Operator) -> str | None:
    """The rule against an operator on a register in an Allow. None: it is plain equality."""
    if operator.compares == "Null":
        return "null_condition"
    if operator.if_exists:
        return "if_exists"
    if operator.quantifier is not None:
        return "for_all_values" if operator.quantifier is Quantifier.FOR_ALL_VALUES else "for_any_value"
    if operator.is_negated:
        return "negated_operator"
    if operator.compares in ("StringEquals", "StringEqualsIgnoreCase"):
        return None
    return "pattern_operator" if operator.compares in ("StringLike", "ArnLike", "ArnEquals") else "wrong_operator"


def _grants(grants: Sequence[Grant]) -> Iterator[Finding]:
    for grant in grants:
        powers = {POWERS.get(f"{PREFIX}{operation}", Power.OPENS) for operation in grant.operations}
        may = f"{grant.grantee_principal} may {_list(grant.operations)}"
        if Power.OPENS in powers:
            yield Finding("grant_opens", grant.grant_id, may)
        elif Power.SEALS in powers:
            yield Finding("grant_seals", grant.grant_id, may)


def _key(metadata: KeyMetadata, copies: Collection[KeyArn]) -> Iterator[Finding]:
    if not metadata.enabled or metadata.state != "Enabled":
        yield Finding("not_enabled", None, f"state {metadata.state}, {'' if metadata.enabled else 'not '}enabled")
    kind = (metadata.usage, metadata.spec, metadata.manager)
    if kind != ("ENCRYPT_DECRYPT", "SYMMETRIC_DEFAULT", "CUSTOMER"):
        yield Finding("wrong_key", None, f"usage {kind[0]}, spec {kind[1]}, managed by {kind[2]}")
    if metadata.origin != MADE_BY_KMS:
        yield Finding("foreign_material", None, f"origin {metadata.origin}")
    if metadata.multi_region:
        yield Finding("multi_region", None, metadata.arn.text)
    known = [*(() if metadata.primary is None else (metadata.primary,)), *metadata.replicas]
    for other in known:
        if other != metadata.arn and other not in copies:
            yield Finding("unseen_copy", None, other.text)


def _is_account(principal: Principal) -> bool:
    """Whether it stands for an account, whose IAM policies decide the rest."""
    return principal.kind is PrincipalKind.AWS and _ACCOUNT.fullmatch(principal.value) is not None


def _principals_of(statement: Statement) -> str:
    if statement.not_principals:
        return f"everybody but {_list([name_of(each) for each in statement.not_principals])}"
    return _list([name_of(each) for each in statement.principals])


def _shown(condition: Condition) -> str:
    return f"{condition.operator} on {condition.key}"


def _list(texts: Collection[str]) -> str:
    return ", ".join(texts)
