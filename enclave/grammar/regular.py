"""Regular expressions as automata: the part of ECMA 262's that JSON Schema recommends, with every count bounded.

Anchors at both ends, characters, escapes, sets, ``.``, groups, alternatives and quantifiers. What is read is never more
than what Python's ``re`` and ECMA 262 both mean: ``\\d``, ``\\w`` and ``\\s`` are ASCII's, and so is what ``\\D``,
``\\W`` and ``\\S`` leave.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Final, TypeAlias

from enclave.grammar.gbnf import Ranges, common, merged, ranges_of, without

MAX_PATTERN_CHARACTERS: Final = 4096
MAX_GROUPS: Final = 32
"""Within each other."""
MAX_REPETITIONS: Final = 1000
"""That a quantifier may ask for. Without an upper bound there may be any number."""
MAX_STATES: Final = 4096
"""Of the automaton, before and after it is made deterministic."""

ANY: Final[Ranges] = ((0, 0xD7FF), (0xE000, 0x10FFFF))
"""Every character: Unicode's scalar values."""
_ASCII: Final[Ranges] = ((0, 0x7F),)
_DOT: Final = without(ANY, ranges_of("\n\r\u2028\u2029"))
_DIGIT: Final[Ranges] = ((0x30, 0x39),)
_WORD: Final = merged((*_DIGIT, (0x41, 0x5A), (0x5F, 0x5F), (0x61, 0x7A)))
_SPACE: Final = ranges_of("\t\n\v\f\r ")
_SEPARATORS: Final = ranges_of("\x1c\x1d\x1e\x1f")
"""White space to Python alone."""
_CLASSES: Final[dict[str, Ranges]] = {
    "d": _DIGIT,
    "w": _WORD,
    "s": _SPACE,
    "D": without(_ASCII, _DIGIT),
    "W": without(_ASCII, _WORD),
    "S": without(_ASCII, merged((*_SPACE, *_SEPARATORS))),
}
_CONTROLS: Final = {"t": "\t", "n": "\n", "r": "\r", "f": "\f", "v": "\v"}
_SYNTAX: Final = "\\^$.*+?()[]{}|"


class NotSupported(Exception):
    """The expression is none of those that are supported, or too large; the message says which."""


@dataclass(frozen=True, slots=True)
class State:
    """A state of a deterministic automaton: the text may end here, or go on."""

    accepts: bool
    moves: tuple[tuple[Ranges, int], ...]


def automaton(pattern: str, spend: Callable[[int], None]) -> list[State]:
    """The deterministic automaton of all texts in which ``pattern`` is found; the first state is where it starts.
    ``spend`` is told of the steps that this takes, and may stop it with an error of its own. Raises NotSupported.
    """
    if len(pattern) > MAX_PATTERN_CHARACTERS:
        raise NotSupported(f"it is longer than {MAX_PATTERN_CHARACTERS} characters")
    return _smaller(_deterministic(*_build(_Parser(pattern).parse()), spend))


def lengths(states: Sequence[State]) -> tuple[int | None, int | None]:
    """Of the shortest text, None where there is none; and of the longest, None where there is no bound."""
    shortest: int | None = None
    reached, frontier = {0}, {0}
    for length in range(len(states)):
        if any(states[each].accepts for each in frontier):
            shortest = length
            break
        frontier = {target for each in frontier for _, target in states[each].moves} - reached
        reached |= frontier
    before = Counter(target for state in states for _, target in state.moves)
    longest = [0] * len(states)
    order = [0] if not before[0] else []
    for each in order:
        for _, target in states[each].moves:
            longest[target] = max(longest[target], longest[each] + 1)
            before[target] -= 1
            if not before[target]:
                order.append(target)
    return shortest, max(longest) if len(order) == len(states) else None


# --- The expression's tree -----------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Chars:
    ranges: Ranges


@dataclass(frozen=True, slots=True)
class _Sequence:
    parts: tuple[_Tree, ...]


@dataclass(frozen=True, slots=True)
class _Choice:
    branches: tuple[_Tree, ...]


@dataclass(frozen=True, slots=True)
class _Repeat:
    part: _Tree
    low: int
    high: int | None


_Tree: TypeAlias = _Chars | _Sequence | _Choice | _Repeat
_ANYTHING: Final = _Repeat(_Chars(ANY), 0, None)


class _Parser:
    def __init__(self, pattern: str) -> None:
        self._pattern = pattern
        self._at = 0

    def parse(self) -> _Tree:
        """Each of the outermost branches has anchors of its own; where one has none, any text may be."""
        branches: list[_Tree] = []
        while True:
            starts = self._take("^")
            sequence = self._sequence(0)
            ends = self._take("$")
            parts = (sequence,) if starts else (_ANYTHING, sequence)
            branches.append(_Sequence(parts if ends else (*parts, _ANYTHING)))
            if self._at == len(self._pattern):
                return _Choice(tuple(branches))
            if not self._take("|"):
                raise self._unsupported()

    def _choice(self, depth: int) -> _Tree:
        if depth > MAX_GROUPS:
            raise NotSupported(f"more than {MAX_GROUPS} groups are within each other")
        branches = [self._sequence(depth)]
        while self._take("|"):
            branches.append(self._sequence(depth))
        return _Choice(tuple(branches))

    def _sequence(self, depth: int) -> _Tree:
        parts: list[_Tree] = []
        while self._at < len(self._pattern) and self._pattern[self._at] not in "|)$":
            parts.append(self._quantified(self._atom(depth)))
        return _Sequence(tuple(parts))

    def _atom(self, depth: int) -> _Tree:
        if self._take("("):
            if self._take("?") and not self._take(":"):
                raise self._unsupported()
            tree = self._choice(depth + 1)
            if not self._take(")"):
                raise self._unsupported()
            return tree
        if self._take("["):
            return _Chars(self._set())
        if self._take("."):
            return _Chars(_DOT)
        if self._take("\\"):
            return _Chars(self._escape())
        if self._pattern[self._at] in _SYNTAX:
            raise self._unsupported()
        return _Chars(ranges_of(self._next()))

    def _quantified(self, tree: _Tree) -> _Tree:
        if self._take("*"):
            low, high = 0, None
        elif self._take("+"):
            low, high = 1, None
        elif self._take("?"):
            low, high = 0, 1
        elif self._take("{"):
            low = self._count()
            high = low
            if self._take(","):
                high = None if self._peek() == "}" else self._count()
            if not self._take("}") or (high is not None and high < low):
                raise self._unsupported()
        else:
            return tree
        self._take("?")  # which of several matches is found does not matter
        return _Repeat(tree, low, high)

    def _count(self) -> int:
        digits = ""
        while self._peek() in tuple("0123456789"):
            digits += self._next()
        if not digits:
            raise self._unsupported()
        if len(digits) > len(str(MAX_REPETITIONS)) or int(digits) > MAX_REPETITIONS:
            raise NotSupported(f"a quantifier asks for more than {MAX_REPETITIONS}")
        return int(digits)

    def _set(self) -> Ranges:
        inverted = self._take("^")
        ranges: list[tuple[int, int]] = []
        named: set[str] = set()
        while not (ranges and self._take("]")):
            named.add(self._pattern[self._at : self._at + 2])
            low = self._member()
            if self._peek() == "-" and self._pattern[self._at + 1 : self._at + 2] not in ("]", ""):
                self._next()
                high = self._member()
                if not _is_single(low) or not _is_single(high) or low[0][0] > high[0][0]:
                    raise self._unsupported()
                ranges.append((low[0][0], high[0][0]))
            else:
                ranges += low
        if not inverted:
            return merged(ranges)
        if not named.isdisjoint(("\\D", "\\W", "\\S")):
            raise self._unsupported()
        if named.isdisjoint(("\\d", "\\w", "\\s")):
            return without(ANY, merged(ranges))
        # What these may mean beyond ASCII is left out, too.
        return without(_ASCII, merged((*ranges, *_SEPARATORS)))

    def _member(self) -> Ranges:
        if self._take("\\"):
            return ranges_of("\b") if self._take("b") else self._escape()
        if self._peek() in ("[", "]"):  # a set within a set, or a set of nothing, to some
            raise self._unsupported()
        return ranges_of(self._next())

    def _escape(self) -> Ranges:
        letter = self._next()
        if letter in _CLASSES:
            return _CLASSES[letter]
        if letter in _CONTROLS:
            return ranges_of(_CONTROLS[letter])
        if letter in "xu":
            size = 2 if letter == "x" else 4
            digits = self._pattern[self._at : self._at + size]
            if len(digits) != size or not all(digit in "0123456789abcdefABCDEF" for digit in digits):
                raise self._unsupported()
            self._at += size
            point = int(digits, 16)
            if not common(ANY, ((point, point),)):
                raise self._unsupported()
            return ((point, point),)
        if letter.isascii() and not letter.isalnum():
            return ranges_of(letter)
        raise self._unsupported()

    def _peek(self) -> str:
        return self._pattern[self._at : self._at + 1]

    def _next(self) -> str:
        character = self._peek()
        if not character:
            raise self._unsupported()
        self._at += 1
        return character

    def _take(self, character: str) -> bool:
        if self._peek() != character:
            return False
        self._at += 1
        return True

    def _unsupported(self) -> NotSupported:
        where = self._pattern[self._at : self._at + 8]
        return NotSupported(f"at character {self._at}: {where!r}" if where else "it ends too early")


def _is_single(ranges: Ranges) -> bool:
    return len(ranges) == 1 and ranges[0][0] == ranges[0][1]


# --- Automata ------------------------------------------------------------------------------------------------------


class _Build:
    """Thompson's construction."""

    def __init__(self) -> None:
        self.empty: list[list[int]] = []
        self.moves: list[tuple[Ranges, int] | None] = []

    def state(self) -> int:
        if len(self.empty) == MAX_STATES:
            raise NotSupported(f"it needs more than {MAX_STATES} states")
        self.empty.append([])
        self.moves.append(None)
        return len(self.empty) - 1

    def add(self, tree: _Tree, start: int) -> int:
        """The state in which ``tree`` ends."""
        match tree:
            case _Chars(ranges):
                end = self.state()
                if ranges:
                    self.moves[start] = (ranges, end)
            case _Sequence(parts):
                end = self._step(start)
                for part in parts:
                    end = self._step(self.add(part, end))
            case _Choice(branches):
                end = self.state()
                for branch in branches:
                    self.empty[self.add(branch, self._step(start))].append(end)
            case _Repeat(part, low, high):
                end = self._step(start)
                for _ in range(low):
                    end = self._step(self.add(part, end))
                if high is None:
                    again = end
                    self.empty[self.add(part, self._step(again))].append(again)
                    end = self._step(again)
                else:
                    skips = []
                    for _ in range(high - low):
                        skips.append(end)
                        end = self._step(self.add(part, self._step(end)))
                    for skip in skips:
                        self.empty[skip].append(end)
        return end

    def _step(self, start: int) -> int:
        end = self.state()
        self.empty[start].append(end)
        return end


def _build(tree: _Tree) -> tuple[_Build, int, int]:
    build = _Build()
    start = build.state()
    return build, start, build.add(tree, start)


def _deterministic(build: _Build, start: int, end: int, spend: Callable[[int], None]) -> list[State]:
    """By sets of states."""

    def closure(states: set[int]) -> frozenset[int]:
        reached, waiting = set(states), list(states)
        while waiting:
            for each in build.empty[waiting.pop()]:
                if each not in reached:
                    reached.add(each)
                    waiting.append(each)
        spend(len(reached))
        return frozenset(each for each in reached if build.moves[each] is not None or each == end)

    numbers = {closure({start}): 0}
    order = list(numbers)
    result: list[State] = []
    for states in order:
        moves: dict[int, list[tuple[int, int]]] = {}
        parts = [move for state in states if (move := build.moves[state]) is not None]
        for low, high, targets in _segments(parts):
            key = closure(targets)
            if key not in numbers:
                if len(numbers) == MAX_STATES:
                    raise NotSupported(f"it needs more than {MAX_STATES} states")
                numbers[key] = len(numbers)
                order.append(key)
            moves.setdefault(numbers[key], []).append((low, high))
        result.append(State(end in states, tuple((merged(ranges), target) for target, ranges in moves.items())))
    return result


def _smaller(states: list[State]) -> list[State]:
    """With one state for those of which the same can be seen to follow, from the last on: words with equal endings
    share them.
    """
    same = list(range(len(states)))
    known: dict[State, int] = {}
    for index in reversed(range(len(states))):
        same[index] = known.setdefault(_moved(states[index], same), index)
    numbers = {same[0]: 0}
    order = list(numbers)
    result: list[State] = []
    for index in order:
        state = _moved(states[index], same)
        for _, target in state.moves:
            if target not in numbers:
                numbers[target] = len(numbers)
                order.append(target)
        result.append(State(state.accepts, tuple((ranges, numbers[target]) for ranges, target in state.moves)))
    return result


def _moved(state: State, targets: Sequence[int]) -> State:
    moves: dict[int, list[tuple[int, int]]] = {}
    for ranges, target in state.moves:
        moves.setdefault(targets[target], []).extend(ranges)
    return State(state.accepts, tuple((merged(ranges), target) for target, ranges in sorted(moves.items())))


def _segments(parts: list[tuple[Ranges, int]]) -> Iterator[tuple[int, int, set[int]]]:
    """The ranges of characters that lead to the same states, and these."""
    events: dict[int, tuple[list[int], list[int]]] = {}
    for ranges, target in parts:
        for low, high in ranges:
            events.setdefault(low, ([], []))[0].append(target)
            events.setdefault(high + 1, ([], []))[1].append(target)
    active: dict[int, int] = {}
    points = sorted(events)
    for point, following in pairwise(points):
        for target in events[point][0]:
            active[target] = active.get(target, 0) + 1
        for target in events[point][1]:
            active[target] -= 1
            if not active[target]:
                del active[target]
        if active:
            yield point, following - 1, set(active)
