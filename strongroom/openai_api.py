"""OpenAI's API, from its JSON to the messages of :mod:`vsockrpc.chat`: names, not meaning. ``docs/openai.md`` has every
parameter. What comes back is translated in :mod:`strongroom.openai_answers`.

Pure functions. What is not served is refused by name, never ignored in silence: a client that asked for something must
not get an answer without it.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Set
from dataclasses import dataclass
from typing import Any, Final, Generic, TypeVar, cast

from attestation.errors import AppraisalError, EvidenceError, StrongroomError
from strongroom.session import RequestFailed
from vsockrpc.chat import (
    MAX_BIAS,
    MAX_BIASES,
    MAX_COMPLETION_TOKENS,
    MAX_NAME_CHARACTERS,
    MAX_SCHEMA_CHARACTERS,
    MAX_TOOL_CALLS,
    MAX_TOOLS,
    MAX_TOP_LOGPROBS,
    TOOL_MODES,
    ChatRequest,
    CompletionRequest,
)
from vsockrpc.fields import MessageError, choice_of, flag_of, integer_of, list_of, number_of, shown, text_of
from vsockrpc.sealed import SealedError

Fields = dict[str, Any]
Names = Set[str]

_AS_THEY_ARE: Final = frozenset(
    {
        "model",
        "temperature",
        "top_p",
        "top_k",
        "min_p",
        "typical_p",
        "frequency_penalty",
        "presence_penalty",
        "repetition_penalty",
        "seed",
    }
)
"""Of the same name and meaning in a message."""
_FOR_BOTH: Final = _AS_THEY_ARE | {
    "max_tokens",
    "stop",
    "logit_bias",
    "logprobs",
    "stream",
    "stream_options",
    "prompt_cache_key",
}
CHAT_PARAMETERS: Final = _FOR_BOTH | {
    "messages",
    "max_completion_tokens",
    "top_logprobs",
    "response_format",
    "tools",
    "tool_choice",
    "parallel_tool_calls",
    "reasoning_effort",
    "thinking_token_budget",
    "truncation",
}
COMPLETION_PARAMETERS: Final = _FOR_BOTH | {"prompt", "echo"}
WITHOUT_EFFECT: Final = frozenset({"user", "metadata", "store", "safety_identifier", "service_tier"})
"""Of OpenAI's own bookkeeping: they change no answer, and are not passed on."""
NEUTRAL: Final[Mapping[str, object]] = {"n": 1, "best_of": 1, "suffix": "", "modalities": ["text"]}
"""Not served, and accepted where the value asks for nothing."""
UNSUPPORTED: Final = frozenset(NEUTRAL) | {
    "audio",
    "chat_template",
    "chat_template_kwargs",
    "function_call",
    "functions",
    "moderation",
    "prediction",
    "prompt_cache_options",
    "prompt_cache_retention",
    "verbosity",
    "web_search_options",
}
"""Parameters that are not served, as are those of the other endpoint; any other name is unknown. All are OpenAI's but
for a template of the client's own: the one that is used comes with the model and is attested.
"""
REASONING_TOKENS: Final[Mapping[str, int]] = {"none": 0, "minimal": 256, "low": 1024, "medium": 4096, "high": 16384}
"""How many tokens each ``reasoning_effort`` lets a model think."""
COMPLETION_TOKENS: Final = 16
"""Of a completion that names no ``max_tokens``, as OpenAI's API has it."""
MAX_CACHE_KEY_CHARACTERS: Final = 1024
MAX_QUOTED: Final = 128
"""Characters of a client's own text that an error repeats."""
Q = TypeVar("Q", ChatRequest, CompletionRequest)


class ApiError(StrongroomError):
    """An error in OpenAI's shape. ``retry_seconds``: when it is worth another attempt; None: never by itself."""

    def __init__(
        self,
        status: int,
        code: str | None,
        message: str,
        *,
        kind: str = "invalid_request_error",
        param: str | None = None,
        retry_seconds: int | None = None,
    ) -> None:
        super().__init__(code or kind, message)
        self.status = status
        self.openai_code = code
        self.kind = kind
        self.param = param
        self.retry_seconds = retry_seconds

    def body(self) -> dict[str, object]:
        return {"error": {"message": self.message, "type": self.kind, "param": self.param, "code": self.openai_code}}


@dataclass(frozen=True, slots=True)
class Call(Generic[Q]):
    """What a client asks for, and how it wants it delivered."""

    request: Q
    stream: bool
    include_usage: bool
    cache_key: str | None
    limit: str = "max_tokens"
    """The parameter that says how long the answer may be: as it was sent."""


def parse_chat(document: object) -> Call[ChatRequest]:
    """The body of ``/v1/chat/completions``. Raises ApiError naming the parameter."""
    return _parsed(document, CHAT_PARAMETERS, lambda fields: ChatRequest.decode(_chat(fields)))


def parse_completion(document: object) -> Call[CompletionRequest]:
    """The body of ``/v1/completions``. Raises ApiError naming the parameter."""
    return _parsed(document, COMPLETION_PARAMETERS, lambda fields: CompletionRequest.decode(_completion(fields)))


def _parsed(document: object, served: frozenset[str], translate: Callable[[Fields], Q]) -> Call[Q]:
    if not isinstance(document, dict):
        raise ApiError(400, None, "the body is not a JSON object")
    fields = _without_nulls(document)
    for name, value in fields.items():
        if not (name in served or name in WITHOUT_EFFECT or _asks_for_nothing(name, value)):
            known = name in UNSUPPORTED | CHAT_PARAMETERS | COMPLETION_PARAMETERS
            code, quoted = "unsupported_parameter" if known else "unknown_parameter", name[:MAX_QUOTED]
            raise ApiError(400, code, f"this endpoint does not support the parameter {quoted!r}", param=quoted)
    try:
        key = fields.get("prompt_cache_key")
        return Call(
            translate(fields),
            flag_of(fields.get("stream", False), "stream"),
            _include_usage(fields),
            None if key is None else text_of(key, "prompt_cache_key", MAX_CACHE_KEY_CHARACTERS),
            _one_of(fields, "max_tokens", "max_completion_tokens") or "max_tokens",
        )
    except MessageError as error:
        param = _PLACES.sub(r"\1.function.\2", error.param)[:MAX_QUOTED]
        raise ApiError(400, None, _plain(error)[: 2 * MAX_QUOTED], param=param) from error


_PLACES: Final = re.compile(
    r"^(tools\[\d+\]|messages\[\d+\]\.tool_calls\[\d+\]|tool_choice)\.(name|description|arguments)$"
)
"""Which stand one level deeper in OpenAI's JSON."""


def _asks_for_nothing(name: str, value: object) -> bool:
    return name in NEUTRAL and type(value) is type(NEUTRAL[name]) and value == NEUTRAL[name]


def _include_usage(fields: Fields) -> bool:
    options = _map_of(
        fields.get("stream_options", {}), "stream_options", optional={"include_usage", "include_obfuscation"}
    )
    flag_of(options.get("include_obfuscation", False), "stream_options.include_obfuscation")
    wanted = flag_of(options.get("include_usage", False), "stream_options.include_usage")
    if "stream_options" in fields and not fields.get("stream", False):
        raise MessageError("stream_options without a stream", param="stream_options", expected='"stream": true')
    return wanted


# --- Requests ------------------------------------------------------------------------------------------------------


def _chat(fields: Fields) -> Fields:
    body = _generation(fields) | _tools(fields)
    if "messages" in fields:
        body["messages"] = _messages(fields["messages"])
    if "truncation" in fields:
        body["truncation"] = fields["truncation"]
    if "response_format" in fields and (form := _response_format(fields["response_format"])) is not None:
        body["response_format"] = form
        if body.get("tool_choice", "none") != "none":
            raise MessageError("an answer is JSON or a call", param="response_format", expected='"tool_choice": "none"')
        if body.get("stop"):
            raise MessageError("a stop string could end JSON before it is whole", param="stop", expected="none")
    if (limit := _one_of(fields, "max_tokens", "max_completion_tokens")) is not None:
        body["max_tokens"] = integer_of(fields[limit], limit, 1, MAX_COMPLETION_TOKENS)
    if (budget := _one_of(fields, "reasoning_effort", "thinking_token_budget")) is not None:
        body["reasoning_tokens"] = _reasoning_tokens(fields[budget], budget)
    wanted = flag_of(fields.get("logprobs", False), "logprobs")
    top = integer_of(fields.get("top_logprobs", 0), "top_logprobs", 0, MAX_TOP_LOGPROBS)
    if top and not wanted:
        raise MessageError("top_logprobs without logprobs", param="top_logprobs", expected='"logprobs": true')
    return body | {"top_logprobs": top} if wanted else body


def _completion(fields: Fields) -> Fields:
    body = _generation(fields)
    if "prompt" in fields:
        body["prompt"] = prompt = fields["prompt"]
        if isinstance(prompt, list):
            if len(prompt) != 1:
                raise MessageError("one prompt at a time", param="prompt", expected="one text", got=len(prompt))
            [body["prompt"]] = prompt
    body["echo"] = flag_of(fields.get("echo", False), "echo")
    body["max_tokens"] = fields.get("max_tokens", COMPLETION_TOKENS)
    if "logprobs" in fields:
        body["top_logprobs"] = integer_of(fields["logprobs"], "logprobs", 0, MAX_TOP_LOGPROBS)
        if body["echo"]:
            raise MessageError("a prompt's own tokens get no log probabilities", param="logprobs", expected="no echo")
    return body


def _generation(fields: Fields) -> Fields:
    """What both kinds of request have, but for their budget and log probabilities."""
    body = {name: value for name, value in fields.items() if name in _AS_THEY_ARE}
    if "stop" in fields:
        body["stop"] = [fields["stop"]] if isinstance(fields["stop"], str) else fields["stop"]
    if "logit_bias" in fields:
        body["logit_bias"] = _biases(fields["logit_bias"])
    return body


def _biases(value: object) -> list[list[object]]:
    """Tokens are the names of a JSON object, so they come as text."""
    biases = _object(value, "logit_bias")
    list_of([*biases], "logit_bias", MAX_BIASES)
    for token in biases:
        if not re.fullmatch(r"0|[1-9][0-9]{0,9}", token):
            raise MessageError("logit_bias names no token", param="logit_bias", expected="a number", got=shown(token))
    return [[int(token), number_of(bias, "logit_bias", -MAX_BIAS, MAX_BIAS)] for token, bias in biases.items()]


def _one_of(fields: Fields, one: str, other: str) -> str | None:
    """Which of two names for one thing is there; both only with one meaning."""
    if one in fields and other in fields and fields[one] != fields[other]:
        raise MessageError(f"{one} and {other} differ", param=one, expected="one of them")
    return one if one in fields else other if other in fields else None


def _reasoning_tokens(value: object, name: str) -> int:
    if name == "reasoning_effort":
        return REASONING_TOKENS[choice_of(value, name, tuple(REASONING_TOKENS))]
    return integer_of(value, name, 0, MAX_COMPLETION_TOKENS)


def _response_format(value: object) -> Fields | None:
    """None for text."""
    kind = value.get("type") if isinstance(value, dict) else value
    kind = choice_of(kind, "response_format.type", ("text", "json_object", "json_schema"))
    wanted = _map_of(
        value, "response_format", required={"type"} | ({"json_schema"} if kind == "json_schema" else set())
    )
    if kind == "text":
        return None
    if kind == "json_object":
        return {}
    param = "response_format.json_schema"
    schema = _map_of(wanted["json_schema"], param, required={"name", "schema"}, optional={"strict", "description"})
    text_of(schema["name"], f"{param}.name", MAX_NAME_CHARACTERS)
    flag_of(schema.get("strict", False), f"{param}.strict")  # a schema is held to either way
    return {"schema": _json_text(schema["schema"], f"{param}.schema")}


# --- Tools and messages --------------------------------------------------------------------------------------------


def _tools(fields: Fields) -> Fields:
    entries = list_of(fields.get("tools", []), "tools", MAX_TOOLS)
    choice = _tool_choice(fields["tool_choice"]) if "tool_choice" in fields else "auto"
    if not entries:
        if choice not in ("none", "auto"):
            raise MessageError("there are no tools to choose from", param="tool_choice", expected="tools")
        if "parallel_tool_calls" in fields:
            raise MessageError("there are no tools to call", param="parallel_tool_calls", expected="tools")
        return {}
    tools = [_tool(f"tools[{index}]", entry, may_be_strict=choice != "auto") for index, entry in enumerate(entries)]
    body: Fields = {"tools": tools, "tool_choice": choice}
    if "parallel_tool_calls" in fields:
        body["parallel_tool_calls"] = fields["parallel_tool_calls"]
    return body


def _tool(param: str, entry: object, *, may_be_strict: bool) -> Fields:
    function = _function(param, entry, required={"name"}, optional={"description", "parameters", "strict"})
    if flag_of(function.get("strict", False), f"{param}.function.strict") and not may_be_strict:
        raise MessageError(
            "only calls that have to be made are held to a schema",
            param=f"{param}.function.strict",
            expected='"tool_choice": "required"',
        )
    tool = {"name": function["name"], "description": function.get("description", "")}
    if "parameters" in function:
        tool["parameters"] = _json_text(function["parameters"], f"{param}.function.parameters")
    return tool


def _tool_choice(value: object) -> object:
    if isinstance(value, dict):
        return _function("tool_choice", value, required={"name"})
    return choice_of(value, "tool_choice", TOOL_MODES)


def _messages(value: object) -> object:
    if not isinstance(value, list):
        return value
    called: dict[str, object] = {}
    return [_message(f"messages[{index}]", entry, called) for index, entry in enumerate(value)]


def _message(param: str, entry: object, called: dict[str, object]) -> Fields:
    """``developer`` is OpenAI's newer name for ``system``. An earlier turn's reasoning is dropped, which chat templates
    do too. They have no place for a participant's name: only a tool's message may have one, that of the function whose
    call it answers, which templates are given anyway. ``called`` has the functions' names by their calls' ids so far.
    """
    optional = {"content", "name", "tool_calls", "tool_call_id", "reasoning_content"}
    message = _map_of(entry, param, required={"role"}, optional=optional)
    calls = list_of(message.get("tool_calls", []), f"{param}.tool_calls", MAX_TOOL_CALLS)
    if "content" not in message and not calls:
        raise MessageError("a message has no content", param=f"{param}.content", expected="text")
    role = message["role"]
    body: Fields = {"role": "system" if role == "developer" else role, "content": message.get("content", "")}
    if isinstance(body["content"], list):
        body["content"] = "".join(
            _text_part(f"{param}.content[{index}]", part) for index, part in enumerate(body["content"])
        )
    if calls:
        body["tool_calls"] = [_tool_call(f"{param}.tool_calls[{index}]", call) for index, call in enumerate(calls)]
        called |= {call["id"]: call["name"] for call in body["tool_calls"] if isinstance(call["id"], str)}
    if "tool_call_id" in message:
        body["tool_call_id"] = message["tool_call_id"]
    if "name" in message:
        answered = message.get("tool_call_id")
        if not isinstance(answered, str) or message["name"] != called.get(answered):
            raise MessageError(
                "chat templates have no place for a participant's name",
                param=f"{param}.name",
                expected="none, or in a tool's message that of the function that was called",
            )
    return body


def _text_part(param: str, part: object) -> str:
    if not isinstance(part, dict) or part.get("type") != "text" or not isinstance(part.get("text"), str):
        raise MessageError("only parts of text are supported", param=param, expected='"type": "text"')
    return cast(str, part["text"])


def _tool_call(param: str, entry: object) -> Fields:
    function = _function(param, entry, required={"name", "arguments"}, beside={"id"})
    return {"id": cast(Fields, entry)["id"], **function}


def _function(
    param: str, entry: object, *, required: Names, optional: Names = frozenset(), beside: Names = frozenset()
) -> Fields:
    """What stands in ``function`` of an object of that type. Other types are not served."""
    outer = _map_of(entry, param, required={"type", "function"} | beside)
    choice_of(outer["type"], f"{param}.type", ("function",))
    return _map_of(outer["function"], f"{param}.function", required=required, optional=optional)


# --- JSON ----------------------------------------------------------------------------------------------------------


def _without_nulls(value: Mapping[str, object]) -> Fields:
    """OpenAI's clients may send what is not there as null."""
    return {name: entry for name, entry in value.items() if entry is not None}


def _object(value: object, param: str) -> Fields:
    if not isinstance(value, dict):
        raise MessageError(f"{param} is not an object", param=param, expected="object", got=type(value).__name__)
    return value


def _map_of(value: object, param: str, *, required: Names = frozenset(), optional: Names = frozenset()) -> Fields:
    """An object with these fields and no others. Raises MessageError with a field's whole path."""
    fields, known = _without_nulls(_object(value, param)), required | optional
    for name in fields:
        if name not in known:
            raise MessageError(
                f"unknown field {shown(name)!r}", param=f"{param}.{shown(name)}", expected=", ".join(sorted(known))
            )
    for name in sorted(required):
        if name not in fields:
            raise MessageError(f"missing field {name!r}", param=f"{param}.{name}", expected="present", got="absent")
    return fields


def _json_text(value: object, param: str) -> str:
    """A schema as JSON text, its keys in the order they came in."""
    try:
        text = json.dumps(_object(value, param), ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    except (ValueError, RecursionError) as error:  # NaN and infinities, which JSON has none of; too deep
        raise MessageError(f"{param} is not valid JSON", param=param, expected="JSON") from error
    return text_of(text, param, MAX_SCHEMA_CHARACTERS)


# --- Errors --------------------------------------------------------------------------------------------------------


def _plain(error: StrongroomError) -> str:
    text = error.message
    if error.expected is not None:
        text += f": expected {error.expected}"
    if error.got is not None:
        text += f", got {error.got}"
    return text


def api_error_of(error: StrongroomError, *, prompt: str = "messages", limit: str = "max_tokens") -> ApiError:
    """Any error of a request as OpenAI would say it. ``prompt`` names the parameter that holds the prompt, ``limit``
    the one that bounds the answer.

    Only the enclave itself can say that nothing has run, so only then is there a time for another attempt: OpenAI's
    clients try again by themselves after 429 and 5xx, each time as a new request, and a parent that forges faults could
    have one prompt run three times.
    """
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
            return ApiError(400, "context_length_exceeded", _plain(error), param=prompt)
        case "answer_exceeded":
            return ApiError(400, None, _plain(error), param=limit)
        case "unknown_model":
            return ApiError(404, "model_not_found", _plain(error), param="model")
        case "invalid_request":
            return ApiError(400, None, _plain(error))
        case "overloaded":
            retry = error.retry_seconds or 1 if isinstance(error, RequestFailed) else None
            return ApiError(429, "overloaded", _plain(error), kind="rate_limit_error", retry_seconds=retry)
        case _:
            return ApiError(503, error.code, _plain(error), kind="server_error")
