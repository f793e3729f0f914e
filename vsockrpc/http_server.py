"""How a server of HTTP runs: the parent's proxy, and the gateway on a person's own machine."""

from __future__ import annotations

import asyncio
import contextlib
import signal
import socket
import sys
import traceback
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from typing import Any, TypeVar

import uvicorn
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Receive, Scope, Send
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from attestation.errors import StrongroomError
from vsockrpc.address import TcpAddress, parse_address
from vsockrpc.errors import AddressError

MAX_CONNECTIONS = 1024
MAX_HEAD_BYTES = 32768
"""Bytes of a request's line and headers; one read of the socket more may be held."""
HEAD_SECONDS = 20.0
"""How long a connection may take to send a request's head, from its first byte, or from the connection's beginning."""
KEEP_ALIVE_SECONDS = 75
"""How long an idle connection is kept: longer than clients keep theirs, so that none is reused while it is closed."""
GRACE_SECONDS = 5

T = TypeVar("T")


class ListenError(StrongroomError):
    """The address cannot be listened on: ``bad_address``, which is the caller's mistake, or ``cannot_listen``."""

    @property
    def exit_code(self) -> int:  # type: ignore[override]
        return 2 if self.code == "bad_address" else 4


def parse_listen(text: str) -> TcpAddress:
    """``HOST:PORT``, as a person writes it. Raises ListenError ``bad_address``."""
    try:
        address = parse_address(f"tcp:{text}")
    except AddressError as error:
        raise ListenError("bad_address", error.message, expected="HOST:PORT", got=text) from error
    assert isinstance(address, TcpAddress)
    return address


def listen_on(address: TcpAddress) -> socket.socket:
    """A listening socket; port 0 takes a free one. Raises ListenError ``cannot_listen``."""
    family = socket.AF_INET6 if ":" in address.host else socket.AF_INET
    # The protocol is named because asyncio sets TCP_NODELAY only where it is; without, an answer in two writes waits
    # 40 ms for an ACK.
    listener = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((address.host, address.port))
    except (OSError, UnicodeError) as error:  # UnicodeError: a host that no name server could be asked for
        listener.close()
        reason = error.strerror if isinstance(error, OSError) else "no host name"
        raise ListenError("cannot_listen", f"cannot listen on {address}: {reason}", got=str(address)) from error
    listener.setblocking(False)
    return listener


class _BoundedProtocol(HttpToolsProtocol):
    """Bounds a request's head in size and in time, which httptools and uvicorn leave to the peer."""

    _in_head = True
    _head_bytes = 0
    _head_due: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._expect_head()

    def connection_lost(self, exc: Exception | None) -> None:
        self._head_arrived()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        if self._in_head:
            self._head_bytes += len(data)
            if self._head_due is None:
                self._expect_head()
        super().data_received(data)
        if self._in_head and self._head_bytes > MAX_HEAD_BYTES and not self.transport.is_closing():
            self.send_400_response("The request's head is too large.")

    def on_headers_complete(self) -> None:
        self._in_head = False
        self._head_arrived()
        super().on_headers_complete()

    def on_message_complete(self) -> None:
        self._in_head, self._head_bytes = True, 0
        super().on_message_complete()

    def _expect_head(self) -> None:
        self._head_due = self.loop.call_later(HEAD_SECONDS, self.transport.close)

    def _head_arrived(self) -> None:
        if self._head_due is not None:
            self._head_due.cancel()
            self._head_due = None


class HttpServer(uvicorn.Server):
    """uvicorn within an event loop that is not its own: it takes no signals, and says nothing of a request anywhere."""

    def __init__(self, application: ASGIApp) -> None:
        configuration = uvicorn.Config(
            _reporting_defects(application),
            http=_BoundedProtocol,
            ws="none",
            log_config=None,
            log_level="critical",
            access_log=False,
            server_header=False,
            date_header=False,
            proxy_headers=False,
            limit_concurrency=MAX_CONNECTIONS,
            timeout_keep_alive=KEEP_ALIVE_SECONDS,
            timeout_graceful_shutdown=GRACE_SECONDS,
            lifespan="on",
        )
        super().__init__(configuration)
        self._accepting = asyncio.Event()
        self._stopping = asyncio.Event()

    @contextlib.asynccontextmanager
    async def serving(self, listener: socket.socket) -> AsyncIterator[None]:
        """Accepts connections within the block; behind it, answers under way get their grace."""
        work = asyncio.ensure_future(self.serve(sockets=[listener]))
        accepting = asyncio.ensure_future(self._accepting.wait())
        try:
            await asyncio.wait({work, accepting}, return_when=asyncio.FIRST_COMPLETED)
            yield
        finally:
            accepting.cancel()
            self.stop()
            await work

    def stop(self) -> None:
        """Ends the serving; told so a second time, without grace."""
        self.force_exit = self.should_exit
        self.should_exit = True
        self._stopping.set()

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        self._accepting.set()

    async def main_loop(self) -> None:
        await self._stopping.wait()

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


def _reporting_defects(application: ASGIApp) -> ASGIApp:
    """Says on standard error where an exception came from that nobody raised on purpose; its text could hold
    anything.
    """

    async def reporting(scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await application(scope, receive, send)
        except Exception as error:
            places = "".join(traceback.format_tb(error.__traceback__))
            sys.stderr.write(f"defect: {type(error).__name__}\n{places}")
            raise

    return reporting


async def unless_client_leaves(work: Coroutine[Any, Any, T], receive: Receive) -> T:
    """Does ``work``, and cancels it when the client leaves: then it raises ClientDisconnect.

    For after the request's body has been read.
    """
    working, leaving = asyncio.ensure_future(work), asyncio.ensure_future(_client_left(receive))
    try:
        await asyncio.wait({working, leaving}, return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            raise ClientDisconnect
        return await working
    finally:
        working.cancel()
        leaving.cancel()
        await asyncio.gather(working, leaving, return_exceptions=True)


async def _client_left(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


async def serve_http(application: ASGIApp, listener: socket.socket, *, ready: Callable[[], None]) -> None:
    """Serves until SIGINT or SIGTERM. ``ready`` is called once connections are accepted."""
    loop, server, stopping = asyncio.get_running_loop(), HttpServer(application), asyncio.Event()

    def stop() -> None:
        if stopping.is_set():
            server.stop()
        stopping.set()

    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, stop)
    try:
        async with server.serving(listener):
            ready()
            await stopping.wait()
    finally:
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.remove_signal_handler(number)
