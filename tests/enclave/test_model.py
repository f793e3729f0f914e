"""The weights' way into sealed memory, from a store that delivers and from stores that do anything else."""

from __future__ import annotations

import asyncio
import errno
import fcntl
import mmap
import os
from collections.abc import Awaitable, Callable, Iterator, Sequence
from dataclasses import dataclass, field
from hashlib import sha384
from pathlib import Path

import cbor2
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import enclave.model
from attestation.envelope import EnvelopeError
from attestation.errors import StrongroomError
from attestation.gguf import ModelError
from attestation.manifest import MANIFEST_LABEL, MAX_MANIFEST_SIZE, ManifestFile, ModelManifest
from attestation.reference import h384
from enclave.config import WrappedKey
from enclave.kms.errors import KmsError
from enclave.kms.release import EnvelopeKeys
from enclave.model import ModelRefused, Patience, SealedModel, StoreFailed, open_model, receive_model
from parent.modelstore import ModelStore
from tests.gguf_files import TEXT, Gguf
from tests.sealing import CONTEXT, FLOOR, MODEL, MODEL_KEY, PROMPT, LocalKms, Sealing, split_records
from vsockrpc.address import UnixAddress
from vsockrpc.transport import Fault, Handler, IncomingCall, Limits, serve

WEIGHTS = Gguf(
    [("tokenizer.chat_template", TEXT, "{{ messages }}")],
    [("w", 0, (256, 1024), bytes(range(256)) * 4096)],
).encode()
"""A megabyte: several pieces of the store and several frames."""
IMPATIENT = Patience(manifest_seconds=5, stall_seconds=0.05, attempts=3, first_pause_seconds=0.001)
"""For stores that never deliver. No test waits for one of these times and asserts that something came before."""
QUICK = Patience(attempts=3, first_pause_seconds=0.001)


def manifest_of(weights: bytes) -> ModelManifest:
    file = ManifestFile("w.gguf", len(weights), sha384(weights).digest())
    return ModelManifest("tiny", (file,), "{{ messages }}")


@dataclass
class Store:
    """A store that a test makes up: ``send`` answers ``model.file`` from an offset, ``manifest`` is what it says it
    has."""

    send: Callable[[IncomingCall, int], Awaitable[None]]
    manifest: bytes = manifest_of(WEIGHTS).encode()
    offsets: list[int] = field(default_factory=list)
    manifests: int = 0

    @property
    def handlers(self) -> dict[str, Handler]:
        return {"model.manifest": self.send_manifest, "model.file": self.send_file}

    async def send_manifest(self, call: IncomingCall) -> None:
        self.manifests += 1
        await call.reply({})
        await call.send(self.manifest, end=True)

    async def send_file(self, call: IncomingCall) -> None:
        offset = call.meta["offset"]
        assert isinstance(offset, int)
        self.offsets.append(offset)
        await call.reply({"size": len(WEIGHTS)})
        await self.send(call, offset)


async def deliver(call: IncomingCall, offset: int) -> None:
    await call.send(WEIGHTS[offset:], end=True)


async def sending_nothing(call: IncomingCall, offset: int) -> None:
    await call.end()


class Receiver:
    """An enclave's side of the transfer."""

    def __init__(self, directory: Path) -> None:
        self.address = UnixAddress(str(directory / "models.sock"))
        self.progress: list[tuple[int, int]] = []
        self._progressed = asyncio.Event()

    def _note(self, received: int, total: int) -> None:
        self.progress.append((received, total))
        self._progressed.set()

    async def has(self, size: int) -> None:
        """Returns when so many bytes have arrived."""
        while not self.progress or self.progress[-1][0] < size:
            self._progressed.clear()
            await self._progressed.wait()

    async def receive(
        self,
        handlers: dict[str, Handler] | None,
        *,
        digest: bytes | None = None,
        max_bytes: int = 1 << 30,
        keys: EnvelopeKeys | None = None,
        patience: Patience = QUICK,
    ) -> SealedModel:
        digest = manifest_of(WEIGHTS).digest() if digest is None else digest

        def receiving() -> Awaitable[SealedModel]:
            return receive_model(
                self.address,
                digest,
                max_bytes=max_bytes,
                progress=self._note,
                keys=keys,
                patience=patience,
            )

        if handlers is None:
            return await receiving()

        def fail(error: BaseException) -> None:
            raise error

        async with serve(self.address, handlers, on_error=fail, limits=Limits(drain=0.05)):
            return await receiving()

    async def refusal(self, store: Store, **options: object) -> StrongroomError:
        with pytest.raises(StrongroomError) as caught:
            await self.receive(store.handlers, **options)  # type: ignore[arg-type]
        return caught.value


@pytest.fixture
def receiver(tmp_path: Path) -> Iterator[Receiver]:
    before = open_descriptors()
    yield Receiver(tmp_path)
    assert open_descriptors() <= before, "memory of a refused model was not given back"


def open_descriptors() -> int:
    """Memory objects that this process holds."""
    links = (Path("/proc/self/fd") / name for name in os.listdir("/proc/self/fd"))
    return sum("memfd:weights" in os.readlink(link) for link in links if link.is_symlink())


def content_of(model: SealedModel) -> bytes:
    return os.pread(model.fd, os.fstat(model.fd).st_size, 0)


# --- A store that delivers ----------------------------------------------------------------------------------------


async def test_the_parents_store_delivers(receiver: Receiver, tmp_path: Path) -> None:
    path = tmp_path / "w.gguf"
    path.write_bytes(WEIGHTS)
    store = ModelStore(manifest_of(WEIGHTS), path)
    model = await receiver.receive(dict(store.handlers))
    assert model.manifest == store.manifest
    assert content_of(model) == WEIGHTS
    model.close()


async def test_the_memory_is_sealed_against_every_change(receiver: Receiver) -> None:
    model = await receiver.receive(Store(deliver).handlers)
    seals = fcntl.fcntl(model.fd, fcntl.F_GET_SEALS)
    assert seals == fcntl.F_SEAL_WRITE | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_SEAL
    for change in (
        lambda: os.pwrite(model.fd, b"x", 0),
        lambda: os.ftruncate(model.fd, 0),
        lambda: os.ftruncate(model.fd, 2 * len(WEIGHTS)),
        lambda: mmap.mmap(model.fd, 0, mmap.MAP_SHARED, mmap.PROT_WRITE),
        lambda: fcntl.fcntl(model.fd, fcntl.F_ADD_SEALS, 0),
    ):
        with pytest.raises(PermissionError):
            change()
    assert content_of(model) == WEIGHTS
    assert not os.get_inheritable(model.fd)
    model.close()


async def test_progress_only_grows_and_ends_with_everything(receiver: Receiver) -> None:
    model = await receiver.receive(Store(deliver).handlers)
    received = [done for done, _ in receiver.progress]
    assert received == sorted(set(received))
    assert receiver.progress[-1] == (len(WEIGHTS), len(WEIGHTS))
    assert {total for _, total in receiver.progress} == {len(WEIGHTS)}
    model.close()


async def test_a_store_that_drips_is_taken_as_it_comes(receiver: Receiver) -> None:
    async def drip(call: IncomingCall, offset: int) -> None:
        for start in range(offset, offset + 500):
            await call.send(WEIGHTS[start : start + 1])
        await call.send(WEIGHTS[offset + 500 :], end=True)

    model = await receiver.receive(Store(drip).handlers)
    assert content_of(model) == WEIGHTS
    model.close()


# --- A store that breaks off --------------------------------------------------------------------------------------


async def breaking(call: IncomingCall, offset: int) -> None:
    await call.send(WEIGHTS[offset : offset + 400_000])
    raise Fault("unavailable")


async def test_a_transfer_goes_on_where_it_broke_off(receiver: Receiver) -> None:
    store = Store(breaking)
    model = await receiver.receive(store.handlers)
    assert store.offsets == [0, 400_000, 800_000]
    assert content_of(model) == WEIGHTS
    received = [done for done, _ in receiver.progress]
    assert received == sorted(set(received))
    model.close()


async def test_a_store_that_dies_and_comes_back(receiver: Receiver) -> None:
    """The server goes away with the call in flight, and another one listens at the same address."""

    async def half(call: IncomingCall, offset: int) -> None:
        await call.send(WEIGHTS[:500_000])
        await asyncio.Event().wait()

    first, second = Store(half), Store(deliver)
    limits = Limits(drain=0.05)
    async with serve(receiver.address, first.handlers, on_error=print, limits=limits) as server:
        receiving = asyncio.ensure_future(receiver.receive(None, patience=Patience(first_pause_seconds=0.001)))
        await receiver.has(500_000)
        await server.close()
        async with serve(receiver.address, second.handlers, on_error=print, limits=limits):
            model = await receiving
    assert first.offsets == [0]
    assert second.offsets == [500_000]
    assert content_of(model) == WEIGHTS
    model.close()


async def test_a_store_that_falls_silent_is_asked_again_from_there(receiver: Receiver) -> None:
    async def silent_at_first(call: IncomingCall, offset: int) -> None:
        if offset == 0:
            await call.send(WEIGHTS[:300_000])
            await asyncio.Event().wait()
        await deliver(call, offset)

    store = Store(silent_at_first)
    model = await receiver.receive(store.handlers, patience=Patience(stall_seconds=0.5, first_pause_seconds=0.001))
    assert store.offsets == [0, 300_000]
    assert content_of(model) == WEIGHTS
    model.close()


async def test_attempts_that_bring_something_do_not_use_up_patience(receiver: Receiver) -> None:
    async def little(call: IncomingCall, offset: int) -> None:
        await call.send(WEIGHTS[offset : offset + 100_000], end=True)

    store = Store(little)
    model = await receiver.receive(store.handlers, patience=Patience(attempts=1, first_pause_seconds=0))
    assert len(store.offsets) > 10
    assert content_of(model) == WEIGHTS
    model.close()


@settings(max_examples=15)
@given(st.lists(st.integers(0, len(WEIGHTS) - 1), max_size=5, unique=True).map(sorted))
def test_wherever_it_breaks_off_the_content_is_the_same(
    tmp_path_factory: pytest.TempPathFactory, cuts: list[int]
) -> None:
    async def cut(call: IncomingCall, offset: int) -> None:
        end = next((each for each in cuts if each > offset), len(WEIGHTS))
        await call.send(WEIGHTS[offset:end])
        raise Fault("unavailable")

    async def scenario() -> None:
        receiver = Receiver(tmp_path_factory.mktemp("cuts"))
        model = await receiver.receive(Store(cut).handlers, patience=Patience(attempts=2, first_pause_seconds=0))
        assert content_of(model) == WEIGHTS
        model.close()

    asyncio.run(scenario())


# --- A store that does not deliver --------------------------------------------------------------------------------


async def test_nobody_at_the_address(receiver: Receiver) -> None:
    with pytest.raises(StoreFailed) as caught:
        await receiver.receive(None)
    assert (caught.value.code, caught.value.got) == ("store_failed", "3 attempts in vain")


async def unavailable(call: IncomingCall, offset: int) -> None:
    raise Fault("unavailable", "not today")


async def half_of_it(call: IncomingCall, offset: int) -> None:
    await call.send(WEIGHTS[offset:500_000], end=True)


async def silence(call: IncomingCall, offset: int) -> None:
    await asyncio.Event().wait()


@pytest.mark.parametrize("send", [unavailable, sending_nothing, half_of_it, silence])
async def test_a_store_that_never_delivers_is_given_up(
    receiver: Receiver, send: Callable[[IncomingCall, int], Awaitable[None]]
) -> None:
    store = Store(send)
    error = await receiver.refusal(store, patience=IMPATIENT)
    assert isinstance(error, StoreFailed)
    assert error.code == "store_failed"
    assert len(store.offsets) == IMPATIENT.attempts + (send is half_of_it)


async def test_a_store_without_this_model_is_given_up(receiver: Receiver, tmp_path: Path) -> None:
    other = ModelStore(manifest_of(WEIGHTS + b"\x00"), tmp_path / "w.gguf")
    with pytest.raises(StoreFailed, match="another model"):
        await receiver.receive(dict(other.handlers))


async def test_a_store_whose_file_is_gone_is_given_up(receiver: Receiver, tmp_path: Path) -> None:
    store = ModelStore(manifest_of(WEIGHTS), tmp_path / "nothing.gguf")
    with pytest.raises(StoreFailed, match="cannot be read"):
        await receiver.receive(dict(store.handlers))


# --- A store that lies --------------------------------------------------------------------------------------------


async def test_another_manifest_is_refused_at_once(receiver: Receiver) -> None:
    other = manifest_of(WEIGHTS + b"\x00")
    store = Store(deliver, manifest=other.encode())
    error = await receiver.refusal(store)
    assert isinstance(error, ModelRefused)
    assert error.code == "wrong_manifest"
    assert (error.expected, error.got) == (manifest_of(WEIGHTS).digest().hex(), other.digest().hex())
    assert store.offsets == []
    assert store.manifests == 1


@pytest.mark.parametrize("manifest", [b"", b"\xa0", b"not CBOR", manifest_of(WEIGHTS).encode() + b"\x00"])
async def test_bytes_that_are_no_manifest_are_refused_even_with_the_right_digest(
    receiver: Receiver, manifest: bytes
) -> None:
    error = await receiver.refusal(Store(deliver, manifest=manifest), digest=h384(MANIFEST_LABEL, manifest))
    assert isinstance(error, ModelError)
    assert error.code == "malformed_manifest"


async def test_a_manifest_without_end_is_not_read(receiver: Receiver) -> None:
    error = await receiver.refusal(Store(deliver, manifest=bytes(MAX_MANIFEST_SIZE + 1)))
    assert error.code == "store_failed"


@pytest.mark.parametrize("position", [0, len(WEIGHTS) // 2, len(WEIGHTS) - 1])
async def test_one_wrong_byte_is_refused(receiver: Receiver, position: int) -> None:
    wrong = bytearray(WEIGHTS)
    wrong[position] ^= 1

    async def lie(call: IncomingCall, offset: int) -> None:
        await call.send(bytes(wrong[offset:]), end=True)

    error = await receiver.refusal(Store(lie))
    assert isinstance(error, ModelRefused)
    assert error.code == "wrong_model"
    assert (error.expected, error.got) == (sha384(WEIGHTS).hexdigest(), sha384(wrong).hexdigest())


async def test_the_same_bytes_from_a_wrong_offset_are_refused(receiver: Receiver) -> None:
    async def from_the_beginning(call: IncomingCall, offset: int) -> None:
        await call.send(WEIGHTS[: 400_000 if offset == 0 else len(WEIGHTS) - offset])
        raise Fault("unavailable")

    assert (await receiver.refusal(Store(from_the_beginning))).code == "wrong_model"


async def test_more_than_the_file_is_refused(receiver: Receiver) -> None:
    async def more(call: IncomingCall, offset: int) -> None:
        await call.send(WEIGHTS[:-1])
        await receiver.has(len(WEIGHTS) - 1)
        await call.send(WEIGHTS[-1:] + b"\x00", end=True)

    error = await receiver.refusal(Store(more))
    assert (error.code, error.got) == ("wrong_model", "more")


async def test_a_model_over_the_bound_is_not_asked_for(receiver: Receiver) -> None:
    store = Store(deliver)
    error = await receiver.refusal(store, max_bytes=len(WEIGHTS) - 1)
    assert isinstance(error, ModelRefused)
    assert (error.code, error.expected, error.got) == ("model_too_large", str(len(WEIGHTS) - 1), str(len(WEIGHTS)))
    assert store.offsets == []
    model = await receiver.receive(store.handlers, max_bytes=len(WEIGHTS))
    model.close()


async def test_a_model_of_several_files_is_refused(receiver: Receiver) -> None:
    fields = cbor2.loads(manifest_of(WEIGHTS).encode())
    fields["files"] += [{**fields["files"][0], "name": "second.gguf"}]
    manifest = cbor2.dumps(fields, canonical=True)
    store = Store(deliver, manifest=manifest)
    error = await receiver.refusal(store, digest=h384(MANIFEST_LABEL, manifest))
    assert (error.code, error.expected, error.got) == ("malformed_manifest", "1", "2")
    assert store.offsets == []


async def test_a_broken_file_with_the_right_digest_never_reaches_llama_cpp(receiver: Receiver) -> None:
    broken = b"GGUF" + WEIGHTS[4:-4096]

    async def send(call: IncomingCall, offset: int) -> None:
        await call.send(broken[offset:], end=True)

    manifest = manifest_of(broken)
    error = await receiver.refusal(Store(send, manifest=manifest.encode()), digest=manifest.digest())
    assert isinstance(error, ModelError)


# --- Memory -------------------------------------------------------------------------------------------------------


async def test_a_model_larger_than_the_memory_is_refused_in_numbers(
    receiver: Receiver, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    meminfo = tmp_path / "meminfo"
    meminfo.write_text("MemTotal:        8000 kB\nMemAvailable:    1000 kB\nHugePages_Total:     0\n")
    monkeypatch.setattr(enclave.model, "MEMINFO", meminfo)
    store = Store(deliver)
    error = await receiver.refusal(store)
    assert isinstance(error, ModelRefused)
    assert error.code == "not_enough_memory"
    assert error.expected == f"{len(WEIGHTS)} bytes"
    assert error.got == "1024000 bytes available (Cannot allocate memory)"
    assert store.offsets == []


async def test_memory_that_cannot_be_reserved_is_a_typed_error(
    receiver: Receiver, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "posix_fallocate", full)
    error = await receiver.refusal(Store(deliver))
    assert error.code == "not_enough_memory"
    assert error.got is not None
    assert "No space left" in error.got


def test_the_kernel_says_how_much_there_is() -> None:
    assert 0 < enclave.model.available_memory() < 1 << 50


async def test_a_cancelled_transfer_gives_its_memory_back(receiver: Receiver) -> None:
    begun = asyncio.Event()

    async def begin(call: IncomingCall, offset: int) -> None:
        begun.set()
        await asyncio.Event().wait()

    receiving = asyncio.ensure_future(receiver.receive(Store(begin).handlers))
    await begun.wait()
    receiving.cancel()
    with pytest.raises(asyncio.CancelledError):
        await receiving


# --- Weights in an envelope ---------------------------------------------------------------------------------------

CONFIGURATION = b"\x11" * 48
RECORD = 1 << 16
"""So that the envelope has seventeen records."""


@dataclass
class EncryptedStore:
    """A store that has the weights in an envelope. ``send`` answers ``model.envelope`` from an offset."""

    envelope: bytes
    send: Callable[[IncomingCall, int], Awaitable[None]] | None = None
    size: Callable[[int], object] = lambda offset: None
    """What it says of the envelope's size at an offset, if not the truth."""
    offsets: list[int] = field(default_factory=list)

    @property
    def handlers(self) -> dict[str, Handler]:
        return {"model.manifest": Store(deliver).send_manifest, "model.envelope": self.send_envelope}

    async def send_envelope(self, call: IncomingCall) -> None:
        offset = call.meta["offset"]
        assert isinstance(offset, int)
        assert call.meta["sha384"] == sha384(WEIGHTS).digest()
        self.offsets.append(offset)
        size = self.size(offset)
        await call.reply({"size": len(self.envelope) if size is None else size} if size != "none" else {})
        if self.send is not None:
            await self.send(call, offset)
        else:
            await call.send(self.envelope[offset:], end=True)


@dataclass
class Encrypted:
    """The same transfer, decrypted on its way."""

    receiver: Receiver
    kms: LocalKms = field(default_factory=LocalKms)

    @property
    def sealing(self) -> Sealing:
        digest = manifest_of(WEIGHTS).digest()
        return Sealing(self.kms.wrap, MODEL, MODEL_KEY, (digest,), (CONFIGURATION,), record=RECORD)

    @property
    def keys(self) -> EnvelopeKeys:
        wrapped, model = WrappedKey(MODEL_KEY, CONTEXT, FLOOR), manifest_of(WEIGHTS).digest()
        return EnvelopeKeys(self.kms, MODEL, wrapped, model=model, configuration=CONFIGURATION)

    async def receive(self, store: EncryptedStore, patience: Patience = QUICK) -> SealedModel:
        return await self.receiver.receive(store.handlers, keys=self.keys, patience=patience)

    async def refusal(self, envelope: bytes, patience: Patience = QUICK) -> StrongroomError:
        return await self.refusal_by(EncryptedStore(envelope), patience)

    async def refusal_by(self, store: EncryptedStore, patience: Patience = QUICK) -> StrongroomError:
        with pytest.raises(StrongroomError) as caught:
            await self.receive(store, patience)
        return caught.value


@pytest.fixture
def encrypted(receiver: Receiver) -> Encrypted:
    return Encrypted(receiver)


async def test_what_is_loaded_and_hashed_is_the_plaintext(encrypted: Encrypted, tmp_path: Path) -> None:
    sealed = tmp_path / "w.sealed"
    sealed.write_bytes(encrypted.sealing.seal(WEIGHTS))
    store = ModelStore(manifest_of(WEIGHTS), sealed, encrypted=True)
    model = await encrypted.receiver.receive(dict(store.handlers), keys=encrypted.keys)
    assert content_of(model) == WEIGHTS
    assert model.manifest == manifest_of(WEIGHTS)
    assert fcntl.fcntl(model.fd, fcntl.F_GET_SEALS) & fcntl.F_SEAL_WRITE
    assert len(encrypted.kms.asked) == 1
    model.close()


async def test_progress_is_that_of_the_plaintext(encrypted: Encrypted) -> None:
    (await encrypted.receive(EncryptedStore(encrypted.sealing.seal(WEIGHTS)))).close()
    received = [done for done, _ in encrypted.receiver.progress]
    assert received == sorted(set(received))
    assert len(received) > 10
    assert encrypted.receiver.progress[-1] == (len(WEIGHTS), len(WEIGHTS))


async def test_a_key_that_is_not_released_takes_nothing(encrypted: Encrypted) -> None:
    encrypted.kms.error = KmsError("kms_denied", "the key's policy asks for another PCR17")
    assert await encrypted.refusal(encrypted.sealing.seal(WEIGHTS)) is encrypted.kms.error
    assert encrypted.receiver.progress == []
    assert len(encrypted.kms.asked) == 1


HARMED: dict[str, tuple[Callable[[list[bytes], int], Sequence[bytes]], str]] = {
    "changed": (lambda r, n: [*r[:n], r[n][:-1] + bytes([r[n][-1] ^ 1]), *r[n + 1 :]], "tampered_record"),
    "swapped with the next": (lambda r, n: [*r[:n], r[n + 1], r[n], *r[n + 2 :]], "tampered_record"),
    "left out": (lambda r, n: [*r[:n], *r[n + 1 :]], "tampered_record"),
    "twice": (lambda r, n: [*r[: n + 1], *r[n:]], "tampered_record"),
    "cut short": (lambda r, n: [*r[:n], r[n][:-16], *r[n + 1 :]], "tampered_record"),
    "the end": (lambda r, n: r[:n], "truncated_envelope"),
    "cut within": (lambda r, n: [*r[:n], r[n][: len(r[n]) // 2]], "tampered_record"),
}


@pytest.mark.parametrize("harm", HARMED)
async def test_every_chunk_that_is_not_what_it_was_is_named(encrypted: Encrypted, harm: str) -> None:
    change, code = HARMED[harm]
    header, records = split_records(encrypted.sealing.seal(WEIGHTS))
    assert len(records) == 17
    last = len(records) - (2 if harm == "swapped with the next" else 1)
    for index in range(last + (harm in ("changed", "cut within"))):
        error = await encrypted.refusal(header + b"".join(change(records, index)))
        assert isinstance(error, EnvelopeError)
        assert error.code == code
        named = index + 1 if harm == "twice" else index
        assert f"record {named}" in f"{error.expected}", (harm, index)


async def test_a_chunk_of_the_same_model_in_another_envelope(encrypted: Encrypted) -> None:
    """Sealed under the same data key, even."""
    sealing = encrypted.sealing
    header, records = split_records(sealing.seal(WEIGHTS))
    _, others = split_records(sealing.seal(WEIGHTS))
    for index in (0, 8, 16):
        mixed = [*records[:index], others[index], *records[index + 1 :]]
        error = await encrypted.refusal(header + b"".join(mixed))
        assert (error.code, error.expected) == ("tampered_record", f"record {index} as it was sealed")


async def test_a_store_that_breaks_off_is_asked_from_there(encrypted: Encrypted) -> None:
    envelope = encrypted.sealing.seal(WEIGHTS)

    async def piece(call: IncomingCall, offset: int) -> None:
        await call.send(envelope[offset : offset + 123_457])
        raise Fault("unavailable")

    store = EncryptedStore(envelope, piece)
    model = await encrypted.receive(store, Patience(attempts=2, first_pause_seconds=0))
    assert content_of(model) == WEIGHTS
    assert store.offsets == list(range(0, len(envelope), 123_457))
    assert len(encrypted.kms.asked) == 1, "the key is kept for the rest"
    model.close()


@pytest.mark.parametrize("held", [10, 300, 70_000, 500_000])
async def test_a_store_that_restarts_in_mid_transfer(encrypted: Encrypted, held: int) -> None:
    """Within the header, within the first record and later: it goes on at the byte where it was."""
    envelope, arrived = encrypted.sealing.seal(WEIGHTS), asyncio.Event()

    async def first_part(call: IncomingCall, offset: int) -> None:
        await call.send(envelope[:held])
        arrived.set()
        await asyncio.Event().wait()

    first, second = EncryptedStore(envelope, first_part), EncryptedStore(envelope)
    receiver, limits = encrypted.receiver, Limits(drain=0.05)
    async with serve(receiver.address, first.handlers, on_error=print, limits=limits) as server:
        patience = Patience(first_pause_seconds=0.001)
        receiving = asyncio.ensure_future(receiver.receive(None, keys=encrypted.keys, patience=patience))
        await arrived.wait()
        await server.close()
        async with serve(receiver.address, second.handlers, on_error=print, limits=limits):
            model = await receiving
    [offset] = second.offsets
    assert 0 <= offset <= held
    assert content_of(model) == WEIGHTS
    model.close()


async def test_a_store_that_brings_another_envelope_after_its_restart(encrypted: Encrypted) -> None:
    """Of the same model, for the same enclave, as large, and under the same data key."""
    one, other = (encrypted.sealing.but(data_key=bytes(32)).seal(WEIGHTS) for _ in range(2))
    assert len(one) == len(other)

    async def change(call: IncomingCall, offset: int) -> None:
        if offset == 0:
            await call.send(one[:200_000])
            raise Fault("unavailable")
        await call.send(other[offset:], end=True)

    error = await encrypted.refusal_by(EncryptedStore(one, change))
    assert error.code == "tampered_record"
    assert "record 3" in f"{error.expected}" or "record 2" in f"{error.expected}"


@pytest.mark.parametrize("change", [-1, 1])
async def test_a_store_that_changes_the_envelopes_size(encrypted: Encrypted, change: int) -> None:
    envelope = encrypted.sealing.seal(WEIGHTS)

    async def half(call: IncomingCall, offset: int) -> None:
        await call.send(envelope[offset : offset + 500_000])
        raise Fault("unavailable")

    store = EncryptedStore(envelope, half, size=lambda offset: len(envelope) + (change if offset else 0))
    error = await encrypted.refusal_by(store)
    assert isinstance(error, ModelRefused)
    assert (error.code, error.message) == ("wrong_model", "the store changed the envelope")
    assert (error.expected, error.got) == (str(len(envelope)), str(len(envelope) + change))
    assert len(store.offsets) == 2


@pytest.mark.parametrize("size", ["none", "all of it", True, b"7"])
async def test_a_store_that_does_not_say_how_large_it_is(encrypted: Encrypted, size: object) -> None:
    error = await encrypted.refusal_by(EncryptedStore(b"", size=lambda offset: size))
    assert (error.code, error.message) == ("wrong_model", "the store does not say how large the envelope is")
    assert encrypted.kms.asked == []


@pytest.mark.parametrize("size", [-1, 0, 1, 300, 100_000])
async def test_a_size_that_is_too_small_is_a_cut_envelope(encrypted: Encrypted, size: int) -> None:
    """The store's word decides nothing: an envelope ends with its final record."""
    envelope = encrypted.sealing.seal(WEIGHTS)

    async def so_much(call: IncomingCall, offset: int) -> None:
        await call.send(envelope[: max(size, 1)], end=True)

    error = await encrypted.refusal_by(EncryptedStore(envelope, so_much, size=lambda offset: size))
    assert error.code in ("truncated_envelope", "tampered_record")


async def test_a_size_that_is_too_large_is_never_reached(encrypted: Encrypted) -> None:
    envelope = encrypted.sealing.seal(WEIGHTS)
    error = await encrypted.refusal_by(EncryptedStore(envelope, size=lambda offset: len(envelope) + 1))
    assert isinstance(error, StoreFailed)
    assert "ended the file early" in error.message


async def test_bytes_behind_the_envelope(encrypted: Encrypted) -> None:
    error = await encrypted.refusal(encrypted.sealing.seal(WEIGHTS) + b"\x00")
    assert (error.code, error.expected) == ("tampered_record", "record 16 as it was sealed")


async def test_a_plain_file_in_place_of_an_envelope(encrypted: Encrypted) -> None:
    error = await encrypted.refusal(WEIGHTS)
    assert error.code == "malformed_envelope"
    assert encrypted.kms.asked == []
    assert encrypted.receiver.progress == []


async def test_the_parents_store_does_not_mix_them_up(encrypted: Encrypted, tmp_path: Path) -> None:
    path = tmp_path / "w.gguf"
    path.write_bytes(WEIGHTS)
    plain = ModelStore(manifest_of(WEIGHTS), path)
    with pytest.raises(StoreFailed, match="in plain, and not encrypted"):
        await encrypted.receiver.receive(dict(plain.handlers), keys=encrypted.keys)
    path.write_bytes(encrypted.sealing.seal(WEIGHTS))
    sealed = ModelStore(manifest_of(WEIGHTS), path, encrypted=True)
    with pytest.raises(StoreFailed, match="encrypted, and not in plain"):
        await encrypted.receiver.receive(dict(sealed.handlers))
    assert encrypted.kms.asked == []


async def test_an_envelope_with_less_than_the_file(encrypted: Encrypted) -> None:
    for size in (0, 1, RECORD, len(WEIGHTS) - 1):
        error = await encrypted.refusal(encrypted.sealing.seal(WEIGHTS[:size]))
        assert isinstance(error, ModelRefused)
        assert (error.code, error.message) == ("wrong_model", "the envelope holds less than the file")
        assert (error.expected, error.got) == (str(len(WEIGHTS)), str(size))


async def test_an_envelope_with_more_than_the_file(encrypted: Encrypted) -> None:
    for more in (b"\x00", bytes(3 * RECORD)):
        error = await encrypted.refusal(encrypted.sealing.seal(WEIGHTS + more))
        assert (error.code, error.got) == ("wrong_model", "more")


async def test_an_envelope_with_another_file(encrypted: Encrypted) -> None:
    """For this model, by its own words, and as large: what counts is the digest of what came out of it."""
    other = WEIGHTS[:-1] + bytes([WEIGHTS[-1] ^ 1])
    error = await encrypted.refusal(encrypted.sealing.seal(other))
    assert (error.code, error.got) == ("wrong_model", sha384(other).hexdigest())


@pytest.mark.parametrize(
    ("changed", "code"),
    [
        ({"purpose": PROMPT}, "wrong_purpose"),
        ({"context": "production"}, "wrong_context"),
        ({"version": FLOOR - 1}, "rolled_back"),
        ({"models": (b"\x22" * 48,)}, "wrong_model"),
        ({"configurations": (b"\x22" * 48,)}, "wrong_configuration"),
    ],
)
async def test_an_envelope_for_somebody_else(encrypted: Encrypted, changed: dict[str, object], code: str) -> None:
    error = await encrypted.refusal(encrypted.sealing.but(**changed).seal(WEIGHTS))
    assert isinstance(error, EnvelopeError)
    assert error.code == code
    assert encrypted.receiver.progress == []


async def test_a_cancelled_release_gives_its_memory_back(encrypted: Encrypted) -> None:
    encrypted.kms.held = asyncio.Event()
    store = EncryptedStore(encrypted.sealing.seal(WEIGHTS))
    receiving = asyncio.ensure_future(encrypted.receive(store))
    while not encrypted.kms.asked:  # noqa: ASYNC110 - it tells nobody
        await asyncio.sleep(0)
    receiving.cancel()
    with pytest.raises(asyncio.CancelledError):
        await receiving


# --- Weights in the image -----------------------------------------------------------------------------------------


def open_baked(path: Path, *, manifest: ModelManifest | None = None, max_bytes: int = 1 << 30) -> SealedModel:
    digest = (manifest or ModelManifest.from_gguf(path)).digest()
    return open_model(path, digest, max_bytes=max_bytes, progress=lambda done, total: None)


@pytest.fixture
def baked(tmp_path: Path) -> Path:
    path = tmp_path / "w.gguf"
    path.write_bytes(WEIGHTS)
    return path


def test_a_model_in_the_image_is_read_where_it_is(baked: Path) -> None:
    steps: list[tuple[int, int]] = []
    manifest = ModelManifest.from_gguf(baked)
    model = open_model(baked, manifest.digest(), max_bytes=len(WEIGHTS), progress=lambda *step: steps.append(step))
    try:
        assert model.manifest == manifest
        assert os.pread(model.fd, len(WEIGHTS) + 1, 0) == WEIGHTS
        assert not os.get_inheritable(model.fd)
        assert steps[-1] == (len(WEIGHTS), len(WEIGHTS))
        with pytest.raises(OSError, match="Bad file descriptor"):
            os.pwrite(model.fd, b"x", 0)
    finally:
        model.close()


@pytest.mark.parametrize("spoil", [lambda data: data[:-1] + b"x", lambda data: data + b"x", lambda data: data[:-1]])
def test_another_model_in_the_image_is_refused(baked: Path, spoil: Callable[[bytes], bytes]) -> None:
    manifest = ModelManifest.from_gguf(baked)
    baked.write_bytes(spoil(WEIGHTS))
    before = len(os.listdir("/proc/self/fd"))
    with pytest.raises((ModelRefused, ModelError)) as raised:
        open_baked(baked, manifest=manifest)
    assert raised.value.code in ("wrong_manifest", "malformed_gguf", "truncated_gguf")
    assert len(os.listdir("/proc/self/fd")) == before


def test_a_model_in_the_image_keeps_to_the_bound(baked: Path) -> None:
    with pytest.raises(ModelRefused) as raised:
        open_baked(baked, max_bytes=len(WEIGHTS) - 1)
    assert raised.value.code == "model_too_large"


def test_a_model_that_is_not_in_the_image(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        open_baked(tmp_path / "absent.gguf", manifest=manifest_of(WEIGHTS))
