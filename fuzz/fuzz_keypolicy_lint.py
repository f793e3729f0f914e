"""Any key policy can be linted; one without an error opens to the release that it was held against and to no other, and
one that was locked can be changed by nobody.
"""

from __future__ import annotations

import json

from attestation.envelope import EnvelopePurpose
from attestation.keypolicy.actions import POWERS
from attestation.keypolicy.attested import ReleasedTo
from attestation.keypolicy.decision import Request, decide, encryption_context, recipient_context
from attestation.keypolicy.document import KeyArn, KeyPolicy, KeyPolicyError
from attestation.keypolicy.findings import Severity
from attestation.keypolicy.generate import generate, locked
from attestation.keypolicy.lint import lint
from attestation.keypolicy.mutability import Locked, mutability

KEY = KeyArn.parse("arn:aws:kms:us-east-1:111122223333:key/1234abcd-12ab-34cd-56ef-1234567890ab")
PARENT, CLIENT, ADMIN = (f"arn:aws:iam::111122223333:role/{name}" for name in ("parent", "client", "admin"))
REGISTERS = {index: bytes([index + 1]) * 48 for index in (0, 1, 2, 8, 16, 17)}
RELEASE = ReleasedTo("1.0", {index: (value,) for index, value in REGISTERS.items()})
OTHERS: list[dict[int, bytes]] = [
    {},
    {index: bytes(48) for index in REGISTERS},
    *({**REGISTERS, index: b"\xee" * 48} for index in REGISTERS),
    *({other: value for other, value in REGISTERS.items() if other != index} for index in REGISTERS),
]
PAIRS = {"strongroom": "1", "strongroom:purpose": "prompt", "strongroom:context": "production"}
ACTIONS = ("kms:Decrypt", "kms:ReEncryptFrom", "kms:DeriveSharedSecret")


def one_input(data: bytes) -> None:
    try:
        policy = KeyPolicy.parse(data.decode("latin-1"))
    except KeyPolicyError:
        return
    findings = lint(
        policy, releases=[RELEASE], purpose=EnvelopePurpose.PROMPT, context="production", administrators=[ADMIN]
    )
    assert all(each.why and each.fix for each in findings)
    lint(policy, releases=None, purpose=None, context=None)
    if not any(each.severity is Severity.ERROR for each in findings):
        for registers in OTHERS:
            context = {**recipient_context(registers), **encryption_context(PAIRS)}
            for action in ACTIONS:
                request = Request(PARENT, action, KEY, context)
                assert not decide(policy, [], request).allowed, "a policy without errors that opens to another enclave"
    try:
        after = locked(policy)
    except KeyPolicyError:
        return
    left = mutability(after)
    actions = set() if isinstance(left, Locked) else {action for each in left.changers for action in each.actions}
    assert not actions & POWERS.keys(), "a lock that leaves somebody who can change the key"


def seeds() -> list[bytes]:
    made = generate(
        [RELEASE, ReleasedTo("2.0", {**RELEASE.pcrs, 1: (b"\xee" * 48,)})],
        purpose=EnvelopePurpose.PROMPT,
        context="production",
        users=[PARENT],
        sealers=[CLIENT],
        administrators=[ADMIN],
    )
    first = json.loads(made.encode())["Statement"][0]
    equals = first["Condition"]["StringEqualsIgnoreCase"]
    conditions = [
        {"StringNotEqualsIgnoreCase": {key: equals[key] for key in equals if key.endswith("PCR1")}},
        {"StringLike": equals},
        {"ForAllValues:StringEqualsIfExists": equals},
        {"Null": dict.fromkeys(equals, "false")},
        {"StringEquals": {key.replace("PCR", "NitroTPMPCR"): value.upper() for key, value in equals.items()}},
    ]
    statements = [
        {**first, "Condition": each | {"StringEquals": first["Condition"]["StringEquals"]}} for each in conditions
    ]
    whole = {"Effect": "Allow", "Principal": {"AWS": "111122223333"}, "Action": "kms:*", "Resource": KEY.text}
    deny = {"Effect": "Deny", "Principal": "*", "Action": "kms:D*", "Resource": "*", "Condition": conditions[0]}
    policies = [*([each] for each in statements), [first], [whole], [*statements, deny], [whole, deny]]
    return [made.encode().encode(), *(json.dumps({"Version": "2012-10-17", "Statement": p}).encode() for p in policies)]
