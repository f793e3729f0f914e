"""An answer on its beat: what the work writes waits here until its record's tick comes.

The beat runs from the acceptance of a request to its end whether or not there is something to say, so that an
observer of the ciphertext learns the answer's duration in buckets of ticks and nothing of its tokens. With a tick of
zero, records leave as soon as there is content.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

from attestation.errors import StrongroomError
from enclave.config import PacingSettings
from vsockrpc.messages import Failure
from vsockrpc.sealed import LENGTH_PREFIX_SIZE, AnswerKeys, AnswerRecords
from vsockrpc.transport import Fault, IncomingCall

MAX_PENDING = 64 * 1024
"""Bytes of an answer that may wait for their tick before the work behind it has to."""
DRAIN_SECONDS = 30
"""How much longer than its work and its beat an answer may take to leave."""


class PacedAnswer:
    """One answer. :meth:`run` does the work and keeps the beat; the work calls :meth:`write`."""

    def __init__(
        self,
        call: IncomingCall,
        keys: AnswerKeys,
        pacing: PacingSettings,
        *,
        seconds: float,
        on_defect: Callable[[], None],
    ) -> None:
        self._call = call
        self._tick = pacing.tick_ms / 1000
        self._records = AnswerRecords(keys, record_size=pacing.record_bytes, bucket=pacing.bucket_records)
        waiting = MAX_PENDING // (pacing.record_bytes - LENGTH_PREFIX_SIZE) + pacing.bucket_records
        self._grace = DRAIN_SECONDS + waiting * self._tick
        self._seconds = seconds
        self._on_defect = on_defect
        self._changed = asyncio.Event()
        self._drained = asyncio.Event()

    async def write(self, message: bytes) -> None:
        """Queues a message for the next records; waits while too much is queued already."""
        while self._records.pending > MAX_PENDING:
            self._drained.clear()
            await self._drained.wait()
        self._records.write(message)
        self._changed.set()

    async def run(self, work: Callable[[], Awaitable[None]]) -> bool:
        """Runs ``work`` to its end or to a sealed failure. Returns, when the final record has left, whether it came to
        its end.

        A client that does not read is given up after the request's seconds and a grace: Fault ``deadline_exceeded``.
        """
        try:
            async with asyncio.timeout(self._seconds + self._grace):
                await self._call.reply({})
                attempt = asyncio.create_task(self._attempt(work))
                try:
                    await self._beat()
                    return await attempt
                finally:
                    attempt.cancel()
                    await asyncio.wait({attempt})
        except TimeoutError as error:
            raise Fault("deadline_exceeded", "the answer was not taken in time") from error

    async def _attempt(self, work: Callable[[], Awaitable[None]]) -> bool:
        done = False
        try:
            async with asyncio.timeout(self._seconds):
                await work()
            done = True
        except StrongroomError as error:
            self._records.write(Failure.of(error).encode())
        except TimeoutError:
            failure = Failure("deadline_exceeded", "the request took too long", f"<= {self._seconds:g} s")
            self._records.write(failure.encode())
        except Exception:  # a defect must reach the client as a sealed failure, and the log as a count
            self._on_defect()
            self._records.write(Failure("internal", "the enclave failed at this request").encode())
        finally:
            self._records.end()
            self._changed.set()
        return done

    async def _beat(self) -> None:
        loop = asyncio.get_running_loop()
        due = loop.time()
        while not self._records.finished:
            if self._tick:
                due = max(due + self._tick, loop.time())
                await asyncio.sleep(due - loop.time())
            elif not self._records.urgent:
                self._changed.clear()
                await self._changed.wait()
            record = self._records.next_record()
            self._drained.set()
            await self._call.send(record, end=self._records.finished)
