"""What each operation of KMS can do to what a key protects.

The operations are those of AWS's Service Authorization Reference for KMS. A permission is called ``kms:`` and the
operation's name, except that ReEncrypt needs two.
"""

from __future__ import annotations

from enum import Enum
from functools import lru_cache
from typing import Final

from attestation.keypolicy.conditions import Truth, matches
from attestation.keypolicy.document import Statement

PREFIX: Final = "kms:"


class Power(Enum):
    """The worst that a permission lets its holder do."""

    OPENS = "gives out what somebody has encrypted under the key"
    CHANGES = "decides to whom the key opens later, or hands out the key itself"
    COPIES = "decides in which regions the key is, and which of them leads"
    SEALS = "encrypts under the key, and opens nothing"
    DESTROYS = "ends the key's service, for now or for ever"
    MANAGES = "keeps the key: tags, aliases, rotation, fewer grants"
    READS = "tells about the key"
    SIGNS = "signs or authenticates, for which a key that encrypts is of no use"
    ELSEWHERE = "is not about a key, so that no key policy is asked"


_OPERATIONS: Final = {
    Power.OPENS: "Decapsulate Decrypt DeriveSharedSecret ReEncryptFrom",
    Power.CHANGES: "CreateGrant ImportKeyMaterial PutKeyPolicy ReplicateKey",
    Power.COPIES: "SynchronizeMultiRegionKey UpdatePrimaryRegion",
    Power.SEALS: "Encapsulate Encrypt GenerateDataKey GenerateDataKeyPair GenerateDataKeyPairWithoutPlaintext"
    " GenerateDataKeyWithoutPlaintext ReEncryptTo",
    Power.DESTROYS: "DeleteImportedKeyMaterial DisableKey ScheduleKeyDeletion",
    Power.MANAGES: "CancelKeyDeletion CreateAlias DeleteAlias DisableKeyRotation EnableKey EnableKeyRotation"
    " GetParametersForImport RetireGrant RevokeGrant RotateKeyOnDemand TagResource UntagResource UpdateAlias"
    " UpdateKeyDescription",
    Power.READS: "DescribeKey GetKeyLastUsage GetKeyPolicy GetKeyRotationStatus GetPublicKey ListGrants ListKeyPolicies"
    " ListKeyRotations ListResourceTags",
    Power.SIGNS: "GenerateMac Sign Verify VerifyMac",
    Power.ELSEWHERE: "ConnectCustomKeyStore CreateCustomKeyStore CreateKey DeleteCustomKeyStore DescribeCustomKeyStores"
    " DisconnectCustomKeyStore GenerateRandom ListAliases ListKeys ListRetirableGrants UpdateCustomKeyStore",
}

POWERS: Final = {
    f"{PREFIX}{operation}": power for power, operations in _OPERATIONS.items() for operation in operations.split()
}
"""Every permission, as AWS writes it, with what it gives. One that is not here may give anything."""

WITH_OTHER_KEYS: Final = frozenset(
    {action for action, power in POWERS.items() if power is Power.SIGNS}
    | {f"{PREFIX}Decapsulate", f"{PREFIX}DeriveSharedSecret", f"{PREFIX}Encapsulate", f"{PREFIX}GetPublicKey"}
)
"""Those that do nothing with a symmetric key for encryption."""


@lru_cache(maxsize=4096)
def matching(pattern: str) -> frozenset[str]:
    """The permissions that ``pattern`` covers; actions are compared without regard to case."""
    return frozenset(action for action in POWERS if matches(pattern.lower(), action.lower()) is Truth.YES)


def covered(statement: Statement) -> tuple[frozenset[str], frozenset[str]]:
    """The permissions that a statement is about, and those of its actions that are not known and so may be anything."""
    known = frozenset[str]().union(*map(matching, statement.actions or statement.not_actions))
    if statement.not_actions:
        return frozenset(POWERS) - known, frozenset()
    return known, frozenset(pattern for pattern in statement.actions if not matching(pattern))
