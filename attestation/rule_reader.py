"""Reads the rules of an Appraisal Policy: the tables of ``policy.toml`` that require, forbid or ignore (PROTOCOL.md
section 3.1). :mod:`attestation.policy` reads the tables around them.

What is wrong has the field's path.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TypeVar

from attestation.document import MAX_FIELD
from attestation.envelope import MAX_OPENING, EnvelopeError, EnvelopeHeader, EnvelopePurpose
from attestation.errors import PolicyError
from attestation.gguf import ModelError
from attestation.keypolicy.document import KeyArn, KeyPolicyError
from attestation.manifest import MAX_MANIFEST_SIZE, ModelManifest
from attestation.reference import DIGEST_PREFIX, DIGEST_SIZE
from attestation.rules import (
    DigestRule,
    FieldRule,
    Forbid,
    Ignore,
    KeyRule,
    Manifests,
    Measures,
    ModelRule,
    NameRule,
    RegisterRule,
    Released,
    Require,
    WrappedKeyFile,
)
from attestation.strict_toml import Table, missing, wrong_value

T = TypeVar("T")


def read_rule(table: Table, kinds: Mapping[str, Callable[[Table], T]]) -> T:
    """The rule that ``table`` is: exactly one of ``kinds``, and nothing beside it. Raises PolicyError."""
    rule = kinds[table.one_of(*kinds)](table)
    table.finish()
    return rule


def _forbid(table: Table) -> Forbid:
    table.true("forbid")
    return Forbid()


def _released(table: Table) -> Released:
    table.true("released")
    return Released()


def _require_fields(table: Table) -> Require[bytes]:
    values = table.texts("require", longest=2 * MAX_FIELD)
    return Require(tuple(_field_value(field, text) for field, text in values))


def _field_value(field: str, text: str) -> bytes:
    if not re.fullmatch(r"(?:[0-9a-fA-F]{2})+", text):
        raise wrong_value(field, f"1 to {MAX_FIELD} bytes in hexadecimal", ascii(text))
    return bytes.fromhex(text)


def read_model_rule(table: Table, directory: Path) -> ModelRule:
    """The rule for PCR16, which may name files of manifests in ``directory``. Raises PolicyError."""
    if not table.has("manifests"):
        return read_rule(table, DIGEST_RULES)
    minimum = table.integer("minimum_version")
    require_bounds(table.field("minimum_version"), minimum, 0, (1 << 63) - 1, "")
    files = tuple((name, _manifest(field, directory / name)) for field, name in table.texts("manifests"))
    table.finish()
    try:
        return Manifests(files, minimum)
    except PolicyError as error:
        raise error.at(table.field("minimum_version")) from error


def _manifest(field: str, path: Path) -> ModelManifest:
    data = read_file(path, MAX_MANIFEST_SIZE, "unreadable_manifest", field=field)
    try:
        return ModelManifest.decode(data)
    except ModelError as error:
        raise PolicyError(error.code, error.message, field=field, expected=error.expected, got=error.got) from error


def digests(table: Table, key: str) -> tuple[bytes, ...]:
    """The list ``key`` of texts ``sha384:`` and 96 hexadecimal digits, as 48 bytes each. Raises PolicyError."""
    values = []
    for field, text in table.texts(key):
        if not text.startswith(DIGEST_PREFIX):
            raise wrong_value(field, f"{DIGEST_PREFIX} and 96 hexadecimal digits", ascii(text))
        values.append(table.octets(field, text.removeprefix(DIGEST_PREFIX), DIGEST_SIZE))
    return tuple(values)


def read_key_rules(table: Table, directory: Path) -> Mapping[EnvelopePurpose, KeyRule]:
    """The rules for KMS keys, one or more; a wrapped key is a file in ``directory``. Raises PolicyError."""
    rules = {
        purpose: _key_rule(table.table(purpose.table), purpose, directory)
        for purpose in EnvelopePurpose
        if table.has(purpose.table)
    }
    table.finish()
    if not rules:
        raise missing(table.field(EnvelopePurpose.MODEL.table))
    return rules


def _key_rule(table: Table, purpose: EnvelopePurpose, directory: Path) -> KeyRule:
    field, text = table.field("key"), table.text("key")
    try:
        key = KeyArn.parse(text)
    except KeyPolicyError as error:
        raise wrong_value(field, "the full ARN of a KMS key", ascii(text)) from error
    context, minimum = table.text("context"), table.integer("minimum_version")
    administrators: tuple[str, ...] = ()
    if table.one_of("locked", "administrators") == "locked":
        table.true("locked")
    else:
        administrators = tuple(text for _, text in table.texts("administrators"))
    wrapped = None
    if purpose is EnvelopePurpose.MODEL:
        wrapped = _wrapped_key(table.table("wrapped_key"), directory)
    table.finish()
    try:
        return KeyRule(key, context, minimum, administrators, wrapped)
    except PolicyError as error:
        raise error.at(table.field(error.field or "")) from error


def _wrapped_key(table: Table, directory: Path) -> WrappedKeyFile | Ignore:
    if table.one_of("file", "ignore") == "ignore":
        rule = _ignore(table)
        table.finish()
        return rule
    name, field = table.text("file"), table.field("file")
    table.finish()
    try:
        beginning = read_file(directory / name, MAX_OPENING, "unreadable_wrapped_key", field=field, whole=False)
    except PolicyError as error:
        if isinstance(error.__cause__, FileNotFoundError):
            return WrappedKeyFile(name, None)
        raise
    try:
        header, _ = EnvelopeHeader.split(beginning)
    except EnvelopeError as error:
        raise PolicyError(error.code, error.message, field=field, expected=error.expected, got=error.got) from error
    return WrappedKeyFile(name, header)


def _ignore(table: Table) -> Ignore:
    return Ignore(table.text("ignore"))


REGISTER_RULES: Mapping[str, Callable[[Table], RegisterRule]] = {
    "require": lambda table: Require(
        tuple(table.octets(field, text, DIGEST_SIZE) for field, text in table.texts("require"))
    ),
    "measures": lambda table: Measures(tuple(text for _, text in table.texts("measures"))),
    "forbid": _forbid,
    "ignore": _ignore,
}
"""What may stand in a register's table, and how each is read."""
FIELD_RULES: Mapping[str, Callable[[Table], FieldRule]] = {
    "require": _require_fields,
    "forbid": _forbid,
    "ignore": _ignore,
}
"""The same for a field of a bare document."""
DIGEST_RULES: Mapping[str, Callable[[Table], DigestRule]] = {
    "require": lambda table: Require(digests(table, "require")),
    "released": _released,
    "ignore": _ignore,
}
"""The same for a digest."""
NAME_RULES: Mapping[str, Callable[[Table], NameRule]] = {
    "require": lambda table: Require(tuple(text for _, text in table.texts("require"))),
    "ignore": _ignore,
}
"""The same for a name."""


def require_bounds(field: str, value: int, low: int, high: int, unit: str) -> None:
    """``value`` is from ``low`` to ``high``, both included. Raises PolicyError ``wrong_value``."""
    if not low <= value <= high:
        expected = f"{low} to {high} {unit}".rstrip()
        raise PolicyError("wrong_value", "out of bounds", field=field, expected=expected, got=value)


def read_file(path: Path, limit: int, code: str, *, field: str | None, whole: bool = True) -> bytes:
    """The content of a file that a policy names, of at most ``limit`` bytes; or, where it need not be ``whole``, its
    beginning. Raises PolicyError with ``code``.
    """
    try:
        with path.open("rb") as file:
            data = file.read(limit + 1)
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise PolicyError(code, f"{path}: {reason}", field=field) from error
    if len(data) > limit and whole:
        raise PolicyError(code, f"{path} is too large", field=field, expected=f"at most {limit} bytes")
    return data[:limit]
