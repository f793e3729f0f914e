"""Tables are read by type, whole, and every error names its field."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from attestation import strict_toml
from attestation.errors import PolicyError
from attestation.strict_toml import MAX_TEXT, Table


def table(value: object) -> Table:
    return Table("above", {"key": value})


def refused(take: Callable[[], object]) -> PolicyError:
    with pytest.raises(PolicyError) as caught:
        take()
    return caught.value


def test_fields_of_the_right_type_are_taken() -> None:
    whole = Table(
        "",
        {
            "table": {"a": 1},
            "tables": [{}],
            "integer": -(2**63),
            "true": True,
            "no": False,
            "text": "x" * MAX_TEXT,
            "hex": "0aFF",
        },
    )
    assert whole.table("table").integer("a") == 1
    assert len(whole.tables("tables")) == 1
    assert whole.integer("integer") == -(2**63)
    whole.true("true")
    assert whole.flag("true") is True
    assert whole.flag("no") is False
    assert whole.text("text") == "x" * MAX_TEXT
    assert whole.hexadecimal("hex", 2) == b"\x0a\xff"
    assert list(whole) == ["table", "tables", "integer", "true", "no", "text", "hex"]
    whole.finish()
    assert table(["one", "two"]).texts("key") == [("above.key[0]", "one"), ("above.key[1]", "two")]
    assert table(2**63 - 1).integer("key") == 2**63 - 1


@pytest.mark.parametrize(
    ("take", "wrong"),
    [
        (Table.table, [None, 1, [], "text"]),
        (Table.tables, [{}, [1], "text"]),
        (Table.integer, [True, 1.0, "1", 2**63, -(2**63) - 1]),
        (Table.true, [False, 1, "true"]),
        (Table.flag, [0, 1, "true", []]),
        (Table.text, [1, "", "  ", "two\nlines", "\x1b[2J", "x" * (MAX_TEXT + 1)]),
        (lambda each, key: each.hexadecimal(key, 2), [b"\x00\x00", "00", "00000", "0x00", "zzzz", "00 0"]),
        (Table.texts, ["text", {}, [1], [""]]),
    ],
)
def test_anything_else_is_refused_with_its_field(take: Callable[[Table, str], object], wrong: list[object]) -> None:
    for value in wrong:
        error = refused(lambda value=value: take(table(value), "key"))  # type: ignore[misc]
        assert error.code == "wrong_value", value
        assert (error.field or "").startswith("above.key"), value
    assert (missing := refused(lambda: take(Table("above", {}), "key"))).code == "missing_field"
    assert missing.field == "above.key"


@pytest.mark.parametrize(
    ("there", "key", "got"),
    [
        ("max_age_second", "max_age_seconds", "max_age_second (a slip?)"),
        ("Max_age_seconds", "max_age_seconds", "Max_age_seconds (a slip?)"),
        ("max_age_secönds", "max_age_seconds", "max_age_sec\\xf6nds (a slip?)"),
        ("something", "max_age_seconds", "none"),
        ("pcr1", "pcr2", "none"),
        ("a" * 100, "a", "none"),
    ],
)
def test_a_slip_is_named_with_what_is_missing(there: str, key: str, got: str) -> None:
    for take in (Table.integer, Table.table, Table.tables, Table.one_of):
        error = refused(lambda take=take: take(Table("", {there: 1}), key))  # type: ignore[misc]
        assert (error.code, error.expected, error.got) == ("missing_field", key, got)


def test_a_field_that_was_asked_for_is_no_slip() -> None:
    fields = Table("", {"root_sha25": 1})
    assert fields.integer("root_sha25") == 1
    assert refused(lambda: fields.text("root_sha25x")).got == "none"


def test_a_missing_table_is_named_as_it_is_written() -> None:
    assert "add [above.key]" in refused(lambda: Table("above", {}).table("key")).message
    assert "add [[key]]" in refused(lambda: Table("", {}).tables("key")).message


def test_what_is_unknown_empty_or_contradictory_is_refused() -> None:
    unknown = refused(Table("", {"a\nb": 1}).finish)
    assert (unknown.code, unknown.field) == ("unknown_field", "a\\nb")
    assert refused(lambda: table([]).texts("key")).code == "empty_list"
    both = Table("above", {"forbid": True, "ignore": "x"})
    assert refused(lambda: both.one_of("forbid", "ignore", "require")).code == "contradiction"
    assert refused(lambda: table(1).one_of("forbid", "ignore")).code == "missing_field"
    assert both.one_of("forbid", "require") == "forbid"
    assert (both.has("forbid"), both.has("require")) == (True, False)


@pytest.mark.parametrize(
    "text",
    [
        "a" + ".a" * 17 + " = 1",
        "[a" + ".a" * 17 + "]",
        "x = {a" + ".a" * 17 + " = 1}",
        '"a b"' + '."a b"' * 17 + " = 1",
        "a = " + "[" * 5000,
        "a = " + "9" * 5000,
        "a = 1\na = 2",
        "a = ",
    ],
    ids=["dotted", "table", "inline", "quoted", "nested", "digits", "twice", "nothing"],
)
def test_what_is_not_read(text: str) -> None:
    with pytest.raises(PolicyError) as caught:
        strict_toml.read(text)
    assert caught.value.code == "malformed_policy"


@pytest.mark.parametrize(
    "text",
    [
        "a" + ".a" * 16 + " = 1",
        f'a = "{"." * 99}"',
        f"a = '{'.' * 99}'",
        f"a = 1 # {'.' * 99}",
        rf'a = "\"{"." * 99}"',
        'a = ["1.1", "2.2"]\n',
    ],
)
def test_dots_elsewhere_are_no_keys(text: str) -> None:
    assert strict_toml.read(text).has("a")
