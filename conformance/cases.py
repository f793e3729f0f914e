"""What a verifier is asked, and what it should say: this repository's vectors, and AWS's real documents."""

from __future__ import annotations

import base64
import json
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime, timedelta
from pathlib import Path

from conformance.protocol import Answer, Question, Verdict
from conformance.vectors import ACCEPTED, Subject, load

_P384_ORDER = int(
    "ffffffffffffffffffffffffffffffffffffffffffffffffc7634d81f4372ddf581a0db248b0a77aecec196accc52973", 16
)


_ACCEPTED = Answer(Verdict.ACCEPTED)


def _refused(code: str) -> Answer:
    return Answer(Verdict.REFUSED, code)


@dataclass(frozen=True, slots=True)
class Case:
    """``expected`` has no code where none was ever recorded."""

    question: Question
    expected: Answer
    about: str


def from_vectors(folder: Path, level: Subject) -> Iterator[Case]:
    """The vectors of ``folder`` to a level: it and those before it. Raises VectorError."""
    levels = list(Subject)
    for name, vector in load(folder):
        if levels.index(vector.subject) > levels.index(level):
            continue
        anchor = (folder / vector.anchor).read_bytes()
        policy = None if vector.policy is None else tomllib.loads((folder / vector.policy).read_text())
        if policy is not None:
            policy["anchor"]["root"] = base64.b64encode(anchor).decode()
        question = Question(
            id=name,
            level=vector.subject,
            payload=vector.payload,
            anchor=anchor,
            time=vector.time,
            nonce=vector.nonce,
            policy=policy,
        )
        expected = _ACCEPTED if vector.expect == ACCEPTED else _refused(vector.expect)
        yield Case(question, expected, vector.about)


def from_collection(folder: Path) -> Iterator[Case]:
    """AWS's real documents, indexed in ``INDEX.json``, each at its own time under AWS's root; then the newest of them
    with what can be changed without its key. Such cases are all that a verifier with AWS's root built in can answer.
    """
    index = json.loads((folder / "INDEX.json").read_text())
    root = (folder / index["root"]["der"]).read_bytes()

    def case(name: str, document: bytes, time: datetime, expected: Answer, about: str) -> Case:
        question = Question(id=f"real-{name}", level=Subject.DOCUMENT, payload=document, anchor=root, time=time)
        return Case(question, expected, about)

    newest = None
    for entry in sorted(index["documents"], key=lambda entry: str(entry["file"])):
        document = (folder / entry["file"]).read_bytes()
        time = datetime.fromisoformat(entry["verify_at"])
        valid = entry["expected"] == "valid"
        about = f"of {entry['source_repo']}, {entry['expected']}"
        expected = _ACCEPTED if valid else Answer(Verdict.REFUSED)
        yield case(entry["file"].removesuffix(".cbor"), document, time, expected, about)
        if valid:
            newest = document, time
    if newest is None:
        return
    document, time = newest
    for name, about, expected, changed in _changes(document):
        yield case(f"changed-{name}", changed, time, expected, about)
    day, untrusted = timedelta(days=1), _refused("untrusted_chain")
    yield case("later", document, time + day, untrusted, "a day later: the leaf has expired")
    yield case("earlier", document, time - day, untrusted, "a day earlier: the leaf is not valid yet")


def _changes(document: bytes) -> Iterator[tuple[str, str, Answer, bytes]]:
    """``document`` is ``[h'a1013822', {}, payload, signature]``, as every real one is."""
    header, rest, r, s = document[:6], document[6:-96], document[-96:-48], document[-48:]
    cbor, cose, signature = (_refused(code) for code in ("malformed_cbor", "malformed_cose", "bad_signature"))
    yield "tagged", "with tag 18", _ACCEPTED, b"\xd2" + document
    yield "other-s", "the other of the two good values of s", _ACCEPTED, header + rest + r + _negated(s)
    yield "trailing", "a byte behind the COSE object", cbor, document + b"\x00"
    yield "truncated", "the last byte is missing", cbor, document[:-1]
    yield "indefinite", "the COSE array is of indefinite length", cbor, b"\x9f" + document[1:] + b"\xff"
    yield "foreign-tag", "tag 17, a MAC", cbor, b"\xd1" + document
    yield "unprotected", "an unprotected header", cose, header + b"\xa1\x04\x41\x61" + document[7:]
    yield "zero-signature", "96 zero bytes as the signature", signature, header + rest + bytes(96)
    yield "swapped-signature", "s before r", signature, header + rest + s + r
    last = bytes([document[-1] ^ 1])
    yield "last-bit", "the last bit of the signature differs", signature, document[:-1] + last


def _negated(s: bytes) -> bytes:
    return (_P384_ORDER - int.from_bytes(s, "big")).to_bytes(48, "big")
