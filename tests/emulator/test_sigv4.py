"""Signature Version 4 as the emulator checks it, against botocore's signer."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from unittest import mock

import pytest
from botocore.auth import SigV4Auth
from botocore.awsrequest import AWSRequest
from botocore.credentials import Credentials

from attestation.secret import Secret
from emulator.https import HttpRequest
from emulator.kms_request import KmsFault
from emulator.sigv4 import MAX_SKEW, Caller, Directory, Principal, authenticate

NOW = datetime(2026, 3, 1, 12, 0, tzinfo=UTC)
REGIONS = frozenset(["us-east-1"])
BODY = b'{"NumberOfBytes": 32}'
ROOT = "arn:aws:iam::111122223333:root"
SESSION = "arn:aws:sts::111122223333:assumed-role/enclave/i-1"


@pytest.fixture
def directory() -> Directory:
    return Directory()


def signed(
    principal: Principal, *, at: datetime = NOW, region: str = "us-east-1", service: str = "kms", body: bytes = BODY
) -> HttpRequest:
    """As botocore signs a request at a time."""
    token = None if principal.token is None else principal.token.expose().decode()
    credentials = Credentials(principal.access_key, principal.secret.expose().decode(), token)
    headers = {"X-Amz-Target": "TrentService.GenerateRandom", "Content-Type": "application/x-amz-json-1.1"}
    request = AWSRequest("POST", "https://localhost:8443/", headers=headers, data=body)
    with mock.patch("botocore.auth.get_current_datetime", return_value=at.replace(tzinfo=None)):
        SigV4Auth(credentials, service, region).add_auth(request)
    return HttpRequest("POST", "/", [("Host", "localhost:8443"), *request.headers.items()], body)


def check(request: HttpRequest, directory: Directory, now: datetime = NOW) -> Caller:
    return authenticate(request, directory, regions=REGIONS, now=now)


def refused(request: HttpRequest, directory: Directory, code: str, text: str = "", now: datetime = NOW) -> None:
    with pytest.raises(KmsFault) as caught:
        check(request, directory, now)
    assert caught.value.code == code, caught.value
    assert text in caught.value.message


@pytest.mark.parametrize("arn", [ROOT, "arn:aws:iam::111122223333:user/path/alice", SESSION])
def test_who_signed(directory: Directory, arn: str) -> None:
    expires = NOW + timedelta(hours=1) if arn == SESSION else None
    principal = directory.add(arn, expires=expires)
    caller = check(signed(principal), directory)
    assert (caller.principal, caller.region, caller.principal.account) == (principal, "us-east-1", "111122223333")
    assert principal.access_key.startswith("ASIA" if expires else "AKIA")
    for secret in (principal.secret, principal.token):
        assert secret is None or secret.expose().decode() not in repr(principal)


@pytest.mark.parametrize(
    "arn",
    [
        "",
        "root",
        "arn:aws:iam::111122223333:role/enclave",
        "arn:aws:sts::111122223333:root",
        "arn:aws:iam::111122223333:assumed-role/enclave/i-1",
        "arn:aws:iam::1111:root",
    ],
)
def test_who_does_not_sign(directory: Directory, arn: str) -> None:
    with pytest.raises(ValueError, match="no principal that signs"):
        directory.add(arn, expires=NOW)


def test_a_roles_credentials_end(directory: Directory) -> None:
    with pytest.raises(ValueError, match="expire"):
        directory.add(SESSION)


def changed(request: HttpRequest, name: str, value: str | None) -> HttpRequest:
    headers = [(key, each) for key, each in request.headers if key.lower() != name]
    return replace(request, headers=headers if value is None else [*headers, (name, value)])


ALTERED = "The request signature we calculated does not match"


@pytest.mark.parametrize(
    "alter",
    [
        lambda request: replace(request, body=BODY + b" "),
        lambda request: replace(request, method="PUT"),
        lambda request: replace(request, target="/other"),
        lambda request: changed(request, "x-amz-target", "TrentService.Decrypt"),
        lambda request: changed(request, "host", "kms.us-east-1.amazonaws.com"),
        lambda request: replace(request, headers=[*request.headers, ("Host", "other")]),
    ],
)
def test_nothing_can_be_altered(directory: Directory, alter: Callable[[HttpRequest], HttpRequest]) -> None:
    refused(alter(signed(directory.add(ROOT))), directory, "InvalidSignatureException", ALTERED)


def test_another_secret(directory: Directory) -> None:
    forged = replace(directory.add(ROOT), secret=Secret(b"guessed"))
    refused(signed(forged), directory, "InvalidSignatureException", ALTERED)


def test_a_key_that_is_not_there(directory: Directory) -> None:
    principal = directory.add(ROOT)
    directory.remove(principal.access_key)
    refused(signed(principal), directory, "UnrecognizedClientException", "security token")


def test_the_token_belongs_to_the_credentials(directory: Directory) -> None:
    session, other = (directory.add(SESSION, expires=NOW + timedelta(hours=1)) for _ in range(2))
    user = directory.add(ROOT)
    for principal, token in ((session, other.token), (session, None), (user, session.token)):
        refused(signed(replace(principal, token=token)), directory, "UnrecognizedClientException")


@pytest.mark.parametrize(("seconds", "is_good"), [(1, True), (0, False), (-1, False)])
def test_the_end_of_a_session(directory: Directory, seconds: int, is_good: bool) -> None:
    request = signed(directory.add(SESSION, expires=NOW + timedelta(seconds=seconds)))
    if is_good:
        check(request, directory)
    else:
        refused(request, directory, "ExpiredTokenException", "is expired")


@pytest.mark.parametrize(
    ("off", "text"),
    [
        (timedelta(0), None),
        (MAX_SKEW, None),
        (-MAX_SKEW, None),
        (MAX_SKEW + timedelta(seconds=1), "Signature expired: 20260301T115459Z is now earlier than 20260301T115500Z"),
        (
            -MAX_SKEW - timedelta(seconds=1),
            "Signature not yet current: 20260301T120501Z is still later than 20260301T1205",
        ),
        (timedelta(hours=7), "(20260301T120000Z - 5 min.)"),
        (timedelta(hours=-7), "(20260301T120000Z + 5 min.)"),
    ],
)
def test_a_clock_that_is_off(directory: Directory, off: timedelta, text: str | None) -> None:
    request = signed(directory.add(ROOT), at=NOW - off)
    if text is None:
        check(request, directory)
    else:
        refused(request, directory, "InvalidSignatureException", text)


def test_the_scope(directory: Directory) -> None:
    principal = directory.add(ROOT)
    refused(signed(principal, region="eu-west-1"), directory, "InvalidSignatureException", "valid region")
    refused(signed(principal, service="s3"), directory, "InvalidSignatureException", "correct service: 'kms'")
    request = signed(principal)
    authorization = request.header("authorization") or ""
    other = changed(request, "authorization", authorization.replace("/20260301/", "/20260302/"))
    refused(other, directory, "InvalidSignatureException", "Date in Credential scope")


@pytest.mark.parametrize("name", ["host", "x-amz-date", "x-amz-target"])
def test_what_must_be_signed(directory: Directory, name: str) -> None:
    request = signed(directory.add(ROOT))
    authorization = request.header("authorization") or ""
    assert name in authorization
    without = authorization.replace(f"{name};", "").replace(f";{name}", "")
    refused(changed(request, "authorization", without), directory, "InvalidSignatureException", f"'{name}' must be")


@pytest.mark.parametrize(
    ("name", "value", "code"),
    [
        ("authorization", None, "MissingAuthenticationTokenException"),
        ("authorization", "", "IncompleteSignatureException"),
        ("authorization", "Bearer x", "IncompleteSignatureException"),
        ("authorization", "AWS4-HMAC-SHA256 Credential=x", "IncompleteSignatureException"),
        ("x-amz-date", None, "IncompleteSignatureException"),
        ("x-amz-date", "20260231T000000Z", "IncompleteSignatureException"),
        ("content-type", None, "IncompleteSignatureException"),
    ],
)
def test_what_is_missing(directory: Directory, name: str, value: str | None, code: str) -> None:
    refused(changed(signed(directory.add(ROOT)), name, value), directory, code)


def test_the_order_of_signed_headers(directory: Directory) -> None:
    request = signed(directory.add(ROOT))
    authorization = request.header("authorization") or ""
    swapped = authorization.replace("content-type;host", "host;content-type")
    refused(changed(request, "authorization", swapped), directory, "IncompleteSignatureException", "in order")
