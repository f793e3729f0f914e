"""What a check says, and what it is asked about."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from enum import StrEnum
from typing import TypeAlias

from attestation.errors import StrongroomError
from parent.doctor.host import Host
from parent.egress import Allowed
from parent.image.facts import ImageFacts
from parent.image.sizing import EIF_FACTOR, MIB, Plan, rounded


class Level(StrEnum):
    """How much a finding matters to what is wanted."""

    OK = "ok"
    NOTE = "note"
    """Worth knowing; hinders nothing that was asked."""
    PROBLEM = "problem"


class Aim(StrEnum):
    """What this machine is to be: a launcher's name."""

    PROCESS = "process"
    QEMU = "qemu"
    NITRO = "nitro"


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that was looked at."""

    check: str
    """What was looked at: stable, for programs."""
    level: Level
    found: str
    """One line for people."""
    expected: str | None = None
    got: str | None = None
    todo: str | None = None
    """What to do, with the numbers to do it with."""


@dataclass(frozen=True, slots=True)
class Wanted:
    """What somebody means to run here. None and empty: nobody said."""

    aim: Aim
    image: ImageFacts | None = None
    plan: Plan | None = None
    """Of the model, in that image."""
    places: tuple[tuple[Allowed, bytes | None], ...] = ()
    """What has to answer over TLS, and the one certificate (DER) that it is trusted by, if it is not the system's."""
    kms: Allowed | None = None
    """That of the places with whose clock ours must agree."""

    @property
    def memory_mib(self) -> int | None:
        """Of the enclave, in whole huge pages."""
        if self.plan is not None:
            return self.plan.memory
        if self.image is not None:
            size = self.image.size
            return rounded(max(EIF_FACTOR * size.file, 2 * size.unpacked + size.file)) // MIB
        return None

    @property
    def cpus(self) -> int:
        """Of the enclave. Two are one core of two threads, the least on most instance types."""
        return 2 if self.plan is None else self.plan.cpus


Check: TypeAlias = Callable[[Host, Wanted], Iterator[Finding]]


def ok(check: str, found: str) -> Finding:
    return Finding(check, Level.OK, found)


def note(
    check: str, found: str, *, todo: str | None = None, expected: object | None = None, got: object | None = None
) -> Finding:
    return Finding(check, Level.NOTE, found, _text(expected), _text(got), todo)


def problem(check: str, found: str, *, todo: str, expected: object | None = None, got: object | None = None) -> Finding:
    return Finding(check, Level.PROBLEM, found, _text(expected), _text(got), todo)


def _text(value: object | None) -> str | None:
    return None if value is None else str(value)


def examined(check: Check, host: Host, wanted: Wanted) -> list[Finding]:
    """A check's findings. What it could not find out is one of them, and a problem: nobody has seen that it is well."""
    try:
        return list(check(host, wanted))
    except StrongroomError as error:
        name, todo = check.__name__.replace("_", "-"), "mend what the text says; without it nothing more can be told"
        return [problem(name, error.message, todo=todo, expected=error.expected, got=error.got)]
    except (OSError, ValueError) as error:
        name, todo = check.__name__.replace("_", "-"), "run it as a user who may read what it names"
        return [problem(name, f"this cannot be told: {error}", todo=todo)]
