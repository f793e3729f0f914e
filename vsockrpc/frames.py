"""Frames: twelve bytes of header and a payload. PROTOCOL.md section 5.1. Sans-IO.

Control payloads are deterministic CBOR or of fixed form, and handed over whole; the payload of a DATA frame is handed
over in the pieces in which it arrives, without a copy.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Callable, Iterator, Mapping
from enum import IntEnum
from typing import Any, NamedTuple, NoReturn, TypeAlias

import cbor2

from vsockrpc.errors import LocalProtocolError, RemoteProtocolError
from vsockrpc.limits import (
    MAX_CALLS_RANGE,
    MAX_CONTROL,
    MAX_DEADLINE_MS,
    MAX_DEPTH,
    MAX_FRAME_RANGE,
    MAX_MESSAGE,
    MAX_METHOD,
    MAX_WINDOW,
    VERSION,
    WINDOW_RANGE,
    Limits,
)

HEADER = struct.Struct(">BBHII")
END = 0x01

Meta: TypeAlias = Mapping[str, object]
"""A map with text keys, of integers, booleans, null, byte and text strings, arrays and such maps."""


class FrameType(IntEnum):
    HELLO = 0
    CALL = 1
    DATA = 2
    REPLY = 3
    FAULT = 4
    CANCEL = 5
    WINDOW = 6
    PING = 7
    PONG = 8
    GOAWAY = 9


_TYPES = tuple(FrameType)


class _Shape(NamedTuple):
    of_call: bool
    may_end: bool
    smallest: int
    largest: int
    """Bytes of payload. DATA's is the receiver's ``max_frame``."""


_SHAPES = {
    FrameType.HELLO: _Shape(False, False, 1, MAX_CONTROL),
    FrameType.CALL: _Shape(True, True, 1, MAX_CONTROL),
    FrameType.DATA: _Shape(True, True, 0, MAX_FRAME_RANGE[1]),
    FrameType.REPLY: _Shape(True, True, 1, MAX_CONTROL),
    FrameType.FAULT: _Shape(True, False, 1, MAX_CONTROL),
    FrameType.CANCEL: _Shape(True, False, 0, 0),
    FrameType.WINDOW: _Shape(True, False, 4, 4),
    FrameType.PING: _Shape(False, False, 8, 8),
    FrameType.PONG: _Shape(False, False, 8, 8),
    FrameType.GOAWAY: _Shape(False, False, 1, MAX_CONTROL),
}


class Header(NamedTuple):
    """A valid header. The reader yields a DATA frame's as soon as it is there, before the payload."""

    type: FrameType
    end: bool
    call: int
    length: int


class Control(NamedTuple):
    """A whole frame that is not DATA."""

    header: Header
    payload: bytes


class Piece(NamedTuple):
    """A part of the payload of the DATA frame whose header came last."""

    data: memoryview
    last: bool


class FrameReader:
    """Cuts a stream into frames, each header checked before a byte of its payload is kept. It holds at most one
    header and control payload.
    """

    def __init__(self, max_frame: int) -> None:
        self._max_frame = max_frame
        self._partial = bytearray()
        self._header: Header | None = None
        self._data_left = 0
        self.frames = 0
        """Whole frames read so far."""

    @property
    def mid_frame(self) -> bool:
        return bool(self._partial or self._header is not None or self._data_left)

    def receive(self, data: memoryview) -> Iterator[Header | Control | Piece]:
        """What is complete with ``data``; pieces are slices of it. Raises RemoteProtocolError."""
        position = 0
        while True:
            if self._data_left:
                piece = data[position : position + self._data_left]
                if not piece:
                    return
                position += len(piece)
                self._data_left -= len(piece)
                self.frames += not self._data_left
                yield Piece(piece, not self._data_left)
                continue
            header = self._header
            missing = (HEADER.size if header is None else header.length) - len(self._partial)
            chunk: bytes | memoryview = data[position : position + missing]
            position += len(chunk)
            if len(chunk) < missing:
                self._partial += chunk
                return
            if self._partial:
                chunk = bytes(self._partial + chunk)
                self._partial.clear()
            if header is not None:
                self._header = None
                self.frames += 1
                yield Control(header, bytes(chunk))
                continue
            header = self._parse_header(chunk)
            if header.type is FrameType.DATA:
                self._data_left = header.length
                self.frames += not header.length
                yield header
            elif header.length:
                self._header = header
            else:
                self.frames += 1
                yield Control(header, b"")

    def _parse_header(self, data: bytes | memoryview) -> Header:
        number, flags, zero, call, length = HEADER.unpack(data)
        if number >= len(_TYPES):
            raise RemoteProtocolError("bad_header", "unknown frame type", expected="0..9", got=number)
        kind = _TYPES[number]
        shape = _SHAPES[kind]
        if zero or flags & ~END or (flags and not shape.may_end):
            raise RemoteProtocolError("bad_header", f"flags or reserved bytes of {kind.name} are set", got=data.hex())
        if bool(call) is not shape.of_call:
            raise RemoteProtocolError(
                "bad_header", f"call number of {kind.name}", expected="not 0" if shape.of_call else 0, got=call
            )
        largest = self._max_frame if kind is FrameType.DATA else shape.largest
        if length > largest:
            raise RemoteProtocolError(
                "oversized_frame", f"{kind.name} is too long", expected=f"at most {largest} bytes", got=length
            )
        if length < shape.smallest or (kind is FrameType.DATA and not length and not flags):
            raise RemoteProtocolError(
                "bad_header", f"{kind.name} is too short", expected=f"at least {shape.smallest or 1} bytes", got=length
            )
        return Header(kind, bool(flags), call, length)


# --- Writing --------------------------------------------------------------------------------------


def header(kind: FrameType, call: int, length: int, *, end: bool = False) -> bytes:
    return HEADER.pack(kind, end, 0, call, length)


def frame(kind: FrameType, call: int, payload: bytes, *, end: bool = False) -> bytes:
    return HEADER.pack(kind, end, 0, call, len(payload)) + payload


def hello(limits: Limits) -> bytes:
    told = {"v": VERSION, "max_frame": limits.max_frame, "window": limits.window, "max_calls": limits.max_calls}
    return frame(FrameType.HELLO, 0, _encode(told))


def call(number: int, method: str, deadline_ms: int, meta: Meta, *, end: bool) -> bytes:
    if not _METHOD.fullmatch(method):
        raise LocalProtocolError("malformed_payload", "no method name", expected=_METHOD.pattern, got=ascii(method))
    if not 0 <= deadline_ms <= MAX_DEADLINE_MS:
        raise LocalProtocolError("malformed_payload", "deadline out of range", got=f"{deadline_ms} ms")
    payload = _encode({"method": method, "deadline_ms": deadline_ms, "meta": meta})
    return frame(FrameType.CALL, number, payload, end=end)


def reply(number: int, meta: Meta, *, end: bool) -> bytes:
    return frame(FrameType.REPLY, number, _encode({"meta": meta}), end=end)


def fault(number: int, code: str, message: str) -> bytes:
    if not _CODE.fullmatch(code):
        raise LocalProtocolError("malformed_payload", "no fault code", expected=_CODE.pattern, got=ascii(code))
    text = message[:MAX_MESSAGE].encode("utf-8", "replace").decode()
    return frame(FrameType.FAULT, number, _encode({"code": code, "message": text}))


def window(number: int, grant: int) -> bytes:
    return frame(FrameType.WINDOW, number, grant.to_bytes(4, "big"))


def go_away(code: str) -> bytes:
    if not _CODE.fullmatch(code):
        raise LocalProtocolError("malformed_payload", "no code", expected=_CODE.pattern, got=ascii(code))
    return frame(FrameType.GOAWAY, 0, _encode({"code": code}))


def _encode(value: Meta) -> bytes:
    if not _is_plain(value):
        raise LocalProtocolError("malformed_payload", "a value that control payloads have no form for")
    try:
        encoded = cbor2.dumps(value, canonical=True)
    except (cbor2.CBOREncodeError, UnicodeEncodeError) as error:
        raise LocalProtocolError("malformed_payload", "a value that CBOR has no form for") from error
    if len(encoded) > MAX_CONTROL:
        raise LocalProtocolError(
            "oversized_frame",
            "a control payload is too long",
            expected=f"at most {MAX_CONTROL} bytes",
            got=len(encoded),
        )
    return encoded


# --- Reading control payloads ---------------------------------------------------------------------


class Hello(NamedTuple):
    max_frame: int
    window: int
    max_calls: int


class CallHead(NamedTuple):
    method: str
    deadline_ms: int
    meta: Meta


_METHOD = re.compile(rf"[a-z0-9][a-z0-9._]{{0,{MAX_METHOD - 1}}}", re.ASCII)
_CODE = re.compile(rf"[a-z0-9_]{{1,{MAX_METHOD}}}", re.ASCII)


def parse_hello(payload: bytes) -> Hello:
    fields = _decode("HELLO", payload, {"v", "max_frame", "window", "max_calls"})
    _uint("HELLO", fields, "v", VERSION, VERSION)
    return Hello(
        _uint("HELLO", fields, "max_frame", *MAX_FRAME_RANGE),
        _uint("HELLO", fields, "window", *WINDOW_RANGE),
        _uint("HELLO", fields, "max_calls", *MAX_CALLS_RANGE),
    )


def parse_call(payload: bytes) -> CallHead:
    fields = _decode("CALL", payload, {"method", "deadline_ms", "meta"})
    return CallHead(
        _text("CALL", fields, "method", _METHOD),
        _uint("CALL", fields, "deadline_ms", 0, MAX_DEADLINE_MS),
        _map("CALL", fields, "meta"),
    )


def parse_reply(payload: bytes) -> Meta:
    return _map("REPLY", _decode("REPLY", payload, {"meta"}), "meta")


def parse_fault(payload: bytes) -> tuple[str, str]:
    fields = _decode("FAULT", payload, {"code", "message"})
    message = fields["message"]
    if not isinstance(message, str) or len(message) > MAX_MESSAGE:
        _malformed("FAULT", f"message is no text of at most {MAX_MESSAGE} characters")
    return _text("FAULT", fields, "code", _CODE), message


def parse_go_away(payload: bytes) -> str:
    return _text("GOAWAY", _decode("GOAWAY", payload, {"code"}), "code", _CODE)


def parse_window(payload: bytes) -> int:
    grant = int.from_bytes(payload, "big")
    if not 1 <= grant <= MAX_WINDOW:
        _malformed("WINDOW", f"grants {grant} bytes, not 1..{MAX_WINDOW}")
    return grant


def _malformed(kind: str, what: str) -> NoReturn:
    raise RemoteProtocolError("malformed_payload", f"{kind}: {what}")


def _refuse_tag(*_: object) -> NoReturn:
    raise ValueError("a CBOR tag")


_REFUSE_TAGS: dict[int, Callable[[Any, bool], Any]] = dict.fromkeys((*range(300), 43_000, 55_799), _refuse_tag)
"""Tags that cbor2 gives a meaning (dates, regular expressions, shared references) do work at the sender's wish."""


def _decode(kind: str, payload: bytes, keys: set[str]) -> dict[str, object]:
    try:
        value: object = cbor2.loads(
            payload,
            tag_hook=_refuse_tag,
            semantic_decoders=_REFUSE_TAGS,
            max_depth=MAX_DEPTH,
            allow_indefinite=False,
            allow_duplicate_keys=False,
            strict_hashable_types=True,
        )
    except cbor2.CBORDecodeError:
        _malformed(kind, "not CBOR as section 5.1 allows it")
    if not isinstance(value, dict) or value.keys() != keys:
        _malformed(kind, f"not a map of exactly {', '.join(sorted(keys))}")
    if not _is_plain(value):
        _malformed(kind, "holds a value that is no integer, boolean, null, string, array or map with text keys")
    # Encoding again settles what the decoder lets pass: long heads, unsorted keys, bytes behind the value.
    if cbor2.dumps(value, canonical=True) != payload:
        _malformed(kind, "not deterministic CBOR")
    return value


_SCALARS = frozenset({type(None), bool, str, bytes})


def _is_plain(value: object) -> bool:
    """Of the types that ``Meta`` allows, in range, at most MAX_DEPTH deep. Level by level: it runs for every call."""
    level: list[Any] = [value]
    for depth in range(MAX_DEPTH + 1):
        inner: list[Any] = []
        for item in level:
            kind = type(item)
            if kind in _SCALARS or (kind is int and -(1 << 64) <= item < 1 << 64):
                continue
            if depth == MAX_DEPTH:
                return False
            if kind is dict and set(map(type, item)) <= {str}:
                inner += item.values()
            elif kind is list:
                inner += item
            else:
                return False
        if not inner:
            break
        level = inner
    return True


def _uint(kind: str, fields: Mapping[str, object], name: str, low: int, high: int) -> int:
    value = fields[name]
    if not isinstance(value, int) or isinstance(value, bool) or not low <= value <= high:
        _malformed(kind, f"{name} is no integer in {low}..{high}")
    return value


def _text(kind: str, fields: Mapping[str, object], name: str, form: re.Pattern[str]) -> str:
    value = fields[name]
    if not isinstance(value, str) or not form.fullmatch(value):
        _malformed(kind, f"{name} is not {form.pattern}")
    return value


def _map(kind: str, fields: Mapping[str, object], name: str) -> Meta:
    value = fields[name]
    if not isinstance(value, dict):
        _malformed(kind, f"{name} is no map")
    return value
