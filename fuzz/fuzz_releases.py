"""A release history of any bytes is read, or is a ReleaseError; what is read is one statement after another, each of
which can be written and read again. So is the text of a pinned key.

The first byte says what the rest is: a history, statements that the pinned key signs as they are (so that mutations
reach behind the signature), or a key.
"""

from __future__ import annotations

import base64
import json
from datetime import UTC, datetime, timedelta
from typing import Final

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from attestation.reference import PcrSet
from attestation.release_signing import LocalSigner, PublicKey, ReleaseError, seal
from attestation.releases import ReleasedImage, ReleaseHistory, ReleaseStatement, Source, append

SIGNER: Final = LocalSigner(Ed25519PrivateKey.from_private_bytes(bytes(32)))
NAME: Final = "product"


def one_input(data: bytes) -> None:
    kind, rest = data[:1], data[1:]
    if kind == b"k":
        read_key(rest.decode("utf-8", errors="replace"))
    elif kind == b"s":
        read_history(b"".join(seal(payload, SIGNER) + b"\n" for payload in rest.split(b"\n")))
    else:
        read_history(rest)


def read_key(text: str) -> None:
    try:
        key = PublicKey.parse(text)
    except ReleaseError:
        return
    assert str(key) == text, "two texts of one key"


def read_history(data: bytes) -> None:
    try:
        history = ReleaseHistory.verify(data, key=SIGNER.public_key, name=NAME, minimum_sequence=1, head=None)
    except ReleaseError:
        return
    for position, entry in enumerate(history.entries, start=1):
        statement = entry.statement
        assert (statement.sequence, statement.name) == (position, NAME)
        assert ReleaseStatement.decode(statement.encode()) == statement, "a statement that changes when it is written"
        assert all(any(value) for release in statement.releases for value in release.pcrs.as_registers().values())


def seeds() -> list[bytes]:
    one = ReleasedImage(
        "1.0",
        PcrSet(b"\x01" * 48, b"\x02" * 48, b"\x03" * 48, b"\x08" * 48),
        b"\x04" * 48,
        Source("https://example.org/a", "a" * 40),
        (b"\x05" * 48,),
        (b"\x06" * 48,),
    )
    issued = datetime(2026, 3, 1, tzinfo=UTC)
    history = b""
    for releases in ([one], []):
        expires = issued + timedelta(days=90)
        history += append(history, signer=SIGNER, name=NAME, releases=releases, issued=issued, expires=expires)
    payloads = [base64.b64decode(json.loads(line)["payload"]) for line in history.splitlines()]
    return [
        b"h" + history,
        b"s" + payloads[0],
        b"s" + b"\n".join(payloads),
        b"k" + str(SIGNER.public_key).encode(),
        b"kecdsa-p384:3076301006072a8648ce3d020106052b81040022036200" + b"00" * 97,
    ]
