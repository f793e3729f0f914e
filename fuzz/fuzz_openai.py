"""The JSON bodies that any local program may post to the gateway."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

from strongroom.openai_api import ApiError, Call, parse_chat, parse_completion
from vsockrpc.messages import CountRequest, MessageReader, Request

PARSERS: tuple[Callable[[object], Call[Any]], ...] = (parse_chat, parse_completion)


def one_input(data: bytes) -> None:
    try:
        document = json.loads(data)
    except (ValueError, RecursionError):
        return
    for parse in PARSERS:
        try:
            call = parse(document)
        except ApiError as error:
            json.dumps(error.body())
            continue
        _arrives(Request(bytes(16), call.request))
        if parse is parse_chat:
            _arrives(Request(bytes(16), CountRequest(call.request)))


def _arrives(request: Request) -> None:
    """What the gateway sends an enclave accepts, as it was meant."""
    [message] = MessageReader().feed(request.encode())
    assert Request.decode(message) == request


def seeds() -> list[bytes]:
    message = {"role": "user", "content": "hi"}
    schema = {"type": "object", "properties": {"z": {"type": "string"}, "a": {"enum": [1, None]}}, "required": ["z"]}
    called = {"id": "call_1", "type": "function", "function": {"name": "look", "arguments": '{"z": ""}'}}
    generation = {
        "model": "m",
        "temperature": 0.5,
        "top_p": 0.9,
        "top_k": 40,
        "min_p": 0.05,
        "typical_p": 0.9,
        "frequency_penalty": 0.1,
        "presence_penalty": -0.1,
        "repetition_penalty": 1.1,
        "seed": 7,
        "logit_bias": {"5": 1, "6": -100},
        "stop": "a",
        "max_tokens": 5,
        "stream": True,
        "stream_options": {"include_usage": True},
        "prompt_cache_key": "mine",
        "n": 1,
    }
    chat = {
        "messages": [
            {"role": "developer", "content": [{"type": "text", "text": "x"}]},
            message,
            {"role": "assistant", "content": None, "tool_calls": [called]},
            {"role": "tool", "content": "found", "tool_call_id": "call_1"},
        ],
        "tools": [{"type": "function", "function": {"name": "look", "description": "d", "parameters": schema}}],
        "tool_choice": {"type": "function", "function": {"name": "look"}},
        "parallel_tool_calls": False,
        "reasoning_effort": "low",
        "truncation": "auto",
        "logprobs": True,
        "top_logprobs": 3,
    }
    formatted = {
        "messages": [message],
        "response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": schema, "strict": True}},
        "thinking_token_budget": 100,
        "max_completion_tokens": 5,
    }
    completion = {"prompt": ["once upon"], "echo": True}
    bodies = [{}, {"messages": [message]}, generation | chat, formatted, generation | completion]
    return [json.dumps(body).encode() for body in [*bodies, {"prompt": "once", "logprobs": 5}]]
