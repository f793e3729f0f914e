"""What the server and the engine process say to each other over their socket pair: length-prefixed CBOR maps with one
key each.

The engine process is the part that a prompt can drive, so the server holds its bytes to be hostile: bounded before
they are buffered, decoded strictly, and ill-formed ones end the process. The other direction is checked as strictly;
it costs nothing.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Final, TypeAlias

from attestation.errors import StrongroomError
from enclave.generation import ContextExceeded, EngineError, Finished, InvalidRequest, Overloaded
from vsockrpc.messages import FINISH_REASONS, ChatRequest, MessageError, MessageReader, encode_message

MAX_TO_SERVER: Final = 16 << 10
"""Bytes of one message from the engine process."""
MAX_TO_WORKER: Final = 8 << 20
"""Bytes of one message to it: a prompt within :data:`MAX_PROMPT_SIZE`, in CBOR, with every parameter."""
MAX_PROMPT_SIZE: Final = 4 << 20
MAX_DELTA_CHARACTERS: Final = 3 << 10
_MAX_ID: Final = 2**63 - 1
_MAX_TOKENS: Final = 1 << 20


class PipeError(StrongroomError):
    """The other side of the pipe said something that the protocol does not have."""

    def __init__(self, message: str, *, got: object | None = None) -> None:
        super().__init__("engine_protocol", message, got=None if got is None else ascii(got)[:80])


# --- To the engine process -------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Load:
    """The first message: what to be. Sizes are tokens."""

    template: str
    context: int
    batch: int
    threads: int
    queue: int
    uid: int
    parent: int
    """The server's process id: without it there is nothing to work for."""

    def encode(self) -> bytes:
        return encode_message({"load": asdict(self)})


@dataclass(frozen=True, slots=True)
class Generate:
    id: int
    request: ChatRequest

    def encode(self) -> bytes:
        return encode_message({"generate": [self.id, self.request.encode()]})


@dataclass(frozen=True, slots=True)
class Cancel:
    id: int

    def encode(self) -> bytes:
        return encode_message({"cancel": self.id})


ToWorker: TypeAlias = Load | Generate | Cancel


def read_to_worker(reader: MessageReader, data: bytes) -> Iterator[ToWorker]:
    """The messages that ``data`` completes. Raises PipeError, never anything else."""
    for kind, body in _messages(reader, data):
        match kind, body:
            case "load", dict():
                names = ("context", "batch", "threads", "queue", "uid", "parent")
                if body.keys() != {"template", *names} or not isinstance(body["template"], str):
                    raise PipeError("malformed load")
                yield Load(body["template"], *(_uint(body[name], _MAX_ID) for name in names))
            case "generate", [id_, request]:
                yield Generate(_uint(id_, _MAX_ID), _request(request))
            case "cancel", id_:
                yield Cancel(_uint(id_, _MAX_ID))
            case _:
                raise PipeError("unknown message", got=kind)


def _request(value: object) -> ChatRequest:
    """The server has decoded it before: one that does not pass again is not a client's mistake."""
    try:
        return ChatRequest.decode(value)
    except MessageError as error:
        raise PipeError(error.message, got=error.got) from error


# --- To the server ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Ready:
    """The model is loaded and the process is confined. The flags say what this system gave."""

    own_user: bool
    """It runs as a user of its own."""
    seccomp: bool
    """Its system calls are on an allow-list."""

    def encode(self) -> bytes:
        return encode_message({"ready": [self.own_user, self.seccomp]})


@dataclass(frozen=True, slots=True)
class Refused:
    """The process cannot work with this model and these settings, and ends."""

    code: str
    message: str
    expected: str | None
    got: str | None

    def encode(self) -> bytes:
        return encode_message({"refused": [self.code, self.message, self.expected, self.got]})


@dataclass(frozen=True, slots=True)
class Alive:
    """A chunk of some prompt was decoded."""

    def encode(self) -> bytes:
        return encode_message({"alive": None})


@dataclass(frozen=True, slots=True)
class Text:
    id: int
    text: str

    def encode(self) -> bytes:
        return encode_message({"text": [self.id, self.text]})


@dataclass(frozen=True, slots=True)
class End:
    id: int
    finished: Finished

    def encode(self) -> bytes:
        end = self.finished
        return encode_message({"end": [self.id, end.reason, end.prompt_tokens, end.completion_tokens]})


@dataclass(frozen=True, slots=True)
class Failed:
    """The request was refused, for a reason of its own."""

    id: int
    error: EngineError

    def encode(self) -> bytes:
        error = self.error
        return encode_message({"failed": [self.id, error.code, error.message, error.expected, error.got]})


ToServer: TypeAlias = Ready | Refused | Alive | Text | End | Failed


def read_to_server(reader: MessageReader, data: bytes) -> Iterator[ToServer]:
    """The messages that ``data`` completes. Raises PipeError, never anything else."""
    for kind, body in _messages(reader, data):
        match kind, body:
            case "text", [id_, str() as text] if 0 < len(text) <= MAX_DELTA_CHARACTERS:
                yield Text(_uint(id_, _MAX_ID), text)
            case "alive", None:
                yield Alive()
            case "end", [id_, reason, prompt, completion] if reason in FINISH_REASONS:
                counts = _uint(prompt, _MAX_TOKENS), _uint(completion, _MAX_TOKENS)
                yield End(_uint(id_, _MAX_ID), Finished(reason, *counts))
            case "failed", [id_, code, message, expected, got]:
                yield Failed(_uint(id_, _MAX_ID), _error(code, _line(message), _detail(expected), _detail(got)))
            case "ready", [bool() as own_user, bool() as seccomp]:
                yield Ready(own_user, seccomp)
            case "refused", [code, message, expected, got]:
                yield Refused(_line(code), _line(message), _detail(expected), _detail(got))
            case _:
                raise PipeError("unknown or malformed message", got=kind)


def _error(code: object, message: str, expected: str | None, got: str | None) -> EngineError:
    match code:
        case "invalid_request":
            return InvalidRequest(message, expected=expected, got=got)
        case "context_exceeded":
            return ContextExceeded(message, expected=expected, got=got)
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


def _uint(value: object, high: int) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value <= high:
        raise PipeError("a number is out of range", got=value)
    return value


def _line(value: object) -> str:
    if not isinstance(value, str) or len(value) > 512 or not value.isprintable():
        raise PipeError("a text is no printable line", got=value)
    return value


def _detail(value: object) -> str | None:
    return None if value is None else _line(value)
