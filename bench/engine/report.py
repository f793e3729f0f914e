"""What a part of the benchmark came to: kept as one JSON file for each part and model, so that hours of measuring can
be had in pieces, and shown together as one page.

Reports that were kept are ``bench/recorded``, with the figures of every run, and their page is ``bench/ENGINE.md``
(``scripts/record-bench --engine``).
"""

from __future__ import annotations

import json
import os
import subprocess
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Final

from bench import Row
from bench.__main__ import machine, verdict
from bench.engine.measuring import Bench, Used
from bench.engine.peers import ROOT, Build

COLUMNS: Final = ("what", "ours", "peer", "compared", "bar", "holds")
_FOREWORD: Final = """\
# The engine against llama.cpp's own servers

Written by `make bench-engine` (`python -m bench.engine`, one part at a time with `--part`). Ours is the whole attested
path: streaming client of the OpenAI endpoint, gateway (`strongroom serve`), proxy, RPC, sealed channel, engine process.
Peers are their own endpoints; one load generator (`bench/engine/load.py`) drives all of them as streaming clients with
the same distinct prompts, greedy, to the same number of tokens. Where a row says nothing else no prompt is kept on
either side. Medians of the runs of each side, A-B-B-A after one round that warms up, least and greatest in brackets; a
ratio is the median of the runs' own.
"""


@dataclass(frozen=True, slots=True)
class Report:
    """One part, measured with one model."""

    part: str
    model: str
    machine: str
    when: str
    commit: str
    """Of the checkout that was measured; ``-dirty`` behind it where that held more."""
    load: float
    """The machine's load average before."""
    seconds: float
    runs: int
    tokens: int
    builds: Mapping[str, Build]
    servers: Sequence[Used]
    rows: Sequence[Row]
    figures: Sequence[Mapping[str, object]]
    """Of every run."""

    def save(self, folder: Path) -> Path:
        folder.mkdir(parents=True, exist_ok=True)
        path = report_path(folder, self.part, self.model)
        path.write_text(json.dumps(asdict(self), indent=1) + "\n")
        return path

    @classmethod
    def read(cls, path: Path) -> Report:
        """Raises OSError, and ValueError, KeyError or TypeError for what :meth:`save` has not written."""
        fields: dict[str, Any] = json.loads(path.read_text())
        fields |= {
            "builds": {
                name: Build(**build | {"program": tuple(build["program"])}) for name, build in fields["builds"].items()
            },
            "servers": [Used(**used | {"commands": tuple(used["commands"])}) for used in fields["servers"]],
            "rows": [Row(**row) for row in fields["rows"]],
        }
        return cls(**fields)


def report_path(folder: Path, part: str, model: str) -> Path:
    return folder / f"{part}-{model}.json"


class Watch:
    """From here to :meth:`report` is a part's time."""

    def __init__(self) -> None:
        self._when = time.strftime("%Y-%m-%d %H:%M")
        self._commit = _commit()
        self._load = os.getloadavg()[0]
        self._begun = time.monotonic()

    def report(self, bench: Bench, rows: Sequence[Row]) -> Report:
        names = {used.build for used in bench.used}
        return Report(
            bench.part,
            bench.model,
            machine(),
            self._when,
            self._commit,
            self._load,
            time.monotonic() - self._begun,
            bench.runs,
            bench.tokens,
            # Where its program is belongs to this machine.
            {build.name: replace(build, program=()) for build in bench.builds if build.name in names},
            bench.used,
            rows,
            bench.figures,
        )


def _commit() -> str:
    described = subprocess.run(
        ["git", "-C", ROOT, "describe", "--always", "--dirty", "--exclude=*"], capture_output=True, text=True
    )
    return described.stdout.strip() or "not known"


def write_page(page: Path, folder: Path, parts: Iterable[str], models: Sequence[str]) -> None:
    """Of those of ``parts`` and ``models`` that have a report in the folder, in this order."""
    paths = [report_path(folder, part, model) for part in parts for model in models]
    reports = [Report.read(path) for path in paths if path.is_file()]
    page.write_text("\n".join(_page(reports)))


def _page(reports: Sequence[Report]) -> Iterator[str]:
    yield _FOREWORD
    barred = [row for report in reports for row in report.rows if row.holds is not None]
    if barred:
        held = sum(row.holds is True for row in barred)
        yield f"## Bars: {held} of {len(barred)} hold\n"
        yield from _table(barred)
    builds: dict[str, Build] = {}
    for report in reports:
        builds |= report.builds
        yield f"## {report.part}, {report.model}\n"
        yield (
            f"{report.when}, {report.seconds / 60:.0f} minutes, {report.runs} runs of each side, commit "
            f"{report.commit}. {report.machine}; load average {report.load:.1f} before.\n"
        )
        yield from _table(report.rows)
        yield from (f"- {used.side}, on `{used.build}`: {_commands(used)}" for used in report.servers)
        yield ""
    yield "## Builds of llama.cpp\n"
    for name, build in builds.items():
        yield f"- `{name}`: {build.version}; CMake `{build.flags}`; it says of itself: `{build.features}`"
    yield ""


def _table(rows: Iterable[Row]) -> Iterator[str]:
    yield "| " + " | ".join(COLUMNS) + " |"
    yield "|" + "---|" * len(COLUMNS)
    for row in rows:
        cells = (row.what, row.ours, row.peer, row.compared, row.bar, verdict(row))
        yield "| " + " | ".join(cell.replace("|", "\\|").replace("\n", " ") for cell in cells) + " |"
    yield ""


def _commands(used: Used) -> str:
    return "; ".join(f"`{each}`" for each in used.commands)
