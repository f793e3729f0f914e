"""Grammars as text, read by a reader of the tests' own: what they admit, at random, and whether they admit a text."""

from __future__ import annotations

import random
import re
from dataclasses import dataclass
from typing import Final, TypeAlias

Set: TypeAlias = tuple[tuple[int, int], ...]
Element: TypeAlias = str | Set
"""A name of a rule, or a set of characters."""
Stack: TypeAlias = tuple[Element, ...]
"""What is still to come, the next last."""

_ESCAPE: Final = re.compile(r"\\x([0-9A-F]{2})|\\u([0-9A-F]{4})|\\U([0-9A-F]{8})|([^\\])", re.DOTALL)
_ELEMENT: Final = re.compile(r'"((?:[^"\\]|\\.)*)"|\[((?:[^\]\\]|\\.)+)\]|([a-z0-9]+)')
_EDGE: Final = 0.2


@dataclass
class Reader:
    rules: dict[str, list[tuple[Element, ...]]]

    @classmethod
    def of(cls, text: str) -> Reader:
        rules: dict[str, list[tuple[Element, ...]]] = {}
        for line in text.splitlines():
            name, _, right = line.partition(" ::= ")
            assert name not in rules
            rules[name] = [_elements(part) for part in right.split(" | ")]
        used = {each for alternatives in rules.values() for part in alternatives for each in part}
        assert {each for each in used if isinstance(each, str)} | {"root"} == rules.keys()
        return cls(rules)

    def admits(self, text: str) -> bool:
        stacks = self._expanded({("root",)})
        for character in text:
            stacks = self.after(stacks, character)
        return () in stacks

    def after(self, stacks: set[Stack], character: str) -> set[Stack]:
        point = ord(character)
        return self._expanded(
            {
                stack[:-1]
                for stack in stacks
                if stack and not isinstance(stack[-1], str) and any(low <= point <= high for low, high in stack[-1])
            }
        )

    def readings(self, text: str) -> int:
        """In how many ways at most a text is read at once."""
        stacks = self._expanded({("root",)})
        most = len(stacks)
        for character in text:
            stacks = self.after(stacks, character)
            most = max(most, len(stacks))
        return most

    def _expanded(self, stacks: set[Stack]) -> set[Stack]:
        found: set[Stack] = set()
        waiting = list(stacks)
        seen = set(stacks)
        while waiting:
            stack = waiting.pop()
            if not stack or not isinstance(stack[-1], str):
                found.add(stack)
                continue
            for alternative in self.rules[stack[-1]]:
                after = (*stack[:-1], *reversed(alternative))
                if after not in seen:
                    seen.add(after)
                    waiting.append(after)
        return found

    def derived(self, source: random.Random, *, length: int = 400) -> str:
        """A text that is admitted; beyond ``length`` it comes to its end as fast as it can."""
        heights = self._heights()
        text: list[str] = []
        stack: list[Element] = ["root"]
        while stack:
            element = stack.pop()
            if isinstance(element, str):
                alternatives = self.rules[element]
                if len(text) > length:
                    alternative = min(alternatives, key=lambda each: _height(each, heights))
                else:
                    alternative = source.choice(alternatives)
                stack += reversed(alternative)
            else:
                low, high = source.choice(element)
                text.append(chr(source.choice((low, high)) if source.random() < _EDGE else source.randint(low, high)))
        return "".join(text)

    def _heights(self) -> dict[str, int]:
        heights: dict[str, int] = {}
        while len(heights) < len(self.rules):
            known = len(heights)
            for name, alternatives in self.rules.items():
                if name not in heights:
                    possible = [
                        _height(each, heights)
                        for each in alternatives
                        if all(not isinstance(part, str) or part in heights for part in each)
                    ]
                    if possible:
                        heights[name] = 1 + min(possible)
            assert len(heights) > known, "a rule cannot come to an end"
        return heights


def _height(alternative: tuple[Element, ...], heights: dict[str, int]) -> int:
    return max((heights.get(each, 1 << 30) for each in alternative if isinstance(each, str)), default=0)


def _elements(part: str) -> tuple[Element, ...]:
    found: list[Element] = []
    at = 0
    while at < len(part):
        match = _ELEMENT.match(part, at)
        assert match, part
        literal, members, name = match.groups()
        if name is not None:
            found.append(name)
        elif members is not None:
            found.append(_set(members))
        else:
            found += [((point, point),) for point, _ in _points(literal)]
        at = match.end() + 1
    return tuple(found)


def _points(text: str) -> list[tuple[int, bool]]:
    """Code points, and whether they are a hyphen that is not escaped."""
    assert "".join(match.group() for match in _ESCAPE.finditer(text)) == text
    return [
        (ord(match[4]), match[4] == "-") if match[4] else (int(match[1] or match[2] or match[3], 16), False)
        for match in _ESCAPE.finditer(text)
    ]


def _set(text: str) -> Set:
    assert text[0] != "^"
    points = _points(text)
    ranges: list[tuple[int, int]] = []
    at = 0
    while at < len(points):
        if at + 2 < len(points) and points[at + 1][1]:
            ranges.append((points[at][0], points[at + 2][0]))
            at += 3
        else:
            ranges.append((points[at][0], points[at][0]))
            at += 1
    assert all(low <= high for low, high in ranges)
    return tuple(ranges)
