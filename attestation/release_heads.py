"""What a client remembers of the release histories that it has accepted: the last statement of each, so that an older
history, or another one, is refused the next time (:mod:`attestation.releases`).

    head = memory.recall(key, name)
    history = ReleaseHistory.verify(data, key=key, name=name, minimum_sequence=..., head=head)
    memory.remember(history)
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import secrets
import stat
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Final, Protocol

from attestation import strict_json
from attestation.cbor import Record
from attestation.errors import EvidenceError, StrongroomError
from attestation.reference import DIGEST_SIZE
from attestation.release_signing import PublicKey
from attestation.releases import MAX_ENTRIES, Head, ReleaseHistory

_VERSION: Final = 1
_MAX_FILE: Final = 4096
_DAMAGED: Final = "damaged_head"


class HeadError(StrongroomError):
    """What was remembered cannot be read or kept, so that a rollback would not be noticed. Codes: ``damaged_head``,
    ``unsafe_permissions``, ``heads_unavailable``.
    """


class HeadMemory(Protocol):
    """Remembers one head for each key and product, and only ever moves forward."""

    def recall(self, key: PublicKey, name: str) -> Head | None:
        """None when nothing of this history was ever accepted. Raises HeadError."""
        ...

    def remember(self, history: ReleaseHistory) -> None:
        """Keeps the history's head. Raises ReleaseError ``rolled_back`` when what is remembered is not part of it, by
        another process since ``recall`` perhaps: whoever holds ``history`` has been shown less than is known. Raises
        HeadError.
        """
        ...


class MemoryHeads:
    """Heads that are forgotten with the process: what is noticed is a rollback within it, and none across a restart.

    For a service that has no disk, beside a ``minimum_sequence`` in its policy.
    """

    def __init__(self) -> None:
        self._heads: dict[tuple[PublicKey, str], Head] = {}
        self._lock = threading.Lock()

    def recall(self, key: PublicKey, name: str) -> Head | None:
        return self._heads.get((key, name))

    def remember(self, history: ReleaseHistory) -> None:
        """Raises ReleaseError ``rolled_back``."""
        key, name = history.key, history.current.name
        with self._lock:
            if before := self._heads.get((key, name)):
                history.require_contains(before)
            self._heads[key, name] = history.head


class FileHeads:
    """Heads in a folder of this user's own (0700), a file (0600) for each key and product.

    A file is replaced whole, under a lock that other processes respect. One that is damaged is an error and not a fresh
    start: to start anew is for a person to decide, by removing it.
    """

    def __init__(self, directory: Path) -> None:
        self._directory = directory

    def recall(self, key: PublicKey, name: str) -> Head | None:
        """Raises HeadError."""
        with self._folder():
            return self._read(key, name)

    def remember(self, history: ReleaseHistory) -> None:
        """Raises ReleaseError ``rolled_back``, HeadError."""
        key, name = history.key, history.current.name
        with self._folder() as folder:
            before = self._read(key, name)
            if before is not None:
                history.require_contains(before)
            if before != history.head:
                self._write(key, name, history.head)
                os.fsync(folder)

    @contextlib.contextmanager
    def _folder(self) -> Iterator[int]:
        """The folder, made when it is missing, found to be only this user's to change, and locked."""
        try:
            self._directory.mkdir(mode=0o700, parents=True, exist_ok=True)
            descriptor = os.open(self._directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
            try:
                _require_own(self._directory, os.fstat(descriptor))
                fcntl.flock(descriptor, fcntl.LOCK_EX)
                yield descriptor
            finally:
                os.close(descriptor)
        except OSError as error:
            reason = error.strerror or type(error).__name__
            raise HeadError(
                "heads_unavailable",
                f"what was seen of release histories cannot be kept in {self._directory}: {reason}; without it an older"
                " history would be believed again",
            ) from error

    def _path(self, key: PublicKey, name: str) -> Path:
        return self._directory / f"{hashlib.sha256(key.spki + name.encode()).hexdigest()[:32]}.json"

    def _read(self, key: PublicKey, name: str) -> Head | None:
        path = self._path(key, name)
        try:
            descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
        except FileNotFoundError:
            return None
        with os.fdopen(descriptor, "rb") as file:
            _require_own(path, os.fstat(descriptor))
            data = file.read(_MAX_FILE + 1)
        try:
            return _decode(data, key, name)
        except EvidenceError as error:
            raise HeadError(
                _DAMAGED,
                f"{path} does not hold what was remembered of {name}: find out why before you remove it, since then"
                " the next history is believed whatever came before",
                expected=error.expected,
                got=error.got or error.message,
            ) from error

    def _write(self, key: PublicKey, name: str, head: Head) -> None:
        path = self._path(key, name)
        temporary = path.with_name(f".{path.name}.{secrets.token_hex(8)}")
        descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        try:
            with os.fdopen(descriptor, "wb") as file:
                file.write(_encode(key, name, head))
                file.flush()
                os.fsync(file.fileno())
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)


def _encode(key: PublicKey, name: str, head: Head) -> bytes:
    content = {
        "v": _VERSION,
        "key": str(key),
        "name": name,
        "sequence": head.sequence,
        "digest": head.digest.hex(),
    }
    return json.dumps(content, indent=2).encode("ascii") + b"\n"


def _decode(data: bytes, key: PublicKey, name: str) -> Head:
    """Raises EvidenceError."""
    if len(data) > _MAX_FILE:
        raise EvidenceError(_DAMAGED, "too large", expected=f"at most {_MAX_FILE} bytes", got="more")
    value = strict_json.decode(data, code=_DAMAGED)
    record = Record(value, "head", required={"v", "key", "name", "sequence", "digest"}, code=_DAMAGED)
    record.literal("v", _VERSION)
    record.literal("key", str(key))
    record.literal("name", name)
    digest = record.text("digest", 2 * DIGEST_SIZE)
    try:
        octets = bytes.fromhex(digest)
    except ValueError:
        octets = b""
    if len(octets) != DIGEST_SIZE:
        raise record.refusal("digest", f"{2 * DIGEST_SIZE} hexadecimal digits", ascii(digest))
    return Head(record.integer("sequence", 1, MAX_ENTRIES), octets)


def _require_own(path: Path, status: os.stat_result) -> None:
    """Only this user may change it."""
    permissions = stat.S_IMODE(status.st_mode)
    if status.st_uid != os.geteuid() or permissions & 0o022:
        raise HeadError(
            "unsafe_permissions",
            f"{path} can be changed by others, who could make a rollback go unnoticed",
            expected=f"uid {os.geteuid()}, writable by it alone",
            got=f"uid {status.st_uid}, {permissions:o}",
        )
