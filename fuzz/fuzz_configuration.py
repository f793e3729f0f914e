"""``enclave.toml`` as an operator may write it."""

from __future__ import annotations

from enclave.config import ConfigurationError, EnclaveConfiguration


def one_input(data: bytes) -> None:
    try:
        EnclaveConfiguration.parse(data)
    except ConfigurationError:
        return


def seeds() -> list[bytes]:
    return [
        b'version = 1\n[rpc]\nlisten = "unix:rpc.sock"\n[nsm]\naddress = "device:/dev/nsm"\nentropy = "nsm-hwrng"\n'
        b'[model]\nstore = "vsock:3:5006"\nmanifest = "sha384:'
        + b"00" * 48
        + b'"\n[engine]\ncontext = 2048\n[pacing]\ntick_ms = 0\n'
    ]
