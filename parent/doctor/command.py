"""``strongroom doctor``."""

from __future__ import annotations

import base64
import json
import tomllib
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Final

import click

from attestation.errors import StrongroomError
from attestation.model_memory import DEFAULT_WORK, MAX_PARALLEL, Work
from parent.config import LaunchConfigurationError, engine_work
from parent.doctor import machine, network, nitro
from parent.doctor.findings import Aim, Check, Finding, Level, Wanted, examined
from parent.doctor.host import Host
from parent.egress import Allowed
from parent.image.facts import read_facts
from parent.image.size_command import as_wanted, read_shape
from parent.image.sizing import ASSUMED_IMAGE, plan

FILE = click.Path(path_type=Path, exists=True, dir_okay=False)
MAX_CONFIGURATION: Final = 1 << 20

CHECKS: Final[tuple[Check, ...]] = (
    machine.system,
    machine.cpu_features,
    machine.cpus,
    machine.memory,
    nitro.device,
    nitro.nitro_cli,
    nitro.allocator,
    nitro.set_apart,
    nitro.instance,
    nitro.docker,
    machine.tools,
    machine.vsock,
    machine.disk,
    network.clock,
    network.places,
)
MARKS: Final = {Level.OK: "ok", Level.NOTE: "note", Level.PROBLEM: "PROBLEM"}


class ConfigurationUnread(StrongroomError):
    """``enclave.toml`` does not say what was to be looked for in it. Code: ``bad_configuration``."""

    exit_code = 2


@click.command()
@click.option(
    "--for",
    "aim",
    type=click.Choice([aim.value for aim in Aim]),
    help="What this machine is to be: `start --launcher` takes the same.  [default: what it can be]",
)
@click.option("--image", type=FILE, help="The EIF that is to run.")
@click.option("--model", type=FILE, help="The GGUF file that is to run in it.")
@click.option("--config", type=FILE, help="The enclave.toml: what its engine is to hold, and KMS's endpoint.")
@click.option(
    "--parallel", type=click.IntRange(1, MAX_PARALLEL), help="Conversations at once.  [default: as configured, or 4]"
)
@click.option(
    "--reach",
    multiple=True,
    metavar="HOST:PORT[=ADDRESS:PORT]",
    help="What else has to answer, such as s3.us-east-1.amazonaws.com:443, and where that really is.",
)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def doctor(
    aim: str | None,
    image: Path | None,
    model: Path | None,
    config: Path | None,
    parallel: int | None,
    reach: tuple[str, ...],
    as_json: bool,
) -> int:
    """Look for what hinders an enclave here, and say what to do.

    Reads, and changes nothing. Without --image and --model it looks at the machine alone.

    \b
    Example:
      strongroom doctor
      strongroom doctor --for nitro --image enclave.eif --model model.gguf --config enclave.toml
      strongroom doctor --for qemu --json

    Exit codes: 0 nothing hinders what was asked, 1 something does, 2 a file that cannot be read.
    """
    host = Host()
    settings = Settings() if config is None else Settings.read(config)
    wanted = what_is_wanted(Aim(aim) if aim else natural_aim(host), image, model, settings, parallel, reach)
    findings = diagnose(host, wanted)
    problems = sum(each.level is Level.PROBLEM for each in findings)
    if as_json:
        answer = {"for": wanted.aim, "problems": problems, "findings": [asdict(each) for each in findings]}
        click.echo(json.dumps(answer))
    else:
        show(findings)
        said = "nothing hinders" if not problems else f"{problems} to mend for"
        click.echo(f"{said} `strongroom start --launcher {wanted.aim}`")
    return 1 if problems else 0


@dataclass(frozen=True, slots=True)
class Settings:
    """What of an ``enclave.toml`` matters to its host."""

    work: Work | None = None
    """None: there is no file, and what an image says counts."""
    kms: Allowed | None = None
    authority: bytes | None = None
    """The one certificate (DER) that an emulated KMS is trusted by."""

    @classmethod
    def read(cls, path: Path) -> Settings:
        """Raises ConfigurationUnread, AllowListError, OSError."""
        with path.open("rb") as file:
            data = file.read(MAX_CONFIGURATION)
        try:
            document = tomllib.loads(data.decode("utf-8"))
            work, kms = engine_work(document), document.get("kms")
            if kms is None:
                return cls(work)
            root = base64.b64decode(str(kms["root"]), validate=True) if kms["trust"] == "EMULATED" else None
            return cls(work, Allowed.parse(str(kms["endpoint"])), root)
        except LaunchConfigurationError as error:
            raise ConfigurationUnread(error.code, f"{path.name}: {error.message}", expected=error.expected) from error
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            said = f"{path.name}: {type(error).__name__}: {error}"
            raise ConfigurationUnread("bad_configuration", said, expected="an enclave.toml") from error


def what_is_wanted(
    aim: Aim, image: Path | None, model: Path | None, settings: Settings, parallel: int | None, reach: Sequence[str]
) -> Wanted:
    """Raises ImageError, ImageFileError, LaunchConfigurationError, ModelError, SizingError, AllowListError, OSError."""
    facts = None if image is None else read_facts(image)
    size = ASSUMED_IMAGE if facts is None else facts.size
    work = as_wanted(settings.work or (DEFAULT_WORK if facts is None else facts.work), parallel=parallel)
    places: list[tuple[Allowed, bytes | None]] = [(Allowed.parse(each), None) for each in reach]
    if settings.kms is not None:
        named = next((place for place, _ in places if place.asked == settings.kms.asked), settings.kms)
        places = [(named, settings.authority), *((place, None) for place, _ in places if place != named)]
    return Wanted(
        aim,
        facts,
        None if model is None else plan(read_shape(model), work, size),
        tuple(places),
        places[0][0] if settings.kms is not None else None,
    )


def natural_aim(host: Host) -> Aim:
    """What the machine can be: a parent if anything of Nitro is there, else whatever it has the tools for."""
    if nitro.is_parent(host):
        return Aim.NITRO
    made = (machine.tool_folder(host, script, *named[:2]) for script, named in machine.TOOLS.items())
    return Aim.QEMU if all(made) else Aim.PROCESS


def diagnose(host: Host, wanted: Wanted) -> list[Finding]:
    """Of every check, in the order in which one would mend them."""
    return [finding for check in CHECKS for finding in examined(check, host, wanted)]


def show(findings: Sequence[Finding]) -> None:
    for each in findings:
        click.echo(f"{MARKS[each.level]:<8}{each.check:<13} {printable(each.found)}")
        if each.expected is not None or each.got is not None:
            click.echo(f"{'':<21} expected {printable(each.expected or '-')}; got {printable(each.got or 'nothing')}")
        if each.todo is not None:
            click.echo(f"{'':<21} do: {printable(each.todo)}")


def printable(text: str) -> str:
    """One line: what a file or a program said may hold anything."""
    return "".join(character if character.isprintable() else "?" for character in text)
