"""``strongroom emulate kms`` as a person runs it."""

from __future__ import annotations

import json
import os
import signal
import socket
import stat
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import boto3
import pytest

from attestation.chain import AWS_NITRO_G1_SHA256
from emulator.pki import ensure_development_root
from tests.kms_clients import refused
from tests.terminal import Terminal


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Nobody's own state."""
    monkeypatch.setenv("STRONGROOM_HOME", str(tmp_path / "home"))
    for name in [name for name in os.environ if name.startswith("AWS_")]:
        monkeypatch.delenv(name)
    return tmp_path / "home"


@pytest.fixture
def terminal(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Terminal:
    return Terminal(monkeypatch, capsys)


class Running:
    """The command as a process, once it has said that it serves."""

    def __init__(self, *arguments: str) -> None:
        command = [sys.executable, "-m", "strongroom.cli", "emulate", "kms", *arguments]
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        assert self.process.stdout is not None
        self.lines = [self.process.stdout.readline()]

    def more(self, until: str) -> str:
        assert self.process.stdout is not None
        while until not in self.lines[-1]:
            assert self.lines[-1], "it ended"
            self.lines.append(self.process.stdout.readline())
        return "".join(self.lines)

    def end(self, number: signal.Signals) -> tuple[int, str, str]:
        self.process.send_signal(number)
        out, err = self.process.communicate()
        return self.process.returncode, out, err


@pytest.fixture
def running() -> Iterator[Any]:
    started: list[Running] = []

    def start(*arguments: str) -> Running:
        started.append(Running(*arguments))
        return started[-1]

    yield start
    for each in started:
        if each.process.poll() is None:
            each.end(signal.SIGTERM)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_boto3_with_what_it_prints(
    home: Path, running: Any, number: signal.Signals, monkeypatch: pytest.MonkeyPatch
) -> None:
    emulator = running("--json", "--key", "model", "--region", "eu-west-1", "--role", "enclave")
    said = json.loads(emulator.lines[0])
    assert said["anchor"]["trust"] == "EMULATED"
    assert said["root"] == str(home / "pki" / "tls-root.pem")
    assert said["profiles"]["enclave"] == "arn:aws:sts::111122223333:assumed-role/enclave/strongroom"
    for name, value in said["environment"].items():
        monkeypatch.setenv(name, value)
    arn = said["keys"]["model"]
    assert arn.startswith("arn:aws:kms:eu-west-1:111122223333:key/")
    for profile, is_allowed in (("default", True), ("enclave", False)):
        client = boto3.session.Session(profile_name=profile).client("kms")
        if is_allowed:
            assert client.describe_key(KeyId="alias/model")["KeyMetadata"]["Arn"] == arn
        else:
            with refused("AccessDeniedException", "no identity-based policy"):
                client.describe_key(KeyId="alias/model")
        client.close()
    credentials = Path(said["environment"]["AWS_SHARED_CREDENTIALS_FILE"])
    assert stat.S_IMODE(credentials.stat().st_mode) == 0o600
    assert stat.S_IMODE(credentials.parent.stat().st_mode) == 0o700
    secrets = [line.rpartition(" = ")[2] for line in credentials.read_text().splitlines() if "secret" in line]
    assert len(secrets) == 2
    assert emulator.end(number) == (0, "", "")
    assert not credentials.parent.exists()
    assert not any(secret in emulator.lines[0] for secret in secrets)


def test_what_a_person_reads(running: Any, tmp_path: Path) -> None:
    folder = tmp_path / "aws"
    emulator = running("--directory", str(folder), "--anchor", "aws", "--key", "model", "--latency-ms", "1")
    said = emulator.more("AWS_CONFIG_FILE")
    assert said.startswith("KMS: https://127.0.0.1:")
    assert f"under AWS-NITRO-G1, sha256 {AWS_NITRO_G1_SHA256}" in said
    assert "\nalias/model: arn:aws:kms:us-east-1:111122223333:key/" in said
    assert f"export AWS_SHARED_CREDENTIALS_FILE={folder}/credentials\n" in said
    exports = [line.strip() for line in said.splitlines() if line.startswith("  export ")]
    assert (folder / "environment").read_text().splitlines() == exports
    for role in ("enclave", "sealer", "administrator"):
        assert f"profile {role}: " in said
    assert stat.S_IMODE((folder / "credentials").stat().st_mode) == 0o600
    assert emulator.end(signal.SIGTERM) == (0, "", "")


def test_a_directory_serves_one_emulator_after_another(running: Any, terminal: Terminal, tmp_path: Path) -> None:
    folder = tmp_path / "aws"
    folder.mkdir()
    (folder / "mine").write_text("stays")
    for _ in range(2):
        emulator = running("--directory", str(folder), "--json")
        files = {path.name: path.read_bytes() for path in folder.iterdir()}
        assert set(files) == {"credentials", "config", "environment", "mine"}
        ran = terminal("emulate", "kms", "--directory", str(folder), "--json")
        assert (ran.code, ran.json["error"]["code"]) == (2, "file_exists")
        assert {path.name: path.read_bytes() for path in folder.iterdir()} == files
        assert emulator.end(signal.SIGTERM) == (0, "", "")
        assert [path.name for path in folder.iterdir()] == ["mine"]


@pytest.mark.parametrize("name", ["credentials", "config", "environment"])
def test_a_persons_own_files_stay(terminal: Terminal, tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_text("mine")
    ran = terminal("emulate", "kms", "--directory", str(tmp_path))
    assert ran.code == 2
    assert "[file_exists]" in ran.err
    assert (tmp_path / name).read_text() == "mine"


def test_a_second_one_has_the_same_root_and_other_credentials(running: Any) -> None:
    one, other = (json.loads(running("--json").lines[0]) for _ in range(2))
    assert one["root"] == other["root"]
    assert one["anchor"]["sha256"] == other["anchor"]["sha256"]
    assert one["environment"]["AWS_SHARED_CREDENTIALS_FILE"] != other["environment"]["AWS_SHARED_CREDENTIALS_FILE"]
    assert ensure_development_root().certificate_der


@pytest.mark.parametrize(
    "arguments",
    [
        ("--listen", "nowhere"),
        ("--account", "1"),
        ("--region", "Frankfurt"),
        ("--role", "a/b"),
        ("--role", "default"),
        ("--key", "a", "--key", "a"),
        ("--name", "a b"),
        ("--anchor", "other"),
        ("--latency-ms", "-1"),
    ],
)
def test_usage(terminal: Terminal, arguments: tuple[str, ...]) -> None:
    ran = terminal("emulate", "kms", *arguments)
    assert (ran.code, ran.out) == (2, "")
    assert arguments[0] in ran.err


def test_a_port_that_is_taken(terminal: Terminal, tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        ran = terminal("emulate", "kms", "--listen", address, "--directory", str(tmp_path / "aws"), "--json")
    assert (ran.code, ran.json["error"]["code"]) == (4, "cannot_listen")
    assert f"cannot listen on {address}: Address already in use" in ran.json["error"]["message"]
    assert list((tmp_path / "aws").iterdir()) == []


def test_a_host_that_is_none(terminal: Terminal) -> None:
    ran = terminal("emulate", "kms", "--listen", f"{'x' * 64}.example:0", "--json")
    assert (ran.code, ran.json["error"]["code"]) == (4, "cannot_listen")


def test_help_has_examples(terminal: Terminal) -> None:
    ran = terminal("emulate", "kms", "--help")
    assert ran.code == 0
    assert "strongroom emulate kms --listen 127.0.0.1:8443" in ran.out
    assert "kms" in terminal("emulate", "--help").out
