"""The central claim: neither the proxy nor the launcher ever holds a prompt or an answer.

A canary goes through as prompt, and words come back as answer. Every byte on both sides of the proxy is recorded, the
memory of the proxy and of the launcher's process is read as a core dump would hold it, and their logs and metrics are
taken. Neither text is in any of it, in any usual encoding; the same search finds both in the client's own bytes.
"""

from __future__ import annotations

import base64
import contextlib
import json
import os
import socket
import threading
import urllib.request
import zlib
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.canaries import encodings, memory_of, where
from tests.end_to_end.conftest import Running

pytestmark = [pytest.mark.processes, pytest.mark.model]

CANARY = "Kanarienvogel-7f3a91c4-Über-dem-Schacht"


class Recorder:
    """A relay that keeps every byte, in both directions, between a listener and wherever ``dial`` leads."""

    def __init__(self, listener: socket.socket, family: int, target: object) -> None:
        self.recorded: list[bytes] = []
        self._listener = listener
        self._family = family
        self._target = target
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                near, _ = self._listener.accept()
                far = socket.socket(self._family, socket.SOCK_STREAM)
                far.connect(self._target)  # type: ignore[arg-type]
                threading.Thread(target=self._carry, args=(near, far), daemon=True).start()

    def _carry(self, near: socket.socket, far: socket.socket) -> None:
        with near, far:
            back = threading.Thread(target=self._relay, args=(far, near), daemon=True)
            back.start()
            self._relay(near, far)
            back.join()

    def _relay(self, source: socket.socket, sink: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while data := source.recv(65536):
                self.recorded.append(data)
                sink.sendall(data)
        with contextlib.suppress(OSError):
            sink.shutdown(socket.SHUT_WR)

    @property
    def everything(self) -> bytes:
        return b"".join(self.recorded)


@contextlib.contextmanager
def recorded_unix(path: Path, target: Path) -> Iterator[Recorder]:
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))
        listener.listen()
        yield Recorder(listener, socket.AF_UNIX, str(target))


@contextlib.contextmanager
def recorded_tcp(target: str) -> Iterator[tuple[str, Recorder]]:
    host, _, port = target.removeprefix("http://").rpartition(":")
    with socket.create_server(("127.0.0.1", 0)) as listener:
        yield f"http://127.0.0.1:{listener.getsockname()[1]}", Recorder(listener, socket.AF_INET, (host, int(port)))


def test_the_search_finds_what_is_there() -> None:
    secret = [CANARY]
    for name, needle in encodings(CANARY).items():
        assert where(secret, b"before " + needle + b" after"), name
    for shift in range(3):
        assert where(secret, base64.b64encode(b"x" * shift + CANARY.encode() + b" and more"))
    assert not where(secret, zlib.compress(CANARY.encode()))


def test_the_search_reads_memory() -> None:
    held = (CANARY + "!").encode()
    assert where([CANARY], memory_of(os.getpid()))
    assert held


def test_the_parent_never_holds_a_prompt_or_an_answer(running: Running, tmp_path: Path) -> None:
    home = running.home
    enclave_socket = Path(home.state("main")["address"].removeprefix("unix:"))
    inner_path = home.folder / "recorded.sock"
    with recorded_unix(inner_path, enclave_socket) as inner:
        proxy, url = home.proxy(f"unix:{inner_path}")
        with recorded_tcp(url) as (outer_url, outer):
            session = ("--url", outer_url, "--policy", str(running.policy))
            answer = home.json("ask", f"Repeat after me: {CANARY} {CANARY}", *session, "--max-tokens", "40")[
                "text"
            ].strip()
        assert len(answer) >= 20, "an answer of some words is needed as the second canary"
        secrets = [CANARY, answer[:20], answer[-20:]]
        with urllib.request.urlopen(f"{url}/metrics") as response:
            metrics = response.read()
        assert where(secrets, json.dumps([CANARY, answer], ensure_ascii=False).encode())  # the client itself had both

        seen = {"bytes between client and proxy": outer.everything, "bytes between proxy and enclave": inner.everything}
        assert all(len(recorded) > 4096 for recorded in seen.values())
        notebook = enclave_socket.parent
        held = {
            "the proxy's memory": memory_of(proxy.pid),
            "the launcher's memory": memory_of(running.supervisor),
            "metrics": metrics,
            "logs": b"".join(path.read_bytes() for path in sorted(notebook.iterdir()) if path.is_file()),
            "ps": json.dumps(home.json("ps")).encode(),
        }
        assert len(held["the proxy's memory"]) > 1 << 20
        for what, haystack in (seen | held).items():
            assert where(secrets, haystack) == [], what
        proxy.terminate()
        _, errors = proxy.communicate()
    assert where(secrets, errors.encode()) == []
