"""The README's section "As a library", run as it stands there."""

from __future__ import annotations

import ast
import asyncio
from pathlib import Path

import pytest

import attestation
from tests.house import house
from tests.packaging.readme import FETCHING, VERIFYING
from tests.pki import forge

DEFAULT_URL = "http://127.0.0.1:8080"


@pytest.fixture(autouse=True)
def in_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def test_five_lines_are_a_verdict(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "policy.toml").write_text(forge.POLICY)
    (tmp_path / "root.der").write_bytes(forge.ROOT_DER)
    assert len(ast.parse(VERIFYING).body) == 5
    lines = VERIFYING.replace("datetime.now(UTC)", f"datetime.fromisoformat({forge.NOW.isoformat()!r})")
    exec(compile(lines, "README.md", "exec"), {"evidence": forge.evidence(), "nonce": forge.NONCE})
    assert capsys.readouterr().out == "one i-0123456789abcdef0-enc0123456789abcdef\n"


async def test_a_session_fetches_and_verifies(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    async with house(tmp_path) as home:
        home.behind.write_policy()
        assert DEFAULT_URL in FETCHING
        program = compile(FETCHING.replace(DEFAULT_URL, home.url), "README.md", "exec")
        await asyncio.to_thread(exec, program, {})
    assert capsys.readouterr().out == "test EMULATED\n"


def test_the_packages_own_words_are_the_readmes() -> None:
    assert attestation.__doc__ is not None
    said = [line.strip() for line in attestation.__doc__.splitlines()]
    assert [line for line in VERIFYING.splitlines() if line not in said] == []
