from __future__ import annotations

from itertools import pairwise

import cbor2
import pytest
from hypothesis import given
from hypothesis import strategies as st

from vsockrpc import frames
from vsockrpc.errors import LocalProtocolError, RemoteProtocolError
from vsockrpc.frames import HEADER, Control, FrameReader, FrameType, Header, Piece
from vsockrpc.limits import MAX_CONTROL, MAX_DEADLINE_MS, MAX_MESSAGE, Limits

MAX_FRAME = 4096
META: dict[str, object] = {"id": b"\x00" * 16, "n": 2**64 - 1, "l": [None, True, -(2**64), {"t": "é"}]}
FRAMES: dict[str, bytes] = {
    "HELLO": frames.hello(Limits()),
    "CALL": frames.call(1, "model.file", 5000, META, end=False),
    "CALL END": frames.call(0xFFFFFFFF, "m", MAX_DEADLINE_MS, {}, end=True),
    "DATA": frames.header(FrameType.DATA, 1, 5) + b"bytes",
    "DATA END": frames.header(FrameType.DATA, 1, MAX_FRAME, end=True) + bytes(MAX_FRAME),
    "empty DATA END": frames.header(FrameType.DATA, 1, 0, end=True),
    "REPLY": frames.reply(1, META, end=False),
    "REPLY END": frames.reply(1, {}, end=True),
    "FAULT": frames.fault(1, "unavailable", "not now"),
    "CANCEL": frames.frame(FrameType.CANCEL, 1, b""),
    "WINDOW": frames.window(1, 65536),
    "PING": frames.frame(FrameType.PING, 0, b"8 bytes."),
    "PONG": frames.frame(FrameType.PONG, 0, b"8 bytes."),
    "GOAWAY": frames.go_away("closing"),
}


def read(*chunks: bytes) -> list[tuple[FrameType, bool, int, bytes]]:
    """All frames of a stream, put together again."""
    reader = FrameReader(MAX_FRAME)
    found: list[tuple[FrameType, bool, int, bytes]] = []
    left = 0
    for chunk in chunks:
        for item in reader.receive(memoryview(chunk)):
            match item:
                case Control(header, payload):
                    assert header.length == len(payload)
                    found.append((header.type, header.end, header.call, payload))
                case Header(kind, end, call, left):
                    found.append((kind, end, call, b""))
                case Piece(data, last):
                    left -= len(data)
                    assert len(data) > 0
                    assert last is (left == 0)
                    kind, end, call, before = found.pop()
                    found.append((kind, end, call, before + bytes(data)))
    assert not reader.mid_frame
    assert reader.frames == len(found)
    return found


def expected(raw: bytes) -> tuple[FrameType, bool, int, bytes]:
    kind, flags, _, call, _ = HEADER.unpack(raw[:12])
    return FrameType(kind), flags == 1, call, raw[12:]


@pytest.mark.parametrize("name", FRAMES)
def test_whole(name: str) -> None:
    assert read(FRAMES[name]) == [expected(FRAMES[name])]


@pytest.mark.parametrize("name", FRAMES)
def test_byte_by_byte(name: str) -> None:
    raw = FRAMES[name]
    assert read(*(raw[i : i + 1] for i in range(len(raw)))) == [expected(raw)]


@pytest.mark.parametrize("name", FRAMES)
def test_with_data_behind_it(name: str) -> None:
    ping = FRAMES["PING"]
    assert read(FRAMES[name] + ping[:5], ping[5:]) == [expected(FRAMES[name]), expected(ping)]


@pytest.mark.parametrize("name", FRAMES)
def test_cut_short_is_mid_frame(name: str) -> None:
    for size in (1, 11, 12, len(FRAMES[name]) - 1):
        reader = FrameReader(MAX_FRAME)
        if size >= len(FRAMES[name]):
            continue
        list(reader.receive(memoryview(FRAMES[name][:size])))
        assert reader.mid_frame


@given(st.lists(st.sampled_from(sorted(FRAMES)), max_size=12), st.lists(st.integers(0, 10_000), max_size=12))
def test_any_split_of_any_frames(names: list[str], cuts: list[int]) -> None:
    stream = b"".join(FRAMES[name] for name in names)
    edges = [0, *sorted(cut % (len(stream) + 1) for cut in cuts), len(stream)]
    chunks = [stream[a:b] for a, b in pairwise(edges)]
    assert read(*chunks) == [expected(FRAMES[name]) for name in names]


def test_data_is_handed_over_as_it_comes_and_without_a_copy() -> None:
    reader = FrameReader(MAX_FRAME)
    first = frames.header(FrameType.DATA, 7, 100, end=True) + b"abc"
    head, piece = reader.receive(memoryview(first))
    assert head == Header(FrameType.DATA, True, 7, 100)
    assert isinstance(piece, Piece)
    assert bytes(piece.data) == b"abc"
    second = bytes(96)
    (piece,) = reader.receive(memoryview(second))
    assert isinstance(piece, Piece)
    assert piece.data.obj is second
    assert not piece.last
    (piece,) = reader.receive(memoryview(b"z"))
    assert isinstance(piece, Piece)
    assert piece.last


def bad_header(kind: int, flags: int = 0, zero: int = 0, call: int = 0, length: int = 0) -> bytes:
    return HEADER.pack(kind, flags, zero, call, length)


@pytest.mark.parametrize(
    ("raw", "code"),
    [
        pytest.param(bad_header(10), "bad_header", id="unknown type"),
        pytest.param(bad_header(255, 255, 65535, 2**32 - 1, 2**32 - 1), "bad_header", id="all ones"),
        pytest.param(bad_header(2, 2, 0, 1, 5), "bad_header", id="flag bit 1"),
        pytest.param(bad_header(2, 0x81, 0, 1, 5), "bad_header", id="flag bit 7"),
        pytest.param(bad_header(2, 0, 1, 1, 5), "bad_header", id="reserved bytes"),
        *(
            pytest.param(bad_header(kind, 1, 0, call, length), "bad_header", id=f"END on {kind.name}")
            for kind, call, length in (
                (FrameType.HELLO, 0, 40),
                (FrameType.FAULT, 1, 40),
                (FrameType.CANCEL, 1, 0),
                (FrameType.WINDOW, 1, 4),
                (FrameType.PING, 0, 8),
                (FrameType.PONG, 0, 8),
                (FrameType.GOAWAY, 0, 8),
            )
        ),
        pytest.param(bad_header(0, 0, 0, 1, 40), "bad_header", id="HELLO with a call"),
        pytest.param(bad_header(7, 0, 0, 1, 8), "bad_header", id="PING with a call"),
        pytest.param(bad_header(1, 0, 0, 0, 40), "bad_header", id="CALL 0"),
        pytest.param(bad_header(2, 0, 0, 0, 40), "bad_header", id="DATA of call 0"),
        pytest.param(bad_header(2, 0, 0, 1, 0), "bad_header", id="empty DATA without END"),
        pytest.param(bad_header(1, 0, 0, 1, 0), "bad_header", id="empty CALL"),
        pytest.param(bad_header(6, 0, 0, 1, 3), "bad_header", id="short WINDOW"),
        pytest.param(bad_header(7, 0, 0, 0, 7), "bad_header", id="short PING"),
        pytest.param(bad_header(6, 0, 0, 1, 5), "oversized_frame", id="long WINDOW"),
        pytest.param(bad_header(7, 0, 0, 0, 9), "oversized_frame", id="long PING"),
        pytest.param(bad_header(5, 0, 0, 1, 1), "oversized_frame", id="CANCEL with payload"),
        pytest.param(bad_header(1, 0, 0, 1, MAX_CONTROL + 1), "oversized_frame", id="long CALL"),
        pytest.param(bad_header(2, 0, 0, 1, MAX_FRAME + 1), "oversized_frame", id="DATA above max_frame"),
        pytest.param(bad_header(2, 0, 0, 1, 2**32 - 1), "oversized_frame", id="DATA of 4 GiB"),
    ],
)
def test_headers_refused(raw: bytes, code: str) -> None:
    for chunks in ([raw], [raw[i : i + 1] for i in range(12)]):
        reader = FrameReader(MAX_FRAME)
        with pytest.raises(RemoteProtocolError) as caught:
            for chunk in chunks:
                list(reader.receive(memoryview(chunk)))
        assert caught.value.code == code


def test_control_payloads_round_trip() -> None:
    assert frames.parse_hello(FRAMES["HELLO"][12:]) == (262_144, 1_048_576, 1_024)
    assert frames.parse_call(FRAMES["CALL"][12:]) == ("model.file", 5000, META)
    assert frames.parse_reply(FRAMES["REPLY"][12:]) == META
    assert frames.parse_fault(FRAMES["FAULT"][12:]) == ("unavailable", "not now")
    assert frames.parse_go_away(FRAMES["GOAWAY"][12:]) == "closing"


def call_payload(**changes: object) -> bytes:
    return cbor2.dumps({"method": "m", "deadline_ms": 0, "meta": {}} | changes, canonical=True)


HELLO = {"v": 1, "max_frame": 4096, "window": 4096, "max_calls": 1}


@pytest.mark.parametrize(
    "payload",
    [
        pytest.param(b"\xff", id="no CBOR"),
        pytest.param(b"\x00", id="no map"),
        pytest.param(b"\xa0", id="empty map"),
        pytest.param(call_payload(more=1), id="unknown key"),
        pytest.param(call_payload() + b"\x00", id="bytes behind"),
        pytest.param(call_payload()[:-1], id="cut short"),
        pytest.param(call_payload(method=""), id="empty method"),
        pytest.param(call_payload(method="M"), id="capital method"),
        pytest.param(call_payload(method="m\n"), id="newline in method"),
        pytest.param(call_payload(method="m" * 65), id="long method"),
        pytest.param(call_payload(method=b"m"), id="method of bytes"),
        pytest.param(call_payload(deadline_ms=-1), id="negative deadline"),
        pytest.param(call_payload(deadline_ms=2**32), id="huge deadline"),
        pytest.param(call_payload(deadline_ms=True), id="boolean deadline"),
        pytest.param(call_payload(deadline_ms=1.0), id="float deadline"),
        pytest.param(call_payload(meta=[]), id="meta no map"),
        pytest.param(call_payload(meta={1: 2}), id="meta with integer key"),
        pytest.param(call_payload(meta={b"a": 2}), id="meta with bytes key"),
        pytest.param(call_payload(meta={"x": 1.5}), id="float in meta"),
        pytest.param(call_payload(meta={"x": cbor2.undefined}), id="undefined in meta"),
        pytest.param(call_payload(meta={"x": cbor2.CBORSimpleValue(7)}), id="simple value in meta"),
        pytest.param(call_payload(meta={"x": cbor2.CBORTag(35, "(a+)+$")}), id="regular expression in meta"),
        pytest.param(call_payload(meta={"x": cbor2.CBORTag(1, 0)}), id="date in meta"),
        pytest.param(call_payload(meta={"x": 2**64}), id="bignum in meta"),
        pytest.param(call_payload(meta={"x": cbor2.CBORTag(2, b"\x01")}), id="small bignum in meta"),
        pytest.param(call_payload(meta={"x": cbor2.CBORTag(55799, 1)}), id="self-described in meta"),
        pytest.param(call_payload(meta={"x": cbor2.CBORTag(28, [])}), id="shared value in meta"),
        pytest.param(call_payload(meta={"x": [[[[[[[1]]]]]]]}), id="too deep"),
        pytest.param(cbor2.dumps({"method": "m", "meta": {}, "deadline_ms": 0}), id="keys out of order"),
        pytest.param(call_payload().replace(b"deadline_ms\x00", b"deadline_ms\x18\x00"), id="long integer"),
        pytest.param(b"\xbf" + call_payload()[1:] + b"\xff", id="indefinite length"),
        pytest.param(b"\xa4" + call_payload()[1:] + cbor2.dumps("meta") + b"\xa0", id="duplicate key"),
    ],
)
def test_call_payloads_refused(payload: bytes) -> None:
    with pytest.raises(RemoteProtocolError) as caught:
        frames.parse_call(payload)
    assert caught.value.code == "malformed_payload"


def test_a_meta_of_the_greatest_depth_passes() -> None:
    meta = {"x": [[[[[[1]]]]]]}
    assert frames.parse_call(call_payload(meta=meta)).meta == meta


@pytest.mark.parametrize(
    "changes",
    [
        *({"v": 2}, {"v": 0}, {"max_frame": 4095}, {"max_frame": 1_048_577}, {"window": 4095}, {"window": 16_777_217}),
        *({"max_calls": 0}, {"max_calls": 65_537}, {"max_calls": "1"}, {"x": 1}),
    ],
    ids=str,
)
def test_hello_refused(changes: dict[str, object]) -> None:
    assert frames.parse_hello(cbor2.dumps(HELLO, canonical=True)) == (4096, 4096, 1)
    with pytest.raises(RemoteProtocolError):
        frames.parse_hello(cbor2.dumps(HELLO | changes, canonical=True))


@pytest.mark.parametrize(
    "fault",
    [
        *({"code": "Bad", "message": ""}, {"code": "", "message": ""}, {"code": "a" * 65, "message": ""}),
        *({"code": "a", "message": "m" * (MAX_MESSAGE + 1)}, {"code": "a", "message": 1}, {"code": "a"}),
    ],
    ids=lambda fault: str(fault)[:40],
)
def test_fault_refused(fault: dict[str, object]) -> None:
    with pytest.raises(RemoteProtocolError):
        frames.parse_fault(cbor2.dumps(fault, canonical=True))


@pytest.mark.parametrize("grant", [0, 16_777_217, 2**32 - 1])
def test_window_refused(grant: int) -> None:
    with pytest.raises(RemoteProtocolError):
        frames.parse_window(grant.to_bytes(4, "big"))


@given(st.binary(max_size=200))
def test_any_payload_is_read_or_refused(payload: bytes) -> None:
    for parse in (
        frames.parse_hello,
        frames.parse_call,
        frames.parse_reply,
        frames.parse_fault,
        frames.parse_go_away,
    ):
        try:
            parse(payload)
        except RemoteProtocolError:
            continue


@pytest.mark.parametrize(
    "meta",
    [{"x": 1.5}, {"x": object()}, {"x": (1, 2)}, {"x": "\ud800"}, {"x": 2**64}, {1: 1}, {"x": bytes(MAX_CONTROL)}],
    ids=lambda meta: str(meta).partition(" at 0x")[0][:30],
)
def test_what_the_wire_has_no_form_for_is_a_local_error(meta: dict[str, object]) -> None:
    with pytest.raises(LocalProtocolError):
        frames.call(1, "m", 0, meta, end=False)


def test_a_long_or_odd_fault_message_is_made_to_fit() -> None:
    raw = frames.fault(1, "internal", "\ud800" + "m" * 5000)
    assert frames.parse_fault(raw[12:]) == ("internal", "?" + "m" * (MAX_MESSAGE - 1))


@pytest.mark.parametrize("code", ["", "Bad", "a-b", "a" * 65])
def test_codes_without_a_form(code: str) -> None:
    with pytest.raises(LocalProtocolError):
        frames.fault(1, code, "")
    with pytest.raises(LocalProtocolError):
        frames.go_away(code)
