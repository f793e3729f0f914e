"""This project's verifier, speaking the command protocol: ``python -m conformance.strongroom``."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from tempfile import TemporaryDirectory

from attestation.chain import AWS_NITRO_G1_SHA256, Anchor, Trust
from attestation.errors import AppraisalError, EvidenceError
from attestation.policy import AppraisalPolicy
from attestation.verifier import authenticate, verify, verify_document
from conformance.protocol import Answer, Question, Verdict, serve
from conformance.vectors import Subject


def judge(question: Question) -> Answer:
    """An error other than a refusal, such as a policy that cannot be read, is not an answer: it ends the process."""
    try:
        if question.nonce is None or question.policy is None:
            authenticate(question.payload, anchor=_anchor(question.anchor), at=question.time)
        else:
            judged = verify if question.level is Subject.EVIDENCE else verify_document
            policy = _policy(question.policy, question.anchor)
            judged(question.payload, policy=policy, nonce=question.nonce, at=question.time)
    except (EvidenceError, AppraisalError) as error:
        return Answer(Verdict.REFUSED, error.code)
    return Answer(Verdict.ACCEPTED)


def _anchor(der: bytes) -> Anchor:
    is_aws = hashlib.sha256(der).hexdigest() == AWS_NITRO_G1_SHA256
    return Anchor(Trust.AWS_NITRO_G1 if is_aws else Trust.EMULATED, der)


def _policy(said: Mapping[str, object], root: bytes) -> AppraisalPolicy:
    anchor = said["anchor"]
    assert isinstance(anchor, dict)
    with TemporaryDirectory() as folder:
        Path(folder, "root.der").write_bytes(root)
        return AppraisalPolicy.parse(_toml({**said, "anchor": {**anchor, "root": "root.der"}}), Path(folder))


def _toml(table: Mapping[str, object]) -> str:
    return "".join(f"{name} = {_value(value)}\n" for name, value in table.items())


def _value(value: object) -> str:
    """The texts, integers and booleans of a policy are written alike in both languages, tables and arrays nearly so."""
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{name} = {_value(inner)}" for name, inner in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(map(_value, value)) + "]"
    return json.dumps(value)


if __name__ == "__main__":
    serve(judge)
