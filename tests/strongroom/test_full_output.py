"""Where nothing can be written any more, no command ends with the exit code of a verdict."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import click
import pytest

from attestation.bundle import Bundle
from strongroom.cli import strongroom as front_door
from strongroom.release_file import write_key
from tests.pki import forge
from tests.release_files import ED25519, NAME
from tests.terminal import Ran, Street, Terminal

FULL = Path("/dev/full")
pytestmark = pytest.mark.skipif(not FULL.exists(), reason="this system has no /dev/full")

PIN = str(ED25519.public_key)
SIGNING = ("--key", "key.pem", "--product", NAME)
REGISTERS = ("--pcr0", "01" * 48, "--pcr1", "02" * 48, "--pcr2", "03" * 48)
ADD = (*SIGNING, *REGISTERS, "--release", "1.0", "--repository", "r", "--commit", "ab" * 20)


def commands(group: click.Group, *path: str) -> Iterator[tuple[str, ...]]:
    """Every command below ``group`` that has --json."""
    context = click.Context(group)
    for name in group.list_commands(context):
        command = group.get_command(context, name)
        if isinstance(command, click.Group):
            yield from commands(command, *path, name)
        elif command is not None and any("--json" in each.opts for each in command.params):
            yield (*path, name)


COMMANDS = list(commands(front_door))
SPEAKING: dict[tuple[str, ...], tuple[str, ...]] = {
    ("ask",): ("hello", "--url", "URL", "--policy", "POLICY"),
    ("evidence",): ("--url", "URL", "-o", "kept.json"),
    ("inspect",): ("bundle.json",),
    ("policy", "check"): ("policy.toml",),
    ("policy", "explain"): ("policy.toml",),
    ("policy", "init"): (
        *("--from-evidence", "bundle.json", "--anchor", "root.der", "-o", "made.toml"),
        *("--ignore-model", "a test", "--ignore-configuration", "a test"),
    ),
    ("ps",): (),
    ("release", "add"): ("new.jsonl", *ADD),
    ("release", "check"): ("releases.jsonl", "--key", PIN, "--product", NAME),
    ("release", "keygen"): ("new.pem",),
    ("release", "pin"): ("--key", "key.pem"),
    ("release", "refresh"): ("releases.jsonl", *SIGNING),
    ("release", "withdraw"): ("releases.jsonl", "1.0", *SIGNING),
    ("verify",): ("bundle.json", "--archived", "--policy", "policy.toml"),
}
"""What gives each command something to say. The others run processes of their own."""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, strongroom: Terminal) -> Path:
    (tmp_path / "root.der").write_bytes(forge.ROOT_DER)
    (tmp_path / "policy.toml").write_text(forge.POLICY)
    bundle = Bundle(forge.evidence(), forge.NONCE, forge.NOW, "http://127.0.0.1:8080")
    (tmp_path / "bundle.json").write_bytes(bundle.encode())
    write_key(tmp_path / "key.pem", ED25519)
    monkeypatch.chdir(tmp_path)
    assert strongroom("release", "add", "releases.jsonl", *ADD).code == 0
    return tmp_path


@pytest.fixture
def full(monkeypatch: pytest.MonkeyPatch, strongroom: Terminal) -> Callable[..., Ran]:
    """The front door, with nowhere to write to."""

    def run(*arguments: str) -> Ran:
        with FULL.open("w") as output, monkeypatch.context() as patched:
            patched.setattr(sys, "stdout", output)
            return strongroom(*arguments)

    return run


@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
def test_an_error_that_cannot_be_told(full: Callable[..., Ran], command: tuple[str, ...]) -> None:
    ran = full(*command, "--json", "--nonsense")
    assert (ran.code, ran.err) == (4, "strongroom: the output cannot be written: No space left on device\n")


@pytest.mark.parametrize("command", SPEAKING, ids=" ".join)
def test_an_answer_that_cannot_be_told(
    folder: Path, full: Callable[..., Ran], street: Street, command: tuple[str, ...]
) -> None:
    places = {"URL": street.url, "POLICY": street.policy_file}
    ran = full(*command, *(places.get(each, each) for each in SPEAKING[command]), "--json")
    assert ran.code == 4
    assert ran.err.splitlines()[-1] == "strongroom: the output cannot be written: No space left on device"


def test_every_command_speaks_here_but_those_with_processes_of_their_own() -> None:
    assert set(COMMANDS) - set(SPEAKING) == {("run",), ("init",), ("start",), ("stop",), ("serve",), ("proxy",)}


def test_a_refusal_that_nobody_could_read_is_no_verdict(
    folder: Path, strongroom: Terminal, full: Callable[..., Ran]
) -> None:
    debug = forge.evidence(forge.document(forge.payload_fields(pcrs=forge.DEBUG_PCRS)))
    (folder / "debug.cbor").write_bytes(debug)
    verify = ("verify", "debug.cbor", "--archived", "--policy", "policy.toml")
    assert strongroom(*verify).code == 1
    for options in ((), ("--json",), ("--explain",)):
        assert full(*verify, *options).code == 4


@pytest.mark.parametrize("both", [False, True], ids=["output", "output and errors"])
def test_a_process_without_an_output(folder: Path, both: bool) -> None:
    """At its end Python flushes once more, and what fails then must not change the exit code."""
    with FULL.open("w") as output:
        done = subprocess.run(
            [sys.executable, "-m", "strongroom", "evidence", "--nonce", "00", "--json"],
            stdout=output,
            stderr=output if both else subprocess.PIPE,
            check=False,
        )
    assert done.returncode == 4
    assert both or done.stderr == b"strongroom: the output cannot be written: No space left on device\n"


def test_a_closed_output_is_none() -> None:
    done = subprocess.run(["sh", "-c", f"exec {sys.executable} -m strongroom ps --json >&-"], check=False)
    assert done.returncode == 0
