"""Verdicts for people: a table that fits its terminal, or 120 columns where there is none."""

from __future__ import annotations

import contextlib
import os
import re
import textwrap
from collections.abc import Callable, Iterable, Iterator, Sequence

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.text import Text

from attestation.checks import KEY_STEPS, QUESTIONS, STEPS, Check, Label, Status
from attestation.keyrelease import KeyRelease
from attestation.verifier import ArchivedResult, AttestationResult, DocumentResult

WIDTH_WITHOUT_TERMINAL = 120
NARROW = 90
"""Columns below which a table has no room for two values beside each other: they stand below their check."""

MIN_TEXT, MAX_TEXT = 40, 120
"""Columns of a text that is wrapped."""

NAMES = STEPS | KEY_STEPS
WHO_MAY_CHANGE = 20
"""The step that finds a key LOCKED or MUTABLE-BY somebody."""
MARKS = {
    Status.PASSED: ("ok", "green"),
    Status.FAILED: ("FAILED", "bold red"),
    Status.IGNORED: ("ignored", "yellow"),
    Status.NOT_REACHED: ("not reached", "dim"),
    Status.NOT_APPLICABLE: ("n/a", "dim"),
}
WARNINGS = {
    Label.ARCHIVED: "ARCHIVED: judged at its own time, by what was known then; it says nothing about now.",
    Label.EMULATED: "EMULATED: no hardware vouches for this enclave; who runs such a one can read what reaches it.",
    Label.DEBUG: "DEBUG: this enclave shows its memory to its host.",
}
Verdict = AttestationResult | DocumentResult | ArchivedResult
TITLES = ("step", "check", "verdict", "expected", "got")
_GAP = "  "
_DIGEST = re.compile(r"[0-9a-f]{32,}")
_SHORT_DIGEST = (8, 6)
"""Digits kept at a digest's beginning and end."""


def open_console(*, stderr: bool = False) -> Console:
    console = Console(stderr=stderr, highlight=False, markup=False, emoji=False)
    if not console.is_terminal and "COLUMNS" not in os.environ:
        console.width = WIDTH_WITHOUT_TERMINAL
    return console


@contextlib.contextmanager
def hashing_bar(console: Console, what: str) -> Iterator[Callable[[int, int], None]]:
    """Shows, on a terminal, how much of a file has been hashed; ``what`` it is."""
    columns = (TextColumn("  {task.description}"), BarColumn(), DownloadColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task(what, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


@contextlib.contextmanager
def waiting(console: Console, what: str) -> Iterator[None]:
    """Shows, on a terminal, that something goes on and for how long; ``what`` it is."""
    columns = (SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        bar.add_task(what, total=None)
        yield


def show_verdict(console: Console, checks: Iterable[Check], *, whole: bool = False) -> None:
    """Every step of PROTOCOL.md section 3 on a line, with what was expected and got, on a narrow console below it; then
    each failure with both whole.

    A value that is as expected stands once. Long values are shortened, unless ``whole``.
    """
    checks = tuple(checks)
    if console.width < NARROW and not whole:
        _show_stacked(console, checks)
    else:
        _show_table(console, checks, whole)
    for check in checks:
        if check.status is Status.FAILED:
            _show_failure(console, check)


def _show_stacked(console: Console, checks: Iterable[Check]) -> None:
    for check in checks:
        mark, style = MARKS[check.status]
        room = console.width - 6 - len(_GAP) - len(mark)
        console.print(Text(f"{check.step:>4}{_GAP}{_cut(check.name, room)}{_GAP}").append(mark, style), soft_wrap=True)
        for title, value in zip(TITLES[3:], _values(check, whole=False), strict=True):
            if value:
                console.print(Text(f"{'':6}{title:<8}{_GAP}{_cut(value, console.width - 16)}"), soft_wrap=True)


def _show_table(console: Console, checks: Sequence[Check], whole: bool) -> None:
    rows = [TITLES, *((str(each.step), each.name, MARKS[each.status][0], *_values(each, whole)) for each in checks)]
    sizes = [max(map(len, column)) for column in zip(*rows, strict=True)]
    if not whole:
        sizes[3:] = _share(console.width - sum(sizes[:3]) - 4 * len(_GAP), *sizes[3:])
    styles = ["bold", *(MARKS[each.status][1] for each in checks)]
    for row, style in zip(rows, styles, strict=True):
        step, name, mark, expected, got = (_cut(cell, size).ljust(size) for cell, size in zip(row, sizes, strict=True))
        line = Text(_GAP.join((step.strip().rjust(sizes[0]), name, "")), "bold" if row is TITLES else "")
        line.append(mark, style).append(_GAP.join(("", expected, got)).rstrip(), "bold" if row is TITLES else "")
        console.print(line, soft_wrap=True)


def _values(check: Check, whole: bool) -> tuple[str, str]:
    expected, got = (value if whole else shorten(value) for value in (check.expected or "", check.got or ""))
    if check.status in (Status.IGNORED, Status.NOT_APPLICABLE) and check.explanation:
        expected = f"({check.explanation})"
    same = check.expected is not None and check.expected == check.got
    return printable(expected), "the same" if same else printable(got)


def _show_failure(console: Console, check: Check) -> None:
    console.print(Text(f"\n{check.name} [{check.code}]: {printable(check.explanation or '')}", "red"), soft_wrap=True)
    for title, value in (("expected", check.expected), ("got", check.got)):
        if value is not None:
            console.print(Text(f"  {title:<8}  {printable(value)}"), soft_wrap=True)


def _share(width: int, first: int, second: int) -> tuple[int, int]:
    """Divides ``width`` between two columns: what one does not need is the other's."""
    half = max(width // 2, 8)
    if first <= half:
        return first, min(second, max(width - first, half))
    if second <= half:
        return max(width - second, half), second
    return half, half


def _cut(text: str, size: int) -> str:
    return text if len(text) <= size else f"{text[: size - 1]}…"


def shorten(text: str) -> str:
    """Digests within ``text`` by their first and last digits."""
    first, last = _SHORT_DIGEST
    return _DIGEST.sub(lambda match: f"{match[0][:first]}…{match[0][-last:]}", text)


def wrapped(console: Console, text: str, *, first: str = "", indent: str = "") -> list[str]:
    """Lines that fit: the first begins with ``first``, the others with ``indent``. A digest is not broken: somebody may
    want to copy it.
    """
    return textwrap.wrap(
        printable(text),
        min(max(console.width, MIN_TEXT), MAX_TEXT),
        initial_indent=first,
        subsequent_indent=indent,
        break_long_words=False,
        break_on_hyphens=False,
    )


def printable(text: str) -> str:
    """What comes from the other side of a wire does not move a terminal's cursor."""
    return "".join(each if each.isprintable() else ascii(each)[1:-1] for each in text)


def explain_verdict(console: Console, checks: Iterable[Check]) -> None:
    """Every step with the question that it asks, and each check of it with expected and got, whole."""
    shown = 0
    for check in checks:
        if check.step != shown:
            shown = check.step
            console.print(Text(f"\n{shown:>2}  {NAMES[shown]}", "bold"), soft_wrap=True)
            console.print(Text(f"    {QUESTIONS[shown]}"), soft_wrap=True)
        mark, style = MARKS[check.status]
        line = Text("    ").append(mark, style)
        if check.name != NAMES[check.step]:
            line.append(f"  {check.name}")
        if check.code is not None:
            line.append(f"  [{check.code}]")
        if check.explanation is not None:
            line.append(f"  {printable(check.explanation)}")
        console.print(line, soft_wrap=True)
        for title, value in (("expected", check.expected), ("got", check.got)):
            if value is not None:
                console.print(Text(f"      {title:<8}  {printable(value)}"), soft_wrap=True)


def verdict_line(result: Verdict) -> Text:
    line = Text("ACCEPTED WHEN MADE" if isinstance(result, ArchivedResult) else "ACCEPTED", "bold green")
    for label in sorted(result.labels):
        line.append(f"  {label}", "bold yellow")
    line.append(f"  release {result.release or 'none'}, ", "default")
    if isinstance(result, ArchivedResult):
        line.append(f"made at {result.claims.timestamp.isoformat(timespec='seconds')}", "default")
    else:
        line.append(f"valid for {result.valid_seconds:.0f} s", "default")
    for check in result.checks:
        if check.step == WHO_MAY_CHANGE:
            which = check.name.removeprefix(NAMES[WHO_MAY_CHANGE])
            line.append(f", key{which} {printable(check.got or '')}", "default")
    return line


def refusal_line(message: str, code: str, labels: Iterable[Label]) -> Text:
    line = Text("REFUSED", "bold red")
    for label in sorted(labels):
        line.append(f"  {label}", "bold yellow")
    return line.append(f"  {printable(message)} [{code}]", "bold red")


def warn_of_labels(console: Console, result: Verdict | KeyRelease) -> None:
    """What must be said whenever a result is used: that it is archived, the enclave emulated or in debug mode."""
    for label in sorted(result.labels):
        console.print(Text(WARNINGS[label], "bold yellow"), soft_wrap=True)
