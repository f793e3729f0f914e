"""Which tokens stand in which cells of llama.cpp's memory, as pure data: what may be reused, and what has to go.

Every sequence has a slot. What a finished request computed stays in its slot, for the next request of the same
*namespace* that begins with the same tokens; nothing of it ever serves another namespace, and what has none is removed.
The least recently used goes first.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import TypeAlias

Tokens: TypeAlias = "array[int]"
"""Four bytes each, where a list takes nine times as many: whole prompts wait for their turn."""


def tokens_of(values: Iterable[int] = ()) -> Tokens:
    return array("i", values)


@dataclass(frozen=True, slots=True)
class Truncate:
    """The slot's cells from position ``length`` on become free."""

    slot: int
    length: int


@dataclass(frozen=True, slots=True)
class Copy:
    """``target``, which is empty, gets all that ``source`` holds."""

    source: int
    target: int


Edit: TypeAlias = Truncate | Copy
"""What has to be done to llama.cpp's memory before the next decode, in order."""


@dataclass(slots=True)
class Slot:
    index: int
    namespace: bytes | None = None
    tokens: Tokens = field(default_factory=tokens_of)
    """What its cells hold, by position."""
    is_taken: bool = False
    """A request is at work in it."""
    last_used: int = 0


class KvCache:
    """``slots`` sequences over ``cells`` cells in all. Its methods change it at once; :meth:`take_edits` says what has
    to be done to the memory for that.
    """

    def __init__(self, *, slots: int, cells: int, reuses: bool = True) -> None:
        """``reuses``: cells can be freed from any position on, which recurrent models do not allow."""
        self._slots = [Slot(index) for index in range(slots)]
        self._cells = cells
        self._reuses = reuses
        self._edits: list[Edit] = []
        self._clock = 0

    @property
    def free(self) -> int:
        """Cells that hold nothing."""
        return self._cells - sum(len(slot.tokens) for slot in self._slots)

    @property
    def reclaimable(self) -> int:
        """Cells that hold what no request is at work on."""
        return sum(len(slot.tokens) for slot in self._slots if not slot.is_taken)

    @property
    def free_slots(self) -> int:
        return sum(not slot.is_taken for slot in self._slots)

    def slots(self) -> Sequence[Slot]:
        """For whoever looks; nobody else changes them."""
        return self._slots

    def take_edits(self) -> tuple[Edit, ...]:
        edits, self._edits = tuple(self._edits), []
        return edits

    def take(self, tokens: Tokens, namespace: bytes | None) -> Slot:
        """A slot for a sequence that begins with ``tokens``. It holds as many of them already as it can, but never the
        last: somebody has to decode that one.

        Somebody has made sure that there is a slot (:attr:`free_slots`).
        """
        self._clock += 1
        source, length = self._longest(tokens, namespace)
        free = [slot for slot in self._slots if not slot.is_taken]
        if source is not None and not source.is_taken and (2 * length >= len(source.tokens) or free == [source]):
            slot = source
        else:  # what another conversation goes on with stays where it is
            slot = min((slot for slot in free if slot is not source), key=_worth)
            self._truncate(slot, 0)
            if source is not None and self.make_room(len(source.tokens), spare=source):
                self._edits.append(Copy(source.index, slot.index))
                slot.tokens = source.tokens[:]
        self._truncate(slot, length)
        slot.namespace, slot.is_taken, slot.last_used = namespace, True, self._clock
        return slot

    def put_back(self, slot: Slot) -> None:
        """The request is over. What has no namespace is removed."""
        self._clock += 1
        slot.is_taken, slot.last_used = False, self._clock
        if slot.namespace is None or not self._reuses:
            self._truncate(slot, 0)

    def make_room(self, count: int, *, spare: Slot | None = None) -> bool:
        """Whether ``count`` cells are free now. What nobody works on goes for that, least recently used first, but not
        ``spare``.
        """
        idle = (slot for slot in self._slots if slot.tokens and not slot.is_taken and slot is not spare)
        for slot in sorted(idle, key=lambda slot: slot.last_used):
            if self.free >= count:
                break
            self._truncate(slot, 0)
        return self.free >= count

    def _longest(self, tokens: Tokens, namespace: bytes | None) -> tuple[Slot | None, int]:
        """The slot that holds most of the beginning, and how much. One that nobody works in, if it can be."""
        best: tuple[Slot | None, int] = None, 0
        if namespace is None or not self._reuses:
            return best
        for slot in self._slots:
            if slot.namespace == namespace:
                length = min(_common(slot.tokens, tokens), len(tokens) - 1)
                if length > best[1] or (length and length == best[1] and best[0] is not None and best[0].is_taken):
                    best = slot, length
        return best

    def _truncate(self, slot: Slot, length: int) -> None:
        if length < len(slot.tokens):
            del slot.tokens[length:]
            self._edits.append(Truncate(slot.index, length))


def _worth(slot: Slot) -> tuple[int, int]:
    """Of a slot that nobody works in: empty ones go first, the foremost at that, so that those at work lie together."""
    return (slot.last_used, 0) if slot.tokens else (0, slot.index)


def _common(one: Tokens, other: Tokens) -> int:
    """Length of the longest beginning that both have."""
    longest = min(len(one), len(other))
    low, high = 0, longest  # slices compare at C's speed
    if one[:longest] == other[:longest]:
        return longest
    while low < high:
        middle = (low + high + 1) // 2
        if one[:middle] == other[:middle]:
            low = middle
        else:
            high = middle - 1
    return low
