"""The egress as a host runs it: connections and credentials at one address, and metrics where they are wanted."""

from __future__ import annotations

import contextlib
import sys
import traceback
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

from prometheus_client import CollectorRegistry, Counter, generate_latest
from prometheus_client.exposition import CONTENT_TYPE_LATEST
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from attestation.errors import StrongroomError
from parent.credentials import (
    Credentials,
    Issued,
    NoCredentials,
    Source,
    from_instance_metadata,
    from_provider_chain,
    warn_on_stderr,
)
from parent.egress import Allowed, Egress
from vsockrpc.address import Address, TcpAddress
from vsockrpc.http import is_loopback
from vsockrpc.http_server import HttpServer, listen_on
from vsockrpc.limits import Limits
from vsockrpc.transport import Fault, Handler, IncomingCall, listen

CREDENTIAL_SOURCES = ("imds", "boto3", "none")
FIRST_ENCLAVE_CID = 4
"""Those below have a meaning of their own: 1 is the same machine, 3 is the parent."""
LIMITS = Limits(drain=1.0)
"""An enclave keeps its connections to KMS open between its calls: a longer wait for their end would be in vain."""


class EgressError(StrongroomError):
    """An egress that would serve others than its enclave. Code ``exposed_credentials``."""

    exit_code = 2


@dataclass(frozen=True, slots=True)
class EgressSettings:
    """What a host gives its enclave: the places that it may reach, and whose credentials it gets."""

    allowed: Sequence[Allowed]
    credentials: str = "boto3"
    """One of ``CREDENTIAL_SOURCES``."""
    profile: str | None = None
    """Of the AWS configuration, for ``boto3``."""
    metrics: TcpAddress | None = None
    enclave_cid: int | None = None
    """Calls of any other VM, and of those who do not call over vsock, are refused; if None, nobody's are."""


@dataclass(frozen=True, slots=True)
class Listening:
    """Where an egress serves, with the ports that the system chose."""

    egress: Address
    metrics: TcpAddress | None


@contextlib.asynccontextmanager
async def serve_egress(
    address: Address,
    settings: EgressSettings,
    *,
    on_error: Callable[[BaseException], None],
    warn: Callable[[str], None] = warn_on_stderr,
) -> AsyncIterator[Listening]:
    """Serves within the block. Whoever can connect is served, unless ``settings`` name the enclave.

    Raises AddressError, AllowListError, ListenError; EgressError for an address that other machines reach, where there
    are credentials to give.
    """
    if settings.credentials != "none" and isinstance(address, TcpAddress) and not is_loopback(address.host):
        raise EgressError(
            "exposed_credentials",
            "whoever reaches this address would be given this host's AWS credentials",
            expected="vsock, a Unix socket, a loopback address, or no credentials",
            got=str(address),
        )
    registry = CollectorRegistry()
    egress = Egress(settings.allowed, registry=registry)
    credentials = Credentials(_source(settings), warn=warn, registry=registry)
    handlers = {**egress.handlers, **credentials.handlers}
    if settings.enclave_cid is not None:
        handlers = _of_one_enclave(handlers, settings.enclave_cid, registry)
    async with contextlib.AsyncExitStack() as stack:
        stack.push_async_callback(egress.close)
        server = await listen(address, handlers, on_error=on_error, limits=LIMITS)
        stack.push_async_callback(server.close)
        if settings.credentials != "none":
            await stack.enter_async_context(credentials.renewed())
        shown = None
        if settings.metrics is not None:
            listener = listen_on(settings.metrics)
            shown = TcpAddress(settings.metrics.host, listener.getsockname()[1])
            await stack.enter_async_context(HttpServer(_metrics(registry)).serving(listener))
        yield Listening(server.address, shown)


def _of_one_enclave(handlers: Mapping[str, Handler], cid: int, registry: CollectorRegistry) -> dict[str, Handler]:
    """``handlers``, which refuse whoever calls from elsewhere by a fault of their own method."""
    strangers = Counter("strongroom_egress_strangers", "Calls from elsewhere than the enclave", registry=registry)

    def guarded(method: str, handler: Handler) -> Handler:
        async def guard(call: IncomingCall) -> None:
            if call.peer_cid != cid:
                strangers.inc()
                code = "no_credentials" if method == "credentials.get" else "egress_refused"
                raise Fault(code, "this egress serves one enclave, and another one calls: see --enclave-cid")
            await handler(call)

        return guard

    return {method: guarded(method, handler) for method, handler in handlers.items()}


def report_defect(error: BaseException) -> None:
    """Says on standard error where an exception came from that nobody raised on purpose; its text could hold
    anything.
    """
    places = "".join(traceback.format_tb(error.__traceback__))
    sys.stderr.write(f"defect: {type(error).__name__}\n{places}")


def _source(settings: EgressSettings) -> Source:
    match settings.credentials:
        case "imds":
            return from_instance_metadata
        case "boto3":
            return partial(from_provider_chain, settings.profile)
    return _none


def _none() -> Issued:
    raise NoCredentials("this host gives the enclave none: start it with --credentials imds or boto3")


def _metrics(registry: CollectorRegistry) -> Starlette:
    async def show(request: Request) -> Response:
        return Response(generate_latest(registry), media_type=CONTENT_TYPE_LATEST)

    return Starlette(routes=[Route("/metrics", show, methods=["GET"])])
