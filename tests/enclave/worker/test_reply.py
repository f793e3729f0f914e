"""From tokens to content, reasoning and calls: however a text is cut, the same comes out."""

from __future__ import annotations

import itertools
import json
import string
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from enclave.worker.answer import AnswerText
from enclave.worker.reply import MAX_HELD_LOGPROBS, PLAIN, Reading, Reply
from enclave.worker.scheduler import Sampled
from enclave.worker.tool_calls import BARE, DEEPSEEK, HERMES, LLAMA, CallReader, CallSyntax
from vsockrpc.messages import Delta, FinishReason

TOOLS = ("weather", "clock")
PARIS = '{"city": "Paris"}'
REASONS = Reading(reasons=True)


@dataclass(frozen=True)
class Answer:
    """All of a reply, its channels joined."""

    content: str
    reasoning: str
    calls: tuple[tuple[str, str], ...]
    finish_reason: FinishReason


def reader(syntax: CallSyntax, *, is_certain: bool = False, most: int = 128) -> CallReader:
    return CallReader(syntax, TOOLS, is_certain=is_certain, most=most)


def deltas_of(reply: Reply, pieces: Iterable[bytes]) -> tuple[list[Delta], FinishReason]:
    """As the scheduler drives it."""
    deltas: list[Delta | None] = []
    reason: FinishReason = "length"
    for piece in pieces:
        deltas.append(reply.push(Sampled(0, piece, ends=False)))
        if reply.ended:
            reason = "stop"
            break
    else:
        reason = "stop"
    last, reason = reply.finish(reason)
    return [delta for delta in (*deltas, last) if delta is not None], reason


def joined(deltas: Sequence[Delta], reason: FinishReason) -> Answer:
    calls: list[tuple[str, str]] = []
    identities = set()
    for part in (part for delta in deltas for part in delta.tool_calls):
        if part.id is not None and part.name is not None:
            assert part.index == len(calls)
            assert part.id.startswith("call_")
            assert len(part.id) == 29
            assert set(part.id[5:]) <= set(string.ascii_letters + string.digits)
            identities.add(part.id)
            calls.append((part.name, part.arguments))
        else:
            assert part.index == len(calls) - 1
            calls[-1] = (calls[-1][0], calls[-1][1] + part.arguments)
    assert len(identities) == len(calls)
    content, reasoning = ("".join(getattr(delta, name) for delta in deltas) for name in ("content", "reasoning"))
    return Answer(content, reasoning, tuple(calls), reason)


def answer(reply: Reply, *pieces: bytes | str) -> Answer:
    return joined(*deltas_of(reply, (piece.encode() if isinstance(piece, str) else piece for piece in pieces)))


def cuts(text: str, places: Iterable[int]) -> list[bytes]:
    data = text.encode()
    edges = [0, *sorted({place % (len(data) + 1) for place in places}), len(data)]
    return [data[start:end] for start, end in itertools.pairwise(edges)]


# --- However the text is cut ----------------------------------------------------------------------------------------

FRAGMENTS = (
    "<think>",
    "</think>",
    "<th",
    "</",
    "<tool_call>",
    "</tool_call>",
    "<tool",
    '{"name": "weather", "arguments": {}}',
    '{"name": "weather", "parameters": {"a": "}<{"}}',
    "<|python_tag|>",
    "<｜tool▁calls▁begin｜>",
    "<｜tool▁call▁begin｜>",
    "function<｜tool▁sep｜>clock\n```json\n{}\n```",
    "<｜tool▁call▁end｜>",
    "<｜tool▁calls▁end｜>",
    "<｜tool",
    "\n",
    "  ",
    ";",
    '{"',
    '"}',
    "{",
    "}",
    '\\"',
    "Hello",
    "STOP",
    "ST",
    "é",
    "🦊",
    "```",
    "\t" * 40,
)
texts = st.lists(st.one_of(st.sampled_from(FRAGMENTS), st.text(max_size=4)), max_size=12).map("".join)
readings = st.builds(Reading, reasons=st.booleans(), echo=st.sampled_from(["", "Once"])).flatmap(
    lambda reading: st.booleans().map(lambda is_open: replace(reading, is_open=reading.reasons and is_open))
)
syntaxes = st.sampled_from([None, HERMES, LLAMA, DEEPSEEK, BARE])
stops = st.lists(st.sampled_from(["STOP", "\n\n", "o", "<tool_call>", "🦊", "</", "Onc"]), max_size=3)


@given(texts, st.lists(st.integers(0, 400), max_size=30), readings, syntaxes, st.sampled_from([1, 128]), stops)
def test_the_same_comes_out_however_the_text_is_cut(
    text: str, places: list[int], reading: Reading, syntax: CallSyntax | None, most: int, stop: list[str]
) -> None:
    def reply() -> Reply:
        return Reply(stop, reading, None if syntax is None else reader(syntax, most=most))

    whole = answer(reply(), text)
    assert answer(reply(), *cuts(text, places)) == whole
    assert answer(reply(), *(bytes([byte]) for byte in text.encode())) == whole
    assert not any(each in whole.content.removeprefix(reading.echo) for each in stop)


@given(texts, syntaxes)
def test_nothing_is_lost(text: str, syntax: CallSyntax | None) -> None:
    """Without calls and reasoning, the content is the text; with calls, no other text is changed."""
    got = answer(Reply((), PLAIN, None if syntax is None else reader(syntax)), text)
    if not got.calls:
        assert got.content == text
    position = 0
    for part in got.content.split():
        assert part in text[position:] or got.calls


@given(st.binary(max_size=40), st.lists(st.integers(0, 40), max_size=10))
def test_characters_never_split_and_broken_ones_are_replaced(data: bytes, places: list[int]) -> None:
    edges = [0, *sorted(place % (len(data) + 1) for place in places), len(data)]
    pieces = [data[start:end] for start, end in itertools.pairwise(edges)]
    assert answer(Reply(), *pieces).content == data.decode("utf-8", "replace")


@given(texts, stops.filter(bool))
def test_what_is_shown_of_an_answer_with_stops_is_a_beginning_of_it(text: str, stop: list[str]) -> None:
    got = answer(Reply(stop), *(bytes([byte]) for byte in text.encode())).content
    assert text.startswith(got)
    if not any(each in text for each in stop):
        assert got == text


# --- Reasoning ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("reading", "text", "reasoning", "content"),
    [
        (REASONS, "<think>\nWhy?\n</think>\n\nSo.", "Why?", "So."),
        (REASONS, "\n<think>Why?</think>So.", "Why?", "So."),
        (REASONS, "So </think> it is. <think>", "", "So </think> it is. <think>"),
        (REASONS, " So.", "", " So."),
        (REASONS, "<thin", "", "<thin"),
        (REASONS, "<think></think>\n\nSo.\n", "", "So.\n"),
        (REASONS, "<think>a</think>b<think>c</think>d", "a", "b<think>c</think>d"),
        (PLAIN, "<think>a</think>b", "", "<think>a</think>b"),
        (Reading(reasons=True, is_open=True), "Why?\n\nHow?\n</think>\n\nSo.", "Why?\n\nHow?", "So."),
        (Reading(reasons=True, is_open=True), "Why <thi", "Why <thi", ""),
        (Reading(reasons=True, is_open=True), "Why </thi", "Why </thi", ""),
        (Reading(reasons=True, is_open=True), "\n\n", "", ""),
    ],
)
def test_reasoning_is_told_from_content(reading: Reading, text: str, reasoning: str, content: str) -> None:
    assert answer(Reply((), reading), text) == Answer(content, reasoning, (), "stop")


def test_an_answer_that_ends_while_it_thinks_is_all_reasoning() -> None:
    reply = Reply((), Reading(reasons=True, is_open=True))
    delta = reply.push(Sampled(0, b"On the one hand", ends=False))
    assert delta == Delta(reasoning="On the one hand")
    assert reply.finish("length") == (None, "length")
    assert reply.reasoning_tokens == 1


def test_stop_strings_do_not_stop_the_thinking() -> None:
    reply = Reply(("STOP",), Reading(reasons=True, is_open=True))
    assert answer(reply, "STOP? </think>Yes. STOP.") == Answer("Yes. ", "STOP?", (), "stop")


def forced(reply: Reply) -> str | None:
    return reply.forced


def push_all(reply: Reply, *pieces: str) -> None:
    for piece in pieces:
        reply.push(Sampled(0, piece.encode(), ends=False))


def test_the_budget_of_reasoning_is_kept() -> None:
    reply = Reply((), Reading(reasons=True, is_open=True, budget=3))
    push_all(reply, "a", " b")
    assert forced(reply) is None
    push_all(reply, " c")
    assert forced(reply) == "\n</think>\n\n"
    push_all(reply, "\n", "</", "think", ">", "\n\n")
    assert forced(reply) is None
    assert reply.reasoning_tokens == 3
    assert answer(reply, "So.") == Answer("So.", "", (), "stop")


def test_a_budget_of_nothing_ends_what_a_template_opens() -> None:
    reply = Reply((), Reading(reasons=True, is_open=True, budget=0))
    assert forced(reply) == "\n</think>\n\n"
    assert answer(reply, "\n</think>\n\n", "So.") == Answer("So.", "", (), "stop")
    assert reply.reasoning_tokens == 0


def test_the_budget_does_not_end_a_character() -> None:
    reply = Reply((), Reading(reasons=True, is_open=True, budget=1))
    reply.push(Sampled(0, "é".encode()[:1], ends=False))
    assert forced(reply) is None
    reply.push(Sampled(0, "é".encode()[1:], ends=False))
    assert forced(reply) is not None


def test_reasoning_tokens_are_those_between_the_marks() -> None:
    reply = Reply((), REASONS)
    push_all(reply, "<think>", "a", "b", "</think>", "c")
    assert reply.reasoning_tokens == 2


def test_the_grammar_governs_what_is_behind_the_reasoning() -> None:
    reply = Reply((), Reading(reasons=True, is_open=True, has_grammar=True))
    push_all(reply, "Hm")
    assert (reply.is_constrained, reply.forced_at_end) == (False, "\n</think>\n\n")
    delta = reply.push(Sampled(0, b'.</think>{"', ends=False))
    assert delta == Delta(reasoning=".")  # what no grammar has seen is not shown
    assert (reply.is_constrained, reply.forced_at_end) == (True, None)
    assert reply.push(Sampled(0, b"{}", ends=False)) == Delta("{}")


def test_a_grammar_governs_an_answer_from_its_beginning_where_the_model_does_not_reason() -> None:
    for reading in (Reading(has_grammar=True), Reading(reasons=True, has_grammar=True)):
        assert Reply((), reading).is_constrained
    assert not Reply((), PLAIN).is_constrained


def test_a_model_that_reasons_by_itself_is_made_to_before_a_grammar_governs() -> None:
    reply = Reply((), Reading(reasons=True, must_open=True, has_grammar=True))
    assert not reply.is_constrained
    assert forced(reply) == "<think>\n"
    push_all(reply, "<think>", "\n")
    assert forced(reply) is None
    assert answer(reply, "Hm</think>", "{}") == Answer("{}", "Hm", (), "stop")


# --- Calls ----------------------------------------------------------------------------------------------------------


def hermes(name: str, arguments: str) -> str:
    return f'<tool_call>\n{{"name": "{name}", "arguments": {arguments}}}\n</tool_call>'


DEEPSEEK_CALL = "<｜tool▁call▁begin｜>function<｜tool▁sep｜>weather\n```json\n" + PARIS + "\n```<｜tool▁call▁end｜>"
RECORDED = [
    # Qwen2.5's and Qwen3's chat templates, and Hermes 2 Pro's: <tool_call>, a line with the name and the arguments as
    # one JSON object, </tool_call>; each further call on a line of its own; content may stand before them.
    pytest.param(HERMES, hermes("weather", PARIS), "", [("weather", PARIS)], id="Qwen2.5"),
    pytest.param(
        HERMES,
        "I look.\n" + hermes("weather", PARIS) + "\n",
        "I look.\n",
        [("weather", PARIS)],
        id="Qwen2.5 with content",
    ),
    pytest.param(
        HERMES,
        "\n" + hermes("weather", "{}") + "\n" + hermes("clock", "{}"),
        "",
        [("weather", "{}"), ("clock", "{}")],
        id="Qwen2.5 in parallel",
    ),
    # The same, of a model that ends its turn without the closing mark: the object is whole.
    pytest.param(HERMES, hermes("clock", "{}").removesuffix("</tool_call>"), "", [("clock", "{}")], id="unclosed"),
    # Hermes 2 Pro's prompt asks for {"arguments": ..., "name": ...} in this order.
    pytest.param(
        HERMES,
        '<tool_call>{"arguments": {"a": [1, {"b": "</tool_call>"}]}, "name": "clock"}</tool_call>',
        "",
        [("clock", '{"a": [1, {"b": "</tool_call>"}]}')],
        id="Hermes 2 Pro",
    ),
    pytest.param(
        HERMES,
        hermes("clock", '{"text": "\\"{\\u00e9🦊\\\\"}'),
        "",
        [("clock", '{"text": "\\"{\\u00e9🦊\\\\"}')],
        id="Qwen2.5 with escapes",
    ),
    # Llama 3.1's and 3.2's chat templates ask for {"name": function name, "parameters": dictionary of argument name and
    # its value}; <|python_tag|> is what 3.1's puts before calls where built-in tools are on, and "type" comes from the
    # definitions in the prompt. More than one call is nothing that the templates know: with "; " between is how the
    # models write them.
    pytest.param(
        LLAMA, '{"name": "weather", "parameters": {"city": "Paris"}}', "", [("weather", PARIS)], id="Llama 3.1"
    ),
    pytest.param(
        LLAMA,
        '<|python_tag|>{"type": "function", "name": "weather", "parameters": {"city": "Paris"}}',
        "",
        [("weather", PARIS)],
        id="Llama 3.1 with its tag",
    ),
    pytest.param(
        LLAMA,
        '{"name": "weather", "parameters": {}}; {"name": "clock", "parameters": {}}',
        "",
        [("weather", "{}"), ("clock", "{}")],
        id="Llama 3.2 in parallel",
    ),
    # DeepSeek-R1's chat template, which the distills have: type, separator, name, and a fenced block of JSON.
    pytest.param(
        DEEPSEEK,
        f"<｜tool▁calls▁begin｜>{DEEPSEEK_CALL}<｜tool▁calls▁end｜>",
        "",
        [("weather", PARIS)],
        id="DeepSeek-R1",
    ),
    pytest.param(
        DEEPSEEK,
        f"I look.<｜tool▁calls▁begin｜>{DEEPSEEK_CALL}\n{DEEPSEEK_CALL}<｜tool▁calls▁end｜>",
        "I look.",
        [("weather", PARIS), ("weather", PARIS)],
        id="DeepSeek-R1 in parallel, with content",
    ),
]


@pytest.mark.parametrize(("syntax", "text", "content", "calls"), RECORDED)
def test_calls_as_models_write_them(syntax: CallSyntax, text: str, content: str, calls: list[tuple[str, str]]) -> None:
    """By hand after the published formats, which stand beside them: no model of these families ran here."""
    expected = Answer(content, "", tuple(calls), "tool_calls")
    assert answer(Reply((), PLAIN, reader(syntax)), text) == expected
    assert answer(Reply((), PLAIN, reader(syntax)), *(bytes([byte]) for byte in text.encode())) == expected


@pytest.mark.parametrize(
    ("syntax", "text"),
    [
        (HERMES, "<tool_call>weather</tool_call>"),
        (HERMES, '<tool_call>{"name": "weather"}</tool_call>'),
        (HERMES, '<tool_call>{"name": "nothing", "arguments": {}}</tool_call>'),
        (HERMES, '<tool_call>{"name": ["weather"], "arguments": {}}</tool_call>'),
        (HERMES, '<tool_call>{"name": "weather", "arguments": "Paris"}</tool_call>'),
        (HERMES, '<tool_call>{"name": "weather", "arguments": {}, "parameters": {}}</tool_call>'),
        (HERMES, '<tool_call>{"name": "weather", "name": "clock", "arguments": {}}</tool_call>'),
        (HERMES, '<tool_call>{"name": "weather", "arguments": {"a": NaN}}</tool_call>'),
        (HERMES, '<tool_call>{"name": "weather" "arguments": {}}</tool_call>'),
        (HERMES, '<tool_call>{"name": "weather", "arguments": {]}</tool_call>'),
        (HERMES, "<tool_call>{1: 2}</tool_call>"),
        (HERMES, '<tool_call>{"type": "city", "name": "weather", "arguments": {}}</tool_call>'),
        (HERMES, '<tool_call>{"name": "weather", "arguments": {}} and more'),
        (HERMES, '<tool_call>{"name": "weather", "arguments": {"city": "Par'),
        (HERMES, '<tool_call>{"name": "weather", "arguments": ' + "[" * 5000 + "]" * 5000 + "}</tool_call>"),
        (HERMES, "<tool_call>\n"),
        (HERMES, "<tool_call"),
        (LLAMA, '{"name": "Bob", "parameters": {}}'),
        (LLAMA, 'It is {"name": "weather", "parameters": {}}'),
        (LLAMA, '{"name": "weather"'),
        (LLAMA, "<|python_tag|>print(1)"),
        (LLAMA, "<|pyth"),
        (DEEPSEEK, "<｜tool▁call▁begin｜>function<｜tool▁sep｜>nothing\n```json\n{}\n```<｜tool▁call▁end｜>"),
        (DEEPSEEK, "<｜tool▁call▁begin｜>function<｜tool▁sep｜>weather\n```json\n{,}\n```<｜tool▁call▁end｜>"),
        (DEEPSEEK, "<｜tool▁call▁begin｜>" + "x" * 300),
        (DEEPSEEK, "<｜tool▁calls▁end｜>"),
        (DEEPSEEK, "<｜tool▁calls▁begin｜>"),
    ],
)
def test_what_only_looks_like_a_call_is_content_and_whole(syntax: CallSyntax, text: str) -> None:
    assert answer(Reply((), PLAIN, reader(syntax)), text) == Answer(text, "", (), "stop")


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=10,
)


@given(st.dictionaries(st.text(), json_values, max_size=4), st.booleans(), st.booleans(), st.lists(st.integers(0, 300)))
def test_arguments_come_out_as_they_are_written(
    arguments: dict[str, object], is_ascii: bool, is_certain: bool, places: list[int]
) -> None:
    written = json.dumps(arguments, ensure_ascii=is_ascii)
    for syntax, text in (
        (HERMES, hermes("weather", written) + hermes("clock", written)),
        (LLAMA, f'{{"name": "weather", "parameters": {written}}};{{"name": "clock", "parameters": {written}}}'),
    ):
        reply = Reply((), Reading(has_grammar=is_certain), reader(syntax, is_certain=is_certain))
        calls = (("weather", written), ("clock", written))
        assert answer(reply, *cuts(text, places)) == Answer("", "", calls, "tool_calls")


def test_certain_calls_come_out_as_they_are_written() -> None:
    reply = Reply((), Reading(has_grammar=True), reader(HERMES, is_certain=True))
    deltas, reason = deltas_of(reply, (character.encode() for character in hermes("weather", PARIS)))
    parts = [part.arguments for delta in deltas for part in delta.tool_calls]
    assert parts == list(PARIS)
    assert joined(deltas, reason) == Answer("", "", (("weather", PARIS),), "tool_calls")


def test_a_certain_call_that_is_cut_short_keeps_what_it_has() -> None:
    reply = Reply((), Reading(has_grammar=True), reader(HERMES, is_certain=True))
    delta = reply.push(Sampled(0, b'<tool_call>\n{"name": "weather", "arguments": {"ci', ends=False))
    assert delta is not None
    assert [(part.name, part.arguments) for part in delta.tool_calls] == [("weather", '{"ci')]
    assert reply.finish("length") == (None, "length")


def test_one_call_is_the_end_where_only_one_may_be() -> None:
    for pieces in ([hermes("clock", "{}"), "\nmore"], [hermes("clock", "{}") + "\nmore"]):
        reply = Reply((), PLAIN, reader(HERMES, most=1))
        assert answer(reply, *pieces) == Answer("", "", (("clock", "{}"),), "tool_calls")
        assert reply.ended


def test_what_went_out_of_a_certain_call_stays_one() -> None:
    reply = Reply((), PLAIN, reader(HERMES, is_certain=True))
    text = hermes("clock", "{}").replace("</tool_call>", "so")
    assert answer(reply, text) == Answer("so", "", (("clock", "{}"),), "tool_calls")


def test_nothing_comes_behind_a_stop_string() -> None:
    text = AnswerText(("STOP",))
    assert (text.push("a STOP b"), text.push("c"), text.finish()) == ("a ", "", "")


def test_a_stop_string_before_a_call_is_the_end() -> None:
    for pieces in (["So. STOP" + hermes("clock", "{}")], ["So. STOP", hermes("clock", "{}")]):
        assert answer(Reply(("STOP",), PLAIN, reader(HERMES)), *pieces) == Answer("So. ", "", (), "stop")


def test_calls_come_behind_reasoning() -> None:
    text = "<think>" + hermes("weather", "{}") + "</think>\n\n" + hermes("clock", "{}")
    expected = Answer("", hermes("weather", "{}"), (("clock", "{}"),), "tool_calls")
    assert answer(Reply((), REASONS, reader(HERMES)), text) == expected


# --- Log probabilities, echo ----------------------------------------------------------------------------------------


def logged(piece: str) -> Sampled:
    return Sampled(0, piece.encode(), False, (-1.0, [(piece.encode(), -1.0)]))


def told(deltas: Iterable[Delta | None]) -> list[bytes]:
    return [token.token for delta in deltas if delta is not None for token in delta.logprobs]


def test_log_probabilities_are_those_of_the_content() -> None:
    reply = Reply((), REASONS)
    pieces = ["<think>", "Hm", "</think>", "\n\n", "So", "."]
    assert told([*(reply.push(logged(piece)) for piece in pieces), reply.finish("stop")[0]]) == [b"So", b"."]
    reply = Reply((), PLAIN, reader(HERMES))
    pieces = ["I", "<tool_call>", '{"name": "clock", "arguments": {}}', "</tool_call>"]
    assert told([*(reply.push(logged(piece)) for piece in pieces), reply.finish("stop")[0]]) == [b"I"]
    reply = Reply((), PLAIN, reader(HERMES))
    pieces = ["I", "<tool_call>", "no"]
    assert told([*(reply.push(logged(piece)) for piece in pieces), reply.finish("stop")[0]]) == [
        piece.encode() for piece in pieces
    ]


def test_log_probabilities_come_with_the_text_that_they_made_certain() -> None:
    reply = Reply(("END",))
    assert reply.push(logged("E")) is None
    delta = reply.push(logged("F"))
    assert delta is not None
    assert (delta.content, told([delta])) == ("EF", [b"E", b"F"])
    reply.push(logged("E"))
    assert told([reply.finish("stop")[0]]) == [b"E"]


@pytest.mark.parametrize("pieces", [[""] * 100, ["a"] * 100], ids=["tokens of no text", "held back for a stop string"])
def test_log_probabilities_do_not_wait_for_ever(pieces: list[str]) -> None:
    reply = Reply(("a" * 200 + "b",))
    deltas = [reply.push(logged(piece)) for piece in pieces]
    assert [len(delta.logprobs) for delta in deltas if delta is not None] == [MAX_HELD_LOGPROBS] * 6
    assert len(told([*deltas, reply.finish("stop")[0]])) == 100


def test_an_open_call_holds_no_log_probabilities() -> None:
    """Neither as long as it is one, nor when it was none."""
    call = ["<tool_call>", '{"name": "clock", "arguments": {"a": "', *["x"] * 100]
    reply = Reply((), PLAIN, reader(HERMES))
    deltas = [reply.push(logged(piece)) for piece in ["I", *call]]
    assert len(reply._logprobs) < MAX_HELD_LOGPROBS
    assert told([*deltas, reply.push(logged('"}}</tool_call>')), reply.finish("stop")[0]]) == [b"I"]
    reply = Reply((), PLAIN, reader(HERMES))
    last = [reply.push(logged(piece)) for piece in ["I", *call]][-1]
    assert last is None
    end, _ = reply.finish("stop")
    assert end is not None
    assert end.content == "".join(call)
    assert len(end.logprobs) < MAX_HELD_LOGPROBS


def test_an_echo_comes_first_and_stops_nothing() -> None:
    reply = Reply(("upon",), Reading(echo="Once upon"))
    assert answer(reply, " a", " upon") == Answer("Once upon a ", "", (), "stop")
    assert answer(Reply((), Reading(echo="Once"))) == Answer("Once", "", (), "stop")
