"""The developer's command: emulate."""

from __future__ import annotations

import contextlib
import json
import re
import shlex
import shutil
import signal
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Final

import click

from attestation.anchors import AWS_NITRO_G1
from attestation.chain import Anchor
from attestation.errors import StrongroomError
from emulator.kms import DEFAULT_ACCOUNT, DEFAULT_REGION, SoftwareKms
from emulator.kms_endpoint import KmsEmulator
from emulator.kms_faults import Delay
from emulator.pki import default_directory, ensure_development_root, publish_private
from emulator.sigv4 import Principal
from emulator.tls import TLS_CERTIFICATE_FILE, ensure_tls_authority
from vsockrpc.address import TcpAddress, parse_address
from vsockrpc.errors import AddressError

ROLES: Final = ("enclave", "sealer", "administrator")
ROLE_LIFETIME: Final = timedelta(hours=12)
"""The longest that a role's credentials last at AWS."""

CREDENTIALS, CONFIG, ENVIRONMENT = "credentials", "config", "environment"
"""The files in a directory of credentials. The last one is written last: with it all are there."""

_NAME = re.compile(r"[A-Za-z0-9_-]{1,64}")
_ACCOUNT = re.compile(r"[0-9]{12}")
_REGION = re.compile(r"(?!cn-|us-gov-)[a-z]{2}(-[a-z]{1,16}){1,2}-[0-9]{1,2}")
_HOST = re.compile(r"[A-Za-z0-9.:-]{1,253}")


class EmulateError(StrongroomError):
    """The emulator cannot start: ``cannot_listen``, or ``file_exists`` where its credentials would go."""

    @property
    def exit_code(self) -> int:  # type: ignore[override]
        return 2 if self.code == "file_exists" else 4


@click.group()
def emulate() -> None:
    """Stand-ins for AWS on this machine, with real cryptography. They prove nothing about hardware.

    \b
    Example:
      strongroom emulate kms
    """


@emulate.command()
@click.option(
    "--listen",
    default="127.0.0.1:0",
    show_default=True,
    metavar="HOST:PORT",
    help="Where clients connect; port 0 takes a free one.",
)
@click.option(
    "--anchor",
    type=click.Choice(["emulated", "aws"]),
    default="emulated",
    show_default=True,
    help="Whose attestation documents it believes: this user's emulated enclaves' or AWS's.",
)
@click.option("--region", default=DEFAULT_REGION, show_default=True, help="Of its keys.")
@click.option("--account", default=DEFAULT_ACCOUNT, show_default=True, help="Whose keys they are, 12 digits.")
@click.option(
    "--role",
    "roles",
    multiple=True,
    default=ROLES,
    show_default=True,
    metavar="NAME",
    help="A role of the account: its name is a profile with 12 hours' credentials. May be given several times.",
)
@click.option("--key", "keys", multiple=True, metavar="NAME", help="Make a key at the start, as alias/NAME.")
@click.option("--name", "names", multiple=True, metavar="HOST", help="One more name for the TLS certificate.")
@click.option("--latency-ms", type=click.IntRange(0, 60_000), default=0, help="Let every answer wait so long.")
@click.option(
    "--directory",
    type=click.Path(path_type=Path, file_okay=False),
    help="Where the credentials are written; nothing there is replaced.  [default: a new folder, removed at the end]",
)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object when it serves.")
def kms(
    listen: str,
    anchor: str,
    region: str,
    account: str,
    roles: Sequence[str],
    keys: Sequence[str],
    names: Sequence[str],
    latency_ms: int,
    directory: Path | None,
    as_json: bool,
) -> None:
    """A KMS that any AWS SDK talks to over HTTPS, until Ctrl-C. Its keys end with it.

    It checks signatures, evaluates key policies and grants, and verifies the attestation document in `Recipient` before
    it answers an enclave. There are no IAM policies: what a key policy leaves to them, the account's root user alone
    may.

    \b
    Credentials are files that only this user may read: `default` is the account's root user, and each role a profile.
    What to export is printed, and stands in the file `environment` beside them, which a shell can read. They are
    removed at the end. Meanwhile:
      aws kms create-key --profile administrator --policy file://key-policy.json
      python -c 'import boto3; print(boto3.client("kms").list_keys()["Keys"])'

    \b
    Example:
      strongroom emulate kms
      strongroom emulate kms --listen 127.0.0.1:8443 --key model --json
      strongroom emulate kms --directory aws --role enclave --role sealer --role administrator

    Exit codes: 0 stopped by a signal, 2 an option that cannot be meant or files that are there, 4 it cannot listen.
    """
    address = _address(listen)
    for option, pattern, values in (
        ("--account", _ACCOUNT, (account,)),
        ("--region", _REGION, (region,)),
        ("--role", _NAME, roles),
        ("--key", _NAME, keys),
        ("--name", _HOST, names),
    ):
        if len(set(values)) < len(values) or (option == "--role" and "default" in values):
            raise click.BadParameter("a name that is taken", param_hint=option)
        for value in values:
            if pattern.fullmatch(value) is None:
                raise click.BadParameter(f"{value!a} does not match {pattern.pattern}", param_hint=option)
    documents = AWS_NITRO_G1 if anchor == "aws" else Anchor.emulated(ensure_development_root().certificate_der)
    service = SoftwareKms(anchor=documents, region=region, account=account)
    authority, root_file = ensure_tls_authority(), default_directory() / TLS_CERTIFICATE_FILE
    with contextlib.ExitStack() as stack:
        ended = stack.enter_context(_signals())
        folder = _folder(directory, stack)
        try:
            emulator = KmsEmulator(service, authority, root_file, listen=(address.host, address.port), names=names)
        except (OSError, UnicodeError) as error:  # UnicodeError: a host that no name server could be asked for
            reason = error.strerror if isinstance(error, OSError) else "no host name"
            shown = str(address).removeprefix("tcp:")
            raise EmulateError("cannot_listen", f"cannot listen on {shown}: {reason}", got=shown) from error
        stack.callback(emulator.close)
        if latency_ms:
            emulator.faults.inject(Delay(latency_ms / 1000))
        principals = {"default": emulator.principal("root")}
        for role in roles:
            session = f"assumed-role/{role}/strongroom"
            principals[role] = emulator.principal(session, lifetime=ROLE_LIFETIME)
        made = {name: service.create_key(alias=f"alias/{name}") for name in keys}
        for name in (CREDENTIALS, CONFIG, ENVIRONMENT):
            stack.callback((folder / name).unlink, missing_ok=True)
        environment = _write_credentials(folder, emulator, principals)
        _show(emulator, documents, principals, made, environment, as_json)
        signal.sigwait(ended)


def _address(text: str) -> TcpAddress:
    try:
        address = parse_address(f"tcp:{text}")
    except AddressError as error:
        raise click.BadParameter(f"{error.message}: expected HOST:PORT", param_hint="--listen") from error
    assert isinstance(address, TcpAddress)
    return address


def _folder(directory: Path | None, stack: contextlib.ExitStack) -> Path:
    """Where the credentials go: nobody else can enter a folder of our own, nor read a file in another.

    Raises EmulateError ``file_exists`` for one that has credentials: of an emulator that runs, or a person's own.
    """
    if directory is not None:
        for name in (CREDENTIALS, CONFIG, ENVIRONMENT):
            if (path := directory / name).exists():
                raise EmulateError(
                    "file_exists",
                    f"{path} exists already, nothing was changed: take another directory, or remove it if no emulator"
                    " runs that wrote it",
                    got=name,
                )
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        return directory.resolve()
    folder = Path(tempfile.mkdtemp(prefix="strongroom-kms-"))
    stack.callback(shutil.rmtree, folder)
    return folder


def _write_credentials(folder: Path, emulator: KmsEmulator, principals: Mapping[str, Principal]) -> dict[str, str]:
    """Writes what the SDKs call the shared credentials and configuration files, 0600; the environment that names
    them.
    """
    credentials, config = [], []
    for name, principal in principals.items():
        settings = emulator.client_settings(principal)
        credentials += [f"[{name}]", f"aws_access_key_id = {settings['aws_access_key_id']}"]
        credentials += [f"aws_secret_access_key = {settings['aws_secret_access_key']}"]
        if settings["aws_session_token"] is not None:
            credentials += [f"aws_session_token = {settings['aws_session_token']}"]
        config += [f"[{'default' if name == 'default' else f'profile {name}'}]", f"region = {emulator.kms.region}"]
    files = {"AWS_SHARED_CREDENTIALS_FILE": credentials, "AWS_CONFIG_FILE": config}
    environment = {"AWS_ENDPOINT_URL_KMS": emulator.endpoint, "AWS_CA_BUNDLE": str(emulator.root_file)}
    for variable, lines in files.items():
        path = folder / (CREDENTIALS if lines is credentials else CONFIG)
        publish_private(path, "\n".join([*lines, ""]).encode("ascii"), replace=True)
        environment[variable] = str(path)
    exports = "".join(f"{line}\n" for line in _exports(environment))
    publish_private(folder / ENVIRONMENT, exports.encode("utf-8"), replace=True)
    return environment


def _exports(environment: Mapping[str, str]) -> Iterator[str]:
    """What a shell is told."""
    for variable, value in environment.items():
        yield f"export {variable}={shlex.quote(value)}"


@contextlib.contextmanager
def _signals() -> Iterator[set[signal.Signals]]:
    """Those that end the command. While this lasts they wait to be asked for, and so interrupt nothing: neither here
    nor in the threads that are started meanwhile.
    """
    ending = {signal.SIGINT, signal.SIGTERM}
    before = signal.pthread_sigmask(signal.SIG_BLOCK, ending)
    try:
        yield ending
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _show(
    emulator: KmsEmulator,
    anchor: Anchor,
    principals: Mapping[str, Principal],
    keys: Mapping[str, str],
    environment: Mapping[str, str],
    as_json: bool,
) -> None:
    arns = {name: principal.arn for name, principal in principals.items()}
    if as_json:
        said = {
            "endpoint": emulator.endpoint,
            "root": str(emulator.root_file),
            "region": emulator.kms.region,
            "account": emulator.kms.account,
            "anchor": {"trust": anchor.trust.value, "sha256": anchor.fingerprint},
            "profiles": arns,
            "keys": keys,
            "environment": environment,
        }
        click.echo(json.dumps(said))
    else:
        click.echo(f"KMS: {emulator.endpoint}, region {emulator.kms.region}, account {emulator.kms.account}")
        click.echo(f"documents are believed under {anchor.trust.value}, sha256 {anchor.fingerprint}")
        for name, arn in arns.items():
            click.echo(f"profile {name}: {arn}")
        for name, arn in keys.items():
            click.echo(f"alias/{name}: {arn}")
        click.echo("To use it, until Ctrl-C here:")
        for line in _exports(environment):
            click.echo(f"  {line}")
    sys.stdout.flush()
