"""A prompt that waits, as files: the envelope that anybody may carry, the reply secret that stays here, and the answer.

Sealing takes a :class:`~attestation.keyrelease.KeyRelease`: there is no way to seal a prompt to a key that was not
judged.
"""

from __future__ import annotations

import json
import secrets
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final, Self

from attestation import strict_json
from attestation.cbor import Record
from attestation.envelope import MAGIC, PROMPT_RECORD, EnvelopeHeader, EnvelopePurpose, Terms
from attestation.envelope_records import Sealer
from attestation.errors import EvidenceError, StrongroomError
from attestation.keyrelease import KeyRelease
from attestation.reference import DIGEST_SIZE
from attestation.secret import Secret
from strongroom.session import RequestFailed
from vsockrpc.chat import ChatRequest
from vsockrpc.deferred import SECRET_SIZE, DeferredPrompt, ReplyKeys, envelope_digest, new_reply_secret
from vsockrpc.fields import MessageError
from vsockrpc.messages import (
    MAX_MESSAGE_SIZE,
    REQUEST_ID_SIZE,
    Answer,
    Delta,
    Done,
    Failure,
    MessageReader,
    Request,
    Start,
    decode_answer,
)
from vsockrpc.sealed import AnswerOpener, SealedError

MAX_REPLY: Final = 1024
"""Bytes of a reply's file."""
MAX_ANSWER: Final = 64 << 20
"""Bytes of an answer's file."""


class ReplyError(StrongroomError):
    """The file of a reply secret cannot be read as one (code ``malformed_reply``)."""

    exit_code = 2


@dataclass(frozen=True, slots=True)
class Reply:
    """What opens the answer to one envelope. Nobody else has it but whoever opens the envelope."""

    secret: Secret
    digest: bytes
    """SHA-384 of the envelope."""

    def encode(self) -> bytes:
        """JSON, for a file that only its owner reads."""
        body = {"v": 1, "envelope": self.digest.hex(), "secret": self.secret.expose().hex()}
        return json.dumps(body, indent=1).encode() + b"\n"

    @classmethod
    def decode(cls, data: bytes) -> Self:
        """Raises ReplyError."""
        try:
            value = strict_json.decode(data, code="malformed_reply")
            fields = frozenset(("v", "envelope", "secret"))
            record = Record(value, "reply", required=fields, code="malformed_reply")
            record.literal("v", 1)
            digest = bytes.fromhex(record.text("envelope", 2 * DIGEST_SIZE))
            secret = bytes.fromhex(record.text("secret", 2 * SECRET_SIZE))
        except (EvidenceError, ValueError) as error:
            raise ReplyError("malformed_reply", "not the file of a reply secret") from error
        if len(digest) != DIGEST_SIZE or len(secret) != SECRET_SIZE:
            raise ReplyError("malformed_reply", "not the file of a reply secret")
        return cls(Secret(secret), digest)


def seal_prompt(release: KeyRelease, chat: ChatRequest, *, data_key: Secret, wrapped: bytes) -> tuple[bytes, Reply]:
    """The envelope of ``chat``, and what will open the answer to it.

    ``data_key`` has 32 bytes and was made for this envelope; ``wrapped`` is the same as KMS encrypted it. Raises
    MessageError for a request that no enclave takes, however long it waits; EnvelopeError; ValueError for a verdict on
    a key of another purpose.
    """
    if release.purpose is not EnvelopePurpose.PROMPT:
        raise ValueError("the verdict is on a key for something else than prompts")
    rule = release.rule
    header = EnvelopeHeader(
        purpose=release.purpose,
        key=release.key,
        context=rule.context,
        version=rule.minimum_version,
        wrapped=wrapped,
        record=PROMPT_RECORD,
    )
    terms = Terms(release.purpose, release.models, release.configurations)
    prompt = DeferredPrompt(new_reply_secret(), Request(secrets.token_bytes(REQUEST_ID_SIZE), chat))
    body = prompt.encode(before=len(terms.encode()))
    DeferredPrompt.decode(body, limit=MAX_MESSAGE_SIZE)
    sealer = Sealer(header, terms, data_key)
    records = sealer.seal(body)
    envelope = b"".join([*records, sealer.finish()])
    return envelope, Reply(prompt.reply_secret, envelope_digest(envelope))


def open_answer(answer: bytes, reply: Reply) -> Iterator[Start | Delta | Done]:
    """What the enclave answered. Everything is opened before anything is given: an answer that was cut short is none.

    Raises SealedError when it is not the answer to that envelope, was tampered with or cut short; RequestFailed when
    the enclave says so.
    """
    if answer.startswith(MAGIC):
        raise SealedError("malformed", "this is the envelope, not the answer to it")
    reader = MessageReader()
    content = _opened(AnswerOpener(ReplyKeys(reply.secret, reply.digest)), answer)
    try:
        answers = [decode_answer(message) for message in reader.feed(content)]
    except MessageError as error:
        raise SealedError("malformed", error.message, expected=error.expected, got=error.got) from error
    _require_order(answers, reader.buffered)
    for each in answers:
        match each:
            case Failure():
                raise RequestFailed.of(each)
            case Start() | Delta() | Done():
                yield each


def _opened(opener: AnswerOpener, answer: bytes) -> bytes:
    try:
        content = opener.feed(answer)
    except SealedError as error:
        if opener.opened == 0 and error.code == "tampered_record":
            text = f"{error.message}, or not the answer to this reply file's envelope"
            raise SealedError(error.code, text, expected=error.expected, got=error.got) from error
        raise
    opener.finish()
    return content


def _require_order(answers: list[Answer], buffered: int) -> None:
    """Start, text, Done; a failure may end it anywhere."""
    kinds = [type(each) for each in answers]
    middle = kinds[1:-1]
    whole = kinds[:1] == [Start] and kinds[-1] in (Done, Failure) and all(kind is Delta for kind in middle)
    if buffered or not (whole or kinds == [Failure]):
        raise SealedError("malformed", "the answer's messages are out of order")
