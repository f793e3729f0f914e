"""Keys that sign releases, and the envelope that carries a signature: DSSE (Dead Simple Signing Envelope) version 1,
with one signature by one pinned key.

PROTOCOL.md section 4.1. A key is Ed25519, or ECDSA on P-384 with SHA-384, which is what a KMS key of the kind
ECC_NIST_P384 signs with. An ECDSA signature is malleable: it serves as a proof here, and never as an identifier.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
from dataclasses import dataclass, field
from enum import StrEnum
from typing import ClassVar, Final, Protocol, TypeAlias, final

from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.hazmat.primitives.hashes import SHA384
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
    load_der_public_key,
    load_pem_private_key,
)

from attestation import strict_json
from attestation.cbor import Record
from attestation.errors import EvidenceError, StrongroomError

PAYLOAD_TYPE: Final = "application/vnd.strongroom.release+json"
MAX_PAYLOAD: Final = 131_072
"""Bytes of what is signed."""
MAX_ENVELOPE: Final = 180_000
"""Bytes of one envelope: a payload in base64, and what stands around it."""
MAX_SIGNATURE: Final = 104
"""Bytes: an ECDSA signature on P-384 in DER. Ed25519 has 64."""
MAX_PEM: Final = 16_384
"""Bytes of a private key's file."""

_MALFORMED: Final = "malformed_release"
_MAX_KEY_TEXT: Final = 512


class ReleaseError(StrongroomError):
    """Reference values that nothing vouches for, or no longer: none of them may be believed.

    Codes: ``malformed_key``, ``malformed_release``, ``wrong_key``, ``bad_release_signature``, ``broken_history``,
    ``wrong_name``, ``rolled_back``, ``expired_release``, ``unissued_release``.
    """

    exit_code: ClassVar[int] = 3

    def of(self, where: str) -> ReleaseError:
        """The same error, said of ``where``: an entry, or a file."""
        return ReleaseError(self.code, f"{where}: {self.message}", expected=self.expected, got=self.got)


class SigningError(StrongroomError):
    """Nothing was signed, for a reason on the signer's side. Codes here: ``unusable_key``, ``unusable_statement``."""

    exit_code: ClassVar[int] = 2


class Algorithm(StrEnum):
    """What a publisher signs with: the word before the colon of a pinned key."""

    ED25519 = "ed25519"
    ECDSA_P384 = "ecdsa-p384"


@final
@dataclass(frozen=True, slots=True)
class PublicKey:
    """A key that a relying party pins; equal to another when its bytes are. Written ``ed25519:HEX`` (the 32 bytes of
    the key) or ``ecdsa-p384:HEX`` (its DER SubjectPublicKeyInfo).

    ``spki`` is that DER, and the only encoding of the key that is taken. Raises ReleaseError ``malformed_key``.
    """

    spki: bytes
    algorithm: Algorithm = field(init=False)
    """With which it verifies, and with no other: as the key itself says."""
    _key: Ed25519PublicKey | ec.EllipticCurvePublicKey = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        try:
            key = load_der_public_key(self.spki)
        except (ValueError, UnsupportedAlgorithm) as error:
            raise _malformed_key("no public key in DER", f"{len(self.spki)} bytes") from error
        match key:
            case Ed25519PublicKey():
                algorithm = Algorithm.ED25519
            case ec.EllipticCurvePublicKey(curve=ec.SECP384R1()):
                algorithm = Algorithm.ECDSA_P384
            case _:
                raise _malformed_key("a key of another kind", type(key).__name__)
        if key.public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo) != self.spki:
            raise _malformed_key("another encoding of a key than the usual one", f"{len(self.spki)} bytes")
        object.__setattr__(self, "algorithm", algorithm)
        object.__setattr__(self, "_key", key)

    @classmethod
    def parse(cls, text: str) -> PublicKey:
        """The key as a person pins it. Raises ReleaseError ``malformed_key``, never anything else."""
        written = re.fullmatch(r"(ed25519|ecdsa-p384):((?:[0-9a-f]{2})+)", text) if len(text) <= _MAX_KEY_TEXT else None
        if written is None:
            raise _malformed_key("not a pinned key", ascii(text[:_MAX_KEY_TEXT]))
        octets = bytes.fromhex(written[2])
        if written[1] == Algorithm.ED25519:
            try:
                return cls(_spki(Ed25519PublicKey.from_public_bytes(octets)))
            except ValueError as error:
                raise _malformed_key("not an Ed25519 key", f"{len(octets)} bytes") from error
        key = cls(octets)
        if key.algorithm != written[1]:
            raise _malformed_key("a key of another kind than it says", key.algorithm.value)
        return key

    def __str__(self) -> str:
        octets = self.spki if self.algorithm is Algorithm.ECDSA_P384 else self.spki[-32:]
        return f"{self.algorithm.value}:{octets.hex()}"

    @property
    def key_id(self) -> str:
        """The first 16 hexadecimal digits of the SHA-256 of ``spki``: a hint for people, and compared; it chooses no
        key.
        """
        return hashlib.sha256(self.spki).hexdigest()[:16]

    def verify(self, signature: bytes, data: bytes) -> None:
        """Raises ReleaseError ``bad_release_signature``. Either value of an ECDSA signature's *s* is good."""
        try:
            if isinstance(self._key, Ed25519PublicKey):
                self._key.verify(signature, data)
            else:
                self._key.verify(signature, data, ec.ECDSA(SHA384()))
        except InvalidSignature as error:
            raise ReleaseError(
                "bad_release_signature",
                "the pinned key did not sign this",
                expected=f"signed by {self.key_id}",
                got="not signed by it",
            ) from error


class Signer(Protocol):
    """What holds a private key: a file, or a KMS."""

    @property
    def public_key(self) -> PublicKey: ...

    def sign(self, data: bytes) -> bytes:
        """A signature over ``data`` (Ed25519: 64 bytes; ECDSA: DER, over its SHA-384). Raises SigningError."""
        ...


SigningKey: TypeAlias = Ed25519PrivateKey | ec.EllipticCurvePrivateKey


@final
class LocalSigner:
    """A private key in this process: Ed25519, or ECDSA on P-384."""

    def __init__(self, key: SigningKey) -> None:
        """Raises SigningError ``unusable_key`` for another curve."""
        try:
            self._public = PublicKey(_spki(key.public_key()))
        except ReleaseError as error:
            raise _unusable_key(error.got or error.message) from error
        self._key = key

    @classmethod
    def generate(cls) -> LocalSigner:
        """A new Ed25519 key."""
        return cls(Ed25519PrivateKey.generate())

    @classmethod
    def from_pem(cls, pem: bytes) -> LocalSigner:
        """A private key in PEM, not encrypted. Raises SigningError ``unusable_key``."""
        try:
            key = load_pem_private_key(pem, password=None)
        except (ValueError, TypeError, UnsupportedAlgorithm) as error:
            raise _unusable_key("no such file, or an encrypted one") from error
        if not isinstance(key, Ed25519PrivateKey | ec.EllipticCurvePrivateKey):
            raise _unusable_key(type(key).__name__)
        return cls(key)

    def to_pem(self) -> bytes:
        """The private key in clear (PKCS #8): for a file that only its owner reads."""
        return self._key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())

    @property
    def public_key(self) -> PublicKey:
        return self._public

    def sign(self, data: bytes) -> bytes:
        if isinstance(self._key, Ed25519PrivateKey):
            return self._key.sign(data)
        return self._key.sign(data, ec.ECDSA(SHA384()))

    def __repr__(self) -> str:
        return f"LocalSigner({self._public.key_id}, key=<redacted>)"


# --- The envelope ------------------------------------------------------------------------------------------------


def pre_authentication_encoding(payload: bytes) -> bytes:
    """What is signed: ``DSSEv1``, the payload's type and the payload, each with its length (DSSE version 1, PAE)."""
    kind = PAYLOAD_TYPE.encode("ascii")
    return b"DSSEv1 %d %s %d %s" % (len(kind), kind, len(payload), payload)


def seal(payload: bytes, signer: Signer) -> bytes:
    """The envelope of ``payload``, as one line of JSON without its end. Raises SigningError."""
    signature = {
        "keyid": signer.public_key.key_id,
        "sig": _to_base64(signer.sign(pre_authentication_encoding(payload))),
    }
    envelope = {"payload": _to_base64(payload), "payloadType": PAYLOAD_TYPE, "signatures": [signature]}
    return json.dumps(envelope, separators=(",", ":")).encode("ascii")


def unseal(envelope: bytes, *, key: PublicKey, name: str) -> bytes:
    """The payload of an envelope that ``key`` signed; ``name`` is how errors call it.

    Raises ReleaseError: ``malformed_release``, ``wrong_key``, ``bad_release_signature``.
    """
    try:
        payload, key_id, signature = _read(envelope, name)
    except EvidenceError as error:
        raise ReleaseError(error.code, f"{name}: {error.message}", expected=error.expected, got=error.got) from error
    if key_id != key.key_id:
        raise ReleaseError(
            "wrong_key", f"{name} says that another key has signed it", expected=key.key_id, got=ascii(key_id)
        )
    try:
        key.verify(signature, pre_authentication_encoding(payload))
    except ReleaseError as error:
        raise error.of(name) from error
    return payload


def _read(envelope: bytes, name: str) -> tuple[bytes, str, bytes]:
    if len(envelope) > MAX_ENVELOPE:
        raise EvidenceError(
            _MALFORMED, "an envelope that is too large", expected=f"at most {MAX_ENVELOPE} bytes", got=len(envelope)
        )
    value = strict_json.decode(envelope, code=_MALFORMED)
    top = Record(value, "envelope", required={"payload", "payloadType", "signatures"}, code=_MALFORMED)
    top.literal("payloadType", PAYLOAD_TYPE)
    signatures = top.array("signatures")
    if len(signatures) != 1:
        raise top.refusal("signatures", "exactly one", len(signatures))
    signature = Record(signatures[0], "signature", required={"keyid", "sig"}, code=_MALFORMED)
    payload = _from_base64(top, "payload", MAX_PAYLOAD)
    return payload, signature.text("keyid", 16), _from_base64(signature, "sig", MAX_SIGNATURE)


def _to_base64(data: bytes) -> str:
    return base64.b64encode(data).decode("ascii")


def _from_base64(record: Record, name: str, most: int) -> bytes:
    """The standard alphabet with padding, in the one way to write these bytes."""
    text = record.text(name, MAX_ENVELOPE)
    try:
        data = base64.b64decode(text, validate=True)
    except ValueError:
        data = b""
    if not 0 < len(data) <= most or _to_base64(data) != text:
        raise record.refusal(name, f"1 to {most} bytes in base64", f"text of {len(text)} characters")
    return data


def _spki(key: Ed25519PublicKey | ec.EllipticCurvePublicKey) -> bytes:
    return key.public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)


def _malformed_key(message: str, got: str) -> ReleaseError:
    expected = "ed25519: and 32 bytes, or ecdsa-p384: and a SubjectPublicKeyInfo, in hexadecimal"
    return ReleaseError("malformed_key", message, expected=expected, got=got)


def _unusable_key(got: str) -> SigningError:
    return SigningError(
        "unusable_key", "not a key to sign with", expected="Ed25519 or ECDSA on P-384, PEM, not encrypted", got=got
    )
