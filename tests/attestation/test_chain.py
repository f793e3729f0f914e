"""Anchors, and what of a chain no vector can show."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import replace
from datetime import timedelta
from typing import Literal

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from hypothesis import example, given, settings
from hypothesis import strategies as st

from attestation.anchors import AWS_NITRO_G1
from attestation.chain import Anchor, Trust, validate
from attestation.errors import EvidenceError, PolicyError
from tests.pki import forge

GOOD = forge.GOOD_CHAIN
ANCHOR = Anchor.emulated(forge.ROOT_DER)


def test_the_root_is_the_one_that_aws_publishes() -> None:
    assert AWS_NITRO_G1.trust is Trust.AWS_NITRO_G1
    assert AWS_NITRO_G1.fingerprint == "641a0321a3e244efe456463195d606317ed7cdcc3c1756e09893f3c68f79bb5b"
    assert not AWS_NITRO_G1.is_emulated


def test_neither_root_passes_for_the_other() -> None:
    for trust, der in ((Trust.EMULATED, AWS_NITRO_G1.der), (Trust.AWS_NITRO_G1, forge.ROOT_DER)):
        with pytest.raises(PolicyError) as caught:
            Anchor(trust, der)
        assert caught.value.code == "bad_anchor"


@pytest.mark.parametrize(
    ("der", "why"),
    [
        pytest.param(b"", "can be read", id="nothing"),
        pytest.param(forge.ROOT_DER + b"\x00", "can be read", id="trailing"),
        pytest.param(GOOD.cabundle[1], "does not match", id="not self-issued"),
        pytest.param(GOOD.certificate, "does not match", id="a leaf"),
        pytest.param(forge.chain(root=replace(forge.ROOT, curve=ec.SECP256R1())).cabundle[0], "P-384", id="P-256"),
        pytest.param(forge.chain(root=replace(forge.ROOT, hash=hashes.SHA256())).cabundle[0], "SHA384", id="SHA-256"),
        pytest.param(forge.chain(root=replace(forge.ROOT, usage=None)).cabundle[0], "lacks", id="no usage"),
        pytest.param(
            forge.chain(root=replace(forge.ROOT, usage=frozenset({"crl_sign"}))).cabundle[0],
            "may not sign certificates",
            id="usage",
        ),
        pytest.param(
            forge.chain(
                root=replace(forge.ROOT, constraints=x509.BasicConstraints(ca=False, path_length=None))
            ).cabundle[0],
            "may not sign certificates",
            id="no CA",
        ),
    ],
)
def test_what_cannot_be_an_anchor(der: bytes, why: str) -> None:
    with pytest.raises(PolicyError, match=why) as caught:
        Anchor.emulated(der)
    assert caught.value.code == "bad_anchor"


def test_the_leaf_key_is_what_a_chain_proves() -> None:
    key = validate(GOOD.certificate, GOOD.cabundle, anchor=ANCHOR, at=forge.NOW)
    assert key == GOOD.key.public_key()


@pytest.mark.parametrize("extension", [x509.AuthorityKeyIdentifier.from_issuer_public_key, None], ids=["AKI", "SAN"])
def test_what_is_relaxed_may_also_be_there(
    extension: Callable[[ec.EllipticCurvePublicKey], x509.ExtensionType] | None,
) -> None:
    """A leaf of the web PKI's shape passes as well as AWS's."""
    instance = forge.private_key("instance").public_key()
    added = x509.SubjectAlternativeName([x509.DNSName("enclave.test")]) if extension is None else extension(instance)
    chain = forge.chain(leaf=replace(forge.LEAF, extensions=((added, False),)))
    validate(chain.certificate, chain.cabundle, anchor=ANCHOR, at=forge.NOW)


def test_an_expired_anchor_proves_nothing() -> None:
    root = replace(forge.ROOT, not_after=forge.NOW - timedelta(seconds=1))
    chain = forge.chain(root=root)
    with pytest.raises(EvidenceError) as caught:
        validate(chain.certificate, chain.cabundle, anchor=Anchor.emulated(chain.cabundle[0]), at=forge.NOW)
    assert caught.value.code == "untrusted_chain"


def test_a_certificate_that_the_library_warns_of_is_one_more_refusal() -> None:
    """A serial number of 0: a warning of the library's, which must not leave as another exception when warnings are
    errors, as they are here."""
    serial = x509.load_der_x509_certificate(GOOD.certificate).serial_number.to_bytes(9, "big").lstrip(b"\x00")
    negative = GOOD.certificate.replace(serial, b"\x80" + serial[1:], 1)
    assert negative != GOOD.certificate
    actions: tuple[Literal["error", "ignore"], ...] = ("error", "ignore")
    for action in actions:
        with warnings.catch_warnings():
            warnings.simplefilter(action)
            with pytest.raises(EvidenceError) as caught:
                validate(negative, GOOD.cabundle, anchor=ANCHOR, at=forge.NOW)
        assert caught.value.code == "untrusted_chain"


@settings(max_examples=200)
@given(st.integers(0, 4), st.integers(0, 600), st.integers(1, 255))
@example(which=4, position=423, difference=1)
def test_nothing_that_is_signed_may_differ(which: int, position: int, difference: int) -> None:
    certificates = [bytearray(der) for der in (*GOOD.cabundle, GOOD.certificate)]
    certificates[which][position % len(certificates[which])] ^= difference
    *cabundle, leaf = map(bytes, certificates)
    try:
        key = validate(leaf, cabundle, anchor=ANCHOR, at=forge.NOW)
    except EvidenceError as error:
        refused = error
    else:
        # The wrapping of a signature is not signed: its bit string may claim unused bits. A document's signature covers
        # whole certificates, so that even this ends there.
        assert key == GOOD.key.public_key()
        originals = (*GOOD.cabundle, GOOD.certificate)
        assert [_signed(der) for der in (*cabundle, leaf)] == [_signed(der) for der in originals]
        return
    assert refused.code == "untrusted_chain"
    assert str(refused).isprintable()


def _signed(der: bytes) -> bytes:
    return x509.load_der_x509_certificate(der).tbs_certificate_bytes


@settings(max_examples=200)
@given(st.binary(max_size=200), st.lists(st.binary(max_size=100), max_size=3))
def test_any_bytes_give_the_typed_error(leaf: bytes, rest: list[bytes]) -> None:
    with pytest.raises(EvidenceError):
        validate(leaf, [forge.ROOT_DER, *rest], anchor=ANCHOR, at=forge.NOW)
