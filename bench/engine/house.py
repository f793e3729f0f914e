"""Our side of the engine's benchmarks, as one process that stays: ``python -m bench.engine.house SETTINGS``.

An emulated enclave, its proxy and the OpenAI gateway, each the real command under this process's own interpreter, which
may be one with another build of llama.cpp. SETTINGS is a JSON object of :class:`HouseSettings`. It prints one JSON
object when everything answers, and ends when its standard input does.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from attestation.policy import AppraisalPolicy
from attestation.policy_writer import write_policy
from attestation.process_image import measure_process_image
from attestation.reference import configuration_digest
from attestation.rules import Release, Require
from bench.house import command
from strongroom.prepare import ROOT_DER, Prepared, Settings, prepare


@dataclass(frozen=True, slots=True)
class HouseSettings:
    model: str
    engine: dict[str, int | str | bool] = field(default_factory=dict)
    """The table ``[engine]``, with all that is not to be as it is by itself."""
    tick_ms: int = 0
    caches: bool = False
    """The gateway asks for prefixes to be kept."""


def main() -> None:
    settings = HouseSettings(**json.loads(sys.argv[1]))
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="srb-")))  # short: sockets stand below
        os.environ["STRONGROOM_HOME"] = str(folder / "home")
        prepared = prepare(
            Path(settings.model), folder / "files", Settings(tick_ms=settings.tick_ms), progress=lambda text: None
        )
        _configure(prepared, settings.engine)
        start = ["--config", str(prepared.configuration), "--model", settings.model, "--name", "bench"]
        enclave = stack.enter_context(command("start", *start, "--foreground", "--json"))
        proxy = stack.enter_context(command("proxy", "--enclave", "bench", "--listen", "127.0.0.1:0", "--json"))
        url = f"http://{proxy['listening']}"
        serve = ["--url", url, "--policy", str(prepared.policy), "--listen", "127.0.0.1:0", "--json"]
        gateway = stack.enter_context(command("serve", *serve, *([] if settings.caches else ["--no-prompt-cache"])))
        said = {
            "gateway": f"http://{gateway['listening']}",
            "proxy": url,
            "policy": str(prepared.policy),
            "model": prepared.manifest.name,
            "processes": _named({int(enclave["pid"]): "launcher"})
            | {"proxy": int(proxy["pid"]), "gateway": int(gateway["pid"])},
        }
        print(json.dumps(said), flush=True)
        sys.stdin.read()


def _configure(prepared: Prepared, engine: dict[str, int | str | bool]) -> None:
    """Other settings of the engine than ``strongroom init`` has, and a policy that pins them."""
    prepared.configuration.write_text(configured(prepared.configuration.read_text(), engine))
    policy = AppraisalPolicy.load(prepared.policy)
    image = measure_process_image(Path(sys.executable), prepared.configuration)
    policy = replace(
        policy,
        releases=(Release("files of this machine", image),),
        configuration=Require((configuration_digest(prepared.configuration.read_bytes()),)),
    )
    prepared.policy.write_text(write_policy(policy, root=ROOT_DER))


def configured(text: str, engine: dict[str, int | str | bool]) -> str:
    """``enclave.toml`` with another table ``[engine]``."""
    lines = text.split("\n")
    start = lines.index("[engine]") + 1
    end = next(place for place in range(start, len(lines)) if not lines[place])
    return "\n".join(
        [*lines[:start], *(f"{name} = {json.dumps(value)}" for name, value in engine.items()), *lines[end:]]
    )


def _named(roots: dict[int, str]) -> dict[str, int]:
    """The processes of an enclave, by what they are: those below the launcher's."""
    named = {name: pid for pid, name in roots.items()}
    for pid, words in _descendants(set(roots)):
        for word, name in (("enclave.worker", "engine"), ("enclave", "server"), ("emulator.nsm", "nsm")):
            if word in words:
                named[name] = pid
                break
    return named


def _descendants(pids: set[int]) -> Iterator[tuple[int, list[str]]]:
    parents = dict[int, int]()
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                parents[int(entry.name)] = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
            except OSError:  # it has ended
                continue
    below, grew = set(pids), True
    while grew:
        more = {pid for pid, parent in parents.items() if parent in below} | below
        grew, below = len(more) > len(below), more
    for pid in sorted(below - pids):
        yield pid, Path(f"/proc/{pid}/cmdline").read_text().split("\0")


def arguments(settings: HouseSettings) -> list[str]:
    """Of an interpreter, to run this."""
    return ["-m", "bench.engine.house", json.dumps(asdict(settings))]


def said(line: str) -> dict[str, Any]:
    """What it has printed."""
    document: dict[str, Any] = json.loads(line)
    return document


if __name__ == "__main__":
    main()
