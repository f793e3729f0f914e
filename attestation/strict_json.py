"""JSON (RFC 8259) read strictly, for what signatures are over and for what is kept between two runs.

General-purpose readers take the last of two equal keys, floats, NaN and any nesting; each of those lets two readers of
the same bytes see two different documents, or one of them fall over. What is left is what :mod:`attestation.cbor` knows
too, without byte strings: integers, texts, arrays, maps with text keys, and null. Its ``Record`` reads the fields.
"""

from __future__ import annotations

import json
import re
from typing import NoReturn

from attestation.cbor import MAX_DEPTH, Value
from attestation.errors import EvidenceError

MAX_DIGITS = 18
"""Of an integer: what 64 bits hold with either sign."""

_STRING = re.compile(rb'"(?:[^"\\]++|\\.?)*+"?', re.DOTALL)
_BRACKET = re.compile(rb"[\[\]{}]")


def decode(data: bytes, *, code: str) -> Value:
    """The one value that ``data`` (UTF-8, without a byte order mark) encodes. Raises EvidenceError with ``code``, never
    anything else. The caller bounds the size of ``data``.
    """
    try:
        if _depth(data) > MAX_DEPTH:
            raise ValueError(f"nested more than {MAX_DEPTH} deep")
        value: Value = json.loads(
            data.decode("utf-8"),
            object_pairs_hook=_map,
            parse_int=_integer,
            parse_float=_refuse,
            parse_constant=_refuse,
        )
        _require_no_boolean(value)
    except UnicodeDecodeError:
        raise EvidenceError(code, "JSON: not UTF-8") from None
    except ValueError as error:
        raise EvidenceError(code, f"JSON: {error}") from error
    return value


def _depth(data: bytes) -> int:
    """Of the brackets outside of strings: counted before the parser, which recurses, sees them."""
    deepest = depth = 0
    for bracket in _BRACKET.findall(_STRING.sub(b"", data)):
        depth += 1 if bracket in b"[{" else -1
        deepest = max(deepest, depth)
    return deepest


def _map(pairs: list[tuple[str, Value]]) -> dict[str, Value]:
    entries = dict(pairs)
    if len(entries) != len(pairs):
        raise ValueError("a key stands twice")
    return entries


def _integer(digits: str) -> int:
    if len(digits) > MAX_DIGITS:
        raise ValueError(f"an integer of more than {MAX_DIGITS} digits")
    return int(digits)


def _refuse(text: str) -> NoReturn:
    raise ValueError("a number that is no integer")


def _require_no_boolean(value: Value) -> None:
    # True == 1 in Python, so that a boolean would pass for an integer.
    match value:
        case bool():
            raise ValueError("a boolean, which has no place here")
        case list():
            for each in value:
                _require_no_boolean(each)
        case dict():
            for each in value.values():
                _require_no_boolean(each)
