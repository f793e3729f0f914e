"""``strongroom model-store``: a model's file for an enclave that others started."""

from __future__ import annotations

import asyncio
import json
import signal
import sys
from pathlib import Path

import pytest

from attestation.envelope import MAGIC
from attestation.manifest import ModelManifest
from attestation.reference import digest_text
from parent.modelstore import MANIFEST_SUFFIX
from tests.gguf_files import tiny_model
from vsockrpc.address import UnixAddress
from vsockrpc.transport import Fault, connect

STRONGROOM = str(Path(sys.executable).with_name("strongroom"))


@pytest.fixture
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With a path short enough for a socket."""
    return tmp_path_factory.mktemp("m")


async def started(*options: str) -> asyncio.subprocess.Process:
    return await asyncio.create_subprocess_exec(
        STRONGROOM, "model-store", *options, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE
    )


async def read(address: str, method: str, **meta: object) -> bytes:
    found = b""
    async with connect(UnixAddress(address.removeprefix("unix:"))) as client, client.call(method, meta) as call:
        await call.send(b"", end=True)
        async for piece in call:
            found += bytes(piece)
    return found


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
async def test_a_model_is_served_until_a_signal(folder: Path, number: signal.Signals) -> None:
    model = folder / "tiny.gguf"
    model.write_bytes(tiny_model().encode())
    manifest = ModelManifest.from_gguf(model)
    address = f"unix:{folder / 's'}"
    process = await started("--listen", address, "--model", str(model), "--json")
    assert process.stdout is not None
    ready = json.loads(await process.stdout.readline())
    assert ready == {"listening": address, "model": manifest.name, "manifest": digest_text(manifest.digest())}
    assert await read(address, "model.manifest", digest=manifest.digest()) == manifest.encode()
    whole = await read(address, "model.file", sha384=manifest.files[0].sha384, offset=0)
    assert whole == model.read_bytes()
    process.send_signal(number)
    out, err = await process.communicate()
    assert (process.returncode, out, err) == (0, b"", b"")
    assert not (folder / "s").exists()


async def test_an_encrypted_model_goes_as_it_is(folder: Path) -> None:
    plain = folder / "tiny.gguf"
    plain.write_bytes(tiny_model().encode())
    manifest = ModelManifest.from_gguf(plain)
    model = folder / "tiny.gguf.sealed"
    model.write_bytes(MAGIC + b"what follows")
    (folder / f"tiny.gguf.sealed{MANIFEST_SUFFIX}").write_bytes(manifest.encode())
    address = f"unix:{folder / 's'}"
    process = await started("--listen", address, "--model", str(model))
    assert process.stdout is not None
    assert (await process.stdout.readline()).decode().startswith(f"model store: {address}, {manifest.name} sha384:")
    wanted = manifest.files[0].sha384
    assert await read(address, "model.envelope", sha384=wanted, offset=0) == model.read_bytes()
    with pytest.raises(Fault):
        await read(address, "model.file", sha384=wanted, offset=0)
    process.terminate()
    await process.communicate()
    assert process.returncode == 0


@pytest.mark.parametrize(
    ("listen", "model", "status", "word"),
    [
        ("nowhere", "tiny.gguf", 2, "--listen"),
        ("unix:/nonexistent/s", "tiny.gguf", 4, "bad_address"),
        ("unix:s", "none.gguf", 2, "none.gguf"),
        ("unix:s", "broken.gguf", 2, "broken.gguf"),
        ("unix:s", "other.sealed", 2, "other.sealed.manifest"),
    ],
)
async def test_what_cannot_be_served_is_said_so(folder: Path, listen: str, model: str, status: int, word: str) -> None:
    (folder / "tiny.gguf").write_bytes(tiny_model().encode())
    (folder / "broken.gguf").write_bytes(b"GGUF and nothing else")
    (folder / "other.sealed").write_bytes(MAGIC)
    process = await started("--listen", listen, "--model", str(folder / model))
    _, err = await process.communicate()
    assert process.returncode == status
    assert word in err.decode() or (model == "broken.gguf" and b"[" in err)
    assert b"Traceback" not in err
