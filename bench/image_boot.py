"""Booting: the enclave's own image in the emulated machine, against the same enclave as processes of this host.

A boot begins when the launcher begins it, with everything measured and the model's file hashed. The moments after it
are the heartbeat of the image's init, the first event of the enclave, which comes when its RPC listens (the supervisor
asks every 50 ms), the event that it serves, and the first token of a client that verifies it then. The two launchers
take turns; every boot has a home, a supervisor and a proxy of its own, so that no bytecode of Python is there yet, as
there never is in an image.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Final

from attestation.manifest import ModelManifest
from attestation.policy import AppraisalPolicy
from attestation.reference import PcrSet
from bench import Row
from bench.house import command, model_file
from bench.image_house import THREADS, Home, lacking, not_measured
from parent.events import Event
from parent.launch.machine import LaunchError, Machine, Places, Running
from parent.launch.qemu import RPC_SOCKET, RunningMachine
from parent.launch.supervisor import Launch, Supervisor
from parent.modelstore import ModelStore
from parent.registry import Registry
from parent.start_command import make_machine
from strongroom.session import Session
from vsockrpc.chat import ChatMessage, ChatRequest
from vsockrpc.messages import Delta

NAME = "bench"
BEGUN, HEARTBEAT, LISTENING, SERVING, FIRST_TOKEN = "begun", "heartbeat", "listening", "SERVING", "first token"
ROWS: Final = {
    HEARTBEAT: "boot to the heartbeat of the image's init",
    LISTENING: "boot to the RPC listening",
    SERVING: "boot to SERVING, with the model received",
    FIRST_TOKEN: "boot to the first token of a client that verifies first",
}
MACHINE = f"in the emulated machine, {THREADS} CPUs"
QUESTION = ChatRequest((ChatMessage("user", "Name one planet."),), max_tokens=4, temperature=0.0)


def rows(runs: int = 3) -> list[Row]:
    """Medians of ``runs`` boots of each kind, and of the ratios, run by run (below 1 is faster)."""
    if (reason := lacking(machine=True)) is not None:
        return [not_measured(f"boots {MACHINE}", reason)]
    return rows_of([(boot("qemu"), boot("process")) for _ in range(runs)])


def rows_of(boots: Sequence[tuple[Mapping[str, float], Mapping[str, float]]]) -> list[Row]:
    """Of pairs of boots, the machine's and the process launcher's: seconds from the beginning, by moment."""
    table = []
    for moment, what in ROWS.items():
        taken = median(machine[moment] for machine, _ in boots)
        if moment == HEARTBEAT:
            peer, compared = "a process has none", ""
        else:
            peer = f"{median(process[moment] for _, process in boots):.2f} s (as processes of this host)"
            compared = f"{median(machine[moment] / process[moment] for machine, process in boots):.1f}"
        table.append(Row(f"{what}, {MACHINE}", f"{taken:.2f} s", peer, compared, "for the record"))
    return table


# --- One boot ---------------------------------------------------------------------------------------------------------


def boot(launcher: str) -> dict[str, float]:
    """One boot, to the first token: seconds from its beginning, by moment. SystemExit when it does not come to it."""
    with tempfile.TemporaryDirectory(prefix="sr-") as folder:
        home = Home(Path(folder))
        files = home.prepare(launcher)
        policy = files / "policy.toml"
        measured = files / "enclave.toml"
        if launcher == "qemu":
            measured = home.build(files)
            home.run("image", "policy", str(measured), "--out", str(policy))
        place = Registry(home.folder / "run").root / NAME / RPC_SOCKET
        proxied = ("proxy", "--enclave", f"unix:{place}", "--listen", "127.0.0.1:0", "--json")
        with command(*proxied, environment=home.environment) as proxy:
            begin = [sys.executable, "-m", "bench.image_boot", "--role", launcher, "--files", str(files)]
            with subprocess.Popen(begin, stdout=subprocess.PIPE, text=True, env=home.environment) as supervisor:
                try:
                    moments = _follow(supervisor, launcher)
                    moments[FIRST_TOKEN] = asyncio.run(_first_token(f"http://{proxy['listening']}", policy))
                finally:
                    supervisor.terminate()
    begun = moments.pop(BEGUN)
    return {moment: at - begun for moment, at in moments.items()}


def _follow(supervisor: subprocess.Popen[str], launcher: str) -> dict[str, float]:
    """When each moment was, until the enclave serves."""
    moments: dict[str, float] = {}
    assert supervisor.stdout is not None
    for line in supervisor.stdout:
        moment, at = json.loads(line)
        if moment in moments:
            break  # it died, and was booted again
        moments[moment] = at
        if moment == SERVING:
            return moments
    raise SystemExit(f"bench: the enclave of the {launcher} launcher did not come up; it came to {list(moments)}")


async def _first_token(url: str, policy: Path) -> float:
    first: float | None = None
    async with (
        Session(url, AppraisalPolicy.load(policy)) as session,
        contextlib.aclosing(session.chat(QUESTION)) as said,
    ):
        async for answer in said:
            if isinstance(answer, Delta) and first is None:
                first = time.monotonic()
    assert first is not None
    return first


# --- The supervisor's process -----------------------------------------------------------------------------------------


def _tell(moment: str) -> None:
    """``time.monotonic`` is the system's, the same for all processes."""
    print(json.dumps((moment, time.monotonic())), flush=True)


@dataclass(frozen=True, slots=True)
class Told:
    """A machine that tells when a boot of it begins, and when its init's heartbeat has come."""

    machine: Machine

    @property
    def launcher(self) -> str:
        return self.machine.launcher

    @property
    def places(self) -> Places:
        return self.machine.places

    @property
    def listen_seconds(self) -> float:
        return self.machine.listen_seconds

    async def measure(self) -> PcrSet:
        return await self.machine.measure()

    @contextlib.asynccontextmanager
    async def boot(self, measured: PcrSet) -> AsyncIterator[Running]:
        _tell(BEGUN)
        async with self.machine.boot(measured) as running:
            hearing = asyncio.ensure_future(_hear(running))
            try:
                yield running
            finally:
                hearing.cancel()
                await asyncio.gather(hearing, return_exceptions=True)


async def _hear(running: Running) -> None:
    if isinstance(running, RunningMachine):
        await running.heard.wait()
        _tell(HEARTBEAT)


async def _supervise(launcher: str, files: Path) -> None:
    """Runs an enclave until it is told to stop."""
    model = model_file()
    store = ModelStore(ModelManifest.from_gguf(model), model)
    instance = Registry.of_user().create(NAME)
    instance.configuration.write_bytes((files / "enclave.toml").read_bytes())
    image = files / "enclave.eif" if launcher == "qemu" else None
    machine = make_machine(launcher, instance, image, model, memory=None, cpus=THREADS)
    told: set[str] = set()

    def happened(event: Event) -> None:
        moment = SERVING if event.get("phase") == SERVING else LISTENING
        if moment not in told:
            told.add(moment)
            _tell(moment)

    launch = Launch(instance, Told(machine), store)
    state = await Supervisor(launch, on_change=lambda state: None, on_event=happened).run()
    if state.error is not None:
        raise LaunchError.of(state.error)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.image_boot", description=__doc__)
    parser.add_argument("--runs", type=int, default=3, help="boots of each kind (default: 3)")
    parser.add_argument("--role", choices=("qemu", "process"), help=argparse.SUPPRESS)
    parser.add_argument("--files", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.role is None:
        for row in rows(options.runs):
            print(row)
        return
    try:
        asyncio.run(_supervise(options.role, options.files))
    except LaunchError as error:
        raise SystemExit(f"bench: {error}") from error


if __name__ == "__main__":
    main()
