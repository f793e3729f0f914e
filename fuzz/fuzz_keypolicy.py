"""Any text is a key policy or a KeyPolicyError; what is read can be written and read again, and decided by."""

from __future__ import annotations

import json

from attestation.keypolicy.decision import Request, decide, encryption_context, recipient_context
from attestation.keypolicy.document import KeyArn, KeyPolicy, KeyPolicyError

KEY = KeyArn.parse("arn:aws:kms:us-east-1:111122223333:key/1234abcd-12ab-34cd-56ef-1234567890ab")
ROLE = "arn:aws:iam::111122223333:role/enclaves"
ROOT = "arn:aws:iam::111122223333:root"
CONTEXT = {
    **recipient_context({0: b"\x0a" * 48, 1: b"\x0b" * 48}),
    **encryption_context(
        {"strongroom:purpose": "prompt", "n": "10", "t": "2020-01-01", "b": "true", "i": "203.0.113.1"}
    ),
    "many": ("a", "b", ""),
}
REQUESTS = [Request(principal, "kms:Decrypt", KEY, CONTEXT) for principal in (ROLE, ROOT, "ec2.amazonaws.com")]


def one_input(data: bytes) -> None:
    try:
        policy = KeyPolicy.parse(data.decode("latin-1"))
    except KeyPolicyError:
        return
    for request in REQUESTS:
        decision = decide(policy, [], request)
        assert decision.allowed or all(line.isprintable() for line in decision.explain())
        assert not decision.allowed or decision.by in policy.statements
    try:
        text = policy.encode()
    except KeyPolicyError:  # written with every value a text, it is larger
        return
    assert KeyPolicy.parse(text) == policy, "a policy that changes when it is written down"


def seeds() -> list[bytes]:
    conditions = [
        {"StringEqualsIgnoreCase": {"kms:RecipientAttestation:PCR0": ["0a" * 48, "0b" * 48]}},
        {"ForAllValues:StringLike": {"many": ["a*", "?"]}, "Null": {"many": "false"}},
        {"NumericLessThanIfExists": {"kms:EncryptionContext:n": 11}, "Bool": {"kms:EncryptionContext:b": True}},
        {"DateGreaterThan": {"kms:EncryptionContext:t": "2019-12-31T23:59:59.5Z"}},
        {"NotIpAddress": {"kms:EncryptionContext:i": ["203.0.113.0/24", "2001:db8::/64"]}},
        {
            "ArnLike": {"aws:PrincipalArn": "arn:aws:iam::*:role/e*"},
            "BinaryEquals": {"kms:EncryptionContext:n": "AAAA"},
        },
    ]
    statements: list[dict[str, object]] = [
        {"Effect": "Allow", "Principal": {"AWS": ROLE}, "Action": "kms:Decrypt", "Resource": "*", "Condition": each}
        for each in conditions
    ]
    deny = {
        "Sid": "d",
        "Effect": "Deny",
        "NotPrincipal": {"AWS": ROOT},
        "NotAction": "kms:G*",
        "NotResource": [KEY.text],
    }
    policies = [*([each] for each in statements), [*statements, deny], deny]
    return [json.dumps({"Version": "2012-10-17", "Statement": each}).encode() for each in policies]
