"""The words between whoever wants text and whatever makes it: the events of an answer, and how it can fail. Requests
are those of :mod:`vsockrpc.chat`.
"""

from __future__ import annotations

from typing import TypeAlias

from attestation.errors import StrongroomError
from vsockrpc.messages import Delta, Done


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


class AnswerExceeded(EngineError):
    """``max_tokens`` is more than an answer may have here."""

    exit_code = 2

    def __init__(self, message: str, *, expected: object | None = None, got: object | None = None) -> None:
        super().__init__("answer_exceeded", message, expected=expected, got=got)


class Overloaded(EngineError):
    """As many requests as may wait are waiting."""

    def __init__(
        self, *, expected: object | None = None, got: object | None = None, retry_seconds: int | None = None
    ) -> None:
        """``retry_seconds``: when there may be room again."""
        super().__init__("overloaded", "the engine's queue is full", expected=expected, got=got)
        self.retry_seconds = retry_seconds


class NotRead(EngineError):
    """The client took too long to read what there is of its answer."""

    def __init__(self) -> None:
        super().__init__("deadline_exceeded", "the answer was not read in time")


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

    Codes: ``model_refused``, ``bad_template``, ``context_exceeded``, ``not_enough_memory``, ``engine_failed``.
    """


GenerationEvent: TypeAlias = Delta | Done
