"""What a doctor finds on machines that lack one thing at a time: each finding says the numbers and what to do."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from attestation.eif import Architecture
from parent.doctor import machine, network, nitro
from parent.doctor.command import CHECKS, diagnose, natural_aim
from parent.doctor.findings import Aim, Finding, Level, Wanted
from parent.doctor.host import Clock, Ran, Reached, Unreached
from parent.image.sizing import GIB
from tests.doctor_hosts import IMAGE, KMS, S3, FakeMachine, planned
from tests.nitro_hosts import NitroHost

NITRO = Wanted(Aim.NITRO, IMAGE, planned(), ((KMS, None), (S3, None)), KMS)
QEMU = Wanted(Aim.QEMU, IMAGE, planned())
PROCESS = Wanted(Aim.PROCESS, None, planned())
MEMORY = NITRO.memory_mib
SHORT = (MEMORY or 0) + 256 - 1024  # of a laptop with 1 GiB free, QEMU's own 256 MiB among it


@pytest.fixture
def laptop(tmp_path: Path) -> FakeMachine:
    there = FakeMachine.laptop(tmp_path / "laptop")
    there.tools()
    return there


@pytest.fixture
def parent(tmp_path: Path) -> FakeMachine:
    return FakeMachine.parent(tmp_path)


def hindrances(host: FakeMachine, wanted: Wanted) -> list[Finding]:
    return [each for each in diagnose(host, wanted) if each.level is Level.PROBLEM]


def notes(host: FakeMachine, wanted: Wanted) -> list[Finding]:
    return [each for each in diagnose(host, wanted) if each.level is Level.NOTE]


def only(findings: list[Finding]) -> Finding:
    (finding,) = findings
    return finding


# --- Machines on which all is well ------------------------------------------------------------------------------------


def test_a_parent_that_is_set_up_hinders_nothing(parent: FakeMachine) -> None:
    found = diagnose(parent, NITRO)
    assert {each.level for each in found} == {Level.OK}
    assert {each.check for each in found} == {
        *("system", "cpu-features", "device", "nitro-cli", "allocator", "cpu-pool", "numa", "hugepages", "instance"),
        *("vsock", "disk", "clock", "reach", "clock-kms"),
    }


def test_a_laptop_hinders_neither_process_nor_machine(laptop: FakeMachine) -> None:
    assert hindrances(laptop, PROCESS) == notes(laptop, PROCESS) == []
    assert hindrances(laptop, QEMU) == []
    assert only(notes(laptop, QEMU)).check == "emulation"


@pytest.mark.parametrize("aim", list(Aim))
def test_a_machine_alone_can_be_looked_at(parent: FakeMachine, aim: Aim) -> None:
    parent.tools()
    assert hindrances(parent, Wanted(aim)) == []


def test_a_machine_is_by_nature_what_it_has_the_means_for(tmp_path: Path, parent: FakeMachine) -> None:
    bare = FakeMachine.laptop(tmp_path / "laptop")
    assert natural_aim(bare) is Aim.PROCESS
    bare.tools()
    assert natural_aim(bare) is Aim.QEMU
    bare.programs["nitro-cli"] = Ran(0, "Nitro CLI 1.4.2")
    assert natural_aim(bare) is Aim.NITRO
    assert natural_aim(parent) is Aim.NITRO


# --- What is missing, one at a time -----------------------------------------------------------------------------------


def no_device(host: FakeMachine) -> None:
    host.remove("dev/nitro_enclaves")


def no_driver_either(host: FakeMachine) -> None:
    no_device(host)
    host.remove("sys/module/nitro_enclaves/parameters/ne_cpus")
    (host.root / "sys/module/nitro_enclaves/parameters").rmdir()
    (host.root / "sys/module/nitro_enclaves").rmdir()


def no_ec2_at_all(host: FakeMachine) -> None:
    no_driver_either(host)
    host.write("sys/class/dmi/id/sys_vendor", "QEMU\n")


def no_group(host: FakeMachine) -> None:
    host.usable = False


def no_cli(host: FakeMachine) -> None:
    del host.programs["nitro-cli"]


def broken_cli(host: FakeMachine) -> None:
    host.programs["nitro-cli"] = Ran(127, "cannot open shared object\n")


def hanging_cli(host: FakeMachine) -> None:
    host.programs["nitro-cli"] = Ran(None, "TimeoutExpired")


def no_allocator(host: FakeMachine) -> None:
    host.remove("etc/nitro_enclaves/allocator.yaml")


def little_told(host: FakeMachine) -> None:
    host.write("etc/nitro_enclaves/allocator.yaml", "---\nmemory_mib: 512\ncpu_count: 2\n")


def one_cpu_told(host: FakeMachine) -> None:
    host.write("etc/nitro_enclaves/allocator.yaml", "---\nmemory_mib: 4096\ncpu_pool: 3\n")


def lay_out(host: FakeMachine, pool: str, free: int, **more: int) -> None:
    NitroHost(host.root, host.root).lay_out({0: range(8)}, pool=pool, free_mib={0: free}, **more)


def no_pages(host: FakeMachine) -> None:
    lay_out(host, "2-3,6-7", 0)


def few_pages(host: FakeMachine) -> None:
    lay_out(host, "2-3,6-7", 1024)


def pages_in_use(host: FakeMachine) -> None:
    lay_out(host, "2-3,6-7", 4096)
    host.write("sys/devices/system/node/node0/hugepages/hugepages-2048kB/free_hugepages", "5\n")


def no_pool(host: FakeMachine) -> None:
    lay_out(host, "", 4096)


def half_a_core(host: FakeMachine) -> None:
    lay_out(host, "2-3,6", 4096)


def two_nodes(host: FakeMachine) -> None:
    """With one CPU of the pool on each."""
    NitroHost(host.root, host.root).lay_out({0: range(4), 1: range(4, 8)}, pool="3,7", free_mib={0: 4096, 1: 4096})


def enclave_running(host: FakeMachine, cpus: Sequence[int] = (2, 3, 6)) -> None:
    running = {"EnclaveID": "i-1-enc1", "EnclaveName": "other", "EnclaveCID": 16, "CPUIDs": list(cpus)}
    host.enclaves = Ran(0, json.dumps([{**running, "MemoryMiB": 512, "ProcessID": 7}]))


def a_small_instance(host: FakeMachine) -> None:
    lay_out(host, "2-3,6-7", 4096, memory_mib=1024)


def no_vsock(host: FakeMachine) -> None:
    host.remove("dev/vsock")


def no_room(host: FakeMachine) -> None:
    host.room = GIB


def an_old_cpu(host: FakeMachine) -> None:
    host.write("proc/cpuinfo", "processor : 0\nflags : fpu avx fma\n")


def one_cpu_without(host: FakeMachine) -> None:
    host.write("proc/cpuinfo", "processor : 0\nflags : avx2 fma\nprocessor : 1\nflags : avx2\n")


def another_architecture(host: FakeMachine) -> None:
    host.programs["uname"] = Ran(0, "Linux aarch64\n")


def no_linux(host: FakeMachine) -> None:
    host.programs["uname"] = Ran(0, "Darwin arm64\n")


def kms_away(host: FakeMachine) -> None:
    host.answers[KMS] = Unreached("deadline", "no answer within 8 s")


def s3_is_another(host: FakeMachine) -> None:
    host.answers[S3] = Unreached("tls", "certificate verify failed")


def a_wrong_clock(host: FakeMachine) -> None:
    host.answers[KMS] = Reached(-301.0)


@pytest.mark.parametrize(
    ("take_away", "check", "got", "todo"),
    [
        (no_device, "device", "has no device", "enclaveOptions --value Enabled=true"),
        (no_driver_either, "device", "no driver", "modprobe nitro_enclaves"),
        (no_ec2_at_all, "device", "vendor QEMU", "--for qemu"),
        (no_group, "groups", "no", "usermod -aG ne somebody"),
        (no_cli, "nitro-cli", "none", "dnf install aws-nitro-enclaves-cli"),
        (broken_cli, "nitro-cli", "cannot open shared object", "reinstall"),
        (hanging_cli, "nitro-cli", "TimeoutExpired", "reinstall"),
        (no_allocator, "allocator", "none", f"nitro bootstrap --memory-mib {MEMORY} --cpus 2"),
        (little_told, "allocator", "memory_mib 512, 2 CPUs", f"--memory-mib {MEMORY}"),
        (one_cpu_told, "allocator", "memory_mib 4096, 1 CPUs", "--cpus 2"),
        (no_pages, "hugepages", "0 MiB free of 0 MiB", f"--memory-mib {MEMORY} --cpus 2; if pages"),
        (few_pages, "hugepages", "1024 MiB free of 1024 MiB", "reboot"),
        (pages_in_use, "hugepages", "10 MiB free of 4096 MiB", "describe-enclaves"),
        (no_pool, "cpu-pool", "0 CPUs: none", "--cpus 2"),
        (half_a_core, "cpu-pool", "3 CPUs: 2,3,6", "a multiple of 2"),
        (enclave_running, "cpu-pool", "1 of 4", "strongroom nitro terminate`): other"),
        (two_nodes, "numa", "nodes 0, 1", "cpu_pool"),
        (a_small_instance, "instance", "1024 MiB", "strongroom image size"),
        (no_vsock, "vsock", "nothing", "modprobe vsock"),
        (no_room, "disk", "1024 MiB", "free 3072 MiB below /var/lib"),
        (an_old_cpu, "cpu-features", "without avx2", "portable"),
        (one_cpu_without, "cpu-features", "without fma", "portable"),
        (another_architecture, "system", "Linux aarch64", "a machine of x86_64"),
        (no_linux, "system", "Darwin arm64", "Linux"),
        (kms_away, "reach", "deadline: no answer within 8 s", "VPC endpoint"),
        (s3_is_another, "reach", "tls: certificate verify failed", "who answers there"),
        (a_wrong_clock, "clock-kms", "301 s behind", "chrony"),
    ],
)
def test_a_parent_that_lacks_one_thing(
    parent: FakeMachine, take_away: Callable[[FakeMachine], None], check: str, got: str, todo: str
) -> None:
    take_away(parent)
    finding = only(hindrances(parent, NITRO))
    assert finding.check == check
    assert got in str(finding.got)
    assert finding.expected
    assert todo in str(finding.todo)


def test_a_pool_of_two_nodes_does_where_one_of_them_is_enough(parent: FakeMachine) -> None:
    lay = NitroHost(parent.root, parent.root).lay_out
    lay({0: range(4), 1: range(4, 8)}, pool="2-3,6-7", free_mib={0: 4096, 1: 16})
    assert hindrances(parent, NITRO) == []
    assert only(notes(parent, NITRO)).check == "numa"
    enclave_running(parent, [2, 3])  # and leaves CPUs where the memory is not
    assert [each.check for each in hindrances(parent, NITRO)] == ["hugepages"]


@pytest.mark.parametrize("cpus", [(2, 6), (), (0, 1, 4, 5), (2, 6, 9999)])
def test_what_an_enclave_leaves_is_enough(parent: FakeMachine, cpus: Sequence[int]) -> None:
    enclave_running(parent, cpus)
    assert hindrances(parent, NITRO) == notes(parent, NITRO) == []


@pytest.mark.parametrize("said", [Ran(1, "[ E19 ]"), Ran(None, "TimeoutExpired"), Ran(0, "{}"), Ran(0, "")])
def test_enclaves_of_which_nobody_tells_get_a_note(parent: FakeMachine, said: Ran) -> None:
    parent.enclaves = said
    assert hindrances(parent, NITRO) == []
    assert only(notes(parent, NITRO)).check == "enclaves"


def test_a_node_without_huge_pages_has_none(parent: FakeMachine) -> None:
    """Its folder is away, and another node's is there."""
    lay_out(parent, "2-3,6-7", 4096)
    (parent.root / "sys/devices/system/node/node0").rename(parent.root / "sys/devices/system/node/node5")
    assert [each.check for each in hindrances(parent, NITRO)] == ["hugepages"]


def test_what_root_may_is_no_finding_about_others(parent: FakeMachine) -> None:
    parent.superuser = True
    assert hindrances(parent, NITRO) == []
    assert only(notes(parent, NITRO)).check == "groups"


@pytest.mark.parametrize(
    ("docker", "level", "todo"),
    [(None, Level.NOTE, "image build"), (Ran(1, ""), Level.NOTE, "usermod -aG docker"), (Ran(0, ""), Level.OK, "")],
)
def test_docker_is_looked_at_while_there_is_no_image(
    parent: FakeMachine, docker: Ran | None, level: Level, todo: str
) -> None:
    if docker is not None:
        parent.programs["docker"] = docker
    finding = only([each for each in diagnose(parent, Wanted(Aim.NITRO)) if each.check == "docker"])
    assert (finding.level, todo in str(finding.todo)) == (level, True)
    assert not any(each.check == "docker" for each in diagnose(parent, NITRO))


def no_tool(host: FakeMachine) -> None:
    host.remove("home/somebody/.cache/strongroom/qemu-0123456789abcdef/bin/qemu-system-x86_64")


def an_empty_folder_named(host: FakeMachine) -> None:
    host.environment = {**host.environment, "STRONGROOM_VSOCK_DEVICE": "/nowhere"}


def little_memory(host: FakeMachine) -> None:
    host.write("proc/meminfo", "MemAvailable: 1048576 kB\n")


def no_meminfo(host: FakeMachine) -> None:
    host.remove("proc/meminfo")


@pytest.mark.parametrize(
    ("take_away", "check", "got", "todo"),
    [
        (no_tool, "qemu", "None", "scripts/machine/qemu"),
        (an_empty_folder_named, "vsock-device", "/nowhere", "scripts/machine/vsock-device"),
        (little_memory, "memory", "1024 MiB", f"free {SHORT} MiB"),
        (no_meminfo, "memory", "None", "/proc"),
    ],
)
def test_a_laptop_that_lacks_one_thing(
    laptop: FakeMachine, take_away: Callable[[FakeMachine], None], check: str, got: str, todo: str
) -> None:
    take_away(laptop)
    finding = only(hindrances(laptop, QEMU))
    assert finding.check == check
    assert got in str(finding.got)
    assert todo in str(finding.todo)


def test_a_tool_may_be_named(laptop: FakeMachine) -> None:
    no_tool(laptop)
    laptop.write("opt/qemu/bin/qemu-system-x86_64", "")
    laptop.environment = {**laptop.environment, "STRONGROOM_QEMU": "/opt/qemu"}
    assert hindrances(laptop, QEMU) == []


def test_building_the_tools_takes_more_room_than_running_them(laptop: FakeMachine) -> None:
    laptop.room = GIB
    assert hindrances(laptop, QEMU) == []
    no_tool(laptop)
    assert [each.check for each in hindrances(laptop, QEMU)] == ["qemu", "disk"]


def test_state_and_cache_are_where_the_environment_says(laptop: FakeMachine) -> None:
    assert machine.state_folder(laptop) == "/home/somebody/.local/state/strongroom"
    laptop.environment = {"XDG_CACHE_HOME": "/c", "XDG_STATE_HOME": "/s"}
    assert (machine.cache_folder(laptop), machine.state_folder(laptop)) == ("/c/strongroom", "/s/strongroom")
    laptop.environment = {"STRONGROOM_HOME": "/h"}
    assert machine.state_folder(laptop) == "/h"


def test_an_emulated_cpu_has_no_avx_512(laptop: FakeMachine) -> None:
    native = replace(IMAGE, cpu_features=frozenset({"avx2", "avx512f"}))
    finding = only(hindrances(laptop, Wanted(Aim.QEMU, native)))
    assert (finding.check, finding.got) == ("cpu-features", "without avx512f")


def test_processes_run_what_was_compiled_here(laptop: FakeMachine) -> None:
    an_old_cpu(laptop)
    assert hindrances(laptop, PROCESS) == []


def test_an_image_that_does_not_say_its_features_is_taken_for_a_portable_one(parent: FakeMachine) -> None:
    silent = replace(IMAGE, cpu_features=None)
    assert hindrances(parent, replace(NITRO, image=silent)) == []
    an_old_cpu(parent)
    assert only(hindrances(parent, replace(NITRO, image=silent))).expected == "avx avx2 bmi2 f16c fma"


def test_features_of_another_architecture_are_not_guessed(parent: FakeMachine) -> None:
    another_architecture(parent)
    silent = replace(IMAGE, architecture=Architecture.AARCH64, cpu_features=None)
    assert only(notes(parent, replace(NITRO, image=silent))).check == "cpu-features"
    assert hindrances(parent, replace(NITRO, image=silent)) == []


def test_fewer_cpus_than_planned_are_worth_a_note(laptop: FakeMachine) -> None:
    finding = only(notes(laptop, Wanted(Aim.PROCESS, plan=planned(cpus=16))))
    assert (finding.check, finding.expected, finding.got) == ("cpus", "16", "8")


def test_without_a_model_memory_is_that_of_the_image(parent: FakeMachine) -> None:
    few_pages(parent)
    small = Wanted(Aim.NITRO, IMAGE)  # twice 200 MiB and the archive of 100
    assert small.memory_mib == 500
    assert hindrances(parent, small) == []


def test_an_older_cli_is_worth_a_note(parent: FakeMachine) -> None:
    parent.programs["nitro-cli"] = Ran(0, "Nitro CLI 1.2.0")
    finding = only(notes(parent, NITRO))
    assert (finding.check, finding.expected, finding.got) == ("nitro-cli", "1.4", "1.2.0")


@pytest.mark.parametrize(
    ("text", "memory", "cpus"),
    [
        ("---\nmemory_mib: 512\ncpu_count: 2\n", 512, 2),
        ('memory_mib: "512"\n# memory_mib: 9\ncpu_pool: 2,3,6-9\n', 512, 6),
        ("- memory_mib: 512\n  cpu_count: 2\n- memory_mib: 1024\n  cpu_pool: 4-7\n", 1536, 6),
        ("memory_mib: many\nmemory_mib: 1,2\nmemory_mib: 99999999999\n", 0, 0),
        ("", 0, 0),
    ],
)
def test_what_the_allocator_is_told(text: str, memory: int, cpus: int) -> None:
    assert nitro.allocated(text) == {"memory_mib": memory, "cpu_count": cpus}


# --- The clock and the network ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("said", "level"), [(Clock(True, 0.1), Level.OK), (Clock(False, 16.0), Level.NOTE), (None, Level.NOTE)]
)
def test_a_clock_that_nobody_keeps_is_worth_a_note(laptop: FakeMachine, said: Clock | None, level: Level) -> None:
    laptop.said = said
    assert only(list(network.clock(laptop, PROCESS))).level is level


@pytest.mark.parametrize(
    ("ahead", "level"),
    [
        (4.9, Level.OK),
        (-4.9, Level.OK),
        (5.0, Level.NOTE),
        (299.0, Level.NOTE),
        (300.0, Level.PROBLEM),
        (None, Level.NOTE),
    ],
)
def test_the_clock_is_compared_with_kms_s(parent: FakeMachine, ahead: float | None, level: Level) -> None:
    parent.answers[KMS] = Reached(ahead)
    found = [each for each in network.places(parent, NITRO) if each.check == "clock-kms"]
    assert only(found).level is level


@pytest.mark.parametrize("stage", ["name", "connection", "tls", "answer", "deadline"])
def test_every_way_not_to_be_reached_says_what_to_do(parent: FakeMachine, stage: str) -> None:
    parent.answers[S3] = Unreached(stage, "so it is")
    assert only(hindrances(parent, NITRO)).todo == network.DO[stage]


def test_an_emulated_kms_is_trusted_by_its_own_root(parent: FakeMachine) -> None:
    assert hindrances(parent, replace(NITRO, places=((KMS, b"root"), (S3, None)))) == []
    assert parent.trusted == {KMS: b"root", S3: None}


def test_a_parent_whose_way_to_kms_nobody_tried_gets_a_note(parent: FakeMachine) -> None:
    assert only(notes(parent, Wanted(Aim.NITRO, IMAGE, planned()))).check == "reach"


# --- Whatever the machine says ----------------------------------------------------------------------------------------

FILES = [
    "proc/cpuinfo",
    "proc/meminfo",
    "etc/nitro_enclaves/allocator.yaml",
    "sys/class/dmi/id/sys_vendor",
    "sys/module/nitro_enclaves/parameters/ne_cpus",
    "sys/devices/system/node/node0/meminfo",
    "sys/devices/system/node/node0/hugepages/hugepages-2048kB/nr_hugepages",
    "sys/devices/system/cpu/cpu1/topology/thread_siblings_list",
]


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=60)
@given(file=st.sampled_from(FILES), data=st.binary(max_size=200), output=st.text(max_size=40))
def test_no_check_raises(parent: FakeMachine, file: str, data: bytes, output: str) -> None:
    path = parent.root / file
    before = path.read_bytes()
    path.write_bytes(data)
    parent.programs["nitro-cli"] = parent.programs["uname"] = parent.enclaves = Ran(0, output)
    try:
        for wanted in (NITRO, QEMU, PROCESS, Wanted(Aim.NITRO)):
            for finding in diagnose(parent, wanted):
                assert finding.check
                assert finding.found
                assert finding.level is not Level.PROBLEM or finding.todo
    finally:
        path.write_bytes(before)


def test_what_cannot_be_found_out_is_a_problem(parent: FakeMachine) -> None:
    parent.write("sys/module/nitro_enclaves/parameters/ne_cpus", "not CPUs\n")
    finding = only(hindrances(parent, NITRO))
    assert finding.check == "set-apart"
    assert "ne_cpus" in finding.found


def test_every_check_is_run() -> None:
    modules = (machine, network, nitro)
    named = {each.__name__ for each in CHECKS}
    assert len(named) == len(CHECKS)
    for module in modules:
        for name, value in vars(module).items():
            is_check = callable(value) and getattr(value, "__module__", "") == module.__name__ and name[0] != "_"
            arguments = getattr(getattr(value, "__code__", None), "co_varnames", ())[:2]
            assert not (is_check and arguments == ("host", "wanted")) or name in named, name
