"""What KMS answers about a key beside its policy: its grants and its metadata.

Sources: KMS's API reference for ListGrants (GrantListEntry, GrantConstraints) and DescribeKey (KeyMetadata).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from types import MappingProxyType
from typing import TypeVar

from attestation.keypolicy.document import KeyArn, KeyPolicyError

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class GrantConstraints:
    """What must hold for a grant to count, each None where nothing was asked for. The names of an encryption context
    are compared without regard to case here, its values with it (API reference, GrantConstraints).
    """

    encryption_context_equals: Mapping[str, str] | None = None
    """A request's encryption context must be this."""
    encryption_context_subset: Mapping[str, str] | None = None
    """A request's encryption context must have these pairs, and may have more."""
    source_arn: str | None = None
    """The request must come on behalf of this resource: ``aws:SourceArn``."""

    def __post_init__(self) -> None:
        for name in ("encryption_context_equals", "encryption_context_subset"):
            if (pairs := getattr(self, name)) is not None:
                object.__setattr__(self, name, MappingProxyType(dict(pairs)))


@dataclass(frozen=True, slots=True)
class Grant:
    """One grant on a key: permission beside the key policy, which no condition of an Allow in that policy limits
    (API reference, GrantListEntry).
    """

    grant_id: str
    """By which it is revoked."""
    grantee_principal: str
    """An ARN, or the name of an AWS service."""
    retiring_principal: str | None
    """The same, for who may end it. None: nobody is named."""
    operations: tuple[str, ...]
    """Names of operations, without ``kms:``."""
    constraints: GrantConstraints
    """What a request must have for it to count."""
    name: str | None = None
    """Given by whoever made it, for people. None: it has none."""

    @classmethod
    def from_api(cls, entry: Mapping[str, object]) -> Grant:
        """Reads one of the ``Grants`` that ListGrants answers. Raises KeyPolicyError with ``malformed_key_answer``;
        also for a kind of constraint that is not known here, as nobody could say what the grant allows.
        """
        grant = _Answer(entry, "Grant")
        service, retiring = grant.optional("GranteeServicePrincipal", str), grant.optional("RetiringPrincipal", str)
        constraints = _Answer(grant.optional("Constraints", dict) or {}, "Grant.Constraints")
        constraints.require_known({"EncryptionContextEquals", "EncryptionContextSubset", "SourceArn"})
        return cls(
            grant_id=grant.required("GrantId", str),
            grantee_principal=service or grant.required("GranteePrincipal", str),
            retiring_principal=retiring or grant.optional("RetiringServicePrincipal", str),
            operations=grant.texts("Operations"),
            constraints=GrantConstraints(
                encryption_context_equals=constraints.pairs("EncryptionContextEquals"),
                encryption_context_subset=constraints.pairs("EncryptionContextSubset"),
                source_arn=constraints.optional("SourceArn", str),
            ),
            name=grant.optional("Name", str),
        )


@dataclass(frozen=True, slots=True)
class KeyMetadata:
    """What DescribeKey says of a key, in KMS's own words (API reference, KeyMetadata)."""

    arn: KeyArn
    """Which key it is."""
    enabled: bool
    """Whether it can be used; ``state`` says the same in one of its words."""
    state: str
    """``Enabled``, ``Disabled``, ``PendingDeletion`` and so on."""
    usage: str
    """``ENCRYPT_DECRYPT`` for a key that data keys are wrapped under."""
    spec: str
    """The kind of key material: ``SYMMETRIC_DEFAULT`` is AES-256-GCM."""
    origin: str
    """Where the key material is from; ``AWS_KMS`` never left KMS."""
    manager: str
    """``CUSTOMER``, or ``AWS`` for keys whose policy nobody can change."""
    multi_region: bool
    """Whether other regions may have a key with the same key material."""
    primary: KeyArn | None = None
    """Of a multi-Region key."""
    replicas: tuple[KeyArn, ...] = ()
    """The other keys with the same key material, each with a policy of its own."""
    deletion_date: datetime | None = None
    """With its time zone."""

    @property
    def account(self) -> str:
        return self.arn.account

    @property
    def region(self) -> str:
        return self.arn.region

    @classmethod
    def from_api(cls, answer: Mapping[str, object]) -> KeyMetadata:
        """Reads the answer of DescribeKey. Raises KeyPolicyError with ``malformed_key_answer``, or ``bad_key_arn``."""
        key = _Answer(_Answer(answer, "DescribeKey").required("KeyMetadata", dict), "KeyMetadata")
        copies = _Answer(key.optional("MultiRegionConfiguration", dict) or {}, "MultiRegionConfiguration")
        primary = copies.optional("PrimaryKey", dict)
        replicas = (_Answer(each, "ReplicaKeys") for each in copies.optional("ReplicaKeys", list) or [])
        arn = KeyArn.parse(key.required("Arn", str))
        if key.required("AWSAccountId", str) != arn.account:
            raise KeyPolicyError("malformed_key_answer", "KeyMetadata: AWSAccountId and Arn name two accounts")
        deletion_date = key.optional("DeletionDate", datetime)
        if deletion_date is not None and deletion_date.tzinfo is None:
            raise KeyPolicyError("malformed_key_answer", "KeyMetadata.DeletionDate: a time without a time zone")
        return cls(
            arn=arn,
            enabled=key.required("Enabled", bool),
            state=key.required("KeyState", str),
            usage=key.required("KeyUsage", str),
            spec=key.optional("KeySpec", str) or key.required("CustomerMasterKeySpec", str),
            origin=key.required("Origin", str),
            manager=key.required("KeyManager", str),
            multi_region=key.required("MultiRegion", bool),
            primary=None if primary is None else KeyArn.parse(_Answer(primary, "PrimaryKey").required("Arn", str)),
            replicas=tuple(KeyArn.parse(replica.required("Arn", str)) for replica in replicas),
            deletion_date=deletion_date,
        )


class _Answer:
    """A structure of an API's answer as the SDK hands it over."""

    def __init__(self, value: object, path: str) -> None:
        if not isinstance(value, Mapping):
            raise KeyPolicyError("malformed_key_answer", f"{path}: not a structure", got=type(value).__name__)
        self._value: Mapping[str, object] = value
        self._path = path

    def require_known(self, known: set[str]) -> None:
        if unknown := {*self._value} - known:
            raise KeyPolicyError(
                "malformed_key_answer",
                f"{self._path}: a field that is not known",
                expected=" ".join(sorted(known)),
                got=ascii(min(unknown)[:100]),
            )

    def optional(self, name: str, kind: type[T]) -> T | None:
        value = self._value.get(name)
        if value is None or isinstance(value, kind):
            return value
        raise KeyPolicyError(
            "malformed_key_answer", f"{self._path}.{name}", expected=kind.__name__, got=type(value).__name__
        )

    def required(self, name: str, kind: type[T]) -> T:
        value = self.optional(name, kind)
        if value is None:
            raise KeyPolicyError("malformed_key_answer", f"{self._path}.{name}", expected=kind.__name__, got="none")
        return value

    def texts(self, name: str) -> tuple[str, ...]:
        return tuple(self._text(each, name) for each in self.required(name, list))

    def pairs(self, name: str) -> Mapping[str, str] | None:
        pairs = self.optional(name, dict)
        if pairs is None:
            return None
        return {self._text(key, name): self._text(value, name) for key, value in pairs.items()}

    def _text(self, value: object, name: str) -> str:
        if not isinstance(value, str):
            raise KeyPolicyError(
                "malformed_key_answer", f"{self._path}.{name}", expected="texts", got=type(value).__name__
            )
        return value
