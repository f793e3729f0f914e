"""``strongroom doctor``: its exit codes, what it prints, and what it reads of a configuration."""

from __future__ import annotations

import base64
import json
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from attestation.model_memory import Work
from parent.doctor import command
from parent.doctor.command import ConfigurationUnread, Settings, printable, what_is_wanted
from parent.doctor.findings import Aim
from parent.egress import Allowed, AllowListError
from parent.image.cpio import archive
from parent.image.facts import CPU_FEATURES
from parent.image.tree import File, Tree
from tests.doctor_hosts import KMS, S3, FakeMachine
from tests.eif_files import image
from tests.gguf_files import tiny_model
from tests.terminal import AS_FROM_THE_FRONT_DOOR

KMS_TABLE = '[kms]\nregion = "us-east-1"\nendpoint = "kms.us-east-1.amazonaws.com:443"\n'


@pytest.fixture
def model(tmp_path: Path) -> Path:
    (tmp_path / "model.gguf").write_bytes(tiny_model().encode())
    return tmp_path / "model.gguf"


@pytest.fixture
def eif(tmp_path: Path) -> Path:
    features = b"avx2\nfma\n"
    ramdisk = b"".join(archive(Tree.of([File.holding(f"rootfs/usr{CPU_FEATURES}", features)])))
    (tmp_path / "enclave.eif").write_bytes(image(ramdisks=(ramdisk,)).encode())
    return tmp_path / "enclave.eif"


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FakeMachine:
    there = FakeMachine.parent(tmp_path / "parent")
    monkeypatch.setattr(command, "Host", lambda: there)
    return there


def run(*arguments: object) -> Result:
    return CliRunner().invoke(
        command.doctor, [str(each) for each in arguments], standalone_mode=False, **AS_FROM_THE_FRONT_DOOR
    )


def configuration(tmp_path: Path, text: str) -> Path:
    (tmp_path / "enclave.toml").write_text(text)
    return tmp_path / "enclave.toml"


def test_a_machine_that_is_ready_ends_with_0(machine: FakeMachine, model: Path, eif: Path, tmp_path: Path) -> None:
    config = configuration(tmp_path, KMS_TABLE + 'trust = "AMAZON"\n')
    result = run("--model", model, "--image", eif, "--config", config, "--reach", S3)
    assert result.return_value == 0
    assert result.output.splitlines()[-1] == "nothing hinders `strongroom start --launcher nitro`"
    assert "all 2 that the image needs: avx2 fma" in result.output
    assert machine.trusted == {KMS: None, S3: None}


def test_a_machine_that_is_not_ends_with_1_and_says_what_to_do(machine: FakeMachine, model: Path) -> None:
    machine.remove("dev/vsock")
    result = run("--model", model)
    assert result.return_value == 1
    assert result.output.splitlines()[-1] == "1 to mend for `strongroom start --launcher nitro`"
    lines = result.output.splitlines()
    at = lines.index("PROBLEM vsock         the kernel has no vsock")
    assert lines[at + 1].strip() == "expected /dev/vsock; got nothing"
    assert lines[at + 2].strip().startswith("do: sudo modprobe vsock")


def test_what_is_asked_decides(machine: FakeMachine) -> None:
    machine.remove("dev/vsock")
    assert run("--for", "process").return_value == 0
    assert run("--for", "nitro").return_value == 1
    assert run("--for", "qemu").return_value == 1  # no tools


def test_json_has_every_finding(machine: FakeMachine, eif: Path) -> None:
    machine.remove("dev/vsock")
    result = run("--json", "--image", eif)
    answer = json.loads(result.output)
    assert (answer["for"], answer["problems"], result.return_value) == ("nitro", 1, 1)
    (finding,) = (each for each in answer["findings"] if each["level"] == "problem")
    assert finding == {
        "check": "vsock",
        "level": "problem",
        "found": "the kernel has no vsock",
        "expected": "/dev/vsock",
        "got": "nothing",
        "todo": "sudo modprobe vsock (and virtio_vsock where it is a module)",
    }


def test_the_configuration_gives_context_and_kms(tmp_path: Path, model: Path) -> None:
    root = base64.b64encode(b"a certificate").decode()
    text = f'[engine]\ncontext = 512\nbatch = 64\n{KMS_TABLE}trust = "EMULATED"\nroot = "{root}"\n'
    settings = Settings.read(configuration(tmp_path, text))
    assert settings == Settings(Work(512, batch=64), KMS, b"a certificate")
    wanted = what_is_wanted(Aim.NITRO, None, model, settings, 2, [str(S3)])
    assert wanted.places == ((KMS, b"a certificate"), (S3, None))
    assert wanted.kms == KMS
    assert wanted.plan is not None
    assert any(part.rule.startswith("2 x 512 tokens") for part in wanted.plan.parts)


def test_without_a_configuration_the_images_own_counts(tmp_path: Path, model: Path) -> None:
    text = b'[engine]\ncontext = 512\nparallel = 3\nkv_type = "q8_0"\n'
    ramdisk = b"".join(archive(Tree.of([File.holding("rootfs/etc/strongroom/enclave.toml", text)])))
    (tmp_path / "enclave.eif").write_bytes(image(ramdisks=(ramdisk,)).encode())

    def rule(settings: Settings, parallel: int | None) -> str:
        wanted = what_is_wanted(Aim.NITRO, tmp_path / "enclave.eif", model, settings, parallel, [])
        assert wanted.plan is not None
        return next(part.rule for part in wanted.plan.parts if part.name == "key-value cache")

    assert rule(Settings(), None) == "3 x 512 tokens, 1 layers, q8_0"
    assert rule(Settings(), 2) == "2 x 512 tokens, 1 layers, q8_0"
    assert rule(Settings(Work(1024)), None) == "4 x 1024 tokens, 1 layers, f16"


def test_kms_may_be_elsewhere(tmp_path: Path) -> None:
    settings = Settings.read(configuration(tmp_path, KMS_TABLE + 'trust = "AMAZON"\n'))
    elsewhere = Allowed.parse(f"{KMS.asked}=127.0.0.1:8443")
    wanted = what_is_wanted(Aim.NITRO, None, None, settings, None, [str(elsewhere)])
    assert wanted.places == ((elsewhere, None),)
    assert wanted.kms == elsewhere


def test_a_configuration_without_kms_names_no_place(tmp_path: Path) -> None:
    assert Settings.read(configuration(tmp_path, "version = 1\n")) == Settings(Work())
    assert what_is_wanted(Aim.PROCESS, None, None, Settings(), None, []).places == ()


@pytest.mark.parametrize(
    "text",
    [
        "not TOML",
        "engine = 1\n",
        '[engine]\ncontext = "much"\n',
        "[engine]\ncells = 1\n",
        "[engine]\ncontext = 0\n",
        "[kms]\n",
        "kms = 1\n",
        KMS_TABLE,
        KMS_TABLE + 'trust = "EMULATED"\n',
        KMS_TABLE + 'trust = "EMULATED"\nroot = "?"\n',
        "a = " + "[" * 5000,
    ],
)
def test_a_configuration_that_cannot_be_read_is_an_error(tmp_path: Path, text: str) -> None:
    with pytest.raises(ConfigurationUnread) as caught:
        Settings.read(configuration(tmp_path, text))
    assert (caught.value.code, caught.value.exit_code) == ("bad_configuration", 2)


def test_an_endpoint_that_is_none_is_an_error(tmp_path: Path) -> None:
    text = '[kms]\nendpoint = "kms"\ntrust = "AMAZON"\n'
    with pytest.raises(AllowListError):
        Settings.read(configuration(tmp_path, text))


def test_what_a_machine_says_is_one_line() -> None:
    assert printable("a\nb\x1b[2J\u202ec") == "a?b?[2J?c"
