"""The QEMU launcher, with stand-ins for QEMU and its vsock device. ``tests/boot`` boots real images."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

import parent.launch.qemu
from attestation.eif import ImageError
from attestation.manifest import ModelManifest
from attestation.reference import PcrSet, digest_text
from emulator.pki import ensure_development_root
from parent.cache import CacheError
from parent.config import LaunchConfigurationError
from parent.image.sizing import EIF_FACTOR
from parent.launch.machine import LaunchError, Machine
from parent.launch.qemu import GIB, MIB, Console, QemuMachine, Tools, machine_memory
from parent.launch.supervisor import Launch, Supervisor
from parent.modelstore import ModelStore
from parent.registry import Instance, Registry, State
from tests.eif_files import AARCH64, Eif, Signer, image
from tests.gguf_files import tiny_model
from tests.machines import processes_of, stand_in_tools, until
from vsockrpc.address import UnixAddress
from vsockrpc.errors import AddressError, ConnectionLost
from vsockrpc.transport import IncomingCall, connect, serve

ZERO = PcrSet(pcr0=bytes([1] * 48), pcr1=bytes([2] * 48), pcr2=bytes([3] * 48))
CONFIGURATION = """
[rpc]
listen = "vsock:any:5005"
[nsm]
address = "vsock:3:5008"
[model]
store = "vsock:3:5006"
manifest = "{manifest}"
"""
KMS = """
[kms]
endpoint = "kms.eu-west-1.amazonaws.com:443"
egress = "vsock:3:5007"
"""


@pytest.fixture
def model(tmp_path: Path) -> Path:
    path = tmp_path / "tiny.gguf"
    path.write_bytes(tiny_model().encode())
    return path


@pytest.fixture
def instance(tmp_path_factory: pytest.TempPathFactory, model: Path, monkeypatch: pytest.MonkeyPatch) -> Instance:
    """In a home with a path short enough for sockets, with the stand-ins as tools."""
    home = tmp_path_factory.mktemp("h")
    monkeypatch.setenv("STRONGROOM_HOME", str(home))
    stand_in_tools(home, monkeypatch)
    instance = Registry.of_user().create("t")
    configure(instance, manifest=digest_text(ModelManifest.from_gguf(model).digest()))
    return instance


def configure(instance: Instance, *changes: tuple[str, str], manifest: str = "sha384:00", more: str = "") -> None:
    text = CONFIGURATION.format(manifest=manifest) + more
    for old, new in changes:
        assert old in text
        text = text.replace(old, new)
    instance.configuration.write_text(text)


def machine(instance: Instance, eif: Eif | None = None, **how: Any) -> QemuMachine:
    path = instance.directory / "enclave.eif"
    path.write_bytes((image() if eif is None else eif).encode())
    return QemuMachine(instance, path, **{"memory": GIB, **how})


def behave(instance: Instance, behaviour: str) -> None:
    (instance.directory / "behaviour").write_text(behaviour)


# --- Tools ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Path]:
    """Makes entries of a cache, each younger than the one before."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    for variable in ("STRONGROOM_QEMU", "STRONGROOM_VSOCK_DEVICE"):
        monkeypatch.delenv(variable, raising=False)
    made: list[Path] = []

    def make(name: str, *programs: str) -> Path:
        entry = tmp_path / "strongroom" / name
        entry.mkdir(parents=True)
        for program in programs:
            (entry / program).parent.mkdir(exist_ok=True)
            (entry / program).touch()
        made.append(entry)
        os.utime(entry, (len(made), len(made)))
        return entry

    return make


def test_the_newest_in_the_cache_is_taken(cache: Callable[..., Path]) -> None:
    cache("qemu-" + "f" * 16, "bin/qemu-system-x86_64")
    qemu = cache("qemu-" + "0" * 16, "bin/qemu-system-x86_64")
    cache("qemu-" + "1" * 16)  # made by an older script, without the program
    cache(".qemu-" + "2" * 16 + ".partial", "bin/qemu-system-x86_64")
    device = cache("vsock-device-" + "a" * 16, "bin/vhost-device-vsock")
    assert Tools.find() == Tools(qemu / "bin/qemu-system-x86_64", qemu / "firmware", device / "bin/vhost-device-vsock")


def test_tools_that_others_can_replace_are_not_run(cache: Callable[..., Path]) -> None:
    qemu = cache("qemu-" + "0" * 16, "bin/qemu-system-x86_64")
    (qemu / "bin").chmod(0o777)
    with pytest.raises(CacheError, match="unsafe_cache"):
        Tools.find()


def test_the_environment_goes_before_the_cache(cache: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    cache("qemu-" + "f" * 16, "bin/qemu-system-x86_64")
    cache("vsock-device-" + "a" * 16, "bin/vhost-device-vsock")
    named = cache("elsewhere", "bin/qemu-system-x86_64")
    monkeypatch.setenv("STRONGROOM_QEMU", str(named))
    assert Tools.find().qemu == named / "bin/qemu-system-x86_64"
    monkeypatch.setenv("STRONGROOM_VSOCK_DEVICE", str(named))
    with pytest.raises(LaunchError) as caught:
        Tools.find()
    assert caught.value.got == str(named)


@pytest.mark.parametrize(("there", "script"), [((), "qemu"), (("qemu", "bin/qemu-system-x86_64"), "vsock-device")])
def test_a_missing_tool_names_the_script_that_makes_it(
    cache: Callable[..., Path], there: tuple[str, ...], script: str
) -> None:
    if there:
        cache(f"{there[0]}-{'0' * 16}", there[1])
    with pytest.raises(LaunchError, match=f"scripts/machine/{script} makes it") as caught:
        Tools.find()
    assert caught.value.code == "missing_tool"
    assert (Path(__file__).parents[2] / "scripts/machine" / script).is_file()


# --- What can run -----------------------------------------------------------------------------------------------------


@given(image=st.integers(0, 1 << 40), wanted=st.integers(0, 1 << 45))
def test_memory_is_enough_for_the_image_or_refused(image: int, wanted: int) -> None:
    least = EIF_FACTOR * image
    if wanted < least:
        with pytest.raises(LaunchError) as caught:
            machine_memory(image, wanted)
        assert caught.value.code == "too_little_memory"
        asked = float(str(caught.value.expected).split("--memory-gib ")[1].rstrip(")"))
        assert machine_memory(image, int(asked * GIB) + 1) >= least  # what it asks for is enough
        return
    memory = machine_memory(image, wanted)
    assert memory % MIB == 0
    assert memory >= least
    assert 0 <= memory - wanted < MIB


def test_too_little_memory_is_said_in_numbers(instance: Instance) -> None:
    path = instance.directory / "enclave.eif"
    path.touch()
    os.truncate(path, 300 * MIB)
    with pytest.raises(LaunchError) as caught:
        QemuMachine(instance, path, memory=GIB)
    assert str(caught.value) == (
        "an enclave needs 4 times the size of its image, which is 300 MiB [too_little_memory]; "
        "expected >= 1200 MiB (--memory-gib 1.18); got 1024 MiB"
    )


def test_an_image_that_cannot_be_read_is_said(instance: Instance) -> None:
    with pytest.raises(LaunchError, match=r"none\.eif: No such file") as caught:
        QemuMachine(instance, Path("none.eif"), memory=GIB)
    assert caught.value.code == "unreadable_image"


@pytest.mark.parametrize(
    ("old", "new", "key"),
    [
        ("vsock:any:5005", "unix:rpc.sock", "rpc.listen"),
        ("vsock:any:5005", "vsock:3:5005", "rpc.listen"),
        ("vsock:3:5006", "unix:models.sock", "model.store"),
        ("vsock:3:5006", "vsock:2:5006", "model.store"),
        ("vsock:3:5007", "tcp:127.0.0.1:5007", "kms.egress"),
        ("vsock:3:5008", "unix:nsm.sock", "nsm.address"),
    ],
)
def test_addresses_that_a_machine_does_not_have_are_refused(instance: Instance, old: str, new: str, key: str) -> None:
    configure(instance, (old, new), more=KMS)
    with pytest.raises(LaunchConfigurationError, match=key):
        machine(instance)


def test_places_are_the_devices_sockets(instance: Instance) -> None:
    configure(instance, more=KMS)
    places = machine(instance).places
    assert [str(each) for each in (places.rpc, places.store, places.egress, places.nsm)] == [
        f"unix:{instance.directory}/{name}" for name in ("rpc.sock", "vsock_5006", "vsock_5007", "vsock_5008")
    ]


def test_a_machine_has_its_own_nsm_when_the_image_opens_the_device(instance: Instance) -> None:
    configure(instance, ("vsock:3:5008", "device:/dev/nsm"))
    places = machine(instance).places
    assert (places.nsm, places.egress) == (None, None)


def test_a_folder_whose_path_is_too_long_is_refused(instance: Instance) -> None:
    deep = Instance(instance.directory / ("x" * 100))
    deep.directory.mkdir()
    configure(deep)
    with pytest.raises(AddressError):
        machine(deep)


async def test_it_measures_the_image(instance: Instance) -> None:
    eif = image().signed(Signer())
    pcr0, pcr1, pcr2 = eif.registers()
    assert await machine(instance, eif).measure() == PcrSet(pcr0=pcr0, pcr1=pcr1, pcr2=pcr2, pcr8=Signer().pcr8())


async def test_an_image_of_another_architecture_is_refused(instance: Instance) -> None:
    arm = Eif(image().parts, flags=AARCH64)
    with pytest.raises(LaunchError) as caught:
        await machine(instance, arm).measure()
    assert (caught.value.code, caught.value.expected, caught.value.got) == ("wrong_architecture", "x86_64", "aarch64")


async def test_what_is_no_image_is_refused(instance: Instance) -> None:
    path = instance.directory / "x.eif"
    path.write_bytes(b"PK\3\4" * 200)
    with pytest.raises(ImageError):
        await QemuMachine(instance, path, memory=GIB).measure()


# --- Booting ----------------------------------------------------------------------------------------------------------


async def test_the_machine_gets_what_it_needs_and_nothing_of_the_host(
    instance: Instance, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "x")
    async with machine(instance, memory=GIB + 1, cpus=3).boot(ZERO) as running:
        await running.heard.wait()
        told = json.loads((instance.directory / "qemu.json").read_text())
        assert await running.network() == "none"
    line = " ".join(told["arguments"])
    for part in (
        "-M nitro-enclave,vsock=vsock,id=i-emulated-enc-t",
        "-accel tcg",
        "-cpu max",
        "-smp 3",
        "-m 1025M",
        "-nodefaults",
        "-no-user-config",
        "-no-reboot",
        "-chardev socket,id=vsock,path=vhost.sock",
        f"-kernel {instance.directory}/enclave.eif",
        "-append parent_cid=2",
    ):
        assert part in line
    assert "netdev" not in line
    temporary = Path(told["environment"]["TMPDIR"])  # where QEMU leaves an image's parts when it is killed
    assert temporary.parent == instance.directory
    assert not temporary.exists()
    assert "AWS_SECRET_ACCESS_KEY" not in told["environment"]


async def test_calls_reach_the_guest_once_it_has_come_up(instance: Instance) -> None:
    async def answer(call: IncomingCall) -> None:
        await call.reply({"pong": 1}, end=True)

    guest = UnixAddress(str(instance.directory / "guest_5005"))
    booted = machine(instance)
    async with booted.boot(ZERO) as running:
        with pytest.raises(ConnectionLost):  # nobody listens in the guest yet
            async with connect(booted.places.rpc):
                pass
        assert running.heard.is_set()
        async with (
            serve(guest, {"ping": answer}, on_error=print),
            connect(booted.places.rpc) as client,
            client.call("ping", {}) as call,
        ):
            await call.send(b"", end=True)
            assert await call.reply() == {"pong": 1}
    assert list(processes_of(instance)) == []


@pytest.mark.parametrize("end", ["qemu", "device"])
async def test_the_death_of_either_process_is_that_of_both(instance: Instance, end: str) -> None:
    async with machine(instance).boot(ZERO) as running:
        waiting = asyncio.ensure_future(running.wait())
        await running.heard.wait()
        await asyncio.sleep(0.01)
        assert not waiting.done()
        getattr(running, end).kill()
        assert await waiting is None
    assert list(processes_of(instance)) == []
    assert ("QEMU ended" if end == "qemu" else "the vsock device ended") in instance.log.read_text()


async def test_a_machine_can_boot_again(instance: Instance) -> None:
    behave(instance, "say init: the command was ended by signal 9")
    booted = machine(instance)
    for _ in range(2):
        async with booted.boot(ZERO) as running:
            assert await running.wait() is None
            assert (instance.directory / "console.log").read_text().count("signal 9") == 1


@pytest.mark.parametrize(
    "said", ["init: halt: /proc/cmdline: it is not the measured one", "init: the command exited with status 2"]
)
async def test_an_enclave_that_cannot_begin_is_not_tried_again(instance: Instance, said: str) -> None:
    behave(instance, f"say {said}")
    async with machine(instance).boot(ZERO) as running:
        reason = await running.wait()
    assert reason is not None
    assert (reason.code, reason.got) == ("enclave_unusable", f"booted\n{said}")


async def test_an_image_that_qemu_refuses_is_not_tried_again(instance: Instance) -> None:
    behave(instance, "refuse")
    async with machine(instance).boot(ZERO) as running:
        reason = await running.wait()
    assert reason is not None
    assert (reason.code, reason.got) == ("qemu_refused", "qemu: the image has no kernel")


async def test_a_panic_is_told_without_what_drives_a_terminal(instance: Instance) -> None:
    behave(instance, "panic")
    async with machine(instance).boot(ZERO) as running:
        assert await running.wait() is None
    log = instance.log.read_text()
    assert "QEMU ended before the image's init came up" in log
    assert "Kernel panic.[31m - not syncing" in log


async def test_an_init_that_does_not_come_up_is_given_up(instance: Instance, monkeypatch: pytest.MonkeyPatch) -> None:
    """As AWS's own, which reaches its parent at a CID that the device does not have."""
    monkeypatch.setattr(parent.launch.qemu, "HEARTBEAT_SECONDS", 0.2)
    behave(instance, "mute")
    async with machine(instance).boot(ZERO) as running:
        reason = await running.wait()
    assert reason is not None
    assert reason.code == "no_heartbeat"


async def test_a_device_that_does_not_start_ends_the_boot(instance: Instance) -> None:
    (instance.directory / "no-device").write_text("no such library")
    with pytest.raises(LaunchError) as caught:
        await machine(instance).boot(ZERO).__aenter__()
    assert (caught.value.code, caught.value.got) == ("vsock_device_failed", "no such library")
    assert list(processes_of(instance)) == []


async def test_a_console_without_end_fills_no_disk(instance: Instance, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parent.launch.qemu, "MAX_CONSOLE", 1 << 18)
    behave(instance, "talk")
    async with machine(instance).boot(ZERO):
        await asyncio.to_thread(until, (instance.directory / "console.log.1").exists)
        kept = list(instance.directory.glob("console.log*"))
        assert sum(path.stat().st_size for path in kept) <= 1 << 18
    assert len(kept) == 2


@given(pieces=st.lists(st.binary(min_size=1, max_size=600), max_size=5))
def test_whatever_a_console_says_can_be_shown(tmp_path_factory: pytest.TempPathFactory, pieces: list[bytes]) -> None:
    path = tmp_path_factory.mktemp("c") / "console.log"

    async def record() -> Console:
        console, stream = Console(path), asyncio.StreamReader()
        for piece in pieces:
            stream.feed_data(piece)
        stream.feed_eof()
        async with console:
            console.record(stream)
        return console

    shown = asyncio.run(record()).end()
    assert len(shown) <= 400
    assert shown.replace("\n", "").isascii()
    assert shown.replace("\n", "").isprintable()
    assert b"".join(pieces) == (path.read_bytes() if path.exists() else b"")


def test_a_full_disk_stops_no_machine(tmp_path: Path) -> None:
    async def record() -> Console:
        console, stream = Console(tmp_path / "gone" / "console.log"), asyncio.StreamReader()
        stream.feed_data(b"said\n")
        stream.feed_eof()
        async with console:
            console.record(stream)
        return console

    assert asyncio.run(record()).end() == "said"


# --- Under the supervisor ---------------------------------------------------------------------------------------------


def launch_of(instance: Instance, model: Path) -> Launch:
    booted: Machine = machine(instance)
    return Launch(instance, booted, ModelStore(ModelManifest.from_gguf(model), model))


@pytest.mark.processes
def test_an_enclave_serves_in_it_beside_a_software_nsm(instance: Instance, model: Path) -> None:
    ensure_development_root()
    nsm = instance.directory / "vsock_5008"
    seen: list[tuple[str, bool]] = []

    async def events(call: IncomingCall) -> None:
        await call.reply({})
        await call.send(b'{"event": "phase", "phase": "SERVING"}\n')
        async for _ in call:
            pass
        await asyncio.Event().wait()

    def changed(state: State) -> None:
        seen.append((state.phase, nsm.is_socket()))
        if state.phase == "SERVING":
            os.kill(os.getpid(), signal.SIGTERM)

    async def run() -> State:
        async with serve(UnixAddress(str(instance.directory / "guest_5005")), {"events": events}, on_error=print):
            launch = launch_of(instance, model)
            return await Supervisor(launch, on_change=changed, on_event=lambda event: None).run()

    state = asyncio.run(run())
    assert (state.phase, state.launcher, state.network, state.restarts) == ("STOPPED", "qemu", "none", 0)
    assert ("SERVING", True) in seen
    assert state.pcrs["0"] == image().registers()[0].hex()
    assert list(processes_of(instance)) == []


@pytest.mark.processes
def test_nothing_outlives_a_supervisor_that_is_killed(instance: Instance, model: Path) -> None:
    launch_of(instance, model)
    program = f"""
import asyncio
from pathlib import Path
from attestation.reference import PcrSet
from parent.launch.qemu import QemuMachine
from parent.registry import Instance
async def boot():
    instance = Instance(Path({str(instance.directory)!r}))
    machine = QemuMachine(instance, instance.directory / "enclave.eif", memory=1 << 30)
    async with machine.boot(await machine.measure()) as running:
        await running.heard.wait()
        print("up", flush=True)
        await asyncio.Event().wait()
asyncio.run(boot())
"""
    command = [sys.executable, "-c", program]
    with subprocess.Popen(command, stdout=subprocess.PIPE, cwd=Path(__file__).parents[2]) as supervisor:
        assert supervisor.stdout is not None
        assert supervisor.stdout.readline() == b"up\n"
        assert len(list(processes_of(instance))) == 2
        supervisor.kill()
    until(lambda: not list(processes_of(instance)))
