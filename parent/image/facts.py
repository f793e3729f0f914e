"""What an image says of the machine that it needs: what it takes of memory, and the architecture."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from attestation.eif import Architecture, ImageError, SectionType
from attestation.measure import SectionReader, measure_image
from attestation.ramdisk import RamdiskReader
from parent.image.sizing import ImageSize, rounded

_PAGE: Final = 4096
_INODE: Final = 1024
"""Bytes that a tmpfs keeps of an entry beside its content, about."""


@dataclass(frozen=True, slots=True)
class ImageFacts:
    """Of one image, which is well formed."""

    size: ImageSize
    architecture: Architecture


def read_facts(path: Path, *, progress: Callable[[int, int], None] | None = None) -> ImageFacts:
    """Reads the image once for its structure and its ramdisks a second time. Raises ImageError."""
    try:
        with path.open("rb") as file:
            image = measure_image(file, progress=progress)
            unpacked = 0
            for section in image.sections:
                if section.type is SectionType.RAMDISK:
                    ramdisk = RamdiskReader(SectionReader(file, section), section.size, offset=section.data_offset)
                    unpacked += sum(rounded(entry.size, _PAGE) + _INODE for entry in ramdisk)
            return ImageFacts(ImageSize(path.stat().st_size, unpacked), image.architecture)
    except OSError as error:
        raise ImageError("unreadable_image", f"{path}: {error.strerror or type(error).__name__}") from error
