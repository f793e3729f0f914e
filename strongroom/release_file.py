"""A publisher's files: the release history that grows, and the private key that signs it."""

from __future__ import annotations

import contextlib
import fcntl
import os
import stat
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import datetime, timedelta
from pathlib import Path
from typing import TypeAlias

from attestation.release_heads import HeadMemory
from attestation.release_signing import MAX_PEM, LocalSigner, ReleaseError, Signer, SigningError
from attestation.releases import MAX_HISTORY, ReleasedImage, ReleaseHistory, append
from strongroom.files import read_bounded, replace, require_new, write_new

_Releases: TypeAlias = tuple[ReleasedImage, ...]


@dataclass(frozen=True, slots=True)
class Outcome:
    """The history as it now is; ``is_changed`` is False when it said already what it was to say."""

    history: ReleaseHistory
    is_changed: bool


class ReleaseFile:
    """The history of the product ``name`` in the file ``path``, for whoever holds its key.

    The file is replaced whole, under a lock that other processes respect, and only when what it held verifies. Each
    method signs one entry at most, issued ``at`` (with a time zone) and valid for ``validity``, and is safe to repeat.
    Each raises ReleaseError for a file that does not verify, FileError for one that is too large; SigningError: the
    signer's, those named below, ``history_missing`` and ``unusable_statement``; HeadError; OSError.
    """

    def __init__(self, path: Path, signer: Signer, name: str, heads: HeadMemory) -> None:
        """``heads`` remembers what was signed here, so that no second history is begun beside the one that clients have
        seen.
        """
        self._path = path.resolve()  # what a link leads to is replaced, not the link
        self._signer = signer
        self._name = name
        self._heads = heads

    def add(self, release: ReleasedImage, *, at: datetime, validity: timedelta) -> Outcome:
        """``release`` counts too from now on. Without the file a new history begins. SigningError ``release_exists``
        when another one of its name counts.
        """

        def with_it(history: ReleaseHistory | None) -> _Releases:
            releases = history.current.releases if history else ()
            if release in releases:
                return releases
            if any(each.name == release.name for each in releases):
                raise SigningError(
                    "release_exists",
                    "another release of this name counts already: withdraw it first, or take another name",
                    got=release.name,
                )
            return (*releases, release)

        return self._sign(with_it, at, validity)

    def withdraw(self, release: str, *, at: datetime, validity: timedelta) -> Outcome:
        """The release of this name counts no more. SigningError ``no_such_release`` when none ever had the name, and
        ``no_history``.
        """

        def without_it(history: ReleaseHistory | None) -> _Releases:
            history = self._require(history)
            if all(release != each.name for entry in history.entries for each in entry.statement.releases):
                raise SigningError("no_such_release", "this history never had a release of this name", got=release)
            return tuple(each for each in history.current.releases if each.name != release)

        return self._sign(without_it, at, validity)

    def refresh(self, *, at: datetime, validity: timedelta) -> Outcome:
        """The same releases count for longer. SigningError ``no_history``."""
        return self._sign(lambda history: self._require(history).current.releases, at, validity, even_the_same=True)

    def _require(self, history: ReleaseHistory | None) -> ReleaseHistory:
        if history is None:
            raise SigningError("no_history", f"there is no history in {self._path}; adding a release begins one")
        return history

    def _sign(
        self,
        change: Callable[[ReleaseHistory | None], _Releases],
        at: datetime,
        validity: timedelta,
        *,
        even_the_same: bool = False,
    ) -> Outcome:
        """An entry with the releases that ``change`` makes of the history, unless it says that already and counts."""
        with _alone_in(self._path.parent):
            data, before = b"", None
            if self._path.exists():
                data = read_bounded(self._path, MAX_HISTORY)
                before = self._verify(data)
            elif head := self._heads.recall(self._signer.public_key, self._name):
                raise SigningError(
                    "history_missing",
                    f"{self._path} is not there, and a history of this product was signed here before: clients that"
                    " have seen it would refuse a new one",
                    expected=f"the history with entry {head.sequence}",
                    got="none",
                )
            releases = change(before)
            if before is not None and releases == before.current.releases and at < before.expires and not even_the_same:
                return Outcome(before, is_changed=False)
            expires = at + validity
            data += append(data, signer=self._signer, name=self._name, releases=releases, issued=at, expires=expires)
            signed = self._verify(data)
            replace(self._path, data)
            self._heads.remember(signed)
        return Outcome(signed, is_changed=True)

    def _verify(self, data: bytes) -> ReleaseHistory:
        key = self._signer.public_key
        head = self._heads.recall(key, self._name)
        try:
            return ReleaseHistory.verify(data, key=key, name=self._name, minimum_sequence=1, head=head)
        except ReleaseError as error:
            raise error.of(str(self._path)) from error


def write_key(path: Path, signer: LocalSigner) -> None:
    """Keeps a new private key, for its owner's eyes only. Raises FileExistsError: no key is ever replaced; OSError."""
    require_new(path, why="keys are never replaced: choose another name")
    write_new(path, signer.to_pem(), mode=0o600)


def read_key(path: Path) -> LocalSigner:
    """A private key in PEM that only its owner can read. Raises SigningError ``unsafe_permissions``, ``unusable_key``;
    OSError.
    """
    with path.open("rb") as file:
        permissions = stat.S_IMODE(os.fstat(file.fileno()).st_mode)
        if permissions & 0o077:
            raise SigningError(
                "unsafe_permissions",
                f"others may read this private key: run `chmod 600 {path}`, or make a new one if they may have",
                expected="600",
                got=f"{permissions:o}",
            )
        return LocalSigner.from_pem(file.read(MAX_PEM))


@contextlib.contextmanager
def _alone_in(folder: Path) -> Iterator[None]:
    """The folder is locked: a lock on a file that is replaced would be a lock on the file that was."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)
