"""``strongroom serve``: an OpenAI endpoint on this machine, for any OpenAI client. Behind it is a verified session.

It is open to programs of this machine and to nobody else: it checks Host (DNS rebinding), Origin and content type
(posts from web pages), sends no CORS headers, and takes a bearer token when told to.
"""

from __future__ import annotations

import asyncio
import contextlib
import hmac
import json
import secrets
import time
from collections.abc import AsyncGenerator, Callable, Mapping
from dataclasses import replace
from typing import Any, Final

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from attestation.errors import EvidenceError, StrongroomError
from attestation.secret import Secret
from attestation.strict_json import decode_foreign
from strongroom.openai_answers import AnswerShape, ChatShape, CompletionShape, count_of, model_of
from strongroom.openai_api import ApiError, Call, Q, api_error_of, parse_chat, parse_completion
from strongroom.session import Session
from vsockrpc.chat import CACHE_SECRET_SIZE, ChatRequest
from vsockrpc.http_server import unless_client_leaves
from vsockrpc.messages import Answer, Delta, Done, Start

MAX_BODY_BYTES: Final = 4 << 20
MAX_BODY_DEPTH: Final = 128
"""Of a body's JSON: a schema, which may be 64 deep, stands some levels within it."""
MAX_WAITING_PIECES: Final = 64
"""Of an answer, where a client reads more slowly than the enclave speaks."""
NO_RETRY: Final = "x-should-retry"
"""OpenAI's own header: its clients do not try again when it says ``false``."""


class PromptCache:
    """Who shares with whom what an enclave has computed of a prompt: requests of one process with one
    ``prompt_cache_key``, or with none. The secrets of different ones have nothing in common that anybody could find.
    """

    def __init__(self) -> None:
        self._secret = secrets.token_bytes(CACHE_SECRET_SIZE)

    def secret_of(self, key: str | None) -> bytes:
        """32 bytes."""
        return hmac.digest(self._secret, b"" if key is None else b"key:" + key.encode(), "sha256")


class Gateway:
    """The routes. ``hosts`` are the ``host:port`` that a request may name; ``token`` is required as a bearer token when
    there is one. Only with a token may ``hosts`` be None, for any: a page that was rebound to this address lacks it.
    Without a ``cache`` the enclave keeps nothing of a prompt for the next one, and a ``prompt_cache_key`` is refused.
    """

    def __init__(
        self,
        session: Session,
        *,
        hosts: frozenset[str] | None,
        token: Secret | None = None,
        cache: PromptCache | None = None,
    ) -> None:
        if hosts is None and token is None:
            raise ValueError("a gateway without a token names its hosts")
        self._session = session
        self._hosts = hosts
        self._token = token
        self._cache = cache
        self._started = int(time.time())

    def application(self) -> Starlette:
        return Starlette(
            routes=[
                Route("/v1/models", self.models, methods=["GET"]),
                Route("/v1/models/{name:path}", self.model, methods=["GET"]),
                Route("/v1/chat/completions", self.chat_completions, methods=["POST"]),
                Route("/v1/chat/completions/input_tokens", self.input_tokens, methods=["POST"]),
                Route("/v1/completions", self.completions, methods=["POST"]),
                Route("/healthz", self.health, methods=["GET"]),
            ],
            exception_handlers={
                StrongroomError: _answer_error,
                HTTPException: _answer_wrong_route,
                ClientDisconnect: _answer_nobody,
                Exception: _answer_defect,
            },
        )

    # --- Who may ask ---------------------------------------------------------------------------------------------

    def _admit(self, request: Request) -> None:
        """Raises ApiError for a request that a web page, or somebody without the token, could have sent."""
        host = request.headers.get("host", "").lower()
        if self._hosts is not None and host not in self._hosts:
            raise ApiError(403, "host_not_allowed", f"this server does not answer to the host {host!r}")
        same_origin = request.headers.get("origin", f"http://{host}").lower() == f"http://{host}"
        if not same_origin or request.headers.get("sec-fetch-site", "none") not in ("none", "same-origin"):
            raise ApiError(403, "origin_not_allowed", "this server does not answer to other sites")
        if self._token is not None:
            scheme, _, given = request.headers.get("authorization", "").partition(" ")
            if scheme.lower() != "bearer" or not hmac.compare_digest(given.encode("latin-1"), self._token.expose()):
                raise ApiError(401, "invalid_api_key", "the bearer token is missing or wrong")

    # --- Routes --------------------------------------------------------------------------------------------------

    async def health(self, request: Request) -> Response:
        self._admit(request)
        result = await self._session.result()
        return JSONResponse({"status": "ok", "labels": list(result.labels)})

    async def models(self, request: Request) -> Response:
        self._admit(request)
        description = await self._session.describe()
        return JSONResponse({"object": "list", "data": [model_of(description.name, self._started)]})

    async def model(self, request: Request) -> Response:
        self._admit(request)
        description = await self._session.describe()
        if request.path_params["name"] != description.name:
            raise ApiError(404, "model_not_found", f"the enclave serves {description.name!r}", param="model")
        return JSONResponse(model_of(description.name, self._started))

    async def chat_completions(self, request: Request) -> Response:
        call = await self._call(request, parse_chat)
        return await _answered(request, call, self._session.chat(self._cached(call)), ChatShape)

    async def completions(self, request: Request) -> Response:
        call = await self._call(request, parse_completion)
        return await _answered(request, call, self._session.complete(self._cached(call)), CompletionShape)

    async def input_tokens(self, request: Request) -> Response:
        call = await self._call(request, parse_chat)
        return JSONResponse(count_of(await unless_client_leaves(self._session.count(call.request), request.receive)))

    async def _call(self, request: Request, parse: Callable[[object], Call[Q]]) -> Call[Q]:
        """Raises ApiError."""
        self._admit(request)
        call = parse(await _json_body(request))
        if self._cache is None and call.cache_key is not None:
            text = "prompt_cache_key has no effect here: this server was started without a prompt cache"
            raise ApiError(400, "unsupported_parameter", text, param="prompt_cache_key")
        return call

    def _cached(self, call: Call[Q]) -> Q:
        if self._cache is None:
            return call.request
        return replace(call.request, cache_secret=self._cache.secret_of(call.cache_key))


async def _answered(
    request: Request, call: Call[Any], answers: AsyncGenerator[Answer], kind: type[AnswerShape]
) -> Response:
    try:
        # Errors of the request come before its first text, while there is a status code to give them.
        model, first = await unless_client_leaves(_begin(answers), request.receive)
        shape = kind(
            kind.ID_PREFIX + secrets.token_hex(12),
            int(time.time()),
            model,
            include_usage=call.include_usage,
            says_dropped=isinstance(call.request, ChatRequest) and call.request.truncation == "auto",
        )
        if call.stream:
            events = together(_events(shape, first, answers))
            return StreamingResponse(events, media_type="text/event-stream", headers={"Cache-Control": "no-store"})
        deltas, done = await unless_client_leaves(_gather(first, answers), request.receive)
    except StrongroomError as error:
        await answers.aclose()
        raise api_error_of(error, prompt=kind.PROMPT, limit=call.limit) from error
    except BaseException:
        await answers.aclose()
        raise
    return JSONResponse(shape.whole(deltas, done))


async def _begin(answers: AsyncGenerator[Answer]) -> tuple[str, Answer]:
    """The model's name, and what follows it."""
    start = await anext(answers)
    assert isinstance(start, Start), "a session begins an answer with Start"
    return start.model, await anext(answers)


async def _gather(first: Answer, rest: AsyncGenerator[Answer]) -> tuple[list[Delta], Done]:
    deltas, done = [], None
    async with contextlib.aclosing(_from(first, rest)) as answers:
        async for answer in answers:
            match answer:
                case Delta():
                    deltas.append(answer)
                case Done():
                    done = answer
    assert done is not None, "a session ends an answer with Done, or raises"
    return deltas, done


async def _from(first: Answer, rest: AsyncGenerator[Answer]) -> AsyncGenerator[Answer]:
    async with contextlib.aclosing(rest):
        yield first
        async for answer in rest:
            yield answer


async def _events(shape: AnswerShape, first: Answer, answers: AsyncGenerator[Answer]) -> AsyncGenerator[bytes]:
    """The answer as server-sent events. An error in mid-answer is an event too; then there is no ``[DONE]``."""
    for chunk in shape.opening():
        yield _event(chunk)
    try:
        async with contextlib.aclosing(_from(first, answers)) as rest:
            async for answer in rest:
                match answer:
                    case Delta():
                        yield _event(shape.piece(answer))
                    case Done():
                        for chunk in shape.closing(answer):
                            yield _event(chunk)
                        yield b"data: [DONE]\n\n"
    except StrongroomError as error:
        yield _event(api_error_of(error).body())


async def together(pieces: AsyncGenerator[bytes]) -> AsyncGenerator[bytes]:
    """What is there at the same time goes out in one write: each wakes whoever reads, and costs more than its text."""
    waiting: asyncio.Queue[bytes | Exception | None] = asyncio.Queue(MAX_WAITING_PIECES)

    async def collect() -> None:
        end: Exception | None = None
        try:
            async with contextlib.aclosing(pieces):
                async for piece in pieces:
                    await waiting.put(piece)
        except Exception as error:
            end = error
        await waiting.put(end)

    collecting = asyncio.create_task(collect())
    try:
        next_: bytes | Exception | None = b""
        while isinstance(next_, bytes):
            next_, together = await waiting.get(), bytearray()
            while isinstance(next_, bytes):
                together += next_
                if waiting.empty():
                    break
                next_ = waiting.get_nowait()
            if together:
                yield bytes(together)
        if next_ is not None:
            raise next_
    finally:
        collecting.cancel()
        await asyncio.wait({collecting})


def _event(body: Mapping[str, object]) -> bytes:
    return b"data: " + json.dumps(body, ensure_ascii=False, separators=(",", ":")).encode() + b"\n\n"


async def _json_body(request: Request) -> object:
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json":
        raise ApiError(415, None, "the content type must be application/json")
    data = bytearray()
    async for chunk in request.stream():
        data += chunk
        if len(data) > MAX_BODY_BYTES:
            raise ApiError(413, None, f"the body is larger than {MAX_BODY_BYTES} bytes")
    try:
        return decode_foreign(bytes(data), code="invalid_request", max_depth=MAX_BODY_DEPTH)
    except EvidenceError as error:
        raise ApiError(400, None, f"the body is not valid {error.message}") from error


def _error_response(error: ApiError, headers: Mapping[str, str] | None = None) -> Response:
    """In ASCII: an error may quote what was sent, and JSON can hold text that UTF-8 cannot."""
    return Response(json.dumps(error.body()), error.status, headers, "application/json")


async def _answer_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, StrongroomError)
    failure = api_error_of(error)
    retry = failure.retry_seconds
    return _error_response(failure, {NO_RETRY: "false"} if retry is None else {"Retry-After": str(retry)})


async def _answer_wrong_route(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    text = f"no such endpoint: {request.method} {request.url.path}"
    return _error_response(ApiError(error.status_code, None, text), error.headers)


async def _answer_defect(request: Request, error: Exception) -> Response:
    failure = ApiError(500, "internal", "this server failed at this request", kind="server_error")
    return _error_response(failure, {NO_RETRY: "false"})


async def _answer_nobody(request: Request, error: Exception) -> Response:
    return Response(status_code=499)
