"""The pipe's messages: each comes back as it was sent, and nothing else is one."""

from __future__ import annotations

from dataclasses import asdict

import cbor2
import pytest
from hypothesis import given
from hypothesis import strategies as st

from enclave.generation import ContextExceeded, EngineError, InvalidRequest, Overloaded
from enclave.pipe import (
    MAX_DELTA_CHARACTERS,
    MAX_TO_SERVER,
    MAX_TO_WORKER,
    Alive,
    Cancel,
    End,
    Failed,
    Generate,
    Load,
    PipeError,
    Ready,
    Refused,
    Text,
    ToServer,
    ToWorker,
    read_to_server,
    read_to_worker,
)
from vsockrpc.chat import ChatMessage, ChatRequest
from vsockrpc.messages import Done, MessageReader, Usage, encode_message

REQUEST = ChatRequest(
    (ChatMessage("system", "a"), ChatMessage("user", "ü🌞")),
    model="tiny",
    max_tokens=5,
    temperature=0.5,
    top_p=0.9,
    top_k=4,
    min_p=0.1,
    seed=2**32 - 2,
    stop=("x",),
)
BODY = {"messages": [{"role": "user", "content": "x"}]}
TO_WORKER: list[ToWorker] = [
    Load("{{ x }}", 2048, 128, 2, 64, 64001, 4711),
    Generate(0, REQUEST),
    Generate(2**63 - 1, ChatRequest((ChatMessage("user", ""),))),
    Cancel(3),
]
TO_SERVER: list[ToServer] = [
    Ready(own_user=True, seccomp=False),
    Refused("model_refused", "no", None, "x"),
    Alive(),
    Text(1, "ü🌞"),
    Text(1, "🌞" * MAX_DELTA_CHARACTERS),
    End(1, Done("stop", Usage(3, 4))),
]


def test_messages_to_the_worker_come_back_byte_by_byte() -> None:
    reader = MessageReader(MAX_TO_WORKER)
    data = b"".join(message.encode() for message in TO_WORKER)
    assert [message for byte in data for message in read_to_worker(reader, bytes([byte]))] == TO_WORKER


def test_messages_to_the_server_come_back_byte_by_byte() -> None:
    reader = MessageReader(MAX_TO_SERVER)
    data = b"".join(message.encode() for message in TO_SERVER)
    assert [message for byte in data for message in read_to_server(reader, bytes([byte]))] == TO_SERVER


@pytest.mark.parametrize(
    "error",
    [InvalidRequest("no", got="x"), ContextExceeded("long", expected="<= 5", got="6"), Overloaded(expected=1, got=2)],
)
def test_errors_keep_their_type(error: EngineError) -> None:
    [failed] = read_to_server(MessageReader(MAX_TO_SERVER), Failed(7, error).encode())
    assert isinstance(failed, Failed)
    assert type(failed.error) is type(error)
    assert failed.error.as_json() == error.as_json()


@pytest.mark.parametrize(
    "message",
    [
        {},
        {"ready": [True, True], "alive": None},
        {"ready": [1, 0]},
        {"ready": [True]},
        {"alive": 1},
        {"text": [0, ""]},
        {"text": [0, "x" * (MAX_DELTA_CHARACTERS + 1)]},
        {"text": [-1, "x"]},
        {"text": [2**63, "x"]},
        {"text": [True, "x"]},
        {"text": [0, b"x"]},
        {"end": [0, "stopped", 1, 1]},
        {"end": [0, ["stop"], 1, 1]},
        {"end": [0, "stop", -1, 1]},
        {"end": [0, "stop", 1, 2**40]},
        {"failed": [0, "engine_failed", "x", None, None]},
        {"failed": [0, "overloaded", "x" * 513, None, None]},
        {"failed": [0, "overloaded", "two\nlines", None, None]},
        {"failed": [0, ["overloaded"], "x", None, None]},
        {"refused": ["code", "message", 1, None]},
        {"cancel": 1},
    ],
)
def test_what_the_worker_may_not_say(message: dict[str, object]) -> None:
    with pytest.raises(PipeError):
        list(read_to_server(MessageReader(MAX_TO_SERVER), encode_message(message)))


@pytest.mark.parametrize(
    "message",
    [
        {"load": {}},
        {"load": {**asdict(TO_WORKER[0]), "template": 1}},
        {"load": {**asdict(TO_WORKER[0]), "uid": -1}},
        {"generate": [0, {"messages": [], "stop": None}]},
        {"generate": [0, {"messages": [{"role": "user"}], "stop": []}]},
        {"generate": [0, {**BODY, "unknown": 1}]},
        {"generate": [0, {**BODY, "stop": [1]}]},
        {"generate": [-1, BODY]},
        {"generate": 0},
        {"cancel": "x"},
        {"alive": None},
    ],
)
def test_what_the_server_may_not_say(message: dict[str, object]) -> None:
    with pytest.raises(PipeError):
        list(read_to_worker(MessageReader(MAX_TO_WORKER), encode_message(message)))


def test_bounds_are_checked_on_both_sides_of_the_pipe() -> None:
    message = {"generate": [0, {**BODY, "temperature": 3.0}]}
    with pytest.raises(PipeError, match="temperature is out of range"):
        list(read_to_worker(MessageReader(MAX_TO_WORKER), encode_message(message)))


@given(
    st.binary(max_size=64)
    | st.recursive(st.none() | st.integers() | st.text() | st.floats(), st.lists).map(cbor2.dumps)
)
def test_garbage_is_a_typed_error_or_waits_for_more(body: bytes) -> None:
    for data in (body, len(body).to_bytes(4, "big") + body):
        try:
            list(read_to_server(MessageReader(MAX_TO_SERVER), data))
        except PipeError as error:
            assert error.code == "engine_protocol"  # noqa: PT017 - it may also be incomplete
