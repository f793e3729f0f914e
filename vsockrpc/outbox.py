"""What a connection has to send, and in which order. Sans-IO.

What is owed to the other side is kept as one fact a call (a grant, an end), not as a queue of frames, so a peer that
asks and never reads cannot make it grow.
"""

from __future__ import annotations

from collections import deque
from typing import TypeAlias

from vsockrpc import frames
from vsockrpc.frames import FrameType
from vsockrpc.state import Call, Half

Buffer: TypeAlias = bytes | bytearray | memoryview

_COPY_BELOW = 4_096
"""Bytes of payload below which joining frames is cheaper than handing the kernel one more buffer."""


class Outbox:
    """Control frames first, then DATA of all calls that can send, in turn, a frame each."""

    def __init__(self, first: bytes) -> None:
        self._control = bytearray(first)
        self._ends: list[Call] = []
        self._pong: bytes | None = None
        self._grants: dict[int, Call] = {}
        self._row: deque[Call] = deque()

    @property
    def waiting(self) -> bool:
        return bool(self._control or self._pong or self._grants or self._row)

    @property
    def owes_pong(self) -> bool:
        return self._pong is not None

    def say(self, frame: bytes, *, end_of: Call | None = None) -> None:
        """Queue a control frame; ``end_of``: it is this side's end of that call."""
        self._control += frame
        if end_of is not None:
            self._ends.append(end_of)

    def pong(self, payload: bytes) -> None:
        self._pong = payload

    def grant(self, call: Call) -> None:
        self._grants[call.number] = call

    def schedule(self, call: Call) -> None:
        """Give the call a place in the row if it can send and has none."""
        if not call.scheduled and call.can_send_data:
            call.scheduled = True
            self._row.append(call)

    def drop(self, call: Call) -> None:
        """Nothing more of this call: neither its data nor its grant."""
        call.queue.clear()
        call.queued = 0
        self._grants.pop(call.number, None)

    def abandon(self, last_words: bytes) -> None:
        """Nothing more at all, but ``last_words``."""
        self._control = bytearray(last_words)
        self._ends.clear()
        self._pong = None
        self._grants.clear()
        self._row.clear()

    def take(self, budget: int, max_frame: int) -> tuple[list[Buffer], list[Call]]:
        """All control frames, then DATA frames of at most ``max_frame`` bytes until ``budget`` bytes; and the calls
        that this ends on our side.
        """
        tail, self._control = self._control, bytearray()
        ended, self._ends = self._ends, []
        if self._pong is not None:
            tail += frames.frame(FrameType.PONG, 0, self._pong)
            self._pong = None
        for call in self._grants.values():
            tail += frames.window(call.number, call.grant)
            call.receive_window += call.grant
            call.grant = 0
        self._grants.clear()
        out: list[Buffer] = [tail]
        while self._row and budget > 0:
            call = self._row.popleft()
            call.scheduled = False
            if not call.can_send_data:
                continue  # cancelled or ended by a fault while it stood in the row
            size = min(call.queued, call.send_window, max_frame)
            end = call.closing and size == call.queued
            tail += frames.header(FrameType.DATA, call.number, size, end=end)
            parts = call.take(size)
            if size < _COPY_BELOW:
                for part in parts:
                    tail += part
            else:
                tail = bytearray()
                out += (*parts, tail)
            call.send_window -= size
            budget -= size + frames.HEADER.size
            if end:
                call.sending = Half.ENDED
                ended.append(call)
            else:
                self.schedule(call)
        return [buffer for buffer in out if buffer], ended
