"""The sealed channel and its messages against tests/vectors/sealed, which ``scripts/vectors_sealed.py`` makes from
PROTOCOL.md without ``vsockrpc``: two implementations of one page."""

from __future__ import annotations

import json
import runpy
import secrets
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from attestation.commitment import Commitment
from attestation.secret import Secret
from vsockrpc import sealed
from vsockrpc.fields import MessageError
from vsockrpc.messages import MessageReader, Request, decode_answer, encode_message
from vsockrpc.sealed import (
    OPENING_SIZE,
    AnswerOpener,
    ChannelKey,
    ExchangeKeys,
    RecordOpener,
    SealedError,
    split_opening,
)

REPOSITORY = Path(__file__).resolve().parents[2]
VECTORS = REPOSITORY / "tests" / "vectors" / "sealed"


def vectors(prefix: str) -> pytest.MarkDecorator:
    """Those whose name begins with ``prefix``, as parameters."""
    paths = sorted(VECTORS.glob(f"{prefix}*.json"))
    assert paths
    return pytest.mark.parametrize("vector", [pytest.param(load(path.stem), id=path.stem) for path in paths])


def load(name: str) -> dict[str, Any]:
    vector = json.loads((VECTORS / f"{name}.json").read_text())
    assert isinstance(vector, dict)
    return vector


def octets(vector: dict[str, Any], name: str) -> bytes:
    return bytes.fromhex(vector[name])


@pytest.fixture
def channel_key(monkeypatch: pytest.MonkeyPatch) -> ChannelKey:
    """The key of the vectors, where a boot would draw one."""
    vector = load("opening")
    drawn = {len(seed): seed for seed in (octets(vector, "mlkem_seed"), octets(vector, "x25519_private"))}
    monkeypatch.setattr(sealed, "secrets", SimpleNamespace(token_bytes=drawn.__getitem__))
    return ChannelKey()


# --- Openings -----------------------------------------------------------------------------------------------------


def test_the_keys_public_half_and_its_name(channel_key: ChannelKey) -> None:
    vector = load("opening")
    commitment = Commitment.decode(octets(vector, "commitment"))
    assert channel_key.public_bytes == octets(vector, "key") == commitment.key
    assert commitment.key_id == octets(vector, "key_id")
    assert commitment.digest() == octets(vector, "commitment_digest")
    assert commitment.encode() == octets(vector, "commitment")


@vectors("opening")
def test_opening(vector: dict[str, Any], channel_key: ChannelKey) -> None:
    commitment = Commitment.decode(octets(vector, "commitment"))
    assert sealed._info(commitment) == octets(vector, "info")
    if vector["expect"] != "accepted":
        with pytest.raises(SealedError) as caught:
            channel_key.open(split_opening(octets(vector, "opening")), commitment)
        assert caught.value.code == vector["expect"]
        return
    keys = channel_key.open(split_opening(octets(vector, "opening")), commitment)
    assert keys.request.expose() == octets(vector, "request_key")
    assert keys.answer(octets(vector, "answer_salt")).expose() == octets(vector, "answer_key")
    assert keys.replay_tag == octets(vector, "replay_tag")


# --- Records and directions ---------------------------------------------------------------------------------------


@vectors("records")
@pytest.mark.parametrize("step", [1, 7, 1 << 20])
def test_records(vector: dict[str, Any], step: int) -> None:
    opener, stream = RecordOpener(Secret(octets(vector, "key"))), octets(vector, "stream")

    def opened() -> bytes:
        content = b"".join(opener.feed(stream[start : start + step]) for start in range(0, len(stream), step))
        opener.finish()
        return content

    if vector["expect"] == "accepted":
        assert opened() == b"".join(bytes.fromhex(content) for content in vector["contents"])
    else:
        with pytest.raises(SealedError) as caught:
            opened()
        assert caught.value.code == vector["expect"]


def keys_of(vector: dict[str, Any]) -> ExchangeKeys:
    return ExchangeKeys(Secret(octets(vector, "secret")), octets(vector, "sealed"))


@vectors("request")
def test_request(vector: dict[str, Any]) -> None:
    keys, body = keys_of(vector), octets(vector, "body")
    assert split_opening(body[:OPENING_SIZE]) == octets(vector, "sealed")
    opener = RecordOpener(keys.request)
    assert opener.feed(body[OPENING_SIZE:]) == octets(vector, "content")
    opener.finish()
    # And the other way round: the records are those that a client makes.
    assert b"".join(sealed._seal_whole(keys.request, octets(vector, "content"))) == body[OPENING_SIZE:]


def test_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    vector = load("answer")
    keys, stream = keys_of(vector), octets(vector, "stream")
    opener = AnswerOpener(keys)
    content = opener.feed(stream)
    opener.finish()
    read = list(MessageReader().feed(content))
    assert read == vector["messages"]
    assert b"".join(decode_answer(message).encode() for message in read) == content

    monkeypatch.setattr(secrets, "token_bytes", lambda size: octets(vector, "answer_salt"))
    answer = sealed.AnswerRecords(keys, record_size=vector["record_size"], bucket=vector["bucket"])
    answer.write(content)
    answer.end()
    made = b""
    while not answer.finished:
        made += answer.next_record()
    assert made == stream


# --- Messages -----------------------------------------------------------------------------------------------------


@vectors("message")
def test_message(vector: dict[str, Any]) -> None:
    data = octets(vector, "message")

    def read() -> Any:
        reader = MessageReader()
        [message] = reader.feed(data)
        assert reader.buffered == 0
        return Request.decode(message) if vector["kind"] == "request" else decode_answer(message)

    if vector["expect"] != "accepted":
        with pytest.raises(MessageError) as caught:
            read()
        assert caught.value.code == vector["expect"]
        return
    assert read() == _decoded(vector["value"], vector["kind"])
    if vector["kind"] == "answer":
        assert read().encode() == data  # deterministic, so there is one encoding
    else:
        assert Request.decode(next(MessageReader().feed(read().encode()))) == read()


def _decoded(value: dict[str, Any], kind: str) -> Any:
    """The same message from its JSON, in which byte strings are hexadecimal."""
    if kind == "request":
        body = value["body"]
        if "cache_secret" in body:
            body = body | {"cache_secret": bytes.fromhex(body["cache_secret"])}
        return Request.decode(value | {"id": bytes.fromhex(value["id"]), "body": body})
    if "model" in value:
        value = {"model": value["model"] | {"manifest": bytes.fromhex(value["model"]["manifest"])}}
    if "logprobs" in value.get("delta", {}):
        logprobs = [
            [bytes.fromhex(token), own, [[bytes.fromhex(each), its] for each, its in top]]
            for token, own, top in value["delta"]["logprobs"]
        ]
        value = {"delta": value["delta"] | {"logprobs": logprobs}}
    assert encode_message(value)
    return decode_answer(value)


def test_the_vectors_are_those_that_the_script_makes() -> None:
    made = runpy.run_path(str(REPOSITORY / "scripts" / "vectors_sealed.py"))["sealed"]()
    assert {path.name: path.read_bytes() for path in VECTORS.iterdir()} == dict(made)
