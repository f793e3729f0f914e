"""Makes tests/vectors/eif/: enclave image files, PROTOCOL.md section 4.

Written from that page and from the formats that it names, with hashes, CBOR and ECDSA alone: nothing of ``attestation``
measures these images, and nothing of ``parent`` writes them. ``tests/parent/image/test_eif_vectors.py`` holds both
against them.

``NAME.eif`` is the file, ``NAME.json`` says what it is: ``expect``, ``accepted`` or the code of the failure; of an
accepted one the registers (hexadecimal) and whether its kernel ends where it says (``boundary``); and of one that a
writer can be asked for, its ``parts``. The private keys are these very numbers: no policy may name their PCR8.
"""

from __future__ import annotations

import hashlib
import json
import stat
import struct
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime, timedelta

import cbor2
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.utils import decode_dss_signature
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from cryptography.x509.oid import NameOID

KERNEL, CMDLINE, RAMDISK, SIGNATURE, METADATA = 1, 2, 3, 4, 5
LINE = "reboot=k panic=30 pci=off nomodules console=ttyS0 random.trust_cpu=on"
BUILT_AT = 1_772_366_400
NOT_BEFORE = datetime(2026, 3, 1, 12, tzinfo=UTC)
DESCRIPTION = {
    "BuildMetadata": {
        "BuildTime": "2026-03-01T12:00:00+00:00",
        "BuildTool": "strongroom",
        "BuildToolVersion": "0.1.0",
        "KernelVersion": "6.12.9",
        "OperatingSystem": "Linux",
    },
    "CustomMetadata": None,
    "DockerInfo": None,
    "ImageName": "strongroom",
    "ImageVersion": "1.0",
}
_KINDS = {"directory": stat.S_IFDIR, "file": stat.S_IFREG, "link": stat.S_IFLNK, "char": stat.S_IFCHR}
_ALGORITHMS: Mapping[str, tuple[ec.EllipticCurve, int, hashes.HashAlgorithm]] = {
    "p256": (ec.SECP256R1(), -7, hashes.SHA256()),
    "p384": (ec.SECP384R1(), -35, hashes.SHA384()),
    "p521": (ec.SECP521R1(), -36, hashes.SHA512()),
}

Described = dict[str, object]
"""An entry of a ramdisk: path, kind, mode, uid, gid; content (hexadecimal), target, or major and minor."""


def entry(path: str, kind: str, mode: int, **more: object) -> Described:
    return {"path": path, "kind": kind, "mode": mode, "uid": 0, "gid": 0, **more}


def file(path: str, content: bytes, mode: int = 0o644) -> Described:
    return entry(path, "file", mode, content=content.hex())


BOOT = [file("cmdline", LINE.encode()), entry("dev", "directory", 0o755), file("init", b"init", 0o755)]
CUSTOMER = [
    file("cmd", b"/usr/bin/app\n--port\n5005\n"),
    file("env", b"PATH=/usr/bin\n"),
    entry("rootfs", "directory", 0o755),
    entry("rootfs/bin", "link", 0o777, target="usr/bin"),
    *(entry(f"rootfs/{name}", "directory", 0o755) for name in ("dev", "proc", "run", "sys")),
    entry("rootfs/tmp", "directory", 0o1777),
    entry("rootfs/usr", "directory", 0o755),
    entry("rootfs/usr/bin", "directory", 0o755),
    file("rootfs/usr/bin/app", b"an application", 0o755),
    {**file("rootfs/usr/bin/suid", b"", 0o4750), "uid": 10, "gid": 20},
    entry("rootfs/usr/null", "char", 0o666, major=1, minor=3),
    entry("rootfs/var", "directory", 0o755),
]


def cpio(entries: list[Described]) -> bytes:
    """``newc``, as Linux's buffer-format.rst describes it: ``entries`` are sorted."""

    def one(number: int, path: str, mode: int, links: int, content: bytes, each: Described) -> bytes:
        name = path.encode() + b"\0"
        device = int(str(each.get("major", 0))), int(str(each.get("minor", 0)))
        owner = int(str(each.get("uid", 0))), int(str(each.get("gid", 0)))
        fields = (number, mode, *owner, links, 0, len(content), 0, 0, *device, len(name), 0)
        head = b"070701" + "".join(f"{value:08X}" for value in fields).encode() + name
        return head + bytes(-len(head) % 4) + content + bytes(-len(content) % 4)

    archive = b""
    for number, each in enumerate(entries, start=1):
        kind = _KINDS[str(each["kind"])]
        content = bytes.fromhex(str(each.get("content", ""))) + str(each.get("target", "")).encode()
        links = 2 if kind == stat.S_IFDIR else 1
        archive += one(number, str(each["path"]), kind | int(str(each["mode"])), links, content, each)
    return archive + one(0, "TRAILER!!!", 0, 1, b"", {})


def bzimage(code: bytes) -> bytes:
    """The fields of the x86 boot protocol by which a kernel says how long it is, and nothing that boots."""
    setup = bytearray(1024)
    struct.pack_into("<B", setup, 0x1F1, 1)
    struct.pack_into("<I", setup, 0x1F4, len(code) // 16)
    struct.pack_into("<H", setup, 0x1FE, 0xAA55)
    struct.pack_into("<4sH", setup, 0x202, b"HdrS", 0x20F)
    setup[0x211] = 1
    return bytes(setup) + code


X86 = bzimage(b"not a kernel at all, 32 bytes...")
ARM64 = bytes(56) + b"ARM\x64" + bytes(4)


@dataclass(frozen=True)
class Image:
    """A file to be. What is None follows from the rest; what is given may be a lie."""

    sections: tuple[tuple[int, bytes], ...]
    version: int = 4
    flags: int = 0
    offsets: Mapping[int, int] = field(default_factory=dict)
    sizes: Mapping[int, int] = field(default_factory=dict)
    own_sizes: Mapping[int, int] = field(default_factory=dict)
    crc: int | None = None

    def encode(self) -> bytes:
        offsets, sizes, body = [0] * 32, [0] * 32, b""
        for index, (kind, data) in enumerate(self.sections):
            offsets[index] = self.offsets.get(index, 548 + len(body))
            sizes[index] = self.sizes.get(index, len(data))
            body += struct.pack(">HHQ", kind, 0, self.own_sizes.get(index, len(data))) + data
        header = struct.pack(">4sHHQQHH", b".eif", self.version, self.flags, 1 << 30, 2, 0, len(self.sections))
        header += struct.pack(">32Q32QI", *offsets, *sizes, 0)
        return header + struct.pack(">I", zlib.crc32(header + body) if self.crc is None else self.crc) + body

    def having(self, index: int, kind: int, data: bytes) -> Image:
        """With another section in that place."""
        return replace(self, sections=(*self.sections[:index], (kind, data), *self.sections[index + 1 :]))

    def registers(self) -> dict[int, bytes]:
        ramdisks = [data for kind, data in self.sections if kind == RAMDISK]
        base = b"".join(data for kind, data in self.sections if kind in (KERNEL, CMDLINE)) + ramdisks[0]
        rest = b"".join(ramdisks[1:])
        return {0: register(base + rest), 1: register(base), 2: register(rest)}

    def signed(self, curve: str, *, over: bytes | None = None, flip: int = 0) -> Image:
        """With a signature section at the end, over PCR0 or over something else, and perhaps a changed byte in it."""
        _, number, algorithm = _ALGORITHMS[curve]
        protected = cbor2.dumps({1: number})
        pcr0 = self.registers()[0] if over is None else over
        payload = cbor2.dumps({"register_index": 0, "register_value": list(pcr0)})
        to_be_signed = cbor2.dumps(["Signature1", protected, b"", payload])
        key = private_key(curve)
        r, s = decode_dss_signature(key.sign(to_be_signed, ec.ECDSA(algorithm, deterministic_signing=True)))
        half = (key.key_size + 7) // 8
        sign1 = cbor2.dumps([protected, {}, payload, (r ^ flip).to_bytes(half, "big") + s.to_bytes(half, "big")])
        section = [{"signing_certificate": list(certificate(curve)), "signature": list(sign1)}]
        return replace(self, sections=(*self.sections, (SIGNATURE, cbor2.dumps(section))))


def register(measured: bytes) -> bytes:
    return hashlib.sha384(bytes(48) + hashlib.sha384(measured).digest()).digest()


def private_key(curve: str) -> ec.EllipticCurvePrivateKey:
    seed = hashlib.sha256(b"strongroom vectors: eif " + curve.encode()).digest()[:31]
    return ec.derive_private_key(int.from_bytes(seed, "big"), _ALGORITHMS[curve][0])


def certificate(curve: str) -> bytes:
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, f"strongroom vectors {curve}")])
    builder = x509.CertificateBuilder().subject_name(name).issuer_name(name).public_key(private_key(curve).public_key())
    builder = builder.serial_number(1).not_valid_before(NOT_BEFORE).not_valid_after(NOT_BEFORE + timedelta(days=365))
    made = builder.sign(private_key(curve), hashes.SHA384(), ecdsa_deterministic=True)
    return made.public_bytes(Encoding.PEM)


def signer_pem(curve: str) -> bytes:
    """The key and its certificate."""
    key = private_key(curve).private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
    return key + certificate(curve)


# --- The files --------------------------------------------------------------------------------------------------------


def image_of(kernel: bytes, line: str, *ramdisks: list[Described]) -> Image:
    described = json.dumps(DESCRIPTION, sort_keys=True, separators=(",", ":")).encode()
    disks = [(RAMDISK, cpio(entries)) for entries in ramdisks]
    return Image(((KERNEL, kernel), (CMDLINE, line.encode()), (METADATA, described), *disks))


Vector = tuple[str, bytes, Described]


def files() -> dict[str, bytes]:
    """The files of the folder."""
    found: dict[str, bytes] = {}
    for name, image, said in (*_accepted(), *_refused()):
        found[f"{name}.eif"] = image
        found[f"{name}.json"] = json.dumps(said, indent=1).encode() + b"\n"
    return found


def _accept(
    name: str, about: str, image: Image, parts: Described | None = None, curve: str | None = None, boundary: bool = True
) -> Vector:
    registers = {str(index): value.hex() for index, value in image.registers().items()}
    if curve is not None:
        der = x509.load_pem_x509_certificate(certificate(curve)).public_bytes(Encoding.DER)
        registers["8"] = register(der).hex()
        parts = parts and {**parts, "signer": signer_pem(curve).decode()}
    said: Described = {"about": about, "expect": "accepted", "pcrs": registers, "boundary": boundary}
    return name, image.encode(), said if parts is None else {**said, "parts": parts}


def _parts(kernel: bytes, architecture: str, *ramdisks: list[Described]) -> Described:
    described = {"kernel": kernel.hex(), "cmdline": LINE, "architecture": architecture, "ramdisks": list(ramdisks)}
    return {**described, "built_at": BUILT_AT}


def _accepted() -> Iterator[Vector]:
    one, two = image_of(X86, LINE, BOOT), image_of(X86, LINE, BOOT, CUSTOMER)
    parts = _parts(X86, "x86_64", BOOT, CUSTOMER)
    yield _accept("one-ramdisk", "PCR2 is over no bytes", one, _parts(X86, "x86_64", BOOT))
    yield _accept("two-ramdisks", "AWS's layout", two, parts)
    three = image_of(X86, LINE, BOOT, CUSTOMER, [])
    yield _accept("three-ramdisks", "the last one is empty", three, _parts(X86, "x86_64", BOOT, CUSTOMER, []))
    arm = replace(image_of(ARM64, LINE, BOOT, CUSTOMER), flags=1)
    yield _accept(
        "aarch64", "the architecture is a flag, and not measured", arm, _parts(ARM64, "aarch64", BOOT, CUSTOMER)
    )
    for curve in _ALGORITHMS:
        yield _accept(f"signed-{curve}", f"signed by a key on {curve}", two.signed(curve), parts, curve)
    old = Image(tuple(section for section in two.sections if section[0] != METADATA), version=3)
    yield _accept("version-3", "without metadata", old)
    yield _accept("version-3-signed", "without metadata, signed", old.signed("p384"), curve="p384")
    moved = two.having(0, KERNEL, X86 + LINE[:8].encode()).having(1, CMDLINE, LINE[8:].encode())
    assert moved.registers() == two.registers()
    yield _accept(
        "moved", "the registers of two-ramdisks: the command line begins in the kernel", moved, boundary=False
    )
    described = two.having(2, METADATA, json.dumps({**DESCRIPTION, "ImageName": "another"}).encode())
    assert described.registers() == two.registers()
    yield _accept("other-metadata", "the registers of two-ramdisks: metadata is not measured", described)


def _refused() -> Iterator[Vector]:
    two = image_of(X86, LINE, BOOT, CUSTOMER)
    whole = two.encode()
    signed = two.signed("p384")
    kernel, line, described, boot, customer = two.sections

    def refused(name: str, expect: str, about: str, image: Image | bytes) -> Vector:
        return name, image if isinstance(image, bytes) else image.encode(), {"about": about, "expect": expect}

    yield refused("empty", "truncated_eif", "no byte", b"")
    yield refused("magic", "not_eif", "another magic", b".elf" + whole[4:])
    yield refused("version-5", "unsupported_eif", "a version to come", replace(two, version=5))
    yield refused("flag-1", "unsupported_eif", "an unassigned flag", replace(two, flags=2))
    yield refused("cut-header", "truncated_eif", "cut in the header", whole[:547])
    yield refused("cut", "truncated_eif", "the last byte is missing", whole[:-1])
    yield refused("trailing", "trailing_bytes", "a byte behind the last section", whole + b"\0")
    yield refused("crc", "wrong_crc", "another CRC", replace(two, crc=0))
    yield refused("changed", "wrong_crc", "a changed byte in the last ramdisk", whole[:-200] + b"X" + whole[-199:])
    yield refused("gap", "malformed_eif", "the table has section 1 a byte later", replace(two, offsets={1: 548 + 1}))
    yield refused("overlap", "malformed_eif", "two sections at one place", replace(two, offsets={1: 548}))
    yield refused("size", "malformed_eif", "a section's own size is another", replace(two, own_sizes={1: 1}))
    huge = replace(two, sizes={4: (1 << 64) - 1}, own_sizes={4: (1 << 64) - 1})
    yield refused("huge", "truncated_eif", "a section of 2**64 - 1 bytes", huge)
    yield refused("type-6", "malformed_eif", "a section of no known type", two.having(4, 6, b""))
    yield refused("type-0", "malformed_eif", "a section of type 0", two.having(4, 0, b""))
    yield refused("two-kernels", "wrong_sections", "two kernels", two.having(4, KERNEL, X86))
    yield refused("two-lines", "wrong_sections", "two command lines", two.having(4, CMDLINE, b"quiet"))
    yield refused("no-metadata", "wrong_sections", "no metadata in version 4", Image((kernel, line, boot, customer)))
    yield refused("no-ramdisk", "wrong_sections", "no ramdisk", Image((kernel, line, described)))
    yield refused(
        "order", "wrong_sections", "a ramdisk before the command line", Image((kernel, boot, line, described))
    )
    yield refused("line-nul", "bad_cmdline", "a NUL in the command line", two.having(1, CMDLINE, b"quiet\0init=/x"))
    yield refused("line-long", "malformed_eif", "2,048 bytes of command line", two.having(1, CMDLINE, b"x" * 2048))
    yield refused("metadata-json", "malformed_metadata", "no JSON", two.having(2, METADATA, b"{"))
    twice = b'{"ImageName":"a",' + described[1][1:]
    yield refused("metadata-twice", "malformed_metadata", "a name twice", two.having(2, METADATA, twice))
    yield refused("signature-other", "wrong_payload", "signs another image", two.signed("p384", over=bytes(48)))
    yield refused("signature-bit", "bad_signature", "a changed bit of r", two.signed("p384", flip=1))
    yield refused(
        "signature-cbor", "malformed_signature", "no CBOR", replace(two, sections=(*two.sections, (4, b"\xff")))
    )
    entry_twice = cbor2.dumps(cbor2.loads(signed.sections[5][1]) * 2)
    yield refused("signature-twice", "malformed_signature", "two signatures", signed.having(5, SIGNATURE, entry_twice))
