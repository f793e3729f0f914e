"""Releases signed by AWS KMS: the private key is made there, and never leaves it.

Nothing that KMS answers is taken at its word. It must be about the key that was asked for, by its full ARN; the key
must be of the kind that PROTOCOL.md section 4.1 names; and a signature is verified before anybody uses it. boto3 is
imported here alone, and only when a signer is made: the ``kms`` extra.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from types import TracebackType
from typing import Any, Final, Self

from attestation.release_signing import Algorithm, PublicKey, ReleaseError, SigningError
from strongroom.extras import require

KEY_SPEC: Final = "ECC_NIST_P384"
KEY_USAGE: Final = "SIGN_VERIFY"
SIGNING_ALGORITHM: Final = "ECDSA_SHA_384"
CONNECT_SECONDS: Final = 5
READ_SECONDS: Final = 10
ATTEMPTS: Final = 3

_ARN: Final = re.compile(r"arn:aws[a-z-]*:kms:(?P<region>[a-z0-9-]{1,32}):[0-9]{12}:key/[A-Za-z0-9-]{1,128}")
_EXIT_CODES: Final = {"bad_key_arn": 2, "wrong_kms_key": 3, "bad_kms_signature": 3}


class KmsError(SigningError):
    """KMS did not sign. Codes: ``bad_key_arn`` (2); ``wrong_kms_key`` and ``bad_kms_signature``, answers that nobody
    should trust (3); ``kms_refused`` and ``kms_unavailable`` (4).
    """

    @property
    def exit_code(self) -> int:  # type: ignore[override]
        return _EXIT_CODES.get(self.code, 4)


class KmsSigner:
    """A key of KMS as a signer. To be closed, or used with ``with``.

    Credentials and endpoint are boto3's business (its environment variables and files); the region is the ARN's.
    """

    def __init__(self, arn: str) -> None:
        """Asks for the public key of ``arn``, a key's full ARN: an alias may lead to another key tomorrow.

        Raises KmsError; MissingExtra without boto3.
        """
        found = _ARN.fullmatch(arn)
        if found is None:
            expected = "arn:aws:kms:REGION:ACCOUNT:key/ID"
            raise KmsError("bad_key_arn", "not the full ARN of a KMS key", expected=expected, got=ascii(arn[:200]))
        require("signing with KMS", ("kms",))
        import boto3.session
        from botocore.config import Config

        self._arn = arn
        config = Config(
            connect_timeout=CONNECT_SECONDS,
            read_timeout=READ_SECONDS,
            retries={"total_max_attempts": ATTEMPTS, "mode": "standard"},
        )
        session = boto3.session.Session(region_name=found["region"])
        self._client: Any = session.client("kms", config=config)
        try:
            self._public = self._ask_public_key()
        except BaseException:
            self.close()
            raise

    @property
    def public_key(self) -> PublicKey:
        return self._public

    def sign(self, data: bytes) -> bytes:
        """Raises KmsError."""
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
            raise KmsError(
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
            raise KmsError("wrong_kms_key", f"KMS answered with {error.message}", got=error.got) from error
        if key.algorithm is not Algorithm.ECDSA_P384:
            raise KmsError(
                "wrong_kms_key",
                "KMS answered with a key of another kind",
                expected=Algorithm.ECDSA_P384.value,
                got=key.algorithm.value,
            )
        return key

    def _ask(self, operation: str, **request: object) -> Mapping[str, object]:
        """One operation on the key; the answer is about that key. boto3's errors become KmsError."""
        from botocore.exceptions import BotoCoreError, ClientError

        try:
            answer: Mapping[str, object] = getattr(self._client, operation)(KeyId=self._arn, **request)
        except ClientError as error:
            details = error.response.get("Error", {})
            raise KmsError(
                "kms_refused", f"KMS refuses {error.operation_name}: {details.get('Message')}", got=details.get("Code")
            ) from error
        except BotoCoreError as error:
            raise KmsError("kms_unavailable", f"KMS cannot be asked: {error}", got=type(error).__name__) from error
        self._require(answer, "KeyId", self._arn)
        return answer

    @staticmethod
    def _require(answer: Mapping[str, object], field: str, expected: str) -> None:
        if answer.get(field) != expected:
            raise KmsError(
                "wrong_kms_key",
                f"KMS answered with another {field} than was asked for",
                expected=expected,
                got=ascii(answer.get(field))[:200],
            )


def _octets(answer: Mapping[str, object], field: str) -> bytes:
    value = answer.get(field)
    if not isinstance(value, bytes):
        raise KmsError("wrong_kms_key", f"KMS answered without {field}", expected="bytes", got=type(value).__name__)
    return value
