"""KMS's CiphertextForRecipient: any bytes open, or are a CmsError."""

from __future__ import annotations

from attestation.secret import Secret
from enclave.kms.cms import CmsError, decrypt, open_enveloped, parse
from scripts import vectors_cms

CONTENT_KEY = Secret(vectors_cms.CONTENT_KEY)


def one_input(data: bytes) -> None:
    refused = ""
    try:
        enveloped = parse(data)
        assert len(enveloped.encrypted_key) == 256, "an encrypted key of another length"
        assert enveloped.ciphertext, "no ciphertext"
        assert len(enveloped.ciphertext) % 16 == 0, "a ciphertext that is not of blocks"
        decrypt(enveloped, CONTENT_KEY)
        open_enveloped(data, vectors_cms.KEY)
    except CmsError as error:
        refused = str(error)
    assert refused.isprintable(), "an error that can move a terminal's cursor"


def seeds() -> list[bytes]:
    return [
        vectors_cms.KMS.encode(),
        vectors_cms.Answer(form=vectors_cms.definite).encode(),
        vectors_cms.Answer(form=vectors_cms.wasteful).encode(),
        vectors_cms.Answer(content=vectors_cms.chunks(*(bytes(8) for _ in range(6)))).encode(),
        vectors_cms.Answer(content=vectors_cms.definite(0x80, bytes(32))).encode(),
    ]
