"""The weights' way into sealed memory, from a store that delivers and from stores that do anything else."""

from __future__ import annotations

import asyncio
import errno
import fcntl
import mmap
import os
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass, field
from hashlib import sha384
from pathlib import Path

import cbor2
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import enclave.model
from attestation.errors import StrongroomError
from attestation.gguf import ModelError
from attestation.manifest import MANIFEST_LABEL, MAX_MANIFEST_SIZE, ManifestFile, ModelManifest
from attestation.reference import h384
from enclave.model import ModelRefused, Patience, SealedModel, StoreFailed, receive_model
from parent.modelstore import ModelStore
from tests.gguf_files import TEXT, Gguf
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
        patience: Patience = QUICK,
    ) -> SealedModel:
        digest = manifest_of(WEIGHTS).digest() if digest is None else digest

        def receiving() -> Awaitable[SealedModel]:
            return receive_model(
                self.address,
                digest,
                max_bytes=max_bytes,
                progress=self._note,
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
