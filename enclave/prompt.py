"""From a conversation to segments of a prompt, each either the template's or the person's: so that nobody can forge a
role.

A chat template turns messages into one string in which ``<|im_start|>system`` of the template and the same characters
typed by a person look alike. So every content is wrapped in markers before rendering, random and fresh for each
request and absent from every content; behind the rendering the string is cut at the markers. Only the template's
segments are later tokenised with special tokens parsed. A template that loses, repeats or changes a content is an
error, not a guess.

The template is code (CVE-2024-34359). It is pinned by the manifest's digest, runs in the engine process, and in
Jinja's sandbox with bounds on its size, its output and its loops; what still goes wrong there costs the engine
process and nothing else.
"""

from __future__ import annotations

import codecs
import re
import secrets
from collections.abc import Callable, Sequence, Set
from dataclasses import dataclass
from typing import Any, Final, NoReturn

import jinja2
import jinja2.debug
import jinja2.ext
from jinja2.exceptions import SecurityError
from jinja2.sandbox import ImmutableSandboxedEnvironment

from attestation.errors import StrongroomError
from attestation.manifest import MAX_TEMPLATE_SIZE
from enclave.generation import InvalidRequest

MAX_RANGE: Final = 4096
MAX_FACTOR: Final = 4096
"""Elements or characters that a multiplication may make."""
MAX_OVERHEAD: Final = 256 << 10
"""Characters that a template may add to the contents."""
_THINK_END: Final = "</think>"

# A confined process imports nothing any more, and Jinja imports these when they are first needed: for a template's
# string literals, its extensions, and its first failure.
codecs.lookup("unicode-escape")
_LATE_IMPORTS: Final = (jinja2.ext, jinja2.debug)

Messages = Sequence[tuple[str, str]]


class TemplateError(StrongroomError):
    """The chat template is no template, or not one that can be trusted with a conversation. Its code is
    ``bad_template``.
    """

    def __init__(self, message: str, *, expected: object | None = None, got: object | None = None) -> None:
        super().__init__("bad_template", message, expected=expected, got=got)


@dataclass(frozen=True, slots=True)
class Segment:
    """A stretch of a prompt."""

    text: str
    trusted: bool
    """It is the template's: special tokens in it are meant."""


class ChatTemplate:
    """A compiled template. Construction raises TemplateError."""

    def __init__(self, source: str, *, bos: str, eos: str, mark_starts: Set[str]) -> None:
        """``bos`` and ``eos`` are the texts of the model's own tokens, which templates write out; ``mark_starts`` the
        characters with which the texts of its special tokens begin.
        """
        size = len(source.encode("utf-8", "surrogatepass"))
        if size > MAX_TEMPLATE_SIZE:
            raise TemplateError("the chat template is too large", expected=f"<= {MAX_TEMPLATE_SIZE} bytes", got=size)
        # The settings are those under which chat templates are written (transformers, apply_chat_template).
        environment = _Environment(trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"])
        environment.globals.pop("lipsum")
        environment.globals.update(range=_bounded_range, raise_exception=_refuse)
        try:
            self._template = environment.from_string(source)
        except Exception as error:  # Jinja makes Python of it, and Python's compiler has refusals of its own
            raise TemplateError(f"the chat template does not compile ({type(error).__name__})") from error
        self._source = source
        self._mark_starts = re.compile(f"[{''.join(map(re.escape, sorted(mark_starts)))}]" if mark_starts else "$a")
        # As llama.cpp's own server has it; templates without such a choice ignore enable_thinking.
        self._constants = {"bos_token": bos, "eos_token": eos, "add_generation_prompt": True, "enable_thinking": True}

    def render(self, messages: Messages) -> list[Segment]:
        """The prompt that asks for the answer to ``messages``, cut into segments in order.

        Raises InvalidRequest when the template refuses the conversation, and TemplateError when it cannot be trusted
        with it.
        """
        contents = [self._visible(role, content) for role, content in messages]
        marker = self._fresh_marker(contents)
        # A stray part of a content has no marker around it. With one inside every special token's text, it has none
        # of those.
        marked = [self._mark_starts.sub(lambda start: f"{start[0]}{marker}|", content) for content in contents]
        wrapped = [f"{marker}{index:08x}<{content}{marker}{index:08x}>" for index, content in enumerate(marked)]
        conversation = [{"role": role, "content": text} for (role, _), text in zip(messages, wrapped, strict=True)]
        rendered = self._evaluate(conversation, marker, limit=sum(map(len, wrapped)) + MAX_OVERHEAD)
        return _cut(rendered, marker, contents, marked)

    def _visible(self, role: str, content: str) -> str:
        """Templates of reasoning models drop an old answer's thinking by splitting it at ``</think>``, which would
        tear a pair of markers: done here.
        """
        if role == "assistant" and _THINK_END in self._source:
            return content.rpartition(_THINK_END)[2]
        return content

    def _fresh_marker(self, contents: Sequence[str]) -> str:
        while True:
            marker = secrets.token_hex(16)
            if not any(marker in text for text in (self._source, *self._constant_texts(), *contents)):
                return marker

    def _constant_texts(self) -> list[str]:
        return [text for text in self._constants.values() if isinstance(text, str)]

    def _evaluate(self, conversation: list[dict[str, str]], marker: str, *, limit: int) -> str:
        pieces: list[str] = []
        length = 0
        try:
            for piece in self._template.generate(messages=conversation, **self._constants):
                length += len(piece)
                if length > limit:
                    raise TemplateError("the chat template writes too much", expected=f"<= {limit} characters")
                pieces.append(piece)
        except _Refusal as refusal:
            reason = refusal.reason
            if marker in reason or len(reason) > 256 or not reason.isprintable():
                reason = "it gives no reason that can be shown"
            raise InvalidRequest(f"the model's chat template refuses the conversation: {reason}") from refusal
        except TemplateError:
            raise
        except Exception as error:  # a template is a program: it can fail in every way that one can
            raise TemplateError(f"the chat template fails on this conversation ({type(error).__name__})") from error
        return "".join(pieces)


def _cut(rendered: str, marker: str, contents: Sequence[str], marked: Sequence[str]) -> list[Segment]:
    """Cuts at the markers, and insists that every content stands there exactly once and as it was marked."""
    segments: list[Segment] = []
    seen: set[int] = set()
    position = 0
    for opening in re.finditer(f"{marker}([0-9a-f]{{8}})<", rendered):
        if opening.start() < position:
            raise TemplateError("the chat template puts one message into another")
        index = int(opening[1], 16)
        if index in seen:
            raise TemplateError("the chat template repeats a message", expected="once", got=f"message {index} again")
        seen.add(index)
        closing = f"{marker}{index:08x}>"
        end = opening.end() + len(marked[index])
        if not (rendered.startswith(marked[index], opening.end()) and rendered.startswith(closing, end)):
            raise TemplateError(
                "the chat template changes a message", expected="as it was sent", got=f"message {index} changed"
            )
        segments.append(Segment(rendered[position : opening.start()], trusted=True))
        segments.append(Segment(contents[index], trusted=False))
        position = end + len(closing)
    segments.append(Segment(rendered[position:], trusted=True))
    missing = sorted(set(range(len(contents))) - seen)
    if missing:
        raise TemplateError(
            "the chat template has no place for a message", got=f"message {missing[0]} is lost or changed"
        )
    if any(marker in segment.text for segment in segments):
        raise TemplateError("the chat template takes a message apart")
    return [segment for segment in segments if segment.text]


# --- The sandbox -----------------------------------------------------------------------------------------------------


class _Refusal(Exception):
    """The template called ``raise_exception``."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


def _refuse(reason: object) -> NoReturn:
    raise _Refusal(str(reason))


def _bounded_range(*arguments: int) -> range:
    numbers = range(*arguments)
    if len(numbers) > MAX_RANGE:
        raise SecurityError(f"a range of more than {MAX_RANGE}")
    return numbers


class _Environment(ImmutableSandboxedEnvironment):
    """Jinja's sandbox, where an expression cannot make much out of little either."""

    intercepted_binops = frozenset({"*", "**", "%"})

    def call_binop(self, context: jinja2.runtime.Context, operator: str, left: Any, right: Any) -> Any:
        if not isinstance(left, int | float) or not isinstance(right, int | float):
            size = _repeated(left, right) if operator == "*" else MAX_FACTOR + 1
            if size > MAX_FACTOR:
                raise SecurityError(f"{operator} would make too much")
        elif operator == "**" and (abs(left) > MAX_FACTOR or not -64 <= right <= 64):
            raise SecurityError("** would make too much")
        apply: Callable[[Any, Any], Any] = self.binop_table[operator]
        return apply(left, right)


def _repeated(left: Any, right: Any) -> int:
    """Elements of ``text * count`` or ``list * count``, either way round."""
    sequence, count = (left, right) if isinstance(right, int) else (right, left)
    if not isinstance(count, int) or not isinstance(sequence, str | list | tuple):
        return MAX_FACTOR + 1
    return len(sequence) * count
