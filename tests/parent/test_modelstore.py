"""The model store, as an enclave meets it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Mapping
from hashlib import sha384
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from attestation.manifest import ManifestFile, ModelManifest
from parent.modelstore import PIECE, ModelStore
from vsockrpc.address import UnixAddress
from vsockrpc.transport import Client, Fault, connect, serve

CONTENT = bytes(range(256)) * (PIECE // 128) + b"and a last piece"
DIGEST = sha384(CONTENT).digest()


@pytest.fixture
def store(tmp_path: Path) -> ModelStore:
    path = tmp_path / "model.gguf"
    path.write_bytes(CONTENT)
    return ModelStore(ModelManifest("tiny", (ManifestFile(path.name, len(CONTENT), DIGEST),), "{{ messages }}"), path)


@pytest.fixture
async def client(store: ModelStore, tmp_path: Path) -> AsyncIterator[Client]:
    defects: list[BaseException] = []
    address = UnixAddress(str(tmp_path / "models.sock"))
    async with serve(address, store.handlers, on_error=defects.append), connect(address) as connected:
        yield connected
    assert defects == []


async def fetch(client: Client, method: str, **meta: Any) -> tuple[Mapping[str, object], bytes]:
    async with client.call(method, meta) as call:
        await call.send(b"", end=True)
        return await call.reply(), await call.read(len(CONTENT) + 1)


async def fault_of(client: Client, method: str, **meta: Any) -> str:
    with pytest.raises(Fault) as caught:
        await fetch(client, method, **meta)
    return caught.value.code


async def test_the_manifest_is_had_by_its_digest(client: Client, store: ModelStore) -> None:
    _, data = await fetch(client, "model.manifest", digest=store.manifest.digest())
    assert ModelManifest.decode(data) == store.manifest


@pytest.mark.parametrize("meta", [{}, {"digest": bytes(48)}, {"digest": "00"}, {"digest": None}])
async def test_another_manifest_is_not_here(client: Client, meta: dict[str, Any]) -> None:
    assert await fault_of(client, "model.manifest", **meta) == "unavailable"


@pytest.mark.parametrize("offset", [0, 1, PIECE - 1, PIECE, PIECE + 1, len(CONTENT) - 1, len(CONTENT)])
async def test_the_file_is_had_from_any_offset(client: Client, offset: int) -> None:
    meta, data = await fetch(client, "model.file", sha384=DIGEST, offset=offset)
    assert meta == {"size": len(CONTENT)}
    assert data == CONTENT[offset:]


@settings(max_examples=20)
@given(st.integers(0, len(CONTENT)))
def test_what_is_had_from_an_offset_is_the_rest(tmp_path_factory: pytest.TempPathFactory, offset: int) -> None:
    directory = tmp_path_factory.mktemp("store")
    path = directory / "model.gguf"
    path.write_bytes(CONTENT)
    store = ModelStore(ModelManifest("tiny", (ManifestFile("m", len(CONTENT), DIGEST),), "x"), path)
    address = UnixAddress(str(directory / "models.sock"))

    async def scenario() -> bytes:
        async with serve(address, store.handlers, on_error=print), connect(address) as client:
            return (await fetch(client, "model.file", sha384=DIGEST, offset=offset))[1]

    assert asyncio.run(scenario()) == CONTENT[offset:]


@pytest.mark.parametrize("offset", [-1, len(CONTENT) + 1, 1 << 63, True, "0", None, b"\x00"])
async def test_an_offset_outside_the_file_is_malformed(client: Client, offset: object) -> None:
    assert await fault_of(client, "model.file", sha384=DIGEST, offset=offset) == "malformed"


@pytest.mark.parametrize("digest", [bytes(48), sha384(b"").digest(), "00", None])
async def test_another_file_is_not_here(client: Client, digest: object) -> None:
    assert await fault_of(client, "model.file", sha384=digest, offset=0) == "unavailable"


async def test_a_path_cannot_be_asked_for(client: Client, tmp_path: Path) -> None:
    (tmp_path / "secret").write_text("secret")
    assert await fault_of(client, "model.file", path=str(tmp_path / "secret"), offset=0) == "unavailable"


async def test_readers_do_not_disturb_each_other(client: Client) -> None:
    offsets = [0, PIECE // 2, PIECE, len(CONTENT) - 1, 0, 7]
    had = await asyncio.gather(*(fetch(client, "model.file", sha384=DIGEST, offset=offset) for offset in offsets))
    assert [data for _, data in had] == [CONTENT[offset:] for offset in offsets]


async def test_a_reader_that_leaves_is_not_waited_for(client: Client) -> None:
    async with client.call("model.file", {"sha384": DIGEST, "offset": 0}) as call:
        await call.send(b"", end=True)
        assert await anext(call)
    _, data = await fetch(client, "model.file", sha384=DIGEST, offset=5)
    assert data == CONTENT[5:]


async def test_a_file_that_is_gone_is_said_so(client: Client, store: ModelStore) -> None:
    store.path.unlink()
    assert await fault_of(client, "model.file", sha384=DIGEST, offset=0) == "unavailable"


async def test_a_file_that_shrank_ends_early(client: Client, store: ModelStore) -> None:
    """It is for the enclave to notice: it counts, and it compares digests."""
    store.path.write_bytes(CONTENT[:100])
    _, data = await fetch(client, "model.file", sha384=DIGEST, offset=10)
    assert data == CONTENT[10:100]


# --- A model that is encrypted -------------------------------------------------------------------------------------

ENVELOPE = b"strongroom/1 envelope\n" + CONTENT[::-1] + bytes(100)


@pytest.fixture
async def sealed(store: ModelStore, tmp_path: Path) -> AsyncIterator[Client]:
    """A store that has the envelope in the file's place."""
    store.path.write_bytes(ENVELOPE)
    address, encrypted = UnixAddress(str(tmp_path / "sealed.sock")), ModelStore(store.manifest, store.path, True)
    async with serve(address, encrypted.handlers, on_error=print), connect(address) as connected:
        yield connected


@pytest.mark.parametrize("offset", [0, 1, PIECE, len(CONTENT) + 1, len(ENVELOPE) - 1, len(ENVELOPE)])
async def test_the_envelope_is_had_by_the_digest_of_what_is_in_it(sealed: Client, offset: int) -> None:
    async with sealed.call("model.envelope", {"sha384": DIGEST, "offset": offset}) as call:
        await call.send(b"", end=True)
        assert await call.reply() == {"size": len(ENVELOPE)}
        assert await call.read(len(ENVELOPE)) == ENVELOPE[offset:]


async def test_an_encrypted_model_has_its_manifest(sealed: Client, store: ModelStore) -> None:
    _, data = await fetch(sealed, "model.manifest", digest=store.manifest.digest())
    assert ModelManifest.decode(data) == store.manifest


@pytest.mark.parametrize("offset", [-1, len(ENVELOPE) + 1, True, "0", None])
async def test_an_offset_outside_the_envelope_is_malformed(sealed: Client, offset: object) -> None:
    assert await fault_of(sealed, "model.envelope", sha384=DIGEST, offset=offset) == "malformed"


@pytest.mark.parametrize("digest", [bytes(48), sha384(ENVELOPE).digest(), None])
async def test_another_envelope_is_not_here(sealed: Client, digest: object) -> None:
    assert await fault_of(sealed, "model.envelope", sha384=digest, offset=0) == "unavailable"


async def test_an_encrypted_model_is_not_had_in_plain(sealed: Client) -> None:
    assert await fault_of(sealed, "model.file", sha384=DIGEST, offset=0) == "unavailable"


async def test_a_plain_model_is_not_had_encrypted(client: Client) -> None:
    assert await fault_of(client, "model.envelope", sha384=DIGEST, offset=0) == "unavailable"


async def test_an_envelope_that_is_gone_is_said_so(sealed: Client, store: ModelStore) -> None:
    store.path.unlink()
    assert await fault_of(sealed, "model.envelope", sha384=DIGEST, offset=0) == "unavailable"
