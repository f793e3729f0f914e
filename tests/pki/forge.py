"""A fixed PKI and a document writer for tests: everything that the emulator would never sign.

The private keys follow from their labels below, so they are known to everybody who reads this: nothing outside tests/,
fuzz/, bench/ and the scripts that make the vectors may load this file, and no policy may name its root. Signatures are
deterministic (RFC 6979): the same call gives the same bytes.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime, timedelta

import cbor2
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.utils import decode_dss_signature
from cryptography.hazmat.primitives.serialization import Encoding
from cryptography.x509.oid import NameOID

from attestation.commitment import Commitment, Entropy, Evidence, Purpose, UserData
from attestation.reference import ZERO_PCR, once_extended

NOW = datetime(2026, 3, 1, 12, 0, tzinfo=UTC)
"""When the documents of this file are made."""

P384_ORDER = int("ffffffffffffffffffffffffffffffffffffffffffffffffc7634d81f4372ddf581a0db248b0a77aecec196accc52973", 16)


def private_key(label: str, curve: ec.EllipticCurve | None = None) -> ec.EllipticCurvePrivateKey:
    """The key of that name; on P-384 unless told otherwise."""
    seed = hashlib.sha384(b"strongroom test pki: " + label.encode()).digest()
    return ec.derive_private_key(int.from_bytes(seed[:28], "big"), curve or ec.SECP384R1())


def measured(label: str) -> bytes:
    """A register's value after a measurement of that name."""
    return once_extended(hashlib.sha384(label.encode()).digest())


@dataclass(frozen=True, kw_only=True)
class Spec:
    """One certificate to be. The defaults of each role below are those measured on AWS's."""

    name: str
    key: str
    not_before: datetime
    not_after: datetime
    constraints: x509.BasicConstraints | None
    usage: frozenset[str] | None
    constraints_critical: bool = True
    usage_critical: bool = True
    extensions: tuple[tuple[x509.ExtensionType, bool], ...] = ()
    curve: ec.EllipticCurve = field(default_factory=ec.SECP384R1)
    hash: hashes.SHA256 | hashes.SHA384 | hashes.SHA512 = field(default_factory=hashes.SHA384)
    issuer: str | x509.Name | None = None
    """The issuer's name where it is not the true one; the issuer's key signs all the same."""
    subject: x509.Name | None = None
    """The whole subject, in place of the one that ``name`` gives."""
    serial: int | None = None
    key_identifier: bool = True
    """Whether a CA has a subject key identifier."""


def _ca(name: str, age: timedelta, lifetime: timedelta, path_length: int | None) -> Spec:
    return Spec(
        name=f"{name}.test.nitro-enclaves",
        key=name,
        not_before=NOW - age,
        not_after=NOW - age + lifetime,
        constraints=x509.BasicConstraints(ca=True, path_length=path_length),
        usage=frozenset({"digital_signature", "key_cert_sign", "crl_sign"}),
    )


ROOT = _ca("root", timedelta(days=2000), timedelta(days=10958), None)
REGION = _ca("region", timedelta(days=4), timedelta(days=20, hours=1), 2)
ZONE = _ca("zone", timedelta(days=2), timedelta(days=6), 1)
INSTANCE = replace(_ca("instance", timedelta(hours=5), timedelta(hours=24), 0), usage=frozenset({"key_cert_sign"}))
LEAF = Spec(
    name="i-0123456789abcdef0-enc0123456789abcdef.test",
    key="leaf",
    not_before=NOW - timedelta(seconds=3),
    not_after=NOW + timedelta(hours=3),
    constraints=x509.BasicConstraints(ca=False, path_length=None),
    usage=frozenset({"digital_signature", "content_commitment"}),
    usage_critical=False,
)


@dataclass(frozen=True)
class Chain:
    """A document's certificates, and the key of its leaf. ``cabundle`` is root first."""

    cabundle: tuple[bytes, ...]
    certificate: bytes
    key: ec.EllipticCurvePrivateKey


def chain(
    root: Spec = ROOT, region: Spec = REGION, zone: Spec = ZONE, instance: Spec = INSTANCE, leaf: Spec = LEAF
) -> Chain:
    """The chain of these five; each is signed by the one before it."""
    return chain_of(root, region, zone, instance, leaf)


def chain_of(*specs: Spec) -> Chain:
    """The chain of any number of certificates, root first, leaf last."""
    certificates = [issue(spec, issuer) for issuer, spec in zip((specs[0], *specs), specs, strict=False)]
    return Chain(tuple(certificates[:-1]), certificates[-1], private_key(specs[-1].key, specs[-1].curve))


def issue(spec: Spec, issuer: Spec) -> bytes:
    """The certificate, DER. Nothing is checked: the library's own setters would refuse half of what is wanted here."""
    key, signer = private_key(spec.key, spec.curve), private_key(issuer.key, issuer.curve)
    serial = 1 + int.from_bytes(hashlib.sha256(repr(spec.name).encode()).digest()[:8], "big")
    issuer_name = _subject(issuer) if spec.issuer is None else spec.issuer
    if isinstance(issuer_name, str):
        issuer_name = name(issuer_name)
    extensions: list[tuple[x509.ExtensionType, bool]] = []
    if spec.constraints is not None:
        extensions.append((spec.constraints, spec.constraints_critical))
    if spec.constraints is not None and spec.constraints.ca and spec.key_identifier:
        extensions.append((x509.SubjectKeyIdentifier.from_public_key(key.public_key()), False))
    if spec.usage is not None:
        extensions.append((_usage(spec.usage), spec.usage_critical))
    builder = x509.CertificateBuilder(
        issuer_name=issuer_name,
        subject_name=_subject(spec),
        public_key=key.public_key(),
        serial_number=serial if spec.serial is None else spec.serial,
        not_valid_before=spec.not_before.replace(tzinfo=None),
        not_valid_after=spec.not_after.replace(tzinfo=None),
        extensions=[
            x509.Extension(extension.oid, critical, extension)
            for extension, critical in (*extensions, *spec.extensions)
        ],
    )
    certificate = builder.sign(signer, spec.hash, ecdsa_deterministic=True)
    return certificate.public_bytes(Encoding.DER)


def resigned(certificate: bytes, edit: Callable[[bytes], bytes], signer: ec.EllipticCurvePrivateKey) -> bytes:
    """``certificate`` after an edit of the fields that are signed, signed anew: what no builder would make."""
    signed = x509.load_der_x509_certificate(certificate).tbs_certificate_bytes
    header = 2 + (signed[1] & 0x7F if signed[1] & 0x80 else 0)
    signed = tlv(0x30, edit(signed[header:]))
    signature = signer.sign(signed, ec.ECDSA(hashes.SHA384(), deterministic_signing=True))
    algorithm = bytes.fromhex("300a06082a8648ce3d040303")  # ecdsa-with-SHA384
    return tlv(0x30, signed + algorithm + tlv(0x03, b"\x00" + signature))


def tlv(tag: int, value: bytes) -> bytes:
    """DER of a value of less than 64 KiB."""
    size = len(value)
    if size < 0x80:
        return bytes([tag, size]) + value
    return bytes([tag, 0x81, size] if size < 0x100 else [tag, 0x82, size >> 8, size & 0xFF]) + value


def _subject(spec: Spec) -> x509.Name:
    return name(spec.name) if spec.subject is None else spec.subject


def name(common_name: str) -> x509.Name:
    return x509.Name(
        [
            x509.NameAttribute(NameOID.ORGANIZATION_NAME, "Strongroom tests: the key is public"),
            x509.NameAttribute(NameOID.COMMON_NAME, common_name),
        ]
    )


def _usage(bits: frozenset[str]) -> x509.KeyUsage:
    every = (
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
    return x509.KeyUsage(**{bit: bit in bits for bit in every})


GOOD_CHAIN = chain()
ROOT_DER = GOOD_CHAIN.cabundle[0]

NONCE = bytes(range(32))
COMMITMENT = Commitment(
    key=hashlib.shake_256(b"a channel key").digest(1216),
    lifetime=600,
    boot_id=hashlib.shake_256(b"a boot").digest(16),
    receipt_key=hashlib.shake_256(b"a receipt key").digest(32),
    model=hashlib.sha384(b"a model").digest(),
    configuration=hashlib.sha384(b"a configuration").digest(),
    entropy=Entropy.HOST,
)
PCRS: Mapping[int, bytes] = {
    **dict.fromkeys(range(16), ZERO_PCR),
    0: measured("image"),
    1: measured("boot"),
    2: measured("application"),
    4: once_extended(b"i-0123456789abcdef0"),
    16: once_extended(COMMITMENT.model),
    17: once_extended(COMMITMENT.configuration),
}
DEBUG_PCRS: Mapping[int, bytes] = {**PCRS, 0: ZERO_PCR, 1: ZERO_PCR, 2: ZERO_PCR}

ABSENT = object()
"""Takes a field out of a payload."""


def payload_fields(commitment: bytes | None = None, chain: Chain = GOOD_CHAIN, **changes: object) -> dict[str, object]:
    """The fields of a good document in AWS's order, with ``changes``; ABSENT takes one out."""
    encoded = COMMITMENT.encode() if commitment is None else commitment
    fields: dict[str, object] = {
        "module_id": "i-0123456789abcdef0-enc0123456789abcdef",
        "digest": "SHA384",
        "timestamp": int(NOW.timestamp() * 1000),
        "pcrs": PCRS,
        "certificate": chain.certificate,
        "cabundle": list(chain.cabundle),
        "public_key": None,
        "user_data": UserData(Purpose.CHANNEL, hashlib.sha384(encoded).digest()).encode(),
        "nonce": NONCE,
    }
    return {name: value for name, value in {**fields, **changes}.items() if value is not ABSENT}


@dataclass(frozen=True)
class Encoded:
    """A value that is CBOR already, to stand inside another as it is: chunked, long-winded, or twice."""

    cbor: bytes


def encode(value: object) -> bytes:
    """CBOR of ``value``, with what is ``Encoded`` in it taken as it is."""
    match value:
        case Encoded():
            return value.cbor
        case Mapping():
            return raw_map(list(value.items()))
        case list():
            return head(4, len(value)) + b"".join(map(encode, value))
        case _:
            encoded: bytes = cbor2.dumps(value)
            return encoded


def head(major: int, argument: int, *, size: int | None = None) -> bytes:
    """The head of a value (RFC 8949 section 3): shortest, or with an argument of ``size`` bytes."""
    if size is None:
        if argument < 24:
            return bytes([major << 5 | argument])
        size = next(size for size in (1, 2, 4, 8) if argument < 1 << 8 * size)
    return bytes([major << 5 | {1: 24, 2: 25, 4: 26, 8: 27}[size]]) + argument.to_bytes(size, "big")


def raw_map(entries: Sequence[tuple[object, object]], *, indefinite: bool = False) -> bytes:
    """A map exactly as listed: duplicates, any order, and if wanted of indefinite length."""
    body = b"".join(encode(key) + encode(value) for key, value in entries)
    return b"\xbf" + body + b"\xff" if indefinite else head(5, len(entries)) + body


def raw_array(items: Sequence[object]) -> bytes:
    """An array of indefinite length."""
    return b"\x9f" + b"".join(map(encode, items)) + b"\xff"


def chunked(value: bytes | str) -> Encoded:
    """A string of indefinite length, in two chunks."""
    parts = (value[: len(value) // 2], value[len(value) // 2 :])
    return Encoded((b"\x5f" if isinstance(value, bytes) else b"\x7f") + b"".join(map(cbor2.dumps, parts)) + b"\xff")


def high_s(signature: bytes) -> bytes:
    """The other good signature of the same message: s' = n - s, whichever of the two is larger."""
    s = int.from_bytes(signature[48:], "big")
    return signature[:48] + max(s, P384_ORDER - s).to_bytes(48, "big")


def low_s(signature: bytes) -> bytes:
    s = int.from_bytes(signature[48:], "big")
    return signature[:48] + min(s, P384_ORDER - s).to_bytes(48, "big")


def sign(payload: bytes, protected: bytes, key: ec.EllipticCurvePrivateKey) -> bytes:
    """r || s over the Sig_structure, each as long as the curve's order."""
    signed = cbor2.dumps(["Signature1", protected, b"", payload])
    der = key.sign(signed, ec.ECDSA(hashes.SHA384(), deterministic_signing=True))
    size = (key.curve.key_size + 7) // 8
    return b"".join(part.to_bytes(size, "big") for part in decode_dss_signature(der))


ES384_HEADER = cbor2.dumps({1: -35})


def document(
    fields: Mapping[str, object] | bytes | None = None,
    *,
    key: ec.EllipticCurvePrivateKey | None = None,
    protected: bytes = ES384_HEADER,
    unprotected: object = None,
    signature: bytes | None = None,
) -> bytes:
    """A signed document of ``fields``, or of a payload already encoded; without arguments, the good one."""
    payload = fields if isinstance(fields, bytes) else encode(payload_fields() if fields is None else fields)
    if signature is None:
        signature = sign(payload, protected, key or GOOD_CHAIN.key)
    return encode([protected, {} if unprotected is None else unprotected, payload, signature])


def evidence(made: bytes | None = None, commitment: bytes | None = None) -> bytes:
    """Evidence as an enclave would send it; without arguments, the good one."""
    encoded = COMMITMENT.encode() if commitment is None else commitment
    return Evidence(document() if made is None else made, encoded).encode()


POLICY = f"""\
version = 1
[anchor]
trust = "EMULATED"
root = "root.der"
root_sha256 = "{hashlib.sha256(ROOT_DER).hexdigest()}"
[freshness]
max_age_seconds = 300
leeway_seconds = 120
[debug]
forbid = true
[binding]
purpose = "channel"
[[release]]
name = "one"
pcr0 = "{PCRS[0].hex()}"
pcr1 = "{PCRS[1].hex()}"
pcr2 = "{PCRS[2].hex()}"
[[release]]
name = "two"
pcr0 = "{measured("image 2").hex()}"
pcr1 = "{measured("boot 2").hex()}"
pcr2 = "{measured("application 2").hex()}"
pcr8 = "{measured("signer").hex()}"
[model]
require = ["sha384:{COMMITMENT.model.hex()}"]
[configuration]
require = ["sha384:{COMMITMENT.configuration.hex()}"]
[pcrs.3]
forbid = true
[pcrs.4]
require = ["{PCRS[4].hex()}"]
[pcrs.8]
forbid = true
[module_id]
ignore = "it changes at every start"
"""
"""Accepts the good Evidence. Its root belongs beside it as ``root.der``."""
