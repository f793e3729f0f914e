"""The events that an enclave tells its supervisor, one JSON object a line. PROTOCOL.md section 5.2.

The enclave is the other side: whoever breaks out into it writes what they like here. So a line is bounded, and what
the supervisor acts on is checked. Events that it does not know pass through.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any, Final, TypeAlias

from attestation.errors import StrongroomError

MAX_LINE: Final = 16 << 10
"""Bytes of an event, without the end of its line."""
PHASES: Final = frozenset({"COLD", "ENTROPY", "CONFIGURED", "MODEL_COMMITTED", "KEYED", "SERVING", "HALTED"})
"""Of a boot. The supervisor's own, such as FAILED, are not an enclave's to claim."""
MAX_SIZE: Final = 1 << 63
"""No number of bytes is as large."""

Event: TypeAlias = dict[str, Any]
"""``event`` is its name. The fields of ``phase``, ``halted`` and ``weights`` are those of enclave/log.py."""


class EventError(StrongroomError):
    """A line that is no event. Code ``bad_event``."""

    def __init__(self, message: str, *, expected: object, got: object) -> None:
        super().__init__("bad_event", message, expected=expected, got=got)


class EventReader:
    """Events from a stream's pieces. It holds at most :data:`MAX_LINE` bytes besides the piece it is given."""

    def __init__(self) -> None:
        self._rest = b""

    def feed(self, data: bytes | memoryview) -> Iterator[tuple[bytes, Event]]:
        """Every line that is now complete, and what it says. Raises EventError."""
        *lines, self._rest = (self._rest + data).split(b"\n")
        for line in lines:
            yield line, parse_event(line)
        if len(self._rest) > MAX_LINE:
            raise _too_long(self._rest)


def parse_event(line: bytes) -> Event:
    """The event in a line without its end: printable ASCII, so that a log of such lines drives no terminal. Raises
    EventError.
    """
    if len(line) > MAX_LINE:
        raise _too_long(line)
    shown = ascii(line[:64])
    try:
        text = line.decode("ascii")
        event = json.loads(text) if text.isprintable() else None
    except (ValueError, RecursionError) as error:
        raise EventError("a line is no event", expected="a JSON object in ASCII", got=shown) from error
    if not isinstance(event, dict) or not isinstance(event.get("event"), str):
        raise EventError("a line is no event", expected='a JSON object with "event"', got=shown)
    match event:
        case {"event": "phase", "phase": str(phase)}:
            sound = phase in PHASES
        case {"event": "halted", "code": str(), "message": str(), "expected": str() | None, "got": str() | None}:
            sound = True
            # These are shown to a person, and JSON's escapes may hold what drives a terminal.
            event = {key: _printable(value) if isinstance(value, str) else value for key, value in event.items()}
        case {"event": "weights", "received": int(received), "total": int(total)}:
            sound = 0 <= received < MAX_SIZE and 0 <= total < MAX_SIZE
        case _:
            sound = event["event"] not in ("phase", "halted", "weights")
    if not sound:
        raise EventError(
            f"the fields of a {event['event']} event are wrong", expected="those of enclave/log.py", got=shown
        )
    return event


def _printable(text: str) -> str:
    return "".join(character if character.isprintable() else ascii(character)[1:-1] for character in text)


def _too_long(line: bytes) -> EventError:
    return EventError("a line is too long for an event", expected=f"<= {MAX_LINE} bytes", got=f"{len(line)} bytes")
