"""What a JSON schema (2020-12) asserts of one value: its keywords, read and put together. A keyword that is not in
``READERS`` or ``ANNOTATIONS`` is none that a grammar can guarantee.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from decimal import Decimal
from typing import Any, Final, TypeAlias

from attestation.strict_json import Json
from enclave.generation import InvalidRequest

MAX_PROPERTIES: Final = 256
"""Of one object."""
MAX_ENUM_VALUES: Final = 1000
MAX_BRANCHES: Final = 256
"""Alternatives of one value."""
MAX_ITEMS: Final = 1024
"""That minItems, maxItems and prefixItems may count. Without maxItems there may be any number."""
MAX_LENGTH: Final = 65_536
"""Characters that minLength and maxLength may count. Without maxLength there may be any number."""

ANNOTATIONS: Final = frozenset(
    {"title", "description", "default", "examples", "deprecated", "readOnly", "writeOnly", "$comment"}
)
"""They assert nothing."""
_TYPES: Final = frozenset({"object", "array", "string", "number", "integer", "boolean", "null"})
_TYPE_OF: Final[Mapping[str, str]] = {
    **dict.fromkeys(("properties", "required", "additionalProperties"), "object"),
    **dict.fromkeys(("items", "prefixItems", "minItems", "maxItems", "uniqueItems"), "array"),
    **dict.fromkeys(("minLength", "maxLength", "pattern", "format"), "string"),
    **dict.fromkeys(("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum"), "number"),
}


@dataclass(frozen=True, slots=True)
class Place:
    """A schema within a schema."""

    pointer: str
    """RFC 6901, in a fragment: ``#/properties/a``."""
    value: Json
    recursions: int
    """How often a definition that holds itself may still be entered."""

    def child(self, value: Json, pointer: str) -> Place:
        """Raises InvalidRequest where it is no schema."""
        if not isinstance(value, dict | bool):
            raise refused("no schema", pointer, expected="an object or a boolean")
        return Place(pointer, value, self.recursions)

    def children(self, value: Json, pointer: str) -> list[Place]:
        """Those of a list. Raises InvalidRequest."""
        if not isinstance(value, list) or not 0 < len(value) <= MAX_BRANCHES:
            raise refused("no list of schemas", pointer, expected=f"1..{MAX_BRANCHES} schemas")
        return [self.child(each, below(pointer, str(index))) for index, each in enumerate(value)]

    @property
    def key(self) -> tuple[str, int]:
        return self.pointer, self.recursions


@dataclass(frozen=True, slots=True)
class Fact:
    value: Any
    """As its keyword's reader leaves it."""
    raw: Json
    pointer: str


Facts: TypeAlias = Mapping[str, Fact]
"""By keyword. ``const`` is an ``enum`` of one."""


@dataclass(frozen=True, slots=True)
class Leaf:
    facts: Facts
    types: frozenset[str]
    """That a value is given. Without ``integer`` where ``number`` is."""
    possible: frozenset[str]
    """That a value may have by the schema: more, where it names no type."""
    values: tuple[Json, ...] | None
    """All that it may be, where these are counted."""


def refused(message: str, pointer: str, *, expected: object | None = None, got: object | None = None) -> InvalidRequest:
    return InvalidRequest(f"the JSON schema: {message}, at {pointer}", expected=expected, got=got)


class Numbers:
    """One number for all values of a document that JSON Schema calls equal, and only for these: 1 is 1.0 and not true.
    Whatever is compared, and however often, each value is walked once.
    """

    def __init__(self, spend: Callable[[int], None]) -> None:
        """``spend`` is told of the steps, and may stop it with an error of its own."""
        self.spend = spend
        self._numbers: dict[object, int] = {}
        self._known: dict[int, tuple[Json, int]] = {}
        """Of lists and objects, which are kept beside their identities."""

    def of(self, value: Json) -> int:
        self.spend(1)
        form: object
        match value:
            case list():
                if id(value) in self._known:
                    return self._known[id(value)][1]
                form = "array", tuple(map(self.of, value))
            case dict():
                if id(value) in self._known:
                    return self._known[id(value)][1]
                form = "object", frozenset((name, self.of(each)) for name, each in value.items())
            case int() | float() if not isinstance(value, bool):
                form = "number", value
            case _:
                form = type(value), value
        number = self._numbers.setdefault(form, len(self._numbers))
        if isinstance(value, list | dict):
            self._known[id(value)] = value, number
        return number

    def are_same(self, one: Json, other: Json) -> bool:
        return one is other or self.of(one) == self.of(other)


def below(pointer: str, name: str) -> str:
    return f"{pointer}/{name.replace('~', '~0').replace('/', '~1')}"


def properties(facts: Facts) -> Mapping[str, Place]:
    return facts["properties"].value if "properties" in facts else {}


def required(facts: Facts) -> tuple[str, ...]:
    return facts["required"].value if "required" in facts else ()


def leaf_of(facts: Facts) -> Leaf | None:
    """None if no value has such a type. Raises InvalidRequest for a keyword that no type of the value's knows."""
    asserted = [keyword for keyword in facts if keyword not in ("type", "enum")]
    if "type" in facts:
        types: frozenset[str] = facts["type"].value
    else:  # a schema of one type's keywords is read as that type's
        types = frozenset(_TYPE_OF[keyword] for keyword in asserted) or _TYPES
    if "number" in types:
        types -= {"integer"}
    for keyword in asserted:
        if "enum" in facts:
            raise refused(f"{keyword!r} beside counted values", facts[keyword].pointer, expected="one of them")
        if types and _TYPE_OF[keyword] not in {"number" if each == "integer" else each for each in types}:
            raise refused(f"{keyword!r} says nothing of {' or '.join(sorted(types))}", facts[keyword].pointer)
    if "enum" in facts:
        values = tuple(each for each in facts["enum"].value if _types_of(each) & types)
    elif types <= {"null", "boolean"}:
        values = ((None,) if "null" in types else ()) + ((False, True) if "boolean" in types else ())
    else:
        return Leaf(facts, types, types if "type" in facts else _TYPES, None)
    if not values:
        return None
    types &= frozenset().union(*map(_types_of, values))
    return Leaf(facts, types, types, values)


def _types_of(value: Json) -> frozenset[str]:
    match value:
        case None:
            return frozenset({"null"})
        case bool():
            return frozenset({"boolean"})
        case int():
            return frozenset({"integer", "number"})
        case float():
            return frozenset({"integer", "number"} if value.is_integer() else {"number"})
        case str():
            return frozenset({"string"})
        case list():
            return frozenset({"array"})
    return frozenset({"object"})


def merged(one: Facts, other: Facts, numbers: Numbers) -> Facts:
    """Both. Raises InvalidRequest where that is no simple union."""
    numbers.spend(1 + len(one) + len(other))
    if not one or not other:
        return one or other
    for facts, against in ((one, other), (other, one)):
        for keyword, names in (("additionalProperties", "properties"), ("items", "prefixItems")):
            fact = facts.get(keyword)
            if (
                fact is not None
                and fact.raw is not True
                and names in against
                and against.get(names) is not facts.get(names)
            ):
                raise refused(f"{keyword!r} of one schema and {names!r} of another, for the same value", fact.pointer)
    result = dict(one)
    for keyword, fact in other.items():
        known = result.get(keyword)
        result[keyword] = (
            fact if known is None else Fact(_both(keyword, known, fact, numbers), known.raw, known.pointer)
        )
    return result


def _both(keyword: str, one: Fact, other: Fact, numbers: Numbers) -> Any:
    if keyword == "type":
        types = (each.value | {"integer"} if "number" in each.value else each.value for each in (one, other))
        return frozenset.intersection(*types)
    if keyword in ("required", "properties"):
        numbers.spend(len(one.value) + len(other.value))
    if keyword == "required":
        return tuple(dict.fromkeys((*one.value, *other.value)))
    if keyword == "properties":
        for name, place in other.value.items():
            if name in one.value and not numbers.are_same(one.value[name].value, place.value):
                raise refused("a property with two schemas", place.pointer, expected=one.value[name].pointer)
        return {**one.value, **{name: place for name, place in other.value.items() if name not in one.value}}
    if not numbers.are_same(one.raw, other.raw):
        raise refused(f"{keyword!r} stands twice for the same value", other.pointer, expected=one.pointer)
    return one.value


# --- Keywords ------------------------------------------------------------------------------------------------------


def _type(value: Json, pointer: str, place: Place) -> frozenset[str]:
    names = [value] if isinstance(value, str) else value
    if not isinstance(names, list) or not names or not all(isinstance(each, str) and each in _TYPES for each in names):
        raise refused("unknown type", pointer, expected=" | ".join(sorted(_TYPES)))
    return frozenset(map(str, names))


def _values(value: Json, pointer: str, place: Place) -> list[Json]:
    if not isinstance(value, list) or not 0 < len(value) <= MAX_ENUM_VALUES:
        raise refused("no list of values", pointer, expected=f"1..{MAX_ENUM_VALUES} values")
    return value


def _value(value: Json, pointer: str, place: Place) -> list[Json]:
    return [value]


def _named(value: Json, pointer: str, place: Place) -> dict[str, Place]:
    if not isinstance(value, dict) or len(value) > MAX_PROPERTIES:
        raise refused("no properties", pointer, expected=f"an object of <= {MAX_PROPERTIES} schemas")
    return {name: place.child(each, below(pointer, name)) for name, each in value.items()}


def _names(value: Json, pointer: str, place: Place) -> tuple[str, ...]:
    if not isinstance(value, list) or len(value) > MAX_PROPERTIES or not all(isinstance(each, str) for each in value):
        raise refused("no list of names", pointer, expected=f"<= {MAX_PROPERTIES} names")
    return tuple(dict.fromkeys(map(str, value)))


def _schema(value: Json, pointer: str, place: Place) -> Place:
    return place.child(value, pointer)


def _schemas(value: Json, pointer: str, place: Place) -> list[Place]:
    return place.children(value, pointer)


def _false(value: Json, pointer: str, place: Place) -> bool:
    if value is not False:
        raise refused("a grammar cannot compare items", pointer, expected="false", got=value)
    return False


def _text(value: Json, pointer: str, place: Place) -> str:
    if not isinstance(value, str):
        raise refused("no text", pointer, expected="text")
    return value


def _number(value: Json, pointer: str, place: Place) -> Decimal:
    if not isinstance(value, int | float) or isinstance(value, bool):
        raise refused("no number", pointer, expected="a number")
    return Decimal(repr(value))


def _count(limit: int) -> Callable[[Json, str, Place], int]:
    def read(value: Json, pointer: str, place: Place) -> int:
        if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value <= limit:
            raise refused("no count", pointer, expected=f"0..{limit}")
        return value

    return read


READERS: Final[Mapping[str, Callable[[Json, str, Place], Any]]] = {
    "type": _type,
    "enum": _values,
    "const": _value,
    "anyOf": _schemas,
    "oneOf": _schemas,
    "properties": _named,
    "required": _names,
    "additionalProperties": _schema,
    "items": _schema,
    "prefixItems": _schemas,
    "minItems": _count(MAX_ITEMS),
    "maxItems": _count(MAX_ITEMS),
    "uniqueItems": _false,
    "minLength": _count(MAX_LENGTH),
    "maxLength": _count(MAX_LENGTH),
    "pattern": _text,
    "format": _text,
    "minimum": _number,
    "maximum": _number,
    "exclusiveMinimum": _number,
    "exclusiveMaximum": _number,
}
