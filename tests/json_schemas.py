"""JSON schemas: such as people write, with documents that fit them, and any that hypothesis thinks of."""

from __future__ import annotations

from typing import Any, Final

from hypothesis import strategies as st

_TREE: Final = {
    "$defs": {
        "node": {
            "type": "object",
            "properties": {
                "value": {"type": "integer"},
                "children": {"type": "array", "items": {"$ref": "#/$defs/node"}},
            },
            "required": ["value", "children"],
            "additionalProperties": False,
        }
    },
    "$ref": "#/$defs/node",
}
_EXPRESSION: Final = {
    "$defs": {
        "expression": {
            "anyOf": [
                {
                    "type": "object",
                    "properties": {"kind": {"const": "number"}, "value": {"type": "number"}},
                    "required": ["kind", "value"],
                    "additionalProperties": False,
                },
                {
                    "type": "object",
                    "properties": {
                        "kind": {"enum": ["sum", "product"]},
                        "left": {"$ref": "#/$defs/expression"},
                        "right": {"$ref": "#/$defs/expression"},
                    },
                    "required": ["kind", "left", "right"],
                    "additionalProperties": False,
                },
            ]
        }
    },
    "type": "object",
    "properties": {"expression": {"$ref": "#/$defs/expression"}},
    "required": ["expression"],
}

REALISTIC: Final[dict[str, tuple[Any, list[Any]]]] = {
    "calendar event": (
        {
            "$schema": "https://json-schema.org/draft/2020-12/schema",
            "title": "Event",
            "type": "object",
            "properties": {
                "name": {"type": "string", "description": "What it is", "minLength": 1, "maxLength": 80},
                "date": {"type": "string", "format": "date"},
                "starts": {"type": "string", "format": "date-time"},
                "duration": {"type": "string", "format": "duration"},
                "participants": {"type": "array", "items": {"type": "string", "format": "email"}, "maxItems": 20},
                "priority": {"type": "integer", "minimum": 1, "maximum": 5, "default": 3},
                "place": {"anyOf": [{"$ref": "#/$defs/Place"}, {"type": "null"}], "default": None},
            },
            "required": ["name", "date", "participants"],
            "additionalProperties": False,
            "$defs": {
                "Place": {
                    "type": "object",
                    "properties": {
                        "lat": {"type": "number", "minimum": -90, "maximum": 90},
                        "lon": {"type": "number", "exclusiveMinimum": -180, "maximum": 180},
                    },
                    "required": ["lat", "lon"],
                }
            },
        },
        [
            {"name": "Tea", "date": "2026-02-28", "participants": []},
            {
                "name": 'The "big" one\n',
                "date": "2024-02-29",
                "starts": "2024-02-29T23:59:59.5+01:00",
                "duration": "PT1H30M",
                "participants": ["ada.l@example.org", "b@a-b.co"],
                "priority": 5,
                "place": {"lat": 51.5, "lon": -0.125},
            },
            {"name": "x", "date": "1999-12-31", "participants": ["a@b.cd"], "place": None},
        ],
    ),
    "nested lists": (
        {
            "type": "array",
            "items": {
                "type": "array",
                "items": {"type": "array", "items": {"type": ["integer", "null"]}, "minItems": 2},
            },
            "maxItems": 3,
        },
        [[], [[[1, 2], [None, -3, 0]], [], []]],
    ),
    "tree": (_TREE, [{"value": 1, "children": [{"value": 2, "children": []}, {"value": 3, "children": []}]}]),
    "expression": (
        _EXPRESSION,
        [
            {
                "expression": {
                    "kind": "sum",
                    "left": {"kind": "number", "value": 0.5},
                    "right": {
                        "kind": "product",
                        "left": {"kind": "number", "value": 1},
                        "right": {"kind": "number", "value": -2},
                    },
                }
            }
        ],
    ),
    "union": (
        {
            "oneOf": [
                {
                    "type": "object",
                    "properties": {"type": {"const": "text"}, "text": {"type": "string"}},
                    "required": ["type", "text"],
                },
                {
                    "type": "object",
                    "properties": {"type": {"const": "image"}, "width": {"type": "integer", "exclusiveMinimum": 0}},
                    "required": ["type", "width"],
                },
                {"type": "string"},
                {"type": "boolean"},
            ]
        },
        [{"type": "text", "text": ""}, {"type": "image", "width": 12}, "x", True],
    ),
    "values": (
        {
            "type": "object",
            "properties": {
                "größe": {"enum": ["klein", "groß", 'he said "no"', "a\\b", "tab\t", "日本", "😀", "", None, 1.5, -3]},
                'the "key"\n': {"const": {"a": [1, {"b": None}], "c": "x"}},
                "never": {"type": "null"},
            },
            "required": ["größe"],
        },
        [
            {"größe": "groß"},
            {"größe": 'he said "no"', 'the "key"\n': {"a": [1, {"b": None}], "c": "x"}},
            {"größe": None},
        ],
    ),
    "deep references": (
        {
            "definitions": {
                "a": {"allOf": [{"$ref": "#/definitions/b"}, {"required": ["x"]}]},
                "b": {"$ref": "#/definitions/c~1d"},
                "c/d": {"type": "object", "properties": {"x": {"$ref": "#/properties/first/items"}, "y": True}},
            },
            "type": "object",
            "properties": {"first": {"type": "array", "items": {"type": "boolean"}}, "a": {"$ref": "#/definitions/a"}},
            "required": ["a"],
        },
        [{"a": {"x": True}}, {"first": [False], "a": {"x": False, "y": {"any": [1, "thing"]}}}],
    ),
    "other names": (
        {
            "type": "object",
            "properties": {"id": {"type": "integer"}, "if": {"type": "string"}},
            "required": ["id"],
            "additionalProperties": {"type": "array", "items": {"type": "boolean"}},
        },
        [{"id": 1}, {"id": 1, "if": "x", "i": [], "ids": [True], "": [False, False], "zz": []}],
    ),
    "patterns": (
        {
            "type": "object",
            "properties": {
                "code": {"type": "string", "pattern": "^[A-Z]{3}-\\d{4}$"},
                "word": {"type": "string", "pattern": "ab+", "maxLength": 6},
                "path": {"type": "string", "pattern": '^(?:/[^/"]+)+$', "minLength": 4, "maxLength": 12},
                "id": {"type": "string", "format": "uuid"},
                "ip": {"type": "string", "format": "ipv4"},
                "host": {"type": "string", "format": "hostname", "maxLength": 30},
            },
            "required": ["code", "word"],
        },
        [
            {"code": "ABC-0123", "word": "xxabbb"},
            {
                "code": "XYZ-9999",
                "word": "ab",
                "path": "/a/b\\c",
                "id": "123e4567-e89b-12d3-a456-426614174000",
                "ip": "192.168.0.255",
                "host": "example.org",
            },
        ],
    ),
    "pairs": (
        {
            "type": "array",
            "prefixItems": [{"type": "string"}, {"type": "integer"}],
            "items": {"type": "boolean"},
            "minItems": 2,
        },
        [["a", 1], ["a", 1, True, False]],
    ),
    "anything": ({}, [1, "x", None, [1.5e3, {"a": {}}], {"a": [], "b": False}]),
    "any object": ({"type": "object"}, [{}, {"a": {"b": [1]}}]),
}

_BOUNDS: Final = st.one_of(st.integers(-300, 300), st.decimals(-20, 20, places=2).map(float))
_NAMES: Final = st.sampled_from(["a", "b", "ab", "é", 'q"', "x y", ""])
_PATTERNS: Final = st.sampled_from(
    [
        "^a*$",
        "b",
        "^(?:ab|cd)+$",
        "^[^a-z]{2,4}$",
        "^\\w+\\s?\\d$",
        '["\\\\]',
        "^.{3}$",
        "^x|y$",
        "^[\\d.-]+$",
        "^é{1,2}?$",
    ]
)
_VALUES: Final = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), st.floats(allow_nan=False, allow_infinity=False), st.text()),
    lambda inner: st.one_of(st.lists(inner, max_size=2), st.dictionaries(st.text(max_size=3), inner, max_size=2)),
    max_leaves=3,
)


@st.composite
def _numbers(draw: st.DrawFn) -> dict[str, Any]:
    schema: dict[str, Any] = {"type": draw(st.sampled_from(["integer", "number"]))}
    for keyword in ("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum"):
        if draw(st.booleans()):
            schema[keyword] = draw(_BOUNDS)
    return schema


@st.composite
def _strings(draw: st.DrawFn) -> dict[str, Any]:
    schema: dict[str, Any] = {"type": "string"}
    if draw(st.booleans()):
        schema["minLength"] = draw(st.integers(0, 20))
    if draw(st.booleans()):
        schema["maxLength"] = draw(st.integers(0, 40))
    kind = draw(st.integers(0, 3))
    if kind == 0:
        schema["pattern"] = draw(_PATTERNS)
    elif kind == 1:
        schema["format"] = draw(
            st.sampled_from(["date", "time", "date-time", "duration", "uuid", "ipv4", "ipv6", "hostname", "email"])
        )
    return schema


def _plain() -> st.SearchStrategy[Any]:
    return st.one_of(
        _numbers(),
        _strings(),
        st.sampled_from([{"type": "boolean"}, {"type": "null"}, {"type": ["integer", "null"]}, {}, True, False]),
        st.lists(_VALUES, min_size=1, max_size=4).map(lambda values: {"enum": values}),
        _VALUES.map(lambda value: {"const": value}),
        st.sampled_from([{"$ref": "#/$defs/one"}, {"$ref": "#/$defs/two"}]),
    )


@st.composite
def _objects(draw: st.DrawFn, inner: st.SearchStrategy[Any]) -> dict[str, Any]:
    schema: dict[str, Any] = {"type": "object", "properties": draw(st.dictionaries(_NAMES, inner, max_size=4))}
    if draw(st.booleans()):
        schema["required"] = draw(st.lists(_NAMES, max_size=3, unique=True))
    if draw(st.booleans()):
        schema["additionalProperties"] = draw(st.one_of(st.booleans(), inner))
    return schema


@st.composite
def _arrays(draw: st.DrawFn, inner: st.SearchStrategy[Any]) -> dict[str, Any]:
    schema: dict[str, Any] = {"type": "array"}
    if draw(st.booleans()):
        schema["items"] = draw(inner)
    if draw(st.booleans()):
        schema["prefixItems"] = draw(st.lists(inner, min_size=1, max_size=3))
    if draw(st.booleans()):
        schema["minItems"] = draw(st.integers(0, 3))
    if draw(st.booleans()):
        schema["maxItems"] = draw(st.integers(0, 5))
    return schema


def _extended(inner: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    return st.one_of(
        _objects(inner),
        _arrays(inner),
        st.lists(inner, min_size=1, max_size=3).map(lambda each: {"anyOf": each}),
        st.lists(inner, min_size=1, max_size=3).map(lambda each: {"oneOf": each}),
        st.lists(inner, min_size=1, max_size=2).map(lambda each: {"allOf": each}),
        st.tuples(_objects(inner), inner).map(lambda pair: pair[0] | {"anyOf": [pair[1], {"required": ["a"]}]}),
    )


@st.composite
def schemas(draw: st.DrawFn) -> Any:
    """Schemas of keywords that are supported, with references that may lead anywhere."""
    some = st.recursive(_plain(), _extended, max_leaves=6)
    schema = draw(some)
    if isinstance(schema, dict):
        schema = schema | {"$defs": {"one": draw(some), "two": draw(some)}}
    return schema
