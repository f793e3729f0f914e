"""The runner: what it says of a verifier that is right, and of several that are not."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest

from conformance.__main__ import VECTORS, main
from conformance.protocol import Answer, ProtocolError, Question, Verdict
from conformance.runner import MAX_STARTS

REAL = Path(__file__).resolve().parents[3] / "shared" / "vectors" / "nitro"
OURS = f"{shlex.quote(sys.executable)} -m conformance.strongroom"
SOME = (
    *("01-document-trailing", "04-order", "06-appraisal-other", "06-other", "11-pcr0", "12-model"),
    *("accepted", "accepted-document"),
)


@pytest.fixture
def some(tmp_path: Path) -> Path:
    """A folder with some of the vectors: two of them to be accepted."""
    folder = tmp_path / "vectors"
    folder.mkdir()
    for name in ("root.der", "policy.toml", "document.toml", *(f"{name}.vector" for name in SOME)):
        shutil.copy(VECTORS / name, folder / name)
    return folder


def verifier(folder: Path, body: str) -> str:
    """The command of a verifier that does ``body`` for each ``question``, with ``count`` from 0."""
    script = folder / "verifier.py"
    lines = "".join(f"    {line}\n" for line in body.splitlines())
    script.write_text(
        "import json, os, sys, time\n"
        "def say(**said): print(json.dumps(said), flush=True)\n"
        f"for count, line in enumerate(sys.stdin):\n    question = json.loads(line)\n{lines}"
    )
    return shlex.join([sys.executable, str(script)])


def report(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, dict[str, Any]]:
    status = main([*arguments, "--json"])
    said: dict[str, Any] = json.loads(capsys.readouterr().out)
    return status, said


def rows(table: str) -> list[list[str]]:
    return [line.split() for line in table.splitlines()]


def test_ours_agrees_with_every_vector(capsys: pytest.CaptureFixture[str]) -> None:
    status, said = report(capsys, "--command", OURS)
    assert (status, [case for case in said["cases"] if not case["agrees"]]) == (0, [])
    summary = said["summary"]
    assert summary["cases"] == summary["agree"] == len(list(VECTORS.glob("*.vector"))) > 350
    refused = [case for case in said["cases"] if case["expected"]["verdict"] == "refused"]
    assert summary["codes_agree"] == len(refused)
    assert summary["codes_differ"] == 0


@pytest.mark.skipif(not REAL.is_dir(), reason="AWS's collected documents are not beside this repository")
def test_ours_agrees_with_every_real_document(capsys: pytest.CaptureFixture[str]) -> None:
    status, said = report(capsys, "--command", OURS, "--no-vectors", "--real", str(REAL))
    assert (status, [case for case in said["cases"] if not case["agrees"]]) == (0, [])
    assert said["summary"]["agree"] == 53


def test_a_level_is_a_choice_of_vectors(some: Path, capsys: pytest.CaptureFixture[str]) -> None:
    documents = ["01-document-trailing", "04-order", "accepted-document"]
    appraisals = sorted([*documents, "06-appraisal-other"])
    for level, names in (("document", documents), ("appraisal", appraisals), ("evidence", list(SOME))):
        status, said = report(capsys, "--command", OURS, "--vectors", str(some), "--level", level)
        assert (status, sorted(case["id"] for case in said["cases"])) == (0, sorted(names))


def test_the_table(some: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--command", OURS, "--vectors", str(some)]) == 0
    said = capsys.readouterr().out
    assert ["04-order", "document", "untrusted_chain", "untrusted_chain", "agrees", "agrees"] in rows(said)
    assert "8 cases: 8 verdicts agree, 0 disagree, 0 without an answer\n" in said
    assert "codes, where both sides name one: 6 agree, 0 differ\n" in said


def test_one_that_accepts_everything_is_found_out(
    some: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = verifier(tmp_path, 'say(id=question["id"], verdict="accepted")')
    status, said = report(capsys, "--command", command, "--vectors", str(some))
    assert status == 1
    assert said["summary"]["wrongly_accepted"] == said["summary"]["disagree"] == 6
    assert said["summary"]["agree"] == 2
    assert main(["--command", command, "--vectors", str(some)]) == 1
    expected = ["04-order", "document", "untrusted_chain", "accepted", "DISAGREES", "-"]
    assert expected in rows(capsys.readouterr().out)


def test_one_that_refuses_everything_is_found_out(
    some: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = verifier(tmp_path, 'say(id=question["id"], verdict="refused")')
    status, said = report(capsys, "--command", command, "--vectors", str(some))
    assert status == 1
    assert said["summary"]["wrongly_refused"] == said["summary"]["disagree"] == 2


def test_other_codes_are_no_disagreement(some: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    body = (
        'if "accepted" in question["id"]: say(id=question["id"], verdict="accepted")\n'
        'else: say(id=question["id"], verdict="refused", code="no")'
    )
    status, said = report(capsys, "--command", verifier(tmp_path, body), "--vectors", str(some))
    assert status == 0
    assert (said["summary"]["codes_agree"], said["summary"]["codes_differ"]) == (0, 6)


GARBAGE = [
    'print("accepted", flush=True)',
    'print("[" * 3000, flush=True)',
    "print(5, flush=True)",
    'say(id=question["id"])',
    'say(id=question["id"], verdict="perhaps")',
    'say(id=question["id"], verdict=["accepted"])',
    'say(id="another", verdict="accepted")',
    'say(id=question["id"], verdict="accepted", code="wrong_nonce")',
    'say(id=question["id"], verdict="refused", code="Wrong Nonce")',
    'say(id=question["id"], verdict="refused", code=5)',
    'say(id=question["id"], verdict="accepted", more=1)',
    'say(id=question["id"], verdict="accepted", about="x" * 5000)',
    'print("x" * 100_000, end="", flush=True)',
]


@pytest.mark.parametrize("body", GARBAGE)
def test_what_is_no_answer_is_said_to_be_none(
    body: str, some: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    status, said = report(capsys, "--command", verifier(tmp_path, body), "--vectors", str(some), "--deadline", "5")
    assert status == 1
    assert said["summary"]["silent"] == said["summary"]["cases"] == len(SOME)
    reasons = [case["got"]["silence"] for case in said["cases"]]
    assert reasons[MAX_STARTS:] == [f"not asked: the command failed {MAX_STARTS} times"] * (len(SOME) - MAX_STARTS)
    assert all(reason.isprintable() for reason in reasons)


def test_one_that_dies_loses_that_case_alone(some: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    body = 'if question["id"] == "04-order": sys.exit(3)\nsay(id=question["id"], verdict="refused")'
    status, said = report(capsys, "--command", verifier(tmp_path, body), "--vectors", str(some))
    assert status == 1
    silent = {case["id"]: case["got"]["silence"] for case in said["cases"] if "silence" in case["got"]}
    assert silent == {"04-order": "the command ended with status 3"}


def test_one_that_hangs_is_not_waited_for(some: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    body = f"{NOTE_PID}\nif question['id'] == '04-order': time.sleep(600)\nsay(id=question['id'], verdict='refused')"
    command = verifier(tmp_path, body)
    status, said = report(capsys, "--command", command, "--vectors", str(some), "--deadline", "1")
    assert status == 1
    [hung] = [case for case in said["cases"] if case["id"] == "04-order"]
    assert hung["got"] == {"silence": "no answer within 1 s"}
    require_gone(tmp_path)


def test_one_that_will_not_end_is_ended(some: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    body = f"{NOTE_PID}\nsay(id=question['id'], verdict='refused')\nif count == {len(SOME) - 1}: time.sleep(600)"
    status, _ = report(capsys, "--command", verifier(tmp_path, body), "--vectors", str(some), "--deadline", "1")
    assert status == 1
    require_gone(tmp_path)


NOTE_PID = "open(sys.argv[0] + f'.{os.getpid()}', 'w').close()"


def require_gone(folder: Path) -> None:
    for note in folder.glob("verifier.py.*"):
        with pytest.raises(ProcessLookupError):
            os.kill(int(note.suffix[1:]), 0)


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["--command", ""],
        ["--command", "'"],
        ["--command", "/nowhere/verifier"],
        ["--command", OURS, "--deadline", "0"],
        ["--command", OURS, "--deadline", "nan"],
        ["--command", OURS, "--level", "parcel"],
        ["--command", OURS, "--vectors", "/nowhere"],
        ["--command", OURS, "--real", "/nowhere"],
        ["--command", OURS, "--no-vectors"],
    ],
)
def test_wrong_usage(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(arguments)
    assert caught.value.code == 2
    assert "usage: python -m conformance" in capsys.readouterr().err


def test_a_broken_vector_is_wrong_usage(some: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (some / "06-other.vector").write_text("about: nothing\n")
    with pytest.raises(SystemExit) as caught:
        main(["--command", OURS, "--vectors", str(some)])
    assert caught.value.code == 2
    assert "06-other.vector: not a vector" in capsys.readouterr().err


@pytest.mark.parametrize("line", [b"", b"{}", b"5", b'{"level": "document", "id": 1}', b'{"level": "parcel"}'])
def test_what_is_no_question(line: bytes) -> None:
    with pytest.raises(ProtocolError):
        Question.decode(line)


def test_answers_travel() -> None:
    for answer in (Answer(Verdict.ACCEPTED), Answer(Verdict.REFUSED), Answer(Verdict.REFUSED, "stale")):
        assert Answer.decode(answer.encode("1"), "1") == answer
