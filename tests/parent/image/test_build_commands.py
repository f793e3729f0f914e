"""``strongroom image build`` and ``image reproduce``, as they are typed."""

from __future__ import annotations

import json
import os
import shlex
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import pytest
from click.testing import CliRunner, Result

from attestation.eif import Architecture, measurements_from_nitro_cli
from attestation.errors import StrongroomError
from attestation.measure import read_image
from attestation.release_signing import LocalSigner, Signer
from parent.image.blobs import BlobChoice
from parent.image.build import ContainerArchive, ImagePlan, OciLayout, RootFolder
from parent.image.commands import build, reproduce, source_options, take_plan
from parent.image.dockerfile import ContainerBuild
from parent.image.reproduce import arguments_of
from tests import eif_files
from tests.parent.image.containers import Container, layout, tar
from tests.parent.image.independent import bzimage
from tests.parent.image.test_build import key_pem
from tests.parent.image.test_folder import filled
from tests.terminal import AS_FROM_THE_FRONT_DOOR

ARN = "arn:aws:kms:eu-central-1:111122223333:key/0c6b6d4e-5f0a-4b4e-9a1c-111111111111"
SIGNER = eif_files.Signer()


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a root, a layout, blobs and a key; what is unpacked goes to a folder of its own."""
    (tmp_path / "temporary").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("SOURCE_DATE_EPOCH", raising=False)
    filled(tmp_path / "root")
    layout(Container([tar({"bin/": None, "bin/hello": b"hello"})])).write(tmp_path / "layout")
    (tmp_path / "blobs").mkdir()
    (tmp_path / "blobs" / "bzImage").write_bytes(bzimage())
    (tmp_path / "blobs" / "init").write_bytes(b"init")
    (tmp_path / "blobs" / "cmdline").write_text("console=ttyS0")
    (tmp_path / "key.pem").write_bytes(key_pem())
    (tmp_path / "certificate.pem").write_bytes(SIGNER.pem())
    (tmp_path / "both.pem").write_bytes(key_pem() + SIGNER.pem())
    (tmp_path / "Dockerfile").write_text("FROM scratch")
    return tmp_path


def no_kms(arn: str) -> Signer:
    raise AssertionError(arn)


def run(command: click.Command, text: str, signers: Callable[[str], Signer] = no_kms) -> Result:
    return CliRunner().invoke(command, shlex.split(text), obj=signers, **AS_FROM_THE_FRONT_DOOR)


def built(text: str, **options: Any) -> Result:
    result = run(build, f"--blobs blobs {text}", **options)
    assert result.exit_code == 0, result.output
    return result


def test_it_prints_what_a_person_needs() -> None:
    said = built("--rootfs root --cmd '/bin/tool --all' --out e.eif").stdout
    image = read_image(Path("e.eif"))
    for text in ("e.eif", "e.eif.provenance.json", "/bin/tool --all", image.measurements.pcr0.hex()):
        assert text in said
    assert [line.split()[0] for line in said.splitlines()] == [
        "image", "record", "root", "runs", "boots", "kernel", "init", "PCR0", "PCR1", "PCR2", "note",
    ]  # fmt: skip


def test_json_is_what_nitro_cli_prints() -> None:
    result = built("--oci layout --json")
    assert measurements_from_nitro_cli(result.stdout.encode()) == read_image(Path("enclave.eif")).measurements
    assert result.stderr == ""


def test_what_goes_on_is_told_without_a_terminal() -> None:
    said = built("--oci layout").stderr
    assert [line.strip() for line in said.splitlines()] == [
        "unpacking layer 1 of 1",
        "hashing the root file system",
        "writing the image",
        "reading it again",
    ]


def test_what_a_container_says_cannot_move_a_cursor(here: Path) -> None:
    runs = {"Cmd": ["/x\x1b[2J"], "User": "\x1b[2J"}
    layout(Container([tar({"x": b""})], runs)).write(here / "hostile")
    said = built("--oci hostile").stdout
    assert all(line.isprintable() for line in said.splitlines())


@pytest.mark.parametrize("options", ["--sign key.pem --certificate certificate.pem", "--sign both.pem"])
def test_a_key_file_signs(options: str) -> None:
    built(f"--oci layout {options}")
    assert read_image(Path("enclave.eif")).measurements.pcr8 == SIGNER.pcr8()


def test_a_kms_key_signs() -> None:
    asked = []

    def signers(arn: str) -> Signer:
        asked.append(arn)
        return LocalSigner(SIGNER.key)

    built(f"--oci layout --sign {ARN} --certificate certificate.pem", signers=signers)
    assert asked == [ARN]
    assert read_image(Path("enclave.eif")).measurements.pcr8 == SIGNER.pcr8()


def test_source_date_epoch_is_taken_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    def built_at() -> str:
        built("--oci layout")
        metadata: Any = read_image(Path("enclave.eif")).metadata
        return str(metadata["BuildMetadata"]["BuildTime"])

    assert built_at().startswith("1970-01-01T00:00:00")
    monkeypatch.setenv("SOURCE_DATE_EPOCH", "1700000000")
    assert built_at().startswith("2023-11-14")


@pytest.mark.parametrize(
    "text",
    [
        "",
        "--rootfs root --oci layout",
        "--rootfs root --context .",
        "--rootfs root --build-arg A=1",
        "--rootfs root --tag x",
        "--dockerfile Dockerfile --tag x",
        "--rootfs root --env A",
        "--rootfs root --env 'A=1\n2'",
        "--rootfs root --cmd 'a \"b'",
        "--oci layout --blobs nowhere",
        "--oci layout --certificate certificate.pem",
        f"--oci layout --sign {ARN}",
        "--oci layout --source-date-epoch -1",
        "--oci nowhere",
        "--rootfs root --architecture riscv64",
    ],
)
def test_usage(text: str) -> None:
    result = run(build, text)
    assert result.exit_code == 2
    assert "Error" in result.stderr
    assert not Path("enclave.eif").exists()


@pytest.mark.parametrize(
    ("text", "code"),
    [
        ("--rootfs root", "bad_command"),
        ("--oci root", "missing_blob"),
        ("--archive key.pem", "malformed_archive"),
        ("--oci layout --sign certificate.pem", "unusable_key"),
        ("--oci layout --sign key.pem", "unusable_certificate"),
        ("--oci layout --architecture aarch64", "missing_blobs"),
    ],
)
def test_errors_have_codes(text: str, code: str) -> None:
    result = run(build, f"--blobs blobs {text}")
    assert isinstance(result.exception, StrongroomError)
    assert (result.exception.code, result.exception.exit_code) == (code, 2)
    assert not Path("enclave.eif").exists()


@pytest.mark.parametrize("command", [build, reproduce])
def test_help_has_examples(command: click.Command) -> None:
    said = run(command, "--help").stdout
    assert "Example" in said
    assert f"strongroom image {command.name} --" in said
    assert "Exit codes" in said


# --- The plan as options, and back ---------------------------------------------------------------------------------


@click.command()
@source_options
@click.pass_context
def plan_command(ctx: click.Context, /, **options: Any) -> None:
    """What the options mean."""
    ctx.obj.append(take_plan(options))


def plans() -> list[ImagePlan]:
    kernel = Path("blobs/bzImage")
    given = BlobChoice(kernel=kernel, init=kernel, cmdline="a  b", nsm_module=kernel, cmdline_copy=False)
    file = Path("Dockerfile").absolute()
    return [
        ImagePlan(source=RootFolder(Path("root"))),
        ImagePlan(source=OciLayout(Path("layout"), "a:1"), blobs=given, cmd=("a b", "", "'"), env=("A=", "B= c")),
        ImagePlan(source=ContainerArchive(Path("key.pem")), configuration=Path("key.pem"), epoch=7),
        ImagePlan(
            source=ContainerBuild(
                dockerfile=file,
                context=file.parent,
                build_args=("A=1", "B"),
                secrets=("id=a,src=/x",),
                target="x",
                engine="docker",
            ),
            blobs=BlobChoice(folder="own", cmdline_copy=True),
            architecture=Architecture.AARCH64,
            name="a b",
            version="2",
        ),
    ]


@pytest.mark.parametrize("index", range(4))
def test_a_plan_is_the_same_when_it_goes_through_options(index: int) -> None:
    plan, taken = plans()[index], list[ImagePlan]()
    result = CliRunner().invoke(plan_command, arguments_of(plan), obj=taken)
    assert result.exit_code == 0, result.output
    assert taken == [plan]


def test_the_context_of_a_dockerfile_is_its_folder() -> None:
    taken: list[ImagePlan] = []
    CliRunner().invoke(plan_command, ["--dockerfile", "Dockerfile"], obj=taken)
    assert isinstance(taken[0].source, ContainerBuild)
    assert taken[0].source.context == Path(".")


def test_the_folder_is_as_it_was(here: Path) -> None:
    before = {path for path in here.rglob("*") if path.is_file()}
    run(build, "--blobs blobs --rootfs root")
    run(reproduce, "--blobs blobs --rootfs root")
    assert {path for path in here.rglob("*") if path.is_file()} == before
    assert os.listdir(here / "temporary") == []


def test_reproduce_as_json_and_for_a_person() -> None:
    found = json.loads(run(reproduce, "--blobs blobs --oci layout --json").stdout)
    assert found["reproduced"] is found["records_equal"] is True
    assert found["images"][0] == found["images"][1]
    assert found["differences"] == []
    assert "TZ" in found["varied"]
    said = run(reproduce, "--blobs blobs --oci layout").stdout
    assert "reproduced: both images have" in said
    assert found["images"][0]["Measurements"]["PCR0"] in said
