"""The files of an image, as an enclave has them once Linux has unpacked its ramdisks one over the other.

Where Linux would make something else than a list of the entries says, :mod:`attestation.ramdisk` has an error; what is
read of a file with several names is one here. So what is read is what the enclave will read.
"""

from __future__ import annotations

import io
from collections.abc import Iterator
from typing import IO, BinaryIO, Final

from attestation.eif import SectionType
from attestation.errors import StrongroomError
from attestation.measure import EnclaveImage, SectionReader
from attestation.ramdisk import Kind, RamdiskEntry, RamdiskReader, Unpacking

ROOT_FILE_SYSTEM: Final = "rootfs"
"""Where in its ramdisk the file system stands that an enclave's init moves over ``/``."""
CONFIGURATION_PATH: Final = "/etc/strongroom/enclave.toml"
"""Where an image of ours has the configuration that is committed to PCR17."""
MAX_CONFIGURATION: Final = 1 << 20
"""Bytes."""


class ImageFileError(StrongroomError):
    """A file in an image is not there, or nobody can say what it will be: ``no_such_file``, ``not_a_file``,
    ``file_too_large``; of those that are unpacked ``files_too_large``, ``unsafe_entry``.
    """

    exit_code = 2


def ramdisks(image: EnclaveImage, file: BinaryIO, *, unpacking: Unpacking | None = None) -> Iterator[RamdiskReader]:
    """Each ramdisk of ``image``, which was measured from ``file``; read to its end when the next one is asked for.
    They make ``unpacking``, which is empty: by default one of their own.

    What was read of it was measured, once that has not raised. Raises ImageError, the reader RamdiskError, and
    both what ``file.read`` raises.
    """
    made = Unpacking() if unpacking is None else unpacking
    for section in image.sections:
        if section.type is SectionType.RAMDISK:
            data = SectionReader(file, section)
            yield RamdiskReader(data, section.size, offset=section.data_offset, unpacking=made)
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


def copy_file(image: EnclaveImage, file: BinaryIO, path: str, out: IO[bytes], *, limit: int) -> None:
    """Writes to ``out`` the file at ``path``, absolute, of the root file system of ``image``, which was measured from
    ``file``.

    ``limit`` is bytes. Raises ImageFileError; ImageError, and of that RamdiskError also for what is wrong with
    another file; and what ``file`` and ``out`` raise. Then what is in ``out`` is nothing that was measured.
    """
    wanted, unpacking, is_found = f"{ROOT_FILE_SYSTEM}/{path.strip('/')}", Unpacking(), False
    for reader in ramdisks(image, file, unpacking=unpacking):
        for entry in reader:
            if entry.path == wanted:
                out.writelines(content_of(entry, reader, limit=limit))
                is_found = True
    if is_found:
        return
    on_the_way = wanted
    while on_the_way := on_the_way.rpartition("/")[0]:
        kind = unpacking.kind(on_the_way)
        if kind not in (None, Kind.DIRECTORY):
            message = f"{ascii(on_the_way)[1:-1]}, on the way to the file, is no folder"
            raise ImageFileError("not_a_file", message, expected="a folder", got=kind)
    raise ImageFileError("no_such_file", "the image has no such file", expected=wanted, got="none")


def read_file(image: EnclaveImage, file: BinaryIO, path: str, *, limit: int) -> bytes:
    """The file at ``path``. Raises as :func:`copy_file`."""
    out = io.BytesIO()
    copy_file(image, file, path, out, limit=limit)
    return out.getvalue()


def read_configuration(image: EnclaveImage, file: BinaryIO) -> bytes:
    """The measured configuration of an image of ours. Raises as :func:`copy_file`."""
    return read_file(image, file, CONFIGURATION_PATH, limit=MAX_CONFIGURATION)
