"""``enclave.toml``: every field with its type and its bounds, nothing unknown, nothing assumed."""

from __future__ import annotations

import base64
import tomllib
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import get_type_hints

import pytest
from hypothesis import given
from hypothesis import strategies as st

import enclave.config
from attestation.commitment import Entropy
from attestation.keypolicy.document import KeyArn
from attestation.model_memory import MAX_PARALLEL, KvType
from attestation.reference import configuration_digest
from enclave.config import (
    MAX_ROTATIONS,
    ChannelSettings,
    ConfigurationError,
    EnclaveConfiguration,
    EngineSettings,
    KmsSettings,
    Limits,
    PacingSettings,
    WrappedKey,
)
from vsockrpc.address import VMADDR_CID_ANY, TcpAddress, UnixAddress, VsockAddress

DIGEST = "ab" * 48
SMALLEST = f"""\
version = 1
[rpc]
listen = "vsock:any:5000"
[nsm]
address = "device:/dev/nsm"
entropy = "nsm-hwrng"
[model]
store = "vsock:3:5001"
manifest = "sha384:{DIGEST}"
"""

INTEGERS = {
    "model.max_bytes": (1, 1 << 40),
    "engine.context": (64, 1 << 20),
    "engine.parallel": (1, 64),
    "engine.cells": (2048, 4 * 2048),
    "engine.batch": (16, 4096),
    "engine.prefill": (1, 512),
    "engine.prompt_tokens": (0, 2047),
    "engine.answer_tokens": (0, 2047),
    "engine.reasoning_tokens": (0, 2047),
    "engine.threads": (0, 256),
    "engine.queue": (1, 1024),
    "engine.uid": (1, 2**31 - 1),
    "channel.rotation_seconds": (1, 86400),
    "channel.lifetime_seconds": (1, 86400),
    "channel.max_requests": (1, 1 << 20),
    "pacing.tick_ms": (0, 10_000),
    "pacing.record_bytes": (64, 65536),
    "pacing.bucket_records": (1, 1024),
    "limits.request_bytes": (4096, 4 << 20),
    "limits.request_seconds": (1, 86400),
}
NO_NUMBERS = {"engine.kv_type", "engine.repack"}
REQUIRED = (
    "version",
    "rpc",
    "rpc.listen",
    "nsm",
    "nsm.address",
    "nsm.entropy",
    "model",
    "model.store",
    "model.manifest",
)


def written(**changes: object) -> bytes:
    """``SMALLEST`` with other values: ``section__key=value``; None leaves the key or the whole section out."""
    document: dict[str, object] = tomllib.loads(SMALLEST)
    for path, value in changes.items():
        *sections, key = path.split("__")
        table = document
        for section in sections:
            entry = table.setdefault(section, {})
            assert isinstance(entry, dict)
            table = entry
        if value is None:
            del table[key]
        else:
            table[key] = value
    lines = [f"{key} = {_toml(value)}" for key, value in document.items() if not isinstance(value, dict)]
    for section, entry in document.items():
        if isinstance(entry, dict):
            lines += [f"[{section}]", *(f"{key} = {_toml(value)}" for key, value in entry.items())]
    return "\n".join(lines).encode()


def _toml(value: object) -> str:
    match value:
        case bool():
            return str(value).lower()
        case str():
            return '"' + value.replace("\\", "\\\\").replace('"', '\\"') + '"'
        case _:
            return str(value)


def parsed(**changes: object) -> EnclaveConfiguration:
    return EnclaveConfiguration.parse(written(**changes))


def refusal(data: bytes) -> ConfigurationError:
    with pytest.raises(ConfigurationError) as caught:
        EnclaveConfiguration.parse(data)
    assert caught.value.code == "bad_configuration"
    assert caught.value.exit_code == 2
    return caught.value


def is_settings(kind: object) -> bool:
    own = isinstance(kind, type) and kind.__module__ == enclave.config.__name__
    return own and is_dataclass(kind) and kind is not EnclaveConfiguration


def of(configuration: EnclaveConfiguration, path: str) -> object:
    section, name = path.split(".")
    if path == "model.max_bytes":
        return configuration.max_model_bytes
    return getattr(getattr(configuration, section), name)


# --- What is given, and what is not -------------------------------------------------------------------------------


def test_the_smallest_one_has_these_defaults() -> None:
    configuration = EnclaveConfiguration.parse(SMALLEST.encode())
    assert configuration == EnclaveConfiguration(
        listen=VsockAddress(VMADDR_CID_ANY, 5000),
        nsm="device:/dev/nsm",
        entropy=Entropy.NSM_HWRNG,
        model_store=VsockAddress(3, 5001),
        manifest=bytes.fromhex(DIGEST),
        max_model_bytes=64 << 30,
        engine=EngineSettings(
            context=2048,
            parallel=4,
            cells=4 * 2048,
            kv_type=KvType.F16,
            repack=True,
            batch=512,
            prefill=65,
            prompt_tokens=0,
            answer_tokens=0,
            reasoning_tokens=0,
            threads=0,
            queue=64,
            uid=64001,
        ),
        channel=ChannelSettings(rotation_seconds=300, lifetime_seconds=600, max_requests=65536),
        pacing=PacingSettings(tick_ms=50, record_bytes=512, bucket_records=8),
        limits=Limits(request_bytes=1 << 20, request_seconds=600),
        kms=None,
        digest=configuration_digest(SMALLEST.encode()),
    )


def test_pacing_is_on_unless_it_is_turned_off() -> None:
    assert EnclaveConfiguration.parse(SMALLEST.encode()).pacing.tick_ms > 0
    assert parsed(pacing__tick_ms=0).pacing.tick_ms == 0


def test_the_digest_is_over_the_bytes() -> None:
    """No parser stands between the file and PCR17: what reads the same, written otherwise, is another one."""
    same = SMALLEST + "# a comment\n"
    first, second = EnclaveConfiguration.parse(SMALLEST.encode()), EnclaveConfiguration.parse(same.encode())
    assert second.digest == configuration_digest(same.encode()) != first.digest


@pytest.mark.parametrize("path", REQUIRED)
def test_what_is_required_is_named_when_it_is_missing(path: str) -> None:
    assert refusal(written(**{path.replace(".", "__"): None})).message.startswith(f"{path}: ")


@pytest.mark.parametrize("section", ["rpc", "nsm", "model", "engine", "channel", "pacing", "limits"])
def test_an_unknown_key_is_named(section: str) -> None:
    error = refusal(written(**{f"{section}__tick_MS": 1}))
    assert error.message == f"{section}.tick_MS: no such field"


def test_an_unknown_section_is_named() -> None:
    assert refusal(written(debug__enabled=True)).message == "debug: no such field"


def test_a_section_is_a_table() -> None:
    assert "engine" in refusal(written(engine=1)).message


# --- Types and bounds ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("path", "bounds"), INTEGERS.items())
def test_both_bounds_are_inside_and_one_step_further_is_not(path: str, bounds: tuple[int, int]) -> None:
    key = path.replace(".", "__")
    low, high = bounds
    companion = {
        "channel.rotation_seconds": {"channel__lifetime_seconds": 1},
        "channel.lifetime_seconds": {"channel__rotation_seconds": 86400},
    }.get(path, {})
    for value in bounds:
        assert of(parsed(**{key: value}, **companion), path) == value
    for value in (low - 1, high + 1):
        error = refusal(written(**{key: value}, **companion))
        assert error.message.startswith(f"{path}: ")
        assert (error.expected, error.got) == (f"{low}..{high}", str(value))


@pytest.mark.parametrize("path", INTEGERS)
@pytest.mark.parametrize("value", [True, "1", 1.5])
def test_a_number_is_an_integer_and_nothing_like_it(path: str, value: object) -> None:
    error = refusal(written(**{path.replace(".", "__"): value}))
    assert error.message.startswith(f"{path}: ")
    assert error.expected == "an integer"


def test_every_number_of_the_configuration_is_in_this_table() -> None:
    """So that a new setting does not come without its bounds' test."""
    sections = {"engine": EngineSettings, "channel": ChannelSettings, "pacing": PacingSettings, "limits": Limits}
    named = {f"{section}.{field.name}" for section, kind in sections.items() for field in fields(kind)}
    assert named | {"model.max_bytes"} == INTEGERS.keys() | NO_NUMBERS
    held = {name for name, kind in get_type_hints(EnclaveConfiguration).items() if kind in sections.values()}
    assert held == sections.keys()
    settings = {kind for kind in vars(enclave.config).values() if is_settings(kind)}
    assert settings == {*sections.values(), KmsSettings, WrappedKey}  # the two of KMS have a test of their own


# --- The engine's sizes, which bound one another ------------------------------------------------------------------


def test_sequences_have_cells_for_all_contexts_unless_it_is_said_otherwise() -> None:
    settings = parsed(engine__context=512, engine__parallel=8).engine
    assert (settings.cells, settings.shares_cells) == (8 * 512, False)
    shared = parsed(engine__context=512, engine__parallel=8, engine__cells=8 * 512 - 1).engine
    assert shared.shares_cells
    assert not parsed(engine__context=512, engine__parallel=1, engine__cells=512).engine.shares_cells


@pytest.mark.parametrize("cells", [512, 3 * 512])
def test_cells_are_those_of_one_context_to_all(cells: int) -> None:
    assert parsed(engine__context=512, engine__parallel=3, engine__cells=cells).engine.cells == cells
    step = 1 if cells > 512 else -1
    error = refusal(written(engine__context=512, engine__parallel=3, engine__cells=cells + step))
    assert (error.message.split(":")[0], error.expected, error.got) == ("engine.cells", "512..1536", str(cells + step))


@pytest.mark.parametrize(
    ("prompt", "answer", "longest"), [(1536, 512, (1536, 512)), (0, 2000, (2047, 2000)), (2047, 0, (2047, 2047))]
)
def test_a_prompt_and_its_answer_fit_into_a_context(prompt: int, answer: int, longest: tuple[int, int]) -> None:
    settings = parsed(engine__prompt_tokens=prompt, engine__answer_tokens=answer).engine
    assert (settings.longest_prompt, settings.longest_answer) == longest


def test_a_prompt_and_an_answer_that_no_context_holds_are_refused() -> None:
    error = refusal(written(engine__prompt_tokens=1536, engine__answer_tokens=513))
    assert error.message.startswith("engine.answer_tokens: ")
    assert (error.expected, error.got) == ("<= 512, what the context leaves behind prompt_tokens", "513")


def test_a_step_takes_a_token_of_each_sequence() -> None:
    assert parsed(engine__parallel=MAX_PARALLEL, engine__batch=MAX_PARALLEL).engine.batch == MAX_PARALLEL
    error = refusal(written(engine__parallel=17, engine__batch=16))
    assert error.message.startswith("engine.batch: ")
    assert (error.expected, error.got) == (">= 17, a token of each sequence", "16")


def test_prompts_have_at_most_a_whole_step() -> None:
    assert parsed(engine__batch=16).engine.prefill == 16
    assert parsed(engine__batch=4096).engine.prefill == 65
    assert parsed(engine__batch=512, engine__prefill=512).engine.prefill == 512
    error = refusal(written(engine__batch=16, engine__prefill=17))
    assert (error.message.split(":")[0], error.expected, error.got) == ("engine.prefill", "1..16", "17")


@pytest.mark.parametrize("kind", KvType)
def test_keys_and_values_are_kept_as_one_of_these(kind: KvType) -> None:
    kept = parsed(engine__kv_type=str(kind)).engine.kv_type
    assert kept is kind


@pytest.mark.parametrize("value", ["F16", "q5_1", "f16 "])
def test_keys_and_values_are_kept_as_nothing_else(value: str) -> None:
    error = refusal(written(engine__kv_type=value))
    assert error.message.startswith("engine.kv_type: ")
    assert (error.expected, error.got) == ("f16 or q8_0 or q4_0", repr(value))
    assert refusal(written(engine__kv_type=16)).message.startswith("engine.kv_type: ")


@pytest.mark.parametrize("value", [True, False])
def test_weights_are_repacked_or_not(value: bool) -> None:
    assert parsed(engine__repack=value).engine.repack is value


@pytest.mark.parametrize("value", [0, 1, "true", "yes"])
def test_a_flag_is_true_or_false(value: object) -> None:
    error = refusal(written(engine__repack=value))
    assert error.message.startswith("engine.repack: ")
    assert error.expected == "true or false"


# --- Other types --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [0, 2])
def test_the_version_is_1(value: int) -> None:
    assert refusal(written(version=value)).message.startswith("version: ")


@pytest.mark.parametrize("path", ["rpc.listen", "model.store"])
@pytest.mark.parametrize("value", ["", "vsock:3", "vsock:x:1", "http://host", "unix:", "tcp:host:70000", 5])
def test_an_address_is_one_of_the_rpcs(path: str, value: object) -> None:
    assert refusal(written(**{path.replace(".", "__"): value})).message.startswith(f"{path}: ")


def test_addresses_of_every_kind() -> None:
    assert parsed(rpc__listen="unix:rpc.sock").listen == UnixAddress("rpc.sock")
    assert parsed(model__store="vsock:3:9000").model_store == VsockAddress(3, 9000)


@pytest.mark.parametrize("value", ["", "kernel", "HOST", "nsm_hwrng", 1])
def test_entropy_is_of_a_closed_list(value: object) -> None:
    assert refusal(written(nsm__entropy=value)).message.startswith("nsm.entropy: ")


@pytest.mark.parametrize(
    "value",
    [DIGEST, f"sha256:{DIGEST}", f"sha384:{DIGEST[:-2]}", f"sha384:{DIGEST}00", "sha384:" + "g" * 96, "sha384:", 1],
)
def test_a_digest_is_sha384_in_hexadecimal(value: object) -> None:
    assert refusal(written(model__manifest=value)).message.startswith("model.manifest: ")


def test_a_key_does_not_outlive_more_rotations_than_are_kept() -> None:
    """Else the bound on keys would be met by rotation alone, and no key could be offered any more."""
    assert parsed(channel__rotation_seconds=10, channel__lifetime_seconds=10 * MAX_ROTATIONS)
    error = refusal(written(channel__rotation_seconds=10, channel__lifetime_seconds=10 * MAX_ROTATIONS + 1))
    assert error.message.startswith("channel.lifetime_seconds: ")


# --- KMS ----------------------------------------------------------------------------------------------------------

ARN = "arn:aws:kms:eu-west-1:111122223333:key/1234abcd-12ab-34cd-56ef-1234567890ab"
KMS = {
    "region": "eu-west-1",
    "endpoint": "kms.eu-west-1.amazonaws.com:443",
    "egress": "vsock:3:5002",
    "trust": "AMAZON",
}
WRAPPED = {"key": ARN, "context": "production", "minimum_version": 3}


def with_kms(model: dict[str, object] | None = None, prompts: dict[str, object] | None = None, **kms: object) -> bytes:
    """``SMALLEST`` with ``[kms]``; a value of None leaves the key out."""
    tables = {"kms": {**KMS, **kms}, "kms.model": model, "kms.prompts": prompts}
    lines = [SMALLEST]
    for name, table in tables.items():
        if table is not None:
            lines += [f"[{name}]", *(f"{key} = {_toml(value)}" for key, value in table.items() if value is not None)]
    return "\n".join(lines).encode()


def test_kms_with_amazons_authorities() -> None:
    kms = EnclaveConfiguration.parse(with_kms(model=WRAPPED)).kms
    assert kms == KmsSettings(
        region="eu-west-1",
        endpoint=TcpAddress("kms.eu-west-1.amazonaws.com", 443),
        egress=VsockAddress(3, 5002),
        authority=None,
        model=WrappedKey(KeyArn.parse(ARN), "production", 3),
        prompts=None,
    )


@pytest.mark.parametrize(
    "host",
    [
        "kms.eu-west-1.amazonaws.com",
        "kms-fips.eu-west-1.amazonaws.com",
        "kms.eu-west-1.api.aws",
        "vpce-0123abcd-e5f6.kms.eu-west-1.vpce.amazonaws.com",
    ],
)
def test_amazons_authorities_vouch_for_kms_by_its_names(host: str) -> None:
    kms = EnclaveConfiguration.parse(with_kms(endpoint=f"{host}:443")).kms
    assert kms is not None
    assert kms.endpoint == TcpAddress(host, 443)


def test_kms_with_an_emulators_authority() -> None:
    der = bytes(range(256)) * 3
    root = base64.b64encode(der).decode()
    kms = EnclaveConfiguration.parse(with_kms(trust="EMULATED", root=root, prompts=WRAPPED)).kms
    assert kms is not None
    assert (kms.authority, kms.model, kms.prompts) == (der, None, WrappedKey(KeyArn.parse(ARN), "production", 3))


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("region", "Europe"),
        ("region", None),
        ("endpoint", "kms.eu-west-1.amazonaws.com"),
        ("endpoint", "https://kms.eu-west-1.amazonaws.com:443"),
        ("endpoint", "kms.eu-west-1.amazonaws.com:0"),
        ("endpoint", "KMS.eu-west-1.amazonaws.com:443"),
        ("endpoint", "kms.example.com:443"),
        ("endpoint", "kms.us-east-1.amazonaws.com:443"),
        ("endpoint", "kms.eu-west-1.amazonaws.com.example.com:443"),
        ("endpoint", "kms.eu-west-1.amazonaws.com.:443"),
        ("egress", "3:5002"),
        ("trust", "SYSTEM"),
        ("trust", None),
        ("root", "AAAA"),
        ("proxy", "http://parent:3128"),
    ],
)
def test_what_is_wrong_with_kms_is_named(field: str, value: object) -> None:
    assert refusal(with_kms(None, None, **{field: value})).message.startswith(f"kms.{field}: ")


@pytest.mark.parametrize("root", [None, "", "not base64!", "A" * 5000])
def test_an_emulators_authority_is_a_certificate(root: object) -> None:
    assert refusal(with_kms(trust="EMULATED", root=root)).message.startswith("kms.root: ")


# --- Weights in the image -----------------------------------------------------------------------------------------


def test_weights_may_be_a_file_of_the_image() -> None:
    assert parsed(model__store="file:/opt/strongroom/model.gguf").model_store == Path("/opt/strongroom/model.gguf")


@pytest.mark.parametrize(
    "path",
    ["", "model.gguf", "./model.gguf", "/opt/../model.gguf", "/opt//model.gguf", "/opt/./m", "/opt/m/", "/o\u200b"],
)
def test_the_file_has_one_absolute_path(path: str) -> None:
    assert refusal(written(model__store=f"file:{path}")).message.startswith("model.store: ")


def test_weights_in_the_image_are_not_encrypted() -> None:
    error = refusal(with_kms(model=WRAPPED).replace(b"vsock:3:5001", b"file:/opt/strongroom/model.gguf"))
    assert error.message.startswith("kms.model: ")


@pytest.mark.parametrize("table", ["model", "prompts"])
@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("key", "alias/production"),
        ("key", "arn:aws:kms:eu-west-1:111122223333:alias/production"),
        ("key", ARN.replace("eu-west-1", "us-east-1")),
        ("key", None),
        ("context", ""),
        ("context", "Production"),
        ("context", "a" * 65),
        ("minimum_version", 0),
        ("minimum_version", 1 << 32),
        ("minimum_version", None),
        ("terms", "x"),
    ],
)
def test_what_is_wrong_with_a_wrapped_key_is_named(table: str, field: str, value: object) -> None:
    wrapped = {**WRAPPED, field: value}
    data = with_kms(model=wrapped) if table == "model" else with_kms(prompts=wrapped)
    assert refusal(data).message.startswith(f"kms.{table}.{field}: ")


# --- Bytes that are no configuration ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\xff\xfe",
        b"version = 1\nversion = 1\n",
        b"version = " + b"1" * 5000,
        b"version = 0x" + b"f" * 5000,
        b"a = " + b"[" * 5000,
        b"a = " + b"{a = " * 5000,
        b"[" + b"a." * 3000 + b"a]\n",
        b"version = 1979-99-99",
        b"version = nan",
    ],
    ids=lambda data: f"{data[:12]!r}",
)
def test_what_is_no_configuration_is_refused_with_its_own_error(data: bytes) -> None:
    refusal(data)


@given(st.one_of(st.binary(max_size=200), st.text(max_size=200).map(lambda text: text.encode("utf-8", "replace"))))
def test_any_bytes_are_a_configuration_or_a_typed_error(data: bytes) -> None:
    refusal(data)
    refusal(SMALLEST.encode() + b"\n[engine]\n" + data + b"\nx = 1")


def test_an_error_never_prints_what_a_terminal_would_act_on() -> None:
    error = refusal(SMALLEST.encode() + b'[engine]\n"\\u001b[2K" = 1\n')
    assert "\x1b" not in str(error)
