"""Answers of real models through the engine process: by a grammar, with calls of tools, with thinking of a budget."""

from __future__ import annotations

import json
import os
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from enclave.engine import Engine, LlamaEngine
from enclave.generation import InvalidRequest
from tests.enclave.conftest import sealed
from tests.engines import engine_settings
from tests.gguf_files import CHAT_TEMPLATE, EOS, USER
from vsockrpc.chat import (
    ChatMessage,
    ChatRequest,
    CompletionRequest,
    GenerationRequest,
    JsonFormat,
    NamedTool,
    Tool,
    ToolChoice,
)
from vsockrpc.messages import Delta, Done, TokenLogprob, ToolCallDelta, Usage

SETTINGS = engine_settings(context=1024, parallel=2)
TOOLS_TEMPLATE = "{% for tool in tools %}{{ tool | tojson }}<|end|>{% endfor %}{# <tool_call> #}" + CHAT_TEMPLATE
THINKING_TEMPLATE = CHAT_TEMPLATE + "<think>\n"
HI = (ChatMessage("user", "Hi"),)
COLOUR = '{"type": "object", "properties": {"colour": {"enum": ["red", "blue"]}}, "required": ["colour"]}'
PAINT = Tool("paint", "Paints a wall", COLOUR)

MakeEngine = Callable[[str], Awaitable[Engine]]


@pytest.fixture
async def make_engine(tiny_weights: int) -> AsyncIterator[MakeEngine]:
    engines: list[Engine] = []

    async def make(template: str) -> Engine:
        engine = LlamaEngine(tiny_weights, template, SETTINGS)
        engines.append(engine)
        await engine.start()
        return engine

    yield make
    for engine in engines:
        await engine.close()


async def answer(engine: Engine, request: GenerationRequest) -> tuple[Delta, Done]:
    """All deltas as one, the parts of calls in their order, and the end."""
    content = reasoning = ""
    calls: list[ToolCallDelta] = []
    logprobs: list[TokenLogprob] = []
    async for event in engine.generate(request):
        if isinstance(event, Done):
            return Delta(content, reasoning, tuple(calls), tuple(logprobs)), event
        content, reasoning = content + event.content, reasoning + event.reasoning
        calls += event.tool_calls
        logprobs += event.logprobs
    raise AssertionError("an answer has an end")


def arguments_of(said: Delta) -> object:
    return json.loads("".join(call.arguments for call in said.tool_calls))


# --- The tiny model, whose words are noise ---------------------------------------------------------------------------


async def test_even_noise_is_json_by_the_schema(make_engine: MakeEngine) -> None:
    engine = await make_engine(CHAT_TEMPLATE)
    request = ChatRequest(HI, response_format=JsonFormat(COLOUR), temperature=2.0, seed=1, max_tokens=200)
    said, done = await answer(engine, request)
    assert done.finish_reason == "stop"
    assert json.loads(said.content)["colour"] in ("red", "blue")


async def test_json_is_whole_where_only_the_template_says_what_ends_a_turn(make_engine: MakeEngine) -> None:
    """``<|user|>`` is no end to llama.cpp, and no control token: to its grammar it is text like any other."""
    engine = await make_engine(CHAT_TEMPLATE.replace("'<|end|>'", "'<|user|>'"))
    biases = ((USER, 100.0), (ord('"'), 50.0), (EOS, 50.0))
    spoken = ChatRequest(HI, logit_bias=biases, temperature=0, max_tokens=50)
    assert (await answer(engine, spoken)) == (Delta(), Done("stop", Usage(6, 0)))
    said, done = await answer(engine, replace(spoken, response_format=JsonFormat('{"type": "string"}')))
    assert (json.loads(said.content), done.finish_reason) == ("", "stop")


@pytest.mark.parametrize("choice", ["required", NamedTool("paint")])
async def test_even_noise_calls_a_tool_that_has_to_be_called(make_engine: MakeEngine, choice: ToolChoice) -> None:
    engine = await make_engine(TOOLS_TEMPLATE)
    request = ChatRequest(
        HI, tools=(PAINT,), tool_choice=choice, parallel_tool_calls=False, temperature=2.0, seed=1, max_tokens=400
    )
    said, done = await answer(engine, request)
    assert done.finish_reason == "tool_calls"
    assert (said.content, said.reasoning) == ("", "")
    assert (said.tool_calls[0].name, [call.name for call in said.tool_calls[1:]]) == (
        "paint",
        [None] * (len(said.tool_calls) - 1),
    )
    assert said.tool_calls[0].id is not None
    assert arguments_of(said) in ({"colour": "red"}, {"colour": "blue"})


async def test_thinking_ends_with_its_budget_and_the_answer_follows(make_engine: MakeEngine) -> None:
    engine = await make_engine(THINKING_TEMPLATE)
    said, done = await answer(engine, ChatRequest(HI, temperature=0, max_tokens=60, reasoning_tokens=20))
    assert done.finish_reason == "length"
    assert said.reasoning
    assert said.content
    assert "</think>" not in said.reasoning + said.content
    assert (done.usage.reasoning_tokens, done.usage.completion_tokens) == (20, 60)
    assert not said.content[0].isspace()


async def test_thinking_without_a_budget_may_take_all(make_engine: MakeEngine) -> None:
    engine = await make_engine(THINKING_TEMPLATE)
    said, done = await answer(engine, ChatRequest(HI, temperature=0, max_tokens=30))
    assert (said.content, done.finish_reason) == ("", "length")
    assert done.usage.reasoning_tokens == 30


async def test_json_comes_behind_the_thinking(make_engine: MakeEngine) -> None:
    engine = await make_engine(THINKING_TEMPLATE)
    request = ChatRequest(
        HI, response_format=JsonFormat(COLOUR), temperature=2.0, seed=3, reasoning_tokens=5, max_tokens=200
    )
    said, done = await answer(engine, request)
    assert said.reasoning
    assert done.usage.reasoning_tokens <= 5
    assert json.loads(said.content)["colour"] in ("red", "blue")


async def test_tools_without_a_place_and_the_oldest_turns(make_engine: MakeEngine) -> None:
    engine = await make_engine(CHAT_TEMPLATE)
    with pytest.raises(InvalidRequest, match="no place for tools"):
        await answer(engine, ChatRequest(HI, tools=(PAINT,), tool_choice="required"))
    turn = (ChatMessage("user", "x" * 200), ChatMessage("assistant", "y" * 200))
    request = ChatRequest((*turn * 3, *HI), temperature=0, max_tokens=100, truncation="auto")
    _, done = await answer(engine, request)
    assert done.dropped_messages == 2
    assert done.usage.prompt_tokens <= SETTINGS.context - 100
    assert await engine.count(request) == done.usage.prompt_tokens


async def test_a_completion_may_begin_with_its_prompt(make_engine: MakeEngine) -> None:
    engine = await make_engine(CHAT_TEMPLATE)
    prompt = "Once upon a time, <|user|> 🦊 " + "x" * 500
    said, done = await answer(engine, CompletionRequest(prompt, echo=True, temperature=0, max_tokens=5))
    assert said.content.startswith(prompt)
    assert done.usage.completion_tokens == 5
    long, _ = await answer(engine, CompletionRequest("word " * 180, echo=True, temperature=0, max_tokens=1))
    assert long.content.startswith("word " * 180)


# --- SmolLM2 ---------------------------------------------------------------------------------------------------------

SMOL_TEMPLATE = (
    "{% if tools %}<|im_start|>system\nYou may call these functions:{% for tool in tools %}\n{{ tool | tojson }}"
    "{% endfor %}\nWrite <tool_call> and JSON to call one.<|im_end|>\n{% endif %}"
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "<|im_start|>assistant\n{% if enable_thinking and not tools %}<think>\n{% endif %}"
)


@pytest.fixture(scope="module")
def smollm2_weights(smollm2: Path) -> Iterator[int]:
    descriptor = sealed(smollm2.read_bytes())
    yield descriptor
    os.close(descriptor)


@pytest.mark.model
async def test_smollm2_answers_in_each_form(smollm2_weights: int) -> None:
    engine = LlamaEngine(smollm2_weights, SMOL_TEMPLATE, SETTINGS)
    await engine.start()
    try:
        question = (ChatMessage("user", "Please paint my wall in the colour of the sky."),)
        said, done = await answer(
            engine,
            ChatRequest(
                question,
                tools=(PAINT,),
                tool_choice="required",
                reasoning_tokens=0,
                parallel_tool_calls=False,
                temperature=0,
                max_tokens=60,
            ),
        )
        assert done.finish_reason == "tool_calls"
        assert said.content == ""
        assert said.tool_calls[0].name == "paint"
        country = (ChatMessage("user", "Name the capital of France, as JSON with the key capital."),)
        said, done = await answer(
            engine,
            ChatRequest(country, response_format=JsonFormat(), reasoning_tokens=0, temperature=0, max_tokens=120),
        )
        assert done.finish_reason == "stop"
        assert isinstance(json.loads(said.content), dict)
        said, done = await answer(engine, ChatRequest(country, reasoning_tokens=12, temperature=0, max_tokens=24))
        assert done.usage.reasoning_tokens <= 12
        assert said.reasoning
        assert said.content
    finally:
        await engine.close()
