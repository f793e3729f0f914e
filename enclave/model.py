"""The weights: streamed from the parent's model store into sealed memory, hashed as they come.

What was hashed is what is loaded: the bytes stand in one memory object from their arrival, it is sealed against any change before its digest
is believed, and llama.cpp maps that same object. The store is the parent's and is believed in nothing.
"""

from __future__ import annotations

import asyncio
import fcntl
import hashlib
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from attestation.errors import StrongroomError
from attestation.gguf import read_header
from attestation.manifest import MANIFEST_LABEL, MAX_MANIFEST_SIZE, ManifestFile, ModelManifest
from attestation.reference import h384
from vsockrpc.address import Address
from vsockrpc.transport import Client, ConnectionLost, Fault, connect

MANIFEST_SECONDS = 30
STALL_SECONDS = 60
"""A transfer that brings nothing for so long is begun again where it stopped."""
MAX_ATTEMPTS = 6
"""Attempts that bring nothing, in a row, before the boot halts."""
FIRST_PAUSE_SECONDS = 0.2
HASH_PIECE = 4 << 20
"""Bytes hashed in one go on the thread beside the transfer."""

Progress = Callable[[int, int], None]


class ModelRefused(StrongroomError):
    """What the store sent is not the model that the measured configuration names."""


@dataclass(frozen=True, slots=True)
class SealedModel:
    """A manifest and, in sealed memory, the weights that it describes."""

    manifest: ModelManifest
    fd: int

    def close(self) -> None:
        os.close(self.fd)


async def receive_model(store: Address, manifest: bytes, *, max_bytes: int, progress: Progress) -> SealedModel:
    """Fetches the model whose manifest has the digest ``manifest`` (48 bytes).

    Raises ModelRefused (``wrong_manifest``, ``wrong_model``, ``model_too_large``), ModelError for a GGUF that is broken, and
    ConnectionLost or Fault when the store does not deliver.
    """
    transfer = _Transfer(store, progress)
    described = await transfer.manifest(manifest)
    [weights] = described.files
    if weights.size > max_bytes:
        raise ModelRefused(
            "model_too_large", "the model exceeds the configured bound", expected=max_bytes, got=weights.size
        )
    fd = os.memfd_create("weights", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    try:
        os.posix_fallocate(fd, 0, weights.size)
        digest = await transfer.file(weights, fd)
        fcntl.fcntl(
            fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_WRITE | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_SEAL
        )
        if digest != weights.sha384:
            raise ModelRefused(
                "wrong_model",
                "the weights are not those of the manifest",
                expected=weights.sha384.hex(),
                got=digest.hex(),
            )
        with os.fdopen(os.dup(fd), "rb") as file:
            read_header(file)
    except BaseException:
        os.close(fd)
        raise
    return SealedModel(described, fd)


class _Transfer:
    """Calls to the store, begun again where they stopped."""

    def __init__(self, store: Address, progress: Progress) -> None:
        self._store = store
        self._progress = progress

    async def manifest(self, digest: bytes) -> ModelManifest:
        async def fetch(client: Client) -> bytes:
            async with client.call("model.manifest", {"digest": digest}, deadline=MANIFEST_SECONDS) as call:
                await call.send(b"", end=True)
                return await call.read(MAX_MANIFEST_SIZE)

        attempts = _Attempts()
        while True:
            try:
                async with connect(self._store) as client:
                    data = await fetch(client)
                break
            except (ConnectionLost, Fault) as error:
                await attempts.pause_after(error, progressed=False)
        got = h384(MANIFEST_LABEL, data)
        if got != digest:
            raise ModelRefused(
                "wrong_manifest", "the store sent another manifest", expected=digest.hex(), got=got.hex()
            )
        return ModelManifest.decode(data)

    async def file(self, weights: ManifestFile, fd: int) -> bytes:
        """Writes the file into ``fd`` and returns the SHA-384 of what was written."""
        sink = _HashingSink(fd)
        attempts = _Attempts()
        try:
            while sink.received < weights.size:
                before = sink.received
                try:
                    async with connect(self._store) as client:
                        await self._receive(client, weights, sink)
                except (ConnectionLost, Fault, TimeoutError) as error:
                    await attempts.pause_after(error, progressed=sink.received > before)
            return await sink.finish()
        finally:
            sink.close()

    async def _receive(self, client: Client, weights: ManifestFile, sink: _HashingSink) -> None:
        async with client.call("model.file", {"sha384": weights.sha384, "offset": sink.received}) as call:
            await call.send(b"", end=True)
            chunks = aiter(call)
            while sink.received < weights.size:
                async with asyncio.timeout(STALL_SECONDS):
                    chunk = await anext(chunks, None)
                if chunk is None:
                    raise ConnectionLost("the store ended the file early")
                if sink.received + len(chunk) > weights.size:
                    raise ModelRefused(
                        "wrong_model", "the store sent more than the file", expected=weights.size, got="more"
                    )
                await sink.write(chunk)
                self._progress(sink.received, weights.size)


class _Attempts:
    """Patience with the store: pauses grow while attempts bring nothing, and after some of those it is given up."""

    def __init__(self) -> None:
        self._fruitless = 0

    async def pause_after(self, error: Exception, *, progressed: bool) -> None:
        """Waits, or raises ``error`` when there was no progress for too long."""
        self._fruitless = 0 if progressed else self._fruitless + 1
        if self._fruitless >= MAX_ATTEMPTS:
            raise error
        await asyncio.sleep(FIRST_PAUSE_SECONDS * 2**self._fruitless)


class _HashingSink:
    """Writes to the memory object and hashes, on a thread, while the next bytes arrive: the loop never waits for SHA-384 unless it is behind."""

    def __init__(self, fd: int) -> None:
        self.received = 0
        self._fd = fd
        self._written = 0
        self._hash = hashlib.sha384()
        self._pieces: list[bytes | memoryview] = []
        self._gathered = 0
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="weights")
        self._underway: asyncio.Future[None] | None = None

    async def write(self, piece: bytes | memoryview) -> None:
        self._pieces.append(piece)
        self._gathered += len(piece)
        self.received += len(piece)
        if self._gathered >= HASH_PIECE:
            await self._flush()

    async def finish(self) -> bytes:
        await self._flush()
        await self._flush()
        return self._hash.digest()

    def close(self) -> None:
        self._thread.shutdown(wait=True)

    async def _flush(self) -> None:
        """Waits for the batch before, then hands over this one."""
        if self._underway is not None:
            await self._underway
        pieces, self._pieces, self._gathered = self._pieces, [], 0
        self._underway = asyncio.get_running_loop().run_in_executor(self._thread, self._absorb, pieces)

    def _absorb(self, pieces: list[bytes | memoryview]) -> None:
        for piece in pieces:
            view = memoryview(piece)
            while view:
                count = os.pwrite(self._fd, view, self._written)
                self._hash.update(view[:count])
                self._written += count
                view = view[count:]
