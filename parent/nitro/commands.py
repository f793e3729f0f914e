"""``strongroom nitro``: a real parent, from an EC2 instance to an enclave that runs."""

from __future__ import annotations

import asyncio
import json
import shlex
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import click
from rich.console import Console

from parent.nitro.cli import PROGRAM, NitroCli, RunningEnclave
from parent.nitro.errors import NitroError
from parent.nitro.host_commands import FILE, FOLDER, NEW_FILE, bootstrap, dry_run_option, json_option, launch
from parent.nitro.resources import EnclaveResources
from parent.nitro.start import (
    EnclaveRequest,
    require_memory,
    require_possible,
    require_same,
    start_enclave,
    terminate_if_there,
)
from parent.nitro.units import RPC_PORT

if TYPE_CHECKING:
    from attestation.measure import EnclaveImage

err = Console(stderr=True, highlight=False)

DEBUG_WARNING: Final = (
    "DEBUG MODE: this host reads the enclave's console, its registers PCR0, 1, 2 and 8 are zero, and nothing in it is "
    "protected. No policy and no KMS key accepts it unless it says DEBUG by name."
)

root_option = click.option("--root", type=FOLDER, default="/", hidden=True)


@click.group()
def nitro() -> None:
    """Run enclaves on AWS: the instance, the host, the image, the enclave.

    \b
    Example:
      strongroom nitro launch --name parent --instance-type m6i.2xlarge --enclave-memory-mib 4096 --enclave-cpus 2
      strongroom nitro bootstrap --memory-mib 4096 --cpus 2 --model /var/lib/strongroom/model.gguf
      strongroom nitro build --dockerfile Dockerfile.enclave --output enclave.eif
      strongroom nitro run enclave.eif --memory-mib 4096 --cpus 2 --cid 16
      strongroom nitro describe
      strongroom nitro terminate enclave

    The scripts bootstrap-parent, launch-parent, build-eif, run-enclave, describe-enclaves, enclave-console and
    terminate-enclave do the same, on a host that has nothing yet.

    Exit codes: 0 done, 2 what was asked for cannot be, 3 what came out cannot be believed, 4 this host cannot do it.
    """


nitro.add_command(launch)
nitro.add_command(bootstrap)


# --- The image ------------------------------------------------------------------------------------------------------


@nitro.command()
@click.option("--dockerfile", type=FILE, default="Dockerfile.enclave", show_default=True)
@click.option("--context", type=FOLDER, default=".", show_default=True, help="The folder that docker builds from.")
@click.option("--output", type=click.Path(path_type=Path, dir_okay=False), default="enclave.eif", show_default=True)
@click.option("--tag", default="strongroom-enclave", show_default=True, help="Of the container image, in docker.")
@click.option("--build-arg", "build_arguments", multiple=True, metavar="NAME=VALUE", help="Of the Dockerfile.")
@click.option("--sign", metavar="KEY", help="A private key's file (PEM), or the ARN of a KMS key: gives PCR8.")
@click.option("--certificate", type=FILE, help="Of --sign, PEM.")
@click.option("--policy", type=NEW_FILE, help="Write the appraisal policy too; another one that is there stays.")
@click.argument("policy_options", nargs=-1, type=click.UNPROCESSED, metavar="[-- POLICY OPTIONS]")
@dry_run_option
@json_option
def build(
    dockerfile: Path,
    context: Path,
    output: Path,
    tag: str,
    build_arguments: tuple[str, ...],
    sign: str | None,
    certificate: Path | None,
    policy: Path | None,
    policy_options: tuple[str, ...],
    dry_run: bool,
    as_json: bool,
) -> int:
    """Build an enclave image with docker and nitro-cli, and measure it a second time.

    What nitro-cli says of the image has to equal what its file is, or there is none. The measurements are written
    beside the image in nitro-cli's shape. `strongroom image build` needs neither docker's daemon nor nitro-cli, and
    makes the same image every time.

    With --policy, `strongroom image policy` writes it for the image, and gets what stands behind --: with
    --kms-condition it writes what KMS has to ask of an enclave as well.

    \b
    Example:
      strongroom nitro build --dockerfile Dockerfile.enclave --output enclave.eif --policy policy.toml
      strongroom nitro build --policy policy.toml -- --kms-condition key-policy.json --use model --context production \\
          --user arn:aws:iam::111122223333:role/parent
    """
    from parent.nitro.build import MEASUREMENTS_SUFFIX, Build
    from parent.nitro.build import build as build_image

    named = dict(build_argument(each) for each in build_arguments)
    wanted = Build(
        dockerfile=dockerfile,
        context=context,
        output=output,
        tag=tag,
        arguments=named,
        certificate=certificate,
        private_key=sign,
    )
    if policy_options and policy is None:
        raise click.UsageError("what stands behind -- goes with --policy")
    following = None
    if policy is not None:
        following = policy_command(output, policy, policy_options, as_json)
    if dry_run:
        commands = [wanted.docker(), [PROGRAM, "build-enclave", *wanted.nitro_cli(output)]]
        commands += [] if following is None else [["strongroom", *following]]
        click.echo(
            json.dumps({"run": commands}) if as_json else "\n".join(f"run {shlex.join(each)}" for each in commands)
        )
        return 0
    image = asyncio.run(build_image(wanted, NitroCli()))
    if as_json:
        click.echo(json.dumps({"image": str(output), **image.as_nitro_cli()}))
    else:
        click.echo(f"wrote {output}\nwrote {output}{MEASUREMENTS_SUFFIX}")
        show_registers(image)
    if following is None:
        return 0
    sys.stdout.flush()
    return subprocess.run([sys.executable, "-m", "strongroom", *following], check=False).returncode


def policy_command(image: Path, policy: Path, options: Sequence[str], as_json: bool) -> list[str]:
    """Another room's: it is run as a program, and says for itself what it did, on the line behind ours."""
    return ["image", "policy", str(image), "--out", str(policy), *options, *(["--json"] if as_json else [])]


def build_argument(text: str) -> tuple[str, str]:
    """Raises click.BadParameter."""
    name, equals, value = text.partition("=")
    if not name or not equals:
        raise click.BadParameter(f"{text}: NAME=VALUE", param_hint="--build-arg")
    return name, value


def show_registers(image: EnclaveImage) -> None:
    """One line for each."""
    for index, value in image.measurements.as_registers().items():
        click.echo(f"PCR{index}  {value.hex()}")


# --- The enclave ----------------------------------------------------------------------------------------------------


@nitro.command()
@click.argument("image", type=FILE)
@click.option("--memory-mib", type=click.IntRange(1), required=True, help="`strongroom image size` says how much.")
@click.option("--cpus", type=click.IntRange(1), required=True, help="Whole cores: a multiple of the threads of one.")
@click.option(
    "--cid", type=click.IntRange(0), help="From 4 up, and of no other enclave.  [default: the driver's choice]"
)
@click.option("--name", help="[default: that of the image's file]")
@click.option(
    "--debug-mode", is_flag=True, help="Opens the console to this host and zeroes the registers: nothing is protected."
)
@root_option
@dry_run_option
@json_option
def run(
    image: Path,
    memory_mib: int,
    cpus: int,
    cid: int | None,
    name: str | None,
    debug_mode: bool,
    root: Path,
    dry_run: bool,
    as_json: bool,
) -> None:
    """Start an enclave from an image; one of this name that runs already stays.

    The image is measured and checked, and the host asked for what it has: memory of at least four times the image in
    huge pages, CPUs and memory of one NUMA node, a CID that nobody has. What is missing is said before nitro-cli runs.

    \b
    Example:
      strongroom nitro run enclave.eif --memory-mib 4096 --cpus 2 --cid 16
    """
    from attestation.measure import read_image

    path = image.resolve()
    request = EnclaveRequest(path, name or path.name.removesuffix(".eif"), memory_mib, cpus, cid, debug_mode)
    size = path.stat().st_size
    require_memory(request, size)
    measured = read_image(path, at=datetime.now(UTC))
    cli = NitroCli()
    running = asyncio.run(cli.describe())
    same = next((each for each in running if each.name == request.name), None)
    if same is not None:
        require_as_asked(same, request)
        require_same(same, measured.measurements)
    else:
        require_possible(request, size, EnclaveResources.read(root), running)
    if debug_mode:
        err.print(f"[bold red]{DEBUG_WARNING}[/bold red]")
    if dry_run:
        command = [PROGRAM, *request.arguments()]
        said = f"run {shlex.join(command)}" if same is None else "nothing to do: it runs"
        click.echo(json.dumps({"run": [] if same else [command]}) if as_json else said)
        return
    enclave = same or asyncio.run(start_enclave(cli, request, measured.measurements))
    if as_json:
        click.echo(json.dumps({**described(enclave), "started": same is None, **registers_of(measured, enclave)}))
        return
    click.echo(f"{enclave.name} {'runs already' if same else 'runs'}: {enclave.id}, vsock:{enclave.cid}:{RPC_PORT}")
    if not enclave.debug:
        show_registers(measured)


@nitro.command()
@dry_run_option
@json_option
def describe(dry_run: bool, as_json: bool) -> None:
    """List the enclaves of this host that you may see.

    Of a debug enclave nitro-cli prints what its image would measure, while its registers are zero: those are named
    build_measurements here, and are no reference values.
    """
    if dry_run:
        command = [PROGRAM, "describe-enclaves"]
        click.echo(json.dumps({"run": [command]}) if as_json else f"run {shlex.join(command)}")
        return
    enclaves = asyncio.run(NitroCli().describe())
    if any(each.debug for each in enclaves):
        err.print(f"[bold red]{DEBUG_WARNING}[/bold red]")
    if as_json:
        click.echo(json.dumps([described(each) for each in enclaves]))
        return
    if not enclaves:
        click.echo("no enclaves")
    for each in enclaves:
        mode = "  DEBUG: nothing is protected" if each.debug else ""
        click.echo(
            f"{each.name or '-'}  {each.id}  CID {each.cid}  {each.memory_mib} MiB  "
            f"CPUs {','.join(map(str, each.cpu_ids)) or '-'}  {each.state}{mode}"
        )


@nitro.command()
@click.argument("enclave")
@click.option("--disconnect-timeout", type=click.IntRange(1), metavar="SECONDS", help="Leave when nothing comes.")
@dry_run_option
def console(enclave: str, disconnect_timeout: int | None, dry_run: bool) -> int:
    """Show the console of a debug enclave, named or by its ID. Another one has none."""
    found = find(asyncio.run(NitroCli().describe()), enclave)
    if not found.debug:
        raise NitroError(
            "not_debug",
            "this enclave has no console: it is not in debug mode, and that is as it should be",
            expected="an enclave started with --debug-mode",
            got=found.name or found.id,
        )
    err.print(f"[bold red]{DEBUG_WARNING}[/bold red]")
    command = [PROGRAM, "console", "--enclave-id", found.id]
    command += [] if disconnect_timeout is None else ["--disconnect-timeout", str(disconnect_timeout)]
    if dry_run:
        click.echo(f"run {shlex.join(command)}")
        return 0
    return subprocess.run(command, check=False).returncode


@nitro.command()
@click.argument("enclave", required=False)
@click.option("--all", "every", is_flag=True, help="All that you may see.")
@dry_run_option
@json_option
def terminate(enclave: str | None, every: bool, dry_run: bool, as_json: bool) -> None:
    """End an enclave, named or by its ID. Its keys and its memory are gone. One that does not run is no error."""
    if (enclave is None) != every:
        raise click.UsageError("name one enclave, or --all")
    cli = NitroCli()

    async def end() -> list[str]:
        ended = []
        for each in await cli.describe():
            wanted = every or enclave in (each.id, each.name)
            if wanted and (dry_run or await terminate_if_there(cli, each.id)):
                ended.append(each.id)
        return ended

    ended = asyncio.run(end())
    if as_json:
        click.echo(json.dumps({"terminated": [] if dry_run else ended, "dry_run": dry_run}))
    elif not ended:
        click.echo("no enclaves" if every else f"{enclave} does not run")
    for each in [] if as_json else ended:
        click.echo(
            f"run {shlex.join([PROGRAM, 'terminate-enclave', '--enclave-id', each])}"
            if dry_run
            else f"terminated {each}"
        )


def find(enclaves: Sequence[RunningEnclave], wanted: str) -> RunningEnclave:
    """By name or ID. Raises NitroError ``no_such_enclave``."""
    found = [each for each in enclaves if wanted in (each.id, each.name)]
    if len(found) != 1:
        known = ", ".join(each.name or each.id for each in enclaves) or "none"
        raise NitroError("no_such_enclave", "no enclave of this name or ID runs", expected=known, got=wanted)
    return found[0]


def require_as_asked(running: RunningEnclave, request: EnclaveRequest) -> None:
    """An enclave of this name runs. Raises NitroError ``already_running`` unless it is what was asked for."""
    there = (
        running.memory_mib >= request.memory_mib,
        len(running.cpu_ids) == request.cpus,
        running.debug == request.debug,
    )
    if not all(there) or request.cid not in (None, running.cid):
        raise NitroError(
            "already_running",
            f"another enclave of the name {request.name} runs: terminate it first, or take another --name",
            expected=f"{request}{', debug' if request.debug else ''}",
            got=f"{running.memory_mib} MiB, {len(running.cpu_ids)} CPUs, CID {running.cid}"
            f"{', debug' if running.debug else ''}",
        )


def described(enclave: RunningEnclave) -> dict[str, Any]:
    """For a program that reads it. A debug enclave has no measurements."""
    fields = asdict(enclave)
    fields["measurements"] = None if enclave.debug else dict(enclave.measurements)
    return {**fields, "build_measurements": dict(enclave.measurements) if enclave.debug else None}


def registers_of(image: EnclaveImage, enclave: RunningEnclave) -> dict[str, Any]:
    """What the enclave's registers hold, as far as the image decides it; zero in debug mode, so nothing then."""
    registers = {str(index): value.hex() for index, value in image.measurements.as_registers().items()}
    return {"pcrs": None if enclave.debug else registers}
