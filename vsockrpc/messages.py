"""What is inside the sealed channel: CBOR maps in the shape of OpenAI's chat API. PROTOCOL.md section 7.

Every type here decodes strictly (unknown, missing and ill-typed fields are refused, every number and length is
bounded) and encodes to what it decodes from.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from io import BytesIO
from typing import Any, Literal, NoReturn, TypeAlias, cast

import cbor2

from attestation.errors import StrongroomError

VERSION = 1
REQUEST_ID_SIZE = 16
MAX_MESSAGE_SIZE = 4 * 1024 * 1024
MAX_CHAT_MESSAGES = 1024
MAX_CONTENT_CHARACTERS = 1024 * 1024
MAX_STOPS = 16
MAX_STOP_CHARACTERS = 256
MAX_COMPLETION_TOKENS = 1 << 20
MAX_SEED = 2**32 - 2
"""llama.cpp takes the next one to mean "a random seed", which a person who names a seed does not want."""
MAX_CODE_CHARACTERS = 64
MAX_FAILURE_CHARACTERS = 4096
"""Of a failure's message, and of what was expected and got."""
_LENGTH_SIZE = 4

Role: TypeAlias = Literal["system", "user", "assistant"]
FinishReason: TypeAlias = Literal["stop", "length"]
ROLES: tuple[Role, ...] = ("system", "user", "assistant")
FINISH_REASONS: tuple[FinishReason, ...] = ("stop", "length")


class MessageError(StrongroomError):
    """A message that is not one of those in PROTOCOL.md section 7. ``param`` names the field."""

    exit_code = 2

    def __init__(self, message: str, *, param: str, expected: object | None = None, got: object | None = None) -> None:
        super().__init__("invalid_request", message, expected=expected, got=got)
        self.param = param


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


# --- Fields --------------------------------------------------------------------------------------------------------


def _shown(value: object) -> str:
    """What an error says of a value that should have been a text. A whole structure as text costs as much as it is
    large."""
    return value[:64] if isinstance(value, str) else type(value).__name__


def _fields(
    value: object, *, param: str, required: set[str], optional: frozenset[str] = frozenset()
) -> dict[str, object]:
    if not isinstance(value, dict):
        raise MessageError(f"{param} is not a map", param=param, expected="map", got=type(value).__name__)
    for key in value:
        if key not in required and key not in optional:
            name = _shown(key)
            raise MessageError(f"unknown field {name!r}", param=name, expected=", ".join(sorted(required | optional)))
    for key in sorted(required):
        if key not in value:
            raise MessageError(f"missing field {key!r}", param=key, expected="present", got="absent")
    return cast(dict[str, object], value)


def _text(value: object, param: str, limit: int) -> str:
    if not isinstance(value, str):
        raise MessageError(f"{param} is not text", param=param, expected="text", got=type(value).__name__)
    if len(value) > limit:
        raise MessageError(f"{param} is too long", param=param, expected=f"<= {limit} characters", got=len(value))
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise MessageError(f"{param} holds a lone surrogate", param=param, expected="Unicode scalar values") from error
    return value


def _integer(value: object, param: str, low: int, high: int) -> int:
    if not isinstance(value, int) or isinstance(value, bool):
        raise MessageError(f"{param} is not an integer", param=param, expected="integer", got=type(value).__name__)
    if not low <= value <= high:
        raise MessageError(f"{param} is out of range", param=param, expected=f"{low}..{high}", got=value)
    return value


def _number(value: object, param: str, low: float, high: float) -> float:
    if not isinstance(value, int | float) or isinstance(value, bool):
        raise MessageError(f"{param} is not a number", param=param, expected="number", got=type(value).__name__)
    if not low <= value <= high:  # also refuses NaN
        raise MessageError(f"{param} is out of range", param=param, expected=f"{low}..{high}", got=value)
    return float(value)


def _list(value: object, param: str, limit: int) -> list[object]:
    if not isinstance(value, list | tuple):
        raise MessageError(f"{param} is not a list", param=param, expected="list", got=type(value).__name__)
    if len(value) > limit:
        raise MessageError(f"{param} has too many entries", param=param, expected=f"<= {limit}", got=len(value))
    return list(value)


# --- Requests ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class ChatMessage:
    role: Role
    content: str

    @classmethod
    def decode(cls, value: object, param: str) -> ChatMessage:
        fields = _fields(value, param=param, required={"role", "content"})
        role = fields["role"]
        if role not in ROLES:
            raise MessageError("unknown role", param=f"{param}.role", expected=" | ".join(ROLES), got=_shown(role))
        return cls(role, _text(fields["content"], f"{param}.content", MAX_CONTENT_CHARACTERS))


@dataclass(frozen=True, slots=True)
class ChatRequest:
    """A chat completion, with OpenAI's names and meanings. ``None`` leaves the choice to the enclave.

    What :meth:`decode` returns is within every bound of PROTOCOL.md section 7. Construction checks nothing: whoever
    is sent a request decodes it, the enclave and its engine process too.
    """

    messages: tuple[ChatMessage, ...]
    """In order; the last is what is answered."""
    model: str | None = None
    max_tokens: int | None = None
    """Tokens of the answer at most."""
    temperature: float = 1.0
    """0 always takes the likeliest token."""
    top_p: float = 1.0
    """More than 0."""
    top_k: int = 0
    """0 for all tokens."""
    min_p: float = 0.0
    seed: int | None = None
    stop: tuple[str, ...] = ()
    """The answer ends before the first of these."""

    def encode(self) -> dict[str, object]:
        body: dict[str, object] = {
            "messages": [{"role": message.role, "content": message.content} for message in self.messages],
            "temperature": self.temperature,
            "top_p": self.top_p,
            "top_k": self.top_k,
            "min_p": self.min_p,
        }
        if self.model is not None:
            body["model"] = self.model
        if self.max_tokens is not None:
            body["max_tokens"] = self.max_tokens
        if self.seed is not None:
            body["seed"] = self.seed
        if self.stop:
            body["stop"] = list(self.stop)
        return body

    @classmethod
    def decode(cls, value: object) -> ChatRequest:
        """Raises MessageError naming the field."""
        optional = frozenset({"model", "max_tokens", "temperature", "top_p", "top_k", "min_p", "seed", "stop"})
        fields = _fields(value, param="body", required={"messages"}, optional=optional)
        entries = _list(fields["messages"], "messages", MAX_CHAT_MESSAGES)
        if not entries:
            raise MessageError("messages is empty", param="messages", expected="at least 1", got=0)
        model, tokens, seed = fields.get("model"), fields.get("max_tokens"), fields.get("seed")
        stops = _list(fields.get("stop", []), "stop", MAX_STOPS)
        request = cls(
            messages=tuple(ChatMessage.decode(entry, f"messages[{index}]") for index, entry in enumerate(entries)),
            model=None if model is None else _text(model, "model", 256),
            max_tokens=None if tokens is None else _integer(tokens, "max_tokens", 1, MAX_COMPLETION_TOKENS),
            temperature=_number(fields.get("temperature", 1.0), "temperature", 0, 2),
            top_p=_number(fields.get("top_p", 1.0), "top_p", 0, 1),
            top_k=_integer(fields.get("top_k", 0), "top_k", 0, 1000),
            min_p=_number(fields.get("min_p", 0.0), "min_p", 0, 1),
            seed=None if seed is None else _integer(seed, "seed", 0, MAX_SEED),
            stop=tuple(_text(stop, f"stop[{index}]", MAX_STOP_CHARACTERS) for index, stop in enumerate(stops)),
        )
        if request.top_p == 0:
            raise MessageError("top_p is out of range", param="top_p", expected="more than 0", got=0)
        if "" in request.stop:
            raise MessageError("an empty stop string stops everything", param="stop", expected="text", got="''")
        return request


@dataclass(frozen=True, slots=True)
class DescribeRequest:
    """Asks what is served."""

    def encode(self) -> dict[str, object]:
        return {}

    @classmethod
    def decode(cls, value: object) -> DescribeRequest:
        _fields(value, param="body", required=set())
        return cls()


@dataclass(frozen=True, slots=True)
class Request:
    """A request and its random 16-byte id, which a second attempt repeats."""

    id: bytes
    body: ChatRequest | DescribeRequest

    def encode(self) -> bytes:
        method = "chat" if isinstance(self.body, ChatRequest) else "describe"
        return encode_message({"v": VERSION, "id": self.id, "method": method, "body": self.body.encode()})

    @classmethod
    def decode(cls, message: dict[str, object]) -> Request:
        """Raises MessageError."""
        fields = _fields(message, param="request", required={"v", "id", "method", "body"})
        _integer(fields["v"], "v", VERSION, VERSION)
        identity = fields["id"]
        if not isinstance(identity, bytes) or len(identity) != REQUEST_ID_SIZE:
            raise MessageError("id is not a byte string of its size", param="id", expected=f"{REQUEST_ID_SIZE} bytes")
        match fields["method"]:
            case "chat":
                return cls(identity, ChatRequest.decode(fields["body"]))
            case "describe":
                return cls(identity, DescribeRequest.decode(fields["body"]))
            case other:
                raise MessageError("unknown method", param="method", expected="chat | describe", got=_shown(other))


# --- Answers -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Start:
    """The request was accepted. ``model`` is the name in the model's manifest."""

    model: str

    def encode(self) -> bytes:
        return encode_message({"start": {"model": self.model}})


@dataclass(frozen=True, slots=True)
class Delta:
    """Text of the answer."""

    text: str

    def encode(self) -> bytes:
        return encode_message({"delta": self.text})


@dataclass(frozen=True, slots=True)
class Done:
    """The answer is whole. Counts are tokens."""

    finish_reason: FinishReason
    prompt_tokens: int
    completion_tokens: int

    def encode(self) -> bytes:
        usage = {"prompt_tokens": self.prompt_tokens, "completion_tokens": self.completion_tokens}
        return encode_message({"done": {"finish_reason": self.finish_reason, "usage": usage}})


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

    @classmethod
    def of(cls, error: StrongroomError) -> Failure:
        """What of ``error`` a client is told: as much as fits into a message that it accepts."""
        expected, got = (
            None if text is None else text[:MAX_FAILURE_CHARACTERS] for text in (error.expected, error.got)
        )
        return cls(error.code[:MAX_CODE_CHARACTERS], error.message[:MAX_FAILURE_CHARACTERS], expected, got)

    def encode(self) -> bytes:
        body = {"code": self.code, "message": self.message, "expected": self.expected, "got": self.got}
        return encode_message({"error": body})


Answer: TypeAlias = Start | Delta | Done | Description | Failure


def decode_answer(message: dict[str, object]) -> Answer:
    """One message of an answer. Raises MessageError."""
    if len(message) != 1:
        raise MessageError("an answer's message has one key", param="answer", expected=1, got=len(message))
    [(kind, body)] = message.items()
    match kind:
        case "start":
            fields = _fields(body, param=kind, required={"model"})
            return Start(_text(fields["model"], "model", 256))
        case "delta":
            return Delta(_text(body, kind, MAX_CONTENT_CHARACTERS))
        case "done":
            fields = _fields(body, param=kind, required={"finish_reason", "usage"})
            if fields["finish_reason"] not in FINISH_REASONS:
                raise MessageError("unknown finish reason", param="finish_reason", expected=" | ".join(FINISH_REASONS))
            usage = _fields(fields["usage"], param="usage", required={"prompt_tokens", "completion_tokens"})
            counts = [_integer(usage[name], name, 0, 2**32) for name in ("prompt_tokens", "completion_tokens")]
            return Done(fields["finish_reason"], *counts)
        case "model":
            fields = _fields(body, param=kind, required={"name", "context", "manifest"})
            manifest = fields["manifest"]
            if not isinstance(manifest, bytes) or len(manifest) != 48:
                raise MessageError("manifest is not a digest", param="manifest", expected="48 bytes")
            return Description(
                _text(fields["name"], "name", 256), _integer(fields["context"], "context", 1, 2**32), manifest
            )
        case "error":
            fields = _fields(body, param=kind, required={"code", "message", "expected", "got"})
            limit = MAX_FAILURE_CHARACTERS
            texts = [None if fields[name] is None else _text(fields[name], name, limit) for name in ("expected", "got")]
            code, text = _text(fields["code"], "code", MAX_CODE_CHARACTERS), _text(fields["message"], "message", limit)
            return Failure(code, text, *texts)
        case _:
            raise MessageError("unknown message", param="answer", expected="start, delta, done, model or error")
