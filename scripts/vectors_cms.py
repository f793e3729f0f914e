"""Makes tests/vectors/cms/: what KMS answers an enclave with, CMS EnvelopedData in BER (RFC 5652, section 6).

Written from the RFCs with hashes, AES in CBC mode and arithmetic, and with nothing of ``enclave``; OAEP is done here
because its seed must be fixed for the same run to give the same bytes.

Each vector has ``expect``: ``accepted``, with the ``plaintext``, or the code of the refusal. The recipient's key is
``key.der`` (PKCS#8), a test key. Byte strings are hexadecimal.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace

from cryptography.hazmat.primitives.asymmetric import rsa
from cryptography.hazmat.primitives.ciphers import Cipher
from cryptography.hazmat.primitives.ciphers.algorithms import AES
from cryptography.hazmat.primitives.ciphers.modes import CBC
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat, PublicFormat

P = int(
    "e26221f57893c370bb6967081d911a6be202962e8ab9a81a7e0fca88935d19b67709af644bbd6a117e8abbb64c6f1e2c84a7727a7f80ab2d"
    "3d7a933eef74385ad9fc687442a27434571c4f3ac0c4cf516a2cba35d4cdeeb751af4eed23f072fa25d9e7cd41e88e25ea92dd1372a20797"
    "ecb4a0a176ab56b86886e4b8187e02eb",
    16,
)
Q = int(
    "d5343bdb44704303a9d5df6a7d3cd7a4d1caf0a7f9e203a531a9da926cb4100ce019213175dc73c6a21949699be880139a373d7a10aa0b64"
    "29fd34b571a4fac52ceb434b2bdafe3d7135e0beecb9e685d47b4915aea0fe4e2ce652b550936a34abc9aefa0599bfa749794b6b802a006d"
    "91f602f9f46db39246d82efa7fe59723",
    16,
)
N, E = P * Q, 65537
D = pow(E, -1, (P - 1) * (Q - 1))
KEY = rsa.RSAPrivateNumbers(P, Q, D, D % (P - 1), D % (Q - 1), pow(Q, -1, P), rsa.RSAPublicNumbers(E, N)).private_key()
KEY_ID = hashlib.sha256(KEY.public_key().public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)).digest()

CONTENT_KEY = hashlib.sha256(b"strongroom vectors: content key").digest()
IV = hashlib.sha256(b"strongroom vectors: iv").digest()[:16]
SEED = hashlib.sha256(b"strongroom vectors: OAEP seed").digest()
PLAINTEXT = bytes(range(32))


# --- BER --------------------------------------------------------------------------------------------------------------

Form = Callable[[int, bytes], bytes]
"""How a constructed element is written, from its tag and its content."""


def definite(identifier: int, content: bytes) -> bytes:
    size = len(content)
    if size < 0x80:
        return bytes([identifier, size]) + content
    octets = size.to_bytes((size.bit_length() + 7) // 8)
    return bytes([identifier, 0x80 | len(octets)]) + octets + content


def indefinite(identifier: int, content: bytes) -> bytes:
    return bytes([identifier, 0x80]) + content + b"\x00\x00"


def wasteful(identifier: int, content: bytes) -> bytes:
    """A length with leading zeros, as BER allows."""
    return bytes([identifier, 0x83]) + len(content).to_bytes(3) + content


def oid(dotted: str) -> bytes:
    first, second, *arcs = map(int, dotted.split("."))
    content = b""
    for arc in (40 * first + second, *arcs):
        groups = [arc & 0x7F]
        while arc := arc >> 7:
            groups.append(0x80 | arc & 0x7F)
        content += bytes(reversed(groups))
    return definite(0x06, content)


def integer(value: int) -> bytes:
    return definite(0x02, value.to_bytes(value.bit_length() // 8 + 1))


def octets(content: bytes) -> bytes:
    return definite(0x04, content)


def sequence(*parts: bytes) -> bytes:
    return definite(0x30, b"".join(parts))


NULL = b"\x05\x00"
ENVELOPED_DATA, DATA, SIGNED_DATA = "1.2.840.113549.1.7.3", "1.2.840.113549.1.7.1", "1.2.840.113549.1.7.2"
RSAES_OAEP, RSA_PKCS1, MGF1 = "1.2.840.113549.1.1.7", "1.2.840.113549.1.1.1", "1.2.840.113549.1.1.8"
SHA1, SHA256, SHA384 = "1.3.14.3.2.26", "2.16.840.1.101.3.4.2.1", "2.16.840.1.101.3.4.2.2"
AES128_CBC, AES256_CBC, AES256_GCM = (f"2.16.840.1.101.3.4.1.{last}" for last in (2, 42, 46))


# --- Cryptography -----------------------------------------------------------------------------------------------------


def oaep(message: bytes, *, label: bytes = b"") -> bytes:
    """RFC 8017 section 7.1.1 with SHA-256 and MGF1, for a key of 2048 bits."""
    block = hashlib.sha256(label).digest() + bytes(256 - len(message) - 66) + b"\x01" + message
    masked = xor(block, mgf1(SEED, len(block)))
    encoded = b"\x00" + xor(SEED, mgf1(masked, 32)) + masked
    return pow(int.from_bytes(encoded), E, N).to_bytes(256)


def mgf1(seed: bytes, size: int) -> bytes:
    blocks = (hashlib.sha256(seed + counter.to_bytes(4)).digest() for counter in range(-(-size // 32)))
    return b"".join(blocks)[:size]


def xor(one: bytes, other: bytes) -> bytes:
    return bytes(a ^ b for a, b in zip(one, other, strict=True))


def pad(content: bytes) -> bytes:
    missing = 16 - len(content) % 16
    return content + bytes([missing]) * missing


def cbc(padded: bytes) -> bytes:
    encryptor = Cipher(AES(CONTENT_KEY), CBC(IV)).encryptor()
    return encryptor.update(padded) + encryptor.finalize()


# --- An answer, and what is wrong with it -----------------------------------------------------------------------------


def sha256(parameters: bytes = NULL, *, algorithm: str = SHA256) -> bytes:
    return sequence(oid(algorithm), parameters)


def oaep_algorithm(
    *, hashed: bytes | None = None, mask: bytes | None = None, extra: bytes = b"", algorithm: str = RSAES_OAEP
) -> bytes:
    hashed = sha256() if hashed is None else hashed
    mask = sequence(oid(MGF1), sha256()) if mask is None else mask
    return sequence(oid(algorithm), sequence(definite(0xA0, hashed), definite(0xA1, mask), extra))


def chunks(*parts: bytes, form: Form = indefinite) -> bytes:
    return form(0xA0, b"".join(octets(part) for part in parts))


@dataclass(frozen=True)
class Answer:
    """The parts of an answer, in the order in which they are written; the defaults are KMS's."""

    content_type: bytes = oid(ENVELOPED_DATA)
    version: bytes = integer(2)
    originator: bytes = b""
    recipient_version: bytes = integer(2)
    rid: bytes = definite(0x80, KEY_ID)
    key_algorithm: bytes = field(default_factory=oaep_algorithm)
    encrypted_key: bytes = field(default_factory=lambda: oaep(CONTENT_KEY))
    recipients: int = 1
    inner_type: bytes = oid(DATA)
    cipher: bytes = field(default_factory=lambda: sequence(oid(AES256_CBC), octets(IV)))
    content: bytes = field(default_factory=lambda: chunks(cbc(pad(PLAINTEXT))))
    attributes: bytes = b""
    form: Form = indefinite

    def encode(self) -> bytes:
        recipient = sequence(self.recipient_version, self.rid, self.key_algorithm, octets(self.encrypted_key))
        infos = definite(0x31, recipient * self.recipients)
        inner = self.form(0x30, self.inner_type + self.cipher + self.content)
        enveloped = self.form(0x30, self.version + self.originator + infos + inner + self.attributes)
        return self.form(0x30, self.content_type + self.form(0xA0, enveloped))


KMS = Answer()


def files() -> Mapping[str, bytes]:
    """The files of the folder: the same run gives the same bytes."""
    made = {"key.der": KEY.private_bytes(Encoding.DER, PrivateFormat.PKCS8, NoEncryption())}
    for name, vector in (*_accepted(), *_malformed(), *_unsupported(), *_unopened()):
        assert f"{name}.json" not in made
        made[f"{name}.json"] = (json.dumps(vector, indent=1) + "\n").encode()
    return made


Vectors = Iterator[tuple[str, dict[str, str]]]


def _vector(expect: str, about: str, cms: bytes | Answer) -> dict[str, str]:
    return {"about": about, "expect": expect, "cms": (cms if isinstance(cms, bytes) else cms.encode()).hex()}


def _accepted() -> Vectors:
    def opens(about: str, cms: Answer, plaintext: bytes = PLAINTEXT) -> dict[str, str]:
        return _vector("accepted", about, cms) | {"plaintext": plaintext.hex()}

    sealed = cbc(pad(PLAINTEXT))
    yield "kms", opens("as KMS sends it: indefinite lengths, one chunk", KMS)
    yield "primitive", opens("the ciphertext in one primitive element", replace(KMS, content=definite(0x80, sealed)))
    yield "definite", opens("definite lengths throughout", replace(KMS, form=definite))
    yield "wasteful", opens("lengths with leading zeros", replace(KMS, form=wasteful))
    one, two = chunks(sealed[:5], b"", sealed[5:40], sealed[40:]), chunks(*(bytes([each]) for each in sealed))
    yield "chunks", opens("the ciphertext in chunks of any size, one of them empty", replace(KMS, content=one))
    yield "chunks-bytes", opens("the ciphertext in chunks of one byte", replace(KMS, content=two))
    cut = chunks(sealed[:16], sealed[16:], form=definite)
    yield "chunks-definite", opens("chunks in an element of definite length", replace(KMS, content=cut))
    nested = indefinite(0xA0, indefinite(0x24, octets(sealed[:16]) + octets(sealed[16:20])) + octets(sealed[20:]))
    yield "chunks-nested", opens("chunks inside a chunk", replace(KMS, content=nested))
    bare = oaep_algorithm(hashed=sha256(b""), mask=sequence(oid(MGF1), sha256(b"")))
    yield "hash-without-null", opens("hashes without parameters (RFC 4055)", replace(KMS, key_algorithm=bare))
    for name, plaintext in (("empty", b""), ("block", bytes(16)), ("long", bytes(range(256)) * 16)):
        made = replace(KMS, content=chunks(cbc(pad(plaintext))))
        yield f"plaintext-{name}", opens(f"a plaintext of {len(plaintext)} bytes", made, plaintext)


def _malformed() -> Vectors:
    def refused(about: str, cms: bytes | Answer) -> dict[str, str]:
        return _vector("malformed_cms", about, cms)

    good, sealed = KMS.encode(), cbc(pad(PLAINTEXT))
    yield "nothing", refused("no bytes", b"")
    yield "cut", refused("the last byte is missing", good[:-1])
    yield "cut-element", refused("cut inside the encrypted key", good[:200])
    yield "trailing", refused("a byte behind it", good + b"\x00")
    yield "trailing-element", refused("an element behind it", good + NULL)
    yield "without-end", refused("an indefinite element without its end", good[:-2])
    yield "end-alone", refused("an end without a beginning", b"\x00\x00")
    yield "end-in-definite", refused("an end inside a definite length", definite(0x30, b"\x00\x00"))
    yield "end-with-length", refused("an end with a length", b"\x30\x80\x00\x01\x00\x00\x00")
    yield (
        "indefinite-primitive",
        refused("a primitive element of indefinite length", b"\x30\x80\x04\x80\x00\x00\x00\x00"),
    )
    yield "longer-than-parent", refused("an element longer than what holds it", b"\x30\x04\x04\x03\x00\x00")
    yield "long-length", refused("a length of four bytes", b"\x30\x84\x00\x00\x00\x02" + NULL)
    yield "long-tag", refused("a tag of two bytes", definite(0x30, b"\x1f\x81\x00"))
    deep = b""
    for _ in range(17):
        deep = definite(0x30, deep)
    yield "deep", refused("17 elements inside one another", deep)
    yield "large", refused("more than 16,384 bytes", replace(KMS, content=chunks(bytes(16_384))))
    yield "not-a-sequence", refused("a set on the outside", b"\x31" + good[1:])
    yield "content-absent", refused("a ContentInfo without content", sequence(oid(ENVELOPED_DATA)))
    yield "originator", refused("originatorInfo, which KMS does not send", replace(KMS, originator=definite(0xA0, b"")))
    yield "attributes", refused("unprotectedAttrs, which KMS does not send", replace(KMS, attributes=b"\xa1\x00"))
    yield "recipients-none", refused("no recipient", replace(KMS, recipients=0))
    yield "recipients-two", refused("two recipients", replace(KMS, recipients=2))
    issuer = sequence(sequence(), integer(1))
    yield "issuer-and-serial", refused("a recipient named by its certificate", replace(KMS, rid=issuer))
    yield "key-id-short", refused("a key identifier of 20 bytes", replace(KMS, rid=definite(0x80, KEY_ID[:20])))
    for size in (0, 255, 257):
        key = oaep(CONTENT_KEY)[:size].ljust(size, b"\x00")
        yield f"encrypted-key-{size}", refused(f"an encrypted key of {size} bytes", replace(KMS, encrypted_key=key))
    absent = sequence(oid(RSAES_OAEP))
    yield "oaep-absent", refused("OAEP without parameters, so with SHA-1", replace(KMS, key_algorithm=absent))
    defaults = sequence(oid(RSAES_OAEP), sequence())
    yield "oaep-defaults", refused("OAEP with its defaults, so with SHA-1", replace(KMS, key_algorithm=defaults))
    label = oaep_algorithm(extra=definite(0xA2, sequence(oid("1.2.840.113549.1.1.9"), octets(b""))))
    yield "oaep-label", refused("OAEP with a pSourceAlgorithm", replace(KMS, key_algorithm=label))
    odd = oaep_algorithm(hashed=sha256(octets(b"")))
    yield "hash-parameters", refused("a hash with parameters", replace(KMS, key_algorithm=odd))
    unmasked = oaep_algorithm(mask=sequence(oid(MGF1)))
    yield "mask-parameters", refused("a mask without its hash", replace(KMS, key_algorithm=unmasked))
    yield "iv-absent", refused("no initialization vector", replace(KMS, cipher=sequence(oid(AES256_CBC))))
    for size in (15, 17):
        iv = sequence(oid(AES256_CBC), octets(bytes(size)))
        yield f"iv-{size}", refused(f"an initialization vector of {size} bytes", replace(KMS, cipher=iv))
    yield "ciphertext-absent", refused("no ciphertext", replace(KMS, content=b""))
    yield "ciphertext-empty", refused("a ciphertext of 0 bytes", replace(KMS, content=chunks()))
    yield "ciphertext-cut", refused("a ciphertext of 47 bytes", replace(KMS, content=chunks(sealed[:-1])))
    mixed = indefinite(0xA0, octets(sealed[:16]) + definite(0x03, sealed[16:]))
    yield "chunk-type", refused("a chunk that is a bit string", replace(KMS, content=mixed))


def _unsupported() -> Vectors:
    def refused(about: str, cms: Answer) -> dict[str, str]:
        return _vector("unsupported_cms", about, cms)

    for version in (0, 3, 1 << 14_400):
        shown = version if version < 100 else "huge"
        yield f"version-{shown}", refused(f"version: {shown}", replace(KMS, version=integer(version)))
        made = replace(KMS, recipient_version=integer(version))
        yield f"recipient-version-{shown}", refused(f"the recipient's version: {shown}", made)
    yield "content-type", refused("signed data on the outside", replace(KMS, content_type=oid(SIGNED_DATA)))
    yield "inner-type", refused("signed data inside", replace(KMS, inner_type=oid(SIGNED_DATA)))
    pkcs1 = sequence(oid(RSA_PKCS1), NULL)
    yield "pkcs1", refused("a key under RSAES-PKCS1-v1_5", replace(KMS, key_algorithm=pkcs1))
    for name, algorithm in (("sha1", SHA1), ("sha384", SHA384)):
        hashed = oaep_algorithm(hashed=sha256(algorithm=algorithm))
        yield f"hash-{name}", refused(f"OAEP with {name}", replace(KMS, key_algorithm=hashed))
        mask = oaep_algorithm(mask=sequence(oid(MGF1), sha256(algorithm=algorithm)))
        yield f"mask-{name}", refused(f"MGF1 with {name}", replace(KMS, key_algorithm=mask))
    mask = oaep_algorithm(mask=sequence(oid(SHA256), sha256()))
    yield "mask", refused("another mask than MGF1", replace(KMS, key_algorithm=mask))
    for name, algorithm in (("aes128-cbc", AES128_CBC), ("aes256-gcm", AES256_GCM)):
        cipher = sequence(oid(algorithm), octets(IV))
        yield f"cipher-{name}", refused(f"content under {name}", replace(KMS, cipher=cipher))


def _unopened() -> Vectors:
    other = replace(KMS, rid=definite(0x80, hashlib.sha256(b"another key").digest()))
    yield "recipient", _vector("wrong_recipient", "for another key", other)

    def refused(about: str, cms: Answer) -> dict[str, str]:
        return _vector("undecryptable_cms", about, cms)

    good, sealed = oaep(CONTENT_KEY), cbc(pad(PLAINTEXT))
    changed = good[:-1] + bytes([good[-1] ^ 1])
    yield "encrypted-key-changed", refused("one bit of the encrypted key", replace(KMS, encrypted_key=changed))
    yield "encrypted-key-large", refused("larger than the modulus", replace(KMS, encrypted_key=b"\xff" * 256))
    labelled = replace(KMS, encrypted_key=oaep(CONTENT_KEY, label=b"label"))
    yield "encrypted-key-label", refused("OAEP with a label", labelled)
    for size in (0, 16, 31, 33):
        key = oaep(CONTENT_KEY.ljust(33, b"\x00")[:size])
        yield f"content-key-{size}", refused(f"a content key of {size} bytes", replace(KMS, encrypted_key=key))
    tampered = sealed[:-1] + bytes([sealed[-1] ^ 1])
    yield "ciphertext-changed", refused("the last bit of the ciphertext", replace(KMS, content=chunks(tampered)))
    for name, block in (
        ("zero", bytes(16)),
        ("seventeen", bytes([17] * 16)),
        ("uneven", bytes([3] * 13 + [2, 3, 3])),
    ):
        made = replace(KMS, content=chunks(cbc(PLAINTEXT + block)))
        yield f"padding-{name}", refused(f"padding that ends in {block[-1]}", made)
