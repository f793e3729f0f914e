"""The words between whoever wants text and whatever makes it: the events of an answer, and how it can fail. The
request is :class:`vsockrpc.messages.ChatRequest`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeAlias

from attestation.errors import StrongroomError
from vsockrpc.messages import FinishReason


class EngineError(StrongroomError):
    """The engine did not answer. Its codes are among those of PROTOCOL.md section 7."""


class InvalidRequest(EngineError):
    """The model's chat template has no place for the conversation, or its vocabulary none for a text of it."""

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
