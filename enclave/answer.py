"""From a model's tokens to the text that a client may see: characters are whole, and a stop string never shows, not
even its beginning.
"""

from __future__ import annotations

import codecs
from collections.abc import Sequence


class AnswerText:
    """Puts the pieces of tokens together. Pure data; the pieces' boundaries do not change what comes out in the end.

    A stop string ends the text as soon as its last character is there; of several that end at the same character, the
    one that began first. Text that could still become a stop string is held back until it does or does not. Bytes
    that are not UTF-8 become U+FFFD.
    """

    def __init__(self, stops: Sequence[str] = ()) -> None:
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._stops = tuple(stops)
        self._longest = max(map(len, self._stops), default=0)
        self._held = ""
        self.stopped = False
        """A stop string was found: nothing more comes out."""

    def push(self, piece: bytes) -> str:
        """The text that ``piece`` makes certain, perhaps none."""
        return self._release(self._decoder.decode(piece))

    def finish(self) -> str:
        """The rest, at the end of the answer."""
        text = self._release(self._decoder.decode(b"", final=True))
        rest, self._held = self._held, ""
        return text if self.stopped else text + rest

    def _release(self, fresh: str) -> str:
        if self.stopped:
            return ""
        if not self._stops:
            return fresh
        text = self._held + fresh
        start = self._first_stop(text)
        if start is not None:
            self.stopped, self._held = True, ""
            return text[:start]
        keep = self._beginning_of_stop(text)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep]

    def _first_stop(self, text: str) -> int | None:
        """Where the stop string begins that is complete first."""
        found = [(start + len(stop), start) for stop in self._stops if (start := text.find(stop)) >= 0]
        return min(found)[1] if found else None

    def _beginning_of_stop(self, text: str) -> int:
        """Length of the longest end of ``text`` that a stop string begins with."""
        for length in range(min(self._longest - 1, len(text)), 0, -1):
            end = text[-length:]
            if any(stop.startswith(end) for stop in self._stops):
                return length
        return 0
