"""EC2 instance types that can be the parent of an enclave, and which of them are large enough.

vCPUs, threads a core, memory and ``NitroEnclavesSupport`` are what EC2 answers to DescribeInstanceTypes in us-east-1;
the same numbers stand on the pages of the "Amazon EC2 Instance Types" guide (general purpose, compute optimized, memory
optimized; performance and security specifications). :data:`DATE` is that of the answers. The plain families are here,
without disks or faster networks, in sizes up to 48 vCPUs: larger ones have more than one NUMA node in some families,
and an enclave takes CPUs and memory of one. A test holds the table against recorded answers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from parent.image.sizing import GIB, MIB, Plan

DATE: Final = "2026-10-27"
SOURCE: Final = "EC2 DescribeInstanceTypes, us-east-1; docs.aws.amazon.com/ec2/latest/instancetypes"

PARENT_CPUS: Final = 2
"""vCPUs that stay with the parent: CPU 0 and its sibling at least."""
PARENT_MEMORY: Final = 2 * GIB
PARENT_SHARE: Final = 32
"""The parent's own memory: its system, the proxy and the model store; and one part in so many of the instance's, which
its firmware and kernel take."""

_SIZES: Final = (4, 8, 16, 32, 48)
_C5_SIZES: Final = (4, 8, 16, 36, 48)
_SMALL: Final = (2, *_SIZES)


@dataclass(frozen=True, slots=True, order=True)
class InstanceType:
    """Ordered by size."""

    cpus: int
    """vCPUs."""
    memory: int
    """MiB."""
    name: str
    threads_per_core: int
    architecture: str
    """``x86_64`` or ``aarch64``."""

    def fits(self, plan: Plan) -> bool:
        """The enclave and its parent have room on it."""
        left = self.memory * MIB - plan.memory * MIB
        return self.cpus - plan.cpus >= PARENT_CPUS and left >= PARENT_MEMORY + self.memory * MIB // PARENT_SHARE


_FAMILIES: Final = (
    # family, processor's threads a core, architecture, vCPUs of its sizes
    ("5", 2, "x86_64", _SIZES),  # Intel Skylake or Cascade Lake
    ("6i", 2, "x86_64", _SIZES),  # Ice Lake
    ("6a", 2, "x86_64", _SIZES),  # AMD Milan
    ("7i", 2, "x86_64", _SIZES),  # Sapphire Rapids
    ("7a", 1, "x86_64", _SIZES),  # Genoa, one thread a core
    ("8i", 2, "x86_64", _SIZES),  # Granite Rapids
    ("8a", 1, "x86_64", _SMALL),  # Turin, one thread a core
    ("6g", 1, "aarch64", _SMALL),
    ("7g", 1, "aarch64", _SMALL),
    ("8g", 1, "aarch64", _SMALL),
)
_KINDS: Final = {"c": 2, "m": 4, "r": 8}
"""GiB of memory for each vCPU."""

INSTANCE_TYPES: Final[Sequence[InstanceType]] = tuple(
    sorted(
        InstanceType(
            cpus,
            cpus * ratio * 1024,
            f"{kind}{family}.{'' if cpus <= 4 else cpus // 4}{'large' if cpus == 2 else 'xlarge'}",
            threads,
            architecture,
        )
        for family, threads, architecture, sizes in _FAMILIES
        for kind, ratio in _KINDS.items()
        for cpus in (_C5_SIZES if kind + family == "c5" else sizes)
    )
)


def fitting(plan: Plan, architecture: str = "x86_64") -> list[InstanceType]:
    """Those that are large enough, smallest first. On all x86_64 types here the portable build of llama.cpp runs."""
    return [each for each in INSTANCE_TYPES if each.architecture == architecture and each.fits(plan)]
