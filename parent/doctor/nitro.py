"""Checks of a parent instance: the driver, nitro-cli, and what is set apart for enclaves."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Final

from parent.doctor.findings import Aim, Finding, Wanted, note, ok, problem
from parent.doctor.host import Host
from parent.image.sizing import GIB, HUGE_PAGE, MIB
from parent.nitro.cli import RunningEnclave, parse_enclaves
from parent.nitro.errors import ALLOCATOR_FILE, ALLOCATOR_UNIT, CPU_POOL, DEVICE, GROUP, NitroError
from parent.nitro.resources import EnclaveResources, Free, HugePages, Topology, node_for, parse_cpus

VENDOR: Final = "/sys/class/dmi/id/sys_vendor"
NITRO_CLI: Final = "nitro-cli"
DOCKER: Final = "docker"
TESTED: Final = (1, 4)
"""The version of nitro-cli whose output and errors this project was written for."""

_VERSION: Final = re.compile(r"([0-9]{1,4})\.([0-9]{1,4})(?:\.[0-9]{1,4})?")
_SETTING: Final = re.compile(r"""^\s*(?:-\s+)?(memory_mib|cpu_count|cpu_pool)\s*:\s*"?([0-9][0-9,\- ]{0,199})"?\s*$""")


def is_parent(host: Host) -> bool:
    """It could be one: the driver's device or module is there, or nitro-cli."""
    return host.exists(DEVICE) or host.exists("/sys/module/nitro_enclaves") or host.program(NITRO_CLI) is not None


def device(host: Host, wanted: Wanted) -> Iterator[Finding]:
    """The driver, and that this user may use it."""
    if wanted.aim is not Aim.NITRO:
        return
    if not host.exists(DEVICE):
        vendor = (host.text(VENDOR) or "unknown").strip()
        if host.exists("/sys/module/nitro_enclaves"):
            todo = "enclaves are not enabled: stop the instance, then `aws ec2 modify-instance-attribute "
            todo += "--instance-id ID --attribute enclaveOptions --value Enabled=true`, or launch it with them"
            got = "the driver is loaded and has no device"
        elif vendor == "Amazon EC2":
            todo = "sudo modprobe nitro_enclaves, and launch the instance with --enclave-options Enabled=true"
            got = "no driver"
        else:
            todo = "use an EC2 instance (`strongroom nitro launch`), or `--for qemu` on this machine"
            got = f"vendor {vendor[:60]}"
        yield problem("device", "there is no Nitro Enclaves device", expected=DEVICE, got=got, todo=todo)
    elif host.is_superuser():
        yield ok("device", f"{DEVICE} is there, and root may use it")
        found, todo = "this looked as root, who may use everything", f"sudo usermod -aG {GROUP} USER for another user"
        yield note("groups", found, todo=f"{todo}, and look again as that user")
    elif host.may_use(DEVICE):
        yield ok("device", f"{DEVICE} is there, and {host.user()} may use it")
    else:
        todo = f"sudo usermod -aG {GROUP} {host.user()}, then log in again"
        yield problem(
            "groups", f"{host.user()} may not use {DEVICE}", expected=f"member of {GROUP}", got="no", todo=todo
        )


def nitro_cli(host: Host, wanted: Wanted) -> Iterator[Finding]:
    """There, and of a version that is known."""
    if wanted.aim is not Aim.NITRO:
        return
    if host.program(NITRO_CLI) is None:
        todo = "sudo dnf install aws-nitro-enclaves-cli (Amazon Linux 2023), or `strongroom nitro bootstrap`"
        yield problem("nitro-cli", "nitro-cli is not installed", expected="nitro-cli on PATH", got="none", todo=todo)
        return
    ran = host.run(NITRO_CLI, "--version")
    match = _VERSION.search(ran.output)
    if ran.status != 0 or match is None:
        got = ran.output.strip()[:200] or f"status {ran.status}"
        todo = "reinstall aws-nitro-enclaves-cli"
        yield problem("nitro-cli", "nitro-cli does not say its version", expected="a version", got=got, todo=todo)
    elif (int(match[1]), int(match[2])) < TESTED:
        expected = ".".join(map(str, TESTED))
        todo = "sudo dnf upgrade aws-nitro-enclaves-cli"
        yield note("nitro-cli", "an older nitro-cli than was tested", expected=expected, got=match[0], todo=todo)
    else:
        yield ok("nitro-cli", f"version {match[0]}")


def allocator(host: Host, wanted: Wanted) -> Iterator[Finding]:
    """What the allocator is told to set apart, against what the enclave takes."""
    if wanted.aim is not Aim.NITRO:
        return
    text = host.text(ALLOCATOR_FILE)
    if text is None:
        todo = bootstrap(wanted)
        yield problem("allocator", f"{ALLOCATOR_FILE} is not there", expected="a file", got="none", todo=todo)
        return
    told = allocated(text)
    memory = wanted.memory_mib or 0
    got = f"memory_mib {told['memory_mib']}, {told['cpu_count']} CPUs"
    if told["memory_mib"] < memory or told["cpu_count"] < wanted.cpus:
        needs, found = f"memory_mib >= {memory}, {wanted.cpus} CPUs", f"{ALLOCATOR_FILE} sets too little apart"
        yield problem("allocator", found, expected=needs, got=got, todo=bootstrap(wanted))
    else:
        yield ok("allocator", got)


def set_apart(host: Host, wanted: Wanted) -> Iterator[Finding]:
    """What is set apart now and not in use: the CPUs of the pool and the huge pages of their NUMA node, by the rules of
    a start.
    """
    if wanted.aim is not Aim.NITRO or not host.exists(CPU_POOL):
        return
    there = EnclaveResources.read(host.root)
    try:
        running = _running(host)
    except NitroError as error:
        found, todo = f"which enclaves run is not known, and their CPUs count as free: {error.message}", "see nitro-cli"
        yield note("enclaves", found, got=error.got, todo=todo)
        running = []
    free = there.free(running)
    fitting = node_for(free, wanted.cpus)
    yield _pool(there, free, running, wanted)
    most = max(free, key=lambda each: (len(free[each].cpus), free[each].memory.free), default=0)
    node = most if fitting is None else fitting
    if len(there.nodes) > 1:
        todo = f"in {ALLOCATOR_FILE} name CPUs of one node as cpu_pool, then sudo systemctl restart {ALLOCATOR_UNIT}"
        found, got = "the pool's CPUs are of several NUMA nodes", f"nodes {', '.join(map(str, there.nodes))}"
        is_split = fitting is None and sum(len(each.cpus) for each in free.values()) >= wanted.cpus
        yield (problem if is_split else note)("numa", found, expected="one node", got=got, todo=todo)
    else:
        yield ok("numa", f"the pool is on node {node}; an enclave gets CPUs and memory of it alone")
    yield _hugepages(free[node].memory if node in free else HugePages(0, 0), node, wanted)


def _running(host: Host) -> list[RunningEnclave]:
    """Raises NitroError where nitro-cli is there and does not say it."""
    if host.program(NITRO_CLI) is None:
        return []
    ran = host.run(NITRO_CLI, "describe-enclaves")
    if ran.status != 0:
        raise NitroError("bad_nitro_cli_output", "nitro-cli describe-enclaves fails", got=ran.output.strip()[:200])
    return parse_enclaves(ran.output.encode())


def _pool(
    there: EnclaveResources, free: Mapping[int, Free], running: Sequence[RunningEnclave], wanted: Wanted
) -> Finding:
    left = sum(len(each.cpus) for each in free.values())
    got = f"{len(there.pool)} CPUs: {','.join(map(str, there.pool))[:100] or 'none'}"
    if len(there.pool) < wanted.cpus:
        return problem("cpu-pool", "too few CPUs are set apart", expected=wanted.cpus, got=got, todo=bootstrap(wanted))
    if len(there.pool) % there.threads_per_core:
        todo = f"make cpu_count in {ALLOCATOR_FILE} a multiple of {there.threads_per_core}"
        return problem("cpu-pool", "the pool has half a core", expected="whole cores", got=got, todo=todo)
    if left < wanted.cpus:
        names = ", ".join(each.name or each.id for each in running)[:200]
        todo = f"end an enclave that has them (`strongroom nitro terminate`): {names}; or set more apart"
        found, got = "too few CPUs of the pool are free", f"{left} of {len(there.pool)}"
        return problem("cpu-pool", found, expected=f"{wanted.cpus} CPUs", got=got, todo=todo)
    return ok("cpu-pool", f"{got}; {left} of them free")


def _hugepages(memory: HugePages, node: int, wanted: Wanted) -> Finding:
    needed, reserved, free = wanted.memory_mib or 0, memory.reserved, memory.free
    if free >= needed and reserved:
        return ok("hugepages", f"{free} MiB free of {reserved} MiB on node {node}, {needed} MiB needed")
    wants = f"{max(needed, 2)} MiB on node {node}: {_pages(needed)}"
    if reserved >= needed > free:
        todo = "end the enclave that has them (`nitro-cli describe-enclaves` names it), or set more apart"
    else:
        todo = f"{bootstrap(wanted)}; if pages are still missing, memory is fragmented: reboot, and do it first"
    got = f"{free} MiB free of {reserved} MiB"
    return problem("hugepages", "too few huge pages are free", expected=wants, got=got, todo=todo)


def docker(host: Host, wanted: Wanted) -> Iterator[Finding]:
    """What ``strongroom nitro build`` needs, where there is no image yet. Nothing else does."""
    if wanted.aim is not Aim.NITRO or wanted.image is not None:
        return
    otherwise = "or build with `strongroom image build`, which needs no daemon"
    if host.program(DOCKER) is None:
        yield note("docker", "`strongroom nitro build` needs docker", got="none", todo=f"install it, {otherwise}")
    elif host.run(DOCKER, "info").status == 0:
        yield ok("docker", f"{host.user()} may use its daemon, as `strongroom nitro build` has to")
    else:
        found = f"{host.user()} cannot use docker's daemon, as `strongroom nitro build` has to"
        todo = f"sudo systemctl start docker; sudo usermod -aG docker {host.user()}, then log in again; {otherwise}"
        yield note("docker", found, expected="`docker info` answers", got="it fails", todo=todo)


def instance(host: Host, wanted: Wanted) -> Iterator[Finding]:
    """Whether this instance could ever hold what is wanted, whatever is set apart now."""
    if wanted.aim is not Aim.NITRO or wanted.memory_mib is None or not host.exists("/sys/devices/system/cpu"):
        return
    topology = Topology.read(host.root)
    largest = max(topology.memory.values(), default=0)
    if largest < wanted.memory_mib:
        todo = "take a larger instance type: `strongroom image size` names those that fit"
        expected, got = f"{wanted.memory_mib} MiB on one NUMA node", f"{largest} MiB"
        yield problem("instance", "this instance is too small", expected=expected, got=got, todo=todo)
    else:
        yield ok("instance", f"{largest} MiB on its largest NUMA node, {wanted.memory_mib} MiB needed")


def allocated(text: str) -> Mapping[str, int]:
    """``memory_mib`` and ``cpu_count`` of an allocator's file: of all its entries together, where it has several."""
    told = {"memory_mib": 0, "cpu_count": 0}
    for line in text.splitlines():
        match = _SETTING.match(line)
        if match is None:
            continue
        key, value = match[1], match[2].strip()
        if key == "cpu_pool":
            told["cpu_count"] += len(parse_cpus(value))
        elif value.isdecimal() and len(value) <= 9:
            told[key] += int(value)
    return told


def bootstrap(wanted: Wanted) -> str:
    """The command that sets apart what is wanted."""
    memory = wanted.memory_mib
    told = "--image FILE --model FILE" if memory is None else f"--memory-mib {memory} --cpus {wanted.cpus}"
    return f"sudo strongroom nitro bootstrap {told}"


def _pages(mib: int) -> str:
    size = mib * MIB
    return f"{size // GIB} x 1 GiB + {size % GIB // HUGE_PAGE} x 2 MiB"
