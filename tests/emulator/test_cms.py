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
if not VECTORS.is_dir():
    pytest.skip(f"no vectors in {VECTORS}", allow_module_level=True)
INDEX: list[dict[str, Any]] = json.loads((VECTORS / "INDEX.json").read_text())["vectors"]


def fields(vector: dict[str, Any], form: ContentForm = ContentForm.CONSTRUCTED) -> EnvelopedData:
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
        form,
    )


@pytest.mark.parametrize("vector", INDEX, ids=lambda vector: str(vector["name"]))
def test_the_same_parts_give_the_bytes_that_aws_sent(vector: dict[str, Any]) -> None:
    assert fields(vector).encode() == (VECTORS / vector["file"]).read_bytes()


def test_the_primitive_form_differs_in_the_content_alone() -> None:
    vector = INDEX[0]
    constructed = fields(vector).encode()
    primitive = fields(vector, ContentForm.PRIMITIVE).encode()
    content = bytes.fromhex(vector["encrypted_content_hex"])
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
