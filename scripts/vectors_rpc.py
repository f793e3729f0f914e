"""Test vectors of the RPC, PROTOCOL.md section 5: tests/vectors/rpc/*.json.

Each file is what one side of a connection receives. ``role`` is that side; ``opened`` says for each call that a
caller has open whether its body is complete. It receives ``before`` (its peer's HELLO, at most), then ``bytes``; all
of it in any portions. ``expect`` is ``events``, which follow (data in hexadecimal, a call's adjoining pieces joined),
or the code of the violation, and ``answer`` are the frames that it sends of its own accord.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import cbor2

from vsockrpc import frames
from vsockrpc.connection import Connection
from vsockrpc.errors import RemoteProtocolError
from vsockrpc.events import DataReceived, Event
from vsockrpc.frames import HEADER, FrameType
from vsockrpc.limits import MAX_CONTROL, Limits
from vsockrpc.state import Role

LIMITS = Limits(max_frame=4096, window=8192, max_calls=3)
HELLO = frames.hello(LIMITS)
PING = frames.frame(FrameType.PING, 0, b"01234567")
CANCEL = frames.frame(FrameType.CANCEL, 1, b"")


@dataclass(frozen=True)
class Case:
    """``expect`` is stated here, not found out: what is found out must agree with it."""

    name: str
    about: str
    role: Role
    stream: bytes
    expect: str = "events"
    before: bytes = HELLO
    opened: tuple[bool, ...] = ()


def data(call: int, payload: bytes, *, end: bool = False) -> bytes:
    return frames.header(FrameType.DATA, call, len(payload), end=end) + payload


def call(number: int, *, end: bool = False) -> bytes:
    return frames.call(number, "m", 0, {}, end=end)


def payload(kind: FrameType, number: int, value: object) -> bytes:
    return frames.frame(kind, number, cbor2.dumps(value, canonical=True))


def _cases() -> Iterator[Case]:
    yield from _clean()
    yield from _headers()
    yield from _payloads()
    yield from _order()
    yield from _bounds()


def _clean() -> Iterator[Case]:
    callee, caller = Role.CALLEE, Role.CALLER
    meta = {"key_id": bytes(16), "n": 2**64 - 1, "list": [None, True, -1, {"text": "é"}]}
    asked = frames.call(1, "sealed", 5000, meta, end=False)
    yield Case("hello", "the beginning", callee, HELLO, before=b"")
    yield Case("turned-away", "GOAWAY in place of HELLO", caller, frames.go_away("overloaded"), before=b"")
    yield Case("call", "a call with its body", callee, asked + data(1, b"que") + data(1, b"stion", end=True))
    yield Case("call-without-body", "a call that is one frame", callee, call(1, end=True))
    yield Case("empty-end", "END in a frame of its own", callee, call(1) + data(1, b"x") + data(1, b"", end=True))
    yield Case("numbers-with-gaps", "numbers need only increase", callee, call(5) + call(4_294_967_295))
    yield Case("cancel", "the caller gives up", callee, call(1) + CANCEL)
    yield Case("cancel-after-end", "it gives up an answer", callee, call(1, end=True) + CANCEL)
    yield Case("window-full", "as much as the window allows", callee, call(1) + data(1, bytes(4096)) * 2)
    yield Case("grant", "WINDOW before there was DATA", callee, call(1) + frames.window(1, 1))
    yield Case("ping", "PING is answered", callee, PING)
    yield Case("goaway", "the other side takes no more calls", caller, frames.go_away("closing"))
    yield Case("depth-8", "the deepest meta", callee, payload(FrameType.CALL, 1, _head(meta={"x": [[[[[[1]]]]]]})))
    answer = frames.reply(1, {"size": 6}, end=False) + data(1, b"ans") + data(1, b"wer", end=True)
    yield Case("answer", "head, data, END", caller, answer, opened=(True,))
    yield Case("answer-head-only", "an answer of one frame", caller, frames.reply(1, {}, end=True), opened=(True,))
    yield Case("fault", "a refusal", caller, frames.fault(1, "unknown_key", "verify anew"), opened=(True,))
    late = frames.reply(1, {}, end=False) + data(1, b"some") + frames.fault(1, "unavailable", "")
    yield Case("fault-in-mid-answer", "the answer breaks off", caller, late, opened=(True,))
    early = frames.reply(1, {}, end=True)
    yield Case("early-end", "an answer before the body's end is answered with CANCEL", caller, early, opened=(False,))
    woven = frames.reply(2, {}, end=False) + answer[:-15] + data(2, b"2", end=True) + data(1, b"wer", end=True)
    yield Case("two-answers", "frames of two calls in turn", caller, woven, opened=(True, True))


def _headers() -> Iterator[Case]:
    def case(name: str, about: str, header: tuple[int, int, int, int, int], code: str = "bad_header") -> Case:
        return Case(f"header-{name}", about, Role.CALLEE, call(1) + HEADER.pack(*header), code)

    yield case("type-10", "an unknown type", (10, 0, 0, 1, 0))
    yield case("flag-1", "flag bit 1", (2, 2, 0, 1, 1))
    yield case("flag-7", "flag bit 7", (2, 0x80, 0, 1, 1))
    yield case("reserved", "the reserved bytes", (2, 0, 1, 1, 1))
    yield case("end-on-cancel", "END on CANCEL", (5, 1, 0, 1, 0))
    yield case("end-on-ping", "END on PING", (7, 1, 0, 0, 8))
    yield case("ping-of-a-call", "PING with a call number", (7, 0, 0, 1, 8))
    yield case("data-of-no-call", "DATA of call 0", (2, 0, 0, 0, 1))
    yield case("empty-data", "empty DATA without END", (2, 0, 0, 1, 0))
    yield case("short-window", "WINDOW of 3 bytes", (6, 0, 0, 1, 3))
    yield case("long-window", "WINDOW of 5 bytes", (6, 0, 0, 1, 5), "oversized_frame")
    yield case("long-cancel", "CANCEL with a payload", (5, 0, 0, 1, 1), "oversized_frame")
    yield case("long-call", "a control payload too long", (1, 0, 0, 2, MAX_CONTROL + 1), "oversized_frame")
    yield case("long-data", "DATA above max_frame", (2, 0, 0, 1, 4097), "oversized_frame")
    yield case("huge-data", "DATA of 4 GiB", (2, 0, 0, 1, 0xFFFFFFFF), "oversized_frame")


def _head(**changes: object) -> dict[str, object]:
    return {"method": "m", "deadline_ms": 0, "meta": {}} | changes


def _payloads() -> Iterator[Case]:
    def case(name: str, about: str, value: dict[str, object]) -> Case:
        return Case(f"payload-{name}", about, Role.CALLEE, payload(FrameType.CALL, 1, value), "malformed_payload")

    yield case("unknown-key", "a key of no meaning", _head(more=1))
    yield case("missing-key", "no meta", {"method": "m", "deadline_ms": 0})
    yield case("method", "a method with a capital letter", _head(method="M"))
    yield case("method-long", "a method of 65 characters", _head(method="m" * 65))
    yield case("deadline", "a deadline of 2**32 ms", _head(deadline_ms=2**32))
    yield case("deadline-negative", "a deadline below 0", _head(deadline_ms=-1))
    yield case("float", "floating point in meta", _head(meta={"x": 1.5}))
    yield case("integer-key", "a key that is no text", _head(meta={1: 1}))
    yield case("tag", "a tag in meta", _head(meta={"x": cbor2.CBORTag(1, 0)}))
    yield case("depth-9", "meta too deep", _head(meta={"x": [[[[[[[1]]]]]]]}))
    good = cbor2.dumps(_head(), canonical=True)
    for name, about, raw in (
        ("trailing", "a byte behind the map", good + b"\x00"),
        ("key-order", "keys out of order", cbor2.dumps(_head())),
        ("long-integer", "0 in two bytes", good.replace(b"deadline_ms\x00", b"deadline_ms\x18\x00")),
        ("indefinite", "a map of indefinite length", b"\xbf" + good[1:] + b"\xff"),
        ("duplicate-key", "meta twice", b"\xa4" + good[1:] + cbor2.dumps("meta") + b"\xa0"),
        ("no-cbor", "no CBOR", b"\xff"),
    ):
        stream = frames.frame(FrameType.CALL, 1, raw)
        yield Case(f"payload-{name}", about, Role.CALLEE, stream, "malformed_payload")
    for name, about, changes in (
        ("version", "version 2", {"v": 2}),
        ("max-frame", "max_frame below its range", {"max_frame": 4095}),
        ("window", "window above its range", {"window": 16_777_217}),
        ("max-calls", "no calls", {"max_calls": 0}),
    ):
        told = {"v": 1, "max_frame": 4096, "window": 8192, "max_calls": 3} | changes
        stream = payload(FrameType.HELLO, 0, told)
        yield Case(f"hello-{name}", about, Role.CALLEE, stream, "malformed_payload", before=b"")


def _order() -> Iterator[Case]:
    def callee(name: str, about: str, stream: bytes, code: str = "unexpected_frame") -> Case:
        return Case(f"order-{name}", about, Role.CALLEE, stream, code)

    def caller(name: str, about: str, stream: bytes, code: str = "unexpected_frame") -> Case:
        return Case(f"order-{name}", about, Role.CALLER, stream, code, opened=(True,))

    yield Case("order-no-hello", "CALL before HELLO", Role.CALLEE, call(1), "no_hello", before=b"")
    yield callee("two-hellos", "a second HELLO", HELLO)
    yield callee("number-again", "the same call number", call(1, end=True) * 2, "call_number")
    yield callee("number-lower", "a lower call number", call(2) + call(1), "call_number")
    yield callee("unknown-call", "DATA of a call that never was", data(1, b"x"), "unknown_call")
    yield callee("data-after-end", "DATA after END", call(1, end=True) + data(1, b"x"))
    yield callee("data-after-cancel", "DATA after CANCEL", call(1) + CANCEL + data(1, b"x"))
    yield callee("cancel-twice", "CANCEL twice", call(1) + CANCEL * 2)
    yield callee("reply-from-caller", "REPLY from the caller", call(1) + frames.reply(1, {}, end=False))
    yield callee("two-pings", "a second PING at once", PING * 2, "bad_ping")
    yield callee("pong", "a PONG that nobody asked for", frames.frame(FrameType.PONG, 0, bytes(8)), "bad_ping")
    yield caller("call-from-callee", "CALL from the callee", call(2))
    yield caller("data-before-reply", "DATA before REPLY", data(1, b"x"))
    yield caller("two-replies", "REPLY twice", frames.reply(1, {}, end=False) * 2)
    behind = frames.reply(1, {}, end=True) + data(1, b"x")
    yield caller("data-behind-end", "DATA behind the callee's END", behind, "unknown_call")
    yield caller("fault-behind-fault", "FAULT twice", frames.fault(1, "x", "") * 2, "unknown_call")


def _bounds() -> Iterator[Case]:
    def case(name: str, about: str, stream: bytes, code: str) -> Case:
        return Case(f"bound-{name}", about, Role.CALLEE, stream, code)

    full = call(1) + data(1, bytes(4096)) * 2
    yield case("window", "a byte beyond the window", full + data(1, b"x"), "window_exceeded")
    yield case("grant", "a window beyond 16 MiB", call(1) + frames.window(1, 16_777_216), "window_overflow")
    empty = frames.frame(FrameType.WINDOW, 1, bytes(4))
    yield case("grant-zero", "an empty grant", call(1) + empty, "malformed_payload")
    four = b"".join(call(number) for number in range(1, 5))
    yield case("calls", "one call too many", four, "too_many_calls")


def files() -> Mapping[str, bytes]:
    """Every vector, by the name of its file."""
    made: dict[str, bytes] = {}
    for case in _cases():
        expect, events, answer = _run(case)
        if expect != case.expect:
            raise AssertionError(f"{case.name}: {expect}, not {case.expect}")
        record = {
            "about": case.about,
            "role": case.role.value,
            "limits": {"max_frame": LIMITS.max_frame, "window": LIMITS.window, "max_calls": LIMITS.max_calls},
            "opened": case.opened,
            "before": case.before.hex(),
            "bytes": case.stream.hex(),
            "expect": case.expect,
            "events": events,
            "answer": answer.hex(),
        }
        assert f"{case.name}.json" not in made
        made[f"{case.name}.json"] = (json.dumps(record, indent=1, ensure_ascii=False) + "\n").encode()
    return made


def _run(case: Case) -> tuple[str, list[list[object]], bytes]:
    connection = Connection(case.role, LIMITS)
    connection.data_to_send(1)
    events: list[list[object]] = []
    try:
        if case.before:
            connection.receive_data(case.before)
        for complete in case.opened:
            connection.open_call("m", {}, end=complete)
        connection.data_to_send(1)
        events = described(connection.receive_data(case.stream))
        expect = "events"
    except RemoteProtocolError as error:
        expect = error.code
    return expect, events, b"".join(bytes(buffer) for buffer in connection.data_to_send(1 << 20))


def described(events: list[Event]) -> list[list[object]]:
    """Events as JSON has them: name, then fields; bytes in hexadecimal; pieces of one call that follow each other
    are one.
    """
    found: list[list[object]] = []
    for event in events:
        fields = [_plain(getattr(event, name)) for name in event.__slots__]
        match event:
            case DataReceived(number) if found and found[-1][:2] == ["DataReceived", number]:
                found[-1][2] = f"{found[-1][2]}{fields[1]}"
            case _:
                found.append([type(event).__name__, *fields])
    return found


def _plain(value: object) -> object:
    match value:
        case bytes() | memoryview():
            return value.hex()
        case list():
            return [_plain(item) for item in value]
        case dict():
            return {key: _plain(item) for key, item in value.items()}
    return value
