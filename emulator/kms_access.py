"""Who may do what with a key: key policies and grants, evaluated as KMS does.

There are no IAM policies here. Where a key policy leaves a decision to them (its statement for the account's root), the
account's root principal alone is allowed; and operations that no key policy governs are every principal's of the
account.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from typing import Any, Final

from moto.kms.models import Grant as KeptGrant
from moto.kms.models import Key

from attestation.keypolicy.answers import Grant
from attestation.keypolicy.conditions import Context
from attestation.keypolicy.decision import Decision, Request, decide, encryption_context, recipient_context
from attestation.keypolicy.document import KeyArn, KeyPolicy, KeyPolicyError, PrincipalKind, Statement
from emulator.kms_keys import KeyStore
from emulator.kms_request import KmsFault
from emulator.recipient import Recipient
from emulator.sigv4 import Caller

_PRINCIPAL: Final = re.compile(
    r"\*|\d{12}|arn:aws[a-z-]*:(?:iam::\d{12}:(?:root|user/[\w+=,.@/-]+|role/[\w+=,.@/-]+)"
    r"|sts::\d{12}:(?:assumed-role/[\w+=,.@-]+/[\w+=,.@-]+|federated-user/[\w+=,.@-]+))",
    re.ASCII,
)
_REQUEST_KEYS: Final = {
    "KeyPairSpec": "kms:DataKeyPairSpec",
    "SigningAlgorithm": "kms:SigningAlgorithm",
    "MessageType": "kms:MessageType",
    "EncryptionAlgorithm": "kms:EncryptionAlgorithm",
    "ReplicaRegion": "kms:ReplicaRegion",
    "BypassPolicyLockoutSafetyCheck": "kms:BypassPolicyLockoutSafetyCheck",
    "PendingWindowInDays": "kms:ScheduleKeyDeletionPendingWindowInDays",
    "GranteePrincipal": "kms:GranteePrincipal",
    "RetiringPrincipal": "kms:RetiringPrincipal",
    "Operations": "kms:GrantOperations",
}
"""Members of a request, and the condition keys that have their values."""


@dataclass(frozen=True, slots=True)
class Call:
    """One request on its way through its operation."""

    operation: str
    request: Mapping[str, Any]
    """As :func:`emulator.kms_request.read_request` gives it."""
    caller: Caller
    now: datetime
    recipient: Recipient | None = None

    @property
    def encryption_context(self) -> Mapping[str, str]:
        context: Mapping[str, str] = self.request.get("EncryptionContext", {})
        return context

    def require_not_dry(self) -> None:
        """Before what cannot be taken back; an operation that changes nothing is run dry by being run. Raises
        KmsFault.
        """
        if self.request.get("DryRun"):
            raise KmsFault(
                "DryRunOperationException", "The request would have succeeded, but the DryRun option is set."
            )


@dataclass(frozen=True, slots=True)
class Asked:
    """What a call asks of one key, as far as conditions go."""

    call: Call
    alias: str | None = None
    """By which the call names the key, if it does."""
    encryption_context: Mapping[str, str] | None = None


def named_key(keys: KeyStore, call: Call, member: str = "KeyId") -> tuple[Key, Asked]:
    """The key that a member of the request names, of which nothing is allowed yet. Raises KmsFault."""
    named = keys.find(call.request[member], account=call.caller.principal.account, region=call.caller.region)
    return named.key, Asked(call, named.alias, call.request.get("EncryptionContext"))


def allowed_key(keys: KeyStore, call: Call) -> Key:
    """The key that ``KeyId`` names, whose policy or grants allow the operation. Raises KmsFault."""
    key, asked = named_key(keys, call)
    require_allowed(asked, call.operation, key)
    return key


def require_allowed(asked: Asked, action: str, key: Key, extra: Context | None = None) -> Decision:
    """That ``key``'s policy or one of its grants allows ``kms:action``. Raises KmsFault ``AccessDeniedException``."""
    grants = tuple(Grant.from_api(grant_entry(grant)) for grant in key.grants.values())
    policy, request = KeyPolicy.parse(key.policy), _request(asked, action, key, extra)
    decision = decide(policy, grants, request)
    if decision.allowed:
        return decision
    if isinstance(decision.by, Statement):
        why = "with an explicit deny in a resource-based policy"
    elif _is_left_to_iam(policy, request, asked.call.caller):
        why = f"because no identity-based policy allows the kms:{action} action"
    else:
        why = f"because no resource-based policy allows the kms:{action} action"
    raise KmsFault(
        "AccessDeniedException",
        f"User: {request.principal_arn} is not authorized to perform: kms:{action} on resource: {key.arn} {why}",
    )


def _is_left_to_iam(policy: KeyPolicy, request: Request, caller: Caller) -> bool:
    """Whether the caller's account is allowed what the caller is not."""
    root = f"arn:{request.resource.partition}:iam::{caller.principal.account}:root"
    return decide(policy, (), replace(request, principal_arn=root)).allowed


def require_of_account(caller: Caller, account: str, action: str) -> None:
    """For operations without a key: that the caller is a principal of the account. Raises KmsFault."""
    if caller.principal.account != account:
        raise KmsFault(
            "AccessDeniedException",
            f"User: {caller.principal.arn} is not authorized to perform: kms:{action}"
            f" because no identity-based policy allows the kms:{action} action",
        )


def require_policy(call: Call, text: str, key: Key) -> None:
    """That ``text`` may become ``key``'s policy: it can be read, its principals can be, and whoever puts it may put
    another one later, unless the request bypasses that check. Raises KmsFault ``MalformedPolicyDocumentException``.
    """
    try:
        policy = KeyPolicy.parse(text)
    except KeyPolicyError as error:
        code = "LimitExceededException" if error.code == "policy_too_large" else "MalformedPolicyDocumentException"
        raise KmsFault(code, str(error)) from error
    for statement in policy.statements:
        for principal in (*statement.principals, *statement.not_principals):
            if principal.kind is PrincipalKind.AWS and _PRINCIPAL.fullmatch(principal.value) is None:
                raise KmsFault(
                    "MalformedPolicyDocumentException",
                    "Policy contains a statement with one or more invalid principals.",
                )
    if call.request.get("BypassPolicyLockoutSafetyCheck"):
        return
    if not decide(policy, (), _request(Asked(call), "PutKeyPolicy", key, None)).allowed:
        raise KmsFault(
            "MalformedPolicyDocumentException",
            "The new key policy will not allow you to update the key policy in the future.",
        )


def require_principal(arn: str) -> None:
    """That a grant may name it. Raises KmsFault ``InvalidArnException``."""
    if not arn.startswith("arn:") or _PRINCIPAL.fullmatch(arn) is None:
        raise KmsFault("InvalidArnException", f"ARN does not refer to a valid principal: {arn}")


def grant_entry(grant: KeptGrant) -> dict[str, Any]:
    """An entry of ListGrants."""
    return {name: value for name, value in grant.to_json().items() if value not in (None, "")}


def _request(asked: Asked, action: str, key: Key, extra: Context | None) -> Request:
    context = {**_about_caller(asked.call), **_about_key(key), **_about_request(asked), **(extra or {})}
    return Request(asked.call.caller.principal.arn, f"kms:{action}", KeyArn.parse(key.arn), context)


def _about_caller(call: Call) -> Context:
    kinds = {"root": "Account", "user": "User", "assumed-role": "AssumedRole"}
    kind = call.caller.principal.arn.split(":", 5)[5].partition("/")[0]
    return {
        "aws:PrincipalType": (kinds[kind],),
        "aws:SecureTransport": ("true",),
        "aws:RequestedRegion": (call.caller.region,),
        "aws:CurrentTime": (f"{call.now.astimezone(UTC):%Y-%m-%dT%H:%M:%SZ}",),
        "aws:EpochTime": (str(int(call.now.timestamp())),),
    }


def _about_key(key: Key) -> Context:
    context: dict[str, tuple[str, ...]] = {
        "aws:ResourceAccount": (key.account_id,),
        "kms:KeySpec": (key.key_spec,),
        "kms:KeyUsage": (key.key_usage,),
        "kms:KeyOrigin": (key.origin,),
        "kms:MultiRegion": (_text(bool(key.multi_region)),),
    }
    if key.multi_region:
        primary = key.multi_region_configuration["PrimaryKey"]
        context["kms:MultiRegionKeyType"] = ("PRIMARY" if primary["Arn"] == key.arn else "REPLICA",)
        context["kms:PrimaryRegion"] = (primary["Region"],)
    if aliases := tuple(key.aliases):
        context["kms:ResourceAliases"] = aliases
    return context


def _about_request(asked: Asked) -> Context:
    context: dict[str, tuple[str, ...]] = {}
    for member, name in _REQUEST_KEYS.items():
        if (value := asked.call.request.get(member)) is not None:
            context[name] = tuple(value) if isinstance(value, list) else (_text(value),)
    if constraints := asked.call.request.get("Constraints"):
        context["kms:GrantConstraintType"] = tuple(constraints)
    if asked.alias is not None:
        context["kms:RequestAlias"] = (asked.alias,)
    if asked.encryption_context:
        context |= encryption_context(asked.encryption_context)
    if asked.call.recipient is not None:
        context |= recipient_context(asked.call.recipient.pcrs)
    return context


def _text(value: object) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)
