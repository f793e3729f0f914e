"""Verdicts and answers for people: tables on a terminal, plain text elsewhere."""

from __future__ import annotations

from collections.abc import Iterable

from rich.console import Console
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from attestation.checks import Check, Status
from attestation.verifier import AttestationResult

MARKS = {
    Status.PASSED: ("ok", "green"),
    Status.FAILED: ("FAILED", "bold red"),
    Status.IGNORED: ("ignored", "yellow"),
    Status.NOT_REACHED: ("not reached", "dim"),
}
LONGEST_VALUE = 46


def verdict_table(checks: Iterable[Check], *, whole: bool = False) -> Table:
    """Every step of PROTOCOL.md section 3, with what was expected and got. Values that are equal stand once; long ones are cut unless ``whole``."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("step", justify="right")
    for title in ("check", "verdict", "expected", "got"):
        table.add_column(title, overflow="fold")
    for check in checks:
        mark, style = MARKS[check.status]
        expected, got = check.expected or "", check.got or ""
        if check.status is Status.IGNORED:
            expected = f"({check.explanation})" if check.explanation else expected
        if expected and expected == got:
            got = "the same"
        cells = (expected, got) if whole or check.status is Status.FAILED else (shorten(expected), shorten(got))
        table.add_row(str(check.step), check.name, Text(mark, style), *(escape(cell) for cell in cells))
    return table


def shorten(text: str) -> str:
    return text if len(text) <= LONGEST_VALUE else f"{text[: LONGEST_VALUE - 9]}…{text[-8:]}"


def verdict_line(result: AttestationResult) -> Text:
    line = Text("ACCEPTED", "bold green")
    for label in sorted(result.labels):
        line.append(f"  {label}", "bold yellow")
    line.append(f"  release {result.release or 'none'}, valid for {result.valid_seconds:.0f} s", "default")
    return line


def warn_of_labels(console: Console, result: AttestationResult) -> None:
    """What must be said whenever a result is used: that the enclave is emulated, or in debug mode."""
    for label in sorted(result.labels):
        text = {
            "EMULATED": "EMULATED: no hardware vouches for this enclave; whoever runs this machine can read the prompt.",
            "DEBUG": "DEBUG: this enclave shows its memory to its host.",
        }[label.value]
        console.print(Text(text, "bold yellow"), highlight=False)
