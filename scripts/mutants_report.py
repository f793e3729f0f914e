"""What ``scripts/mutants`` found: the score of each file, and every change that no test noticed.

Run it with mutmut's interpreter, where ``mutants/`` is. A change that only the type checker notices counts as noticed,
for the gate runs it; one that hangs counts too. Survivors that differ in nothing but a text are listed apart.
"""

from __future__ import annotations

import io
import json
import sys
import tokenize
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from mutmut.mutation.diff_apply import get_diff_for_mutant
from mutmut.stats import status_by_exit_code

FOLDER = Path("mutants")
NOTICED = ("killed", "caught by type check", "timeout", "segfault")
UNDECIDED = ("not checked", "check was interrupted by user", "skipped")


@dataclass(frozen=True)
class Survivor:
    """A mutant that every test of its function passed, or that no test reached."""

    name: str
    removed: tuple[str, ...]
    added: tuple[str, ...]

    @property
    def in_a_text_alone(self) -> bool:
        return _without_texts(self.removed) == _without_texts(self.added)

    def __str__(self) -> str:
        changed = [f"  - {line}" for line in self.removed] + [f"  + {line}" for line in self.added]
        return "\n".join([self.name, *changed])


def _without_texts(lines: tuple[str, ...]) -> list[str]:
    found = []
    try:
        for token in tokenize.generate_tokens(io.StringIO("\n".join(lines)).readline):
            found.append("text" if token.type == tokenize.STRING else token.string.strip())
    except (tokenize.TokenError, IndentationError):  # a piece of a statement; what came before its end is compared
        pass
    return found


def main() -> int:
    totals: Counter[str] = Counter()
    survivors: list[Survivor] = []
    for meta in sorted(FOLDER.rglob("*.py.meta")):
        path = meta.relative_to(FOLDER).with_suffix("")
        counts: Counter[str] = Counter()
        for name, exit_code in json.loads(meta.read_text())["exit_code_by_key"].items():
            status = status_by_exit_code[exit_code]
            counts[status] += 1
            if status not in NOTICED and status not in UNDECIDED:
                survivors.append(_survivor(name, path))
        if counts:
            print(f"{path!s:40} {_score(counts)}")
        totals += counts
    print(f"{'all':40} {_score(totals)}")
    texts = [survivor for survivor in survivors if survivor.in_a_text_alone]
    others = [survivor for survivor in survivors if not survivor.in_a_text_alone]
    for title, listed in (("Survivors", others), ("Survivors that differ in a text alone", texts)):
        print(f"\n{title}: {len(listed)}\n")
        print(*listed, sep="\n\n")
    return 0


def _score(counts: Counter[str]) -> str:
    decided = sum(counts.values()) - sum(counts[status] for status in UNDECIDED)
    noticed = sum(counts[status] for status in NOTICED)
    parts = ", ".join(f"{count} {status}" for status, count in sorted(counts.items()))
    return f"{noticed / decided if decided else 0:7.2%} of {decided:4}  ({parts})"


def _survivor(name: str, path: Path) -> Survivor:
    diff = get_diff_for_mutant(name, path=path).splitlines()
    body = [line for line in diff if not line.startswith(("---", "+++"))]
    return Survivor(name, tuple(_lines(body, "-")), tuple(_lines(body, "+")))


def _lines(diff: list[str], sign: str) -> Iterator[str]:
    return (line[1:].strip() for line in diff if line.startswith(sign))


if __name__ == "__main__":
    sys.exit(main())
