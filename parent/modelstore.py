"""The model store: streams a model's file to the enclave that asks for it by digest, from whatever offset. PROTOCOL.md
section 5.3.

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

PIECE = 1 << 20
"""Bytes read from the file at once."""


@dataclass(frozen=True, slots=True)
class ModelStore:
    """One model: its manifest and where its file is."""

    manifest: ModelManifest
    path: Path

    @property
    def handlers(self) -> Mapping[str, Handler]:
        return {"model.manifest": self.send_manifest, "model.file": self.send_file}

    async def send_manifest(self, call: IncomingCall) -> None:
        if call.meta.get("digest") != self.manifest.digest():
            raise Fault("unavailable", "this store has another model")
        await call.reply({})
        await call.send(self.manifest.encode(), end=True)

    async def send_file(self, call: IncomingCall) -> None:
        [weights] = self.manifest.files
        offset = call.meta.get("offset")
        if call.meta.get("sha384") != weights.sha384:
            raise Fault("unavailable", "this store has another file")
        if type(offset) is not int or not 0 <= offset <= weights.size:  # not isinstance: a bool is an int
            raise Fault("malformed", "the offset is not within the file")
        try:
            file = self.path.open("rb")
        except OSError as error:
            raise Fault("unavailable", f"the model's file cannot be read: {error.strerror}") from error
        with file:
            await call.reply({"size": weights.size})
            while piece := await asyncio.to_thread(os.pread, file.fileno(), PIECE, offset):
                await call.send(piece)
                offset += len(piece)
        await call.end()
