"""Names and their addresses: as long as DNS says, no longer, and one question at a time."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from ipaddress import IPv4Address, IPv6Address, ip_address
from pathlib import Path

import pytest
from dns.asyncresolver import Resolver
from hypothesis import given
from hypothesis import strategies as st

from parent import names as names_module
from parent.names import LOOPBACK, Names, UnresolvedName, is_never_allowed
from tests.name_server import NameServer, name_server

HOST = "kms.example"


class Clock:
    """Seconds that pass when a test says so."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
async def server() -> AsyncIterator[NameServer]:
    async with name_server() as server:
        yield server


@pytest.fixture
async def names(server: NameServer, clock: Clock, tmp_path: Path) -> AsyncIterator[Names]:
    names = Names(resolver=server.resolver(), hosts=tmp_path / "hosts", clock=clock)
    yield names
    await names.close()


async def texts(names: Names, name: str = HOST) -> list[str]:
    return [str(address) for address in await names.addresses(name)]


async def refusal(names: Names, name: str = HOST) -> str:
    with pytest.raises(UnresolvedName) as caught:
        await names.addresses(name)
    return caught.value.code


# --- How long an answer lives ---------------------------------------------------------------------------------------


async def test_an_answer_lives_as_long_as_it_says(names: Names, server: NameServer, clock: Clock) -> None:
    server.records[HOST] = ["60 A 192.0.2.1"]
    assert await texts(names) == ["192.0.2.1"]
    server.records[HOST] = ["60 A 192.0.2.2"]
    clock.now += 59.9
    assert await texts(names) == ["192.0.2.1"]
    assert server.queries(HOST) == 1
    clock.now += 0.1
    assert await texts(names) == ["192.0.2.2"]
    assert server.queries(HOST) == 2


async def test_an_answer_for_no_time_is_used_once(names: Names, server: NameServer) -> None:
    server.records[HOST] = ["0 A 192.0.2.1"]
    for asked in (1, 2, 3):
        assert await texts(names) == ["192.0.2.1"]
        assert server.queries(HOST) == asked


async def test_the_shortest_time_of_a_chain_counts(names: Names, server: NameServer, clock: Clock) -> None:
    server.records |= {HOST: ["20 CNAME other.example."], "other.example": ["300 A 192.0.2.1"]}
    assert await texts(names) == ["192.0.2.1"]
    clock.now += 20
    await texts(names)
    assert server.queries(HOST) == 2


async def test_a_time_beyond_reason_is_cut(names: Names, server: NameServer, clock: Clock) -> None:
    server.records[HOST] = ["2147483647 A 192.0.2.1"]
    await texts(names)
    clock.now += names_module.MAX_TTL
    await texts(names)
    assert server.queries(HOST) == 2


@pytest.mark.parametrize("records", [{}, {HOST: ["60 TXT nothing"]}], ids=["no such name", "no address"])
async def test_a_denial_is_kept_as_long_as_its_zone_says(
    names: Names, server: NameServer, clock: Clock, records: dict[str, list[str]]
) -> None:
    server.records, server.negative_ttl = records, 30
    assert await refusal(names) == "unknown_name"
    server.records = {HOST: ["60 A 192.0.2.1"]}
    clock.now += 29.9
    assert await refusal(names) == "unknown_name"
    assert server.queries(HOST) == 1
    clock.now += 0.1
    assert await texts(names) == ["192.0.2.1"]


async def test_a_failure_is_kept_for_a_moment(names: Names, server: NameServer, clock: Clock) -> None:
    server.failing, server.records = True, {HOST: ["60 A 192.0.2.1"]}
    assert await refusal(names) == "no_name_server"
    asked = len(server.asked)
    assert await refusal(names) == "no_name_server"
    assert len(server.asked) == asked
    server.failing = False
    clock.now += names_module.FAILURE_SECONDS
    assert await texts(names) == ["192.0.2.1"]


# --- Who waits for whom ---------------------------------------------------------------------------------------------


async def test_questions_for_one_name_share_a_query(names: Names, server: NameServer) -> None:
    server.records[HOST], server.held = ["60 A 192.0.2.1"], asyncio.Event()
    asking = [asyncio.ensure_future(texts(names)) for _ in range(50)]
    await server.until_asked(2)
    asking[0].cancel()  # who leaves spoils it for nobody
    server.held.set()
    first, *rest = await asyncio.gather(*asking, return_exceptions=True)
    assert isinstance(first, asyncio.CancelledError)
    assert rest == [["192.0.2.1"]] * 49
    assert server.queries(HOST) == 1
    assert server.queries(HOST, "AAAA") == 1


async def test_a_slow_name_holds_up_no_other(names: Names, server: NameServer) -> None:
    server.records |= {HOST: ["60 A 192.0.2.1"], "quick.example": ["60 A 192.0.2.2"]}
    server.held = asyncio.Event()
    slow = asyncio.ensure_future(texts(names))
    await server.until_asked(2)
    held, server.held = server.held, None
    assert await texts(names, "quick.example") == ["192.0.2.2"]
    assert not slow.done()
    held.set()
    assert await slow == ["192.0.2.1"]


async def test_a_family_that_is_not_answered_is_not_waited_for_long(names: Names, server: NameServer) -> None:
    server.records[HOST], server.silent = ["60 A 192.0.2.1"], {"AAAA"}
    assert await texts(names) == ["192.0.2.1"]


async def test_closing_gives_up_what_is_asked(names: Names, server: NameServer) -> None:
    server.silent = {"A", "AAAA"}
    asking = asyncio.ensure_future(texts(names))
    await server.until_asked(2)
    await names.close()
    with pytest.raises(asyncio.CancelledError):
        await asking


# --- What the addresses are -----------------------------------------------------------------------------------------


async def test_the_families_alternate(names: Names, server: NameServer) -> None:
    server.records[HOST] = ["9 A 192.0.2.1", "9 A 192.0.2.2", "9 A 192.0.2.3", "9 AAAA 2001:db8::1"]
    found = await names.addresses(HOST)
    assert [address.version for address in found] == [6, 4, 4, 4]
    assert len(set(found)) == 4


async def test_no_more_addresses_than_are_needed(names: Names, server: NameServer) -> None:
    server.records[HOST] = [f"9 A 192.0.2.{number}" for number in range(1, 100)]
    assert len(await names.addresses(HOST)) == names_module.MAX_ADDRESSES


@pytest.mark.parametrize("literal", ["127.0.0.1", "192.0.2.7", "::1", "2001:db8::7"])
async def test_an_address_is_its_own(names: Names, server: NameServer, literal: str) -> None:
    assert await texts(names, literal) == [literal]
    assert server.asked == []


@pytest.mark.parametrize("name", ["localhost", "kms.localhost"])
async def test_localhost_is_this_machine_whatever_anybody_says(
    names: Names, server: NameServer, tmp_path: Path, name: str
) -> None:
    server.records[name] = ["60 A 192.0.2.1"]
    (tmp_path / "hosts").write_text(f"192.0.2.9 {name}\n")
    assert await names.addresses(name) == LOOPBACK
    assert server.asked == []


async def test_the_hosts_file_comes_first_and_is_read_again(names: Names, server: NameServer, tmp_path: Path) -> None:
    server.records[HOST] = ["60 A 192.0.2.1"]
    hosts = tmp_path / "hosts"
    hosts.write_text(f"# {HOST} is\n192.0.2.8 other {HOST.upper()} # here\n2001:db8::8 {HOST}\nnonsense {HOST}\n\n8\n")
    assert await texts(names) == ["192.0.2.8", "2001:db8::8"]
    hosts.write_text("192.0.2.99 other\n")
    assert await texts(names) == ["192.0.2.1"]
    hosts.unlink()
    assert await refusal(names, "other") == "unknown_name"


async def test_a_search_list_is_not_used(names: Names, server: NameServer) -> None:
    assert await refusal(names, "kms") == "unknown_name"
    assert {name for name, _ in server.asked} == {"kms"}


@pytest.mark.parametrize("text", [None, "", "nameserver nobody\n", "nameserver\n", "\0\n"])
async def test_a_system_without_name_servers_says_so(tmp_path: Path, text: str | None) -> None:
    path = tmp_path / "resolv.conf"
    if text is not None:
        path.write_text(text)
    assert await refusal(Names(hosts=tmp_path / "hosts", resolv_conf=path)) == "no_name_server"


async def test_the_systems_name_servers_are_read_again_when_they_change(
    server: NameServer, tmp_path: Path, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    def reset(resolver: Resolver) -> None:
        original(resolver)
        resolver.port = server.port

    original = Resolver.reset
    monkeypatch.setattr(Resolver, "reset", reset)
    path = tmp_path / "resolv.conf"
    path.write_text("# none yet\n")
    names = Names(hosts=tmp_path / "hosts", resolv_conf=path, clock=clock)
    assert await refusal(names) == "no_name_server"
    server.records[HOST] = ["60 A 192.0.2.1"]
    path.write_text("nameserver 127.0.0.1\n")
    clock.now += names_module.FAILURE_SECONDS
    assert await texts(names) == ["192.0.2.1"]


async def test_a_name_that_dns_has_no_form_for_has_no_address(names: Names, server: NameServer) -> None:
    assert await refusal(names, "a" * 64 + ".example") == "no_name_server"
    assert server.asked == []


# --- What is never connected to -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text",
    [
        "169.254.169.254",
        "169.254.170.2",
        "169.254.169.253",
        "fd00:ec2::254",
        "fd00:ec2::23",
        "fe80::1",
        "fe80::1%eth0",
        "fd00:ec2::254%1",
        "::ffff:169.254.169.254",
        "::169.254.169.254",
        "64:ff9b::169.254.169.254",
        "2002:a9fe:a9fe::1",
        "2001:0:a9fe:a9fe::1",
        "2001:0:102:304::5601:5601",
        "0.0.0.0",
        "0.1.2.3",
        "::",
        "::ffff:0.0.0.0",
        "224.0.0.1",
        "255.255.255.255",
        "ff02::1",
    ],
)
def test_metadata_and_what_is_no_host_are_never_allowed(text: str) -> None:
    assert is_never_allowed(ip_address(text))


@pytest.mark.parametrize(
    "text", ["127.0.0.1", "::1", "10.0.0.1", "192.168.1.1", "52.46.1.1", "2600:1f18::1", "fd12::1", "::ffff:10.0.0.1"]
)
def test_hosts_are_not_forbidden(text: str) -> None:
    assert not is_never_allowed(ip_address(text))


@given(st.integers(0, (1 << 32) - 1))
def test_a_carried_address_is_judged_as_itself(value: int) -> None:
    plain, mapped = IPv4Address(value), IPv6Address((0xFFFF << 32) | value)
    assert is_never_allowed(mapped) == is_never_allowed(plain)
