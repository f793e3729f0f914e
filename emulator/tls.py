"""A TLS root of this user's own, for the emulator's HTTPS endpoint.

It is another root than the one that signs attestation documents: whoever accepts emulated Evidence need not believe
this machine's HTTPS, nor the reverse. No public authority vouches for either.
"""

from __future__ import annotations

import ipaddress
import ssl
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Final, Self

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from emulator.pki import DevelopmentRoot, default_directory, keep_root

TLS_ROOT_FILE: Final = "tls-root.key.pem"
"""Key and certificate in one file."""
TLS_CERTIFICATE_FILE: Final = "tls-root.pem"
"""The certificate alone, as ``AWS_CA_BUNDLE`` wants it."""
LOCAL_NAMES: Final = ("localhost", "127.0.0.1", "::1")
LEAF_LIFETIME: Final = timedelta(days=30)
_BACKDATING: Final = timedelta(hours=1)
_COMMON_NAME: Final = "TLS of emulated services"


@dataclass(frozen=True, slots=True)
class TlsAuthority:
    """A root and what it issues: certificates for servers of this machine."""

    _root: DevelopmentRoot

    @classmethod
    def generate(cls, now: datetime) -> Self:
        """A new one, nowhere stored."""
        return cls(DevelopmentRoot.generate(now, common_name=_COMMON_NAME))

    @property
    def root_der(self) -> bytes:
        """The certificate that clients trust."""
        return self._root.certificate_der

    @property
    def root_pem(self) -> bytes:
        return x509.load_der_x509_certificate(self.root_der).public_bytes(Encoding.PEM)

    def server_context(self, names: Sequence[str], now: datetime) -> ssl.SSLContext:
        """For a server, TLS 1.2 and later, under a fresh certificate for ``names`` (host names or IP addresses).

        Its key is on disk, in a folder that only this user can enter, for as long as OpenSSL takes to read it.
        """
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.minimum_version = ssl.TLSVersion.TLSv1_2
        with tempfile.TemporaryDirectory(prefix="strongroom-tls-") as directory:
            file = Path(directory) / "leaf.pem"
            file.touch(mode=0o600)
            file.write_bytes(self._issue(names, now))
            context.load_cert_chain(file)
        return context

    def _issue(self, names: Sequence[str], now: datetime) -> bytes:
        """Key and certificate, PEM."""
        key = ec.generate_private_key(ec.SECP256R1())
        root = x509.load_der_x509_certificate(self.root_der)
        subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "emulated service")])
        usages = dict.fromkeys(
            (
                "content_commitment",
                "key_encipherment",
                "data_encipherment",
                "key_agreement",
                "key_cert_sign",
                "crl_sign",
                "encipher_only",
                "decipher_only",
            ),
            False,
        )
        builder = (
            x509.CertificateBuilder()
            .issuer_name(root.subject)
            .subject_name(subject)
            .public_key(key.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - _BACKDATING)
            .not_valid_after(now + LEAF_LIFETIME)
            .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
            .add_extension(x509.KeyUsage(digital_signature=True, **usages), critical=True)
            .add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]), critical=False)
            .add_extension(x509.SubjectAlternativeName([_general_name(name) for name in names]), critical=False)
            .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
            .add_extension(
                x509.AuthorityKeyIdentifier.from_issuer_public_key(self._root.key.public_key()), critical=False
            )
        )
        certificate = builder.sign(self._root.key, hashes.SHA384())
        private = key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
        return private + certificate.public_bytes(Encoding.PEM)


def ensure_tls_authority(directory: Path | None = None) -> TlsAuthority:
    """This user's TLS root, made when there is none, beside the development root.

    Raises :class:`emulator.pki.PkiError` as :func:`emulator.pki.ensure_development_root`.
    """
    root = keep_root(
        directory or default_directory(),
        TLS_ROOT_FILE,
        (TLS_CERTIFICATE_FILE, Encoding.PEM),
        lambda: DevelopmentRoot.generate(datetime.now(UTC), common_name=_COMMON_NAME),
    )
    return TlsAuthority(root)


def _general_name(name: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(name))
    except ValueError:
        return x509.DNSName(name)
