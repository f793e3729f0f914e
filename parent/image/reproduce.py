"""Builds an image twice, under conditions that must not matter, and compares.

The second build runs in a process of its own, on copies: other folders, owners, times and an other order of the files
on disk, another user where we are root, another language, time zone, umask, home and hash seed. What a Dockerfile says
is run twice from nothing; there the context is the same folder, and the user the same, as the engine's rights are
theirs. Signatures are left out: they are over PCR0, which is compared, and an auditor has no key.
"""

from __future__ import annotations

import grp
import json
import os
import secrets
import shlex
import shutil
import stat
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final

from attestation.image_diff import ImageDifference, SectionDifference, compare, read_contents
from attestation.measure import EnclaveImage, Progress, read_image
from parent.image import source as sources
from parent.image.blobs import DESCRIPTIONS, Blob, BlobChoice, find_blobs
from parent.image.build import ContainerArchive, ImagePlan, OciLayout, RootFolder, SourceChoice, build_image
from parent.image.dockerfile import ContainerBuild
from parent.image.tree import ImageBuildError

OTHER_USER: Final = 65534
"""nobody, as every Linux has it."""
OTHER_GROUPS: Final = range(50_000, 60_000)
"""One of them that is nobody's is the second build's. So no other process, not even another one of that user, gets to
the copies, which have the source's modes, set-uid among them. A container's user name space has no higher ones."""
SAME_USER: Final = "same"
"""In the place of a user's and a group's number: the second build is not another user's."""
OTHER_TIME: Final = 1_000_000_007
"""Seconds since 1970: of every file in the copies."""
OTHER_ENVIRONMENT: Final = {
    "TZ": "Asia/Kathmandu",
    "LANG": "tr_TR.UTF-8",
    "LC_ALL": "C",
    "PYTHONHASHSEED": "1729",
    "SOURCE_DATE_EPOCH": "86400",  # beside the one that is passed on: an option counts more
}
OTHER_UMASK: Final = 0o077
SECOND_BUILD: Final = ("-P", "-m", "parent.image.second_build")
"""How Python starts it, without looking for it in its folder."""
MAX_SHOWN: Final = 20
"""Files of one ramdisk that are told of."""


@dataclass(frozen=True, slots=True)
class Reproduction:
    """Two builds of the same."""

    first: EnclaveImage
    second: EnclaveImage
    difference: ImageDifference | None
    """None when the files are the same to the last byte."""
    records_equal: bool
    """Whether the build records are, too."""
    varied: tuple[str, ...]
    """What was not the same for both, in words."""

    @property
    def is_exact(self) -> bool:
        return self.difference is None

    def lines(self) -> Iterator[str]:
        """What differs, for a person."""
        if self.difference is not None:
            yield from _describe(self.difference)


def reproduce_image(plan: ImagePlan, *, progress: sources.Progress) -> Reproduction:
    """Raises as :func:`build_image`; what the second build says has its own code."""
    with tempfile.TemporaryDirectory(prefix="strongroom-reproduce-", ignore_cleanup_errors=True) as folder:
        one, two = Path(folder) / "one", Path(folder) / "two"
        one.mkdir(mode=0o700)
        two.mkdir()
        first = build_image(plan, one / "enclave.eif", progress=progress)
        progress("copying what the image is made from", 0, 0)
        copied = _copied(plan, two)
        varied = ["folder", "time", "TZ", "LANG", "umask", "HOME", "hash seed"]
        if not isinstance(plan.source, ContainerBuild):
            varied += ["times, owners and order of the files"]
        owner = _other_owner(Path(folder), two, copied)
        if owner is not None:
            varied += ["user"]
        (two / "out").mkdir()
        (two / "tmp").mkdir()
        if owner is not None:
            for path in (two, two / "out", two / "tmp"):
                os.chown(path, *owner)
        _build_elsewhere(copied, two, owner, progress)
        second = two / "out" / "enclave.eif"
        record = second.with_name(first.record.name)
        images = [_read(path, progress) for path in (first.path, second)]
        difference = None
        if images[0].sha384 != images[1].sha384:
            difference = _compare(images, [first.path, second])
        return Reproduction(
            images[0], images[1], difference, first.record.read_bytes() == record.read_bytes(), tuple(varied)
        )


def arguments_of(plan: ImagePlan) -> list[str]:
    """The options of ``strongroom image build`` that mean this plan."""
    arguments = [
        *_source_arguments(plan.source),
        *("--architecture", plan.architecture.value, "--name", plan.name, "--version", plan.version),
        *("--source-date-epoch", str(plan.epoch)),
    ]
    blobs = plan.blobs
    for option, value in (
        ("--config", plan.configuration),
        ("--cmd", None if plan.cmd is None else shlex.join(plan.cmd)),
        ("--blobs", blobs.folder),
        ("--kernel", blobs.kernel),
        ("--init", blobs.init),
        ("--cmdline", blobs.cmdline),
        ("--nsm-module", blobs.nsm_module),
        *(("--env", each) for each in plan.env),
    ):
        arguments += [] if value is None else [option, str(value)]
    if blobs.cmdline_copy is not None:
        arguments += ["--cmdline-copy" if blobs.cmdline_copy else "--no-cmdline-copy"]
    return arguments


def _source_arguments(source: SourceChoice) -> list[str]:
    match source:
        case RootFolder(path):
            return ["--rootfs", str(path)]
        case OciLayout(path, tag):
            return ["--oci", str(path), *(["--tag", tag] if tag else [])]
        case ContainerArchive(path, tag):
            return ["--archive", str(path), *(["--tag", tag] if tag else [])]
        case ContainerBuild():
            arguments = ["--dockerfile", str(source.dockerfile.absolute()), "--context", str(source.context.absolute())]
            for each in source.build_args:
                arguments += ["--build-arg", each]
            for each in source.secrets:
                arguments += ["--secret", each]
            arguments += ["--target", source.target] if source.target else []
            return [*arguments, *(["--engine", source.engine] if source.engine else [])]


# --- The second build ----------------------------------------------------------------------------------------------


def _copied(plan: ImagePlan, folder: Path) -> ImagePlan:
    """The same plan on copies of all its files."""
    blobs = find_blobs(plan.blobs, plan.architecture)
    (folder / "blobs").mkdir()
    choice = BlobChoice(
        kernel=_write_blob(blobs.kernel, folder / "blobs" / "kernel"),
        init=_write_blob(blobs.init, folder / "blobs" / "init"),
        cmdline=blobs.cmdline,
        nsm_module=None if blobs.nsm_module is None else _write_blob(blobs.nsm_module, folder / "blobs" / "nsm.ko"),
        cmdline_copy=blobs.cmdline_copy,
    )
    for beside, name in (
        (blobs.kernel.path.with_name(f"{blobs.kernel.path.name}.config"), "kernel.config"),
        (blobs.kernel.path.with_name(DESCRIPTIONS["kernel"]), DESCRIPTIONS["kernel"]),
        (blobs.init.path.with_name(DESCRIPTIONS["init"]), DESCRIPTIONS["init"]),
    ):
        if beside.is_file():  # what it says of them goes into the metadata or the record
            _copy_file(beside, folder / "blobs" / name)
    configuration = plan.configuration
    if configuration is not None:
        configuration = _copy_file(configuration, folder / "enclave.toml")
    source = plan.source
    match source:
        case RootFolder(path) | OciLayout(path):
            _copy_folder(path, folder / "source")
            source = replace(source, path=folder / "source")
        case ContainerArchive(path):
            source = replace(source, path=_copy_file(path, folder / "source"))
        case ContainerBuild():
            pass
    return replace(plan, source=source, blobs=choice, configuration=configuration)


def _write_blob(blob: Blob, target: Path) -> Path:
    target.write_bytes(blob.data)
    os.utime(target, (OTHER_TIME, OTHER_TIME))
    return target


def _copy_file(source: Path, target: Path) -> Path:
    shutil.copyfile(source, target)
    os.utime(target, (OTHER_TIME, OTHER_TIME))
    return target


def _copy_folder(source: Path, target: Path) -> None:
    """With the modes, and in the reverse order. What cannot be copied is left to be missed: the comparison tells."""
    target.mkdir()
    for path in sorted(source.iterdir(), reverse=True):
        status, copy = path.lstat(), target / path.name
        kind = stat.S_IFMT(status.st_mode)
        match kind:
            case stat.S_IFDIR:
                _copy_folder(path, copy)
                continue
            case stat.S_IFLNK:
                copy.symlink_to(os.readlink(path))
                continue
            case stat.S_IFREG:
                shutil.copyfile(path, copy)
            case _:
                os.mknod(copy, status.st_mode, status.st_rdev)
        copy.chmod(stat.S_IMODE(status.st_mode))
        os.utime(copy, (OTHER_TIME, OTHER_TIME))
    target.chmod(stat.S_IMODE(source.stat().st_mode))


def _other_owner(top: Path, folder: Path, plan: ImagePlan) -> tuple[int, int] | None:
    """Gives the copies to another user and a group of its own, the only ones beside root that get into ``top``. None
    where there can be none: only root has others to give to, a container engine's rights are its user's, and a file of
    the source, or the folder for temporary files, may be for its owner alone.
    """
    if os.geteuid() != 0 or isinstance(plan.source, ContainerBuild):
        return None
    if not all(parent.stat().st_mode & stat.S_IXOTH for parent in top.resolve().parents):
        return None
    for path in _walk(folder):
        status = path.lstat()
        needed = 0o500 if stat.S_ISDIR(status.st_mode) else 0o400
        if not stat.S_ISLNK(status.st_mode) and status.st_mode & needed != needed:
            return None
    taken = {each.gr_gid for each in grp.getgrall()}
    owner = OTHER_USER, secrets.choice([group for group in OTHER_GROUPS if group not in taken])
    os.chown(top, 0, owner[1])
    top.chmod(0o710)
    for path in _walk(folder):
        status = path.lstat()
        os.chown(path, *owner, follow_symlinks=False)
        if not stat.S_ISLNK(status.st_mode):
            path.chmod(stat.S_IMODE(status.st_mode))  # a change of owner takes set-uid away
    return owner


def _walk(folder: Path) -> Iterator[Path]:
    for where, folders, files in os.walk(folder):
        yield from (Path(where, name) for name in (*folders, *files))


def _build_elsewhere(plan: ImagePlan, folder: Path, owner: tuple[int, int] | None, progress: sources.Progress) -> None:
    progress("building again, elsewhere", 0, 0)
    user = SAME_USER if owner is None else f"{owner[0]}:{owner[1]}"
    command = [sys.executable, *SECOND_BUILD, user, *arguments_of(plan)]
    command += ["--out", str(folder / "out" / "enclave.eif")]
    child = subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        cwd=None if isinstance(plan.source, ContainerBuild) else folder,  # its arguments may name files from here
        env={**os.environ, **OTHER_ENVIRONMENT, "HOME": str(folder), "TMPDIR": str(folder / "tmp")},
        umask=OTHER_UMASK,
        start_new_session=True,  # Ctrl-C comes to us, and we end it once
    )
    try:
        said, _ = child.communicate()
    except BaseException:
        child.terminate()
        child.wait()
        raise
    if child.returncode:
        raise _second_failed(said, child.returncode)


def _second_failed(said: bytes, code: int) -> ImageBuildError:
    """The error that the child printed, as its own."""
    try:
        error = json.loads(said)
        return ImageBuildError(
            error["code"], f"the second build: {error['message']}", expected=error["expected"], got=error["got"]
        )
    except (ValueError, KeyError, TypeError):
        return ImageBuildError(
            "second_build_failed", "the second build ended without a word", expected="exit code 0", got=code
        )


# --- The comparison ------------------------------------------------------------------------------------------------


def _read(path: Path, progress: sources.Progress) -> EnclaveImage:
    told: Progress = lambda done, total: progress("comparing", done, total)  # noqa: E731
    return read_image(path, progress=told, digest_file=True)


def _compare(images: Sequence[EnclaveImage], paths: Sequence[Path]) -> ImageDifference:
    contents = []
    for image, path in zip(images, paths, strict=True):
        with path.open("rb") as file:
            contents.append(read_contents(image, file))
    return compare(*contents)


def _describe(difference: ImageDifference) -> Iterator[str]:
    for index, (one, other) in difference.registers.items():
        yield f"PCR{index}: {one.hex()} / {other.hex()}"
    for name, first, second in difference.header:
        yield f"header, {name}: {first} / {second}"
    for section in difference.sections:
        yield from _describe_section(section)


def _describe_section(section: SectionDifference) -> Iterator[str]:
    if section.before is None or section.after is None:
        yield f"{section.name}: only in the {'second' if section.before is None else 'first'}"
        return
    yield f"{section.name}: {section.before.size} / {section.after.size} bytes"
    if section.files is None:
        return
    lines = [
        *(f"only in the first: {listed.entry.path}" for listed in section.files.removed),
        *(f"only in the second: {listed.entry.path}" for listed in section.files.added),
        *(
            f"{changed.path}: {name} {one} / {other}"
            for changed in section.files.changed
            for name, one, other in changed.fields
        ),
    ]
    yield from (f"  {line}" for line in lines[:MAX_SHOWN])
    if len(lines) > MAX_SHOWN:
        yield f"  and {len(lines) - MAX_SHOWN} more"
