"""A ``Connection`` on a socket: the thin shell that reads, writes and watches the clock.

It uses the loop's readiness callbacks rather than its streams: one ``recv`` and one ``sendmsg`` a turn carry
everything that all calls have for the wire, data is never joined or copied on its way out, and all socket families go
one way.
"""

from __future__ import annotations

import asyncio
import socket
from collections import deque
from collections.abc import Callable
from itertools import islice

from vsockrpc.connection import Connection
from vsockrpc.errors import ConnectionLost, RemoteProtocolError
from vsockrpc.events import Event, GoAwayReceived, HelloReceived, PongReceived, StreamEnded
from vsockrpc.limits import Limits
from vsockrpc.outbox import Buffer
from vsockrpc.state import Role

READ_SIZE = 65_536
LARGE_READ_SIZE = 1_048_576
"""Bytes asked of the socket at once; the larger number after a read that brought at least the smaller one."""
STAGE_SIZE = 524_288
"""Bytes taken from the connection at once: what a small call can at most find in front of it, besides the socket's
own buffer.
"""
TURN_SIZE = 1_048_576
"""Bytes written in one turn of the loop before other connections get theirs."""
_IOV_MAX = 1024


class Link:
    """Owns the socket. Reports every event, and at last, once, why it ended."""

    def __init__(
        self,
        sock: socket.socket,
        role: Role,
        limits: Limits,
        on_event: Callable[[Event], None],
        on_lost: Callable[[ConnectionLost], None],
    ) -> None:
        self.connection = Connection(role, limits)
        self.lost: ConnectionLost | None = None
        self._sock = sock
        self._limits = limits
        self._on_event = on_event
        self._on_lost = on_lost
        self._loop = asyncio.get_running_loop()
        self._ready: asyncio.Future[None] = self._loop.create_future()
        self._ended: asyncio.Future[None] = self._loop.create_future()
        self._deaf = False  # the other side takes no more bytes; some of its own may still be unread
        self._read_size = READ_SIZE
        self._staged: deque[Buffer] = deque()
        self._flush_due = False
        self._writing = False
        self._waiting: dict[asyncio.Future[None], tuple[Callable[[], bool], float]] = {}
        now = self._loop.time()
        self._started = now
        self._heard = now
        self._frames_heard = 0
        self._pinged = now
        self._blocked_since: float | None = None
        self._period = min(limits.handshake, limits.idle, limits.pong, limits.stall) / 4
        self._timer = self._loop.call_later(self._period, self._tick)
        self._loop.add_reader(sock, self._on_readable)
        self.flush_soon()

    # --- For the calls ---

    async def ready(self) -> None:
        """Return when the other side's HELLO has come. Raises ConnectionLost."""
        await asyncio.shield(self._ready)

    def flush_soon(self) -> None:
        """Write in this turn of the loop, after everyone in it has had a say: what they all say goes out together."""
        if not self._flush_due:
            self._flush_due = True
            self._loop.call_soon(self._flush)

    async def until(self, condition: Callable[[], bool]) -> None:
        """Wait for output to be written until ``condition`` holds, or the connection is lost.

        Raises TimeoutError after ``Limits.stall`` seconds.
        """
        if condition() or self.lost is not None:
            return
        waiter = self._loop.create_future()
        self._waiting[waiter] = condition, self._loop.time()
        try:
            await waiter
        finally:
            del self._waiting[waiter]

    async def close(self, code: str) -> None:
        """Say GOAWAY with ``code``, write what is ready to go, and close when the other side has closed too.

        That takes at most ``Limits.drain`` seconds. To close at once would take from the other side what it
        has not read yet, wherever some of its own bytes are still on their way here.
        """
        if self.lost is not None:
            return
        self.connection.go_away(code)
        self.flush_soon()
        try:
            async with asyncio.timeout(self._limits.drain):
                await self.until(lambda: self._deaf or not (self._staged or self.connection.wants_to_send))
                if self.lost is None:
                    self._deaf = True
                    self._sock.shutdown(socket.SHUT_WR)
                    await asyncio.shield(self._ended)
        except (TimeoutError, OSError):
            pass  # the other side does not read, or does not leave, or has left: there is nothing more to tell it
        finally:
            self.lose("closed by this side")

    def lose(self, why: str) -> None:
        """Close the socket. Only the first reason counts."""
        if self.lost is not None:
            return
        self.lost = ConnectionLost(why)
        self._timer.cancel()
        self._loop.remove_reader(self._sock)
        self._loop.remove_writer(self._sock)
        self._sock.close()
        self._staged.clear()
        for waiter in self._waiting:
            if not waiter.done():
                waiter.set_result(None)
        if not self._ready.done():
            self._ready.set_exception(self.lost)
            self._ready.exception()  # retrieved: nobody need be waiting
        if not self._ended.done():
            self._ended.set_result(None)
        self._on_lost(self.lost)

    # --- Reading ---

    def _on_readable(self) -> None:
        try:
            data = self._sock.recv(self._read_size)
        except (BlockingIOError, InterruptedError):
            return
        except OSError as error:
            self.lose(f"reading failed: {error.strerror}")
            return
        self._read_size = LARGE_READ_SIZE if len(data) >= READ_SIZE else READ_SIZE
        try:
            events = self.connection.receive_data(data)
        except RemoteProtocolError as error:
            self._flush()  # the GOAWAY, if the socket takes it now
            self.lose(f"the other side broke the protocol: {error}")
            return
        for event in events:
            match event:
                case StreamEnded():
                    self.lose("the other side closed the connection")
                case GoAwayReceived("protocol_error"):
                    self.lose("the other side says that this side broke the protocol")
                case GoAwayReceived(code) if not self.connection.ready:
                    self.lose(f"the other side turned this connection away: {code}")
                case HelloReceived():
                    self._ready.set_result(None)
                case GoAwayReceived() | PongReceived():
                    pass  # the connection has taken note
                case _:
                    self._on_event(event)
            if self.lost is not None:
                return
        # Behind the tasks that the events woke, so that their answers leave in the same turn.
        self.flush_soon()

    # --- Writing ---

    def _flush(self) -> None:
        self._flush_due = False
        written = 0
        while self.lost is None and not self._deaf:
            if not self._staged:
                self._staged.extend(self.connection.data_to_send(STAGE_SIZE))
                if not self._staged:
                    self._stop_writing()
                    break
            if written >= TURN_SIZE:
                self._start_writing()
                break
            try:
                count = self._sock.sendmsg(islice(self._staged, _IOV_MAX))
            except (BlockingIOError, InterruptedError):
                self._start_writing()
                if self._blocked_since is None:
                    self._blocked_since = self._loop.time()
                break
            except OSError:
                self._deaf = True
                self._staged.clear()
                self._stop_writing()
                break
            written += count
            self._blocked_since = None
            while count:
                head = self._staged.popleft()
                if len(head) > count:
                    self._staged.appendleft(memoryview(head)[count:])
                    break
                count -= len(head)
        for waiter, (condition, _) in self._waiting.items():
            if not waiter.done() and condition():
                waiter.set_result(None)

    def _start_writing(self) -> None:
        if not self._writing:
            self._writing = True
            self._loop.add_writer(self._sock, self._flush)

    def _stop_writing(self) -> None:
        if self._writing:
            self._writing = False
            self._loop.remove_writer(self._sock)

    # --- The clock ---

    def _tick(self) -> None:
        self._timer = self._loop.call_later(self._period, self._tick)
        now = self._loop.time()
        limits, connection = self._limits, self.connection
        if connection.frames_received != self._frames_heard:
            self._frames_heard = connection.frames_received
            self._heard = now
        for waiter, (_, since) in self._waiting.items():
            if now - since > limits.stall and not waiter.done():
                waiter.set_exception(TimeoutError())
        if not connection.ready:
            if now - self._started > limits.handshake:
                self.lose(f"no HELLO within {limits.handshake:g} s")
        elif self._blocked_since is not None and now - self._blocked_since > limits.stall:
            self.lose(f"the other side has read nothing for {limits.stall:g} s")
        elif connection.ping_outstanding:
            if now - self._pinged > limits.pong:
                self.lose(f"no sign of life within {limits.pong:g} s")
        elif now - self._heard > limits.idle:
            self._pinged = now
            connection.ping(connection.frames_received.to_bytes(8, "big"))
            self.flush_soon()
