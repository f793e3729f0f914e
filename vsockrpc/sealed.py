"""The sealed channel, both roles, without I/O. PROTOCOL.md section 6.

A client turns an :class:`~attestation.verifier.AttestationResult` and a request into bytes with
:func:`seal_request`; there is no other way to begin, so nothing can be sent to an enclave that was not verified. The
enclave turns those bytes into :class:`ExchangeKeys` with :meth:`ChannelKey.open`. From there both sides hold the
same two record layers, one for each direction.
"""

from __future__ import annotations

import hashlib
import secrets
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives import hashes, hpke
from cryptography.hazmat.primitives.asymmetric.mlkem import MLKEM768PrivateKey, MLKEM768PublicKey
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from attestation.commitment import CHANNEL_SUITE, Commitment
from attestation.errors import StrongroomError
from attestation.secret import Secret
from attestation.verifier import AttestationResult

VERSION = 1
SEALED_SECRET_SIZE = 1168
"""Bytes of ``enc || ct``: 1,088 ML-KEM-768 ciphertext, 32 X25519, 32 secret, 16 tag."""
OPENING_SIZE = 1 + SEALED_SECRET_SIZE
SECRET_SIZE = 32
MLKEM_KEY_SIZE = 1184
MLKEM_SEED_SIZE = 64
"""Bytes of ``d || z`` (FIPS 203, algorithm 16)."""
X25519_SEED_SIZE = 32
REPLAY_TAG_SIZE = 16
ANSWER_SALT_SIZE = 32

HEADER_SIZE = 4
TAG_SIZE = 16
LENGTH_PREFIX_SIZE = 2
REQUEST_RECORD_SIZE = 4096
"""Bytes of plaintext in a request's record, its two-byte length included."""
MIN_RECORD_SIZE = LENGTH_PREFIX_SIZE
MAX_RECORD_SIZE = 65536
MAX_RECORDS = 2**32

_MORE, _FINAL = 0, 1
_SUITE = hpke.Suite(hpke.KEM.MLKEM768_X25519, hpke.KDF.HKDF_SHA256, hpke.AEAD.AES_256_GCM)


class SealedError(StrongroomError):
    """Sealed bytes that are malformed, tampered with, reordered, replayed or cut short. The channel they came over
    is finished."""

    exit_code = 3


class Truncated(SealedError):
    """The stream ended before its final record: somebody cut it, or the other side went away."""

    exit_code = 4

    def __init__(self, message: str, *, expected: object | None = None, got: object | None = None) -> None:
        super().__init__("truncated", message, expected=expected, got=got)


class AnswerKeys(Protocol):
    """What an answer's key comes from."""

    def answer(self, answer_salt: bytes) -> Secret:
        """The key of the answer that begins with this salt of 32 bytes."""
        ...


class ExchangeKeys:
    """What one sealed secret gives: a key for each direction and the tag by which a replay is known."""

    def __init__(self, secret: Secret, sealed: bytes) -> None:
        self._secret = secret
        self._salt = hashlib.sha256(sealed).digest()
        self.request = self._derive(self._salt, b"strongroom/1 request")
        self.replay_tag = hashlib.sha256(b"strongroom/1 replay\x00" + secret.expose()).digest()[:REPLAY_TAG_SIZE]

    def answer(self, answer_salt: bytes) -> Secret:
        """The answer's key. ``answer_salt`` (32 bytes) is drawn by the enclave for each answer, so that no two
        answers ever share a key and a nonce, not even the answer to a replay (the reason is that of RFC 9458 section
        4.4's response nonce)."""
        return self._derive(self._salt + answer_salt, b"strongroom/1 answer")

    def _derive(self, salt: bytes, info: bytes) -> Secret:
        return Secret(HKDF(algorithm=hashes.SHA256(), length=32, salt=salt, info=info).derive(self._secret.expose()))


class ChannelKey:
    """The enclave's private half of a channel key. It lives in memory only and is never serialised."""

    def __init__(self) -> None:
        # From the kernel's generator at this moment. OpenSSL's own was seeded once, before whatever has been mixed into
        # the kernel's since.
        mlkem = MLKEM768PrivateKey.from_seed_bytes(secrets.token_bytes(MLKEM_SEED_SIZE))
        x25519 = X25519PrivateKey.from_private_bytes(secrets.token_bytes(X25519_SEED_SIZE))
        self._private = hpke.MLKEM768X25519PrivateKey(mlkem, x25519)
        self.public_bytes = mlkem.public_key().public_bytes_raw() + x25519.public_key().public_bytes_raw()

    def open(self, sealed: bytes, commitment: Commitment) -> ExchangeKeys:
        """Opens a client's sealed secret (1,168 bytes).

        Raises SealedError ``not_for_this_key`` when it was sealed to another key or another commitment, or tampered
        with.
        """
        if len(sealed) != SEALED_SECRET_SIZE:
            raise SealedError(
                "malformed", "the sealed secret has the wrong size", expected=SEALED_SECRET_SIZE, got=len(sealed)
            )
        try:
            secret = _SUITE.decrypt(sealed, self._private, _info(commitment))
        except (InvalidTag, ValueError) as error:
            raise SealedError("not_for_this_key", "the sealed secret does not open with this key") from error
        if len(secret) != SECRET_SIZE:
            raise SealedError("malformed", "the secret has the wrong size", expected=SECRET_SIZE, got=len(secret))
        return ExchangeKeys(Secret(secret), sealed)


@dataclass(frozen=True, slots=True)
class SealedRequest:
    """A request ready to leave: its bytes, the key id that routes it, and what will open the answer to it."""

    body: bytes
    key_id: bytes
    answer: AnswerOpener


def seal_request(result: AttestationResult, content: bytes) -> SealedRequest:
    """Seals ``content`` to the key that ``result`` vouches for. Each call draws a secret of its own."""
    commitment = result.commitment
    key = commitment.key
    public = hpke.MLKEM768X25519PublicKey(
        MLKEM768PublicKey.from_public_bytes(key[:MLKEM_KEY_SIZE]),
        X25519PublicKey.from_public_bytes(key[MLKEM_KEY_SIZE:]),
    )
    secret = Secret(secrets.token_bytes(SECRET_SIZE))
    sealed = _SUITE.encrypt(secret.expose(), public, _info(commitment))
    keys = ExchangeKeys(secret, sealed)
    records = b"".join(_seal_whole(keys.request, content))
    return SealedRequest(bytes([VERSION]) + sealed + records, commitment.key_id, AnswerOpener(keys))


def split_opening(opening: bytes) -> bytes:
    """The sealed secret within a request's first 1,169 bytes. Raises SealedError ``malformed``."""
    if len(opening) != OPENING_SIZE:
        raise SealedError("malformed", "the request is cut short", expected=f"{OPENING_SIZE} bytes", got=len(opening))
    if opening[0] != VERSION:
        raise SealedError("malformed", "unknown version of the sealed channel", expected=VERSION, got=opening[0])
    return opening[1:]


def _info(commitment: Commitment) -> bytes:
    parts = (b"strongroom/1 channel", CHANNEL_SUITE.encode("ascii"), commitment.digest(), commitment.key_id)
    return b"".join(len(part).to_bytes(2, "big") + part for part in parts)


def _seal_whole(key: Secret, content: bytes) -> Iterator[bytes]:
    """A request's records: all of one size, their number a power of two, so that only the bucket of its length
    shows."""
    sealer = RecordSealer(key, REQUEST_RECORD_SIZE)
    needed = max(1, -(-len(content) // sealer.capacity))
    total = 1 << (needed - 1).bit_length()
    for index in range(total):
        piece = content[index * sealer.capacity : (index + 1) * sealer.capacity]
        yield sealer.seal(piece, final=index == total - 1)


# --- Records: STREAM (Hoang, Reyhanitabar, Rogaway, Vizar 2015), with the counter and the final flag in the nonce --


def _nonce(counter: int, flag: int) -> bytes:
    return counter.to_bytes(11, "big") + bytes([flag])


class RecordSealer:
    """Seals one direction's content into records of one size."""

    def __init__(self, key: Secret, record_size: int) -> None:
        if not MIN_RECORD_SIZE < record_size <= MAX_RECORD_SIZE:
            raise ValueError(
                f"a record has {MIN_RECORD_SIZE + 1}..{MAX_RECORD_SIZE} bytes of plaintext, not {record_size}"
            )
        self._aead = AESGCM(key.expose())
        self._record_size = record_size
        self._counter = 0
        self._finished = False

    @property
    def capacity(self) -> int:
        """Bytes of content that one record takes."""
        return self._record_size - LENGTH_PREFIX_SIZE

    def seal(self, content: bytes, *, final: bool) -> bytes:
        if self._finished or self._counter >= MAX_RECORDS:
            raise ValueError("nothing may follow the final record")
        if len(content) > self.capacity:
            raise ValueError(f"a record takes {self.capacity} bytes, not {len(content)}")
        flag = _FINAL if final else _MORE
        plaintext = (len(content).to_bytes(LENGTH_PREFIX_SIZE, "big") + content).ljust(self._record_size, b"\x00")
        header = bytes([flag]) + (self._record_size + TAG_SIZE).to_bytes(3, "big")
        record = header + self._aead.encrypt(_nonce(self._counter, flag), plaintext, header)
        self._counter += 1
        self._finished = final
        return record


class RecordOpener:
    """Opens one direction's records as their bytes arrive, in whatever pieces."""

    def __init__(self, key: Secret) -> None:
        self._aead = AESGCM(key.expose())
        self._buffer = bytearray()
        self._failed = False
        self.opened = 0
        """Records opened so far."""
        self.finished = False
        """True once the final record has been opened: only then is the content whole."""

    def feed(self, data: bytes) -> bytes:
        """The content of every record that is now complete.

        Raises SealedError: ``malformed_record``, ``tampered_record`` (also reordered, replayed, or of another
        channel), ``after_final``.
        """
        if self._failed:
            raise SealedError("tampered_record", "this channel has failed before")
        self._buffer += data
        content = bytearray()
        try:
            while (record := self._next_record()) is not None:
                content += self._open(*record)
        except SealedError:
            self._failed = True
            raise
        return bytes(content)

    def finish(self) -> None:
        """Call at the end of the stream. Raises Truncated unless the final record was seen."""
        if not self.finished:
            raise Truncated("the stream ended before its final record", expected="a final record",
                got=f"{self.opened} records and {len(self._buffer)} bytes",
            )  # fmt: skip

    def _next_record(self) -> tuple[bytes, bytes] | None:
        if self.finished:
            if self._buffer:
                raise SealedError("after_final", "bytes after the final record", expected=0, got=len(self._buffer))
            return None
        if len(self._buffer) < HEADER_SIZE:
            return None
        header = bytes(self._buffer[:HEADER_SIZE])
        length = int.from_bytes(header[1:], "big")
        if header[0] not in (_MORE, _FINAL):
            raise SealedError("malformed_record", "unknown record flag", expected="0 or 1", got=header[0])
        if not MIN_RECORD_SIZE + TAG_SIZE <= length <= MAX_RECORD_SIZE + TAG_SIZE:
            raise SealedError(
                "malformed_record", "record length out of bounds",
                expected=f"{MIN_RECORD_SIZE + TAG_SIZE}..{MAX_RECORD_SIZE + TAG_SIZE}", got=length,
            )  # fmt: skip
        if len(self._buffer) < HEADER_SIZE + length:
            return None
        ciphertext = bytes(self._buffer[HEADER_SIZE : HEADER_SIZE + length])
        del self._buffer[: HEADER_SIZE + length]
        return header, ciphertext

    def _open(self, header: bytes, ciphertext: bytes) -> bytes:
        flag = header[0]
        try:
            plaintext = self._aead.decrypt(_nonce(self.opened, flag), ciphertext, header)
        except InvalidTag as error:
            raise SealedError(
                "tampered_record",
                f"record {self.opened} does not open: tampered with, out of order, or of another channel",
            ) from error
        self.opened += 1
        self.finished = flag == _FINAL
        length = int.from_bytes(plaintext[:LENGTH_PREFIX_SIZE], "big")
        if length > len(plaintext) - LENGTH_PREFIX_SIZE or plaintext[LENGTH_PREFIX_SIZE + length :].strip(b"\x00"):
            raise SealedError("malformed_record", f"record {self.opened - 1} is padded wrongly")
        return plaintext[LENGTH_PREFIX_SIZE : LENGTH_PREFIX_SIZE + length]


class AnswerOpener:
    """Opens an answer: its salt, then its records."""

    def __init__(self, keys: AnswerKeys) -> None:
        self._keys = keys
        self._opening = bytearray()
        self._records: RecordOpener | None = None

    @property
    def finished(self) -> bool:
        return self._records is not None and self._records.finished

    @property
    def opened(self) -> int:
        """Records opened so far."""
        return 0 if self._records is None else self._records.opened

    def feed(self, data: bytes) -> bytes:
        """The content of every record that is now complete. Raises as :meth:`RecordOpener.feed`."""
        if self._records is None:
            self._opening += data
            if len(self._opening) < ANSWER_SALT_SIZE:
                return b""
            self._records = RecordOpener(self._keys.answer(bytes(self._opening[:ANSWER_SALT_SIZE])))
            data = bytes(self._opening[ANSWER_SALT_SIZE:])
        return self._records.feed(data)

    def finish(self) -> None:
        """Call at the end of the stream. Raises Truncated unless the final record was seen."""
        if self._records is None:
            raise Truncated("the answer ended before its first record", got=f"{len(self._opening)} bytes")
        self._records.finish()


class AnswerRecords:
    """An answer as it leaves the enclave: records of one size, their total rounded up to a bucket.

    Token lengths and cadence tell the text (arXiv 2511.03675), so whoever drives this takes one record a tick,
    content or not, and an answer's length shows only as a multiple of ``bucket`` ticks. Without pacing the driver
    takes records while :attr:`urgent` holds.
    """

    def __init__(self, keys: AnswerKeys, *, record_size: int, bucket: int) -> None:
        self._opening = secrets.token_bytes(ANSWER_SALT_SIZE)
        self._sealer = RecordSealer(keys.answer(self._opening), record_size)
        self._bucket = bucket
        self._pending = bytearray()
        self._ending = False
        self._count = 0
        self.finished = False

    @property
    def urgent(self) -> bool:
        """Whether content or the ending waits to leave."""
        return not self.finished and (bool(self._pending) or self._ending)

    @property
    def pending(self) -> int:
        """Bytes of content that wait: the driver stops the work behind it while this is too much."""
        return len(self._pending)

    def write(self, content: bytes) -> None:
        if self._ending:
            raise ValueError("the answer has ended")
        self._pending += content

    def end(self) -> None:
        self._ending = True

    def next_record(self) -> bytes:
        piece = bytes(self._pending[: self._sealer.capacity])
        del self._pending[: len(piece)]
        self._count += 1
        self.finished = self._ending and not self._pending and self._count % self._bucket == 0
        opening, self._opening = self._opening, b""
        return opening + self._sealer.seal(piece, final=self.finished)


class ReplaySet:
    """The secrets that one key has seen. It never forgets: when it is full the key retires (evicting would reopen
    replay)."""

    def __init__(self, capacity: int) -> None:
        self._capacity = capacity
        self._seen: set[bytes] = set()

    @property
    def full(self) -> bool:
        return len(self._seen) >= self._capacity

    def __contains__(self, tag: bytes) -> bool:
        return tag in self._seen

    def add(self, tag: bytes) -> None:
        """Raises SealedError ``replayed`` for a tag seen before, ``key_exhausted`` when nothing more can be
        remembered."""
        if tag in self._seen:
            raise SealedError("replayed", "this sealed secret has been used before")
        if self.full:
            raise SealedError(
                "key_exhausted", "this key has served as many requests as it may", expected=self._capacity
            )
        self._seen.add(tag)
