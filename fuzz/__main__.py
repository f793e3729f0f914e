"""``python -m fuzz``: coverage-guided fuzzing with atheris, one process for each target.

    python -m fuzz                        every target for 60 seconds
    python -m fuzz --seconds 600 rpc      one target, ten minutes
    python -m fuzz --runs 5000            every target for 5,000 inputs, as CI does

A target is a module ``fuzz/fuzz_NAME.py`` with ``one_input(data)``, which raises only on a bug, and ``seeds()``. An
input that fails is written to ``build/fuzz/NAME``; give it to ``--reproduce``.
"""

from __future__ import annotations

import argparse
import importlib
import subprocess
import sys
from pathlib import Path

FOLDER = Path(__file__).parent
ROOMS = ["attestation", "vsockrpc", "enclave", "emulator", "parent", "strongroom"]
LONGEST_INPUT = 20_000


def targets() -> list[str]:
    return sorted(path.stem.removeprefix("fuzz_") for path in FOLDER.glob("fuzz_*.py"))


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m fuzz", description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"targets: {', '.join(targets())}")
    parser.add_argument("--seconds", type=int, default=60, help="for each target (default: %(default)s)")
    parser.add_argument("--runs", type=int, help="inputs for each target, in place of a time")
    parser.add_argument("--reproduce", type=Path, metavar="FILE", help="run one input through the one target named")
    parser.add_argument("--inside", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    names = options.names or targets()
    if unknown := set(names) - set(targets()):
        parser.error(f"no such target: {', '.join(sorted(unknown))}")
    if options.reproduce:
        [name] = names
        importlib.import_module(f"fuzz.fuzz_{name}").one_input(options.reproduce.read_bytes())
        print(f"{name}: no bug in {options.reproduce}")
        return 0
    bound = f"-runs={options.runs}" if options.runs else f"-max_total_time={options.seconds}"
    if options.inside:
        return fuzz(names[0], bound)
    failed = []
    for name in names:
        print(f"== {name}", flush=True)
        limit = ["--runs", str(options.runs)] if options.runs else ["--seconds", str(options.seconds)]
        if subprocess.run([sys.executable, "-m", "fuzz", "--inside", *limit, name], check=False).returncode:
            failed.append(name)
    print(f"{len(names) - len(failed)} targets without a bug" + (f"; bugs in: {', '.join(failed)}" if failed else ""))
    return 1 if failed else 0


def fuzz(name: str, bound: str) -> int:
    import atheris

    with atheris.instrument_imports(include=ROOMS):
        target = importlib.import_module(f"fuzz.fuzz_{name}")
    findings = FOLDER.parent / "build" / "fuzz" / name
    corpus = findings / "corpus"
    corpus.mkdir(parents=True, exist_ok=True)
    for index, seed in enumerate(target.seeds()):
        (corpus / f"seed-{index}").write_bytes(seed)
    options = [
        bound,
        f"-max_len={LONGEST_INPUT}",
        f"-artifact_prefix={findings}/",
        "-print_final_stats=0",
        "-verbosity=0",
    ]
    atheris.Setup(["fuzz", *options, str(corpus)], target.one_input)
    atheris.Fuzz()
    return 0


if __name__ == "__main__":
    sys.exit(main())
