"""The administrative operations of the emulated KMS: keys, their policies, grants, aliases and replicas.

Each is a function of the key store and the call. It asks the key's policy first, and changes nothing that it refuses.
"""

from __future__ import annotations

import re
import secrets
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final

from moto.kms.models import Grant as KeptGrant

from attestation.keypolicy.answers import Grant
from emulator.kms_access import (
    Asked,
    Call,
    allowed_key,
    grant_entry,
    named_key,
    require_allowed,
    require_of_account,
    require_policy,
    require_principal,
)
from emulator.kms_keys import ENCRYPT_DECRYPT, SYMMETRIC, KeyStore, metadata, require_usable
from emulator.kms_request import KmsFault

Answer = dict[str, Any]

POLICY_NAME: Final = "default"
"""The one policy that a key has."""
DELETION_DAYS: Final = range(7, 31)
PAGE: Final = 50
"""Entries of a list that are answered at once, unless a request asks for another number."""

_ALIAS = re.compile(r"alias/(?!aws/)[a-zA-Z0-9/_-]{1,250}")
_MARKER = re.compile(r"[1-9][0-9]{0,8}")


# --- Keys ---------------------------------------------------------------------------------------------------------


def _create_key(keys: KeyStore, call: Call) -> Answer:
    request, account = call.request, call.caller.principal.account
    require_of_account(call.caller, account, call.operation)
    spec = request.get("KeySpec") or request.get("CustomerMasterKeySpec") or SYMMETRIC
    key = keys.make(
        account,
        call.caller.region,
        policy=request.get("Policy"),
        usage=request.get("KeyUsage", ENCRYPT_DECRYPT),
        spec=spec,
        description=request.get("Description", ""),
        multi_region=request.get("MultiRegion", False),
        origin=request.get("Origin", "AWS_KMS"),
    )
    if "Policy" in request:
        require_policy(call, request["Policy"], key)
    keys.add(key)
    return {"KeyMetadata": metadata(key)}


def _describe_key(keys: KeyStore, call: Call) -> Answer:
    return {"KeyMetadata": metadata(allowed_key(keys, call))}


def _list_keys(keys: KeyStore, call: Call) -> Answer:
    account = call.caller.principal.account
    entries = [{"KeyArn": key.arn, "KeyId": key.id} for key in keys.all(account, call.caller.region)]
    return _page("Keys", entries, call)


def _enable_key(keys: KeyStore, call: Call) -> Answer:
    _set_enabled(keys, call, enabled=True)
    return {}


def _disable_key(keys: KeyStore, call: Call) -> Answer:
    _set_enabled(keys, call, enabled=False)
    return {}


def _set_enabled(keys: KeyStore, call: Call, *, enabled: bool) -> None:
    key = allowed_key(keys, call)
    with keys.lock:
        if key.key_state not in ("Enabled", "Disabled"):
            require_usable(key)
        key.enabled, key.key_state = enabled, "Enabled" if enabled else "Disabled"


def _schedule_key_deletion(keys: KeyStore, call: Call) -> Answer:
    key = allowed_key(keys, call)
    days = call.request.get("PendingWindowInDays", 30)
    if days not in DELETION_DAYS:
        raise KmsFault("ValidationException", f"PendingWindowInDays is {days}, not 7 to 30")
    with keys.lock:
        if key.key_state == "PendingDeletion":
            require_usable(key)
        keys.schedule_deletion(key, days)
    entry = metadata(key)
    return {
        "KeyId": key.arn,
        "DeletionDate": entry["DeletionDate"],
        "KeyState": key.key_state,
        "PendingWindowInDays": days,
    }


def _replicate_key(keys: KeyStore, call: Call) -> Answer:
    key, region = allowed_key(keys, call), call.request["ReplicaRegion"]
    require_usable(key)
    if not key.multi_region or metadata(key)["MultiRegionConfiguration"]["MultiRegionKeyType"] != "PRIMARY":
        raise KmsFault("UnsupportedOperationException", f"{key.arn} is not a multi-Region primary key.")
    if "Policy" in call.request:
        require_policy(call, call.request["Policy"], key)
    policy, description = call.request.get("Policy"), call.request.get("Description", "")
    replica = keys.replicate(key, region, policy=policy, description=description)
    return {"ReplicaKeyMetadata": metadata(replica), "ReplicaPolicy": replica.policy}


# --- Aliases ------------------------------------------------------------------------------------------------------


def _create_alias(keys: KeyStore, call: Call) -> Answer:
    key, _ = named_key(keys, call, "TargetKeyId")
    require_allowed(Asked(call), call.operation, key)
    name = call.request["AliasName"]
    if _ALIAS.fullmatch(name) is None:
        raise KmsFault("InvalidAliasNameException", f"{name} is no name of an alias")
    keys.alias(name, key)
    return {}


def _list_aliases(keys: KeyStore, call: Call) -> Answer:
    caller = call.caller
    found = keys.all(caller.principal.account, caller.region)
    if "KeyId" in call.request:
        key, _ = named_key(keys, call)
        require_of_account(caller, key.account_id, call.operation)
        found = [key]
    entries = [
        {"AliasName": alias.alias_name, "AliasArn": alias.alias_arn, "TargetKeyId": key.id}
        for key in found
        for alias in tuple(key.aliases.values())
    ]
    return _page("Aliases", entries, call)


# --- Policies -----------------------------------------------------------------------------------------------------


def _get_key_policy(keys: KeyStore, call: Call) -> Answer:
    key = allowed_key(keys, call)
    _require_policy_name(call)
    return {"Policy": key.policy, "PolicyName": POLICY_NAME}


def _put_key_policy(keys: KeyStore, call: Call) -> Answer:
    with keys.lock:  # of two that are put at once, the second is judged by the first
        key = allowed_key(keys, call)
        _require_policy_name(call)
        require_policy(call, call.request["Policy"], key)
        key.policy = call.request["Policy"]
    return {}


def _require_policy_name(call: Call) -> None:
    if call.request.get("PolicyName", POLICY_NAME) != POLICY_NAME:
        raise KmsFault("NotFoundException", "No such policy exists")


def _list_key_policies(keys: KeyStore, call: Call) -> Answer:
    allowed_key(keys, call)
    return _page("PolicyNames", [POLICY_NAME], call)


# --- Grants -------------------------------------------------------------------------------------------------------


def _create_grant(keys: KeyStore, call: Call) -> Answer:
    request = call.request
    if "GranteePrincipal" not in request:
        raise KmsFault("ValidationException", "GranteePrincipal is missing")
    for member in request.keys() & {"GranteePrincipal", "RetiringPrincipal"}:
        require_principal(request[member])
    key, asked = named_key(keys, call)
    for_aws = {"kms:GrantIsForAWSResource": ("false",)}
    by = require_allowed(asked, call.operation, key, for_aws).by
    require_usable(key)
    if isinstance(by, Grant) and not set(request["Operations"]) <= set(by.operations):
        raise KmsFault("ValidationException", "A grant that is made by a grant cannot give more than that one does.")
    call.require_not_dry()
    members = (request.get("Name", ""), request["GranteePrincipal"], request["Operations"])
    rest = (request.get("Constraints", {}), request.get("RetiringPrincipal", ""))
    with keys.lock:
        for kept in key.grants.values():  # a name makes the same request give the same grant
            if (
                kept.name
                and (kept.name, kept.grantee_principal, kept.operations) == members
                and rest
                == (
                    kept.constraints,
                    kept.retiring_principal,
                )
            ):
                return {"GrantId": kept.id, "GrantToken": secrets.token_urlsafe(48)}
        grant = KeptGrant(key.id, *members, *rest)
        grant.id = secrets.token_hex(32)
        key.grants = {**key.grants, grant.id: grant}
    return {"GrantId": grant.id, "GrantToken": secrets.token_urlsafe(48)}


def _list_grants(keys: KeyStore, call: Call) -> Answer:
    key, request = allowed_key(keys, call), call.request
    entries = [
        {**grant_entry(grant), "KeyId": key.arn, "IssuingAccount": f"arn:aws:iam::{key.account_id}:root"}
        for grant in key.grants.values()
        if request.get("GrantId", grant.id) == grant.id
        and request.get("GranteePrincipal", grant.grantee_principal) == grant.grantee_principal
    ]
    return _page("Grants", entries, call)


def _revoke_grant(keys: KeyStore, call: Call) -> Answer:
    key = allowed_key(keys, call)
    call.require_not_dry()
    with keys.lock:
        if (grant_id := call.request["GrantId"]) not in key.grants:
            raise KmsFault("NotFoundException", f"Grant ID {grant_id} not found")
        key.grants = {name: grant for name, grant in key.grants.items() if name != grant_id}
    return {}


def _page(name: str, entries: Sequence[object], call: Call) -> Answer:
    """A part of a list, and where the next begins: whoever takes the first part for all of it sees too little."""
    marker = call.request.get("Marker", "0")
    if marker != "0" and _MARKER.fullmatch(marker) is None:
        raise KmsFault("InvalidMarkerException", "The marker is not one that was answered")
    start = int(marker)
    end = start + call.request.get("Limit", PAGE)
    answer: Answer = {name: list(entries[start:end]), "Truncated": end < len(entries)}
    return answer | ({"NextMarker": str(end)} if end < len(entries) else {})


ADMINISTRATION: Final[Mapping[str, Callable[[KeyStore, Call], Answer]]] = {
    "CreateAlias": _create_alias,
    "CreateGrant": _create_grant,
    "CreateKey": _create_key,
    "DescribeKey": _describe_key,
    "DisableKey": _disable_key,
    "EnableKey": _enable_key,
    "GetKeyPolicy": _get_key_policy,
    "ListAliases": _list_aliases,
    "ListGrants": _list_grants,
    "ListKeyPolicies": _list_key_policies,
    "ListKeys": _list_keys,
    "PutKeyPolicy": _put_key_policy,
    "ReplicateKey": _replicate_key,
    "RevokeGrant": _revoke_grant,
    "ScheduleKeyDeletion": _schedule_key_deletion,
}
