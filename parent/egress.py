"""The enclave's one way out: TCP to the few places on a list. PROTOCOL.md section 5.4.

It conveys bytes and cannot read them: TLS ends in the enclave, which believes nothing that comes from here. What this
list protects is the parent's own network, should an enclave ask for more than it was configured for.
"""

from __future__ import annotations

import asyncio
import contextlib
import re
import socket
import struct
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields

from prometheus_client import CollectorRegistry, Counter, Gauge

from attestation.errors import StrongroomError
from parent.names import IpAddress, Names, UnresolvedName, as_ip_address, is_never_allowed
from vsockrpc.frames import Meta
from vsockrpc.sockets import prepare
from vsockrpc.transport import ConnectionLost, Fault, Handler, IncomingCall

PIECE = 1 << 16
"""Bytes read from a target at once."""
HEAD_START = 0.25
"""Seconds that one address of a name has before the next is tried beside it (RFC 8305 section 5)."""
_LABEL = re.compile(r"(?!-)[a-z0-9_-]{1,63}(?<!-)", re.ASCII)
_PORT = re.compile(r"[1-9][0-9]{0,4}", re.ASCII)
_RESET_ON_CLOSE = struct.pack("ii", 1, 0)
"""``struct linger``: closing drops what was not sent and resets the connection."""


class AllowListError(StrongroomError):
    """An entry that is no ``HOST:PORT`` or ``HOST:PORT=ADDRESS:PORT`` (``bad_allow_entry``), or an address that is
    never allowed (``forbidden_address``).
    """

    exit_code = 2


@dataclass(frozen=True, slots=True, order=True)
class Endpoint:
    """A host and a TCP port, in the one spelling that is compared: names in lower case without a final dot, addresses
    as :mod:`ipaddress` writes them, IPv6 in brackets only as text.
    """

    host: str
    port: int

    def __str__(self) -> str:
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"

    @classmethod
    def parse(cls, text: str) -> Endpoint:
        """Raises AllowListError."""
        written, _, digits = text.rpartition(":")
        if not _PORT.fullmatch(digits) or int(digits) > 0xFFFF:
            raise AllowListError("bad_allow_entry", "no port", expected="HOST:PORT, port 1..65535", got=ascii(text))
        bracketed = written.startswith("[") and written.endswith("]")
        host = written[1:-1] if bracketed else written
        address = as_ip_address(host)
        if address is not None and str(address) == host and bracketed == (":" in host) and "%" not in host:
            if is_never_allowed(address):
                raise AllowListError("forbidden_address", "nothing is ever connected to this address", got=text)
        elif bracketed or not _is_name(host):
            raise AllowListError(
                "bad_allow_entry",
                "no host",
                expected="an exact name in lower case, IPv4 or [IPv6]; no wildcards",
                got=ascii(text),
            )
        return cls(host, int(digits))


@dataclass(frozen=True, slots=True)
class Allowed:
    """What the enclave may ask for, and where that really goes: a VPC endpoint, an emulator, or the same."""

    asked: Endpoint
    target: Endpoint

    def __str__(self) -> str:
        return str(self.asked) if self.asked == self.target else f"{self.asked}={self.target}"

    @classmethod
    def parse(cls, text: str) -> Allowed:
        """``HOST:PORT`` or ``HOST:PORT=ADDRESS:PORT``. Raises AllowListError."""
        asked, redirected, target = text.partition("=")
        return cls(Endpoint.parse(asked), Endpoint.parse(target if redirected else asked))


@dataclass(frozen=True, slots=True, kw_only=True)
class EgressLimits:
    """Every bound of the egress, with its unit."""

    connections: int = 256
    """Open or being opened at once, of all callers together."""
    connect: float = 10.0
    """Seconds until a connection stands: names and all addresses together."""
    idle: float = 300.0
    """Seconds in which no byte passes either way."""
    total: float = 7200.0
    """Seconds that a connection lives, busy or not."""

    def __post_init__(self) -> None:
        for field in fields(self):
            if getattr(self, field.name) <= 0:
                raise ValueError(f"{field.name} is not positive")


class EgressMetrics:
    """What the egress counts: by entry of the allow-list, and by no other name."""

    def __init__(self, registry: CollectorRegistry) -> None:
        def counter(name: str, help_text: str, *labels: str) -> Counter:
            return Counter(f"strongroom_egress_{name}", help_text, labels, registry=registry)

        self.open = Gauge("strongroom_egress_open", "Connections that stand", ["to"], registry=registry)
        self.connections = counter("connections", "Connections made", "to")
        self.bytes = counter("bytes", "Bytes conveyed; out is from the enclave", "to", "direction")
        self.failures = counter("failures", "Connections that did not come about or broke", "to", "reason")
        self.refusals = counter("refusals", "Calls for what is not on the list, or too many", "reason")


class Egress:
    """Serves ``egress.connect``: no call waits for another, and none gets anywhere but to the list."""

    def __init__(
        self,
        allowed: Sequence[Allowed],
        *,
        names: Names | None = None,
        limits: EgressLimits | None = None,
        registry: CollectorRegistry | None = None,
    ) -> None:
        """Raises AllowListError when two entries are of the same host and port."""
        self._names = names or Names()
        self._limits = limits or EgressLimits()
        self.metrics = EgressMetrics(registry or CollectorRegistry())
        self._allowed: dict[tuple[str, int], Allowed] = {}
        self._open = 0
        for each in allowed:
            key = each.asked.host, each.asked.port
            if key in self._allowed:
                raise AllowListError("bad_allow_entry", "the same host and port stand in the list twice", got=each)
            self._allowed[key] = each
            self.metrics.connections.labels(each.asked)  # so that what was never used shows as zero

    @property
    def handlers(self) -> Mapping[str, Handler]:
        return {"egress.connect": self.connect}

    async def close(self) -> None:
        """Gives up the questions to name servers that nobody waits for any more."""
        await self._names.close()

    async def connect(self, call: IncomingCall) -> None:
        """The caller's END becomes a half-close. The target's end is passed on at once, and ends the call: the RPC
        has no half that outlives it. A connection that breaks, or a caller that gives up, never looks like an end.
        """
        allowed = self._allowed_by(call.meta)
        with self._counted(allowed):
            sock = await self._open_connection(allowed.target)
            try:
                self.metrics.connections.labels(allowed.asked).inc()
                with self.metrics.open.labels(allowed.asked).track_inprogress():
                    await call.reply({})
                    await _Connection(call, sock, self._limits, self.metrics.bytes, str(allowed.asked)).convey()
            except BaseException:
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET_ON_CLOSE)
                raise
            finally:
                sock.close()

    def _allowed_by(self, meta: Meta) -> Allowed:
        """Raises Fault unless the list has exactly this host and port."""
        host, port = meta.get("host"), meta.get("port")
        if set(meta) != {"host", "port"} or not isinstance(host, str) or type(port) is not int:  # a bool is an int
            self.metrics.refusals.labels("malformed").inc()
            raise Fault("malformed", "expected host, a text, and port, an integer")
        allowed = self._allowed.get((host, port))
        if allowed is None:
            self.metrics.refusals.labels("not_on_the_list").inc()
            raise Fault("egress_refused", "this host and port are not on the parent's allow-list")
        if self._open >= self._limits.connections:
            self.metrics.refusals.labels("too_many").inc()
            raise Fault("overloaded", "too many connections through this egress at once")
        return allowed

    @contextlib.contextmanager
    def _counted(self, allowed: Allowed) -> Iterator[None]:
        self._open += 1
        try:
            yield
        except (Fault, ConnectionLost, asyncio.CancelledError) as error:
            reason = error.code if isinstance(error, Fault) else "caller_gone"
            self.metrics.failures.labels(allowed.asked, reason).inc()
            raise
        finally:
            self._open -= 1

    async def _open_connection(self, target: Endpoint) -> socket.socket:
        """Raises Fault ``egress_unreachable`` or ``egress_refused``."""
        try:
            async with asyncio.timeout(self._limits.connect):
                addresses = await self._names.addresses(target.host)
                if any(is_never_allowed(address) for address in addresses):
                    raise Fault("egress_refused", "the name leads to an address that is never allowed")
                return await first_connected(addresses, target.port)
        except TimeoutError:
            raise Fault("egress_unreachable", f"no connection within {self._limits.connect:g} s") from None
        except UnresolvedName as error:
            raise Fault("egress_unreachable", error.message) from error
        except OSError as error:
            raise Fault("egress_unreachable", f"no connection: {error.strerror or error}") from error


class _Connection:
    """One call and the socket that it goes to."""

    def __init__(
        self, call: IncomingCall, sock: socket.socket, limits: EgressLimits, conveyed: Counter, label: str
    ) -> None:
        self._call = call
        self._sock = sock
        self._limits = limits
        self._loop = asyncio.get_running_loop()
        self._out = conveyed.labels(label, "out")
        self._in = conveyed.labels(label, "in")
        self._end = self._loop.time() + limits.total
        self._timer = asyncio.timeout_at(self._next_timeout())

    async def convey(self) -> None:
        """Until the target ends. Raises Fault or ConnectionLost when it ends otherwise."""
        outward = self._loop.create_task(self._convey_out())
        inward = self._loop.create_task(self._convey_in())
        try:
            async with self._timer:
                await asyncio.wait({outward, inward}, return_when=asyncio.FIRST_COMPLETED)
                if not inward.done():
                    outward.result()  # ended, or broken
                await inward
        except TimeoutError:
            raise Fault("deadline_exceeded", "the connection was idle, or open, for too long") from None
        finally:
            outward.cancel()
            inward.cancel()
            await asyncio.gather(outward, inward, return_exceptions=True)

    async def _convey_out(self) -> None:
        try:
            async for piece in self._call:
                await self._loop.sock_sendall(self._sock, piece)
                self._out.inc(len(piece))
                self._progress()
            self._sock.shutdown(socket.SHUT_WR)
        except OSError as error:  # reported here alone: the other direction would read an end
            raise _broken(error) from error

    async def _convey_in(self) -> None:
        try:
            while piece := await self._loop.sock_recv(self._sock, PIECE):
                self._progress()
                await self._call.send(piece)
                self._in.inc(len(piece))
        except OSError as error:
            raise _broken(error) from error
        await self._call.send(b"", end=True)

    def _progress(self) -> None:
        if not self._timer.expired():
            self._timer.reschedule(self._next_timeout())

    def _next_timeout(self) -> float:
        return min(self._loop.time() + self._limits.idle, self._end)


async def first_connected(addresses: Sequence[IpAddress], port: int) -> socket.socket:
    """A connection to one of ``addresses``, in their order: the next is tried when one has failed, and beside one that
    takes its time.

    Raises OSError, that of the first attempt that failed.
    """
    loop = asyncio.get_running_loop()
    waiting, attempts, failures = deque(addresses), set[asyncio.Task[socket.socket]](), list[OSError]()
    connected: socket.socket | None = None
    try:
        while connected is None and (waiting or attempts):
            if waiting:
                attempts.add(loop.create_task(_connected(waiting.popleft(), port)))
            done, _ = await asyncio.wait(
                attempts, timeout=HEAD_START if waiting else None, return_when=asyncio.FIRST_COMPLETED
            )
            for attempt in done:
                try:
                    sock = attempt.result()
                except OSError as error:
                    failures.append(error)
                    attempts.remove(attempt)
                else:
                    if connected is None:
                        connected = sock
                        attempts.remove(attempt)
    finally:
        for attempt in attempts:
            attempt.cancel()
            attempt.add_done_callback(_close_late)
    if connected is None:
        raise failures[0] if failures else OSError("the name has no address")
    return connected


async def _connected(address: IpAddress, port: int) -> socket.socket:
    family = socket.AF_INET if address.version == 4 else socket.AF_INET6
    sock = socket.socket(family, socket.SOCK_STREAM | socket.SOCK_NONBLOCK, socket.IPPROTO_TCP)
    try:
        await asyncio.get_running_loop().sock_connect(sock, (str(address), port))
        prepare(sock)
    except BaseException:
        sock.close()
        raise
    return sock


def _close_late(attempt: asyncio.Task[socket.socket]) -> None:
    """Another was first."""
    if not attempt.cancelled() and attempt.exception() is None:
        attempt.result().close()


def _broken(error: OSError) -> Fault:
    return Fault("egress_unreachable", f"the connection broke: {error.strerror or error}")


def _is_name(host: str) -> bool:
    """A host name in lower case. One whose last label is a number is none: some readers would take it for an
    address.
    """
    labels = host.split(".")
    return (
        len(host) <= 253
        and all(_LABEL.fullmatch(label) for label in labels)
        and not re.fullmatch(r"[0-9]+|0x[0-9a-f]*", labels[-1], re.ASCII)
    )
