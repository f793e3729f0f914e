"""JSON Schema (2020-12), read for what a grammar can guarantee: whatever is not supported is refused by name and place.

``facts`` of a place in a schema are its assertions with references followed and ``allOf`` merged; ``leaves`` are the
facts of each alternative that its unions leave. Definitions that hold themselves do so at most ``MAX_RECURSION`` times.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Final
from urllib.parse import unquote

from attestation.errors import EvidenceError
from attestation.strict_json import Json, decode_foreign
from enclave.grammar.gbnf import Grammar
from enclave.grammar.json_facts import (
    ANNOTATIONS,
    MAX_BRANCHES,
    READERS,
    Fact,
    Facts,
    Leaf,
    Numbers,
    Place,
    below,
    leaf_of,
    merged,
    properties,
    refused,
    required,
)

MAX_SCHEMA_SIZE: Final = 256 * 1024
"""Bytes of a schema in UTF-8."""
MAX_NESTING: Final = 64
"""Brackets within each other in a schema."""
MAX_DEFINITIONS: Final = 256
"""Places that references point to."""
MAX_REFERENCES: Final = 8
"""That lead from one to the next without a value between them."""
MAX_UNIONS: Final = 16
"""Within each other without a value between them."""
MAX_RECURSION: Final = 16
"""How often a definition that holds itself, by whatever way, is entered within itself."""

DIALECTS: Final = frozenset(
    {
        "https://json-schema.org/draft/2020-12/schema",
        "https://json-schema.org/draft/2019-09/schema",
        "http://json-schema.org/draft-07/schema",
    }
)
_CURRENT: Final = "https://json-schema.org/draft/2020-12/schema"


class Schema:
    """One schema's text, read. Everything raises InvalidRequest and nothing else."""

    def __init__(self, text: str, grammar: Grammar) -> None:
        """``grammar`` counts the steps."""
        self._spend = grammar.spend
        self._numbers = Numbers(grammar.spend)
        self._document = _parse(text)
        self._facts: dict[tuple[str, int], Facts | None] = {}
        self._leaves: dict[tuple[str, int], list[Leaf]] = {}
        self._is_current = True
        if isinstance(self._document, dict):
            dialect = self._document.get("$schema", _CURRENT)
            if not isinstance(dialect, str) or dialect.removesuffix("#") not in DIALECTS:
                raise refused("unknown dialect", "#/$schema", expected=" | ".join(sorted(DIALECTS)))
            self._is_current = dialect.removesuffix("#") == _CURRENT
        self._looping = self._find_looping()
        self.root = Place("#", self._document, MAX_RECURSION)

    def resolved(self, place: Place) -> Place:
        """Where ``place`` is nothing but a reference, what it refers to."""
        for _ in range(MAX_REFERENCES):
            if not isinstance(place.value, dict) or "$ref" not in place.value or place.recursions < 0:
                return place
            if any(key not in ANNOTATIONS for key in place.value if key != "$ref"):
                return place
            place = self._target(place)
        raise refused("references lead to references", place.pointer, expected=f"<= {MAX_REFERENCES}")

    def facts(self, place: Place) -> Facts | None:
        """What ``place`` asserts; None if nothing fulfils it."""
        return self._conjunction(place, ())

    def leaves(self, place: Place) -> list[Leaf]:
        """The alternatives of a value. Those of a ``oneOf`` are disjoint."""
        if place.key not in self._leaves:
            leaves: list[Leaf] = []
            for leaf in self._alternatives(place, {}, ()):
                leaves.append(leaf)
                if len(leaves) > MAX_BRANCHES:
                    raise refused("too many alternatives", place.pointer, expected=f"<= {MAX_BRANCHES}")
            self._leaves[place.key] = leaves
        return self._leaves[place.key]

    # --- References --------------------------------------------------------------------------------------------------

    def _target(self, place: Place) -> Place:
        assert isinstance(place.value, dict)
        reference = place.value["$ref"]
        if not isinstance(reference, str) or not (reference == "#" or reference.startswith("#/")):
            raise refused("$ref", f"{place.pointer}/$ref", expected="a place within the schema: #/$defs/NAME")
        found = self._find(reference)
        if found is None:
            raise refused("$ref leads nowhere", f"{place.pointer}/$ref", got=reference[:64])
        pointer, value = found
        return Place(pointer, value, place.recursions - 1 if pointer in self._looping else MAX_RECURSION)

    def _find(self, reference: str) -> tuple[str, Json] | None:
        """A place by its normal pointer."""
        value, pointer = self._document, "#"
        for part in unquote(reference[1:]).split("/")[1:]:
            name = part.replace("~1", "/").replace("~0", "~")
            if isinstance(value, dict) and name in value:
                value = value[name]
            elif isinstance(value, list) and name.isascii() and name.isdigit() and int(name[:9]) < len(value):
                value, name = value[int(name[:9])], str(int(name[:9]))
            else:
                return None
            pointer = below(pointer, name)
        return pointer, value

    def _find_looping(self) -> set[str]:
        """The places referred to from which references lead back to where one has been."""
        leads: dict[str, set[str]] = {}
        waiting = [("#", self._document)]
        while waiting:
            pointer, value = waiting.pop()
            if pointer in leads:
                continue
            if len(leads) > MAX_DEFINITIONS:
                raise refused("references to too many places", "#", expected=f"<= {MAX_DEFINITIONS}")
            found = [target for each in self._references(value) if (target := self._find(each)) is not None]
            leads[pointer] = {target for target, _ in found}
            waiting += found
        while True:  # what leads only to ends is an end
            self._spend(len(leads))
            rest = {pointer: targets for pointer, targets in leads.items() if targets & leads.keys()}
            if len(rest) == len(leads):
                return set(rest)
            leads = rest

    def _references(self, value: Json) -> set[str]:
        found: set[str] = set()
        waiting = [value]
        while waiting:
            each = waiting.pop()
            self._spend(1)
            if isinstance(each, dict):
                reference = each.get("$ref")
                if isinstance(reference, str):
                    found.add(reference)
                waiting += each.values()
            elif isinstance(each, list):
                waiting += each
        return found

    # --- Conjunction -------------------------------------------------------------------------------------------------

    def _conjunction(self, place: Place, path: tuple[str, ...]) -> Facts | None:
        """``path`` are the references that led here."""
        self._spend(1)
        if place.key not in self._facts:
            self._spend(8 + len(place.pointer) // 64)
            self._facts[place.key] = self._read(place, path)
        return self._facts[place.key]

    def _read(self, place: Place, path: tuple[str, ...]) -> Facts | None:
        if place.recursions < 0 or place.value is False:
            return None
        if place.value is True:
            return {}
        if not isinstance(place.value, dict):
            raise refused("no schema", place.pointer, expected="an object or a boolean")
        facts: dict[str, Fact] = {}
        others: list[tuple[Place, tuple[str, ...]]] = []
        for keyword, value in place.value.items():
            pointer = below(place.pointer, keyword)
            if keyword in ANNOTATIONS or (keyword in ("$schema", "$id") and place.pointer == "#"):
                continue
            if keyword in ("$defs", "definitions"):
                if not isinstance(value, dict):
                    raise refused(f"{keyword} is no object", pointer)
            elif keyword == "$ref":
                target = self._target(place)
                if target.pointer in path or len(path) == MAX_REFERENCES:
                    raise refused("a reference leads to itself, or over too many others", pointer)
                others.append((target, (*path, target.pointer)))
            elif keyword == "allOf":
                others += [(each, path) for each in place.children(value, pointer)]
            else:
                reader = READERS.get(keyword)
                if reader is None or (keyword == "prefixItems" and not self._is_current):
                    raise refused(f"{keyword!r} is not supported", pointer)
                name = "enum" if keyword == "const" else keyword
                if name in facts:
                    raise refused("enum and const", pointer, expected="one of them")
                facts[name] = Fact(reader(value, pointer, place), value, pointer)
        result: Facts = facts
        for other, way in others:
            more = self._conjunction(other, way)
            if more is None:
                return None
            result = merged(result, more, self._numbers)
        return result

    # --- Unions ------------------------------------------------------------------------------------------------------

    def _alternatives(self, place: Place, inherited: Facts, path: tuple[str, ...]) -> Iterator[Leaf]:
        if place.pointer in path or len(path) > MAX_UNIONS:
            raise refused(
                "alternatives lead to themselves, or to too many others", place.pointer, expected=f"<= {MAX_UNIONS}"
            )
        self._spend(1)
        own = self.facts(self.resolved(place))
        if own is None:
            return
        facts = merged(inherited, own, self._numbers)
        keyword = next((each for each in ("anyOf", "oneOf") if each in facts), None)
        if keyword is None:
            self._spend(1 + (len(facts["enum"].value) if "enum" in facts else 0))
            leaf = leaf_of(facts)
            if leaf is not None:
                yield leaf
            return
        union = facts[keyword]
        rest = {name: fact for name, fact in facts.items() if name != keyword}
        before: list[Leaf] = []
        for branch in union.value:
            leaves = []
            for leaf in self._alternatives(branch, rest, (*path, place.pointer)):
                self._spend(1)
                if keyword == "oneOf" and not all(self.are_disjoint(leaf, other) for other in before):
                    raise refused(
                        "two alternatives of a oneOf may both fit a value",
                        branch.pointer,
                        expected="types, values or required properties that tell them apart, or anyOf",
                    )
                leaves.append(leaf)
                yield leaf
            before += leaves

    def are_disjoint(self, one: Leaf, other: Leaf, depth: int = 1) -> bool:
        """No value fulfils both. False where that is not plain."""
        self._spend(1)
        if one.values is not None and other.values is not None:
            return set(map(self._numbers.of, one.values)).isdisjoint(map(self._numbers.of, other.values))
        types, others = (
            each.possible | {"integer"} if "number" in each.possible else each.possible for each in (one, other)
        )
        if types.isdisjoint(others):
            return True
        if types & others != {"object"} or depth > 2:
            return False
        ways = ((one, other), (other, one))
        return any(self._tells_apart(name, left, right, depth) for left, right in ways for name in required(left.facts))

    def _tells_apart(self, name: str, one: Leaf, other: Leaf, depth: int) -> bool:
        """The property ``name``, which ``one`` requires, differs in all values of ``other``, or is in none."""
        if name not in properties(other.facts):
            additional = other.facts.get("additionalProperties")
            return additional is not None and additional.raw is False
        if name not in properties(one.facts):
            return False
        first, second = (
            # Entered anew: that the recursion ends somewhere says nothing of the schema.
            self.leaves(replace(properties(each.facts)[name], recursions=MAX_RECURSION))
            for each in (one, other)
        )
        return all(self.are_disjoint(left, right, depth + 1) for left in first for right in second)


def _parse(text: str) -> Json:
    try:
        data = text.encode()
    except UnicodeEncodeError:
        raise refused("it is not Unicode", "#") from None
    if len(data) > MAX_SCHEMA_SIZE:
        raise refused("it is too large", "#", expected=f"<= {MAX_SCHEMA_SIZE} bytes", got=len(data))
    try:
        document = decode_foreign(data, code="invalid_request", max_depth=MAX_NESTING)
    except EvidenceError as error:
        raise refused(f"it cannot be read, {error.message[:200]}", "#") from error
    return document
