"""Grammars in GBNF, the notation of llama.cpp's grammar sampler, in the part of it that its parser reads without
recursion: rules, alternatives, literals, sets of characters and names. There are no groups and no repetitions.

llama.cpp's parser recurses into groups without a guard, its check for left recursion walks a shared beginning once for
each way to it, and a repetition of more than 2,000 turns into one without an end. So repetition is written out in rules
here, and the walks are counted before llama.cpp makes them.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Final, TypeAlias

from enclave.generation import InvalidRequest

ROOT: Final = "root"
MAX_RULES: Final = 20_000
"""Of a grammar, before those without a use are dropped."""
MAX_GRAMMAR_CHARACTERS: Final = 1 << 20
MAX_BEGINNINGS: Final = 1 << 20
"""Steps that llama.cpp's check for left recursion takes, in all."""
MAX_BEGINNING_DEPTH: Final = 1024
"""Calls within each other that the same check makes."""

MAX_EFFORT: Final = 1 << 18
"""Steps of reading one request's schemas, patterns and unions: well under a second."""

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

    def __init__(self) -> None:
        self._effort = 0
        self._rules: dict[str, tuple[Alternative, ...]] = {}
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

    def define(self, ref: Ref, alternatives: Iterable[Alternative]) -> Ref:
        self._rules[ref.name] = tuple(dict.fromkeys(alternatives))
        return ref

    def rule(self, *alternatives: Alternative) -> Ref:
        return self.define(self.name(), alternatives)

    def one_of(self, texts: Iterable[str]) -> Ref:
        """One of these texts, with common beginnings read once: however many they are, there is one way to read."""
        first = self.name()
        waiting = [(first, sorted(set(texts)))]
        while waiting:
            ref, remainders = waiting.pop()
            alternatives: list[Alternative] = []
            for start, group in _by_first(remainders):
                if not start:
                    alternatives.append(())
                elif len(group) == 1:
                    alternatives.append((Literal(start + group[0]),))
                else:
                    rest = self.name()
                    alternatives.append((Literal(start), rest))
                    waiting.append((rest, group))
            self.define(ref, alternatives)
        return first

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
    users: dict[str, list[tuple[str, Alternative]]] = {}
    missing: dict[tuple[str, Alternative], int] = {}
    ends: set[str] = set()
    waiting: list[str] = []

    def found(name: str) -> None:
        if name not in ends:
            ends.add(name)
            waiting.append(name)

    for name, alternatives in rules.items():
        for alternative in alternatives:
            needed = {element.name for element in alternative if isinstance(element, Ref)}
            missing[name, alternative] = len(needed)
            for each in needed:
                users.setdefault(each, []).append((name, alternative))
            if not needed:
                found(name)
    while waiting:
        for user in users.get(waiting.pop(), ()):
            missing[user] -= 1
            if not missing[user]:
                found(user[0])
    return {
        name: tuple(alternative for alternative in alternatives if not missing[name, alternative])
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
    empty = {name for name, alternatives in rules.items() if () in alternatives}
    corners = {name: list(_corners(alternatives, empty)) for name, alternatives in rules.items()}
    steps: dict[str, int] = {}
    depths: dict[str, int] = {}
    total = 0
    for start in rules:
        waiting = [start]
        open_rules: set[str] = set()
        while waiting:
            name = waiting[-1]
            if name in steps:
                waiting.pop()
                continue
            unknown = [each for each in corners[name] if each not in steps]
            if unknown and name in open_rules:
                raise InvalidRequest("the schema needs a grammar that begins with itself")
            open_rules.add(name)
            waiting += unknown
            if not unknown:
                steps[name] = 1 + sum(steps[each] for each in corners[name])
                depths[name] = 1 + max((depths[each] for each in corners[name]), default=0)
        total += steps[start]
        if total > MAX_BEGINNINGS or depths[start] > MAX_BEGINNING_DEPTH:
            raise InvalidRequest("the schema's alternatives are nested too much", expected=f"<= {MAX_BEGINNINGS} steps")


def _corners(alternatives: Iterable[Alternative], empty: set[str]) -> Iterator[str]:
    for alternative in alternatives:
        for element in alternative:
            if not isinstance(element, Ref):
                break
            yield element.name
            if element.name not in empty:
                break


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
