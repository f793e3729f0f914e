"""Key policies, key ARNs, grants and metadata: what is read, and what is refused with which code."""

from __future__ import annotations

import json
from datetime import UTC, datetime

import pytest
from hypothesis import given
from hypothesis import strategies as st

from attestation.keypolicy.answers import Grant, GrantConstraints, KeyMetadata
from attestation.keypolicy.document import (
    EVERYONE,
    MAX_POLICY,
    Condition,
    Effect,
    KeyArn,
    KeyPolicy,
    KeyPolicyError,
    Principal,
    PrincipalKind,
    Statement,
    is_kms_host,
)

KEY = "arn:aws:kms:us-east-1:111122223333:key/1234abcd-12ab-34cd-56ef-1234567890ab"
STATEMENT: dict[str, object] = {"Effect": "Allow", "Principal": "*", "Action": "kms:Decrypt", "Resource": "*"}


def written(*statements: object, **fields: object) -> str:
    return json.dumps({"Version": "2012-10-17", **fields, "Statement": list(statements)})


def changed(remove: str = "", **elements: object) -> str:
    """A policy of one statement with some elements more or other ones, and one less."""
    return written({name: value for name, value in {**STATEMENT, **elements}.items() if name != remove})


# ARNs


@pytest.mark.parametrize(
    "text",
    [
        KEY,
        "arn:aws:kms:eu-west-3:111122223333:key/mrk-1234abcd12ab34cd56ef1234567890ab",
        "arn:aws-cn:kms:cn-northwest-1:111122223333:key/a",
        "arn:aws-us-gov:kms:us-gov-west-1:111122223333:key/a",
        "arn:aws-iso-b:kms:us-isob-east-1:111122223333:key/a",
    ],
)
def test_the_full_arn_of_a_key(text: str) -> None:
    arn = KeyArn.parse(text)
    assert arn.text == text
    assert arn == KeyArn(arn.partition, arn.region, arn.account, arn.key_id)
    assert arn.account == "111122223333"


@pytest.mark.parametrize(
    "text",
    [
        "",
        "alias/prompts",
        "arn:aws:kms:us-east-1:111122223333:alias/prompts",
        "1234abcd-12ab-34cd-56ef-1234567890ab",
        "arn:aws:kms:us-east-1:111122223333:key/*",
        "arn:aws:kms:*:111122223333:key/a",
        "arn:aws:kms:us-east-1::key/a",
        "arn:aws:kms:us-east-1:11112222333:key/a",
        "arn:aws:kms:us-east-1:١١١١٢٢٢٢٣٣٣٣:key/a",
        "arn:aws:kms:us-east-1:111122223333:key/",
        "arn:aws:kms:us-east-1:111122223333:key/" + "a" * 129,
        "arn:aws:kms:us-east-1:111122223333:key/a:b",
        "arn:aws:s3:us-east-1:111122223333:key/a",
        "arn:aws:kms:us-east-1:111122223333:key/a\n",
        "arn:AWS:kms:us-east-1:111122223333:key/a",
        "arn:awsx:kms:us-east-1:111122223333:key/a",
    ],
)
def test_nothing_else_names_a_key(text: str) -> None:
    with pytest.raises(KeyPolicyError) as refused:
        KeyArn.parse(text)
    assert (refused.value.code, refused.value.exit_code) == ("bad_key_arn", 2)


def test_an_arn_cannot_be_built_wrong() -> None:
    with pytest.raises(KeyPolicyError, match="bad_key_arn"):
        KeyArn("aws", "us-east-1", "111122223333", "*")


@given(st.text())
def test_any_text_is_a_key_arn_or_an_error(text: str) -> None:
    try:
        arn = KeyArn.parse(text)
    except KeyPolicyError:
        return
    assert arn.text == text


# Policies


def test_a_policy_is_read_as_written() -> None:
    policy = KeyPolicy.parse(
        written(
            {
                "Sid": "Only the release é",
                "Effect": "Allow",
                "Principal": {
                    "AWS": ["111122223333", "arn:aws:iam::111122223333:role/r"],
                    "Service": "a.amazonaws.com",
                },
                "Action": ["kms:Decrypt", "kms:GenerateDataKey*"],
                "Resource": "*",
                "Condition": {
                    "StringEqualsIgnoreCase": {"kms:RecipientAttestation:PCR0": ["aa", "bb"]},
                    "Bool": {"aws:SecureTransport": True},
                    "NumericLessThan": {"n": [10, 1.5, "2"]},
                },
            },
            {"Effect": "Deny", "NotPrincipal": "*", "NotAction": "kms:Get*", "NotResource": [KEY]},
            Id="key policy",
        )
    )
    assert policy == KeyPolicy(
        version="2012-10-17",
        id="key policy",
        statements=(
            Statement(
                sid="Only the release é",
                effect=Effect.ALLOW,
                principals=(
                    Principal(PrincipalKind.AWS, "111122223333"),
                    Principal(PrincipalKind.AWS, "arn:aws:iam::111122223333:role/r"),
                    Principal(PrincipalKind.SERVICE, "a.amazonaws.com"),
                ),
                actions=("kms:Decrypt", "kms:GenerateDataKey*"),
                resources=("*",),
                conditions=(
                    Condition("StringEqualsIgnoreCase", "kms:RecipientAttestation:PCR0", ("aa", "bb")),
                    Condition("Bool", "aws:SecureTransport", ("true",)),
                    Condition("NumericLessThan", "n", ("10", "1.5", "2")),
                ),
            ),
            Statement(
                sid=None,
                effect=Effect.DENY,
                not_principals=(EVERYONE,),
                not_actions=("kms:Get*",),
                not_resources=(KEY,),
            ),
        ),
    )
    assert KeyPolicy.parse(policy.encode()) == policy
    assert policy.encode() == KeyPolicy.parse(policy.encode()).encode()


def test_a_single_statement_needs_no_list_and_an_old_policy_no_version() -> None:
    policy = KeyPolicy.parse(json.dumps({"Statement": STATEMENT}))
    assert (len(policy.statements), policy.version, policy.id) == (1, "2008-10-17", None)


def test_what_is_written() -> None:
    statement = Statement(
        sid="s",
        effect=Effect.ALLOW,
        principals=(Principal(PrincipalKind.AWS, "a"), Principal(PrincipalKind.SERVICE, "s")),
        actions=("kms:Decrypt",),
        resources=("*",),
        conditions=(Condition("StringLike", "k", ("v", "w")), Condition("StringLike", "l", ("v",))),
    )
    assert json.loads(KeyPolicy((statement,), id="i").encode()) == {
        "Version": "2012-10-17",
        "Id": "i",
        "Statement": [
            {
                "Sid": "s",
                "Effect": "Allow",
                "Principal": {"AWS": "a", "Service": "s"},
                "Action": "kms:Decrypt",
                "Resource": "*",
                "Condition": {"StringLike": {"k": ["v", "w"], "l": "v"}},
            }
        ],
    }


def test_a_policy_is_indented_while_it_fits() -> None:
    (statement,) = KeyPolicy.parse(changed()).statements
    small, large, larger = (KeyPolicy((statement,) * count).encode for count in (10, 300, 600))
    assert "\n" in small()
    assert "\n" not in large()
    assert len(large()) <= MAX_POLICY
    with pytest.raises(KeyPolicyError) as refused:
        larger()
    assert refused.value.code == "policy_too_large"


def test_the_largest_policy() -> None:
    text = changed()
    assert KeyPolicy.parse(text + " " * (MAX_POLICY - len(text)))
    with pytest.raises(KeyPolicyError) as refused:
        KeyPolicy.parse(text + " " * (MAX_POLICY - len(text) + 1))
    assert refused.value.code == "policy_too_large"


MALFORMED = {
    "no JSON": ("", "malformed_key_policy"),
    "a character beyond Latin-1": (changed(Sid="x").replace("x", "☃"), "malformed_key_policy"),
    "a control character": (changed() + "\x00", "malformed_key_policy"),
    "half a character": (changed() + "\ud800", "malformed_key_policy"),
    "an escape for what may not stand there": (changed(Sid="☃"), "malformed_key_policy"),
    "nested too deep": (changed(Condition={"Bool": {"k": [["x"]]}}), "malformed_key_policy"),
    "an element twice": ('{"Statement": [], "Statement": []}', "malformed_key_policy"),
    "no object": ("[]", "malformed_key_policy"),
    "an empty object": ("{}", "malformed_key_policy"),
    "no statement element": ('{"Version": "2012-10-17"}', "malformed_key_policy"),
    "no statement": (written(), "malformed_key_policy"),
    "an empty statement": (written({}), "malformed_key_policy"),
    "a text for a statement": (written("x"), "malformed_key_policy"),
    "another version": (written(STATEMENT, Version="2020-01-01"), "malformed_key_policy"),
    "a version of another type": (written(STATEMENT, Version=["2012-10-17"]), "malformed_key_policy"),
    "an id of another type": (written(STATEMENT, Id=1), "malformed_key_policy"),
    "an unknown element of the policy": (written(STATEMENT, Statements=[]), "unknown_element"),
    "an unknown element of a statement": (changed(Conditions={}), "unknown_element"),
    "an element in another case": (changed(remove="Effect", effect="Allow"), "unknown_element"),
    "no effect": (changed(remove="Effect"), "malformed_key_policy"),
    "an unknown effect": (changed(Effect="allow"), "malformed_key_policy"),
    "no principal": (changed(remove="Principal"), "malformed_key_policy"),
    "both kinds of principals": (changed(NotPrincipal="*"), "malformed_key_policy"),
    "both kinds of actions": (changed(NotAction="kms:Decrypt"), "malformed_key_policy"),
    "no resource": (changed(remove="Resource"), "malformed_key_policy"),
    "an unknown kind of principal": (changed(Principal={"aws": "*"}), "unknown_element"),
    "an empty principal": (changed(Principal={}), "malformed_key_policy"),
    "no principals of a kind": (changed(Principal={"AWS": []}), "malformed_key_policy"),
    "a principal of another type": (changed(Principal=["*"]), "malformed_key_policy"),
    "no actions": (changed(Action=[]), "malformed_key_policy"),
    "an action of another type": (changed(Action=[1]), "malformed_key_policy"),
    "a null action": (changed(Action=None), "malformed_key_policy"),
    "an empty condition": (changed(Condition={}), "malformed_key_policy"),
    "a key in two spellings": (
        changed(Condition={"StringEquals": {"kms:ViaService": "a", "KMS:viaservice": "b"}}),
        "malformed_key_policy",
    ),
    "an operator in two spellings": (
        changed(Condition={"StringEquals": {"a": "a"}, "stringEquals": {"b": "b"}}),
        "malformed_key_policy",
    ),
    "an operator without keys": (changed(Condition={"Bool": {}}), "malformed_key_policy"),
    "a condition without values": (changed(Condition={"Bool": {"k": []}}), "malformed_key_policy"),
    "a null value": (changed(Condition={"Bool": {"k": [None]}}), "malformed_key_policy"),
    "an object for a value": (changed(Condition={"Bool": {"k": {"a": "b"}}}), "malformed_key_policy"),
    "a list for keys": (changed(Condition={"Bool": ["k"]}), "malformed_key_policy"),
}


@pytest.mark.parametrize(("text", "code"), MALFORMED.values(), ids=MALFORMED)
def test_what_the_grammar_does_not_have_is_refused(text: str, code: str) -> None:
    with pytest.raises(KeyPolicyError) as refused:
        KeyPolicy.parse(text)
    assert refused.value.code == code
    assert str(refused.value).isascii()


def test_the_error_says_where() -> None:
    with pytest.raises(KeyPolicyError) as refused:
        KeyPolicy.parse(written(STATEMENT, {**STATEMENT, "Condition": {"Bool": {"k": []}}}))
    assert refused.value.message == "Statement[1].Condition.Bool.k: not of the policy grammar"
    assert (refused.value.expected, refused.value.got) == ("at least one value", "'none'")


def test_statements_and_policies_cannot_be_built_wrong() -> None:
    with pytest.raises(ValueError, match="either Principal or NotPrincipal"):
        Statement(sid=None, effect=Effect.ALLOW, actions=("a",), resources=("*",))
    with pytest.raises(ValueError, match="either Action or NotAction"):
        Statement(None, Effect.ALLOW, (EVERYONE,), actions=("a",), not_actions=("b",), resources=("*",))
    with pytest.raises(ValueError, match="stands alone"):
        Statement(None, Effect.ALLOW, (EVERYONE, Principal(PrincipalKind.AWS, "a")), actions=("a",), resources=("*",))
    condition = Condition("Bool", "k", ("true",))
    with pytest.raises(ValueError, match="twice"):
        Statement(None, Effect.ALLOW, (EVERYONE,), actions=("a",), resources=("*",), conditions=(condition, condition))
    for respelled in (Condition("Bool", "K", ("true",)), Condition("bool", "k", ("true",)), Condition("BOOL", "l", ())):
        both = condition, respelled
        with pytest.raises(ValueError, match="twice"):
            Statement(None, Effect.ALLOW, (EVERYONE,), actions=("a",), resources=("*",), conditions=both)
    with pytest.raises(ValueError, match="has statements"):
        KeyPolicy(())
    (statement,) = KeyPolicy.parse(changed()).statements
    with pytest.raises(ValueError, match="version"):
        KeyPolicy((statement,), version="2020-01-01")


TEXTS = st.text(st.characters(max_codepoint=255, exclude_categories=["Cc"]), max_size=8)
VALUES = st.one_of(TEXTS, st.integers(), st.booleans(), st.floats(allow_nan=False, allow_infinity=False))


def one_or_more(values: st.SearchStrategy[object]) -> st.SearchStrategy[object]:
    return st.one_of(values, st.lists(values, min_size=1, max_size=3))


@st.composite
def policies(draw: st.DrawFn) -> str:
    def element(name: str, values: st.SearchStrategy[object]) -> dict[str, object]:
        return {draw(st.sampled_from([name, f"Not{name}"])): draw(values)}

    kinds = st.sampled_from(["AWS", "Service", "Federated", "CanonicalUser"])
    principals = st.one_of(st.just("*"), st.dictionaries(kinds, one_or_more(TEXTS), min_size=1))
    names = TEXTS.map(str.lower)
    conditions = st.dictionaries(
        names, st.dictionaries(names, one_or_more(VALUES), min_size=1, max_size=3), min_size=1, max_size=3
    )
    statements = [
        {
            **({"Sid": draw(TEXTS)} if draw(st.booleans()) else {}),
            "Effect": draw(st.sampled_from(["Allow", "Deny"])),
            **element("Principal", principals),
            **element("Action", one_or_more(TEXTS)),
            **element("Resource", one_or_more(TEXTS)),
            **({"Condition": draw(conditions)} if draw(st.booleans()) else {}),
        }
        for _ in range(draw(st.integers(1, 3)))
    ]
    return written(*statements)


@given(policies())
def test_what_is_read_is_written_and_read_again(text: str) -> None:
    policy = KeyPolicy.parse(text)
    assert KeyPolicy.parse(policy.encode()) == policy


@given(st.one_of(st.text(), policies().flatmap(lambda text: st.integers(0, len(text)).map(lambda cut: text[:cut]))))
def test_any_text_is_a_policy_or_an_error(text: str) -> None:
    try:
        policy = KeyPolicy.parse(text)
    except KeyPolicyError:
        return
    assert policy.statements


# Grants and metadata

GRANT: dict[str, object] = {
    "KeyId": KEY,
    "GrantId": "g1",
    "Name": "ebs",
    "GranteePrincipal": "arn:aws:iam::111122223333:role/r",
    "RetiringPrincipal": "arn:aws:iam::111122223333:root",
    "IssuingAccount": "arn:aws:iam::111122223333:root",
    "Operations": ["Decrypt", "CreateGrant"],
    "Constraints": {"EncryptionContextSubset": {"a": "b"}},
}


def test_a_grant() -> None:
    assert Grant.from_api(GRANT) == Grant(
        grant_id="g1",
        grantee_principal="arn:aws:iam::111122223333:role/r",
        retiring_principal="arn:aws:iam::111122223333:root",
        operations=("Decrypt", "CreateGrant"),
        constraints=GrantConstraints(encryption_context_subset={"a": "b"}),
        name="ebs",
    )


def test_a_grant_to_a_service() -> None:
    grant = Grant.from_api(
        {
            "GrantId": "g2",
            "GranteeServicePrincipal": "a.amazonaws.com",
            "RetiringServicePrincipal": "b.amazonaws.com",
            "Operations": [],
            "Constraints": {"SourceArn": "arn:aws:s3:::b", "EncryptionContextEquals": {}},
        }
    )
    assert (grant.grantee_principal, grant.retiring_principal, grant.name) == (
        "a.amazonaws.com",
        "b.amazonaws.com",
        None,
    )
    assert grant.constraints == GrantConstraints(encryption_context_equals={}, source_arn="arn:aws:s3:::b")


def test_a_grant_without_constraints() -> None:
    assert Grant.from_api({**GRANT, "Constraints": None}).constraints == GrantConstraints()


METADATA: dict[str, object] = {
    "AWSAccountId": "111122223333",
    "KeyId": "1234abcd-12ab-34cd-56ef-1234567890ab",
    "Arn": KEY,
    "Enabled": True,
    "KeyState": "Enabled",
    "KeyUsage": "ENCRYPT_DECRYPT",
    "KeySpec": "SYMMETRIC_DEFAULT",
    "Origin": "AWS_KMS",
    "KeyManager": "CUSTOMER",
    "MultiRegion": False,
}


def test_metadata() -> None:
    key = KeyMetadata.from_api({"KeyMetadata": METADATA})
    assert key == KeyMetadata(
        arn=KeyArn.parse(KEY),
        enabled=True,
        state="Enabled",
        usage="ENCRYPT_DECRYPT",
        spec="SYMMETRIC_DEFAULT",
        origin="AWS_KMS",
        manager="CUSTOMER",
        multi_region=False,
    )
    assert (key.account, key.region) == ("111122223333", "us-east-1")


def test_metadata_of_a_multi_region_key_about_to_be_deleted() -> None:
    primary, replica = (f"arn:aws:kms:{region}:111122223333:key/mrk-1" for region in ("us-east-1", "eu-west-1"))
    deletion = datetime(2030, 1, 1, tzinfo=UTC)
    copies = {
        "MultiRegionKeyType": "PRIMARY",
        "PrimaryKey": {"Arn": primary, "Region": "us-east-1"},
        "ReplicaKeys": [{"Arn": replica, "Region": "eu-west-1"}],
    }
    answer: dict[str, object] = {
        **METADATA,
        "Arn": primary,
        "MultiRegion": True,
        "MultiRegionConfiguration": copies,
        "DeletionDate": deletion,
        "CustomerMasterKeySpec": "SYMMETRIC_DEFAULT",
    }
    del answer["KeySpec"]
    key = KeyMetadata.from_api({"KeyMetadata": answer})
    assert (key.primary, key.replicas, key.deletion_date) == (KeyArn.parse(primary), (KeyArn.parse(replica),), deletion)
    assert (key.spec, key.multi_region) == ("SYMMETRIC_DEFAULT", True)


BAD_GRANTS = {
    "no id": {**GRANT, "GrantId": None},
    "an id of another type": {**GRANT, "GrantId": 1},
    "nobody": {**GRANT, "GranteePrincipal": None},
    "no operations": {**GRANT, "Operations": None},
    "an operation of another type": {**GRANT, "Operations": [1]},
    "an unknown constraint": {**GRANT, "Constraints": {"Weekday": "Monday"}},
    "constraints of another type": {**GRANT, "Constraints": ["a"]},
    "a pair of another type": {**GRANT, "Constraints": {"EncryptionContextEquals": {"a": 1}}},
}


@pytest.mark.parametrize("entry", BAD_GRANTS.values(), ids=BAD_GRANTS)
def test_a_grant_that_cannot_be_judged(entry: dict[str, object]) -> None:
    with pytest.raises(KeyPolicyError) as refused:
        Grant.from_api(entry)
    assert refused.value.code == "malformed_key_answer"


BAD_METADATA: dict[str, tuple[dict[str, object], str]] = {
    "no metadata": ({}, "malformed_key_answer"),
    "a text": ({"KeyMetadata": "x"}, "malformed_key_answer"),
    "no state": ({"KeyMetadata": {**METADATA, "KeyState": None}}, "malformed_key_answer"),
    "an alias": ({"KeyMetadata": {**METADATA, "Arn": "alias/a"}}, "bad_key_arn"),
    "two accounts": ({"KeyMetadata": {**METADATA, "AWSAccountId": "444455556666"}}, "malformed_key_answer"),
    "a local time": ({"KeyMetadata": {**METADATA, "DeletionDate": datetime(2030, 1, 1)}}, "malformed_key_answer"),
    "a replica of another type": (
        {"KeyMetadata": {**METADATA, "MultiRegionConfiguration": {"ReplicaKeys": ["x"]}}},
        "malformed_key_answer",
    ),
}


@pytest.mark.parametrize(("answer", "code"), BAD_METADATA.values(), ids=BAD_METADATA)
def test_metadata_that_cannot_be_judged(answer: dict[str, object], code: str) -> None:
    with pytest.raises(KeyPolicyError) as refused:
        KeyMetadata.from_api(answer)
    assert refused.value.code == code


@pytest.mark.parametrize(
    ("host", "is_kms"),
    [
        ("kms.us-east-1.amazonaws.com", True),
        ("kms-fips.us-east-1.amazonaws.com", True),
        ("kms.us-east-1.amazonaws.com.cn", True),
        ("kms.us-east-1.api.aws", True),
        ("vpce-0a1b-2c3d.kms.us-east-1.vpce.amazonaws.com", True),
        ("kms.eu-central-1.amazonaws.com", False),
        ("kms.us-east-1.amazonaws.com.example", False),
        ("kms.us-east-1.amazonaws.com\n", False),
        ("kms.us-east-1.amazonaws.com.", False),
        ("kms.usxeast-1.amazonaws.com", False),
        ("kmsxus-east-1.amazonaws.com", False),
        ("s3.us-east-1.amazonaws.com", False),
        ("vpce-1.example.kms.us-east-1.vpce.amazonaws.com", False),
        ("127.0.0.1", False),
        ("", False),
    ],
)
def test_the_hosts_of_kms(host: str, is_kms: bool) -> None:
    assert is_kms_host(host, "us-east-1") is is_kms
    assert not is_kms_host(host, "us.east.1")
