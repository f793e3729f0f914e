"""What KMS releases to this boot: the data keys of envelopes, for the purposes that the measured configuration names.

The configuration says which key, context and floor count. The encryption context is built from it; a header has only to
agree. An envelope's terms are compared with this enclave's own model and configuration before a byte of its body is
used.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

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


class KeyService(Protocol):
    """KMS, as far as releasing goes."""

    async def decrypt(self, wrapped: bytes, *, key: KeyArn, context: Mapping[str, str]) -> Secret:
        """The plaintext of a KMS ciphertext, released to this enclave. Raises KmsError."""
        ...


class KeyRelease:
    """Opens envelopes of one purpose, for the model and under the configuration of this boot (digests)."""

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

    def __init__(self, release: KeyRelease) -> None:
        self._release = release
        self._beginning = bytearray()
        self._opener: Opener | None = None

    async def feed(self, chunk: Piece) -> list[Piece]:
        """What is now known of the body. Raises as :meth:`KeyRelease.unlock` and :meth:`Opener.feed`."""
        if self._opener is not None:
            return self._opener.feed(chunk)
        self._beginning += chunk
        try:
            header, start = EnvelopeHeader.split(bytes(self._beginning))
        except EnvelopeError as error:
            if error.code == "truncated_envelope" and len(self._beginning) < MAX_OPENING:
                return []
            raise
        self._opener = await self._release.unlock(header)
        rest = bytes(self._beginning[start:])
        self._beginning.clear()
        return self._opener.feed(rest)

    def finish(self) -> Piece:
        """Call at the envelope's end: the last piece of its body. Raises as :meth:`Opener.finish`."""
        if self._opener is None:
            got = f"{len(self._beginning)} bytes"
            raise EnvelopeError("truncated_envelope", "the envelope ends within its header", got=got)
        return self._opener.finish()
