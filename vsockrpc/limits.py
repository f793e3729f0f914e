"""Every bound of the RPC, with its unit. PROTOCOL.md section 5."""

from __future__ import annotations

from dataclasses import dataclass, fields

VERSION = 1
MAX_CONTROL = 16_384
"""Bytes of a control frame's payload."""
MAX_WINDOW = 16_777_216
"""Bytes that one direction of a call may ever have in grant."""
MAX_CALL = 0xFFFF_FFFF
MAX_DEADLINE_MS = 0xFFFF_FFFF
MAX_METHOD = 64
"""Characters of a method's name, and of a code."""
MAX_MESSAGE = 1024
"""Characters of a fault's message."""
MAX_DEPTH = 8
"""Arrays and maps inside one another in a control payload."""

MAX_FRAME_RANGE = (4_096, 1_048_576)
WINDOW_RANGE = (4_096, MAX_WINDOW)
MAX_CALLS_RANGE = (1, 65_536)


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """What one side of a connection allows. The first three are told to the other side in HELLO; the rest is kept here.

    What one peer can make this side hold is at most ``max_buffered`` bytes of data, and for each of ``max_calls``
    calls two control payloads of 16,384 bytes and ``send_buffer`` bytes of its own answers.
    """

    max_frame: int = 262_144
    """Bytes of one DATA frame's payload, received; also the longest that this side sends."""
    window: int = 1_048_576
    """Bytes in flight, received and not yet consumed, of one call."""
    max_calls: int = 1_024
    """Calls open at once on one connection."""

    max_buffered: int = 67_108_864
    """Bytes received and not yet consumed, all calls of a connection together. Beyond it the call that holds most
    is given up.
    """
    send_buffer: int = 1_048_576
    """Bytes of one call queued for sending, before its sender has to wait."""

    max_connections: int = 64
    """Connections that a server holds at once."""
    max_running: int = 4_096
    """Handlers that a server runs at once, all connections together."""

    handshake: float = 10.0
    """Seconds from the connection's start to the other side's HELLO."""
    idle: float = 15.0
    """Seconds without a whole frame from the other side, after which it is sent a PING."""
    pong: float = 20.0
    """Seconds that a PONG may take."""
    stall: float = 30.0
    """Seconds that queued output may wait: for the socket to take a byte, or for one call's window to open."""
    drain: float = 5.0
    """Seconds that a graceful close waits, for running calls and again for the last bytes."""

    def __post_init__(self) -> None:
        for name, (low, high) in (
            ("max_frame", MAX_FRAME_RANGE),
            ("window", WINDOW_RANGE),
            ("max_calls", MAX_CALLS_RANGE),
        ):
            if not low <= getattr(self, name) <= high:
                raise ValueError(f"{name} is {getattr(self, name)}, not {low}..{high}")
        for field in fields(self):
            if getattr(self, field.name) <= 0:
                raise ValueError(f"{field.name} is not positive")
        if self.max_buffered < self.window:
            raise ValueError("max_buffered is below window: a single call could not use what it was granted")


BULK = Limits(max_frame=1_048_576, window=4_194_304)
"""For both sides of a connection that carries little but large bodies, such as a model: measured a tenth faster to hash
on arrival (``bench.bulk``), at the price of what a small call may find in front of it.
"""
