"""What the server and the engine process say to each other over their socket pair: length-prefixed CBOR maps with one
key each.

The engine process is the part that a prompt can drive, so the server holds its bytes to be hostile: bounded before
they are buffered, decoded strictly, and ill-formed ones end the process. The other direction is checked as strictly;
it costs nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, fields
from typing import Final, TypeAlias, TypeVar

from attestation.errors import StrongroomError
from attestation.model_family import CallFormat, Family, ModelFamily
from attestation.model_memory import KvType
from enclave.config import EngineSettings
from enclave.generation import AnswerExceeded, ContextExceeded, EngineError, InvalidRequest, Overloaded
from vsockrpc.chat import ChatRequest, CompletionRequest, GenerationRequest
from vsockrpc.fields import MessageError
from vsockrpc.messages import Delta, Done, MessageReader, encode_message

R = TypeVar("R")

MAX_TO_SERVER: Final = 128 << 10
"""Bytes of one message from the engine process: a piece that is full in every part has 98 KiB."""
MAX_TO_WORKER: Final = 8 << 20
"""Bytes of one message to it: the largest prompt (:mod:`enclave.prompt_size`), in CBOR, with every parameter."""
MAX_DELTA_CHARACTERS: Final = 3 << 10
"""Of a piece, in each of its texts."""
MAX_DELTA_TOKENS: Final = 16
"""Whose log probabilities a piece has."""
MAX_LINE_CHARACTERS: Final = 512
"""Of each text of an error."""
_MAX_ID: Final = 2**63 - 1
_MAX_TOKENS: Final = 2**32
"""Of a prompt that is counted, as the client's protocol has it: one that fits into no context has a number, too."""


class PipeError(StrongroomError):
    """The other side of the pipe said something that the protocol does not have."""

    def __init__(self, message: str, *, got: object | None = None) -> None:
        super().__init__("engine_protocol", message, got=None if got is None else ascii(got)[:80])


# --- To the engine process -------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Load:
    """The first message: what to be. Sizes are tokens."""

    template: str
    settings: EngineSettings
    """``threads`` is a number of them."""
    parent: int
    """The server's process id: without it there is nothing to work for."""

    def encode(self) -> bytes:
        settings = asdict(self.settings) | {"kv_type": str(self.settings.kv_type)}
        return encode_message({"load": [self.template, settings, self.parent]})


@dataclass(frozen=True, slots=True)
class Generate:
    """In place of a cache secret stands the namespace that is derived from it."""

    id: int
    request: GenerationRequest

    def encode(self) -> bytes:
        method = "chat" if isinstance(self.request, ChatRequest) else "complete"
        return encode_message({method: [self.id, self.request.encode()]})


@dataclass(frozen=True, slots=True)
class Count:
    """How many tokens a prompt has."""

    id: int
    request: ChatRequest

    def encode(self) -> bytes:
        return encode_message({"count": [self.id, self.request.encode()]})


@dataclass(frozen=True, slots=True)
class Cancel:
    id: int

    def encode(self) -> bytes:
        return encode_message({"cancel": self.id})


@dataclass(frozen=True, slots=True)
class Pause:
    """The answer is not read as fast as it is made: it gives its place at work to others until :class:`Resume`."""

    id: int

    def encode(self) -> bytes:
        return encode_message({"pause": self.id})


@dataclass(frozen=True, slots=True)
class Resume:
    id: int

    def encode(self) -> bytes:
        return encode_message({"resume": self.id})


ToWorker: TypeAlias = Load | Generate | Count | Cancel | Pause | Resume


def read_to_worker(reader: MessageReader, data: bytes) -> Iterator[ToWorker]:
    """The messages that ``data`` completes. Raises PipeError, never anything else."""
    for kind, body in _messages(reader, data):
        match kind, body:
            case "load", [str() as template, dict() as settings, parent]:
                yield Load(template, _settings(settings), _uint(parent, _MAX_ID))
            case "chat", [id_, request]:
                yield Generate(_uint(id_, _MAX_ID), _decoded(ChatRequest.decode, request))
            case "complete", [id_, request]:
                yield Generate(_uint(id_, _MAX_ID), _decoded(CompletionRequest.decode, request))
            case "count", [id_, request]:
                yield Count(_uint(id_, _MAX_ID), _decoded(ChatRequest.decode, request))
            case "cancel", id_:
                yield Cancel(_uint(id_, _MAX_ID))
            case "pause", id_:
                yield Pause(_uint(id_, _MAX_ID))
            case "resume", id_:
                yield Resume(_uint(id_, _MAX_ID))
            case _:
                raise PipeError("unknown message", got=kind)


def _settings(value: dict[object, object]) -> EngineSettings:
    if value.keys() != {each.name for each in fields(EngineSettings)}:
        raise PipeError("malformed settings")
    try:
        kv_type = KvType(str(value["kv_type"]))
    except ValueError as error:
        raise PipeError("malformed settings", got=value["kv_type"]) from error
    repack = value["repack"]
    if not isinstance(repack, bool):
        raise PipeError("malformed settings", got=repack)
    numbers = {str(name): _uint(each, _MAX_ID) for name, each in value.items() if name not in ("kv_type", "repack")}
    return EngineSettings(kv_type=kv_type, repack=repack, **numbers)


# --- To the server ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Ready:
    """The model is loaded and the process is confined. The flags say what this system gave."""

    own_user: bool
    """It runs as a user of its own."""
    seccomp: bool
    """Its system calls are on an allow-list."""
    model: ModelFamily
    """How it reads the model's answers."""

    def encode(self) -> bytes:
        model = self.model
        calls = None if model.calls is None else str(model.calls)
        family = [str(model.family), model.reasons, model.opens_reasoning, calls]
        return encode_message({"ready": [self.own_user, self.seccomp, family]})


@dataclass(frozen=True, slots=True)
class Refused:
    """The process cannot work with this model and these settings, and ends."""

    code: str
    message: str
    expected: str | None
    got: str | None

    def encode(self) -> bytes:
        return encode_message({"refused": _texts(self.code, self.message, self.expected, self.got)})


@dataclass(frozen=True, slots=True)
class Alive:
    """A sign of life between two steps: for a while there was nothing else to say."""

    def encode(self) -> bytes:
        return encode_message({"alive": None})


@dataclass(frozen=True, slots=True)
class Piece:
    """What follows of an answer."""

    id: int
    delta: Delta

    def encode(self) -> bytes:
        return encode_message({"piece": [self.id, self.delta.as_map()]})


@dataclass(frozen=True, slots=True)
class End:
    id: int
    done: Done

    def encode(self) -> bytes:
        return encode_message({"end": [self.id, self.done.as_map()]})


@dataclass(frozen=True, slots=True)
class Counted:
    """Of a :class:`Count`."""

    id: int
    tokens: int

    def encode(self) -> bytes:
        return encode_message({"counted": [self.id, self.tokens]})


@dataclass(frozen=True, slots=True)
class Failed:
    """The request was refused, for a reason of its own. What is said of it may quote the request."""

    id: int
    error: EngineError

    def encode(self) -> bytes:
        error = self.error
        return encode_message({"failed": [self.id, *_texts(error.code, error.message, error.expected, error.got)]})


ToServer: TypeAlias = Ready | Refused | Alive | Piece | End | Counted | Failed


def read_to_server(reader: MessageReader, data: bytes) -> Iterator[ToServer]:
    """The messages that ``data`` completes. Raises PipeError, never anything else."""
    for kind, body in _messages(reader, data):
        match kind, body:
            case "piece", [id_, delta]:
                yield Piece(_uint(id_, _MAX_ID), _decoded(Delta.decode, delta))
            case "alive", None:
                yield Alive()
            case "end", [id_, done]:
                yield End(_uint(id_, _MAX_ID), _decoded(Done.decode, done))
            case "counted", [id_, tokens]:
                yield Counted(_uint(id_, _MAX_ID), _uint(tokens, _MAX_TOKENS))
            case "failed", [id_, code, message, expected, got]:
                yield Failed(_uint(id_, _MAX_ID), _error(code, message, expected, got))
            case "ready", [bool() as own_user, bool() as seccomp, family]:
                yield Ready(own_user, seccomp, _family(family))
            case "refused", [code, message, expected, got]:
                yield Refused(_line(code), _line(message), _detail(expected), _detail(got))
            case _:
                raise PipeError("unknown or malformed message", got=kind)


def _family(value: object) -> ModelFamily:
    match value:
        case [str() as family, bool() as reasons, bool() as opens, None | str() as calls]:
            try:
                return ModelFamily(Family(family), reasons, opens, None if calls is None else CallFormat(calls))
            except ValueError as error:
                raise PipeError("an unknown family", got=value) from error
    raise PipeError("malformed family", got=value)


def _error(code: object, message: object, expected: object, got: object) -> EngineError:
    """Its texts may quote a request: one that is no line is made one. Nobody's request may end the process."""
    return _typed(code, _line(_mended(message)), _detail(_mended(expected)), _detail(_mended(got)))


def _mended(value: object) -> object:
    return line(value) if isinstance(value, str) else value


def _typed(code: object, message: str, expected: str | None, got: str | None) -> EngineError:
    match code:
        case "invalid_request":
            return InvalidRequest(message, expected=expected, got=got)
        case "context_exceeded":
            return ContextExceeded(message, expected=expected, got=got)
        case "answer_exceeded":
            return AnswerExceeded(message, expected=expected, got=got)
        case "overloaded":
            return Overloaded(expected=expected, got=got)
    raise PipeError("a request failed for an unknown reason", got=code)


# --- Both ------------------------------------------------------------------------------------------------------------


def _messages(reader: MessageReader, data: bytes) -> Iterator[tuple[str, object]]:
    try:
        for message in reader.feed(data):
            if len(message) != 1:
                raise PipeError("a message has one key", got=len(message))
            yield from message.items()
    except MessageError as error:
        raise PipeError(error.message, got=error.got) from error


def _decoded(decode: Callable[[object], R], value: object) -> R:
    """A request was decoded by the server before: one that does not pass again is not a client's mistake."""
    try:
        return decode(value)
    except MessageError as error:
        raise PipeError(error.message, got=error.got) from error


def _uint(value: object, high: int) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value <= high:
        raise PipeError("a number is out of range", got=value)
    return value


def line(text: str) -> str:
    """``text`` as one printable line: what cannot be printed is escaped, and what is too long cut."""
    shown = text[:MAX_LINE_CHARACTERS]
    return "".join(each if each.isprintable() else ascii(each)[1:-1] for each in shown)[:MAX_LINE_CHARACTERS]


def _texts(*texts: str | None) -> list[str | None]:
    return [None if text is None else line(text) for text in texts]


def _line(value: object) -> str:
    if not isinstance(value, str) or len(value) > MAX_LINE_CHARACTERS or not value.isprintable():
        raise PipeError("a text is no printable line", got=value)
    return value


def _detail(value: object) -> str | None:
    return None if value is None else _line(value)
