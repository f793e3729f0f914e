"""The RPC's state machine: bytes in, events out; acts in, bytes out. PROTOCOL.md section 5. Sans-IO.

Everything that it holds is bounded by ``Limits``: what would exceed a bound is refused before it is kept.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

from vsockrpc import frames
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
from vsockrpc.frames import Control, FrameReader, FrameType, Header, Hello, Meta
from vsockrpc.limits import MAX_CALL, MAX_WINDOW, Limits
from vsockrpc.outbox import Buffer, Outbox
from vsockrpc.state import TRANSITIONS, Call, Half, Role


class Connection:
    """One side of one connection. Neither reentrant nor thread-safe.

    Acts raise LocalProtocolError when the protocol forbids them. ``receive_data`` raises RemoteProtocolError when
    the other side broke the protocol; from then on nothing but the GOAWAY that says so is left to send.
    """

    def __init__(self, role: Role, limits: Limits | None = None) -> None:
        self.role = role
        self.limits = limits or Limits()
        self._allowed_here = TRANSITIONS[role]
        self._allowed_there = TRANSITIONS[role.other]
        self._reader = FrameReader(self.limits.max_frame)
        self._outbox = Outbox(frames.hello(self.limits))
        self._events: list[Event] = []
        self._peer: Hello | None = None
        self._failure: RemoteProtocolError | None = None
        self._ended = False
        self._going_away = False
        self._peer_going_away = False
        self._ping: bytes | None = None
        self._calls: dict[int, Call] = {}
        self._last_call = 0
        self._data: tuple[Call, Header] | None = None  # the DATA frame that is being received
        self._unconsumed = 0

    # --- What is so -------------------------------------------------------------------------------

    @property
    def ready(self) -> bool:
        """The other side's HELLO has come, and the connection has not ended since."""
        return self._peer is not None and self._failure is None and not self._ended

    @property
    def going_away(self) -> bool:
        """One of the sides has said that no new calls are to come."""
        return self._going_away or self._peer_going_away

    @property
    def frames_received(self) -> int:
        return self._reader.frames

    @property
    def ping_outstanding(self) -> bool:
        return self._ping is not None

    @property
    def open_calls(self) -> int:
        """Calls that not both sides have ended. They count against ``max_calls``."""
        return len(self._calls)

    def room(self, number: int) -> int:
        """Bytes that ``send_data`` takes for this call now; 0 too when the call is over."""
        call = self._calls.get(number)
        return 0 if call is None else self.limits.send_buffer - call.queued

    def queued(self, number: int) -> int:
        """Bytes of this call that wait to be sent."""
        call = self._calls.get(number)
        return 0 if call is None else call.queued

    def sent_end(self, number: int) -> bool:
        """This side has ended the call: the frame that does so is on the wire, or next to go there, and no data is
        queued before it.
        """
        call = self._calls.get(number)
        return call is None or call.sending in (Half.ENDED, Half.CANCELLED)

    # --- Acts -------------------------------------------------------------------------------------

    def open_call(self, method: str, meta: Meta, *, deadline_ms: int = 0, end: bool = False) -> int:
        """Caller: open a call and return its number. ``deadline_ms`` 0 is no deadline; ``end``: no data follows."""
        self._require(Role.CALLER)
        peer = self._established()
        if self.going_away:
            raise LocalProtocolError("going_away", "this connection takes no new calls")
        if len(self._calls) >= peer.max_calls:
            raise LocalProtocolError(
                "too_many_calls", "the other side takes no more calls at once", expected=peer.max_calls
            )
        if self._last_call >= MAX_CALL:
            raise LocalProtocolError("call_number", "this connection has used all its call numbers")
        number = self._last_call + 1
        self._outbox.say(frames.call(number, method, deadline_ms, meta, end=end))
        self._last_call = number
        call = self._calls[number] = Call(number, send_window=peer.window, receive_window=self.limits.window)
        call.sending = Half.ENDED if end else Half.OPEN
        call.closing = end
        return number

    def send_reply(self, number: int, meta: Meta, *, end: bool = False) -> None:
        """Callee: answer; data may follow unless ``end``."""
        call = self._sendable(number, FrameType.REPLY)
        self._outbox.say(frames.reply(number, meta, end=end), end_of=call if end else None)
        call.sending = Half.OPEN
        if end:
            self._end_here(call)

    def send_data(self, number: int, data: Buffer, *, end: bool = False) -> None:
        """Queue at most ``room(number)`` bytes, the last ones if ``end``.

        They are not copied: they must not change until they were written.
        """
        call = self._sendable(number, FrameType.DATA)
        view = memoryview(data).cast("B")
        room = self.limits.send_buffer - call.queued
        if len(view) > room:
            raise LocalProtocolError("queue_full", "more data than there is room for", expected=room, got=len(view))
        if view:
            call.queue.append(view)
            call.queued += len(view)
        call.closing = end
        self._outbox.schedule(call)

    def send_fault(self, number: int, code: str, message: str) -> None:
        """Callee: end a call with a fault. Data that is still queued is dropped."""
        self._require(Role.CALLEE)
        self._established()
        call = self._calls.get(number)
        if call is None or call.sending is Half.ENDED:
            raise LocalProtocolError("unexpected_frame", f"FAULT for call {number}, which is over")
        self._outbox.say(frames.fault(number, code, message), end_of=call)
        self._end_here(call)

    def cancel(self, number: int) -> None:
        """Caller: give a call up. Nothing more is reported of it. One that is over is left as it is."""
        self._require(Role.CALLER)
        call = self._calls.get(number)
        if call is not None and call.sending is not Half.CANCELLED:
            self._cancel(call)

    def consumed(self, number: int, size: int) -> bool:
        """The application is done with ``size`` received bytes, so they may be granted again. True if that gave
        something to send.
        """
        call = self._calls.get(number)
        if call is None or self._is_quiet(call) or call.receiving is Half.CANCELLED:
            return False  # over, with its last bytes still being read
        if not 0 <= size <= call.unconsumed:
            raise LocalProtocolError(
                "window_overflow", "more consumed than received", expected=f"at most {call.unconsumed}", got=size
            )
        call.unconsumed -= size
        self._unconsumed -= size
        call.grant += size
        # Half a window at a time: few WINDOW frames, and the sender never comes to a stand while this side keeps up.
        if 2 * call.grant < self.limits.window or call.receiving not in (Half.START, Half.OPEN):
            return False
        self._outbox.grant(call)
        return True

    def ping(self, payload: bytes) -> None:
        """Ask for a sign of life; ``payload`` is 8 bytes and comes back in PongReceived."""
        self._established()
        if self._ping is not None or len(payload) != 8:
            raise LocalProtocolError("bad_ping", "one PING of 8 bytes at a time")
        self._ping = payload
        self._outbox.say(frames.frame(FrameType.PING, 0, payload))

    def go_away(self, code: str) -> None:
        """Open (caller) or accept (callee) no more calls; those that are open go on. Only the first time says
        anything.
        """
        if not self._going_away and self._failure is None:
            self._going_away = True
            self._outbox.say(frames.go_away(code))

    # --- Bytes out --------------------------------------------------------------------------------

    @property
    def wants_to_send(self) -> bool:
        return self._outbox.waiting

    def data_to_send(self, budget: int) -> list[Buffer]:
        """What is to be written next: all control frames, then DATA of the calls in turn up to about ``budget`` bytes.

        What is handed out counts as sent. The buffers must be written, in order, before the next are asked for.
        """
        max_frame = self.limits.max_frame if self._peer is None else min(self._peer.max_frame, self.limits.max_frame)
        buffers, ended = self._outbox.take(budget, max_frame)
        for call in ended:
            call.flushed = True
            if self.role is Role.CALLEE:
                self._release(call)
                self._forget_if_over(call)
        return buffers

    # --- Bytes in ---------------------------------------------------------------------------------

    def receive_data(self, data: Buffer) -> list[Event]:
        """What ``data``, the next bytes of the stream, brings. Empty data is the stream's end.

        The data of DataReceived events are slices of ``data``. A call that one event speaks of may be over by a later
        event of the same list, so act on the list as a whole. Raises RemoteProtocolError.
        """
        if self._failure is not None:
            raise self._failure
        if self._ended:
            raise LocalProtocolError("not_open", "data after the end of the stream")
        try:
            if data:
                for item in self._reader.receive(memoryview(data)):
                    if isinstance(item, Header):
                        self._on_data_header(item)
                    elif isinstance(item, Control):
                        self._on_control(item.header, item.payload)
                    else:
                        self._on_piece(item.data, item.last)
            elif self._reader.mid_frame:
                raise RemoteProtocolError("truncated", "the stream ended inside a frame")
            else:
                self._ended = True
                self._outbox.abandon(b"")
                self._events.append(StreamEnded())
        except RemoteProtocolError as error:
            self._failure = error
            self._events = []
            self._outbox.abandon(b"" if error.code == "truncated" else frames.go_away("protocol_error"))
            raise
        events, self._events = self._events, []
        return events

    def _on_control(self, header: Header, payload: bytes) -> None:
        if self._peer is None and header.type not in (FrameType.HELLO, FrameType.GOAWAY):
            raise RemoteProtocolError("no_hello", "the first frame is not HELLO", got=header.type.name)
        if not header.call:
            _CONNECTION_FRAMES[header.type](self, payload)
            return
        call = self._accept(header.call) if header.type is FrameType.CALL else self._find(header)
        if call is None:
            return
        self._advance(call, header)
        _CALL_FRAMES[header.type](self, call, payload)
        if header.end:
            self._on_end(call)

    def _on_data_header(self, header: Header) -> None:
        call = None if self._peer is None else self._find(header)
        if call is None:
            raise RemoteProtocolError("no_hello", "the first frame is not HELLO", got=header.type.name)
        if header.length > call.receive_window:
            raise RemoteProtocolError(
                "window_exceeded",
                "DATA exceeds the window",
                expected=f"at most {call.receive_window}",
                got=header.length,
            )
        self._next_half(call, header)
        call.receive_window -= header.length
        if header.length:
            self._data = (call, header)
        else:
            self._advance(call, header)
            self._on_end(call)

    def _on_piece(self, data: memoryview, last: bool) -> None:
        assert self._data is not None
        call, header = self._data
        if not self._is_quiet(call):
            call.unconsumed += len(data)
            self._unconsumed += len(data)
            self._events.append(DataReceived(call.number, data))
            if self._unconsumed > self.limits.max_buffered:
                self._shed()
        if last and header.end:
            self._advance(call, header)
            self._on_end(call)

    def _on_hello(self, payload: bytes) -> None:
        if self._peer is not None:
            raise RemoteProtocolError("unexpected_frame", "a second HELLO")
        self._peer = frames.parse_hello(payload)
        self._events.append(HelloReceived(self._peer.max_calls))

    def _on_ping(self, payload: bytes) -> None:
        if self._outbox.owes_pong:
            raise RemoteProtocolError("bad_ping", "a second PING before the first one's PONG")
        self._outbox.pong(payload)

    def _on_pong(self, payload: bytes) -> None:
        if payload != self._ping:
            raise RemoteProtocolError("bad_ping", "a PONG that nobody asked for")
        self._ping = None
        self._events.append(PongReceived(payload))

    def _on_go_away(self, payload: bytes) -> None:
        code = frames.parse_go_away(payload)
        self._peer_going_away = True
        self._events.append(GoAwayReceived(code))

    def _on_call(self, call: Call, payload: bytes) -> None:
        head = frames.parse_call(payload)
        if self._going_away:
            self.send_fault(call.number, "unavailable", "this side takes no new calls")
        else:
            self._events.append(CallReceived(call.number, head.method, head.deadline_ms, head.meta))

    def _on_reply(self, call: Call, payload: bytes) -> None:
        meta = frames.parse_reply(payload)
        if not self._is_quiet(call):
            self._events.append(ReplyReceived(call.number, meta))

    def _on_fault(self, call: Call, payload: bytes) -> None:
        code, message = frames.parse_fault(payload)
        if not self._is_quiet(call):
            self._events.append(FaultReceived(call.number, code, message))
        self._close(call)

    def _on_cancel(self, call: Call, payload: bytes) -> None:
        if not self._is_quiet(call):
            self._release(call)
            call.closing = False  # an END that was waiting behind data must not pass for the end of all of it
            self._events.append(CallCancelled(call.number))
        self._forget_if_over(call)

    def _on_window(self, call: Call, payload: bytes) -> None:
        grant = frames.parse_window(payload)
        if call.send_window + grant > MAX_WINDOW:
            raise RemoteProtocolError(
                "window_overflow",
                "WINDOW grants too much",
                expected=f"at most {MAX_WINDOW - call.send_window}",
                got=grant,
            )
        call.send_window += grant
        self._outbox.schedule(call)

    def _on_end(self, call: Call) -> None:
        if not self._is_quiet(call):
            self._events.append(CallEnded(call.number))
        if self.role is Role.CALLER:
            self._close(call)
        else:
            self._forget_if_over(call)

    # --- Calls ------------------------------------------------------------------------------------

    def _accept(self, number: int) -> Call:
        if self.role is Role.CALLER or self._peer is None:
            raise RemoteProtocolError("unexpected_frame", "CALL from the callee")
        if number <= self._last_call:
            raise RemoteProtocolError(
                "call_number", "call numbers must increase", expected=f"above {self._last_call}", got=number
            )
        if len(self._calls) >= self.limits.max_calls:
            raise RemoteProtocolError(
                "too_many_calls", "more calls at once than HELLO allows", expected=f"at most {self.limits.max_calls}"
            )
        self._last_call = number
        call = self._calls[number] = Call(number, send_window=self._peer.window, receive_window=self.limits.window)
        return call

    def _find(self, header: Header) -> Call | None:
        """The open call of a frame; None for a frame that crossed the call's end on the wire and is to be ignored.

        A caller forgets a call when the callee's end has come, behind which nothing may. A callee forgets it
        when both sides have ended it; a grant or a CANCEL may still be under way to it then.
        """
        call = self._calls.get(header.call)
        if call is None:
            late = header.call <= self._last_call and header.type in (FrameType.WINDOW, FrameType.CANCEL)
            if self.role is Role.CALLER or not late:
                raise RemoteProtocolError(
                    "unknown_call", f"{header.type.name} for a call that is not open", got=header.call
                )
        return call

    def _next_half(self, call: Call, header: Header) -> Half:
        half = self._allowed_there.get((call.receiving, header.type))
        if half is None:
            raise RemoteProtocolError(
                "unexpected_frame",
                f"{header.type.name} for call {call.number} from the {self.role.other.value}",
                expected=", ".join(kind.name for state, kind in self._allowed_there if state is call.receiving)
                or "nothing",
                got=header.type.name,
            )
        return Half.ENDED if header.end else half

    def _advance(self, call: Call, header: Header) -> None:
        call.receiving = self._next_half(call, header)

    def _is_quiet(self, call: Call) -> bool:
        """This side has ended the call and hears no more of it: what still comes is checked, and dropped."""
        return call.sending is (Half.CANCELLED if self.role is Role.CALLER else Half.ENDED)

    def _close(self, call: Call) -> None:
        """Caller: the callee has ended the call. A body that was not yet sent whole is given up."""
        if call.sending is Half.OPEN:
            self._cancel(call)
        self._release(call)
        del self._calls[call.number]

    def _forget_if_over(self, call: Call) -> None:
        """Callee: the call is over when the caller has ended or cancelled it and this side's end is on the wire."""
        if self.role is Role.CALLEE and call.flushed and call.receiving in (Half.ENDED, Half.CANCELLED):
            self._release(call)
            del self._calls[call.number]

    def _end_here(self, call: Call) -> None:
        """Callee: this side's last frame is queued."""
        call.closing = True
        call.sending = Half.ENDED
        self._release(call)

    def _cancel(self, call: Call) -> None:
        call.closing = True
        call.sending = Half.CANCELLED
        self._outbox.say(frames.frame(FrameType.CANCEL, call.number, b""))
        self._release(call)

    def _shed(self) -> None:
        """Too much waits here unconsumed: the call that holds most of it goes, rather than all calls being held up."""
        call = max(self._calls.values(), key=lambda call: call.unconsumed)
        if self.role is Role.CALLER:
            self._cancel(call)
        else:
            self.send_fault(call.number, "overloaded", "too much data waits here unread")
        self._events.append(CallShed(call.number))

    def _release(self, call: Call) -> None:
        """Let go of what the call holds here: output and grants, and its share of what is unconsumed."""
        self._outbox.drop(call)
        self._unconsumed -= call.unconsumed
        call.unconsumed = 0

    def _sendable(self, number: int, kind: FrameType) -> Call:
        self._established()
        call = self._calls.get(number)
        if (
            call is None
            or call.closing
            or call.receiving is Half.CANCELLED
            or (call.sending, kind) not in self._allowed_here
        ):
            raise LocalProtocolError("unexpected_frame", f"{kind.name} for call {number}, which is not at that point")
        return call

    def _established(self) -> Hello:
        if self._peer is None or self._failure is not None or self._ended:
            raise LocalProtocolError("not_open", "the connection is not open")
        return self._peer

    def _require(self, role: Role) -> None:
        if self.role is not role:
            raise LocalProtocolError("wrong_role", "not for this side", expected=role.value, got=self.role.value)


_CONNECTION_FRAMES: Mapping[FrameType, Callable[[Connection, bytes], None]] = {
    FrameType.HELLO: Connection._on_hello,
    FrameType.PING: Connection._on_ping,
    FrameType.PONG: Connection._on_pong,
    FrameType.GOAWAY: Connection._on_go_away,
}
_CALL_FRAMES: Mapping[FrameType, Callable[[Connection, Call, bytes], None]] = {
    FrameType.CALL: Connection._on_call,
    FrameType.REPLY: Connection._on_reply,
    FrameType.FAULT: Connection._on_fault,
    FrameType.CANCEL: Connection._on_cancel,
    FrameType.WINDOW: Connection._on_window,
}
