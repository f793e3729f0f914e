"""One contract, held by ``strongroom nitro ...`` and by the scripts, over the stand-in for nitro-cli."""

from __future__ import annotations

import json
import os
import shlex
import stat
from pathlib import Path

import pytest

from attestation.measure import read_image
from parent.nitro.build import Build, build
from tests.eif_files import Signer, image
from tests.nitro_hosts import IMAGE, REPOSITORY, SCRIPTS, NitroHost, Said, nitro_cli_text, ran

ALL = pytest.mark.parametrize("front", ["command", "script"])
SIZE = ["--memory-mib", "512", "--cpus", "2"]


async def run(host: NitroHost, front: str, *arguments: str | Path) -> Said:
    """``run`` on this host's /sys."""
    return await host.run(front, "run", "--root", host.root, *arguments)


# --- run ------------------------------------------------------------------------------------------------------------


@ALL
async def test_an_enclave_starts_once(host: NitroHost, eif: Path, front: str) -> None:
    first = await run(host, front, eif, *SIZE, "--cid", "16", "--json")
    again = await run(host, front, eif, *SIZE, "--cid", "16", "--json")
    assert (first.status, again.status) == (0, 0), first.err + again.err
    assert (first.json["started"], again.json["started"]) == (True, False)
    assert first.json["id"] == again.json["id"]
    assert first.json["pcrs"]["0"] == read_image(eif).measurements.pcr0.hex()
    assert len(host.enclaves) == 1
    (started,) = [call for call in host.calls if call[0] == "run-enclave"]
    assert started == [
        "run-enclave", "--eif-path", str(eif), "--enclave-name", "enclave", "--memory", "512", "--cpu-count", "2",
        "--enclave-cid", "16",
    ]  # fmt: skip


@ALL
async def test_a_dry_run_checks_and_starts_nothing(host: NitroHost, eif: Path, front: str) -> None:
    said = await run(host, front, eif, *SIZE, "--dry-run")
    assert said.status == 0, said.err
    assert said.out.startswith(f"run nitro-cli run-enclave --eif-path {eif}")
    assert [call[0] for call in host.calls] == ["describe-enclaves"]
    refused = await run(host, front, eif, "--memory-mib", "8192", "--cpus", "2", "--dry-run")
    assert refused.status == 4
    assert "hugepages_missing" in refused.err


async def test_what_would_run_can_be_pasted_into_a_shell(host: NitroHost, eif: Path) -> None:
    spaced = eif.rename(eif.with_name("an $(image).eif"))
    said = await run(host, "command", spaced, *SIZE, "--name", "x", "--dry-run")
    words = shlex.split(said.out)
    assert words[:4] == ["run", "nitro-cli", "run-enclave", "--eif-path"]
    assert words[4] == str(spaced)


@ALL
@pytest.mark.parametrize(
    ("options", "status", "code", "words"),
    [
        (["--memory-mib", "4", "--cpus", "2"], 2, "memory_too_small", ["--memory-mib 64", "4 MiB"]),
        (["--memory-mib", "4098", "--cpus", "2"], 4, "hugepages_missing", ["--memory-mib 4098", "4096 MiB free"]),
        (["--memory-mib", "512", "--cpus", "6"], 4, "cpus_missing", ["--cpus 6", "4 free of the 4"]),
        (["--memory-mib", "512", "--cpus", "3"], 2, "bad_cpus", ["a multiple of 2"]),
        ([*SIZE, "--cid", "3"], 2, "bad_cid", ["4..4294967294"]),
        ([*SIZE, "--cid", "0"], 2, "bad_cid", ["4..4294967294"]),
        ([*SIZE, "--name", "../x"], 2, "bad_request", ["name"]),
    ],
)
async def test_what_cannot_be_is_said_in_numbers_before_anything_is_started(
    host: NitroHost, eif: Path, front: str, options: list[str], status: int, code: str, words: list[str]
) -> None:
    said = await run(host, front, eif, *options)
    assert said.status == status
    for word in (code, *words):
        assert word in said.err
    assert "Traceback" not in said.err
    assert not any(call[0] == "run-enclave" for call in host.calls)


@ALL
async def test_a_cid_belongs_to_one(host: NitroHost, eif: Path, front: str) -> None:
    assert (await run(host, front, eif, *SIZE, "--cid", "16", "--name", "one")).status == 0
    said = await run(host, front, eif, *SIZE, "--cid", "16", "--name", "other")
    assert said.status == 2
    assert "cid_in_use" in said.err
    assert "one has this CID" in said.err
    assert len(host.enclaves) == 1


@ALL
async def test_another_enclave_of_the_name_stays(host: NitroHost, eif: Path, front: str) -> None:
    assert (await run(host, front, eif, *SIZE)).status == 0
    said = await run(host, front, eif, "--memory-mib", "1024", "--cpus", "2")
    assert (said.status, len(host.enclaves)) == (2, 1)
    assert "already_running" in said.err


@ALL
async def test_a_broken_image_is_refused_before_nitro_cli_sees_it(host: NitroHost, eif: Path, front: str) -> None:
    data = bytearray(eif.read_bytes())
    data[-1] ^= 1
    eif.write_bytes(data)
    said = await run(host, front, eif, *SIZE)
    assert said.status == 2
    assert "wrong_crc" in said.err
    assert host.calls == []


@ALL
@pytest.mark.parametrize(
    ("fault", "status", "code"),
    [("cid-in-use", 4, "start_refused"), ("not-in-group", 4, "not_in_group"), ("bad-eif", 2, "bad_image")],
)
async def test_what_nitro_cli_refuses_is_explained(
    host: NitroHost, eif: Path, front: str, fault: str, status: int, code: str
) -> None:
    host.know(faults={"run-enclave": fault})
    said = await run(host, front, eif, *SIZE, "--json")
    assert said.status == status
    assert said.json["error"]["code"] == code


async def test_a_host_without_the_driver_says_so(host: NitroHost, eif: Path) -> None:
    (host.root / "sys/module/nitro_enclaves/parameters/ne_cpus").unlink()
    said = await run(host, "command", eif, *SIZE)
    assert said.status == 4
    assert "driver_missing" in said.err


# --- Debug mode, describe, console ----------------------------------------------------------------------------------


@ALL
async def test_debug_mode_is_asked_for_by_name_and_said_aloud(host: NitroHost, eif: Path, front: str) -> None:
    said = await run(host, front, eif, *SIZE, "--debug-mode", "--json")
    assert said.status == 0
    assert "nothing in it is protected" in " ".join(said.err.split())
    assert said.json["pcrs"] is None
    assert said.json["debug"] is True
    listed = await host.run(front, "describe", "--json")
    assert listed.json[0]["measurements"] is None
    assert listed.json[0]["build_measurements"]["PCR0"] == read_image(eif).measurements.pcr0.hex()
    assert "registers PCR0, 1, 2 and 8 are zero" in " ".join(listed.err.split())
    assert (await run(host, front, eif, *SIZE)).status == 2  # the debug enclave is not what is asked for now
    console = await host.run(front, "console", "enclave", "--disconnect-timeout", "5")
    assert console.status == 0
    assert "Linux version" in console.out
    assert host.calls[-1] == ["console", "--enclave-id", host.enclaves[0]["EnclaveID"], "--disconnect-timeout", "5"]


@ALL
async def test_without_its_name_there_is_no_debug_mode(host: NitroHost, eif: Path, front: str) -> None:
    said = await run(host, front, eif, *SIZE)
    assert "DEBUG" not in said.out + said.err
    assert "--debug-mode" not in host.calls[1]
    console = await host.run(front, "console", "enclave")
    assert console.status == 2
    assert "not_debug" in console.err
    assert not any(call[0] == "console" for call in host.calls)


@ALL
async def test_describing_says_what_runs(host: NitroHost, eif: Path, front: str) -> None:
    assert (await host.run(front, "describe")).out == "no enclaves\n"
    assert (await run(host, front, eif, *SIZE, "--cid", "16")).status == 0
    said = await host.run(front, "describe")
    assert f"enclave  {host.enclaves[0]['EnclaveID']}  CID 16  512 MiB  CPUs 2,3  RUNNING\n" == said.out
    assert (await host.run(front, "describe", "--dry-run")).out == "run nitro-cli describe-enclaves\n"


@ALL
async def test_an_enclave_whose_image_has_no_name_is_one_like_others(host: NitroHost, eif: Path, front: str) -> None:
    """nitro-cli leaves out what the image's metadata does not say."""
    host.know(unknown=["ImageName", "ImageVersion"])
    first, again = [await run(host, front, eif, *SIZE, "--cid", "16", "--json") for _ in range(2)]
    assert (first.status, again.status) == (0, 0), first.err + again.err
    assert (first.json["started"], again.json["started"]) == (True, False)
    assert "ImageName" not in host.enclaves[0]
    listed = (await host.run(front, "describe", "--json")).json
    assert listed[0]["measurements"]["PCR0"] == read_image(eif).measurements.pcr0.hex()
    assert (await host.run(front, "terminate", "enclave")).status == 0
    assert host.enclaves == []


# --- terminate ------------------------------------------------------------------------------------------------------


@ALL
async def test_ending_is_done_once(host: NitroHost, eif: Path, front: str) -> None:
    assert (await run(host, front, eif, *SIZE)).status == 0
    enclave = host.enclaves[0]["EnclaveID"]
    dry = await host.run(front, "terminate", "enclave", "--dry-run")
    assert dry.out == f"run nitro-cli terminate-enclave --enclave-id {enclave}\n"
    assert len(host.enclaves) == 1
    first, again = [await host.run(front, "terminate", "enclave") for _ in range(2)]
    assert (first.status, first.out) == (0, f"terminated {enclave}\n")
    assert (again.status, again.out) == (0, "enclave does not run\n")
    assert host.enclaves == []


async def test_another_users_enclave_is_not_said_to_be_gone(host: NitroHost, eif: Path) -> None:
    assert (await run(host, "command", eif, *SIZE)).status == 0
    host.know(faults={"terminate-enclave": "another-user"})
    said = await host.run("command", "terminate", "enclave")
    assert said.status == 4
    assert "enclave_unanswering" in said.err


@ALL
async def test_all_are_ended(host: NitroHost, eif: Path, front: str) -> None:
    for name in ("one", "other"):
        assert (await run(host, front, eif, *SIZE, "--name", name)).status == 0
    said = await host.run(front, "terminate", "--all", "--json")
    assert len(said.json["terminated"]) == 2
    assert host.enclaves == []
    assert (await host.run(front, "terminate")).status == 2


# --- build ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def dockerfile(host: NitroHost) -> Path:
    """And what will be built of it."""
    (host.folder / "built.eif").write_bytes(IMAGE.encode())
    host.know(build_measurements=nitro_cli_text(IMAGE))
    path = host.folder / "Dockerfile.enclave"
    path.write_text("FROM scratch\n")
    return path


@ALL
async def test_an_image_is_built_and_measured_twice(host: NitroHost, dockerfile: Path, front: str) -> None:
    said = await host.run(front, "build", "--build-arg", "NATIVE=0", "--output", "out.eif")
    assert said.status == 0, said.err
    assert f"PCR0  {read_image(host.folder / 'out.eif').measurements.pcr0.hex()}" in said.out
    assert json.loads((host.folder / "out.eif.measurements.json").read_text())["Measurements"] == nitro_cli_text(IMAGE)
    docker, built = host.calls
    tagged = ["--file", "Dockerfile.enclave", "--tag", "strongroom-enclave"]
    assert docker == ["docker", "build", *tagged, "--build-arg", "NATIVE=0", "."]
    assert built[:4] == ["build-enclave", "--docker-uri", "strongroom-enclave", "--output-file"]
    private = Path(built[4]).parent
    assert private.parent == host.folder
    assert private.name.startswith(".out.eif.")
    assert not list(host.folder.glob(".out*"))


async def test_measurements_are_never_there_before_their_image(
    host: NitroHost, dockerfile: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They are made where only this user can write, and the image takes its place first."""
    renamed = []

    def rename(source: Path, target: Path) -> Path:
        assert stat.S_IMODE(source.parent.stat().st_mode) == 0o700
        renamed.append(target.name)
        return Path(source.rename(target))

    monkeypatch.setattr(Path, "replace", rename)
    monkeypatch.setenv("PATH", host.environment["PATH"])
    await build(Build(dockerfile=dockerfile, context=host.folder, output=host.folder / "o.eif"), host.cli(monkeypatch))
    assert renamed == ["o.eif", "o.eif.measurements.json"]


@ALL
async def test_two_measurements_that_differ_are_no_image(host: NitroHost, dockerfile: Path, front: str) -> None:
    host.know(build_measurements={**nitro_cli_text(IMAGE), "PCR2": "ab" * 48})
    (host.folder / "enclave.eif").write_bytes(b"the one before")
    said = await host.run(front, "build")
    assert said.status == 3
    assert "measurements_differ" in said.err
    assert "PCR2" in said.err
    assert (host.folder / "enclave.eif").read_bytes() == b"the one before"
    assert not (host.folder / "enclave.eif.measurements.json").exists()


async def test_a_signed_image_has_a_register_of_its_own(host: NitroHost, dockerfile: Path) -> None:
    signer = Signer()
    (host.folder / "built.eif").write_bytes(IMAGE.signed(signer).encode())
    certificate = host.folder / "signer.pem"
    certificate.write_bytes(signer.pem())
    key = "arn:aws:kms:eu-central-1:111122223333:key/1234abcd-12ab-34cd-56ef-1234567890ab"
    unsigned = await host.run("command", "build", "--sign", key, "--certificate", certificate)
    assert unsigned.status == 3  # nitro-cli says nothing of PCR8, and the file has it
    host.know(build_measurements={**nitro_cli_text(IMAGE), "PCR8": signer.pcr8().hex()})
    said = await host.run("command", "build", "--sign", key, "--certificate", certificate, "--json")
    assert said.status == 0, said.err
    assert said.json["Measurements"]["PCR8"] == signer.pcr8().hex()
    assert host.calls[-1][-4:] == ["--signing-certificate", str(certificate), "--private-key", key]
    assert (await host.run("command", "build", "--sign", key)).status == 2


@ALL
async def test_the_policy_is_written_with_the_image(host: NitroHost, dockerfile: Path, front: str) -> None:
    options = ["--output", "out.eif", "--policy", "policy.toml"]
    dry = await host.run(front, "build", *options, "--dry-run", "--", "--kms-condition", "key-policy.json")
    assert dry.status == 0, dry.err
    assert dry.out.splitlines()[-1] == (
        "run strongroom image policy out.eif --out policy.toml --kms-condition key-policy.json"
    )
    assert host.calls == []
    (host.folder / "policy.toml").write_text("mine")
    said = await host.run(front, "build", *options)
    assert said.status == 2
    assert "policy.toml: File exists" in said.err
    assert (host.folder / "policy.toml").read_text() == "mine"


KMS = ["--kms-condition", "key-policy.json", "--use", "model", "--context", "production"]
KMS += ["--user", "arn:aws:iam::111122223333:role/parent"]


@ALL
async def test_an_image_its_policy_and_what_kms_asks(host: NitroHost, dockerfile: Path, front: str) -> None:
    said = await host.run(front, "build", "--policy", "policy.toml", "--json", "--", *KMS)
    assert said.status == 0, said.err
    built, policy = (json.loads(line) for line in said.out.splitlines())
    pcr0 = read_image(host.folder / "enclave.eif").measurements.pcr0.hex()
    assert built["Measurements"]["PCR0"] == pcr0
    assert policy
    assert pcr0 in (host.folder / "policy.toml").read_text()
    condition = (host.folder / "key-policy.json").read_text()
    assert "kms:RecipientAttestation:PCR0" in condition
    assert pcr0 in condition.lower()


@ALL
async def test_building_twice_leaves_the_policies(host: NitroHost, dockerfile: Path, front: str) -> None:
    options = ["--policy", "policy.toml", "--", *KMS]
    first, again = [await host.run(front, "build", *options) for _ in range(2)]
    assert (first.status, again.status) == (0, 0), first.err + again.err
    assert "wrote policy.toml\n" in first.out
    assert "unchanged policy.toml\n" in again.out


async def test_a_policy_that_cannot_be_written_is_the_commands_end(host: NitroHost, dockerfile: Path) -> None:
    options = ["--policy", "policy.toml", "--", "--use", "model"]
    said = await host.run("command", "build", *options)
    assert said.status == 2
    assert "--kms-condition" in said.err
    assert (host.folder / "enclave.eif").exists()


@ALL
@pytest.mark.parametrize(
    ("state", "code"),
    [
        ({"docker": 1}, "docker_failed"),
        ({"faults": {"build-enclave": "no-image"}}, "docker_failed"),
        ({"faults": {"build-enclave": "no-blobs"}}, "build_failed"),
        ({"faults": {"build-enclave": "says:{}"}}, "malformed_measurements"),
    ],
)
async def test_a_build_that_fails_leaves_nothing(
    host: NitroHost, dockerfile: Path, front: str, state: dict[str, object], code: str
) -> None:
    host.know(**state)
    said = await host.run(front, "build")
    assert said.status in (2, 4)
    assert code in said.err
    assert not list(host.folder.glob("*enclave.eif*"))


@ALL
async def test_a_docker_without_buildkit_is_told_what_to_do(host: NitroHost, dockerfile: Path, front: str) -> None:
    host.know(docker_says="the --mount option requires BuildKit. Refer to a page")
    said = await host.run(front, "build")
    assert said.status == 4
    assert said.err.startswith("the --mount option requires BuildKit. Refer to a page\n")
    assert "install its buildx" in said.err
    assert "docker_failed" in said.err


# --- The scripts ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("command", "script"), SCRIPTS.items())
async def test_a_script_says_what_it_is_for(host: NitroHost, command: str, script: str) -> None:
    path = REPOSITORY / "scripts" / script
    assert os.stat(path).st_mode & stat.S_IXUSR
    said = await host.run("script", command, "--help")
    assert said.status == 0
    assert f"scripts/{script} " in said.out
    assert f"Usage: strongroom nitro {command}" in said.out
    assert "--dry-run" in said.out


@pytest.mark.parametrize("script", [each for each in SCRIPTS.values() if each != "bootstrap-parent"])
async def test_a_dry_run_makes_no_installation(host: NitroHost, tmp_path: Path, script: str) -> None:
    """In a checkout where nothing is there yet."""
    scripts = tmp_path / "checkout/scripts"
    scripts.mkdir(parents=True)
    for name in (script, "parent.sh"):
        (scripts / name).write_bytes((REPOSITORY / "scripts" / name).read_bytes())
        (scripts / name).chmod(0o755)
    bare = {name: value for name, value in host.environment.items() if name != "STRONGROOM"}
    said = await ran([str(scripts / script), "--dry-run", "x"], bare, tmp_path)
    assert (said.status, said.err) == (0, "")
    assert said.out.splitlines()[0] == f"run {scripts}/setup"
    helped = await ran([str(scripts / script), "--help"], bare, tmp_path)
    assert (helped.status, helped.err) == (0, "")
    assert f"scripts/{script} " in helped.out


def test_the_images_of_these_tests_differ() -> None:
    assert IMAGE.registers() != image().registers()
