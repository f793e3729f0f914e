"""A prompt that waits in an envelope, and the answer to it. PROTOCOL.md section 6.5.

Nobody is there when the envelope is opened, so what will open the answer travels inside: a fresh reply secret, of which
the sender keeps a copy. The answer is sealed under it and bound to the envelope's digest. Whoever carries either can
neither read nor forge, and can have the prompt run more than once: delivery is at least once.
"""

from __future__ import annotations

import hashlib
import secrets
from dataclasses import dataclass

from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from attestation.envelope import PROMPT_RECORD
from attestation.secret import Secret
from vsockrpc.fields import MessageError
from vsockrpc.messages import MessageReader, Request

SECRET_SIZE = 32


class ReplyKeys:
    """What seals the answer in the enclave and opens it at the sender's."""

    def __init__(self, secret: Secret, envelope_digest: bytes) -> None:
        """``secret`` has 32 bytes; ``envelope_digest`` is the SHA-384 of the whole envelope."""
        self._secret = secret
        self._envelope_digest = envelope_digest

    def answer(self, answer_salt: bytes) -> Secret:
        """The answer's key. ``answer_salt`` is 32 bytes, drawn by the enclave for each answer: two answers to one
        envelope share no key."""
        salt = self._envelope_digest + answer_salt
        derivation = HKDF(algorithm=hashes.SHA256(), length=32, salt=salt, info=b"strongroom/1 reply")
        return Secret(derivation.derive(self._secret.expose()))


def new_reply_secret() -> Secret:
    return Secret(secrets.token_bytes(SECRET_SIZE))


def envelope_digest(envelope: bytes) -> bytes:
    """SHA-384 of a whole envelope, which the answer is bound to."""
    return hashlib.sha384(envelope).digest()


@dataclass(frozen=True, slots=True)
class DeferredPrompt:
    """What a prompt's envelope holds: the request, and what the answer to it is sealed under."""

    reply_secret: Secret
    request: Request

    def encode(self, *, before: int) -> bytes:
        """With zeros behind it, so that ``before`` bytes and these fill a power of two of records, which is all that an
        envelope shows of its content."""
        content = self.reply_secret.expose() + self.request.encode()
        records = -(-(before + len(content)) // PROMPT_RECORD)
        return content.ljust((1 << (records - 1).bit_length()) * PROMPT_RECORD - before, b"\0")

    @classmethod
    def decode(cls, body: bytes, *, limit: int) -> DeferredPrompt:
        """``limit`` bounds the request's message, in bytes. Raises MessageError."""
        return cls(reply_secret_of(body), request_of(body, limit=limit))


def reply_secret_of(body: bytes) -> Secret:
    """What the answer is sealed under, whatever stands behind it. Raises MessageError."""
    secret = body[:SECRET_SIZE]
    if len(secret) != SECRET_SIZE:
        raise MessageError("no reply secret", param="body", expected=f"{SECRET_SIZE} bytes", got=len(secret))
    return Secret(secret)


def request_of(body: bytes, *, limit: int) -> Request:
    """What stands behind the reply secret. ``limit`` bounds its message, in bytes. Raises MessageError."""
    rest = body[SECRET_SIZE:]
    size = 4 + int.from_bytes(rest[:4], "big")
    messages = list(MessageReader(limit).feed(rest[:size]))
    if len(messages) != 1 or any(rest[size:]):
        raise MessageError("an envelope holds one message, and zeros", param="body", expected=1, got=len(messages))
    return Request.decode(messages[0])
