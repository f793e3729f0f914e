"""One condition of a statement held against a request, as IAM evaluates it.

Source: IAM User Guide, "IAM JSON policy elements: Condition operators" (each operator, IfExists, Null), "Conditions
with multiple context keys or values" (alternatives are OR-ed, behind a negated operator NOR-ed; operators and keys are
AND-ed) and "Single-valued vs. multivalued context keys" (ForAllValues, ForAnyValue).

Three things can come out. What AWS does not document, or what nobody here can know (an operator that IAM does not have,
a value that is none of the operator's type, a policy variable) is UNDECIDED and stays so through every AND, OR and NOT:
no Allow applies for it, and every Deny does.
"""

from __future__ import annotations

import base64
import binascii
import ipaddress
import operator
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from decimal import Decimal
from enum import Enum
from typing import Any, Final, TypeAlias

from attestation.keypolicy.document import Condition, KeyPolicyError

Context: TypeAlias = Mapping[str, tuple[str, ...]]
"""The condition keys of a request, each with all of its values. Keys are compared without regard to case."""


class Truth(Enum):
    """Whether something holds, if anybody can say. ``~`` is NOT, and leaves a doubt a doubt."""

    YES = "yes"
    NO = "no"
    UNDECIDED = "undecided"

    @classmethod
    def of(cls, fact: bool) -> Truth:
        return cls.YES if fact else cls.NO

    def __invert__(self) -> Truth:
        return {Truth.YES: Truth.NO, Truth.NO: Truth.YES}.get(self, self)


def any_of(truths: Iterable[Truth]) -> Truth:
    """Kleene's OR: one YES is enough, and without one a doubt remains a doubt."""
    found = set(truths)
    return next((truth for truth in (Truth.YES, Truth.UNDECIDED) if truth in found), Truth.NO)


def all_of(truths: Iterable[Truth]) -> Truth:
    """Kleene's AND."""
    return ~any_of(~truth for truth in truths)


@dataclass(frozen=True, slots=True)
class Clause:
    """One part of a statement or a grant, and whether it holds for a request."""

    element: str
    """``Principal``, ``Action``, ``Condition`` and so on."""
    truth: Truth
    """Whether it holds."""
    expected: tuple[str, ...]
    """The alternatives, as written."""
    got: tuple[str, ...] | None
    """What the request has; None where it has nothing of the kind."""
    operator: str | None = None
    key: str | None = None
    """Of a condition, as is its ``operator``; None for other parts."""
    remark: str | None = None
    """What expected and got do not show."""

    def __str__(self) -> str:
        name = " ".join(part for part in (self.operator, self.key) if part is not None) or self.element
        expected = " or ".join(map(_quoted, self.expected))
        got = "nothing" if self.got is None else " and ".join(map(_quoted, self.got))
        remark = "" if self.remark is None else f" ({self.remark})"
        return f"{_printable(name)}: expected {expected}; got {got}{remark}"


def _printable(text: str) -> str:
    """No policy moves a terminal's cursor."""
    return ascii(text)[1:-1]


def _quoted(text: str) -> str:
    return f"'{_printable(text)}'"


def matches(pattern: str, text: str) -> Truth:
    """``*`` stands for any characters, none included, and ``?`` for exactly one."""
    parts = ["".join("." if each == "?" else re.escape(each) for each in part) for part in re.split(r"\*+", pattern)]
    if len(parts) > 1:
        first, *inner, last = parts
        # Atomic, as the leftmost place for each part is as good as any: many asterisks do not multiply the time.
        parts = [first, *(f"(?>.*?{part})" for part in inner), f".*{last}"]
    return Truth.of(re.fullmatch("".join(parts), text, re.DOTALL) is not None)


def arn_matches(pattern: str, arn: str) -> Truth:
    """Each of the six parts between colons on its own; the sixth may have colons itself."""
    patterns, parts = pattern.split(":", 5), arn.split(":", 5)
    if len(patterns) < 6 or len(parts) < 6:
        return Truth.UNDECIDED
    return all_of(map(matches, patterns, parts))


def _equals(expected: str, got: str) -> Truth:
    return Truth.of(expected == got)


def _equals_ignoring_case(expected: str, got: str) -> Truth:
    return Truth.of(expected.lower() == got.lower())


_NUMBER: Final = re.compile(r"[+-]?[0-9]{1,32}(?:\.[0-9]{1,32})?")
_DATE: Final = re.compile(
    r"(?P<month>[0-9]{4}-[0-9]{2})"
    r"(?P<day>-[0-9]{2}(?:T[0-9]{2}:[0-9]{2}(?::[0-9]{2}(?:\.[0-9]{1,6})?)?(?:Z|[+-][0-9]{2}:[0-9]{2}))?)?"
)
_EPOCH: Final = re.compile(r"[0-9]{5,11}")
_BOOLEAN: Final = {"true": True, "false": False}
_NETWORK: Final = re.compile(r"[0-9A-Fa-f.:]{2,45}(?:/[0-9]{1,3})?")


def _number(text: str) -> Decimal:
    if not _NUMBER.fullmatch(text):
        raise ValueError("no number")
    return Decimal(text)


def _time(text: str) -> datetime:
    """A W3C profile of ISO 8601, or seconds since 1970. Four digits alone could be either, and are refused."""
    if _EPOCH.fullmatch(text):
        return datetime.fromtimestamp(int(text), UTC)
    found = _DATE.fullmatch(text)
    if not found:
        raise ValueError("no time")
    time = datetime.fromisoformat(found["month"] + (found["day"] or "-01"))
    return time if time.tzinfo is not None else time.replace(tzinfo=UTC)


def _boolean(text: str) -> bool:
    try:
        return _BOOLEAN[text.lower()]
    except KeyError:
        raise ValueError("neither true nor false") from None


def _binary(text: str) -> bytes:
    try:
        return base64.b64decode(text.encode("ascii", "replace"), validate=True)
    except binascii.Error:
        raise ValueError("no base64") from None


def _network(text: str) -> ipaddress.IPv4Network | ipaddress.IPv6Network:
    if not _NETWORK.fullmatch(text):
        raise ValueError("no address in CIDR notation")
    return ipaddress.ip_network(text, strict=False)


def _compared(read: Callable[[str], Any], compare: Callable[[Any, Any], bool]) -> Callable[[str, str], Truth]:
    """Compares what both texts mean: ``compare(of the request, of the policy)``."""

    def comparison(expected: str, got: str) -> Truth:
        try:
            return Truth.of(compare(read(got), read(expected)))
        except ValueError:
            return Truth.UNDECIDED

    return comparison


def _is_within(address: Any, network: Any) -> bool:
    return address.version == network.version and bool(address.subnet_of(network))


class Quantifier(Enum):
    """How the several values of a multivalued key are asked."""

    FOR_ALL_VALUES = "ForAllValues"
    """Every value matches; so it is true of a key that the request does not have."""
    FOR_ANY_VALUE = "ForAnyValue"


_POSITIVE: Final[Mapping[str, Callable[[str, str], Truth]]] = {
    "StringEquals": _equals,
    "StringEqualsIgnoreCase": _equals_ignoring_case,
    "StringLike": matches,
    "NumericEquals": _compared(_number, operator.eq),
    "NumericLessThan": _compared(_number, operator.lt),
    "NumericLessThanEquals": _compared(_number, operator.le),
    "NumericGreaterThan": _compared(_number, operator.gt),
    "NumericGreaterThanEquals": _compared(_number, operator.ge),
    "DateEquals": _compared(_time, operator.eq),
    "DateLessThan": _compared(_time, operator.lt),
    "DateLessThanEquals": _compared(_time, operator.le),
    "DateGreaterThan": _compared(_time, operator.gt),
    "DateGreaterThanEquals": _compared(_time, operator.ge),
    "Bool": _compared(_boolean, operator.eq),
    "BinaryEquals": _compared(_binary, operator.eq),
    "IpAddress": _compared(_network, _is_within),
    "ArnEquals": arn_matches,  # the same as ArnLike, wildcards included
    "ArnLike": arn_matches,
}
_NEGATED: Final[Mapping[str, str]] = {
    "StringNotEquals": "StringEquals",
    "StringNotEqualsIgnoreCase": "StringEqualsIgnoreCase",
    "StringNotLike": "StringLike",
    "NumericNotEquals": "NumericEquals",
    "DateNotEquals": "DateEquals",
    "NotIpAddress": "IpAddress",
    "ArnNotEquals": "ArnEquals",
    "ArnNotLike": "ArnLike",
}
_NULL: Final = "Null"


@dataclass(frozen=True, slots=True)
class Operator:
    """A condition operator, taken apart."""

    compares: str
    """The operator without quantifier, IfExists and negation: ``StringEquals`` for ``StringNotEqualsIfExists``."""
    is_negated: bool = False
    """It holds for a value that equals none of the alternatives."""
    if_exists: bool = False
    """It holds also for a request that does not have the key: ``IfExists``."""
    quantifier: Quantifier | None = None
    """Of a multivalued key; None for a key of one value."""

    @classmethod
    def parse(cls, text: str) -> Operator:
        """Raises KeyPolicyError with ``unknown_operator``."""
        before, name = text.rsplit(":", 1) if ":" in text else (None, text)
        found = next((each for each in Quantifier if each.value == before), None)
        base = name.removesuffix("IfExists")
        compares = _NEGATED.get(base, base)
        # Null asks whether a key is there, and so takes neither IfExists nor a quantifier.
        is_known = compares in _POSITIVE or text == _NULL
        if not is_known or (before is not None and found is None):
            raise KeyPolicyError("unknown_operator", "IAM has no such condition operator", got=ascii(text[:100]))
        return cls(compares, is_negated=base in _NEGATED, if_exists=base != name, quantifier=found)

    def matches(self, expected: tuple[str, ...], got: str) -> Truth:
        """One value of the request against all alternatives: OR, behind a negated operator NOR."""
        found = any_of(_POSITIVE[self.compares](each, got) for each in expected)
        return ~found if self.is_negated else found


def values_of(context: Context, key: str) -> tuple[str, ...]:
    """All values of a condition key; keys are compared without regard to case. Empty where it is not there."""
    return tuple(value for name, values in context.items() if name.lower() == key.lower() for value in values)


def evaluate(condition: Condition, context: Context, *, has_variables: bool = True) -> Clause:
    """Whether the condition holds. ``has_variables``: ``${...}`` in it is a policy variable, as in every policy of
    version 2012-10-17; which value it stands for only AWS knows.
    """
    got = values_of(context, condition.key)
    truth, remark = _judge(condition, got, has_variables)
    return Clause(
        "Condition", truth, condition.values, got or None, operator=condition.operator, key=condition.key, remark=remark
    )


def _judge(condition: Condition, got: tuple[str, ...], has_variables: bool) -> tuple[Truth, str | None]:
    try:
        asked = Operator.parse(condition.operator)
    except KeyPolicyError as error:
        return Truth.UNDECIDED, error.message
    if asked.compares == _NULL:
        # "true": the key is absent.
        return any_of(_POSITIVE["Bool"](each, str(not got)) for each in condition.values), "Null asks for a missing key"
    if not got:
        return Truth.of(_holds_without_key(asked)), "the request has no such key"
    if has_variables and any("${" in value for value in condition.values):
        return Truth.UNDECIDED, "a policy variable is not resolved here"
    if asked.quantifier is not None:
        # An empty text is as no value to a set operator, and to no other.
        each = [asked.matches(condition.values, value) for value in got if value]
        return all_of(each) if asked.quantifier is Quantifier.FOR_ALL_VALUES else any_of(each), None
    if len(got) > 1:
        return Truth.UNDECIDED, "several values, which ask for ForAllValues or ForAnyValue"
    return asked.matches(condition.values, got[0]), None


def _holds_without_key(asked: Operator) -> bool:
    if asked.quantifier is not None:
        return asked.if_exists or asked.quantifier is Quantifier.FOR_ALL_VALUES
    return asked.if_exists or asked.is_negated
