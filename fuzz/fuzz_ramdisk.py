"""A ramdisk of any content is listed, or is a RamdiskError; what is listed has safe paths and its whole content."""

from __future__ import annotations

import gzip
import io

from attestation.ramdisk import MAX_NAME, Kind, RamdiskError, RamdiskReader
from tests.cpio_files import Member, archive, device, folder, link, packed


def one_input(data: bytes) -> None:
    _list(data)
    _list(gzip.compress(data, mtime=0))  # else no change would get past the CRC


def _list(data: bytes) -> None:
    reader = RamdiskReader(io.BytesIO(data), len(data), offset=548)
    refused, offset = "", 548
    try:
        for entry in reader:
            assert ".." not in entry.path.split("/"), "a path that leads out"
            assert not entry.path.startswith("/"), "a path from the root"
            assert len(entry.path) < MAX_NAME, "a path that Linux does not take"
            assert (entry.target is None) == (entry.kind is not Kind.SYMLINK)
            size = sum(map(len, reader.content()))
            assert size == (0 if entry.kind is Kind.SYMLINK else entry.size), "content that is not whole"
    except RamdiskError as error:
        refused, offset = str(error), error.offset or 0
    assert 548 <= offset <= 548 + len(data), "an error of no byte, or behind the end"
    assert refused.isprintable(), "an error that can move a terminal's cursor"


def seeds() -> list[bytes]:
    files = folder("etc"), Member("etc/a", b"content"), link("b", "etc/a"), device("null", 1, 3)
    plain, summed = archive(*files), archive(Member("a", b"summed").summed())
    return [plain, summed, packed(plain), plain + bytes(512 - len(plain) % 512) + packed(summed), plain + summed]
