"""The RPC for asyncio: ``connect`` makes calls, ``serve`` answers them. PROTOCOL.md section 5.

A call ends in one of three ways: its data ends; ``Fault``; ``ConnectionLost``.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager
from functools import partial
from typing import TypeAlias

from attestation.errors import StrongroomError
from vsockrpc import frames
from vsockrpc.address import Address, VsockAddress
from vsockrpc.calls import Call, IncomingCall
from vsockrpc.errors import ConnectionLost, Fault, LocalProtocolError
from vsockrpc.events import CallCancelled, CallReceived, CallShed, Event
from vsockrpc.frames import Meta
from vsockrpc.limits import Limits
from vsockrpc.link import Link
from vsockrpc.sockets import Listener, dial_socket, listen_socket, prepare
from vsockrpc.state import Role

__all__ = [
    "Call",
    "Client",
    "ConnectionLost",
    "Fault",
    "Handler",
    "IncomingCall",
    "Limits",
    "Server",
    "connect",
    "dial",
    "listen",
    "serve",
]

Handler: TypeAlias = Callable[[IncomingCall], Awaitable[None]]
OnError: TypeAlias = Callable[[BaseException], None]

_ACCEPT_BATCH = 16
"""Connections accepted in one turn of the loop."""
_ACCEPT_PAUSE = 0.5
"""Seconds without accepting, after the system had no descriptor or memory left for one more connection."""


# --- Calling --------------------------------------------------------------------------------------


class Client:
    """One connection on which this side calls. ``dial`` and ``connect`` make it."""

    def __init__(self, sock: socket.socket, limits: Limits) -> None:
        self._calls: dict[int, Call] = {}
        self._link = Link(sock, Role.CALLER, limits, self._on_event, self._on_lost)

    @property
    def closed(self) -> bool:
        """It takes no more calls: lost, closed, or the other side is going away."""
        return self._link.lost is not None or self._link.connection.going_away

    @property
    def open_calls(self) -> int:
        """Calls that count against what the other side takes at once: also those given up here whose work it has
        not stopped yet.
        """
        return self._link.connection.open_calls

    def call(self, method: str, meta: Meta, *, deadline: float | None = None) -> Call:
        """A call, to be entered with ``async with``. ``deadline``: seconds from then to the answer's end."""
        return Call(self._link, self._calls, method, meta, deadline)

    async def close(self) -> None:
        """Give up calls that are open, and close: at most ``Limits.drain`` seconds."""
        for number, call in list(self._calls.items()):
            call.fail(ConnectionLost("closed by this side"))
            self._link.connection.cancel(number)
        await self._link.close("closing")

    def _on_event(self, event: Event) -> None:
        call = self._calls.get(getattr(event, "call", 0))
        if call is not None:
            call.deliver(event)

    def _on_lost(self, error: ConnectionLost) -> None:
        for call in self._calls.values():
            call.fail(ConnectionLost(error.message))


async def dial(address: Address, *, limits: Limits | None = None) -> Client:
    """A client whose connection stands; close it with ``Client.close``.

    Raises ConnectionLost, also after ``Limits.handshake`` seconds, and AddressError.
    """
    limits = limits or Limits()
    try:
        async with asyncio.timeout(limits.handshake):
            client = Client(await dial_socket(address), limits)
            try:
                await client._link.ready()
            except BaseException:
                client._link.lose("no connection came about")
                raise
    except TimeoutError:
        raise ConnectionLost(
            f"nothing answers at {address} within {limits.handshake:g} s", code="unreachable"
        ) from None
    return client


@asynccontextmanager
async def connect(address: Address, *, limits: Limits | None = None) -> AsyncIterator[Client]:
    """``dial``, closed at the end of the block."""
    client = await dial(address, limits=limits)
    try:
        yield client
    finally:
        await client.close()


# --- Serving --------------------------------------------------------------------------------------


class Server:
    """Listens, and runs a handler for each call. ``listen`` and ``serve`` make it."""

    def __init__(self, listener: Listener, handlers: Mapping[str, Handler], limits: Limits, on_error: OnError) -> None:
        self.handlers = handlers
        self.limits = limits
        self.on_error = on_error
        self.running: set[asyncio.Task[None]] = set()
        """Handlers at work, all connections together."""
        self._listener = listener
        self._peers: set[_Peer] = set()
        self._closing = False
        self._loop = asyncio.get_running_loop()
        self._loop.add_reader(listener.sock, self._accept)

    @property
    def address(self) -> Address:
        return self._listener.address

    @property
    def connections(self) -> int:
        return len(self._peers)

    async def close(self) -> None:
        """Accept nothing more, let running calls end for ``Limits.drain`` seconds, cancel the others, and close."""
        if self._closing:
            return
        self._closing = True
        self._loop.remove_reader(self._listener.sock)
        self._listener.close()
        peers = list(self._peers)
        try:
            for peer in peers:
                peer.go_away()
            await self._settled()
            for peer in peers:
                peer.stop_all(Fault("unavailable", "the server is closing"))
            await self._settled()
            await asyncio.gather(*(peer.link.close("closing") for peer in peers))
        finally:
            for peer in peers:
                peer.link.lose("closed by this side")

    async def _settled(self) -> None:
        if self.running:
            await asyncio.wait(self.running, timeout=self.limits.drain)

    def _accept(self) -> None:
        for _ in range(_ACCEPT_BATCH):
            try:
                sock, peer = self._listener.sock.accept()
            except (BlockingIOError, InterruptedError, ConnectionAbortedError):
                return
            except OSError as error:
                # Out of descriptors, most likely: the listener stays readable, so look again a little later.
                self._loop.remove_reader(self._listener.sock)
                self._loop.call_later(_ACCEPT_PAUSE, self._resume)
                self.on_error(error)
                return
            if len(self._peers) >= self.limits.max_connections:
                _turn_away(sock)
                continue
            prepare(sock)
            self._peers.add(_Peer(self, sock, peer[0] if isinstance(self._listener.address, VsockAddress) else None))

    def _resume(self) -> None:
        if not self._closing:
            self._loop.add_reader(self._listener.sock, self._accept)

    def forget(self, peer: _Peer) -> None:
        self._peers.discard(peer)


class _Peer:
    """The calls of one connection."""

    def __init__(self, server: Server, sock: socket.socket, cid: int | None) -> None:
        self._server = server
        self._cid = cid
        self._calls: dict[int, tuple[IncomingCall, asyncio.Task[None]]] = {}
        self._loop = asyncio.get_running_loop()
        self.link = Link(sock, Role.CALLEE, server.limits, self._on_event, self._on_lost)

    def go_away(self) -> None:
        self.link.connection.go_away("closing")
        self.link.flush_soon()

    def stop_all(self, why: StrongroomError) -> None:
        for number in list(self._calls):
            self._stop(number, why)

    def _on_event(self, event: Event) -> None:
        match event:
            case CallReceived():
                self._start(event)
            case CallCancelled(number):
                self._stop(number, Fault("cancelled"))
            case CallShed(number):
                self._stop(number, Fault("overloaded"))
            case _:
                number = getattr(event, "call", 0)
                if number in self._calls:
                    self._calls[number][0].deliver(event)

    def _start(self, event: CallReceived) -> None:
        server, number = self._server, event.call
        handler = server.handlers.get(event.method)
        if handler is None:
            self._fault(number, Fault("unknown_method"))
        elif len(server.running) >= server.limits.max_running:
            self._fault(number, Fault("too_many_calls"))
        else:
            call = IncomingCall(self.link, number, event.method, event.meta, self._cid)
            task = self._loop.create_task(_answer(handler, call), name=f"rpc {event.method}")
            self._calls[number] = call, task
            server.running.add(task)
            timer = None
            if event.deadline_ms:
                late = Fault("deadline_exceeded")
                timer = self._loop.call_later(event.deadline_ms / 1000, self._stop, number, late)
            task.add_done_callback(partial(self._ended, call, number, timer))

    def _stop(self, number: int, why: StrongroomError) -> None:
        if number in self._calls:
            call, task = self._calls[number]
            call.fail(why)
            task.cancel()

    def _ended(
        self, call: IncomingCall, number: int, timer: asyncio.TimerHandle | None, task: asyncio.Task[None]
    ) -> None:
        """The handler has stopped: only now is the caller told, so that ``max_calls`` bounds the work, not only the
        talk.
        """
        server = self._server
        server.running.discard(task)
        if timer is not None:
            timer.cancel()
        del self._calls[number]
        error = None if task.cancelled() else task.exception()
        bug = _bug_in(error)
        if bug is not None:
            server.on_error(bug)
        if self.link.lost is not None or (error is None and not task.cancelled()):
            return
        while isinstance(error, BaseExceptionGroup):
            error = error.exceptions[0]
        if isinstance(call.error, Fault):
            self._fault(number, call.error)
        elif bug is not None:
            self._fault(number, Fault("internal"))
        elif isinstance(error, Fault):
            self._fault(number, error)
        else:
            self._fault(number, Fault("unavailable", "the work was stopped"))

    def _fault(self, number: int, fault: Fault) -> None:
        if self.link.connection.sent_end(number):
            return
        try:
            self.link.connection.send_fault(number, fault.code, fault.message)
        except LocalProtocolError as error:  # a handler made up a code that the wire has no form for
            self._server.on_error(error)
            self.link.connection.send_fault(number, "internal", "internal")
        self.link.flush_soon()

    def _on_lost(self, error: ConnectionLost) -> None:
        self._server.forget(self)
        self.stop_all(error)


async def _answer(handler: Handler, call: IncomingCall) -> None:
    await handler(call)
    await call.finish()


def _bug_in(error: BaseException | None) -> BaseException | None:
    """What of a handler's exception is nobody's answer: all but faults and lost connections, of this call or one
    that it made.
    """
    if isinstance(error, BaseExceptionGroup):
        return error.split((Fault, ConnectionLost))[1]
    return None if isinstance(error, (Fault, ConnectionLost)) else error


def _turn_away(sock: socket.socket) -> None:
    with sock, contextlib.suppress(OSError):  # it may have left already
        sock.setblocking(False)
        sock.send(frames.go_away("overloaded"))


async def listen(
    address: Address, handlers: Mapping[str, Handler], *, on_error: OnError, limits: Limits | None = None
) -> Server:
    """A server that accepts connections from now on; close it with ``Server.close``. Raises AddressError.

    ``handlers`` maps methods to coroutine functions. An exception that a handler does not mean (anything but Fault and
    ConnectionLost), and a failure to accept, go to ``on_error``; the caller sees ``internal`` and no detail.
    """
    return Server(await listen_socket(address), handlers, limits or Limits(), on_error)


@asynccontextmanager
async def serve(
    address: Address, handlers: Mapping[str, Handler], *, on_error: OnError, limits: Limits | None = None
) -> AsyncIterator[Server]:
    """``listen``, closed at the end of the block."""
    server = await listen(address, handlers, on_error=on_error, limits=limits)
    try:
        yield server
    finally:
        await server.close()
