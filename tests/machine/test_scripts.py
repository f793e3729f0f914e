"""The shell scripts: shellcheck, their options, and what they share (scripts/machine/lib.sh)."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
from pathlib import Path

import pytest

SCRIPTS = Path(__file__).resolve().parents[2] / "scripts"
LIBRARY = SCRIPTS / "machine/lib.sh"


PROGRAMS = sorted(
    path
    for path in SCRIPTS.rglob("*")
    if path.is_file() and path.suffix in ("", ".sh") and path.name != "packages" and path.parent.name != "__pycache__"
)
OF_THE_CHECKOUT = re.compile(
    r"^ *(STRONGROOM_BOOT_LAYOUT=\S+ )?\.venv(-mutants)?/bin/python -m (bench|bench\.engine|mutmut|pytest) "
)
"""What is imported from the checkout is meant, and the script is in it."""


def _is_bash(path: Path) -> bool:
    starts = (b"#!/usr/bin/env bash\n", b"# shellcheck shell=bash\n")
    return path.is_file() and path.read_bytes().startswith(starts)


BASH = sorted(path for path in SCRIPTS.rglob("*") if _is_bash(path))
MACHINE = [path for path in BASH if path.parent == LIBRARY.parent and path != LIBRARY]


def _name(path: Path) -> str:
    return str(path.relative_to(SCRIPTS))


@pytest.mark.skipif(shutil.which("shellcheck") is None, reason="shellcheck is missing: apt-get install shellcheck")
@pytest.mark.parametrize("script", BASH, ids=_name)
def test_shellcheck(script: Path) -> None:
    command = ["shellcheck", "--external-sources", "--source-path=SCRIPTDIR", str(script)]
    found = subprocess.run(command, capture_output=True, text=True, check=False)
    assert found.returncode == 0, found.stdout


@pytest.mark.parametrize("script", MACHINE, ids=_name)
def test_help(script: Path, tmp_path: Path) -> None:
    ran = run(script, "--help", cache=tmp_path)
    assert (ran.returncode, ran.stderr) == (0, "")
    assert f"scripts/machine/{script.name}" in ran.stdout
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("script", MACHINE, ids=_name)
def test_an_unknown_option(script: Path, tmp_path: Path) -> None:
    ran = run(script, "--nonsense", cache=tmp_path)
    assert (ran.returncode, ran.stdout) == (2, "")
    assert ran.stderr.startswith(f"{script.name}: unknown argument: --nonsense\n")
    assert list(tmp_path.iterdir()) == []


PYTHON = re.compile(
    r"""(?:python[0-9.]*|\$each)["'})]*((?:\s+-[A-Za-z]\b)*)\s+(?:-[mc]\b|-(?=\s)|"?\$[a-z]+/\S+\.py\b)"""
)
"""Python with a module, a command, a program on standard input, or one of our files; its options before that."""


@pytest.mark.parametrize("script", PROGRAMS, ids=_name)
def test_python_imports_nothing_from_the_working_folder(script: Path) -> None:
    for line in script.read_text().splitlines():
        for options in PYTHON.findall(line):
            assert "-I" in options.split() or OF_THE_CHECKOUT.match(line), line


@pytest.mark.parametrize(
    ("line", "options"),
    [
        ("python3 -c 'import x'", ""),
        ('"$each" -c x', ""),
        ('"$python" -m venv "$work"', ""),
        ('"$work/venv/bin/python" -I -m pip', " -I"),
        ('python3 - "$work" <<X', ""),
        ('python3 -I "$here/oci_layout.py" x', " -I"),
        ("/usr/bin/python3.11 -B -I -c x", " -B -I"),
    ],
)
def test_the_test_above_sees_how_python_is_called(line: str, options: str) -> None:
    assert PYTHON.findall(line) == [options]


def run(script: Path, *arguments: str, cache: Path, path: Path | None = None) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "XDG_CACHE_HOME": str(cache)}
    if path is not None:
        environment["PATH"] = f"{path}:{environment['PATH']}"
    return subprocess.run([script, *arguments], env=environment, capture_output=True, text=True, check=False)


def write_script(folder: Path, body: str) -> Path:
    script = folder / "thing"
    script.write_text(f'#!/usr/bin/env bash\n# Makes a thing.\n. "{LIBRARY}"\noptions "$@"\n{body}\n')
    script.chmod(0o755)
    return script


ENTRY = 'recipe -- word\ncache_newest thing\ncache_begin thing 1.0 0\necho made >"$work/thing"\ncache_end thing\n'


def test_an_entry_is_made_once(tmp_path: Path) -> None:
    script = write_script(tmp_path, ENTRY)
    first = run(script, cache=tmp_path)
    entry = Path(first.stdout.strip())
    assert first.stderr.startswith("building thing 1.0, about 0 min\n")
    assert (entry / "thing").read_text() == "made\n"
    second = run(script, cache=tmp_path)
    assert (second.stdout, second.stderr) == (first.stdout, f"cache: {entry} (hit)\n")
    anew = run(script, "--no-cache", cache=tmp_path)
    assert anew.stdout == first.stdout
    assert anew.stderr.startswith("building thing")
    asked = run(script, "--latest", cache=tmp_path)
    assert asked.stderr == second.stderr


def test_another_recipe_or_version_is_another_entry(tmp_path: Path) -> None:
    made = [run(write_script(tmp_path, body), cache=tmp_path).stdout for body in (ENTRY, ENTRY + "# changed")]
    version = 'recipe -- word\ncache_begin thing "$(cat version)" 0\ncache_end\n'
    script = write_script(tmp_path, f'cd "{tmp_path}"\n{version}')
    for number in ("1", "2"):
        (tmp_path / "version").write_text(number)
        made.append(run(script, cache=tmp_path).stdout)
    assert len(set(made)) == 4


def test_the_newest_entry_serves_when_nobody_asks_the_archive(tmp_path: Path) -> None:
    body = f'cd "{tmp_path}"\nrecipe -- word\ncache_newest thing\ncache_begin thing "$(cat version)" 0\ncache_end\n'
    script = write_script(tmp_path, body)
    (tmp_path / "version").write_text("1")
    first = run(script, cache=tmp_path).stdout
    (tmp_path / "version").write_text("2")
    assert run(script, cache=tmp_path).stdout == first
    latest = run(script, "--latest", cache=tmp_path).stdout
    assert latest != first
    os.utime(Path(first.strip()) / "recipe", (0, 0))
    assert run(script, cache=tmp_path).stdout == latest


@pytest.mark.parametrize("loose", ["strongroom", "entry", "entry/thing"])
def test_a_cache_that_others_can_write_to_is_refused(tmp_path: Path, loose: str) -> None:
    script = write_script(tmp_path, ENTRY)
    entry = Path(run(script, cache=tmp_path).stdout.strip())
    strange = {"strongroom": entry.parent, "entry": entry, "entry/thing": entry / "thing"}[loose]
    strange.chmod(0o777)
    refused = run(script, cache=tmp_path)
    assert (refused.returncode, refused.stdout) == (2, "")
    assert f"thing: {strange}: others than this user can write there; remove it" in refused.stderr
    if loose == "strongroom":
        assert run(script, "--no-cache", cache=tmp_path).returncode == 2
    strange.chmod(0o755)
    assert run(script, cache=tmp_path).stdout == f"{entry}\n"


@pytest.mark.skipif(os.geteuid() != 0, reason="only root gives files away")
def test_a_cache_of_another_user_is_refused(tmp_path: Path) -> None:
    script = write_script(tmp_path, ENTRY)
    entry = Path(run(script, cache=tmp_path).stdout.strip())
    os.chown(entry / "thing", 65534, 65534)
    assert run(script, cache=tmp_path).returncode == 2


def test_buildah_s_storage_is_this_user_s(tmp_path: Path) -> None:
    (tmp_path / "strongroom").mkdir()
    (tmp_path / "strongroom").chmod(0o777)
    ran = run(SCRIPTS / "image/buildah", "info", cache=tmp_path)
    assert (ran.returncode, ran.stdout) == (2, "")
    assert ran.stderr.startswith("buildah: others than this user can write here: ")


def test_a_failure_leaves_nothing(tmp_path: Path) -> None:
    script = write_script(
        tmp_path, 'recipe -- word\ncache_begin thing 1 0\nrun "trying" sh -c "echo why; exit 3"\ncache_end'
    )
    ran = run(script, cache=tmp_path)
    assert (ran.returncode, ran.stdout) == (1, "")
    assert ran.stderr.endswith("thing: trying\nwhy\nthing: trying failed with status 3\n")
    assert [path.suffix for path in (tmp_path / "strongroom").iterdir()] == [".lock"]


@pytest.mark.parametrize("sent", [signal.SIGTERM, signal.SIGINT])
def test_an_interruption_leaves_nothing(tmp_path: Path, sent: signal.Signals) -> None:
    started = tmp_path / "started"
    os.mkfifo(started)
    job = f"sh -c 'echo $$ >{started}; exec sleep 1000'"
    script = write_script(tmp_path, f'recipe -- word\ncache_begin thing 1 0\nrun "waiting" {job}\ncache_end')
    environment = {**os.environ, "XDG_CACHE_HOME": str(tmp_path), "TMPDIR": str(tmp_path)}
    with subprocess.Popen([script], env=environment, stderr=subprocess.DEVNULL, stdout=subprocess.PIPE) as process:
        pid = int(started.read_text())
        process.send_signal(sent)
        assert process.wait(timeout=60) == 128 + sent
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)
    assert [path.suffix for path in (tmp_path / "strongroom").iterdir()] == [".lock"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["started", "strongroom", "thing"]


def test_two_at_once_make_it_once(tmp_path: Path) -> None:
    started, go = tmp_path / "started", tmp_path / "go"
    os.mkfifo(started)
    os.mkfifo(go)
    job = f"sh -c 'echo >{started}; cat {go}'"
    script = write_script(tmp_path, f'recipe -- word\ncache_begin thing 1 0\nrun "waiting" {job}\ncache_end')
    environment = {**os.environ, "XDG_CACHE_HOME": str(tmp_path)}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "env": environment}
    with subprocess.Popen([script], **pipes) as first:  # type: ignore[call-overload]
        started.read_text()
        with subprocess.Popen([script], **pipes) as second:  # type: ignore[call-overload]
            assert second.stderr.readline() == "thing: another process is building thing 1; waiting for it\n"
            go.write_text("go")
            entry, _ = first.communicate(timeout=60)
            assert second.communicate(timeout=60) == (entry, f"cache: {entry.strip()} (hit)\n")


def test_what_is_missing_is_said_with_its_package(tmp_path: Path) -> None:
    script = write_script(
        tmp_path, "need sh dash; need no-such-tool one; need /no/such/file two; need no-other one; needs_met"
    )
    ran = run(script, cache=tmp_path)
    assert (ran.returncode, ran.stdout) == (2, "")
    names = "no-such-tool /no/such/file no-other"
    assert ran.stderr == (
        f"thing: missing: {names}; on Debian: apt-get install one two (or run as root with --install)\n"
    )


def fake_apt(folder: Path, targets: str) -> Path:
    tools = folder / "tools"
    tools.mkdir()
    apt = tools / "apt-get"
    apt.write_text(
        f"""#!/bin/sh
case "$*" in
  indextargets*) printf '%s' '{targets}' ;;
  *update) cat "$2" >"{folder}/conf"; cat "$(dirname "$2")/sources/one.sources" >"{folder}/sources"
           echo 'The following signatures could not be verified: NO_PUBKEY 1234'; exit 100 ;;
esac
"""
    )
    apt.chmod(0o755)
    return tools


CODENAME = next(
    (
        line.split("=", 1)[1]
        for line in Path("/etc/os-release").read_text().splitlines()
        if line.startswith("VERSION_CODENAME=")
    ),
    "none",
)
HERE = f"""mirror://other/debian/ nodistro main
mirror://here/debian/ {CODENAME} contrib
mirror://here/debian/ {CODENAME} main
"""


@pytest.mark.parametrize(
    ("targets", "suite", "mirror"),
    [
        (HERE, "trixie", "mirror://here/debian/"),
        (HERE, "trixie-security", "mirror://here/debian-security/"),
        (f"{HERE}mirror://sec/ {CODENAME}-security main\n", "trixie-security", "mirror://sec/"),
        (f"{HERE}mirror://sec/ {CODENAME}-security main\n", "sid", "mirror://here/debian/"),
        ("mirror://m/debian unstable main\n", "trixie", "mirror://m/debian"),
    ],
)
def test_the_mirror_is_the_machine_s_own(tmp_path: Path, targets: str, suite: str, mirror: str) -> None:
    ran = run(write_script(tmp_path, f"mirror_of {suite}"), cache=tmp_path, path=fake_apt(tmp_path, targets))
    assert (ran.returncode, ran.stdout, ran.stderr) == (0, f"{mirror}\n", "")


def test_a_machine_without_a_mirror(tmp_path: Path) -> None:
    tools = fake_apt(tmp_path, "mirror://other/ nodistro main\n")
    ran = run(write_script(tmp_path, "mirror=$(mirror_of sid)"), cache=tmp_path, path=tools)
    assert ran.returncode == 2
    assert "name no mirror of Debian for the suite sid" in ran.stderr


def test_a_suite_without_a_key_here(tmp_path: Path) -> None:
    """The state is private: nothing of it is in apt's own folders."""
    tools = fake_apt(tmp_path, HERE)
    ran = run(write_script(tmp_path, "version=$(apt_version sid thing)"), cache=tmp_path, path=tools)
    assert ran.returncode == 1
    assert "no key for the suite sid: install a newer debian-archive-keyring" in ran.stderr
    sources = (tmp_path / "sources").read_text()
    assert sources.startswith("Types: deb deb-src\nURIs: mirror://here/debian/\nSuites: sid\nComponents: main\n")
    assert "\nSigned-By: /usr/share/keyrings/debian-archive-keyring.gpg\n" in sources
    configuration = (tmp_path / "conf").read_text()
    assert "/var/lib/apt" not in configuration
    for what in ("APT::Get::AllowUnauthenticated", "Acquire::AllowInsecureRepositories"):
        assert f'{what} "false";' in configuration
    assert 'Acquire::AllowWeakRepositories "false";' in configuration


def test_without_debian_s_keys_nothing_is_asked(tmp_path: Path) -> None:
    tools = fake_apt(tmp_path, HERE)
    body = f"debian_keyring={tmp_path}/absent.gpg\nversion=$(apt_version sid thing)"
    ran = run(write_script(tmp_path, body), cache=tmp_path, path=tools)
    assert (ran.returncode, ran.stdout) == (2, "")
    assert ran.stderr == (
        f"thing: missing: {tmp_path}/absent.gpg; on Debian: apt-get install debian-archive-keyring "
        "(or run as root with --install)\n"
    )
    assert not (tmp_path / "sources").exists()
