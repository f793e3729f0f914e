"""The engine as the server sees it: :class:`Engine`, and :class:`LlamaEngine`, which keeps llama.cpp in a process of
its own.

llama.cpp is the largest body of foreign code that a prompt can drive. So it lives behind a pipe
(:mod:`enclave.worker`), its bytes are taken as hostile, and when it dies, lies or falls silent it is killed and
started anew from the same sealed memory. That costs the requests in flight, each with a typed error, and nothing
else.
"""

from __future__ import annotations

import asyncio
import os
import secrets
import socket
import sys
from collections.abc import AsyncGenerator, Callable
from contextlib import suppress
from dataclasses import replace
from typing import Final, Protocol

from attestation.gguf import read_header
from enclave.config import EngineSettings
from enclave.generation import (
    MAX_SEED,
    ContextExceeded,
    EngineError,
    EngineFailed,
    EngineRefused,
    Finished,
    GenerateRequest,
    GenerationEvent,
    InvalidRequest,
    Overloaded,
    TextDelta,
    Unavailable,
)
from enclave.pipe import (
    MAX_DELTA_CHARACTERS,
    MAX_PROMPT_SIZE,
    MAX_TO_SERVER,
    Alive,
    Cancel,
    End,
    Failed,
    Generate,
    Load,
    PipeError,
    Ready,
    Refused,
    Text,
    ToServer,
    read_to_server,
)
from vsockrpc.messages import MessageReader

__all__ = [
    "ContextExceeded",
    "Engine",
    "EngineError",
    "EngineFailed",
    "EngineRefused",
    "Finished",
    "GenerateRequest",
    "GenerationEvent",
    "InvalidRequest",
    "LlamaEngine",
    "Overloaded",
    "TextDelta",
    "Unavailable",
]

START_SECONDS: Final = 600.0
"""For a process to load the model; the largest take minutes."""
STALL_SECONDS: Final = 60.0
"""A process that works on something and says nothing for so long has hung: it speaks after every chunk of a prompt
and every token.
"""
WAIT_SECONDS: Final = 30.0
"""How long a request waits for a process to come up."""
FIRST_PAUSE_SECONDS: Final = 0.1
LAST_PAUSE_SECONDS: Final = 5.0
MAX_FAILED_STARTS: Final = 5
"""In a row, until no further one is tried."""
MAX_PROMPT_BYTES_PER_TOKEN: Final = 32
"""Natural language has about 4. More is not tokenised, so that a prompt that cannot fit does not hold up those that
do.
"""
_CHUNK: Final = 64 << 10
_CLOSED: Final = "the engine is closed"
_ENDED: Final = "the engine process ended"


class Engine(Protocol):
    """Answers conversations. Every implementation passes ``tests/enclave/test_engine_contract.py``."""

    async def start(self) -> None:
        """Returns when requests can be answered. Raises StrongroomError when they never will."""

    def generate(self, request: GenerateRequest) -> AsyncGenerator[GenerationEvent, None]:
        """The answer: any number of TextDelta, then one Finished. Text that came in the meantime comes as one
        TextDelta.

        Closing the iterator or cancelling the task that reads it stops the work within one decode step. Raises
        EngineError: InvalidRequest, ContextExceeded, Overloaded, Unavailable, EngineFailed.
        """

    async def close(self) -> None:
        """Ends the engine. Requests in flight raise EngineFailed. May be called twice, and before or while
        :meth:`start` runs.
        """


class LlamaEngine:
    """llama.cpp in a supervised process, fed over a pipe."""

    def __init__(
        self,
        weights: int,
        chat_template: str,
        settings: EngineSettings,
        *,
        on_start: Callable[[Ready], None] = lambda ready: None,
        on_exit: Callable[[], None] = lambda: None,
        stall_seconds: float = STALL_SECONDS,
        wait_seconds: float = WAIT_SECONDS,
    ) -> None:
        """``weights`` is the descriptor of a sealed memory object with a GGUF file; it stays the caller's and must
        outlive the engine.
        """
        self._weights = weights
        self._template = chat_template
        self._settings = settings
        self._on_start = on_start
        self._on_exit = on_exit
        self._stall_seconds = stall_seconds
        self._wait_seconds = wait_seconds
        self._worker: _Worker | None = None
        self._changed = asyncio.Condition()
        self._given_up = False
        """No process will come up any more."""
        self._keeper: asyncio.Task[None] | None = None
        self._requests = 0

    async def start(self) -> None:
        """Checks the weights' header, then loads them in a new process.

        Raises ModelError for a broken GGUF, which llama.cpp then never sees, and EngineRefused when the process does
        not come up.
        """
        await asyncio.to_thread(self._check_header)
        worker = await self._spawn()
        if self._given_up:
            await worker.end(_CLOSED)
            raise EngineRefused("engine_failed", _CLOSED)
        self._worker = worker
        self._keeper = asyncio.create_task(self._keep(worker))

    async def close(self) -> None:
        self._given_up = True
        if self._keeper is not None:
            self._keeper.cancel()
            await asyncio.wait([self._keeper])
        if self._worker is not None:  # the keeper had not begun
            worker, self._worker = self._worker, None
            await worker.end(_CLOSED)
        await self._announce()

    async def generate(self, request: GenerateRequest) -> AsyncGenerator[GenerationEvent, None]:
        size, bound = request.content_size, min(self._settings.context * MAX_PROMPT_BYTES_PER_TOKEN, MAX_PROMPT_SIZE)
        if size > bound:
            raise ContextExceeded(
                "the prompt is too large for the context", expected=f"<= {bound} bytes", got=f"{size} bytes"
            )
        if self._requests > self._settings.queue:
            raise Overloaded(expected=f"<= {self._settings.queue} waiting", got=self._requests)
        if request.seed is None:
            request = replace(request, seed=secrets.randbelow(MAX_SEED + 1))
        self._requests += 1
        try:
            worker = await self._serving()
            answer = await worker.submit(request)
            try:
                async for event in answer:
                    yield event
            finally:
                worker.withdraw(answer)
        finally:
            self._requests -= 1

    @property
    def pid(self) -> int | None:
        """The engine process that serves now."""
        return None if self._worker is None else self._worker.pid

    # --- Keeping a process --------------------------------------------------------------------------------------------

    def _check_header(self) -> None:
        with open(f"/proc/self/fd/{self._weights}", "rb") as file:
            read_header(file)

    async def _spawn(self) -> _Worker:
        """A process that is ready. Raises EngineRefused."""
        settings = self._settings
        load = Load(
            template=self._template,
            context=settings.context,
            batch=settings.batch,
            threads=settings.threads or len(os.sched_getaffinity(0)),
            queue=settings.queue,
            uid=settings.uid,
            parent=os.getpid(),
        )
        worker = await _Worker.launch(self._weights, load, self._stall_seconds)
        try:
            async with asyncio.timeout(START_SECONDS):
                ready = await worker.ready()
        except TimeoutError as error:
            reason = "the engine process did not load the model in time"
            await worker.end(reason)
            raise EngineRefused("engine_failed", reason) from error
        except BaseException:
            await worker.end("the engine process did not start")
            raise
        self._on_start(ready)
        return worker

    async def _keep(self, worker: _Worker) -> None:
        """Serves with one process after the other, until closed or until none comes up any more."""
        deaths = 0
        try:
            while True:
                self._worker = worker
                await self._announce()
                reason = _CLOSED
                try:
                    reason = await worker.serve()
                finally:
                    self._worker = None
                    await worker.end(reason)
                self._on_exit()
                deaths = 0 if worker.answered else deaths + 1
                worker = await self._spawn_again(deaths)
        except EngineRefused:
            self._given_up = True
            await self._announce()

    async def _spawn_again(self, deaths: int) -> _Worker:
        """Raises EngineRefused after as many failures as are allowed."""
        failures = 0
        while True:
            await asyncio.sleep(min(FIRST_PAUSE_SECONDS * 2 ** (deaths + failures), LAST_PAUSE_SECONDS))
            try:
                return await self._spawn()
            except EngineRefused:
                failures += 1
                if failures == MAX_FAILED_STARTS:
                    raise

    async def _announce(self) -> None:
        async with self._changed:
            self._changed.notify_all()

    async def _serving(self) -> _Worker:
        """The process that serves now or, within the time that a request waits, the next one. Raises Unavailable."""
        if self._worker is None:
            try:
                async with asyncio.timeout(self._wait_seconds), self._changed:
                    await self._changed.wait_for(lambda: self._worker is not None or self._given_up)
            except TimeoutError as error:
                raise Unavailable("no engine process came up in time") from error
        if self._worker is None:
            raise Unavailable("the engine is closed or cannot be started")
        return self._worker


class _Answer:
    """What came of one request so far, between the process that writes and the client who reads."""

    def __init__(self, number: int, tokens: int) -> None:
        self.number = number
        self.tokens = tokens
        """More cannot come."""
        self._text: list[str] = []
        self._room = (tokens + 1) * MAX_DELTA_CHARACTERS
        self._end: Finished | EngineError | None = None
        self._news = asyncio.Event()

    @property
    def ended(self) -> bool:
        return self._end is not None

    def add(self, text: str) -> None:
        self._room -= len(text)
        if self._room < 0:
            raise PipeError("more text than tokens can make")
        self._text.append(text)
        self._news.set()

    def finish(self, end: Finished | EngineError) -> None:
        self._end = end
        self._news.set()

    async def __aiter__(self) -> AsyncGenerator[GenerationEvent, None]:
        while True:
            await self._news.wait()
            self._news.clear()
            text, end = "".join(self._text), self._end
            self._text.clear()
            if text:
                yield TextDelta(text)
            if isinstance(end, EngineError):
                raise end
            if end is not None:
                yield end
                return


class _Worker:
    """One engine process, from its start to its end."""

    @classmethod
    async def launch(cls, weights: int, load: Load, stall_seconds: float) -> _Worker:
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
        with theirs:
            ours.setblocking(False)
            options = ["-I"] if sys.pycache_prefix is None else ["-I", "-X", f"pycache_prefix={sys.pycache_prefix}"]
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
        reader, writer = await asyncio.open_connection(sock=ours)
        writer.write(load.encode())
        return cls(process, reader, writer, load.context, stall_seconds)

    def __init__(
        self,
        process: asyncio.subprocess.Process,
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
        context: int,
        stall_seconds: float,
    ) -> None:
        self._process = process
        self._stream = reader
        self._writer = writer
        self._context = context
        self._stall_seconds = stall_seconds
        self._messages = MessageReader(MAX_TO_SERVER)
        self._answers: dict[int, _Answer] = {}
        self._issued = 0
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
        """Raises TimeoutError when something is in work and nothing comes."""
        while True:
            try:
                async with asyncio.timeout(self._stall_seconds):
                    return await self._stream.read(_CHUNK)
            except TimeoutError:
                if self._answers:
                    raise

    def _take(self, message: ToServer) -> None:
        match message:
            case Alive():
                return
            case Text(number, text):
                if (answer := self._answer(number)) is not None:
                    answer.add(text)
            case End(number, finished):
                if (answer := self._answer(number)) is not None:
                    if finished.prompt_tokens > self._context or finished.completion_tokens > answer.tokens:
                        raise PipeError("more tokens than there can be")
                    self._end(answer, finished)
                    self.answered = True
            case Failed(number, error):
                if (answer := self._answer(number)) is not None:
                    self._end(answer, error)
            case Ready() | Refused():
                raise PipeError("it was ready before")

    def _answer(self, number: int) -> _Answer | None:
        """None for a request that was withdrawn: its last words crossed the cancellation. Raises PipeError for one
        that never was.
        """
        if number >= self._issued:
            raise PipeError("an answer that nobody asked for", got=number)
        return self._answers.get(number)

    def _end(self, answer: _Answer, end: Finished | EngineError) -> None:
        del self._answers[answer.number]
        answer.finish(end)

    async def submit(self, request: GenerateRequest) -> _Answer:
        """Raises EngineFailed when the process just ended."""
        try:
            await self._writer.drain()  # cancellations may have piled up before a process that is slow to read
        except ConnectionError as error:
            raise EngineFailed(_ENDED) from error
        if self._writer.is_closing():
            raise EngineFailed(_ENDED)
        answer = _Answer(self._issued, min(request.max_tokens or self._context, self._context))
        self._issued += 1
        self._answers[answer.number] = answer
        self._writer.write(Generate(answer.number, request).encode())
        return answer

    def withdraw(self, answer: _Answer) -> None:
        """The client is gone: if the answer is in work, it is not from the next decode step on."""
        if self._answers.pop(answer.number, None) is not None and not self._writer.is_closing():
            self._writer.write(Cancel(answer.number).encode())

    async def end(self, reason: str) -> None:
        """Ends the process, whatever it does, and waits until it is gone. Every answer in work fails for ``reason``."""
        for answer in self._answers.values():
            answer.finish(EngineFailed(reason))
        self._answers.clear()
        self._writer.close()
        if self._process.returncode is None:
            with suppress(ProcessLookupError):
                self._process.kill()
        await self._process.wait()
