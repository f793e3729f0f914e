"""Strict reading of CBOR maps and lists that come from the other side: unknown, missing and ill-typed fields are
refused, every number and length is bounded.
"""

from __future__ import annotations

from typing import cast

from attestation.errors import StrongroomError


class MessageError(StrongroomError):
    """A message that is not one of those in PROTOCOL.md section 7. ``param`` names the field."""

    exit_code = 2

    def __init__(self, message: str, *, param: str, expected: object | None = None, got: object | None = None) -> None:
        super().__init__("invalid_request", message, expected=expected, got=got)
        self.param = param


def shown(value: object) -> str:
    """What an error says of a value that should have been a text. A whole structure as text costs as much as it is
    large."""
    return value[:64] if isinstance(value, str) else type(value).__name__


def fields_of(
    value: object, *, param: str, required: set[str], optional: frozenset[str] = frozenset()
) -> dict[str, object]:
    """A map with all of ``required`` and nothing but these and ``optional``. Raises MessageError, as all here do."""
    if not isinstance(value, dict):
        raise MessageError(f"{param} is not a map", param=param, expected="map", got=type(value).__name__)
    for key in value:
        if key not in required and key not in optional:
            name = shown(key)
            raise MessageError(f"unknown field {name!r}", param=name, expected=", ".join(sorted(required | optional)))
    for key in sorted(required):
        if key not in value:
            raise MessageError(f"missing field {key!r}", param=key, expected="present", got="absent")
    return cast(dict[str, object], value)


def text_of(value: object, param: str, limit: int) -> str:
    if not isinstance(value, str):
        raise MessageError(f"{param} is not text", param=param, expected="text", got=type(value).__name__)
    if len(value) > limit:
        raise MessageError(f"{param} is too long", param=param, expected=f"<= {limit} characters", got=len(value))
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise MessageError(f"{param} holds a lone surrogate", param=param, expected="Unicode scalar values") from error
    return value


def integer_of(value: object, param: str, low: int, high: int) -> int:
    if not isinstance(value, int) or isinstance(value, bool):
        raise MessageError(f"{param} is not an integer", param=param, expected="integer", got=type(value).__name__)
    if not low <= value <= high:
        raise MessageError(f"{param} is out of range", param=param, expected=f"{low}..{high}", got=value)
    return value


def number_of(value: object, param: str, low: float, high: float) -> float:
    if not isinstance(value, int | float) or isinstance(value, bool):
        raise MessageError(f"{param} is not a number", param=param, expected="number", got=type(value).__name__)
    if not low <= value <= high:  # also refuses NaN
        raise MessageError(f"{param} is out of range", param=param, expected=f"{low}..{high}", got=value)
    return float(value)


def list_of(value: object, param: str, limit: int) -> list[object]:
    if not isinstance(value, list | tuple):
        raise MessageError(f"{param} is not a list", param=param, expected="list", got=type(value).__name__)
    if len(value) > limit:
        raise MessageError(f"{param} has too many entries", param=param, expected=f"<= {limit}", got=len(value))
    return list(value)


def flag_of(value: object, param: str) -> bool:
    if not isinstance(value, bool):
        raise MessageError(f"{param} is not a boolean", param=param, expected="boolean", got=type(value).__name__)
    return value


def choice_of(value: object, param: str, choices: tuple[str, ...]) -> str:
    if not isinstance(value, str) or value not in choices:
        raise MessageError(f"unknown {param}", param=param, expected=" | ".join(choices), got=shown(value))
    return value


def bytes_of(value: object, param: str, size: int) -> bytes:
    if not isinstance(value, bytes) or len(value) != size:
        raise MessageError(f"{param} is not a byte string of its size", param=param, expected=f"{size} bytes")
    return value
