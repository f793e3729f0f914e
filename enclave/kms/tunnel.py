"""The enclave's one way out: streams through the parent's egress, for code that blocks on a socket.

There is no IP in an enclave, not even a loopback interface. What needs a TCP connection gets one end of an ``AF_UNIX``
socket pair, on a thread of its own; on the event loop a pump couples the other end to one ``egress.connect`` call
(PROTOCOL.md section 5.4). The parent sees the bytes that TCP would carry: TLS, which ends in the enclave.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import socket
from collections.abc import AsyncIterator

from vsockrpc.address import Address
from vsockrpc.frames import Meta
from vsockrpc.transport import Call, Client, ConnectionLost, Fault, Limits, dial

PIECE = 65_536
"""Bytes read from the thread's side at once."""
LINGER_SECONDS = 10.0
"""How long the other side may go on after the thread's side has ended."""


class Tunnel:
    """One kept RPC connection to the egress, made when first needed and again when it was lost.

    Made and closed on the event loop; :meth:`open` is for threads, everything else for the loop.
    """

    def __init__(self, egress: Address, *, limits: Limits | None = None) -> None:
        self._egress = egress
        self._limits = limits
        self._loop = asyncio.get_running_loop()
        self._dialling = asyncio.Lock()
        self._client: Client | None = None
        self._former: list[Client] = []
        """Connections that take no new calls; streams on them may go on."""
        self._pumps: dict[asyncio.Task[None], Client] = {}
        self._closed = False

    async def close(self) -> None:
        """Ends every stream, and the connection."""
        self._closed = True
        for pump in self._pumps:
            pump.cancel()
        if self._pumps:
            await asyncio.wait(list(self._pumps))
        for client in (*self._former, self._client):
            if client is not None:
                await client.close()

    async def ask(self, method: str, meta: Meta, *, longest: int, seconds: float) -> bytes:
        """One small call to the parent: its whole data, at most ``longest`` bytes, within ``seconds``.

        Raises Fault and ConnectionLost.
        """
        async with _within(seconds):
            client = await self._connected()
            async with client.call(method, meta) as call:
                await call.send(b"", end=True)
                return await call.read(longest)

    def open(self, host: str, port: int, *, seconds: float) -> TunnelStream:
        """From a thread: a stream to ``host:port``, which stands within ``seconds``. Raises Fault and ConnectionLost:
        ``egress_refused``, ``egress_unreachable`` and ``overloaded`` are the egress's own words.
        """
        opening = self._open(host, port, seconds)
        try:
            opened = asyncio.run_coroutine_threadsafe(opening, self._loop)
        except RuntimeError:  # the loop has ended
            opening.close()
            raise _closing() from None
        try:
            return opened.result()
        except concurrent.futures.CancelledError:
            raise _closing() from None

    async def _open(self, host: str, port: int, seconds: float) -> TunnelStream:
        async with _within(seconds), contextlib.AsyncExitStack() as held:
            client = await self._connected()
            call = await held.enter_async_context(client.call("egress.connect", {"host": host, "port": port}))
            await call.reply()
            near, far = socket.socketpair()
            near.setblocking(False)
            stream = TunnelStream(far, self._loop)
            stream.pump = self._loop.create_task(_pump(call, near, stream, held.pop_all()), name=f"tunnel {host}")
            self._pumps[stream.pump] = client
            stream.pump.add_done_callback(self._pumps.pop)
            return stream

    async def _connected(self) -> Client:
        """Raises ConnectionLost."""
        async with self._dialling:
            if self._closed:
                raise _closing()
            if self._client is not None and self._client.closed:
                self._former.append(self._client)
                self._client = None
            if self._client is None:
                for client in [each for each in self._former if each not in self._pumps.values()]:
                    self._former.remove(client)
                    await client.close()
                self._client = await dial(self._egress, limits=self._limits)
            return self._client


class TunnelStream:
    """One stream: the thread's socket, which blocks, and why it ended if nobody meant it to."""

    def __init__(self, sock: socket.socket, loop: asyncio.AbstractEventLoop) -> None:
        self.socket = sock
        self.error: Fault | ConnectionLost | None = None
        """Set before the socket ends, when that is neither the other side's orderly end nor :meth:`close`."""
        self.pump: asyncio.Task[None] | None = None
        self._loop = loop
        self._closed = False

    def abort(self, error: Fault | ConnectionLost) -> None:
        """On the loop: whoever blocks on the socket finds its end, and ``error`` for a reason."""
        self.fail(error)
        self._stop()

    def fail(self, error: Fault | ConnectionLost) -> None:
        """For the pump. The first reason counts."""
        if not self._closed and self.error is None:
            self.error = error

    def close(self) -> None:
        """From any thread: both directions end now. To close the socket alone is a half-close to the other side."""
        self._closed = True
        self.socket.close()
        with contextlib.suppress(RuntimeError):  # the loop has ended, and the pump with it
            self._loop.call_soon_threadsafe(self._stop)

    def _stop(self) -> None:
        if self.pump is not None:
            self.pump.cancel()


async def _pump(call: Call, near: socket.socket, stream: TunnelStream, held: contextlib.AsyncExitStack) -> None:
    """Conveys bytes both ways until the other side ends (which in the RPC ends the call), a side breaks, or it is
    cancelled. Leaving ``held`` gives up a call that goes on."""
    loop = asyncio.get_running_loop()

    async def convey_out() -> None:
        while piece := await loop.sock_recv(near, PIECE):
            await call.send(piece)
        await call.send(b"", end=True)
        lingering.reschedule(loop.time() + LINGER_SECONDS)

    try:
        async with held, asyncio.timeout(None) as lingering, asyncio.TaskGroup() as group:
            outward = group.create_task(convey_out())
            async for piece in call:
                await loop.sock_sendall(near, piece)
            outward.cancel()
            _end(near)
    except* TimeoutError:
        stream.fail(Fault("deadline_exceeded", "the other side did not end"))
    except* OSError:
        stream.fail(ConnectionLost("the thread's side is closed"))
    except* (Fault, ConnectionLost) as errors:
        stream.fail(_first(errors))
    finally:
        near.close()


def _end(near: socket.socket) -> None:
    """The thread reads what is there and then the end. What it has sent and nobody wants any more is taken out: to
    close over it would turn that end into a reset."""
    near.shutdown(socket.SHUT_RDWR)
    while near.recv(PIECE):
        pass


def _first(group: BaseExceptionGroup[Fault | ConnectionLost]) -> Fault | ConnectionLost:
    error = group.exceptions[0]
    return _first(error) if isinstance(error, BaseExceptionGroup) else error


@contextlib.asynccontextmanager
async def _within(seconds: float) -> AsyncIterator[None]:
    try:
        async with asyncio.timeout(seconds):
            yield
    except TimeoutError:
        raise Fault("deadline_exceeded", f"the egress did not answer within {seconds:g} s") from None


def _closing() -> ConnectionLost:
    return ConnectionLost("the enclave is closing")
