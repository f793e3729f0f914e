"""Writes enclave image files, true ones and lies, and measures them: from the format's description, and without any
code of the reader.
"""

from __future__ import annotations

import hashlib
import json
import struct
import zlib
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime, timedelta
from typing import Final

import cbor2
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.types import CertificateIssuerPrivateKeyTypes
from cryptography.hazmat.primitives.asymmetric.utils import decode_dss_signature
from cryptography.hazmat.primitives.serialization import Encoding
from cryptography.x509.oid import NameOID

from tests.pki.forge import NOW, private_key

KERNEL, CMDLINE, RAMDISK, SIGNATURE, METADATA = 1, 2, 3, 4, 5
AARCH64: Final = 1
CMDLINE_TEXT: Final = "reboot=k panic=30 pci=off nomodules console=ttyS0 random.trust_cpu=on"
METADATA_FIELDS: Final = {
    "ImageName": "strongroom",
    "ImageVersion": "1.0",
    "BuildMetadata": {
        "BuildTime": "2026-03-01T12:00:00.000000+00:00",
        "BuildTool": "nitro-cli",
        "BuildToolVersion": "1.4.2",
        "OperatingSystem": "Linux",
        "KernelVersion": "4.14.256",
    },
    "DockerInfo": {"RepoTags": ["strongroom:latest"], "Config": {"AttachStdin": False, "Size": 1.5}},
    "CustomMetadata": None,
}


@dataclass(frozen=True)
class Part:
    """One section. What is None follows from the rest; what is given may be a lie."""

    kind: int
    data: bytes
    flags: int = 0
    size: int | None = None
    """In the section's own header."""

    def encode(self) -> bytes:
        return (
            struct.pack(">HHQ", self.kind, self.flags, len(self.data) if self.size is None else self.size) + self.data
        )


@dataclass(frozen=True)
class Eif:
    """A file to be: every part of it may be a lie."""

    parts: tuple[Part, ...]
    magic: bytes = b".eif"
    version: int = 4
    flags: int = 0
    memory: int = 1 << 30
    cpus: int = 2
    reserved: int = 0
    unused: int = 0
    count: int | None = None
    offsets: dict[int, int] = field(default_factory=dict)
    """By index, in place of the true ones."""
    sizes: dict[int, int] = field(default_factory=dict)
    crc: int | None = None

    def encode(self) -> bytes:
        encoded = [part.encode() for part in self.parts]
        offsets, sizes = [0] * 32, [0] * 32
        position = 548
        for index, (part, data) in enumerate(zip(self.parts, encoded, strict=True)):
            if index < 32:
                offsets[index], sizes[index] = position, len(part.data)
            position += len(data)
        for table, lies in ((offsets, self.offsets), (sizes, self.sizes)):
            for index, value in lies.items():
                table[index] = value
        count = len(self.parts) if self.count is None else self.count
        header = self.magic + struct.pack(
            ">HHQQHH", self.version, self.flags, self.memory, self.cpus, self.reserved, count
        )
        header += struct.pack(">32Q", *offsets) + struct.pack(">32Q", *sizes) + struct.pack(">I", self.unused)
        body = b"".join(encoded)
        crc = zlib.crc32(header + body) if self.crc is None else self.crc
        return header + struct.pack(">I", crc) + body

    def data(self, kind: int) -> list[bytes]:
        return [part.data for part in self.parts if part.kind == kind]

    def registers(self) -> tuple[bytes, bytes, bytes]:
        """PCR0, PCR1 and PCR2, in AWS's words: everything, what boots, and the application."""
        first, *others = self.data(RAMDISK)
        base = b"".join(self.data(KERNEL) + self.data(CMDLINE)) + first
        return register(base + b"".join(others)), register(base), register(b"".join(others))

    def having(self, part: Part) -> Eif:
        """With ``part`` in the place of the one of its kind, or at the end."""
        kinds = [each.kind for each in self.parts]
        if part.kind not in kinds:
            return replace(self, parts=(*self.parts, part))
        return replace(self, parts=tuple(part if each.kind == part.kind else each for each in self.parts))

    def signed(self, signer: Signer | None = None) -> Eif:
        signer = signer or Signer()
        return self.having(Part(SIGNATURE, signer.section(self.registers()[0])))


def register(measured: bytes) -> bytes:
    return hashlib.sha384(bytes(48) + hashlib.sha384(measured).digest()).digest()


def image(*, ramdisks: Sequence[bytes] = (b"init and nsm.ko", b"rootfs", b"cmd and env"), version: int = 4) -> Eif:
    """As nitro-cli writes it: kernel, command line, metadata, ramdisks."""
    metadata = [Part(METADATA, json.dumps(METADATA_FIELDS).encode())] if version >= 4 else []
    disks = [Part(RAMDISK, disk) for disk in ramdisks]
    return Eif((Part(KERNEL, b"a kernel"), Part(CMDLINE, CMDLINE_TEXT.encode()), *metadata, *disks), version=version)


_COSE: Final[dict[str, tuple[int, hashes.HashAlgorithm]]] = {
    "secp256r1": (-7, hashes.SHA256()),
    "secp384r1": (-35, hashes.SHA384()),
    "secp521r1": (-36, hashes.SHA512()),
}


@dataclass(frozen=True)
class Signer:
    """Who signs an image, and how. Signatures are deterministic: the same image has the same bytes."""

    curve: ec.EllipticCurve = field(default_factory=ec.SECP384R1)
    name: str = "A release engineer"
    not_before: datetime = NOW - timedelta(days=1)
    not_after: datetime = NOW + timedelta(days=30)
    protected: bytes | None = None
    unprotected: dict[int, int] = field(default_factory=dict)
    index: int = 0
    entries: int = 1

    @property
    def key(self) -> ec.EllipticCurvePrivateKey:
        return private_key("image signer", self.curve)

    def pem(self) -> bytes:
        return certificate(self.key, self.name, self.not_before, self.not_after)

    def sign1(self, pcr0: bytes) -> bytes:
        number, algorithm = _COSE[self.curve.name]
        protected = cbor2.dumps({1: number}) if self.protected is None else self.protected
        payload = cbor2.dumps({"register_index": self.index, "register_value": list(pcr0)})
        to_sign = cbor2.dumps(["Signature1", protected, b"", payload])
        half = (self.curve.key_size + 7) // 8
        r, s = decode_dss_signature(self.key.sign(to_sign, ec.ECDSA(algorithm, deterministic_signing=True)))
        return cbor2.dumps([protected, self.unprotected, payload, r.to_bytes(half, "big") + s.to_bytes(half, "big")])

    def pcr8(self) -> bytes:
        return register(x509.load_pem_x509_certificate(self.pem()).public_bytes(Encoding.DER))

    def section(self, pcr0: bytes) -> bytes:
        return section(self.pem(), self.sign1(pcr0), entries=self.entries)


def section(pem: bytes, sign1: bytes, *, entries: int = 1) -> bytes:
    """A signature section. serde writes bytes as an array of integers."""
    return cbor2.dumps([{"signing_certificate": list(pem), "signature": list(sign1)}] * entries)


def certificate(
    key: CertificateIssuerPrivateKeyTypes, name: str, not_before: datetime = NOW, not_after: datetime = NOW
) -> bytes:
    """Self-signed, in PEM; the same bytes for the same arguments."""
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
    builder = x509.CertificateBuilder(subject, subject, key.public_key(), 1, not_before, not_after)
    if isinstance(key, ec.EllipticCurvePrivateKey):
        made = builder.sign(key, hashes.SHA256(), ecdsa_deterministic=True)
    else:
        made = builder.sign(key, None)
    return made.public_bytes(Encoding.PEM)
