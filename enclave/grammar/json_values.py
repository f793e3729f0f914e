"""The rules of JSON's values (RFC 8259) as a model shall write them: without control characters, without halves of
surrogate pairs, with a bounded number of digits, and with little between two parts.

Where a text could be read in two ways, the sampler follows both, so the rules leave one way wherever that is possible.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from attestation.strict_json import Json
from enclave.generation import InvalidRequest
from enclave.grammar.gbnf import (
    Alternative,
    Chars,
    Grammar,
    Literal,
    Ranges,
    Ref,
    common,
    joined,
    merged,
    ranges_of,
    without,
)
from enclave.grammar.regular import ANY, State, automaton, lengths

MAX_FREE_DEPTH: Final = 16
"""Objects and arrays within each other where a value is left open."""
MAX_NAME: Final = 1024
"""Characters of a property's name."""
MAX_INDENTATION: Final = 24
"""Blanks behind a line's end."""
MAX_DIGITS: Final = 15
"""Before the point of a number, and behind it. Its exponent has two at most."""

_PLAIN: Final = without(ANY, merged((*ranges_of('"\\\x7f'), (0, 0x1F))))
"""What stands in a string as it is."""
_ESCAPES: Final = {'"': '"', "\\": "\\", "\n": "n", "\r": "r", "\t": "t", "\b": "b", "\f": "f"}
_DIGIT: Final[Ranges] = ((0x30, 0x39),)
_HEX: Final[Ranges] = ((0x30, 0x39), (0x41, 0x46), (0x61, 0x66))
_BLOCKS: Final = (4096, 256, 16, 1)
"""Characters that are counted at once, each block sixteen of the next."""


@dataclass(frozen=True, slots=True)
class Member:
    name: str
    value: Ref
    is_required: bool


class Values:
    """What the methods return are alternatives, or rules of them, of one grammar."""

    def __init__(self, grammar: Grammar) -> None:
        self._grammar = grammar
        rule = grammar.rule
        indentation = rule(())
        for _ in range(MAX_INDENTATION):
            indentation = rule((), (Chars(ranges_of(" \t")), indentation))
        self._space = rule((), (Literal(" "),), (Literal("\n"), indentation))
        self._blank = rule((), (Literal(" "),))
        self._character = self._make_character()
        self._blocks = {1: self._character}
        for size in reversed(_BLOCKS[:-1]):
            self._blocks[size] = rule((self._blocks[size // 16],) * 16)
        self._tails: dict[int | None, Ref] = {}
        self._rest_of_name = grammar.name()
        grammar.define(self._rest_of_name, ((Chars(_PLAIN), self._rest_of_name), (Literal('":'),)))
        self._digits = [rule(())]
        for _ in range(MAX_DIGITS):
            self._digits.append(rule((), (Chars(_DIGIT), self._digits[-1])))
        sign = rule((), (Literal("-"),))
        self.integer = rule((sign, Literal("0")), (sign, Chars(((0x31, 0x39),)), self._digits[MAX_DIGITS - 1]))
        """Any integer."""
        self.number = self._make_number()
        """Any number."""
        self._free: list[Ref] = []
        self._numerals: dict[str, Ref] = {}
        self._patterned: dict[tuple[str, int, int | None], Ref] = {}

    def _make_character(self) -> Ref:
        escape, digit = self._grammar.name(), Chars(_HEX)
        self._grammar.define(
            escape,
            (
                (Chars(ranges_of('"\\/bfnrt')),),
                (Literal("u"), Chars(without(_HEX, ranges_of("dD"))), digit, digit, digit),
                (Literal("u"), Chars(ranges_of("dD")), Chars(((0x30, 0x37),)), digit, digit),  # no surrogate
            ),
        )
        return self._grammar.rule((Chars(_PLAIN),), (Literal("\\"), escape))

    def _make_number(self) -> Ref:
        rule = self._grammar.rule
        fraction = rule((), (Literal("."), Chars(_DIGIT), self._digits[MAX_DIGITS - 1]))
        signs = rule((), (Chars(ranges_of("+-")),))
        exponent = rule((), (Chars(ranges_of("eE")), signs, Chars(_DIGIT), self._digits[1]))
        return rule((self.integer, fraction, exponent))

    # --- Any value ---------------------------------------------------------------------------------------------------

    def any_value(self, depth: int) -> Ref:
        """Objects and arrays are nested at most so deep in it."""
        while len(self._free) <= depth:
            values: list[Alternative] = [
                self.string(0, None),
                (self.number,),
                *((Literal(text),) for text in ("true", "false", "null")),
            ]
            if self._free:
                values += [self.members((), self._free[-1]), self.items((), self._free[-1], 0, None)]
            self._free.append(self._grammar.rule(*values))
        return self._free[depth]

    def any_object(self, depth: int) -> Ref:
        return self._grammar.rule(self.members((), self.any_value(depth - 1)))

    def constant(self, value: Json) -> Ref:
        """This value, and no other."""
        if isinstance(value, list):
            return self._grammar.rule(self.items([self.constant(each) for each in value], None, len(value), len(value)))
        if isinstance(value, dict):
            members = [Member(name, self.constant(each), True) for name, each in value.items()]
            return self._grammar.rule(self.members(members, None))
        return self._grammar.rule((Literal(json.dumps(value, ensure_ascii=False)),))

    def one_of(self, scalars: Iterable[Json]) -> Ref:
        return self._grammar.one_of(json.dumps(each, ensure_ascii=False) for each in scalars)

    # --- Strings and numbers -----------------------------------------------------------------------------------------

    def string(self, low: int, high: int | None) -> Alternative:
        """From ``low`` to ``high`` characters, or any number from ``low`` on."""
        parts: list[Ref] = []
        rest = low
        for size in _BLOCKS:
            parts += [self._blocks[size]] * (rest // size)
            rest %= size
        return (Literal('"'), *parts, self._tail(None if high is None else high - low))

    def _tail(self, high: int | None) -> Ref:
        """At most so many characters, and the quotation mark. To the number of blocks there is one way to read, and one
        more for each size of blocks within the last.
        """
        if high in self._tails:
            return self._tails[high]
        name = self._tails[high] = self._grammar.name()
        if high is None:
            return self._grammar.define(name, ((self._character, name), (Literal('"'),)))
        if high <= 0:
            return self._grammar.define(name, ((Literal('"'),),) if high == 0 else ())
        size = next(each for each in _BLOCKS if each <= high)
        ends = (Literal('"'),) if size == 1 else (self._tail(size - 1),)
        return self._grammar.define(name, ((self._blocks[size], self._tail(high - size)), ends))

    def patterned(self, pattern: str, low: int, high: int | None) -> Alternative:
        """A string of ``low`` to ``high`` characters in which a regular expression is found. Raises NotSupported."""
        key = pattern, low, high
        if key not in self._patterned:
            self._patterned[key] = self._accepted(automaton(pattern, self._grammar.spend), low, high)
        return (Literal('"'), self._patterned[key])

    def _accepted(self, states: Sequence[State], low: int, high: int | None) -> Ref:
        """The rest of such a string, behind its first quotation mark."""
        shortest, longest = lengths(states)
        if high is not None and longest is not None and longest <= high:
            high = None
        if shortest is not None and shortest >= low:
            low = 0
        known: dict[Ranges, tuple[Chars | None, Chars | None]] = {}

        def written_of(ranges: Ranges) -> tuple[Chars | None, Chars | None]:
            if ranges not in known:
                self._grammar.spend(len(ranges))
                known[ranges] = _written(ranges)
            return known[ranges]

        written = [[(*written_of(ranges), target) for ranges, target in state.moves] for state in states]
        rules: dict[tuple[int, int], Ref] = {}
        waiting: list[tuple[int, int]] = []

        def rule_of(state: int, count: int) -> Ref:
            key = state, min(count, low) if high is None else count
            if key not in rules:
                rules[key] = self._grammar.name()
                waiting.append(key)
            return rules[key]

        first = rule_of(0, 0)
        while waiting:
            state, count = waiting.pop()
            alternatives: list[Alternative] = [(Literal('"'),)] if states[state].accepts and count >= low else []
            escapes: list[Alternative] = []
            for plain, escaped, target in written[state] if count != high else ():
                if plain is not None:
                    alternatives.append((plain, rule_of(target, count + 1)))
                if escaped is not None:
                    escapes.append((escaped, rule_of(target, count + 1)))
            if escapes:
                alternatives.append((Literal("\\"), self._grammar.rule(*escapes)))
            self._grammar.define(rules[state, count], alternatives)
        return first

    def numeral(self, pattern: str) -> Ref:
        """A number whose digits match a regular expression."""
        if pattern not in self._numerals:
            self._numerals[pattern] = self._digits_of(pattern)
        return self._numerals[pattern]

    def _digits_of(self, pattern: str) -> Ref:
        states = automaton(pattern, self._grammar.spend)
        rules = [self._grammar.name() for _ in states]
        for rule, state in zip(rules, states, strict=True):
            moves: list[Alternative] = [(Chars(ranges), rules[target]) for ranges, target in state.moves]
            self._grammar.define(rule, [(), *moves] if state.accepts else moves)
        return rules[0]

    # --- Arrays and objects ------------------------------------------------------------------------------------------

    def items(self, first: Sequence[Ref], rest: Ref | None, low: int, high: int | None) -> Alternative:
        """An array of ``low`` to ``high`` items: those of ``first``, as many as there are, and then of ``rest``."""
        if rest is None:
            high = len(first) if high is None else min(high, len(first))
        closing = (self._space, Literal("]"))
        if high is None:
            assert rest is not None
            after = self._grammar.name()
            counted = max(low, len(first), 1)
            again: Alternative = (Literal(","), self._space, rest, after)
            self._grammar.define(after, (again, closing))
        else:
            counted = high
            after = self._grammar.rule(*([closing] if low <= high else []))
        for index in range(counted - 1, 0, -1):
            item = first[index] if index < len(first) else rest
            assert item is not None
            more: Alternative = (Literal(","), self._space, item, after)
            after = self._grammar.rule(more, *([closing] if index >= low else []))
        item = first[0] if first else rest
        alternatives: list[Alternative] = [(Literal("]"),)] if low == 0 else []
        if high != 0 and item is not None:
            alternatives.append((item, after))
        return (Literal("["), self._space, self._grammar.rule(*alternatives))

    def members(self, members: Sequence[Member], others: Ref | None) -> Alternative:
        """An object: ``members`` in this order, those left out that are not required, and then any with other names and
        values of ``others``, where there are others.
        """
        longest = max((len(member.name) for member in members), default=0)
        if longest > MAX_NAME:
            raise InvalidRequest("the schema has too long a name", expected=f"<= {MAX_NAME} characters", got=longest)
        closing: Alternative = (self._space, Literal("}"))
        names: _Names | None = None
        """From within the quotation marks of the next name on."""
        may_end = True
        if others is None:
            after = self._grammar.rule(closing)
        else:
            after = self._grammar.name()
            names = self._other_names(members, (self._blank, others, after))
            self._grammar.define(after, ((Literal(","), self._space, Literal('"'), *names.start), closing))
        for member in reversed(members):
            value: Alternative = (Literal('":'), self._blank, member.value, after)
            if member.is_required or names is None:
                names = self._tree((), {}, None)
            names = self._named(names, member.name, (value,))
            may_end = may_end and not member.is_required
            more: Alternative = (Literal(","), self._space, Literal('"'), *names.start)
            after = self._grammar.rule(more, *([closing] if may_end else []))
        opening: list[Alternative] = [] if names is None else [(Literal('"'), *names.start)]
        return (Literal("{"), self._space, self._grammar.rule(*opening, *([(Literal("}"),)] if may_end else [])))

    def _other_names(self, members: Sequence[Member], value: Alternative) -> _Names:
        """Names that are none of the members', each with a colon and ``value`` behind it. Such names have no escapes,
        so that there is one way to write each.
        """
        names = self._tree(((Literal('":'), *value),), {}, value)
        for member in members:
            if all(common(_PLAIN, ranges_of(letter)) for letter in member.name):
                names = self._named(names, member.name, ())
        return names

    def _named(self, names: _Names, name: str, ends: tuple[Alternative, ...]) -> _Names:
        """``names``, and ``name`` with ``ends`` behind it, whatever was there. Only its own letters' rules are new."""
        others = names.others
        nothing = _Names((), () if others is None else ((Literal('":'), *others),), {}, others)
        letters = _LETTER.findall(json.dumps(name, ensure_ascii=False)[1:-1])
        way = [names]
        for letter in letters:
            way.append(way[-1].letters.get(letter, nothing))
        made = self._tree(ends, way.pop().letters, others)
        for letter, above in zip(reversed(letters), reversed(way), strict=True):
            made = self._tree(above.ends, {**above.letters, letter: made}, others)
        return made

    def _tree(self, ends: tuple[Alternative, ...], letters: Mapping[str, _Names], others: Alternative | None) -> _Names:
        self._grammar.spend(1 + len(letters))
        alternatives = [*ends, *joined((letter, after.start) for letter, after in letters.items())]
        if others is not None:
            rest = without(_PLAIN, ranges_of(letter for letter in letters if len(letter) == 1))
            alternatives.append((Chars(rest), self._rest_of_name, *others))
        start = alternatives[0] if len(alternatives) == 1 else (self._grammar.shared(alternatives),)
        return _Names(start, ends, letters, others)


@dataclass(frozen=True, slots=True)
class _Names:
    """Names of properties, letter by letter, in rules that common beginnings share."""

    start: Alternative
    ends: tuple[Alternative, ...]
    """What follows where a name ends here."""
    letters: Mapping[str, _Names]
    """Each as it is written: a character or an escape."""
    others: Alternative | None
    """What follows a name that is none of these, and its colon, where there may be any."""


_LETTER: Final = re.compile(r"\\u[0-9a-f]{4}|\\.|.", re.DOTALL)


def _written(ranges: Ranges) -> tuple[Chars | None, Chars | None]:
    """These characters as they stand in a string, and the letters of those that are escaped. Other control characters
    are left out.
    """
    plain = common(ranges, _PLAIN)
    escaped = [letter for each, letter in _ESCAPES.items() if common(ranges, ranges_of(each))]
    return Chars(plain) if plain else None, Chars(ranges_of(escaped)) if escaped else None
