"""Peers that break the rules, dawdle, or leave; on the other end of a real socket."""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import replace
from pathlib import Path

import pytest

from vsockrpc import frames
from vsockrpc.address import UnixAddress
from vsockrpc.frames import HEADER, FrameType
from vsockrpc.transport import ConnectionLost, Fault, IncomingCall, Limits, Server, connect, dial, serve

LIMITS = Limits(drain=0.2)
WIDE = Limits(window=16_777_216)
PING = frames.frame(FrameType.PING, 0, bytes(8))


def data(call: int, payload: bytes, *, end: bool = False) -> bytes:
    return frames.header(FrameType.DATA, call, len(payload), end=end) + payload


class Wire:
    """The other end of a connection, by hand."""

    def __init__(self, sock: socket.socket) -> None:
        sock.setblocking(False)
        self.sock = sock
        self._loop = asyncio.get_running_loop()

    async def send(self, data: bytes) -> None:
        await self._loop.sock_sendall(self.sock, data)

    async def frame(self) -> tuple[FrameType, int, bytes]:
        kind, _, _, call, length = HEADER.unpack(await self._exactly(HEADER.size))
        return FrameType(kind), call, await self._exactly(length)

    async def until(self, wanted: FrameType) -> tuple[int, bytes]:
        while (found := await self.frame())[0] is not wanted:
            pass
        return found[1:]

    async def ended(self) -> list[FrameType]:
        """Every frame to the end of the stream."""
        kinds = []
        try:
            while True:
                kinds.append((await self.frame())[0])
        except (EOFError, ConnectionResetError):
            return kinds

    async def _exactly(self, size: int) -> bytes:
        received = b""
        while len(received) < size:
            portion = await self._loop.sock_recv(self.sock, size - len(received))
            if not portion:
                raise EOFError
            received += portion
        return received


class Handlers:
    def __init__(self) -> None:
        self.started = 0
        self.stopped = 0

    async def wait(self, call: IncomingCall) -> None:
        self.started += 1
        try:
            await asyncio.Event().wait()
        finally:
            self.stopped += 1

    async def endless(self, call: IncomingCall) -> None:
        self.started += 1
        try:
            await call.reply({})
            while True:
                await call.send(bytes(262_144))
        finally:
            self.stopped += 1

    async def echo(self, call: IncomingCall) -> None:
        body = await call.read(1 << 20)
        await call.reply({})
        await call.send(body, end=True)


@asynccontextmanager
async def serving(folder: Path, limits: Limits = LIMITS) -> AsyncIterator[tuple[Server, Handlers]]:
    handlers = Handlers()
    methods = {"wait": handlers.wait, "endless": handlers.endless, "echo": handlers.echo}
    errors: list[BaseException] = []
    async with serve(UnixAddress(str(folder / "s")), methods, on_error=errors.append, limits=limits) as server:
        yield server, handlers
    assert errors == []


@contextmanager
def raw(server: Server) -> Iterator[Wire]:
    assert isinstance(server.address, UnixAddress)
    with socket.socket(socket.AF_UNIX) as sock:
        sock.connect(server.address.path)
        yield Wire(sock)


async def settled(server: Server) -> None:
    while server.connections or server.running:  # noqa: ASYNC110 - what is waited for is the state of real sockets
        await asyncio.sleep(0.001)


async def still_serves(server: Server) -> None:
    async with connect(server.address, limits=LIMITS) as client, client.call("echo", {}) as call:
        await call.send(b"well", end=True)
        assert await call.read(10) == b"well"


HELLO = frames.hello(WIDE)
WAIT = frames.call(1, "wait", 0, {}, end=False)


@pytest.mark.parametrize(
    "stream",
    [
        pytest.param(b"GET / HTTP/1.1\r\nHost: enclave\r\n\r\n", id="HTTP"),
        pytest.param(b"\xff" * 1000, id="garbage"),
        pytest.param(WAIT, id="no HELLO"),
        pytest.param(HELLO + HELLO, id="two HELLOs"),
        pytest.param(HELLO + WAIT + HEADER.pack(2, 0, 0, 1, 0xFFFFFFFF), id="a frame of 4 GiB"),
        pytest.param(HELLO + HEADER.pack(1, 0, 0, 1, 16_385), id="an oversized CALL"),
        pytest.param(HELLO + WAIT + HEADER.pack(2, 2, 0, 1, 1) + b"x", id="a bad flag"),
        pytest.param(HELLO + WAIT + data(1, bytes(262_144)) * 5, id="window overflow"),
        pytest.param(HELLO + WAIT + data(1, b"", end=True) + data(1, b"x"), id="DATA after END"),
        pytest.param(HELLO + data(1, b"x"), id="an unknown call"),
        pytest.param(HELLO + WAIT + WAIT, id="the same call twice"),
        pytest.param(HELLO + WAIT + frames.window(1, 16_777_216), id="a grant too large"),
        pytest.param(HELLO + PING + PING, id="two PINGs"),
        pytest.param(HELLO + frames.reply(1, {}, end=True), id="a callee's frame"),
    ],
)
async def test_a_violation_ends_that_connection_with_a_goaway(folder: Path, stream: bytes) -> None:
    async with serving(folder) as (server, handlers):
        with raw(server) as wire:
            with contextlib.suppress(BrokenPipeError):  # it need not have read all of it
                await wire.send(stream)
            assert (await wire.ended())[-1] is FrameType.GOAWAY
        await settled(server)
        assert handlers.started == handlers.stopped
        await still_serves(server)


@pytest.mark.parametrize(
    "stream",
    [
        pytest.param(b"", id="at once"),
        pytest.param(HELLO[:5], id="in a header"),
        pytest.param(HELLO[:20], id="in HELLO"),
        pytest.param(HELLO + WAIT, id="with a call open"),
        pytest.param(HELLO + WAIT + data(1, bytes(1000))[:500], id="in DATA"),
    ],
)
async def test_a_peer_that_leaves(folder: Path, stream: bytes) -> None:
    async with serving(folder) as (server, handlers):
        with raw(server) as wire:
            await wire.send(stream)
        await settled(server)
        assert handlers.started == handlers.stopped
        await still_serves(server)


@pytest.mark.parametrize("stream", [b"", HELLO[:1], HELLO[:-1]], ids=["nothing", "a byte", "all but a byte"])
async def test_a_peer_that_does_not_finish_its_hello(folder: Path, stream: bytes) -> None:
    async with serving(folder, replace(LIMITS, handshake=0.05)) as (server, _):
        with raw(server) as wire:
            await wire.send(stream)
            assert await wire.ended() == [FrameType.HELLO]


async def test_a_peer_that_drips_a_frame(folder: Path) -> None:
    """Bytes that complete no frame are no sign of life."""
    async with serving(folder, replace(LIMITS, idle=0.05, pong=0.05)) as (server, handlers):
        with raw(server) as wire:
            await wire.send(HELLO + WAIT + HEADER.pack(2, 0, 0, 1, 262_144))

            async def drip() -> None:
                while True:
                    await wire.send(b"x")
                    await asyncio.sleep(0.002)

            dripping = asyncio.create_task(drip())
            assert FrameType.PING in await wire.ended()
            with pytest.raises(OSError):
                await dripping
        await settled(server)
        assert handlers.started == handlers.stopped == 1


async def test_a_peer_that_answers_no_ping(folder: Path) -> None:
    async with serving(folder, replace(LIMITS, idle=0.02, pong=0.05)) as (server, _):
        with raw(server) as wire:
            await wire.send(HELLO)
            assert await wire.ended() == [FrameType.HELLO, FrameType.PING]


async def test_a_peer_that_never_reads(folder: Path) -> None:
    async with serving(folder, replace(LIMITS, stall=0.05)) as (server, handlers):
        with raw(server) as wire:
            calls = [frames.call(n, "endless", 0, {}, end=True) for n in range(1, 21)]
            await wire.send(HELLO + b"".join(calls))
            while handlers.stopped < 20:  # noqa: ASYNC110
                await asyncio.sleep(0.001)
            await settled(server)
            assert handlers.started == 20
        await still_serves(server)


async def test_a_peer_that_never_reads_holds_up_no_other(folder: Path) -> None:
    async with serving(folder) as (server, handlers):
        with raw(server) as wire:
            await wire.send(HELLO + frames.call(1, "endless", 0, {}, end=True))
            while not handlers.started:  # noqa: ASYNC110
                await asyncio.sleep(0.001)
            for _ in range(5):
                await still_serves(server)


async def test_a_peer_that_asks_and_cancels_as_fast_as_it_can(folder: Path) -> None:
    """What is bounded is the work, not only the talk (CVE-2023-44487)."""
    most = 0
    async with serving(folder, replace(LIMITS, max_calls=8)) as (server, handlers):
        with raw(server) as wire:
            await wire.send(HELLO)
            await wire.until(FrameType.HELLO)
            for first in range(1, 4001, 8):
                numbers = range(first, first + 8)
                cancel = b"".join(frames.frame(FrameType.CANCEL, n, b"") for n in numbers)
                await wire.send(b"".join(frames.call(n, "wait", 0, {}, end=True) for n in numbers) + cancel)
                for _ in numbers:
                    await wire.until(FrameType.FAULT)
                    most = max(most, len(server.running))
            assert most <= 8
            assert handlers.started == handlers.stopped
            await wire.send(b"".join(frames.call(5000 + n, "wait", 0, {}, end=True) for n in range(9)))
            assert (await wire.ended())[-1] is FrameType.GOAWAY
        await settled(server)
        await still_serves(server)


async def test_more_connections_than_the_server_takes(folder: Path) -> None:
    async with serving(folder, replace(LIMITS, max_connections=2)) as (server, _):
        async with connect(server.address) as first, connect(server.address):
            with pytest.raises(ConnectionLost, match="overloaded"):
                await dial(server.address)
            assert not first.closed
        await settled(server)
        await still_serves(server)


async def test_a_caller_that_ignores_the_callees_end_keeps_its_own_place_occupied(folder: Path) -> None:
    async with serving(folder, replace(LIMITS, max_calls=2)) as (server, _):
        with raw(server) as wire:
            await wire.send(HELLO + b"".join(frames.call(n, "none.such", 0, {}, end=False) for n in (1, 2)))
            await wire.until(FrameType.FAULT)
            await wire.until(FrameType.FAULT)
            await wire.send(frames.frame(FrameType.CANCEL, 1, b"") + frames.call(3, "echo", 0, {}, end=True))
            assert (await wire.until(FrameType.REPLY))[0] == 3
            await wire.send(b"".join(frames.call(n, "wait", 0, {}, end=True) for n in (4, 5)))
            assert (await wire.ended())[-1] is FrameType.GOAWAY


async def test_bytes_one_by_one_are_the_same_bytes(folder: Path) -> None:
    async with serving(folder) as (server, _):
        with raw(server) as wire:
            for byte in HELLO + frames.call(1, "echo", 0, {}, end=False) + data(1, b"drops", end=True):
                await wire.send(bytes([byte]))
            assert await wire.until(FrameType.DATA) == (1, b"drops")


async def test_data_that_no_handler_reads_is_bounded_by_the_whole_connection(folder: Path) -> None:
    limits = replace(LIMITS, window=1 << 20, max_buffered=4 << 20)
    async with serving(folder, limits) as (server, _):
        with raw(server) as wire:
            await wire.send(HELLO)
            shed = 0
            for number in range(1, 13):
                await wire.send(frames.call(number, "wait", 0, {}, end=False) + data(number, bytes(262_144)) * 4)
            while shed < 8:
                number, payload = await wire.until(FrameType.FAULT)
                assert frames.parse_fault(payload)[0] == "overloaded"
                shed += 1
            assert len(server.running) <= 4


# --- Servers that are hostile to a client ---------------------------------------------------------


@asynccontextmanager
async def by_hand(folder: Path, script: Callable[[Wire], Awaitable[None]]) -> AsyncIterator[UnixAddress]:
    path = str(folder / "h")
    loop = asyncio.get_running_loop()
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(path)
        listener.listen()
        listener.setblocking(False)

        async def accept() -> None:
            sock, _ = await loop.sock_accept(listener)
            with sock:
                await script(Wire(sock))

        playing = asyncio.create_task(accept())
        try:
            yield UnixAddress(path)
        finally:
            playing.cancel()
            await asyncio.gather(playing, return_exceptions=True)


ANSWERS: list[tuple[str, bytes, type[Exception]]] = [
    ("closes", b"", ConnectionLost),
    ("answers half", frames.reply(1, {}, end=False) + data(1, b"half"), ConnectionLost),
    ("leaves in a frame", frames.reply(1, {}, end=False) + data(1, b"half")[:-1], ConnectionLost),
    ("sends DATA before REPLY", data(1, b"x"), ConnectionLost),
    ("answers another call", frames.reply(2, {}, end=True), ConnectionLost),
    ("says that we broke the protocol", frames.go_away("protocol_error"), ConnectionLost),
    ("refuses", frames.fault(1, "made_up", "\x1b[2J"), Fault),
]


@pytest.mark.parametrize(("answer", "error"), [pytest.param(a, e, id=name) for name, a, e in ANSWERS])
async def test_answers_that_are_no_clean_end(folder: Path, answer: bytes, error: type[Exception]) -> None:
    async def script(wire: Wire) -> None:
        await wire.send(HELLO)
        await wire.until(FrameType.CALL)
        await wire.send(answer)

    async with (
        by_hand(folder, script) as address,
        connect(address, limits=LIMITS) as client,
        client.call("m", {}) as call,
    ):
        await call.send(b"", end=True)
        with pytest.raises(error):
            await call.read(100)


async def test_an_answer_that_is_complete_when_the_server_leaves(folder: Path) -> None:
    async def script(wire: Wire) -> None:
        await wire.send(HELLO)
        await wire.until(FrameType.CALL)
        await wire.send(frames.reply(1, {"a": 1}, end=False) + data(1, b"all", end=True))

    async with (
        by_hand(folder, script) as address,
        connect(address, limits=LIMITS) as client,
        client.call("m", {}) as call,
    ):
        while client._link.lost is None:  # noqa: ASYNC110 - what is waited for is the state of a real socket
            await asyncio.sleep(0)
        assert await call.reply() == {"a": 1}
        assert await call.read(100) == b"all"


async def test_a_server_that_never_answers_is_left_at_the_deadline(folder: Path) -> None:
    async def script(wire: Wire) -> None:
        await wire.send(HELLO)
        await asyncio.Event().wait()

    async with by_hand(folder, script) as address, connect(address, limits=LIMITS) as client:
        async with client.call("m", {}, deadline=0.02) as call:
            with pytest.raises(Fault) as caught:
                await call.reply()
        assert caught.value.code == "deadline_exceeded"
