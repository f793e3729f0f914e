"""The jail, as the launcher uses it: a process that becomes another one, with less than its parent had."""

from __future__ import annotations

import json
import os
import resource
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

REPOSITORY = Path(__file__).resolve().parents[2]
JAIL = [sys.executable, "-m", "parent.launch.jail"]
NOBODY = 65534


def jailed(*options: str, program: str, **how: Any) -> subprocess.CompletedProcess[str]:
    """Runs a Python program in the jail."""
    return subprocess.run(
        [*JAIL, *options, "--", sys.executable, "-c", program],
        cwd=REPOSITORY, capture_output=True, text=True, check=False, **how,
    )  # fmt: skip


def told(*options: str, program: str, **how: Any) -> Any:
    """What the program prints, as JSON."""
    done = jailed(*options, program=f"import json, os, sys\n{program}", **how)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


# --- Becoming the command -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("code", [0, 1, 7, 255])
def test_the_exit_code_is_the_commands(code: int) -> None:
    assert jailed(program=f"raise SystemExit({code})").returncode == code


def test_it_is_the_same_process() -> None:
    """No wrapper stays behind: a signal to the process is one to the command."""
    command = [*JAIL, "--", sys.executable, "-c", "import os; print(os.getpid())"]
    with subprocess.Popen(command, cwd=REPOSITORY, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert int(process.stdout.read()) == process.pid


def test_arguments_pass_as_they_are() -> None:
    arguments = ["--cpus", "--", "-c", "", "a b", "ä", "--no-network"]
    done = subprocess.run(
        [*JAIL, "--", sys.executable, "-c", "import json, sys; print(json.dumps(sys.argv[1:]))", *arguments],
        cwd=REPOSITORY, capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert json.loads(done.stdout) == arguments


@pytest.mark.parametrize("arguments", [[], ["--"], ["--cpus", "1"], ["--cpus", "x", "--", "/bin/true"], ["--verbose"]])
def test_no_command_is_a_mistake_of_usage(arguments: list[str]) -> None:
    done = subprocess.run([*JAIL, *arguments], cwd=REPOSITORY, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "usage" in done.stderr


def test_a_command_that_is_not_there_fails() -> None:
    done = subprocess.run(
        [*JAIL, "--", "/nonexistent/command"], cwd=REPOSITORY, capture_output=True, text=True, check=False
    )
    assert done.returncode not in (0, 2)


# --- With less ----------------------------------------------------------------------------------------------------


def test_without_options_only_core_dumps_are_taken_away() -> None:
    program = """\
import resource
print(json.dumps([
    resource.getrlimit(resource.RLIMIT_CORE), resource.getrlimit(resource.RLIMIT_AS),
    sorted(os.sched_getaffinity(0)), os.readlink("/proc/self/ns/net"),
]))
"""
    core, address_space, cpus, network = told(program=program)
    assert core == [0, 0]
    assert tuple(address_space) == resource.getrlimit(resource.RLIMIT_AS)
    assert cpus == sorted(os.sched_getaffinity(0))
    assert network == os.readlink("/proc/self/ns/net")


def test_address_space_is_limited() -> None:
    limit = 512 << 20
    program = """\
import mmap, resource
try:
    mmap.mmap(-1, 1 << 30)
    enough = True
except OSError:
    enough = False
print(json.dumps([enough, resource.getrlimit(resource.RLIMIT_AS)]))
"""
    assert told("--address-space", str(limit), program=program) == [False, [limit, limit]]
    assert told(program=program)[0] is True


def test_cpus_are_the_first_of_those_allowed() -> None:
    allowed = sorted(os.sched_getaffinity(0))
    program = "print(json.dumps(sorted(os.sched_getaffinity(0))))"
    assert told("--cpus", "1", program=program) == allowed[:1]
    assert told("--cpus", str(len(allowed) + 7), program=program) == allowed
    assert told("--cpus", "0", program=program) == allowed


NETWORK = """\
import socket
uid_map = open("/proc/self/uid_map").read().split()
print(json.dumps([os.readlink("/proc/self/ns/net"), [name for _, name in socket.if_nameindex()], os.getuid(), uid_map]))
"""


def require_namespace(network: str) -> None:
    if network == os.readlink("/proc/self/ns/net"):
        pytest.skip("this system lets this user have no network namespace")


def test_a_network_without_interfaces() -> None:
    network, interfaces, uid, _ = told("--no-network", program=NETWORK)
    require_namespace(network)
    assert interfaces == ["lo"]
    assert uid == os.getuid()


def test_nothing_can_be_reached_from_there() -> None:
    program = """\
import errno, socket
network = os.readlink("/proc/self/ns/net")
try:
    socket.create_connection(("127.0.0.1", int(sys.argv[1])), timeout=5).close()
    print(json.dumps([network, True]))
except OSError as error:
    print(json.dumps([network, errno.errorcode.get(error.errno)]))
"""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        done = subprocess.run(
            [*JAIL, "--no-network", "--", sys.executable, "-c", "import json, os, sys\n" + program,
             str(listener.getsockname()[1])],
            cwd=REPOSITORY, capture_output=True, text=True, check=True,
        )  # fmt: skip
    network, reached = json.loads(done.stdout)
    require_namespace(network)
    assert reached in ("ENETUNREACH", "EADDRNOTAVAIL", "ECONNREFUSED")


def python_of_nobody() -> str:
    """A Python that another user may run."""
    for python in (str(Path(sys.executable).resolve()), "/usr/bin/python3"):
        try:
            subprocess.run([python, "-I", "-c", ""], user=NOBODY, group=NOBODY, cwd="/", check=True)
        except (OSError, subprocess.CalledProcessError):
            continue
        return python
    pytest.skip("there is no Python here that another user may run")


@pytest.mark.skipif(os.getuid() != 0, reason="only root can try this as another user")
def test_a_user_without_privileges_keeps_their_name_and_loses_the_network() -> None:
    """In a user namespace in which they are themselves, where the system allows it; else the command runs all the
    same."""
    python = python_of_nobody()
    jail = (REPOSITORY / "parent/launch/jail.py").read_text()
    done = subprocess.run(
        [python, "-I", "-c", jail, "--no-network", "--", python, "-I", "-c", "import json, os\n" + NETWORK],
        cwd="/", user=NOBODY, group=NOBODY, extra_groups=[], capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    network, interfaces, uid, uid_map = json.loads(done.stdout)
    assert uid == NOBODY
    require_namespace(network)
    assert interfaces == ["lo"]
    assert uid_map == [str(NOBODY), str(NOBODY), "1"]


# --- With its parent ----------------------------------------------------------------------------------------------


def test_it_dies_with_its_parent() -> None:
    """Killed, the parent can clean up nothing; the kernel does."""
    jailed_program = "import sys, time; print('ready', flush=True); time.sleep(600)"
    launcher = (
        "import subprocess, sys\n"
        f"subprocess.run([sys.executable, '-m', 'parent.launch.jail', '--', sys.executable, '-c', {jailed_program!r}])"
    )
    command = [sys.executable, "-c", launcher]
    with subprocess.Popen(command, cwd=REPOSITORY, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        process.kill()
        assert process.stdout.read() == ""  # the end comes when the last writer is gone: the jailed process


def test_the_command_is_not_run_when_the_parent_is_gone() -> None:
    """The kernel gave this process another parent before it could ask to die with the first."""
    done = jailed("--parent", str(os.getppid()), program="print('it runs')")
    assert (done.returncode, done.stdout) == (1, "")
    assert jailed("--parent", str(os.getpid()), program="").returncode == 0
