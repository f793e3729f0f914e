"""What a person sees of a boot."""

from __future__ import annotations

from io import StringIO

import pytest
from rich.console import Console

from enclave.log import Phase
from parent.progress import PHASES, BootProgress


def shown(*, quiet: bool = False, terminal: bool = False) -> tuple[StringIO, BootProgress]:
    out = StringIO()
    # The terminal of whoever runs the tests may be a dumb one, on which nothing is drawn.
    console = Console(file=out, force_terminal=terminal, width=120, color_system=None, _environ={"TERM": "xterm"})
    return out, BootProgress(console, quiet=quiet)


def test_every_phase_of_a_good_boot_has_words() -> None:
    assert {phase.value for phase in Phase} - {"COLD", "HALTED"} <= PHASES.keys()


@pytest.mark.parametrize("phase", PHASES)
def test_a_phase_is_a_line_with_its_name(phase: str) -> None:
    out, progress = shown()
    with progress:
        progress.phase(phase)
    assert out.getvalue().split(maxsplit=1) == [phase, f"{PHASES[phase]}\n"]


def test_a_phase_without_words_is_no_line() -> None:
    out, progress = shown()
    with progress:
        progress.phase("[red]UNKNOWN[/red]")
    assert out.getvalue() == ""


def test_weights_are_a_bar_on_a_terminal_alone() -> None:
    for terminal in (True, False):
        out, progress = shown(terminal=terminal)
        with progress:
            for received in (1, 50, 100):
                progress.event({"event": "weights", "received": received, "total": 100})
        assert ("weights into sealed memory" in out.getvalue()) == terminal


def test_other_events_are_not_shown() -> None:
    out, progress = shown()
    with progress:
        progress.event({"event": "key_offered", "key_id": "00"})
    assert out.getvalue() == ""


def test_quiet_is_silent() -> None:
    out, progress = shown(quiet=True, terminal=True)
    with progress:
        progress.phase("SERVING")
        progress.event({"event": "weights", "received": 1, "total": 2})
    assert out.getvalue() == ""
