"""What is inside the sealed channel: CBOR maps in the shape of OpenAI's API. PROTOCOL.md section 7. What a request asks
a model for is in :mod:`vsockrpc.chat`.

Every type here decodes strictly (unknown, missing and ill-typed fields are refused, every number and length is
bounded) and encodes to what it decodes from.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from io import BytesIO
from typing import Any, Final, Literal, NoReturn, Self, TypeAlias, cast

import cbor2

from attestation.errors import StrongroomError
from vsockrpc.chat import (
    MAX_CONTENT_CHARACTERS,
    MAX_ID_CHARACTERS,
    MAX_MODEL_CHARACTERS,
    MAX_NAME_CHARACTERS,
    MAX_TOOL_CALLS,
    MAX_TOP_LOGPROBS,
    ChatRequest,
    CompletionRequest,
)
from vsockrpc.fields import (
    MessageError,
    bytes_of,
    choice_of,
    fields_of,
    integer_of,
    list_of,
    number_of,
    shown,
    text_of,
)

VERSION: Final = 1
REQUEST_ID_SIZE: Final = 16
MAX_MESSAGE_SIZE: Final = 4 * 1024 * 1024
MAX_CODE_CHARACTERS: Final = 64
MAX_FAILURE_CHARACTERS: Final = 4096
"""Of a failure's message, and of what was expected and got."""
MAX_RETRY_SECONDS: Final = 3600
MAX_DELTA_LOGPROBS: Final = 1024
MAX_TOKEN_SIZE: Final = 128
"""Bytes of what a token stands for that are told with its log probability: of a longer one its beginning."""
MANIFEST_SIZE: Final = 48
_LENGTH_SIZE = 4

FinishReason: TypeAlias = Literal["stop", "length", "tool_calls"]
FINISH_REASONS: Final[tuple[FinishReason, ...]] = ("stop", "length", "tool_calls")


# --- Framing -------------------------------------------------------------------------------------------------------


def encode_message(message: Mapping[str, object]) -> bytes:
    body = cbor2.dumps(message, canonical=True)
    return len(body).to_bytes(_LENGTH_SIZE, "big") + body


class MessageReader:
    """Cuts a direction's content into messages."""

    def __init__(self, limit: int = MAX_MESSAGE_SIZE) -> None:
        self._limit = limit
        self._buffer = bytearray()

    def feed(self, content: bytes) -> Iterator[dict[str, object]]:
        """Every message that is now complete. Raises MessageError."""
        self._buffer += content
        while len(self._buffer) >= _LENGTH_SIZE:
            length = int.from_bytes(self._buffer[:_LENGTH_SIZE], "big")
            if length > self._limit:
                raise MessageError("a message is too large", param="message", expected=f"<= {self._limit}", got=length)
            if len(self._buffer) < _LENGTH_SIZE + length:
                return
            body = bytes(self._buffer[_LENGTH_SIZE : _LENGTH_SIZE + length])
            del self._buffer[: _LENGTH_SIZE + length]
            yield _decode_map(body)

    @property
    def buffered(self) -> int:
        return len(self._buffer)


def _refuse_tag(*_: object) -> NoReturn:
    raise ValueError("a CBOR tag")


_REFUSE_TAGS: dict[int, Callable[[Any, bool], Any]] = dict.fromkeys((*range(300), 1004, 43_000, 55_799), _refuse_tag)
"""Tags that cbor2 gives a meaning (numbers of any length, regular expressions, shared references) do work at the
sender's wish."""


def _decode_map(body: bytes) -> dict[str, object]:
    stream = BytesIO(body)
    try:
        value = cbor2.CBORDecoder(
            stream,
            tag_hook=_refuse_tag,
            semantic_decoders=_REFUSE_TAGS,
            max_depth=8,
            allow_indefinite=False,
            allow_duplicate_keys=False,
            strict_hashable_types=True,
        ).decode()
    except (cbor2.CBORDecodeError, ValueError, RecursionError) as error:
        raise MessageError("a message is not valid CBOR", param="message") from error
    if stream.tell() != len(body):
        raise MessageError("bytes follow a message's map", param="message", expected=stream.tell(), got=len(body))
    if not isinstance(value, dict) or not all(isinstance(key, str) for key in value):
        raise MessageError("a message is not a map with text keys", param="message")
    return cast(dict[str, object], value)


# --- Requests ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class DescribeRequest:
    """Asks what is served."""

    def encode(self) -> dict[str, object]:
        return {}

    @classmethod
    def decode(cls, value: object) -> Self:
        fields_of(value, param="body", required=set())
        return cls()


@dataclass(frozen=True, slots=True)
class CountRequest:
    """Asks how many tokens the prompt has that ``of`` would be."""

    of: ChatRequest

    def encode(self) -> dict[str, object]:
        return self.of.encode()

    @classmethod
    def decode(cls, value: object) -> Self:
        return cls(ChatRequest.decode(value))


RequestBody: TypeAlias = ChatRequest | CompletionRequest | CountRequest | DescribeRequest
METHODS: Final[Mapping[str, type[RequestBody]]] = {
    "chat": ChatRequest,
    "complete": CompletionRequest,
    "count": CountRequest,
    "describe": DescribeRequest,
}
_NAMES: Final = {kind: name for name, kind in METHODS.items()}


@dataclass(frozen=True, slots=True)
class Request:
    """A request and its random 16-byte id, which a second attempt repeats."""

    id: bytes
    body: RequestBody

    def encode(self) -> bytes:
        method = _NAMES[type(self.body)]
        return encode_message({"v": VERSION, "id": self.id, "method": method, "body": self.body.encode()})

    @classmethod
    def decode(cls, message: dict[str, object]) -> Self:
        """Raises MessageError."""
        fields = fields_of(message, param="request", required={"v", "id", "method", "body"})
        integer_of(fields["v"], "v", VERSION, VERSION)
        identity = bytes_of(fields["id"], "id", REQUEST_ID_SIZE)
        method = choice_of(fields["method"], "method", tuple(METHODS))
        return cls(identity, METHODS[method].decode(fields["body"]))


# --- Answers -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Start:
    """The request was accepted. ``model`` is the name in the model's manifest."""

    model: str

    def encode(self) -> bytes:
        return encode_message({"start": {"model": self.model}})


@dataclass(frozen=True, slots=True)
class Alternative:
    """One of the likeliest tokens in a place of the answer."""

    token: bytes
    """What it stands for."""
    logprob: float
    """Natural logarithm."""


@dataclass(frozen=True, slots=True)
class TokenLogprob:
    """A token of the answer, under the model's own distribution: before any parameter of the request."""

    token: bytes
    logprob: float
    top: tuple[Alternative, ...] = ()

    def encode(self) -> list[object]:
        return [self.token, self.logprob, [[each.token, each.logprob] for each in self.top]]

    @classmethod
    def decode(cls, value: object, param: str) -> Self:
        token, logprob, top = _tuple_of(value, param, 3)
        alternatives = []
        for entry in list_of(top, param, MAX_TOP_LOGPROBS):
            likely, its = _tuple_of(entry, param, 2)
            alternatives.append(Alternative(_token_of(likely, param), _logprob_of(its, param)))
        return cls(_token_of(token, param), _logprob_of(logprob, param), tuple(alternatives))


@dataclass(frozen=True, slots=True)
class ToolCallDelta:
    """A part of a call: its beginning has ``id`` and ``name``, all have what follows of the arguments' JSON text."""

    index: int
    arguments: str
    id: str | None = None
    name: str | None = None

    def encode(self) -> dict[str, object]:
        body: dict[str, object] = {"index": self.index, "arguments": self.arguments}
        if self.id is not None and self.name is not None:
            body |= {"id": self.id, "name": self.name}
        return body

    @classmethod
    def decode(cls, value: object, param: str) -> Self:
        begins = isinstance(value, dict) and ("id" in value or "name" in value)
        fields = fields_of(value, param=param, required={"index", "arguments", *(("id", "name") if begins else ())})
        index = integer_of(fields["index"], param, 0, MAX_TOOL_CALLS - 1)
        arguments = text_of(fields["arguments"], param, MAX_CONTENT_CHARACTERS)
        if not begins:
            return cls(index, arguments)
        identity = text_of(fields["id"], param, MAX_ID_CHARACTERS)
        return cls(index, arguments, identity, text_of(fields["name"], param, MAX_NAME_CHARACTERS))


@dataclass(frozen=True, slots=True)
class Delta:
    """What follows of the answer: of its text, of the reasoning before it, of calls. Never empty."""

    content: str = ""
    reasoning: str = ""
    tool_calls: tuple[ToolCallDelta, ...] = ()
    logprobs: tuple[TokenLogprob, ...] = ()
    """Of the tokens whose text this is, where the request asked for them."""

    def as_map(self) -> dict[str, object]:
        body: dict[str, object] = {name: text for name in ("content", "reasoning") if (text := getattr(self, name))}
        if self.tool_calls:
            body["tool_calls"] = [call.encode() for call in self.tool_calls]
        if self.logprobs:
            body["logprobs"] = [token.encode() for token in self.logprobs]
        return body

    def encode(self) -> bytes:
        return encode_message({"delta": self.as_map()})

    @classmethod
    def decode(cls, value: object) -> Self:
        optional = frozenset({"content", "reasoning", "tool_calls", "logprobs"})
        fields = fields_of(value, param="delta", required=set(), optional=optional)
        if not any(fields.values()):
            raise MessageError("a delta is empty", param="delta", expected="something")
        calls = list_of(fields.get("tool_calls", []), "tool_calls", MAX_TOOL_CALLS)
        tokens = list_of(fields.get("logprobs", []), "logprobs", MAX_DELTA_LOGPROBS)
        return cls(
            text_of(fields.get("content", ""), "content", MAX_CONTENT_CHARACTERS),
            text_of(fields.get("reasoning", ""), "reasoning", MAX_CONTENT_CHARACTERS),
            tuple(ToolCallDelta.decode(call, "tool_calls") for call in calls),
            tuple(TokenLogprob.decode(token, "logprobs") for token in tokens),
        )


@dataclass(frozen=True, slots=True)
class Usage:
    """Counts of tokens."""

    prompt_tokens: int
    completion_tokens: int
    """Reasoning among them."""
    cached_tokens: int = 0
    """Of the prompt: computed for an earlier request of the same cache secret."""
    reasoning_tokens: int = 0

    def as_map(self) -> dict[str, object]:
        return {name: getattr(self, name) for name in _COUNTS}

    @classmethod
    def decode(cls, value: object) -> Self:
        fields = fields_of(value, param="usage", required=set(_COUNTS))
        return cls(*(integer_of(fields[name], name, 0, 2**32) for name in _COUNTS))


_COUNTS: Final = ("prompt_tokens", "completion_tokens", "cached_tokens", "reasoning_tokens")


@dataclass(frozen=True, slots=True)
class Done:
    """The answer is whole."""

    finish_reason: FinishReason
    usage: Usage
    dropped_messages: int = 0
    """The oldest ones, which did not fit: only where the request allowed that."""

    def as_map(self) -> dict[str, object]:
        return {
            "finish_reason": self.finish_reason,
            "usage": self.usage.as_map(),
            "dropped_messages": self.dropped_messages,
        }

    def encode(self) -> bytes:
        return encode_message({"done": self.as_map()})

    @classmethod
    def decode(cls, value: object) -> Self:
        fields = fields_of(value, param="done", required={"finish_reason", "usage", "dropped_messages"})
        reason = choice_of(fields["finish_reason"], "finish_reason", FINISH_REASONS)
        dropped = integer_of(fields["dropped_messages"], "dropped_messages", 0, 2**32)
        return cls(cast(FinishReason, reason), Usage.decode(fields["usage"]), dropped)


@dataclass(frozen=True, slots=True)
class Counted:
    """The answer to a :class:`CountRequest`."""

    prompt_tokens: int

    def encode(self) -> bytes:
        return encode_message({"counted": {"prompt_tokens": self.prompt_tokens}})


@dataclass(frozen=True, slots=True)
class Description:
    """What an enclave serves: the model's name, its context in tokens and its manifest's digest (48 bytes)."""

    name: str
    context: int
    manifest: bytes

    def encode(self) -> bytes:
        return encode_message({"model": {"name": self.name, "context": self.context, "manifest": self.manifest}})


@dataclass(frozen=True, slots=True)
class Failure:
    """The request failed, for the reason that ``code`` names."""

    code: str
    message: str
    expected: str | None = None
    got: str | None = None
    retry_seconds: int | None = None
    """After which it is worth another attempt, of an enclave that has too much to do."""

    @classmethod
    def of(cls, error: StrongroomError) -> Self:
        """What of ``error`` a client is told: as much as fits into a message that it accepts."""
        expected, got = (
            None if text is None else text[:MAX_FAILURE_CHARACTERS] for text in (error.expected, error.got)
        )
        retry = getattr(error, "retry_seconds", None)
        return cls(error.code[:MAX_CODE_CHARACTERS], error.message[:MAX_FAILURE_CHARACTERS], expected, got, retry)

    def encode(self) -> bytes:
        names = ("code", "message", "expected", "got", "retry_seconds")
        return encode_message({"error": {name: getattr(self, name) for name in names}})

    @classmethod
    def decode(cls, value: object) -> Self:
        names = ("code", "message", "expected", "got", "retry_seconds")
        fields = fields_of(value, param="error", required=set(names))
        limit, retry = MAX_FAILURE_CHARACTERS, fields["retry_seconds"]
        expected, got = (
            None if fields[name] is None else text_of(fields[name], name, limit) for name in ("expected", "got")
        )
        return cls(
            text_of(fields["code"], "code", MAX_CODE_CHARACTERS),
            text_of(fields["message"], "message", limit),
            expected,
            got,
            None if retry is None else integer_of(retry, "retry_seconds", 1, MAX_RETRY_SECONDS),
        )


Answer: TypeAlias = Start | Delta | Done | Counted | Description | Failure


def decode_answer(message: dict[str, object]) -> Answer:
    """One message of an answer. Raises MessageError."""
    if len(message) != 1:
        raise MessageError("an answer's message has one key", param="answer", expected=1, got=len(message))
    [(kind, body)] = message.items()
    match kind:
        case "start":
            fields = fields_of(body, param=kind, required={"model"})
            return Start(text_of(fields["model"], "model", MAX_MODEL_CHARACTERS))
        case "delta":
            return Delta.decode(body)
        case "done":
            return Done.decode(body)
        case "counted":
            fields = fields_of(body, param=kind, required={"prompt_tokens"})
            return Counted(integer_of(fields["prompt_tokens"], "prompt_tokens", 0, 2**32))
        case "model":
            fields = fields_of(body, param=kind, required={"name", "context", "manifest"})
            return Description(
                text_of(fields["name"], "name", MAX_MODEL_CHARACTERS),
                integer_of(fields["context"], "context", 1, 2**32),
                bytes_of(fields["manifest"], "manifest", MANIFEST_SIZE),
            )
        case "error":
            return Failure.decode(body)
        case _:
            expected = "start, delta, done, counted, model or error"
            raise MessageError("unknown message", param="answer", expected=expected, got=shown(kind))


def _tuple_of(value: object, param: str, size: int) -> list[object]:
    entries = list_of(value, param, size)
    if len(entries) != size:
        raise MessageError(f"{param} has too few entries", param=param, expected=size, got=len(entries))
    return entries


def _token_of(value: object, param: str) -> bytes:
    if not isinstance(value, bytes) or len(value) > MAX_TOKEN_SIZE:
        raise MessageError(f"{param} has no token", param=param, expected=f"at most {MAX_TOKEN_SIZE} bytes")
    return value


def _logprob_of(value: object, param: str) -> float:
    """Also of a token that could not have come: CBOR has an infinity, and what ``number_of`` bounds has none."""
    return number_of(value, param, float("-inf"), 0)
