"""A strict, bounded CBOR decoder (RFC 8949) for what digests and signatures are over: Evidence and the model manifest,
and nothing else.

It knows what they consist of: integers, byte and text strings, arrays, maps with integer or text keys, and null.
Floats, booleans and further simple values have no place there and are refused, which also spares a reader Python's
``True == 1``. General-purpose decoders accept duplicate keys, indefinite lengths or trailing bytes; every one of those
lets two readers of the same signed bytes see two different documents.
"""

from __future__ import annotations

from collections.abc import Iterable, Set
from functools import partial
from typing import TypeAlias

from attestation.errors import EvidenceError

Value: TypeAlias = "int | bytes | str | list[Value] | dict[int | str, Value] | None"

MAX_DEPTH = 8
"""Arrays and maps inside one another. Real documents have two."""

_UNSIGNED, _NEGATIVE, _BYTES, _TEXT, _ARRAY, _MAP, _TAG, _SIMPLE = range(8)
_SMALL = 24
"""Below it, an initial byte is the integer that it stands for."""
_NULL = 22
_INDEFINITE = 31
_INDEFINITE_MAP = b"\xbf"
_BREAK = b"\xff"


def decode(
    data: bytes,
    *,
    deterministic: bool = False,
    indefinite_top_map: bool = False,
    optional_tag: int | None = None,
    code: str = "malformed_cbor",
) -> Value:
    """The one value that ``data`` encodes, from its first byte to its last.

    ``deterministic`` holds the encoding to RFC 8949 section 4.2.1: shortest heads, keys in bytewise order.
    ``indefinite_top_map`` allows, not requires, an indefinite length on the outermost map alone: so AWS writes its
    payloads since 2025-08. ``optional_tag`` may stand once, outermost, and is dropped.

    Raises EvidenceError with ``code``, never anything else. The caller bounds the size of ``data``; no length in it is
    believed before that many bytes are seen to be there.
    """
    reader = _Reader(data, deterministic, code)
    if optional_tag is not None:
        reader.skip_tag(optional_tag)
    value = reader.indefinite_map() if indefinite_top_map and reader.skip(_INDEFINITE_MAP) else reader.value(0)
    if reader.position != len(data):
        raise reader.error("bytes follow the value", expected="nothing", got=f"{len(data) - reader.position} bytes")
    return value


def shown(value: Value) -> str:
    """A short text for an error message; nothing in it can move a terminal's cursor."""
    match value:
        case None:
            return "null"
        case int():
            return str(value)
        case str():
            return ascii(value) if len(value) <= 64 else f"text of {len(value)} characters"
        case bytes():
            return f"h'{value.hex()}'" if len(value) <= 64 else f"{len(value)} bytes"
        case list():
            return f"array of {len(value)}"
        case _:
            return f"map of {len(value)}"


class _Reader:
    """One pass over ``data``. Every method begins at ``position`` and leaves it behind what it has read.

    Evidence of the usual size holds about a hundred values, and beside one signature to verify that is felt: hence
    slots, no calls within ``value`` for what most values are, and the order in which it asks.
    """

    __slots__ = ("_code", "_data", "_deterministic", "_size", "position")

    def __init__(self, data: bytes, deterministic: bool, code: str) -> None:
        self.position = 0
        self._data = data
        self._size = len(data)
        self._deterministic = deterministic
        self._code = code

    def error(self, message: str, *, expected: object | None = None, got: object | None = None) -> EvidenceError:
        return EvidenceError(self._code, f"CBOR: {message}, at byte {self.position}", expected=expected, got=got)

    def skip_tag(self, tag: int) -> None:
        initial = self._data[self.position] if self.position < self._size else 0
        if initial >> 5 == _TAG:
            self.position += 1
            short = initial & 0x1F
            argument = short if short < 24 else self._argument(_TAG, short)
            if argument != tag:
                raise self.error("a tag that has no place here", expected=tag, got=argument)

    def skip(self, initial: bytes) -> bool:
        """Whether that byte was next, and is now behind us."""
        if self._data[self.position : self.position + 1] != initial:
            return False
        self.position += 1
        return True

    def indefinite_map(self) -> Value:
        """Behind its first byte."""
        return self._map(iter(partial(self.skip, _BREAK), True), depth=0)

    def value(self, depth: int) -> Value:
        position = self.position
        if position >= self._size:
            raise self.error("the input ends too early", expected="another value", got="the end")
        major, argument = self._data[position] >> 5, self._data[position] & 0x1F
        self.position = position + 1
        if argument > 23:
            argument = self._argument(major, argument)
        if _BYTES <= major <= _TEXT:
            start, end = self.position, self.position + argument
            if end > self._size:
                raise self._cut_short(argument)
            self.position = end
            taken = self._data[start:end]
            return taken if major == _BYTES else self._text(taken)
        if major == _UNSIGNED:
            return argument
        if major == _MAP:
            return self._map(range(argument), depth)
        if major == _ARRAY:
            return self._array(argument, depth)
        if major == _NEGATIVE:
            return -1 - argument
        if major == _SIMPLE and argument == _NULL:
            return None
        raise self.error("a tag, float or simple value that has no place here", got=f"major type {major}, {argument}")

    def _argument(self, major: int, short: int) -> int:
        """What stands behind an initial byte that does not say it itself (RFC 8949 section 3)."""
        if short > 27:
            what = "an indefinite length" if short == _INDEFINITE else f"reserved additional information {short}"
            raise self.error("a length that is not definite", expected="a definite length", got=what)
        start, end = self.position, self.position + (1 << (short - 24))
        if end > self._size:
            raise self._cut_short(end - start)
        self.position = end
        argument = self._data[start] if short == 24 else int.from_bytes(self._data[start:end], "big")
        if major == _SIMPLE:
            raise self.error("a float or simple value that has no place here", got=f"major type {major}")
        if self._deterministic and argument < (24, 0x100, 0x1_0000, 0x1_0000_0000)[short - 24]:
            raise self.error("an integer or length that is not in its shortest form", got=argument)
        return argument

    def _cut_short(self, size: int) -> EvidenceError:
        left = self._size - self.position
        return self.error("the input ends too early", expected=f"{size} bytes", got=f"{left} bytes")

    def _text(self, encoded: bytes) -> str:
        try:
            return encoded.decode("utf-8")
        except UnicodeDecodeError:
            raise self.error("a text that is not UTF-8", got=shown(encoded)) from None

    def _descend(self, depth: int) -> int:
        if depth == MAX_DEPTH:
            raise self.error("nested too deeply", expected=f"at most {MAX_DEPTH} levels", got="more")
        return depth + 1

    def _array(self, count: int, depth: int) -> list[Value]:
        inner = self._descend(depth)
        # Grows by what is there, not by what the head claims.
        return [self.value(inner) for _ in range(count)]

    def _map(self, turns: Iterable[object], depth: int) -> dict[int | str, Value]:
        """One entry for each of ``turns``."""
        inner = self._descend(depth)
        entries: dict[int | str, Value] = {}
        previous = b""
        data, size = self._data, self._size
        for _ in turns:
            start = self.position
            if start < size and data[start] < _SMALL:  # most keys; a call for each would be a tenth of the whole
                key: Value = data[start]
                self.position = start + 1
            else:
                key = self.value(inner)
            if not (isinstance(key, str) or isinstance(key, int)):  # noqa: SIM101 - a union or tuple takes thrice as long
                raise self.error("a map key that is neither an integer nor a text", got=shown(key))
            if key in entries:
                raise self.error("a duplicate key", expected="each key once", got=shown(key))
            if self._deterministic:
                encoded = self._data[start : self.position]
                if encoded <= previous:
                    raise self.error("map keys that are out of order", expected="bytewise order", got=shown(key))
                previous = encoded
            entries[key] = self.value(inner)
        return entries


class Record:
    """A map read as a record: exactly the fields named, each taken with its type and its bounds.

    Every method raises EvidenceError with the record's ``code``; ``refusal`` makes one for a caller's own rules.
    """

    def __init__(self, value: Value, name: str, *, required: Set[str], optional: Set[str] = frozenset(), code: str):
        self._name = name
        self._code = code
        if not isinstance(value, dict):
            raise self.refusal("", "a map", shown(value))
        known = required | optional
        if not value.keys() <= known:
            unknown = next(key for key in value if key not in known)
            raise self.refusal("", "known fields only", f"unknown field {shown(unknown)}")
        if not required <= value.keys():
            raise self.refusal("", f"field {min(required - value.keys())}", "none")
        self._fields = value

    def refusal(self, field: str, expected: object, got: object) -> EvidenceError:
        where = f"{self._name}, {field}" if field else self._name
        return EvidenceError(self._code, f"{where}: not as specified", expected=expected, got=got)

    def literal(self, field: str, expected: int | str) -> None:
        if self._fields[field] != expected:
            raise self.refusal(field, shown(expected), shown(self._fields[field]))

    def integer(self, field: str, low: int, high: int) -> int:
        value = self._fields[field]
        if not isinstance(value, int):
            raise self.refusal(field, "an integer", shown(value))
        if not low <= value <= high:
            raise self.refusal(field, f"{low} to {high}", value)
        return value

    def text(self, field: str, longest: int) -> str:
        """A text that is safe to print: not empty, on one line, without control characters."""
        value = self._fields[field]
        if not isinstance(value, str) or not 0 < len(value) <= longest or not value.isprintable():
            raise self.refusal(field, f"a printable text of 1 to {longest} characters", shown(value))
        return value

    def optional_text(self, field: str, longest: int) -> str | None:
        """None for a field that is absent or null."""
        return None if self._fields.get(field) is None else self.text(field, longest)

    def octets(self, field: str, low: int, high: int) -> bytes:
        value = self._fields[field]
        if isinstance(value, bytes) and low <= len(value) <= high:
            return value
        raise self.wrong_octets(value, field, low, high)

    def optional_octets(self, field: str, high: int) -> bytes | None:
        """None for a field that is absent or null; an empty byte string is there, and is not None."""
        value = self._fields.get(field)
        return None if value is None else self.octets(field, 0, high)

    def wrong_octets(self, value: Value, field: str, low: int, high: int) -> EvidenceError:
        """For a ``value`` that is not a byte string of ``low`` to ``high`` bytes."""
        size = f"{low} bytes" if low == high else f"{low} to {high} bytes"
        return self.refusal(field, size, f"{len(value)} bytes" if isinstance(value, bytes) else shown(value))

    def array(self, field: str) -> list[Value]:
        value = self._fields[field]
        if not isinstance(value, list):
            raise self.refusal(field, "an array", shown(value))
        return value

    def map(self, field: str) -> dict[int | str, Value]:
        value = self._fields[field]
        if not isinstance(value, dict):
            raise self.refusal(field, "a map", shown(value))
        return value
