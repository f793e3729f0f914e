"""What every Engine does: one suite on each of them."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import aclosing

import pytest

from enclave.config import EngineSettings
from enclave.engine import Engine, LlamaEngine
from enclave.generation import ContextExceeded, EngineFailed, Overloaded, Unavailable
from tests.engines import EchoEngine
from tests.gguf_files import CHAT_TEMPLATE
from vsockrpc.chat import ChatMessage, ChatRequest
from vsockrpc.messages import Delta

CONTEXT = 4096
QUEUE = 2
CONTENT = "Ein Fuchs überquert den Fluß, 狐狸过河, und die Sonne 🌞 geht unter. " * 8

MakeEngine = Callable[[], Awaitable[Engine]]


@pytest.fixture(params=["echo", "llama"])
async def make_engine(request: pytest.FixtureRequest, tiny_weights: int) -> AsyncIterator[MakeEngine]:
    engines: list[Engine] = []

    async def make() -> Engine:
        engine: Engine
        if request.param == "echo":
            engine = EchoEngine(context=CONTEXT, chunk=64, queue=QUEUE)
        else:
            settings = EngineSettings(context=CONTEXT, batch=64, threads=1, queue=QUEUE, uid=64001)
            engine = LlamaEngine(tiny_weights, CHAT_TEMPLATE, settings)
        engines.append(engine)
        await engine.start()
        return engine

    yield make
    for engine in engines:
        await engine.close()


@pytest.fixture
async def engine(make_engine: MakeEngine) -> Engine:
    return await make_engine()


def ask(content: str = CONTENT, *, max_tokens: int | None = 40, stop: tuple[str, ...] = ()) -> ChatRequest:
    return ChatRequest((ChatMessage("user", content),), max_tokens=max_tokens, temperature=0, stop=stop)


async def answer(engine: Engine, request: ChatRequest) -> tuple[str, Finished]:
    events = [event async for event in engine.generate(request)]
    *deltas, finished = events
    assert isinstance(finished, Finished)
    text = ""
    for delta in deltas:
        assert isinstance(delta, Delta)
        assert delta.text
        text += delta.text
    return text, finished


async def test_an_answer_is_text_and_then_one_end(engine: Engine) -> None:
    text, finished = await answer(engine, ask())
    assert text
    assert finished.reason == "length"
    assert finished.completion_tokens == 40
    assert finished.prompt_tokens > len(CONTENT)


async def test_the_same_request_gets_the_same_answer_whatever_came_between(engine: Engine) -> None:
    first = await answer(engine, ask())
    await answer(engine, ask("Something else altogether", max_tokens=5))
    assert await answer(engine, ask()) == first


async def test_requests_at_the_same_time_do_not_mix(engine: Engine) -> None:
    contents = ["one" * 50, "two" * 60, "three" * 70]
    alone = [await answer(engine, ask(content)) for content in contents]
    together = await asyncio.gather(*(answer(engine, ask(content)) for content in contents))
    assert list(together) == alone


async def test_an_answer_ends_before_a_stop_string(engine: Engine) -> None:
    whole, _ = await answer(engine, ask())
    stop = whole[7:10]
    text, finished = await answer(engine, ask(stop=("never to be seen", stop)))
    assert text == whole[: whole.index(stop)]
    assert finished.reason == "stop"
    assert finished.completion_tokens < 40


async def test_an_answer_ends_where_the_context_does(engine: Engine) -> None:
    filler = "x" * (CONTEXT - 60)
    _, finished = await answer(engine, ask(filler, max_tokens=None))
    assert finished.reason == "length" or finished.prompt_tokens + finished.completion_tokens < CONTEXT
    assert finished.prompt_tokens + finished.completion_tokens <= CONTEXT


async def test_a_prompt_longer_than_the_context_is_refused_with_both_numbers(engine: Engine) -> None:
    with pytest.raises(ContextExceeded) as caught:
        await answer(engine, ask("x" * (CONTEXT + 1)))
    assert caught.value.code == "context_exceeded"
    assert str(CONTEXT - 1) in (caught.value.expected or "")
    assert "4" in (caught.value.got or "")
    assert (await answer(engine, ask()))[1].completion_tokens == 40


async def test_a_full_queue_refuses_at_once(engine: Engine) -> None:
    long = ask(max_tokens=None)
    async with aclosing(engine.generate(long)) as first:
        await anext(first)
        waiting = [asyncio.create_task(answer(engine, ask(max_tokens=2))) for _ in range(QUEUE)]
        await asyncio.sleep(0)
        with pytest.raises(Overloaded) as caught:
            await answer(engine, ask())
        assert caught.value.code == "overloaded"
    for task in waiting:
        assert (await task)[1].completion_tokens == 2


async def test_closing_the_iterator_frees_the_engine(engine: Engine) -> None:
    for _ in range(QUEUE + 2):
        async with aclosing(engine.generate(ask(max_tokens=None))) as events:
            assert isinstance(await anext(events), Delta)
    assert (await answer(engine, ask()))[1].completion_tokens == 40


async def test_cancelling_the_reader_frees_the_engine_also_while_it_waits(engine: Engine) -> None:
    async with aclosing(engine.generate(ask(max_tokens=None))) as first:
        await anext(first)
        waiting = [asyncio.create_task(answer(engine, ask(max_tokens=None))) for _ in range(QUEUE)]
        await asyncio.sleep(0)
        for task in waiting:
            task.cancel()
        assert all(
            isinstance(end, asyncio.CancelledError) for end in await asyncio.gather(*waiting, return_exceptions=True)
        )
    assert (await answer(engine, ask()))[1].completion_tokens == 40


async def test_closing_the_engine_fails_what_is_in_flight_and_what_comes_after(engine: Engine) -> None:
    async with aclosing(engine.generate(ask(max_tokens=None))) as events:
        await anext(events)
        await engine.close()
        with pytest.raises(EngineFailed) as caught:
            while True:
                await anext(events)
        assert caught.value.code == "engine_failed"
    with pytest.raises(Unavailable):
        await answer(engine, ask())
    await engine.close()
