"""What the engine does next, as pure data: no clock, no model, no I/O. The loop in :mod:`enclave.worker` carries it
out.

Continuous batching: every step decodes one token of each sequence that is being answered, and beside them as much of
the prompts that are being read as its budget allows. So a long prompt holds nobody up for longer than one step, and
between two steps, never later, a cancelled request is gone.

Whoever came first goes first where cells or budget are short. If the cells run out the youngest sequence gives its own
back and goes on later: it is read again, and no token of its answer is lost.
"""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol, TypeAlias

from enclave.generation import AnswerExceeded, ContextExceeded, Overloaded
from enclave.worker.kv_cache import Edit, KvCache, Slot, Tokens
from vsockrpc.messages import Delta, Done, FinishReason, Usage


@dataclass(frozen=True, slots=True)
class Row:
    """``tokens`` of ``request`` stand at the positions from ``start`` of its slot."""

    request: int
    slot: int
    start: int
    tokens: Sequence[int]
    samples: bool
    """The next token is wanted: these are the last that the sequence has."""


@dataclass(frozen=True, slots=True)
class Step:
    """One decode: the edits to the memory first, then all rows at once."""

    edits: tuple[Edit, ...]
    rows: tuple[Row, ...]


@dataclass(frozen=True, slots=True)
class Sampled:
    """The token that came out of a row."""

    token: int
    piece: bytes
    """What it stands for in text; perhaps a part of a character, perhaps nothing."""
    ends: bool
    """It is one of the model's end-of-generation tokens."""
    logprobs: tuple[float, Sequence[tuple[bytes, float]]] | None = None
    """The token's own log probability, and the likeliest tokens with theirs, where they were asked for."""


class Reply(Protocol):
    """What becomes of an answer's tokens: :mod:`enclave.worker.reply`."""

    @property
    def ended(self) -> bool:
        """It is whole, whatever the model would say next."""

    @property
    def reasoning_tokens(self) -> int: ...

    def push(self, sampled: Sampled) -> Delta | None:
        """What the next token makes certain."""

    def finish(self, reason: FinishReason) -> tuple[Delta | None, FinishReason]:
        """The rest, and why it ended."""


Output: TypeAlias = tuple[int, Delta | Done]
"""Of a request."""


@dataclass(frozen=True, slots=True)
class Admission:
    """A request that wants to be answered."""

    request: int
    prompt: Tokens
    reply: Reply
    max_tokens: int | None = None
    namespace: bytes | None = None
    """What it computes is kept for, and what is kept of it may be used by, requests of this namespace only."""
    dropped_messages: int = 0


@dataclass(slots=True)
class _Sequence:
    admission: Admission
    number: int
    """Counts up in the order of arrival."""
    budget: int
    """Tokens of the answer at most."""
    tokens: Tokens
    """The prompt's, and those of the answer."""
    cached: int | None = None
    """Tokens of the prompt that its first slot held already."""
    completion: int = 0
    slot: Slot | None = None

    @property
    def client(self) -> Hashable:
        """Who waits for its turn. Without a namespace nobody can tell which requests are one client's."""
        return self.admission.namespace or self.number

    @property
    def pending(self) -> int:
        """Tokens that are not decoded."""
        return len(self.tokens) - (len(self.slot.tokens) if self.slot is not None else 0)


@dataclass(slots=True)
class _Waiting:
    """Clients take turns, each with its requests in the order of their arrival; before all of them come sequences that
    had begun and had to give up their cells.
    """

    resumed: deque[_Sequence] = field(default_factory=deque)
    clients: OrderedDict[Hashable, deque[_Sequence]] = field(default_factory=OrderedDict)

    def __len__(self) -> int:
        return len(self.resumed) + sum(map(len, self.clients.values()))

    def __iter__(self) -> Iterator[_Sequence]:
        yield from self.resumed
        for sequences in self.clients.values():
            yield from sequences

    def of(self, client: Hashable) -> int:
        return len(self.clients.get(client, ()))

    def add(self, sequence: _Sequence) -> None:
        self.clients.setdefault(sequence.client, deque()).append(sequence)

    def first(self) -> _Sequence | None:
        if self.resumed:
            return self.resumed[0]
        return next(iter(self.clients.values()))[0] if self.clients else None

    def take_first(self) -> None:
        """Away with the first; its client is the last to have another turn."""
        if self.resumed:
            self.resumed.popleft()
            return
        client, sequences = next(iter(self.clients.items()))
        sequences.popleft()
        del self.clients[client]
        if sequences:
            self.clients[client] = sequences

    def remove(self, sequence: _Sequence) -> None:
        if sequence in self.resumed:
            self.resumed.remove(sequence)
            return
        sequences = self.clients[sequence.client]
        sequences.remove(sequence)
        if not sequences:
            del self.clients[sequence.client]


CROWD = 4
"""So many prompts are a crowd where the answers are no more: those wait a whole step for it. Were a burst read beside
the first of its own answers, the last of it would be read later, and all of it would end later.
"""


class Scheduler:
    """All sizes are tokens, or cells, which is the same."""

    def __init__(
        self,
        *,
        cache: KvCache,
        slots: int,
        context: int,
        step: int,
        beside: int,
        queue: int,
        longest_prompt: int | None = None,
        longest_answer: int | None = None,
    ) -> None:
        """``context`` is the longest sequence, ``step`` what one decode takes at most, ``beside`` how much of that are
        prompts beside answers, unless the prompts are a crowd, ``queue`` how many may wait.
        ``longest_prompt`` and ``longest_answer`` are None where the context alone bounds them.
        """
        if not 0 < beside <= step or step < slots or queue < 0:
            raise ValueError("a step has room for a token of each sequence, and for some of a prompt")
        self._cache = cache
        self._context = context
        self._longest_prompt = longest_prompt
        self._longest_answer = longest_answer
        self._step = step
        self._beside = beside
        self._queue = queue
        self._active: list[_Sequence] = []
        """In the order of their arrival."""
        self._waiting = _Waiting()
        self._paused: dict[int, _Sequence] = {}
        """By request: neither at work nor waiting for it."""
        self._arrived = 0
        self.preempted = 0
        """How often a sequence had to give up its cells."""

    @property
    def idle(self) -> bool:
        """There is nothing to do."""
        return not self._active and not self._waiting

    @property
    def active(self) -> int:
        return len(self._active)

    @property
    def waiting(self) -> int:
        return len(self._waiting)

    def admit(self, admission: Admission) -> None:
        """Takes a request in. Raises ContextExceeded when the prompt is longer than prompts may be, or leaves no room
        for one token of an answer; AnswerExceeded when the answer shall be longer than answers may be; and Overloaded.
        """
        prompt = admission.prompt
        if not prompt:
            raise ValueError("a prompt has at least one token")
        self._require(len(prompt), admission.max_tokens)
        self._arrived += 1
        room = self._context - len(prompt)
        budget = min(admission.max_tokens or self._longest_answer or room, room)
        sequence = _Sequence(admission, self._arrived, budget, prompt[:])
        begin = self._cache.free_slots  # so many of those who wait do so for the next step alone
        if len(self._waiting) >= self._queue + begin:
            raise Overloaded(expected=f"<= {self._queue} waiting", got=len(self._waiting) - begin + 1)
        share = max(1, self._queue // 2)
        if self._waiting.of(sequence.client) >= share + begin:
            raise Overloaded(expected=f"<= {share} waiting of one client", got=share + 1)
        self._waiting.add(sequence)

    def _require(self, prompt: int, answer: int | None) -> None:
        """That both are no longer than they may be."""
        most, what = self._context - 1, "the context"
        if self._longest_prompt is not None and self._longest_prompt < most:
            most, what = self._longest_prompt, "prompts may be here"
        if prompt > most:
            raise ContextExceeded(
                f"the prompt is longer than {what}", expected=f"<= {most} tokens", got=f"{prompt} tokens"
            )
        if self._longest_answer is not None and (answer or 0) > self._longest_answer:
            raise AnswerExceeded(
                "max_tokens is more than an answer may have here",
                expected=f"<= {self._longest_answer} tokens",
                got=f"{answer} tokens",
            )

    def cancel(self, request: int) -> bool:
        """Forgets a request, wherever it stands; False when there is none of that number. Nothing of it is in the next
        step.
        """
        for sequence in self._active:
            if sequence.admission.request == request:
                self._leave(sequence)
                return True
        for sequence in self._waiting:
            if sequence.admission.request == request:
                self._waiting.remove(sequence)
                return True
        return self._paused.pop(request, None) is not None

    def pause(self, request: int) -> None:
        """Takes a request from work until :meth:`resume`; one that is no more, or has not begun, stays what it is. Its
        slot goes to whoever waits: it is read again then, if its cells are not there any more.
        """
        for sequence in self._active:
            if sequence.admission.request == request:
                self._leave(sequence)
                self._paused[request] = sequence
                return
        for sequence in self._waiting.resumed:
            if sequence.admission.request == request:
                self._waiting.remove(sequence)
                self._paused[request] = sequence
                return

    def resume(self, request: int) -> None:
        if (sequence := self._paused.pop(request, None)) is not None:
            self._waiting.resumed.append(sequence)

    # --- A step ------------------------------------------------------------------------------------------------------

    def plan(self) -> Step | None:
        """The next step; None when there is nothing to do. What it says is to be done, and then :meth:`apply` called
        before anything else.
        """
        self._begin_waiting()
        rows = self._rows()
        return Step(self._cache.take_edits(), rows) if rows else None

    def apply(self, step: Step, sampled: Mapping[int, Sampled]) -> list[Output]:
        """Takes in what the planned ``step`` came to; ``sampled``, by request, is there for each row that samples."""
        outputs: list[Output] = []
        sequences = {sequence.admission.request: sequence for sequence in self._active}
        for row in step.rows:
            sequence = sequences.get(row.request)
            if (
                sequence is None
                or sequence.slot is None
                or (row.slot, row.start)
                != (
                    sequence.slot.index,
                    len(sequence.slot.tokens),
                )
            ):
                raise ValueError("not the planned step")
            if (row.request in sampled) != row.samples:
                raise ValueError("a token for each row that samples, and for no other")
            sequence.slot.tokens.extend(row.tokens)
            if row.samples:
                outputs += ((row.request, output) for output in self._take(sequence, sampled[row.request]))
        return outputs

    def _take(self, sequence: _Sequence, sampled: Sampled) -> Iterator[Delta | Done]:
        reply = sequence.admission.reply
        if sampled.ends:
            yield from self._finish(sequence, "stop")
            return
        sequence.completion += 1
        sequence.tokens.append(sampled.token)
        delta = reply.push(sampled)
        if delta is not None:
            yield delta
        if reply.ended:
            yield from self._finish(sequence, "stop")
        elif sequence.completion == sequence.budget:
            yield from self._finish(sequence, "length")

    def _finish(self, sequence: _Sequence, reason: FinishReason) -> Iterator[Delta | Done]:
        admission = sequence.admission
        delta, reason = admission.reply.finish(reason)
        if delta is not None:
            yield delta
        usage = Usage(
            len(admission.prompt), sequence.completion, sequence.cached or 0, admission.reply.reasoning_tokens
        )
        self._leave(sequence)
        yield Done(reason, usage, admission.dropped_messages)

    # --- Who is at work ----------------------------------------------------------------------------------------------

    def _begin_waiting(self) -> None:
        """Those who wait get the free slots, if the prompt of each has room beside those at work."""
        while self._cache.free_slots and (sequence := self._waiting.first()) is not None:
            if self._active and not self._has_room(sequence):
                return
            self._waiting.take_first()
            sequence.slot = self._cache.take(sequence.tokens, sequence.admission.namespace)
            if sequence.cached is None:
                sequence.cached = len(sequence.slot.tokens)
            self._active.append(sequence)
            self._active.sort(key=lambda each: each.number)

    def _has_room(self, sequence: _Sequence) -> bool:
        """For all of it, with a token to come of each that is at work."""
        wanted = sum(each.pending for each in self._active) + len(sequence.tokens) + 1
        return self._cache.free + self._cache.reclaimable >= wanted

    def _leave(self, sequence: _Sequence) -> None:
        assert sequence.slot is not None, "it is at work"
        self._active.remove(sequence)
        self._cache.put_back(sequence.slot)
        sequence.slot = None

    # --- Who gets how much -------------------------------------------------------------------------------------------

    def _rows(self) -> tuple[Row, ...]:
        counts = self._counts()
        while not self._fits(counts):
            youngest = self._active[-1]
            self._leave(youngest)
            self._waiting.resumed.appendleft(youngest)
            self.preempted += 1
            counts = self._counts()
        rows = [self._row(each, count) for each, count in zip(self._active, counts, strict=True) if count]
        # llama.cpp computes sequences with cells of their own together only where their numbers follow each other.
        return tuple(sorted(rows, key=lambda row: row.slot))

    def _row(self, sequence: _Sequence, count: int) -> Row:
        assert sequence.slot is not None, "it is at work"
        start = len(sequence.slot.tokens)
        tokens = sequence.tokens[start : start + count]
        return Row(
            sequence.admission.request, sequence.slot.index, start, tokens, start + count == len(sequence.tokens)
        )

    def _counts(self) -> list[int]:
        """Tokens of each that is at work. Of the prompts the oldest has half of what there is, and the others the rest,
        the shortest first: nobody starves, and a short one does not wait for a long one. Where a crowd waits for its
        first tokens and no more for their next ones, the crowd goes first, and a step is as large as it may be.
        """
        readers = [index for index, each in enumerate(self._active) if each.pending > 1]
        counts = [1] * len(self._active)
        if not readers:
            return counts
        others = len(self._active) - len(readers)
        left = self._step - others
        if others and len(readers) < max(CROWD, others):
            left = min(self._beside, left)
        oldest, *rest = readers
        pending = [each.pending for each in self._active]
        spared = left - sum(pending[index] for index in rest)
        for index in (oldest, *sorted(rest, key=lambda index: pending[index])):
            most = max(left // 2, spared, 1) if index == oldest else left
            counts[index] = min(pending[index], most)
            left -= counts[index]
        return counts

    def _fits(self, counts: list[int]) -> bool:
        """Whether there are cells for that, once prompts, the youngest first, have been cut down to what is left. The
        oldest sequence gets a token whatever happens: what it needs in all there is.
        """
        if self._cache.make_room(sum(counts)):
            return True
        missing = sum(counts) - self._cache.free
        for index in reversed(range(len(counts))):
            least = 1 if index == 0 or self._active[index].pending == 1 else 0
            cut = min(missing, counts[index] - least) if counts[index] else 0
            counts[index] -= cut
            missing -= cut
        return missing == 0
