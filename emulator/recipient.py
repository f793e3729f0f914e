"""``Recipient`` of a KMS request: an attestation document that KMS verifies before it encrypts an answer to its key.

It is the second verifier of RFC 9334's figure, and here the same code as the first: the document must be authentic
under the named anchor. What AWS's documentation adds is checked after that. It gives no texts for what fails; the
refusals here are ``ValidationException``, whose texts are our own.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any, Final

from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric.rsa import RSAPublicKey
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat, load_der_public_key

from attestation.chain import Anchor, ChainCache
from attestation.errors import EvidenceError
from attestation.verifier import authenticate
from emulator.kms_request import KmsFault

MAX_AGE: Final = timedelta(minutes=5)
"""Of a document's timestamp, and as far ahead as it may be: an enclave's clock and the service's are two."""
KEY_SIZE: Final = 2048
KEY_ENCRYPTION: Final = "RSAES_OAEP_SHA_256"


@dataclass(frozen=True, slots=True)
class Recipient:
    """An enclave that has proven itself, for one answer."""

    key: RSAPublicKey
    pcrs: Mapping[int, bytes]


def attested(request: Mapping[str, Any], *, anchor: Anchor, at: datetime, cache: ChainCache) -> Recipient:
    """The recipient that ``request`` (the members of RecipientInfo) proves at ``at``. Raises KmsFault."""
    algorithm, document = request.get("KeyEncryptionAlgorithm"), request.get("AttestationDocument")
    if algorithm != KEY_ENCRYPTION:
        raise _refusal(f"KeyEncryptionAlgorithm must be {KEY_ENCRYPTION}")
    if document is None:
        raise _refusal("AttestationDocument is missing")
    try:
        claims = authenticate(document, anchor=anchor, at=at, cache=cache).claims
    except EvidenceError as error:
        raise _refusal(f"the attestation document is not authentic: {error.code}") from error
    if abs(at - claims.timestamp) > MAX_AGE:
        raise _refusal(
            f"the attestation document is of {claims.timestamp:%Y-%m-%dT%H:%M:%SZ},"
            f" not within {MAX_AGE // timedelta(minutes=1)} minutes of {at:%Y-%m-%dT%H:%M:%SZ}"
        )
    if claims.public_key is None:
        raise _refusal("the attestation document has no public key")
    try:
        key = load_der_public_key(claims.public_key)
    except (ValueError, UnsupportedAlgorithm) as error:
        raise _refusal("the attestation document's public key is no SubjectPublicKeyInfo") from error
    if not isinstance(key, RSAPublicKey) or key.key_size != KEY_SIZE:
        raise _refusal(f"the attestation document's public key is not RSA of {KEY_SIZE} bits")
    if key.public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo) != claims.public_key:
        raise _refusal("the attestation document's public key is no DER")
    return Recipient(key, claims.pcrs)


def _refusal(why: str) -> KmsFault:
    return KmsFault("ValidationException", f"Recipient: {why}")
