"""A prompt that waits, as files: sealed to a judged key alone, and an answer that opens whole or not at all."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from datetime import UTC, datetime
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from attestation.envelope import PROMPT_RECORD, EnvelopeHeader, EnvelopePurpose, Terms, encryption_context
from attestation.envelope_records import Opener
from attestation.errors import StrongroomError
from attestation.keypolicy.document import KeyArn
from attestation.keypolicy.generate import generate
from attestation.keyrelease import KeyFacts, KeyRelease, judge_key, released_to
from attestation.rules import Ignore, KeyRule
from attestation.secret import Secret
from strongroom.prompt_file import Reply, ReplyError, open_answer, seal_prompt
from strongroom.session import RequestFailed
from tests.attested import CONFIGURATION, MODEL, policy_for
from tests.key_policies import ADMIN, METADATA, PARENT, SEALER
from tests.sealing import CONTEXT, FLOOR, PROMPTS_KEY
from vsockrpc.chat import ChatMessage, ChatRequest
from vsockrpc.deferred import DeferredPrompt, ReplyKeys
from vsockrpc.fields import MessageError
from vsockrpc.messages import Delta, Description, Done, Failure, Start, Usage, encode_message
from vsockrpc.sealed import AnswerRecords, SealedError

DATA_KEY = Secret(bytes(range(32)))
ASKED = ChatRequest((ChatMessage("user", "Why is the sky blue?"),), temperature=0.5)
REPLY = Reply(Secret(bytes(range(32))), bytes(range(48)))
PURPOSES = {EnvelopePurpose.PROMPT: None, EnvelopePurpose.MODEL: Ignore("a test")}


def released(purpose: EnvelopePurpose = EnvelopePurpose.PROMPT, key: KeyArn = PROMPTS_KEY) -> KeyRelease:
    """The verdict on a key that opens to the enclaves of ``tests.attested`` and to nothing else."""
    rule = KeyRule(key, CONTEXT, FLOOR, (ADMIN,), PURPOSES[purpose])
    policy = replace(policy_for(MODEL, CONFIGURATION), kms={purpose: rule})
    opening = generate(
        tuple(released_to(policy, purpose)),
        purpose=purpose,
        context=CONTEXT,
        users=[PARENT],
        sealers=[SEALER],
        administrators=[ADMIN],
    )
    return judge_key(policy, purpose, KeyFacts(replace(METADATA, arn=key), opening, ()), at=datetime.now(UTC))


# --- Sealing ----------------------------------------------------------------------------------------------------------


def test_what_is_sealed_says_what_the_verdict_says() -> None:
    envelope, reply = seal_prompt(released(), ASKED, data_key=DATA_KEY, wrapped=b"wrapped")
    header, start = EnvelopeHeader.split(envelope)
    assert (header.key, header.context, header.version, header.wrapped) == (PROMPTS_KEY, CONTEXT, FLOOR, b"wrapped")
    assert header.encryption_context == encryption_context(EnvelopePurpose.PROMPT, CONTEXT, FLOOR)
    opener = Opener(header, DATA_KEY, model=MODEL, configuration=CONFIGURATION)
    body = b"".join([*opener.feed(envelope[start:]), opener.finish()])
    prompt = DeferredPrompt.decode(body, limit=1 << 20)
    assert prompt.request.body == ASKED
    assert prompt.reply_secret == reply.secret
    assert len(prompt.request.id) == 16
    terms = Terms(EnvelopePurpose.PROMPT, (MODEL,), (CONFIGURATION,))
    assert len(terms.encode()) + len(body) == PROMPT_RECORD


@pytest.mark.parametrize(("model", "configuration"), [(bytes(48), CONFIGURATION), (MODEL, bytes(48))])
def test_its_terms_allow_what_the_policy_accepts_alone(model: bytes, configuration: bytes) -> None:
    envelope, _ = seal_prompt(released(), ASKED, data_key=DATA_KEY, wrapped=b"wrapped")
    header, start = EnvelopeHeader.split(envelope)
    opener = Opener(header, DATA_KEY, model=model, configuration=configuration)
    opener.feed(envelope[start:])
    with pytest.raises(StrongroomError) as caught:
        opener.finish()
    assert caught.value.code in ("wrong_model", "wrong_configuration")


def test_nothing_of_the_prompt_shows_but_its_bucket() -> None:
    sizes = set()
    for text in ("", "x" * 100, "x" * 3000):
        envelope, _ = seal_prompt(
            released(), ChatRequest((ChatMessage("user", text),)), data_key=DATA_KEY, wrapped=b"wrapped"
        )
        sizes.add(len(envelope))
        assert b"xxxx" not in envelope
    assert len(sizes) == 1


def test_each_prompt_has_a_reply_secret_of_its_own() -> None:
    replies = [seal_prompt(released(), ASKED, data_key=DATA_KEY, wrapped=b"w")[1] for _ in range(2)]
    assert replies[0].secret != replies[1].secret
    assert replies[0].digest != replies[1].digest


def test_a_verdict_on_a_key_of_models_seals_no_prompt() -> None:
    with pytest.raises(ValueError, match="something else than prompts"):
        seal_prompt(released(EnvelopePurpose.MODEL), ASKED, data_key=DATA_KEY, wrapped=b"w")


def test_a_data_key_of_another_size() -> None:
    with pytest.raises(StrongroomError) as caught:
        seal_prompt(released(), ASKED, data_key=Secret(bytes(16)), wrapped=b"w")
    assert caught.value.code == "malformed_envelope"


def test_a_prompt_that_no_enclave_takes() -> None:
    with pytest.raises(MessageError):
        seal_prompt(
            released(),
            ChatRequest((ChatMessage("user", "x" * (1 << 20) + "x"),)),
            data_key=DATA_KEY,
            wrapped=b"w",
        )


# --- The reply's file -------------------------------------------------------------------------------------------------


def test_a_reply_comes_back_from_its_file() -> None:
    assert Reply.decode(REPLY.encode()) == REPLY
    assert "00010203" not in repr(REPLY)


def changed(**fields: Any) -> bytes:
    whole = json.loads(REPLY.encode()) | fields
    return json.dumps({name: value for name, value in whole.items() if value is not ...}).encode()


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"{}",
        b"[]",
        b"not JSON",
        b"\xff",
        b"strongroom/1 envelope\n",
        changed(v=2),
        changed(v=True),
        changed(secret=...),
        changed(envelope=...),
        changed(more=1),
        changed(secret="00" * 31),
        changed(secret="00" * 33),
        changed(secret="zz" * 32),
        changed(secret="é" * 32),
        changed(secret=7),
        changed(envelope="00" * 47),
        changed(envelope=None),
        REPLY.encode().replace(b'"v"', b'"v": 1, "v"'),
        b"[" * 100_000,
    ],
)
def test_what_is_no_reply(data: bytes) -> None:
    with pytest.raises(ReplyError) as caught:
        Reply.decode(data)
    assert caught.value.code == "malformed_reply"
    assert "00" * 8 not in str(caught.value)


@given(st.binary(max_size=300) | st.text(max_size=200).map(str.encode))
def test_any_bytes_are_a_typed_error(data: bytes) -> None:
    with pytest.raises(ReplyError):
        Reply.decode(data)


# --- The answer -------------------------------------------------------------------------------------------------------

START, TEXT, DONE = Start("tiny"), Delta("because"), Done("stop", Usage(3, 4))
FAILED = Failure("context_exceeded", "too long", "255", "300")


def answer(messages: Sequence[Any], reply: Reply = REPLY, *, behind: bytes = b"") -> bytes:
    records = AnswerRecords(ReplyKeys(reply.secret, reply.digest), record_size=64, bucket=4)
    for message in messages:
        records.write(message if isinstance(message, bytes) else message.encode())
    records.write(behind)
    records.end()
    sealed = b""
    while not records.finished:
        sealed += records.next_record()
    return sealed


@pytest.mark.parametrize("texts", [(), ("because",), ("be", "cause", "\N{SNOWMAN}")])
def test_an_answer_opens(texts: tuple[str, ...]) -> None:
    messages = [START, *map(Delta, texts), DONE]
    assert list(open_answer(answer(messages), REPLY)) == messages


@pytest.mark.parametrize("before", [(), (START,), (START, TEXT, TEXT)])
def test_what_the_enclave_failed_with_is_raised(before: tuple[Any, ...]) -> None:
    with pytest.raises(RequestFailed) as caught:
        list(open_answer(answer([*before, FAILED]), REPLY))
    assert (caught.value.code, caught.value.expected, caught.value.got) == ("context_exceeded", "255", "300")


@pytest.mark.parametrize(
    "messages",
    [
        (),
        (START,),
        (DONE,),
        (TEXT,),
        (START, TEXT),
        (TEXT, DONE),
        (START, START, DONE),
        (START, DONE, DONE),
        (START, DONE, TEXT),
        (DONE, START),
        (TEXT, FAILED),
        (START, FAILED, DONE),
        (FAILED, FAILED),
        (Description("tiny", 256, bytes(48)),),
        (START, Description("tiny", 256, bytes(48)), DONE),
        (encode_message({"unknown": 1}),),
        (b"\xff\xff\xff\xff",),
        (b"\x00\x00\x00\x01\xff",),
    ],
)
def test_messages_out_of_order_are_no_answer(messages: tuple[Any, ...]) -> None:
    with pytest.raises(SealedError) as caught:
        list(open_answer(answer(messages), REPLY))
    assert caught.value.code == "malformed"


def test_half_a_message_at_the_end() -> None:
    with pytest.raises(SealedError, match="out of order"):
        list(open_answer(answer([START, DONE], behind=b"\x00\x00"), REPLY))


def test_nothing_is_given_of_an_answer_that_is_not_whole() -> None:
    """Not even its beginning, which has opened."""
    whole = answer([START, *[TEXT] * 40, DONE])
    for size in (0, 31, 32, 33, 200, len(whole) - 1):
        answers = open_answer(whole[:size], REPLY)
        with pytest.raises(SealedError) as caught:
            next(answers)
        assert caught.value.code == "truncated"
    for size in (200, len(whole)):
        with pytest.raises(SealedError):
            next(open_answer(whole[:size] + b"\x00" * 84, REPLY))


@given(st.data())
def test_a_changed_byte_anywhere_is_noticed(data: st.DataObject) -> None:
    whole = bytearray(answer([START, TEXT, DONE]))
    position = data.draw(st.integers(0, len(whole) - 1))
    whole[position] ^= data.draw(st.integers(1, 255))
    with pytest.raises(SealedError):
        next(open_answer(bytes(whole), REPLY))


@pytest.mark.parametrize(
    "other",
    [
        replace(REPLY, secret=Secret(bytes(32))),
        replace(REPLY, digest=bytes(48)),
    ],
    ids=["another secret", "another envelope"],
)
def test_another_reply_opens_nothing(other: Reply) -> None:
    with pytest.raises(SealedError) as caught:
        next(open_answer(answer([START, TEXT, DONE]), other))
    assert caught.value.code == "tampered_record"
    assert caught.value.message.endswith(", or not the answer to this reply file's envelope")
    assert caught.value.exit_code == 3


def test_a_reply_whose_answer_has_begun_to_open_is_not_doubted() -> None:
    whole = bytearray(answer([START, *[TEXT] * 40, DONE]))
    whole[-1] ^= 1
    with pytest.raises(SealedError, match="does not open") as caught:
        next(open_answer(bytes(whole), REPLY))
    assert caught.value.code == "tampered_record"
    assert "reply file" not in caught.value.message


def test_an_envelope_is_no_answer() -> None:
    envelope, reply = seal_prompt(released(), ASKED, data_key=DATA_KEY, wrapped=b"w")
    with pytest.raises(SealedError, match="this is the envelope, not the answer to it") as caught:
        next(open_answer(envelope, reply))
    assert (caught.value.code, caught.value.exit_code) == ("malformed", 3)


@given(st.binary(max_size=300))
def test_any_bytes_are_no_answer(data: bytes) -> None:
    with pytest.raises(SealedError):
        next(open_answer(data, REPLY))
