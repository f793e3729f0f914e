"""From a host's name to its addresses: /etc/hosts, then DNS, whose answers live as long as they say and no longer.

Questions for one name at a time share one query, and nothing here blocks the loop. Names are absolute: no search list
turns one into another.
"""

from __future__ import annotations

import asyncio
import ipaddress
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv6Address, ip_address
from itertools import chain, zip_longest
from pathlib import Path
from typing import Generic, TypeAlias, TypeVar

import dns.exception
import dns.name
import dns.rdatatype
import dns.resolver
from dns.asyncresolver import Resolver

from attestation.errors import StrongroomError

IpAddress: TypeAlias = IPv4Address | IPv6Address
T = TypeVar("T")

QUERY_SECONDS = 5.0
"""For one question, all name servers and attempts together."""
SECOND_FAMILY_SECONDS = 0.25
"""How long the other family's answer is waited for when one has come (RFC 8305 section 3 has 50 ms, for browsers)."""
FAILURE_SECONDS = 1.0
"""How long it is remembered that no name server answered (RFC 9520 section 3.2)."""
MAX_TTL = 86_400
MAX_NEGATIVE_TTL = 10_800
"""Seconds; RFC 2308 section 5 has found one to three hours to work well."""
MAX_ADDRESSES = 16
"""Of one family; a name with more is served by these."""

LOOPBACK: tuple[IpAddress, ...] = (IPv4Address("127.0.0.1"), IPv6Address("::1"))
_NEVER = [
    ipaddress.ip_network(text)
    for text in (
        "0.0.0.0/8",  # "this host": Linux connects it to itself
        "169.254.0.0/16",  # link-local: the instance's metadata and credentials
        "224.0.0.0/4",
        "240.0.0.0/4",
        "::/128",
        "fe80::/10",
        "fd00:ec2::/32",  # the same services of an instance, over IPv6
        "ff00::/8",
    )
]
_NAT64 = ipaddress.ip_network("64:ff9b::/96")


class UnresolvedName(StrongroomError):
    """A name without an address (``unknown_name``), or whose name servers do not answer (``no_name_server``)."""


def is_never_allowed(address: IpAddress) -> bool:
    """Whether nothing is ever connected to ``address``, whoever names it: link-local addresses and an EC2 instance's
    own services (its metadata hands out credentials), this host's unspecified address, and what is no host; also in
    an IPv6 address that carries such an IPv4 address.
    """
    if any(address in network for network in _NEVER):
        return True
    if isinstance(address, IPv4Address):
        return False
    carried = [address.ipv4_mapped, address.sixtofour, *(address.teredo or ())]
    if address in _NAT64 or 1 < int(address) < 1 << 32:  # RFC 6052; and RFC 4291's IPv4-compatible ones
        carried.append(IPv4Address(int(address) & 0xFFFF_FFFF))
    return any(each is not None and is_never_allowed(each) for each in carried)


@dataclass(frozen=True, slots=True)
class _Answer:
    """Of one family: ``ttl`` in seconds; ``failed`` says why nobody answered."""

    addresses: tuple[IpAddress, ...] = ()
    ttl: float = 0.0
    failed: str = ""


@dataclass(frozen=True, slots=True)
class _Known:
    addresses: tuple[IpAddress, ...]
    error: UnresolvedName | None
    until: float


class Names:
    """Looks names up for one event loop. What it remembers grows with the names that it is asked for, so ask it only
    for names from a list.
    """

    def __init__(
        self,
        *,
        resolver: Resolver | None = None,
        hosts: Path = Path("/etc/hosts"),
        resolv_conf: Path = Path("/etc/resolv.conf"),
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """``resolver`` in place of the one that ``resolv_conf`` describes. ``clock`` counts seconds."""
        self._hosts = _Watched(hosts, _read_hosts)
        self._configured = _Watched(resolv_conf, _read_resolver)
        self._resolver = resolver
        self._clock = clock
        self._known: dict[str, _Known] = {}
        self._asking: dict[str, asyncio.Task[_Known]] = {}

    async def addresses(self, name: str) -> tuple[IpAddress, ...]:
        """All of them, at least one, in the order to try. An IP address is its own; ``localhost`` and what ends in it
        is this machine (RFC 6761 section 6.3).

        Raises UnresolvedName.
        """
        literal = as_ip_address(name)
        if literal is not None:
            return (literal,)
        if name == "localhost" or name.endswith(".localhost"):
            return LOOPBACK
        if listed := self._hosts.value().get(name):
            return listed
        known = self._known.get(name)
        if known is None or known.until <= self._clock():
            known = await asyncio.shield(self._ask_once(name))
        if known.error is not None:
            raise UnresolvedName(known.error.code, known.error.message, got=name)
        return known.addresses

    async def close(self) -> None:
        """Gives up the questions under way."""
        asking = list(self._asking.values())
        for task in asking:
            task.cancel()
        await asyncio.gather(*asking, return_exceptions=True)

    def _ask_once(self, name: str) -> asyncio.Task[_Known]:
        if name not in self._asking:
            task = asyncio.get_running_loop().create_task(self._ask(name), name=f"names {name}")
            task.add_done_callback(lambda _: self._asking.pop(name))
            self._asking[name] = task
        return self._asking[name]

    async def _ask(self, name: str) -> _Known:
        answers = await self._ask_both(name)
        addresses = _alternating([answer.addresses for answer in answers])
        failed = next((answer.failed for answer in answers if answer.failed), "")
        error = None
        if addresses:
            ttl = min([MAX_TTL, *(answer.ttl for answer in answers if answer.addresses)])
        elif failed:
            error, ttl = UnresolvedName("no_name_server", f"no name server answers: {failed}"), FAILURE_SECONDS
        else:
            error = UnresolvedName("unknown_name", "the name has no address")
            ttl = min([MAX_NEGATIVE_TTL, *(answer.ttl for answer in answers)])
        known = self._known[name] = _Known(addresses, error, self._clock() + ttl)
        return known

    async def _ask_both(self, name: str) -> list[_Answer]:
        """Of IPv6 and IPv4, those that have come by the time that one has addresses, and a little later."""
        loop = asyncio.get_running_loop()
        asked = [loop.create_task(self._query(name, kind)) for kind in (dns.rdatatype.AAAA, dns.rdatatype.A)]
        try:
            for answer in asyncio.as_completed(asked):
                if (await answer).addresses:
                    break
            await asyncio.wait(asked, timeout=SECOND_FAMILY_SECONDS)
        finally:
            for task in asked:
                task.cancel()
            had = await asyncio.gather(*asked, return_exceptions=True)
        for answer_or_error in had:
            if isinstance(answer_or_error, Exception):
                raise answer_or_error
        return [answer for answer in had if isinstance(answer, _Answer)]

    async def _query(self, name: str, kind: dns.rdatatype.RdataType) -> _Answer:
        try:
            resolver = self._resolver or self._configured.value()
            absolute = dns.name.from_text(name)
            answer = await resolver.resolve(absolute, kind, raise_on_no_answer=False, lifetime=QUERY_SECONDS)
        except dns.resolver.NXDOMAIN as error:
            response = error.response(absolute)  # type: ignore[no-untyped-call]
            return _Answer(ttl=response.resolve_chaining().minimum_ttl)
        except (dns.exception.DNSException, ValueError) as error:  # ValueError: a name server that is no address
            return _Answer(failed=type(error).__name__)
        found = [ip_address(record.address) for record in answer.rrset or ()]
        return _Answer(tuple(found[:MAX_ADDRESSES]), answer.chaining_result.minimum_ttl)


def as_ip_address(text: str) -> IpAddress | None:
    """The address that ``text`` spells, or None for a name."""
    try:
        return ip_address(text)
    except ValueError:
        return None


def _alternating(families: Sequence[Sequence[IpAddress]]) -> tuple[IpAddress, ...]:
    """One of each family in turn, so that a family that leads nowhere costs one attempt (RFC 8305 section 4)."""
    return tuple(address for address in chain.from_iterable(zip_longest(*families)) if address is not None)


class _Watched(Generic[T]):
    """What a file says, read again when it has changed."""

    def __init__(self, path: Path, read: Callable[[Path], T]) -> None:
        self._path = path
        self._read = read
        self._had: tuple[object, T] | None = None

    def value(self) -> T:
        stamp = self._stamp()
        if self._had is None or self._had[0] != stamp:
            self._had = stamp, self._read(self._path)
        return self._had[1]

    def _stamp(self) -> object:
        try:
            status = self._path.stat()
        except OSError:
            return None
        return status.st_mtime_ns, status.st_size, status.st_ino


def _read_hosts(path: Path) -> dict[str, tuple[IpAddress, ...]]:
    """The addresses of each name in a file as hosts(5) describes it; lines that are none are left out, as ever."""
    try:
        text = path.read_text(errors="replace")
    except OSError:
        return {}
    hosts: dict[str, tuple[IpAddress, ...]] = {}
    for line in text.splitlines():
        address, *names = line.partition("#")[0].split() or [""]
        parsed = as_ip_address(address)
        if parsed is not None:
            for name in names:
                hosts[name.lower()] = (*hosts.get(name.lower(), ()), parsed)
    return hosts


def _read_resolver(path: Path) -> Resolver:
    return Resolver(str(path))
