"""What ``make bench`` measures. Every row is held against a named peer in the same run; see bench/README.md."""

from __future__ import annotations

from dataclasses import dataclass


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
