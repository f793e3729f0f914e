"""OpenAI's own unmodified package against a gateway, parameter by parameter: what the enclave's engine is asked, and
what the package makes of its answer.
"""

from __future__ import annotations

import json
from typing import Any, cast

import httpx2
import openai
import pytest
from openai.types.chat import (
    ChatCompletion,
    ChatCompletionMessageParam,
    ChatCompletionNamedToolChoiceParam,
    ChatCompletionToolParam,
)
from openai.types.shared_params import ResponseFormatJSONSchema

from enclave.generation import GenerationEvent
from strongroom.gateway import PromptCache
from strongroom.openai_api import (
    CHAT_PARAMETERS,
    COMPLETION_PARAMETERS,
    COMPLETION_TOKENS,
    NEUTRAL,
    REASONING_TOKENS,
    UNSUPPORTED,
    WITHOUT_EFFECT,
)
from strongroom.session import Session
from tests.gateways import gateway_of
from tests.house import House
from vsockrpc.chat import (
    CACHE_SECRET_SIZE,
    ChatMessage,
    ChatRequest,
    CompletionRequest,
    JsonFormat,
    NamedTool,
    Tool,
    ToolCall,
)
from vsockrpc.messages import Alternative, Delta, Done, TokenLogprob, ToolCallDelta, Usage

HELLO: list[ChatCompletionMessageParam] = [{"role": "user", "content": "hello there"}]
SCHEMA: dict[str, object] = {
    "type": "object",
    "properties": {"zone": {"type": "string"}, "at": {"type": "integer"}},
    "required": ["zone", "at"],
}
SCHEMA_TEXT = json.dumps(SCHEMA, separators=(",", ":"))
LOOK: ChatCompletionToolParam = {
    "type": "function",
    "function": {"name": "look", "description": "Looks.", "parameters": SCHEMA},
}
WAIT: ChatCompletionToolParam = {"type": "function", "function": {"name": "wait"}}
USAGE = Usage(12, 7, cached_tokens=8, reasoning_tokens=3)
THOUGHT: list[GenerationEvent] = [
    Delta(reasoning="let me "),
    Delta(reasoning="see"),
    Delta("so it "),
    Delta("is"),
    Done("stop", USAGE),
]
CALLED: list[GenerationEvent] = [
    Delta(tool_calls=(ToolCallDelta(0, "", "call_a", "look"),)),
    Delta(tool_calls=(ToolCallDelta(0, '{"zone":"Z",'),)),
    Delta(tool_calls=(ToolCallDelta(0, '"at":1}'), ToolCallDelta(1, "{}", "call_b", "wait"))),
    Done("tool_calls", USAGE),
]
LIKELY = (
    TokenLogprob(b"a", -0.5, (Alternative(b"a", -0.5), Alternative(b"b", -1.0))),
    TokenLogprob("\u00e9".encode()[:1], -0.25),
    TokenLogprob("\u00e9".encode()[1:], float("-inf")),
)
WEIGHED: list[GenerationEvent] = [
    Delta("a", logprobs=LIKELY[:1]),
    Delta("\u00e9", logprobs=LIKELY[1:]),
    Done("length", USAGE),
]


async def asked(client: openai.AsyncOpenAI, home: House, **parameters: Any) -> ChatRequest:
    """What reaches the engine, but for the cache secret."""
    await client.chat.completions.create(**{"model": "tiny", "messages": HELLO} | parameters)
    request = home.engine.requests[-1]
    assert isinstance(request, ChatRequest)
    return request


async def asked_to_complete(client: openai.AsyncOpenAI, home: House, **parameters: Any) -> CompletionRequest:
    await client.completions.create(**{"model": "tiny", "prompt": "once upon"} | parameters)
    request = home.engine.requests[-1]
    assert isinstance(request, CompletionRequest)
    return request


# --- What the engine is asked --------------------------------------------------------------------------------------

FOR_BOTH: list[tuple[dict[str, object], dict[str, object]]] = [
    ({"max_tokens": 50}, {"max_tokens": 50}),
    ({"temperature": 0.25}, {"temperature": 0.25}),
    ({"top_p": 0.5}, {"top_p": 0.5}),
    ({"extra_body": {"top_k": 40}}, {"top_k": 40}),
    ({"extra_body": {"min_p": 0.125}}, {"min_p": 0.125}),
    ({"extra_body": {"typical_p": 0.75}}, {"typical_p": 0.75}),
    ({"frequency_penalty": 0.5}, {"frequency_penalty": 0.5}),
    ({"presence_penalty": -0.5}, {"presence_penalty": -0.5}),
    ({"extra_body": {"repetition_penalty": 1.25}}, {"repetition_penalty": 1.25}),
    ({"seed": 7}, {"seed": 7}),
    ({"logit_bias": {"15": -100, "16": 5}}, {"logit_bias": ((15, -100.0), (16, 5.0))}),
    ({"stop": "\n"}, {"stop": ("\n",)}),
    ({"stop": ["\n", "."]}, {"stop": ("\n", ".")}),
    ({"user": "somebody"}, {}),
    ({"n": 1}, {}),
]
OF_CHATS: list[tuple[dict[str, object], dict[str, object]]] = [
    ({}, {"max_tokens": None, "model": "tiny", "messages": (ChatMessage("user", "hello there"),)}),
    ({"max_completion_tokens": 50}, {"max_tokens": 50}),
    ({"logprobs": True}, {"top_logprobs": 0}),
    ({"logprobs": True, "top_logprobs": 20}, {"top_logprobs": 20}),
    ({"response_format": {"type": "text"}}, {"response_format": None}),
    ({"response_format": {"type": "json_object"}}, {"response_format": JsonFormat()}),
    (
        {"response_format": ResponseFormatJSONSchema(type="json_schema", json_schema={"name": "x", "schema": SCHEMA})},
        {"response_format": JsonFormat(SCHEMA_TEXT)},
    ),
    (
        {"tools": [LOOK, WAIT]},
        {"tools": (Tool("look", "Looks.", SCHEMA_TEXT), Tool("wait")), "tool_choice": "auto"},
    ),
    ({"tools": [WAIT], "tool_choice": "none"}, {"tool_choice": "none"}),
    ({"tools": [WAIT], "tool_choice": "required"}, {"tool_choice": "required"}),
    (
        {
            "tools": [WAIT, LOOK],
            "tool_choice": ChatCompletionNamedToolChoiceParam(type="function", function={"name": "look"}),
        },
        {"tool_choice": NamedTool("look")},
    ),
    ({"tools": [WAIT], "parallel_tool_calls": False}, {"parallel_tool_calls": False}),
    ({"reasoning_effort": "low"}, {"reasoning_tokens": REASONING_TOKENS["low"]}),
    ({"extra_body": {"thinking_token_budget": 99}}, {"reasoning_tokens": 99}),
    ({"extra_body": {"truncation": "auto"}}, {"truncation": "auto"}),
    ({"metadata": {"a": "b"}, "store": False, "service_tier": "auto", "safety_identifier": "x"}, {}),
    ({"modalities": ["text"]}, {}),
]
OF_COMPLETIONS: list[tuple[dict[str, object], dict[str, object]]] = [
    ({}, {"max_tokens": COMPLETION_TOKENS, "model": "tiny", "prompt": "once upon", "echo": False}),
    ({"prompt": ["once more"]}, {"prompt": "once more"}),
    ({"echo": True}, {"echo": True}),
    ({"logprobs": 5}, {"top_logprobs": 5}),
    ({"best_of": 1, "suffix": ""}, {}),
]


DELIVERED = frozenset({"stream", "stream_options", "prompt_cache_key"})
"""What the gateway itself does: the tests of streams and of the prompt cache, below, send these."""


def sent(rows: list[tuple[dict[str, object], dict[str, object]]]) -> set[str]:
    """The names of all parameters."""
    given = [{**parameters, **cast(dict[str, object], parameters.get("extra_body", {}))} for parameters, _ in rows]
    return {name for parameters in given for name in parameters} - {"extra_body"} | DELIVERED


def test_no_parameter_is_forgotten() -> None:
    """Each that is accepted is sent by the tests of this file, to an endpoint that takes it at least."""
    of_chats, of_completions = sent([*FOR_BOTH, *OF_CHATS]), sent([*FOR_BOTH, *OF_COMPLETIONS])
    assert of_chats | {"model", "messages"} >= CHAT_PARAMETERS
    assert of_completions | {"model", "prompt"} >= COMPLETION_PARAMETERS
    every = CHAT_PARAMETERS | COMPLETION_PARAMETERS | WITHOUT_EFFECT | NEUTRAL.keys()
    assert of_chats | of_completions | {"model", "messages"} == every


async def test_every_parameter_of_a_chat_reaches_the_engine(client: openai.AsyncOpenAI, home: House) -> None:
    for parameters, expected in [*FOR_BOTH, *OF_CHATS]:
        request = await asked(client, home, **parameters)
        assert {name: getattr(request, name) for name in expected} == expected


async def test_every_parameter_of_a_completion_reaches_the_engine(client: openai.AsyncOpenAI, home: House) -> None:
    for parameters, expected in [*FOR_BOTH, *OF_COMPLETIONS]:
        request = await asked_to_complete(client, home, **parameters)
        assert {name: getattr(request, name) for name in expected} == expected


@pytest.mark.parametrize("name", sorted(UNSUPPORTED))
async def test_what_is_not_served_is_refused_by_name(client: openai.AsyncOpenAI, home: House, name: str) -> None:
    for refused in (
        client.chat.completions.create(model="tiny", messages=HELLO, extra_body={name: "x"}),
        client.completions.create(model="tiny", prompt="x", extra_body={name: "x"}),
    ):
        with pytest.raises(openai.BadRequestError) as caught:
            await refused
        assert (caught.value.code, caught.value.param) == ("unsupported_parameter", name)
    assert home.engine.requests == []


async def test_a_conversation_with_calls_reaches_the_engine(client: openai.AsyncOpenAI, home: House) -> None:
    """With the package's own objects of the answer before."""
    home.engine.script = CALLED
    first = await client.chat.completions.create(model="tiny", messages=HELLO, tools=[LOOK, WAIT])
    message = first.choices[0].message
    assert message.tool_calls
    turns = [
        {"role": "developer", "content": "be brief"},
        {"role": "user", "content": [{"type": "text", "text": "one "}, {"type": "text", "text": "two"}]},
        message.model_dump(),
        *({"role": "tool", "tool_call_id": call.id, "content": "found"} for call in message.tool_calls),
    ]
    request = await asked(client, home, messages=turns, tools=[LOOK, WAIT])
    calls = (ToolCall("call_a", "look", '{"zone":"Z","at":1}'), ToolCall("call_b", "wait", "{}"))
    assert request.messages == (
        ChatMessage("system", "be brief"),
        ChatMessage("user", "one two"),
        ChatMessage("assistant", "", calls),
        ChatMessage("tool", "found", (), "call_a"),
        ChatMessage("tool", "found", (), "call_b"),
    )


async def test_an_answer_with_reasoning_goes_back_without_it(client: openai.AsyncOpenAI, home: House) -> None:
    home.engine.script = THOUGHT
    first = await client.chat.completions.create(model="tiny", messages=HELLO)
    turns = [*HELLO, first.choices[0].message.model_dump(), *HELLO]
    request = await asked(client, home, messages=turns)
    assert request.messages[1] == ChatMessage("assistant", "so it is")


# --- What comes back -----------------------------------------------------------------------------------------------


def reasoning_of(part: object) -> str:
    """A field that OpenAI's own objects have no name for."""
    return cast(str, getattr(part, "reasoning_content", "") or "")


async def test_reasoning(client: openai.AsyncOpenAI, home: House) -> None:
    home.engine.script = THOUGHT
    completion = await client.chat.completions.create(model="tiny", messages=HELLO)
    message = completion.choices[0].message
    assert (reasoning_of(message), message.content) == ("let me see", "so it is")
    assert completion.usage is not None
    assert completion.usage.completion_tokens_details is not None
    assert completion.usage.completion_tokens_details.reasoning_tokens == 3
    stream = await client.chat.completions.create(model="tiny", messages=HELLO, stream=True)
    deltas = [chunk.choices[0].delta async for chunk in stream]
    assert [reasoning_of(delta) for delta in deltas] == ["", "let me ", "see", "", "", ""]
    assert [delta.content for delta in deltas] == ["", None, None, "so it ", "is", None]


async def test_usage(client: openai.AsyncOpenAI, home: House) -> None:
    home.engine.script = THOUGHT
    completion = await client.chat.completions.create(model="tiny", messages=HELLO)
    options: openai.types.chat.ChatCompletionStreamOptionsParam = {"include_usage": True}
    stream = await client.chat.completions.create(model="tiny", messages=HELLO, stream=True, stream_options=options)
    *_, last = [chunk async for chunk in stream]
    text = await client.completions.create(model="tiny", prompt="x")
    text_stream = await client.completions.create(model="tiny", prompt="x", stream=True, stream_options=options)
    *_, text_last = [chunk async for chunk in text_stream]
    for usage in (completion.usage, last.usage, text.usage, text_last.usage):
        assert usage is not None
        assert (usage.prompt_tokens, usage.completion_tokens, usage.total_tokens) == (12, 7, 19)
        assert usage.prompt_tokens_details is not None
        assert usage.prompt_tokens_details.cached_tokens == 8


async def test_calls(client: openai.AsyncOpenAI, home: House) -> None:
    home.engine.script = CALLED
    completion = await client.chat.completions.create(model="tiny", messages=HELLO, tools=[LOOK, WAIT])
    require_calls(completion)
    async with client.chat.completions.stream(model="tiny", messages=HELLO, tools=[LOOK, WAIT]) as stream:
        done = [event async for event in stream if event.type == "tool_calls.function.arguments.done"]
        require_calls(await stream.get_final_completion())
    assert [(event.name, event.arguments) for event in done] == [("look", '{"zone":"Z","at":1}'), ("wait", "{}")]


def require_calls(completion: ChatCompletion) -> None:
    [choice] = completion.choices
    assert (choice.finish_reason, choice.message.content or None) == ("tool_calls", None)
    calls = [call for call in choice.message.tool_calls or [] if call.type == "function"]
    assert [(call.id, call.function.name, call.function.arguments) for call in calls] == [
        ("call_a", "look", '{"zone":"Z","at":1}'),
        ("call_b", "wait", "{}"),
    ]


async def test_log_probabilities(client: openai.AsyncOpenAI, home: House) -> None:
    home.engine.script = WEIGHED
    completion = await client.chat.completions.create(model="tiny", messages=HELLO, logprobs=True, top_logprobs=2)
    [choice] = completion.choices
    assert choice.finish_reason == "length"
    assert choice.logprobs is not None
    whole = choice.logprobs.content or []
    assert [(entry.bytes, entry.logprob) for entry in whole] == [([97], -0.5), ([195], -0.25), ([169], -9999.0)]
    assert [(entry.token, entry.logprob) for entry in whole[0].top_logprobs] == [("a", -0.5), ("b", -1.0)]
    stream = await client.chat.completions.create(model="tiny", messages=HELLO, logprobs=True, stream=True)
    found = [chunk.choices[0].logprobs async for chunk in stream]
    assert [entry for logprobs in found if logprobs for entry in logprobs.content or []] == whole


async def test_log_probabilities_of_a_completion(client: openai.AsyncOpenAI, home: House) -> None:
    home.engine.script = WEIGHED
    completion = await client.completions.create(model="tiny", prompt="x", logprobs=2)
    [choice] = completion.choices
    assert (choice.text, choice.finish_reason) == ("a\u00e9", "length")
    assert choice.logprobs is not None
    assert choice.logprobs.text_offset == [0, 1, 1]
    assert choice.logprobs.token_logprobs == [-0.5, -0.25, -9999.0]
    stream = await client.completions.create(model="tiny", prompt="x", logprobs=2, stream=True)
    found = [chunk.choices[0].logprobs async for chunk in stream]
    assert [offset for logprobs in found if logprobs for offset in logprobs.text_offset or []] == [0, 1, 1]


async def test_a_completion(client: openai.AsyncOpenAI) -> None:
    completion = await client.completions.create(model="tiny", prompt="once upon", max_tokens=50)
    [choice] = completion.choices
    assert (completion.object, completion.model, choice.text) == ("text_completion", "tiny", "once upon")
    assert choice.finish_reason == "stop"
    assert completion.id.startswith("cmpl-")
    stream = await client.completions.create(model="tiny", prompt="once upon", max_tokens=50, stream=True)
    chunks = [chunk async for chunk in stream]
    assert "".join(chunk.choices[0].text for chunk in chunks) == "once upon"
    assert chunks[-1].choices[0].finish_reason == "stop"


async def test_json_is_parsed_by_the_package(client: openai.AsyncOpenAI, home: House) -> None:
    home.engine.script = [Delta('{"zone": "Z", '), Delta('"at": 1}'), Done("stop", USAGE)]
    completion = await client.chat.completions.create(
        model="tiny", messages=HELLO, response_format={"type": "json_object"}
    )
    assert json.loads(completion.choices[0].message.content or "") == {"zone": "Z", "at": 1}


async def test_dropped_messages(client: openai.AsyncOpenAI, home: House) -> None:
    home.engine.script = [Delta("so"), Done("stop", USAGE, dropped_messages=4)]
    completion = await client.chat.completions.create(model="tiny", messages=HELLO, extra_body={"truncation": "auto"})
    assert (completion.model_extra or {})["strongroom"] == {"dropped_messages": 4}
    stream = await client.chat.completions.create(
        model="tiny", messages=HELLO, stream=True, extra_body={"truncation": "auto"}
    )
    assert [(chunk.model_extra or {}).get("strongroom") async for chunk in stream] == [
        None,
        None,
        {"dropped_messages": 4},
    ]


async def test_counting(http: httpx2.AsyncClient, client: openai.AsyncOpenAI) -> None:
    completion = await client.chat.completions.create(model="tiny", messages=HELLO)
    body = {"model": "tiny", "messages": HELLO, "temperature": 0, "stream": True}
    response = await http.post("/v1/chat/completions/input_tokens", json=body)
    assert completion.usage is not None
    assert response.json() == {
        "object": "chat.completion.input_tokens",
        "input_tokens": completion.usage.prompt_tokens,
    }


# --- The prompt cache ----------------------------------------------------------------------------------------------

LONG = "a prompt of many tokens, which another one begins with as well; "


async def cached(client: openai.AsyncOpenAI, key: str | None, text: str = LONG) -> int:
    keyed = openai.omit if key is None else key
    completion = await client.chat.completions.create(
        model="tiny", messages=[{"role": "user", "content": text}], prompt_cache_key=keyed, max_tokens=1
    )
    assert completion.usage is not None
    assert completion.usage.prompt_tokens_details is not None
    return completion.usage.prompt_tokens_details.cached_tokens or 0


async def test_what_one_key_has_computed_serves_that_key_alone(client: openai.AsyncOpenAI, home: House) -> None:
    assert await cached(client, "one") == 0
    assert await cached(client, "one", LONG + "more") >= len(LONG)
    for other in ("two", "One", "", None):
        assert await cached(client, other) == 0
        assert await cached(client, other) > 0
    secrets = [request.cache_secret for request in home.engine.requests]
    assert {len(secret) for secret in secrets if secret is not None} == {CACHE_SECRET_SIZE}
    assert len(set(secrets)) == 5


async def test_another_gateway_shares_nothing_with_this_one(
    client: openai.AsyncOpenAI, session: Session, home: House
) -> None:
    async with (
        gateway_of(session, cache=PromptCache()) as port,
        openai.AsyncOpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="unused") as other,
    ):
        for key in ("one", None):
            await cached(client, key)
            assert await cached(other, key) == 0
            assert await cached(other, key) > 0
    secrets = {request.cache_secret for request in home.engine.requests}
    assert len(secrets) == 4
    assert None not in secrets


async def test_without_a_cache_nothing_is_shared_and_a_key_is_refused(
    client: openai.AsyncOpenAI, session: Session, home: House
) -> None:
    async with (
        gateway_of(session, cache=None) as port,
        openai.AsyncOpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="unused") as other,
    ):
        await cached(client, None)
        for _ in range(2):
            assert await cached(other, None) == 0
            assert home.engine.requests[-1].cache_secret is None
        served = len(home.engine.requests)
        with pytest.raises(openai.BadRequestError) as refused:
            await cached(other, "one")
        assert (refused.value.code, refused.value.param) == ("unsupported_parameter", "prompt_cache_key")
        with pytest.raises(openai.BadRequestError):
            await other.completions.create(model="tiny", prompt="x", extra_body={"prompt_cache_key": "one"})
        assert len(home.engine.requests) == served
