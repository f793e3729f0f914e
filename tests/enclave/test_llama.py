"""llama.cpp's libraries, as the engine process has them."""

from __future__ import annotations

import subprocess
import sys
from collections import Counter

LOADED = """
import enclave.llama
paths = {line.split(maxsplit=5)[5].strip() for line in open("/proc/self/maps") if ".so" in line}
print(*(path.rpartition("/")[2].partition(".so")[0] for path in paths))
"""


def test_each_library_is_loaded_once() -> None:
    """A second copy of ggml has tables of its own, which nobody fills: threads that it starts compute zeros."""
    run = subprocess.run([sys.executable, "-B", "-c", LOADED], check=True, stdout=subprocess.PIPE, text=True)
    loaded = Counter(name for name in run.stdout.split() if name.startswith(("libggml", "libllama")))
    assert loaded == dict.fromkeys(("libggml", "libggml-base", "libggml-cpu", "libllama"), 1)
