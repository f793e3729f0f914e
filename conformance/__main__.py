"""``python -m conformance``: runs the vectors against a verifier that speaks the command protocol.

    python -m conformance --command "python -m conformance.strongroom"
    python -m conformance --command "./their-verifier" --level document --real ../shared/vectors/nitro

Exit status: 0 when every verdict agrees, 1 when one does not or is missing, 2 for wrong usage.
"""

from __future__ import annotations

import argparse
import json
import shlex
import sys
from collections.abc import Sequence
from itertools import chain
from pathlib import Path

from conformance.cases import from_collection, from_vectors
from conformance.protocol import Answer, Verdict
from conformance.runner import Result, StartError, run
from conformance.vectors import Subject, VectorError

VECTORS = Path(__file__).resolve().parent.parent / "tests" / "vectors" / "evidence"


def main(arguments: Sequence[str] | None = None) -> int:
    about, _, examples = (__doc__ or "").partition("\n\n")
    parser = argparse.ArgumentParser(
        prog="python -m conformance",
        description=about.partition(": ")[2],
        epilog=examples,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--command", required=True, help="the verifier, as one would type it; no shell is involved")
    parser.add_argument(
        "--level",
        type=Subject,
        choices=list(Subject),
        default=Subject.EVIDENCE,
        help="document: is it genuine?; appraisal: and accepted by a policy?; evidence (the default): channels too",
    )
    parser.add_argument("--vectors", type=Path, metavar="DIR", default=VECTORS, help="the folder of the vectors")
    parser.add_argument(
        "--real", type=Path, metavar="DIR", help="a collection of AWS's real documents with its INDEX.json"
    )
    parser.add_argument(
        "--no-vectors", action="store_true", help="the real documents alone, for a verifier with AWS's root built in"
    )
    parser.add_argument("--deadline", type=float, default=10.0, metavar="SECONDS", help="for each answer (default: 10)")
    parser.add_argument("--json", action="store_true", help="one JSON object in place of the table")
    options = parser.parse_args(arguments)
    try:
        command = shlex.split(options.command)
        if not command or not options.deadline > 0:
            parser.error("an empty command, or no time to answer")
        cases = list(
            chain(
                () if options.no_vectors else from_vectors(options.vectors, options.level),
                from_collection(options.real) if options.real else (),
            )
        )
        if not cases:
            parser.error("nothing to ask: no vectors there, and no real documents")
        results = run(cases, command, deadline=options.deadline)
    except (OSError, ValueError, KeyError, VectorError, StartError) as error:
        parser.error(str(error))
    sys.stdout.write(as_json(results) if options.json else as_table(results))
    return 0 if all(result.agrees for result in results) else 1


def as_json(results: Sequence[Result]) -> str:
    cases = [
        {
            "id": result.case.question.id,
            "level": result.case.question.level.value,
            "about": result.case.about,
            "expected": {"verdict": result.case.expected.verdict.value, "code": result.case.expected.code},
            "got": (
                {"verdict": result.got.verdict.value, "code": result.got.code}
                if isinstance(result.got, Answer)
                else {"silence": result.got.reason}
            ),
            "agrees": result.agrees,
            "code_agrees": result.code_agrees,
        }
        for result in results
    ]
    return json.dumps({"summary": _counts(results), "cases": cases}, indent=1) + "\n"


def as_table(results: Sequence[Result]) -> str:
    rows = [("case", "level", "expected", "got", "verdict", "code")]
    for result in results:
        question = result.case.question
        verdict = "agrees" if result.agrees else ("DISAGREES" if isinstance(result.got, Answer) else "NO ANSWER")
        code = {True: "agrees", False: "differs", None: "-"}[result.code_agrees]
        rows.append((question.id, question.level.value, _said(result.case.expected), _said(result.got), verdict, code))
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = ["  ".join(text.ljust(width) for text, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    counts = _counts(results)
    lines += [
        "",
        f"{counts['cases']} cases: {counts['agree']} verdicts agree, {counts['disagree']} disagree, "
        f"{counts['silent']} without an answer",
        f"wrongly accepted: {counts['wrongly_accepted']}; wrongly refused: {counts['wrongly_refused']}",
        f"codes, where both sides name one: {counts['codes_agree']} agree, {counts['codes_differ']} differ",
    ]
    return "\n".join(lines) + "\n"


def _said(answer: object) -> str:
    if not isinstance(answer, Answer):
        return "-"
    return answer.verdict.value if answer.code is None else answer.code


def _counts(results: Sequence[Result]) -> dict[str, int]:
    wrong = [result.got.verdict for result in results if isinstance(result.got, Answer) and not result.agrees]
    return {
        "cases": len(results),
        "agree": sum(result.agrees for result in results),
        "disagree": len(wrong),
        "silent": sum(not isinstance(result.got, Answer) for result in results),
        "wrongly_accepted": wrong.count(Verdict.ACCEPTED),
        "wrongly_refused": wrong.count(Verdict.REFUSED),
        "codes_agree": sum(result.code_agrees is True for result in results),
        "codes_differ": sum(result.code_agrees is False for result in results),
    }


if __name__ == "__main__":
    sys.exit(main())
