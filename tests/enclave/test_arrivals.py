"""Requests on their way in: who waits for whom, for how long, and who goes where there is no room."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import pytest

from attestation.errors import StrongroomError
from enclave.arrivals import Arrivals


class Client:
    """Sends when the test says so."""

    def __init__(self, arrivals: Arrivals) -> None:
        self._sent: asyncio.Queue[bytes | None] = asyncio.Queue()
        self._pause = asyncio.Event()
        self._pause.set()
        self.task = asyncio.create_task(self._read(arrivals))

    async def _chunks(self) -> AsyncIterator[bytes]:
        while (chunk := await self._sent.get()) is not None:
            yield chunk

    async def _read(self, arrivals: Arrivals) -> int:
        size = 0
        async for chunk in arrivals.receive(self._chunks()):
            size += len(chunk)
            await self._pause.wait()
        return size

    async def sends(self, size: int | None) -> None:
        """None ends it."""
        self._sent.put_nowait(None if size is None else bytes(size))
        for _ in range(8):
            await asyncio.sleep(0)

    def is_busy(self) -> None:
        """What it sent is worked on before the next is waited for."""
        self._pause.clear()

    def goes_on(self) -> None:
        self._pause.set()

    async def code(self) -> str:
        with pytest.raises(StrongroomError) as caught:
            await self.task
        return caught.value.code


@pytest.fixture
def arrivals(monkeypatch: pytest.MonkeyPatch) -> Arrivals:
    monkeypatch.setattr("enclave.arrivals.MAX_HALF_READ", 1000)
    return Arrivals()


async def test_whoever_left_requests_half_sent_keeps_nobody_out(arrivals: Arrivals) -> None:
    silent = [Client(arrivals) for _ in range(10)]
    for each in silent:
        await each.sends(100)
    assert arrivals.size == 1000
    for count in range(1, 4):
        client = Client(arrivals)
        await client.sends(100)
        await client.sends(None)
        assert await client.task == 100
        assert [each.task.done() for each in silent] == [True] + [False] * 9, "room for one is made once"
        assert arrivals.size == 900, count
    assert await silent[0].code() == "overloaded"
    for each in silent[1:]:
        await each.sends(None)
        assert await each.task == 100
    assert arrivals.size == 0


async def test_one_that_is_worked_on_is_not_given_up(arrivals: Arrivals) -> None:
    busy, silent = Client(arrivals), Client(arrivals)
    busy.is_busy()
    await busy.sends(500)
    await silent.sends(500)
    client = Client(arrivals)
    await client.sends(1)
    assert await silent.code() == "overloaded"
    await client.sends(600)
    assert await client.code() == "overloaded", "nobody is waited for but itself"
    busy.goes_on()
    await busy.sends(None)
    assert await busy.task == 500
    assert arrivals.size == 0


async def test_what_came_in_the_same_turn_does_not_save_who_was_given_up(arrivals: Arrivals) -> None:
    silent, client = Client(arrivals), Client(arrivals)
    await silent.sends(900)
    client._sent.put_nowait(bytes(200))
    silent._sent.put_nowait(bytes(50))
    await client.sends(None)
    assert await silent.code() == "overloaded"
    assert await client.task == 200
    assert arrivals.size == 0


async def test_who_has_sent_nothing_makes_no_room(arrivals: Arrivals) -> None:
    empty, silent, client = (Client(arrivals) for _ in range(3))
    await empty.sends(0)
    await silent.sends(900)
    await client.sends(900)
    assert not empty.task.done()
    assert await silent.code() == "overloaded"
    for each in (empty, client):
        await each.sends(None)
        await each.task


async def test_a_client_may_be_slow_but_not_slower_than_the_least_rate(
    arrivals: Arrivals, monkeypatch: pytest.MonkeyPatch
) -> None:
    loop = asyncio.get_running_loop()
    passed, real = 0.0, loop.time
    monkeypatch.setattr(loop, "time", lambda: real() + passed)
    honest, dripping = Client(arrivals), Client(arrivals)
    monkeypatch.setattr("enclave.arrivals.LEAST_RATE", 10)
    for _ in range(9):
        await honest.sends(100)
        passed += 10
    await dripping.sends(1)
    passed += 20
    await honest.sends(None)
    await dripping.sends(1)
    passed += 20
    await dripping.sends(None)
    assert await honest.task == 900
    with pytest.raises(TimeoutError):
        await dripping.task
    assert arrivals.size == 0


async def test_what_is_done_with_its_bytes_is_not_held_against_a_client(
    arrivals: Arrivals, monkeypatch: pytest.MonkeyPatch
) -> None:
    loop = asyncio.get_running_loop()
    passed, real = 0.0, loop.time
    monkeypatch.setattr(loop, "time", lambda: real() + passed)
    client = Client(arrivals)
    client.is_busy()
    await client.sends(1)
    passed += 1000
    client.goes_on()
    await client.sends(1)
    await client.sends(None)
    assert await client.task == 2
