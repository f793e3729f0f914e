"""The files of an image, as an enclave has them once Linux has unpacked its ramdisks one over the other.

Linux (init/initramfs.c) goes through a link on an entry's way, writes a file's other names with it, and says nothing of
an entry for which there is no place. Here each of these is an error: what is read is what the enclave will read.
"""

from __future__ import annotations

import io
from collections.abc import Iterator
from typing import IO, BinaryIO, Final

from attestation.eif import SectionType
from attestation.errors import StrongroomError
from attestation.measure import EnclaveImage, SectionReader
from attestation.ramdisk import Kind, RamdiskEntry, RamdiskReader

ROOT_FILE_SYSTEM: Final = "rootfs"
"""Where in its ramdisk the file system stands that an enclave's init moves over ``/``."""
CONFIGURATION_PATH: Final = "/etc/strongroom/enclave.toml"
"""Where an image of ours has the configuration that is committed to PCR17."""
MAX_CONFIGURATION: Final = 1 << 20
"""Bytes."""


class ImageFileError(StrongroomError):
    """A file in an image is not there, or nobody can say what it will be: ``no_such_file``, ``not_a_file``,
    ``several_files``, ``file_too_large``, ``unsafe_entry``.
    """

    exit_code = 2


class Unpacking:
    """What the entries of an image make, one after the other, as long as it is what they say."""

    def __init__(self) -> None:
        """Of an empty root."""
        self._kinds = {"": Kind.DIRECTORY}

    def add(self, entry: RamdiskEntry) -> None:
        """The next one, over those of the ramdisks before. Raises ImageFileError ``unsafe_entry`` for an entry whose
        folder does not come before it, or is a link or a file, and for a folder in the place of something else, or
        something else in that of a folder.
        """
        folder = self._kinds.get(entry.path.rpartition("/")[0])
        if folder is None:
            raise unsafe_entry(entry.path, "is in a folder that does not come before it")
        if folder is not Kind.DIRECTORY:
            raise unsafe_entry(entry.path, "is within what is no folder, or a link to one")
        was_folder = self._kinds.setdefault(entry.path, entry.kind) is Kind.DIRECTORY
        if was_folder is not (entry.kind is Kind.DIRECTORY):
            raise unsafe_entry(entry.path, f"takes the place of {'a folder' if was_folder else 'what is no folder'}")
        self._kinds[entry.path] = entry.kind

    def kind(self, path: str) -> Kind | None:
        """What is at ``path``, as in :class:`~attestation.ramdisk.RamdiskEntry`, by now; None: nothing."""
        return self._kinds.get(path)


def unsafe_entry(path: str, what: str) -> ImageFileError:
    """``what`` says of the entry at ``path`` why nobody should unpack it."""
    return ImageFileError("unsafe_entry", f"an entry {what}", got=ascii(path)[1:-1])


def ramdisks(image: EnclaveImage, file: BinaryIO) -> Iterator[RamdiskReader]:
    """Each ramdisk of ``image``, which was measured from ``file``; read to its end when the next one is asked for.

    What was read of it was measured, once that has not raised. Raises ImageError, and what ``file.read`` raises.
    """
    for section in image.sections:
        if section.type is SectionType.RAMDISK:
            data = SectionReader(file, section)
            yield RamdiskReader(data, section.size, offset=section.data_offset)
            data.finish()


def content_of(entry: RamdiskEntry, reader: RamdiskReader, *, limit: int) -> Iterator[bytes]:
    """The content of the entry that came last from ``reader``, in pieces, at most ``limit`` bytes together.

    Raises ImageFileError ``not_a_file``, also for one of several names of a file: what is written to another is in this
    one, too; and ``file_too_large``.
    """
    if entry.kind is not Kind.FILE or entry.links > 1:
        leads = "" if entry.target is None else f", to {entry.target!a}"
        got = f"one of {entry.links} names of a file" if entry.kind is Kind.FILE else f"{entry.kind}{leads}"
        message = f"{ascii(entry.path)[1:-1]} is no file with content of its own"
        raise ImageFileError("not_a_file", message, expected="a file", got=got)
    if entry.size > limit:
        message, got = f"{ascii(entry.path)[1:-1]} is too large", f"{entry.size} bytes"
        raise ImageFileError("file_too_large", message, expected=f"at most {limit} bytes", got=got)
    return reader.content()


def copy_file(image: EnclaveImage, file: BinaryIO, path: str, out: IO[bytes], *, limit: int) -> int:
    """Writes to ``out``, from its beginning, the file at ``path``, absolute, of the root file system of ``image``,
    which was measured from ``file``. Returns how many entries have that name: it is the last of them that is written.

    ``limit`` is bytes. Raises ImageFileError, also for an entry that is not the last; ImageError; and what ``file`` and
    ``out`` raise. Then what is in ``out`` is nothing that was measured.
    """
    wanted, unpacking, copies = f"{ROOT_FILE_SYSTEM}/{path.strip('/')}", Unpacking(), 0
    for reader in ramdisks(image, file):
        for entry in reader:
            unpacking.add(entry)
            if entry.path == wanted:
                pieces = content_of(entry, reader, limit=limit)
                out.seek(0)
                out.truncate()
                out.writelines(pieces)
                copies += 1
    if not copies:
        on_the_way = wanted
        while on_the_way := on_the_way.rpartition("/")[0]:
            kind = unpacking.kind(on_the_way)
            if kind not in (None, Kind.DIRECTORY):
                message = f"{ascii(on_the_way)[1:-1]}, on the way to the file, is no folder"
                raise ImageFileError("not_a_file", message, expected="a folder", got=kind)
        raise ImageFileError("no_such_file", "the image has no such file", expected=wanted, got="none")
    return copies


def read_file(image: EnclaveImage, file: BinaryIO, path: str, *, limit: int) -> bytes:
    """The one file at ``path``, as :func:`copy_file` has it. Raises ImageFileError, ``several_files`` too: who has
    listed an image may have seen another one than the last; ImageError; and what ``file`` raises.
    """
    out = io.BytesIO()
    copies = copy_file(image, file, path, out, limit=limit)
    if copies > 1:
        message = f"several entries of the image are {ascii(path)[1:-1]}"
        raise ImageFileError("several_files", message, expected="one", got=copies)
    return out.getvalue()


def read_configuration(image: EnclaveImage, file: BinaryIO) -> bytes:
    """The measured configuration of an image of ours. Raises as :func:`read_file`."""
    return read_file(image, file, CONFIGURATION_PATH, limit=MAX_CONFIGURATION)
