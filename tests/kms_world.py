"""An enclave that asks KMS, and everything on its way: the software NSM, the parent's egress and credentials, and the
emulated KMS behind TLS. All of it is real but the hardware and AWS.
"""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import AsyncIterator, Callable, Mapping
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime, timedelta
from http import HTTPStatus
from pathlib import Path
from typing import Any

import cbor2

from attestation.chain import Anchor
from attestation.keypolicy.document import KeyArn
from attestation.secret import Secret
from emulator.https import HttpAnswer, HttpRequest, HttpsServer
from emulator.kms_endpoint import KmsEmulator, kms_emulator
from emulator.kms_keys import encrypt
from emulator.nsm import SoftwareNsm, boot_registers, new_module_id
from emulator.pki import DevelopmentRoot
from emulator.sigv4 import Principal
from emulator.tls import TlsAuthority
from enclave.config import KmsSettings
from enclave.kms.service import Kms, Patience
from enclave.nsm import Nsm
from parent.credentials import Credentials, Issued
from parent.egress import Allowed, Egress, Endpoint
from tests.attested import IMAGE
from tests.key_policies import ACCOUNT, policy, statement
from vsockrpc.address import TcpAddress, UnixAddress
from vsockrpc.transport import Handler, Limits, Server, listen

HOST = "kms.us-east-1.amazonaws.com"
ROLE = f"arn:aws:iam::{ACCOUNT}:role/parent"
SESSION = "assumed-role/parent/i-00000000000000000"
CONTEXT = {"strongroom": "1", "strongroom:purpose": "prompt", "strongroom:context": "tests", "strongroom:version": "1"}
QUICK = Patience(first_pause_seconds=0.001, throttled_pause_seconds=0.001)
ONCE = Patience(attempts=1)
MEASURED = {
    "StringEqualsIgnoreCase": {
        "kms:RecipientAttestation:ImageSha384": IMAGE.pcr0.hex(),
        "kms:RecipientAttestation:PCR1": IMAGE.pcr1.hex(),
        "kms:RecipientAttestation:PCR2": IMAGE.pcr2.hex(),
    }
}
"""What holds for the enclaves of ``tests.attested``, and for no other."""


def released_to(conditions: dict[str, Any] = MEASURED) -> str:
    """A key policy."""
    return policy(statement(ROLE, "kms:Decrypt", "kms:GenerateDataKey", **conditions))


class Watched:
    """The NSM in this process, for several threads, which remembers what it was asked."""

    def __init__(self, root: DevelopmentRoot, clock: Callable[[], datetime]) -> None:
        self.asked: list[Any] = []
        self._lock = threading.Lock()
        self._root = root
        self._clock = clock
        self.restart()

    def restart(self, *, role_arn: str | None = None) -> None:
        """As an enclave of a parent with this role."""
        registers = boot_registers(IMAGE, role_arn=role_arn)
        self._nsm = SoftwareNsm(self._root, registers, module_id=new_module_id(), clock=self._clock)

    def exchange(self, request: bytes) -> bytes:
        with self._lock:
            self.asked.append(cbor2.loads(request))
            return self._nsm.handle(request)

    def close(self) -> None:
        pass

    @property
    def documents(self) -> list[dict[str, bytes]]:
        """The fields of those that were asked for."""
        return [each["Attestation"] for each in self.asked if "Attestation" in each]


@dataclass
class World:
    emulator: KmsEmulator
    root: DevelopmentRoot
    directory: Path
    nsm_ahead: timedelta = timedelta(0)
    """How far the module's clock is from this machine's."""
    lookups: int = 0
    """How often the parent has looked its credentials up."""
    given: int = 0
    """How often the enclave was given some."""
    issue: Callable[[], Issued] | None = None
    """What the parent's source says; a role's credentials if None."""
    handlers: dict[str, Handler] = field(default_factory=dict)
    """Of the egress, in place of its own."""
    target: Endpoint | None = None
    """Where the egress really connects to; the emulator if None."""

    def __post_init__(self) -> None:
        self.address = UnixAddress(str(self.directory / "egress.sock"))
        self.nsm = Watched(self.root, lambda: datetime.now(UTC) + self.nsm_ahead)
        self.principals: list[Principal] = []
        self.key = KeyArn.parse(self.emulator.create_key(released_to()))
        self.server: Server | None = None
        self._egress: Egress | None = None

    def settings(self, authority: bytes | None = None, host: str = HOST) -> KmsSettings:
        return KmsSettings(
            "us-east-1", TcpAddress(host, 443), self.address, authority or self.emulator.root_der, None, None
        )

    @contextlib.asynccontextmanager
    async def kms(
        self, patience: Patience = QUICK, *, authority: bytes | None = None, host: str = HOST
    ) -> AsyncIterator[Kms]:
        made = await asyncio.to_thread(Kms, self.settings(authority, host), Nsm(self.nsm), patience=patience)
        try:
            yield made
        finally:
            await made.close()

    async def start_egress(self, host: str = HOST) -> None:
        target = self.target or Endpoint("127.0.0.1", self.emulator.port)
        self._egress = Egress([Allowed(Endpoint(host, 443), target)])
        credentials = Credentials(self._look_up, warn=lambda text: None)
        given = credentials.handlers["credentials.get"]

        async def counted(call: Any) -> None:
            self.given += 1
            await given(call)

        handlers = {**self._egress.handlers, "credentials.get": counted, **self.handlers}
        self.server = await listen(self.address, handlers, on_error=print, limits=Limits(drain=0.1))

    async def restart_egress(self, issue: Callable[[], Issued] | None = None) -> None:
        """Another parent, which knows nothing of the credentials before."""
        self.issue = issue
        await self.stop_egress()
        await self.start_egress()

    def kill_egress(self) -> None:
        assert self.server is not None
        for peer in list(self.server._peers):
            peer.link.lose("killed")

    async def stop_egress(self) -> None:
        if self.server is not None and self._egress is not None:
            await self.server.close()
            await self._egress.close()

    @property
    def is_struck(self) -> bool:
        """Every fault that was injected for so many requests has met them."""
        return not any(each.left for each in self.emulator.faults._injected)

    @property
    def connections(self) -> int:
        """TCP connections that the egress has made."""
        assert self._egress is not None
        metrics = self._egress.metrics.connections.collect()
        return int(sum(sample.value for metric in metrics for sample in metric.samples if "_total" in sample.name))

    def _look_up(self) -> Issued:
        self.lookups += 1
        if self.issue is not None:
            return self.issue()
        return issued(self.principal())

    def principal(self, *, lifetime: timedelta | None = None) -> Principal:
        self.principals.append(self.emulator.principal(SESSION, lifetime=lifetime))
        return self.principals[-1]

    def wrap(self, plaintext: bytes, context: Mapping[str, str] = CONTEXT, *, key: KeyArn | None = None) -> bytes:
        """As whoever seals has it done by KMS."""
        arn = key or self.key
        named = self.emulator.kms.keys.find(arn.text, account=arn.account, region=arn.region)
        return encrypt(named.key, plaintext, context)


class Impostor:
    """A server in KMS's place, under its name but by another authority, which gives the same answer to everybody."""

    def __init__(self) -> None:
        self.authority = TlsAuthority.generate(datetime.now(UTC))
        self.answer = HttpAnswer(HTTPStatus.OK)
        self.asked: list[HttpRequest] = []
        context = self.authority.server_context([HOST], datetime.now(UTC))
        self._server = HttpsServer(("127.0.0.1", 0), context, self._answer)
        self.endpoint = Endpoint("127.0.0.1", self._server.port)

    def _answer(self, request: HttpRequest) -> HttpAnswer:
        self.asked.append(request)
        return self.answer

    def close(self) -> None:
        self._server.close()


def issued(principal: Principal, *, expires: datetime | None = None) -> Issued:
    end = expires or principal.expires
    return Issued(
        Secret(principal.access_key.encode()), principal.secret, principal.token, end.timestamp() if end else None
    )


def lasting(world: World) -> Issued:
    """Credentials that the parent believes in for centuries."""
    return replace(issued(world.principal()), expires=2e10)


@contextlib.asynccontextmanager
async def kms_world(
    directory: Path, *, ahead: timedelta = timedelta(0), egress: bool = True, root: DevelopmentRoot | None = None
) -> AsyncIterator[World]:
    """``ahead``: how far the clocks of KMS and of the NSM are from this machine's, the host's. ``root`` vouches for the
    NSM; a new one if None.
    """
    root = root or DevelopmentRoot.generate(datetime.now(UTC) + ahead)
    anchor = Anchor.emulated(root.certificate_der)
    with kms_emulator(anchor=anchor, names=(HOST,), clock=lambda: datetime.now(UTC) + ahead) as emulator:
        world = World(emulator, root, directory, ahead)
        if egress:
            await world.start_egress()
        try:
            yield world
        finally:
            await world.stop_egress()
