"""An engine without a model, for tests of whatever stands before one: the real scheduler and replies, and an echo where
llama.cpp would be.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncGenerator, Awaitable, Callable
from dataclasses import dataclass, field, replace

from attestation.model_memory import KvType
from enclave.config import EngineSettings
from enclave.generation import (
    ContextExceeded,
    EngineError,
    EngineFailed,
    GenerationEvent,
    Overloaded,
    Unavailable,
)
from enclave.prompt_size import require_size
from enclave.worker.kv_cache import KvCache, tokens_of
from enclave.worker.prompt import Prompt
from enclave.worker.reply import Reply
from enclave.worker.scheduler import Admission, Sampled, Scheduler, Step
from enclave.worker.truncation import Tokenized, fitting, without_oldest
from vsockrpc.chat import ChatRequest, CompletionRequest, GenerationRequest
from vsockrpc.messages import Delta, Done

TOKEN_SIZE = 3
"""Bytes of UTF-8 in a token of an answer: characters straddle them."""


def engine_settings(*, context: int = 256, parallel: int = 4, **changes: object) -> EngineSettings:
    """Small, as tests are."""
    settings = EngineSettings(
        context=context,
        parallel=parallel,
        cells=context * parallel,
        kv_type=KvType.F16,
        repack=True,
        batch=64,
        prefill=32,
        prompt_tokens=0,
        answer_tokens=0,
        reasoning_tokens=0,
        threads=2,
        queue=64,
        uid=64001,
    )
    return replace(settings, **changes)  # type: ignore[arg-type]


@dataclass
class _Answer:
    echo: list[bytes]
    """What is still to be said, in tokens."""
    deltas: list[Delta] = field(default_factory=list)
    end: Done | EngineError | None = None
    news: asyncio.Event = field(default_factory=asyncio.Event)


class EchoEngine:
    """Answers with the last message's content, or the prompt, and then ends, if the request's budget lets it. The same
    request gets the same answer. A byte of the prompt is a token.

    ``before_step`` is awaited before each step: a test holds answers there, or counts. ``steps`` is the number of
    steps done, ``in_work`` that of requests taken in and not ended.
    """

    def __init__(
        self,
        settings: EngineSettings | None = None,
        *,
        before_step: Callable[[], Awaitable[None]] = lambda: asyncio.sleep(0),
    ) -> None:
        self.steps = 0
        self._settings = settings or engine_settings(context=2048)
        self._scheduler = scheduler_of(self._settings)
        self._before_step = before_step
        self._answers: dict[int, _Answer] = {}
        self._arrived: deque[Admission] = deque()
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
            self._withdraw(number)
            self._end(number, EngineFailed(reason))

    async def count(self, request: ChatRequest) -> int:
        return len(self._prompt(request)[0])

    async def generate(self, request: GenerationRequest) -> AsyncGenerator[GenerationEvent, None]:
        prompt, dropped = self._prompt(request)
        most = self._settings.parallel + self._settings.queue
        if len(self._answers) >= most:
            raise Overloaded(expected=f"<= {most} at once", got=len(self._answers) + 1)
        number, said = self._issued, last_said(request).encode()
        self._issued += 1
        reply = Reply(request.stop)
        self._arrived.append(
            Admission(
                number,
                tokens_of(prompt),
                reply,
                max_tokens=request.max_tokens,
                namespace=request.cache_secret,
                dropped_messages=dropped,
            )
        )
        answer = _Answer([said[start : start + TOKEN_SIZE] for start in range(0, len(said), TOKEN_SIZE)])
        self._answers[number] = answer
        self._work.set()
        try:
            while True:
                await answer.news.wait()
                answer.news.clear()
                end = answer.end
                while answer.deltas:
                    yield answer.deltas.pop(0)
                if isinstance(end, EngineError):
                    raise end
                if end is not None:
                    yield end
                    return
        finally:
            if self._answers.pop(number, None) is not None:
                self._withdraw(number)

    def _withdraw(self, number: int) -> None:
        self._arrived = deque(each for each in self._arrived if each.request != number)
        self._scheduler.cancel(number)

    def _prompt(self, request: GenerationRequest) -> tuple[list[int], int]:
        """Its tokens, and how many messages are not in it."""
        if self._loop is None:
            raise Unavailable("the engine is closed or was never started")
        context = self._settings.context
        require_size(request, context)
        dropped = 0
        if isinstance(request, CompletionRequest):
            prompt = list(request.prompt.encode())
        else:
            short, dropped = without_oldest(request, context=context)
            rendered, prompt = fitting(short, _rendered, self._settings)
            dropped += rendered.dropped_messages
        if len(prompt) >= context:
            raise ContextExceeded("the prompt is longer than the context", expected=context - 1, got=len(prompt))
        return prompt, dropped

    async def _run(self) -> None:
        while True:
            while self._scheduler.idle and not self._arrived:
                self._work.clear()
                await self._work.wait()
            await self._before_step()
            if self._arrived:  # one between two steps, as the engine process has it
                self._admit(self._arrived.popleft())
            step = self._scheduler.plan()
            if step is not None:
                self._do(step)

    def _admit(self, admission: Admission) -> None:
        try:
            self._scheduler.admit(admission)
        except EngineError as error:
            self._end(admission.request, error)

    def _do(self, step: Step) -> None:
        self.steps += 1
        sampled = {row.request: self._sample(self._answers[row.request]) for row in step.rows if row.samples}
        for number, output in self._scheduler.apply(step, sampled):
            match output:
                case Delta():
                    self._answers[number].deltas.append(output)
                    self._answers[number].news.set()
                case Done():
                    self._end(number, output)

    def _sample(self, answer: _Answer) -> Sampled:
        return Sampled(0, answer.echo.pop(0), ends=False) if answer.echo else Sampled(0, b"", ends=True)

    def _end(self, number: int, end: Done | EngineError) -> None:
        answer = self._answers.pop(number)
        answer.end = end
        answer.news.set()


def _rendered(request: ChatRequest) -> Tokenized:
    text = "".join(f"{entry.role}:{entry.content}\n" for entry in request.messages)
    return Prompt(()), list(text.encode())


def scheduler_of(settings: EngineSettings) -> Scheduler:
    return Scheduler(
        cache=KvCache(slots=settings.parallel, cells=settings.cells),
        slots=settings.parallel,
        context=settings.context,
        step=settings.batch,
        beside=settings.prefill,
        queue=settings.queue,
        longest_prompt=settings.prompt_tokens or None,
        longest_answer=settings.answer_tokens or None,
    )


def last_said(request: GenerationRequest) -> str:
    """What is echoed."""
    return request.prompt if isinstance(request, CompletionRequest) else request.messages[-1].content
