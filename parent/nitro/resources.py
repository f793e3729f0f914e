"""What a host has set apart for enclaves: CPUs of the driver's pool and huge pages, by NUMA node, read from /sys.

An enclave takes whole cores, and CPUs and memory of one node (AWS's allocator sees to that when it fills the pool; a
pool that was written by hand need not be so). The pool's CPUs are off-line for the host, which keeps their node but not
their siblings: those are taken to be as many as CPU 0 has, as everywhere on one machine.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from parent.nitro.cli import RunningEnclave
from parent.nitro.errors import CPU_POOL, NitroError, driver_missing

MIB: Final = 1 << 20
MAX_CPU: Final = 1 << 13
"""No CPU has a higher number: the kernel's own limit on x86_64."""
_RANGE = re.compile(r"([0-9]{1,4})(?:-([0-9]{1,4}))?", re.ASCII)
_NODE = re.compile(r"node([0-9]{1,4})", re.ASCII)
_PAGES = re.compile(r"hugepages-([0-9]{1,9})kB", re.ASCII)
_COUNT = re.compile(r"[0-9]{1,12}", re.ASCII)


@dataclass(frozen=True, slots=True)
class HugePages:
    """Of one NUMA node, in MiB, of all page sizes together."""

    reserved: int
    free: int


@dataclass(frozen=True, slots=True)
class Free:
    """What an enclave may still be given of one NUMA node."""

    cpus: tuple[int, ...]
    """Of the pool, ascending."""
    memory: HugePages


@dataclass(frozen=True, slots=True)
class EnclaveResources:
    """What enclaves may be given on this host, those that run included."""

    pool: tuple[int, ...]
    """The CPUs' numbers, ascending."""
    node_of: Mapping[int, int]
    """The NUMA node of each."""
    hugepages: Mapping[int, HugePages]
    """By NUMA node."""
    threads_per_core: int

    @classmethod
    def read(cls, root: Path = Path("/")) -> EnclaveResources:
        """``root`` stands for ``/``. Raises NitroError ``driver_missing``; ``not_set_up`` when it cannot be read."""
        try:
            pool = parse_cpus(_below(root, CPU_POOL).read_text())
        except FileNotFoundError as error:
            raise driver_missing(f"no {CPU_POOL}") from error
        except (OSError, ValueError) as error:
            raise NitroError("not_set_up", f"{CPU_POOL} cannot be read: {error}") from error
        topology = Topology.read(root)
        node_of = {cpu: topology.node_of(cpu) for cpu in pool}
        return cls(pool, node_of, topology.hugepages, topology.threads_per_core)

    @property
    def nodes(self) -> tuple[int, ...]:
        """Those of the pool's CPUs."""
        return tuple(sorted(set(self.node_of.values())))

    def free(self, running: Sequence[RunningEnclave]) -> dict[int, Free]:
        """By NUMA node, what those that run leave: of every node that has CPUs or huge pages for enclaves."""
        taken = {cpu for each in running for cpu in each.cpu_ids}
        left = [cpu for cpu in self.pool if cpu not in taken]
        return {
            node: Free(
                tuple(cpu for cpu in left if self.node_of[cpu] == node), self.hugepages.get(node, HugePages(0, 0))
            )
            for node in sorted({*self.nodes, *self.hugepages})
        }


@dataclass(frozen=True, slots=True)
class Topology:
    """The machine's CPUs that are on-line, and its memory, by NUMA node."""

    root: Path
    cores: Mapping[int, Sequence[tuple[int, ...]]]
    """By node: the whole cores, each with the numbers of its threads."""
    memory: Mapping[int, int]
    """MiB of each node."""
    hugepages: Mapping[int, HugePages]
    threads_per_core: int

    @classmethod
    def read(cls, root: Path = Path("/")) -> Topology:
        """``root`` stands for ``/``. A machine without NUMA has node 0. Raises NitroError ``not_set_up``."""
        try:
            siblings = _siblings(_below(root, "/sys/devices/system/cpu"))
            nodes = sorted(
                int(match[1])
                for folder in _below(root, "/sys/devices/system/node").glob("node*")
                if (match := _NODE.fullmatch(folder.name))
            )
            cores: dict[int, list[tuple[int, ...]]] = {node: [] for node in nodes or [0]}
            for core in sorted(set(siblings.values())):
                cores.setdefault(_node_of(root, core[0]), []).append(core)
            memory = {node: _memory(root, node) for node in cores}
            pages = {node: _hugepages(root, node) for node in cores}
        except (OSError, ValueError) as error:
            raise NitroError("not_set_up", f"this machine's CPUs and memory cannot be read: {error}") from error
        return cls(root, cores, memory, pages, max((len(core) for core in siblings.values()), default=1))

    def node_of(self, cpu: int) -> int:
        """Also of a CPU that is off-line."""
        return _node_of(self.root, cpu)


def node_for(free: Mapping[int, Free], cpus: int) -> int | None:
    """Of the nodes with so many CPUs the one with the most memory. None: no node has as many."""
    fitting = [node for node, each in free.items() if len(each.cpus) >= cpus]
    return max(fitting, key=lambda node: free[node].memory.free, default=None)


def parse_cpus(text: str) -> tuple[int, ...]:
    """The CPUs of a kernel's list, such as ``2,4-7``, ascending. Raises ValueError."""
    found: set[int] = set()
    for part in text.strip().split(",") if text.strip() else ():
        match = _RANGE.fullmatch(part.strip())
        first, last = (int(match[1]), int(match[2] or match[1])) if match else (1, 0)
        if not first <= last < MAX_CPU:
            raise ValueError(f"no list of CPUs: {text[:100]!a}")
        found.update(range(first, last + 1))
    return tuple(sorted(found))


def _below(root: Path, path: str) -> Path:
    return root / path.lstrip("/")


def _siblings(folder: Path) -> dict[int, tuple[int, ...]]:
    found = {}
    for file in folder.glob("cpu[0-9]*/topology/thread_siblings_list"):
        core = parse_cpus(file.read_text())
        found.update(dict.fromkeys(core, core))
    return found


def _node_of(root: Path, cpu: int) -> int:
    for entry in sorted(_below(root, f"/sys/devices/system/cpu/cpu{cpu}").glob("node*")):
        if match := _NODE.fullmatch(entry.name):
            return int(match[1])
    return 0


def _memory(root: Path, node: int) -> int:
    for name in (f"/sys/devices/system/node/node{node}/meminfo", "/proc/meminfo"):
        if (path := _below(root, name)).exists():
            found = re.search(r"MemTotal:\s+([0-9]{1,15}) kB", path.read_text())
            if found:
                return int(found[1]) >> 10
    return 0


def _hugepages(root: Path, node: int) -> HugePages:
    reserved = free = 0
    for name in (f"/sys/devices/system/node/node{node}/hugepages", "/sys/kernel/mm/hugepages"):
        for folder in _below(root, name).glob("hugepages-*"):
            if match := _PAGES.fullmatch(folder.name):
                size = int(match[1])
                reserved += size * _count(folder / "nr_hugepages")
                free += size * _count(folder / "free_hugepages")
        if reserved:
            break
    return HugePages(reserved >> 10, free >> 10)


def _count(path: Path) -> int:
    text = path.read_text().strip()
    if not _COUNT.fullmatch(text):
        raise ValueError(f"{path}: {text[:40]!a}")
    return int(text)
