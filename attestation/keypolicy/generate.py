"""Writes the policy of a key that opens to the accepted releases and to nothing else. PROTOCOL.md section 3.2.

Three kinds of statements, for three kinds of people: to open, one for each release, under attestation; to seal, without
opening; to administer, without either. :mod:`attestation.keypolicy.lint` finds no error in what this makes, where the
administrators are trusted.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from typing import Final

from attestation.envelope import CONTEXT_NAME, EnvelopePurpose
from attestation.keypolicy.actions import POWERS, PREFIX, Power, covered, matching
from attestation.keypolicy.attested import CONTEXT_KEY, IMAGE_KEY, PURPOSE_KEY, ReleasedTo, register_key
from attestation.keypolicy.document import (
    Condition,
    Effect,
    KeyPolicy,
    KeyPolicyError,
    Principal,
    PrincipalKind,
    Statement,
)
from attestation.reference import PCR_IMAGE

OPENS: Final = (f"{PREFIX}Decrypt",)
SEALS: Final = (f"{PREFIX}Encrypt", f"{PREFIX}GenerateDataKey", f"{PREFIX}GenerateDataKeyWithoutPlaintext")
READS: Final = (f"{PREFIX}DescribeKey", f"{PREFIX}GetKeyPolicy", f"{PREFIX}ListGrants", f"{PREFIX}ListKeyPolicies")
"""What judging a key takes."""
CHANGES: Final = (f"{PREFIX}PutKeyPolicy",)
KEEPS: Final = tuple(
    f"{PREFIX}{operation}"
    for operation in (
        *("CancelKeyDeletion", "DisableKey", "DisableKeyRotation", "EnableKey", "EnableKeyRotation"),
        *("GetKeyRotationStatus", "ListKeyRotations", "ListResourceTags", "RevokeGrant", "RotateKeyOnDemand"),
        *("ScheduleKeyDeletion", "TagResource", "UntagResource", "UpdateKeyDescription"),
    )
)
"""Administration that leaves alone to whom the key opens."""

_NO_SID: Final = re.compile(r"[^A-Za-z0-9]+")
_LONGEST_SID: Final = 64
_PERSON: Final = re.compile(r"arn:aws(?:-[a-z]{1,8}){0,3}:iam::[0-9]{12}:(?:role|user)/[\w+=,.@/-]{1,576}", re.ASCII)


def generate(
    releases: Sequence[ReleasedTo],
    *,
    purpose: EnvelopePurpose,
    context: str,
    users: Sequence[str],
    sealers: Sequence[str],
    administrators: Sequence[str],
    readers: Sequence[str] = (),
) -> KeyPolicy:
    """The policy of a key for one ``purpose`` and one ``context``, 1 to 64 of ``a-z 0-9 . _ -``.

    The others are ARNs of roles and users. ``users``, those of the parents, may open under attestation; ``sealers`` may
    encrypt; ``administrators`` may change this policy and keep the key, and without any nobody can ever change it.
    ``readers``, sealers and administrators may read what there is to judge of a key.

    Raises KeyPolicyError: ``bad_principal``, ``same_principal`` for one who would both administer and use the key,
    ``bad_context``, ``no_release``, ``unpinned_register``, and ``policy_too_large`` for too many releases.
    """
    _require_apart(administrators, (*users, *sealers))
    policy = KeyPolicy(
        (
            *opening(releases, purpose=purpose, context=context, users=users),
            *_beside(purpose, context, sealers, administrators, readers),
        )
    )
    policy.encode()
    return policy


def closed(
    *,
    purpose: EnvelopePurpose,
    context: str,
    sealers: Sequence[str],
    administrators: Sequence[str],
    readers: Sequence[str] = (),
) -> KeyPolicy:
    """The policy of a key that opens to nobody yet, for one administrator or more: an image is measured with the ARN of
    the key that it will use, so that the key comes first, and :func:`roll_out` opens it.

    Raises KeyPolicyError as :func:`generate`.
    """
    _require_apart(administrators, sealers)
    if not administrators:
        raise KeyPolicyError("bad_principal", "a key that nobody could open", expected="an administrator", got="none")
    return KeyPolicy(tuple(_beside(purpose, context, sealers, administrators, readers)))


def _require_apart(administrators: Sequence[str], users: Sequence[str]) -> None:
    if both := sorted({*administrators} & {*users}):
        raise KeyPolicyError(
            "same_principal", "administration and use belong to different roles", expected="two roles", got=both[0]
        )


def _beside(
    purpose: EnvelopePurpose,
    context: str,
    sealers: Sequence[str],
    administrators: Sequence[str],
    readers: Sequence[str],
) -> Iterator[Statement]:
    """What a key's policy says beside what opens it."""
    if not re.fullmatch(CONTEXT_NAME, context):
        raise KeyPolicyError(
            "bad_context", "no name of a context", expected="1 to 64 of a-z 0-9 . _ -", got=ascii(context[:80])
        )
    yield from _statement("Seal", sealers, SEALS, _of_context(purpose, context))
    yield from _statement("Administer", administrators, (*CHANGES, *KEEPS))
    yield from _statement("Read", sorted({*readers, *sealers, *administrators}), READS)


def opening(
    releases: Sequence[ReleasedTo], *, purpose: EnvelopePurpose, context: str, users: Sequence[str]
) -> tuple[Statement, ...]:
    """The statements that open the key, one for each release. Raises KeyPolicyError as :func:`generate`."""
    if not releases:
        raise KeyPolicyError("no_release", "a key that opens to no release", expected="one release or more", got="none")
    if not users:
        raise KeyPolicyError("bad_principal", "a key that nobody may use", expected="one user or more", got="none")
    statements = (
        statement
        for release in releases
        for statement in _statement(
            f"Release {release.name}", users, OPENS, (*_attested(release, purpose), *_of_context(purpose, context))
        )
    )
    return _named_apart(statements)


def roll_out(policy: KeyPolicy, wanted: Sequence[Statement], *, finish: bool) -> KeyPolicy:
    """``policy`` with the statements of :func:`opening` that it lacks; to ``finish``, without all others that open.

    What does not open the key stays as it is. Statements are compared without their Sids. Raises KeyPolicyError with
    ``policy_too_large``.
    """
    alike = {replace(each, sid=None) for each in wanted}
    kept = tuple(
        each
        for each in policy.statements
        if not finish or replace(each, sid=None) in alike or not _holds(each, Power.OPENS)
    )
    there = {replace(each, sid=None) for each in kept}
    added = _named_apart((each for each in wanted if replace(each, sid=None) not in there), beside=kept)
    rolled = replace(policy, statements=(*added, *kept))
    rolled.encode()
    return rolled


def locked(policy: KeyPolicy) -> KeyPolicy:
    """``policy`` without anybody's permission to change what the key opens to.

    Raises KeyPolicyError with ``unlockable_policy`` when a pattern gives one, since nobody can tell which permissions
    beside it were meant; and when nothing else is in the policy.
    """
    statements = []
    for statement in policy.statements:
        left = _unchanging(statement) if statement.effect is Effect.ALLOW else statement.actions
        if left == statement.actions:
            statements.append(statement)
        elif left:
            statements.append(replace(statement, actions=left))
    if not statements:
        raise KeyPolicyError("unlockable_policy", "nothing else is in the policy", got="no statement")
    return replace(policy, statements=tuple(statements))


def _unchanging(statement: Statement) -> tuple[str, ...]:
    """The actions of an Allow that leave alone what the key opens to."""
    strong = {action for action, power in POWERS.items() if power is Power.CHANGES}
    patterns = [each for each in statement.actions if {"*", "?"} & set(each) and matching(each) & strong]
    if patterns or (statement.not_actions and covered(statement)[0] & strong):
        raise KeyPolicyError(
            "unlockable_policy",
            f"{statement.sid or 'a statement'} allows to change the key by a pattern: name each action first",
            expected="names of actions",
            got=", ".join(patterns) or "NotAction",
        )
    return tuple(each for each in statement.actions if not matching(each) & strong)


def _holds(statement: Statement, power: Power) -> bool:
    return statement.effect is Effect.ALLOW and any(POWERS[action] is power for action in covered(statement)[0])


def _attested(release: ReleasedTo, purpose: EnvelopePurpose) -> Iterator[Condition]:
    for index, values in release.registers(purpose).items():
        for key in (IMAGE_KEY, register_key(index)) if index == PCR_IMAGE else (register_key(index),):
            yield Condition("StringEqualsIgnoreCase", key, tuple(sorted(value.hex() for value in values)))


def _of_context(purpose: EnvelopePurpose, context: str) -> tuple[Condition, ...]:
    return (
        Condition("StringEquals", PURPOSE_KEY, (purpose.value,)),
        Condition("StringEquals", CONTEXT_KEY, (context,)),
    )


def _statement(
    sid: str, arns: Sequence[str], actions: tuple[str, ...], conditions: tuple[Condition, ...] = ()
) -> Iterator[Statement]:
    """An Allow for these principals; none, for none."""
    for arn in arns:
        if not _PERSON.fullmatch(arn):
            expected = "arn:aws:iam::ACCOUNT:role/NAME, or user/NAME"
            raise KeyPolicyError("bad_principal", "no ARN of a role or a user", expected=expected, got=ascii(arn[:200]))
    if arns:
        yield Statement(
            sid=_NO_SID.sub(" ", sid).strip()[:_LONGEST_SID],
            effect=Effect.ALLOW,
            principals=tuple(Principal(PrincipalKind.AWS, arn) for arn in dict.fromkeys(arns)),
            actions=actions,
            resources=("*",),
            conditions=conditions,
        )


def _named_apart(statements: Iterable[Statement], beside: Iterable[Statement] = ()) -> tuple[Statement, ...]:
    """The statements with a number behind each Sid that another has already, here or ``beside`` them."""
    taken = {each.sid for each in beside}
    named = []
    for statement in statements:
        sids = (f"{statement.sid} {number}" if number > 1 else statement.sid for number in itertools.count(1))
        sid = next(each for each in sids if each not in taken)
        taken.add(sid)
        named.append(replace(statement, sid=sid))
    return tuple(named)
