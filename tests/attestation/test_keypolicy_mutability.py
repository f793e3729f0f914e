"""Who can change later what a key opens to."""

from __future__ import annotations

from dataclasses import replace

import pytest

from attestation.keypolicy.answers import Grant, KeyMetadata
from attestation.keypolicy.mutability import Changer, Locked, MutableBy, mutability
from tests.key_policies import (
    ADMIN,
    EQUALS,
    METADATA,
    RECIPIENT,
    ROOT,
    STRANGER,
    Json,
    allow,
    deny,
    good,
    grant,
    parsed,
)

EXTERNAL = replace(METADATA, origin="EXTERNAL")
MULTI_REGION = replace(METADATA, multi_region=True)
READS = allow("kms:DescribeKey")
SERVICE = {"Service": "dynamodb.amazonaws.com"}


def test_a_generated_policy_is_changed_by_its_administrators() -> None:
    found = mutability(good(), METADATA)
    assert found == MutableBy((Changer(ADMIN, ("kms:PutKeyPolicy",), "Administer"),))
    assert found.principals == (ADMIN,)
    assert str(found) == f"MUTABLE-BY({ADMIN})"
    assert found.untrusted([ADMIN]) == ()
    assert found.untrusted([STRANGER]) == found.changers


@pytest.mark.parametrize(
    "statements",
    [
        [READS],
        [allow("kms:Decrypt", "kms:Encrypt", "kms:ScheduleKeyDeletion", "kms:TagResource", "kms:UpdatePrimaryRegion")],
        [allow("kms:PutKeyPolicy"), deny("kms:PutKeyPolicy")],
        [allow("kms:*"), deny("kms:Put*", "kms:Create*", "kms:ReplicateKey", "kms:ImportKeyMaterial")],
        [allow("kms:PutKeyPolicy"), deny("kms:*", Principal={"AWS": ["*"]})],
        [allow(Action=None, NotAction=["kms:PutKeyPolicy", "kms:CreateGrant", "kms:Re*", "kms:ImportKeyMaterial"])],
        [READS, deny("kms:PutKeyPolicy", Condition={"Bool": {"aws:SecureTransport": "false"}})],
        [allow("kms:PutKeyPolicy", principal={"AWS": "*"}), deny("kms:PutKeyPolicy", Principal={"AWS": "*"})],
        [allow("kms:PutKeyPolicy", principal=SERVICE), deny("kms:PutKeyPolicy")],
    ],
)
def test_locked(statements: list[Json]) -> None:
    found = mutability(parsed(*statements))
    assert found == Locked()
    assert str(found) == "LOCKED"


@pytest.mark.parametrize(
    ("statements", "principal", "actions"),
    [
        ([allow("kms:PutKeyPolicy", principal={"AWS": ROOT})], ROOT, ["kms:PutKeyPolicy"]),
        ([allow("kms:CreateGrant")], STRANGER, ["kms:CreateGrant"]),
        ([allow("kms:replicatekey", principal="*")], "*", ["kms:ReplicateKey"]),
        ([allow("kms:Import*", principal={"AWS": "*"})], "*", ["kms:ImportKeyMaterial"]),
        ([allow("kms:SomethingNew")], STRANGER, ["kms:SomethingNew"]),
        (
            [allow("kms:PutKeyPolicy", principal={"Service": "ec2.amazonaws.com"})],
            "Service ec2.amazonaws.com",
            ["kms:PutKeyPolicy"],
        ),
        ([allow("kms:PutKeyPolicy", Principal=None, NotPrincipal={"AWS": ADMIN})], "*", ["kms:PutKeyPolicy"]),
        (
            [allow("kms:PutKeyPolicy", Condition={EQUALS: {f"{RECIPIENT}PCR0": "ab"}})],
            STRANGER,
            ["kms:PutKeyPolicy"],
        ),
        # A Deny that leaves somebody, some circumstance, some resource or some action.
        (
            [allow("kms:PutKeyPolicy"), deny("kms:PutKeyPolicy", Principal={"AWS": ADMIN})],
            STRANGER,
            ["kms:PutKeyPolicy"],
        ),
        (
            [allow("kms:PutKeyPolicy"), deny("kms:PutKeyPolicy", Condition={"Bool": {"aws:ViaAWSService": "false"}})],
            STRANGER,
            ["kms:PutKeyPolicy"],
        ),
        ([allow("kms:PutKeyPolicy"), deny("kms:PutKeyPolicy", Resource="alias/x")], STRANGER, ["kms:PutKeyPolicy"]),
        ([allow("kms:PutKeyPolicy"), deny(Action=None, NotAction="kms:Decrypt")], STRANGER, ["kms:PutKeyPolicy"]),
        ([allow("kms:*"), deny("kms:Put*", "kms:Re*", "kms:Import*")], STRANGER, ["kms:CreateGrant"]),
    ],
)
def test_mutable(statements: list[Json], principal: str, actions: list[str]) -> None:
    found = mutability(parsed(*statements))
    assert isinstance(found, MutableBy)
    assert [(each.principal, list(each.actions), each.statement) for each in found.changers] == [
        (principal, actions, "Statement[0]")
    ]


@pytest.mark.parametrize(
    ("principal", "names"),
    [
        (SERVICE, {"Service dynamodb.amazonaws.com"}),
        ({"Federated": "cognito-identity.amazonaws.com"}, {"Federated cognito-identity.amazonaws.com"}),
        ({"CanonicalUser": "79a5"}, {"CanonicalUser 79a5"}),
        ({**SERVICE, "AWS": STRANGER}, {"Service dynamodb.amazonaws.com"}),
        ("*", {"*"}),
    ],
)
def test_a_deny_of_every_aws_principal_may_spare_others(principal: Json, names: set[str]) -> None:
    allowed = allow("kms:CreateGrant", principal=principal)
    found = mutability(parsed(allowed, deny("kms:CreateGrant", Principal={"AWS": "*"})), METADATA)
    assert isinstance(found, MutableBy)
    assert set(found.principals) == names
    assert mutability(parsed(allowed, deny("kms:CreateGrant")), METADATA) == Locked()


def test_a_deny_of_every_aws_principal_may_spare_a_service_with_a_grant() -> None:
    denied = parsed(READS, deny("kms:CreateGrant", Principal={"AWS": "*"}))
    given = grant("CreateGrant")
    assert mutability(denied, METADATA, [given]) == Locked()
    found = mutability(denied, METADATA, [replace(given, grantee_principal="dynamodb.amazonaws.com")])
    assert found == MutableBy((Changer("dynamodb.amazonaws.com", ("kms:CreateGrant",), "grant-1"),))


@pytest.mark.parametrize(
    ("metadata", "actions"),
    [
        (None, ("kms:ImportKeyMaterial", "kms:ReplicateKey")),
        (METADATA, None),
        (EXTERNAL, ("kms:ImportKeyMaterial",)),
        (MULTI_REGION, ("kms:ReplicateKey",)),
    ],
)
def test_what_no_key_of_its_kind_can_have_changes_nothing(
    metadata: KeyMetadata | None, actions: tuple[str, ...] | None
) -> None:
    found = mutability(parsed(allow("kms:ImportKeyMaterial", "kms:ReplicateKey")), metadata)
    assert found == (Locked() if actions is None else MutableBy((Changer(STRANGER, actions, "Statement[0]"),)))


@pytest.mark.parametrize(
    ("given", "is_locked"),
    [(grant("Decrypt", "CreateGrant"), False), (grant("CreateGrant"), False), (grant("Decrypt"), True)],
)
def test_a_grant_to_grant(given: Grant, is_locked: bool) -> None:
    found = mutability(parsed(READS), METADATA, [given])
    assert found == (Locked() if is_locked else MutableBy((Changer(STRANGER, ("kms:CreateGrant",), "grant-1"),)))
    assert mutability(parsed(READS, deny("kms:CreateGrant")), METADATA, [given]) == Locked()
