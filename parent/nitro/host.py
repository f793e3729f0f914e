"""Setting a host up for enclaves: what is there, what is wanted, and the steps from one to the other.

:func:`plan` decides and touches nothing; :func:`apply` does what it decided. On a host that is as wanted the plan is
empty, so a second run changes nothing.
"""

from __future__ import annotations

import os
import re
import shlex
import subprocess
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final, TypeAlias

from parent.nitro.errors import ALLOCATOR_FILE, ALLOCATOR_UNIT, GROUP, NitroError
from parent.nitro.resources import EnclaveResources, Topology
from parent.nitro.units import UNIT_FOLDER, Services

NITRO_CLI: Final = "/usr/bin/nitro-cli"
BLOBS: Final = "/usr/share/nitro_enclaves/blobs"
DOCKER: Final = "/usr/bin/docker"
PACKAGES: Final = {
    NITRO_CLI: "aws-nitro-enclaves-cli",
    BLOBS: "aws-nitro-enclaves-cli-devel",
    DOCKER: "docker",
}
"""On Amazon Linux 2023, by a path that each brings."""
PROGRAM: Final = "/usr/local/bin/strongroom"
"""How whoever works on the host calls it: a link."""
WANTS: Final = "/etc/systemd/system/multi-user.target.wants"
SLICE: Final = "/sys/fs/cgroup/system.slice"
"""A service that runs has a folder of its name here."""
HOST_MIB: Final = 512
"""What the host keeps for itself of the memory of the node that enclaves are on."""
STEP_SECONDS: Final = 900.0
_USER = re.compile(r"[a-z_][a-z0-9_-]{0,31}", re.ASCII)


@dataclass(frozen=True, slots=True)
class Wanted:
    """A host that can run enclaves. Raises NitroError ``bad_request``."""

    memory_mib: int
    """For all of its enclaves together."""
    cpus: int
    user: str | None = None
    """Who may run enclaves and build images, besides root."""
    services: Services | None = None
    """What runs beside the enclave, if that is started by ``nitro-cli`` and not by ``strongroom start``."""
    program: str | None = None
    """What :data:`PROGRAM` leads to. None: that stays as it is."""

    def __post_init__(self) -> None:
        if self.memory_mib < 1 or self.cpus < 1:
            got = f"{self.memory_mib} MiB, {self.cpus} CPUs"
            raise NitroError("bad_request", "enclaves need memory and CPUs", expected="at least 1 of each", got=got)
        if self.user is not None and not _USER.fullmatch(self.user):
            raise NitroError("bad_request", "no name of a user", expected=_USER.pattern, got=ascii(self.user))

    def allocator(self) -> str:
        """The allocator's file. Its first reader is a shell script that takes what follows ``---`` line by line, and
        fails on an empty one (bootstrap/nitro-enclaves-allocator at 03e6e6db); the newer one takes the same file.
        """
        return (
            f"---\n# Written by `strongroom nitro bootstrap`.\nmemory_mib: {self.memory_mib}\ncpu_count: {self.cpus}\n"
        )

    def files(self) -> dict[str, str]:
        """The content of each file, by its path."""
        units = self.services.units() if self.services else {}
        return {ALLOCATOR_FILE: self.allocator(), **{f"{UNIT_FOLDER}/{name}": text for name, text in units.items()}}


@dataclass(frozen=True, slots=True)
class HostState:
    """What is there. ``live`` is false for a file tree that is being made and runs nothing."""

    live: bool
    distribution: str
    """``ID`` of /etc/os-release: ``amzn``, ``debian``."""
    version: str
    present: frozenset[str]
    """Those of the paths that :data:`PACKAGES` bring."""
    members: Mapping[str, frozenset[str]]
    """Users by group."""
    files: Mapping[str, str]
    """Content by path, of those that are there."""
    enabled: frozenset[str]
    """Units that start with the host."""
    running: frozenset[str]
    resources: EnclaveResources | None
    """None without the driver."""
    topology: Topology | None = field(default=None)
    """None where nothing says."""
    program: str | None = None
    """Where :data:`PROGRAM` leads; itself, where it is no link; None where it is not."""

    @classmethod
    def read(cls, wanted: Wanted, root: Path = Path("/")) -> HostState:
        """``root`` stands for ``/``; another one is a file tree. Raises NitroError ``not_set_up``."""
        release = _release(_below(root, "/etc/os-release"))
        paths = wanted.files()
        resources = None
        if _below(root, "/sys/module/nitro_enclaves").exists():
            resources = EnclaveResources.read(root)
        topology = Topology.read(root) if _below(root, "/sys/devices/system/cpu").exists() else None
        return cls(
            live=root == Path("/"),
            distribution=release.get("ID", ""),
            version=release.get("VERSION_ID", ""),
            present=frozenset(path for path in PACKAGES if _below(root, path).exists()),
            members=_members(_below(root, "/etc/group")),
            files={path: text for path in paths if (text := _text(_below(root, path))) is not None},
            enabled=frozenset(each.name for each in _below(root, WANTS).glob("*.service")),
            running=frozenset(each.name for each in _below(root, SLICE).glob("*.service")),
            resources=resources,
            topology=topology,
            program=_leads_to(_below(root, PROGRAM)),
        )


@dataclass(frozen=True, slots=True)
class WriteFile:
    """A file with this content, readable by all, in place of what was there."""

    path: str
    content: str

    def __str__(self) -> str:
        return f"write {self.path}"


@dataclass(frozen=True, slots=True)
class Command:
    """A program with its arguments. ``undone`` is what it means when it fails, and what to do."""

    words: tuple[str, ...]
    undone: str = ""

    def __str__(self) -> str:
        return f"run {shlex.join(self.words)}"


@dataclass(frozen=True, slots=True)
class Link:
    """A symbolic link, in place of another one."""

    path: str
    target: str

    def __str__(self) -> str:
        return f"link {self.path} to {self.target}"


Step: TypeAlias = WriteFile | Link | Command
Runner: TypeAlias = Callable[[Sequence[str]], int]
"""Runs a program to its end and returns its exit status."""


def plan(wanted: Wanted, host: HostState, *, root: Path = Path("/")) -> list[Step]:
    """The steps that are left. Raises NitroError ``unsupported_host``, ``cpus_missing``, ``bad_cpus``,
    ``hugepages_missing`` for what cannot be on this host.
    """
    if host.topology is not None:
        _require_capacity(wanted, host.topology, host.resources)
    steps: list[Step] = [*_packages(host, root), *_groups(wanted, host, root)]
    if host.live and host.resources is None:
        steps.append(Command(("modprobe", "nitro_enclaves"), "this kernel has no driver for Nitro enclaves"))
    steps += [WriteFile(path, text) for path, text in wanted.files().items() if host.files.get(path) != text]
    return steps + _link(wanted, host) + _units(wanted, host, root)


def _packages(host: HostState, root: Path) -> list[Step]:
    missing = [name for path, name in PACKAGES.items() if path not in host.present]
    if not missing:
        return []
    if host.distribution != "amzn" or host.version != "2023":
        raise NitroError(
            "unsupported_host",
            f"{', '.join(missing)}: packages of Amazon Linux 2023. Elsewhere nitro-cli is built from its own source: "
            "docs/ of aws/aws-nitro-enclaves-cli has a page for each distribution",
            expected=f"Amazon Linux 2023, or {', '.join(PACKAGES)}",
            got=f"{host.distribution or 'no /etc/os-release'} {host.version}".strip(),
        )
    where = [] if root == Path("/") else ["--installroot", str(root)]
    return [Command(("dnf", "install", "--assumeyes", *where, *missing), "see what dnf said")]


def _groups(wanted: Wanted, host: HostState, root: Path) -> list[Step]:
    if wanted.user is None:
        return []
    where = () if root == Path("/") else ("--prefix", str(root))
    missing = [group for group in (GROUP, "docker") if wanted.user not in host.members.get(group, ())]
    return [Command(("usermod", *where, "--append", "--groups", group, wanted.user)) for group in missing]


def _link(wanted: Wanted, host: HostState) -> list[Step]:
    """A program of somebody else's, which is no link, stays."""
    if wanted.program is None or wanted.program in (PROGRAM, host.program) or host.program == PROGRAM:
        return []
    return [Link(PROGRAM, wanted.program)]


def _units(wanted: Wanted, host: HostState, root: Path) -> list[Step]:
    """Enabled, and on a host that runs: running as they are written now."""
    changed = {path for path, text in wanted.files().items() if host.files.get(path) != text}
    services = list(wanted.services.units()) if wanted.services else []
    where = () if host.live else ("--root", str(root))
    enable = [name for name in ("docker.service", ALLOCATOR_UNIT, *services) if name not in host.enabled]
    steps: list[Step] = []
    if host.live and changed - {ALLOCATOR_FILE}:
        steps.append(Command(("systemctl", "daemon-reload")))
    if enable:
        steps.append(Command(("systemctl", *where, "enable", *enable)))
    if not host.live:
        return steps
    if "docker.service" not in host.running:
        steps.append(Command(("systemctl", "start", "docker.service")))
    if ALLOCATOR_FILE in changed or not _is_allocated(wanted, host.resources):
        undone = (
            "the allocator could not reserve this: end the enclaves that run (`strongroom nitro terminate --all`), and "
            f"see `journalctl -u {ALLOCATOR_UNIT}`; where memory is fragmented, reboot"
        )
        steps.append(Command(("systemctl", "restart", ALLOCATOR_UNIT), undone))
    for name in services:
        if f"{UNIT_FOLDER}/{name}" in changed or name not in host.running:
            steps.append(Command(("systemctl", "restart", name), f"`journalctl -u {name}` says why it does not start"))
    return steps


def _is_allocated(wanted: Wanted, resources: EnclaveResources | None) -> bool:
    if resources is None:
        return False
    reserved = sum(each.reserved for each in resources.hugepages.values())
    return len(resources.pool) == wanted.cpus and reserved >= wanted.memory_mib


def _require_capacity(wanted: Wanted, topology: Topology, resources: EnclaveResources | None) -> None:
    """The allocator takes whole cores of one node, and never CPU 0's; those of the pool are off-line by now."""
    threads = topology.threads_per_core
    if wanted.cpus % threads:
        raise NitroError(
            "bad_cpus", "whole cores, with all of their threads", expected=f"a multiple of {threads}", got=wanted.cpus
        )
    available = {
        node: sum(len(core) for core in cores if 0 not in core and len(core) == threads)
        for node, cores in topology.cores.items()
    }
    if resources is not None:
        for node in resources.node_of.values():
            available[node] = available.get(node, 0) + 1
    fitting = [node for node, count in available.items() if count >= wanted.cpus]
    if not fitting:
        raise NitroError(
            "cpus_missing",
            "no NUMA node of this machine has as many CPUs besides CPU 0's core: take a larger instance, or fewer CPUs",
            expected=f"{wanted.cpus} CPUs",
            got=", ".join(f"{count} on node {node}" for node, count in sorted(available.items())) or "none",
        )
    memory = {node: topology.memory.get(node, 0) - HOST_MIB for node in fitting}
    if max(memory.values()) < wanted.memory_mib:
        raise NitroError(
            "hugepages_missing",
            f"no NUMA node with these CPUs has as much memory and {HOST_MIB} MiB for the host: take a larger instance",
            expected=f"{wanted.memory_mib} MiB",
            got=", ".join(f"{max(0, size)} MiB on node {node}" for node, size in sorted(memory.items())),
        )


# --- Doing it -----------------------------------------------------------------------------------------------------


def apply(steps: Sequence[Step], *, root: Path = Path("/"), run: Runner | None = None) -> None:
    """Does the steps in their order, up to the first that fails. Raises NitroError ``step_failed``, OSError."""
    for step in steps:
        match step:
            case WriteFile(path, content):
                _write(_below(root, path), content)
            case Link(path, target):
                _write_link(_below(root, path), target)
            case Command(words, undone):
                status = (run or run_command)(words)
                if status:
                    raise NitroError(
                        "step_failed", f"{' '.join(words)}: {undone or 'it failed'}", expected="exit code 0", got=status
                    )


def run_command(words: Sequence[str]) -> int:
    """Runs a program with this process's output; 127 when there is none, as in a shell."""
    try:
        return subprocess.run(words, stdin=subprocess.DEVNULL, timeout=STEP_SECONDS, check=False).returncode
    except FileNotFoundError:
        return 127
    except subprocess.TimeoutExpired:
        return 124


def _write(path: Path, content: str) -> None:
    """Whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.new")
    descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW, 0o644)
    with open(descriptor, "w", encoding="utf-8") as file:
        os.fchmod(descriptor, 0o644)
        file.write(content)
    temporary.replace(path)


def _write_link(path: Path, target: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.new")
    temporary.unlink(missing_ok=True)
    temporary.symlink_to(target)
    temporary.replace(path)


def _leads_to(path: Path) -> str | None:
    if path.is_symlink():
        return os.readlink(path)
    return PROGRAM if path.exists() else None


def _below(root: Path, path: str) -> Path:
    return root / path.lstrip("/")


def _text(path: Path) -> str | None:
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except FileNotFoundError:
        return None
    except OSError as error:
        raise NitroError("not_set_up", f"{path} cannot be read: {error.strerror}") from error


def _release(path: Path) -> dict[str, str]:
    pairs = (line.partition("=") for line in (_text(path) or "").splitlines())
    return {name: value.strip("\"'") for name, equals, value in pairs if equals}


def _members(path: Path) -> dict[str, frozenset[str]]:
    fields = (line.split(":") for line in (_text(path) or "").splitlines())
    return {each[0]: frozenset(each[3].split(",")) - {""} for each in fields if len(each) == 4}
