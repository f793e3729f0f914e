"""Calls of tools in an answer's text, in the ways in which models write them.

A model that calls because it wants to may write something that only looks like a call: each is held back until it is
whole, and comes out as the text that it is where it is no call. Where a grammar makes it write calls there is nothing
else that it could write: their arguments come out as they are written.
"""

from __future__ import annotations

import json
import re
import secrets
import string
from collections.abc import Collection
from dataclasses import dataclass
from enum import Enum, auto
from typing import Final, NoReturn

from attestation.model_family import CallFormat
from enclave.grammar.json_grammar import BARE as BARE_STYLE
from enclave.grammar.json_grammar import HERMES as HERMES_STYLE
from enclave.grammar.json_grammar import LLAMA as LLAMA_STYLE
from enclave.grammar.json_grammar import CallStyle
from enclave.worker.answer import beginning_of
from vsockrpc.chat import MAX_NAME_CHARACTERS, MAX_TOOL_CALLS
from vsockrpc.messages import ToolCallDelta

_MAX_HEADER: Final = 256
"""Characters between the mark that begins a call and its JSON, and of white space that waits for a call to follow."""
_ID_CHARACTERS: Final = string.ascii_letters + string.digits
_NAME: Final = rf"(?P<name>[A-Za-z0-9_-]{{1,{MAX_NAME_CHARACTERS}}})"
_SPACE: Final = re.compile(r"\s*")

# --- How models write them ------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class CallSyntax:
    """How calls are read: an opening, a header, a JSON object, a closing. White space may stand between them."""

    style: CallStyle
    """How a grammar has them written, which is one of the ways that are read."""
    openings: tuple[str, ...] = ()
    """One of these begins a call. None: the call is what an answer begins with."""
    ignored: str = ""
    """What may stand before a call that has no opening."""
    header: re.Pattern[str] | None = None
    """It has the group ``name``, and the object is the arguments. None: the object has both."""
    closing: str = ""
    """Without white space."""
    last: str = ""
    """What may stand behind the last call."""

    @property
    def marks(self) -> frozenset[str]:
        """What in it may be a token of its own."""
        style = self.style
        texts = (style.opening, style.before, style.between, style.after, style.separator, style.closing, self.ignored)
        return frozenset(re.findall(r"<[^<>]+>", " ".join(texts)))


HERMES: Final = CallSyntax(style=HERMES_STYLE, openings=("<tool_call>",), closing="</tool_call>")
"""Hermes, Qwen and SmolLM."""
LLAMA: Final = CallSyntax(style=LLAMA_STYLE, ignored="<|python_tag|>")
DEEPSEEK: Final = CallSyntax(
    style=CallStyle(
        opening="<｜tool▁calls▁begin｜>",
        before="<｜tool▁call▁begin｜>function<｜tool▁sep｜>",
        between="\n```json\n",
        after="\n```<｜tool▁call▁end｜>",
        closing="<｜tool▁calls▁end｜>",
    ),
    openings=("<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>", "<｜tool▁call▁begin｜>"),
    header=re.compile(rf"\s*function<｜tool▁sep｜>{_NAME}\s*```json\s*"),
    closing="```<｜tool▁call▁end｜>",
    last="<｜tool▁calls▁end｜>",
)
SYNTAXES: Final = {CallFormat.HERMES: HERMES, CallFormat.LLAMA: LLAMA, CallFormat.DEEPSEEK: DEEPSEEK}
BARE: Final = CallSyntax(style=BARE_STYLE)
"""For models of which nothing is known: only where a grammar has them written."""


# --- Reading them ---------------------------------------------------------------------------------------------------


def new_call_id() -> str:
    return "call_" + "".join(secrets.choice(_ID_CHARACTERS) for _ in range(24))


@dataclass(slots=True)
class _Extent:
    """Follows a JSON value to its end. It looks at brackets and strings and at nothing else."""

    depth: int = 0
    in_string: bool = False
    is_escaped: bool = False

    def end(self, text: str) -> int | None:
        """Behind which character of ``text``, which goes on with the value, it ends."""
        for index, character in enumerate(text):
            if self.in_string:
                if self.is_escaped:
                    self.is_escaped = False
                elif character == "\\":
                    self.is_escaped = True
                else:
                    self.in_string = character != '"'
            elif character == '"':
                self.in_string = True
            elif character in "{[":
                self.depth += 1
            elif character in "}]":
                self.depth -= 1
                if self.depth == 0:
                    return index + 1
        return None


class _Phase(Enum):
    TEXT = auto()
    HEADER = auto()
    OBJECT = auto()
    CLOSING = auto()


class CallReader:
    """Tells calls from text. Pure data but for the calls' ids; how the text is cut into pieces changes nothing."""

    def __init__(self, syntax: CallSyntax, names: Collection[str], *, is_certain: bool, most: int) -> None:
        """``names`` are the tools'. ``is_certain``: a grammar makes the text calls and nothing else. After ``most``
        calls nothing more comes out.
        """
        self._syntax = syntax
        self._names = frozenset(names)
        self._is_certain = is_certain
        self._most = min(most, MAX_TOOL_CALLS)
        marks = (*syntax.openings, *((syntax.last,) if syntax.last else ()))
        self._marks = marks
        self._longest = max(map(len, marks), default=0)
        self._mark = re.compile("|".join(map(re.escape, marks)))
        self._phase = _Phase.TEXT
        self._held = ""
        """Text that may still become a mark."""
        self._is_blank = True
        """There was nothing but white space since the beginning, or since the last call."""
        self._raw: list[str] = []
        """What of a call has come, if it is one."""
        self._call = _Call()
        self.count = 0
        """Calls so far."""
        self._parts: list[str | ToolCallDelta] = []

    @property
    def is_full(self) -> bool:
        return self.count >= self._most

    @property
    def is_within(self) -> bool:
        """What came last is a call's, if that becomes one."""
        return self._phase is not _Phase.TEXT

    def push(self, text: str) -> list[str | ToolCallDelta]:
        """What ``text`` makes certain: text that is no call's, and parts of calls, in order."""
        while text:
            match self._phase:
                case _Phase.TEXT:
                    text = self._text(self._held + text)
                case _Phase.HEADER:
                    text = self._header(text)
                case _Phase.OBJECT:
                    text = self._object(text)
                case _Phase.CLOSING:
                    text = self._closing(text)
        return self._taken()

    def finish(self) -> list[str | ToolCallDelta]:
        """The rest, at the end of the answer. A call whose object is whole is one, even if nothing closes it."""
        match self._phase:
            case _Phase.TEXT:
                if self.count == 0 or not self._is_blank or self._held.strip():
                    self._say(self._held)
                self._held = ""
            case _Phase.CLOSING:
                self._accept()
            case _ if not self._is_certain:
                self._give_up()
        return self._taken()

    def _taken(self) -> list[str | ToolCallDelta]:
        parts, self._parts = self._parts, []
        return parts

    # --- Each takes the text from where the phase is to where it ends, and returns the rest --------------------------

    def _text(self, text: str) -> str:
        self._held = ""
        if self.is_full:
            return ""
        if not self._syntax.openings:
            return self._text_or_object(text)
        found = self._mark.search(text)
        if found is None:
            sure = len(text) - beginning_of(self._marks, text, self._longest)
            if self._is_blank and not text[:sure].strip() and sure < _MAX_HEADER:
                sure = 0
            self._say(text[:sure])
            self._held = text[sure:]
            return ""
        before = text[: found.start()]
        if not self._is_blank or before.strip() or len(before) >= _MAX_HEADER:
            self._say(before)
            before = ""
        if found[0] != self._syntax.last:
            self._begin(_Phase.HEADER, before + found[0])
        elif not (self.count and self._is_blank):
            self._say(before + found[0])
        return text[found.end() :]

    def _text_or_object(self, text: str) -> str:
        """Where calls have no mark: they are what is written first."""
        start = len(text) - len(text.lstrip(" \t\r\n;" if self.count else " \t\r\n"))
        ignored = self._syntax.ignored
        if ignored and text.startswith(ignored, start):
            start += len(ignored)
            start = _behind_space(text, start)
        rest = text[start:]
        if not self._is_blank or start >= _MAX_HEADER or not (rest.startswith("{") or ignored.startswith(rest)):
            self._say(text)
        elif rest.startswith("{"):
            self._begin(_Phase.OBJECT, text[:start])
            return rest
        else:
            self._held = text
        return ""

    def _header(self, text: str) -> str:
        pattern = self._syntax.header
        if pattern is None:
            start = len(text) - len(text.lstrip())
            self._raw.append(text[:start])
            if text.startswith("{", start):
                self._phase = _Phase.OBJECT
            elif start < len(text):
                self._give_up()
            return text[start:]
        room = _MAX_HEADER - len(self._call.header)
        start = text.find("{", 0, room + 1)
        self._raw.append(text[: room if start < 0 else start])
        self._call.header += text[: room if start < 0 else start]
        if start < 0 and len(text) <= room:
            return ""
        found = pattern.fullmatch(self._call.header) if start >= 0 else None
        if found is None or found["name"] not in self._names:
            self._give_up()
        else:
            self._call.name = found["name"]
            self._phase = _Phase.OBJECT
        return text[room if start < 0 else start :]

    def _object(self, text: str) -> str:
        call = self._call
        end = call.extent.end(text)
        part = text if end is None else text[:end]
        self._raw.append(part)
        call.body += part
        if self._is_certain:
            self._stream()
        if end is None:
            return ""
        if not self._is_certain and not call.parse(self._names):
            self._give_up()
        elif self._syntax.closing:
            self._phase = _Phase.CLOSING
        else:
            self._accept()
        return text[end:]

    def _closing(self, text: str) -> str:
        closing, call = self._syntax.closing, self._call
        for index, character in enumerate(text):
            if character.isspace():
                continue
            if closing[call.closed] != character:
                self._raw.append(text[:index])
                if self._is_certain:
                    self._accept()
                else:
                    self._give_up()
                return text[index:]
            call.closed += 1
            if call.closed == len(closing):
                self._accept()
                return text[index + 1 :]
        self._raw.append(text)
        return ""

    # --- From one phase to another -----------------------------------------------------------------------------------

    def _say(self, text: str) -> None:
        if text:
            self._parts.append(text)
            self._is_blank = False

    def _begin(self, phase: _Phase, raw: str) -> None:
        self._raw = [raw]
        self._call = _Call(has_name=self._syntax.header is not None)
        self._phase = phase

    def _give_up(self) -> None:
        """It was none: all of it is text."""
        self._say("".join(self._raw))
        self._phase = _Phase.TEXT

    def _stream(self) -> None:
        call = self._call
        is_first = not call.is_told
        fresh = call.fresh_arguments()
        if is_first and call.is_told:
            self._parts.append(ToolCallDelta(self.count, fresh, new_call_id(), call.name))
        elif fresh:
            self._parts.append(ToolCallDelta(self.count, fresh))

    def _accept(self) -> None:
        call = self._call
        if not call.is_told:
            self._parts.append(ToolCallDelta(self.count, call.arguments, new_call_id(), call.name))
        self.count += 1
        self._is_blank = True
        self._phase = _Phase.TEXT


_HEAD: Final = re.compile(rf'\{{\s*"name"\s*:\s*"{_NAME}"\s*,\s*"(?:arguments|parameters)"\s*:\s*(?=\{{)')


class _Call:
    """One that is being written."""

    def __init__(self, *, has_name: bool = False) -> None:
        """``has_name``: it stands in the header, and the object is the arguments alone."""
        self.header = ""
        self.body = ""
        self.extent = _Extent()
        self.closed = 0
        """Characters of what closes it."""
        self.name = ""
        self.arguments = "{}"
        self._has_name = has_name
        self.is_told = False
        """Its beginning went out."""
        self._sent = 0
        """Where in the body that goes on which did not go out."""
        self._within = _Extent()
        self._is_whole = False

    def fresh_arguments(self) -> str:
        """What follows of them, of a call that is surely one."""
        if not self.is_told:
            if not self._has_name:
                head = _HEAD.match(self.body)
                if head is None:
                    return ""
                self.name, self._sent = head["name"], head.end()
            self.is_told = True
        if self._is_whole:
            return ""
        fresh = self.body[self._sent :]
        end = self._within.end(fresh)
        if end is not None:
            self._is_whole, fresh = True, fresh[:end]
        self._sent += len(fresh)
        return fresh

    def parse(self, names: Collection[str]) -> bool:
        """Whether the whole body is a call of one of these."""
        try:
            if self._has_name:
                self.arguments = self.body
                return isinstance(_DECODER.decode(self.body), dict)
            members = _members(self.body)
        except (ValueError, RecursionError):
            return False
        name, _ = members.pop("name", ("", ""))
        kind, _ = members.pop("type", ("function", ""))
        members.pop("id", None)
        if not isinstance(name, str) or name not in names or kind != "function":
            return False
        if len(members) != 1 or not members.keys() <= {"arguments", "parameters"}:
            return False
        [(value, self.arguments)] = members.values()
        self.name = name
        return isinstance(value, dict)


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is no JSON")


_DECODER: Final = json.JSONDecoder(parse_constant=_refuse_constant)


def _members(text: str) -> dict[str, tuple[object, str]]:
    """Of a JSON object: each value, and the text that it is. Raises ValueError and RecursionError."""
    members: dict[str, tuple[object, str]] = {}
    position = _behind_space(text, 1)
    while text[position : position + 1] != "}":
        if members:
            position = _behind(text, position, ",")
        key, position = _DECODER.raw_decode(text, position)
        position = _behind(text, _behind_space(text, position), ":")
        value, end = _DECODER.raw_decode(text, position)
        if not isinstance(key, str) or key in members:
            raise ValueError("a key is no text, or there twice")
        members[key] = (value, text[position:end])
        position = _behind_space(text, end)
    return members


def _behind(text: str, position: int, mark: str) -> int:
    if not text.startswith(mark, position):
        raise ValueError(f"{mark} is missing")
    return _behind_space(text, position + len(mark))


def _behind_space(text: str, position: int) -> int:
    found = _SPACE.match(text, position)
    assert found is not None, "it matches nothing, too"
    return found.end()
