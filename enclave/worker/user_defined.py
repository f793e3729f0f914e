"""The *user defined* tokens of a vocabulary, which llama.cpp finds in every text before it makes tokens of the rest.

It does so with a list of fragments that it walks from the beginning for each match, so that a text of nothing but such
tokens takes time in the square of its length (``tokenizer_st_partition`` in src/llama-vocab.cpp). The same cuts are
made here first, by the same rule and in linear time, and llama.cpp finds none any more.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Final

_SPACE: Final = " \t\n\v\f\r"  # C's isspace
_SPACES: Final = re.compile(f"[{_SPACE}]*")


@dataclass(frozen=True, slots=True)
class UserDefined:
    """One such token."""

    token: int
    text: str
    strips_left: bool = False
    strips_right: bool = False
    """Blanks beside it are no part of the text."""


class Cutter:
    """Cuts texts at such tokens: the longest in bytes first, everywhere, and among those of one length from the left.

    llama.cpp does not say which of two that are of one length and overlap goes first; here it is the one on the left.
    """

    def __init__(self, defined: Iterable[UserDefined]) -> None:
        tokens = {each.text: each for each in defined if each.text}
        self.count = len(tokens)
        self.starts = Counter(text[0] for text in tokens)
        """How many of their texts begin with a character."""
        self._tokens = tokens
        ordered = sorted(tokens, key=_size, reverse=True)
        self._groups = [re.compile(_any_of(sorted(texts))) for _, texts in groupby(ordered, key=_size)]

    def cut(self, text: str) -> list[str | int]:
        """The texts between such tokens, none empty, and the tokens, in order."""
        parts: list[str | int] = [text] if text else []
        for group in self._groups:
            if group.search(text):
                parts = [piece for part in parts for piece in self._pieces(part, group)]
        return parts

    def _pieces(self, text: str | int, group: re.Pattern[str]) -> Iterator[str | int]:
        if isinstance(text, int):
            yield text
            return
        place = 0
        while match := group.search(text, place):
            found = self._tokens[match[0]]
            left = text[place : match.start()]
            if left := left.rstrip(_SPACE) if found.strips_left else left:
                yield left
            yield found.token
            place = match.end()
            if found.strips_right:
                blanks = _SPACES.match(text, place)
                place = blanks.end() if blanks else place
        if place < len(text):
            yield text[place:]


def _size(text: str) -> int:
    return len(text.encode("utf-8"))


def _any_of(texts: Sequence[str]) -> str:
    """An expression for each of ``texts``, which are sorted and of one size. What they begin with alike is in it once,
    so that it takes no longer for many.
    """
    first, last = texts[0], texts[-1]
    if first == last:
        return re.escape(first)
    place = next(place for place, (one, other) in enumerate(zip(first, last, strict=False)) if one != other)
    branches = [_any_of([text[place:] for text in alike]) for _, alike in groupby(texts, key=lambda text: text[place])]
    return f"{re.escape(first[:place])}(?:{'|'.join(branches)})"
