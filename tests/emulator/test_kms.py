"""The emulated KMS as unmodified boto3 sees it: what keys do, and what is refused."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric import ec, padding, rsa
from cryptography.hazmat.primitives.hashes import SHA256, SHA384, Hash
from cryptography.hazmat.primitives.serialization import load_der_public_key

from attestation.keypolicy.document import KeyPolicyError
from emulator.kms_endpoint import KmsEmulator, kms_emulator
from tests.kms_clients import CONTEXT, Recipient, kms_client, refused

MESSAGE = b"a history"


# --- Encryption ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("context", [{}, {"a": "b"}, {"a": "b", "c": ""}, {"ä": "ö"}], ids=str)
@pytest.mark.parametrize("multi_region", [False, True])
def test_what_is_encrypted_is_decrypted(root: Any, context: dict[str, str], multi_region: bool) -> None:
    arn = root.create_key(MultiRegion=multi_region)["KeyMetadata"]["Arn"]
    sealed = root.encrypt(KeyId=arn, Plaintext=b"plaintext", EncryptionContext=context)
    assert (sealed["KeyId"], sealed["EncryptionAlgorithm"]) == (arn, "SYMMETRIC_DEFAULT")
    for named in ({}, {"KeyId": arn}, {"KeyId": arn.rpartition("/")[2]}):
        opened = root.decrypt(CiphertextBlob=sealed["CiphertextBlob"], EncryptionContext=context, **named)
        assert (opened["KeyId"], opened["Plaintext"]) == (arn, b"plaintext")


@pytest.mark.parametrize(
    "context", [{}, {"a": "b"}, {"ab": "c"}, {"a": "BC"}, {"A": "bc"}, {"a": "bc", "d": "e"}], ids=str
)
def test_another_context(root: Any, kms: KmsEmulator, context: dict[str, str]) -> None:
    blob = root.encrypt(KeyId=kms.create_key(), Plaintext=b"x", EncryptionContext={"a": "bc"})["CiphertextBlob"]
    with refused("InvalidCiphertextException"):
        root.decrypt(CiphertextBlob=blob, EncryptionContext=context)


def test_another_key_of_the_account(root: Any, kms: KmsEmulator) -> None:
    one, other = kms.create_key(), kms.create_key()
    blob = root.encrypt(KeyId=one, Plaintext=b"x")["CiphertextBlob"]
    with refused("IncorrectKeyException"):
        root.decrypt(CiphertextBlob=blob, KeyId=other)


def test_a_ciphertext_of_nobody_here(root: Any, kms: KmsEmulator) -> None:
    blob = bytearray(root.encrypt(KeyId=kms.create_key(), Plaintext=b"x")["CiphertextBlob"])
    for index in range(len(blob)):
        altered = bytes(blob[:index]) + bytes([blob[index] ^ 1]) + bytes(blob[index + 1 :])
        with pytest.raises(root.exceptions.ClientError) as caught:
            root.decrypt(CiphertextBlob=altered)
        assert caught.value.response["Error"]["Code"] in ("InvalidCiphertextException", "AccessDeniedException")
    for end in (1, 2, 30, len(blob) - 1):
        with refused("InvalidCiphertextException"):
            root.decrypt(CiphertextBlob=bytes(blob[:end]))


@pytest.mark.parametrize(("asked", "size"), [({"KeySpec": "AES_128"}, 16), ({"NumberOfBytes": 1024}, 1024)])
def test_data_keys(root: Any, kms: KmsEmulator, asked: Mapping[str, Any], size: int) -> None:
    arn = kms.create_key()
    key = root.generate_data_key(KeyId=arn, EncryptionContext=CONTEXT, **asked)
    assert len(key["Plaintext"]) == size
    assert (
        root.decrypt(CiphertextBlob=key["CiphertextBlob"], EncryptionContext=CONTEXT)["Plaintext"] == key["Plaintext"]
    )
    blind = root.generate_data_key_without_plaintext(KeyId=arn, EncryptionContext=CONTEXT, **asked)
    assert "Plaintext" not in blind
    assert len(root.decrypt(CiphertextBlob=blind["CiphertextBlob"], EncryptionContext=CONTEXT)["Plaintext"]) == size


def test_a_data_key_of_one_size(root: Any, kms: KmsEmulator) -> None:
    arn = kms.create_key()
    for asked in ({}, {"KeySpec": "AES_256", "NumberOfBytes": 32}):
        with refused("ValidationException", "either number of bytes or key spec"):
            root.generate_data_key(KeyId=arn, **asked)


def test_re_encryption(root: Any, kms: KmsEmulator) -> None:
    one, other = kms.create_key(), kms.create_key()
    blob = root.encrypt(KeyId=one, Plaintext=b"x", EncryptionContext={"a": "b"})["CiphertextBlob"]
    request = {"CiphertextBlob": blob, "DestinationKeyId": other, "DestinationEncryptionContext": {"c": "d"}}
    moved = root.re_encrypt(**request, SourceKeyId=one, SourceEncryptionContext={"a": "b"})
    assert (moved["SourceKeyId"], moved["KeyId"]) == (one, other)
    opened = root.decrypt(CiphertextBlob=moved["CiphertextBlob"], EncryptionContext={"c": "d"})
    assert (opened["KeyId"], opened["Plaintext"]) == (other, b"x")
    with refused("InvalidCiphertextException"):
        root.re_encrypt(**request)
    with refused("IncorrectKeyException"):
        root.re_encrypt(**request, SourceKeyId=other)


def test_nothing_to_open(root: Any, kms: KmsEmulator) -> None:
    for ask in (root.decrypt, functools.partial(root.re_encrypt, DestinationKeyId=kms.create_key())):
        with refused("ValidationException", "CiphertextBlob is missing"):
            ask()


def test_a_policy_that_is_none(kms: KmsEmulator) -> None:
    with pytest.raises(KeyPolicyError):
        kms.create_key("{}")


def test_random_bytes(root: Any) -> None:
    values = {root.generate_random(NumberOfBytes=32)["Plaintext"] for _ in range(4)}
    assert [len(value) for value in values] == [32] * 4


# --- Signatures ----------------------------------------------------------------------------------------------------


def digest(algorithm: SHA256 | SHA384) -> bytes:
    hasher = Hash(algorithm)
    hasher.update(MESSAGE)
    return hasher.finalize()


@pytest.mark.parametrize("kind", ["RAW", "DIGEST"])
@pytest.mark.parametrize(
    ("spec", "algorithm", "hashed"),
    [
        ("ECC_NIST_P256", "ECDSA_SHA_256", SHA256()),
        ("ECC_NIST_P384", "ECDSA_SHA_384", SHA384()),
        ("RSA_2048", "RSASSA_PSS_SHA_384", SHA384()),
        ("RSA_2048", "RSASSA_PKCS1_V1_5_SHA_256", SHA256()),
    ],
)
def test_a_signature_verifies(
    kms: KmsEmulator, root: Any, kind: str, spec: str, algorithm: str, hashed: SHA256 | SHA384
) -> None:
    arn = kms.create_key(spec=spec, usage="SIGN_VERIFY")
    message = MESSAGE if kind == "RAW" else digest(hashed)
    answer = root.sign(KeyId=arn, Message=message, MessageType=kind, SigningAlgorithm=algorithm)
    assert (answer["KeyId"], answer["SigningAlgorithm"]) == (arn, algorithm)
    described = root.get_public_key(KeyId=arn)
    assert (described["KeySpec"], described["KeyUsage"]) == (spec, "SIGN_VERIFY")
    assert algorithm in described["SigningAlgorithms"]
    key = load_der_public_key(described["PublicKey"])
    if isinstance(key, ec.EllipticCurvePublicKey):
        key.verify(answer["Signature"], MESSAGE, ec.ECDSA(hashed))
    else:
        assert isinstance(key, rsa.RSAPublicKey)
        pss = padding.PSS(padding.MGF1(hashed), padding.PSS.DIGEST_LENGTH)
        key.verify(answer["Signature"], MESSAGE, pss if "PSS" in algorithm else padding.PKCS1v15(), hashed)


@pytest.mark.parametrize(
    ("change", "code"),
    [
        ({"KeyId": "arn:aws:kms:us-east-1:111122223333:key/none"}, "NotFoundException"),
        ({"KeyId": "arn:aws:kms:eu-west-1:111122223333:key/none"}, "NotFoundException"),
        ({"KeyId": "arn:aws:s3:::bucket"}, "InvalidArnException"),
        ({"KeyId": "arn:aws-cn:kms:us-east-1:111122223333:key/none"}, "InvalidArnException"),
        ({"KeyId": "alias/none"}, "NotFoundException"),
        ({"Message": bytes(47)}, "ValidationException"),
        ({"Message": bytes(4097), "MessageType": "RAW"}, "ValidationException"),
        ({"MessageType": "EXTERNAL_MU"}, "ValidationException"),
        ({"MessageType": "EXTERNAL"}, "ValidationException"),
        ({"SigningAlgorithm": "ECDSA_SHA_256"}, "InvalidKeyUsageException"),
        ({"SigningAlgorithm": "MD5"}, "ValidationException"),
    ],
    ids=str,
)
def test_what_sign_refuses(kms: KmsEmulator, root: Any, change: dict[str, Any], code: str) -> None:
    good = {
        "KeyId": kms.create_key(spec="ECC_NIST_P384", usage="SIGN_VERIFY"),
        "Message": digest(SHA384()),
        "MessageType": "DIGEST",
        "SigningAlgorithm": "ECDSA_SHA_384",
    }
    root.sign(**good)
    with refused(code):
        root.sign(**good | change)


def test_each_key_does_what_it_is_for(kms: KmsEmulator, root: Any) -> None:
    agreement = kms.create_key(spec="ECC_NIST_P384", usage="KEY_AGREEMENT")
    described = root.get_public_key(KeyId=agreement)
    assert (described["KeyUsage"], described["KeyAgreementAlgorithms"]) == ("KEY_AGREEMENT", ["ECDH"])
    assert "SigningAlgorithms" not in described
    symmetric = kms.create_key()
    for arn in (agreement, symmetric):
        with refused("InvalidKeyUsageException"):
            root.sign(KeyId=arn, Message=b"x", SigningAlgorithm="ECDSA_SHA_384")
    with refused("InvalidKeyUsageException"):
        root.encrypt(KeyId=agreement, Plaintext=b"x")
    with refused("InvalidKeyUsageException"):
        root.encrypt(KeyId=symmetric, Plaintext=b"x", EncryptionAlgorithm="RSAES_OAEP_SHA_256")
    with refused("UnsupportedOperationException"):
        root.get_public_key(KeyId=symmetric)


# --- All of them ---------------------------------------------------------------------------------------------------


def test_what_is_not_emulated_is_no_operation(root: Any) -> None:
    with refused("UnknownOperationException"):
        root.generate_mac(KeyId="x", Message=b"x", MacAlgorithm="HMAC_SHA_256")
    with refused("UnsupportedOperationException", "CustomKeyStoreId"):
        root.generate_random(NumberOfBytes=1, CustomKeyStoreId="cks-1234567890abcdef0")


def test_a_dry_run_says_what_would_be(root: Any, kms: KmsEmulator) -> None:
    arn = kms.create_key()
    for ask, request in (
        (root.encrypt, {"Plaintext": b"x"}),
        (root.create_grant, {"GranteePrincipal": "arn:aws:iam::111122223333:role/x", "Operations": ["Decrypt"]}),
    ):
        with refused("DryRunOperationException"):
            ask(KeyId=arn, DryRun=True, **request)
        with refused("NotFoundException"):
            ask(KeyId="none", DryRun=True, **request)
    assert root.list_grants(KeyId=arn)["Grants"] == []


def test_64_releases_at_once(kms: KmsEmulator, root: Any) -> None:
    arn, enclave = kms.create_key(), Recipient()
    plaintexts = [index.to_bytes(2, "big") for index in range(64)]
    blobs = [
        root.encrypt(KeyId=arn, Plaintext=each, EncryptionContext=CONTEXT)["CiphertextBlob"] for each in plaintexts
    ]
    documents = [enclave.nsm.attestation(public_key=enclave.spki) for _ in blobs]

    def release(blob: bytes, document: bytes) -> bytes:
        member = enclave.member(document)
        answer = root.decrypt(KeyId=arn, CiphertextBlob=blob, EncryptionContext=CONTEXT, Recipient=member)
        ciphertext: bytes = answer["CiphertextForRecipient"]
        return enclave.open(ciphertext).expose()

    with ThreadPoolExecutor(64) as threads:
        assert list(threads.map(release, blobs, documents)) == plaintexts


def test_two_emulators_share_nothing(kms: KmsEmulator, root: Any) -> None:
    blob = root.encrypt(KeyId=kms.create_key(), Plaintext=b"x")["CiphertextBlob"]
    with kms_emulator() as other, kms_client(other) as client:
        assert client.list_keys()["Keys"] == []
        with refused("AccessDeniedException", "does not exist"):
            client.decrypt(CiphertextBlob=blob)
