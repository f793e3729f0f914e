"""``strongroom start``: an enclave on this host, by one of the launchers, and what is said while it comes up."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING

import click
from rich.console import Console

from attestation.envelope import MAGIC
from attestation.manifest import MAX_MANIFEST_SIZE, ModelManifest
from attestation.model_memory import ModelShape, SizingError
from attestation.reference import digest_text
from parent.config import KmsAccess, LaunchConfiguration, LaunchConfigurationError
from parent.launch.machine import LaunchError, Machine
from parent.launch.supervisor import Launch, Supervisor
from parent.modelstore import MANIFEST_SUFFIX, ModelStore
from parent.progress import BootProgress
from parent.registry import ENDED, Instance, Registry, State
from vsockrpc.http_server import parse_listen

if TYPE_CHECKING:
    from parent.egress_service import EgressSettings

err = Console(stderr=True, highlight=False)

FILE = click.Path(path_type=Path, exists=True, dir_okay=False)
GIB = 1 << 30


@click.command()
@click.option(
    "--launcher",
    type=click.Choice(["process", "qemu", "nitro"]),
    default="process",
    show_default=True,
    help="process: emulated, as processes of this host. qemu: an image, in an emulated machine. nitro: an image, on a "
    "Nitro host.",
)
@click.option("--config", "configuration", type=FILE, help="The measured configuration, enclave.toml; for process.")
@click.option("--image", type=FILE, help="The enclave image, which holds its configuration; for qemu and nitro.")
@click.option(
    "--model",
    type=FILE,
    help=f"The GGUF file whose manifest the configuration pins. An encrypted one has it in a file beside it, with "
    f"{MANIFEST_SUFFIX} appended to the name; an image may have the weights in itself.",
)
@click.option("--name", default="enclave", show_default=True, help="What to call it.")
@click.option(
    "--memory-gib",
    type=click.FloatRange(0.25),
    help="Address space of each of its processes; of a machine, all of its memory.  [default: what the model needs, "
    "for a machine as `strongroom image size` says]",
)
@click.option("--cpus", type=click.IntRange(1), help="CPUs it may use.  [default: all]")
@click.option(
    "--allow",
    multiple=True,
    metavar="HOST:PORT[=ADDRESS:PORT]",
    help="With [kms]: what the enclave may reach, and where that really is.  [default: the endpoint in [kms]]",
)
@click.option(
    "--credentials",
    type=click.Choice(["imds", "boto3", "none"]),
    help="With [kms]: the AWS credentials that the enclave gets.  [default: boto3, those of your AWS configuration]",
)
@click.option("--profile", metavar="NAME", help="With [kms]: of your AWS configuration.")
@click.option("--egress-metrics", metavar="HOST:PORT", help="With [kms]: where to serve the egress's /metrics.")
@click.option("--foreground", is_flag=True, help="Stay, and end the enclave with this command.")
@click.option("--leave-terminal", is_flag=True, hidden=True, help="Let go of the terminal once the enclave serves.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object when it serves.")
def start(
    launcher: str,
    configuration: Path | None,
    image: Path | None,
    model: Path | None,
    name: str,
    memory_gib: float | None,
    cpus: int | None,
    allow: tuple[str, ...],
    credentials: str | None,
    profile: str | None,
    egress_metrics: str | None,
    foreground: bool,
    leave_terminal: bool,
    as_json: bool,
) -> int:
    """Start an enclave and wait until it serves.

    \b
    Example:
      strongroom init --model SmolLM2.gguf --directory demo
      strongroom start --config demo/enclave.toml --model SmolLM2.gguf --name demo
      strongroom logs demo
      strongroom stop demo

    An enclave whose configuration has [kms] reaches KMS through this host, and gets AWS credentials from it:

    \b
      strongroom start --config demo/enclave.toml --model SmolLM2.gguf.sealed --profile dev \\
          --allow kms.us-east-1.amazonaws.com:443=127.0.0.1:8443

    An image runs as the machine that it was built for, or in an emulated one:

    \b
      strongroom start --launcher qemu --image enclave.eif --model SmolLM2.gguf --name demo

    Exit codes: 0 it serves, 2 the files do not fit, 4 it could not start; then `strongroom ps` says why.
    """
    measured = image if launcher != "process" else configuration
    if measured is None or (image if launcher == "process" else configuration) is not None:
        raise click.UsageError(f"--launcher {launcher} takes {'--config' if launcher == 'process' else '--image'}")
    if not foreground:
        arguments = ["--launcher", launcher, "--name", name]
        arguments += ["--config" if launcher == "process" else "--image", str(measured)]
        arguments += ["--memory-gib", str(memory_gib)] if memory_gib else []
        arguments += ["--cpus", str(cpus)] if cpus else []
        for option, value in (
            *(("--allow", each) for each in allow),
            ("--model", None if model is None else str(model)),
            ("--credentials", credentials),
            ("--profile", profile),
            ("--egress-metrics", egress_metrics),
        ):
            arguments += [option, value] if value is not None else []
        return start_in_background(arguments + (["--json"] if as_json else []), as_json=as_json)
    text = measured.read_bytes() if launcher == "process" else configuration_of(measured)
    wanted = LaunchConfiguration.parse(text, name=measured.name)
    if (model is None) != (wanted.store is None):
        said = "has the weights in itself" if model else "names a model store: which file is the model?"
        raise click.UsageError(f"--model: {measured} {said}")
    kms = wanted.kms
    if kms is not None:
        egress = egress_settings(kms, allow, credentials, profile, egress_metrics)
    elif allow or credentials or profile or egress_metrics:
        raise click.UsageError(f"--allow, --credentials, --profile, --egress-metrics: {measured} has no [kms]")
    else:
        egress = None
    if launcher != "process":
        require_places(launcher, wanted, name)
    with BootProgress(err, quiet=as_json) as progress:
        store = None
        if model is not None:
            progress.phase("HASHING")
            store = pinned_model(wanted, model, progress.hashing)
        instance = Registry.of_user().create(name)
        instance.configuration.write_bytes(text)
        memory = None if memory_gib is None else int(memory_gib * GIB)
        machine = make_machine(launcher, instance, image, model, memory=memory, cpus=cpus)
        launch = Launch(instance, machine, store, egress)

        def changed(state: State) -> None:
            if state.phase == "SERVING" and not state.restarts:
                progress.phase(state.phase)
                show_started(state, as_json)
                if leave_terminal:
                    let_go_of_terminal(instance)
            elif state.phase not in ENDED:
                progress.phase(state.phase)

        state = asyncio.run(Supervisor(launch, on_change=changed, on_event=progress.event).run())
    if state.error is not None:
        raise LaunchError.of(state.error)
    return 0


def configuration_of(image: Path) -> bytes:
    """The ``enclave.toml`` in an image. Raises ImageError, ImageFileError, OSError."""
    from attestation.image_files import read_configuration  # what reads images takes time to load
    from attestation.measure import measure_image

    with image.open("rb") as file:
        return read_configuration(measure_image(file), file)


def require_places(launcher: str, configuration: LaunchConfiguration, name: str) -> None:
    """What takes no reading of a model is said before one is read. Raises LaunchConfigurationError for addresses that
    no machine of this launcher has, AddressError.
    """
    if launcher == "nitro":
        from parent.launch import nitro

        nitro.places_of(configuration, nitro.cid_of(name))
    else:
        from parent.launch import qemu

        qemu.places_of(configuration, Instance(Registry.of_user().root / name))


def make_machine(
    launcher: str,
    instance: Instance,
    image: Path | None,
    model: Path | None,
    *,
    memory: int | None,
    cpus: int | None,
) -> Machine:
    """``memory`` is bytes and ``cpus`` a count; None takes what image and model need, and lets the launcher choose.
    Raises StrongroomError for what cannot run here.
    """
    if image is None:
        from parent.launch.process import MEMORY_SLACK, ProcessMachine

        size = 0 if model is None else model.stat().st_size
        return ProcessMachine(instance, memory=memory or 2 * size + MEMORY_SLACK, cpus=cpus or 0)
    memory = memory or needed_memory(image, model, LaunchConfiguration.load(instance.configuration))
    if launcher == "nitro":
        from parent.launch.nitro import NitroMachine

        return NitroMachine(instance, image.resolve(), memory=memory, cpus=cpus)
    from parent.launch.qemu import QemuMachine

    return QemuMachine(instance, image.resolve(), memory=memory, cpus=cpus)


def needed_memory(image: Path, model: Path | None, configuration: LaunchConfiguration) -> int:
    """Bytes, as ``strongroom image size`` counts them for this image, model and configuration. Weights that are in the
    image are counted with it, and are at most all of it.

    Raises ImageError, ImageFileError, ModelError, SizingError.
    """
    from parent.image.facts import read_facts  # what reads images takes time to load
    from parent.image.sizing import MIB, plan

    size = read_facts(image).size
    shape = replace(ModelShape.unseen(size.unpacked), weights=0) if model is None else shape_of(model, configuration)
    return plan(shape, configuration.work, size).memory * MIB


def shape_of(model: Path, configuration: LaunchConfiguration) -> ModelShape:
    """The header's, or the most that is to be expected where nobody here can read it. Raises ModelError."""
    from parent.image.size_command import read_shape

    if configuration.kms is None or not configuration.kms.encrypted_model:
        with contextlib.suppress(SizingError):
            return read_shape(model)
    return ModelShape.unseen(model.stat().st_size)


def start_in_background(arguments: list[str], *, as_json: bool) -> int:
    """The same command in a session of its own; it lets go of the terminal once its enclave serves, and is left alone
    then.
    """
    command = [sys.executable, "-m", "strongroom.cli", "start", *arguments, "--foreground", "--leave-terminal"]
    child = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, start_new_session=True)
    assert child.stdout is not None
    try:
        said = child.stdout.read()
    except BaseException:  # Ctrl-C and SIGTERM among them: the enclave ends with the command that was starting it
        child.terminate()
        child.wait()
        raise
    click.echo(said.decode(), nl=False)
    serves = said and not (as_json and "error" in json.loads(said))
    return 0 if serves else child.wait()


def show_started(state: State, as_json: bool) -> None:
    click.echo(json.dumps(asdict(state)) if as_json else f"{state.name} serves at {state.address}")
    sys.stdout.flush()


def let_go_of_terminal(instance: Instance) -> None:
    log = os.open(instance.log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    for descriptor in (sys.stdout.fileno(), sys.stderr.fileno()):
        os.dup2(log, descriptor)
    os.close(log)


def egress_settings(
    kms: KmsAccess, allow: Sequence[str], credentials: str | None, profile: str | None, metrics: str | None
) -> EgressSettings:
    """Raises AllowListError, ListenError, and LaunchConfigurationError when the KMS endpoint is not allowed."""
    from parent.egress import Allowed, Endpoint  # as with the launcher: only those who need its resolver wait for it
    from parent.egress_service import EgressSettings

    if profile is not None and credentials not in (None, "boto3"):
        raise click.UsageError("--profile goes with --credentials boto3")
    allowed = [Allowed.parse(each) for each in allow or [kms.endpoint]]
    if Endpoint.parse(kms.endpoint) not in [each.asked for each in allowed]:
        places = ", ".join(str(each.asked) for each in allowed)
        raise LaunchConfigurationError(
            "kms.endpoint", "not among what --allow names", expected=places, got=kms.endpoint
        )
    return EgressSettings(allowed, credentials or "boto3", profile, None if metrics is None else parse_listen(metrics))


def pinned_model(launch: LaunchConfiguration, model: Path, progress: Callable[[int, int], None]) -> ModelStore:
    """The model in a file, when it is the one that the configuration pins. The enclave checks it again, on what it
    receives.
    """
    encrypted = launch.kms is not None and launch.kms.encrypted_model
    manifest = manifest_beside(model) if encrypted else ModelManifest.from_gguf(model, progress=progress)
    got = digest_text(manifest.digest())
    if got != launch.manifest:
        raise LaunchConfigurationError(
            "model.manifest", f"{model.name} is another model", expected=launch.manifest, got=got
        )
    return ModelStore(manifest, model.resolve(), encrypted=encrypted)


def manifest_beside(model: Path) -> ModelManifest:
    """Of an encrypted model: only whoever opens it could make the manifest from the file. Raises
    LaunchConfigurationError, ModelError.
    """
    with model.open("rb") as file:
        beginning = file.read(len(MAGIC))
    if beginning != MAGIC:
        raise LaunchConfigurationError(
            "kms.model", f"{model.name} is not encrypted", expected="an envelope (`strongroom model encrypt` makes it)"
        )
    path = model.with_name(model.name + MANIFEST_SUFFIX)
    try:
        with path.open("rb") as file:
            return ModelManifest.decode(file.read(MAX_MANIFEST_SIZE + 1))
    except OSError as error:
        raise LaunchConfigurationError(
            "kms.model",
            f"the manifest of the encrypted model cannot be read: {error.strerror}",
            expected=f"{path}, which `strongroom model encrypt` writes beside the model",
        ) from error
