"""The scheduler and the text of answers, without a model: whatever comes in whatever order, the rules hold."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from enclave.answer import AnswerText
from enclave.generation import ContextExceeded, Overloaded, TextDelta
from enclave.scheduler import PromptRead, Sampled, Scheduler, Step

# --- Text
# --------------------------------------------------------------------------------------------------------------


def expected_text(data: bytes, stops: Sequence[str]) -> tuple[str, bool]:
    """What comes out by the definition: character by character, until one completes a stop string."""
    text = data.decode("utf-8", "replace")
    for end in range(1, len(text) + 1):
        starts = [end - len(stop) for stop in stops if text[:end].endswith(stop)]
        if starts:
            return text[: min(starts)], True
    return text, False


def pieces_of(data: bytes, cuts: Sequence[int]) -> list[bytes]:
    edges = [0, *sorted(min(cut, len(data)) for cut in cuts), len(data)]
    return [data[start:end] for start, end in pairwise(edges)]


TEXTS = st.text("abcé🌞", max_size=24)
STOPS = st.lists(st.text("abcé🌞", min_size=1, max_size=4), max_size=4)
CUTS = st.lists(st.integers(0, 100), max_size=12)


@given(st.one_of(TEXTS.map(str.encode), st.binary(max_size=24)), STOPS, CUTS)
def test_the_pieces_boundaries_do_not_change_the_text(data: bytes, stops: list[str], cuts: list[int]) -> None:
    answer = AnswerText(stops)
    out: list[str] = []
    for piece in pieces_of(data, cuts):
        if not answer.stopped:
            out.append(answer.push(piece))
    if not answer.stopped:
        out.append(answer.finish())
    assert ("".join(out), answer.stopped) == expected_text(data, stops)


@given(TEXTS.map(str.encode), STOPS, CUTS)
def test_what_came_out_is_never_the_beginning_of_a_stop_string_that_follows(
    data: bytes, stops: list[str], cuts: list[int]
) -> None:
    answer = AnswerText(stops)
    whole, _ = expected_text(data, stops)
    out = ""
    for piece in pieces_of(data, cuts):
        out += answer.push(piece)
        assert whole.startswith(out)


def test_a_stop_string_may_straddle_tokens_and_is_held_back() -> None:
    answer = AnswerText(["STOP"])
    assert [answer.push(piece) for piece in (b"say S", b"T", b"A", b" ST", b"OP and more")] == [
        "say ",
        "",
        "STA",
        " ",
        "",
    ]
    assert answer.stopped
    assert answer.finish() == ""


def test_a_character_may_straddle_tokens() -> None:
    answer = AnswerText()
    sun = "🌞".encode()
    assert [answer.push(sun[:1]), answer.push(sun[1:3]), answer.push(sun[3:] + b"!")] == ["", "", "🌞!"]
    assert answer.push(sun[:2]) + answer.finish() == "\ufffd"


# --- The scheduler
# -------------------------------------------------------------------------------------------------------

SAMPLED = Sampled(7, b"ab", ends=False)
END = Sampled(2, b"", ends=True)


def run(scheduler: Scheduler, *sampled: Sampled) -> list[tuple[Step, Sequence[object]]]:
    """Carries out steps until there are none; samples come from ``sampled``, the last of them for ever."""
    steps: list[tuple[Step, Sequence[object]]] = []
    left = list(sampled)
    while (step := scheduler.plan()) is not None:
        token = None
        if step.samples:
            token = left.pop(0) if len(left) > 1 else left[0]
        steps.append((step, scheduler.apply(step, token)))
    return steps


def test_a_prompt_is_read_in_chunks_and_sampled_from_its_last_token() -> None:
    scheduler = Scheduler(context=100, chunk=4, queue=1)
    scheduler.admit(1, list(range(10)), max_tokens=2, stop=())
    steps = run(scheduler, SAMPLED)
    assert [(list(step.tokens), step.start, step.samples) for step, _ in steps] == [
        ([0, 1, 2, 3], 0, False),
        ([4, 5, 6, 7], 4, False),
        ([8, 9], 8, True),
        ([7], 10, True),
    ]
    assert [list(outputs) for _, outputs in steps] == [
        [PromptRead()],
        [PromptRead()],
        [TextDelta("ab")],
        [TextDelta("ab"), Finished("length", 10, 2)],
    ]
    assert scheduler.idle


def test_an_end_token_is_not_counted_and_releases_what_was_held() -> None:
    scheduler = Scheduler(context=100, chunk=4, queue=1)
    scheduler.admit(1, [1], max_tokens=None, stop=("abc",))
    assert [list(outputs) for _, outputs in run(scheduler, SAMPLED, END)] == [
        [],
        [TextDelta("ab"), Finished("stop", 1, 1)],
    ]


def test_a_stop_string_ends_the_answer() -> None:
    scheduler = Scheduler(context=100, chunk=4, queue=1)
    scheduler.admit(1, [1], max_tokens=None, stop=("ba",))
    assert [list(outputs) for _, outputs in run(scheduler, SAMPLED)] == [[TextDelta("a")], [Finished("stop", 1, 2)]]


def test_a_stop_string_that_the_last_bytes_complete_is_a_stop() -> None:
    scheduler = Scheduler(context=100, chunk=4, queue=1)
    scheduler.admit(1, [1], max_tokens=1, stop=("\ufffd",))
    assert [list(outputs) for _, outputs in run(scheduler, Sampled(9, b"a\xf0\x9f", ends=False))] == [
        [TextDelta("a"), Finished("stop", 1, 1)]
    ]


@pytest.mark.parametrize(("prompt", "tokens"), [(1, 7), (6, 2), (7, 1)])
def test_the_context_bounds_the_answer(prompt: int, tokens: int) -> None:
    scheduler = Scheduler(context=8, chunk=8, queue=1)
    scheduler.admit(1, [0] * prompt, max_tokens=1000, stop=())
    steps = run(scheduler, SAMPLED)
    assert steps[-1][1][-1] == Finished("length", prompt, tokens)
    assert all(step.start + len(step.tokens) <= 8 for step, _ in steps)


def test_a_prompt_without_room_for_an_answer_is_refused() -> None:
    scheduler = Scheduler(context=8, chunk=8, queue=1)
    with pytest.raises(ContextExceeded) as caught:
        scheduler.admit(1, [0] * 8, max_tokens=1, stop=())
    assert (caught.value.expected, caught.value.got) == ("<= 7 tokens", "8 tokens")
    assert scheduler.idle


def test_a_result_that_was_not_planned_is_refused() -> None:
    scheduler = Scheduler(context=8, chunk=8, queue=1)
    scheduler.admit(1, [0], max_tokens=3, stop=())
    step = scheduler.plan()
    assert step is not None
    with pytest.raises(ValueError, match="not the result"):
        scheduler.apply(step, None)
    scheduler.apply(step, SAMPLED)
    with pytest.raises(ValueError, match="not the result"):
        scheduler.apply(step, SAMPLED)


class Machine(RuleBasedStateMachine):
    """Any interleaving of arrivals, steps and cancellations, against a plain list of what should be there."""

    CONTEXT, CHUNK, QUEUE = 24, 5, 3

    def __init__(self) -> None:
        super().__init__()
        self.scheduler = Scheduler(context=self.CONTEXT, chunk=self.CHUNK, queue=self.QUEUE)
        self.next = 0
        self.order: list[int] = []
        self.prompts: dict[int, list[int]] = {}
        self.budgets: dict[int, int] = {}
        self.fed: dict[int, list[int]] = {}
        self.sampled: dict[int, int] = {}

    @rule(
        size=st.integers(1, 30), max_tokens=st.none() | st.integers(1, 12), stop=st.sampled_from([(), ("ba",), ("zz",)])
    )
    def admit(self, size: int, max_tokens: int | None, stop: tuple[str, ...]) -> None:
        number, prompt = self.next, list(range(100, 100 + size))
        try:
            self.scheduler.admit(number, prompt, max_tokens=max_tokens, stop=stop)
        except ContextExceeded:
            assert size >= self.CONTEXT
            return
        except Overloaded:
            assert len(self.order) == self.QUEUE + 1
            return
        assert size < self.CONTEXT
        assert len(self.order) <= self.QUEUE
        self.next += 1
        self.order.append(number)
        self.prompts[number], self.fed[number], self.sampled[number] = prompt, [], 0
        self.budgets[number] = min(max_tokens or self.CONTEXT, self.CONTEXT - size)

    @precondition(lambda self: self.order)
    @rule(data=st.data())
    def cancel(self, data: st.DataObject) -> None:
        number = data.draw(st.sampled_from(self.order))
        assert self.scheduler.cancel(number)
        assert not self.scheduler.cancel(number)
        self.order.remove(number)

    @precondition(lambda self: self.order)
    @rule(token=st.sampled_from([SAMPLED, Sampled(8, b"\xf0\x9f", ends=False), Sampled(9, b"", ends=False), END]))
    def step(self, token: Sampled) -> None:
        step = self.scheduler.plan()
        assert step is not None
        assert step == self.scheduler.plan()
        number = self.order[0]
        assert step.request == number
        assert step.start == len(self.fed[number])
        assert 1 <= len(step.tokens) <= self.CHUNK
        self.fed[number] += step.tokens
        prompt = self.prompts[number]
        assert self.fed[number][: len(prompt)] == prompt[: len(self.fed[number])]
        assert len(self.fed[number]) <= self.CONTEXT
        assert step.samples == (len(self.fed[number]) >= len(prompt))
        outputs = self.scheduler.apply(step, token if step.samples else None)
        if step.samples and not token.ends:
            self.sampled[number] += 1
        finished = [output for output in outputs if isinstance(output, Finished)]
        assert (
            finished == list(outputs[-1:]) if finished else all(not isinstance(output, Finished) for output in outputs)
        )
        assert all(output.text for output in outputs if isinstance(output, TextDelta))
        if finished:
            assert finished[0].prompt_tokens == len(prompt)
            assert finished[0].completion_tokens == self.sampled[number] <= self.budgets[number]
            self.order.pop(0)
        else:
            assert self.sampled[number] < self.budgets[number]
            assert not (step.samples and token.ends)

    @invariant()
    def idle_means_empty(self) -> None:
        assert self.scheduler.idle == (not self.order)
        assert (self.scheduler.plan() is None) == (not self.order)


TestMachine = Machine.TestCase
