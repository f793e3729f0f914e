"""Grammars in GBNF, the notation of llama.cpp's grammar sampler, in the part of it that its parser reads without
recursion: rules, alternatives, literals, sets of characters and names. There are no groups and no repetitions.

llama.cpp's parser recurses into groups without a guard, its check for left recursion walks a shared beginning once for
each way to it, and a repetition of more than 2,000 turns into one without an end. So repetition is written out in rules
here, and the walks are counted before llama.cpp makes them.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Final, TypeAlias

from enclave.generation import InvalidRequest

ROOT: Final = "root"
MAX_RULES: Final = 20_000
"""Of a grammar, before those without a use are dropped."""
MAX_SIZE: Final = 1 << 18
"""Alternatives and what they consist of, ranges of characters one by one, before those without a use are dropped."""
MAX_GRAMMAR_CHARACTERS: Final = 1 << 20
MAX_BEGINNINGS: Final = 1 << 20
"""Steps that llama.cpp's check for left recursion takes, in all."""
MAX_BEGINNING_DEPTH: Final = 1024
"""Calls within each other that the same check makes."""

MAX_EFFORT: Final = 1 << 18
"""Steps of reading one request's schemas, patterns and unions: well under a second."""
MAX_SECONDS: Final = 1.0
"""Of the thread's CPU, from the first rule to the last, whatever the steps are."""
_CALLS_PER_LOOK: Final = 64
"""At the clock: each look is a system call."""

Ranges: TypeAlias = tuple[tuple[int, int], ...]
"""Code points, from and to, both included; in order and apart."""


@dataclass(frozen=True, slots=True)
class Literal:
    text: str


@dataclass(frozen=True, slots=True)
class Chars:
    """One character of these. Sets are always written as what they hold, never as what they do not: llama.cpp takes
    surrogates and numbers beyond Unicode for "another character"."""

    ranges: Ranges


@dataclass(frozen=True, slots=True)
class Ref:
    name: str


Element: TypeAlias = Literal | Chars | Ref
Alternative: TypeAlias = tuple[Element, ...]


class Grammar:
    """Rules by name, each defined once. Whatever the rules are, only InvalidRequest is raised."""

    def __init__(self, clock: Callable[[], float] = time.thread_time) -> None:
        """``clock`` gives seconds of work."""
        self._clock = clock
        self._deadline = clock() + MAX_SECONDS
        self._calls = 0
        self._effort = 0
        self._size = 0
        self._rules: dict[str, tuple[Alternative, ...]] = {}
        self._shared: dict[frozenset[Alternative], Ref] = {}
        self._count = 0

    def name(self) -> Ref:
        """A rule that is still to be defined."""
        self._count += 1
        if self._count > MAX_RULES:
            raise InvalidRequest(
                "the schema needs too large a grammar", expected=f"<= {MAX_RULES} rules", got="more rules"
            )
        return Ref(f"r{self._count}")

    def spend(self, steps: int) -> None:
        """Counts what it costs to find out the rules. Raises InvalidRequest when that is too much."""
        self._effort += steps
        if self._effort > MAX_EFFORT:
            raise InvalidRequest("the schema takes too long to read", expected=f"<= {MAX_EFFORT} steps")
        self._look()

    def _look(self) -> None:
        self._calls += 1
        if self._calls % _CALLS_PER_LOOK == 0 and self._clock() > self._deadline:
            raise InvalidRequest("the schema takes too long to read", expected=f"<= {MAX_SECONDS:g} s")

    def define(self, ref: Ref, alternatives: Iterable[Alternative]) -> Ref:
        self._rules[ref.name] = tuple(dict.fromkeys(map(self._counted, alternatives)))
        return ref

    def _counted(self, alternative: Alternative) -> Alternative:
        self._size += 1 + sum(map(_size, alternative))
        if self._size > MAX_SIZE:
            raise InvalidRequest("the schema needs too large a grammar", expected=f"<= {MAX_SIZE} parts")
        self._look()
        return alternative

    def rule(self, *alternatives: Alternative) -> Ref:
        return self.define(self.name(), alternatives)

    def shared(self, alternatives: Iterable[Alternative]) -> Ref:
        """A rule of these alternatives, the one that there is where there is one."""
        key = frozenset(alternatives)
        if key not in self._shared:
            self._shared[key] = self.rule(*dict.fromkeys(alternatives))
        return self._shared[key]

    def one_of(self, texts: Iterable[str]) -> Ref:
        """One of these texts, with common beginnings read once: however many they are, there is one way to read. Where
        several characters may come that the same follows, they are one set.
        """
        groups: list[list[str]] = [sorted(set(texts))]
        nodes: list[list[tuple[str, int | None]]] = []
        for remainders in groups:
            edges: list[tuple[str, int | None]] = []
            for start, group in _by_first(remainders):
                self.spend(1 + len(group) // 8)
                if len(group) == 1:
                    edges.append((start + group[0], None))
                else:
                    edges.append((start, len(groups)))
                    groups.append(group)
            nodes.append(edges)
        rules: dict[int | None, Alternative] = {None: ()}
        for index in reversed(range(len(nodes))):
            moves = [(text, rules[target]) for text, target in nodes[index] if text]
            ends: list[Alternative] = [()] if ("", None) in nodes[index] else []
            rules[index] = (self.shared([*ends, *joined(moves)]),)
        [first] = rules[0]
        assert isinstance(first, Ref)
        return first

    def openings(self, root: Ref) -> Openings:
        """Of all rules that ``root`` needs."""
        return Openings(_reachable(self._rules, root.name), root.name, self.spend)

    def text(self, root: Ref) -> str:
        """The grammar from ``root`` on, whose rule is called ``root``.

        Alternatives that cannot come to an end are left out, and rules that nothing needs. Raises InvalidRequest where
        nothing is left, or too much.
        """
        rules = _finite(self._rules)
        if not rules.get(root.name):
            raise InvalidRequest("the schema admits no value", expected="a schema that a finite value fulfils")
        rules = _reachable(rules, root.name)
        _count_beginnings(rules)
        lines, size = [f"{ROOT} ::= {root.name}\n"], 0
        for name, alternatives in rules.items():
            lines.append(f"{name} ::= {' | '.join(map(_alternative, alternatives))}\n")
            size += len(lines[-1])
            if size > MAX_GRAMMAR_CHARACTERS:
                raise InvalidRequest(
                    "the schema needs too large a grammar", expected=f"<= {MAX_GRAMMAR_CHARACTERS} characters"
                )
        return "".join(lines)


class Openings:
    """How many ways there are to go on, at the place of a grammar where there are most. llama.cpp keeps a stack for
    each of them and makes a pass over the vocabulary for each stack. Counted is what one reading of a text leaves open.
    """

    def __init__(self, rules: Mapping[str, tuple[Alternative, ...]], root: str, spend: Callable[[int], None]) -> None:
        self._rules = rules
        self._spend = spend
        self._empty = _empty(rules)
        self._firsts: dict[str, int] = {}
        """At the beginning of each rule."""
        corners = {name: list(_corners(alternatives, self._empty)) for name, alternatives in rules.items()}
        for name in _corners_first(corners):
            self._firsts[name] = min(_MANY, sum(map(self._count, rules[name])))
        self._within: dict[str, int] = {}
        """At any place of each rule's own, but not in the rules that it names, nor behind its end."""
        self._most: dict[str, int] = {}
        """The same with what may follow it."""
        behind = dict.fromkeys(rules, 0)
        tails: dict[str, list[tuple[str | None, int, bool]]] = {}
        waiting = {root: None}
        while waiting:
            name, _ = waiting.popitem()
            spend(1)
            within = most = self._firsts[name]
            most += behind[name] if name in self._empty else 0
            if name not in tails:
                tails[name] = [tail for each in rules[name] for tail in self._tails(each)]
            for after, count, may_end in tails[name]:
                within = max(within, count)
                if may_end:
                    count = min(_MANY, count + behind[name])
                most = max(most, count)
                if after is not None and (count > behind[after] or after not in self._most):
                    behind[after] = max(count, behind[after])
                    waiting[after] = None
                    self._most.setdefault(after, 0)
            self._within[name], self._most[name] = within, most

    def _count(self, alternative: Alternative) -> int:
        """At its beginning."""
        count = 0
        for element in alternative:
            if isinstance(element, Ref):
                count += self._firsts[element.name]
                if element.name not in self._empty:
                    return count
            elif element != _NOTHING:
                return count + 1
        return count

    def _tails(self, alternative: Alternative) -> list[tuple[str | None, int, bool]]:
        """The ways to go on behind each of its elements, whose name stands first if it is a rule's, and whether the
        alternative may end there.
        """
        count, may_end = 0, True
        tails: list[tuple[str | None, int, bool]] = []
        for element in reversed(alternative):
            if isinstance(element, Ref):
                tails.append((element.name, count, may_end))
                is_empty = element.name in self._empty
                count = min(_MANY, self._firsts[element.name] + (count if is_empty else 0))
                may_end = may_end and is_empty
            else:
                tails.append((None, count, may_end))
                if element != _NOTHING:
                    count, may_end = 1, False
        return tails

    def first(self, ref: Ref) -> int:
        """At its beginning."""
        return self._firsts.get(ref.name, 0)

    def most(self, alternatives: Iterable[Alternative], known: Mapping[str, int], *, to_the_end: bool = True) -> int:
        """In these alternatives and all that they name, but not in the rules that are ``known``; without
        ``to_the_end`` what follows does not count.
        """
        counts = self._most if to_the_end else self._within
        waiting = [element.name for each in alternatives for element in each if isinstance(element, Ref)]
        seen: set[str] = set()
        most = 1
        while waiting:
            name = waiting.pop()
            if name in known:
                most = max(most, known[name])
            elif name not in seen and name in self._rules:
                seen.add(name)
                self._spend(1)
                most = max(most, counts[name])
                waiting += [element.name for each in self._rules[name] for element in each if isinstance(element, Ref)]
        return most


_MANY: Final = 1 << 20
_NOTHING: Final = Literal("")


def joined(moves: Iterable[tuple[str, Alternative]]) -> list[Alternative]:
    """Each text before what follows it; texts that differ in their first characters alone, and are followed by the
    same, as one alternative.
    """
    firsts: dict[tuple[str, Alternative], list[str]] = {}
    for text, after in moves:
        if after and isinstance(after[0], Literal):
            text, after = text + after[0].text, after[1:]
        firsts.setdefault((text[1:], after), []).append(text[0])
    found: list[Alternative] = []
    for (rest, after), letters in firsts.items():
        if len(letters) == 1:
            found.append((Literal(letters[0] + rest), *after))
        else:
            found.append((Chars(ranges_of(letters)), *((Literal(rest),) if rest else ()), *after))
    return found


def ranges_of(characters: Iterable[str | int]) -> Ranges:
    points = sorted({ord(each) if isinstance(each, str) else each for each in characters})
    return merged((point, point) for point in points)


def merged(ranges: Iterable[tuple[int, int]]) -> Ranges:
    """In order and apart."""
    result: list[tuple[int, int]] = []
    for low, high in sorted(ranges):
        if result and low <= result[-1][1] + 1:
            result[-1] = (result[-1][0], max(high, result[-1][1]))
        else:
            result.append((low, high))
    return tuple(result)


def without(ranges: Ranges, other: Ranges) -> Ranges:
    result: list[tuple[int, int]] = []
    for low, high in ranges:
        for left, right in other:
            if right < low or left > high:
                continue
            if left > low:
                result.append((low, left - 1))
            low = right + 1
        if low <= high:
            result.append((low, high))
    return tuple(result)


def common(ranges: Ranges, other: Ranges) -> Ranges:
    return without(ranges, without(ranges, other))


def _by_first(texts: Sequence[str]) -> Iterator[tuple[str, list[str]]]:
    """Sorted texts by what each group begins with in common, and what follows it."""
    at = 0
    while at < len(texts):
        first = texts[at][:1]
        end = at + 1
        while end < len(texts) and texts[end][:1] == first:
            end += 1
        low, high = texts[at], texts[end - 1]
        length = 0
        while length < len(low) and low[length] == high[length]:
            length += 1
        yield low[:length], [text[length:] for text in texts[at:end]]
        at = end


def _finite(rules: Mapping[str, tuple[Alternative, ...]]) -> dict[str, tuple[Alternative, ...]]:
    """Without the alternatives that need a rule which cannot end."""
    users: dict[str, list[tuple[str, int]]] = {}
    missing: dict[tuple[str, int], int] = {}
    ends: set[str] = set()
    waiting: list[str] = []

    def found(name: str) -> None:
        if name not in ends:
            ends.add(name)
            waiting.append(name)

    for name, alternatives in rules.items():
        for index, alternative in enumerate(alternatives):
            needed = {element.name for element in alternative if isinstance(element, Ref)}
            missing[name, index] = len(needed)
            for each in needed:
                users.setdefault(each, []).append((name, index))
            if not needed:
                found(name)
    while waiting:
        for user in users.get(waiting.pop(), ()):
            missing[user] -= 1
            if not missing[user]:
                found(user[0])
    return {
        name: tuple(alternative for index, alternative in enumerate(alternatives) if not missing[name, index])
        for name, alternatives in rules.items()
        if name in ends
    }


def _reachable(rules: Mapping[str, tuple[Alternative, ...]], root: str) -> dict[str, tuple[Alternative, ...]]:
    reached = {root: None}
    waiting = [root]
    while waiting:
        for alternative in rules[waiting.pop()]:
            for element in alternative:
                if isinstance(element, Ref) and element.name not in reached:
                    reached[element.name] = None
                    waiting.append(element.name)
    return {name: rules[name] for name in reached}


def _count_beginnings(rules: Mapping[str, tuple[Alternative, ...]]) -> None:
    """Refuses a grammar whose left corners llama.cpp would walk for too long, or for ever."""
    empty = _empty(rules)
    corners = {name: list(_corners(alternatives, empty)) for name, alternatives in rules.items()}
    steps: dict[str, int] = {}
    depths: dict[str, int] = {}
    total = 0
    for name in _corners_first(corners):
        steps[name] = 1 + sum(steps[each] for each in corners[name])
        depths[name] = 1 + max((depths[each] for each in corners[name]), default=0)
        total += steps[name]
        if total > MAX_BEGINNINGS or depths[name] > MAX_BEGINNING_DEPTH:
            raise InvalidRequest("the schema's alternatives are nested too much", expected=f"<= {MAX_BEGINNINGS} steps")


def _empty(rules: Mapping[str, tuple[Alternative, ...]]) -> set[str]:
    """The rules that may stand for nothing: the compiler writes no other than those that say so themselves."""
    return {name for name, alternatives in rules.items() if () in alternatives}


def _corners_first(corners: Mapping[str, Sequence[str]]) -> Iterator[str]:
    """Each rule behind those that it may begin with. Raises InvalidRequest where that is itself."""
    done: set[str] = set()
    open_rules: set[str] = set()
    for start in corners:
        waiting = [start]
        while waiting:
            name = waiting[-1]
            unknown = [each for each in corners[name] if each not in done] if name not in done else []
            if unknown:
                if name in open_rules:
                    raise InvalidRequest("the schema needs a grammar that begins with itself")
                open_rules.add(name)
                waiting += unknown
                continue
            waiting.pop()
            if name not in done:
                done.add(name)
                yield name


def _corners(alternatives: Iterable[Alternative], empty: set[str]) -> Iterator[str]:
    for alternative in alternatives:
        for element in alternative:
            if not isinstance(element, Ref):
                break
            yield element.name
            if element.name not in empty:
                break


def _size(element: Element) -> int:
    match element:
        case Literal(text):
            return 1 + len(text) // 8
        case Chars(ranges):
            return len(ranges)
        case Ref():
            return 1


def _alternative(alternative: Alternative) -> str:
    return " ".join(map(_written, alternative)) or '""'


def _written(element: Element) -> str:
    match element:
        case Literal(text):
            return f'"{"".join(map(_character, map(ord, text)))}"'
        case Chars(ranges):
            return f"[{''.join(_range(low, high) for low, high in ranges)}]"
        case Ref(name):
            return name


def _range(low: int, high: int) -> str:
    return _character(low) if low == high else f"{_character(low)}-{_character(high)}"


def _character(point: int) -> str:
    """A character in a literal or in a set: itself where neither gives it a meaning."""
    character = chr(point)
    if character.isascii() and (character.isalnum() or character in " _,:{}.+/=<>"):
        return character
    if point < 1 << 8:
        return f"\\x{point:02X}"
    return f"\\u{point:04X}" if point < 1 << 16 else f"\\U{point:08X}"
