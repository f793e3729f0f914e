"""A policy file of any content is read, or is a PolicyError; what is read can be written and read again."""

from __future__ import annotations

from pathlib import Path

from attestation.errors import PolicyError
from attestation.policy import AppraisalPolicy
from attestation.policy_writer import write_policy

VECTORS = Path(__file__).resolve().parent.parent / "tests" / "vectors" / "evidence"


def one_input(data: bytes) -> None:
    try:
        policy = AppraisalPolicy.parse(data.decode("utf-8", errors="replace"), VECTORS)
    except PolicyError:
        return
    text = write_policy(policy, root="root.der" if policy.anchor.is_emulated else None)
    assert AppraisalPolicy.parse(text, VECTORS) == policy, "a policy that changes when it is written down"


KEYS = """
[kms.model]
key = "arn:aws:kms:us-east-1:111122223333:key/1234abcd-12ab-34cd-56ef-1234567890ab"
context = "production"
minimum_version = 3
administrators = ["arn:aws:iam::111122223333:role/admin"]
[kms.model.wrapped_key]
file = "absent"
[kms.prompts]
key = "arn:aws-cn:kms:cn-north-1:111122223333:key/mrk-1234abcd12ab34cd56ef1234567890ab"
context = "a"
minimum_version = 4294967295
locked = true
"""


def seeds() -> list[bytes]:
    files = sorted(VECTORS.glob("*.toml"))
    written = [write_policy(AppraisalPolicy.load(path), root="root.der").encode() for path in files]
    wrapped = ('file = "absent"', 'file = "root.der"', 'ignore = "absent"')
    plain = (VECTORS / "policy.toml").read_text()
    with_keys = [(plain + KEYS.replace(wrapped[0], each)).encode() for each in wrapped]
    return [path.read_bytes() for path in files] + written + with_keys
