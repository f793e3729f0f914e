"""What the engine does next, as pure data: no clock, no model, no I/O. The loop in :mod:`enclave.worker` carries it
out.

One sequence at a time, the others wait in the order of their arrival. A prompt is decoded in chunks, so that between
two steps, never later, a cancelled request is gone.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeAlias

from enclave.answer import AnswerText
from enclave.generation import ContextExceeded, Finished, Overloaded, TextDelta
from vsockrpc.messages import FinishReason


@dataclass(frozen=True, slots=True)
class Step:
    """One decode: ``tokens`` of ``request`` stand at the positions from ``start``. A step with ``start`` 0 begins on
    an empty context.
    """

    request: int
    tokens: Sequence[int]
    start: int
    samples: bool
    """The next token is wanted: these are the last of the prompt, or the answer's newest."""


@dataclass(frozen=True, slots=True)
class Sampled:
    """The token that came out of a step."""

    token: int
    piece: bytes
    """What it stands for in text; perhaps a part of a character, perhaps nothing."""
    ends: bool
    """It is one of the model's end-of-generation tokens."""


@dataclass(frozen=True, slots=True)
class PromptRead:
    """A chunk of the prompt was decoded; its answer has not begun. A sign of life."""


Output: TypeAlias = TextDelta | Finished | PromptRead


@dataclass(slots=True)
class _Sequence:
    request: int
    prompt: Sequence[int]
    budget: int
    """Tokens of the answer at most."""
    text: AnswerText
    decoded: int = 0
    """Positions that the context holds."""
    completion: int = 0
    newest: int | None = None
    """The sampled token that the next step decodes."""


class Scheduler:
    """``context`` and ``chunk`` are tokens, ``queue`` is how many requests may wait behind the one in work."""

    def __init__(self, *, context: int, chunk: int, queue: int) -> None:
        if not 0 < chunk <= context or queue < 0:
            raise ValueError("a chunk has at least one token and fits into the context")
        self._context = context
        self._chunk = chunk
        self._queue = queue
        self._active: _Sequence | None = None
        self._waiting: deque[_Sequence] = deque()

    @property
    def idle(self) -> bool:
        return self._active is None and not self._waiting

    def admit(self, request: int, prompt: Sequence[int], *, max_tokens: int | None, stop: Sequence[str]) -> None:
        """Takes a request in. Raises ContextExceeded when the prompt leaves no room for one token of an answer, and
        Overloaded.
        """
        if not prompt:
            raise ValueError("a prompt has at least one token")
        room = self._context - len(prompt)
        if room < 1:
            raise ContextExceeded(
                "the prompt is longer than the context",
                expected=f"<= {self._context - 1} tokens",
                got=f"{len(prompt)} tokens",
            )
        if self._active is not None and len(self._waiting) >= self._queue:
            raise Overloaded(expected=f"<= {self._queue} waiting", got=len(self._waiting) + 1)
        sequence = _Sequence(request, prompt, min(max_tokens or room, room), AnswerText(stop))
        if self._active is None:
            self._active = sequence
        else:
            self._waiting.append(sequence)

    def cancel(self, request: int) -> bool:
        """Forgets a request, wherever it stands; False when there is none of that number. Its next step is never
        planned.
        """
        if self._active is not None and self._active.request == request:
            self._advance()
            return True
        for sequence in self._waiting:
            if sequence.request == request:
                self._waiting.remove(sequence)
                return True
        return False

    def plan(self) -> Step | None:
        """The next step; None when there is nothing to do. Planning changes nothing."""
        active = self._active
        if active is None:
            return None
        if active.newest is not None:
            return Step(active.request, (active.newest,), active.decoded, samples=True)
        chunk = active.prompt[active.decoded : active.decoded + self._chunk]
        return Step(active.request, chunk, active.decoded, samples=active.decoded + len(chunk) == len(active.prompt))

    def apply(self, step: Step, sampled: Sampled | None) -> Sequence[Output]:
        """Takes in what ``step``, the one just planned, came to; ``sampled`` is there exactly when it samples."""
        active = self._active
        if (
            active is None
            or (active.request, active.decoded) != (step.request, step.start)
            or (sampled is None) == step.samples
        ):
            raise ValueError("not the result of the planned step")
        active.decoded += len(step.tokens)
        if sampled is None:
            return (PromptRead(),)
        if sampled.ends:
            return self._finish(active, "stop", active.text.finish())
        active.completion += 1
        active.newest = sampled.token
        text = active.text.push(sampled.piece)
        if active.text.stopped:
            return self._finish(active, "stop", text)
        if active.completion == active.budget:
            return self._finish(active, "length", text + active.text.finish())
        return (TextDelta(text),) if text else ()

    def _finish(self, active: _Sequence, reason: FinishReason, text: str) -> Sequence[Output]:
        if active.text.stopped:
            reason = "stop"  # the last bytes completed a stop string
        self._advance()
        finished = Finished(reason, len(active.prompt), active.completion)
        return (TextDelta(text), finished) if text else (finished,)

    def _advance(self) -> None:
        self._active = self._waiting.popleft() if self._waiting else None
