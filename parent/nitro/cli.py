"""nitro-cli as a program that is run: deadlines, bounded outputs, and answers read strictly.

Its answers are JSON on standard output (``aws/aws-nitro-enclaves-cli``, src/common/json_output.rs of version 1.4);
what it says on standard error while it works is passed on. It runs with BACKTRACE=1, so that an error brings its
causes.
"""

from __future__ import annotations

import asyncio
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final

from attestation.errors import EvidenceError
from attestation.strict_json import Json, decode_foreign
from parent.nitro.errors import CliFailure, NitroError, explain

PROGRAM: Final = "nitro-cli"
ANSWER_SECONDS: Final = 30.0
"""For what does not start or build anything."""
START_SECONDS: Final = 180.0
SECONDS_PER_GIB: Final = 20.0
"""A start takes this much longer for each GiB of the enclave's memory. nitro-cli's own deadline for the boot is a
minute for each 6 GiB, begun ones counted.
"""
BUILD_SECONDS: Final = 3600.0
TERMINATE_SECONDS: Final = 60.0
MAX_OUTPUT: Final = 1 << 20
"""Bytes of one answer, or of what is kept of standard error."""
MAX_DEPTH: Final = 32
MAX_ENCLAVES: Final = 64
MAX_CID: Final = 0xFFFF_FFFF
MAX_NUMBER: Final = 1 << 32
MAX_TEXT: Final = 256
"""Characters of an ID, a name or a register."""


@dataclass(frozen=True, slots=True)
class RunningEnclave:
    """One enclave, as nitro-cli knows it. ``measurements`` are those of its image when it was built: of a debug enclave
    the registers are zero all the same (nitro-cli issue 695).
    """

    id: str
    cid: int
    cpu_ids: tuple[int, ...]
    memory_mib: int
    process_id: int
    """Of the nitro-cli process that holds it: it ends with that."""
    name: str | None = None
    state: str = "RUNNING"
    debug: bool = False
    """Whether it was started in debug mode, or with flags that nobody here knows."""
    measurements: Mapping[str, str] = field(default_factory=dict)
    """By ``PCR0`` and so on, in hexadecimal."""


Passing = Callable[[bytes], None]
"""Told what a program writes to its standard error, as it comes."""


def to_stderr(piece: bytes) -> None:
    """Passes on what nitro-cli says to a person."""
    sys.stderr.write(piece.decode("utf-8", "backslashreplace"))
    sys.stderr.flush()


class NitroCli:
    """The program; any number of calls, at the same time too."""

    def __init__(self, program: str = PROGRAM) -> None:
        """``program`` is a name on PATH, or a path."""
        self._program = program

    async def describe(self) -> list[RunningEnclave]:
        """Every enclave that this user may see. Raises NitroError."""
        return parse_enclaves(await self.output(["describe-enclaves"], seconds=ANSWER_SECONDS))

    async def start(self, arguments: Sequence[str], *, memory_mib: int, asked: str) -> RunningEnclave:
        """Runs ``run-enclave``, which stands in ``arguments``. ``asked`` says in an error what was wanted. Raises
        NitroError.
        """
        seconds = START_SECONDS + SECONDS_PER_GIB * memory_mib / 1024
        return _enclave(_json(await self.output(arguments, seconds=seconds, asked=asked)))

    async def terminate(self, enclave_id: str) -> None:
        """Raises NitroError, ``no_such_enclave`` when it is gone."""
        arguments = ["terminate-enclave", "--enclave-id", enclave_id]
        value = _json(await self.output(arguments, seconds=TERMINATE_SECONDS))
        if not isinstance(value, dict) or value.get("Terminated") is not True or value.get("EnclaveID") != enclave_id:
            raise _bad_output("terminate-enclave did not say that this enclave was terminated")

    async def build(self, arguments: Sequence[str]) -> bytes:
        """Runs ``build-enclave``; what it printed, for :func:`attestation.eif.measurements_from_nitro_cli`. Raises
        NitroError.
        """
        return await self.output(["build-enclave", *arguments], seconds=BUILD_SECONDS, passing=to_stderr)

    async def version(self) -> str:
        """Such as ``Nitro CLI 1.4.2``. Raises NitroError."""
        text = (await self.output(["--version"], seconds=ANSWER_SECONDS)).decode("utf-8", "replace").strip()
        return text if text.isprintable() and len(text) < 100 else ascii(text[:100])

    async def output(
        self, arguments: Sequence[str], *, seconds: float, asked: str = "", passing: Passing | None = None
    ) -> bytes:
        """Standard output of one run. Raises NitroError: what :func:`parent.nitro.errors.explain` makes of a failure,
        ``nitro_cli_missing``, ``nitro_cli_timeout``, ``bad_nitro_cli_output``.
        """
        status, stdout, stderr = await run_program(
            [self._program, *arguments], seconds=seconds, environment={"BACKTRACE": "1"}, passing=passing
        )
        if status:
            raise explain(CliFailure.parse(stderr.decode("utf-8", "backslashreplace"), status), asked=asked)
        return stdout


async def run_program(
    command: Sequence[str], *, seconds: float, environment: Mapping[str, str], passing: Passing | None = None
) -> tuple[int, bytes, bytes]:
    """Exit status, standard output and the end of standard error of one run, which is killed at its deadline. It gets
    this process's environment and, over it, ``environment``.

    Raises NitroError ``nitro_cli_missing`` when there is no such program, ``nitro_cli_timeout``, and
    ``bad_nitro_cli_output`` for more than :data:`MAX_OUTPUT` bytes.
    """
    try:
        process = await asyncio.create_subprocess_exec(
            *command,
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
            env={**os.environ, **environment},
        )
    except (FileNotFoundError, PermissionError) as error:
        raise NitroError(
            "nitro_cli_missing",
            f"{command[0]} is not installed here: `strongroom nitro bootstrap` installs it on Amazon Linux 2023",
            expected=f"{command[0]} on PATH",
            got=error.strerror,
        ) from error
    assert process.stdout is not None
    assert process.stderr is not None
    reading = asyncio.ensure_future(last_of(process.stderr, passing or (lambda piece: None)))
    try:
        async with asyncio.timeout(seconds):
            stdout = await _bounded(process.stdout)
            return await process.wait(), stdout, await reading
    except TimeoutError:
        raise NitroError(
            "nitro_cli_timeout",
            f"{' '.join(command[:2])} did not end in time and was ended",
            expected=f"<= {seconds:g} s",
        ) from None
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
        reading.cancel()
        await asyncio.gather(reading, return_exceptions=True)


async def _bounded(stream: asyncio.StreamReader) -> bytes:
    found = bytearray()
    while piece := await stream.read(1 << 16):
        found += piece
        if len(found) > MAX_OUTPUT:
            raise _bad_output(f"more than {MAX_OUTPUT} bytes")
    return bytes(found)


async def last_of(stream: asyncio.StreamReader, passing: Passing) -> bytes:
    """The end of a stream, which has an error where there is one."""
    found = b""
    while piece := await stream.read(1 << 16):
        passing(piece)
        found = (found + piece)[-MAX_OUTPUT:]
    return found


def parse_enclaves(answer: bytes) -> list[RunningEnclave]:
    """What ``describe-enclaves`` printed. Raises NitroError ``bad_nitro_cli_output``."""
    value = _json(answer)
    if not isinstance(value, list) or len(value) > MAX_ENCLAVES:
        raise _bad_output(f"describe-enclaves prints a list of at most {MAX_ENCLAVES} enclaves")
    return [_enclave(each) for each in value]


def _json(data: bytes) -> Json:
    try:
        return decode_foreign(data, code="bad_nitro_cli_output", max_depth=MAX_DEPTH)
    except EvidenceError as error:
        raise _bad_output(error.message) from error


def _enclave(value: Json) -> RunningEnclave:
    """From ``EnclaveDescribeInfo`` or ``EnclaveRunInfo``. Fields that are new to us are left alone."""
    if not isinstance(value, dict):
        raise _bad_output("an enclave is an object")
    enclave_id, cpus = value.get("EnclaveID"), value.get("CPUIDs")
    name, state, measured = value.get("EnclaveName"), value.get("State", "RUNNING"), value.get("Measurements", {})
    if not isinstance(enclave_id, str) or not 0 < len(enclave_id) <= MAX_TEXT or not enclave_id.isprintable():
        raise _bad_output("EnclaveID is a short text")
    if not isinstance(name, str | None) or not isinstance(state, str) or not isinstance(measured, dict):
        raise _bad_output("EnclaveName and State are texts, Measurements is an object")
    if not isinstance(cpus, list):
        raise _bad_output("CPUIDs is a list")
    return RunningEnclave(
        enclave_id,
        _integer(value, "EnclaveCID", 1, MAX_CID),
        tuple(_integer({"CPUIDs": cpu}, "CPUIDs", 0, MAX_NUMBER) for cpu in cpus),
        _integer(value, "MemoryMiB", 0, MAX_NUMBER),
        _integer(value, "ProcessID", 0, MAX_NUMBER),
        None if name is None else _printable(name),
        _printable(state),
        debug=value.get("Flags", "NONE") != "NONE",
        measurements={
            _printable(key): _printable(register)
            for key, register in measured.items()
            if key.startswith("PCR") and isinstance(register, str)
        },
    )


def _integer(fields: Mapping[str, Json], name: str, low: int, high: int) -> int:
    number = fields.get(name)
    if not isinstance(number, int) or isinstance(number, bool) or not low <= number <= high:
        raise _bad_output(f"{name} is an integer of {low} to {high}")
    return number


def _printable(text: str) -> str:
    return text[:MAX_TEXT] if text.isprintable() else ascii(text[:MAX_TEXT])[1:-1]


def _bad_output(message: str) -> NitroError:
    return NitroError("bad_nitro_cli_output", f"nitro-cli's answer is not as expected: {message}")
