"""What a user gets, and what bad input gets: the commands over real processes and the real model."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from tests.end_to_end.conftest import Home, Running, descendants, end, eventually, home_folder

pytestmark = [pytest.mark.processes, pytest.mark.model]


def failed_codes(report: dict[str, object]) -> list[str]:
    checks = report["checks"]
    assert isinstance(checks, list)
    return [check["code"] for check in checks if check["status"] == "failed"]


def changed_policy(running: Running, old: str, new: str) -> Path:
    """The running enclave's policy with one text replaced, beside it."""
    text = running.policy.read_text()
    assert old in text
    path = running.files / "changed-policy.toml"
    path.write_text(text.replace(old, new))
    return path


# --- The good way -------------------------------------------------------------------------------------------------


def test_an_enclave_is_verified(running: Running) -> None:
    report = running.home.json("verify", *running.session)
    assert report["verdict"] == "accepted"
    assert report["labels"] == ["EMULATED"]
    assert {check["step"] for check in report["checks"]} == set(range(1, 16))
    shown = running.home.run("verify", *running.session).stdout
    assert "ACCEPTED" in shown
    assert "EMULATED" in shown


def test_a_question_is_answered(running: Running) -> None:
    answer = running.home.json("ask", "Why is the sky blue?", *running.session, "--max-tokens", "24")
    assert "sky" in answer["text"].lower()
    assert answer["usage"]["completion_tokens"] <= 24
    asked = running.home.run("ask", "-", *running.session, "--max-tokens", "4", stdin="Say hello.")
    assert asked.stdout.strip()
    assert "EMULATED" in asked.stderr


def test_the_same_seed_gives_the_same_answer(running: Running) -> None:
    sampled = ("--temperature", "1", "--seed", "7", "--max-tokens", "12")
    first, second = (running.home.json("ask", "Tell me a story.", *running.session, *sampled)["text"] for _ in range(2))
    assert first == second


def test_ps_and_logs_say_nothing_of_prompts(running: Running) -> None:
    running.home.run("ask", "The word is xylophone-77.", *running.session, "--max-tokens", "2")
    state = running.home.state("main")
    assert state["phase"] == "SERVING"
    assert "xylophone" not in json.dumps(state)
    lines = running.home.run("logs", "main").stdout.splitlines()
    assert {json.loads(line)["event"] for line in lines} >= {"phase", "weights", "engine_started", "key_offered"}
    assert "xylophone" not in "".join(lines)


def test_the_engine_is_confined(running: Running) -> None:
    """Invariant 7, as the system sees it."""
    worker = running.process("enclave.worker")
    status = dict(
        line.split(":\t", 1) for line in Path(f"/proc/{worker}/status").read_text().splitlines() if ":\t" in line
    )
    if os.geteuid() == 0:
        assert "0" not in status["Uid"].split()
        assert status["Groups"].strip() == ""
    assert status["Seccomp"] == "2"
    assert status["NoNewPrivs"] == "1"
    assert status["CapEff"] == "0" * 16
    links = {os.readlink(entry) for entry in Path(f"/proc/{worker}/fd").iterdir()}
    assert {link for link in links if not link.startswith(("socket:", "/dev/null", "/memfd:"))} == set()
    limits = Path(f"/proc/{worker}/limits").read_text()
    assert [line.split()[4] for line in limits.splitlines() if line.startswith("Max core file size")] == ["0"]


@pytest.mark.skipif(os.geteuid() != 0, reason="only root may make a network namespace everywhere")
def test_an_enclave_has_no_network(running: Running) -> None:
    server = running.process("enclave")
    devices = Path(f"/proc/{server}/net/dev").read_text().splitlines()[2:]
    assert [line.split(":")[0].strip() for line in devices] == ["lo"]
    assert running.home.state("main")["network"] == "none"


# --- The verdict --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("register", "code"), [("pcr0", "wrong_image"), ("pcr1", "wrong_image"), ("pcr2", "wrong_image")]
)
def test_a_wrong_pcr_is_refused(running: Running, register: str, code: str) -> None:
    value = tomllib.loads(running.policy.read_text())["release"][0][register]
    policy = changed_policy(running, value, value[:-1] + ("0" if value[-1] != "0" else "1"))
    report = running.home.json("verify", "--url", running.url, "--policy", str(policy), expect=1)
    assert report["verdict"] == "refused"
    assert failed_codes(report) == [code]
    refused = running.home.run("ask", "secret", "--url", running.url, "--policy", str(policy), expect=1)
    assert refused.stdout == ""


@pytest.mark.parametrize(("section", "code"), [("model", "wrong_model"), ("configuration", "wrong_configuration")])
def test_another_model_or_configuration_is_refused(running: Running, section: str, code: str) -> None:
    value = tomllib.loads(running.policy.read_text())[section]["require"][0]
    policy = changed_policy(running, value, "sha384:" + "ab" * 48)
    assert failed_codes(running.home.json("verify", "--url", running.url, "--policy", str(policy), expect=1)) == [code]


def test_several_failures_are_all_listed(running: Running) -> None:
    document = tomllib.loads(running.policy.read_text())
    text = running.policy.read_text().replace(document["release"][0]["pcr2"], "cd" * 48)
    text = text.replace(document["model"]["require"][0], "sha384:" + "ab" * 48)
    policy = running.files / "changed-policy.toml"
    policy.write_text(text)
    report = running.home.json("verify", "--url", running.url, "--policy", str(policy), expect=1)
    assert failed_codes(report) == ["wrong_image", "wrong_model"]


def test_another_anchor_is_refused(running: Running) -> None:
    """Another user's emulator: its root is not this one's."""
    with home_folder() as folder:
        other = Home(folder)
        other.run("init", "--directory", str(folder / "files"))
        done = running.home.run(
            "verify", "--url", running.url, "--policy", str(folder / "files" / "policy.toml"), expect=3
        )
    assert "untrusted_chain" in done.stdout


def test_aws_is_not_the_emulator(running: Running) -> None:
    text = running.policy.read_text()
    anchor = text[text.index("[anchor]") : text.index("# Documents are signed")]
    policy = running.files / "aws-policy.toml"
    policy.write_text(text.replace(anchor, '[anchor]\ntrust = "AWS-NITRO-G1"\n\n'))
    assert (
        "untrusted_chain" in running.home.run("verify", "--url", running.url, "--policy", str(policy), expect=3).stdout
    )


@pytest.mark.parametrize(
    ("old", "new", "names"),
    [
        ("version = 1", "version = 1\nshout = true", "shout"),
        ("leeway_seconds = 120", "# leeway", "leeway_seconds"),
        ("[debug]\n", '[debug]\naccept = "why not"\n', "debug"),
    ],
    ids=["unknown", "missing", "contradictory"],
)
def test_a_bad_policy_is_a_usage_error(running: Running, old: str, new: str, names: str) -> None:
    policy = changed_policy(running, old, new)
    for command in (["verify"], ["ask", "hello"]):
        done = running.home.run(*command, "--url", running.url, "--policy", str(policy), expect=2)
        assert names in done.stderr


# --- What is not there --------------------------------------------------------------------------------------------


def test_nobody_at_the_address(running: Running) -> None:
    for command in (["verify"], ["ask", "hello"], ["serve", "--listen", "127.0.0.1:0"]):
        done = running.home.run(*command, "--url", "http://127.0.0.1:9", "--policy", str(running.policy), expect=4)
        assert "127.0.0.1:9" in done.stderr


def test_a_proxy_in_front_of_nothing(running: Running) -> None:
    process, url = running.home.proxy("unix:/nonexistent/rpc.sock")
    done = running.home.run("verify", "--url", url, "--policy", str(running.policy), expect=4)
    assert "no enclave" in done.stderr
    assert end(process)[0] == 0


def test_a_prompt_longer_than_the_context(running: Running) -> None:
    done = running.home.run("ask", "-", *running.session, stdin="many words " * 600, expect=2)
    assert "context_exceeded" in done.stderr
    assert "expected" in done.stderr


def test_a_name_twice(running: Running, model: Path) -> None:
    done = running.home.run(
        "start", "--config", str(running.files / "enclave.toml"), "--model", str(model), "--name", "main", expect=2
    )
    assert "already_running" in done.stderr
    running.home.run("verify", *running.session)


def test_a_model_that_is_not_the_pinned_one(running: Running, model: Path, tmp_path: Path) -> None:
    other = tmp_path / model.name
    data = bytearray(model.read_bytes())
    data[-1] ^= 1
    other.write_bytes(data)
    done = running.home.run(
        "start", "--config", str(running.files / "enclave.toml"), "--model", str(other), "--name", "other", expect=2
    )
    assert "expected sha384:" in done.stderr
    assert "got sha384:" in done.stderr
    said = running.home.json(
        "start", "--config", str(running.files / "enclave.toml"), "--model", str(other), "--name", "other", expect=2
    )
    assert said["error"]["code"] == "bad_configuration"


@pytest.mark.parametrize("content", [b"", b"GGUF", b"not a model", b"GGUF\x03\x00\x00\x00" + b"\xff" * 16])
def test_a_broken_gguf(home: Home, tmp_path: Path, content: bytes) -> None:
    (tmp_path / "broken.gguf").write_bytes(content)
    done = home.run("run", str(tmp_path / "broken.gguf"), "--prompt", "hello", expect=2)
    assert "broken.gguf" in done.stderr or "GGUF" in done.stderr


# --- What was measured is what runs -------------------------------------------------------------------------------


def test_a_changed_configuration_is_refused(running: Running, model: Path) -> None:
    changed = running.files / "changed-enclave.toml"
    changed.write_text((running.files / "enclave.toml").read_text().replace("tick_ms = 10", "tick_ms = 0"))
    home = running.home
    home.run("start", "--config", str(changed), "--model", str(model), "--name", "changed")
    process, url = home.proxy("changed")
    report = home.json("verify", "--url", url, "--policy", str(running.policy), expect=1)
    assert failed_codes(report) == ["wrong_image", "wrong_configuration"]
    assert end(process)[0] == 0
    home.run("stop", "changed")
    home.run("logs", "changed", expect=2)


def test_a_changed_file_of_the_enclave_is_refused(model: Path, tmp_path: Path) -> None:
    """A copy of the code in an interpreter of its own; one comment is added to one file, and the policy made before
    refuses it.
    """
    root = Path(__file__).parents[2]
    code = tmp_path / "code"
    for room in ("attestation", "vsockrpc", "enclave", "parent", "strongroom", "emulator"):
        shutil.copytree(root / room, code / room, ignore=shutil.ignore_patterns("__pycache__"))
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(tmp_path / "venv")], check=True)
    [packages] = (tmp_path / "venv").glob("lib/python*/site-packages")
    ours = [path for path in sys.path if path.endswith("site-packages")]
    (packages / "code.pth").write_text("\n".join([str(code), *ours]) + "\n")
    with home_folder() as folder:
        home = Home(folder, python=str(tmp_path / "venv" / "bin" / "python"))
        try:
            files = folder / "files"
            home.run("init", "--directory", str(files), "--context", "128", "--threads", "2")
            with (code / "enclave" / "log.py").open("a") as file:
                file.write("# one comment\n")
            home.run("start", "--config", str(files / "enclave.toml"), "--model", str(model), "--name", "copy")
            _, url = home.proxy("copy")
            report = home.json("verify", "--url", url, "--policy", str(files / "policy.toml"), expect=1)
            assert failed_codes(report) == ["wrong_image"]
            document = tomllib.loads((files / "policy.toml").read_text())
            measured = home.state("copy")["pcrs"]
            assert measured["1"] == document["release"][0]["pcr1"]
            assert measured["2"] != document["release"][0]["pcr2"]
        finally:
            home.close()


# --- All in one ---------------------------------------------------------------------------------------------------


def left_behind(folder: Path) -> list[str]:
    return [command for command in descendants(1).values() if str(folder) in command]


def test_run_answers_and_leaves_nothing(model: Path) -> None:
    with home_folder() as folder:
        home = Home(folder)
        run = ("run", str(model), "--prompt", "Why is the sky blue?", "--max-tokens", "16", "--threads", "2")
        assert home.json(*run)["model"].startswith("sha384:")
        done = home.run(*run)
        assert "sky" in done.stdout.lower()
        assert "ACCEPTED" in done.stdout
        assert "tokens/s" in done.stdout
        assert "SERVING" in done.stderr
        assert home.json("ps") == []
        assert left_behind(folder) == []
        assert list((folder / "tmp").iterdir()) == []


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_run_interrupted_leaves_nothing(model: Path, number: signal.Signals) -> None:
    """Ctrl-C, a polite end and a rude one, each while the enclave boots."""
    with home_folder() as folder:
        home = Home(folder)
        process = home.spawn("run", str(model), "--prompt", "hello", "--threads", "2")
        assert process.stderr is not None
        while "CONFIGURED" not in process.stderr.readline():
            assert process.poll() is None
        code, _, err = end(process, number)
        assert "Traceback" not in err
        assert code == {signal.SIGINT: 130, signal.SIGTERM: 143, signal.SIGKILL: -9}[number]
        eventually(lambda: left_behind(folder) == [], "everything ends")
        if number != signal.SIGKILL:
            assert list((folder / "tmp").iterdir()) == []
            assert home.json("ps") == []


@pytest.mark.parametrize(("number", "expected"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_start_interrupted_leaves_nothing(model: Path, number: signal.Signals, expected: int) -> None:
    with home_folder() as folder:
        home = Home(folder)
        home.run("init", "--directory", str(folder / "files"), "--model", str(model))
        process = home.spawn("start", "--config", str(folder / "files" / "enclave.toml"), "--model", str(model))
        assert process.stderr is not None
        while "CONFIGURED" not in process.stderr.readline():
            assert process.poll() is None
        code, _, err = end(process, number)
        assert code == expected
        assert "Traceback" not in err
        eventually(lambda: left_behind(folder) == [], "everything ends")


@pytest.mark.skipif(os.geteuid() != 0, reason="only root may mount a small file system")
def test_a_full_disk(model: Path) -> None:
    with home_folder() as folder:
        files = folder / "files"
        home = Home(folder)
        home.run("init", "--directory", str(files), "--model", str(model))
        (folder / "run").mkdir()
        subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4k", "tmpfs", str(folder / "run")], check=True)
        try:
            filler = folder / "run" / "filler"
            with filler.open("wb") as file:
                file.write(bytes(4096))
            done = home.run(
                "start", "--config", str(files / "enclave.toml"), "--model", str(model), "--name", "full", expect=4
            )
            assert "No space left" in done.stderr
        finally:
            subprocess.run(["umount", str(folder / "run")], check=True)
