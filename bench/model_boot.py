"""The weights' way into an enclave at boot, encrypted against plain: from the model store in another process, over the
RPC on a Unix socket, into reserved memory, hashed with SHA-384 and sealed against any change.

Both sides are :func:`enclave.model.receive_model`; for one of them the file is an envelope, whose key is there at once
(what its release costs is measured elsewhere). Every run has a process of its own; the two take turns.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from statistics import median

from attestation.envelope import MODEL_RECORD, EnvelopeHeader, EnvelopePurpose, Terms
from attestation.envelope_records import Sealer
from attestation.keypolicy.document import KeyArn
from attestation.manifest import ModelManifest
from attestation.secret import Secret
from bench import Row
from enclave.config import WrappedKey
from enclave.kms.release import EnvelopeKeys
from enclave.model import receive_model
from parent.modelstore import ModelStore
from tests.gguf_files import TEXT, Gguf
from vsockrpc.address import UnixAddress
from vsockrpc.limits import BULK
from vsockrpc.transport import serve

MIB = 1 << 20
BLOCK = bytes(range(256)) * 4096
"""One MiB, which the weights repeat."""
KINDS = ("encrypted", "plain")
KEY = WrappedKey(
    KeyArn.parse("arn:aws:kms:us-east-1:111122223333:key/1234abcd-12ab-34cd-56ef-1234567890ab"), "bench", 1
)
DATA_KEY = Secret(bytes(range(32)))
CONFIGURATION = b"c" * 48


def rows(size: int = 1 << 30, runs: int = 5) -> list[Row]:
    """``runs`` of each kind over a model of ``size`` bytes: medians, and the ratio of their speeds, run by run."""
    measured: dict[str, list[float]] = {kind: [] for kind in KINDS}
    with tempfile.TemporaryDirectory() as folder:
        # In a process that ends: whatever is started later would inherit its peak of memory as its own.
        subprocess.run([*_command("writer", folder), "--size", str(size)], check=True)
        with _store(folder):
            for _ in range(runs):
                for kind, taken in measured.items():
                    taken.append(_run(kind, folder))
    ours, theirs = (median(size / MIB / seconds for seconds in measured[kind]) for kind in KINDS)
    ratio = median(plain / encrypted for encrypted, plain in zip(*measured.values(), strict=True))
    return [
        Row(
            f"{size // MIB} MiB of encrypted model at boot: received, opened, hashed with SHA-384, in sealed memory",
            f"{ours:.0f} MiB/s",
            f"{theirs:.0f} MiB/s (the same model not encrypted)",
            f"{ratio:.2f}",
            "for the record",
        )
    ]


def _write(folder: Path, size: int) -> None:
    """The model, its manifest, and its envelope."""
    weights = Gguf(
        [("tokenizer.chat_template", TEXT, "{{ messages }}")],
        [("w", 0, (256, 1024 * (size // MIB)), BLOCK * (size // MIB))],
    ).encode()
    plain = folder / "plain.gguf"
    plain.write_bytes(weights)
    manifest = ModelManifest.from_gguf(plain)
    (folder / "manifest").write_bytes(manifest.encode())
    header = EnvelopeHeader(EnvelopePurpose.MODEL, KEY.key, KEY.context, 1, b"wrapped", MODEL_RECORD)
    sealer = Sealer(header, Terms(EnvelopePurpose.MODEL, (manifest.digest(),), (CONFIGURATION,)), DATA_KEY)
    with (folder / "encrypted.gguf").open("wb") as file:
        file.writelines(sealer.seal(weights))
        file.write(sealer.finish())


def _run(kind: str, folder: str) -> float:
    done = subprocess.run(_command(kind, folder), check=True, stdout=subprocess.PIPE, text=True)
    seconds: float = json.loads(done.stdout)
    return seconds


def _command(role: str, folder: str) -> list[str]:
    return [sys.executable, "-m", "bench.model_boot", "--role", role, "--folder", folder]


# --- The enclave ------------------------------------------------------------------------------------------------------


class _Known:
    """A KMS that has been asked already."""

    async def decrypt(self, wrapped: bytes, *, key: KeyArn, context: Mapping[str, str]) -> Secret:
        return DATA_KEY


async def _receive(kind: str, folder: Path) -> float:
    digest = ModelManifest.decode((folder / "manifest").read_bytes()).digest()
    keys = EnvelopeKeys(_Known(), EnvelopePurpose.MODEL, KEY, model=digest, configuration=CONFIGURATION)
    begun = time.perf_counter()
    received = await receive_model(
        UnixAddress(str(folder / kind)),
        digest,
        max_bytes=1 << 40,
        progress=lambda done, total: None,
        keys=keys if kind == "encrypted" else None,
    )
    taken = time.perf_counter() - begun
    received.close()
    return taken


# --- The host ---------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def _store(folder: str) -> Iterator[None]:
    with subprocess.Popen(_command("store", folder), stdin=subprocess.PIPE, stdout=subprocess.PIPE) as store:
        assert store.stdin is not None
        assert store.stdout is not None
        store.stdout.readline()
        yield
        store.stdin.close()


async def _serve(folder: Path) -> None:
    manifest = ModelManifest.decode((folder / "manifest").read_bytes())
    async with contextlib.AsyncExitStack() as serving:
        for kind in KINDS:
            store = ModelStore(manifest, folder / f"{kind}.gguf", encrypted=kind == "encrypted")
            address = UnixAddress(str(folder / kind))
            await serving.enter_async_context(serve(address, store.handlers, on_error=_fail, limits=BULK))
        print("ready", flush=True)
        await asyncio.to_thread(sys.stdin.read)


def _fail(error: BaseException) -> None:
    raise error


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.model_boot", description=__doc__)
    parser.add_argument(
        "--size", type=int, default=1 << 30, help="bytes of weights, a multiple of 1 MiB (default: 1 GiB)"
    )
    parser.add_argument("--runs", type=int, default=5, help="runs of each kind (default: 5)")
    parser.add_argument("--role", choices=("writer", "store", *KINDS), help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.size <= 0 or options.size % MIB:
        parser.error("--size is not a positive multiple of 1 MiB")
    if options.role is None:
        for row in rows(options.size, options.runs):
            print(row)
    elif options.role == "writer":
        _write(options.folder, options.size)
    elif options.role == "store":
        asyncio.run(_serve(options.folder))
    else:
        print(json.dumps(asyncio.run(_receive(options.role, options.folder))))


if __name__ == "__main__":
    main()
