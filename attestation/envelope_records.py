"""The records of an envelope: sealed and opened as bytes come, without I/O. PROTOCOL.md section 6.4.

    header, at = EnvelopeHeader.split(beginning)
    require_header(header, purpose=EnvelopePurpose.MODEL, key=key, context="production", minimum_version=3)
    opener = Opener(header, data_key, model=manifest_digest, configuration=configuration_digest)
    for chunk in ...:
        for piece in opener.feed(chunk): ...
    last = opener.finish()

STREAM (Hoang, Reyhanitabar, Rogaway, Vizar 2015), as age has it: a record has no header of its own; its index and
whether it is the last are in its nonce. A model has many GB: neither side holds more of it than one record beside what
it is given.
"""

from __future__ import annotations

from typing import Final, TypeAlias

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from attestation.envelope import DATA_KEY_SIZE, EnvelopeError, EnvelopeHeader, Terms, require_equal
from attestation.secret import Secret

Piece: TypeAlias = bytes | memoryview

TAG_SIZE: Final = 16

_LABEL = b"strongroom/1 envelope"
_MORE, _FINAL = 0, 1


class Sealer:
    """Makes an envelope: what ``seal`` and at last ``finish`` give, in order, is all of it.

    Raises EnvelopeError with ``wrong_purpose`` where header and terms differ, ``malformed_envelope`` for a data key
    that has not 32 bytes.
    """

    def __init__(self, header: EnvelopeHeader, terms: Terms, data_key: Secret) -> None:
        require_equal("wrong_purpose", "header and terms differ", header.purpose.value, terms.purpose.value)
        self._aead, self._aad = _aead(header, data_key)
        self._made: list[bytes] = [header.encode()]
        self._record = _Record(header.record)
        self._sealed = 0
        self._finished = False
        self._take(terms.encode())

    def seal(self, piece: Piece) -> list[bytes]:
        """Takes the next bytes of the body, and gives what of the envelope is complete by that. ValueError after
        ``finish``.
        """
        if self._finished:
            raise ValueError("the envelope is finished")
        self._take(piece)
        made, self._made = self._made, []
        return made

    def finish(self) -> bytes:
        """The rest of the envelope, to the end of its final record. ValueError the second time."""
        rest = self.seal(b"")
        self._finished = True
        return b"".join([*rest, self._encrypt(_FINAL)])

    def _take(self, piece: Piece) -> None:
        rest = memoryview(piece).cast("B")
        while rest:
            # A full record goes when more comes: until then it may be the last.
            if self._record.is_full:
                self._made.append(self._encrypt(_MORE))
            rest = self._record.take(rest)

    def _encrypt(self, flag: int) -> bytes:
        made = self._aead.encrypt(_nonce(self._sealed, flag), self._record.held, self._aad)
        self._sealed += 1
        self._record.clear()
        return made


class Opener:
    """Opens an envelope's records as their bytes arrive, in whatever pieces, for one model under one configuration
    (digests, 48 bytes each).

    What it gives is authentic, and the envelope's terms allow them to use it. That it is whole is known when ``finish``
    returns, not before.

    Raises EnvelopeError with ``malformed_envelope`` for a data key that has not 32 bytes.
    """

    def __init__(self, header: EnvelopeHeader, data_key: Secret, *, model: bytes, configuration: bytes) -> None:
        self._aead, self._aad = _aead(header, data_key)
        self._purpose, self._model, self._configuration = header.purpose, model, configuration
        self._record = _Record(header.record + TAG_SIZE)
        self._end: EnvelopeError | None = None  # why nothing more is taken
        self.opened = 0
        """Records opened so far."""

    def feed(self, chunk: Piece) -> list[Piece]:
        """What is now known of the body, in pieces that will not change. A record is opened when more follows it.

        Raises EnvelopeError with ``tampered_record`` (also for one out of order or of another envelope),
        ``after_final``, and for the first record ``malformed_envelope``, ``wrong_purpose``, ``wrong_model``,
        ``wrong_configuration``; and the same again ever after.
        """
        if self._end is not None:
            raise self._end
        rest = memoryview(chunk).cast("B")
        pieces: list[Piece] = []
        while rest:
            if self._record.is_full:
                pieces.append(self._open(_MORE))
            rest = self._record.take(rest)
        return pieces

    def finish(self) -> Piece:
        """Call at the end of the envelope: the last piece of the body, which may be empty.

        Raises EnvelopeError as :meth:`feed` does, and with ``truncated_envelope``. An envelope that was cut within a
        record cannot be told from one that was changed there: ``tampered_record``.
        """
        self.feed(b"")  # raises after a failure, and after the end
        if len(self._record.held) <= TAG_SIZE:
            raise _truncated(self.opened, len(self._record.held))
        last = self._open(_FINAL)
        self._end = EnvelopeError("after_final", "this envelope has been opened to its end")
        return last

    def _open(self, flag: int) -> Piece:
        """What the record in hand gives."""
        plaintext = self._decrypt(flag)
        try:
            if plaintext is None:
                raise self._refusal(flag)
            piece: Piece = plaintext if self.opened else self._behind_terms(plaintext)
        except EnvelopeError as error:
            self._end = error
            raise
        self.opened += 1
        self._record.clear()
        return piece

    def _decrypt(self, flag: int) -> bytes | None:
        # Into new memory: another thread may still hash the record before. Neither waits for the interpreter's lock.
        try:
            return self._aead.decrypt(_nonce(self.opened, flag), self._record.held, self._aad)
        except InvalidTag:
            return None

    def _refusal(self, flag: int) -> EnvelopeError:
        """Why the record in hand does not open with ``flag``: it may open with the other."""
        index = self.opened
        if self._decrypt(_FINAL if flag == _MORE else _MORE) is None:
            return EnvelopeError(
                "tampered_record",
                f"record {index} does not open: changed, out of order, cut short, or of another envelope or key",
                expected=f"record {index} as it was sealed",
                got=f"{len(self._record.held)} other bytes in place of record {index}",
            )
        if flag == _FINAL:
            return _truncated(index + 1, 0)
        return EnvelopeError(
            "after_final", f"bytes follow record {index}, which is the last", expected=f"the end after record {index}",
            got="more",
        )  # fmt: skip

    def _behind_terms(self, content: bytes) -> memoryview:
        terms, at = Terms.split(content)
        terms.require(purpose=self._purpose, model=self._model, configuration=self._configuration)
        return memoryview(content)[at:]


class _Record:
    """The bytes of one record, as they come together. The memory is used for all of them in turn."""

    def __init__(self, size: int) -> None:
        self._memory = memoryview(bytearray(size))
        self.held = self._memory[:0]

    @property
    def is_full(self) -> bool:
        return len(self.held) == len(self._memory)

    def take(self, data: memoryview) -> memoryview:
        """Takes as much of ``data`` as there is room for, and gives the rest."""
        start = len(self.held)
        end = min(start + len(data), len(self._memory))
        self._memory[start:end] = data[: end - start]
        self.held = self._memory[:end]
        return data[end - start :]

    def clear(self) -> None:
        self.held = self._memory[:0]


def _aead(header: EnvelopeHeader, data_key: Secret) -> tuple[AESGCM, bytes]:
    """The cipher of an envelope's records, and their associated data."""
    if len(data_key) != DATA_KEY_SIZE:
        raise EnvelopeError(
            "malformed_envelope", "the wrapped key holds no data key of this size", expected=f"{DATA_KEY_SIZE} bytes",
            got=f"{len(data_key)} bytes",
        )  # fmt: skip
    aad = header.aad
    derivation = HKDF(algorithm=hashes.SHA256(), length=32, salt=header.salt, info=_LABEL + aad)
    return AESGCM(derivation.derive(data_key.expose())), aad


def _nonce(index: int, flag: int) -> bytes:
    return index.to_bytes(11, "big") + bytes([flag])


def _truncated(records: int, rest: int) -> EnvelopeError:
    return EnvelopeError(
        "truncated_envelope",
        f"the envelope was cut short: record {records} is missing",
        expected=f"record {records}",
        got=f"the end, after {records} records and {rest} bytes",
    )
