"""The command protocol between the runner and a verifier: one JSON object a line, a question and its answer.

conformance/README.md specifies it. Both sides are here: the runner's, and ``serve`` for verifiers written in Python.
"""

from __future__ import annotations

import base64
import json
import re
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import datetime
from enum import StrEnum
from typing import Any

from conformance.vectors import Subject, instant

MAX_LINE = 1_048_576
"""Bytes of a line of the runner's."""
MAX_ANSWER = 4096
"""Bytes of a line of a verifier's."""


class ProtocolError(Exception):
    """A line that is not of this protocol."""


class Verdict(StrEnum):
    ACCEPTED = "accepted"
    REFUSED = "refused"


@dataclass(frozen=True, slots=True, kw_only=True)
class Question:
    """What a verifier is asked. ``nonce`` and ``policy`` are there except at the level of a document."""

    id: str
    level: Subject
    payload: bytes
    anchor: bytes
    """The one root certificate to trust, DER."""
    time: datetime
    """The verification time."""
    nonce: bytes | None = None
    policy: Mapping[str, object] | None = None
    """The policy's TOML as JSON, the anchor's certificate (base64 of the DER) in place of its file."""

    def encode(self) -> bytes:
        asked: dict[str, object] = {
            "id": self.id,
            "level": self.level.value,
            _field(self.level): base64.b64encode(self.payload).decode(),
            "anchor": base64.b64encode(self.anchor).decode(),
            "time": instant(self.time),
        }
        if self.nonce is not None and self.policy is not None:
            asked |= {"nonce": self.nonce.hex(), "policy": self.policy}
        return json.dumps(asked).encode() + b"\n"

    @classmethod
    def decode(cls, line: bytes) -> Question:
        """Raises ProtocolError."""
        try:
            asked: dict[str, Any] = json.loads(line)
            level = Subject(asked["level"])
            judged = level is not Subject.DOCUMENT
            return cls(
                id=asked["id"],
                level=level,
                payload=base64.b64decode(asked[_field(level)], validate=True),
                anchor=base64.b64decode(asked["anchor"], validate=True),
                time=datetime.fromisoformat(asked["time"]),
                nonce=bytes.fromhex(asked["nonce"]) if judged else None,
                policy=asked["policy"] if judged else None,
            )
        except (ValueError, KeyError, TypeError) as error:
            raise ProtocolError(f"not a question: {type(error).__name__}: {error}") from error


def _field(level: Subject) -> str:
    """What the payload's field is called."""
    return "evidence" if level is Subject.EVIDENCE else "document"


@dataclass(frozen=True, slots=True)
class Answer:
    """A verdict, and for a refusal the code of PROTOCOL.md section 3, if the verifier knows these codes."""

    verdict: Verdict
    code: str | None = None

    def encode(self, question_id: str) -> bytes:
        said = {"id": question_id, "verdict": self.verdict.value} | ({} if self.code is None else {"code": self.code})
        return json.dumps(said).encode() + b"\n"

    @classmethod
    def decode(cls, line: bytes, question_id: str) -> Answer:
        """The answer to that question. Raises ProtocolError for anything else."""
        try:
            said = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise ProtocolError("not JSON") from error
        if not isinstance(said, dict) or not {"id", "verdict"} <= said.keys() <= {"id", "verdict", "code"}:
            raise ProtocolError("not an object of id, verdict and perhaps code")
        if said["id"] != question_id:
            raise ProtocolError("the answer to another question")
        if said["verdict"] not in list(Verdict):
            raise ProtocolError("neither accepted nor refused")
        verdict, code = Verdict(said["verdict"]), said.get("code")
        if code is not None and (
            verdict is Verdict.ACCEPTED or not isinstance(code, str) or not re.fullmatch(r"[a-z0-9_]{1,64}", code)
        ):
            raise ProtocolError("a code that is none: small letters, digits and underscores, of a refusal")
        return cls(verdict, code)


def serve(judge: Callable[[Question], Answer]) -> None:
    """A verifier's side: answers what comes on standard input until its end. Raises ProtocolError."""
    while line := sys.stdin.buffer.readline(MAX_LINE + 1):
        question = Question.decode(line)
        sys.stdout.buffer.write(judge(question).encode(question.id))
        sys.stdout.buffer.flush()
