"""Ranges of numbers as regular expressions over their decimal notation (RFC 8259, section 6, without exponents).

A numeral has at most 15 significant digits: two different ones are two different doubles in the same order (IEEE 754),
so that what is within a range stays so for whoever reads JSON's numbers as doubles.
"""

from __future__ import annotations

from collections.abc import Sequence
from decimal import ROUND_CEILING, ROUND_FLOOR, Decimal
from typing import Final

MAX_DIGITS: Final = 15
"""Significant ones."""
_USUAL_WHOLE_DIGITS: Final = 9
"""Before the point, where one side is open."""


class OutOfReach(Exception):
    """The bounds leave no number, or have more digits than are supported."""


def integers(low: Decimal | None, high: Decimal | None, *, above: bool = False, below: bool = False) -> str:
    """The integers from ``low`` to ``high``, which are excluded themselves with ``above`` and ``below``. Raises
    OutOfReach.
    """
    limit = Decimal(10**MAX_DIGITS - 1)
    _check(low, high)
    smallest = -limit if low is None else low.to_integral_value(ROUND_CEILING)
    largest = limit if high is None else high.to_integral_value(ROUND_FLOOR)
    smallest += above and smallest == low
    largest -= below and largest == high
    if smallest > largest or max(abs(smallest), abs(largest)) > limit:
        raise OutOfReach
    first, last = int(smallest), int(largest)
    parts = []
    if first < 0:
        parts.append("-" + _any(_whole(max(1, -last), -first)))
    if last >= 0:
        parts.append(_any(_whole(max(0, first), last)))
    return f"^{_any(parts)}$"


def decimals(low: Decimal | None, high: Decimal | None, *, above: bool = False, below: bool = False) -> str:
    """The numbers from ``low`` to ``high``, which are excluded themselves with ``above`` and ``below``. Raises
    OutOfReach.
    """
    _check(low, high)
    whole = max(len(str(abs(int(each)))) for each in (low or Decimal(0), high or Decimal(0)))
    if low is None or high is None:
        whole = max(whole, _USUAL_WHOLE_DIGITS)
    room = MAX_DIGITS - whole
    limit = Decimal(10**whole - 1)
    if low is None:
        low, above = -limit, False
    if high is None:
        high, below = limit, False
    if room < 0 or any(-int(each.as_tuple().exponent) > room for each in (low.normalize(), high.normalize())):
        raise OutOfReach
    parts = []
    if low < 0:
        # Minus zero is no number of its own.
        parts += ["-" + each for each in _numerals(max(Decimal(0), -high), -low, below or high >= 0, above, room)]
    if high >= 0:
        parts += _numerals(max(Decimal(0), low), high, above and low >= 0, below, room)
    if not parts:
        raise OutOfReach
    return f"^{_any(parts)}$"


def _check(low: Decimal | None, high: Decimal | None) -> None:
    for each in (low, high):
        if each is not None and each and not -MAX_DIGITS <= each.adjusted() < MAX_DIGITS:
            raise OutOfReach


def _numerals(low: Decimal, high: Decimal, above: bool, below: bool, room: int) -> list[str]:
    """From 0 on."""
    if low > high or (low == high and (above or below)):
        return []
    (first, low_digits), (last, high_digits) = _split(low), _split(high)
    if first == last:
        return _with_fraction(str(first), _fraction(low_digits, high_digits, above, below, room))
    parts = _with_fraction(str(first), _fraction(low_digits, None, above, below, room))
    if first + 1 < last:
        between = _any(_whole(first + 1, last - 1))
        parts += _with_fraction(between, _fraction(None, None, above, below, room))
    return parts + _with_fraction(str(last), _fraction(None, high_digits, above, below, room))


def _split(value: Decimal) -> tuple[int, str]:
    whole, _, digits = f"{value:f}".partition(".")
    return int(whole), digits.rstrip("0")


def _with_fraction(whole: str, fractions: Sequence[str]) -> list[str]:
    parts = [f"{whole}\\.{_any([each for each in fractions if each])}"] if any(fractions) else []
    return [whole, *parts] if "" in fractions else parts


def _fraction(low: str | None, high: str | None, above: bool, below: bool, room: int) -> list[str]:
    """Digits behind a point, at most ``room``, that make a fraction from ``low`` to ``high``, each without zeros at its
    end; None where there is no bound. An empty text is no fraction at all.
    """
    parts = []
    if (low is None or (not low and not above)) and (high is None or high or not below):
        parts.append("")
    if not room:
        return parts
    if low is None and high is None:
        return [*parts, f"[0-9]{{1,{room}}}"]
    least = -1 if low is None else int(low[:1] or 0)
    most = 10 if high is None else int(high[:1] or 0)
    if least + 1 < most:
        parts.append(f"[{least + 1}-{most - 1}][0-9]{{0,{room - 1}}}")
    edges: list[tuple[int, str | None, str | None]] = []
    if least == most and low is not None and high is not None:
        edges.append((least, low[1:], high[1:]))
    else:
        edges += [] if low is None else [(least, low[1:], None)]
        edges += [] if high is None else [(most, None, high[1:])]
    for digit, rest_low, rest_high in edges:
        rest = _fraction(rest_low, rest_high, above, below, room - 1)
        if rest:
            parts.append(f"{digit}{_any(rest)}")
    return parts


def _whole(low: int, high: int) -> list[str]:
    """Integers from 0 on, by their number of digits."""
    parts = []
    for size in range(len(str(low)), len(str(high)) + 1):
        least = max(low, 10 ** (size - 1) if size > 1 else 0)
        parts += _between(str(least), str(min(high, 10**size - 1)))
    return parts


def _between(low: str, high: str) -> list[str]:
    """As many digits as each of the two has."""
    if not low:
        return [""]
    if low[0] == high[0]:
        return [low[0] + _any(_between(low[1:], high[1:]))]
    size = len(low) - 1
    least, most = int(low[0]), int(high[0])
    parts = []
    if low[1:] != "0" * size:
        parts.append(low[0] + _any(_between(low[1:], "9" * size)))
        least += 1
    if high[1:] != "9" * size:
        parts.append(high[0] + _any(_between("0" * size, high[1:])))
        most -= 1
    if least <= most:
        parts.append(f"[{least}-{most}][0-9]{{{size}}}")
    return parts


def _any(parts: Sequence[str]) -> str:
    return parts[0] if len(parts) == 1 else f"(?:{'|'.join(parts)})"
