"""COSE_Sign1 (RFC 9052 section 4.2) in the one form that the Nitro Secure Module writes: ES384, nothing unprotected.

Parsing only: nothing here says that a signature is good.
"""

from __future__ import annotations

from dataclasses import dataclass

import cbor2

from attestation import cbor
from attestation.errors import EvidenceError

COSE_SIGN1_TAG = 18
ALGORITHM_HEADER = 1
ES384 = -35
_ES384_HEADER = bytes((0xA1, ALGORITHM_HEADER, 0x38, -1 - ES384))
"""``{1: -35}``, as every encoder but a wasteful one writes it."""

SIGNATURE_SIZE = 96
"""Bytes: r and s, 48 each, raw (RFC 9053 section 2.1)."""


@dataclass(frozen=True, slots=True)
class CoseSign1:
    """A signed object whose header says ES384. The bytes are as received, and malleable: never an identifier."""

    protected: bytes
    """The protected header, encoded: ``{1: -35}`` and nothing else."""
    payload: bytes
    """The document, encoded."""
    signature: bytes
    """r and s, 48 bytes each."""

    def signed_bytes(self) -> bytes:
        """The ``Sig_structure`` over the received bytes (RFC 9052 section 4.4), with an empty external_aad."""
        return cbor2.dumps(["Signature1", self.protected, b"", self.payload], canonical=True)

    @classmethod
    def from_cbor(cls, value: cbor.Value) -> CoseSign1:
        """Raises EvidenceError: ``malformed_cose``, ``wrong_algorithm``."""
        match value:
            case [bytes(protected), dict(unprotected), bytes(payload), bytes(signature)]:
                _require_es384(protected)
            case _:
                raise _malformed("not a COSE_Sign1", "[protected, unprotected, payload, signature]", cbor.shown(value))
        if unprotected:
            raise _malformed("the unprotected header is not empty", "map of 0", cbor.shown(unprotected))
        if len(signature) != SIGNATURE_SIZE:
            raise _malformed(
                "the signature's size is not that of ES384", f"{SIGNATURE_SIZE} bytes", f"{len(signature)} bytes"
            )
        return cls(protected, payload, signature)


def payload_of(value: cbor.Value) -> bytes | None:
    """The payload of what may be a COSE_Sign1, for a reader who has not judged it yet; None where there is none."""
    match value:
        case [_, _, bytes(payload), _]:
            return payload
        case _:
            return None


def _require_es384(protected: bytes) -> None:
    if protected == _ES384_HEADER:
        return
    # RFC 9052 section 3 writes an empty header as an empty byte string.
    header = cbor.decode(protected, code="malformed_cose") if protected else {}
    if not isinstance(header, dict):
        raise _malformed("the protected header is not a map", "a map", cbor.shown(header))
    if header.get(ALGORITHM_HEADER) != ES384:
        raise EvidenceError(
            "wrong_algorithm",
            "the document is not signed with ES384",
            expected=ES384,
            got=cbor.shown(header.get(ALGORITHM_HEADER)),
        )
    if len(header) != 1:
        raise _malformed("the protected header says more than the algorithm", "map of 1", cbor.shown(header))


def _malformed(message: str, expected: str, got: str) -> EvidenceError:
    return EvidenceError("malformed_cose", f"COSE: {message}", expected=expected, got=got)
