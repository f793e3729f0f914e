"""Condition operators, held against what the IAM User Guide says of each."""

from __future__ import annotations

import re
from fnmatch import translate

import pytest
from hypothesis import given
from hypothesis import strategies as st

from attestation.keypolicy.conditions import (
    Clause,
    Operator,
    Quantifier,
    Truth,
    all_of,
    any_of,
    evaluate,
    matches,
    values_of,
)
from attestation.keypolicy.document import Condition, KeyPolicyError

YES, NO, UNDECIDED = Truth.YES, Truth.NO, Truth.UNDECIDED
POSITIVE = {
    "StringEquals": ("a", "a", "b"),
    "StringEqualsIgnoreCase": ("aB", "Ab", "b"),
    "StringLike": ("a*", "abc", "ba"),
    "NumericEquals": ("10", "10.0", "11"),
    "NumericLessThan": ("10", "9", "10"),
    "NumericLessThanEquals": ("10", "10", "10.5"),
    "NumericGreaterThan": ("10", "11", "10"),
    "NumericGreaterThanEquals": ("-10", "-10", "-11"),
    "DateEquals": ("2020-01-01T00:00:01Z", "2020-01-01T01:00:01+01:00", "2020-01-01T00:00:02Z"),
    "DateLessThan": ("2020-01-01T00:00:01Z", "2020-01-01", "2020-01-01T00:00:01Z"),
    "DateLessThanEquals": ("2020-01-01T00:00Z", "1577836800", "2020-01-01T00:00:00.5Z"),
    "DateGreaterThan": ("2020-01", "2020-01-01T00:00:01Z", "2019-12-31T23:59:59Z"),
    "DateGreaterThanEquals": ("1577836800", "2020-01-01", "2019-12-31"),
    "Bool": ("true", "true", "false"),
    "BinaryEquals": ("QmluYXJ5", "QmluYXJ5", "YmluYXJ5"),
    "IpAddress": ("203.0.113.0/24", "203.0.113.255", "203.0.114.0"),
    "ArnEquals": ("arn:aws:sns:*:111122223333:t?pic", "arn:aws:sns:eu-west-1:111122223333:topic", "arn:aws:sns:::x"),
    "ArnLike": ("arn:aws:sns:*:111122223333:t?pic", "arn:aws:sns:eu-west-1:111122223333:topic", "arn:aws:sns:::x"),
}
"""Each operator: a value in the policy, one in a request that matches, and one that does not."""
NEGATED = {
    "StringNotEquals": "StringEquals",
    "StringNotEqualsIgnoreCase": "StringEqualsIgnoreCase",
    "StringNotLike": "StringLike",
    "NumericNotEquals": "NumericEquals",
    "DateNotEquals": "DateEquals",
    "NotIpAddress": "IpAddress",
    "ArnNotEquals": "ArnEquals",
    "ArnNotLike": "ArnLike",
}


def truth(operator: str, values: str | tuple[str, ...], *got: str, has_variables: bool = True) -> Truth:
    """Of a condition on the key ``k``, of which the request has ``got``."""
    condition = Condition(operator, "k", (values,) if isinstance(values, str) else values)
    return evaluate(condition, {"k": got} if got else {}, has_variables=has_variables).truth


@pytest.mark.parametrize("operator", POSITIVE)
def test_a_positive_operator(operator: str) -> None:
    value, matching, other = POSITIVE[operator]
    assert truth(operator, value, matching) is YES
    assert truth(operator, value, other) is NO
    assert truth(operator, value) is NO, "a key that is not there does not match"
    assert truth(f"{operator}IfExists", value, matching) is YES
    assert truth(f"{operator}IfExists", value, other) is NO
    assert truth(f"{operator}IfExists", value) is YES
    # Several values are alternatives.
    assert truth(operator, (value, value), other) is NO
    if operator != "Bool":
        assert truth(operator, ("arn:aws:x:::y" if "Arn" in operator else value, value), matching) is YES


@pytest.mark.parametrize("operator", NEGATED)
def test_a_negated_operator(operator: str) -> None:
    value, matching, other = POSITIVE[NEGATED[operator]]
    assert truth(operator, value, matching) is NO
    assert truth(operator, value, other) is YES
    assert truth(operator, value) is YES, "a key that is not there is not what must not match"
    assert truth(f"{operator}IfExists", value) is YES
    assert truth(f"{operator}IfExists", value, matching) is NO


def test_the_values_of_a_negated_operator_are_not_one_and_not_the_other() -> None:
    assert truth("StringNotEquals", ("a", "b"), "a") is NO
    assert truth("StringNotEquals", ("a", "b"), "b") is NO
    assert truth("StringNotEquals", ("a", "b"), "c") is YES


@pytest.mark.parametrize("operator", [*POSITIVE, *NEGATED])
def test_all_and_any_of_several_values(operator: str) -> None:
    value, matching, other = POSITIVE[NEGATED.get(operator, operator)]
    if operator in NEGATED:
        matching, other = other, matching
    for_all, for_any = f"ForAllValues:{operator}", f"ForAnyValue:{operator}"
    assert truth(for_all, value, matching, matching) is YES
    assert truth(for_all, value, matching, other) is NO
    assert truth(for_any, value, matching, other) is YES
    assert truth(for_any, value, other, other) is NO
    # The trap: true of a key that the request does not have, or that has no value.
    assert truth(for_all, value) is YES
    assert truth(for_any, value) is NO
    assert truth(for_all, value, "") is YES
    assert truth(for_any, value, "") is NO
    assert truth(f"{for_any}IfExists", value) is YES


def test_several_values_need_a_set_operator() -> None:
    assert truth("StringEquals", "a", "a", "a") is UNDECIDED
    assert truth("StringNotEquals", "b", "a", "c") is UNDECIDED


@pytest.mark.parametrize(
    ("value", "got", "expected"),
    [
        ("true", (), YES),
        ("true", ("x",), NO),
        ("false", (), NO),
        ("false", ("x",), YES),
        ("false", ("x", "y"), YES),
        ("False", ("x",), YES),
        ("no", (), UNDECIDED),
    ],
)
def test_null_asks_whether_a_key_is_missing(value: str, got: tuple[str, ...], expected: Truth) -> None:
    assert truth("Null", value, *got) is expected


def test_null_of_both_is_always_true() -> None:
    assert truth("Null", ("true", "false")) is truth("Null", ("true", "false"), "x") is YES


@pytest.mark.parametrize(
    "operator",
    [
        "NullIfExists",
        "ForAllValues:Null",
        "StringEqual",
        "stringequals",
        "StringEqualsIfExistsIfExists",
        "StringEqualsifexists",
        "IfExists",
        "",
        ":StringEquals",
        "ForAll:StringEquals",
        "ForAllValues:ForAnyValue:StringEquals",
        "BinaryNotEquals",
        "NumericNotLessThan",
    ],
)
def test_an_unknown_operator_is_an_error_and_nothing_that_holds_or_not(operator: str) -> None:
    with pytest.raises(KeyPolicyError) as refused:
        Operator.parse(operator)
    assert refused.value.code == "unknown_operator"
    assert truth(operator, "a", "a") is truth(operator, "a") is UNDECIDED


def test_an_operator_is_taken_apart() -> None:
    assert Operator.parse("ForAnyValue:StringNotEqualsIfExists") == Operator(
        "StringEquals", is_negated=True, if_exists=True, quantifier=Quantifier.FOR_ANY_VALUE
    )
    assert Operator.parse("Null") == Operator("Null")


@pytest.mark.parametrize(
    ("operator", "value", "got"),
    [
        ("NumericEquals", "ten", "10"),
        ("NumericEquals", "10", "ten"),
        ("NumericNotEquals", "10", "NaN"),
        ("NumericLessThan", "1e3", "10"),
        ("NumericEquals", "1" * 33, "10"),
        ("DateLessThan", "yesterday", "2020-01-01"),
        ("DateLessThan", "2020", "2019-01-01"),
        ("DateLessThan", "2020-13", "2019-01-01"),
        ("DateLessThan", "2020-02-30", "2019-01-01"),
        ("DateLessThan", "2020-01-01T00:00", "2019-01-01"),
        ("DateLessThan", "2020-01-01T00:00+99:99", "2019-01-01"),
        ("Bool", "yes", "true"),
        ("Bool", "true", "1"),
        ("BinaryEquals", "no base64!", "AAAA"),
        ("BinaryEquals", "é", "AAAA"),
        ("BinaryEquals", "A", "AAAA"),
        ("IpAddress", "anywhere", "203.0.113.1"),
        ("IpAddress", "203.0.113.0/255.255.255.0", "203.0.113.1"),
        ("IpAddress", "203.0.113.0/33", "203.0.113.1"),
        ("NotIpAddress", "203.0.113.0/24", "fe80::1%eth0"),
        ("ArnLike", "*", "arn:aws:sns:eu-west-1:111122223333:topic"),
        ("ArnNotLike", "arn:aws:sns:*", "arn:aws:sns:eu-west-1:111122223333:topic"),
        ("ArnLike", "arn:aws:sns:*:*:*", "topic"),
    ],
)
def test_a_value_that_is_none_of_the_operators_type_decides_nothing(operator: str, value: str, got: str) -> None:
    assert truth(operator, value, got) is UNDECIDED


def test_one_alternative_that_matches_outweighs_one_that_cannot_be_read() -> None:
    assert truth("NumericEquals", ("ten", "10"), "10") is YES
    assert truth("NumericNotEquals", ("ten", "10"), "10") is NO
    assert truth("NumericEquals", ("ten", "10"), "11") is UNDECIDED


@pytest.mark.parametrize(
    ("network", "address", "expected"),
    [
        ("2001:DB8:1234:5678::/64", "2001:db8:1234:5678::1", YES),
        ("2001:DB8:1234:5678::/64", "2001:db8:1234:5679::1", NO),
        ("203.0.113.7", "203.0.113.7", YES),
        ("203.0.113.7", "203.0.113.8", NO),
        ("203.0.113.7/24", "203.0.113.8", YES),
        ("0.0.0.0/0", "::1", NO),
        ("::/0", "203.0.113.8", NO),
    ],
)
def test_addresses(network: str, address: str, expected: Truth) -> None:
    assert truth("IpAddress", network, address) is expected
    assert truth("NotIpAddress", network, address) is ~expected


def test_the_parts_of_an_arn_are_matched_each_on_its_own() -> None:
    """AWS's own example: a string operator matches here, and an ARN operator does not."""
    pattern = "arn:aws:someservice:*:111122223333:finance/*"
    value = "arn:aws:someservice:us-east-2:999999999999:store/abc:111122223333:finance/document.txt"
    assert truth("StringLike", pattern, value) is YES
    assert truth("ArnLike", pattern, value) is NO
    assert truth("ArnLike", "arn:aws:s:::a:*", "arn:aws:s:::a:b:c") is YES


@pytest.mark.parametrize(
    ("operator", "value", "got"),
    [
        ("StringEquals", "A", "a"),
        ("StringEquals", "a*", "ab"),
        ("StringEquals", "a?", "ab"),
        ("StringEqualsIgnoreCase", "a*", "ab"),
        ("StringLike", "A*", "ab"),
        ("ArnEquals", "ARN:aws:s:::a", "arn:aws:s:::a"),
    ],
)
def test_case_counts_and_wildcards_are_for_like(operator: str, value: str, got: str) -> None:
    assert truth(operator, value, got) is NO


def test_keys_are_compared_without_regard_to_case() -> None:
    condition = Condition("StringEquals", "KMS:encryptioncontext:Purpose", ("model",))
    assert evaluate(condition, {"kms:EncryptionContext:purpose": ("model",)}).truth is YES
    assert values_of({"a": ("1",), "A": ("2",)}, "a") == ("1", "2")
    # So two keys that differ in case alone are one key of two values, which no operator for one value can judge.
    assert evaluate(
        condition, {"kms:EncryptionContext:purpose": ("model",), "kms:EncryptionContext:PURPOSE": ("x",)}
    ) == (
        Clause(
            "Condition",
            UNDECIDED,
            ("model",),
            ("model", "x"),
            operator="StringEquals",
            key="KMS:encryptioncontext:Purpose",
            remark="several values, which ask for ForAllValues or ForAnyValue",
        )
    )


def test_a_policy_variable_is_not_resolved() -> None:
    assert truth("StringEquals", "${aws:username}", "bob") is UNDECIDED
    assert truth("StringEquals", ("${aws:username}", "bob"), "bob") is UNDECIDED
    assert truth("StringEquals", "${aws:username}", "${aws:username}", has_variables=False) is YES
    assert truth("StringEquals", "${aws:username}") is NO


def test_a_clause_says_what_was_expected_and_got() -> None:
    condition = Condition("StringEquals", "k", ("a", "b"))
    assert str(evaluate(condition, {"k": ("c",)})) == "StringEquals k: expected 'a' or 'b'; got 'c'"
    assert str(evaluate(condition, {})) == (
        "StringEquals k: expected 'a' or 'b'; got nothing (the request has no such key)"
    )
    assert str(evaluate(Condition("Like", "k\x1b[2J", ("\x9b",)), {"k\x1b[2J": ("x", "y")})) == (
        "Like k\\x1b[2J: expected '\\x9b'; got 'x' and 'y' (IAM has no such condition operator)"
    )
    assert str(Clause("Action", NO, ("kms:*",), ("kms:Decrypt",))) == "Action: expected 'kms:*'; got 'kms:Decrypt'"


# Wildcards


@pytest.mark.parametrize(
    ("pattern", "text", "expected"),
    [
        ("", "", YES),
        ("", "a", NO),
        ("*", "", YES),
        ("**", "a\nb", YES),
        ("?", "", NO),
        ("?", "\n", YES),
        ("a*b*c", "abc", YES),
        ("a*b*c", "a-bb-c", YES),
        ("a*b*c", "a-c-b", NO),
        ("*ab", "aab", YES),
        ("*a?", "aaa", YES),
        ("a*a", "a", NO),
        ("[a]", "a", NO),
        ("a.c", "abc", NO),
        ("kms:Gen*", "kms:GenerateDataKey", YES),
    ],
)
def test_wildcards(pattern: str, text: str, expected: Truth) -> None:
    assert matches(pattern, text) is expected


@given(st.text("ab*?", max_size=12), st.text("ab", max_size=12))
def test_wildcards_are_a_shells(pattern: str, text: str) -> None:
    assert matches(pattern, text) is Truth.of(re.fullmatch(translate(pattern), text) is not None)


def test_many_asterisks_do_not_multiply_the_time() -> None:
    """Where backtracking multiplies, this runs for the age of the universe, and the test's own limit ends it."""
    assert matches("*a" * 1000 + "*b", "a" * 5000) is NO
    assert matches("*?" * 5000, "a" * 5000) is YES
    assert matches("*" + "a?" * 8000 + "*", "a" * 8192) is NO
    assert matches("*" * 32_768, "") is YES


# Three values


def test_doubt_stays_unless_something_else_decides() -> None:
    assert (any_of([]), all_of([])) == (NO, YES)
    assert (any_of([NO, UNDECIDED]), any_of([UNDECIDED, YES])) == (UNDECIDED, YES)
    assert (all_of([YES, UNDECIDED]), all_of([UNDECIDED, NO])) == (UNDECIDED, NO)
    assert [~each for each in (YES, NO, UNDECIDED)] == [NO, YES, UNDECIDED]


OPERATORS = st.builds(
    lambda before, name, behind: f"{before}{name}{behind}",
    st.sampled_from(["", "ForAllValues:", "ForAnyValue:"]),
    st.sampled_from([*POSITIVE, *NEGATED, "Null", "Unknown"]),
    st.sampled_from(["", "IfExists"]),
)
SAMPLES = st.one_of(
    st.text(max_size=10),
    st.sampled_from([value for values in POSITIVE.values() for value in values]),
    st.sampled_from(["0001-01-01T00:00+23:59", "9999-12-31T23:59-23:59", "99999999999", "1" * 32 + "." + "9" * 32]),
)


@given(OPERATORS, st.lists(SAMPLES, min_size=1, max_size=3), st.lists(SAMPLES, max_size=3))
def test_every_condition_has_an_answer(operator: str, values: list[str], got: list[str]) -> None:
    clause = evaluate(Condition(operator, "k", tuple(values)), {"k": tuple(got)})
    assert clause.truth in Truth
    assert str(clause).isprintable()


@given(OPERATORS, st.lists(SAMPLES, min_size=1, max_size=3), SAMPLES)
def test_more_alternatives_never_match_less(operator: str, values: list[str], got: str) -> None:
    try:
        is_negated = Operator.parse(operator).is_negated
    except KeyPolicyError:
        return
    fewer = evaluate(Condition(operator, "k", tuple(values[:1])), {"k": (got,)}).truth
    more = evaluate(Condition(operator, "k", tuple(values)), {"k": (got,)}).truth
    if "${" not in "".join(values):
        assert more is fewer or fewer is not (NO if is_negated else YES)
