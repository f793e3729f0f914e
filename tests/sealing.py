"""Envelopes for tests, and a KMS without a network that wraps their data keys: it encrypts for real, keeps count of who
asks, and fails when it is told to.
"""

from __future__ import annotations

import asyncio
import json
import os
import secrets
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from attestation.envelope import EnvelopeHeader, EnvelopePurpose, Terms, encryption_context
from attestation.envelope_records import TAG_SIZE, Sealer
from attestation.keypolicy.document import KeyArn
from attestation.secret import Secret
from enclave.kms.errors import KmsError
from strongroom.prompt_file import Reply
from tests.key_policies import ACCOUNT
from vsockrpc.address import UnixAddress
from vsockrpc.chat import ChatMessage, ChatRequest
from vsockrpc.deferred import DeferredPrompt, envelope_digest, new_reply_secret
from vsockrpc.messages import Request

MODEL, PROMPT = EnvelopePurpose.MODEL, EnvelopePurpose.PROMPT
MODEL_KEY, PROMPTS_KEY, OTHER_KEY = (
    KeyArn.parse(f"arn:aws:kms:us-east-1:{ACCOUNT}:key/{digit * 8}-0000-4000-8000-000000000000") for digit in "abc"
)
CONTEXT = "tests"
FLOOR = 3
"""The minimum version in the configurations of tests; what they seal has it too."""
RECORD = 4096

Wrap = Callable[[bytes, KeyArn, Mapping[str, str]], bytes]
"""What whoever seals has done by KMS: a data key, wrapped by a key under an encryption context."""


class LocalKms:
    """KMS as the enclave uses it: a wrapped key opens under its own key and encryption context, and under no other."""

    def __init__(self) -> None:
        self.asked: list[tuple[KeyArn, Mapping[str, str]]] = []
        """Each question for a data key."""
        self.random = b"\x5a" * 32
        """What its generator gives."""
        self.error: Exception | None = None
        """Raised in place of each answer."""
        self.held: asyncio.Event | None = None
        """Answers wait for it."""
        self.closed = False
        self._aead = AESGCM(os.urandom(32))

    def wrap(self, data_key: bytes, key: KeyArn, context: Mapping[str, str]) -> bytes:
        nonce = os.urandom(12)
        return nonce + self._aead.encrypt(nonce, data_key, _bound(key, context))

    async def decrypt(self, wrapped: bytes, *, key: KeyArn, context: Mapping[str, str]) -> Secret:
        self.asked.append((key, context))
        await self._ready()
        try:
            return Secret(self._aead.decrypt(wrapped[:12], wrapped[12:], _bound(key, context)))
        except (InvalidTag, ValueError):
            raise KmsError("kms_wrong_context", "the wrapped key is of another key or context") from None

    async def generate_random(self, count: int) -> Secret:
        await self._ready()
        return Secret(self.random[:count])

    async def close(self) -> None:
        self.closed = True

    async def _ready(self) -> None:
        if self.held is not None:
            await self.held.wait()
        if self.error is not None:
            raise self.error


def _bound(key: KeyArn, context: Mapping[str, str]) -> bytes:
    return json.dumps([key.text, sorted(context.items())]).encode()


@dataclass(frozen=True)
class Sealing:
    """How an envelope is made; a test changes what it is about with :meth:`but`."""

    wrap: Wrap
    purpose: EnvelopePurpose
    key: KeyArn
    models: tuple[bytes, ...]
    configurations: tuple[bytes, ...]
    context: str = CONTEXT
    version: int = FLOOR
    record: int = RECORD
    wrapped_by: KeyArn | None = None
    """The key that the data key is really under; None for ``key``."""
    wrapped_under: Mapping[str, str] | None = None
    """And the encryption context, in place of the one that the header says."""
    data_key: bytes = field(default_factory=lambda: os.urandom(32))

    def but(self, **changed: Any) -> Sealing:
        return replace(self, **changed)

    def header(self) -> EnvelopeHeader:
        context = self.wrapped_under or encryption_context(self.purpose, self.context, self.version)
        wrapped = self.wrap(self.data_key, self.wrapped_by or self.key, context)
        return EnvelopeHeader(self.purpose, self.key, self.context, self.version, wrapped, self.record)

    def seal(self, body: bytes) -> bytes:
        sealer = Sealer(self.header(), self.terms, Secret(self.data_key))
        return b"".join([*sealer.seal(body), sealer.finish()])

    @property
    def terms(self) -> Terms:
        return Terms(self.purpose, self.models, self.configurations)

    def prompt(self, asked: str | Request | bytes, secret: Secret | None = None) -> tuple[bytes, Reply]:
        """The envelope of a prompt, and what opens its answer. Bytes stand for the whole body."""
        secret = secret or new_reply_secret()
        if isinstance(asked, str):
            asked = question(asked)
        if isinstance(asked, Request):
            asked = DeferredPrompt(secret, asked).encode(before=len(self.terms.encode()))
        envelope = self.seal(asked)
        return envelope, Reply(secret, envelope_digest(envelope))


def question(text: str, **options: Any) -> Request:
    return Request(secrets.token_bytes(16), ChatRequest((ChatMessage("user", text),), **options))


def split_records(envelope: bytes) -> tuple[bytes, list[bytes]]:
    """What stands before an envelope's records, and those."""
    header, start = EnvelopeHeader.split(envelope)
    size = header.record + TAG_SIZE
    return envelope[:start], [envelope[at : at + size] for at in range(start, len(envelope), size)]


def kms_toml(
    egress: UnixAddress,
    *,
    model: KeyArn | None = None,
    prompts: KeyArn | None = None,
    endpoint: str = "kms.us-east-1.amazonaws.com:443",
    trust: str = 'trust = "AMAZON"',
) -> str:
    """The part of ``enclave.toml`` that names KMS."""
    lines = ["[kms]", 'region = "us-east-1"', f'endpoint = "{endpoint}"', f'egress = "{egress}"', trust]
    for table, key in (("model", model), ("prompts", prompts)):
        if key is not None:
            lines += [f"[kms.{table}]", f'key = "{key.text}"', f'context = "{CONTEXT}"', f"minimum_version = {FLOOR}"]
    return "\n".join(lines) + "\n"
