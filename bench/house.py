"""Enclaves and proxies for benchmarks: the real commands, as processes of their own, and a folder that goes away."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from strongroom.prepare import Settings, installed_model, prepare


@dataclass(frozen=True, slots=True)
class House:
    """A running enclave with its proxy."""

    url: str
    policy: Path


def model_file() -> Path:
    path = installed_model()
    if path is None:
        raise SystemExit("bench: the smollm2 extra is not installed; make setup installs it")
    return path


@contextlib.contextmanager
def house(settings: Settings) -> Iterator[House]:
    """An enclave with the installed model, started and stopped around the block."""
    with tempfile.TemporaryDirectory(prefix="strongroom-bench-") as folder:
        environment = os.environ | {"STRONGROOM_HOME": f"{folder}/home"}
        os.environ["STRONGROOM_HOME"] = environment["STRONGROOM_HOME"]  # the policy pins the root that is made there
        prepared = prepare(model_file(), Path(folder) / "files", settings, progress=lambda text: None)
        arguments = ["--config", str(prepared.configuration), "--model", str(model_file()), "--name", "bench"]
        with (
            command("start", *arguments, "--foreground", "--json"),
            command("proxy", "--enclave", "bench", "--listen", "127.0.0.1:0", "--json") as proxy,
        ):
            yield House(f"http://{proxy['listening']}", prepared.policy)


@contextlib.contextmanager
def command(
    *arguments: str, program: str = "strongroom.cli", environment: Mapping[str, str] = os.environ
) -> Iterator[dict[str, Any]]:
    """A strongroom command, or another program, that stays; yields the JSON object that it prints when it is ready."""
    process = subprocess.Popen([sys.executable, "-m", program, *arguments], stdout=subprocess.PIPE, env=environment)
    try:
        assert process.stdout is not None
        line = process.stdout.readline()
        if not line:
            raise SystemExit(f"bench: {program} {arguments[0]} did not start")
        yield json.loads(line) | {"pid": str(process.pid)}
    finally:
        process.terminate()
        process.wait()
