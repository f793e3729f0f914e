"""docs/kms.md, run as it stands: what ``make demo-kms`` shows is what the page says."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from enclave.config import EnclaveConfiguration
from vsockrpc.address import VsockAddress

REPOSITORY = Path(__file__).resolve().parents[2]
SECONDS = 240
STOP_SECONDS = 30
ENDED_WITH_US = ("setpriv", "--pdeathsig", "TERM", "--")
"""Linux asks a program that was started so to end when these tests are killed."""


@pytest.mark.processes
def test_every_command_of_the_page_does_what_it_says() -> None:
    with tempfile.TemporaryDirectory(prefix="page-") as folder:  # a short name: sockets stand in it
        _run(Path(folder))


def _ran(command: Sequence[str | Path], environment: Mapping[str, str]) -> subprocess.CompletedProcess[str]:
    """A script that ends what it started when it is asked to end: so it is, whatever ends these tests."""
    process = subprocess.Popen(
        [*ENDED_WITH_US, *command],
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    with process:
        try:
            out, error = process.communicate(timeout=SECONDS)
        except BaseException:
            os.killpg(process.pid, signal.SIGTERM)  # with what runs in the foreground: bash waits for that
            try:
                process.wait(STOP_SECONDS)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
            raise
    return subprocess.CompletedProcess(command, process.returncode, out, error)


def _run(folder: Path) -> None:
    environment = {**os.environ, "TMPDIR": str(folder)}
    ran = _ran([REPOSITORY / "scripts" / "demo-kms"], environment)
    assert ran.returncode == 0, ran.stderr[-4000:]
    said = ran.stdout + ran.stderr
    for words in (
        "demo serves at unix:",
        "ACCEPTED  EMULATED",
        "key (model) MUTABLE-BY(arn:aws:iam::111122223333:role/administrator)",
        "wrote demo/model.sealed",
        "wrote question.sealed.reply",
        "wrote answer.sealed",
        "allowed by Statement",
        "denied: a model's key for a prompt",
        "wrote next/model.sealed",
        "held against next/policy.toml",
        "no errors, no warnings; LOCKED",
    ):
        assert words in said, (words, said[-4000:])
    assert "Traceback" not in said
    assert [path.name for path in folder.iterdir()] == [], "nothing is left behind"


CLEANING = """#!/usr/bin/env bash
trap 'kill "$(jobs -p)"; wait; echo cleaned >"$1"; exit 143' TERM
sleep 1000 &
echo $! >"$2"
wait
"""
"""In the place of demo-kms: something runs in the background until the script is asked to end."""


@pytest.fixture
def script(tmp_path: Path) -> list[str]:
    """With the pipes that say that it has cleaned, and what it has started."""
    path = tmp_path / "script"
    path.write_text(CLEANING)
    path.chmod(0o755)
    pipes = [str(tmp_path / name) for name in ("cleaned", "started")]
    for pipe in pipes:
        os.mkfifo(pipe)
    return [str(path), *pipes]


def test_an_interruption_ends_what_was_started(script: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    cleaned = os.open(script[1], os.O_RDONLY | os.O_NONBLOCK)
    started: list[int] = []

    class Interrupted(subprocess.Popen[str]):
        def communicate(self, *arguments: Any, **options: Any) -> Any:
            started.append(int(Path(script[2]).read_text()))
            raise KeyboardInterrupt

    monkeypatch.setattr(subprocess, "Popen", Interrupted)
    with pytest.raises(KeyboardInterrupt):
        _ran(script, os.environ)
    assert os.read(cleaned, 100) == b"cleaned\n"
    os.close(cleaned)
    with pytest.raises(ProcessLookupError):
        os.kill(started[0], 0)


def test_a_kill_ends_what_was_started(script: list[str]) -> None:
    tests = ["bash", "-c", '"$@" & wait', "tests", *ENDED_WITH_US, *script]
    with subprocess.Popen(tests, start_new_session=True) as process:
        started = int(Path(script[2]).read_text())
        process.kill()
    assert Path(script[1]).read_text() == "cleaned\n"
    with pytest.raises(ProcessLookupError):
        os.kill(started, 0)


def test_every_command_of_the_page_is_shown() -> None:
    """The page's indented lines are the commands, and nothing else is indented so."""
    lines = re.findall(r"^    (.+)$", (REPOSITORY / "docs" / "kms.md").read_text(), re.MULTILINE)
    first = {line.split()[0] for line in lines}
    assert first <= {"mkdir", "strongroom", "until", ".", "export", "kill", "sed"} | {
        word for word in first if word.startswith(("--", "ROLES=", "MODEL=", "AWS_PROFILE="))
    }


def test_the_configuration_by_hand_is_one_that_an_enclave_takes() -> None:
    page = (REPOSITORY / "docs" / "kms.md").read_text()
    blocks = re.findall(r"^```toml\n(.+?)^```$", page, re.MULTILINE | re.DOTALL)
    assert len(blocks) == 1
    digest = "sha384:" + "11" * 48
    top = f"""
version = 1
[rpc]
listen = "vsock:any:5000"
[nsm]
address = "device:/dev/nsm"
entropy = "nsm-hwrng"
[model]
store = "vsock:3:6000"
manifest = "{digest}"
"""
    kms = EnclaveConfiguration.parse((top + blocks[0]).encode()).kms
    assert kms is not None
    assert kms.egress == VsockAddress(3, 7000)
    assert kms.authority is None
    assert kms.model is not None
    assert kms.prompts is not None
