"""The chain step against counterparts of x509-limbo's cases.

x509-limbo (C2SP) is a collection of certificate chains with the verdict that RFC 5280 asks for. Its cases are not here
themselves: no package of PyPI or npm brings them (looked for in November 2026). As they are they would say little, too:
nearly all are of P-256 and for names of web servers, and our profile refuses any key that is not on P-384 before it
looks at what a case is about, so that good ones would fail, and bad ones for that reason alone. These are our own of
the same shape: P-384, root first, for a client's verifier, each under the name of the case that it corresponds to.
``limbo`` is that case's verdict; where ours is another, ``because`` says why: ours is a profile of RFC 5280, for one
PKI.

A constraint that a case puts on its root is put on the first CA here wherever the root would be refused as an anchor
before any chain is looked at.

Families without a counterpart, and why:

- ``webpki::*``, ``bettertls::*``, ``online::*``: names of web servers and the CA/Browser Forum's profile of them. A
  document's leaf names no server; nothing compares a name with a peer's. So with ``rfc5280::ca-as-leaf-wrong-san``.
- ``crl::*``, ``rfc5280::crl::*``, ``webpki::crl::*``: revocation is not checked, as AWS's attestation process says.
- ``smime::*``: names and uses of mail.
- ``rfc9881::*``: ML-DSA keys. Any key that is not on P-384 is refused; the vectors ``04-p256-*`` and others show it.
- ``rfc5280::nc::*`` for single name forms beyond the cases below: a CA that constrains any name is refused, whatever
  the form, so that two cases of one form say as much as ten.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from datetime import datetime, timedelta
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network

import pytest
from cryptography import x509
from cryptography.x509.oid import AuthorityInformationAccessOID, ExtendedKeyUsageOID, ExtensionOID

from attestation.chain import Anchor, ChainCache, validate
from attestation.errors import EvidenceError, PolicyError
from tests.pki import forge

BUNDLE_IS_PATH = "a bundle is its path and nothing besides"
NAMES = "a CA that constrains names is refused, whatever it permits"
HINT = "a hint for whoever looks for a path; a bundle is one"
MILLISECOND = timedelta(milliseconds=1)

ROOT, REGION, ZONE, INSTANCE, LEAF = forge.ROOT, forge.REGION, forge.ZONE, forge.INSTANCE, forge.LEAF
GOOD = forge.GOOD_CHAIN
UNKNOWN = (x509.UnrecognizedExtension(x509.ObjectIdentifier("1.3.6.1.4.1.55738.666.1"), b""), True)


@dataclass(frozen=True)
class Case:
    id: str
    limbo: bool
    made: forge.Chain
    because: str = ""
    """Why our verdict is the opposite of limbo's. Empty: it is the same."""
    at: datetime = forge.NOW
    anchor: bytes | None = None
    """The bundle's first certificate, unless said otherwise."""


def ca(spec: forge.Spec, path_length: int | None) -> forge.Spec:
    return replace(spec, constraints=x509.BasicConstraints(ca=True, path_length=path_length))


def extended(spec: forge.Spec, extension: x509.ExtensionType, *, critical: bool = False) -> forge.Spec:
    return replace(spec, extensions=(*spec.extensions, (extension, critical)))


def named(*names: x509.GeneralName) -> forge.Spec:
    """A leaf with these alternative names."""
    return extended(LEAF, x509.SubjectAlternativeName(names))


def cases() -> Iterator[Case]:
    yield from profile()
    yield from identifiers()
    yield from uses()
    yield from serials()
    yield from validity()
    yield from path_lengths()
    yield from name_constraints()
    yield from pathological()


def profile() -> Iterator[Case]:
    nameless = x509.Name([])
    yield Case("rfc5280::ee-empty-issuer", False, forge.chain(leaf=replace(LEAF, issuer=nameless)))
    yield Case("rfc5280::ca-empty-subject", False, forge.chain(zone=replace(ZONE, subject=nameless)))
    for place in ("root", "intermediate", "ee"):
        role, spec = {"root": ("root", ROOT), "intermediate": ("zone", ZONE), "ee": ("leaf", LEAF)}[place]
        made = forge.chain(**{role: replace(spec, extensions=(UNKNOWN,))})
        yield Case(f"rfc5280::unknown-critical-extension-{place}", False, made)
    other = forge.chain(root=replace(ROOT, key="an unrelated root"))
    yield Case("rfc5280::chain-untrusted-root", False, GOOD, anchor=other.cabundle[0])
    no_ca = x509.BasicConstraints(ca=False, path_length=None)
    made = forge.chain(zone=replace(ZONE, constraints=no_ca))
    yield Case("rfc5280::intermediate-ca-without-ca-bit", False, made)
    made = forge.chain(zone=replace(ZONE, constraints=None))
    yield Case("rfc5280::intermediate-ca-missing-basic-constraints", False, made)
    made = forge.chain(root=replace(ROOT, constraints=None))
    yield Case("rfc5280::root-missing-basic-constraints", False, made)
    made = forge.chain(root=replace(ROOT, constraints_critical=False))
    yield Case("rfc5280::root-non-critical-basic-constraints", False, made)
    nothing: frozenset[str] = frozenset()
    made = forge.chain(root=replace(ROOT, usage=nothing, usage_critical=False))
    yield Case("rfc5280::root-inconsistent-ca-extensions", False, made)
    made = forge.chain(zone=replace(ZONE, usage=nothing, usage_critical=False))
    yield Case("rfc5280::ica-ku-keycertsign", False, made)
    both = frozenset({"digital_signature", "key_cert_sign"})
    yield Case("rfc5280::leaf-ku-keycertsign", False, forge.chain(leaf=replace(LEAF, usage=both)))
    description = x509.AccessDescription(AuthorityInformationAccessOID.CA_ISSUERS, x509.DNSName("example.com"))
    access = x509.AuthorityInformationAccess([description])
    yield Case("rfc5280::ee-aia", True, forge.chain(leaf=extended(LEAF, access)))
    made = forge.chain(leaf=extended(LEAF, access, critical=True))
    yield Case("rfc5280::ee-critical-aia-invalid", False, made)
    name = x509.SubjectAlternativeName([x509.DNSName("example.com")])
    yield Case("rfc5280::duplicate-extensions", False, forge.chain(leaf=extended(extended(LEAF, name), name)))
    strict = "AWS's leaves have it, and it is what makes them leaves"
    yield Case("rfc5280::no-keyusage", True, forge.chain(leaf=replace(LEAF, usage=None)), strict)
    yield Case("rfc5280::no-basicconstraints", True, forge.chain(leaf=replace(LEAF, constraints=None)), strict)
    sha384, sha256 = bytes.fromhex("06082a8648ce3d040303"), bytes.fromhex("06082a8648ce3d040302")
    inner, _, outer = GOOD.certificate.rpartition(sha384)
    made = replace(GOOD, certificate=inner + sha256 + outer)
    yield Case("rfc5280::mismatching-signature-algorithm", False, made)
    as_leaf = replace(GOOD, cabundle=GOOD.cabundle[:-1], certificate=GOOD.cabundle[-1])
    yield Case("rfc5280::ca-as-leaf", True, as_leaf, "a CA signs no documents")
    from_zone = replace(GOOD, cabundle=(GOOD.cabundle[2], *GOOD.cabundle[1:]))
    because = "an anchor is a root, and the bundle begins with it"
    yield Case("rfc5280::root-and-intermediate-swapped", True, from_zone, because, anchor=GOOD.cabundle[2])
    broken = x509.UnrecognizedExtension(ExtensionOID.SUBJECT_ALTERNATIVE_NAME, b"example.com")
    yield Case("rfc5280::san::malformed", False, forge.chain(leaf=extended(LEAF, broken)))
    made = forge.chain(leaf=replace(named(x509.DNSName("example.com")), subject=nameless))
    yield Case("rfc5280::san::noncritical-with-empty-subject", False, made, "nothing looks at the leaf's names")
    policies = x509.PolicyConstraints(require_explicit_policy=3, inhibit_policy_mapping=None)
    yield Case("rfc5280::pc::ica-noncritical-pc", False, forge.chain(zone=extended(ZONE, policies)))


def identifiers() -> Iterator[Case]:
    own = forge.private_key(ROOT.key).public_key()
    authority, subject = (
        x509.AuthorityKeyIdentifier.from_issuer_public_key(own),
        x509.SubjectKeyIdentifier.from_public_key(own),
    )
    yield Case("rfc5280::aki::critical-aki", False, forge.chain(root=extended(ROOT, authority, critical=True)))
    yield Case("rfc5280::aki::leaf-missing-aki", False, GOOD, "AWS's leaves have none")
    yield Case("rfc5280::aki::intermediate-missing-aki", False, GOOD, HINT)
    yield Case("rfc5280::aki::self-signed-root-missing-aki", True, GOOD)
    crossed = forge.issue(ca(REGION, 0), ROOT)
    made = replace(forge.chain_of(ca(REGION, 0), LEAF), cabundle=(crossed,))
    yield Case("rfc5280::aki::cross-signed-root-missing-aki", False, made)
    critical = extended(replace(ROOT, key_identifier=False), subject, critical=True)
    yield Case("rfc5280::ski::critical-ski", False, forge.chain(root=critical))
    yield Case("rfc5280::ski::root-missing-ski", False, forge.chain(root=replace(ROOT, key_identifier=False)), HINT)
    made = forge.chain(zone=replace(ZONE, key_identifier=False))
    yield Case("rfc5280::ski::intermediate-missing-ski", False, made, HINT)


def uses() -> Iterator[Case]:
    server = x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH])
    yield Case("rfc5280::eku::ee-wrong-eku", False, forge.chain(leaf=extended(LEAF, server)))
    yield Case("rfc5280::eku::ee-without-eku", True, GOOD)


def serials() -> Iterator[Case]:
    made = forge.chain(leaf=replace(LEAF, serial=2**175 - 1))
    yield Case("rfc5280::serial::serial-number-too-long", False, made)
    number = x509.load_der_x509_certificate(GOOD.certificate).serial_number
    old = forge.tlv(0x02, number.to_bytes(9, "big"))
    for name, value in (("zero", b"\x00"), ("negative", b"\xff")):

        def edited(signed: bytes, new: bytes = forge.tlv(0x02, value)) -> bytes:
            assert old in signed
            return signed.replace(old, new, 1)

        leaf = forge.resigned(GOOD.certificate, edited, forge.private_key("instance"))
        yield Case(f"rfc5280::serial::serial-number-{name}", False, replace(GOOD, certificate=leaf))


def validity() -> Iterator[Case]:
    past = forge.NOW - timedelta(seconds=1)
    for place, role, spec in (("root", "root", ROOT), ("intermediate", "zone", ZONE), ("leaf", "leaf", LEAF)):
        made = forge.chain(**{role: replace(spec, not_after=past)})
        yield Case(f"rfc5280::validity::expired-{place}", False, made)
    begins, ends = forge.NOW, forge.NOW + timedelta(days=31)
    together = (replace(spec, not_before=begins, not_after=ends) for spec in (ROOT, REGION, ZONE, INSTANCE, LEAF))
    made = forge.chain_of(*together)
    yield Case("rfc5280::validity::notbefore-exact", True, made, at=begins)
    yield Case("rfc5280::validity::notbefore-fractional", False, made, at=begins - MILLISECOND)
    yield Case("rfc5280::validity::notafter-exact", True, made, at=ends)
    yield Case("rfc5280::validity::notafter-fractional", True, made, at=ends + 5 * MILLISECOND)


def path_lengths() -> Iterator[Case]:
    first, second, third = (replace(INSTANCE, name=f"ca {number}", key=f"ca {number}") for number in (1, 2, 3))
    for length in (0, 1, 2):
        made = forge.chain_of(ROOT, ca(first, length), LEAF)
        yield Case(f"pathlen::ee-with-intermediate-pathlen-{length}", True, made)
    made = forge.chain_of(ROOT, ca(first, 0), ca(second, 0))
    yield Case("pathlen::validation-ignores-pathlen-in-leaf", True, made, "a CA signs no documents")
    made = forge.chain_of(ROOT, ca(first, 0), ca(second, 0), LEAF)
    yield Case("pathlen::intermediate-violates-pathlen-0", False, made)
    made = forge.chain_of(ROOT, ca(first, 1), ca(second, 2), LEAF)
    yield Case("pathlen::intermediate-pathlen-may-increase", True, made)
    made = forge.chain_of(ROOT, ca(first, 1), ca(second, 0), ca(third, 0), LEAF)
    yield Case("pathlen::intermediate-pathlen-too-long", False, made)
    again = replace(ca(first, 1), key="ca 1, renewed")
    made = forge.chain_of(ROOT, ca(first, 1), again, ca(second, 0), LEAF)
    yield Case("pathlen::self-issued-certs-pathlen", True, made, "self-issued CAs count too: AWS has none")


def name_constraints() -> Iterator[Case]:
    dns, address, mail = x509.DNSName, x509.IPAddress, x509.RFC822Name
    example, foo = dns("example.com"), x509.DirectoryName(x509.Name.from_rfc4514_string("CN=foo"))
    not_foo = x509.DirectoryName(x509.Name.from_rfc4514_string("CN=not-foo"))
    net, home = address(IPv4Network("192.0.2.0/24")), address(IPv6Network("::1/128"))
    Names = list[x509.GeneralName]
    table: list[tuple[str, bool, Names | None, Names | None, Names]] = [
        ("permitted-dns-mismatch", False, [example], None, [dns("not-example.com")]),
        ("excluded-dns-match", False, None, [example], [example]),
        ("permitted-dns-match", True, [example], None, [example]),
        ("permitted-dns-match-more", True, [example], None, [dns("foo.bar.example.com")]),
        ("excluded-dns-match-second", False, None, [dns("no.example.com")], [example, dns("no.example.com")]),
        ("permitted-ip-mismatch", False, [net], None, [address(IPv4Address("192.0.3.1"))]),
        ("excluded-ipv4-match", False, None, [net], [address(IPv4Address("192.0.2.1"))]),
        ("excluded-ipv6-match", False, None, [home], [address(IPv6Address("::1"))]),
        ("permitted-ipv4-match", True, [net], None, [address(IPv4Address("192.0.2.1"))]),
        ("permitted-ipv6-match", True, [home], None, [address(IPv6Address("::1"))]),
        ("permitted-dn-mismatch", False, [foo], None, [not_foo]),
        ("excluded-dn-match", False, None, [foo], [foo]),
        ("permitted-dn-match", True, [foo], None, [foo]),
        ("permitted-dn-match-subject-san-mismatch", False, [foo], None, [foo]),
        ("excluded-dn-match-sub-mismatch", False, None, [foo], [not_foo]),
        ("excluded-match-permitted-and-excluded", False, [example], [example], [example]),
        ("permitted-different-constraint-type", True, [net], None, [example]),
        ("excluded-different-constraint-type", True, None, [net], [example]),
        ("nc-permits-invalid-dns-san", False, [example], None, [dns(".example.com")]),
        ("nc-permits-invalid-ip-san", False, [net], None, [net]),
        ("nc-permits-email-exact", True, [mail("foo@example.com")], None, [mail("foo@example.com")]),
        ("nc-permits-email-domain", True, [mail("example.com")], None, [mail("foo@example.com")]),
    ]
    for name, limbo, permitted, excluded, names in table:
        region = extended(REGION, x509.NameConstraints(permitted, excluded), critical=True)
        made = forge.chain(region=region, leaf=named(*names))
        yield Case(f"rfc5280::nc::{name}", limbo, made, NAMES if limbo else "")
    permit = x509.NameConstraints([example], None)
    made = forge.chain(region=extended(REGION, permit), leaf=named(example))
    yield Case("rfc5280::nc::permitted-dns-match-noncritical", False, made)
    for how, critical in (("critical", True), ("noncritical", False)):
        made = forge.chain(leaf=extended(LEAF, permit, critical=critical))
        yield Case(f"rfc5280::nc::not-allowed-in-ee-{how}", False, made)
    # Malformed constraints, which no class of the library's would hold: subtrees of a dNSName, an iPAddress and a mail.
    for name, subtree in (
        ("invalid-dnsname-wildcard", forge.tlv(0x82, b"*.example.com")),
        ("invalid-dnsname-leading-period", forge.tlv(0x82, b".example.com")),
        ("invalid-ipv4-address", forge.tlv(0x87, bytes([127, 0, 0, 1]))),
        ("invalid-ipv6-address", forge.tlv(0x87, bytes(15) + b"\x01")),
        ("invalid-email-address", forge.tlv(0x81, b"invalid@invalid@example.com")),
    ):
        der = forge.tlv(0x30, forge.tlv(0xA0, forge.tlv(0x30, subtree)))
        broken = x509.UnrecognizedExtension(ExtensionOID.NAME_CONSTRAINTS, der)
        made = forge.chain(region=extended(REGION, broken, critical=True), leaf=named(dns("foo.example.com")))
        yield Case(f"rfc5280::nc::{name}", False, made)
    rolled = replace(ca(ROOT, None), key="root, renewed")
    made = forge.chain_of(extended(ROOT, permit, critical=True), rolled, INSTANCE, named(example))
    yield Case("rfc5280::nc::permitted-self-issued", True, made, NAMES)
    region = extended(REGION, permit, critical=True)
    made = forge.chain(region=region, leaf=replace(named(dns("not-example.com")), name=INSTANCE.name))
    yield Case("rfc5280::nc::excluded-self-issued-leaf", False, made)
    allowed, forbidden, bar = dns("permitted.example.com"), dns("forbidden.example.com"), dns("bar.example.com")
    both = x509.NameConstraints([allowed], [forbidden])
    forbidden_ca = extended(INSTANCE, x509.SubjectAlternativeName([forbidden]))
    made = forge.chain(region=extended(REGION, both, critical=True), instance=forbidden_ca, leaf=named(allowed))
    yield Case("rfc5280::nc::intermediate-with-san-rejected-by-intermediate-nc", False, made)
    made = forge.chain(root=extended(ROOT, both, critical=True), instance=forbidden_ca, leaf=named(allowed))
    yield Case("rfc5280::nc::intermediate-with-san-rejected-by-root-nc", False, made)
    wide, narrow = x509.NameConstraints([allowed, bar], None), x509.NameConstraints([bar], None)
    for how, outer, inner in (("narrows", wide, narrow), ("widens", narrow, wide)):
        region, zone = extended(REGION, outer, critical=True), extended(ZONE, inner, critical=True)
        made = forge.chain(region=region, zone=zone, leaf=named(allowed))
        yield Case(f"rfc5280::nc::restrictive-permits-in-intermediates-{how}", False, made)
    other = forge.issue(replace(ZONE, key="zone"), replace(ROOT, key="a discarded root"))
    made = forge.chain(region=extended(REGION, both, critical=True), leaf=named(allowed))
    made = replace(made, cabundle=(*made.cabundle, other))
    yield Case("rfc5280::nc::nc-forbids-alternate-chain-ica", True, made, BUNDLE_IS_PATH)
    yield Case("rfc5280::nc::nc-forbids-same-chain-ica", True, made, BUNDLE_IS_PATH)
    foo_alone = x509.NameConstraints([dns("foo.example.com")], None)
    for name, constraint in (("", x509.NameConstraints([example], [bar])), ("-nc-permits-variant", foo_alone)):
        made = forge.chain(region=extended(REGION, constraint, critical=True), leaf=named(dns("*.example.com")))
        yield Case(f"cve::cve-2025-61727{name}", False, made)


def pathological() -> Iterator[Case]:
    aged = replace(ca(ROOT, 1), not_after=forge.NOW - timedelta(days=1))
    crossed = forge.issue(aged, replace(ROOT, name="root 2", key="root 2"))
    made = replace(GOOD, cabundle=(*GOOD.cabundle, crossed))
    yield Case("pathological::multiple-chains-expired-intermediate", True, made, BUNDLE_IS_PATH)
    one, two = (ca(replace(INSTANCE, name=f"cycle {number}", key=f"cycle {number}"), None) for number in (1, 2))
    cycle = (forge.issue(one, two), forge.issue(two, one))
    leaf = forge.issue(LEAF, one)
    for name, bundle in (
        ("", cycle),
        ("-max-depth", cycle * 4),
    ):
        made = forge.Chain((forge.ROOT_DER, *bundle), leaf, GOOD.key)
        yield Case(f"pathological::intermediate-cycle-distinct-cas{name}", False, made)
    same = replace(two, name=one.name)
    made = forge.Chain((forge.ROOT_DER, forge.issue(one, same), forge.issue(same, one)), leaf, GOOD.key)
    yield Case("pathological::intermediate-cycle-same-logical-ca", False, made)
    # A point that is not on the curve, in place of limbo's RSA key that is no key.
    off_curve = forge.resigned(GOOD.cabundle[-1], _with_broken_point, forge.private_key("zone"))
    made = replace(GOOD, cabundle=(*GOOD.cabundle[:-1], off_curve))
    yield Case("invalid::invalid-issuer-key", False, made)
    a, b = ca(replace(ZONE, name="a", key="a"), None), ca(replace(ZONE, name="b", key="b"), None)
    graph = (forge.issue(a, ROOT), forge.issue(a, b), forge.issue(b, a), forge.issue(INSTANCE, a))
    made = forge.Chain((forge.ROOT_DER, *graph), GOOD.certificate, GOOD.key)
    yield Case("cve::cve-2024-0567", True, made, BUNDLE_IS_PATH)


def _with_broken_point(signed: bytes) -> bytes:
    start = signed.index(bytes.fromhex("03620004")) + 4  # a BIT STRING of an uncompressed P-384 point
    return signed[:start] + bytes(96) + signed[start + 96 :]


CASES = list(cases())


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
@pytest.mark.filterwarnings("ignore:Parsed a serial number")
def test_a_counterpart_of_limbo_s(case: Case) -> None:
    """Twice, so that a cache that has seen the certificates says the same."""
    ours = case.limbo == (case.because == "")
    cache = ChainCache()
    for _ in range(2):
        if ours:
            _validate(case, cache)
        else:
            with pytest.raises((EvidenceError, PolicyError)) as caught:
                _validate(case, cache)
            assert caught.value.code in ("untrusted_chain", "bad_anchor")
            assert str(caught.value).isprintable()


def _validate(case: Case, cache: ChainCache) -> None:
    anchor = Anchor.emulated(case.made.cabundle[0] if case.anchor is None else case.anchor)
    validate(case.made.certificate, case.made.cabundle, anchor=anchor, at=case.at, cache=cache)


def test_every_counterpart_is_of_another_case() -> None:
    names = [case.id for case in CASES]
    assert len(names) == len(set(names)) > 90
