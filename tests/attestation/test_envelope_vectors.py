"""Envelopes against tests/vectors/envelope, which ``scripts/vectors_envelope.py`` makes from PROTOCOL.md without
``attestation``: two implementations of one page."""

from __future__ import annotations

import json
import runpy
from pathlib import Path
from typing import Any

import pytest

from attestation.envelope import EnvelopeError, EnvelopeHeader, EnvelopePurpose, Terms, require_header
from attestation.envelope_records import Opener, Sealer
from attestation.keypolicy.document import KeyArn
from attestation.secret import Secret

REPOSITORY = Path(__file__).resolve().parents[2]
VECTORS = REPOSITORY / "tests" / "vectors" / "envelope"
PATHS = sorted(VECTORS.glob("*.json"))
each_vector = pytest.mark.parametrize(
    "vector", [pytest.param(json.loads(path.read_text()), id=path.stem) for path in PATHS]
)


def opened(vector: dict[str, Any], step: int) -> bytes:
    """The body, as the enclave of the vector opens it, ``step`` bytes at a time."""
    envelope, required = bytes.fromhex(vector["envelope"]), vector["requires"]
    header, at = EnvelopeHeader.split(envelope)
    require_header(
        header,
        purpose=EnvelopePurpose(required["purpose"]),
        key=KeyArn.parse(required["key"]),
        context=required["context"],
        minimum_version=required["minimum_version"],
    )
    opener = Opener(
        header,
        Secret(bytes.fromhex(vector["data_key"])),
        model=bytes.fromhex(vector["model"]),
        configuration=bytes.fromhex(vector["configuration"]),
    )
    chunks = [envelope[start : start + step] for start in range(at, len(envelope), step)]
    body = b"".join(piece for chunk in chunks for piece in opener.feed(chunk))
    return body + opener.finish()


@each_vector
@pytest.mark.parametrize("step", [97, 4112, 1 << 20])
def test_vector(vector: dict[str, Any], step: int) -> None:
    if vector["expect"] == "accepted":
        assert opened(vector, step).hex() == vector["body"]
        return
    with pytest.raises(EnvelopeError) as caught:
        opened(vector, step)
    assert caught.value.code == vector["expect"]


OTHERS = {"prompt": ((bytes(48),), (bytes(48),)), "longest-terms": ((bytes(48),) * 78, ())}
"""What else the terms of some vectors name: models before the vector's own, configurations behind it."""


@pytest.mark.parametrize("name", ["model", "full-last-record", "one-byte-more", "empty", "prompt", "longest-terms"])
def test_what_is_accepted_is_what_we_would_make(name: str) -> None:
    vector = json.loads((VECTORS / f"{name}.json").read_text())
    envelope = bytes.fromhex(vector["envelope"])
    header, _ = EnvelopeHeader.split(envelope)
    assert header.aad.hex() == vector["aad"]
    model, configuration = bytes.fromhex(vector["model"]), bytes.fromhex(vector["configuration"])
    models, configurations = OTHERS.get(name, ((), ()))
    terms = Terms(header.purpose, (*models, model), (configuration, *configurations))
    sealer = Sealer(header, terms, Secret(bytes.fromhex(vector["data_key"])))
    made = b"".join(sealer.seal(bytes.fromhex(vector["body"]))) + sealer.finish()
    assert made == envelope


def test_the_vectors_are_those_that_the_script_makes() -> None:
    made = runpy.run_path(str(REPOSITORY / "scripts" / "vectors_envelope.py"))["envelope"]()
    assert {path.name: path.read_bytes() for path in VECTORS.iterdir()} == dict(made)
