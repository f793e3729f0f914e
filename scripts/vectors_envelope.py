"""Makes tests/vectors/envelope/: encrypted models and waiting prompts, PROTOCOL.md section 6.4.

Written from that page with hashes and an AEAD alone, and with nothing of ``attestation``: a second implementation of
the page, which ``tests/attestation/test_envelope_vectors.py`` holds against the first.

A vector has what an enclave is configured to (``requires``), what it is (``model`` and ``configuration``), the data key
that KMS releases, and ``expect``: ``accepted``, or the code of the failure. Byte strings are hexadecimal.
"""

from __future__ import annotations

import hashlib
import hmac
import json
from collections.abc import Iterator, Mapping, Sequence

import cbor2
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

MAGIC = b"strongroom/1 envelope\n"
ARN = "arn:aws:kms:us-east-1:111122223333:key/1234abcd-12ab-34cd-56ef-1234567890ab"
OTHER_ARN = "arn:aws:kms:us-east-1:111122223333:key/0987dcba-09fe-87dc-65ba-ab0987654321"
DATA_KEY = bytes(range(32))
SALT = bytes(range(32, 64))
WRAPPED = hashlib.sha512(b"strongroom vectors: wrapped").digest()
MODEL = hashlib.sha384(b"strongroom vectors: model").digest()
CONFIGURATION = hashlib.sha384(b"strongroom vectors: configuration").digest()
RECORD = 4096
MORE, FINAL = 0, 1


# --- The header and the terms -----------------------------------------------------------------------------------------


def with_length(encoded: bytes) -> bytes:
    return len(encoded).to_bytes(4, "big") + encoded


def context(purpose: str = "model", name: str = "production", version: int = 3) -> dict[str, str]:
    return {
        "strongroom": "1",
        "strongroom:purpose": purpose,
        "strongroom:context": name,
        "strongroom:version": str(version),
    }


def header(purpose: str = "model", **changes: object) -> dict[str, object]:
    return {
        "v": 1,
        "purpose": purpose,
        "key": ARN,
        "context": context(purpose),
        "wrapped": WRAPPED,
        "version": 3,
        "record": RECORD,
        "salt": SALT,
        **changes,
    }


def opening(value: Mapping[str, object]) -> bytes:
    return MAGIC + with_length(cbor2.dumps(value, canonical=True))


def terms(purpose: str = "model", **changes: object) -> bytes:
    value = {"v": 1, "purpose": purpose, "models": [MODEL], "configurations": [CONFIGURATION], **changes}
    return with_length(cbor2.dumps(value, canonical=True))


# --- Records ----------------------------------------------------------------------------------------------------------


def record_key(before: bytes, salt: bytes = SALT) -> bytes:
    """RFC 5869 with SHA-256, for 32 bytes: one block."""
    info = b"strongroom/1 envelope" + hashlib.sha384(before).digest()
    return hmac.digest(hmac.digest(salt, DATA_KEY, "sha256"), info + b"\x01", "sha256")


def record(before: bytes, index: int, flag: int, plaintext: bytes, salt: bytes = SALT) -> bytes:
    nonce = index.to_bytes(11, "big") + bytes([flag])
    return AESGCM(record_key(before, salt)).encrypt(nonce, plaintext, hashlib.sha384(before).digest())


def records(before: bytes, content: bytes, salt: bytes = SALT) -> list[bytes]:
    pieces = [content[start : start + RECORD] for start in range(0, len(content), RECORD)]
    last = len(pieces) - 1
    return [record(before, index, FINAL if index == last else MORE, piece, salt) for index, piece in enumerate(pieces)]


# --- The files --------------------------------------------------------------------------------------------------------

Vector = dict[str, object]
Vectors = Iterator[tuple[str, Vector]]


def envelope() -> Mapping[str, bytes]:
    """The files of the folder: the same run gives the same bytes."""
    files: dict[str, bytes] = {}
    for name, vector in (*_whole(), *_headers(), *_required(), *_terms(), *_records()):
        assert f"{name}.json" not in files
        files[f"{name}.json"] = (json.dumps(vector, indent=1, ensure_ascii=False) + "\n").encode()
    return files


def _vector(expect: str, about: str, parts: Sequence[bytes], purpose: str = "model", **changes: object) -> Vector:
    return {
        "about": about,
        "expect": expect,
        "requires": {"purpose": purpose, "key": ARN, "context": "production", "minimum_version": 3},
        "model": MODEL.hex(),
        "configuration": CONFIGURATION.hex(),
        "data_key": DATA_KEY.hex(),
        "envelope": b"".join(parts).hex(),
        **changes,
    }


def _body(size: int) -> bytes:
    return (bytes(range(256)) * (size // 256 + 1))[:size]


def _accepted(about: str, purpose: str, inside: bytes, body: bytes) -> Vector:
    before = opening(header(purpose))
    return _vector("accepted", about, [before, *records(before, inside + body)], purpose) | {
        "aad": hashlib.sha384(before).hexdigest(),
        "record_key": record_key(before).hex(),
        "body": body.hex(),
    }


def _whole() -> Vectors:
    mine = terms()
    yield "model", _accepted("two full records and a short one", "model", mine, _body(2 * RECORD + 100))
    full = _body(2 * RECORD - len(mine))
    yield "full-last-record", _accepted("two records, both of them full", "model", mine, full)
    yield "one-byte-more", _accepted("the last record has one byte", "model", mine, full + b"x")
    yield "empty", _accepted("a body of no bytes", "model", mine, b"")
    several = terms("prompt", models=[bytes(48), MODEL], configurations=[CONFIGURATION, bytes(48)])
    yield "prompt", _accepted("two models, two configurations", "prompt", several, _body(RECORD - len(several)))
    most = terms("prompt", models=[bytes(48)] * 78 + [MODEL])
    yield "longest-terms", _accepted("as many digests as fit: 79 models, a configuration", "prompt", most, b"body")


def _headers() -> Vectors:
    """Envelopes without records: what is wrong shows before any would be opened."""

    def refused(name: str, about: str, made: bytes, expect: str = "malformed_envelope") -> tuple[str, Vector]:
        return f"header-{name}", _vector(expect, about, [made])

    good = opening(header())
    encoded = good[len(MAGIC) + 4 :]
    yield refused("magic", "the first bytes of something else", b"age-encryption.org/v1\n" + good[len(MAGIC) :])
    yield refused("none", "no bytes", b"", "truncated_envelope")
    yield refused("cut-in-magic", "cut within the first bytes", good[:10], "truncated_envelope")
    yield refused("cut-in-length", "cut within the length", good[: len(MAGIC) + 3], "truncated_envelope")
    yield refused("cut", "the last byte of the header is missing", good[:-1], "truncated_envelope")
    yield refused("length-0", "a header of no bytes", MAGIC + bytes(4))
    yield refused("length-16385", "a header that is too long", MAGIC + (16_385).to_bytes(4, "big") + bytes(16_385))
    yield refused("trailing", "a byte behind the map", MAGIC + with_length(encoded + b"\x00"))
    yield refused("indefinite", "a map of indefinite length", MAGIC + with_length(b"\xbf" + encoded[1:] + b"\xff"))
    yield refused("order", "keys in the order of no encoding", MAGIC + with_length(cbor2.dumps(header())))
    for name, about, changes in (
        ("version-2", "version 2 of this format", {"v": 2}),
        ("purpose", "an unknown purpose", {"purpose": "adapter", "context": context("adapter")}),
        ("alias", "an alias in place of a key's ARN", {"key": "arn:aws:kms:us-east-1:111122223333:alias/model"}),
        ("key-id", "a key id in place of its ARN", {"key": "1234abcd-12ab-34cd-56ef-1234567890ab"}),
        ("context-purpose", "a context of another purpose", {"context": context("prompt")}),
        ("context-version", "a context of another version", {"context": context(version=4)}),
        ("context-more", "a context with one more pair", {"context": {**context(), "more": "x"}}),
        ("context-less", "a context without a name", {"context": {"strongroom": "1"}}),
        ("context-name", "a name with a capital letter", {"context": context(name="Production")}),
        ("context-long", "a name of 65 characters", {"context": context(name="x" * 65)}),
        ("context-bytes", "a name that is a byte string", {"context": {**context(), "strongroom:context": b"x"}}),
        ("wrapped-0", "no wrapped key", {"wrapped": b""}),
        ("wrapped-6145", "a wrapped key that is too long", {"wrapped": bytes(6_145)}),
        ("count-0", "version 0", {"version": 0, "context": context(version=0)}),
        ("count-2-32", "version 2^32", {"version": 2**32, "context": context(version=2**32)}),
        ("record-4095", "records that are too small", {"record": 4_095}),
        ("record-4194305", "records that are too large", {"record": 4_194_305}),
        ("salt-31", "a salt of 31 bytes", {"salt": bytes(31)}),
        ("unknown-field", "a field of no meaning", {"model": MODEL}),
    ):
        yield refused(name, about, opening(header(**changes)))
    without = {name: value for name, value in header().items() if name != "salt"}
    yield refused("missing-field", "no salt", opening(without))


def _required() -> Vectors:
    """A good envelope, and an enclave that is configured to another."""
    before = opening(header())
    parts = [before, *records(before, terms() + b"body")]
    for expect, changes in (
        ("wrong_purpose", {"purpose": "prompt"}),
        ("wrong_key", {"key": OTHER_ARN}),
        ("wrong_context", {"context": "staging"}),
        ("rolled_back", {"minimum_version": 4}),
    ):
        vector = _vector(expect, f"configured to {changes}", parts)
        required = vector["requires"]
        assert isinstance(required, dict)
        yield f"required-{expect.replace('_', '-')}", vector | {"requires": required | changes}
    yield "other-model", _vector("wrong_model", "another model runs", parts, model=bytes(48).hex())
    yield (
        "other-configuration",
        _vector("wrong_configuration", "another configuration is measured", parts, configuration=bytes(48).hex()),
    )
    yield "other-data-key", _vector("tampered_record", "another data key", parts, data_key=bytes(32).hex())
    yield "short-data-key", _vector("malformed_envelope", "31 bytes of data key", parts, data_key=DATA_KEY[1:].hex())


def _terms() -> Vectors:
    """Terms that only whoever has the data key can make."""

    def refused(name: str, about: str, content: bytes, purpose: str = "model") -> tuple[str, Vector]:
        before = opening(header(purpose))
        expect = "wrong_purpose" if name == "purpose" else "malformed_envelope"
        return f"terms-{name}", _vector(expect, about, [before, *records(before, content)], purpose)

    yield refused("purpose", "a header of a model, terms of a prompt", terms("prompt"))
    yield refused("version", "version 2", terms(v=2))
    yield refused("no-models", "a prompt for no model", terms("prompt", models=[]), "prompt")
    yield refused("two-models", "a model that is two", terms(models=[MODEL, bytes(48)]))
    yield refused("no-configurations", "for no configuration", terms(configurations=[]))
    yield refused("digest-47", "a digest of 47 bytes", terms(models=[bytes(47)]))
    yield refused("digest-text", "a digest in hexadecimal digits", terms(configurations=[CONFIGURATION.hex()]))
    yield refused("models-map", "a map in place of an array", terms(models={}))
    yield refused("unknown-purpose", "an unknown purpose", terms("adapter"))
    yield refused("unknown-field", "a field of no meaning", terms(until=0))
    yield refused("cut", "terms that are longer than the record", terms()[:-1])
    yield refused("short", "a content of three bytes", bytes(3))
    yield refused("length-0", "terms of no bytes", bytes(5))
    yield refused("81-digests", "one more than fits", terms("prompt", models=[MODEL] * 80), "prompt")
    yield refused("long", "4,093 bytes of terms", (4_093).to_bytes(4, "big") + bytes(4_093))


def _records() -> Vectors:
    before = opening(header())
    one, two, three = records(before, terms() + _body(2 * RECORD + 100))
    salt = bytes(32)
    other_before = opening(header(salt=salt))
    other = records(other_before, terms() + _body(2 * RECORD + 100), salt)
    newer = opening(header(version=4, context=context(version=4)))

    def refused(name: str, expect: str, about: str, *parts: bytes) -> tuple[str, Vector]:
        return f"records-{name}", _vector(expect, about, parts)

    yield refused("none", "truncated_envelope", "no record", before)
    yield refused("first-only", "truncated_envelope", "cut behind the first record", before, one)
    yield refused("without-last", "truncated_envelope", "cut before the last record", before, one, two)
    yield refused("tag-only", "truncated_envelope", "16 bytes of the last record", before, one, two, three[:16])
    yield refused("cut-in-second", "tampered_record", "cut within the second record", before, one, two[:-1])
    yield refused("cut-in-last", "tampered_record", "the last byte is missing", before, one, two, three[:-1])
    yield refused("changed", "tampered_record", "the last bit", before, one, two, three[:-1] + bytes([three[-1] ^ 1]))
    yield refused("order", "tampered_record", "two records swapped", before, two, one, three)
    yield refused("twice", "tampered_record", "a record twice", before, one, one, two, three)
    yield refused("missing", "tampered_record", "a record is missing", before, one, three)
    yield refused("of-another", "tampered_record", "one of another envelope", before, one, other[1], three)
    yield refused("other-header", "tampered_record", "another envelope's header", other_before, one, two, three)
    yield refused("newer-header", "tampered_record", "the header says version 4", newer, one, two, three)
    full = records(before, terms() + _body(RECORD - len(terms())))
    yield refused("after-final", "after_final", "a byte behind a full last record", before, *full, b"\x00")
    yield refused("joined", "after_final", "two envelopes' records", before, *full, *full)
    yield refused("more", "tampered_record", "a byte behind a short last record", before, one, two, three, b"\x00")
    empty = record(before, 1, FINAL, b"")
    first = record(before, 0, MORE, terms() + _body(RECORD - len(terms())))
    yield refused("empty-last", "truncated_envelope", "a last record of no bytes", before, first, empty)
