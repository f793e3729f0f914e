"""A model's answer, cut into tokens anywhere: the same comes out as of the whole."""

from __future__ import annotations

from dataclasses import dataclass, field

from enclave.worker.reply import Reading, Reply
from enclave.worker.scheduler import Sampled
from enclave.worker.tool_calls import BARE, DEEPSEEK, HERMES, LLAMA, CallReader
from vsockrpc.messages import Delta, FinishReason

SYNTAXES = (None, HERMES, LLAMA, DEEPSEEK, BARE)
STOPS = ((), ("END",), ("\n\n", "</"), ("<tool_call>", "ab", "b"))


@dataclass
class Answer:
    content: str = ""
    reasoning: str = ""
    calls: dict[int, tuple[str | None, str]] = field(default_factory=dict)
    reason: FinishReason = "stop"


def one_input(data: bytes) -> None:
    """How it is read, how it is cut, and then its text."""
    if len(data) < 4:
        return
    how, size, step, stops, *_ = data
    text = data[4:]
    pieces, start = [], 0
    while start < len(text):
        size = (size * 5 + step) % 23 + 1
        pieces.append(text[start : start + size])
        start += size
    whole, cut = (answer(how, stops, each) for each in ([text], pieces))
    assert whole == cut
    assert not any(stop in whole.content for stop in STOPS[stops % len(STOPS)])


def answer(how: int, stops: int, pieces: list[bytes]) -> Answer:
    syntax = SYNTAXES[how % len(SYNTAXES)]
    calls = None
    if syntax is not None:
        calls = CallReader(syntax, ("clock", "weather"), is_certain=how & 64 != 0, most=1 if how & 32 else 128)
    reading = Reading(reasons=how & 128 != 0, is_open=how & 144 == 144)
    reply, got = Reply(STOPS[stops % len(STOPS)], reading, calls), Answer()
    for piece in pieces:
        take(got, reply.push(Sampled(0, piece, ends=False)))
        if reply.ended:
            break
    delta, got.reason = reply.finish("stop")
    take(got, delta)
    return got


def take(answer: Answer, delta: Delta | None) -> None:
    if delta is None:
        return
    answer.content += delta.content
    answer.reasoning += delta.reasoning
    for call in delta.tool_calls:
        name, arguments = answer.calls.get(call.index, (call.name, ""))
        answer.calls[call.index] = (name, arguments + call.arguments)


def seeds() -> list[bytes]:
    call = '{"name": "clock", "arguments": {"a": "é}"}}'
    texts = (
        f"<think>Hm</think>\n\n<tool_call>\n{call}\n</tool_call>\n<tool_call>{call}</tool_call>",
        '<|python_tag|>{"name": "weather", "parameters": {}}; ' + call,
        "<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>function<｜tool▁sep｜>clock\n```json\n{}\n```<｜tool▁call▁end｜>"
        "<｜tool▁calls▁end｜>",
        "Once upon a time END",
    )
    return [bytes([how, 3, 7, how % 4]) + text.encode() for text in texts for how in (0, 1, 2, 3, 4, 33, 65, 129, 146)]
