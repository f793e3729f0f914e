"""The load generator: streaming clients of an OpenAI endpoint, the same for every server.

It knows of a server no more than a URL, a model's name and fields to add to a body. Times are the clients' own; tokens
are what the server's usage says, or one for each event where it says nothing.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

import httpx2

SILENCE_SECONDS: Final = 900.0
"""How long a server may say nothing: a long prompt on a busy machine."""
CUT: Final = "cut"
"""The finish reason of an answer that this side ended."""
_TEXTS: Final = ("content", "reasoning_content", "reasoning")
_DATA: Final = "data:"

Message = Mapping[str, str]


class LoadError(Exception):
    """A server refused a request, or broke off its answer."""


@dataclass(frozen=True, slots=True)
class Target:
    """An endpoint."""

    url: str
    """Without ``/v1``."""
    model: str
    extra: Mapping[str, object] = field(default_factory=dict)
    """Added to every body."""


@dataclass(frozen=True, slots=True)
class Ask:
    """One request."""

    messages: tuple[Message, ...]
    tokens: int
    """Of the answer, at most; a prompt should be one whose answer runs on."""
    waits: int = 0
    """It is sent when each request of the round that waits for nothing has had so many events."""


@dataclass(frozen=True, slots=True)
class Heard:
    """What a client saw of one answer. Seconds on the client's clock."""

    asked: float
    events: tuple[float, ...]
    """When each piece of text came."""
    ended: float
    text: str
    """Without reasoning."""
    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int
    finish_reason: str | None

    @property
    def first(self) -> float:
        """Seconds to the first text."""
        return (self.events[0] if self.events else self.ended) - self.asked

    @property
    def longest_gap(self) -> float:
        """Seconds between two pieces of text, at most; 0 where there are not two."""
        return longest_gap(self.events)


# --- Arithmetic -------------------------------------------------------------------------------------------------------


def longest_gap(times: Sequence[float]) -> float:
    return max((after - before for before, after in itertools.pairwise(times)), default=0.0)


def percentile(values: Iterable[float], percent: float) -> float:
    """Between the two nearest, in proportion. Raises ValueError where there are none."""
    ordered = sorted(values)
    if not ordered:
        raise ValueError("a percentile of nothing")
    place = (len(ordered) - 1) * percent / 100
    below = int(place)
    above = min(below + 1, len(ordered) - 1)
    return ordered[below] + (ordered[above] - ordered[below]) * (place - below)


def tokens_per_second(answers: Sequence[Heard]) -> float:
    """Of all answers together, from the first request to the last end: prompts are in it."""
    seconds = max(each.ended for each in answers) - min(each.asked for each in answers)
    return sum(each.completion_tokens for each in answers) / seconds


def tokens_per_second_between(answers: Sequence[Heard]) -> float:
    """Of all answers together, from the first text of any to the last of any; the first token of each is not counted. 0
    where no time lies between.
    """
    spoken = [each for each in answers if each.events]
    if not spoken:
        return 0.0
    seconds = max(each.events[-1] for each in spoken) - min(each.events[0] for each in spoken)
    return sum(each.completion_tokens - 1 for each in spoken) / seconds if seconds else 0.0


def prompt_tokens_per_second(answer: Heard) -> float:
    """Of a prompt, up to the first text."""
    return (answer.prompt_tokens - answer.cached_tokens) / answer.first


# --- Clients ----------------------------------------------------------------------------------------------------------


class _Barrier:
    """Those who wait are let go when everybody else has had enough events."""

    def __init__(self, asks: Sequence[Ask]) -> None:
        self._events = [0 if ask.waits == 0 else None for ask in asks]
        self._changed = asyncio.Condition()

    async def count(self, index: int, *, over: bool = False) -> None:
        so_far = self._events[index]
        if so_far is not None:
            self._events[index] = 1 << 30 if over else so_far + 1
            async with self._changed:
                self._changed.notify_all()

    async def wait(self, events: int) -> None:
        async with self._changed:
            await self._changed.wait_for(lambda: all(each is None or each >= events for each in self._events))


class Clients:
    """Connections to one server. Use it as an asynchronous context manager."""

    def __init__(self, target: Target, *, clock: Callable[[], float] = time.perf_counter) -> None:
        self._target = target
        self._clock = clock
        self._http = httpx2.AsyncClient(
            base_url=target.url,
            timeout=httpx2.Timeout(SILENCE_SECONDS),
            limits=httpx2.Limits(max_connections=None),
            trust_env=False,
        )

    async def __aenter__(self) -> Clients:
        return self

    async def __aexit__(self, *failure: object) -> None:
        await self._http.aclose()

    async def play(self, asks: Sequence[Ask], *, seconds: float = SILENCE_SECONDS) -> list[Heard]:
        """All requests of a round at once, each on a connection of its own; after ``seconds`` the answers that are not
        over are cut. Raises LoadError.
        """
        barrier = _Barrier(asks)

        async def one(index: int, ask: Ask) -> Heard:
            if ask.waits:
                await barrier.wait(ask.waits)

            async def heard() -> None:
                await barrier.count(index)

            try:
                return await self.listen(ask, seconds=seconds, heard=heard)
            finally:
                await barrier.count(index, over=True)

        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(one(index, ask)) for index, ask in enumerate(asks)]
        return [task.result() for task in tasks]

    async def listen(
        self, ask: Ask, *, seconds: float = SILENCE_SECONDS, heard: Callable[[], Any] | None = None
    ) -> Heard:
        """One request and its whole answer. ``heard`` is awaited at each event. Raises LoadError."""
        told = _Told()
        asked = self._clock()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(seconds), contextlib.aclosing(self._events(ask)) as events:
                async for event in events:
                    if told.take(event):
                        told.times.append(self._clock())
                        if heard is not None:
                            await heard()
        return told.whole(asked, self._clock())

    async def _events(self, ask: Ask) -> AsyncGenerator[dict[str, Any]]:
        """The events of an answer, as JSON. Raises LoadError."""
        body = {
            "model": self._target.model,
            "messages": list(ask.messages),
            "max_tokens": ask.tokens,
            "temperature": 0,
            "stream": True,
            "stream_options": {"include_usage": True},
            **self._target.extra,
        }
        try:
            async with self._http.stream("POST", "/v1/chat/completions", json=body) as response:
                if response.status_code != 200:
                    text = (await response.aread())[:500].decode("utf-8", "replace")
                    raise LoadError(f"{self._target.url} answers {response.status_code}: {text}")
                async for line in response.aiter_lines():
                    if not line.startswith(_DATA):
                        continue
                    data = line.removeprefix(_DATA).strip()
                    if data == "[DONE]":
                        return
                    event = json.loads(data)
                    if "error" in event:
                        raise LoadError(f"{self._target.url} breaks off: {event['error']}")
                    yield event
        except httpx2.HTTPError as error:
            raise LoadError(f"{self._target.url}: {error!r}") from error

    @contextlib.asynccontextmanager
    async def background(self, rounds: Callable[[int], Ask], streams: int) -> AsyncIterator[None]:
        """So many streams without an end, for as long as the block is open: ``rounds`` gives the request of each
        number. The block begins when all of them have had text.
        """
        asks = iter(range(1 << 30))
        begun = [asyncio.Event() for _ in range(streams)]

        async def stream(event: asyncio.Event) -> None:
            async def heard() -> None:
                event.set()

            while True:
                await self.listen(rounds(next(asks)), heard=heard)

        tasks = [asyncio.create_task(stream(event)) for event in begun]
        everybody = asyncio.create_task(_all(begun))
        try:
            await asyncio.wait([everybody, *tasks], return_when=asyncio.FIRST_COMPLETED)
            if everybody.done():
                yield
        finally:
            for task in (everybody, *tasks):
                task.cancel()
            ends = await asyncio.gather(everybody, *tasks, return_exceptions=True)
        failure = next((end for end in ends if isinstance(end, Exception)), None)
        if failure is not None:
            raise failure


async def _all(events: Sequence[asyncio.Event]) -> None:
    for event in events:
        await event.wait()


class _Told:
    """An answer, as it comes."""

    def __init__(self) -> None:
        self.times: list[float] = []
        self._texts: list[str] = []
        self._usage: Mapping[str, Any] | None = None
        self._finish: str | None = None

    def take(self, event: Mapping[str, Any]) -> bool:
        """Whether there was text in it."""
        self._usage = event.get("usage") or self._usage
        spoke = False
        for choice in event.get("choices", []):
            delta = choice.get("delta", {})
            self._finish = choice.get("finish_reason") or self._finish
            self._texts.append(delta.get("content") or "")
            spoke = spoke or any(delta.get(name) for name in _TEXTS)
        return spoke

    def whole(self, asked: float, ended: float) -> Heard:
        usage = self._usage or {}
        details = usage.get("prompt_tokens_details") or {}
        return Heard(
            asked=asked,
            events=tuple(self.times),
            ended=ended,
            text="".join(self._texts),
            prompt_tokens=usage.get("prompt_tokens", 0),
            completion_tokens=usage.get("completion_tokens", len(self.times)),
            cached_tokens=details.get("cached_tokens", 0),
            finish_reason=self._finish or CUT,
        )
