"""From an enclave's answer to OpenAI's shapes: whole, and in chunks that come to the same."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from openai.lib.streaming.chat import ChatCompletionStreamState
from openai.types.chat import ChatCompletion, ChatCompletionChunk
from openai.types.completion import Completion

from strongroom.openai_answers import LEAST_LOGPROB, AnswerShape, ChatShape, CompletionShape, count_of, model_of
from vsockrpc.messages import Alternative, Delta, Done, TokenLogprob, ToolCallDelta, Usage

DONE = Done("stop", Usage(12, 7, cached_tokens=8, reasoning_tokens=3), dropped_messages=2)
USAGE = {
    "prompt_tokens": 12,
    "completion_tokens": 7,
    "total_tokens": 19,
    "prompt_tokens_details": {"cached_tokens": 8},
    "completion_tokens_details": {"reasoning_tokens": 3},
}
FRAME = {"id": "x-1", "created": 1700000000, "model": "m"}
EURO = "\u20ac".encode()
SPLIT = (
    TokenLogprob(b"a", -0.5, (Alternative(b"a", -0.5), Alternative(EURO[:1], -1.5))),
    TokenLogprob(EURO[:1], -1.25),
    TokenLogprob(EURO[1:], -math.inf),
    TokenLogprob(b"!", 0.0),
)
CALLS = (
    Delta(tool_calls=(ToolCallDelta(0, "", "call_a", "look"),)),
    Delta(tool_calls=(ToolCallDelta(0, '{"at"'),)),
    Delta(tool_calls=(ToolCallDelta(0, ": 1}"), ToolCallDelta(1, "{}", "call_b", "wait"))),
)


def chat(**options: bool) -> ChatShape:
    return ChatShape("x-1", 1700000000, "m", **options)


def completion(**options: bool) -> CompletionShape:
    return CompletionShape("x-1", 1700000000, "m", **options)


def streamed(shape: AnswerShape, deltas: Sequence[Delta], done: Done = DONE) -> list[dict[str, Any]]:
    return [*shape.opening(), *(shape.piece(delta) for delta in deltas), *shape.closing(done)]


# --- Chats ---------------------------------------------------------------------------------------------------------


def test_a_whole_chat() -> None:
    assert chat().whole([Delta("te"), Delta("xt")], DONE) == {
        **FRAME,
        "object": "chat.completion",
        "choices": [
            {
                "index": 0,
                "message": {"role": "assistant", "content": "text", "refusal": None},
                "finish_reason": "stop",
                "logprobs": None,
            }
        ],
        "usage": USAGE,
    }


def test_a_streamed_chat() -> None:
    deltas: list[dict[str, object]] = [{"role": "assistant", "content": ""}, {"content": "te"}, {"content": "xt"}, {}]
    assert streamed(chat(), [Delta("te"), Delta("xt")]) == [
        {
            **FRAME,
            "object": "chat.completion.chunk",
            "choices": [{"index": 0, "delta": delta, "finish_reason": reason, "logprobs": None}],
        }
        for delta, reason in zip(deltas, (None, None, None, "stop"), strict=True)
    ]


def test_usage_is_the_last_chunk_and_none_in_the_others() -> None:
    *chunks, last = streamed(chat(include_usage=True), [Delta("text")])
    assert [chunk["usage"] for chunk in chunks] == [None] * 3
    assert last == {**FRAME, "object": "chat.completion.chunk", "choices": [], "usage": USAGE}


@pytest.mark.parametrize("dropped", [0, 2])
def test_dropped_messages_are_said(dropped: int) -> None:
    done, said = replace(DONE, dropped_messages=dropped), {"dropped_messages": dropped}
    assert chat(says_dropped=True).whole([], done)["strongroom"] == said
    *chunks, last = streamed(chat(says_dropped=True), [Delta("text")], done)
    assert last["strongroom"] == said
    assert not [chunk for chunk in chunks if "strongroom" in chunk]
    assert "strongroom" not in chat().whole([], done)


def test_reasoning_stands_apart() -> None:
    deltas = [Delta(reasoning="let me "), Delta(reasoning="see"), Delta("so")]
    [choice] = chat().whole(deltas, DONE)["choices"]
    assert choice["message"] == {
        "role": "assistant",
        "content": "so",
        "refusal": None,
        "reasoning_content": "let me see",
    }
    chunks = streamed(chat(), deltas)
    assert [chunk["choices"][0]["delta"] for chunk in chunks[1:-1]] == [
        {"reasoning_content": "let me "},
        {"reasoning_content": "see"},
        {"content": "so"},
    ]


def test_calls() -> None:
    done = replace(DONE, finish_reason="tool_calls")
    [choice] = chat().whole(CALLS, done)["choices"]
    assert choice["finish_reason"] == "tool_calls"
    assert choice["message"] == {
        "role": "assistant",
        "content": None,
        "refusal": None,
        "tool_calls": [
            {"id": "call_a", "type": "function", "function": {"name": "look", "arguments": '{"at": 1}'}},
            {"id": "call_b", "type": "function", "function": {"name": "wait", "arguments": "{}"}},
        ],
    }
    chunks = streamed(chat(), CALLS, done)
    assert [chunk["choices"][0]["delta"] for chunk in chunks[1:-1]] == [
        {
            "tool_calls": [
                {"index": 0, "id": "call_a", "type": "function", "function": {"name": "look", "arguments": ""}}
            ]
        },
        {"tool_calls": [{"index": 0, "function": {"arguments": '{"at"'}}]},
        {
            "tool_calls": [
                {"index": 0, "function": {"arguments": ": 1}"}},
                {"index": 1, "id": "call_b", "type": "function", "function": {"name": "wait", "arguments": "{}"}},
            ]
        },
    ]
    assert chunks[-1]["choices"][0]["finish_reason"] == "tool_calls"


def test_text_before_a_call_is_kept() -> None:
    [choice] = chat().whole([Delta("I look."), *CALLS], DONE)["choices"]
    assert choice["message"]["content"] == "I look."


def test_log_probabilities() -> None:
    [choice] = chat().whole([Delta("a", logprobs=SPLIT[:1]), Delta("\u20ac!", logprobs=SPLIT[1:])], DONE)["choices"]
    assert choice["logprobs"] == {
        "content": [
            {
                "token": "a",
                "bytes": [97],
                "logprob": -0.5,
                "top_logprobs": [
                    {"token": "a", "bytes": [97], "logprob": -0.5},
                    {"token": "bytes:\\xe2", "bytes": [0xE2], "logprob": -1.5},
                ],
            },
            {"token": "bytes:\\xe2", "bytes": [0xE2], "logprob": -1.25, "top_logprobs": []},
            {"token": "bytes:\\x82\\xac", "bytes": [0x82, 0xAC], "logprob": LEAST_LOGPROB, "top_logprobs": []},
            {"token": "!", "bytes": [33], "logprob": 0.0, "top_logprobs": []},
        ],
        "refusal": None,
    }


# --- Completions ---------------------------------------------------------------------------------------------------


def test_a_whole_completion() -> None:
    assert completion().whole([Delta("te"), Delta("xt")], DONE) == {
        **FRAME,
        "object": "text_completion",
        "choices": [{"index": 0, "text": "text", "finish_reason": "stop", "logprobs": None}],
        "usage": USAGE,
    }


def test_a_streamed_completion() -> None:
    assert streamed(completion(include_usage=True), [Delta("te"), Delta("xt")]) == [
        *(
            {
                **FRAME,
                "object": "text_completion",
                "choices": [{"index": 0, "text": text, "finish_reason": reason, "logprobs": None}],
                "usage": None,
            }
            for text, reason in (("te", None), ("xt", None), ("", "stop"))
        ),
        {**FRAME, "object": "text_completion", "choices": [], "usage": USAGE},
    ]


def test_log_probabilities_of_a_completion() -> None:
    [choice] = completion().whole([Delta("a\u20ac!", logprobs=SPLIT)], DONE)["choices"]
    assert choice["logprobs"] == {
        "tokens": ["a", "bytes:\\xe2", "bytes:\\x82\\xac", "!"],
        "token_logprobs": [-0.5, -1.25, LEAST_LOGPROB, 0.0],
        "top_logprobs": [{"a": -0.5, "bytes:\\xe2": -1.5}, {}, {}, {}],
        "text_offset": [0, 1, 1, 2],
    }


def test_places_in_the_text_go_on_from_chunk_to_chunk() -> None:
    deltas = [Delta("a", logprobs=SPLIT[:2]), Delta("\u20ac", logprobs=SPLIT[2:3]), Delta("!", logprobs=SPLIT[3:])]
    chunks = streamed(completion(), deltas)
    assert [chunk["choices"][0]["logprobs"]["text_offset"] for chunk in chunks[:-1]] == [[0, 1], [1], [2]]


# --- Other answers -------------------------------------------------------------------------------------------------


def test_a_count_and_a_model() -> None:
    assert count_of(5) == {"object": "chat.completion.input_tokens", "input_tokens": 5}
    assert model_of("m", 7) == {"id": "m", "object": "model", "created": 7, "owned_by": "strongroom"}


# --- Properties ----------------------------------------------------------------------------------------------------

TEXT = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=8)
NUMBERS = st.floats(max_value=0, allow_nan=False)
ALTERNATIVES = st.lists(st.builds(Alternative, st.binary(max_size=4), NUMBERS), max_size=3).map(tuple)
LOGPROBS = st.lists(st.builds(TokenLogprob, st.binary(max_size=4), NUMBERS, ALTERNATIVES), max_size=3).map(tuple)
TEXTS = st.builds(Delta, content=TEXT, logprobs=LOGPROBS)
ANSWERS = st.builds(
    lambda reasoning, text, calls: [*reasoning, *text, *calls],
    st.lists(st.builds(Delta, reasoning=TEXT), max_size=3),
    st.lists(TEXTS, max_size=4),
    st.sampled_from([(), CALLS]),
)


@given(ANSWERS)
def test_what_a_client_puts_together_from_chunks_is_the_whole(deltas: list[Delta]) -> None:
    """By OpenAI's own code for that."""
    whole = chat().whole(deltas, DONE)
    ChatCompletion.model_validate(whole, strict=True)
    state = ChatCompletionStreamState()
    for chunk in streamed(chat(include_usage=True), deltas):
        state.handle_chunk(ChatCompletionChunk.model_validate(json.loads(json.dumps(chunk, allow_nan=False))))
    together = state.get_final_completion().model_dump()
    [got], [wanted] = together["choices"], whole["choices"]
    assert (got["message"]["content"] or "") == (wanted["message"]["content"] or "")
    assert got["message"].get("reasoning_content") == wanted["message"].get("reasoning_content")
    assert got["finish_reason"] == wanted["finish_reason"]
    assert [
        (call["id"], call["function"]["name"], call["function"]["arguments"])
        for call in got["message"]["tool_calls"] or []
    ] == [
        (call["id"], call["function"]["name"], call["function"]["arguments"])
        for call in wanted["message"].get("tool_calls", [])
    ]
    assert ((got["logprobs"] or {}).get("content") or []) == ((wanted["logprobs"] or {}).get("content") or [])
    assert together["usage"]["prompt_tokens_details"]["cached_tokens"] == 8


@given(st.lists(TEXTS, max_size=5))
def test_the_chunks_of_a_completion_come_to_the_whole(deltas: list[Delta]) -> None:
    [whole] = Completion.model_validate(completion().whole(deltas, DONE), strict=True).model_dump()["choices"]
    chunks = json.loads(json.dumps(streamed(completion(), deltas), allow_nan=False))
    choices = [chunk["choices"][0] for chunk in chunks]
    assert "".join(choice["text"] for choice in choices) == whole["text"]
    for name in ("tokens", "token_logprobs", "top_logprobs", "text_offset"):
        parts = [entry for choice in choices if choice["logprobs"] for entry in choice["logprobs"][name]]
        assert parts == (whole["logprobs"] or {name: []})[name]
