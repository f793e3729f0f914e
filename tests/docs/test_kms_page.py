"""docs/kms.md, run as it stands: what ``make demo-kms`` shows is what the page says."""

from __future__ import annotations

import os
import re
import subprocess
import tempfile
from pathlib import Path

import pytest

from enclave.config import EnclaveConfiguration
from vsockrpc.address import VsockAddress

REPOSITORY = Path(__file__).resolve().parents[2]
SECONDS = 240


@pytest.mark.processes
def test_every_command_of_the_page_does_what_it_says() -> None:
    with tempfile.TemporaryDirectory(prefix="page-") as folder:  # a short name: sockets stand in it
        _run(Path(folder))


def _run(folder: Path) -> None:
    environment = {**os.environ, "TMPDIR": str(folder)}
    ran = subprocess.run(
        [REPOSITORY / "scripts" / "demo-kms"],
        env=environment,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=SECONDS,
        check=False,
    )
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
