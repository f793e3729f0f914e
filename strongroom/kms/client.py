"""KMS, asked with this machine's own credentials: what it says of a key, and the data keys that it wraps.

Credentials and endpoint are boto3's business (its environment variables and files), except that a policy whose anchor
is AWS's is about AWS's own KMS; the region is the key's. In ``strongroom`` boto3 is imported here alone, and only when
a client is made: the ``kms`` extra. Nothing that KMS answers is about another key than the one that was asked for.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import TracebackType
from typing import Any, Final, Self, TypeVar
from urllib.parse import urlsplit

from attestation.envelope import DATA_KEY_SIZE, MAX_WRAPPED
from attestation.errors import StrongroomError
from attestation.keypolicy.answers import Grant, KeyMetadata
from attestation.keypolicy.document import KeyArn, KeyPolicy, KeyPolicyError, is_kms_host
from attestation.keyrelease import KeyFacts
from attestation.policy import AppraisalPolicy
from attestation.secret import Secret
from strongroom.extras import require

T = TypeVar("T")

CONNECT_SECONDS: Final = 5
READ_SECONDS: Final = 10
ATTEMPTS: Final = 3
MAX_GRANTS: Final = 1_000
"""Grants that are read of one key: more of them nobody has judged."""
MAX_PAGES: Final = 100
"""Answers in which they may come."""

EXIT_CODES: Final = {"wrong_kms_key": 3, "bad_kms_answer": 3, "foreign_kms": 3}
"""Of errors that are not just that KMS does not do what it was asked for."""


class KmsError(StrongroomError):
    """KMS did not do what it was asked for. Codes: ``kms_refused``, ``kms_unavailable`` (4); ``wrong_kms_key``,
    ``bad_kms_answer`` and ``foreign_kms``, which nobody should trust (3).
    """

    @property
    def exit_code(self) -> int:  # type: ignore[override]
        return EXIT_CODES.get(self.code, 4)


class KmsClient:
    """KMS in one region. To be closed, or used with ``with``."""

    def __init__(
        self, region: str | None, *, purpose: str = "asking KMS", policy: AppraisalPolicy | None = None
    ) -> None:
        """``region`` None: the one that boto3 is configured for. With ``policy``, what KMS says is for a verdict under
        it: unless the policy's enclaves are EMULATED, and every verdict says so, AWS's own KMS alone is asked.

        Raises MissingExtra without boto3, in the words of ``purpose``; KmsError ``kms_unavailable`` when boto3 is
        configured badly, and ``foreign_kms``, before anything is asked.
        """
        require(purpose, ("kms",))
        import boto3.session
        from botocore.config import Config
        from botocore.exceptions import BotoCoreError

        config = Config(
            connect_timeout=CONNECT_SECONDS,
            read_timeout=READ_SECONDS,
            retries={"total_max_attempts": ATTEMPTS, "mode": "standard"},
        )
        try:
            self._client: Any = boto3.session.Session(region_name=region).client("kms", config=config)
        except (BotoCoreError, ValueError) as error:  # a profile that is not there; an endpoint that is no URL
            raise _unavailable(error) from error
        self.endpoint: str = self._client.meta.endpoint_url
        """A URL."""
        try:
            self._require_endpoint(policy)
        except KmsError:
            self.close()
            raise

    @property
    def is_amazons(self) -> bool:
        """Whether the endpoint has one of AWS's own names, for which TLS vouches."""
        return is_kms_host(urlsplit(self.endpoint).hostname or "", self._client.meta.region_name)

    def _require_endpoint(self, policy: AppraisalPolicy | None) -> None:
        if not self.endpoint.startswith("https://"):
            raise KmsError(
                "kms_unavailable", "KMS is asked over TLS alone", expected="https://", got=self.endpoint[:200]
            )
        if policy is not None and not policy.anchor.is_emulated and not self.is_amazons:
            raise KmsError(
                "foreign_kms",
                "the policy is about AWS's enclaves, and boto3 is configured for a KMS that is not AWS's own: look at"
                " AWS_ENDPOINT_URL_KMS, AWS_ENDPOINT_URL and endpoint_url in its files",
                expected=f"an endpoint of AWS's KMS in {self._client.meta.region_name}",
                got=self.endpoint[:200],
            )

    def close(self) -> None:
        self._client.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def ask(self, operation: str, **request: object) -> Mapping[str, object]:
        """One operation, by boto3's name and in its words. boto3's errors become KmsError."""
        from botocore.exceptions import BotoCoreError, ClientError

        try:
            answer: Mapping[str, object] = getattr(self._client, operation)(**request)
        except ClientError as error:
            details = error.response.get("Error", {})
            raise KmsError(
                "kms_refused", f"KMS refuses {error.operation_name}: {details.get('Message')}", got=details.get("Code")
            ) from error
        except BotoCoreError as error:
            raise _unavailable(error) from error
        return answer

    def ask_of(self, key: KeyArn, operation: str, **request: object) -> Mapping[str, object]:
        """One operation on ``key``, whose answer names it. Raises KmsError."""
        answer = self.ask(operation, KeyId=key.text, **request)
        if answer.get("KeyId") != key.text:
            raise KmsError(
                "wrong_kms_key",
                "KMS answered about another key than was asked for",
                expected=key.text,
                got=ascii(answer.get("KeyId"))[:200],
            )
        return answer

    def facts(self, key: KeyArn) -> KeyFacts:
        """What KMS says of ``key`` now: what it is, its policy and its grants. Raises KmsError."""
        try:
            return KeyFacts(
                KeyMetadata.from_api(self.ask("describe_key", KeyId=key.text)),
                KeyPolicy.parse(_take(self.ask("get_key_policy", KeyId=key.text, PolicyName="default"), "Policy", str)),
                tuple(map(Grant.from_api, self._grants(key))),
            )
        except KeyPolicyError as error:
            raise KmsError("bad_kms_answer", error.message, expected=error.expected, got=error.got) from error

    def _grants(self, key: KeyArn) -> list[Mapping[str, object]]:
        grants: list[Mapping[str, object]] = []
        page: dict[str, object] = {}
        for _ in range(MAX_PAGES):
            answer = self.ask("list_grants", KeyId=key.text, **page)
            grants += _take(answer, "Grants", list)
            if len(grants) > MAX_GRANTS:
                break
            if not _take(answer, "Truncated", bool):
                return grants
            page = {"Marker": _take(answer, "NextMarker", str)}
        raise KmsError(
            "bad_kms_answer",
            f"{key.text} has more grants than anybody judges",
            expected=f"at most {MAX_GRANTS}",
            got=f"{len(grants)} and more",
        )

    def generate_data_key(self, key: KeyArn, context: Mapping[str, str]) -> tuple[Secret, bytes]:
        """A fresh data key of 32 bytes, in the clear and wrapped under ``key`` in ``context``. Raises KmsError."""
        answer = self.ask_of(key, "generate_data_key", NumberOfBytes=DATA_KEY_SIZE, EncryptionContext=dict(context))
        plaintext, wrapped = (_take(answer, field, bytes) for field in ("Plaintext", "CiphertextBlob"))
        if len(plaintext) != DATA_KEY_SIZE or not 0 < len(wrapped) <= MAX_WRAPPED:
            raise KmsError(
                "bad_kms_answer",
                "a data key of another size than was asked for",
                expected=f"{DATA_KEY_SIZE} bytes",
                got=f"{len(plaintext)} bytes, {len(wrapped)} wrapped",
            )
        return Secret(plaintext), wrapped


def ask_of_keys(policy: AppraisalPolicy) -> dict[KeyArn, KeyFacts]:
    """What KMS says now of every key that ``policy`` names. Raises KmsError, ``foreign_kms`` before anything is asked
    where it is not the policy's; MissingExtra.
    """
    return {key: _ask_of_key(key, policy) for key in dict.fromkeys(rule.key for rule in policy.kms.values())}


def _ask_of_key(key: KeyArn, policy: AppraisalPolicy) -> KeyFacts:
    with KmsClient(key.region, purpose="a policy that names a KMS key", policy=policy) as client:
        return client.facts(key)


def _unavailable(error: Exception) -> KmsError:
    return KmsError("kms_unavailable", f"KMS cannot be asked: {error}", got=type(error).__name__)


def _take(answer: Mapping[str, object], field: str, kind: type[T]) -> T:
    value = answer.get(field)
    if not isinstance(value, kind):
        raise KmsError(
            "bad_kms_answer", f"KMS answered without {field}", expected=kind.__name__, got=type(value).__name__
        )
    return value
