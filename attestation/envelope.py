"""What an envelope says of itself, and who may use its body. PROTOCOL.md section 6.4.

An envelope holds an encrypted model, or a prompt that waits. Its header stands in clear: KMS and whoever has the key
released judge it. Its records (:mod:`attestation.envelope_records`) open with that key alone, and the first of them
begins with the terms of its use: which models and configurations may use the body.

A header is what somebody claims. The encryption context that KMS compares is built by an enclave from its own
configuration; of the header it takes the version alone, after :func:`require_header`.
"""

from __future__ import annotations

import hashlib
import re
import secrets
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Final

import cbor2

from attestation import cbor
from attestation.errors import EvidenceError, StrongroomError
from attestation.keypolicy.document import KeyArn, KeyPolicyError
from attestation.reference import DIGEST_SIZE, digest_text

MAGIC: Final = b"strongroom/1 envelope\n"
LENGTH_SIZE: Final = 4
MAX_HEADER: Final = 16_384
"""Bytes of a header's CBOR."""
MAX_OPENING: Final = len(MAGIC) + LENGTH_SIZE + MAX_HEADER
"""Bytes before the first record, at most."""

DATA_KEY_SIZE: Final = 32
SALT_SIZE: Final = 32
MAX_WRAPPED: Final = 6_144
"""Bytes of a KMS ciphertext."""
MAX_VERSION: Final = 2**32 - 1
CONTEXT_NAME: Final = r"[a-z0-9._-]{1,64}"
"""A regular expression for the name of a context."""

MIN_RECORD: Final = 4_096
MAX_RECORD: Final = 4_194_304
MODEL_RECORD: Final = 1_048_576
"""Bytes of plaintext in a record of a model. Measured with the hash on another thread (``bench.model_envelope``): below
it the threads wake each other too often, above it too few records fit between them to keep both at work.
"""
PROMPT_RECORD: Final = 4_096
"""The same of a prompt: the unit that its content is padded to."""

MAX_TERMS: Final = MIN_RECORD - LENGTH_SIZE
"""Bytes of the terms' CBOR. So they fit into the first record, however small the records are."""

_VERSION = 1
_CODE = "malformed_envelope"
_LONGEST_ARN = 512


class EnvelopePurpose(StrEnum):
    """What is inside: the weights of a model, or a prompt that waits."""

    MODEL = "model"
    PROMPT = "prompt"

    @property
    def table(self) -> str:
        """The table of it in a policy's and in a configuration's ``[kms]``."""
        return "model" if self is EnvelopePurpose.MODEL else "prompts"


class EnvelopeError(StrongroomError):
    """An envelope that is malformed, tampered with or cut short, or not meant for whoever opens it. Codes:
    ``malformed_envelope``, ``wrong_purpose``, ``wrong_key``, ``wrong_context``, ``rolled_back``, ``tampered_record``,
    ``truncated_envelope``, ``after_final``, ``wrong_model``, ``wrong_configuration``; those of a record name its index,
    counted from 0.
    """

    exit_code = 3


def encryption_context(purpose: EnvelopePurpose, name: str, version: int) -> dict[str, str]:
    """The encryption context under which KMS wraps a data key and releases it."""
    return {
        "strongroom": str(_VERSION),
        "strongroom:purpose": purpose.value,
        "strongroom:context": name,
        "strongroom:version": str(version),
    }


@dataclass(frozen=True, slots=True)
class EnvelopeHeader:
    """What stands in clear before the records, and is bound to each of them.

    Construction checks every bound and raises EnvelopeError with ``malformed_envelope``.
    """

    purpose: EnvelopePurpose
    """What the body is."""
    key: KeyArn
    """The KMS key that ``wrapped`` is under."""
    context: str
    """The name in the encryption context, 1 to 64 of ``a-z 0-9 . _ -``."""
    version: int
    """The sealer's own count, 1 to 2^32 - 1, which whoever opens it holds to a minimum."""
    wrapped: bytes
    """The data key as KMS encrypted it, 1 to 6,144 bytes."""
    record: int
    """Bytes of plaintext in each record but the last, 4,096 to 4,194,304."""
    salt: bytes = field(default_factory=lambda: secrets.token_bytes(SALT_SIZE))
    """32 bytes, fresh for each envelope, so that no two share a key and a nonce even under one data key."""

    def __post_init__(self) -> None:
        if not re.fullmatch(CONTEXT_NAME, self.context):
            raise _malformed("the context's name", "1 to 64 of a-z 0-9 . _ -", ascii(self.context[:80]))
        for what, value, low, high in (
            ("the version", self.version, 1, MAX_VERSION),
            ("the number of bytes of the wrapped key", len(self.wrapped), 1, MAX_WRAPPED),
            ("the number of bytes in a record", self.record, MIN_RECORD, MAX_RECORD),
            ("the number of bytes of salt", len(self.salt), SALT_SIZE, SALT_SIZE),
        ):
            if not low <= value <= high:
                raise _malformed(what, str(low) if low == high else f"{low} to {high}", value)

    @property
    def encryption_context(self) -> dict[str, str]:
        """What a sealer gives KMS. Whoever opens builds its own."""
        return encryption_context(self.purpose, self.context, self.version)

    @property
    def aad(self) -> bytes:
        """SHA-384 of everything before the records, 48 bytes: in the key and in each record's associated data."""
        return hashlib.sha384(self.encode()).digest()

    def encode(self) -> bytes:
        """Everything before the records."""
        header = {
            "v": _VERSION,
            "purpose": self.purpose.value,
            "key": self.key.text,
            "context": self.encryption_context,
            "wrapped": self.wrapped,
            "version": self.version,
            "record": self.record,
            "salt": self.salt,
        }
        return MAGIC + _with_length(cbor2.dumps(header, canonical=True))

    @classmethod
    def split(cls, beginning: bytes) -> tuple[EnvelopeHeader, int]:
        """The header of an envelope that begins so, and at which byte its records begin.

        ``beginning`` has at least the envelope's first ``MAX_OPENING`` bytes, or is all of it.

        Raises EnvelopeError with ``malformed_envelope``, ``truncated_envelope``.
        """
        magic = beginning[: len(MAGIC)]
        if not MAGIC.startswith(magic):
            raise _malformed("the first bytes", repr(MAGIC), repr(magic))
        encoded = _behind_length(beginning, len(MAGIC), MAX_HEADER, "the header")
        if encoded is None:
            raise EnvelopeError(
                "truncated_envelope", "the envelope ends within its header", got=f"{len(beginning)} bytes"
            )
        return cls._decode(encoded), len(MAGIC) + LENGTH_SIZE + len(encoded)

    @classmethod
    def _decode(cls, encoded: bytes) -> EnvelopeHeader:
        try:
            value = cbor.decode(encoded, deterministic=True, code=_CODE)
            record = cbor.Record(value, "envelope header", required=_HEADER_FIELDS, code=_CODE)
            record.literal("v", _VERSION)
            context = record.map("context")
            name = context.get("strongroom:context")
            header = cls(
                purpose=_purpose(record),
                key=KeyArn.parse(record.text("key", _LONGEST_ARN)),
                context=name if isinstance(name, str) else "",
                version=record.integer("version", 1, MAX_VERSION),
                wrapped=record.octets("wrapped", 1, MAX_WRAPPED),
                record=record.integer("record", MIN_RECORD, MAX_RECORD),
                salt=record.octets("salt", SALT_SIZE, SALT_SIZE),
            )
            # Two places that say what the envelope is must say the same.
            if context != header.encryption_context:
                raise record.refusal("context", header.encryption_context, cbor.shown(context))
        except (EvidenceError, KeyPolicyError) as error:
            raise EnvelopeError(_CODE, error.message, expected=error.expected, got=error.got) from error
        return header


_HEADER_FIELDS = frozenset(("v", "purpose", "key", "context", "wrapped", "version", "record", "salt"))


def require_header(
    header: EnvelopeHeader, *, purpose: EnvelopePurpose, key: KeyArn, context: str, minimum_version: int
) -> None:
    """That this is the envelope which one is configured to open: asked before KMS is.

    Raises EnvelopeError with ``wrong_purpose``, ``wrong_key``, ``wrong_context``, ``rolled_back``.
    """
    require_equal("wrong_purpose", "an envelope of another purpose", purpose.value, header.purpose.value)
    require_equal("wrong_key", "sealed under another KMS key", key.text, header.key.text)
    require_equal("wrong_context", "sealed for another context", context, header.context)
    if header.version < minimum_version:
        raise EnvelopeError(
            "rolled_back",
            "the envelope is older than is accepted",
            expected=f"version {minimum_version} or later",
            got=f"version {header.version}",
        )


@dataclass(frozen=True, slots=True)
class Terms:
    """What may use an envelope's body. They stand inside, before the body, where nobody without the key changes them.

    Construction checks every bound and raises EnvelopeError with ``malformed_envelope``.
    """

    purpose: EnvelopePurpose
    """What the body is; the header says the same."""
    models: tuple[bytes, ...]
    """Digests of manifests, 48 bytes each: of a prompt those that may answer it, one or more; of a model its own."""
    configurations: tuple[bytes, ...]
    """Digests of the configurations under which it may be used, 48 bytes each, one or more."""

    def __post_init__(self) -> None:
        if len(self.models) != 1 and (self.purpose is EnvelopePurpose.MODEL or not self.models):
            some = "exactly one" if self.purpose is EnvelopePurpose.MODEL else "one or more"
            raise _malformed("the number of models in the terms", some, len(self.models))
        if not self.configurations:
            raise _malformed("the number of configurations in the terms", "one or more", 0)
        for digest in (*self.models, *self.configurations):
            if len(digest) != DIGEST_SIZE:
                raise _malformed("a digest in the terms", f"{DIGEST_SIZE} bytes", f"{len(digest)} bytes")
        if (size := len(self.encode()) - LENGTH_SIZE) > MAX_TERMS:
            raise _malformed("the length of the terms", f"1 to {MAX_TERMS} bytes", f"{size} bytes")

    def encode(self) -> bytes:
        """As they stand before the body, their length included."""
        terms = {
            "v": _VERSION,
            "purpose": self.purpose.value,
            "models": list(self.models),
            "configurations": list(self.configurations),
        }
        return _with_length(cbor2.dumps(terms, canonical=True))

    @classmethod
    def split(cls, content: bytes) -> tuple[Terms, int]:
        """The terms at the beginning of the first record's content, and at which byte of that the body begins.

        Raises EnvelopeError with ``malformed_envelope``.
        """
        encoded = _behind_length(content, 0, MAX_TERMS, "the terms")
        if encoded is None:
            raise _malformed("the first record", "whole terms", f"{len(content)} bytes")
        try:
            value = cbor.decode(encoded, deterministic=True, code=_CODE)
            record = cbor.Record(value, "terms", required=_TERMS_FIELDS, code=_CODE)
            record.literal("v", _VERSION)
            terms = cls(_purpose(record), _digests(record, "models"), _digests(record, "configurations"))
        except EvidenceError as error:
            raise EnvelopeError(_CODE, error.message, expected=error.expected, got=error.got) from error
        return terms, LENGTH_SIZE + len(encoded)

    def require(self, *, purpose: EnvelopePurpose, model: bytes, configuration: bytes) -> None:
        """That ``model`` under ``configuration`` (digests, 48 bytes each) may use the body.

        Raises EnvelopeError with ``wrong_purpose``, ``wrong_model``, ``wrong_configuration``.
        """
        said = "record 0's terms allow another"
        require_equal("wrong_purpose", f"{said} purpose than the header names", purpose.value, self.purpose.value)
        _require_among("wrong_model", f"{said} model", self.models, model)
        _require_among("wrong_configuration", f"{said} configuration", self.configurations, configuration)


_TERMS_FIELDS = frozenset(("v", "purpose", "models", "configurations"))


def require_equal(code: str, message: str, expected: str, got: str) -> None:
    """Raises EnvelopeError with ``code`` unless the two are the same."""
    if got != expected:
        raise EnvelopeError(code, message, expected=expected, got=got)


def _require_among(code: str, message: str, allowed: tuple[bytes, ...], mine: bytes) -> None:
    if mine not in allowed:
        expected = ", ".join(map(digest_text, allowed))
        raise EnvelopeError(code, message, expected=expected, got=digest_text(mine))


def _with_length(encoded: bytes) -> bytes:
    return len(encoded).to_bytes(LENGTH_SIZE, "big") + encoded


def _behind_length(data: bytes, at: int, most: int, what: str) -> bytes | None:
    """What stands behind its length, which is at ``at``; None where ``data`` ends before it does."""
    start = at + LENGTH_SIZE
    if len(data) < start:
        return None
    size = int.from_bytes(data[at:start], "big")
    if not 1 <= size <= most:
        raise _malformed(f"the length of {what}", f"1 to {most} bytes", f"{size} bytes")
    return data[start : start + size] if len(data) >= start + size else None


def _purpose(record: cbor.Record) -> EnvelopePurpose:
    text = record.text("purpose", longest=16)
    if text not in _PURPOSES:
        raise record.refusal("purpose", " or ".join(EnvelopePurpose), cbor.shown(text))
    return EnvelopePurpose(text)


_PURPOSES = frozenset(EnvelopePurpose)


def _digests(record: cbor.Record, name: str) -> tuple[bytes, ...]:
    digests: list[bytes] = []
    for value in record.array(name):
        if not isinstance(value, bytes):
            raise record.wrong_octets(value, name, DIGEST_SIZE, DIGEST_SIZE)
        digests.append(value)
    return tuple(digests)


def _malformed(what: str, expected: object, got: object) -> EnvelopeError:
    return EnvelopeError(_CODE, f"{what}: not as specified", expected=expected, got=got)
