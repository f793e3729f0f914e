"""Writes enclave image files: from parts, or from an image that gets another signature. PROTOCOL.md section 4.

Sections stand in the order of AWS's builder (aws/aws-nitro-enclaves-image-format at 08a998ba076e, src/utils/mod.rs):
kernel, command line, metadata, ramdisks, signature, without gaps, each behind its own header and in the table of the
file's header; so a reader that walks from section to section finds what one finds that seeks by the table. What is
written is measured on its way: nothing is read again, and no ramdisk is ever held.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import secrets
import zlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import BinaryIO, Final

from attestation.eif import (
    CRC_SIZE,
    FLAG_AARCH64,
    HEADER,
    KERNEL_HEAD,
    MAGIC,
    MAX_CMDLINE_SIZE,
    MAX_SECTIONS,
    SECTION_HEADER,
    Architecture,
    ImageError,
    SectionType,
    SigningCertificate,
    bzimage_length,
    read_cmdline,
    read_metadata,
)
from attestation.measure import Progress, SectionReader, read_image
from attestation.reference import PcrSet, once_extended
from attestation.strict_json import Json
from parent.image.cpio import archive, archive_size
from parent.image.signature import ImageSigner
from parent.image.tree import CHUNK_SIZE, Content, File, ImageBuildError, Tree

VERSION: Final = 4
DEFAULT_MEMORY: Final = 1 << 30
"""Bytes, and with ``DEFAULT_CPUS`` what AWS's builder writes. Nothing measures or obeys them."""
DEFAULT_CPUS: Final = 2
BUILD_TOOL: Final = "strongroom"

_MEASURED: Final = (SectionType.KERNEL, SectionType.CMDLINE, SectionType.RAMDISK)
_ARM64_MAGIC: Final = b"ARM\x64"
_ARM64_MAGIC_AT: Final = 56
"""Linux, Documentation/arch/arm64/booting.rst."""
_POLYNOMIAL: Final = 0xEDB88320
"""Of the CRC-32 (IEEE), its bits reflected: that of x**31 is the lowest."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ImageMetadata:
    """What an image says of itself. No register is over it: it is for people."""

    name: str
    version: str
    """Of the image, in the builder's own numbers."""
    built_at: int
    """Seconds since 1970: SOURCE_DATE_EPOCH, as the time of day would make each build another file."""
    tool_version: str
    kernel_version: str
    operating_system: str = "Linux"
    docker_info: Json = None
    """What ``docker inspect`` says of the image, where there is one."""
    custom: Json = None

    def encode(self) -> bytes:
        """JSON with the fields that AWS's reader insists on, in UTF-8: sorted, without spaces.

        Raises ImageBuildError ``bad_metadata`` for what no reader would take.
        """
        try:
            fields = {
                "ImageName": self.name,
                "ImageVersion": self.version,
                "BuildMetadata": {
                    "BuildTime": datetime.fromtimestamp(self.built_at, UTC).isoformat(),
                    "BuildTool": BUILD_TOOL,
                    "BuildToolVersion": self.tool_version,
                    "OperatingSystem": self.operating_system,
                    "KernelVersion": self.kernel_version,
                },
                "DockerInfo": self.docker_info,
                "CustomMetadata": self.custom,
            }
            text = json.dumps(fields, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)
            encoded = text.encode("utf-8")
            read_metadata(encoded)
        except ImageError as error:
            raise ImageBuildError("bad_metadata", error.message, expected=error.expected, got=error.got) from error
        except (ValueError, OverflowError, RecursionError) as error:
            raise ImageBuildError("bad_metadata", f"not to be written as JSON: {error!a}"[:200]) from error
        return encoded


def write_image(
    out: BinaryIO,
    *,
    kernel: Content,
    cmdline: str,
    ramdisks: Sequence[Tree],
    metadata: ImageMetadata,
    architecture: Architecture,
    signer: ImageSigner | None = None,
    progress: Progress | None = None,
) -> PcrSet:
    """Writes an image into ``out``, which is empty and can seek, and returns its registers.

    The same parts give the same bytes, unless the signer's signatures differ each time, as those of a KMS do. Raises
    ImageBuildError: ``bad_kernel``, ``bad_cmdline``, ``bad_metadata``, ``wrong_sections``, what
    archives and signatures raise; and OSError.
    """
    boot = File.of("kernel", kernel)
    _check_kernel(boot, architecture)
    line = _encoded_cmdline(cmdline)
    described = metadata.encode()
    sizes = [archive_size(tree) for tree in ramdisks]
    if not sizes:
        raise ImageBuildError("wrong_sections", "an image has a ramdisk", expected="at least one", got="none")
    total = HEADER.size + sum(SECTION_HEADER.size + size for size in (boot.size, len(line), len(described), *sizes))
    writer = _Writer(out, VERSION, architecture, DEFAULT_MEMORY, DEFAULT_CPUS, total, progress)
    writer.section(SectionType.KERNEL, boot.size, boot.pieces())
    writer.section(SectionType.CMDLINE, len(line), [line])
    writer.section(SectionType.METADATA, len(described), [described])
    for tree, size in zip(ramdisks, sizes, strict=True):
        writer.section(SectionType.RAMDISK, size, archive(tree))
    if signer is not None:
        writer.sign(signer.section(writer.pcr0), signer.certificate)
    return writer.finish()


def sign_image(source: Path, target: Path, signer: ImageSigner, *, progress: Progress | None = None) -> PcrSet:
    """Writes the image ``source`` to ``target``, which may be the same file, with ``signer``'s signature in the place
    of the one that it has, or at its end. Everything else stays, and so do PCR0, PCR1 and PCR2.

    Raises ImageError for a source that is no good image, also when its old signature does not verify, or that changes
    meanwhile; ImageBuildError ``wrong_sections`` and what signatures raise; and OSError.
    """
    image = read_image(source)
    signature = signer.section(image.measurements.pcr0)
    kept = [section.size for section in image.sections if section.type is not SectionType.SIGNATURE]
    total = HEADER.size + sum(SECTION_HEADER.size + size for size in kept)
    with source.open("rb") as file, replacing(target) as out:
        memory, cpus = image.default_memory, image.default_cpus
        writer = _Writer(out, image.version, image.architecture, memory, cpus, total, progress)
        for section in image.sections:
            if section.type is SectionType.SIGNATURE:
                writer.sign(signature, signer.certificate)
            else:
                writer.section(section.type, section.size, _pieces(SectionReader(file, section)))
        if len(kept) == len(image.sections):
            writer.sign(signature, signer.certificate)
        return writer.finish()


@contextlib.contextmanager
def replacing(target: Path) -> Iterator[BinaryIO]:
    """A new file, to write and to read, that takes the place of ``target`` once all is written; on any error, Ctrl-C
    among them, it is removed and ``target`` is what it was. Raises OSError.
    """
    partial = target.with_name(f".{secrets.token_hex(8)}.partial")
    with partial.open("x+b") as out:
        try:
            yield out
            out.flush()
            os.fsync(out.fileno())
            partial.replace(target)
        except BaseException:
            partial.unlink(missing_ok=True)
            raise


class _Writer:
    """The file as it comes to be. The header is written last, as the CRC in it is over all that follows."""

    def __init__(
        self,
        out: BinaryIO,
        version: int,
        architecture: Architecture,
        memory: int,
        cpus: int,
        total: int,
        progress: Progress | None,
    ) -> None:
        self._out, self._version, self._architecture, self._memory, self._cpus = (
            out,
            version,
            architecture,
            memory,
            cpus,
        )
        self._total, self._progress = total, progress
        self._offsets: list[int] = []
        self._sizes: list[int] = []
        self._position = out.write(bytes(HEADER.size))
        self._crc = 0
        self._image, self._application = hashlib.sha384(), hashlib.sha384()
        self._boot: bytes | None = None
        self._signer: SigningCertificate | None = None

    @property
    def pcr0(self) -> bytes:
        return once_extended(self._image.digest())

    def section(self, kind: SectionType, size: int, pieces: Iterable[bytes]) -> None:
        """``pieces`` come to ``size`` bytes."""
        if len(self._sizes) == MAX_SECTIONS:
            expected = f"at most {MAX_SECTIONS}"
            raise ImageBuildError("wrong_sections", "no room for a section", expected=expected, got=MAX_SECTIONS + 1)
        self._offsets.append(self._position)
        self._sizes.append(size)
        self._write(SECTION_HEADER.pack(kind, 0, size))
        begin = self._position
        for piece in pieces:
            if kind in _MEASURED:
                self._image.update(piece)
            if kind is SectionType.RAMDISK and self._boot is not None:
                self._application.update(piece)
            self._write(piece)
            if self._progress is not None:
                self._progress(self._position, self._total)
        assert self._position - begin == size
        if kind is SectionType.RAMDISK and self._boot is None:
            self._boot = self._image.digest()  # PCR1 is over what PCR0 begins with

    def sign(self, data: bytes, signer: SigningCertificate) -> None:
        self._total += SECTION_HEADER.size + len(data)
        self.section(SectionType.SIGNATURE, len(data), [data])
        self._signer = signer

    def finish(self) -> PcrSet:
        count = len(self._sizes)
        table = [*self._offsets, *[0] * (MAX_SECTIONS - count), *self._sizes, *[0] * (MAX_SECTIONS - count)]
        flags = FLAG_AARCH64 if self._architecture is Architecture.AARCH64 else 0
        fields = (MAGIC, self._version, flags, self._memory, self._cpus, 0, count, *table, 0)
        header = HEADER.pack(*fields, 0)[:-CRC_SIZE]
        crc = _crc_behind(zlib.crc32(header), self._crc, self._position - HEADER.size)
        self._out.seek(0)
        self._out.write(HEADER.pack(*fields, crc))
        assert self._boot is not None
        pcr8 = None if self._signer is None else self._signer.pcr8
        return PcrSet(self.pcr0, once_extended(self._boot), once_extended(self._application.digest()), pcr8)

    def _write(self, data: bytes) -> None:
        self._out.write(data)
        self._position += len(data)
        self._crc = zlib.crc32(data, self._crc)


def _pieces(reader: SectionReader) -> Iterator[bytes]:
    while piece := reader.read(CHUNK_SIZE):
        yield piece


def _check_kernel(kernel: File, architecture: Architecture) -> None:
    """Nothing in a measurement says where the kernel ends and the command line begins: an x86_64 kernel says it itself,
    and must be as long as it says.
    """
    with kernel.open() as file:
        head = file.read(KERNEL_HEAD)
    if architecture is Architecture.AARCH64:
        if head[_ARM64_MAGIC_AT : _ARM64_MAGIC_AT + len(_ARM64_MAGIC)] != _ARM64_MAGIC:
            raise ImageBuildError(
                "bad_kernel", "no kernel for aarch64", expected="an uncompressed Image", got="another"
            )
        return
    length = bzimage_length(head)
    if length is None:
        raise ImageBuildError("bad_kernel", "no kernel for x86_64", expected="a bzImage", got="another file")
    if length != kernel.size:
        message = "the kernel is not as long as it says: nothing, no signature either, may stand behind it"
        raise ImageBuildError("bad_kernel", message, expected=f"{length} bytes", got=f"{kernel.size} bytes")


def _encoded_cmdline(cmdline: str) -> bytes:
    data = cmdline.encode("utf-8", "surrogatepass")
    if len(data) > MAX_CMDLINE_SIZE:
        expected = f"at most {MAX_CMDLINE_SIZE} bytes"
        raise ImageBuildError("bad_cmdline", "more than the kernel reads", expected=expected, got=f"{len(data)} bytes")
    try:
        read_cmdline(data, offset=0)
    except ImageError as error:
        raise ImageBuildError("bad_cmdline", error.message, expected=error.expected, got=error.got) from error
    return data


def _crc_behind(first: int, second: int, size: int) -> int:
    """The CRC-32 of two byte strings, one behind the other, from those of each and the ``size`` of the second.

    Bytes behind it multiply a CRC by x**8 for each, modulo the polynomial; the rest adds up.
    """
    power, factor, shifted = 8 * size, 1 << 30, first  # factor: x, then its squares
    while power:
        if power & 1:
            shifted = _product(shifted, factor)
        factor = _product(factor, factor)
        power >>= 1
    return shifted ^ second


def _product(one: int, other: int) -> int:
    """Of two polynomials over GF(2), modulo that of the CRC."""
    product = 0
    for bit in range(31, -1, -1):  # from x**0 on
        if one >> bit & 1:
            product ^= other
        other = other >> 1 ^ (_POLYNOMIAL if other & 1 else 0)
    return product
