"""Whom TLS to KMS trusts: Amazon Trust Services' own roots, and no other authority of the web.

The five that Amazon names for custom trust stores (https://www.amazontrust.com/repository/). As part of the package
they are measured with it; an emulator's authority is in the measured configuration instead.
"""

from __future__ import annotations

import hashlib
from importlib.resources import files
from typing import Final

from attestation.errors import StrongroomError

FINGERPRINTS: Final = {
    "amazon-root-ca-1.der": "8ecde6884f3d87b1125ba31ac3fcb13d7016de7f57cc904fe1cb97c6ae98196e",
    "amazon-root-ca-2.der": "1ba5b2aa8c65401a82960118f80bec4f62304d83cec4713a19c39c011ea46db4",
    "amazon-root-ca-3.der": "18ce6cfe7bf14e60b2e347b8dfe868cb31d02ebb3ada271569f50343b46db3a4",
    "amazon-root-ca-4.der": "e35d28419ed02025cfa69038cd623962458da5c695fbdea3c22b0bfb25897092",
    "starfield-services-root-g2.der": "568d6905a2c88708a4b3025190edcfedb1974a606a13c6e5290fcb2ae63edab5",
}
"""The SHA-256 of each certificate, as published."""


def amazon_roots() -> tuple[bytes, ...]:
    """The certificates (DER). Raises StrongroomError ``bad_anchor`` when one is not what was published."""
    return tuple(_read(name, published) for name, published in FINGERPRINTS.items())


def _read(name: str, published: str) -> bytes:
    certificate = files(__name__).joinpath(name).read_bytes()
    digest = hashlib.sha256(certificate).hexdigest()
    if digest != published:
        raise StrongroomError("bad_anchor", f"{name} is not Amazon's root", expected=published, got=digest)
    return certificate
