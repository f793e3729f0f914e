"""What the enclave opens and what it does not; and KMS is asked for nothing that the configuration does not name."""

from __future__ import annotations

import asyncio
import dataclasses
import itertools
from collections.abc import Iterable
from typing import Any

import cbor2
import pytest
from hypothesis import given
from hypothesis import strategies as st

from attestation.envelope import LENGTH_SIZE, MAGIC, MAX_HEADER, MAX_OPENING, EnvelopeError, encryption_context
from attestation.errors import StrongroomError
from enclave.config import WrappedKey
from enclave.kms import release
from enclave.kms.errors import KmsError
from enclave.kms.release import AT_KMS, WAITING, EnvelopeKeys, EnvelopeReader, GuardedKms
from tests.sealing import CONTEXT, FLOOR, MODEL, MODEL_KEY, OTHER_KEY, PROMPT, LocalKms, Sealing, split_records

MANIFEST, CONFIGURATION, OTHERS = b"\x10" * 48, b"\x11" * 48, b"\x12" * 48
BODY = bytes(range(256)) * 64
"""With the terms, five records."""
WRAPPED = WrappedKey(MODEL_KEY, CONTEXT, FLOOR)


@pytest.fixture
def kms() -> LocalKms:
    return LocalKms()


@pytest.fixture
def sealing(kms: LocalKms) -> Sealing:
    return Sealing(kms.wrap, MODEL, MODEL_KEY, (MANIFEST,), (CONFIGURATION,))


def reader(kms: LocalKms, wrapped: WrappedKey = WRAPPED, **changed: Any) -> EnvelopeReader:
    told: dict[str, Any] = {"purpose": MODEL, "model": MANIFEST, "configuration": CONFIGURATION} | changed
    purpose = told.pop("purpose")
    return EnvelopeReader(EnvelopeKeys(kms, purpose, wrapped, **told))


async def opened(reading: EnvelopeReader, pieces: Iterable[bytes]) -> bytes:
    body = bytearray()
    for piece in pieces:
        for known in await reading.feed(piece):
            body += known
    return bytes(body + reading.finish())


async def refusal(reading: EnvelopeReader, *pieces: bytes) -> StrongroomError:
    with pytest.raises(StrongroomError) as caught:
        await opened(reading, pieces)
    return caught.value


# --- What is opened ---------------------------------------------------------------------------------------------------


async def test_an_envelope_opens_and_kms_is_asked_once(kms: LocalKms, sealing: Sealing) -> None:
    assert await opened(reader(kms), [sealing.seal(BODY)]) == BODY
    assert kms.asked == [(MODEL_KEY, encryption_context(MODEL, CONTEXT, FLOOR))]


async def test_a_later_version_than_the_floor_is_told_to_kms(kms: LocalKms, sealing: Sealing) -> None:
    """The version is the one thing of the header that enters the encryption context, and KMS authenticates it."""
    assert await opened(reader(kms), [sealing.but(version=FLOOR + 4).seal(BODY)]) == BODY
    assert kms.asked[0][1]["strongroom:version"] == str(FLOOR + 4)


@pytest.mark.parametrize("size", [1, 2, 3, 31, 4096, 4112, 100_000])
async def test_it_may_come_in_pieces_of_any_size(kms: LocalKms, sealing: Sealing, size: int) -> None:
    envelope = sealing.seal(BODY)
    pieces = [envelope[at : at + size] for at in range(0, len(envelope), size)]
    assert await opened(reader(kms), pieces) == BODY
    assert len(kms.asked) == 1


@given(st.binary(max_size=9000), st.lists(st.integers(0, 10_000), max_size=12))
def test_wherever_it_is_cut_the_body_is_the_same(body: bytes, cuts: list[int]) -> None:
    kms = LocalKms()
    envelope = Sealing(kms.wrap, MODEL, MODEL_KEY, (MANIFEST,), (CONFIGURATION,)).seal(body)
    bounds = [0, *sorted(min(cut, len(envelope)) for cut in cuts), len(envelope)]
    pieces = [envelope[start:end] for start, end in itertools.pairwise(bounds)]
    assert asyncio.run(opened(reader(kms), pieces)) == body


async def test_memory_that_is_used_again_does_not_change_what_was_given(kms: LocalKms, sealing: Sealing) -> None:
    """A transport may fill one buffer again and again."""
    envelope, reading, known = sealing.seal(BODY), reader(kms), []
    buffer = bytearray(1000)
    for at in range(0, len(envelope), 1000):
        piece = envelope[at : at + 1000]
        buffer[: len(piece)] = piece
        known += await reading.feed(memoryview(buffer)[: len(piece)])
    assert b"".join([*known, reading.finish()]) == BODY


async def test_an_envelope_of_nothing_but_terms(kms: LocalKms, sealing: Sealing) -> None:
    assert await opened(reader(kms), [sealing.seal(b"")]) == b""


async def test_one_of_several_that_are_allowed(kms: LocalKms, sealing: Sealing) -> None:
    prompt = sealing.but(purpose=PROMPT, models=(OTHERS, MANIFEST), configurations=(OTHERS, CONFIGURATION))
    assert await opened(reader(kms, purpose=PROMPT), [prompt.seal(BODY)]) == BODY


# --- What the configuration does not name: KMS is not asked -----------------------------------------------------------


UNNAMED: dict[str, tuple[dict[str, Any], str]] = {
    "another purpose": ({"purpose": PROMPT}, "wrong_purpose"),
    "another key": ({"key": OTHER_KEY}, "wrong_key"),
    "the key in another region": ({"key": dataclasses.replace(MODEL_KEY, region="eu-west-1")}, "wrong_key"),
    "the key of another account": ({"key": dataclasses.replace(MODEL_KEY, account="444455556666")}, "wrong_key"),
    "another context": ({"context": "production"}, "wrong_context"),
    "an older version": ({"version": FLOOR - 1}, "rolled_back"),
    "the oldest version": ({"version": 1}, "rolled_back"),
}


@pytest.mark.parametrize(("changed", "code"), UNNAMED.values(), ids=UNNAMED)
async def test_kms_is_not_asked_for_what_is_not_named(
    kms: LocalKms, sealing: Sealing, changed: dict[str, Any], code: str
) -> None:
    error = await refusal(reader(kms), sealing.but(**changed).seal(BODY))
    assert isinstance(error, EnvelopeError)
    assert error.code == code
    assert error.expected != error.got
    assert kms.asked == []


async def test_a_prompt_that_asks_for_much_memory_is_refused_before_kms_is_asked(
    kms: LocalKms, sealing: Sealing
) -> None:
    prompt = sealing.but(purpose=PROMPT, record=4 << 20)
    error = await refusal(reader(kms, purpose=PROMPT), prompt.seal(b"x"))
    assert (error.code, error.expected, error.got) == ("malformed_envelope", "4096 bytes", "4194304 bytes")
    assert kms.asked == []
    assert await opened(reader(kms), [sealing.but(record=4 << 20).seal(b"x")]) == b"x"


@pytest.mark.parametrize(
    "beginning",
    [
        b"GGUF\x03\x00\x00\x00",
        b"\n",
        b"strongroom/2 envelope\n",
        MAGIC + bytes(4),
        MAGIC + (MAX_HEADER + 1).to_bytes(4, "big"),
        MAGIC + b"\xff\xff\xff\xff",
        MAGIC + (1).to_bytes(4, "big") + b"\xa0",
        MAGIC + (5).to_bytes(4, "big") + b"\xff" * 5,
    ],
    ids=[
        "a model",
        "a line",
        "another version",
        "no header",
        "one too long",
        "far too long",
        "an empty one",
        "no CBOR",
    ],
)
async def test_what_is_no_envelope(kms: LocalKms, beginning: bytes) -> None:
    assert (await refusal(reader(kms), beginning)).code == "malformed_envelope"
    assert (await refusal(reader(kms), *(bytes([byte]) for byte in beginning))).code == "malformed_envelope"
    assert kms.asked == []


@given(st.binary(max_size=400))
def test_any_bytes_are_a_typed_refusal(data: bytes) -> None:
    kms = LocalKms()
    for beginning in (b"", MAGIC, MAGIC + len(data).to_bytes(LENGTH_SIZE, "big")):
        assert isinstance(asyncio.run(refusal(reader(kms), beginning + data)), EnvelopeError)
    assert kms.asked == []


async def test_a_header_that_never_ends_is_given_up(kms: LocalKms) -> None:
    """However it drips: no more is held than a header may have."""
    reading = reader(kms)
    beginning = MAGIC + MAX_HEADER.to_bytes(LENGTH_SIZE, "big")
    assert await reading.feed(beginning) == []
    for _ in range(MAX_OPENING - len(beginning) - 1):
        assert await reading.feed(b"\x00") == []
    with pytest.raises(EnvelopeError) as caught:
        await reading.feed(b"\x00")
    assert caught.value.code == "malformed_envelope"


@pytest.mark.parametrize("field", ["purpose", "key", "version", "context"])
async def test_a_header_that_was_changed_to_fit_does_not_open(kms: LocalKms, sealing: Sealing, field: str) -> None:
    """Whoever carries an envelope may write what the configuration asks for into its header."""
    meant = {"purpose": PROMPT, "key": OTHER_KEY, "version": FLOOR - 1, "context": "production"}[field]
    foreign = sealing.but(**{field: meant})
    header, records = split_records(foreign.seal(BODY))
    fields = cbor2.loads(header[len(MAGIC) + LENGTH_SIZE :])
    right = cbor2.loads(sealing.header().encode()[len(MAGIC) + LENGTH_SIZE :])
    encoded = cbor2.dumps(fields | {name: right[name] for name in (field, "context")}, canonical=True)
    forged = MAGIC + len(encoded).to_bytes(LENGTH_SIZE, "big") + encoded + b"".join(records)
    error = await refusal(reader(kms), forged)
    assert isinstance(error, KmsError)
    assert error.code == "kms_wrong_context"


async def test_a_wrapped_key_in_the_header_of_another_envelope(kms: LocalKms, sealing: Sealing) -> None:
    """KMS releases it, as it is for this purpose and context; the records are bound to their own header."""
    one, other = sealing.seal(BODY), sealing.but(data_key=b"\x07" * 32).seal(BODY)
    header, _ = split_records(one)
    _, records = split_records(other)
    error = await refusal(reader(kms), header + b"".join(records))
    assert error.code == "tampered_record"
    _, again = split_records(sealing.seal(BODY))  # under the same data key
    assert (await refusal(reader(kms), header + b"".join(again))).code == "tampered_record"


# --- What KMS does not release ----------------------------------------------------------------------------------------


async def test_what_kms_says_is_said(kms: LocalKms, sealing: Sealing) -> None:
    kms.error = KmsError("kms_denied", "no", expected="a", got="b")
    assert await refusal(reader(kms), sealing.seal(BODY)) is kms.error


async def test_a_wrapped_key_of_another_key_or_context(kms: LocalKms, sealing: Sealing) -> None:
    for moved in (
        sealing.but(wrapped_by=OTHER_KEY),
        sealing.but(wrapped_under=encryption_context(PROMPT, CONTEXT, FLOOR)),
        sealing.but(wrapped_under=encryption_context(MODEL, "production", FLOOR)),
        sealing.but(wrapped_under=encryption_context(MODEL, CONTEXT, FLOOR - 1)),
    ):
        assert (await refusal(reader(kms), moved.seal(BODY))).code == "kms_wrong_context"


@pytest.mark.parametrize("size", [0, 16, 31, 33, 64])
async def test_a_data_key_of_another_size(kms: LocalKms, sealing: Sealing, size: int) -> None:
    _, records = split_records(sealing.seal(BODY))
    other = sealing.but(data_key=bytes(size)).header().encode()
    error = await refusal(reader(kms), other + b"".join(records))
    assert (error.code, error.expected, error.got) == ("malformed_envelope", "32 bytes", f"{size} bytes")


# --- What anybody may bring -------------------------------------------------------------------------------------------


WORTHLESS = bytes(100)


async def asked(guarded: GuardedKms, wrapped: bytes = WORTHLESS, version: int = FLOOR) -> str:
    """The code of the refusal."""
    with pytest.raises(KmsError) as caught:
        await guarded.decrypt(wrapped, key=MODEL_KEY, context=encryption_context(PROMPT, CONTEXT, version))
    return caught.value.code


async def turns(count: int = 10) -> None:
    for _ in range(count):
        await asyncio.sleep(0)


@pytest.mark.parametrize("code", ["kms_wrong_context", "kms_wrong_key"])
async def test_kms_is_asked_once_for_what_it_refuses_for_good(kms: LocalKms, code: str) -> None:
    guarded = GuardedKms(kms)
    kms.error = KmsError(code, "no")
    assert [await asked(guarded) for _ in range(3)] == [code] * 3
    assert len(kms.asked) == 1
    await asked(guarded, version=FLOOR + 1)
    await asked(guarded, bytes(99))
    assert len(kms.asked) == 3


@pytest.mark.parametrize("code", ["kms_denied", "kms_unusable_key", "kms_unreachable", "kms_throttled", "overloaded"])
async def test_kms_is_asked_again_where_it_may_say_something_else(kms: LocalKms, code: str) -> None:
    guarded = GuardedKms(kms)
    kms.error = KmsError(code, "not now")
    assert [await asked(guarded) for _ in range(3)] == [code] * 3
    assert len(kms.asked) == 3


async def test_refusals_are_forgotten_before_they_are_too_many(kms: LocalKms, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(release, "REFUSALS", 2)
    guarded = GuardedKms(kms)
    for size in (1, 2, 3, 3, 2):
        await asked(guarded, bytes(size))
    assert len(kms.asked) == 3
    await asked(guarded, bytes(1))
    assert len(kms.asked) == 4


async def test_many_questions_at_once_are_refused(kms: LocalKms) -> None:
    guarded, kms.held = GuardedKms(kms), asyncio.Event()
    asking = [asyncio.create_task(asked(guarded, bytes(1 + size))) for size in range(AT_KMS + WAITING)]
    await turns()
    assert len(kms.asked) == AT_KMS
    assert await asked(guarded, bytes(5000)) == "overloaded"
    kms.held.set()
    assert set(await asyncio.gather(*asking)) == {"kms_wrong_context"}
    assert len(kms.asked) == AT_KMS + WAITING
    assert await asked(guarded, bytes(5000)) == "kms_wrong_context"


async def test_whoever_waited_is_told_what_kms_said_of_the_same(kms: LocalKms) -> None:
    guarded, kms.held = GuardedKms(kms), asyncio.Event()
    asking = [asyncio.create_task(asked(guarded)) for _ in range(AT_KMS + WAITING)]
    await turns()
    kms.held.set()
    assert set(await asyncio.gather(*asking)) == {"kms_wrong_context"}
    assert len(kms.asked) == AT_KMS


async def test_leaving_early_gives_no_second_place(kms: LocalKms) -> None:
    guarded, kms.held = GuardedKms(kms), asyncio.Event()
    leaving = [asyncio.create_task(asked(guarded, bytes(1 + size))) for size in range(AT_KMS + 1)]
    await turns()
    for task in leaving:
        task.cancel()
    await asyncio.gather(*leaving, return_exceptions=True)
    staying = asyncio.create_task(asked(guarded, bytes(5000)))
    await turns()
    assert len(kms.asked) == AT_KMS, "those whom nobody waits for"
    kms.held.set()
    assert await staying == "kms_wrong_context"
    assert len(kms.asked) == AT_KMS + 1, "who left before their turn is not asked for"
    assert await asked(guarded, bytes(1)) == "kms_wrong_context"
    assert len(kms.asked) == AT_KMS + 1, "what was said to nobody is remembered too"


async def test_an_end_in_the_middle_of_a_question(kms: LocalKms) -> None:
    guarded, kms.held = GuardedKms(kms), asyncio.Event()
    asking = asyncio.create_task(asked(guarded))
    await turns()
    for task in guarded._asking:
        task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await asking
    kms.held.set()
    assert await asked(guarded) == "kms_wrong_context"


# --- Who may use the body ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changed", "code"),
    [({"models": (OTHERS,)}, "wrong_model"), ({"configurations": (OTHERS, b"\x13" * 48)}, "wrong_configuration")],
)
async def test_terms_that_allow_somebody_else_give_nothing_of_the_body(
    kms: LocalKms, sealing: Sealing, changed: dict[str, Any], code: str
) -> None:
    header, records = split_records(sealing.but(**changed).seal(BODY))
    reading = reader(kms)
    assert await reading.feed(header + records[0]) == []
    for _ in range(2):
        with pytest.raises(EnvelopeError) as caught:
            await reading.feed(b"".join(records[1:]))
        assert caught.value.code == code
        assert caught.value.got in (f"sha384:{MANIFEST.hex()}", f"sha384:{CONFIGURATION.hex()}")
    with pytest.raises(EnvelopeError, match=f"\\[{code}\\]"):
        reading.finish()


# --- Records that are not what they were ------------------------------------------------------------------------------


@pytest.mark.parametrize("index", range(5))
async def test_each_record_that_was_changed_is_named(kms: LocalKms, sealing: Sealing, index: int) -> None:
    header, records = split_records(sealing.seal(BODY))
    assert len(records) == 5
    for position in (0, len(records[index]) // 2, len(records[index]) - 1):
        changed = bytearray(records[index])
        changed[position] ^= 1
        harmed = [*records[:index], bytes(changed), *records[index + 1 :]]
        error = await refusal(reader(kms), header + b"".join(harmed))
        assert (error.code, error.expected) == ("tampered_record", f"record {index} as it was sealed")


async def test_records_out_of_place(kms: LocalKms, sealing: Sealing) -> None:
    header, records = split_records(sealing.seal(BODY))
    for harmed, code, index in (
        ([records[1], records[0], *records[2:]], "tampered_record", 0),
        ([*records[:3], records[2], records[4]], "tampered_record", 3),
        ([*records[:2], *records[3:]], "tampered_record", 2),
        (records[:-1], "truncated_envelope", 4),
        (records[:1], "truncated_envelope", 1),
        ([], "truncated_envelope", 0),
    ):
        error = await refusal(reader(kms), header + b"".join(harmed))
        assert error.code == code
        assert f"record {index}" in str(error.expected)


@pytest.mark.parametrize("size", [0, 1, len(MAGIC), len(MAGIC) + 3, len(MAGIC) + 4, 200])
async def test_cut_within_the_header(kms: LocalKms, sealing: Sealing, size: int) -> None:
    error = await refusal(reader(kms), sealing.seal(BODY)[:size])
    assert (error.code, error.got) == ("truncated_envelope", f"{size} bytes")
    assert kms.asked == []


async def test_nothing_follows_the_final_record(kms: LocalKms, sealing: Sealing) -> None:
    assert (await refusal(reader(kms), sealing.seal(BODY) + b"\x00")).code == "tampered_record"
    filled = sealing.seal(BODY[: -len(sealing.terms.encode())])  # the last record is as long as the others
    error = await refusal(reader(kms), filled + b"\x00")
    assert (error.code, error.expected) == ("after_final", "the end after record 3")
