"""From a model's tokens to the answer that a client may see: characters are whole, a stop string never shows, not even
its beginning, and log probabilities come with the text that their tokens made certain.
"""

from __future__ import annotations

from enclave.answer import AnswerText
from enclave.scheduler import Sampled
from vsockrpc.chat import GenerationRequest
from vsockrpc.messages import Alternative, Delta, FinishReason, TokenLogprob


class TextReply:
    """An answer that is text and nothing else."""

    def __init__(self, request: GenerationRequest) -> None:
        self._text = AnswerText(request.stop)
        self._logprobs: list[TokenLogprob] = []

    @property
    def ended(self) -> bool:
        return self._text.stopped

    @property
    def reasoning_tokens(self) -> int:
        return 0

    @property
    def is_constrained(self) -> bool:
        """A grammar has its say on the next token."""
        return True

    def push(self, sampled: Sampled) -> Delta | None:
        if sampled.logprobs is not None:
            logprob, top = sampled.logprobs
            alternatives = tuple(Alternative(piece, each) for piece, each in top)
            self._logprobs.append(TokenLogprob(sampled.piece, logprob, alternatives))
        return self._delta(self._text.push(sampled.piece))

    def finish(self, reason: FinishReason) -> tuple[Delta | None, FinishReason]:
        delta = self._delta(self._text.finish(), is_last=True)
        return delta, "stop" if self._text.stopped else reason  # the last bytes may complete a stop string

    def _delta(self, text: str, *, is_last: bool = False) -> Delta | None:
        if not text and not (is_last and self._logprobs):
            return None
        logprobs, self._logprobs = tuple(self._logprobs), []
        return Delta(text, logprobs=logprobs)
