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


def test_brackets_within_texts_do_not_nest() -> None:
    text = "[" * 50 + '\\"{' * 50
    assert strict_json.decode(json.dumps([text, text]).encode(), code="c") == [text, text]
    assert strict_json.decode(b"[" * 8 + b"]" * 8, code="c") == [[[[[[[[]]]]]]]]


@given(st.binary(max_size=200) | st.text(alphabet='[]{}",:\\ 01tn', max_size=60).map(str.encode))
def test_any_bytes_are_a_value_or_a_typed_error(data: bytes) -> None:
    with contextlib.suppress(EvidenceError):
        assert strict_json.decode(data, code="c") == json.loads(data)
