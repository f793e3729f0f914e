"""Evidence decoded for a reader who has not judged it. Everything here is UNVERIFIED, and says so."""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Callable, Mapping
from typing import TypeVar

from cryptography import x509
from rich.console import Console
from rich.text import Text

from attestation import cbor
from attestation.bundle import Bundle
from attestation.commitment import Commitment, Evidence, UserData
from attestation.cose import COSE_SIGN1_TAG, CoseSign1, payload_of
from attestation.document import AttestationDocument
from attestation.errors import EvidenceError
from attestation.reference import ZERO_PCR
from strongroom.render import printable

UNVERIFIED = "UNVERIFIED: decoded and not judged. Anybody can write such bytes."

T = TypeVar("T")


def inspect(kept: Bundle | bytes) -> dict[str, object]:
    """What ``kept`` says, as a JSON object: digests and byte strings in hexadecimal, times as RFC 3339.

    ``problems`` lists what is not as specified; the rest is shown all the same. Raises EvidenceError when not even a
    COSE structure can be found.
    """
    problems: list[dict[str, str | None]] = []
    seen: dict[str, object] = {"verdict": "unverified", "problems": problems}
    if isinstance(kept, Bundle):
        seen["bundle"] = {
            "nonce": kept.nonce.hex(),
            "fetched": kept.fetched.isoformat(),
            "source": kept.source,
        }
        kept = kept.evidence
    # Evidence is a map; a document is an array, tagged or not.
    is_evidence = bool(kept) and kept[0] >> 5 == 5
    seen["subject"] = "Evidence" if is_evidence else "attestation document"
    document = kept
    if is_evidence:
        parts = Evidence.decode(kept)
        document = parts.document
        commitment = _attempt(problems, lambda: Commitment.decode(parts.commitment))
        seen["commitment"] = None if commitment is None else _commitment(commitment, parts.commitment)
    outer = cbor.decode(document, optional_tag=COSE_SIGN1_TAG)
    payload = payload_of(outer)
    if payload is None:
        raise EvidenceError("malformed_cose", "COSE: not a COSE_Sign1", got=cbor.shown(outer))
    signed = _attempt(problems, lambda: CoseSign1.from_cbor(outer))
    seen["signature"] = None if signed is None else signed.signature.hex()
    value = cbor.decode(payload, indefinite_top_map=True)
    claims = _attempt(problems, lambda: AttestationDocument.from_cbor(value))
    if claims is not None:
        seen["document"] = _claims(claims, problems)
    elif isinstance(value, dict):
        seen["document"] = {str(name): cbor.shown(field) for name, field in value.items()}
    return seen


def _attempt(problems: list[dict[str, str | None]], read: Callable[[], T]) -> T | None:
    try:
        return read()
    except EvidenceError as error:
        problems.append(error.as_json())
        return None


def _claims(claims: AttestationDocument, problems: list[dict[str, str | None]]) -> dict[str, object]:
    binding = None
    if claims.user_data is not None:
        user_data = claims.user_data
        with contextlib.suppress(EvidenceError):  # another program's user data is its own affair
            said = UserData.decode(user_data)
            binding = {"purpose": said.purpose.value, "commitment": f"sha384:{said.commitment_digest.hex()}"}
    certificates = [*claims.cabundle, claims.certificate]
    return {
        "module_id": claims.module_id,
        "timestamp": claims.timestamp.isoformat(),
        "pcrs": {str(index): value.hex() for index, value in sorted(claims.pcrs.items())},
        "debug": all(claims.pcrs.get(index) == ZERO_PCR for index in (0, 1, 2)),
        "public_key": _hex(claims.public_key),
        "user_data": _hex(claims.user_data),
        "binding": binding,
        "nonce": _hex(claims.nonce),
        "certificates": [_certificate(der, problems) for der in certificates],
    }


def _certificate(der: bytes, problems: list[dict[str, str | None]]) -> dict[str, str]:
    seen = {"sha256": hashlib.sha256(der).hexdigest()}
    try:
        certificate = x509.load_der_x509_certificate(der)
        seen["subject"] = certificate.subject.rfc4514_string()
        seen["issuer"] = certificate.issuer.rfc4514_string()
        seen["not_before"] = certificate.not_valid_before_utc.isoformat()
        seen["not_after"] = certificate.not_valid_after_utc.isoformat()
    except ValueError as error:
        problems.append(
            EvidenceError("untrusted_chain", "not an X.509 certificate", got=ascii(str(error))[1:-1]).as_json()
        )
    return seen


def _commitment(commitment: Commitment, encoded: bytes) -> dict[str, object]:
    return {
        "sha384": hashlib.sha384(encoded).hexdigest(),
        "key_id": commitment.key_id.hex(),
        "lifetime": commitment.lifetime,
        "boot_id": commitment.boot_id.hex(),
        "receipt_key": commitment.receipt_key.hex(),
        "model": f"sha384:{commitment.model.hex()}",
        "configuration": f"sha384:{commitment.configuration.hex()}",
        "entropy": commitment.entropy.value,
    }


def _hex(value: bytes | None) -> str | None:
    return None if value is None else value.hex()


# --- For people ---------------------------------------------------------------------------------------------------


def show_inspection(console: Console, seen: Mapping[str, object]) -> None:
    """Each field on a line, between two lines that say that none of it is proven; what is zero on one line."""
    console.print(Text(UNVERIFIED, "bold yellow"), soft_wrap=True)
    for title, part in seen.items():
        if isinstance(part, Mapping):
            console.print(Text(f"\n{title}", "bold"), soft_wrap=True)
            _show_fields(console, part)
    for problem in _maps(seen["problems"]):
        console.print(Text(f"\nnot as specified: {printable(str(problem['message']))} [{problem['code']}]", "red"))
        for name in ("expected", "got"):
            if problem[name] is not None:
                console.print(Text(f"  {name:<8}  {printable(str(problem[name]))}"), soft_wrap=True)
    console.print(Text(f"\n{UNVERIFIED}", "bold yellow"), soft_wrap=True)


def _show_fields(console: Console, fields: Mapping[object, object]) -> None:
    for name, value in fields.items():
        if name == "pcrs" and isinstance(value, Mapping):
            _show_registers(console, value)
        elif name == "certificates":
            for certificate in _maps(value):
                _show(console, "certificate", certificate.get("subject", "unreadable"))
                if "not_before" in certificate:
                    _show(console, "", f"{certificate['not_before']} to {certificate['not_after']}")
                _show(console, "", f"sha256 {certificate['sha256']}")
        elif isinstance(value, Mapping):
            _show(console, str(name), ", ".join(f"{key} {each}" for key, each in value.items()))
        else:
            _show(console, str(name), "absent" if value is None else value)


def _show_registers(console: Console, registers: Mapping[object, object]) -> None:
    zero = ZERO_PCR.hex()
    for index, value in registers.items():
        if value != zero:
            _show(console, f"PCR{index}", value)
    blank = [str(index) for index, value in registers.items() if value == zero]
    if blank:
        _show(console, "zero", f"PCR {', '.join(blank)}")


def _show(console: Console, name: str, value: object) -> None:
    console.print(Text(f"  {name:<13} {printable(str(value))}"), soft_wrap=True)


def _maps(value: object) -> list[Mapping[str, object]]:
    assert isinstance(value, list)
    return value
