"""What ``scripts/machine`` has made for this user: kernel, init, QEMU and its vsock device, each in a folder of its own
whose name says what went in. An entry is renamed to its place when it is whole.
"""

from __future__ import annotations

import os
from pathlib import Path


def cache_home() -> Path:
    """In the cache folder of the XDG base directory specification."""
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "strongroom"


def newest(script: str, file: str) -> Path | None:
    """The folder of the newest entry of ``scripts/machine/SCRIPT`` that holds ``file``."""
    entries = [entry for entry in cache_home().glob(f"{script}-" + "[0-9a-f]" * 16) if (entry / file).is_file()]
    return max(entries, key=lambda entry: (entry.stat().st_mtime_ns, entry), default=None)
