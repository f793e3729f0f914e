"""What KMS releases to this boot: the data keys of envelopes, for the purposes that the measured configuration names.

The configuration says which key, context and floor count. The encryption context is built from it; a header has only to
agree. An envelope's terms are compared with this enclave's own model and configuration before a byte of its body is
used.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
from collections.abc import Mapping
from typing import Final, Protocol

from attestation.envelope import (
    MAX_OPENING,
    PROMPT_RECORD,
    EnvelopeError,
    EnvelopeHeader,
    EnvelopePurpose,
    encryption_context,
    require_header,
)
from attestation.envelope_records import Opener, Piece
from attestation.keypolicy.document import KeyArn
from attestation.secret import Secret
from enclave.config import WrappedKey
from enclave.kms.errors import KmsError

AT_KMS: Final = 32
"""Prompts whose keys KMS is asked for at once."""
WAITING: Final = 64
"""Prompts that wait for their turn, beside those; more are refused."""
REFUSALS: Final = 4096
"""Refusals that are remembered, 32 bytes and a code each."""

_FOR_GOOD: Final = ("kms_wrong_context", "kms_wrong_key")
"""What KMS says of the wrapped key itself: no policy, state or time changes it."""


class KeyService(Protocol):
    """KMS, as far as releasing goes."""

    async def decrypt(self, wrapped: bytes, *, key: KeyArn, context: Mapping[str, str]) -> Secret:
        """The plaintext of a KMS ciphertext, released to this enclave. Raises KmsError."""
        ...


class GuardedKms:
    """KMS for what anybody may bring. Whether a wrapped key is one only KMS can tell, and each question takes a
    document of the NSM, which Evidence needs too: so they are bounded, and none is asked again that was answered for
    good.

    A question that has begun keeps its place to its end, so that whoever leaves early gets no second one.
    """

    def __init__(self, kms: KeyService) -> None:
        self._kms = kms
        self._turns = asyncio.Semaphore(AT_KMS)
        self._waiting = 0
        self._asking: set[asyncio.Task[Secret]] = set()
        self._refused: dict[bytes, str] = {}

    async def decrypt(self, wrapped: bytes, *, key: KeyArn, context: Mapping[str, str]) -> Secret:
        """As KMS's own. Raises KmsError, also ``overloaded``."""
        question = hashlib.sha256(json.dumps([key.text, sorted(context.items())]).encode() + wrapped).digest()
        self._require_open(question)
        if self._waiting + len(self._asking) >= AT_KMS + WAITING:
            raise KmsError("overloaded", "too many prompts wait for their keys")
        self._waiting += 1
        try:
            await self._turns.acquire()
        finally:
            self._waiting -= 1
        asking = asyncio.get_running_loop().create_task(self._ask(question, wrapped, key, context))
        self._asking.add(asking)
        asking.add_done_callback(self._asked)
        return await asyncio.shield(asking)

    async def _ask(self, question: bytes, wrapped: bytes, key: KeyArn, context: Mapping[str, str]) -> Secret:
        self._require_open(question)  # another may have asked the same in the meantime
        try:
            return await self._kms.decrypt(wrapped, key=key, context=context)
        except KmsError as error:
            if error.code in _FOR_GOOD:
                self._refused[question] = error.code
                if len(self._refused) > REFUSALS:
                    del self._refused[next(iter(self._refused))]
            raise

    def _asked(self, asking: asyncio.Task[Secret]) -> None:
        self._asking.discard(asking)
        self._turns.release()
        if not asking.cancelled():
            asking.exception()  # retrieved: nobody need be waiting

    def _require_open(self, question: bytes) -> None:
        if question in self._refused:
            raise KmsError(self._refused[question], "KMS has refused this wrapped key before")


class EnvelopeKeys:
    """Unlocks envelopes of one purpose, for the model and under the configuration of this boot (digests)."""

    def __init__(
        self, kms: KeyService, purpose: EnvelopePurpose, wrapped: WrappedKey, *, model: bytes, configuration: bytes
    ) -> None:
        self._kms = kms
        self._purpose = purpose
        self._wrapped = wrapped
        self._model = model
        self._configuration = configuration

    async def unlock(self, header: EnvelopeHeader) -> Opener:
        """Has the envelope's key released. Raises EnvelopeError for one that the configuration does not name, before
        KMS is asked; KmsError.
        """
        wrapped = self._wrapped
        require_header(
            header,
            purpose=self._purpose,
            key=wrapped.key,
            context=wrapped.context,
            minimum_version=wrapped.minimum_version,
        )
        if self._purpose is EnvelopePurpose.PROMPT and header.record != PROMPT_RECORD:
            # Each envelope that is being opened holds memory for one record: prompts come many at a time.
            raise EnvelopeError(
                "malformed_envelope",
                "a prompt's records have another size",
                expected=f"{PROMPT_RECORD} bytes",
                got=f"{header.record} bytes",
            )
        context = encryption_context(self._purpose, wrapped.context, header.version)
        data_key = await self._kms.decrypt(header.wrapped, key=wrapped.key, context=context)
        return Opener(header, data_key, model=self._model, configuration=self._configuration)


class EnvelopeReader:
    """An envelope as it arrives: its key is asked for once its header is there."""

    def __init__(self, keys: EnvelopeKeys) -> None:
        self._keys = keys
        self._beginning = bytearray()
        self._opener: Opener | None = None

    async def feed(self, chunk: Piece) -> list[Piece]:
        """What is now known of the body. Raises as :meth:`EnvelopeKeys.unlock` and :meth:`Opener.feed`."""
        if self._opener is not None:
            return self._opener.feed(chunk)
        self._beginning += chunk
        try:
            header, start = EnvelopeHeader.split(bytes(self._beginning))
        except EnvelopeError as error:
            if error.code == "truncated_envelope" and len(self._beginning) < MAX_OPENING:
                return []
            raise
        self._opener = await self._keys.unlock(header)
        rest = bytes(self._beginning[start:])
        self._beginning.clear()
        return self._opener.feed(rest)

    def finish(self) -> Piece:
        """Call at the envelope's end: the last piece of its body. Raises as :meth:`Opener.finish`."""
        if self._opener is None:
            got = f"{len(self._beginning)} bytes"
            raise EnvelopeError("truncated_envelope", "the envelope ends within its header", got=got)
        return self._opener.finish()
