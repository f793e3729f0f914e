"""AWS's real documents, as collected in ../shared/vectors/nitro, each with its indexed verdict."""

from __future__ import annotations

import hashlib
import json
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from attestation.anchors import AWS_NITRO_G1
from attestation.checks import Label
from attestation.errors import EvidenceError
from attestation.reference import ZERO_PCR, once_extended
from attestation.verifier import authenticate

NOW = datetime(2026, 9, 1, tzinfo=UTC)
"""Later than every document's leaf."""

FOLDER = Path(__file__).resolve().parents[3] / "shared" / "vectors" / "nitro"
if not FOLDER.is_dir():
    pytest.skip(
        "AWS's collected documents are not beside this repository: ../shared/vectors/nitro", allow_module_level=True
    )

INDEX: list[dict[str, Any]] = json.loads((FOLDER / "INDEX.json").read_text())["documents"]
VALID = [entry for entry in INDEX if entry["expected"] == "valid"]

INVALID = {
    # The signature was tampered with; the chain is AWS's.
    "20240723-eternisai-5f42eb91.cbor": "bad_signature",
    # Self-consistent, under a private root.
    "20241213-marlinprotocol-d8032479.cbor": "untrusted_chain",
    "20250430-marlinprotocol-a132128a.cbor": "untrusted_chain",
}


def _at(entry: dict[str, Any]) -> datetime:
    return datetime.fromisoformat(entry["verify_at"])


def test_the_collection_is_complete() -> None:
    assert {entry["file"] for entry in INDEX} == {path.name for path in FOLDER.glob("*.cbor")}
    assert {entry["file"] for entry in INDEX if entry["expected"] != "valid"} == INVALID.keys()
    assert len(VALID) == 38


@pytest.mark.parametrize("entry", VALID, ids=lambda entry: entry["file"])
def test_a_valid_document_is_authentic_at_its_own_time(entry: dict[str, Any]) -> None:
    result = authenticate((FOLDER / entry["file"]).read_bytes(), anchor=AWS_NITRO_G1, at=_at(entry))
    claims = result.claims
    assert claims.module_id == entry["module_id"]
    assert claims.timestamp == _at(entry)
    assert sorted(claims.pcrs) == entry["pcr_indexes"]
    assert {str(index): value.hex() for index, value in claims.pcrs.items() if value != ZERO_PCR} == entry["pcrs"]
    for field in ("public_key", "user_data", "nonce"):
        value = getattr(claims, field)
        assert entry[field] == ("null" if value is None else f"bytes[{len(value)}]")
    assert len(claims.cabundle) == entry["cabundle_len"]
    assert result.labels == ({Label.DEBUG} if entry["debug_mode"] else frozenset())
    assert [check.step for check in result.checks] == [1, 2, 3, 4, 5]


@pytest.mark.parametrize("name", INVALID)
def test_an_invalid_document_is_refused_with_its_code(name: str) -> None:
    entry = next(entry for entry in INDEX if entry["file"] == name)
    with pytest.raises(EvidenceError) as caught:
        authenticate((FOLDER / name).read_bytes(), anchor=AWS_NITRO_G1, at=_at(entry))
    assert caught.value.code == INVALID[name]


@pytest.mark.parametrize("entry", INDEX, ids=lambda entry: entry["file"])
def test_none_is_authentic_today(entry: dict[str, Any]) -> None:
    """An archived document is verified as archived, or not at all."""
    with pytest.raises(EvidenceError) as caught:
        authenticate((FOLDER / entry["file"]).read_bytes(), anchor=AWS_NITRO_G1, at=NOW)
    assert caught.value.code == "untrusted_chain"


@pytest.mark.parametrize("entry", VALID[:3], ids=lambda entry: entry["file"])
def test_none_is_authentic_before_it_was_made(entry: dict[str, Any]) -> None:
    with pytest.raises(EvidenceError) as caught:
        authenticate((FOLDER / entry["file"]).read_bytes(), anchor=AWS_NITRO_G1, at=_at(entry) - timedelta(days=1))
    assert caught.value.code == "untrusted_chain"


def test_a_private_root_is_authentic_under_its_own_name_only() -> None:
    """Two of the collected documents are whole, but for whose root it is."""
    entry = next(entry for entry in INDEX if entry["file"].startswith("20241213"))
    document = (FOLDER / entry["file"]).read_bytes()
    with pytest.raises(EvidenceError) as caught:
        authenticate(document, anchor=AWS_NITRO_G1, at=_at(entry))
    assert caught.value.expected == f"root sha256 {AWS_NITRO_G1.fingerprint}"


def test_the_root_is_the_one_of_the_collection() -> None:
    assert (FOLDER / "aws-nitro-root-g1.der").read_bytes() == AWS_NITRO_G1.der


def test_registers_are_built_as_aws_builds_them() -> None:
    known = json.loads((FOLDER / "pcr-known-answers.json").read_text())
    assert known["pcr4"]
    for answer in known["pcr4"]:
        assert once_extended(answer["instance_id"].encode("ascii")).hex() == answer["pcr4"]
    for answer in known["pcr8"]:
        certificate = (FOLDER / answer["certificate"]).read_bytes()
        assert once_extended(hashlib.sha384(certificate).digest()).hex() == answer["pcr8"]
    nothing = hashlib.sha384(b"").digest()
    assert once_extended(nothing).hex() == known["pcr2_without_application_ramdisk"]["value"]


@settings(max_examples=150)
@given(data=st.data())
def test_a_mutated_document_is_never_authentic(data: st.DataObject) -> None:
    entry = data.draw(st.sampled_from(VALID))
    original = (FOLDER / entry["file"]).read_bytes()
    document = bytearray(original)
    for _ in range(data.draw(st.integers(1, 3))):
        document[data.draw(st.integers(0, len(document) - 1))] ^= data.draw(st.integers(1, 255))
    if bytes(document) == original:
        return
    with pytest.raises(EvidenceError):
        authenticate(bytes(document), anchor=AWS_NITRO_G1, at=_at(entry))
