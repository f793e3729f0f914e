"""Evidence from anybody: each parser on the way to a verdict raises its typed error; nothing unsigned is accepted."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import cbor2

from attestation import cbor, chain
from attestation.commitment import Commitment, Evidence, UserData
from attestation.document import AttestationDocument
from attestation.errors import AppraisalError, EvidenceError
from attestation.policy import AppraisalPolicy
from attestation.verifier import authenticate, verify
from conformance.vectors import Subject, load

FOLDER = Path(__file__).resolve().parent.parent / "tests" / "vectors" / "evidence"
POLICY = AppraisalPolicy.load(FOLDER / "policy.toml")

_VECTORS = dict(load(FOLDER))
_GOOD = _VECTORS["accepted"]
assert _GOOD.nonce is not None
_NONCE, _AT = _GOOD.nonce, _GOOD.time


def _payload(evidence: bytes) -> bytes:
    document = cbor2.loads(cbor2.loads(evidence)["document"])
    payload = (document.value if isinstance(document, cbor2.CBORTag) else document)[2]
    assert isinstance(payload, bytes)
    return payload


def _is_accepted(evidence: bytes) -> bool:
    try:
        verify(evidence, policy=POLICY, nonce=_NONCE, at=_AT)
    except (EvidenceError, AppraisalError):
        return False
    return True


_EVIDENCE = [vector.payload for vector in _VECTORS.values() if vector.subject is Subject.EVIDENCE]
SIGNED = frozenset(_payload(evidence) for evidence in _EVIDENCE if _is_accepted(evidence))
"""What was signed and is accepted. The signature beside it is malleable; this is not."""


def one_input(data: bytes) -> None:
    if _is_accepted(data):
        assert _payload(data) in SIGNED, "something was accepted that nobody signed"
    parsers: tuple[Callable[[bytes], object], ...] = (
        lambda data: authenticate(data, anchor=POLICY.anchor, at=_AT),
        lambda data: AttestationDocument.from_cbor(cbor.decode(data, indefinite_top_map=True)),
        lambda data: chain.validate(data, [POLICY.anchor.der, data], anchor=POLICY.anchor, at=_AT),
        Commitment.decode,
        UserData.decode,
    )
    for parse in parsers:
        refused = ""
        try:
            parse(data)
        except EvidenceError as error:
            refused = str(error)
        assert refused.isprintable(), "an error that can move a terminal's cursor"


def seeds() -> list[bytes]:
    parts, payload = Evidence.decode(_GOOD.payload), _payload(_GOOD.payload)
    fields = cbor2.loads(payload)
    pieces = [
        parts.document,
        parts.commitment,
        payload,
        fields["user_data"],
        fields["certificate"],
        *fields["cabundle"],
    ]
    return [*(vector.payload for vector in _VECTORS.values()), *pieces]
