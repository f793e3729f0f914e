"""What KMS would decide: principals, actions, resources, conditions, explicit denials, grants, and why not."""

from __future__ import annotations

import json
from collections.abc import Mapping

import pytest
from hypothesis import given
from hypothesis import strategies as st

from attestation.keypolicy.answers import Grant, GrantConstraints
from attestation.keypolicy.conditions import Context, Truth
from attestation.keypolicy.decision import (
    Decision,
    Request,
    decide,
    encryption_context,
    recipient_context,
)
from attestation.keypolicy.document import EVERYONE, Effect, KeyArn, KeyPolicy, KeyPolicyError, Statement

KEY = KeyArn.parse("arn:aws:kms:us-east-1:111122223333:key/1234abcd-12ab-34cd-56ef-1234567890ab")
ROOT = "arn:aws:iam::111122223333:root"
ROLE = "arn:aws:iam::111122223333:role/enclaves"
ROLE_WITH_PATH = "arn:aws:iam::111122223333:role/team/prompts/enclaves"
SESSION = "arn:aws:sts::111122223333:assumed-role/enclaves/i-0123456789abcdef0"
OTHER_SESSION = "arn:aws:sts::111122223333:assumed-role/enclaves/alice"
USER = "arn:aws:iam::111122223333:user/division/alice"
FEDERATED = "arn:aws:sts::111122223333:federated-user/bob"
SERVICE = "ec2.amazonaws.com"
ELSEWHERE = "arn:aws:sts::444455556666:assumed-role/enclaves/i-0123456789abcdef0"
PCR0, PCR1 = b"\x0a" * 48, b"\x0b" * 48


def statement(effect: str = "Allow", remove: str = "", **elements: object) -> dict[str, object]:
    """An Allow of Decrypt to everyone, with some elements more or other ones, and one less."""
    plain: dict[str, object] = {"Effect": effect, "Principal": "*", "Action": "kms:Decrypt", "Resource": "*"}
    return {name: value for name, value in {**plain, **elements}.items() if name != remove}


def decision(
    *statements: dict[str, object],
    principal: str = SESSION,
    action: str = "kms:Decrypt",
    context: Context | None = None,
    grants: tuple[Grant, ...] = (),
    version: str = "2012-10-17",
) -> Decision:
    policy = KeyPolicy.parse(json.dumps({"Version": version, "Statement": [*statements]}))
    return decide(policy, grants, Request(principal, action, KEY, context or {}))


NOBODY = statement(Principal={"AWS": "AIDAEXAMPLEEXAMPLE01"})
"""The one statement of a policy that is to allow nothing: its principal was deleted."""


# Requests


@pytest.mark.parametrize(
    ("principal", "action", "code"),
    [
        ("", "kms:Decrypt", "bad_principal"),
        ("*", "kms:Decrypt", "bad_principal"),
        ("111122223333", "kms:Decrypt", "bad_principal"),
        ("arn:aws:iam::111122223333:role/*", "kms:Decrypt", "bad_principal"),
        ("arn:aws:iam::111122223333:group/g", "kms:Decrypt", "bad_principal"),
        ("arn:aws:sts::111122223333:assumed-role/enclaves", "kms:Decrypt", "bad_principal"),
        (ROLE, "Decrypt", "bad_action"),
        (ROLE, "kms:*", "bad_action"),
        (ROLE, "s3:GetObject", "bad_action"),
    ],
)
def test_a_request_that_nobody_could_make(principal: str, action: str, code: str) -> None:
    with pytest.raises(KeyPolicyError) as refused:
        Request(principal, action, KEY, {})
    assert refused.value.code == code


@pytest.mark.parametrize(
    ("principal", "arn"),
    [
        (ROOT, ROOT),
        (USER, USER),
        (FEDERATED, FEDERATED),
        (ROLE_WITH_PATH, ROLE_WITH_PATH),
        (SESSION, ROLE),  # AWS's value has the role's path, which a session's ARN does not tell
    ],
)
def test_who_asks_is_in_the_context(principal: str, arn: str) -> None:
    assert Request(principal, "kms:Decrypt", KEY, {}).context == {
        "aws:PrincipalArn": (arn,),
        "aws:PrincipalAccount": ("111122223333",),
        "kms:CallerAccount": ("111122223333",),
    }


def test_a_context_that_says_who_asks_is_believed() -> None:
    given_arn = {"AWS:principalarn": (ROLE_WITH_PATH,)}
    assert Request(SESSION, "kms:Decrypt", KEY, given_arn).context == {
        **given_arn,
        "aws:PrincipalAccount": ("111122223333",),
        "kms:CallerAccount": ("111122223333",),
    }
    assert Request(SERVICE, "kms:Decrypt", KEY, {}).context == {}


def test_the_context_of_an_attestation_document() -> None:
    assert recipient_context({0: PCR0, 1: PCR1, 16: b"\xff" * 48}) == {
        "kms:RecipientAttestation:ImageSha384": (PCR0.hex(),),
        "kms:RecipientAttestation:PCR0": (PCR0.hex(),),
        "kms:RecipientAttestation:PCR1": (PCR1.hex(),),
        "kms:RecipientAttestation:PCR16": ("ff" * 48,),
    }
    assert recipient_context({1: PCR1}) == {"kms:RecipientAttestation:PCR1": (PCR1.hex(),)}


def test_the_context_of_an_encryption_context() -> None:
    assert encryption_context({}) == {}
    assert encryption_context({"a": "1", "B": "2"}) == {
        "kms:EncryptionContextKeys": ("a", "B"),
        "kms:EncryptionContext:a": ("1",),
        "kms:EncryptionContext:B": ("2",),
    }


# Principals

EVERYBODY = {ROOT, ROLE, SESSION, OTHER_SESSION, USER, FEDERATED, SERVICE, ELSEWHERE}
OF_THE_ACCOUNT = EVERYBODY - {SERVICE, ELSEWHERE}
PRINCIPALS: dict[str, tuple[object, set[str], set[str]]] = {
    # What is written; whom it allows; whom it denies.
    "everyone": ("*", EVERYBODY, EVERYBODY),
    "everyone in AWS": ({"AWS": "*"}, EVERYBODY, EVERYBODY),
    "an account's number": ({"AWS": "111122223333"}, {ROOT}, OF_THE_ACCOUNT),
    "an account's root": ({"AWS": ROOT}, {ROOT}, OF_THE_ACCOUNT),
    "another partition's account": ({"AWS": "arn:aws-cn:iam::111122223333:root"}, set(), set()),
    "a role": ({"AWS": ROLE}, {ROLE, SESSION, OTHER_SESSION}, {ROLE, SESSION, OTHER_SESSION}),
    "a role with its path": ({"AWS": ROLE_WITH_PATH}, {ROLE, SESSION, OTHER_SESSION}, {ROLE, SESSION, OTHER_SESSION}),
    "a role in another case": ({"AWS": ROLE.replace("enclaves", "Enclaves")}, set(), set()),
    "one session": ({"AWS": SESSION}, {SESSION}, {SESSION}),
    "a user": ({"AWS": USER}, {USER}, {USER}),
    "a user without the path": ({"AWS": USER.replace("division/", "")}, set(), set()),
    "a federated user": ({"AWS": FEDERATED}, {FEDERATED}, {FEDERATED}),
    "one of several": ({"AWS": [USER, ELSEWHERE]}, {USER, ELSEWHERE}, {USER, ELSEWHERE}),
    "a service": ({"Service": SERVICE}, {SERVICE}, {SERVICE}),
    "another service": ({"Service": "s3.amazonaws.com"}, set(), set()),
    "a principal that was deleted": ({"AWS": "AROAEXAMPLEEXAMPLE01"}, set(), set()),
    # What key policies do not take: it allows nobody, and denies all.
    "part of a name": ({"AWS": "arn:aws:iam::111122223333:role/encl*"}, set(), EVERYBODY),
    "a service as an ARN": ({"AWS": SERVICE}, set(), EVERYBODY),
    "a federated identity": ({"Federated": "accounts.google.com"}, set(), EVERYBODY),
    "a canonical user": ({"CanonicalUser": "79a59df900b949e5"}, set(), EVERYBODY),
    "a federated identity or a user": ({"Federated": "accounts.google.com", "AWS": USER}, {USER}, EVERYBODY),
}


@pytest.mark.parametrize(("principal", "allowed", "denied"), PRINCIPALS.values(), ids=PRINCIPALS)
def test_whom_a_principal_element_names(principal: object, allowed: set[str], denied: set[str]) -> None:
    allow, deny = statement(Principal=principal), statement("Deny", Principal=principal)
    assert {each for each in EVERYBODY if decision(allow, principal=each).allowed} == allowed
    assert {each for each in EVERYBODY if not decision(statement(), deny, principal=each).allowed} == denied


NOT_PRINCIPALS: dict[str, tuple[object, set[str], set[str]]] = {
    # What is written; whom an Allow leaves out; whom a Deny spares.
    "everyone": ("*", EVERYBODY, EVERYBODY),
    "an account": ({"AWS": ROOT}, OF_THE_ACCOUNT, {ROOT}),
    "a user without its account": ({"AWS": USER}, {USER}, set()),
    "a user and its account": ({"AWS": [USER, ROOT]}, OF_THE_ACCOUNT, {ROOT, USER}),
    "a role and its account": ({"AWS": [ROLE, "111122223333"]}, OF_THE_ACCOUNT, {ROOT}),
    "a session, its role and its account": ({"AWS": [SESSION, ROLE, ROOT]}, OF_THE_ACCOUNT, {ROOT, SESSION}),
    "a service": ({"Service": SERVICE}, {SERVICE}, {SERVICE}),
    "who cannot be told": ({"Federated": "accounts.google.com"}, EVERYBODY, set()),
}


@pytest.mark.parametrize(("principal", "left_out", "spared"), NOT_PRINCIPALS.values(), ids=NOT_PRINCIPALS)
def test_whom_a_not_principal_element_leaves_out(principal: object, left_out: set[str], spared: set[str]) -> None:
    allow = statement(remove="Principal", NotPrincipal=principal)
    deny = statement("Deny", remove="Principal", NotPrincipal=principal)
    assert {each for each in EVERYBODY if not decision(allow, principal=each).allowed} == left_out
    assert {each for each in EVERYBODY if decision(statement(), deny, principal=each).allowed} == spared


def test_an_account_is_delegated_to_iam_policies_that_are_not_known_here() -> None:
    delegating = decision(statement(Principal={"AWS": ROOT}))
    assert [*delegating.explain()] == [
        "denied: nothing allows it",
        "Statement[0] does not apply",
        f"    Principal: expected '{ROOT}'; got '{SESSION}'"
        " (named is the account: its IAM policies would decide, and here they are not known)",
    ]


# Actions and resources


@pytest.mark.parametrize(
    ("pattern", "holds"),
    [
        ("kms:Decrypt", True),
        ("KMS:decrypt", True),
        ("*", True),
        ("kms:*", True),
        ("kms:De*t", True),
        ("kms:Decryp?", True),
        (["kms:Encrypt", "kms:Decrypt"], True),
        ("kms:Decrypt?", False),
        ("Decrypt", False),
        (["kms:Encrypt", "kms:ReEncrypt*"], False),
    ],
)
def test_actions(pattern: object, holds: bool) -> None:
    assert decision(statement(Action=pattern)).allowed is holds
    assert decision(statement(remove="Action", NotAction=pattern)).allowed is not holds


@pytest.mark.parametrize(
    ("pattern", "holds"),
    [
        ("*", True),
        (KEY.text, True),
        ("arn:aws:kms:*:111122223333:key/*", True),
        ("arn:aws:kms:us-east-?:*:*", True),
        (["arn:aws:kms:us-east-1:111122223333:key/other", "*"], True),
        (KEY.text.upper(), False),
        ("arn:aws:kms:us-east-1:111122223333:alias/*", False),
        ("arn:aws:kms:us-east-1:444455556666:key/*", False),
        ("arn:aws:*:key/*:::", False),
    ],
)
def test_resources(pattern: object, holds: bool) -> None:
    assert decision(statement(Resource=pattern)).allowed is holds
    assert decision(statement(remove="Resource", NotResource=pattern)).allowed is not holds


@pytest.mark.parametrize("pattern", ["1234abcd-12ab-34cd-56ef-1234567890ab", "arn:aws:kms:*", "arn:a:k:r:1:${x}"])
def test_a_resource_that_is_no_arn_allows_nothing_and_denies(pattern: str) -> None:
    assert not decision(statement(Resource=pattern)).allowed
    assert not decision(statement(remove="Resource", NotResource=pattern)).allowed
    assert not decision(statement(), statement("Deny", Resource=pattern)).allowed


def test_policy_variables_came_with_the_second_version() -> None:
    deny = statement("Deny", Condition={"StringEquals": {"aws:PrincipalArn": "${aws:x}"}})
    assert not decision(statement(), deny).allowed
    assert decision(statement(), deny, version="2008-10-17").allowed


# Conditions

RELEASE = {
    "StringEqualsIgnoreCase": {
        "kms:RecipientAttestation:PCR0": PCR0.hex().upper(),
        "kms:RecipientAttestation:PCR1": PCR1.hex(),
    },
    "StringEquals": {"kms:EncryptionContext:strongroom:purpose": "prompt"},
}


def context(pcrs: Mapping[int, bytes], purpose: str = "prompt") -> Context:
    return {**recipient_context(pcrs), **encryption_context({"strongroom:purpose": purpose})}


def test_every_condition_must_hold() -> None:
    released = statement(Condition=RELEASE)
    assert decision(released, context=context({0: PCR0, 1: PCR1})).allowed
    assert not decision(released, context=context({0: PCR0, 1: PCR1}, "model")).allowed
    assert not decision(released, context=context({0: PCR0})).allowed
    assert not decision(released, context=context({0: PCR1, 1: PCR1})).allowed
    assert not decision(released).allowed


def test_two_releases_in_one_statement_mix() -> None:
    """The pitfall: lists are alternatives for each key, so a third image passes with a register of each."""
    both = statement(
        Condition={
            "StringEquals": {
                "kms:RecipientAttestation:PCR0": [PCR0.hex(), PCR1.hex()],
                "kms:RecipientAttestation:PCR1": [PCR0.hex(), PCR1.hex()],
            }
        }
    )
    assert decision(both, context=recipient_context({0: PCR0, 1: PCR0})).allowed


def test_an_unconditional_allow_voids_the_conditioned_one() -> None:
    assert decision(statement(Condition=RELEASE), statement()).allowed


def test_the_decision_names_the_condition_that_did_not_hold() -> None:
    denied = decision(
        statement(Sid="release 1", Condition=RELEASE), context=context({0: PCR0, 1: b"\xcc" * 48}), principal=SESSION
    )
    (considered,) = denied.considered
    (clause,) = considered.why_not
    assert (clause.operator, clause.key) == ("StringEqualsIgnoreCase", "kms:RecipientAttestation:PCR1")
    assert (clause.expected, clause.got) == ((PCR1.hex(),), ("cc" * 48,))
    assert len(considered.clauses) == 6
    assert [*denied.explain()] == [
        "denied: nothing allows it",
        "Statement[0] 'release 1' does not apply",
        f"    StringEqualsIgnoreCase kms:RecipientAttestation:PCR1: expected '{PCR1.hex()}'; got '{'cc' * 48}'",
    ]


def test_an_unknown_operator_allows_nothing_and_denies() -> None:
    unknown = {"StringMatches": {"k": "v"}}
    allowing = decision(statement(Condition=unknown), context={"k": ("v",)})
    assert (allowing.allowed, allowing.by) == (False, None)
    denying = decision(statement(), statement("Deny", Sid="d", Condition=unknown))
    assert (denying.allowed, denying.by) == (False, denying.considered[1].rule)
    assert [*denying.explain()] == [
        "denied by Statement[1] 'd'",
        "Statement[0] applies too",
        "    cannot be decided, and so denies: "
        "StringMatches k: expected 'v'; got nothing (IAM has no such condition operator)",
    ]


def test_a_deny_with_a_part_that_does_not_hold_does_not_apply_for_another_that_nobody_can_say() -> None:
    deny = statement("Deny", Action="kms:Encrypt", Condition={"StringMatches": {"k": "v"}})
    allowed = decision(statement(), deny)
    assert (allowed.allowed, allowed.by) == (True, allowed.considered[0].rule)
    assert [clause.truth for clause in allowed.considered[1].why_not] == [Truth.NO, Truth.UNDECIDED]


# Grants


def granted(
    grantee: str = ROLE, operations: tuple[str, ...] = ("Decrypt",), constraints: GrantConstraints | None = None
) -> Grant:
    return Grant("g1", grantee, None, operations, constraints or GrantConstraints())


def test_a_grant_is_enough_and_no_condition_of_an_allow_limits_it() -> None:
    allowed = decision(statement(Condition=RELEASE), grants=(granted(),))
    assert allowed.allowed
    assert allowed.by == granted()
    assert [line for line in allowed.explain() if not line.startswith(" ")] == [
        "allowed by grant g1",
        "Statement[0] does not apply",
    ]


def test_an_explicit_denial_outweighs_a_grant() -> None:
    denied = decision(statement("Deny"), grants=(granted(),))
    assert (denied.allowed, denied.by) == (False, denied.considered[0].rule)


@pytest.mark.parametrize(
    ("grantee", "principal", "holds"),
    [
        (ROLE, SESSION, True),
        (SESSION, SESSION, True),
        (SESSION, OTHER_SESSION, False),
        (ROLE, USER, False),
        (ROLE, ELSEWHERE, False),
        (ROOT, ROOT, True),
        (ROOT, SESSION, False),
        (SERVICE, SERVICE, True),
        (SERVICE, SESSION, False),
        ("AROAEXAMPLEEXAMPLE01", SESSION, False),
        ("somebody", SESSION, False),
    ],
)
def test_grantees(grantee: str, principal: str, holds: bool) -> None:
    assert decision(NOBODY, principal=principal, grants=(granted(grantee),)).allowed is holds


@pytest.mark.parametrize(
    ("operations", "action", "holds"),
    [
        (("Decrypt",), "kms:Decrypt", True),
        (("Encrypt", "Decrypt"), "kms:decrypt", True),
        (("Encrypt",), "kms:Decrypt", False),
        (("ReEncryptFrom",), "kms:ReEncryptTo", False),
        ((), "kms:Decrypt", False),
    ],
)
def test_the_operations_of_a_grant(operations: tuple[str, ...], action: str, holds: bool) -> None:
    assert decision(NOBODY, action=action, grants=(granted(operations=operations),)).allowed is holds


EQUALS = GrantConstraints(encryption_context_equals={"a": "1"})
SUBSET = GrantConstraints(encryption_context_subset={"a": "1"})


@pytest.mark.parametrize(
    ("constraints", "asked", "holds"),
    [
        (EQUALS, {"a": "1"}, True),
        (EQUALS, {"A": "1"}, True),
        (EQUALS, {"a": "2"}, False),
        (EQUALS, {"a": "1", "b": "2"}, False),
        (EQUALS, {"a": "1", "A": "1"}, False),
        (EQUALS, {}, False),
        (SUBSET, {"a": "1"}, True),
        (SUBSET, {"a": "1", "b": "2"}, True),
        (SUBSET, {"a": "2", "b": "1"}, False),
        (SUBSET, {}, False),
    ],
)
def test_constraints_on_the_encryption_context(
    constraints: GrantConstraints, asked: dict[str, str], holds: bool
) -> None:
    grant = granted(operations=("Decrypt", "DescribeKey", "CreateGrant", "RetireGrant"), constraints=constraints)
    assert decision(NOBODY, context=encryption_context(asked), grants=(grant,)).allowed is holds
    # They mean nothing for operations without an encryption context, and for CreateGrant something else.
    assert decision(NOBODY, action="kms:DescribeKey", grants=(grant,)).allowed
    creating = decision(NOBODY, action="kms:CreateGrant", grants=(grant,))
    assert not creating.allowed
    assert [clause.truth for clause in creating.considered[1].why_not] == [Truth.UNDECIDED]


def test_why_a_constraint_does_not_hold() -> None:
    grant = granted(constraints=SUBSET)
    denied = decision(NOBODY, context=encryption_context({"b": "2", "a": "3"}), grants=(grant,))
    assert [*denied.explain()][-1] == "    EncryptionContextSubset: expected 'a=1'; got 'a=3' and 'b=2'"


@pytest.mark.parametrize(
    ("action", "source", "holds"),
    [
        ("kms:Decrypt", ("arn:aws:s3:::b",), True),
        ("kms:Decrypt", ("arn:aws:s3:::c",), False),
        ("kms:Decrypt", (), False),
        ("kms:DescribeKey", (), False),
        ("kms:RetireGrant", (), True),
    ],
)
def test_a_constraint_on_the_resource_behind_the_request(action: str, source: tuple[str, ...], holds: bool) -> None:
    constraints = GrantConstraints(source_arn="arn:aws:s3:::b")
    grant = granted(operations=("Decrypt", "DescribeKey", "RetireGrant"), constraints=constraints)
    assert decision(NOBODY, action=action, context={"aws:SourceArn": source}, grants=(grant,)).allowed is holds


# Properties

ELEMENTS = st.fixed_dictionaries(
    {
        "Effect": st.sampled_from(["Allow", "Deny"]),
        "Resource": st.sampled_from(["*", KEY.text, "arn:aws:kms:*:*:alias/*", "x"]),
    },
    optional={
        "Condition": st.dictionaries(
            st.sampled_from(
                ["StringEquals", "StringNotEquals", "ForAllValues:StringLike", "Null", "BoolIfExists", "X"]
            ),
            st.dictionaries(
                st.sampled_from(["K", "aws:PrincipalArn"]),
                st.lists(st.sampled_from(["a", "true", "${x}", ROLE]), min_size=1, max_size=2),
                min_size=1,
                max_size=2,
            ),
            min_size=1,
            max_size=2,
        )
    },
)
NAMED = st.dictionaries(
    st.sampled_from(["Principal", "NotPrincipal"]),
    st.sampled_from(["*", {"AWS": ROLE}, {"AWS": ROOT}, {"AWS": [SESSION, ROOT]}, {"Federated": "f"}]),
    min_size=1,
    max_size=1,
)
ACTIONS = st.dictionaries(
    st.sampled_from(["Action", "NotAction"]),
    st.sampled_from(["kms:*", "kms:Decrypt", "kms:Encrypt"]),
    min_size=1,
    max_size=1,
)
STATEMENTS = st.builds(
    lambda *parts: {key: value for part in parts for key, value in part.items()}, ELEMENTS, NAMED, ACTIONS
)
ASKING = st.builds(
    Request,
    st.sampled_from(sorted(EVERYBODY)),
    st.sampled_from(["kms:Decrypt", "kms:Encrypt"]),
    st.just(KEY),
    st.dictionaries(st.sampled_from(["k", "K"]), st.sampled_from([(), ("a",), ("a", "b"), ("true",)])),
)
GRANTS = st.lists(st.builds(granted, st.sampled_from([ROLE, ROOT]), st.just(("Decrypt",))), max_size=2)


def policy_of(statements: list[dict[str, object]]) -> KeyPolicy:
    return KeyPolicy.parse(json.dumps({"Version": "2012-10-17", "Statement": statements}))


@given(st.lists(STATEMENTS, min_size=1, max_size=4), STATEMENTS, GRANTS, ASKING)
def test_one_more_deny_never_allows_more_and_one_more_allow_never_less(
    statements: list[dict[str, object]], more: dict[str, object], grants: list[Grant], request: Request
) -> None:
    before = decide(policy_of(statements), grants, request)
    denied = decide(policy_of([*statements, {**more, "Effect": "Deny"}]), grants, request)
    allowed = decide(policy_of([*statements, {**more, "Effect": "Allow"}]), grants, request)
    assert denied.allowed <= before.allowed <= allowed.allowed
    assert before.allowed <= decide(policy_of(statements), [*grants, granted()], request).allowed


@given(
    st.lists(STATEMENTS, min_size=1, max_size=4).flatmap(lambda each: st.tuples(st.just(each), st.permutations(each))),
    GRANTS,
    ASKING,
)
def test_the_order_of_statements_means_nothing(
    orders: tuple[list[dict[str, object]], list[dict[str, object]]], grants: list[Grant], request: Request
) -> None:
    one, other = (decide(policy_of(statements), grants, request) for statements in orders)
    assert one.allowed is other.allowed


@given(st.lists(STATEMENTS, min_size=1, max_size=4), GRANTS, ASKING)
def test_a_decision_accounts_for_itself(
    statements: list[dict[str, object]], grants: list[Grant], request: Request
) -> None:
    found = decide(policy_of(statements), grants, request)
    assert len(found.considered) == len(statements) + len(grants)
    is_allow = isinstance(found.by, Grant) or (isinstance(found.by, Statement) and found.by.effect is Effect.ALLOW)
    assert found.allowed is is_allow
    assert all(each.why_not for each in found.considered if not each.applies)
    assert all(line.isprintable() for line in found.explain())


@given(st.lists(STATEMENTS, min_size=1, max_size=4), ASKING)
def test_nothing_is_allowed_without_an_allow(statements: list[dict[str, object]], request: Request) -> None:
    assert not decide(policy_of([{**each, "Effect": "Deny"} for each in statements]), [], request).allowed


def test_a_statement_can_be_built_and_decided_without_json() -> None:
    policy = KeyPolicy((Statement(None, Effect.ALLOW, (EVERYONE,), actions=("kms:*",), resources=("*",)),))
    assert decide(policy, [], Request(ROLE, "kms:Decrypt", KEY, {})).allowed
