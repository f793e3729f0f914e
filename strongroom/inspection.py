"""Evidence decoded for a reader who has not judged it. Everything here is UNVERIFIED, and says so.

Each part is read as the verifier reads it, and what that refuses is noted as a problem; then by a reader that takes
what it can get. What is wrong with Evidence is best seen in the Evidence.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
from collections.abc import Callable, Iterator, Mapping
from datetime import UTC, datetime, timedelta
from itertools import islice
from typing import TypeVar

import cbor2
from cryptography import x509
from rich.console import Console
from rich.text import Text

from attestation import cbor
from attestation.appraisal import is_debug
from attestation.bundle import Bundle
from attestation.commitment import Commitment, Evidence, UserData
from attestation.cose import COSE_SIGN1_TAG, CoseSign1
from attestation.document import MAX_FIELD, AttestationDocument
from attestation.errors import EvidenceError
from attestation.reference import ZERO_PCR, digest_text
from strongroom.render import printable

UNVERIFIED = "UNVERIFIED: decoded and not judged. Anybody can write such bytes."

MAX_SHOWN = 64
"""Entries of one map or list; of more, how many there are."""

Problems = list[dict[str, str | None]]
T = TypeVar("T")

_DER_SEQUENCE = 0x30
_FIELDS = (
    "module_id", "digest", "timestamp", "pcrs", "public_key", "user_data", "nonce", "cabundle", "certificate",
)  # fmt: skip


def inspect(kept: Bundle | bytes) -> dict[str, object]:
    """What ``kept`` says, as a JSON object: digests and byte strings in hexadecimal, times as RFC 3339.

    ``problems`` lists what is not as specified, in the order of the verifier's checklist; the rest is shown all the
    same. The caller bounds the size of ``kept``. Raises EvidenceError when nothing of a document or a commitment can be
    found.
    """
    problems: Problems = []
    seen: dict[str, object] = {"verdict": "unverified", "problems": problems}
    if isinstance(kept, Bundle):
        seen["bundle"] = {
            "nonce": kept.nonce.hex(),
            "fetched": kept.fetched.isoformat(),
            "source": kept.source,
        }
        kept = kept.evidence
    if kept[:1] == bytes([_DER_SEQUENCE]):
        raise EvidenceError("malformed_cbor", "neither Evidence nor a document: a DER certificate?")
    is_evidence = Evidence.is_in(kept)
    seen["subject"] = "Evidence" if is_evidence else "attestation document"
    if is_evidence:
        document, commitment = _envelope(kept, problems)
        if commitment is not None:
            seen["commitment"] = _commitment(commitment, problems)
    else:
        document, commitment = kept, None
    if document is not None:
        _document(document, seen, problems)
    if not any(seen.get(part) for part in ("commitment", "signature", "document")):
        first = problems[0]
        raise EvidenceError(first["code"] or "", first["message"] or "", expected=first["expected"], got=first["got"])
    return seen


def _envelope(evidence: bytes, problems: Problems) -> tuple[bytes | None, bytes | None]:
    """The document and the commitment, each None where there is none."""
    _attempt(problems, lambda: Evidence.decode(evidence))
    fields = _lenient(evidence)
    if not isinstance(fields, Mapping):
        return None, None
    document, commitment = fields.get("document"), fields.get("commitment")
    return (
        document if isinstance(document, bytes) else None,
        commitment if isinstance(commitment, bytes) else None,
    )


def _document(document: bytes, seen: dict[str, object], problems: Problems) -> None:
    """Adds the signature and the document's fields to what is ``seen``, as far as they can be found."""
    _attempt(problems, lambda: CoseSign1.from_cbor(cbor.decode(document, optional_tag=COSE_SIGN1_TAG)))
    match _lenient(document):
        case [_, _, bytes(payload), signature]:
            seen["signature"] = _plain(signature) if isinstance(signature, bytes) else None
        case _:
            return
    _attempt(problems, lambda: AttestationDocument.from_cbor(cbor.decode(payload, indefinite_top_map=True)))
    fields = _lenient(payload)
    if isinstance(fields, Mapping):
        seen["document"] = _claims(fields, problems)


def _attempt(problems: Problems, read: Callable[[], T]) -> T | None:
    try:
        return read()
    except EvidenceError as error:
        problems.append(error.as_json())
        return None


def _lenient(data: bytes) -> object:
    """The first value in ``data``, whatever else there is; None when there is not even that."""
    try:
        value: object = cbor2.load(io.BytesIO(data), str_errors="backslashreplace", max_depth=2 * cbor.MAX_DEPTH)
    except (cbor2.CBORError, ValueError):  # noted as a problem already, by the strict reader
        return None
    while isinstance(value, cbor2.CBORTag):
        value = value.value
    return value


def _claims(fields: Mapping[object, object], problems: Problems) -> dict[str, object]:
    """A document's fields, each as it should be where it is of its type, else in a few words."""
    timestamp, pcrs, user_data, cabundle = (fields.get(name) for name in ("timestamp", "pcrs", "user_data", "cabundle"))
    registers = pcrs if isinstance(pcrs, Mapping) else {}
    certificates = [*(cabundle if isinstance(cabundle, list) else ()), *_of(fields, "certificate")]
    return {
        "module_id": _plain(fields.get("module_id")),
        "timestamp": _time(timestamp),
        "pcrs": dict(_entries(_sorted(registers))) if isinstance(pcrs, Mapping) else _plain(pcrs),
        "debug": is_debug(registers),
        "public_key": _plain(fields.get("public_key")),
        "user_data": _plain(user_data),
        "binding": _binding(user_data),
        "nonce": _plain(fields.get("nonce")),
        "certificates": [_certificate(each, problems) for each in certificates[:MAX_SHOWN]],
        **dict(_entries({name: value for name, value in fields.items() if name not in _FIELDS})),
    }


def _of(fields: Mapping[object, object], name: str) -> Iterator[object]:
    if name in fields:
        yield fields[name]


def _sorted(registers: Mapping[object, object]) -> Mapping[object, object]:
    indexes = sorted(index for index in registers if isinstance(index, int))
    return {index: registers[index] for index in indexes} | dict(registers)


def _entries(fields: Mapping[object, object]) -> Iterator[tuple[str, object]]:
    for name, value in islice(fields.items(), MAX_SHOWN):
        yield str(_plain(name)), _plain(value)
    if len(fields) > MAX_SHOWN:
        yield "and more", len(fields) - MAX_SHOWN


def _plain(value: object) -> str | int | None:
    """A value that JSON has, and of one that is large only its size."""
    match value:
        case None:
            return None
        case bytes():
            return value.hex() if len(value) <= MAX_FIELD else f"{len(value)} bytes"
        case str():
            return value if len(value) <= MAX_FIELD else f"text of {len(value)} characters"
        case int() if not isinstance(value, bool):
            return value if value.bit_length() <= 64 else f"integer of {value.bit_length()} bits"
        case list():
            return f"array of {len(value)}"
        case Mapping():
            return f"map of {len(value)}"
        case _:
            return f"a {type(value).__name__}"


def _time(timestamp: object) -> str | int | None:
    if isinstance(timestamp, int) and not isinstance(timestamp, bool):
        with contextlib.suppress(OverflowError):  # beyond the year 9999: then it stays a number
            return (datetime.fromtimestamp(0, UTC) + timedelta(milliseconds=timestamp)).isoformat()
    return _plain(timestamp)


def _binding(user_data: object) -> dict[str, str] | None:
    if isinstance(user_data, bytes):
        with contextlib.suppress(EvidenceError):  # another program's user data is its own affair
            said = UserData.decode(user_data)
            return {"purpose": said.purpose.value, "commitment": digest_text(said.commitment_digest)}
    return None


def _certificate(der: object, problems: Problems) -> dict[str, str]:
    seen: dict[str, str] = {}
    try:
        if not isinstance(der, bytes):
            raise ValueError(f"{_plain(der)}")
        seen["sha256"] = hashlib.sha256(der).hexdigest()
        certificate = x509.load_der_x509_certificate(der)
        seen["subject"] = certificate.subject.rfc4514_string()
        seen["issuer"] = certificate.issuer.rfc4514_string()
        seen["not_before"] = certificate.not_valid_before_utc.isoformat()
        seen["not_after"] = certificate.not_valid_after_utc.isoformat()
    except (ValueError, TypeError, x509.InvalidVersion, Warning) as error:
        # TypeError: a name in a BIT STRING. Warning: what the library only warns of, where those are set to be errors.
        problems.append(
            EvidenceError("untrusted_chain", "not an X.509 certificate", got=ascii(str(error))[1:-1]).as_json()
        )
    return seen


def _commitment(encoded: bytes, problems: Problems) -> dict[str, object] | None:
    digest = {"sha384": hashlib.sha384(encoded).hexdigest()}
    commitment = _attempt(problems, lambda: Commitment.decode(encoded))
    if commitment is None:
        fields = _lenient(encoded)
        return digest | dict(_entries(fields)) if isinstance(fields, Mapping) else None
    return {
        **digest,
        "key_id": commitment.key_id.hex(),
        "lifetime": commitment.lifetime,
        "boot_id": commitment.boot_id.hex(),
        "receipt_key": commitment.receipt_key.hex(),
        "model": digest_text(commitment.model),
        "configuration": digest_text(commitment.configuration),
        "entropy": commitment.entropy.value,
    }


# --- For people ---------------------------------------------------------------------------------------------------


def show_inspection(console: Console, seen: Mapping[str, object]) -> None:
    """Each field on a line, between two lines that say that none of it is proven; what is zero on one line."""
    console.print(Text(UNVERIFIED, "bold yellow"), soft_wrap=True)
    console.print()
    for name in ("subject", "signature"):
        if seen.get(name) is not None:
            _show(console, name, seen[name])
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
                if "sha256" in certificate:
                    _show(console, "", f"sha256 {certificate['sha256']}")
        elif isinstance(value, Mapping):
            _show(console, str(name), ", ".join(f"{key} {each}" for key, each in value.items()))
        elif isinstance(value, bool):
            _show(console, str(name), "yes" if value else "no")
        else:
            _show(console, str(name), "absent" if value is None else value)


def _show_registers(console: Console, registers: Mapping[object, object]) -> None:
    zero = ZERO_PCR.hex()
    for index, value in registers.items():
        if value != zero:
            _show(console, f"PCR{index}" if str(index).isdigit() else str(index), value)
    blank = [str(index) for index, value in registers.items() if value == zero]
    if blank:
        _show(console, "zero", f"PCR {', '.join(blank)}")


def _show(console: Console, name: str, value: object) -> None:
    console.print(Text(f"  {printable(name):<13} {printable(str(value))}"), soft_wrap=True)  # of both, anybody writes


def _maps(value: object) -> list[Mapping[str, object]]:
    assert isinstance(value, list)
    return value
