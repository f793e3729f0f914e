"""The engine as the server sees it: :class:`Engine`, and :class:`LlamaEngine`, which keeps llama.cpp in a process of
its own.

llama.cpp is the largest body of foreign code that a prompt can drive. So it lives behind a pipe
(:mod:`enclave.worker`), its bytes are taken as hostile, and when it dies, lies or falls silent it is killed and
started anew from the same sealed memory. That costs the requests in flight, each with a typed error, and nothing
else.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import math
import os
from collections.abc import AsyncGenerator, Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Final, Protocol, TypeVar

from attestation.gguf import read_header
from attestation.model_memory import MIB, EngineMemory, ModelShape, SizingError, engine_memory
from enclave.config import EngineSettings
from enclave.generation import (
    EngineRefused,
    GenerationEvent,
    Overloaded,
    Unavailable,
)
from enclave.model import available_memory
from enclave.pipe import Load, Ready
from enclave.process import Answer, EngineProcess
from enclave.prompt_size import require_size
from vsockrpc.chat import ChatRequest, GenerationRequest

START_SECONDS: Final = 600.0
"""For a process to load the model; the largest take minutes."""
STALL_SECONDS: Final = 120.0
"""A process that works on something and says nothing for so long has hung: it speaks behind every step, unless it just
did.
"""
WAIT_SECONDS: Final = 30.0
"""How long a request waits for a process to come up."""
FIRST_PAUSE_SECONDS: Final = 0.1
LAST_PAUSE_SECONDS: Final = 5.0
MAX_DOUBLINGS: Final = 16
"""Of the pause before a start: the last pause is reached long before."""
MAX_FAILED_STARTS: Final = 5
"""In a row, until no further one is tried."""
RECENT_ANSWERS: Final = 16
"""How many answers the estimate of the next one's time goes back, about."""
MAX_RETRY_SECONDS: Final = 64
MAX_UNREAD_TOGETHER: Final = 16 << 20
"""Of all answers together that are whole and not read, in the units of :data:`enclave.process.PAUSE_ABOVE`."""
_CLOSED: Final = "the engine is closed"
_NAMESPACE_LABEL: Final = b"strongroom prefix cache 1"
Q = TypeVar("Q", bound=GenerationRequest)


class Engine(Protocol):
    """Answers conversations. Every implementation passes ``tests/enclave/test_engine_contract.py``."""

    async def start(self) -> None:
        """Returns when requests can be answered. Raises StrongroomError when they never will."""

    def generate(self, request: GenerationRequest) -> AsyncGenerator[GenerationEvent, None]:
        """The answer: any number of Delta, then one Done.

        ``request`` is one that decoding returned, or could have: its bounds are checked there.

        Closing the iterator or cancelling the task that reads it stops the work within one decode step. Raises
        EngineError: InvalidRequest, ContextExceeded, AnswerExceeded, Overloaded, Unavailable, EngineFailed.
        """

    async def count(self, request: ChatRequest) -> int:
        """The tokens of the prompt that ``request`` has. Raises EngineError as :meth:`generate` does."""

    @property
    def ended(self) -> bool:
        """No request will be answered any more: the engine is closed, or cannot be started again."""

    async def close(self) -> None:
        """Ends the engine. Requests in flight raise EngineFailed. May be called twice, and before or while
        :meth:`start` runs.
        """


@dataclass(frozen=True, slots=True)
class _Place:
    """Of a request among those that an engine works on or has waiting."""

    worker: EngineProcess
    begun: float
    leave: Callable[[], None]
    """Somebody else may have it. May be called again."""


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
        on_lost: Callable[[str], None] = lambda kind: None,
        stall_seconds: float = STALL_SECONDS,
        wait_seconds: float = WAIT_SECONDS,
    ) -> None:
        """``weights`` is the descriptor of a sealed memory object with a GGUF file; it stays the caller's and must
        outlive the engine. ``on_start`` is called for the first process, ``on_exit`` for each that died, ``on_lost``
        with the name of an exception's class when no other will be started.
        """
        self._weights = weights
        self._template = chat_template
        self._settings = settings
        self._on_start = on_start
        self._on_exit = on_exit
        self._on_lost = on_lost
        self._stall_seconds = stall_seconds
        self._wait_seconds = wait_seconds
        self._worker: EngineProcess | None = None
        self._changed = asyncio.Condition()
        self._given_up = False
        """No process will come up any more."""
        self._keeper: asyncio.Task[None] | None = None
        self._requests = 0
        self._unread: dict[Answer, None] = {}
        """Those that are whole, in the order in which they became so."""
        self._seconds = 0.0
        """That an answer took lately, from its request on."""

    async def start(self) -> None:
        """Checks the weights' header, and that there is memory for what it describes; then loads them in a new process.

        Raises ModelError for a broken GGUF, which llama.cpp then never sees, and EngineRefused when it cannot fit, or
        when the process does not come up.
        """
        await asyncio.to_thread(self._check_model)
        worker, ready = await self._spawn()
        self._on_start(ready)
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

    async def generate(self, request: GenerationRequest) -> AsyncGenerator[GenerationEvent, None]:
        async with self._place(request) as place:
            answer = await place.worker.submit(_with_namespace(request), partial(self._answered, place))
            try:
                async for event in answer:
                    yield event
            finally:
                self._unread.pop(answer, None)
                place.worker.withdraw(answer)

    def _answered(self, place: _Place, answer: Answer) -> None:
        """The process works on it no more. What nobody has read yet takes no place from others, but memory: where there
        is too much of that, whoever has waited longest to be read is given up.
        """
        place.leave()
        if answer.is_whole:
            seconds = asyncio.get_running_loop().time() - place.begun
            self._seconds += (seconds - self._seconds) / RECENT_ANSWERS
            self._unread[answer] = None
        while sum(each.unread for each in self._unread) > MAX_UNREAD_TOGETHER:
            oldest = next(each for each in self._unread if each.unread)
            del self._unread[oldest]
            oldest.give_up()

    async def count(self, request: ChatRequest) -> int:
        async with self._place(request) as place:
            answer = await place.worker.count(replace(request, cache_secret=None))
            try:
                return await answer.number_of_tokens()
            finally:
                place.worker.withdraw(answer)

    @contextlib.asynccontextmanager
    async def _place(self, request: GenerationRequest) -> AsyncGenerator[_Place]:
        """One among those who may ask at once. Whoever finds none is told when there may be one."""
        try:
            async with self._counted(request) as place:
                yield place
        except Overloaded as error:
            error.retry_seconds = self._retry_seconds()
            raise

    def _retry_seconds(self) -> int:
        """In which all that are here now are answered, if they take as long as the last ones did: a power of two."""
        expected = self._seconds * (1 + self._requests / self._settings.parallel)
        return min(1 << math.ceil(math.log2(max(expected, 1))), MAX_RETRY_SECONDS)

    @contextlib.asynccontextmanager
    async def _counted(self, request: GenerationRequest) -> AsyncGenerator[_Place]:
        begun = asyncio.get_running_loop().time()
        require_size(request, self._settings.context)
        most = self._settings.parallel + self._settings.queue
        if self._requests >= most:
            raise Overloaded(expected=f"<= {most} at once", got=self._requests + 1)
        with contextlib.ExitStack() as stack:
            self._requests += 1
            stack.callback(self._leave)
            yield _Place(await self._serving(), begun, stack.close)

    def _leave(self) -> None:
        self._requests -= 1

    @property
    def ended(self) -> bool:
        return self._given_up

    @property
    def pid(self) -> int | None:
        """The engine process that serves now."""
        return None if self._worker is None else self._worker.pid

    # --- Keeping a process --------------------------------------------------------------------------------------------

    def _check_model(self) -> None:
        with open(f"/proc/self/fd/{self._weights}", "rb") as file:
            header = read_header(file)
        try:
            needed = engine_memory(ModelShape.of(header), self._settings.work)
        except SizingError as error:
            if error.code == "unknown_shape":  # llama.cpp knows more models than can be sized, and judges this one
                return
            raise EngineRefused(error.code, error.message, expected=error.expected, got=error.got) from error
        require_memory(needed, available_memory())

    async def _spawn(self) -> tuple[EngineProcess, Ready]:
        """A process that is ready, and what it said then. Raises EngineRefused."""
        settings = self._settings
        threads = settings.threads or len(os.sched_getaffinity(0))
        load = Load(self._template, replace(settings, threads=threads), os.getpid())
        try:
            worker = await EngineProcess.launch(self._weights, load, self._stall_seconds)
        except OSError as error:  # out of memory, processes or descriptors, perhaps for a moment
            raise EngineRefused("engine_failed", "the engine process was not started", got=error.strerror) from error
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
        return worker, ready

    async def _keep(self, worker: EngineProcess) -> None:
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
        except Exception as error:  # a defect here ends the engine as surely as a refusal
            self._on_lost(type(error).__name__)
        finally:
            self._given_up = True
            await self._announce()

    async def _spawn_again(self, deaths: int) -> EngineProcess:
        """Raises EngineRefused after as many failures as are allowed."""
        failures = 0
        while True:
            await asyncio.sleep(
                min(FIRST_PAUSE_SECONDS * 2 ** min(deaths + failures, MAX_DOUBLINGS), LAST_PAUSE_SECONDS)
            )
            try:
                worker, _ = await self._spawn()
                return worker
            except EngineRefused:
                failures += 1
                if failures == MAX_FAILED_STARTS:
                    raise

    async def _announce(self) -> None:
        async with self._changed:
            self._changed.notify_all()

    async def _serving(self) -> EngineProcess:
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


def require_memory(needed: EngineMemory, available: int) -> None:
    """``available`` is bytes, beside the weights: these stand in memory already.

    Raises EngineRefused ``not_enough_memory``: what does not fit is said in numbers, not by the kernel's OOM killer
    when somebody has asked something.
    """
    if needed.allocated <= available:
        return
    parts = ", ".join(f"{part.name} {_mib(part.size)}" for part in needed.process if part.size)
    raise EngineRefused(
        "not_enough_memory",
        "the engine does not fit into the memory of this enclave: start it with more, or let its [engine] hold less. "
        f"MiB beside the weights: {parts}",
        expected=f"{_mib(needed.allocated)} MiB",
        got=f"{available // MIB} MiB available",
    )


def _mib(size: int) -> int:
    return -(-size // MIB)


def _with_namespace(request: Q) -> Q:
    """In place of the secret what can be derived from it, and no longer leads to it."""
    secret = request.cache_secret
    if secret is None:
        return request
    namespace = hashlib.sha256(_NAMESPACE_LABEL + secret).digest()
    return replace(request, cache_secret=namespace)
