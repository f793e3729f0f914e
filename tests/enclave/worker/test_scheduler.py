"""The scheduler as pure data: whatever comes when, everybody is answered, with the tokens that he would get alone."""

from __future__ import annotations

import itertools
import random
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from enclave.generation import AnswerExceeded, ContextExceeded, Overloaded
from enclave.worker.kv_cache import Copy, Edit, KvCache, Truncate, tokens_of
from enclave.worker.reply import Reply
from enclave.worker.scheduler import CROWD, Admission, Row, Sampled, Scheduler, Step
from vsockrpc.messages import Delta, Done, FinishReason, Usage

END = 0
"""The token that ends an answer."""


def next_token(tokens: Sequence[int]) -> int:
    """A model: the next token is a matter of all before it and of nothing else. One in eleven ends."""
    return sum((place + 1) * token for place, token in enumerate(tokens)) % 11


def alone(prompt: Sequence[int], budget: int) -> list[int]:
    """What a sequence comes to that nobody is beside."""
    tokens = list(prompt)
    while len(tokens) < len(prompt) + budget and (token := next_token(tokens)) != END:
        tokens.append(token)
    return tokens[len(prompt) :]


@dataclass
class Memory:
    """llama.cpp's, as far as the scheduler can tell: what stands in which slot, and whose it is."""

    slots: list[list[int]]
    owners: list[bytes | None]

    @classmethod
    def of(cls, slots: int) -> Memory:
        return cls([[] for _ in range(slots)], [None] * slots)

    def edit(self, edits: Sequence[Edit]) -> None:
        for edit in edits:
            match edit:
                case Truncate(slot, length):
                    assert length < len(self.slots[slot]), "an edit that changes nothing"
                    del self.slots[slot][length:]
                case Copy(source, target):
                    assert self.slots[target] == []
                    self.slots[target] = list(self.slots[source])
                    self.owners[target] = self.owners[source]

    def decode(self, step: Step, namespaces: dict[int, bytes | None]) -> dict[int, Sampled]:
        self.edit(step.edits)
        for row in step.rows:
            cells = self.slots[row.slot]
            assert row.start == len(cells)
            namespace = namespaces[row.request]
            if cells:
                assert self.owners[row.slot] == namespace, "cells of another namespace"
            self.owners[row.slot] = namespace
            cells.extend(row.tokens)
        slots = [row.slot for row in step.rows]
        assert slots == sorted(set(slots)), "llama.cpp splits what is out of order into several passes"
        return {row.request: sampled(next_token(self.slots[row.slot])) for row in step.rows if row.samples}


def sampled(token: int) -> Sampled:
    return Sampled(token, b"%x" % token, ends=token == END)


def scheduler(
    *, slots: int = 4, cells: int | None = None, context: int = 64, step: int = 16, beside: int = 8, queue: int = 8
) -> Scheduler:
    cache = KvCache(slots=slots, cells=slots * context if cells is None else cells)
    return Scheduler(cache=cache, slots=slots, context=context, step=step, beside=beside, queue=queue)


def asks(
    request: int, prompt: Sequence[int], *, budget: int | None = None, namespace: bytes | None = None
) -> Admission:
    return Admission(request, tokens_of(prompt), Reply(), max_tokens=budget, namespace=namespace)


@dataclass
class Machine:
    """A scheduler and a memory for it."""

    scheduler: Scheduler
    slots: int = 4
    said: dict[int, str] = field(default_factory=dict)
    done: dict[int, Done] = field(default_factory=dict)
    namespaces: dict[int, bytes | None] = field(default_factory=dict)
    steps: list[Step] = field(default_factory=list)
    at_work: list[int] = field(default_factory=list)
    """Sequences, at each step."""

    def __post_init__(self) -> None:
        self.memory = Memory.of(self.slots)

    @property
    def cache(self) -> KvCache:
        return self.scheduler._cache

    def require_freed(self) -> None:
        """No cell and no slot is held for anybody but those at work, in the memory itself too."""
        self.memory.edit(self.cache.take_edits())
        slots = self.cache.slots()
        assert self.memory.slots == [list(slot.tokens) for slot in slots]
        assert self.cache.free_slots == self.slots - self.scheduler.active
        for slot, cells, owner in zip(slots, self.memory.slots, self.memory.owners, strict=True):
            if cells:
                assert slot.namespace == owner
                assert slot.is_taken or slot.namespace is not None, "cells of nobody"

    def admit(self, admission: Admission) -> None:
        self.scheduler.admit(admission)
        self.namespaces[admission.request] = admission.namespace

    def step(self) -> Step | None:
        step = self.scheduler.plan()
        if step is None:
            return None
        oldest = min(self.scheduler._active, key=lambda each: each.number).admission.request
        assert any(row.request == oldest for row in step.rows), "the oldest goes on in every step"
        self.steps.append(step)
        self.at_work.append(self.scheduler.active)
        for request, output in self.scheduler.apply(step, self.memory.decode(step, self.namespaces)):
            assert request not in self.done, "something follows the end"
            match output:
                case Delta(content):
                    self.said[request] = self.said.get(request, "") + content
                case Done():
                    self.done[request] = output
        return step

    def run(self, limit: int = 10_000) -> None:
        for _ in range(limit):
            if self.step() is None:
                assert self.scheduler.idle
                return
        raise AssertionError("it does not come to an end")


# --- One after the other ----------------------------------------------------------------------------------------------


def test_an_answer_is_what_the_model_says_and_an_end() -> None:
    machine = Machine(scheduler())
    machine.admit(asks(7, [3, 5], budget=9))
    machine.run()
    expected = alone([3, 5], 9)
    assert machine.said[7] == "".join(f"{token:x}" for token in expected)
    reason: FinishReason = "length" if len(expected) == 9 else "stop"
    assert machine.done[7] == Done(reason, Usage(2, len(expected)))


def test_a_prompt_is_read_in_chunks_and_only_its_last_token_asks_for_the_next() -> None:
    machine = Machine(scheduler())
    machine.admit(asks(1, [1] * 40, budget=1))
    machine.run()
    assert [(row.start, len(row.tokens), row.samples) for step in machine.steps for row in step.rows] == [
        (0, 16, False),
        (16, 16, False),
        (32, 8, True),
    ]


def test_a_long_prompt_takes_no_more_than_its_share_beside_an_answer() -> None:
    machine = Machine(scheduler())
    machine.admit(asks(1, [2], budget=30))
    machine.step()
    machine.admit(asks(2, [1] * 40, budget=1))
    while 2 not in machine.done:
        step = machine.step()
        assert step is not None
        rows = {row.request: len(row.tokens) for row in step.rows}
        assert rows.get(1, 1) == 1
        assert rows[2] <= 8


@pytest.mark.parametrize(
    ("answers", "readers", "tokens"), [(1, CROWD - 1, 8 + 1), (1, CROWD, 16), (5, CROWD, 8 + 5), (5, 5, 16)]
)
def test_answers_wait_a_whole_step_for_a_crowd_of_prompts_and_for_no_fewer(
    answers: int, readers: int, tokens: int
) -> None:
    """Fewer than themselves are none."""
    machine = Machine(scheduler(slots=answers + readers), slots=answers + readers)
    for request in range(answers):
        machine.admit(asks(1 + request, [2], budget=9))
    machine.step()
    for request in range(readers):
        machine.admit(asks(1 + answers + request, [1] * 20, budget=1))
    step = machine.step()
    assert step is not None
    assert sum(len(row.tokens) for row in step.rows) == tokens


def test_a_short_prompt_does_not_wait_for_a_long_one() -> None:
    machine = Machine(scheduler(context=400))
    machine.admit(asks(1, [1] * 300, budget=1))
    machine.step()
    machine.admit(asks(2, [1] * 4, budget=1))
    machine.step()
    assert 2 in machine.done
    assert 1 not in machine.done


def test_clients_take_turns() -> None:
    """Whoever asks for much waits behind whoever asks for little."""
    machine = Machine(scheduler(slots=1, queue=8), slots=1)
    a, b = b"a" * 32, b"b" * 32
    machine.admit(asks(0, [1], budget=2, namespace=a))
    machine.step()
    for request in range(1, 5):
        machine.admit(asks(request, [request + 1], budget=2, namespace=a))
    machine.admit(asks(10, [9], budget=2, namespace=b))
    machine.run()
    assert list(machine.done).index(10) <= 2


def test_one_client_cannot_have_the_whole_queue() -> None:
    machine = Machine(scheduler(slots=1, queue=4))
    a = b"a" * 32
    machine.admit(asks(0, [1], namespace=a))
    machine.step()
    machine.admit(asks(1, [1], namespace=a))
    machine.admit(asks(2, [1], namespace=a))
    with pytest.raises(Overloaded) as caught:
        machine.admit(asks(3, [1], namespace=a))
    assert (caught.value.expected, caught.value.got) == ("<= 2 waiting of one client", "3")
    machine.admit(asks(4, [1]))
    machine.admit(asks(5, [1]))
    with pytest.raises(Overloaded) as caught:
        machine.admit(asks(6, [1]))
    assert (caught.value.expected, caught.value.got) == ("<= 4 waiting", "5")


def test_a_crowd_that_arrives_at_once_has_the_free_slots_and_the_queue() -> None:
    machine = Machine(scheduler(slots=2, queue=1), slots=2)
    for request in range(3):
        machine.admit(asks(request, [1], budget=1))
    with pytest.raises(Overloaded) as caught:
        machine.admit(asks(3, [1], budget=1))
    assert (caught.value.expected, caught.value.got) == ("<= 1 waiting", "2")
    machine.run()
    assert machine.done.keys() == {0, 1, 2}


def test_a_prompt_that_leaves_no_room_is_refused_with_both_numbers() -> None:
    machine = scheduler(context=64)
    with pytest.raises(ContextExceeded) as caught:
        machine.admit(asks(1, [1] * 64))
    assert (caught.value.expected, caught.value.got) == ("<= 63 tokens", "64 tokens")
    assert machine.idle
    machine.admit(asks(2, [1] * 63))
    with pytest.raises(ValueError, match="at least one token"):
        machine.admit(asks(3, []))


def with_budgets() -> Scheduler:
    cache = KvCache(slots=4, cells=256)
    return Scheduler(cache=cache, slots=4, context=64, step=16, beside=8, queue=8, longest_prompt=20, longest_answer=6)


def test_a_prompt_over_its_budget_is_refused_with_both_numbers() -> None:
    machine = with_budgets()
    with pytest.raises(ContextExceeded) as caught:
        machine.admit(asks(1, [1] * 21))
    assert (caught.value.expected, caught.value.got) == ("<= 20 tokens", "21 tokens")
    assert machine.idle
    machine.admit(asks(2, [1] * 20))


def test_an_answer_over_its_budget_is_refused_with_both_numbers() -> None:
    machine = with_budgets()
    with pytest.raises(AnswerExceeded) as caught:
        machine.admit(asks(1, [1], budget=7))
    assert (caught.value.expected, caught.value.got) == ("<= 6 tokens", "7 tokens")
    assert caught.value.message.startswith("max_tokens is ")
    assert machine.idle


@pytest.mark.parametrize(("budget", "got"), [(None, 6), (6, 6), (2, 2)])
def test_an_answer_ends_with_its_budget(budget: int | None, got: int) -> None:
    machine = Machine(with_budgets())
    machine.admit(asks(1, [3] * 12, budget=budget))
    machine.run()
    assert (machine.done[1].finish_reason, machine.done[1].usage.completion_tokens) == ("length", got)


def test_the_second_turn_reads_what_is_new() -> None:
    machine = Machine(scheduler())
    machine.admit(asks(1, [3] * 12, budget=4, namespace=b"a" * 32))
    machine.run()
    history = [3] * 12 + alone([3] * 12, 4)
    machine.steps.clear()
    machine.admit(asks(2, [*history, 5, 6], budget=1, namespace=b"a" * 32))
    machine.run()
    assert machine.steps[0].rows[0].start == len(history) - 1  # the last one of an answer was never decoded
    assert machine.done[2].usage.cached_tokens == len(history) - 1


def test_the_youngest_gives_way_when_the_cells_run_out_and_comes_back() -> None:
    machine = Machine(scheduler(slots=2, cells=30, context=30), slots=2)
    prompts = {1: [1] * 12, 2: [2] * 12}
    for request, prompt in prompts.items():
        machine.admit(asks(request, prompt, budget=15))
    machine.run()
    for request, prompt in prompts.items():
        assert machine.said[request] == "".join(f"{token:x}" for token in alone(prompt, 15))
    assert machine.scheduler.preempted


def test_a_step_that_was_not_planned_is_refused() -> None:
    machine = scheduler()
    machine.admit(asks(1, [1]))
    step = machine.plan()
    assert step is not None
    with pytest.raises(ValueError, match="a token for each row"):
        machine.apply(step, {})
    row = step.rows[0]
    for wrong in (Row(2, row.slot, 0, [1], True), Row(1, row.slot + 1, 0, [1], True), Row(1, row.slot, 5, [1], True)):
        with pytest.raises(ValueError, match="not the planned step"):
            machine.apply(Step((), (wrong,)), {wrong.request: sampled(1)})


@pytest.mark.parametrize(
    "wrong", [{"step": 2, "beside": 2}, {"beside": 0}, {"beside": 17}, {"queue": -1}, {"step": 0, "beside": 0}]
)
def test_sizes_that_cannot_work(wrong: dict[str, int]) -> None:
    with pytest.raises(ValueError, match="a step has room"):
        scheduler(**wrong)


# --- Whatever comes, whenever -----------------------------------------------------------------------------------------

SLOTS, CELLS, CONTEXT, STEP, BESIDE, QUEUE = 3, 40, 30, 9, 4, 4
NAMESPACES = (None, b"a" * 32, b"b" * 32)
PROMPTS = st.lists(st.integers(1, 2), min_size=1, max_size=CONTEXT + 2)
"""Of two tokens, so that many begin alike."""


class Arrivals(RuleBasedStateMachine):
    """Requests arrive, are cancelled, pause and go on, and between all that steps are done, over cells that do not
    suffice for all.
    """

    def __init__(self) -> None:
        super().__init__()
        self.machine = Machine(
            scheduler(slots=SLOTS, cells=CELLS, context=CONTEXT, step=STEP, beside=BESIDE, queue=QUEUE), SLOTS
        )
        self.asked: dict[int, tuple[list[int], int]] = {}
        self.cancelled: set[int] = set()
        self.paused: set[int] = set()
        """Those that had begun."""
        self.number = 0

    @rule(
        prompt=PROMPTS,
        budget=st.none() | st.integers(1, CONTEXT),
        namespace=st.sampled_from(NAMESPACES),
    )
    def admit(self, prompt: list[int], budget: int | None, namespace: bytes | None) -> None:
        self.number += 1
        before = self.machine.scheduler.waiting
        try:
            self.machine.admit(asks(self.number, prompt, budget=budget, namespace=namespace))
        except ContextExceeded:
            assert len(prompt) >= CONTEXT
        except Overloaded:
            assert before >= QUEUE // 2
        else:
            room = CONTEXT - len(prompt)
            self.asked[self.number] = prompt, min(budget or room, room)

    @rule(count=st.integers(1, 6))
    def work(self, count: int) -> None:
        for _ in range(count):
            self.machine.step()

    @precondition(lambda self: self.asked.keys() - self.machine.done.keys() - self.cancelled)
    @rule(data=st.data())
    def cancel(self, data: st.DataObject) -> None:
        request = data.draw(st.sampled_from(sorted(self.asked.keys() - self.machine.done.keys() - self.cancelled)))
        scheduler, cache = self.machine.scheduler, self.machine.cache
        there, active = scheduler.active + scheduler.waiting, scheduler.active
        taken = [slot for slot in cache.slots() if slot.is_taken]
        unbound = sum(len(slot.tokens) for slot in taken if slot.namespace is None)
        free, available = cache.free, cache.free + cache.reclaimable
        assert scheduler.cancel(request)
        assert not scheduler.cancel(request)
        assert scheduler.active + scheduler.waiting == there - (request not in self.paused)
        released = [slot for slot in taken if not slot.is_taken]
        assert len(released) == active - scheduler.active
        still = sum(len(slot.tokens) for slot in cache.slots() if slot.is_taken)
        assert cache.free + cache.reclaimable == CELLS - still >= available
        assert cache.free == free + unbound - sum(
            len(slot.tokens) for slot in cache.slots() if slot.is_taken and slot.namespace is None
        )
        self.machine.require_freed()
        self.cancelled.add(request)
        self.paused.discard(request)
        seen = len(self.machine.steps)
        self.machine.step()
        assert all(row.request != request for step in self.machine.steps[seen:] for row in step.rows)

    @precondition(lambda self: len(self.paused) < SLOTS)
    @rule(data=st.data())
    def pause(self, data: st.DataObject) -> None:
        request = data.draw(st.integers(0, self.number))
        scheduler = self.machine.scheduler
        before = scheduler.active + scheduler.waiting
        scheduler.pause(request)
        if scheduler.active + scheduler.waiting < before:
            self.paused.add(request)

    @rule(data=st.data())
    def resume(self, data: st.DataObject) -> None:
        request = data.draw(st.sampled_from([0, *sorted(self.paused)]))
        self.machine.scheduler.resume(request)
        self.paused.discard(request)

    @invariant()
    def what_is_paused_rests(self) -> None:
        seen = len(self.machine.steps)
        self.machine.step()
        assert all(row.request not in self.paused for step in self.machine.steps[seen:] for row in step.rows)
        assert not self.paused & self.machine.done.keys()

    @invariant()
    def budgets_hold(self) -> None:
        assert sum(map(len, self.machine.memory.slots)) <= CELLS
        for step, at_work in list(zip(self.machine.steps, self.machine.at_work, strict=True))[-6:]:
            answering = sum(len(row.tokens) == 1 and row.samples for row in step.rows)
            reading = sum(len(row.tokens) for row in step.rows) - answering
            assert 0 < answering + reading <= STEP
            assert reading <= BESIDE or at_work - answering > answering
        assert self.machine.scheduler.waiting <= QUEUE + 2 * SLOTS  # who gave way or paused is not turned away

    def teardown(self) -> None:
        self.machine.run()
        for request in self.paused:
            self.machine.scheduler.resume(request)
        self.machine.run()
        for request, (prompt, budget) in self.asked.items():
            if request in self.cancelled:
                assert request not in self.machine.done
                continue
            expected = alone(prompt, budget)
            assert self.machine.said.get(request, "") == "".join(f"{token:x}" for token in expected)
            done = self.machine.done[request]
            assert (done.usage.prompt_tokens, done.usage.completion_tokens) == (len(prompt), len(expected))
            assert done.usage.cached_tokens < len(prompt)
        self.machine.require_freed()
        cache = self.machine.cache
        assert cache.free_slots == SLOTS
        assert cache.free + cache.reclaimable == CELLS
        assert sum(map(len, self.machine.memory.slots)) == cache.reclaimable


TestArrivals = pytest.mark.hypothesis(Arrivals.TestCase)
TestArrivals.settings = settings(max_examples=120, stateful_step_count=30, suppress_health_check=list(HealthCheck))


# --- Who came is answered, however many others keep coming ------------------------------------------------------------

PATIENCE = (QUEUE + SLOTS) * CONTEXT
"""Steps from a request's arrival to its end: as many as all that may be there have tokens, one token a step. In 250
crowds nobody took 100 of these 210.
"""


@given(st.integers(0, 2**32), st.integers(1, SLOTS), st.sampled_from(["anybody", "whole steps", "one client"]))
@settings(max_examples=30)
def test_nobody_starves_while_others_keep_coming(seed: int, slots: int, crowd: str) -> None:
    """The queue is filled before every step: with anybody's requests; or for one guest at a time, with prompts that
    each take a whole step and are shorter than the guest's, or with those of one client that is not the guest.
    """
    chance = random.Random(seed)
    machine = Machine(
        scheduler(slots=slots, cells=CELLS, context=CONTEXT, step=STEP, beside=BESIDE, queue=QUEUE), slots
    )
    guest = asks(0, [2] * (2 * STEP), budget=3)

    def one_of_the_crowd(number: int) -> Admission:
        if crowd == "whole steps":
            return asks(number, [1] * STEP, budget=1)
        if crowd == "one client":
            return asks(number, [1] * STEP, budget=1, namespace=NAMESPACES[1])
        length, budget = chance.randint(1, CONTEXT - 1), chance.choice((None, 1, 5))
        namespace = chance.choice(NAMESPACES)
        return asks(number, [chance.randint(1, 2) for _ in range(length)], budget=budget, namespace=namespace)

    arrived: dict[int, int] = {}
    numbers, last_guest = itertools.count(1), 0
    for now in range(2 * PATIENCE):
        if last_guest not in arrived and now:
            last_guest = next(numbers)
            with suppress(Overloaded):
                machine.admit(replace(guest, request=last_guest))
                arrived[last_guest] = now
        for number in itertools.islice(numbers, QUEUE):
            with suppress(Overloaded):
                machine.admit(one_of_the_crowd(number))
                arrived[number] = now
        assert machine.step() is not None
        arrived = {number: begun for number, begun in arrived.items() if number not in machine.done}
        assert all(now - begun < PATIENCE for begun in arrived.values())
