"""One contract, on every transport."""

from __future__ import annotations

import asyncio
import contextlib
import os
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path

import pytest

from tests.vsock import pretend_vsock
from vsockrpc.address import VMADDR_CID_ANY, Address, VsockAddress
from vsockrpc.errors import LocalProtocolError
from vsockrpc.transport import (
    Call,
    Client,
    ConnectionLost,
    Fault,
    Handler,
    IncomingCall,
    Limits,
    Server,
    connect,
    dial,
    serve,
)

LIMITS = Limits(drain=0.2)
MIB = 1 << 20


@asynccontextmanager
async def both(
    address: Address,
    handlers: Mapping[str, Handler],
    *,
    limits: Limits = LIMITS,
    errors: list[BaseException] | None = None,
) -> AsyncIterator[tuple[Client, Server]]:
    """A server and a client of it. ``errors`` takes what handlers do not mean to raise; without it there is none."""
    unexpected: list[BaseException] = []
    on_error = unexpected.append if errors is None else errors.append
    async with (
        serve(address, handlers, on_error=on_error, limits=limits) as server,
        connect(server.address, limits=LIMITS) as client,
    ):
        yield client, server
    assert unexpected == []


async def echo(call: IncomingCall) -> None:
    body = await call.read(MIB)
    await call.reply({"method": call.method, "meta": dict(call.meta)})
    await call.send(body, end=True)


async def test_a_handler_knows_the_vm_that_calls_over_vsock(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def tell(call: IncomingCall) -> None:
        await call.reply({"cid": call.peer_cid})

    there = pretend_vsock(monkeypatch, folder, [16, 4294967294])
    async with serve(VsockAddress(VMADDR_CID_ANY, 5005), {"who": tell}, on_error=print, limits=LIMITS):
        for cid in (16, 4294967294):
            async with connect(there, limits=LIMITS) as client, client.call("who", {}) as call:
                assert await call.reply() == {"cid": cid}


async def test_elsewhere_nobody_has_a_cid(address: Address) -> None:
    async def tell(call: IncomingCall) -> None:
        await call.reply({"cid": call.peer_cid})

    expected = 1 if isinstance(address, VsockAddress) else None
    async with both(address, {"who": tell}) as (client, _), client.call("who", {}) as call:
        assert await call.reply() == {"cid": expected}


async def ask(client: Client, body: bytes = b"", method: str = "echo") -> bytes:
    async with client.call(method, {}) as call:
        await call.send(body, end=True)
        return await call.read(MIB)


async def until(condition: Callable[[], bool]) -> None:
    while not condition():  # noqa: ASYNC110 - what is waited for is the state of real sockets
        await asyncio.sleep(0.001)


class Stopper:
    """A handler that works until it is stopped."""

    def __init__(self) -> None:
        self.started = 0
        self.stopped = 0

    async def __call__(self, call: IncomingCall) -> None:
        self.started += 1
        try:
            await asyncio.Event().wait()
        finally:
            self.stopped += 1


# --- Calls that end cleanly -----------------------------------------------------------------------


async def test_a_call(address: Address) -> None:
    async with both(address, {"echo": echo}) as (client, _), client.call("echo", {"id": b"\x01", "n": 7}) as call:
        await call.send(b"hel")
        await call.send(b"lo", end=True)
        assert await call.reply() == {"method": "echo", "meta": {"id": b"\x01", "n": 7}}
        assert await call.reply() == await call.reply()
        assert await call.read(5) == b"hello"
        assert [piece async for piece in call] == []


@pytest.mark.parametrize("size", [0, 1, 262_144, 262_145, 3 * MIB + 1])
async def test_bodies_of_any_size_arrive_whole(address: Address, size: int) -> None:
    body = os.urandom(size)

    async def through(call: IncomingCall) -> None:
        await call.reply({})
        async for piece in call:
            await call.send(piece)

    async with both(address, {"through": through}) as (client, _), client.call("through", {}) as call:

        async def question() -> None:
            await call.send(body)
            await call.send(b"", end=True)

        sending = asyncio.create_task(question())
        assert await call.read(size) == body
        await sending


async def test_many_calls_at_once(address: Address) -> None:
    async with both(address, {"echo": echo}) as (client, server):
        bodies = [i.to_bytes(2) * (1 + 37 * i) for i in range(300)]
        assert await asyncio.gather(*(ask(client, body) for body in bodies)) == bodies
        assert server.connections == 1


async def test_a_handler_that_only_returns_has_answered(address: Address) -> None:
    async def nothing(call: IncomingCall) -> None:
        return

    async def head(call: IncomingCall) -> None:
        await call.reply({"head": True})

    async with (
        both(address, {"nothing": nothing, "head": head}) as (client, _),
        client.call("nothing", {}) as call,
    ):
        assert await call.reply() == {}
        assert await call.read(0) == b""
        async with client.call("head", {}) as call:
            assert await call.reply() == {"head": True}
            assert await call.read(0) == b""


async def test_a_question_is_dropped_when_the_answer_is_complete_before_it(address: Address) -> None:
    async def curt(call: IncomingCall) -> None:
        await call.reply({}, end=True)

    async with (
        both(address, {"curt": curt, "echo": echo}) as (client, _),
        client.call("curt", {}) as call,
    ):
        await call.send(bytes(4 * MIB), end=True)
        assert await call.read(0) == b""
        assert await ask(client, b"still there") == b"still there"


async def test_what_can_change_is_copied_and_bytes_are_not(address: Address) -> None:
    async with both(address, {"echo": echo}) as (client, _), client.call("echo", {}) as call:
        scratch = bytearray(b"first")
        await call.send(scratch)
        scratch[:] = b"secon"
        await call.send(memoryview(scratch)[:5], end=True)
        assert await call.read(10) == b"firstsecon"


async def test_small_pieces_that_wait_are_gathered(address: Address) -> None:
    """What waits to be read costs about its own size, whatever portions it came in."""
    sent = asyncio.Event()
    pieces: list[int] = []

    async def count(call: IncomingCall) -> None:
        await sent.wait()
        async for piece in call:
            pieces.append(len(piece))
        await call.end()

    async with both(address, {"count": count, "echo": echo}) as (client, _), client.call("count", {}) as call:
        for _ in range(500):
            await call.send(b"x")
            await asyncio.sleep(0)
        await call.send(b"", end=True)
        assert await ask(client, b"everything has arrived by now")
        sent.set()
        await call.read(0)
    assert sum(pieces) == 500
    assert len(pieces) < 5


# --- Calls do not wait for each other -------------------------------------------------------------


async def test_a_small_call_overtakes_a_large_one(address: Address) -> None:
    async def large(call: IncomingCall) -> None:
        await call.reply({})
        for _ in range(16):
            await call.send(bytes(MIB))

    async with both(address, {"large": large, "echo": echo}) as (client, _), client.call("large", {}) as call:
        received = 0
        async for piece in call:
            received += len(piece)
            assert await ask(client, b"small") == b"small"
            if received > 4 * MIB:
                break
        assert 4 * MIB < received < 16 * MIB


async def test_a_call_that_nobody_reads_holds_up_nobody(address: Address) -> None:
    async def endless(call: IncomingCall) -> None:
        await call.reply({})
        while True:
            await call.send(bytes(65536))

    async with (
        both(address, {"endless": endless, "echo": echo}) as (client, _),
        client.call("endless", {}) as first,
        client.call("endless", {}) as second,
    ):
        await first.reply()
        await second.reply()
        bodies = [bytes([i]) * 100_000 for i in range(50)]
        assert await asyncio.gather(*(ask(client, body) for body in bodies)) == bodies


async def test_a_client_that_is_stuck_holds_up_no_other(address: Address) -> None:
    stopper = Stopper()
    async with (
        both(address, {"stop": stopper, "echo": echo}) as (stuck, server),
        stuck.call("stop", {}),
        connect(server.address, limits=LIMITS) as other,
    ):
        assert await ask(other, b"free") == b"free"


async def test_two_bulk_calls_share_the_connection(address: Address) -> None:
    async def bulk(call: IncomingCall) -> None:
        await call.reply({})
        for _ in range(8):
            await call.send(bytes(MIB))

    async def total(call: Call) -> int:
        return sum([len(piece) async for piece in call])

    async with (
        both(address, {"bulk": bulk}) as (client, _),
        client.call("bulk", {}) as first,
        client.call("bulk", {}) as second,
    ):
        assert list(await asyncio.gather(total(first), total(second))) == [8 * MIB, 8 * MIB]


# --- Calls that end otherwise ---------------------------------------------------------------------


async def test_faults(address: Address) -> None:
    async def refuse(call: IncomingCall) -> None:
        raise Fault("overloaded", "come back later")

    async def late(call: IncomingCall) -> None:
        await call.reply({})
        await call.send(b"some")
        raise Fault("unavailable", "the rest is gone")

    async with both(address, {"refuse": refuse, "late": late}) as (client, _):
        for method, code in (("refuse", "overloaded"), ("none.such", "unknown_method"), ("late", "unavailable")):
            with pytest.raises(Fault) as caught:
                await ask(client, b"x", method)
            assert caught.value.code == code
        with pytest.raises(Fault, match="come back later"):
            async with client.call("refuse", {}) as call:
                await call.reply()


async def test_an_unexpected_exception_is_internal_and_its_text_stays_here(address: Address) -> None:
    errors: list[BaseException] = []

    async def broken(call: IncomingCall) -> None:
        raise KeyError("a secret")

    async def odd(call: IncomingCall) -> None:
        raise Fault("Not A Code")

    async def group(call: IncomingCall) -> None:
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(broken(call))

    handlers: dict[str, Handler] = {"broken": broken, "odd": odd, "group": group}
    async with both(address, handlers, errors=errors) as (client, _):
        for method in handlers:
            with pytest.raises(Fault) as caught:
                await ask(client, b"", method)
            assert caught.value.code == "internal"
            assert "secret" not in str(caught.value)
    assert [type(error) for error in errors] == [KeyError, LocalProtocolError, ExceptionGroup]


async def test_a_fault_among_a_handlers_tasks_is_that_fault(address: Address) -> None:
    async def refuse() -> None:
        raise Fault("overloaded")

    async def group(call: IncomingCall) -> None:
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(refuse())

    async with both(address, {"group": group}) as (client, _):
        with pytest.raises(Fault) as caught:
            await ask(client, b"", "group")
    assert caught.value.code == "overloaded"


async def test_a_body_longer_than_what_is_read(address: Address) -> None:
    async def small(call: IncomingCall) -> None:
        await call.read(10)

    async with both(address, {"small": small}) as (client, _):
        with pytest.raises(Fault) as caught:
            await ask(client, b"x" * 11, "small")
    assert caught.value.code == "malformed"


async def test_leaving_the_block_stops_the_work(address: Address) -> None:
    stopper = Stopper()
    async with both(address, {"stop": stopper}, limits=replace(LIMITS, max_calls=1)) as (client, server):
        for attempt in range(1, 4):
            async with client.call("stop", {}) as call:
                await until(lambda attempt=attempt: stopper.started == attempt)  # type: ignore[misc]
            await until(lambda: not server.running)
            await until(lambda: client.open_calls == 0)
            assert stopper.stopped == attempt
            with pytest.raises(LocalProtocolError):
                await call.send(b"x")
            with pytest.raises(LocalProtocolError):
                await call.reply()


async def test_cancelling_the_callers_task_stops_the_work(address: Address) -> None:
    stopper = Stopper()
    async with both(address, {"stop": stopper}) as (client, server):
        asking = asyncio.create_task(ask(client, b"x", "stop"))
        await until(lambda: stopper.started == 1)
        asking.cancel()
        with pytest.raises(asyncio.CancelledError):
            await asking
        await until(lambda: not server.running)
        assert stopper.stopped == 1


async def test_a_call_cancelled_before_its_handler_ran(address: Address) -> None:
    stopper = Stopper()
    async with both(address, {"stop": stopper, "echo": echo}) as (client, server):
        for _ in range(50):
            async with client.call("stop", {}):
                pass
        await until(lambda: client.open_calls == 0)
        assert not server.running
        assert stopper.started == stopper.stopped
        assert await ask(client, b"x") == b"x"


async def test_the_callers_place_is_free_only_when_the_work_has_stopped(address: Address) -> None:
    release = asyncio.Event()

    async def stubborn(call: IncomingCall) -> None:
        try:
            await asyncio.Event().wait()
        finally:
            await release.wait()

    async with both(address, {"stubborn": stubborn}, limits=replace(LIMITS, max_calls=1)) as (client, server):
        async with client.call("stubborn", {}):
            await until(lambda: len(server.running) == 1)
        with pytest.raises(Fault) as caught:
            async with client.call("stubborn", {}):
                pass
        assert caught.value.code == "too_many_calls"
        release.set()
        await until(lambda: client.open_calls == 0)


@pytest.mark.parametrize("answering", [False, True], ids=["silent", "in mid-answer"])
async def test_a_deadline_stops_both_sides(address: Address, answering: bool) -> None:
    stopper = Stopper()

    async def slow(call: IncomingCall) -> None:
        if answering:
            await call.reply({})
            await call.send(b"some")
        await stopper(call)

    async with both(address, {"slow": slow}) as (client, server):
        with pytest.raises(Fault) as caught:
            async with client.call("slow", {}, deadline=0.02) as call:
                await call.send(b"", end=True)
                await call.read(100)
        assert caught.value.code == "deadline_exceeded"
        await until(lambda: not server.running and client.open_calls == 0)
        assert stopper.stopped == stopper.started


async def test_the_callee_keeps_the_deadline_by_itself(address: Address) -> None:
    stopper = Stopper()
    async with both(address, {"stop": stopper}) as (client, _):
        call = client.call("stop", {}, deadline=0.02)
        async with call:
            assert call._timer is not None
            call._timer.cancel()
            with pytest.raises(Fault) as caught:
                await call.reply()
        assert caught.value.code == "deadline_exceeded"
        assert stopper.stopped == 1


async def test_a_deadline_must_be_positive(address: Address) -> None:
    async with both(address, {}) as (client, _):
        for seconds in (0.0, -1.0, float("nan")):
            with pytest.raises(ValueError, match="deadline"):
                client.call("m", {}, deadline=seconds)


async def test_more_handlers_than_the_server_runs(address: Address) -> None:
    stopper = Stopper()
    async with (
        both(address, {"stop": stopper}, limits=replace(LIMITS, max_running=1)) as (client, _),
        client.call("stop", {}),
    ):
        with pytest.raises(Fault) as caught:
            await ask(client, b"", "stop")
    assert caught.value.code == "too_many_calls"


async def test_a_receiver_that_takes_nothing_ends_the_call_and_no_other(address: Address) -> None:
    limits = replace(LIMITS, stall=0.2)
    stopped = asyncio.Event()

    async def endless(call: IncomingCall) -> None:
        await call.reply({})
        try:
            while True:
                await call.send(bytes(65536))
        finally:
            stopped.set()

    async with (
        both(address, {"endless": endless, "echo": echo}, limits=limits) as (client, _),
        client.call("endless", {}) as call,
    ):
        await stopped.wait()
        with pytest.raises(Fault) as caught:
            await call.read(1 << 30)
        assert caught.value.code == "deadline_exceeded"
        assert await ask(client, b"x") == b"x"


async def test_a_send_that_was_cut_short_is_never_given_an_end(address: Address) -> None:
    """Else a truncated body or answer would look complete."""
    errors: list[BaseException] = []
    bodies: list[bytes] = []

    async def careless(call: IncomingCall) -> None:
        await call.reply({})
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(0.02):
                await call.send(bytes(64 * MIB))

    async def collect(call: IncomingCall) -> None:
        await until(lambda: cut.is_set())
        bodies.append(await call.read(64 * MIB))

    cut = asyncio.Event()
    async with both(address, {"careless": careless, "collect": collect}, errors=errors) as (client, server):
        async with client.call("careless", {}) as call:
            await until(lambda: not server.running)
            with pytest.raises(Fault) as caught:
                await call.read(64 * MIB)
        assert caught.value.code == "internal"
        assert [type(error) for error in errors] == [LocalProtocolError]
        async with client.call("collect", {}) as call:
            with pytest.raises(TimeoutError):
                async with asyncio.timeout(0.02):
                    await call.send(bytes(64 * MIB), end=True)
            with pytest.raises(LocalProtocolError):
                await call.send(b"", end=True)
            cut.set()
    assert bodies == []


# --- Connections that end -------------------------------------------------------------------------


async def test_a_lost_connection_is_no_end_and_no_fault(address: Address) -> None:
    started = asyncio.Event()

    async def half(call: IncomingCall) -> None:
        await call.reply({})
        await call.send(b"half of it")
        started.set()
        await asyncio.Event().wait()

    async with both(address, {"half": half}) as (client, server):

        async def read() -> bytes:
            async with client.call("half", {}) as call:
                return await call.read(100)

        async def send() -> None:
            async with client.call("half", {}) as call:
                while True:
                    await call.send(bytes(65536))

        asking = [asyncio.create_task(read()), asyncio.create_task(send())]
        await started.wait()
        for peer in list(server._peers):
            peer.link.lose("pulled out")
        assert not server.connections
        for result in await asyncio.gather(*asking, return_exceptions=True):
            assert isinstance(result, ConnectionLost)
            assert result.code == "connection_lost"
        assert client.closed
        with pytest.raises(ConnectionLost):
            await ask(client)
        await until(lambda: not server.running)


async def test_a_vanished_client_stops_the_work(address: Address) -> None:
    stopper = Stopper()
    async with both(address, {"stop": stopper}) as (client, server), client.call("stop", {}):
        await until(lambda: stopper.started == 1)
        client._link.lose("pulled out")
        await until(lambda: not server.running)
    assert stopper.stopped == 1


async def test_a_closing_server_lets_calls_end(address: Address) -> None:
    go_on = asyncio.Event()

    async def patient(call: IncomingCall) -> None:
        await go_on.wait()
        await call.reply({})
        await call.send(b"x" * MIB, end=True)

    async with (
        both(address, {"patient": patient}, limits=replace(LIMITS, drain=60)) as (client, server),
        client.call("patient", {}) as call,
    ):
        await until(lambda: len(server.running) == 1)
        closing = asyncio.create_task(server.close())
        await until(lambda: client.closed)
        with pytest.raises(ConnectionLost):
            await ask(client)
        go_on.set()
        assert len(await call.read(MIB)) == MIB
        await closing
        with pytest.raises(ConnectionLost) as caught:
            await dial(server.address)
        assert caught.value.code == "unreachable"


async def test_a_closing_server_stops_what_does_not_end(address: Address) -> None:
    stopper = Stopper()
    async with (
        both(address, {"stop": stopper}, limits=replace(LIMITS, drain=0.01)) as (client, server),
        client.call("stop", {}) as call,
    ):
        await until(lambda: stopper.started == 1)
        await server.close()
        with pytest.raises(Fault) as caught:
            await call.reply()
    assert caught.value.code == "unavailable"
    assert stopper.stopped == 1


async def test_closing_the_client_ends_its_calls(address: Address) -> None:
    stopper = Stopper()
    async with both(address, {"stop": stopper}) as (client, server):
        asking = asyncio.create_task(ask(client, b"", "stop"))
        await until(lambda: stopper.started == 1)
        await client.close()
        await client.close()
        with pytest.raises(ConnectionLost):
            await asking
        await until(lambda: not server.running)


async def test_nothing_is_left_behind(address: Address) -> None:
    """Descriptors, tasks and connections, after many of each."""
    async with both(address, {"echo": echo}) as (first, server):

        async def once(i: int) -> None:
            async with connect(server.address, limits=LIMITS) as client:
                assert await ask(client, bytes([i])) == bytes([i])

        await first.close()
        await until(lambda: not server.connections)
        descriptors = len(os.listdir("/proc/self/fd"))
        for _ in range(10):
            await asyncio.gather(*(once(i) for i in range(20)))
        await until(lambda: not server.connections)
        assert len(os.listdir("/proc/self/fd")) == descriptors
        assert len(asyncio.all_tasks()) == 1


async def test_keepalive_keeps_an_idle_connection(address: Address) -> None:
    """The server finds the client silent again and again, asks, and is answered."""
    async with both(address, {"echo": echo}, limits=replace(LIMITS, idle=0.01)) as (client, _):
        frames_then = client._link.connection.frames_received
        await until(lambda: client._link.connection.frames_received > frames_then + 3)
        assert await ask(client, b"x") == b"x"
