"""``strongroom serve``: an OpenAI endpoint on this machine, for any OpenAI client. Behind it stands a verified session.

It is open to programs of this machine and to nobody else: it checks Host (DNS rebinding), Origin and content type (posts from web pages), sends no
CORS headers, and takes a bearer token when told to.
"""

from __future__ import annotations

import contextlib
import hmac
import json
import secrets
import time
from collections.abc import AsyncGenerator, Mapping
from urllib.parse import urlsplit

from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from attestation.errors import StrongroomError
from strongroom.openai_api import (
    ApiError,
    CompletionRequest,
    CompletionShape,
    api_error_of,
    model_of,
    parse_completion_request,
)
from strongroom.session import Session
from vsockrpc.messages import Answer, Delta, Done, Start
from vsockrpc.secret import Secret

MAX_BODY_BYTES = 4 << 20


class Gateway:
    """The routes. ``hosts`` are the ``host:port`` that a request may name; ``token`` is required as a bearer token when there is one."""

    def __init__(self, session: Session, *, hosts: frozenset[str], token: Secret | None = None) -> None:
        self._session = session
        self._hosts = hosts
        self._token = token
        self._started = int(time.time())

    def application(self) -> Starlette:
        return Starlette(
            routes=[
                Route("/v1/models", self.models, methods=["GET"]),
                Route("/v1/models/{name:path}", self.model, methods=["GET"]),
                Route("/v1/chat/completions", self.chat_completions, methods=["POST"]),
                Route("/healthz", self.health, methods=["GET"]),
            ],
            exception_handlers={StrongroomError: _answer_error, 404: _not_found, 405: _not_found},
        )

    # --- Who may ask ---------------------------------------------------------------------------------------------

    def _admit(self, request: Request) -> None:
        """Raises ApiError for a request that a web page, or somebody without the token, could have sent."""
        host = request.headers.get("host", "")
        if host.lower() not in self._hosts:
            raise ApiError(403, "host_not_allowed", f"this server does not answer to the host {host!r}")
        origin = request.headers.get("origin")
        if origin is not None and urlsplit(origin).netloc.lower() not in self._hosts:
            raise ApiError(403, "origin_not_allowed", "this server does not answer to other sites")
        if request.headers.get("sec-fetch-site", "none") not in ("none", "same-origin"):
            raise ApiError(403, "origin_not_allowed", "this server does not answer to other sites")
        if self._token is not None:
            scheme, _, given = request.headers.get("authorization", "").partition(" ")
            if scheme.lower() != "bearer" or not hmac.compare_digest(given.encode(), self._token.expose()):
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
        self._admit(request)
        completion = parse_completion_request(await _json_body(request))
        answers = self._session.chat(completion.chat)
        try:
            start = await anext(answers)
            assert isinstance(start, Start), "an answer begins with Start"
            first = await anext(answers)  # errors of the request come now, while there is a status code to give them
        except BaseException:
            await answers.aclose()
            raise
        shape = CompletionShape(f"chatcmpl-{secrets.token_hex(12)}", int(time.time()), start.model)
        if completion.stream:
            return StreamingResponse(_events(shape, completion, first, answers), media_type="text/event-stream")
        text, done = "", None
        async with contextlib.aclosing(_from(first, answers)) as rest:
            async for answer in rest:
                match answer:
                    case Delta():
                        text += answer.text
                    case Done():
                        done = answer
        assert done is not None, "a session ends an answer with Done or raises"
        return JSONResponse(shape.whole(text, done))


async def _from(first: Answer, rest: AsyncGenerator[Answer]) -> AsyncGenerator[Answer]:
    async with contextlib.aclosing(rest):
        yield first
        async for answer in rest:
            yield answer


async def _events(
    shape: CompletionShape, completion: CompletionRequest, first: Answer, answers: AsyncGenerator[Answer]
) -> AsyncGenerator[bytes]:
    """The answer as server-sent events. An error in mid-answer is an event too; then there is no ``[DONE]``."""
    yield _event(shape.chunk({"role": "assistant", "content": ""}))
    try:
        async with contextlib.aclosing(_from(first, answers)) as rest:
            async for answer in rest:
                match answer:
                    case Delta():
                        yield _event(shape.chunk({"content": answer.text}))
                    case Done():
                        yield _event(shape.chunk({}, answer.finish_reason))
                        if completion.include_usage:
                            yield _event(shape.usage_chunk(answer))
                        yield b"data: [DONE]\n\n"
    except StrongroomError as error:
        yield _event(api_error_of(error).body())


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
        return json.loads(data)
    except (ValueError, RecursionError) as error:
        raise ApiError(400, None, "the body is not valid JSON") from error


async def _answer_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, StrongroomError)
    api_error = api_error_of(error)
    headers = {"Retry-After": "1"} if api_error.status in (429, 503) else None
    return JSONResponse(api_error.body(), api_error.status, headers)


async def _not_found(request: Request, error: Exception) -> Response:
    text = f"no such endpoint: {request.method} {request.url.path}"
    return JSONResponse(ApiError(404, None, text).body(), 404)
