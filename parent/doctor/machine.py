"""Checks of what every aim needs, and of the emulated machine's tools."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from attestation.eif import Architecture
from parent.doctor.findings import Aim, Finding, Wanted, note, ok, problem
from parent.doctor.host import Host
from parent.image.sizing import GIB, MIB

PORTABLE: Final[frozenset[str]] = frozenset({"avx", "avx2", "bmi2", "f16c", "fma"})
"""What the portable build of llama.cpp uses beyond x86_64's first version, by the kernel's names."""
NOT_EMULATED: Final = re.compile(r"avx512.*|avx_vnni|amx_.*|vaes|vpclmulqdq|gfni")
"""QEMU emulates AVX2 and what came with it (``-cpu max``), and none of these."""

TOOLS: Final = {
    "qemu": ("STRONGROOM_QEMU", "bin/qemu-system-x86_64", "about 3 minutes on 2 CPUs"),
    "vsock-device": ("STRONGROOM_VSOCK_DEVICE", "bin/vhost-device-vsock", "a few seconds"),
}
"""What an emulated machine is made of: the script that makes it, the variable that names another folder, the program in
the folder, and how long it takes."""
DISK_TO_BUILD: Final = 4 * GIB
"""For building QEMU and a kernel, or an image with docker."""
DISK_TO_RUN: Final = GIB // 4
"""For logs, sockets and state."""
QEMU_SLACK: Final = 256 * MIB
"""QEMU's own memory, beside that of its machine."""
SLOWNESS_OF_TCG: Final = 60
"""About how many times slower SmolLM2 decodes under emulation: 1.6 to 1.9 in place of 120 tokens/s were measured."""

_FLAGS: Final = re.compile(r"^(?:flags|Features)[ \t]*:(.*)$", re.MULTILINE)
_PROCESSOR: Final = re.compile(r"^processor[ \t]*:", re.MULTILINE)
_AVAILABLE: Final = re.compile(r"^MemAvailable:\s*([0-9]{1,15}) kB$", re.MULTILINE)


def system(host: Host, wanted: Wanted) -> Iterator[Finding]:
    """Linux of the image's architecture."""
    said = host.run("uname", "-sm").output.split()
    got = " ".join(said) or "nothing"
    architecture = Architecture.X86_64 if wanted.image is None else wanted.image.architecture
    if said[:1] != ["Linux"]:
        yield problem("system", "this is not Linux", expected="Linux", got=got, todo="run it on Linux")
    elif said[1:] != [architecture.value] and (wanted.image is not None or wanted.aim is Aim.QEMU):
        todo = f"use a machine of {architecture}, or an image for this one"
        yield problem("system", "the image is for another machine", expected=architecture, got=got, todo=todo)
    else:
        yield ok("system", got)


def cpu_features(host: Host, wanted: Wanted) -> Iterator[Finding]:
    """What the image's llama.cpp was compiled for, against what the CPUs have; on aarch64 only if the image says it."""
    stated = None if wanted.image is None else wanted.image.cpu_features
    there = [set(flags.split()) for flags in _FLAGS.findall(host.text("/proc/cpuinfo") or "")]
    if stated is None and wanted.aim is Aim.PROCESS:
        yield ok("cpu-features", "llama.cpp was compiled for this machine")
        return
    if stated is None and host.run("uname", "-m").output.strip() != Architecture.X86_64:
        yield note("cpu-features", "not compared: the image does not say which CPU features it needs")
        return
    needed = PORTABLE if stated is None else stated
    whose = "the portable build of llama.cpp" if stated is None else "the image"
    if wanted.aim is Aim.QEMU:
        lacking = {each for each in needed if NOT_EMULATED.fullmatch(each)}
        todo = "build the portable variant of the image: an emulated CPU has AVX2, and nothing later"
    else:
        lacking = set(needed) - set.intersection(*there) if there else set(needed)
        todo = "take another instance type (`strongroom image size` names some), or build the portable variant"
    if lacking:
        expected, got = " ".join(sorted(needed)), f"without {' '.join(sorted(lacking))}"
        yield problem("cpu-features", f"the CPU lacks what {whose} needs", expected=expected, got=got, todo=todo)
    else:
        yield ok("cpu-features", f"all {len(needed)} that {whose} needs: {' '.join(sorted(needed))}")


def cpus(host: Host, wanted: Wanted) -> Iterator[Finding]:
    """Of a laptop; a parent's are in its pool."""
    if wanted.aim is Aim.NITRO:
        return
    count = len(_PROCESSOR.findall(host.text("/proc/cpuinfo") or ""))
    if count < wanted.cpus and wanted.plan is not None:
        todo = f"it runs, and decodes slower: {wanted.cpus} CPUs are for 10 tokens/s"
        yield note("cpus", f"{count} CPUs", expected=wanted.cpus, got=count, todo=todo)
    else:
        yield ok("cpus", f"{count} CPUs")
    if wanted.aim is Aim.QEMU:
        yield note("emulation", f"QEMU emulates every instruction: about {SLOWNESS_OF_TCG} times slower than this CPU")


def memory(host: Host, wanted: Wanted) -> Iterator[Finding]:
    """What is free, against what the enclave takes; a parent's is in its huge pages."""
    if wanted.aim is Aim.NITRO:
        return
    match = _AVAILABLE.search(host.text("/proc/meminfo") or "")
    if match is None:
        yield problem("memory", "/proc/meminfo does not say what is available", todo="mount /proc")
        return
    free = int(match[1]) * 1024
    if wanted.aim is Aim.QEMU:
        needed = 0 if wanted.memory_mib is None else wanted.memory_mib * MIB + QEMU_SLACK
    else:
        parts = () if wanted.plan is None else wanted.plan.parts
        needed = sum(part.size for part in parts if part.name not in ("image", "kernel"))
    if not needed:
        yield ok("memory", f"{free // MIB} MiB available; with --model it is compared")
    elif free < needed:
        more = -(-(needed - free) // MIB)
        todo = f"free {more} MiB, or take a shorter --context, a smaller --parallel or a smaller model"
        yield problem(
            "memory", "too little memory", expected=f"{-(-needed // MIB)} MiB", got=f"{free // MIB} MiB", todo=todo
        )
    else:
        yield ok("memory", f"{free // MIB} MiB available, {-(-needed // MIB)} MiB needed")


def tools(host: Host, wanted: Wanted) -> Iterator[Finding]:
    """QEMU with the enclave machine and the vsock device, as scripts/machine makes them."""
    if wanted.aim is not Aim.QEMU:
        return
    for script, (variable, program, takes) in TOOLS.items():
        folder = tool_folder(host, script, variable, program)
        if folder is not None:
            yield ok(script, str(folder))
        else:
            todo = f"scripts/machine/{script} makes it, in {takes}; on Debian, and it says what else it needs"
            got = host.environment.get(variable)
            expected = f"${variable} or {cache_folder(host)}/{script}-*"
            yield problem(script, f"{Path(program).name} is not there", expected=expected, got=got, todo=todo)


def disk(host: Host, wanted: Wanted) -> Iterator[Finding]:
    """Room where something will be written."""
    places = [("state", state_folder(host), DISK_TO_RUN)]
    if wanted.aim is Aim.QEMU:
        ready = all(tool_folder(host, script, *named[:2]) for script, named in TOOLS.items())
        places.append(("cache", cache_folder(host), DISK_TO_RUN if ready else DISK_TO_BUILD))
    if wanted.aim is Aim.NITRO:
        places.append(("images", "/var/lib", DISK_TO_BUILD))
    for name, place, needed in places:
        free = host.free(place)
        if free < needed:
            todo = f"free {-(-(needed - free) // MIB)} MiB below {place}"
            expected, got = f"{needed // MIB} MiB", f"{free // MIB} MiB"
            yield problem("disk", f"too little room for the {name}", expected=expected, got=got, todo=todo)
        else:
            yield ok("disk", f"{free // MIB} MiB free below {place} ({name})")


def vsock(host: Host, wanted: Wanted) -> Iterator[Finding]:
    """The kernel's AF_VSOCK, by which a parent speaks with its enclave. An emulated machine's ends in Unix sockets."""
    if wanted.aim is Aim.NITRO:
        if host.exists("/dev/vsock"):
            yield ok("vsock", "/dev/vsock is there")
        else:
            todo = "sudo modprobe vsock (and virtio_vsock where it is a module)"
            yield problem("vsock", "the kernel has no vsock", expected="/dev/vsock", got="nothing", todo=todo)
    elif wanted.aim is Aim.QEMU:
        there = "is there, and is not used" if host.exists("/dev/vhost-vsock") else "is not needed"
        yield ok("vsock", f"vhost-device-vsock brings it to Unix sockets; the kernel's vhost_vsock {there}")


def tool_folder(host: Host, script: str, variable: str, program: str) -> str | None:
    """The folder that the launcher will take: what the variable names, else the one in the cache."""
    named = host.environment.get(variable)
    if named:
        return named if host.exists(f"{named}/{program}") else None
    folder = host.path(cache_folder(host))
    found = sorted(folder.glob(f"{script}-" + "[0-9a-f]" * 16))
    return next((f"{cache_folder(host)}/{each.name}" for each in found if (each / program).is_file()), None)


def cache_folder(host: Host) -> str:
    """Of scripts/machine."""
    base = host.environment.get("XDG_CACHE_HOME") or f"{host.environment.get('HOME', '')}/.cache"
    return f"{base}/strongroom"


def state_folder(host: Host) -> str:
    """Of enclaves that were started here (parent/registry.py)."""
    if home := host.environment.get("STRONGROOM_HOME"):
        return home
    base = host.environment.get("XDG_STATE_HOME") or f"{host.environment.get('HOME', '')}/.local/state"
    return f"{base}/strongroom"
