"""What the enclave builds and the verifier reads: one encoding for each, and bounds that both sides hold."""

from __future__ import annotations

from dataclasses import fields, replace
from typing import Any

import cbor2
import pytest
from hypothesis import given
from hypothesis import strategies as st

from attestation.commitment import (
    CHANNEL_KEY_SIZE,
    MAX_DOCUMENT,
    MAX_EVIDENCE,
    MAX_LIFETIME,
    Commitment,
    Entropy,
    Evidence,
    Purpose,
    UserData,
    channel_key_id,
)
from attestation.errors import EvidenceError
from tests.pki.forge import COMMITMENT

COMMITMENTS = st.builds(
    Commitment,
    key=st.integers(0, 255).map(lambda byte: bytes([byte]) * CHANNEL_KEY_SIZE),
    lifetime=st.integers(1, MAX_LIFETIME),
    boot_id=st.binary(min_size=16, max_size=16),
    receipt_key=st.binary(min_size=32, max_size=32),
    model=st.binary(min_size=48, max_size=48),
    configuration=st.binary(min_size=48, max_size=48),
    entropy=st.sampled_from(Entropy),
)


@given(COMMITMENTS)
def test_a_commitment_is_read_as_it_was_written(commitment: Commitment) -> None:
    encoded = commitment.encode()
    assert Commitment.decode(encoded) == commitment
    # PROTOCOL.md section 2.2 names these keys and no other.
    assert cbor2.loads(encoded) == {
        "v": 1,
        "suite": "MLKEM768-X25519/HKDF-SHA256/AES-256-GCM",
        "key": commitment.key,
        "key_id": channel_key_id(commitment.key),
        "lifetime": commitment.lifetime,
        "boot_id": commitment.boot_id,
        "receipt_key": commitment.receipt_key,
        "model": commitment.model,
        "configuration": commitment.configuration,
        "entropy": commitment.entropy.value,
    }


def test_every_field_changes_the_digest() -> None:
    other: dict[str, Any] = {"lifetime": 601, "entropy": Entropy.NSM_HWRNG}
    digests = {COMMITMENT.digest()}
    for field in fields(Commitment):
        value = getattr(COMMITMENT, field.name)
        change: dict[str, Any] = {field.name: other[field.name] if field.name in other else bytes(len(value))}
        digests.add(replace(COMMITMENT, **change).digest())
    assert len(digests) == 1 + len(fields(Commitment))


@pytest.mark.parametrize(
    "change",
    [
        {"key": bytes(1215)},
        {"boot_id": bytes(15)},
        {"receipt_key": bytes(33)},
        {"model": bytes(32)},
        {"configuration": b""},
        {"lifetime": 0},
        {"lifetime": MAX_LIFETIME + 1},
    ],
    ids=str,
)
def test_a_commitment_out_of_bounds_cannot_be_built(change: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(change))):
        replace(COMMITMENT, **change)


@pytest.mark.parametrize("purpose", Purpose)
def test_user_data_is_read_as_it_was_written(purpose: Purpose) -> None:
    user_data = UserData(purpose, COMMITMENT.digest())
    assert UserData.decode(user_data.encode()) == user_data
    assert cbor2.loads(user_data.encode()) == [1, purpose.value, COMMITMENT.digest()]


def test_user_data_binds_a_whole_digest() -> None:
    with pytest.raises(ValueError, match="commitment_digest"):
        UserData(Purpose.CHANNEL, bytes(32))


@given(st.binary(max_size=2000), st.binary(max_size=2000))
def test_evidence_is_read_as_it_was_written(document: bytes, commitment: bytes) -> None:
    evidence = Evidence(document, commitment)
    assert Evidence.decode(evidence.encode()) == evidence


def test_evidence_is_bounded_on_both_sides() -> None:
    largest = Evidence(bytes(MAX_DOCUMENT), bytes(MAX_EVIDENCE - MAX_DOCUMENT - 30))
    assert len(largest.encode()) == MAX_EVIDENCE
    assert Evidence.decode(largest.encode()) == largest
    with pytest.raises(ValueError, match="Evidence"):
        Evidence(largest.document, largest.commitment + b"\x00").encode()
    with pytest.raises(ValueError, match="document"):
        Evidence(bytes(MAX_DOCUMENT + 1), b"").encode()

    def encoded(document: int, commitment: int) -> bytes:
        fields = {"v": 1, "document": bytes(document), "commitment": bytes(commitment)}
        return cbor2.dumps(fields, canonical=True)

    for too_large in (encoded(MAX_DOCUMENT + 1, 0), encoded(MAX_DOCUMENT, MAX_EVIDENCE - MAX_DOCUMENT - 29)):
        with pytest.raises(EvidenceError) as caught:
            Evidence.decode(too_large)
        assert caught.value.code == "malformed_evidence"


@given(st.binary(max_size=300))
def test_any_bytes_give_a_value_or_the_typed_error(data: bytes) -> None:
    for decode in (Commitment.decode, UserData.decode, Evidence.decode):
        try:
            decode(data)
        except EvidenceError:
            continue
