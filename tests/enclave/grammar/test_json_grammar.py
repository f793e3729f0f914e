"""Grammars from JSON schemas: what they admit is valid, and what cannot be guaranteed is refused."""

from __future__ import annotations

import itertools
import json
import random
import re
import time
from typing import Any

import jsonschema
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from enclave.generation import InvalidRequest
from enclave.grammar import gbnf
from enclave.grammar.json_grammar import (
    BARE,
    FORMATS,
    HERMES,
    LLAMA,
    MAX_OPEN,
    CallStyle,
    json_grammar,
    tool_call_grammar,
)
from tests.gbnf import Reader
from tests.json_schemas import REALISTIC, schemas
from vsockrpc.chat import NamedTool, Tool


def reader_of(schema: Any) -> Reader:
    return Reader.of(json_grammar(json.dumps(schema)))


def admits(schema: Any, *texts: str) -> list[bool]:
    reader = reader_of(schema)
    return [reader.admits(text) for text in texts]


def validate(text: str, schema: Any) -> None:
    """Strictly: one reading of the text, and every format that is known."""
    value = json.loads(text, parse_constant=pytest.fail)
    kind = jsonschema.validators.validator_for(schema, default=jsonschema.Draft202012Validator)
    kind.check_schema(schema)
    kind(schema, format_checker=kind.FORMAT_CHECKER).validate(value)
    json.dumps(value, ensure_ascii=False).encode()  # no half of a character


def refusal(schema: Any) -> str:
    with pytest.raises(InvalidRequest) as caught:
        json_grammar(schema if isinstance(schema, str) else json.dumps(schema))
    assert caught.value.code == "invalid_request"
    return str(caught.value)


# --- What is admitted is valid -------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", REALISTIC)
def test_what_a_realistic_schema_s_grammar_admits_is_valid(name: str) -> None:
    schema, documents = REALISTIC[name]
    reader = reader_of(schema)
    for seed in range(60):
        validate(reader.derived(random.Random(seed)), schema)
    for document in documents:
        for form in ({}, {"indent": 2}, {"indent": "\t"}, {"separators": (",", ":")}):
            text = json.dumps(document, ensure_ascii=False, **form)
            validate(text, schema)
            assert reader.admits(text)


@given(schema=schemas(), seed=st.integers(0, 2**32 - 1))
@settings(max_examples=150, deadline=None)
def test_what_a_grammar_admits_is_valid(schema: Any, seed: int) -> None:
    try:
        grammar = json_grammar(json.dumps(schema))
    except InvalidRequest:
        return
    reader, source = Reader.of(grammar), random.Random(seed)
    for _ in range(5):
        text = reader.derived(source)
        validate(text, schema)
        assert reader.admits(text)


# --- What is admitted ----------------------------------------------------------------------------------------------


def test_without_a_schema_any_object_is_admitted() -> None:
    reader = Reader.of(json_grammar(None))
    for document in ({}, {"a": [1, -0.5e-3, {"b": None}], "": "\u20ac \\", "c": {}}):
        assert reader.admits(json.dumps(document))
    for text in ("[]", "1", '"a"', "{", "{}}", "{} ", '{"a":1,}', '{"a" :1}', '{"a":01}', '{"a":"\n"}', "{'a':1}"):
        assert not reader.admits(text)
    for seed in range(100):
        assert isinstance(json.loads(reader.derived(random.Random(seed))), dict)


def test_white_space_has_an_end() -> None:
    reader = Reader.of(json_grammar(None))
    assert reader.admits('{\n  "a": [\n\t\t1,\n    2\n  ]\n}')
    for text in ('{  "a": 1}', '{"a":  1}', "{\n\n}", "{\n" + 25 * " " + "}", " {}"):
        assert not reader.admits(text)


def test_a_value_that_is_left_open_is_nested_so_deep_and_no_deeper() -> None:
    reader = Reader.of(json_grammar("{}"))
    assert reader.admits("[" * 16 + "]" * 16)
    assert not reader.admits("[" * 17)
    assert not reader.admits("[" * 17 + "]" * 17)


@pytest.mark.parametrize(
    ("text", "is_valid"),
    [
        (r"\u00e9", True),
        (r"\ud7ff\ue000", True),
        (r"\ud83d\ude00", False),
        (r"\ud800", False),
        (r"\uDFFF", False),
        (r"\u12g4", False),
        (r"\x41", False),
        (r"\"\\\/\b\f\n\r\t", True),
        ("\x1f", False),
        ("\x7f", False),
        ("\u2028é😀", True),
        ("\ud800", False),
    ],
)
def test_a_string_is_json_s_without_halves_of_characters(text: str, is_valid: bool) -> None:
    assert admits({"type": "string"}, f'"{text}"') == [is_valid]


@pytest.mark.parametrize(
    ("low", "high"), [(0, 0), (0, 3), (2, 2), (15, 17), (16, 300), (255, 256), (0, None), (40, None)]
)
def test_characters_are_counted(low: int, high: int | None) -> None:
    schema = {"type": "string", "minLength": low} | ({} if high is None else {"maxLength": high})
    reader = reader_of(schema)
    for count in {0, 1, low - 1, low, low + 1, *(() if high is None else (high - 1, high, high + 1))} - {-1}:
        is_valid = low <= count and (high is None or count <= high)
        assert reader.admits(f'"{"é" * count}"') == is_valid
        assert reader.admits('"' + r"\n" * count + '"') == is_valid


def test_a_long_count_costs_little() -> None:
    grammar = json_grammar(json.dumps({"type": "string", "minLength": 30_000, "maxLength": 65_536}))
    assert grammar.count("\n") < 150
    reader = Reader.of(grammar)
    assert reader.readings('"' + "a" * 600) <= 5


@pytest.mark.parametrize(("low", "high"), [(0, 0), (0, 1), (0, 3), (1, 1), (2, 4), (3, None), (0, None), (1, None)])
def test_items_are_counted(low: int, high: int | None) -> None:
    schema = {"type": "array", "items": {"const": 1}, "minItems": low} | ({} if high is None else {"maxItems": high})
    reader = reader_of(schema)
    for count in range(7):
        assert reader.admits(json.dumps([1] * count)) == (low <= count and (high is None or count <= high))


NUMBERS = [
    "-1000",
    "-20.5",
    "-20",
    "-1",
    "-0.5",
    "-0.25",
    "0",
    "0.0",
    "0.25",
    "0.5",
    "0.75",
    "1",
    "1.5",
    "9",
    "10",
    "10.01",
]


@given(
    low=st.none() | st.integers(-30, 30) | st.sampled_from([-20.5, -0.5, -0.25, 0.25, 0.5, 10.01]),
    high=st.none() | st.integers(-30, 30) | st.sampled_from([-20.5, -0.5, -0.25, 0.25, 0.5, 10.01]),
    above=st.booleans(),
    below=st.booleans(),
    whole=st.booleans(),
    others=st.lists(st.decimals(-40, 40, places=3).map(str) | st.integers(-40, 40).map(str)),
)
@settings(deadline=None)
def test_a_number_is_admitted_exactly_where_it_lies_between_its_bounds(
    low: float | None, high: float | None, above: bool, below: bool, whole: bool, others: list[str]
) -> None:
    schema: dict[str, Any] = {"type": "integer" if whole else "number"}
    if low is not None:
        schema["exclusiveMinimum" if above else "minimum"] = low
    if high is not None:
        schema["exclusiveMaximum" if below else "maximum"] = high
    numbers = [each for each in (*NUMBERS, *others) if not (whole and "." in each) and not each.startswith("-0.000")]
    fitting = [each for each in numbers if jsonschema.Draft202012Validator(schema).is_valid(json.loads(each))]
    try:
        reader = reader_of(schema)
    except InvalidRequest:
        assert not fitting
        return
    assert [each for each in numbers if reader.admits(each)] == fitting


def test_bounds_beside_each_other_hold_both() -> None:
    both = {"type": "integer", "minimum": 3, "exclusiveMinimum": 3, "maximum": 9, "exclusiveMaximum": 7}
    assert admits(both, "3", "4", "6", "7", "8") == [False, True, True, False, False]


def test_numbers_without_bounds_have_a_bounded_number_of_digits() -> None:
    number = {"type": "number"}
    assert admits(
        number, "1" * 15, "1" * 16, "-0", "0." + "1" * 15, "0." + "1" * 16, "1e-99", "1E+999", ".5", "1."
    ) == [*(True, False, True, True, False, True, False, False, False)]
    assert admits({"type": "integer"}, "1" * 15, "1" * 16, "1.0", "-7") == [True, False, False, True]


def test_properties_come_in_the_schema_s_order_and_others_do_not() -> None:
    schema = {"type": "object", "properties": {"b": {}, "a": {}, "c": {}}, "required": ["a"]}
    assert admits(schema, '{"a":1}', '{"b":1,"a":1}', '{"b":1,"a":1,"c":1}', '{"a":1,"c":1}') == [True] * 4
    assert admits(schema, "{}", '{"b":1}', '{"a":1,"b":1}', '{"a":1,"d":1}', '{"a":1,"a":1}', '{"a":1,}') == [False] * 6


def test_additional_properties_have_other_names_than_the_properties() -> None:
    schema = {"type": "object", "properties": {"ab": {"const": 1}}, "additionalProperties": {"type": "null"}}
    assert admits(schema, '{"ab":1,"a":null,"abc":null,"":null}', '{"b":null}', "{}") == [True] * 3
    assert admits(schema, '{"ab":null}', '{"ab":1,"ab":null}', r'{"\u0061b":null}', '{"a":1}') == [False] * 4


def test_a_required_property_without_a_schema_is_anything() -> None:
    assert admits({"type": "object", "properties": {}, "required": ["x"]}, '{"x":[1]}', "{}") == [True, False]
    assert "admits no value" in refusal({"type": "object", "required": ["x"], "additionalProperties": False})


def test_a_schema_without_a_type_is_read_as_its_keywords_are() -> None:
    assert admits({"properties": {"a": {"minLength": 1}}}, '{"a":"x"}', '{"a":1}', "1") == [True, False, False]


def test_counted_values_are_those_of_the_type() -> None:
    assert admits({"type": ["string", "integer"], "enum": ["a", 1, 1.5, None, True]}, '"a"', "1", "1.5", "null") == [
        *(True, True, False, False)
    ]
    assert "admits no value" in refusal({"type": "string", "enum": [1]})


def test_all_of_is_the_schemas_together() -> None:
    schema = {
        "allOf": [
            {"type": "object", "properties": {"a": {"type": "integer"}}},
            {"properties": {"b": {"type": "string"}}, "required": ["a"]},
            {"type": ["object", "null"]},
        ]
    }
    assert admits(schema, '{"a":1,"b":"x"}', '{"b":"x"}', "null") == [True, False, False]


def test_what_stands_beside_a_union_holds_for_each_alternative() -> None:
    schema = {
        "type": "object",
        "properties": {"a": {"type": "integer"}, "b": {"type": "integer"}},
        "anyOf": [{"required": ["a"]}, {"required": ["b"]}],
    }
    assert admits(schema, '{"a":1}', '{"b":1}', '{"a":1,"b":1}', "{}") == [True, True, True, False]


def test_a_definition_holds_itself_so_often() -> None:
    schema = {"type": "array", "items": {"$ref": "#"}}
    assert admits(schema, "[" * 17 + "]" * 17, "[" * 18 + "]" * 18) == [True, False]


def test_many_optional_properties_and_alternatives_stay_small() -> None:
    properties = {f"p{index}": {"type": "string"} for index in range(256)}
    grammar = json_grammar(json.dumps({"type": "object", "properties": properties}))
    assert grammar.count("\n") < 1200
    assert Reader.of(grammar).readings('{"p1":"a","p25":"') <= 16
    tagged = [
        {"type": "object", "properties": {"t": {"const": f"t{index}"}, "x": {"$ref": "#"}}, "required": ["t"]}
        for index in range(20)
    ]
    reader = reader_of({"anyOf": tagged})
    assert reader.readings('{"t":"t7","x":{"t":"t9","x":{"t":"t1","x":{"t":"t2"') <= 64


# --- Patterns ------------------------------------------------------------------------------------------------------

ALPHABET = 'ab1_ -\n"\\é/.'
PATTERNS = [
    "^a*$",
    "a",
    "^a|b$",
    "^(ab|a)(b1)?$",
    "^[^a]+$",
    "^\\w{2,3}$",
    "^[\\w-]*$",
    "^\\s?\\S$",
    "^\\D$",
    "^[^\\d\\s]{1,}$",
    "^.$",
    "^a{2}b{0,1}?$",
    "^(?:a|b|1){3}$",
    "^\\u0061\\x62$",
    "^[ab\\]-]+$",
    "^$",
    "",
    "^(a+)+$",
    "a$",
    "^b",
    '["\\\\/]$',
]


@pytest.mark.parametrize("pattern", PATTERNS)
def test_a_pattern_means_what_it_means_to_python(pattern: str) -> None:
    schema = {"type": "string", "pattern": pattern}
    reader = reader_of(schema)
    source = random.Random(1)
    for _ in range(400):
        text = "".join(source.choices(ALPHABET, k=source.randint(0, 4)))
        admitted = reader.admits(json.dumps(text, ensure_ascii=False))
        found = re.search(pattern.replace("$", r"\Z"), text) is not None
        if re.search(r"\\[DWSw]|\[\^\\d|\.", pattern) is None:
            assert admitted == found, text
        else:
            assert found or not admitted, text


@pytest.mark.parametrize(
    "pattern",
    [
        "(",
        ")",
        "a)",
        "(a",
        "[a",
        "[]",
        "[^]",
        "[z-a]",
        "[[a]",
        "a**",
        "*",
        "+a",
        "{2}",
        "a{",
        "a{2",
        "a{2,1}",
        "a{,2}",
        "a{x}",
        "\\",
        "\\b",
        "\\1",
        "\\p{L}",
        "\\k",
        "(?=a)",
        "(?!a)",
        "(?<n>a)",
        "(?P<n>a)",
        "(?i)a",
        "a^b",
        "a$b",
        "(^a)",
        "(a$)",
        "\\u12",
        "\\xg0",
        "\\ud800",
        "[\\d-z]",
        "[^\\D]",
        "[a-",
        "]",
        "}",
        "a{1001}",
        "a{99999999999}",
        "\\c",
    ],
)
def test_an_expression_that_is_not_supported_is_refused(pattern: str) -> None:
    assert "at #/properties/x/pattern" in refusal({"properties": {"x": {"type": "string", "pattern": pattern}}})


FORMAT_TEXTS = {
    "date": (
        ["2024-02-29", "2000-02-29", "1999-12-31"],
        ["2023-02-29", "1900-02-29", "2024-04-31", "2024-13-01", "24-01-01"],
    ),
    "time": (["00:00:00Z", "23:59:59.123+05:30"], ["24:00:00Z", "12:60:00Z", "12:00:00", "12:00Z"]),
    "date-time": (["2024-02-29T00:00:00Z"], ["2024-02-29", "2024-02-29 00:00:00Z"]),
    "duration": (["P1Y2M3D", "PT5M", "P2W", "P1DT12H"], ["P", "PT", "1D", "P1DT"]),
    "uuid": (["123e4567-e89b-12d3-a456-426614174000"], ["123e4567", "g23e4567-e89b-12d3-a456-426614174000"]),
    "ipv4": (["0.0.0.0", "255.249.10.1"], ["256.0.0.1", "1.2.3", "01.2.3.4"]),
    "ipv6": (["0:0:0:0:0:0:0:1", "fe80:0:0:0:1:2:3:ffff"], ["1:2:3", "g:0:0:0:0:0:0:1"]),
    "hostname": (["example.org", "a-b.c1"], ["-a.org", "a..b", "a_b.org"]),
    "email": (["a.b+c@ex-ample.org"], ["a", "@b.org", "a@b", "a..b@c.org"]),
}


def test_formats_are_those_that_are_known() -> None:
    assert FORMAT_TEXTS.keys() == FORMATS.keys()
    for name, (fitting, others) in FORMAT_TEXTS.items():
        texts = [json.dumps(each) for each in (*fitting, *others)]
        assert admits({"type": "string", "format": name}, *texts) == [True] * len(fitting) + [False] * len(others), name
    assert "unknown format, at #/format" in refusal({"type": "string", "format": "uri"})


# --- What is refused -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("schema", "where"),
    [
        ({"type": "object", "minProperties": 1}, "'minProperties' is not supported, at #/minProperties"),
        ({"type": "object", "properties": {"a/b": {"not": {}}}}, "'not' is not supported, at #/properties/a~1b/not"),
        ({"type": "array", "items": {"type": "integer", "multipleOf": 2}}, "at #/items/multipleOf"),
        ({"type": "array", "uniqueItems": True}, "at #/uniqueItems"),
        ({"type": "array", "items": [{}]}, "no schema, at #/items"),
        ({"type": "array", "maxItems": 1025}, "no count, at #/maxItems"),
        ({"type": "array", "minItems": True}, "no count, at #/minItems"),
        ({"type": "string", "maxLength": 65537}, "no count, at #/maxLength"),
        ({"type": "string", "maxLength": -1}, "no count, at #/maxLength"),
        ({"type": "string", "minLength": 4, "maxLength": 3}, "admits no value"),
        ({"type": "string", "minimum": 1}, "'minimum' says nothing of string, at #/minimum"),
        ({"type": "string", "pattern": "a", "format": "date"}, "at #/pattern"),
        ({"type": "string", "pattern": 1}, "no text, at #/pattern"),
        ({"type": "string", "nullable": True}, "'nullable' is not supported, at #/nullable"),
        ({"type": "text"}, "unknown type, at #/type"),
        ({"type": []}, "unknown type, at #/type"),
        ({"type": [["string"]]}, "unknown type, at #/type"),
        ({"enum": []}, "no list of values, at #/enum"),
        ({"enum": list(range(1001))}, "no list of values, at #/enum"),
        ({"enum": ["a"], "const": "a"}, "enum and const, at #/const"),
        ({"enum": ["a"], "minLength": 1}, "'minLength' beside counted values, at #/minLength"),
        ({"properties": []}, "no properties, at #/properties"),
        ({"properties": {f"p{index}": {} for index in range(257)}}, "no properties, at #/properties"),
        ({"properties": {"a": 1}}, "no schema, at #/properties/a"),
        ({"type": "object", "required": "a"}, "no list of names, at #/required"),
        ({"type": "integer", "minimum": "1"}, "no number, at #/minimum"),
        ({"type": "integer", "minimum": True}, "no number, at #/minimum"),
        ({"type": "integer", "minimum": 1.2, "maximum": 1.8}, "at #/minimum"),
        ({"type": "integer", "maximum": 10**15}, "at #/maximum"),
        ({"type": "number", "minimum": 1e300}, "at #/minimum"),
        ({"type": "number", "minimum": 123456789.1234567}, "at #/minimum"),
        ({"anyOf": []}, "no list of schemas, at #/anyOf"),
        ({"anyOf": [{}] * 257}, "no list of schemas, at #/anyOf"),
        ({"allOf": {}}, "no list of schemas, at #/allOf"),
        ({"allOf": [{"minLength": 1}, {"minLength": 2}]}, "'minLength' stands twice for the same value"),
        ({"allOf": [{"properties": {"a": {}}}, {"properties": {"a": True}}]}, "at #/allOf/1/properties/a"),
        ({"allOf": [{"properties": {"a": {}}}, {"additionalProperties": False}]}, "at #/allOf/1/additionalProperties"),
        ({"allOf": [{"prefixItems": [{}]}, {"items": {"type": "null"}}]}, "at #/allOf/1/items"),
        ({"oneOf": [{"type": "integer"}, {"type": "number"}]}, "may both fit a value, at #/oneOf/1"),
        ({"oneOf": [{"const": 1}, {"const": 1.0}]}, "may both fit a value, at #/oneOf/1"),
        ({"oneOf": [{"properties": {"a": {}}}, {"type": "string"}]}, "may both fit a value, at #/oneOf/1"),
        ({"oneOf": [{"type": "object"}, {"type": "object", "required": ["a"]}]}, "at #/oneOf/1"),
        ({"$ref": "#/$defs/none"}, "$ref leads nowhere, at #/$ref"),
        ({"$ref": "http://example.org/schema"}, "$ref, at #/$ref"),
        ({"$ref": 1}, "$ref, at #/$ref"),
        ({"$ref": "#"}, "references lead to references, at #"),
        ({"allOf": [{"$ref": "#"}]}, "a reference leads to itself"),
        ({"anyOf": [{"type": "string"}, {"$ref": "#"}]}, "alternatives lead to themselves"),
        ({"properties": {"a": {"$ref": "#"}}, "required": ["a"]}, "admits no value"),
        ({"$schema": "http://json-schema.org/draft-04/schema#"}, "unknown dialect, at #/$schema"),
        ({"$schema": 1}, "unknown dialect, at #/$schema"),
        ({"$schema": "http://json-schema.org/draft-07/schema#", "prefixItems": [{}]}, "at #/prefixItems"),
        ({"properties": {"a": {"$id": "x"}}}, "'$id' is not supported, at #/properties/a/$id"),
        ({"$defs": 1}, "at #/$defs"),
        (False, "admits no value"),
        (None, "no schema, at #"),
        ("{", "cannot be read"),
        ('{"type":"null","type":"null"}', "a key stands twice"),
        ('{"const":NaN}', "cannot be read"),
        ('{"const":1e999}', "a number that is too large"),
        ('{"const":"\\ud800"}', "half a character"),
        ('"\ud800"', "not Unicode"),
        ('{"a":' * 65 + "1" + "}" * 65, "nested more than 64 deep"),
        (" " * 262_145, "too large"),
    ],
)
def test_what_is_not_supported_is_refused_by_name_and_place(schema: Any, where: str) -> None:
    assert where in refusal(schema)


def _chain(count: int, link: Any) -> Any:
    definitions = {f"d{index}": link(f"#/$defs/d{index + 1}") for index in range(count)}
    return {"$defs": {**definitions, f"d{count}": {"type": "string"}}, "$ref": "#/$defs/d0"}


HAN = "".join(map(chr, range(0x4E00, 0x4E00 + 1200)))


def _words(count: int, step: int) -> list[str]:
    """All with another first character and another rest."""
    return [chr(0x4E00 + step * 1000 + index) + str(index) for index in range(count)]


def _alike(size: int, never: Any) -> Any:
    """Two values that are the same, compared again and again, for a schema that in the end admits nothing."""
    value: list[Any] = [{}] * size
    both = [{"$ref": "#/$defs/a"}, *[{"$ref": "#/$defs/b"}] * 60]
    definitions = {"a": {"const": value}, "b": {"const": list(value)}, "x": {"allOf": both}}
    return {"$defs": definitions, "allOf": [{"$ref": "#/$defs/x"}] * 220, "type": "string"}


def _compared(count: int) -> Any:
    """Many alternatives, each of which has many values, and no value stands twice."""
    each_has = 3500 // count
    alike = [
        {"properties": {"p": {"enum": [[index, each] for each in range(each_has)]}}, "required": ["p"]}
        for index in range(count)
    ]
    return {"type": "object", "oneOf": alike}


_BOTH = {"type": "array", "items": {"anyOf": [{"$ref": "#/$defs/a"}, {"$ref": "#/$defs/b"}]}}


@pytest.mark.parametrize(
    ("schema", "message"),
    [
        (
            _chain(20, lambda ref: {"allOf": [{"$ref": ref}] * 256}),
            "a reference leads to itself, or over too many others",
        ),
        (
            _chain(20, lambda ref: {"anyOf": [{"$ref": ref}] * 16}),
            "alternatives lead to themselves, or to too many others",
        ),
        (_chain(3, lambda ref: {"anyOf": [{"$ref": ref}] * 16}), "too many alternatives"),
        (_chain(300, lambda ref: {"items": {"$ref": ref}}), "references to too many places"),
        (
            {
                "$defs": {
                    f"d{index}": {"properties": {f"p{other}": {"$ref": f"#/$defs/d{other}"} for other in range(40)}}
                    for index in range(40)
                },
                "$ref": "#/$defs/d0",
            },
            "too large a grammar",
        ),
        ({"items": {"anyOf": [{"$ref": "#"}, {"$ref": "#"}]}}, "may come next, at #/items"),
        ({"$defs": {"a": _BOTH, "b": _BOTH}, "$ref": "#/$defs/a"}, "look the same for too long"),
        ({"type": "string", "pattern": "^(a{1000}){1000}$"}, "4096 states, at #/pattern"),
        ({"type": "string", "pattern": "(((((((((){999}){999}){999}){9}){9}){9}){9}){9}){9}"}, "4096 states"),
        ({"type": "string", "pattern": "(a|b)*a(a|b){14}"}, "takes too long"),
        ({"type": "string", "pattern": "a?" * 500 + "a" * 500}, "takes too long"),
        ({"type": "string", "pattern": "(" * 40 + ")" * 40}, "groups are within each other"),
        ({"type": "string", "pattern": "a" * 5000}, "longer than 4096 characters"),
        ({"type": "string", "pattern": "^(ab?c?d?e?f?)*$", "maxLength": 60000}, "too large a grammar"),
        ({"type": "string", "pattern": f"^(?:{'+|'.join(HAN[:40])}+)*$", "maxLength": 470}, "<= 262144 parts"),
        (_alike(10_000, {}), "the schema admits no value"),
        (
            {"type": "array", "items": {"anyOf": [{"enum": _words(1000, each)} for each in range(15)]}},
            "too many characters may come next, at #/items",
        ),
        ({"enum": _words(200, 0)}, "too many characters may come next, at #"),
        ({"type": "string", "pattern": f"^(?:{'|'.join(_words(200, 0))})$"}, "too many characters may come next, at #"),
        ({"anyOf": [{"type": "string", "pattern": f"^{each}"} for each in _words(200, 0)]}, "too many characters may"),
        (
            {"anyOf": [{"properties": {"a": {"enum": _words(9, 0)}, "b": {}}, "required": ["a"]}] * 20},
            "too many characters may come next, at #",
        ),
        ({"type": "object", "properties": {each: {} for each in _words(200, 0)}}, "too many characters may come next"),
        ({"type": "object", "properties": {"k" * 60_000: {}}}, "too long a name"),
        (
            {
                "anyOf": [{"$ref": "#/$defs/a", "required": [f"q{each}"]} for each in range(256)],
                "$defs": {"a": {"properties": {f"p{each}": {} for each in range(256)}}},
            },
            "too large a grammar",
        ),
        ({"enum": [[]] * 1000, "anyOf": [{"anyOf": [{}] * 16}] * 16}, "takes too long"),
        (_compared(128), "takes too long"),
    ],
)
def test_a_hostile_schema_is_refused_and_soon(schema: Any, message: str) -> None:
    begin = time.process_time()
    try:
        said = refusal(schema)
        assert message in said or said.endswith("expected <= 1 s")  # on a slow machine
    finally:
        assert time.process_time() - begin < 2


def test_what_is_said_often_is_read_once() -> None:
    assert admits(_chain(7, lambda ref: {"allOf": [{"$ref": ref}] * 256}), '"a"', "1") == [True, False]


def test_however_few_its_steps_are_a_schema_has_an_end_by_the_clock() -> None:
    """Each look at the clock finds a second gone."""
    seconds = itertools.count(0.0, 0.9)
    grammar = gbnf.Grammar(lambda: next(seconds))
    with pytest.raises(InvalidRequest, match="takes too long to read") as caught:
        for _ in range(1000):
            grammar.spend(1)
    assert caught.value.expected == "<= 1 s"
    seconds = itertools.count(0.0, 0.9)
    grammar = gbnf.Grammar(lambda: next(seconds))
    with pytest.raises(InvalidRequest, match="takes too long to read"):
        for _ in range(1000):
            grammar.rule((gbnf.Literal("a"),))


def test_characters_that_the_same_follows_are_one_way_to_go_on() -> None:
    reader = reader_of({"type": "array", "items": {"enum": [*HAN[:1000]]}})
    assert reader.readings('["' + HAN[3] + '","' + HAN[999]) <= 16
    assert reader.admits(json.dumps([HAN[0], HAN[999]], ensure_ascii=False))
    assert not reader.admits(json.dumps([HAN[1000]], ensure_ascii=False))
    words = [each + "国" for each in HAN[:300]]
    for schema in ({"enum": words}, {"type": "string", "pattern": f"^(?:{'|'.join(words)})$"}):
        reader = reader_of(schema)
        assert [reader.admits(f'"{each}"') for each in (HAN[7] + "国", HAN[7], HAN[300] + "国")] == [True, False, False]


def test_large_enumerations_and_unions_are_accepted() -> None:
    source = random.Random(3)
    names = sorted({"".join(source.choices("abcdefghijklmnopqrstuvwxyzéß' -", k=9)).title() for _ in range(1000)})
    reader = reader_of({"type": "object", "properties": {"c": {"enum": names}}, "required": ["c"]})
    for name in names[::50]:
        text = json.dumps({"c": name}, ensure_ascii=False)
        assert reader.admits(text)
        assert reader.readings(text) <= 64
    tagged = [
        {"type": "object", "properties": {"t": {"const": f"t{index}"}, "x": {"type": "number"}}, "required": ["t"]}
        for index in range(64)
    ]
    assert reader_of({"anyOf": tagged}).readings('{"t": "t63", "x": 1') <= 128


@given(schema=schemas(), seed=st.integers(0, 2**32 - 1))
@settings(max_examples=100, deadline=None)
def test_never_are_more_ways_open_than_is_said(schema: Any, seed: int) -> None:
    try:
        grammar = json_grammar(json.dumps(schema))
    except InvalidRequest:
        return
    reader, source = Reader.of(grammar), random.Random(seed)
    for _ in range(3):
        assert reader.readings(reader.derived(source, length=100)) <= MAX_OPEN


def test_names_that_begin_alike_and_have_escapes_are_told_apart() -> None:
    properties = {"a": 1, 'a"': 2, "a\n": 3, "a\t": 4, "ab": 5, "": 6, "é": 7}
    schema: dict[str, Any] = {"type": "object", "properties": {name: {"const": n} for name, n in properties.items()}}
    for others in ({}, {"additionalProperties": {"type": "null"}}):
        reader = reader_of(schema | others)
        assert reader.admits(json.dumps(properties, ensure_ascii=False))
        for name, value in properties.items():
            assert reader.admits(json.dumps({name: value}, ensure_ascii=False))
            assert not reader.admits(json.dumps({name: 8}, ensure_ascii=False))
            assert not reader.admits(json.dumps({name: None}, ensure_ascii=False))
        assert not reader.admits('{"ab":5,"a":1}')
        for name in ("abc", "b", "éa"):
            assert reader.admits(json.dumps({"ab": 5, name: None}, ensure_ascii=False)) == bool(others)
        assert not reader.admits(r'{"a\x":null}')


@given(
    text=st.text() | st.text(alphabet='{}[]",:0123456789.eE-\\ "$ref#/itemsanyOftypenull').map(lambda text: "{" + text)
)
@settings(deadline=None)
def test_any_text_gives_a_grammar_or_its_refusal(text: str) -> None:
    try:
        Reader.of(json_grammar(text))
    except InvalidRequest:
        return


# --- Calls of tools ------------------------------------------------------------------------------------------------

WEATHER = Tool(
    "get_weather",
    "",
    '{"type":"object","properties":{"city":{"type":"string"},"days":{"type":"integer","minimum":1}},"required":["city"]}',
)
CLOCK = Tool("clock")


def test_a_call_has_the_family_s_style_and_arguments_that_fit_the_tool() -> None:
    reader = Reader.of(tool_call_grammar((WEATHER, CLOCK), None, HERMES, parallel=False))
    call = '<tool_call>\n{"name": "get_weather", "arguments": {"city": "Oslo", "days": 2}}\n</tool_call>'
    assert reader.admits(call)
    assert reader.admits('<tool_call>\n{"name": "clock", "arguments": {}}\n</tool_call>')
    assert not reader.admits(call.replace("days", "nights"))
    assert not reader.admits(call.replace("get_weather", "clock"))
    assert not reader.admits(call + "\n" + call)
    assert not reader.admits("")
    reader = Reader.of(tool_call_grammar((WEATHER, CLOCK), None, LLAMA, parallel=False))
    assert reader.admits('{"name": "get_weather", "parameters": {"city": ""}}')


def test_calls_beside_each_other_have_an_end() -> None:
    reader = Reader.of(tool_call_grammar((WEATHER, CLOCK), None, BARE, parallel=True))
    call = '{"name": "clock", "arguments": {}}'
    assert [reader.admits("\n".join([call] * count)) for count in (1, 2, 16, 17)] == [True, True, True, False]


def test_a_named_tool_is_the_only_one() -> None:
    reader = Reader.of(tool_call_grammar((WEATHER, CLOCK), NamedTool("clock"), BARE, parallel=False))
    assert reader.admits('{"name": "clock", "arguments": {}}')
    assert not reader.admits('{"name": "get_weather", "arguments": {"city": "Oslo"}}')


def test_a_style_s_texts_are_taken_as_they_are() -> None:
    style = CallStyle(
        before="<｜call｜>", between='\n```json\n"[x]" | y\n', after="```", opening="A", separator=" ", closing="Z\\"
    )
    reader = Reader.of(tool_call_grammar((CLOCK,), None, style, parallel=True))
    call = '<｜call｜>clock\n```json\n"[x]" | y\n{}```'
    assert reader.admits(f"A{call}Z\\")
    assert reader.admits(f"A{call} {call}Z\\")
    assert not reader.admits(f"A{call}{call}Z\\")


def test_arguments_are_an_object_by_a_schema_that_is_supported() -> None:
    for schema, message in (
        ('{"type":"array"}', "the tool 'f': the JSON schema: arguments are an object, at #"),
        ("{}", "arguments are an object, at #"),
        (
            '{"type":"object","properties":{"a":{"not":{}}}}',
            "the tool 'f': the JSON schema: 'not' is not supported, at #/prop",
        ),
    ):
        with pytest.raises(InvalidRequest, match=re.escape(message)):
            tool_call_grammar((Tool("f", "", schema),), None, BARE, parallel=True)
    with pytest.raises(InvalidRequest, match="no tool to call"):
        tool_call_grammar((CLOCK,), NamedTool("f"), BARE, parallel=True)


# --- The grammar itself --------------------------------------------------------------------------------------------


def test_a_grammar_that_begins_with_itself_is_refused() -> None:
    grammar = gbnf.Grammar()
    name, empty = grammar.name(), grammar.rule((), (gbnf.Literal("x"),))
    grammar.define(name, ((empty, name, gbnf.Literal("a")), (gbnf.Literal("b"),)))
    with pytest.raises(InvalidRequest, match="begins with itself"):
        grammar.text(name)


def test_beginnings_that_llama_cpp_would_walk_for_too_long_are_refused() -> None:
    grammar = gbnf.Grammar()
    ref = grammar.rule((gbnf.Literal("x"),))
    for _ in range(40):
        ref = grammar.rule((ref, gbnf.Literal("a")), (ref, gbnf.Literal("b")))
    with pytest.raises(InvalidRequest, match="nested too much"):
        grammar.text(ref)
    ref = grammar.rule((gbnf.Literal("x"),))
    for _ in range(1100):
        ref = grammar.rule((ref, gbnf.Literal("a")))
    with pytest.raises(InvalidRequest, match="nested too much"):
        grammar.text(ref)


def test_a_grammar_s_text_is_bounded() -> None:
    grammar = gbnf.Grammar()
    with pytest.raises(InvalidRequest, match="too large a grammar"):
        grammar.text(grammar.rule((gbnf.Literal("é" * 300_000),)))
