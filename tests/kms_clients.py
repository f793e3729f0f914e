"""Callers of the emulated KMS for tests: unmodified boto3, and an enclave that proves itself with the software NSM."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
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
from emulator.kms_faults import Fault
from emulator.sigv4 import Principal
from enclave.kms.cms import open_enveloped
from enclave.nsm import Nsm
from tests import attested
from tests.terminal import Ran, Terminal

ANCHOR = Anchor.emulated(attested.ROOT.certificate_der)
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


@dataclass
class Desk:
    """Where somebody uses KMS: the front door, and the credentials of whoever sits there in the environment."""

    terminal: Terminal
    emulator: KmsEmulator
    monkeypatch: pytest.MonkeyPatch
    asked: list[str] = field(default_factory=list, init=False)
    """KMS's operations, in the order in which they were asked for."""

    def __post_init__(self) -> None:
        due = self.emulator.faults.due

        def noted(operation: str) -> list[Fault]:
            self.asked.append(operation)
            return due(operation)

        self.monkeypatch.setattr(self.emulator.faults, "due", noted)

    def __call__(self, *arguments: str | Path, stdin: bytes = b"") -> Ran:
        return self.terminal(*map(str, arguments), stdin=stdin)

    def become(self, name: str) -> None:
        for variable in [variable for variable in os.environ if variable.startswith("AWS_")]:
            self.monkeypatch.delenv(variable)
        for variable, value in self.emulator.environment(self.emulator.principal(name)).items():
            self.monkeypatch.setenv(variable, value)

    def have_no_credentials(self) -> None:
        for variable in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN"):
            self.monkeypatch.delenv(variable)


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
