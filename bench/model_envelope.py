"""An encrypted model: its envelope's bytes opened record by record, and the weights hashed on a thread meanwhile.

It is held against SHA-256 of the same bytes and nothing else, which is the limit. Once the envelope stands in memory,
in records of several sizes; once, for the record, it comes over the RPC on a Unix socket from another process, which
takes its share of this machine's CPUs where a model store has those of the parent. Every run has a process of its own;
the kinds take turns.
"""

from __future__ import annotations

import argparse
import asyncio
import hashlib
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Iterator
from statistics import median

from attestation.envelope import MODEL_RECORD, EnvelopeHeader, EnvelopePurpose, Terms
from attestation.envelope_records import Opener, Sealer
from attestation.keypolicy.document import KeyArn
from attestation.secret import Secret
from bench import Row, peak_memory
from vsockrpc.address import UnixAddress
from vsockrpc.digest import HashingSink
from vsockrpc.limits import BULK
from vsockrpc.transport import IncomingCall, connect, serve

ALGORITHM = "sha256"
BLOCK = bytes(range(256)) * 4096
"""One MiB, which the model repeats."""
MIB = 1 << 20
PIECE = 256 << 10
"""Bytes that come at once, where they come from memory."""
RECORDS = (64 << 10, 256 << 10, MODEL_RECORD, 4 << 20)
MIN_RATIO = 0.8

KEY = KeyArn.parse("arn:aws:kms:us-east-1:111122223333:key/1234abcd-12ab-34cd-56ef-1234567890ab")
DATA_KEY = Secret(bytes(range(32)))
MODEL, CONFIGURATION = bytes(48), b"c" * 48
TERMS = Terms(EnvelopePurpose.MODEL, (MODEL,), (CONFIGURATION,))


def rows(size: int = 1 << 30, runs: int = 5) -> list[Row]:
    """``runs`` of each kind over ``size`` bytes of model: medians, and the ratio to the hash alone, run by run (above 1
    is faster).
    """
    kinds = ["hash", "rpc", *(f"memory-{record}" for record in RECORDS)]
    measured: dict[str, list[dict[str, float]]] = {kind: [] for kind in kinds}
    for _ in range(runs):
        for kind, results in measured.items():
            results.append(_run(kind, size))
    rate = {kind: median(size / MIB / result["seconds"] for result in results) for kind, results in measured.items()}
    ratio = {
        kind: median(
            bare["seconds"] / ours["seconds"] for bare, ours in zip(measured["hash"], measured[kind], strict=True)
        )
        for kind in kinds
    }
    peak = max(result["peak_rss"] for result in measured["rpc"]) / MIB
    memory = f"memory-{MODEL_RECORD}"
    bare = f"{rate['hash']:.0f} MiB/s (SHA-256 of the same bytes)"
    others = [(record, f"memory-{record}") for record in RECORDS]
    return [
        Row(
            f"{size // MIB} MiB of encrypted model, opened and hashed",
            f"{rate[memory]:.0f} MiB/s",
            bare,
            f"{ratio[memory]:.2f}",
            f">= {MIN_RATIO}",
            ratio[memory] >= MIN_RATIO,
        ),
        Row(
            f"the same, in records of {' / '.join(f'{record >> 10}' for record, _ in others)} KiB",
            f"{' / '.join(f'{rate[kind]:.0f}' for _, kind in others)} MiB/s",
            bare,
            " / ".join(f"{ratio[kind]:.2f}" for _, kind in others),
            "for the record",
        ),
        Row(
            "the same, over the RPC on a Unix socket from another process",
            f"{rate['rpc']:.0f} MiB/s, receiver's peak {peak:.0f} MiB",
            bare,
            f"{ratio['rpc']:.2f}",
            "for the record",
        ),
    ]


def _run(kind: str, size: int) -> dict[str, float]:
    with tempfile.TemporaryDirectory() as folder:
        done = subprocess.run(_command(kind, f"{folder}/s", size), check=True, capture_output=True, text=True)
    result: dict[str, float] = json.loads(done.stdout)
    return result


def _command(role: str, path: str, size: int) -> list[str]:
    return [sys.executable, "-m", "bench.model_envelope", "--role", role, "--socket", path, "--size", str(size)]


def envelope(record: int, size: int) -> Iterator[bytes]:
    """An envelope of ``size`` bytes of model, in pieces of about a record."""
    header = EnvelopeHeader(EnvelopePurpose.MODEL, KEY, "bench", 1, b"wrapped", record)
    sealer = Sealer(header, TERMS, DATA_KEY)
    for _ in range(size // len(BLOCK)):
        yield from sealer.seal(BLOCK)
    yield sealer.finish()


# --- Who opens ------------------------------------------------------------------------------------


async def _open(chunks: AsyncIterator[bytes | memoryview]) -> str:
    """Opens what comes, and hashes it on a thread. The first chunk holds the header."""
    first = bytes(await anext(chunks))
    header, start = EnvelopeHeader.split(first)
    opener = Opener(header, DATA_KEY, model=MODEL, configuration=CONFIGURATION)
    with HashingSink(ALGORITHM) as sink:
        for piece in opener.feed(first[start:]):
            await sink.feed(piece)
        async for chunk in chunks:
            for piece in opener.feed(chunk):
                await sink.feed(piece)
        await sink.feed(opener.finish())
        return (await sink.finish()).hex()


def _open_from_rpc(path: str, size: int) -> tuple[float, str]:
    async def receive() -> tuple[float, str]:
        async with connect(UnixAddress(path), limits=BULK) as client:
            begin = time.perf_counter()
            async with client.call("model.envelope", {}) as call:
                await call.send(b"", end=True)
                digest = await _open(aiter(call))
            return time.perf_counter() - begin, digest

    with subprocess.Popen(_command("sender", path, size), stdin=subprocess.PIPE, stdout=subprocess.PIPE) as sender:
        assert sender.stdin is not None
        assert sender.stdout is not None
        sender.stdout.readline()
        result = asyncio.run(receive())
        sender.stdin.close()
    return result


def _open_from_memory(record: int, size: int) -> tuple[float, str]:
    stored = memoryview(b"".join(envelope(record, size)))

    async def chunks() -> AsyncIterator[bytes | memoryview]:
        for start in range(0, len(stored), PIECE):
            yield stored[start : start + PIECE]

    begin = time.perf_counter()
    digest = asyncio.run(_open(chunks()))
    return time.perf_counter() - begin, digest


def _hash(size: int) -> tuple[float, str]:
    begin, digest = time.perf_counter(), hashlib.new(ALGORITHM)
    for _ in range(size // len(BLOCK)):
        digest.update(BLOCK)
    return time.perf_counter() - begin, digest.hexdigest()


def _opener(kind: str, path: str, size: int) -> None:
    if kind == "rpc":
        seconds, digest = _open_from_rpc(path, size)
    elif kind == "hash":
        seconds, digest = _hash(size)
    else:
        seconds, digest = _open_from_memory(int(kind.partition("-")[2]), size)
    peak = peak_memory()
    if digest != _hash(size)[1]:
        raise SystemExit("what was opened is not what was sealed")
    print(json.dumps({"seconds": seconds, "peak_rss": peak}))


# --- Who sends ------------------------------------------------------------------------------------


def _sender(path: str, size: int) -> None:
    pieces = list(envelope(MODEL_RECORD, size))

    async def stored(call: IncomingCall) -> None:
        await call.reply({})
        for piece in pieces:
            await call.send(piece)

    async def run() -> None:
        async with serve(UnixAddress(path), {"model.envelope": stored}, on_error=_fail, limits=BULK):
            print("ready", flush=True)
            await asyncio.to_thread(sys.stdin.read)

    asyncio.run(run())


def _fail(error: BaseException) -> None:
    raise error


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.model_envelope", description=__doc__)
    parser.add_argument(
        "--size", type=int, default=1 << 30, help="bytes of model, a multiple of 1 MiB (default: 1 GiB)"
    )
    parser.add_argument("--runs", type=int, default=5, help="runs of each kind (default: 5)")
    parser.add_argument("--role", help=argparse.SUPPRESS)
    parser.add_argument("--socket", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.size <= 0 or options.size % len(BLOCK):
        parser.error("--size is not a positive multiple of 1 MiB")
    if options.role is None:
        for row in rows(options.size, options.runs):
            print(row)
    elif options.role == "sender":
        _sender(options.socket, options.size)
    else:
        _opener(options.role, options.socket, options.size)


if __name__ == "__main__":
    main()
