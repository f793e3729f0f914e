"""COSE_Sign1: what of its header no vector shows."""

from __future__ import annotations

import cbor2
import pytest

from attestation.cose import SIGNATURE_SIZE, CoseSign1
from attestation.errors import EvidenceError

SIGNATURE = bytes(SIGNATURE_SIZE)


@pytest.mark.parametrize("protected", ["a1 01 38 22", "a1 18 01 38 22", "a1 01 39 00 22", "b8 01 01 38 22"])
def test_es384_may_be_written_at_length(protected: str) -> None:
    """RFC 9052 does not ask for the shortest form of a header, and what is signed are its bytes as received."""
    header = bytes.fromhex(protected)
    signed = CoseSign1.from_cbor([header, {}, b"payload", SIGNATURE])
    assert cbor2.loads(signed.signed_bytes()) == ["Signature1", header, b"", b"payload"]


@pytest.mark.parametrize(
    "protected", ["a0", "a1 01 38 23", "a1 38 22 01", "a2 01 38 22 01 38 22", "81 38 22", "a1 01 38"]
)
def test_nothing_else_is_es384(protected: str) -> None:
    with pytest.raises(EvidenceError):
        CoseSign1.from_cbor([bytes.fromhex(protected), {}, b"payload", SIGNATURE])
