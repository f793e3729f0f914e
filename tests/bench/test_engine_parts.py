"""Every part of the engine's benchmark against servers that make up their tokens: it comes to its end with its rows."""

from __future__ import annotations

import contextlib
import json
import os
import threading
from collections.abc import Iterator, Sequence
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from bench.engine import __main__ as command
from bench.engine import measuring, peers, sides, threads, throughput
from bench.engine.load import Ask, Clients, Heard, Target
from bench.engine.measuring import Bench
from bench.engine.peers import Build
from bench.engine.sides import Side, Sizes

BUILD = Build("native", ("python",), "1", "-DX=1", "AVX2 = 1")


class MadeUp(BaseHTTPRequestHandler):
    """Answers with as many tokens as were asked for."""

    protocol_version = "HTTP/1.1"
    wbufsize = -1

    def handle(self) -> None:
        with contextlib.suppress(ConnectionError):  # a client that ends a stream in the background
            super().handle()

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["content-length"])))
        words = sum(len(message["content"].split()) for message in body["messages"])
        self.send_response(200)
        self.send_header("transfer-encoding", "chunked")
        self.end_headers()
        for _ in range(body["max_tokens"]):
            self._event({"choices": [{"delta": {"content": "x"}}]})
        usage = {"prompt_tokens": words, "completion_tokens": body["max_tokens"]}
        self._event({"choices": [{"delta": {}, "finish_reason": "length"}], "usage": usage})
        self._chunk(b"data: [DONE]\n\n")
        self._chunk(b"")
        self.wfile.flush()

    def _event(self, event: dict[str, Any]) -> None:
        self._chunk(b"data: " + json.dumps(event).encode() + b"\n\n")

    def _chunk(self, data: bytes) -> None:
        self.wfile.write(b"%x\r\n%s\r\n" % (len(data), data))

    def log_message(self, *message: object) -> None:
        """Nothing."""


class Server(ThreadingHTTPServer):
    daemon_threads = False
    request_queue_size = 128


@pytest.fixture
def url() -> Iterator[str]:
    server = Server(("127.0.0.1", 0), MadeUp)
    serving = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    serving.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}"
    finally:
        server.shutdown()
        serving.join()
        server.server_close()


@pytest.fixture
def bench(url: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Bench:
    """With servers that are one, and no waiting."""

    @contextlib.contextmanager
    def side(default: str, name: str | None) -> Iterator[Side]:
        yield Side(
            name or default, Target(url, "m"), BUILD, ("command",), {"engine": os.getpid(), "proxy": os.getpid()}
        )

    def ours(build: Build, sizes: Sizes, *, name: str | None = None, **others: object) -> Any:
        return side(throughput.OURS, name)

    def peer(build: Build, sizes: Sizes, *, name: str | None = None, **others: object) -> Any:
        return side(throughput.PEER, name)

    def python(build: Build, sizes: Sizes) -> Any:
        return side(throughput.PYTHON, None)

    async def session(side: Side, asks: Sequence[Ask]) -> list[Heard]:
        async with Clients(side.target) as clients:
            return await clients.play(asks)

    monkeypatch.setattr(sides, "ours", ours)
    monkeypatch.setattr(sides, "llama_server", peer)
    monkeypatch.setattr(sides, "llama_cpp_server", python)
    monkeypatch.setattr(throughput, "through_session", session)
    monkeypatch.setattr(measuring, "SETTLE_SECONDS", 0)
    monkeypatch.setattr(threads, "busy", lambda count: contextlib.nullcontext())
    profiler = tmp_path / "py-spy"
    profiler.write_text("#!/bin/sh\necho 'run (worker.py:1);decode (llama.py:2) 10'\n")
    profiler.chmod(0o700)
    monkeypatch.setattr(peers, "profiler", lambda: profiler)
    made = Bench(runs=1, tokens=4, longest=512, openmp=True)
    for name in ("native", "portable", "llama_server", "llama_server_openmp", "llama_cpp_server"):
        made.__dict__[name] = BUILD
    monkeypatch.setattr(Bench, "gguf", lambda bench: tmp_path / f"{bench.model}.gguf")
    made.begin("a part", "1.5b")
    return made


ROWS = {
    "streams": 5 * 8 + 3 * 2 + 2 * 2 + 2,
    "portable": 2 + 1,
    "prefill": 3,
    "first-token": 2 * 2 * 2,
    "mixed": 6 * 3 + 2,
    "turns": 4,
    "memory": 3 * 2,
    "growth": 2 + 6,
    "neighbours": 2 * 3 * 2 * 3,
    "speculation": 1 + 3 * 2,
    "profile": 2,
}


@pytest.mark.parametrize("part", command.PARTS)
def test_a_part_gives_all_its_rows(bench: Bench, part: str) -> None:
    rows = list(command.PARTS[part](bench))
    assert all(row.what and row.bar for row in rows)
    assert len(rows) == ROWS[part]
    assert bench.used


def test_bars_are_those_that_were_asked_for(bench: Bench) -> None:
    def bars(part: str) -> list[str]:
        return [row.bar for row in command.PARTS[part](bench) if row.holds is not None]

    assert bars("streams") == [">= 0.95"] * 5 + [">= 1", ">= 1", ">= 1.8", ">= 1"]
    default, rate, *batches = bars("mixed")
    assert (default, rate) == ("<= 0.2", ">= 0.95")
    assert set(batches) <= {"<= 1"}, "which of them have a bar is chosen by what was measured"
    assert bars("turns") == ["<= 0.15", "<= 1"]
    assert bars("memory") == ["peak < 2 GiB", "peak < 2.4 GiB"]
    assert bars("portable") == ["> 10 tokens/s"]
