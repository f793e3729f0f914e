"""``strongroom nitro bootstrap`` and ``launch``: the host of enclaves, and the EC2 instance that it is."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any, Final

import click

from parent.nitro.errors import NitroError
from parent.nitro.host import Command, HostState, Link, Step, Wanted, WriteFile, apply, plan
from parent.nitro.start import FIRST_CID
from parent.nitro.units import HIDDEN_FOLDERS, Services
from vsockrpc.address import VMADDR_CID_ANY

FILE: Final = click.Path(path_type=Path, exists=True, dir_okay=False)
NEW_FILE: Final = click.Path(path_type=Path, dir_okay=False)
FOLDER: Final = click.Path(path_type=Path, exists=True, file_okay=False)
DEFAULT_CID: Final = 16

dry_run_option = click.option("--dry-run", is_flag=True, help="Print what would be done, and do nothing.")
json_option = click.option("--json", "as_json", is_flag=True, help="Print JSON.")
cid_range = click.IntRange(FIRST_CID, VMADDR_CID_ANY - 1)


@click.command()
@click.option("--memory-mib", type=click.IntRange(1), help="For all enclaves of this host together.")
@click.option("--cpus", type=click.IntRange(1), help="For all enclaves of this host together.")
@click.option("--image", type=FILE, help="Instead of the two: what this image needs ...")
@click.option("--model", type=FILE, help="... with this GGUF file, which the model store then serves.")
@click.option("--context", type=click.IntRange(64), help="Tokens of a conversation.  [default: as in the image]")
@click.option("--parallel", type=click.IntRange(1), help="Conversations at once.  [default: as in the image]")
@click.option(
    "--user",
    default=lambda: os.environ.get("SUDO_USER"),
    metavar="NAME",
    help="Who may run enclaves and build images.  [default: who called sudo]",
)
@click.option("--services/--no-services", default=True, show_default=True, help="Proxy, egress and model store.")
@click.option("--cid", type=cid_range, default=DEFAULT_CID, show_default=True, help="Of the enclave that they serve.")
@click.option("--listen", default="127.0.0.1:8080", show_default=True, metavar="HOST:PORT", help="Of the proxy.")
@click.option(
    "--allow",
    multiple=True,
    metavar="HOST:PORT[=ADDRESS:PORT]",
    help="What the enclave may reach: its KMS. Without it there is no egress.",
)
@click.option(
    "--program",
    default=str(Path(sys.executable).with_name("strongroom")),
    metavar="PATH",
    help="What the services, and /usr/local/bin/strongroom, run.  [default: this installation]",
)
@click.option(
    "--root",
    type=FOLDER,
    default="/",
    show_default=True,
    help="Another folder is a file tree that is being made: nothing of it runs, and this host stays as it is.",
)
@dry_run_option
@json_option
def bootstrap(
    memory_mib: int | None,
    cpus: int | None,
    image: Path | None,
    model: Path | None,
    context: int | None,
    parallel: int | None,
    user: str | None,
    services: bool,
    cid: int,
    listen: str,
    allow: tuple[str, ...],
    program: str,
    root: Path,
    dry_run: bool,
    as_json: bool,
) -> None:
    """Set this host up for enclaves; again, and nothing changes.

    Packages (Amazon Linux 2023), the user's groups, the allocator's memory and CPUs, huge pages through it, strongroom
    in /usr/local/bin, and units for proxy, egress and model store. Needs root, unless with --dry-run.

    \b
    Example:
      strongroom nitro bootstrap --memory-mib 4096 --cpus 2 --dry-run
      sudo strongroom nitro bootstrap --image enclave.eif --model /var/lib/strongroom/model.gguf \\
          --allow kms.eu-central-1.amazonaws.com:443
    """
    if (memory_mib is None) != (cpus is None) or (memory_mib is None and (image is None or model is None)):
        raise click.UsageError("name --memory-mib and --cpus, or --image and --model")
    if memory_mib is None or cpus is None:
        assert image is not None
        assert model is not None
        memory_mib, cpus = sized(image, model, context, parallel)
    beside = None
    if services:
        beside = Services(program, cid, listen, None if model is None else str(model.resolve()), allow)
    link = None if program.startswith(HIDDEN_FOLDERS) else program
    wanted = Wanted(memory_mib, cpus, None if user == "root" else user, beside, link)
    steps = plan(wanted, HostState.read(wanted, root), root=root)
    if not dry_run and steps:
        if root == Path("/") and os.geteuid() != 0:
            raise NitroError("bad_request", "setting this host up needs root: sudo, or --dry-run")
        apply(steps, root=root)
    if as_json:
        done = {
            "memory_mib": memory_mib,
            "cpus": cpus,
            "dry_run": dry_run,
            "steps": [as_object(each) for each in steps],
        }
        click.echo(json.dumps(done))
        return
    for step in steps:
        click.echo(step)
        if dry_run and isinstance(step, WriteFile):
            click.echo("".join(f"    {line}\n" for line in step.content.splitlines()), nl=False)
    if not steps:
        click.echo("nothing to do: this host is set up")
    elif dry_run:
        click.echo(f"{len(steps)} steps; nothing was done")
    elif user is not None:
        click.echo(f"{user} logs in anew to be in the groups")


def sized(image: Path, model: Path, context: int | None, parallel: int | None) -> tuple[int, int]:
    """MiB and CPUs that an enclave of this image needs for this model. None takes what the image's configuration says.
    Raises StrongroomError.
    """
    from parent.image.facts import read_facts  # what reads images takes time to load
    from parent.image.size_command import as_wanted, read_shape
    from parent.image.sizing import plan as plan_for

    facts = read_facts(image)
    needed = plan_for(read_shape(model), as_wanted(facts.work, context=context, parallel=parallel), facts.size)
    return needed.memory, needed.cpus


def as_object(step: Step) -> dict[str, Any]:
    """For a program that reads the plan."""
    match step:
        case WriteFile(path, content):
            return {"write": path, "content": content}
        case Link(path, target):
            return {"link": path, "to": target}
        case Command(words):
            return {"run": list(words)}


@click.command()
@click.option("--name", required=True, help="Under which it is found again: launching twice launches once.")
@click.option(
    "--instance-type", required=True, metavar="TYPE", help="Such as m6i.2xlarge; `strongroom image size` says."
)
@click.option("--enclave-memory-mib", type=click.IntRange(1), required=True, help="For its enclaves together.")
@click.option("--enclave-cpus", type=click.IntRange(1), required=True, help="For its enclaves together.")
@click.option("--region", metavar="NAME", help="[default: that of your AWS configuration]")
@click.option("--profile", metavar="NAME", help="Of your AWS configuration.")
@click.option("--ami", metavar="ID", help="[default: Amazon Linux 2023's newest]")
@click.option("--subnet", metavar="ID", help="[default: EC2's choice]")
@click.option("--security-group", "security_groups", multiple=True, metavar="ID")
@click.option("--instance-profile", metavar="NAME", help="Whose role KMS sees.")
@click.option("--key-name", metavar="NAME", help="An SSH key pair. Without it: Session Manager.")
@click.option("--volume-gib", type=click.IntRange(8, 16_384), default=40, show_default=True, help="Of its disk.")
@click.option(
    "--hop-limit", type=click.IntRange(1, 2), default=1, show_default=True, help="Of metadata: 2 for containers."
)
@click.option("--public-address", is_flag=True, help="Reachable from the internet, as its security groups allow.")
@click.option("--source", metavar="URL", help="This repository in git: the instance sets itself up from it.")
@click.option("--revision", metavar="COMMIT", help="Of --source, in full.")
@click.option("--dry-run/--apply", default=True, show_default=True, help="Ask EC2 whether it would, or launch.")
@json_option
def launch(
    name: str,
    instance_type: str,
    enclave_memory_mib: int,
    enclave_cpus: int,
    region: str | None,
    profile: str | None,
    ami: str | None,
    dry_run: bool,
    as_json: bool,
    **options: Any,
) -> None:
    """Launch an EC2 instance that can run enclaves; without --apply EC2 is only asked whether it would.

    Its enclaves are enabled, its metadata service is version 2 alone, its disk is encrypted, and it has no public
    address. Its type is checked against what EC2 says of it.

    \b
    Example:
      strongroom nitro launch --name parent --instance-type m6i.2xlarge --enclave-memory-mib 4096 --enclave-cpus 2 \\
          --instance-profile parent --apply
    """
    from parent.nitro.ec2 import Ec2, Parent

    wanted = Parent(name=name, instance_type=instance_type, memory_mib=enclave_memory_mib, cpus=enclave_cpus, **options)
    ec2 = Ec2(region, profile)
    architecture = ec2.require_enclaves(wanted)
    found = ec2.find(name)
    request = None
    if found is None:
        request = wanted.request(ami or ec2.newest_amazon_linux(architecture))
        if dry_run:
            ec2.would_launch(request)
        else:
            found = ec2.launch(request)
    launched = request is not None and not dry_run
    if as_json:
        said = {"instance": found, "launched": launched, "region": ec2.region, "request": request}
        click.echo(json.dumps(said))
    elif request is None:
        click.echo(f"{name} is there already: {found} in {ec2.region}")
    elif launched:
        click.echo(f"launched {found} in {ec2.region}: {wanted.instance_type}, {request['ImageId']}")
    else:
        click.echo(json.dumps(request, indent=2))
        script = wanted.user_data()
        if script is not None:
            click.echo("user data:\n" + "".join(f"    {line}\n" for line in script.splitlines()), nl=False)
        click.echo(f"EC2 would launch this in {ec2.region}; --apply does it")
