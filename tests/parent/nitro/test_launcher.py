"""``strongroom start --launcher nitro``: the machine, over the stand-in for nitro-cli."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest

import parent.launch.nitro
from attestation.eif import ImageError
from attestation.manifest import ModelManifest
from attestation.measure import read_image
from attestation.reference import digest_text
from parent.config import LaunchConfigurationError
from parent.launch.machine import LaunchError, Machine, Places
from parent.launch.nitro import FIRST_CID, NitroMachine, cid_of
from parent.launch.supervisor import Launch, Supervisor
from parent.modelstore import ModelStore
from parent.nitro.cli import NitroCli
from parent.registry import Instance, Registry
from tests.gguf_files import tiny_model
from tests.machines import until
from tests.nitro_hosts import NitroHost
from tests.vsock import pretend_vsock
from vsockrpc.address import VMADDR_CID_ANY, VsockAddress

CONFIGURATION = """
[rpc]
listen = "vsock:any:5005"
[nsm]
address = "device:/dev/nsm"
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
def model(host: NitroHost) -> Path:
    path = host.folder / "tiny.gguf"
    path.write_bytes(tiny_model().encode())
    return path


@pytest.fixture
def instance(host: NitroHost, model: Path, monkeypatch: pytest.MonkeyPatch) -> Instance:
    monkeypatch.setenv("STRONGROOM_HOME", str(host.folder / "home"))
    monkeypatch.setenv("STAND_IN", str(host.folder))
    monkeypatch.setattr(parent.launch.nitro, "PAUSE_SECONDS", 0.0)
    instance = Registry.of_user().create("t")
    manifest = digest_text(ModelManifest.from_gguf(model).digest())
    instance.configuration.write_text(CONFIGURATION.format(manifest=manifest) + KMS)
    return instance


def machine(host: NitroHost, instance: Instance, eif: Path, **how: Any) -> NitroMachine:
    cli = NitroCli(str(host.folder / "bin/nitro-cli"))
    options = {"memory": 1 << 30, "cpus": None, "poll": 0.01, **how}
    return NitroMachine(instance, eif, cli=cli, root=host.root, **options)


async def test_an_enclave_runs_for_as_long_as_its_boot(host: NitroHost, instance: Instance, eif: Path) -> None:
    nitro: Machine = machine(host, instance, eif)
    measured = await nitro.measure()
    assert measured == read_image(eif).measurements
    async with nitro.boot(measured) as enclave:
        (running,) = host.enclaves
        assert running["EnclaveName"] == "strongroom-t"
        assert running["EnclaveCID"] == cid_of("t")
        assert running["CPUIDs"] == [2, 3, 6, 7]
        assert running["MemoryMiB"] == 1024
        assert running["Flags"] == "NONE"
        assert await enclave.network() == "none"
    assert host.enclaves == []


async def test_memory_and_cpus_are_as_somebody_wants_them(host: NitroHost, instance: Instance, eif: Path) -> None:
    nitro = machine(host, instance, eif, memory=(1 << 30) + 1, cpus=2)
    async with nitro.boot(await nitro.measure()):
        (running,) = host.enclaves
        assert (running["MemoryMiB"], running["NumberOfCPUs"]) == (1025, 2)


async def test_cpus_that_nobody_named_are_of_the_node_that_has_the_memory(
    host: NitroHost, instance: Instance, eif: Path
) -> None:
    host.lay_out({0: [0, 1, 2, 6, 7, 8], 1: [3, 4, 5, 9, 10, 11]}, pool="1,7,3-4,9-10", free_mib={0: 4096, 1: 512})
    host.know(pool=[1, 3, 4, 7, 9, 10])
    nitro = machine(host, instance, eif)
    async with nitro.boot(await nitro.measure()):
        assert host.enclaves[0]["NumberOfCPUs"] == 2
    small = machine(host, instance, eif, memory=256 << 20)
    async with small.boot(await small.measure()):
        assert host.enclaves[0]["NumberOfCPUs"] == 4


def test_where_host_and_enclave_meet(host: NitroHost, instance: Instance, eif: Path) -> None:
    nitro = machine(host, instance, eif)
    assert nitro.launcher == "nitro"
    assert nitro.places == Places(
        rpc=VsockAddress(cid_of("t"), 5005),
        store=VsockAddress(VMADDR_CID_ANY, 5006),
        egress=VsockAddress(VMADDR_CID_ANY, 5007),
        nsm=None,
    )
    instance.configuration.write_text(instance.configuration.read_text().removesuffix(KMS))
    assert machine(host, instance, eif).places.egress is None


def test_a_name_has_one_cid() -> None:
    cids = {cid_of(name) for name in ("t", "t", "demo", "enclave")}
    assert len(cids) == 3
    assert all(FIRST_CID <= cid < VMADDR_CID_ANY for cid in cids)


@pytest.mark.parametrize(
    ("old", "new", "key"),
    [
        ("vsock:any:5005", "vsock:16:5005", "rpc.listen"),
        ("vsock:any:5005", "unix:rpc.sock", "rpc.listen"),
        ("device:/dev/nsm", "vsock:3:5008", "nsm.address"),
        ("vsock:3:5006", "vsock:2:5006", "model.store"),
        ("vsock:3:5006", "unix:models.sock", "model.store"),
        ("vsock:3:5007", "tcp:127.0.0.1:5007", "kms.egress"),
    ],
)
def test_a_configuration_for_another_machine_is_refused(
    host: NitroHost, instance: Instance, eif: Path, old: str, new: str, key: str
) -> None:
    instance.configuration.write_text(instance.configuration.read_text().replace(old, new))
    with pytest.raises(LaunchConfigurationError) as caught:
        machine(host, instance, eif)
    assert caught.value.message.startswith(f"{key}: ")


async def test_what_an_earlier_supervisor_left_is_ended_first(host: NitroHost, instance: Instance, eif: Path) -> None:
    left = machine(host, instance, eif)
    boot = left.boot(await left.measure())
    await boot.__aenter__()
    nitro = machine(host, instance, eif)
    async with nitro.boot(await nitro.measure()):
        assert len(host.enclaves) == 1
    await boot.__aexit__(None, None, None)  # its enclave is gone, which is no error
    assert host.enclaves == []


async def test_an_enclave_that_dies_is_noticed(host: NitroHost, instance: Instance, eif: Path) -> None:
    nitro = machine(host, instance, eif)
    async with nitro.boot(await nitro.measure()) as enclave:
        waiting = asyncio.ensure_future(enclave.wait())
        host.know(enclaves=[])
        assert await waiting is None


async def test_one_that_is_ending_has_ended(host: NitroHost, instance: Instance, eif: Path) -> None:
    nitro = machine(host, instance, eif)
    async with nitro.boot(await nitro.measure()) as enclave:
        host.know(enclaves=[{**host.enclaves[0], "State": "TERMINATING"}])
        assert await enclave.wait() is None


async def test_nitro_cli_may_fail_for_a_moment(host: NitroHost, instance: Instance, eif: Path) -> None:
    nitro = machine(host, instance, eif)
    async with nitro.boot(await nitro.measure()) as enclave:
        host.know(faults={"describe-enclaves": ["not-set-up", "silent"]})
        waiting = asyncio.ensure_future(enclave.wait())
        await asyncio.to_thread(
            until, lambda: len([call for call in host.calls if call[0] == "describe-enclaves"]) >= 7
        )
        assert not waiting.done()
        host.know(faults={"describe-enclaves": "silent"})
        assert await waiting is None
        host.know(faults={})


@pytest.mark.parametrize(
    ("fault", "code"),
    [("no-driver", "driver_missing"), ("no-heartbeat", "boot_failed"), ("bad-eif", "bad_image")],
)
async def test_a_start_that_fails_says_why(
    host: NitroHost, instance: Instance, eif: Path, fault: str, code: str
) -> None:
    host.know(faults={"run-enclave": fault})
    nitro = machine(host, instance, eif)
    with pytest.raises(LaunchError) as caught:
        async with nitro.boot(await nitro.measure()):
            pass
    assert caught.value.code == code


async def test_what_the_host_lacks_is_said_before_anything_starts(
    host: NitroHost, instance: Instance, eif: Path
) -> None:
    nitro = machine(host, instance, eif, memory=8 << 30)
    with pytest.raises(LaunchError) as caught:
        async with nitro.boot(await nitro.measure()):
            pass
    assert (caught.value.code, caught.value.expected) == ("hugepages_missing", "8192 MiB on NUMA node 0")
    assert not any(call[0] == "run-enclave" for call in host.calls)


async def test_a_refusal_that_passes_is_tried_again(host: NitroHost, instance: Instance, eif: Path) -> None:
    host.know(faults={"run-enclave": ["cid-in-use", "another-start"]})
    nitro = machine(host, instance, eif)
    async with nitro.boot(await nitro.measure()):
        assert len(host.enclaves) == 1
    host.know(faults={"run-enclave": "cid-in-use"})
    with pytest.raises(LaunchError) as caught:
        async with nitro.boot(await nitro.measure()):
            pass
    assert caught.value.code == "start_refused"


async def test_a_start_that_is_given_up_leaves_no_program(host: NitroHost, instance: Instance, eif: Path) -> None:
    host.know(faults={"run-enclave": "hangs"})
    nitro = machine(host, instance, eif)
    measured = await nitro.measure()

    async def boot() -> None:
        async with nitro.boot(measured):
            pass

    booting = asyncio.ensure_future(boot())
    await asyncio.to_thread(until, lambda: any(call[0] == "run-enclave" for call in host.calls))
    booting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await booting
    assert host.calls[-1] == ["describe-enclaves"]  # whether there is anything to end


async def test_another_image_is_not_what_was_measured(host: NitroHost, instance: Instance, eif: Path) -> None:
    nitro = machine(host, instance, eif)
    measured = await nitro.measure()
    host.know(measurements={"PCR0": "ab" * 48})
    with pytest.raises(LaunchError) as caught:
        async with nitro.boot(measured):
            pass
    assert caught.value.code == "measurements_differ"
    assert host.enclaves == []
    eif.write_bytes(b"no image")
    with pytest.raises(ImageError):
        await nitro.measure()


def test_a_supervisor_tells_what_is_wrong_with_the_host(
    host: NitroHost, instance: Instance, eif: Path, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pretend_vsock(monkeypatch, host.folder, [])
    host.know(faults={"run-enclave": "not-in-group"})
    text = instance.configuration.read_text()
    instance.configuration.write_text(text.removesuffix(KMS))
    manifest = ModelManifest.from_gguf(model)
    launch = Launch(instance, machine(host, instance, eif), ModelStore(manifest, model))
    state = asyncio.run(Supervisor(launch, on_change=lambda state: None, on_event=lambda event: None).run())
    assert state.launcher == "nitro"
    assert state.phase == "FAILED"
    assert state.error is not None
    assert state.error["code"] == "not_in_group"
    assert state.pcrs["0"] == read_image(eif).measurements.pcr0.hex()
