"""From a model's tokens to what goes over the pipe, with a model that says what a test wants: what is forced, what is
constrained, which tokens end an answer, and what marks stand for.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence, Set
from typing import Any, Final, cast

import numpy as np
import pytest

from attestation.model_family import model_family
from enclave.pipe import (
    MAX_DELTA_CHARACTERS,
    MAX_TO_SERVER,
    Count,
    Counted,
    End,
    Failed,
    Generate,
    Piece,
    ToServer,
    ToWorker,
)
from enclave.worker.kv_cache import Edit
from enclave.worker.llama import Llama
from enclave.worker.loop import Gone, Loop, Pipe
from enclave.worker.prompt import ChatTemplate, Segment
from enclave.worker.sampler import Logits
from enclave.worker.scheduler import Row
from enclave.worker.tokenizer import Tokenizer
from tests.engines import engine_settings
from vsockrpc.chat import ChatMessage, ChatRequest, CompletionRequest, GenerationRequest, JsonFormat, Tool
from vsockrpc.messages import Delta, Done

SPECIAL: Final = ("<end>", "<turn>", "<think>", "</think>", "<tool_call>", "</tool_call>")
"""Tokens from 256 on, all of them control tokens, for which llama.cpp writes nothing. Of the first it knows that it is
an end.
"""
END, TURN, THINK, UNTHINK, CALL, UNCALL = range(256, 262)
TEMPLATE = (
    "{% for t in tools %}{{ t | tojson }}{% endfor %}{% for m in messages %}{{ m.content }}{% endfor %}"
    "{# <tool_call> #}"
)
THINKING = TEMPLATE + "{% if enable_thinking %}<think>\n{% endif %}"
HI = (ChatMessage("user", "Hi"),)
CLOCK = Tool("clock", "", None)


class ScriptedSampler:
    def logprobs(self, logits: Logits, token: int) -> None:
        return None

    def close(self) -> None:
        pass


class ScriptedLlama:
    """Says ``script``; ``constrained`` has whether a grammar governed each token that was sampled."""

    can_truncate = True

    def __init__(self, script: Sequence[int]) -> None:
        self.script = deque(script)
        self.constrained: list[bool] = []
        self.grammars: list[str | None] = []
        self.decoded: list[int] = []

    def decode(self, edits: Sequence[Edit], rows: Sequence[Row]) -> dict[int, Logits]:
        self.decoded += [token for row in rows for token in row.tokens]
        return {row.request: np.zeros(1, np.float32) for row in rows if row.samples}

    def sampler(
        self, request: GenerationRequest, prompt: Sequence[int], *, grammar: str | None, marks: Set[int], ends: Set[int]
    ) -> ScriptedSampler:
        self.grammars.append(grammar)
        return ScriptedSampler()

    def sample(self, sampler: ScriptedSampler, logits: Logits, *, is_constrained: bool) -> int:
        self.constrained.append(is_constrained)
        return self.script.popleft()

    def piece(self, token: int) -> bytes:
        return bytes([token]) if token < 256 else b""

    def ends(self, token: int) -> bool:
        return token == END


class SpecialTokenizer:
    """Bytes, and the special tokens where they are meant."""

    mark_starts = frozenset("<")

    def tokens(self, segments: Sequence[Segment], known: dict[str, list[int]] | None = None) -> list[int]:
        return [
            token
            for part in segments
            for token in (self.special(part.text) if part.trusted else list(part.text.encode()))
        ]

    def special(self, text: str) -> list[int]:
        tokens: list[int] = []
        while text:
            mark = next((mark for mark in SPECIAL if text.startswith(mark)), "")
            tokens += [256 + SPECIAL.index(mark)] if mark else list(text[0].encode())
            text = text[len(mark) or 1 :]
        return tokens


class ScriptedPipe(Pipe):
    """Has all its messages at once, and then nobody at its other end."""

    def __init__(self, *messages: ToWorker) -> None:
        self.messages = deque(messages)
        self.sent: list[ToServer] = []

    def receive(self, *, wait: bool) -> ToWorker | None:
        if self.messages:
            return self.messages.popleft()
        if wait:
            raise Gone
        return None

    def send(self, *messages: ToServer) -> None:
        self.sent += messages
        assert all(len(message.encode()) <= MAX_TO_SERVER for message in messages)


def said(*parts: str | int) -> list[int]:
    return [token for part in parts for token in (list(part.encode()) if isinstance(part, str) else [part])]


def run(llama: ScriptedLlama, *messages: ToWorker, template: str = TEMPLATE, **sizes: Any) -> list[ToServer]:
    pipe = ScriptedPipe(*messages)
    compiled = ChatTemplate(template, bos="", eos="", mark_starts=frozenset("<"))
    loop = Loop(
        pipe,
        cast(Llama, llama),
        compiled,
        cast(Tokenizer, SpecialTokenizer()),
        model_family("qwen3", "qwen2", template),
        engine_settings(**{"context": 4096, "parallel": 1, **sizes}),
        ends=frozenset({TURN}),
        clock=lambda: 0.0,
    )
    with pytest.raises(Gone):
        loop.run()
    return pipe.sent


def answer(
    llama: ScriptedLlama, request: GenerationRequest, *, template: str = TEMPLATE, **sizes: Any
) -> tuple[Delta, Done]:
    *pieces, end = run(llama, Generate(0, request), template=template, **sizes)
    assert isinstance(end, End)
    deltas = [piece.delta for piece in pieces if isinstance(piece, Piece)]
    content, reasoning = ("".join(getattr(delta, name) for delta in deltas) for name in ("content", "reasoning"))
    return Delta(content, reasoning, tuple(call for delta in deltas for call in delta.tool_calls)), end.done


def test_an_answer_ends_with_a_token_that_only_the_template_knows() -> None:
    got, done = answer(ScriptedLlama(said("Hello", TURN)), ChatRequest(HI))
    assert (got, done.finish_reason, done.usage.completion_tokens) == (Delta("Hello"), "stop", 5)


def test_marks_that_are_control_tokens_stand_for_their_texts() -> None:
    script = said("Hm", UNTHINK, "\n\n", CALL, '{"name": "clock", "arguments": {}}', UNCALL, END)
    got, done = answer(ScriptedLlama(script), ChatRequest(HI, tools=(CLOCK,)), template=THINKING)
    assert (got.reasoning, got.content, done.finish_reason) == ("Hm", "", "tool_calls")
    assert [(call.name, call.arguments) for call in got.tool_calls] == [("clock", "{}")]


def test_without_tools_the_marks_of_calls_are_nothing() -> None:
    assert answer(ScriptedLlama(said("a", CALL, "b", END)), ChatRequest(HI))[0] == Delta("ab")


def test_the_budget_s_end_is_forced_and_counts_as_said() -> None:
    llama = ScriptedLlama(said("Hm! ", "So.", END))
    got, done = answer(llama, ChatRequest(HI, reasoning_tokens=4), template=THINKING)
    assert got == Delta("So.", "Hm!")
    assert (done.usage.reasoning_tokens, done.usage.completion_tokens) == (4, 4 + 4 + 3)
    assert bytes(token for token in llama.decoded if token < 256) == b"Hi\nHm! \n\n\nSo."
    assert llama.decoded.count(UNTHINK) == 1


@pytest.mark.parametrize(("most", "asked", "got"), [(4, None, 4), (4, 9, 4), (4, 2, 2), (0, 3, 3), (4, 0, 0)])
def test_reasoning_is_at_most_what_the_configuration_and_the_request_say(
    most: int, asked: int | None, got: int
) -> None:
    llama = ScriptedLlama(said("Hm! " * 4, "So.", END))
    _, done = answer(llama, ChatRequest(HI, reasoning_tokens=asked), template=THINKING, reasoning_tokens=most)
    assert done.usage.reasoning_tokens == got


def test_an_answer_by_a_grammar_comes_even_if_the_model_would_end_while_it_thinks() -> None:
    llama = ScriptedLlama(said("Hm", END, "{}", END))
    got, done = answer(llama, ChatRequest(HI, response_format=JsonFormat()), template=THINKING)
    assert (got, done.finish_reason) == (Delta("{}", "Hm"), "stop")
    assert llama.constrained == [False] * 3 + [True] * 3
    assert llama.grammars[0] is not None


def test_a_model_that_reasons_by_itself_begins_with_that_before_a_grammar() -> None:
    template = TEMPLATE + "{# enable_thinking <think> #}"
    llama = ScriptedLlama(said("Hm", UNTHINK, "{}", END))
    got, _ = answer(llama, ChatRequest(HI, response_format=JsonFormat()), template=template)
    assert got == Delta("{}", "Hm")
    assert llama.constrained == [False] * 3 + [True] * 3
    assert THINK in llama.decoded


def test_a_long_call_goes_in_as_many_messages_as_it_takes() -> None:
    arguments = '{"text": "' + "é" * (3 * MAX_DELTA_CHARACTERS) + '"}'
    script = said(CALL, '{"name": "clock", "arguments": ' + arguments + "}", UNCALL, END)
    llama = ScriptedLlama(script)
    request = Generate(0, ChatRequest(HI, tools=(CLOCK,)))
    *pieces, end = run(llama, request, context=1 << 16, cells=1 << 16)
    assert isinstance(end, End)
    calls = [call for piece in pieces if isinstance(piece, Piece) for call in piece.delta.tool_calls]
    assert "".join(call.arguments for call in calls) == arguments
    assert [call.name for call in calls] == ["clock", *[None] * (len(calls) - 1)]
    assert max(len(call.arguments) for call in calls) == MAX_DELTA_CHARACTERS


def test_an_echo_longer_than_a_message_comes_whole() -> None:
    prompt = "word " * 1000
    llama = ScriptedLlama(said("!", END))
    *pieces, end = run(llama, Generate(0, CompletionRequest(prompt, echo=True)), context=1 << 14, cells=1 << 14)
    assert isinstance(end, End)
    assert "".join(piece.delta.content for piece in pieces if isinstance(piece, Piece)) == prompt + "!"


def test_what_cannot_be_answered_is_refused_and_nothing_is_decoded() -> None:
    llama = ScriptedLlama(())
    requests = [
        ChatRequest(HI, tools=(CLOCK,), response_format=JsonFormat()),
        ChatRequest(HI, response_format=JsonFormat("no schema")),
        ChatRequest((ChatMessage("tool", "", tool_call_id="a"),)),
    ]
    for request in requests:
        [failed] = run(llama, Generate(0, request))
        assert isinstance(failed, Failed)
        assert failed.error.code == "invalid_request"
    assert not llama.decoded


def test_dropped_turns_are_counted_and_so_are_prompts() -> None:
    turn = (ChatMessage("user", "a" * 50), ChatMessage("assistant", "b" * 50))
    request = ChatRequest((*turn, *turn, *HI), truncation="auto", max_tokens=10)
    counted, end = run(ScriptedLlama([END]), Count(1, request), Generate(0, request), context=128, cells=128)
    assert counted == Counted(1, 102)
    assert isinstance(end, End)
    assert (end.done.dropped_messages, end.done.usage.prompt_tokens) == (2, 102)
