"""Streams through the parent's real egress, from threads that block on them."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncIterator, Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from enclave.kms import tunnel as tunnels
from enclave.kms.tunnel import Tunnel, TunnelStream
from parent.egress import Allowed, Egress, Endpoint
from vsockrpc.address import UnixAddress
from vsockrpc.transport import ConnectionLost, Fault, Handler, IncomingCall, Limits, Server, serve

HOST, PORT = "kms.test", 443
Answer = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]
SECONDS = 20.0


async def echo(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    while piece := await reader.read(65_536):
        writer.write(piece)
        await writer.drain()


async def read_all(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    content = await reader.read()
    writer.write(len(content).to_bytes(4))


@dataclass
class Outside:
    """A TCP server and the egress that leads to it. The egress can be killed, and started anew."""

    address: UnixAddress
    answer: Answer
    egress: Egress | None = None
    server: Server | None = None
    ended: list[bool] = field(default_factory=list)
    """For every TCP connection that has ended, whether it was in order."""
    _running: AsyncExitStack = field(default_factory=AsyncExitStack)

    async def start(self) -> None:
        async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            try:
                await self.answer(reader, writer)
                writer.close()
                await writer.wait_closed()
                self.ended.append(True)
            except OSError:
                self.ended.append(False)

        self.tcp = await asyncio.start_server(handle, "127.0.0.1", 0)
        self._port: int = self.tcp.sockets[0].getsockname()[1]
        await self.start_egress()

    async def start_egress(self, handlers: dict[str, Handler] | None = None) -> None:
        target = Endpoint("127.0.0.1", self._port)
        self.egress = Egress([Allowed(Endpoint(HOST, PORT), target)])
        self.server = await self._running.enter_async_context(
            serve(self.address, handlers or self.egress.handlers, on_error=print, limits=Limits(drain=0.2))
        )

    def kill_egress(self) -> None:
        """What a dead process is: every connection ends at once."""
        assert self.server is not None
        for peer in list(self.server._peers):
            peer.link.lose("killed")

    async def stop_egress(self) -> None:
        await self._running.aclose()
        if self.egress is not None:
            await self.egress.close()

    async def stop(self) -> None:
        self.tcp.close()
        await self.stop_egress()
        await self.tcp.wait_closed()


@asynccontextmanager
async def outside(directory: Path, answer: Answer = echo) -> AsyncIterator[tuple[Outside, Tunnel]]:
    there = Outside(UnixAddress(str(directory / "egress.sock")), answer)
    await there.start()
    tunnel = Tunnel(there.address)
    try:
        yield there, tunnel
    finally:
        await tunnel.close()
        await there.stop()


async def opened(tunnel: Tunnel, host: str = HOST, port: int = PORT, seconds: float = SECONDS) -> TunnelStream:
    return await asyncio.to_thread(tunnel.open, host, port, seconds=seconds)


def received(sock: socket.socket) -> bytes:
    """All of it, to the end."""
    whole = bytearray()
    while piece := sock.recv(65_536):
        whole += piece
    return bytes(whole)


async def until(condition: Callable[[], bool]) -> None:
    for _ in range(1000):
        if condition():
            return
        await asyncio.sleep(0.01)
    raise AssertionError("it never came to that")


# --- Bytes both ways --------------------------------------------------------------------------------------------------


async def test_bytes_go_both_ways(tmp_path: Path) -> None:
    content = bytes(range(256)) * 200
    async with outside(tmp_path) as (there, tunnel):
        stream = await opened(tunnel)

        def exchange() -> list[bytes]:
            with stream.socket as sock:
                heard = []
                for piece in (b"hello", content):
                    sock.sendall(piece)
                    heard.append(sock.recv(len(piece), socket.MSG_WAITALL))
                sock.shutdown(socket.SHUT_WR)
                return [*heard, received(sock)]

        assert await asyncio.to_thread(exchange) == [b"hello", content, b""]
        assert stream.error is None
        assert there.ended == [True]


async def test_a_half_close_lets_the_answer_come(tmp_path: Path) -> None:
    async with outside(tmp_path, read_all) as (there, tunnel):
        stream = await opened(tunnel)

        def exchange() -> bytes:
            with stream.socket as sock:
                sock.sendall(bytes(3_000_000))
                sock.shutdown(socket.SHUT_WR)
                return received(sock)

        assert int.from_bytes(await asyncio.to_thread(exchange)) == 3_000_000
        assert stream.pump is not None
        await stream.pump
        assert stream.error is None
        assert there.ended == [True]


async def test_the_other_sides_end_is_an_end_and_no_reset(tmp_path: Path) -> None:
    async def farewell(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"bye")

    async with outside(tmp_path, farewell) as (_, tunnel):
        stream = await opened(tunnel)
        assert stream.pump is not None
        await stream.pump

        def exchange() -> bytes:
            with stream.socket as sock:
                with pytest.raises(BrokenPipeError):
                    sock.sendall(b"too late")
                return received(sock)

        assert await asyncio.to_thread(exchange) == b"bye"
        assert stream.error is None


async def test_what_nobody_reads_any_more_makes_no_reset(tmp_path: Path) -> None:
    reached = asyncio.Event()

    async def deaf(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"bye")
        await reached.wait()

    async with outside(tmp_path, deaf) as (_, tunnel):
        stream = await opened(tunnel)
        with stream.socket as sock:
            sock.setblocking(False)
            with pytest.raises(BlockingIOError):
                while True:  # fills everything on the way
                    sock.sendall(bytes(65_536))
                    await asyncio.sleep(0)
            reached.set()
            assert stream.pump is not None
            await stream.pump
            sock.setblocking(True)
            sock.settimeout(SECONDS)
            if stream.error is None:  # the system may have reset the TCP connection, with bytes unread at its end
                assert await asyncio.to_thread(received, sock) == b"bye"


async def test_streams_do_not_wait_for_each_other(tmp_path: Path) -> None:
    waiting = asyncio.Barrier(24)

    async def together(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await waiting.wait()
        writer.write(await reader.read(100))

    async with outside(tmp_path, together) as (there, tunnel):

        def exchange(number: int) -> bytes:
            stream = tunnel.open(HOST, PORT, seconds=SECONDS)
            with stream.socket as sock:
                sock.sendall(bytes([number]))
                return received(sock)

        with ThreadPoolExecutor(24) as pool:  # each waits for all the others
            loop = asyncio.get_running_loop()
            answers = await asyncio.gather(*(loop.run_in_executor(pool, exchange, number) for number in range(24)))
        assert answers == [bytes([number]) for number in range(24)]
        assert there.server is not None
        assert there.server.connections == 1


# --- What goes wrong --------------------------------------------------------------------------------------------------


async def test_the_egresss_own_words_reach_the_thread(tmp_path: Path) -> None:
    async with outside(tmp_path) as (there, tunnel):
        with pytest.raises(Fault) as refused:
            await opened(tunnel, "elsewhere.test")
        assert refused.value.code == "egress_refused"
        there.tcp.close()
        await there.tcp.wait_closed()
        with pytest.raises(Fault) as unreachable:
            await opened(tunnel)
        assert unreachable.value.code == "egress_unreachable"


async def test_without_an_egress_nothing_is_waited_for(tmp_path: Path) -> None:
    tunnel = Tunnel(UnixAddress(str(tmp_path / "egress.sock")))
    with pytest.raises(ConnectionLost) as lost:
        await opened(tunnel)
    assert lost.value.code == "unreachable"
    await tunnel.close()


async def test_a_killed_egress_ends_the_stream_at_once_and_a_new_one_is_found(tmp_path: Path) -> None:
    async with outside(tmp_path) as (there, tunnel):
        stream = await opened(tunnel)
        with stream.socket as sock:
            blocked = asyncio.create_task(asyncio.to_thread(sock.recv, 1))
            there.kill_egress()
            assert await blocked == b""
        assert isinstance(stream.error, ConnectionLost)
        await there.stop_egress()
        with pytest.raises(ConnectionLost):
            await opened(tunnel)
        await there.start_egress()
        again = await opened(tunnel)
        with again.socket as sock:
            sock.sendall(b"?")
            assert await asyncio.to_thread(sock.recv, 1) == b"?"


async def test_an_egress_that_is_leaving_keeps_its_streams(tmp_path: Path) -> None:
    async with outside(tmp_path) as (there, tunnel):
        stream = await opened(tunnel)
        assert there.server is not None
        for peer in there.server._peers:
            peer.go_away()
        await until(lambda: tunnel._client is not None and tunnel._client.closed)
        second = await opened(tunnel)
        for each in (stream, second):
            with each.socket as sock:
                sock.sendall(b"?")
                assert await asyncio.to_thread(sock.recv, 1) == b"?"
        assert there.server.connections == 2
        for each in (stream, second):
            assert each.pump is not None
            each.close()
            await asyncio.wait([each.pump])
        for peer in there.server._peers:
            peer.go_away()
        await until(lambda: tunnel._client is not None and tunnel._client.closed)
        third = await opened(tunnel)
        third.close()
        assert len(tunnel._former) == 0


async def test_a_silent_egress_meets_the_deadline(tmp_path: Path) -> None:
    async def silence(call: IncomingCall) -> None:
        await asyncio.Event().wait()

    there = Outside(UnixAddress(str(tmp_path / "egress.sock")), echo)
    await there.start()
    await there.stop_egress()
    await there.start_egress({"egress.connect": silence, "credentials.get": silence})
    tunnel = Tunnel(there.address)
    with pytest.raises(Fault) as late:
        await opened(tunnel, seconds=0.05)
    assert late.value.code == "deadline_exceeded"
    with pytest.raises(Fault) as late:
        await tunnel.ask("credentials.get", {}, longest=100, seconds=0.05)
    assert late.value.code == "deadline_exceeded"
    await tunnel.close()
    await there.stop()


async def test_an_aborted_stream_says_why(tmp_path: Path) -> None:
    async with outside(tmp_path) as (_, tunnel):
        stream = await opened(tunnel)
        with stream.socket as sock:
            blocked = asyncio.create_task(asyncio.to_thread(sock.recv, 1))
            why = Fault("deadline_exceeded")
            stream.abort(why)
            stream.abort(Fault("overloaded"))
            assert await blocked == b""
        assert stream.error is why


async def test_a_closed_stream_gives_up_the_call(tmp_path: Path) -> None:
    async with outside(tmp_path) as (there, tunnel):
        stream = await opened(tunnel)
        await asyncio.to_thread(stream.close)
        assert stream.pump is not None
        await asyncio.wait([stream.pump])
        server = there.server
        assert server is not None
        await until(lambda: not server.running)
        stream.close()  # again, when there is nothing left to do


async def test_a_side_that_never_ends_is_not_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tunnels, "LINGER_SECONDS", 0.05)
    forever = asyncio.Event()

    async def stay(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await forever.wait()

    async with outside(tmp_path, stay) as (_, tunnel):
        stream = await opened(tunnel)
        with stream.socket as sock:
            sock.shutdown(socket.SHUT_WR)
            assert await asyncio.to_thread(sock.recv, 1) == b""
        assert stream.error is not None
        assert stream.error.code == "deadline_exceeded"
        forever.set()


async def test_a_closed_tunnel_opens_nothing(tmp_path: Path) -> None:
    async with outside(tmp_path) as (_, tunnel):
        stream = await opened(tunnel)
        await tunnel.close()
        assert await asyncio.to_thread(received, stream.socket) == b""
        stream.socket.close()
        with pytest.raises(ConnectionLost, match="closing"):
            await opened(tunnel)


def test_an_ended_loop_opens_nothing(tmp_path: Path) -> None:
    async def make() -> Tunnel:
        return Tunnel(UnixAddress(str(tmp_path / "egress.sock")))

    tunnel = asyncio.run(make())
    with pytest.raises(ConnectionLost, match="closing"):
        tunnel.open(HOST, PORT, seconds=1)


async def test_a_small_question_is_answered_within_its_bounds(tmp_path: Path) -> None:
    async def credentials(call: IncomingCall) -> None:
        await call.reply({})
        await call.send(b"12345", end=True)

    there = Outside(UnixAddress(str(tmp_path / "egress.sock")), echo)
    await there.start()
    await there.stop_egress()
    await there.start_egress({"credentials.get": credentials})
    tunnel = Tunnel(there.address)
    assert await tunnel.ask("credentials.get", {}, longest=5, seconds=SECONDS) == b"12345"
    with pytest.raises(Fault, match="more than 4 bytes"):
        await tunnel.ask("credentials.get", {}, longest=4, seconds=SECONDS)
    await tunnel.close()
    await there.stop()
