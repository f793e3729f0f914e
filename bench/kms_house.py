"""The emulated KMS, the software NSM and the parent's egress for benchmarks: the real commands, each a process of its
own, so that what is measured shares its interpreter with none of them.
"""

from __future__ import annotations

import base64
import configparser
import contextlib
import json
import os
import ssl
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import boto3
from botocore.config import Config

from attestation.envelope import EnvelopePurpose, encryption_context
from attestation.keypolicy.document import KeyArn
from attestation.reference import PcrSet
from attestation.secret import Secret
from bench.house import command
from enclave.config import KmsSettings
from enclave.kms.https import Credentials
from enclave.nsm import Nsm, open_nsm
from vsockrpc.address import TcpAddress, parse_address

HOST = "kms.us-east-1.amazonaws.com"
REGION = "us-east-1"
PCRS = PcrSet(b"\x01" * 48, b"\x02" * 48, b"\x03" * 48)
PLAINTEXT = bytes(range(32))
"""What the wrapped key holds."""
CONTEXT = encryption_context(EnvelopePurpose.PROMPT, "bench", 1)
ENCLAVE, PLAIN = "enclave", "sealer"
"""Roles: one may decrypt for an enclave of these registers, the other without any."""


@dataclass(frozen=True, slots=True)
class KmsHouse:
    """What a process needs to ask; JSON has all of it."""

    nsm_address: str
    egress: str
    port: int
    """Of the KMS, at 127.0.0.1."""
    root_file: str
    credentials: dict[str, dict[str, str]]
    """By role, as in a credentials file."""
    times: str
    """Where the KMS writes down how long its parts take."""
    key_arn: str = ""
    wrapped_base64: str = ""

    @property
    def key(self) -> KeyArn:
        return KeyArn.parse(self.key_arn)

    @property
    def wrapped(self) -> bytes:
        return base64.b64decode(self.wrapped_base64)

    @property
    def authority(self) -> bytes:
        """The TLS root, DER."""
        return ssl.PEM_cert_to_DER_cert(Path(self.root_file).read_text())

    def settings(self) -> KmsSettings:
        return KmsSettings(REGION, TcpAddress(HOST, 443), parse_address(self.egress), self.authority, None, None)

    def nsm(self) -> Nsm:
        return open_nsm(self.nsm_address)

    def role(self, name: str) -> Credentials:
        """For signing with our own client."""
        said = self.credentials[name]
        token = said["aws_session_token"].encode()
        return Credentials(
            said["aws_access_key_id"], Secret(said["aws_secret_access_key"].encode()), Secret(token), None
        )

    def request(self) -> dict[str, Any]:
        """To decrypt, for either side."""
        return {"CiphertextBlob": self.wrapped, "KeyId": self.key_arn, "EncryptionContext": CONTEXT}

    def plain_client(self, role: str = PLAIN) -> Any:
        """boto3's own, as anybody makes it, which keeps its connections."""
        config = Config(retries={"total_max_attempts": 1}, max_pool_connections=64, proxies={})
        return boto3.session.Session().client(
            "kms",
            region_name=REGION,
            endpoint_url=f"https://127.0.0.1:{self.port}",
            verify=self.root_file,
            config=config,
            **self.credentials[role],
        )


@contextlib.contextmanager
def kms_house(*, latency_ms: int = 0) -> Iterator[KmsHouse]:
    """A KMS whose answers wait ``latency_ms``, with an NSM that it believes and an egress that leads to it."""
    with tempfile.TemporaryDirectory(prefix="strongroom-bench-") as folder, contextlib.ExitStack() as running:
        environment = os.environ | {"STRONGROOM_HOME": f"{folder}/home"}
        files = ["--directory", f"{folder}/aws"]
        roles = ["--role", ENCLAVE, "--role", PLAIN]
        emulated = running.enter_context(
            command(
                *(f"{folder}/times", "kms", "--json", "--name", HOST, "--latency-ms", str(latency_ms), *files, *roles),
                program="bench.kms_emulator",
                environment=environment,
            )
        )
        port = int(emulated["endpoint"].rpartition(":")[2])
        registers = [f"--pcr{index}={value.hex()}" for index, value in enumerate((PCRS.pcr0, PCRS.pcr1, PCRS.pcr2))]
        nsm = running.enter_context(
            command("--listen", f"unix:{folder}/nsm", *registers, program="emulator.nsm", environment=environment)
        )
        egress = running.enter_context(
            command(
                *("egress", "--json", "--listen", f"unix:{folder}/egress", "--allow", f"{HOST}:443=127.0.0.1:{port}"),
                *("--credentials", "boto3", "--profile", ENCLAVE),
                environment=environment | emulated["environment"],
            )
        )
        profiles = configparser.ConfigParser()
        profiles.read(f"{folder}/aws/credentials")
        credentials = {name: dict(profiles[name]) for name in profiles.sections()}
        house = KmsHouse(nsm["address"], egress["listening"], port, emulated["root"], credentials, f"{folder}/times")
        key, wrapped = _sealed(house, emulated["profiles"])
        yield replace(house, key_arn=key, wrapped_base64=wrapped)


def _sealed(house: KmsHouse, profiles: dict[str, str]) -> tuple[str, str]:
    """A key that is released to the house's enclaves, and to the other role; and ``PLAINTEXT`` wrapped by it."""
    account = profiles["default"].split(":")[4]

    def allowed(role: str, *actions: str, **more: object) -> dict[str, object]:
        principal = {"AWS": f"arn:aws:iam::{account}:{role}"}
        return {"Effect": "Allow", "Principal": principal, "Action": actions, "Resource": "*", **more}

    measured = {
        "kms:RecipientAttestation:ImageSha384": PCRS.pcr0.hex(),
        "kms:RecipientAttestation:PCR1": PCRS.pcr1.hex(),
        "kms:RecipientAttestation:PCR2": PCRS.pcr2.hex(),
    }
    statements = [
        allowed("root", "kms:PutKeyPolicy", "kms:DescribeKey"),
        allowed(f"role/{ENCLAVE}", "kms:Decrypt", Condition={"StringEqualsIgnoreCase": measured}),
        allowed(f"role/{PLAIN}", "kms:Encrypt", "kms:Decrypt"),
    ]
    policy = json.dumps({"Version": "2012-10-17", "Statement": statements})
    key: str = house.plain_client("default").create_key(Policy=policy)["KeyMetadata"]["Arn"]
    sealed = house.plain_client().encrypt(KeyId=key, Plaintext=PLAINTEXT, EncryptionContext=CONTEXT)
    return key, base64.b64encode(sealed["CiphertextBlob"]).decode()
