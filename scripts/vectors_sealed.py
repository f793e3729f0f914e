"""Makes tests/vectors/sealed/: the sealed channel and its messages, PROTOCOL.md sections 6 and 7.

Written from that page with hashes, a KDF and an AEAD alone, and with nothing of ``vsockrpc``: so the vectors are a
second implementation of the page, and ``tests/vsockrpc/test_sealed_vectors.py`` holds the two against each other.

Sealing draws random bytes, so the two sealed secrets below were made once, with the key that stands beside them. A
vector has ``expect``: ``accepted``, or the code of the failure. Byte strings are hexadecimal.
"""

from __future__ import annotations

import base64
import hashlib
import hmac
import json
from collections.abc import Iterator, Mapping, Sequence

import cbor2
from cryptography.hazmat.primitives.asymmetric.mlkem import MLKEM768PrivateKey
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

SUITE = "MLKEM768-X25519/HKDF-SHA256/AES-256-GCM"
SECRET = bytes(range(32))
ANSWER_SALT = bytes(range(32, 64))
MLKEM_SEED = hashlib.sha512(b"strongroom vectors: ML-KEM-768").digest()
X25519_PRIVATE = hashlib.sha256(b"strongroom vectors: X25519").digest()
REQUEST_RECORD = 4096
MORE, FINAL = 0, 1

SEALED = base64.b64decode(
    "8VDfPzjxyvb+0HfLeEQ/QF68IGItrQjjNxANlMkxuzLDWz8xWUMQZkzEdlNbH3F/XSHt2DVSy+T9p/taUjI+bf5VUkXylrOpGTafw9h4td4Oe0AU"
    "8wqU4YOJkrU2+heGegPgL6JLCTGeGAP2LcbGnBuyQBOoCT4EH8eCzA9dIBQ9sIU2GJpYNZcx3NTruUTOjaNEu22uQb5ScDK0SOUNB7y1FxM5+Zny"
    "s5U+rAodzdJvNHANDvLhB7gKkijCq/i20v4AoNvykz/c3lXyFs8svTaDgzIpdwchtrX6Myb0Ap5CCkfxsMQqWJP9ZqWgA+yDG80iUD8AcP3uLT0A"
    "pgcb3lxsEbMvRxDLVTmmPvAFc78m2yPbrmWTcWFltn9WPlSHYSXRaEr1mWk2tYthPqlbO03OMG17R+VrTUG/MduSF+9fBicdZ6sEQZlHnGqB7/n2"
    "Z4oI6Y7UODLjV9Cl4w/tRQZL2rIithTQbDlRgbIq2b9xKpY1zfNqmNcUcYxgm8jN7KVqcPtwfn1SNR6mfFr7ATmt6u25O2QkiMHaWKrqgR7mU/Qs"
    "J6lqYQUmVgIjACDC9WcB/Rv7tM3Ji7FoTGObpcpZw9iIcwbPkO0qwztiuSHuKUz3z4J8WcuO+kFqZMDlJH4b+I3htAAjmw3OU+Sp3Cclv9Xt1uOF"
    "OQ3Xao2MhdrbPtOGuzZj2olsFCFyUYc7GvXbcmnFMG6kz+vDTx9DL8vR2T82uOO48/7S4yXybVN9OX0vFyfRHZ4AUGqtyLygQSvmiexLLD/gITrO"
    "Q5xJ6cre5KThQWd48KpwQ12jFyYNBlLRwA7r474HBEtygQUcU0bOn/4qk8cvHPEZ7IRM9XbNTcxnWgLe9aPvCIjy7mFU9aYAmMBwUhY4dHmYB6+M"
    "0aSvCkrAph4niXR1KSFpWn6D5m6QtbUSnIh7Lmm1xwsZ7eBsCjjhNBUD1DqAWedggEL5d+73+pbte+7P0F3k5C0vMpPPjpCyKcoX+wVJtGAVSpYM"
    "79zUdZKWZum35l7yXhNErLfsMJQgiQv5aDixQU3+TBqU3uep7yiBvEJGz/o7hDsRtnjBwSBNaToASyoM+g9QpzY4vA64xMTxHTtyhWT/2RCgh1c8"
    "GUNU+9QhMqo9zMgt0FumZJNmGnwE8v/pWC7BF/EcqrZ/8YCjWRzsCuEqd1oL7dOtypQdOtHCUUhyDx5jp854Zar2U3E+VQhe2HV2XUxeeCPsZycL"
    "b0rQnCg7XjJboPRm6sZUfaGloQPTqzb8SZ0T+vOlVGmoQ5jrILL7YOediYX4iCMqGJFOKeVy/NvEdsBZG7kLzTFtuRxm0lJBwnUcbDhJ3k0kfPLi"
    "2OF7b+WJ1V3BuZ6OLg65WN4ZvRMrj9cMDdU0Uc6M1NXSGnafYQFg16wL1B6j9j2Yyb29MrAWXoFc5802fLbnBu3ZWG2KD1hmyyqMEPwden0vYvgB"
    "HGdI9O9XT586IL+Zl1N6iojRI2etXcAtJl1IY0dsuVSQKyKNfXl7xqF9K0uDsBMEzYIvKS4H9yB0D4TyG5BS1+h6Mr3lUXd6Mw6uYw=="
)
"""``SECRET``, sealed to the key and the commitment of these vectors."""
SEALED_SHORT = base64.b64decode(
    "VHqJ5UBbK0plfrP/HHfdCgalfXgczuWJsjBmd0sR4fW6N14A7dxo1WE5joD56zqrxzrTtwcruoQOOS7L94bkoUEVrt7+Ecz9qVI/b2nbZYWN5QeC"
    "KNW2vIqnz7/L8sjmxEXfwm86ykt3AeGwK+y1LRueHK8BFinDGKfKcV0r51F9ttAh9KJFoY5aKpzFTXu0/t6E8UnV64cQCm+D/9kst94g53OisJRc"
    "mvyK54xQPFdnK3SUtwUDBeqxB2zE7wgey8oeyFHi9J+B5If2pZ3vPddL9Rmethfd3Z1JCSjqj8NLcPPIt2K/TTOXM/uSTBgBF75VKqy43V21OKyq"
    "smmYA4eF8rr0rbTi2edNHk6x1Gn8L98vjUJ+E1yeGCnam1e8aLdjnwz24ki/V09fyGKZwqmmq2JGIQTTbIFaZihyW8+DwufD5/Nf55W1SJwoc/O7"
    "eBOrj+wFmI2fCzuZRb3CoJgQGWdWCh/jyls4ix4sRGQv+M9r0pGRX8tZffyYj/yl8ro5EWowx6CBrxq1nrMvDW58Urqh5YxzlZTk/4wKKShPJK/p"
    "CtTycVn5rmXEq7ury3AtkvBRvCjdUkQYREzgSfyNbmRSC+TV/wWViViFzP2WZC6j6/gED5WnHCO2djlmre5q2zW+oWMTzMuii7T7RGM/96bbFa6G"
    "G6sgCJ6Qrj97CIeWorYbEi5CbEtzkFc69g+apQ9NUXz8Kz5uWn70pFaDo208tjylHhWDttItWD0cWyDytIaqLOH5I2DdIgSBDr0MQt7IMJZhgd8J"
    "l3udBId/qbwp/uuwdVYcekQyXbJvBNd0qSr+alHkJDiAWYS6W/myxIgeiRocSV9Oq3O2LkotdZT+8XE8dLEm0ZTWUFIycK9baA6tOoF33WWaj4V2"
    "ehNCO8CQlDfvxXY8umGE1KTHkv47/wboC5FMxDBgMlz9wGsvQef2jBSnWKomux1Z98uL0AL6bGwN365FtC3nokoHPtb8/eqqjJ31GURseiwa6WjE"
    "26aZVKjOfAAZnpFtwMtT9lSNZYUfQKj3KgNGMen6hluNXH48udJIEstavcSvCOyET1+6flI883aDWjvJFDoTwXV1TOA4IghOeqg+EK4jPVs6HdNl"
    "slkgjxdHfynAGcbyYrVYc8JgSyOEDO7OpjUv4uoISs8DZDgaMgnbYYzd9i1r9AV0T3xPRALmCkJmL/0zPXHu+6chdVffJJl1DuQl8fO9zLnWmtnw"
    "raUarr9ZWFofsEhQsgaIZBOY+Hupeugfn77hRNri7fdmu/aukQOD8tWuonpGQBAzJp8MFOdyewhNi+n19WdAeaK21NfQRuELKO7UITfI8zoxgnUU"
    "GyweFkjtLDThHn7Q4SJkrHo8u2mAHZVXqcqRyJJIOckP5Mo1hbcnBWQ5JhmU9tGMbJ4aoEUoEbaH9mzV/WCoWtRLupxmsdR4lOdfXO+9z3d8AGG3"
    "J0GuKvkW5PICRbMIaa63VBQO8Xs2b2eQA0uhGRVwkcDBIwNe+WrPQFFYJw7RotreqckGyE0bybHhZbt6cDV9avnsC4B0Fwv266aw"
)
"""The first 31 bytes of it: an opening whose secret has the wrong size."""


# --- Section 6.1 ------------------------------------------------------------------------------------------------------


def channel_key() -> bytes:
    mlkem, x25519 = MLKEM768PrivateKey.from_seed_bytes(MLKEM_SEED), X25519PrivateKey.from_private_bytes(X25519_PRIVATE)
    return mlkem.public_key().public_bytes_raw() + x25519.public_key().public_bytes_raw()


def key_id(key: bytes) -> bytes:
    return hashlib.sha256(b"strongroom/1 channel key\x00" + key).digest()[:16]


def commitment(*, model: bytes = b"\x10" * 48) -> bytes:
    key = channel_key()
    return cbor2.dumps(
        {
            "v": 1,
            "suite": SUITE,
            "key": key,
            "key_id": key_id(key),
            "lifetime": 600,
            "boot_id": b"\x0b" * 16,
            "receipt_key": b"\x0e" * 32,
            "model": model,
            "configuration": b"\x11" * 48,
            "entropy": "host",
        },
        canonical=True,
    )


def info(encoded: bytes) -> bytes:
    parts = (b"strongroom/1 channel", SUITE.encode(), hashlib.sha384(encoded).digest(), key_id(channel_key()))
    return b"".join(len(part).to_bytes(2, "big") + part for part in parts)


def hkdf(secret: bytes, salt: bytes, label: str) -> bytes:
    """RFC 5869 with SHA-256, for 32 bytes: one block."""
    extracted = hmac.digest(salt, secret, "sha256")
    return hmac.digest(extracted, label.encode() + b"\x01", "sha256")


def request_key(sealed: bytes) -> bytes:
    return hkdf(SECRET, hashlib.sha256(sealed).digest(), "strongroom/1 request")


def answer_key(sealed: bytes, salt: bytes) -> bytes:
    return hkdf(SECRET, hashlib.sha256(sealed).digest() + salt, "strongroom/1 answer")


# --- Section 6.2 ------------------------------------------------------------------------------------------------------


def record(key: bytes, counter: int, flag: int, plaintext: bytes) -> bytes:
    header = bytes([flag]) + (len(plaintext) + 16).to_bytes(3, "big")
    nonce = counter.to_bytes(11, "big") + bytes([flag])
    return header + AESGCM(key).encrypt(nonce, plaintext, header)


def padded(content: bytes, size: int) -> bytes:
    return (len(content).to_bytes(2, "big") + content).ljust(size, b"\x00")


def records(key: bytes, contents: Sequence[bytes], size: int) -> list[bytes]:
    last = len(contents) - 1
    return [
        record(key, counter, FINAL if counter == last else MORE, padded(content, size))
        for counter, content in enumerate(contents)
    ]


def pieces(content: bytes, size: int, *, count: int) -> list[bytes]:
    """The content cut to records of ``size``, and empty ones to ``count``."""
    room = size - 2
    return [content[index * room : (index + 1) * room] for index in range(count)]


# --- Section 7 --------------------------------------------------------------------------------------------------------


def message(value: object) -> bytes:
    encoded = cbor2.dumps(value, canonical=True)
    return len(encoded).to_bytes(4, "big") + encoded


def framed(encoded: bytes) -> bytes:
    return len(encoded).to_bytes(4, "big") + encoded


ID = bytes(range(16))
CHAT = {
    "v": 1,
    "id": ID,
    "method": "chat",
    "body": {
        "model": "tiny",
        "messages": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Grüße, 世界"}],
        "max_tokens": 16,
        "temperature": 0.5,
        "top_p": 0.25,
        "top_k": 40,
        "min_p": 0.125,
        "typical_p": 0.75,
        "frequency_penalty": -0.5,
        "presence_penalty": 1.5,
        "repetition_penalty": 1.125,
        "seed": 7,
        "logit_bias": [[5, -100.0], [2147483647, 0.5]],
        "stop": ["\n\n", "END"],
        "top_logprobs": 2,
        "reasoning_tokens": 8,
        "truncation": "auto",
        "response_format": {"schema": '{"type": "object"}'},
    },
}
TOOL_TURN = {"role": "tool", "content": "Regen", "tool_call_id": "call_1"}
TOOLS = {
    "messages": [
        {"role": "user", "content": "Wetter in Köln?"},
        {
            "role": "assistant",
            "content": "",
            "tool_calls": [{"id": "call_1", "name": "weather", "arguments": '{"city": "Köln"}'}],
        },
        TOOL_TURN,
    ],
    "tools": [
        {"name": "weather", "description": "Tells it.", "parameters": '{"type": "object"}'},
        {"name": "time", "description": ""},
    ],
    "tool_choice": {"name": "time"},
    "parallel_tool_calls": False,
}
COMPLETE = {"v": 1, "id": ID, "method": "complete", "body": {"prompt": "Es war einmal", "echo": True, "max_tokens": 3}}
DESCRIBE = {"v": 1, "id": ID, "method": "describe", "body": {}}
DELTAS = {
    "reasoning": {"reasoning": "Hm."},
    "tool-call": {"tool_calls": [{"index": 0, "id": "call_1", "name": "weather", "arguments": ""}]},
    "arguments": {"tool_calls": [{"index": 127, "arguments": '{"city": '}]},
}
LOGPROBS = ((b"\xc3", -0.5, ((b"\xc3", -0.5), (b"e", -1.5))), (b"\xa9", 0.0, ()))
"""Of a character of two tokens, each with what was likeliest in its place."""
DONE = {
    "finish_reason": "stop",
    "usage": {"prompt_tokens": 12, "completion_tokens": 3, "cached_tokens": 8, "reasoning_tokens": 0},
    "dropped_messages": 0,
}
ANSWER = ({"start": {"model": "tiny"}}, {"delta": {"content": "Grüße"}}, {"done": DONE})


# --- The files --------------------------------------------------------------------------------------------------------


def sealed() -> Mapping[str, bytes]:
    """The files of the folder: the same run gives the same bytes."""
    files: dict[str, bytes] = {}
    for name, vector in (*_openings(), *_records(), *_directions(), *_messages()):
        assert f"{name}.json" not in files
        files[f"{name}.json"] = (json.dumps(vector, indent=1, ensure_ascii=False) + "\n").encode()
    return files


Vectors = Iterator[tuple[str, dict[str, object]]]


def _openings() -> Vectors:
    """A request's first bytes, and what both sides derive from them."""
    mine = commitment()
    key = {"mlkem_seed": MLKEM_SEED.hex(), "x25519_private": X25519_PRIVATE.hex(), "key": channel_key().hex()}

    def opening(expect: str, about: str, made: bytes, encoded: bytes = mine) -> dict[str, object]:
        return {
            "about": about,
            "expect": expect,
            **key,
            "commitment": encoded.hex(),
            "info": info(encoded).hex(),
            "opening": made.hex(),
        }

    good = b"\x01" + SEALED
    yield (
        "opening",
        opening("accepted", "the secret, and all that follows from it", good)
        | {
            "key_id": key_id(channel_key()).hex(),
            "commitment_digest": hashlib.sha384(mine).hexdigest(),
            "secret": SECRET.hex(),
            "salt": hashlib.sha256(SEALED).hexdigest(),
            "request_key": request_key(SEALED).hex(),
            "answer_salt": ANSWER_SALT.hex(),
            "answer_key": answer_key(SEALED, ANSWER_SALT).hex(),
            "replay_tag": hashlib.sha256(b"strongroom/1 replay\x00" + SECRET).digest()[:16].hex(),
        },
    )
    changed = good[:-1] + bytes([good[-1] ^ 1])
    yield "opening-changed", opening("not_for_this_key", "one bit of the tag", changed)
    changed = good[:1] + bytes([good[1] ^ 1]) + good[2:]
    yield "opening-changed-enc", opening("not_for_this_key", "one bit of the encapsulated key", changed)
    other = commitment(model=bytes(48))
    yield "opening-commitment", opening("not_for_this_key", "the same key under another commitment", good, other)
    yield "opening-short-secret", opening("malformed", "a secret of 31 bytes", b"\x01" + SEALED_SHORT)
    yield "opening-cut", opening("malformed", "the last byte is missing", good[:-1])
    yield "opening-version", opening("malformed", "version 2", b"\x02" + SEALED)


def _records() -> Vectors:
    """One direction's records, under a key of their own."""
    key, size = hashlib.sha256(b"strongroom vectors: records").digest(), 64
    contents = (b"one", b"", b"x" * (size - 2), b"four")
    one, two, three, four = records(key, contents, size)

    def stream(expect: str, about: str, *parts: bytes) -> dict[str, object]:
        return {"about": about, "expect": expect, "key": key.hex(), "stream": b"".join(parts).hex()}

    yield (
        "records",
        stream("accepted", "a short, an empty, a full and a final record", one, two, three, four)
        | {"contents": [content.hex() for content in contents]},
    )
    sizes = [record(key, 0, MORE, padded(b"", 2)), record(key, 1, FINAL, padded(b"z", 300))]
    yield (
        "records-sizes",
        stream("accepted", "records of different sizes, the smallest first", *sizes) | {"contents": ["", b"z".hex()]},
    )
    yield "records-none", stream("truncated", "no record")
    yield "records-cut", stream("truncated", "the last byte is missing", one, two, three, four[:-1])
    yield "records-without-final", stream("truncated", "the final record is missing", one, two, three)
    yield "records-order", stream("tampered_record", "two records swapped", two, one, three, four)
    yield "records-twice", stream("tampered_record", "a record twice", one, one, two, three, four)
    yield "records-missing", stream("tampered_record", "a record is missing", one, three, four)
    yield "records-changed", stream("tampered_record", "the last bit changed", one[:-1] + bytes([one[-1] ^ 1]))
    yield "records-final-flag", stream("tampered_record", "the final flag on the first record", b"\x01" + one[1:])
    yield "records-unknown-flag", stream("malformed_record", "flag 2", b"\x02" + one[1:])
    short, long = (b"\x00" + length.to_bytes(3, "big") for length in (17, 65_553))
    yield "records-short", stream("malformed_record", "a length of 17 bytes", short + bytes(17))
    yield "records-long", stream("malformed_record", "a length of 65,553 bytes", long)
    yield "records-after", stream("after_final", "a byte behind the final record", one, two, three, four, b"\x00")
    overlong = record(key, 0, FINAL, (63).to_bytes(2, "big") + bytes(62))
    yield "records-overlong", stream("malformed_record", "a content longer than its record", overlong)
    unclean = record(key, 0, FINAL, (1).to_bytes(2, "big") + b"a" + bytes(60) + b"\x01")
    yield "records-padding", stream("malformed_record", "padding that is not zero", unclean)


def _directions() -> Vectors:
    """A whole request and a whole answer."""
    opened = {"secret": SECRET.hex(), "sealed": SEALED.hex()}
    for name, content, count in (
        ("request", message(CHAT), 1),
        ("request-three", message(DESCRIBE) + bytes(range(256)) * 40, 4),
    ):
        made = b"".join(records(request_key(SEALED), pieces(content, REQUEST_RECORD, count=count), REQUEST_RECORD))
        yield (
            name,
            {
                "about": f"content of {len(content)} bytes in {count} records of 4,096",
                "expect": "accepted",
                **opened,
                "content": content.hex(),
                "body": (b"\x01" + SEALED + made).hex(),
            },
        )
    size, bucket = 64, 4
    content = b"".join(message(each) for each in ANSWER)
    count = -(-len(content) // (size - 2) // bucket) * bucket
    made = b"".join(records(answer_key(SEALED, ANSWER_SALT), pieces(content, size, count=count), size))
    yield (
        "answer",
        {
            "about": f"start, delta and done in {count} records of {size}: a multiple of {bucket}",
            "expect": "accepted",
            **opened,
            "answer_salt": ANSWER_SALT.hex(),
            "record_size": size,
            "bucket": bucket,
            "messages": ANSWER,
            "stream": (ANSWER_SALT + made).hex(),
        },
    )


def _messages() -> Vectors:
    """What is inside, with its length before it. ``kind`` says which side reads it."""

    def read(kind: str, expect: str, about: str, made: bytes) -> dict[str, object]:
        return {"about": about, "expect": expect, "kind": kind, "message": made.hex()}

    readable = CHAT | {"id": ID.hex()}
    yield "message-chat", read("request", "accepted", "every field", message(CHAT)) | {"value": readable}
    small = {"messages": [{"role": "user", "content": ""}]}
    smallest = {**CHAT, "body": small}
    yield (
        "message-chat-smallest",
        read("request", "accepted", "what is required", message(smallest)) | {"value": smallest | {"id": ID.hex()}},
    )
    yield (
        "message-describe",
        read("request", "accepted", "what is served?", message(DESCRIBE)) | {"value": DESCRIBE | {"id": ID.hex()}},
    )
    for name, about, asked in (
        ("tools", "a conversation with calls, and tools for more", {**CHAT, "body": TOOLS}),
        ("complete", "text that goes on", COMPLETE),
        ("count", "how many tokens?", {**CHAT, "method": "count", "body": TOOLS}),
    ):
        readable = asked | {"id": ID.hex()}
        yield f"message-{name}", read("request", "accepted", about, message(asked)) | {"value": readable}
    secret = message({**CHAT, "body": {**small, "cache_secret": SECRET}})
    yield (
        "message-cache-secret",
        read("request", "accepted", "what is computed is kept for this secret", secret)
        | {"value": {**CHAT, "id": ID.hex(), "body": {**small, "cache_secret": SECRET.hex()}}},
    )
    model = {"model": {"name": "tiny", "context": 2048, "manifest": b"\x10" * 48}}
    failure = {"code": "overloaded", "message": "the engine's queue is full", "expected": "<= 64", "got": None}
    error, counted = {"error": failure | {"retry_seconds": 2}}, {"counted": {"prompt_tokens": 12}}
    for name, value in (
        ("start", ANSWER[0]),
        ("delta", ANSWER[1]),
        *((f"delta-{name}", {"delta": delta}) for name, delta in DELTAS.items()),
        ("done", ANSWER[2]),
        ("error", error),
        ("counted", counted),
    ):
        yield f"message-{name}", read("answer", "accepted", name, message(value)) | {"value": value}
    likeliest = {"delta": {"content": "é", "logprobs": LOGPROBS}}
    logprobs = [[token.hex(), own, [[each.hex(), its] for each, its in top]] for token, own, top in LOGPROBS]
    yield (
        "message-delta-logprobs",
        read("answer", "accepted", "a character of two tokens, and what was likeliest", message(likeliest))
        | {"value": {"delta": {"content": "é", "logprobs": logprobs}}},
    )
    yield (
        "message-model",
        read("answer", "accepted", "model", message(model))
        | {"value": {"model": {"name": "tiny", "context": 2048, "manifest": ("10" * 48)}}},
    )

    def refused(name: str, about: str, made: bytes, kind: str = "request") -> tuple[str, dict[str, object]]:
        return f"message-bad-{name}", read(kind, "invalid_request", about, made)

    yield refused("array", "an array", message([1]))
    yield refused("integer-key", "a key that is no text", message({1: 1}))
    yield refused("break", "a break alone", framed(b"\xff"))
    yield refused("trailing", "a byte behind the map", framed(cbor2.dumps(DESCRIBE, canonical=True) + b"\x00"))
    yield refused("indefinite", "a map of indefinite length", framed(b"\xbf\x61v\x01\xff"))
    yield refused("duplicate-key", "a key twice", framed(b"\xa2\x61v\x01\x61v\x01"))
    yield refused("bignum", "a number of more than 64 bits", message({**DESCRIBE, "v": 1 << 64}))
    yield refused("tag", "a date", message({**DESCRIBE, "v": cbor2.CBORTag(1, 0)}))
    yield refused("cycle", "an array that holds itself", framed(b"\xa1\x61v\xd8\x1c\x81\xd8\x1d\x00"))
    yield refused("depth", "nine arrays inside one another", framed(b"\xa1\x61v" + b"\x81" * 9 + b"\x00"))
    yield refused("too-long", "a length of 4,194,305 bytes", (4 * 1024 * 1024 + 1).to_bytes(4, "big"))
    yield refused("version", "version 2", message({**DESCRIBE, "v": 2}))
    yield refused("version-true", "a version that is true", message({**DESCRIBE, "v": True}))
    yield refused("id-short", "an id of 15 bytes", message({**DESCRIBE, "id": bytes(15)}))
    yield refused("id-text", "an id that is a text", message({**DESCRIBE, "id": "0" * 16}))
    yield refused("method", "an unknown method", message({**DESCRIBE, "method": "load"}))
    yield refused("unknown-field", "a field of no meaning", message({**DESCRIBE, "debug": True}))
    yield refused("no-body", "no body", message({name: value for name, value in DESCRIBE.items() if name != "body"}))
    body = CHAT["body"]
    assert isinstance(body, dict)
    for name, about, changes in (
        ("no-messages", "an empty list of messages", {"messages": []}),
        ("role", "an unknown role", {"messages": [{"role": "root", "content": ""}]}),
        ("tool", "a tool's turn that answers no call", {"messages": [{"role": "tool", "content": ""}]}),
        ("turn", "a person's turn that answers a call", {"messages": [TOOL_TURN | {"role": "user"}]}),
        ("tool-name", "a tool whose name has a dot", {"tools": [{"name": "a.b", "description": ""}]}),
        ("tool-choice", "a choice without tools", {"tool_choice": "auto"}),
        ("schema", "a schema that is no text", {"response_format": {"schema": {}}}),
        ("repetition", "a repetition penalty of 0", {"repetition_penalty": 0}),
        ("bias", "a token with two biases", {"logit_bias": [[1, 1], [1, 2]]}),
        ("bias-token", "a token of 32 bits", {"logit_bias": [[1 << 31, 1]]}),
        ("secret", "a cache secret of 31 bytes", {"cache_secret": bytes(31)}),
        ("truncation", "an unknown truncation", {"truncation": "middle"}),
        ("parts", "content in parts", {"messages": [{"role": "user", "content": [{"type": "text", "text": "x"}]}]}),
        ("temperature", "a temperature above 2", {"temperature": 2.5}),
        ("temperature-nan", "a temperature that is no number", {"temperature": float("nan")}),
        ("top-k", "a top_k that is a float", {"top_k": 1.0}),
        ("max-tokens", "no tokens at all", {"max_tokens": 0}),
        ("seed", "a seed of 33 bits", {"seed": 1 << 32}),
        ("stop", "an empty stop string", {"stop": [""]}),
        ("stops", "seventeen stop strings", {"stop": ["x"] * 17}),
        ("parameter", "a parameter of no meaning", {"n": 2}),
    ):
        yield refused(name, about, message({**CHAT, "body": {**body, **changes}}))
    yield refused(
        "two-keys", "an answer of two kinds", message({"delta": {"content": "x"}, "start": {"model": "x"}}), "answer"
    )
    yield refused("answer", "an answer of no kind", message({"plaintext": "x"}), "answer")
    yield refused("delta-text", "a delta that is a text", message({"delta": "x"}), "answer")
    yield refused("delta-empty", "a delta of nothing", message({"delta": {"content": ""}}), "answer")
    yield refused("logprob", "a log probability above 0", message({"delta": {"logprobs": [[b"x", 0.5, []]]}}), "answer")
    begun = {"index": 0, "arguments": "", "id": "call_1"}
    yield refused("call", "a call that begins without a name", message({"delta": {"tool_calls": [begun]}}), "answer")
    yield refused("finish", "an unknown reason", message({"done": DONE | {"finish_reason": "tired"}}), "answer")
    yield refused("usage", "a usage without counts", message({"done": DONE | {"usage": {}}}), "answer")
