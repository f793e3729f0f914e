"""Containers built from a Dockerfile, by buildah or docker, whichever is there.

buildah builds in a storage of its own that is removed afterwards: nothing comes from a cache or stays in one, and every
time in the container is SOURCE_DATE_EPOCH. A base image may then be named as buildah names any: also ``oci:FOLDER``,
whose name has to be one that an image could have, so a relative one in small letters. docker builds where it always
does, without its cache; the times that it writes have no way into an image.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import platform
import secrets
import shutil
import signal
import subprocess
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final

from attestation.eif import Architecture
from parent.image.archive import read_archive
from parent.image.container import PLATFORMS, Wanted
from parent.image.folder import list_folder
from parent.image.oci import read_layout
from parent.image.source import Material, Source, tree_digest
from parent.image.spool import Spool
from parent.image.tree import ImageBuildError, Tree

ENGINES: Final = ("buildah", "docker")
"""In the order in which they are taken."""
LOCKS: Final = ("requirements*.txt", "requirements/*.txt")
"""What pins a context's dependencies, and is told of by name."""

NO_BUILDKIT: Final = (b"option requires BuildKit", b"buildx component is missing or broken")
"""What docker says where it cannot build as a Dockerfile with mounts has to be built."""

_KEPT: Final = 1 << 16
"""Bytes of the end of an engine's words in which the reason is looked for."""
_GIT_SECONDS: Final = 60
_STOP_SECONDS: Final = 10


@dataclass(frozen=True, slots=True, kw_only=True)
class ContainerBuild:
    """What is asked of the engine."""

    dockerfile: Path
    context: Path
    build_args: tuple[str, ...] = ()
    """``NAME=value``, or ``NAME`` with the environment's value."""
    secrets: tuple[str, ...] = ()
    """``id=NAME,src=FILE``: what single steps see and no layer keeps. The record has none of it."""
    target: str | None = None
    engine: str | None = None
    """One of ``ENGINES``; None: the first that is installed."""


def build_container(build: ContainerBuild, wanted: Wanted, spool: Spool, *, epoch: int) -> Source:
    """Builds the container and reads it. What the engine says goes to standard error.

    Its digest is that of its root file system: docker gives the container another one each time. Raises
    ImageBuildError: ``unreadable_source``, ``no_container_engine``, ``container_build_failed``, and as the readers.
    """
    for path, kind in ((build.dockerfile, "file"), (build.context, "folder")):
        if not (path.is_file() if kind == "file" else path.is_dir()):
            raise ImageBuildError("unreadable_source", f"{str(path)!a} is no {kind}")
    engine = build.engine or next((name for name in ENGINES if shutil.which(name)), None)
    if engine is None or shutil.which(engine) is None:
        raise ImageBuildError(
            "no_container_engine",
            "nothing that builds a Dockerfile is installed",
            expected=" or ".join(ENGINES) if engine is None else engine,
        )
    workspace = spool.folder / "container"
    workspace.mkdir(mode=0o700)
    make = _with_buildah if engine == "buildah" else _with_docker
    found = make(build, wanted, spool, workspace, epoch)
    # A container's own digest is an input no more; its base image's is one.
    inputs = [material for material in found.materials if material.name not in ("archive", "container")]
    try:
        materials = (*_inputs(build), *inputs)
    except OSError as error:
        where = ascii(str(error.filename))
        raise ImageBuildError("unreadable_source", f"{where} cannot be read: {error.strerror}") from error
    return replace(found, digest=f"sha256:{tree_digest(found.tree)}", materials=materials)


def _with_buildah(build: ContainerBuild, wanted: Wanted, spool: Spool, workspace: Path, epoch: int) -> Source:
    storage = ["--root", f"{workspace}/storage", "--runroot", f"{workspace}/run", "--storage-driver", "vfs"]
    identity, layout = workspace / "id", workspace / "layout"
    options = ["--isolation", "chroot", "--timestamp", str(epoch), "--no-cache", "--layers=false"]
    try:
        _run(["buildah", *storage, "bud", *options, "--iidfile", str(identity), *_arguments(build, wanted)], epoch)
        push = ["push", "--quiet", "--disable-compression", identity.read_text().strip(), f"oci:{layout}"]
        _run(["buildah", *storage, *push], epoch)
        return read_layout(layout, wanted, spool)
    finally:
        _remove(workspace)


def _with_docker(build: ContainerBuild, wanted: Wanted, spool: Spool, workspace: Path, epoch: int) -> Source:
    # A tag of its own: removing a container by its digest would take somebody's equal one away, too.
    tag, archive = f"strongroom-build:{secrets.token_hex(8)}", workspace / "archive"
    try:
        _run(["docker", "build", "--no-cache", "--tag", tag, *_arguments(build, wanted)], epoch)
        try:
            _run(["docker", "save", "--output", str(archive), tag], epoch)
        finally:
            _run(["docker", "image", "rm", tag], epoch)
        return read_archive(archive, replace(wanted, tag=None), spool)
    finally:
        _remove(workspace)


def _arguments(build: ContainerBuild, wanted: Wanted) -> list[str]:
    arguments = ["--file", str(build.dockerfile)]
    for each in build.build_args:
        arguments += ["--build-arg", each]
    for each in build.secrets:
        arguments += ["--secret", each]
    if build.target is not None:
        arguments += ["--target", build.target]
    if wanted.architecture is not _host():
        arguments += ["--platform", f"linux/{PLATFORMS[wanted.architecture]}"]
    return [*arguments, str(build.context)]


def _host() -> Architecture | None:
    machine = {"amd64": "x86_64", "arm64": "aarch64"}.get(platform.machine().lower(), platform.machine().lower())
    return next((each for each in Architecture if each.value == machine), None)


def _run(command: Sequence[str], epoch: int) -> None:
    """Its output goes to standard error, as it comes. Whatever interrupts us ends it, with all that it has started."""
    environment = {**os.environ, "SOURCE_DATE_EPOCH": str(epoch), "DOCKER_BUILDKIT": "1"}
    pipe, null = subprocess.PIPE, subprocess.DEVNULL
    child = subprocess.Popen(command, stdin=null, stdout=2, stderr=pipe, env=environment, start_new_session=True)
    assert child.stderr is not None
    with child.stderr:
        try:
            said = _pass_on(child.stderr.fileno())
            code = child.wait()
        except BaseException:
            _end(child)
            raise
    if code and any(words in said for words in NO_BUILDKIT):
        raise ImageBuildError(
            "container_build_failed",
            "docker has no BuildKit here: install its buildx, or build with buildah (--engine buildah)",
            expected="docker with BuildKit",
            got="without",
        )
    if code:
        raise ImageBuildError(
            "container_build_failed",
            f"`{command[0]}` failed: what it said stands above",
            expected="exit code 0",
            got=code,
        )


def _pass_on(source: int) -> bytes:
    """Everything goes to standard error; its end is returned."""
    kept = b""
    while piece := os.read(source, _KEPT):
        left = piece
        while left:
            left = left[os.write(2, left) :]
        kept = (kept + piece)[-_KEPT:]
    return kept


def _end(child: subprocess.Popen[bytes]) -> None:
    """A step of a Dockerfile outlives an engine that is ended alone, so the whole session is."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(child.pid, signal.SIGTERM)
    with contextlib.suppress(subprocess.TimeoutExpired):
        child.wait(_STOP_SECONDS)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(child.pid, signal.SIGKILL)
    child.wait()


def _remove(workspace: Path) -> None:
    """Whoever is not root has files there of other users of its own, which only buildah's name space can remove."""
    try:
        shutil.rmtree(workspace)
    except PermissionError:
        subprocess.run(["buildah", "unshare", "rm", "-rf", str(workspace)], check=False)


# --- What went in --------------------------------------------------------------------------------------------------


def _inputs(build: ContainerBuild) -> Iterator[Material]:
    yield _file("Dockerfile", build.dockerfile)
    commit = _clean_commit(build.context)
    if commit is not None:
        yield Material("build context", {"gitCommit": commit}, {"kind": "clean git checkout"})
    else:
        entries = [entry for entry in list_folder(build.context) if entry.path.split("/")[0] != ".git"]
        digest = {"sha256": tree_digest(Tree.of(entries))}
        yield Material("build context", digest, {"kind": "canonical listing of a folder, without .git"})
    for path in sorted({path for pattern in LOCKS for path in build.context.glob(pattern)}):
        yield _file(path.relative_to(build.context).as_posix(), path)


def _file(name: str, path: Path) -> Material:
    with path.open("rb") as file:
        return Material(name, {"sha256": hashlib.file_digest(file, "sha256").hexdigest()})


def _clean_commit(folder: Path) -> str | None:
    """The commit of a checkout in which nothing was changed or added, also outside the folder. What git is told to
    ignore it cannot see.
    """
    try:
        commit = _git(folder, "rev-parse", "--verify", "HEAD^{commit}")
        changes = _git(folder, "status", "--porcelain", "--untracked-files=all")
    except (OSError, subprocess.SubprocessError):
        return None  # no git, or no checkout of this user's
    return None if changes else commit


def _git(folder: Path, *arguments: str) -> str:
    command = ["git", "--no-optional-locks", "-C", str(folder), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True, timeout=_GIT_SECONDS).stdout.strip()
