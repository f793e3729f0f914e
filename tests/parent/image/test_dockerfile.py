"""Dockerfiles, by buildah where it is installed, and by a stand-in for docker that records what it is asked."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from attestation.eif import Architecture
from parent.image import dockerfile as module
from parent.image.container import Wanted
from parent.image.dockerfile import ContainerBuild, build_container
from parent.image.folder import read_folder
from parent.image.source import Source
from parent.image.spool import Spool
from parent.image.tree import ImageBuildError
from tests.parent.image.containers import Container, docker_archive, layout, tar
from tests.parent.image.test_folder import filled

needs_buildah = pytest.mark.skipif(
    shutil.which("buildah") is None or os.geteuid() != 0, reason="builds a container: needs buildah, as root"
)
ARCHIVE = docker_archive((Container([tar({"hello": b"hello"})]), ["strongroom-build:1"]))
STAND_IN = """#!{python}
import json, os, shutil, sys
arguments = sys.argv[1:]
with open({log!r}, "a") as log:
    variables = [os.environ.get(name) for name in ("SOURCE_DATE_EPOCH", "DOCKER_BUILDKIT")]
    log.write(json.dumps([arguments, variables]) + "\\n")
if arguments[0] == {fails!r}:
    sys.stderr.write({says!r})
    sys.exit(17)
if arguments[0] == "save":
    shutil.copyfile({archive!r}, arguments[arguments.index("--output") + 1])
"""


def quiet(what: str, done: int, total: int) -> None:
    pass


def build(folder: Path, epoch: int = 0, architecture: Architecture = Architecture.X86_64, **changes: Any) -> Source:
    spool = folder / "spool"
    spool.mkdir()
    context = folder / "context"
    asked = ContainerBuild(**{"dockerfile": context / "Dockerfile", "context": context, **changes})
    source = build_container(asked, Wanted(architecture), Spool(spool, quiet), epoch=epoch)
    assert not (spool / "container").exists()
    return source


def context(folder: Path, text: str = "FROM scratch\nCOPY hello /\n") -> Path:
    made = folder / "context"
    made.mkdir()
    (made / "Dockerfile").write_text(text)
    (made / "hello").write_bytes(b"hello")
    return made


def docker(folder: Path, monkeypatch: pytest.MonkeyPatch, fails: str = "", says: str = "no\n") -> Path:
    """Where the stand-in writes what it is asked. It is all that there is on the PATH."""
    log, archive, program = folder / "log", folder / "archive", folder / "bin" / "docker"
    archive.write_bytes(ARCHIVE)
    program.parent.mkdir()
    stand_in = STAND_IN.format(python=sys.executable, log=str(log), archive=str(archive), fails=fails, says=says)
    program.write_text(stand_in)
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(program.parent))
    monkeypatch.setattr(module, "_host", lambda: Architecture.X86_64)
    return log


def asked(log: Path) -> list[list[str]]:
    return [json.loads(line)[0] for line in log.read_text().splitlines()]


def test_what_docker_is_asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, log = context(tmp_path), docker(tmp_path, monkeypatch)
    source = build(
        tmp_path, epoch=77, build_args=("BASE=debian@sha256:1", "A"), secrets=("id=s,src=f",), target="final"
    )
    assert list(source.tree) == ["hello"]
    built, saved, removed = asked(log)
    tag = built[built.index("--tag") + 1]
    assert tag.startswith("strongroom-build:")
    assert built == [
        *("build", "--no-cache", "--tag", tag, "--file", str(folder / "Dockerfile")),
        *(
            "--build-arg",
            "BASE=debian@sha256:1",
            "--build-arg",
            "A",
            "--secret",
            "id=s,src=f",
            "--target",
            "final",
            str(folder),
        ),
    ]
    assert (saved[0], saved[-1], removed) == ("save", tag, ["image", "rm", tag])
    assert [json.loads(line)[1] for line in log.read_text().splitlines()] == [["77", "1"]] * 3


def test_another_architecture_is_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    context(tmp_path)
    log = docker(tmp_path, monkeypatch)
    with pytest.raises(ImageBuildError, match="no_such_container"):  # the stand-in has one for amd64 alone
        build(tmp_path, architecture=Architecture.AARCH64)
    assert "--platform linux/arm64" in " ".join(asked(log)[0])


@pytest.mark.parametrize("fails", ["build", "save", "image"])
def test_a_failure_of_docker_is_said_and_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fails: str
) -> None:
    context(tmp_path)
    log = docker(tmp_path, monkeypatch, fails=fails)
    with pytest.raises(ImageBuildError, match="container_build_failed") as caught:
        build(tmp_path)
    assert caught.value.got == "17"
    assert list((tmp_path / "spool").iterdir()) == []
    assert (asked(log)[-1][0] == "image") == (fails != "build")


@pytest.mark.parametrize(
    "says",
    [
        "the --mount option requires BuildKit. Refer to a page to learn how to build images with BuildKit enabled\n",
        "ERROR: BuildKit is enabled but the buildx component is missing or broken.\n",
    ],
)
def test_a_docker_without_buildkit_is_told_what_to_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], says: str
) -> None:
    context(tmp_path)
    docker(tmp_path, monkeypatch, fails="build", says=says)
    with pytest.raises(ImageBuildError, match=r"install its buildx, or build with buildah") as caught:
        build(tmp_path)
    assert caught.value.code == "container_build_failed"
    assert capfd.readouterr().err == says


def test_no_engine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    context(tmp_path)
    monkeypatch.setenv("PATH", str(tmp_path))
    for engine in (None, "docker"):
        with pytest.raises(ImageBuildError, match="no_container_engine"):
            build_container(
                ContainerBuild(dockerfile=tmp_path / "context/Dockerfile", context=tmp_path / "context", engine=engine),
                Wanted(),
                Spool(tmp_path, quiet),
                epoch=0,
            )


@pytest.mark.parametrize("missing", ["dockerfile", "context"])
def test_files_that_are_not_there(tmp_path: Path, missing: str) -> None:
    context(tmp_path)
    changes: dict[str, Any] = {missing: tmp_path / "none"}
    with pytest.raises(ImageBuildError, match="unreadable_source"):
        build(tmp_path, **changes)


def materials(source: Source) -> dict[str, dict[str, str]]:
    return {each.name: dict(each.digest) for each in source.materials}


def git(folder: Path, *arguments: str) -> str:
    identity = ("-c", "user.name=a", "-c", "user.email=a@example.org", "-c", "commit.gpgsign=false")
    command = ["git", *identity, "-C", str(folder), *arguments]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


@pytest.mark.skipif(shutil.which("git") is None, reason="needs git")
def test_what_went_in_is_told_by_digest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = context(tmp_path)
    (folder / "requirements").mkdir()
    (folder / "requirements" / "all.txt").write_text("cbor2==6")
    path = os.environ["PATH"]
    docker(tmp_path, monkeypatch)
    monkeypatch.setenv("PATH", f"{os.environ['PATH']}:{path}")

    def inputs(name: str) -> dict[str, dict[str, str]]:
        (tmp_path / "spool").mkdir(exist_ok=True)
        shutil.rmtree(tmp_path / "spool")
        return materials(build(tmp_path, engine="docker"))

    loose = inputs("no checkout")
    assert set(loose) == {"Dockerfile", "build context", "requirements/all.txt"}
    assert set(loose["build context"]) == {"sha256"}
    git(folder, "init", "-q")
    git(folder, "add", ".")
    git(folder, "commit", "-qm", "all")
    clean = inputs("clean")
    assert clean["build context"] == {"gitCommit": git(folder, "rev-parse", "HEAD")}
    (folder / "new").write_text("x")
    dirty = inputs("something new")
    assert set(dirty["build context"]) == {"sha256"}
    assert dirty["build context"] != loose["build context"]
    (folder / "new").unlink()
    assert inputs("clean again") == clean


@pytest.mark.skipif(shutil.which("git") is None, reason="needs git")
def test_a_change_outside_the_context_is_a_change_of_the_checkout(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = context(tmp_path)
    path = os.environ["PATH"]
    docker(tmp_path, monkeypatch)
    monkeypatch.setenv("PATH", f"{os.environ['PATH']}:{path}")
    git(tmp_path, "init", "-q")
    git(tmp_path, "add", folder.name)
    git(tmp_path, "commit", "-qm", "all")
    (tmp_path / "beside").write_text("not committed")
    assert set(materials(build(tmp_path, engine="docker"))["build context"]) == {"sha256"}


@needs_buildah
def test_buildah_builds_what_lies_in_a_folder(tmp_path: Path) -> None:
    folder = context(
        tmp_path, 'FROM scratch AS all\nARG A=1\nCOPY root /\nENV A=${A}\nCMD ["/bin/tool"]\nFROM all\nUSER 7\n'
    )
    root = filled(folder / "root")
    (root / "pipe").unlink()  # what it copies, buildah's COPY leaves pipes out of, and set-uid
    (root / "bin" / "tool").chmod(0o755)
    source = build(tmp_path, engine="buildah", target="all", build_args=("A=2",))
    print(source.tree._entries)
    print(read_folder(root).tree._entries)
    assert source.digest == read_folder(root).digest
    assert (source.command, source.user) == (("/bin/tool",), "")
    assert "A=2" in source.env


@needs_buildah
def test_buildah_takes_a_base_from_a_layout_and_gives_its_digest(tmp_path: Path) -> None:
    made = layout(Container([tar({"base": b"base"})]))
    made.write(tmp_path / "base")
    context(tmp_path, "ARG BASE\nFROM ${BASE}\nCOPY hello /\n")
    source = build(tmp_path, engine="buildah", build_args=(f"BASE=oci:{tmp_path}/base",))
    assert list(source.tree) == ["base", "hello"]
    assert materials(source)["base image"] == {"sha256": made.manifests[0]["digest"][7:]}


@needs_buildah
def test_a_failure_of_buildah_is_said(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    context(tmp_path, "FROM scratch\nCOPY nothing /\n")
    with pytest.raises(ImageBuildError, match="container_build_failed"):
        build(tmp_path, engine="buildah")
    assert "nothing" in capfd.readouterr().err
    assert list((tmp_path / "spool").iterdir()) == []


def test_an_interrupt_ends_the_engine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "bin"
    folder.mkdir()
    started = tmp_path / "started"
    program = folder / "docker"
    program.write_text(
        f"#!{sys.executable}\nimport os, time\nopen({str(started)!r}, 'w').write(str(os.getpid()))\ntime.sleep(600)\n"
    )
    program.chmod(0o755)
    context(tmp_path)
    monkeypatch.setenv("PATH", str(folder))

    def interrupted(source: int) -> bytes:
        while not (started.exists() and started.read_text()):
            time.sleep(0.01)
        raise KeyboardInterrupt

    monkeypatch.setattr(module, "_pass_on", interrupted)
    with pytest.raises(KeyboardInterrupt):
        build(tmp_path)
    assert list((tmp_path / "spool").iterdir()) == []
    with pytest.raises(ProcessLookupError):
        os.kill(int(started.read_text()), signal.SIG_DFL)
