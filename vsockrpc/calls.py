"""Both ends of a call, as a program sees them. ``transport`` makes them."""

from __future__ import annotations

import asyncio
import math
from collections import deque
from types import TracebackType
from typing import Self

from attestation.errors import StrongroomError
from vsockrpc.errors import ConnectionLost, Fault, LocalProtocolError
from vsockrpc.events import CallEnded, CallShed, DataReceived, Event, FaultReceived, ReplyReceived
from vsockrpc.frames import Meta
from vsockrpc.limits import MAX_DEADLINE_MS
from vsockrpc.link import Link
from vsockrpc.outbox import Buffer

_GATHER = 65_536
"""Bytes up to which small pieces that wait to be read are gathered into one."""


class Stream:
    """What both ends have in common: sending data, and receiving it piece by piece."""

    def __init__(self, link: Link) -> None:
        self._link = link
        self._number = 0
        self._inbox: deque[memoryview | bytearray] = deque()
        self._held = 0
        self._ended = False
        self._torn = False  # a send was given up half-way: what follows must not make the data look whole
        self.error: StrongroomError | None = None
        """Why the call is over, when it did not end cleanly."""
        self._waiting: list[asyncio.Future[None]] = []

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> bytes | memoryview:
        """The next piece, at least one byte. Asking for it says that the one before has been consumed.

        Raises Fault or ConnectionLost when all that came before has been read.
        """
        if self._held:
            if self._link.connection.consumed(self._number, self._held):
                self._link.flush_soon()
            self._held = 0
        while not self._inbox:
            if self._ended:
                raise StopAsyncIteration
            self._raise_error()
            await self._changed()
        piece = self._inbox.popleft()
        self._held = len(piece)
        return bytes(piece) if isinstance(piece, bytearray) else piece

    async def read(self, limit: int) -> bytes:
        """All data, to its end.

        Raises Fault ``malformed`` when it is more than ``limit`` bytes, and what reading by pieces raises.
        """
        whole = bytearray()
        async for piece in self:
            if len(whole) + len(piece) > limit:
                raise Fault("malformed", f"more than {limit} bytes of data")
            whole += piece
        return bytes(whole)

    async def send(self, data: Buffer, *, end: bool = False) -> None:
        """Send data, the last if ``end``. Returns when at most ``Limits.send_buffer`` bytes wait to be written.

        ``bytes`` are sent from where they are; what can change is copied. Raises Fault or ConnectionLost; Fault
        ``deadline_exceeded`` also when the other side takes nothing for ``Limits.stall`` seconds. A call whose ``send``
        did not return can only be given up.
        """
        connection = self._link.connection
        if self._torn:
            raise LocalProtocolError("torn", "data of this call was cut short, so it can have no end")
        fixed = isinstance(data, bytes)
        view = memoryview(data).cast("B")
        while True:
            self._raise_error()
            if self._unwanted:
                return
            if connection.sent_end(self._number):
                raise LocalProtocolError("unexpected_frame", "data after the end")
            part = view[: connection.room(self._number)]
            view = view[len(part) :]
            if part or (end and not view):
                connection.send_data(self._number, part if fixed else bytes(part), end=end and not view)
                self._link.flush_soon()
            if not view:
                return
            self._torn = True
            await self._progress()
            self._torn = False

    def deliver(self, event: Event) -> None:
        """For the connection's owner: what has come for this call."""
        match event:
            case DataReceived(_, data):
                self._store(data)
            case CallEnded():
                self._ended = True
            case CallShed():
                self.fail(Fault("overloaded", "too much data waited to be read"))
            case _:
                raise LocalProtocolError("unexpected_frame", f"{type(event).__name__} is not for this side")
        self._wake()

    def fail(self, error: StrongroomError) -> None:
        """The call is over. Only the first reason counts."""
        if self.error is None:
            self.error = error
            self._wake()

    def _store(self, data: memoryview) -> None:
        read: object = data.obj
        if isinstance(read, bytes) and 2 * len(data) >= len(read):
            self._inbox.append(data)
        elif self._inbox and isinstance(last := self._inbox[-1], bytearray) and len(last) + len(data) <= _GATHER:
            last += data
        else:
            self._inbox.append(bytearray(data))  # a small slice must not keep a large read alive

    @property
    def _unwanted(self) -> bool:
        """Nobody waits for what this side would still send."""
        return False

    async def _progress(self) -> None:
        """Wait until some of the queued data has been written."""
        connection, number = self._link.connection, self._number
        queued = connection.queued(number)
        try:
            await self._link.until(lambda: connection.queued(number) < queued or connection.sent_end(number))
        except TimeoutError as error:
            raise Fault("deadline_exceeded", "the other side takes no more data of this call") from error

    async def _changed(self) -> None:
        future = asyncio.get_running_loop().create_future()
        self._waiting.append(future)
        try:
            await future
        finally:
            self._waiting.remove(future)

    def _wake(self) -> None:
        for future in self._waiting:
            if not future.done():
                future.set_result(None)

    def _raise_error(self) -> None:
        if self.error is not None:
            raise self.error


class Call(Stream):
    """A call that this side makes. It is sent on entering the block; leaving the block before its end cancels it."""

    def __init__(self, link: Link, calls: dict[int, Call], method: str, meta: Meta, deadline: float | None) -> None:
        super().__init__(link)
        if deadline is not None and not deadline > 0:
            raise ValueError(f"a deadline is a positive number of seconds, not {deadline}")
        self._calls = calls
        self._method = method
        self._meta = meta
        self._deadline = deadline
        self._reply: Meta | None = None
        self._timer: asyncio.TimerHandle | None = None

    async def __aenter__(self) -> Self:
        """Raises ConnectionLost; Fault ``too_many_calls`` when the other side takes no more at once."""
        link, deadline = self._link, self._deadline
        if link.lost is not None or not link.connection.ready or link.connection.going_away:
            raise ConnectionLost(link.lost.message if link.lost else "this connection takes no new calls")
        milliseconds = 0 if deadline is None else min(math.ceil(deadline * 1000), MAX_DEADLINE_MS)
        try:
            self._number = link.connection.open_call(self._method, self._meta, deadline_ms=milliseconds)
        except LocalProtocolError as error:
            if error.code == "too_many_calls":
                raise Fault(error.code, error.message) from error
            raise
        self._calls[self._number] = self
        if deadline is not None:
            self._timer = asyncio.get_running_loop().call_later(deadline, self._expire)
        link.flush_soon()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._timer is not None:
            self._timer.cancel()
        if self._calls.pop(self._number, None) is not None and self._link.lost is None:
            self._link.connection.cancel(self._number)
            self._link.flush_soon()
        self.fail(LocalProtocolError("unexpected_frame", "the call's block has been left"))

    async def reply(self) -> Meta:
        """The answer's head. Raises Fault or ConnectionLost."""
        while self._reply is None:
            self._raise_error()
            await self._changed()
        return self._reply

    def deliver(self, event: Event) -> None:
        match event:
            case ReplyReceived(_, meta):
                self._reply = meta
                self._wake()
            case FaultReceived(_, code, message):
                self.fail(Fault(code, message))
            case _:
                super().deliver(event)

    @property
    def _unwanted(self) -> bool:
        return self._ended  # the answer was complete before the question was

    def _expire(self) -> None:
        """The callee's own clock says the same, but nothing rests on the callee."""
        if not self._ended and self._link.lost is None:
            self._link.connection.cancel(self._number)
            self._link.flush_soon()
            self.fail(Fault("deadline_exceeded", f"no complete answer within {self._deadline:g} s"))


class IncomingCall(Stream):
    """A call that a handler answers: ``reply`` once, then ``send``, the last time with ``end``; or raise Fault.

    A handler that returns has ended its answer. It is cancelled when the caller gives up, the deadline passes or the
    connection is lost; the caller's place is free again when it has stopped.
    """

    def __init__(self, link: Link, number: int, method: str, meta: Meta, peer_cid: int | None) -> None:
        super().__init__(link)
        self._number = number
        self.method = method
        self.meta = meta
        self.peer_cid = peer_cid
        """Which VM calls, in the kernel's words; None where it does not call over vsock."""
        self._replied = False
        self._closed = False

    async def reply(self, meta: Meta, *, end: bool = False) -> None:
        """Answer; data may follow unless ``end``. Raises what ended the call, if something has."""
        self._raise_error()
        self._link.connection.send_reply(self._number, meta, end=end)
        self._replied = True
        self._closed = end
        self._link.flush_soon()

    async def send(self, data: Buffer, *, end: bool = False) -> None:
        await super().send(data, end=end)
        self._closed = end

    async def end(self) -> None:
        """The answer is complete."""
        if self._replied:
            await self.send(b"", end=True)
        else:
            await self.reply({}, end=True)

    async def finish(self) -> None:
        """For the server: end the answer if the handler has not, and wait until all of it is written."""
        if not self._closed:
            await self.end()
        while not self._link.connection.sent_end(self._number):
            self._raise_error()
            await self._progress()
