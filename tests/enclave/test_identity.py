"""Channel keys over time, on a clock that the test turns."""

from __future__ import annotations

import secrets
from dataclasses import dataclass

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from attestation.commitment import Commitment, Entropy
from enclave.config import ChannelSettings
from enclave.identity import MAX_KEYS, Identity, OfferedKey
from vsockrpc.sealed import SealedError

ROTATION, LIFETIME, REQUESTS = 10, 30, 4
MODEL, CONFIGURATION = b"\x01" * 48, b"\x02" * 48


@dataclass
class Clock:
    now: float = 1000.0

    def __call__(self) -> float:
        return self.now


class Scene:
    """An identity, its clock, and the keys that it announced."""

    def __init__(self, *, requests: int = REQUESTS) -> None:
        self.clock = Clock()
        self.announced: list[bytes] = []
        self.identity = Identity(
            MODEL,
            CONFIGURATION,
            Entropy.HOST,
            ChannelSettings(ROTATION, LIFETIME, requests),
            on_offer=self.announced.append,
            clock=self.clock,
        )

    def offered(self) -> bytes:
        return self.identity.current().commitment.key_id

    def accepts(self, key_id: bytes) -> bool:
        return self.identity.find(key_id) is not None

    def use_up(self, key: OfferedKey) -> None:
        for _ in range(REQUESTS):
            key.secrets_seen.add(secrets.token_bytes(16))


@pytest.fixture
def scene() -> Scene:
    return Scene()


def refused(scene: Scene, key: OfferedKey, request_id: bytes) -> bool:
    try:
        scene.identity.begin(key, request_id)
    except SealedError as error:
        if error.code != "duplicate_request":
            raise
        return True
    return False


# --- What a key commits to ----------------------------------------------------------------------------------------


def test_the_commitment_is_of_this_boot(scene: Scene) -> None:
    commitment = scene.identity.current().commitment
    assert Commitment.decode(commitment.encode()) == commitment
    assert (commitment.model, commitment.configuration) == (MODEL, CONFIGURATION)
    assert (commitment.entropy, commitment.lifetime) == (Entropy.HOST, LIFETIME)
    assert commitment.boot_id == scene.identity.boot_id


def test_a_boot_has_one_id_and_one_receipt_key_and_many_channel_keys(scene: Scene) -> None:
    first = scene.identity.current().commitment
    scene.clock.now += ROTATION
    second = scene.identity.current().commitment
    assert (first.boot_id, first.receipt_key) == (second.boot_id, second.receipt_key)
    assert first.key != second.key
    other = Scene().identity.current().commitment
    assert other.boot_id != first.boot_id
    assert other.receipt_key != first.receipt_key


def test_the_receipt_key_committed_to_is_the_one_that_signs(scene: Scene) -> None:
    public = Ed25519PublicKey.from_public_bytes(scene.identity.current().commitment.receipt_key)
    public.verify(scene.identity.receipt_key.sign(b"receipt"), b"receipt")


# --- Rotation -----------------------------------------------------------------------------------------------------


def test_a_key_is_offered_for_the_rotation_and_then_another(scene: Scene) -> None:
    first = scene.offered()
    scene.clock.now += ROTATION - 0.001
    assert scene.offered() == first
    scene.clock.now += 0.001
    assert scene.offered() != first
    assert scene.announced == [first, scene.offered()]


def test_a_key_is_made_when_it_is_asked_for(scene: Scene) -> None:
    scene.clock.now += 100 * ROTATION
    assert scene.announced == []
    scene.offered()
    scene.clock.now += 100 * ROTATION
    scene.offered()
    assert len(scene.announced) == 2


def test_a_key_is_accepted_for_its_lifetime_after_its_last_offer(scene: Scene) -> None:
    first = scene.offered()
    scene.clock.now += ROTATION + LIFETIME - 0.001
    assert scene.accepts(first)
    scene.clock.now += 0.001
    assert not scene.accepts(first)


def test_a_retired_key_is_never_offered_again(scene: Scene) -> None:
    seen: list[bytes] = []
    for _ in range(30):
        if scene.offered() not in seen[-1:]:
            assert scene.offered() not in seen
            seen.append(scene.offered())
        scene.clock.now += ROTATION / 2
    assert len(seen) == 15


def test_an_unknown_key_is_not_found(scene: Scene) -> None:
    scene.offered()
    for key_id in (b"", bytes(16), bytes(1000)):
        assert scene.identity.find(key_id) is None


# --- Replay -------------------------------------------------------------------------------------------------------


def test_a_key_that_can_remember_no_more_is_replaced_and_refused(scene: Scene) -> None:
    key = scene.identity.current()
    for _ in range(REQUESTS):
        assert scene.accepts(key.commitment.key_id)
        key.secrets_seen.add(secrets.token_bytes(16))
    assert not scene.accepts(key.commitment.key_id)
    assert scene.offered() != key.commitment.key_id


def test_keys_used_up_too_fast_are_refused_and_not_forgotten(scene: Scene) -> None:
    used = []
    for _ in range(MAX_KEYS):
        key = scene.identity.current()
        scene.use_up(key)
        used.append(key.commitment.key_id)
    with pytest.raises(SealedError) as caught:
        scene.identity.current()
    assert caught.value.code == "overloaded"
    assert not any(scene.accepts(key_id) for key_id in used)
    scene.clock.now += ROTATION + LIFETIME
    assert scene.offered() not in used


def test_a_request_begins_once(scene: Scene) -> None:
    key = scene.identity.current()
    assert not refused(scene, key, b"one")
    assert refused(scene, key, b"one")
    assert not refused(scene, key, b"two")


def test_a_request_begins_once_under_whatever_key(scene: Scene) -> None:
    first = scene.identity.current()
    assert not refused(scene, first, b"id")
    scene.clock.now += ROTATION
    second = scene.identity.current()
    assert second is not first
    assert refused(scene, second, b"id")


def test_a_used_up_key_still_knows_what_was_begun_under_it(scene: Scene) -> None:
    first = scene.identity.current()
    assert not refused(scene, first, b"id")
    scene.use_up(first)
    assert refused(scene, scene.identity.current(), b"id")


def test_no_request_begins_under_a_key_that_has_expired(scene: Scene) -> None:
    """Whoever holds its final record back for long enough outlives whatever remembers its id."""
    key = scene.identity.current()
    scene.clock.now += ROTATION + LIFETIME
    with pytest.raises(SealedError) as caught:
        scene.identity.begin(key, b"id")
    assert caught.value.code == "key_expired"


def test_a_request_cannot_begin_again_when_its_key_has_expired(scene: Scene) -> None:
    """The conveyor delivers the first attempt at the last moment, forges ``unknown_key``, and holds the second attempt
    for as long as its own key is accepted."""
    first = scene.identity.current()
    scene.clock.now = first.accepted_until - 0.001
    assert not refused(scene, first, b"id")
    scene.clock.now += LIFETIME
    second = scene.identity.current()
    scene.clock.now = second.accepted_until - 0.001
    assert refused(scene, second, b"id")


def test_what_was_begun_is_forgotten_in_the_end(scene: Scene) -> None:
    """An enclave runs for months: what it remembers is bounded by time as well as by number."""
    key = scene.identity.current()
    assert not refused(scene, key, b"id")
    scene.clock.now = key.accepted_until + ROTATION + 2 * LIFETIME
    assert not refused(scene, scene.identity.current(), b"id")


# --- Any history --------------------------------------------------------------------------------------------------


class Histories(RuleBasedStateMachine):
    """Time passes, keys are offered and used up, requests begin; against a plain record of what happened."""

    def __init__(self) -> None:
        super().__init__()
        self.scene = Scene()
        self.made: dict[bytes, float] = {}
        self.last_offered: dict[bytes, float] = {}
        self.keys: dict[bytes, OfferedKey] = {}
        self.used: dict[bytes, int] = {}
        self.retired: set[bytes] = set()
        self.begun: dict[bytes, float] = {}

    @property
    def now(self) -> float:
        return self.scene.clock.now

    @rule(seconds=st.sampled_from([0.5, ROTATION / 2, ROTATION, LIFETIME, 3 * LIFETIME]))
    def time_passes(self, seconds: float) -> None:
        self.scene.clock.now += seconds

    @rule()
    def a_key_is_asked_for(self) -> None:
        try:
            key = self.scene.identity.current()
        except SealedError as error:
            if error.code != "overloaded":
                raise
            assert sum(self.now < made + ROTATION + LIFETIME for made in self.made.values()) == MAX_KEYS
            return
        key_id = key.commitment.key_id
        assert key_id not in self.retired
        assert self.now < self.made.setdefault(key_id, self.now) + ROTATION
        assert self.used.setdefault(key_id, 0) < REQUESTS
        self.retired |= self.made.keys() - {key_id}
        self.last_offered[key_id] = self.now
        self.keys[key_id] = key

    @precondition(lambda self: self.keys)
    @rule(data=st.data())
    def a_request_comes(self, data: st.DataObject) -> None:
        key_id = data.draw(st.sampled_from(list(self.keys)))
        key = self.scene.identity.find(key_id)
        if key is not None:
            assert key is self.keys[key_id]
            key.secrets_seen.add(secrets.token_bytes(16))
            self.used[key_id] += 1
            request_id = data.draw(st.sampled_from([b"a", b"b", b"c"]))
            if refused(self.scene, key, request_id):
                assert request_id in self.begun
            else:
                assert self.now > self.begun.get(request_id, 0.0) + LIFETIME
                self.begun[request_id] = self.now

    @invariant()
    def what_was_offered_lately_is_accepted(self) -> None:
        for key_id, offered in self.last_offered.items():
            full = self.used[key_id] >= REQUESTS
            if self.now < offered + LIFETIME:
                assert self.scene.accepts(key_id) == (not full)
            if self.now >= self.made[key_id] + ROTATION + LIFETIME:
                assert not self.scene.accepts(key_id)

    @invariant()
    def few_keys_are_kept(self) -> None:
        assert len(self.scene.identity._keys) <= MAX_KEYS
        assert self.scene.announced == list(self.made)


TestHistories = Histories.TestCase
TestHistories.settings = settings(max_examples=40, stateful_step_count=30, deadline=None)
