"""A whole house of real processes: the commands as a person types them, an emulated enclave with the real model, and a
proxy.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from strongroom.prepare import installed_model

PATIENCE_SECONDS = 120
"""How long a test waits for something that must come; it fails then, and it passes as soon as it is there."""
CONTEXT = 512


@dataclass
class Home:
    """A user's home of their own, and the commands in it."""

    folder: Path
    python: str = sys.executable
    processes: list[subprocess.Popen[str]] = field(default_factory=list)
    patience: int = PATIENCE_SECONDS
    """Seconds for a command to end."""

    @property
    def environment(self) -> dict[str, str]:
        temporary = self.folder / "tmp"
        temporary.mkdir(exist_ok=True)
        return os.environ | {"STRONGROOM_HOME": str(self.folder), "TMPDIR": str(temporary), "COLUMNS": "160"}

    def command(self, *arguments: str) -> list[str]:
        return [self.python, "-m", "strongroom.cli", *arguments]

    def run(self, *arguments: str, expect: int = 0, stdin: str = "") -> subprocess.CompletedProcess[str]:
        """Runs a command to its end and checks its exit code; no command ever shows a traceback."""
        done = subprocess.run(
            self.command(*arguments),
            env=self.environment,
            input=stdin,
            capture_output=True,
            text=True,
            timeout=self.patience,
            cwd=self.folder,
            check=False,
        )
        assert "Traceback" not in done.stdout + done.stderr, done.stdout + done.stderr
        assert done.returncode == expect, f"{arguments}: exit {done.returncode}\n{done.stdout}\n{done.stderr}"
        return done

    def json(self, *arguments: str, expect: int = 0) -> Any:
        return json.loads(self.run(*arguments, "--json", expect=expect).stdout)

    def spawn(self, *arguments: str) -> subprocess.Popen[str]:
        """Starts a command that stays."""
        process = subprocess.Popen(
            self.command(*arguments), env=self.environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
            cwd=self.folder,
        )  # fmt: skip
        self.processes.append(process)
        return process

    def ready(self, *arguments: str) -> tuple[subprocess.Popen[str], Any]:
        """Starts a command that stays, and returns what it says when it is ready."""
        process = self.spawn(*arguments, "--json")
        assert process.stdout is not None
        line = process.stdout.readline()
        if not line:
            assert process.stderr is not None
            pytest.fail(f"{arguments} ended with {process.wait()}: {process.stderr.read()}")
        return process, json.loads(line)

    def proxy(self, enclave: str) -> tuple[subprocess.Popen[str], str]:
        process, said = self.ready("proxy", "--enclave", enclave, "--listen", "127.0.0.1:0")
        return process, f"http://{said['listening']}"

    def state(self, name: str) -> dict[str, Any]:
        [state] = [state for state in self.json("ps") if state["name"] == name]
        return dict(state)

    def close(self) -> None:
        for process in self.processes:
            if process.poll() is None:
                process.terminate()
            process.communicate()
        for state in self.json("ps"):
            self.run("stop", state["name"])


def end(process: subprocess.Popen[str], number: int = signal.SIGTERM) -> tuple[int, str, str]:
    """Sends a signal and returns the exit code and what was said."""
    process.send_signal(number)
    out, err = process.communicate(timeout=PATIENCE_SECONDS)
    return process.returncode, out, err


def eventually(condition: Any, what: str) -> Any:
    """The first true value of ``condition``. Fails when there is none for a long time."""
    deadline = time.monotonic() + PATIENCE_SECONDS
    while not (value := condition()):
        assert time.monotonic() < deadline, f"never came: {what}"
        time.sleep(0.05)
    return value


def descendants(pid: int) -> dict[int, str]:
    """Every process below ``pid``, with its command line."""
    parents: dict[int, int] = {}
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit():
            with contextlib.suppress(OSError):
                parents[int(folder.name)] = int(folder.joinpath("stat").read_text().rpartition(")")[2].split()[1])
    found: dict[int, str] = {}
    grown = {pid}
    while grown:
        grown = {child for child, parent in parents.items() if parent in grown} - set(found)
        for child in grown:
            with contextlib.suppress(OSError):
                found[child] = Path(f"/proc/{child}/cmdline").read_bytes().replace(b"\0", b" ").decode()
    return found


def process_of(pid: int, what: str) -> int:
    """The one process below ``pid`` that runs the module ``what``."""
    [found] = [child for child, command in descendants(pid).items() if f"-m {what} " in command]
    return found


@contextlib.contextmanager
def home_folder() -> Iterator[Path]:
    """A short path: Unix sockets allow 107 bytes."""
    folder = Path(tempfile.mkdtemp(prefix="sr-"))
    try:
        yield folder
    finally:
        shutil.rmtree(folder)


@pytest.fixture(scope="session")
def home() -> Iterator[Home]:
    with home_folder() as folder:
        home = Home(folder)
        try:
            yield home
        finally:
            home.close()


@pytest.fixture(scope="session")
def model() -> Path:
    path = installed_model()
    assert path is not None, "the smollm2 extra is installed by make setup"
    return path


@dataclass
class Running:
    """An enclave that serves, and a proxy before it."""

    home: Home
    files: Path
    url: str
    name: str

    @property
    def policy(self) -> Path:
        return self.files / "policy.toml"

    @property
    def session(self) -> tuple[str, ...]:
        return ("--url", self.url, "--policy", str(self.policy))

    @property
    def supervisor(self) -> int:
        return int(self.home.state(self.name)["pid"])

    def process(self, what: str) -> int:
        return process_of(self.supervisor, what)

    def wait_until_serving(self) -> None:
        eventually(lambda: self.home.state(self.name)["phase"] == "SERVING", "the enclave serves again")


def start(home: Home, model: Path, name: str, *, context: int = CONTEXT) -> Path:
    """Prepares and starts an enclave; returns the folder with its policy."""
    files = home.folder / f"files-{name}"
    home.run(
        "init",
        "--directory",
        str(files),
        "--model",
        str(model),
        "--context",
        str(context),
        "--threads",
        "2",
        "--tick-ms",
        "10",
    )
    home.run("start", "--config", str(files / "enclave.toml"), "--model", str(model), "--name", name)
    return files


@pytest.fixture(scope="session")
def running(home: Home, model: Path) -> Running:
    files = start(home, model, "main")
    _, url = home.proxy("main")
    return Running(home, files, url, "main")
