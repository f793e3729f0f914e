"""What a launcher is: a way of running an enclave on this host. :mod:`parent.launch.supervisor` does what all of them
share.

A machine is untrusted, as everything on the parent: nobody believes it, and a client's verdict rests on nothing that
it says. It measures so that the operator, and a software NSM, know what is about to run.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass
from typing import Protocol

from attestation.errors import StrongroomError
from attestation.reference import PcrSet
from vsockrpc.address import Address


class LaunchError(StrongroomError):
    """The enclave cannot be started here."""

    @classmethod
    def of(cls, reason: Mapping[str, str | None]) -> LaunchError:
        """The error that ``reason`` tells of: the fields of a halt, or of a state's ``error``."""
        return cls(str(reason["code"]), str(reason["message"]), expected=reason.get("expected"), got=reason.get("got"))


@dataclass(frozen=True, slots=True)
class Places:
    """Where host and enclave meet, as the host's sockets see it."""

    rpc: Address
    """Where the enclave's RPC is reached, by the proxy and by its supervisor."""
    store: Address | None
    """Where the host serves the model. None: the image has it."""
    egress: Address | None
    """Where the host serves the way to KMS. None: the configuration has none."""
    nsm: Address | None
    """Where the host runs a software NSM. None: the machine has a module of its own."""


class Running(Protocol):
    """An enclave that was started."""

    async def network(self) -> str:
        """What it has of the host's network, in a word or two: ``none``, ``host``."""
        ...

    async def wait(self) -> LaunchError | None:
        """Returns when it has ended: the reason, if another boot would end in the same way."""
        ...


class Machine(Protocol):
    """One enclave's way of running; any number of boots, one at a time."""

    @property
    def launcher(self) -> str:
        """The launcher's name, as in ``strongroom start --launcher``."""
        ...

    @property
    def places(self) -> Places: ...

    @property
    def listen_seconds(self) -> float:
        """How long a boot may take until the enclave's RPC listens: beyond it, it never will."""
        ...

    async def measure(self) -> PcrSet:
        """What the next boot will have in its registers. Raises StrongroomError."""
        ...

    def boot(self, measured: PcrSet) -> AbstractAsyncContextManager[Running]:
        """One boot of what was measured, ended with its context, whatever happens. Raises LaunchError."""
        ...
