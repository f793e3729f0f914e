"""KMS keys for tests of verdicts: policies that name them, and what KMS says of keys that hold to such a policy."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from attestation.envelope import EnvelopeHeader, EnvelopePurpose
from attestation.keypolicy.answers import Grant
from attestation.keypolicy.attested import ReleasedTo
from attestation.keypolicy.document import KeyArn, KeyPolicy
from attestation.keypolicy.generate import generate
from attestation.keyrelease import KeyFacts, released_to
from attestation.policy import AppraisalPolicy
from attestation.rules import KeyRule, WrappedKeyFile
from tests.key_policies import ACCOUNT, ADMIN, CONTEXT, KEY, METADATA, MODEL, PARENT, PROMPT, SEALER, as_json

PROMPTS_KEY = KeyArn.parse(f"arn:aws:kms:us-east-1:{ACCOUNT}:key/0987dcba-09fe-87dc-65ba-ab0987654321")
KEYS = {MODEL: KEY, PROMPT: PROMPTS_KEY}
VERSION = 3
"""The floor of wrapped keys."""
FILE = "model.sealed"
HEADER = EnvelopeHeader(MODEL, KEY, CONTEXT, VERSION, b"wrapped", 4096, bytes(32))


def key_rule(purpose: EnvelopePurpose, **changes: Any) -> KeyRule:
    """Trusts ``ADMIN`` with the key, and knows the wrapped key of a model."""
    wrapped = WrappedKeyFile(FILE, HEADER) if purpose is MODEL else None
    return replace(KeyRule(KEYS[purpose], CONTEXT, VERSION, (ADMIN,), wrapped), **changes)


def with_keys(policy: AppraisalPolicy, *purposes: EnvelopePurpose, **changes: Any) -> AppraisalPolicy:
    """``policy``, which names a key for each purpose."""
    return replace(policy, kms={purpose: key_rule(purpose, **changes) for purpose in purposes})


def key_policy(
    releases: Sequence[ReleasedTo],
    purpose: EnvelopePurpose,
    *,
    administrators: Sequence[str] = (ADMIN,),
    more: Sequence[dict[str, Any]] = (),
) -> KeyPolicy:
    """Of a key that opens to ``releases`` alone, unless there are ``more`` statements."""
    made = generate(
        releases,
        purpose=purpose,
        context=CONTEXT,
        users=[PARENT],
        sealers=[SEALER],
        administrators=administrators,
    )
    document = as_json(made)
    return KeyPolicy.parse(json.dumps({**document, "Statement": [*document["Statement"], *more]}))


def facts(
    policy: AppraisalPolicy,
    purpose: EnvelopePurpose,
    *,
    administrators: Sequence[str] = (ADMIN,),
    more: Sequence[dict[str, Any]] = (),
    grants: Sequence[Grant] = (),
    **changes: Any,
) -> KeyFacts:
    """What KMS says of a key that holds to ``policy``, but for what is named here; ``changes`` are of its metadata."""
    metadata = replace(METADATA, **{"arn": KEYS[purpose], **changes})
    releases = tuple(released_to(policy, purpose))
    return KeyFacts(metadata, key_policy(releases, purpose, administrators=administrators, more=more), tuple(grants))


def all_facts(policy: AppraisalPolicy) -> dict[KeyArn, KeyFacts]:
    """What KMS says of every key that ``policy`` names: nothing bad."""
    return {rule.key: facts(policy, purpose) for purpose, rule in policy.kms.items()}
