"""``strongroom image build`` and ``strongroom image reproduce``."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TypeVar

import click
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

from attestation.eif import Architecture
from attestation.release_signing import Signer
from parent.image.blobs import AWS, OWN, BlobChoice
from parent.image.build import (
    MAX_EPOCH,
    BuiltImage,
    ContainerArchive,
    ImagePlan,
    OciLayout,
    RootFolder,
    SourceChoice,
    build_image,
)
from parent.image.dockerfile import ENGINES, ContainerBuild
from parent.image.reproduce import Reproduction, reproduce_image
from parent.image.signature import ImageSigner

F = TypeVar("F", bound=Callable[..., Any])
FILE = click.Path(path_type=Path, exists=True, dir_okay=False)
FOLDER = click.Path(path_type=Path, exists=True, file_okay=False)
MAX_PEM = 65_536
"""Bytes of a key's or certificate's file."""

_KMS_KEY = re.compile(r"arn:aws[a-z-]*:kms:")
_NAME_AND_VALUE = re.compile(r"[^=\0\n]+=[^\0\n]*")
_DOCKERFILE_ALONE = ("context", "build_args", "secrets", "target", "engine")


def source_options(command: F) -> F:
    """All that decides about an image's bytes: :func:`take_plan` takes them."""
    for option in reversed(
        (
            click.option("--rootfs", type=FOLDER, help="A root file system in a folder; all its files become root's."),
            click.option("--oci", type=FOLDER, help="A folder with an OCI image layout."),
            click.option("--archive", type=FILE, help="A file of `docker save`, or an OCI layout in an archive."),
            click.option("--dockerfile", type=FILE, help="Built by buildah or docker, whichever is there."),
            click.option("--tag", metavar="NAME", help="With --oci and --archive: which container, of several."),
            click.option("--context", type=FOLDER, help="With --dockerfile.  [default: the Dockerfile's folder]"),
            click.option(
                "--build-arg", "build_args", metavar="NAME=VALUE", multiple=True, help="With --dockerfile; repeatable."
            ),
            click.option(
                "--secret",
                "secrets",
                metavar="id=NAME,src=FILE",
                multiple=True,
                help="With --dockerfile: for steps that mount it; repeatable.",
            ),
            click.option("--target", metavar="STAGE", help="With --dockerfile: the stage to build."),
            click.option("--engine", type=click.Choice(ENGINES), help="With --dockerfile.  [default: what is there]"),
            click.option(
                "--config",
                "configuration",
                type=FILE,
                help="The measured configuration: goes to /etc/strongroom/enclave.toml, in the place of what is there.",
            ),
            click.option(
                "--cmd", metavar="TEXT", help="What to run, as words of a shell.  [default: as the container says]"
            ),
            click.option("--env", metavar="NAME=VALUE", multiple=True, help="A variable more, or instead; repeatable."),
            click.option("--name", default="enclave", show_default=True, help="In the image's metadata."),
            click.option("--version", default="1", show_default=True, help="In the image's metadata."),
            click.option(
                "--architecture",
                type=click.Choice([each.value for each in Architecture]),
                default=Architecture.X86_64.value,
                show_default=True,
            ),
            click.option(
                "--blobs",
                metavar="aws|own|DIR",
                help="Kernel, init, cmdline and nsm.ko: as nitro-cli has installed them, as scripts/machine has built "
                "them, or those of a folder. Of own ones, the newest where the cache has those of one recipe alone; "
                "in a checkout, an init of its own sources.  [default: aws where they are, else own]",
            ),
            click.option("--kernel", type=FILE, help="In the place of the one in --blobs."),
            click.option("--init", type=FILE, help="In the place of the one in --blobs."),
            click.option("--cmdline", metavar="TEXT", help="The kernel's, in the place of the one in --blobs."),
            click.option("--nsm-module", type=FILE, help="In the place of the one in --blobs."),
            click.option(
                "--cmdline-copy/--no-cmdline-copy",
                default=None,
                help="Whether the first ramdisk has the command line for the init to compare.  "
                "[default: unless the init is AWS's]",
            ),
            click.option(
                "--source-date-epoch",
                "epoch",
                type=click.IntRange(0, MAX_EPOCH),
                default=0,
                show_default=True,
                envvar="SOURCE_DATE_EPOCH",
                show_envvar=True,
                help="Seconds since 1970: the build time in the metadata, and of a container built here.",
            ),
        )
    ):
        command = option(command)
    return command


def take_plan(options: dict[str, Any]) -> ImagePlan:
    """Takes the options of :func:`source_options` out of ``options``. Raises click.UsageError."""
    taken = {name: options.pop(name) for name in ("rootfs", "oci", "archive", "dockerfile", "tag", *_DOCKERFILE_ALONE)}
    env = options.pop("env")
    for each in env:
        if not _NAME_AND_VALUE.fullmatch(each):
            raise click.UsageError(f"--env {each!a}: expected NAME=VALUE, in one line")
    cmd = options.pop("cmd")
    try:
        words = None if cmd is None else tuple(shlex.split(cmd))
    except ValueError as error:
        raise click.UsageError(f"--cmd: {error}") from error
    folder = options.pop("blobs")
    if folder is not None and folder not in (AWS, OWN) and not Path(folder).is_dir():
        raise click.UsageError(f"--blobs {folder!a}: expected aws, own or a folder that is there")
    blobs = BlobChoice(
        folder=folder,
        **{name: options.pop(name) for name in ("kernel", "init", "cmdline", "nsm_module", "cmdline_copy")},
    )
    return ImagePlan(
        source=_source(taken),
        blobs=blobs,
        architecture=Architecture(options.pop("architecture")),
        cmd=words,
        env=env,
        **{name: options.pop(name) for name in ("name", "version", "configuration", "epoch")},
    )


def _source(taken: dict[str, Any]) -> SourceChoice:
    rootfs, oci, archive, dockerfile = (taken[name] for name in ("rootfs", "oci", "archive", "dockerfile"))
    if sum(each is not None for each in (rootfs, oci, archive, dockerfile)) != 1:
        raise click.UsageError("name one source: --rootfs, --oci, --archive or --dockerfile")
    if dockerfile is None and any(taken[name] for name in _DOCKERFILE_ALONE):
        raise click.UsageError("--context, --build-arg, --secret, --target and --engine go with --dockerfile")
    if taken["tag"] is not None and oci is None and archive is None:
        raise click.UsageError("--tag goes with --oci or --archive")
    if rootfs is not None:
        return RootFolder(rootfs)
    if oci is not None:
        return OciLayout(oci, taken["tag"])
    if archive is not None:
        return ContainerArchive(archive, taken["tag"])
    return ContainerBuild(
        dockerfile=dockerfile,
        context=taken["context"] or dockerfile.parent,
        build_args=taken["build_args"],
        secrets=taken["secrets"],
        target=taken["target"],
        engine=taken["engine"],
    )


# --- build ---------------------------------------------------------------------------------------------------------


@click.command(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@source_options
@click.option("--out", type=click.Path(path_type=Path, dir_okay=False), default="enclave.eif", show_default=True)
@click.option(
    "--sign", metavar="KEY|ARN", help="A private key on P-384 in PEM, or a KMS key's ARN. The certificate gives PCR8."
)
@click.option("--certificate", type=FILE, help="With --sign, in PEM.  [default: in the key's file]")
@click.option("--json", "as_json", is_flag=True, help="Print the measurements as nitro-cli build-enclave does.")
@click.pass_obj
def build(
    signers: Callable[[str], Signer],
    /,
    out: Path,
    sign: str | None,
    certificate: Path | None,
    as_json: bool,
    **options: Any,
) -> None:
    """Build an enclave image (EIF) and say what a Nitro enclave started from it will have in its registers.

    The source is one of --dockerfile, --oci, --archive and --rootfs.

    \b
    Examples:
      strongroom image build --dockerfile Dockerfile.enclave --config enclave.toml --out enclave.eif
      strongroom image build --oci layout --config enclave.toml --out enclave.eif
      docker save app:1 | gzip > app.tgz; strongroom image build --archive app.tgz --out app.eif
      strongroom image build --rootfs root --cmd '/usr/bin/python3 -I -B -m enclave' --out enclave.eif
      strongroom image build --oci layout --sign key.pem --certificate certificate.pem --out signed.eif

    The same inputs give the same bytes: times are those of SOURCE_DATE_EPOCH, owners those of the container, files are
    in one order, and Python's bytecode caches are left out. What went in is written, with its digests, to a file beside
    the image, OUT.provenance.json (in-toto, SLSA v1). Unpacking needs room in TMPDIR.

    Exit codes: 0 built, 2 the source, or something beside it, makes no image, 4 something failed.
    """
    plan = take_plan(options)
    signer = _signer(sign, certificate, signers)
    with BuildProgress(quiet=as_json) as progress:
        built = build_image(plan, out, signer=signer, progress=progress)
    if as_json:
        click.echo(json.dumps(built.image.as_nitro_cli()))
    else:
        _show(built)


def _signer(sign: str | None, certificate: Path | None, signers: Callable[[str], Signer]) -> ImageSigner | None:
    if sign is None:
        if certificate is not None:
            raise click.UsageError("--certificate goes with --sign")
        return None
    pem = None if certificate is None else _read_pem(certificate)
    if _KMS_KEY.match(sign):
        if pem is None:
            raise click.UsageError("a KMS key signs with --certificate FILE: KMS keeps keys, and no certificates")
        return ImageSigner.from_signer(signers(sign), pem)
    return ImageSigner.from_pem(_read_pem(Path(sign)), pem)


def _read_pem(path: Path) -> bytes:
    with path.open("rb") as file:
        return file.read(MAX_PEM)


def _show(built: BuiltImage) -> None:
    rows = [
        ("image", f"{built.path}  {built.size / 1e6:.1f} MB"),
        ("record", str(built.record)),
        ("root", built.root),
        ("runs", shlex.join(built.command)),
        ("boots", f"Linux {built.blobs.kernel_version}, {built.blobs.origin}"),
        ("kernel", f"{built.blobs.kernel.path}  sha256 {built.blobs.kernel.sha256}"),
        ("init", f"{built.blobs.init.path}  sha256 {built.blobs.init.sha256}"),
    ]
    rows += [(f"PCR{index}", value.hex()) for index, value in built.image.measurements.as_registers().items()]
    rows += [("note", note) for note in built.notes]
    for name, text in rows:
        click.echo(f"{name:<8}{_printable(text)}")


# --- reproduce -----------------------------------------------------------------------------------------------------


@click.command(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@source_options
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def reproduce(as_json: bool, **options: Any) -> int:
    """Build an image twice, under conditions that must not matter, and compare to the last byte.

    The second build runs on copies in another folder, with other times, owners and order of the files, as another user
    (as root), with another time zone, language, umask and home. A container is built twice from nothing. On a
    difference it says which files, and exits with 1. Nothing is kept; signing is left out.

    \b
    Examples:
      strongroom image reproduce --oci layout --config enclave.toml
      strongroom image reproduce --dockerfile Dockerfile.enclave --config enclave.toml

    Exit codes: 0 the same, 1 not the same, 2 the source makes no image, 4 something failed.
    """
    plan = take_plan(options)
    with BuildProgress(quiet=as_json) as progress:
        found = reproduce_image(plan, progress=progress)
    if as_json:
        click.echo(json.dumps(_as_json(found)))
    else:
        _show_reproduction(found)
    return 0 if found.is_exact else 1


def _as_json(found: Reproduction) -> dict[str, Any]:
    images = [{"sha384": (image.sha384 or b"").hex(), **image.as_nitro_cli()} for image in (found.first, found.second)]
    return {
        "reproduced": found.is_exact,
        "images": images,
        "records_equal": found.records_equal,
        "varied": list(found.varied),
        "differences": list(found.lines()),
    }


def _show_reproduction(found: Reproduction) -> None:
    click.echo(f"not the same for both: {', '.join(found.varied)}")
    if "user" not in found.varied:
        click.echo("the same for both: user (another one needs root, no Dockerfile, and folders that it may enter)")
    if found.is_exact:
        click.echo(f"reproduced: both images have sha384 {(found.first.sha384 or b'').hex()}")
        for index, value in found.first.measurements.as_registers().items():
            click.echo(f"PCR{index}    {value.hex()}")
    else:
        click.echo("NOT reproduced, first / second:")
        for line in found.lines():
            click.echo(f"  {_printable(line)}")
    if not found.records_equal:
        click.echo("the build records differ")


def _printable(text: str) -> str:
    """What stands in a container or an image may hold what moves a terminal's cursor."""
    return text if text.isprintable() else ascii(text)[1:-1]


# --- progress ------------------------------------------------------------------------------------------------------


class BuildProgress:
    """A bar where there is a terminal, else a line for each step. Silent when ``quiet``."""

    def __init__(self, *, quiet: bool) -> None:
        self._console = Console(stderr=True, highlight=False, markup=False, emoji=False)
        self._quiet = quiet
        columns = (TextColumn("  {task.description}"), BarColumn(), TextColumn("{task.percentage:>3.0f}%"))
        disable = quiet or not self._console.is_terminal
        self._bar = Progress(*columns, TimeElapsedColumn(), console=self._console, transient=True, disable=disable)
        self._shown: tuple[str, TaskID] | None = None

    def __enter__(self) -> Self:
        self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._bar.stop()

    def __call__(self, what: str, done: int, total: int) -> None:
        if self._shown is None or self._shown[0] != what:
            if self._shown is not None:
                self._bar.remove_task(self._shown[1])
            self._shown = what, self._bar.add_task(what, total=total or None)
            if not self._quiet and not self._console.is_terminal:
                self._console.print(f"  {what}")
        self._bar.update(self._shown[1], completed=done, total=total or None)
