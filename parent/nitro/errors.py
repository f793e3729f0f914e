"""What nitro-cli says when it fails, and what to do about it.

Codes and texts are those of ``aws/aws-nitro-enclaves-cli``, version 1.4: src/common/document_errors.rs at commit
71005953 (the table of codes), src/common/mod.rs at b7a3d8bc (how an error is written, with BACKTRACE=1),
src/enclave_proc_comm.rs at b6218a74 (an error of the enclave's process comes first, and E39 of the command behind it),
src/enclave_proc/resource_manager.rs at b2bb1c87 (what the driver's refusals are called) and cpu_info.rs at 50ac2d9e.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

from attestation.errors import StrongroomError

ALLOCATOR_FILE: Final = "/etc/nitro_enclaves/allocator.yaml"
ALLOCATOR_UNIT: Final = "nitro-enclaves-allocator.service"
DEVICE: Final = "/dev/nitro_enclaves"
CPU_POOL: Final = "/sys/module/nitro_enclaves/parameters/ne_cpus"
GROUP: Final = "ne"
"""Whose members may use the device."""

EXIT_CODES: Final[Mapping[str, int]] = {
    "already_running": 2,
    "bad_cid": 2,
    "bad_cpus": 2,
    "bad_image": 2,
    "bad_image_signature": 2,
    "bad_request": 2,
    "cid_in_use": 2,
    "memory_too_small": 2,
    "no_such_enclave": 2,
    "not_debug": 2,
    "measurements_differ": 3,
}
"""Where it is not 4: what the person asked for cannot be, or what came out cannot be believed."""
FOLLOWING: Final = frozenset(("E38", "E39"))
"""Codes that say only that something else failed, which was said before."""
MAX_SHOWN: Final = 500
"""Characters of nitro-cli's own words in an error of ours."""

_CODE = re.compile(r"\[ (E[0-9]{2}) \] ([^\n]*)")
_FILE = re.compile(r"^File: '([^'\n]*)', failing operation: '([^'\n]*)'", re.MULTILINE)
_CAUSES = re.compile(r"^  Subactions:((?:\n    [^\n]+)+)", re.MULTILINE)
_MEMORY = re.compile(r"the minimum memory should be ([0-9]{1,12}) MB")
_DENIED = re.compile(r"Permission ?[Dd]enied|code: 13\b|os error 13\b")


class NitroError(StrongroomError):
    """An enclave, or its host, is not as it was asked for. ``code`` is ours and stable; nitro-cli's own is in the text.

    Codes of the host: ``nitro_cli_missing``, ``nitro_cli_timeout``, ``bad_nitro_cli_output``, ``nitro_cli_failed``,
    ``driver_missing``, ``not_in_group``, ``not_set_up``, ``docker_failed``, ``build_failed``, ``measurements_differ``,
    ``unsupported_host``, ``step_failed``. Of resources: ``memory_too_small``, ``hugepages_missing``, ``cpus_missing``,
    ``bad_cpus``, ``numa_split``. Of an enclave: ``bad_cid``, ``cid_in_use``, ``bad_image``, ``bad_image_signature``,
    ``start_refused``, ``another_start``, ``boot_failed``, ``already_running``, ``no_such_enclave``,
    ``enclave_unanswering``, ``not_debug``, ``bad_request``.
    """

    @property
    def exit_code(self) -> int:  # type: ignore[override]
        return EXIT_CODES.get(self.code, 4)


@dataclass(frozen=True, slots=True)
class CliFailure:
    """One failure of nitro-cli, read from what it wrote to its standard error."""

    code: str
    """``E00`` to ``E99``; empty where it named none."""
    text: str
    """Its own words: one line, at most :data:`MAX_SHOWN` characters, printable."""
    file: str = ""
    operation: str = ""
    """What was done to ``file``, as nitro-cli calls it."""
    causes: tuple[str, ...] = ()
    """From what was tried to what failed underneath; there because it runs with BACKTRACE=1."""

    @classmethod
    def parse(cls, stderr: str, status: int) -> CliFailure:
        """Of any text: the first code that is a cause, with the file and the causes that follow it."""
        found = list(_CODE.finditer(stderr))
        if not found:
            lines = [line for line in stderr.splitlines() if line.strip()]
            return cls("", _shown(lines[-1] if lines else f"it ended with exit code {status} and said nothing"))
        first = next((match for match in found if match[1] not in FOLLOWING), found[0])
        following = [match.start() for match in found if match.start() > first.start()]
        said = stderr[first.start() : following[0] if following else len(stderr)]
        file, causes = _FILE.search(said), _CAUSES.search(said)
        return cls(
            first[1],
            _shown(first[2]),
            _shown(file[1]) if file else "",
            _shown(file[2]) if file else "",
            tuple(_shown(line) for line in causes[1].split("\n") if line.strip()) if causes else (),
        )

    @property
    def root(self) -> str:
        """What failed underneath."""
        return self.causes[-1] if self.causes else ""


def explain(failure: CliFailure, *, asked: str = "") -> NitroError:
    """The error that a failure means, and what to do about it. ``asked`` is what was wanted of nitro-cli, in a few
    words with their numbers: it stands beside the advice.
    """
    said = f"nitro-cli {failure.code}: {failure.text}" if failure.code else f"nitro-cli: {failure.text}"
    if failure.root:
        said += f" ({failure.root})"
    if failure.code == "E19":
        return _of_file(failure, said)
    if failure.code == "E29":
        return _of_driver(failure, said, asked)
    if failure.code == "E36":
        return _of_boot(failure, said)
    if failure.code == "E59" and "signature checker" in failure.root:
        return NitroError("bad_image", f"{_BAD_IMAGE}; {said}")
    if failure.code == "E26":
        minimum = _MEMORY.search(failure.text)
        return NitroError(
            "memory_too_small",
            "the enclave needs more memory: four times its image at least; say so with --memory-mib",
            expected=f"at least {minimum[1]} MiB" if minimum else "more than 0 MiB",
            got=asked or said,
        )
    code, advice = _ADVICE.get(failure.code, ("nitro_cli_failed", ""))
    return NitroError(code, f"{advice}; {said}" if advice else said, got=asked or None)


def _of_file(failure: CliFailure, said: str) -> NitroError:
    denied = bool(_DENIED.search(failure.root))
    if failure.file in (DEVICE, CPU_POOL) and not denied:
        return driver_missing(said)
    if denied and failure.file.startswith(("/dev/", "/run/", "/var/log/")):
        return not_in_group(failure.file)
    if failure.file.endswith(".eif"):
        return NitroError("bad_image", f"the image cannot be opened by nitro-cli; {said}", got=failure.file)
    return NitroError("nitro_cli_failed", said, got=failure.file or None)


def driver_missing(got: str) -> NitroError:
    """The host has no driver for enclaves."""
    return NitroError(
        "driver_missing",
        "this host has no Nitro Enclaves driver: launch the instance with enclaves enabled (`strongroom nitro launch`, "
        "or --enclave-options Enabled=true; a stopped one can be changed) and load the module: modprobe nitro_enclaves",
        expected=f"{DEVICE} and {CPU_POOL}",
        got=got,
    )


def not_in_group(file: str) -> NitroError:
    """This user may not use enclaves."""
    return NitroError(
        "not_in_group",
        f"this user may not use enclaves: usermod -aG {GROUP} USER, then log in anew",
        expected=f"a member of the group {GROUP}",
        got=f"{file}: permission denied",
    )


def _of_driver(failure: CliFailure, said: str, asked: str) -> NitroError:
    """The driver's refusals share one code; their texts tell them apart (``do_ioctl``)."""
    for words, code, advice in _REFUSALS:
        if words in failure.root:
            return NitroError(code, f"{advice}; {said}", got=asked or None)
    if any("Start enclave ioctl failed" in cause for cause in failure.causes):
        return NitroError(
            "start_refused",
            f"the hypervisor refused to start the enclave: its CID may be in use, or what the last enclave had is not "
            f"free yet; try again, with another --cid or with none; {said}",
            got=asked or None,
        )
    return NitroError("nitro_cli_failed", f"the driver refused; try again once (nitro-cli issue 433); {said}")


def _of_boot(failure: CliFailure, said: str) -> NitroError:
    if "vsock bind error" in failure.root:
        return NitroError(
            "another_start",
            "another enclave is being started on this host, and nitro-cli waits for one at a time on vsock port 9000 "
            f"(nitro-cli issue 516): try again when it runs; {said}",
        )
    return NitroError(
        "boot_failed",
        "the image started and did not report that it is up: `strongroom image verify` checks it, its memory may be "
        f"too small to unpack it, and only a debug enclave has a console that says more; {said}",
    )


def _shown(text: str) -> str:
    text = text.strip()[:MAX_SHOWN]
    return text if text.isprintable() else ascii(text)[1:-1][:MAX_SHOWN]


_MORE_MEMORY: Final = (
    f"too little memory is reserved for enclaves in huge pages: raise memory_mib in {ALLOCATOR_FILE} and restart "
    f"{ALLOCATOR_UNIT} (`strongroom nitro bootstrap --memory-mib N --cpus M` does both); reboot first where memory is "
    "fragmented"
)
_MORE_CPUS: Final = (
    f"too few CPUs are reserved for enclaves: raise cpu_count in {ALLOCATOR_FILE} and restart {ALLOCATOR_UNIT} "
    "(`strongroom nitro bootstrap --memory-mib N --cpus M` does both)"
)
_NOT_SET_UP: Final = "this host is not set up for enclaves: `strongroom nitro bootstrap` does it"
_BAD_IMAGE: Final = "nitro-cli cannot read the image: `strongroom image verify` says what is wrong with it"
_INTERNAL: Final = "start what was asked for again"
_ADVICE: Final[Mapping[str, tuple[str, str]]] = {
    "E01": ("bad_request", "nitro-cli lacks an argument"),
    "E02": ("bad_request", "nitro-cli was given two arguments that exclude each other"),
    "E03": ("bad_request", "nitro-cli was given an argument that it does not take"),
    "E05": ("nitro_cli_failed", _INTERNAL),
    "E06": ("nitro_cli_failed", _INTERNAL),
    "E07": ("not_set_up", _NOT_SET_UP),
    "E08": ("no_such_enclave", "no enclave has this ID; `strongroom nitro describe` lists them"),
    "E11": ("no_such_enclave", "no enclave has this ID; `strongroom nitro describe` lists them"),
    "E18": ("not_in_group", f"this user may not use enclaves: usermod -aG {GROUP} USER, then log in anew"),
    "E20": ("bad_cpus", "a CPU is named twice"),
    "E21": ("bad_cpus", f"a CPU is named that is not in the pool of {ALLOCATOR_FILE}"),
    "E22": ("cpus_missing", _MORE_CPUS),
    "E25": ("hugepages_missing", _MORE_MEMORY),
    "E27": ("hugepages_missing", _MORE_MEMORY),
    "E31": ("hugepages_missing", _MORE_MEMORY),
    "E35": ("bad_image", _BAD_IMAGE),
    "E38": ("enclave_unanswering", "an enclave's process did not do what it was asked for"),
    "E39": ("enclave_unanswering", "an enclave's process does not answer: it ended, or it is another user's"),
    "E40": ("no_such_enclave", "no enclave has this ID; `strongroom nitro describe` lists them"),
    "E42": ("hugepages_missing", _MORE_MEMORY),
    "E44": ("not_debug", "there is no console: only an enclave that was started in debug mode has one"),
    "E48": ("build_failed", "the image could not be made"),
    "E49": ("docker_failed", "docker could not build the image"),
    "E50": ("docker_failed", "docker has no such image, and could not fetch it"),
    "E51": ("build_failed", "set HOME, or NITRO_CLI_ARTIFACTS to a folder where nitro-cli may build"),
    "E52": ("build_failed", "install aws-nitro-enclaves-cli-devel, which has the kernel and the init of images"),
    "E58": ("no_such_enclave", "no enclave has this name, or several have; `strongroom nitro describe` lists them"),
    "E59": ("bad_image_signature", "the image's signature, or its certificate's period, is not valid"),
}
"""Our code and what to do, by nitro-cli's code. What is not here passes through in nitro-cli's own words."""
_REFUSALS: Final = (
    ("no CPUs are available in the pool", "cpus_missing", _MORE_CPUS),
    ("not available in the CPU pool", "bad_cpus", f"a CPU is named that is not in the pool of {ALLOCATOR_FILE}"),
    ("already used", "bad_cpus", "a CPU is in use by another enclave"),
    ("full CPU cores", "bad_cpus", "an enclave has whole cores: as many CPUs as all threads of its cores"),
    ("different NUMA nodes", "numa_split", "the CPUs and the huge pages of an enclave are of one NUMA node"),
    ("huge page", "hugepages_missing", _MORE_MEMORY),
    ("multiple of 2 MiB", "hugepages_missing", _MORE_MEMORY),
    ("maximum number of memory regions", "hugepages_missing", _MORE_MEMORY),
    ("lower than the minimum", "memory_too_small", "an enclave has 64 MiB at least"),
    ("enclave CID is invalid", "bad_cid", "CIDs 0 to 3 are never an enclave's"),
)
"""Words of the driver's refusals, our code and what to do."""
