"""From a conversation to segments of a prompt, each either the template's or the client's: so that nobody can forge a
role.

A chat template turns messages into one string in which ``<|im_start|>system`` of the template and the same characters
typed by a person look alike. So whatever a client wrote (contents, tools, calls) is marked before rendering, and behind
it the string is cut at the marks (:mod:`enclave.worker.marks`). Only the template's segments are later tokenised with
special tokens parsed. A template that loses, repeats or changes a content is an error, not a guess.

The template is code (CVE-2024-34359). It is pinned by the manifest's digest, runs in the engine process, and in Jinja's
sandbox with bounds on its size, its output and its loops (:mod:`enclave.worker.template_sandbox`); what still goes
wrong there costs the engine process and nothing else.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Set
from dataclasses import dataclass
from typing import Final

from attestation.errors import StrongroomError
from attestation.manifest import MAX_TEMPLATE_SIZE
from attestation.model_family import REASONING_END, REASONING_START
from attestation.strict_json import Json, decode_foreign
from enclave.generation import InvalidRequest
from enclave.worker.marks import JsonText, LacksPlace, MarkError, Marks, Object, Segment, Text, to_json
from enclave.worker.template_sandbox import Refusal, compile_template
from vsockrpc.chat import ChatMessage, ChatRequest, Tool, ToolCall

__all__ = ["ChatTemplate", "Prompt", "Segment", "TemplateError"]

MAX_OVERHEAD: Final = 256 << 10
"""Characters that a template may add to what a client wrote."""
MAX_JSON_DEPTH: Final = 64
"""Of a tool's schema, and of a call's arguments."""
_NO_ARGUMENTS: Final[Mapping[str, object]] = {"type": "object", "properties": {}}
_KNOWS_NO_CONTENT: Final = re.compile(r"\bcontent['\"]?\]?\s+is\s+(not\s+)?none\b")


class TemplateError(StrongroomError):
    """The chat template is no template, or not one that can be trusted with a conversation. Its code is
    ``bad_template``.
    """

    def __init__(self, message: str, *, expected: object | None = None, got: object | None = None) -> None:
        super().__init__("bad_template", message, expected=expected, got=got)


@dataclass(frozen=True, slots=True)
class Prompt:
    """What a conversation becomes."""

    segments: tuple[Segment, ...]
    """In order, none empty."""
    opens_reasoning: bool = False
    """It ends inside the model's reasoning: the answer begins there."""
    ends_reasoning: bool = False
    """It ends behind reasoning that the template wrote, usually none: the answer is to begin without."""
    dropped_messages: int = 0
    """The oldest ones, which did not fit."""


class ChatTemplate:
    """A compiled template. Construction raises TemplateError."""

    def __init__(self, source: str, *, bos: str, eos: str, mark_starts: Set[str]) -> None:
        """``bos`` and ``eos`` are the texts of the model's own tokens, which templates write out; ``mark_starts`` the
        characters with which the texts of its special tokens begin.
        """
        size = len(source.encode("utf-8", "surrogatepass"))
        if size > MAX_TEMPLATE_SIZE:
            raise TemplateError("the chat template is too large", expected=f"<= {MAX_TEMPLATE_SIZE} bytes", got=size)
        try:
            self._template = compile_template(source, to_json=to_json)
        except Exception as error:  # Jinja makes Python of it, and Python's compiler has refusals of its own
            raise TemplateError(f"the chat template does not compile ({type(error).__name__})") from error
        self._drops_reasoning = REASONING_END in source
        self._empty_content = None if _KNOWS_NO_CONTENT.search(source) else ""
        self._mark_starts = mark_starts
        self._constants = {"bos_token": bos, "eos_token": eos, "add_generation_prompt": True}

    def render(self, request: ChatRequest) -> Prompt:
        """The prompt that asks for the answer to ``request``. Tools are in it unless none may be called.

        Raises InvalidRequest when the template refuses the conversation, or has no place for its tools and calls, and
        TemplateError when it cannot be trusted with it.
        """
        try:
            return self._render(request, takes_apart=False)
        except (InvalidRequest, TemplateError) as error:
            if not any(message.tool_calls for message in request.messages):
                raise
            refusal = error
        try:  # it may be one of those that write a call's arguments one by one
            return self._render(request, takes_apart=True)
        except (InvalidRequest, TemplateError):
            raise refusal from refusal.__cause__

    def _render(self, request: ChatRequest, *, takes_apart: bool) -> Prompt:
        """``takes_apart``: the arguments of calls are objects, and otherwise the JSON text that the model wrote."""
        marks = Marks(self._mark_starts)
        try:
            variables = self._variables(request, marks, takes_apart=takes_apart)
            segments = marks.cut(self._evaluate(variables, marks))
        except LacksPlace as error:
            raise InvalidRequest(f"the model cannot do that: {error}") from error
        except MarkError as error:
            raise TemplateError(str(error)) from error
        last = segments[-1] if segments else Segment("", trusted=False)
        end = last.text.rstrip() if last.trusted else ""
        return Prompt(tuple(segments), end.endswith(REASONING_START), end.endswith(REASONING_END))

    def _evaluate(self, variables: Mapping[str, object], marks: Marks) -> str:
        pieces: list[str] = []
        length = 0
        try:
            for piece in self._template.generate(**variables):
                length += len(piece)
                if length > (limit := marks.size + MAX_OVERHEAD):
                    raise TemplateError("the chat template writes too much", expected=f"<= {limit} characters")
                pieces.append(piece)
        except Refusal as refusal:
            reason = refusal.reason
            if marks.marker in reason or len(reason) > 256 or not reason.isprintable():
                reason = "it gives no reason that can be shown"
            raise InvalidRequest(f"the model's chat template refuses the conversation: {reason}") from refusal
        except (TemplateError, MarkError):
            raise
        except Exception as error:  # a template is a program: it can fail in every way that one can
            raise TemplateError(f"the chat template fails on this conversation ({type(error).__name__})") from error
        return "".join(pieces)

    # --- What templates are given, in transformers' shape ------------------------------------------------------------

    def _variables(self, request: ChatRequest, marks: Marks, *, takes_apart: bool) -> dict[str, object]:
        calls: dict[str, str] = {}
        messages = [
            self._message(index, message, calls, marks, takes_apart=takes_apart)
            for index, message in enumerate(request.messages)
        ]
        # As llama.cpp's own server has it; templates without such a choice ignore enable_thinking.
        variables = {**self._constants, "messages": messages, "enable_thinking": request.reasoning_tokens != 0}
        if request.tools and request.tool_choice != "none":
            variables["tools"] = [_tool(index, tool, marks) for index, tool in enumerate(request.tools)]
        return variables

    def _message(
        self, index: int, message: ChatMessage, calls: dict[str, str], marks: Marks, *, takes_apart: bool
    ) -> dict[str, object]:
        """``calls`` has the names of the calls so far, by id."""
        content = self._visible(message)
        entry: dict[str, object] = {"role": message.role, "content": content}
        if content:
            entry["content"] = Text(marks, marks.owner(f"message {index}", least=1, most=1), content)
        free = marks.owner(f"an id in message {index}", least=0)
        if message.tool_calls:
            entry["content"] = entry["content"] or self._empty_content
            entry["tool_calls"] = [
                {
                    "id": Text(marks, free, call.id),
                    "type": "function",
                    "function": _function(f"call {number} of message {index}", call, marks, takes_apart=takes_apart),
                }
                for number, call in enumerate(message.tool_calls)
            ]
            calls |= {call.id: call.name for call in message.tool_calls}
        if message.tool_call_id is not None:
            if message.tool_call_id not in calls:
                raise InvalidRequest(f"message {index} answers a call that is in none before it")
            entry["tool_call_id"] = Text(marks, free, message.tool_call_id)
            entry["name"] = Text(marks, free, calls[message.tool_call_id])
        return entry

    def _visible(self, message: ChatMessage) -> str:
        """Templates of reasoning models drop an old answer's thinking by splitting it at ``</think>``, which would
        tear a pair of markers: done here.
        """
        if message.role == "assistant" and self._drops_reasoning:
            return message.content.rpartition(REASONING_END)[2]
        return message.content


def _function(what: str, call: ToolCall, marks: Marks, *, takes_apart: bool) -> dict[str, object]:
    """Of a call. Most templates ask for its arguments' JSON, and others write that as it is."""
    plain = _object(call.arguments, f"the arguments of {what}")
    named = marks.owner(what, least=1, is_optional=True)
    least, most = (1 if plain else 0, None) if takes_apart else (1, 1)
    told = marks.owner(f"the arguments of {what}", least=least, most=most, is_optional=True)
    arguments = Object(marks, told, plain) if takes_apart else JsonText(marks, told, call.arguments)
    return {"name": Text(marks, named, call.name), "arguments": arguments}


def _tool(index: int, tool: Tool, marks: Marks) -> Object:
    owner = marks.owner("tools", least=1, is_optional=True)
    parameters = (
        _NO_ARGUMENTS if tool.parameters is None else _object(tool.parameters, f"the parameters of tool {index}")
    )
    function = {"name": tool.name, "description": tool.description, "parameters": parameters}
    return Object(marks, owner, {"type": "function", "function": function})


def _object(text: str, what: str) -> dict[str, Json]:
    """Raises InvalidRequest for what is no JSON object."""
    try:
        value = decode_foreign(text.encode(), code="invalid_request", max_depth=MAX_JSON_DEPTH)
    except StrongroomError as error:
        raise InvalidRequest(f"{what} are no JSON", expected="a JSON object") from error
    if not isinstance(value, dict):
        raise InvalidRequest(f"{what} are no JSON object", expected="a JSON object", got=type(value).__name__)
    return value
