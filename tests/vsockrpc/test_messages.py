"""Messages: they survive the way there and back, and nothing ill-formed passes."""

from __future__ import annotations

import cbor2
import pytest
from hypothesis import given
from hypothesis import strategies as st

from attestation.errors import StrongroomError
from tests.wire import ANSWERS, CHATS, GENERATIONS
from vsockrpc.chat import MAX_CONTENT_CHARACTERS, ChatRequest
from vsockrpc.fields import MessageError
from vsockrpc.messages import (
    MAX_TOKEN_SIZE,
    Answer,
    CountRequest,
    Delta,
    DescribeRequest,
    Failure,
    MessageReader,
    Request,
    decode_answer,
    encode_message,
)

REQUESTS = st.builds(
    Request,
    st.binary(min_size=16, max_size=16),
    GENERATIONS | st.builds(CountRequest, CHATS) | st.just(DescribeRequest()),
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
        {"v": 1, "id": b"x" * 16, "method": "chat", "body": {"prompt": "hi"}},
        {"v": 1, "id": b"x" * 16, "method": "complete", "body": GOOD},
        {"v": 1, "id": b"x" * 16, "method": "count", "body": {"prompt": "hi"}},
        {"v": 1, "id": b"x" * 16, "method": "count", "body": {}},
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


def test_a_count_asks_for_what_a_conversation_is() -> None:
    body = GOOD | {"tools": [{"name": "f", "description": ""}], "truncation": "auto"}
    message: dict[str, object] = {"v": 1, "id": bytes(16), "method": "count", "body": body}
    request = Request.decode(message)
    assert request == Request(bytes(16), CountRequest(ChatRequest.decode(body)))
    assert one_message(request.encode())["method"] == "count"


@pytest.mark.parametrize(
    "body",
    [
        {"content": "x" * MAX_CONTENT_CHARACTERS},
        {"reasoning": "x" * MAX_CONTENT_CHARACTERS},
        {"tool_calls": [{"index": 127, "arguments": "", "id": "i" * 64, "name": "n" * 64}] * 128},
        {"logprobs": [[b"x" * MAX_TOKEN_SIZE, float("-inf"), [[b"", 0.0]] * 20]]},
        {"logprobs": [[b"", -1.5, []]] * 1024},
    ],
)
def test_a_delta_up_to_its_bounds(body: dict[str, object]) -> None:
    delta = decode_answer({"delta": body})
    assert isinstance(delta, Delta)
    assert one_message(delta.encode()) == {"delta": body}


CALL = {"index": 0, "arguments": "{"}
COUNTS = {"prompt_tokens": 1, "completion_tokens": 1, "cached_tokens": 0, "reasoning_tokens": 0}
DONE = {"finish_reason": "stop", "usage": COUNTS, "dropped_messages": 0}
ERROR = {"code": "x", "message": "y", "expected": None, "got": None, "retry_seconds": None}


@pytest.mark.parametrize(
    ("message", "param"),
    [
        ({}, "answer"),
        ({"start": {"model": "m"}, "delta": {"content": "x"}}, "answer"),
        ({"shout": 1}, "answer"),
        ({"start": {"model": "m" * 257}}, "model"),
        ({"start": {}}, "model"),
        ({"delta": "x"}, "delta"),
        ({"delta": {}}, "delta"),
        ({"delta": {"content": ""}}, "delta"),
        ({"delta": {"content": "", "reasoning": "", "tool_calls": [], "logprobs": []}}, "delta"),
        ({"delta": {"text": "x"}}, "text"),
        ({"delta": {"content": 5}}, "content"),
        ({"delta": {"content": "x" * (MAX_CONTENT_CHARACTERS + 1)}}, "content"),
        ({"delta": {"reasoning": b"x"}}, "reasoning"),
        ({"delta": {"reasoning": "x" * (MAX_CONTENT_CHARACTERS + 1)}}, "reasoning"),
        ({"delta": {"tool_calls": CALL}}, "tool_calls"),
        ({"delta": {"tool_calls": [CALL] * 129}}, "tool_calls"),
        ({"delta": {"tool_calls": ["x"]}}, "tool_calls"),
        ({"delta": {"tool_calls": [{"index": 0}]}}, "arguments"),
        ({"delta": {"tool_calls": [{**CALL, "index": 128}]}}, "tool_calls"),
        ({"delta": {"tool_calls": [{**CALL, "index": -1}]}}, "tool_calls"),
        ({"delta": {"tool_calls": [{**CALL, "arguments": {}}]}}, "tool_calls"),
        ({"delta": {"tool_calls": [{**CALL, "id": "c"}]}}, "name"),
        ({"delta": {"tool_calls": [{**CALL, "name": "f"}]}}, "id"),
        ({"delta": {"tool_calls": [{**CALL, "id": "c" * 65, "name": "f"}]}}, "tool_calls"),
        ({"delta": {"tool_calls": [{**CALL, "id": "c", "name": "f" * 65}]}}, "tool_calls"),
        ({"delta": {"logprobs": {"x": 1}}}, "logprobs"),
        ({"delta": {"logprobs": [[b"", 0.0, []]] * 1025}}, "logprobs"),
        ({"delta": {"logprobs": [[b"", 0.0]]}}, "logprobs"),
        ({"delta": {"logprobs": [["x", 0.0, []]]}}, "logprobs"),
        ({"delta": {"logprobs": [[b"x" * (MAX_TOKEN_SIZE + 1), 0.0, []]]}}, "logprobs"),
        ({"delta": {"logprobs": [[b"", 0.5, []]]}}, "logprobs"),
        ({"delta": {"logprobs": [[b"", float("nan"), []]]}}, "logprobs"),
        ({"delta": {"logprobs": [[b"", None, []]]}}, "logprobs"),
        ({"delta": {"logprobs": [[b"", 0.0, [[b"", 0.0]] * 21]]}}, "logprobs"),
        ({"delta": {"logprobs": [[b"", 0.0, [[b""]]]]}}, "logprobs"),
        ({"delta": {"logprobs": [[b"", 0.0, [["x", 0.0]]]]}}, "logprobs"),
        ({"delta": {"logprobs": [[b"", 0.0, [[b"x", 0.1]]]]}}, "logprobs"),
        ({"done": {**DONE, "finish_reason": "bored"}}, "finish_reason"),
        ({"done": {**DONE, "usage": {"prompt_tokens": 1, "completion_tokens": 1}}}, "cached_tokens"),
        ({"done": {**DONE, "usage": {**COUNTS, "total_tokens": 2}}}, "total_tokens"),
        *(({"done": {**DONE, "usage": {**COUNTS, name: -1}}}, name) for name in COUNTS),
        *(({"done": {**DONE, "usage": {**COUNTS, name: 2**32 + 1}}}, name) for name in COUNTS),
        ({"done": {"finish_reason": "stop", "usage": COUNTS}}, "dropped_messages"),
        ({"done": {**DONE, "dropped_messages": -1}}, "dropped_messages"),
        ({"counted": 5}, "counted"),
        ({"counted": {"prompt_tokens": -1}}, "prompt_tokens"),
        ({"counted": {"prompt_tokens": 2**32 + 1}}, "prompt_tokens"),
        ({"counted": {}}, "prompt_tokens"),
        ({"model": {"name": "m", "context": 1, "manifest": b"short"}}, "manifest"),
        ({"model": {"name": "m", "context": 0, "manifest": bytes(48)}}, "context"),
        ({"error": {**ERROR, "expected": 1}}, "expected"),
        ({"error": {**ERROR, "code": "c" * 65}}, "code"),
        ({"error": {**ERROR, "message": "m" * 4097}}, "message"),
        ({"error": {**ERROR, "got": "g" * 4097}}, "got"),
        ({"error": {**ERROR, "retry_seconds": 0}}, "retry_seconds"),
        ({"error": {**ERROR, "retry_seconds": 3601}}, "retry_seconds"),
        ({"error": {name: each for name, each in ERROR.items() if name != "retry_seconds"}}, "retry_seconds"),
    ],
)
def test_a_bad_answer_is_refused_and_the_field_named(message: dict[str, object], param: str) -> None:
    with pytest.raises(MessageError) as caught:
        decode_answer(one_message(encode_message(message)))
    assert caught.value.param == param


def test_a_failure_says_no_more_than_a_client_takes() -> None:
    error = StrongroomError("c" * 65, "m" * 5000, expected="e" * 5000, got="g" * 5000)
    failure = Failure.of(error)
    assert failure == Failure("c" * 64, "m" * 4096, "e" * 4096, "g" * 4096)
    assert decode_answer(one_message(failure.encode())) == failure


def test_a_failure_says_when_to_come_again() -> None:
    error = StrongroomError("overloaded", "later")
    assert Failure.of(error).retry_seconds is None
    error.retry_seconds = 7  # type: ignore[attr-defined]  # as Overloaded has it
    assert decode_answer(one_message(Failure.of(error).encode())) == Failure("overloaded", "later", None, None, 7)


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
