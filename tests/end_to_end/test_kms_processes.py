"""A house with KMS, of real processes and with the real model: from no key to an answer, and then without KMS."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from tests.canaries import memory_of, where
from tests.end_to_end.conftest import CONTEXT, Home, end, eventually, home_folder, process_of
from tests.key_policies import ACCOUNT

pytestmark = [pytest.mark.processes, pytest.mark.model]

ROLES = f"arn:aws:iam::{ACCOUNT}:role"
CANARY = "Kanarienvogel-0d6e2b19-wartet-im-Briefumschlag"
PIECE = 48
"""Bytes of the weights that are searched for: by chance they are nowhere else."""


@dataclass
class KmsHome(Home):
    """A home from which KMS is asked, as one of its roles."""

    aws: dict[str, str] = field(default_factory=dict)

    @property
    def environment(self) -> dict[str, str]:
        ours = {name: value for name, value in super().environment.items() if not name.startswith("AWS_")}
        return ours | self.aws

    def become(self, profile: str) -> None:
        self.aws["AWS_PROFILE"] = profile


def halts(home: KmsHome) -> list[str]:
    """Why boots have halted, by code."""
    events = [json.loads(line) for line in home.run("logs", "main").stdout.splitlines()]
    return [event["code"] for event in events if event["event"] == "halted"]


@pytest.fixture
def home() -> Iterator[KmsHome]:
    with home_folder() as folder:
        home = KmsHome(folder)
        try:
            yield home
        finally:
            home.close()


def test_from_no_key_to_an_answer_and_then_without_kms(home: KmsHome, model: Path) -> None:
    emulator, said = home.ready("emulate", "kms")
    home.aws = dict(said["environment"])
    endpoint = said["endpoint"].removeprefix("https://")
    files = home.folder / "files"
    policy = ("--policy", str(files / "policy.toml"))

    home.become("administrator")
    who = ("--administrator", f"{ROLES}/administrator", "--sealer", f"{ROLES}/sealer")
    keys = {
        use: home.run("kms", "key", "create", "--closed", "--use", use, "--context", "tests", *who).stdout.strip()
        for use in ("model", "prompt")
    }
    home.run(
        *("init", "--directory", str(files), "--model", str(model), "--context", str(CONTEXT), "--threads", "2"),
        *("--tick-ms", "10", "--kms-context", "tests", "--kms-administrator", f"{ROLES}/administrator"),
        *("--kms-model-key", keys["model"], "--kms-prompts-key", keys["prompt"]),
        *("--kms-endpoint", endpoint, "--kms-root", said["root"]),
    )
    for key in keys.values():
        home.run("kms", "key", "rotate-image", key, *policy, "--user", f"{ROLES}/enclave")

    home.become("sealer")
    sealed_model = files / "model.sealed"
    home.run("model", "encrypt", str(model), *policy, "--out", str(sealed_model))

    home.become("enclave")
    home.run("start", "--config", str(files / "enclave.toml"), "--model", str(sealed_model), "--name", "main")
    proxy, url = home.proxy("main")
    supervisor = int(home.state("main")["pid"])

    home.become("sealer")
    session = ("--url", url, *policy)
    verified = home.json("verify", *session)
    assert {16, 17, 18, 19, 20, 21} <= {check["step"] for check in verified["checks"]}
    assert home.json("ask", "Say hello.", *session, "--max-tokens", "4")["text"]

    question, answer = files / "question.sealed", files / "answer.sealed"
    reply = files / "question.sealed.reply"
    home.run("prompt", "seal", f"Repeat after me: {CANARY} {CANARY}", *policy, "--out", str(question))
    home.run("prompt", "submit", str(question), "--url", url, "--out", str(answer))
    text = home.json("prompt", "open", str(answer), "--reply", str(reply))["text"].strip()
    assert len(text) >= 20, "an answer of some words is needed as the second canary"

    # The supervisor has the store and the egress in it, and every byte of both has passed it.
    texts = [CANARY, text[:20], text[-20:]]
    held = {"memory": memory_of(supervisor), "question": question.read_bytes(), "answer": answer.read_bytes()}
    held["logs"] = home.run("logs", "main").stdout.encode()
    weights = model.read_bytes()
    pieces = [weights[at : at + PIECE] for at in range(len(weights) // 4, len(weights), len(weights) // 4 + 1)]
    assert all(len(set(piece)) > 10 for piece in pieces)
    assert len(held["memory"]) > 1 << 20
    for what, haystack in held.items():
        assert where(texts, haystack) == [], what
        assert not any(piece in haystack for piece in pieces), what
    assert not any(piece in sealed_model.read_bytes() for piece in pieces)

    # Without KMS what serves goes on serving; nothing that waits is opened, and nothing boots.
    emulator.kill()
    emulator.communicate()
    gone = home.run("prompt", "submit", str(question), "--url", url, "--out", str(files / "again"), expect=4)
    assert "reaches no KMS" in gone.stderr
    assert not (files / "again").exists()
    refused = home.json("verify", *session, expect=4)
    assert refused["error"]["code"] == "kms_unavailable"
    assert home.state("main")["phase"] == "SERVING"
    os.kill(process_of(supervisor, "enclave"), signal.SIGKILL)
    eventually(lambda: halts(home) != [], "a boot that halts without KMS")
    assert halts(home)[0].startswith("kms_"), halts(home)  # unreachable, unless somebody else has taken the port
    home.run("stop", "main")
    assert end(proxy)[0] == 0
