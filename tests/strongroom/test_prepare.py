"""``strongroom init`` for each thing that an enclave runs in."""

from __future__ import annotations

from pathlib import Path

import pytest

from attestation.commitment import Entropy
from attestation.envelope import EnvelopePurpose
from attestation.keypolicy.document import KeyArn
from attestation.manifest import ModelManifest
from enclave.config import EnclaveConfiguration
from strongroom.kms.options import NamedKeys
from strongroom.prepare import KmsSettings, PrepareError, Settings, Target, enclave_toml
from tests.gguf_files import TEXT, Gguf
from tests.terminal import Terminal
from vsockrpc.address import VMADDR_CID_ANY, UnixAddress, VsockAddress

KEY = KeyArn.parse("arn:aws:kms:eu-west-1:111122223333:key/1234abcd-12ab-34cd-56ef-1234567890ab")


@pytest.fixture
def model(tmp_path: Path) -> Path:
    path = tmp_path / "tiny.gguf"
    path.write_bytes(Gguf([("tokenizer.chat_template", TEXT, "{{ messages }}")]).encode())
    return path


def kms(purpose: EnvelopePurpose) -> KmsSettings:
    return KmsSettings(NamedKeys({purpose: KEY}, "demo", (), "model.enc"))


def written(model: Path, settings: Settings) -> EnclaveConfiguration:
    text = enclave_toml(ModelManifest.from_gguf(model), settings)
    assert max(map(len, text.splitlines())) < 200
    return EnclaveConfiguration.parse(text.encode())


@pytest.mark.parametrize(
    ("target", "nsm"), [(Target.NITRO, "device:/dev/nsm"), (Target.QEMU, "vsock:3:5008")], ids=["nitro", "qemu"]
)
def test_an_image_names_its_parent_as_nitro_does(model: Path, target: Target, nsm: str) -> None:
    configuration = written(model, Settings(target=target, kms=kms(EnvelopePurpose.PROMPT)))
    assert configuration.listen == VsockAddress(VMADDR_CID_ANY, 5005)
    assert configuration.model_store == VsockAddress(3, 5006)
    assert configuration.kms is not None
    assert configuration.kms.egress == VsockAddress(3, 5007)
    assert configuration.nsm == nsm
    assert configuration.entropy is Entropy.NSM_HWRNG
    assert configuration.manifest == ModelManifest.from_gguf(model).digest()


def test_a_process_has_its_sockets_beside_it(model: Path) -> None:
    configuration = written(model, Settings(kms=kms(EnvelopePurpose.MODEL)))
    assert configuration.listen == UnixAddress("rpc.sock")
    assert (configuration.nsm, configuration.model_store) == ("unix:nsm.sock", UnixAddress("models.sock"))
    assert configuration.entropy is Entropy.HOST


def test_weights_in_the_image_are_named_by_their_file(model: Path) -> None:
    configuration = written(model, Settings(target=Target.NITRO, weights_inside=True))
    assert configuration.model_store == Path("/opt/strongroom/tiny.gguf")


def test_weights_in_the_image_have_no_key(model: Path) -> None:
    with pytest.raises(PrepareError) as raised:
        written(model, Settings(target=Target.NITRO, weights_inside=True, kms=kms(EnvelopePurpose.MODEL)))
    assert raised.value.code == "encrypted_inside"
    written(model, Settings(target=Target.NITRO, weights_inside=True, kms=kms(EnvelopePurpose.PROMPT)))


@pytest.mark.parametrize("target", ["nitro", "qemu"])
def test_init_for_an_image_writes_the_configuration_and_says_where_the_policy_comes_from(
    strongroom: Terminal, model: Path, tmp_path: Path, target: str
) -> None:
    folder = tmp_path / "demo"
    ran = strongroom("init", "--target", target, "--model", str(model), "--directory", str(folder))
    assert ran.code == 0
    assert [path.name for path in folder.iterdir()] == ["enclave.toml"]
    assert "strongroom image policy" in ran.out


def test_init_for_an_image_in_json(strongroom: Terminal, model: Path, tmp_path: Path) -> None:
    ran = strongroom(
        "init", "--target", "nitro", "--model", str(model), "--directory", str(tmp_path / "demo"), "--json"
    )
    body = ran.json
    assert body["enclave"] == str(tmp_path / "demo" / "enclave.toml")
    assert body["policy"] is None


def test_weights_inside_of_no_image(strongroom: Terminal, model: Path, tmp_path: Path) -> None:
    ran = strongroom("init", "--weights-inside", "--model", str(model), "--directory", str(tmp_path / "demo"))
    assert ran.code == 2
    assert "--target" in ran.err
