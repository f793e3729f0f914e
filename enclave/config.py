"""The measured configuration: ``enclave.toml``, read strictly. Its bytes are committed to PCR17 before anything acts on
them.

Every key has one meaning, unknown keys are refused, and nothing here is overridden by environment, arguments or the
parent.
"""

from __future__ import annotations

import base64
import binascii
import re
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from attestation import strict_toml
from attestation.commitment import Entropy
from attestation.envelope import CONTEXT_NAME, MAX_VERSION
from attestation.errors import PolicyError, StrongroomError
from attestation.keypolicy.document import KeyArn, KeyPolicyError, is_kms_host
from attestation.model_memory import (
    DEFAULT_WORK,
    MAX_BATCH,
    MAX_CONTEXT,
    MAX_PARALLEL,
    MIN_BATCH,
    MIN_CONTEXT,
    KvType,
    Work,
)
from attestation.reference import DIGEST_SIZE, configuration_digest
from attestation.strict_toml import Table, wrong_value
from vsockrpc.address import Address, TcpAddress, parse_address
from vsockrpc.errors import AddressError

MAX_CERTIFICATE_TEXT = 4096
"""Characters of a certificate in base64."""
MAX_ROTATIONS = 8
"""Rotations that a key may outlive: so many are kept at once when none is used up early."""
_FILE = "file:"


class ConfigurationError(StrongroomError):
    """``enclave.toml`` cannot be used. The message names the key."""

    exit_code = 2

    def __init__(self, message: str, *, expected: object | None = None, got: object | None = None) -> None:
        super().__init__("bad_configuration", message, expected=expected, got=got)


@dataclass(frozen=True, slots=True)
class EngineSettings:
    """How llama.cpp is run."""

    context: int
    """Tokens of a sequence at most, prompt and answer together."""
    parallel: int
    """Sequences that are decoded at once."""
    cells: int
    """Tokens of all sequences together: what llama.cpp keeps keys and values for. With fewer than all contexts take
    the sequences share them."""
    kv_type: KvType
    """As what keys and values are kept."""
    repack: bool
    """llama.cpp keeps weights a second time in an order that is faster to compute with."""
    batch: int
    """Tokens that one decode takes at most: a cancelled call stops within one."""
    prefill: int
    """How many of these are of prompts beside answers, unless the prompts are a crowd (``scheduler.CROWD``). By itself
    65: one goes with the rows of answers, and 64 are what llama.cpp's attention takes at once (ggml's GGML_FA_TILE_Q).
    With 129 a long prompt is read sooner, and an answer beside it stands still for nearly twice as long.
    """
    prompt_tokens: int
    """Of one prompt at most; 0 is as many as the context leaves."""
    answer_tokens: int
    """Of one answer at most, reasoning among them, and of one whose request does not say how long it may be; 0 is as
    many as the context leaves."""
    reasoning_tokens: int
    """Of one answer's reasoning at most; 0 leaves that to the request."""
    threads: int
    """Threads that decode; 0 takes every CPU that the enclave has."""
    queue: int
    """Requests that may wait."""
    uid: int
    """The engine process's own user and group, where the server may change users."""

    @property
    def shares_cells(self) -> bool:
        """Sequences have no cells of their own (llama.cpp's ``kv_unified``)."""
        return self.cells < self.context * self.parallel

    @property
    def longest_prompt(self) -> int:
        """Tokens, with room for one of an answer."""
        return self.prompt_tokens or self.context - 1

    @property
    def longest_answer(self) -> int:
        """Tokens, behind the shortest prompt."""
        return self.answer_tokens or self.context - 1

    @property
    def work(self) -> Work:
        """What of it decides how much memory the engine takes."""
        return Work(self.context, self.parallel, self.cells, self.kv_type, self.repack, self.batch)


@dataclass(frozen=True, slots=True)
class ChannelSettings:
    """How long a channel key serves."""

    rotation_seconds: int
    """Seconds for which a key is offered."""
    lifetime_seconds: int
    """Seconds for which it is accepted after it was last offered, at most :data:`MAX_ROTATIONS` rotations."""
    max_requests: int
    """Secrets that a key's replay set remembers; a full set retires the key."""


@dataclass(frozen=True, slots=True)
class PacingSettings:
    """The size and the beat of answers: what an observer of ciphertext may see of them."""

    tick_ms: int
    """Milliseconds between two records of an answer; 0 sends each as soon as it has content."""
    record_bytes: int
    """Bytes of plaintext in a record."""
    bucket_records: int
    """An answer's number of records is a multiple of this."""


@dataclass(frozen=True, slots=True)
class Limits:
    """Bounds on what one client can ask for."""

    request_bytes: int
    request_seconds: int


@dataclass(frozen=True, slots=True)
class WrappedKey:
    """Which wrapped keys are used for one purpose: those of one KMS key, sealed in one context and not too old."""

    key: KeyArn
    context: str
    """The name in the encryption context, 1 to 64 of ``a-z 0-9 . _ -``."""
    minimum_version: int
    """The floor against a rollback to an older wrapped key."""


@dataclass(frozen=True, slots=True)
class KmsSettings:
    """Where KMS is, whom TLS to it trusts, and what its keys are used for."""

    region: str
    endpoint: TcpAddress
    """Host and port as TLS names them; where that is, the parent's egress decides."""
    egress: Address
    """The parent's RPC for connections and credentials."""
    authority: bytes | None
    """The one certificate (DER) that TLS to an emulated KMS leads to. None: Amazon's own, which are in the image."""
    model: WrappedKey | None
    """The weights arrive encrypted, under a key that this one wraps."""
    prompts: WrappedKey | None
    """Prompts sealed to this key are answered."""


@dataclass(frozen=True, slots=True)
class EnclaveConfiguration:
    """All that decides how an enclave behaves, besides its code and its model."""

    listen: Address
    nsm: str
    entropy: Entropy
    model_store: Address | Path
    """Where the weights come from; a path is that of a file in the image."""
    manifest: bytes
    max_model_bytes: int
    engine: EngineSettings
    channel: ChannelSettings
    pacing: PacingSettings
    limits: Limits
    kms: KmsSettings | None
    digest: bytes
    """PCR17 is this, extended once."""

    @classmethod
    def parse(cls, data: bytes) -> EnclaveConfiguration:
        """Raises ConfigurationError."""
        try:
            return cls._read(strict_toml.read(data.decode("utf-8")), configuration_digest(data))
        except UnicodeDecodeError as error:
            raise ConfigurationError("enclave.toml is not UTF-8 text") from error
        except PolicyError as error:
            raise ConfigurationError(error.message, expected=error.expected, got=error.got) from error

    @classmethod
    def _read(cls, top: Table, digest: bytes) -> EnclaveConfiguration:
        _integer(top, "version", 1, 1)
        rpc, nsm, model = top.table("rpc"), top.table("nsm"), top.table("model")
        engine, channel, pacing, limits = (_section(top, name) for name in ("engine", "channel", "pacing", "limits"))
        configuration = cls(
            listen=_address(rpc, "listen"),
            nsm=nsm.text("address"),
            entropy=_entropy(nsm, "entropy"),
            model_store=_store(model),
            manifest=_digest(model, "manifest"),
            max_model_bytes=_integer(model, "max_bytes", 1, 1 << 40, default=64 << 30),
            engine=_engine(engine),
            channel=ChannelSettings(
                rotation_seconds=_integer(channel, "rotation_seconds", 1, 86400, default=300),
                lifetime_seconds=_integer(channel, "lifetime_seconds", 1, 86400, default=600),
                max_requests=_integer(channel, "max_requests", 1, 1 << 20, default=1 << 16),
            ),
            pacing=PacingSettings(
                tick_ms=_integer(pacing, "tick_ms", 0, 10_000, default=50),
                record_bytes=_integer(pacing, "record_bytes", 64, 65536, default=512),
                bucket_records=_integer(pacing, "bucket_records", 1, 1024, default=8),
            ),
            limits=Limits(
                request_bytes=_integer(limits, "request_bytes", 4096, 4 << 20, default=1 << 20),
                request_seconds=_integer(limits, "request_seconds", 1, 86400, default=600),
            ),
            kms=_kms(top.table("kms")) if top.has("kms") else None,
            digest=digest,
        )
        for table in (rpc, nsm, model, engine, channel, pacing, limits, top):
            table.finish()
        wrapped = configuration.kms is not None and configuration.kms.model is not None
        if wrapped and isinstance(configuration.model_store, Path):
            raise ConfigurationError("kms.model: weights that are in the image are not encrypted", got="kms.model")
        longest = MAX_ROTATIONS * configuration.channel.rotation_seconds
        if configuration.channel.lifetime_seconds > longest:
            raise wrong_value(
                channel.field("lifetime_seconds"),
                f"<= {longest}, {MAX_ROTATIONS} times rotation_seconds",
                configuration.channel.lifetime_seconds,
            )
        return configuration


def _engine(table: Table) -> EngineSettings:
    context = _integer(table, "context", MIN_CONTEXT, MAX_CONTEXT, default=DEFAULT_WORK.context)
    parallel = _integer(table, "parallel", 1, MAX_PARALLEL, default=DEFAULT_WORK.parallel)
    batch = _integer(table, "batch", MIN_BATCH, MAX_BATCH, default=DEFAULT_WORK.batch)
    settings = EngineSettings(
        context=context,
        parallel=parallel,
        cells=_integer(table, "cells", context, context * parallel, default=context * parallel),
        kv_type=KvType(_choice(table, "kv_type", tuple(KvType), default=DEFAULT_WORK.kv_type)),
        repack=table.flag("repack") if table.has("repack") else DEFAULT_WORK.repack,
        batch=batch,
        prefill=_integer(table, "prefill", 1, batch, default=min(batch, 65)),
        prompt_tokens=_integer(table, "prompt_tokens", 0, context - 1, default=0),
        answer_tokens=_integer(table, "answer_tokens", 0, context - 1, default=0),
        reasoning_tokens=_integer(table, "reasoning_tokens", 0, context - 1, default=0),
        threads=_integer(table, "threads", 0, 256, default=0),
        queue=_integer(table, "queue", 1, 1024, default=64),
        uid=_integer(table, "uid", 1, 2**31 - 1, default=64001),
    )
    if batch < parallel:
        raise wrong_value(table.field("batch"), f">= {parallel}, a token of each sequence", batch)
    prompt, answer = settings.prompt_tokens, settings.answer_tokens
    if prompt and prompt + answer > context:
        expected = f"<= {context - prompt}, what the context leaves behind prompt_tokens"
        raise wrong_value(table.field("answer_tokens"), expected, answer)
    return settings


def _kms(table: Table) -> KmsSettings:
    region = _matching(table, "region", r"[a-z]{2,}(-[a-z0-9]+)+", "an AWS region")
    authority = _authority(table)
    settings = KmsSettings(
        region=region,
        endpoint=_endpoint(table, region, is_amazons=authority is None),
        egress=_address(table, "egress"),
        authority=authority,
        model=_wrapped_key(table.table("model"), region) if table.has("model") else None,
        prompts=_wrapped_key(table.table("prompts"), region) if table.has("prompts") else None,
    )
    table.finish()
    return settings


def _endpoint(table: Table, region: str, *, is_amazons: bool) -> TcpAddress:
    text = table.text("endpoint")
    try:
        address = parse_address(f"tcp:{text}")
    except AddressError as error:
        raise wrong_value(table.field("endpoint"), "HOST:PORT", ascii(text)) from error
    assert isinstance(address, TcpAddress)
    # One spelling, which the parent's list and the certificate are compared with.
    if address.port == 0 or address.host != address.host.lower() or address.host.endswith("."):
        raise wrong_value(table.field("endpoint"), "HOST:PORT, the host in lower case", ascii(text))
    # Amazon's authorities issue for every customer's name as well: they vouch for a name, and this is KMS's.
    if is_amazons and not is_kms_host(address.host, region):
        raise wrong_value(table.field("endpoint"), f"a host name of KMS in {region}", ascii(text))
    return address


def _authority(table: Table) -> bytes | None:
    trust = table.text("trust")
    if trust == "AMAZON":
        return None
    if trust != "EMULATED":
        raise wrong_value(table.field("trust"), "AMAZON or EMULATED", ascii(trust))
    try:
        return base64.b64decode(table.text("root", longest=MAX_CERTIFICATE_TEXT), validate=True)
    except binascii.Error as error:
        raise wrong_value(table.field("root"), "a certificate (DER) in base64", "something else") from error


def _wrapped_key(table: Table, region: str) -> WrappedKey:
    text = table.text("key")
    try:
        key = KeyArn.parse(text)
    except KeyPolicyError as error:
        raise wrong_value(table.field("key"), "the full ARN of a KMS key", ascii(text)) from error
    if key.region != region:
        raise wrong_value(table.field("key"), f"a key in {region}", key.region)
    wrapped = WrappedKey(
        key=key,
        context=_matching(table, "context", CONTEXT_NAME, "1 to 64 of a-z 0-9 . _ -"),
        minimum_version=_integer(table, "minimum_version", 1, MAX_VERSION),
    )
    table.finish()
    return wrapped


def _matching(table: Table, key: str, pattern: str, expected: str) -> str:
    text = table.text(key)
    if not re.fullmatch(pattern, text):
        raise wrong_value(table.field(key), expected, ascii(text))
    return text


def _section(top: Table, key: str) -> Table:
    """A table that may be absent: every field in it has a default."""
    return top.table(key) if top.has(key) else Table(key, {})


def _integer(table: Table, key: str, low: int, high: int, *, default: int | None = None) -> int:
    if default is not None and not table.has(key):
        return default
    value = table.integer(key)
    if not low <= value <= high:
        raise wrong_value(table.field(key), f"{low}..{high}", value)
    return value


def _choice(table: Table, key: str, choices: tuple[str, ...], *, default: str) -> str:
    if not table.has(key):
        return default
    text = table.text(key)
    if text not in choices:
        raise wrong_value(table.field(key), " or ".join(choices), ascii(text))
    return text


def _address(table: Table, key: str) -> Address:
    try:
        return parse_address(table.text(key))
    except AddressError as error:
        raise wrong_value(table.field(key), str(error.expected), error.got) from error


def _store(table: Table) -> Address | Path:
    text = table.text("store")
    if not text.startswith(_FILE):
        return _address(table, "store")
    path = PurePosixPath(text.removeprefix(_FILE))
    if not path.is_absolute() or ".." in path.parts or f"{_FILE}{path}" != text or not text.isprintable():
        raise wrong_value(table.field("store"), "file: and an absolute path", ascii(text))
    return Path(path)


def _entropy(table: Table, key: str) -> Entropy:
    text = table.text(key)
    if text not in set(Entropy):
        raise wrong_value(table.field(key), " or ".join(Entropy), text)
    return Entropy(text)


def _digest(table: Table, key: str) -> bytes:
    prefix, _, digits = table.text(key).partition(":")
    if prefix != "sha384":
        raise wrong_value(table.field(key), "sha384: and a digest in hexadecimal", prefix)
    return table.octets(table.field(key), digits, DIGEST_SIZE)
