"""JSON that two readers cannot read differently."""

from __future__ import annotations

import contextlib
import json
from typing import TypeAlias

import pytest
from hypothesis import given
from hypothesis import strategies as st

from attestation import strict_json
from attestation.errors import EvidenceError

Plain: TypeAlias = "int | str | list[Plain] | dict[str, Plain] | None"
LEAF = st.none() | st.integers(-(10**16), 10**16) | st.text(max_size=20)
VALUE = LEAF | st.lists(LEAF | st.dictionaries(st.text(max_size=5), LEAF, max_size=4), max_size=4)


@given(VALUE, st.booleans())
def test_what_is_plain_is_read_as_any_reader_does(value: Plain, escaped: bool) -> None:
    encoded = json.dumps(value, ensure_ascii=escaped).encode("utf-8", "surrogatepass")
    assert strict_json.decode(encoded, code="c") == json.loads(json.dumps(value))


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"{",
        b"{}}",
        b"{} {}",
        b"'a'",
        b'"\n"',
        b"[1,]",
        b"// comment\n1",
        b'{"a":1,"a":1}',
        b'[{"b":{"a":1,"\\u0061":2}}]',
        b"1.0",
        b"1e3",
        b"-0.0",
        b"NaN",
        b"Infinity",
        b"-Infinity",
        b"true",
        b'[{"a":false}]',
        b"1" * 19,
        b"9" * 5000,
        b"\xef\xbb\xbf1",
        b"\xff",
        b'"\xc0\x80"',
        '"x"'.encode("utf-16"),
        b"[" * 9 + b"]" * 9,
        b'{"a":' * 9 + b"1" + b"}" * 9,
        b"[" * 1_000_000,
        b'{"a":' * 1_000_000,
        b'"\\',
        b'"\\"',
    ],
)
def test_what_is_not_strict_is_refused(data: bytes) -> None:
    with pytest.raises(EvidenceError) as caught:
        strict_json.decode(data, code="malformed_thing")
    assert caught.value.code == "malformed_thing"
    assert caught.value.message.startswith("JSON: ")
    assert caught.value.message.isprintable()


@pytest.mark.parametrize("data", [b'"\\ud800"', b'{"\\udfff":1}', b'["a\\udc00"]', b'"\xed\xa0\x80"'])
@pytest.mark.parametrize("is_foreign", [False, True])
def test_a_text_can_be_written_again(data: bytes, is_foreign: bool) -> None:
    with pytest.raises(EvidenceError, match=r"half a character|not UTF-8"):
        strict_json.decode_foreign(data, code="c", max_depth=8) if is_foreign else strict_json.decode(data, code="c")


def test_a_foreign_format_has_booleans_and_floats() -> None:
    said = {"a": [1, 1.5, True, None, "ä", -(10**30)], "𝄞": {}}
    assert strict_json.decode_foreign(json.dumps(said).encode(), code="c", max_depth=2) == said
    for data, what in (
        (b"[[1]]", "nested more than 1 deep"),
        (b"1e999", "too large"),
        (b"[-1e999]", "too large"),
        (b"NaN", "no integer"),
        (b'{"a":1,"a":1}', "twice"),
        (b"9" * 5000, "integer string conversion"),
    ):
        with pytest.raises(EvidenceError, match=what):
            strict_json.decode_foreign(data, code="c", max_depth=1)


def test_brackets_within_texts_do_not_nest() -> None:
    text = "[" * 50 + '\\"{' * 50
    assert strict_json.decode(json.dumps([text, text]).encode(), code="c") == [text, text]
    assert strict_json.decode(b"[" * 8 + b"]" * 8, code="c") == [[[[[[[[]]]]]]]]


@given(st.binary(max_size=200) | st.text(alphabet='[]{}",:\\ 01tn', max_size=60).map(str.encode))
def test_any_bytes_are_a_value_or_a_typed_error(data: bytes) -> None:
    with contextlib.suppress(EvidenceError):
        assert strict_json.decode(data, code="c") == json.loads(data)
