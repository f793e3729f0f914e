"""The model store: streams a model's file, or the envelope that it is encrypted in, to the enclave that asks for it by
digest, from whatever offset. PROTOCOL.md section 5.3.

It holds public bytes and is believed in nothing: the enclave compares digests.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from attestation.manifest import ModelManifest
from vsockrpc.transport import Fault, Handler, IncomingCall

MANIFEST_SUFFIX = ".manifest"
"""Appended to the name of an encrypted model: the file that says what is in it."""
PIECE = 1 << 20
"""Bytes read from the file at once."""


@dataclass(frozen=True, slots=True)
class ModelStore:
    """One model: its manifest, where its file is, and whether that is an envelope (section 6.4) around it."""

    manifest: ModelManifest
    path: Path
    encrypted: bool = False

    @property
    def handlers(self) -> Mapping[str, Handler]:
        return {
            "model.manifest": self.send_manifest,
            "model.file": self.send_file,
            "model.envelope": self.send_envelope,
        }

    async def send_manifest(self, call: IncomingCall) -> None:
        if call.meta.get("digest") != self.manifest.digest():
            raise Fault("unavailable", "this store has another model")
        await call.reply({})
        await call.send(self.manifest.encode(), end=True)

    async def send_file(self, call: IncomingCall) -> None:
        if self.encrypted:
            raise Fault("unavailable", "this store has the model encrypted, and not in plain")
        await self._send(call, size=self.manifest.files[0].size)

    async def send_envelope(self, call: IncomingCall) -> None:
        if not self.encrypted:
            raise Fault("unavailable", "this store has the model in plain, and not encrypted")
        try:
            size = self.path.stat().st_size
        except OSError as error:
            raise _unreadable(error) from error
        await self._send(call, size=size)

    async def _send(self, call: IncomingCall, *, size: int) -> None:
        """The store's file from an offset up to ``size``."""
        offset = call.meta.get("offset")
        if call.meta.get("sha384") != self.manifest.files[0].sha384:
            raise Fault("unavailable", "this store has another file")
        if type(offset) is not int or not 0 <= offset <= size:  # not isinstance: a bool is an int
            raise Fault("malformed", "the offset is not within the file")
        try:
            file = self.path.open("rb")
        except OSError as error:
            raise _unreadable(error) from error
        with file:
            await call.reply({"size": size})
            while piece := await asyncio.to_thread(os.pread, file.fileno(), PIECE, offset):
                await call.send(piece)
                offset += len(piece)
        await call.end()


def _unreadable(error: OSError) -> Fault:
    return Fault("unavailable", f"the model's file cannot be read: {error.strerror}")
