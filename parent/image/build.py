"""From a source of files to an image and its build record.

The image has AWS's sections and its two ramdisks, with the same files in them that nitro-cli would put there, and is
measured as any image is. Its bytes are our own: nitro-cli has linuxkit pack the ramdisks, in linuxkit's order and with
linuxkit's times, so that its images of the same files have other registers. Neither is wrong; a release has the
registers of the image that is started.
"""

from __future__ import annotations

import hashlib
import re
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import BinaryIO, Final, TypeAlias

from attestation.eif import Architecture
from attestation.measure import EnclaveImage, measure_image
from attestation.strict_json import Json
from parent.image.archive import read_archive
from parent.image.blobs import BlobChoice, Blobs, find_blobs
from parent.image.container import Wanted
from parent.image.dockerfile import ContainerBuild, build_container
from parent.image.eif_writer import ImageMetadata, replacing, write_image
from parent.image.folder import read_folder
from parent.image.oci import read_layout
from parent.image.provenance import SUFFIX, BuildRecord
from parent.image.ramdisks import boot_ramdisk, customer_ramdisk
from parent.image.signature import ImageSigner
from parent.image.source import Material, Progress, Source, tree_digest
from parent.image.spool import Spool
from parent.image.tree import Directory, File, ImageBuildError, Tree

CONFIGURATION: Final = "etc/strongroom/enclave.toml"
"""Where the measured configuration is in the root."""
MAX_CONFIGURATION: Final = 1 << 20
"""Bytes."""
MAX_EPOCH: Final = 253_402_300_799
"""The last second of the year 9999, which is as far as a build time can be written."""


@dataclass(frozen=True, slots=True)
class RootFolder:
    """A root file system in a folder."""

    path: Path


@dataclass(frozen=True, slots=True)
class OciLayout:
    """A folder with an OCI image layout."""

    path: Path
    tag: str | None = None


@dataclass(frozen=True, slots=True)
class ContainerArchive:
    """A file of ``docker save``, or an OCI layout in an archive."""

    path: Path
    tag: str | None = None


SourceChoice: TypeAlias = RootFolder | OciLayout | ContainerArchive | ContainerBuild
_LOCAL_PATH: Final = re.compile(r"\A([^=]+=(?:(?:oci|oci-archive|docker-archive|dir):)?)/(?:[^/]*/)*([^/]*)\Z")
"""A build argument that names a file on this machine, as base images are: the record has the file's own name alone."""
_MOVABLE: Final = (
    "the init gets no copy of the command line to compare: these registers fit any boundary between kernel and command "
    "line, and who starts the image may cut off the beginning of the line; an init of ours compares"
)
_KINDS: Final = {RootFolder: "rootfs", OciLayout: "oci", ContainerArchive: "archive", ContainerBuild: "dockerfile"}


@dataclass(frozen=True, slots=True, kw_only=True)
class ImagePlan:
    """All that decides about an image's bytes, but its signature."""

    source: SourceChoice
    blobs: BlobChoice = field(default_factory=BlobChoice)
    architecture: Architecture = Architecture.X86_64
    name: str = "enclave"
    version: str = "1"
    configuration: Path | None = None
    """Goes to ``CONFIGURATION``, in the place of what is there."""
    cmd: tuple[str, ...] | None = None
    """None: what the container's configuration says."""
    env: tuple[str, ...] = ()
    """``NAME=value``: added to the container's, or in the place of one of them."""
    epoch: int = 0
    """Seconds since 1970: the build time that the image's metadata state, which nothing measures, and what is in the
    container's files where a Dockerfile is built. (SOURCE_DATE_EPOCH, reproducible-builds.org.)"""


@dataclass(frozen=True, slots=True)
class BuiltImage:
    """An image that was written, and read again."""

    image: EnclaveImage
    path: Path
    size: int
    """Bytes."""
    record: Path
    """The build record."""
    root: str
    """``sha256:HEX`` of the source."""
    blobs: Blobs
    command: tuple[str, ...]
    notes: tuple[str, ...]
    """What was left out or has no effect."""


def build_image(plan: ImagePlan, out: Path, *, signer: ImageSigner | None = None, progress: Progress) -> BuiltImage:
    """Writes the image to ``out``, and its build record beside it; both, or none of them.

    Raises ImageBuildError, ImageError when what was written cannot be read again, what the signer raises, and OSError
    where nothing can be written.
    """
    if not 0 <= plan.epoch <= MAX_EPOCH:
        raise ImageBuildError("bad_epoch", "not a build time", expected=f"0 to {MAX_EPOCH} seconds", got=plan.epoch)
    blobs = find_blobs(plan.blobs, plan.architecture)
    with tempfile.TemporaryDirectory(prefix="strongroom-image-", ignore_cleanup_errors=True) as folder:
        source = read_source(plan, Spool(Path(folder), progress))
        configuration = None if plan.configuration is None else _read_configuration(plan.configuration)
        root = _configured(source.tree, configuration)
        command, env = _command(source, plan), _environment(source.env, plan.env)
        progress("hashing the root file system", 0, 0)
        material = Material("root file system", {"sha256": tree_digest(root)}, {"kind": "canonical listing"})
        ramdisks = (
            boot_ramdisk(
                init=blobs.init.data,
                cmdline=blobs.cmdline if blobs.cmdline_copy else None,
                nsm=None if blobs.nsm_module is None else blobs.nsm_module.data,
            ),
            customer_ramdisk(root, cmd=command, env=env),
        )
        described = ImageMetadata(
            name=plan.name,
            version=plan.version,
            built_at=plan.epoch,
            tool_version=tool_version(),
            kernel_version=blobs.kernel_version,
            docker_info=dict(source.docker_info),
        )
        with replacing(out.with_name(out.name + SUFFIX)) as record, replacing(out) as file:
            write_image(
                file,
                kernel=blobs.kernel.data,
                cmdline=blobs.cmdline,
                ramdisks=ramdisks,
                metadata=described,
                architecture=plan.architecture,
                signer=signer,
                progress=lambda done, total: progress("writing the image", done, total),
            )
            file.flush()
            image, digests = _read_again(file, progress)
            statement = BuildRecord(
                name=out.name,
                digests=digests,
                measurements=image.measurements,
                parameters=_parameters(plan, command, env),
                materials=_materials(source, blobs, configuration, signer),
                root=material,
                tool_version=tool_version(),
            )
            record.write(statement.encode())
            size = file.seek(0, 2)
    record_path = out.with_name(out.name + SUFFIX)
    notes = (*source.notes, *_without_effect(source), *(() if blobs.cmdline_copy else (_MOVABLE,)))
    return BuiltImage(image, out, size, record_path, source.digest, blobs, command, notes)


def read_source(plan: ImagePlan, spool: Spool) -> Source:
    """The root file system of ``plan``'s source, whose files may lie in the spool. Raises ImageBuildError."""
    match plan.source:
        case RootFolder(path):
            return read_folder(path)
        case OciLayout(path, tag):
            return read_layout(path, Wanted(plan.architecture, tag), spool)
        case ContainerArchive(path, tag):
            return read_archive(path, Wanted(plan.architecture, tag), spool)
        case ContainerBuild():
            return build_container(plan.source, Wanted(plan.architecture), spool, epoch=plan.epoch)


@cache
def tool_version() -> str:
    """Of this package. Read once: the second build of ``image reproduce`` may soon have no right to read it."""
    return metadata.version("strongroom")


def _read_configuration(path: Path) -> bytes:
    """Whole. What is in it, the enclave judges; a launcher says before that what it cannot start."""
    with path.open("rb") as file:
        data = file.read(MAX_CONFIGURATION + 1)
    if len(data) > MAX_CONFIGURATION:
        expected = f"at most {MAX_CONFIGURATION} bytes"
        raise ImageBuildError("bad_configuration", f"{path.name!a} is too large", expected=expected, got="more")
    return data


def _configured(tree: Tree, configuration: bytes | None) -> Tree:
    if configuration is None:
        return tree
    if isinstance(tree.get(CONFIGURATION), Directory):
        raise ImageBuildError("bad_configuration", f"/{CONFIGURATION} is a directory in the source", expected="a file")
    kept = (entry for path, entry in tree.items() if path != CONFIGURATION)
    return Tree.of([*kept, File.holding(CONFIGURATION, configuration)])


def _command(source: Source, plan: ImagePlan) -> tuple[str, ...]:
    command = source.command if plan.cmd is None else plan.cmd
    if not command:
        raise ImageBuildError("bad_command", "nothing says what to run in the image", expected="--cmd 'PROGRAM ...'")
    return command


def _environment(inherited: Sequence[str], added: Sequence[str]) -> tuple[str, ...]:
    """The container's variables with those that the caller adds: in their order, a new one behind."""
    merged = {each.partition("=")[0]: each for each in inherited}
    if len(merged) != len(inherited):
        raise ImageBuildError("bad_environment", "the container's configuration has a variable twice", expected="one")
    for each in added:
        merged[each.partition("=")[0]] = each
    return tuple(merged.values())


def _without_effect(source: Source) -> Sequence[str]:
    """What a container engine would obey and an enclave's init does not."""
    notes = []
    if source.user not in ("", "0", "root", "0:0", "root:root"):
        notes.append(f"USER {source.user!a} has no effect: an enclave's init runs the command as root")
    if source.working_dir not in ("", "/"):
        notes.append(f"WORKDIR {source.working_dir!a} has no effect: an enclave's init runs the command in /")
    return notes


def _read_again(file: BinaryIO, progress: Progress) -> tuple[EnclaveImage, Mapping[str, str]]:
    """The image as everybody else will read it, and its file's digests: of this file, whatever its name leads to."""
    file.seek(0)
    image = measure_image(
        file, progress=lambda done, total: progress("reading it again", done, total), digest_file=True
    )
    assert image.sha384 is not None
    file.seek(0)
    sha256 = hashlib.file_digest(file, "sha256").hexdigest()  # type: ignore[arg-type]  # wants what every file has
    return image, {"sha256": sha256, "sha384": image.sha384.hex()}


def _parameters(plan: ImagePlan, command: Sequence[str], env: Sequence[str]) -> Mapping[str, Json]:
    """What was chosen. Files are named without their folders: where they were changes nothing."""
    source: dict[str, Json] = {"kind": _KINDS[type(plan.source)]}
    match plan.source:
        case OciLayout(tag=str(tag)) | ContainerArchive(tag=str(tag)):
            source["tag"] = tag
        case ContainerBuild(dockerfile=dockerfile, build_args=arguments, target=target):
            named = [_LOCAL_PATH.sub(r"\1\2", each) for each in arguments]
            source |= {"dockerfile": dockerfile.name, "buildArgs": list[Json](named), "target": target}
    return {
        "source": source,
        "architecture": plan.architecture.value,
        "name": plan.name,
        "version": plan.version,
        "cmd": list(command),
        "env": list(env),
        "sourceDateEpoch": plan.epoch,
    }


def _materials(
    source: Source, blobs: Blobs, configuration: bytes | None, signer: ImageSigner | None
) -> Sequence[Material]:
    materials = [*source.materials, *blobs.materials()]
    if configuration is not None:
        materials.append(Material("enclave.toml", {"sha256": hashlib.sha256(configuration).hexdigest()}))
    if signer is not None:
        digest = hashlib.sha256(signer.certificate.der).hexdigest()
        materials.append(Material("signing certificate", {"sha256": digest}))
    return materials
