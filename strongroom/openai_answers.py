"""An enclave's answer in the shapes of OpenAI's API, whole or in chunks. Pure functions: ``docs/openai.md`` says where
the shapes have more than OpenAI's, or less.
"""

from __future__ import annotations

import codecs
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from typing import Any, ClassVar, Final

from vsockrpc.messages import Delta, Done, TokenLogprob, ToolCallDelta, Usage

Json = dict[str, Any]

LEAST_LOGPROB: Final = -9999.0
"""What OpenAI gives for a token that could not have come. JSON has no infinity."""


class AnswerShape(ABC):
    """One answer: either :meth:`whole`, or :meth:`opening`, a :meth:`piece` of each delta, and :meth:`closing`."""

    ID_PREFIX: ClassVar[str]
    PROMPT: ClassVar[str]
    """The parameter that holds the prompt."""

    def __init__(
        self, identity: str, created: int, model: str, *, include_usage: bool = False, says_dropped: bool = False
    ) -> None:
        """``created`` is in seconds since 1970. ``include_usage``: chunks have usage, the last one; ``says_dropped``:
        how many messages did not fit is said, also when it is none.
        """
        self._frame: Json = {"id": identity, "created": created, "model": model}
        self._include_usage = include_usage
        self._says_dropped = says_dropped

    @abstractmethod
    def whole(self, deltas: Sequence[Delta], done: Done) -> Json:
        """The whole answer as one object."""

    @abstractmethod
    def opening(self) -> Iterator[Json]:
        """What comes before the first piece."""

    @abstractmethod
    def piece(self, delta: Delta) -> Json:
        """A chunk with what is new."""

    @abstractmethod
    def closing(self, done: Done) -> Iterator[Json]:
        """What comes after the last piece: why it ended, and usage where that was asked for."""

    def _whole(self, kind: str, choice: Json, done: Done) -> Json:
        return {**self._frame, "object": kind, "choices": [choice], "usage": usage_of(done.usage)} | self._extra(done)

    def _chunk(self, kind: str, choice: Json) -> Json:
        return {**self._frame, "object": kind, "choices": [choice]} | ({"usage": None} if self._include_usage else {})

    def _last(self, kind: str, choice: Json, done: Done) -> Iterator[Json]:
        yield self._chunk(kind, choice) | self._extra(done)
        if self._include_usage:
            yield {**self._frame, "object": kind, "choices": [], "usage": usage_of(done.usage)}

    def _extra(self, done: Done) -> Json:
        return {"strongroom": {"dropped_messages": done.dropped_messages}} if self._says_dropped else {}


class ChatShape(AnswerShape):
    """``/v1/chat/completions``."""

    ID_PREFIX = "chatcmpl-"
    PROMPT = "messages"

    def whole(self, deltas: Sequence[Delta], done: Done) -> Json:
        content = "".join(delta.content for delta in deltas)
        reasoning = "".join(delta.reasoning for delta in deltas)
        calls = _whole_calls(call for delta in deltas for call in delta.tool_calls)
        message: Json = {"role": "assistant", "content": content if content or not calls else None, "refusal": None}
        if reasoning:
            message["reasoning_content"] = reasoning
        if calls:
            message["tool_calls"] = calls
        choice = self._choice("message", message, _logprobs_of(deltas), done.finish_reason)
        return self._whole("chat.completion", choice, done)

    def opening(self) -> Iterator[Json]:
        yield self._chunk(_CHAT_CHUNK, self._choice("delta", {"role": "assistant", "content": ""}))

    def piece(self, delta: Delta) -> Json:
        fields: Json = {}
        if delta.reasoning:
            fields["reasoning_content"] = delta.reasoning
        if delta.content:
            fields["content"] = delta.content
        if delta.tool_calls:
            fields["tool_calls"] = [_call_chunk(call) for call in delta.tool_calls]
        return self._chunk(_CHAT_CHUNK, self._choice("delta", fields, _logprobs_of([delta])))

    def closing(self, done: Done) -> Iterator[Json]:
        return self._last(_CHAT_CHUNK, self._choice("delta", {}, None, done.finish_reason), done)

    @staticmethod
    def _choice(name: str, body: Json, logprobs: Json | None = None, finish_reason: str | None = None) -> Json:
        return {"index": 0, name: body, "logprobs": logprobs, "finish_reason": finish_reason}


_CHAT_CHUNK: Final = "chat.completion.chunk"


class CompletionShape(AnswerShape):
    """``/v1/completions``. It keeps the place in the text that its log probabilities have come to."""

    ID_PREFIX = "cmpl-"
    PROMPT = "prompt"

    def __init__(
        self, identity: str, created: int, model: str, *, include_usage: bool = False, says_dropped: bool = False
    ) -> None:
        super().__init__(identity, created, model, include_usage=include_usage, says_dropped=says_dropped)
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._offset = 0

    def whole(self, deltas: Sequence[Delta], done: Done) -> Json:
        text = "".join(delta.content for delta in deltas)
        tokens = [token for delta in deltas for token in delta.logprobs]
        return self._whole("text_completion", self._choice(text, self._logprobs(tokens), done.finish_reason), done)

    def opening(self) -> Iterator[Json]:
        return iter(())

    def piece(self, delta: Delta) -> Json:
        return self._chunk("text_completion", self._choice(delta.content, self._logprobs(delta.logprobs)))

    def closing(self, done: Done) -> Iterator[Json]:
        return self._last("text_completion", self._choice("", None, done.finish_reason), done)

    @staticmethod
    def _choice(text: str, logprobs: Json | None, finish_reason: str | None = None) -> Json:
        return {"index": 0, "text": text, "logprobs": logprobs, "finish_reason": finish_reason}

    def _logprobs(self, tokens: Sequence[TokenLogprob]) -> Json | None:
        if not tokens:
            return None
        offsets = []
        for token in tokens:
            offsets.append(self._offset)
            self._offset += len(self._decoder.decode(token.token))
        return {
            "tokens": [_text_of(token.token) for token in tokens],
            "token_logprobs": [_number_of(token.logprob) for token in tokens],
            "top_logprobs": [
                {_text_of(each.token): _number_of(each.logprob) for each in token.top} for token in tokens
            ],
            "text_offset": offsets,
        }


# --- Parts ---------------------------------------------------------------------------------------------------------


def usage_of(usage: Usage) -> Json:
    return {
        "prompt_tokens": usage.prompt_tokens,
        "completion_tokens": usage.completion_tokens,
        "total_tokens": usage.prompt_tokens + usage.completion_tokens,
        "prompt_tokens_details": {"cached_tokens": usage.cached_tokens},
        "completion_tokens_details": {"reasoning_tokens": usage.reasoning_tokens},
    }


def count_of(tokens: int) -> Json:
    """The answer of ``/v1/chat/completions/input_tokens``."""
    return {"object": "chat.completion.input_tokens", "input_tokens": tokens}


def model_of(name: str, created: int) -> Json:
    return {"id": name, "object": "model", "created": created, "owned_by": "strongroom"}


def _call_chunk(call: ToolCallDelta) -> Json:
    if call.id is None:
        return {"index": call.index, "function": {"arguments": call.arguments}}
    function = {"name": call.name, "arguments": call.arguments}
    return {"index": call.index, "id": call.id, "type": "function", "function": function}


def _whole_calls(parts: Iterator[ToolCallDelta]) -> list[Json]:
    """In the order in which they began."""
    calls: dict[int, Json] = {}
    for part in parts:
        if part.index in calls:
            calls[part.index]["function"]["arguments"] += part.arguments
        else:
            function = {"name": part.name, "arguments": part.arguments}
            calls[part.index] = {"id": part.id, "type": "function", "function": function}
    return list(calls.values())


def _logprobs_of(deltas: Sequence[Delta]) -> Json | None:
    entries = [_logprob_of(token) for delta in deltas for token in delta.logprobs]
    return {"content": entries, "refusal": None} if entries else None


def _logprob_of(token: TokenLogprob) -> Json:
    top = [_entry_of(each.token, each.logprob) for each in token.top]
    return _entry_of(token.token, token.logprob) | {"top_logprobs": top}


def _entry_of(token: bytes, logprob: float) -> Json:
    return {"token": _text_of(token), "bytes": list(token), "logprob": _number_of(logprob)}


def _text_of(token: bytes) -> str:
    """As OpenAI writes a token that is only a part of a character."""
    try:
        return token.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in token)


def _number_of(logprob: float) -> float:
    return max(logprob, LEAST_LOGPROB)
