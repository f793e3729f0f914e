"""The format of ``tests/vectors/evidence/*.vector``: one verdict a file.

Header lines in a fixed order, an empty line, then the payload in base64 at 76 characters a line. A file has one
spelling: what ``encode`` would not have written is refused, so that nothing in a file is read by some and overlooked by
others. conformance/README.md says what the headers mean.
"""

from __future__ import annotations

import base64
import binascii
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from enum import StrEnum
from pathlib import Path

ACCEPTED = "accepted"
SUFFIX = ".vector"
MAX_FILE = 131_072
"""Bytes of a vector's file."""

_LINE = 76


class VectorError(Exception):
    """A file that is no vector. The message names it."""


class Subject(StrEnum):
    """What the payload is and how much of the checklist is asked of it, from the least to the most."""

    DOCUMENT = "document"
    """A bare attestation document: steps 1 to 5."""
    APPRAISAL = "appraisal"
    """A bare attestation document under a policy, with a nonce: all steps that are not about a channel."""
    EVIDENCE = "evidence"
    """Whole Evidence for a channel, under a policy and with a nonce: steps 1 to 15."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Vector:
    """One payload and its verdict. ``time`` is the verification time, in UTC, to the millisecond."""

    about: str
    subject: Subject
    expect: str
    """``accepted``, or the code of the failure."""
    step: int | None
    """The step that fails; None where none does."""
    time: datetime
    anchor: str
    """The file of the root certificate, DER, in the vector's folder."""
    nonce: bytes | None = None
    policy: str | None = None
    """The file of the policy in the vector's folder. It and the nonce are there except at ``Subject.DOCUMENT``."""
    payload: bytes

    def encode(self) -> bytes:
        headers = {
            "about": self.about,
            "subject": self.subject.value,
            "expect": self.expect,
            "step": None if self.step is None else str(self.step),
            "time": instant(self.time),
            "anchor": self.anchor,
            "nonce": None if self.nonce is None else self.nonce.hex(),
            "policy": self.policy,
        }
        lines = [f"{name}: {value}" for name, value in headers.items() if value is not None]
        text = base64.b64encode(self.payload).decode()
        lines += ["", *(text[start : start + _LINE] for start in range(0, len(text), _LINE))]
        return ("\n".join(lines) + "\n").encode()

    @classmethod
    def decode(cls, data: bytes) -> Vector:
        """Raises VectorError."""
        if len(data) > MAX_FILE:
            raise VectorError(f"a vector has at most {MAX_FILE} bytes")
        try:
            head, _, body = data.decode().partition("\n\n")
            headers = dict(line.split(": ", 1) for line in head.split("\n"))
            vector = cls._from_headers(headers, base64.b64decode(body.replace("\n", ""), validate=True))
        except (ValueError, KeyError, binascii.Error) as error:
            raise VectorError(f"not a vector: {type(error).__name__}: {error}") from error
        if vector.encode() != data:
            raise VectorError("not as a vector is written: headers in order and once, base64 at 76 characters a line")
        return vector

    @classmethod
    def _from_headers(cls, headers: Mapping[str, str], payload: bytes) -> Vector:
        vector = cls(
            about=headers["about"],
            subject=Subject(headers["subject"]),
            expect=headers["expect"],
            step=int(headers["step"]) if "step" in headers else None,
            time=datetime.fromisoformat(headers["time"]),
            anchor=headers["anchor"],
            nonce=bytes.fromhex(headers["nonce"]) if "nonce" in headers else None,
            policy=headers.get("policy"),
            payload=payload,
        )
        if vector.time.utcoffset() != timedelta(0):
            raise ValueError("a time in UTC, with a Z")
        if not vector.about.isprintable() or not re.fullmatch(r"[a-z_]+", vector.expect):
            raise ValueError("texts of printable characters, codes of letters")
        if not all(re.fullmatch(r"[a-z0-9-]+\.[a-z]+", name) for name in (vector.anchor, vector.policy or "no.policy")):
            raise ValueError("anchor and policy are files of the same folder")
        if (vector.expect == ACCEPTED) != (vector.step is None):
            raise ValueError("a step belongs to a refusal, and to nothing else")
        judged = vector.subject is not Subject.DOCUMENT
        if judged != (vector.nonce is not None) or judged != (vector.policy is not None):
            raise ValueError("a nonce and a policy belong to what is judged by one, and to nothing else")
        return vector


def instant(time: datetime) -> str:
    """RFC 3339, in UTC: to the second where that is exact, else to the millisecond."""
    exact = "milliseconds" if time.microsecond else "seconds"
    return time.astimezone(UTC).replace(tzinfo=None).isoformat(timespec=exact) + "Z"


def load(folder: Path) -> Iterator[tuple[str, Vector]]:
    """Every vector of a folder with its name, in the order of the names. Raises VectorError, OSError."""
    for path in sorted(folder.glob(f"*{SUFFIX}")):
        try:
            yield path.stem, Vector.decode(path.read_bytes())
        except VectorError as error:
            raise VectorError(f"{path}: {error}") from error
