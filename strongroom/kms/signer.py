"""Releases signed by AWS KMS: the private key is made there, and never leaves it.

Nothing that KMS answers is taken at its word. It must be about the key that was asked for, by its full ARN; the key
must be of the kind that PROTOCOL.md section 4.1 names; and a signature is verified before anybody uses it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from types import TracebackType
from typing import Final, Self

from attestation.keypolicy.document import KeyArn, KeyPolicyError
from attestation.release_signing import Algorithm, PublicKey, ReleaseError, SigningError
from strongroom.kms.client import EXIT_CODES, KmsClient, KmsError

KEY_SPEC: Final = "ECC_NIST_P384"
KEY_USAGE: Final = "SIGN_VERIFY"
SIGNING_ALGORITHM: Final = "ECDSA_SHA_384"


class KmsSigningError(SigningError):
    """KMS did not sign. Codes: those of :class:`~strongroom.kms.client.KmsError`; ``bad_key_arn`` (2);
    ``bad_kms_signature`` (3).
    """

    @property
    def exit_code(self) -> int:  # type: ignore[override]
        return {"bad_key_arn": 2, "bad_kms_signature": 3}.get(self.code) or EXIT_CODES.get(self.code, 4)


class KmsSigner:
    """A key of KMS as a signer. To be closed, or used with ``with``."""

    def __init__(self, arn: str) -> None:
        """Asks for the public key of ``arn``, a key's full ARN: an alias may lead to another key tomorrow.

        Raises KmsSigningError; MissingExtra without boto3.
        """
        try:
            self._key = KeyArn.parse(arn)
        except KeyPolicyError as error:
            raise KmsSigningError("bad_key_arn", error.message, expected=error.expected, got=error.got) from error
        self._client = KmsClient(self._key.region, purpose="signing with KMS")
        try:
            self._public = self._ask_public_key()
        except BaseException:
            self.close()
            raise

    @property
    def public_key(self) -> PublicKey:
        return self._public

    def sign(self, data: bytes) -> bytes:
        """Raises KmsSigningError."""
        answer = self._ask(
            "sign",
            Message=hashlib.sha384(data).digest(),
            MessageType="DIGEST",
            SigningAlgorithm=SIGNING_ALGORITHM,
        )
        self._require(answer, "SigningAlgorithm", SIGNING_ALGORITHM)
        signature = _octets(answer, "Signature")
        try:
            self._public.verify(signature, data)
        except ReleaseError as error:
            raise KmsSigningError(
                "bad_kms_signature", "KMS answered with a signature that its own public key does not verify"
            ) from error
        return signature

    def close(self) -> None:
        self._client.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def _ask_public_key(self) -> PublicKey:
        answer = self._ask("get_public_key")
        self._require(answer, "KeyUsage", KEY_USAGE)
        self._require(answer, "KeySpec", KEY_SPEC)
        try:
            key = PublicKey(_octets(answer, "PublicKey"))
        except ReleaseError as error:
            raise KmsSigningError("wrong_kms_key", f"KMS answered with {error.message}", got=error.got) from error
        if key.algorithm is not Algorithm.ECDSA_P384:
            raise KmsSigningError(
                "wrong_kms_key",
                "KMS answered with a key of another kind",
                expected=Algorithm.ECDSA_P384.value,
                got=key.algorithm.value,
            )
        return key

    def _ask(self, operation: str, **request: object) -> Mapping[str, object]:
        """One operation on the key; the answer is about that key."""
        try:
            return self._client.ask_of(self._key, operation, **request)
        except KmsError as error:
            raise KmsSigningError(error.code, error.message, expected=error.expected, got=error.got) from error

    @staticmethod
    def _require(answer: Mapping[str, object], field: str, expected: str) -> None:
        if answer.get(field) != expected:
            raise KmsSigningError(
                "wrong_kms_key",
                f"KMS answered with another {field} than was asked for",
                expected=expected,
                got=ascii(answer.get(field))[:200],
            )


def _octets(answer: Mapping[str, object], field: str) -> bytes:
    value = answer.get(field)
    if not isinstance(value, bytes):
        raise KmsSigningError(
            "wrong_kms_key", f"KMS answered without {field}", expected="bytes", got=type(value).__name__
        )
    return value
