"""``strongroom init`` for each thing that an enclave runs in."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import pytest

from attestation.commitment import Entropy
from attestation.envelope import EnvelopePurpose
from attestation.keypolicy.document import KeyArn
from attestation.manifest import ModelManifest
from enclave.config import EnclaveConfiguration, EngineSettings
from strongroom.kms.options import NamedKeys
from strongroom.prepare import KmsSettings, PrepareError, Settings, Target, enclave_toml
from strongroom.profiles import PROFILES
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


# --- The engine's budgets --------------------------------------------------------------------------------------------


Init = Callable[..., EngineSettings]


@pytest.fixture
def init(strongroom: Terminal, model: Path, tmp_path: Path) -> Init:
    """The engine of the configuration that ``init`` writes with these options."""

    def engine(*options: str) -> EngineSettings:
        folder = tmp_path / "demo"
        ran = strongroom("init", "--target", "nitro", "--model", str(model), "--directory", str(folder), *options)
        assert ran.code == 0, ran.err
        return EnclaveConfiguration.parse((folder / "enclave.toml").read_bytes()).engine

    return engine


def test_without_budgets_the_context_bounds_both(init: Init) -> None:
    engine = init()
    assert (engine.prompt_tokens, engine.answer_tokens, engine.reasoning_tokens) == (0, 0, 0)
    assert (engine.longest_prompt, engine.longest_answer) == (2047, 2047)


def test_the_reference_s_profile(init: Init) -> None:
    engine = init("--profile", "reference")
    assert (engine.context, engine.parallel) == (2560, 4)
    assert (engine.longest_prompt, engine.longest_answer) == (2048, 512)


def test_options_go_before_a_profile(init: Init) -> None:
    engine = init("--context", "4096", "--profile", "reference", "--answer-tokens", "1024", "--reasoning-tokens", "300")
    assert (engine.context, engine.parallel) == (4096, 4)
    assert (engine.longest_prompt, engine.longest_answer, engine.reasoning_tokens) == (2048, 1024, 300)


def test_every_profile_is_in_the_help_and_is_one_that_an_enclave_takes(strongroom: Terminal, model: Path) -> None:
    text = " ".join(strongroom("init", "--help").out.split())
    for name, profile in PROFILES.items():
        assert f"{name}: {profile.about}." in text
        sizes = {key: value for key, value in asdict(profile).items() if key != "about"}
        assert asdict(written(model, Settings(**sizes)).engine).items() >= sizes.items()


@pytest.mark.parametrize(
    ("budgets", "least"),
    [
        ({"prompt_tokens": 2048}, 2049),
        ({"answer_tokens": 2048}, 2049),
        ({"reasoning_tokens": 2048}, 2049),
        ({"prompt_tokens": 1537, "answer_tokens": 512}, 2049),
    ],
)
def test_budgets_that_the_context_cannot_hold(model: Path, budgets: dict[str, int], least: int) -> None:
    """They are refused before anything is written, and one token less is what an enclave takes."""
    with pytest.raises(PrepareError) as raised:
        Settings(**budgets)  # type: ignore[arg-type]
    assert (raised.value.code, raised.value.expected) == ("wrong_budgets", f"context >= {least}")
    assert written(model, Settings(context=least, **budgets)).engine.context == least  # type: ignore[arg-type]


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
