"""An engine without a model, for tests of whatever stands before one: the real scheduler, and an echo where llama.cpp
would be.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Awaitable, Callable
from dataclasses import dataclass, field

from enclave.generation import (
    ContextExceeded,
    EngineError,
    EngineFailed,
    Finished,
    GenerationEvent,
    Overloaded,
    TextDelta,
    Unavailable,
)
from enclave.scheduler import PromptRead, Sampled, Scheduler, Step
from vsockrpc.messages import ChatRequest

TOKEN_SIZE = 3
"""Bytes of UTF-8 in a token: characters straddle them."""


@dataclass
class _Answer:
    echo: list[bytes]
    """What is still to be said, in tokens."""
    parts: list[str] = field(default_factory=list)
    end: Finished | EngineError | None = None
    news: asyncio.Event = field(default_factory=asyncio.Event)


class EchoEngine:
    """Answers with the last message's content, and then ends, if the request's budget lets it. The same request gets
    the same answer.

    ``before_step`` is awaited before each step: a test holds answers there, or counts. ``steps`` is the number of
    steps done, ``in_work`` that of requests taken in and not ended.
    """

    def __init__(
        self,
        *,
        context: int = 2048,
        chunk: int = 128,
        queue: int = 64,
        before_step: Callable[[], Awaitable[None]] = lambda: asyncio.sleep(0),
    ) -> None:
        self.steps = 0
        self._context = context
        self._scheduler = Scheduler(context=context, chunk=chunk, queue=queue)
        self._queue = queue
        self._before_step = before_step
        self._answers: dict[int, _Answer] = {}
        self._issued = 0
        self._work = asyncio.Event()
        self._loop: asyncio.Task[None] | None = None

    @property
    def ended(self) -> bool:
        return False

    @property
    def in_work(self) -> int:
        return len(self._answers)

    async def start(self) -> None:
        self._loop = asyncio.create_task(self._run())

    async def close(self) -> None:
        if self._loop is not None:
            self._loop.cancel()
            await asyncio.gather(self._loop, return_exceptions=True)
            self._loop = None
        self.fail("the engine was closed")

    def fail(self, reason: str = "the engine process ended") -> None:
        """What a dead engine process is to its clients: every answer in work fails."""
        for number in list(self._answers):
            self._scheduler.cancel(number)
            self._end(number, EngineFailed(reason))

    async def generate(self, request: ChatRequest) -> AsyncGenerator[GenerationEvent, None]:
        if self._loop is None:
            raise Unavailable("the engine is closed or was never started")
        prompt = [byte for entry in request.messages for byte in f"{entry.role}:{entry.content}\n".encode()]
        if len(self._answers) > self._queue:
            raise Overloaded(expected=f"<= {self._queue} waiting", got=len(self._answers))
        if len(prompt) >= self._context:
            raise ContextExceeded("the prompt is longer than the context", expected=self._context - 1, got=len(prompt))
        number, echo = self._issued, request.messages[-1].content.encode()
        self._issued += 1
        self._scheduler.admit(number, prompt, max_tokens=request.max_tokens, stop=request.stop)
        answer = _Answer([echo[start : start + TOKEN_SIZE] for start in range(0, len(echo), TOKEN_SIZE)])
        self._answers[number] = answer
        self._work.set()
        try:
            while True:
                await answer.news.wait()
                answer.news.clear()
                text, end = "".join(answer.parts), answer.end
                answer.parts.clear()
                if text:
                    yield TextDelta(text)
                if isinstance(end, EngineError):
                    raise end
                if end is not None:
                    yield end
                    return
        finally:
            if self._answers.pop(number, None) is not None:
                self._scheduler.cancel(number)

    async def _run(self) -> None:
        while True:
            while self._scheduler.idle:
                self._work.clear()
                await self._work.wait()
            await self._before_step()
            step = self._scheduler.plan()
            if step is not None:
                self._do(step)

    def _do(self, step: Step) -> None:
        self.steps += 1
        answer = self._answers[step.request]
        sampled = None
        if step.samples:
            sampled = Sampled(0, answer.echo.pop(0), ends=False) if answer.echo else Sampled(0, b"", ends=True)
        for output in self._scheduler.apply(step, sampled):
            match output:
                case TextDelta(text):
                    answer.parts.append(text)
                    answer.news.set()
                case Finished():
                    self._end(step.request, output)
                case PromptRead():
                    pass

    def _end(self, number: int, end: Finished | EngineError) -> None:
        answer = self._answers.pop(number)
        answer.end = end
        answer.news.set()
