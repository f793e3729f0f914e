"""The CPU features that llama.cpp was compiled for, against those that this machine has.

An instruction that a CPU does not know ends the engine without a word. So an image says beside its libraries what they
may use (Dockerfile.enclave asks the compiler), and the boot compares before it fetches a model for them. Where nothing
is said, llama.cpp was compiled on the machine that runs it.
"""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path

from attestation.errors import StrongroomError

CPUINFO = Path("/proc/cpuinfo")
FEATURES = "cpu-features"
"""A file in llama_cpp's ``lib``: the kernel's names of features, one a line."""
MAX_FEATURES_SIZE = 4096

_FLAGS = re.compile(r"^(?:flags|Features)[ \t]*:(.*)$", re.MULTILINE)
"""proc(5): ``flags`` on x86_64, ``Features`` on aarch64; once for each CPU."""


class CpuError(StrongroomError):
    """llama.cpp must not be loaded here. Codes: ``cpu_lacks_features``, ``bad_cpu_features`` (the image's file is
    unusable)."""


def stated_features() -> Path | None:
    """The file of the llama.cpp that the engine will load; None where there is none. Imports nothing of it."""
    spec = importlib.util.find_spec("llama_cpp")
    for folder in spec.submodule_search_locations or () if spec else ():
        path = Path(folder, "lib", FEATURES)
        if path.exists():
            return path
    return None


def check_cpu(stated: Path | None, cpuinfo: Path = CPUINFO) -> None:
    """Every feature in ``stated`` is one of every CPU. Raises CpuError, or OSError when a file cannot be read."""
    if stated is None:
        return
    with stated.open("rb") as file:
        text = file.read(MAX_FEATURES_SIZE + 1)
    if len(text) > MAX_FEATURES_SIZE or not re.fullmatch(rb"([a-z0-9_]{1,32}\n)+", text):
        raise CpuError(
            "bad_cpu_features", "the image's list of CPU features cannot be read", expected="one name a line"
        )
    needed = set(text.decode("ascii").split())
    cpus = [set(flags.split()) for flags in _FLAGS.findall(cpuinfo.read_text())]
    lacking = needed - set.intersection(*cpus) if cpus else needed
    if lacking:
        raise CpuError(
            "cpu_lacks_features",
            "this machine's CPU lacks what the image's llama.cpp was compiled for: run it on another instance type, "
            "or build the portable variant",
            expected=" ".join(sorted(needed)),
            got=f"without {' '.join(sorted(lacking))}",
        )
