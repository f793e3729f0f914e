"""The egress as a host runs it: by its own command, or beside an enclave that is started here."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import socket
import sys
import tempfile
from collections.abc import AsyncIterator, Iterator
from dataclasses import replace
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

import cbor2
import click
import httpx2
import pytest

from attestation.envelope import MAGIC
from attestation.gguf import ModelError
from attestation.manifest import ModelManifest
from attestation.reference import digest_text
from parent import egress_service
from parent.config import KmsAccess, LaunchConfiguration, LaunchConfigurationError
from parent.credentials import from_instance_metadata
from parent.egress import Allowed, AllowListError
from parent.egress_service import EgressError, EgressSettings, report_defect, serve_egress
from parent.launch.process import MEMORY_SLACK, ProcessMachine
from parent.launch.supervisor import Launch, Supervisor
from parent.modelstore import ModelStore
from parent.registry import Registry
from parent.start_command import egress_settings, pinned_model
from tests.gguf_files import tiny_model
from tests.metadata import ACCESS_KEY, metadata_service
from tests.vsock import pretend_vsock
from vsockrpc.address import VMADDR_CID_ANY, TcpAddress, UnixAddress, VsockAddress
from vsockrpc.http_server import ListenError
from vsockrpc.transport import Client, Fault, connect

CONFIGURATION = """\
version = 1
[rpc]
listen = "unix:rpc.sock"
[nsm]
address = "unix:nsm.sock"
[model]
store = "unix:models.sock"
manifest = "MANIFEST"
"""
KMS = """\
[kms]
region = "us-east-1"
endpoint = "kms.us-east-1.amazonaws.com:443"
egress = "unix:egress.sock"
trust = "AMAZON"
"""
ENDPOINT = "kms.us-east-1.amazonaws.com:443"


@contextlib.asynccontextmanager
async def upper_case() -> AsyncIterator[int]:
    """A TCP server that says in upper case what it is told; yields its port."""

    async def serve_one(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write((await reader.read()).upper())
        writer.close()

    server = await asyncio.start_server(serve_one, "127.0.0.1", 0)
    async with server:
        yield server.sockets[0].getsockname()[1]


async def said_to(client: Client, host: str, port: int, text: bytes) -> bytes:
    async with client.call("egress.connect", {"host": host, "port": port}) as call:
        await call.reply()
        await call.send(text, end=True)
        return await call.read(1000)


async def credentials(client: Client) -> dict[str, Any]:
    async with client.call("credentials.get", {}) as call:
        found = cbor2.loads(await call.read(1 << 16))
    assert isinstance(found, dict)
    return found


@pytest.fixture
def folder() -> Iterator[Path]:
    """With a path short enough for sockets."""
    with tempfile.TemporaryDirectory() as directory:
        yield Path(directory)


@pytest.fixture
def aws(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Credentials of a profile named dev, and none otherwise."""
    for name in list(os.environ):
        if name.startswith("AWS_"):
            monkeypatch.delenv(name)
    (folder / "credentials").write_text("[dev]\naws_access_key_id = AKIADEV\naws_secret_access_key = canary-secret\n")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(folder / "credentials"))
    monkeypatch.setenv("AWS_CONFIG_FILE", str(folder / "config"))
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")


# --- strongroom egress ----------------------------------------------------------------------------------------------


async def strongroom(*arguments: str) -> asyncio.subprocess.Process:
    return await asyncio.create_subprocess_exec(
        sys.executable,
        "-m",
        "strongroom.cli",
        *arguments,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
async def test_the_command_serves_until_it_is_told_to_stop(folder: Path, aws: None, number: signal.Signals) -> None:
    address = UnixAddress(str(folder / "egress.sock"))
    async with upper_case() as port:
        allow = f"kms.example:443=127.0.0.1:{port}"
        options = ["--listen", str(address), "--allow", allow, "--metrics", "127.0.0.1:0", "--json"]
        process = await strongroom("egress", *options, "--credentials", "boto3", "--profile", "dev")
        assert process.stdout is not None
        ready = json.loads(await process.stdout.readline())
        assert (ready["listening"], ready["allowed"]) == (str(address), [allow])
        async with connect(address) as client:
            assert await said_to(client, "kms.example", 443, b"question") == b"QUESTION"
            assert (await credentials(client))["access_key"] == "AKIADEV"
            with pytest.raises(Fault):
                await said_to(client, "canary.example", 443, b"question")
            async with httpx2.AsyncClient(trust_env=False) as http:
                metrics = (await http.get(f"http://{ready['metrics']}/metrics")).text
            assert 'strongroom_egress_connections_total{to="kms.example:443"} 1.0' in metrics
            assert 'strongroom_credentials_calls_total{result="given"} 1.0' in metrics
            assert "canary" not in metrics
            process.send_signal(number)
            stdout, stderr = await process.communicate()
        assert process.returncode == 0
        assert stdout == b""
        assert stderr.decode().splitlines() == [
            "strongroom: the enclave gets AWS credentials without an end: for development only"
        ]
        assert not Path(address.path).exists()


async def test_the_command_says_where_it_listens(folder: Path) -> None:
    address = f"unix:{folder / 'egress.sock'}"
    options = ["--listen", address, "--allow", "kms.example:443", "--credentials", "none", "--metrics", "127.0.0.1:0"]
    process = await strongroom("egress", *options)
    assert process.stdout is not None
    line = (await process.stdout.readline()).decode()
    assert line.startswith(f"egress: {address}, metrics: http://127.0.0.1:")
    process.terminate()
    assert (await process.communicate())[1] == b""
    assert process.returncode == 0


@pytest.mark.parametrize(
    ("options", "code", "word"),
    [
        (["--listen", "unix:x", "--credentials", "none"], 2, "--allow"),
        (["--listen", "unix:x", "--allow", "a:1"], 2, "--credentials"),
        (["--listen", "nowhere", "--allow", "a:1", "--credentials", "none"], 2, "--listen"),
        (["--listen", "unix:x", "--allow", "*.a:1", "--credentials", "none"], 2, "bad_allow_entry"),
        (["--listen", "unix:x", "--allow", "169.254.169.254:80", "--credentials", "none"], 2, "forbidden_address"),
        (["--listen", "unix:x", "--allow", "a:1", "--credentials", "imds", "--profile", "p"], 2, "--profile"),
        (["--listen", "unix:x", "--allow", "a:1", "--credentials", "none", "--metrics", "x"], 2, "bad_address"),
        (["--listen", "unix:/nonexistent/x", "--allow", "a:1", "--credentials", "none"], 4, "bad_address"),
        (["--listen", "tcp:0.0.0.0:0", "--allow", "a:1", "--credentials", "boto3"], 2, "exposed_credentials"),
        (["--listen", "unix:x", "--allow", "a:1", "--credentials", "none", "--enclave-cid", "16"], 2, "--enclave-cid"),
        (["--listen", "vsock:any:1", "--allow", "a:1", "--credentials", "none", "--enclave-cid", "3"], 2, "4<=x"),
    ],
)
async def test_an_option_that_cannot_be_meant_is_said_so(options: list[str], code: int, word: str) -> None:
    process = await strongroom("egress", *options)
    _, stderr = await process.communicate()
    assert process.returncode == code
    assert word in stderr.decode()
    assert "Traceback" not in stderr.decode()


# --- As a part of something -----------------------------------------------------------------------------------------


async def test_with_an_instances_role(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    address = UnixAddress(str(folder / "egress.sock"))
    settings = EgressSettings([Allowed.parse("kms.example:443")], "imds")
    async with metadata_service() as service:
        monkeypatch.setattr(egress_service, "from_instance_metadata", partial(from_instance_metadata, service.url))
        async with serve_egress(address, settings, on_error=report_defect), connect(address) as client:
            found = await credentials(client)
    assert found["access_key"] == ACCESS_KEY
    assert found["expires"] > datetime.now(UTC).timestamp() * 1000


async def test_a_host_that_gives_no_credentials_says_so(folder: Path) -> None:
    address, said = UnixAddress(str(folder / "egress.sock")), list[str]()
    settings = EgressSettings([Allowed.parse("kms.example:443")], "none")
    async with serve_egress(address, settings, on_error=report_defect, warn=said.append), connect(address) as client:
        with pytest.raises(Fault) as caught:
            await credentials(client)
    assert caught.value.code == "no_credentials"
    assert "--credentials" in caught.value.message


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.0.2.1", "2001:db8::1", "kms.example"])
@pytest.mark.parametrize("source", ["boto3", "imds"])
async def test_credentials_are_not_served_to_other_machines(host: str, source: str) -> None:
    settings = EgressSettings([Allowed.parse("kms.example:443")], source)
    with pytest.raises(EgressError) as caught:
        async with serve_egress(TcpAddress(host, 0), settings, on_error=report_defect):
            pass
    assert caught.value.code == "exposed_credentials"


@pytest.mark.parametrize(("host", "source"), [("127.0.0.1", "boto3"), ("localhost", "boto3"), ("0.0.0.0", "none")])
async def test_over_tcp_they_stay_on_this_machine(aws: None, host: str, source: str) -> None:
    settings = EgressSettings([Allowed.parse("kms.example:443")], source, "dev")
    async with serve_egress(TcpAddress(host, 0), settings, on_error=report_defect, warn=lambda text: None) as at:
        assert isinstance(at.egress, TcpAddress)
        async with connect(TcpAddress("127.0.0.1", at.egress.port)) as client:
            if source == "none":
                with pytest.raises(Fault):
                    await credentials(client)
            else:
                assert (await credentials(client))["access_key"] == "AKIADEV"


async def test_an_egress_of_one_enclave_serves_no_other(
    folder: Path, aws: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    there = pretend_vsock(monkeypatch, folder, [16, 17, 3])
    async with upper_case() as port:
        allowed = [Allowed.parse(f"kms.example:443=127.0.0.1:{port}")]
        settings = EgressSettings(allowed, "boto3", "dev", TcpAddress("127.0.0.1", 0), enclave_cid=16)
        address = VsockAddress(VMADDR_CID_ANY, 7000)
        async with serve_egress(address, settings, on_error=report_defect, warn=lambda text: None) as at:
            async with connect(there) as enclave:
                assert (await credentials(enclave))["access_key"] == "AKIADEV"
                assert await said_to(enclave, "kms.example", 443, b"question") == b"QUESTION"
            for _ in ("another enclave", "a process of the parent"):
                async with connect(there) as stranger:
                    with pytest.raises(Fault) as caught:
                        await credentials(stranger)
                    assert caught.value.code == "no_credentials"
                    with pytest.raises(Fault) as caught:
                        await said_to(stranger, "kms.example", 443, b"question")
                    assert caught.value.code == "egress_refused"
            async with httpx2.AsyncClient(trust_env=False) as http:
                metrics = (await http.get(f"http://{str(at.metrics).removeprefix('tcp:')}/metrics")).text
    assert "strongroom_egress_strangers_total 4.0" in metrics
    assert 'strongroom_credentials_calls_total{result="given"} 1.0' in metrics


async def test_without_a_cid_nobody_is_an_enclave(folder: Path, aws: None) -> None:
    address = UnixAddress(str(folder / "egress.sock"))
    settings = EgressSettings([Allowed.parse("kms.example:443")], "boto3", "dev", enclave_cid=16)
    serving = serve_egress(address, settings, on_error=report_defect, warn=lambda text: None)
    async with serving, connect(address) as client:
        with pytest.raises(Fault):
            await credentials(client)


async def test_metrics_that_cannot_be_served_leave_nothing_behind(folder: Path) -> None:
    address = UnixAddress(str(folder / "egress.sock"))
    with socket.create_server(("127.0.0.1", 0)) as taken:
        settings = EgressSettings([], "none", metrics=TcpAddress("127.0.0.1", taken.getsockname()[1]))
        with pytest.raises(ListenError):
            async with serve_egress(address, settings, on_error=report_defect):
                pass
    assert not Path(address.path).exists()


def test_a_defect_is_told_by_its_place_alone(capsys: pytest.CaptureFixture[str]) -> None:
    texts = ["CANARY"]
    try:
        raise RuntimeError(*texts)
    except RuntimeError as error:
        report_defect(error)
    said = capsys.readouterr().err
    assert said.startswith("defect: RuntimeError\n")
    assert "CANARY" not in said


# --- strongroom start -----------------------------------------------------------------------------------------------


@pytest.fixture
def launch(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Launch:
    monkeypatch.setenv("STRONGROOM_HOME", str(folder))
    model = folder / "tiny.gguf"
    model.write_bytes(tiny_model().encode())
    manifest = ModelManifest.from_gguf(model)
    instance = Registry.of_user().create("t")
    text = CONFIGURATION.replace("MANIFEST", digest_text(manifest.digest()))
    instance.configuration.write_text(text + KMS)
    return Launch(instance, ProcessMachine(instance, memory=MEMORY_SLACK), ModelStore(manifest, model))


def supervisor(launch: Launch) -> Supervisor:
    return Supervisor(launch, on_change=lambda state: None, on_event=lambda event: None)


async def test_a_supervised_enclave_has_its_egress_beside_it(launch: Launch, aws: None) -> None:
    async with upper_case() as port:
        settings = EgressSettings([Allowed.parse(f"{ENDPOINT}=127.0.0.1:{port}")], "boto3", "dev")
        told = replace(launch, egress=settings)
        address = UnixAddress(str(launch.instance.directory / "egress.sock"))
        async with supervisor(told)._egress(), connect(address) as client:
            assert await said_to(client, "kms.us-east-1.amazonaws.com", 443, b"hello") == b"HELLO"
            assert (await credentials(client))["access_key"] == "AKIADEV"


async def test_on_vsock_the_egress_is_for_the_supervised_enclave_alone(launch: Launch, aws: None) -> None:
    """Its port is open to every enclave of the host, and to the host itself."""
    machine = ProcessMachine(launch.instance, memory=MEMORY_SLACK)
    machine.places = replace(machine.places, rpc=VsockAddress(16, 5005))
    told = replace(launch, machine=machine)
    address = UnixAddress(str(launch.instance.directory / "egress.sock"))
    async with supervisor(told)._egress(), connect(address) as client:
        with pytest.raises(Fault, match="no_credentials"):
            await credentials(client)


async def test_without_a_word_it_reaches_its_own_endpoint_alone(
    launch: Launch, aws: None, capsys: pytest.CaptureFixture[str]
) -> None:
    address = UnixAddress(str(launch.instance.directory / "egress.sock"))
    async with supervisor(launch)._egress(), connect(address) as client:
        with pytest.raises(Fault) as caught:
            await said_to(client, "kms.us-west-2.amazonaws.com", 443, b"hello")
        assert caught.value.code == "egress_refused"
        with pytest.raises(Fault) as caught:
            await credentials(client)
        assert caught.value.code == "no_credentials"
    assert "no credentials for the enclave" in capsys.readouterr().err


async def test_without_kms_there_is_no_egress(launch: Launch) -> None:
    text = launch.instance.configuration.read_text()
    launch.instance.configuration.write_text(text.removesuffix(KMS))
    async with supervisor(launch)._egress():
        assert not (launch.instance.directory / "egress.sock").exists()


def access(endpoint: str = ENDPOINT) -> KmsAccess:
    return KmsAccess(UnixAddress("egress.sock"), endpoint, encrypted_model=False)


def test_what_start_makes_of_its_options() -> None:
    assert egress_settings(access(), [], None, None, None) == EgressSettings([Allowed.parse(ENDPOINT)])
    allow = [f"{ENDPOINT}=127.0.0.1:8443", "sts.us-east-1.amazonaws.com:443"]
    assert egress_settings(access(), allow, "imds", None, "127.0.0.1:9100") == EgressSettings(
        [Allowed.parse(each) for each in allow], "imds", None, TcpAddress("127.0.0.1", 9100)
    )
    assert egress_settings(access(), [], None, "dev", None).profile == "dev"


def test_options_that_contradict_are_said_so() -> None:
    with pytest.raises(LaunchConfigurationError) as caught:
        egress_settings(access(), ["kms.us-west-2.amazonaws.com:443"], None, None, None)
    assert caught.value.message.startswith("kms.endpoint: ")
    with pytest.raises(AllowListError):
        egress_settings(access("KMS.example:443"), [], None, None, None)
    with pytest.raises(click.UsageError):
        egress_settings(access(), [], "imds", "dev", None)


async def test_options_for_kms_without_kms_are_said_so(launch: Launch) -> None:
    text = launch.instance.configuration.read_text()
    launch.instance.configuration.write_text(text.removesuffix(KMS))
    files = ["--config", str(launch.instance.configuration), "--model", str(file_of(launch))]

    async def refused(*option: str) -> None:
        process = await strongroom("start", *files, "--name", "other", *option)
        _, stderr = await process.communicate()
        assert process.returncode == 2
        assert "has no [kms]" in stderr.decode()

    options = (("--allow", ENDPOINT), ("--credentials", "none"), ("--profile", "p"), ("--egress-metrics", "x:1"))
    await asyncio.gather(*(refused(*option) for option in options))


async def test_a_model_is_named_unless_the_image_has_it(launch: Launch) -> None:
    configuration = launch.instance.configuration
    text = configuration.read_text()

    async def refused(*option: str) -> str:
        process = await strongroom("start", "--config", str(configuration), "--name", "other", *option)
        _, stderr = await process.communicate()
        assert process.returncode == 2
        return stderr.decode()

    assert "which file is the model?" in await refused()
    configuration.write_text(text.replace("unix:models.sock", "file:/opt/strongroom/model.gguf"))
    assert "has the weights in itself" in await refused("--model", str(file_of(launch)))


# --- An encrypted model ---------------------------------------------------------------------------------------------


@pytest.fixture
def configuration(launch: Launch) -> LaunchConfiguration:
    """One that says that the model arrives encrypted."""
    text = launch.instance.configuration.read_text() + '[kms.model]\nkey = "arn"\n'
    return LaunchConfiguration.parse(text.encode())


def manifest_of(launch: Launch) -> ModelManifest:
    assert launch.model is not None
    return launch.model.manifest


def file_of(launch: Launch) -> Path:
    assert launch.model is not None
    return launch.model.path


def silent(done: int, total: int) -> None:
    """No progress is shown."""


def test_the_manifest_of_an_encrypted_model_is_beside_it(
    launch: Launch, configuration: LaunchConfiguration, folder: Path
) -> None:
    model = folder / "tiny.gguf.sealed"
    model.write_bytes(MAGIC + b"and what follows")
    (folder / "tiny.gguf.sealed.manifest").write_bytes(manifest_of(launch).encode())
    assert pinned_model(configuration, model, silent) == ModelStore(manifest_of(launch), model, encrypted=True)


def test_a_manifest_that_is_missing_is_said_so(configuration: LaunchConfiguration, folder: Path) -> None:
    model = folder / "tiny.gguf.sealed"
    model.write_bytes(MAGIC)
    with pytest.raises(LaunchConfigurationError) as caught:
        pinned_model(configuration, model, silent)
    assert "tiny.gguf.sealed.manifest" in str(caught.value)


@pytest.mark.parametrize("data", [b"", b"nonsense", bytes(200_000)])
def test_a_manifest_that_is_none_is_said_so(configuration: LaunchConfiguration, folder: Path, data: bytes) -> None:
    model = folder / "tiny.gguf.sealed"
    model.write_bytes(MAGIC)
    (folder / "tiny.gguf.sealed.manifest").write_bytes(data)
    with pytest.raises(ModelError):
        pinned_model(configuration, model, silent)


def test_another_models_manifest_is_refused(launch: Launch, configuration: LaunchConfiguration, folder: Path) -> None:
    model = folder / "tiny.gguf.sealed"
    model.write_bytes(MAGIC)
    other = replace(manifest_of(launch), version=7)
    (folder / "tiny.gguf.sealed.manifest").write_bytes(other.encode())
    with pytest.raises(LaunchConfigurationError) as caught:
        pinned_model(configuration, model, silent)
    assert "another model" in caught.value.message


def test_a_plain_model_where_an_encrypted_one_is_meant(launch: Launch, configuration: LaunchConfiguration) -> None:
    with pytest.raises(LaunchConfigurationError) as caught:
        pinned_model(configuration, file_of(launch), silent)
    assert "is not encrypted" in caught.value.message


def test_an_encrypted_model_where_a_plain_one_is_meant(launch: Launch, folder: Path) -> None:
    model = folder / "tiny.gguf.sealed"
    model.write_bytes(MAGIC + bytes(1000))
    with pytest.raises(ModelError):
        pinned_model(LaunchConfiguration.load(launch.instance.configuration), model, silent)
