"""The RPC's state machine in both roles: any bytes are events or a RemoteProtocolError, and what is held is bounded."""

from __future__ import annotations

from vsockrpc import frames
from vsockrpc.connection import Connection
from vsockrpc.errors import RemoteProtocolError
from vsockrpc.events import CallCancelled, CallEnded, CallReceived, DataReceived, Event
from vsockrpc.frames import FrameReader, FrameType
from vsockrpc.limits import Limits
from vsockrpc.state import Role

LIMITS = Limits(max_frame=4096, window=4096, max_calls=4, send_buffer=8192, max_buffered=8192)
HELLO = frames.hello(LIMITS)
_MOST_OUTPUT = 4 * 2 * (16_384 + 12) + 4 * (4096 + 64) + 256
"""Two control payloads and a window of data for each call, and what belongs to the connection."""


def one_input(data: bytes) -> None:
    """The first byte chooses the role, whether HELLO is there already, and into which portions the rest is cut."""
    choice, stream = (data[0], data[1:]) if data else (0, b"")
    role = Role.CALLER if choice & 1 else Role.CALLEE
    portion = (1, 7, 13, 1 << 20)[choice >> 2 & 3]
    connection = Connection(role, LIMITS)
    reader = FrameReader(LIMITS.max_frame)
    try:
        if choice & 2:
            connection.receive_data(HELLO)
            if role is Role.CALLER:
                for number in range(1, 4):
                    connection.open_call("m", {}, end=number == 1)
        for start in range(0, len(stream), portion):
            events = connection.receive_data(stream[start : start + portion])
            cancelled = {event.call for event in events if isinstance(event, CallCancelled)}
            for event in events:
                _react(connection, event, cancelled)
            _write(connection, reader)
        connection.receive_data(b"")
    except RemoteProtocolError:
        _write(connection, reader)
    assert not reader.mid_frame
    assert connection.open_calls <= LIMITS.max_calls


def _react(connection: Connection, event: Event, cancelled: set[int]) -> None:
    """An application that does a little of everything."""
    match event:
        case CallReceived(number) if number in cancelled or connection.sent_end(number):
            return
        case CallReceived(number) if number % 3 == 0:
            connection.send_fault(number, "unavailable", "")
        case CallReceived(number):
            connection.send_reply(number, event.meta if number % 2 else {})
            connection.send_data(number, bytes(number % 5000))
        case DataReceived(number, piece):
            assert len(piece) > 0
            connection.consumed(number, len(piece) if number % 2 else 0)
        case CallCancelled(number) if not connection.sent_end(number):
            connection.send_fault(number, "cancelled", "")
        case CallEnded(number) if connection.role is Role.CALLEE and not (
            number in cancelled or connection.sent_end(number)
        ):
            connection.send_data(number, b"", end=True)


def _write(connection: Connection, reader: FrameReader) -> None:
    """What this side says is always whole frames, and bounded."""
    written = b"".join(bytes(buffer) for buffer in connection.data_to_send(1 << 20))
    assert len(written) <= _MOST_OUTPUT
    for _ in reader.receive(memoryview(written)):
        pass


def seeds() -> list[bytes]:
    def data(call: int, payload: bytes, *, end: bool = False) -> bytes:
        return frames.header(FrameType.DATA, call, len(payload), end=end) + payload

    window, ping = frames.window(1, 4096), frames.frame(FrameType.PING, 0, bytes(8))
    cancel = frames.frame(FrameType.CANCEL, 1, b"")
    asked = frames.call(1, "model.file", 5000, {"sha384": bytes(48), "offset": 0}, end=False)
    more = frames.call(2, "m", 0, {"l": [None, True, -1]}, end=True) + frames.call(3, "m", 0, {}, end=False)
    question = asked + data(1, b"ask") + more + window + data(1, bytes(4000), end=True) + ping + cancel
    answer = (
        frames.reply(1, {"size": 7}, end=False)
        + data(1, b"answer", end=True)
        + frames.reply(2, {}, end=True)
        + frames.window(3, 1)
        + frames.fault(3, "overloaded", "not now")
        + ping
        + frames.go_away("closing")
    )
    return [
        *(bytes([how]) + HELLO + question for how in (0, 4, 8, 12)),
        *(bytes([how]) + question for how in (2, 6, 10, 14)),
        *(bytes([how]) + answer for how in (3, 7, 11, 15)),
        b"\x0d" + HELLO + frames.frame(FrameType.PONG, 0, bytes(8)),
        b"\x0c" + frames.go_away("overloaded"),
    ]
