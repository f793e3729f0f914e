"""Keys that sign releases, and the envelope: what is signed is DSSE's, and each thing that may be wrong is refused."""

from __future__ import annotations

import base64
import contextlib
import json
from collections.abc import Callable
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric import ec, ed448, rsa
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.asymmetric.utils import decode_dss_signature, encode_dss_signature
from cryptography.hazmat.primitives.serialization import (
    BestAvailableEncryption,
    Encoding,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
)
from hypothesis import given
from hypothesis import strategies as st

from attestation.release_signing import (
    MAX_ENVELOPE,
    MAX_PAYLOAD,
    Algorithm,
    LocalSigner,
    PublicKey,
    ReleaseError,
    SigningError,
    pre_authentication_encoding,
    seal,
    unseal,
)
from tests.release_files import ED25519, P384, P384_ORDER

EITHER = pytest.mark.parametrize("signer", [ED25519, P384], ids=["ed25519", "p384"])


def refused(code: str, envelope: bytes, key: PublicKey = ED25519.public_key) -> ReleaseError:
    with pytest.raises(ReleaseError) as caught:
        unseal(envelope, key=key, name="entry 7")
    assert (caught.value.code, caught.value.exit_code) == (code, 3)
    assert "entry 7" in caught.value.message
    return caught.value


# --- Keys ----------------------------------------------------------------------------------------------------------


@EITHER
def test_a_key_is_written_and_read(signer: LocalSigner) -> None:
    key = PublicKey.parse(str(signer.public_key))
    assert key == signer.public_key
    assert hash(key) == hash(signer.public_key)
    assert repr(key) == repr(signer.public_key)
    assert len(key.key_id) == 16


def test_the_written_forms() -> None:
    """RFC 8032 section 7.1, test 1; its SubjectPublicKeyInfo is that of RFC 8410."""
    raw = "d75a980182b10ab7d54bfed3c964073a0ee172f3daa62325af021a68f707511a"
    key = PublicKey.parse(f"ed25519:{raw}")
    assert key.algorithm is Algorithm.ED25519
    assert key.spki.hex() == "302a300506032b6570032100" + raw
    assert P384.public_key.algorithm is Algorithm.ECDSA_P384
    assert str(P384.public_key) == f"ecdsa-p384:{P384.public_key.spki.hex()}"
    assert len(P384.public_key.spki) == 120


def spki(key: Any) -> bytes:
    octets: bytes = key.public_key().public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)
    return octets


def compressed() -> bytes:
    """The same key with a compressed point: another text for one key, and so none."""
    point = ec.generate_private_key(ec.SECP384R1()).public_key()
    octets = point.public_bytes(Encoding.X962, PublicFormat.CompressedPoint)
    return bytes.fromhex("3046301006072a8648ce3d020106052b81040022033200") + octets


@pytest.mark.parametrize(
    "text",
    [
        "",
        "ed25519",
        "ed25519:",
        "ed25519:00",
        "ed25519:" + "00" * 33,
        "ed25519:" + "AB" * 32,
        "ed25519: " + "ab" * 32,
        "ed25519:" + "ab" * 32 + "\n",
        "ED25519:" + "ab" * 32,
        "rsa:" + "ab" * 32,
        "ecdsa-p384:00",
        "ecdsa-p384:" + "00" * 400,
        f"ed25519:{P384.public_key.spki.hex()}",
        f"ecdsa-p384:{ED25519.public_key.spki.hex()}",
        f"ecdsa-p384:{P384.public_key.spki.hex()}00",
        f"ecdsa-p384:{spki(ec.generate_private_key(ec.SECP256R1())).hex()}",
        f"ecdsa-p384:{spki(ed448.Ed448PrivateKey.generate()).hex()}",
        f"ecdsa-p384:{compressed().hex()}",
    ],
)
def test_what_is_no_pinned_key(text: str) -> None:
    with pytest.raises(ReleaseError) as caught:
        PublicKey.parse(text)
    assert caught.value.code == "malformed_key"


@given(st.text(max_size=300) | st.binary(max_size=200).map(lambda octets: f"ecdsa-p384:{octets.hex()}"))
def test_any_text_is_a_key_or_a_typed_error(text: str) -> None:
    with contextlib.suppress(ReleaseError):
        assert str(PublicKey.parse(text)) == text


@EITHER
def test_a_private_key_in_pem(signer: LocalSigner) -> None:
    again = LocalSigner.from_pem(signer.to_pem())
    assert again.public_key == signer.public_key
    again.public_key.verify(signer.sign(b"x"), b"x")
    assert "PRIVATE" not in repr(again)
    assert signer.public_key.key_id in repr(again)


def pem(key: Any, encryption: Any = None) -> bytes:
    octets: bytes = key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, encryption or NoEncryption())
    return octets


@pytest.mark.parametrize(
    "octets",
    [
        b"",
        b"-----BEGIN PRIVATE KEY-----\nAAAA\n-----END PRIVATE KEY-----\n",
        pem(ec.generate_private_key(ec.SECP256R1())),
        pem(ed448.Ed448PrivateKey.generate()),
        pem(rsa.generate_private_key(65537, 2048)),
        pem(Ed25519PrivateKey.generate(), BestAvailableEncryption(b"secret")),
    ],
    ids=["empty", "damaged", "p256", "ed448", "rsa", "encrypted"],
)
def test_what_is_no_key_to_sign_with(octets: bytes) -> None:
    with pytest.raises(SigningError) as caught:
        LocalSigner.from_pem(octets)
    assert (caught.value.code, caught.value.exit_code) == ("unusable_key", 2)


# --- The envelope --------------------------------------------------------------------------------------------------


def test_what_is_signed_is_as_dsse_says() -> None:
    """The encoding of DSSE version 1: its example is ``DSSEv1 29 http://example.com/HelloWorld 11 hello world``."""
    expected = b"DSSEv1 39 application/vnd.strongroom.release+json 11 hello world"
    assert pre_authentication_encoding(b"hello world") == expected


@EITHER
@pytest.mark.parametrize("payload", [b"{}", bytes(MAX_PAYLOAD)])
def test_sealed_and_unsealed(signer: LocalSigner, payload: bytes) -> None:
    envelope = seal(payload, signer)
    assert b"\n" not in envelope
    assert unseal(envelope, key=signer.public_key, name="entry 1") == payload


def test_either_s_is_good() -> None:
    r, s = decode_dss_signature(P384.sign(b"data"))
    for value in (s, P384_ORDER - s):
        P384.public_key.verify(encode_dss_signature(r, value), b"data")


@EITHER
@pytest.mark.parametrize("signature", [b"", b"\x00" * 64, b"\x30\x00", b"\x30\x06\x02\x01\x00\x02\x01\x00", bytes(500)])
def test_a_signature_that_is_none(signer: LocalSigner, signature: bytes) -> None:
    with pytest.raises(ReleaseError) as caught:
        signer.public_key.verify(signature, b"data")
    assert caught.value.code == "bad_release_signature"


@EITHER
@given(st.binary(max_size=104))
def test_any_bytes_are_no_signature(signer: LocalSigner, signature: bytes) -> None:
    with pytest.raises(ReleaseError):
        signer.public_key.verify(signature, b"data")


Envelope = dict[str, Any]


def altered(change: Callable[[Envelope], object], signer: LocalSigner = ED25519) -> bytes:
    envelope = json.loads(seal(b"{}", signer))
    change(envelope)
    return json.dumps(envelope).encode()


def b64(octets: bytes) -> str:
    return base64.b64encode(octets).decode()


@pytest.mark.parametrize(
    "change",
    [
        lambda envelope: envelope.pop("payload"),
        lambda envelope: envelope.pop("payloadType"),
        lambda envelope: envelope.pop("signatures"),
        lambda envelope: envelope.update(extra=1),
        lambda envelope: envelope.update(payload=1),
        lambda envelope: envelope.update(payload=""),
        lambda envelope: envelope.update(payload="e30"),
        lambda envelope: envelope.update(payload="e30\n"),
        lambda envelope: envelope.update(payload="e3_="),
        lambda envelope: envelope.update(payload="e31="),
        lambda envelope: envelope.update(payload="\u00e930="),
        lambda envelope: envelope.update(payload=b64(bytes(MAX_PAYLOAD + 1))),
        lambda envelope: envelope.update(payloadType="application/json"),
        lambda envelope: envelope.update(payloadType=None),
        lambda envelope: envelope.update(signatures=None),
        lambda envelope: envelope.update(signatures=[]),
        lambda envelope: envelope["signatures"].append(envelope["signatures"][0]),
        lambda envelope: envelope.update(signatures=["x"]),
        lambda envelope: envelope["signatures"][0].pop("keyid"),
        lambda envelope: envelope["signatures"][0].pop("sig"),
        lambda envelope: envelope["signatures"][0].update(cert="x"),
        lambda envelope: envelope["signatures"][0].update(keyid=""),
        lambda envelope: envelope["signatures"][0].update(keyid="a" * 17),
        lambda envelope: envelope["signatures"][0].update(keyid=1),
        lambda envelope: envelope["signatures"][0].update(sig=""),
        lambda envelope: envelope["signatures"][0].update(sig=b64(bytes(105))),
        lambda envelope: envelope["signatures"][0].update(sig="*"),
    ],
)
def test_an_envelope_that_is_malformed(change: Callable[[Envelope], object]) -> None:
    refused("malformed_release", altered(change))


@pytest.mark.parametrize(
    "envelope",
    [
        b"",
        b"[]",
        b"null",
        b"1",
        b"{",
        b"\xef\xbb\xbf{}",
        b"\xff",
        b"[" * 100_000,
        b" " * (MAX_ENVELOPE + 1),
        seal(b"{}", ED25519)[:-1],
        seal(b"{}", ED25519) + b"{}",
        seal(b"{}", ED25519).replace(b'{"payload"', b'{"payload":"e30=","payload"'),
    ],
)
def test_bytes_that_are_no_envelope(envelope: bytes) -> None:
    refused("malformed_release", envelope)


def test_another_key_than_the_pinned_one() -> None:
    error = refused("wrong_key", seal(b"{}", P384))
    assert (error.expected, error.got) == (ED25519.public_key.key_id, ascii(P384.public_key.key_id))


def test_the_key_id_chooses_nothing() -> None:
    """An envelope of another key under the pinned key's id: it is the pinned key that must have signed."""
    claims = altered(lambda each: each["signatures"][0].update(keyid=ED25519.public_key.key_id), LocalSigner.generate())
    refused("bad_release_signature", claims)


def test_what_was_not_signed() -> None:
    refused("bad_release_signature", altered(lambda each: each.update(payload=b64(b"{ }"))))
    bare = ED25519.sign(b"{}")  # without the type that DSSE puts before it
    refused("bad_release_signature", altered(lambda each: each["signatures"][0].update(sig=b64(bare))))


@given(st.binary(max_size=300))
def test_any_bytes_are_refused(envelope: bytes) -> None:
    with pytest.raises(ReleaseError):
        unseal(envelope, key=ED25519.public_key, name="entry 1")
