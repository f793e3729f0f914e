"""Test vectors of bare documents: the chain, step 4 of PROTOCOL.md section 3."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from datetime import datetime, timedelta

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, ExtensionOID

from conformance.vectors import ACCEPTED
from scripts.vectors_documents import Case
from tests.pki import forge

_SECOND = timedelta(seconds=1)
_HOUR = timedelta(hours=1)
_UNKNOWN = (x509.UnrecognizedExtension(x509.ObjectIdentifier("1.3.6.1.4.1.99999.1"), b"\x05\x00"), True)

_CAS: Mapping[str, forge.Spec] = {"region": forge.REGION, "zone": forge.ZONE, "instance": forge.INSTANCE}
_LEVELS: Mapping[str, forge.Spec] = {**_CAS, "leaf": forge.LEAF}

_ROOTS: Mapping[str, forge.Spec] = {
    "expired-root.der": replace(forge.ROOT, not_after=forge.NOW - _SECOND),
    "early-root.der": replace(forge.ROOT, not_before=forge.NOW + _SECOND),
    "critical-root.der": replace(forge.ROOT, extensions=(_UNKNOWN,)),
    "short-root.der": replace(forge.ROOT, constraints=x509.BasicConstraints(ca=True, path_length=2)),
    "long-root.der": replace(forge.ROOT, constraints=x509.BasicConstraints(ca=True, path_length=3)),
}
"""Anchors of their own: a document leads to each, with the one thing unusual about it."""


def anchors() -> Mapping[str, bytes]:
    return {"root.der": forge.ROOT_DER} | {name: forge.issue(spec, spec) for name, spec in _ROOTS.items()}


def cases() -> Iterator[Case]:
    yield from _bundles()
    yield from _roots()
    yield from _levels()
    yield from _constraints()
    yield from _extensions()
    yield from _path_lengths()
    yield from _times()


def _document(made: forge.Chain) -> bytes:
    return forge.document(forge.payload_fields(chain=made), key=made.key)


def _case(name: str, about: str, made: forge.Chain, expect: str = "untrusted_chain") -> Case:
    return Case(f"04-{name}", expect, about, _document(made))


def _bundles() -> Iterator[Case]:
    """Good certificates, and the wrong ones of them."""
    good = forge.GOOD_CHAIN
    root, region, zone, instance = good.cabundle

    def bundle(name: str, about: str, *cabundle: bytes) -> Case:
        return _case(name, about, replace(good, cabundle=cabundle))

    forged = forge.chain(root=replace(forge.ROOT, key="a forger's root"))
    forged_root, forged_region, *_ = forged.cabundle
    yield _case("forged-root", "a chain of the same names under another root", forged)
    behind = replace(forged, cabundle=(root, *forged.cabundle[1:]))
    yield _case("forged-behind-root", "that chain, behind a copy of the true root", behind)
    yield bundle("forged-first", "the true chain, behind another root", forged_root, region, zone, instance)
    yield bundle("forged-before", "another root before the true one", forged_root, *good.cabundle)
    again = forge.issue(replace(forge.ROOT, serial=7), forge.ROOT)
    about = "a certificate of the root's name and key that is not the anchor"
    yield bundle("other-root", about, again, region, zone, instance)
    yield bundle("no-root", "the bundle begins with the region", region, zone, instance)
    yield bundle("order", "two intermediates swapped", root, zone, region, instance)
    yield bundle("reversed", "the root last", *reversed(good.cabundle))
    yield bundle("missing-region", "the region is missing", root, zone, instance)
    yield bundle("missing-zone", "the zone is missing", root, region, instance)
    yield bundle("missing-instance", "the instance is missing", root, region, zone)
    yield bundle("root-only", "every intermediate is missing", root)
    yield bundle("foreign", "a foreign certificate at the end of the bundle", *good.cabundle, forged_region)
    yield bundle("foreign-second", "a foreign certificate behind the root", root, forged_region, region, zone, instance)
    yield bundle("root-twice", "the root twice", root, root, region, zone, instance)
    yield bundle("twice", "the instance twice", *good.cabundle, instance)
    yield bundle("leaf-in-bundle", "the leaf at the end of the bundle", *good.cabundle, good.certificate)
    as_leaf = replace(good, cabundle=good.cabundle[:-1], certificate=instance, key=forge.private_key("instance"))
    yield _case("leaf-is-ca", "the instance's certificate as the leaf", as_leaf)
    as_root = replace(good, cabundle=(root,), certificate=root, key=forge.private_key("root"))
    yield _case("leaf-is-root", "the root as the leaf", as_root)
    yield _case("not-x509", "a leaf that is no certificate", replace(good, certificate=b"\x30\x00"))
    yield bundle("not-x509-zone", "an intermediate that is no certificate", root, region, b"\x30\x00", instance)
    yield _case("trailing", "a byte behind the leaf", replace(good, certificate=good.certificate + b"\x00"))
    yield bundle("trailing-zone", "a byte behind an intermediate", root, region, zone + b"\x00", instance)
    other = forge.chain(leaf=replace(forge.LEAF, key="another leaf"))
    swapped = replace(good, certificate=other.certificate)
    about = "another leaf of the same instance: the chain holds, and the signature is not this leaf's"
    yield Case("05-other-leaf", "bad_signature", about, _document(swapped))


def _roots() -> Iterator[Case]:
    """Anchors that a policy may name, and that hold a chain or do not."""
    for name, expect, about in (
        ("expired-root", "untrusted_chain", "the anchor expired a second ago"),
        ("early-root", "untrusted_chain", "the anchor is valid in a second"),
        ("critical-root", "untrusted_chain", "an unknown critical extension on the anchor"),
        ("short-root", "untrusted_chain", "the anchor allows two certificates between it and the leaf"),
        ("long-root", ACCEPTED, "the anchor allows three certificates between it and the leaf"),
    ):
        made = forge.chain(root=_ROOTS[f"{name}.der"])
        yield Case(f"04-{name}", expect, about, _document(made), anchor=f"{name}.der")


def _levels() -> Iterator[Case]:
    """What is wrong with one certificate, for each of the four below the root."""
    curves = {"p256": ec.SECP256R1(), "p521": ec.SECP521R1(), "brainpool": ec.BrainpoolP384R1()}
    faults: dict[str, tuple[str, Callable[[forge.Spec], forge.Spec]]] = {
        "expired": ("has expired", lambda spec: replace(spec, not_after=forge.NOW - _SECOND)),
        "early": ("is not valid yet", lambda spec: replace(spec, not_before=forge.NOW + _SECOND)),
        "critical": ("has an unknown critical extension", lambda spec: replace(spec, extensions=(_UNKNOWN,))),
        "sha256": ("is signed with ecdsa-with-SHA256", lambda spec: replace(spec, hash=hashes.SHA256())),
        "sha512": ("is signed with ecdsa-with-SHA512", lambda spec: replace(spec, hash=hashes.SHA512())),
        "issuer-name": ("names another issuer", lambda spec: replace(spec, issuer=forge.name("somebody"))),
        "no-usage": ("has no key usage", lambda spec: replace(spec, usage=None)),
        "no-constraints": ("has no basic constraints", lambda spec: replace(spec, constraints=None)),
        "constraints-not-critical": (
            "has basic constraints that are not critical",
            lambda spec: replace(spec, constraints_critical=False),
        ),
    }
    for level, spec in _LEVELS.items():
        for fault, (about, broken) in faults.items():
            yield _case(f"{fault}-{level}", f"the {level} {about}", _with(level, broken(spec)))
        for curve_name, curve in curves.items():
            made = _with(level, replace(spec, curve=curve))
            # A signature of another size would end at step 2.
            signature = bytes(96) if made.key.curve.key_size != 384 else None
            document = forge.document(forge.payload_fields(chain=made), key=made.key, signature=signature)
            about = f"the {level}'s key is on {curve.name}"
            yield Case(f"04-{curve_name}-{level}", "untrusted_chain", about, document)
    good = forge.GOOD_CHAIN
    for index, (level, spec) in enumerate(_CAS.items(), 1):
        stolen = _with(level, replace(spec, key=f"another {level}")).cabundle[index]
        made = replace(good, cabundle=(*good.cabundle[:index], stolen, *good.cabundle[index + 1 :]))
        yield _case(f"other-key-{level}", f"the {level} has the name and another key", made)


def _with(level: str, spec: forge.Spec) -> forge.Chain:
    specs = {**_LEVELS, level: spec}
    return forge.chain_of(forge.ROOT, *specs.values())


def _constraints() -> Iterator[Case]:
    """Wrong purposes."""
    for level, spec in _CAS.items():
        signer = replace(spec, usage=frozenset({"digital_signature", "crl_sign"}))
        yield _case(f"usage-{level}", f"the {level} may not sign certificates", _with(level, signer))
        not_critical = replace(spec, usage_critical=False)
        yield _case(
            f"usage-not-critical-{level}", f"the {level}'s key usage is not critical", _with(level, not_critical)
        )
        no_ca = replace(spec, constraints=x509.BasicConstraints(ca=False, path_length=None))
        yield _case(f"ca-false-{level}", f"the {level} is no CA", _with(level, no_ca))
    leaf = forge.LEAF
    ca = replace(leaf, constraints=x509.BasicConstraints(ca=True, path_length=None))
    yield _case("leaf-ca-true", "the leaf is a CA", forge.chain(leaf=ca))
    yield _case(
        "usage-leaf", "the leaf may not sign", forge.chain(leaf=replace(leaf, usage=frozenset({"key_agreement"})))
    )
    both = frozenset({"digital_signature", "key_cert_sign"})
    yield _case("leaf-certsign", "the leaf may sign certificates", forge.chain(leaf=replace(leaf, usage=both)))
    usage_critical = forge.chain(leaf=replace(leaf, usage_critical=True))
    yield _case("leaf-usage-critical", "the leaf's key usage is critical", usage_critical, ACCEPTED)


def _extensions() -> Iterator[Case]:
    """Extensions that no certificate of AWS's has, and that a path validation must not pass over."""
    name = x509.SubjectAlternativeName([x509.DNSName("enclave.test")])
    for level, spec in _LEVELS.items():
        twice = replace(spec, extensions=((name, False), (name, False)))
        yield _case(f"duplicate-{level}", f"the {level} has an extension twice", _with(level, twice))
        broken = x509.UnrecognizedExtension(ExtensionOID.SUBJECT_ALTERNATIVE_NAME, b"enclave.test")
        malformed = replace(spec, extensions=((broken, False),))
        yield _case(f"malformed-{level}", f"the {level} has an extension that is no DER", _with(level, malformed))
    # These would permit every name of the chain: it is for being there that they are refused.
    names = x509.NameConstraints(permitted_subtrees=[x509.DNSName("test")], excluded_subtrees=None)
    directory = x509.NameConstraints(None, [x509.DirectoryName(x509.Name.from_rfc4514_string("CN=nobody"))])
    policies = x509.PolicyConstraints(require_explicit_policy=8, inhibit_policy_mapping=None)
    for level, spec in _CAS.items():
        for critical in (True, False):
            how = "critical" if critical else "not critical"
            constrained = replace(spec, extensions=((names, critical),))
            label = f"{'' if critical else 'loose-'}{level}"
            yield _case(f"names-{label}", f"the {level} constrains names, {how}", _with(level, constrained))
        constrained = replace(spec, extensions=((directory, True),))
        yield _case(f"directory-names-{level}", f"the {level} excludes a directory name", _with(level, constrained))
        constrained = replace(spec, extensions=((policies, True),))
        yield _case(f"policies-{level}", f"the {level} constrains policies", _with(level, constrained))
    leaf = replace(forge.LEAF, extensions=((names, False),))
    yield _case("names-leaf", "the leaf constrains names", forge.chain(leaf=leaf))
    leaf = replace(forge.LEAF, extensions=((policies, False),))
    yield _case("policies-leaf", "the leaf constrains policies, not critical", forge.chain(leaf=leaf))
    # SEQUENCE OF { 1.2.3.4, 1.2.3.5 }
    mappings = x509.UnrecognizedExtension(ExtensionOID.POLICY_MAPPINGS, bytes.fromhex("300c300a06032a030406032a0305"))
    uses = {"client": ExtendedKeyUsageOID.CLIENT_AUTH, "any": ExtendedKeyUsageOID.ANY_EXTENDED_KEY_USAGE}
    for level, spec in _LEVELS.items():
        mapped = replace(spec, extensions=((mappings, False),))
        yield _case(f"mappings-{level}", f"the {level} maps policies, not critical", _with(level, mapped))
        for name_of_use, use in uses.items():
            used = replace(spec, extensions=((x509.ExtendedKeyUsage([use]), False),))
            about = f"the {level} has an extended key usage, {name_of_use}"
            yield _case(f"eku-{name_of_use}-{level}", about, _with(level, used))
    # BasicConstraints of cA FALSE and a path length of 0, which no builder would write.
    limited = x509.UnrecognizedExtension(ExtensionOID.BASIC_CONSTRAINTS, bytes.fromhex("3003020100"))
    leaf = replace(forge.LEAF, constraints=None, extensions=((limited, True),))
    yield _case("leaf-path-length", "the leaf limits the path behind it", forge.chain(leaf=leaf))


def _path_lengths() -> Iterator[Case]:
    def limited(spec: forge.Spec, length: int | None) -> forge.Spec:
        return replace(spec, constraints=x509.BasicConstraints(ca=True, path_length=length))

    yield _case("path-length", "the region allows one CA below it", forge.chain(region=limited(forge.REGION, 1)))
    yield _case("path-length-zone", "the zone allows no CA below it", forge.chain(zone=limited(forge.ZONE, 0)))
    below = replace(forge.INSTANCE, name="below.test.nitro-enclaves", key="below")
    longer = forge.chain_of(forge.ROOT, forge.REGION, forge.ZONE, forge.INSTANCE, below, forge.LEAF)
    yield _case("path-length-instance", "a CA below the instance, which allows none", longer)
    wider = forge.chain(instance=limited(forge.INSTANCE, 5))
    yield _case("path-length-grows", "a CA that allows more below it than its issuer does", wider, ACCEPTED)
    renewed = replace(forge.REGION, key="the renewed region")
    self_issued = forge.chain_of(forge.ROOT, forge.REGION, renewed, forge.ZONE, forge.INSTANCE, forge.LEAF)
    yield _case("path-length-self-issued", "a region that issued itself anew, one CA more than it allows", self_issued)
    renewed = limited(renewed, 1)
    self_issued = forge.chain_of(forge.ROOT, forge.REGION, renewed, forge.INSTANCE, forge.LEAF)
    yield _case("self-issued", "a region that issued itself anew, within what it allows", self_issued, ACCEPTED)
    many = [replace(limited(forge.ZONE, None), name=f"ca {number}", key=f"ca {number}") for number in range(9)]
    most = forge.chain_of(forge.ROOT, *many[:8], forge.LEAF)
    yield _case("path-8", "eight CAs between root and leaf", most, ACCEPTED)
    yield _case("path-9", "nine CAs between root and leaf", forge.chain_of(forge.ROOT, *many, forge.LEAF))
    unlimited = (limited(spec, None) for spec in _CAS.values())
    yield _case(
        "path-length-none", "no CA limits the path", forge.chain_of(forge.ROOT, *unlimited, forge.LEAF), ACCEPTED
    )
    short = forge.chain_of(forge.ROOT, replace(forge.INSTANCE), forge.LEAF)
    yield _case("path-short", "one CA between root and leaf", short, ACCEPTED)


def _times() -> Iterator[Case]:
    """Validity, to the second and at both ends (RFC 5280 section 4.1.2.5: inclusive)."""

    def at(name: str, about: str, made: forge.Chain, time: datetime, expect: str) -> Case:
        return Case(f"04-{name}", expect, about, _document(made), at=time)

    for level, spec in (("leaf", forge.LEAF), ("instance", forge.INSTANCE)):
        # As wide as the others, so that this certificate's ends are met alone.
        begins, ends = forge.NOW - timedelta(minutes=1), forge.NOW + timedelta(minutes=1)
        narrow = {"leaf": replace(forge.LEAF, not_before=forge.NOW - _HOUR)} | {
            level: replace(spec, not_before=begins, not_after=ends)
        }
        made = forge.chain(**narrow)
        yield at(f"first-second-{level}", f"in the {level}'s first second", made, begins, ACCEPTED)
        yield at(f"before-{level}", f"a second before the {level} begins", made, begins - _SECOND, "untrusted_chain")
        yield at(f"last-second-{level}", f"in the {level}'s last second", made, ends, ACCEPTED)
        yield at(f"after-{level}", f"a second after the {level} ended", made, ends + _SECOND, "untrusted_chain")
    about = "a day later: a leaf lives for hours, and the document's own time does not count"
    yield at("next-day", about, forge.GOOD_CHAIN, forge.NOW + timedelta(days=1), "untrusted_chain")
    about = "a minute before the leaf begins: without a policy there is no leeway"
    yield at("no-leeway", about, forge.GOOD_CHAIN, forge.NOW - timedelta(minutes=1), "untrusted_chain")
