"""Two builds that must be the same, and what is said when they are not."""

from __future__ import annotations

import grp
import json
import os
import shutil
import stat
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from attestation.measure import read_image
from parent.image import reproduce as module
from parent.image.build import ContainerArchive, ImagePlan, OciLayout, build_image
from parent.image.dockerfile import ContainerBuild
from parent.image.reproduce import OTHER_USER, Reproduction, reproduce_image
from parent.image.tree import ImageBuildError
from tests.nitro_hosts import REPOSITORY
from tests.parent.image.containers import Container, docker_archive, layout, tar
from tests.parent.image.test_build import blobs, plan_of
from tests.parent.image.test_dockerfile import needs_buildah

HELLO = Container([tar({"bin/": None, "bin/hello": b"hello"})])
OTHERS = os.geteuid() == 0
"""Whether there can be another user here."""
SEEN = """
import json, os, sys
from parent.image import second_build as module
build_image = module.build_image
def seen(*arguments, **options):
    sys.meta_path.clear()  # nothing may be imported any more
    with open({seen!r}, "w") as file:
        variables = {{name: os.environ.get(name) for name in ("TZ", "LANG", "HOME", "PYTHONHASHSEED")}}
        umask = os.umask(0)
        os.umask(umask)
        users = [*os.getresuid(), *os.getresgid(), *os.getgroups()]
        json.dump([module.__file__, users, os.getcwd(), umask, variables], file)
    return build_image(*arguments, **options)
module.build_image = seen
sys.exit(module.main(sys.argv[1], sys.argv[2:]))
"""


def quiet(what: str, done: int, total: int) -> None:
    pass


@pytest.fixture(autouse=True)
def temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Where both builds are: below what everybody may enter, as /tmp is."""
    with tempfile.TemporaryDirectory(prefix="reproduce-test-") as folder:
        Path(folder).chmod(0o755)
        monkeypatch.setattr(tempfile, "tempdir", folder)
        yield Path(folder)
        assert os.listdir(folder) == []


def reproduced(plan: ImagePlan) -> Reproduction:
    found = reproduce_image(plan, progress=quiet)
    assert found.is_exact == (found.difference is None) == (list(found.lines()) == [])
    return found


def test_a_root_folder_with_all_that_varies(tmp_path: Path) -> None:
    configuration = tmp_path / "enclave.toml"
    configuration.write_bytes(b"x = 1")
    plan = plan_of(tmp_path, configuration=configuration, env=("A=b c",), epoch=7)
    description = tmp_path / "blobs" / "kernel.json"
    description.write_text('{"compiler": "gcc 12"}')
    found = reproduced(plan)
    assert found.is_exact
    assert found.records_equal
    assert ("user" in found.varied) == OTHERS
    alone = build_image(plan, tmp_path / "enclave.eif", progress=quiet)
    assert alone.image == read_image(alone.path, digest_file=True) == found.first == found.second


@pytest.mark.parametrize("kind", ["oci", "archive"])
def test_containers(tmp_path: Path, kind: str) -> None:
    (tmp_path / "archive").write_bytes(docker_archive((HELLO, ["a:1"])))
    layout(HELLO).write(tmp_path / "layout")
    source = OciLayout(tmp_path / "layout") if kind == "oci" else ContainerArchive(tmp_path / "archive", "a:1")
    found = reproduced(ImagePlan(source=source, blobs=blobs(tmp_path)))
    assert found.is_exact
    assert found.records_equal


@needs_buildah
def test_a_dockerfile_is_built_twice(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "context"
    folder.mkdir()
    (folder / "Dockerfile").write_text('FROM scratch\nCOPY hello /\nCMD ["/hello"]\n')
    (folder / "hello").write_bytes(b"hello")
    source = ContainerBuild(dockerfile=folder / "Dockerfile", context=folder, engine="buildah")
    found = reproduced(ImagePlan(source=source, blobs=blobs(tmp_path)))
    assert found.is_exact
    assert found.records_equal
    assert "user" not in found.varied
    assert capfd.readouterr().err.count("STEP 2/3") == 2


@pytest.fixture
def seen(temporary: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """What the second build writes of itself."""
    with tempfile.TemporaryDirectory() as folder:
        Path(folder).chmod(0o777)
        file, program = Path(folder) / "seen", Path(folder) / "program.py"
        program.write_text(SEEN.format(seen=str(file)))
        monkeypatch.setattr(module, "SECOND_BUILD", ("-P", str(program)))
        yield file


def test_what_a_second_build_finds(tmp_path: Path, seen: Path) -> None:
    """Another user, where there can be one, in another folder and another environment."""
    reproduced(plan_of(tmp_path))
    _, users, place, umask, variables = json.loads(seen.read_text())
    if OTHERS:
        assert users[:3] == [OTHER_USER] * 3
        [group] = set(users[3:])
        assert len(users) == 6
        assert group in module.OTHER_GROUPS
        assert group not in {each.gr_gid for each in grp.getgrall()}
    else:
        assert users == [*os.getresuid(), *os.getresgid(), *os.getgroups()]
    assert umask == 0o077
    assert place != os.getcwd()
    assert variables == {"TZ": "Asia/Kathmandu", "LANG": "tr_TR.UTF-8", "HOME": place, "PYTHONHASHSEED": "1729"}


@pytest.mark.skipif(not OTHERS, reason="only root has others to give to")
def test_nobody_else_gets_to_the_copies(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Which have the modes of the source, as they are in the image: set-uid, too."""
    plan = plan_of(tmp_path)
    (tmp_path / "root" / "bin" / "tool").chmod(0o4755)
    tried: list[int] = []
    build = module._build_elsewhere

    def looked_at(plan: ImagePlan, folder: Path, owner: tuple[int, int], progress: Any) -> None:
        copy = folder / "source" / "bin" / "tool"
        assert stat.S_IMODE(copy.stat().st_mode) == 0o4755
        assert (copy.stat().st_uid, copy.stat().st_gid) == owner
        for user, group in ((OTHER_USER, OTHER_USER), (12345, 12345), owner):
            looking = ["test", "-e", str(copy)]
            ran = subprocess.run(looking, user=user, group=group, extra_groups=[], check=False)
            tried.append(ran.returncode)
        assert stat.S_IMODE((folder.parent / "one").stat().st_mode) == 0o700
        build(plan, folder, owner, progress)

    monkeypatch.setattr(module, "_build_elsewhere", looked_at)
    assert reproduced(plan).is_exact
    assert tried == [1, 1, 0]


def test_an_installation_for_its_owner_s_eyes_builds_as_another_user(
    tmp_path: Path, seen: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """scripts/setup makes such a one."""
    installation = tmp_path / "installation"
    for name in ("attestation", "vsockrpc", "parent"):
        shutil.copytree(REPOSITORY / name, installation / name, ignore=shutil.ignore_patterns("__pycache__"))
    installation.chmod(0o700)
    monkeypatch.setenv("PYTHONPATH", str(installation))
    found = reproduced(plan_of(tmp_path))
    assert found.is_exact
    assert ("user" in found.varied) == OTHERS
    assert Path(json.loads(seen.read_text())[0]).is_relative_to(installation)


def test_folders_that_nobody_else_may_enter_are_no_other_user_s(tmp_path: Path, temporary: Path) -> None:
    temporary.chmod(0o700)
    found = reproduced(plan_of(tmp_path))
    assert found.is_exact
    assert "user" not in found.varied


def test_whose_files_are_for_their_owner_s_eyes_is_built_by_the_same_user(tmp_path: Path) -> None:
    plan = plan_of(tmp_path)
    (tmp_path / "root" / "empty").chmod(0)
    if os.geteuid() == 0:  # else it cannot be read at all
        found = reproduced(plan)
        assert found.is_exact
        assert "user" not in found.varied


def changing(monkeypatch: pytest.MonkeyPatch, change: Any) -> None:
    """Changes the copies before the second build."""
    copied = module._copied

    def wrapped(plan: ImagePlan, folder: Path) -> ImagePlan:
        made = copied(plan, folder)
        change(folder)
        return made

    monkeypatch.setattr(module, "_copied", wrapped)


def test_what_differs_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def change(folder: Path) -> None:
        (folder / "source" / "bin" / "tool").write_bytes(b"loot")
        (folder / "source" / "empty").unlink()
        (folder / "source" / "new").write_bytes(b"new")
        (folder / "blobs" / "init").write_bytes(b"another init")

    changing(monkeypatch, change)
    found = reproduced(plan_of(tmp_path))
    lines = list(found.lines())
    assert not found.is_exact
    assert not found.records_equal
    assert {line.split(":")[0] for line in lines if line.startswith("PCR")} == {"PCR0", "PCR1", "PCR2"}
    text = "\n".join(lines)
    for expected in ("rootfs/bin/tool: content", "only in the first: rootfs/empty", "only in the second: rootfs/new"):
        assert expected in text
    assert "ramdisk0: " in text


def test_many_differences_are_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def change(folder: Path) -> None:
        for number in range(30):
            (folder / "source" / f"new{number}").touch()

    changing(monkeypatch, change)
    lines = list(reproduced(plan_of(tmp_path)).lines())
    assert lines[-1] == "  and 10 more"


def test_a_second_build_that_fails_says_why(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    changing(monkeypatch, lambda folder: (folder / "blobs" / "kernel").write_bytes(b"no kernel"))
    with pytest.raises(ImageBuildError, match="the second build: ") as caught:
        reproduce_image(plan_of(tmp_path), progress=quiet)
    assert caught.value.code == "bad_kernel"


def test_a_second_build_that_ends_without_a_word(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "SECOND_BUILD", ("-c", "import sys; sys.exit(9)"))
    with pytest.raises(ImageBuildError, match="second_build_failed"):
        reproduce_image(plan_of(tmp_path), progress=quiet)


def test_an_interrupt_ends_the_second_build(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    children: list[subprocess.Popen[bytes]] = []

    class Interrupted(subprocess.Popen[bytes]):
        def communicate(self, *arguments: Any, **options: Any) -> Any:
            children.append(self)
            raise KeyboardInterrupt

    monkeypatch.setattr(module, "SECOND_BUILD", ("-c", "import time; time.sleep(600)"))
    monkeypatch.setattr("parent.image.reproduce.subprocess.Popen", Interrupted)
    monkeypatch.setattr(module, "_other_owner", lambda *_: None)
    with pytest.raises(KeyboardInterrupt):
        reproduce_image(plan_of(tmp_path), progress=quiet)
    [child] = children
    assert child.returncode is not None
    assert child.stdout is not None
    child.stdout.close()


def test_a_second_build_that_the_system_refuses_says_why(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    build = module._build_elsewhere

    def refused(plan: ImagePlan, folder: Path, *more: Any) -> None:
        (folder / "out" / "enclave.eif.provenance.json").mkdir()
        build(plan, folder, *more)

    monkeypatch.setattr(module, "_build_elsewhere", refused)
    with pytest.raises(ImageBuildError, match=r"the second build: .*enclave\.eif") as caught:
        reproduce_image(plan_of(tmp_path), progress=quiet)
    assert caught.value.code == "second_build_failed"
