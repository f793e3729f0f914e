"""The parent's proxy: HTTP outside, RPC inside, bytes only. PROTOCOL.md section 8.

One request becomes one call. No body is parsed, stored or logged; what is counted is in the metrics below and nowhere
else. It is the conveyor: a client believes nothing that it says.
"""

from __future__ import annotations

import asyncio
import contextlib
import re
from collections.abc import AsyncIterator, Awaitable, Callable

from prometheus_client import CollectorRegistry, Counter, Gauge, generate_latest
from prometheus_client.exposition import CONTENT_TYPE_LATEST
from starlette.applications import Starlette
from starlette.datastructures import Headers
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route
from starlette.types import Receive, Scope, Send

from vsockrpc.address import Address
from vsockrpc.errors import AddressError
from vsockrpc.frames import Meta
from vsockrpc.http import (
    ANSWER_TYPE,
    ENVELOPE_PATH,
    ENVELOPE_TYPE,
    EVIDENCE_PATH,
    EVIDENCE_TYPE,
    KEY_ID_HEADER,
    MAX_EVIDENCE_BYTES,
    SEALED_PATH,
    SEALED_TYPE,
    STATUS_OF_FAULT,
)
from vsockrpc.http_server import unless_client_leaves
from vsockrpc.transport import Call, Client, ConnectionLost, Fault, dial

MAX_REQUEST_BYTES = 9 << 20
"""A sealed request in its records, or an envelope; the enclave's own limit is lower."""
BODY_SECONDS = 120
"""How long a request's body may take to arrive, all of it: a client that drips it holds one of the enclave's calls."""
EVIDENCE_SECONDS = 30
ANSWER_SECONDS = 3600
NONCE_DIGITS = 64
KEY_ID_DIGITS = 32
CLIENT_LEFT = 499
"""Counted when a client left before there was an answer; no such answer is sent."""
_HEXADECIMAL = re.compile("[0-9a-fA-F]*", re.ASCII)


class Metrics:
    """What the proxy counts. Nothing here is of one request."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.requests = Counter(
            "strongroom_proxy_requests", "Requests by route and status", ["route", "status"], registry=self.registry
        )
        self.bytes = Counter("strongroom_proxy_bytes", "Body bytes conveyed", ["direction"], registry=self.registry)
        self.open_calls = Gauge("strongroom_proxy_open_calls", "Requests under way", registry=self.registry)
        self.connects = Counter("strongroom_proxy_connects", "Connections made to the enclave", registry=self.registry)
        self.connected = Gauge("strongroom_proxy_connected", "1 while connected to the enclave", registry=self.registry)


class EnclaveLink:
    """A connection to the enclave, made when it is needed and again when it was lost."""

    def __init__(self, address: Address, metrics: Metrics) -> None:
        self._address = address
        self._metrics = metrics
        self._client: Client | None = None
        self._dialling: asyncio.Future[Client] | None = None

    @property
    def connected(self) -> bool:
        return self._client is not None and not self._client.closed

    async def client(self) -> Client:
        """Raises Fault ``unavailable`` when no enclave answers at the address."""
        if self._client is not None and not self._client.closed:
            return self._client
        if self._dialling is None:  # whoever comes while it is being dialled waits for the same outcome, not in a queue
            self._dialling = asyncio.ensure_future(self._dial())
            self._dialling.add_done_callback(self._dialled)
        return await asyncio.shield(self._dialling)

    async def _dial(self) -> Client:
        await self._hang_up()
        try:
            self._client = await dial(self._address)
        except (ConnectionLost, AddressError) as error:
            raise Fault("unavailable", "no enclave answers at its address") from error
        self._metrics.connects.inc()
        return self._client

    def _dialled(self, dialling: asyncio.Future[Client]) -> None:
        self._dialling = None
        if not dialling.cancelled():
            dialling.exception()  # seen, also when everybody who waited for it has left

    async def close(self) -> None:
        if self._dialling is not None:
            self._dialling.cancel()
        await self._hang_up()

    async def _hang_up(self) -> None:
        if self._client is not None:
            client, self._client = self._client, None
            await client.close()


class Proxy:
    """The routes."""

    def __init__(self, enclave: Address) -> None:
        self.metrics = Metrics()
        self._request_link = EnclaveLink(enclave, self.metrics)
        # What shows that the enclave is there has a connection of its own: requests cannot use up its calls.
        self._evidence_link = EnclaveLink(enclave, self.metrics)
        self.metrics.connected.set_function(lambda: self._request_link.connected or self._evidence_link.connected)

    def application(self) -> Starlette:
        @contextlib.asynccontextmanager
        async def lifespan(application: Starlette) -> AsyncIterator[None]:
            yield
            await self._request_link.close()
            await self._evidence_link.close()

        return Starlette(
            routes=[
                Route(EVIDENCE_PATH, self._counted("evidence", self.evidence), methods=["GET"]),
                Route(SEALED_PATH, CallEndpoint(self, "sealed", SEALED_TYPE, SEALED_TYPE, _key_id), methods=["POST"]),
                Route(
                    ENVELOPE_PATH,
                    CallEndpoint(self, "envelope", ENVELOPE_TYPE, ANSWER_TYPE, _no_meta),
                    methods=["POST"],
                ),
                Route("/healthz", self.health, methods=["GET"]),
                Route("/metrics", self.show_metrics, methods=["GET"]),
            ],
            lifespan=lifespan,
            exception_handlers={Exception: _answer_defect},
        )

    def _counted(
        self, route: str, handler: Callable[[Request], Awaitable[Response]]
    ) -> Callable[[Request], Awaitable[Response]]:
        async def counted(request: Request) -> Response:
            response = await handler(request)
            self.metrics.requests.labels(route, response.status_code).inc()
            return response

        return counted

    async def evidence(self, request: Request) -> Response:
        try:
            nonce = _octets(request.query_params.get("nonce"), NONCE_DIGITS)
            client = await self._evidence_link.client()
            async with client.call("evidence", {"nonce": nonce}, deadline=EVIDENCE_SECONDS) as call:
                await call.send(b"", end=True)
                await call.reply()
                evidence = await call.read(MAX_EVIDENCE_BYTES)
        except (Fault, ConnectionLost) as error:
            return clear_fault(error)
        self.metrics.bytes.labels("out").inc(len(evidence))
        return Response(evidence, media_type=EVIDENCE_TYPE, headers={"Cache-Control": "no-store"})

    async def health(self, request: Request) -> Response:
        try:
            await self._evidence_link.client()
        except Fault:
            return JSONResponse({"status": "unavailable"}, 503)
        return JSONResponse({"status": "ok"})

    async def show_metrics(self, request: Request) -> Response:
        return Response(generate_latest(self.metrics.registry), media_type=CONTENT_TYPE_LATEST)

    async def call(self, method: str, meta: Meta) -> Call:
        client = await self._request_link.client()
        return client.call(method, meta, deadline=ANSWER_SECONDS)


def clear_fault(error: Fault | ConnectionLost) -> Response:
    """One of the clear faults of section 6.3; whatever else went wrong is ``unavailable``."""
    fault = error.code if isinstance(error, Fault) and error.code in STATUS_OF_FAULT else "unavailable"
    headers = {"Cache-Control": "no-store"} | ({"Retry-After": "1"} if fault in ("overloaded", "unavailable") else {})
    return JSONResponse({"fault": fault}, STATUS_OF_FAULT[fault], headers)


async def _answer_defect(request: Request, error: Exception) -> Response:
    return clear_fault(Fault("unavailable"))


class CallEndpoint:
    """A route whose requests become calls of one method: body and answer pass as they come, and whichever side leaves
    ends the other.
    """

    def __init__(self, proxy: Proxy, method: str, accepts: str, answers: str, meta: Callable[[Headers], Meta]) -> None:
        """``accepts`` and ``answers`` are media types; ``meta`` makes the call's from a request's headers, or raises
        Fault ``malformed``.
        """
        self._proxy = proxy
        self._metrics = proxy.metrics
        self._method = method
        self._accepts = accepts
        self._answers = answers
        self._meta = meta

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        request = Request(scope, receive)
        status = CLIENT_LEFT
        try:
            if request.headers.get("content-type") != self._accepts:
                raise Fault("malformed", f"the content type is {self._accepts}")
            async with await self._proxy.call(self._method, self._meta(request.headers)) as call:
                with self._metrics.open_calls.track_inprogress():
                    await self._convey_request(request, call)
                    await unless_client_leaves(call.reply(), receive)
                    status = 200
                    await unless_client_leaves(self._convey_answer(call, send), receive)
        except (Fault, ConnectionLost) as error:
            if status != 200:
                response = clear_fault(error)
                status = response.status_code
                await response(scope, receive, send)
            # Else the answer is left without its end: the HTTP framing breaks, and the final record is missing.
        except ClientDisconnect:
            pass
        finally:
            self._metrics.requests.labels(self._method, status).inc()

    async def _convey_request(self, request: Request, call: Call) -> None:
        conveyed = 0
        try:
            async with asyncio.timeout(BODY_SECONDS):
                async for chunk in request.stream():
                    conveyed += len(chunk)
                    if conveyed > MAX_REQUEST_BYTES:
                        raise Fault("malformed", "the request is too large")
                    if chunk:
                        await call.send(chunk)
        except TimeoutError:
            raise Fault("malformed", "the request's body does not come") from None
        await call.send(b"", end=True)
        self._metrics.bytes.labels("in").inc(conveyed)

    async def _convey_answer(self, call: Call, send: Send) -> None:
        headers = [(b"content-type", self._answers.encode()), (b"cache-control", b"no-store")]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        async for chunk in call:
            self._metrics.bytes.labels("out").inc(len(chunk))
            await send({"type": "http.response.body", "body": bytes(chunk), "more_body": True})
        await send({"type": "http.response.body", "body": b"", "more_body": False})


def _key_id(headers: Headers) -> Meta:
    return {"key_id": _octets(headers.get(KEY_ID_HEADER), KEY_ID_DIGITS)}


def _no_meta(headers: Headers) -> Meta:
    """An envelope's own header says which key it needs."""
    return {}


def _octets(digits: str | None, count: int) -> bytes:
    """Raises Fault ``malformed`` unless there are exactly ``count`` hexadecimal digits."""
    if digits is None or len(digits) != count or not _HEXADECIMAL.fullmatch(digits):
        raise Fault("malformed", f"expected {count} hexadecimal digits")
    return bytes.fromhex(digits)
