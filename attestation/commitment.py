"""What an enclave commits to, and Evidence: the signed document with that commitment beside it.

PROTOCOL.md sections 2, 2.1 and 2.2. The enclave builds these, the verifier reads them.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from enum import StrEnum

import cbor2

from attestation import cbor
from attestation.errors import EvidenceError
from attestation.reference import DIGEST_SIZE, digest_text

CHANNEL_SUITE = "MLKEM768-X25519/HKDF-SHA256/AES-256-GCM"
"""The one suite of protocol version 1: KEM, KDF and AEAD of the channel's HPKE."""

CHANNEL_KEY_SIZE = 1216
"""Bytes: an ML-KEM-768 encapsulation key (1,184), then an X25519 public key (32)."""

KEY_ID_SIZE = 16
BOOT_ID_SIZE = 16
RECEIPT_KEY_SIZE = 32
MAX_LIFETIME = 86_400
"""Seconds."""

MAX_EVIDENCE = 32_768
MAX_DOCUMENT = 16_384
"""Bytes: the largest Evidence, and the largest document in it."""

_COMMITMENT_VERSION = 1
_EVIDENCE_VERSION = 1
_USER_DATA_VERSION = 1
_CBOR_MAP = 5
"""The major type: the first three bits of a map."""


class Entropy(StrEnum):
    """Where an enclave's randomness comes from. ``HOST`` is an emulated enclave's: whoever runs it knows its keys."""

    NSM_HWRNG = "nsm-hwrng"
    HOST = "host"


class Purpose(StrEnum):
    """What a document was asked for. Only ``CHANNEL`` opens a channel; ``KMS`` documents go to a key service alone."""

    CHANNEL = "channel"
    KMS = "kms"


def channel_key_id(key: bytes) -> bytes:
    """The 16-byte name of a channel public key; whoever balances load routes by it."""
    return hashlib.sha256(b"strongroom/1 channel key\x00" + key).digest()[:KEY_ID_SIZE]


@dataclass(frozen=True, slots=True)
class Commitment:
    """The keys of a channel and what the enclave behind it runs. ValueError when a field is out of its bounds."""

    key: bytes
    """The channel's public key, ``CHANNEL_KEY_SIZE`` bytes."""
    lifetime: int
    """Seconds for which the enclave accepts ``key`` after it was last offered, 1 to ``MAX_LIFETIME``."""
    boot_id: bytes
    """16 random bytes, one value a boot."""
    receipt_key: bytes
    """An Ed25519 public key, 32 bytes, one a boot."""
    model: bytes
    """The model manifest's digest, 48 bytes; PCR16 follows from it."""
    configuration: bytes
    """The configuration's digest, 48 bytes; PCR17 follows from it."""
    entropy: Entropy
    """Where the enclave's randomness comes from, and so whether its host knows its keys."""

    def __post_init__(self) -> None:
        _require_size("key", self.key, CHANNEL_KEY_SIZE)
        _require_size("boot_id", self.boot_id, BOOT_ID_SIZE)
        _require_size("receipt_key", self.receipt_key, RECEIPT_KEY_SIZE)
        _require_size("model", self.model, DIGEST_SIZE)
        _require_size("configuration", self.configuration, DIGEST_SIZE)
        if not 1 <= self.lifetime <= MAX_LIFETIME:
            raise ValueError(f"lifetime: expected 1 to {MAX_LIFETIME} seconds, got {self.lifetime}")

    @property
    def key_id(self) -> bytes:
        return channel_key_id(self.key)

    def encode(self) -> bytes:
        """Deterministic CBOR: one commitment has one encoding, and so one digest."""
        return cbor2.dumps(
            {
                "v": _COMMITMENT_VERSION,
                "suite": CHANNEL_SUITE,
                "key": self.key,
                "key_id": self.key_id,
                "lifetime": self.lifetime,
                "boot_id": self.boot_id,
                "receipt_key": self.receipt_key,
                "model": self.model,
                "configuration": self.configuration,
                "entropy": self.entropy.value,
            },
            canonical=True,
        )

    def digest(self) -> bytes:
        """SHA-384 of the encoding: what ``user_data`` binds and what the channel is keyed to."""
        return hashlib.sha384(self.encode()).digest()

    @classmethod
    def decode(cls, data: bytes) -> Commitment:
        """Raises EvidenceError: ``malformed_commitment``; ``wrong_binding`` for a ``key_id`` that is not its key's."""
        code = "malformed_commitment"
        record = cbor.Record(
            cbor.decode(data, deterministic=True, code=code), "commitment", required=_COMMITMENT_FIELDS, code=code
        )
        record.literal("v", _COMMITMENT_VERSION)
        record.literal("suite", CHANNEL_SUITE)
        entropy = record.text("entropy", longest=16)
        if entropy not in _ENTROPIES:
            raise record.refusal("entropy", " or ".join(Entropy), cbor.shown(entropy))
        commitment = cls(
            key=record.octets("key", CHANNEL_KEY_SIZE, CHANNEL_KEY_SIZE),
            lifetime=record.integer("lifetime", 1, MAX_LIFETIME),
            boot_id=record.octets("boot_id", BOOT_ID_SIZE, BOOT_ID_SIZE),
            receipt_key=record.octets("receipt_key", RECEIPT_KEY_SIZE, RECEIPT_KEY_SIZE),
            model=record.octets("model", DIGEST_SIZE, DIGEST_SIZE),
            configuration=record.octets("configuration", DIGEST_SIZE, DIGEST_SIZE),
            entropy=Entropy(entropy),
        )
        key_id = record.octets("key_id", KEY_ID_SIZE, KEY_ID_SIZE)
        if key_id != commitment.key_id:
            raise EvidenceError(
                "wrong_binding",
                "the commitment's key_id does not follow from its key",
                expected=commitment.key_id.hex(),
                got=key_id.hex(),
            )
        return commitment


_ENTROPIES = frozenset(Entropy)
_COMMITMENT_FIELDS = frozenset(
    ("v", "suite", "key", "key_id", "lifetime", "boot_id", "receipt_key", "model", "configuration", "entropy")
)


@dataclass(frozen=True, slots=True)
class UserData:
    """The document's ``user_data``: what the document is for, and the commitment that it binds."""

    purpose: Purpose
    """What the document may be used for; a channel takes ``channel`` alone."""
    commitment_digest: bytes
    """SHA-384 of the commitment's encoding, 48 bytes."""

    def __post_init__(self) -> None:
        _require_size("commitment_digest", self.commitment_digest, DIGEST_SIZE)

    def __str__(self) -> str:
        return f"{self.purpose.value}, {digest_text(self.commitment_digest)}"

    def encode(self) -> bytes:
        return cbor2.dumps([_USER_DATA_VERSION, self.purpose.value, self.commitment_digest], canonical=True)

    @classmethod
    def decode(cls, data: bytes) -> UserData:
        """Raises EvidenceError ``wrong_binding``."""
        match cbor.decode(data, deterministic=True, code="wrong_binding"):
            case [int(version), str(purpose), bytes(digest)] if (
                version == _USER_DATA_VERSION and purpose in _PURPOSES and len(digest) == DIGEST_SIZE
            ):
                return cls(Purpose(purpose), digest)
            case other:
                raise EvidenceError(
                    "wrong_binding",
                    "user_data is not of this protocol",
                    expected=f"[{_USER_DATA_VERSION}, purpose, {DIGEST_SIZE} bytes]",
                    got=cbor.shown(other),
                )


_PURPOSES = frozenset(Purpose)


@dataclass(frozen=True, slots=True)
class Evidence:
    """A document and the encoded commitment that it binds, as they travel."""

    document: bytes
    """The NSM's COSE_Sign1, at most ``MAX_DOCUMENT`` bytes."""
    commitment: bytes
    """As encoded by ``Commitment.encode``; step 8 hashes it as received, step 9 reads it."""

    def encode(self) -> bytes:
        """Deterministic CBOR. ValueError when a bound of section 2 is exceeded."""
        if len(self.document) > MAX_DOCUMENT:
            raise ValueError(f"document: expected at most {MAX_DOCUMENT} bytes, got {len(self.document)}")
        encoded = cbor2.dumps(
            {"v": _EVIDENCE_VERSION, "document": self.document, "commitment": self.commitment}, canonical=True
        )
        if len(encoded) > MAX_EVIDENCE:
            raise ValueError(f"Evidence: expected at most {MAX_EVIDENCE} bytes, got {len(encoded)}")
        return encoded

    @staticmethod
    def is_in(data: bytes) -> bool:
        """Whether ``data`` begins as Evidence does: with a CBOR map, where a document is an array. It may be none."""
        return bool(data) and data[0] >> 5 == _CBOR_MAP

    @classmethod
    def decode(cls, data: bytes) -> Evidence:
        """Raises EvidenceError ``malformed_evidence``; of the two parts only the sizes are judged."""
        code = "malformed_evidence"
        if len(data) > MAX_EVIDENCE:
            raise EvidenceError(
                code, "Evidence is too large", expected=f"at most {MAX_EVIDENCE} bytes", got=f"{len(data)} bytes"
            )
        value = cbor.decode(data, deterministic=True, code=code)
        record = cbor.Record(value, "Evidence", required=_EVIDENCE_FIELDS, code=code)
        record.literal("v", _EVIDENCE_VERSION)
        return cls(record.octets("document", 0, MAX_DOCUMENT), record.octets("commitment", 0, MAX_EVIDENCE))


_EVIDENCE_FIELDS = frozenset(("v", "document", "commitment"))


def _require_size(name: str, value: bytes, size: int) -> None:
    if len(value) != size:
        raise ValueError(f"{name}: expected {size} bytes, got {len(value)}")
