"""Envelopes: what goes in comes out, whole and for whom its terms name, and whatever else happens to one has a code."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from itertools import pairwise, permutations, product
from typing import Any

import cbor2
import pytest
from hypothesis import given
from hypothesis import strategies as st

from attestation.envelope import (
    LENGTH_SIZE,
    MAGIC,
    MAX_OPENING,
    MAX_RECORD,
    MAX_TERMS,
    MAX_VERSION,
    MAX_WRAPPED,
    MIN_RECORD,
    EnvelopeError,
    EnvelopeHeader,
    EnvelopePurpose,
    Terms,
    encryption_context,
    require_header,
)
from attestation.envelope_records import TAG_SIZE, Opener, Sealer
from attestation.keypolicy.document import KeyArn
from attestation.secret import Secret

KEY = KeyArn.parse("arn:aws:kms:us-east-1:111122223333:key/1234abcd-12ab-34cd-56ef-1234567890ab")
OTHER_KEY = KeyArn.parse("arn:aws:kms:us-east-1:111122223333:key/0987dcba-09fe-87dc-65ba-ab0987654321")
MODEL, CONFIGURATION = b"m" * 48, b"c" * 48
DATA_KEY = Secret(bytes(range(32)))
HEADER = EnvelopeHeader(EnvelopePurpose.MODEL, KEY, "production", 3, b"wrapped", MIN_RECORD, bytes(32))
TERMS = Terms(EnvelopePurpose.MODEL, (MODEL,), (CONFIGURATION,))
SEALED_RECORD = MIN_RECORD + TAG_SIZE
ROOM = MIN_RECORD - len(TERMS.encode())
"""Bytes of the body in a first record."""
LONGEST = 3 * MIN_RECORD


@cache
def body(size: int) -> bytes:
    return (bytes(range(251)) * (size // 251 + 1))[:size]


def sealed(content: bytes, header: EnvelopeHeader = HEADER, terms: Terms = TERMS, step: int = 1 << 20) -> bytes:
    """A whole envelope, ``step`` bytes of its body at a time."""
    sealer = Sealer(header, terms, DATA_KEY)
    pieces = [content[start : start + step] for start in range(0, len(content), step)]
    return b"".join([made for piece in pieces for made in sealer.seal(piece)] + [sealer.finish()])


def parts(envelope: bytes) -> list[bytes]:
    """The header, and each record."""
    _, at = EnvelopeHeader.split(envelope)
    return [envelope[:at], *(envelope[start : start + SEALED_RECORD] for start in range(at, len(envelope), 4112))]


def opener(header: EnvelopeHeader = HEADER, data_key: Secret = DATA_KEY) -> Opener:
    return Opener(header, data_key, model=MODEL, configuration=CONFIGURATION)


def opened(envelope: bytes, step: int = 1 << 20) -> bytes:
    header, at = EnvelopeHeader.split(envelope)
    require_header(header, purpose=EnvelopePurpose.MODEL, key=KEY, context="production", minimum_version=3)
    reader = opener(header)
    chunks = [memoryview(envelope)[start : start + step] for start in range(at, len(envelope), step)]
    content = b"".join([piece for chunk in chunks for piece in reader.feed(chunk)])
    return content + reader.finish()


def refused(envelope: bytes, *codes: str) -> EnvelopeError:
    with pytest.raises(EnvelopeError) as caught:
        opened(envelope)
    assert caught.value.code in codes
    assert caught.value.exit_code == 3
    return caught.value


# --- What goes in comes out -------------------------------------------------------------------------------------------

around_a_record = st.builds(
    lambda records, more: max(0, records * MIN_RECORD + ROOM + more), st.integers(-1, 2), st.integers(-2, 2)
)
sizes = st.one_of(st.sampled_from([0, 1]), around_a_record, st.integers(0, LONGEST))
steps = st.one_of(st.sampled_from([1, TAG_SIZE, MIN_RECORD, SEALED_RECORD, 1 << 20]), st.integers(1, LONGEST))


@given(sizes, steps, steps)
def test_any_body_in_any_pieces(size: int, seal_step: int, open_step: int) -> None:
    envelope = sealed(body(size), step=seal_step)
    assert envelope == sealed(body(size))
    assert opened(envelope, step=open_step) == body(size)


@given(st.lists(st.integers(0, 3 * SEALED_RECORD), max_size=8))
def test_cut_anywhere_into_pieces_some_of_them_empty(cuts: list[int]) -> None:
    content = body(2 * MIN_RECORD + 9)
    envelope, reader = sealed(content), opener()
    _, at = EnvelopeHeader.split(envelope)
    ends = [at, *sorted(at + cut for cut in cuts), len(envelope)]
    pieces = [piece for start, end in pairwise(ends) for piece in reader.feed(envelope[start:end])]
    assert b"".join(pieces) + reader.finish() == content
    assert reader.opened == 3


@pytest.mark.parametrize("size", [0, ROOM - 1, ROOM, ROOM + 1, ROOM + MIN_RECORD, ROOM + MIN_RECORD + 1])
def test_every_record_is_full_but_the_last_and_that_has_at_least_a_byte(size: int) -> None:
    _, *records = parts(sealed(body(size)))
    assert [len(record) for record in records[:-1]] == [SEALED_RECORD] * (len(records) - 1)
    assert TAG_SIZE < len(records[-1]) <= SEALED_RECORD
    assert len(records) == -(-(len(TERMS.encode()) + size) // MIN_RECORD)


def test_pieces_are_not_changed_by_what_follows() -> None:
    envelope = sealed(body(2 * MIN_RECORD))
    _, at = EnvelopeHeader.split(envelope)
    reader, chunk = opener(), bytearray(envelope[at:])
    pieces = reader.feed(memoryview(chunk))
    before = b"".join(pieces)
    chunk[:] = bytes(len(chunk))
    reader.finish()
    assert b"".join(pieces) == before == body(ROOM + MIN_RECORD)


def test_a_prompt_for_several_models_and_configurations() -> None:
    header = replace(HEADER, purpose=EnvelopePurpose.PROMPT)
    terms = Terms(EnvelopePurpose.PROMPT, (bytes(48), MODEL), (CONFIGURATION, bytes(48)))
    _, *records = parts(sealed(b"why?", header, terms))
    for model, configuration in product(terms.models, terms.configurations):
        reader = Opener(header, DATA_KEY, model=model, configuration=configuration)
        reader.feed(records[0])
        assert bytes(reader.finish()) == b"why?"


def test_two_envelopes_of_one_data_key_share_nothing() -> None:
    fresh = [EnvelopeHeader(EnvelopePurpose.MODEL, KEY, "production", 3, b"wrapped", MIN_RECORD) for _ in range(2)]
    one, other = (sealed(body(100), header) for header in fresh)
    assert fresh[0].salt != fresh[1].salt
    assert parts(one)[1] != parts(other)[1]


def test_nothing_follows_the_end() -> None:
    sealer = Sealer(HEADER, TERMS, DATA_KEY)
    sealer.finish()
    with pytest.raises(ValueError, match="finished"):
        sealer.seal(b"more")
    with pytest.raises(ValueError, match="finished"):
        sealer.finish()
    reader = opener()
    reader.feed(parts(sealed(b"all"))[1])
    assert bytes(reader.finish()) == b"all"
    for again in (lambda: reader.feed(b""), lambda: reader.feed(b"more"), reader.finish):
        with pytest.raises(EnvelopeError) as caught:
            again()
        assert caught.value.code == "after_final"


# --- What happens to it on the way ------------------------------------------------------------------------------------


def test_every_bit_of_a_short_envelope() -> None:
    envelope = sealed(b"body")
    for position in range(8 * len(envelope)):
        changed = bytearray(envelope)
        changed[position // 8] ^= 1 << position % 8
        with pytest.raises(EnvelopeError):
            opened(bytes(changed))


def test_every_byte_of_every_record_and_the_error_names_the_record() -> None:
    head, *records = parts(sealed(body(2 * MIN_RECORD)))
    for index, record in enumerate(records):
        for position in range(0, len(record), 1 + index):
            changed = bytearray(record)
            changed[position] ^= 1 << position % 8
            error = refused(
                b"".join([head, *records[:index], bytes(changed), *records[index + 1 :]]), "tampered_record"
            )
            assert error.expected == f"record {index} as it was sealed"
            assert error.got == f"{len(record)} other bytes in place of record {index}"


def test_every_truncation() -> None:
    envelope = sealed(body(2 * MIN_RECORD))
    _, at = EnvelopeHeader.split(envelope)
    for end in range(len(envelope)):
        records, rest = divmod(end - at, SEALED_RECORD)
        if end < at or rest <= TAG_SIZE:
            error = refused(envelope[:end], "truncated_envelope")
            assert end < at or error.expected == f"record {records}"
        else:
            assert refused(envelope[:end], "tampered_record").expected == f"record {records} as it was sealed"


def test_every_other_order() -> None:
    head, *records = parts(sealed(body(3 * MIN_RECORD)))
    assert len(records) == 4
    for order in permutations(range(4)):
        envelope = b"".join([head, *(records[index] for index in order)])
        if order == (0, 1, 2, 3):
            assert opened(envelope) == body(3 * MIN_RECORD)
            continue
        # Where the short one has moved forward, the bytes of those behind it shift: still the first that is wrong.
        first = next(place for place, index in enumerate(order) if index != place)
        assert refused(envelope, "tampered_record").expected == f"record {first} as it was sealed"


def test_a_record_left_out_or_twice() -> None:
    head, *records = parts(sealed(body(3 * MIN_RECORD)))
    for index in range(3):
        error = refused(b"".join([head, *records[:index], *records[index + 1 :]]), "tampered_record")
        assert error.expected == f"record {index} as it was sealed"
        error = refused(b"".join([head, *records[: index + 1], *records[index:]]), "tampered_record")
        assert error.expected == f"record {index + 1} as it was sealed"


def test_records_and_headers_of_another_envelope_under_the_same_data_key() -> None:
    content = body(2 * MIN_RECORD)
    mine = parts(sealed(content))
    changes: tuple[dict[str, Any], ...] = ({"salt": b"s" * 32}, {"version": 4}, {"wrapped": b"wrapped again"})
    for change in changes:
        other = parts(sealed(content, replace(HEADER, **change)))
        assert refused(b"".join([other[0], *mine[1:]]), "tampered_record").expected == "record 0 as it was sealed"
        for index in range(3):
            swapped = [*mine[: index + 1], other[index + 1], *mine[index + 2 :]]
            assert refused(b"".join(swapped), "tampered_record").expected == f"record {index} as it was sealed"


def test_what_follows_a_full_last_record() -> None:
    envelope = sealed(body(ROOM + MIN_RECORD))
    _, *records = parts(envelope)
    assert len(records[-1]) == SEALED_RECORD
    for more in (b"\0", records[0], b"".join(records)):
        assert refused(envelope + more, "after_final").expected == "the end after record 1"


def test_what_follows_a_short_last_record_changes_it() -> None:
    envelope = sealed(body(ROOM + 1))
    assert refused(envelope + b"\0", "tampered_record").expected == "record 1 as it was sealed"
    # Filled up to a whole one, and beyond.
    assert refused(envelope + bytes(2 * MIN_RECORD), "tampered_record").expected == "record 1 as it was sealed"


def test_another_data_key() -> None:
    reader = opener(data_key=Secret(bytes(32)))
    reader.feed(parts(sealed(b"body"))[1])
    with pytest.raises(EnvelopeError) as caught:
        reader.finish()
    assert caught.value.code == "tampered_record"


@pytest.mark.parametrize("size", [0, 16, 31, 33])
def test_a_data_key_of_another_size(size: int) -> None:
    for make in (lambda key: Sealer(HEADER, TERMS, key), lambda key: opener(data_key=key)):
        with pytest.raises(EnvelopeError) as caught:
            make(Secret(bytes(size)))
        assert (caught.value.code, caught.value.got) == ("malformed_envelope", f"{size} bytes")


def test_who_goes_on_after_a_failure_meets_it_again() -> None:
    """Else what follows the last record could be left out by asking for the end."""
    reader = opener()
    _, *records = parts(sealed(body(ROOM)))
    with pytest.raises(EnvelopeError):
        reader.feed(records[0] + b"more")
    for again in (lambda: reader.feed(b""), lambda: reader.feed(records[0]), reader.finish):
        with pytest.raises(EnvelopeError) as caught:
            again()
        assert caught.value.code == "after_final"


# --- Who may open it --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("code", "change", "expected", "got"),
    [
        ("wrong_purpose", {"purpose": EnvelopePurpose.PROMPT}, "prompt", "model"),
        ("wrong_key", {"key": OTHER_KEY}, OTHER_KEY.text, KEY.text),
        ("wrong_context", {"context": "staging"}, "staging", "production"),
        ("rolled_back", {"minimum_version": 4}, "version 4 or later", "version 3"),
    ],
)
def test_another_envelope_than_one_is_configured_to_open(
    code: str, change: dict[str, Any], expected: str, got: str
) -> None:
    mine: dict[str, Any] = {
        "purpose": EnvelopePurpose.MODEL,
        "key": KEY,
        "context": "production",
        "minimum_version": 3,
    }
    require_header(HEADER, **mine)
    require_header(replace(HEADER, version=MAX_VERSION), **mine)
    with pytest.raises(EnvelopeError) as caught:
        require_header(HEADER, **(mine | change))
    assert (caught.value.code, caught.value.expected, caught.value.got) == (code, expected, got)


@pytest.mark.parametrize(
    ("code", "change"), [("wrong_model", {"model": bytes(48)}), ("wrong_configuration", {"configuration": bytes(48)})]
)
def test_another_model_or_configuration_gets_nothing_of_the_body(code: str, change: dict[str, bytes]) -> None:
    _, *records = parts(sealed(body(2 * MIN_RECORD)))
    mine: dict[str, bytes] = {"model": MODEL, "configuration": CONFIGURATION}
    reader = Opener(HEADER, DATA_KEY, **(mine | change))
    assert reader.feed(records[0]) == []
    with pytest.raises(EnvelopeError, match="record 0") as caught:
        reader.feed(records[1])
    assert caught.value.code == code
    [name] = change
    assert caught.value.expected == f"sha384:{mine[name].hex()}"
    assert caught.value.got == f"sha384:{bytes(48).hex()}"
    assert reader.opened == 0


def test_a_sealer_does_not_contradict_itself() -> None:
    with pytest.raises(EnvelopeError) as caught:
        Sealer(HEADER, Terms(EnvelopePurpose.PROMPT, (MODEL,), (CONFIGURATION,)), DATA_KEY)
    assert (caught.value.code, caught.value.expected, caught.value.got) == ("wrong_purpose", "model", "prompt")


# --- The header -------------------------------------------------------------------------------------------------------

headers = st.builds(
    EnvelopeHeader,
    purpose=st.sampled_from(EnvelopePurpose),
    key=st.sampled_from([KEY, OTHER_KEY]),
    context=st.from_regex(r"[a-z0-9._-]{1,64}", fullmatch=True),
    version=st.integers(1, MAX_VERSION),
    wrapped=st.binary(min_size=1, max_size=400) | st.just(bytes(MAX_WRAPPED)),
    record=st.integers(MIN_RECORD, MAX_RECORD),
    salt=st.binary(min_size=32, max_size=32),
)


@given(headers, st.binary(max_size=20))
def test_a_header_is_read_as_it_was_written(header: EnvelopeHeader, behind: bytes) -> None:
    encoded = header.encode()
    assert len(encoded) <= MAX_OPENING
    assert EnvelopeHeader.split(encoded + behind) == (header, len(encoded))
    assert encoded.startswith(b"strongroom/1 envelope\n")
    # PROTOCOL.md section 6.4 names these keys and no other.
    assert cbor2.loads(encoded[len(MAGIC) + LENGTH_SIZE :]) == {
        "v": 1,
        "purpose": header.purpose.value,
        "key": header.key.text,
        "context": header.encryption_context,
        "wrapped": header.wrapped,
        "version": header.version,
        "record": header.record,
        "salt": header.salt,
    }


def test_the_encryption_context() -> None:
    expected = {
        "strongroom": "1",
        "strongroom:purpose": "model",
        "strongroom:context": "production",
        "strongroom:version": "3",
    }
    assert encryption_context(EnvelopePurpose.MODEL, "production", 3) == expected == HEADER.encryption_context


def test_the_tables_of_the_purposes() -> None:
    assert {purpose: purpose.table for purpose in EnvelopePurpose} == {"model": "model", "prompt": "prompts"}


@pytest.mark.parametrize(
    "change",
    [
        {"context": ""},
        {"context": "Production"},
        {"context": "a\n"},
        {"context": "x" * 65},
        {"version": 0},
        {"version": MAX_VERSION + 1},
        {"wrapped": b""},
        {"wrapped": bytes(MAX_WRAPPED + 1)},
        {"record": MIN_RECORD - 1},
        {"record": MAX_RECORD + 1},
        {"salt": bytes(31)},
        {"salt": bytes(33)},
    ],
    ids=lambda change: str(change)[:40],
)
def test_no_header_is_out_of_bounds(change: dict[str, Any]) -> None:
    with pytest.raises(EnvelopeError) as caught:
        replace(HEADER, **change)
    assert caught.value.code == "malformed_envelope"


@given(st.binary(max_size=200))
def test_any_bytes_are_a_header_or_a_typed_error(data: bytes) -> None:
    for beginning in (data, MAGIC + data, MAGIC + len(data).to_bytes(4, "big") + data):
        with pytest.raises(EnvelopeError):
            EnvelopeHeader.split(beginning)


# --- The terms --------------------------------------------------------------------------------------------------------

digests = st.lists(st.binary(min_size=48, max_size=48), min_size=1, max_size=40).map(tuple)


@given(digests, digests, st.binary(max_size=20))
def test_terms_are_read_as_they_were_written(
    models: tuple[bytes, ...], configurations: tuple[bytes, ...], behind: bytes
) -> None:
    terms = Terms(EnvelopePurpose.PROMPT, models, configurations)
    encoded = terms.encode()
    assert Terms.split(encoded + behind) == (terms, len(encoded))
    assert cbor2.loads(encoded[LENGTH_SIZE:]) == {
        "v": 1,
        "purpose": "prompt",
        "models": list(models),
        "configurations": list(configurations),
    }


def test_the_longest_terms_fit_into_the_smallest_record() -> None:
    def of(count: int) -> Terms:
        return Terms(EnvelopePurpose.PROMPT, (MODEL,) * count, (CONFIGURATION,))

    assert len(of(79).encode()) <= MAX_TERMS + LENGTH_SIZE == MIN_RECORD
    with pytest.raises(EnvelopeError, match="length"):
        of(80)


@pytest.mark.parametrize(
    ("purpose", "models", "configurations"),
    [
        (EnvelopePurpose.MODEL, (), (CONFIGURATION,)),
        (EnvelopePurpose.MODEL, (MODEL, MODEL), (CONFIGURATION,)),
        (EnvelopePurpose.PROMPT, (), (CONFIGURATION,)),
        (EnvelopePurpose.PROMPT, (MODEL,), ()),
        (EnvelopePurpose.PROMPT, (MODEL, bytes(47)), (CONFIGURATION,)),
        (EnvelopePurpose.MODEL, (MODEL,), (bytes(49),)),
    ],
)
def test_no_terms_allow_nobody(
    purpose: EnvelopePurpose, models: tuple[bytes, ...], configurations: tuple[bytes, ...]
) -> None:
    with pytest.raises(EnvelopeError) as caught:
        Terms(purpose, models, configurations)
    assert caught.value.code == "malformed_envelope"


@given(st.binary(max_size=200))
def test_any_bytes_are_terms_or_a_typed_error(data: bytes) -> None:
    for content in (data, len(data).to_bytes(4, "big") + data):
        with pytest.raises(EnvelopeError) as caught:
            Terms.split(content)
        assert caught.value.code == "malformed_envelope"
