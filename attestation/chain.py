"""Trust anchors, and X.509 path validation from one of them to a document's certificate.

RFC 5280 section 6.1, one certificate at a time from the root down: each step takes the state behind the certificates
before it and gives the state behind its own, and cryptography's ``x509.verification`` checks the certificate and its
issuer under a profile as strict as AWS's real chains allow. A path can thus begin at any state that was reached before
(``ChainCache``) and cannot end elsewhere than one that began at the root; and a bundle is its path, in its order, or is
refused. Revocation is not checked, as AWS's attestation process says: leaves live for three hours.
"""

from __future__ import annotations

import hashlib
import threading
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from enum import StrEnum
from typing import Generic, NamedTuple, TypeVar

from cryptography import x509
from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtensionOID, SignatureAlgorithmOID
from cryptography.x509.verification import (
    Criticality,
    ExtensionPolicy,
    PolicyBuilder,
    Store,
    VerificationError,
)

from attestation.errors import EvidenceError, PolicyError

AWS_NITRO_G1_SHA256 = "641a0321a3e244efe456463195d606317ed7cdcc3c1756e09893f3c68f79bb5b"
"""The fingerprint that AWS publishes for its root certificate, over the DER."""


MAX_INTERMEDIATES = 8
"""CAs between root and leaf, under a root that allows as many. AWS's chains have three."""


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
    """Under which name a policy asks for it, and reports show it."""
    der: bytes
    """The certificate, DER."""
    fingerprint: str = field(init=False, repr=False, compare=False)
    """SHA-256 of the DER, in hexadecimal."""
    _state: _Issuer = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "fingerprint", hashlib.sha256(self.der).hexdigest())
        if (self.trust is Trust.AWS_NITRO_G1) != (self.fingerprint == AWS_NITRO_G1_SHA256):
            raise PolicyError(
                "bad_anchor",
                f"an anchor that is not what {self.trust.value} names",
                expected=f"{'' if self.trust is Trust.AWS_NITRO_G1 else 'another than '}sha256 {AWS_NITRO_G1_SHA256}",
                got=f"sha256 {self.fingerprint}",
            )
        try:
            certificate, _ = _load(self.der)
            constraints, usage = _what_it_may(certificate)
            certificate.verify_directly_issued_by(certificate)
            period = _Period(certificate.not_valid_before_utc, certificate.not_valid_after_utc)
        except x509.ExtensionNotFound as error:
            raise PolicyError(
                "bad_anchor", "the certificate cannot be a root: it lacks basicConstraints or keyUsage"
            ) from error
        except (*_REFUSALS, InvalidSignature) as error:
            raise PolicyError("bad_anchor", f"the certificate cannot be a root: {_reason(error)}") from error
        if not (constraints.ca and usage.key_cert_sign):
            raise PolicyError("bad_anchor", "the certificate cannot be a root: it may not sign certificates")
        length = _path_length(constraints, MAX_INTERMEDIATES)
        object.__setattr__(self, "_state", _Issuer((self.der,), Store([certificate]), length, period))

    @property
    def is_emulated(self) -> bool:
        return self.trust is Trust.EMULATED

    @classmethod
    def emulated(cls, der: bytes) -> Anchor:
        """An emulator's root, from its DER certificate."""
        return cls(Trust.EMULATED, der)


def validate(
    certificate: bytes,
    cabundle: Sequence[bytes],
    *,
    anchor: Anchor,
    at: datetime,
    cache: ChainCache | None = None,
) -> ec.EllipticCurvePublicKey:
    """The public key of ``certificate``, proven by the whole ``cabundle`` (root first) up to ``anchor``, at ``at``.

    ``at`` is the verification time, with a time zone. The key is returned here and nowhere else, so that no signature
    can be checked with a key that has no chain. A ``cache`` changes how long this takes, and never what it says.
    Raises EvidenceError ``untrusted_chain``; ValueError for an ``at`` without a time zone.
    """
    if at.tzinfo is None:
        raise ValueError("at: a time without a time zone could be any of twenty-four")
    # The bundle's own root is never trusted, only compared with ours.
    if cabundle[0] != anchor.der:
        raise EvidenceError(
            "untrusted_chain",
            f"the chain leads to another root than the anchor {anchor.trust.value}, which is the one that was named",
            expected=f"root sha256 {anchor.fingerprint}",
            got=f"root sha256 {hashlib.sha256(cabundle[0]).hexdigest()}",
        )
    if len(cabundle) > 1 + MAX_INTERMEDIATES:
        raise EvidenceError(
            "untrusted_chain",
            "the bundle is longer than any path may be",
            expected=f"at most {1 + MAX_INTERMEDIATES} certificates",
            got=len(cabundle),
        )
    path = tuple(cabundle)
    known = None if cache is None else cache._leaf(path, certificate, at)
    if known is not None:
        return known.key
    issuer = anchor._state if cache is None else cache._longest(path, at) or anchor._state
    proven = []
    try:
        for der in path[len(issuer.path) :]:
            issuer = issuer.followed_by(der, at)
            proven.append(issuer)
        leaf = issuer.ended_by(certificate, at)
    except _REFUSALS as error:
        place = len(issuer.path)
        link = f"cabundle[{place - 1}] to {'the leaf' if place == len(path) else f'cabundle[{place}]'}"
        raise EvidenceError(
            "untrusted_chain",
            f"the chain to the anchor {anchor.trust.value} does not hold: {_reason(error)}",
            expected=f"a valid path at {at.isoformat()}",
            got=f"from {link}: {_reason(error)}",
        ) from error
    if cache is not None:
        cache._remember(proven, leaf)
    return leaf.key


class _Period(NamedTuple):
    """When every certificate of a path is valid at once. Both ends belong to it, to the second (RFC 5280 4.1.2.5)."""

    not_before: datetime
    not_after: datetime

    def within(self, certificate: x509.Certificate) -> _Period:
        """What is left of it with one more certificate."""
        not_before, not_after = certificate.not_valid_before_utc, certificate.not_valid_after_utc
        return _Period(max(self.not_before, not_before), min(self.not_after, not_after))

    def covers(self, at: datetime) -> bool:
        return self.not_before <= at.replace(microsecond=0) <= self.not_after


_ALWAYS = _Period(datetime.min.replace(tzinfo=UTC), datetime.max.replace(tzinfo=UTC))


class _Leaf(NamedTuple):
    """What stands at the end of a path (RFC 5280 section 6.1.5)."""

    path: tuple[bytes, ...]
    certificate: bytes
    key: ec.EllipticCurvePublicKey
    period: _Period


class _Issuer(NamedTuple):
    """The state of path validation behind the certificates of ``path``, all of them CAs (RFC 5280 section 6.1.2).

    It is all that the profile lets one certificate ask of those behind it: names, policies and whatever else would have
    to be carried along are refused in a CA.
    """

    path: tuple[bytes, ...]
    """DER, root first."""
    store: Store
    """The last of them alone, which signs the next; a store loads its key once."""
    max_path_length: int
    """How many CAs may still follow, self-issued ones counted too."""
    period: _Period

    def followed_by(self, der: bytes, at: datetime) -> _Issuer:
        """6.1.3 and 6.1.4: the state behind one more CA. Raises one of ``_REFUSALS``."""
        if self.max_path_length == 0:
            raise _Refused("path length constraint violated")
        certificate, _ = _load(der)
        self._verify(certificate, _CA_STEP, at)
        constraints, usage = _what_it_may(certificate)
        if not usage.key_cert_sign:
            raise _Refused("a CA may not sign certificates")
        length = _path_length(constraints, self.max_path_length - 1)
        return _Issuer((*self.path, der), Store([certificate]), length, self.period.within(certificate))

    def ended_by(self, der: bytes, at: datetime) -> _Leaf:
        """6.1.3 and 6.1.5: the leaf. Raises one of ``_REFUSALS``."""
        certificate, key = _load(der)
        self._verify(certificate, _LEAF_STEP, at)
        constraints, usage = _what_it_may(certificate)
        if constraints.ca:
            raise _Refused("the leaf is a CA")
        if not usage.digital_signature or usage.key_cert_sign:
            raise _Refused("the leaf may not sign documents, or may sign certificates")
        return _Leaf(self.path, der, key, self.period.within(certificate))

    def _verify(self, certificate: x509.Certificate, step: PolicyBuilder, at: datetime) -> None:
        """``certificate`` fits its profile, the issuer that of a CA; both are valid; one has signed the other."""
        verifier = step.store(self.store).time(at).build_client_verifier()
        try:
            chain = verifier.verify(certificate, []).chain
        except VerificationError as error:
            period = _ALWAYS.within(certificate)
            if period.covers(at):
                raise
            not_before, not_after = (each.isoformat() for each in period)
            raise _Refused(f"a certificate is valid from {not_before} to {not_after} only") from error
        # A certificate that is itself in the store would be a path of one, on which nothing was signed by anything.
        if len(chain) != 2:
            raise _Refused("a certificate stands behind itself")


K = TypeVar("K")
S = TypeVar("S", _Issuer, _Leaf)


class ChainCache:
    """Paths that were found valid, so that ``validate`` verifies no certificate twice while it and all before it last.

    A path is known by its certificates, byte for byte from the root down, and under no other: where the root is not
    that of the anchor, nothing is looked up. Failures are not remembered. At most ``capacity`` paths to CAs and as many
    leaves are kept, a few kilobytes each; those that were not used for longest go first. Safe in several threads.
    """

    def __init__(self, capacity: int = 512) -> None:
        """ValueError for a ``capacity`` below 1."""
        if capacity < 1:
            raise ValueError(f"capacity: expected at least 1, got {capacity}")
        self._issuers: _Recent[tuple[bytes, ...], _Issuer] = _Recent(capacity)
        self._leaves: _Recent[tuple[tuple[bytes, ...], bytes], _Leaf] = _Recent(capacity)

    def _leaf(self, path: tuple[bytes, ...], certificate: bytes, at: datetime) -> _Leaf | None:
        """What is known of ``certificate`` behind ``path``, if all of it is valid at ``at``."""
        return self._leaves.get((path, certificate), at)

    def _longest(self, path: tuple[bytes, ...], at: datetime) -> _Issuer | None:
        """The state behind as much of the beginning of ``path`` as is known and valid at ``at``."""
        for length in range(len(path), 1, -1):
            issuer = self._issuers.get(path[:length], at)
            if issuer is not None:
                return issuer
        return None

    def _remember(self, issuers: Iterable[_Issuer], leaf: _Leaf) -> None:
        """A whole path: the new states behind its CAs, and its leaf."""
        for issuer in issuers:
            self._issuers.put(issuer.path, issuer)
        self._leaves.put((leaf.path, leaf.certificate), leaf)


class _Recent(Generic[K, S]):
    """States by key, as many as fit; the least recently used goes first."""

    def __init__(self, capacity: int) -> None:
        self._capacity = capacity
        self._states: OrderedDict[K, S] = OrderedDict()
        self._lock = threading.Lock()

    def get(self, key: K, at: datetime) -> S | None:
        with self._lock:
            state = self._states.get(key)
            if state is None or not state.period.covers(at):
                return None
            self._states.move_to_end(key)
            return state

    def put(self, key: K, state: S) -> None:
        with self._lock:
            self._states[key] = state
            self._states.move_to_end(key)
            if len(self._states) > self._capacity:
                self._states.popitem(last=False)


class _Refused(Exception):
    """A certificate that the library would take, outside our profile."""


_REFUSALS = (
    _Refused,
    VerificationError,
    # What extensions can make the library raise where they are read; Warning where warnings are set to be errors.
    ValueError,
    x509.DuplicateExtension,
    x509.UnsupportedGeneralNameType,
    Warning,
)


def _load(der: bytes) -> tuple[x509.Certificate, ec.EllipticCurvePublicKey]:
    """A certificate and its key: on P-384, and signed with ecdsa-with-SHA384, as every one of AWS's is."""
    try:
        certificate = x509.load_der_x509_certificate(der)
        key = certificate.public_key()
        algorithm, serial = certificate.signature_algorithm_oid, certificate.serial_number
    except (ValueError, UnsupportedAlgorithm, x509.InvalidVersion, Warning) as error:
        # Warning: what the library only warns of (a serial number below 1), where warnings are set to be errors.
        raise _Refused("not an X.509 certificate that can be read") from error
    if not isinstance(key, ec.EllipticCurvePublicKey) or not isinstance(key.curve, ec.SECP384R1):
        raise _Refused("a certificate's key is not on P-384")
    if algorithm != SignatureAlgorithmOID.ECDSA_WITH_SHA384:
        raise _Refused("a certificate is not signed with ecdsa-with-SHA384")
    if serial < 1:  # RFC 5280 section 4.1.2.2; of 0 the library only warns
        raise _Refused("a certificate's serial number is not positive")
    return certificate, key


def _what_it_may(certificate: x509.Certificate) -> tuple[x509.BasicConstraints, x509.KeyUsage]:
    """What a certificate says of itself, once every extension was read and none asks for what an ``_Issuer`` does not
    carry. Raises x509.ExtensionNotFound, and one of ``_REFUSALS``.
    """
    try:
        extensions = certificate.extensions
    except TypeError as error:  # what malformed name constraints come to; elsewhere it would be a bug of ours
        raise _Refused("a certificate's extensions cannot be read") from error
    for extension in extensions:
        if extension.oid in _NOT_CARRIED:
            raise _Refused(f"a certificate {_NOT_CARRIED[extension.oid]}")
    constraints = extensions.get_extension_for_class(x509.BasicConstraints).value
    return constraints, extensions.get_extension_for_class(x509.KeyUsage).value


_NOT_CARRIED = {
    ExtensionOID.NAME_CONSTRAINTS: "constrains names",
    ExtensionOID.POLICY_CONSTRAINTS: "constrains policies",
    ExtensionOID.POLICY_MAPPINGS: "maps policies",
    ExtensionOID.INHIBIT_ANY_POLICY: "constrains policies",
    ExtensionOID.EXTENDED_KEY_USAGE: "is for other uses than a Nitro Secure Module's",
}


def _path_length(constraints: x509.BasicConstraints, limit: int) -> int:
    """How many CAs may follow: as many as this one says, and no more than ``limit`` (RFC 5280 section 6.1.4 (m))."""
    return limit if constraints.path_length is None else min(constraints.path_length, limit)


def _reason(error: Exception) -> str:
    """What the library says, without its preamble and its dump of the certificate, which may be hostile."""
    said = str(error).partition(" (encountered processing")[0]
    said = said.removeprefix("validation failed: ").removeprefix("candidates exhausted: ")
    if said == "all candidates exhausted with no interior errors":  # there was one candidate: the issuer by order
        said = "it does not name the certificate before it as its issuer"
    return ascii(said or type(error).__name__)[1:-1]


# The web PKI's rules, which a leaf of AWS's breaks in two points only: it has neither an authority key identifier nor a
# subject alternative name. Those two are relaxed; what AWS's certificates always have is required on top. Critical
# extensions that no rule names are refused by the library. What the two required ones say is judged in
# ``_what_it_may``'s callers.
_LEAF_PROFILE = (
    ExtensionPolicy.webpki_defaults_ee()
    .may_be_present(x509.AuthorityKeyIdentifier, Criticality.AGNOSTIC, None)
    .may_be_present(x509.SubjectAlternativeName, Criticality.AGNOSTIC, None)
    .require_present(x509.BasicConstraints, Criticality.CRITICAL, None)
    .require_present(x509.KeyUsage, Criticality.AGNOSTIC, None)
)
_CA_PROFILE = ExtensionPolicy.webpki_defaults_ca().require_present(x509.KeyUsage, Criticality.CRITICAL, None)

# One certificate, and the one before it in the store: no search.
_CA_STEP, _LEAF_STEP = (
    PolicyBuilder().max_chain_depth(0).extension_policies(ca_policy=_CA_PROFILE, ee_policy=profile)
    for profile in (_CA_PROFILE, _LEAF_PROFILE)
)
