"""KMS as a signer, over HTTPS against real keys; and nothing that it answers is taken at its word."""

from __future__ import annotations

import base64
import contextlib
import socket
from collections.abc import Callable, Iterator
from datetime import timedelta
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

from attestation.release_signing import Algorithm, PublicKey
from attestation.releases import append
from emulator.kms_endpoint import KmsEmulator, kms_emulator
from emulator.kms_faults import Alter
from emulator.kms_keys import KEY_AGREEMENT
from strongroom.extras import MissingExtra
from strongroom.kms import client as kms_client
from strongroom.kms.signer import KmsSigner, KmsSigningError
from tests.release_files import ISSUED, NAME, ONE, verified

Answer = dict[str, Any]


class SigningKms:
    """KMS, whose answers are altered on the way."""

    def __init__(self, emulator: KmsEmulator) -> None:
        self._emulator = emulator

    def create_key(self, *, spec: str = "ECC_NIST_P384", usage: str = "SIGN_VERIFY") -> str:
        return self._emulator.create_key(spec=spec, usage=usage)

    def alter(self, operation: str, change: Callable[[Answer], Answer]) -> None:
        self._emulator.faults.inject(Alter(lambda answer: change(dict(answer))), operation=operation)


@pytest.fixture
def kms(monkeypatch: pytest.MonkeyPatch) -> Iterator[SigningKms]:
    with kms_emulator(region="eu-central-1", account="000000000000") as emulator:
        for name, value in emulator.environment(emulator.principal("root")).items():
            monkeypatch.setenv(name, value)
        for name in ("AWS_PROFILE", "AWS_SESSION_TOKEN", "HTTPS_PROXY", "https_proxy"):
            monkeypatch.delenv(name, raising=False)
        yield SigningKms(emulator)


def refused(arn: str, code: str, exit_code: int) -> KmsSigningError:
    with pytest.raises(KmsSigningError) as caught, KmsSigner(arn) as signer:
        signer.sign(b"data")
    assert (caught.value.code, caught.value.exit_code) == (code, exit_code), caught.value
    return caught.value


def test_a_history_signed_by_kms(kms: SigningKms) -> None:
    with KmsSigner(kms.create_key()) as signer:
        line = append(b"", signer=signer, name=NAME, releases=[ONE], issued=ISSUED, expires=ISSUED + timedelta(days=1))
        key = PublicKey.parse(str(signer.public_key))
    assert key.algorithm is Algorithm.ECDSA_P384
    assert verified(line, key=key).current.releases == (ONE,)


@pytest.mark.parametrize(
    "arn",
    [
        "",
        "alias/releases",
        "arn:aws:kms:eu-central-1:000000000000:alias/releases",
        "0d990263-018e-4e65-a703-eff731de951e",
        "arn:aws:kms:eu-central-1:000000000000:key/",
        "arn:aws:kms:eu-central-1:00000000000:key/x",
        "arn:aws:kms:eu_central:000000000000:key/x",
        "arn:aws:s3:eu-central-1:000000000000:key/x",
        "arn:aws:kms:eu-central-1:000000000000:key/x\n",
    ],
)
def test_a_key_is_named_by_its_full_arn(arn: str) -> None:
    refused(arn, "bad_key_arn", 2)


def test_a_key_that_does_not_exist(kms: SigningKms) -> None:
    error = refused("arn:aws:kms:eu-central-1:000000000000:key/none", "kms_refused", 4)
    assert error.got == "NotFoundException"


@pytest.mark.parametrize(("spec", "usage"), [("ECC_NIST_P256", "SIGN_VERIFY"), ("ECC_NIST_P384", KEY_AGREEMENT)])
def test_a_key_of_another_kind(kms: SigningKms, spec: str, usage: str) -> None:
    refused(kms.create_key(spec=spec, usage=usage), "wrong_kms_key", 3)


def spki(key: ec.EllipticCurvePrivateKey | Ed25519PrivateKey | rsa.RSAPrivateKey) -> str:
    octets = key.public_key().public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)
    return base64.b64encode(octets).decode()


@pytest.mark.parametrize(
    ("operation", "change", "code"),
    [
        ("GetPublicKey", {"KeyId": "arn:aws:kms:eu-central-1:000000000000:key/other"}, "wrong_kms_key"),
        ("GetPublicKey", {"KeySpec": "ECC_SECG_P256K1"}, "wrong_kms_key"),
        ("GetPublicKey", {"KeyUsage": "ENCRYPT_DECRYPT"}, "wrong_kms_key"),
        ("GetPublicKey", {"PublicKey": ""}, "wrong_kms_key"),
        ("GetPublicKey", {"PublicKey": spki(ec.generate_private_key(ec.SECP256R1()))}, "wrong_kms_key"),
        ("GetPublicKey", {"PublicKey": spki(Ed25519PrivateKey.generate())}, "wrong_kms_key"),
        ("GetPublicKey", {"PublicKey": spki(rsa.generate_private_key(65537, 2048))}, "wrong_kms_key"),
        ("GetPublicKey", {"PublicKey": spki(ec.generate_private_key(ec.SECP384R1()))}, "bad_kms_signature"),
        ("Sign", {"KeyId": "arn:aws:kms:eu-central-1:000000000000:key/other"}, "wrong_kms_key"),
        ("Sign", {"SigningAlgorithm": "ECDSA_SHA_256"}, "wrong_kms_key"),
        ("Sign", {"Signature": ""}, "bad_kms_signature"),
        ("Sign", {"Signature": base64.b64encode(bytes(96)).decode()}, "bad_kms_signature"),
    ],
)
def test_an_answer_that_is_not_to_be_trusted(kms: SigningKms, operation: str, change: Answer, code: str) -> None:
    kms.alter(operation, lambda answer: answer | change)
    refused(kms.create_key(), code, 3)


@pytest.mark.parametrize(
    ("operation", "field"),
    [
        ("GetPublicKey", "KeyId"),
        ("GetPublicKey", "KeySpec"),
        ("GetPublicKey", "KeyUsage"),
        ("GetPublicKey", "PublicKey"),
        ("Sign", "KeyId"),
        ("Sign", "SigningAlgorithm"),
        ("Sign", "Signature"),
    ],
)
def test_an_answer_that_lacks_something(kms: SigningKms, operation: str, field: str) -> None:
    kms.alter(operation, lambda answer: {key: value for key, value in answer.items() if key != field})
    refused(kms.create_key(), "wrong_kms_key", 3)


def test_nobody_answers(kms: SigningKms, monkeypatch: pytest.MonkeyPatch) -> None:
    with contextlib.closing(socket.create_server(("127.0.0.1", 0))) as server:
        port = server.getsockname()[1]
    monkeypatch.setenv("AWS_ENDPOINT_URL_KMS", f"https://127.0.0.1:{port}")
    monkeypatch.setattr(kms_client, "ATTEMPTS", 1)
    error = refused("arn:aws:kms:eu-central-1:000000000000:key/x", "kms_unavailable", 4)
    assert error.got == "EndpointConnectionError"


def test_no_credentials(kms: SigningKms, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    assert refused(kms.create_key(), "kms_unavailable", 4).got == "NoCredentialsError"


def test_without_boto3_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("strongroom.extras.find_spec", lambda name: None)
    with pytest.raises(MissingExtra) as caught:
        KmsSigner("arn:aws:kms:eu-central-1:000000000000:key/x")
    assert caught.value.exit_code == 2
    assert "strongroom[kms]" in caught.value.message
