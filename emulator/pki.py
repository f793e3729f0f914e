"""The development PKI of the software NSM: the shape of AWS's, under a root of one's own.

    root (30 years) -> region (20 days) -> zone (6 days) -> instance (24 h) -> leaf (3 h)

Each is P-384 with ecdsa-with-SHA384. Subjects, key usages, path lengths and lifetimes are those measured on AWS's
documents; the organisation is "Strongroom emulator", so that nobody takes one for the other, and no certificate names a
revocation list, because there is none. The root key is made once for each user, kept in a folder that only this user
can enter, and never shipped: whoever has it can emulate any enclave to those who trust this root, and nobody else does.
"""

from __future__ import annotations

import os
import re
import secrets
import stat
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Self

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    load_pem_private_key,
)
from cryptography.x509.oid import NameOID

from attestation.errors import StrongroomError

ROOT_FILE = "root.pem"
"""The root's key and certificate in one file, so that they appear together or not at all."""
ROOT_CERTIFICATE_FILE = "root.der"
"""The certificate alone, for policies to name as their anchor."""

ORGANISATION = "Strongroom emulator"
DOMAIN = "emulator"
"""Stands where AWS's certificates say "aws"."""

ROOT_LIFETIME = timedelta(days=10958)
REGION_LIFETIME = timedelta(days=20)
ZONE_LIFETIME = timedelta(days=6)
INSTANCE_LIFETIME = timedelta(hours=24)
LEAF_LIFETIME = timedelta(hours=3)
CA_BACKDATING = timedelta(hours=1)
"""The root and region are valid from an hour before they are made; so are the CAs below here, for a leaf's validity to
lie within theirs."""
LEAF_BACKDATING = timedelta(seconds=3)

_REGION = re.compile(r"[a-z0-9-]{1,14}")
_MODULE_ID = re.compile(r"(?P<instance>i-[0-9a-f]{8,17})-enc[0-9a-f]{16}")


class PkiError(StrongroomError):
    """The development root cannot be used. Codes: ``unsafe_permissions``, ``unusable_root``, ``pki_unavailable``,
    ``invalid_argument``."""


@dataclass(frozen=True, slots=True)
class DevelopmentRoot:
    """A root with its key. The certificate is the anchor that a policy names to accept this user's emulated
    enclaves."""

    certificate_der: bytes
    key: ec.EllipticCurvePrivateKey

    @classmethod
    def generate(cls, now: datetime, *, common_name: str = f"{DOMAIN}.nitro-enclaves") -> Self:
        """A new root, nowhere stored."""
        key = _new_key()
        subject = _name(("C", "US"), ("O", ORGANISATION), ("OU", "Emulator"), ("CN", common_name))
        builder = _certificate(subject, subject, key, now - CA_BACKDATING, now + ROOT_LIFETIME)
        builder = builder.add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        builder = builder.add_extension(_key_identifier(key), critical=False)
        builder = builder.add_extension(_key_usage("digital_signature", "key_cert_sign", "crl_sign"), critical=True)
        return cls(builder.sign(key, hashes.SHA384()).public_bytes(Encoding.DER), key)

    def __repr__(self) -> str:
        return "DevelopmentRoot(key=<redacted>)"


@dataclass(frozen=True, slots=True)
class IssuedChain:
    """What a document carries, and the key that signs it. ``cabundle`` is root first, as in the document."""

    cabundle: tuple[bytes, ...]
    certificate: bytes
    key: ec.EllipticCurvePrivateKey
    not_before: datetime
    not_after: datetime

    def __repr__(self) -> str:
        return f"IssuedChain(not_after={self.not_after:%Y-%m-%dT%H:%M:%SZ}, key=<redacted>)"


def default_directory() -> Path:
    """``pki`` in ``$STRONGROOM_HOME``, else in ``$XDG_DATA_HOME/strongroom``, else in ``~/.local/share/strongroom``."""
    if home := os.environ.get("STRONGROOM_HOME"):
        return Path(home) / "pki"
    if data := os.environ.get("XDG_DATA_HOME"):
        return Path(data) / "strongroom" / "pki"
    return Path.home() / ".local" / "share" / "strongroom" / "pki"


def ensure_development_root(directory: Path | None = None) -> DevelopmentRoot:
    """This user's root: the stored one, or a new one, stored (folder 0700, key 0600).

    Several processes may call it at once: the first to store its root wins and all return that one.
    Raises :class:`PkiError` when the folder or file is open to others, is not this user's, or holds something else.
    """
    return keep_root(
        directory or default_directory(),
        ROOT_FILE,
        (ROOT_CERTIFICATE_FILE, Encoding.DER),
        lambda: DevelopmentRoot.generate(datetime.now(UTC)),
    )


def keep_root(
    directory: Path, root_file: str, published: tuple[str, Encoding], generate: Callable[[], DevelopmentRoot]
) -> DevelopmentRoot:
    """The root in ``directory / root_file``, or a new one by ``generate``, stored there; ``published`` is the file that
    has its certificate alone, and in which encoding. Raises PkiError as :func:`ensure_development_root`.
    """
    path = directory / root_file
    try:
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        _require_private(directory, 0o700)
        if not path.exists():
            publish_private(path, _to_pem(generate()), replace=False)
        root = _load(path)
        name, encoding = published
        content = x509.load_der_x509_certificate(root.certificate_der).public_bytes(encoding)
        certificate = directory / name
        if not certificate.exists() or certificate.read_bytes() != content:
            publish_private(certificate, content, replace=True)
    except OSError as error:
        raise PkiError(
            "pki_unavailable", f"cannot keep the development root in {directory}: {error.strerror}"
        ) from error
    return root


def issue_chain(root: DevelopmentRoot, module_id: str, region: str, now: datetime) -> IssuedChain:
    """A fresh region, zone and instance CA and a leaf for ``module_id`` (``i-<hex>-enc<16 hex>``), valid from 3 s
    before ``now`` for 3 h.

    Raises :class:`PkiError` for names that do not fit a certificate, and when the root is not valid at ``now``.
    """
    module = _MODULE_ID.fullmatch(module_id)
    if module is None:
        raise PkiError("invalid_argument", "a module id", expected="i-<8..17 hex>-enc<16 hex>", got=module_id)
    if _REGION.fullmatch(region) is None:
        raise PkiError("invalid_argument", "a region", expected="1..14 of a-z, 0-9, -", got=region)
    now = now.replace(microsecond=0)  # X.509 has whole seconds
    anchor = x509.load_der_x509_certificate(root.certificate_der)
    if not anchor.not_valid_before_utc <= now <= anchor.not_valid_after_utc - REGION_LIFETIME:
        raise PkiError(
            "unusable_root",
            f"the development root is not valid now: set the clock, or remove its {ROOT_FILE} to get a new one",
            expected=f"{anchor.not_valid_before_utc:%Y-%m-%d} to {anchor.not_valid_after_utc:%Y-%m-%d}",
            got=f"{now:%Y-%m-%d}",
        )

    ca_start = now - CA_BACKDATING
    region_cn = f"{secrets.token_hex(8)}.{region}.{DOMAIN}.nitro-enclaves"
    region_name = _name(("C", "US"), ("O", ORGANISATION), ("OU", "Emulator"), ("CN", region_cn))
    region_key = _new_key()
    region_ca = _issue_ca(
        anchor.subject, root.key, region_name, region_key, ca_start, now + REGION_LIFETIME, path_length=2
    )

    zone_cn = f"{secrets.token_hex(8)}.zonal.{region}.{DOMAIN}.nitro-enclaves"
    place = (("ST", "Nowhere"), ("L", "Nowhere"))
    # The order of the attributes differs between the levels, as in AWS's certificates.
    zone_name = _name(("CN", zone_cn), ("OU", "Emulator"), ("O", ORGANISATION), ("C", "US"), *place)
    zone_key = _new_key()
    zone_ca = _issue_ca(region_name, region_key, zone_name, zone_key, ca_start, now + ZONE_LIFETIME, path_length=1)

    organisation = (("C", "US"), *place, ("O", ORGANISATION), ("OU", "Emulator"))
    instance_name = _name(*organisation, ("CN", f"{module['instance']}.{region}.{DOMAIN}.nitro-enclaves"))
    instance_key = _new_key()
    instance_ca = _issue_ca(
        zone_name, zone_key, instance_name, instance_key, ca_start, ca_start + INSTANCE_LIFETIME, path_length=0
    )

    leaf_name = _name(*organisation, ("CN", f"{module_id}.{region}.{DOMAIN}"))
    leaf_key = _new_key()
    not_before, not_after = now - LEAF_BACKDATING, now + LEAF_LIFETIME
    # No authority or subject key identifier, no alternative name, no extended key usage, and a key usage that is not
    # critical: as AWS's.
    leaf = _certificate(instance_name, leaf_name, leaf_key, not_before, not_after)
    leaf = leaf.add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
    leaf = leaf.add_extension(_key_usage("digital_signature", "content_commitment"), critical=False)
    certificate = leaf.sign(instance_key, hashes.SHA384()).public_bytes(Encoding.DER)
    return IssuedChain(
        (root.certificate_der, region_ca, zone_ca, instance_ca), certificate, leaf_key, not_before, not_after
    )


# --- Certificates ------------------------------------------------------------------------------------------------

_ATTRIBUTES = {
    "C": NameOID.COUNTRY_NAME,
    "ST": NameOID.STATE_OR_PROVINCE_NAME,
    "L": NameOID.LOCALITY_NAME,
    "O": NameOID.ORGANIZATION_NAME,
    "OU": NameOID.ORGANIZATIONAL_UNIT_NAME,
    "CN": NameOID.COMMON_NAME,
}
_KEY_USAGES = (
    "digital_signature",
    "content_commitment",
    "key_encipherment",
    "data_encipherment",
    "key_agreement",
    "key_cert_sign",
    "crl_sign",
    "encipher_only",
    "decipher_only",
)


def _new_key() -> ec.EllipticCurvePrivateKey:
    return ec.generate_private_key(ec.SECP384R1())


def _name(*attributes: tuple[str, str]) -> x509.Name:
    return x509.Name([x509.NameAttribute(_ATTRIBUTES[kind], value) for kind, value in attributes])


def _key_usage(*usages: str) -> x509.KeyUsage:
    return x509.KeyUsage(**{usage: usage in usages for usage in _KEY_USAGES})


def _key_identifier(key: ec.EllipticCurvePrivateKey) -> x509.SubjectKeyIdentifier:
    return x509.SubjectKeyIdentifier.from_public_key(key.public_key())


def _certificate(
    issuer: x509.Name, subject: x509.Name, key: ec.EllipticCurvePrivateKey, not_before: datetime, not_after: datetime
) -> x509.CertificateBuilder:
    return (
        x509.CertificateBuilder()
        .issuer_name(issuer)
        .subject_name(subject)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(not_before)
        .not_valid_after(not_after)
    )


def _issue_ca(
    issuer: x509.Name,
    issuer_key: ec.EllipticCurvePrivateKey,
    subject: x509.Name,
    key: ec.EllipticCurvePrivateKey,
    not_before: datetime,
    not_after: datetime,
    *,
    path_length: int,
) -> bytes:
    usages = ("key_cert_sign",) if path_length == 0 else ("digital_signature", "key_cert_sign", "crl_sign")
    builder = _certificate(issuer, subject, key, not_before, not_after)
    builder = builder.add_extension(x509.BasicConstraints(ca=True, path_length=path_length), critical=True)
    authority = x509.AuthorityKeyIdentifier.from_issuer_public_key(issuer_key.public_key())
    builder = builder.add_extension(authority, critical=False)
    builder = builder.add_extension(_key_identifier(key), critical=False)
    builder = builder.add_extension(_key_usage(*usages), critical=True)
    return builder.sign(issuer_key, hashes.SHA384()).public_bytes(Encoding.DER)


# --- Keeping the root --------------------------------------------------------------------------------------------


def _to_pem(root: DevelopmentRoot) -> bytes:
    key = root.key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
    return key + x509.load_der_x509_certificate(root.certificate_der).public_bytes(Encoding.PEM)


def _load(path: Path) -> DevelopmentRoot:
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
    with os.fdopen(descriptor, "rb") as file:
        _require_private(path, 0o600, os.fstat(file.fileno()))
        pem = file.read(65_536)
    advice = f"remove {path} to get a new root; policies that name the old one then refuse it"
    try:
        key = load_pem_private_key(pem, password=None)
        certificate = x509.load_pem_x509_certificate(pem)
    except (ValueError, TypeError) as error:
        raise PkiError("unusable_root", f"this is no development root: {advice}", got=path) from error
    if not isinstance(key, ec.EllipticCurvePrivateKey) or certificate.public_key() != key.public_key():
        raise PkiError("unusable_root", f"the development root's key and certificate do not belong together: {advice}")
    return DevelopmentRoot(certificate.public_bytes(Encoding.DER), key)


def _require_private(path: Path, mode: int, status: os.stat_result | None = None) -> None:
    status = status or path.stat()
    if status.st_uid != os.geteuid():
        raise PkiError(
            "unsafe_permissions",
            f"{path} belongs to another user: name a folder of your own with STRONGROOM_HOME",
            expected=f"uid {os.geteuid()}",
            got=f"uid {status.st_uid}",
        )
    permissions = stat.S_IMODE(status.st_mode)
    if permissions & 0o077:
        raise PkiError(
            "unsafe_permissions",
            f"others may reach the development root's key: run `chmod {mode:o} {path}`, or remove it if they may have",
            expected=f"{mode:o}",
            got=f"{permissions:o}",
        )


def publish_private(path: Path, content: bytes, *, replace: bool) -> None:
    """Makes a file appear whole, with mode 0600 from its first byte. Without ``replace`` a file that is there already
    stays."""
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(8)}")
    descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        if replace:
            temporary.replace(path)
            return
        try:
            os.link(temporary, path)  # unlike a rename, never replaces
        except FileExistsError:
            return  # another process stored its root first; the caller loads that one
    finally:
        temporary.unlink(missing_ok=True)
