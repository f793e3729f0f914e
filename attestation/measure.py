"""Measures an enclave image file: one reading, from a file or a pipe, in constant memory, and on several CPUs.

PROTOCOL.md section 4 says which bytes a register is over. PCR0 and PCR2 have no prefix in common, so that every byte of
an application goes through SHA-384 twice and through the CRC once; PCR1 is over what PCR0 begins with. All of these are
fed from one buffer, so that they agree on what was read.
"""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import zlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import BinaryIO, Final, TypeAlias

from attestation.eif import (
    CRC_AT,
    HASH_ALGORITHM,
    HEADER,
    KERNEL_HEAD,
    LIMITS,
    MAGIC,
    SECTION_HEADER,
    Architecture,
    ImageError,
    Section,
    SectionType,
    SigningCertificate,
    bzimage_length,
    read_cmdline,
    read_header,
    read_metadata,
    read_section_header,
    require_magic,
    require_sections,
    verify_signature,
)
from attestation.parallel_hashes import CHUNK_SIZE, ParallelHashes, Update
from attestation.reference import PcrSet, once_extended
from attestation.strict_json import Json

Progress: TypeAlias = Callable[[int, int], None]
"""Told bytes read and bytes in all."""
_MEASURED: Final = (SectionType.KERNEL, SectionType.CMDLINE, SectionType.RAMDISK)


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
    kernel_length: int | None
    """Bytes that the kernel states of itself (:func:`attestation.eif.bzimage_length`)."""
    sha384: bytes | None
    """Over the whole file, 48 bytes, where it was asked for. It says which file this was; what is measured is
    ``measurements``."""

    def as_nitro_cli(self) -> dict[str, dict[str, str]]:
        """What ``nitro-cli build-enclave`` prints, as JSON, for this image."""
        registers = {f"PCR{index}": value.hex() for index, value in self.measurements.as_registers().items()}
        return {"Measurements": {"HashAlgorithm": HASH_ALGORITHM, **registers}}

    def named_sections(self) -> dict[str, Section]:
        """The sections in their order: ``kernel``, ``cmdline``, ``metadata``, ``signature``, ``ramdisk0`` and on."""
        named: dict[str, Section] = {}
        numbers = itertools.count()
        for section in self.sections:
            name = section.type.name.lower()
            named[f"{name}{next(numbers)}" if section.type is SectionType.RAMDISK else name] = section
        return named

    def require_boundary(self) -> None:
        """That nobody moved the beginning of the command line to the end of the kernel, which changes no register.

        An x86_64 kernel states its length, and the section must have just that one. An aarch64 kernel states what it
        takes in memory, which is more than its file has: of it nothing can be asked here. Raises ImageError
        ``no_boundary``.
        """
        if self.architecture is not Architecture.X86_64:
            return
        kernel = self.named_sections()["kernel"]
        if self.kernel_length is None:
            message = "the kernel is no bzImage, and does not say where it ends"
            raise ImageError("no_boundary", message, offset=kernel.data_offset, expected="a bzImage", got="another")
        if self.kernel_length != kernel.size:
            expected, got = f"{self.kernel_length} bytes", f"{kernel.size} bytes"
            message = "the kernel's section is not as long as the kernel says that it is"
            raise ImageError("no_boundary", message, offset=kernel.data_offset, expected=expected, got=got)


def read_image(
    path: Path, *, at: datetime | None = None, progress: Progress | None = None, digest_file: bool = False
) -> EnclaveImage:
    """:func:`measure_image` of a file. Raises ImageError, for a file that cannot be read ``unreadable_image``."""
    try:
        with path.open("rb") as file:
            return measure_image(file, at=at, progress=progress, digest_file=digest_file)
    except OSError as error:
        raise ImageError("unreadable_image", f"{path}: {error.strerror or type(error).__name__}") from error


def measure_image(
    file: BinaryIO, *, at: datetime | None = None, progress: Progress | None = None, digest_file: bool = False
) -> EnclaveImage:
    """Reads an image from ``file``'s position to its end, once, without seeking, and holds ``BUFFERS`` pieces at most.

    A signature must verify. Whether its certificate is valid is judged when ``at``, with a time zone, is given; else
    the period is only reported. ``digest_file`` asks for the digest of the whole file too, which takes a third pass.
    Raises ImageError, and what ``file.readinto`` raises.
    """
    with ParallelHashes() as hashes:
        source = _Source(file, hashes, digest_file)
        magic = source.take(len(MAGIC), is_covered=False)
        require_magic(magic)
        fields = magic + source.take(HEADER.size - len(MAGIC), is_covered=False)
        header = read_header(fields)
        source.crc.update(fields[:CRC_AT])
        image = hashlib.sha384()
        application = None
        boot: bytes | None = None
        places: list[tuple[SectionType, int, int]] = []
        digests = []
        held: dict[SectionType, tuple[int, bytes]] = {}
        kernel = b""
        for size in header.sizes:
            offset = source.position
            kind = read_section_header(
                source.take(SECTION_HEADER.size),
                offset=offset,
                size=size,
                version=header.version,
                seen={kind for kind, _, _ in places},
            )
            digest, kept = hashlib.sha384(), bytearray()
            updates = [digest.update, image.update if kind in _MEASURED else None]
            if kind is SectionType.RAMDISK and application is not None:
                updates.append(application.update)
            for piece in source.pieces(size, *updates):
                if kind in LIMITS:
                    kept += piece
                if kind is SectionType.KERNEL and len(kernel) < KERNEL_HEAD:
                    kernel += bytes(piece[: KERNEL_HEAD - len(kernel)])
                if progress is not None:
                    progress(source.position, header.end)
            if kind is SectionType.RAMDISK:
                hashes.finish()
                if boot is None:
                    boot = image.digest()  # PCR1 is over what PCR0 begins with
                elif application is None:
                    application = digest.copy()  # PCR2 begins with the second ramdisk
            places.append((kind, offset, size))
            digests.append(digest)
            held[kind] = offset + SECTION_HEADER.size, bytes(kept)
        source.require_end(header.end)
        hashes.finish()
        if source.crc.value != header.crc:
            expected, got = hex(header.crc), hex(source.crc.value)
            raise ImageError("wrong_crc", "the file is damaged", offset=CRC_AT, expected=expected, got=got)
    sections = tuple(Section(*place, digest.digest()) for place, digest in zip(places, digests, strict=True))
    require_sections(header, held)
    assert boot is not None  # by require_sections
    pcr0 = once_extended(image.digest())
    signer = metadata = None
    if SectionType.SIGNATURE in held:
        with _located(held[SectionType.SIGNATURE][0]):
            signer = verify_signature(held[SectionType.SIGNATURE][1], pcr0, at=at)
    if SectionType.METADATA in held:
        with _located(held[SectionType.METADATA][0]):
            metadata = read_metadata(held[SectionType.METADATA][1])
    cmdline_offset, cmdline = held[SectionType.CMDLINE]
    pcr2 = once_extended((hashlib.sha384() if application is None else application).digest())
    return EnclaveImage(
        version=header.version,
        architecture=header.architecture,
        default_memory=header.default_memory,
        default_cpus=header.default_cpus,
        cmdline=read_cmdline(cmdline, offset=cmdline_offset),
        sections=sections,
        metadata=metadata,
        measurements=PcrSet(pcr0, once_extended(boot), pcr2, None if signer is None else signer.pcr8),
        signer=signer,
        kernel_length=bzimage_length(kernel),
        sha384=None if source.sha384 is None else source.sha384.digest(),
    )


@contextlib.contextmanager
def _located(offset: int) -> Iterator[None]:
    """What is wrong with data that were held is said of where they begin in the file."""
    try:
        yield
    except ImageError as error:
        raise error.at(offset) from error


class SectionReader:
    """The data of one section of a file that was measured, read again: what it gives, up to its end, is what was
    measured, or ImageError ``changed_image``.
    """

    def __init__(
        self, file: BinaryIO, section: Section, *, progress: Progress | None = None, before: int = 0, total: int = 0
    ) -> None:
        """``file`` can seek, and nobody else reads it meanwhile. ``progress`` is told of ``total`` bytes, of which
        ``before`` were there before.
        """
        self._file, self._section = file, section
        self._progress, self._before, self._total = progress, before, total
        self._left, self._digest = section.size, hashlib.sha384()
        file.seek(section.data_offset)

    def read(self, size: int, /) -> bytes:
        """At most ``size`` bytes; none at the end. Raises ImageError ``changed_image`` there at the latest, and what
        ``file.read`` raises.
        """
        data = self._file.read(min(size, self._left))
        self._digest.update(data)
        self._left -= len(data)
        if self._progress is not None:
            self._progress(self._before + self._section.size - self._left, self._total)
        if not data and self._digest.digest() != self._section.sha384:
            message = f"the section {self._section.type.name} is not what it was when the file was measured"
            raise ImageError("changed_image", message, offset=self._section.offset)
        return data

    def finish(self) -> None:
        """Reads what is left. Nothing that was read may be used before. Raises as :meth:`read`."""
        while self.read(CHUNK_SIZE):
            pass


class _Crc32:
    """As a hash."""

    def __init__(self) -> None:
        self.value = 0

    def update(self, data: bytes | memoryview) -> None:
        self.value = zlib.crc32(data, self.value)


class _Source:
    """The file, once from its beginning to its end. ``crc`` is over what it covers, ``sha384`` over all."""

    def __init__(self, file: BinaryIO, hashes: ParallelHashes, digest_file: bool) -> None:
        self._file, self._hashes = file, hashes
        self._readinto: Callable[[memoryview], int | None] = file.readinto  # type: ignore[attr-defined]  # as all of io
        self.position = 0
        self.crc = _Crc32()
        self.sha384 = hashlib.sha384() if digest_file else None

    def pieces(self, size: int, *updates: Update | None, is_covered: bool = True) -> Iterator[memoryview]:
        """The next ``size`` bytes, which nobody has to believe in: a piece at a time, as they are there.

        Each is fed to all of ``updates``. What they come to is there once the hashes are finished. A piece is there
        until the next one is asked for.
        """
        end = self.position + size
        of_file = None if self.sha384 is None else self.sha384.update
        crc = self.crc.update if is_covered else None
        while self.position < end:
            buffer = self._hashes.buffer()
            count = self._readinto(buffer[: end - self.position])
            if count is None:
                raise self._not_yet()
            piece = buffer[:count]
            if not piece:
                expected, got = f"at least {end} bytes", f"{self.position} bytes"
                message = "the file ends too early"
                raise ImageError("truncated_eif", message, offset=self.position, expected=expected, got=got)
            self.position += len(piece)
            self._hashes.feed(buffer, piece, (crc, of_file, *updates))
            yield piece

    def take(self, size: int, *, is_covered: bool = True) -> bytes:
        return b"".join(map(bytes, self.pieces(size, is_covered=is_covered)))

    def require_end(self, end: int) -> None:
        last: bytes | None = self._file.read(1)
        if last is None:
            raise self._not_yet()
        if last:
            message, expected = "bytes follow the last section", f"{end} bytes"
            raise ImageError("trailing_bytes", message, offset=end, expected=expected, got="more")

    def _not_yet(self) -> ImageError:
        """Of a file that does not wait for its data: in a buffer there is what was read before, and no end is one."""
        message, expected = "the file has no data yet", "one that waits for its data"
        return ImageError(
            "unreadable_image", message, offset=self.position, expected=expected, got="a non-blocking one"
        )
