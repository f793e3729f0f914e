"""The servers that are held against each other, each as processes of its own, loaded before it is measured and idle
while another one is.
"""

from __future__ import annotations

import contextlib
import os
import re
import shlex
import socket
import subprocess
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

import httpx2

from bench.engine import house
from bench.engine.house import HouseSettings
from bench.engine.load import Target
from bench.engine.peers import ROOT, WORK, Build, PeerError

START_SECONDS: Final = 600.0
THREADS: Final = 2
KV_TYPE: Final = "f16"
_TICKS: Final = os.sysconf("SC_CLK_TCK")


@dataclass(frozen=True, slots=True, kw_only=True)
class Sizes:
    """What every server of a part is given alike. Tokens."""

    model: Path
    context: int
    """Of one sequence."""
    parallel: int
    cells: int | None = None
    """Of all sequences, which then share them; None gives each its own."""
    repack: bool = True
    threads: int = THREADS


@dataclass(slots=True)
class Side:
    """A server that answers."""

    name: str
    target: Target
    build: Build
    commands: tuple[str, ...]
    """As one would type them, without the paths of this machine."""
    processes: Mapping[str, int]
    """By what they are; ``engine`` is the one that decodes."""
    policy: Path | None = None
    """For a client that speaks to the proxy itself."""
    proxy: str = ""
    own: Mapping[str, object] = field(default_factory=dict)
    """What was chosen for this side alone, for the report."""

    def cpu_seconds(self) -> dict[str, float]:
        """Used so far, by process."""
        used = {}
        for name, pid in self.processes.items():
            fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
            used[name] = (int(fields[11]) + int(fields[12])) / _TICKS
        return used

    def memory(self) -> dict[str, tuple[int, int]]:
        """Bytes that each process has resident, and had at most."""
        return {name: _resident(pid) for name, pid in self.processes.items()}


def _resident(pid: int) -> tuple[int, int]:
    fields = dict(line.split(":", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines())
    now, most = (int(fields[key].removesuffix("kB")) * 1024 for key in ("VmRSS", "VmHWM"))
    return now, most


# --- Ours -------------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def ours(
    build: Build,
    sizes: Sizes,
    *,
    name: str = "Strongroom",
    tick_ms: int = 0,
    caches: bool = False,
    engine: Mapping[str, int | str | bool] | None = None,
) -> Iterator[Side]:
    """Client, gateway, proxy, RPC, sealed channel and engine process. ``engine`` is more of the table ``[engine]``."""
    table = {**engine_table(sizes), **(engine or {})}
    settings = HouseSettings(str(sizes.model), table, tick_ms, caches)
    command = [*build.program, *house.arguments(settings)]
    log = _log(name)
    with _process(command, log, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        line = process.stdout.readline()
        if not line:
            raise PeerError(f"{name} did not start: see {log}")
        said = house.said(line.decode())
        toml = ", ".join(f"{key} = {str(value).lower()}" for key, value in table.items())
        yield Side(
            name,
            Target(said["gateway"], said["model"]),
            build,
            (
                f"strongroom start --model {sizes.model.name}, with [engine] {toml}; [pacing] tick_ms = {tick_ms}",
                "strongroom proxy",
                "strongroom serve" + ("" if caches else " --no-prompt-cache"),
            ),
            said["processes"],
            Path(said["policy"]),
            said["proxy"],
            {"tick_ms": tick_ms, **(engine or {})},
        )


def engine_table(sizes: Sizes) -> dict[str, int | str | bool]:
    """``[engine]`` of ``enclave.toml``."""
    return {
        "context": sizes.context,
        "parallel": sizes.parallel,
        "cells": sizes.cells or sizes.context * sizes.parallel,
        "kv_type": KV_TYPE,
        "repack": sizes.repack,
        "threads": sizes.threads,
    }


# --- Peers ------------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def llama_server(
    build: Build,
    sizes: Sizes,
    *,
    name: str = "llama-server",
    caches: bool = False,
    niceness: int = 0,
    more: Sequence[str] = (),
) -> Iterator[Side]:
    """llama.cpp's server, as it is by itself but for sizes and threads; ``more`` are options of one row. Without
    ``caches`` no prompt is kept, here or there.
    """
    options = [*llama_server_options(sizes, caches=caches), *more]
    program = [*(["nice", "-n", str(niceness)] if niceness else []), *build.program]
    with _served([*program, "--model", str(sizes.model)], options, name, "/health") as (url, pid):
        extra = {} if caches else {"cache_prompt": False}
        nice = f"nice -n {niceness} " if niceness else ""
        typed = f"{nice}llama-server --model {sizes.model.name} {shlex.join(options)}"
        yield Side(name, Target(url, "model", extra), build, (typed,), {"engine": pid})


def llama_server_options(sizes: Sizes, *, caches: bool) -> list[str]:
    """All that a row does not add, without model, host and port."""
    shared = sizes.cells is not None
    return [
        *("--ctx-size", str(sizes.cells if sizes.cells is not None else sizes.context * sizes.parallel)),
        *("--parallel", str(sizes.parallel)),
        "--kv-unified" if shared else "--no-kv-unified",
        *("--threads", str(sizes.threads), "--threads-batch", str(sizes.threads)),
        *("--cache-type-k", KV_TYPE, "--cache-type-v", KV_TYPE),
        *([] if sizes.repack else ["--no-repack"]),
        *([] if caches else ["--no-cache-prompt", "--cache-ram", "0"]),
        *("--no-webui", "--offline"),
    ]


@contextlib.contextmanager
def llama_cpp_server(build: Build, sizes: Sizes, *, name: str = "llama_cpp.server") -> Iterator[Side]:
    """llama-cpp-python's server, repaired: as many threads as the others, and no request interrupts another."""
    options = [
        *("--n_threads", str(sizes.threads), "--interrupt_requests", "false"),
        *("--n_ctx", str(sizes.context)),
    ]
    program = [*build.program, "-m", "llama_cpp.server", "--model", str(sizes.model)]
    with _served(program, options, name, "/v1/models") as (url, pid):
        typed = f"python -m llama_cpp.server --model {sizes.model.name} {shlex.join(options)}"
        yield Side(name, Target(url, "model"), build, (typed,), {"engine": pid})


@contextlib.contextmanager
def _served(program: Sequence[str], options: Sequence[str], name: str, ready: str) -> Iterator[tuple[str, int]]:
    """A server's URL and process, once it answers at the path ``ready``. Raises PeerError."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    url = f"http://127.0.0.1:{port}"
    command = [*program, *options, "--host", "127.0.0.1", "--port", str(port)]
    log = _log(name)
    with _process(command, log) as process:
        until = time.monotonic() + START_SECONDS
        while True:
            if process.poll() is not None or time.monotonic() > until:
                raise PeerError(f"{name} did not start ({process.returncode}): see {log}")
            with contextlib.suppress(httpx2.HTTPError):
                if httpx2.get(url + ready, trust_env=False).status_code == 200:
                    break
            time.sleep(0.1)
        yield url, process.pid


def _log(name: str) -> Path:
    """Where a server's own words go: the last run's."""
    folder = WORK / "logs"
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{re.sub('[^a-zA-Z0-9._-]+', '-', name)}.log"
    path.write_bytes(b"")
    return path


@contextlib.contextmanager
def _process(
    command: Sequence[str], log: Path, *, stdin: int = subprocess.DEVNULL, stdout: int | None = None
) -> Iterator[subprocess.Popen[bytes]]:
    with log.open("ab") as words:
        process = subprocess.Popen(
            command, stdin=stdin, stdout=words if stdout is None else stdout, stderr=words, cwd=ROOT
        )
    try:
        yield process
    finally:
        if process.stdin is not None:  # it ends by itself, and all that it has started with it
            process.stdin.close()
            process.wait()
        else:
            process.terminate()
            try:
                process.wait(30)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        if process.stdout is not None:
            process.stdout.close()
