"""Addresses as a person or a file writes them, and what a launcher reads of an ``enclave.toml``."""

from __future__ import annotations

from parent.config import LaunchConfiguration, LaunchConfigurationError
from vsockrpc.address import parse_address
from vsockrpc.errors import AddressError


def one_input(data: bytes) -> None:
    """The first byte chooses what the rest is."""
    kind, rest = data[:1], data[1:]
    try:
        if kind == b"c":
            LaunchConfiguration.parse(rest)
        else:
            text = rest.decode("utf-8", "surrogateescape")
            assert str(parse_address(text)) == text
    except (AddressError, LaunchConfigurationError):
        return


def seeds() -> list[bytes]:
    addresses = (
        b"vsock:16:5005",
        b"vsock:any:5005",
        b"unix:rpc.sock",
        b"unix:/run/\xff",
        b"tcp:127.0.0.1:0",
        b"tcp:[::1%lo]:8080",
    )
    configuration = (
        b'[rpc]\nlisten = "unix:rpc.sock"\n[nsm]\naddress = "unix:nsm.sock"\n'
        b'[model]\nstore = "unix:models.sock"\nmanifest = "sha384:00"\n'
    )
    return [*(b"a" + address for address in addresses), b"c" + configuration]
