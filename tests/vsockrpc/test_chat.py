"""What a client can ask for: it survives the way there and back, and nothing outside its bounds passes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from typing import Any

import pytest
from hypothesis import given

from tests.wire import CHATS, COMPLETIONS, OPTIONS
from vsockrpc import chat
from vsockrpc.chat import ChatMessage, ChatRequest, CompletionRequest, Generation, JsonFormat, NamedTool, Tool, ToolCall
from vsockrpc.fields import MessageError
from vsockrpc.messages import MessageReader, encode_message

SECRET = bytes(range(32))
CHAT: dict[str, object] = {"messages": [{"role": "user", "content": "hi"}]}
COMPLETION: dict[str, object] = {"prompt": "Once"}
KINDS: dict[type[ChatRequest | CompletionRequest], dict[str, object]] = {
    ChatRequest: CHAT,
    CompletionRequest: COMPLETION,
}
"""What each kind needs at least."""


def carried(body: Mapping[str, object]) -> dict[str, object]:
    """What arrives of it on the other side."""
    [message] = MessageReader().feed(encode_message(body))
    return message


def refused(change: Mapping[str, object], base: Mapping[str, object] = CHAT) -> MessageError:
    kind = CompletionRequest if "prompt" in base else ChatRequest
    with pytest.raises(MessageError) as caught:
        kind.decode({**base, **change})
    assert caught.value.code == "invalid_request"
    return caught.value


def frozen(value: object) -> object:
    """Lists as the tuples that they become."""
    return tuple(map(frozen, value)) if isinstance(value, list) else value


def chat_of(**change: object) -> ChatRequest:
    return ChatRequest.decode({**CHAT, **change})


# --- There and back --------------------------------------------------------------------------------------------------


@given(CHATS)
def test_a_conversation_survives(request: ChatRequest) -> None:
    assert ChatRequest.decode(carried(request.encode())) == request


@given(COMPLETIONS)
def test_a_prompt_survives(request: CompletionRequest) -> None:
    assert CompletionRequest.decode(carried(request.encode())) == request


def test_every_option_is_generated_above() -> None:
    assert OPTIONS.keys() == {field.name for field in fields(Generation)}


def test_what_nobody_said_is_not_sent() -> None:
    assert ChatRequest((ChatMessage("user", "hi"),)).encode() == CHAT
    assert CompletionRequest(prompt="Once").encode() == {**COMPLETION, "echo": False}


@pytest.mark.parametrize("kind", KINDS)
def test_without_options_everything_is_as_it_is_by_itself(kind: type[ChatRequest | CompletionRequest]) -> None:
    decoded = kind.decode(KINDS[kind])
    assert {field.name: getattr(decoded, field.name) for field in fields(Generation)} == {
        field.name: field.default for field in fields(Generation)
    }


def test_a_whole_conversation_with_tools() -> None:
    request = ChatRequest(
        (
            ChatMessage("system", "Be brief."),
            ChatMessage("user", "Weather in Köln?"),
            ChatMessage("assistant", "", (ToolCall("call_1", "weather", '{"city": "Köln"}'),)),
            ChatMessage("tool", "Rain.", tool_call_id="call_1"),
        ),
        tools=(Tool("weather", "Tells it.", '{"type": "object"}'), Tool("time")),
        tool_choice=NamedTool("time"),
        parallel_tool_calls=False,
        reasoning_tokens=0,
        truncation="auto",
    )
    assert request.encode() == {
        "messages": [
            {"role": "system", "content": "Be brief."},
            {"role": "user", "content": "Weather in Köln?"},
            {
                "role": "assistant",
                "content": "",
                "tool_calls": [{"id": "call_1", "name": "weather", "arguments": '{"city": "Köln"}'}],
            },
            {"role": "tool", "content": "Rain.", "tool_call_id": "call_1"},
        ],
        "tools": [
            {"name": "weather", "description": "Tells it.", "parameters": '{"type": "object"}'},
            {"name": "time", "description": ""},
        ],
        "tool_choice": {"name": "time"},
        "parallel_tool_calls": False,
        "reasoning_tokens": 0,
        "truncation": "auto",
    }
    assert ChatRequest.decode(carried(request.encode())) == request


# --- Bounds of every option ------------------------------------------------------------------------------------------

TINY = 5e-324
BOUNDS: dict[str, tuple[list[object], list[object]]] = {
    "model": (["", "m" * 256], ["m" * 257, 5, b"m", "\ud800"]),
    "max_tokens": ([1, 1 << 20], [0, (1 << 20) + 1, 1.0, True, "1"]),
    "temperature": (
        [0, 0.0, 0.001, 2, 2.0],
        [-TINY, TINY, 1e-40, 0.00099, 2.0000001, float("nan"), float("inf"), True, "1", 10**400],
    ),
    "top_p": ([TINY, 1, 1.0], [0, 0.0, -TINY, 1.0000001, float("nan"), True]),
    "top_k": ([0, 1000], [-1, 1001, 1.0, True]),
    "min_p": ([0, 1.0], [-TINY, 1.0000001, float("nan"), True]),
    "typical_p": ([TINY, 1.0], [0, -0.1, 1.0000001, float("nan"), True]),
    "frequency_penalty": ([-2, 2.0], [-2.0000001, 2.0000001, float("nan"), True]),
    "presence_penalty": ([-2, 2.0], [-2.0000001, 2.0000001, float("nan"), True]),
    "repetition_penalty": ([0.01, 4.0], [0, -1, TINY, 1e-40, 0.0099, 4.0000001, float("nan"), True]),
    "seed": ([0, 2**32 - 2], [-1, 2**32 - 1, 1.0, True]),
    "logit_bias": (
        [[], [[0, -100]], [[2**31 - 1, 100.0]], [[token, 1] for token in range(300)]],
        [{}, "x", {"0": 1}, [[token, 1] for token in range(301)]],
    ),
    "stop": ([[], ["x" * 256], ["x"] * 16], ["x", ["x"] * 17, [""]]),
    "top_logprobs": ([0, 20], [-1, 21, 1.0, True]),
    "cache_secret": ([SECRET], [SECRET[:-1], SECRET + b"\0", "x" * 32, b""]),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", OPTIONS)
def test_both_bounds_are_inside_and_what_is_beyond_is_not(
    kind: type[ChatRequest | CompletionRequest], name: str
) -> None:
    inside, outside = BOUNDS[name]
    base = KINDS[kind]
    for value in inside:
        decoded = kind.decode({**base, name: value})
        assert kind.decode(carried(decoded.encode())) == decoded
        assert getattr(decoded, name) == frozen(value)
    for value in outside:
        error = refused({name: value}, base)
        assert error.param == name, value


@pytest.mark.parametrize(
    ("change", "param"),
    [
        ({"stop": ["x", "x" * 257]}, "stop[1]"),
        ({"stop": [1]}, "stop[0]"),
        ({"stop": ["\ud800"]}, "stop[0]"),
        ({"logit_bias": [[1, 1], [2]]}, "logit_bias[1]"),
        ({"logit_bias": [[1, 1, 1]]}, "logit_bias[0]"),
        ({"logit_bias": [1]}, "logit_bias[0]"),
        ({"logit_bias": [[-1, 1]]}, "logit_bias[0]"),
        ({"logit_bias": [[2**31, 1]]}, "logit_bias[0]"),
        ({"logit_bias": [["1", 1]]}, "logit_bias[0]"),
        ({"logit_bias": [[1, 100.5]]}, "logit_bias[0]"),
        ({"logit_bias": [[1, -101]]}, "logit_bias[0]"),
        ({"logit_bias": [[1, float("nan")]]}, "logit_bias[0]"),
        ({"logit_bias": [[1, 1], [1, 2]]}, "logit_bias[1]"),
        ({"n": 2}, "n"),
        ({5: 2}, "int"),
    ],
)
@pytest.mark.parametrize("base", KINDS.values(), ids=["chat", "complete"])
def test_the_entry_that_is_wrong_is_named(base: dict[str, object], change: dict[str, object], param: str) -> None:
    assert refused(change, base).param == param


def test_a_number_of_nothing_says_what_is_expected() -> None:
    for name in ("top_p", "typical_p"):
        error = refused({name: 0})
        assert (error.expected, error.got) == ("more than 0", "0")


def test_what_no_float_can_hold_is_no_temperature() -> None:
    error = refused({"temperature": 1e-40})
    assert (error.expected, error.got) == ("0, or 0.001..2", "1e-40")


# --- A prompt --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({}, "prompt"),
        ([], "body"),
        ({"prompt": 5}, "prompt"),
        ({"prompt": [1, 2]}, "prompt"),
        ({"prompt": "\udc00"}, "prompt"),
        ({"prompt": "x" * (chat.MAX_CONTENT_CHARACTERS + 1)}, "prompt"),
        ({"prompt": "x", "echo": 1}, "echo"),
        ({"prompt": "x", "messages": []}, "messages"),
        ({"prompt": "x", "tools": []}, "tools"),
        ({"prompt": "x", "reasoning_tokens": 0}, "reasoning_tokens"),
        ({"prompt": "x", "truncation": "auto"}, "truncation"),
    ],
)
def test_what_is_no_prompt(body: Any, param: str) -> None:
    with pytest.raises(MessageError) as caught:
        CompletionRequest.decode(body)
    assert caught.value.param == param


def test_a_prompt_may_be_as_long_as_a_message() -> None:
    longest = "x" * chat.MAX_CONTENT_CHARACTERS
    assert CompletionRequest.decode({"prompt": longest}).prompt == longest
    assert CompletionRequest.decode({"prompt": "", "echo": True}) == CompletionRequest(prompt="", echo=True)


# --- A conversation --------------------------------------------------------------------------------------------------

CALL = {"id": "c", "name": "f", "arguments": "{}"}


def turn(**fields: object) -> dict[str, object]:
    """One conversation of one message."""
    return {"messages": [{"role": "user", "content": "x", **fields}]}


@pytest.mark.parametrize(
    "messages",
    [
        [{"role": "user", "content": ""}] * chat.MAX_CHAT_MESSAGES,
        [{"role": "user", "content": "x" * chat.MAX_CONTENT_CHARACTERS}],
        [{"role": "assistant", "content": "", "tool_calls": [CALL] * chat.MAX_TOOL_CALLS}],
        [{"role": "assistant", "content": "", "tool_calls": []}],
        [{"role": "assistant", "content": "", "tool_calls": [{**CALL, "id": "i" * 64, "name": "n" * 64}]}],
        [{"role": "assistant", "content": "", "tool_calls": [{**CALL, "arguments": "x" * (256 << 10)}]}],
        [{"role": "assistant", "content": "", "tool_calls": [{**CALL, "id": "", "name": "aZ09_-"}]}],
        [{"role": "tool", "content": "", "tool_call_id": "i" * 64}],
        [{"role": "tool", "content": "", "tool_call_id": ""}],
    ],
)
def test_a_conversation_up_to_its_bounds(messages: list[dict[str, object]]) -> None:
    request = chat_of(messages=messages)
    assert len(request.messages) == len(messages)
    assert ChatRequest.decode(carried(request.encode())) == request


@pytest.mark.parametrize(
    ("change", "param"),
    [
        ({"messages": []}, "messages"),
        ({"messages": "hi"}, "messages"),
        ({"messages": {}}, "messages"),
        ({"messages": [{"role": "user", "content": "hi"}] * 1025}, "messages"),
        ({"messages": ["hi"]}, "messages[0]"),
        ({"messages": [{"role": "user"}]}, "content"),
        ({"messages": [{"content": "x"}]}, "role"),
        (turn(role="root"), "messages[0].role"),
        (turn(role="User"), "messages[0].role"),
        (turn(role=["user"]), "messages[0].role"),
        (turn(content=5), "messages[0].content"),
        (turn(content=None), "messages[0].content"),
        (turn(content=[{"type": "text", "text": "x"}]), "messages[0].content"),
        (turn(content="\ud800"), "messages[0].content"),
        (turn(content="x" * (chat.MAX_CONTENT_CHARACTERS + 1)), "messages[0].content"),
        (turn(name="x"), "name"),
        (turn(tool_calls=[CALL]), "messages[0].tool_calls"),
        (turn(role="system", tool_calls=[CALL]), "messages[0].tool_calls"),
        (turn(role="tool", tool_calls=[CALL], tool_call_id="c"), "messages[0].tool_calls"),
        (turn(role="assistant", tool_calls=CALL), "messages[0].tool_calls"),
        (turn(role="assistant", tool_calls=[CALL] * 129), "messages[0].tool_calls"),
        (turn(role="assistant", tool_calls=[CALL, "f"]), "messages[0].tool_calls[1]"),
        (turn(role="assistant", tool_calls=[{"id": "c", "name": "f"}]), "arguments"),
        (turn(role="assistant", tool_calls=[{**CALL, "type": "function"}]), "type"),
        (turn(role="assistant", tool_calls=[{**CALL, "id": "i" * 65}]), "messages[0].tool_calls[0].id"),
        (turn(role="assistant", tool_calls=[{**CALL, "id": 5}]), "messages[0].tool_calls[0].id"),
        (turn(role="assistant", tool_calls=[{**CALL, "name": ""}]), "messages[0].tool_calls[0].name"),
        (turn(role="assistant", tool_calls=[{**CALL, "name": "a b"}]), "messages[0].tool_calls[0].name"),
        (turn(role="assistant", tool_calls=[{**CALL, "name": "ü"}]), "messages[0].tool_calls[0].name"),
        (turn(role="assistant", tool_calls=[{**CALL, "name": "n" * 65}]), "messages[0].tool_calls[0].name"),
        (turn(role="assistant", tool_calls=[{**CALL, "arguments": {}}]), "messages[0].tool_calls[0].arguments"),
        (
            turn(role="assistant", tool_calls=[{**CALL, "arguments": "x" * ((256 << 10) + 1)}]),
            "messages[0].tool_calls[0].arguments",
        ),
        (turn(role="tool"), "messages[0].tool_call_id"),
        (turn(role="tool", tool_call_id=5), "messages[0].tool_call_id"),
        (turn(role="tool", tool_call_id="i" * 65), "messages[0].tool_call_id"),
        (turn(role="user", tool_call_id="c"), "messages[0].tool_call_id"),
        (turn(role="assistant", tool_call_id="c"), "messages[0].tool_call_id"),
    ],
)
def test_what_is_no_conversation(change: dict[str, object], param: str) -> None:
    assert refused(change).param == param


# --- Tools -----------------------------------------------------------------------------------------------------------

TOOL = {"name": "f", "description": ""}


def tools(count: int) -> list[dict[str, object]]:
    return [{**TOOL, "name": f"f{index}"} for index in range(count)]


@pytest.mark.parametrize(
    "given",
    [
        {"tools": []},
        {"tools": tools(128)},
        {"tools": [{**TOOL, "name": "n" * 64, "description": "d" * (16 << 10), "parameters": "p" * (64 << 10)}]},
        {"tools": [TOOL], "tool_choice": "none"},
        {"tools": [TOOL], "tool_choice": "auto"},
        {"tools": [TOOL], "tool_choice": "required"},
        {"tools": [TOOL], "tool_choice": {"name": "f"}, "parallel_tool_calls": False},
        {"tools": [TOOL], "tool_choice": "none", "response_format": {}},
        {"tools": [TOOL], "response_format": {"schema": "{}"}},
    ],
)
def test_tools_up_to_their_bounds(given: dict[str, object]) -> None:
    request = chat_of(**given)
    assert ChatRequest.decode(carried(request.encode())) == request


@pytest.mark.parametrize(
    ("change", "param"),
    [
        ({"tools": TOOL}, "tools"),
        ({"tools": tools(129)}, "tools"),
        ({"tools": [TOOL, TOOL]}, "tools"),
        ({"tools": ["f"]}, "tools[0]"),
        ({"tools": [{"name": "f"}]}, "description"),
        ({"tools": [{**TOOL, "strict": True}]}, "strict"),
        ({"tools": [TOOL, {**TOOL, "name": "a.b"}]}, "tools[1].name"),
        ({"tools": [{**TOOL, "name": ""}]}, "tools[0].name"),
        ({"tools": [{**TOOL, "name": 5}]}, "tools[0].name"),
        ({"tools": [{**TOOL, "description": None}]}, "tools[0].description"),
        ({"tools": [{**TOOL, "description": "d" * ((16 << 10) + 1)}]}, "tools[0].description"),
        ({"tools": [{**TOOL, "parameters": {}}]}, "tools[0].parameters"),
        ({"tools": [{**TOOL, "parameters": "p" * ((64 << 10) + 1)}]}, "tools[0].parameters"),
        ({"tool_choice": "auto"}, "tool_choice"),
        ({"tools": [], "tool_choice": "none"}, "tool_choice"),
        ({"parallel_tool_calls": True}, "tool_choice"),
        ({"tools": [TOOL], "tool_choice": "any"}, "tool_choice"),
        ({"tools": [TOOL], "tool_choice": None}, "tool_choice"),
        ({"tools": [TOOL], "tool_choice": {}}, "name"),
        ({"tools": [TOOL], "tool_choice": {"name": "f", "type": "function"}}, "type"),
        ({"tools": [TOOL], "tool_choice": {"name": "g"}}, "tool_choice.name"),
        ({"tools": [TOOL], "tool_choice": {"name": 5}}, "tool_choice.name"),
        ({"tools": [TOOL], "parallel_tool_calls": 1}, "parallel_tool_calls"),
        ({"tools": [TOOL], "tool_choice": "required", "response_format": {}}, "response_format"),
        ({"tools": [TOOL], "tool_choice": {"name": "f"}, "response_format": {}}, "response_format"),
        ({"response_format": "json"}, "response_format"),
        ({"response_format": {"type": "json_object"}}, "type"),
        ({"response_format": {"schema": {}}}, "response_format.schema"),
        ({"response_format": {"schema": "s" * ((64 << 10) + 1)}}, "response_format.schema"),
        ({"reasoning_tokens": -1}, "reasoning_tokens"),
        ({"reasoning_tokens": (1 << 20) + 1}, "reasoning_tokens"),
        ({"reasoning_tokens": True}, "reasoning_tokens"),
        ({"truncation": "middle"}, "truncation"),
        ({"truncation": True}, "truncation"),
    ],
)
def test_what_contradicts_itself_or_is_none_is_named(change: dict[str, object], param: str) -> None:
    assert refused(change).param == param


def test_a_format_with_and_without_a_schema() -> None:
    assert chat_of(response_format={}).response_format == JsonFormat()
    longest = "s" * (64 << 10)
    assert chat_of(response_format={"schema": longest}).response_format == JsonFormat(longest)


@pytest.mark.parametrize("budget", [0, 1, 1 << 20])
def test_a_budget_for_thinking(budget: int) -> None:
    assert chat_of(reasoning_tokens=budget).reasoning_tokens == budget
