"""The gateway, asked by OpenAI's own unmodified client, and by those whom it must not answer."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator, AsyncIterator
from dataclasses import replace

import httpx2
import openai
import pytest
from openai.types.chat import ChatCompletionMessageParam

from attestation.rules import Require
from attestation.secret import Secret
from enclave.generation import AnswerExceeded, EngineFailed, Overloaded
from strongroom import gateway as gateway_module
from strongroom.gateway import MAX_BODY_BYTES, MAX_WAITING_PIECES, Gateway, together
from strongroom.serving import _names_of
from strongroom.session import Session
from tests.gateways import gateway_of
from tests.house import MODEL_NAME, House
from vsockrpc.address import TcpAddress
from vsockrpc.chat import ChatRequest
from vsockrpc.http import SEALED_PATH, STATUS_OF_FAULT
from vsockrpc.http_server import HttpServer, listen_on

TOKEN = "a-token-that-nobody-guesses"
HELLO: list[ChatCompletionMessageParam] = [{"role": "user", "content": "hello there"}]
BODY = {"messages": HELLO}
COMPLETIONS = "/v1/chat/completions"
COUNT = "/v1/chat/completions/input_tokens"
LEGACY = "/v1/completions"


def error_of(response: httpx2.Response) -> dict[str, object]:
    body = response.json()
    assert set(body) == {"error"}
    assert set(body["error"]) == {"message", "type", "param", "code"}
    error: dict[str, object] = body["error"]
    return error


# --- OpenAI's client -----------------------------------------------------------------------------------------------


async def test_models(client: openai.AsyncOpenAI) -> None:
    listed = [model async for model in client.models.list()]
    assert [(model.id, model.object, model.owned_by) for model in listed] == [("tiny", "model", "strongroom")]
    assert (await client.models.retrieve("tiny")).id == "tiny"
    with pytest.raises(openai.NotFoundError) as caught:
        await client.models.retrieve("gpt-4")
    assert caught.value.code == "model_not_found"


async def test_a_whole_answer(client: openai.AsyncOpenAI, home: House) -> None:
    completion = await client.chat.completions.create(model="tiny", messages=HELLO)
    [choice] = completion.choices
    assert (choice.message.role, choice.message.content, choice.finish_reason) == ("assistant", "hello there", "stop")
    assert (completion.model, completion.object) == ("tiny", "chat.completion")
    assert completion.id.startswith("chatcmpl-")
    assert completion.usage is not None
    assert completion.usage.total_tokens == completion.usage.prompt_tokens + completion.usage.completion_tokens


async def test_a_streamed_answer(client: openai.AsyncOpenAI) -> None:
    stream = await client.chat.completions.create(
        model="tiny", messages=HELLO, stream=True, stream_options={"include_usage": True}
    )
    chunks = [chunk async for chunk in stream]
    assert len({chunk.id for chunk in chunks}) == 1
    assert {chunk.model for chunk in chunks} == {"tiny"}
    first, *middle, last, usage = chunks
    assert first.choices[0].delta.role == "assistant"
    assert "".join(chunk.choices[0].delta.content or "" for chunk in middle) == "hello there"
    assert last.choices[0].finish_reason == "stop"
    assert usage.choices == []
    assert usage.usage is not None
    assert usage.usage.completion_tokens > 0


async def test_usage_is_streamed_only_when_asked_for(client: openai.AsyncOpenAI) -> None:
    stream = await client.chat.completions.create(model="tiny", messages=HELLO, stream=True)
    async for chunk in stream:
        assert len(chunk.choices) == 1
        assert chunk.usage is None


async def test_the_synchronous_client_too(port: int) -> None:
    def ask() -> str | None:
        with openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="unused") as client:
            return client.chat.completions.create(model="tiny", messages=HELLO).choices[0].message.content

    assert await asyncio.to_thread(ask) == "hello there"


async def test_a_budget_ends_an_answer_as_length(client: openai.AsyncOpenAI) -> None:
    completion = await client.chat.completions.create(model="tiny", messages=HELLO, max_tokens=2)
    assert completion.choices[0].finish_reason == "length"
    assert completion.usage is not None
    assert completion.usage.completion_tokens == 2


async def test_a_conversation_goes_on_with_the_clients_own_objects(client: openai.AsyncOpenAI, home: House) -> None:
    first = await client.chat.completions.create(model="tiny", messages=HELLO)
    answer = first.choices[0].message
    second = await client.chat.completions.create(
        model="tiny",
        messages=[*HELLO, {"role": "assistant", "content": answer.content}, {"role": "user", "content": "and now?"}],
    )
    assert second.choices[0].message.content == "and now?"
    asked = home.engine.requests[-1]
    assert isinstance(asked, ChatRequest)
    assert asked.messages[1].content == "hello there"


# --- OpenAI's errors -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stream", [False, True])
async def test_an_unknown_model(client: openai.AsyncOpenAI, stream: bool) -> None:
    with pytest.raises(openai.NotFoundError) as caught:
        await client.chat.completions.create(model="gpt-4", messages=HELLO, stream=stream)
    assert (caught.value.code, caught.value.param) == ("model_not_found", "model")


@pytest.mark.parametrize("stream", [False, True])
async def test_a_prompt_that_is_too_long(client: openai.AsyncOpenAI, stream: bool) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        await client.chat.completions.create(
            model="tiny", messages=[{"role": "user", "content": "too long " * 60}], stream=stream
        )
    assert (caught.value.code, caught.value.param) == ("context_length_exceeded", "messages")
    assert "expected 255, got 546" in str(caught.value)


@pytest.mark.parametrize("stream", [False, True])
async def test_a_completions_prompt_that_is_too_long(client: openai.AsyncOpenAI, stream: bool) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        await client.completions.create(model="tiny", prompt="too long " * 60, stream=stream)
    assert (caught.value.code, caught.value.param) == ("context_length_exceeded", "prompt")
    assert "expected 255, got 540" in str(caught.value)


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("name", ["max_tokens", "max_completion_tokens"])
async def test_an_answer_that_may_not_be_so_long(
    client: openai.AsyncOpenAI, home: House, name: str, stream: bool
) -> None:
    home.engine.refuse = AnswerExceeded("max_tokens is more", expected="<= 512 tokens", got="513 tokens")
    with pytest.raises(openai.BadRequestError) as caught:
        await client.chat.completions.create(model="tiny", messages=HELLO, stream=stream, extra_body={name: 513})
    assert (caught.value.type, caught.value.param) == ("invalid_request_error", name)
    assert "expected <= 512 tokens, got 513 tokens" in str(caught.value)


async def test_a_prompt_that_is_too_long_is_not_counted(http: httpx2.AsyncClient) -> None:
    response = await http.post(COUNT, json={"messages": [{"role": "user", "content": "too long " * 60}]})
    assert response.status_code == 400
    assert error_of(response)["code"] == "context_length_exceeded"


@pytest.mark.parametrize(
    ("extra", "code"),
    [({"tempreature": 1}, "unknown_parameter"), ({"verbosity": "low"}, "unsupported_parameter")],
)
async def test_a_parameter_that_is_not_served(
    client: openai.AsyncOpenAI, home: House, extra: dict[str, object], code: str
) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        await client.chat.completions.create(model="tiny", messages=HELLO, extra_body=extra)
    assert (caught.value.code, caught.value.param) == (code, next(iter(extra)))
    assert home.hostile.paths().count(SEALED_PATH) == 0


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(("seconds", "header"), [(None, "1"), (7, "7")])
async def test_an_overloaded_enclave(
    client: openai.AsyncOpenAI, home: House, stream: bool, seconds: int | None, header: str
) -> None:
    home.engine.refuse = Overloaded(expected="<= 64 waiting", got=65, retry_seconds=seconds)
    for asking in (
        client.chat.completions.create(model="tiny", messages=HELLO, stream=stream),
        client.completions.create(model="tiny", prompt="hello", stream=stream),
    ):
        with pytest.raises(openai.RateLimitError) as caught:
            await asking
        assert caught.value.code == "overloaded"
        assert caught.value.response.headers["retry-after"] == header
        assert "x-should-retry" not in caught.value.response.headers


async def test_an_engine_that_fails_before_the_first_text(client: openai.AsyncOpenAI, home: House) -> None:
    home.engine.refuse = EngineFailed("the engine process ended")
    with pytest.raises(openai.InternalServerError) as caught:
        await client.chat.completions.create(model="tiny", messages=HELLO, stream=True)
    assert (caught.value.status_code, caught.value.code) == (503, "engine_failed")


async def test_an_enclave_that_is_not_accepted_any_more(
    client: openai.AsyncOpenAI, home: House, session: Session
) -> None:
    await client.chat.completions.create(model="tiny", messages=HELLO)
    await home.behind.restart()
    session.policy = replace(home.policy, configuration=Require((bytes(48),)))
    with pytest.raises(openai.InternalServerError) as caught:
        await client.chat.completions.create(model="tiny", messages=HELLO)
    assert (caught.value.status_code, caught.value.code) == (503, "attestation_failed")
    assert "expected sha384:000000" in str(caught.value)
    assert home.engine.requests == []


async def test_a_proxy_that_is_gone_and_comes_back(client: openai.AsyncOpenAI, home: House) -> None:
    await home.behind.stop()
    with pytest.raises(openai.InternalServerError) as caught:
        await client.chat.completions.create(model="tiny", messages=HELLO)
    assert (caught.value.status_code, caught.value.code) == (503, "unavailable")
    await home.behind.start()
    assert (await client.chat.completions.create(model="tiny", messages=HELLO)).choices


async def test_a_tampered_answer(client: openai.AsyncOpenAI, home: House) -> None:
    home.hostile.on_answer = lambda path, body: bytes(len(body)) if path == SEALED_PATH else body
    with pytest.raises(openai.InternalServerError) as caught:
        await client.chat.completions.create(model="tiny", messages=HELLO)
    assert (caught.value.status_code, caught.value.code) == (502, "malformed_record")


async def test_an_error_in_mid_stream_is_an_event_and_no_end(client: openai.AsyncOpenAI, home: House) -> None:
    held = home.engine.hold_after(4)
    stream = await client.chat.completions.create(
        model="tiny", messages=[{"role": "user", "content": "a long answer of many pieces"}], stream=True
    )
    await held.wait()
    home.engine.fail("the engine process ended")
    text = ""
    with pytest.raises(openai.APIError) as caught:
        async for chunk in stream:
            text += chunk.choices[0].delta.content or ""
    assert caught.value.code == "engine_failed"
    assert "a long answer of many pieces".startswith(text)


async def test_a_stream_that_failed_has_no_done(http: httpx2.AsyncClient, home: House) -> None:
    held = home.engine.hold_after(4)
    body = {"messages": [{"role": "user", "content": "a long answer of many pieces"}], "stream": True}
    async with http.stream("POST", COMPLETIONS, json=body) as response:
        await held.wait()
        home.engine.fail("the engine process ended")
        events = (await response.aread()).decode().split("\n\n")
    assert response.headers["content-type"].startswith("text/event-stream")
    assert response.headers["cache-control"] == "no-store"
    assert events[-1] == ""
    assert json.loads(events[-2].removeprefix("data: "))["error"]["code"] == "engine_failed"
    assert not [event for event in events if "[DONE]" in event]


# --- Leaving -------------------------------------------------------------------------------------------------------


async def test_leaving_a_stream_stops_the_enclaves_work(client: openai.AsyncOpenAI, home: House) -> None:
    home.engine.hold_after(4)
    stream = await client.chat.completions.create(
        model="tiny", messages=[{"role": "user", "content": "a long answer of many pieces"}], stream=True
    )
    async for chunk in stream:
        if chunk.choices[0].delta.content:
            break
    await stream.close()
    await home.engine.idle.wait()


@pytest.mark.parametrize("steps", [0, 4], ids=["before the first text", "in the middle"])
@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("path", [COMPLETIONS, LEGACY])
async def test_leaving_a_request_stops_the_enclaves_work(
    http: httpx2.AsyncClient, home: House, steps: int, stream: bool, path: str
) -> None:
    held = home.engine.hold_after(steps)
    text = "a long answer of many pieces"
    prompt = {"messages": [{"role": "user", "content": text}]} if path == COMPLETIONS else {"prompt": text}
    asking = asyncio.ensure_future(http.post(path, json={**prompt, "stream": stream}))
    await held.wait()
    asking.cancel()
    await home.engine.idle.wait()
    home.engine.go_on()
    assert (await http.post(COMPLETIONS, json=BODY)).status_code == 200


# --- Who may ask ---------------------------------------------------------------------------------------------------

POSTS = [COMPLETIONS, LEGACY, COUNT]
ROUTES = [
    *(("GET", path) for path in ("/v1/models", "/v1/models/tiny", "/healthz")),
    *(("POST", path) for path in POSTS),
]


@pytest.mark.parametrize(
    ("headers", "code"),
    [
        ({"Host": "attacker.example:{port}"}, "host_not_allowed"),
        ({"Host": "attacker.example"}, "host_not_allowed"),
        ({"Host": "127.0.0.1"}, "host_not_allowed"),
        ({"Host": "127.0.0.1:1"}, "host_not_allowed"),
        ({"Host": "127.0.0.1.attacker.example:{port}"}, "host_not_allowed"),
        ({"Host": "localhost.:{port}"}, "host_not_allowed"),
        ({"Origin": "https://attacker.example"}, "origin_not_allowed"),
        ({"Origin": "null"}, "origin_not_allowed"),
        ({"Origin": ""}, "origin_not_allowed"),
        ({"Origin": "http://127.0.0.1:{port}.attacker.example"}, "origin_not_allowed"),
        ({"Origin": "http://127.0.0.1:3000"}, "origin_not_allowed"),
        ({"Origin": "http://localhost:{port}"}, "origin_not_allowed"),
        ({"Origin": "https://127.0.0.1:{port}"}, "origin_not_allowed"),
        ({"Origin": "http://[::1"}, "origin_not_allowed"),
        ({"Sec-Fetch-Site": "cross-site"}, "origin_not_allowed"),
        ({"Sec-Fetch-Site": "same-site"}, "origin_not_allowed"),
        ({"Sec-Fetch-Site": "anything"}, "origin_not_allowed"),
    ],
)
async def test_other_sites_are_not_answered(
    http: httpx2.AsyncClient, port: int, home: House, headers: dict[str, str], code: str
) -> None:
    sent = {name: value.format(port=port) for name, value in headers.items()}
    for method, path in ROUTES:
        response = await http.request(method, path, headers=sent, json=BODY if method == "POST" else None)
        assert response.status_code == 403
        assert error_of(response)["code"] == code
    assert home.hostile.requests == []


@pytest.mark.parametrize(
    "headers",
    [
        {},
        {"Host": "localhost:{port}"},
        {"Host": "LOCALHOST:{port}"},
        {"Host": "[::1]:{port}"},
        {"Origin": "http://127.0.0.1:{port}"},
        {"Host": "localhost:{port}", "Origin": "http://localhost:{port}"},
        {"Sec-Fetch-Site": "same-origin"},
        {"Sec-Fetch-Site": "none"},
    ],
)
async def test_programs_of_this_machine_are_answered(
    http: httpx2.AsyncClient, port: int, headers: dict[str, str]
) -> None:
    sent = {name: value.format(port=port) for name, value in headers.items()}
    assert (await http.get("/v1/models", headers=sent)).status_code == 200


async def test_a_request_without_a_host(http: httpx2.AsyncClient, port: int) -> None:
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(b"GET /v1/models HTTP/1.0\r\n\r\n")
    assert (await reader.read()).startswith(b"HTTP/1.1 403 ")
    writer.close()


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("OPTIONS", COMPLETIONS, 405),
        ("OPTIONS", "/v1/models", 405),
        ("GET", COMPLETIONS, 405),
        ("DELETE", "/v1/models/tiny", 405),
        ("POST", "/v1/models", 405),
        ("GET", "/", 404),
        ("GET", LEGACY, 405),
        ("GET", COUNT, 405),
        ("POST", f"{LEGACY}/input_tokens", 404),
        ("POST", "/v1/responses", 404),
        ("POST", "/v1/embeddings", 404),
        ("GET", "/v1", 404),
    ],
)
async def test_nothing_else_is_served(http: httpx2.AsyncClient, method: str, path: str, status: int) -> None:
    response = await http.request(method, path)
    assert response.status_code == status
    assert error_of(response)["type"] == "invalid_request_error"
    if status == 405:
        assert response.headers["allow"]


async def test_a_head_request_has_no_body(http: httpx2.AsyncClient) -> None:
    response = await http.head("/v1/models")
    assert (response.status_code, response.content) == (200, b"")


async def test_there_is_never_a_cors_header(http: httpx2.AsyncClient, port: int) -> None:
    origin = {"Origin": f"http://127.0.0.1:{port}"}
    preflight = {**origin, "Access-Control-Request-Method": "POST", "Access-Control-Request-Private-Network": "true"}
    for response in (
        await http.get("/v1/models", headers=origin),
        await http.post(COMPLETIONS, json=BODY, headers=origin),
        await http.post(COMPLETIONS, json={**BODY, "stream": True}, headers=origin),
        await http.get("/v1/models", headers={"Origin": "https://attacker.example"}),
        await http.options(COMPLETIONS, headers=preflight),
        await http.get("/nowhere", headers=origin),
    ):
        assert not [name for name in response.headers if name.lower().startswith("access-control")]


async def test_a_bearer_token_when_there_is_one(session: Session) -> None:
    async with (
        gateway_of(session, token=TOKEN) as port,
        httpx2.AsyncClient(base_url=f"http://127.0.0.1:{port}", trust_env=False) as http,
    ):
        for header in (None, "", TOKEN, "Bearer", f"Bearer {TOKEN}x", f"Basic {TOKEN}", "Bearer \xe9"):
            headers = [] if header is None else [(b"Authorization", header.encode("latin-1"))]
            for method, path in ROUTES:
                response = await http.request(method, path, headers=headers, json=BODY)
                assert response.status_code == 401
                assert error_of(response)["code"] == "invalid_api_key"
                assert TOKEN not in response.text
        async with openai.AsyncOpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key=TOKEN) as client:
            assert (await client.chat.completions.create(model="tiny", messages=HELLO)).choices
        async with openai.AsyncOpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="wrong") as client:
            with pytest.raises(openai.AuthenticationError):
                await client.models.list()


async def test_any_host_only_with_a_token(session: Session) -> None:
    with pytest.raises(ValueError, match="without a token"):
        Gateway(session, hosts=None)
    listener = listen_on(TcpAddress("127.0.0.1", 0))
    port = listener.getsockname()[1]
    gateway = Gateway(session, hosts=None, token=Secret(TOKEN.encode()))
    async with (
        HttpServer(gateway.application()).serving(listener),
        httpx2.AsyncClient(base_url=f"http://127.0.0.1:{port}", trust_env=False) as http,
    ):
        headers = {"Host": "gateway.example:80", "Authorization": f"Bearer {TOKEN}"}
        assert (await http.get("/v1/models", headers=headers)).status_code == 200
        assert (await http.get("/v1/models", headers={"Host": "gateway.example:80"})).status_code == 401
        crossed = {**headers, "Origin": "http://attacker.example"}
        assert (await http.get("/v1/models", headers=crossed)).status_code == 403


@pytest.mark.parametrize(
    ("host", "port", "names"),
    [
        ("127.0.0.1", 8, {"127.0.0.1:8", "localhost:8", "[::1]:8"}),
        ("::1", 8, {"127.0.0.1:8", "localhost:8", "[::1]:8"}),
        ("localhost", 8, {"127.0.0.1:8", "localhost:8", "[::1]:8"}),
        ("127.0.0.1", 80, {f"{name}{port}" for name in ("127.0.0.1", "localhost", "[::1]") for port in ("", ":80")}),
        ("192.0.2.1", 8, {"192.0.2.1:8"}),
        ("2001:db8::1", 8, {"[2001:db8::1]:8"}),
        ("0.0.0.0", 8, None),
        ("::", 8, None),
    ],
)
def test_the_names_of_an_address(host: str, port: int, names: set[str] | None) -> None:
    assert _names_of(host, port) == names


# --- Bodies --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "kind",
    ["text/plain", "application/x-www-form-urlencoded", "multipart/form-data", "", "application/json-patch+json"],
)
async def test_a_form_of_a_web_page_is_refused(http: httpx2.AsyncClient, home: House, kind: str) -> None:
    for path in POSTS:
        response = await http.post(path, content=json.dumps(BODY), headers={"Content-Type": kind})
        assert response.status_code == 415
        assert error_of(response)["type"] == "invalid_request_error"
    assert home.hostile.requests == []


async def test_parameters_of_the_content_type_are_accepted(http: httpx2.AsyncClient) -> None:
    headers = {"Content-Type": "Application/JSON; charset=utf-8"}
    assert (await http.post(COMPLETIONS, content=json.dumps(BODY), headers=headers)).status_code == 200


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b"\xff\xfe",
        b'{"messages": [{"role": "user", "content": "\xff"}]}',
        b"[" * 100_000,
        b'{"a":' * 100_000,
        b"9" * 5000,
        b'"text"',
        b"[]",
        b"null",
        b'{"messages": NaN}',
        b'{"temperature": 1e999}',
        b'{"\\ud800": 1, "messages": []}',
        b'{"messages": [{"role": "\\ud800", "content": "x"}]}',
        b'{"messages": [{"role": "user", "content": "\\ud800"}]}',
        b'{"messages": [{"role": "user", "content": "x"}], "model": "\\udfff"}',
    ],
)
async def test_a_body_that_is_no_request(http: httpx2.AsyncClient, home: House, body: bytes) -> None:
    for path in POSTS:
        response = await http.post(path, content=body, headers={"Content-Type": "application/json"})
        assert response.status_code == 400
        assert error_of(response)["type"] == "invalid_request_error"
    assert home.hostile.requests == []


@pytest.mark.parametrize(
    "body",
    [
        b'{"messages": [{"role": "user", "content": "x"}], "temperature": 0, "temperature": 2}',
        b'{"messages": [{"role": "user", "content": "x", "content": "y"}]}',
        b'{"messages": [{"role": "user", "content": "x"}], "user": {"a": 1, "\\u0061": 1}}',
    ],
)
async def test_a_key_that_stands_twice_is_refused(http: httpx2.AsyncClient, home: House, body: bytes) -> None:
    """Which of the two counts, no two readers agree on."""
    response = await http.post(COMPLETIONS, content=body, headers={"Content-Type": "application/json"})
    assert response.status_code == 400
    assert error_of(response)["message"] == "the body is not valid JSON: a key stands twice"
    assert home.hostile.requests == []


async def test_a_body_beyond_the_bound(http: httpx2.AsyncClient, home: House) -> None:
    async def endless() -> AsyncIterator[bytes]:
        for _ in range(2 * MAX_BODY_BYTES >> 16):
            yield bytes(1 << 16)

    response = await http.post(COMPLETIONS, content=endless(), headers={"Content-Type": "application/json"})
    assert response.status_code == 413
    assert error_of(response)["type"] == "invalid_request_error"
    assert home.hostile.requests == []


async def test_text_is_unchanged_in_both_directions(http: httpx2.AsyncClient) -> None:
    text = 'é 漢字 🙂 \u2028 "quoted" \\ \x00 \r\n\r\ndata: [DONE]\n\n </script>'
    body = {"messages": [{"role": "user", "content": text}]}
    whole = (await http.post(COMPLETIONS, json=body)).json()
    assert whole["choices"][0]["message"]["content"] == text
    streamed = (await http.post(COMPLETIONS, json={**body, "stream": True})).content.decode()
    events = [event.removeprefix("data: ") for event in streamed.split("\n\n") if event]
    assert events[-1] == "[DONE]"
    deltas = [json.loads(event)["choices"][0]["delta"] for event in events[:-1]]
    assert "".join(delta.get("content", "") for delta in deltas) == text


# --- Health and defects --------------------------------------------------------------------------------------------


async def test_health_shows_the_labels(http: httpx2.AsyncClient) -> None:
    assert (await http.get("/healthz")).json() == {"status": "ok", "labels": ["EMULATED"]}


async def test_health_fails_with_the_verdict(http: httpx2.AsyncClient, home: House, session: Session) -> None:
    session.policy = replace(home.policy, model=Require((bytes(48),)))
    response = await http.get("/healthz")
    assert response.status_code == 503
    assert error_of(response)["code"] == "attestation_failed"


async def test_a_defect_has_openais_shape_too(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], http: httpx2.AsyncClient
) -> None:
    texts = ["CANARY"]

    def broken(document: object) -> None:
        raise RuntimeError(*texts)

    monkeypatch.setattr(gateway_module, "parse_chat", broken)
    response = await http.post(COMPLETIONS, json=BODY)
    assert response.status_code == 500
    assert error_of(response)["code"] == "internal"
    said = capsys.readouterr().err
    assert "RuntimeError" in said
    assert "CANARY" not in said + response.text


async def test_many_at_once(client: openai.AsyncOpenAI) -> None:
    async def ask(number: int) -> str | None:
        completion = await client.chat.completions.create(
            model="tiny", messages=[{"role": "user", "content": f"question {number}"}]
        )
        return completion.choices[0].message.content

    answers = await asyncio.gather(*(ask(number) for number in range(32)))
    assert answers == [f"question {number}" for number in range(32)]


# --- One prompt, one run ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fault", ["overloaded", "unavailable", "unknown_key"])
async def test_a_forged_fault_does_not_make_a_client_ask_again(port: int, home: House, fault: str) -> None:
    """OpenAI's clients try again after 429 and 5xx by themselves, each time as a new request: they are told not to."""
    home.hostile.forge_after = (STATUS_OF_FAULT[fault], "application/json", json.dumps({"fault": fault}).encode())
    async with openai.AsyncOpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="unused", max_retries=3) as eager:
        with pytest.raises(openai.APIStatusError) as caught:
            await eager.chat.completions.create(model=MODEL_NAME, messages=[{"role": "user", "content": "once"}])
    assert caught.value.response.headers["x-should-retry"] == "false"
    assert len(home.engine.requests) == 1


# --- Writes ----------------------------------------------------------------------------------------------------------


async def said(
    groups: list[list[bytes]], closed: list[bool], failure: Exception | None = None
) -> AsyncGenerator[bytes]:
    """Pieces, group after group; between two groups others have their turn."""
    try:
        for group in groups:
            for piece in group:
                yield piece
            for _ in range(5):
                await asyncio.sleep(0)
        if failure is not None:
            raise failure
    finally:
        closed.append(True)


async def test_what_is_there_at_the_same_time_is_one_write() -> None:
    closed: list[bool] = []
    written = [each async for each in together(said([[b"a", b"b"], [b"c"], [b"d"] * 3], closed))]
    assert written == [b"ab", b"c", b"ddd"]
    assert closed == [True]


async def test_of_much_at_once_no_piece_is_lost() -> None:
    pieces = [b"%d " % number for number in range(5 * MAX_WAITING_PIECES)]
    written = [each async for each in together(said([pieces], []))]
    assert b"".join(written) == b"".join(pieces)


async def test_what_came_before_an_error_is_written() -> None:
    pieces = together(said([[b"a"], [b"b"]], [], OSError("gone")))
    assert [await anext(pieces), await anext(pieces)] == [b"a", b"b"]
    with pytest.raises(OSError, match="gone"):
        await anext(pieces)


@pytest.mark.parametrize("count", [2, 5 * MAX_WAITING_PIECES])
async def test_whoever_leaves_ends_the_answer(count: int) -> None:
    closed: list[bool] = []
    pieces = together(said([[b"x"] * count] * 3, closed))
    await anext(pieces)
    await pieces.aclose()
    assert closed == [True]
