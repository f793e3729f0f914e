"""HTTP between client and parent: the names of PROTOCOL.md section 8, and how either side's server runs. The enclave has no HTTP."""

from __future__ import annotations

import asyncio
import contextlib
import signal
import socket
from collections.abc import Callable, Iterator, Mapping

import uvicorn
from starlette.applications import Starlette

from attestation.errors import StrongroomError
from vsockrpc.address import TcpAddress

EVIDENCE_PATH = "/v1/evidence"
SEALED_PATH = "/v1/sealed"
EVIDENCE_TYPE = "application/vnd.strongroom.evidence+cbor"
SEALED_TYPE = "application/vnd.strongroom.sealed"
KEY_ID_HEADER = "strongroom-key-id"
MAX_EVIDENCE_BYTES = 32768

STATUS_OF_FAULT: Mapping[str, int] = {"malformed": 400, "unknown_key": 409, "overloaded": 429, "unavailable": 503}
"""The closed list of clear faults (section 6.3) and the status that carries each."""

MAX_CONNECTIONS = 1024
GRACE_SECONDS = 5


class ListenError(StrongroomError):
    """The address cannot be listened on."""


def listen_on(address: TcpAddress) -> socket.socket:
    """A listening socket; port 0 takes a free one. Raises ListenError ``address_in_use`` and the like."""
    family = socket.AF_INET6 if ":" in address.host else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((address.host, address.port))
    except OSError as error:
        listener.close()
        raise ListenError("cannot_listen", f"cannot listen on {address}: {error.strerror}", got=str(address)) from error
    listener.setblocking(False)
    return listener


class _Server(uvicorn.Server):
    """Says when it is ready, and ends cleanly on SIGINT and SIGTERM: answers under way get their grace, and the process its own exit code."""

    def __init__(self, configuration: uvicorn.Config, ready: Callable[[], None]) -> None:
        super().__init__(configuration)
        self._ready = ready

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        if self.started:
            self._ready()

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        loop = asyncio.get_running_loop()

        def stop() -> None:
            self.force_exit = self.should_exit  # a second signal does not wait
            self.should_exit = True

        for number in (signal.SIGINT, signal.SIGTERM):
            loop.add_signal_handler(number, stop)
        try:
            yield
        finally:
            for number in (signal.SIGINT, signal.SIGTERM):
                loop.remove_signal_handler(number)


async def serve_http(application: Starlette, listener: socket.socket, *, ready: Callable[[], None]) -> None:
    """Serves until SIGINT or SIGTERM. Nothing of a request is logged. ``ready`` is called once connections are accepted."""
    configuration = uvicorn.Config(
        application,
        log_config=None,
        log_level="critical",
        access_log=False,
        server_header=False,
        date_header=False,
        proxy_headers=False,
        limit_concurrency=MAX_CONNECTIONS,
        timeout_graceful_shutdown=GRACE_SECONDS,
        lifespan="on",
    )
    await _Server(configuration, ready).serve(sockets=[listener])
