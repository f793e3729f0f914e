"""A build's own copy of what others gave: bounded, hashed on its way in, and read from there alone.

What was hashed and what is used later are the same bytes, whatever happens to the files that were given.
"""

from __future__ import annotations

import gzip
import hashlib
import importlib
import io
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Final

from parent.image.source import Progress
from parent.image.tree import CHUNK_SIZE, ImageBuildError

MAX_UNPACKED: Final = 16 << 30
"""Bytes that one build unpacks. An enclave holds its image in memory more than once: none of this size would boot."""

GZIP_MAGIC: Final = b"\x1f\x8b"
ZSTD_MAGIC: Final = b"\x28\xb5\x2f\xfd"


@dataclass(frozen=True, slots=True)
class Stored:
    """A file in the spool."""

    path: Path
    size: int
    digest: str
    """Over the ``size`` bytes at ``path``, hexadecimal."""


class HashingReader(io.RawIOBase):
    """At most ``size`` bytes of ``file``, hashed on their way with ``algorithm``."""

    def __init__(self, file: BinaryIO, size: int, algorithm: str) -> None:
        self._file, self._left, self._digest = file, size, hashlib.new(algorithm)

    def readable(self) -> bool:
        return True

    def read(self, size: int = -1, /) -> bytes:
        data = self._file.read(min(self._left, CHUNK_SIZE if size < 0 else size))
        self._left -= len(data)
        self._digest.update(data)
        return data

    @property
    def left(self) -> int:
        """Bytes that are still to come."""
        return self._left

    def finish(self) -> str:
        """Reads the rest, and gives the digest of all in hexadecimal."""
        while self.read(CHUNK_SIZE):
            pass
        return self._digest.hexdigest()


class Spool:
    """A private folder that holds at most ``most`` bytes. Who made the folder removes it."""

    def __init__(self, folder: Path, progress: Progress, *, most: int = MAX_UNPACKED) -> None:
        self.folder = folder
        self._progress = progress
        self._left = self._most = most
        self._count = 0

    def store(self, source: HashingReader, *, compression: str, what: str, algorithm: str = "sha256") -> Stored:
        """What ``source`` has, unpacked and hashed with ``algorithm``. ``compression`` is ``gzip``, ``zstd`` or empty;
        ``what`` is what goes on, for people.

        Raises ImageBuildError: ``damaged_source``, ``unsupported_compression``, ``too_large``.
        """
        self._count += 1
        path = self.folder / f"{self._count:03}"
        digest, size, total = hashlib.new(algorithm), 0, source.left
        try:
            reader = _opened(source, compression)
            with path.open("xb") as file:
                while piece := reader.read(CHUNK_SIZE):
                    size += len(piece)
                    self._left -= len(piece)
                    if self._left < 0:
                        raise ImageBuildError(
                            "too_large", "the image is too large when unpacked", expected=f"at most {self._most} bytes"
                        )
                    digest.update(piece)
                    file.write(piece)
                    self._progress(what, total - source.left, total)
        except (gzip.BadGzipFile, EOFError, zlib.error) as error:
            raise ImageBuildError("damaged_source", f"{what} cannot be unpacked: {error}") from error
        return Stored(path, size, digest.hexdigest())


def compression_of(file: BinaryIO) -> str:
    """By the first bytes of ``file``, which is at its beginning and can seek; it is there again afterwards."""
    magic = file.read(len(ZSTD_MAGIC))
    file.seek(-len(magic), io.SEEK_CUR)
    return "gzip" if magic.startswith(GZIP_MAGIC) else "zstd" if magic == ZSTD_MAGIC else ""


def _opened(source: HashingReader, compression: str) -> BinaryIO | HashingReader:
    match compression:
        case "gzip":
            return gzip.GzipFile(fileobj=source, mode="rb")  # type: ignore[return-value]  # it reads, and is no BinaryIO
        case "zstd":
            return _zstd()(source)
        case _:
            return source


def _zstd() -> Callable[[HashingReader], BinaryIO]:
    try:
        module = importlib.import_module("compression.zstd")  # Python's own, from 3.14 on
    except ImportError:
        raise ImageBuildError(
            "unsupported_compression",
            "a layer is packed with zstd, which this Python cannot read: use Python 3.14, or have it packed otherwise "
            "(`skopeo copy --dest-compress-format gzip`, or `buildah push --compression-format gzip`)",
            expected="gzip, or none",
            got="zstd",
        ) from None
    reader: Callable[[HashingReader], BinaryIO] = module.ZstdFile
    return reader


class _Part(io.RawIOBase):
    def __init__(self, file: BinaryIO, offset: int, size: int) -> None:
        self._file, self._start, self._size = file, offset, size
        file.seek(offset)

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._file.tell() - self._start

    def seek(self, offset: int, whence: int = io.SEEK_SET, /) -> int:
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self.tell(), io.SEEK_END: self._size}[whence]
        self._file.seek(self._start + min(max(base + offset, 0), self._size))
        return self.tell()

    def readinto(self, buffer: memoryview, /) -> int:  # type: ignore[override]
        data = self._file.read(min(len(buffer), self._size - self.tell()))
        buffer[: len(data)] = data
        return len(data)

    def close(self) -> None:
        self._file.close()
        super().close()


def open_part(path: Path, offset: int, size: int) -> BinaryIO:
    """``size`` bytes of a file from ``offset`` on, as a file of their own."""
    return io.BufferedReader(_Part(path.open("rb"), offset, size))
