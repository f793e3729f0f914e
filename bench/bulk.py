"""Bulk transfer: bytes over the RPC on a Unix socket between two processes, hashed as they arrive.

It is held against a plain socket copy that hashes the same bytes in the same loop, in Python; a copy that hashes
nothing stands beside them for the record. Every run has a receiver and a sender process of its own; the three kinds
take turns.
"""

from __future__ import annotations

import argparse
import asyncio
import hashlib
import json
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from statistics import median

from bench import Row, peak_memory
from vsockrpc.address import UnixAddress
from vsockrpc.digest import HashingSink
from vsockrpc.limits import BULK
from vsockrpc.transport import IncomingCall, connect, serve

ALGORITHM = "sha256"
BLOCK = bytes(range(256)) * 4096
"""One MiB, which the sender repeats."""
MIB = 1 << 20
MAX_PEAK_MIB = 128
"""What the receiver may ever hold, Python and all: far less than what it receives."""


def rows(size: int = 1 << 30, runs: int = 5) -> list[Row]:
    """``runs`` transfers of ``size`` bytes of each kind: medians, and the RPC's ratio to the plain copy, run by run
    (above 1 is faster).
    """
    measured: dict[str, list[dict[str, float]]] = {"rpc": [], "plain": [], "bare": []}
    for _ in range(runs):
        for kind, results in measured.items():
            results.append(_run(kind, size))
    rate = {kind: median(size / MIB / result["seconds"] for result in results) for kind, results in measured.items()}
    peak = max(result["peak_rss"] for result in measured["rpc"]) / MIB
    ratio = median(
        plain["seconds"] / rpc["seconds"] for plain, rpc in zip(measured["plain"], measured["rpc"], strict=True)
    )
    return [
        Row(
            f"{size // MIB} MiB over the RPC on a Unix socket, SHA-256 as it arrives",
            f"{rate['rpc']:.0f} MiB/s, receiver's peak {peak:.0f} MiB",
            f"{rate['plain']:.0f} MiB/s (plain socket copy with SHA-256 in one loop)",
            f"{ratio:.2f}",
            f">= 1.0, peak <= {MAX_PEAK_MIB} MiB",
            ratio >= 1.0 and peak <= MAX_PEAK_MIB,
        ),
        Row(
            "the same bytes, nothing hashed", "", f"{rate['bare']:.0f} MiB/s (plain socket copy)", "", "for the record"
        ),
    ]


def _run(kind: str, size: int) -> dict[str, float]:
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "bench.bulk", "--role", f"{kind}-receiver", "--socket", f"{folder}/s"]
        done = subprocess.run([*command, "--size", str(size)], check=True, capture_output=True, text=True)
    result: dict[str, float] = json.loads(done.stdout)
    return result


# --- The receivers, each a process ----------------------------------------------------------------


def _receive_rpc(path: str, size: int) -> tuple[float, str]:
    async def receive() -> tuple[float, str]:
        async with connect(UnixAddress(path), limits=BULK) as client:
            begin = time.perf_counter()
            with HashingSink(ALGORITHM) as sink:
                async with client.call("bulk", {"size": size}) as call:
                    await call.send(b"", end=True)
                    async for piece in call:
                        await sink.feed(piece)
                digest = await sink.finish()
            return time.perf_counter() - begin, digest.hex()

    return asyncio.run(receive())


def _receive_plain(path: str, size: int) -> tuple[float, str]:
    digest = hashlib.new(ALGORITHM)
    return _copy(path, digest.update), digest.hexdigest()


def _receive_bare(path: str, size: int) -> tuple[float, str]:
    return _copy(path, lambda piece: None), ""


def _copy(path: str, take: Callable[[memoryview], None]) -> float:
    buffer = memoryview(bytearray(256 * 1024))
    with socket.socket(socket.AF_UNIX) as sock:
        sock.connect(path)
        begin = time.perf_counter()
        while count := sock.recv_into(buffer):
            take(buffer[:count])
        return time.perf_counter() - begin


# --- The senders ----------------------------------------------------------------------------------


def _send_rpc(path: str, size: int) -> None:
    async def bulk(call: IncomingCall) -> None:
        await call.reply({})
        for _ in range(size // len(BLOCK)):
            await call.send(BLOCK)

    async def run() -> None:
        async with serve(UnixAddress(path), {"bulk": bulk}, on_error=_fail, limits=BULK):
            _say_ready()
            await asyncio.to_thread(sys.stdin.read)

    asyncio.run(run())


def _send_plain(path: str, size: int) -> None:
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(path)
        listener.listen()
        _say_ready()
        with listener.accept()[0] as sock:
            for _ in range(size // len(BLOCK)):
                sock.sendall(BLOCK)


def _say_ready() -> None:
    print("ready", flush=True)


def _fail(error: BaseException) -> None:
    raise error


RECEIVERS = {"rpc": _receive_rpc, "plain": _receive_plain, "bare": _receive_bare}
SENDERS = {"rpc": _send_rpc, "plain": _send_plain, "bare": _send_plain}


def _receiver(kind: str, path: str, size: int) -> None:
    command = [sys.executable, "-m", "bench.bulk", "--role", f"{kind}-sender", "--socket", path, "--size", str(size)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as sender:
        assert sender.stdin is not None
        assert sender.stdout is not None
        sender.stdout.readline()
        seconds, digest = RECEIVERS[kind](path, size)
        sender.stdin.close()
    expected = hashlib.new(ALGORITHM)
    for _ in range(size // len(BLOCK)):
        expected.update(BLOCK)
    if digest and digest != expected.hexdigest():
        raise SystemExit("the bytes that arrived are not those that were sent")
    peak = peak_memory()
    print(json.dumps({"seconds": seconds, "peak_rss": peak}))


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.bulk", description=__doc__)
    parser.add_argument("--size", type=int, default=1 << 30, help="bytes, a multiple of 1 MiB (default: 1 GiB)")
    parser.add_argument("--runs", type=int, default=5, help="runs of each kind (default: 5)")
    parser.add_argument("--role", help=argparse.SUPPRESS)
    parser.add_argument("--socket", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.size <= 0 or options.size % len(BLOCK):
        parser.error("--size is not a positive multiple of 1 MiB")
    if options.role is None:
        for row in rows(options.size, options.runs):
            print(row)
        return
    kind, _, side = options.role.partition("-")
    if side == "receiver":
        _receiver(kind, options.socket, options.size)
    else:
        SENDERS[kind](options.socket, options.size)


if __name__ == "__main__":
    main()
