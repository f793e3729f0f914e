"""Between OpenAI's JSON and the messages: what is translated, what is refused, and nothing ignored in silence."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from attestation.errors import AppraisalError, EvidenceError, StrongroomError
from fuzz import fuzz_openai
from strongroom.openai_api import (
    NEUTRAL,
    TRANSLATED,
    UNSUPPORTED,
    WITHOUT_EFFECT,
    ApiError,
    CompletionShape,
    api_error_of,
    parse_completion_request,
)
from strongroom.proxy_client import ClearFault, Unreachable
from strongroom.session import RequestFailed
from vsockrpc.chat import MAX_SEED, ChatMessage, ChatRequest
from vsockrpc.messages import Done, Usage
from vsockrpc.sealed import SealedError

HELLO = {"role": "user", "content": "hello"}


def parse(**fields: Any) -> ChatRequest:
    return parse_completion_request({"messages": [HELLO], **fields}).chat


def refused(document: object) -> ApiError:
    with pytest.raises(ApiError) as caught:
        parse_completion_request(document)
    assert caught.value.status == 400
    return caught.value


# --- What is translated --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({}, {}),
        ({"model": "m"}, {"model": "m"}),
        ({"max_tokens": 5}, {"max_tokens": 5}),
        ({"max_completion_tokens": 5}, {"max_tokens": 5}),
        ({"max_tokens": 5, "max_completion_tokens": 5}, {"max_tokens": 5}),
        ({"temperature": 0}, {"temperature": 0.0}),
        ({"temperature": 2}, {"temperature": 2.0}),
        ({"top_p": 0.5, "top_k": 40, "min_p": 0.1}, {"top_p": 0.5, "top_k": 40, "min_p": 0.1}),
        ({"seed": 2**32 - 2}, {"seed": 2**32 - 2}),
        ({"stop": "end"}, {"stop": ("end",)}),
        ({"stop": ["a", "b"]}, {"stop": ("a", "b")}),
        ({"stop": None, "seed": None, "model": None, "anything": None}, {}),
    ],
)
def test_parameters(fields: dict[str, object], expected: dict[str, Any]) -> None:
    assert parse(**fields) == ChatRequest((ChatMessage("user", "hello"),), **expected)


@pytest.mark.parametrize(
    ("message", "expected"),
    [
        ({"role": "system", "content": "be brief"}, ChatMessage("system", "be brief")),
        ({"role": "developer", "content": "be brief"}, ChatMessage("system", "be brief")),
        ({"role": "assistant", "content": "yes", "refusal": None, "tool_calls": None}, ChatMessage("assistant", "yes")),
        ({"role": "user", "name": "Ann", "content": "hi"}, ChatMessage("user", "hi")),
        ({"role": "user", "content": ""}, ChatMessage("user", "")),
        ({"role": "user", "content": []}, ChatMessage("user", "")),
        (
            {"role": "user", "content": [{"type": "text", "text": "one "}, {"type": "text", "text": "two"}]},
            ChatMessage("user", "one two"),
        ),
    ],
)
def test_messages(message: dict[str, object], expected: ChatMessage) -> None:
    assert parse(messages=[message]).messages == (expected,)


@pytest.mark.parametrize("name", sorted(WITHOUT_EFFECT))
def test_bookkeeping_is_accepted_and_stays_here(name: str) -> None:
    assert parse(**{name: "CANARY"}) == parse()


@pytest.mark.parametrize(("name", "value"), NEUTRAL.items())
def test_a_parameter_that_asks_for_nothing_is_accepted(name: str, value: object) -> None:
    assert parse(**{name: value}) == parse()


def test_delivery() -> None:
    whole = parse_completion_request({"messages": [HELLO]})
    assert (whole.stream, whole.include_usage) == (False, False)
    streamed = parse_completion_request(
        {"messages": [HELLO], "stream": True, "stream_options": {"include_usage": True, "include_obfuscation": False}}
    )
    assert (streamed.stream, streamed.include_usage) == (True, True)


# --- What is refused -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "code", "param"),
    [
        ({"tools": [{"type": "function"}]}, "unsupported_parameter", "tools"),
        ({"tool_choice": "auto"}, "unsupported_parameter", "tool_choice"),
        ({"n": 2}, "unsupported_parameter", "n"),
        ({"logprobs": True}, "unsupported_parameter", "logprobs"),
        ({"frequency_penalty": 0.5}, "unsupported_parameter", "frequency_penalty"),
        ({"response_format": {"type": "json_object"}}, "unsupported_parameter", "response_format"),
        ({"reasoning_effort": "high"}, "unsupported_parameter", "reasoning_effort"),
        ({"tempreature": 0}, "unknown_parameter", "tempreature"),
        ({"id": "x"}, "unknown_parameter", "id"),
        ({"v": 1}, "unknown_parameter", "v"),
        ({"stream": "yes"}, None, "stream"),
        ({"stream": 1}, None, "stream"),
        ({"stream_options": []}, None, "stream_options"),
        ({"stream_options": {"other": 1}}, None, "stream_options"),
        ({"stream_options": {"include_usage": 1}}, None, "stream_options.include_usage"),
        ({"max_tokens": 0}, None, "max_tokens"),
        ({"max_tokens": 1.5}, None, "max_tokens"),
        ({"max_tokens": True}, None, "max_tokens"),
        ({"max_tokens": 1 << 40}, None, "max_tokens"),
        ({"max_completion_tokens": 0}, None, "max_completion_tokens"),
        ({"max_tokens": 4, "max_completion_tokens": 5}, None, "max_tokens"),
        ({"temperature": -1}, None, "temperature"),
        ({"temperature": "hot"}, None, "temperature"),
        ({"temperature": float("nan")}, None, "temperature"),
        ({"temperature": float("inf")}, None, "temperature"),
        ({"top_p": 1.1}, None, "top_p"),
        ({"top_k": -1}, None, "top_k"),
        ({"seed": -1}, None, "seed"),
        ({"seed": MAX_SEED + 1}, None, "seed"),
        ({"stop": ""}, None, "stop"),
        ({"stop": [1]}, None, "stop[0]"),
        ({"stop": ["x"] * 17}, None, "stop"),
        ({"stop": {"a": 1}}, None, "stop"),
        ({"model": 5}, None, "model"),
        ({"model": "m" * 257}, None, "model"),
        ({"messages": []}, None, "messages"),
        ({"messages": "hello"}, None, "messages"),
        ({"messages": [HELLO] * 1025}, None, "messages"),
        ({"messages": ["hello"]}, None, "messages[0]"),
        ({"messages": [HELLO, {"role": "tool", "content": "x"}]}, None, "messages[1].tool_call_id"),
        ({"messages": [{"role": ["user"], "content": "x"}]}, None, "messages[0].role"),
        ({"messages": [{"role": "user"}]}, None, "content"),
        ({"messages": [{"role": "user", "content": None}]}, None, "content"),
        ({"messages": [{"role": "user", "content": 5}]}, None, "messages[0].content"),
        ({"messages": [{"role": "user", "content": "\ud800"}]}, None, "messages[0].content"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, None, "messages[0].content"),
        ({"messages": [{"role": "user", "content": [{"type": "text", "text": 5}]}]}, None, "messages[0].content"),
        ({"messages": [{"role": "user", "content": ["text"]}]}, None, "messages[0].content"),
        ({"messages": [{"role": "assistant", "content": "x", "tool_calls": [1]}]}, None, "messages[0].tool_calls[0]"),
    ],
)
def test_refusals_name_the_parameter(fields: dict[str, object], code: str | None, param: str) -> None:
    error = refused({"messages": [HELLO], **fields})
    assert (error.openai_code, error.param) == (code, param)
    assert error.body()["error"] == {
        "message": error.message,
        "type": "invalid_request_error",
        "param": param,
        "code": code,
    }


@pytest.mark.parametrize("document", [None, [], "text", 5, True, [{"messages": [HELLO]}]])
def test_a_body_is_a_map(document: object) -> None:
    assert refused(document).param is None


def test_messages_are_required() -> None:
    assert refused({}).param == "messages"


def test_an_error_repeats_little_of_what_was_sent() -> None:
    for document in (
        {"messages": [HELLO], "x" * 100_000: 1},
        {"messages": [{"role": "x" * 100_000, "content": "x"}]},
        {"messages": [{**HELLO, "x" * 100_000: 1}]},
        {"messages": [HELLO], "max_tokens": 10**4000},
    ):
        assert len(json.dumps(refused(document).body())) < 1000


def test_the_lists_of_parameters_do_not_contradict_each_other() -> None:
    assert not TRANSLATED & UNSUPPORTED
    assert not TRANSLATED & WITHOUT_EFFECT
    assert not UNSUPPORTED & WITHOUT_EFFECT


# --- Properties ----------------------------------------------------------------------------------------------------

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda children: st.lists(children, max_size=4) | st.dictionaries(st.text(), children, max_size=4),
    max_leaves=12,
)
NAMES = st.sampled_from(sorted(TRANSLATED | UNSUPPORTED | WITHOUT_EFFECT | {"stream", "stream_options"}))
MESSAGES = st.lists(
    st.dictionaries(
        st.sampled_from(["role", "content", "name", "refusal"]),
        st.sampled_from(["system", "developer", "user", "assistant"]) | JSON,
    ),
    max_size=3,
)
DOCUMENTS = st.dictionaries(NAMES | st.text(), JSON, max_size=5).flatmap(
    lambda fields: MESSAGES.map(lambda messages: {**fields, "messages": messages})
)


@given(JSON | DOCUMENTS)
def test_any_json_is_translated_or_refused(document: object) -> None:
    fuzz_openai.one_input(json.dumps(document).encode())
    try:
        completion = parse_completion_request(document)
    except ApiError:
        return
    assert ChatRequest.decode(completion.chat.encode()) == completion.chat


@given(
    st.builds(
        ChatRequest,
        messages=st.lists(
            st.builds(
                ChatMessage,
                role=st.sampled_from(["system", "user", "assistant"]),
                content=st.text(st.characters(exclude_categories=["Cs"])),
            ),
            min_size=1,
            max_size=4,
        ).map(tuple),
        model=st.none() | st.text(st.characters(exclude_categories=["Cs"]), max_size=256),
        max_tokens=st.none() | st.integers(1, 1 << 20),
        temperature=st.floats(0, 2),
        top_p=st.floats(0, 1, exclude_min=True),
        top_k=st.integers(0, 1000),
        min_p=st.floats(0, 1),
        seed=st.none() | st.integers(0, 2**32 - 2),
        stop=st.lists(st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=256), max_size=16).map(
            tuple
        ),
    )
)
def test_what_a_message_can_say_its_json_can_say(chat: ChatRequest) -> None:
    document = json.loads(json.dumps(chat.encode()))
    assert parse_completion_request(document).chat == chat


# --- Errors and answers --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("error", "status", "code", "kind"),
    [
        (EvidenceError("wrong_nonce", "x"), 503, "attestation_failed", "server_error"),
        (AppraisalError("wrong_image", "x"), 503, "attestation_failed", "server_error"),
        (SealedError("truncated", "x"), 502, "truncated", "server_error"),
        (SealedError("overloaded", "x"), 502, "overloaded", "server_error"),
        (Unreachable("unreachable", "x"), 503, "unreachable", "server_error"),
        (ClearFault("overloaded", "x"), 429, "overloaded", "rate_limit_error"),
        (ClearFault("unavailable", "x"), 503, "unavailable", "server_error"),
        (ClearFault("unknown_key", "x"), 503, "unknown_key", "server_error"),
        (RequestFailed("overloaded", "x"), 429, "overloaded", "rate_limit_error"),
        (RequestFailed("context_exceeded", "x"), 400, "context_length_exceeded", "invalid_request_error"),
        (RequestFailed("unknown_model", "x"), 404, "model_not_found", "invalid_request_error"),
        (RequestFailed("invalid_request", "x"), 400, None, "invalid_request_error"),
        (RequestFailed("engine_failed", "x"), 503, "engine_failed", "server_error"),
        (RequestFailed("duplicate_request", "x"), 503, "duplicate_request", "server_error"),
        (ApiError(418, "teapot", "x"), 418, "teapot", "invalid_request_error"),
    ],
)
def test_errors_in_openais_shape(error: StrongroomError, status: int, code: str | None, kind: str) -> None:
    translated = api_error_of(error)
    assert (translated.status, translated.openai_code, translated.kind) == (status, code, kind)


def test_what_was_expected_and_got_is_in_the_text() -> None:
    error = api_error_of(RequestFailed("context_exceeded", "too long", expected="<= 10", got="11"))
    assert error.message == "too long: expected <= 10, got 11"


def test_the_shape_of_an_answer() -> None:
    shape = CompletionShape("chatcmpl-1", 1700000000, "m")
    usage = {"prompt_tokens": 3, "completion_tokens": 4, "total_tokens": 7}
    done = Done("length", Usage(3, 4))
    assert shape.whole("text", done) == {
        "id": "chatcmpl-1",
        "object": "chat.completion",
        "created": 1700000000,
        "model": "m",
        "choices": [
            {
                "index": 0,
                "message": {"role": "assistant", "content": "text", "refusal": None},
                "finish_reason": "length",
                "logprobs": None,
            }
        ],
        "usage": usage,
    }
    assert shape.chunk({"content": "x"})["choices"] == [
        {"index": 0, "delta": {"content": "x"}, "finish_reason": None, "logprobs": None}
    ]
    assert shape.usage_chunk(done) | {"choices": [], "usage": usage} == shape.usage_chunk(done)
