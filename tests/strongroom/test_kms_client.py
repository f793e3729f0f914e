"""KMS, asked with boto3 over HTTPS about real keys: what is judged is what it says; what it does not say refuses."""

from __future__ import annotations

import base64
import contextlib
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest

from attestation.anchors import AWS_NITRO_G1
from attestation.envelope import encryption_context
from attestation.keypolicy.document import KeyArn
from attestation.keypolicy.mutability import Locked, MutableBy, mutability
from attestation.keyrelease import KeyFacts
from attestation.policy import AppraisalPolicy
from emulator.kms_endpoint import KmsEmulator, kms_emulator
from emulator.kms_faults import Alter, Fault, Refuse, another_key
from strongroom.kms import client as kms_client
from strongroom.kms.client import MAX_GRANTS, MAX_PAGES, KmsClient, KmsError, ask_of_keys
from tests.attested import policy_for
from tests.key_facts import key_policy, with_keys
from tests.key_policies import CONTEXT, MODEL, PROMPT, RELEASES, STRANGER

CONTEXT_OF_PROMPTS = encryption_context(PROMPT, CONTEXT, 1)


def become(kms: KmsEmulator, resource: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whom this machine's boto3 is configured for."""
    for name in ("AWS_PROFILE", "AWS_SESSION_TOKEN", "HTTPS_PROXY", "https_proxy"):
        monkeypatch.delenv(name, raising=False)
    for name, value in kms.environment(kms.principal(resource)).items():
        monkeypatch.setenv(name, value)


@pytest.fixture
def kms(monkeypatch: pytest.MonkeyPatch) -> Iterator[KmsEmulator]:
    """A KMS that this machine's boto3 is configured for, as the role that seals."""
    monkeypatch.setattr(kms_client, "ATTEMPTS", 1)
    with kms_emulator() as emulator:
        become(emulator, "assumed-role/seal/me", monkeypatch)
        yield emulator


POLICY = key_policy(RELEASES, PROMPT).encode()


@pytest.fixture
def key(kms: KmsEmulator) -> KeyArn:
    return KeyArn.parse(kms.create_key(POLICY))


@contextlib.contextmanager
def refused(code: str, exit_code: int, *, text: str = "") -> Iterator[None]:
    with pytest.raises(KmsError) as caught:
        yield
    error = caught.value
    assert (error.code, error.exit_code) == (code, exit_code), error
    assert text in str(error)


def ask_of_key(key: KeyArn) -> KeyFacts:
    with KmsClient(key.region) as client:
        return client.facts(key)


# --- Facts --------------------------------------------------------------------------------------------------------


def test_what_kms_says_of_a_key(kms: KmsEmulator, key: KeyArn) -> None:
    facts = ask_of_key(key)
    assert (facts.metadata.arn, facts.metadata.enabled, facts.metadata.state) == (key, True, "Enabled")
    assert (facts.metadata.usage, facts.metadata.spec) == ("ENCRYPT_DECRYPT", "SYMMETRIC_DEFAULT")
    assert (facts.metadata.origin, facts.metadata.manager, facts.metadata.multi_region) == (
        "AWS_KMS",
        "CUSTOMER",
        False,
    )
    assert facts.policy.encode() == POLICY
    assert facts.grants == ()
    assert mutability(facts.policy, facts.metadata, facts.grants) != Locked()


def test_every_key_that_a_policy_names_is_asked_about(kms: KmsEmulator, key: KeyArn) -> None:
    other = KeyArn.parse(kms.create_key(key_policy(RELEASES, PROMPT, administrators=()).encode()))
    policy = with_keys(policy_for(b"\x10" * 48, b"\x11" * 48), PROMPT, key=key)
    asked = ask_of_keys(replace(policy, kms={**policy.kms, **with_keys(policy, MODEL, key=other).kms}))
    assert asked.keys() == {key, other}
    assert {each.metadata.arn for each in asked.values()} == {key, other}
    assert [type(mutability(asked[each].policy)) for each in (key, other)] == [MutableBy, Locked]


def test_nothing_is_asked_where_no_key_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kms_client, "KmsClient", None)
    assert ask_of_keys(policy_for(b"\x10" * 48, b"\x11" * 48)) == {}


def page(answer: Any, grants: list[Any], marker: str | None) -> dict[str, Any]:
    return {**answer, "Grants": grants, "Truncated": marker is not None} | (
        {} if marker is None else {"NextMarker": marker}
    )


ENTRY = {
    "GrantId": "g",
    "GranteePrincipal": STRANGER,
    "Operations": ["Decrypt"],
    "KeyId": "k",
    "IssuingAccount": "arn:aws:iam::111122223333:root",
}


def test_grants_are_read_to_their_end(kms: KmsEmulator, monkeypatch: pytest.MonkeyPatch) -> None:
    """KMS answers with 50 at a time."""
    become(kms, "root", monkeypatch)
    key = KeyArn.parse(kms.create_key())
    with KmsClient(key.region) as client:
        for number in range(51):
            client.ask(
                "create_grant",
                KeyId=key.text,
                GranteePrincipal=STRANGER,
                Operations=["Decrypt"],
                Name=f"grant-{number}",
            )
    grants = ask_of_key(key).grants
    assert {grant.name for grant in grants} == {f"grant-{number}" for number in range(51)}
    assert {(grant.grantee_principal, grant.operations) for grant in grants} == {(STRANGER, ("Decrypt",))}


@pytest.mark.parametrize(("size", "pages"), [(600, 2), (MAX_GRANTS + 1, 1), (0, MAX_PAGES)])
def test_grants_without_end_are_given_up(
    kms: KmsEmulator, key: KeyArn, monkeypatch: pytest.MonkeyPatch, size: int, pages: int
) -> None:
    ask, asked = KmsClient.ask, []

    def endless(client: KmsClient, operation: str, **request: object) -> Any:
        if operation != "list_grants":
            return ask(client, operation, **request)
        asked.append(request.get("Marker"))
        return page({}, [ENTRY] * size, f"page {len(asked)}")

    monkeypatch.setattr(KmsClient, "ask", endless)
    with refused("bad_kms_answer", 3, text="more grants than anybody judges"):
        ask_of_key(key)
    assert asked == [None, *(f"page {number}" for number in range(1, pages))]


def test_as_many_grants_as_are_read(kms: KmsEmulator, key: KeyArn) -> None:
    kms.faults.inject(Alter(lambda answer: page(answer, [ENTRY] * MAX_GRANTS, None)), operation="ListGrants")
    assert len(ask_of_key(key).grants) == MAX_GRANTS


def without(field: str) -> Callable[[Any], dict[str, Any]]:
    return lambda answer: {name: value for name, value in answer.items() if name != field}


def metadata(**changes: object) -> Callable[[Any], dict[str, Any]]:
    return lambda answer: {**answer, "KeyMetadata": {**answer["KeyMetadata"], **changes}}


@pytest.mark.parametrize(
    ("operation", "change"),
    [
        ("DescribeKey", without("KeyMetadata")),
        ("DescribeKey", metadata(Arn="alias/x")),
        ("DescribeKey", metadata(AWSAccountId="444455556666")),
        ("DescribeKey", metadata(KeyState=None)),
        ("GetKeyPolicy", without("Policy")),
        ("GetKeyPolicy", lambda answer: {**answer, "Policy": "{}"}),
        ("GetKeyPolicy", lambda answer: {**answer, "Policy": "x" * 40_000}),
        ("ListGrants", without("Grants")),
        ("ListGrants", without("Truncated")),
        ("ListGrants", lambda answer: {**answer, "Truncated": True}),
        ("ListGrants", lambda answer: page(answer, [{**ENTRY, "Operations": None}], None)),
    ],
)
def test_an_answer_that_cannot_be_judged(
    kms: KmsEmulator, key: KeyArn, operation: str, change: Callable[[Any], dict[str, Any]]
) -> None:
    kms.faults.inject(Alter(change), operation=operation)
    with refused("bad_kms_answer", 3):
        ask_of_key(key)


# --- No answer ----------------------------------------------------------------------------------------------------


def test_a_key_that_is_not_there(kms: KmsEmulator, key: KeyArn) -> None:
    with refused("kms_refused", 4, text="DescribeKey"):
        ask_of_key(replace(key, key_id="00000000-0000-0000-0000-000000000000"))


def test_somebody_who_may_not_ask(kms: KmsEmulator, key: KeyArn, monkeypatch: pytest.MonkeyPatch) -> None:
    become(kms, "assumed-role/parent/me", monkeypatch)
    with refused("kms_refused", 4, text="AccessDeniedException"):
        ask_of_key(key)


@pytest.mark.parametrize(
    "fault",
    [
        Refuse("ThrottlingException", "Rate exceeded"),
        Refuse("KMSInternalException", "An internal error has occurred.", 500),
        Refuse("ExpiredTokenException", "The security token included in the request is expired"),
    ],
)
@pytest.mark.parametrize("operation", ["DescribeKey", "GetKeyPolicy", "ListGrants"])
def test_kms_that_refuses(kms: KmsEmulator, key: KeyArn, operation: str, fault: Fault) -> None:
    kms.faults.inject(fault, operation=operation)
    assert isinstance(fault, Refuse)
    with refused("kms_refused", 4, text=fault.code):
        ask_of_key(key)


def test_nobody_answers(kms: KmsEmulator, key: KeyArn, monkeypatch: pytest.MonkeyPatch, nobody: str) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL_KMS", nobody.replace("http", "https"))
    with refused("kms_unavailable", 4):
        ask_of_key(key)


def test_another_authority_is_not_trusted(kms: KmsEmulator, key: KeyArn, monkeypatch: pytest.MonkeyPatch) -> None:
    with kms_emulator() as other:
        monkeypatch.setenv("AWS_ENDPOINT_URL_KMS", other.endpoint)
        with refused("kms_unavailable", 4, text="SSL"):
            ask_of_key(key)


@pytest.mark.parametrize(
    ("name", "value"),
    [("AWS_PROFILE", "no-such-profile"), ("AWS_ENDPOINT_URL_KMS", "no url"), ("AWS_ACCESS_KEY_ID", "")],
)
def test_boto3_that_is_configured_badly(
    kms: KmsEmulator, key: KeyArn, monkeypatch: pytest.MonkeyPatch, name: str, value: str
) -> None:
    monkeypatch.setenv(name, value)
    with refused("kms_unavailable", 4):
        ask_of_key(key)


# --- Data keys ----------------------------------------------------------------------------------------------------


def test_a_data_key_is_wrapped_under_the_key(kms: KmsEmulator, key: KeyArn) -> None:
    with KmsClient(key.region) as client:
        data_key, wrapped = client.generate_data_key(key, CONTEXT_OF_PROMPTS)
        again, _ = client.generate_data_key(key, CONTEXT_OF_PROMPTS)
    assert len(data_key.expose()) == 32
    assert data_key.expose() != again.expose()
    assert 0 < len(wrapped) <= 6144


def test_a_data_key_for_another_purpose_is_refused(kms: KmsEmulator, key: KeyArn) -> None:
    with KmsClient(key.region) as client, refused("kms_refused", 4, text="AccessDeniedException"):
        client.generate_data_key(key, encryption_context(MODEL, CONTEXT, 1))


def octets(field: str, size: int) -> Alter:
    return Alter(lambda answer: {**answer, field: base64.b64encode(bytes(size)).decode("ascii")})


@pytest.mark.parametrize(
    ("fault", "code"),
    [
        (another_key("arn:aws:kms:us-east-1:111122223333:key/another"), "wrong_kms_key"),
        (Alter(without("KeyId")), "wrong_kms_key"),
        (Alter(without("Plaintext")), "bad_kms_answer"),
        (Alter(without("CiphertextBlob")), "bad_kms_answer"),
        (octets("Plaintext", 31), "bad_kms_answer"),
        (octets("CiphertextBlob", 0), "bad_kms_answer"),
        (octets("CiphertextBlob", 6145), "bad_kms_answer"),
    ],
)
def test_a_data_key_that_is_not_what_was_asked_for(kms: KmsEmulator, key: KeyArn, fault: Fault, code: str) -> None:
    kms.faults.inject(fault, operation="GenerateDataKey")
    with KmsClient(key.region) as client, refused(code, 3):
        client.generate_data_key(key, CONTEXT_OF_PROMPTS)


# --- AWS's own, where the policy is about AWS -------------------------------------------------------------------------


def of_aws(key: KeyArn) -> AppraisalPolicy:
    """A policy with AWS's anchor, which names ``key``."""
    return replace(with_keys(policy_for(b"\x10" * 48, b"\x11" * 48), PROMPT, key=key), anchor=AWS_NITRO_G1)


@pytest.mark.parametrize("variable", ["AWS_ENDPOINT_URL_KMS", "AWS_ENDPOINT_URL"])
def test_an_emulator_says_nothing_about_aws_keys(
    kms: KmsEmulator, key: KeyArn, monkeypatch: pytest.MonkeyPatch, variable: str
) -> None:
    monkeypatch.delenv("AWS_ENDPOINT_URL_KMS")
    monkeypatch.setenv(variable, kms.endpoint)
    monkeypatch.setattr(KmsClient, "ask", None)
    with refused("foreign_kms", 3, text=kms.endpoint):
        ask_of_keys(of_aws(key))


@pytest.mark.parametrize(
    "url",
    [
        "https://kms.eu-central-1.amazonaws.com",
        "https://kms.us-east-1.amazonaws.com.example",
        "https://kms.us-east-1.amazonaws.com@example.com",
        "https://s3.us-east-1.amazonaws.com",
        "https://kms-us-east-1.amazonaws.com",
        "http://kms.us-east-1.amazonaws.com",
    ],
)
def test_endpoints_that_are_not_kms_own(key: KeyArn, monkeypatch: pytest.MonkeyPatch, url: str) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL_KMS", url)
    with refused("foreign_kms" if url.startswith("https") else "kms_unavailable", 3 if url.startswith("https") else 4):
        KmsClient(key.region, policy=of_aws(key))


@pytest.mark.parametrize(
    ("variable", "value", "host"),
    [
        ("AWS_DEFAULT_REGION", "eu-central-1", "kms.us-east-1.amazonaws.com"),
        ("AWS_USE_FIPS_ENDPOINT", "true", "kms-fips.us-east-1.amazonaws.com"),
        ("AWS_USE_DUALSTACK_ENDPOINT", "true", "kms.us-east-1.api.aws"),
        ("AWS_ENDPOINT_URL_KMS", "https://KMS.us-east-1.amazonaws.com:443/", "KMS.us-east-1.amazonaws.com"),
        (
            "AWS_ENDPOINT_URL_KMS",
            "https://vpce-0a1b-2c3d.kms.us-east-1.vpce.amazonaws.com",
            "vpce-0a1b-2c3d.kms.us-east-1.vpce.amazonaws.com",
        ),
    ],
)
def test_endpoints_of_aws(
    kms: KmsEmulator, key: KeyArn, monkeypatch: pytest.MonkeyPatch, variable: str, value: str, host: str
) -> None:
    monkeypatch.delenv("AWS_ENDPOINT_URL_KMS")
    monkeypatch.setenv(variable, value)
    with KmsClient(key.region, policy=of_aws(key)) as client:
        assert client.is_amazons
        assert host in client.endpoint


def test_an_emulated_policy_is_judged_by_any_kms(kms: KmsEmulator, key: KeyArn) -> None:
    with KmsClient(key.region, policy=policy_for(b"\x10" * 48, b"\x11" * 48)) as client:
        assert not client.is_amazons
