"""``make bench``: every row, from one run, on one machine, each held against a named peer.

python -m bench                 everything, about fifteen minutes
python -m bench path relay      some parts
python -m bench --json          for programs; --markdown for documents
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import platform
import sys
import time
from dataclasses import asdict
from pathlib import Path

from rich.console import Console
from rich.table import Table

from bench import Row

PARTS = (
    "path", "roundtrip", "bulk", "model_envelope", "model_boot", "kms", "relay", "verification", "image_measuring",
    "image_build", "image_boot",
)  # fmt: skip


def machine() -> str:
    """What the numbers belong to."""
    information = Path("/proc/cpuinfo").read_text()
    model = next(
        (line.partition(":")[2].strip() for line in information.splitlines() if line.startswith("model name")),
        platform.processor(),
    )
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / (1 << 30)
    system = f"Linux {platform.release()}, Python {platform.python_version()}"
    return f"{model}, {len(os.sched_getaffinity(0))} CPUs, {memory:.0f} GiB, {system}"


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m bench", description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument(
        "parts", nargs="*", choices=[*PARTS, []], metavar="PART", help=f"of {', '.join(PARTS)}; default all"
    )
    style = parser.add_mutually_exclusive_group()
    style.add_argument("--json", action="store_true", help="one JSON object")
    style.add_argument("--markdown", action="store_true", help="a table for documents")
    options = parser.parse_args()
    rows: list[Row] = []
    for part in options.parts or PARTS:
        print(f"bench: {part} ...", file=sys.stderr, flush=True)
        begun = time.monotonic()
        rows += importlib.import_module(f"bench.{part}").rows()
        print(f"bench: {part} took {time.monotonic() - begun:.0f} s", file=sys.stderr, flush=True)
    load = f"load average at the end {os.getloadavg()[0]:.1f}"
    if options.json:
        print(json.dumps({"machine": machine(), "rows": [asdict(row) for row in rows]}, indent=1))
    elif options.markdown:
        print(f"Machine: {machine()}.\n\n| what | ours | peer | compared | bar | holds |\n|---|---|---|---|---|---|")
        for row in rows:
            print(f"| {row.what} | {row.ours} | {row.peer} | {row.compared} | {row.bar} | {verdict(row)} |")
    else:
        table = Table(title=f"{machine()}; {load}", title_justify="left", header_style="bold")
        for title in ("what", "ours", "peer", "compared", "bar", "holds"):
            table.add_column(title, overflow="fold")
        for row in rows:
            table.add_row(row.what, row.ours, row.peer, row.compared, row.bar, verdict(row))
        Console(width=None if sys.stdout.isatty() else 180).print(table)
    return 1 if any(row.holds is False for row in rows) else 0


def verdict(row: Row) -> str:
    return {True: "yes", False: "NO", None: ""}[row.holds]


if __name__ == "__main__":
    sys.exit(main())
