"""How much memory and how many CPUs an enclave needs: what its model takes (:mod:`attestation.model_memory`), and what
comes with an image and a Nitro parent.

Every part has its rule beside it. An enclave has no disk and no swap: what does not fit ends it. Its root file system
is unpacked into memory and stays.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from attestation.model_memory import ModelShape, Part, Work, engine_memory, kernel_beside

MIB: Final = 1 << 20
GIB: Final = 1 << 30

HUGE_PAGE: Final = 2 * MIB
"""The driver takes memory in regions of this size or a multiple of it (Documentation/virt/ne_overview.rst); AWS's
allocator reserves pages of 1 GiB as far as they go and of 2 MiB for the rest."""
EIF_FACTOR: Final = 4
"""nitro-cli refuses an enclave with less memory than so many times its image's file."""
MAX_CPUS: Final = 32
"""More threads than 16 whole cores do not decode faster: memory is what they wait for."""
WEIGHTS_OF_A_CORE: Final = GIB
"""Every token reads all weights. A core of a current machine reads some 15 GiB/s (measured: 1.1 GB of weights, 30
tokens/s on two), so that one for each of these gives more than 10 tokens/s."""


@dataclass(frozen=True, slots=True)
class ImageSize:
    """Bytes of an image: of its file, and of what the ramdisks in it hold when they are unpacked."""

    file: int
    unpacked: int


ASSUMED_IMAGE: Final = ImageSize(file=300_000_000, unpacked=300_000_000)
"""Where no image is named: the most that ours may have without weights."""


@dataclass(frozen=True, slots=True)
class Plan:
    """What an enclave needs. It is the largest of three: what stands in memory while it runs, what its boot takes, and
    what nitro-cli asks for.
    """

    parts: tuple[Part, ...]
    """Of what stands in memory while it runs, in bytes."""
    boot: int
    """Bytes: the root file system may take half of the memory, and the archive it comes from lies beside it."""
    demanded: int
    """Bytes that nitro-cli asks for."""
    cpus: int
    """Even: whole cores of two threads."""

    @property
    def running(self) -> int:
        """Bytes."""
        return sum(part.size for part in self.parts)

    @property
    def memory(self) -> int:
        """MiB, as nitro-cli's ``--memory`` and the allocator's ``memory_mib``: whole huge pages."""
        return rounded(max(self.running, self.boot, self.demanded)) // MIB

    @property
    def decided_by(self) -> str:
        """Which of the three it is."""
        most = max(self.running, self.boot, self.demanded)
        return {self.running: "running", self.boot: "boot", self.demanded: "nitro-cli"}[most]

    @property
    def hugepages(self) -> tuple[int, int]:
        """Pages of 1 GiB and of 2 MiB, as AWS's allocator divides it."""
        size = self.memory * MIB
        return size // GIB, size % GIB // HUGE_PAGE


def plan(shape: ModelShape, work: Work, image: ImageSize = ASSUMED_IMAGE, *, cpus: int | None = None) -> Plan:
    """``cpus`` is what somebody wants; an odd number is made even. Raises SizingError ``context_exceeded``."""
    parts = (
        *engine_memory(shape, work).parts,
        Part("image", image.unpacked, "the root file system, in memory"),
    )
    wanted = 2 * -(-shape.weights // WEIGHTS_OF_A_CORE) if cpus is None else cpus
    return Plan(
        (*parts, kernel_beside(sum(part.size for part in parts))),
        boot=2 * image.unpacked + image.file,
        demanded=EIF_FACTOR * image.file,
        cpus=rounded(min(wanted, MAX_CPUS) if cpus is None else max(cpus, 1), 2),
    )


def rounded(size: int, step: int = HUGE_PAGE) -> int:
    """Up to the next multiple of ``step``."""
    return -(-size // step) * step
