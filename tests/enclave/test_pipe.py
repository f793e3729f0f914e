"""The pipe's messages: each comes back as it was sent, and nothing else is one."""

from __future__ import annotations

import cbor2
import pytest
from hypothesis import given
from hypothesis import strategies as st

from attestation.model_family import CallFormat, Family, ModelFamily
from attestation.model_memory import MAX_PROMPT_SIZE, KvType
from enclave.generation import AnswerExceeded, ContextExceeded, EngineError, InvalidRequest, Overloaded
from enclave.pipe import (
    MAX_DELTA_CHARACTERS,
    MAX_DELTA_TOKENS,
    MAX_LINE_CHARACTERS,
    MAX_TO_SERVER,
    MAX_TO_WORKER,
    Alive,
    Cancel,
    Count,
    Counted,
    End,
    Failed,
    Generate,
    Load,
    Pause,
    Piece,
    PipeError,
    Ready,
    Refused,
    Resume,
    ToServer,
    ToWorker,
    line,
    read_to_server,
    read_to_worker,
)
from tests.engines import engine_settings
from tests.wire import CHATS, DELTAS, DONES, GENERATIONS
from vsockrpc.chat import ChatMessage, ChatRequest, CompletionRequest
from vsockrpc.messages import (
    Alternative,
    Delta,
    Done,
    MessageReader,
    TokenLogprob,
    ToolCallDelta,
    Usage,
    encode_message,
)

ID = st.integers(0, 2**63 - 1)
REQUEST = ChatRequest((ChatMessage("system", "a"), ChatMessage("user", "ü🌞")), max_tokens=5, cache_secret=bytes(32))
BODY = {"messages": [{"role": "user", "content": "x"}]}
SETTINGS = engine_settings(kv_type=KvType.Q8_0, repack=False)
LOGPROB = TokenLogprob(b"x" * 64, -1.5, (Alternative(b"y" * 64, -0.5),) * 20)
TO_WORKER: list[ToWorker] = [
    Load("{{ x }}", SETTINGS, 4711),
    *(Load("", engine_settings(kv_type=kind), 0) for kind in KvType),
    Generate(0, REQUEST),
    Generate(2**63 - 1, ChatRequest((ChatMessage("user", ""),))),
    Generate(1, CompletionRequest(prompt="Es war", echo=True, stop=("x",))),
    Count(2, REQUEST),
    Cancel(3),
    Pause(4),
    Resume(2**63 - 1),
]
USAGE = Usage(3, 4, 2, 1)
TO_SERVER: list[ToServer] = [
    Ready(True, False, ModelFamily(Family.UNKNOWN, False, False, None)),
    Ready(False, True, ModelFamily(Family.DEEPSEEK_R1_DISTILL, True, True, CallFormat.DEEPSEEK)),
    Refused("model_refused", "no", None, "x"),
    Alive(),
    Piece(1, Delta("ü🌞")),
    Piece(1, Delta("🌞" * MAX_DELTA_CHARACTERS, logprobs=(LOGPROB,) * MAX_DELTA_TOKENS)),
    Piece(1, Delta(reasoning="🌞" * MAX_DELTA_CHARACTERS)),
    Piece(1, Delta(tool_calls=(ToolCallDelta(0, "", "call_1", "f"), ToolCallDelta(0, "{")))),
    End(1, Done("stop", USAGE)),
    End(1, Done("tool_calls", USAGE, 2**32)),
    Counted(2, 2**32),
]


def to_worker(data: bytes) -> list[ToWorker]:
    return list(read_to_worker(MessageReader(MAX_TO_WORKER), data))


def to_server(data: bytes) -> list[ToServer]:
    return list(read_to_server(MessageReader(MAX_TO_SERVER), data))


# --- There and back --------------------------------------------------------------------------------------------------


def test_messages_to_the_worker_come_back_byte_by_byte() -> None:
    reader = MessageReader(MAX_TO_WORKER)
    data = b"".join(message.encode() for message in TO_WORKER)
    assert [message for byte in data for message in read_to_worker(reader, bytes([byte]))] == TO_WORKER


def test_messages_to_the_server_come_back_byte_by_byte() -> None:
    reader = MessageReader(MAX_TO_SERVER)
    data = b"".join(message.encode() for message in TO_SERVER)
    assert [message for byte in data for message in read_to_server(reader, bytes([byte]))] == TO_SERVER


@given(st.builds(Generate, ID, GENERATIONS) | st.builds(Count, ID, CHATS))
def test_every_request_gets_to_the_worker(message: Generate | Count) -> None:
    assert to_worker(message.encode()) == [message]


@given(st.builds(Piece, ID, DELTAS) | st.builds(End, ID, DONES))
def test_every_answer_gets_to_the_server(message: Piece | End) -> None:
    assert to_server(message.encode()) == [message]


def test_the_longest_prompt_that_the_server_takes_gets_through() -> None:
    """With every character as long as UTF-8 makes it, and every parameter beside it."""
    quarter = "🌞" * (MAX_PROMPT_SIZE // 4 // 4)
    biases = tuple((2**31 - 1 - token, 0.1) for token in range(300))
    request = ChatRequest((ChatMessage("user", quarter),) * 4, logit_bias=biases, stop=("🌞" * 256,) * 16)
    assert to_worker(Generate(2**63 - 1, request).encode()) == [Generate(2**63 - 1, request)]


@pytest.mark.parametrize(
    "error",
    [
        InvalidRequest("no", got="x"),
        ContextExceeded("long", expected="<= 5", got="6"),
        AnswerExceeded("no", got="6"),
        Overloaded(got=2),
    ],
)
def test_errors_keep_their_type(error: EngineError) -> None:
    [failed] = to_server(Failed(7, error).encode())
    assert isinstance(failed, Failed)
    assert type(failed.error) is type(error)
    assert failed.error.as_json() == error.as_json()


ILL_TEXTS = ["/properties/\0\n", "x" * 2000, "#/\a", "no\u00a0break", "\ud800", "\0" * 512, "", "ü🌞"]


@given(st.text(st.characters(), max_size=600) | st.sampled_from(ILL_TEXTS), st.none() | st.text(st.characters()))
def test_whatever_an_error_says_gets_to_the_server(text: str, other: str | None) -> None:
    """It may quote a client's schema, and one client's schema may not end everybody's process."""
    for error in (InvalidRequest(text, expected=other, got=text), ContextExceeded("x", expected=text, got=other)):
        [failed] = to_server(Failed(7, error).encode())
        assert isinstance(failed, Failed)
        assert type(failed.error) is type(error)
        for said, shown in ((error.message, failed.error.message), (error.got, failed.error.got)):
            assert (said is None) == (shown is None)
            assert shown is None or (len(shown) <= MAX_LINE_CHARACTERS and shown.isprintable())
    [refused] = to_server(Refused("model_refused", text, other, text).encode())
    assert isinstance(refused, Refused)
    assert refused.message == line(text)


@given(st.text(st.characters(exclude_categories=["Cs"]), max_size=600) | st.sampled_from(["x" * 2000, "two\nlines"]))
def test_an_ill_text_of_a_failure_is_mended_on_the_other_side_too(text: str) -> None:
    [failed] = to_server(encode_message({"failed": [0, "invalid_request", text, text, None]}))
    assert isinstance(failed, Failed)
    assert (failed.error.message, failed.error.expected, failed.error.got) == (line(text), line(text), None)


def test_a_line_that_is_one_stays_as_it_is() -> None:
    assert line("pointer /properties/ü🌞: got 'x'") == "pointer /properties/ü🌞: got 'x'"
    assert line("a\0\nb\u00a0c") == r"a\x00\nb\xa0c"


# --- What nobody may say ---------------------------------------------------------------------------------------------

COUNTS = {"prompt_tokens": 1, "completion_tokens": 1, "cached_tokens": 0, "reasoning_tokens": 0}
DONE = {"finish_reason": "stop", "usage": COUNTS, "dropped_messages": 0}


@pytest.mark.parametrize(
    "message",
    [
        {},
        {"ready": [True, True], "alive": None},
        {"ready": [1, 0]},
        {"ready": [True]},
        {"ready": [True, True]},
        {"ready": [True, True, ["qwen3", True, True]]},
        {"ready": [True, True, ["qwen3", True, 1, None]]},
        {"ready": [True, True, ["a text of its own", True, True, None]]},
        {"ready": [True, True, ["qwen3", True, True, "another way"]]},
        {"alive": 1},
        {"text": [0, "x"]},
        {"piece": [0, "x"]},
        {"piece": [0]},
        {"piece": [0, {"content": "x"}, 1]},
        {"piece": [0, {}]},
        {"piece": [0, {"content": ""}]},
        {"piece": [0, {"content": "", "logprobs": []}]},
        {"piece": [0, {"content": b"x"}]},
        {"piece": [0, {"text": "x"}]},
        {"piece": [-1, {"content": "x"}]},
        {"piece": [2**63, {"content": "x"}]},
        {"piece": [True, {"content": "x"}]},
        {"piece": [0, {"content": "x" * MAX_TO_SERVER}]},
        {"piece": [0, {"logprobs": [[b"x", 0.5, []]]}]},
        {"piece": [0, {"tool_calls": [{"index": 128, "arguments": ""}]}]},
        {"end": [0, "stop", 1, 1]},
        {"end": [0, {}]},
        {"end": [0, {**DONE, "finish_reason": "stopped"}]},
        {"end": [0, {**DONE, "usage": {**COUNTS, "completion_tokens": -1}}]},
        {"end": [0, {**DONE, "usage": {**COUNTS, "completion_tokens": 2**40}}]},
        {"end": [0, {**DONE, "dropped_messages": None}]},
        {"counted": [0]},
        {"counted": [0, -1]},
        {"counted": [0, 2**32 + 1]},
        {"counted": [0, True]},
        {"counted": [-1, 0]},
        {"failed": [0, "engine_failed", "x", None, None]},
        {"failed": [0, "overloaded", None, None, None]},
        {"failed": [0, "overloaded", "x", 1, None]},
        {"failed": [0, ["overloaded"], "x", None, None]},
        {"refused": ["code", "message", 1, None]},
        {"cancel": 1},
        {"chat": [0, BODY]},
    ],
)
def test_what_the_worker_may_not_say(message: dict[str, object]) -> None:
    with pytest.raises(PipeError):
        to_server(encode_message(message))


ENCODED = {
    "context": 64,
    "parallel": 1,
    "cells": 64,
    "kv_type": "f16",
    "repack": True,
    "batch": 16,
    "prefill": 16,
    "prompt_tokens": 0,
    "answer_tokens": 0,
    "reasoning_tokens": 0,
    "threads": 1,
    "queue": 1,
    "uid": 1,
}


def test_settings_are_a_map_of_all_of_them() -> None:
    [load] = to_worker(encode_message({"load": ["", ENCODED, 1]}))
    sizes = engine_settings(context=64, parallel=1, batch=16, prefill=16, threads=1, queue=1, uid=1)
    assert load == Load("", sizes, 1)


@pytest.mark.parametrize(
    "message",
    [
        {"load": {}},
        {"load": ["", ENCODED]},
        {"load": [1, ENCODED, 1]},
        {"load": ["", ENCODED, -1]},
        {"load": ["", [], 1]},
        {"load": ["", {}, 1]},
        *({"load": ["", {key: value for key, value in ENCODED.items() if key != left}, 1]} for left in ENCODED),
        {"load": ["", {**ENCODED, "more": 1}, 1]},
        {"load": ["", {**ENCODED, "uid": -1}, 1]},
        {"load": ["", {**ENCODED, "context": "64"}, 1]},
        {"load": ["", {**ENCODED, "context": True}, 1]},
        {"load": ["", {**ENCODED, "kv_type": "f32"}, 1]},
        {"load": ["", {**ENCODED, "kv_type": 1}, 1]},
        {"load": ["", {**ENCODED, "repack": 1}, 1]},
        {"generate": [0, BODY]},
        {"chat": [0, {"messages": [], "stop": []}]},
        {"chat": [0, {"messages": [{"role": "user"}], "stop": []}]},
        {"chat": [0, {**BODY, "unknown": 1}]},
        {"chat": [0, {**BODY, "stop": [1]}]},
        {"chat": [0, {"prompt": "x"}]},
        {"chat": [-1, BODY]},
        {"chat": [2**63, BODY]},
        {"chat": [0, BODY, 1]},
        {"chat": 0},
        {"complete": [0, BODY]},
        {"complete": [0, {"prompt": 1}]},
        {"complete": [True, {"prompt": ""}]},
        {"count": [0, {"prompt": "x"}]},
        {"count": [0]},
        {"cancel": "x"},
        {"cancel": -1},
        {"pause": "x"},
        {"pause": -1},
        {"resume": [1]},
        {"resume": -1},
        {"alive": None},
        {"piece": [0, {"content": "x"}]},
    ],
)
def test_what_the_server_may_not_say(message: dict[str, object]) -> None:
    with pytest.raises(PipeError):
        to_worker(encode_message(message))


@pytest.mark.parametrize("method", ["chat", "complete", "count"])
def test_bounds_are_checked_on_both_sides_of_the_pipe(method: str) -> None:
    least: dict[str, dict[str, object]] = {"chat": {**BODY}, "complete": {"prompt": "x"}, "count": {**BODY}}
    with pytest.raises(PipeError, match="temperature is out of range"):
        to_worker(encode_message({method: [0, {**least[method], "temperature": 3.0}]}))


def test_lengths_are_bounded_before_they_are_waited_for() -> None:
    with pytest.raises(PipeError, match="too large"):
        to_server((MAX_TO_SERVER + 1).to_bytes(4, "big"))
    with pytest.raises(PipeError, match="too large"):
        to_worker((MAX_TO_WORKER + 1).to_bytes(4, "big"))


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


ANYTHING = st.recursive(
    st.none() | st.booleans() | st.integers(-1, 2**63) | st.text(max_size=3) | st.binary(max_size=3) | st.floats(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=8,
)
KINDS = (
    "ready",
    "refused",
    "alive",
    "piece",
    "end",
    "counted",
    "failed",
    "load",
    "chat",
    "complete",
    "count",
    "cancel",
    "pause",
    "resume",
)


@given(st.sampled_from(KINDS), ANYTHING)
def test_whatever_a_message_holds_it_is_one_or_a_typed_error(kind: str, body: object) -> None:
    data = encode_message({kind: body})
    for read in (to_server, to_worker):
        try:
            [message] = read(data)
        except PipeError as error:
            assert error.code == "engine_protocol"  # noqa: PT017 - it may also be one
        else:
            assert read(message.encode()) == [message]
