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


def seeds() -> list[bytes]:
    files = sorted(VECTORS.glob("*.toml"))
    written = [write_policy(AppraisalPolicy.load(path), root="root.der").encode() for path in files]
    return [path.read_bytes() for path in files] + written
