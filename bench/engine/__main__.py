"""``make bench-engine``: our engine through the whole attested path against llama.cpp's own servers.

python -m bench.engine                                                everything, hours: 7 runs of each side
python -m bench.engine --part streams --runs 3 --models smollm2       some of it
python -m bench.engine --peers                                        the peers' environments are made, no more
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Final

from bench import Row
from bench.__main__ import machine, verdict
from bench.engine import latency, residence, threads, throughput
from bench.engine.measuring import SMOLLM2, Bench
from bench.engine.peers import WORK, Build, PeerError, say
from bench.model_shapes import SHAPES

PARTS: Final[Mapping[str, Callable[[Bench], Iterator[Row]]]] = {
    "streams": throughput.streams,
    "portable": throughput.portable,
    "prefill": throughput.prefill,
    "first-token": latency.first_token,
    "mixed": latency.mixed,
    "turns": latency.second_turns,
    "memory": residence.memory,
    "growth": throughput.growth,
    "neighbours": threads.neighbours,
    "speculation": throughput.speculation,
    "profile": threads.profile,
}
COLUMNS: Final = ("what", "ours", "peer", "compared", "bar", "holds")


def main(arguments: list[str] | None = None) -> int:
    """0 when every bar holds, 1 when one does not, 2 when something could not be measured, 130 when interrupted."""
    parser = argparse.ArgumentParser(
        prog="python -m bench.engine",
        description=(__doc__ or "").split("\n\n")[0],
        epilog=(__doc__ or "").split("\n\n", 1)[1],
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--part", action="append", choices=PARTS, metavar="PART", help=f"of {', '.join(PARTS)}; repeatable; default all"
    )
    parser.add_argument("--runs", type=int, default=7, help="of each side, alternating (default: 7)")
    parser.add_argument("--tokens", type=int, default=96, help="of each answer (default: 96)")
    parser.add_argument(
        "--models", nargs="+", default=[SMOLLM2, "1.5b"], choices=[SMOLLM2, *SHAPES], help="default: smollm2 1.5b"
    )
    parser.add_argument("--longest", type=int, default=8192, help="context of the part growth (default: 8192)")
    parser.add_argument("--no-openmp", action="store_true", help="without llama-server's build with OpenMP")
    parser.add_argument("--peers", action="store_true", help="make the peers' environments and the models, and end")
    parser.add_argument("--out", type=Path, default=WORK, help="folder for engine.json and engine.md (build/bench)")
    options = parser.parse_args(arguments)
    # As Ctrl-C, which asyncio takes at a place where servers can still be stopped.
    signal.signal(signal.SIGTERM, lambda number, frame: signal.raise_signal(signal.SIGINT))
    bench = Bench(
        runs=options.runs,
        tokens=options.tokens,
        models=options.models,
        longest=options.longest,
        openmp=not options.no_openmp,
    )
    begun, load, rows, failures = time.strftime("%Y-%m-%d %H:%M"), os.getloadavg()[0], list[Row](), list[str]()
    if options.peers:
        return _prepare(bench)
    for part in options.part or PARTS:
        say(f"{part} ...")
        bench.part, started = part, time.monotonic()
        try:
            for row in PARTS[part](bench):
                rows.append(row)
                say(f"{row.what}: {row.ours} | {row.peer} | {row.compared} | {row.bar} {verdict(row)}")
        except Exception as error:  # one part that breaks costs itself, not the hours of the others
            traceback.print_exception(error)
            failures.append(part)
            rows.append(Row(part, "not measured to its end", repr(error), bar="for the record"))
        except KeyboardInterrupt:
            say(f"{part} was interrupted")
            return 130
        say(f"{part} took {time.monotonic() - started:.0f} s")
        # After each part: a run of hours that is broken off has shown what it had.
        write(options.out, bench, rows, f"{begun}, load average at the beginning {load:.1f}")
    missed = any(row.holds is False for row in rows)
    return 2 if failures else int(missed)


def _prepare(bench: Bench) -> int:
    try:
        for model in bench.models:
            say(f"{model}: {bench.model(model)}")
        for build in _builds(bench):
            say(f"{build.name}: {build.version}; {build.flags}; {build.features}")
    except PeerError as error:
        say(str(error))
        return 2
    return 0


def _builds(bench: Bench) -> Iterator[Build]:
    yield bench.native
    yield bench.portable
    yield bench.llama_server
    if bench.openmp:
        yield bench.llama_server_openmp
    yield bench.llama_cpp_server


def write(folder: Path, bench: Bench, rows: list[Row], when: str) -> None:
    """``engine.json`` with the figures of all runs, and ``engine.md`` with the table."""
    folder.mkdir(parents=True, exist_ok=True)
    report = {
        "machine": machine(),
        "when": when,
        "runs": bench.runs,
        "tokens": bench.tokens,
        "builds": {build: asdict(made) for build, made in made_builds(bench).items()},
        "servers": [asdict(used) for used in bench.used],
        "rows": [asdict(row) for row in rows],
        "figures": bench.figures,
    }
    (folder / "engine.json").write_text(json.dumps(report, indent=1) + "\n")
    (folder / "engine.md").write_text(markdown(bench, rows, when))


def made_builds(bench: Bench) -> dict[str, Build]:
    """Those that this run has used."""
    return {value.name: value for value in vars(bench).values() if isinstance(value, Build)}


def markdown(bench: Bench, rows: list[Row], when: str) -> str:
    """The table, and below it what the figures belong to."""
    lines = [
        f"Machine: {machine()}. {when}; at the end {os.getloadavg()[0]:.1f}. Medians of {bench.runs} runs of each "
        "side, A-B-B-A, least and greatest in brackets; a ratio is the median of the runs' own.",
        "",
        "| " + " | ".join(COLUMNS) + " |",
        "|" + "---|" * len(COLUMNS),
    ]
    for row in rows:
        cells = (row.what, row.ours, row.peer, row.compared, row.bar, verdict(row))
        lines.append("| " + " | ".join(cell.replace("|", "\\|").replace("\n", " ") for cell in cells) + " |")
    lines += ["", "Builds of llama.cpp:", ""]
    for name, build in made_builds(bench).items():
        lines.append(f"- `{name}`: {build.version}; CMake `{build.flags}`; it says of itself: `{build.features}`")
    lines += ["", "Servers, by part:", ""]
    for used in bench.used:
        lines.append(
            f"- {used.part}, {used.side}, on `{used.build}`: " + "; ".join(f"`{each}`" for each in used.commands)
        )
    return "\n".join([*lines, ""])


if __name__ == "__main__":
    sys.exit(main())
