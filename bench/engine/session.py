"""Our second way to an enclave: a :class:`strongroom.session.Session` of Python, without HTTP of OpenAI's shape."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from typing import cast

from attestation.policy import AppraisalPolicy
from bench.engine.load import Ask, Heard
from bench.engine.sides import Side
from strongroom.session import Session
from vsockrpc.chat import ChatMessage, ChatRequest, Role
from vsockrpc.messages import Delta, Done


async def through_session(side: Side, asks: Sequence[Ask]) -> list[Heard]:
    """All of a round at once, over one session that is verified before."""
    assert side.policy is not None, "a side of ours has a policy"
    async with Session(side.proxy, AppraisalPolicy.load(side.policy)) as session:
        await session.verify()
        return await asyncio.gather(*(_listen(session, ask) for ask in asks))


async def _listen(session: Session, ask: Ask) -> Heard:
    messages = tuple(ChatMessage(cast(Role, each["role"]), each["content"]) for each in ask.messages)
    request = ChatRequest(messages=messages, max_tokens=ask.tokens, temperature=0.0)
    asked, times, texts, done = time.perf_counter(), list[float](), list[str](), None
    async for answer in session.chat(request):
        match answer:
            case Delta():
                times.append(time.perf_counter())
                texts.append(answer.content)
            case Done():
                done = answer
    assert done is not None, "an answer ends with Done, or raises"
    usage = done.usage
    return Heard(
        asked=asked,
        events=tuple(times),
        ended=time.perf_counter(),
        text="".join(texts),
        prompt_tokens=usage.prompt_tokens,
        completion_tokens=usage.completion_tokens,
        cached_tokens=usage.cached_tokens,
        finish_reason=done.finish_reason,
    )
