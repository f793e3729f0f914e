"""The words between whoever wants text and whatever makes it: a request, the events of its answer, and how it can
fail.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final, TypeAlias

from attestation.errors import StrongroomError
from vsockrpc.messages import (
    MAX_CHAT_MESSAGES,
    MAX_COMPLETION_TOKENS,
    MAX_STOP_CHARACTERS,
    MAX_STOPS,
    ROLES,
    FinishReason,
    Role,
)

MAX_TEMPERATURE: Final = 2.0
MAX_TOP_K: Final = 1000
MAX_SEED: Final = 2**32 - 1


class EngineError(StrongroomError):
    """The engine did not answer. Its codes are those of PROTOCOL.md section 7, and ``unavailable``."""


class InvalidRequest(EngineError):
    """A parameter is out of its bounds, or the model's chat template has no place for the conversation."""

    exit_code = 2

    def __init__(self, message: str, *, expected: object | None = None, got: object | None = None) -> None:
        super().__init__("invalid_request", message, expected=expected, got=got)


class ContextExceeded(EngineError):
    """The prompt does not fit into the context."""

    exit_code = 2

    def __init__(self, message: str, *, expected: object | None = None, got: object | None = None) -> None:
        super().__init__("context_exceeded", message, expected=expected, got=got)


class Overloaded(EngineError):
    """As many requests as may wait are waiting."""

    def __init__(self, *, expected: object | None = None, got: object | None = None) -> None:
        super().__init__("overloaded", "the engine's queue is full", expected=expected, got=got)


class EngineFailed(EngineError):
    """The engine process ended, fell silent or broke its protocol while it worked on the request."""

    def __init__(self, message: str) -> None:
        super().__init__("engine_failed", message)


class Unavailable(EngineError):
    """No engine process came up within the time that a request waits for one."""

    def __init__(self, message: str) -> None:
        super().__init__("unavailable", message)


class EngineRefused(EngineError):
    """An engine cannot be started with this model and these settings.

    Codes: ``model_refused``, ``bad_template``, ``context_exceeded``, ``engine_failed``.
    """


@dataclass(frozen=True, slots=True)
class GenerateRequest:
    """A conversation to go on with. Construction checks every bound and raises InvalidRequest: what is out of them
    never reaches llama.cpp.
    """

    messages: tuple[tuple[Role, str], ...]
    """Role and content, in order; the last is what is answered."""
    max_tokens: int | None = None
    """Tokens of the answer at most; None for what the context has room for."""
    temperature: float = 1.0
    """0 always takes the likeliest token."""
    top_p: float = 1.0
    top_k: int = 0
    """0 for all tokens."""
    min_p: float = 0.0
    seed: int | None = None
    """None for a random one."""
    stop: tuple[str, ...] = ()
    """The answer ends before the first of these."""

    def __post_init__(self) -> None:
        _within("the number of messages", len(self.messages), 1, MAX_CHAT_MESSAGES)
        for role, content in self.messages:
            if role not in ROLES:
                raise InvalidRequest("unknown role", expected=" | ".join(ROLES), got=ascii(role)[:64])
            _require_text("a message", content)
        if self.max_tokens is not None:
            _within("max_tokens", self.max_tokens, 1, MAX_COMPLETION_TOKENS)
        _within("temperature", self.temperature, 0.0, MAX_TEMPERATURE)
        _within("top_p", self.top_p, 0.0, 1.0)
        if self.top_p == 0:
            raise InvalidRequest("top_p is out of range", expected="more than 0", got=0)
        _within("top_k", self.top_k, 0, MAX_TOP_K)
        _within("min_p", self.min_p, 0.0, 1.0)
        if self.seed is not None:
            _within("seed", self.seed, 0, MAX_SEED)
        _within("the number of stop strings", len(self.stop), 0, MAX_STOPS)
        for stop in self.stop:
            _require_text("a stop string", stop)
            _within("the length of a stop string", len(stop), 1, MAX_STOP_CHARACTERS)

    @property
    def content_size(self) -> int:
        """Bytes of all contents in UTF-8."""
        return sum(len(content.encode("utf-8")) for _, content in self.messages)


@dataclass(frozen=True, slots=True)
class TextDelta:
    """Text of the answer that follows what came before: never empty, and always whole characters."""

    text: str


@dataclass(frozen=True, slots=True)
class Finished:
    """The answer is whole, because the model or a stop string ended it (``stop``) or because its budget did
    (``length``). Counts are tokens.
    """

    reason: FinishReason
    prompt_tokens: int
    completion_tokens: int


GenerationEvent: TypeAlias = TextDelta | Finished


def _within(what: str, value: float, low: float, high: float) -> None:
    """Refuses what is out of ``low..high``, NaN included, and what only looks like a number of the right type."""
    right_type = isinstance(value, float | int) if isinstance(low, float) else isinstance(value, int)
    if not right_type or isinstance(value, bool) or not low <= value <= high:
        raise InvalidRequest(f"{what} is out of range", expected=f"{low}..{high}", got=ascii(value)[:64])


def _require_text(what: str, text: str) -> None:
    """A lone surrogate has no UTF-8 and would fail much later."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise InvalidRequest(f"{what} holds a lone surrogate", expected="Unicode scalar values") from error
