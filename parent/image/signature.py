"""Who signs an image, and the section that says so.

The section is what AWS's tools write and check (aws/aws-nitro-enclaves-image-format at 0cd1286f6fbb,
src/utils/eif_signer.rs): a CBOR array of one map with the certificate in PEM and a COSE_Sign1 (RFC 9052) over PCR0,
both as serde writes bytes, an array of integers. The certificate's digest is PCR8; nothing else vouches for it.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Mapping
from datetime import UTC, datetime, timedelta
from typing import Final, final

import cbor2
from cryptography import x509
from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.utils import decode_dss_signature
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat, load_pem_private_key
from cryptography.x509.oid import NameOID

from attestation.eif import MAX_SIGNATURE_SIZE, ImageError, SigningCertificate
from attestation.release_signing import Signer
from parent.image.tree import ImageBuildError

MAX_DAYS: Final = 3650
"""Of a certificate that is made here: ten years."""
MAX_SUBJECT: Final = 64
"""Characters of a common name (RFC 5280 appendix A.1, ub-common-name)."""

_ALGORITHMS: Final[Mapping[str, tuple[int, hashes.SHA256 | hashes.SHA384 | hashes.SHA512]]] = {
    ec.SECP256R1.name: (-7, hashes.SHA256()),
    ec.SECP384R1.name: (-35, hashes.SHA384()),
    ec.SECP521R1.name: (-36, hashes.SHA512()),
}
"""COSE's number (RFC 9053 section 2.1) and the hash, by the key's curve."""
_USAGE: Final = x509.KeyUsage(
    digital_signature=True,
    content_commitment=False,
    key_encipherment=False,
    data_encipherment=False,
    key_agreement=False,
    key_cert_sign=False,
    crl_sign=False,
    encipher_only=False,
    decipher_only=False,
)
_BLOCK: Final = re.compile(rb"-----BEGIN ([A-Z0-9 ]{1,40})-----[^-]{0,65536}-----END \1-----")


@final
class ImageSigner:
    """A key that signs images, with its certificate. It has signed nothing that does not verify."""

    def __init__(self, certificate: bytes, sign: Callable[[bytes], bytes]) -> None:
        """``certificate`` is PEM; ``sign`` gives ECDSA's signature over some bytes in DER, with the hash that goes with
        the curve. Raises ImageBuildError ``unusable_certificate``.
        """
        self.certificate = _certificate(certificate)
        self._pem = x509.load_der_x509_certificate(self.certificate.der).public_bytes(Encoding.PEM)
        self._sign = sign

    @classmethod
    def from_pem(cls, pem: bytes, certificate: bytes | None = None) -> ImageSigner:
        """A private key in PEM, not encrypted, on P-384 (P-256 and P-521 are taken too), and its certificate, which may
        stand in the same file. The same image has the same signature (RFC 6979).

        Raises ImageBuildError: ``unusable_key``, ``unusable_certificate``, ``wrong_certificate``.
        """
        key = read_signing_key(pem)
        if certificate is None:
            certificate = b"\n".join(block[0] for block in _BLOCK.finditer(pem) if block[1] == b"CERTIFICATE")
        algorithm = ec.ECDSA(_ALGORITHMS[key.curve.name][1], deterministic_signing=True)
        signer = cls(certificate, lambda data: key.sign(data, algorithm))
        _check_match(signer.certificate, _spki(key.public_key()))
        return signer

    @classmethod
    def from_signer(cls, signer: Signer, certificate: bytes) -> ImageSigner:
        """A key that another holds, such as KMS: ECDSA on P-384, whose ``sign`` hashes with SHA-384 itself.

        Raises ImageBuildError: ``unusable_certificate``, ``wrong_certificate``; and what asking for its public key
        raises.
        """
        made = cls(certificate, signer.sign)
        _check_match(made.certificate, signer.public_key.spki)
        return made

    def section(self, pcr0: bytes) -> bytes:
        """The signature section's data for an image with this PCR0 (48 bytes).

        Raises ImageBuildError ``bad_signature`` where the signer gives what does not verify, and what it raises itself.
        """
        number, algorithm = _ALGORITHMS[self.certificate.key.curve.name]
        protected = cbor2.dumps({1: number})
        payload = cbor2.dumps({"register_index": 0, "register_value": list(pcr0)})
        to_be_signed = cbor2.dumps(["Signature1", protected, b"", payload])  # RFC 9052 section 4.4
        signature = self._sign(to_be_signed)
        try:
            self.certificate.key.verify(signature, to_be_signed, ec.ECDSA(algorithm))
        except InvalidSignature as error:
            what = "the signer's signature does not verify with the certificate's key"
            raise ImageBuildError("bad_signature", what) from error
        half = (self.certificate.key.curve.key_size + 7) // 8
        raw = b"".join(value.to_bytes(half, "big") for value in decode_dss_signature(signature))
        sign1 = cbor2.dumps([protected, {}, payload, raw])
        return cbor2.dumps([{"signing_certificate": list(self._pem), "signature": list(sign1)}])

    def __repr__(self) -> str:
        return f"ImageSigner({self.certificate.subject!r}, pcr8={self.certificate.pcr8.hex()[:16]})"


def read_signing_key(pem: bytes) -> ec.EllipticCurvePrivateKey:
    """The one private key of ``pem``, which may hold certificates too. Raises ImageBuildError ``unusable_key``."""
    blocks = [block[0] for block in _BLOCK.finditer(pem) if block[1].endswith(b"PRIVATE KEY")]
    if len(blocks) != 1:
        raise _unusable_key(f"{len(blocks)} private keys")
    try:
        key = load_pem_private_key(blocks[0], password=None)
    except (ValueError, TypeError, UnsupportedAlgorithm) as error:
        raise _unusable_key("one that is encrypted or damaged") from error
    if not isinstance(key, ec.EllipticCurvePrivateKey) or key.curve.name not in _ALGORITHMS:
        raise _unusable_key(type(getattr(key, "curve", key)).__name__)
    return key


def make_certificate(key: ec.EllipticCurvePrivateKey, subject: str, not_before: datetime, days: int) -> bytes:
    """A certificate in PEM that ``key`` signs for itself, for ``days`` from ``not_before``, which has a time zone and
    counts in whole seconds. The same arguments give the same bytes, and so the same PCR8.

    Raises ImageBuildError ``unusable_certificate`` for what a certificate cannot say.
    """
    number = _ALGORITHMS.get(key.curve.name)
    named = 0 < len(subject) <= MAX_SUBJECT and subject.isprintable()
    if number is None or not named or not 0 < days <= MAX_DAYS or not_before.tzinfo is None:
        expected = f"P-256, P-384 or P-521; a name of 1 to {MAX_SUBJECT} printable characters; 1 to {MAX_DAYS} days"
        got = f"{key.curve.name}; {ascii(subject)[:100]}; {days} days from {not_before.isoformat()}"
        raise ImageBuildError("unusable_certificate", "no such certificate", expected=expected, got=got)
    begin = not_before.astimezone(UTC).replace(microsecond=0)
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, subject)])
    said = _spki(key.public_key()) + f"{subject}\0{begin.isoformat()}\0{days}".encode()
    serial = int.from_bytes(hashlib.sha256(said).digest()[:16], "big") | 1
    try:
        made = (
            x509.CertificateBuilder()
            .subject_name(name)
            .issuer_name(name)
            .public_key(key.public_key())
            .serial_number(serial)
            .not_valid_before(begin)
            .not_valid_after(begin + timedelta(days=days))
            .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
            .add_extension(_USAGE, critical=True)
            .sign(key, number[1], ecdsa_deterministic=True)
        )
    except (ValueError, OverflowError) as error:
        raise ImageBuildError("unusable_certificate", f"no such certificate: {error}") from error
    return made.public_bytes(Encoding.PEM)


def _certificate(pem: bytes) -> SigningCertificate:
    blocks = [block[0] for block in _BLOCK.finditer(pem) if block[1] == b"CERTIFICATE"]
    if len(blocks) != 1:
        expected, got = "one certificate, PEM, in the key's file or on its own", f"{len(blocks)} certificates"
        raise ImageBuildError("unusable_certificate", "no signing certificate", expected=expected, got=got)
    if 2 * len(blocks[0]) > MAX_SIGNATURE_SIZE // 2:  # an integer of CBOR takes up to two bytes
        expected, got = f"at most {MAX_SIGNATURE_SIZE // 4} bytes of PEM", f"{len(blocks[0])} bytes"
        raise ImageBuildError("unusable_certificate", "too large to be put into an image", expected=expected, got=got)
    try:
        return SigningCertificate.from_pem(blocks[0])
    except ImageError as error:
        raise ImageBuildError("unusable_certificate", error.message, expected=error.expected, got=error.got) from error


def _check_match(certificate: SigningCertificate, spki: bytes) -> None:
    own = _spki(certificate.key)
    if own != spki:
        expected, got = (
            f"one for the key with SHA-256 {hashlib.sha256(each).hexdigest()[:16]}" for each in (spki, own)
        )
        raise ImageBuildError("wrong_certificate", "the certificate is another key's", expected=expected, got=got)


def _spki(key: ec.EllipticCurvePublicKey) -> bytes:
    return key.public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)


def _unusable_key(got: str) -> ImageBuildError:
    expected = "one private key on P-384 (or P-256, P-521), PEM, not encrypted"
    return ImageBuildError("unusable_key", "not a key to sign images with", expected=expected, got=got)
