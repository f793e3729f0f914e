"""An HTTPS server for emulated services: bounded, each connection on a thread of its own, and gone when it is stopped.

A thread begins with its connection, before the TLS handshake, so that nobody who dawdles holds anybody up. What an
answer says is its callable's; how it arrives can be made to fail.
"""

from __future__ import annotations

import contextlib
import re
import socket
import ssl
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Final

MAX_BODY: Final = 524_288
"""Bytes of a request's body."""
SILENCE_SECONDS: Final = 60.0
"""How long a connection may be silent."""

_LENGTH = re.compile(r"0|[1-9][0-9]{0,8}")


@dataclass(frozen=True, slots=True)
class HttpRequest:
    """A request as it arrived."""

    method: str
    target: str
    """The request line's path, with its query if it has one."""
    headers: Sequence[tuple[str, str]]
    body: bytes

    def header(self, name: str) -> str | None:
        """The value of a header, named in lower case; several are joined with commas (RFC 9110 section 5.3)."""
        values = [" ".join(value.split()) for key, value in self.headers if key.lower() == name]
        return ",".join(values) if values else None


class Cut(Enum):
    """The connection ends without TLS's goodbye, in place of the answer or in the middle of it."""

    BEFORE_ANSWER = "before"
    WITHIN_ANSWER = "within"


@dataclass(frozen=True, slots=True)
class HttpAnswer:
    """What is answered; and how the connection ends then, if it does."""

    status: HTTPStatus
    headers: Mapping[str, str] = field(default_factory=dict)
    body: bytes = b""
    cut: Cut | None = None

    def encode(self) -> bytes:
        lines = [f"HTTP/1.1 {self.status.value} {self.status.phrase}"]
        lines += [f"{name}: {value}" for name, value in self.headers.items()]
        lines += [f"Content-Length: {len(self.body)}", "", ""]
        return "\r\n".join(lines).encode("latin-1") + self.body


class HttpsServer:
    """Listens from its construction to :meth:`close`. Raises OSError when it cannot."""

    def __init__(
        self, listen: tuple[str, int], context: ssl.SSLContext, answer: Callable[[HttpRequest], HttpAnswer]
    ) -> None:
        self._server = _Server(listen, context, answer)
        self.port: int = self._server.server_address[1]
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.05})
        self._thread.start()

    def close(self) -> None:
        """Ends every connection, and waits for the answers that are being made. Raises the first exception that one has
        ended with.
        """
        self._server.stop()
        self._thread.join()
        if self._server.defects:
            raise self._server.defects[0]


class _Server(ThreadingHTTPServer):
    request_queue_size = 256
    daemon_threads = False  # so that closing waits for them

    def __init__(
        self, listen: tuple[str, int], context: ssl.SSLContext, answer: Callable[[HttpRequest], HttpAnswer]
    ) -> None:
        self.address_family = socket.AF_INET6 if ":" in listen[0] else socket.AF_INET
        self.context = context
        self.answer = answer
        self.stopping = threading.Event()
        self.defects: list[BaseException] = []
        self._lock = threading.Lock()
        self._connections: set[ssl.SSLSocket] = set()
        super().__init__(listen, _Connection)

    def server_bind(self) -> None:
        # Not HTTPServer's, which asks the resolver for a name that nobody needs.
        self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        self.socket.bind(self.server_address)
        self.server_address = self.socket.getsockname()

    def opened(self, connection: ssl.SSLSocket) -> None:
        with self._lock:
            self._connections.add(connection)
        if self.stopping.is_set():
            end(connection)

    def closed(self, connection: ssl.SSLSocket) -> None:
        with self._lock:
            self._connections.discard(connection)
        connection.close()

    def stop(self) -> None:
        self.stopping.set()
        self.shutdown()
        with self._lock:
            for connection in self._connections:
                end(connection)
        self.server_close()

    def handle_error(self, request: object, client_address: object) -> None:
        """A connection has ended with an exception. What the network or the peer did is no defect of ours."""
        error = sys.exception()
        if error is not None and not isinstance(error, OSError):
            self.defects.append(error)


def end(connection: ssl.SSLSocket) -> None:
    """Ends the socket below TLS, which is its thread's alone, and so wakes that thread."""
    with contextlib.suppress(OSError):  # the peer was faster
        socket.socket.shutdown(connection, socket.SHUT_RDWR)


class _Connection(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    timeout = SILENCE_SECONDS
    disable_nagle_algorithm = True
    server: _Server
    request: Any

    def setup(self) -> None:
        self.request.getpeername()  # of a peer that reset it already, Python's ssl leaves an unclosed socket behind
        self.request = self.server.context.wrap_socket(self.request, server_side=True, do_handshake_on_connect=False)
        self.server.opened(self.request)
        try:
            super().setup()
        except OSError:
            self.server.closed(self.request)
            raise

    def handle(self) -> None:
        self.request.do_handshake()
        super().handle()

    def finish(self) -> None:
        try:
            super().finish()
        finally:
            self.server.closed(self.request)

    def do_POST(self) -> None:
        length = self.headers.get("Content-Length", "")
        if _LENGTH.fullmatch(length) is None or "Transfer-Encoding" in self.headers:
            self._send(HttpAnswer(HTTPStatus.LENGTH_REQUIRED, {"Connection": "close"}))
            return
        if int(length) > MAX_BODY:
            self._send(HttpAnswer(HTTPStatus.REQUEST_ENTITY_TOO_LARGE, {"Connection": "close"}))
            return
        body = self.rfile.read(int(length))
        if len(body) < int(length):
            self.close_connection = True
            return
        self._send(self.server.answer(HttpRequest(self.command, self.path, self.headers.items(), body)))

    def _send(self, answer: HttpAnswer) -> None:
        encoded = answer.encode()
        if answer.cut is Cut.WITHIN_ANSWER:
            encoded = encoded[: len(encoded) - max(1, len(answer.body) // 2)]
        if answer.cut is not Cut.BEFORE_ANSWER:
            self.wfile.write(encoded)
        if answer.cut is not None:
            end(self.request)
        if answer.cut is not None or answer.headers.get("Connection") == "close":
            self.close_connection = True

    def log_message(self, format: str, *args: object) -> None:
        """Says nothing: whoever starts it wants the answers."""
