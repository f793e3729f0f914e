"""Opens what KMS answers to a request with ``Recipient``: ``CiphertextForRecipient``, a CMS EnvelopedData.

RFC 5652, section 6, in the one shape that KMS sends: BER with indefinite lengths, one KeyTransRecipientInfo whose
subjectKeyIdentifier is SHA-256 of the recipient's SubjectPublicKeyInfo, RSAES-OAEP with SHA-256 (RFC 8017, RFC 4055
section 4.1), and content under AES-256-CBC with PKCS#7 padding, its ciphertext whole or in chunks. Anything else is
refused.

Three steps: :func:`parse` needs no key, :func:`unwrap` gives the content key and :func:`decrypt` the content;
:func:`open_enveloped` is all of them. The format authenticates nothing: that its bytes are KMS's is TLS's to say.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Final

from cryptography.hazmat.primitives.asymmetric.padding import MGF1, OAEP
from cryptography.hazmat.primitives.asymmetric.rsa import RSAPrivateKey, RSAPublicKey
from cryptography.hazmat.primitives.ciphers import Cipher
from cryptography.hazmat.primitives.ciphers.algorithms import AES256
from cryptography.hazmat.primitives.ciphers.modes import CBC
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.padding import PKCS7
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from pyasn1.codec.ber import decoder
from pyasn1.error import PyAsn1Error
from pyasn1.type import namedtype, tag, univ

from attestation.errors import StrongroomError
from attestation.secret import Secret

MAX_SIZE: Final = 16_384
"""Bytes of an EnvelopedData. KMS encrypts at most 4,096 bytes of its user's, and its private keys have fewer."""
MAX_DEPTH: Final = 16
"""Elements inside one another; KMS's have 10."""
RSA_BITS: Final = 2048
"""Of the recipient's key."""

_VERSION = 2
"""Of an EnvelopedData with a subjectKeyIdentifier, and of the recipient with it (RFC 5652, sections 6.1 and 6.2.1)."""
_RSA_SIZE = RSA_BITS // 8
_AES_KEY_SIZE = 32
_BLOCK = 16
_KEY_ID_SIZE = 32

_ENVELOPED_DATA = "1.2.840.113549.1.7.3"
_DATA = "1.2.840.113549.1.7.1"
_RSAES_OAEP = "1.2.840.113549.1.1.7"
_MGF1 = "1.2.840.113549.1.1.8"
_SHA256 = "2.16.840.1.101.3.4.2.1"
_AES256_CBC = "2.16.840.1.101.3.4.1.42"
_NULL = b"\x05\x00"


class CmsError(StrongroomError):
    """KMS's ciphertext does not open. Codes: ``malformed_cms``, ``unsupported_cms`` (another version or algorithm),
    ``wrong_recipient``, and ``undecryptable_cms`` for every failure of the decryption itself, all alike."""

    exit_code = 3


@dataclass(frozen=True, slots=True)
class EnvelopedData:
    """What the three steps need; every algorithm is the one that the module's text names."""

    key_id: bytes
    """SHA-256 of the recipient's SubjectPublicKeyInfo, 32 bytes."""
    encrypted_key: bytes
    """The content key under RSAES-OAEP, 256 bytes."""
    iv: bytes
    """16 bytes."""
    ciphertext: bytes
    """At least one block of 16 bytes."""


def open_enveloped(ber: bytes, key: RSAPrivateKey) -> Secret:
    """The content, with the recipient's RSA-2048 key. Raises CmsError."""
    enveloped = parse(ber)
    return decrypt(enveloped, unwrap(enveloped, key))


def recipient_id(key: RSAPublicKey) -> bytes:
    """How KMS names a recipient: SHA-256 of its SubjectPublicKeyInfo."""
    return hashlib.sha256(key.public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)).digest()


def parse(ber: bytes) -> EnvelopedData:
    """Raises CmsError for anything but one EnvelopedData of KMS's shape."""
    _check_bounds(ber)
    try:
        return _enveloped_data(_decoded(ber, _ContentInfo()))
    except PyAsn1Error:  # the library decodes some indefinite lengths to a value without fields
        raise _malformed("a field of it has no value") from None


def _enveloped_data(content_info: univ.Sequence) -> EnvelopedData:
    _require(_ENVELOPED_DATA, content_info["contentType"], "contentType")
    enveloped = content_info["content"]
    _require_version(enveloped["version"], "EnvelopedData.version")
    if len(enveloped["recipientInfos"]) != 1:
        raise _malformed("an EnvelopedData has one recipient", 1, len(enveloped["recipientInfos"]))
    recipient = enveloped["recipientInfos"][0]
    _require_version(recipient["version"], "KeyTransRecipientInfo.version")
    _check_oaep(recipient["keyEncryptionAlgorithm"])
    content = enveloped["encryptedContentInfo"]
    _require(_DATA, content["contentType"], "encryptedContentInfo.contentType")
    cipher = content["contentEncryptionAlgorithm"]
    _require(_AES256_CBC, cipher["algorithm"], "contentEncryptionAlgorithm")
    ciphertext = bytes(content["encryptedContent"])
    if not ciphertext or len(ciphertext) % _BLOCK:
        raise _malformed("the ciphertext is not of whole blocks", f"a multiple of {_BLOCK} bytes", len(ciphertext))
    return EnvelopedData(
        key_id=_octets(recipient["rid"], "subjectKeyIdentifier", _KEY_ID_SIZE),
        encrypted_key=_octets(recipient["encryptedKey"], "encryptedKey", _RSA_SIZE),
        iv=_octets(_parameters(cipher, univ.OctetString()), "the initialization vector", _BLOCK),
        ciphertext=ciphertext,
    )


def unwrap(enveloped: EnvelopedData, key: RSAPrivateKey) -> Secret:
    """The content key. Raises CmsError ``wrong_recipient`` or ``undecryptable_cms``."""
    if key.key_size != RSA_BITS:
        raise ValueError(f"a recipient's key has {RSA_BITS} bits, not {key.key_size}")
    mine = recipient_id(key.public_key())
    if enveloped.key_id != mine:
        raise CmsError(
            "wrong_recipient",
            "the ciphertext is for the key of another enclave or boot",
            expected=mine.hex(),
            got=enveloped.key_id.hex(),
        )
    try:
        content_key = key.decrypt(enveloped.encrypted_key, OAEP(MGF1(SHA256()), SHA256(), None))
    except ValueError:
        raise _undecryptable() from None
    return Secret(content_key)


def decrypt(enveloped: EnvelopedData, content_key: Secret) -> Secret:
    """The content, without its padding. Raises CmsError ``undecryptable_cms``."""
    if len(content_key) != _AES_KEY_SIZE:
        raise _undecryptable()
    opened = Cipher(AES256(content_key.expose()), CBC(enveloped.iv)).decryptor()
    padded = opened.update(enveloped.ciphertext) + opened.finalize()
    padding = PKCS7(_BLOCK * 8).unpadder()
    try:
        return Secret(padding.update(padded) + padding.finalize())
    except ValueError:
        raise _undecryptable() from None


# --- The schema: what of RFC 5652 and RFC 4055 KMS uses ---------------------------------------------------------------


def _explicit(number: int) -> tag.Tag:
    return tag.Tag(tag.tagClassContext, tag.tagFormatConstructed, number)


def _implicit(number: int) -> tag.Tag:
    return tag.Tag(tag.tagClassContext, tag.tagFormatSimple, number)


class _AlgorithmIdentifier(univ.Sequence):  # type: ignore[misc]  # the library has no types
    componentType = namedtype.NamedTypes(  # noqa: N815
        namedtype.NamedType("algorithm", univ.ObjectIdentifier()),
        namedtype.OptionalNamedType("parameters", univ.Any()),
    )


class _OaepParameters(univ.Sequence):  # type: ignore[misc]
    """RSAES-OAEP-params, RFC 4055 section 4.1. The defaults are SHA-1's, so the first two must be there; the third is
    the empty label when absent, and KMS leaves it out."""

    componentType = namedtype.NamedTypes(  # noqa: N815
        namedtype.NamedType("hashAlgorithm", _AlgorithmIdentifier().subtype(explicitTag=_explicit(0))),
        namedtype.NamedType("maskGenAlgorithm", _AlgorithmIdentifier().subtype(explicitTag=_explicit(1))),
    )


class _RecipientIdentifier(univ.Choice):  # type: ignore[misc]
    componentType = namedtype.NamedTypes(  # noqa: N815
        namedtype.NamedType("subjectKeyIdentifier", univ.OctetString().subtype(implicitTag=_implicit(0))),
    )


class _KeyTransRecipientInfo(univ.Sequence):  # type: ignore[misc]
    componentType = namedtype.NamedTypes(  # noqa: N815
        namedtype.NamedType("version", univ.Integer()),
        namedtype.NamedType("rid", _RecipientIdentifier()),
        namedtype.NamedType("keyEncryptionAlgorithm", _AlgorithmIdentifier()),
        namedtype.NamedType("encryptedKey", univ.OctetString()),
    )


class _RecipientInfos(univ.SetOf):  # type: ignore[misc]
    componentType = _KeyTransRecipientInfo()  # noqa: N815


class _EncryptedContentInfo(univ.Sequence):  # type: ignore[misc]
    componentType = namedtype.NamedTypes(  # noqa: N815
        namedtype.NamedType("contentType", univ.ObjectIdentifier()),
        namedtype.NamedType("contentEncryptionAlgorithm", _AlgorithmIdentifier()),
        namedtype.NamedType("encryptedContent", univ.OctetString().subtype(implicitTag=_implicit(0))),
    )


class _EnvelopedData(univ.Sequence):  # type: ignore[misc]
    componentType = namedtype.NamedTypes(  # noqa: N815
        namedtype.NamedType("version", univ.Integer()),
        namedtype.NamedType("recipientInfos", _RecipientInfos()),
        namedtype.NamedType("encryptedContentInfo", _EncryptedContentInfo()),
    )


class _ContentInfo(univ.Sequence):  # type: ignore[misc]
    componentType = namedtype.NamedTypes(  # noqa: N815
        namedtype.NamedType("contentType", univ.ObjectIdentifier()),
        namedtype.NamedType("content", _EnvelopedData().subtype(explicitTag=_explicit(0))),
    )


# --- Reading ----------------------------------------------------------------------------------------------------------


def _check_bounds(ber: bytes) -> None:
    """One pass over tags and lengths, so that the decoder sees one element, whole, of bounded size and depth, with
    nothing behind it. Tags are of one byte, as all in the schema; lengths of at most three."""
    if len(ber) > MAX_SIZE:
        raise _malformed("it is too long", f"at most {MAX_SIZE} bytes", len(ber))
    position = 0
    open_elements: list[tuple[bool, int]] = []
    """Whether of definite length, and where it ends or must have ended."""
    while position == 0 or open_elements:
        definite, limit = open_elements[-1] if open_elements else (True, len(ber))
        if definite and open_elements and position == limit:
            open_elements.pop()
            continue
        if position + 2 > limit:
            raise _malformed("an element is cut short")
        identifier, length = ber[position : position + 2]
        position += 2
        if identifier == 0:
            if definite or length:
                raise _malformed("an end without a beginning")
            open_elements.pop()
            continue
        if identifier & 0x1F == 0x1F:
            raise _malformed("a tag of several bytes")
        constructed = bool(identifier & 0x20)
        if length == 0x80 and constructed:
            open_elements.append((False, limit))
        else:
            if length >= 0x80:
                octets = length - 0x80
                if not 1 <= octets <= 3:
                    raise _malformed("a length that cannot be meant")
                length = int.from_bytes(ber[position : position + octets])
                position += octets
            if position + length > limit:
                raise _malformed("an element is cut short")
            if constructed:
                open_elements.append((True, position + length))
            else:
                position += length
        if len(open_elements) > MAX_DEPTH:
            raise _malformed("it is nested too deep", f"at most {MAX_DEPTH}", "more")
    if position != len(ber):
        raise _malformed("bytes follow it", "none", len(ber) - position)


def _decoded(ber: bytes, schema: univ.Sequence) -> univ.Sequence:
    try:
        value, rest = decoder.decode(ber, asn1Spec=schema)
    except Exception:  # its own error, and on bytes that it did not expect others; nothing of ours is within
        raise _malformed(f"it does not decode as {type(schema).__name__.removeprefix('_')}") from None
    if rest:
        raise _malformed("bytes follow it", "none", len(rest))
    return value


def _check_oaep(algorithm: _AlgorithmIdentifier) -> None:
    _require(_RSAES_OAEP, algorithm["algorithm"], "keyEncryptionAlgorithm")
    parameters = _parameters(algorithm, _OaepParameters())
    _check_sha256(parameters["hashAlgorithm"], "hashAlgorithm")
    mask = parameters["maskGenAlgorithm"]
    _require(_MGF1, mask["algorithm"], "maskGenAlgorithm")
    _check_sha256(_parameters(mask, _AlgorithmIdentifier()), "the mask's hashAlgorithm")


def _check_sha256(algorithm: _AlgorithmIdentifier, field: str) -> None:
    """Parameters are NULL or absent: RFC 4055, section 2.1, has both."""
    _require(_SHA256, algorithm["algorithm"], field)
    if algorithm["parameters"].isValue and bytes(algorithm["parameters"]) != _NULL:
        raise _malformed(f"{field} has parameters")


def _parameters(algorithm: _AlgorithmIdentifier, schema: univ.Sequence) -> univ.Sequence:
    if not algorithm["parameters"].isValue:
        raise _malformed("an algorithm lacks its parameters")
    return _decoded(bytes(algorithm["parameters"]), schema)


def _octets(value: univ.OctetString | univ.Choice, field: str, size: int) -> bytes:
    octets = bytes(value.getComponent() if isinstance(value, univ.Choice) else value)
    if len(octets) != size:
        raise _malformed(f"{field} has the wrong length", f"{size} bytes", len(octets))
    return octets


def _require_version(version: univ.Integer, field: str) -> None:
    if version != _VERSION:  # shown only when it has few digits
        raise _unsupported(field, _VERSION, int(version) if 0 <= version < 100 else "another")


def _require(expected: str, identifier: univ.ObjectIdentifier, field: str) -> None:
    if str(identifier) != expected:
        raise _unsupported(field, expected, str(identifier)[:80])


def _unsupported(field: str, expected: object, got: object) -> CmsError:
    return CmsError("unsupported_cms", f"{field} is not what KMS sends to an enclave", expected=expected, got=got)


def _malformed(why: str, expected: object | None = None, got: object | None = None) -> CmsError:
    return CmsError("malformed_cms", f"no EnvelopedData of KMS: {why}", expected=expected, got=got)


def _undecryptable() -> CmsError:
    """One for all: whoever could tell a bad padding from a bad key could decrypt by asking."""
    return CmsError("undecryptable_cms", "KMS's ciphertext does not open")
