"""From a JSON schema, or the wish for any JSON object, to a grammar for llama.cpp's sampler: an answer that ended by
itself is valid. PROTOCOL.md section 7.2 lists what a schema may say.

The grammar admits fewer documents than the schema. Properties come in the schema's order, and those that it does not
name only where ``additionalProperties`` says so, or where it names none. A schema without a ``type``, whose keywords
are those of one type, is read as that type's. A definition that holds itself does so ``MAX_RECURSION`` times at most.
Numbers have a bounded number of digits (:mod:`enclave.grammar.numerals`, :mod:`enclave.grammar.json_values`), and
between two parts of a document stands nothing, a blank, or a line's end and an indentation. What may go on without a
bound is a string, an array, and an object of properties that are not named, where the schema sets none. What would
make the sampler slow is refused: too many ways to go on at one place (``MAX_OPEN``).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from decimal import Decimal
from itertools import combinations
from typing import Final, TypeAlias

from attestation.strict_json import Json
from enclave.generation import InvalidRequest
from enclave.grammar.gbnf import Alternative, Grammar, Literal, Openings, Ref
from enclave.grammar.json_facts import Fact, Facts, Leaf, Place, properties, refused, required
from enclave.grammar.json_schema import Schema
from enclave.grammar.json_values import MAX_FREE_DEPTH, Member, Values
from enclave.grammar.numerals import MAX_DIGITS, OutOfReach, decimals, integers
from enclave.grammar.regular import NotSupported
from vsockrpc.chat import NamedTool, Tool

MAX_OPEN: Final = 128
"""Ways to go on that may be open at one place: the characters, or sets of them, that different rest follows, in each of
the readings of what is there. Each costs the sampler a pass over the vocabulary.
"""
MAX_CALLS: Final = 16
"""Of tools, in one answer."""

_DATE: Final = (
    "(?:[1-9][0-9]{3}-(?:(?:0[13578]|1[02])-(?:0[1-9]|[12][0-9]|3[01])|(?:0[469]|11)-(?:0[1-9]|[12][0-9]|30)"
    "|02-(?:0[1-9]|1[0-9]|2[0-8]))"
    "|(?:[1-9][0-9](?:0[48]|[2468][048]|[13579][26])|(?:[2468][048]|[13579][26])00)-02-29)"
)
_TIME: Final = "(?:[01][0-9]|2[0-3]):[0-5][0-9]:[0-5][0-9](?:\\.[0-9]{1,6})?(?:Z|[+-](?:[01][0-9]|2[0-3]):[0-5][0-9])"
_OCTET: Final = "(?:25[0-5]|2[0-4][0-9]|1[0-9][0-9]|[1-9]?[0-9])"
_LABEL: Final = "[A-Za-z][A-Za-z0-9]{0,20}(?:-[A-Za-z0-9]{1,20}){0,2}"
_CLOCK: Final = "(?:[0-9]{1,4}H(?:[0-9]{1,4}M(?:[0-9]{1,4}S)?)?|[0-9]{1,4}M(?:[0-9]{1,4}S)?|[0-9]{1,4}S)"
_CALENDAR: Final = "(?:[0-9]{1,4}Y(?:[0-9]{1,4}M(?:[0-9]{1,4}D)?)?|[0-9]{1,4}M(?:[0-9]{1,4}D)?|[0-9]{1,4}D)"
FORMATS: Final = {
    "date": f"^{_DATE}$",
    "time": f"^{_TIME}$",
    "date-time": f"^{_DATE}T{_TIME}$",
    "duration": f"^P(?:[0-9]{{1,4}}W|{_CALENDAR}(?:T{_CLOCK})?|T{_CLOCK})$",
    "uuid": "^[0-9a-f]{8}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{12}$",
    "ipv4": f"^{_OCTET}(?:\\.{_OCTET}){{3}}$",
    "ipv6": "^[0-9a-f]{1,4}(?::[0-9a-f]{1,4}){7}$",
    "hostname": f"^{_LABEL}(?:\\.{_LABEL}){{0,2}}$",
    "email": f"^[A-Za-z0-9_+-]{{1,20}}(?:\\.[A-Za-z0-9_+-]{{1,20}}){{0,2}}@{_LABEL}(?:\\.{_LABEL}){{1,2}}$",
}
"""Formats, each as texts that surely have it: dates of the Gregorian calendar from the year 1000 on, times with an
offset and without leap seconds (RFC 3339), IPv6 written in full, UUIDs in lower case, host names and addresses in plain
ASCII."""

_Key: TypeAlias = tuple[str, int]


@dataclass(frozen=True, slots=True, kw_only=True)
class CallStyle:
    """The texts around calls, as a model's family writes them.

    ``opening`` ``before`` NAME ``between`` ARGUMENTS ``after`` (``separator`` ``before`` NAME …)* ``closing``
    """

    before: str
    between: str
    after: str
    opening: str = ""
    separator: str = "\n"
    closing: str = ""


HERMES: Final = CallStyle(before='<tool_call>\n{"name": "', between='", "arguments": ', after="}\n</tool_call>")
"""Hermes and Qwen."""
LLAMA: Final = CallStyle(before='{"name": "', between='", "parameters": ', after="}", separator="; ")
"""Llama 3.1 and later."""
BARE: Final = CallStyle(before='{"name": "', between='", "arguments": ', after="}")
"""For models that have no style of their own."""


def json_grammar(schema: str | None) -> str:
    """The GBNF whose rule ``root`` admits what the JSON text ``schema`` does, or any object for None.

    Raises InvalidRequest, naming keyword and place, for what is not supported or too large.
    """
    grammar = Grammar()
    values = Values(grammar)
    root = values.any_object(MAX_FREE_DEPTH) if schema is None else _Compiler(schema, values, grammar).root()
    return grammar.text(root)


def tool_call_grammar(tools: Sequence[Tool], choice: NamedTool | None, style: CallStyle, *, parallel: bool) -> str:
    """The GBNF of an answer that is calls and nothing else: of the tool that ``choice`` names, or of any, one or with
    ``parallel`` up to ``MAX_CALLS``. Arguments fit the called tool's schema, which has to be that of an object.

    Raises InvalidRequest, as ``json_grammar`` does, and where there is no such tool.
    """
    allowed = [tool for tool in tools if choice is None or tool.name == choice.name]
    if not allowed:
        raise InvalidRequest("there is no tool to call", expected="a tool", got=choice and choice.name)
    grammar = Grammar()
    values = Values(grammar)
    calls: list[Alternative] = []
    for tool in allowed:
        try:
            arguments = (
                values.constant({})
                if tool.parameters is None
                else _Compiler(tool.parameters, values, grammar).root(of_objects=True)
            )
        except InvalidRequest as error:
            message = f"the tool {tool.name!r}: {error.message}"
            raise InvalidRequest(message, expected=error.expected, got=error.got) from error
        calls.append((Literal(tool.name + style.between), arguments, Literal(style.after)))
    call = grammar.rule(*calls)
    rest = grammar.rule((Literal(style.closing),))
    for _ in range(MAX_CALLS - 1 if parallel else 0):
        rest = grammar.rule((Literal(style.closing),), (Literal(style.separator + style.before), call, rest))
    return grammar.text(grammar.rule((Literal(style.opening + style.before), call, rest)))


class _Compiler:
    """The rules of one schema's values. A rule is made for a place that is reached, and those below it later: the depth
    of Python's calls does not grow with the schema's.
    """

    def __init__(self, text: str, values: Values, grammar: Grammar) -> None:
        self._schema = Schema(text, grammar)
        self._values = values
        self._grammar = grammar
        self._rules: dict[_Key, Ref] = {}
        self._waiting: list[Place] = []
        self._leaves: dict[int, tuple[list[Alternative], list[Place]]] = {}
        """By the identity of the facts, which the schema keeps."""
        self._children: dict[_Key, list[tuple[Leaf, list[Place]]]] = {}
        self._counted: dict[_Key, list[Alternative]] = {}
        """The alternatives of counted values."""
        self._next: dict[tuple[int, int], frozenset[str] | None] = {}

    def root(self, *, of_objects: bool = False) -> Ref:
        """The rule of the whole schema, which with ``of_objects`` admits nothing else."""
        place = self._schema.resolved(self._schema.root)
        if of_objects and any(leaf.types != {"object"} for leaf in self._schema.leaves(place)):
            raise refused("arguments are an object", place.pointer, expected='"type": "object"')
        root = self._rule(place)
        while self._waiting:
            self._define(self._waiting.pop())
        self._limit_openings(place, root)
        return root

    def _rule(self, place: Place) -> Ref:
        if place.key not in self._rules:
            self._rules[place.key] = self._grammar.name()
            self._waiting.append(place)
        return self._rules[place.key]

    def _define(self, place: Place) -> None:
        alternatives: list[Alternative] = []
        counted: list[Alternative] = []
        scalars: list[Json] = []
        children = self._children[place.key] = []
        for leaf in self._schema.leaves(place):
            below: list[Place] = []
            if leaf.values is None:
                if id(leaf.facts) not in self._leaves:
                    self._leaves[id(leaf.facts)] = self._made(leaf)
                more, below = self._leaves[id(leaf.facts)]
                alternatives += more
            else:
                self._grammar.spend(len(leaf.values))
                scalars += [each for each in leaf.values if not isinstance(each, list | dict)]
                composites = [each for each in leaf.values if isinstance(each, list | dict)]
                counted += [(self._values.constant(each),) for each in composites]
            children.append((leaf, below))
        if scalars:
            counted.append((self._values.one_of(scalars),))
        self._counted[place.key] = counted
        self._grammar.define(self._rules[place.key], [*self._opened_once(alternatives), *counted])

    def _opened_once(self, alternatives: list[Alternative]) -> list[Alternative]:
        """Objects have one brace and what may follow it in common, and arrays theirs."""
        rests: dict[Alternative, list[Alternative]] = {}
        for each in alternatives:
            is_open = each[0] in (Literal("{"), Literal("["))
            rests.setdefault(each[:2] if is_open else each, []).append(each[2:] if is_open else ())
        return [
            (*opening, *each[0]) if len(each) == 1 else (*opening, self._grammar.rule(*each))
            for opening, each in rests.items()
        ]

    def _made(self, leaf: Leaf) -> tuple[list[Alternative], list[Place]]:
        """The alternatives of values that are not counted, and the places that they hold."""
        facts = leaf.facts
        below: list[Place] = []
        if not facts:
            return [(self._values.any_value(MAX_FREE_DEPTH),)], []
        alternatives: list[Alternative] = []
        for kind in sorted(leaf.types):
            match kind:
                case "object":
                    alternatives.append(self._object(facts, below))
                case "array":
                    alternatives.append(self._array(facts, below))
                case "string":
                    alternatives.append(self._string(facts))
                case "number" | "integer":
                    alternatives.append((self._number(facts, is_whole=kind == "integer"),))
                case "boolean":
                    alternatives += [(Literal("false"),), (Literal("true"),)]
                case _:
                    alternatives.append((Literal("null"),))
        return alternatives, below

    def _below(self, place: Place, below: list[Place]) -> Ref:
        place = self._schema.resolved(place)
        below.append(place)
        return self._rule(place)

    def _object(self, facts: Facts, below: list[Place]) -> Alternative:
        others: Ref | None = None
        additional = facts.get("additionalProperties")
        if additional is not None:
            others = self._below(additional.value, below)
        elif "properties" not in facts:
            others = self._values.any_value(MAX_FREE_DEPTH - 1)
        known = properties(facts)
        members = [Member(name, self._below(place, below), name in required(facts)) for name, place in known.items()]
        unknown = [name for name in required(facts) if name not in known]
        for name in unknown:
            members.append(Member(name, others or self._values.any_value(MAX_FREE_DEPTH - 1), True))
        return self._values.members(members, others)

    def _array(self, facts: Facts, below: list[Place]) -> Alternative:
        first = [self._below(each, below) for each in facts["prefixItems"].value] if "prefixItems" in facts else []
        rest: Ref | None = None
        if "items" in facts:
            rest = self._below(facts["items"].value, below)
        elif not first:
            rest = self._values.any_value(MAX_FREE_DEPTH - 1)
        low, high = _bounds(facts, "minItems", "maxItems")
        return self._values.items(first, rest, low, high)

    def _string(self, facts: Facts) -> Alternative:
        low, high = _bounds(facts, "minLength", "maxLength")
        fact = facts.get("pattern") or facts.get("format")
        if fact is None:
            return self._values.string(low, high)
        if "pattern" in facts and "format" in facts:
            raise refused("'pattern' and 'format' of the same value", fact.pointer, expected="one of them")
        pattern = str(fact.value)
        if "format" in facts:
            if pattern not in FORMATS:
                raise refused("unknown format", fact.pointer, expected=" | ".join(FORMATS), got=pattern[:64])
            pattern = FORMATS[pattern]
        try:
            return self._values.patterned(pattern, low, high)
        except NotSupported as error:
            raise refused(f"the pattern is not supported, {error}", fact.pointer) from error

    def _number(self, facts: Facts, *, is_whole: bool) -> Ref:
        low, above = _edge(facts.get("minimum"), facts.get("exclusiveMinimum"), is_low=True)
        high, below = _edge(facts.get("maximum"), facts.get("exclusiveMaximum"), is_low=False)
        if low is None and high is None:
            return self._values.integer if is_whole else self._values.number
        pattern = integers if is_whole else decimals
        try:
            return self._values.numeral(pattern(low, high, above=above, below=below))
        except OutOfReach:
            [fact, *_] = [facts[each] for each in _EDGES if each in facts]
            raise refused(
                "no number fits, or bounds of too many digits", fact.pointer, expected=f"<= {MAX_DIGITS} digits"
            ) from None

    # --- Openings ----------------------------------------------------------------------------------------------------

    def _limit_openings(self, root: Place, rule: Ref) -> None:
        """Refuses what leaves the sampler too many ways at once to go on."""
        openings = self._grammar.openings(rule)
        open_ways: dict[_Key, int] = {}
        known: dict[str, int] = {}
        waiting = [root]
        while waiting:
            place = waiting.pop()
            if place.key in open_ways:
                continue
            unknown = [each for _, below in self._children[place.key] for each in below if each.key not in open_ways]
            if unknown:
                waiting += [place, *unknown]
                continue
            count = open_ways[place.key] = known[self._rules[place.key].name] = self._open(place, openings, known)
            if count > MAX_OPEN:
                raise refused(
                    "alternatives look the same for too long, or too many characters may come next",
                    place.pointer,
                    expected=f"<= {MAX_OPEN} ways to go on; alternatives whose first properties differ",
                )

    def _open(self, place: Place, openings: Openings, known: dict[str, int]) -> int:
        """The most ways to go on in one of its values."""
        counted = [openings.most([each], {}) for each in self._counted[place.key]]
        groups: dict[str, list[tuple[Leaf, int]]] = {}
        for leaf, _ in self._children[place.key]:
            if leaf.values is None:
                alternatives, _ = self._leaves[id(leaf.facts)]
                own = openings.most(alternatives, known)
                for kind in leaf.types:
                    groups.setdefault("number" if kind == "integer" else kind, []).append((leaf, own))
        most = max(openings.first(self._rules[place.key]), sum(counted))
        for group in groups.values():
            each_own = [own for _, own in group]
            parts = [self._differ_early(one, other) for (one, _), (other, _) in combinations(group, 2)]
            if len(group) == 1 or any(each is None for each in parts):
                count = sum(each_own)
            else:
                after = max(each for each in parts if each is not None)
                count = max(sum(self._early(leaf, own, after, openings) for leaf, own in group), *each_own)
            most = max(most, count + sum(counted))
        return most

    def _early(self, leaf: Leaf, own: int, index: int, openings: Openings) -> int:
        """The ways to go on until the name of the property ``index``, or its value, tells other objects apart."""
        names = self._next_names(leaf.facts, index)
        assert names is not None, "it tells them apart"
        if index or len(names) > 1:
            return own
        [name] = names or {""}
        value = properties(leaf.facts).get(name)
        if value is None:
            return 2
        place = self._schema.resolved(value)
        return max(2, openings.most([(self._rules[place.key],)], {}, to_the_end=False))

    def _next_names(self, facts: Facts, index: int) -> frozenset[str] | None:
        """The names that may come next, behind ``index`` properties that are all required. None where any may."""
        key = id(facts), index
        if key not in self._next:
            self._grammar.spend(1 + len(properties(facts)) + len(required(facts)))
            self._next[key] = _next_names(facts, index)
        return self._next[key]

    def _differ_early(self, one: Leaf, other: Leaf) -> int | None:
        """Two objects of which no text is the beginning of both for longer than a few plain properties: behind how many
        they differ, by the next one's name or value.
        """
        if one.types != {"object"} or other.types != {"object"}:
            return None
        for index in range(_EARLY):
            first, second = self._next_names(one.facts, index), self._next_names(other.facts, index)
            self._grammar.spend(1)
            if first is None or second is None:
                return None
            if first.isdisjoint(second):
                return index
            if first != second or len(first) > 1:
                return None
            [name] = first
            left, right = (
                self._schema.leaves(self._schema.resolved(properties(each.facts)[name])) for each in (one, other)
            )
            pairs = [(each, another) for each in left for another in right]
            if all(self._schema.are_disjoint(*pair, depth=_NO_DEEPER) for pair in pairs):
                return index
            if any({"object", "array"} & leaf.types for leaf in (*left, *right)):
                return None
        return None


_EARLY: Final = 8
"""Properties."""
_NO_DEEPER: Final = 3
_EDGES: Final = ("minimum", "exclusiveMinimum", "maximum", "exclusiveMaximum")


def _next_names(facts: Facts, index: int) -> frozenset[str] | None:
    names, needed = list(properties(facts)), set(required(facts))
    if not needed.issuperset(names[:index]):
        return None
    found: set[str] = set()
    for name in names[index:]:
        found.add(name)
        if name in needed:
            return frozenset(found)
    additional = facts.get("additionalProperties")
    is_closed = additional.raw is False if additional is not None else "properties" in facts
    return frozenset(found) if is_closed and needed <= set(names) else None


def _bounds(facts: Facts, low: str, high: str) -> tuple[int, int | None]:
    return facts[low].value if low in facts else 0, facts[high].value if high in facts else None


def _edge(including: Fact | None, excluding: Fact | None, *, is_low: bool) -> tuple[Decimal | None, bool]:
    """The tighter of two bounds, and whether it is excluded itself."""
    edges = [(fact.value, is_out) for fact, is_out in ((including, False), (excluding, True)) if fact is not None]
    if not edges:
        return None, False
    return max(edges) if is_low else min(edges, key=lambda edge: (edge[0], not edge[1]))
