"""Errors: every one typed, with a stable code and, where something was compared, what was expected and what was got."""

from __future__ import annotations

from typing import ClassVar

from attestation.checks import Check, Label


class StrongroomError(Exception):
    """The root of every error that this project raises on purpose.

    ``code`` is stable and meant for programs; the message is for people and may change. ``expected`` and ``got`` are
    texts without secrets: digests, names, numbers. ``exit_code`` is that of a command that ends with it: 1 verdict
    negative, 2 usage, 3 malformed or untrusted, 4 unavailable.
    """

    exit_code: ClassVar[int] = 4

    def __init__(self, code: str, message: str, *, expected: object | None = None, got: object | None = None) -> None:
        super().__init__(message)
        self.code = code
        self.message = message
        self.expected = None if expected is None else str(expected)
        self.got = None if got is None else str(got)

    def __str__(self) -> str:
        text = f"{self.message} [{self.code}]"
        if self.expected is not None:
            text += f"; expected {self.expected}"
        if self.got is not None:
            text += f"; got {self.got}"
        return text

    def as_json(self) -> dict[str, str | None]:
        return {"code": self.code, "message": self.message, "expected": self.expected, "got": self.got}


class EvidenceError(StrongroomError):
    """Evidence that is malformed or that nothing vouches for: nothing in it may be believed.

    ``checks`` holds the verifier's steps up to the one that failed and, as not reached, those behind it; ``labels``
    what must be said beside it. Both are empty on an error that a parser raised on its own.
    """

    exit_code = 3
    checks: tuple[Check, ...] = ()
    labels: frozenset[Label] = frozenset()


class AppraisalError(StrongroomError):
    """Genuine and fresh Evidence of an enclave that the policy does not accept, or a KMS key that it does not.

    ``checks`` holds every step, with each failure; ``code``, ``expected`` and ``got`` are those of the first.
    ``labels`` is what must be said beside it.
    """

    exit_code = 1
    checks: tuple[Check, ...] = ()
    labels: frozenset[Label] = frozenset()


class PolicyError(StrongroomError):
    """A policy that cannot be judged by: unknown, missing or contradictory fields. ``field`` is the field's path."""

    exit_code = 2

    def __init__(
        self,
        code: str,
        message: str,
        *,
        field: str | None = None,
        expected: object | None = None,
        got: object | None = None,
    ) -> None:
        super().__init__(code, message if field is None else f"{field}: {message}", expected=expected, got=got)
        self.field = field
        self._said = message

    def at(self, field: str) -> PolicyError:
        """The same error, said of ``field``: for a reader who knows where in the file the refused value stands."""
        return PolicyError(self.code, self._said, field=field, expected=self.expected, got=self.got)

    def as_json(self) -> dict[str, str | None]:
        return {**super().as_json(), "field": self.field}
