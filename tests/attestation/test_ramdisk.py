"""Ramdisks: what Linux would unpack is listed, and what it would guess at is a typed error."""

from __future__ import annotations

import io
import stat
import tracemalloc
import zlib
from collections.abc import Callable
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from attestation import ramdisk
from attestation.ramdisk import Kind, RamdiskEntry, RamdiskError, RamdiskReader, Unpacking
from tests.cpio_files import TRAILER, Member, archive, device, folder, link, packed

OFFSET = 1000
FILES = (
    folder("etc"),
    Member("etc/hosts", b"127.0.0.1 localhost\n", uid=7, gid=8, mtime=1_700_000_000, inode=5),
    link("etc/mtab", "/proc/mounts"),
    device("null", 1, 3),
    Member("su", b"\x7fELF" * 100, mode=stat.S_IFREG | 0o4755),
)
PLAIN = archive(*FILES)
MORE = archive(Member("more"))


def read(data: bytes, size: int | None = None) -> list[tuple[RamdiskEntry, bytes]]:
    reader = RamdiskReader(io.BytesIO(data), len(data) if size is None else size, offset=OFFSET)
    return [(entry, b"".join(reader.content())) for entry in reader]


def names(data: bytes) -> list[str]:
    return [entry.path for entry, _ in read(data)]


def refused(data: bytes) -> RamdiskError:
    with pytest.raises(RamdiskError) as caught:
        read(data)
    return caught.value


def told(data: bytes) -> str:
    """What a person is told of ``data``: nothing, where it can be read."""
    try:
        read(data)
    except RamdiskError as error:
        return str(error)
    return ""


# --- What is read
# ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("pack", [bytes, packed], ids=["plain", "gzip"])
def test_entries_are_as_their_headers_say(pack: Callable[[bytes], bytes]) -> None:
    found = read(pack(PLAIN))
    assert [entry.path for entry, _ in found] == ["etc", "etc/hosts", "etc/mtab", "null", "su"]
    kinds = [Kind.DIRECTORY, Kind.FILE, Kind.SYMLINK, Kind.CHARACTER_DEVICE, Kind.FILE]
    assert [entry.kind for entry, _ in found] == kinds
    hosts, content = found[1]
    assert (hosts.uid, hosts.gid, hosts.mtime, hosts.size) == (7, 8, 1_700_000_000, len(content))
    assert (hosts.mode, hosts.device, hosts.target, hosts.links) == (0o644, None, None, 1)
    assert (hosts.inode, hosts.archive) == ((5, 0, 0), 0)
    assert content == FILES[1].data
    assert (found[2][0].target, found[2][1]) == ("/proc/mounts", b"")
    assert found[3][0].device == (1, 3)
    assert found[4] == (replace(found[4][0], mode=0o4755), FILES[4].data)


@pytest.mark.parametrize(
    ("format_bits", "kind"),
    [(stat.S_IFBLK, Kind.BLOCK_DEVICE), (stat.S_IFIFO, Kind.FIFO), (stat.S_IFSOCK, Kind.SOCKET)],
)
def test_every_kind_is_known(format_bits: int, kind: Kind) -> None:
    [(entry, _)] = read(archive(Member("x", mode=format_bits | 0o600, device=(8, 1))))
    assert (entry.kind, entry.device) == (kind, (8, 1) if kind is Kind.BLOCK_DEVICE else None)


@pytest.mark.parametrize(
    ("written", "path"),
    [
        ("a/b", "a/b"),
        ("./a/b", "a/b"),
        ("/a/b", "a/b"),
        (".", ""),
        ("/", ""),
        ("./", ""),
        ("./a/", "a"),
        ("/.", ""),
        ("ä", "ä"),
        ("a/", "a"),
    ],
)
def test_a_path_has_one_form(written: str, path: str) -> None:
    *_, (entry, _) = read(archive(*([folder("a")] if path == "a/b" else []), folder(written)))
    assert entry.path == path


def test_a_name_that_is_no_utf_8_is_kept() -> None:
    [(entry, _)] = read(archive(Member(b"a\xff")))
    assert entry.path.encode("utf-8", "surrogateescape") == b"a\xff"


def test_archives_follow_one_another_with_zeros_between() -> None:
    one, two, three, four, five = (archive(Member(name)) for name in "abcde")
    data = one + bytes(512) + packed(two + bytes(4) + three) + packed(four) + bytes(8)
    found = read(data + bytes(-len(data) % 4) + five)
    assert [(entry.path, entry.archive) for entry, _ in found] == [("a", 0), ("b", 1), ("c", 2), ("d", 3), ("e", 4)]


@pytest.mark.parametrize("data", [b"", bytes(1), bytes(513), packed(b""), packed(bytes(512))])
def test_nothing_is_in_nothing(data: bytes) -> None:
    assert read(data) == []


def test_what_is_behind_the_ramdisk_is_not_read() -> None:
    assert names(PLAIN) == [entry.path for entry, _ in read(PLAIN + b"a section", len(PLAIN))]


def test_content_that_nobody_takes_is_passed_over() -> None:
    reader = RamdiskReader(io.BytesIO(PLAIN), len(PLAIN))
    assert [entry.path for entry in reader] == names(PLAIN)
    reader = RamdiskReader(io.BytesIO(PLAIN), len(PLAIN))
    next(iter(reader))
    assert next(iter(reader)).path == "etc/hosts"
    next(reader.content())  # a piece of it
    assert next(iter(reader)).path == "etc/mtab"


def test_a_sum_is_held_against_the_content() -> None:
    good = Member("a", b"content").summed()
    assert read(archive(good))[0][1] == b"content"
    error = refused(archive(replace(good, checksum=1)))
    assert (error.code, error.expected, error.got) == ("malformed_ramdisk", "00000001", f"{sum(b'content'):08x}")
    assert names(archive(folder("a"), replace(folder("b"), magic=b"070702", checksum=9))) == ["a", "b"]


class _Trickle(io.RawIOBase):
    def __init__(self, data: bytes) -> None:
        self._left = data

    def read(self, size: int = -1, /) -> bytes:
        taken, self._left = self._left[: min(size, 1)], self._left[min(size, 1) :]
        return taken


@pytest.mark.parametrize("data", [PLAIN, packed(PLAIN), packed(PLAIN) + packed(MORE)])
def test_short_reads_are_no_end(data: bytes) -> None:
    reader = RamdiskReader(_Trickle(data), len(data))
    assert [(entry, b"".join(reader.content())) for entry in reader] == read(data)


def test_a_large_file_is_never_held(monkeypatch: pytest.MonkeyPatch) -> None:
    data = packed(archive(Member("zeros", bytes(64 << 20))))
    tracemalloc.start()
    try:
        reader = RamdiskReader(io.BytesIO(data), len(data))
        assert [(entry.size, sum(map(len, reader.content()))) for entry in reader] == [(64 << 20, 64 << 20)]
        assert tracemalloc.get_traced_memory()[1] < 4 << 20
    finally:
        tracemalloc.stop()


# --- One lie each
# ------------------------------------------------------------------------------------------------

ONE = Member("a", b"data")
LIES: dict[str, tuple[bytes, str, str]] = {
    "another format": (b"#!/bin/sh\n\n", "unknown_ramdisk", "no archive"),
    "old cpio": (b"070707" + bytes(104), "unknown_ramdisk", "no archive"),
    "xz": (b"\xfd7zXZ\0" + bytes(104), "unknown_ramdisk", "no archive"),
    "no trailer": (ONE.encode(), "truncated_ramdisk", "ends too early"),
    "half a header": (ONE.encode()[:50], "truncated_ramdisk", "ends too early"),
    "five bytes": (b"07070", "truncated_ramdisk", "ends too early"),
    "half a gzip": (packed(PLAIN)[:-20], "truncated_ramdisk", "ends too early"),
    "gzip without its end": (packed(PLAIN)[:-1], "truncated_ramdisk", "ends too early"),
    "one byte of gzip": (b"\x1f", "truncated_ramdisk", "ends too early"),
    "an archive over two members": (packed(PLAIN[:200]) + packed(PLAIN[200:]), "truncated_ramdisk", "too early"),
    "broken gzip": (packed(PLAIN)[:30] + b"\xff" * 100, "malformed_gzip", "broken"),
    "gzip with another CRC": (packed(PLAIN)[:-8] + bytes(8), "malformed_gzip", "broken"),
    "sign in a number": (ONE.encode().replace(b"000081A4", b"+00081A4"), "malformed_ramdisk", "no number"),
    "space in a number": (ONE.encode().replace(b"000081A4", b"    81A4"), "malformed_ramdisk", "no number"),
    "name of nothing": (archive(replace(ONE, name_size=1)), "malformed_ramdisk", "a name's length"),
    "name of 4 GiB": (archive(replace(ONE, name_size=0xFFFFFFFF)), "malformed_ramdisk", "a name's length"),
    "name of 4,097 bytes": (archive(Member("a" * 4096)), "malformed_ramdisk", "a name's length"),
    "name without NUL": (archive(replace(ONE, name="abc", end=b"d")), "malformed_ramdisk", "NUL"),
    "name with a NUL": (archive(Member("a\0b")), "malformed_ramdisk", "NUL"),
    "empty name": (archive(Member("", end=b"\0\0")), "malformed_ramdisk", "NUL"),
    "file of 4 GiB": (archive(replace(ONE, size=0xFFFFFFFF)), "truncated_ramdisk", "ends too early"),
    "no kind of file": (archive(replace(ONE, mode=0o644)), "malformed_ramdisk", "a mode"),
    "more bits of mode": (archive(replace(ONE, mode=0x181A4)), "malformed_ramdisk", "a mode"),
    "folder with content": (archive(replace(ONE, mode=stat.S_IFDIR)), "malformed_ramdisk", "with content"),
    "device with content": (archive(replace(ONE, mode=stat.S_IFCHR)), "malformed_ramdisk", "with content"),
    "trailer with content": (replace(TRAILER, data=b"data").encode(), "malformed_ramdisk", "trailer"),
    "link to nowhere": (archive(link("a", "")), "malformed_ramdisk", "a link's length"),
    "link of 4,096 bytes": (archive(link("a", "b" * 4096)), "malformed_ramdisk", "a link's length"),
    "link with a NUL": (archive(link("a", "b\0c")), "malformed_ramdisk", "NUL"),
    "padding of a name": (replace(ONE, name="abc", padding=b"x").encode(), "malformed_ramdisk", "fills up"),
    "padding of a file": (replace(ONE, data=b"abc", padding=b"x").encode(), "malformed_ramdisk", "fills up"),
    "askew": (PLAIN + bytes(2) + MORE, "malformed_ramdisk", "askew"),
    "askew behind gzip": (
        packed(PLAIN) + bytes(-len(packed(PLAIN)) % 4 + 1) + MORE,
        "malformed_ramdisk",
        "askew",
    ),
    "askew in gzip": (packed(bytes(2) + PLAIN), "malformed_ramdisk", "askew"),
    "bytes behind the trailer": (PLAIN + b"more", "truncated_ramdisk", "ends too early"),
    "a word behind the trailer": (PLAIN + b"more words", "unknown_ramdisk", "no archive"),
    "trailer that is a link": (replace(TRAILER, mode=stat.S_IFLNK).encode(), "malformed_ramdisk", "trailer"),
    "up": (archive(Member("../etc/passwd")), "unsafe_path", ".."),
    "up in between": (archive(folder("a"), Member("a/../../b")), "unsafe_path", ".."),
    "up at the end": (archive(folder("a"), Member("a/..")), "unsafe_path", ".."),
    "two slashes": (archive(folder("a"), Member("a//b")), "unsafe_path", "an empty"),
    "two slashes at the beginning": (archive(Member("//b")), "unsafe_path", "an empty"),
    "a file in place of the root": (archive(Member("/")), "unsafe_path", "an empty"),
    "a file in place of the root, as a dot": (archive(Member("./")), "unsafe_path", "an empty"),
    "two slashes at the end": (archive(folder("a//")), "unsafe_path", "an empty"),
    "slash at the end of a file": (archive(Member("a/")), "unsafe_path", "an empty"),
    "dot at the end of a file": (archive(ONE, Member("a/.")), "unsafe_path", "with ."),
    "dot at the end of a folder": (archive(folder("a"), folder("a/.")), "unsafe_path", "with ."),
    "dot in between": (archive(folder("a"), folder("a/./b")), "unsafe_path", "with ."),
    "two dots at the beginning": (archive(folder("././a")), "unsafe_path", "with ."),
    "more than Linux's file systems take": (archive(Member("ä" * 128)), "unsafe_path", "long"),
    "no folder": (archive(Member("a/b")), "unsafe_path", "in a folder that does not come before it"),
    "a folder that comes later": (archive(Member("a/b"), folder("a")), "unsafe_path", "does not come before"),
    "within a file": (archive(ONE, Member("a/b")), "unsafe_path", "within a file"),
    "through a link": (archive(folder("b"), link("a", "b"), Member("a/c")), "unsafe_path", "within a symlink"),
    "a file twice": (archive(ONE, ONE), "unsafe_path", "of a name that a file has already"),
    "a file twice, otherwise written": (archive(ONE, Member("./a")), "unsafe_path", "that a file has already"),
    "a file for a link": (archive(link("a", "b"), ONE), "unsafe_path", "that a symlink has already"),
    "a file for a folder": (archive(folder("a"), ONE), "unsafe_path", "that a directory has already"),
    "a folder for a file": (archive(ONE, folder("a")), "unsafe_path", "that a file has already"),
    "a folder for a link": (archive(link("a", "b"), folder("a")), "unsafe_path", "that a symlink has already"),
    "a second archive's file": (archive(ONE) + packed(archive(ONE)), "unsafe_path", "that a file has already"),
    "names of a device": (archive(replace(device("a", 8, 1), links=2)), "unsafe_path", "device with several names"),
}


@pytest.mark.parametrize("name", LIES)
def test_a_ramdisk_that_lies_is_refused(name: str) -> None:
    data, code, said = LIES[name]
    error = refused(data)
    assert (error.code, error.exit_code) == (code, 2)
    assert said in error.message
    assert error.offset is not None
    assert OFFSET <= error.offset <= OFFSET + len(data)
    assert str(error).isprintable()


def test_what_compresses_otherwise_is_named() -> None:
    assert "which xz begins with" in str(refused(b"\xfd7zXZ\0" + bytes(104)))


def test_the_offset_is_that_of_the_entry() -> None:
    first = ONE.encode()
    error = refused(first + archive(Member("../b")))
    assert error.offset == OFFSET + len(first)
    assert error.as_json()["offset"] == str(error.offset)
    inside = refused(PLAIN + packed(first + archive(Member("../b"))))
    assert inside.offset == OFFSET + len(PLAIN)
    assert f"at byte {len(first)} of what gzip holds" in inside.message


def test_too_many_entries_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ramdisk, "MAX_ENTRIES", 4)
    assert refused(PLAIN).code == "ramdisk_too_large"
    monkeypatch.setattr(ramdisk, "MAX_ENTRIES", 5)
    assert len(read(PLAIN)) == 5


def test_too_many_bytes_of_names_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    names = sum(len(str(member.name)) + 1 for member in FILES) + len("/proc/mounts")
    monkeypatch.setattr(ramdisk, "MAX_NAMES", names - 1)
    error = refused(PLAIN)
    assert (error.code, error.expected) == ("ramdisk_too_large", f"at most {names - 1} bytes of names in an image")
    monkeypatch.setattr(ramdisk, "MAX_NAMES", names)
    assert len(read(PLAIN)) == len(FILES)


def test_a_bomb_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ramdisk, "MAX_UNPACKED", 1 << 20)
    error = refused(packed(archive(Member("zeros", bytes(2 << 20)))))
    assert (error.code, error.expected) == ("ramdisk_too_large", "at most 1048576 bytes")
    compressor = zlib.compressobj(wbits=31)
    endless = compressor.compress(bytes(8 << 20)) + compressor.flush()  # zeros, between archives
    assert refused(endless).code == "ramdisk_too_large"


# --- Anything
# ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("data", [PLAIN, packed(PLAIN)], ids=["plain", "gzip"])
def test_every_truncation_is_a_typed_error(data: bytes) -> None:
    for size in range(1, len(data)):
        if data[:size].strip(b"\0"):
            assert refused(data[:size]).code in ("truncated_ramdisk", "unknown_ramdisk")


@pytest.mark.parametrize("data", [PLAIN, packed(PLAIN)], ids=["plain", "gzip"])
def test_every_changed_byte_gives_entries_or_the_typed_error(data: bytes) -> None:
    for at in range(len(data)):
        for value in (0, data[at] ^ 1 << at % 8, 0xFF):
            changed = data[:at] + bytes([value]) + data[at + 1 :]
            assert told(changed).isprintable()


def test_a_folder_may_come_twice_and_the_root_too() -> None:
    again = folder("a", 0o700)
    assert [entry.mode for entry, _ in read(archive(folder("."), folder("a"), again, folder("/")))] == [
        *(0o755, 0o755, 0o700, 0o755)
    ]


def test_the_ramdisks_of_an_image_are_one_tree() -> None:
    def readers(*disks: bytes) -> list[str]:
        unpacking = Unpacking()
        made = [RamdiskReader(io.BytesIO(data), len(data), unpacking=unpacking) for data in disks]
        return [entry.path for reader in made for entry in reader]

    assert readers(archive(folder("a")), archive(folder("a"), Member("a/b"))) == ["a", "a", "a/b"]
    assert readers(packed(archive(ONE)) + b"\0", packed(MORE)) == ["a", "more"]
    for second, said in ((archive(ONE), "has already"), (archive(Member("a/b")), "within a file")):
        with pytest.raises(RamdiskError, match=said):
            readers(archive(ONE), second)
    with pytest.raises(RamdiskError, match="askew"):  # Linux has one ramdisk right behind the other
        readers(archive(ONE) + b"\0", MORE)


NAMES = st.from_regex(r"[a-zä]{1,4}", fullmatch=True)


@given(st.dictionaries(NAMES, st.dictionaries(NAMES, st.binary(max_size=40))))
def test_what_was_written_is_read(folders: dict[str, dict[str, bytes]]) -> None:
    members = []
    for name, files in folders.items():
        members += [folder(name), *(Member(f"{name}/{file}", content) for file, content in files.items())]
    data = archive(*members)
    for each in (data, packed(data), MORE + data, archive(*members[:3]) + packed(archive(*members[3:]))):
        found = [(entry.path, content) for entry, content in read(each) if entry.path != "more"]
        assert found == [(member.name, member.data) for member in members]


@given(st.binary(max_size=300))
def test_any_bytes_give_entries_or_the_typed_error(data: bytes) -> None:
    for each in (data, packed(data), archive(ONE) + data):
        assert told(each).isprintable()
