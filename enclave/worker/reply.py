"""From a model's tokens to the answer that a client may see: characters are whole, what the model thought stands apart
from what it says and from the tools it calls, a stop string never shows, not even its beginning, and log probabilities
come with the text that their tokens made certain.
"""

from __future__ import annotations

import codecs
from collections.abc import Iterable
from dataclasses import dataclass
from enum import Enum, auto
from typing import Final

from attestation.model_family import REASONING_END, REASONING_START
from enclave.worker.answer import AnswerText, beginning_of
from enclave.worker.scheduler import Sampled
from enclave.worker.tool_calls import CallReader
from vsockrpc.messages import MAX_TOKEN_SIZE, Alternative, Delta, FinishReason, TokenLogprob, ToolCallDelta

MAX_HELD_LOGPROBS: Final = 16
"""Tokens whose log probabilities wait for their text to become certain. Each has 2.5 kB."""
_BEGIN_REASONING: Final = f"{REASONING_START}\n"
_END_REASONING: Final = f"\n{REASONING_END}\n\n"


class _Stage(Enum):
    START = auto()
    """Nothing but white space: the model may still begin to reason."""
    REASONING = auto()
    ANSWER = auto()


@dataclass(frozen=True, slots=True)
class Reading:
    """How an answer is to be read, beside its stop strings."""

    reasons: bool = False
    """What stands between the marks of reasoning is that, if the answer begins with it."""
    is_open: bool = False
    """The prompt ended inside the reasoning."""
    must_open: bool = False
    """It begins to reason, whatever it would begin with: a grammar governs the rest."""
    budget: int | None = None
    """Tokens of reasoning at most."""
    has_grammar: bool = False
    """A grammar governs what is behind the reasoning."""
    echo: str = ""
    """Text that the answer begins with."""


PLAIN: Final = Reading()


class Reply:
    """One answer. ``calls`` reads calls out of it. How its text is cut into tokens does not change what comes out."""

    def __init__(self, stops: Iterable[str] = (), reading: Reading = PLAIN, calls: CallReader | None = None) -> None:
        self._reading = reading
        self._calls = calls
        self._text = AnswerText(tuple(stops))
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._stage = _Stage.ANSWER
        if reading.is_open:
            self._stage = _Stage.REASONING
        elif reading.reasons and (reading.must_open or not reading.has_grammar):
            self._stage = _Stage.START
        self._held = ""
        """Of what stands before the answer: white space, and what may become a mark."""
        self._begins = reading.is_open
        """White space is dropped: the reasoning begins, or the answer behind it."""
        self._echo = reading.echo
        self._logprobs: list[TokenLogprob] = []
        self.reasoning_tokens = 0
        """The marks, and what the budget's end forces, do not count."""

    @property
    def ended(self) -> bool:
        return self._text.stopped or (self._calls is not None and self._calls.is_full)

    @property
    def is_constrained(self) -> bool:
        """The grammar has its say on the next token."""
        return self._reading.has_grammar and self._stage is _Stage.ANSWER

    @property
    def forced(self) -> str | None:
        """What has to come next, instead of a token that is sampled."""
        if self._decoder.getstate()[0]:
            return None  # in the middle of a character
        if self._stage is _Stage.START and self._reading.must_open and not self._held:
            return _BEGIN_REASONING
        if self._stage is _Stage.REASONING and self._is_spent:
            return _END_REASONING
        return None

    @property
    def forced_at_end(self) -> str | None:
        """What has to come where the model would end: the answer that a grammar governs is still to come."""
        return _END_REASONING if self._reading.has_grammar and self._stage is _Stage.REASONING else None

    @property
    def _is_spent(self) -> bool:
        return self._reading.budget is not None and self.reasoning_tokens >= self._reading.budget

    def push(self, sampled: Sampled) -> Delta | None:
        if sampled.logprobs is not None:
            logprob, top = sampled.logprobs
            alternatives = tuple(Alternative(piece[:MAX_TOKEN_SIZE], each) for piece, each in top)
            self._logprobs.append(TokenLogprob(sampled.piece[:MAX_TOKEN_SIZE], logprob, alternatives))
        before = self._stage
        reasoning, answer = self._split(self._decoder.decode(sampled.piece))
        is_thought = self._stage is _Stage.REASONING
        if is_thought and before is self._stage and not self._is_spent:
            self.reasoning_tokens += 1
        if self._reading.has_grammar and before is not _Stage.ANSWER:
            answer = ""  # the grammar governs the answer from its first token on, and this one began before
        content, calls = self._read([answer] if self._calls is None else self._calls.push(answer))
        if (
            is_thought
            or self._begins
            or calls
            or (self._holds_many and self._calls is not None and self._calls.is_within)
        ):
            self._logprobs.clear()
        return self._delta(content, reasoning, calls)

    def finish(self, reason: FinishReason) -> tuple[Delta | None, FinishReason]:
        reasoning, answer = self._split(self._decoder.decode(b"", final=True))
        match self._stage:
            case _Stage.START:
                answer += self._held
            case _Stage.REASONING:
                reasoning += self._held.rstrip()
        parts = [answer] if self._calls is None else [*self._calls.push(answer), *self._calls.finish()]
        content, calls = self._read(parts)
        content += self._text.finish()
        delta = self._delta(content, reasoning, calls, is_last=True)
        if self._text.stopped:
            reason = "stop"  # the last bytes may complete a stop string
        elif self._calls is not None and self._calls.count and reason == "stop":
            reason = "tool_calls"
        return delta, reason

    # --- What is what ------------------------------------------------------------------------------------------------

    def _split(self, text: str) -> tuple[str, str]:
        """What of the reasoning is certain, and what of the answer."""
        reasoning = ""
        if self._stage is _Stage.START:
            text = self._held + text
            begun = text.lstrip()
            if begun.startswith(REASONING_START):
                self._stage, self._held, text = _Stage.REASONING, "", begun[len(REASONING_START) :]
                self._begins = True
            elif REASONING_START.startswith(begun):
                self._held = text
                return "", ""
            else:
                self._stage, self._held = _Stage.ANSWER, ""
        if self._stage is _Stage.REASONING:
            reasoning, text = self._reasoning(self._held + text)
        if self._stage is _Stage.ANSWER and self._begins:
            text = text.lstrip()
            self._begins = not text
        return reasoning, text

    def _reasoning(self, text: str) -> tuple[str, str]:
        if self._begins:
            text = text.lstrip()
        thought, mark, rest = text.partition(REASONING_END)
        if mark:
            self._stage, self._held, self._begins = _Stage.ANSWER, "", True
            return thought.rstrip(), rest
        sure = text[: len(text) - beginning_of((REASONING_END,), text, len(REASONING_END))].rstrip()
        self._held = text[len(sure) :]
        self._begins = self._begins and not text
        return sure, ""

    def _read(self, parts: Iterable[str | ToolCallDelta]) -> tuple[str, list[ToolCallDelta]]:
        """The content and the calls, up to a stop string."""
        content, calls = "", list[ToolCallDelta]()
        for part in parts:
            if self._text.stopped:
                break
            if isinstance(part, str):
                content += self._text.push(part)
            else:
                calls.append(part)
        return content, calls

    @property
    def _holds_many(self) -> bool:
        return len(self._logprobs) >= MAX_HELD_LOGPROBS

    def _delta(
        self, content: str, reasoning: str, calls: list[ToolCallDelta], *, is_last: bool = False
    ) -> Delta | None:
        content, self._echo = self._echo + content, ""
        logprobs: tuple[TokenLogprob, ...] = ()
        if content or is_last or self._holds_many:
            logprobs, self._logprobs = tuple(self._logprobs), []
        if not (content or reasoning or calls or logprobs):
            return None
        return Delta(content, reasoning, tuple(calls), logprobs)
