"""From a prompt's segments to tokens, so that nobody can forge what only the template may say. Only the engine process
imports this.
"""

from __future__ import annotations

import ctypes
import re
from collections.abc import Iterator, Sequence
from typing import Any

import llama_cpp

from enclave.generation import InvalidRequest
from enclave.prompt import ChatTemplate, Segment, TemplateError
from vsockrpc.chat import ChatMessage, ChatRequest


class Tokenizer:
    """Turns a prompt's segments into tokens: the tokens that mean something come from trusted segments alone.

    Those are the control tokens, the ends of generation, and the *user defined* ones to which the template gives a
    meaning. Not asking for special tokens is not enough to keep them out of a person's text: llama.cpp parses user
    defined ones always, some models' role marks are of that type, and merging may arrive at any token's text. So what
    comes out is checked.
    """

    def __init__(self, vocabulary: Any, template: str) -> None:
        self._vocabulary = vocabulary
        self._bos = llama_cpp.llama_vocab_bos(vocabulary) if llama_cpp.llama_vocab_get_add_bos(vocabulary) else None
        meaningful = dict(self._meaningful(template))
        self._meaningful_ids = frozenset(meaningful)
        self.mark_starts = frozenset(text[0] for text in meaningful.values())
        """The characters with which the texts of tokens that mean something begin."""
        self._behind_start = re.compile(
            f"(?<=[{''.join(map(re.escape, sorted(self.mark_starts)))}])" if meaningful else "$a"
        )

    def _meaningful(self, template: str) -> Iterator[tuple[int, str]]:
        """Such tokens with their texts. One of a single character cannot be told from the character."""
        for token in range(llama_cpp.llama_vocab_n_tokens(self._vocabulary)):
            kind = llama_cpp.llama_vocab_get_attr(self._vocabulary, token)
            ends = llama_cpp.llama_vocab_is_eog(self._vocabulary, token)
            if not ends and not kind & (llama_cpp.LLAMA_TOKEN_ATTR_CONTROL | llama_cpp.LLAMA_TOKEN_ATTR_USER_DEFINED):
                continue
            text = (llama_cpp.llama_vocab_get_text(self._vocabulary, token) or b"").decode("utf-8", "replace")
            meant = ends or kind & llama_cpp.LLAMA_TOKEN_ATTR_CONTROL or text in template or _looks_special(text)
            if meant and len(text) > 1:
                yield token, text

    def tokens(self, segments: Sequence[Segment]) -> list[int]:
        """Raises InvalidRequest for a person's text that cannot be kept apart from the model's special tokens."""
        tokens: list[int] = []
        for segment in segments:
            tokens += self._tokenize(segment.text, special=True) if segment.trusted else self._plain(segment.text)
        if self._bos is not None and tokens[:1] != [self._bos]:
            tokens.insert(0, self._bos)
        return tokens

    def special(self, text: str) -> list[int]:
        """The tokens of a text of ours: special tokens in it are meant."""
        return self._tokenize(text, special=True)

    def turn_ends(self, template: ChatTemplate) -> frozenset[int]:
        """The token with which ``template`` ends an assistant's turn, if it is one that means something: where it does
        the model has learned to write it, whatever llama.cpp knows of its vocabulary.
        """
        turns = (ChatMessage("user", "a"), ChatMessage("assistant", "b"), ChatMessage("user", "c"))
        try:
            segments = template.render(ChatRequest(turns)).segments
        except (InvalidRequest, TemplateError):
            return frozenset()  # one turn is all that it takes
        place = segments.index(Segment("b", trusted=False))
        behind = "".join(segment.text for segment in segments[place + 1 : place + 2] if segment.trusted)
        return frozenset(self.special(behind.lstrip())[:1]) & self._meaningful_ids

    def _plain(self, text: str) -> list[int]:
        tokens = self._tokenize(text, special=False)
        if self._meaningful_ids.isdisjoint(tokens):
            return tokens
        # The text holds such a token's text. Cut behind every character that could begin one, no part holds a whole
        # one.
        parts = self._behind_start.split(text)
        tokens = [token for part in parts for token in self._tokenize(part, special=False)]
        if not self._meaningful_ids.isdisjoint(tokens):
            raise InvalidRequest("a message cannot be told apart from the model's special tokens")
        return tokens

    def _tokenize(self, text: str, *, special: bool) -> list[int]:
        data = text.encode("utf-8")
        room = len(data) + 8
        tokens = (ctypes.c_int32 * room)()
        count = llama_cpp.llama_tokenize(self._vocabulary, data, len(data), tokens, room, False, special)
        if count < 0:
            raise RuntimeError("more tokens than bytes")
        return tokens[:count]


def _looks_special(text: str) -> bool:
    return re.fullmatch(r"<[|｜].*[|｜]>", text, re.DOTALL) is not None
