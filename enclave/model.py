"""The weights: streamed from the parent's model store into sealed memory, hashed as they come.

What was hashed is what is loaded: the bytes stand in one memory object from their arrival, it is sealed against any
change before its digest is believed, and llama.cpp maps that same object. The store is the parent's and is believed
in nothing. Where the configuration names a KMS key for the weights they come in an envelope, and what is hashed is the
plaintext.

Weights that are in the image already lie in memory, as all of its files do, and nothing but the server could write
them: they are hashed and mapped where they are.
"""

from __future__ import annotations

import asyncio
import errno
import fcntl
import os
from collections.abc import Awaitable, Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from attestation.envelope_records import Piece
from attestation.errors import StrongroomError
from attestation.gguf import read_header
from attestation.manifest import MANIFEST_LABEL, MAX_MANIFEST_SIZE, ManifestFile, ModelManifest
from attestation.reference import h384
from enclave.kms.release import EnvelopeKeys, EnvelopeReader
from vsockrpc.address import Address
from vsockrpc.digest import HashingSink
from vsockrpc.limits import BULK
from vsockrpc.transport import Client, ConnectionLost, Fault, connect

T = TypeVar("T")

MEMINFO = Path("/proc/meminfo")

Progress = Callable[[int, int], None]
"""Called with bytes received and bytes in all, more of them each time."""


class ModelRefused(StrongroomError):
    """What the store sent is not the model that the measured configuration names, or not one that this enclave can
    hold."""


class StoreFailed(StrongroomError):
    """The store did not deliver, however often it was asked (code ``store_failed``)."""


@dataclass(frozen=True, slots=True)
class Patience:
    """How long the store is waited for."""

    manifest_seconds: float = 30
    """For the whole manifest."""
    stall_seconds: float = 60
    """A transfer that brings nothing for so long is begun again where it stopped."""
    attempts: int = 6
    """That bring nothing, in a row, before it is given up."""
    first_pause_seconds: float = 0.4
    """After the first of them; each further pause is twice as long."""


@dataclass(frozen=True, slots=True)
class SealedModel:
    """A manifest and, in sealed memory or in a file of the image, the weights that it describes."""

    manifest: ModelManifest
    fd: int

    def close(self) -> None:
        os.close(self.fd)


async def receive_model(
    store: Address,
    manifest: bytes,
    *,
    max_bytes: int,
    progress: Progress,
    keys: EnvelopeKeys | None = None,
    patience: Patience | None = None,
) -> SealedModel:
    """Fetches the model whose manifest has the digest ``manifest`` (48 bytes). With ``keys`` it arrives encrypted.

    Raises ModelRefused (``wrong_manifest``, ``wrong_model``, ``model_too_large``, ``not_enough_memory``), ModelError
    for a GGUF or a manifest that is broken, and StoreFailed; EnvelopeError and KmsError for an envelope that does not
    open.
    """
    transfer = _Transfer(store, progress, patience or Patience())
    described = await transfer.manifest(manifest)
    [weights] = described.files
    if weights.size > max_bytes:
        raise ModelRefused(
            "model_too_large", "the model exceeds the configured bound", expected=max_bytes, got=weights.size
        )
    fd = os.memfd_create("weights", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    try:
        # Left only when nothing uses the descriptor any more.
        with ThreadPoolExecutor(1, "weights") as thread, HashingSink("sha384", _MemoryFile(fd).write) as sink:
            await asyncio.get_running_loop().run_in_executor(thread, _reserve, fd, weights.size)
            digest = await transfer.file(weights, sink, keys)
            seals = fcntl.F_SEAL_WRITE | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_SEAL
            fcntl.fcntl(fd, fcntl.F_ADD_SEALS, seals)
            if digest != weights.sha384:
                raise ModelRefused(
                    "wrong_model",
                    "the weights are not those of the manifest",
                    expected=weights.sha384.hex(),
                    got=digest.hex(),
                )
            await asyncio.get_running_loop().run_in_executor(thread, _check_header, fd)
    except BaseException:
        os.close(fd)
        raise
    return SealedModel(described, fd)


def open_model(path: Path, manifest: bytes, *, max_bytes: int, progress: Progress) -> SealedModel:
    """The model in a file of the image, whose manifest has the digest ``manifest``. It is hashed and then loaded by the
    same descriptor, which cannot write; nothing is copied.

    Blocks; ``progress`` is called on the caller's thread. Raises ModelRefused (``wrong_manifest``,
    ``model_too_large``), ModelError for a GGUF that is broken, and OSError when the file cannot be read.
    """
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        size = os.fstat(fd).st_size
        if size > max_bytes:
            raise ModelRefused(
                "model_too_large", "the model exceeds the configured bound", expected=max_bytes, got=size
            )
        with os.fdopen(os.dup(fd), "rb") as file:
            described = ModelManifest.of_open_gguf(file, path.name, progress=progress)
        got = described.digest()
        if got != manifest:
            raise ModelRefused(
                "wrong_manifest",
                f"the model in the image, {path.name}, is not the one that the configuration names",
                expected=manifest.hex(),
                got=got.hex(),
            )
    except BaseException:
        os.close(fd)
        raise
    return SealedModel(described, fd)


def _reserve(fd: int, size: int) -> None:
    """Takes the memory before the first byte comes: what does not fit is said in numbers, not by the kernel's OOM
    killer half-way."""
    available = available_memory()
    try:
        if size > available:
            raise OSError(errno.ENOMEM, os.strerror(errno.ENOMEM))
        os.posix_fallocate(fd, 0, size)
    except OSError as error:
        raise ModelRefused(
            "not_enough_memory",
            "the model does not fit into the memory of this enclave: start it with more",
            expected=f"{size} bytes",
            got=f"{available} bytes available ({error.strerror})",
        ) from error


def available_memory() -> int:
    """Bytes that can be had without swapping, by the kernel's estimate (proc(5), MemAvailable)."""
    fields = dict(line.split(":", 1) for line in MEMINFO.read_text().splitlines())
    return int(fields["MemAvailable"].removesuffix("kB")) * 1024


def _check_header(fd: int) -> None:
    with os.fdopen(os.dup(fd), "rb") as file:
        read_header(file)


class _Transfer:
    """Calls to the store, begun again where they stopped."""

    def __init__(self, store: Address, progress: Progress, patience: Patience) -> None:
        self._store = store
        self._progress = progress
        self._patience = patience

    async def manifest(self, digest: bytes) -> ModelManifest:
        async def fetch(client: Client) -> bytes:
            deadline = self._patience.manifest_seconds
            async with client.call("model.manifest", {"digest": digest}, deadline=deadline) as call:
                await call.send(b"", end=True)
                return await call.read(MAX_MANIFEST_SIZE)

        attempts = _Attempts(self._patience)
        while True:
            try:
                async with connect(self._store, limits=BULK) as client:
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

    async def file(self, weights: ManifestFile, sink: HashingSink, keys: EnvelopeKeys | None) -> bytes:
        """Feeds the file to ``sink`` and returns its digest."""
        content = _Content(weights, sink, self._progress)
        arriving = content if keys is None else _Envelope(EnvelopeReader(keys), content)
        attempts = _Attempts(self._patience)
        while not arriving.complete:
            before = arriving.received
            try:
                async with connect(self._store, limits=BULK) as client:
                    await self._receive(client, weights, arriving)
            except (ConnectionLost, Fault, TimeoutError) as error:
                await attempts.pause_after(error, progressed=arriving.received > before)
        return await sink.finish()

    async def _receive(self, client: Client, weights: ManifestFile, arriving: _Content | _Envelope) -> None:
        meta = {"sha384": weights.sha384, "offset": arriving.received}
        async with client.call(arriving.method, meta) as call:
            await call.send(b"", end=True)
            arriving.begin(await self._in_time(call.reply()))
            chunks = aiter(call)
            while not arriving.complete:
                chunk = await self._in_time(anext(chunks, None))
                if chunk is None:
                    raise ConnectionLost("the store ended the file early")
                await arriving.feed(chunk)

    async def _in_time(self, waiting: Awaitable[T]) -> T:
        async with asyncio.timeout(self._patience.stall_seconds):
            return await waiting


class _Content:
    """The weights on their way into memory."""

    method = "model.file"

    def __init__(self, weights: ManifestFile, sink: HashingSink, progress: Progress) -> None:
        self.size = weights.size
        self._sink = sink
        self._progress = progress
        self.received = 0

    @property
    def complete(self) -> bool:
        return self.received == self.size

    def begin(self, meta: Mapping[str, object]) -> None:
        """The size is the manifest's: nothing that the store says of it counts."""

    async def feed(self, piece: Piece) -> None:
        if self.received + len(piece) > self.size:
            raise ModelRefused("wrong_model", "more came than the file has", expected=self.size, got="more")
        await self._sink.feed(piece)
        self.received += len(piece)
        self._progress(self.received, self.size)


class _Envelope:
    """The envelope around them. Its size is the store's word: one that is cut short has no final record."""

    method = "model.envelope"

    def __init__(self, reader: EnvelopeReader, content: _Content) -> None:
        self._reader = reader
        self._content = content
        self._size: int | None = None
        self.received = 0
        self.complete = False

    def begin(self, meta: Mapping[str, object]) -> None:
        size = meta.get("size")
        if type(size) is not int:  # a bool is an int
            raise ModelRefused("wrong_model", "the store does not say how large the envelope is")
        if self._size not in (None, size):
            raise ModelRefused("wrong_model", "the store changed the envelope", expected=self._size, got=size)
        self._size = size

    async def feed(self, chunk: Piece) -> None:
        self.received += len(chunk)
        for piece in await self._reader.feed(chunk):
            await self._content.feed(piece)
        if self._size is not None and self.received >= self._size:
            await self._content.feed(self._reader.finish())
            if not self._content.complete:
                raise ModelRefused(
                    "wrong_model",
                    "the envelope holds less than the file",
                    expected=self._content.size,
                    got=self._content.received,
                )
            self.complete = True


class _Attempts:
    """Patience with the store: pauses grow while attempts bring nothing, and after some of those it is given up."""

    def __init__(self, patience: Patience) -> None:
        self._patience = patience
        self._fruitless = 0

    async def pause_after(self, error: Exception, *, progressed: bool) -> None:
        """Waits, or raises StoreFailed when there was no progress for too long."""
        self._fruitless = 0 if progressed else self._fruitless + 1
        if self._fruitless >= self._patience.attempts:
            reason = error.message if isinstance(error, StrongroomError) else "it fell silent"
            raise StoreFailed(
                "store_failed", f"the model store does not deliver: {reason}", got=f"{self._fruitless} attempts in vain"
            ) from error
        await asyncio.sleep(self._patience.first_pause_seconds * 2 ** max(0, self._fruitless - 1))


class _MemoryFile:
    """The memory object, written from its beginning on."""

    def __init__(self, fd: int) -> None:
        self._fd = fd
        self._written = 0

    def write(self, piece: bytes | memoryview) -> None:
        view = memoryview(piece)
        while view:
            count = os.pwrite(self._fd, view, self._written)
            self._written += count
            view = view[count:]
