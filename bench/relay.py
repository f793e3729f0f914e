"""The proxy as a relay, against socat: the same bytes from a Unix socket to a TCP client. For the record.

socat copies bytes and knows nothing; the proxy frames them in HTTP, keeps calls apart on one connection, grants windows
and counts. The enclave's side is a stand-in that sends zeros as the answer to a sealed call.
"""

from __future__ import annotations

import asyncio
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import httpx2

from bench import Row
from bench.house import command
from vsockrpc.address import UnixAddress
from vsockrpc.http import KEY_ID_HEADER, SEALED_TYPE
from vsockrpc.transport import IncomingCall, serve

SIZE = 256 << 20
PIECE = bytes(1 << 16)
RUNS = 3


async def source(folder: Path) -> None:
    """Answers a sealed call with SIZE zeros, and a plain connection with as many."""

    async def sealed(call: IncomingCall) -> None:
        await call.read(1 << 20)
        await call.reply({})
        for _ in range(SIZE // len(PIECE)):
            await call.send(PIECE)

    async def plain(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        for _ in range(SIZE // len(PIECE)):
            writer.write(PIECE)
            await writer.drain()
        writer.close()

    bare = await asyncio.start_unix_server(plain, folder / "plain.sock")
    async with bare, serve(UnixAddress(str(folder / "rpc.sock")), {"sealed": sealed}, on_error=lambda error: None):
        print("ready", flush=True)
        await asyncio.Event().wait()


def cpu_seconds(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def through_proxy(url: str) -> int:
    headers = {"content-type": SEALED_TYPE, KEY_ID_HEADER: "00" * 16}
    with (
        httpx2.Client(trust_env=False, timeout=120) as http,
        http.stream("POST", f"{url}/v1/sealed", headers=headers) as response,
    ):
        response.raise_for_status()
        return sum(len(chunk) for chunk in response.iter_raw())


def through_socat(port: int) -> int:
    with socket.create_connection(("127.0.0.1", port)) as connection:
        received = 0
        while data := connection.recv(1 << 16):
            received += len(data)
        return received


def rows() -> list[Row]:
    socat = shutil.which("socat")
    if socat is None:
        return [Row("relay", "not measured", "socat is not installed: apt-get install socat")]
    with tempfile.TemporaryDirectory(prefix="sr-relay-") as name:
        folder = Path(name)
        feeding = subprocess.Popen([sys.executable, "-m", "bench.relay", str(folder)], stdout=subprocess.PIPE)
        assert feeding.stdout is not None
        feeding.stdout.readline()
        with socket.create_server(("127.0.0.1", 0)) as free:
            port = free.getsockname()[1]
        peer = subprocess.Popen(
            [socat, f"TCP-LISTEN:{port},bind=127.0.0.1,reuseaddr,fork", f"UNIX-CONNECT:{folder}/plain.sock"]
        )
        try:
            with command("proxy", "--enclave", f"unix:{folder}/rpc.sock", "--listen", "127.0.0.1:0", "--json") as proxy:
                return [_compare(f"http://{proxy['listening']}", int(proxy["pid"]), port, peer.pid)]
        finally:
            for process in (peer, feeding):
                process.terminate()
                process.wait()


def _compare(url: str, proxy: int, port: int, socat: int) -> Row:
    seconds = {"proxy": 0.0, "socat": 0.0}
    before = cpu_seconds(proxy), _with_children(socat)
    for _ in range(RUNS):
        for name in seconds:
            begun = time.perf_counter()
            received = through_proxy(url) if name == "proxy" else through_socat(port)
            seconds[name] += time.perf_counter() - begun
            assert received == SIZE, f"{name} relayed {received} bytes"
    total = RUNS * SIZE / 1e6
    cpu = cpu_seconds(proxy) - before[0], _with_children(socat) - before[1]
    ours, theirs = (
        f"{total / seconds[name]:.0f} MB/s, {used * 1e3 / total:.2f} CPU s/GB"
        for name, used in zip(seconds, cpu, strict=True)
    )
    return Row(
        "relay of 256 MiB to one client",
        ours,
        f"{theirs} (socat)",
        f"{seconds['socat'] / seconds['proxy']:.2f}",
        "for the record",
    )


def _with_children(pid: int) -> float:
    """CPU seconds of a process and of those of its children that it has waited for: socat forks for each connection."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return sum(int(field) for field in fields[11:15]) / os.sysconf("SC_CLK_TCK")


if __name__ == "__main__":
    asyncio.run(source(Path(sys.argv[1])))
