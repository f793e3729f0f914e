"""Enclave Image Files (EIF): the format of what a Nitro enclave is started from, read strictly.

An EIF is a header of 548 bytes, then sections to the end of the file, each a header of 12 bytes and its data; numbers
are big-endian. The format is that of AWS's ``aws-nitro-enclaves-image-format``. AWS's reader walks from section to
section, QEMU's seeks through the table in the header: a file in which the two would find different images is refused
here, as is whatever no builder writes. Nothing here reads a file: :mod:`attestation.measure` does.
"""

from __future__ import annotations

import hashlib
import re
import struct
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from datetime import datetime
from enum import IntEnum, StrEnum
from types import MappingProxyType
from typing import Final

import cbor2
from cryptography import x509
from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.utils import encode_dss_signature
from cryptography.hazmat.primitives.serialization import Encoding

from attestation.cbor import Record, decode, shown
from attestation.errors import EvidenceError, StrongroomError
from attestation.reference import DIGEST_SIZE, ZERO_PCR, PcrSet, once_extended
from attestation.strict_json import Json, decode_foreign

MAGIC: Final = b".eif"
VERSIONS: Final = (3, 4)
"""3 brought the signature, 4 the metadata, which it requires."""
FLAG_AARCH64: Final = 1
"""Of the header's flags; clear for x86_64. The others are not assigned."""
MIN_SECTIONS: Final = 3
MAX_SECTIONS: Final = 32

HEADER: Final = struct.Struct(f">4sHHQQHH{MAX_SECTIONS}Q{MAX_SECTIONS}QII")
"""Magic, version, flags, default memory (bytes), default CPUs, zero, number of sections, offset of each section's
header, size of each section's data, zero, CRC-32."""
CRC_SIZE: Final = 4
"""Bytes at the header's end: the CRC-32 (IEEE) of the whole file but these."""
SECTION_HEADER: Final = struct.Struct(">HHQ")
"""Type, zero, size of the data."""

MAX_CMDLINE_SIZE: Final = 2047
"""Bytes. Linux holds 2,048 with the final NUL, on both architectures: more would be measured, but not obeyed."""
MAX_SIGNATURE_SIZE: Final = 32_768
MAX_JSON_SIZE: Final = 256 << 10
"""Bytes, of the metadata and of nitro-cli's output."""
MAX_JSON_DEPTH: Final = 32
KERNEL_HEAD: Final = 0x238
"""Bytes of a kernel in which a bzImage says what it is: the fields of boot protocol 2.04."""
HASH_ALGORITHM: Final = "Sha384 { ... }"
"""What nitro-cli calls SHA-384."""


_VERSION_AT, _FLAGS_AT, _RESERVED_AT, _COUNT_AT, _OFFSETS_AT, _SIZES_AT, _UNUSED_AT = 4, 6, 24, 26, 28, 284, 540
"""Where the header's fields stand."""
CRC_AT: Final = HEADER.size - CRC_SIZE
_FIELD: Final = 8
"""Bytes of an offset or a size in the table."""


class SectionType(IntEnum):
    """What a section's data are."""

    KERNEL = 1
    CMDLINE = 2
    RAMDISK = 3
    SIGNATURE = 4
    METADATA = 5


class Architecture(StrEnum):
    X86_64 = "x86_64"
    AARCH64 = "aarch64"


_BEHIND: Final = {SectionType.CMDLINE: SectionType.KERNEL, SectionType.RAMDISK: SectionType.CMDLINE}
_SINCE: Final = {SectionType.METADATA: 4}
LIMITS: Final = {
    SectionType.CMDLINE: MAX_CMDLINE_SIZE,
    SectionType.SIGNATURE: MAX_SIGNATURE_SIZE,
    SectionType.METADATA: MAX_JSON_SIZE,
}
"""Bytes of the sections that are held whole; kernels and ramdisks have no limit, and are not held."""
_SIGNATURE_ALGORITHMS: Final[Mapping[str, tuple[int, hashes.HashAlgorithm, int]]] = {
    ec.SECP256R1.name: (-7, hashes.SHA256(), 32),
    ec.SECP384R1.name: (-35, hashes.SHA384(), 48),
    ec.SECP521R1.name: (-36, hashes.SHA512(), 66),
}
"""By the key's curve: COSE's number (RFC 9053 section 2.1), the hash, and the bytes of r and of s."""
_METADATA_TEXTS: Final = ("ImageName", "ImageVersion")
_BUILD_TEXTS: Final = ("BuildTime", "BuildTool", "BuildToolVersion", "OperatingSystem", "KernelVersion")
_REGISTERS: Final = frozenset(("HashAlgorithm", "PCR0", "PCR1", "PCR2"))
_RUNNING_ENCLAVE: Final = frozenset(("EnclaveName", "EnclaveID", "EnclaveCID", "ProcessID", "State", "Flags"))


class ImageError(StrongroomError):
    """An image file, or what nitro-cli printed of one, that is broken or that nobody should take for a reference.

    Codes: ``unreadable_image``, ``not_eif``, ``unsupported_eif``, ``truncated_eif``, ``trailing_bytes``,
    ``malformed_eif``, ``wrong_sections``, ``wrong_crc``, ``bad_cmdline``, ``malformed_metadata``,
    ``malformed_signature``, ``wrong_payload``, ``bad_signature``, ``signer_not_valid``, ``no_boundary``,
    ``changed_image``; of nitro-cli's output ``malformed_measurements``, ``unknown_hash``, ``not_reference_values``.
    ``offset`` is the byte of the file at which it shows, where there is one, and ``said`` the message without it.
    """

    exit_code = 2

    def __init__(
        self,
        code: str,
        message: str,
        *,
        offset: int | None = None,
        expected: object | None = None,
        got: object | None = None,
    ) -> None:
        super().__init__(
            code, message if offset is None else f"{message}, at byte {offset}", expected=expected, got=got
        )
        self.offset = offset
        self.said = message

    def of(self, where: str) -> ImageError:
        """The same error, said of ``where``: a file."""
        return type(self)(self.code, f"{where}: {self.said}", offset=self.offset, expected=self.expected, got=self.got)

    def at(self, offset: int) -> ImageError:
        """The same error, of the byte at ``offset``, for a reader who knows where in the file the data begin."""
        return type(self)(self.code, self.said, offset=offset, expected=self.expected, got=self.got)

    def as_json(self) -> dict[str, str | None]:
        """For programs."""
        return {**super().as_json(), "offset": None if self.offset is None else str(self.offset)}


@dataclass(frozen=True, slots=True)
class Section:
    """One section: ``offset`` is that of its header in the file, ``size`` and ``sha384`` (48 bytes) are its data's."""

    type: SectionType
    """What the data are: kernel, command line, ramdisk, signature or metadata."""
    offset: int
    size: int
    sha384: bytes

    @property
    def data_offset(self) -> int:
        """Of its first byte in the file."""
        return self.offset + SECTION_HEADER.size


@dataclass(frozen=True, slots=True)
class SigningCertificate:
    """Whose signature an image carries. Nothing vouches for the certificate but PCR8, which is over its DER."""

    der: bytes
    """The certificate, DER."""
    subject: str
    """As in RFC 4514, and safe to print."""
    not_before: datetime
    not_after: datetime
    """The period, from ``not_before`` on and with both of its seconds, in UTC."""
    key: ec.EllipticCurvePublicKey
    """On P-256, P-384 or P-521."""

    @property
    def pcr8(self) -> bytes:
        """48 bytes."""
        return once_extended(hashlib.sha384(self.der).digest())

    @classmethod
    def from_pem(cls, pem: bytes) -> SigningCertificate:
        """The one certificate of ``pem``. Raises ImageError ``malformed_signature``, also for a second one or another
        block: tools differ in which of them they take, and PCR8 would with them.
        """
        if pem.count(b"-----BEGIN ") != 1:
            expected, got = "one certificate", f"{pem.count(b'-----BEGIN ')} blocks of PEM"
            raise ImageError("malformed_signature", "not one signing certificate", expected=expected, got=got)
        try:
            certificate = x509.load_pem_x509_certificate(pem)
            der, key = certificate.public_bytes(Encoding.DER), certificate.public_key()
            subject = certificate.subject.rfc4514_string()
            validity = certificate.not_valid_before_utc, certificate.not_valid_after_utc
        except (ValueError, UnsupportedAlgorithm, x509.InvalidVersion, Warning) as error:
            # Warning: what the library only warns of, where warnings are set to be errors.
            raise ImageError("malformed_signature", "the signing certificate cannot be read") from error
        if not isinstance(key, ec.EllipticCurvePublicKey) or key.curve.name not in _SIGNATURE_ALGORITHMS:
            expected, got = "a key on P-256, P-384 or P-521", type(getattr(key, "curve", key)).__name__
            raise ImageError("malformed_signature", "no key that signs images", expected=expected, got=got)
        return cls(der, subject if subject.isprintable() else ascii(subject)[1:-1], *validity, key)


def measurements_from_nitro_cli(text: bytes) -> PcrSet:
    """The registers that ``nitro-cli build-enclave`` printed on its standard output, as JSON.

    For a debug enclave ``describe-enclaves`` prints what the image had when it was built, while its registers are zero
    (nitro-cli issue 695): its output, and any of an enclave that runs, is refused as ``not_reference_values``.
    Raises ImageError.
    """
    code = "malformed_measurements"
    value = _json(text, code)
    if isinstance(value, list) or (isinstance(value, dict) and not _RUNNING_ENCLAVE.isdisjoint(value)):
        raise ImageError(
            "not_reference_values",
            "this is said of an enclave that runs, and may not be what runs in it; measure the image file",
            expected="the output of nitro-cli build-enclave",
            got="that of nitro-cli describe-enclaves or run-enclave",
        )
    fields = value.get("Measurements") if isinstance(value, dict) and len(value) == 1 else None
    if not isinstance(fields, dict) or not _REGISTERS <= fields.keys() <= _REGISTERS | {"PCR8"}:
        expected = "Measurements alone, of HashAlgorithm, PCR0, PCR1, PCR2 and, of a signed image, PCR8"
        raise ImageError(code, "not what nitro-cli build-enclave prints", expected=expected)
    algorithm = fields.pop("HashAlgorithm")
    if algorithm != HASH_ALGORITHM:
        raise ImageError("unknown_hash", "not Nitro's hash", expected=HASH_ALGORITHM, got=ascii(algorithm)[:100])
    return PcrSet(**{name.lower(): _register(name, value) for name, value in fields.items()})


@dataclass(frozen=True, slots=True)
class Header:
    """What the first 548 bytes say, where it can be true."""

    version: int
    """Of the format: 3 or 4."""
    architecture: Architecture
    """Of the kernel."""
    default_memory: int
    """Bytes."""
    default_cpus: int
    """The number of virtual CPUs."""
    sizes: tuple[int, ...]
    """Bytes of each section's data, in the order of the file."""
    end: int
    """Bytes of the header and all sections, and so of the file."""
    crc: int
    """Over the whole file but these four bytes."""


def read_header(data: bytes) -> Header:
    """``data``: ``HEADER.size`` bytes, which begin with the magic. Raises ImageError ``not_eif``, ``unsupported_eif``,
    ``malformed_eif``.
    """
    magic, version, flags, memory, cpus, reserved, count, *table, unused, crc = HEADER.unpack(data)
    require_magic(magic)
    if version not in VERSIONS:
        raise ImageError(
            "unsupported_eif", "a version that is not known", offset=_VERSION_AT, expected="3 or 4", got=version
        )
    if flags & ~FLAG_AARCH64:
        raise ImageError("unsupported_eif", "flags that are not known", offset=_FLAGS_AT, expected="0 or 1", got=flags)
    if reserved or unused:
        at = _RESERVED_AT if reserved else _UNUSED_AT
        raise _malformed("a reserved field is set", at, "zero", reserved or unused)
    if not MIN_SECTIONS <= count <= MAX_SECTIONS:
        raise _malformed(
            "the number of sections is out of range", _COUNT_AT, f"{MIN_SECTIONS} to {MAX_SECTIONS}", count
        )
    offsets, sizes = table[:MAX_SECTIONS], table[MAX_SECTIONS:]
    end = HEADER.size
    for index in range(count):
        if offsets[index] != end:
            fault = "overlaps what stands before it" if offsets[index] < end else "leaves a gap before it"
            raise _malformed(f"section {index} {fault}", _OFFSETS_AT + index * _FIELD, end, offsets[index])
        end += SECTION_HEADER.size + sizes[index]
    for index in range(count, MAX_SECTIONS):
        for start, value in ((_OFFSETS_AT, offsets[index]), (_SIZES_AT, sizes[index])):
            if value:
                raise _malformed("the table goes on behind the last section", start + index * _FIELD, "zero", value)
    architecture = Architecture.AARCH64 if flags else Architecture.X86_64
    return Header(version, architecture, memory, cpus, tuple(sizes[:count]), end, crc)


def require_magic(magic: bytes) -> None:
    """Raises ImageError ``not_eif`` unless these are the first four bytes of an image."""
    if magic != MAGIC:
        expected, got = (ascii(each.decode("latin-1")) for each in (MAGIC, magic))
        message = "not an enclave image file, which begins otherwise"
        raise ImageError("not_eif", message, offset=0, expected=expected, got=got)


def read_section_header(
    data: bytes, *, offset: int, size: int, version: int, seen: Collection[SectionType]
) -> SectionType:
    """``data``: the 12 bytes at ``offset``, of a section of ``size`` bytes by the table, behind sections ``seen``.

    Raises ImageError ``malformed_eif``, ``wrong_sections``.
    """
    number, flags, own_size = SECTION_HEADER.unpack(data)
    if number not in list(SectionType):
        raise _malformed("a section of a type that is not known", offset, "1 to 5", number)
    kind = SectionType(number)
    where = f"the section {kind.name}"
    if flags:
        raise _malformed(f"{where} has its reserved field set", offset + 2, "zero", flags)
    if own_size != size:
        raise _malformed(f"{where} has another size in the table", offset + 4, size, own_size)
    # AWS's reader takes these in any order and number and hashes as it goes; its builder writes this one.
    if kind is not SectionType.RAMDISK and kind in seen:
        raise _wrong_sections(f"another {kind.name}", offset, "one", "two")
    if kind in _BEHIND and _BEHIND[kind] not in seen:
        raise _wrong_sections(f"{where} comes before {_BEHIND[kind].name}", offset, f"{_BEHIND[kind].name} first")
    if version < _SINCE.get(kind, 0):
        raise _wrong_sections(f"{where} is not of version {version}", offset, f"version {_SINCE[kind]}", version)
    if size > LIMITS.get(kind, size):
        raise _malformed(f"{where} is too large", offset + 4, f"at most {LIMITS[kind]} bytes", size)
    return kind


def require_sections(header: Header, seen: Collection[SectionType]) -> None:
    """Raises ImageError ``wrong_sections`` unless the sections ``seen`` are all that an image must have."""
    wanted = [SectionType.RAMDISK]  # of kernel and command line the order has been asked already
    wanted += [kind for kind, since in _SINCE.items() if header.version >= since]
    for kind in wanted:
        if kind not in seen:
            raise _wrong_sections(f"the image has no {kind.name}", header.end, f"a section {kind.name}", "none")


def bzimage_length(head: bytes) -> int | None:
    """The length in bytes that an x86 kernel states of itself, in its first ``KERNEL_HEAD`` bytes: (setup_sects + 1) x
    512 + syssize x 16 (Linux, Documentation/arch/x86/boot.rst, protocol 2.04). None for what is no bzImage.
    """
    if len(head) < KERNEL_HEAD or head[0x1FE:0x200] != b"\x55\xaa" or head[0x202:0x206] != b"HdrS":
        return None
    protocol, loaded_high = int.from_bytes(head[0x206:0x208], "little"), head[0x211] & 1
    if protocol < 0x204 or not loaded_high:
        return None
    setup_sectors = head[0x1F1] or 4
    return (setup_sectors + 1) * 512 + int.from_bytes(head[0x1F4:0x1F8], "little") * 16


def _malformed(message: str, offset: int, expected: object, got: object) -> ImageError:
    return ImageError("malformed_eif", message, offset=offset, expected=expected, got=got)


def _wrong_sections(message: str, offset: int, expected: object, got: object | None = None) -> ImageError:
    return ImageError("wrong_sections", message, offset=offset, expected=expected, got=got)


def read_cmdline(data: bytes, *, offset: int) -> str:
    """The kernel's command line, of which the first byte stands at ``offset``. Raises ImageError ``bad_cmdline``."""
    # The kernel reads to the first NUL: what stood behind it would be measured, but not obeyed.
    for index, octet in enumerate(data):
        if not 0x20 <= octet <= 0x7E:
            message, expected = "the command line is no line", "printable ASCII"
            raise ImageError("bad_cmdline", message, offset=offset + index, expected=expected, got=f"0x{octet:02x}")
    return data.decode("ascii")


def read_metadata(data: bytes) -> Mapping[str, Json]:
    """The metadata's JSON, with the fields that AWS's reader insists on; it takes others, too.

    Raises ImageError ``malformed_metadata``.
    """
    code = "malformed_metadata"
    fields = _json(data, code)
    build = fields.get("BuildMetadata") if isinstance(fields, dict) else None
    if not isinstance(fields, dict) or not isinstance(build, dict) or "DockerInfo" not in fields:
        raise ImageError(code, "the metadata has not the fields of an image", expected="BuildMetadata, DockerInfo")
    texts = {name: fields.get(name) for name in _METADATA_TEXTS} | {name: build.get(name) for name in _BUILD_TEXTS}
    for name, text in texts.items():
        if not isinstance(text, str):
            raise ImageError(code, f"{name} of the metadata", expected="a text", got=type(text).__name__)
    return MappingProxyType(fields)


def verify_signature(data: bytes, pcr0: bytes, *, at: datetime | None) -> SigningCertificate:
    """The certificate whose key signed ``pcr0``. ``data`` is the CBOR array of one map that AWS's tools write.

    Where ``at`` is given, with a time zone, the certificate must be valid then. Raises ImageError
    ``malformed_signature``, ``wrong_payload``, ``bad_signature``, ``signer_not_valid``.
    """
    code = "malformed_signature"
    try:
        entries = decode(data, code=code)
        if not isinstance(entries, list) or len(entries) != 1:
            raise ImageError(code, "not one signature", expected="array of 1", got=shown(entries))
        entry = Record(entries[0], "signature", required={"signing_certificate", "signature"}, code=code)
        signer = SigningCertificate.from_pem(_octets(entry, "signing_certificate"))
        sign1 = decode(_octets(entry, "signature"), code=code)
    except EvidenceError as error:
        raise ImageError(code, error.message, expected=error.expected, got=error.got) from error
    algorithm, hash_algorithm, half = _SIGNATURE_ALGORITHMS[signer.key.curve.name]
    protected = cbor2.dumps({1: algorithm})
    match sign1:
        case [header, dict(unprotected), bytes(payload), bytes(signature)] if (
            header == protected and not unprotected and len(signature) == 2 * half
        ):
            pass
        case _:
            expected = f"[h'{protected.hex()}', {{}}, payload, {2 * half} bytes]"
            raise ImageError(code, "not a COSE_Sign1 by the certificate's key", expected=expected, got=shown(sign1))
    if payload != cbor2.dumps({"register_index": 0, "register_value": list(pcr0)}):
        raise ImageError("wrong_payload", "what is signed is not this image", expected=f"PCR0 {pcr0.hex()}")
    r, s = int.from_bytes(signature[:half], "big"), int.from_bytes(signature[half:], "big")
    signed = cbor2.dumps(["Signature1", protected, b"", payload])  # RFC 9052 section 4.4
    try:
        signer.key.verify(encode_dss_signature(r, s), signed, ec.ECDSA(hash_algorithm))
    except InvalidSignature as error:
        raise ImageError("bad_signature", "the image's signature does not verify") from error
    if at is not None and not signer.not_before <= at <= signer.not_after:
        period = f"{signer.not_before.isoformat()} to {signer.not_after.isoformat()}"
        raise ImageError("signer_not_valid", "the certificate is not valid", expected=period, got=at.isoformat())
    return signer


def _octets(entry: Record, field: str) -> bytes:
    """A byte string in the form in which serde writes one: an array of integers."""
    items = entry.array(field)
    octets = [item for item in items if isinstance(item, int) and 0 <= item <= 0xFF]
    if len(octets) != len(items):
        raise entry.refusal(field, "integers of 0 to 255", "another")
    return bytes(octets)


def _register(name: str, value: Json) -> bytes:
    if not isinstance(value, str) or not re.fullmatch(f"[0-9a-fA-F]{{{2 * DIGEST_SIZE}}}", value):
        expected = f"{2 * DIGEST_SIZE} hexadecimal digits"
        raise ImageError("malformed_measurements", f"{name} is no register", expected=expected, got=ascii(value)[:100])
    register = bytes.fromhex(value)
    if register == ZERO_PCR:
        raise ImageError("not_reference_values", f"{name} is zero: that of a debug enclave, and of no image")
    return register


def _json(data: bytes, code: str) -> Json:
    if len(data) > MAX_JSON_SIZE:
        raise ImageError(code, "not strict JSON: too large", expected=f"at most {MAX_JSON_SIZE} bytes", got=len(data))
    try:
        return decode_foreign(data, code=code, max_depth=MAX_JSON_DEPTH)
    except EvidenceError as error:
        raise ImageError(code, f"not strict {error.message}") from error
