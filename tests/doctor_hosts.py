"""Machines for ``strongroom doctor`` that are not there: a file tree, and answers of programs, clock and network."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from attestation.eif import Architecture
from attestation.model_memory import ModelShape, Work
from parent.doctor.host import Clock, Host, Ran, Reached, Unreached
from parent.egress import Allowed
from parent.image.facts import ImageFacts
from parent.image.sizing import GIB, MIB, ImageSize, Plan, plan
from tests.nitro_hosts import NitroHost

FLAGS: Final = "fpu avx avx2 bmi1 bmi2 f16c fma avx512f"
KMS: Final = Allowed.parse("kms.us-east-1.amazonaws.com:443")
S3: Final = Allowed.parse("s3.us-east-1.amazonaws.com:443")
IMAGE: Final = ImageFacts(ImageSize(100 * MIB, 200 * MIB), Architecture.X86_64, frozenset({"avx2", "fma"}))


def planned(weights: int = GIB, *, cpus: int = 2, image: ImageSize = IMAGE.size) -> Plan:
    shape = ModelShape("llama", weights, 0, ((64, 64),), 64, 192, 1000, 1500, 4096)
    return plan(shape, Work(1024), image, cpus=cpus)


@dataclass
class FakeMachine(Host):
    """A laptop with 8 CPUs and 16 GiB free, as it comes; a test takes things away."""

    root: Path
    environment: Mapping[str, str] = field(default_factory=lambda: {"HOME": "/home/somebody", "USER": "somebody"})
    programs: dict[str, Ran] = field(default_factory=lambda: {"uname": Ran(0, "Linux x86_64\n")})
    enclaves: Ran = field(default_factory=lambda: Ran(0, "[]\n"))
    """What nitro-cli says that runs."""
    superuser: bool = False
    usable: bool = True
    room: int = 100 * GIB
    time: float = 1_800_000_000.0
    said: Clock | None = field(default_factory=lambda: Clock(True, 0.02))
    answers: dict[Allowed, Reached | Unreached] = field(default_factory=lambda: {KMS: Reached(0.4), S3: Reached(None)})
    trusted: dict[Allowed, bytes | None] = field(default_factory=dict)
    """What a place was trusted by."""

    @classmethod
    def laptop(cls, root: Path) -> FakeMachine:
        machine = cls(root)
        cpu = f"processor\t: 0\nflags\t\t: {FLAGS}\n\n"
        machine.write("proc/cpuinfo", cpu * 8)
        machine.write("proc/meminfo", "MemTotal: 33554432 kB\nMemAvailable:   16777216 kB\n")
        return machine

    @classmethod
    def parent(cls, folder: Path, *, memory_mib: int = 4096, pool: str = "2-3,6-7") -> FakeMachine:
        """Set up, with so much apart."""
        there = NitroHost.make(folder, pool=pool, free_mib=memory_mib)
        machine = cls.laptop(there.root)
        machine.write("dev/nitro_enclaves", "")
        machine.write("dev/vsock", "")
        machine.write("sys/class/dmi/id/sys_vendor", "Amazon EC2\n")
        machine.write("etc/nitro_enclaves/allocator.yaml", f"---\nmemory_mib: {memory_mib}\ncpu_count: 4\n")
        machine.programs["nitro-cli"] = Ran(0, "Nitro CLI 1.4.2\n")
        return machine

    def write(self, path: str, text: str) -> None:
        file = self.root / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)

    def remove(self, path: str) -> None:
        (self.root / path).unlink()

    def tools(self) -> None:
        """What scripts/machine makes."""
        self.write("home/somebody/.cache/strongroom/qemu-0123456789abcdef/bin/qemu-system-x86_64", "")
        self.write("home/somebody/.cache/strongroom/vsock-device-0123456789abcdef/bin/vhost-device-vsock", "")

    def may_use(self, path: str | Path) -> bool:
        return self.exists(path) and self.usable

    def is_superuser(self) -> bool:
        return self.superuser

    def free(self, path: str | Path) -> int:
        return self.room

    def program(self, name: str) -> str | None:
        return f"/usr/bin/{name}" if name in self.programs else None

    def run(self, *command: str) -> Ran:
        ran = self.programs.get(command[0], Ran(None, "FileNotFoundError"))
        if command[1:] == ("describe-enclaves",) and ran.status == 0:
            return self.enclaves
        return Ran(ran.status, ran.output.partition(" ")[2]) if command[1:] == ("-m",) else ran

    def now(self) -> float:
        return self.time

    def clock(self) -> Clock | None:
        return self.said

    def reach(self, place: Allowed, authority: bytes | None = None) -> Reached:
        self.trusted[place] = authority
        answer = self.answers[place]
        if isinstance(answer, Unreached):
            raise answer
        return answer
