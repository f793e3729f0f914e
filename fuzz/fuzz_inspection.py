"""Anything at all is inspected: what can be shown is shown, as JSON, and the rest is EvidenceError."""

from __future__ import annotations

import json
from pathlib import Path

from attestation.errors import EvidenceError
from conformance.vectors import load
from strongroom.inspection import inspect

FOLDER = Path(__file__).resolve().parent.parent / "tests" / "vectors" / "evidence"


def one_input(data: bytes) -> None:
    refused = ""
    try:
        seen = inspect(data)
    except EvidenceError as error:
        refused = str(error)
    else:
        assert json.loads(json.dumps(seen))["verdict"] == "unverified"
    assert refused.isprintable(), "an error that can move a terminal's cursor"


def seeds() -> list[bytes]:
    return [vector.payload for _, vector in load(FOLDER)]
