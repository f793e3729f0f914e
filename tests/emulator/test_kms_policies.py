"""Key policies and grants, evaluated for every operation; and what a policy may be."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from datetime import datetime
from typing import Any

import pytest

from attestation.keypolicy.answers import Grant, KeyMetadata
from attestation.keypolicy.document import KeyPolicy
from emulator.kms_endpoint import KmsEmulator, kms_emulator
from tests.key_policies import ACCOUNT, policy, statement
from tests.kms_clients import CONTEXT, kms_client, refused

ROOT_USER = f"arn:aws:iam::{ACCOUNT}:root"
ADMINISTRATOR = f"arn:aws:iam::{ACCOUNT}:role/administrator"
ENCLAVE = f"arn:aws:iam::{ACCOUNT}:role/enclave"
DENIED = "AccessDeniedException"


@pytest.fixture
def kms() -> Iterator[KmsEmulator]:
    with kms_emulator() as kms:
        yield kms


@pytest.fixture
def administrator(kms: KmsEmulator) -> Iterator[Any]:
    with kms_client(kms, kms.principal("assumed-role/administrator/alice")) as client:
        yield client


@pytest.fixture
def enclave(kms: KmsEmulator) -> Iterator[Any]:
    with kms_client(kms, kms.principal("assumed-role/enclave/i-1")) as client:
        yield client


ON_A_KEY: Mapping[str, dict[str, Any]] = {
    "create_alias": {"AliasName": "alias/another"},
    "create_grant": {"GranteePrincipal": ENCLAVE, "Operations": ["Decrypt"]},
    "describe_key": {},
    "disable_key": {},
    "enable_key": {},
    "encrypt": {"Plaintext": b"x"},
    "generate_data_key": {"KeySpec": "AES_256"},
    "generate_data_key_pair": {"KeyPairSpec": "ECC_NIST_P256"},
    "generate_data_key_without_plaintext": {"KeySpec": "AES_256"},
    "get_key_policy": {},
    "get_public_key": {},
    "list_grants": {},
    "list_key_policies": {},
    "put_key_policy": {"Policy": policy(statement(ADMINISTRATOR, "kms:*"))},
    "replicate_key": {"ReplicaRegion": "eu-west-1"},
    "revoke_grant": {"GrantId": "none"},
    "schedule_key_deletion": {},
    "sign": {"Message": b"x", "SigningAlgorithm": "ECDSA_SHA_256"},
}


def action(operation: str) -> str:
    return "".join(word.title() for word in operation.split("_"))


@pytest.mark.parametrize("operation", ON_A_KEY)
def test_each_operation_asks_the_policy(kms: KmsEmulator, enclave: Any, operation: str) -> None:
    others = [f"kms:{action(other)}" for other in ON_A_KEY if other != operation]
    arn = kms.create_key(policy(statement(ADMINISTRATOR, "kms:*"), statement(ENCLAVE, *others)))
    name = "TargetKeyId" if operation == "create_alias" else "KeyId"
    with refused(
        DENIED,
        f"User: arn:aws:sts::{ACCOUNT}:assumed-role/enclave/i-1 is not authorized to perform: kms:{action(operation)}"
        f" on resource: {arn} because no resource-based policy allows the kms:{action(operation)} action",
    ):
        getattr(enclave, operation)(**{name: arn}, **ON_A_KEY[operation])


def test_an_explicit_deny_wins(kms: KmsEmulator, enclave: Any) -> None:
    deny = statement("*", "kms:Encrypt", effect="Deny", StringNotEquals={"kms:EncryptionContext:a": "b"})
    arn = kms.create_key(policy(statement(ENCLAVE, "kms:*"), deny))
    enclave.encrypt(KeyId=arn, Plaintext=b"x", EncryptionContext={"a": "b"})
    for context in ({}, {"a": "c"}, {"A": "c"}):
        with refused(DENIED, "with an explicit deny in a resource-based policy"):
            enclave.encrypt(KeyId=arn, Plaintext=b"x", EncryptionContext=context)


def test_the_default_policy_is_the_account_roots(kms: KmsEmulator, enclave: Any) -> None:
    arn = kms.create_key()
    with refused(DENIED, "because no identity-based policy allows the kms:DescribeKey action"):
        enclave.describe_key(KeyId=arn)
    text = "because no resource-based policy allows"
    with kms_client(kms, kms.principal("arn:aws:iam::444455556666:root")) as other, refused(DENIED, text):
        other.describe_key(KeyId=arn)


def test_another_account_that_the_policy_names(kms: KmsEmulator) -> None:
    user = "arn:aws:iam::444455556666:user/bob"
    arn = kms.create_key(policy(statement(user, "kms:Encrypt", StringEquals={"kms:CallerAccount": "444455556666"})))
    with kms_client(kms, kms.principal(user)) as bob:
        assert bob.encrypt(KeyId=arn, Plaintext=b"x")["KeyId"] == arn
        with refused("NotFoundException"):
            bob.encrypt(KeyId=arn.rpartition("/")[2], Plaintext=b"x")  # a bare id is of the caller's account
        with refused(DENIED, "kms:GenerateRandom"):
            bob.generate_random(NumberOfBytes=1)
        with refused(DENIED, "kms:ListAliases"):
            bob.list_aliases(KeyId=arn)


@pytest.mark.parametrize(
    ("conditions", "is_allowed"),
    [
        ({"StringEquals": {"aws:PrincipalArn": ENCLAVE}}, True),
        ({"ArnLike": {"aws:PrincipalArn": f"arn:aws:iam::{ACCOUNT}:role/en*"}}, True),
        ({"StringEquals": {"aws:PrincipalType": "AssumedRole", "aws:PrincipalAccount": ACCOUNT}}, True),
        ({"StringEquals": {"kms:CallerAccount": "444455556666"}}, False),
        ({"StringEquals": {"kms:ViaService": "s3.us-east-1.amazonaws.com"}}, False),
        ({"Null": {"kms:ViaService": "true"}}, True),
        ({"Bool": {"aws:SecureTransport": "true"}}, True),
        ({"Bool": {"kms:MultiRegion": "true"}}, False),
        ({"StringEquals": {"aws:RequestedRegion": "us-east-1"}}, True),
        ({"DateGreaterThan": {"aws:CurrentTime": "2020-01-01T00:00:00Z"}}, True),
        ({"NumericGreaterThan": {"aws:EpochTime": "4102444800"}}, False),
        ({"StringEquals": {"kms:EncryptionContext:strongroom:purpose": "model"}}, True),
        ({"StringEquals": {"kms:EncryptionContext:strongroom:purpose": "prompt"}}, False),
        ({"ForAllValues:StringEquals": {"kms:EncryptionContextKeys": [*CONTEXT]}}, True),
        ({"ForAllValues:StringEquals": {"kms:EncryptionContextKeys": ["strongroom"]}}, False),
        ({"StringEquals": {"kms:EncryptionAlgorithm": "SYMMETRIC_DEFAULT"}}, True),
        ({"StringEquals": {"kms:RequestAlias": "alias/model"}}, True),
        ({"StringEquals": {"kms:RequestAlias": "alias/other"}}, False),
        ({"ForAnyValue:StringEquals": {"kms:ResourceAliases": "alias/model"}}, True),
        ({"StringEqualsIgnoreCase": {"kms:RecipientAttestation:PCR0": "00" * 48}}, False),
        ({"Null": {"kms:RecipientAttestation:ImageSha384": "true"}}, True),
    ],
    ids=str,
)
def test_conditions(kms: KmsEmulator, enclave: Any, conditions: Mapping[str, Any], is_allowed: bool) -> None:
    kms.create_key(policy(statement(ENCLAVE, "kms:Encrypt", **conditions)), alias="alias/model")
    request = {"KeyId": "alias/model", "Plaintext": b"x", "EncryptionContext": CONTEXT}
    request["EncryptionAlgorithm"] = "SYMMETRIC_DEFAULT"
    if is_allowed:
        enclave.encrypt(**request)
    else:
        with refused(DENIED):
            enclave.encrypt(**request)


def test_re_encryption_needs_two_permissions(kms: KmsEmulator, enclave: Any) -> None:
    out = kms.create_key(policy(statement(ENCLAVE, "kms:Encrypt", "kms:ReEncryptFrom")))
    into = kms.create_key(policy(statement(ENCLAVE, "kms:ReEncryptTo", "kms:Decrypt")))
    blob = enclave.encrypt(KeyId=out, Plaintext=b"x")["CiphertextBlob"]
    moved = enclave.re_encrypt(CiphertextBlob=blob, DestinationKeyId=into)["CiphertextBlob"]
    assert enclave.decrypt(CiphertextBlob=moved)["Plaintext"] == b"x"
    with refused(DENIED, f"kms:ReEncryptTo on resource: {out}"):
        enclave.re_encrypt(CiphertextBlob=blob, DestinationKeyId=out)
    with refused(DENIED, f"kms:ReEncryptFrom on resource: {into}"):
        enclave.re_encrypt(CiphertextBlob=moved, DestinationKeyId=into)


# --- Policies -----------------------------------------------------------------------------------------------------


def test_a_policy_is_put_and_counts_at_once(kms: KmsEmulator, administrator: Any, enclave: Any) -> None:
    arn = kms.create_key(policy(statement(ADMINISTRATOR, "kms:*")))
    wider = policy(statement(ADMINISTRATOR, "kms:*"), statement(ENCLAVE, "kms:Encrypt"))
    administrator.put_key_policy(KeyId=arn, Policy=wider)
    enclave.encrypt(KeyId=arn, Plaintext=b"x")
    answer = administrator.get_key_policy(KeyId=arn, PolicyName="default")
    assert (answer["Policy"], answer["PolicyName"]) == (wider, "default")
    assert len(KeyPolicy.parse(answer["Policy"]).statements) == 2
    assert administrator.list_key_policies(KeyId=arn)["PolicyNames"] == ["default"]
    with refused("NotFoundException"):
        administrator.get_key_policy(KeyId=arn, PolicyName="another")


def test_nobody_locks_themselves_out_by_mistake(kms: KmsEmulator, administrator: Any) -> None:
    arn = kms.create_key(policy(statement(ADMINISTRATOR, "kms:*")))
    locked = policy(statement(ENCLAVE, "kms:Decrypt"))
    text = "will not allow you to update the key policy in the future"
    for lockout in (
        locked,
        policy(statement(ENCLAVE, "kms:PutKeyPolicy")),
        policy(statement(ADMINISTRATOR, "kms:*"), statement("*", "kms:PutKeyPolicy", effect="Deny")),
        policy(statement(ROOT_USER, "kms:*")),
    ):
        with refused("MalformedPolicyDocumentException", text):
            administrator.put_key_policy(KeyId=arn, Policy=lockout)
    with refused("MalformedPolicyDocumentException", text):
        administrator.create_key(Policy=locked)
    administrator.put_key_policy(KeyId=arn, Policy=locked, BypassPolicyLockoutSafetyCheck=True)
    with refused(DENIED):  # for ever
        administrator.put_key_policy(KeyId=arn, Policy=policy(statement(ADMINISTRATOR, "kms:*")))
    with kms_client(kms) as root, refused(DENIED):
        root.put_key_policy(KeyId=arn, Policy=policy(statement(ROOT_USER, "kms:*")))


@pytest.mark.parametrize(
    ("text", "code"),
    [
        ("{}", "MalformedPolicyDocumentException"),
        ("[]", "MalformedPolicyDocumentException"),
        ("no policy", "MalformedPolicyDocumentException"),
        (policy(statement("arn:aws:iam::1:root", "kms:*")), "MalformedPolicyDocumentException"),
        (policy(statement("alice", "kms:*")), "MalformedPolicyDocumentException"),
        (policy(statement(f"arn:aws:iam::{ACCOUNT}:role/*", "kms:*")), "MalformedPolicyDocumentException"),
        (policy(statement(ROOT_USER, "kms:*") | {"NotAction": "kms:Decrypt"}), "MalformedPolicyDocumentException"),
        (policy(statement(ROOT_USER, "kms:*")) + " " * 32_768, "LimitExceededException"),
        ("\u20ac", "ValidationException"),
        ("x" * 131_073, "ValidationException"),
    ],
    ids=lambda value: value[:40],
)
def test_what_is_no_policy(kms: KmsEmulator, text: str, code: str) -> None:
    arn = kms.create_key()
    with kms_client(kms) as root:
        before = root.get_key_policy(KeyId=arn)["Policy"]
        with refused(code):
            root.put_key_policy(KeyId=arn, Policy=text)
        with refused(code):
            root.create_key(Policy=text)
        assert root.get_key_policy(KeyId=arn)["Policy"] == before
        assert len(root.list_keys()["Keys"]) == 1


# --- Grants -------------------------------------------------------------------------------------------------------


def test_a_grant_gives_what_the_policy_does_not(kms: KmsEmulator, administrator: Any, enclave: Any) -> None:
    arn = kms.create_key(policy(statement(ADMINISTRATOR, "kms:*")))
    blob = administrator.encrypt(KeyId=arn, Plaintext=b"x", EncryptionContext=CONTEXT)["CiphertextBlob"]
    request = {"KeyId": arn, "CiphertextBlob": blob, "EncryptionContext": CONTEXT}
    with refused(DENIED):
        enclave.decrypt(**request)
    asked = {"KeyId": arn, "GranteePrincipal": ENCLAVE, "Operations": ["Decrypt"], "Name": "one"}
    made = administrator.create_grant(**asked, Constraints={"EncryptionContextSubset": {"strongroom": "1"}})
    assert enclave.decrypt(**request)["Plaintext"] == b"x"
    with refused(DENIED):
        enclave.encrypt(KeyId=arn, Plaintext=b"x", EncryptionContext=CONTEXT)
    with refused(DENIED):
        enclave.decrypt(CiphertextBlob=blob, EncryptionContext={"other": "1"})

    again = administrator.create_grant(**asked, Constraints={"EncryptionContextSubset": {"strongroom": "1"}})
    assert again["GrantId"] == made["GrantId"]
    (entry,) = administrator.list_grants(KeyId=arn)["Grants"]
    grant = Grant.from_api(entry)
    assert (grant.grant_id, grant.grantee_principal, grant.operations) == (made["GrantId"], ENCLAVE, ("Decrypt",))
    assert grant.constraints.encryption_context_subset == {"strongroom": "1"}

    administrator.revoke_grant(KeyId=arn, GrantId=made["GrantId"])
    with refused(DENIED):
        enclave.decrypt(**request)
    with refused("NotFoundException"):
        administrator.revoke_grant(KeyId=arn, GrantId=made["GrantId"])


def test_a_grant_of_grants_gives_no_more(kms: KmsEmulator, administrator: Any, enclave: Any) -> None:
    arn = kms.create_key(policy(statement(ADMINISTRATOR, "kms:*")))
    operations = ["CreateGrant", "Encrypt"]
    administrator.create_grant(KeyId=arn, GranteePrincipal=ENCLAVE, Operations=operations)
    other = f"arn:aws:iam::{ACCOUNT}:role/other"
    enclave.create_grant(KeyId=arn, GranteePrincipal=other, Operations=["Encrypt"])
    with refused("ValidationException", "cannot give more"):
        enclave.create_grant(KeyId=arn, GranteePrincipal=other, Operations=["Decrypt"])


def test_a_condition_on_grants(kms: KmsEmulator, administrator: Any) -> None:
    only: dict[str, Any] = {"ForAllValues:StringEquals": {"kms:GrantOperations": ["Encrypt", "DescribeKey"]}}
    arn = kms.create_key(policy(statement(ADMINISTRATOR, "kms:CreateGrant", **only)))
    administrator.create_grant(KeyId=arn, GranteePrincipal=ENCLAVE, Operations=["Encrypt"])
    with refused(DENIED):
        administrator.create_grant(KeyId=arn, GranteePrincipal=ENCLAVE, Operations=["Encrypt", "Decrypt"])
    with refused("ValidationException", "GranteePrincipal is missing"):
        administrator.create_grant(KeyId=arn, Operations=["Encrypt"])
    for nobody in ("enclave", ACCOUNT, "arn:aws:s3:::bucket"):
        with refused("InvalidArnException"):
            administrator.create_grant(KeyId=arn, GranteePrincipal=nobody, Operations=["Encrypt"])


def test_a_list_comes_in_parts(kms: KmsEmulator, administrator: Any) -> None:
    arn = kms.create_key(policy(statement(ADMINISTRATOR, "kms:*")))
    made = [
        administrator.create_grant(KeyId=arn, GranteePrincipal=ENCLAVE, Operations=["Encrypt"])["GrantId"]
        for _ in range(53)
    ]
    first = administrator.list_grants(KeyId=arn)
    assert (len(first["Grants"]), first["Truncated"]) == (50, True)
    rest = administrator.list_grants(KeyId=arn, Marker=first["NextMarker"])
    assert (len(rest["Grants"]), rest["Truncated"], "NextMarker" in rest) == (3, False, False)
    assert [each["GrantId"] for each in first["Grants"] + rest["Grants"]] == made
    assert len(administrator.list_grants(KeyId=arn, GrantId=made[7])["Grants"]) == 1
    with refused("InvalidMarkerException"):
        administrator.list_grants(KeyId=arn, Marker="-1")


# --- Keys ---------------------------------------------------------------------------------------------------------


def test_a_key_that_is_off(kms: KmsEmulator) -> None:
    arn = kms.create_key()
    with kms_client(kms) as root:
        blob = root.encrypt(KeyId=arn, Plaintext=b"x")["CiphertextBlob"]
        root.disable_key(KeyId=arn)
        with refused("DisabledException", f"{arn} is disabled"):
            root.decrypt(CiphertextBlob=blob)
        with refused("DisabledException"):
            root.generate_data_key(KeyId=arn, KeySpec="AES_256")
        assert root.describe_key(KeyId=arn)["KeyMetadata"]["KeyState"] == "Disabled"
        root.enable_key(KeyId=arn)
        root.decrypt(CiphertextBlob=blob)

        with refused("ValidationException"):
            root.schedule_key_deletion(KeyId=arn, PendingWindowInDays=6)
        answer = root.schedule_key_deletion(KeyId=arn, PendingWindowInDays=7)
        assert (answer["KeyId"], answer["KeyState"], answer["PendingWindowInDays"]) == (arn, "PendingDeletion", 7)
        metadata = KeyMetadata.from_api(root.describe_key(KeyId=arn))
        assert (metadata.state, metadata.enabled, metadata.deletion_date) == (
            "PendingDeletion",
            False,
            answer["DeletionDate"],
        )
        assert isinstance(answer["DeletionDate"], datetime)
        for operation in (root.enable_key, root.disable_key, root.schedule_key_deletion):
            with refused("KMSInvalidStateException", "pending deletion"):
                operation(KeyId=arn)
        with refused("KMSInvalidStateException", "pending deletion"):
            root.decrypt(CiphertextBlob=blob)


@pytest.mark.parametrize(
    ("asked", "code"),
    [
        ({"KeySpec": "HMAC_256", "KeyUsage": "GENERATE_VERIFY_MAC"}, "ValidationException"),
        ({"KeySpec": "ECC_NIST_P256"}, "ValidationException"),
        ({"KeySpec": "none"}, "ValidationException"),
        ({"Origin": "AWS_CLOUDHSM"}, "UnsupportedOperationException"),
        ({"Tags": [{"TagKey": "a", "TagValue": "b"}]}, "UnsupportedOperationException"),
    ],
)
def test_keys_that_are_not_made(kms: KmsEmulator, asked: dict[str, Any], code: str) -> None:
    with kms_client(kms) as root, refused(code):
        root.create_key(**asked)


def test_what_describes_a_key(kms: KmsEmulator, administrator: Any) -> None:
    made = administrator.create_key(
        Policy=policy(statement(ADMINISTRATOR, "kms:*")), Description="of a model", Origin="EXTERNAL"
    )
    arn = made["KeyMetadata"]["Arn"]
    metadata = KeyMetadata.from_api(administrator.describe_key(KeyId=arn))
    assert (metadata.arn.text, metadata.account, metadata.region) == (arn, ACCOUNT, "us-east-1")
    assert (metadata.usage, metadata.spec, metadata.manager) == ("ENCRYPT_DECRYPT", "SYMMETRIC_DEFAULT", "CUSTOMER")
    assert (metadata.origin, metadata.state, metadata.enabled) == ("EXTERNAL", "PendingImport", False)
    assert (metadata.multi_region, metadata.primary, metadata.replicas) == (False, None, ())
    with refused("KMSInvalidStateException", "pending import"):
        administrator.encrypt(KeyId=arn, Plaintext=b"x")


def test_aliases(kms: KmsEmulator) -> None:
    arn, other = kms.create_key(), kms.create_key()
    with kms_client(kms) as root:
        root.create_alias(AliasName="alias/model", TargetKeyId=arn)
        name = arn.replace(f"key/{arn.rpartition('/')[2]}", "alias/model")
        for named in ("alias/model", name):
            assert root.describe_key(KeyId=named)["KeyMetadata"]["Arn"] == arn
        (alias,) = root.list_aliases()["Aliases"]
        assert (alias["AliasArn"], alias["TargetKeyId"]) == (name, arn.rpartition("/")[2])
        assert root.list_aliases(KeyId=other)["Aliases"] == []
        with refused("AlreadyExistsException"):
            root.create_alias(AliasName="alias/model", TargetKeyId=other)
        for bad in ("model", "alias/aws/kms", "alias/"):
            with refused("InvalidAliasNameException"):
                root.create_alias(AliasName=bad, TargetKeyId=arn)


def test_replicas_have_policies_of_their_own(kms: KmsEmulator) -> None:
    locked = policy(statement(ROOT_USER, "kms:*"), statement(ENCLAVE, "kms:Decrypt", StringEquals={"a:b": "c"}))
    arn = kms.create_key(locked, multi_region=True)
    with kms_client(kms) as root:
        with kms_client(kms, region_name="eu-west-1") as early, refused("InvalidSignatureException", "valid region"):
            early.describe_key(KeyId=arn)
        blob = root.encrypt(KeyId=arn, Plaintext=b"x")["CiphertextBlob"]
        made = root.replicate_key(KeyId=arn, ReplicaRegion="eu-west-1")
        replica = made["ReplicaKeyMetadata"]["Arn"]
        assert replica == arn.replace("us-east-1", "eu-west-1")
        assert json.loads(made["ReplicaPolicy"]) != json.loads(locked)
        with refused("AlreadyExistsException"):
            root.replicate_key(KeyId=arn, ReplicaRegion="eu-west-1")
        with refused("UnsupportedOperationException"):
            root.replicate_key(KeyId=kms.create_key(), ReplicaRegion="eu-west-1")

        primary = KeyMetadata.from_api(root.describe_key(KeyId=arn))
        assert primary.primary == primary.arn
        assert [each.text for each in primary.replicas] == [replica]
        with kms_client(kms, region_name="eu-west-1") as elsewhere:
            assert elsewhere.decrypt(CiphertextBlob=blob)["KeyId"] == replica
            metadata = elsewhere.describe_key(KeyId=replica)
            assert KeyMetadata.from_api(metadata).primary == primary.arn
            assert metadata["KeyMetadata"]["MultiRegionConfiguration"]["MultiRegionKeyType"] == "REPLICA"
            with refused("NotFoundException", "Invalid arn us-east-1"):
                elsewhere.describe_key(KeyId=arn)
            with refused("UnsupportedOperationException", "primary"):
                elsewhere.replicate_key(KeyId=replica, ReplicaRegion="eu-west-2")
