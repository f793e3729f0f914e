"""A conversation that does not fit loses its oldest turns, where its request allows that: whole, never the system's
messages, never the last.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Final

from enclave.config import EngineSettings
from enclave.prompt_size import message_size, most_bytes, prompt_size, require_bytes
from enclave.worker.prompt import Prompt
from vsockrpc.chat import ChatMessage, ChatRequest

USUAL_ANSWER: Final = 512
"""Tokens that are kept free for an answer of which neither request nor configuration says how long it may be."""

Tokenized = tuple[Prompt, list[int]]


def fitting(request: ChatRequest, tokenize: Callable[[ChatRequest], Tokenized], settings: EngineSettings) -> Tokenized:
    """The prompt of ``request`` and its tokens, without as many of the oldest turns as it takes until it is no longer
    than prompts may be and there is room for the answer: ``max_tokens``, or the longest one, or :data:`USUAL_ANSWER`
    where that has no bound, but of no more than half of the context. What does not fit even without all of them comes
    back nevertheless.

    A turn is a person's message and all that follows until the next. ``tokenize`` is called once, and where turns
    have to go about as often as their number has binary digits.
    """
    whole = tokenize(request)
    answer = request.max_tokens or settings.answer_tokens or USUAL_ANSWER
    most = min(settings.longest_prompt, settings.context - min(answer, settings.context // 2))
    if request.truncation == "disabled" or len(whole[1]) <= most:
        return whole
    turns = _turns(request.messages)
    best, low, high = whole, 1, len(turns) - 1
    while low <= high:
        dropped = (low + high) // 2
        prompt, tokens = tokenize(replace(request, messages=_without(request.messages, turns[:dropped])))
        best_fits, fits = len(best[1]) <= most, len(tokens) <= most
        if fits or not best_fits:
            best = replace(prompt, dropped_messages=sum(map(len, turns[:dropped]))), tokens
        low, high = (low, dropped - 1) if fits else (dropped + 1, high)
    return best


def without_oldest(request: ChatRequest, *, context: int) -> tuple[ChatRequest, int]:
    """``request``, where it allows that without as many of its oldest turns as it takes until its prompt may be cut
    into tokens at all, and how many messages these have. Raises ContextExceeded where the last turn is too large.
    """
    size, most = prompt_size(request), most_bytes(context)
    if size <= most or request.truncation == "disabled":
        return request, 0
    turns = _turns(request.messages)
    dropped = 0
    while size > most and dropped < len(turns) - 1:
        size -= sum(message_size(request.messages[index]) for index in turns[dropped])
        dropped += 1
    require_bytes(size, most, context)
    left = replace(request, messages=_without(request.messages, turns[:dropped]))
    return left, len(request.messages) - len(left.messages)


def _turns(messages: tuple[ChatMessage, ...]) -> list[list[int]]:
    """The places of each turn's messages."""
    turns: list[list[int]] = []
    for index, message in enumerate(messages):
        if message.role == "system":
            continue
        if message.role == "user" or not turns:
            turns.append([])
        turns[-1].append(index)
    return turns


def _without(messages: tuple[ChatMessage, ...], turns: list[list[int]]) -> tuple[ChatMessage, ...]:
    gone = {index for turn in turns for index in turn}
    return tuple(message for index, message in enumerate(messages) if index not in gone)
