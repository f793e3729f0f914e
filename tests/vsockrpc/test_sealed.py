"""The sealed channel: what goes in comes out, and nothing else ever does."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from attestation.secret import Secret
from tests.attested import Attested
from vsockrpc.sealed import (
    ANSWER_SALT_SIZE,
    OPENING_SIZE,
    REQUEST_RECORD_SIZE,
    SEALED_SECRET_SIZE,
    AnswerOpener,
    AnswerRecords,
    ExchangeKeys,
    RecordOpener,
    RecordSealer,
    ReplaySet,
    SealedError,
    seal_request,
    split_opening,
)

KEY = Secret(b"k" * 32)
RECORD = 64
"""Bytes of plaintext in these tests' records."""

_ATTESTED = Attested()
OFFERED = _ATTESTED.key
"""The key that the result is about; a later one may be on offer by the time that a test runs."""
RESULT = _ATTESTED.result()


def open_keys(body: bytes) -> ExchangeKeys:
    return OFFERED.private.open(split_opening(body[:OPENING_SIZE]), OFFERED.commitment)


def opened(body: bytes) -> bytes:
    records = RecordOpener(open_keys(body).request)
    content = records.feed(body[OPENING_SIZE:])
    records.finish()
    return content


def sealed_records(*contents: bytes) -> list[bytes]:
    sealer = RecordSealer(KEY, RECORD)
    return [sealer.seal(content, final=index == len(contents) - 1) for index, content in enumerate(contents)]


# --- Requests -----------------------------------------------------------------------------------------------------


@given(st.binary(max_size=20_000))
def test_a_request_opens_to_what_was_sealed(content: bytes) -> None:
    assert opened(seal_request(RESULT, content).body) == content


@pytest.mark.parametrize(
    ("size", "records"), [(0, 1), (4094, 1), (4095, 2), (8188, 2), (8189, 4), (12283, 4), (16377, 8)]
)
def test_a_request_shows_only_its_bucket(size: int, records: int) -> None:
    body = seal_request(RESULT, b"x" * size).body
    assert len(body) == OPENING_SIZE + records * (4 + REQUEST_RECORD_SIZE + 16)


def test_two_requests_share_nothing() -> None:
    first, second = seal_request(RESULT, b"same").body, seal_request(RESULT, b"same").body
    assert first[1:OPENING_SIZE] != second[1:OPENING_SIZE]
    assert first[OPENING_SIZE + 4 :] != second[OPENING_SIZE + 4 :]
    assert open_keys(first).replay_tag != open_keys(second).replay_tag


def test_another_enclaves_key_does_not_open() -> None:
    other = Attested()
    sealed = split_opening(seal_request(RESULT, b"x").body[:OPENING_SIZE])
    with pytest.raises(SealedError) as caught:
        other.key.private.open(sealed, other.key.commitment)
    assert caught.value.code == "not_for_this_key"


def test_the_same_key_under_another_commitment_does_not_open() -> None:
    sealed = split_opening(seal_request(RESULT, b"x").body[:OPENING_SIZE])
    commitment = replace(OFFERED.commitment, model=b"\xee" * 48)
    with pytest.raises(SealedError) as caught:
        OFFERED.private.open(sealed, commitment)
    assert caught.value.code == "not_for_this_key"


@given(st.integers(0, SEALED_SECRET_SIZE - 1), st.integers(1, 255))
def test_a_changed_sealed_secret_never_yields_the_request(position: int, change: int) -> None:
    body = bytearray(seal_request(RESULT, b"secret").body)
    body[1 + position] ^= change
    with pytest.raises(SealedError):
        opened(bytes(body))


@given(st.binary(max_size=2 * OPENING_SIZE))
def test_any_opening_is_a_secret_or_a_typed_error(data: bytes) -> None:
    with pytest.raises(SealedError):
        OFFERED.private.open(split_opening(data), OFFERED.commitment)


# --- Records ------------------------------------------------------------------------------------------------------


@given(st.lists(st.binary(max_size=RECORD - 2), min_size=1, max_size=8), st.data())
def test_records_open_in_whatever_pieces_they_arrive(contents: list[bytes], data: st.DataObject) -> None:
    stream = b"".join(sealed_records(*contents))
    opener, got, at = RecordOpener(KEY), b"", 0
    while at < len(stream):
        size = data.draw(st.integers(1, len(stream) - at))
        got += opener.feed(stream[at : at + size])
        at += size
    opener.finish()
    assert got == b"".join(contents)


def test_byte_by_byte() -> None:
    opener = RecordOpener(KEY)
    assert b"".join(opener.feed(bytes([byte])) for byte in b"".join(sealed_records(b"one", b"two"))) == b"onetwo"
    opener.finish()


def refused(stream: bytes) -> str:
    opener = RecordOpener(KEY)
    with pytest.raises(SealedError) as caught:  # either of the two may find it
        opener.feed(stream)
        opener.finish()
    return caught.value.code


def test_cut_short_is_refused_wherever_it_is_cut() -> None:
    stream = b"".join(sealed_records(b"one", b"two", b"three"))
    for size in range(len(stream)):
        assert refused(stream[:size]) == "truncated"


def test_reordered_repeated_dropped_or_foreign_records_are_refused() -> None:
    one, two, three = sealed_records(b"one", b"two", b"three")
    foreign = RecordSealer(Secret(b"other key".ljust(32)), RECORD).seal(b"one", final=False)
    for stream in (two + one + three, one + one + three, one + three, three, foreign + two + three):
        assert refused(stream) == "tampered_record"


def test_the_final_flag_cannot_be_moved() -> None:
    one, two = sealed_records(b"one", b"two")
    assert refused(b"\x01" + one[1:]) == "tampered_record"
    assert refused(one + b"\x00" + two[1:]) == "tampered_record"


def test_nothing_may_follow_the_final_record() -> None:
    [only] = sealed_records(b"only")
    assert refused(only + b"\x00") == "after_final"


@given(st.integers(0, RECORD + 19), st.integers(1, 255))
def test_every_byte_of_a_record_counts(position: int, change: int) -> None:
    record = bytearray(sealed_records(b"content")[0])
    record[position] ^= change
    assert refused(bytes(record)) in {"tampered_record", "malformed_record", "truncated"}


def test_a_failed_direction_stays_failed() -> None:
    one, two = sealed_records(b"one", b"two")
    opener = RecordOpener(KEY)
    with pytest.raises(SealedError):
        opener.feed(two)
    with pytest.raises(SealedError):
        opener.feed(one)


@pytest.mark.parametrize("length", [0, 17, 65553, 0xFFFFFF])
def test_a_length_out_of_bounds_is_refused_before_it_is_waited_for(length: int) -> None:
    assert refused(b"\x00" + length.to_bytes(3, "big")) == "malformed_record"


@given(st.binary(max_size=4096))
def test_any_bytes_are_content_or_a_typed_error(data: bytes) -> None:
    assert refused(data) in {"tampered_record", "malformed_record", "truncated"}


def test_a_sealer_says_nothing_after_its_end() -> None:
    sealer = RecordSealer(KEY, RECORD)
    sealer.seal(b"", final=True)
    with pytest.raises(ValueError, match="final"):
        sealer.seal(b"", final=False)


def test_a_sealer_refuses_more_than_fits() -> None:
    with pytest.raises(ValueError, match="takes"):
        RecordSealer(KEY, RECORD).seal(b"x" * (RECORD - 1), final=False)


# --- Answers ------------------------------------------------------------------------------------------------------


def answer_of(keys: ExchangeKeys, *contents: bytes, bucket: int = 4) -> list[bytes]:
    answer = AnswerRecords(keys, record_size=RECORD, bucket=bucket)
    for content in contents:
        answer.write(content)
    answer.end()
    records = []
    while not answer.finished:
        records.append(answer.next_record())
    return records


@given(st.lists(st.binary(max_size=300), max_size=6), st.integers(1, 8))
def test_an_answer_opens_and_shows_only_its_bucket(contents: list[bytes], bucket: int) -> None:
    sealed = seal_request(RESULT, b"q")
    records = answer_of(open_keys(sealed.body), *contents, bucket=bucket)
    assert len(records) % bucket == 0
    assert {len(record) for record in records[1:]} <= {RECORD + 20}
    assert len(records[0]) == RECORD + 20 + ANSWER_SALT_SIZE
    content = b"".join(sealed.answer.feed(record) for record in records)
    sealed.answer.finish()
    assert content == b"".join(contents)


def test_two_answers_to_one_request_never_share_a_key_stream() -> None:
    """A parent that replays a request gets ciphertexts that it cannot subtract from each other."""
    keys = open_keys(seal_request(RESULT, b"q").body)
    first, second = answer_of(keys, b"the same text"), answer_of(keys, b"the same text")
    assert first[0][:ANSWER_SALT_SIZE] != second[0][:ANSWER_SALT_SIZE]
    assert first[0][ANSWER_SALT_SIZE:] != second[0][ANSWER_SALT_SIZE:]


def test_a_request_is_not_an_answer() -> None:
    sealed = seal_request(RESULT, b"q")
    with pytest.raises(SealedError):
        sealed.answer.feed(bytes(ANSWER_SALT_SIZE) + sealed.body[OPENING_SIZE:])


def test_an_answer_without_a_record_is_truncated() -> None:
    opener = AnswerOpener(open_keys(seal_request(RESULT, b"q").body))
    assert opener.feed(b"short") == b""
    with pytest.raises(SealedError) as caught:
        opener.finish()
    assert caught.value.code == "truncated"
    assert not opener.finished


# --- Replay -------------------------------------------------------------------------------------------------------


def test_a_replay_is_refused_and_nothing_is_forgotten() -> None:
    seen = ReplaySet(3)
    for tag in (b"a", b"b", b"c"):
        seen.add(tag)
    assert seen.full
    for tag, code in ((b"a", "replayed"), (b"b", "replayed"), (b"c", "replayed"), (b"d", "key_exhausted")):
        with pytest.raises(SealedError) as caught:
            seen.add(tag)
        assert caught.value.code == code
