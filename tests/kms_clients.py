"""Callers of the emulated KMS for tests: unmodified boto3, and an enclave that proves itself with the software NSM."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import boto3
import pytest
from botocore.config import Config
from botocore.exceptions import ClientError
from cryptography.hazmat.primitives.asymmetric import rsa
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

from attestation.chain import Anchor
from attestation.secret import Secret
from emulator.kms_endpoint import KmsEmulator
from emulator.sigv4 import Principal
from enclave.cms import open_enveloped
from enclave.nsm import Nsm
from tests import attested

ANCHOR = Anchor.emulated(attested._ROOT.certificate_der)
"""That of ``tests.attested``'s enclaves."""
CONTEXT = {"strongroom": "1", "strongroom:purpose": "model"}


@contextlib.contextmanager
def kms_client(kms: KmsEmulator, principal: Principal | None = None, **changed: Any) -> Iterator[Any]:
    """boto3's own, which asks once; the account's root user's if nobody is named."""
    settings = kms.client_settings(principal or kms.principal("root")) | changed
    config = Config(retries={"total_max_attempts": 1}, connect_timeout=30, read_timeout=60, max_pool_connections=64)
    client = boto3.session.Session().client("kms", config=config, **settings)
    try:
        yield client
    finally:
        client.close()


@contextlib.contextmanager
def refused(code: str, text: str = "") -> Iterator[None]:
    """What is inside is refused with AWS's code, and a text that has ``text`` in it."""
    with pytest.raises(ClientError) as caught:
        yield
    error = caught.value.response["Error"]
    assert error["Code"] == code, error
    assert text in error["Message"], error


def statement(
    principal: str, *actions: str, effect: str = "Allow", **conditions: Mapping[str, object]
) -> dict[str, Any]:
    """One of a key policy. ``conditions`` are operators."""
    said: dict[str, Any] = {"Effect": effect, "Principal": {"AWS": principal}, "Action": list(actions), "Resource": "*"}
    return said | ({"Condition": conditions} if conditions else {})


def policy(*statements: Mapping[str, Any]) -> str:
    return json.dumps({"Version": "2012-10-17", "Statement": list(statements)})


@dataclass
class Recipient:
    """An enclave's side of one request: its document's key, and the NSM that signs for it."""

    nsm: Nsm = field(default_factory=attested.software_nsm)
    key: rsa.RSAPrivateKey = field(default_factory=lambda: rsa.generate_private_key(65537, 2048))

    @property
    def spki(self) -> bytes:
        return self.key.public_key().public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)

    def member(self, document: bytes | None = None) -> dict[str, Any]:
        """``Recipient`` of a request."""
        document = self.nsm.attestation(public_key=self.spki) if document is None else document
        return {"KeyEncryptionAlgorithm": "RSAES_OAEP_SHA_256", "AttestationDocument": document}

    def open(self, ciphertext: bytes) -> Secret:
        return open_enveloped(ciphertext, self.key)
