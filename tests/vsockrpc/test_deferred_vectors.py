"""Prompts that wait against tests/vectors/deferred, which ``scripts/vectors_deferred.py`` makes from PROTOCOL.md
without ``vsockrpc``: two implementations of one page."""

from __future__ import annotations

import json
import runpy
from pathlib import Path
from typing import Any

import pytest

from attestation.envelope import PROMPT_RECORD, EnvelopeHeader, EnvelopePurpose, require_header
from attestation.envelope_records import Opener
from attestation.keypolicy.document import KeyArn
from attestation.secret import Secret
from vsockrpc.deferred import DeferredPrompt, ReplyKeys, envelope_digest, reply_secret_of, request_of
from vsockrpc.fields import MessageError
from vsockrpc.messages import MAX_MESSAGE_SIZE, MessageReader, decode_answer
from vsockrpc.sealed import AnswerOpener, SealedError

REPOSITORY = Path(__file__).resolve().parents[2]
VECTORS = REPOSITORY / "tests" / "vectors" / "deferred"


def load(name: str) -> dict[str, Any]:
    vector = json.loads((VECTORS / f"{name}.json").read_text())
    assert isinstance(vector, dict)
    return vector


def vectors(prefix: str) -> pytest.MarkDecorator:
    """Those whose name begins with ``prefix``, as parameters."""
    names = sorted(path.stem for path in VECTORS.glob(f"{prefix}*.json"))
    assert names
    return pytest.mark.parametrize("vector", [pytest.param(load(name), id=name) for name in names])


def header_of(vector: dict[str, Any]) -> tuple[EnvelopeHeader, bytes]:
    """The header of a vector's envelope, which it is configured to, and the records."""
    envelope, required = bytes.fromhex(vector["envelope"]), vector["requires"]
    header, at = EnvelopeHeader.split(envelope)
    require_header(
        header,
        purpose=EnvelopePurpose(required["purpose"]),
        key=KeyArn.parse(required["key"]),
        context=required["context"],
        minimum_version=required["minimum_version"],
    )
    return header, envelope[at:]


@vectors("prompt")
def test_prompt(vector: dict[str, Any]) -> None:
    header, records = header_of(vector)
    if header.record != PROMPT_RECORD:
        assert vector["expect"] == "malformed"  # tests/enclave/kms/test_release.py: refused, and KMS is not asked
        return
    model, configuration = bytes.fromhex(vector["model"]), bytes.fromhex(vector["configuration"])
    opener = Opener(header, Secret(bytes.fromhex(vector["data_key"])), model=model, configuration=configuration)
    body = b"".join(opener.feed(records)) + opener.finish()
    assert body.hex() == vector["body"]
    if vector["expect"] == "malformed":
        with pytest.raises(MessageError, match="no reply secret"):
            reply_secret_of(body)
        return
    secret = reply_secret_of(body)
    if vector["expect"] != "accepted":
        with pytest.raises(MessageError) as caught:
            request_of(body, limit=MAX_MESSAGE_SIZE)
        assert caught.value.code == vector["expect"]
        return
    request = request_of(body, limit=MAX_MESSAGE_SIZE)
    assert secret.expose().hex() == vector["reply_secret"]
    assert request.encode().hex() == vector["message"]
    assert secret.expose() + request.encode() + bytes(vector["zeros"]) == body
    tags = 16 * -(-len(records) // (PROMPT_RECORD + 16))
    assert DeferredPrompt(secret, request).encode(before=len(records) - tags - len(body)) == body


def test_the_answer_is_to_the_envelope_of_a_vector() -> None:
    envelope = bytes.fromhex(load("prompt-short")["envelope"])
    assert envelope_digest(envelope).hex() == load("answer")["envelope_digest"]


@vectors("answer")
@pytest.mark.parametrize("step", [1, 50, 1 << 16])
def test_answer(vector: dict[str, Any], step: int) -> None:
    keys = ReplyKeys(Secret(bytes.fromhex(vector["reply_secret"])), bytes.fromhex(vector["envelope_digest"]))
    answer, opener = bytes.fromhex(vector["answer"]), AnswerOpener(keys)

    def opened() -> bytes:
        content = b"".join(opener.feed(answer[start : start + step]) for start in range(0, len(answer), step))
        opener.finish()
        return content

    if vector["expect"] != "accepted":
        with pytest.raises(SealedError) as caught:
            opened()
        assert caught.value.code == vector["expect"]
        return
    assert keys.answer(bytes.fromhex(vector["answer_salt"])).expose().hex() == vector["answer_key"]
    content = opened()
    assert content.hex() == vector["content"]
    assert [type(decode_answer(message)).__name__ for message in MessageReader().feed(content)] == [
        "Start",
        "Delta",
        "Done",
    ]


def test_the_vectors_are_those_that_the_script_makes() -> None:
    made = runpy.run_path(str(REPOSITORY / "scripts" / "vectors_deferred.py"))["deferred"]()
    assert {path.name: path.read_bytes() for path in VECTORS.iterdir()} == dict(made)
