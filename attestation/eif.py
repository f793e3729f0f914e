"""Enclave Image Files (EIF): what a Nitro enclave is started from, read strictly and measured in one pass.

An EIF is a header of 548 bytes, then sections to the end of the file, each a header of 12 bytes and its data; numbers
are big-endian. Format and measurement are those of AWS's ``aws-nitro-enclaves-image-format``; PROTOCOL.md section 4
says which bytes a register is over. AWS's reader walks from section to section, QEMU's seeks through the table in the
header: a file in which the two would find different images is refused here, as is whatever no builder writes.
"""

from __future__ import annotations

import hashlib
import re
import struct
import zlib
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from datetime import datetime
from enum import IntEnum, StrEnum
from pathlib import Path
from types import MappingProxyType
from typing import BinaryIO, Final, TypeAlias

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
CHUNK_SIZE: Final = 1 << 20
"""Bytes of the file that are held at a time."""

HASH_ALGORITHM: Final = "Sha384 { ... }"
"""What nitro-cli calls SHA-384."""

Progress: TypeAlias = Callable[[int, int], None]
"""Told bytes read and bytes in all."""


class SectionType(IntEnum):
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
_LIMITS: Final = {
    SectionType.CMDLINE: MAX_CMDLINE_SIZE,
    SectionType.SIGNATURE: MAX_SIGNATURE_SIZE,
    SectionType.METADATA: MAX_JSON_SIZE,
}
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
    ``malformed_signature``, ``wrong_payload``, ``bad_signature``, ``signer_not_valid``; of nitro-cli's output
    ``malformed_measurements``, ``unknown_hash``, ``not_reference_values``.
    """

    exit_code = 2


@dataclass(frozen=True, slots=True)
class Section:
    """One section: ``offset`` is that of its header in the file, ``size`` and ``sha384`` (48 bytes) are its data's."""

    type: SectionType
    """What the data are: kernel, command line, ramdisk, signature or metadata."""
    offset: int
    size: int
    sha384: bytes


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


@dataclass(frozen=True, slots=True)
class EnclaveImage:
    """An image that is well formed, with what a Nitro enclave started from it will have in its registers.

    Only kernel, command line, ramdisks and the signer's certificate are measured. The rest is the builder's word, held
    by a CRC: ``architecture``, ``default_memory``, ``default_cpus`` and ``metadata`` may be changed by anybody.
    """

    version: int
    """Of the format: 3 or 4."""
    architecture: Architecture
    default_memory: int
    """Bytes."""
    default_cpus: int
    """The number of virtual CPUs."""
    cmdline: str
    """The kernel's, at most 2,047 printable ASCII characters."""
    sections: tuple[Section, ...]
    """In the order of the file."""
    metadata: Mapping[str, Json] | None
    """None in version 3."""
    measurements: PcrSet
    """``pcr8`` is there when the image is signed."""
    signer: SigningCertificate | None
    """Who signed it, once the signature has verified. None for an image that is not signed."""
    sha384: bytes
    """Over the whole file, 48 bytes. It says which file this was; what is measured is ``measurements``."""

    def as_nitro_cli(self) -> dict[str, dict[str, str]]:
        """What ``nitro-cli build-enclave`` prints, as JSON, for this image."""
        registers = {f"PCR{index}": value.hex() for index, value in self.measurements.as_registers().items()}
        return {"Measurements": {"HashAlgorithm": HASH_ALGORITHM, **registers}}


def read_image(path: Path, *, at: datetime | None = None, progress: Progress | None = None) -> EnclaveImage:
    """:func:`measure_image` of a file. Raises ImageError, for a file that cannot be read ``unreadable_image``."""
    try:
        with path.open("rb") as file:
            return measure_image(file, at=at, progress=progress)
    except OSError as error:
        raise ImageError("unreadable_image", f"{path}: {error.strerror or type(error).__name__}") from error


def measure_image(file: BinaryIO, *, at: datetime | None = None, progress: Progress | None = None) -> EnclaveImage:
    """Reads an image from ``file``'s position to its end, once, without seeking, a chunk at a time.

    A signature must verify. Whether its certificate is valid is judged when ``at``, with a time zone, is given; else
    the period is only reported. Raises ImageError, and what ``file.read`` raises.
    """
    source = _Source(file)
    header = _read_header(source)
    image, application = hashlib.sha384(), hashlib.sha384()
    boot: bytes | None = None
    sections: list[Section] = []
    held: dict[SectionType, bytes] = {}
    for size in header.sizes:
        offset = source.position
        kind = _read_section_header(source, size, header.version, {section.type for section in sections})
        digest, kept = hashlib.sha384(), bytearray()
        for piece in source.pieces(size):
            digest.update(piece)
            if kind in (SectionType.KERNEL, SectionType.CMDLINE, SectionType.RAMDISK):
                image.update(piece)
            if kind is SectionType.RAMDISK and boot is not None:
                application.update(piece)
            if kind in _LIMITS:
                kept += piece
            if progress is not None:
                progress(source.position, header.end)
        if kind is SectionType.RAMDISK and boot is None:
            boot = image.digest()  # PCR1 is over what PCR0 begins with
        sections.append(Section(kind, offset, size, digest.digest()))
        held[kind] = bytes(kept)
    if file.read(1):
        raise ImageError("trailing_bytes", "bytes follow the last section", expected=f"{header.end} bytes")
    if source.crc != header.crc:
        raise ImageError("wrong_crc", "the file is damaged", expected=hex(header.crc), got=hex(source.crc))
    if boot is None:
        raise ImageError("wrong_sections", "the image has no ramdisk")
    if header.version >= _SINCE[SectionType.METADATA] and SectionType.METADATA not in held:
        raise ImageError("wrong_sections", "the image has no metadata, which version 4 requires")
    pcr0 = once_extended(image.digest())
    signature = held.get(SectionType.SIGNATURE)
    signer = None if signature is None else _verified_signer(signature, pcr0, at)
    pcr8 = None if signer is None else signer.pcr8
    metadata = held.get(SectionType.METADATA)
    measurements = PcrSet(pcr0, once_extended(boot), once_extended(application.digest()), pcr8)
    return EnclaveImage(
        version=header.version,
        architecture=header.architecture,
        default_memory=header.default_memory,
        default_cpus=header.default_cpus,
        cmdline=_cmdline(held[SectionType.CMDLINE]),
        sections=tuple(sections),
        metadata=None if metadata is None else _metadata(metadata),
        measurements=measurements,
        signer=signer,
        sha384=source.sha384.digest(),
    )


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


class _Source:
    """The file, once from its beginning to its end. ``crc`` and ``sha384`` are over all that was read."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self.position = 0
        self.crc = 0
        self.sha384 = hashlib.sha384()

    def pieces(self, size: int) -> Iterator[bytes]:
        """The next ``size`` bytes, which nobody has to believe in: a chunk at a time, as they are there."""
        end = self.position + size
        while self.position < end:
            piece = self._file.read(min(CHUNK_SIZE, end - self.position))
            if not piece:
                at_least, got = f"at least {end} bytes", f"{self.position} bytes"
                raise ImageError("truncated_eif", "the file ends too early", expected=at_least, got=got)
            self.position += len(piece)
            self.crc = zlib.crc32(piece, self.crc)
            self.sha384.update(piece)
            yield piece

    def take(self, size: int) -> bytes:
        return b"".join(self.pieces(size))


@dataclass(frozen=True, slots=True)
class _Header:
    version: int
    architecture: Architecture
    default_memory: int
    default_cpus: int
    sizes: tuple[int, ...]
    end: int
    """Of the last section, and so of the file."""
    crc: int


def _read_header(source: _Source) -> _Header:
    magic = source.take(len(MAGIC))
    if magic != MAGIC:
        expected, got = (ascii(each.decode("latin-1")) for each in (MAGIC, magic))
        raise ImageError("not_eif", "not an enclave image file, which begins otherwise", expected=expected, got=got)
    header = magic + source.take(HEADER.size - len(MAGIC))
    source.crc = zlib.crc32(header[:-CRC_SIZE])
    _, version, flags, memory, cpus, reserved, count, *table, unused, crc = HEADER.unpack(header)
    if version not in VERSIONS:
        raise ImageError("unsupported_eif", "a version that is not known", expected="3 or 4", got=version)
    if flags & ~FLAG_AARCH64:
        raise ImageError("unsupported_eif", "flags that are not known", expected="0 or 1", got=flags)
    if reserved or unused:
        raise _malformed("reserved fields are set", "zero", reserved or unused)
    if not MIN_SECTIONS <= count <= MAX_SECTIONS:
        raise _malformed("the number of sections is out of range", f"{MIN_SECTIONS} to {MAX_SECTIONS}", count)
    offsets, sizes = table[:MAX_SECTIONS], table[MAX_SECTIONS:]
    end = HEADER.size
    for index in range(count):
        if offsets[index] != end:
            raise _malformed(f"section {index} is not where the one before it ends", end, offsets[index])
        end += SECTION_HEADER.size + sizes[index]
    if any(offsets[count:]) or any(sizes[count:]):
        raise _malformed("the table goes on behind the last section", "zero", "another")
    architecture = Architecture.AARCH64 if flags else Architecture.X86_64
    return _Header(version, architecture, memory, cpus, tuple(sizes[:count]), end, crc)


def _read_section_header(source: _Source, size: int, version: int, seen: Collection[SectionType]) -> SectionType:
    where = f"the section at byte {source.position}"
    number, flags, own_size = SECTION_HEADER.unpack(source.take(SECTION_HEADER.size))
    if number not in list(SectionType):
        raise _malformed(f"{where} has a type that is not known", "1 to 5", number)
    if flags:
        raise _malformed(f"{where} has its reserved field set", "zero", flags)
    if own_size != size:
        raise _malformed(f"{where} has another size in the table", own_size, size)
    kind = SectionType(number)
    # AWS's reader takes these in any order and number and hashes as it goes; its builder writes this one.
    if kind is not SectionType.RAMDISK and kind in seen:
        raise ImageError("wrong_sections", f"{where} is another {kind.name}", expected="one", got="two")
    if kind in _BEHIND and _BEHIND[kind] not in seen:
        raise ImageError("wrong_sections", f"{where}, {kind.name}, comes before {_BEHIND[kind].name}")
    if version < _SINCE.get(kind, 0):
        raise ImageError("wrong_sections", f"{where}, {kind.name}, is not of version {version}")
    if size > _LIMITS.get(kind, size):
        raise _malformed(f"{where}, {kind.name}, is too large", f"<= {_LIMITS[kind]} bytes", size)
    return kind


def _malformed(message: str, expected: object, got: object) -> ImageError:
    return ImageError("malformed_eif", message, expected=expected, got=got)


def _cmdline(data: bytes) -> str:
    # The kernel reads to the first NUL: what stood behind it would be measured, but not obeyed.
    text = data.decode("latin-1")
    if not (text.isascii() and text.isprintable()):
        raise ImageError("bad_cmdline", "the command line is no line", expected="printable ASCII", got=ascii(text))
    return text


def _metadata(data: bytes) -> Mapping[str, Json]:
    """With the fields that AWS's reader insists on; it takes others, too."""
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


def _verified_signer(data: bytes, pcr0: bytes, at: datetime | None) -> SigningCertificate:
    """The certificate whose key signed ``pcr0``. ``data`` is the CBOR array of one map that AWS's tools write."""
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
