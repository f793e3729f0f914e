"""Where a call stands: what each side may send, and what that leads to. PROTOCOL.md section 5.1."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from enum import Enum, StrEnum

from vsockrpc.frames import FrameType


class Role(Enum):
    CALLER = "caller"
    CALLEE = "callee"

    @property
    def other(self) -> Role:
        return Role.CALLEE if self is Role.CALLER else Role.CALLER


class Half(StrEnum):
    """One side of one call: what that side has put on the wire so far."""

    START = "start"
    OPEN = "open"
    ENDED = "ended"
    CANCELLED = "cancelled"


TRANSITIONS: Mapping[Role, Mapping[tuple[Half, FrameType], Half]] = {
    Role.CALLER: {
        (Half.START, FrameType.CALL): Half.OPEN,
        (Half.OPEN, FrameType.DATA): Half.OPEN,
        (Half.OPEN, FrameType.WINDOW): Half.OPEN,
        (Half.OPEN, FrameType.CANCEL): Half.CANCELLED,
        (Half.ENDED, FrameType.WINDOW): Half.ENDED,
        (Half.ENDED, FrameType.CANCEL): Half.CANCELLED,
    },
    Role.CALLEE: {
        (Half.START, FrameType.REPLY): Half.OPEN,
        (Half.START, FrameType.WINDOW): Half.START,
        (Half.START, FrameType.FAULT): Half.ENDED,
        (Half.OPEN, FrameType.DATA): Half.OPEN,
        (Half.OPEN, FrameType.WINDOW): Half.OPEN,
        (Half.OPEN, FrameType.FAULT): Half.ENDED,
    },
}
"""What each side may send for a call, and where it stands then. A frame with END leads to ENDED instead. Nothing
else is allowed.
"""


class Call:
    """One call, as one side of the connection sees it. Numbers are bytes."""

    __slots__ = (
        "closing",
        "flushed",
        "grant",
        "number",
        "queue",
        "queued",
        "receive_window",
        "receiving",
        "scheduled",
        "send_window",
        "sending",
        "unconsumed",
    )

    def __init__(self, number: int, *, send_window: int, receive_window: int) -> None:
        self.number = number
        self.sending = Half.START
        self.receiving = Half.START
        self.closing = False
        """The application has given its last data: END goes out with it."""
        self.flushed = False
        """This side's end (END, FAULT) is on the wire."""
        self.queue: deque[memoryview] = deque()
        self.queued = 0
        self.scheduled = False
        """It stands in the outbox's row of calls that can send."""
        self.send_window = send_window
        self.receive_window = receive_window
        self.unconsumed = 0
        self.grant = 0
        """Consumed, and not granted again so far."""

    @property
    def can_send_data(self) -> bool:
        if self.sending is not Half.OPEN:
            return False
        return self.send_window > 0 if self.queued else self.closing

    def take(self, size: int) -> list[memoryview]:
        """The first ``size`` queued bytes, removed from the queue."""
        self.queued -= size
        parts = []
        while size:
            head = self.queue.popleft()
            if len(head) > size:
                self.queue.appendleft(head[size:])
                head = head[:size]
            parts.append(head)
            size -= len(head)
        return parts
