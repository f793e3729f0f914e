"""The boot of an enclave, told to a person while it happens."""

from __future__ import annotations

from types import TracebackType
from typing import Any, Self

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

PHASES = {
    "HASHING": "hashing the model's file",
    "MEASURING": "measuring the enclave's code and configuration",
    "STARTING": "starting the enclave and its NSM",
    "ENTROPY": "entropy checked",
    "CONFIGURED": "configuration committed to PCR17 and locked",
    "MODEL_COMMITTED": "model committed to PCR16 and locked",
    "KEYED": "channel keys made",
    "SERVING": "engine loaded: serving",
    "RESTARTING": "the enclave died: booting it again",
}


class BootProgress:
    """Lines for phases, and a bar for the weights where there is a terminal. Silent when ``quiet``."""

    def __init__(self, console: Console, *, quiet: bool) -> None:
        self._console = console
        self._quiet = quiet
        columns = (TextColumn("  {task.description}"), BarColumn(), DownloadColumn(), TimeElapsedColumn())
        self._bar = Progress(*columns, console=console, transient=True, disable=quiet or not console.is_terminal)
        self._shown: tuple[str, TaskID] | None = None

    def __enter__(self) -> Self:
        self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._bar.stop()

    def phase(self, phase: str) -> None:
        if not self._quiet and phase in PHASES:
            self._console.print(f"  [dim]{phase:<16}[/dim] {PHASES[phase]}")

    def hashing(self, done: int, total: int) -> None:
        """So many of the model's bytes have been hashed."""
        self._show("hashing the model's file", done, total)

    def event(self, event: dict[str, Any]) -> None:
        """An event of the enclave's own: the weights' arrival. (Its phases come through :meth:`phase`.)"""
        if event["event"] == "weights":
            self._show("weights into sealed memory", event["received"], event["total"])

    def _show(self, what: str, done: int, total: int) -> None:
        """One bar at a time: the one before goes when the next begins."""
        if self._shown is None or self._shown[0] != what:
            if self._shown is not None:
                self._bar.remove_task(self._shown[1])
            self._shown = (what, self._bar.add_task(what, total=total))
        self._bar.update(self._shown[1], completed=done, total=total)
