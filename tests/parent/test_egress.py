"""The egress: to the list and nowhere else, no connection waits for another, and a broken one never looks ended."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import struct
from collections.abc import AsyncIterator, Awaitable, Callable
from ipaddress import ip_address
from pathlib import Path
from typing import Any, TypeAlias

import pytest
from hypothesis import given
from hypothesis import strategies as st
from prometheus_client import CollectorRegistry

from parent.egress import Allowed, AllowListError, Egress, EgressLimits, Endpoint, first_connected
from parent.names import Names
from tests.name_server import name_server
from vsockrpc.address import UnixAddress
from vsockrpc.limits import Limits
from vsockrpc.transport import Call, Client, Fault, connect, serve

HOST = "kms.example"
PORT = 443
Serve: TypeAlias = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]


async def echo(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    while data := await reader.read(1 << 16):
        writer.write(data)
        await writer.drain()
    writer.write(b"<end>")


@contextlib.asynccontextmanager
async def target(behaviour: Serve = echo, host: str = "127.0.0.1") -> AsyncIterator[int]:
    """A TCP server; yields its port."""
    serving: set[asyncio.Task[None]] = set()

    async def one(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        serving.add(task)
        with contextlib.suppress(ConnectionError, asyncio.CancelledError):
            await behaviour(reader, writer)
        writer.close()
        with contextlib.suppress(ConnectionError):
            await writer.wait_closed()

    server = await asyncio.start_server(one, host, 0, family=socket.AF_INET)
    try:
        yield server.sockets[0].getsockname()[1]
    finally:
        server.close()
        for task in serving:
            task.cancel()
        await asyncio.gather(*serving)


def to(port: int, host: str = HOST) -> Allowed:
    return Allowed(Endpoint(host, PORT), Endpoint("127.0.0.1", port))


@contextlib.asynccontextmanager
async def caller(egress: Egress, directory: Path, limits: Limits | None = None) -> AsyncIterator[Client]:
    """One connection to the egress; a defect there fails the test."""
    defects: list[BaseException] = []
    address = UnixAddress(str(directory / "egress.sock"))
    async with (
        serve(address, egress.handlers, on_error=defects.append, limits=Limits(drain=0.1)),
        connect(address, limits=limits) as client,
    ):
        yield client
    await egress.close()
    assert defects == []


def asking(client: Client, host: object = HOST, port: object = PORT) -> Call:
    return client.call("egress.connect", {"host": host, "port": port})


async def fault_of(client: Client, host: object = HOST, port: object = PORT) -> str:
    with pytest.raises(Fault) as caught:
        async with asking(client, host, port) as call:
            await call.reply()
    return caught.value.code


async def exchange(client: Client, data: bytes, host: str = HOST) -> bytes:
    async with asking(client, host) as call:
        await call.reply()
        sending = asyncio.ensure_future(call.send(data, end=True))
        answer = await call.read(1 << 30)
        await sending
        return answer


def sample(egress_registry: CollectorRegistry, name: str, **labels: str) -> float:
    return egress_registry.get_sample_value(f"strongroom_egress_{name}", labels) or 0.0


# --- Bytes ----------------------------------------------------------------------------------------------------------


async def test_bytes_pass_and_the_callers_end_is_a_half_close(tmp_path: Path) -> None:
    async with target() as port, caller(Egress([to(port)]), tmp_path) as client:
        assert await exchange(client, b"question") == b"question<end>"


async def test_more_than_every_buffer_passes(tmp_path: Path) -> None:
    data = bytes(range(256)) * (1 << 16)
    async with target() as port, caller(Egress([to(port)]), tmp_path) as client:
        assert await exchange(client, data) == data + b"<end>"


async def test_the_targets_end_comes_at_once_and_ends_the_call(tmp_path: Path) -> None:
    async def greet(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"goodbye")

    async with target(greet) as port, caller(Egress([to(port)]), tmp_path) as client, asking(client) as call:
        await call.reply()
        assert await call.read(100) == b"goodbye"


async def test_a_conversation_turn_by_turn(tmp_path: Path) -> None:
    async with target() as port, caller(Egress([to(port)]), tmp_path) as client, asking(client) as call:
        await call.reply()
        for number in range(20):
            await call.send(b"%d" % number)
            assert bytes(await anext(call)) == b"%d" % number


BUFFERED = 1 << 25
"""Bytes; more than all buffers on the way have room for."""


async def stands(client: Client, conveyed: Callable[[], float]) -> None:
    """Returns once some exchanges with the other target go by in which nothing else is conveyed."""
    before = -1.0
    while before != conveyed():
        before = conveyed()
        assert before < BUFFERED, "nobody holds it back"
        for _ in range(5):
            assert await exchange(client, b"meanwhile", "other.example") == b"meanwhile<end>"


async def test_a_caller_that_does_not_read_holds_the_target_back(tmp_path: Path) -> None:
    written, flooding = 0, asyncio.Event()

    async def flood(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal written
        while True:
            writer.write(bytes(1 << 16))
            await writer.drain()
            written += 1 << 16
            flooding.set()

    async with target(flood) as port, target() as other:
        egress = Egress([to(port), to(other, "other.example")])
        async with caller(egress, tmp_path) as client, asking(client) as call:
            await call.reply()
            await flooding.wait()
            await stands(client, lambda: written)


async def test_a_target_that_does_not_read_holds_the_caller_back(tmp_path: Path) -> None:
    async def deaf(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await asyncio.Event().wait()

    sent = 0

    async def send(call: Call) -> None:
        nonlocal sent
        while True:
            await call.send(bytes(1 << 16))
            sent += 1 << 16

    async with target(deaf) as port, target() as other:
        egress = Egress([to(port), to(other, "other.example")])
        async with caller(egress, tmp_path) as client, asking(client) as call:
            await call.reply()
            sending = asyncio.ensure_future(send(call))
            try:
                await stands(client, lambda: sent)
                assert sent > 0
                assert not sending.done()
            finally:
                sending.cancel()


# --- No connection waits for another --------------------------------------------------------------------------------


async def test_30_at_once_though_one_target_is_slow(tmp_path: Path) -> None:
    """vsock-proxy makes them wait for each other: 7 seconds for 30 (nitro-cli issue 413)."""
    going_on, met = asyncio.Event(), asyncio.Event()

    async def slow(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        met.set()
        await going_on.wait()
        await echo(reader, writer)

    async with target() as quick_port, target(slow) as slow_port:
        egress = Egress([to(quick_port), to(slow_port, "slow.example")])
        async with caller(egress, tmp_path) as client:
            waiting = asyncio.ensure_future(exchange(client, b"slow", "slow.example"))
            await met.wait()
            answers = await asyncio.gather(*(exchange(client, b"%d" % number) for number in range(30)))
            assert answers == [b"%d<end>" % number for number in range(30)]
            assert not waiting.done()
            going_on.set()
            assert await waiting == b"slow<end>"


async def test_a_target_that_never_accepts_holds_up_nobody(tmp_path: Path) -> None:
    """A full backlog: the connection is under way for as long as it is let."""
    with socket.socket() as full, contextlib.ExitStack() as stack:
        full.bind(("127.0.0.1", 0))
        full.listen(0)
        for _ in range(4):
            filler = stack.enter_context(socket.socket())
            filler.setblocking(False)
            filler.connect_ex(full.getsockname())
        async with target() as port:
            egress = Egress([to(port), to(full.getsockname()[1], "full.example")], limits=EgressLimits(connect=2))
            async with caller(egress, tmp_path) as client:
                waiting = asyncio.ensure_future(fault_of(client, "full.example"))
                answers = await asyncio.gather(*(exchange(client, b"%d" % number) for number in range(30)))
                assert answers == [b"%d<end>" % number for number in range(30)]
                assert await waiting == "egress_unreachable"


async def test_a_name_that_is_not_answered_holds_up_nobody(tmp_path: Path) -> None:
    async with name_server() as server, target() as port:
        server.records[HOST] = ["60 A 127.0.0.1"]
        names = Names(resolver=server.resolver(), hosts=tmp_path / "hosts")
        silent = Allowed.parse("silent.example:443")
        egress = Egress([Allowed(Endpoint(HOST, PORT), Endpoint(HOST, port)), silent], names=names)
        async with caller(egress, tmp_path) as client:
            server.held = asyncio.Event()
            waiting = asyncio.ensure_future(fault_of(client, "silent.example"))
            await server.until_asked(2)
            held, server.held = server.held, None
            answers = await asyncio.gather(*(exchange(client, b"%d" % number) for number in range(30)))
            assert answers == [b"%d<end>" % number for number in range(30)]
            assert server.queries(HOST) == 1
            held.set()
            assert await waiting == "egress_unreachable"


async def test_no_more_at_once_than_the_limit(tmp_path: Path) -> None:
    registry = CollectorRegistry()
    async with target() as port:
        egress = Egress([to(port)], limits=EgressLimits(connections=2), registry=registry)
        async with caller(egress, tmp_path) as client:
            async with asking(client) as one, asking(client) as two:
                await one.reply()
                await two.reply()
                assert await fault_of(client) == "overloaded"
                assert sample(registry, "open", to=f"{HOST}:443") == 2
                await one.send(b"", end=True)
                await one.read(100)
                await two.send(b"", end=True)
                await two.read(100)
            assert await exchange(client, b"again") == b"again<end>"
    assert sample(registry, "refusals_total", reason="too_many") == 1


# --- The list -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("host", "port"),
    [
        ("KMS.example", 443),
        ("kms.example.", 443),
        (" kms.example", 443),
        ("kms.example\0", 443),
        ("kms.example\0.other.example", 443),
        ("kms.example:443", 443),
        ("kms.example=127.0.0.1", 443),
        ("kms", 443),
        ("xkms.example", 443),
        ("kms.example.other.example", 443),
        ("kms。example", 443),
        ("ｋms.example", 443),
        ("*", 443),
        ("", 443),
        ("127.0.0.1", 443),
        ("2130706433", 443),
        ("0x7f000001", 443),
        ("127.1", 443),
        ("::1", 443),
        ("[::1]", 443),
        ("::ffff:127.0.0.1", 443),
        ("169.254.169.254", 80),
        ("fd00:ec2::254", 80),
        ("localhost", 443),
        ("a" * 10_000, 443),
        (HOST, 0),
        (HOST, 80),
        (HOST, -443),
        (HOST, 443 + (1 << 16)),
        (HOST, 1 << 62),
    ],
)
async def test_what_is_not_on_the_list_is_refused(tmp_path: Path, host: str, port: int) -> None:
    async with name_server() as server, target() as listening:
        registry = CollectorRegistry()
        names = Names(resolver=server.resolver(), hosts=tmp_path / "hosts")
        async with caller(Egress([to(listening)], names=names, registry=registry), tmp_path) as client:
            assert await fault_of(client, host, port) == "egress_refused"
        assert server.asked == []
        assert sample(registry, "refusals_total", reason="not_on_the_list") == 1
        assert sample(registry, "connections_total", to=f"{HOST}:443") == 0


@pytest.mark.parametrize(
    "meta",
    [
        {},
        {"host": HOST},
        {"port": PORT},
        {"host": HOST, "port": "443"},
        {"host": HOST, "port": True},
        {"host": HOST, "port": None},
        {"host": HOST.encode(), "port": PORT},
        {"host": [HOST], "port": PORT},
        {"host": HOST, "port": PORT, "address": "169.254.169.254"},
    ],
)
async def test_a_malformed_question_is_said_so(tmp_path: Path, meta: dict[str, Any]) -> None:
    async with target() as port, caller(Egress([to(port)]), tmp_path) as client:
        with pytest.raises(Fault) as caught:
            async with client.call("egress.connect", meta) as call:
                await call.reply()
        assert caught.value.code == "malformed"


async def test_an_empty_list_allows_nothing(tmp_path: Path) -> None:
    async with caller(Egress([]), tmp_path) as client:
        assert await fault_of(client) == "egress_refused"


@pytest.mark.parametrize(
    "records",
    [
        ["60 A 169.254.169.254"],
        ["60 AAAA fd00:ec2::254"],
        ["60 AAAA ::ffff:169.254.169.254"],
        ["60 A 0.0.0.0"],
        ["60 A 127.0.0.1", "60 A 169.254.169.254"],
    ],
)
async def test_a_name_that_leads_to_metadata_is_refused(tmp_path: Path, records: list[str]) -> None:
    registry = CollectorRegistry()
    async with name_server() as server:
        server.records[HOST] = records
        names = Names(resolver=server.resolver(), hosts=tmp_path / "hosts")
        egress = Egress([Allowed.parse(f"{HOST}:443")], names=names, registry=registry)
        async with caller(egress, tmp_path) as client:
            assert await fault_of(client) == "egress_refused"
    assert sample(registry, "failures_total", to=f"{HOST}:443", reason="egress_refused") == 1


async def test_a_hosts_file_cannot_lead_to_metadata_either(tmp_path: Path) -> None:
    (tmp_path / "hosts").write_text(f"169.254.169.254 {HOST}\n")
    egress = Egress([Allowed.parse(f"{HOST}:443")], names=Names(hosts=tmp_path / "hosts"))
    async with caller(egress, tmp_path) as client:
        assert await fault_of(client) == "egress_refused"


@pytest.mark.parametrize(
    ("text", "asked", "target"),
    [
        ("kms.us-east-1.amazonaws.com:443", ("kms.us-east-1.amazonaws.com", 443), None),
        ("kms.example:443=127.0.0.1:8443", (HOST, 443), ("127.0.0.1", 8443)),
        ("kms.example:443=[::1]:8443", (HOST, 443), ("::1", 8443)),
        ("kms.example:443=vpce-1.kms.example:443", (HOST, 443), ("vpce-1.kms.example", 443)),
        ("kms.example:443=localhost:65535", (HOST, 443), ("localhost", 65535)),
        ("[2001:db8::1]:1", ("2001:db8::1", 1), None),
        ("a_b:1", ("a_b", 1), None),
    ],
)
def test_entries_of_the_list(text: str, asked: tuple[str, int], target: tuple[str, int] | None) -> None:
    allowed = Allowed.parse(text)
    assert allowed == Allowed(Endpoint(*asked), Endpoint(*(target or asked)))
    assert str(allowed) == text


@pytest.mark.parametrize(
    "text",
    [
        "",
        ":443",
        "kms.example",
        "kms.example:",
        "kms.example:0",
        "kms.example:00443",
        "kms.example:65536",
        "kms.example:+1",
        "kms.example:４４３",
        "KMS.example:443",
        "kms.example.:443",
        "kms..example:443",
        "-kms.example:443",
        "kms-.example:443",
        "*.example:443",
        "*:443",
        "kms.example/x:443",
        "https://kms.example:443",
        "user@kms.example:443",
        "kms\0.example:443",
        "kms.example\n:443",
        "kms.example :443",
        "kms.ex%61mple:443",
        "a" * 64 + ":443",
        "a." * 127 + "a:443",
        "127.1:443",
        "0x7f.1:443",
        "0x7f000001:443",
        "2130706433:443",
        "0177.0.0.1:443",
        "::1:443",
        "[127.0.0.1]:443",
        "[kms.example]:443",
        "[2001:DB8::1]:443",
        "[2001:db8:0::1]:443",
        "[2001:db8::1%eth0]:443",
        "[]:443",
        "kms.example:443=",
        "kms.example:443=:443",
        "kms.example:443=127.0.0.1",
        "kms.example:443=127.0.0.1:0",
        "kms.example:443=a:1=b:2",
        "=127.0.0.1:443",
    ],
)
def test_what_is_no_entry(text: str) -> None:
    with pytest.raises(AllowListError) as caught:
        Allowed.parse(text)
    assert (caught.value.code, caught.value.exit_code) == ("bad_allow_entry", 2)


@pytest.mark.parametrize(
    "text",
    [
        "169.254.169.254:80",
        "kms.example:443=169.254.169.254:80",
        "kms.example:443=[fd00:ec2::254]:80",
        "kms.example:443=0.0.0.0:80",
        "kms.example:443=[::]:80",
        "kms.example:443=[::ffff:a9fe:a9fe]:80",
    ],
)
def test_an_entry_cannot_name_what_is_never_allowed(text: str) -> None:
    with pytest.raises(AllowListError) as caught:
        Allowed.parse(text)
    assert caught.value.code == "forbidden_address"


@given(st.text(max_size=60) | st.from_regex(r"[a-z0-9.:\[\]=%-]{0,40}", fullmatch=True))
def test_any_text_is_an_entry_in_its_one_spelling_or_a_typed_error(text: str) -> None:
    with contextlib.suppress(AllowListError):
        allowed = Allowed.parse(text)
        assert text in (str(allowed), f"{allowed.asked}={allowed.target}")


def test_the_same_place_twice_is_refused() -> None:
    with pytest.raises(AllowListError):
        Egress([Allowed.parse(f"{HOST}:443"), Allowed.parse(f"{HOST}:443=127.0.0.1:8443")])


@pytest.mark.parametrize("name", ["connections", "connect", "idle", "total"])
def test_a_limit_is_positive(name: str) -> None:
    with pytest.raises(ValueError, match=name):
        EgressLimits(**{name: 0})


# --- What breaks ----------------------------------------------------------------------------------------------------


async def test_nobody_at_the_target(tmp_path: Path) -> None:
    async with target() as port:
        pass
    registry = CollectorRegistry()
    async with caller(Egress([to(port)], registry=registry), tmp_path) as client:
        assert await fault_of(client) == "egress_unreachable"
    assert sample(registry, "failures_total", to=f"{HOST}:443", reason="egress_unreachable") == 1
    assert sample(registry, "connections_total", to=f"{HOST}:443") == 0


async def test_a_target_killed_in_mid_connection_is_no_end(tmp_path: Path) -> None:
    async def die(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(await reader.read(100))
        await writer.drain()
        await reader.read(100)
        writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        writer.transport.abort()

    async with target(die) as port, caller(Egress([to(port)]), tmp_path) as client, asking(client) as call:
        await call.reply()
        await call.send(b"one")
        assert bytes(await anext(call)) == b"one"
        await call.send(b"two")
        with pytest.raises(Fault) as caught:
            await call.read(100)
        assert caught.value.code == "egress_unreachable"


async def test_writing_to_a_target_that_is_gone_is_no_end(tmp_path: Path) -> None:
    gone = asyncio.Event()

    async def die(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await gone.wait()
        writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        writer.transport.abort()

    async with target(die) as port, caller(Egress([to(port)]), tmp_path) as client, asking(client) as call:
        await call.reply()
        sending = asyncio.ensure_future(call.send(bytes(1 << 26)))
        gone.set()
        with pytest.raises(Fault) as caught:
            await call.read(100)
        assert caught.value.code == "egress_unreachable"
        with contextlib.suppress(Fault):
            await sending


@pytest.mark.parametrize("how", ["cancels", "is killed"])
async def test_a_caller_that_vanishes_resets_the_target(tmp_path: Path, how: str) -> None:
    """What it had begun to send must not look complete there."""
    broken = asyncio.get_running_loop().create_future()

    async def listen(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while data := await reader.read(100):
                writer.write(data)
            broken.set_result(None)
        except ConnectionError as error:
            broken.set_result(error)

    registry = CollectorRegistry()
    async with target(listen) as port, caller(Egress([to(port)], registry=registry), tmp_path) as client:
        async with asking(client) as call:
            await call.reply()
            await call.send(b"half")
            assert bytes(await anext(call)) == b"half"
            if how == "is killed":
                client._link.lose("killed")
        assert isinstance(await broken, ConnectionResetError)
    assert sample(registry, "open", to=f"{HOST}:443") == 0
    assert sample(registry, "failures_total", to=f"{HOST}:443", reason="caller_gone") == 1


async def test_an_idle_connection_is_given_up(tmp_path: Path) -> None:
    async with target() as port:
        egress = Egress([to(port)], limits=EgressLimits(idle=0.05))
        async with caller(egress, tmp_path) as client, asking(client) as call:
            await call.reply()
            with pytest.raises(Fault) as caught:
                await anext(call)
            assert caught.value.code == "deadline_exceeded"


async def test_a_busy_connection_is_not_idle(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    loop, ahead = asyncio.get_running_loop(), 0.0
    monotonic = loop.time
    monkeypatch.setattr(loop, "time", lambda: monotonic() + ahead)
    async with target() as port:
        egress = Egress([to(port)], limits=EgressLimits(idle=1000))
        async with caller(egress, tmp_path) as client, asking(client) as call:
            await call.reply()
            for _ in range(5):
                await call.send(b"x")
                await anext(call)
                ahead += 600


async def test_a_busy_connection_ends_in_the_end(tmp_path: Path) -> None:
    async with target() as port:
        egress = Egress([to(port)], limits=EgressLimits(total=0.1))
        async with caller(egress, tmp_path) as client, asking(client) as call:
            await call.reply()
            with pytest.raises(Fault) as caught:
                while True:
                    await call.send(b"x")
                    await anext(call)
            assert caught.value.code == "deadline_exceeded"


async def test_a_name_that_nobody_knows(tmp_path: Path) -> None:
    async with name_server() as server:
        names = Names(resolver=server.resolver(), hosts=tmp_path / "hosts")
        async with caller(Egress([Allowed.parse(f"{HOST}:443")], names=names), tmp_path) as client:
            assert await fault_of(client) == "egress_unreachable"
            assert await fault_of(client) == "egress_unreachable"
        assert server.queries(HOST) == 1


# --- All addresses --------------------------------------------------------------------------------------------------


async def test_the_next_address_is_tried_when_one_fails(tmp_path: Path) -> None:
    async with name_server() as server, target(host="127.0.0.3") as port:
        server.records[HOST] = ["60 AAAA ::1", "60 A 127.0.0.2", "60 A 127.0.0.3"]
        names = Names(resolver=server.resolver(), hosts=tmp_path / "hosts")
        egress = Egress([Allowed(Endpoint(HOST, PORT), Endpoint(HOST, port))], names=names)
        async with caller(egress, tmp_path) as client:
            assert await exchange(client, b"found") == b"found<end>"


async def test_the_next_address_is_tried_beside_a_slow_one(monkeypatch: pytest.MonkeyPatch) -> None:
    loop = asyncio.get_running_loop()
    given_up, connecting = asyncio.Event(), loop.sock_connect

    async def connect_unless_slow(sock: socket.socket, address: Any) -> None:
        if address[0] == "127.0.0.2":
            try:
                await asyncio.Event().wait()
            finally:
                given_up.set()
        await connecting(sock, address)

    monkeypatch.setattr(loop, "sock_connect", connect_unless_slow)
    async with target(host="127.0.0.3") as port:
        with await first_connected([ip_address("127.0.0.2"), ip_address("127.0.0.3")], port) as sock:
            assert sock.getpeername()[0] == "127.0.0.3"
        await given_up.wait()


async def test_of_two_that_connect_at_once_one_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    loop = asyncio.get_running_loop()
    both, connecting = asyncio.Barrier(2), loop.sock_connect
    sockets: list[socket.socket] = []

    async def connect_together(sock: socket.socket, address: Any) -> None:
        sockets.append(sock)
        await connecting(sock, address)
        await both.wait()

    monkeypatch.setattr(loop, "sock_connect", connect_together)
    async with target(host="127.0.0.2") as port, target(host="127.0.0.3"):
        addresses = [ip_address("127.0.0.2"), ip_address("127.0.0.2")]
        with await first_connected(addresses, port) as kept:
            await asyncio.sleep(0)
            await asyncio.sleep(0)
            assert sorted(sock.fileno() == -1 for sock in sockets) == [False, True]
            assert kept in sockets


async def test_no_address_at_all_is_an_error() -> None:
    with pytest.raises(OSError, match="no address"):
        await first_connected([], 1)


# --- What is counted ------------------------------------------------------------------------------------------------


async def test_the_metrics_know_the_list_and_nothing_else(tmp_path: Path) -> None:
    registry = CollectorRegistry()
    async with target() as port, caller(Egress([to(port)], registry=registry), tmp_path) as client:
        assert await exchange(client, b"12345") == b"12345<end>"
        await fault_of(client, "canary.example")
    assert sample(registry, "connections_total", to=f"{HOST}:443") == 1
    assert sample(registry, "bytes_total", to=f"{HOST}:443", direction="out") == 5
    assert sample(registry, "bytes_total", to=f"{HOST}:443", direction="in") == 10
    assert sample(registry, "open", to=f"{HOST}:443") == 0
    said = {value for family in registry.collect() for each in family.samples for value in each.labels.values()}
    assert said == {f"{HOST}:443", "in", "out", "not_on_the_list"}
