"""Messages: they survive the way there and back, and nothing ill-formed passes."""

from __future__ import annotations

import cbor2
import pytest
from hypothesis import given
from hypothesis import strategies as st

from vsockrpc.chat import MAX_SEED, ChatMessage, ChatRequest
from vsockrpc.fields import MessageError
from vsockrpc.messages import (
    Answer,
    Delta,
    DescribeRequest,
    Description,
    Done,
    Failure,
    MessageReader,
    Request,
    Start,
    decode_answer,
    encode_message,
)

TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=40)
CHATS = st.builds(
    ChatRequest,
    messages=st.lists(
        st.builds(ChatMessage, st.sampled_from(["system", "user", "assistant"]), TEXT), min_size=1, max_size=4
    ).map(tuple),
    model=st.none() | TEXT,
    max_tokens=st.none() | st.integers(1, 4096),
    temperature=st.floats(0, 2),
    top_p=st.floats(0, 1, exclude_min=True),
    top_k=st.integers(0, 1000),
    min_p=st.floats(0, 1),
    seed=st.none() | st.integers(0, MAX_SEED),
    stop=st.lists(TEXT.filter(bool), max_size=3).map(tuple),
)
REQUESTS = st.builds(Request, st.binary(min_size=16, max_size=16), CHATS | st.just(DescribeRequest()))
ANSWERS: st.SearchStrategy[Answer] = st.one_of(
    st.builds(Start, TEXT),
    st.builds(Delta, TEXT),
    st.builds(Done, st.sampled_from(["stop", "length"]), st.integers(0, 2**31), st.integers(0, 2**31)),
    st.builds(Description, TEXT, st.integers(1, 2**31), st.binary(min_size=48, max_size=48)),
    st.builds(Failure, TEXT, TEXT, st.none() | TEXT, st.none() | TEXT),
)


def one_message(data: bytes) -> dict[str, object]:
    [message] = MessageReader().feed(data)
    return message


@given(REQUESTS)
def test_a_request_survives(request: Request) -> None:
    assert Request.decode(one_message(request.encode())) == request


@given(st.lists(ANSWERS, max_size=5), st.data())
def test_answers_survive_in_whatever_pieces(answers: list[Answer], data: st.DataObject) -> None:
    stream, reader, got, at = b"".join(answer.encode() for answer in answers), MessageReader(), [], 0
    while at < len(stream):
        size = data.draw(st.integers(1, len(stream) - at))
        got += [decode_answer(message) for message in reader.feed(stream[at : at + size])]
        at += size
    assert got == answers
    assert reader.buffered == 0


@given(st.binary(max_size=200))
def test_any_bytes_are_messages_or_a_typed_error(data: bytes) -> None:
    try:
        for message in MessageReader(128).feed(data):
            decode_answer(message)
            Request.decode(message)
    except MessageError as error:
        assert error.code == "invalid_request"  # noqa: PT017 - it may also be well-formed


GOOD: dict[str, object] = {"messages": [{"role": "user", "content": "hi"}]}


@pytest.mark.parametrize(
    ("change", "param"),
    [
        ({"messages": []}, "messages"),
        ({"messages": "hi"}, "messages"),
        ({"messages": [{"role": "user"}]}, "content"),
        ({"messages": [{"role": "root", "content": "hi"}]}, "messages[0].role"),
        ({"messages": [{"role": "user", "content": 5}]}, "messages[0].content"),
        ({"messages": [{"role": "user", "content": "hi", "name": "x"}]}, "name"),
        ({"messages": [{"role": "user", "content": "\ud800"}]}, "messages[0].content"),
        ({"messages": [{"role": "user", "content": "hi"}] * 1025}, "messages"),
        ({"temperature": -0.1}, "temperature"),
        ({"temperature": 2.1}, "temperature"),
        ({"temperature": float("nan")}, "temperature"),
        ({"temperature": "1"}, "temperature"),
        ({"temperature": True}, "temperature"),
        ({"top_p": -0.1}, "top_p"),
        ({"top_p": 0.0}, "top_p"),
        ({"top_p": 1.01}, "top_p"),
        ({"top_k": 1001}, "top_k"),
        ({"top_k": 1.5}, "top_k"),
        ({"min_p": -1.0}, "min_p"),
        ({"min_p": 1.5}, "min_p"),
        ({"seed": -1}, "seed"),
        ({"seed": 2**32 - 1}, "seed"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_tokens": True}, "max_tokens"),
        ({"max_tokens": 2**21}, "max_tokens"),
        ({"stop": ["x"] * 17}, "stop"),
        ({"stop": ["x" * 257]}, "stop[0]"),
        ({"stop": [""]}, "stop"),
        ({"model": 5}, "model"),
        ({"n_discard": 1}, "n_discard"),
    ],
)
def test_a_bad_field_is_named(change: dict[str, object], param: str) -> None:
    with pytest.raises(MessageError) as caught:
        ChatRequest.decode(GOOD | change)
    assert caught.value.param == param


def test_a_top_p_of_nothing_says_what_is_expected() -> None:
    with pytest.raises(MessageError) as caught:
        ChatRequest.decode(GOOD | {"top_p": 0})
    assert (caught.value.expected, caught.value.got) == ("more than 0", "0")


@pytest.mark.parametrize(
    "message",
    [
        {},
        {"v": 1, "id": b"x" * 16, "method": "chat"},
        {"v": 2, "id": b"x" * 16, "method": "chat", "body": GOOD},
        {"v": 1, "id": b"x" * 15, "method": "chat", "body": GOOD},
        {"v": 1, "id": b"x" * 16, "method": "shell", "body": GOOD},
        {"v": 1, "id": b"x" * 16, "method": "describe", "body": {"x": 1}},
        {"v": 1, "id": b"x" * 16, "method": "chat", "body": [], "extra": 1},
        {"v": 1, "id": b"x" * 16, "method": "chat", "body": []},
    ],
)
def test_a_bad_request_is_refused(message: dict[str, object]) -> None:
    with pytest.raises(MessageError):
        Request.decode(message)


@pytest.mark.parametrize(
    "body",
    [
        b"\xff",
        cbor2.dumps([1]),
        cbor2.dumps({1: 2}),
        b"\xa2\x61a\x01\x61a\x02",  # a key twice
        b"\xbf\x61a\x01\xff",  # an indefinite length
        b"\x81" * 50 + b"\x00",  # too deep
    ],
)
def test_bad_cbor_is_refused(body: bytes) -> None:
    with pytest.raises(MessageError):
        one_message(len(body).to_bytes(4, "big") + body)


def test_a_length_is_bounded_before_it_is_waited_for() -> None:
    with pytest.raises(MessageError, match="too large"):
        list(MessageReader(10).feed((11).to_bytes(4, "big")))


@pytest.mark.parametrize(
    "message",
    [
        {},
        {"start": {"model": "m"}, "delta": "x"},
        {"shout": 1},
        {"delta": 1},
        {"done": {"finish_reason": "bored", "usage": {"prompt_tokens": 1, "completion_tokens": 1}}},
        {"done": {"finish_reason": "stop", "usage": {"prompt_tokens": -1, "completion_tokens": 1}}},
        {"model": {"name": "m", "context": 1, "manifest": b"short"}},
        {"error": {"code": "x", "message": "y", "expected": 1, "got": None}},
    ],
)
def test_a_bad_answer_is_refused(message: dict[str, object]) -> None:
    with pytest.raises(MessageError):
        decode_answer(one_message(encode_message(message)))


@pytest.mark.parametrize(
    ("fields", "got"),
    [
        ({"method": [[]] * 100_000, "body": {}}, "list"),
        ({"method": "m" * 100_000, "body": {}}, "m" * 64),
        ({"method": "chat", "body": {"messages": [{"role": [[]] * 100_000, "content": ""}]}}, "list"),
        ({"method": "chat", "body": {"messages": [{"role": "r" * 100_000, "content": ""}]}}, "r" * 64),
    ],
)
def test_an_error_never_makes_a_text_of_a_foreign_structure(fields: dict[str, object], got: str) -> None:
    with pytest.raises(MessageError) as caught:
        Request.decode({"v": 1, "id": bytes(16), **fields})
    assert caught.value.got == got


@pytest.mark.parametrize("key", ["k" * 100_000, ((),) * 100_000])
def test_an_unknown_field_is_named_in_a_few_characters(key: object) -> None:
    with pytest.raises(MessageError) as caught:
        Request.decode({"v": 1, "id": bytes(16), "method": "describe", "body": {key: 1}})
    assert len(caught.value.message) < 100
    assert len(caught.value.param) <= 64
