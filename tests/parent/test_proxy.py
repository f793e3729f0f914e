"""The proxy: one request is one call, bytes pass, and whichever side leaves ends the other."""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from pathlib import Path

import httpx2
import pytest
from prometheus_client.parser import text_string_to_metric_families

from parent import proxy as proxy_module
from parent.proxy import MAX_REQUEST_BYTES, EnclaveLink, Metrics, Proxy
from tests.house import ask, house, served
from vsockrpc import http_server
from vsockrpc.address import Address, UnixAddress
from vsockrpc.errors import AddressError
from vsockrpc.frames import Meta
from vsockrpc.http import (
    ANSWER_TYPE,
    ENVELOPE_PATH,
    ENVELOPE_TYPE,
    EVIDENCE_PATH,
    EVIDENCE_TYPE,
    KEY_ID_HEADER,
    SEALED_PATH,
    SEALED_TYPE,
    STATUS_OF_FAULT,
)
from vsockrpc.http_server import MAX_HEAD_BYTES, HttpServer
from vsockrpc.transport import ConnectionLost, Fault, IncomingCall, Limits, Server, serve

NONCE = "5a" * 32
KEY_ID = "c3" * 16
HEADERS = {"Content-Type": SEALED_TYPE, KEY_ID_HEADER: KEY_ID}
ENVELOPE_HEADERS = {"Content-Type": ENVELOPE_TYPE}


@dataclass
class Recorder:
    """Stands where an enclave would, and echoes. ``faults`` are raised, one a call; ``hold`` keeps an answer open."""

    calls: list[tuple[str, Meta, bytes]] = field(default_factory=list)
    faults: list[str] = field(default_factory=list)
    hold: asyncio.Event | None = None
    begun: asyncio.Event = field(default_factory=asyncio.Event)
    cancelled: asyncio.Event = field(default_factory=asyncio.Event)
    flood: int = 0
    """Bytes to answer with instead of the echo."""

    async def answer(self, call: IncomingCall) -> None:
        if self.faults:
            raise Fault(self.faults.pop(0), "a text of the enclave's own")
        try:
            body = await call.read(1 << 24)
            self.calls.append((call.method, dict(call.meta), body))
            await call.reply({})
            if self.flood:
                await self._flood(call)
                return
            await call.send(b"echo:" + body)
            self.begun.set()
            if self.hold is not None:
                await self.hold.wait()
            await call.end()
        except asyncio.CancelledError:
            self.cancelled.set()
            raise

    async def _flood(self, call: IncomingCall) -> None:
        piece = bytes(1 << 16)
        for _ in range(self.flood // len(piece)):
            await call.send(piece)
            self.begun.set()
        await call.end()


@contextlib.asynccontextmanager
async def listening(address: UnixAddress, recorder: Recorder) -> AsyncIterator[Server]:
    def fail(error: BaseException) -> None:
        raise error

    handlers = {"evidence": recorder.answer, "sealed": recorder.answer, "envelope": recorder.answer}
    async with serve(address, handlers, on_error=fail, limits=Limits(drain=0.1)) as server:
        yield server


@contextlib.asynccontextmanager
async def proxied(address: Address) -> AsyncIterator[httpx2.AsyncClient]:
    async with (
        served(Proxy(address).application()) as url,
        httpx2.AsyncClient(base_url=url, trust_env=False, timeout=30) as client,
    ):
        yield client


@pytest.fixture
def address(tmp_path: Path) -> UnixAddress:
    return UnixAddress(str(tmp_path / "rpc.sock"))


@pytest.fixture
async def recorder(address: UnixAddress) -> AsyncIterator[Recorder]:
    recorder = Recorder()
    async with listening(address, recorder):
        yield recorder


@pytest.fixture
async def client(address: UnixAddress) -> AsyncIterator[httpx2.AsyncClient]:
    async with proxied(address) as client:
        yield client


def port_of(client: httpx2.AsyncClient) -> int:
    assert client.base_url.port is not None
    return client.base_url.port


async def metrics(client: httpx2.AsyncClient) -> dict[str, float]:
    """Each sample by its name and labels."""
    text = (await client.get("/metrics")).text
    return {
        " ".join([sample.name, *(f"{key}={value}" for key, value in sorted(sample.labels.items()))]): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


# --- One request, one call -----------------------------------------------------------------------------------------


async def test_evidence_is_one_call_and_is_never_stored(client: httpx2.AsyncClient, recorder: Recorder) -> None:
    response = await client.get(EVIDENCE_PATH, params={"nonce": NONCE})
    assert (response.status_code, response.content) == (200, b"echo:")
    assert response.headers["content-type"] == EVIDENCE_TYPE
    assert response.headers["cache-control"] == "no-store"
    assert recorder.calls == [("evidence", {"nonce": bytes.fromhex(NONCE)}, b"")]


async def test_a_sealed_request_is_one_call(client: httpx2.AsyncClient, recorder: Recorder) -> None:
    body = bytes(range(256)) * 1000
    response = await client.post(SEALED_PATH, content=body, headers=HEADERS)
    assert (response.status_code, response.content) == (200, b"echo:" + body)
    assert response.headers["content-type"] == SEALED_TYPE
    assert response.headers["cache-control"] == "no-store"
    assert recorder.calls == [("sealed", {"key_id": bytes.fromhex(KEY_ID)}, body)]


async def test_an_envelope_is_one_call(client: httpx2.AsyncClient, recorder: Recorder) -> None:
    body = bytes(range(256)) * 1000
    response = await client.post(ENVELOPE_PATH, content=body, headers=ENVELOPE_HEADERS)
    assert (response.status_code, response.content) == (200, b"echo:" + body)
    assert response.headers["content-type"] == ANSWER_TYPE
    assert response.headers["cache-control"] == "no-store"
    assert recorder.calls == [("envelope", {}, body)]
    assert (await metrics(client))["strongroom_proxy_requests_total route=envelope status=200"] == 1


async def test_a_body_in_pieces_arrives_whole(client: httpx2.AsyncClient, recorder: Recorder) -> None:
    async def pieces() -> AsyncIterator[bytes]:
        for number in range(100):
            yield bytes([number]) * number

    response = await client.post(SEALED_PATH, content=pieces(), headers=HEADERS)
    assert response.content == b"echo:" + b"".join(bytes([number]) * number for number in range(100))
    assert len(recorder.calls) == 1


async def test_the_proxy_adds_and_says_nothing_of_its_own(client: httpx2.AsyncClient, recorder: Recorder) -> None:
    response = await client.get(EVIDENCE_PATH, params={"nonce": NONCE})
    assert set(response.headers) == {"content-type", "content-length", "cache-control"}


async def test_64_at_once(client: httpx2.AsyncClient, recorder: Recorder) -> None:
    async def one(number: int) -> bytes:
        return (await client.post(SEALED_PATH, content=str(number).encode() * 5000, headers=HEADERS)).content

    answers = await asyncio.gather(*(one(number) for number in range(64)))
    assert answers == [b"echo:" + str(number).encode() * 5000 for number in range(64)]
    assert (await metrics(client))["strongroom_proxy_connects_total"] == 1


# --- What it refuses -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "nonce", [None, "", "5a" * 31, "5a" * 33, "zz" * 32, " " + "5a" * 31 + " ", "5a" * 30000, "٣" * 64, "+" + "5" * 63]
)
async def test_a_nonce_that_is_none_is_refused_here(
    client: httpx2.AsyncClient, recorder: Recorder, nonce: str | None
) -> None:
    response = await client.get(EVIDENCE_PATH, params={} if nonce is None else {"nonce": nonce})
    if len(nonce or "") < MAX_HEAD_BYTES:
        assert (response.status_code, response.json()) == (400, {"fault": "malformed"})
    assert response.status_code == 400
    assert recorder.calls == []


@pytest.mark.parametrize(
    "headers",
    [
        {KEY_ID_HEADER: KEY_ID},
        {"Content-Type": SEALED_TYPE},
        {"Content-Type": "application/json", KEY_ID_HEADER: KEY_ID},
        {"Content-Type": f"{SEALED_TYPE}; charset=utf-8", KEY_ID_HEADER: KEY_ID},
        {"Content-Type": SEALED_TYPE, KEY_ID_HEADER: ""},
        {"Content-Type": SEALED_TYPE, KEY_ID_HEADER: KEY_ID[2:]},
        {"Content-Type": SEALED_TYPE, KEY_ID_HEADER: KEY_ID + "00"},
        {"Content-Type": SEALED_TYPE, KEY_ID_HEADER: "x" * 32},
    ],
)
async def test_a_sealed_request_without_its_headers_is_refused_here(
    client: httpx2.AsyncClient, recorder: Recorder, headers: dict[str, str]
) -> None:
    response = await client.post(SEALED_PATH, content=b"body", headers=headers)
    assert (response.status_code, response.json()) == (400, {"fault": "malformed"})
    assert recorder.calls == []


@pytest.mark.parametrize(
    "kind", [None, "", SEALED_TYPE, ANSWER_TYPE, "application/json", f"{ENVELOPE_TYPE}; charset=utf-8", "text/html"]
)
async def test_an_envelope_of_another_type_is_refused_here(
    client: httpx2.AsyncClient, recorder: Recorder, kind: str | None
) -> None:
    headers = {KEY_ID_HEADER: KEY_ID} | ({} if kind is None else {"Content-Type": kind})
    response = await client.post(ENVELOPE_PATH, content=b"body", headers=headers)
    assert (response.status_code, response.json()) == (400, {"fault": "malformed"})
    assert recorder.calls == []


async def test_a_body_beyond_the_bound_is_cut_off(client: httpx2.AsyncClient, recorder: Recorder) -> None:
    sent = 0

    async def endless() -> AsyncIterator[bytes]:
        nonlocal sent
        while sent <= 4 * MAX_REQUEST_BYTES:
            sent += 1 << 16
            yield bytes(1 << 16)

    response = await client.post(SEALED_PATH, content=endless(), headers=HEADERS)
    assert (response.status_code, response.json()) == (400, {"fault": "malformed"})
    assert recorder.calls == []


async def test_a_body_that_does_not_come_is_given_up(
    monkeypatch: pytest.MonkeyPatch, client: httpx2.AsyncClient, recorder: Recorder
) -> None:
    monkeypatch.setattr(proxy_module, "BODY_SECONDS", 0.01)
    never = asyncio.Event()

    async def silent() -> AsyncIterator[bytes]:
        yield b"the beginning"
        await never.wait()

    posting = asyncio.ensure_future(client.post(SEALED_PATH, content=silent(), headers=HEADERS))
    await recorder.cancelled.wait()
    never.set()
    with contextlib.suppress(httpx2.HTTPError):
        assert (await posting).json() == {"fault": "malformed"}


@pytest.mark.parametrize("fault", STATUS_OF_FAULT)
@pytest.mark.parametrize("path", [EVIDENCE_PATH, SEALED_PATH, ENVELOPE_PATH])
async def test_the_enclaves_clear_faults_are_conveyed_without_their_text(
    client: httpx2.AsyncClient, recorder: Recorder, path: str, fault: str
) -> None:
    recorder.faults = [fault]
    response = await _any(client, path)
    assert (response.status_code, response.json()) == (STATUS_OF_FAULT[fault], {"fault": fault})
    assert response.headers["cache-control"] == "no-store"
    assert ("retry-after" in response.headers) == (fault in ("overloaded", "unavailable"))


@pytest.mark.parametrize("fault", ["deadline_exceeded", "too_many_calls", "internal", "cancelled", "try_plaintext"])
async def test_every_other_fault_is_unavailable(client: httpx2.AsyncClient, recorder: Recorder, fault: str) -> None:
    recorder.faults = [fault]
    response = await _any(client, SEALED_PATH)
    assert (response.status_code, response.json()) == (503, {"fault": "unavailable"})


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("GET", "/", 404),
        ("GET", "/v1/sealed", 405),
        ("POST", "/v1/evidence", 405),
        ("OPTIONS", "/v1/sealed", 405),
        ("GET", "/v1/envelope", 405),
        ("GET", "/../../etc/passwd", 404),
        ("GET", "/<script>", 404),
    ],
)
async def test_nothing_else_is_here_and_it_is_never_html(
    client: httpx2.AsyncClient, recorder: Recorder, method: str, path: str, status: int
) -> None:
    response = await client.request(method, path)
    assert response.status_code == status
    assert "html" not in response.headers.get("content-type", "")
    assert "<" not in response.text
    assert not [name for name in response.headers if name.startswith("access-control")]


async def test_a_defect_is_unavailable_and_its_text_stays_here(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], client: httpx2.AsyncClient, recorder: Recorder
) -> None:
    texts = ["CANARY"]

    async def broken(proxy: Proxy, method: str, meta: Meta) -> None:
        raise RuntimeError(*texts)

    monkeypatch.setattr(Proxy, "call", broken)
    response = await _any(client, SEALED_PATH)
    assert (response.status_code, response.json()) == (503, {"fault": "unavailable"})
    said = capsys.readouterr().err
    assert "RuntimeError" in said
    assert "CANARY" not in said


async def _any(client: httpx2.AsyncClient, path: str) -> httpx2.Response:
    if path == EVIDENCE_PATH:
        return await client.get(path, params={"nonce": NONCE})
    headers = ENVELOPE_HEADERS if path == ENVELOPE_PATH else HEADERS
    return await client.post(path, content=b"body", headers=headers)


# --- An enclave that is not there, or not any more -----------------------------------------------------------------


async def test_in_front_of_nothing_everything_is_unavailable_until_an_enclave_appears(
    client: httpx2.AsyncClient, address: UnixAddress
) -> None:
    assert (await client.get("/healthz")).status_code == 503
    for path in (EVIDENCE_PATH, SEALED_PATH, ENVELOPE_PATH):
        response = await _any(client, path)
        assert (response.status_code, response.json()) == (503, {"fault": "unavailable"})
    assert (await metrics(client))["strongroom_proxy_connected"] == 0
    async with listening(address, Recorder()):
        health = await client.get("/healthz")
        assert (health.status_code, health.json()) == (200, {"status": "ok"})
        assert (await _any(client, SEALED_PATH)).content == b"echo:body"
        assert (await metrics(client))["strongroom_proxy_connected"] == 1


async def test_an_address_that_this_system_cannot_dial_is_unavailable(
    monkeypatch: pytest.MonkeyPatch, client: httpx2.AsyncClient
) -> None:
    async def refuse(address: Address) -> None:
        raise AddressError("this system has no vsock")

    monkeypatch.setattr(proxy_module, "dial", refuse)
    assert (await _any(client, SEALED_PATH)).json() == {"fault": "unavailable"}
    assert (await client.get("/healthz")).status_code == 503


async def test_whoever_waits_for_a_dial_shares_its_outcome(
    monkeypatch: pytest.MonkeyPatch, address: UnixAddress
) -> None:
    dials, answered = 0, asyncio.Event()

    async def silent(address: Address) -> None:
        nonlocal dials
        dials += 1
        await answered.wait()
        raise ConnectionLost("no HELLO")

    monkeypatch.setattr(proxy_module, "dial", silent)
    link = EnclaveLink(address, Metrics())
    waiting = [asyncio.ensure_future(link.client()) for _ in range(20)]
    await asyncio.sleep(0)
    waiting[0].cancel()  # one that leaves spoils it for nobody
    answered.set()
    first, *rest = await asyncio.gather(*waiting, return_exceptions=True)
    assert isinstance(first, asyncio.CancelledError)
    assert {str(error) for error in rest} == {str(Fault("unavailable", "no enclave answers at its address"))}
    assert dials == 1


async def test_closing_gives_up_a_dial(monkeypatch: pytest.MonkeyPatch, address: UnixAddress) -> None:
    async def silent(address: Address) -> None:
        await asyncio.Event().wait()

    monkeypatch.setattr(proxy_module, "dial", silent)
    link = EnclaveLink(address, Metrics())
    waiting = asyncio.ensure_future(link.client())
    await asyncio.sleep(0)
    await link.close()
    with pytest.raises(asyncio.CancelledError):
        await waiting


async def test_an_enclave_killed_in_mid_answer_breaks_the_answer_and_the_next_works(tmp_path: Path) -> None:
    async with house(tmp_path) as home, home.session() as session:
        await session.verify()
        held = home.engine.hold_after(4)
        asking = asyncio.ensure_future(ask(session, "a long answer of many small pieces"))
        await held.wait()
        home.behind.kill()
        with pytest.raises(Exception, match="truncated"):
            await asking
        await home.behind.restart()
        assert (await ask(session, "hello"))[0] == "hello"


async def test_an_answer_that_breaks_has_no_end_in_http(
    client: httpx2.AsyncClient, recorder: Recorder, address: UnixAddress
) -> None:
    recorder.hold = asyncio.Event()
    with pytest.raises(httpx2.RemoteProtocolError):
        async with client.stream("POST", SEALED_PATH, content=b"body", headers=HEADERS) as response:
            assert response.status_code == 200
            pieces = response.aiter_raw()
            assert await anext(pieces) == b"echo:body"
            for task in asyncio.all_tasks():
                if task.get_name() == "rpc sealed":
                    task.cancel()
            await anext(pieces)


# --- Clients that leave, or do not read ----------------------------------------------------------------------------


async def test_a_client_that_leaves_in_mid_answer_cancels_the_call(
    client: httpx2.AsyncClient, recorder: Recorder
) -> None:
    recorder.hold = asyncio.Event()
    async with client.stream("POST", SEALED_PATH, content=b"body", headers=HEADERS) as response:
        assert await anext(response.aiter_raw()) == b"echo:body"
    await recorder.cancelled.wait()


async def test_a_client_that_leaves_in_mid_request_cancels_the_call(
    client: httpx2.AsyncClient, recorder: Recorder
) -> None:
    entered = asyncio.Event()

    async def endless() -> AsyncIterator[bytes]:
        yield b"the beginning"
        entered.set()
        await asyncio.Event().wait()

    posting = asyncio.ensure_future(client.post(SEALED_PATH, content=endless(), headers=HEADERS))
    await entered.wait()
    while not [task for task in asyncio.all_tasks() if task.get_name() == "rpc sealed"]:
        await client.get("/metrics")
    posting.cancel()
    await recorder.cancelled.wait()


async def test_a_client_that_leaves_before_the_reply_cancels_the_call(
    monkeypatch: pytest.MonkeyPatch, client: httpx2.AsyncClient, recorder: Recorder
) -> None:
    entered = asyncio.Event()

    async def never_reply(call: IncomingCall, meta: Meta, *, end: bool = False) -> None:
        entered.set()
        await asyncio.Event().wait()

    monkeypatch.setattr(IncomingCall, "reply", never_reply)
    posting = asyncio.ensure_future(client.post(SEALED_PATH, content=b"body", headers=HEADERS))
    await entered.wait()
    posting.cancel()
    await recorder.cancelled.wait()


async def test_a_client_that_does_not_read_holds_up_nobody_else(client: httpx2.AsyncClient, recorder: Recorder) -> None:
    recorder.flood = 1 << 26
    async with client.stream("POST", SEALED_PATH, content=b"", headers=HEADERS) as slow:
        await recorder.begun.wait()
        recorder.flood = 0
        for number in range(5):
            response = await client.post(SEALED_PATH, content=bytes([number]), headers=HEADERS)
            assert response.content == b"echo:" + bytes([number])
        assert slow.num_bytes_downloaded < 1 << 26
    await recorder.cancelled.wait()


# --- What it counts ------------------------------------------------------------------------------------------------


async def test_the_metrics_are_totals_and_nothing_of_a_request(client: httpx2.AsyncClient, recorder: Recorder) -> None:
    for _ in range(3):
        await _any(client, SEALED_PATH)
    await _any(client, EVIDENCE_PATH)
    await client.get(EVIDENCE_PATH, params={"nonce": "zz"})
    samples = await metrics(client)
    assert samples["strongroom_proxy_bytes_total direction=in"] == 3 * len(b"body")
    assert samples["strongroom_proxy_bytes_total direction=out"] == 3 * len(b"echo:body") + len(b"echo:")
    recorder.faults = ["overloaded"]
    await _any(client, SEALED_PATH)
    samples = await metrics(client)
    assert samples["strongroom_proxy_requests_total route=sealed status=200"] == 3
    assert samples["strongroom_proxy_requests_total route=sealed status=429"] == 1
    assert samples["strongroom_proxy_requests_total route=evidence status=200"] == 1
    assert samples["strongroom_proxy_requests_total route=evidence status=400"] == 1
    assert samples["strongroom_proxy_open_calls"] == 0
    text = (await client.get("/metrics")).text
    assert KEY_ID not in text
    assert NONCE not in text
    labels = {name for name in samples if not name.endswith("_created")}
    assert all(name.startswith("strongroom_proxy_") for name in labels)


async def test_a_client_that_left_is_counted_as_such(client: httpx2.AsyncClient, recorder: Recorder) -> None:
    recorder.hold = asyncio.Event()
    async with client.stream("POST", SEALED_PATH, content=b"body", headers=HEADERS) as response:
        await anext(response.aiter_raw())
        assert (await metrics(client))["strongroom_proxy_open_calls"] == 1
    await recorder.cancelled.wait()
    samples = await metrics(client)
    assert samples["strongroom_proxy_open_calls"] == 0


async def test_the_whole_house_behind_it(tmp_path: Path) -> None:
    async with house(tmp_path) as home, home.session() as session:
        answers = await asyncio.gather(*(ask(session, f"question {number}") for number in range(64)))
        assert [text for text, _ in answers] == [f"question {number}" for number in range(64)]
        async with httpx2.AsyncClient(base_url=home.url, trust_env=False) as client:
            text = (await client.get("/metrics")).text
    assert "question" not in text


# --- The HTTP server itself ----------------------------------------------------------------------------------------


async def _converse(port: int, request: bytes) -> bytes:
    """What comes back for raw bytes, until the server closes."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    try:
        with contextlib.suppress(ConnectionError):
            writer.write(request)
            await writer.drain()
        with contextlib.suppress(ConnectionError):
            return await reader.read()
        return b""
    finally:
        writer.close()


@pytest.mark.parametrize(
    "request_bytes",
    [
        b"\x16\x03\x01 a TLS hello, say",
        b"GET / HTTP/9.9\r\n\r\n",
        b"GET " + b"/" * (2 * MAX_HEAD_BYTES),
        b"GET / HTTP/1.1\r\nX: " + b"x" * (2 * MAX_HEAD_BYTES),
        b"GET / HTTP/1.1\r\n" + b"X: y\r\n" * MAX_HEAD_BYTES,
        b"POST /v1/sealed HTTP/1.1\r\nContent-Length: -1\r\n\r\n",
        b"POST /v1/sealed HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n",
    ],
    ids=["no http", "no version", "long line", "long header", "many headers", "bad length", "bad chunk"],
)
async def test_a_malformed_or_endless_head_ends_the_connection(
    client: httpx2.AsyncClient, recorder: Recorder, request_bytes: bytes
) -> None:
    answer = await _converse(port_of(client), request_bytes)
    assert answer == b"" or answer.startswith(b"HTTP/1.1 400 ")
    assert recorder.calls == []
    assert (await client.get("/healthz")).status_code == 200


@pytest.mark.parametrize("begun", [b"", b"GET /healthz HTTP/1.1\r\nHost: "])
async def test_a_connection_that_says_no_request_is_closed(
    monkeypatch: pytest.MonkeyPatch, client: httpx2.AsyncClient, recorder: Recorder, begun: bytes
) -> None:
    monkeypatch.setattr(http_server, "HEAD_SECONDS", 0.01)
    assert await _converse(port_of(client), begun) == b""


async def test_a_second_request_on_a_connection_is_bounded_like_the_first(
    client: httpx2.AsyncClient, recorder: Recorder
) -> None:
    reader, writer = await asyncio.open_connection("127.0.0.1", port_of(client))
    for _ in range(3):
        writer.write(b"GET /healthz HTTP/1.1\r\nHost: x\r\n\r\n")
        assert await reader.readuntil(b'{"status":"ok"}')
    writer.write(b"GET / HTTP/1.1\r\nX: " + b"x" * (2 * MAX_HEAD_BYTES))
    with contextlib.suppress(ConnectionResetError):  # closed with bytes unread
        assert (await reader.read()).startswith(b"HTTP/1.1 400 ")
    writer.close()


async def test_the_second_word_to_stop_does_not_wait(address: UnixAddress, recorder: Recorder) -> None:
    recorder.hold = asyncio.Event()
    listener = socket.create_server(("127.0.0.1", 0))
    port = listener.getsockname()[1]
    listener.setblocking(False)
    server = HttpServer(Proxy(address).application())
    async with httpx2.AsyncClient(base_url=f"http://127.0.0.1:{port}", trust_env=False) as client:
        async with server.serving(listener):
            posting = asyncio.ensure_future(client.post(SEALED_PATH, content=b"body", headers=HEADERS))
            await recorder.begun.wait()
            server.stop()
        assert server.force_exit
        posting.cancel()
        await asyncio.gather(posting, return_exceptions=True)
    await recorder.cancelled.wait()
