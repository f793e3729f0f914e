"""The house with KMS, in one process: weights that arrive encrypted and prompts that wait, keys whose policies open to
this house's own measurements, and between enclave and emulated KMS the parent's egress and real TLS.
"""

from __future__ import annotations

import asyncio
import base64
import concurrent.futures
import contextlib
import threading
from collections.abc import AsyncIterator, Coroutine, Iterator, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, TypeVar

import pytest

from attestation.envelope import EnvelopePurpose
from attestation.keypolicy.document import KeyArn
from attestation.keypolicy.generate import generate
from attestation.keyrelease import released_to
from attestation.policy import AppraisalPolicy
from attestation.rules import Ignore, KeyRule
from enclave.config import KmsSettings
from enclave.kms.service import Kms, Patience
from enclave.nsm import Nsm
from parent.proxy import Proxy
from strongroom.prompt_file import Reply, open_answer
from tests import attested
from tests.gguf_files import TEXT, Gguf
from tests.house import SETTINGS, EnclaveHouse, Hostile, served
from tests.key_policies import ACCOUNT
from tests.kms_clients import Desk
from tests.kms_world import HOST, QUICK, ROLE, Watched, World, kms_world
from tests.sealing import CONTEXT, FLOOR, MODEL, PROMPT, Sealing, kms_toml
from tests.terminal import Terminal
from vsockrpc.address import UnixAddress
from vsockrpc.messages import Delta
from vsockrpc.transport import connect

T = TypeVar("T")

SEALER, ADMINISTRATOR = (f"arn:aws:iam::{ACCOUNT}:role/{name}" for name in ("sealer", "administrator"))
WEIGHTS_CANARY = b"canary-in-the-weights-5b1f0c77"
TENSOR = (WEIGHTS_CANARY * 600)[: 16 * 1024]
WEIGHTS = Gguf([("tokenizer.chat_template", TEXT, "{{ messages }}")], [("w", 0, (16, 256), TENSOR)]).encode()
"""Some records of it."""


@dataclass
class KmsHouse:
    """An enclave, everything on its way to KMS, and what is sealed to it."""

    world: World
    behind: EnclaveHouse
    keys: Mapping[EnvelopePurpose, KeyArn]
    patience: Patience = QUICK
    made: list[Kms] = field(default_factory=list)
    """One a boot."""

    @property
    def policy(self) -> AppraisalPolicy:
        return self.behind.policy

    @property
    def kms(self) -> Kms:
        return self.made[-1]

    def open_keys(self, policy: AppraisalPolicy | None = None) -> None:
        """Each key opens to what ``policy`` accepts, the house's own if None, and to nothing else."""
        accepted = policy or self.policy
        for purpose, key in self.keys.items():
            releases = tuple(released_to(accepted, purpose))
            self.put_policy(
                key,
                generate(
                    releases,
                    purpose=purpose,
                    context=CONTEXT,
                    users=[ROLE],
                    sealers=[SEALER],
                    administrators=[ADMINISTRATOR],
                ).encode(),
            )

    def put_policy(self, key: KeyArn, text: str) -> None:
        self.world.emulator.kms.keys.find(key.text, account=key.account, region=key.region).key.policy = text

    def another_key(self, purpose: EnvelopePurpose) -> KeyArn:
        """One more of the same account, whose policy opens it to the same enclaves."""
        named = self.world.emulator.kms.keys.find(self.keys[purpose].text, account="", region="us-east-1")
        return KeyArn.parse(self.world.emulator.create_key(named.key.policy))

    def sealing(self, purpose: EnvelopePurpose = PROMPT) -> Sealing:
        def wrap(data_key: bytes, key: KeyArn, context: Mapping[str, str]) -> bytes:
            return self.world.wrap(data_key, context, key=key)

        digests = (self.behind.manifest.digest(),), (self.behind.configuration.digest,)
        return Sealing(wrap, purpose, self.keys[purpose], *digests)

    def encrypt(self, **changed: Any) -> None:
        """The store has the weights in an envelope from now on."""
        self.behind.encrypt_store(self.sealing(MODEL).but(**changed).seal(self.behind.weights))

    async def bring(self, envelope: bytes) -> bytes:
        """The sealed answer, over the RPC. Raises Fault."""
        async with connect(self.behind.address) as rpc, rpc.call("envelope", {}) as call:
            await call.send(envelope, end=True)
            return await call.read(1 << 20)

    async def ask(self, text: str) -> str:
        """The answer to a prompt that waited."""
        envelope, reply = self.sealing().prompt(text)
        return text_of(await self.bring(envelope), reply)


def text_of(answer: bytes, reply: Reply) -> str:
    return "".join(each.content for each in open_answer(answer, reply) if isinstance(each, Delta))


@contextlib.asynccontextmanager
async def kms_house(
    directory: Path,
    *,
    started: bool = True,
    ahead: timedelta = timedelta(0),
    patience: Patience = QUICK,
    egress: UnixAddress | None = None,
) -> AsyncIterator[KmsHouse]:
    """``ahead``: how far the clocks of KMS and of the NSM are from this machine's. ``egress``: what stands before the
    parent's.
    """
    async with kms_world(directory, ahead=ahead, root=None if ahead else attested.ROOT) as world:
        keys = {purpose: KeyArn.parse(world.emulator.create_key()) for purpose in (MODEL, PROMPT)}
        root = base64.b64encode(world.emulator.root_der).decode()
        toml = kms_toml(
            egress or world.address,
            model=keys[MODEL],
            prompts=keys[PROMPT],
            endpoint=f"{HOST}:443",
            trust=f'trust = "EMULATED"\nroot = "{root}"',
        )

        def make_nsm() -> Nsm:
            world.nsm = Watched(world.root, lambda: datetime.now(UTC) + world.nsm_ahead)
            return Nsm(world.nsm)

        def make_kms(settings: KmsSettings, nsm: Nsm) -> Kms:
            house.made.append(Kms(settings, nsm, patience=house.patience))
            return house.kms

        rules = {
            MODEL: KeyRule(keys[MODEL], CONTEXT, FLOOR, (ADMINISTRATOR,), Ignore("a test")),
            PROMPT: KeyRule(keys[PROMPT], CONTEXT, FLOOR, (ADMINISTRATOR,), None),
        }
        behind = EnclaveHouse(
            directory, SETTINGS + toml, weights=WEIGHTS, make_nsm=make_nsm, make_kms=make_kms, key_rules=rules
        )
        house = KmsHouse(world, behind, keys, patience)
        house.open_keys()
        house.encrypt()
        if not started:
            yield house
            return
        await behind.start()
        try:
            yield house
        finally:
            await behind.stop()


@contextlib.asynccontextmanager
async def served_kms_house(directory: Path) -> AsyncIterator[tuple[KmsHouse, Hostile, str]]:
    """With a proxy, whoever stands before it, and the URL that a client is told."""
    async with kms_house(directory) as house:
        hostile = Hostile(Proxy(house.behind.address).application())
        async with served(hostile) as url:
            yield house, hostile, url


@dataclass
class KmsStreet:
    """A served house in a thread of its own, for commands that run in this one."""

    home: KmsHouse
    hostile: Hostile
    url: str
    loop: asyncio.AbstractEventLoop

    def do(self, work: Coroutine[Any, Any, T]) -> T:
        """In the house's thread."""
        return asyncio.run_coroutine_threadsafe(work, self.loop).result()


@contextlib.contextmanager
def kms_street(directory: Path) -> Iterator[KmsStreet]:
    opened: concurrent.futures.Future[KmsStreet] = concurrent.futures.Future()
    ending = asyncio.Event()

    async def live() -> None:
        async with served_kms_house(directory) as (home, hostile, url):
            opened.set_result(KmsStreet(home, hostile, url, asyncio.get_running_loop()))
            await ending.wait()

    def main() -> None:
        try:
            asyncio.run(live())
        except BaseException as error:
            if not opened.done():
                opened.set_exception(error)
            raise

    thread = threading.Thread(target=main)
    thread.start()
    try:
        street = opened.result()
        try:
            yield street
        finally:
            street.loop.call_soon_threadsafe(ending.set)
    finally:
        thread.join()


class HouseDesk(Desk):
    """That of somebody who may seal for a house."""

    def __init__(self, home: KmsHouse, terminal: Terminal, monkeypatch: pytest.MonkeyPatch) -> None:
        super().__init__(terminal, home.world.emulator, monkeypatch)
        self.home = home
        self.become("assumed-role/sealer/me")
