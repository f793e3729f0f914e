"""What KMS answers an enclave with: CMS EnvelopedData (RFC 5652 section 6) in the very BER that AWS sends.

The layout is that of published answers: RSAES-OAEP with SHA-256 around an AES-256-CBC key, the recipient named by the
SHA-256 of its SubjectPublicKeyInfo, and lengths that are indefinite where AWS's are. A DER reader refuses it, as it
refuses AWS's. Only the writer is here; whoever opens it is elsewhere, and shares nothing with it.
"""

from __future__ import annotations

import hashlib
import os
from dataclasses import dataclass
from enum import Enum

from cryptography.hazmat.primitives.asymmetric.padding import MGF1, OAEP
from cryptography.hazmat.primitives.asymmetric.rsa import RSAPublicKey
from cryptography.hazmat.primitives.ciphers import Cipher
from cryptography.hazmat.primitives.ciphers.algorithms import AES256
from cryptography.hazmat.primitives.ciphers.modes import CBC
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.padding import PKCS7
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

CONTENT_KEY_SIZE = 32
IV_SIZE = 16

_INTEGER, _OCTETS, _OID, _NULL, _SEQUENCE, _SET = b"\x02", b"\x04", b"\x06", b"\x05", b"\x30", b"\x31"
_CONTEXT_0, _CONTEXT_0_CONSTRUCTED, _CONTEXT_1_CONSTRUCTED = b"\x80", b"\xa0", b"\xa1"
_INDEFINITE, _END = b"\x80", b"\x00\x00"

# Encoded object identifiers.
_ENVELOPED_DATA = bytes.fromhex("2a864886f70d010703")  # 1.2.840.113549.1.7.3
_DATA = bytes.fromhex("2a864886f70d010701")  # 1.2.840.113549.1.7.1
_RSAES_OAEP = bytes.fromhex("2a864886f70d010107")  # 1.2.840.113549.1.1.7
_MGF1 = bytes.fromhex("2a864886f70d010108")  # 1.2.840.113549.1.1.8
_SHA256 = bytes.fromhex("608648016503040201")  # 2.16.840.1.101.3.4.2.1
_AES256_CBC = bytes.fromhex("60864801650304012a")  # 2.16.840.1.101.3.4.1.42


class ContentForm(Enum):
    """How the encrypted content is written; a reader must take both."""

    CONSTRUCTED = "constructed"
    """[0] of indefinite length around octet strings: what AWS sends."""
    PRIMITIVE = "primitive"
    """[0] of definite length with the bytes themselves: seen in AWS's own tests."""


@dataclass(frozen=True, slots=True)
class EnvelopedData:
    """The parts of an answer to one recipient that differ from answer to answer."""

    key_identifier: bytes
    """SHA-256 of the recipient's SubjectPublicKeyInfo."""
    encrypted_key: bytes
    iv: bytes
    encrypted_content: tuple[bytes, ...]
    """The chunks whose concatenation is the ciphertext; AWS sends one."""
    form: ContentForm = ContentForm.CONSTRUCTED

    def encode(self) -> bytes:
        """A ContentInfo."""
        oaep = _definite(
            _SEQUENCE,
            _definite(_CONTEXT_0_CONSTRUCTED, _SHA256_IDENTIFIER),
            _definite(_CONTEXT_1_CONSTRUCTED, _algorithm(_MGF1, _SHA256_IDENTIFIER)),
        )
        recipient = _definite(
            _SEQUENCE,
            _VERSION_2,
            _definite(_CONTEXT_0, self.key_identifier),
            _algorithm(_RSAES_OAEP, oaep),
            _definite(_OCTETS, self.encrypted_key),
        )
        if self.form is ContentForm.PRIMITIVE:
            content = _definite(_CONTEXT_0, *self.encrypted_content)
        else:
            chunks = (_definite(_OCTETS, chunk) for chunk in self.encrypted_content)
            content = _indefinite(_CONTEXT_0_CONSTRUCTED, *chunks)
        encrypted = _indefinite(
            _SEQUENCE,
            _definite(_OID, _DATA),
            _algorithm(_AES256_CBC, _definite(_OCTETS, self.iv)),
            content,
        )
        enveloped = _indefinite(_SEQUENCE, _VERSION_2, _definite(_SET, recipient), encrypted)
        return _indefinite(_SEQUENCE, _definite(_OID, _ENVELOPED_DATA), _indefinite(_CONTEXT_0_CONSTRUCTED, enveloped))


def envelop(plaintext: bytes, recipient: RSAPublicKey, form: ContentForm = ContentForm.CONSTRUCTED) -> bytes:
    """``CiphertextForRecipient``: ``plaintext`` for the holder of ``recipient``'s private key, under a fresh content
    key.
    """
    content_key, iv = os.urandom(CONTENT_KEY_SIZE), os.urandom(IV_SIZE)
    padder = PKCS7(AES256.block_size).padder()
    padded = padder.update(plaintext) + padder.finalize()
    encryptor = Cipher(AES256(content_key), CBC(iv)).encryptor()
    ciphertext = encryptor.update(padded) + encryptor.finalize()
    spki = recipient.public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)
    return EnvelopedData(
        key_identifier=hashlib.sha256(spki).digest(),
        encrypted_key=recipient.encrypt(content_key, OAEP(MGF1(SHA256()), SHA256(), label=None)),
        iv=iv,
        encrypted_content=(ciphertext,),
        form=form,
    ).encode()


def _definite(tag: bytes, *contents: bytes) -> bytes:
    """X.690 section 8.1.3.4 and 8.1.3.5: the short form below 128, else the shortest long one."""
    content = b"".join(contents)
    size = len(content)
    if size < 0x80:
        return tag + bytes([size]) + content
    length = size.to_bytes((size.bit_length() + 7) // 8, "big")
    return tag + bytes([0x80 | len(length)]) + length + content


def _indefinite(tag: bytes, *contents: bytes) -> bytes:
    """X.690 section 8.1.3.6."""
    return tag + _INDEFINITE + b"".join(contents) + _END


def _algorithm(identifier: bytes, parameters: bytes) -> bytes:
    return _definite(_SEQUENCE, _definite(_OID, identifier), parameters)


_VERSION_2 = _definite(_INTEGER, b"\x02")
_SHA256_IDENTIFIER = _algorithm(_SHA256, _definite(_NULL))
