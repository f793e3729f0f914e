"""Two connections, a network that hands over bytes in any portions, and applications that do anything allowed."""

from __future__ import annotations

from dataclasses import dataclass, field

import hypothesis.strategies as st
from hypothesis import settings
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from vsockrpc.connection import Connection
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
from vsockrpc.limits import Limits
from vsockrpc.state import Role

LIMITS = Limits(max_frame=4096, window=5000, max_calls=3, send_buffer=8000, max_buffered=1 << 20)
SIZES = st.sampled_from([0, 1, 100, 2500, 8000])
RARELY = st.sampled_from([False, False, False, True])
PATTERN = bytes(i * 131 % 251 for i in range(1 << 16))


@dataclass
class Told:
    """What one application did with one call, and what it heard of the other's doing."""

    sent: int = 0
    ended: bool = False
    replied: bool = False
    gave_up: bool = False
    heard: int = 0
    unconsumed: int = 0
    heard_reply: bool = False
    heard_end: bool = False
    heard_fault: bool = False
    heard_cancel: bool = False


@dataclass
class Side:
    connection: Connection
    calls: dict[int, Told] = field(default_factory=dict)
    wire: bytearray = field(default_factory=bytearray)
    """Written by this side, and not yet delivered."""
    pings: int = 0
    pongs: int = 0


class TwoSides(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.caller = Side(Connection(Role.CALLER, LIMITS))
        self.callee = Side(Connection(Role.CALLEE, LIMITS))
        self._settle()

    # --- What the applications do ---

    @precondition(lambda self: self.caller.connection.open_calls < LIMITS.max_calls)
    @rule(end=RARELY)
    def open(self, end: bool) -> None:
        number = self.caller.connection.open_call("m", {"x": 1}, end=end)
        self.caller.calls[number] = Told(ended=end)

    def _one(self, side: Side, pick: int, *, sending: bool = False) -> tuple[int, Told] | None:
        alive = [
            (number, told)
            for number, told in side.calls.items()
            if not (told.gave_up or told.heard_fault or (sending and told.ended))
        ]
        return alive[pick % len(alive)] if alive else None

    @rule(pick=st.integers(0, 2), size=SIZES, end=RARELY)
    def caller_sends(self, pick: int, size: int, end: bool) -> None:
        found = self._one(self.caller, pick, sending=True)
        if found and not found[1].heard_end:
            self._send(self.caller, *found, size, end)

    @rule(pick=st.integers(0, 2), size=SIZES, end=RARELY)
    def callee_sends(self, pick: int, size: int, end: bool) -> None:
        found = self._one(self.callee, pick, sending=True)
        if found is None or found[1].heard_cancel:
            return
        number, told = found
        if told.replied:
            self._send(self.callee, number, told, size, end)
        else:
            self.callee.connection.send_reply(number, {"y": 2}, end=end)
            told.replied, told.ended = True, end

    def _send(self, side: Side, number: int, told: Told, size: int, end: bool) -> None:
        size = min(size, side.connection.room(number))
        side.connection.send_data(number, PATTERN[told.sent : told.sent + size], end=end)
        told.sent += size
        told.ended = end

    @rule(pick=st.integers(0, 2))
    def caller_cancels(self, pick: int) -> None:
        found = self._one(self.caller, pick)
        if found:
            self.caller.connection.cancel(found[0])
            found[1].gave_up = True

    @rule(pick=st.integers(0, 2))
    def callee_gives_up(self, pick: int) -> None:
        found = self._one(self.callee, pick)
        if found and not self.callee.connection.sent_end(found[0]):
            self.callee.connection.send_fault(found[0], "unavailable", "")
            found[1].gave_up = True

    @rule(role=st.sampled_from(Role), pick=st.integers(0, 2), size=SIZES)
    def consume(self, role: Role, pick: int, size: int) -> None:
        side = self.caller if role is Role.CALLER else self.callee
        found = self._one(side, pick)
        if found:
            size = min(size, found[1].unconsumed)
            side.connection.consumed(found[0], size)
            found[1].unconsumed -= size

    @rule(role=st.sampled_from(Role))
    def ping(self, role: Role) -> None:
        side = self.caller if role is Role.CALLER else self.callee
        if not side.connection.ping_outstanding:
            side.connection.ping(bytes(8))
            side.pings += 1

    # --- What the network does ---

    @rule(role=st.sampled_from(Role), budget=st.sampled_from([1, 5000, 1 << 20]))
    def write(self, role: Role, budget: int) -> None:
        side = self.caller if role is Role.CALLER else self.callee
        for buffer in side.connection.data_to_send(budget):
            side.wire += buffer

    @rule(role=st.sampled_from(Role), sizes=st.lists(st.sampled_from([1, 11, 12, 30, 3000, 1 << 20]), max_size=4))
    def deliver(self, role: Role, sizes: list[int]) -> None:
        sender, receiver = (self.caller, self.callee) if role is Role.CALLER else (self.callee, self.caller)
        for size in sizes:
            portion = bytes(sender.wire[:size])
            del sender.wire[:size]
            if portion:
                for event in receiver.connection.receive_data(portion):
                    self._hear(sender, receiver, event)

    @rule(role=st.sampled_from(Role))
    def write_and_deliver_all(self, role: Role) -> None:
        self.write(role, 1 << 20)
        self.deliver(role, [1 << 20])

    def _hear(self, sender: Side, receiver: Side, event: Event) -> None:
        match event:
            case HelloReceived():
                return
            case PongReceived():
                receiver.pongs += 1
                return
            case GoAwayReceived() | CallShed() | StreamEnded():
                raise AssertionError(event)
            case CallReceived(number):
                assert number not in receiver.calls
                receiver.calls[number] = Told()
                return
        told, theirs = receiver.calls[event.call], sender.calls[event.call]
        assert not (told.gave_up or told.heard_fault or told.heard_end or told.heard_cancel) or isinstance(
            event, CallCancelled
        )
        match event:
            case ReplyReceived(_, meta):
                assert not told.heard_reply
                assert meta == {"y": 2}
                told.heard_reply = True
            case DataReceived(_, data):
                assert data == PATTERN[told.heard : told.heard + len(data)], "lost, repeated or out of order"
                told.heard += len(data)
                told.unconsumed += len(data)
                assert told.heard <= theirs.sent
                assert told.unconsumed <= LIMITS.window, "the window was breached"
            case CallEnded():
                assert theirs.ended
                assert told.heard == theirs.sent, "END before all data"
                told.heard_end = True
            case FaultReceived():
                assert theirs.gave_up
                told.heard_fault = True
            case CallCancelled():
                assert not told.gave_up
                told.heard_cancel = True

    # --- What always holds ---

    @invariant()
    def counts_agree(self) -> None:
        assert self.callee.connection.open_calls <= 3
        assert self.caller.connection.open_calls <= 3
        assert self.caller.pongs <= self.caller.pings

    def teardown(self) -> None:
        """Let everybody finish: then both sides agree on how each call went, and hold nothing."""
        self._settle()
        for number, told in self.caller.calls.items():
            if not (told.ended or told.gave_up or told.heard_end or told.heard_fault):
                self.caller.connection.send_data(number, b"", end=True)
                told.ended = True
        for number, told in self.callee.calls.items():
            if not (told.ended or told.gave_up):
                if not told.replied:
                    self.callee.connection.send_reply(number, {"y": 2})
                self.callee.connection.send_data(number, b"", end=True)
                told.ended = True
        self._settle()
        for side in (self.caller, self.callee):
            assert side.connection.open_calls == 0
            assert side.pings == side.pongs
        for number, told in self.caller.calls.items():
            assert told.gave_up or told.heard_end or told.heard_fault
            if told.heard_end:
                assert told.heard == self.callee.calls[number].sent

    def _settle(self) -> None:
        """Consume, answer cancels, write and deliver until both sides have nothing more to say."""
        moved = True
        while moved:
            moved = False
            for side in (self.caller, self.callee):
                for number, told in side.calls.items():
                    if not told.gave_up:
                        side.connection.consumed(number, told.unconsumed)
                        told.unconsumed = 0
                    if told.heard_cancel and not told.gave_up:
                        side.connection.send_fault(number, "cancelled", "")
                        told.gave_up = True
                for buffer in side.connection.data_to_send(1 << 20):
                    side.wire += buffer
                moved |= bool(side.wire)
                self.deliver(side.connection.role, [1 << 20])


TwoSides.TestCase.settings = settings(max_examples=150, stateful_step_count=80, deadline=None)
TestTwoSides = TwoSides.TestCase
