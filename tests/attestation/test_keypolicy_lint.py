"""Every rule finds what it is about and nothing else; and what passes opens to the accepted releases alone."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from attestation.envelope import EnvelopePurpose
from attestation.keypolicy.actions import POWERS, PREFIX, Power
from attestation.keypolicy.answers import Grant, KeyMetadata
from attestation.keypolicy.attested import ReleasedTo, meant, register_of
from attestation.keypolicy.decision import Request, decide, encryption_context, recipient_context
from attestation.keypolicy.document import KeyArn, KeyPolicy, KeyPolicyError
from attestation.keypolicy.findings import RULES, Finding, Severity
from attestation.keypolicy.lint import lint
from tests.key_policies import (
    ACCOUNT,
    ADMIN,
    CONTEXT,
    CONTEXT_KEY,
    COPY,
    EQUALS,
    INDEXES,
    KEY,
    METADATA,
    MODEL,
    PARENT,
    PROMPT,
    PURPOSE_KEY,
    RECIPIENT,
    RELEASES,
    ROOT,
    STRANGER,
    Json,
    allow,
    as_json,
    asking,
    deny,
    good,
    grant,
    kept_to,
    opening,
    parsed,
    register,
    release,
)

GOOD = good()


@dataclass(frozen=True)
class Facts:
    """What the linter is given: by default all that is good."""

    policy: KeyPolicy = GOOD
    releases: Sequence[ReleasedTo] | None = RELEASES
    purpose: EnvelopePurpose | None = PROMPT
    context: str | None = CONTEXT
    administrators: Collection[str] = (ADMIN,)
    metadata: KeyMetadata | None = METADATA
    grants: Sequence[Grant] = ()
    account: str | None = None
    copies: Collection[KeyArn] = ()

    def findings(self) -> tuple[Finding, ...]:
        return lint(
            self.policy,
            releases=self.releases,
            purpose=self.purpose,
            context=self.context,
            administrators=self.administrators,
            metadata=self.metadata,
            grants=self.grants,
            account=self.account,
            copies=self.copies,
        )

    def rules(self, *severities: Severity) -> set[str]:
        return {finding.rule for finding in self.findings() if not severities or finding.severity in severities}


def of(*statements: Json) -> Facts:
    return Facts(parsed(*statements))


ONE = opening(1)
BOTH = as_json(good())["Statement"][:2]
UPPER = register(1, 0).hex().upper()
PCR0 = {f"{RECIPIENT}PCR0": register(1, 0).hex()}
EVERYBODY = {"AWS": "*"}
ABROAD = "arn:aws:iam::444455556666:role/parent"


def mrk(**changes: object) -> KeyMetadata:
    return replace(METADATA, **{"multi_region": True, "primary": KEY, **changes})  # type: ignore[arg-type]


# For each rule: what breaks it, and what looks much like that and does not.
CASES: dict[str, tuple[list[Facts], list[Facts]]] = {
    "unattested": (
        [
            of(*BOTH, allow("kms:Decrypt")),
            of(allow("kms:Decrypt", "kms:GenerateDataKey")),
            of(allow("kms:DeriveSharedSecret")),
            of(allow("kms:Decrypt", Condition={"StringEquals": {PURPOSE_KEY: "prompt", CONTEXT_KEY: CONTEXT}})),
            of(allow("kms:Decrypt", Condition={"StringEquals": {"kms:ViaService": "s3.us-east-1.amazonaws.com"}})),
        ],
        [of(*BOTH, allow("kms:Encrypt")), of(*BOTH), of(*BOTH, deny("kms:Decrypt"))],
    ),
    "image_alone": (
        [
            of(asking(without=("PCR0", "PCR1", "PCR2", "PCR8", "PCR16", "PCR17"))),
            of(asking(without=("ImageSha384", "PCR1", "PCR2", "PCR8", "PCR16", "PCR17"))),
        ],
        [of(asking(without=("PCR0",))), of(asking(without=("ImageSha384",)))],
    ),
    "missing_register": (
        [of(asking(without=(f"PCR{index}",))) for index in INDEXES if index],
        [
            Facts(good(MODEL), purpose=MODEL),
            replace(of(asking(without=("PCR8",))), releases=(release(1, without=(8,)),)),
        ],
    ),
    "unknown_release": (
        [
            of(asking(more={EQUALS: {f"{RECIPIENT}PCR1": register(3, 1).hex()}})),
            of(asking(more={EQUALS: {f"{RECIPIENT}PCR17": [register(1, 17).hex(), register(3, 17).hex()]}})),
            replace(of(*BOTH), releases=(release(1),)),
        ],
        [
            of(asking(more={EQUALS: {f"{RECIPIENT}PCR1": register(1, 1).hex().upper()}})),
            # Two conditions on one register: both must hold, and only the release's value satisfies both.
            of(asking(more={EQUALS: {f"{RECIPIENT}ImageSha384": [register(3, 0).hex(), register(1, 0).hex()]}})),
        ],
    ),
    "mixed_releases": (
        [
            of(
                asking(
                    more={
                        EQUALS: {
                            f"{RECIPIENT}PCR{index}": [register(1, index).hex(), register(2, index).hex()]
                            for index in INDEXES
                        }
                    }
                )
            ),
            of(asking(more={EQUALS: {f"{RECIPIENT}PCR2": register(2, 2).hex()}})),
            replace(
                of(
                    asking(
                        without=("ImageSha384",),
                        more={EQUALS: {f"{RECIPIENT}PCR0": [register(1, 0).hex(), register(2, 0).hex()]}},
                    )
                ),
                releases=None,
            ),
        ],
        [
            of(*BOTH),
            replace(
                of(asking(more={EQUALS: {f"{RECIPIENT}PCR16": [register(1, 16).hex(), register(2, 16).hex()]}})),
                releases=None,
            ),
        ],
    ),
    "zero_register": (
        [
            of(asking(more={EQUALS: {f"{RECIPIENT}PCR1": "00" * 48}})),
            replace(of(asking(more={EQUALS: {f"{RECIPIENT}PCR16": "00" * 48}})), releases=None),
        ],
        [of(*BOTH, deny("kms:Decrypt", Condition={EQUALS: {f"{RECIPIENT}PCR0": "00" * 48}}))],
    ),
    "malformed_register": (
        [
            of(asking(more={EQUALS: {f"{RECIPIENT}PCR1": value}}))
            for value in (f"sha384:{register(1, 1).hex()}", register(1, 1).hex()[:64], "*", "")
        ],
        [of(*BOTH)],
    ),
    "policy_variable": (
        [of(asking(more={EQUALS: {f"{RECIPIENT}PCR1": f"${{{RECIPIENT}PCR1}}"}}))],
        [of(asking(more={"StringEquals": {"aws:PrincipalTag/team": "${kms:KeySpec}"}}))],
    ),
    "misspelt_key": (
        [
            of(asking(more={EQUALS: {key: register(1, 0).hex()}}))
            for key in (
                f"{RECIPIENT}PCR",
                f"{RECIPIENT}PCR00",
                f"{RECIPIENT}PCR32",
                f"{RECIPIENT}ImageSha348",
                f"{RECIPIENT}ImageSha256",
                "kms:RecipientAttestation.PCR0",
                "kms:RecipientAttestaton:PCR0",
                "RecipientAttestation:PCR0",
            )
        ]
        + [of(*BOTH, deny("kms:Decrypt", Condition={"StringNotEquals": {f"{RECIPIENT}PCR": "a"}}))],
        [
            of(
                asking(
                    without=("ImageSha384",),
                    more={EQUALS: {f"{RECIPIENT.upper()}IMAGESHA384": register(1, 0).hex()}},
                )
            ),
            of(asking(more={"StringEquals": {"kms:CallerAccount": ACCOUNT, "kms:RequestAlias": "alias/prompts"}})),
        ],
    ),
    "nitro_tpm": (
        [
            of(allow("kms:Decrypt", Condition={EQUALS: {f"{RECIPIENT}NitroTPMPCR{n}": UPPER for n in (0, 1, 2)}})),
            of(asking(more={EQUALS: {f"{RECIPIENT}NitroTPMPCR4": UPPER}})),
        ],
        [of(*BOTH)],
    ),
    "if_exists": (
        [
            of(asking(without=("PCR1",), more={f"{EQUALS}IfExists": {f"{RECIPIENT}PCR1": register(1, 1).hex()}})),
            of(asking(without=("PCR1",), more={"StringEqualsIfExists": {f"{RECIPIENT}PCR1": register(1, 1).hex()}})),
        ],
        [
            of(asking(more={"StringEqualsIfExists": {"aws:SourceVpc": "vpc-1"}})),
            of(*BOTH, *kept_to(operator="StringNotEqualsIfExists")),
        ],
    ),
    "null_condition": (
        [
            of(asking(without=("PCR1",), more={"Null": {f"{RECIPIENT}PCR1": "false"}})),
            of(asking(more={"Null": {f"{RECIPIENT}PCR1": "true"}})),
        ],
        [
            of(*BOTH, deny("kms:Decrypt", Condition={"Null": {f"{RECIPIENT}PCR0": "true"}})),
            of(asking(more={"Null": {"aws:SourceVpc": "false"}})),
        ],
    ),
    "for_all_values": (
        [of(asking(without=("PCR2",), more={f"ForAllValues:{EQUALS}": {f"{RECIPIENT}PCR2": register(1, 2).hex()}}))],
        [of(asking(more={"ForAllValues:StringEquals": {"kms:EncryptionContextKeys": ["a", "b"]}}))],
    ),
    "for_any_value": (
        [of(asking(without=("PCR2",), more={f"ForAnyValue:{EQUALS}": {f"{RECIPIENT}PCR2": register(1, 2).hex()}}))],
        [of(asking(more={"ForAnyValue:StringEquals": {"kms:EncryptionContextKeys": ["a", "b"]}}))],
    ),
    "negated_operator": (
        [
            of(asking(without=("PCR2",), more={"StringNotEquals": {f"{RECIPIENT}PCR2": "00" * 48}})),
            of(asking(more={"StringNotLike": {f"{RECIPIENT}PCR2": "00*"}})),
        ],
        [
            of(*BOTH, *kept_to(operator="StringNotEquals")),
            of(asking(more={"StringNotEquals": {"aws:SourceVpc": "vpc-1"}})),
        ],
    ),
    "pattern_operator": (
        [
            of(asking(without=("PCR2",), more={"StringLike": {f"{RECIPIENT}PCR2": "*"}})),
            of(asking(without=("PCR2",), more={"ArnLike": {f"{RECIPIENT}PCR2": register(1, 2).hex()}})),
        ],
        [of(asking(more={"StringLike": {"aws:userid": "*:i-*"}}))],
    ),
    "wrong_operator": (
        [
            of(asking(without=("PCR2",), more={operator: {f"{RECIPIENT}PCR2": register(1, 2).hex()}}))
            for operator in ("Bool", "NumericEquals", "BinaryEquals")
        ],
        [of(asking(more={"Bool": {"aws:SecureTransport": "true"}}))],
    ),
    "unknown_operator": (
        [
            of(asking(without=("PCR2",), more={"StringMatches": {f"{RECIPIENT}PCR2": register(1, 2).hex()}})),
            of(*BOTH, deny("kms:Decrypt", Condition={"StringNotEqual": PCR0})),
            of(asking(more={"StringEqual": {"aws:SourceVpc": "vpc-1"}})),
        ],
        [of(asking(more={"StringEquals": {"aws:SourceVpc": "vpc-1"}}))],
    ),
    "unconditioned_context": (
        [
            of(asking(without=("purpose",))),
            of(asking(without=("context",))),
            of(asking(without=("context",), more={"StringLike": {CONTEXT_KEY: CONTEXT}})),
            of(asking(more={"StringEquals": {CONTEXT_KEY: "${aws:PrincipalTag/context}"}})),
        ],
        [of(*BOTH)],
    ),
    "wrong_context": (
        [
            of(asking(more={"StringEquals": {CONTEXT_KEY: "staging"}})),
            of(asking(more={"StringEquals": {CONTEXT_KEY: [CONTEXT, "staging"]}})),
            of(asking(more={"StringEquals": {PURPOSE_KEY: "model"}})),
            replace(of(asking(more={"StringEquals": {PURPOSE_KEY: "chat"}})), purpose=None),
            replace(of(asking(more={"StringEquals": {CONTEXT_KEY: ["a", "b"]}})), context=None),
        ],
        [
            replace(of(asking(more={"StringEquals": {CONTEXT_KEY: "staging"}})), context=None),
            Facts(good(MODEL), purpose=None),
        ],
    ),
    "wildcard_principal": (
        [
            of(opening(Principal="*")),
            of(opening(Principal=EVERYBODY)),
            of(*BOTH, allow("kms:DescribeKey", principal="*")),
            of(opening(Principal={"AWS": f"arn:aws:iam::{ACCOUNT}:role/*"})),
        ],
        [of(*BOTH, *kept_to())],
    ),
    "wildcard_action": (
        [of(*BOTH, allow(action)) for action in ("*", "kms:*", "kms:Decryp?", "kms:D*", "KMS:CREATE*", "kms:Put*")],
        [of(*BOTH, allow("kms:GenerateDataKey*", "kms:Describe*", "kms:List*", "kms:Get*"))],
    ),
    "root_delegation": (
        [
            of(*BOTH, allow("kms:*", principal={"AWS": ROOT})),
            of(*BOTH, allow("kms:Decrypt", principal={"AWS": ACCOUNT})),
            of(*BOTH, allow("kms:PutKeyPolicy", principal={"AWS": [ADMIN, ROOT]})),
        ],
        [
            of(*BOTH, allow("kms:DescribeKey", principal={"AWS": ROOT})),
            of(opening(Principal={"AWS": ROOT})),
            replace(of(*BOTH, allow("kms:PutKeyPolicy", principal={"AWS": ROOT})), administrators=[ROOT]),
        ],
    ),
    "not_principal": (
        [of(opening(Principal=None, NotPrincipal={"AWS": STRANGER}))],
        [of(*BOTH, deny("kms:Decrypt", Principal=None, NotPrincipal={"AWS": PARENT}))],
    ),
    "not_action": (
        [of(*BOTH, allow(Action=None, NotAction="kms:Decrypt")), of(opening(Action=None, NotAction="kms:Encrypt"))],
        [of(*BOTH, deny(Action=None, NotAction=["kms:Decrypt", "kms:Encrypt"]))],
    ),
    "not_resource": (
        [of(opening(Resource=None, NotResource=COPY.text))],
        [of(*BOTH, deny("kms:Decrypt", Resource=None, NotResource="*"))],
    ),
    "unknown_action": (
        [of(*BOTH, allow("kms:Decypt")), of(*BOTH, allow("kms:DecryptAll*")), of(*BOTH, allow("s3:GetObject"))],
        [of(*BOTH, deny("kms:Decypt")), of(*BOTH, allow("kms:describekey"))],
    ),
    "reencrypt": (
        [of(*BOTH, allow("kms:ReEncryptFrom")), of(opening(Action=["kms:Decrypt", "kms:ReEncrypt*"]))],
        [of(*BOTH, allow("kms:ReEncryptTo"))],
    ),
    "create_grant": (
        [
            of(*BOTH, allow("kms:CreateGrant")),
            of(*BOTH, allow("kms:CreateGrant", Condition={"Bool": {"kms:GrantIsForAWSResource": "true"}})),
        ],
        [of(*BOTH, allow("kms:RevokeGrant", "kms:RetireGrant", "kms:ListGrants"))],
    ),
    "replicate_key": ([of(*BOTH, allow("kms:ReplicateKey"))], [of(*BOTH, deny("kms:ReplicateKey"))]),
    "import_key_material": (
        [of(*BOTH, allow("kms:ImportKeyMaterial"))],
        [of(*BOTH, allow("kms:GetParametersForImport"))],
    ),
    "primary_region": (
        [of(*BOTH, allow("kms:UpdatePrimaryRegion")), of(*BOTH, allow("kms:SynchronizeMultiRegionKey"))],
        [of(*BOTH, allow("kms:UpdateKeyDescription"))],
    ),
    "unfit_action": (
        [of(*BOTH, allow(f"kms:{name}")) for name in ("Sign", "GenerateMac", "DeriveSharedSecret", "GetPublicKey")],
        [of(*BOTH, allow("kms:Get*", "kms:Encrypt"))],
    ),
    "untrusted_administrator": (
        [
            replace(Facts(), administrators=()),
            of(*BOTH, allow("kms:PutKeyPolicy")),
            of(*BOTH, allow("kms:PutKeyPolicy", Condition={"Bool": {"aws:MultiFactorAuthPresent": "true"}})),
            Facts(grants=[grant("Decrypt", "CreateGrant")]),
        ],
        [
            Facts(),
            of(*BOTH, allow("kms:PutKeyPolicy"), deny("kms:PutKeyPolicy")),
            of(*BOTH, allow("kms:PutKeyPolicy"), deny("kms:Put*", Principal=EVERYBODY)),
        ],
    ),
    "changeable": ([Facts()], [of(*BOTH)]),
    "grant_opens": (
        [Facts(grants=[grant(name)]) for name in ("Decrypt", "ReEncryptFrom", "SomethingNew", "DeriveSharedSecret")],
        [Facts(grants=[grant("Encrypt", "DescribeKey")])],
    ),
    "grant_seals": (
        [Facts(grants=[grant("GenerateDataKey")])],
        [Facts(grants=[grant("DescribeKey")])],
    ),
    "wrong_key": (
        [
            Facts(metadata=replace(METADATA, usage="SIGN_VERIFY")),
            Facts(metadata=replace(METADATA, spec="RSA_2048")),
            Facts(metadata=replace(METADATA, manager="AWS")),
        ],
        [Facts()],
    ),
    "foreign_material": (
        [Facts(metadata=replace(METADATA, origin=origin)) for origin in ("EXTERNAL", "AWS_CLOUDHSM")],
        [Facts(), Facts(metadata=None)],
    ),
    "unseen_copy": (
        [
            Facts(metadata=mrk(replicas=(COPY,))),
            Facts(metadata=mrk(primary=COPY, replicas=(KEY,))),
        ],
        [Facts(metadata=mrk(replicas=(COPY,)), copies=[COPY]), Facts(metadata=mrk(primary=None))],
    ),
    "multi_region": ([Facts(metadata=mrk()), Facts(metadata=mrk(), copies=[COPY])], [Facts(), Facts(metadata=None)]),
    "not_enabled": (
        [
            Facts(metadata=replace(METADATA, enabled=False)),
            Facts(metadata=replace(METADATA, state="Disabled")),
            Facts(metadata=replace(METADATA, enabled=False, state="PendingDeletion")),
        ],
        [Facts(), Facts(metadata=None)],
    ),
    "case_sensitive": (
        [
            of(asking(without=("PCR1",), more={"StringEquals": {f"{RECIPIENT}PCR1": register(1, 1).hex()}})),
            of(asking(without=("PCR1",), more={"StringEquals": {f"{RECIPIENT}PCR1": register(1, 1).hex().upper()}})),
        ],
        [of(asking(more={EQUALS: {f"{RECIPIENT}PCR1": register(1, 1).hex().upper()}}))],
    ),
    "bound_by_deny": (
        [
            of(opening(Condition={"StringEquals": {PURPOSE_KEY: "prompt", CONTEXT_KEY: CONTEXT}}), *kept_to()),
            of(asking(without=("PCR1",)), *kept_to(indexes=(1,), operator="StringNotEqualsIfExists")),
            of(asking(without=("PCR1",)), *kept_to(indexes=(1,), operator="ForAllValues:StringNotEquals")),
        ],
        [of(*BOTH, *kept_to(indexes=(1,))), of(asking(without=("PCR2",)), *kept_to(indexes=(1,)))],
    ),
    "weak_deny": (
        [
            of(*BOTH, deny("kms:Decrypt", Condition={"StringNotEquals": {**PCR0, f"{RECIPIENT}PCR1": "a"}})),
            of(*BOTH, deny("kms:Decrypt", Condition={"ForAnyValue:StringNotEquals": PCR0})),
            of(*BOTH, deny("kms:*", Condition={"StringNotEquals": PCR0}, Principal={"AWS": STRANGER})),
            of(*BOTH, deny("kms:Decrypt", Condition={"StringNotEquals": PCR0}, Resource=COPY.text)),
            of(*BOTH, deny("kms:Decrypt", Condition={"StringNotLike": PCR0})),
        ],
        [
            of(*BOTH, deny("kms:Decrypt", Condition={"StringNotEquals": PCR0}, Resource=KEY.text)),
            of(*BOTH, deny("kms:Encrypt", Condition={"StringNotLike": PCR0})),
            of(*BOTH, deny("kms:Decrypt", Condition={"StringEquals": PCR0})),
            of(*BOTH, deny("kms:Decrypt", Condition={"StringNotEquals": {"aws:SourceVpc": "vpc-1"}})),
        ],
    ),
    "broad_principal": (
        [
            of(opening(Principal={"AWS": ROOT})),
            of(opening(Principal={"Service": "ec2.amazonaws.com"})),
            of(opening(Principal={"Federated": "cognito-identity.amazonaws.com"})),
        ],
        [of(*BOTH), of(opening(Principal={"AWS": f"arn:aws:sts::{ACCOUNT}:assumed-role/parent/i-1"}))],
    ),
    "other_account": (
        [
            of(opening(Principal={"AWS": ABROAD})),
            replace(of(opening(Principal={"AWS": ABROAD})), metadata=None, account=ACCOUNT),
        ],
        [of(*BOTH), replace(of(opening(Principal={"AWS": ABROAD})), metadata=None)],
    ),
    "administers_and_uses": (
        [
            of(*BOTH, allow("kms:PutKeyPolicy", principal={"AWS": PARENT})),
            of(allow("kms:Encrypt"), allow("kms:DisableKey")),
        ],
        [Facts(), of(*BOTH, allow("kms:*", principal={"AWS": ROOT})), of(*BOTH, deny("kms:*"))],
    ),
    "unconditioned_sealing": (
        [
            of(*BOTH, allow("kms:GenerateDataKey")),
            of(*BOTH, allow("kms:Encrypt", Condition={"StringEquals": {PURPOSE_KEY: "prompt"}})),
        ],
        [Facts(), of(*BOTH, allow("kms:DescribeKey"))],
    ),
    "alias_resource": (
        [
            of(opening(Resource=f"arn:aws:kms:us-east-1:{ACCOUNT}:alias/prompts")),
            of(*BOTH, deny("kms:Decrypt", Resource="alias/prompts")),
        ],
        [of(opening(Resource=KEY.text))],
    ),
    "other_resource": (
        [
            of(opening(Resource=COPY.text)),
            of(opening(Resource=KEY.key_id)),
            replace(of(opening(Resource=KEY.key_id)), metadata=None),
        ],
        [
            of(opening(Resource=KEY.text)),
            of(opening(Resource=f"arn:aws:kms:us-east-1:{ACCOUNT}:key/*")),
            of(opening(Resource=["*", "${aws:PrincipalTag/key}"])),
            replace(of(opening(Resource=COPY.text)), metadata=None),
        ],
    ),
    "release_without_statement": (
        [of(ONE), replace(Facts(), releases=(*RELEASES, release(3)))],
        [of(*BOTH), replace(of(ONE), releases=(release(1),)), of(allow("kms:Decrypt"))],
    ),
    "can_destroy": (
        [of(*BOTH, allow("kms:ScheduleKeyDeletion")), of(*BOTH, allow("kms:Di*"))],
        [of(*BOTH, allow("kms:CancelKeyDeletion", "kms:EnableKey"))],
    ),
}


def test_every_rule_has_policies_that_fail_and_that_pass() -> None:
    assert CASES.keys() == RULES.keys()
    assert all(fails and passes for fails, passes in CASES.values())


@pytest.mark.parametrize(("rule", "facts"), [(rule, each) for rule, (fails, _) in CASES.items() for each in fails])
def test_what_fails_a_rule(rule: str, facts: Facts) -> None:
    assert rule in facts.rules()


@pytest.mark.parametrize(("rule", "facts"), [(rule, each) for rule, (_, passes) in CASES.items() for each in passes])
def test_what_passes_a_rule(rule: str, facts: Facts) -> None:
    assert rule not in facts.rules()


# What is said


def test_what_is_generated_has_no_error() -> None:
    assert Facts().rules() == {"can_destroy", "changeable"}
    assert Facts(good(MODEL), purpose=MODEL).rules() == {"can_destroy", "changeable"}
    assert Facts(releases=None, purpose=None, context=None).rules() == {"can_destroy", "changeable"}


def test_the_policy_that_aws_writes() -> None:
    facts = of(allow("kms:*", principal={"AWS": ROOT}, Sid="Enable IAM User Permissions"))
    assert facts.rules(Severity.ERROR) == {"root_delegation", "untrusted_administrator"}


def test_a_finding() -> None:
    (finding,) = of(ONE, opening(2), allow("kms:ReEncryptFrom", Condition=ONE["Condition"])).findings()
    assert finding == Finding("reencrypt", "Statement[2]", f"{STRANGER} may kms:ReEncryptFrom")
    assert finding.as_json() == {
        "severity": "error",
        "rule": "reencrypt",
        "statement": "Statement[2]",
        "why": f"{RULES['reencrypt'].means}: {STRANGER} may kms:ReEncryptFrom",
        "fix": "take it out of the policy",
    }


@pytest.mark.parametrize(
    ("facts", "rule", "statement", "detail"),
    [
        (
            of(*BOTH, allow("kms:Decrypt", Sid="Old")),
            "unattested",
            "Old",
            f"{STRANGER} may kms:Decrypt, and makes void what other statements ask for",
        ),
        (of(allow("kms:Decrypt")), "unattested", "Statement[0]", f"{STRANGER} may kms:Decrypt"),
        (
            of(opening(Principal=None, NotPrincipal={"Service": "ec2.amazonaws.com"}, Action="kms:ReEncryptFrom")),
            "reencrypt",
            "Release 1 0",
            "everybody but Service ec2.amazonaws.com may kms:ReEncryptFrom",
        ),
        (
            of(asking(without=("PCR1", "PCR17"))),
            "missing_register",
            "Release 1 0",
            f"{PARENT} may kms:Decrypt without {RECIPIENT}PCR1, {RECIPIENT}PCR17",
        ),
        (
            of(asking(more={EQUALS: {f"{RECIPIENT}PCR": "ab"}})),
            "misspelt_key",
            "Release 1 0",
            f"{RECIPIENT}PCR: the nearest that KMS has is {RECIPIENT}PCR0",
        ),
        (
            of(asking(more={"StringEquals": {PURPOSE_KEY: "model"}})),
            "wrong_context",
            "Release 1 0",
            f"{PURPOSE_KEY}: model; expected prompt",
        ),
        (
            of(asking(without=("PCR1",), more={"StringEquals": {f"{RECIPIENT}PCR1": UPPER}})),
            "case_sensitive",
            "Release 1 0",
            f"{RECIPIENT}PCR1: digits in upper case, so that it never holds",
        ),
        (
            of(*BOTH, deny("kms:Decrypt", Condition={"StringNotEquals": {**PCR0, f"{RECIPIENT}PCR1": "a"}})),
            "weak_deny",
            "Statement[2]",
            "all of its conditions must hold: it denies only what differs in each of them:"
            f" StringNotEquals on {RECIPIENT}PCR0; StringNotEquals on {RECIPIENT}PCR1",
        ),
        (Facts(grants=[grant("Decrypt")]), "grant_opens", "grant-1", f"{STRANGER} may Decrypt"),
        (Facts(), "changeable", "Administer", f"{ADMIN} may kms:PutKeyPolicy"),
        (Facts(metadata=mrk(replicas=(COPY,))), "unseen_copy", None, COPY.text),
    ],
)
def test_what_a_finding_says(facts: Facts, rule: str, statement: str | None, detail: str) -> None:
    assert [each for each in facts.findings() if each.rule == rule] == [Finding(rule, statement, detail)]


def test_a_register_that_something_else_is_said_of_is_not_called_missing() -> None:
    facts = of(asking(without=("PCR1",), more={f"{EQUALS}IfExists": {f"{RECIPIENT}PCR1": register(1, 1).hex()}}))
    assert facts.rules(Severity.ERROR) == {"if_exists"}


def test_a_zero_register_that_only_a_deny_leaves() -> None:
    zero = deny("kms:Decrypt", Condition={"StringNotEquals": {f"{RECIPIENT}PCR1": "00" * 48}})
    assert of(asking(without=("PCR1",)), zero).rules(Severity.ERROR) == {"unknown_release"}


def test_a_deny_spares_services() -> None:
    statement = opening(Principal={"Service": "ec2.amazonaws.com"}, Condition=None)
    assert "unattested" in of(statement, *kept_to()).rules(Severity.ERROR)


def test_a_release_that_accepts_any_model() -> None:
    releases = (release(1, without=(16,)),)
    with pytest.raises(KeyPolicyError) as caught:
        replace(of(ONE), releases=releases).findings()
    assert (caught.value.code, caught.value.exit_code) == ("unpinned_register", 2)
    assert "any model" in caught.value.message
    assert replace(of(opening(1, MODEL)), releases=releases, purpose=MODEL).rules(Severity.ERROR) == set()
    with pytest.raises(KeyPolicyError, match="any configuration"):
        replace(of(ONE), releases=(release(1, without=(17,)),), purpose=MODEL).findings()


def test_no_release_at_all() -> None:
    with pytest.raises(ValueError, match="one release"):
        replace(Facts(), releases=()).findings()


@pytest.mark.parametrize(
    "pcrs",
    [
        {},
        {index: (register(1, index),) for index in (0, 1, 17)},
        {index: (register(1, index),) for index in (*INDEXES, 32)},
        {index: (register(1, index), register(2, index)) for index in INDEXES},
        {**release(1).pcrs, 16: ()},
        {**release(1).pcrs, 1: (bytes(48),)},
        {**release(1).pcrs, 1: (bytes(32),)},
    ],
)
def test_registers_that_no_release_has(pcrs: dict[int, tuple[bytes, ...]]) -> None:
    with pytest.raises(ValueError, match="PCR"):
        ReleasedTo("1.0", pcrs)


@pytest.mark.parametrize("key", ["aws:PrincipalArn", "kms:CallerAccount", CONTEXT_KEY, "kms:EncryptionContext:PCR0"])
def test_other_condition_keys_are_no_slips(key: str) -> None:
    assert meant(key) is None
    assert register_of(key) is None


def test_every_operation_of_kms_is_known() -> None:
    botocore = pytest.importorskip("botocore.session")
    operations = set(botocore.get_session().get_service_model("kms").operation_names)
    permissions = (operations - {"ReEncrypt"}) | {"ReEncryptFrom", "ReEncryptTo", "SynchronizeMultiRegionKey"}
    assert permissions == {action.removeprefix(PREFIX) for action in POWERS}


def test_what_gives_out_a_plaintext_opens_or_seals() -> None:
    botocore = pytest.importorskip("botocore.session")
    model = botocore.get_session().get_service_model("kms")
    granted = set(model.shape_for("GrantOperation").enum)
    assert {f"{PREFIX}{name}" for name in granted} <= POWERS.keys()
    giving = {
        f"{PREFIX}{name}"
        for name in model.operation_names
        if (shape := model.operation_model(name).output_shape) and {"Plaintext", "SharedSecret"} & set(shape.members)
    }
    assert {POWERS[action] for action in giving} == {Power.OPENS, Power.SEALS, Power.ELSEWHERE}
    assert {action for action in giving if POWERS[action] is Power.ELSEWHERE} == {f"{PREFIX}GenerateRandom"}


# Properties

OTHER = register(3, 0)
OPERATORS = [
    *(
        EQUALS,
        EQUALS,
        "StringEquals",
        f"{EQUALS}IfExists",
        "StringLike",
        "StringNotEquals",
        "StringNotEqualsIgnoreCase",
    ),
    *("ForAllValues:StringEquals", "ForAnyValue:StringEquals", "Null", "StringNotEqualsIfExists"),
    *("ForAllValues:StringNotEquals", "ForAnyValue:StringNotEquals", "StringNotLike", "ArnEquals", "Unheard"),
]
PRINCIPALS = [{"AWS": PARENT}, {"AWS": PARENT}, {"AWS": [PARENT, STRANGER]}, "*", EVERYBODY, {"AWS": ROOT}]
ACTIONS = [
    "kms:Decrypt",
    "kms:Decrypt",
    "kms:*",
    "kms:D*",
    ["kms:Encrypt", "kms:Decrypt"],
    "kms:GenerateDataKey",
    "kms:X",
]


@st.composite
def conditions(draw: st.DrawFn) -> Json:
    """Those of a release, with a few changes; or a few from nothing."""
    wanted = draw(st.sampled_from([ONE["Condition"], opening(2)["Condition"], {}]))
    found: Json = {operator: dict(keys) for operator, keys in wanted.items()}
    for _ in range(draw(st.integers(0, 2))):
        index = draw(st.sampled_from(INDEXES))
        key = draw(st.sampled_from([f"{RECIPIENT}PCR{index}", f"{RECIPIENT}pcr{index}", PURPOSE_KEY, CONTEXT_KEY]))
        for keys in found.values():
            if draw(st.booleans()):
                keys.pop(key, None)
        values = [register(number, index).hex() for number in (1, 2, 3)]
        odd = ["00" * 48, values[0].upper(), "true", "*", "prompt", "model", CONTEXT, "${kms:KeySpec}"]
        chosen = draw(st.lists(st.sampled_from([*values, *values, *odd]), min_size=1, max_size=2, unique=True))
        operator = draw(st.sampled_from(OPERATORS))
        kept = {name: values for name, values in found.get(operator, {}).items() if name.lower() != key.lower()}
        found[operator] = {**kept, key: chosen}  # no key in two spellings: that is no policy
    return {operator: keys for operator, keys in found.items() if keys}


@st.composite
def statements(draw: st.DrawFn) -> Json:
    effect = draw(st.sampled_from(["Allow", "Allow", "Allow", "Deny"]))
    statement = allow(
        principal=draw(st.sampled_from(["*"] if effect == "Deny" else PRINCIPALS)),
        Effect=effect,
        Action=draw(st.sampled_from(ACTIONS)),
        Resource=draw(st.sampled_from(["*", "*", KEY.text, COPY.text])),
    )
    if asked := draw(conditions()):
        if effect == "Deny" and draw(st.booleans()):  # one condition, as it should be
            operator = draw(st.sampled_from(sorted(asked)))
            key = draw(st.sampled_from(sorted(asked[operator])))
            asked = {draw(st.sampled_from(OPERATORS)): {key: asked[operator][key]}}
        statement["Condition"] = asked
    return statement


def attested(number: int, purpose: EnvelopePurpose = PROMPT) -> dict[int, bytes]:
    """The registers of an enclave of this release when it asks for the key."""
    indexes = INDEXES if purpose is PROMPT else [index for index in INDEXES if index != 16]
    return {index: register(number, index) for index in indexes}


def others(number: int, purpose: EnvelopePurpose = PROMPT) -> list[dict[int, bytes]]:
    """The same with one register of another value, or without it; and no attestation at all."""
    registers = attested(number, purpose)
    changed: list[dict[int, bytes]] = [{}]
    for index in registers:
        changed += ({**registers, index: value} for value in (register(1, index), register(2, index), OTHER, bytes(48)))
        changed.append({each: value for each, value in registers.items() if each != index})
    return [each for each in changed if each not in (attested(1, purpose), attested(2, purpose))]


def is_allowed(
    policy: KeyPolicy,
    registers: dict[int, bytes],
    *,
    purpose: str = "prompt",
    context: str = CONTEXT,
    who: str = PARENT,
    action: str = "kms:Decrypt",
) -> bool:
    pairs = {"strongroom": "1", "strongroom:purpose": purpose, "strongroom:context": context, "strongroom:version": "1"}
    keys = {**recipient_context(registers), **encryption_context(pairs)}
    return decide(policy, (), Request(who, action, KEY, keys)).allowed


@given(st.lists(statements(), min_size=1, max_size=3))
def test_what_passes_opens_to_the_accepted_releases_and_to_nothing_else(written: list[Json]) -> None:
    facts = replace(of(*written), administrators=(ADMIN, STRANGER, PARENT))
    if facts.rules(Severity.ERROR):
        return
    for who in (PARENT, STRANGER, ROOT, ABROAD):
        for registers in (*others(1), *others(2)):
            assert not is_allowed(facts.policy, registers, who=who)
        assert not is_allowed(facts.policy, attested(1), who=who, context="staging")
        assert not is_allowed(facts.policy, attested(1), who=who, purpose="model")
        assert not is_allowed(facts.policy, attested(1), who=who, action="kms:ReEncryptFrom")


@st.composite
def denials(draw: st.DrawFn) -> list[Json]:
    """A Deny for each register, now and then of another kind."""
    return [
        deny(
            draw(st.sampled_from(["kms:Decrypt", "kms:Decrypt", "kms:*", "kms:Encrypt"])),
            Principal=draw(st.sampled_from(["*", "*", EVERYBODY, {"AWS": STRANGER}])),
            Condition={
                draw(st.sampled_from(["StringNotEquals", "StringNotEqualsIgnoreCase", *OPERATORS])): {
                    f"{RECIPIENT}PCR{index}": draw(
                        st.sampled_from([register(1, index).hex(), register(2, index).hex()])
                    )
                }
            },
        )
        for index in INDEXES
        if draw(st.integers(0, 5))
    ]


@given(denials(), st.booleans())
def test_denials_that_pass_for_a_binding_bind(written: list[Json], by_service: bool) -> None:
    who = {"Service": "ec2.amazonaws.com"} if by_service else {"AWS": PARENT}
    facts = of(
        opening(Principal=who, Condition={"StringEquals": {PURPOSE_KEY: "prompt", CONTEXT_KEY: CONTEXT}}), *written
    )
    if facts.rules(Severity.ERROR):
        return
    assert not any(is_allowed(facts.policy, registers) for registers in (*others(1), *others(2)))


@given(st.lists(statements(), min_size=1, max_size=3))
def test_without_releases_to_compare_with_what_passes_opens_to_one_image_a_statement(written: list[Json]) -> None:
    facts = replace(of(*written), releases=None, purpose=None, context=None, administrators=(ADMIN, STRANGER, PARENT))
    if facts.rules(Severity.ERROR):
        return
    mixed = {**attested(1), 1: register(2, 1)}
    both = [is_allowed(facts.policy, attested(number), who=PARENT) for number in (1, 2)]
    assert not (all(both) and is_allowed(facts.policy, mixed, who=PARENT))
    assert not is_allowed(facts.policy, {}, who=PARENT)


@given(statements())
def test_some_of_these_pass(written: Json) -> None:
    """The properties above are about something: a good policy stays good beside statements that open nothing."""
    if written["Effect"] == "Deny":
        assert of(*BOTH, written).rules(Severity.ERROR) <= {"unknown_operator", "misspelt_key"}
