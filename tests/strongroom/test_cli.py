"""The front door: help, exit codes, errors as text and as JSON, and never a traceback.

Commands run in this process where they can. The house that they ask runs in a thread of its own.
"""

from __future__ import annotations

import errno
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx2
import pytest
from rich.console import Console

from attestation.chain import Anchor
from attestation.policy import AppraisalPolicy
from attestation.policy_writer import write_policy as policy_text
from attestation.rules import Require
from parent import commands as parent_commands
from parent.registry import Registry, State
from strongroom import cli, conversation, prepare
from strongroom.cli import COMMANDS
from tests.attested import write_policy
from tests.gguf_files import TEXT, Gguf
from tests.pki import forge
from tests.terminal import Ran, Street, Terminal
from vsockrpc.messages import Delta, Done, Usage

MODEL = Gguf([("tokenizer.chat_template", TEXT, "{{ messages }}")]).encode()


# --- Help ----------------------------------------------------------------------------------------------------------


def test_the_group_names_every_command_and_exit_code(strongroom: Terminal) -> None:
    ran = strongroom("--help")
    assert ran.code == 0
    for name in COMMANDS:
        assert f"\n  {name} " in ran.out
    assert "Exit codes: 0 ok, 1 verdict negative, 2 usage, 3 malformed or untrusted" in " ".join(ran.out.split())
    assert "STRONGROOM_HOME" in ran.out


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_has_an_example_that_is_a_command(strongroom: Terminal, name: str) -> None:
    ran = strongroom(name, "--help")
    assert ran.code == 0
    assert f"Usage: strongroom {name} " in ran.out
    _, _, examples = ran.out.replace("\n  Examples:\n", "\n  Example:\n").partition("\n  Example:\n")
    lines = examples.partition("\n\n")[0].splitlines()
    assert any(f"strongroom {name}" in line for line in lines)
    for line in lines:
        words = line.split()
        if "strongroom" in words:
            assert words[words.index("strongroom") + 1] in COMMANDS
    assert ran.out == strongroom(name, "-h").out


def test_the_version(strongroom: Terminal) -> None:
    ran = strongroom("--version")
    assert (ran.code, ran.out.split()[0]) == (0, "strongroom,")


def test_without_a_command_the_help_is_shown(strongroom: Terminal) -> None:
    ran = strongroom()
    assert ran.code == 2
    assert "Commands:" in ran.out + ran.err


def imported_by(statement: str) -> set[str]:
    command = f"import sys\n{statement}\nprint(*{{name.partition('.')[0] for name in sys.modules}})"
    done = subprocess.run([sys.executable, "-c", command], capture_output=True, text=True, check=True)
    return set(done.stdout.split())


def test_the_front_door_imports_no_room() -> None:
    names = imported_by("import strongroom.cli")
    assert not names & {"parent", "enclave", "emulator", "vsockrpc", "rich", "httpx2", "uvicorn", "cryptography"}


def test_a_client_imports_neither_the_parent_nor_an_enclave() -> None:
    names = imported_by("import strongroom.conversation, strongroom.serving")
    assert not names & {"parent", "enclave", "llama_cpp"}


def test_an_operators_command_imports_no_enclave() -> None:
    assert not imported_by("import parent.commands") & {"strongroom", "enclave", "emulator", "llama_cpp"}


# --- Exit code 0 ---------------------------------------------------------------------------------------------------


def test_verify(strongroom: Terminal, street: Street) -> None:
    ran = strongroom("verify", *street.options)
    assert (ran.code, ran.err) == (0, "")
    assert "ACCEPTED  EMULATED  release test" in ran.out
    assert "EMULATED: no hardware vouches" in ran.out
    assert all(len(line) <= 120 for line in ran.out.splitlines())
    assert "…" not in strongroom("verify", *street.options, "--full").out


def test_verify_for_a_program(strongroom: Terminal, street: Street) -> None:
    ran = strongroom("verify", *street.options, "--json")
    assert (ran.code, ran.err) == (0, "")
    assert ran.json["verdict"] == "accepted"
    assert ran.json["labels"] == ["EMULATED"]
    assert {check["step"] for check in ran.json["checks"]} == set(range(1, 16))


def test_ask(strongroom: Terminal, street: Street) -> None:
    ran = strongroom("ask", "hello there", *street.options)
    assert (ran.code, ran.out) == (0, "hello there\n")
    assert ran.err.startswith("EMULATED: ")


def test_ask_for_a_program(strongroom: Terminal, street: Street) -> None:
    ran = strongroom("ask", "hello there", *street.options, "--json", "--seed", "1", "--temperature", "0.5")
    assert ran.code == 0
    assert (ran.json["text"], ran.json["finish_reason"], ran.json["labels"]) == ("hello there", "stop", ["EMULATED"])
    assert ran.json["reasoning"] == ""
    assert set(ran.json["usage"]) == {"prompt_tokens", "completion_tokens", "cached_tokens", "reasoning_tokens"}


def test_reasoning_is_no_part_of_an_answer(
    strongroom: Terminal, street: Street, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Which a pipe or a file gets. A program is told both."""
    answer = [Delta(reasoning="let me "), Delta(reasoning="see"), Delta("so it is"), Done("stop", Usage(5, 5))]
    monkeypatch.setattr(street.home.engine, "script", answer)
    assert strongroom("ask", "well?", *street.options).out == "so it is\n"
    ran = strongroom("ask", "well?", *street.options, "--json")
    assert (ran.json["text"], ran.json["reasoning"]) == ("so it is", "let me see")


def test_nothing_of_a_single_question_is_kept(strongroom: Terminal, street: Street) -> None:
    assert strongroom("ask", "hello there", *street.options).code == 0
    assert street.home.engine.requests[-1].cache_secret is None


def test_ask_reads_standard_input(strongroom: Terminal, street: Street) -> None:
    ran = strongroom("ask", "-", *street.options, stdin="aus dem Rohr: é\n".encode())
    assert (ran.code, ran.out) == (0, "aus dem Rohr: é\n\n")


def test_the_environment_names_the_policy_and_the_proxy(
    monkeypatch: pytest.MonkeyPatch, strongroom: Terminal, street: Street
) -> None:
    monkeypatch.setenv("STRONGROOM_URL", street.url)
    monkeypatch.setenv("STRONGROOM_POLICY", street.policy_file)
    assert strongroom("ask", "hello").out == "hello\n"


def test_chat_without_a_terminal_answers_each_line(strongroom: Terminal, street: Street) -> None:
    ran = strongroom("chat", *street.options, stdin=b"one\n\n  \ntwo\n")
    assert ran.code == 0
    assert ran.out.splitlines()[-3:] == ["one", "two", ""]
    assert "EMULATED: no hardware vouches" in ran.out


def test_chat_goes_on_after_a_turn_that_failed(strongroom: Terminal, street: Street) -> None:
    ran = strongroom("chat", *street.options, stdin=b"too long " * 60 + b"\nshort\n")
    assert ran.code == 0
    assert "[context_exceeded]" in ran.err
    assert ran.out.splitlines()[-2:] == ["short", ""]


# --- Exit code 1 ---------------------------------------------------------------------------------------------------


@pytest.fixture
def other_model(street: Street, tmp_path: Path) -> tuple[str, ...]:
    policy = write_policy(replace(street.policy, model=Require((b"\xdd" * 48,))), tmp_path)
    return ("--url", street.url, "--policy", str(policy))


def test_a_negative_verdict(strongroom: Terminal, other_model: tuple[str, ...]) -> None:
    ran = strongroom("verify", *other_model)
    assert ran.code == 1
    assert "REFUSED  EMULATED  the policy refuses this enclave: model [wrong_model]" in ran.out
    assert "  expected  sha384:" + "dd" * 48 in ran.out


def test_a_negative_verdict_for_a_program(strongroom: Terminal, other_model: tuple[str, ...]) -> None:
    ran = strongroom("verify", *other_model, "--json")
    assert (ran.code, ran.err) == (1, "")
    assert (ran.json["verdict"], ran.json["error"]["code"]) == ("refused", "wrong_model")
    [failed] = [check for check in ran.json["checks"] if check["status"] == "failed"]
    assert failed["expected"] == "sha384:" + "dd" * 48


@pytest.mark.parametrize("command", [("ask", "hello"), ("chat",), ("serve", "--listen", "127.0.0.1:0")])
def test_nothing_begins_on_a_negative_verdict(
    strongroom: Terminal, other_model: tuple[str, ...], command: tuple[str, ...]
) -> None:
    ran = strongroom(*command, *other_model, stdin=b"hello\n")
    assert (ran.code, ran.out) == (1, "")
    assert "[wrong_model]; expected sha384:dddd" in ran.err


# --- Exit code 2 ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("nonsense",), "nonsense"),
        (("inspekt",), "inspect"),
        (("verify", "--nonsense"), "--nonsense"),
        (("ask",), "PROMPT"),
        (("ask", "x", "--seed", "-1"), "--seed"),
        (("ask", "x", "--temperature", "3"), "--temperature"),
        (("ask", "x", "--max-tokens", "0"), "--max-tokens"),
        (("init", "--model", "/nowhere/model.gguf"), "/nowhere/model.gguf"),
        (("init", "--context", "1"), "--context"),
        (("start", "--config", "/nowhere.toml", "--model", "x"), "/nowhere.toml"),
        (("start", "--launcher", "magic"), "--launcher"),
        (("run", "/nowhere/model.gguf"), "/nowhere/model.gguf"),
        (("stop", "nobody"), "no enclave named nobody"),
        (("logs", "nobody"), "no enclave named nobody"),
        (("logs", "../../etc"), "no enclave named"),
        (("proxy", "--enclave", "nobody"), "no enclave named nobody"),
        (("proxy", "--enclave", "tcp:nowhere"), "--enclave"),
        (("proxy", "--enclave", "vsock:x:1"), "--enclave"),
        (("proxy", "--enclave", "unix:/x", "--listen", "8080"), "HOST:PORT"),
        (("proxy", "--enclave", "unix:/x", "--listen", "127.0.0.1:99999"), "99999"),
        (("serve", "--listen", "nonsense"), "HOST:PORT"),
        (("serve", "--listen", "0.0.0.0:0"), "--token-file"),
        (("serve", "--listen", "[::]:0"), "--token-file"),
        (("serve", "--listen", "192.0.2.1:0"), "--token-file"),
        (("serve", "--token-file", "/nowhere"), "/nowhere"),
        (("verify", "--policy", "/nowhere/policy.toml"), "/nowhere/policy.toml"),
        (("verify", "--policy", "/"), "--policy"),
    ],
)
def test_what_cannot_be_meant(strongroom: Terminal, arguments: tuple[str, ...], words: str) -> None:
    ran = strongroom(*arguments)
    assert (ran.code, ran.out) == (2, "")
    assert words in ran.err
    as_json = strongroom(*arguments, "--json")
    assert as_json.code == 2
    assert set(as_json.json["error"]) >= {"code", "message", "expected", "got"}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda text: text + "\nunheard_of = 1\n", "unheard_of"),
        (lambda text: text.replace("max_age_seconds", "max_age_second"), "max_age_second"),
        (lambda text: text.replace("[model]", "[model]\nignore = 'both'"), "model"),
        (lambda text: "", "version"),
        (lambda text: "version = ", "TOML"),
        (lambda text: "\x00", "TOML"),
    ],
    ids=["unknown", "misspelt", "contradictory", "empty", "cut off", "binary"],
)
def test_a_policy_that_is_none(strongroom: Terminal, street: Street, tmp_path: Path, change: Any, words: str) -> None:
    path = write_policy(street.policy, tmp_path)
    path.write_text(change(path.read_text()))
    for command in (("verify",), ("ask", "hello"), ("serve", "--listen", "127.0.0.1:0")):
        ran = strongroom(*command, "--url", street.url, "--policy", str(path))
        assert (ran.code, ran.out) == (2, "")
        assert words in ran.err
    assert strongroom("verify", "--url", street.url, "--policy", str(path), "--json").json["error"]["code"]


def test_a_file_that_is_not_there_is_said_in_one_way(strongroom: Terminal, tmp_path: Path) -> None:
    absent, pin = str(tmp_path / "absent"), "ed25519:" + "07" * 32
    for command in (
        ("verify", absent, "--archived", "--policy", absent),
        ("inspect", absent),
        ("policy", "check", absent),
        ("policy", "init", "--from-eif", absent),
        ("policy", "init", "--from-measurements", absent),
        ("release", "check", absent, "--key", pin, "--product", "x"),
        ("release", "refresh", "x", "--key", absent, "--product", "x"),
    ):
        ran = strongroom(*command)
        assert (ran.code, ran.out) == (2, "")
        assert f"strongroom: {absent}: No such file or directory" in ran.err


@pytest.mark.parametrize("url", ["", "nonsense", "ftp://x", "http://[::1", "http://127.0.0.1:x"])
def test_a_url_that_is_none(strongroom: Terminal, street: Street, url: str) -> None:
    ran = strongroom("verify", "--policy", street.policy_file, "--url", url)
    assert (ran.code, ran.out) == (2, "")
    assert "[bad_url]" in ran.err


@pytest.mark.parametrize("prompt", ["\udcff", "x" * ((1 << 20) + 1)], ids=["no UTF-8", "too long"])
def test_a_prompt_that_no_enclave_would_accept(strongroom: Terminal, nobody: str, prompt: str) -> None:
    ran = strongroom("ask", prompt, "--url", nobody)
    assert (ran.code, ran.out) == (2, "")
    assert "[invalid_request]" in ran.err


def test_standard_input_that_is_no_text(strongroom: Terminal, nobody: str) -> None:
    ran = strongroom("ask", "-", "--url", nobody, stdin=b"\xff\xfe")
    assert ran.code == 2
    assert "UTF-8" in ran.err


def test_a_prompt_without_a_place_in_the_context(strongroom: Terminal, street: Street) -> None:
    ran = strongroom("ask", "too long " * 60, *street.options)
    assert (ran.code, ran.out) == (2, "")
    assert "[context_exceeded]; expected" in ran.err
    assert "; got " in ran.err


def test_an_empty_token_file(strongroom: Terminal, street: Street, tmp_path: Path) -> None:
    (tmp_path / "token").write_text("\n")
    ran = strongroom("serve", *street.options, "--token-file", str(tmp_path / "token"))
    assert ran.code == 2
    assert "is empty" in ran.err


def test_no_model_is_installed(monkeypatch: pytest.MonkeyPatch, strongroom: Terminal, tmp_path: Path) -> None:
    monkeypatch.setattr("strongroom.initialise.installed_model", lambda: None)
    ran = strongroom("init", "--directory", str(tmp_path / "demo"))
    assert ran.code == 2
    assert "smollm2" in ran.err
    assert not (tmp_path / "demo").exists()


# --- init ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def model(tmp_path: Path) -> Path:
    path = tmp_path / "tiny.gguf"
    path.write_bytes(MODEL)
    return path


@pytest.fixture
def unmeasured(monkeypatch: pytest.MonkeyPatch, street: Street) -> None:
    """Measuring the disk takes seconds, and is another file's matter."""
    monkeypatch.setattr(prepare, "measure_process_image", lambda *_: street.policy.accepted_releases[0].pcrs)


@pytest.mark.usefixtures("unmeasured")
def test_init(strongroom: Terminal, model: Path, tmp_path: Path) -> None:
    ran = strongroom("init", "--model", str(model), "--directory", str(tmp_path / "demo"), "--json")
    assert ran.code == 0
    assert ran.json["model"] == "tiny"
    assert AppraisalPolicy.load(Path(ran.json["policy"])).model == Require(
        (bytes.fromhex(ran.json["manifest"].removeprefix("sha384:")),)
    )
    assert sorted(path.name for path in (tmp_path / "demo").iterdir()) == sorted(
        [prepare.ENCLAVE_TOML, prepare.POLICY_TOML, prepare.ROOT_DER]
    )


@pytest.mark.usefixtures("unmeasured")
@pytest.mark.parametrize("name", [prepare.ENCLAVE_TOML, prepare.POLICY_TOML, prepare.ROOT_DER])
def test_init_overwrites_nothing(strongroom: Terminal, model: Path, tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_text("mine")
    ran = strongroom("init", "--model", str(model), "--directory", str(tmp_path))
    assert (ran.code, ran.out) == (2, "")
    assert "[file_exists]" in ran.err
    assert (tmp_path / name).read_text() == "mine"
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(["tiny.gguf", name])


@pytest.mark.parametrize(
    ("content", "code"),
    [
        (b"", "not_gguf"),
        (b"not a model", "not_gguf"),
        (MODEL[:30], "truncated_gguf"),
        (MODEL[:4] + b"\x09" + MODEL[5:], "unsupported_gguf"),
        (Gguf().encode(), "no_chat_template"),
    ],
)
@pytest.mark.parametrize("command", ["init", "run"])
def test_a_broken_model(
    monkeypatch: pytest.MonkeyPatch, strongroom: Terminal, tmp_path: Path, command: str, content: bytes, code: str
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    (tmp_path / "broken.gguf").write_bytes(content)
    model = str(tmp_path / "broken.gguf")
    arguments = (model,) if command == "run" else ("--model", model, "--directory", str(tmp_path / "demo"))
    ran = strongroom(command, *arguments)
    assert (ran.code, ran.out) == (2, "")
    assert f"[{code}]" in ran.err
    assert [path.name for path in tmp_path.iterdir()] == ["broken.gguf"]


@pytest.mark.usefixtures("unmeasured")
@pytest.mark.parametrize(
    ("number", "code"), [(errno.EACCES, 2), (errno.EPERM, 2), (errno.ENOTDIR, 2), (errno.ENOSPC, 4), (errno.EROFS, 4)]
)
def test_init_on_a_disk_that_refuses_leaves_nothing(
    monkeypatch: pytest.MonkeyPatch, strongroom: Terminal, model: Path, tmp_path: Path, number: int, code: int
) -> None:
    def refuse(path: Path, *_: object) -> None:
        raise OSError(number, os.strerror(number), str(path))

    monkeypatch.setattr(Path, "write_bytes", refuse)
    ran = strongroom("init", "--model", str(model), "--directory", str(tmp_path / "demo"))
    assert (ran.code, ran.out) == (code, "")
    assert f"strongroom: {tmp_path / 'demo' / prepare.ROOT_DER}: {os.strerror(number)}\n" in ran.err
    assert list((tmp_path / "demo").iterdir()) == []


def test_init_where_a_file_stands(strongroom: Terminal, model: Path) -> None:
    ran = strongroom("init", "--model", str(model), "--directory", str(model / "demo"))
    assert (ran.code, ran.out) == (2, "")


# --- Exit codes 3 and 4 --------------------------------------------------------------------------------------------


def test_evidence_under_another_anchor(strongroom: Terminal, street: Street, tmp_path: Path) -> None:
    policy = replace(street.policy, anchor=Anchor.emulated(forge.ROOT_DER))
    (tmp_path / "root.der").write_bytes(forge.ROOT_DER)
    path = tmp_path / "policy.toml"
    path.write_text(policy_text(policy, root="root.der"))
    options = ("--url", street.url, "--policy", str(path))
    ran = strongroom("verify", *options)
    assert ran.code == 3
    assert "certificate chain [untrusted_chain]" in ran.out
    assert ran.out.count("not reached") == 11
    assert strongroom("verify", *options, "--json").json["error"]["code"] == "untrusted_chain"
    assert strongroom("ask", "hello", *options).code == 3


@pytest.mark.parametrize("command", [("verify",), ("ask", "hello"), ("chat",), ("serve", "--listen", "127.0.0.1:0")])
def test_nobody_at_the_address(strongroom: Terminal, street: Street, nobody: str, command: tuple[str, ...]) -> None:
    options = ("--url", nobody, "--policy", street.policy_file)
    ran = strongroom(*command, *options, stdin=b"hello\n")
    assert (ran.code, ran.out) == (4, "")
    assert f"nobody answers at {nobody}" in ran.err
    if command[0] != "chat":
        assert strongroom(*command, *options, "--json").json["error"]["code"] == "unreachable"


def test_a_port_that_is_taken(strongroom: Terminal) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        ran = strongroom("proxy", "--enclave", "unix:/x", "--listen", f"127.0.0.1:{server.getsockname()[1]}")
    assert (ran.code, ran.out) == (4, "")
    assert "[cannot_listen]" in ran.err


@pytest.mark.parametrize("host", ["a..b", "x" * 70 + ".example"])
def test_a_name_that_cannot_be_listened_on(strongroom: Terminal, host: str) -> None:
    ran = strongroom("proxy", "--enclave", "unix:/x", "--listen", f"{host}:0")
    assert (ran.code, ran.out) == (4, "")
    assert "[cannot_listen]" in ran.err


def test_hostile_text_in_an_error_moves_no_cursor(capsys: pytest.CaptureFixture[str]) -> None:
    cli.report({}, "got \x1b]0;title\x07\x1b[2J", False)
    assert capsys.readouterr().err == "strongroom: got \\x1b]0;title\\x07\\x1b[2J\n"


# --- Exit code 130 -------------------------------------------------------------------------------------------------


def test_an_interrupt(monkeypatch: pytest.MonkeyPatch, strongroom: Terminal, street: Street) -> None:
    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(AppraisalPolicy, "load", interrupted)
    ran = strongroom("ask", "hello", *street.options)
    assert (ran.code, ran.out, ran.err.strip()) == (130, "", "interrupted")


def spawn(*arguments: str) -> subprocess.Popen[str]:
    """The front door as a process. (``readline``, where a test runner has loaded it, exports COLUMNS.)"""
    command = [sys.executable, "-m", "strongroom.cli", *arguments]
    environment = {name: value for name, value in os.environ.items() if name != "COLUMNS"}
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)


@pytest.mark.parametrize("command", [("verify",), ("verify", "--json"), ("ask", "hello")])
def test_a_reader_that_has_gone(street: Street, command: tuple[str, ...]) -> None:
    process = spawn(*command, *street.options)
    assert process.stdout is not None
    assert process.stderr is not None
    process.stdout.close()
    said = process.stderr.read()
    process.stderr.close()
    assert process.wait() == 130
    assert "Traceback" not in said
    assert "Exception ignored" not in said


# --- serve ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_serve_until_a_signal(street: Street, number: signal.Signals) -> None:
    process = spawn("serve", *street.options, "--listen", "127.0.0.1:0", "--json")
    assert process.stdout is not None
    ready = json.loads(process.stdout.readline())
    assert ready["labels"] == ["EMULATED"]
    base = f"http://{ready['listening']}"
    body = {"messages": [{"role": "user", "content": "hello"}]}
    answer = httpx2.post(f"{base}/v1/chat/completions", json=body, trust_env=False).json()
    assert answer["choices"][0]["message"]["content"] == "hello"
    process.send_signal(number)
    out, said = process.communicate()
    assert (process.returncode, out, said) == (0, "", "")


@pytest.mark.parametrize(("options", "keeps"), [((), True), (("--no-prompt-cache",), False)])
def test_serve_has_a_prompt_cache_unless_told_not_to(street: Street, options: tuple[str, ...], keeps: bool) -> None:
    process = spawn("serve", *street.options, "--listen", "127.0.0.1:0", "--json", *options)
    assert process.stdout is not None
    base = f"http://{json.loads(process.stdout.readline())['listening']}"
    body = {"messages": [{"role": "user", "content": "hello"}]}
    assert httpx2.post(f"{base}/v1/chat/completions", json=body, trust_env=False).status_code == 200
    process.terminate()
    process.communicate()
    assert (street.home.engine.requests[-1].cache_secret is not None) is keeps


def test_serve_says_what_it_is_connected_to(street: Street) -> None:
    process = spawn("serve", *street.options, "--listen", "127.0.0.1:0")
    assert process.stderr is not None
    lines = [process.stderr.readline() for _ in range(3)]
    process.terminate()
    process.communicate()
    assert lines[0].startswith("ACCEPTED  EMULATED")
    assert lines[1].startswith("EMULATED: no hardware vouches")
    assert lines[2].startswith("OpenAI endpoint: http://127.0.0.1:")


# --- ps ------------------------------------------------------------------------------------------------------------

STATE = State(
    name="demo",
    launcher="process",
    pid=1,
    phase="FAILED",
    address="unix:/home/somebody/.local/state/strongroom/run/demo/rpc.sock",
    started_at=0.0,
    error={"code": "wrong_model", "message": "the weights are not those of the manifest", "expected": "a", "got": "b"},
)


def test_ps_without_an_enclave(strongroom: Terminal) -> None:
    assert strongroom("ps") == Ran(0, "no enclaves\n", "")
    assert strongroom("ps", "--json").json == []


def test_ps_is_a_line_for_each_and_its_reason_below(strongroom: Terminal) -> None:
    Registry.of_user().create("demo").write_state(STATE)
    Registry.of_user().create("another-with-a-long-name").write_state(
        replace(STATE, name="another-with-a-long-name", phase="STOPPED", error=None)
    )
    head, first, second, reason = strongroom("ps").out.splitlines()
    assert head.split() == ["name", "phase", "since", "boots", "network", "address"]
    assert first.startswith("another-with-a-long-name  STOPPED ")
    assert second.startswith("demo                      FAILED ")
    assert second.endswith(f"  {STATE.address}")
    assert reason == "  the weights are not those of the manifest [wrong_model]; expected a; got b"
    assert strongroom("ps", "--json").json[1]["error"]["code"] == "wrong_model"


def test_logs_of_an_enclave_that_wrote_none(strongroom: Terminal) -> None:
    instance = Registry.of_user().create("demo")
    assert strongroom("logs", "demo") == Ran(0, "", "")
    instance.events.write_text('{"event":"phase"}\n')
    assert strongroom("logs", "demo") == Ran(0, '{"event":"phase"}\n', "")
    assert strongroom("logs", "demo", "--follow") == Ran(0, '{"event":"phase"}\n', "")  # nobody supervises it


def test_stop_forgets_an_enclave_that_died(strongroom: Terminal) -> None:
    instance = Registry.of_user().create("demo")
    instance.write_state(replace(STATE, phase="SERVING", error=None))
    assert strongroom("ps", "--json").json[0]["phase"] == "DIED"
    assert strongroom("stop", "demo", "--json").json == {"stopped": "demo"}
    assert not instance.directory.exists()
    assert strongroom("stop", "demo").code == 2


# --- What reaches a terminal ---------------------------------------------------------------------------------------


def test_an_answer_cannot_drive_the_terminal(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    text = "a\x1b]52;c;cm0gLXJm\x07\x1b[2J\x9b31m\r\x08\x7fb\n\tc é 🙂"
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    conversation.write_now(text)
    assert capsys.readouterr().out == "a]52;c;cm0gLXJm[2J31mb\n\tc é 🙂"
    monkeypatch.setattr(sys.stdout, "isatty", lambda: False)
    conversation.write_now(text)
    assert capsys.readouterr().out == text


def test_consoles_are_plain_where_there_is_no_terminal() -> None:
    assert isinstance(parent_commands.err, Console)
    assert not parent_commands.err.is_terminal
