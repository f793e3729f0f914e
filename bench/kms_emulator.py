"""``emulate kms`` as it is, which also writes down how long its parts take: a line each, a part and milliseconds.

python -m bench.kms_emulator FILE kms OPTIONS
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import ParamSpec, TextIO, TypeVar
from unittest import mock

from bench.turns import since
from emulator.cms import envelop
from emulator.commands import emulate
from emulator.https import HttpAnswer, HttpRequest
from emulator.kms_endpoint import KmsEmulator
from emulator.recipient import attested

VERIFYING, MAKING, ANSWERING, PLAIN_ANSWER = "verifying", "CMS", "answer", "plain"
"""A document; CMS; a whole request with ``Recipient``, from its bytes to those of its answer; one without."""

P = ParamSpec("P")
T = TypeVar("T")


def read_times(path: Path) -> dict[str, float]:
    """The median of each part, in milliseconds."""
    parts: dict[str, list[float]] = {}
    for line in path.read_text().splitlines():
        part, taken = line.split()
        parts.setdefault(part, []).append(float(taken))
    return {part: median(taken) for part, taken in parts.items()}


def main() -> None:
    path, *arguments = sys.argv[1:]
    with (
        Path(path).open("w", buffering=1) as times,
        mock.patch("emulator.kms.attested", _timed(times, VERIFYING, attested)),
        mock.patch("emulator.kms.envelop", _timed(times, MAKING, envelop)),
        mock.patch.object(KmsEmulator, "_answer", _timed_answer(times, KmsEmulator._answer)),
    ):
        emulate(arguments, standalone_mode=False)


def _timed(times: TextIO, part: str, work: Callable[P, T]) -> Callable[P, T]:
    def run(*arguments: P.args, **options: P.kwargs) -> T:
        begun = time.perf_counter()
        result = work(*arguments, **options)
        times.write(f"{part} {since(begun)}\n")
        return result

    return run


def _timed_answer(
    times: TextIO, answer: Callable[[KmsEmulator, HttpRequest], HttpAnswer]
) -> Callable[[KmsEmulator, HttpRequest], HttpAnswer]:
    def run(emulator: KmsEmulator, request: HttpRequest) -> HttpAnswer:
        begun = time.perf_counter()
        answered = answer(emulator, request)
        times.write(f"{ANSWERING if b'Recipient' in request.body else PLAIN_ANSWER} {since(begun)}\n")
        return answered

    return run


if __name__ == "__main__":
    main()
