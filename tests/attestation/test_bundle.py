"""Bundles: what is kept comes back, and nothing else is taken for one."""

from __future__ import annotations

import base64
import contextlib
import json
from collections.abc import Callable
from datetime import UTC, datetime, timedelta, timezone
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from attestation.bundle import MAX_BUNDLE, Bundle, read_kept
from attestation.errors import EvidenceError
from tests.pki import forge

BUNDLE = Bundle(forge.evidence(), forge.NONCE, forge.NOW, "http://127.0.0.1:8080")


def _changed(**changes: object) -> bytes:
    return json.dumps({**json.loads(BUNDLE.encode()), **changes}).encode()


def test_what_is_kept_comes_back() -> None:
    assert Bundle.decode(BUNDLE.encode()) == BUNDLE
    assert read_kept(BUNDLE.encode()) == BUNDLE
    assert read_kept(b"\n  " + BUNDLE.encode()) == BUNDLE


@given(
    evidence=st.binary(min_size=1, max_size=32_768),
    nonce=st.binary(min_size=1, max_size=1024),
    fetched=st.datetimes(min_value=datetime(2000, 1, 1), timezones=st.just(timezone(timedelta(hours=-7)))),
    source=st.text(st.characters(min_codepoint=33, exclude_categories=("C", "Z")), min_size=1, max_size=40),
)
def test_any_bundle_comes_back(evidence: bytes, nonce: bytes, fetched: datetime, source: str) -> None:
    bundle = Bundle(evidence, nonce, fetched, source)
    assert Bundle.decode(bundle.encode()) == bundle
    assert bundle.fetched.tzinfo is UTC


@pytest.mark.parametrize("data", [forge.evidence(), forge.document()], ids=["Evidence", "document"])
@pytest.mark.parametrize(
    "wrapped",
    [
        lambda data: data,
        lambda data: data.hex().encode(),
        lambda data: data.hex().upper().encode() + b"\n",
        lambda data: b"\n".join(data.hex(" ").encode()[at : at + 60] for at in range(0, 3 * len(data), 60)),
        base64.b64encode,
        base64.encodebytes,
    ],
)
def test_what_people_keep_is_read(data: bytes, wrapped: Callable[[bytes], bytes]) -> None:
    assert read_kept(wrapped(data)) == data


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b" \n",
        bytes([0x80]) * (MAX_BUNDLE + 1),
        b"neither",
        b"{",
        b"{}",
        b"{" + b"[" * 5000,
        _changed(v=2),
        _changed(more=1),
        _changed(evidence="*"),
        _changed(evidence=""),
        _changed(evidence=base64.b64encode(bytes(32_769)).decode()),
        _changed(nonce="0"),
        _changed(nonce="x"),
        _changed(nonce=""),
        _changed(fetched="yesterday"),
        _changed(fetched="2026-03-01T12:00:00+00:00"),
        _changed(fetched="2026-13-01T12:00:00Z"),
        _changed(source="\x1b[2K"),
        _changed(source=1),
        BUNDLE.encode().replace(b'"v": 1', b'"v": 1, "v": 1'),
        BUNDLE.encode() + b"{}",
    ],
)
def test_what_is_no_bundle_is_refused(data: bytes) -> None:
    with pytest.raises(EvidenceError) as caught:
        read_kept(data)
    assert caught.value.code == "malformed_bundle"
    assert str(caught.value).isprintable()


@pytest.mark.parametrize("size", [600, 601, 602])
def test_both_alphabets_of_base64_are_read(size: int) -> None:
    data = (b"\x84" + bytes(range(256)) * 3)[:size]
    standard, for_urls = base64.b64encode(data), base64.urlsafe_b64encode(data)
    assert (b"+" in standard, b"-" in for_urls, b"_" in for_urls) == (True, True, True)
    for text in (standard, for_urls, for_urls.rstrip(b"="), base64.encodebytes(data), b" " + for_urls + b"\n"):
        assert read_kept(text) == data
    with pytest.raises(EvidenceError):
        read_kept(for_urls + standard)


@given(st.binary(max_size=300) | st.text(st.characters(max_codepoint=127)).map(str.encode))
def test_any_bytes_give_the_typed_error(data: bytes) -> None:
    for whole in (data, b"{" + data):
        with contextlib.suppress(EvidenceError):
            read_kept(whole)


@pytest.mark.parametrize(
    "change",
    [{"evidence": b""}, {"nonce": b""}, {"nonce": bytes(1025)}, {"source": ""}, {"fetched": datetime(2026, 3, 1)}],
    ids=str,
)
def test_no_program_makes_one_that_cannot_be_read(change: dict[str, Any]) -> None:
    fields: dict[str, Any] = {"evidence": b"1", "nonce": b"1", "fetched": forge.NOW, "source": "x"}
    with pytest.raises(ValueError, match=next(iter(change))):
        Bundle(**{**fields, **change})
