"""From a prompt's segments to tokens, so that nobody can forge what only the template may say. Only the engine process
imports this.
"""

from __future__ import annotations

import ctypes
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

import llama_cpp

from enclave.generation import InvalidRequest
from enclave.worker.pre_tokenizer import RunBound
from enclave.worker.prompt import ChatTemplate, Segment, TemplateError
from enclave.worker.user_defined import Cutter, UserDefined
from vsockrpc.chat import ChatMessage, ChatRequest

MAX_COMPARISONS: Final = 1 << 30
"""Of a prompt's text with texts of user defined tokens: llama.cpp looks for each of those in each text, and stops at
every character with which one begins. Some seconds.
"""
MAX_TOKENS_PER_BYTE: Final = 8
"""Some vocabularies spell characters out: U+FDFA, of three bytes, is 18 letters."""
_SHORT: Final = 16
_MAX_SHORT: Final = 4096


class Tokenizer:
    """Turns a prompt's segments into tokens: the tokens that mean something come from trusted segments alone.

    Those are the control tokens, the ends of generation, and the *user defined* ones to which the template gives a
    meaning. Not asking for special tokens is not enough to keep them out of a person's text: llama.cpp parses user
    defined ones always, some models' role marks are of that type, and merging may arrive at any token's text. So what
    comes out is checked.
    """

    def __init__(self, vocabulary: Any, template: str, pre_tokenizer: str | None = None) -> None:
        """``pre_tokenizer`` is the metadata's ``tokenizer.ggml.pre``; None where there is none."""
        self._vocabulary = vocabulary
        has_expressions = llama_cpp.llama_vocab_type(vocabulary) == llama_cpp.LLAMA_VOCAB_TYPE_BPE
        self._runs = RunBound(pre_tokenizer, has_expressions=has_expressions)
        self._cutter = Cutter(self._user_defined())
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

    def _user_defined(self) -> Iterator[UserDefined]:
        """Those for which llama.cpp looks in a person's text, too."""
        unsought = llama_cpp.LLAMA_TOKEN_ATTR_CONTROL | llama_cpp.LLAMA_TOKEN_ATTR_UNKNOWN
        for token in range(llama_cpp.llama_vocab_n_tokens(self._vocabulary)):
            kind = llama_cpp.llama_vocab_get_attr(self._vocabulary, token)
            if kind & llama_cpp.LLAMA_TOKEN_ATTR_USER_DEFINED and not kind & unsought:
                data = llama_cpp.llama_vocab_get_text(self._vocabulary, token) or b""
                text = data.decode("utf-8", "ignore")
                if text.encode("utf-8") != data:
                    continue  # no text holds a part of a character
                left, right = kind & llama_cpp.LLAMA_TOKEN_ATTR_LSTRIP, kind & llama_cpp.LLAMA_TOKEN_ATTR_RSTRIP
                yield UserDefined(token, text, bool(left), bool(right))

    def tokens(self, segments: Sequence[Segment], known: dict[str, list[int]] | None = None) -> list[int]:
        """``known`` has what became of texts before, and is added to: for a conversation that is rendered again without
        some of them.

        Raises InvalidRequest for a person's text that cannot be kept apart from the model's special tokens, or that
        llama.cpp would take too long or too much for.
        """
        tokens: list[int] = []
        known = {} if known is None else known
        work = _Work()
        for segment in segments:
            self._runs.check(segment.text)
            if segment.trusted:
                tokens += self._tokenize(segment.text, special=True)
            elif segment.text in known:
                tokens += known[segment.text]
            else:
                known[segment.text] = self._plain(segment.text, work)
                tokens += known[segment.text]
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

    def _plain(self, text: str, work: _Work) -> list[int]:
        tokens = self._cut(text, work)
        if self._meaningful_ids.isdisjoint(tokens):
            return tokens
        del tokens  # there may be a million
        # The text holds such a token's text. Cut behind every character that could begin one, no part holds a whole
        # one.
        tokens = [token for part in self._behind_start.split(text) for token in self._cut(part, work)]
        if not self._meaningful_ids.isdisjoint(tokens):
            raise InvalidRequest("a message cannot be told apart from the model's special tokens")
        return tokens

    def _cut(self, text: str, work: _Work) -> list[int]:
        """What llama.cpp would make of ``text``, had it the time."""
        if text in work.short:
            return work.short[text]
        tokens: list[int] = []
        for part in self._cutter.cut(text):
            if isinstance(part, int):
                tokens.append(part)
            elif part in work.short:
                tokens += work.short[part]
            else:
                tokens += self._part(part, work)
        return tokens

    def _part(self, text: str, work: _Work) -> list[int]:
        """``text`` holds no user defined token's text."""
        stops = sum(text.count(start) * tokens for start, tokens in self._cutter.starts.items())
        work.comparisons += stops + self._cutter.count
        if work.comparisons > MAX_COMPARISONS:
            raise InvalidRequest(
                "the prompt has too many characters with which tokens of the model's begin",
                expected=f"<= {MAX_COMPARISONS} comparisons with them",
            )
        tokens = self._tokenize(text, special=False)
        if len(text) <= _SHORT and len(work.short) < _MAX_SHORT:
            work.short[text] = tokens
        return tokens

    def _tokenize(self, text: str, *, special: bool) -> list[int]:
        data = text.encode("utf-8")
        room = len(data) + 8
        for _ in range(2):
            tokens = (ctypes.c_int32 * room)()
            count = llama_cpp.llama_tokenize(self._vocabulary, data, len(data), tokens, room, False, special)
            if count >= 0:
                return tokens[:count]
            # A vocabulary can have more tokens for a text than that has bytes. llama.cpp says how many.
            if -count > MAX_TOKENS_PER_BYTE * room:
                break
            room = -count
        raise InvalidRequest("a text becomes too many tokens", expected=f"<= {MAX_TOKENS_PER_BYTE} for a byte")


@dataclass(slots=True)
class _Work:
    """What was done for a prompt."""

    comparisons: int = 0
    short: dict[str, list[int]] = field(default_factory=dict)
    """Short texts' tokens: there may be very many of the same."""


def _looks_special(text: str) -> bool:
    return re.fullmatch(r"<[|｜].*[|｜]>", text, re.DOTALL) is not None
