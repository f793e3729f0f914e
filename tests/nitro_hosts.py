"""Parents of enclaves that are not there: a /sys in a folder, and the stand-in for nitro-cli with what it knows."""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from parent.nitro.cli import NitroCli
from tests.cpio_files import Member, archive, folder
from tests.eif_files import Eif
from tests.sound_images import BOOT, sound

REPOSITORY: Final = Path(__file__).resolve().parents[1]
STAND_INS: Final = REPOSITORY / "tests/nitro_cli"
SCRIPTS: Final = {
    "bootstrap": "bootstrap-parent",
    "launch": "launch-parent",
    "build": "build-eif",
    "run": "run-enclave",
    "describe": "describe-enclaves",
    "console": "enclave-console",
    "terminate": "terminate-enclave",
}
"""The script of each command of ``strongroom nitro``."""
GIB_PAGE, HUGE_PAGE = 1 << 20, 2048
"""kB."""
CONFIGURATION: Final = f"""version = 1
[nsm]
address = "device:/dev/nsm"
entropy = "nsm-hwrng"
[model]
store = "vsock:3:5006"
manifest = "sha384:{"ab" * 48}"
"""
_ROOT: Final = (
    Member("cmd"),
    *(folder(path) for path in ("rootfs", "rootfs/etc", "rootfs/etc/strongroom", "rootfs/usr")),
    Member("rootfs/etc/strongroom/enclave.toml", CONFIGURATION.encode()),
    Member("rootfs/usr/data", bytes(1 << 20)),
)
IMAGE: Final = sound(archive(*BOOT), archive(*_ROOT))
"""A sound one of Strongroom's, of more than 1 MiB."""


@dataclass(frozen=True)
class Said:
    """How a command ended."""

    status: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        return json.loads(self.out)


@dataclass(frozen=True)
class NitroHost:
    """One host: ``root`` stands for ``/``, and ``folder`` has what the stand-ins note and know."""

    folder: Path
    root: Path

    @classmethod
    def make(cls, folder: Path, *, pool: str = "2-3,6-7", cpus: int = 8, free_mib: int = 4096) -> NitroHost:
        """A machine with two threads a core: CPU n and n + half of them are one. One NUMA node."""
        host = cls(folder / "stand-in", folder / "root")
        host.folder.mkdir(parents=True)
        host.root.mkdir()
        for name in ("nitro-cli", "docker"):
            host.stand_in(STAND_INS / name, name)
        for name in ("dnf", "usermod", "systemctl"):
            host.stand_in(STAND_INS / "host-tool", name)
        host.lay_out({0: range(cpus)}, pool=pool, free_mib={0: free_mib})
        host.know(enclaves=[], pool=in_pool(pool), free_mib=free_mib, measurements=nitro_cli_text(IMAGE))
        return host

    def stand_in(self, script: Path, name: str) -> None:
        """Puts one on the path as ``name``, for the tests' interpreter without its packages: that starts in no time."""
        _, _, text = script.read_text().partition("\n")
        python = getattr(sys, "_base_executable", sys.executable)
        copy = self.folder / "bin" / name
        copy.parent.mkdir(exist_ok=True)
        copy.write_text(f"#!{python} -IS\n{text}")
        copy.chmod(0o755)

    def lay_out(
        self, nodes: Mapping[int, Sequence[int]], *, pool: str, free_mib: Mapping[int, int], memory_mib: int = 32_768
    ) -> None:
        """Writes /sys anew: CPUs by NUMA node, of which those in the pool are off-line."""
        shutil.rmtree(self.root / "sys", ignore_errors=True)
        count = sum(len(cpus) for cpus in nodes.values())
        for node, cpus in nodes.items():
            self.write(f"sys/devices/system/node/node{node}/meminfo", f"Node {node} MemTotal: {memory_mib << 10} kB\n")
            pages = f"sys/devices/system/node/node{node}/hugepages"
            for size, number in ((GIB_PAGE, 0), (HUGE_PAGE, free_mib.get(node, 0) // 2)):
                self.write(f"{pages}/hugepages-{size}kB/nr_hugepages", f"{number}\n")
                self.write(f"{pages}/hugepages-{size}kB/free_hugepages", f"{number}\n")
            for cpu in cpus:
                self.write(f"sys/devices/system/cpu/cpu{cpu}/node{node}/online", "1\n")
                if cpu not in in_pool(pool):
                    one, other = sorted((cpu, (cpu + count // 2) % count))
                    text = f"{one},{other}\n"
                    self.write(f"sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list", text)
        self.write("sys/module/nitro_enclaves/parameters/ne_cpus", f"{pool}\n")

    def write(self, path: str, text: str) -> Path:
        """Below the root."""
        file = self.root / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
        return file

    def know(self, **state: Any) -> None:
        """What nitro-cli knows and does from now on, beside what it did."""
        file = self.folder / "state.json"
        known = json.loads(file.read_text()) if file.exists() else {}
        file.write_text(json.dumps({**known, **state}))

    @property
    def enclaves(self) -> list[dict[str, Any]]:
        found: list[dict[str, Any]] = json.loads((self.folder / "state.json").read_text())["enclaves"]
        return found

    @property
    def calls(self) -> list[list[str]]:
        """The arguments of every call of a stand-in, in their order."""
        file = self.folder / "calls.jsonl"
        return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []

    @property
    def environment(self) -> dict[str, str]:
        path = f"{self.folder / 'bin'}{os.pathsep}{os.environ['PATH']}"
        return {**os.environ, "PATH": path, "STAND_IN": str(self.folder), "STRONGROOM": program()}

    def cli(self, monkeypatch: Any) -> NitroCli:
        """The runner, over the stand-in."""
        monkeypatch.setenv("STAND_IN", str(self.folder))
        return NitroCli(str(self.folder / "bin/nitro-cli"))

    async def run(self, front: str, command: str, *arguments: str | Path) -> Said:
        """A command of ``strongroom nitro`` (``front`` is ``command``) or its script (``script``)."""
        words = (
            [program(), "nitro", command] if front == "command" else [str(REPOSITORY / "scripts" / SCRIPTS[command])]
        )
        return await ran([*words, *map(str, arguments)], self.environment, self.folder)


async def ran(words: Sequence[str], environment: Mapping[str, str], folder: Path) -> Said:
    """A program's end, with its outputs."""
    process = await asyncio.create_subprocess_exec(
        *words,
        cwd=folder,
        env=dict(environment),
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    out, err = await process.communicate()
    assert process.returncode is not None
    return Said(process.returncode, out.decode(), err.decode())


def program() -> str:
    """``strongroom`` of the environment that runs the tests."""
    return str(Path(sys.executable).with_name("strongroom"))


def in_pool(pool: str) -> list[int]:
    found: list[int] = []
    for part in pool.split(",") if pool else ():
        first, _, last = part.partition("-")
        found += range(int(first), int(last or first) + 1)
    return found


def nitro_cli_text(eif: Eif) -> dict[str, str]:
    """The measurements as nitro-cli prints them."""
    registers = {f"PCR{index}": value.hex() for index, value in enumerate(eif.registers())}
    return {"HashAlgorithm": "Sha384 { ... }", **registers}
