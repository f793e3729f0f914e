"""The CMS writer against AWS's own answers: the same fields give the same bytes."""

from __future__ import annotations

import hashlib
import json
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric import rsa
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat

from emulator.cms import ContentForm, EnvelopedData, envelop

VECTORS = Path(__file__).resolve().parents[3] / "shared" / "vectors" / "kms"
NAMES = ("edgebit-datakey", "aws-samples-eth-signer", "waas-0b78d081", "ned-readme", "aws-sdk-c-constructed")


def fields(vector: dict[str, Any]) -> EnvelopedData:
    content = bytes.fromhex(vector["encrypted_content_hex"])
    chunks, start = [], 0
    for size in vector["encrypted_content_chunks"]:
        chunks.append(content[start : start + size])
        start += size
    assert start == len(content)
    return EnvelopedData(
        bytes.fromhex(vector["rid_hex"]),
        bytes.fromhex(vector["encrypted_key_hex"]),
        bytes.fromhex(vector["iv_hex"]),
        tuple(chunks),
        ContentForm.CONSTRUCTED,
    )


@pytest.mark.skipif(not VECTORS.is_dir(), reason="AWS's own answers are not beside this repository")
@pytest.mark.parametrize("name", NAMES)
def test_the_same_parts_give_the_bytes_that_aws_sent(name: str) -> None:
    vectors = {vector["name"]: vector for vector in json.loads((VECTORS / "INDEX.json").read_text())["vectors"]}
    assert vectors.keys() == set(NAMES)
    assert fields(vectors[name]).encode() == (VECTORS / vectors[name]["file"]).read_bytes()


def test_the_primitive_form_differs_in_the_content_alone() -> None:
    content = hashlib.shake_256(b"content").digest(48)
    parts = (bytes(32), bytes(256), bytes(16), (content,))
    constructed = EnvelopedData(*parts, ContentForm.CONSTRUCTED).encode()
    primitive = EnvelopedData(*parts, ContentForm.PRIMITIVE).encode()
    written = bytes([0xA0, 0x80, 0x04, len(content)]) + content + bytes(2)
    assert constructed.count(written) == 1
    assert primitive == constructed.replace(written, bytes([0x80, len(content)]) + content)


@pytest.mark.skipif(shutil.which("openssl") is None, reason="no openssl command here, the second opinion")
@pytest.mark.parametrize("form", ContentForm)
@pytest.mark.parametrize("size", [0, 1, 15, 16, 32, 200, 4096])
def test_openssl_opens_it(form: ContentForm, size: int, tmp_path: Path) -> None:
    key = rsa.generate_private_key(65537, 2048)
    plaintext = hashlib.shake_256(b"plaintext").digest(size)
    (tmp_path / "cms").write_bytes(envelop(plaintext, key.public_key(), form))
    (tmp_path / "key").write_bytes(key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))
    command = ["openssl", "cms", "-decrypt", "-inform", "DER", "-in", "cms", "-inkey", "key", "-out", "plain"]
    subprocess.run(command, cwd=tmp_path, check=True, capture_output=True)
    assert (tmp_path / "plain").read_bytes() == plaintext
