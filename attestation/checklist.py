"""One walk through the verifier's steps, as it is being made: what each found, in their order."""

from __future__ import annotations

from collections.abc import Mapping
from types import TracebackType

from attestation.checks import STEPS, Check, Label, Status
from attestation.errors import AppraisalError, EvidenceError


class Checklist:
    """The checks of one verification, in the order of its ``steps``: their numbers, each with its name."""

    def __init__(self, steps: Mapping[int, str], *labels: Label) -> None:
        self._steps = steps
        self._checks: list[Check] = []
        self.labels: frozenset[Label] = frozenset(labels)
        """They leave with every error and every result."""

    def proving(self, step: int) -> Finding:
        """A step that ends the verification when it fails: its EvidenceError leaves with the whole checklist."""
        return Finding(self, step)

    def add(self, check: Check) -> None:
        self._checks.append(check)

    def passes_by(self, step: int, reason: str) -> None:
        """A step that has nothing to judge, and why."""
        self.add(Check(step, STEPS[step], Status.NOT_APPLICABLE, explanation=reason))

    def require_accepted(self, what: str) -> None:
        """Raises AppraisalError, with every check, when one has failed; ``what`` was judged."""
        failures = [check for check in self._checks if check.status is Status.FAILED]
        if failures:
            first, names = failures[0], ", ".join(check.name for check in failures)
            error = AppraisalError(
                first.code or "", f"the policy refuses {what}: {names}", expected=first.expected, got=first.got
            )
            error.checks, error.labels = self.complete(), self.labels
            raise error

    def complete(self) -> tuple[Check, ...]:
        """Every check so far, and each step without one as not reached."""
        reached = {check.step for check in self._checks}
        behind = [step for step in self._steps if step not in reached]
        return (*self._checks, *(Check(step, self._steps[step], Status.NOT_REACHED) for step in behind))


class Finding:
    """A step that is being proven, over a ``with`` block; what it compares becomes the check's expected and got."""

    __slots__ = ("_checklist", "_step", "expected", "explanation", "got")

    def __init__(self, checklist: Checklist, step: int) -> None:
        self._checklist = checklist
        self._step = step
        self.expected: str | None = None
        self.got: str | None = None
        self.explanation: str | None = None

    def __enter__(self) -> Finding:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None, /
    ) -> None:
        step, checklist = self._step, self._checklist
        if error is None:
            checklist.add(Check(step, STEPS[step], Status.PASSED, self.expected, self.got, None, self.explanation))
        elif isinstance(error, EvidenceError):
            failed = Check(step, STEPS[step], Status.FAILED, error.expected, error.got, error.code, error.message)
            checklist.add(failed)
            error.checks, error.labels = checklist.complete(), checklist.labels
