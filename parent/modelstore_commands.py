"""``strongroom model-store``: a model's file for an enclave that runs by itself on this host."""

from __future__ import annotations

import asyncio
import json
import signal
import sys
from pathlib import Path

import click
from rich.console import Console

from attestation.envelope import MAGIC
from attestation.manifest import ModelManifest
from attestation.reference import digest_text
from parent.egress_service import report_defect
from parent.modelstore import MANIFEST_SUFFIX, ModelStore
from parent.progress import BootProgress
from parent.start_command import manifest_beside
from vsockrpc.address import parse_address
from vsockrpc.errors import AddressError
from vsockrpc.transport import serve

err = Console(stderr=True, highlight=False)


@click.command("model-store")
@click.option(
    "--listen",
    "listening",
    required=True,
    metavar="ADDRESS",
    help="Where the enclave connects: vsock:any:PORT, unix:PATH or tcp:HOST:PORT.",
)
@click.option(
    "--model",
    type=click.Path(path_type=Path, exists=True, dir_okay=False),
    required=True,
    help=f"The GGUF file. An encrypted one has its manifest in a file beside it, with {MANIFEST_SUFFIX} appended to "
    "the name.",
)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON line when ready.")
def model_store(listening: str, model: Path, as_json: bool) -> None:
    """Give an enclave its model's file.

    For hosts where the enclave was started by other means; `strongroom start` brings its own. The file is read once to
    make its manifest, and sent to whoever asks for the manifest's digest: it is public or encrypted, and the enclave
    compares what it receives with what its measured configuration pins.

    \b
    Example:
      strongroom model-store --listen vsock:any:5006 --model /var/lib/strongroom/SmolLM2.gguf

    Exit codes: 0 stopped by a signal, 2 an option that cannot be meant, 4 the address cannot be listened at.
    """
    try:
        address = parse_address(listening)
    except AddressError as error:
        raise click.BadParameter(str(error), param_hint="--listen") from error
    with model.open("rb") as file:
        encrypted = file.read(len(MAGIC)) == MAGIC
    with BootProgress(err, quiet=as_json) as progress:
        manifest = manifest_beside(model) if encrypted else ModelManifest.from_gguf(model, progress=progress.hashing)
    store = ModelStore(manifest, model.resolve(), encrypted=encrypted)

    async def serve_until_told() -> None:
        stopping, loop = asyncio.Event(), asyncio.get_running_loop()
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.add_signal_handler(number, stopping.set)
        async with serve(address, store.handlers, on_error=report_defect) as server:
            digest = digest_text(manifest.digest())
            ready = {"listening": str(server.address), "model": manifest.name, "manifest": digest}
            click.echo(json.dumps(ready) if as_json else f"model store: {server.address}, {manifest.name} {digest}")
            sys.stdout.flush()
            await stopping.wait()

    asyncio.run(serve_until_told())
