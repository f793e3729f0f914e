"""The engine process's loop, with a counting stand-in for llama.cpp: what is decoded side by side, what is said of it
when, and what no longer is once it was cancelled.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import socket
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Sequence, Set
from dataclasses import replace
from typing import Any, cast

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from attestation.model_family import model_family
from enclave.generation import AnswerExceeded, ContextExceeded, EngineError, InvalidRequest, Overloaded
from enclave.pipe import (
    MAX_DELTA_CHARACTERS,
    MAX_DELTA_TOKENS,
    MAX_TO_SERVER,
    Alive,
    Cancel,
    Count,
    Counted,
    End,
    Failed,
    Generate,
    Load,
    Pause,
    Piece,
    PipeError,
    Resume,
    ToServer,
    ToWorker,
    read_to_server,
)
from enclave.worker.kv_cache import Copy, Edit, Truncate
from enclave.worker.llama import Llama
from enclave.worker.loop import Gone, Loop, Pipe, _parts
from enclave.worker.prompt import ChatTemplate, Segment
from enclave.worker.sampler import GrammarRefused, Logits
from enclave.worker.scheduler import Row
from enclave.worker.tokenizer import Tokenizer
from tests.engines import engine_settings
from vsockrpc.chat import ChatMessage, ChatRequest, CompletionRequest, Generation, JsonFormat
from vsockrpc.messages import (
    MAX_TOKEN_SIZE,
    Alternative,
    Delta,
    Done,
    MessageReader,
    TokenLogprob,
    ToolCallDelta,
    Usage,
)

TEMPLATE = "{{ messages[0].content }}"
ALICE, BOB = bytes(32), bytes(range(32))


class CountingSampler:
    def __init__(self, request: Generation) -> None:
        self.closed = 0
        self.is_stuck = request.seed == 405
        self._request = request

    def logprobs(self, logits: Logits, token: int) -> tuple[float, list[tuple[int, float]]] | None:
        count = self._request.top_logprobs
        return None if count is None else (-0.5, [(token, -0.5)] * count)

    def close(self) -> None:
        self.closed += 1


class CountingLlama:
    """Every token is the letter a. ``decoded`` has (request, start, count) of each row of each step; a step waits until
    a test lets it go.
    """

    can_truncate = True
    vocabulary_size = 256

    def __init__(self) -> None:
        self.decoded: list[list[tuple[int, int, int]]] = []
        self.edits: list[Edit] = []
        self.samplers: list[CountingSampler] = []
        self.says = b"a"
        self.ends_after = 1 << 20
        self.begun = threading.Semaphore(0)
        self.may_go = threading.Semaphore(0)

    def decode(self, edits: Sequence[Edit], rows: Sequence[Row]) -> dict[int, Logits]:
        self.edits += edits
        self.decoded.append([(row.request, row.start, len(row.tokens)) for row in rows])
        self.begun.release()
        self.may_go.acquire()
        return {row.request: np.zeros(self.vocabulary_size, np.float32) for row in rows if row.samples}

    def sampler(
        self, request: Generation, prompt: Sequence[int], *, grammar: str | None, marks: Set[int], ends: Set[int]
    ) -> CountingSampler:
        if request.seed == 404:
            raise InvalidRequest("no such seed")
        self.samplers.append(CountingSampler(request))
        return self.samplers[-1]

    def sample(self, sampler: CountingSampler, logits: Logits, *, is_constrained: bool) -> int:
        assert not sampler.closed
        if sampler.is_stuck:
            raise GrammarRefused("no token can come")
        self.ends_after -= 1
        return 97

    def piece(self, token: int) -> bytes:
        return self.says

    def ends(self, token: int) -> bool:
        return self.ends_after < 0


class BytesTokenizer:
    mark_starts = frozenset("<")

    def tokens(self, segments: Sequence[Segment], known: dict[str, list[int]] | None = None) -> list[int]:
        return [byte for segment in segments for byte in segment.text.encode()]


class Bench:
    """A loop in a thread, and the server's end of its pipe."""

    def __init__(self, clock: Callable[[], float], **changes: Any) -> None:
        self.server, theirs = socket.socketpair()
        self.llama = CountingLlama()
        self._messages = MessageReader(MAX_TO_SERVER)
        self._arrived: list[ToServer] = []
        template = ChatTemplate(TEMPLATE, bos="", eos="", mark_starts=frozenset("<"))
        self.ended_by: BaseException | None = None
        tokenizer = cast(Tokenizer, BytesTokenizer())
        sizes = {"context": 64, "parallel": 2, "batch": 8, "prefill": 4, "queue": 2, **changes}
        settings = engine_settings(**sizes)
        family = model_family(None, None, TEMPLATE)
        self._loop = Loop(Pipe(theirs), cast(Llama, self.llama), template, tokenizer, family, settings, clock=clock)
        self._theirs = theirs
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def _run(self) -> None:
        try:
            self._loop.run()
        except (Gone, PipeError) as end:
            self.ended_by = end
        finally:
            self._theirs.close()

    def send(self, *messages: ToWorker) -> None:
        self.server.sendall(b"".join(message.encode() for message in messages))

    def steps(self, count: int) -> None:
        """Lets ``count`` steps be done, and waits until the next has begun."""
        for _ in range(count):
            self.llama.may_go.release()
        for _ in range(count):
            self.llama.begun.acquire()

    def go(self) -> None:
        """Nothing waits any more."""
        self.llama.may_go.release(10_000)

    def receive(self) -> ToServer:
        while not self._arrived:
            data = self.server.recv(4096)
            assert data, f"the loop ended: {self.ended_by!r}"
            self._arrived += read_to_server(self._messages, data)
        return self._arrived.pop(0)

    def said(self) -> list[ToServer]:
        """What has come by now."""
        with contextlib.suppress(BlockingIOError):
            while data := self.server.recv(4096, socket.MSG_DONTWAIT):
                self._arrived += read_to_server(self._messages, data)
        arrived, self._arrived = self._arrived, []
        return arrived

    def ends_of(self, *numbers: int) -> dict[int, Done | EngineError]:
        """How these ended, whatever else is said until then."""
        ends: dict[int, Done | EngineError] = {}
        while ends.keys() != set(numbers):
            match self.receive():
                case End(number, done):
                    ends[number] = done
                case Failed(number, error):
                    ends[number] = error
                case Piece() | Alive():
                    pass
                case other:
                    raise AssertionError(other)
        return ends

    def done(self, number: int) -> Done:
        end = self.ends_of(number)[number]
        assert isinstance(end, Done)
        return end

    def close(self) -> None:
        self.server.close()
        self.go()
        self._thread.join()


MakeBench = Callable[..., Bench]


@pytest.fixture
def make_bench() -> Iterator[MakeBench]:
    """Each look at the clock finds it as much later as an ordinary step takes: nothing is held back."""
    made: list[Bench] = []

    def make(second: float = 0.04, *, clock: Callable[[], float] | None = None, **changes: Any) -> Bench:
        seconds = itertools.count()
        made.append(Bench(clock or (lambda: second * next(seconds)), **changes))
        return made[-1]

    yield make
    for bench in made:
        bench.close()


@pytest.fixture
def bench(make_bench: MakeBench) -> Bench:
    return make_bench()


@pytest.fixture
def instant() -> Iterator[Bench]:
    """No time passes here: what is held back stays so."""
    bench = Bench(lambda: 0.0)
    yield bench
    bench.close()


def ask(number: int, content: str, max_tokens: int | None = None, **options: Any) -> Generate:
    request = ChatRequest((ChatMessage("user", content),), temperature=0, max_tokens=max_tokens, **options)
    return Generate(number, request)


def a(number: int) -> Piece:
    return Piece(number, Delta("a"))


def end(number: int, prompt: int, completion: int) -> End:
    return End(number, Done("length", Usage(prompt, completion)))


# --- One answer ------------------------------------------------------------------------------------------------------


def test_an_answer_goes_out_token_by_token(bench: Bench) -> None:
    bench.go()
    bench.send(ask(0, "x" * 10, 2))
    assert [bench.receive() for _ in range(4)] == [Alive(), a(0), a(0), end(0, 10, 2)]
    assert bench.llama.decoded == [[(0, 0, 8)], [(0, 8, 2)], [(0, 10, 1)]]


def test_a_prompt_without_a_template_is_what_was_sent(bench: Bench) -> None:
    bench.go()
    bench.send(Generate(0, CompletionRequest(prompt="xyz", max_tokens=1)))
    assert [bench.receive() for _ in range(2)] == [a(0), end(0, 3, 1)]


def test_budgets_are_the_configuration_s(make_bench: MakeBench) -> None:
    bench = make_bench(prompt_tokens=10, answer_tokens=3)
    bench.go()
    bench.send(ask(0, "x" * 10), ask(1, "x" * 11), ask(2, "x", 4))
    ends = bench.ends_of(0, 1, 2)
    assert ends[0] == Done("length", Usage(10, 3))
    assert isinstance(ends[1], ContextExceeded)
    assert (ends[1].expected, ends[1].got) == ("<= 10 tokens", "11 tokens")
    assert isinstance(ends[2], AnswerExceeded)
    assert (ends[2].expected, ends[2].got) == ("<= 3 tokens", "4 tokens")
    assert [sampler.closed for sampler in bench.llama.samplers] == [1, 1, 1]


def test_the_model_ends_where_it_wants(bench: Bench) -> None:
    bench.llama.ends_after = 2
    bench.go()
    bench.send(ask(0, "x"))
    assert bench.done(0) == Done("stop", Usage(1, 2))


def test_each_answer_s_text_is_held_back_between_its_first_token_and_its_end(instant: Bench) -> None:
    instant.send(ask(0, "x", 6))
    instant.llama.begun.acquire()
    instant.send(ask(1, "y", 3))
    instant.go()
    said = [instant.receive() for _ in range(11)]
    assert said == [a(0), a(1), *[a(1)] * 2, end(1, 1, 3), *[a(0)] * 5, end(0, 1, 6)]


@pytest.mark.parametrize("size", [MAX_DELTA_CHARACTERS + 1, 3 * MAX_DELTA_CHARACTERS])
def test_a_token_of_much_text_goes_out_in_pieces(bench: Bench, size: int) -> None:
    bench.llama.says = b"x" * size
    bench.go()
    bench.send(ask(0, "x", 1))
    text = ""
    while isinstance(message := bench.receive(), Piece):
        assert len(message.delta.content) <= MAX_DELTA_CHARACTERS
        text += message.delta.content
    assert text == "x" * size
    assert isinstance(message, End)


@pytest.mark.parametrize(
    "schema",
    [
        '{"properties": {"\\u0000\\n": {"not": 1}}}',
        '{"properties": {"' + "x" * 2000 + '": {"not": 1}}}',
        '{"$ref": "#/\\u0007"}',
        '{"properties": {"\u00a0": {"not": 1}}}',
        '{"properties": {"\\ud800": {"not": 1}}}',
        '{"\\u0000": ' * 3 + "1" + "}" * 3,
        '"\\u0000"',
        "\0",
    ],
)
def test_a_refusal_may_quote_whatever_a_schema_holds(bench: Bench, schema: str) -> None:
    bench.go()
    bench.send(ask(0, "x", 1, response_format=JsonFormat(schema)), ask(1, "x", 1))
    message = bench.receive()
    assert isinstance(message, Failed)
    assert (message.id, message.error.code) == (0, "invalid_request")
    assert bench.done(1) == Done("length", Usage(1, 1))


SCHEMAS = st.recursive(
    st.none() | st.booleans() | st.integers(-5, 5) | st.text(st.characters(max_codepoint=0x110), max_size=4),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(["type", "properties", "not", "$ref", "anyOf", "items", "enum", "pattern"])
            | st.text(max_size=4)
            | st.just("\0" * 600),
            inner,
            max_size=3,
        )
    ),
    max_leaves=6,
)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=100)
@given(schema=SCHEMAS.map(json.dumps) | st.text(max_size=8))
def test_whatever_the_schema_the_server_understands_what_comes_of_it(bench: Bench, schema: str) -> None:
    bench.go()
    bench.send(ask(0, "x", 1, response_format=JsonFormat(schema)))
    while not isinstance(message := bench.receive(), End | Failed):
        assert isinstance(message, Piece | Alive)
    assert message.id == 0


# --- Side by side ----------------------------------------------------------------------------------------------------


def test_two_are_decoded_in_the_same_steps(bench: Bench) -> None:
    bench.send(ask(0, "xxx", 3))
    bench.llama.begun.acquire()
    bench.send(ask(1, "yyy", 2))
    bench.go()
    said = [bench.receive() for _ in range(7)]
    assert said == [a(0), a(0), a(1), a(0), end(0, 3, 3), a(1), end(1, 3, 2)]
    assert bench.llama.decoded == [[(0, 0, 3)], [(0, 3, 1), (1, 0, 3)], [(0, 4, 1), (1, 3, 1)]]


def test_a_long_prompt_is_read_beside_an_answer(bench: Bench) -> None:
    bench.send(ask(0, "x", 4))
    bench.llama.begun.acquire()
    bench.send(ask(1, "y" * 9, 1))
    bench.go()
    assert bench.ends_of(0, 1) == {0: Done("length", Usage(1, 4)), 1: Done("length", Usage(9, 1))}
    assert bench.llama.decoded == [
        [(0, 0, 1)],
        [(0, 1, 1), (1, 0, 4)],
        [(0, 2, 1), (1, 4, 4)],
        [(0, 3, 1), (1, 8, 1)],
    ]


@pytest.mark.parametrize(("second", "taken"), [(1.0, 1), (0.003, 2), (0.002, 3), (0.0, 4)])
def test_as_many_are_taken_in_between_two_steps_as_the_time_allows(
    make_bench: MakeBench, second: float, taken: int
) -> None:
    """One at least, and a crowd together. The clock is looked at twice for each."""
    bench = make_bench(second, parallel=4)
    bench.send(*(ask(number, "x", 1) for number in range(4)))
    bench.go()
    bench.ends_of(0, 1, 2, 3)
    assert bench.llama.decoded[0] == [(number, 0, 1) for number in range(taken)]
    assert sum(map(len, bench.llama.decoded)) == 4


@pytest.mark.parametrize(("requests", "interval"), [(1, 5), (3, 5), (5, 5), (8, 8)])
def test_the_more_are_answered_the_rarer_is_a_message_of_each(
    make_bench: MakeBench, requests: int, interval: int
) -> None:
    """A step takes a hundredth of a second: an answer alone has text in one of five, one of eight in one of eight."""
    now = [0.0]
    bench = make_bench(clock=lambda: now[0], parallel=8, batch=16, queue=8)
    bench.send(*(ask(number, "x", 2 * interval + 3) for number in range(requests)))
    bench.llama.begun.acquire()
    tokens: dict[int, list[int]] = {number: [] for number in range(requests)}
    for _ in range(2 * interval + 1):
        now[0] += 0.0101
        bench.steps(1)
        pieces = Counter(message.id for message in bench.said() if isinstance(message, Piece))
        for number, count in pieces.items():
            tokens[number].append(count)
    assert all(counts == [1, interval, interval] for counts in tokens.values())


def test_answers_that_began_one_after_the_other_go_out_together(make_bench: MakeBench) -> None:
    now = [0.0]
    bench = make_bench(clock=lambda: now[0], parallel=2)
    bench.send(ask(0, "x", 40))
    bench.llama.begun.acquire()
    spoke: list[set[int]] = []
    for step in range(20):
        if step == 3:
            bench.send(ask(1, "y", 30))
        now[0] += 0.0101
        bench.steps(1)
        spoke.append({message.id for message in bench.said() if isinstance(message, Piece)})
    assert [each for each in spoke if each] == [{0}, {1}, {0, 1}, {0, 1}, {0, 1}]


def test_a_count_needs_no_place(make_bench: MakeBench) -> None:
    bench = make_bench(parallel=1, queue=1)
    bench.send(ask(0, "x"))
    bench.llama.begun.acquire()
    bench.send(ask(1, "y", 1), Count(2, ChatRequest((ChatMessage("user", "x" * 50),), cache_secret=ALICE)))
    bench.steps(3)
    said = [bench.receive() for _ in range(4)]
    assert Counted(2, 50) in said
    assert {type(each) for each in said} == {Piece, Counted}


# --- What cannot go on ---------------------------------------------------------------------------------------------


def test_a_format_that_cannot_go_on_costs_its_own_request(bench: Bench) -> None:
    bench.send(ask(0, "x", 4))
    bench.llama.begun.acquire()
    bench.send(Generate(1, replace(ask(1, "y").request, seed=405)))
    bench.go()
    said = [bench.receive() for _ in range(6)]
    [failed] = [each for each in said if isinstance(each, Failed)]
    assert (failed.id, type(failed.error)) == (1, InvalidRequest)
    assert end(0, 1, 4) in said
    assert not any(isinstance(each, Piece | End) and each.id == 1 for each in said)
    assert [sampler.closed for sampler in bench.llama.samplers] == [1, 1]
    bench.send(ask(2, "z", 1))
    assert bench.done(2) == Done("length", Usage(1, 1))


JSON = JsonFormat('{"type":"array"}')


@pytest.mark.parametrize(
    ("options", "what", "tokens"),
    [
        ({}, "the tokens take, by these parameters, too long to choose", 5),
        ({"response_format": JSON}, "the tokens of this format take too long to choose", 4),
    ],
)
def test_what_takes_for_ever_to_choose_has_an_end(
    make_bench: MakeBench, options: dict[str, Any], what: str, tokens: int
) -> None:
    """The choice of a token takes a second here, and so does the making of a grammar. That of the next is not begun
    when it would be too much.
    """
    bench = make_bench(1.0)
    bench.go()
    bench.send(ask(0, "x", 63, **options))
    said = [bench.receive()]
    while isinstance(said[-1], Piece | Alive):
        said.append(bench.receive())
    assert len([each for each in said if isinstance(each, Piece)]) == tokens
    assert isinstance(failed := said[-1], Failed)
    assert (failed.id, failed.error.message) == (0, what)
    assert failed.error.expected == "<= 5 s over 0.05 s for each"
    bench.send(ask(1, "y", 1))
    assert bench.done(1) == Done("length", Usage(1, 1))


def test_what_is_usual_for_a_token_may_be_taken_for_each(make_bench: MakeBench) -> None:
    bench = make_bench(0.04, context=512)
    bench.go()
    bench.send(ask(0, "x", 400))
    assert bench.done(0) == Done("length", Usage(1, 400))


def test_the_server_hears_something_between_two_choices_that_take_long(make_bench: MakeBench) -> None:
    bench = make_bench(2.0)
    bench.send(ask(0, "x", 2), ask(1, "y", 1))
    bench.go()
    said = [bench.receive()]
    while said[-1] != end(1, 1, 1):
        said.append(bench.receive())
    assert bench.llama.decoded[1] == [(0, 1, 1), (1, 0, 1)], "both are chosen for in one step"
    assert Alive() in said[said.index(a(0)) :]


# --- Who is gone -----------------------------------------------------------------------------------------------------


def test_a_request_cancelled_while_its_prompt_is_read_has_no_further_step(bench: Bench) -> None:
    bench.send(ask(0, "x" * 40), ask(1, "y", 2))
    bench.llama.begun.acquire()
    bench.steps(1)
    bench.send(Cancel(0))  # the second chunk is being decoded
    bench.go()
    assert bench.done(1) == Done("length", Usage(1, 2))
    assert bench.llama.decoded == [[(0, 0, 8)], [(0, 8, 4), (1, 0, 1)], [(1, 1, 1)]]
    assert Truncate(0, 0) in bench.llama.edits


def test_a_request_cancelled_in_mid_answer_has_no_further_step(bench: Bench) -> None:
    bench.send(ask(0, "x"))
    bench.llama.begun.acquire()
    bench.steps(3)
    bench.send(Cancel(0), ask(1, "y", 1))
    bench.go()
    assert [bench.receive() for _ in range(6)] == [a(0)] * 4 + [a(1), end(1, 1, 1)]
    assert bench.llama.decoded == [[(0, 0, 1)], [(0, 1, 1)], [(0, 2, 1)], [(0, 3, 1)], [(1, 0, 1)]]


def test_a_cancellation_leaves_the_others_alone(bench: Bench) -> None:
    bench.send(ask(0, "x"), ask(1, "y", 4))
    bench.llama.begun.acquire()
    bench.steps(2)
    bench.send(Cancel(0))
    bench.go()
    assert bench.done(1) == Done("length", Usage(1, 4))
    assert bench.llama.decoded[3:] == [[(1, 2, 1)], [(1, 3, 1)]]


def test_a_cancellation_frees_the_place_for_whoever_waits(make_bench: MakeBench) -> None:
    bench = make_bench(parallel=1)
    bench.send(ask(0, "x"), ask(1, "y", 1))
    bench.llama.begun.acquire()
    bench.steps(2)
    bench.send(Cancel(0))
    bench.go()
    assert bench.done(1) == Done("length", Usage(1, 1))
    assert bench.llama.decoded == [[(0, 0, 1)], [(0, 1, 1)], [(0, 2, 1)], [(1, 0, 1)]]


def test_whoever_is_cancelled_while_waiting_never_begins(make_bench: MakeBench) -> None:
    bench = make_bench(parallel=1)
    bench.send(ask(0, "x", 4), ask(1, "y"), ask(2, "z", 1))
    bench.llama.begun.acquire()
    bench.steps(2)
    bench.send(Cancel(1))
    bench.go()
    bench.ends_of(0, 2)
    assert [row[0] for step in bench.llama.decoded for row in step] == [0, 0, 0, 0, 2]


def test_a_request_cancelled_before_it_was_looked_at_costs_nothing(bench: Bench) -> None:
    bench.send(ask(0, "x", 2))
    bench.llama.begun.acquire()
    bench.send(ask(1, "y"), Cancel(1), Count(3, ask(3, "y").request), Cancel(3), Cancel(7))  # type: ignore[arg-type]
    bench.go()
    assert [bench.receive() for _ in range(3)] == [a(0), a(0), end(0, 1, 2)]
    bench.send(ask(2, "z", 1))
    assert bench.receive() == a(2)
    assert bench.llama.decoded == [[(0, 0, 1)], [(0, 1, 1)], [(2, 0, 1)]]
    assert len(bench.llama.samplers) == 2


def test_every_sampler_is_closed_once(bench: Bench) -> None:
    """Whether its request was answered, cancelled or refused."""
    bench.send(ask(0, "x", 2), ask(1, "x" * 64), ask(2, "y"), ask(3, "z", 1))
    bench.llama.begun.acquire()
    bench.steps(2)
    bench.send(Cancel(2))
    bench.go()
    bench.ends_of(0, 1, 3)
    bench.close()
    assert [sampler.closed for sampler in bench.llama.samplers] == [1] * 4


def test_refusals_are_one_request_s_own(make_bench: MakeBench) -> None:
    bench = make_bench(parallel=1, queue=1)
    bench.send(
        ask(0, "x", 9), ask(1, "y", 1), ask(2, "z"), ask(3, "x" * 64), ask(4, ""), ask(5, "x", seed=404), ask(6, "<")
    )
    bench.go()
    ends = bench.ends_of(0, 1, 2, 3, 4, 5, 6)
    assert isinstance(ends[2], Overloaded)
    assert isinstance(ends[3], ContextExceeded)
    assert (ends[3].expected, ends[3].got) == ("<= 63 tokens", "64 tokens")
    assert isinstance(ends[4], InvalidRequest)
    assert isinstance(ends[5], InvalidRequest)
    assert ends[5].message == "no such seed"
    assert ends[0] == Done("length", Usage(1, 9))
    assert ends[1] == Done("length", Usage(1, 1))


# --- What is kept ----------------------------------------------------------------------------------------------------


def test_what_was_decoded_for_a_secret_is_not_decoded_again(bench: Bench) -> None:
    bench.go()
    bench.send(ask(0, "x" * 10, 1, cache_secret=ALICE))
    assert bench.done(0).usage == Usage(10, 1)
    bench.send(ask(1, "x" * 10 + "y", 1, cache_secret=ALICE))
    assert bench.done(1).usage == Usage(11, 1, 10)
    bench.send(ask(2, "x" * 10 + "y", 1, cache_secret=BOB))
    assert bench.done(2).usage == Usage(11, 1)
    bench.send(ask(3, "x" * 10 + "y", 1))
    assert bench.done(3).usage == Usage(11, 1)
    rows = [row for step in bench.llama.decoded for row in step]
    assert rows == [(0, 0, 8), (0, 8, 2), (1, 10, 1), (2, 0, 8), (2, 8, 3), (3, 0, 8), (3, 8, 3)]


def test_without_a_secret_everything_is_removed(bench: Bench) -> None:
    bench.go()
    bench.send(ask(0, "x" * 10, 1))
    bench.done(0)
    bench.send(ask(1, "x" * 10, 1))
    assert bench.done(1).usage == Usage(10, 1)
    assert bench.llama.edits == [Truncate(0, 0)]
    assert not any(isinstance(edit, Copy) for edit in bench.llama.edits)


def test_a_count_keeps_nothing(bench: Bench) -> None:
    bench.go()
    chat = ask(0, "x" * 10, 1, cache_secret=ALICE).request
    assert isinstance(chat, ChatRequest)
    bench.send(Count(0, chat))
    assert bench.receive() == Counted(0, 10)
    bench.send(Generate(1, chat))
    assert bench.done(1).usage.cached_tokens == 0


# --- Log probabilities -----------------------------------------------------------------------------------------------


def logprobs_of(bench: Bench) -> int:
    """How many came, until the end; never more in one message than it may hold."""
    count = 0
    while isinstance(message := bench.receive(), Piece | Alive):
        if isinstance(message, Piece):
            assert len(message.delta.logprobs) <= MAX_DELTA_TOKENS
            count += len(message.delta.logprobs)
    assert isinstance(message, End)
    return count


def test_log_probabilities_come_with_their_text(bench: Bench) -> None:
    bench.go()
    bench.send(ask(0, "x", 2, top_logprobs=1))
    message = bench.receive()
    assert isinstance(message, Piece)
    [token] = message.delta.logprobs
    assert (token.token, token.logprob) == (b"a", -0.5)
    assert [(each.token, each.logprob) for each in token.top] == [(b"a", -0.5)]
    assert logprobs_of(bench) == 1


@pytest.mark.parametrize("said", [b"a", b""], ids=["held back for a stop string", "tokens of no text"])
def test_many_log_probabilities_at_once_go_out_in_pieces(make_bench: MakeBench, said: bytes) -> None:
    """A client chooses a stop string, and by a bias also the tokens: what becomes certain late may be a lot."""
    bench = make_bench(0.05, context=512)
    bench.llama.says = said
    bench.go()
    bench.send(ask(0, "x", 300, top_logprobs=20, stop=("a" * 255 + "b",)))
    assert logprobs_of(bench) == 300


def test_a_piece_that_is_full_in_every_part_is_a_message() -> None:
    """Whatever comes together in one, it may not be what the server ends the process for."""
    sun, size = "🌞", MAX_DELTA_CHARACTERS
    calls = tuple(ToolCallDelta(index, sun * (size // 128), "x" * 29, "x" * 64) for index in range(128))
    alternatives = (Alternative(b"x" * MAX_TOKEN_SIZE, -0.1),) * 20
    full = Delta(sun * size, sun * size, calls, (TokenLogprob(b"x" * MAX_TOKEN_SIZE, -0.1, alternatives),) * 16)
    assert list(_parts(full)) == [full]
    message = Piece(2**63 - 1, full)
    assert list(read_to_server(MessageReader(MAX_TO_SERVER), message.encode())) == [message]


# --- Pauses ----------------------------------------------------------------------------------------------------------


def test_a_paused_answer_rests_and_gives_its_slot_to_others(make_bench: MakeBench) -> None:
    bench = make_bench(parallel=1)
    bench.send(ask(0, "x", 4))
    bench.llama.begun.acquire()
    bench.send(Pause(0), ask(1, "y", 2), Pause(7), Resume(7))
    bench.go()
    assert [bench.receive() for _ in range(4)] == [a(0), a(1), a(1), end(1, 1, 2)]
    bench.send(Resume(0), Resume(0))
    assert [bench.receive() for _ in range(4)] == [a(0), a(0), a(0), end(0, 1, 4)]
    assert bench.llama.decoded[-3:] == [[(0, 0, 2)], [(0, 2, 1)], [(0, 3, 1)]]


def test_a_paused_answer_can_be_cancelled(bench: Bench) -> None:
    bench.send(ask(0, "x", 4))
    bench.llama.begun.acquire()
    bench.send(Pause(0), Cancel(0), Resume(0), ask(1, "y", 1))
    bench.go()
    assert [bench.receive() for _ in range(3)] == [a(0), a(1), end(1, 1, 1)]
    assert [sampler.closed for sampler in bench.llama.samplers] == [1, 1]


# --- The end ---------------------------------------------------------------------------------------------------------


def test_the_loop_ends_with_the_pipe_and_with_what_is_no_message(bench: Bench) -> None:
    bench.server.shutdown(socket.SHUT_WR)
    bench.close()
    assert isinstance(bench.ended_by, Gone)
    other = Bench(lambda: 0.0)
    other.send(Load("", engine_settings(), 1))
    other._thread.join()
    other.close()
    assert isinstance(other.ended_by, PipeError)
