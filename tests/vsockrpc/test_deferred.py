"""A prompt that waits: its body in the envelope, and the keys of the answer to it."""

from __future__ import annotations

import hashlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from attestation.envelope import PROMPT_RECORD
from attestation.secret import Secret
from vsockrpc.chat import ChatMessage, ChatRequest
from vsockrpc.deferred import DeferredPrompt, ReplyKeys, envelope_digest, new_reply_secret
from vsockrpc.fields import MessageError
from vsockrpc.messages import Request
from vsockrpc.sealed import AnswerOpener, AnswerRecords, SealedError

SECRET = Secret(bytes(range(32)))
LIMIT = 1 << 16


def prompt(text: str = "Why is the sky blue?") -> DeferredPrompt:
    return DeferredPrompt(SECRET, Request(bytes(16), ChatRequest((ChatMessage("user", text),))))


@given(st.text(max_size=9000), st.integers(0, 5000))
def test_what_goes_in_comes_out_and_only_its_bucket_shows(text: str, before: int) -> None:
    body = prompt(text).encode(before=before)
    assert DeferredPrompt.decode(body, limit=LIMIT) == prompt(text)
    buckets, rest = divmod(before + len(body), PROMPT_RECORD)
    assert rest == 0
    assert buckets & (buckets - 1) == 0


@pytest.mark.parametrize(
    ("body", "param"),
    [
        (b"", "body"),
        (bytes(31), "body"),
        (bytes(32), "body"),
        (prompt().encode(before=0)[:60], "body"),
        (prompt().encode(before=0) + b"\x01", "body"),
        (bytes(32) + (1 << 20).to_bytes(4, "big"), "message"),
        (bytes(36), "message"),
    ],
    ids=["empty", "half a secret", "no message", "cut", "more behind it", "too large", "an empty message"],
)
def test_what_is_no_body_is_a_typed_error(body: bytes, param: str) -> None:
    with pytest.raises(MessageError) as raised:
        DeferredPrompt.decode(body, limit=LIMIT)
    assert raised.value.param == param


@given(st.binary(max_size=200))
def test_any_bytes_are_a_prompt_or_a_typed_error(body: bytes) -> None:
    try:
        DeferredPrompt.decode(body, limit=LIMIT)
    except MessageError:
        return
    raise AssertionError("200 bytes cannot hold a whole request by chance")


def answer(keys: ReplyKeys, content: bytes = b"because") -> bytes:
    records = AnswerRecords(keys, record_size=64, bucket=1)
    records.write(content)
    records.end()
    return records.next_record()


def test_an_answer_opens_with_the_senders_copy_and_with_nothing_else() -> None:
    digest = envelope_digest(b"an envelope")
    assert digest == hashlib.sha384(b"an envelope").digest()
    sealed = answer(ReplyKeys(SECRET, digest))
    opener = AnswerOpener(ReplyKeys(SECRET, digest))
    assert opener.feed(sealed) == b"because"
    opener.finish()
    for other in (ReplyKeys(SECRET, envelope_digest(b"another")), ReplyKeys(new_reply_secret(), digest)):
        with pytest.raises(SealedError):
            AnswerOpener(other).feed(sealed)


def test_two_answers_to_one_envelope_share_no_key() -> None:
    keys = ReplyKeys(SECRET, envelope_digest(b"an envelope"))
    assert answer(keys)[:32] != answer(keys)[:32]
    assert keys.answer(bytes(32)) != keys.answer(b"\1" * 32)
