"""JSON (RFC 8259) read strictly, for what signatures are over and for what is kept between two runs.

General-purpose readers take the last of two equal keys, floats, NaN and any nesting; each of those lets two readers of
the same bytes see two different documents, or one of them fall over. What ``decode`` leaves is what
:mod:`attestation.cbor` knows too, without byte strings: integers, texts, arrays, maps with text keys, and null. Its
``Record`` reads the fields. ``decode_foreign`` is for what others define: it takes booleans and finite floats as well.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable
from typing import Any, NoReturn, TypeAlias

from attestation.cbor import MAX_DEPTH, Value
from attestation.errors import EvidenceError

MAX_DIGITS = 18
"""Of an integer: what 64 bits hold with either sign."""

Json: TypeAlias = "str | int | float | bool | list[Json] | dict[str, Json] | None"
"""What JSON can say."""

_STRING = re.compile(rb'"(?:[^"\\]++|\\.?)*+"?', re.DOTALL)
_BRACKET = re.compile(rb"[\[\]{}]")


def decode(data: bytes, *, code: str) -> Value:
    """The one value that ``data`` (UTF-8, without a byte order mark) encodes. Raises EvidenceError with ``code``, never
    anything else. The caller bounds the size of ``data``.
    """
    value: Value = _parse(data, code, MAX_DEPTH, _integer, _refuse, _require_whole)
    return value


def decode_foreign(data: bytes, *, code: str, max_depth: int) -> Json:
    """As ``decode``, for a format of somebody else's: nested at most ``max_depth`` deep, with booleans and finite
    floats, and integers of as many digits as Python reads. Raises EvidenceError with ``code``.
    """
    value: Json = _parse(data, code, max_depth, int, float, _require_finite)
    return value


def _parse(
    data: bytes,
    code: str,
    max_depth: int,
    integer: Callable[[str], int],
    real: Callable[[str], float],
    require: Callable[[object], None],
) -> Any:
    try:
        if _depth(data) > max_depth:
            raise ValueError(f"nested more than {max_depth} deep")
        value = json.loads(
            data.decode("utf-8"),
            object_pairs_hook=_map,
            parse_int=integer,
            parse_float=real,
            parse_constant=_refuse,
        )
        _require_each(value, require)
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


def _require_each(value: object, require: Callable[[object], None]) -> None:
    """Every value, and every key, holds to ``require``; a text can be written again."""
    match value:
        case str():
            _require_whole_characters(value)
        case list():
            for each in value:
                _require_each(each, require)
        case dict():
            for name, each in value.items():
                _require_each(name, require)
                _require_each(each, require)
        case _:
            require(value)


def _require_whole_characters(text: str) -> None:
    if not text.isascii() and any("\ud800" <= each <= "\udfff" for each in text):
        raise ValueError("a text with half a character")


def _require_whole(value: object) -> None:
    # True == 1 in Python, so that a boolean would pass for an integer.
    if isinstance(value, bool):
        raise ValueError("a boolean, which has no place here")


def _require_finite(value: object) -> None:
    if isinstance(value, float) and not math.isfinite(value):
        raise ValueError("a number that is too large")
