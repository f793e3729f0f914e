"""The payload of an attestation document: its fields, their types and their bounds (PROTOCOL.md section 3, step 3).

Parsing only: nothing here says that the claims are true.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from types import MappingProxyType

from attestation import cbor
from attestation.reference import DIGEST_SIZE

PCR_COUNT = 32
MAX_FIELD = 1024
"""Bytes of public_key, user_data and nonce. AWS's text says 512 for two of them, its CDDL 1,024, and documents with
746 exist."""

MAX_CERTIFICATE = 1024
MAX_MODULE_ID = 128

_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_LAST_TIMESTAMP = 253_402_300_799_999
"""Milliseconds: the end of the year 9999, the last that a datetime can say."""

_REQUIRED = frozenset(("module_id", "digest", "timestamp", "pcrs", "certificate", "cabundle"))
_OPTIONAL = frozenset(("public_key", "user_data", "nonce"))


@dataclass(frozen=True, slots=True)
class AttestationDocument:
    """The claims of a document, as parsed."""

    module_id: str
    """The hypervisor's name for this enclave, 1 to 128 printable characters; another at every start."""
    timestamp: datetime
    """When the module signed, by its own clock: UTC, to the millisecond."""
    pcrs: Mapping[int, bytes]
    """The locked registers, 48 bytes each. One that is absent was not locked, and nothing is known of it."""
    certificate: bytes
    """The leaf, DER."""
    cabundle: tuple[bytes, ...]
    """DER, root first, without the leaf."""
    public_key: bytes | None
    user_data: bytes | None
    nonce: bytes | None
    """What the enclave had signed, ``public_key`` and ``user_data`` too: at most 1,024 bytes each, None when absent."""

    @staticmethod
    def is_in(data: bytes) -> bool:
        """Whether ``data`` begins as a document does: with a COSE_Sign1's array, tagged or not. It may be none."""
        return data[:1] in (b"\x84", b"\xd2")

    @classmethod
    def from_cbor(cls, value: cbor.Value) -> AttestationDocument:
        """Raises EvidenceError ``malformed_document``."""
        record = cbor.Record(value, "document", required=_REQUIRED, optional=_OPTIONAL, code="malformed_document")
        record.literal("digest", "SHA384")
        milliseconds = record.integer("timestamp", 1, _LAST_TIMESTAMP)
        pcrs: dict[int, bytes] = {}
        for index, register in record.map("pcrs").items():
            if not (isinstance(index, int) and 0 <= index < PCR_COUNT):
                raise record.refusal("pcrs", f"indexes 0 to {PCR_COUNT - 1}", cbor.shown(index))
            if not (isinstance(register, bytes) and len(register) == DIGEST_SIZE):
                raise record.wrong_octets(register, f"PCR{index}", DIGEST_SIZE, DIGEST_SIZE)
            pcrs[index] = register
        if not pcrs:
            raise record.refusal("pcrs", "at least one register", "none")
        cabundle: list[bytes] = []
        for certificate in record.array("cabundle"):
            if not (isinstance(certificate, bytes) and 1 <= len(certificate) <= MAX_CERTIFICATE):
                raise record.wrong_octets(certificate, "cabundle", 1, MAX_CERTIFICATE)
            cabundle.append(certificate)
        if not cabundle:
            raise record.refusal("cabundle", "at least the root", "none")
        return cls(
            module_id=record.text("module_id", MAX_MODULE_ID),
            timestamp=_EPOCH + timedelta(milliseconds=milliseconds),
            pcrs=MappingProxyType(pcrs),
            certificate=record.octets("certificate", 1, MAX_CERTIFICATE),
            cabundle=tuple(cabundle),
            public_key=record.optional_octets("public_key", MAX_FIELD),
            user_data=record.optional_octets("user_data", MAX_FIELD),
            nonce=record.optional_octets("nonce", MAX_FIELD),
        )
