"""A name server on a UDP port of this machine, which answers what a test has told it."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from dataclasses import dataclass, field

import dns.flags
import dns.message
import dns.rcode
import dns.rdatatype
import dns.rrset
from dns.asyncresolver import Resolver

ZONE = "example."


@dataclass
class NameServer(asyncio.DatagramProtocol):
    """Answers for all of ``example``, whose names it does not know it denies."""

    records: dict[str, list[str]] = field(default_factory=dict)
    """By name, lines such as ``60 A 127.0.0.1``: time to live, type and value."""
    negative_ttl: int = 60
    silent: set[str] = field(default_factory=set)
    """Types that are never answered."""
    failing: bool = False
    """Every answer is SERVFAIL."""
    held: asyncio.Event | None = None
    """Answers wait for it."""
    asked: list[tuple[str, str]] = field(default_factory=list)
    """Name and type of every question."""
    port: int = 0
    _heard: asyncio.Event = field(default_factory=asyncio.Event)
    _sending: set[asyncio.Task[None]] = field(default_factory=set)

    def queries(self, name: str, kind: str = "A") -> int:
        return self.asked.count((name, kind))

    def resolver(self) -> Resolver:
        resolver = Resolver(configure=False)
        resolver.nameservers = ["127.0.0.1"]
        resolver.port = self.port
        return resolver

    async def until_asked(self, count: int) -> None:
        """Until so many questions have come in all."""
        while len(self.asked) < count:
            self._heard.clear()
            await self._heard.wait()

    def connection_made(self, transport: asyncio.DatagramTransport) -> None:  # type: ignore[override]
        self._transport = transport

    def datagram_received(self, data: bytes, addr: tuple[str, int]) -> None:
        query = dns.message.from_wire(data)
        name, kind = query.question[0].name, dns.rdatatype.to_text(query.question[0].rdtype)
        self.asked.append((name.to_text(omit_final_dot=True), kind))
        self._heard.set()
        if kind not in self.silent:
            task = asyncio.ensure_future(self._answer(query, addr))
            self._sending.add(task)
            task.add_done_callback(self._sending.discard)

    async def _answer(self, query: dns.message.Message, addr: tuple[str, int]) -> None:
        if self.held is not None:
            await self.held.wait()
        self._transport.sendto(self._response(query).to_wire(), addr)

    def _response(self, query: dns.message.Message) -> dns.message.Message:
        response = dns.message.make_response(query)
        response.flags |= dns.flags.RA
        if self.failing:
            response.set_rcode(dns.rcode.SERVFAIL)
            return response
        question = query.question[0]
        name, answered = question.name.to_text(omit_final_dot=True), False
        for line in self.records.get(name, []):
            ttl, kind, value = line.split(maxsplit=2)
            if kind in (dns.rdatatype.to_text(question.rdtype), "CNAME"):
                self._add(response.answer, name, int(ttl), kind, value)
                answered = True
                if kind == "CNAME":
                    for further in self.records[value.removesuffix(".")]:
                        ttl, kind, target = further.split(maxsplit=2)
                        if kind == dns.rdatatype.to_text(question.rdtype):
                            self._add(response.answer, value.removesuffix("."), int(ttl), kind, target)
        if not answered:
            soa = f"ns.{ZONE} hostmaster.{ZONE} 1 3600 600 86400 {self.negative_ttl}"
            response.authority.append(dns.rrset.from_text(ZONE, 3600, "IN", "SOA", soa))
            if name not in self.records:
                response.set_rcode(dns.rcode.NXDOMAIN)
        return response

    @staticmethod
    def _add(section: list[dns.rrset.RRset], name: str, ttl: int, kind: str, value: str) -> None:
        record = dns.rrset.from_text(name + ".", ttl, "IN", kind, value)
        for rrset in section:
            if (rrset.name, rrset.rdtype) == (record.name, record.rdtype):
                rrset.union_update(record)  # type: ignore[no-untyped-call]
                return
        section.append(record)


@contextlib.asynccontextmanager
async def name_server() -> AsyncIterator[NameServer]:
    loop = asyncio.get_running_loop()
    transport, server = await loop.create_datagram_endpoint(NameServer, local_addr=("127.0.0.1", 0))
    server.port = transport.get_extra_info("sockname")[1]
    try:
        yield server
    finally:
        transport.close()
        for task in list(server._sending):
            task.cancel()
        await asyncio.sleep(0)
