"""The keys of the emulated KMS: moto's keys and bookkeeping, as a library in this process.

Used of moto are its models alone, one set for each account and region: no server, no decorator, none of its
process-wide backends. What it does differently than KMS is done here instead: ciphertexts (moto's bind an encryption
context whose names and values run into each other, and cannot name a multi-Region key), signatures of digests, and
replicas.
"""

from __future__ import annotations

import copy
import json
import os
import struct
import threading
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.asymmetric import ec, padding, rsa
from cryptography.hazmat.primitives.asymmetric.utils import Prehashed
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.hashes import SHA256, SHA384, SHA512, HashAlgorithm
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from moto.kms.models import Key, KmsBackend

from emulator.kms_request import KmsFault

SYMMETRIC: Final = "SYMMETRIC_DEFAULT"
ENCRYPT_DECRYPT: Final = "ENCRYPT_DECRYPT"
SIGN_VERIFY: Final = "SIGN_VERIFY"
KEY_AGREEMENT: Final = "KEY_AGREEMENT"

_USAGES: Final[Mapping[str, tuple[str, ...]]] = {
    SYMMETRIC: (ENCRYPT_DECRYPT,),
    "RSA_2048": (SIGN_VERIFY,),
    "RSA_3072": (SIGN_VERIFY,),
    "RSA_4096": (SIGN_VERIFY,),
    "ECC_NIST_P256": (SIGN_VERIFY, KEY_AGREEMENT),
    "ECC_NIST_P384": (SIGN_VERIFY, KEY_AGREEMENT),
    "ECC_NIST_P521": (SIGN_VERIFY, KEY_AGREEMENT),
}
"""The specs that are emulated, with the usages of each. KMS has more."""
_HASHES: Final[Mapping[str, HashAlgorithm]] = {"SHA_256": SHA256(), "SHA_384": SHA384(), "SHA_512": SHA512()}
_CURVES: Final = {"ECC_NIST_P256": "SHA_256", "ECC_NIST_P384": "SHA_384", "ECC_NIST_P521": "SHA_512"}

_CIPHERTEXT_VERSION: Final = 1
_NONCE_SIZE: Final = 12


@dataclass(frozen=True, slots=True)
class Named:
    """A key, and the alias that a request named it by, if it did."""

    key: Key
    alias: str | None


class KeyStore:
    """Keys by account and region. Safe to use from several threads; so are keys, but for what changes them."""

    def __init__(self, region: str) -> None:
        self.lock = threading.RLock()
        """Held by whoever reads and then changes a key."""
        self._regions = {region}
        self._backends: dict[tuple[str, str], KmsBackend] = {}

    @property
    def regions(self) -> frozenset[str]:
        """The home region, and those into which a key was replicated."""
        with self.lock:
            return frozenset(self._regions)

    def make(
        self,
        account: str,
        region: str,
        *,
        policy: str | None,
        usage: str,
        spec: str,
        description: str = "",
        multi_region: bool = False,
        origin: str = "AWS_KMS",
    ) -> Key:
        """A new key, not yet among the others, Enabled; one of origin ``EXTERNAL`` waits for its material for ever.
        Without a policy it has AWS's default one. Raises KmsFault.
        """
        if usage not in _USAGES.get(spec, ()):
            raise KmsFault("ValidationException", f"KeyUsage {usage} is not compatible with KeySpec {spec} here")
        if origin not in ("AWS_KMS", "EXTERNAL"):
            raise KmsFault("UnsupportedOperationException", f"no keys of origin {origin} here")
        # On a backend of its own, as an RSA or EC key takes long to make and the others need not wait for it.
        maker = KmsBackend(region, account)
        key = maker.create_key(policy, usage, spec, description, None, multi_region, origin)
        if origin == "EXTERNAL":
            key.enabled, key.key_state = False, "PendingImport"
        return key

    def add(self, key: Key) -> None:
        with self.lock:
            self._backend(key.account_id, key.region).keys[key.id] = key

    def schedule_deletion(self, key: Key, days: int) -> None:
        with self.lock:
            self._backend(key.account_id, key.region).schedule_key_deletion(key.id, days)

    def replicate(self, primary: Key, region: str, *, policy: str | None, description: str) -> Key:
        """A replica: the same key material and id, and a policy, grants and aliases of its own. Raises KmsFault."""
        replica = copy.copy(primary)
        replica.region = region
        replica.arn = primary.arn.replace(f":{primary.region}:", f":{region}:")
        replica.policy = policy or primary.generate_default_policy()
        replica.description, replica.grants, replica.aliases, replica.rotations = description, {}, {}, []
        with self.lock:
            keys = self._backend(primary.account_id, region).keys
            if replica.id in keys:
                raise KmsFault("AlreadyExistsException", f"{replica.arn} already exists")
            self._regions.add(region)
            # One object for the primary and its replicas.
            primary.multi_region_configuration["ReplicaKeys"].append({"Arn": replica.arn, "Region": region})
            keys[replica.id] = replica
        return replica

    def all(self, account: str, region: str) -> list[Key]:
        with self.lock:
            return list(self._backend(account, region).keys.values())

    def find(self, name: str, *, account: str, region: str) -> Named:
        """The key that a caller of ``account`` in ``region`` names by id, ARN or alias. Raises KmsFault."""
        if name.startswith("arn:"):
            parts = name.split(":", 5)
            if len(parts) != 6 or parts[:3] != ["arn", "aws", "kms"] or not parts[5].startswith(("key/", "alias/")):
                raise KmsFault("InvalidArnException", f"Invalid ARN: {name[:256]}")
            if parts[3] != region:
                raise KmsFault("NotFoundException", f"Invalid arn {parts[3]}")
            account, resource = parts[4], parts[5]
        else:
            resource = name if name.startswith("alias/") else f"key/{name}"
        arn = f"arn:aws:kms:{region}:{account}:{resource}"
        with self.lock:
            backend = self._backend(account, region)
            if resource.startswith("key/"):
                key = backend.keys.get(resource.removeprefix("key/"))
                alias = None
            else:
                key = next((key for key in backend.keys.values() if resource in key.aliases), None)
                alias = resource
        if key is None:
            kind = f"Alias {arn} is not found." if alias else f"Key '{arn}' does not exist"
            raise KmsFault("NotFoundException", kind)
        return Named(key, alias)

    def find_by_ciphertext(self, blob: bytes, *, region: str) -> Key | None:
        """The key that a ciphertext names. None when it is not here. Raises KmsFault for what is no ciphertext."""
        key_id = _split(blob)[1]
        with self.lock:
            backends = (backend for (_, where), backend in self._backends.items() if where == region)
            return next((backend.keys[key_id] for backend in backends if key_id in backend.keys), None)

    def alias(self, name: str, key: Key) -> None:
        """Raises KmsFault ``AlreadyExistsException``."""
        with self.lock:
            backend = self._backend(key.account_id, key.region)
            if backend.alias_exists(name):
                raise KmsFault("AlreadyExistsException", f"An alias with the name {name} already exists")
            backend.create_alias(key.id, name)

    def _backend(self, account: str, region: str) -> KmsBackend:
        if (account, region) not in self._backends:
            self._backends[account, region] = KmsBackend(region, account)
        return self._backends[account, region]


def metadata(key: Key) -> dict[str, Any]:
    """``KeyMetadata`` of DescribeKey."""
    entry: dict[str, Any] = key.to_dict()["KeyMetadata"]
    for name in ("EncryptionAlgorithms", "SigningAlgorithms"):
        entry.pop(name)
    entry |= algorithms(key)
    if key.multi_region:
        kind = "PRIMARY" if key.multi_region_configuration["PrimaryKey"]["Arn"] == key.arn else "REPLICA"
        entry["MultiRegionConfiguration"] = {**key.multi_region_configuration, "MultiRegionKeyType": kind}
    return entry


def algorithms(key: Key) -> dict[str, list[str]]:
    """What a key can do, as DescribeKey and GetPublicKey say it."""
    if key.key_usage == ENCRYPT_DECRYPT:
        return {"EncryptionAlgorithms": [SYMMETRIC]}
    if key.key_usage == KEY_AGREEMENT:
        return {"KeyAgreementAlgorithms": ["ECDH"]}
    if key.key_spec in _CURVES:
        return {"SigningAlgorithms": [f"ECDSA_{_CURVES[key.key_spec]}"]}
    return {"SigningAlgorithms": [f"RSASSA_{kind}_{name}" for kind in ("PKCS1_V1_5", "PSS") for name in _HASHES]}


def require_usable(key: Key) -> None:
    """Raises KmsFault unless the key is Enabled."""
    if key.key_state == "Disabled":
        raise KmsFault("DisabledException", f"{key.arn} is disabled.")
    if key.key_state != "Enabled":
        state = {"PendingDeletion": "pending deletion", "PendingImport": "pending import"}[key.key_state]
        raise KmsFault("KMSInvalidStateException", f"{key.arn} is {state}.")


def require_usage(key: Key, usage: str) -> None:
    """Raises KmsFault ``InvalidKeyUsageException``."""
    if key.key_usage != usage:
        raise KmsFault("InvalidKeyUsageException", f"{key.arn} key usage is {key.key_usage} which is not {usage}.")


# --- Encryption --------------------------------------------------------------------------------------------------


def encrypt(key: Key, plaintext: bytes, context: Mapping[str, str]) -> bytes:
    """``CiphertextBlob``: version, key id, nonce, and AES-256-GCM with the encryption context as associated data."""
    key_id = key.id.encode("ascii")
    header = struct.pack(">BB", _CIPHERTEXT_VERSION, len(key_id)) + key_id
    nonce = os.urandom(_NONCE_SIZE)
    return header + nonce + AESGCM(key.key_material).encrypt(nonce, plaintext, _associated(header, context))


def decrypt(key: Key, blob: bytes, context: Mapping[str, str]) -> bytes:
    """Raises KmsFault ``InvalidCiphertextException``, which says no more, as KMS's."""
    header, _, nonce, sealed = _split(blob)
    try:
        return AESGCM(key.key_material).decrypt(nonce, sealed, _associated(header, context))
    except InvalidTag as error:
        raise _invalid_ciphertext() from error


def _split(blob: bytes) -> tuple[bytes, str, bytes, bytes]:
    """Header, key id, nonce, ciphertext with its tag."""
    size = 2 + (blob[1] if len(blob) > 1 else 0)
    header, nonce, sealed = blob[:size], blob[size : size + _NONCE_SIZE], blob[size + _NONCE_SIZE :]
    if blob[:1] != bytes([_CIPHERTEXT_VERSION]) or len(sealed) < 16 or not header.isascii():
        raise _invalid_ciphertext()
    return header, header[2:].decode("ascii"), nonce, sealed


def _associated(header: bytes, context: Mapping[str, str]) -> bytes:
    return header + json.dumps(sorted(context.items()), separators=(",", ":")).encode("ascii")


def _invalid_ciphertext() -> KmsFault:
    return KmsFault("InvalidCiphertextException", "")


# --- Signatures --------------------------------------------------------------------------------------------------


def public_key(key: Key) -> bytes:
    """The SubjectPublicKeyInfo, DER."""
    public = key.private_key.private_key.public_key()  # type: ignore[attr-defined]  # moto's wrapper has it
    spki: bytes = public.public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)
    return spki


def sign(key: Key, algorithm: str, message: bytes, kind: str) -> bytes:
    """The signature of ``message``, which is the message itself (``RAW``) or its digest (``DIGEST``). Raises
    KmsFault.
    """
    if algorithm not in algorithms(key).get("SigningAlgorithms", ()):
        raise KmsFault(
            "InvalidKeyUsageException", f"Algorithm {algorithm} is incompatible with key spec {key.key_spec}"
        )
    digest = _HASHES[algorithm[-7:]]
    if kind == "DIGEST" and len(message) != digest.digest_size:
        raise KmsFault("ValidationException", f"Digest is invalid length for algorithm {algorithm}.")
    if kind not in ("RAW", "DIGEST"):
        raise KmsFault("ValidationException", f"MessageType {kind} is not compatible with {algorithm}")
    hashed = Prehashed(digest) if kind == "DIGEST" else digest
    private = key.private_key.private_key  # type: ignore[attr-defined]
    if isinstance(private, rsa.RSAPrivateKey):
        pss = padding.PSS(padding.MGF1(digest), padding.PSS.DIGEST_LENGTH)
        return private.sign(message, pss if "_PSS_" in algorithm else padding.PKCS1v15(), hashed)
    assert isinstance(private, ec.EllipticCurvePrivateKey)
    return private.sign(message, ec.ECDSA(hashed))
