"""Archives of Python's own writer are read as Python's own reader reads them; what readers could differ about is
refused.
"""

from __future__ import annotations

import contextlib
import io
import subprocess
import tarfile
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from parent.image import tar as reader
from parent.image.tar import Kind, Member, read_members
from parent.image.tree import ImageBuildError
from tests.parent.image.containers import Content, hard_link, member, symlink, tar

LONG = "/".join(["name" * 20] * 5)
FORMATS = [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT]


def members(data: bytes) -> list[Member]:
    return list(read_members(io.BytesIO(data)))


def header(name: bytes = b"file", kind: bytes = b"0", size: int = 0, **at: bytes) -> bytes:
    """One block, whose fields ``at_OFFSET`` are overwritten before its checksum is made."""
    block = bytearray(512)
    block[: len(name)] = name
    block[100:124] = b"0000644\x000000000\x000000000\x00"
    block[124:136] = b"%011o\x00" % size
    block[136:148] = b"00000000000\x00"
    block[156:157] = kind
    block[257:265] = b"ustar\x0000"
    for place, value in at.items():
        start = int(place.removeprefix("at_"))
        block[start : start + len(value)] = value
    block[148:156] = b" " * 8
    block[148:156] = b"%06o\x00 " % sum(block)
    return bytes(block)


def padded(data: bytes) -> bytes:
    return data + bytes(-len(data) % 512)


def record(key: str, value: str) -> bytes:
    body = f" {key}={value}\n".encode()
    length = len(body)
    while length != len(body) + len(str(length)):
        length = len(body) + len(str(length))
    return str(length).encode() + body


def extended(data: bytes, kind: bytes = b"x") -> bytes:
    return header(b"PaxHeader", kind, len(data)) + padded(data)


END = bytes(1024)


@pytest.mark.parametrize("format", FORMATS)
def test_what_tarfile_writes_is_read_as_tarfile_reads_it(format: int) -> None:
    content: dict[str, Content] = {
        "folder/": None,
        "folder/file": b"content" * 200,
        "folder/link": symlink("/absolute/../target"),
        "folder/hard": hard_link("folder/file"),
        "folder/char": member(tarfile.CHRTYPE, devmajor=1, devminor=3, mode=0o666),
        "folder/block": member(tarfile.BLKTYPE, devmajor=8, devminor=1),
        "folder/fifo": member(tarfile.FIFOTYPE),
        "owned": member(tarfile.REGTYPE, uid=1000, gid=100, mode=0o4755),
    }
    if format != tarfile.USTAR_FORMAT:
        content |= {LONG: b"deep", "grüße": b"", "far": symlink(LONG), "giant": member(b"0", uid=3_000_000_000)}
    data = tar(content, format)
    with tarfile.open(fileobj=io.BytesIO(data)) as archive:
        theirs = [
            (each.name, each.type, each.mode, each.uid, each.gid, each.size, each.offset_data, each.linkname)
            for each in archive
        ]
    ours = [
        (each.path, each.kind.value, each.mode, each.uid, each.gid, each.size, each.offset, each.target)
        for each in members(data)
    ]
    assert ours == theirs
    devices = {each.path: (each.major, each.minor) for each in members(data) if each.major}
    assert devices == {"folder/char": (1, 3), "folder/block": (8, 1)}


@pytest.mark.parametrize("format", ["ustar", "gnu", "pax", "v7"])
def test_what_gnu_tar_writes_is_read(tmp_path: Path, format: str) -> None:
    (tmp_path / "d").mkdir()
    (tmp_path / "d" / "file").write_bytes(b"x" * 513)
    (tmp_path / "d" / "link").symlink_to("file")
    done = subprocess.run(
        ["tar", f"--format={format}", "-cf", "-", "-C", tmp_path, "."], capture_output=True, check=True
    )
    found = {each.path: (each.kind, each.size) for each in members(done.stdout)}
    assert found == {
        "": (Kind.DIRECTORY, 0),
        "d": (Kind.DIRECTORY, 0),
        "d/file": (Kind.FILE, 513),
        "d/link": (Kind.SYMLINK, 0),
    }


def test_paths_are_taken_from_the_root() -> None:
    data = header(b"./", b"5") + header(b"/", b"5") + header(b"./a/./b/", b"5") + header(b"old/", b"\0") + END
    assert [(each.path, each.kind) for each in members(data)] == [
        ("", Kind.DIRECTORY),
        ("", Kind.DIRECTORY),
        ("a/b", Kind.DIRECTORY),
        ("old", Kind.DIRECTORY),
    ]


def test_names_of_extended_attributes_are_told() -> None:
    data = extended(record("SCHILY.xattr.security.capability", "\1\0\0\2") + record("mtime", "1.5"))
    assert members(data + header() + END)[0].extended_attributes == ("security.capability",)


def test_extended_attributes_are_bounded() -> None:
    longest, many = "a" * 255, [f"user.{number}" for number in range(64)]
    for names in ([longest], many):
        data = extended(b"".join(record(f"SCHILY.xattr.{name}", "") for name in names))
        assert members(data + header() + END)[0].extended_attributes == tuple(sorted(names))
    for names, message in (([longest + "a"], "too long"), ([*many, "one.more"], "at most 64")):
        data = extended(b"".join(record(f"SCHILY.xattr.{name}", "") for name in names))
        with pytest.raises(ImageBuildError, match=message):
            members(data + header() + END)
    with pytest.raises(ImageBuildError, match="too long"):
        members(extended(record("LIBARCHIVE." + "a" * 300, "")) + header() + END)


def test_times_of_all_members_are_nothing() -> None:
    assert len(members(extended(record("comment", "0" * 40), b"g") + header() + END)) == 1


def test_bytes_that_are_no_text_keep_apart() -> None:
    assert members(header(b"\xff\xfe") + END)[0].path == "\udcff\udcfe"


REFUSED = {
    "empty": b"",
    "no end": header(),
    "half a header": header()[:300],
    "half an end": header() + bytes(100),
    "an end that is no block": header() + END + bytes(3),
    "behind the end": header() + END + b"\0" * 511 + b"x",
    "wrong checksum": header().replace(b"file", b"fild") + END,
    "another magic": header(at_257=b"tar\0\0\0\0\0") + END,
    "no number": header(at_100=b"00x0644\0") + END,
    "a negative number": header(at_108=b"\xff" * 8) + END,
    "too large a number": header(at_124=b"\x80" + b"\xff" * 11) + END,
    "size beyond the end": header(size=0o77777777777) + END,
    "size in base 256 beyond the end": header(at_124=b"\x80" + bytes(4) + b"\x7f" + b"\xff" * 6) + END,
    "absolute path": header(b"/etc/passwd") + END,
    "escape": header(b"a/../../b") + END,
    "no path": header(b"") + END,
    "absolute hard link": header(kind=b"1", at_157=b"/etc/passwd") + END,
    "escaping hard link": header(kind=b"1", at_157=b"../x") + END,
    "link to nothing": header(kind=b"2") + END,
    "data behind a directory": header(kind=b"5", size=512) + bytes(512) + END,
    "data behind a hard link": header(kind=b"1", at_157=b"a", size=512) + bytes(512) + END,
    "contiguous file": header(kind=b"7") + END,
    "sparse file": header(kind=b"S") + END,
    "multi-volume": header(kind=b"M") + END,
    "sparse file in pax": extended(record("GNU.sparse.major", "1")) + header() + END,
    "unknown key": extended(record("VENDOR.thing", "1")) + header() + END,
    "hdrcharset": extended(record("hdrcharset", "BINARY")) + header() + END,
    "key twice": extended(record("path", "a") + record("path", "b")) + header() + END,
    "no records": extended(b"hello") + header() + END,
    "record without a line's end": extended(b"8 path=a") + header() + END,
    "record too long": extended(b"99 path=a\n") + header() + END,
    "record without value": extended(b"7 path\n") + header() + END,
    "record of length 0": extended(b"0 path=a\n") + header() + END,
    "NUL in a path": extended(record("path", "a\0b")) + header() + END,
    "size that is no number": extended(record("size", "-1")) + header() + END,
    "uid that is no number": extended(record("uid", "1.5")) + header() + END,
    "two extended headers": extended(record("uid", "1")) * 2 + header() + END,
    "two long names": (header(b"x", b"L", 2) + padded(b"a\0")) * 2 + header() + END,
    "both kinds": extended(record("uid", "1")) + header(b"x", b"L", 2) + padded(b"a\0") + header() + END,
    "extended header without member": extended(record("uid", "1")) + END,
    "path for all": extended(record("path", "a"), b"g") + header() + END,
    "long name too long": header(b"x", b"L", 9000) + padded(bytes(9000)) + header() + END,
    "extended header too long": header(b"x", b"x", 2 << 20) + bytes(2 << 20) + header() + END,
}


@pytest.mark.parametrize("data", REFUSED.values(), ids=REFUSED.keys())
def test_what_readers_could_differ_about_is_refused(data: bytes) -> None:
    with pytest.raises(ImageBuildError) as caught:
        members(data)
    assert caught.value.code == "malformed_archive"
    assert str(caught.value).isprintable()


def test_a_size_that_nobody_has_allocates_nothing() -> None:
    class Counting(io.BytesIO):
        asked = 0

        def read(self, size: int | None = -1, /) -> bytes:
            self.asked = max(self.asked, -1 if size is None else size)
            return super().read(size)

    file = Counting(header(kind=b"x", at_124=b"\x80" + bytes(4) + b"\x7f" + b"\xff" * 6) + END)
    with pytest.raises(ImageBuildError, match="malformed_archive"):
        list(read_members(file))
    assert file.asked == 512


def test_the_number_of_members_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reader, "MAX_MEMBERS", 2)
    assert len(members(header() * 2 + END)) == 2
    with pytest.raises(ImageBuildError, match="too many members"):
        members(header() * 3 + END)


@given(st.integers(0, 4095), st.binary(min_size=1, max_size=8))
def test_whatever_changes_is_read_or_refused(at: int, change: bytes) -> None:
    data = tar({"folder/": None, LONG: b"content", "link": symlink(LONG)})
    with contextlib.suppress(ImageBuildError):
        members(data[:at] + change + data[at + len(change) :])
