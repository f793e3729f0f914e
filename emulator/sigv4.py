"""AWS Signature Version 4 as a service checks it, and the directory of those who may sign.

The signature is computed here from the bytes that arrived and from nothing that a client's library says, so that a
client which signs wrongly is refused here as it would be by AWS. Codes and texts are AWS's.
"""

from __future__ import annotations

import hashlib
import hmac
import re
import secrets
import threading
from collections.abc import Container, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Final

from attestation.secret import Secret
from emulator.https import HttpRequest
from emulator.kms_request import KmsFault

ALGORITHM: Final = "AWS4-HMAC-SHA256"
SERVICE: Final = "kms"
MAX_SKEW: Final = timedelta(minutes=5)
"""How far a request's time may be from the service's, either way."""

_AUTHORIZATION = re.compile(
    rf"{ALGORITHM} Credential=(?P<key>[A-Z0-9]{{16,128}})/(?P<scope>(?P<date>\d{{8}})/(?P<region>[a-z0-9-]{{1,32}})"
    r"/(?P<service>[a-z0-9-]{1,32})/aws4_request), ?SignedHeaders=(?P<headers>[a-z0-9;_-]{1,2048}),"
    r" ?Signature=(?P<signature>[0-9a-f]{64})",
    re.ASCII,
)
_TIME: Final = "%Y%m%dT%H%M%SZ"
_ARN = re.compile(
    r"arn:(?P<partition>aws|aws-cn|aws-us-gov):(?P<service>iam|sts)::(?P<account>\d{12}):"
    r"(?P<resource>root|user/[\w+=,.@/-]+|role/[\w+=,.@/-]+|assumed-role/(?P<role>[\w+=,.@-]+)/[\w+=,.@-]+)",
    re.ASCII,
)
_BASE32: Final = "ABCDEFGHIJKLMNOPQRSTUVWXYZ234567"


@dataclass(frozen=True, slots=True)
class Principal:
    """Someone who signs, with what they sign with. A role's credentials have a token and end; a user's have neither."""

    arn: str
    """``arn:aws:iam::ACCOUNT:root``, ``:user/NAME``, or ``arn:aws:sts::ACCOUNT:assumed-role/ROLE/SESSION``."""
    access_key: str
    secret: Secret
    token: Secret | None = None
    expires: datetime | None = None

    @property
    def account(self) -> str:
        return self.arn.split(":")[4]


class Directory:
    """The principals that the emulator knows. Safe to use from several threads."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._principals: dict[str, Principal] = {}

    def add(self, arn: str, *, expires: datetime | None = None) -> Principal:
        """Fresh credentials for ``arn``; with a session token when they expire (or are an assumed role's).

        Raises ValueError for what is no principal that signs: a role itself does not, its sessions do.
        """
        match = _ARN.fullmatch(arn)
        if match is None or match["resource"].startswith("role/") or (match["service"] == "sts") != bool(match["role"]):
            raise ValueError(f"no principal that signs: {arn}; expected a root, a user or an assumed role")
        if expires is None and match["role"]:
            raise ValueError(f"the credentials of an assumed role expire: say when for {arn}")
        name = "".join(secrets.choice(_BASE32) for _ in range(16))
        principal = Principal(
            arn,
            ("AKIA" if expires is None else "ASIA") + name,
            Secret(secrets.token_urlsafe(30).encode("ascii")),
            None if expires is None else Secret(secrets.token_urlsafe(180).encode("ascii")),
            expires,
        )
        with self._lock:
            self._principals[principal.access_key] = principal
        return principal

    def remove(self, access_key: str) -> None:
        """As when an access key is deleted. Raises KeyError."""
        with self._lock:
            del self._principals[access_key]

    def find(self, access_key: str) -> Principal | None:
        with self._lock:
            return self._principals.get(access_key)


@dataclass(frozen=True, slots=True)
class Caller:
    """Whose signature was good, and for which region."""

    principal: Principal
    region: str


def authenticate(request: HttpRequest, directory: Directory, *, regions: Container[str], now: datetime) -> Caller:
    """Whoever signed ``request``, at most :data:`MAX_SKEW` from ``now``. Raises KmsFault with AWS's codes."""
    authorization = request.header("authorization")
    if authorization is None:
        raise KmsFault("MissingAuthenticationTokenException", "Missing Authentication Token")
    match = _AUTHORIZATION.fullmatch(authorization)
    if match is None:
        raise KmsFault(
            "IncompleteSignatureException",
            "Authorization header requires 'Credential' parameter. Authorization header requires 'Signature' parameter."
            " Authorization header requires 'SignedHeaders' parameter.",
        )
    stamp = request.header("x-amz-date")
    time = None if stamp is None else _time(stamp)
    if stamp is None or time is None:
        raise KmsFault("IncompleteSignatureException", "Authorization header requires existence of 'X-Amz-Date'.")
    if match["service"] != SERVICE:
        raise KmsFault("InvalidSignatureException", f"Credential should be scoped to correct service: '{SERVICE}'.")
    if match["region"] not in regions:
        raise KmsFault(
            "InvalidSignatureException", f"Credential should be scoped to a valid region, not '{match['region']}'."
        )
    if match["date"] != stamp[:8]:
        raise KmsFault(
            "InvalidSignatureException",
            f"Date in Credential scope does not match YYYYMMDD from ISO-8601 version of date from HTTP: "
            f"'{match['date']}' != '{stamp[:8]}', from '{stamp}'.",
        )
    _require_near(time, now)
    names = match["headers"].split(";")
    _require_signed(request, names)
    principal = directory.find(match["key"])
    if principal is None:
        raise _unrecognised()
    expected = _signature(principal.secret, match["date"], match["region"], stamp, match["scope"], request, names)
    if not hmac.compare_digest(expected, match["signature"]):
        raise KmsFault(
            "InvalidSignatureException",
            "The request signature we calculated does not match the signature you provided. Check your AWS Secret"
            " Access Key and signing method. Consult the service documentation for details.",
        )
    token = request.header("x-amz-security-token")
    if Secret((token or "").encode("utf-8")) != (principal.token or Secret(b"")):
        raise _unrecognised()
    if principal.expires is not None and now >= principal.expires:
        raise KmsFault("ExpiredTokenException", "The security token included in the request is expired")
    return Caller(principal, match["region"])


def _unrecognised() -> KmsFault:
    return KmsFault("UnrecognizedClientException", "The security token included in the request is invalid.")


def _time(stamp: str) -> datetime | None:
    try:
        return datetime.strptime(stamp, _TIME).replace(tzinfo=UTC)
    except ValueError:
        return None


def _require_near(time: datetime, now: datetime) -> None:
    minutes = MAX_SKEW // timedelta(minutes=1)
    if time < now - MAX_SKEW:
        limit = f"{now - MAX_SKEW:{_TIME}} ({now:{_TIME}} - {minutes} min.)"
        raise KmsFault("InvalidSignatureException", f"Signature expired: {time:{_TIME}} is now earlier than {limit}")
    if time > now + MAX_SKEW:
        limit = f"{now + MAX_SKEW:{_TIME}} ({now:{_TIME}} + {minutes} min.)"
        raise KmsFault(
            "InvalidSignatureException", f"Signature not yet current: {time:{_TIME}} is still later than {limit}"
        )


def _require_signed(request: HttpRequest, names: Sequence[str]) -> None:
    """The host and every ``x-amz-`` header are signed, so that none of them is somebody else's."""
    present = {name.lower() for name, _ in request.headers}
    for name in sorted({"host"} | {name for name in present if name.startswith("x-amz-")}):
        if name not in names:
            raise KmsFault("InvalidSignatureException", f"'{name}' must be a 'SignedHeader' in the AWS Authorization.")
    if names != sorted(set(names)) or not present.issuperset(names):
        raise KmsFault("IncompleteSignatureException", "SignedHeaders must name headers of the request, in order.")


def _signature(
    secret: Secret, date: str, region: str, stamp: str, scope: str, request: HttpRequest, names: Sequence[str]
) -> str:
    # The four steps of "Create a signed AWS API request". A query is no part of any request to KMS, and is refused
    # before this; the path is always "/".
    headers = "".join(f"{name}:{request.header(name)}\n" for name in names)
    canonical = "\n".join(
        (request.method, request.target, "", headers, ";".join(names), hashlib.sha256(request.body).hexdigest())
    )
    to_sign = "\n".join((ALGORITHM, stamp, scope, hashlib.sha256(canonical.encode("utf-8")).hexdigest()))
    key = b"AWS4" + secret.expose()
    for part in (date, region, SERVICE, "aws4_request"):
        key = hmac.digest(key, part.encode("ascii"), "sha256")
    return hmac.digest(key, to_sign.encode("utf-8"), "sha256").hex()
