"""Makes tests/vectors/deferred/: prompts that wait and the answers to them, PROTOCOL.md section 6.5.

Written from that page with hashes, a KDF and an AEAD alone, and with nothing of ``vsockrpc``: so the vectors are a
second implementation of the page, and ``tests/vsockrpc/test_deferred_vectors.py`` holds the two against each other. The
envelope itself is that of ``scripts/vectors_envelope.py``, the records of an answer those of
``scripts/vectors_sealed.py``.

A vector named ``prompt-...`` is what an enclave opens, one named ``answer-...`` what the sender opens. ``expect`` is
``accepted``, or the code of the failure: ``malformed`` before the reply secret is known, where an enclave answers in
clear, ``invalid_request`` behind it, where it answers sealed. Byte strings are hexadecimal.
"""

from __future__ import annotations

import hashlib
import hmac
import json
from collections.abc import Iterator, Mapping, Sequence

from scripts import vectors_envelope as envelopes
from scripts import vectors_sealed as channel

REPLY_SECRET = hashlib.sha256(b"strongroom vectors: reply secret").digest()
ANSWER_SALT = bytes(range(64, 96))
RECORD = 4096
ANSWER_RECORD = 64
TERMS = envelopes.terms("prompt")


# --- Section 6.5 ------------------------------------------------------------------------------------------------------


def padded(body: bytes) -> bytes:
    """With zeros behind it, so that the content has 4,096 bytes times a power of two."""
    size = RECORD
    while size < len(TERMS) + len(body):
        size *= 2
    return body.ljust(size - len(TERMS), b"\x00")


def sealed_envelope(body: bytes, size: int = RECORD) -> bytes:
    before = envelopes.opening(envelopes.header("prompt", record=size))
    return before + b"".join(envelopes.records(before, TERMS + body))


def answer_key(envelope: bytes, secret: bytes = REPLY_SECRET, salt: bytes = ANSWER_SALT) -> bytes:
    """RFC 5869 with SHA-256, for 32 bytes: one block."""
    extracted = hmac.digest(hashlib.sha384(envelope).digest() + salt, secret, "sha256")
    return hmac.digest(extracted, b"strongroom/1 reply" + b"\x01", "sha256")


def request(text: str = "Grüße, 世界") -> bytes:
    body = channel.CHAT["body"]
    assert isinstance(body, dict)
    return channel.message({**channel.CHAT, "body": {**body, "messages": [{"role": "user", "content": text}]}})


def request_of(size: int) -> bytes:
    """A request whose reply secret, message and terms together have so many bytes."""
    short = len(TERMS) + len(REPLY_SECRET) + len(request("x" * 1024))
    made = request("x" * (1024 + size - short))
    assert len(TERMS) + len(REPLY_SECRET) + len(made) == size
    return made


# --- The files --------------------------------------------------------------------------------------------------------

Vector = dict[str, object]
Vectors = Iterator[tuple[str, Vector]]


def deferred() -> Mapping[str, bytes]:
    """The files of the folder: the same run gives the same bytes."""
    files: dict[str, bytes] = {}
    for name, vector in (*_prompts(), *_refused_prompts(), *_answers()):
        assert f"{name}.json" not in files
        files[f"{name}.json"] = (json.dumps(vector, indent=1, ensure_ascii=False) + "\n").encode()
    return files


def _prompt(expect: str, about: str, envelope: bytes, body: bytes) -> Vector:
    return {
        "about": about,
        "expect": expect,
        "requires": {"purpose": "prompt", "key": envelopes.ARN, "context": "production", "minimum_version": 3},
        "model": envelopes.MODEL.hex(),
        "configuration": envelopes.CONFIGURATION.hex(),
        "data_key": envelopes.DATA_KEY.hex(),
        "envelope": envelope.hex(),
        "body": body.hex(),
    }


def _prompts() -> Vectors:
    for name, about, message, size in (
        ("short", "one record, most of it zeros", request(), RECORD),
        ("full", "one record without zeros", request_of(RECORD), RECORD),
        ("one-byte-more", "a byte more than a record: two", request_of(RECORD + 1), 2 * RECORD),
        ("three-records", "a byte more than two records: four", request_of(2 * RECORD + 1), 4 * RECORD),
        ("describe", "the other method", channel.message(channel.DESCRIBE), RECORD),
    ):
        body = padded(REPLY_SECRET + message)
        assert len(TERMS) + len(body) == size
        yield (
            f"prompt-{name}",
            _prompt("accepted", about, sealed_envelope(body), body)
            | {
                "reply_secret": REPLY_SECRET.hex(),
                "message": message.hex(),
                "zeros": len(body) - len(REPLY_SECRET) - len(message),
            },
        )


def _refused_prompts() -> Vectors:
    """What only whoever has the data key can make."""
    whole = padded(REPLY_SECRET + request())
    for name, expect, about, body in (
        ("no-body", "malformed", "a body of no bytes", b""),
        ("half-a-secret", "malformed", "31 bytes, and no more", REPLY_SECRET[:31]),
        ("no-message", "invalid_request", "a reply secret alone", REPLY_SECRET),
        ("only-zeros", "invalid_request", "a reply secret and zeros: a message of no bytes", padded(REPLY_SECRET)),
        ("cut-message", "invalid_request", "a message that ends too early", REPLY_SECRET + request()[:-1]),
        ("zeros", "invalid_request", "the last of the zeros is none", whole[:-1] + b"\x01"),
        ("first-zero", "invalid_request", "the first of them is none", padded(REPLY_SECRET + request() + b"\x01")),
        ("two-messages", "invalid_request", "two requests", padded(REPLY_SECRET + 2 * request())),
    ):
        yield f"prompt-bad-{name}", _prompt(expect, about, sealed_envelope(body), body)
    about = "records of another size, before KMS is asked"
    yield "prompt-bad-records", _prompt("malformed", about, sealed_envelope(whole, size=2 * RECORD), whole)


def _answer(expect: str, about: str, envelope: bytes, secret: bytes, parts: Sequence[bytes]) -> Vector:
    return {
        "about": about,
        "expect": expect,
        "reply_secret": secret.hex(),
        "envelope_digest": hashlib.sha384(envelope).hexdigest(),
        "answer": b"".join(parts).hex(),
    }


def _answers() -> Vectors:
    envelope = sealed_envelope(padded(REPLY_SECRET + request()))
    key = answer_key(envelope)
    content = b"".join(map(channel.message, channel.ANSWER))
    sealed = channel.records(key, channel.pieces(content, ANSWER_RECORD, count=4), ANSWER_RECORD)
    whole = [ANSWER_SALT, *sealed]
    yield (
        "answer",
        _answer("accepted", "four records, to the envelope of prompt-short", envelope, REPLY_SECRET, whole)
        | {
            "answer_salt": ANSWER_SALT.hex(),
            "answer_key": key.hex(),
            "record": ANSWER_RECORD,
            "content": content.hex(),
        },
    )
    other_salt = bytes([ANSWER_SALT[0] ^ 1]) + ANSWER_SALT[1:]
    changed = [*whole[:-1], whole[-1][:-1] + bytes([whole[-1][-1] ^ 1])]
    for name, expect, about, digested, secret, parts in (
        ("other-envelope", "tampered_record", "to another envelope", envelope + b"x", REPLY_SECRET, whole),
        ("other-secret", "tampered_record", "another reply secret", envelope, bytes(32), whole),
        ("other-salt", "tampered_record", "another salt", envelope, REPLY_SECRET, [other_salt, *sealed]),
        ("changed", "tampered_record", "the last bit", envelope, REPLY_SECRET, changed),
        ("order", "tampered_record", "two records swapped", envelope, REPLY_SECRET, [whole[0], whole[2], whole[1]]),
        ("cut", "truncated", "without the final record", envelope, REPLY_SECRET, whole[:-1]),
        ("salt-only", "truncated", "the salt alone", envelope, REPLY_SECRET, whole[:1]),
        ("half-a-salt", "truncated", "31 bytes of it", envelope, REPLY_SECRET, [ANSWER_SALT[:31]]),
        ("after", "after_final", "a byte behind the final record", envelope, REPLY_SECRET, [*whole, b"\x00"]),
    ):
        yield f"answer-bad-{name}", _answer(expect, about, digested, secret, parts)
