"""``Recipient``: what KMS gives to an enclave alone, and to which."""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat, load_der_private_key

from attestation.chain import Anchor
from emulator.cms import ContentForm
from emulator.kms_endpoint import KmsEmulator, kms_emulator
from emulator.nsm import SoftwareNsm, boot_registers, new_module_id
from emulator.pki import DevelopmentRoot
from enclave.nsm import Nsm
from tests.attested import IMAGE, InProcess
from tests.key_policies import ACCOUNT, policy, statement
from tests.kms_clients import CONTEXT, Recipient, kms_client, refused

ROLE = f"arn:aws:iam::{ACCOUNT}:role/enclave"
ROOT_USER = f"arn:aws:iam::{ACCOUNT}:root"
INVALID = "ValidationException"


@pytest.fixture(scope="module")
def enclave() -> Recipient:
    return Recipient()


def wrapped(kms: KmsEmulator, plaintext: bytes, **pcrs: str) -> tuple[str, bytes]:
    """A key that opens to the enclave's role with these registers, and what was encrypted under it."""
    conditions = {f"kms:RecipientAttestation:{name}": value for name, value in pcrs.items()}
    arn = kms.create_key(
        policy(
            statement(ROOT_USER, "kms:Encrypt", "kms:GetKeyPolicy"),
            statement(ROLE, "kms:Decrypt", "kms:GenerateDataKey*", StringEqualsIgnoreCase=conditions),
        )
    )
    with kms_client(kms) as root:
        blob = root.encrypt(KeyId=arn, Plaintext=plaintext, EncryptionContext=CONTEXT)["CiphertextBlob"]
    return arn, blob


@pytest.mark.parametrize("form", ContentForm)
def test_the_enclave_that_the_policy_names_has_the_plaintext_and_nobody_else(
    kms: KmsEmulator, enclave: Recipient, form: ContentForm
) -> None:
    kms.kms.content_form = form
    digests = {"ImageSha384": IMAGE.pcr0.hex().upper(), "PCR1": IMAGE.pcr1.hex(), "PCR2": IMAGE.pcr2.hex()}
    arn, blob = wrapped(kms, b"model key", **digests)
    with kms_client(kms, kms.principal("assumed-role/enclave/i-1")) as client:
        request = {"KeyId": arn, "CiphertextBlob": blob, "EncryptionContext": CONTEXT}
        answer = client.decrypt(**request, Recipient=enclave.member())
        assert "Plaintext" not in answer
        assert (answer["KeyId"], answer["EncryptionAlgorithm"]) == (arn, "SYMMETRIC_DEFAULT")
        assert enclave.open(answer["CiphertextForRecipient"]).expose() == b"model key"
        with refused("AccessDeniedException", f"kms:Decrypt on resource: {arn} because no resource-based policy"):
            client.decrypt(**request)


@pytest.mark.parametrize("register", ["ImageSha384", "PCR0", "PCR1", "PCR2", "PCR4", "PCR8", "PCR16"])
def test_another_image_is_denied(kms: KmsEmulator, enclave: Recipient, register: str) -> None:
    arn, blob = wrapped(kms, b"model key", **{register: "ab" * 48})
    with kms_client(kms, kms.principal("assumed-role/enclave/i-1")) as client, refused("AccessDeniedException"):
        client.decrypt(KeyId=arn, CiphertextBlob=blob, EncryptionContext=CONTEXT, Recipient=enclave.member())


def test_what_is_generated_for_an_enclave(kms: KmsEmulator, root: Any, enclave: Recipient) -> None:
    arn = kms.create_key()
    key = root.generate_data_key(KeyId=arn, KeySpec="AES_256", Recipient=enclave.member())
    assert "Plaintext" not in key
    plaintext = enclave.open(key["CiphertextForRecipient"]).expose()
    assert root.decrypt(CiphertextBlob=key["CiphertextBlob"])["Plaintext"] == plaintext
    assert len(plaintext) == 32

    random = root.generate_random(NumberOfBytes=48, Recipient=enclave.member())
    assert "Plaintext" not in random
    assert len(enclave.open(random["CiphertextForRecipient"])) == 48

    pair = root.generate_data_key_pair(KeyId=arn, KeyPairSpec="ECC_NIST_P256", Recipient=enclave.member())
    assert "PrivateKeyPlaintext" not in pair
    private = load_der_private_key(enclave.open(pair["CiphertextForRecipient"]).expose(), None)
    spki = private.public_key().public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)
    assert spki == pair["PublicKey"]


def test_a_replayed_document_opens_with_the_key_of_its_enclave_alone(
    kms: KmsEmulator, root: Any, enclave: Recipient
) -> None:
    member = enclave.member()
    for _ in range(2):  # KMS itself does not remember documents: whoever replays one gains ciphertext
        answer = root.generate_random(NumberOfBytes=32, Recipient=member)
        assert len(enclave.open(answer["CiphertextForRecipient"])) == 32


def ask(kms: KmsEmulator, member: dict[str, Any]) -> None:
    with kms_client(kms) as root:
        root.generate_random(NumberOfBytes=32, Recipient=member)


def spki_of(key: rsa.RSAPrivateKey | ec.EllipticCurvePrivateKey) -> bytes:
    return key.public_key().public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)


@pytest.mark.parametrize(
    ("public_key", "why"),
    [
        (lambda: None, "has no public key"),
        (lambda: b"", "no SubjectPublicKeyInfo"),
        (lambda: b"\x30\x82", "no SubjectPublicKeyInfo"),
        (lambda: spki_of(ec.generate_private_key(ec.SECP256R1())), "not RSA of 2048"),
        (lambda: spki_of(rsa.generate_private_key(65537, 1024)), "not RSA of 2048"),
        (lambda: spki_of(rsa.generate_private_key(65537, 3072)), "not RSA of 2048"),
    ],
)
def test_the_key_of_a_document(
    kms: KmsEmulator, enclave: Recipient, public_key: Callable[[], bytes | None], why: str
) -> None:
    with refused(INVALID, why):
        ask(kms, enclave.member(enclave.nsm.attestation(public_key=public_key())))


@pytest.mark.parametrize(
    ("age", "why"),
    [
        (timedelta(minutes=4, seconds=50), None),
        (timedelta(minutes=5, seconds=10), "within 5 minutes"),
        (timedelta(hours=4), "not authentic: untrusted_chain"),
        (timedelta(minutes=-1), "not authentic: untrusted_chain"),  # its certificate begins 3 s before it
    ],
)
def test_the_age_of_a_document(age: timedelta, why: str | None) -> None:
    made = datetime.now(UTC) - age
    root = DevelopmentRoot.generate(made - timedelta(days=1))
    module = SoftwareNsm(root, boot_registers(IMAGE), module_id=new_module_id(), clock=lambda: made)
    enclave, anchor = Recipient(Nsm(InProcess(module))), Anchor.emulated(root.certificate_der)
    with kms_emulator(anchor=anchor) as kms, contextlib.nullcontext() if why is None else refused(INVALID, why):
        ask(kms, enclave.member())


def test_an_altered_document(kms: KmsEmulator, enclave: Recipient) -> None:
    document = bytearray(enclave.nsm.attestation(public_key=enclave.spki))
    document[-1] ^= 1
    with refused(INVALID, "not authentic: bad_signature"):
        ask(kms, enclave.member(bytes(document)))


def test_another_anchor(enclave: Recipient) -> None:
    other = DevelopmentRoot.generate(datetime.now(UTC))
    with (
        kms_emulator(anchor=Anchor.emulated(other.certificate_der)) as kms,
        refused(INVALID, "authentic"),
    ):
        ask(kms, enclave.member())
    with kms_emulator() as kms, refused(INVALID, "no anchor"):
        ask(kms, enclave.member())


@pytest.mark.parametrize(
    ("member", "why"),
    [
        ({}, "KeyEncryptionAlgorithm must be"),
        ({"KeyEncryptionAlgorithm": "RSAES_OAEP_SHA_256"}, "AttestationDocument is missing"),
        ({"KeyEncryptionAlgorithm": "RSAES_OAEP_SHA_1", "AttestationDocument": b"x"}, "keyEncryptionAlgorithm"),
        ({"KeyEncryptionAlgorithm": "RSAES_OAEP_SHA_256", "AttestationDocument": b"x"}, "not authentic"),
        ({"KeyEncryptionAlgorithm": "RSAES_OAEP_SHA_256", "AttestationDocument": bytes(262_144)}, "not authentic"),
        ({"KeyEncryptionAlgorithm": "RSAES_OAEP_SHA_256", "AttestationDocument": bytes(262_145)}, "262144"),
    ],
)
def test_a_recipient_that_is_none(kms: KmsEmulator, member: dict[str, Any], why: str) -> None:
    with refused(INVALID, why):
        ask(kms, member)


def test_the_identifier_is_the_digest_of_the_key(kms: KmsEmulator, root: Any, enclave: Recipient) -> None:
    answer = root.generate_random(NumberOfBytes=1, Recipient=enclave.member())
    assert hashlib.sha256(enclave.spki).digest() in answer["CiphertextForRecipient"]
