"""Release histories for tests: two keys, two releases, and a history that grows by a day an entry."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from typing import Final

from cryptography.hazmat.primitives.asymmetric import ec

from attestation.reference import PcrSet
from attestation.release_signing import LocalSigner, PublicKey
from attestation.releases import Head, ReleasedImage, ReleaseHistory, Source, append

ED25519: Final = LocalSigner.generate()
P384: Final = LocalSigner(ec.generate_private_key(ec.SECP384R1()))
P384_ORDER: Final = int(
    "FFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFC7634D81F4372DDF581A0DB248B0A77AECEC196ACCC52973", 16
)

NAME: Final = "assistant"
ISSUED: Final = datetime(2026, 3, 1, 12, 0, 0, tzinfo=UTC)
VALIDITY: Final = timedelta(days=90)
PCRS: Final = PcrSet(b"\x01" * 48, b"\x02" * 48, b"\x03" * 48)
ONE: Final = ReleasedImage(
    name="1.0",
    pcrs=PCRS,
    image=b"\x04" * 48,
    source=Source("https://example.org/assistant.git", "a" * 40),
    models=(b"\x05" * 48, b"\x06" * 48),
    configurations=(b"\x07" * 48,),
)
TWO: Final = ReleasedImage(
    "2.0",
    replace(PCRS, pcr0=b"\x09" * 48, pcr8=b"\x08" * 48),
    None,
    Source("ssh://git@example.org/a", "b" * 64),
    (),
    (),
)


def history_of(*statements: Sequence[ReleasedImage], signer: LocalSigner = ED25519) -> bytes:
    """One entry for each; the first at ``ISSUED``, each valid for ``VALIDITY``."""
    history = b""
    for day, releases in enumerate(statements):
        issued = ISSUED + timedelta(days=day)
        expires = issued + VALIDITY
        history += append(history, signer=signer, name=NAME, releases=releases, issued=issued, expires=expires)
    return history


def verified(
    data: bytes,
    *,
    key: PublicKey = ED25519.public_key,
    name: str = NAME,
    minimum_sequence: int = 1,
    head: Head | None = None,
) -> ReleaseHistory:
    return ReleaseHistory.verify(data, key=key, name=name, minimum_sequence=minimum_sequence, head=head)
