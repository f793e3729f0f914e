"""Requests on their way in: all together hold a bounded memory, and each has to come at a least rate.

Whoever leaves many requests half sent must not keep others out, so where there is no room it is the oldest of those
that are waited for that goes, and not the one that moves.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator
from typing import Final

from attestation.errors import StrongroomError

MAX_HALF_READ: Final = 64 << 20
"""Bytes of all requests together that have begun to arrive and have not ended."""
ARRIVAL_SECONDS: Final = 30.0
"""That a client may be waited for, beside what its bytes take at the least rate."""
LEAST_RATE: Final = 8 << 10
"""Bytes a second: 64 kbit/s. With it a request of 1 MiB may take 158 s."""


class Arrivals:
    """All that are arriving."""

    def __init__(self) -> None:
        self.size = 0
        """Bytes of them that are here."""
        self._all: dict[_Arrival, None] = {}
        """In the order in which they began."""

    async def receive(self, chunks: AsyncIterator[bytes]) -> AsyncGenerator[bytes]:
        """What arrives. Raises TimeoutError where the client is too slow, and StrongroomError ``overloaded``."""
        arrival = _Arrival()
        self._all[arrival] = None
        try:
            while (chunk := await arrival.next(chunks)) is not None:
                arrival.received += len(chunk)
                self.size += len(chunk)
                self._make_room(arrival)
                yield chunk
        finally:
            del self._all[arrival]
            self.size -= arrival.received

    def _make_room(self, newest: _Arrival) -> None:
        while self.size > MAX_HALF_READ:
            oldest = next(each for each in self._all if each is newest or (each.is_waited_for and each.received))
            if oldest is newest:
                raise _too_many()
            self.size -= oldest.received
            oldest.give_up()


class _Arrival:
    """One of them."""

    def __init__(self) -> None:
        self.received = 0
        """Bytes; none any more when it was given up."""
        self._waited = 0.0
        """Seconds, for its client alone: what is done with its bytes between them is not held against it."""
        self._timeout: asyncio.Timeout | None = None
        self._is_given_up = False

    @property
    def is_waited_for(self) -> bool:
        return self._timeout is not None

    async def next(self, chunks: AsyncIterator[bytes]) -> bytes | None:
        """None at the end."""
        loop = asyncio.get_running_loop()
        begun = loop.time()
        try:
            async with asyncio.timeout(ARRIVAL_SECONDS + self.received / LEAST_RATE - self._waited) as self._timeout:
                chunk = await anext(chunks, None)
        except TimeoutError:
            if not self._is_given_up:
                raise
        finally:
            self._timeout = None
        if self._is_given_up:
            raise _too_many()
        self._waited += loop.time() - begun
        return chunk

    def give_up(self) -> None:
        """While it is waited for: what it has goes in this turn of the loop."""
        assert self._timeout is not None, "it is waited for"
        self._is_given_up, self.received = True, 0
        self._timeout.reschedule(asyncio.get_running_loop().time())


def _too_many() -> StrongroomError:
    return StrongroomError("overloaded", "too many requests are arriving at once")
