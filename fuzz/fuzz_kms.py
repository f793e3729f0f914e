"""The emulated KMS: whatever is signed, asked or sent for decryption, there is an answer or KMS's own refusal."""

from __future__ import annotations

import base64
import contextlib
import json
from datetime import UTC, datetime

from attestation.chain import Anchor
from emulator.https import HttpRequest
from emulator.kms import SoftwareKms
from emulator.kms_request import KmsFault, read_request, service_model
from emulator.pki import DevelopmentRoot
from emulator.sigv4 import Caller, Directory, authenticate

_NOW = datetime(2026, 1, 1, tzinfo=UTC)
_KMS = SoftwareKms(anchor=Anchor.emulated(DevelopmentRoot.generate(_NOW).certificate_der), clock=lambda: _NOW)
_KEY = _KMS.create_key(alias="alias/key")
_DIRECTORY = Directory()
_ROOT = _DIRECTORY.add("arn:aws:iam::111122223333:root")
_CALLER = Caller(_ROOT, "us-east-1")
_EVERY = sorted(service_model().operation_names)
_UNCHANGING = [
    "Decrypt",
    "DescribeKey",
    "Encrypt",
    "GenerateDataKey",
    "GenerateRandom",
    "GetKeyPolicy",
    "GetPublicKey",
    "ListAliases",
    "ListGrants",
    "ListKeyPolicies",
    "ListKeys",
    "ReEncrypt",
    "RevokeGrant",
    "Sign",
]
"""The operations that leave the next input what this one has found."""


def one_input(data: bytes) -> None:
    _authenticate(data)
    if not data:
        return
    try:
        body = json.loads(data[1:])
    except (ValueError, RecursionError):
        body = data[1:].decode("latin-1")
    with contextlib.suppress(KmsFault):
        read_request(_EVERY[data[0] % len(_EVERY)], body)
    with contextlib.suppress(KmsFault):
        json.dumps(_KMS.call(_UNCHANGING[data[0] % len(_UNCHANGING)], body, _CALLER))


def _authenticate(data: bytes) -> None:
    lines = data.decode("latin-1").split("\n")
    headers = [(name, value) for name, _, value in (line.partition(":") for line in lines)]
    request = HttpRequest("POST", "/", headers, data)
    try:
        authenticate(request, _DIRECTORY, regions={"us-east-1"}, now=_NOW)
    except KmsFault:
        return
    raise AssertionError("a forged signature")


def seeds() -> list[bytes]:
    blob = _KMS.call("Encrypt", {"KeyId": _KEY, "Plaintext": "eA=="}, _CALLER)["CiphertextBlob"]
    document = base64.b64encode(b"\x84\x44\xa1\x01\x38\x22").decode()
    recipient = {"KeyEncryptionAlgorithm": "RSAES_OAEP_SHA_256", "AttestationDocument": document}
    requests: dict[str, dict[str, object]] = {
        "Decrypt": {"CiphertextBlob": blob, "KeyId": "alias/key", "EncryptionContext": {"a": "b"}},
        "Encrypt": {"KeyId": _KEY, "Plaintext": "eA==", "EncryptionContext": {"a": "b"}},
        "GenerateDataKey": {"KeyId": _KEY, "KeySpec": "AES_256"},
        "GenerateRandom": {"NumberOfBytes": 32, "Recipient": recipient},
        "ListGrants": {"KeyId": _KEY, "Limit": 1, "Marker": "1"},
        "ReEncrypt": {"CiphertextBlob": blob, "DestinationKeyId": _KEY},
    }
    authorization = (
        f"authorization:AWS4-HMAC-SHA256 Credential={_ROOT.access_key}/20260101/us-east-1/kms/aws4_request,"
        f" SignedHeaders=host;x-amz-date, Signature={'0' * 64}"
    )
    signed = "\n".join(("host:localhost", "x-amz-date:20260101T000000Z", authorization))
    bodies = [bytes([_UNCHANGING.index(name)]) + json.dumps(body).encode() for name, body in requests.items()]
    return [*bodies, signed.encode("ascii"), b""]
