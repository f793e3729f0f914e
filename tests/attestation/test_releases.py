"""Release histories: what is signed, whole and in order is read; every single failure is refused under its own code."""

from __future__ import annotations

import base64
import contextlib
import copy
import hashlib
import json
import pickle
from collections.abc import Callable
from dataclasses import replace
from datetime import timedelta, timezone
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric.utils import decode_dss_signature, encode_dss_signature
from hypothesis import given
from hypothesis import strategies as st

from attestation.reference import PcrSet
from attestation.release_signing import LocalSigner, ReleaseError, SigningError, seal
from attestation.releases import (
    MAX_DIGESTS,
    MAX_ENTRIES,
    MAX_HISTORY,
    MAX_RELEASES,
    Head,
    ReleasedImage,
    ReleaseHistory,
    ReleaseStatement,
    Source,
    append,
)
from tests.release_files import ED25519, ISSUED, NAME, ONE, P384, P384_ORDER, PCRS, TWO, VALIDITY, history_of, verified

EXPIRES = ISSUED + VALIDITY
SAME_IMAGE = replace(ONE, name="again", image=None, models=())
THREE = history_of([ONE], [ONE, TWO], [TWO])
LINES = THREE.splitlines(keepends=True)


def refused(code: str, data: bytes, **options: Any) -> ReleaseError:
    with pytest.raises(ReleaseError) as caught:
        verified(data, **options)
    assert (caught.value.code, caught.value.exit_code) == (code, 3), caught.value
    return caught.value


def statement() -> dict[str, Any]:
    """The first statement, as JSON."""
    content: dict[str, Any] = json.loads(base64.b64decode(json.loads(LINES[0])["payload"]))
    return content


def signed(content: object, signer: LocalSigner = ED25519) -> bytes:
    return seal(json.dumps(content).encode(), signer) + b"\n"


# --- What is read --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("signer", [ED25519, P384], ids=["ed25519", "p384"])
def test_the_last_statement_counts(signer: LocalSigner) -> None:
    data = history_of([ONE], [ONE, TWO], [TWO], signer=signer)
    history = verified(data, key=signer.public_key)
    assert [entry.statement.releases for entry in history.entries] == [(ONE,), (ONE, TWO), (TWO,)]
    assert [entry.statement.sequence for entry in history.entries] == [1, 2, 3]
    assert history.current.releases == (TWO,)
    assert history.current.issued == ISSUED + timedelta(days=2)
    assert history.expires == history.current.expires == ISSUED + timedelta(days=92)
    assert history.key == signer.public_key
    payload = base64.b64decode(json.loads(data.splitlines()[-1])["payload"])
    assert history.head == Head(3, hashlib.sha384(payload).digest())


def test_everything_can_be_taken_back() -> None:
    assert verified(history_of([ONE], [])).current.releases == ()


def test_a_history_of_nothing_yet() -> None:
    assert verified(history_of([])).head.sequence == 1


def test_an_expiry() -> None:
    history = verified(history_of([ONE]))
    history.require_current(EXPIRES - timedelta(seconds=1))
    for late in (EXPIRES, (EXPIRES + timedelta(days=1)).astimezone(timezone(timedelta(hours=2)))):
        with pytest.raises(ReleaseError) as caught:
            history.require_current(late)
        assert (caught.value.code, caught.value.exit_code) == ("expired_release", 3)
        assert caught.value.expected == "before 2026-05-30T12:00:00Z"
    with pytest.raises(ValueError, match="time zone"):
        history.require_current(EXPIRES.replace(tzinfo=None))


def test_a_statement_from_the_future() -> None:
    history, leeway = verified(history_of([ONE])), timedelta(seconds=120)
    history.require_in_force(ISSUED - leeway, leeway=leeway)
    for early in (ISSUED - leeway - timedelta(seconds=1), ISSUED - timedelta(days=300)):
        with pytest.raises(ReleaseError) as caught:
            history.require_in_force(early, leeway=leeway)
        assert (caught.value.code, caught.value.exit_code) == ("unissued_release", 3)
    with pytest.raises(ReleaseError) as caught:
        history.require_in_force(EXPIRES, leeway=leeway)
    assert caught.value.code == "expired_release"


def test_only_verifying_makes_a_history() -> None:
    history = verified(THREE)
    with pytest.raises(TypeError):
        ReleaseHistory(ED25519.public_key, history.entries, proof=object())  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="proof"):
        replace(history, entries=history.entries[:1])  # type: ignore[call-arg]
    for travelling in (copy.copy, copy.deepcopy, pickle.dumps):
        with pytest.raises(TypeError, match="does not travel"):
            travelling(history)


# --- One failure each: the chain -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\n",
        THREE[:-1],
        THREE + b"\n",
        b"\n" + THREE,
        THREE.replace(b"\n", b"\n\n", 1),
        THREE + b" ",
        THREE + b"{}\n",
        b"\n" * (MAX_ENTRIES + 1),
        b" " * (MAX_HISTORY + 1),
    ],
)
def test_a_file_that_is_no_history(data: bytes) -> None:
    refused("malformed_release", data)


@pytest.mark.parametrize(
    ("order", "code"),
    [
        ((1, 2), "broken_history"),
        ((0, 2), "broken_history"),
        ((0, 2, 1), "broken_history"),
        ((1, 0, 2), "broken_history"),
        ((0, 0), "broken_history"),
        ((0, 1, 1), "broken_history"),
        ((0, 1, 2, 2), "broken_history"),
        ((0, 1, 2, 0), "broken_history"),
    ],
)
def test_entries_left_out_reordered_or_repeated(order: tuple[int, ...], code: str) -> None:
    refused(code, b"".join(LINES[index] for index in order))


def test_a_statement_that_follows_another() -> None:
    """Both are signed, both are second; only one of the two first ones can come before."""
    other = history_of([TWO], [ONE])
    error = refused("broken_history", LINES[0] + other.splitlines(keepends=True)[1])
    assert error.message.startswith("entry 2: ")
    assert error.expected is not None
    assert error.expected.startswith("sha384:")


def test_a_first_statement_that_follows_something() -> None:
    error = refused("broken_history", signed(statement() | {"previous": "sha384:" + "00" * 48}))
    assert error.expected == "null"


def test_a_second_statement_that_follows_nothing() -> None:
    refused("broken_history", LINES[0] + signed(statement() | {"sequence": 2}))


def test_time_does_not_go_back() -> None:
    earlier = statement() | {
        "sequence": 2,
        "previous": f"sha384:{verified(LINES[0]).head.digest.hex()}",
        "issued": "2026-03-01T11:59:59Z",
    }
    error = refused("broken_history", LINES[0] + signed(earlier))
    assert (error.expected, error.got) == ("2026-03-01T12:00:00Z or later", "2026-03-01T11:59:59Z")
    verified(LINES[0] + signed(earlier | {"issued": "2026-03-01T12:00:00Z"}))


def test_another_product_of_the_same_key() -> None:
    error = refused("wrong_name", THREE, name="another")
    assert (error.expected, error.got) == ("another", NAME)
    second = statement() | {"sequence": 2, "previous": f"sha384:{verified(LINES[0]).head.digest.hex()}", "name": "b"}
    refused("wrong_name", LINES[0] + signed(second))


def test_another_key() -> None:
    refused("wrong_key", THREE, key=P384.public_key)
    refused("wrong_key", LINES[0] + history_of([ONE], [TWO], signer=P384).splitlines(keepends=True)[1])


def test_every_signature_counts_and_not_the_last_alone() -> None:
    first = json.loads(LINES[0])
    first["signatures"][0]["sig"] = base64.b64encode(bytes(64)).decode()
    error = refused("bad_release_signature", json.dumps(first).encode() + b"\n" + b"".join(LINES[1:]))
    assert error.message.startswith("entry 1: ")


def test_a_malleable_signature_changes_neither_chain_nor_head() -> None:
    data = history_of([ONE], [TWO], signer=P384)
    lines = []
    for line in data.splitlines():
        envelope = json.loads(line)
        r, s = decode_dss_signature(base64.b64decode(envelope["signatures"][0]["sig"]))
        envelope["signatures"][0]["sig"] = base64.b64encode(encode_dss_signature(r, P384_ORDER - s)).decode()
        lines.append(json.dumps(envelope).encode() + b"\n")
    other = b"".join(lines)
    assert other != data
    before = verified(data, key=P384.public_key)
    assert verified(other, key=P384.public_key, head=before.head).head == before.head


# --- One failure each: rollback ------------------------------------------------------------------------------------


def test_a_history_that_was_seen_before_or_has_grown() -> None:
    for seen in range(1, 4):
        head = verified(b"".join(LINES[:seen])).head
        assert verified(THREE, head=head).head.sequence == 3


def test_a_rollback_of_reference_values_is_refused() -> None:
    """The newest statements left out, so that a release counts that was taken back."""
    head = verified(THREE).head
    error = refused("rolled_back", b"".join(LINES[:2]), head=head)
    assert (error.expected, error.got) == ("3 entries or more", "2")
    assert error.message.startswith("the history has 2 entries, and 3 were seen before: fetch the newest one")
    alone = refused("rolled_back", LINES[0], head=head)
    assert alone.message.startswith("the history has 1 entry, and 3 were seen before")


def test_another_history_of_the_same_key_is_refused() -> None:
    head = verified(b"".join(LINES[:2])).head
    fork = history_of([ONE], [TWO], [ONE], [TWO])
    error = refused("rolled_back", fork, head=head)
    assert error.expected == f"entry 2 sha384:{head.digest.hex()}"
    assert "ask the publisher" in error.message


def test_a_minimum_for_who_remembers_nothing() -> None:
    verified(THREE, minimum_sequence=3)
    error = refused("rolled_back", THREE, minimum_sequence=4)
    assert (error.expected, error.got) == ("4 entries or more", "3")
    assert "the history has 3 entries, and at least 4 must be there" in error.message


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (b"", "the history is empty"),
        (LINES[0][:-1], "cut off"),
        (LINES[0][:100], "cut off"),
        (THREE[:-1], "cut off"),
        (b"\n" * 4097, "too many entries"),
    ],
)
def test_a_file_that_is_cut_off_is_said_to_be(data: bytes, said: str) -> None:
    assert said in refused("malformed_release", data).message


# --- One failure each: the statement -------------------------------------------------------------------------------

HEX = "ab" * 48
SHA = f"sha384:{HEX}"
Change = Callable[[dict[str, Any]], object]


def test_the_statement_that_is_changed_below_is_good() -> None:
    assert verified(signed(statement())).current.releases == (ONE,)


@pytest.mark.parametrize(
    "change",
    [
        {"v": 2},
        {"v": True},
        {"v": "1"},
        {"name": ""},
        {"name": "x" * 129},
        {"name": "two\nlines"},
        {"name": " assistant"},
        {"name": " "},
        {"name": "\ud800"},
        {"name": 7},
        {"sequence": 0},
        {"sequence": -1},
        {"sequence": MAX_ENTRIES + 1},
        {"sequence": "1"},
        {"sequence": 1.0},
        {"sequence": None},
        {"previous": 0},
        {"previous": ""},
        {"previous": HEX},
        {"previous": "sha384:"},
        {"previous": SHA.upper()},
        {"previous": SHA + "00"},
        {"issued": "2026-03-01 12:00:00Z"},
        {"issued": "2026-03-01T12:00:00"},
        {"issued": "2026-03-01T12:00:00+00:00"},
        {"issued": "2026-03-01T12:00:00.0Z"},
        {"issued": "2026-02-30T12:00:00Z"},
        {"issued": "2026-03-01T24:00:00Z"},
        {"issued": "2026-03-01T12:00:60Z"},
        {"issued": "0000-03-01T12:00:00Z"},
        {"issued": "٢٠٢٦-03-01T12:00:00Z"},
        {"issued": 1_772_366_400},
        {"expires": "2026-03-01T12:00:00Z"},
        {"expires": "2026-02-01T12:00:00Z"},
        {"expires": "2027-04-05T12:00:01Z"},
        {"expires": None},
        {"releases": None},
        {"releases": {}},
        {"releases": [None]},
        {"releases": ["1.0"]},
        {"another": 1},
    ],
)
def test_a_statement_with_a_wrong_field(change: dict[str, object]) -> None:
    error = refused("malformed_release", signed(statement() | change))
    assert error.message.startswith("entry 1: ")
    assert str(error).isprintable()


def test_the_longest_validity() -> None:
    verified(signed(statement() | {"expires": "2027-04-05T12:00:00Z"}))


def test_every_field_must_be_there() -> None:
    def without(path: tuple[Any, ...]) -> bytes:
        content: Any = statement()
        inner = content
        for step in path[:-1]:
            inner = inner[step]
        del inner[path[-1]]
        return signed(content)

    paths: list[tuple[Any, ...]] = [(key,) for key in statement()]
    paths += [("releases", 0, key) for key in statement()["releases"][0]]
    paths += [("releases", 0, "pcrs", str(index)) for index in range(3)]
    paths += [("releases", 0, "source", key) for key in ("repository", "commit")]
    assert len(paths) == 18
    for path in paths:
        refused("malformed_release", without(path))


@pytest.mark.parametrize(
    "change",
    [
        {"name": ""},
        {"name": "1.0 "},
        {"name": "x" * 129},
        {"pcrs": {}},
        {"pcrs": []},
        {"pcrs": {"0": HEX, "1": HEX}},
        {"pcrs": {"0": HEX, "1": HEX, "2": HEX, "3": HEX}},
        {"pcrs": {"0": HEX, "1": HEX, "2": HEX, "8": None}},
        {"pcrs": {"0": HEX, "1": HEX, "2": HEX, "8": "00" * 48}},
        {"pcrs": {"0": "00" * 48, "1": HEX, "2": HEX}},
        {"pcrs": {"0": HEX, "1": "00" * 48, "2": HEX}},
        {"pcrs": {"0": HEX, "1": HEX, "2": "00" * 48}},
        {"pcrs": {"0": HEX.upper(), "1": HEX, "2": HEX}},
        {"pcrs": {"0": HEX[2:], "1": HEX, "2": HEX}},
        {"pcrs": {"0": SHA, "1": HEX, "2": HEX}},
        {"image": HEX},
        {"image": 1},
        {"source": None},
        {"source": {"repository": "x", "commit": "a" * 40, "tag": "v1"}},
        {"source": {"repository": "", "commit": "a" * 40}},
        {"source": {"repository": "x" * 501, "commit": "a" * 40}},
        {"source": {"repository": " x", "commit": "a" * 40}},
        {"source": {"repository": "x", "commit": "a" * 41}},
        {"source": {"repository": "x", "commit": "A" * 40}},
        {"source": {"repository": "x", "commit": "main"}},
        {"source": {"repository": "x", "commit": "a" * 65}},
        {"models": None},
        {"models": [HEX]},
        {"models": [None]},
        {"models": [[SHA]]},
        {"models": [SHA, SHA]},
        {"models": [f"sha384:{index:096x}" for index in range(MAX_DIGESTS + 1)]},
        {"configurations": [SHA, SHA]},
        {"configurations": SHA},
        {"another": 1},
    ],
)
def test_a_release_with_a_wrong_field(change: dict[str, object]) -> None:
    content = statement()
    content["releases"][0] |= change
    refused("malformed_release", signed(content))


def test_names_and_numbers_of_releases() -> None:
    content = statement()
    first: dict[str, Any] = content["releases"][0]

    def another(number: int) -> dict[str, Any]:
        """Another release of another image."""
        return first | {"name": f"{number}.0", "pcrs": first["pcrs"] | {"0": f"{number:096x}"}}

    content["releases"] = [another(number) for number in range(1, MAX_RELEASES + 1)]
    assert len(verified(signed(content)).current.releases) == MAX_RELEASES
    content["releases"].append(another(MAX_RELEASES + 1))
    assert refused("malformed_release", signed(content)).expected == f"at most {MAX_RELEASES}"
    content["releases"] = [first, another(2) | {"name": first["name"]}]
    assert refused("malformed_release", signed(content)).expected == "each name once"


SIGNED_ONCE, SIGNED_TWICE = (replace(PCRS, pcr8=bytes([number]) * 48) for number in (8, 9))


@pytest.mark.parametrize(
    ("pcrs", "pcrs_again"), [(PCRS, PCRS), (PCRS, SIGNED_ONCE), (SIGNED_ONCE, PCRS), (SIGNED_ONCE, SIGNED_ONCE)]
)
def test_two_releases_of_one_image_are_neither_read_nor_written(pcrs: PcrSet, pcrs_again: PcrSet) -> None:
    """One enclave could be either, and every policy would refuse what the publisher has signed."""
    releases = (replace(ONE, pcrs=pcrs), TWO, replace(SAME_IMAGE, pcrs=pcrs_again))
    unwritten = replace(verified(LINES[0]).current, releases=releases)
    error = refused("malformed_release", seal(unwritten.encode(), ED25519) + b"\n")
    assert error.message == "entry 1: statement, releases: not as specified"
    assert (error.expected, error.got) == ("each image once, with all that may run in it", "1.0 and again of one image")
    with pytest.raises(SigningError) as caught:
        history_of(releases)
    assert (caught.value.code, caught.value.got) == ("unusable_statement", error.got)


def test_one_image_of_two_signers_is_two_releases() -> None:
    releases = (replace(ONE, pcrs=SIGNED_ONCE), replace(SAME_IMAGE, pcrs=SIGNED_TWICE))
    assert verified(history_of(releases)).current.releases == releases


def test_a_signed_payload_that_is_no_json() -> None:
    for payload in (b"null", b"[]", b"\xff", b"{", b'{"v":1,"v":1}'):
        refused("malformed_release", seal(payload, ED25519) + b"\n")


# --- Appending -----------------------------------------------------------------------------------------------------


def test_appending_gives_one_line() -> None:
    line = append(THREE, signer=ED25519, name=NAME, releases=[ONE], issued=EXPIRES, expires=EXPIRES + timedelta(days=1))
    assert line.endswith(b"\n")
    assert line.count(b"\n") == 1
    assert verified(THREE + line).current.releases == (ONE,)


@pytest.mark.parametrize(
    "history",
    [THREE[:-1], LINES[1], LINES[0].replace(b"e", b"f", 1), b"\n", history_of([ONE], signer=P384)],
)
def test_nothing_is_appended_to_what_does_not_verify(history: bytes) -> None:
    with pytest.raises(ReleaseError):
        append(history, signer=ED25519, name=NAME, releases=[], issued=EXPIRES, expires=EXPIRES + timedelta(days=1))


def test_nothing_is_appended_to_another_product() -> None:
    with pytest.raises(ReleaseError) as caught:
        append(THREE, signer=ED25519, name="b", releases=[], issued=EXPIRES, expires=EXPIRES + timedelta(days=1))
    assert caught.value.code == "wrong_name"


@pytest.mark.parametrize(
    "options",
    [
        {"issued": ISSUED},
        {"expires": EXPIRES},
        {"expires": EXPIRES + timedelta(days=401)},
        {"releases": [ONE, ONE]},
        {"releases": [replace(ONE, name="")]},
        {"releases": [replace(ONE, pcrs=replace(PCRS, pcr1=bytes(48)))]},
        {"releases": [replace(ONE, source=Source("x", "main"))]},
        {"releases": [replace(ONE, image=b"short")]},
    ],
)
def test_what_no_reader_would_take_is_not_written(options: dict[str, Any]) -> None:
    good: dict[str, Any] = {"releases": [ONE], "issued": EXPIRES, "expires": EXPIRES + timedelta(days=30)}
    with pytest.raises(SigningError) as caught:
        append(THREE, signer=ED25519, name=NAME, **(good | options))
    assert (caught.value.code, caught.value.exit_code) == ("unusable_statement", 2)


def test_times_have_a_zone() -> None:
    here = EXPIRES.replace(tzinfo=None)
    with pytest.raises(ValueError, match="time zone"):
        append(b"", signer=ED25519, name=NAME, releases=[], issued=here, expires=EXPIRES)


# --- Properties ----------------------------------------------------------------------------------------------------

DIGEST = st.binary(min_size=48, max_size=48)
REGISTER = DIGEST.filter(any)
TEXT = st.text(st.characters(codec="utf-8", categories=("L", "N", "P", "S")), min_size=1, max_size=40)
RELEASE = st.builds(
    ReleasedImage,
    name=TEXT,
    pcrs=st.builds(PcrSet, REGISTER, REGISTER, REGISTER, st.none() | REGISTER),
    image=st.none() | DIGEST,
    source=st.builds(Source, TEXT, st.sampled_from(["0" * 40, "f" * 64])),
    models=st.lists(DIGEST, max_size=3, unique=True).map(tuple),
    configurations=st.lists(DIGEST, max_size=3, unique=True).map(tuple),
)
RELEASES = st.lists(RELEASE, max_size=3, unique_by=(lambda release: release.name, lambda release: release.pcrs.pcr0))


@given(st.lists(RELEASES, min_size=1, max_size=4))
def test_what_is_appended_is_what_is_verified(statements: list[list[ReleasedImage]]) -> None:
    history = verified(history_of(*statements))
    assert [list(entry.statement.releases) for entry in history.entries] == statements
    for entry in history.entries:
        assert ReleaseStatement.decode(entry.statement.encode()) == entry.statement


FOUR = history_of([ONE], [TWO], [ONE], [ONE, TWO]).splitlines(keepends=True)


@given(st.lists(st.integers(0, 3), min_size=1, max_size=6))
def test_lines_are_a_history_in_their_own_order_only(order: list[int]) -> None:
    data = b"".join(FOUR[index] for index in order)
    if order == list(range(len(order))):
        assert verified(data).head.sequence == len(order)
    else:
        refused("broken_history", data)


@given(st.data())
def test_any_change_is_refused(data: st.DataObject) -> None:
    """Every byte of an Ed25519 history counts, but for what JSON lets one write in two ways, which changes nothing."""
    changed = bytearray(THREE)
    at = data.draw(st.integers(0, len(changed) - 1))
    changed[at : at + data.draw(st.integers(0, 2))] = data.draw(st.binary(max_size=3))
    try:
        history = verified(bytes(changed))
    except ReleaseError:
        return
    assert history.entries == verified(THREE).entries


@given(st.binary(max_size=400) | st.binary(max_size=100).map(lambda octets: octets + b"\n"))
def test_any_bytes_are_a_typed_error(data: bytes) -> None:
    with pytest.raises(ReleaseError):
        verified(data)


JSON = st.recursive(
    st.none() | st.integers() | st.text() | st.booleans(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
)


@given(JSON, st.sampled_from([*statement()]))
def test_any_signed_field_is_read_or_a_typed_error(value: object, field: str) -> None:
    with contextlib.suppress(ReleaseError):
        verified(signed(statement() | {field: value}))
