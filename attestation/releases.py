"""Signed reference values: which images a publisher stands behind, as an append-only history. PROTOCOL.md section 4.1.

A history is a file. Each line of it is a statement, signed, of all releases that are accepted from then on; the last
one counts, and each names the digest of the one before. So a release is taken back by a statement without it, and
whoever serves the file can neither alter it, nor reorder it, nor leave anything out but the newest statements. Against
that there is the head: a client remembers the last statement that it has seen (:mod:`attestation.release_heads`), and a
history without it is refused. Against a history that is simply not renewed there is the expiry.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import KW_ONLY, InitVar, dataclass
from datetime import UTC, datetime, timedelta
from itertools import combinations
from typing import Final, NoReturn, final

from attestation import strict_json
from attestation.cbor import Record, Value, shown
from attestation.errors import EvidenceError
from attestation.reference import (
    DIGEST_SIZE,
    PCR_APPLICATION,
    PCR_BOOT,
    PCR_IMAGE,
    PCR_SIGNER,
    ZERO_PCR,
    PcrSet,
    digest_text,
)
from attestation.release_signing import PublicKey, ReleaseError, Signer, SigningError, seal, unseal

VERSION: Final = 1
MAX_HISTORY: Final = 16 << 20
"""Bytes of the file."""
MAX_ENTRIES: Final = 4096
MAX_RELEASES: Final = 32
"""Of one statement."""
MAX_DIGESTS: Final = 32
"""Of the models, and of the configurations, of one release."""
MAX_NAME: Final = 128
MAX_REPOSITORY: Final = 500
"""Characters."""
MAX_VALIDITY: Final = timedelta(days=400)
"""From a statement's issue to its expiry."""

_CODE: Final = "malformed_release"
_TIME: Final = "%Y-%m-%dT%H:%M:%SZ"
_WRITTEN_TIME: Final = re.compile(r"[0-9]{4}-[0-9]{2}-[0-9]{2}T[0-9]{2}:[0-9]{2}:[0-9]{2}Z")
_WRITTEN_DIGEST: Final = re.compile(r"sha384:([0-9a-f]{96})")
_HEX_REGISTER: Final = re.compile(r"[0-9a-f]{96}")
_COMMIT: Final = re.compile(r"[0-9a-f]{40}|[0-9a-f]{64}")
_FETCH: Final = "fetch the newest one; if it is the newest that you can get, somebody withholds what came after it"
_REGISTERS: Final = frozenset(map(str, (PCR_IMAGE, PCR_BOOT, PCR_APPLICATION)))


@dataclass(frozen=True, slots=True)
class Source:
    """What a release was built from. ``commit`` is 40 or 64 hexadecimal digits: git's, with SHA-1 or SHA-256."""

    repository: str
    """An address, 1 to 500 printable characters. Nobody asks there."""
    commit: str


@dataclass(frozen=True, slots=True)
class ReleasedImage:
    """One accepted image, its source, and what it is released to run. Digests are SHA-384, 48 bytes."""

    name: str
    """The publisher's, 1 to 128 printable characters."""
    pcrs: PcrSet
    """What its registers hold, in every enclave that is not in debug mode."""
    image: bytes | None
    """Over the EIF's bytes; None where the publisher gives no file away."""
    source: Source
    """The publisher's word: a build of one's own says whether it is true."""
    models: tuple[bytes, ...]
    """Of model manifests (section 4). The publisher vouches for these and for no other: none, when it is empty."""
    configurations: tuple[bytes, ...]
    """Of configurations (section 4); as for ``models``."""


@dataclass(frozen=True, slots=True)
class ReleaseStatement:
    """All that the publisher of ``name`` accepts from ``issued`` on, and not from ``expires`` on."""

    name: str
    """The product: one key may sign the histories of several."""
    sequence: int
    """Its place in the history, from 1."""
    previous: bytes | None
    """SHA-384 of the statement before it, as signed."""
    issued: datetime
    expires: datetime
    releases: tuple[ReleasedImage, ...]
    """Empty when every release has been taken back."""

    def encode(self) -> bytes:
        """The bytes that are signed. Nothing is checked here: ``decode`` does that."""
        statement = {
            "v": VERSION,
            "name": self.name,
            "sequence": self.sequence,
            "previous": _written(self.previous),
            "issued": time_text(self.issued),
            "expires": time_text(self.expires),
            "releases": [
                {
                    "name": release.name,
                    "pcrs": {str(index): value.hex() for index, value in release.pcrs.as_registers().items()},
                    "image": _written(release.image),
                    "source": {"repository": release.source.repository, "commit": release.source.commit},
                    "models": [_written(digest) for digest in release.models],
                    "configurations": [_written(digest) for digest in release.configurations],
                }
                for release in self.releases
            ],
        }
        return json.dumps(statement, separators=(",", ":")).encode("ascii")

    @classmethod
    def decode(cls, payload: bytes) -> ReleaseStatement:
        """Reads a statement strictly: every field, and every bound that it alone can be held to. Raises ReleaseError
        ``malformed_release``.
        """
        try:
            return _read_statement(strict_json.decode(payload, code=_CODE))
        except EvidenceError as error:
            raise ReleaseError(error.code, error.message, expected=error.expected, got=error.got) from error


@dataclass(frozen=True, slots=True)
class Head:
    """The last statement that somebody has seen: its place, and the SHA-384 of its bytes as signed."""

    sequence: int
    """Its place in the history, from 1."""
    digest: bytes
    """48 bytes."""


@dataclass(frozen=True, slots=True)
class Entry:
    """A statement of a history, and the SHA-384 of its bytes as signed."""

    statement: ReleaseStatement
    """As decoded from those bytes, within every bound."""
    digest: bytes
    """48 bytes."""


class _Proof:
    """The right to construct a history."""


_PROVEN = _Proof()


@final
@dataclass(frozen=True, slots=True)
class ReleaseHistory:
    """A history that ``key`` has signed, whole and in order. Only :meth:`verify` makes one, and it does not travel.

    Whether it is still valid is a question of the moment: see :meth:`require_current`.
    """

    key: PublicKey
    entries: tuple[Entry, ...]
    """Oldest first; never empty."""
    _: KW_ONLY
    proof: InitVar[_Proof]

    def __post_init__(self, proof: _Proof) -> None:
        if proof is not _PROVEN:
            raise TypeError("only ReleaseHistory.verify makes a history")

    def __reduce_ex__(self, protocol: object, /) -> NoReturn:
        raise TypeError("a ReleaseHistory does not travel; verify again")

    @classmethod
    def verify(
        cls, data: bytes, *, key: PublicKey, name: str, minimum_sequence: int, head: Head | None
    ) -> ReleaseHistory:
        """The history in ``data``, the bytes of a file, as the publisher of the product ``name`` has signed it.

        It has ``minimum_sequence`` statements or more, and ``head`` among them where the caller remembers one. Every
        signature is verified. Raises ReleaseError: ``malformed_release``, ``wrong_key``, ``bad_release_signature``,
        ``wrong_name``, ``broken_history``, ``rolled_back``.
        """
        entries: list[Entry] = []
        for number, line in enumerate(_lines(data), start=1):
            where = f"entry {number}"
            payload = unseal(line, key=key, name=where)
            try:
                statement = ReleaseStatement.decode(payload)
                _require_succession(statement, entries, name)
            except ReleaseError as error:
                raise error.of(where) from error
            entries.append(Entry(statement, hashlib.sha384(payload).digest()))
        if len(entries) < minimum_sequence:
            raise ReleaseError(
                "rolled_back",
                f"the history has {_entries(len(entries))}, and at least {minimum_sequence} must be there: {_FETCH}",
                expected=f"{minimum_sequence} entries or more",
                got=len(entries),
            )
        history = cls(key, tuple(entries), proof=_PROVEN)
        if head is not None:
            history.require_contains(head)
        return history

    @property
    def current(self) -> ReleaseStatement:
        """The statement that counts."""
        return self.entries[-1].statement

    @property
    def head(self) -> Head:
        """What to remember, once this history has been accepted."""
        return Head(self.current.sequence, self.entries[-1].digest)

    @property
    def expires(self) -> datetime:
        return self.current.expires

    def require_contains(self, head: Head) -> None:
        """Raises ReleaseError ``rolled_back`` when what was seen before, ``head``, is not part of this history."""
        if len(self.entries) < head.sequence:
            raise ReleaseError(
                "rolled_back",
                f"the history has {_entries(len(self.entries))}, and {head.sequence} were seen before: {_FETCH}",
                expected=f"{head.sequence} entries or more",
                got=len(self.entries),
            )
        digest = self.entries[head.sequence - 1].digest
        if digest != head.digest:
            raise ReleaseError(
                "rolled_back",
                "another history than the one that was seen before: its publisher has begun anew, or somebody shows"
                " you something else than others; ask the publisher before you trust it",
                expected=f"entry {head.sequence} {_written(head.digest)}",
                got=_written(digest),
            )

    def require_current(self, at: datetime) -> None:
        """Raises ReleaseError ``expired_release`` when nothing is vouched for any more at ``at`` (with a time zone)."""
        at = _utc(at)
        if at >= self.expires:
            raise ReleaseError(
                "expired_release",
                "the reference values have expired, and were not renewed",
                expected=f"before {time_text(self.expires)}",
                got=time_text(at),
            )

    def require_in_force(self, at: datetime, *, leeway: timedelta) -> None:
        """As :meth:`require_current`, and ReleaseError ``unissued_release`` when what is vouched for is from the future
        by more than ``leeway``.
        """
        self.require_current(at)
        issued = self.current.issued
        if _utc(at) + leeway < issued:
            raise ReleaseError(
                "unissued_release",
                "the signed releases are from the future; is the clock right?",
                expected=f"{time_text(issued)} or later",
                got=time_text(_utc(at)),
            )


def append(
    history: bytes,
    *,
    signer: Signer,
    name: str,
    releases: Sequence[ReleasedImage],
    issued: datetime,
    expires: datetime,
) -> bytes:
    """The line, with its end, that makes ``releases`` all that is accepted from now on; ``history`` is the bytes before
    it, empty for a new history. Times have a time zone and count in whole seconds.

    Raises ReleaseError when ``history`` does not verify under the signer's own key and ``name``; SigningError: the
    signer's, and ``unusable_statement`` for a statement that no reader would accept.
    """
    before: tuple[Entry, ...] = ()
    if history:
        before = ReleaseHistory.verify(history, key=signer.public_key, name=name, minimum_sequence=1, head=None).entries
    statement = ReleaseStatement(
        name=name,
        sequence=len(before) + 1,
        previous=before[-1].digest if before else None,
        issued=_utc(issued),
        expires=_utc(expires),
        releases=tuple(releases),
    )
    line = seal(statement.encode(), signer) + b"\n"
    try:
        ReleaseHistory.verify(history + line, key=signer.public_key, name=name, minimum_sequence=1, head=None)
    except ReleaseError as error:
        raise SigningError(
            "unusable_statement", f"no reader would take this: {error.message}", expected=error.expected, got=error.got
        ) from error
    return line


# --- The chain ---------------------------------------------------------------------------------------------------


def _lines(data: bytes) -> Iterator[bytes]:
    if len(data) > MAX_HISTORY:
        raise ReleaseError(_CODE, "the history is too large", expected=f"at most {MAX_HISTORY} bytes", got=len(data))
    count = data.count(b"\n")
    if count > MAX_ENTRIES:
        raise ReleaseError(_CODE, "the history has too many entries", expected=f"at most {MAX_ENTRIES}", got=count)
    *lines, rest = data.split(b"\n")
    if rest:
        message = "the last line has no end: the file was cut off, or is no release history"
        raise ReleaseError(_CODE, message, expected="a line feed", got=f"{len(rest)} bytes without one")
    if not lines:
        raise ReleaseError(_CODE, "the history is empty", expected=f"1 to {MAX_ENTRIES} entries", got="none")
    return iter(lines)


def _require_succession(statement: ReleaseStatement, before: Sequence[Entry], name: str) -> None:
    """The statement is this product's, and the next one after those before it."""
    if statement.name != name:
        raise ReleaseError("wrong_name", "a statement about another product", expected=name, got=statement.name)
    if statement.sequence != len(before) + 1:
        raise ReleaseError(
            "broken_history", "out of its place in the sequence", expected=len(before) + 1, got=statement.sequence
        )
    digest = before[-1].digest if before else None
    if statement.previous != digest:
        raise ReleaseError(
            "broken_history",
            "it follows another statement than the one before it",
            expected=_written(digest) or "null",
            got=_written(statement.previous) or "null",
        )
    if before and statement.issued < before[-1].statement.issued:
        raise ReleaseError(
            "broken_history",
            "issued before the one before it",
            expected=f"{time_text(before[-1].statement.issued)} or later",
            got=time_text(statement.issued),
        )


# --- The statement -----------------------------------------------------------------------------------------------


def _read_statement(value: Value) -> ReleaseStatement:
    fields = {"v", "name", "sequence", "previous", "issued", "expires", "releases"}
    top = Record(value, "statement", required=fields, code=_CODE)
    top.literal("v", VERSION)
    issued, expires = _time(top, "issued"), _time(top, "expires")
    if not timedelta(0) < expires - issued <= MAX_VALIDITY:
        raise top.refusal("expires", f"after issued, by at most {MAX_VALIDITY.days} days", time_text(expires))
    releases = top.array("releases")
    if len(releases) > MAX_RELEASES:
        raise top.refusal("releases", f"at most {MAX_RELEASES}", len(releases))
    read = tuple(_read_release(each, f"releases[{position}]") for position, each in enumerate(releases))
    if len({release.name for release in read}) != len(read):
        raise top.refusal("releases", "each name once", "a name twice")
    for first, second in combinations(read, 2):
        if first.pcrs.is_ambiguous_beside(second.pcrs):  # no policy takes two releases that one enclave could be
            expected = "each image once, with all that may run in it"
            raise top.refusal("releases", expected, f"{first.name} and {second.name} of one image")
    return ReleaseStatement(
        name=_text(top, "name", MAX_NAME),
        sequence=top.integer("sequence", 1, MAX_ENTRIES),
        previous=_digest(top, "previous"),
        issued=issued,
        expires=expires,
        releases=read,
    )


def _read_release(value: Value, where: str) -> ReleasedImage:
    fields = {"name", "pcrs", "image", "source", "models", "configurations"}
    release = Record(value, where, required=fields, code=_CODE)
    pcrs = Record(release.map("pcrs"), f"{where}, pcrs", required=_REGISTERS, optional={str(PCR_SIGNER)}, code=_CODE)
    source = Record(release.map("source"), f"{where}, source", required={"repository", "commit"}, code=_CODE)
    commit = source.text("commit", 64)
    if not _COMMIT.fullmatch(commit):
        raise source.refusal("commit", "40 or 64 hexadecimal digits", ascii(commit))
    return ReleasedImage(
        name=_text(release, "name", MAX_NAME),
        pcrs=PcrSet(
            _register(pcrs, PCR_IMAGE),
            _register(pcrs, PCR_BOOT),
            _register(pcrs, PCR_APPLICATION),
            _register(pcrs, PCR_SIGNER) if str(PCR_SIGNER) in release.map("pcrs") else None,
        ),
        image=_digest(release, "image"),
        source=Source(_text(source, "repository", MAX_REPOSITORY), commit),
        models=_digests(release, "models"),
        configurations=_digests(release, "configurations"),
    )


def _text(record: Record, field: str, longest: int) -> str:
    text = record.text(field, longest)
    if text != text.strip():
        raise record.refusal(field, "no space at its ends", ascii(text))
    return text


def _register(pcrs: Record, index: int) -> bytes:
    text = pcrs.text(str(index), 2 * DIGEST_SIZE)
    if not _HEX_REGISTER.fullmatch(text):
        raise pcrs.refusal(str(index), f"{2 * DIGEST_SIZE} hexadecimal digits", ascii(text))
    register = bytes.fromhex(text)
    if register == ZERO_PCR:
        # What an enclave in debug mode reports, whose memory its host can read; and of PCR8, what measures nothing.
        raise pcrs.refusal(str(index), "a measurement", "zero")
    return register


def _digest(record: Record, field: str) -> bytes | None:
    text = record.optional_text(field, MAX_NAME)
    return None if text is None else _parse_digest(record, field, text)


def _digests(record: Record, field: str) -> tuple[bytes, ...]:
    values = record.array(field)
    if len(values) > MAX_DIGESTS:
        raise record.refusal(field, f"at most {MAX_DIGESTS}", len(values))
    digests = tuple(_parse_digest(record, field, value) for value in values)
    if len(set(digests)) != len(digests):
        raise record.refusal(field, "each digest once", "a digest twice")
    return digests


def _parse_digest(record: Record, field: str, value: Value) -> bytes:
    written = _WRITTEN_DIGEST.fullmatch(value) if isinstance(value, str) else None
    if written is None:
        raise record.refusal(field, f"sha384: and {2 * DIGEST_SIZE} hexadecimal digits", shown(value))
    return bytes.fromhex(written[1])


def _time(record: Record, field: str) -> datetime:
    text = record.text(field, 20)
    try:
        if not _WRITTEN_TIME.fullmatch(text):
            raise ValueError(text)
        return datetime.strptime(text, _TIME).replace(tzinfo=UTC)
    except ValueError:
        raise record.refusal(field, "YYYY-MM-DDThh:mm:ssZ", ascii(text)) from None


def time_text(at: datetime) -> str:
    """A time, in UTC, as statements write it: ``2026-03-01T12:00:00Z``."""
    return at.strftime(_TIME)


def _written(digest: bytes | None) -> str | None:
    return None if digest is None else digest_text(digest)


def _entries(count: int) -> str:
    return f"{count} entr{'y' if count == 1 else 'ies'}"


def _utc(at: datetime) -> datetime:
    if at.utcoffset() is None:
        raise ValueError("a time with its time zone is needed")
    return at.astimezone(UTC)
