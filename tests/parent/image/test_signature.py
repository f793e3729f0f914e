"""Who signs an image: keys and certificates, and the section, held to an independent one."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from datetime import UTC, datetime, timedelta, timezone

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.asymmetric.types import PrivateKeyTypes

from attestation.eif import SigningCertificate, verify_signature
from attestation.release_signing import LocalSigner, PublicKey
from parent.image.signature import MAX_DAYS, ImageSigner, make_certificate, read_signing_key
from parent.image.tree import ImageBuildError
from tests import eif_files
from tests.pki.forge import NOW, private_key

PCR0 = hashlib.sha384(b"an image").digest()
KEY = private_key("image signer")
CURVES = pytest.mark.parametrize("curve", [ec.SECP256R1(), ec.SECP384R1(), ec.SECP521R1()], ids=lambda each: each.name)


def pem(
    key: PrivateKeyTypes,
    form: serialization.PrivateFormat = serialization.PrivateFormat.PKCS8,
    password: bytes | None = None,
) -> bytes:
    encryption = serialization.BestAvailableEncryption(password) if password else serialization.NoEncryption()
    return key.private_bytes(serialization.Encoding.PEM, form, encryption)


def certificate(key: ec.EllipticCurvePrivateKey = KEY) -> bytes:
    return make_certificate(key, "A release engineer", NOW, 30)


def refused(code: str, make: Callable[[], object]) -> ImageBuildError:
    with pytest.raises(ImageBuildError) as caught:
        make()
    assert caught.value.code == code
    assert str(caught.value).isprintable()
    return caught.value


@CURVES
def test_the_section_is_that_of_the_format(curve: ec.EllipticCurve) -> None:
    independent = eif_files.Signer(curve)
    signer = ImageSigner.from_pem(pem(independent.key), independent.pem())
    assert signer.section(PCR0) == independent.section(PCR0)
    assert signer.certificate.pcr8 == independent.pcr8()
    assert verify_signature(signer.section(PCR0), PCR0, at=None) == signer.certificate


@pytest.mark.parametrize("form", [serialization.PrivateFormat.PKCS8, serialization.PrivateFormat.TraditionalOpenSSL])
def test_key_and_certificate_in_one_file_in_any_order(form: serialization.PrivateFormat) -> None:
    parameters = b"-----BEGIN EC PARAMETERS-----\nBgUrgQQAIg==\n-----END EC PARAMETERS-----\n"
    apart = ImageSigner.from_pem(pem(KEY), certificate())
    for together in (
        pem(KEY, form) + certificate(),
        b"a remark\n" + certificate().replace(b"\n", b"\r\n") + parameters + pem(KEY, form),
    ):
        assert ImageSigner.from_pem(together).section(PCR0) == apart.section(PCR0)


def test_what_is_told_of_a_signer() -> None:
    signer = ImageSigner.from_pem(pem(KEY) + certificate())
    assert repr(signer) == f"ImageSigner('CN=A release engineer', pcr8={signer.certificate.pcr8.hex()[:16]})"


@pytest.mark.parametrize(
    "key",
    [
        b"",
        b"-----BEGIN PRIVATE KEY-----\nAAAA\n-----END PRIVATE KEY-----\n",
        pem(KEY) + pem(KEY),
        pem(KEY, password=b"secret"),
        pem(KEY, serialization.PrivateFormat.TraditionalOpenSSL, b"secret"),
        pem(ec.derive_private_key(7, ec.SECP256K1())),
        pem(Ed25519PrivateKey.from_private_bytes(bytes(32))),
        pem(rsa.generate_private_key(65537, 2048)),
    ],
    ids=["nothing", "damaged", "two", "encrypted", "encrypted-old", "secp256k1", "ed25519", "rsa"],
)
def test_keys_that_sign_no_images(key: bytes) -> None:
    error = refused("unusable_key", lambda: ImageSigner.from_pem(key, certificate()))
    assert error.expected is not None
    assert "not encrypted" in error.expected


def test_certificates_that_are_not_usable() -> None:
    def damaged() -> bytes:
        return b"-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n"

    def long() -> bytes:
        names = [x509.DNSName(f"{number}.example") for number in range(600)]
        name = x509.Name([])
        builder = x509.CertificateBuilder(name, name, KEY.public_key(), 1, NOW, NOW)
        made = builder.add_extension(x509.SubjectAlternativeName(names), critical=False)
        return made.sign(KEY, hashes.SHA384()).public_bytes(serialization.Encoding.PEM)

    for bad in (b"", certificate() + certificate(), damaged(), long()):
        refused("unusable_certificate", lambda bad=bad: ImageSigner.from_pem(pem(KEY), bad))  # type: ignore[misc]
    refused("unusable_certificate", lambda: ImageSigner.from_pem(pem(KEY)))


def test_the_certificate_is_the_keys() -> None:
    other = private_key("somebody else")
    refused("wrong_certificate", lambda: ImageSigner.from_pem(pem(KEY), certificate(other)))
    refused("wrong_certificate", lambda: ImageSigner.from_signer(LocalSigner(KEY), certificate(other)))
    refused("wrong_certificate", lambda: ImageSigner.from_signer(LocalSigner.generate(), certificate()))


def test_a_key_that_another_holds() -> None:
    signer = ImageSigner.from_signer(LocalSigner(KEY), certificate())
    assert verify_signature(signer.section(PCR0), PCR0, at=NOW) == signer.certificate
    assert signer.certificate.pcr8 == ImageSigner.from_pem(pem(KEY), certificate()).certificate.pcr8


@pytest.mark.parametrize("answer", [b"", b"no DER", LocalSigner(KEY).sign(b"something else")])
def test_a_signer_is_not_believed(answer: bytes) -> None:
    class Broken:
        @property
        def public_key(self) -> PublicKey:
            return LocalSigner(KEY).public_key

        def sign(self, data: bytes) -> bytes:
            return answer

    refused("bad_signature", lambda: ImageSigner.from_signer(Broken(), certificate()).section(PCR0))


@CURVES
def test_a_made_certificate(curve: ec.EllipticCurve) -> None:
    key = private_key("its own", curve)
    made = make_certificate(key, "Strongroom releases", NOW, 365)
    assert make_certificate(key, "Strongroom releases", NOW, 365) == made
    here = NOW.astimezone(timezone(timedelta(hours=9))) + timedelta(microseconds=7)
    assert make_certificate(key, "Strongroom releases", here, 365) == made
    read = SigningCertificate.from_pem(made)
    assert (read.subject, read.not_before, read.not_after) == ("CN=Strongroom releases", NOW, NOW + timedelta(365))
    parsed = x509.load_pem_x509_certificate(made)
    parsed.verify_directly_issued_by(parsed)
    assert parsed.serial_number > 0
    assert parsed.extensions.get_extension_for_class(x509.BasicConstraints).value.ca is False
    assert parsed.extensions.get_extension_for_class(x509.KeyUsage).value.digital_signature
    for other in (
        make_certificate(key, "Strongroom release", NOW, 365),
        make_certificate(key, "Strongroom releases", NOW, 366),
        make_certificate(key, "Strongroom releases", NOW + timedelta(seconds=1), 365),
    ):
        assert x509.load_pem_x509_certificate(other).serial_number != parsed.serial_number


@pytest.mark.parametrize(
    ("subject", "not_before", "days"),
    [
        ("", NOW, 1),
        ("x" * 65, NOW, 1),
        ("a\nb", NOW, 1),
        ("a", NOW, 0),
        ("a", NOW, MAX_DAYS + 1),
        ("a", NOW.replace(tzinfo=None), 1),
        ("a", datetime(1949, 1, 1, tzinfo=UTC), 1),
        ("a", datetime(9999, 12, 31, tzinfo=UTC), 1),
        ("\ud800", NOW, 1),
    ],
)
def test_what_a_certificate_cannot_say(subject: str, not_before: datetime, days: int) -> None:
    refused("unusable_certificate", lambda: make_certificate(KEY, subject, not_before, days))


def test_a_certificate_for_another_curve() -> None:
    key = ec.derive_private_key(7, ec.SECP256K1())
    refused("unusable_certificate", lambda: make_certificate(key, "a", NOW, 1))


def test_a_signing_key_is_read() -> None:
    assert read_signing_key(pem(KEY) + certificate()).public_key() == KEY.public_key()
