"""Confinement, tried from inside: a process that has confined itself reports what it can still do."""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from enclave import confine

ATTEMPTS = """
import ctypes, errno, json, mmap, os, socket, sys, threading, time
from enclave import confine

started = threading.Event()
told = threading.Event()
answers = {}

def attempt(name, act):
    try:
        act()
        answers[name] = 0
    except OSError as error:
        answers[name] = error.errno
    except RuntimeError:  # what Python makes of a thread that cannot start
        answers[name] = errno.EPERM

def in_another_thread():
    started.set()
    told.wait()
    attempt("open in another thread", lambda: os.open("/proc/self/status", os.O_RDONLY))

libc = ctypes.CDLL(None, use_errno=True)
libc.mmap.restype = ctypes.c_void_p

def executable_memory():
    address = libc.mmap(None, 4096, 7, 0x22, -1, 0)
    if address == ctypes.c_void_p(-1).value:
        raise OSError(ctypes.get_errno(), "mmap")

def becomes_executable():
    memory = mmap.mmap(-1, 4096)
    address = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    if libc.mprotect(ctypes.c_void_p(address), 4096, 5) != 0:
        raise OSError(ctypes.get_errno(), "mprotect")

def call(number, *arguments):
    if libc.syscall(ctypes.c_long(number), *(ctypes.c_long(argument) for argument in arguments)) < 0:
        raise OSError(ctypes.get_errno(), "syscall")

other = threading.Thread(target=in_another_thread)
other.start()
started.wait()
confine.forbid_core_dumps()
confine.become(int(sys.argv[1]))
confine.die_with(os.getppid())
confine.forbid_new_privileges()
seccomp = confine.allow_decoding_only()
attempt("nothing", lambda: None)
attempt("compute", lambda: (bytearray(50 << 20), time.monotonic(), time.sleep(0), os.getpid(), os.urandom(8)))
attempt("open", lambda: os.open("/proc/self/status", os.O_RDONLY))
attempt("exec", lambda: os.execv("/bin/true", ["true"]))
attempt("fork", os.fork)
attempt("socket", lambda: socket.socket(socket.AF_INET))
attempt("vsock", lambda: socket.socket(socket.AF_VSOCK))
attempt("socketpair", socket.socketpair)
attempt("kill", lambda: os.kill(os.getppid(), 0))
attempt("ptrace", lambda: libc.ptrace(0, 0, 0, 0) == -1 and (_ for _ in ()).throw(OSError(ctypes.get_errno(), "")))
attempt("setuid", lambda: os.setuid(0))
attempt("unlink", lambda: os.unlink("/nonexistent"))
attempt("memfd", lambda: os.memfd_create("x"))
attempt("thread", lambda: threading.Thread(target=int).start())
attempt("executable memory", executable_memory)
attempt("memory becomes executable", becomes_executable)
attempt("prctl dumpable", lambda: confine.set_dumpable(True))
told.set()
other.join()
json.dump({"seccomp": seccomp, "answers": answers}, sys.stdout)
"""


def run(code: str, *arguments: str) -> dict[str, object]:
    done = subprocess.run([sys.executable, "-I", "-c", code, *arguments], capture_output=True, check=False, timeout=60)
    assert done.returncode == 0, done.stderr.decode()
    report: dict[str, object] = json.loads(done.stdout)
    return report


def test_behind_the_filter_there_is_nothing_but_computing() -> None:
    report = run(ATTEMPTS, "64001")
    if not report["seccomp"]:
        pytest.skip("this kernel has no seccomp filters")
    answers = report["answers"]
    assert isinstance(answers, dict)
    allowed = {"nothing", "compute"}
    assert {name for name, number in answers.items() if number == 0} == allowed
    assert {name for name, number in answers.items() if number == errno.EPERM} == answers.keys() - allowed
    assert len(answers) == 18


@pytest.mark.skipif(os.geteuid() != 0, reason="only root changes its user")
def test_a_root_process_becomes_another_user_for_good() -> None:
    report = run(
        "import json, os, resource, sys\n"
        "from enclave import confine\n"
        "confine.forbid_core_dumps()\n"
        "changed = confine.become(64001)\n"
        "try:\n"
        "    os.setuid(0)\n"
        "except PermissionError as error:\n"
        "    back = error.errno\n"
        "status = open('/proc/thread-self/status').read()\n"
        "json.dump({'changed': changed, 'users': os.getresuid(), 'groups': os.getresgid(), 'others': os.getgroups(),\n"
        "           'back': back, 'core': resource.getrlimit(resource.RLIMIT_CORE), 'status': status}, sys.stdout)\n"
    )
    status = report.pop("status")
    assert report == {
        "changed": True,
        "users": [64001] * 3,
        "groups": [64001] * 3,
        "others": [],
        "back": errno.EPERM,
        "core": [0, 0],
    }
    assert isinstance(status, str)
    assert re.search(r"^CapPrm:\t0+$", status, re.MULTILINE)


@pytest.mark.skipif(shutil.which("unshare") is None, reason="util-linux's unshare is not here")
def test_the_root_of_a_small_user_namespace_stays_who_it_is_and_says_so() -> None:
    code = (
        "from enclave import confine\n"
        "print(confine.become(64001))\n"
        "confine.drop_capabilities()\n"
        "lines = open('/proc/thread-self/status').read().splitlines()\n"
        "print(*(line.split()[1] for line in lines if line.startswith(('CapEff', 'CapPrm'))))"
    )
    command = ["unshare", "--user", "--map-root-user", sys.executable, "-I", "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0 and "unshare" in done.stderr:
        pytest.skip("this system gives no user namespaces")
    assert done.stdout == f"False\n{'0' * 16} {'0' * 16}\n", done.stderr


def test_no_new_resources() -> None:
    report = run(
        "import json, os, sys\n"
        "from enclave import confine\n"
        "confine.become(64001)\n"
        "confine.forbid_new_resources()\n"
        "answers = []\n"
        "for act in (lambda: os.open('/', os.O_RDONLY), lambda: os.dup(0)):\n"
        "    try:\n"
        "        act()\n"
        "    except OSError as error:\n"
        "        answers.append(error.errno)\n"
        "json.dump({'answers': answers}, sys.stdout)\n"
    )
    assert report == {"answers": [errno.EMFILE, errno.EMFILE]}


def test_a_process_whose_parent_is_gone_does_not_go_on() -> None:
    with pytest.raises(ProcessLookupError):
        # This process's own parent is not itself; the signal it also asked for never comes while pytest's parent lives.
        confine.die_with(os.getpid())
    confine._prctl(confine._PR_SET_PDEATHSIG, 0)


def test_all_but_some_descriptors_are_closed() -> None:
    report = run(
        "import json, os, sys\n"
        "from enclave import confine\n"
        "first, second = os.pipe()\n"
        "third, fourth = os.pipe()\n"
        "confine.close_all_but({0, second, fourth})\n"
        "alive = []\n"
        "for number in (0, 1, 2, first, second, third, fourth):\n"
        "    try:\n"
        "        os.fstat(number)\n"
        "        alive.append(True)\n"
        "    except OSError:\n"
        "        alive.append(False)\n"
        "json.dump({'alive': alive}, sys.stdout)\n"
    )
    assert report == {"alive": [True, True, True, False, True, False, True]}


HEADERS = {
    "x86_64": [Path("/usr/include/x86_64-linux-gnu/asm/unistd_64.h"), Path("/usr/include/asm/unistd_64.h")],
    "aarch64": [Path("/usr/include/asm-generic/unistd.h")],
}


@pytest.mark.parametrize("machine", HEADERS)
def test_the_numbers_are_those_of_the_kernel_s_headers(machine: str) -> None:
    header = next((path for path in HEADERS[machine] if path.exists()), None)
    if header is None:
        pytest.skip(f"the kernel's headers for {machine} are not installed")
    found = re.findall(r"^#define __NR(?:3264)?_(\w+)\s+(\d+)$", header.read_text(), re.MULTILINE)
    numbers = {name: int(number) for name, number in found}
    _, seccomp, allowed = confine._MACHINES[machine]
    assert seccomp == numbers["seccomp"]
    assert {name: numbers[name] for name in allowed} == dict(allowed)
