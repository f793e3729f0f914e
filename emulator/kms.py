"""A KMS for a machine without AWS: the operations of ``TrentService`` that releasing keys to enclaves takes, for real.

Key policies and grants decide, encryption contexts are authenticated, and a ``Recipient`` is verified under the anchor
that the emulator was given before anything is encrypted to it: what other emulators of AWS leave out is what this one
is for. Requests, answers, codes and texts are AWS's. The core is sans-IO: :meth:`SoftwareKms.call` takes an operation's
name, its request and whoever signed it; ``emulator.kms_endpoint`` is the HTTPS before it. It keeps no key beyond its
own life.
"""

from __future__ import annotations

import base64
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from typing import Any, Final

from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat, PublicFormat
from moto.kms.models import Key

from attestation.chain import Anchor, ChainCache
from attestation.keypolicy.document import KeyPolicy
from emulator import kms_keys
from emulator.cms import ContentForm, envelop
from emulator.kms_access import Asked, Call, allowed_key, named_key, require_allowed, require_of_account
from emulator.kms_admin import ADMINISTRATION, Answer
from emulator.kms_keys import ENCRYPT_DECRYPT, SIGN_VERIFY, KeyStore, require_usable, require_usage
from emulator.kms_request import KmsFault, read_request
from emulator.recipient import Recipient, attested
from emulator.sigv4 import Caller

DEFAULT_REGION: Final = "us-east-1"
DEFAULT_ACCOUNT: Final = "111122223333"
_DATA_KEYS: Final = {"AES_128": 16, "AES_256": 32}
_PAIRS: Final[Mapping[str, Callable[[], ec.EllipticCurvePrivateKey | rsa.RSAPrivateKey]]] = {
    "ECC_NIST_P256": lambda: ec.generate_private_key(ec.SECP256R1()),
    "ECC_NIST_P384": lambda: ec.generate_private_key(ec.SECP384R1()),
    "ECC_NIST_P521": lambda: ec.generate_private_key(ec.SECP521R1()),
    "RSA_2048": lambda: rsa.generate_private_key(65537, 2048),
    "RSA_3072": lambda: rsa.generate_private_key(65537, 3072),
    "RSA_4096": lambda: rsa.generate_private_key(65537, 4096),
}
_UNSUPPORTED: Final = frozenset(
    ("CustomKeyStoreId", "XksKeyId", "Tags", "DryRunModifiers", "GranteeServicePrincipal", "RetiringServicePrincipal")
)


@dataclass(slots=True)
class SoftwareKms:
    """The keys of one account, and of others whose principals make some. Safe to use from several threads."""

    anchor: Anchor | None = None
    """Under which attestation documents are believed; None for a KMS that takes no ``Recipient``."""
    region: str = DEFAULT_REGION
    account: str = DEFAULT_ACCOUNT
    clock: Callable[[], datetime] = lambda: datetime.now(UTC)
    content_form: ContentForm = ContentForm.CONSTRUCTED
    """How the content of ``CiphertextForRecipient`` is written."""
    keys: KeyStore = field(init=False)
    _chains: ChainCache = field(default_factory=ChainCache, init=False)

    def __post_init__(self) -> None:
        self.keys = KeyStore(self.region)

    def create_key(
        self,
        policy: str | None = None,
        *,
        usage: str = ENCRYPT_DECRYPT,
        spec: str = kms_keys.SYMMETRIC,
        multi_region: bool = False,
        alias: str | None = None,
    ) -> str:
        """A new key's ARN, without asking who makes it. ``policy`` is its policy, AWS's default one if None; ``alias``
        is ``alias/NAME``. Raises KmsFault, and KeyPolicyError for what is no policy.
        """
        if policy is not None:
            KeyPolicy.parse(policy)
        key = self.keys.make(
            self.account, self.region, policy=policy, usage=usage, spec=spec, multi_region=multi_region
        )
        self.keys.add(key)
        if alias is not None:
            self.keys.alias(alias, key)
        return key.arn

    def call(self, operation: str, body: object, caller: Caller) -> Answer:
        """The answer to one operation; it and ``body`` as JSON has them, byte strings in base64. Raises KmsFault."""
        if operation not in _CRYPTOGRAPHY and operation not in ADMINISTRATION:
            raise KmsFault("UnknownOperationException", f"no operation {operation[:64]}")
        call = Call(operation, read_request(operation, body), caller, self.clock())
        if unsupported := _UNSUPPORTED & call.request.keys():
            raise KmsFault("UnsupportedOperationException", f"{min(unsupported)} is not emulated")
        if "Recipient" in call.request:
            call = replace(call, recipient=self._attested(call))
        if operation in ADMINISTRATION:
            answer = ADMINISTRATION[operation](self.keys, call)
        else:
            answer = _CRYPTOGRAPHY[operation](self, call)
        call.require_not_dry()
        return {name: _json(value) for name, value in answer.items()}

    def _attested(self, call: Call) -> Recipient:
        if self.anchor is None:
            raise KmsFault("ValidationException", "Recipient: no anchor to verify attestation documents under")
        return attested(call.request["Recipient"], anchor=self.anchor, at=call.now, cache=self._chains)

    def _for_recipient(self, call: Call, name: str, plaintext: bytes) -> Answer:
        """``plaintext`` under ``name``, or for the enclave that proved itself and for nobody else."""
        if call.recipient is None:
            return {name: plaintext}
        return {"CiphertextForRecipient": envelop(plaintext, call.recipient.key, self.content_form)}

    # --- What keys do ---------------------------------------------------------------------------------------------

    def _encrypt(self, call: Call) -> Answer:
        key = self._symmetric(call)
        blob = kms_keys.encrypt(key, call.request["Plaintext"], call.encryption_context)
        return {"CiphertextBlob": blob, "KeyId": key.arn, "EncryptionAlgorithm": kms_keys.SYMMETRIC}

    def _symmetric(self, call: Call) -> Key:
        key = allowed_key(self.keys, call)
        _require_symmetric(key, call.request.get("EncryptionAlgorithm"))
        return key

    def _decrypt(self, call: Call) -> Answer:
        key = self._decrypting(call, "Decrypt", "", call.encryption_context)
        plaintext = kms_keys.decrypt(key, call.request["CiphertextBlob"], call.encryption_context)
        answer = self._for_recipient(call, "Plaintext", plaintext)
        return {"KeyId": key.arn, "EncryptionAlgorithm": kms_keys.SYMMETRIC} | answer

    def _decrypting(self, call: Call, action: str, prefix: str, context: Mapping[str, str], extra: Any = None) -> Key:
        """The key that a ciphertext is opened with: the one that it names, which must be the one that the request
        names, if it does.
        """
        key = self._sealing(call)
        asked = Asked(call, None, context)
        if (member := f"{prefix}KeyId") in call.request:
            wanted, by_name = named_key(self.keys, call, member)
            asked = Asked(call, by_name.alias, context)
            require_allowed(asked, action, wanted, extra)
            if key is not wanted:
                raise KmsFault(
                    "IncorrectKeyException",
                    "The key ID in the request does not identify a CMK that can perform this operation.",
                )
        elif key is None:
            raise KmsFault(
                "AccessDeniedException",
                "The ciphertext refers to a customer master key that does not exist, does not exist in this region, or"
                " you are not allowed to access.",
            )
        else:
            require_allowed(asked, action, key, extra)
        _require_symmetric(key, call.request.get(f"{prefix}EncryptionAlgorithm"))
        return key

    def _sealing(self, call: Call) -> Key | None:
        """The key that the ciphertext names."""
        if "CiphertextBlob" not in call.request:
            raise KmsFault("ValidationException", "CiphertextBlob is missing")
        return self.keys.find_by_ciphertext(call.request["CiphertextBlob"], region=call.caller.region)

    def _re_encrypt(self, call: Call) -> Answer:
        request = call.request
        source_context = request.get("SourceEncryptionContext", {})
        context = request.get("DestinationEncryptionContext", {})
        destination, _ = named_key(self.keys, call, "DestinationKeyId")
        same = {"kms:ReEncryptOnSameKey": ("true" if self._sealing(call) is destination else "false",)}
        source = self._decrypting(call, "ReEncryptFrom", "Source", source_context, same)
        require_allowed(Asked(call, None, context), "ReEncryptTo", destination, same)
        _require_symmetric(destination, request.get("DestinationEncryptionAlgorithm"))
        plaintext = kms_keys.decrypt(source, request["CiphertextBlob"], source_context)
        return {
            "CiphertextBlob": kms_keys.encrypt(destination, plaintext, context),
            "SourceKeyId": source.arn,
            "KeyId": destination.arn,
            "SourceEncryptionAlgorithm": kms_keys.SYMMETRIC,
            "DestinationEncryptionAlgorithm": kms_keys.SYMMETRIC,
        }

    def _generate_data_key(self, call: Call) -> Answer:
        key = self._symmetric(call)
        size, spec = call.request.get("NumberOfBytes"), call.request.get("KeySpec")
        if (size is None) == (spec is None):
            raise KmsFault("ValidationException", "Please specify either number of bytes or key spec.")
        plaintext = os.urandom(size or _DATA_KEYS[call.request["KeySpec"]])
        blob = kms_keys.encrypt(key, plaintext, call.encryption_context)
        answer: Answer = {"CiphertextBlob": blob, "KeyId": key.arn}
        if call.operation == "GenerateDataKey":
            answer |= self._for_recipient(call, "Plaintext", plaintext)
        return answer

    def _generate_data_key_pair(self, call: Call) -> Answer:
        key = self._symmetric(call)
        spec = call.request["KeyPairSpec"]
        if spec not in _PAIRS:
            raise KmsFault("UnsupportedOperationException", f"no key pairs of spec {spec} here")
        pair = _PAIRS[spec]()
        private = pair.private_bytes(Encoding.DER, PrivateFormat.PKCS8, NoEncryption())
        return {
            "KeyId": key.arn,
            "KeyPairSpec": spec,
            "PublicKey": pair.public_key().public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo),
            "PrivateKeyCiphertextBlob": kms_keys.encrypt(key, private, call.encryption_context),
        } | self._for_recipient(call, "PrivateKeyPlaintext", private)

    def _generate_random(self, call: Call) -> Answer:
        require_of_account(call.caller, self.account, call.operation)
        if "NumberOfBytes" not in call.request:
            raise KmsFault("ValidationException", "NumberOfBytes is missing")
        return self._for_recipient(call, "Plaintext", os.urandom(call.request["NumberOfBytes"]))

    def _sign(self, call: Call) -> Answer:
        key = allowed_key(self.keys, call)
        require_usable(key)
        require_usage(key, SIGN_VERIFY)
        algorithm = call.request["SigningAlgorithm"]
        signature = kms_keys.sign(key, algorithm, call.request["Message"], call.request.get("MessageType", "RAW"))
        return {"KeyId": key.arn, "Signature": signature, "SigningAlgorithm": algorithm}

    def _get_public_key(self, call: Call) -> Answer:
        key = allowed_key(self.keys, call)
        require_usable(key)
        if key.key_spec == kms_keys.SYMMETRIC:
            raise KmsFault("UnsupportedOperationException", f"{key.arn} is symmetric and has no public key.")
        description = {"KeySpec": key.key_spec, "CustomerMasterKeySpec": key.key_spec, "KeyUsage": key.key_usage}
        return {"KeyId": key.arn, "PublicKey": kms_keys.public_key(key)} | description | kms_keys.algorithms(key)


_CRYPTOGRAPHY: Final[Mapping[str, Callable[[SoftwareKms, Call], Answer]]] = {
    "Decrypt": SoftwareKms._decrypt,
    "Encrypt": SoftwareKms._encrypt,
    "GenerateDataKey": SoftwareKms._generate_data_key,
    "GenerateDataKeyPair": SoftwareKms._generate_data_key_pair,
    "GenerateDataKeyWithoutPlaintext": SoftwareKms._generate_data_key,
    "GenerateRandom": SoftwareKms._generate_random,
    "GetPublicKey": SoftwareKms._get_public_key,
    "ReEncrypt": SoftwareKms._re_encrypt,
    "Sign": SoftwareKms._sign,
}


def _require_symmetric(key: Key, algorithm: str | None) -> None:
    require_usable(key)
    require_usage(key, ENCRYPT_DECRYPT)
    if algorithm not in (None, kms_keys.SYMMETRIC):
        raise KmsFault("InvalidKeyUsageException", f"{algorithm} is incompatible with key spec {key.key_spec}.")


def _json(value: object) -> object:
    return base64.b64encode(value).decode("ascii") if isinstance(value, bytes) else value
