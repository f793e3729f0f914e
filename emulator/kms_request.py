"""Requests to KMS, read by AWS's own description of them, and the refusals that answer them.

The description is the service model that botocore ships: types, bounds, enumerations, patterns and required members of
every operation. What it does not know is refused, where AWS ignores it: a misspelt member would otherwise change what a
request asks for without a word.
"""

from __future__ import annotations

import base64
import re
from collections.abc import Mapping
from functools import cache
from typing import Any

from botocore.loaders import Loader
from botocore.model import ServiceModel

from attestation.errors import StrongroomError


class KmsFault(StrongroomError):
    """A refusal as KMS words it: ``code`` is its ``__type``, ``status`` the HTTP status."""

    def __init__(self, code: str, message: str, *, status: int = 400) -> None:
        super().__init__(code, message)
        self.status = status


@cache
def service_model() -> Any:
    """KMS as botocore describes it."""
    return ServiceModel(Loader().load_service_model("kms", "service-2"), "kms")


def read_request(operation: str, body: object) -> dict[str, Any]:
    """The members of a request in Python's types: blobs as bytes. ``body`` is decoded JSON.

    Raises KmsFault ``SerializationException`` for members of a wrong type, ``ValidationException`` for values out of
    their bounds, ``UnknownOperationException`` for an operation that KMS does not have.
    """
    model = service_model()
    if operation not in model.operation_names:
        raise KmsFault("UnknownOperationException", f"no operation {operation}")
    request: dict[str, Any] = _read(model.operation_model(operation).input_shape, body, "")
    return request


def _read(shape: Any, value: object, path: str) -> Any:
    match shape.type_name:
        case "structure":
            return _read_structure(shape, _require(dict, value, path), path)
        case "map":
            members = _require(dict, value, path).items()
            return {
                _read(shape.key, key, f"{path}.key"): _read(shape.value, member, f"{path}.{key}")
                for key, member in members
            }
        case "list":
            items = _require(list, value, path)
            _require_bounds(shape, len(items), path, "length")
            return [_read(shape.member, item, f"{path}.{index + 1}.member") for index, item in enumerate(items)]
        case "blob":
            octets = _octets(_require(str, value, path), path)
            _require_bounds(shape, len(octets), path, "length")
            return octets
        case "boolean":
            return _require(bool, value, path)
        case "integer" | "long":
            number = _require(int, value, path)
            _require_bounds(shape, number, path, "value")
            return number
    text = _require(str, value, path)
    _require_text(shape, text, path)
    return text


def _read_structure(shape: Any, value: Mapping[str, object], path: str) -> dict[str, Any]:
    given = {name: member for name, member in value.items() if member is not None}
    if unknown := given.keys() - shape.members.keys():
        raise KmsFault("ValidationException", f"no such member here: {min(unknown)[:64]}")
    for name in shape.required_members:
        if name not in given:
            raise _invalid(f"{path}.{name}", "Member must not be null")
    return {name: _read(shape.members[name], member, f"{path}.{name}") for name, member in given.items()}


def _require(kind: type, value: object, path: str) -> Any:
    if type(value) is not kind:  # a boolean is an int to isinstance
        raise KmsFault("SerializationException", f"{_member(path) or 'the request'} is no {kind.__name__}")
    return value


def _octets(text: str, path: str) -> bytes:
    try:
        return base64.b64decode(text, validate=True)
    except ValueError as error:
        raise KmsFault("SerializationException", f"{_member(path)} is not base64") from error


def _require_bounds(shape: Any, number: int, path: str, what: str) -> None:
    least, most = shape.metadata.get("min"), shape.metadata.get("max")
    if least is not None and number < least:
        raise _invalid(path, f"Member must have {what} greater than or equal to {least}")
    if most is not None and number > most:
        raise _invalid(path, f"Member must have {what} less than or equal to {most}")


def _require_text(shape: Any, text: str, path: str) -> None:
    if not text.isascii() and any("\ud800" <= each <= "\udfff" for each in text):
        raise KmsFault("SerializationException", f"{_member(path)} has half a character")
    _require_bounds(shape, len(text), path, "length")
    allowed = shape.metadata.get("enum")
    if allowed and text not in allowed:
        raise _invalid(path, f"Member must satisfy enum value set: [{', '.join(allowed)}]")
    pattern = shape.metadata.get("pattern")
    if pattern and re.fullmatch(pattern, text) is None:
        raise _invalid(path, f"Member must satisfy regular expression pattern: {pattern}")


def _member(path: str) -> str:
    return ".".join(name[:1].lower() + name[1:] for name in path.split(".") if name)


def _invalid(path: str, constraint: str) -> KmsFault:
    return KmsFault(
        "ValidationException",
        f"1 validation error detected: Value at '{_member(path)}' failed to satisfy constraint: {constraint}",
    )
