"""What an image says of the machine that it needs: its size in memory, and the CPU that it was built for."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from attestation.eif import Architecture, ImageError
from attestation.image_files import CONFIGURATION_PATH, MAX_CONFIGURATION, ROOT_FILE_SYSTEM, content_of, ramdisks
from attestation.measure import measure_image
from attestation.model_memory import DEFAULT_WORK, Work
from parent.config import engine_work, read_document
from parent.image.sizing import ImageSize, rounded

_PAGE: Final = 4096
_INODE: Final = 1024
"""Bytes that a tmpfs keeps of an entry beside its content, about."""
CPU_FEATURES: Final = "/llama_cpp/lib/cpu-features"
"""How the path of the file ends in which an image says what its llama.cpp was compiled for: the kernel's names of
features, one a line."""
MAX_FEATURES_SIZE: Final = 4096
_CONFIGURATION: Final = ROOT_FILE_SYSTEM + CONFIGURATION_PATH


@dataclass(frozen=True, slots=True)
class ImageFacts:
    """Of one image, which is well formed."""

    size: ImageSize
    architecture: Architecture
    cpu_features: frozenset[str] | None = None
    """The kernel's names of those that its llama.cpp was compiled for. None: the image does not say."""
    configuration: bytes | None = None
    """Its ``enclave.toml``. None: the image has none."""

    @property
    def work(self) -> Work:
        """What its engine is to hold; what ours holds by default, where the image does not say. Raises
        LaunchConfigurationError.
        """
        return DEFAULT_WORK if self.configuration is None else engine_work(read_document(self.configuration))


def read_facts(path: Path, *, progress: Callable[[int, int], None] | None = None) -> ImageFacts:
    """Reads the image once for its structure and its ramdisks a second time. Raises ImageError, ImageFileError."""
    try:
        with path.open("rb") as file:
            image = measure_image(file, progress=progress)
            unpacked, features, configuration = 0, None, None
            for ramdisk in ramdisks(image, file):
                for entry in ramdisk:
                    unpacked += rounded(entry.size, _PAGE) + _INODE
                    if entry.path.endswith(CPU_FEATURES):
                        stated = b"".join(content_of(entry, ramdisk, limit=MAX_FEATURES_SIZE))
                        features = frozenset(stated.decode("ascii", "replace").split())
                    elif entry.path == _CONFIGURATION:
                        configuration = b"".join(content_of(entry, ramdisk, limit=MAX_CONFIGURATION))
            size = ImageSize(path.stat().st_size, unpacked)
            return ImageFacts(size, image.architecture, features, configuration)
    except OSError as error:
        raise ImageError("unreadable_image", f"{path}: {error.strerror or type(error).__name__}") from error
