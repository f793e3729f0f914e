"""The part of an answer that a client reads as its text: a stop string never shows, not even its beginning."""

from __future__ import annotations

from collections.abc import Sequence


class AnswerText:
    """Pure data; how the text is cut into pieces does not change what comes out in the end.

    A stop string ends the text as soon as its last character is there; of several that end at the same character, the
    one that began first. Text that could still become a stop string is held back until it does or does not.
    """

    def __init__(self, stops: Sequence[str] = ()) -> None:
        self._stops = tuple(stops)
        self._longest = max(map(len, self._stops), default=0)
        self._held = ""
        self.stopped = False
        """A stop string was found: nothing more comes out."""

    def push(self, fresh: str) -> str:
        """The text that ``fresh`` makes certain, perhaps none."""
        if self.stopped:
            return ""
        if not self._stops:
            return fresh
        text = self._held + fresh
        start = self._first_stop(text)
        if start is not None:
            self.stopped, self._held = True, ""
            return text[:start]
        keep = beginning_of(self._stops, text, self._longest)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep]

    def finish(self) -> str:
        """The rest, at the end of the answer."""
        rest, self._held = self._held, ""
        return rest

    def _first_stop(self, text: str) -> int | None:
        """Where the stop string begins that is complete first."""
        found = [(start + len(stop), start) for stop in self._stops if (start := text.find(stop)) >= 0]
        return min(found)[1] if found else None


def beginning_of(words: Sequence[str], text: str, longest: int) -> int:
    """Length of the longest end of ``text`` with which one of ``words``, none longer than ``longest``, begins."""
    for length in range(min(longest - 1, len(text)), 0, -1):
        end = text[-length:]
        if any(word.startswith(end) for word in words):
            return length
    return 0
