"""Key policies for tests: one that opens to two releases and to nothing else, as JSON to be changed."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from attestation.envelope import EnvelopePurpose
from attestation.keypolicy.answers import Grant, GrantConstraints, KeyMetadata
from attestation.keypolicy.attested import ReleasedTo
from attestation.keypolicy.document import KeyArn, KeyPolicy
from attestation.keypolicy.generate import generate

Json = dict[str, Any]

ACCOUNT = "111122223333"
KEY = KeyArn.parse(f"arn:aws:kms:us-east-1:{ACCOUNT}:key/1234abcd-12ab-34cd-56ef-1234567890ab")
COPY = KeyArn.parse(f"arn:aws:kms:eu-central-1:{ACCOUNT}:key/{KEY.key_id}")
ROOT = f"arn:aws:iam::{ACCOUNT}:root"
PARENT, SEALER, ADMIN, STRANGER = (f"arn:aws:iam::{ACCOUNT}:role/{name}" for name in ("parent", "seal", "admin", "x"))
CONTEXT = "production"
PROMPT, MODEL = EnvelopePurpose.PROMPT, EnvelopePurpose.MODEL
INDEXES = (0, 1, 2, 8, 16, 17)
RECIPIENT = "kms:RecipientAttestation:"
PURPOSE_KEY, CONTEXT_KEY = "kms:EncryptionContext:strongroom:purpose", "kms:EncryptionContext:strongroom:context"
EQUALS = "StringEqualsIgnoreCase"


def register(release: int, index: int) -> bytes:
    """A register of the release with this number; no two are alike, and some digits are letters."""
    return bytes([0xA0 + release, 0xB0 + index]) * 24


def release(number: int, *, without: tuple[int, ...] = ()) -> ReleasedTo:
    return ReleasedTo(f"{number}.0", {index: (register(number, index),) for index in INDEXES if index not in without})


RELEASES = (release(1), release(2))
METADATA = KeyMetadata(
    arn=KEY,
    enabled=True,
    state="Enabled",
    usage="ENCRYPT_DECRYPT",
    spec="SYMMETRIC_DEFAULT",
    origin="AWS_KMS",
    manager="CUSTOMER",
    multi_region=False,
)


def good(purpose: EnvelopePurpose = PROMPT) -> KeyPolicy:
    return generate(
        RELEASES, purpose=purpose, context=CONTEXT, users=[PARENT], sealers=[SEALER], administrators=[ADMIN]
    )


def as_json(policy: KeyPolicy) -> Json:
    document: Json = json.loads(policy.encode())
    return document


def policy(*statements: Mapping[str, object]) -> str:
    return json.dumps({"Version": "2012-10-17", "Statement": statements})


def parsed(*statements: Mapping[str, object]) -> KeyPolicy:
    return KeyPolicy.parse(policy(*statements))


def opening(number: int = 1, purpose: EnvelopePurpose = PROMPT, **elements: object) -> Json:
    """The statement that opens the key to one release, with some elements more or other ones; None takes one out."""
    statement: Json = as_json(good(purpose))["Statement"][number - 1]
    return {name: value for name, value in {**statement, **elements}.items() if value is not None}


def asking(
    *,
    without: tuple[str, ...] = (),
    more: Mapping[str, Mapping[str, object]] | None = None,
    number: int = 1,
    **elements: object,
) -> Json:
    """As ``opening``: without conditions on some keys, by what follows the last colon, and with more conditions."""
    statement = {**opening(number), **elements}
    conditions: Json = {}
    for operator, keys in statement["Condition"].items():
        conditions[operator] = {key: values for key, values in keys.items() if key.rpartition(":")[2] not in without}
    for operator, keys in (more or {}).items():
        conditions[operator] = {**conditions.get(operator, {}), **keys}
    return {**statement, "Condition": {operator: keys for operator, keys in conditions.items() if keys}}


def allow(*actions: str, principal: object = None, **elements: object) -> Json:
    """Some actions for a stranger, without conditions."""
    who = {"AWS": STRANGER} if principal is None else principal
    plain: Json = {"Effect": "Allow", "Principal": who, "Action": [*actions], "Resource": "*", **elements}
    return {name: value for name, value in plain.items() if value is not None}


def statement(principal: str, *actions: str, effect: str = "Allow", **conditions: Mapping[str, object]) -> Json:
    """For one of AWS's principals. ``conditions`` are operators."""
    return allow(*actions, principal={"AWS": principal}, Effect=effect, Condition=conditions or None)


def deny(*actions: str, **elements: object) -> Json:
    return allow(*actions, principal="*", **{"Effect": "Deny", **elements})


def kept_to(
    number: int = 1, indexes: tuple[int, ...] = INDEXES, operator: str = "StringNotEqualsIgnoreCase"
) -> list[Json]:
    """A Deny for each register that keeps everybody to one release."""
    return [
        deny("kms:Decrypt", Condition={operator: {f"{RECIPIENT}PCR{index}": register(number, index).hex()}})
        for index in indexes
    ]


def grant(*operations: str) -> Grant:
    return Grant("grant-1", STRANGER, None, operations, GrantConstraints())
