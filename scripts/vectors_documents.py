"""Test vectors of bare documents: steps 1 to 5 of PROTOCOL.md section 3; step 4 is in vectors_chain."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime

import cbor2
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.utils import decode_dss_signature

from attestation.reference import ZERO_PCR
from conformance.vectors import ACCEPTED, Subject, Vector
from tests.pki import forge


@dataclass(frozen=True)
class Case:
    """A document with one thing wrong, or one thing unusual. ``expect`` is ``accepted`` or the code of the failure."""

    name: str
    expect: str
    about: str
    document: bytes
    at: datetime = forge.NOW
    anchor: str = "root.der"

    def vector(self) -> Vector:
        return Vector(
            about=self.about,
            subject=Subject.DOCUMENT,
            expect=self.expect,
            step=None if self.expect == ACCEPTED else int(self.name[:2]),
            time=self.at,
            anchor=self.anchor,
            payload=self.document,
        )


def cases() -> Iterator[Case]:
    yield Case("accepted-document", ACCEPTED, "as the Nitro Secure Module signs it", forge.document())
    yield from _outer()
    yield from _payload()
    yield from _cose()
    yield from _headers()
    yield from _fields()
    yield from _registers()
    yield from _signatures()


def _outer() -> Iterator[Case]:
    """Step 1, the COSE object."""
    good = forge.document()
    protected, unprotected, payload, signature = cbor2.loads(good)

    def case(name: str, about: str, made: bytes) -> Case:
        return Case(f"01-document-{name}", "malformed_cbor", about, made)

    yield case("empty", "no bytes", b"")
    yield case("truncated", "the last byte is missing", good[:-1])
    yield case("trailing", "a byte behind the COSE object", good + b"\x00")
    yield case("twice", "the document twice", good + good)
    many = forge.payload_fields(cabundle=[bytes(1024)] * 16)
    yield case("large", "more than 16,384 bytes", forge.document(many, signature=signature))
    yield case("length-huge", "an array of 2**64-1 items", b"\x9b" + b"\xff" * 8 + good[1:])
    yield case("reserved-length", "a head whose length is reserved", b"\x9c" + good[1:])
    yield case("break", "a break and nothing before it", b"\xff" + good)
    yield case("depth", "nine arrays inside one another", forge.document(b"\x81" * 9 + b"\x00"))
    yield case("foreign-tag", "tag 17, a MAC", b"\xd1" + good)
    yield case("sign-tag", "tag 98, a COSE_Sign of many signers", b"\xd8\x62" + good)
    yield case("tag-twice", "tag 18 twice", b"\xd2\xd2" + good)

    items: list[object] = [protected, unprotected, payload, signature]

    def replaced(index: int, value: object) -> bytes:
        return forge.encode([*items[:index], value, *items[index + 1 :]])

    yield case("indefinite-array", "the COSE array is of indefinite length", forge.raw_array(items))
    yield case("indefinite-unprotected", "so is the unprotected header", replaced(1, forge.Encoded(b"\xbf\xff")))
    yield case("chunked-protected", "the protected header is in chunks", replaced(0, forge.chunked(protected)))
    yield case("chunked-payload", "the payload is in chunks", replaced(2, forge.chunked(payload)))
    yield case("chunked-signature", "the signature is in chunks", replaced(3, forge.chunked(signature)))
    twice = forge.Encoded(forge.raw_map([(4, b"a"), (4, b"b")]))
    yield case("duplicate-unprotected", "a key twice in the unprotected header", replaced(1, twice))


def _payload() -> Iterator[Case]:
    """Step 1, the payload: all of these are signed."""
    fields = list(forge.payload_fields().items())

    def case(name: str, about: str, payload: bytes, expect: str = "malformed_cbor") -> Case:
        return Case(f"01-{name}", expect, about, forge.document(payload))

    def changed(name: str, about: str, **changes: object) -> Case:
        return case(f"document-{name}", about, forge.encode(forge.payload_fields(None, forge.GOOD_CHAIN, **changes)))

    indefinite = forge.raw_map(fields, indefinite=True)
    about = "the payload's outermost map is of indefinite length, as AWS writes it since 2025-08"
    yield case("indefinite-payload", about, indefinite, ACCEPTED)
    yield case("document-no-break", "that map without its end", indefinite[:-1])
    yield case("document-payload-empty", "a payload of no bytes", b"")
    yield case("document-payload-trailing", "a byte behind the payload", forge.encode(dict(fields)) + b"\x00")
    yield case("document-payload-tag", "a tag on the payload", b"\xd2" + forge.encode(dict(fields)))
    yield case("document-boolean", "the payload is a boolean", b"\xf5")
    nonces = [*fields, ("nonce", forge.NONCE)]
    yield case("document-duplicate-key", "the payload has two nonces", forge.raw_map(nonces))
    long_key = forge.Encoded(forge.head(3, 5, size=1) + b"nonce")
    about = "two nonces, the key of one written with a longer head"
    yield case("document-duplicate-key-long", about, forge.raw_map([*fields, (long_key, bytes(32))]))
    about = "two nonces in a map of indefinite length"
    yield case("document-duplicate-key-indefinite", about, forge.raw_map(nonces, indefinite=True))
    yield case("document-key-bytes", "a field's name is a byte string", forge.raw_map([*fields, (b"nonce", None)]))
    chunked_key = [(forge.chunked(key) if key == "nonce" else key, value) for key, value in fields]
    yield case("document-chunked-key", "a field's name is in chunks", forge.raw_map(chunked_key))

    registers = list(forge.PCRS.items())
    twice = forge.Encoded(forge.raw_map([*registers, (0, forge.measured("another image"))]))
    yield changed("duplicate-pcr", "PCR0 twice", pcrs=twice)
    long_zero = forge.Encoded(forge.head(0, 0, size=1))
    twice = forge.Encoded(forge.raw_map([*registers, (long_zero, forge.measured("another image"))]))
    yield changed("duplicate-pcr-long", "PCR0 twice, one index in two bytes", pcrs=twice)
    in_indefinite = forge.Encoded(forge.raw_map(registers, indefinite=True))
    yield changed("indefinite-inside", "the map of registers is of indefinite length", pcrs=in_indefinite)
    in_chunks = forge.Encoded(forge.raw_map([(k, forge.chunked(v) if k == 0 else v) for k, v in registers]))
    yield changed("chunked-pcr", "a register is in chunks", pcrs=in_chunks)
    bundle = forge.GOOD_CHAIN.cabundle
    in_array = forge.Encoded(forge.raw_array(bundle))
    yield changed("indefinite-cabundle", "the bundle is of indefinite length", cabundle=in_array)
    in_bundle = [*bundle[:-1], forge.chunked(bundle[-1])]
    yield changed("chunked-cabundle", "a certificate of the bundle is in chunks", cabundle=in_bundle)
    yield changed("chunked-text", "the module_id is in chunks", module_id=forge.chunked("i-0-enc0"))
    leaf = forge.chunked(forge.GOOD_CHAIN.certificate)
    yield changed("chunked-certificate", "the certificate is in chunks", certificate=leaf)
    yield changed("chunked-nonce", "the nonce is in chunks", nonce=forge.chunked(forge.NONCE))
    yield changed("chunked-nothing", "the nonce is in no chunks", nonce=forge.Encoded(b"\x5f\xff"))
    yield changed("float", "the timestamp is a float", timestamp=1.5)
    yield changed("tagged-time", "the timestamp is tagged as one", timestamp=forge.Encoded(b"\xc1\x1a\x69\xa4\x2a\xc0"))
    yield changed("bignum", "the timestamp is a bignum", timestamp=forge.Encoded(b"\xc2\x41\x01"))
    yield changed("undefined", "the nonce is undefined", nonce=forge.Encoded(b"\xf7"))
    yield changed("false", "the nonce is false", nonce=False)
    yield changed("not-utf-8", "the module_id is no UTF-8", module_id=forge.Encoded(b"\x62\xc3\x28"))


def _cose() -> Iterator[Case]:
    """Step 2, the structure."""
    good = forge.document()
    items = cbor2.loads(good)
    yield Case("02-tagged", ACCEPTED, "with tag 18", b"\xd2" + good)

    def case(name: str, about: str, made: bytes) -> Case:
        return Case(f"02-{name}", "malformed_cose", about, made)

    yield case("array-of-3", "no signature", cbor2.dumps(items[:3]))
    yield case("array-of-5", "a fifth item", cbor2.dumps([*items, b""]))
    yield case("map", "a map in place of the array", cbor2.dumps(dict(enumerate(items))))
    yield case("detached", "the payload is null", cbor2.dumps([items[0], {}, None, items[3]]))
    yield case("payload-map", "the payload is a map, not a byte string", forge.encode([items[0], {}, {}, items[3]]))
    yield case("header-open", "the protected header is a map", cbor2.dumps([{1: -35}, {}, *items[2:]]))
    yield case("unprotected", "an unprotected header", forge.document(unprotected={4: b"kid"}))
    unprotected_null = cbor2.dumps([items[0], None, *items[2:]])
    yield case("unprotected-null", "the unprotected header is null", unprotected_null)
    signature = items[3]
    yield case("signature-null", "the signature is null", cbor2.dumps([*items[:3], None]))
    yield case("signature-empty", "a signature of no bytes", forge.document(signature=b""))
    yield case("signature-95", "a signature of 95 bytes", forge.document(signature=signature[:95]))
    yield case("signature-97", "a signature of 97 bytes", forge.document(signature=signature + b"\x00"))
    signed = cbor2.dumps(["Signature1", items[0], b"", items[2]])
    der = forge.GOOD_CHAIN.key.sign(signed, ec.ECDSA(hashes.SHA384(), deterministic_signing=True))
    yield case("signature-der", "a good signature in DER", forge.document(signature=der))
    for curve in (ec.SECP256R1(), ec.SECP521R1()):
        name = f"p{curve.key_size}"
        made = forge.document(key=forge.private_key("leaf", curve))
        yield case(f"signature-{name}", f"a signature of a key on {name.upper()}", made)


def _headers() -> Iterator[Case]:
    """Step 2, the protected header, which is signed."""

    def case(name: str, about: str, protected: bytes, expect: str = "malformed_cose") -> Case:
        return Case(f"02-{name}", expect, about, forge.document(protected=protected))

    for name, about, header in (
        ("es256", "ES256", {1: -7}),
        ("es512", "ES512", {1: -36}),
        ("es256k", "ES256K", {1: -47}),
        ("eddsa", "EdDSA", {1: -8}),
        ("ps384", "PS384", {1: -38}),
        ("hmac", "HMAC 384", {1: 6}),
        ("unsigned", "-1, as QEMU's unsigned documents do", {1: -1}),
        ("algorithm-text", "the algorithm in letters", {1: "ES384"}),
        ("algorithm-null", "null", {1: None}),
        ("no-algorithm", "nothing", {}),
        ("key-text", "the algorithm under the text '1'", {"1": -35}),
    ):
        yield case(name, f"the header says {about}", cbor2.dumps(header), "wrong_algorithm")
    yield case("empty-header", "the header is of no bytes", b"", "wrong_algorithm")
    made = forge.document(protected=b"", unprotected={1: -35})
    yield Case("02-algorithm-unprotected", "wrong_algorithm", "the algorithm stands in the unprotected header", made)
    yield case("critical-header", "a further protected header", cbor2.dumps({1: -35, 2: [4]}))
    yield case("header-not-map", "the header is an array", cbor2.dumps([1, -35]))
    yield case("header-trailing", "a byte behind the header's map", forge.ES384_HEADER + b"\x00")
    yield case("header-duplicate", "the algorithm twice", forge.raw_map([(1, -35), (1, -35)]))
    yield case("header-duplicate-other", "two algorithms", forge.raw_map([(1, -7), (1, -35)]))
    yield case("header-indefinite", "a map of indefinite length", forge.raw_map([(1, -35)], indefinite=True))

    unsigned = forge.payload_fields(module_id="i-234-enc5678", certificate=bytes(64), cabundle=[bytes(64)])
    made = forge.document(unsigned, protected=cbor2.dumps({1: -1}), signature=bytes(64))
    yield Case("02-qemu", "wrong_algorithm", "a document as QEMU's nitro-enclave machine writes it, unsigned", made)
    everything = {index: forge.measured(f"register {index}") for index in range(31, -1, -1)}
    seconds = int(forge.NOW.timestamp())
    alone = forge.issue(forge.LEAF, forge.LEAF)
    fake = forge.payload_fields(pcrs=everything, timestamp=seconds, certificate=alone, cabundle=None)
    payload = forge.encode(fake)
    signature = forge.sign(payload, forge.ES384_HEADER, forge.private_key("leaf"))
    made = cbor2.dumps([forge.ES384_HEADER, None, payload, signature])
    about = "a development fake: unprotected header and bundle are null, the leaf signs itself, the time is in seconds"
    yield Case("02-fake", "malformed_cose", about, made)


def _fields() -> Iterator[Case]:
    """Step 3."""

    def case(name: str, about: str, expect: str = "malformed_document", /, **changes: object) -> Case:
        return Case(
            f"03-{name}", expect, about, forge.document(forge.payload_fields(None, forge.GOOD_CHAIN, **changes))
        )

    yield case("unknown-field", "a field that AWS does not define", extra=1)
    tpm = {
        "pcrs": forge.ABSENT,
        "nitrotpm_pcrs": dict(forge.PCRS),
        "module_id": "i-0123456789abcdef0-tpm0123456789abcdef",
    }
    yield case("nitrotpm", "a NitroTPM document: other registers", **tpm)
    for field in ("module_id", "digest", "timestamp", "pcrs", "certificate", "cabundle"):
        name = "module" if field == "module_id" else field
        yield case(f"without-{name}", f"no {field}", **{field: forge.ABSENT})
        yield case(f"{name}-null", f"{field} is null", **{field: None})
    yield case("module-empty", "an empty module_id", module_id="")
    yield case("module-128", "a module_id of 128 characters", ACCEPTED, module_id="i" * 128)
    yield case("module-129", "a module_id of 129 characters", module_id="i" * 129)
    yield case("module-bytes", "module_id is a byte string", module_id=b"i-0")
    yield case("module-escape", "a terminal's escape sequence as module_id", module_id="i-\x1b[2Kenc")
    yield case("digest", "another digest", digest="SHA256")
    yield case("digest-case", "the digest in small letters", digest="sha384")
    yield case("timestamp-zero", "the timestamp is 0", timestamp=0)
    yield case("timestamp-negative", "the timestamp is negative", timestamp=-1)
    yield case("timestamp-huge", "the timestamp is beyond every calendar", timestamp=2**64 - 1)
    yield case("timestamp-text", "the timestamp is a text", timestamp="now")
    yield case("certificate-empty", "a certificate of no bytes", certificate=b"")
    yield case("certificate-large", "a certificate of 1025 bytes", certificate=bytes(1025))
    yield case("cabundle-empty", "an empty bundle", cabundle=[])
    yield case("cabundle-entry", "a text in the bundle", cabundle=["root"])
    root, *rest = forge.GOOD_CHAIN.cabundle
    yield case("cabundle-entry-empty", "an entry of no bytes in the bundle", cabundle=[root, b"", *rest])
    yield case("cabundle-entry-large", "an entry of 1025 bytes in the bundle", cabundle=[root, bytes(1025), *rest])
    yield case("cabundle-bytes", "the bundle is a certificate, not an array", cabundle=root)
    for field in ("nonce", "user_data", "public_key"):
        yield case(f"{field}-1025", f"{field} has 1025 bytes", **{field: bytes(1025)})
        yield case(f"{field}-text", f"{field} is a text", **{field: "text"})
        for size in (0, 512, 513, 1024):
            yield case(f"{field}-{size}", f"{field} has {size} bytes", ACCEPTED, **{field: bytes(size)})
    nothing = dict.fromkeys(("nonce", "user_data", "public_key"))
    yield case("optional-null", "every optional field is null", ACCEPTED, **nothing)
    absent = dict.fromkeys(nothing, forge.ABSENT)
    yield case("optional-absent", "there is no optional field", ACCEPTED, **absent)
    payload = cbor2.dumps(list(forge.payload_fields().items()))
    yield Case("03-payload-array", "malformed_document", "the payload is an array", forge.document(payload))
    yield Case("03-payload-null", "malformed_document", "the payload says null", forge.document(b"\xf6"))
    reverse = dict(reversed(forge.payload_fields().items()))
    yield Case("03-reverse", ACCEPTED, "the fields in the reverse of AWS's order", forge.document(reverse))


def _registers() -> Iterator[Case]:
    """Step 3, the registers."""

    def case(name: str, about: str, pcrs: object, expect: str = "malformed_document") -> Case:
        return Case(f"03-{name}", expect, about, forge.document(forge.payload_fields(pcrs=pcrs)))

    yield case("pcr-31", "every register, 0 to 31", {**dict.fromkeys(range(32), ZERO_PCR), **forge.PCRS}, ACCEPTED)
    yield case("pcr-32", "register 32", {**forge.PCRS, 32: ZERO_PCR})
    yield case("pcr-negative", "register -1", {**forge.PCRS, -1: ZERO_PCR})
    yield case("pcr-huge", "register 2**64-1", {**forge.PCRS, 2**64 - 1: ZERO_PCR})
    yield case("pcr-text", "register '0'", {"0": ZERO_PCR})
    for name, size in (("empty", 0), ("short", 32), ("47", 47), ("49", 49), ("long", 64)):
        yield case(f"pcr-{name}", f"a register of {size} bytes", {**forge.PCRS, 5: bytes(size)})
    yield case("pcr-null", "a register is null", {**forge.PCRS, 5: None})
    yield case("pcr-value-text", "a register is a text", {**forge.PCRS, 5: "0" * 48})
    yield case("pcrs-one", "a single register", {0: forge.PCRS[0]}, ACCEPTED)
    yield case("pcrs-none", "no register", {})
    yield case("pcrs-array", "the registers in an array", [ZERO_PCR])
    yield case(
        "pcrs-debug", "the registers of debug mode: authentic, and for a policy to judge", forge.DEBUG_PCRS, ACCEPTED
    )
    yield case(
        "pcrs-zero", "every register is zero: for a policy to judge", dict.fromkeys(range(16), ZERO_PCR), ACCEPTED
    )
    yield case("pcrs-order", "the registers in the reverse order", dict(reversed(list(forge.PCRS.items()))), ACCEPTED)


def _signatures() -> Iterator[Case]:
    """Step 5."""
    payload = forge.encode(forge.payload_fields())
    good, key = forge.sign(payload, forge.ES384_HEADER, forge.GOOD_CHAIN.key), forge.GOOD_CHAIN.key
    yield Case("05-high-s", ACCEPTED, "the larger s", forge.document(signature=forge.high_s(good)))
    yield Case("05-low-s", ACCEPTED, "the smaller s", forge.document(signature=forge.low_s(good)))

    def case(name: str, about: str, signature: bytes, signed: bytes = payload) -> Case:
        return Case(f"05-{name}", "bad_signature", about, forge.document(signed, signature=signature))

    r, s = good[:48], good[48:]
    order, above = forge.P384_ORDER.to_bytes(48, "big"), (forge.P384_ORDER + 1).to_bytes(48, "big")
    yield case("zero", "96 zero bytes", bytes(96))
    yield case("ones", "96 bytes of ones", b"\xff" * 96)
    yield case("r-is-zero", "r is 0", bytes(48) + s)
    yield case("s-is-zero", "s is 0", r + bytes(48))
    yield case("r-is-order", "r is the order of the curve", order + s)
    yield case("s-is-order", "s is the order of the curve", r + order)
    yield case("both-are-order", "r and s are the order of the curve", order + order)
    yield case("r-above-order", "r is one more than the order of the curve", above + s)
    yield case("s-above-order", "s is one more than the order of the curve", r + above)
    yield case("swapped", "s before r", s + r)
    yield case("little-endian", "r and s with their last byte first", r[::-1] + s[::-1])
    yield case("last-byte", "the last bit differs", good[:-1] + bytes([good[-1] ^ 1]))
    yield case("first-byte", "the first bit differs", bytes([good[0] ^ 0x80]) + good[1:])
    later = forge.encode(forge.payload_fields(timestamp=int(forge.NOW.timestamp() * 1000) + 1))
    yield case("altered", "a millisecond was added to the timestamp", good, later)
    indefinite = forge.raw_map(list(forge.payload_fields().items()), indefinite=True)
    yield case("re-encoded", "the signature is over the same payload in definite lengths", good, indefinite)

    def signed_by(name: str, about: str, signer: str) -> Case:
        return case(name, about, forge.sign(payload, forge.ES384_HEADER, forge.private_key(signer)))

    yield signed_by("other-key", "signed by another key", "another")
    yield signed_by("issuer", "signed by the key of the leaf's issuer", "instance")
    yield signed_by("root", "signed by the root's key", "root")

    def over(name: str, about: str, signed: bytes, digest: hashes.HashAlgorithm | None = None) -> Case:
        der = key.sign(signed, ec.ECDSA(digest or hashes.SHA384(), deterministic_signing=True))
        return case(name, about, b"".join(part.to_bytes(48, "big") for part in decode_dss_signature(der)))

    structure = ["Signature1", forge.ES384_HEADER, b"", payload]
    yield over("sha256", "the Sig_structure was hashed with SHA-256", cbor2.dumps(structure), hashes.SHA256())
    yield over("context", "the context of a COSE_Sign", cbor2.dumps(["Signature", *structure[1:]]))
    yield over("external", "an external_aad", cbor2.dumps([*structure[:2], b"aad", payload]))
    yield over(
        "no-header", "a Sig_structure without the protected header", cbor2.dumps([structure[0], b"", b"", payload])
    )
    yield over("payload-alone", "the payload was signed, not a Sig_structure", payload)
