from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vsockrpc.address import (
    UNIX_PATH_LIMIT,
    VMADDR_CID_ANY,
    Address,
    TcpAddress,
    UnixAddress,
    VsockAddress,
    parse_address,
)
from vsockrpc.errors import AddressError

SPELLINGS: list[tuple[str, Address]] = [
    ("vsock:3:5005", VsockAddress(3, 5005)),
    ("vsock:any:5005", VsockAddress(VMADDR_CID_ANY, 5005)),
    ("vsock:4294967294:4294967294", VsockAddress(0xFFFFFFFE, 0xFFFFFFFE)),
    ("unix:/run/enclave.sock", UnixAddress("/run/enclave.sock")),
    ("unix:a:b", UnixAddress("a:b")),
    ("unix:" + "x" * UNIX_PATH_LIMIT, UnixAddress("x" * UNIX_PATH_LIMIT)),
    ("tcp:127.0.0.1:80", TcpAddress("127.0.0.1", 80)),
    ("tcp:localhost:0", TcpAddress("localhost", 0)),
    ("tcp:[::1]:65535", TcpAddress("::1", 65535)),
    ("tcp:[fe80::1%eth0]:1", TcpAddress("fe80::1%eth0", 1)),
]


@pytest.mark.parametrize(("text", "address"), SPELLINGS, ids=[text[:30] for text, _ in SPELLINGS])
def test_round_trip(text: str, address: Address) -> None:
    assert parse_address(text) == address
    assert str(address) == text


@pytest.mark.parametrize(
    "text",
    [
        "",
        "vsock",
        "vsock:",
        "vsock:3",
        "vsock:3:",
        "vsock:3:0",
        "vsock:0:5005",
        "vsock:4294967295:5005",
        "vsock:3:4294967295",
        "vsock:3:99999999999",
        "vsock:03:5005",
        "vsock:+3:5005",
        "vsock:3:5_0",
        "vsock:３:5005",
        "vsock: 3:5005",
        "vsock:3:5005:1",
        "vsock:ANY:5005",
        "unix:",
        "unix:a\0b",
        "unix:\ud800",
        "tcp:80",
        "tcp::80",
        "tcp:host:",
        "tcp:host:65536",
        "tcp:host:08",
        "tcp:::1:80",
        "tcp:[host]:80",
        "tcp:[127.0.0.1]:80",
        "tcp:a b:80",
        "tcp:" + "h" * 254 + ":80",
        "udp:host:80",
        "/run/enclave.sock",
    ],
)
def test_refused(text: str) -> None:
    with pytest.raises(AddressError) as caught:
        parse_address(text)
    assert caught.value.code == "bad_address"


def test_the_limit_of_a_unix_path_is_named_and_counts_bytes() -> None:
    with pytest.raises(AddressError) as caught:
        UnixAddress("é" * 54)
    assert caught.value.expected == "at most 107 bytes"
    assert caught.value.got == "108"


@given(st.text(max_size=40))
def test_any_text_is_an_address_with_one_spelling_or_an_address_error(text: str) -> None:
    for scheme in ("", "vsock:", "unix:", "tcp:"):
        try:
            address = parse_address(scheme + text)
        except AddressError:
            continue
        assert str(address) == scheme + text
