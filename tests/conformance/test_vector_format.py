"""The format of vectors: one file, one spelling, one reading."""

from __future__ import annotations

import string
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from conformance.vectors import ACCEPTED, MAX_FILE, Subject, Vector, VectorError, instant, load

GOOD = Vector(
    about="a thing",
    subject=Subject.EVIDENCE,
    expect="wrong_nonce",
    step=6,
    time=datetime(2026, 3, 1, 12, 0, tzinfo=UTC),
    anchor="root.der",
    nonce=bytes(32),
    policy="policy.toml",
    payload=bytes(100),
)
DOCUMENT = replace(GOOD, subject=Subject.DOCUMENT, expect=ACCEPTED, step=None, nonce=None, policy=None)


def test_a_file_reads_as_it_was_written() -> None:
    assert GOOD.encode() == (
        b"about: a thing\nsubject: evidence\nexpect: wrong_nonce\nstep: 6\ntime: 2026-03-01T12:00:00Z\n"
        b"anchor: root.der\nnonce: "
        + b"00" * 32
        + b"\npolicy: policy.toml\n\n"
        + b"A" * 76
        + b"\n"
        + b"A" * 58
        + b"==\n"
    )
    assert Vector.decode(GOOD.encode()) == GOOD
    assert Vector.decode(DOCUMENT.encode()) == DOCUMENT


@given(st.binary(max_size=400), st.text(string.ascii_letters + " ,:", min_size=1).map(str.strip), st.integers(1, 15))
def test_every_vector_reads_as_it_was_written(payload: bytes, about: str, step: int) -> None:
    vector = replace(GOOD, payload=payload, about=about, step=step)
    assert Vector.decode(vector.encode()) == vector


def test_times_are_said_to_the_millisecond_where_they_have_one() -> None:
    assert instant(GOOD.time + timedelta(milliseconds=1)) == "2026-03-01T12:00:00.001Z"
    late = replace(GOOD, time=GOOD.time + timedelta(milliseconds=1))
    assert Vector.decode(late.encode()) == late


@pytest.mark.parametrize(
    ("old", "new"),
    [
        pytest.param("about", "About", id="an unknown header"),
        pytest.param("about: a thing\n", "", id="a missing header"),
        pytest.param("step: 6\n", "step: 6\nstep: 6\n", id="a header twice"),
        pytest.param("expect: wrong_nonce\nstep: 6", "step: 6\nexpect: wrong_nonce", id="headers out of order"),
        pytest.param("step: 6", "step: six", id="no number"),
        pytest.param("step: 6", "step: 06", id="another spelling of a number"),
        pytest.param("step: 6\n", "", id="a refusal without its step"),
        pytest.param("expect: wrong_nonce", "expect: accepted", id="an acceptance with a step"),
        pytest.param("expect: wrong_nonce", "expect: Wrong", id="no code"),
        pytest.param("subject: evidence", "subject: document", id="a document with a nonce"),
        pytest.param("subject: evidence", "subject: parcel", id="no subject"),
        pytest.param("policy: policy.toml\n", "", id="no policy"),
        pytest.param("policy: policy.toml", "policy: ../policy.toml", id="a policy elsewhere"),
        pytest.param("anchor: root.der", "anchor: /root.der", id="an anchor elsewhere"),
        pytest.param("T12:00:00Z", "T12:00:00", id="no time zone"),
        pytest.param("T12:00:00Z", "T12:00:00+01:00", id="another time zone"),
        pytest.param("T12:00:00Z", "T12:00:00.000Z", id="another spelling of a time"),
        pytest.param("a thing", "a \x1b[2K thing", id="what moves a cursor"),
        pytest.param("\n\n", "\n", id="no empty line"),
        pytest.param("A\nA", "AA", id="a longer line"),
        pytest.param("==\n", "==", id="no end of line"),
        pytest.param("==\n", "==\n\n", id="an empty line more"),
        pytest.param("A==", "B==", id="bits that are not zero"),
        pytest.param("AA==", "A*==", id="no base64"),
        pytest.param("\n", "\r\n", id="another end of line"),
    ],
)
def test_what_is_no_vector(old: str, new: str) -> None:
    text = GOOD.encode().decode()
    assert old in text
    with pytest.raises(VectorError):
        Vector.decode(text.replace(old, new).encode())


@given(st.binary(max_size=200))
def test_any_bytes_give_the_typed_error(data: bytes) -> None:
    with pytest.raises(VectorError):
        Vector.decode(data)


def test_a_file_is_bounded(tmp_path: Path) -> None:
    (tmp_path / "large.vector").write_bytes(replace(DOCUMENT, payload=bytes(MAX_FILE)).encode())
    with pytest.raises(VectorError, match=r"large\.vector"):
        list(load(tmp_path))
