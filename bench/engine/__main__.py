"""``make bench-engine``: our engine through the whole attested path against llama.cpp's own servers.

python -m bench.engine                                                everything, hours: 7 runs of each side
python -m bench.engine --part streams --runs 3 --models smollm2       some of it
python -m bench.engine --peers                                        the peers' environments are made, no more
python -m bench.engine --out bench/recorded --page bench/ENGINE.md    nothing: the page of reports that were kept

Each part leaves a file of its own for each model, and engine.md shows the last run of every one.
"""

from __future__ import annotations

import argparse
import signal
import sys
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Final

from bench import Row
from bench.__main__ import verdict
from bench.engine import latency, residence, threads, throughput
from bench.engine.measuring import SMOLLM2, Bench
from bench.engine.peers import WORK, Build, PeerError, say
from bench.engine.report import Watch, write_page
from bench.model_shapes import SHAPES

MODELS: Final = (SMOLLM2, *SHAPES)
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

ONE_MODEL: Final = frozenset({"neighbours", "speculation"})
"""Parts to which another model adds nothing: the first is enough."""


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
    parser.add_argument(
        "--tokens",
        type=int,
        default=96,
        help="of each answer; half as many of a model other than smollm2 (default: 96)",
    )
    parser.add_argument("--models", nargs="+", default=[SMOLLM2, "1.5b"], choices=MODELS, help="default: smollm2 1.5b")
    parser.add_argument("--longest", type=int, default=8192, help="context of the part growth (default: 8192)")
    parser.add_argument("--no-openmp", action="store_true", help="without llama-server's build with OpenMP")
    parser.add_argument("--peers", action="store_true", help="make the peers' environments and the models, and end")
    parser.add_argument(
        "--out",
        type=Path,
        default=WORK / "engine",
        help="folder for PART-MODEL.json and engine.md (build/bench/engine)",
    )
    parser.add_argument("--page", type=Path, help="write the page of the reports in --out there, and end")
    options = parser.parse_args(arguments)
    if options.page:
        write_page(options.page, options.out, PARTS, MODELS)
        return 0
    # As Ctrl-C, which asyncio takes at a place where servers can still be stopped; a shell's background job ignores it.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, lambda number, frame: signal.raise_signal(signal.SIGINT))
    bench = Bench(runs=options.runs, tokens=options.tokens, longest=options.longest, openmp=not options.no_openmp)
    if options.peers:
        return _prepare(bench, options.models)
    missed, failures = False, list[str]()
    for part, model in _order(options.part or PARTS, options.models):
        what = f"{part}, {model}"
        say(f"{what} ...")
        bench.begin(part, model)
        watch, rows = Watch(), list[Row]()
        try:
            for row in PARTS[part](bench):
                rows.append(row)
                say(f"{row.what}: {row.ours} | {row.peer} | {row.compared} | {row.bar} {verdict(row)}")
        except Exception as error:  # one part that breaks costs itself, not the hours of the others
            traceback.print_exception(error)
            failures.append(what)
            rows.append(Row("not measured to its end", "", repr(error), bar="for the record"))
        except KeyboardInterrupt:
            say(f"{what} was interrupted")
            return 130
        report = watch.report(bench, rows)
        report.save(options.out)
        # After each part: a run of hours that is broken off has shown what it had.
        page = options.out / "engine.md"
        write_page(page, options.out, PARTS, MODELS)
        missed = missed or any(row.holds is False for row in rows)
        say(f"{what} took {report.seconds:.0f} s; see {page}")
    return 2 if failures else int(missed)


def _order(parts: Iterable[str], models: Sequence[str]) -> Iterator[tuple[str, str]]:
    for part in parts:
        for model in models[:1] if part in ONE_MODEL else models:
            yield part, model


def _prepare(bench: Bench, models: Sequence[str]) -> int:
    try:
        for model in models:
            bench.begin("", model)
            say(f"{model}: {bench.gguf()}")
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


if __name__ == "__main__":
    sys.exit(main())
