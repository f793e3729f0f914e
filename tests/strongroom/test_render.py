"""Verdicts for people: each check on a line that fits, each failure whole, the labels wherever a result is shown."""

from __future__ import annotations

import io
import re
import secrets
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from attestation.checks import STEPS, Check, Label, Status
from attestation.errors import AppraisalError, EvidenceError
from attestation.policy import AppraisalPolicy
from attestation.reference import PcrSet
from attestation.rules import Release, Require
from attestation.verifier import AttestationResult, verify
from strongroom.render import (
    MARKS,
    NARROW,
    WARNINGS,
    open_console,
    printable,
    shorten,
    show_verdict,
    verdict_line,
    warn_of_labels,
)
from tests.attested import Attested, policy_for
from tests.pki import forge

OTHER = PcrSet(b"\xaa" * 48, b"\xbb" * 48, b"\xcc" * 48)


def shown(checks: tuple[Check, ...], width: int, *, whole: bool = False) -> str:
    file = io.StringIO()
    show_verdict(Console(file=file, width=width, highlight=False, markup=False), checks, whole=whole)
    return file.getvalue()


def table_of(text: str) -> list[str]:
    return text.split("\n\n")[0].splitlines()


def judged(attested: Attested, policy: AppraisalPolicy, *, nonce: bytes | None = None) -> AttestationResult:
    sent = secrets.token_bytes(32)
    return verify(attested.evidence(sent), policy=policy, nonce=nonce or sent, at=datetime.now(UTC))


@pytest.fixture(scope="module")
def attested() -> Attested:
    return Attested()


@pytest.fixture(scope="module")
def policy(attested: Attested) -> AppraisalPolicy:
    return policy_for(attested.identity.model, attested.identity.configuration)


@pytest.fixture(scope="module")
def result(attested: Attested, policy: AppraisalPolicy) -> AttestationResult:
    return judged(attested, policy)


@pytest.fixture(scope="module")
def refused(attested: Attested, policy: AppraisalPolicy) -> AppraisalError:
    other = replace(policy, releases=(Release("a release", OTHER),), model=Require((b"\xdd" * 48,)))
    with pytest.raises(AppraisalError) as caught:
        judged(attested, other)
    return caught.value


@pytest.mark.parametrize("width", [90, 100, 120, 200])
def test_every_check_is_one_line_that_fits(result: AttestationResult, width: int) -> None:
    head, *lines = table_of(shown(result.checks, width))
    assert head.split() == ["step", "check", "verdict", "expected", "got"]
    assert len(lines) == len(result.checks)
    assert max(map(len, lines)) <= width
    for line, check in zip(lines, result.checks, strict=True):
        assert line.split()[0] == str(check.step)
        assert f" {check.name}  " in line
        assert f" {MARKS[check.status][0]}" in line


def test_values_stand_below_their_check_where_there_is_no_room_beside_it(result: AttestationResult) -> None:
    text = shown(result.checks, 60)
    assert "\n   6  nonce  ok\n      expected  h'" in text
    assert "\n      got       the same\n   7  freshness  ok\n      expected  0 to " in text
    assert "step" not in text


@pytest.mark.parametrize("width", [60, 80, 120])
def test_failures_are_whole(refused: AppraisalError, width: int) -> None:
    text = shown(refused.checks, width)
    assert max(map(len, table_of(text))) <= width
    failed = [check for check in refused.checks if check.status is Status.FAILED]
    assert [check.code for check in failed] == ["wrong_image", "wrong_model"]
    for check in failed:
        assert f"\n{check.name} [{check.code}]: {check.explanation}\n" in text
        assert f"  expected  {check.expected}\n" in text
        assert f"  got       {check.got}\n" in text


def test_what_was_not_reached_is_listed_as_such(attested: Attested, policy: AppraisalPolicy) -> None:
    with pytest.raises(EvidenceError) as caught:
        judged(attested, policy, nonce=bytes(32))
    lines = table_of(shown(caught.value.checks, 100))[1:]
    assert [line.split()[0] for line in lines] == [str(step) for step in STEPS]
    assert [step for step, line in zip(STEPS, lines, strict=True) if "not reached" in line] == list(range(7, 16))
    assert "FAILED" in lines[5]


def test_what_is_ignored_says_why(result: AttestationResult) -> None:
    lines = [line for line in table_of(shown(result.checks, 100)) if " ignored " in line]
    assert len(lines) == 3
    assert all("(a test)" in line for line in lines)


def test_a_value_as_expected_stands_once(result: AttestationResult) -> None:
    [line] = [line for line in table_of(shown(result.checks, 120)) if " model " in line]
    assert line.endswith("the same")


def test_whole_values_are_whole_and_on_one_line(result: AttestationResult) -> None:
    text = shown(result.checks, 80, whole=True)
    assert "…" not in text
    for check in result.checks:
        if check.status is Status.PASSED:
            assert check.expected is not None
            assert check.expected in text
    assert len(text.splitlines()) == len(result.checks) + 1


CHECKS = st.lists(
    st.builds(
        Check,
        step=st.integers(1, 15),
        name=st.sampled_from(sorted(STEPS.values())),
        status=st.sampled_from(Status),
        expected=st.none() | st.text(max_size=300),
        got=st.none() | st.text(max_size=300),
        code=st.none() | st.just("wrong_image"),
        explanation=st.none() | st.text(max_size=80),
    ),
    max_size=8,
).map(tuple)
ASCII_CHECKS = CHECKS.map(
    lambda checks: tuple(
        check._replace(
            expected=check.expected and check.expected.encode("ascii", "replace").decode(),
            got=check.got and check.got.encode("ascii", "replace").decode(),
            explanation=check.explanation and check.explanation.encode("ascii", "replace").decode(),
        )
        for check in checks
    )
)


@given(ASCII_CHECKS, st.integers(NARROW, 200))
def test_any_checks_fit_any_terminal(checks: tuple[Check, ...], width: int) -> None:
    lines = table_of(shown(checks, width))
    assert len(lines) == len(checks) + 1
    assert all(len(line) <= width for line in lines)


@given(ASCII_CHECKS, st.integers(40, NARROW - 1))
def test_any_checks_fit_a_narrow_terminal(checks: tuple[Check, ...], width: int) -> None:
    lines = table_of(shown(checks, width))
    assert sum(line[:4].strip().isdigit() for line in lines) == len(checks)
    assert all(len(line) <= width for line in lines)


@given(CHECKS)
def test_no_check_moves_the_cursor(checks: tuple[Check, ...]) -> None:
    for whole in (False, True):
        for width in (60, 100):
            assert all(each.isprintable() or each == "\n" for each in shown(checks, width, whole=whole))


def test_control_characters_are_written_out() -> None:
    assert printable("a\x1b[2J\x9b\r\n\u202eb") == r"a\x1b[2J\x9b\r\n\u202eb"
    assert printable("é漢") == "é漢"


def test_only_digests_are_shortened() -> None:
    assert shorten("sha384:" + "ab" * 48) == "sha384:abababab…ababab"
    assert shorten("PCR0 " + "0" * 96 + ", PCR1 " + "1" * 96) == "PCR0 00000000…000000, PCR1 11111111…111111"
    assert shorten("i-00000000000000000-enc0123456789abcdef") == "i-00000000000000000-enc0123456789abcdef"
    assert shorten("a sentence of many words, none of them a digest") == (
        "a sentence of many words, none of them a digest"
    )


# --- Labels --------------------------------------------------------------------------------------------------------


def printed(result: AttestationResult) -> str:
    file = io.StringIO()
    console = Console(file=file, width=120, highlight=False, markup=False)
    console.print(verdict_line(result))
    warn_of_labels(console, result)
    return file.getvalue()


def test_an_emulated_enclave_is_called_so(result: AttestationResult) -> None:
    assert result.labels == {Label.EMULATED}
    text = printed(result)
    assert re.search(r"^ACCEPTED  EMULATED  release test, valid for \d+ s$", text, re.MULTILINE)
    assert "EMULATED: no hardware vouches for this enclave" in text
    assert "DEBUG" not in text


def test_a_debug_enclave_is_called_so(tmp_path: Path) -> None:
    (tmp_path / "root.der").write_bytes(forge.ROOT_DER)
    policy = replace(AppraisalPolicy.parse(forge.POLICY, tmp_path), accept_debug="a test")
    document = forge.document(forge.payload_fields(pcrs=forge.DEBUG_PCRS))
    text = printed(verify(forge.evidence(document), policy=policy, nonce=forge.NONCE, at=forge.NOW))
    assert "ACCEPTED  DEBUG  EMULATED  release none" in text
    assert WARNINGS[Label.DEBUG] in text
    assert WARNINGS[Label.EMULATED] in text


def test_every_label_has_a_warning() -> None:
    """One that is true of a channel, of a bare document and of an archive: neither speaks of a prompt, or of now."""
    assert not any("prompt" in warning or "this machine" in warning for warning in WARNINGS.values())
    assert WARNINGS.keys() == set(Label)


def test_without_a_terminal_lines_may_have_120_columns(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("COLUMNS", raising=False)
    assert open_console().width == 120
    monkeypatch.setenv("COLUMNS", "93")
    assert open_console().width == 93
