"""The engine process's loop, with a counting stand-in for llama.cpp: what is decoded, and what no longer is once it
was cancelled.
"""

from __future__ import annotations

import itertools
import socket
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import cast

import pytest

from enclave.generation import ContextExceeded, EngineError, InvalidRequest, Overloaded
from enclave.llama import Llama, Tokenizer
from enclave.pipe import (
    MAX_TO_SERVER,
    Alive,
    Cancel,
    End,
    Failed,
    Generate,
    Load,
    PipeError,
    Text,
    ToServer,
    read_to_server,
)
from enclave.prompt import ChatTemplate, Segment
from enclave.worker import Gone, Loop, Pipe
from vsockrpc.chat import ChatMessage, ChatRequest
from vsockrpc.messages import MessageReader

TEMPLATE = "{{ messages[0].content }}"


class CountingLlama:
    """Every token is the letter a. ``decoded`` has (start, count) of each step; ``step`` waits until a test lets it
    go.
    """

    context = 64
    batch = 8

    def __init__(self) -> None:
        self.decoded: list[tuple[int, int]] = []
        self.begun = threading.Semaphore(0)
        self.may_go = threading.Semaphore(0)

    def decode(self, tokens: Sequence[int], start: int, *, samples: bool) -> None:
        self.decoded.append((start, len(tokens)))
        self.begun.release()
        self.may_go.acquire()

    def sample(self, sampler: object) -> int:
        return 97

    def piece(self, token: int) -> bytes:
        return bytes([token])

    def ends(self, token: int) -> bool:
        return False


class BytesTokenizer:
    mark_starts = frozenset("<")

    def tokens(self, segments: Sequence[Segment]) -> list[int]:
        return [byte for segment in segments for byte in segment.text.encode()]


class Bench:
    """A loop in a thread, and the server's end of its pipe."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self.server, theirs = socket.socketpair()
        self.llama = CountingLlama()
        self._messages = MessageReader(MAX_TO_SERVER)
        self._arrived: list[ToServer] = []
        template = ChatTemplate(TEMPLATE, bos="", eos="", mark_starts=frozenset("<"))
        self.ended_by: BaseException | None = None
        tokenizer = cast(Tokenizer, BytesTokenizer())
        self._loop = Loop(Pipe(theirs), cast(Llama, self.llama), template, tokenizer, queue=1, clock=clock)
        self._thread = threading.Thread(target=self._run)
        self._thread.start()
        self._theirs = theirs

    def _run(self) -> None:
        try:
            self._loop.run()
        except (Gone, PipeError) as end:
            self.ended_by = end

    def send(self, *messages: Generate | Cancel | Load) -> None:
        self.server.sendall(b"".join(message.encode() for message in messages))

    def steps(self, count: int) -> None:
        """Lets ``count`` steps be done, and waits until the next has begun."""
        for _ in range(count):
            self.llama.may_go.release()
        for _ in range(count):
            self.llama.begun.acquire()

    def receive(self) -> ToServer:
        while not self._arrived:
            self._arrived += read_to_server(self._messages, self.server.recv(4096))
        return self._arrived.pop(0)

    def close(self) -> None:
        self.server.close()
        self.llama.may_go.release(1000)
        self._thread.join()
        self._theirs.close()


@pytest.fixture
def bench() -> Iterator[Bench]:
    """A step takes a second here: nothing is held back."""
    seconds = itertools.count()
    bench = Bench(lambda: float(next(seconds)))
    yield bench
    bench.close()


@pytest.fixture
def instant() -> Iterator[Bench]:
    """No time passes here: what is held back stays so."""
    bench = Bench(lambda: 0.0)
    yield bench
    bench.close()


def ask(number: int, content: str, max_tokens: int | None = None) -> Generate:
    return Generate(number, ChatRequest((ChatMessage("user", content),), temperature=0, max_tokens=max_tokens))


def test_an_answer_goes_out_token_by_token(bench: Bench) -> None:
    bench.llama.may_go.release(100)
    bench.send(ask(0, "x" * 10, 2))
    assert [bench.receive() for _ in range(4)] == [
        Alive(),
        Text(0, "a"),
        Text(0, "a"),
        End(0, Finished("length", 10, 2)),
    ]
    assert bench.llama.decoded == [(0, 8), (8, 2), (10, 1)]


def test_text_is_held_back_between_the_first_token_and_the_end(instant: Bench) -> None:
    instant.llama.may_go.release(100)
    instant.send(ask(0, "x", 5))
    answer = [instant.receive() for _ in range(3)]
    assert answer == [Text(0, "a"), Text(0, "aaaa"), End(0, Finished("length", 1, 5))]


def test_a_request_cancelled_while_its_prompt_is_read_has_no_further_step(bench: Bench) -> None:
    bench.send(ask(0, "x" * 40), ask(1, "y", 1))
    bench.llama.begun.acquire()
    bench.steps(1)
    bench.send(Cancel(0))  # the second chunk is being decoded
    bench.llama.may_go.release(100)
    assert [bench.receive() for _ in range(4)] == [Alive(), Alive(), Text(1, "a"), End(1, Finished("length", 1, 1))]
    assert bench.llama.decoded == [(0, 8), (8, 8), (0, 1)]


def test_a_request_cancelled_in_mid_answer_has_no_further_step(bench: Bench) -> None:
    bench.send(ask(0, "x"))
    bench.llama.begun.acquire()
    bench.steps(3)
    bench.send(Cancel(0), ask(1, "y", 1))
    bench.llama.may_go.release(100)
    answers = [bench.receive() for _ in range(6)]
    assert answers == [Text(0, "a")] * 4 + [Text(1, "a"), End(1, Finished("length", 1, 1))]
    assert bench.llama.decoded == [(0, 1), (1, 1), (2, 1), (3, 1), (0, 1)]


def test_a_request_cancelled_before_it_was_looked_at_costs_nothing(bench: Bench) -> None:
    bench.send(ask(0, "x", 2))
    bench.llama.begun.acquire()
    bench.send(ask(1, "y"), Cancel(1), Cancel(7))
    bench.llama.may_go.release(100)
    assert [bench.receive() for _ in range(3)] == [Text(0, "a"), Text(0, "a"), End(0, Finished("length", 1, 2))]
    bench.send(ask(2, "z", 1))
    assert bench.receive() == Text(2, "a")
    assert bench.llama.decoded == [(0, 1), (1, 1), (0, 1)]


def test_refusals_are_one_request_s_own(bench: Bench) -> None:
    bench.send(ask(0, "x", 6), ask(1, "y"), ask(2, "z"), ask(3, "x" * 64), ask(4, ""))
    bench.llama.may_go.release(100)
    errors: dict[int, EngineError] = {}
    while len(errors) < 3:
        match bench.receive():
            case Failed(number, error):
                errors[number] = error
            case Text() | End():
                pass
            case other:
                raise AssertionError(other)
    assert isinstance(errors[2], Overloaded)
    assert isinstance(errors[3], ContextExceeded)
    assert (errors[3].expected, errors[3].got) == ("<= 63 tokens", "64 tokens")
    assert isinstance(errors[4], InvalidRequest)


def test_the_loop_ends_with_the_pipe_and_with_what_is_no_message(bench: Bench) -> None:
    bench.server.shutdown(socket.SHUT_WR)
    bench.close()
    assert isinstance(bench.ended_by, Gone)
    other = Bench(lambda: 0.0)
    other.send(Load("", 1, 1, 1, 1, 1, 1))
    other._thread.join()
    other.close()
    assert isinstance(other.ended_by, PipeError)
