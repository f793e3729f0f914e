"""The supervisor on the process launcher, over real processes but without a model that loads."""

from __future__ import annotations

import asyncio
import base64
import errno
import importlib.util
import os
import py_compile
import signal
import sys
from dataclasses import replace
from pathlib import Path

import pytest

import parent.launch.supervisor
from attestation.manifest import ModelManifest
from attestation.reference import PcrSet
from emulator.pki import ensure_development_root
from parent.config import LaunchConfigurationError
from parent.launch.process import MEMORY_SLACK, ProcessMachine, bytecode_cache
from parent.launch.supervisor import MAX_FRUITLESS_BOOTS, Launch, Supervisor
from parent.modelstore import ModelStore
from parent.registry import Instance, Registry, State
from strongroom.prepare import Settings, enclave_toml
from tests.gguf_files import tiny_model

pytestmark = pytest.mark.processes


@pytest.fixture
def launch(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Launch:
    """A tiny model with its configuration, in a home with a path short enough for sockets."""
    home = tmp_path_factory.mktemp("h")
    monkeypatch.setenv("STRONGROOM_HOME", str(home))
    model = home / "tiny.gguf"
    model.write_bytes(tiny_model().encode())
    manifest = ModelManifest.from_gguf(model)
    instance = Registry.of_user().create("t")
    instance.configuration.write_text(enclave_toml(manifest, Settings(context=64, threads=1)))
    return Launch(instance, ProcessMachine(instance, memory=MEMORY_SLACK), ModelStore(manifest, model))


def starved(launch: Launch) -> Launch:
    """The same, with too little memory for anything to come up."""
    return replace(launch, machine=ProcessMachine(launch.instance, memory=32 << 20))


def supervise(launch: Launch) -> tuple[State, list[str]]:
    """Runs a supervisor to its end; returns the last state and the phases on the way."""
    phases: list[str] = []
    supervisor = Supervisor(launch, on_change=lambda state: phases.append(state.phase), on_event=lambda event: None)
    return asyncio.run(supervisor.run()), phases


def test_an_enclave_that_never_comes_up_is_given_up(launch: Launch) -> None:
    state, phases = supervise(starved(launch))
    assert state.phase == "FAILED"
    assert state.error is not None
    assert state.error["code"] == "does_not_come_up"
    assert phases.count("STARTING") == MAX_FRUITLESS_BOOTS


def test_a_configuration_that_the_enclave_refuses_ends_at_once(launch: Launch) -> None:
    with launch.instance.configuration.open("a") as file:
        file.write("[surprise]\nkey = 1\n")
    state, phases = supervise(launch)
    assert state.error is not None
    assert state.error["code"] == "enclave_unusable"
    assert "surprise" in str(state.error["message"])
    assert phases.count("STARTING") == 1


def test_an_enclave_that_cannot_listen_ends_at_once(launch: Launch) -> None:
    (launch.instance.directory / "rpc.sock").write_text("a file that is no socket")
    state, phases = supervise(launch)
    assert state.error is not None
    assert state.error["code"] == "enclave_unusable"
    assert "no socket is in the way" in str(state.error["message"])
    assert phases.count("STARTING") == 1


KMS = """
[kms]
region = "eu-west-1"
endpoint = "127.0.0.1:1"
egress = "unix:egress.sock"
trust = "EMULATED"
root = "{root}"
"""


@pytest.fixture
def with_kms(launch: Launch, monkeypatch: pytest.MonkeyPatch) -> Launch:
    """A boot that asks a KMS where nobody is."""
    root = base64.b64encode(ensure_development_root().certificate_der).decode()
    with launch.instance.configuration.open("a") as file:
        file.write(KMS.format(root=root))
    monkeypatch.setattr(parent.launch.supervisor, "FIRST_KMS_PAUSE_SECONDS", 0.01)
    monkeypatch.setattr(parent.launch.supervisor, "MAX_FRUITLESS_BOOTS", 2)
    for name in [name for name in os.environ if name.startswith("AWS_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    return replace(launch, machine=ProcessMachine(launch.instance, memory=MEMORY_SLACK))


def test_a_kms_that_is_away_is_tried_again_and_then_said(with_kms: Launch, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "AKIAEXAMPLE")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "example")
    state, phases = supervise(with_kms)
    assert state.error is not None
    assert (state.phase, state.error["code"]) == ("FAILED", "kms_unreachable")
    assert phases.count("STARTING") == 2


def test_a_host_without_credentials_is_said_at_once(with_kms: Launch) -> None:
    state, phases = supervise(with_kms)
    assert state.error is not None
    assert (state.phase, state.error["code"]) == ("FAILED", "kms_no_credentials")
    assert phases.count("STARTING") == 1


def test_nobody_listening_to_the_supervisor_is_no_death(launch: Launch) -> None:
    """As with ``strongroom start --foreground | true``."""

    def left(state: State) -> None:
        if state.phase == "SERVING":
            os.kill(os.getpid(), signal.SIGTERM)
        raise BrokenPipeError(errno.EPIPE, os.strerror(errno.EPIPE))

    state = asyncio.run(Supervisor(launch, on_change=left, on_event=lambda event: None).run())
    assert (state.phase, state.restarts) == ("STOPPED", 0)
    assert launch.instance.log.read_text().count("[Errno 32]") == 1


def test_a_full_disk_ends_nothing(
    launch: Launch, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(instance: Instance, state: State) -> None:
        if state.phase == "SERVING":
            os.kill(os.getpid(), signal.SIGTERM)
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(Instance, "write_state", full)
    state, phases = supervise(launch)
    assert (state.phase, state.restarts) == ("STOPPED", 0)
    assert {"CONFIGURED", "MODEL_COMMITTED", "SERVING"} <= set(phases)
    assert capsys.readouterr().err.count("No space left on device") == 1


def test_bytecode_beside_the_sources_is_never_run(tmp_path: Path) -> None:
    """The measurement covers sources: a poisoned cache beside one must not be what runs."""
    module = tmp_path / "victim.py"
    module.write_text("print('poison')\n")
    py_compile.compile(str(module), doraise=True)
    cached = Path(importlib.util.cache_from_source(str(module)))
    written = module.stat()
    module.write_text(
        "print('source')\n"
    )  # as long as the poison, and made to look as old: Python would believe the cache
    os.utime(module, ns=(written.st_atime_ns, written.st_mtime_ns))
    assert cached.exists()

    async def said(*options: str) -> bytes:
        code = f"import sys; sys.path.insert(0, {str(tmp_path)!r}); import victim"
        process = await asyncio.create_subprocess_exec(
            sys.executable, "-I", *options, "-c", code, stdout=asyncio.subprocess.PIPE
        )
        return (await process.communicate())[0]

    assert asyncio.run(said()) == b"poison\n"
    assert asyncio.run(said("-X", f"pycache_prefix={tmp_path / 'cache'}")) == b"source\n"


def test_each_measurement_has_a_bytecode_cache_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STRONGROOM_HOME", str(tmp_path))
    first, second = (bytecode_cache(PcrSet(bytes([value]) * 48, bytes(48), bytes(48))) for value in (1, 2))
    assert first != second
    first.mkdir(parents=True)
    assert bytecode_cache(PcrSet(b"\x02" * 48, bytes(48), bytes(48))) == second
    assert not first.exists()


def test_files_that_changed_are_not_booted_under_the_old_measurement(
    launch: Launch, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An upgrade under a running enclave, which then dies: the new files are not what its PCRs say."""
    measurements = iter([PcrSet(bytes([value]) * 48, b"\x01" * 48, b"\x02" * 48) for value in (1, 2)])
    monkeypatch.setattr("parent.launch.process.measure_process_image", lambda *_: next(measurements))
    state, phases = supervise(starved(launch))
    assert state.error is not None
    assert state.error["code"] == "image_changed"
    assert phases.count("STARTING") == 1


@pytest.mark.parametrize(
    ("key", "address"), [("listen", "unix:rpc.sock"), ("address", "unix:nsm.sock"), ("store", "unix:models.sock")]
)
@pytest.mark.parametrize(
    "value", ["unix:/tmp/rpc.sock", "unix:../rpc.sock", "unix:a/rpc.sock", "vsock:3:5000", "tcp:localhost:1"]
)
def test_a_socket_that_is_not_in_the_folder_is_refused(launch: Launch, key: str, address: str, value: str) -> None:
    configuration = launch.instance.configuration
    text = configuration.read_text()
    assert f'{key} = "{address}"' in text
    configuration.write_text(text.replace(f'{key} = "{address}"', f'{key} = "{value}"'))
    with pytest.raises(LaunchConfigurationError) as caught:
        ProcessMachine(launch.instance, memory=MEMORY_SLACK)
    assert caught.value.message.partition(":")[0].endswith(f".{key}")
    assert (caught.value.expected, caught.value.got) == ("unix:NAME", value)


@pytest.mark.parametrize("egress", ["unix:/run/egress.sock", "vsock:3:5000"])
def test_a_way_to_kms_that_is_not_in_the_folder_is_refused(launch: Launch, egress: str) -> None:
    with launch.instance.configuration.open("a") as file:
        file.write(KMS.format(root="").replace("unix:egress.sock", egress))
    with pytest.raises(LaunchConfigurationError, match=r"kms\.egress"):
        ProcessMachine(launch.instance, memory=MEMORY_SLACK)


def test_a_process_has_no_nsm_device(launch: Launch) -> None:
    text = launch.instance.configuration.read_text()
    launch.instance.configuration.write_text(text.replace("unix:nsm.sock", "device:/dev/nsm"))
    with pytest.raises(LaunchConfigurationError, match=r"nsm\.address"):
        ProcessMachine(launch.instance, memory=MEMORY_SLACK)
