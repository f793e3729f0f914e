"""What a launcher has to know of an ``enclave.toml``: where the enclave listens, where it will look for its NSM, its
model and its way to KMS, and how much its engine is to hold.

The enclave reads the whole file, strictly; here only these keys are looked at, so that a mistake is said before
anything is started.
"""

from __future__ import annotations

import tomllib
from dataclasses import dataclass
from pathlib import Path

from attestation.errors import StrongroomError
from attestation.model_memory import (
    DEFAULT_WORK,
    MAX_BATCH,
    MAX_CONTEXT,
    MAX_PARALLEL,
    MIN_BATCH,
    MIN_CONTEXT,
    KvType,
    SizingError,
    Work,
)
from vsockrpc.address import Address, parse_address
from vsockrpc.errors import AddressError


class LaunchConfigurationError(StrongroomError):
    """An ``enclave.toml`` that this launcher cannot start."""

    exit_code = 2

    def __init__(self, key: str, message: str, *, expected: object | None = None, got: object | None = None) -> None:
        super().__init__("bad_configuration", f"{key}: {message}", expected=expected, got=got)


@dataclass(frozen=True, slots=True)
class KmsAccess:
    """What the enclave's KMS asks of its host. ``endpoint`` is the ``HOST:PORT`` that the enclave will ask for."""

    egress: Address
    endpoint: str
    encrypted_model: bool
    """Whether the weights arrive encrypted."""


@dataclass(frozen=True, slots=True)
class LaunchConfiguration:
    """Its addresses, as the enclave sees them. Which of them a launcher can offer, it says itself."""

    listen: Address
    nsm: Address | None
    """Of a software NSM. None: the enclave opens a device."""
    store: Address | None
    """Of the model store. None: the weights are in the image."""
    manifest: str
    """``sha384:`` and the digest of the model's manifest, in hexadecimal."""
    kms: KmsAccess | None = None
    work: Work = DEFAULT_WORK
    """What its engine is to hold."""

    @classmethod
    def load(cls, path: Path) -> LaunchConfiguration:
        """Raises LaunchConfigurationError, or OSError when the file cannot be read."""
        return cls.parse(path.read_bytes(), name=path.name)

    @classmethod
    def parse(cls, data: bytes, *, name: str = "enclave.toml") -> LaunchConfiguration:
        """``name`` is what an error calls the file. Raises LaunchConfigurationError."""
        document = read_document(data, name=name)
        return cls(
            listen=_address(document, "rpc", "listen"),
            nsm=_module(document),
            store=_store(document),
            manifest=_text(document, "model", "manifest"),
            kms=_kms(document) if "kms" in document else None,
            work=engine_work(document),
        )


def read_document(data: bytes, *, name: str = "enclave.toml") -> dict[str, object]:
    """``name`` is what an error calls the file. Raises LaunchConfigurationError."""
    try:
        return tomllib.loads(data.decode("utf-8"))
    except (ValueError, RecursionError) as error:  # also a number of more digits than Python reads
        raise LaunchConfigurationError(name, f"not TOML: {error}") from error


def _kms(document: dict[str, object]) -> KmsAccess:
    egress, endpoint = _address(document, "kms", "egress"), _text(document, "kms", "endpoint")
    table = document["kms"]
    return KmsAccess(egress, endpoint, encrypted_model=isinstance(table, dict) and "model" in table)


def _store(document: dict[str, object]) -> Address | None:
    is_file = _text(document, "model", "store").startswith("file:")
    return None if is_file else _address(document, "model", "store")


def _module(document: dict[str, object]) -> Address | None:
    is_device = _text(document, "nsm", "address").startswith("device:")
    return None if is_device else _address(document, "nsm", "address")


def engine_work(document: dict[str, object]) -> Work:
    """What the ``[engine]`` of an ``enclave.toml`` asks for. Raises LaunchConfigurationError."""
    engine = document.get("engine", {})
    if not isinstance(engine, dict):
        raise LaunchConfigurationError("[engine]", "no table", got=repr(engine)[:80])
    context = _number(engine, "context", DEFAULT_WORK.context, MIN_CONTEXT, MAX_CONTEXT)
    parallel = _number(engine, "parallel", DEFAULT_WORK.parallel, 1, MAX_PARALLEL)
    cells = _number(engine, "cells", context, 1, context * parallel) if "cells" in engine else None
    batch = _number(engine, "batch", DEFAULT_WORK.batch, MIN_BATCH, MAX_BATCH)
    kind, repack = engine.get("kv_type", DEFAULT_WORK.kv_type.value), engine.get("repack", DEFAULT_WORK.repack)
    if kind not in list(KvType):
        raise LaunchConfigurationError("engine.kv_type", "unknown", expected=" or ".join(KvType), got=repr(kind)[:80])
    if not isinstance(repack, bool):
        raise LaunchConfigurationError("engine.repack", "neither true nor false", got=repr(repack)[:80])
    try:
        return Work(context, parallel, cells, KvType(kind), repack, batch)
    except SizingError as error:
        raise LaunchConfigurationError("[engine]", error.message, expected=error.expected, got=error.got) from error


def _number(engine: dict[str, object], key: str, default: int, least: int, most: int) -> int:
    value = engine.get(key, default)
    if not isinstance(value, int) or isinstance(value, bool) or not least <= value <= most:
        expected, got = f"{least}..{most}", repr(value)[:80]
        raise LaunchConfigurationError(f"engine.{key}", "no such number", expected=expected, got=got)
    return value


def _text(document: dict[str, object], table: str, key: str) -> str:
    values = document.get(table)
    value = values.get(key) if isinstance(values, dict) else None
    if not isinstance(value, str):
        raise LaunchConfigurationError(f"{table}.{key}", "missing", expected="text", got=repr(value))
    return value


def _address(document: dict[str, object], table: str, key: str) -> Address:
    try:
        return parse_address(_text(document, table, key))
    except AddressError as error:
        raise LaunchConfigurationError(
            f"{table}.{key}", error.message, expected=error.expected, got=error.got
        ) from error
