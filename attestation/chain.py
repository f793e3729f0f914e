"""Trust anchors, and X.509 path validation from one of them to a document's certificate.

RFC 5280 section 6.1, done by cryptography's ``x509.verification`` under a profile as strict as AWS's real chains allow.
Revocation is not checked, as AWS's attestation process says: leaves live for three hours.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from enum import StrEnum

from cryptography import x509
from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import SignatureAlgorithmOID
from cryptography.x509.verification import (
    Criticality,
    ExtensionPolicy,
    Policy,
    PolicyBuilder,
    Store,
    VerificationError,
)

from attestation.errors import EvidenceError, PolicyError

AWS_NITRO_G1_SHA256 = "641a0321a3e244efe456463195d606317ed7cdcc3c1756e09893f3c68f79bb5b"
"""The fingerprint that AWS publishes for its root certificate, over the DER."""


class Trust(StrEnum):
    """Who stands behind an anchor. ``EMULATED`` is a root that somebody made: it proves nothing about hardware."""

    AWS_NITRO_G1 = "AWS-NITRO-G1"
    EMULATED = "EMULATED"


@dataclass(frozen=True, slots=True)
class Anchor:
    """The root certificate that Evidence must lead to, and who stands behind it.

    Raises PolicyError ``bad_anchor`` for a certificate that cannot be a root, and for one under the wrong name: AWS's
    is known by its fingerprint, so neither can pass for the other.
    """

    trust: Trust
    der: bytes

    def __post_init__(self) -> None:
        if (self.trust is Trust.AWS_NITRO_G1) != (self.fingerprint == AWS_NITRO_G1_SHA256):
            raise PolicyError(
                "bad_anchor",
                f"an anchor that is not what {self.trust.value} names",
                expected=f"{'' if self.trust is Trust.AWS_NITRO_G1 else 'another than '}sha256 {AWS_NITRO_G1_SHA256}",
                got=f"sha256 {self.fingerprint}",
            )
        try:
            certificate = _load(self.der)
            constraints = certificate.extensions.get_extension_for_class(x509.BasicConstraints).value
            usage = certificate.extensions.get_extension_for_class(x509.KeyUsage).value
            certificate.verify_directly_issued_by(certificate)
        except x509.ExtensionNotFound as error:
            raise PolicyError(
                "bad_anchor", "the certificate cannot be a root: it lacks basicConstraints or keyUsage"
            ) from error
        except (
            _Refused,
            ValueError,
            InvalidSignature,
            x509.DuplicateExtension,
            x509.UnsupportedGeneralNameType,
        ) as error:
            raise PolicyError("bad_anchor", f"the certificate cannot be a root: {_reason(error)}") from error
        if not (constraints.ca and usage.key_cert_sign):
            raise PolicyError("bad_anchor", "the certificate cannot be a root: it may not sign certificates")

    @property
    def fingerprint(self) -> str:
        """SHA-256 of the DER, in hexadecimal."""
        return hashlib.sha256(self.der).hexdigest()

    @property
    def is_emulated(self) -> bool:
        return self.trust is Trust.EMULATED

    @classmethod
    def emulated(cls, der: bytes) -> Anchor:
        """An emulator's root, from its DER certificate."""
        return cls(Trust.EMULATED, der)


def validate(
    certificate: bytes, cabundle: Sequence[bytes], *, anchor: Anchor, at: datetime
) -> ec.EllipticCurvePublicKey:
    """The public key of ``certificate``, proven by the whole ``cabundle`` (root first) up to ``anchor``, at ``at``.

    ``at`` is the verification time, with a time zone. The key is returned here and nowhere else, so that no signature
    can be checked with a key that has no chain.
    Raises EvidenceError ``untrusted_chain``.
    """
    # The bundle's own root is never trusted, only compared with ours.
    if cabundle[0] != anchor.der:
        raise EvidenceError(
            "untrusted_chain",
            f"the chain does not lead to the anchor {anchor.trust.value}",
            expected=f"root sha256 {anchor.fingerprint}",
            got=f"root sha256 {hashlib.sha256(cabundle[0]).hexdigest()}",
        )
    try:
        root = _load(anchor.der)
        intermediates = [_load(der) for der in cabundle[1:]]
        leaf = _load(certificate)
        verifier = (
            PolicyBuilder()
            .store(Store([root]))
            .time(at)
            .extension_policies(ca_policy=_CA_PROFILE, ee_policy=_LEAF_PROFILE)
            .build_client_verifier()
        )
        path = verifier.verify(leaf, intermediates).chain
    except (_Refused, VerificationError, ValueError) as error:
        raise EvidenceError(
            "untrusted_chain",
            f"the chain to the anchor {anchor.trust.value} does not hold: {_reason(error)}",
            expected=f"a valid path at {at.isoformat()}",
            got=_reason(error),
        ) from error
    # The path may leave certificates of the bundle out; a bundle is the path, or something foreign is in it.
    if path != [leaf, *reversed(intermediates), root]:
        raise EvidenceError(
            "untrusted_chain",
            "the bundle holds certificates that are not on the path",
            expected=f"a path of {len(cabundle) + 1} certificates in the bundle's order",
            got=f"a path of {len(path)}",
        )
    key = leaf.public_key()
    assert isinstance(key, ec.EllipticCurvePublicKey)  # by _load
    return key


class _Refused(Exception):
    """A certificate outside our profile, before path validation."""


def _load(der: bytes) -> x509.Certificate:
    """A certificate with a P-384 key, signed with ecdsa-with-SHA384, as every one of AWS's is."""
    try:
        certificate = x509.load_der_x509_certificate(der)
        key = certificate.public_key()
        algorithm = certificate.signature_algorithm_oid
    except (ValueError, UnsupportedAlgorithm, x509.InvalidVersion, Warning) as error:
        # Warning: what the library only warns of (a serial number below 1), where warnings are set to be errors.
        raise _Refused("not an X.509 certificate that can be read") from error
    if not isinstance(key, ec.EllipticCurvePublicKey) or not isinstance(key.curve, ec.SECP384R1):
        raise _Refused("a certificate's key is not on P-384")
    if algorithm != SignatureAlgorithmOID.ECDSA_WITH_SHA384:
        raise _Refused("a certificate is not signed with ecdsa-with-SHA384")
    return certificate


def _reason(error: Exception) -> str:
    """What the library says, without its preamble and its dump of the certificate, which may be hostile."""
    said = str(error).partition(" (encountered processing")[0]
    said = said.removeprefix("validation failed: ").removeprefix("candidates exhausted: ")
    return ascii(said or type(error).__name__)[1:-1]


def _leaf_constraints(_policy: Policy, _certificate: x509.Certificate, constraints: x509.BasicConstraints) -> None:
    if constraints.ca:
        raise ValueError("the leaf is a CA")


def _leaf_usage(_policy: Policy, _certificate: x509.Certificate, usage: x509.KeyUsage) -> None:
    if not usage.digital_signature or usage.key_cert_sign:
        raise ValueError("the leaf may not sign documents, or may sign certificates")


def _ca_usage(_policy: Policy, _certificate: x509.Certificate, usage: x509.KeyUsage) -> None:
    if not usage.key_cert_sign:
        raise ValueError("a CA may not sign certificates")


# The web PKI's rules, which a leaf of AWS's breaks in two points only: it has neither an authority key identifier nor a
# subject alternative name. Those two are relaxed; what AWS's certificates always have is required on top. Critical
# extensions that no rule names are refused by the library.
_LEAF_PROFILE = (
    ExtensionPolicy.webpki_defaults_ee()
    .may_be_present(x509.AuthorityKeyIdentifier, Criticality.AGNOSTIC, None)
    .may_be_present(x509.SubjectAlternativeName, Criticality.AGNOSTIC, None)
    .require_present(x509.BasicConstraints, Criticality.CRITICAL, _leaf_constraints)
    .require_present(x509.KeyUsage, Criticality.AGNOSTIC, _leaf_usage)
)
_CA_PROFILE = ExtensionPolicy.webpki_defaults_ca().require_present(x509.KeyUsage, Criticality.CRITICAL, _ca_usage)
