"""docs/kms.md, run as it stands: what ``make demo-kms`` shows is what the page says."""

from __future__ import annotations

import os
import re
import subprocess
import tempfile
from pathlib import Path

import pytest

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
        "no errors, no warnings; LOCKED",
    ):
        assert words in said, (words, said[-4000:])
    assert "Traceback" not in said
    assert [path.name for path in folder.iterdir()] == [], "nothing is left behind"


def test_every_command_of_the_page_is_shown() -> None:
    """The page's indented lines are the commands, and nothing else is indented so."""
    lines = re.findall(r"^    (.+)$", (REPOSITORY / "docs" / "kms.md").read_text(), re.MULTILINE)
    first = {line.split()[0] for line in lines}
    assert first <= {"mkdir", "strongroom", "until", ".", "export", "kill", "AWS_PROFILE=sealer"} | {
        word for word in first if word.startswith(("--", "ROLES=", "MODEL="))
    }
