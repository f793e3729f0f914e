"""What ``scripts/machine`` has made for this user: kernel, init, QEMU and its vsock device, each in a folder of its own
whose name says what went in. An entry is renamed to its place when it is whole.

What is in the cache gets into images, and runs as its user. So it is believed only where nobody but this user, and
root, could have put it there.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import ClassVar

from attestation.errors import StrongroomError


class CacheError(StrongroomError):
    """The cache cannot be used. Codes: ``unsafe_cache``."""

    exit_code: ClassVar[int] = 2


def cache_home() -> Path:
    """In the cache folder of the XDG base directory specification."""
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "strongroom"


def entries(script: str, file: str) -> list[Path]:
    """The folders of ``scripts/machine/SCRIPT`` that hold ``file``, the newest first.

    Raises CacheError ``unsafe_cache`` when another user, or a group, can write to one of them or to the cache itself.
    """
    home = cache_home()
    found = [entry for entry in home.glob(f"{script}-" + "[0-9a-f]" * 16) if (entry / file).is_file()]
    if found:
        _require_own(home)
    for entry in found:
        for path in (entry, *_within(entry)):
            _require_own(path)
    return sorted(found, key=lambda entry: (entry.stat().st_mtime_ns, entry), reverse=True)


def newest(script: str, file: str) -> Path | None:
    """The first of :func:`entries`, if there is one. Raises as it does."""
    return next(iter(entries(script, file)), None)


def _within(folder: Path) -> Iterator[Path]:
    for where, folders, files in os.walk(folder):
        yield from (Path(where, name) for name in (*folders, *files))


def _require_own(path: Path) -> None:
    status = path.stat()
    others_write = status.st_mode & (stat.S_IWGRP | stat.S_IWOTH)
    if others_write or status.st_uid not in (0, os.geteuid()):
        raise CacheError(
            "unsafe_cache",
            f"{str(path)!a}: others than this user can write there; remove it, or set XDG_CACHE_HOME to a folder of "
            "your own",
            expected=f"uid {os.geteuid()} or 0, written to by nobody else",
            got=f"uid {status.st_uid}, mode {stat.filemode(status.st_mode)}",
        )
