"""What a ``Connection`` reports. One event is one fact that came from the other side, in the order in which it came."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeAlias

from vsockrpc.frames import Meta


@dataclass(frozen=True, slots=True)
class HelloReceived:
    """The other side speaks this version: frames may be sent now. ``max_calls`` is what it takes at once."""

    max_calls: int


@dataclass(frozen=True, slots=True)
class CallReceived:
    """Callee only. ``deadline_ms`` counts from now; 0 is none."""

    call: int
    method: str
    deadline_ms: int
    meta: Meta


@dataclass(frozen=True, slots=True)
class ReplyReceived:
    """Caller only. The answer's head; data may follow."""

    call: int
    meta: Meta


@dataclass(frozen=True, slots=True)
class DataReceived:
    """At least one byte of a call's data: a slice of what ``receive_data`` was given, not necessarily a whole frame.

    It counts against the call's window until ``Connection.consumed`` says otherwise.
    """

    call: int
    data: memoryview


@dataclass(frozen=True, slots=True)
class CallEnded:
    """The other side's END: it sends no more for this call. From the callee it is the clean end of the call."""

    call: int


@dataclass(frozen=True, slots=True)
class FaultReceived:
    """Caller only. The call is over."""

    call: int
    code: str
    message: str


@dataclass(frozen=True, slots=True)
class CallCancelled:
    """Callee only. The caller gave up. The call stays open, and counts, until ``Connection.send_fault`` says that
    the work has stopped.
    """

    call: int


@dataclass(frozen=True, slots=True)
class CallShed:
    """This side gave the call up because ``Limits.max_buffered`` was reached and this call held most of it. The
    other side is being told.
    """

    call: int


@dataclass(frozen=True, slots=True)
class PongReceived:
    payload: bytes


@dataclass(frozen=True, slots=True)
class GoAwayReceived:
    """The other side takes (callee) or makes (caller) no new calls; after ``protocol_error`` it does nothing more
    at all.
    """

    code: str


@dataclass(frozen=True, slots=True)
class StreamEnded:
    """The other side closed the stream, between two frames. Calls that had not ended are lost."""


Event: TypeAlias = (
    HelloReceived
    | CallReceived
    | ReplyReceived
    | DataReceived
    | CallEnded
    | FaultReceived
    | CallCancelled
    | CallShed
    | PongReceived
    | GoAwayReceived
    | StreamEnded
)
