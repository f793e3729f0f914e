"""A sealed answer as the client's session reads it: salt, records, messages."""

from __future__ import annotations

from attestation.secret import Secret
from vsockrpc.fields import MessageError
from vsockrpc.messages import (
    Alternative,
    Counted,
    Delta,
    Done,
    Failure,
    MessageReader,
    Start,
    TokenLogprob,
    ToolCallDelta,
    Usage,
    decode_answer,
)
from vsockrpc.sealed import AnswerOpener, AnswerRecords, ExchangeKeys, SealedError

KEYS = ExchangeKeys(Secret(bytes(32)), bytes(1168))


def one_input(data: bytes) -> None:
    """The first byte chooses what the rest is: bytes of anybody on the way, or what an enclave seals."""
    kind, rest = data[:1], data[1:]
    opener, messages = AnswerOpener(KEYS), MessageReader()
    try:
        for start in range(0, len(rest), 97):
            for message in messages.feed(opener.feed(rest[start : start + 97])):
                decode_answer(message)
        opener.finish()
    except (SealedError, MessageError):
        pass
    if kind == b"e":
        whole = b"".join(sealed(rest))
        assert received(whole) == received(whole, size=97)


def sealed(content: bytes) -> list[bytes]:
    """An answer of these bytes."""
    records = AnswerRecords(KEYS, record_size=64, bucket=4)
    records.write(content)
    records.end()
    out = []
    while not records.finished:
        out.append(records.next_record())
    return out


def received(data: bytes, *, size: int = 1 << 20) -> list[object]:
    """What the session makes of it, in pieces of this size: answers, and the code of what ended them."""
    opener, messages = AnswerOpener(KEYS), MessageReader()
    found: list[object] = []
    try:
        for start in range(0, len(data), size):
            for message in messages.feed(opener.feed(data[start : start + size])):
                found.append(decode_answer(message))
        opener.finish()
    except (SealedError, MessageError) as error:
        found.append(error.code)
    return found


def seeds() -> list[bytes]:
    answers = (
        Start("m"),
        Delta("text", "thought", logprobs=(TokenLogprob(b"text", -1.5, (Alternative(b"x", -0.5),)),)),
        Delta(tool_calls=(ToolCallDelta(0, "", "call_1", "f"), ToolCallDelta(0, "{}"))),
        Done("stop", Usage(1, 2, 1, 1), 3),
        Counted(5),
        Failure("code", "text", "1", None, 7),
    )
    contents = [b"".join(answer.encode() for answer in answers), *(answer.encode() for answer in answers)]
    return [*(b"e" + content for content in contents), *(b"w" + b"".join(sealed(content)) for content in contents)]
