"""The gateway on a free port of this machine."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator

from attestation.secret import Secret
from strongroom.gateway import Gateway, PromptCache
from strongroom.serving import _names_of
from strongroom.session import Session
from vsockrpc.address import TcpAddress
from vsockrpc.http_server import HttpServer, listen_on


@contextlib.asynccontextmanager
async def gateway_of(
    session: Session, *, token: str | None = None, cache: PromptCache | None = None
) -> AsyncIterator[int]:
    """Yields its port."""
    listener = listen_on(TcpAddress("127.0.0.1", 0))
    port: int = listener.getsockname()[1]
    secret = None if token is None else Secret(token.encode())
    gateway = Gateway(session, hosts=_names_of("127.0.0.1", port), token=secret, cache=cache)
    async with HttpServer(gateway.application()).serving(listener):
        yield port
