"""The stand-in for KMS: what it signs verifies, and what it refuses has the error codes of AWS's."""

from __future__ import annotations

import base64
import hashlib
import http.client
import json
from collections.abc import Iterator
from urllib.parse import urlsplit

import pytest
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.hashes import SHA384
from cryptography.hazmat.primitives.serialization import load_der_public_key

from emulator.kms import KEY_AGREEMENT, MAX_MESSAGE, MAX_REQUEST, KmsFault, SoftwareKms, serving

MESSAGE = b"message"
DIGEST = hashlib.sha384(MESSAGE).digest()


def b64(octets: bytes) -> str:
    return base64.b64encode(octets).decode()


@pytest.fixture
def kms() -> SoftwareKms:
    return SoftwareKms()


def public_key(kms: SoftwareKms, arn: str) -> ec.EllipticCurvePublicKey:
    encoded = kms.call("GetPublicKey", {"KeyId": arn})["PublicKey"]
    assert isinstance(encoded, str)
    key = load_der_public_key(base64.b64decode(encoded))
    assert isinstance(key, ec.EllipticCurvePublicKey)
    return key


@pytest.mark.parametrize(("kind", "message"), [("RAW", MESSAGE), ("DIGEST", DIGEST)])
def test_a_signature_verifies(kms: SoftwareKms, kind: str, message: bytes) -> None:
    arn = kms.create_key()
    request = {"KeyId": arn, "Message": b64(message), "MessageType": kind, "SigningAlgorithm": "ECDSA_SHA_384"}
    answer = kms.call("Sign", request)
    assert (answer["KeyId"], answer["SigningAlgorithm"]) == (arn, "ECDSA_SHA_384")
    assert isinstance(answer["Signature"], str)
    public_key(kms, arn).verify(base64.b64decode(answer["Signature"]), MESSAGE, ec.ECDSA(SHA384()))


def test_a_public_key_says_what_it_is_for(kms: SoftwareKms) -> None:
    arn = kms.create_key()
    answer = kms.call("GetPublicKey", {"KeyId": arn.rpartition("/")[2]})
    assert (answer["KeyId"], answer["KeySpec"], answer["KeyUsage"]) == (arn, "ECC_NIST_P384", "SIGN_VERIFY")
    assert answer["SigningAlgorithms"] == ["ECDSA_SHA_384"]
    agreement = kms.call("GetPublicKey", {"KeyId": kms.create_key(usage=KEY_AGREEMENT)})
    assert agreement["KeyUsage"] == KEY_AGREEMENT
    assert "SigningAlgorithms" not in agreement


@pytest.mark.parametrize(
    ("change", "code"),
    [
        ({"KeyId": "arn:aws:kms:us-east-1:000000000000:key/none"}, "NotFoundException"),
        ({"KeyId": None}, "ValidationException"),
        ({"Unknown": 1}, "ValidationException"),
        ({"Message": "*"}, "SerializationException"),
        ({"Message": b64(DIGEST[1:])}, "ValidationException"),
        ({"Message": b64(bytes(MAX_MESSAGE + 1)), "MessageType": "RAW"}, "ValidationException"),
        ({"Message": "", "MessageType": "RAW"}, "ValidationException"),
        ({"MessageType": "EXTERNAL_MU"}, "ValidationException"),
        ({"SigningAlgorithm": "ECDSA_SHA_256"}, "InvalidKeyUsageException"),
        ({"SigningAlgorithm": 1}, "ValidationException"),
    ],
)
def test_what_sign_refuses(kms: SoftwareKms, change: dict[str, object], code: str) -> None:
    good = {
        "KeyId": kms.create_key(),
        "Message": b64(DIGEST),
        "MessageType": "DIGEST",
        "SigningAlgorithm": "ECDSA_SHA_384",
    }
    with pytest.raises(KmsFault) as caught:
        kms.call("Sign", good | change)
    assert caught.value.code == code


def test_a_key_for_something_else_does_not_sign(kms: SoftwareKms) -> None:
    request = {
        "KeyId": kms.create_key(usage=KEY_AGREEMENT),
        "Message": b64(DIGEST),
        "MessageType": "DIGEST",
        "SigningAlgorithm": "ECDSA_SHA_384",
    }
    with pytest.raises(KmsFault) as caught:
        kms.call("Sign", request)
    assert caught.value.code == "InvalidKeyUsageException"


def test_what_does_not_exist(kms: SoftwareKms) -> None:
    for kind in ({"spec": "RSA_2048"}, {"usage": "ENCRYPT_DECRYPT"}):
        with pytest.raises(KmsFault):
            kms.create_key(**kind)
    with pytest.raises(KmsFault) as caught:
        kms.call("ScheduleKeyDeletion", {})
    assert caught.value.code == "UnknownOperationException"


# --- On a port -----------------------------------------------------------------------------------------------------


@pytest.fixture
def url(kms: SoftwareKms) -> Iterator[str]:
    with serving(kms) as url:
        yield url


HEADERS = {"Authorization": "AWS4-HMAC-SHA256 Credential=x", "X-Amz-Target": "TrentService.GetPublicKey"}


def post(url: str, body: bytes, headers: dict[str, str], path: str = "/") -> tuple[int, dict[str, object]]:
    connection = http.client.HTTPConnection(urlsplit(url).netloc, timeout=60)
    try:
        connection.request("POST", path, body, headers)
        answer = connection.getresponse()
        content = json.loads(answer.read())
        assert answer.headers["Content-Type"] == "application/x-amz-json-1.1"
        return answer.status, content
    finally:
        connection.close()


def test_over_http(kms: SoftwareKms, url: str) -> None:
    arn = kms.create_key()
    status, answer = post(url, json.dumps({"KeyId": arn}).encode(), HEADERS)
    assert (status, answer) == (200, kms.call("GetPublicKey", {"KeyId": arn}))


@pytest.mark.parametrize(
    ("body", "headers", "code"),
    [
        (b"{}", {"Authorization": ""}, "MissingAuthenticationTokenException"),
        (b"{}", {"X-Amz-Target": "DynamoDB.GetItem"}, "UnknownOperationException"),
        (b"{}", {"X-Amz-Target": "TrentService.Encrypt"}, "UnknownOperationException"),
        (b"{}", {}, "ValidationException"),
        (b"{", {}, "SerializationException"),
        (b"[]", {}, "SerializationException"),
        (b"{}", {"Content-Length": "-2"}, "SerializationException"),
        (b"{}", {"Content-Length": str(MAX_REQUEST + 1)}, "SerializationException"),
    ],
)
def test_requests_that_are_refused(url: str, body: bytes, headers: dict[str, str], code: str) -> None:
    status, answer = post(url, body, HEADERS | headers)
    assert (status, answer["__type"]) == (400, code)


def test_another_path(url: str) -> None:
    assert post(url, b"{}", HEADERS, path="/v1")[1]["__type"] == "UnknownOperationException"
