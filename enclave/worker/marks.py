"""What a client wrote, marked, so that it can be told from a template's own text wherever the template puts it.

Every text of a client goes into a template between two markers: random, drawn after the request came, so that nobody
can have written them. Behind the rendering the prompt is cut at the markers (:meth:`Marks.cut`). A text's JSON is
another text with marks of its own, made when a template asks for it: ``tojson`` (:func:`to_json`) writes whole objects
of a client as one, which the tokenizer then sees in one piece, as the model did when it was trained.
"""

from __future__ import annotations

import json
import re
import secrets
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Final

MAX_TEXTS: Final = 1 << 14
"""Texts that are marked for one prompt: a template may look at each string of a tool's schema."""

# The words of JSON Schema are no client's: templates look for them by name.
_KEYS: Final = frozenset(
    {"type", "function", "name", "description", "parameters", "properties", "required", "items", "enum", "const"}
    | {"default", "title", "format", "anyOf", "oneOf", "allOf", "not", "additionalProperties", "minimum", "maximum"}
    | {"minLength", "maxLength", "minItems", "maxItems", "pattern", "$ref", "$defs", "nullable", "return"}
)
_VALUES: Final = frozenset({"function", "object", "array", "string", "number", "integer", "boolean", "null"})


_INSIDE: Final = "\ufdd0"
"""Behind every character of a text with which a special token could begin. Unicode promises that it stands for nothing
(a noncharacter), and one character for one keeps a text of such characters within twice its size.
"""
_INSIDE_JSON: Final = json.dumps(_INSIDE).strip('"')


class MarkError(Exception):
    """A template does to a client's text what it must not. The message is in words that a client may read."""


class LacksPlace(MarkError):
    """A template has no place for something that templates need not have a place for."""


@dataclass(slots=True)
class Owner:
    """What some texts belong to, and how many of them a prompt has to have."""

    name: str
    least: int
    most: int | None = None
    is_optional: bool = False
    """Not every template has a place for it."""
    seen: int = 0


@dataclass(frozen=True, slots=True)
class _Entry:
    owner: Owner
    text: str
    whole: str
    """Marked, with its markers."""


@dataclass(frozen=True, slots=True)
class Segment:
    """A stretch of a prompt."""

    text: str
    trusted: bool
    """It is the template's: special tokens in it are meant."""


class Marks:
    """The marked texts of one prompt."""

    def __init__(self, starts: Iterable[str]) -> None:
        """``starts`` are the characters with which the texts of special tokens begin. A stray part of a text has no
        marker around it; with a mark inside every special token's text, it has none of those.
        """
        self.marker = secrets.token_hex(16)
        self._starts = sorted(starts)
        self._entries: list[_Entry] = []
        self._owners: list[Owner] = []
        self.size = 0
        """Characters of all that is marked."""

    def owner(self, name: str, *, least: int, most: int | None = None, is_optional: bool = False) -> Owner:
        """Somebody whose texts :meth:`cut` counts."""
        self._owners.append(Owner(name, least, most, is_optional))
        return self._owners[-1]

    def mark(self, owner: Owner, text: str) -> str:
        """``text`` between markers."""
        if len(self._entries) == MAX_TEXTS:
            raise MarkError("the chat template takes too much apart")
        name = f"{self.marker}{len(self._entries):08x}"
        whole = text
        for start in self._starts:
            whole = whole.replace(start, start + _INSIDE)
        whole = f"{name}<{whole}{name}>"
        self._entries.append(_Entry(owner, text, whole))
        self.size += len(whole)
        return whole

    def cut(self, rendered: str) -> list[Segment]:
        """The prompt in segments. Insists that every text stands there as it was marked, and every owner's as often as
        it has to. Raises MarkError.
        """
        segments: list[Segment] = []
        position = 0
        for opening in re.finditer(f"{self.marker}([0-9a-f]{{8}})<", rendered):
            index = int(opening[1], 16)
            if index >= len(self._entries):
                raise MarkError("the chat template makes marks of its own")
            entry = self._entries[index]
            if not rendered.startswith(entry.whole, opening.start()):
                raise MarkError(f"the chat template changes {entry.owner.name}")
            entry.owner.seen += 1
            segments.append(Segment(rendered[position : opening.start()], trusted=True))
            segments.append(Segment(entry.text, trusted=False))
            position = opening.start() + len(entry.whole)
        segments.append(Segment(rendered[position:], trusted=True))
        if any(self._is_marked(segment.text.lower()) for segment in segments if segment.trusted):
            raise MarkError("the chat template takes a text apart")
        for owner in self._owners:
            if owner.seen < owner.least:
                kind = LacksPlace if owner.is_optional else MarkError
                raise kind(f"the chat template has no place for {owner.name}")
            if owner.most is not None and owner.seen > owner.most:
                raise MarkError(f"the chat template repeats {owner.name}")
        return [segment for segment in segments if segment.text]

    def _is_marked(self, text: str) -> bool:
        return self.marker in text or _INSIDE in text or _INSIDE_JSON in text


class Text(str):
    """A marked text, which knows what it was: for its JSON."""

    __slots__ = ("_marks", "_owner", "_plain")
    _marks: Marks
    _owner: Owner
    _plain: str

    def __new__(cls, marks: Marks, owner: Owner, text: str) -> Text:
        marked = super().__new__(cls, marks.mark(owner, text))
        marked._marks, marked._owner, marked._plain = marks, owner, text
        return marked

    def _as_json(self, dump: json.JSONEncoder, margin: str) -> str:
        return self._marks.mark(self._owner, dump.encode(self._plain))


class JsonText(Text):
    """A marked text that is JSON already: ``tojson`` leaves it as it is."""

    __slots__ = ()

    def _as_json(self, dump: json.JSONEncoder, margin: str) -> str:
        return str(self)


class Object(Mapping[str, object]):
    """A client's JSON object. A template may look inside, and finds marked texts; its JSON is one marked text."""

    def __init__(self, marks: Marks, owner: Owner, plain: Mapping[str, object]) -> None:
        self._marks, self._owner, self._plain = marks, owner, plain
        self._seen: dict[str, object] | None = None

    def _entries(self) -> dict[str, object]:
        if self._seen is None:
            self._seen = {
                key if key in _KEYS or not key else Text(self._marks, self._owner, key): self._wrapped(value)
                for key, value in self._plain.items()
            }
        return self._seen

    def _wrapped(self, value: object) -> object:
        match value:
            case dict():
                return Object(self._marks, self._owner, value)
            case list():
                return [self._wrapped(entry) for entry in value]
            case str() if value and value not in _VALUES:
                return Text(self._marks, self._owner, value)
            case _:
                return value

    def __getitem__(self, key: str) -> object:
        return self._entries()[key]

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries())

    def __len__(self) -> int:
        return len(self._plain)

    def _as_json(self, dump: json.JSONEncoder, margin: str) -> str:
        return self._marks.mark(self._owner, dump.encode(self._plain).replace("\n", "\n" + margin))


def to_json(
    value: object,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """The filter ``tojson``, as transformers has it, of values in which marked ones stand."""
    if indent is not None and not 0 <= indent <= 8:
        raise ValueError("an indentation is 0 to 8 spaces")
    dump = json.JSONEncoder(ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)
    return _written(value, dump, "")


def _written(value: Any, dump: json.JSONEncoder, margin: str) -> str:
    if isinstance(value, Text | Object):
        return value._as_json(dump, margin)
    deeper = margin if dump.indent is None else margin + " " * int(dump.indent)
    if isinstance(value, Mapping):
        keys = sorted(value) if dump.sort_keys else value
        entries = [
            f"{_written(key, dump, deeper)}{dump.key_separator}{_written(value[key], dump, deeper)}" for key in keys
        ]
        opening, closing = "{}"
    elif isinstance(value, list | tuple | Iterator):  # filters such as map make iterators
        entries = [_written(entry, dump, deeper) for entry in value]
        opening, closing = "[]"
    else:
        return dump.encode(value)
    if dump.indent is None or not entries:
        return opening + dump.item_separator.join(entries) + closing
    return f"{opening}\n{deeper}" + f"{dump.item_separator}\n{deeper}".join(entries) + f"\n{margin}{closing}"
