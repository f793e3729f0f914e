"""What every Engine does: one suite on each of them."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import aclosing
from dataclasses import replace
from typing import Any

import pytest

from attestation.model_memory import MAX_PROMPT_SIZE
from enclave.config import EngineSettings
from enclave.engine import Engine, LlamaEngine
from enclave.generation import AnswerExceeded, ContextExceeded, EngineFailed, Overloaded, Unavailable
from enclave.prompt_size import most_bytes
from strongroom.profiles import PROFILES
from tests.engines import EchoEngine, engine_settings
from tests.gguf_files import CHAT_TEMPLATE
from vsockrpc.chat import ChatMessage, ChatRequest, CompletionRequest, GenerationRequest
from vsockrpc.messages import Delta, Done

CONTEXT = 4096
PARALLEL = 3
QUEUE = 2
SETTINGS = engine_settings(context=CONTEXT, parallel=PARALLEL, threads=1, queue=QUEUE)
CONTENT = "Ein Fuchs überquert den Fluß, 狐狸过河, und die Sonne 🌞 geht unter. " * 8
ALICE, BOB = bytes(32), bytes(range(32))

PROFILE = PROFILES["reference"]
WITH_BUDGETS = engine_settings(
    context=PROFILE.context,
    parallel=PROFILE.parallel,
    prompt_tokens=PROFILE.prompt_tokens,
    answer_tokens=PROFILE.answer_tokens,
    batch=256,
    threads=1,
)

MakeEngine = Callable[..., Awaitable[Engine]]


@pytest.fixture(params=["echo", "llama"])
async def make_engine(request: pytest.FixtureRequest, tiny_weights: int) -> AsyncIterator[MakeEngine]:
    engines: list[Engine] = []

    kinds: dict[str, Callable[[EngineSettings], Engine]] = {
        "echo": EchoEngine,
        "llama": lambda settings: LlamaEngine(tiny_weights, CHAT_TEMPLATE, settings),
    }

    async def make(settings: EngineSettings = SETTINGS) -> Engine:
        engine = kinds[request.param](settings)
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


def of(secret: bytes | None, content: str = CONTENT) -> ChatRequest:
    return replace(ask(content, max_tokens=5), cache_secret=secret)


async def answer(engine: Engine, request: GenerationRequest) -> tuple[str, Done]:
    events = [event async for event in engine.generate(request)]
    *deltas, done = events
    assert isinstance(done, Done)
    text = ""
    for delta in deltas:
        assert isinstance(delta, Delta)
        assert delta.content
        text += delta.content
    return text, done


async def cached(engine: Engine, request: GenerationRequest) -> int:
    """Tokens of the prompt that were there already."""
    _, done = await answer(engine, request)
    return done.usage.cached_tokens


# --- An answer -------------------------------------------------------------------------------------------------------


async def test_an_answer_is_text_and_then_one_end(engine: Engine) -> None:
    text, done = await answer(engine, ask())
    assert text
    assert done.finish_reason == "length"
    assert done.usage.completion_tokens == 40
    assert done.usage.prompt_tokens > len(CONTENT)
    assert (done.usage.cached_tokens, done.usage.reasoning_tokens, done.dropped_messages) == (0, 0, 0)


async def test_the_same_request_gets_the_same_answer_whatever_came_between(engine: Engine) -> None:
    first = await answer(engine, ask())
    await answer(engine, ask("Something else altogether", max_tokens=5))
    assert await answer(engine, ask()) == first


async def test_an_answer_ends_before_a_stop_string(engine: Engine) -> None:
    whole, _ = await answer(engine, ask())
    stop = whole[7:10]
    text, done = await answer(engine, ask(stop=("never to be seen", stop)))
    assert text == whole[: whole.index(stop)]
    assert done.finish_reason == "stop"
    assert done.usage.completion_tokens < 40


async def test_an_answer_ends_where_the_context_does(engine: Engine) -> None:
    filler = "x" * (CONTEXT - 60)
    _, done = await answer(engine, ask(filler, max_tokens=None))
    total = done.usage.prompt_tokens + done.usage.completion_tokens
    assert done.finish_reason == "length" or total < CONTEXT
    assert total <= CONTEXT


async def test_a_prompt_longer_than_the_context_is_refused_with_both_numbers(engine: Engine) -> None:
    with pytest.raises(ContextExceeded) as caught:
        await answer(engine, ask("x" * (CONTEXT + 1)))
    assert caught.value.code == "context_exceeded"
    assert str(CONTEXT - 1) in (caught.value.expected or "")
    assert "4" in (caught.value.got or "")
    assert (await answer(engine, ask()))[1].usage.completion_tokens == 40


async def test_text_goes_on_without_a_template(engine: Engine) -> None:
    request = CompletionRequest(prompt=CONTENT, max_tokens=7, temperature=0)
    text, done = await answer(engine, request)
    assert text
    assert done.usage.completion_tokens == 7
    chat = (await answer(engine, ask()))[1].usage.prompt_tokens
    assert len(CONTENT) < done.usage.prompt_tokens < chat
    assert await answer(engine, request) == (text, done)


# --- Budgets ---------------------------------------------------------------------------------------------------------


async def of_tokens(engine: Engine, count: int) -> str:
    """What a person says in a prompt of so many tokens."""
    content = "x" * (count - await engine.count(ask("x")) + 1)
    assert await engine.count(ask(content)) == count
    return content


async def test_the_profile_has_room_for_the_longest_prompt_and_the_longest_answer(make_engine: MakeEngine) -> None:
    engine = await make_engine(WITH_BUDGETS)
    content = await of_tokens(engine, 2048)
    for max_tokens in (512, None):
        _, done = await answer(engine, ask(content, max_tokens=max_tokens))
        assert done.finish_reason == "length"
        assert (done.usage.prompt_tokens, done.usage.completion_tokens) == (2048, 512)


async def test_what_is_over_a_budget_is_refused_with_both_numbers(make_engine: MakeEngine) -> None:
    engine = await make_engine(WITH_BUDGETS)
    with pytest.raises(AnswerExceeded) as answer_of_513:
        await answer(engine, ask("x", max_tokens=513))
    assert (answer_of_513.value.code, answer_of_513.value.exit_code) == ("answer_exceeded", 2)
    assert (answer_of_513.value.expected, answer_of_513.value.got) == ("<= 512 tokens", "513 tokens")
    with pytest.raises(ContextExceeded) as prompt_of_2049:
        await answer(engine, ask(await of_tokens(engine, 2049), max_tokens=1))
    assert (prompt_of_2049.value.expected, prompt_of_2049.value.got) == ("<= 2048 tokens", "2049 tokens")
    assert (await answer(engine, ask(max_tokens=7)))[1].usage.completion_tokens == 7


# --- What does not fit -----------------------------------------------------------------------------------------------

TURN = (ChatMessage("user", "x" * 1000), ChatMessage("assistant", "y"))


def long_chat(turns: int, last: str = "And now?", **options: Any) -> ChatRequest:
    return ChatRequest((*TURN * turns, ChatMessage("user", last)), max_tokens=5, temperature=0, **options)


@pytest.mark.parametrize("turns", [2, 8, most_bytes(CONTEXT) // 1001 + 1, 500])
async def test_the_oldest_turns_of_a_long_chat_are_dropped_however_many_there_are(engine: Engine, turns: int) -> None:
    kept = min(turns, 4)
    request = long_chat(turns, truncation="auto")
    text, done = await answer(engine, request)
    assert done.dropped_messages == 2 * (turns - kept)
    assert await answer(engine, long_chat(kept)) == (text, replace(done, dropped_messages=0))
    assert await engine.count(request) == done.usage.prompt_tokens


async def test_what_is_too_large_to_count_is_refused_by_its_bytes(engine: Engine) -> None:
    most = most_bytes(CONTEXT)
    for request in (
        long_chat(500),
        long_chat(2, "x" * (most + 1), truncation="auto"),
        CompletionRequest(prompt="x" * (most + 1)),
        long_chat(4, "x" * (MAX_PROMPT_SIZE - 1000), truncation="auto"),
    ):
        with pytest.raises(ContextExceeded) as caught:
            await answer(engine, request)
        assert (caught.value.expected or "").startswith(f"<= {CONTEXT - 1} tokens, in <= ")
        assert int((caught.value.got or "").removesuffix(" bytes")) > most
    assert (await answer(engine, ask()))[1].usage.completion_tokens == 40


# --- A count ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("content", ["x", CONTENT, "🌞" * 100])
async def test_a_count_is_that_of_the_answer_s_prompt(engine: Engine, content: str) -> None:
    counted = await engine.count(ask(content))
    assert counted == (await answer(engine, ask(content)))[1].usage.prompt_tokens
    assert await engine.count(replace(ask(content), cache_secret=ALICE, max_tokens=1, temperature=2)) == counted


async def test_a_count_does_not_wait_for_answers(engine: Engine) -> None:
    async with aclosing(engine.generate(ask(max_tokens=None))) as first:
        await anext(first)
        busy = [asyncio.create_task(answer(engine, ask(max_tokens=None))) for _ in range(PARALLEL)]
        await asyncio.sleep(0)
        assert await engine.count(ask("x")) > 0
        for task in busy:
            task.cancel()
        await asyncio.gather(*busy, return_exceptions=True)


# --- Several at once -------------------------------------------------------------------------------------------------


async def test_requests_at_the_same_time_do_not_mix(engine: Engine) -> None:
    contents = ["one" * 50, "two" * 60, "three" * 70]
    alone = [await answer(engine, ask(content)) for content in contents]
    together = await asyncio.gather(*(answer(engine, ask(content)) for content in contents))
    assert list(together) == alone


async def test_a_short_answer_does_not_wait_for_a_long_one(engine: Engine) -> None:
    async with aclosing(engine.generate(ask(max_tokens=None))) as long:
        await anext(long)
        for _ in range(PARALLEL):
            assert (await answer(engine, ask(max_tokens=3)))[1].usage.completion_tokens == 3
        assert isinstance(await anext(long), Delta)  # and it goes on


async def test_as_many_as_there_are_places_are_answered_side_by_side(engine: Engine) -> None:
    """None of them ends before all of them have begun."""
    begun = asyncio.Barrier(PARALLEL)

    async def one() -> int:
        async with aclosing(engine.generate(ask(max_tokens=None))) as events:
            assert isinstance(await anext(events), Delta)
            await begun.wait()
        return 1

    async with asyncio.timeout(60):
        assert await asyncio.gather(*(one() for _ in range(PARALLEL))) == [1] * PARALLEL


async def test_those_who_wait_have_their_turn(engine: Engine) -> None:
    answers = await asyncio.gather(*(answer(engine, ask(max_tokens=4)) for _ in range(PARALLEL + QUEUE)))
    assert [done.usage.completion_tokens for _, done in answers] == [4] * (PARALLEL + QUEUE)
    assert len({text for text, _ in answers}) == 1


async def test_more_than_can_work_and_wait_are_refused_at_once(engine: Engine) -> None:
    async with aclosing(engine.generate(ask(max_tokens=None))) as first:
        await anext(first)
        others = [asyncio.create_task(answer(engine, ask(max_tokens=2))) for _ in range(PARALLEL + QUEUE - 1)]
        await asyncio.sleep(0)
        with pytest.raises(Overloaded) as caught:
            await answer(engine, ask())
        assert caught.value.code == "overloaded"
        assert str(PARALLEL + QUEUE) in (caught.value.expected or "")
    for task in others:
        assert (await task)[1].usage.completion_tokens == 2
    assert (await answer(engine, ask()))[1].usage.completion_tokens == 40


# --- What is kept ----------------------------------------------------------------------------------------------------


async def test_what_was_computed_serves_the_same_secret(engine: Engine) -> None:
    first, done = await answer(engine, of(ALICE))
    assert done.usage.cached_tokens == 0
    again, later = await answer(engine, of(ALICE))
    assert again == first
    assert later.usage.cached_tokens == later.usage.prompt_tokens - 1  # the last one has to be decoded


async def test_what_was_computed_serves_what_goes_on_with_it(engine: Engine) -> None:
    said, done = await answer(engine, of(ALICE))
    messages = (ChatMessage("user", CONTENT), ChatMessage("assistant", said), ChatMessage("user", "And?"))
    longer = replace(of(ALICE), messages=messages)
    assert await cached(engine, longer) >= done.usage.prompt_tokens - 20  # all but where the answer would begin


async def test_what_was_computed_serves_no_other_secret(engine: Engine) -> None:
    expected, _ = await answer(engine, of(ALICE))
    for other in (BOB, None):
        text, done = await answer(engine, of(other))
        assert done.usage.cached_tokens == 0
        assert text == expected


async def test_without_a_secret_nothing_is_kept(engine: Engine) -> None:
    for _ in range(3):
        assert await cached(engine, of(None)) == 0
    assert await cached(engine, of(ALICE)) == 0


async def test_another_beginning_is_computed_anew(engine: Engine) -> None:
    await answer(engine, of(ALICE))
    assert await cached(engine, of(ALICE, "?" + CONTENT)) < 20


async def test_a_count_computes_nothing_that_could_be_kept(engine: Engine) -> None:
    await engine.count(of(ALICE))
    assert await cached(engine, of(ALICE)) == 0


# --- Ends ------------------------------------------------------------------------------------------------------------


async def test_closing_the_iterator_frees_the_engine(engine: Engine) -> None:
    for _ in range(PARALLEL + QUEUE + 2):
        async with aclosing(engine.generate(ask(max_tokens=None))) as events:
            assert isinstance(await anext(events), Delta)
    assert (await answer(engine, ask()))[1].usage.completion_tokens == 40


async def test_cancelling_the_reader_frees_the_engine_also_while_it_waits(engine: Engine) -> None:
    async with aclosing(engine.generate(ask(max_tokens=None))) as first:
        await anext(first)
        others = [asyncio.create_task(answer(engine, ask(max_tokens=None))) for _ in range(PARALLEL + QUEUE - 1)]
        await asyncio.sleep(0)
        for task in others:
            task.cancel()
        ends = await asyncio.gather(*others, return_exceptions=True)
        assert all(isinstance(end, asyncio.CancelledError) for end in ends)
    assert (await answer(engine, ask()))[1].usage.completion_tokens == 40


async def test_closing_the_engine_fails_what_is_in_flight_and_what_comes_after(engine: Engine) -> None:
    async with aclosing(engine.generate(ask(max_tokens=None))) as events, aclosing(engine.generate(ask())) as other:
        await asyncio.gather(anext(events), anext(other))
        await engine.close()
        for answers in (events, other):
            with pytest.raises(EngineFailed) as caught:
                while True:
                    await anext(answers)
            assert caught.value.code == "engine_failed"
    with pytest.raises(Unavailable):
        await answer(engine, ask())
    with pytest.raises(Unavailable):
        await engine.count(ask())
    await engine.close()
