"""Anchors, and what of a chain no vector can show."""

from __future__ import annotations

import threading
import warnings
from collections.abc import Callable, Sequence
from dataclasses import replace
from datetime import datetime, timedelta, timezone
from typing import Any, Literal

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from hypothesis import example, given, settings
from hypothesis import strategies as st

from attestation import chain as chains
from attestation.anchors import AWS_NITRO_G1
from attestation.chain import MAX_INTERMEDIATES, Anchor, ChainCache, Trust, validate
from attestation.errors import EvidenceError, PolicyError
from tests.pki import forge

GOOD = forge.GOOD_CHAIN
ANCHOR = Anchor.emulated(forge.ROOT_DER)
HOUR = timedelta(hours=1)
ROLES = {"root": forge.ROOT, "region": forge.REGION, "zone": forge.ZONE, "instance": forge.INSTANCE, "leaf": forge.LEAF}


def _names() -> x509.NameConstraints:
    return x509.NameConstraints(permitted_subtrees=[x509.DNSName("test")], excluded_subtrees=None)


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
        pytest.param(
            forge.chain(root=replace(forge.ROOT, extensions=((_names(), False),))).cabundle[0],
            "constrains names",
            id="names",
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


def _refused(
    chain: forge.Chain, at: datetime = forge.NOW, anchor: Anchor = ANCHOR, cache: ChainCache | None = None
) -> EvidenceError:
    with pytest.raises(EvidenceError) as caught:
        validate(chain.certificate, chain.cabundle, anchor=anchor, at=at, cache=cache)
    assert caught.value.code == "untrusted_chain"
    return caught.value


def test_a_time_has_a_zone() -> None:
    with pytest.raises(ValueError, match="time zone"):
        validate(GOOD.certificate, GOOD.cabundle, anchor=ANCHOR, at=forge.NOW.replace(tzinfo=None))


def test_a_refusal_says_between_which_certificates() -> None:
    misnamed = _refused(forge.chain(zone=replace(forge.ZONE, issuer="another")))
    assert misnamed.got == "from cabundle[1] to cabundle[2]: it does not name the certificate before it as its issuer"
    assert "cabundle[3] to the leaf: " in str(_refused(forge.chain(leaf=replace(forge.LEAF, issuer="another"))))


@pytest.mark.parametrize(
    ("extension", "why"),
    [
        (_names(), "names"),
        (x509.PolicyConstraints(require_explicit_policy=0, inhibit_policy_mapping=None), "policies"),
        (x509.InhibitAnyPolicy(0), "policies"),
    ],
    ids=["nameConstraints", "policyConstraints", "inhibitAnyPolicy"],
)
@pytest.mark.parametrize("role", ["region", "zone", "instance"])
def test_a_ca_asks_nothing_of_what_is_behind_it_but_a_length(
    role: str, extension: x509.ExtensionType, why: str
) -> None:
    """A state behind a CA carries no names and no policies, so a CA that constrains them is refused, even where the
    constraint is met and need not be understood."""
    _refused(forge.chain(**{role: replace(ROLES[role], extensions=((extension, True),))}))
    assert why in str(_refused(forge.chain(**{role: replace(ROLES[role], extensions=((extension, False),))})))


@pytest.mark.parametrize(
    "value", [b"", b"\x30\x01", b"\x30\x03\x0c\x01\xff"], ids=["nothing", "cut short", "no policy"]
)
def test_an_extension_that_cannot_be_read_is_one_more_refusal(value: bytes) -> None:
    """Not critical and of no use here, and yet it belongs to a certificate that asks to be believed."""
    broken = x509.UnrecognizedExtension(x509.CertificatePolicies.oid, value)
    _refused(forge.chain(region=replace(forge.REGION, extensions=((broken, False),))))


def test_a_certificate_cannot_stand_behind_itself() -> None:
    """The library takes a certificate of its store for a whole path."""
    root, region, *rest = GOOD.cabundle
    for cabundle in ((root, root, region, *rest), (root, region, region, *rest), (root,)):
        for certificate in (GOOD.certificate, cabundle[-1]):
            _refused(replace(GOOD, cabundle=cabundle, certificate=certificate))


def test_self_issued_cas_count() -> None:
    """RFC 5280 would let them pass a path length; AWS has none, and a path length means what it says."""
    again = replace(forge.INSTANCE, constraints=x509.BasicConstraints(ca=True, path_length=None))
    first = replace(again, constraints=x509.BasicConstraints(ca=True, path_length=0))
    for cas, holds in (((again, again), True), ((first, again), False)):
        made = forge.chain_of(forge.ROOT, *cas, forge.LEAF)
        if holds:
            validate(made.certificate, made.cabundle, anchor=ANCHOR, at=forge.NOW)
        else:
            assert "path length" in str(_refused(made))


def _ladder(steps: int, root: forge.Spec = forge.ROOT) -> forge.Chain:
    """Root, as many CAs without a path length, leaf."""
    free = x509.BasicConstraints(ca=True, path_length=None)
    cas = [replace(forge.ZONE, name=f"ca {step}", key=f"ca {step}", constraints=free) for step in range(steps)]
    return forge.chain_of(root, *cas, forge.LEAF)


def test_a_path_length_is_not_lifted_further_down() -> None:
    more = x509.BasicConstraints(ca=True, path_length=5)
    zone, instance = (replace(spec, constraints=more) for spec in (forge.ZONE, forge.INSTANCE))
    region = replace(forge.REGION, constraints=x509.BasicConstraints(ca=True, path_length=1))
    assert "path length" in str(_refused(forge.chain(region=region, zone=zone, instance=instance)))


@pytest.mark.parametrize("warm", [False, True], ids=["cold", "warm"])
def test_a_path_has_a_longest_length(warm: bool) -> None:
    cache = ChainCache() if warm else None
    for steps in range(MAX_INTERMEDIATES + 1):
        made = _ladder(steps)
        validate(made.certificate, made.cabundle, anchor=ANCHOR, at=forge.NOW, cache=cache)
    assert "longer than any path" in str(_refused(_ladder(MAX_INTERMEDIATES + 1), cache=cache))


def test_the_anchor_may_ask_for_less() -> None:
    root = replace(forge.ROOT, constraints=x509.BasicConstraints(ca=True, path_length=1))
    anchor = Anchor.emulated(_ladder(0, root).cabundle[0])
    validate(_ladder(1, root).certificate, _ladder(1, root).cabundle, anchor=anchor, at=forge.NOW)
    assert "path length" in str(_refused(_ladder(2, root), anchor=anchor))


class _Counted:
    """How often the library was asked to verify, between two looks."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self._asked = 0
        real = chains._Issuer._verify

        def counted(*args: object) -> None:
            self._asked += 1
            real(*args)  # type: ignore[arg-type]

        monkeypatch.setattr(chains._Issuer, "_verify", counted)

    def since(self) -> int:
        asked, self._asked = self._asked, 0
        return asked


@pytest.fixture
def verifications(monkeypatch: pytest.MonkeyPatch) -> _Counted:
    return _Counted(monkeypatch)


def _other(role: str, name: str) -> forge.Chain:
    """The good chain with another certificate in that role, and so with others behind it."""
    return forge.chain(**{role: replace(ROLES[role], name=name, key=name)})


def test_only_what_is_new_is_verified(verifications: _Counted) -> None:
    cache = ChainCache()
    expected = [
        (GOOD, 4),
        (GOOD, 0),
        (_other("leaf", "leaf 2"), 1),
        (_other("instance", "instance 2"), 2),
        (_other("zone", "zone 2"), 3),
        (_other("region", "region 2"), 4),
        (GOOD, 0),
    ]
    for chain, signatures in expected:
        key = validate(chain.certificate, chain.cabundle, anchor=ANCHOR, at=forge.NOW, cache=cache)
        assert verifications.since() == signatures
        assert key == chain.key.public_key()


def test_what_was_verified_is_not_trusted_beyond_its_time(verifications: _Counted) -> None:
    """To the second, as RFC 5280 counts: the last moment of validity is the whole of its last second."""
    cache = ChainCache()
    last, first = forge.LEAF.not_after, forge.LEAF.not_before
    validate(GOOD.certificate, GOOD.cabundle, anchor=ANCHOR, at=forge.NOW, cache=cache)
    verifications.since()
    elsewhere = timezone(timedelta(hours=-11))
    for inside in (last + timedelta(microseconds=999_999), last, first, first.astimezone(elsewhere)):
        validate(GOOD.certificate, GOOD.cabundle, anchor=ANCHOR, at=inside, cache=cache)
        validate(GOOD.certificate, GOOD.cabundle, anchor=ANCHOR, at=inside)
        assert verifications.since() == 4
    for outside in (last + timedelta(seconds=1), first - timedelta(microseconds=1)):
        _refused(GOOD, outside, cache=cache)
        _refused(GOOD, outside)
        assert verifications.since() == 1 + 4
    # Behind the instance's end the shorter paths still hold; behind the root's, none does.
    _refused(GOOD, forge.INSTANCE.not_after + timedelta(seconds=1), cache=cache)
    assert verifications.since() == 1
    _refused(GOOD, forge.ROOT.not_after + timedelta(seconds=1), cache=cache)
    assert verifications.since() == 1


@pytest.mark.parametrize("role", ["region", "zone", "instance"])
def test_a_path_ends_with_the_first_of_its_certificates_to_end(role: str) -> None:
    cache = ChainCache()
    chain = forge.chain(**{role: replace(ROLES[role], not_after=forge.NOW + HOUR)})
    validate(chain.certificate, chain.cabundle, anchor=ANCHOR, at=forge.NOW, cache=cache)
    _refused(chain, forge.NOW + HOUR + timedelta(seconds=1), cache=cache)
    _refused(chain, ROLES[role].not_before - timedelta(seconds=1), cache=cache)


def test_failures_are_not_remembered(verifications: _Counted) -> None:
    cache = ChainCache()
    chain = forge.chain(leaf=replace(forge.LEAF, not_before=forge.NOW + timedelta(seconds=1)))
    for _ in range(2):
        _refused(chain, cache=cache)
        assert verifications.since() == 4
    validate(chain.certificate, chain.cabundle, anchor=ANCHOR, at=forge.NOW + timedelta(seconds=1), cache=cache)
    assert verifications.since() == 4


def test_a_known_ca_is_no_leaf_and_a_known_leaf_no_ca() -> None:
    cache = ChainCache()
    validate(GOOD.certificate, GOOD.cabundle, anchor=ANCHOR, at=forge.NOW, cache=cache)
    for length in range(1, len(GOOD.cabundle)):
        _refused(replace(GOOD, cabundle=GOOD.cabundle[:length], certificate=GOOD.cabundle[length]), cache=cache)
    _refused(replace(GOOD, cabundle=(*GOOD.cabundle, GOOD.certificate)), cache=cache)


def test_what_is_known_under_one_anchor_is_unknown_under_another(verifications: _Counted) -> None:
    """Two roots of one key: the certificates of one are, byte for byte, good under the other, and verified anew."""
    other = forge.chain(root=replace(forge.ROOT, not_after=forge.NOW + timedelta(days=1)))
    assert other.cabundle[1:] == GOOD.cabundle[1:]
    cache = ChainCache()
    for chain in (GOOD, other):
        anchor = Anchor.emulated(chain.cabundle[0])
        validate(chain.certificate, chain.cabundle, anchor=anchor, at=forge.NOW, cache=cache)
        assert verifications.since() == 4
    _refused(GOOD, anchor=Anchor.emulated(other.cabundle[0]), cache=cache)


def test_the_least_recently_used_goes_first(verifications: _Counted) -> None:
    with pytest.raises(ValueError, match="capacity"):
        ChainCache(0)
    cache = ChainCache(2)
    leaves = [_other("leaf", f"leaf {number}") for number in range(3)]

    def signatures(chain: forge.Chain) -> int:
        validate(chain.certificate, chain.cabundle, anchor=ANCHOR, at=forge.NOW, cache=cache)
        return verifications.since()

    assert [signatures(leaves[number]) for number in (0, 1, 0, 2)] == [4, 1, 0, 1]
    # Of the CAs' three paths the longest two are left, of the leaves the first and the last.
    assert [signatures(leaves[number]) for number in (0, 2, 1, 0)] == [0, 0, 1, 1]


def test_a_cache_serves_several_threads() -> None:
    cache = ChainCache(2)
    made = [_other("leaf", f"leaf {number}") for number in range(4)]
    failures: list[BaseException] = []

    def work(first: int) -> None:
        try:
            for turn in range(12):
                chain = made[(first + turn) % len(made)]
                key = validate(chain.certificate, chain.cabundle, anchor=ANCHOR, at=forge.NOW, cache=cache)
                assert key == chain.key.public_key()
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=(first,)) for first in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures


CHANGES: list[dict[str, Any]] = [
    {},
    {"key": "another"},
    {"not_after": forge.NOW + HOUR},
    {"not_before": forge.NOW - HOUR},
    {"constraints": x509.BasicConstraints(ca=True, path_length=None)},
    {"constraints": x509.BasicConstraints(ca=True, path_length=0)},
    {"constraints": x509.BasicConstraints(ca=True, path_length=1)},
    {"constraints": x509.BasicConstraints(ca=False, path_length=None)},
    {"usage": frozenset({"digital_signature"})},
    {"usage": frozenset({"key_cert_sign"})},
    {"extensions": ((_names(), False),)},
    {"extensions": ((x509.InhibitAnyPolicy(0), False),)},
    {"issuer": "another"},
]
CHANGED = {role: [replace(spec, **changes) for changes in CHANGES] for role, spec in ROLES.items()}
ANY = [spec for specs in CHANGED.values() for spec in specs]
PATHS = st.one_of(
    # The five, as they are; one of them changed; any of them changed; any at all, in any order.
    st.just(tuple(ROLES.values())),
    st.sampled_from(sorted(ROLES)).flatmap(
        lambda changed: st.tuples(
            *(st.sampled_from(CHANGED[role]) if role == changed else st.just(ROLES[role]) for role in ROLES)
        )
    ),
    st.tuples(*(st.sampled_from(specs) for specs in CHANGED.values())),
    st.lists(st.sampled_from(ANY), min_size=1, max_size=4).map(lambda specs: (ROLES["root"], *specs)),
)
"""What is signed by what: each by the one before it."""
ORDERS = st.none() | st.lists(st.integers(0, 4), max_size=5)
"""Which of the path's certificates stand behind the root, if not all of them in their order."""
MOMENTS = st.sampled_from([timedelta(microseconds=each) for each in (-1_000_000, -1, 0, 1, 999_999, 1_000_000)])


@st.composite
def _calls(draw: st.DrawFn) -> list[tuple[bytes, list[bytes], datetime]]:
    """A few chains, asked for several times each: in their middle, and around the ends of what is in them."""
    calls = []
    for specs in draw(st.lists(PATHS, min_size=1, max_size=3)):
        root, *rest = (_issue(spec, issuer) for issuer, spec in zip((specs[0], *specs), specs, strict=False))
        ends = sorted(moment for spec in specs for moment in (spec.not_before, spec.not_after))
        for order in draw(st.lists(ORDERS, min_size=1, max_size=2)):
            behind = rest[:-1] if order is None else [rest[index % len(rest)] for index in order]
            for at in (forge.NOW, draw(st.sampled_from(ends)) + draw(MOMENTS), forge.NOW):
                calls.append((rest[-1], [root, *behind], at))
    return draw(st.permutations(calls))


_issued: dict[str, bytes] = {}


def _issue(spec: forge.Spec, issuer: forge.Spec) -> bytes:
    name = repr((spec, issuer))
    if name not in _issued:
        _issued[name] = forge.issue(spec, issuer)
    return _issued[name]


def _verdict(certificate: bytes, cabundle: Sequence[bytes], at: datetime, cache: ChainCache | None) -> object:
    try:
        key = validate(certificate, cabundle, anchor=Anchor.emulated(cabundle[0]), at=at, cache=cache)
    except (EvidenceError, PolicyError) as error:
        return error.as_json()
    return key.public_numbers()


@settings(max_examples=150)
@given(_calls(), st.sampled_from([1, 2, 4, 100]))
def test_cold_and_warm_say_the_same(calls: list[tuple[bytes, list[bytes], datetime]], capacity: int) -> None:
    """Whatever was asked before: with one cache for all calls, each verdict is the one without it, word for word."""
    cache = ChainCache(capacity)
    for certificate, cabundle, at in calls:
        assert _verdict(certificate, cabundle, at, cache) == _verdict(certificate, cabundle, at, None)
