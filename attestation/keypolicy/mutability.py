"""Who can change later what a key opens to: a policy that somebody can change proves nothing about later."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import Final, TypeAlias

from attestation.keypolicy.actions import POWERS, PREFIX, Power, covered
from attestation.keypolicy.answers import Grant, KeyMetadata
from attestation.keypolicy.document import EVERYONE, Effect, KeyPolicy, Principal, PrincipalKind, Statement

MADE_BY_KMS: Final = "AWS_KMS"
"""The origin of key material that never left KMS."""

_CREATE_GRANT: Final = f"{PREFIX}CreateGrant"


@dataclass(frozen=True, slots=True)
class Changer:
    """Somebody who can change what the key opens to, and by what."""

    principal: str
    """An ARN; ``*`` for everybody; else the kind of principal and its name."""
    actions: tuple[str, ...]
    """The permissions that it takes, sorted."""
    statement: str
    """Which statement, by its label, or which grant, by its id, gives them."""


@dataclass(frozen=True, slots=True)
class Locked:
    """Nobody can: no principal may change the policy, grant, copy the key or give it other material.

    AWS itself can still help an account's owner whose key nobody manages; to trust KMS is to trust it in this too.
    """

    def __str__(self) -> str:
        return "LOCKED"


@dataclass(frozen=True, slots=True)
class MutableBy:
    """These can."""

    changers: tuple[Changer, ...]
    """One or more."""

    @property
    def principals(self) -> tuple[str, ...]:
        """Each once, sorted."""
        return tuple(sorted({changer.principal for changer in self.changers}))

    def untrusted(self, administrators: Collection[str]) -> tuple[Changer, ...]:
        """Those that are none of ``administrators``, which are ARNs. An account's root ARN stands for whomever the
        IAM policies of that account name.
        """
        return tuple(changer for changer in self.changers if changer.principal not in administrators)

    def __str__(self) -> str:
        return f"MUTABLE-BY({', '.join(self.principals)})"


Mutability: TypeAlias = Locked | MutableBy


def mutability(policy: KeyPolicy, metadata: KeyMetadata | None = None, grants: Sequence[Grant] = ()) -> Mutability:
    """Who can change what a key with this policy opens to.

    A condition on a permission to change is not counted on. Without ``metadata`` the key is taken for one that can be
    copied into other regions, and be given other material.
    """
    possible = frozenset(_effective(metadata))
    left = {is_aws: possible - _denied(policy, is_aws) for is_aws in (True, False)}
    changers = [
        Changer(name_of(principal), tuple(sorted(actions)), label(index, statement))
        for index, statement in enumerate(policy.statements)
        if statement.effect is Effect.ALLOW
        for principal in statement.principals or (EVERYONE,)
        if (actions := changing(statement, left[principal.kind is PrincipalKind.AWS]))
    ]
    changers += (
        Changer(grant.grantee_principal, (_CREATE_GRANT,), grant.grant_id)
        for grant in grants
        if _CREATE_GRANT in left[grant.grantee_principal.startswith("arn:")]
        and _CREATE_GRANT in (f"{PREFIX}{operation}" for operation in grant.operations)
    )
    return MutableBy(tuple(changers)) if changers else Locked()


def changing(statement: Statement, effective: Collection[str] = POWERS) -> frozenset[str]:
    """The permissions to change that an Allow statement covers, among ``effective``; and the actions in it that are not
    known, since nobody can say what those do.
    """
    known, unknown = covered(statement)
    return frozenset(each for each in known if POWERS[each] is Power.CHANGES and each in effective) | unknown


def label(index: int, statement: Statement) -> str:
    """What a statement is called: its Sid, else its place in the policy, from 0."""
    return statement.sid or f"Statement[{index}]"


def name_of(principal: Principal) -> str:
    """A principal as it is shown, and compared with administrators."""
    if principal.kind in (PrincipalKind.EVERYONE, PrincipalKind.AWS):
        return principal.value
    return f"{principal.kind.value} {principal.value}"


def is_everybody(statement: Statement) -> bool:
    """Whether the statement is about everybody in AWS. KMS keeps ``"*"`` as ``{"AWS": "*"}`` at times."""
    return any(
        principal.kind in (PrincipalKind.EVERYONE, PrincipalKind.AWS) and principal.value == "*"
        for principal in statement.principals
    )


def _effective(metadata: KeyMetadata | None) -> Iterator[str]:
    """The permissions that can change something about a key of this kind."""
    for action in POWERS:
        if action == f"{PREFIX}ReplicateKey" and metadata is not None and not metadata.multi_region:
            continue
        if action == f"{PREFIX}ImportKeyMaterial" and metadata is not None and metadata.origin == MADE_BY_KMS:
            continue
        yield action


def _denied(policy: KeyPolicy, is_aws: bool) -> frozenset[str]:
    """What everybody is denied, whatever the circumstances: every principal of the kind AWS, or really everybody. A
    Deny of ``{"AWS": "*"}`` may spare services and federations.
    """
    return frozenset(
        action
        for statement in policy.statements
        if statement.effect is Effect.DENY and statement.actions and not statement.conditions
        if "*" in statement.resources and (is_everybody(statement) if is_aws else EVERYONE in statement.principals)
        for action in covered(statement)[0]
    )
