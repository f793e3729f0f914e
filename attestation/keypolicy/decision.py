"""What KMS decides of a request, and by which statement or grant.

Sources: IAM User Guide, "Policy evaluation logic", "AWS JSON policy elements: Principal" and "NotPrincipal"; KMS
Developer Guide, "Key policies" and "Grants"; API reference, GrantConstraints. An explicit Deny wins; otherwise one
Allow of the key policy, or one grant, is enough; otherwise nothing is allowed.

Out of sight are IAM policies, service control policies and endpoint policies. A statement that names an account hands
the decision to that account's IAM policies: here it allows that account's root user alone, and says so. And IAM can
only take away what a statement gives to a role by name, in the key's own account; in another account it must give too.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Final

from attestation.keypolicy.answers import Grant
from attestation.keypolicy.conditions import (
    Clause,
    Context,
    Truth,
    all_of,
    any_of,
    arn_matches,
    evaluate,
    matches,
    values_of,
)
from attestation.keypolicy.document import (
    Effect,
    KeyArn,
    KeyPolicy,
    KeyPolicyError,
    Principal,
    PrincipalKind,
    Statement,
)

ENCRYPTION_CONTEXT: Final = "kms:EncryptionContext:"
ENCRYPTION_CONTEXT_KEYS: Final = "kms:EncryptionContextKeys"
RECIPIENT: Final = "kms:RecipientAttestation:"
SOURCE_ARN: Final = "aws:SourceArn"

_ACCOUNT: Final = re.compile(r"[0-9]{12}")
_PRINCIPAL: Final = re.compile(
    r"arn:(?P<partition>aws(?:-[a-z]{1,8}){0,3}):"
    r"(?:iam::(?P<account>[0-9]{12}):(?:(?P<root>root)|user/(?P<user>[^*?]+)|role/(?:[^*?]*/)?(?P<role>[^/*?]+))"
    r"|sts::(?P<sts_account>[0-9]{12}):"
    r"(?:assumed-role/(?P<assumed>[^/*?]+)/(?P<session>[^/*?]+)|federated-user/(?P<federated>[^/*?]+)))"
)
_SERVICE: Final = re.compile(r"[A-Za-z0-9-]+(?:\.[A-Za-z0-9-]+)*\.amazonaws\.com(?:\.cn)?")
_DELETED: Final = re.compile(r"A[A-Z]{3}[A-Z0-9]{12,124}")
"""The unique id that KMS shows in place of a principal that was deleted."""
_ACTION: Final = re.compile(r"kms:[A-Za-z]{1,64}")
_WITH_ENCRYPTION_CONTEXT: Final = frozenset(
    (
        *("decrypt", "encrypt", "reencryptfrom", "reencryptto"),
        *("generatedatakey", "generatedatakeywithoutplaintext"),
        *("generatedatakeypair", "generatedatakeypairwithoutplaintext"),
    )
)
"""The operations that an encryption context, and so a constraint on one, belongs to."""

_Name = tuple[str, ...]
"""What a principal is compared by: its kind, partition, account and name. A role's is without its path, which the ARN
of a session does not have; names of roles are unique in an account without it."""


def recipient_context(pcrs: Mapping[int, bytes]) -> Context:
    """The condition keys of an attestation document that KMS has verified (KMS Developer Guide, "Condition keys for
    Nitro Enclaves"). ``pcrs``: 32, 48 or 64 bytes each, as in the document.
    """
    registers = {f"{RECIPIENT}PCR{index}": (value.hex(),) for index, value in pcrs.items()}
    return registers if 0 not in pcrs else {f"{RECIPIENT}ImageSha384": (pcrs[0].hex(),), **registers}


def encryption_context(pairs: Mapping[str, str]) -> Context:
    """The condition keys of a request's encryption context; none, for an empty one."""
    if not pairs:
        return {}
    return {ENCRYPTION_CONTEXT_KEYS: tuple(pairs), **{f"{ENCRYPTION_CONTEXT}{key}": (pairs[key],) for key in pairs}}


@dataclass(frozen=True, slots=True)
class Request:
    """One request to KMS on one key. Construction raises KeyPolicyError: ``bad_principal``, ``bad_action``."""

    principal_arn: str
    """Who asks: the ARN of an account's root user, a user, a session of a role, a role (for a session that no policy
    names), or a federated user's session; or the name of an AWS service."""
    action: str
    """``kms:Decrypt`` and so on. ReEncrypt asks for two: ``kms:ReEncryptFrom`` and ``kms:ReEncryptTo``."""
    resource: KeyArn
    """The key that is to be used."""
    context: Context
    """Its condition keys. Who asks is known anyway, as ``aws:PrincipalArn``, ``aws:PrincipalAccount`` and
    ``kms:CallerAccount``, where no other value is given for them."""

    def __post_init__(self) -> None:
        if not _ACTION.fullmatch(self.action):
            raise KeyPolicyError("bad_action", "no action of KMS", expected="kms:NAME", got=ascii(self.action[:100]))
        if not _names(self.principal_arn):
            raise KeyPolicyError(
                "bad_principal",
                "nobody who could ask KMS",
                expected="the ARN of a root user, user, role or session, or the name of a service",
                got=ascii(self.principal_arn[:200]),
            )
        context = dict(self.context)
        for key, value in _identity(self.principal_arn).items():
            if not values_of(context, key):
                context[key] = (value,)
        object.__setattr__(self, "context", MappingProxyType(context))


@dataclass(frozen=True, slots=True)
class Considered:
    """One statement or grant, held against the request."""

    rule: Statement | Grant
    """What was held against it."""
    name: str
    """Where it stands in the policy, with its Sid; or the grant's id."""
    clauses: tuple[Clause, ...]
    """All of its parts: nothing is left out once one does not hold."""

    @property
    def applies(self) -> bool:
        """An Allow and a grant when every part holds; a Deny also when nobody can say that one does not."""
        truth = all_of(clause.truth for clause in self.clauses)
        is_deny = isinstance(self.rule, Statement) and self.rule.effect is Effect.DENY
        return truth is Truth.YES or (is_deny and truth is Truth.UNDECIDED)

    @property
    def why_not(self) -> tuple[Clause, ...]:
        """The parts that do not hold, or of which nobody can say."""
        return tuple(clause for clause in self.clauses if clause.truth is not Truth.YES)


@dataclass(frozen=True, slots=True)
class Decision:
    """What KMS would answer."""

    allowed: bool
    """False: KMS would answer ``AccessDeniedException``."""
    by: Statement | Grant | None
    """The statement that denies, or else what allows. None: nothing allows it, so that it is denied."""
    considered: tuple[Considered, ...]
    """Every statement in the policy's order, then every grant."""

    def explain(self) -> Iterator[str]:
        """The decision in a line, then for each statement and grant that does not apply the parts that do not hold."""
        word = "allowed" if self.allowed else "denied"
        names = [each.name for each in self.considered if each.rule is self.by]
        yield f"{word} by {names[0]}" if names else "denied: nothing allows it"
        for each in self.considered:
            if each.rule is not self.by:
                yield f"{each.name} applies too" if each.applies else f"{each.name} does not apply"
            for clause in each.why_not:
                doubt = "cannot be decided, and so denies: " if each.applies else ""
                yield f"    {doubt}{clause}"


def decide(policy: KeyPolicy, grants: Iterable[Grant], request: Request) -> Decision:
    """The decision that KMS would take by the key policy and the grants alone. Never raises."""
    has_variables = policy.version == "2012-10-17"
    considered = (
        *(
            Considered(statement, _statement_name(index, statement), (*_clauses(statement, request, has_variables),))
            for index, statement in enumerate(policy.statements)
        ),
        *(Considered(grant, f"grant {ascii(grant.grant_id)[1:-1]}", (*_grant(grant, request),)) for grant in grants),
    )
    applying = [each.rule for each in considered if each.applies]
    denials = [rule for rule in applying if isinstance(rule, Statement) and rule.effect is Effect.DENY]
    return Decision(
        allowed=bool(applying) and not denials, by=next(iter(denials or applying), None), considered=considered
    )


def _statement_name(index: int, statement: Statement) -> str:
    return f"Statement[{index}]" if statement.sid is None else f"Statement[{index}] {statement.sid!a}"


def _clauses(statement: Statement, request: Request, has_variables: bool) -> Iterator[Clause]:
    yield _principal(statement, request)

    action = request.action.lower()
    actions = statement.actions or statement.not_actions
    truth = any_of(matches(pattern.lower(), action) for pattern in actions)
    yield _negatable("Action", truth, actions, request.action, is_negated=bool(statement.not_actions))

    resources = statement.resources or statement.not_resources
    truth = any_of(_resource(pattern, request.resource, has_variables) for pattern in resources)
    yield _negatable("Resource", truth, resources, request.resource.text, is_negated=bool(statement.not_resources))

    for condition in statement.conditions:
        yield evaluate(condition, request.context, has_variables=has_variables)


def _negatable(element: str, truth: Truth, expected: tuple[str, ...], got: str, *, is_negated: bool) -> Clause:
    if is_negated:
        return Clause(f"Not{element}", ~truth, expected, (got,), remark="anything but these")
    return Clause(element, truth, expected, (got,))


def _resource(pattern: str, key: KeyArn, has_variables: bool) -> Truth:
    """In a key policy ``*`` is the key itself (KMS Developer Guide, "Creating a key policy")."""
    if has_variables and "${" in pattern:
        return Truth.UNDECIDED
    return Truth.YES if pattern == "*" else arn_matches(pattern, key.text)


# Principals


def _names(text: str) -> tuple[_Name, ...]:
    """Who somebody is, the widest name first; empty for what names nobody who could ask."""
    if _SERVICE.fullmatch(text):
        return (("service", text),)
    found = _PRINCIPAL.fullmatch(text)
    if found is None:
        return ()
    home = found["partition"], found["account"] or found["sts_account"]
    names: list[_Name] = [("account", *home)]
    for kind in ("user", "role", "federated"):
        if found[kind]:
            names.append((kind, *home, found[kind]))
    if found["assumed"]:
        names += [("role", *home, found["assumed"]), ("session", *home, found["assumed"], found["session"])]
    return tuple(names)


def _asking(arn: str) -> tuple[_Name, ...]:
    """As ``_names``. KMS is asked by sessions: a role stands for one of its own that has a name of its own."""
    names = _names(arn)
    kind, *rest = names[-1]
    return (*names, ("session", *rest, "")) if kind == "role" else names


def _identity(arn: str) -> dict[str, str]:
    """The condition keys that say who asks. A session's ``aws:PrincipalArn`` is its role's."""
    names = _names(arn)
    if names[0][0] == "service":
        return {}
    _, partition, account = names[0]
    if names[-1][0] == "session":
        role = names[-2][-1]
        arn = f"arn:{partition}:iam::{account}:role/{role}"
    return {"aws:PrincipalArn": arn, "aws:PrincipalAccount": account, "kms:CallerAccount": account}


def _principal(statement: Statement, request: Request) -> Clause:
    is_deny = statement.effect is Effect.DENY
    if statement.principals:
        expected = tuple(principal.value for principal in statement.principals)
        return _granted_to("Principal", statement.principals, expected, request, is_deny=is_deny)
    listed = statement.not_principals
    truths = [any_of(_is(principal, name, request) for principal in listed) for name in _asking(request.principal_arn)]
    # AWS checks account, role and session one after the other, and a Deny spares only who is named at each. With an
    # Allow, which AWS advises against, being named at one of them is enough to be left out.
    named = all_of(truths) if is_deny else any_of(truths)
    expected = tuple(principal.value for principal in listed)
    return Clause("NotPrincipal", ~named, expected, (request.principal_arn,), remark="anyone but these")


def _granted_to(
    element: str, principals: Iterable[Principal], expected: tuple[str, ...], request: Request, *, is_deny: bool = False
) -> Clause:
    def truth(names: Iterable[_Name]) -> Truth:
        return any_of(_is(principal, name, request) for principal in principals for name in names)

    names = _asking(request.principal_arn)
    whole = truth(names)
    # To deny an account is to deny everybody in it; to allow it is to leave the decision to its IAM policies.
    own = whole if is_deny or len(names) == 1 else truth(names[1:])
    remark = None
    if own is not whole:
        remark = "named is the account: its IAM policies would decide, and here they are not known"
    return Clause(element, own, expected, (request.principal_arn,), remark=remark)


def _is(principal: Principal, name: _Name, request: Request) -> Truth:
    """Whether the entry names ``name``, which is one of the request's principal's."""
    match principal:
        case Principal(kind=PrincipalKind.EVERYONE) | Principal(kind=PrincipalKind.AWS, value="*"):
            return Truth.YES
        case Principal(kind=PrincipalKind.SERVICE, value=value):
            return Truth.of(name == ("service", value))
        case Principal(kind=PrincipalKind.AWS, value=value) if _ACCOUNT.fullmatch(value):
            return Truth.of(name == ("account", request.resource.partition, value))
        case Principal(kind=PrincipalKind.AWS, value=value) if _DELETED.fullmatch(value):
            return Truth.NO
        case Principal(kind=PrincipalKind.AWS, value=value) if (names := _names(value)) and names[0][0] == "account":
            return Truth.of(name == names[-1])
    # Federated and CanonicalUser, which no key policy should have, and what is no principal's ARN.
    return Truth.UNDECIDED


# Grants


def _grant(grant: Grant, request: Request) -> Iterator[Clause]:
    grantee = grant.grantee_principal
    kind = PrincipalKind.SERVICE if _SERVICE.fullmatch(grantee) else PrincipalKind.AWS
    yield _granted_to("GranteePrincipal", [Principal(kind, grantee)], (grantee,), request)

    name = request.action.removeprefix("kms:")
    operation = name.lower()
    is_granted = operation in (each.lower() for each in grant.operations)
    yield Clause("Operations", Truth.of(is_granted), grant.operations, (name,))

    yield from _constraints(grant, request, operation)


def _constraints(grant: Grant, request: Request, operation: str) -> Iterator[Clause]:
    constraints = grant.constraints
    if constraints.source_arn is not None and operation != "retiregrant":
        got = values_of(request.context, SOURCE_ARN)
        yield Clause("SourceArn", Truth.of(got == (constraints.source_arn,)), (constraints.source_arn,), got or None)
    pairs = sorted(pair for key in request.context for pair in _pairs_of(key, request.context[key]))
    for element, constraint in (
        ("EncryptionContextEquals", constraints.encryption_context_equals),
        ("EncryptionContextSubset", constraints.encryption_context_subset),
    ):
        if constraint is None:
            continue
        expected = _shown(constraint.items())
        if operation == "creategrant":
            # The new grant's constraints must be as strict; they are no condition keys, and so not known here.
            yield Clause(element, Truth.UNDECIDED, expected, None, remark="limits the constraints of a new grant")
        elif operation in _WITH_ENCRYPTION_CONTEXT:
            asked = sorted((key.lower(), value) for key, value in constraint.items())
            holds = asked == pairs if element == "EncryptionContextEquals" else {*asked} <= {*pairs}
            yield Clause(element, Truth.of(holds), expected, _shown(pairs) or None)


def _pairs_of(key: str, values: tuple[str, ...]) -> Iterator[tuple[str, str]]:
    """What a condition key says of the encryption context, whose keys are compared without regard to case."""
    if key.lower().startswith(ENCRYPTION_CONTEXT.lower()):
        for value in values:
            yield key[len(ENCRYPTION_CONTEXT) :].lower(), value


def _shown(pairs: Iterable[tuple[str, str]]) -> tuple[str, ...]:
    return tuple(f"{key}={value}" for key, value in pairs)
