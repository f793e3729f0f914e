"""From a source to an image and its record: what is in them, that they are the same each time, and that a build that
fails leaves nothing.
"""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat

from attestation.eif import Architecture
from attestation.measure import read_image
from attestation.reference import PcrSet
from parent.image.blobs import BlobChoice
from parent.image.build import (
    MAX_CONFIGURATION,
    BuiltImage,
    ContainerArchive,
    ImagePlan,
    OciLayout,
    RootFolder,
    build_image,
)
from parent.image.dockerfile import ContainerBuild
from parent.image.signature import ImageSigner
from parent.image.tree import ImageBuildError
from tests import eif_files
from tests.parent.image.containers import Container, docker_archive, layout, tar
from tests.parent.image.independent import CMDLINE_TEXT, arm64_image, bzimage, read_in_order, unpack
from tests.parent.image.test_dockerfile import docker
from tests.parent.image.test_folder import filled
from tests.pki.forge import NOW

SIGNER = eif_files.Signer()


def quiet(what: str, done: int, total: int) -> None:
    pass


@pytest.fixture(autouse=True)
def temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where builds unpack. It is empty after each test."""
    folder = tmp_path / "temporary"
    folder.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    return folder


def blobs(folder: Path, **changes: Any) -> BlobChoice:
    made = folder / "blobs"
    made.mkdir(parents=True)
    (made / "bzImage").write_bytes(bzimage())
    (made / "Image").write_bytes(arm64_image())
    (made / "init").write_bytes(b"init")
    (made / "cmdline").write_text(CMDLINE_TEXT + "\n")
    return BlobChoice(**{"folder": str(made), **changes})


def plan_of(folder: Path, **changes: Any) -> ImagePlan:
    root = filled(folder / "root")
    source = RootFolder(root)
    return ImagePlan(**{"source": source, "blobs": blobs(folder), "cmd": ("/bin/tool", "a b"), **changes})


def build(plan: ImagePlan, out: Path, **options: Any) -> BuiltImage:
    built = build_image(plan, out, progress=quiet, **options)
    assert sorted(path.name for path in out.parent.glob(f"*{out.name}*")) == [out.name, f"{out.name}.provenance.json"]
    return built


def ramdisks(path: Path) -> list[dict[bytes, Any]]:
    return [unpack(data) for kind, data in read_in_order(path.read_bytes()).sections if kind == 3]


def record(built: BuiltImage) -> dict[str, Any]:
    value = json.loads(built.record.read_bytes())
    assert isinstance(value, dict)
    return value


def dependencies(built: BuiltImage) -> dict[str, dict[str, str]]:
    found = record(built)["predicate"]["buildDefinition"]["resolvedDependencies"]
    return {each["name"]: each["digest"] for each in found}


# --- What is in an image -------------------------------------------------------------------------------------------


def test_an_image_of_a_root_folder(tmp_path: Path) -> None:
    configuration = tmp_path / "enclave.toml"
    configuration.write_bytes(b"[model]\n")
    plan = plan_of(tmp_path, configuration=configuration, env=("A=1", "B=x=y"), name="demo", version="7", epoch=86400)
    built = build(plan, tmp_path / "demo.eif")
    image = read_image(tmp_path / "demo.eif")
    independent = read_in_order((tmp_path / "demo.eif").read_bytes())
    assert image.measurements == built.image.measurements
    assert [value.hex() for value in image.measurements.as_registers().values()] == list(independent.pcrs.values())
    image.require_boundary()
    assert image.cmdline == CMDLINE_TEXT
    boot, customer = ramdisks(built.path)
    assert set(boot) == {b"dev", b"init"}
    assert (customer[b"cmd"].content, customer[b"env"].content) == (b"/bin/tool\na b\n", b"A=1\nB=x=y\n")
    assert customer[b"rootfs/etc/strongroom/enclave.toml"].content == b"[model]\n"
    assert customer[b"rootfs/bin/tool"].content == b"tool"
    assert customer[b"rootfs/bin/tool"].mode & 0o7777 == 0o4755
    assert {b"rootfs/dev", b"rootfs/run", b"rootfs/sys", b"rootfs/var", b"rootfs/proc", b"rootfs/tmp"} < set(customer)
    assert image.metadata is not None
    assert (image.metadata["ImageName"], image.metadata["ImageVersion"]) == ("demo", "7")
    assert image.metadata["BuildMetadata"]["BuildTime"] == "1970-01-02T00:00:00+00:00"  # type: ignore[index, call-overload]


def test_the_first_ramdisk_as_each_init_wants_it(tmp_path: Path) -> None:
    module = tmp_path / "nsm.ko"
    module.write_bytes(b"module")
    choice = blobs(tmp_path / "x", cmdline_copy=True, nsm_module=module)
    built = build(plan_of(tmp_path, blobs=choice), tmp_path / "e.eif")
    boot = ramdisks(built.path)[0]
    assert set(boot) == {b"dev", b"init", b"cmdline", b"nsm.ko"}
    assert boot[b"cmdline"].content == CMDLINE_TEXT.encode()


@pytest.mark.parametrize("kind", ["oci", "archive", "rootfs", "dockerfile"])
def test_the_same_files_from_every_source_have_the_same_registers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    container = Container([tar({"bin/": None, "bin/hello": b"hello"})], {"Entrypoint": ["/bin/hello"], "Env": ["A=1"]})
    (tmp_path / "rootfs" / "bin").mkdir(parents=True)
    (tmp_path / "rootfs" / "bin" / "hello").write_bytes(b"hello")
    (tmp_path / "rootfs" / "bin" / "hello").chmod(0o644)
    layout(container).write(tmp_path / "layout")
    (tmp_path / "container.tar").write_bytes(docker_archive((container, ["app:1"])))
    choice = blobs(tmp_path)
    reference = build(ImagePlan(source=OciLayout(tmp_path / "layout"), blobs=choice), tmp_path / "first.image")
    match kind:
        case "oci":
            plan = ImagePlan(source=OciLayout(tmp_path / "layout"), blobs=choice)
        case "archive":
            plan = ImagePlan(source=ContainerArchive(tmp_path / "container.tar", "app:1"), blobs=choice)
        case "rootfs":
            source = RootFolder(tmp_path / "rootfs")
            plan = ImagePlan(source=source, blobs=choice, cmd=("/bin/hello",), env=("A=1",))
        case _:
            docker(tmp_path, monkeypatch)
            (tmp_path / "archive").write_bytes((tmp_path / "container.tar").read_bytes())
            (tmp_path / "Dockerfile").write_text("FROM scratch")
            (tmp_path / "context").mkdir()
            arguments = ("BASE=oci:/home/somebody/base", "A=1", "FILE=/tmp/x")
            asked = ContainerBuild(
                dockerfile=tmp_path / "Dockerfile", context=tmp_path / "context", build_args=arguments
            )
            plan = ImagePlan(source=asked, blobs=choice)
    built = build(plan, tmp_path / "e.eif")
    assert built.image.measurements == reference.image.measurements
    source_said = record(built)["predicate"]["buildDefinition"]["externalParameters"]["source"]
    assert source_said["kind"] == kind
    if kind == "dockerfile":
        assert source_said["buildArgs"] == ["BASE=oci:base", "A=1", "FILE=x"]


def test_for_aarch64(tmp_path: Path) -> None:
    built = build(plan_of(tmp_path, architecture=Architecture.AARCH64), tmp_path / "e.eif")
    assert read_image(built.path).architecture is Architecture.AARCH64


def test_variables_of_the_caller_take_the_place_of_the_container_s(tmp_path: Path) -> None:
    runs = {"Cmd": ["/x"], "Env": ["PATH=/bin", "A=1", "B=2"]}
    source = OciLayout(layout(Container([tar({"x": b""})], runs)).write(tmp_path / "layout"))
    plan = ImagePlan(source=source, blobs=blobs(tmp_path), env=("A=changed", "C=3"))
    assert ramdisks(build(plan, tmp_path / "e.eif").path)[1][b"env"].content == b"PATH=/bin\nA=changed\nB=2\nC=3\n"


def test_what_has_no_effect_is_told(tmp_path: Path) -> None:
    runs = {"Cmd": ["/x"], "User": "app", "WorkingDir": "/srv"}
    source = OciLayout(layout(Container([tar({"x": b"", "y.pyc": b""})], runs)).write(tmp_path / "layout"))
    notes = build(ImagePlan(source=source, blobs=blobs(tmp_path, cmdline_copy=True)), tmp_path / "e.eif").notes
    assert [note.split()[0] for note in notes] == ["1", "USER", "WORKDIR"]
    for user, folder in (("root", "/"), ("0:0", ""), ("", "/")):
        quiet_runs = {"Cmd": ["/x"], "User": user, "WorkingDir": folder}
        layout(Container([tar({"x": b""})], quiet_runs)).write(tmp_path / f"layout{user}{len(folder)}")
        choice = BlobChoice(folder=str(tmp_path / "blobs"), cmdline_copy=True)
        plan = ImagePlan(source=OciLayout(tmp_path / f"layout{user}{len(folder)}"), blobs=choice)
        assert build(plan, tmp_path / "other.eif").notes == ()


def test_that_no_init_compares_the_command_line_is_told(tmp_path: Path) -> None:
    [note] = build(plan_of(tmp_path / "aws"), tmp_path / "aws.eif").notes
    assert "these registers fit any boundary between kernel and command line" in note
    own = plan_of(tmp_path / "own", blobs=blobs(tmp_path / "other", cmdline_copy=True))
    assert build(own, tmp_path / "own.eif").notes == ()


# --- The same each time --------------------------------------------------------------------------------------------


def test_the_same_inputs_give_the_same_bytes(tmp_path: Path) -> None:
    images, records = set(), set()
    for name in ("one", "two"):
        built = build(plan_of(tmp_path / name), tmp_path / name / "e.eif")
        images.add(built.path.read_bytes())
        records.add(built.record.read_bytes())
        os.utime(tmp_path / name / "root" / "bin", (1, 1))
    assert len(images) == len(records) == 1


def test_no_register_is_over_the_build_time(tmp_path: Path) -> None:
    plan = plan_of(tmp_path)
    one, two = build(plan, tmp_path / "1.eif"), build(replace(plan, epoch=1), tmp_path / "2.eif")
    assert one.image.measurements == two.image.measurements
    assert one.image.sha384 != two.image.sha384


def test_a_signature_adds_pcr8_and_changes_no_other(tmp_path: Path) -> None:
    plan = plan_of(tmp_path)
    signer = ImageSigner.from_pem(key_pem(), SIGNER.pem())
    plain = build(plan, tmp_path / "plain.eif")
    signed = [build(plan, tmp_path / f"{number}.eif", signer=signer) for number in range(2)]
    assert signed[0].path.read_bytes() == signed[1].path.read_bytes()
    registers = signed[0].image.measurements
    assert PcrSet(registers.pcr0, registers.pcr1, registers.pcr2) == plain.image.measurements
    assert registers.pcr8 == SIGNER.pcr8()
    certificate = read_image(signed[0].path, at=NOW).signer
    assert certificate is not None
    digest = hashlib.sha256(certificate.der).hexdigest()
    assert dependencies(signed[0])["signing certificate"] == {"sha256": digest}


def key_pem() -> bytes:
    return SIGNER.key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())


# --- The record ----------------------------------------------------------------------------------------------------


def is_descriptor(value: Any) -> bool:
    """in-toto's ResourceDescriptor, version 1: these fields, and one of name, uri and digest at least."""
    fields = {"name", "uri", "digest", "content", "downloadLocation", "mediaType", "annotations"}
    digests = value.get("digest", {})
    return (
        value.keys() <= fields
        and bool(value.keys() & {"uri", "digest", "content"})
        and all(isinstance(text, str) and text == text.lower() for pair in digests.items() for text in pair)
    )


def test_the_record_has_the_published_fields(tmp_path: Path) -> None:
    configuration = tmp_path / "enclave.toml"
    configuration.write_bytes(b"x")
    built = build(plan_of(tmp_path, configuration=configuration), tmp_path / "e.eif")
    statement = record(built)
    assert statement.keys() == {"_type", "subject", "predicateType", "predicate"}
    assert statement["_type"] == "https://in-toto.io/Statement/v1"
    assert statement["predicateType"] == "https://slsa.dev/provenance/v1"
    [subject] = statement["subject"]
    assert is_descriptor(subject)
    data = built.path.read_bytes()
    digests = {name: hashlib.new(name, data).hexdigest() for name in ("sha256", "sha384")}
    assert (subject["name"], subject["digest"]) == ("e.eif", digests)
    assert subject["annotations"] == {
        f"PCR{index}": value.hex() for index, value in built.image.measurements.as_registers().items()
    }
    definition, run = (statement["predicate"][name] for name in ("buildDefinition", "runDetails"))
    assert statement["predicate"].keys() == {"buildDefinition", "runDetails"}
    assert definition.keys() <= {"buildType", "externalParameters", "internalParameters", "resolvedDependencies"}
    assert {"buildType", "externalParameters"} <= definition.keys()
    assert ":" in definition["buildType"]
    assert run.keys() <= {"builder", "metadata", "byproducts"}
    assert run["builder"].keys() <= {"id", "builderDependencies", "version"}
    assert ":" in run["builder"]["id"]
    assert all(isinstance(text, str) for pair in run["builder"]["version"].items() for text in pair)
    assert all(map(is_descriptor, [*definition["resolvedDependencies"], *run["byproducts"]]))
    assert dependencies(built) == {
        "rootfs": {"sha256": built.root[7:]},
        "kernel": {"sha256": hashlib.sha256(bzimage()).hexdigest()},
        "init": {"sha256": hashlib.sha256(b"init").hexdigest()},
        "cmdline": {"sha256": hashlib.sha256(CMDLINE_TEXT.encode()).hexdigest()},
        "enclave.toml": {"sha256": hashlib.sha256(b"x").hexdigest()},
    }
    assert str(tmp_path) not in built.record.read_text()


# --- What fails ----------------------------------------------------------------------------------------------------


def leaves_nothing(folder: Path, fail: Callable[[], object], error: type[BaseException]) -> BaseException:
    before = sorted(folder.rglob("*"))
    with pytest.raises(error) as caught:
        fail()
    assert sorted(folder.rglob("*")) == before
    return caught.value


@pytest.mark.parametrize(
    ("changes", "code"),
    [
        ({"cmd": None}, "bad_command"),
        ({"cmd": ("",)}, "bad_command"),
        ({"cmd": ("a\nb",)}, "bad_command"),
        ({"env": ("A",)}, "bad_environment"),
        ({"epoch": -1}, "bad_epoch"),
        ({"epoch": 1 << 60}, "bad_epoch"),
        ({"name": "\ud800"}, "bad_metadata"),
        ({"blobs": BlobChoice(folder="/nonexistent")}, "missing_blobs"),
        ({"source": RootFolder(Path("/nonexistent"))}, "unreadable_source"),
        ({"source": ContainerArchive(Path("/nonexistent"))}, "unreadable_source"),
    ],
)
def test_what_makes_no_image(tmp_path: Path, changes: dict[str, Any], code: str) -> None:
    plan = plan_of(tmp_path, **changes)
    error = leaves_nothing(tmp_path, lambda: build(plan, tmp_path / "e.eif"), ImageBuildError)
    assert isinstance(error, ImageBuildError)
    assert error.code == code


def test_a_kernel_of_another_architecture(tmp_path: Path) -> None:
    (tmp_path / "k").mkdir()
    (tmp_path / "k" / "kernel").write_bytes(arm64_image())
    plan = plan_of(tmp_path, blobs=blobs(tmp_path / "x", kernel=tmp_path / "k" / "kernel"))
    leaves_nothing(tmp_path, lambda: build(plan, tmp_path / "e.eif"), ImageBuildError)


def test_a_configuration_that_cannot_be_placed(tmp_path: Path) -> None:
    configuration = tmp_path / "enclave.toml"
    configuration.write_bytes(b"x" * (MAX_CONFIGURATION + 1))
    plan = plan_of(tmp_path, configuration=configuration)
    leaves_nothing(tmp_path, lambda: build(plan, tmp_path / "e.eif"), ImageBuildError)
    configuration.write_bytes(b"x")
    (tmp_path / "root" / "etc" / "strongroom" / "enclave.toml").mkdir(parents=True)
    leaves_nothing(tmp_path, lambda: build(plan, tmp_path / "e.eif"), ImageBuildError)
    (tmp_path / "root" / "etc" / "strongroom" / "enclave.toml").rmdir()
    (tmp_path / "root" / "etc" / "strongroom").rmdir()
    (tmp_path / "root" / "etc" / "strongroom").symlink_to("/tmp")
    leaves_nothing(tmp_path, lambda: build(plan, tmp_path / "e.eif"), ImageBuildError)


def test_a_configuration_takes_the_place_of_the_source_s(tmp_path: Path) -> None:
    configuration = tmp_path / "enclave.toml"
    configuration.write_bytes(b"ours")
    plan = plan_of(tmp_path, configuration=configuration)
    (tmp_path / "root" / "etc" / "strongroom").mkdir(parents=True)
    (tmp_path / "root" / "etc" / "strongroom" / "enclave.toml").write_bytes(b"theirs")
    customer = ramdisks(build(plan, tmp_path / "e.eif").path)[1]
    assert customer[b"rootfs/etc/strongroom/enclave.toml"].content == b"ours"


@pytest.mark.parametrize("step", ["hashing the root file system", "writing the image", "reading it again"])
def test_an_interrupt_leaves_nothing_and_what_was_there(tmp_path: Path, step: str) -> None:
    plan = plan_of(tmp_path)
    (tmp_path / "e.eif").write_bytes(b"an older one")

    def interrupt(what: str, done: int, total: int) -> None:
        if what == step:
            raise KeyboardInterrupt

    leaves_nothing(tmp_path, lambda: build_image(plan, tmp_path / "e.eif", progress=interrupt), KeyboardInterrupt)
    assert (tmp_path / "e.eif").read_bytes() == b"an older one"


def test_a_variable_that_a_container_has_twice(tmp_path: Path) -> None:
    source = OciLayout(
        layout(Container([tar({"x": b""})], {"Cmd": ["/x"], "Env": ["A=1", "A=2"]})).write(tmp_path / "layout")
    )
    with pytest.raises(ImageBuildError, match="bad_environment"):
        build(ImagePlan(source=source, blobs=blobs(tmp_path)), tmp_path / "e.eif")
