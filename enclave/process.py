"""One engine process as the server sees it: started with next to nothing, spoken to over a pipe, ended when it lies."""

from __future__ import annotations

import asyncio
import socket
import sys
from collections import deque
from collections.abc import AsyncGenerator, Callable
from contextlib import suppress
from typing import Final, TypeVar

from enclave.config import EngineSettings
from enclave.generation import (
    EngineError,
    EngineFailed,
    EngineRefused,
    GenerationEvent,
    NotRead,
)
from enclave.pipe import (
    MAX_DELTA_CHARACTERS,
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
    Ready,
    Refused,
    Resume,
    ToServer,
    read_to_server,
)
from vsockrpc.chat import ChatRequest, CompletionRequest, GenerationRequest
from vsockrpc.messages import Delta, Done, MessageReader

_CHUNK: Final = 64 << 10
_ENDED: Final = "the engine process ended"
_OBJECT: Final = 128
"""Bytes that Python takes for a piece, a call or a token beside its text: measured."""
PAUSE_ABOVE: Final = 256 << 10
"""Of one answer that a client has not read, as :func:`_size` counts: the process is told to make no more of it. Two
thousand tokens of text have that, or ninety with all log probabilities.
"""
RESUME_BELOW: Final = PAUSE_ABOVE // 2
PAUSE_SECONDS: Final = 60.0
"""How long an answer may stay paused, which holds the place of a request beside an engine that has nothing to do."""
MAX_UNREAD: Final = 8 << 20
"""Of one answer: a prompt that is echoed, and what was on its way already when the process was told."""
R = TypeVar("R", bound=GenerationRequest)


class Answer:
    """What came of one request so far, between the process that writes and the client who reads."""

    def __init__(
        self,
        number: int,
        tokens: int,
        *,
        is_count: bool = False,
        echoed: int = 0,
        on_flow: Callable[[Answer], None] = lambda answer: None,
        on_end: Callable[[Answer], None] = lambda answer: None,
    ) -> None:
        """``echoed`` is the characters of a prompt with which the answer begins. ``on_flow`` is called when
        :attr:`is_paused` has changed, ``on_end`` when nothing more can come.
        """
        self.number = number
        self.is_count = is_count
        """What is asked for is a number of tokens, and no text."""
        self.tokens = tokens
        """More cannot come."""
        self.is_paused = False
        """There is so much of it that nobody has read yet that nothing more is wanted."""
        self.unread = 0
        """How much that is, as :func:`_size` counts."""
        self._deltas: deque[Delta] = deque()
        self._room = (tokens + 1) * (2 * MAX_DELTA_CHARACTERS) + 2 * echoed
        self._end: Done | int | EngineError | None = None
        self._news = asyncio.Event()
        self._on_flow = on_flow
        self._on_end = on_end

    @property
    def ended(self) -> bool:
        return self._end is not None

    @property
    def is_whole(self) -> bool:
        """It came to its end, be it read or not."""
        return isinstance(self._end, Done)

    def add(self, delta: Delta) -> None:
        size = _size(delta)
        self._room -= size
        if self._room < 0:
            raise PipeError("more text than tokens can make")
        self.unread += size
        if self.unread > MAX_UNREAD:
            raise PipeError("an answer goes on that was to pause", got=self.number)
        self._deltas.append(delta)
        self._news.set()
        if self.unread > PAUSE_ABOVE and not self.is_paused:
            self._flow(is_paused=True)

    def finish(self, end: Done | int | EngineError) -> None:
        """``end`` is a number for a request that asked for one."""
        self._end = end
        self._news.set()
        self._on_end(self)

    def give_up(self) -> None:
        """Nobody reads it: what there is of it goes."""
        self._deltas.clear()
        self.unread = 0
        self.finish(NotRead())

    async def __aiter__(self) -> AsyncGenerator[GenerationEvent, None]:
        while True:
            await self._news.wait()
            self._news.clear()
            while self._deltas:
                delta = self._deltas.popleft()
                self.unread -= _size(delta)
                if self.unread <= RESUME_BELOW and self.is_paused and self._end is None:
                    self._flow(is_paused=False)
                yield delta
            end = self._end
            if isinstance(end, EngineError):
                raise end
            if end is not None:
                assert isinstance(end, Done), "an answer to a generation"
                yield end
                return

    def _flow(self, *, is_paused: bool) -> None:
        self.is_paused = is_paused
        self._on_flow(self)

    async def number_of_tokens(self) -> int:
        await self._news.wait()
        if isinstance(self._end, EngineError):
            raise self._end
        assert isinstance(self._end, int), "an answer to a count"
        return self._end


def _size(delta: Delta) -> int:
    """Characters and bytes, and what each object takes beside them: of deltas that hold next to nothing there could be
    as many as memory holds.
    """
    texts = len(delta.content) + len(delta.reasoning) + sum(len(call.arguments) for call in delta.tool_calls)
    tokens = [token for each in delta.logprobs for token in (each.token, *(other.token for other in each.top))]
    return texts + sum(map(len, tokens)) + _OBJECT * (1 + len(delta.tool_calls) + len(tokens))


class EngineProcess:
    """One engine process, from its start to its end."""

    @classmethod
    async def launch(cls, weights: int, load: Load, stall_seconds: float) -> EngineProcess:
        """Raises OSError when the system gives no process or no pipe."""
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
        with theirs:
            ours.setblocking(False)
            options = ["-I"] if sys.pycache_prefix is None else ["-I", "-X", f"pycache_prefix={sys.pycache_prefix}"]
            options += ["-B"] if sys.dont_write_bytecode else []
            try:
                process = await asyncio.create_subprocess_exec(
                    sys.executable,
                    *options,
                    "-m",
                    "enclave.worker",
                    str(theirs.fileno()),
                    str(weights),
                    stdin=asyncio.subprocess.DEVNULL,
                    stdout=asyncio.subprocess.DEVNULL,
                    stderr=asyncio.subprocess.DEVNULL,
                    # numpy, which llama_cpp imports, would start threads that nobody needs.
                    env={"LC_ALL": "C.UTF-8", "OPENBLAS_NUM_THREADS": "1"},
                    pass_fds=(theirs.fileno(), weights),
                )
            except BaseException:
                ours.close()
                raise
        reader, writer = await asyncio.open_connection(sock=ours)
        writer.write(load.encode())
        return cls(process, reader, writer, load.settings, stall_seconds)

    def __init__(
        self,
        process: asyncio.subprocess.Process,
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
        settings: EngineSettings,
        stall_seconds: float,
    ) -> None:
        self._process = process
        self._stream = reader
        self._writer = writer
        self._longest_prompt = settings.longest_prompt
        self._longest_answer = settings.longest_answer
        self._stall_seconds = stall_seconds
        self._messages = MessageReader(MAX_TO_SERVER)
        self._answers: dict[int, Answer] = {}
        self._patience: dict[int, asyncio.TimerHandle] = {}
        """For answers that are paused, by their numbers."""
        self._issued = 0
        self._watch: asyncio.Timeout | None = None
        """While something is waited for from the process."""
        self.answered = False
        """It has finished at least one answer."""

    @property
    def pid(self) -> int:
        return self._process.pid

    async def ready(self) -> Ready:
        """Waits for the process to load. Raises EngineRefused."""
        try:
            while data := await self._stream.read(_CHUNK):
                for message in read_to_server(self._messages, data):
                    match message:
                        case Ready():
                            return message
                        case Refused(code, text, expected, got):
                            raise EngineRefused(code, text, expected=expected, got=got)
                        case _:
                            raise PipeError("it answered before it was ready")
        except (PipeError, ConnectionError) as error:
            raise EngineRefused("engine_failed", "the engine process broke its protocol", got=error) from error
        status = await self._process.wait()
        raise EngineRefused(
            "engine_failed", "the engine process ended while it loaded the model", got=f"exit status {status}"
        )

    async def serve(self) -> str:
        """Hands out what the process says, and returns why it no longer can; the process may still run then."""
        try:
            while data := await self._read():
                for message in read_to_server(self._messages, data):
                    self._take(message)
        except PipeError:
            return "the engine process broke its protocol"
        except TimeoutError:
            return "the engine process fell silent"
        except ConnectionError:  # it ended with something of ours unread
            return _ENDED
        return _ENDED

    async def _read(self) -> bytes:
        """Raises TimeoutError when for so long something is in work and nothing comes."""
        try:
            async with asyncio.timeout(None) as self._watch:
                self._look()
                return await self._stream.read(_CHUNK)
        finally:
            self._watch = None

    def _look(self) -> None:
        """The process has so long to say something from the moment on at which something is in work: it may have
        rested before, and whatever is paused it need say nothing of.
        """
        if self._watch is None or self._watch.expired():
            return
        if all(answer.is_paused for answer in self._answers.values()):
            self._watch.reschedule(None)
        elif self._watch.when() is None:
            self._watch.reschedule(asyncio.get_running_loop().time() + self._stall_seconds)

    def _take(self, message: ToServer) -> None:
        match message:
            case Alive():
                return
            case Piece(number, delta):
                if (answer := self._answer(number, is_count=False)) is not None:
                    answer.add(delta)
            case End(number, done):
                if (answer := self._answer(number, is_count=False)) is not None:
                    usage = done.usage
                    if usage.prompt_tokens > self._longest_prompt or usage.completion_tokens > answer.tokens:
                        raise PipeError("more tokens than there can be")
                    if usage.cached_tokens > usage.prompt_tokens or usage.reasoning_tokens > usage.completion_tokens:
                        raise PipeError("a part that is more than the whole")
                    self._end(answer, done)
                    self.answered = True
            case Counted(number, tokens):
                if (answer := self._answer(number, is_count=True)) is not None:
                    self._end(answer, tokens)
            case Failed(number, error):
                if (answer := self._answer(number)) is not None:
                    self._end(answer, error)
            case Ready() | Refused():
                raise PipeError("it was ready before")

    def _answer(self, number: int, *, is_count: bool | None = None) -> Answer | None:
        """None for a request that was withdrawn: its last words crossed the cancellation. Raises PipeError for one
        that never was, or that asked for something else.
        """
        if number >= self._issued:
            raise PipeError("an answer that nobody asked for", got=number)
        answer = self._answers.get(number)
        if answer is not None and is_count not in (None, answer.is_count):
            raise PipeError("an answer of another kind", got=number)
        return answer

    def _end(self, answer: Answer, end: Done | int | EngineError) -> None:
        self._forget(answer)
        answer.finish(end)

    def _forget(self, answer: Answer) -> bool:
        """False when it was not in work any more."""
        if (patience := self._patience.pop(answer.number, None)) is not None:
            patience.cancel()
        was_there = self._answers.pop(answer.number, None) is not None
        self._look()
        return was_there

    def _flow(self, answer: Answer) -> None:
        """Tells the process what its reader lets it do."""
        if answer.number not in self._answers or self._writer.is_closing():
            return
        if answer.is_paused:
            self._writer.write(Pause(answer.number).encode())
            loop = asyncio.get_running_loop()
            self._patience[answer.number] = loop.call_later(PAUSE_SECONDS, self._give_up, answer)
        else:
            self._writer.write(Resume(answer.number).encode())
            self._patience.pop(answer.number).cancel()
        self._look()

    def _give_up(self, answer: Answer) -> None:
        self.withdraw(answer)
        answer.give_up()

    async def submit(
        self, request: GenerationRequest, on_end: Callable[[Answer], None] = lambda answer: None
    ) -> Answer:
        """``on_end`` is called when the process has nothing more to say to it, however much of that nobody has read.
        Raises EngineFailed when the process just ended.
        """
        return await self._submit(Generate, request, on_end)

    async def count(self, request: ChatRequest) -> Answer:
        """As :meth:`submit`. What it asks for is a number of tokens."""
        return await self._submit(Count, request)

    async def _submit(
        self,
        kind: Callable[[int, R], Generate | Count],
        request: R,
        on_end: Callable[[Answer], None] = lambda answer: None,
    ) -> Answer:
        try:
            await self._writer.drain()  # cancellations may have piled up before a process that is slow to read
        except ConnectionError as error:
            raise EngineFailed(_ENDED) from error
        if self._writer.is_closing():
            raise EngineFailed(_ENDED)
        tokens = min(request.max_tokens or self._longest_answer, self._longest_answer)
        echoed = len(request.prompt) if isinstance(request, CompletionRequest) and request.echo else 0
        answer = Answer(self._issued, tokens, is_count=kind is Count, echoed=echoed, on_flow=self._flow, on_end=on_end)
        self._issued += 1
        self._answers[answer.number] = answer
        self._writer.write(kind(answer.number, request).encode())
        self._look()
        return answer

    def withdraw(self, answer: Answer) -> None:
        """The client is gone: if the answer is in work, it is not from the next decode step on."""
        if self._forget(answer) and not self._writer.is_closing():
            self._writer.write(Cancel(answer.number).encode())

    async def end(self, reason: str) -> None:
        """Ends the process, whatever it does, and waits until it is gone. Every answer in work fails for ``reason``."""
        for answer in list(self._answers.values()):
            self._end(answer, EngineFailed(reason))
        self._writer.close()
        if self._process.returncode is None:
            with suppress(ProcessLookupError):
                self._process.kill()
        await self._process.wait()
