"""The front door as a person uses it, in this process."""

from __future__ import annotations

import io
import json
import signal
import sys
from dataclasses import dataclass
from typing import Any

import pytest

from attestation.policy import AppraisalPolicy
from strongroom import cli
from tests.house import House


@dataclass(frozen=True)
class Ran:
    code: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        return json.loads(self.out)


@dataclass
class Terminal:
    """Runs the front door as a person does."""

    monkeypatch: pytest.MonkeyPatch
    capsys: pytest.CaptureFixture[str]

    def __call__(self, *arguments: str, stdin: bytes = b"") -> Ran:
        self.monkeypatch.setattr(sys, "argv", ["strongroom", *arguments])
        self.monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(stdin), "utf-8"))
        before = signal.getsignal(signal.SIGTERM)
        try:
            with pytest.raises(SystemExit) as caught:
                cli.main()
        finally:
            signal.signal(signal.SIGTERM, before)
        said = self.capsys.readouterr()
        assert "Traceback" not in said.out + said.err
        assert isinstance(caught.value.code, int)
        return Ran(caught.value.code, said.out, said.err)


@dataclass(frozen=True)
class Street:
    """Where a house stands that the whole file asks."""

    home: House
    policy_file: str

    @property
    def url(self) -> str:
        return self.home.url

    @property
    def policy(self) -> AppraisalPolicy:
        return self.home.policy

    @property
    def options(self) -> tuple[str, ...]:
        return ("--url", self.url, "--policy", self.policy_file)


AS_FROM_THE_FRONT_DOOR: dict[str, Any] = {"help_option_names": ["-h", "--help"]}
"""For a runner that calls a command of the program itself: click keeps what the first caller's context says of help."""
