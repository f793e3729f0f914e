"""The JSON bodies that any local program may post to the gateway."""

from __future__ import annotations

import json

from strongroom.openai_api import ApiError, parse_completion_request
from vsockrpc.messages import Request


def one_input(data: bytes) -> None:
    try:
        document = json.loads(data)
    except (ValueError, RecursionError):
        return
    try:
        completion = parse_completion_request(document)
    except ApiError as error:
        json.dumps(error.body())
        return
    Request(bytes(16), completion.chat).encode()


def seeds() -> list[bytes]:
    message = {"role": "user", "content": "hi"}
    full = {
        "model": "m",
        "messages": [message, {"role": "developer", "content": [{"type": "text", "text": "x"}]}],
        "stop": "a",
        "max_completion_tokens": 5,
        "temperature": 0.5,
        "stream": True,
        "stream_options": {"include_usage": True},
        "n": 1,
    }
    return [json.dumps(body).encode() for body in ({}, {"messages": [message]}, full)]
