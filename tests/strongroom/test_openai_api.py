"""From OpenAI's JSON to the messages: what is translated, what is refused, and nothing ignored in silence."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from attestation.errors import AppraisalError, EvidenceError, StrongroomError
from fuzz import fuzz_openai
from strongroom.openai_api import (
    CHAT_PARAMETERS,
    COMPLETION_PARAMETERS,
    COMPLETION_TOKENS,
    MAX_CACHE_KEY_CHARACTERS,
    NEUTRAL,
    REASONING_TOKENS,
    UNSUPPORTED,
    WITHOUT_EFFECT,
    ApiError,
    api_error_of,
    parse_chat,
    parse_completion,
)
from strongroom.proxy_client import ClearFault, Unreachable
from strongroom.session import RequestFailed
from vsockrpc.chat import (
    MAX_BIASES,
    MAX_COMPLETION_TOKENS,
    MAX_SCHEMA_CHARACTERS,
    MAX_SEED,
    ChatMessage,
    ChatRequest,
    CompletionRequest,
    JsonFormat,
    NamedTool,
    Tool,
    ToolCall,
)
from vsockrpc.sealed import SealedError

HELLO = {"role": "user", "content": "hello"}
SAID = (ChatMessage("user", "hello"),)
SCHEMA = {"type": "object", "properties": {"z": {"type": "string"}, "a": {"type": "null"}}, "required": ["z", "a"]}
SCHEMA_TEXT = '{"type":"object","properties":{"z":{"type":"string"},"a":{"type":"null"}},"required":["z","a"]}'
LOOK = {"type": "function", "function": {"name": "look", "description": "Looks.", "parameters": SCHEMA}}
BARE = {"type": "function", "function": {"name": "wait"}}
CALLED = {"id": "call_1", "type": "function", "function": {"name": "look", "arguments": '{"z": "\\u00e9"}'}}


def function(**fields: object) -> dict[str, object]:
    return {"type": "function", "function": {"name": "look", **fields}}


def chat(**fields: Any) -> ChatRequest:
    return parse_chat({"messages": [HELLO], **fields}).request


def completion(**fields: Any) -> CompletionRequest:
    return parse_completion({"prompt": "hello", **fields}).request


def refused(document: object) -> ApiError:
    with pytest.raises(ApiError) as caught:
        parse_chat(document)
    assert caught.value.status == 400
    return caught.value


def refused_completion(**fields: object) -> ApiError:
    with pytest.raises(ApiError) as caught:
        parse_completion({"prompt": "hello", **fields})
    assert caught.value.status == 400
    return caught.value


# --- What is translated --------------------------------------------------------------------------------------------

FOR_BOTH: list[tuple[dict[str, object], dict[str, Any]]] = [
    ({"model": "m"}, {"model": "m"}),
    ({"max_tokens": 5}, {"max_tokens": 5}),
    ({"temperature": 0}, {"temperature": 0.0}),
    ({"temperature": 2}, {"temperature": 2.0}),
    ({"top_p": 0.5, "top_k": 40, "min_p": 0.1}, {"top_p": 0.5, "top_k": 40, "min_p": 0.1}),
    ({"typical_p": 0.5}, {"typical_p": 0.5}),
    ({"frequency_penalty": -2, "presence_penalty": 2}, {"frequency_penalty": -2.0, "presence_penalty": 2.0}),
    ({"repetition_penalty": 1.5}, {"repetition_penalty": 1.5}),
    ({"seed": MAX_SEED}, {"seed": MAX_SEED}),
    ({"logit_bias": {}}, {}),
    ({"logit_bias": {"0": 100, "50256": -100, "7": 0.5}}, {"logit_bias": ((0, 100.0), (50256, -100.0), (7, 0.5))}),
    ({"stop": "end"}, {"stop": ("end",)}),
    ({"stop": ["a", "b"]}, {"stop": ("a", "b")}),
    ({"stop": None, "seed": None, "model": None, "anything": None}, {}),
]


@pytest.mark.parametrize(("fields", "expected"), FOR_BOTH)
def test_parameters_of_both_endpoints(fields: dict[str, object], expected: dict[str, Any]) -> None:
    assert chat(**fields) == ChatRequest(messages=SAID, **expected)
    budget = {"max_tokens": COMPLETION_TOKENS} | expected
    assert completion(**fields) == CompletionRequest(prompt="hello", **budget)


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({}, {}),
        ({"max_completion_tokens": 5}, {"max_tokens": 5}),
        ({"max_tokens": 5, "max_completion_tokens": 5}, {"max_tokens": 5}),
        ({"logprobs": False}, {}),
        ({"logprobs": False, "top_logprobs": 0}, {}),
        ({"logprobs": True}, {"top_logprobs": 0}),
        ({"logprobs": True, "top_logprobs": 20}, {"top_logprobs": 20}),
        ({"response_format": {"type": "text"}}, {}),
        ({"response_format": {"type": "json_object"}}, {"response_format": JsonFormat()}),
        ({"response_format": {"type": "json_object"}, "stop": []}, {"response_format": JsonFormat()}),
        ({"response_format": {"type": "text"}, "stop": "."}, {"stop": (".",)}),
        (
            {"response_format": {"type": "json_object"}, "tools": [BARE], "tool_choice": "none"},
            {"response_format": JsonFormat(), "tools": (Tool("wait"),), "tool_choice": "none"},
        ),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": SCHEMA}}},
            {"response_format": JsonFormat(SCHEMA_TEXT)},
        ),
        (
            {
                "response_format": {
                    "type": "json_schema",
                    "json_schema": {"name": "x", "schema": {}, "strict": True, "description": "of x"},
                }
            },
            {"response_format": JsonFormat("{}")},
        ),
        ({"tools": []}, {}),
        ({"tools": [], "tool_choice": "none"}, {}),
        ({"tool_choice": "auto"}, {}),
        ({"tools": [LOOK, BARE]}, {"tools": (Tool("look", "Looks.", SCHEMA_TEXT), Tool("wait"))}),
        ({"tools": [BARE], "tool_choice": "none"}, {"tools": (Tool("wait"),), "tool_choice": "none"}),
        ({"tools": [BARE], "tool_choice": "required"}, {"tools": (Tool("wait"),), "tool_choice": "required"}),
        (
            {"tools": [BARE], "tool_choice": {"type": "function", "function": {"name": "wait"}}},
            {"tools": (Tool("wait"),), "tool_choice": NamedTool("wait")},
        ),
        ({"tools": [function(strict=False)]}, {"tools": (Tool("look"),)}),
        (
            {"tools": [function(strict=True)], "tool_choice": "required"},
            {"tools": (Tool("look"),), "tool_choice": "required"},
        ),
        ({"tools": [BARE], "parallel_tool_calls": False}, {"tools": (Tool("wait"),), "parallel_tool_calls": False}),
        ({"thinking_token_budget": 0}, {"reasoning_tokens": 0}),
        ({"thinking_token_budget": 77}, {"reasoning_tokens": 77}),
        *(({"reasoning_effort": effort}, {"reasoning_tokens": tokens}) for effort, tokens in REASONING_TOKENS.items()),
        ({"truncation": "disabled"}, {}),
        ({"truncation": "auto"}, {"truncation": "auto"}),
    ],
)
def test_parameters_of_chats(fields: dict[str, object], expected: dict[str, Any]) -> None:
    assert chat(**fields) == ChatRequest(messages=SAID, **expected)


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"prompt": ["hello"]}, {}),
        ({"prompt": ""}, {"prompt": ""}),
        ({"echo": True}, {"echo": True}),
        ({"logprobs": 0}, {"top_logprobs": 0}),
        ({"logprobs": 5}, {"top_logprobs": 5}),
    ],
)
def test_parameters_of_completions(fields: dict[str, object], expected: dict[str, Any]) -> None:
    wanted: dict[str, Any] = {"prompt": "hello", "max_tokens": COMPLETION_TOKENS} | expected
    assert completion(**fields) == CompletionRequest(**wanted)


@pytest.mark.parametrize(
    ("message", "expected"),
    [
        ({"role": "system", "content": "be brief"}, ChatMessage("system", "be brief")),
        ({"role": "developer", "content": "be brief"}, ChatMessage("system", "be brief")),
        ({"role": "assistant", "content": "yes", "refusal": None, "tool_calls": None}, ChatMessage("assistant", "yes")),
        ({"role": "assistant", "content": "yes", "reasoning_content": "hm"}, ChatMessage("assistant", "yes")),
        ({"role": "user", "content": ""}, ChatMessage("user", "")),
        ({"role": "user", "content": []}, ChatMessage("user", "")),
        (
            {"role": "user", "content": [{"type": "text", "text": "one "}, {"type": "text", "text": "two"}]},
            ChatMessage("user", "one two"),
        ),
        (
            {"role": "assistant", "content": None, "tool_calls": [CALLED]},
            ChatMessage("assistant", "", (ToolCall("call_1", "look", '{"z": "\\u00e9"}'),)),
        ),
        ({"role": "tool", "content": "it", "tool_call_id": "call_1"}, ChatMessage("tool", "it", (), "call_1")),
    ],
)
def test_messages(message: dict[str, object], expected: ChatMessage) -> None:
    assert chat(messages=[message]).messages == (expected,)


def test_a_tool_s_message_may_name_the_function_that_it_answers() -> None:
    calls = {"role": "assistant", "tool_calls": [CALLED]}
    answered = {"role": "tool", "content": "it", "tool_call_id": "call_1"}
    assert chat(messages=[calls, {**answered, "name": "look"}]) == chat(messages=[calls, answered])
    for messages in (
        [calls, {**answered, "name": "wait"}],
        [calls, {**answered, "name": ["look"]}],
        [calls, {**answered, "tool_call_id": "call_2", "name": "look"}],
        [calls, {**answered, "tool_call_id": ["call_1"], "name": "look"}],
        [HELLO, {**answered, "name": "look"}],
        [HELLO, {"role": "user", "name": "Ann", "content": "hi"}],
        [HELLO, {"role": "assistant", "name": "", "content": "hi"}],
        [HELLO, {"role": "assistant", "name": "Ann", "tool_calls": [{**CALLED, "id": ["x"]}]}],
    ):
        with pytest.raises(ApiError) as caught:
            chat(messages=messages)
        assert (caught.value.status, caught.value.param) == (400, "messages[1].name")


@pytest.mark.parametrize("name", sorted(WITHOUT_EFFECT))
def test_bookkeeping_is_accepted_and_stays_here(name: str) -> None:
    assert chat(**{name: "CANARY"}) == chat()
    assert completion(**{name: "CANARY"}) == completion()


@pytest.mark.parametrize(("name", "value"), NEUTRAL.items())
def test_a_parameter_that_asks_for_nothing_is_accepted(name: str, value: object) -> None:
    assert chat(**{name: value}) == chat()
    assert completion(**{name: value}) == completion()


def test_delivery() -> None:
    whole = parse_chat({"messages": [HELLO]})
    assert (whole.stream, whole.include_usage, whole.cache_key) == (False, False, None)
    options = {"include_usage": True, "include_obfuscation": False}
    wanted = {"stream": True, "stream_options": options, "prompt_cache_key": "mine"}
    for streamed in (parse_chat({"messages": [HELLO], **wanted}), parse_completion({"prompt": "x", **wanted})):
        assert (streamed.stream, streamed.include_usage, streamed.cache_key) == (True, True, "mine")


# --- What is refused -----------------------------------------------------------------------------------------------


def schema_format(**fields: object) -> dict[str, object]:
    return {"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": {}, **fields}}}


REFUSED_BY_BOTH: list[tuple[dict[str, object], str | None, str]] = [
    ({"n": 2}, "unsupported_parameter", "n"),
    ({"n": True}, "unsupported_parameter", "n"),
    ({"best_of": 2}, "unsupported_parameter", "best_of"),
    ({"suffix": "and so on"}, "unsupported_parameter", "suffix"),
    ({"prompt_cache_retention": "24h"}, "unsupported_parameter", "prompt_cache_retention"),
    ({"chat_template": "{{ messages }}"}, "unsupported_parameter", "chat_template"),
    ({"chat_template_kwargs": {"enable_thinking": False}}, "unsupported_parameter", "chat_template_kwargs"),
    ({"tempreature": 0}, "unknown_parameter", "tempreature"),
    ({"id": "x"}, "unknown_parameter", "id"),
    ({"v": 1}, "unknown_parameter", "v"),
    ({"cache_secret": "x"}, "unknown_parameter", "cache_secret"),
    ({"reasoning_tokens": 5}, "unknown_parameter", "reasoning_tokens"),
    ({"stream": "yes"}, None, "stream"),
    ({"stream": 1}, None, "stream"),
    ({"stream_options": []}, None, "stream_options"),
    ({"stream_options": {}}, None, "stream_options"),
    ({"stream_options": {"include_usage": True}}, None, "stream_options"),
    ({"stream_options": {"include_usage": True}, "stream": False}, None, "stream_options"),
    ({"stream_options": {"other": 1}}, None, "stream_options.other"),
    ({"stream_options": {"include_usage": 1}}, None, "stream_options.include_usage"),
    ({"stream_options": {"include_obfuscation": 1}}, None, "stream_options.include_obfuscation"),
    ({"prompt_cache_key": 5}, None, "prompt_cache_key"),
    ({"prompt_cache_key": "\ud800"}, None, "prompt_cache_key"),
    ({"prompt_cache_key": "x" * (MAX_CACHE_KEY_CHARACTERS + 1)}, None, "prompt_cache_key"),
    ({"max_tokens": 0}, None, "max_tokens"),
    ({"max_tokens": 1.5}, None, "max_tokens"),
    ({"max_tokens": True}, None, "max_tokens"),
    ({"max_tokens": MAX_COMPLETION_TOKENS + 1}, None, "max_tokens"),
    ({"temperature": -1}, None, "temperature"),
    ({"temperature": "hot"}, None, "temperature"),
    ({"temperature": float("nan")}, None, "temperature"),
    ({"temperature": float("inf")}, None, "temperature"),
    ({"top_p": 1.1}, None, "top_p"),
    ({"top_p": 0}, None, "top_p"),
    ({"top_k": -1}, None, "top_k"),
    ({"min_p": 2}, None, "min_p"),
    ({"typical_p": 0}, None, "typical_p"),
    ({"frequency_penalty": 2.1}, None, "frequency_penalty"),
    ({"presence_penalty": -2.1}, None, "presence_penalty"),
    ({"repetition_penalty": 0}, None, "repetition_penalty"),
    ({"seed": -1}, None, "seed"),
    ({"seed": MAX_SEED + 1}, None, "seed"),
    ({"logit_bias": []}, None, "logit_bias"),
    ({"logit_bias": {"x": 1}}, None, "logit_bias"),
    ({"logit_bias": {"-1": 1}}, None, "logit_bias"),
    ({"logit_bias": {"01": 1}}, None, "logit_bias"),
    ({"logit_bias": {"\u0663": 1}}, None, "logit_bias"),
    ({"logit_bias": {"5": 101}}, None, "logit_bias"),
    ({"logit_bias": {"5": None}}, None, "logit_bias"),
    ({"logit_bias": {"9999999999": 1}}, None, "logit_bias[0]"),
    ({"logit_bias": dict.fromkeys(map(str, range(MAX_BIASES + 1)), 1)}, None, "logit_bias"),
    ({"stop": ""}, None, "stop"),
    ({"stop": [1]}, None, "stop[0]"),
    ({"stop": ["x"] * 17}, None, "stop"),
    ({"stop": {"a": 1}}, None, "stop"),
    ({"model": 5}, None, "model"),
    ({"model": "m" * 257}, None, "model"),
]
REFUSED_CHATS: list[tuple[dict[str, object], str | None, str]] = [
    ({"prompt": "x"}, "unsupported_parameter", "prompt"),
    ({"echo": True}, "unsupported_parameter", "echo"),
    ({"functions": []}, "unsupported_parameter", "functions"),
    ({"modalities": ["audio"]}, "unsupported_parameter", "modalities"),
    ({"verbosity": "low"}, "unsupported_parameter", "verbosity"),
    ({"max_completion_tokens": 0}, None, "max_completion_tokens"),
    ({"max_tokens": 4, "max_completion_tokens": 5}, None, "max_tokens"),
    ({"logprobs": 1}, None, "logprobs"),
    ({"top_logprobs": 1}, None, "top_logprobs"),
    ({"logprobs": False, "top_logprobs": 1}, None, "top_logprobs"),
    ({"logprobs": True, "top_logprobs": 21}, None, "top_logprobs"),
    ({"response_format": "json"}, None, "response_format.type"),
    ({"response_format": {"type": "xml"}}, None, "response_format.type"),
    ({"response_format": {"type": "json_object", "schema": {}}}, None, "response_format.schema"),
    ({"response_format": {"type": "json_schema"}}, None, "response_format.json_schema"),
    ({"response_format": {"type": "json_schema", "json_schema": {}}}, None, "response_format.json_schema.name"),
    (
        {"response_format": {"type": "json_schema", "json_schema": {"name": "x"}}},
        None,
        "response_format.json_schema.schema",
    ),
    (schema_format(schema=True), None, "response_format.json_schema.schema"),
    (schema_format(schema={"const": float("inf")}), None, "response_format.json_schema.schema"),
    (schema_format(schema={"const": "x" * MAX_SCHEMA_CHARACTERS}), None, "response_format.json_schema.schema"),
    (schema_format(schema={"const": "\ud800"}), None, "response_format.json_schema.schema"),
    (schema_format(name=5), None, "response_format.json_schema.name"),
    (schema_format(strict="yes"), None, "response_format.json_schema.strict"),
    (schema_format(other=1), None, "response_format.json_schema.other"),
    ({"tools": {}}, None, "tools"),
    ({"tools": [BARE] * 129}, None, "tools"),
    ({"tools": [BARE, BARE]}, None, "tools"),
    ({"tools": ["look"]}, None, "tools[0]"),
    ({"tools": [{"type": "function"}]}, None, "tools[0].function"),
    ({"tools": [{"type": "custom", "custom": {"name": "x"}}]}, None, "tools[0].custom"),
    ({"tools": [{"type": "web_search", "function": {"name": "x"}}]}, None, "tools[0].type"),
    ({"tools": [function(name="l o o k")]}, None, "tools[0].function.name"),
    ({"tools": [function(name="")]}, None, "tools[0].function.name"),
    ({"tools": [function(description=5)]}, None, "tools[0].function.description"),
    ({"tools": [function(parameters=[])]}, None, "tools[0].function.parameters"),
    ({"tools": [function(strict=1)]}, None, "tools[0].function.strict"),
    ({"tools": [BARE, function(strict=True)]}, None, "tools[1].function.strict"),
    ({"tools": [function(strict=True)], "tool_choice": "auto"}, None, "tools[0].function.strict"),
    ({"tools": [function(other=1)]}, None, "tools[0].function.other"),
    ({"tool_choice": "required"}, None, "tool_choice"),
    ({"tool_choice": "some"}, None, "tool_choice"),
    ({"tool_choice": {"type": "function", "function": {"name": "look"}}}, None, "tool_choice"),
    (
        {"tools": [BARE], "tool_choice": {"type": "function", "function": {"name": "look"}}},
        None,
        "tool_choice.function.name",
    ),
    (
        {"tools": [BARE], "tool_choice": {"type": "allowed_tools", "allowed_tools": {}}},
        None,
        "tool_choice.allowed_tools",
    ),
    ({"parallel_tool_calls": True}, None, "parallel_tool_calls"),
    ({"tools": [BARE], "parallel_tool_calls": 1}, None, "parallel_tool_calls"),
    ({"tools": [BARE], "response_format": {"type": "json_object"}}, None, "response_format"),
    ({"tools": [BARE], "tool_choice": "required", **schema_format()}, None, "response_format"),
    ({"stop": "}", **schema_format()}, None, "stop"),
    ({"reasoning_effort": "xhigh"}, None, "reasoning_effort"),
    ({"reasoning_effort": 5}, None, "reasoning_effort"),
    ({"thinking_token_budget": -1}, None, "thinking_token_budget"),
    ({"thinking_token_budget": MAX_COMPLETION_TOKENS + 1}, None, "thinking_token_budget"),
    ({"reasoning_effort": "low", "thinking_token_budget": 1024}, None, "reasoning_effort"),
    ({"truncation": "middle"}, None, "truncation"),
    ({"messages": []}, None, "messages"),
    ({"messages": "hello"}, None, "messages"),
    ({"messages": [HELLO] * 1025}, None, "messages"),
    ({"messages": ["hello"]}, None, "messages[0]"),
    ({"messages": [HELLO, {"role": "critic", "content": "x"}]}, None, "messages[1].role"),
    ({"messages": [{"role": ["user"], "content": "x"}]}, None, "messages[0].role"),
    ({"messages": [{"content": "x"}]}, None, "messages[0].role"),
    ({"messages": [{"role": "user"}]}, None, "messages[0].content"),
    ({"messages": [{"role": "user", "content": None}]}, None, "messages[0].content"),
    ({"messages": [{"role": "user", "content": 5}]}, None, "messages[0].content"),
    ({"messages": [{"role": "user", "content": "\ud800"}]}, None, "messages[0].content"),
    ({"messages": [{**HELLO, "function_call": {}}]}, None, "messages[0].function_call"),
    ({"messages": [{"role": "assistant", "content": "x", "refusal": "no"}]}, None, "messages[0].refusal"),
    ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, None, "messages[0].content[0]"),
    ({"messages": [{"role": "user", "content": [{"type": "text", "text": 5}]}]}, None, "messages[0].content[0]"),
    ({"messages": [{"role": "user", "content": ["text"]}]}, None, "messages[0].content[0]"),
    ({"messages": [{"role": "tool", "content": "x"}]}, None, "messages[0].tool_call_id"),
    ({"messages": [{**HELLO, "tool_call_id": "call_1"}]}, None, "messages[0].tool_call_id"),
    ({"messages": [{**HELLO, "tool_calls": [CALLED]}]}, None, "messages[0].tool_calls"),
    ({"messages": [{"role": "assistant", "tool_calls": []}]}, None, "messages[0].content"),
    ({"messages": [{"role": "assistant", "tool_calls": [1]}]}, None, "messages[0].tool_calls[0]"),
    (
        {"messages": [{"role": "assistant", "tool_calls": [{**CALLED, "id": None}]}]},
        None,
        "messages[0].tool_calls[0].id",
    ),
    ({"messages": [{"role": "assistant", "tool_calls": [{**CALLED, "id": 5}]}]}, None, "messages[0].tool_calls[0].id"),
    (
        {"messages": [{"role": "assistant", "tool_calls": [{"id": "1", **function(arguments={})}]}]},
        None,
        "messages[0].tool_calls[0].function.arguments",
    ),
    (
        {"messages": [{"role": "assistant", "tool_calls": [{"id": "1", **function(name="", arguments="")}]}]},
        None,
        "messages[0].tool_calls[0].function.name",
    ),
]


@pytest.mark.parametrize(("fields", "code", "param"), [*REFUSED_BY_BOTH, *REFUSED_CHATS])
def test_refusals_name_the_parameter(fields: dict[str, object], code: str | None, param: str) -> None:
    error = refused({"messages": [HELLO], **fields})
    assert (error.openai_code, error.param) == (code, param)
    assert error.body()["error"] == {
        "message": error.message,
        "type": "invalid_request_error",
        "param": param,
        "code": code,
    }


@pytest.mark.parametrize(
    ("fields", "code", "param"),
    [
        *REFUSED_BY_BOTH,
        ({"messages": [HELLO]}, "unsupported_parameter", "messages"),
        ({"tools": [BARE]}, "unsupported_parameter", "tools"),
        ({"max_completion_tokens": 5}, "unsupported_parameter", "max_completion_tokens"),
        ({"truncation": "auto"}, "unsupported_parameter", "truncation"),
        ({"prompt": None}, None, "prompt"),
        ({"prompt": 5}, None, "prompt"),
        ({"prompt": []}, None, "prompt"),
        ({"prompt": ["one", "two"]}, None, "prompt"),
        ({"prompt": [1]}, None, "prompt"),
        ({"prompt": [[1, 2]]}, None, "prompt"),
        ({"prompt": "\ud800"}, None, "prompt"),
        ({"echo": 1}, None, "echo"),
        ({"logprobs": True}, None, "logprobs"),
        ({"logprobs": 21}, None, "logprobs"),
        ({"logprobs": 0, "echo": True}, None, "logprobs"),
    ],
)
def test_refusals_of_completions(fields: dict[str, object], code: str | None, param: str) -> None:
    error = refused_completion(**fields)
    assert (error.openai_code, error.param) == (code, param)


@pytest.mark.parametrize("document", [None, [], "text", 5, True, [{"messages": [HELLO]}]])
def test_a_body_is_a_map(document: object) -> None:
    assert refused(document).param is None


def test_messages_are_required() -> None:
    assert refused({}).param == "messages"


def test_a_schema_that_is_too_deep_is_refused() -> None:
    schema: dict[str, object] = {}
    for _ in range(100_000):
        schema = {"not": schema}
    assert refused({"messages": [HELLO], **schema_format(schema=schema)}).param == "response_format.json_schema.schema"
    while schema:  # without this its end is a recursion of the interpreter's own
        [schema] = schema.values()  # type: ignore[assignment]


def test_an_error_repeats_little_of_what_was_sent() -> None:
    for document in (
        {"messages": [HELLO], "x" * 100_000: 1},
        {"messages": [{"role": "x" * 100_000, "content": "x"}]},
        {"messages": [{**HELLO, "x" * 100_000: 1}]},
        {"messages": [HELLO], "max_tokens": 10**4000},
        {"messages": [HELLO], "reasoning_effort": "x" * 100_000},
        {"messages": [HELLO], "logit_bias": {"x" * 100_000: 1}},
        {"messages": [HELLO], "tools": [{"type": "x" * 100_000, "function": {}}]},
        {"messages": [HELLO], "response_format": {"type": "text", "x" * 100_000: 1}},
    ):
        assert len(json.dumps(refused(document).body())) < 1000


def test_the_lists_of_parameters_do_not_contradict_each_other() -> None:
    served = CHAT_PARAMETERS | COMPLETION_PARAMETERS
    assert not served & UNSUPPORTED
    assert not served & WITHOUT_EFFECT
    assert not UNSUPPORTED & WITHOUT_EFFECT


# --- Properties ----------------------------------------------------------------------------------------------------

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda children: st.lists(children, max_size=4) | st.dictionaries(st.text(), children, max_size=4),
    max_leaves=12,
)
NAMES = st.sampled_from(sorted(CHAT_PARAMETERS | COMPLETION_PARAMETERS | UNSUPPORTED | WITHOUT_EFFECT))
MESSAGES = st.lists(
    st.dictionaries(
        st.sampled_from(["role", "content", "name", "refusal", "tool_calls", "tool_call_id", "reasoning_content"]),
        st.sampled_from(["system", "developer", "user", "assistant", "tool"]) | JSON,
    ),
    max_size=3,
)
DOCUMENTS = st.dictionaries(NAMES | st.text(), JSON, max_size=5).flatmap(
    lambda fields: MESSAGES.map(lambda messages: {**fields, "messages": messages})
)


@given(JSON | DOCUMENTS)
def test_any_json_is_translated_or_refused(document: object) -> None:
    fuzz_openai.one_input(json.dumps(document).encode())


TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=100)
NAME = st.from_regex(r"[A-Za-z0-9_-]{1,64}", fullmatch=True)
BUDGET = st.integers(1, MAX_COMPLETION_TOKENS)
SCHEMAS = st.dictionaries(TEXT, st.booleans() | st.integers() | TEXT | st.lists(TEXT, max_size=3), max_size=4)
GENERATION: dict[str, st.SearchStrategy[Any]] = {
    "model": TEXT,
    "temperature": st.just(0.0) | st.floats(0.001, 2),
    "top_p": st.floats(0, 1, exclude_min=True),
    "top_k": st.integers(0, 1000),
    "min_p": st.floats(0, 1),
    "typical_p": st.floats(0, 1, exclude_min=True),
    "frequency_penalty": st.floats(-2, 2),
    "presence_penalty": st.floats(-2, 2),
    "repetition_penalty": st.floats(0.01, 4),
    "seed": st.integers(0, MAX_SEED),
    "logit_bias": st.dictionaries(st.integers(0, 2**31 - 1).map(str), st.floats(-100, 100), max_size=5),
    "stop": st.lists(TEXT.filter(bool), max_size=16),
    "max_tokens": BUDGET,
}
TURNS = st.one_of(
    st.builds(lambda role, text: {"role": role, "content": text}, st.sampled_from(["system", "user"]), TEXT),
    st.builds(
        lambda text, calls: {"role": "assistant", "content": text, "tool_calls": calls},
        TEXT,
        st.lists(
            st.builds(
                lambda id, name, arguments: {
                    "id": id,
                    "type": "function",
                    "function": {"name": name, "arguments": json.dumps(arguments)},
                },
                NAME,
                NAME,
                SCHEMAS,
            ),
            max_size=2,
        ),
    ),
    st.builds(lambda text, id: {"role": "tool", "content": text, "tool_call_id": id}, TEXT, NAME),
)
FUNCTIONS = st.fixed_dictionaries({"name": NAME, "description": TEXT, "parameters": SCHEMAS})
TOOLS = st.lists(FUNCTIONS, max_size=3, unique_by=lambda function: str(function["name"])).map(
    lambda functions: [{"type": "function", "function": function} for function in functions]
)
CHATS = st.fixed_dictionaries(
    {"messages": st.lists(TURNS, min_size=1, max_size=4)},
    optional=GENERATION
    | {
        "tools": TOOLS,
        "thinking_token_budget": BUDGET,
        "truncation": st.sampled_from(["auto", "disabled"]),
        "logprobs": st.booleans(),
    },
)
COMPLETIONS = st.fixed_dictionaries({"prompt": TEXT}, optional=GENERATION | {"echo": st.booleans()})


@given(CHATS)
def test_every_chat_within_the_bounds_arrives_as_it_was_meant(document: dict[str, Any]) -> None:
    request = parse_chat(document).request
    assert ChatRequest.decode(request.encode()) == request
    _require_generation(request, document)
    assert [turn.content for turn in request.messages] == [turn["content"] for turn in document["messages"]]
    for turn, sent in zip(request.messages, document["messages"], strict=True):
        assert turn.tool_call_id == sent.get("tool_call_id")
        assert [(call.id, call.name, call.arguments) for call in turn.tool_calls] == [
            (call["id"], call["function"]["name"], call["function"]["arguments"]) for call in sent.get("tool_calls", [])
        ]
    for tool, sent in zip(request.tools, document.get("tools", []), strict=True):
        assert (tool.name, tool.description) == (sent["function"]["name"], sent["function"]["description"])
        assert json.loads(tool.parameters or "") == sent["function"]["parameters"]
        assert [*json.loads(tool.parameters or "")] == [*sent["function"]["parameters"]]
    assert request.reasoning_tokens == document.get("thinking_token_budget")
    assert request.truncation == document.get("truncation", "disabled")
    assert request.top_logprobs == (0 if document.get("logprobs") else None)
    assert request.max_tokens == document.get("max_tokens")


@given(COMPLETIONS)
def test_every_completion_within_the_bounds_arrives_as_it_was_meant(document: dict[str, Any]) -> None:
    request = parse_completion(document).request
    assert CompletionRequest.decode(request.encode()) == request
    _require_generation(request, document)
    assert (request.prompt, request.echo) == (document["prompt"], document.get("echo", False))
    assert request.max_tokens == document.get("max_tokens", COMPLETION_TOKENS)


def _require_generation(request: ChatRequest | CompletionRequest, document: dict[str, Any]) -> None:
    for name in GENERATION.keys() - {"logit_bias", "stop", "max_tokens"}:
        if name in document:
            assert getattr(request, name) == document[name]
    assert {str(token): bias for token, bias in request.logit_bias} == document.get("logit_bias", {})
    assert list(request.stop) == document.get("stop", [])


# --- Errors --------------------------------------------------------------------------------------------------------


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
        (RequestFailed("answer_exceeded", "x"), 400, None, "invalid_request_error"),
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


def test_a_prompt_that_is_too_long_is_the_parameters_that_holds_it() -> None:
    error = RequestFailed("context_exceeded", "too long", expected="<= 10", got="11")
    assert api_error_of(error).param == "messages"
    assert api_error_of(error, prompt="prompt").param == "prompt"


@pytest.mark.parametrize("name", ["max_tokens", "max_completion_tokens"])
def test_an_answer_that_may_not_be_so_long_is_the_parameters_as_it_was_sent(name: str) -> None:
    call = parse_chat({"messages": [HELLO], name: 513})
    error = RequestFailed("answer_exceeded", "too long", expected="<= 512 tokens", got="513 tokens")
    assert api_error_of(error, limit=call.limit).param == name
    assert parse_chat({"messages": [HELLO]}).limit == "max_tokens"


@pytest.mark.parametrize(
    ("error", "seconds"),
    [
        (RequestFailed("overloaded", "x", retry_seconds=7), 7),
        (RequestFailed("overloaded", "x"), 1),
        (RequestFailed("engine_failed", "x", retry_seconds=7), None),
        (ClearFault("overloaded", "x"), None),
        (Unreachable("unreachable", "x"), None),
    ],
)
def test_only_the_enclave_says_when_to_ask_again(error: StrongroomError, seconds: int | None) -> None:
    assert api_error_of(error).retry_seconds == seconds
