"""The strict decoder: what it takes it reads as cbor2 does, and everything else is one typed error."""

from __future__ import annotations

import cbor2
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from attestation import cbor
from attestation.errors import EvidenceError

KEYS = st.integers(-(2**64), 2**64 - 1) | st.text(max_size=30)
VALUES: st.SearchStrategy[cbor.Value] = st.recursive(
    st.none() | st.integers(-(2**64), 2**64 - 1) | st.binary(max_size=300) | st.text(max_size=40),
    lambda inner: st.lists(inner, max_size=30) | st.dictionaries(KEYS, inner, max_size=30),
    max_leaves=20,
)


def _depth(value: object) -> int:
    if isinstance(value, list):
        return 1 + max(map(_depth, value), default=0)
    if isinstance(value, dict):
        return 1 + max(map(_depth, value.values()), default=0)
    return 0


@given(VALUES.filter(lambda value: _depth(value) <= cbor.MAX_DEPTH))
def test_what_cbor2_writes_is_read_back(value: cbor.Value) -> None:
    assert cbor.decode(cbor2.dumps(value)) == value


@given(VALUES.filter(lambda value: _depth(value) <= cbor.MAX_DEPTH), st.binary(max_size=1))
@example({10: 1, -1: 2, "aa": 3, "z": 4, 2**40: 5}, b"")
def test_deterministic_is_exactly_one_encoding(value: cbor.Value, behind: bytes) -> None:
    encoded = _deterministic(value)
    assert cbor.decode(encoded, deterministic=True) == value
    if behind:
        with pytest.raises(EvidenceError):
            cbor.decode(encoded + behind)


def _deterministic(value: cbor.Value) -> bytes:
    """RFC 8949 section 4.2.1, written down once more; cbor2's canonical order is that of RFC 7049."""
    if isinstance(value, list):
        return cbor2.dumps([None] * len(value))[: -len(value) or None] + b"".join(map(_deterministic, value))
    if isinstance(value, dict):
        entries = sorted((_deterministic(key), _deterministic(item)) for key, item in value.items())
        head = cbor2.dumps([None] * len(value))[: -len(value) or None]
        return bytes([head[0] | 0x20]) + head[1:] + b"".join(key + item for key, item in entries)
    return cbor2.dumps(value)


@given(st.binary(max_size=200), st.booleans(), st.booleans(), st.sampled_from([None, 18]))
def test_any_bytes_give_a_value_or_the_typed_error(
    data: bytes, deterministic: bool, indefinite: bool, tag: int | None
) -> None:
    try:
        value = cbor.decode(data, deterministic=deterministic, indefinite_top_map=indefinite, optional_tag=tag)
    except EvidenceError:
        return
    decoded = cbor2.loads(data)
    assert (decoded.value if isinstance(decoded, cbor2.CBORTag) else decoded) == value


@pytest.mark.parametrize(
    "data",
    [
        pytest.param(bytes.fromhex(text), id=name)
        for name, text in {
            "nothing": "",
            "head cut short": "19 01",
            "text cut short": "63 61 62",
            "text not UTF-8": "62 c3 28",
            "a length of 2**64-1": "5b ff ff ff ff ff ff ff ff",
            "an array of 2**64-1": "9b ff ff ff ff ff ff ff ff 00",
            "a map of 2**32": "ba ff ff ff ff 00 00",
            "map without its last value": "a1 01",
            "bytes of indefinite length": "5f 41 00 ff",
            "text of indefinite length": "7f 61 61 ff",
            "array of indefinite length": "9f ff",
            "map of indefinite length": "bf ff",
            "break alone": "ff",
            "reserved 28": "1c",
            "reserved 31 on an integer": "1f",
            "false": "f4",
            "true": "f5",
            "undefined": "f7",
            "null in two bytes": "f8 16",
            "half float": "f9 3c 00",
            "double": "fb 3f f0 00 00 00 00 00 00",
            "tag": "c0 61 61",
            "bignum": "c2 41 01",
            "map key of bytes": "a1 41 61 00",
            "map key null": "a1 f6 00",
            "map key of an array": "a1 80 00",
            "duplicate integer key": "a2 01 00 01 00",
            "duplicate key, differently written": "a2 01 00 18 01 00",
            "trailing": "00 00",
        }.items()
    ],
)
def test_is_refused(data: bytes) -> None:
    with pytest.raises(EvidenceError) as caught:
        cbor.decode(data)
    assert caught.value.code == "malformed_cbor"


@pytest.mark.parametrize(
    "text", ["18 17", "19 00 ff", "1a 00 00 ff ff", "1b 00 00 00 00 ff ff ff ff", "58 01 00", "98 00"]
)
def test_longer_than_needed_is_refused_where_deterministic(text: str) -> None:
    data = bytes.fromhex(text)
    cbor.decode(data)
    with pytest.raises(EvidenceError, match="shortest"):
        cbor.decode(data, deterministic=True)


@pytest.mark.parametrize("text", ["a2 02 00 01 00", "a2 61 62 00 61 61 00", "a2 61 61 00 01 00", "a2 20 00 01 00"])
def test_keys_out_of_order_are_refused_where_deterministic(text: str) -> None:
    data = bytes.fromhex(text)
    cbor.decode(data)
    with pytest.raises(EvidenceError, match="order"):
        cbor.decode(data, deterministic=True)


def test_an_indefinite_map_only_outermost_and_only_when_allowed() -> None:
    outermost, nested = bytes.fromhex("bf 01 02 ff"), bytes.fromhex("bf 01 bf ff ff")
    assert cbor.decode(outermost, indefinite_top_map=True) == {1: 2}
    assert cbor.decode(bytes.fromhex("a1 01 02"), indefinite_top_map=True) == {1: 2}
    for data, allowed in ((outermost, False), (nested, True), (outermost[:-1], True), (outermost + b"\xff", True)):
        with pytest.raises(EvidenceError):
            cbor.decode(data, indefinite_top_map=allowed)
    with pytest.raises(EvidenceError, match="duplicate"):
        cbor.decode(bytes.fromhex("bf 01 02 01 02 ff"), indefinite_top_map=True)


def test_the_optional_tag_once_and_outermost() -> None:
    for data in (b"\xd2\x80", b"\x80", b"\xd8\x12\x80"):
        assert cbor.decode(data, optional_tag=18) == []
    assert cbor.decode(b"\xd2\xbf\xff", optional_tag=18, indefinite_top_map=True) == {}
    assert cbor.decode(b"\xbf\xff", optional_tag=18, indefinite_top_map=True) == {}
    for data in (b"", b"\xd2\xd2\x80", b"\x81\xd2\x80", b"\xd1\x80", b"\xd8\x13\x80", b"\xdf\x80", b"\xd2", b"\xd8"):
        with pytest.raises(EvidenceError):
            cbor.decode(data, optional_tag=18)


def test_depth_is_bounded() -> None:
    assert cbor.decode(b"\x81" * 7 + b"\x80") == [[[[[[[[]]]]]]]]
    for data in (b"\x81" * 8 + b"\x80", b"\x81" * 100_000, b"\xa1\x00" * 100_000):
        with pytest.raises(EvidenceError, match="deeply"):
            cbor.decode(data)


@given(VALUES)
def test_what_is_shown_is_short_and_printable(value: cbor.Value) -> None:
    shown = cbor.shown(value)
    assert shown.isprintable()
    assert shown.isascii()
    assert len(shown) < 700


NAMES = {"number", "octets", "list", "map", "text"}
RECORD: dict[int | str, cbor.Value] = {"number": 5, "octets": b"abc", "list": [], "map": {}, "text": "a"}


def _record(value: cbor.Value) -> cbor.Record:
    return cbor.Record(value, "thing", required=NAMES, optional={"more"}, code="malformed_thing")


def test_a_record_gives_its_fields() -> None:
    record = _record(RECORD)
    assert record.integer("number", 5, 5) == 5
    assert record.octets("octets", 3, 3) == b"abc"
    assert record.array("list") == []
    assert record.map("map") == {}
    assert record.text("text", 1) == "a"
    assert record.optional_octets("more", 9) is None
    assert _record({**RECORD, "more": None}).optional_octets("more", 9) is None
    assert _record({**RECORD, "more": b""}).optional_octets("more", 9) == b""


@pytest.mark.parametrize(
    "value",
    [None, [], {}, {**RECORD, 1: 1}, {**RECORD, "other": 1}, {key: RECORD[key] for key in RECORD if key != "map"}],
)
def test_a_record_of_other_fields_is_refused(value: cbor.Value) -> None:
    with pytest.raises(EvidenceError) as caught:
        _record(value)
    assert caught.value.code == "malformed_thing"


@pytest.mark.parametrize(
    ("field", "value", "expected", "got"),
    [
        ("integer", "5", "an integer", "'5'"),
        ("integer", 8, "1 to 7", "8"),
        ("octets", "abc", "1 to 3 bytes", "'abc'"),
        ("octets", bytes(4), "1 to 3 bytes", "4 bytes"),
        ("octets", b"", "1 to 3 bytes", "0 bytes"),
        ("exactly", bytes(2), "3 bytes", "2 bytes"),
        ("array", {}, "an array", "map of 0"),
        ("map", [], "a map", "array of 0"),
        ("text", b"a", "a printable text of 1 to 3 characters", "h'61'"),
        ("text", "", "a printable text of 1 to 3 characters", "''"),
        ("text", "a\n", "a printable text of 1 to 3 characters", "'a\\n'"),
        ("literal", 2, "1", "2"),
        ("literal", None, "1", "null"),
    ],
)
def test_a_field_of_another_kind_is_refused(field: str, value: cbor.Value, expected: str, got: str) -> None:
    record = cbor.Record({field: value}, "thing", required={field}, code="malformed_thing")
    with pytest.raises(EvidenceError, match=f"thing, {field}") as caught:
        match field:
            case "integer":
                record.integer(field, 1, 7)
            case "octets":
                record.octets(field, 1, 3)
            case "exactly":
                record.octets(field, 3, 3)
            case "array":
                record.array(field)
            case "map":
                record.map(field)
            case "text":
                record.text(field, 3)
            case _:
                record.literal(field, 1)
    assert (caught.value.code, caught.value.expected, caught.value.got) == ("malformed_thing", expected, got)
