"""What KMS answers an enclave with: our vectors, AWS's own answers, and any bytes whatever."""

from __future__ import annotations

import json
from contextlib import suppress
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric import rsa
from cryptography.hazmat.primitives.serialization import load_der_private_key
from hypothesis import example, given
from hypothesis import strategies as st

from attestation.secret import Secret
from enclave.kms.cms import MAX_SIZE, CmsError, decrypt, open_enveloped, parse, recipient_id, unwrap
from scripts import vectors_cms
from scripts.vectors_cms import KEY, KMS, Answer, cbc, chunks, definite, indefinite, octets, pad, wasteful

REPOSITORY = Path(__file__).resolve().parents[3]
OURS = REPOSITORY / "tests" / "vectors" / "cms"
REAL = REPOSITORY.parent / "shared" / "vectors" / "kms"


def key_in(path: Path) -> rsa.RSAPrivateKey:
    key = load_der_private_key(path.read_bytes(), None)
    assert isinstance(key, rsa.RSAPrivateKey)
    return key


# --- Vectors ----------------------------------------------------------------------------------------------------------


def test_the_vectors_are_those_that_the_script_makes() -> None:
    assert {path.name: path.read_bytes() for path in OURS.iterdir()} == dict(vectors_cms.files())


@pytest.mark.parametrize("name", sorted(path.stem for path in OURS.glob("*.json")))
def test_vector(name: str) -> None:
    vector = json.loads((OURS / f"{name}.json").read_text())
    ber, key = bytes.fromhex(vector["cms"]), key_in(OURS / "key.der")
    if vector["expect"] == "accepted":
        assert open_enveloped(ber, key) == Secret(bytes.fromhex(vector["plaintext"]))
        return
    with pytest.raises(CmsError) as refused:
        open_enveloped(ber, key)
    assert refused.value.code == vector["expect"]
    assert str(refused.value).isprintable()


def real() -> list[dict[str, Any]]:
    if not REAL.is_dir():
        return []
    vectors: list[dict[str, Any]] = json.loads((REAL / "INDEX.json").read_text())["vectors"]
    return vectors


@pytest.mark.skipif(not REAL.is_dir(), reason="AWS's own answers are not beside this repository: ../shared/vectors/kms")
class TestRealAnswers:
    def test_there_are_three_that_open_and_one_with_its_content_key_and_one_that_parses(self) -> None:
        assert [("key_file" in each, "content_key_hex" in each) for each in real()] == [
            (True, True),
            (True, True),
            (True, True),
            (False, True),
            (False, False),
        ]

    @pytest.mark.parametrize("vector", real(), ids=lambda vector: vector["name"])
    def test_answer(self, vector: dict[str, Any]) -> None:
        ber = (REAL / vector["file"]).read_bytes()
        enveloped = parse(ber)
        assert enveloped.key_id.hex() == vector["rid_hex"]
        assert enveloped.encrypted_key.hex() == vector["encrypted_key_hex"]
        assert enveloped.iv.hex() == vector["iv_hex"]
        assert enveloped.ciphertext.hex() == vector["encrypted_content_hex"]
        if "content_key_hex" in vector:
            content_key = Secret(bytes.fromhex(vector["content_key_hex"]))
            plaintext = Secret((REAL / vector["plaintext_file"]).read_bytes())
            assert decrypt(enveloped, content_key) == plaintext
            assert plaintext.expose().hex() == vector["plaintext_hex"]
        if "key_file" in vector:
            key = key_in(REAL / vector["key_file"])
            assert recipient_id(key.public_key()) == enveloped.key_id
            assert unwrap(enveloped, key) == content_key
            assert open_enveloped(ber, key) == plaintext


# --- Properties -------------------------------------------------------------------------------------------------------

FORMS = st.sampled_from([definite, indefinite, wasteful])


def cut(data: bytes, places: list[int]) -> list[bytes]:
    edges = [0, *sorted(place % (len(data) + 1) for place in places), len(data)]
    return [data[start:end] for start, end in pairwise(edges)]


@given(st.binary(max_size=600), st.lists(st.integers(0, 1 << 20), max_size=40), FORMS, FORMS, st.data())
def test_content_in_any_chunks_opens(
    plaintext: bytes, places: list[int], outer: vectors_cms.Form, inner: vectors_cms.Form, data: st.DataObject
) -> None:
    parts = cut(cbc(pad(plaintext)), places)
    grouped = data.draw(st.integers(0, len(parts)))
    nested = inner(0x24, b"".join(map(octets, parts[:grouped])))
    content = outer(0xA0, nested + b"".join(map(octets, parts[grouped:])))
    assert open_enveloped(Answer(content=content, form=outer).encode(), KEY) == Secret(plaintext)


@pytest.mark.parametrize("extra", ["0500", "020102"])
def test_a_field_more_anywhere_is_an_error(extra: str) -> None:
    """The library meets some of them with an IndexError."""
    data = KMS.encode()
    for at in range(len(data) + 1):
        with pytest.raises(CmsError):
            open_enveloped(data[:at] + bytes.fromhex(extra) + data[at:], KEY)


@example(bytes.fromhex("b4800000"))  # an indefinite length with nothing in it, found by fuzzing
@given(st.binary(max_size=200))
def test_any_bytes_are_an_error(data: bytes) -> None:
    with pytest.raises(CmsError):
        open_enveloped(data, KEY)


@given(st.data())
def test_changed_bytes_open_to_something_or_are_an_error(data: st.DataObject) -> None:
    changed = bytearray(KMS.encode())
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, len(changed)))
        changed[at : at + data.draw(st.integers(0, 3))] = data.draw(st.binary(max_size=3))
    with suppress(CmsError):
        open_enveloped(bytes(changed), KEY)


def test_the_bound_is_met() -> None:
    empty = len(replaced(b"").encode())
    room = (MAX_SIZE - empty - 2) // 16 * 16  # its length takes two bytes more than an empty one's
    assert parse(replaced(bytes(room)).encode()).ciphertext == bytes(room)
    with pytest.raises(CmsError, match="too long"):
        parse(replaced(bytes(room + 16)).encode())


def replaced(ciphertext: bytes) -> Answer:
    return Answer(content=chunks(ciphertext))


# --- What failures tell -----------------------------------------------------------------------------------------------


def test_failures_of_decryption_are_all_alike() -> None:
    said = set()
    for path in OURS.glob("*.json"):
        vector = json.loads(path.read_text())
        if vector["expect"] == "undecryptable_cms":
            with pytest.raises(CmsError) as refused:
                open_enveloped(bytes.fromhex(vector["cms"]), KEY)
            assert refused.value.__cause__ is None
            assert refused.value.__suppress_context__ or refused.value.__context__ is None
            said.add(json.dumps(refused.value.as_json()))
    assert len(said) == 1


def test_what_opens_shows_itself_nowhere() -> None:
    opened = open_enveloped(KMS.encode(), KEY)
    assert opened.expose() == vectors_cms.PLAINTEXT
    assert f"{opened} {opened!r}" == "Secret(32 bytes) Secret(32 bytes)"
    assert repr(unwrap(parse(KMS.encode()), KEY)) == "Secret(32 bytes)"


def test_a_key_of_another_size_is_the_callers_mistake() -> None:
    with pytest.raises(ValueError, match="2048 bits, not 3072"):
        unwrap(parse(KMS.encode()), rsa.generate_private_key(65537, 3072))
