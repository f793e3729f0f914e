"""What a launcher reads of an ``enclave.toml``, and that it reads the same as the enclave."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from attestation.manifest import ManifestFile, ModelManifest
from attestation.model_memory import DEFAULT_WORK, Work
from enclave.config import EnclaveConfiguration
from parent.config import KmsAccess, LaunchConfiguration, LaunchConfigurationError
from strongroom.prepare import Settings, enclave_toml
from vsockrpc.address import UnixAddress

GOOD = """\
version = 1
[rpc]
listen = "unix:rpc.sock"
[nsm]
address = "unix:nsm.sock"
entropy = "host"
[model]
store = "unix:models.sock"
manifest = "sha384:00"
"""
KMS = """\
[kms]
region = "us-east-1"
endpoint = "kms.us-east-1.amazonaws.com:443"
egress = "unix:egress.sock"
trust = "AMAZON"
"""
ADDRESSES = {"rpc.listen": "unix:rpc.sock", "nsm.address": "unix:nsm.sock", "model.store": "unix:models.sock"}


def load(directory: Path, text: str | bytes) -> LaunchConfiguration:
    path = directory / "enclave.toml"
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    return LaunchConfiguration.load(path)


def refusal(directory: Path, text: str | bytes) -> LaunchConfigurationError:
    with pytest.raises(LaunchConfigurationError) as caught:
        load(directory, text)
    assert (caught.value.code, caught.value.exit_code) == ("bad_configuration", 2)
    return caught.value


def test_the_sockets_are_those_beside_the_file(tmp_path: Path) -> None:
    assert load(tmp_path, GOOD) == LaunchConfiguration(
        UnixAddress("rpc.sock"), UnixAddress("nsm.sock"), UnixAddress("models.sock"), "sha384:00"
    )


@pytest.mark.parametrize("encrypted", [False, True])
def test_what_kms_asks_of_the_host(tmp_path: Path, encrypted: bool) -> None:
    text = GOOD + KMS + ('[kms.model]\nkey = "arn"\n' if encrypted else '[kms.prompts]\nkey = "arn"\n')
    endpoint = "kms.us-east-1.amazonaws.com:443"
    assert load(tmp_path, text).kms == KmsAccess(UnixAddress("egress.sock"), endpoint, encrypted)
    assert load(tmp_path, GOOD).kms is None


@pytest.mark.parametrize(
    ("line", "instead"),
    [
        ('egress = "unix:egress.sock"', ""),
        ('egress = "unix:egress.sock"', 'egress = "here"'),
        ('egress = "unix:egress.sock"', "egress = 5"),
        ('endpoint = "kms.us-east-1.amazonaws.com:443"', ""),
        ('endpoint = "kms.us-east-1.amazonaws.com:443"', "endpoint = 443"),
    ],
)
def test_what_is_wrong_with_kms_is_named(tmp_path: Path, line: str, instead: str) -> None:
    error = refusal(tmp_path, GOOD + KMS.replace(line, instead))
    assert error.message.startswith(f"kms.{line.partition(' ')[0]}: ")


def test_kms_is_a_table(tmp_path: Path) -> None:
    assert refusal(tmp_path, "kms = 5\n" + GOOD).message.startswith("kms.egress: ")


def test_launcher_and_enclave_read_the_same_from_what_is_prepared(tmp_path: Path) -> None:
    manifest = ModelManifest("tiny", (ManifestFile("tiny.gguf", 1, bytes(48)),), "{{ messages }}")
    text = enclave_toml(manifest, Settings(context=512, threads=2, tick_ms=0))
    launcher, enclave = load(tmp_path, text), EnclaveConfiguration.parse(text.encode())
    assert launcher.listen == enclave.listen
    assert str(launcher.nsm) == enclave.nsm
    assert launcher.store == enclave.model_store
    assert launcher.manifest == f"sha384:{enclave.manifest.hex()}"
    assert enclave.manifest == manifest.digest()
    assert (enclave.engine.context, enclave.engine.threads, enclave.pacing.tick_ms) == (512, 2, 0)
    assert as_held(launcher.work) == as_held(enclave.engine.work)


def as_held(work: Work) -> tuple[object, ...]:
    """However many cells there are was said or not."""
    return work.context, work.parallel, work.streams, work.kv_type, work.repack, work.batch


@pytest.mark.parametrize(
    "engine",
    [
        "",
        "context = 4096",
        "context = 4096\nparallel = 2\ncells = 5000",
        'parallel = 64\nkv_type = "q8_0"\nrepack = false\nbatch = 64',
        'context = 300\ncells = 1200\nkv_type = "q4_0"\nrepack = true',
    ],
)
def test_what_the_engine_holds_is_the_same_for_both(tmp_path: Path, engine: str) -> None:
    text = GOOD.replace('"sha384:00"', f'"sha384:{"00" * 48}"') + f"[engine]\n{engine}\n"
    launcher, enclave = load(tmp_path, text), EnclaveConfiguration.parse(text.encode())
    assert as_held(launcher.work) == as_held(enclave.engine.work)


def test_where_nobody_says_it_it_is_what_enclaves_take(tmp_path: Path) -> None:
    text = GOOD.replace('"sha384:00"', f'"sha384:{"00" * 48}"')
    assert load(tmp_path, text).work == DEFAULT_WORK
    assert as_held(EnclaveConfiguration.parse(text.encode()).engine.work) == as_held(DEFAULT_WORK)


@pytest.mark.parametrize(
    ("engine", "words"),
    [
        ("context = 63", "engine.context: no such number"),
        ("batch = 15", "engine.batch: no such number"),
        ("context = 64\nparallel = 2\ncells = 63", "cells: "),
        ("context = 64\nparallel = 2\ncells = 127.0", "no such number"),
        ("parallel = 32\nbatch = 31", "batch: "),
        ('kv_type = "F16"', "unknown"),
        ("kv_type = [1]", "unknown"),
        ("repack = 1", "neither true nor false"),
    ],
)
def test_work_that_the_enclave_would_refuse_is_refused(tmp_path: Path, engine: str, words: str) -> None:
    error = refusal(tmp_path, GOOD + f"[engine]\n{engine}\n")
    assert error.message.startswith(("engine.", "[engine]: "))
    assert words in error.message


@pytest.mark.parametrize("key", ["context", "batch", "parallel", "cells"])
@pytest.mark.parametrize("value", ["0", "-1", "true", '"2048"', "2048.0", str((1 << 20) + 1), "[]"])
def test_what_is_no_such_number_is_named(tmp_path: Path, key: str, value: str) -> None:
    assert refusal(tmp_path, GOOD + f"[engine]\n{key} = {value}\n").message.startswith(f"engine.{key}: ")


def test_the_engine_is_a_table(tmp_path: Path) -> None:
    assert refusal(tmp_path, "engine = 5\n" + GOOD).message.startswith("[engine]: ")


@pytest.mark.parametrize("path", [*ADDRESSES, "model.manifest"])
@pytest.mark.parametrize("value", [None, "5", "true", "[]"])
def test_a_key_that_is_missing_or_no_text_is_named(tmp_path: Path, path: str, value: str | None) -> None:
    _, key = path.split(".")
    lines = GOOD.splitlines()
    [index] = [number for number, line in enumerate(lines) if line.startswith(f"{key} ")]
    lines[index] = "" if value is None else f"{key} = {value}"
    assert refusal(tmp_path, "\n".join(lines)).message.startswith(f"{path}: ")


@pytest.mark.parametrize("path", ADDRESSES)
@pytest.mark.parametrize("value", ["unix:", "vsock:3", "here"])
def test_what_is_no_address_is_refused(tmp_path: Path, path: str, value: str) -> None:
    error = refusal(tmp_path, GOOD.replace(ADDRESSES[path], value))
    assert error.message.startswith(f"{path}: ")


def test_an_images_addresses_are_read_too(tmp_path: Path) -> None:
    instead = {"unix:rpc.sock": "vsock:any:5005", "unix:models.sock": "vsock:3:5006", "unix:nsm.sock": "vsock:3:5008"}
    text = GOOD
    for old, new in instead.items():
        text = text.replace(old, new)
    loaded = load(tmp_path, text)
    assert [str(loaded.listen), str(loaded.store), str(loaded.nsm)] == list(instead.values())
    assert load(tmp_path, GOOD.replace("unix:nsm.sock", "device:/dev/nsm")).nsm is None
    assert load(tmp_path, GOOD.replace("unix:models.sock", "file:/opt/strongroom/model.gguf")).store is None


@pytest.mark.parametrize(
    "data", [b"\xff", b"version =", b"a = " + b"1" * 5000, b"a = " + b"[" * 5000, b"rpc = 1", b'rpc = "x"']
)
def test_a_file_that_is_none_is_refused_with_its_own_error(tmp_path: Path, data: bytes) -> None:
    refusal(tmp_path, data)


@given(st.binary(max_size=200))
def test_any_bytes_are_a_configuration_or_a_typed_error(tmp_path_factory: pytest.TempPathFactory, data: bytes) -> None:
    refusal(tmp_path_factory.getbasetemp(), data)
