"""Documents that are wrong in their fields, not in their bytes, and signed anew: the fault lies behind the signature.

The input is a programme: two bytes that choose a document and how it is signed, then mutations of six bytes each, so
that a fuzzer's insertions, deletions and crossings act on whole mutations. Whatever comes of it, every verdict is a
result or a typed error with a code of PROTOCOL.md; what is accepted holds all that the policy requires, as checked here
by other means than the verifier's; and a cache of certificates changes no verdict.
"""

from __future__ import annotations

import hashlib
import re
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from datetime import timedelta
from itertools import pairwise
from pathlib import Path

import cbor2
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.utils import encode_dss_signature
from cryptography.x509.oid import ExtendedKeyUsageOID, ExtensionOID

from attestation.chain import Anchor, ChainCache
from attestation.checks import Status
from attestation.errors import AppraisalError, EvidenceError
from attestation.policy import AppraisalPolicy
from attestation.verifier import (
    ArchivedResult,
    AttestationResult,
    AuthenticDocument,
    DocumentResult,
    authenticate,
    verify,
    verify_archived,
    verify_document,
)
from tests.pki import forge

ROOT = Path(__file__).resolve().parent.parent
REAL = ROOT.parent / "shared" / "vectors" / "nitro"

Verdict = AuthenticDocument | AttestationResult | DocumentResult | ArchivedResult


def _policy(binding: str) -> AppraisalPolicy:
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "root.der").write_bytes(forge.ROOT_DER)
        return AppraisalPolicy.parse(forge.POLICY.replace('purpose = "channel"', binding), Path(folder))


ANCHOR = Anchor.emulated(forge.ROOT_DER)
USER_DATA = forge.payload_fields()["user_data"]
assert isinstance(USER_DATA, bytes)
CHANNELS = _policy('purpose = "channel"')
DOCUMENTS = _policy(
    f'purpose = "document"\npublic_key = {{ forbid = true }}\nuser_data = {{ require = ["{USER_DATA.hex()}"] }}'
)
CODES = frozenset(
    re.findall(r"`(\w+)`", "".join(re.findall(r"^\| \d+ \|.*\|([^|]+)\|$", (ROOT / "PROTOCOL.md").read_text(), re.M)))
)
"""The last column of the checklist."""
CACHE = ChainCache()


# --- From bytes to Evidence -----------------------------------------------------------------------------------------

_RECORD = 6
_MOST_MUTATIONS = 8
_NOW = int(forge.NOW.timestamp() * 1000)

_VALUES: tuple[object, ...] = (
    *(None, 0, 1, -1, 2**63, 2**64 - 1, True, 1.5, [], {}, "", "SHA384", "SHA256", "x" * 129, "i-\x1b[2K"),
    *(bytes(size) for size in (0, 32, 47, 48, 49, 512, 513, 1024, 1025)),
    *(_NOW // 1000, _NOW - 419_000, _NOW - 421_000, _NOW + 119_000, _NOW + 121_000),
    *([b""], [1], {0: bytes(48)}, {"v": 1}, forge.NONCE, forge.ROOT_DER, forge.GOOD_CHAIN.certificate, USER_DATA),
    *map(forge.Encoded, (b"\xf7", b"\xff", b"\x9f\xff", b"\xbf\xff", b"\x5f\xff", b"\xc1\x00", b"\x1c", b"\x78\x00")),
)
_KEYS: tuple[object, ...] = (
    *("module_id", "digest", "timestamp", "pcrs", "certificate", "cabundle", "public_key", "user_data", "nonce"),
    *("", "x", 0, 16, 17, 31, 32, -1, 2**64 - 1, b"nonce", None, forge.Encoded(b"\x18\x00"), forge.chunked("nonce")),
)


def _real_payloads() -> list[dict[str, object]]:
    """The fields of AWS's documents, where the collection is there: one of each size."""
    found = {}
    for path in sorted(REAL.glob("*.cbor")):
        payload = cbor2.loads(cbor2.loads(path.read_bytes())[2])
        found[len(payload["pcrs"]), payload["nonce"] is None, payload["user_data"] is None] = payload
    return list(found.values())


PAYLOADS = [forge.payload_fields(), *_real_payloads()]

Entries = list[tuple[object, object]]


@dataclass(frozen=True)
class Mutation:
    """``layer`` and ``action`` say what is done, ``at`` where, ``value`` and ``amount`` with what."""

    layer: int
    action: int
    at: int
    value: int
    amount: int

    @classmethod
    def read(cls, record: bytes) -> Mutation:
        return cls(record[0], record[1], record[2], record[3], record[4] << 8 | record[5])


def _mutated(entries: Entries, mutation: Mutation) -> None:
    """One change to a map that is to be written."""
    at = mutation.at % len(entries) if entries else 0
    key, value = entries[at] if entries else ("nonce", None)
    new = _VALUES[mutation.value % len(_VALUES)]
    match mutation.action % 10:
        case 0:
            entries[at : at + 1] = [(key, new)]
        case 1:
            entries[at : at + 1] = []
        case 2:
            entries.insert(mutation.value % (len(entries) + 1), (key, new if mutation.amount & 1 else value))
        case 3:
            entries.insert(mutation.value % (len(entries) + 1), entries.pop(at) if entries else (key, value))
        case 4 if isinstance(value, bytes):
            entries[at] = (key, (value + bytes(2048))[: mutation.amount % 2048])
        case 5 if isinstance(value, bytes | str):
            entries[at] = (key, forge.chunked(value))
        case 6:
            entries[at : at + 1] = [(key, _long_winded(value))]
        case 7 if isinstance(value, bytes) and value:
            place = mutation.amount % len(value)
            entries[at] = (key, value[:place] + bytes([value[place] ^ (mutation.value or 1)]) + value[place + 1 :])
        case 8 if isinstance(value, int):
            entries[at] = (key, value + mutation.amount - 0x8000)
        case _:
            entries[at : at + 1] = [(_KEYS[mutation.value % len(_KEYS)], value)]


def _long_winded(value: object) -> forge.Encoded:
    """The same value with a longer head than it needs, or of indefinite length."""
    match value:
        case bool() | None | float() | forge.Encoded():
            return forge.Encoded(forge.encode(value))
        case int():
            return forge.Encoded(forge.head(0 if value >= 0 else 1, value if value >= 0 else -1 - value, size=8))
        case bytes():
            return forge.Encoded(forge.head(2, len(value), size=4) + value)
        case str():
            return forge.Encoded(forge.head(3, len(value.encode()), size=4) + value.encode())
        case list():
            return forge.Encoded(forge.raw_array(value))
        case dict():
            return forge.Encoded(forge.raw_map(list(value.items()), indefinite=True))
    raise AssertionError(value)


def _constraints(ca: bool, length: int | None) -> Callable[[forge.Spec], forge.Spec]:
    return lambda spec: replace(spec, constraints=x509.BasicConstraints(ca=ca, path_length=length))


def _usage(*bits: str) -> Callable[[forge.Spec], forge.Spec]:
    return lambda spec: replace(spec, usage=frozenset(bits))


def _extension(extension: x509.ExtensionType) -> Callable[[forge.Spec], forge.Spec]:
    return lambda spec: replace(spec, extensions=(*spec.extensions, (extension, len(spec.name) % 2 == 0)))


_SECOND = timedelta(seconds=1)
_SPECS: tuple[Callable[[forge.Spec], forge.Spec], ...] = (
    lambda spec: replace(spec, not_after=forge.NOW - _SECOND),
    lambda spec: replace(spec, not_after=forge.NOW),
    lambda spec: replace(spec, not_before=forge.NOW),
    lambda spec: replace(spec, not_before=forge.NOW + _SECOND),
    *(_constraints(ca=True, length=length) for length in (None, 0, 1, 2, 3)),
    _constraints(ca=False, length=None),
    lambda spec: replace(spec, constraints=None),
    lambda spec: replace(spec, constraints_critical=not spec.constraints_critical),
    _usage("digital_signature"),
    _usage("key_cert_sign"),
    _usage("digital_signature", "key_cert_sign"),
    _usage(),
    lambda spec: replace(spec, usage=None),
    lambda spec: replace(spec, usage_critical=not spec.usage_critical),
    lambda spec: replace(spec, curve=ec.SECP256R1()),
    lambda spec: replace(spec, curve=ec.BrainpoolP384R1()),
    lambda spec: replace(spec, hash=hashes.SHA256()),
    lambda spec: replace(spec, issuer="somebody"),
    lambda spec: replace(spec, subject=x509.Name([])),
    lambda spec: replace(spec, serial=2**168),
    lambda spec: replace(spec, name="root.test.nitro-enclaves"),
    lambda spec: replace(spec, name=forge.INSTANCE.name),
    lambda spec: replace(spec, key_identifier=False),
    _extension(x509.SubjectAlternativeName([x509.DNSName("enclave.test")])),
    _extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH])),
    _extension(x509.NameConstraints([x509.DNSName("test")], None)),
    _extension(x509.PolicyConstraints(0, None)),
    *(
        _extension(x509.UnrecognizedExtension(oid, value))
        for oid in (
            ExtensionOID.SUBJECT_ALTERNATIVE_NAME,
            ExtensionOID.ISSUER_ALTERNATIVE_NAME,
            ExtensionOID.NAME_CONSTRAINTS,
            ExtensionOID.AUTHORITY_KEY_IDENTIFIER,
            ExtensionOID.CRL_DISTRIBUTION_POINTS,
            ExtensionOID.CERTIFICATE_POLICIES,
            x509.ObjectIdentifier("1.3.6.1.4.1.99999.1"),
        )
        for value in (b"", b"\x30\x00", b"\x05\x00", bytes.fromhex("3008a006300487047f000001"))
    ),
)


def _certificates(mutations: Sequence[Mutation]) -> tuple[list[bytes], ec.EllipticCurvePrivateKey]:
    """The bundle with the leaf at its end, and the leaf's key: good ones, but for changed specifications."""
    if not mutations:
        return [*forge.GOOD_CHAIN.cabundle, forge.GOOD_CHAIN.certificate], forge.GOOD_CHAIN.key
    specs = [forge.ROOT, forge.REGION, forge.ZONE, forge.INSTANCE, forge.LEAF]
    for mutation in mutations:
        at = 1 + mutation.at % 4
        match mutation.action % 8:
            case 0:
                specs[at] = replace(specs[at], key=f"key {mutation.value % 4}")
            case 1 if len(specs) < 10:
                specs.insert(at, replace(specs[at], name=f"more {mutation.value % 4}", key=f"key {mutation.value % 4}"))
            case 2 if len(specs) > 5:
                del specs[at]
            case _:
                specs[at] = _SPECS[mutation.value % len(_SPECS)](specs[at])
    made = forge.chain_of(*specs)
    return [*made.cabundle, made.certificate], made.key


def _rearranged(bundle: list[bytes], mutation: Mutation) -> None:
    at, to = mutation.at % len(bundle), mutation.value % len(bundle)
    match mutation.action % 6:
        case 0:
            bundle[at], bundle[to] = bundle[to], bundle[at]
        case 1 if len(bundle) > 1:
            del bundle[at]
        case 2:
            bundle.insert(to, bundle[at])
        case 3:
            bundle[at] = forge.GOOD_CHAIN.cabundle[to % 4]
        case 4:
            place = mutation.amount % len(bundle[at])
            changed = bytes([bundle[at][place] ^ (mutation.value or 1)])
            bundle[at] = bundle[at][:place] + changed + bundle[at][place + 1 :]
        case _ if at > 0:
            bundle[at] = _edited(bundle[at], at, mutation)


def _edited(certificate: bytes, at: int, mutation: Mutation) -> bytes:
    """A byte of what is signed changed, or a piece gone, and signed again by the good issuer at that place."""

    def edit(signed: bytes) -> bytes:
        place = mutation.amount % len(signed)
        if mutation.value % 4 == 0:
            return signed[:place] + signed[place + 1 + mutation.value // 64 :]
        return signed[:place] + bytes([signed[place] ^ mutation.value]) + signed[place + 1 :]

    issuer = ("root", "region", "zone", "instance")[min(at - 1, 3)]
    try:
        return forge.resigned(certificate, edit, forge.private_key(issuer))
    except (ValueError, x509.InvalidVersion):
        return certificate  # no certificate any more, by an earlier mutation


_HEADERS = (
    *map(cbor2.dumps, ({1: -7}, {1: -36}, {}, {1: -35, 4: b"kid"}, {4: b"kid"}, [1, -35], -35, {"1": -35})),
    *(b"", b"\xa1\x01\x39\x00\x22", b"\xbf\x01\x38\x22\xff", b"\xa2\x01\x38\x22\x01\x38\x22", b"\xa1\x01\x38\x22\x00"),
)


def _enveloped(payload: bytes, key: ec.EllipticCurvePrivateKey, mutations: Sequence[Mutation]) -> bytes:
    """The COSE object of ``payload``, signed by ``key`` and then changed."""
    protected = forge.ES384_HEADER
    for mutation in mutations:
        if mutation.action % 8 == 0:
            protected = _HEADERS[mutation.value % len(_HEADERS)]
    signature = forge.sign(payload, protected, key)
    items: list[object] = [protected, {}, payload, signature]
    prefix = suffix = b""
    for mutation in mutations:
        match mutation.action % 8:
            case 1:
                items[mutation.at % 4] = _VALUES[mutation.value % len(_VALUES)]
            case 2:
                items[mutation.at % 4] = _long_winded(items[mutation.at % 4])
            case 3:
                edges = (0, 1, forge.P384_ORDER - 1, forge.P384_ORDER, forge.P384_ORDER + 1, 2**384 - 1)
                halves = [signature[:48], signature[48:]]
                halves[mutation.at % 2] = edges[mutation.value % len(edges)].to_bytes(48, "big")
                items[3] = b"".join(halves)
            case 4 if len(signature) == 96:
                items[3] = forge.high_s(signature) if mutation.at % 2 else forge.low_s(signature)
            case 5:
                prefix = (b"\xd2", b"\xd1", b"\xd8\x12", b"\xd2\xd2", b"\xd8\x62", b"\xc0")[mutation.value % 6]
            case 6:
                suffix = bytes(mutation.amount % 20_000)
            case 7:
                items[4:] = [b""] * (mutation.amount % 3)
    return prefix + forge.encode(items) + suffix


def evidence_and_document(data: bytes) -> tuple[bytes, bytes]:
    records = [data[start : start + _RECORD] for start in range(2, len(data) - _RECORD + 1, _RECORD)]
    layers: list[list[Mutation]] = [[] for _ in range(6)]
    for mutation in map(Mutation.read, records[:_MOST_MUTATIONS]):
        layers[mutation.layer % len(layers)].append(mutation)
    specs, bundles, fields, registers, envelopes, commitments = layers

    bundle, key = _certificates(specs)
    for mutation in bundles:
        _rearranged(bundle, mutation)
    base, signing = (data + bytes(2))[:2]
    chosen = PAYLOADS[base % len(PAYLOADS)]
    pcrs: object = chosen["pcrs"]
    assert isinstance(pcrs, dict | type(forge.PCRS))
    register_entries: Entries = list(pcrs.items())
    for mutation in registers:
        _mutated(register_entries, mutation)

    commitment = cbor2.loads(forge.COMMITMENT.encode())
    committed: Entries = list(commitment.items())
    for mutation in commitments:
        _mutated(committed, mutation)
    encoded = forge.raw_map(committed)
    payload: dict[str, object] = {
        **chosen,
        "pcrs": forge.Encoded(forge.raw_map(register_entries)),
        "certificate": bundle[-1],
        "cabundle": bundle[:-1],
    }
    if commitments and base % len(PAYLOADS) == 0:
        payload["user_data"] = cbor2.dumps([1, "channel", hashlib.sha384(encoded).digest()])
    if signing & 1:
        payload["timestamp"] = _NOW
    entries: Entries = list(payload.items())
    for mutation in fields:
        _mutated(entries, mutation)
    made = forge.raw_map(entries, indefinite=bool(signing & 2))
    document = _enveloped(made, forge.private_key("another") if signing & 0xF0 == 0xF0 else key, envelopes)
    return forge.raw_map([("v", 1), ("document", document), ("commitment", encoded)]), document


# --- What must hold of every verdict --------------------------------------------------------------------------------


def one_input(data: bytes) -> None:
    evidence, document = evidence_and_document(data)
    judges: tuple[Callable[[ChainCache | None], Verdict], ...] = (
        lambda cache: authenticate(document, anchor=ANCHOR, at=forge.NOW, cache=cache),
        lambda cache: verify(evidence, policy=CHANNELS, nonce=forge.NONCE, at=forge.NOW, cache=cache),
        lambda cache: verify_document(document, policy=DOCUMENTS, nonce=forge.NONCE, at=forge.NOW, cache=cache),
        lambda cache: verify_archived(evidence, policy=CHANNELS, cache=cache),
        lambda cache: verify_archived(document, policy=DOCUMENTS, nonce=forge.NONCE, cache=cache),
    )
    compared = sum(data) % len(judges)  # all five twice would take four times as long
    for number, judge in enumerate(judges):
        outcome = _outcome(judge, CACHE)
        assert number != compared or outcome == _outcome(judge, None), "a cache changed a verdict"
        if isinstance(outcome, Verdict):
            _require_signed(outcome, document)
            if not isinstance(outcome, AuthenticDocument):
                _require_acceptable(outcome)


def _outcome(judge: Callable[[ChainCache | None], Verdict], cache: ChainCache | None) -> Verdict | tuple[object, ...]:
    """The result, or all that a refusal says."""
    try:
        return judge(cache)
    except (EvidenceError, AppraisalError) as error:
        said, code, checks = str(error), error.code, error.checks
    assert said.isprintable(), "an error that can move a terminal's cursor"
    assert code in CODES, f"a code that PROTOCOL.md does not know: {code}"
    failed = [check for check in checks if check.status is Status.FAILED]
    assert failed, "a refusal without the check that failed"
    assert failed[0].code == code, "a refusal with another code than its first failure"
    return said, code, checks


def _require_signed(result: Verdict, document: bytes) -> None:
    """From the root to the document, each signed by the one before it and valid at the time of the verdict."""
    claims = result.claims
    at = claims.timestamp if isinstance(result, ArchivedResult) else forge.NOW
    bundle = (*claims.cabundle, claims.certificate)
    assert bundle[0] == forge.ROOT_DER, "another root than the anchor"
    certificates = list(map(x509.load_der_x509_certificate, bundle))
    for issuer, certificate in pairwise(certificates):
        certificate.verify_directly_issued_by(issuer)
    for certificate in certificates:
        assert certificate.not_valid_before_utc <= at.replace(microsecond=0) <= certificate.not_valid_after_utc
    outer = cbor2.loads(document)
    protected, _, payload, signature = outer.value if isinstance(outer, cbor2.CBORTag) else outer
    r, s = (int.from_bytes(signature[start : start + 48], "big") for start in (0, 48))
    key = certificates[-1].public_key()
    assert isinstance(key, ec.EllipticCurvePublicKey)
    signed = cbor2.dumps(["Signature1", protected, b"", payload])
    key.verify(encode_dss_signature(r, s), signed, ec.ECDSA(hashes.SHA384()))
    fields = cbor2.loads(payload)
    assert fields["module_id"] == claims.module_id
    assert dict(claims.pcrs) == fields["pcrs"]
    for name in ("nonce", "user_data", "public_key"):
        assert getattr(claims, name) == fields.get(name)


def _require_acceptable(result: AttestationResult | DocumentResult | ArchivedResult) -> None:
    """Nothing is another value than the one that the policies of this file require."""
    claims = result.claims
    used = {index: value for index, value in claims.pcrs.items() if value != bytes(48)}
    assert used == {index: forge.PCRS[index] for index in (0, 1, 2, 4, 16, 17)}
    assert claims.public_key is None
    if isinstance(result, DocumentResult):
        assert claims.user_data == USER_DATA
    if not isinstance(result, ArchivedResult):
        assert claims.nonce == forge.NONCE
        assert abs(claims.timestamp - forge.NOW) <= timedelta(seconds=420)
    if isinstance(result, AttestationResult):
        commitment = result.commitment
        digest = hashlib.sha384(commitment.encode()).digest()
        assert claims.user_data == cbor2.dumps([1, "channel", digest])
        assert (commitment.model, commitment.configuration) == (forge.COMMITMENT.model, forge.COMMITMENT.configuration)
        assert 0 <= result.valid_seconds <= min(commitment.lifetime, 420)


def seeds() -> list[bytes]:
    """The good document, each mutation once, and each real document's fields."""
    single = [
        bytes([0, 0, layer, action, at, value, 0, value])
        for layer in range(6)
        for action in range(10)
        for at, value in ((0, 0), (3, 7), (4, 40), (8, 90))
    ]
    return [b"", *(bytes([base, 3]) for base in range(len(PAYLOADS))), *single]
