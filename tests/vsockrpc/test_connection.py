from __future__ import annotations

from collections.abc import Callable

import pytest

from vsockrpc import frames
from vsockrpc.connection import Connection
from vsockrpc.errors import LocalProtocolError, RemoteProtocolError
from vsockrpc.events import (
    CallCancelled,
    CallEnded,
    CallReceived,
    CallShed,
    DataReceived,
    Event,
    FaultReceived,
    GoAwayReceived,
    HelloReceived,
    PongReceived,
    ReplyReceived,
    StreamEnded,
)
from vsockrpc.frames import HEADER, FrameType
from vsockrpc.limits import Limits
from vsockrpc.state import TRANSITIONS, Half, Role

SMALL = Limits(max_frame=4096, window=8192, max_calls=3, send_buffer=65536, max_buffered=16384)
PING = frames.frame(FrameType.PING, 0, b"01234567")


def data(call: int, payload: bytes, *, end: bool = False) -> bytes:
    return frames.header(FrameType.DATA, call, len(payload), end=end) + payload


def drain(connection: Connection, budget: int = 1 << 30) -> bytes:
    return b"".join(bytes(buffer) for buffer in connection.data_to_send(budget))


def kinds(stream: bytes) -> list[str]:
    """The frames of a stream by name, with + for END."""
    found = []
    while stream:
        kind, flags, _, _, length = HEADER.unpack(stream[:12])
        found.append(FrameType(kind).name + "+" * flags)
        stream = stream[12 + length :]
    return found


def established(role: Role, limits: Limits = SMALL, peer: Limits = SMALL) -> Connection:
    connection = Connection(role, limits)
    assert drain(connection) == frames.hello(limits)
    assert connection.receive_data(frames.hello(peer)) == [HelloReceived(peer.max_calls)]
    return connection


def caller_with_call(*, end: bool = False) -> Connection:
    connection = established(Role.CALLER)
    assert connection.open_call("m", {}, end=end) == 1
    drain(connection)
    return connection


def callee_with_call(*, end: bool = False) -> Connection:
    connection = established(Role.CALLEE)
    events = connection.receive_data(frames.call(1, "m", 0, {}, end=end))
    assert events == [CallReceived(1, "m", 0, {}), *([CallEnded(1)] if end else [])]
    return connection


class Pair:
    """A caller and a callee, and the bytes between them."""

    def __init__(self, caller: Limits = SMALL, callee: Limits = SMALL) -> None:
        self.caller = Connection(Role.CALLER, caller)
        self.callee = Connection(Role.CALLEE, callee)
        self.exchange()

    def exchange(self) -> tuple[list[Event], list[Event]]:
        """Everything that both have to say, until they fall silent: what the caller heard, and the callee."""
        heard: tuple[list[Event], list[Event]] = ([], [])
        while self.caller.wants_to_send or self.callee.wants_to_send:
            if there := drain(self.caller):
                heard[1].extend(self.callee.receive_data(there))
            if back := drain(self.callee):
                heard[0].extend(self.caller.receive_data(back))
        return heard


def joined(events: list[Event], call: int) -> bytes:
    return b"".join(bytes(event.data) for event in events if isinstance(event, DataReceived) and event.call == call)


# --- A call's life --------------------------------------------------------------------------------


def test_a_small_call_is_one_frame_each_way() -> None:
    pair = Pair()
    pair.caller.open_call("m", {"a": 1}, deadline_ms=7, end=True)
    there = drain(pair.caller)
    assert kinds(there) == ["CALL+"]
    assert pair.callee.receive_data(there) == [CallReceived(1, "m", 7, {"a": 1}), CallEnded(1)]
    pair.callee.send_reply(1, {"b": b"2"}, end=True)
    back = drain(pair.callee)
    assert kinds(back) == ["REPLY+"]
    assert pair.callee.open_calls == 0
    assert pair.caller.receive_data(back) == [ReplyReceived(1, {"b": b"2"}), CallEnded(1)]
    assert pair.caller.open_calls == 0
    assert not pair.caller.wants_to_send


def test_data_both_ways() -> None:
    pair = Pair()
    pair.caller.open_call("m", {})
    pair.caller.send_data(1, b"question", end=True)
    _, heard = pair.exchange()
    assert joined(heard, 1) == b"question"
    assert heard[-1] == CallEnded(1)
    pair.callee.send_reply(1, {})
    pair.callee.send_data(1, b"ans")
    pair.callee.send_data(1, b"wer", end=True)
    heard, _ = pair.exchange()
    assert heard[0] == ReplyReceived(1, {})
    assert joined(heard, 1) == b"answer"
    assert heard[-1] == CallEnded(1)
    assert pair.caller.open_calls == pair.callee.open_calls == 0


def test_a_fault_ends_the_call_and_drops_what_was_queued() -> None:
    pair = Pair()
    pair.caller.open_call("m", {}, end=True)
    pair.exchange()
    pair.callee.send_reply(1, {})
    pair.callee.send_data(1, b"x" * 100)
    pair.callee.send_fault(1, "unavailable", "no")
    heard, _ = pair.exchange()
    assert heard == [ReplyReceived(1, {}), FaultReceived(1, "unavailable", "no")]
    assert pair.caller.open_calls == pair.callee.open_calls == 0


def test_a_caller_whose_body_is_open_at_the_callees_end_cancels_so_that_both_know_the_call_is_over() -> None:
    pair = Pair()
    pair.caller.open_call("m", {})
    pair.exchange()
    pair.callee.send_reply(1, {}, end=True)
    assert pair.caller.receive_data(drain(pair.callee)) == [ReplyReceived(1, {}), CallEnded(1)]
    assert (pair.caller.open_calls, pair.callee.open_calls) == (0, 1)
    there = drain(pair.caller)
    assert kinds(there) == ["CANCEL"]
    assert pair.callee.receive_data(there) == []
    assert pair.callee.open_calls == 0


def test_a_body_that_the_window_holds_back_is_given_up_at_the_callees_end() -> None:
    pair = Pair()
    pair.caller.open_call("m", {})
    pair.caller.send_data(1, bytes(10_000), end=True)
    _, heard = pair.exchange()
    assert len(joined(heard, 1)) == 8192
    pair.callee.send_fault(1, "malformed", "")
    heard, back = pair.exchange()
    assert heard == [FaultReceived(1, "malformed", "")]
    assert back == []
    assert pair.caller.open_calls == pair.callee.open_calls == 0


def test_a_cancelled_call_counts_until_the_callee_says_that_the_work_has_stopped() -> None:
    pair = Pair()
    pair.caller.open_call("m", {})
    pair.exchange()
    pair.caller.cancel(1)
    assert pair.exchange() == ([], [CallCancelled(1)])
    assert (pair.caller.open_calls, pair.callee.open_calls) == (1, 1)
    with pytest.raises(LocalProtocolError):
        pair.callee.send_reply(1, {})
    pair.callee.send_fault(1, "cancelled", "")
    assert pair.exchange() == ([], [])
    assert (pair.caller.open_calls, pair.callee.open_calls) == (0, 0)


def test_cancel_and_end_that_cross() -> None:
    pair = Pair()
    pair.caller.open_call("m", {}, end=True)
    pair.exchange()
    pair.callee.send_reply(1, {})
    pair.callee.send_data(1, b"all", end=True)
    back = drain(pair.callee)
    pair.caller.cancel(1)
    pair.caller.cancel(1)
    assert pair.callee.receive_data(drain(pair.caller)) == []
    assert pair.caller.receive_data(back) == []
    assert (pair.caller.open_calls, pair.callee.open_calls) == (0, 0)
    pair.caller.cancel(1)
    assert not pair.caller.wants_to_send


@pytest.mark.parametrize("size", [100, 10_000], ids=["about to be sent", "held back by the window"])
def test_an_end_that_waits_behind_data_is_not_sent_without_it_after_cancel(size: int) -> None:
    pair = Pair()
    pair.caller.open_call("m", {}, end=True)
    pair.exchange()
    pair.callee.send_reply(1, {})
    pair.callee.send_data(1, bytes(size), end=True)
    if size > 8192:
        pair.exchange()
    pair.caller.cancel(1)
    assert pair.callee.receive_data(drain(pair.caller)) == [CallCancelled(1)]
    assert "DATA+" not in kinds(drain(pair.callee))
    assert not pair.callee.sent_end(1)
    pair.callee.send_fault(1, "cancelled", "")
    pair.exchange()
    assert (pair.caller.open_calls, pair.callee.open_calls) == (0, 0)


def test_data_of_many_portions_stays_in_order() -> None:
    pair = Pair()
    pair.caller.open_call("m", {})
    portions = [bytes([i]) * size for i, size in enumerate((1, 5000, 3, 4096, 2000, 900, 4))]
    for portion in portions:
        pair.caller.send_data(1, portion)
    received = b""
    while len(received) < 12004:
        _, heard = pair.exchange()
        received += joined(heard, 1)
        pair.callee.consumed(1, len(joined(heard, 1)))
    assert received == b"".join(portions)


def test_call_numbers_increase_and_a_callee_may_be_slow() -> None:
    pair = Pair()
    assert [pair.caller.open_call("m", {}, end=True) for _ in range(3)] == [1, 2, 3]
    with pytest.raises(LocalProtocolError) as caught:
        pair.caller.open_call("m", {})
    assert caught.value.code == "too_many_calls"
    pair.exchange()
    pair.callee.send_fault(2, "overloaded", "")
    pair.exchange()
    assert pair.caller.open_call("m", {}) == 4


def test_calls_end_while_frames_for_them_are_queued() -> None:
    pair = Pair()
    pair.caller.open_call("m", {})
    pair.caller.send_data(1, b"x" * 100)
    pair.caller.cancel(1)
    assert kinds(drain(pair.caller)) == ["CALL", "CANCEL"]


# --- Windows --------------------------------------------------------------------------------------


def test_nothing_beyond_the_window_is_sent_and_what_is_consumed_is_granted_again() -> None:
    pair = Pair()
    pair.caller.open_call("m", {})
    pair.caller.send_data(1, bytes(30_000), end=True)
    _, heard = pair.exchange()
    assert len(joined(heard, 1)) == 8192
    assert not pair.callee.consumed(1, 4095)
    assert pair.exchange()[1] == []
    assert pair.callee.consumed(1, 1)
    _, heard = pair.exchange()
    assert len(joined(heard, 1)) == 4096
    with pytest.raises(LocalProtocolError):
        pair.callee.consumed(1, 8193)
    pair.callee.consumed(1, 8192)
    _, heard = pair.exchange()
    assert len(joined(heard, 1)) == 8192
    pair.callee.consumed(1, 8192)
    pair.exchange()
    pair.callee.consumed(1, 1)
    pair.callee.consumed(1, 30_000 - 3 * 8192 - 4096 - 1)
    assert pair.exchange() == ([], [])
    assert not pair.callee.wants_to_send  # nothing more will come, so nothing is granted


def test_an_empty_end_needs_no_window() -> None:
    pair = Pair()
    pair.caller.open_call("m", {})
    pair.caller.send_data(1, bytes(8192))
    pair.exchange()
    pair.caller.send_data(1, b"", end=True)
    assert pair.exchange()[1] == [CallEnded(1)]


def test_frames_are_as_short_as_the_shorter_side_wants() -> None:
    pair = Pair(caller=Limits(max_frame=5000))
    pair.caller.open_call("m", {})
    pair.caller.send_data(1, bytes(8192))
    stream = drain(pair.caller)
    assert [HEADER.unpack(stream[i : i + 12])[4] for i in (len(stream) - 8192 - 24, len(stream) - 4096 - 12)] == [
        4096
    ] * 2


def test_the_queue_of_a_call_is_bounded() -> None:
    connection = caller_with_call()
    assert connection.room(1) == 65536
    connection.send_data(1, bytes(65000))
    assert connection.room(1) == 536
    assert connection.queued(1) == 65000
    with pytest.raises(LocalProtocolError) as caught:
        connection.send_data(1, bytes(537))
    assert caught.value.code == "queue_full"
    assert connection.room(2) == 0


def test_what_is_sent_is_not_copied() -> None:
    connection = caller_with_call()
    payload = bytes(4096)
    connection.send_data(1, payload)
    sent = [buffer for buffer in connection.data_to_send(1 << 20) if isinstance(buffer, memoryview)]
    assert [buffer.obj for buffer in sent] == [payload]
    assert sent[0].obj is payload


def test_calls_take_turns_a_frame_each_and_control_goes_first() -> None:
    wide = Limits(max_frame=4096, window=65536)
    connection = established(Role.CALLER, wide, wide)
    for _ in range(3):
        connection.open_call("m", {})
    drain(connection)
    connection.send_data(1, bytes(40_000))
    connection.send_data(2, bytes(9_000))
    connection.send_data(3, b"small", end=True)
    first = drain(connection, budget=4096 * 3)
    assert [HEADER.unpack(first[i : i + 12])[3] for i in (0, 4108, 8216, 8233)] == [1, 2, 3, 1]
    connection.open_call("urgent", {}, end=True)
    assert kinds(drain(connection, budget=1))[0] == "CALL+"


def test_the_call_that_holds_most_is_shed() -> None:
    for role in Role:
        limits = Limits(max_frame=4096, window=8192, max_buffered=16384)
        connection = established(role, limits, limits)
        for number in (1, 2, 3):
            if role is Role.CALLEE:
                connection.receive_data(frames.call(number, "m", 0, {}, end=False))
            else:
                connection.open_call("m", {}, end=True)
                connection.receive_data(frames.reply(number, {}, end=False))
        drain(connection)
        heard: list[Event] = []
        for number, size in ((1, 4000), (2, 4096), (2, 4096), (3, 4096), (3, 100)):
            heard += connection.receive_data(data(number, bytes(size)))
        assert [event for event in heard if isinstance(event, CallShed)] == [CallShed(2)]
        assert kinds(drain(connection)) == (["FAULT"] if role is Role.CALLEE else ["CANCEL"])
        assert not connection.consumed(2, 8192)
        connection.consumed(3, 4196)


def test_hostile_requests_that_are_never_answered_cost_one_fact_each() -> None:
    """A peer that asks and does not read: nothing that it does makes the output grow without bound."""
    connection = established(Role.CALLEE)
    for number in (1, 2, 3):
        connection.receive_data(frames.call(number, "m", 0, {}, end=False))
        connection.receive_data(frames.frame(FrameType.CANCEL, number, b""))
        connection.send_fault(number, "cancelled", "")
    with pytest.raises(RemoteProtocolError) as caught:
        connection.receive_data(frames.call(4, "m", 0, {}, end=False))
    assert caught.value.code == "too_many_calls"


# --- The connection -------------------------------------------------------------------------------


def test_nothing_but_hello_before_the_others_hello() -> None:
    connection = Connection(Role.CALLER)
    assert not connection.ready
    for act in (lambda: connection.open_call("m", {}), lambda: connection.ping(bytes(8))):
        with pytest.raises(LocalProtocolError):
            act()
    assert kinds(drain(connection)) == ["HELLO"]


def test_ping_and_pong() -> None:
    pair = Pair()
    pair.caller.ping(b"12345678")
    assert pair.caller.ping_outstanding
    with pytest.raises(LocalProtocolError):
        pair.caller.ping(b"12345678")
    assert pair.exchange() == ([PongReceived(b"12345678")], [])
    assert not pair.caller.ping_outstanding


def test_going_away() -> None:
    pair = Pair()
    pair.caller.open_call("m", {}, end=True)
    pair.exchange()
    pair.callee.go_away("closing")
    pair.callee.go_away("closing")
    pair.caller.open_call("late", {})  # it crosses the GOAWAY
    assert pair.exchange() == (
        [GoAwayReceived("closing"), FaultReceived(2, "unavailable", "this side takes no new calls")],
        [],
    )
    with pytest.raises(LocalProtocolError) as caught:
        pair.caller.open_call("m", {})
    assert caught.value.code == "going_away"
    pair.callee.send_reply(1, {}, end=True)
    assert pair.exchange()[0] == [ReplyReceived(1, {}), CallEnded(1)]
    assert pair.callee.open_calls == 0


def test_a_connection_may_be_turned_away_in_place_of_hello() -> None:
    connection = Connection(Role.CALLER)
    assert connection.receive_data(frames.go_away("overloaded")) == [GoAwayReceived("overloaded")]
    assert not connection.ready


def test_the_streams_end() -> None:
    connection = caller_with_call()
    assert connection.receive_data(b"") == [StreamEnded()]
    assert not connection.ready
    for act in (lambda: connection.receive_data(b"x"), lambda: connection.send_data(1, b"x")):
        with pytest.raises(LocalProtocolError):
            act()


@pytest.mark.parametrize("size", [1, 11, 12, 13, 50])
def test_the_streams_end_inside_a_frame(size: int) -> None:
    connection = callee_with_call()
    connection.receive_data(data(1, bytes(100))[:size])
    with pytest.raises(RemoteProtocolError) as caught:
        connection.receive_data(b"")
    assert caught.value.code == "truncated"
    assert not connection.wants_to_send


# --- What the other side must not do --------------------------------------------------------------

FROM_CALLER: list[tuple[str, list[bytes], str]] = [
    ("data before HELLO", [data(1, b"x")], "no_hello"),
    ("CALL before HELLO", [frames.call(1, "m", 0, {}, end=True)], "no_hello"),
    ("PING before HELLO", [PING], "no_hello"),
    ("HTTP", [b"GET / HTTP/1.1\r\n\r\n"], "bad_header"),
]
TO_CALLEE: list[tuple[str, list[bytes], str]] = [
    ("a second HELLO", [frames.hello(SMALL)], "unexpected_frame"),
    ("the same number", [frames.call(1, "m", 0, {}, end=True)], "call_number"),
    ("a lower number", [frames.call(9, "m", 0, {}, end=True), frames.call(8, "m", 0, {}, end=True)], "call_number"),
    ("DATA of a call that never was", [data(2, b"x")], "unknown_call"),
    ("CANCEL of a call that never was", [frames.frame(FrameType.CANCEL, 2, b"")], "unknown_call"),
    ("WINDOW for a call that never was", [frames.window(2, 1)], "unknown_call"),
    ("REPLY", [frames.reply(1, {}, end=False)], "unexpected_frame"),
    ("FAULT", [frames.fault(1, "x", "")], "unexpected_frame"),
    ("DATA after END", [data(1, b"x", end=True), data(1, b"x")], "unexpected_frame"),
    ("END twice", [data(1, b"", end=True), data(1, b"", end=True)], "unexpected_frame"),
    ("DATA after CANCEL", [frames.frame(FrameType.CANCEL, 1, b""), data(1, b"x")], "unexpected_frame"),
    ("CANCEL twice", [frames.frame(FrameType.CANCEL, 1, b"")] * 2, "unexpected_frame"),
    ("the window exceeded", [data(1, bytes(4096)), data(1, bytes(4096)), data(1, b"x")], "window_exceeded"),
    ("a frame too long", [data(1, bytes(4097))], "oversized_frame"),
    ("a grant too large", [frames.window(1, 16_777_216)], "window_overflow"),
    ("an empty grant", [frames.frame(FrameType.WINDOW, 1, bytes(4))], "malformed_payload"),
    ("too many calls", [frames.call(n, "m", 0, {}, end=True) for n in (2, 3, 4)], "too_many_calls"),
    ("a second PING", [PING, PING], "bad_ping"),
    ("a PONG for nothing", [frames.frame(FrameType.PONG, 0, bytes(8))], "bad_ping"),
    ("a CALL of no CBOR", [frames.frame(FrameType.CALL, 2, b"\xff")], "malformed_payload"),
]
TO_CALLER: list[tuple[str, list[bytes], str]] = [
    ("CALL", [frames.call(1, "m", 0, {}, end=True)], "unexpected_frame"),
    ("CANCEL", [frames.frame(FrameType.CANCEL, 1, b"")], "unexpected_frame"),
    ("DATA before REPLY", [data(1, b"x")], "unexpected_frame"),
    ("REPLY twice", [frames.reply(1, {}, end=False)] * 2, "unexpected_frame"),
    ("DATA after END", [frames.reply(1, {}, end=True), data(1, b"x")], "unknown_call"),
    ("FAULT after END", [frames.reply(1, {}, end=True), frames.fault(1, "x", "")], "unknown_call"),
    ("FAULT twice", [frames.fault(1, "x", "")] * 2, "unknown_call"),
    ("WINDOW after END", [frames.reply(1, {}, end=True), frames.window(1, 1)], "unknown_call"),
    ("REPLY to a call that never was", [frames.reply(2, {}, end=True)], "unknown_call"),
]


def _refuses(connection: Connection, chunks: list[bytes], code: str) -> None:
    with pytest.raises(RemoteProtocolError) as caught:
        for chunk in chunks:
            connection.receive_data(chunk)
    assert caught.value.code == code
    assert kinds(drain(connection)) == ["GOAWAY"]
    assert not connection.ready
    with pytest.raises(RemoteProtocolError):
        connection.receive_data(b"x")
    with pytest.raises(LocalProtocolError):
        connection.ping(bytes(8))


def _split(chunks: list[bytes]) -> list[bytes]:
    return [bytes([byte]) for byte in b"".join(chunks)]


@pytest.mark.parametrize(
    "cut", [lambda chunks: chunks, lambda chunks: [b"".join(chunks)], _split], ids=["frames", "whole", "bytes"]
)
@pytest.mark.parametrize(
    ("make", "chunks", "code"),
    [
        *(pytest.param(lambda: Connection(Role.CALLEE), c, code, id=name) for name, c, code in FROM_CALLER),
        *(pytest.param(callee_with_call, c, code, id=f"to callee: {name}") for name, c, code in TO_CALLEE),
        *(pytest.param(caller_with_call, c, code, id=f"to caller: {name}") for name, c, code in TO_CALLER),
    ],
)
def test_violations(
    make: Callable[[], Connection], chunks: list[bytes], code: str, cut: Callable[[list[bytes]], list[bytes]]
) -> None:
    _refuses(make(), cut(chunks), code)


OF_A_CALL = {
    FrameType.CALL: frames.call(1, "m", 0, {}, end=False),
    FrameType.DATA: data(1, b"x"),
    FrameType.REPLY: frames.reply(1, {}, end=False),
    FrameType.FAULT: frames.fault(1, "x", ""),
    FrameType.CANCEL: frames.frame(FrameType.CANCEL, 1, b""),
    FrameType.WINDOW: frames.window(1, 1),
}
WAYS_OF_A_CALLER = {Half.OPEN: b"", Half.ENDED: data(1, b"", end=True), Half.CANCELLED: OF_A_CALL[FrameType.CANCEL]}
WAYS_OF_A_CALLEE = {Half.START: b"", Half.OPEN: OF_A_CALL[FrameType.REPLY]}


@pytest.mark.parametrize("kind", OF_A_CALL)
@pytest.mark.parametrize(
    ("role", "half"),
    [*((Role.CALLER, half) for half in WAYS_OF_A_CALLER), *((Role.CALLEE, half) for half in WAYS_OF_A_CALLEE)],
)
def test_the_table_is_what_a_receiver_holds_the_other_side_to(role: Role, half: Half, kind: FrameType) -> None:
    """Each state that one side of a call can be in, each frame: accepted if and only if the table says so."""
    receiver = callee_with_call() if role is Role.CALLER else caller_with_call()
    way = (WAYS_OF_A_CALLER if role is Role.CALLER else WAYS_OF_A_CALLEE)[half]
    if way:
        receiver.receive_data(way)
    if (half, kind) in TRANSITIONS[role]:
        receiver.receive_data(OF_A_CALL[kind])
    else:
        with pytest.raises(RemoteProtocolError):
            receiver.receive_data(OF_A_CALL[kind])


@pytest.mark.parametrize(
    "late", [frames.window(1, 1), frames.frame(FrameType.CANCEL, 1, b"")], ids=["WINDOW", "CANCEL"]
)
def test_frames_that_crossed_the_callees_end_are_ignored(late: bytes) -> None:
    connection = callee_with_call(end=True)
    connection.send_reply(1, {}, end=True)
    drain(connection)
    assert connection.open_calls == 0
    assert connection.receive_data(late) == []
    with pytest.raises(RemoteProtocolError) as caught:
        connection.receive_data(data(1, b"x"))
    assert caught.value.code == "unknown_call"


def test_data_that_crossed_the_callees_end_is_checked_and_dropped() -> None:
    connection = callee_with_call()
    connection.send_fault(1, "malformed", "")
    drain(connection)
    assert connection.receive_data(data(1, bytes(4096)) + data(1, bytes(4096))) == []
    with pytest.raises(RemoteProtocolError) as caught:
        connection.receive_data(data(1, b"x"))
    assert caught.value.code == "window_exceeded"


# --- What this side must not do -------------------------------------------------------------------


@pytest.mark.parametrize(
    "act",
    [
        lambda connection: connection.send_reply(1, {}),
        lambda connection: connection.send_fault(1, "x", ""),
        lambda connection: connection.send_data(2, b"x"),
        lambda connection: (connection.send_data(1, b"", end=True), connection.send_data(1, b"x")),
        lambda connection: (connection.cancel(1), connection.send_data(1, b"x")),
        lambda connection: connection.ping(b"short"),
        lambda connection: connection.open_call("Method!", {}),
        lambda connection: connection.open_call("m", {"x": 0.5}),
        lambda connection: connection.open_call("m", {}, deadline_ms=-1),
    ],
)
def test_misuse_by_the_caller(act: Callable[[Connection], object]) -> None:
    connection = caller_with_call()
    with pytest.raises(LocalProtocolError):
        act(connection)
    assert connection.ready


@pytest.mark.parametrize(
    "act",
    [
        lambda connection: connection.open_call("m", {}),
        lambda connection: connection.cancel(1),
        lambda connection: connection.send_data(1, b"x"),
        lambda connection: (connection.send_reply(1, {}), connection.send_reply(1, {})),
        lambda connection: (connection.send_fault(1, "x", ""), connection.send_fault(1, "x", "")),
        lambda connection: connection.send_fault(1, "Not a code", ""),
        lambda connection: connection.send_reply(2, {}),
    ],
)
def test_misuse_by_the_callee(act: Callable[[Connection], object]) -> None:
    connection = callee_with_call()
    with pytest.raises(LocalProtocolError):
        act(connection)
    assert connection.ready
