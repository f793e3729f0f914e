"""Who this boot is: keys that live in memory from KEYED until the enclave ends, and the channel keys that rotate.

A channel key is offered for ``rotation_seconds`` and accepted for ``lifetime_seconds`` after its last offer, on the
monotonic clock (the host sets the other one). A retired key is never offered again, and one whose replay set is full
is refused.
"""

from __future__ import annotations

import secrets
import time
from collections.abc import Callable
from dataclasses import dataclass, field

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from attestation.commitment import BOOT_ID_SIZE, Commitment, Entropy
from enclave.config import ChannelSettings
from vsockrpc.sealed import ChannelKey, ReplaySet, SealedError

RECEIPT_SEED_SIZE = 32
MAX_KEYS = 16
"""Keys kept at once, retired ones included: a bound on what a flood of requests can make the enclave remember."""


@dataclass(slots=True)
class OfferedKey:
    """A channel key with what it is bound to and what it has seen."""

    private: ChannelKey
    commitment: Commitment
    secrets_seen: ReplaySet
    requests_begun: ReplaySet
    offered_until: float
    accepted_until: float

    @property
    def full(self) -> bool:
        """Whether it can remember no further request: it is refused from then on, and kept only for what it has
        seen."""
        return self.secrets_seen.full or self.requests_begun.full


def _receipt_key() -> Ed25519PrivateKey:
    """From the kernel's generator at this moment, as :class:`~vsockrpc.sealed.ChannelKey` is."""
    return Ed25519PrivateKey.from_private_bytes(secrets.token_bytes(RECEIPT_SEED_SIZE))


@dataclass(slots=True)
class Identity:
    """The identity of one boot. ``model`` and ``configuration`` are the digests behind PCR16 and PCR17."""

    model: bytes
    configuration: bytes
    entropy: Entropy
    settings: ChannelSettings
    on_offer: Callable[[bytes], None] = lambda key_id: None
    clock: Callable[[], float] = time.monotonic
    boot_id: bytes = field(default_factory=lambda: secrets.token_bytes(BOOT_ID_SIZE), init=False)
    receipt_key: Ed25519PrivateKey = field(default_factory=_receipt_key, init=False)
    _keys: dict[bytes, OfferedKey] = field(default_factory=dict, init=False)
    _current: OfferedKey | None = field(default=None, init=False)
    _outlived: list[tuple[float, ReplaySet]] = field(default_factory=list, init=False)
    """What was begun under keys that are gone, and when each went."""

    def current(self) -> OfferedKey:
        """The key to offer now. It replaces one that has been offered long enough or has seen all that it may.

        Raises SealedError ``overloaded`` when so many keys were used up that another would not fit in memory.
        """
        self._drop_expired()
        key = self._current
        if key is None or self.clock() >= key.offered_until or key.full:
            if len(self._keys) >= MAX_KEYS:
                raise SealedError("overloaded", "too many channel keys were used up at once", expected=f"< {MAX_KEYS}")
            key = self._current = self._make()
            self._keys[key.commitment.key_id] = key
            self.on_offer(key.commitment.key_id)
        return key

    def find(self, key_id: bytes) -> OfferedKey | None:
        """The key with this id, if it is still accepted."""
        self._drop_expired()
        key = self._keys.get(key_id)
        return None if key is None or key.full else key

    def begin(self, key: OfferedKey, request_id: bytes) -> None:
        """Notes that work on a request begins. Raises SealedError ``duplicate_request`` when it has begun before, under
        whatever key, and ``key_expired`` when its key is accepted no more.

        A client whose first attempt met ``unknown_key`` (which anybody can forge) tries again under the next key. So
        ids outlive their key, by as long as such an attempt could be made and held back: else the conveyor has a
        prompt run twice. How long a request may take to arrive does not count in that: it begins under an accepted key
        or not at all.
        """
        self._drop_expired()
        if self._keys.get(key.commitment.key_id) is not key:
            raise SealedError("key_expired", "the request's end came when its key was no longer accepted")
        begun = (*(other.requests_begun for other in self._keys.values()), *(ids for _, ids in self._outlived))
        if any(request_id in ids for ids in begun):
            raise SealedError("duplicate_request", "this request has been begun before")
        key.requests_begun.add(request_id)

    def _drop_expired(self) -> None:
        """Forgets the keys that are accepted no more, and later what had been begun under them."""
        now = self.clock()
        for key_id, key in list(self._keys.items()):
            if now >= key.accepted_until:
                del self._keys[key_id]
                self._outlived.append((key.accepted_until, key.requests_begun))
        # A second attempt is sealed within a lifetime (a client waits no longer), to a key that is accepted for a
        # rotation and a lifetime more.
        memory = self.settings.rotation_seconds + 2 * self.settings.lifetime_seconds
        self._outlived = [(ended, ids) for ended, ids in self._outlived if now < ended + memory]

    def _make(self) -> OfferedKey:
        private = ChannelKey()
        commitment = Commitment(
            key=private.public_bytes,
            lifetime=self.settings.lifetime_seconds,
            boot_id=self.boot_id,
            receipt_key=self.receipt_key.public_key().public_bytes_raw(),
            model=self.model,
            configuration=self.configuration,
            entropy=self.entropy,
        )
        offered_until = self.clock() + self.settings.rotation_seconds
        capacity = self.settings.max_requests
        return OfferedKey(
            private=private,
            commitment=commitment,
            secrets_seen=ReplaySet(capacity),
            requests_begun=ReplaySet(capacity),
            offered_until=offered_until,
            accepted_until=offered_until + self.settings.lifetime_seconds,
        )
