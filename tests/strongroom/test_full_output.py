"""Where nothing can be written any more, no command ends with the exit code of a verdict."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import click
import pytest

from attestation.bundle import Bundle
from attestation.envelope import EnvelopeHeader
from strongroom.cli import strongroom as front_door
from strongroom.options import out
from strongroom.release_file import write_key
from tests.gguf_files import tiny_model
from tests.kms_house import ADMINISTRATOR, SEALER, WEIGHTS, HouseDesk, KmsStreet, kms_street
from tests.kms_world import ROLE
from tests.parent.image.independent import bzimage
from tests.pki import forge
from tests.release_files import ED25519, NAME
from tests.sealing import CONTEXT, PROMPT
from tests.terminal import Ran, Street, Terminal

FULL = Path("/dev/full")
pytestmark = pytest.mark.skipif(not FULL.exists(), reason="this system has no /dev/full")

PIN = str(ED25519.public_key)
SIGNING = ("--key", "key.pem", "--product", NAME)
REGISTERS = ("--pcr0", "01" * 48, "--pcr1", "02" * 48, "--pcr2", "03" * 48)
CONFIGURATION = f"""\
[nsm]
address = "device:/dev/nsm"
entropy = "nsm-hwrng"
[model]
manifest = "sha384:{"0a" * 48}"
"""
BUILD = ("--rootfs", "root", "--kernel", "bzImage", "--init", "init", "--cmdline", "quiet", "--cmd", "/bin/true")
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
    ("doctor",): (),
    ("image", "build"): (*BUILD, "--out", "new.eif"),
    ("image", "describe"): ("enclave.eif",),
    ("image", "diff"): ("enclave.eif", "enclave.eif"),
    ("image", "extract"): ("enclave.eif", "--output", "taken-apart"),
    ("image", "measure"): ("enclave.eif",),
    ("image", "policy"): ("enclave.eif", "--output", "made.toml"),
    ("image", "reproduce"): BUILD,
    ("image", "size"): ("--model", "tiny.gguf"),
    ("image", "verify"): ("enclave.eif",),
    ("inspect",): ("bundle.json",),
    ("model", "inspect"): ("tiny.gguf",),
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

BY_KMS: dict[tuple[str, ...], tuple[str, ...]] = {
    ("kms", "key", "create"): (
        *("--closed", "--use", "prompt", "--context", CONTEXT),
        *("--sealer", SEALER, "--administrator", ADMINISTRATOR),
    ),
    ("kms", "key", "lock"): ("KEY", "--policy", "POLICY", "--yes-i-know-it-cannot-be-undone"),
    ("kms", "key", "rotate-image"): ("KEY", "--policy", "POLICY", "--user", f"{ROLE}-2"),
    ("kms", "policy", "check"): (
        *("--document", "bundle.json", "--anchor", "root.der"),
        *("--key", "KEY", "--principal", ROLE),
    ),
    ("kms", "policy", "lint"): ("--key", "KEY", "--policy", "POLICY"),
    ("model", "encrypt"): ("tiny.gguf", "--policy", "POLICY", "--out", "tiny.sealed"),
    ("prompt", "open"): ("a.sealed", "--reply", "q.sealed.reply"),
    ("prompt", "seal"): ("hello", "--policy", "POLICY", "--out", "new.sealed"),
    ("prompt", "submit"): ("q.sealed", "--url", "URL", "--out", "new.sealed"),
}
"""The same for commands that need KMS, or an enclave that has asked it."""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, strongroom: Terminal) -> Path:
    (tmp_path / "root.der").write_bytes(forge.ROOT_DER)
    (tmp_path / "policy.toml").write_text(forge.POLICY)
    bundle = Bundle(forge.evidence(), forge.NONCE, forge.NOW, "http://127.0.0.1:8080")
    (tmp_path / "bundle.json").write_bytes(bundle.encode())
    write_key(tmp_path / "key.pem", ED25519)
    (tmp_path / "tiny.gguf").write_bytes(tiny_model().encode())
    (tmp_path / "root" / "etc" / "strongroom").mkdir(parents=True)
    (tmp_path / "root" / "etc" / "strongroom" / "enclave.toml").write_text(CONFIGURATION)
    (tmp_path / "bzImage").write_bytes(bzimage())
    (tmp_path / "init").write_bytes(b"init")
    monkeypatch.chdir(tmp_path)
    assert strongroom("image", "build", *BUILD, "--out", "enclave.eif").code == 0
    assert strongroom("release", "add", "releases.jsonl", *ADD).code == 0
    return tmp_path


@pytest.fixture
def full(monkeypatch: pytest.MonkeyPatch, strongroom: Terminal) -> Callable[..., Ran]:
    """The front door, with nowhere to write to."""

    def run(*arguments: str) -> Ran:
        with FULL.open("w") as output, monkeypatch.context() as patched:
            patched.setattr(sys, "stdout", output)
            ran = strongroom(*arguments)
        with out.capture():  # what it could not write would come with the next command's
            return ran

    return run


@pytest.fixture(scope="module")
def kms(tmp_path_factory: pytest.TempPathFactory) -> Iterator[KmsStreet]:
    with kms_street(tmp_path_factory.mktemp("kms")) as opened:
        opened.home.behind.write_policy()
        yield opened


@pytest.fixture
def desk(folder: Path, kms: KmsStreet, strongroom: Terminal, monkeypatch: pytest.MonkeyPatch) -> Iterator[HouseDesk]:
    """An administrator's, with a model, and a prompt that was sealed and answered."""
    envelope, reply = kms.home.sealing(PROMPT).prompt("hello")
    (folder / "tiny.gguf").write_bytes(WEIGHTS)
    (folder / "q.sealed").write_bytes(envelope)
    (folder / "q.sealed.reply").write_bytes(reply.encode())
    (folder / "a.sealed").write_bytes(kms.do(kms.home.bring(envelope)))
    yield HouseDesk(kms.home, strongroom, monkeypatch)
    kms.home.open_keys()


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


@pytest.fixture
def by_kms(desk: HouseDesk, kms: KmsStreet, full: Callable[..., Ran]) -> Callable[..., Ran]:
    """A command of BY_KMS, with nowhere to write to."""
    policy = str(kms.home.behind.directory / "policy.toml")
    places = {"URL": kms.url, "POLICY": policy, "KEY": kms.home.keys[PROMPT].text}

    def run(*command: str, options: tuple[str, ...] = ("--json",)) -> Ran:
        desk.become(f"assumed-role/{'administrator' if command[:2] == ('kms', 'key') else 'sealer'}/me")
        return full(*command, *(places.get(each, each) for each in BY_KMS[command]), *options)

    return run


@pytest.mark.parametrize("options", [("--json",), ()], ids=["json", "people"])
@pytest.mark.parametrize("command", BY_KMS, ids=" ".join)
def test_an_answer_about_keys_that_cannot_be_told(
    by_kms: Callable[..., Ran], command: tuple[str, ...], options: tuple[str, ...]
) -> None:
    ran = by_kms(*command, options=options)
    assert ran.code == 4, ran.err
    assert ran.err.splitlines()[-1] == "strongroom: the output cannot be written: No space left on device"


def test_a_key_policy_that_cannot_be_told(folder: Path, full: Callable[..., Ran]) -> None:
    options = ("--use", "model", "--context", CONTEXT, "--user", ROLE, "--policy", "policy.toml")
    ran = full("kms", "policy", "generate", *options)
    assert ran.code == 4
    assert ran.err.splitlines()[-1] == "strongroom: the output cannot be written: No space left on device"


def test_a_key_is_told_before_anything_can_fail(
    by_kms: Callable[..., Ran], desk: HouseDesk, strongroom: Terminal, kms: KmsStreet
) -> None:
    """Who makes it must know of it: it costs money until somebody deletes it."""
    ran = by_kms("kms", "key", "create")
    [made] = [line.removeprefix("made ") for line in ran.err.splitlines() if line.startswith("made ")]
    assert strongroom("kms", "policy", "lint", "--key", made, "--administrator", ADMINISTRATOR).code == 0


@pytest.mark.parametrize("command", [("kms", "key", "lock"), ("kms", "key", "rotate-image")], ids=" ".join)
def test_a_change_is_told_before_anything_can_fail(
    by_kms: Callable[..., Ran], desk: HouseDesk, kms: KmsStreet, command: tuple[str, ...]
) -> None:
    ran = by_kms(*command)
    assert "PutKeyPolicy" in desk.asked
    assert f"KMS has the new policy of {kms.home.keys[PROMPT].text}" in ran.err.splitlines()


@pytest.mark.parametrize("command", [("kms", "key", "lock"), ("kms", "key", "rotate-image")], ids=" ".join)
def test_a_change_that_nobody_could_see_is_none(
    by_kms: Callable[..., Ran], desk: HouseDesk, command: tuple[str, ...]
) -> None:
    assert by_kms(*command, options=()).code == 4
    assert "PutKeyPolicy" not in desk.asked


def test_what_was_sealed_stays(by_kms: Callable[..., Ran]) -> None:
    by_kms("prompt", "seal")
    by_kms("model", "encrypt")
    assert Path("new.sealed.reply").exists()
    assert Path("tiny.sealed.manifest").exists()
    for file in ("new.sealed", "tiny.sealed"):
        EnvelopeHeader.split(Path(file).read_bytes())


def test_every_command_speaks_here_but_those_with_processes_of_their_own() -> None:
    servers = {("run",), ("init",), ("start",), ("stop",), ("serve",), ("proxy",), ("egress",), ("emulate", "kms")}
    servers |= {("model-store",)} | {command for command in COMMANDS if command[0] == "nitro"}
    assert set(COMMANDS) - set(SPEAKING) - set(BY_KMS) == servers


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
