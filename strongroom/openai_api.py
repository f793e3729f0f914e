"""OpenAI's chat completion API, translated: names, not meaning.

Pure functions between JSON and :mod:`vsockrpc.messages`. What this version does not do is refused, never ignored in
silence: a client that asked for tools must not get an answer without them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, cast

from attestation.errors import AppraisalError, EvidenceError, StrongroomError
from vsockrpc.chat import ChatRequest
from vsockrpc.fields import MessageError
from vsockrpc.messages import Done
from vsockrpc.sealed import SealedError

TRANSLATED = frozenset(
    {
        "messages",
        "model",
        "max_tokens",
        "max_completion_tokens",
        "temperature",
        "top_p",
        "top_k",
        "min_p",
        "seed",
        "stop",
    }
)
HANDLED_HERE = frozenset({"stream", "stream_options"})
WITHOUT_EFFECT = frozenset({"user", "metadata", "store", "safety_identifier", "prompt_cache_key", "service_tier"})
"""Of OpenAI's own bookkeeping: they change no answer, and are not passed on."""
NEUTRAL: Mapping[str, object] = {
    "n": 1,
    "frequency_penalty": 0,
    "presence_penalty": 0,
    "logit_bias": {},
    "logprobs": False,
    "modalities": ["text"],
    "response_format": {"type": "text"},
    "tools": [],
    "tool_choice": "none",
}
"""Not served, and accepted where the value asks for nothing."""
UNSUPPORTED = NEUTRAL.keys() | {
    "audio",
    "function_call",
    "functions",
    "parallel_tool_calls",
    "prediction",
    "reasoning_effort",
    "top_logprobs",
    "verbosity",
    "web_search_options",
}
"""Parameters of OpenAI's that are not served; any other name is unknown."""
MAX_QUOTED = 128
"""Characters of a client's own text that an error repeats."""


class ApiError(StrongroomError):
    """An error in OpenAI's shape."""

    def __init__(
        self,
        status: int,
        code: str | None,
        message: str,
        *,
        kind: str = "invalid_request_error",
        param: str | None = None,
    ) -> None:
        super().__init__(code or kind, message)
        self.status = status
        self.openai_code = code
        self.kind = kind
        self.param = param

    def body(self) -> dict[str, object]:
        return {"error": {"message": self.message, "type": self.kind, "param": self.param, "code": self.openai_code}}


@dataclass(frozen=True, slots=True)
class CompletionRequest:
    """A chat completion request, and how its client wants it delivered."""

    chat: ChatRequest
    stream: bool
    include_usage: bool


def parse_completion_request(document: object) -> CompletionRequest:
    """Raises ApiError naming the parameter."""
    if not isinstance(document, dict):
        raise ApiError(400, None, "the body is not a JSON object")
    fields = {name: value for name, value in document.items() if value is not None}
    for name, value in fields.items():
        if name in TRANSLATED or name in HANDLED_HERE or name in WITHOUT_EFFECT:
            continue
        if name in NEUTRAL and value == NEUTRAL[name]:
            continue
        code = "unsupported_parameter" if name in UNSUPPORTED else "unknown_parameter"
        quoted = name[:MAX_QUOTED]
        raise ApiError(400, code, f"this server does not support the parameter {quoted!r}", param=quoted)
    body = {name: value for name, value in fields.items() if name in TRANSLATED}
    budget = "max_completion_tokens" if "max_completion_tokens" in body else "max_tokens"
    if "max_completion_tokens" in body:
        if body.get("max_tokens", body["max_completion_tokens"]) != body["max_completion_tokens"]:
            raise ApiError(400, None, "max_tokens and max_completion_tokens differ", param="max_tokens")
        body["max_tokens"] = body.pop("max_completion_tokens")
    if isinstance(body.get("stop"), str):
        body["stop"] = [body["stop"]]
    if isinstance(body.get("messages"), list):
        body["messages"] = [_message(index, entry) for index, entry in enumerate(body["messages"])]
    stream, options = fields.get("stream", False), fields.get("stream_options", {})
    if not isinstance(stream, bool):
        raise ApiError(400, None, "stream is not a boolean", param="stream")
    if not isinstance(options, dict) or not options.keys() <= {"include_usage", "include_obfuscation"}:
        raise ApiError(400, None, "stream_options takes include_usage", param="stream_options")
    include_usage = options.get("include_usage", False)
    if not isinstance(include_usage, bool):
        raise ApiError(400, None, "include_usage is not a boolean", param="stream_options.include_usage")
    try:
        chat = ChatRequest.decode(body)
    except MessageError as error:
        param = budget if error.param == "max_tokens" else error.param[:MAX_QUOTED]
        raise ApiError(400, None, _plain(error)[: 2 * MAX_QUOTED], param=param) from error
    return CompletionRequest(chat, stream, include_usage)


def _message(index: int, entry: object) -> object:
    """OpenAI lets a content be a list of parts; text parts are joined, others refused. ``developer`` is its newer name
    for ``system``. A participant's ``name`` is dropped: chat templates have no place for it.
    """
    if not isinstance(entry, dict):
        return entry
    entry = {name: value for name, value in entry.items() if value is not None and name != "name"}
    if entry.get("role") == "developer":
        entry["role"] = "system"
    content = entry.get("content")
    if isinstance(content, list):
        texts = []
        for part in content:
            if not isinstance(part, dict) or part.get("type") != "text" or not isinstance(part.get("text"), str):
                raise ApiError(400, None, "only text parts are supported", param=f"messages[{index}].content")
            texts.append(part["text"])
        entry["content"] = "".join(texts)
    return entry


def _plain(error: StrongroomError) -> str:
    text = error.message
    if error.expected is not None:
        text += f": expected {error.expected}"
    if error.got is not None:
        text += f", got {error.got}"
    return text


def api_error_of(error: StrongroomError) -> ApiError:
    """Any error of a request as OpenAI would say it."""
    match error:
        case ApiError():
            return error
        case EvidenceError() | AppraisalError():
            text = f"the enclave was not accepted, so nothing was sent to it: {error}"
            return ApiError(503, "attestation_failed", text, kind="server_error")
        case SealedError():
            return ApiError(502, error.code, _plain(error), kind="server_error")
    match error.code:
        case "context_exceeded":
            return ApiError(400, "context_length_exceeded", _plain(error), param="messages")
        case "unknown_model":
            return ApiError(404, "model_not_found", _plain(error), param="model")
        case "invalid_request":
            return ApiError(400, None, _plain(error))
        case "overloaded":
            return ApiError(429, "overloaded", _plain(error), kind="rate_limit_error")
        case _:
            return ApiError(503, error.code, _plain(error), kind="server_error")


@dataclass(frozen=True, slots=True)
class CompletionShape:
    """One completion's answer, whole or in chunks. ``created`` is in seconds since 1970."""

    identity: str
    created: int
    model: str

    def _frame(self, kind: str, **fields: object) -> dict[str, Any]:
        return {"id": self.identity, "object": kind, "created": self.created, "model": self.model, **fields}

    def whole(self, text: str, done: Done) -> dict[str, Any]:
        message = {"role": "assistant", "content": text, "refusal": None}
        choice = {"index": 0, "message": message, "finish_reason": done.finish_reason, "logprobs": None}
        return self._frame("chat.completion", choices=[choice], usage=usage_of(done))

    def chunk(self, delta: dict[str, str], finish_reason: str | None = None) -> dict[str, Any]:
        choice = {"index": 0, "delta": delta, "finish_reason": finish_reason, "logprobs": None}
        return self._frame("chat.completion.chunk", choices=[choice])

    def usage_chunk(self, done: Done) -> dict[str, Any]:
        return self._frame("chat.completion.chunk", choices=[], usage=usage_of(done))


def usage_of(done: Done) -> dict[str, int]:
    return {
        "prompt_tokens": done.usage.prompt_tokens,
        "completion_tokens": done.usage.completion_tokens,
        "total_tokens": done.usage.prompt_tokens + done.usage.completion_tokens,
    }


def model_of(name: str, created: int) -> dict[str, Any]:
    return cast(dict[str, Any], {"id": name, "object": "model", "created": created, "owned_by": "strongroom"})
