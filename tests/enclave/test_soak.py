"""Mixed requests, many of them given up half-way, for a bounded count: nothing is left of them, in no place.

``make soak`` runs many more of them than a test does.
"""

from __future__ import annotations

import asyncio
import os
import random
from contextlib import aclosing
from pathlib import Path

import pytest

from enclave.engine import LlamaEngine
from enclave.generation import ContextExceeded, InvalidRequest, Overloaded
from tests.engines import engine_settings
from tests.gguf_files import CHAT_TEMPLATE
from vsockrpc.chat import ChatMessage, ChatRequest, CompletionRequest, GenerationRequest
from vsockrpc.messages import Done

REQUESTS = int(os.environ.get("STRONGROOM_SOAK_REQUESTS", "240"))
AT_ONCE = 12
SETTINGS = engine_settings(context=512, parallel=4, cells=1024, batch=64, prefill=32, threads=1, queue=16)
SECRETS = (None, b"a" * 32, b"b" * 32)
GROWTH = 24 << 20
"""Bytes that the process may have grown by between the first quarter and the end: an allocator's, not a leak's."""


def resident(pid: int) -> int:
    """Bytes, without what is mapped from the weights."""
    fields = dict(line.split(":", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines())
    return int(fields["RssAnon"].removesuffix("kB")) * 1024


def some_request(chance: random.Random) -> GenerationRequest:
    text = "".join(chance.choice("abc xyz\n") for _ in range(chance.choice((3, 60, 300, 2000))))
    options = {
        "max_tokens": chance.choice((1, 5, 40, None)),
        "temperature": chance.choice((0.0, 1.0)),
        "seed": chance.choice((None, 7)),
        "stop": chance.choice(((), ("a", "never"))),
        "top_logprobs": chance.choice((None, None, 3)),
        "frequency_penalty": chance.choice((0.0, 0.5)),
        "cache_secret": chance.choice(SECRETS),
    }
    if chance.random() < 0.3:
        return CompletionRequest(prompt=text, **options)  # type: ignore[arg-type]
    return ChatRequest((ChatMessage("user", text),), **options)  # type: ignore[arg-type]


@pytest.mark.timeout(3600)
async def test_nothing_is_left_of_requests_that_came_and_went(tiny_weights: int) -> None:
    engine = LlamaEngine(tiny_weights, CHAT_TEMPLATE, SETTINGS)
    await engine.start()
    chance = random.Random(6)
    ends: dict[str, int] = {}

    async def one() -> None:
        leaves_after = chance.choice((None, None, 0, 1, 3, 10))
        try:
            async with aclosing(engine.generate(some_request(chance))) as events:
                count = 0
                async for event in events:
                    if isinstance(event, Done):
                        end = "answered"
                    count += 1
                    if count == leaves_after:
                        end = "left"
                        break
        except (ContextExceeded, Overloaded, InvalidRequest) as error:
            end = error.code
        ends[end] = ends.get(end, 0) + 1

    async def client(count: int) -> None:
        for _ in range(count):
            task = asyncio.create_task(one())
            if chance.random() < 0.2:  # the connection breaks, wherever the request stands
                await asyncio.sleep(chance.random() / 50)
                task.cancel()
            await asyncio.gather(task, return_exceptions=True)
            if task.cancelled():
                ends["cancelled"] = ends.get("cancelled", 0) + 1
            else:
                task.result()

    try:
        await asyncio.gather(*(client(REQUESTS // 4 // AT_ONCE) for _ in range(AT_ONCE)))
        assert engine.pid is not None
        pid, before = engine.pid, resident(engine.pid)
        await asyncio.gather(*(client(REQUESTS * 3 // 4 // AT_ONCE) for _ in range(AT_ONCE)))
        assert engine.pid == pid, "the process did not outlive it"
        assert resident(pid) - before < GROWTH
        assert ends.keys() >= {"answered", "left", "cancelled", "context_exceeded"}
        # Every sequence and every cell is there again: one after the other takes a whole context of them.
        whole = [ChatRequest((ChatMessage("user", "x" * 400),), temperature=0, max_tokens=None) for _ in range(4)]
        alone = [await _last(engine, request) for request in whole]
        together = await asyncio.gather(*(_last(engine, request) for request in whole))
        assert [done.usage.prompt_tokens for done in together] == [done.usage.prompt_tokens for done in alone]
        assert engine._requests == 0
    finally:
        await engine.close()


async def _last(engine: LlamaEngine, request: GenerationRequest) -> Done:
    *_, done = [event async for event in engine.generate(request)]
    assert isinstance(done, Done)
    return done
