"""Evidence that is kept: what came, what it was asked for with, where and when, for an auditor to verify later.

PROTOCOL.md section 2.3. Only the Evidence in a bundle is proof: the nonce is what it answers, the time and the place
are words of whoever saved it.
"""

from __future__ import annotations

import base64
import binascii
import json
import re
from dataclasses import dataclass
from datetime import UTC, datetime

from attestation import strict_json
from attestation.cbor import Record
from attestation.commitment import MAX_EVIDENCE
from attestation.document import MAX_FIELD
from attestation.errors import EvidenceError

MAX_BUNDLE = 131_072
"""Bytes of a bundle, and of any file with Evidence or a document in it."""

_VERSION = 1
_CODE = "malformed_bundle"
_MAX_SOURCE = 2048
_TIME = "%Y-%m-%dT%H:%M:%SZ"


@dataclass(frozen=True, slots=True)
class Bundle:
    """One answer of an enclave, as it is kept. ValueError when a field is out of its bounds."""

    evidence: bytes
    """As received: Evidence (PROTOCOL.md section 2), at most ``MAX_EVIDENCE`` bytes."""
    nonce: bytes
    """With which it was asked for, 1 to ``MAX_FIELD`` bytes."""
    fetched: datetime
    """When, to the second, by the clock of whoever asked."""
    source: str
    """Where: an address, of 1 to 2,048 printable characters."""

    def __post_init__(self) -> None:
        for name, size, limit in (
            ("evidence", len(self.evidence), MAX_EVIDENCE),
            ("nonce", len(self.nonce), MAX_FIELD),
            ("source", len(self.source), _MAX_SOURCE),
        ):
            if not 0 < size <= limit:
                raise ValueError(f"{name}: expected 1 to {limit}, got {size}")
        if self.fetched.tzinfo is None:
            raise ValueError("fetched: a time without a time zone could be any of twenty-four")
        object.__setattr__(self, "fetched", self.fetched.astimezone(UTC).replace(microsecond=0))

    def encode(self) -> bytes:
        """JSON, with a line's end, for a file."""
        body = {
            "v": _VERSION,
            "evidence": base64.b64encode(self.evidence).decode(),
            "nonce": self.nonce.hex(),
            "fetched": self.fetched.strftime(_TIME),
            "source": self.source,
        }
        return json.dumps(body, indent=1).encode() + b"\n"

    @classmethod
    def decode(cls, data: bytes) -> Bundle:
        """Raises EvidenceError ``malformed_bundle``. The Evidence in it is not looked at."""
        _require_size(data)
        record = Record(strict_json.decode(data, code=_CODE), "bundle", required=_FIELDS, code=_CODE)
        record.literal("v", _VERSION)
        evidence = _base64(record.text("evidence", MAX_BUNDLE))
        nonce = _hexadecimal(record.text("nonce", 2 * MAX_FIELD))
        try:
            fetched = datetime.strptime(record.text("fetched", 32), _TIME).replace(tzinfo=UTC)
            return cls(evidence, nonce, fetched, record.text("source", _MAX_SOURCE))
        except ValueError as error:
            raise EvidenceError(_CODE, f"bundle: {ascii(str(error))[1:-1]}") from error


_FIELDS = frozenset(("v", "evidence", "nonce", "fetched", "source"))


def read_kept(data: bytes) -> Bundle | bytes:
    """What a file holds: a bundle, or Evidence or a document as bytes.

    People keep those as they are, as hexadecimal digits or as base64, in either alphabet of RFC 4648 (that for URLs
    with or without its padding). All are told apart by their first byte, because neither Evidence nor a document begins
    with an ASCII character. Raises EvidenceError ``malformed_bundle``.
    """
    text = data.strip()
    _require_size(text)
    if not data.isascii():
        return data
    if text.startswith(b"{"):
        return Bundle.decode(text)
    joined = b"".join(text.split()).decode()
    try:
        return bytes.fromhex(joined)
    except ValueError:
        return _base64(_as_standard(joined))


def _require_size(data: bytes) -> None:
    if not 0 < len(data) <= MAX_BUNDLE:
        raise EvidenceError(
            _CODE, "not of a size that Evidence has", expected=f"1 to {MAX_BUNDLE} bytes", got=f"{len(data)} bytes"
        )


def _base64(text: str) -> bytes:
    try:
        return base64.b64decode(text, validate=True)
    except binascii.Error as error:
        raise EvidenceError(
            _CODE, "neither a bundle nor Evidence in hexadecimal or base64", got=f"{len(text)} characters"
        ) from error


def _as_standard(text: str) -> str:
    """Base64 in the alphabet for URLs (RFC 4648 section 5), as JSON APIs give it; any other text as it is."""
    if not re.fullmatch(r"[A-Za-z0-9_-]+=*", text) or not re.search(r"[_-]", text):
        return text
    digits = text.rstrip("=")
    return digits.replace("-", "+").replace("_", "/") + "=" * (-len(digits) % 4)


def _hexadecimal(text: str) -> bytes:
    try:
        return bytes.fromhex(text)
    except ValueError as error:
        raise EvidenceError(_CODE, "bundle: the nonce is not hexadecimal", got=f"{len(text)} characters") from error
