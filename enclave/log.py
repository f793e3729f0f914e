"""What an enclave says of itself: a closed catalogue of content-free events.

There is no free text. A field is a number, a digest, a member of a fixed set, or an error's code; and once clients
are served, what concerns requests leaves only as totals over a fixed interval, never for one request (DESIGN,
invariant 8). The parent reads the events over the RPC.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections import deque
from collections.abc import AsyncGenerator
from dataclasses import asdict, dataclass, field
from enum import StrEnum
from typing import ClassVar, TypeAlias

from attestation.model_family import CallFormat, Family
from enclave.kms.errors import KMS_CODES

TOTALS_INTERVAL_SECONDS = 60


class Phase(StrEnum):
    """Where the boot stands."""

    COLD = "COLD"
    ENTROPY = "ENTROPY"
    CONFIGURED = "CONFIGURED"
    MODEL_COMMITTED = "MODEL_COMMITTED"
    KEYED = "KEYED"
    SERVING = "SERVING"
    HALTED = "HALTED"


@dataclass(frozen=True, slots=True)
class PhaseReached:
    """The boot moved on."""

    event: ClassVar = "phase"
    phase: Phase


@dataclass(frozen=True, slots=True)
class Halted:
    """The boot failed for good. It happens before any client is served, so expected and got hold digests, names and
    numbers of the operator's own."""

    event: ClassVar = "halted"
    phase: Phase
    code: str
    message: str
    expected: str | None
    got: str | None


@dataclass(frozen=True, slots=True)
class WeightsReceived:
    """Bytes of the model's weights that have arrived."""

    event: ClassVar = "weights"
    received: int
    total: int


@dataclass(frozen=True, slots=True)
class EngineStarted:
    """The first engine process is ready. Two flags say which confinement this system gave it, and the rest how the
    model's answers are read: one of an unknown family as plain text, but for what its template shows. Later starts,
    which a request may have caused, are counted in :class:`Totals`."""

    event: ClassVar = "engine_started"
    own_user: bool
    seccomp: bool
    family: Family
    reasons: bool
    calls: CallFormat | None


@dataclass(frozen=True, slots=True)
class EngineLost:
    """No engine process will be started any more: the enclave answers nothing but its events from now on. ``kind`` is
    the name of an exception's class."""

    event: ClassVar = "engine_lost"
    kind: str


@dataclass(frozen=True, slots=True)
class KeyOffered:
    """A new channel key is offered. Its id is public: it routes requests."""

    event: ClassVar = "key_offered"
    key_id: str


@dataclass(frozen=True, slots=True)
class NsmFailed:
    """The NSM gave no attestation document."""

    event: ClassVar = "nsm_failed"
    code: str


@dataclass(frozen=True, slots=True)
class InternalError:
    """A defect outside of any request: the name of an exception's class, never its text."""

    event: ClassVar = "internal_error"
    kind: str


@dataclass(slots=True)
class Totals:
    """Counts over one interval of :data:`TOTALS_INTERVAL_SECONDS`."""

    event: ClassVar = "totals"
    evidence: int = 0
    """Documents asked for."""
    requests: int = 0
    """Sealed calls and envelopes begun; each ends in one of the four below, perhaps in a later interval."""
    answered: int = 0
    """Answered to the end."""
    failed: int = 0
    """Answered with a sealed error."""
    cancelled: int = 0
    """Given up by the client: it left, or it did not read."""
    refused: int = 0
    """Ended by a clear fault, before the secret was opened."""
    defects: int = 0
    """Exceptions that no code raised on purpose, in requests or beside them."""
    engine_restarts: int = 0
    """Engine processes that ended while requests were served."""
    kms: dict[str, int] = field(default_factory=dict)
    """Envelopes whose key did not come, by why: of :data:`~enclave.kms.errors.KMS_CODES` those that occurred."""

    def count_kms(self, code: str) -> None:
        """A key did not come. A code that is not KMS's is not counted: nothing else becomes a name in an event."""
        if code in KMS_CODES:
            self.kms[code] = self.kms.get(code, 0) + 1


Event: TypeAlias = (
    PhaseReached
    | Halted
    | WeightsReceived
    | EngineStarted
    | EngineLost
    | KeyOffered
    | NsmFailed
    | InternalError
    | Totals
)


@dataclass(slots=True)
class EventLog:
    """The last events, for whoever asks later, and the way to follow new ones. Bounded: a reader who is too slow
    misses some."""

    capacity: int = 1024
    totals: Totals = field(default_factory=Totals)
    _recent: deque[str] = field(init=False)
    _written: int = field(default=0, init=False)
    _changed: asyncio.Event = field(default_factory=asyncio.Event, init=False)
    _closed: bool = field(default=False, init=False)

    def __post_init__(self) -> None:
        self._recent = deque(maxlen=self.capacity)

    def write(self, event: Event) -> None:
        body = {"event": event.event, "at": round(time.monotonic(), 3), **asdict(event)}
        self._recent.append(json.dumps(body, separators=(",", ":")))
        self._written += 1
        self._wake()

    def close_interval(self) -> None:
        """Writes the interval's totals and begins the next. An interval without a request is written too: silence is
        no signal."""
        self.write(self.totals)
        self.totals = Totals()

    def close(self) -> None:
        """Ends every :meth:`follow` once it has said what there is."""
        self._closed = True
        self._wake()

    def _wake(self) -> None:
        self._changed.set()
        self._changed = asyncio.Event()

    async def follow(self) -> AsyncGenerator[str]:
        """JSON texts, one an event: the recent ones, then new ones as they come."""
        seen = max(0, self._written - len(self._recent))
        while True:
            oldest = self._written - len(self._recent)
            fresh = list(self._recent)[max(0, seen - oldest) :]
            seen = self._written
            for line in fresh:
                yield line
            if seen == self._written:
                if self._closed:
                    return
                await self._changed.wait()
