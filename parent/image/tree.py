"""A root file system as a value: what a source of files gives, and what an image is written from.

A :class:`Tree` knows nothing of the host that it came from: no times, no device or inode numbers, no order but its own.
What it refuses is what Linux's initramfs would not unpack as it was meant (Documentation/driver-api/early-userspace/
buffer-format.rst, init/initramfs.c): a file that lies in what is no directory, a path twice, a path that leads out.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from io import BytesIO
from pathlib import Path
from types import MappingProxyType
from typing import BinaryIO, ClassVar, Final, Literal, TypeAlias, final

from attestation.errors import StrongroomError

MAX_PATH: Final = 4095
"""Bytes of a path, and of a symbolic link's target: Linux's PATH_MAX less the final NUL."""
MAX_NAME: Final = 255
"""Bytes of one name in a path: Linux's NAME_MAX."""
MAX_ID: Final = 0xFFFF_FFFE
"""The largest uid or gid; the number above it means "no change"."""
MAX_MAJOR: Final = (1 << 12) - 1
MAX_MINOR: Final = (1 << 20) - 1
PERMISSIONS: Final = 0o7777
"""The bits that a mode may have: set-uid, set-gid, sticky, and what owner, group and others may do."""
IMPLIED_MODE: Final = 0o755
"""Of a directory that only the paths in it speak of; its owner is 0:0."""
CHUNK_SIZE: Final = 1 << 20
"""Bytes of a file that are held at a time."""

Content: TypeAlias = bytes | Path
"""What a file holds: these bytes, or what that file of the host holds."""


class ImageBuildError(StrongroomError):
    """An image that cannot be built from what was given. Nothing was written, or what was written is removed.

    Codes here: ``bad_path``, ``bad_entry``, ``duplicate_path``, ``not_a_directory``, ``changed_file``.
    """

    exit_code: ClassVar[int] = 2


@dataclass(frozen=True, slots=True)
class Entry:
    """One name in a file system; what it is, its subclass says.

    Raises ImageBuildError: ``bad_path``, ``bad_entry``.
    """

    path: str
    """From the root, with ``/`` between names, without one in front: at most 4,095 bytes. Bytes that are not UTF-8
    stand as Python writes them in file names (surrogates, PEP 383)."""
    mode: int
    """The permission bits alone (0o7777)."""
    uid: int = field(default=0, kw_only=True)
    gid: int = field(default=0, kw_only=True)

    def __post_init__(self) -> None:
        _check_path(self.path)
        if self.mode & ~PERMISSIONS:
            raise _bad_entry(self.path, "mode", "permission bits, at most 0o7777", oct(self.mode))
        for name, value in (("uid", self.uid), ("gid", self.gid)):
            if not 0 <= value <= MAX_ID:
                raise _bad_entry(self.path, name, f"0 to {MAX_ID}", value)


@final
@dataclass(frozen=True, slots=True)
class Directory(Entry):
    """A directory. Those that hold something need not be named: a tree implies them."""


@final
@dataclass(frozen=True, slots=True)
class File(Entry):
    """A regular file. Raises ImageBuildError: ``bad_path``, ``bad_entry``."""

    size: int
    """Bytes."""
    open: Callable[[], BinaryIO]
    """Gives the content from its beginning, each time anew; the caller closes it. It has ``size`` bytes every time."""

    def __post_init__(self) -> None:
        Entry.__post_init__(self)
        if self.size < 0:
            raise _bad_entry(self.path, "size", "at least 0", self.size)

    @classmethod
    def of(cls, path: str, content: Content, mode: int = 0o644) -> File:
        """A file with ``content``, owned by 0:0. Raises OSError where there is no such file."""
        return cls.copied(path, content, mode) if isinstance(content, Path) else cls.holding(path, content, mode)

    @classmethod
    def holding(cls, path: str, data: bytes, mode: int = 0o644) -> File:
        """A file of these bytes, owned by 0:0."""
        return cls(path, mode, len(data), lambda: BytesIO(data))

    @classmethod
    def copied(cls, path: str, source: Path, mode: int = 0o644) -> File:
        """A file with what ``source`` holds, owned by 0:0. Raises OSError where there is no such file."""
        return cls(path, mode, source.stat().st_size, lambda: source.open("rb"))

    def pieces(self) -> Iterator[bytes]:
        """The content, at most 1 MiB at a time: ``size`` bytes.

        Raises ImageBuildError ``changed_file`` when it has another size by now, and what opening and reading raise.
        """
        with self.open() as content:
            left = self.size
            while piece := content.read(min(CHUNK_SIZE, left + 1)):
                left -= len(piece)
                if left < 0:
                    break
                yield piece
        if left:
            got = f"at least {self.size + 1}" if left < 0 else self.size - left
            what = f"{_shown(self.path)} has another size than a moment ago"
            raise ImageBuildError("changed_file", what, expected=f"{self.size} bytes", got=f"{got} bytes")


@final
@dataclass(frozen=True, slots=True)
class Symlink(Entry):
    """A symbolic link. Raises ImageBuildError: ``bad_path``, ``bad_entry``."""

    target: str
    """As it stands in the link, 1 to 4,095 bytes; it may lead anywhere, or nowhere."""

    def __post_init__(self) -> None:
        Entry.__post_init__(self)
        if "\0" in self.target or not 0 < len(encode_path(self.target)) <= MAX_PATH:
            raise _bad_entry(self.path, "target", f"1 to {MAX_PATH} bytes without NUL", ascii(self.target)[:100])


@final
@dataclass(frozen=True, slots=True)
class Device(Entry):
    """A special file. Raises ImageBuildError: ``bad_path``, ``bad_entry``."""

    kind: Literal["char", "block", "fifo"]
    major: int = 0
    minor: int = 0
    """Of a fifo both are 0."""

    def __post_init__(self) -> None:
        Entry.__post_init__(self)
        major, minor = (0, 0) if self.kind == "fifo" else (MAX_MAJOR, MAX_MINOR)
        if not (0 <= self.major <= major and 0 <= self.minor <= minor):
            got = f"{self.major}:{self.minor}"
            raise _bad_entry(self.path, f"number of a {self.kind} device", f"at most {major}:{minor}", got)


@final
class Tree(Mapping[str, Entry]):
    """Entries by path, in canonical order: sorted by the bytes of their paths, so that a directory comes before what
    it holds. Every directory on the way to an entry is there. Immutable; made by :meth:`of`.
    """

    __slots__ = ("_entries",)

    def __init__(self) -> None:
        self._entries: Mapping[str, Entry] = MappingProxyType({})

    @classmethod
    def of(cls, entries: Iterable[Entry]) -> Tree:
        """The tree of ``entries``, which may come in any order.

        Raises ImageBuildError: ``duplicate_path``, ``not_a_directory``.
        """
        found: dict[str, Entry] = {}
        for entry in entries:
            if entry.path in found:
                raise ImageBuildError("duplicate_path", f"{_shown(entry.path)} is there twice")
            found[entry.path] = entry
        for path in list(found):
            while folder := path.rpartition("/")[0]:
                parent = found.setdefault(folder, Directory(folder, IMPLIED_MODE))
                if not isinstance(parent, Directory):
                    raise ImageBuildError(
                        "not_a_directory",
                        f"{_shown(path)} lies in what is no directory",
                        expected=f"a directory at {_shown(folder)}",
                        got=type(parent).__name__,
                    )
                path = folder
        tree = cls()
        tree._entries = MappingProxyType(dict(sorted(found.items(), key=lambda item: encode_path(item[0]))))
        return tree

    def __getitem__(self, path: str) -> Entry:
        return self._entries[path]

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def __len__(self) -> int:
        return len(self._entries)

    def __repr__(self) -> str:
        return f"Tree({len(self)} entries)"

    def under(self, folder: str) -> Tree:
        """The same entries in ``folder``. Raises ImageBuildError ``bad_path``, where one becomes too long."""
        return Tree.of(replace(entry, path=f"{folder}/{entry.path}") for entry in self.values())

    @property
    def size(self) -> int:
        """Bytes of all regular files together."""
        return sum(entry.size for entry in self.values() if isinstance(entry, File))


def encode_path(path: str) -> bytes:
    """The bytes of a path or a link's target: UTF-8, with Python's surrogates for other bytes (PEP 383).

    Raises ImageBuildError ``bad_path`` for a text that no bytes are read as: two texts would be one path.
    """
    try:
        encoded = path.encode("utf-8", "surrogateescape")
    except UnicodeEncodeError as error:
        raise _bad_path(path, "text, or bytes as PEP 383 has them") from error
    if encoded.decode("utf-8", "surrogateescape") != path:
        raise _bad_path(path, "text, or bytes as PEP 383 has them")
    return encoded


def _check_path(path: str) -> None:
    names = encode_path(path).split(b"/")
    if not 0 < len(encode_path(path)) <= MAX_PATH:
        raise _bad_path(path, f"1 to {MAX_PATH} bytes")
    for name in names:
        if name in (b"", b".", b"..") or b"\0" in name:
            raise _bad_path(path, "names with / between them, none of them empty, . or .., and no NUL")
        if len(name) > MAX_NAME:
            raise _bad_path(path, f"names of at most {MAX_NAME} bytes")


def _bad_path(path: str, expected: str) -> ImageBuildError:
    return ImageBuildError("bad_path", "not a path in an image", expected=expected, got=_shown(path))


def _bad_entry(path: str, what: str, expected: str, got: object) -> ImageBuildError:
    return ImageBuildError("bad_entry", f"{_shown(path)}: not a {what} in an image", expected=expected, got=got)


def _shown(path: str) -> str:
    """Safe to print, and short."""
    return ascii(path if len(path) <= 100 else f"{path[:97]}...")
