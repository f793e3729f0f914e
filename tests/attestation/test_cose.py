"""COSE_Sign1: what of its header no vector shows, and that its bytes name nothing."""

from __future__ import annotations

import cbor2
import pytest

from attestation import chain
from attestation.chain import ChainCache
from attestation.commitment import Evidence
from attestation.cose import COSE_SIGN1_TAG, SIGNATURE_SIZE, CoseSign1
from attestation.document import AttestationDocument
from attestation.errors import EvidenceError
from attestation.policy import AppraisalPolicy
from attestation.verifier import verify
from tests.pki import forge

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


def test_its_bytes_identify_nothing(policy: AppraisalPolicy, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever conveys a document can write it in other bytes. What is said of it is the same, to the last field, and
    what a cache remembers is found again.
    """
    payload = forge.encode(forge.payload_fields())
    signature = forge.sign(payload, forge.ES384_HEADER, forge.GOOD_CHAIN.key)
    low, high = (forge.document(payload, signature=s(signature)) for s in (forge.low_s, forge.high_s))
    tagged = forge.head(6, COSE_SIGN1_TAG) + low
    wordy = forge.document(payload, protected=bytes.fromhex("a1 18 01 38 22"))
    assert len({low, high, tagged, wordy}) == 4
    cache, evidence = ChainCache(), [forge.evidence(made) for made in (low, high, tagged, wordy)]
    first = verify(evidence[0], policy=policy, nonce=forge.NONCE, at=forge.NOW, cache=cache)
    monkeypatch.setattr(chain, "PolicyBuilder", None)  # no certificate is verified from here on
    for other in evidence:
        result = verify(other, policy=policy, nonce=forge.NONCE, at=forge.NOW, cache=cache)
        assert result.claims == first.claims
        # Of the bytes as they came there is their number, in step 1, and nothing else.
        assert {**result.as_json(), "checks": result.checks[1:]} == {**first.as_json(), "checks": first.checks[1:]}


def test_which_of_the_two_a_file_begins_as() -> None:
    """A guess, for a better error where one stands in the place of the other."""
    tagged = forge.head(6, COSE_SIGN1_TAG) + forge.document()
    for data, is_evidence, is_document in (
        (forge.evidence(), True, False),
        (forge.document(), False, True),
        (tagged, False, True),
        (b"\xa0", True, False),
        (b"\xbf", True, False),
        (b"\x80", False, False),
        (b"", False, False),
        (b"{}", False, False),
    ):
        assert (Evidence.is_in(data), AttestationDocument.is_in(data)) == (is_evidence, is_document)
