"""The operator's commands: start, ps, logs, stop, proxy."""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING

import click
from rich.console import Console

from attestation.envelope import MAGIC
from attestation.manifest import MAX_MANIFEST_SIZE, ModelManifest
from attestation.reference import digest_text
from parent.config import KmsAccess, LaunchConfiguration, LaunchConfigurationError
from parent.launch.process import Launch, LaunchError, Supervisor
from parent.modelstore import MANIFEST_SUFFIX
from parent.progress import BootProgress
from parent.proxy import Proxy
from parent.registry import ENDED, Instance, Registry, RegistryError, State
from vsockrpc.address import Address, UnixAddress, parse_address
from vsockrpc.errors import AddressError
from vsockrpc.http_server import listen_on, parse_listen, serve_http

if TYPE_CHECKING:
    from parent.egress_service import EgressSettings

err = Console(stderr=True, highlight=False)

POLL_SECONDS = 0.05
STOP_SECONDS = 30
FILE = click.Path(path_type=Path, exists=True, dir_okay=False)


# --- start --------------------------------------------------------------------------------------------------------


@click.command()
@click.option(
    "--launcher",
    type=click.Choice(["process"]),
    default="process",
    show_default=True,
    help="process: emulated, on this host.",
)
@click.option("--config", "configuration", type=FILE, required=True, help="The measured configuration, enclave.toml.")
@click.option(
    "--model",
    type=FILE,
    required=True,
    help=f"The GGUF file whose manifest the configuration pins. An encrypted one has it in a file beside it, with "
    f"{MANIFEST_SUFFIX} appended to the name.",
)
@click.option("--name", default="enclave", show_default=True, help="What to call it.")
@click.option(
    "--memory-gib", type=click.FloatRange(0.5), help="Address space of each of its processes.  [default: 2 x model + 6]"
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
    configuration: Path,
    model: Path,
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

    Exit codes: 0 it serves, 2 the files do not fit, 4 it could not start; then `strongroom ps` says why.
    """
    if not foreground:
        arguments = ["--config", str(configuration), "--model", str(model), "--name", name]
        arguments += ["--memory-gib", str(memory_gib)] if memory_gib else []
        arguments += ["--cpus", str(cpus)] if cpus else []
        for option, value in (
            *(("--allow", each) for each in allow),
            ("--credentials", credentials),
            ("--profile", profile),
            ("--egress-metrics", egress_metrics),
        ):
            arguments += [option, value] if value is not None else []
        return start_in_background(arguments + (["--json"] if as_json else []), as_json=as_json)
    kms = LaunchConfiguration.load(configuration).kms
    if kms is not None:
        egress = egress_settings(kms, allow, credentials, profile, egress_metrics)
    elif allow or credentials or profile or egress_metrics:
        raise click.UsageError(f"--allow, --credentials, --profile, --egress-metrics: {configuration} has no [kms]")
    else:
        egress = None
    with BootProgress(err, quiet=as_json) as progress:
        progress.phase("HASHING")
        manifest = pinned_manifest(configuration, model, progress.hashing)
        instance = Registry.of_user().create(name)
        shutil.copyfile(configuration, instance.configuration)
        memory = int((memory_gib or 0) * (1 << 30))
        launch = Launch(instance, manifest, model.resolve(), memory=memory, cpus=cpus or 0, egress=egress)

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
        raise launch_error(state.error)
    return 0


def launch_error(reason: Mapping[str, str | None]) -> LaunchError:
    """What a state says of its end."""
    return LaunchError(
        str(reason["code"]), str(reason["message"]), expected=reason.get("expected"), got=reason.get("got")
    )


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


def pinned_manifest(configuration: Path, model: Path, progress: Callable[[int, int], None]) -> ModelManifest:
    """The model's manifest, when it is the one that the configuration pins. The enclave checks it again, on what it
    receives.
    """
    launch = LaunchConfiguration.load(configuration)
    encrypted = launch.kms is not None and launch.kms.encrypted_model
    manifest = manifest_beside(model) if encrypted else ModelManifest.from_gguf(model, progress=progress)
    got = digest_text(manifest.digest())
    if got != launch.manifest:
        raise LaunchConfigurationError(
            "model.manifest", f"{model.name} is another model", expected=launch.manifest, got=got
        )
    return manifest


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


# --- ps, logs, stop -----------------------------------------------------------------------------------------------


@click.command()
@click.option("--json", "as_json", is_flag=True, help="Print one JSON array.")
def ps(as_json: bool) -> None:
    """List the enclaves that were started here.

    \b
    Example:
      strongroom ps
      strongroom ps --json
    """
    states = [state for instance in Registry.of_user().all() if (state := instance.read_state()) is not None]
    if as_json:
        click.echo(json.dumps([asdict(state) for state in states]))
        return
    if not states:
        click.echo("no enclaves")
        return
    rows = [("name", "phase", "since", "boots", "network", "address")]
    for state in states:
        since = str(timedelta(seconds=int(time.time() - state.started_at)))
        rows.append((state.name, state.phase, since, str(state.restarts + 1), state.network, state.address))
    sizes = [max(map(len, column)) for column in zip(*rows, strict=True)]
    reasons = [None, *(state.error for state in states)]
    for row, reason in zip(rows, reasons, strict=True):
        click.echo("  ".join(cell.ljust(size) for cell, size in zip(row, sizes, strict=True)).rstrip())
        if reason is not None:
            click.echo(f"  {launch_error(reason)}")


@click.command()
@click.argument("name", default="enclave")
@click.option("-f", "--follow", is_flag=True, help="Wait for more until Ctrl-C or the enclave's end.")
def logs(name: str, follow: bool) -> None:
    """Print an enclave's events, one JSON object a line.

    The events come from a closed catalogue and hold nothing of any prompt or answer.

    \b
    Example:
      strongroom logs demo
      strongroom logs demo --follow
    """
    instance = Registry.of_user().find(name)
    if not instance.events.exists() and not follow:
        return
    instance.events.touch()
    with instance.events.open() as file:
        while True:
            for line in file:
                click.echo(line, nl=False)
            if not follow or not instance.supervised():
                return
            time.sleep(POLL_SECONDS)


@click.command()
@click.argument("name", default="enclave")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def stop(name: str, as_json: bool) -> None:
    """Stop an enclave and remove its folder. Its keys die with it.

    \b
    Example:
      strongroom stop demo
    """
    instance = Registry.of_user().find(name)
    state = instance.read_state()
    if state is not None and instance.supervised():
        os.kill(state.pid, signal.SIGTERM)
        deadline = time.monotonic() + STOP_SECONDS
        while instance.supervised():
            if time.monotonic() > deadline:
                raise RegistryError(
                    "does_not_stop", f"{name} does not stop; its supervisor is process {state.pid}", got=name
                )
            time.sleep(POLL_SECONDS)
    instance.remove()
    click.echo(json.dumps({"stopped": name}) if as_json else f"stopped {name}")


# --- proxy --------------------------------------------------------------------------------------------------------


@click.command()
@click.option(
    "--enclave",
    default="enclave",
    show_default=True,
    metavar="ADDRESS",
    help="vsock:CID:PORT, unix:PATH, tcp:HOST:PORT or a name of `strongroom ps`.",
)
@click.option(
    "--listen",
    default="127.0.0.1:8080",
    show_default=True,
    metavar="HOST:PORT",
    help="Where clients connect; port 0 takes a free one.",
)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON line when ready.")
def proxy(enclave: str, listen: str, as_json: bool) -> None:
    """Carry HTTP to an enclave: ciphertext, and nothing that it could read.

    It may start before its enclave does: until then /healthz and every request say that it is unavailable.

    \b
    Example:
      strongroom proxy --enclave demo --listen 127.0.0.1:8080
      curl http://127.0.0.1:8080/healthz
    """
    address = parse_listen(listen)
    application = Proxy(enclave_address(enclave)).application()
    listener = listen_on(address)
    host, port = listener.getsockname()[:2]

    def ready() -> None:
        click.echo(json.dumps({"listening": f"{host}:{port}"}) if as_json else f"proxy: http://{host}:{port}")
        sys.stdout.flush()

    asyncio.run(serve_http(application, listener, ready=ready))


def enclave_address(text: str) -> Address:
    """An address, or the name of an enclave that was started here."""
    if ":" in text:
        try:
            return parse_address(text)
        except AddressError as error:
            raise click.BadParameter(str(error), param_hint="--enclave") from error
    instance = Registry.of_user().find(text)
    return UnixAddress(str(instance.directory / LaunchConfiguration.load(instance.configuration).listen.path))
