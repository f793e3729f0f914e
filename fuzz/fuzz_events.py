"""The lines of events that an enclave sends to its supervisor."""

from __future__ import annotations

import json

from parent.events import EventError, EventReader


def one_input(data: bytes) -> None:
    reader = EventReader()
    try:
        for start in range(0, len(data), 97):
            for line, event in reader.feed(data[start : start + 97]):
                assert line.decode("ascii").isprintable()
                check(event)
    except EventError as error:
        json.dumps(error.as_json())


def check(event: dict[str, object]) -> None:
    """What the supervisor and the progress bar take for granted."""
    match event["event"]:
        case "phase":
            assert isinstance(event["phase"], str)
        case "halted":
            assert all(isinstance(event[key], str) for key in ("code", "message"))
            assert all(isinstance(event[key], str | None) for key in ("expected", "got"))
        case "weights":
            assert all(isinstance(event[key], int) for key in ("received", "total"))


def seeds() -> list[bytes]:
    events = [
        {"event": "phase", "at": 0.5, "phase": "SERVING"},
        {"event": "halted", "phase": "HALTED", "code": "c", "message": "m", "expected": None, "got": "x"},
        {"event": "weights", "received": 1, "total": 2},
        {"event": "key_offered", "key_id": "00"},
    ]
    return [b"".join(json.dumps(event).encode() + b"\n" for event in events), b"nope\n", b"[]\n", b"{}\n"]
