"""The endpoint: TLS, HTTP, what is refused before an operation is asked, and what can be made to go wrong."""

from __future__ import annotations

import http.client
import json
import os
import socket
import ssl
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from typing import Any
from urllib.parse import urlsplit

import pytest
from botocore.auth import SigV4Auth
from botocore.awsrequest import AWSRequest
from botocore.credentials import Credentials
from botocore.exceptions import ClientError, ConnectionClosedError, SSLError

from attestation.keypolicy.document import KeyPolicy
from emulator import kms_faults
from emulator.https import MAX_BODY, Cut
from emulator.kms_endpoint import KmsEmulator, kms_emulator
from emulator.kms_faults import Alter, Delay, Refuse
from tests.kms_clients import Recipient, kms_client, refused

# --- TLS ----------------------------------------------------------------------------------------------------------


def handshake(kms: KmsEmulator, name: str, **allowed: Any) -> tuple[Any, ...] | None:
    """The cipher of a connection to the server that calls itself ``name``, as strictly as OpenSSL checks."""
    context = ssl.create_default_context(cadata=kms.root_der)
    context.verify_flags |= ssl.VERIFY_X509_STRICT
    for option, value in allowed.items():
        setattr(context, option, value)
    raw = socket.create_connection(("127.0.0.1", kms.port))
    with raw, context.wrap_socket(raw, server_hostname=name) as connection:
        return connection.cipher()


def test_the_certificate_is_for_this_machine_and_the_names_given() -> None:
    with kms_emulator(names=["kms.us-east-1.amazonaws.com"]) as kms:
        for name in ("localhost", "127.0.0.1", "::1", "kms.us-east-1.amazonaws.com"):
            assert handshake(kms, name)
        with pytest.raises(ssl.SSLCertVerificationError, match="kms"):
            handshake(kms, "kms.eu-west-1.amazonaws.com")


def test_tls_is_1_2_at_least(kms: KmsEmulator) -> None:
    assert handshake(kms, "localhost", maximum_version=ssl.TLSVersion.TLSv1_2)
    assert handshake(kms, "localhost", minimum_version=ssl.TLSVersion.TLSv1_3)


def test_nobody_trusts_it_by_accident(kms: KmsEmulator) -> None:
    with kms_client(kms, verify=True) as client, pytest.raises(SSLError):
        client.list_keys()
    with kms_emulator() as other, kms_client(kms, verify=str(other.root_file)) as client, pytest.raises(SSLError):
        client.list_keys()


def test_environment_alone_points_an_sdk_at_it(kms: KmsEmulator) -> None:
    program = "import boto3; print(boto3.client('kms').list_keys()['Keys'])"
    environment = kms.environment(kms.principal("assumed-role/enclave/i-1"))
    clean = {name: value for name, value in os.environ.items() if not name.startswith("AWS_")}
    done = subprocess.run(
        [sys.executable, "-c", program], env=clean | environment, check=True, capture_output=True, text=True
    )
    assert done.stdout.strip() == "[]"


# --- HTTP ---------------------------------------------------------------------------------------------------------


def post(
    kms: KmsEmulator, body: bytes, *, target: str = "TrentService.ListKeys", path: str = "/", **changed: str | None
) -> tuple[int, Any]:
    """One request, signed by the account's root user; then ``changed`` headers, None for one that is left out."""
    root = kms.principal("root")
    headers = {"X-Amz-Target": target, "Content-Type": "application/x-amz-json-1.1"}
    request = AWSRequest("POST", f"{kms.endpoint}{path}", headers=headers, data=body)
    credentials = Credentials(root.access_key, root.secret.expose().decode())
    SigV4Auth(credentials, "kms", "us-east-1").add_auth(request)
    sent = {**dict(request.headers.items()), **{name.replace("_", "-"): value for name, value in changed.items()}}
    context = ssl.create_default_context(cadata=kms.root_der)
    connection = http.client.HTTPSConnection(urlsplit(kms.endpoint).netloc, timeout=60, context=context)
    try:
        connection.request("POST", path, body, {name: value for name, value in sent.items() if value is not None})
        answer = connection.getresponse()
        content = answer.read()
        return answer.status, json.loads(content) if content else None
    finally:
        connection.close()


def test_a_request_by_hand(kms: KmsEmulator) -> None:
    assert post(kms, b"{}") == (200, {"Keys": [], "Truncated": False})


@pytest.mark.parametrize(
    ("body", "code"),
    [
        (b"", "SerializationException"),
        (b"{", "SerializationException"),
        (b"[]", "SerializationException"),
        (b'{"Limit": 1, "Limit": 2}', "SerializationException"),
        (b'{"Limit": true}', "SerializationException"),
        (b'{"Limit": 1.5}', "SerializationException"),
        (b'{"Limit": "1"}', "SerializationException"),
        (b'{"Limit": 0}', "ValidationException"),
        (b'{"Limit": 1001}', "ValidationException"),
        (b'{"Unknown": 1}', "ValidationException"),
        (b'{"Marker": "\\ud800"}', "SerializationException"),
        (b"[" * 100 + b"]" * 100, "SerializationException"),
        (b"\xff", "SerializationException"),
    ],
)
def test_bodies_that_are_refused(kms: KmsEmulator, body: bytes, code: str) -> None:
    status, answer = post(kms, body)
    assert (status, answer["__type"]) == (400, code)


@pytest.mark.parametrize(
    ("operation", "body", "code"),
    [
        ("Decrypt", {"CiphertextBlob": "*"}, "SerializationException"),
        ("Decrypt", {"CiphertextBlob": ""}, "ValidationException"),
        ("Decrypt", {}, "ValidationException"),
        ("Encrypt", {"KeyId": "x"}, "ValidationException"),
        ("Encrypt", {"KeyId": "x", "Plaintext": "eA==", "EncryptionContext": {"a": 1}}, "SerializationException"),
        ("Encrypt", {"KeyId": "x", "Plaintext": "eA==", "Recipient": {}}, "ValidationException"),
        ("CreateGrant", {"KeyId": "x", "Operations": ["Fly"]}, "ValidationException"),
        ("ReplicateKey", {"KeyId": "x", "ReplicaRegion": "Frankfurt"}, "ValidationException"),
        ("GenerateRandom", {}, "ValidationException"),
        ("GenerateRandom", {"NumberOfBytes": 1025}, "ValidationException"),
        ("GenerateMac", {}, "UnknownOperationException"),
        ("", {}, "UnknownOperationException"),
    ],
)
def test_members_are_as_aws_describes_them(
    kms: KmsEmulator, operation: str, body: dict[str, object], code: str
) -> None:
    status, answer = post(kms, json.dumps(body).encode(), target=f"TrentService.{operation}")
    assert (status, answer["__type"]) == (400, code)


def test_null_is_not_there(kms: KmsEmulator) -> None:
    assert post(kms, b'{"Limit": null}')[0] == 200


def test_what_is_no_request_to_kms(kms: KmsEmulator) -> None:
    assert post(kms, b"{}", path="/v1")[1]["__type"] == "UnknownOperationException"
    assert post(kms, b"{}", target="DynamoDB.GetItem")[1]["__type"] == "UnknownOperationException"
    assert post(kms, b"{}", Authorization=None)[1]["__type"] == "MissingAuthenticationTokenException"
    assert post(kms, b"{}", X_Amz_Date="20200101T000000Z")[1]["__type"] == "InvalidSignatureException"
    assert post(kms, b"{}", Content_Length="-2") == (411, None)
    assert post(kms, b"{}", Transfer_Encoding="chunked") == (411, None)
    assert post(kms, b"{}", Content_Length=str(MAX_BODY + 1)) == (413, None)


def test_peers_that_say_nothing_hold_nobody_up() -> None:
    with kms_emulator() as kms, kms_client(kms) as client:
        silent = [socket.create_connection(("127.0.0.1", kms.port)) for _ in range(16)]
        silent[0].sendall(b"GET / HTTP/1.1\r\n\r\n")  # no TLS
        silent[1].close()
        assert client.list_keys()["Keys"] == []
    for each in silent:
        each.close()


def test_nothing_is_left_behind() -> None:
    before = set(threading.enumerate())
    with kms_emulator() as kms, kms_client(kms) as client:
        client.list_keys()
        folder = kms.root_file.parent
    assert set(threading.enumerate()) == before
    assert not folder.exists()


def test_a_defect_is_told_at_the_end() -> None:
    def broken(answer: object) -> Any:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError), kms_emulator() as kms, kms_client(kms) as client:
        kms.faults.inject(Alter(broken))
        with pytest.raises(ConnectionClosedError):
            client.list_keys()


# --- Faults -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fault", "status"),
    [
        (kms_faults.THROTTLED, 400),
        (kms_faults.INTERNAL, 500),
        (kms_faults.UNAVAILABLE, 503),
        (kms_faults.NO_DEPENDENCY, 503),
        (Refuse("LimitExceededException", "too many", 400), 400),
    ],
)
def test_refusals_of_the_service(kms: KmsEmulator, root: Any, fault: Refuse, status: int) -> None:
    kms.faults.inject(fault, operation="ListKeys", times=1)
    with pytest.raises(ClientError) as caught:
        root.list_keys()
    assert caught.value.response["Error"]["Code"] == fault.code
    assert caught.value.response["ResponseMetadata"]["HTTPStatusCode"] == status
    root.list_keys()


def test_a_fault_of_one_operation(kms: KmsEmulator, root: Any) -> None:
    kms.faults.inject(kms_faults.THROTTLED, operation="GenerateRandom")
    root.list_keys()
    for _ in range(3):
        with refused("ThrottlingException", "Rate exceeded"):
            root.generate_random(NumberOfBytes=1)
    kms.faults.clear()
    root.generate_random(NumberOfBytes=1)


def test_a_connection_that_is_cut_before_the_answer(kms: KmsEmulator, root: Any) -> None:
    kms.faults.inject(Cut.BEFORE_ANSWER, times=1)
    with pytest.raises(ConnectionClosedError):
        root.generate_random(NumberOfBytes=512)
    assert len(root.generate_random(NumberOfBytes=512)["Plaintext"]) == 512


def test_a_connection_that_is_cut_within_the_answer(kms: KmsEmulator, root: Any) -> None:
    kms.faults.inject(Cut.WITHIN_ANSWER, times=1)
    # botocore compares no length, and takes half a JSON object for an answer without members.
    assert "Plaintext" not in root.generate_random(NumberOfBytes=512)
    assert len(root.generate_random(NumberOfBytes=512)["Plaintext"]) == 512


def test_answers_that_lie(kms: KmsEmulator, root: Any) -> None:
    arn, other, enclave = kms.create_key(), kms.create_key(), Recipient()
    for fault in (kms_faults.WITH_PLAINTEXT, kms_faults.GARBAGE, kms_faults.another_key(other)):
        kms.faults.inject(fault, operation="GenerateDataKey")
    answer = root.generate_data_key(KeyId=arn, KeySpec="AES_256", Recipient=enclave.member())
    assert (answer["KeyId"], answer["Plaintext"]) == (other, bytes(32))
    assert answer["CiphertextForRecipient"] == b"\x30\x80garbage"


def test_answers_that_wait_hold_nobody_up(kms: KmsEmulator, root: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    together, waits = threading.Barrier(16), list[float]()

    def wait(seconds: float) -> None:
        waits.append(seconds)
        together.wait(60)  # breaks, and every answer with it, unless all of them wait at once

    monkeypatch.setattr(kms._closing, "wait", wait)
    kms.faults.inject(Delay(0.2), operation="GenerateRandom")
    with ThreadPoolExecutor(16) as threads:
        answers = threads.map(lambda _: root.generate_random(NumberOfBytes=1), range(16))
        assert len(list(answers)) == 16
    assert waits == [0.2] * 16


def test_a_wait_ends_with_the_emulator() -> None:
    asked = threading.Event()

    def clock() -> datetime:
        if threading.current_thread().name.startswith("Thread-"):
            asked.set()
        return datetime.now(UTC)

    with ThreadPoolExecutor(1, thread_name_prefix="client") as threads:
        with kms_emulator(clock=clock) as kms, kms_client(kms) as client:
            kms.faults.inject(Delay(3600), operation="ListKeys")
            waiting = threads.submit(client.list_keys)
            assert asked.wait(60)
        assert waiting.exception() is None or isinstance(waiting.exception(), ConnectionClosedError)


@pytest.mark.parametrize("hours", [-7, 7])
def test_a_service_with_another_time(kms: KmsEmulator, root: Any, hours: int) -> None:
    kms.skew = timedelta(hours=hours)
    with refused("InvalidSignatureException", "Signature expired" if hours > 0 else "not yet current"):
        root.list_keys()


def test_credentials_that_have_expired(kms: KmsEmulator) -> None:
    gone = kms.principal("assumed-role/enclave/i-1", lifetime=timedelta(seconds=-1))
    with kms_client(kms, gone) as client, refused("ExpiredTokenException", "is expired"):
        client.generate_random(NumberOfBytes=1)


def test_the_default_policy_is_one(kms: KmsEmulator, root: Any) -> None:
    text = root.get_key_policy(KeyId=kms.create_key())["Policy"]
    (only,) = KeyPolicy.parse(text).statements
    assert [each.value for each in only.principals] == ["arn:aws:iam::111122223333:root"]
