"""What ``make bench`` measures. Every row is held against a named peer in the same run; see bench/README.md."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, slots=True)
class Row:
    """One line of the table: a figure of ours, the peer's, and how they compare."""

    what: str
    ours: str
    peer: str
    """The peer's figure with its name, or "for the record"."""
    compared: str = ""
    """The ratio or difference."""
    bar: str = ""
    holds: bool | None = None
    """Whether the bar holds; None for a row that is for the record."""


def peak_memory() -> int:
    """Bytes that this process had resident at most. Where the process that started it had more, ``getrusage`` says
    that.
    """
    fields = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(fields["VmHWM"].removesuffix("kB")) * 1024
