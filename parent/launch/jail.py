"""``python -m parent.launch.jail [limits] -- COMMAND``: becomes COMMAND, with less than its parent had.

A process of its own does this between fork and exec, so that nothing has to run in the forked copy of a program with
threads.
"""

from __future__ import annotations

import argparse
import ctypes
import os
import resource
import signal
import sys
from pathlib import Path

CLONE_NEWUSER = 0x10000000
CLONE_NEWNET = 0x40000000
PR_SET_PDEATHSIG = 1


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m parent.launch.jail", description=__doc__)
    parser.add_argument("--address-space", type=int, metavar="BYTES", help="limit of address space, of each process")
    parser.add_argument("--cpus", type=int, metavar="N", help="run on the first N of the CPUs allowed now")
    parser.add_argument(
        "--no-network", action="store_true", help="in a new network namespace, where the system allows it"
    )
    parser.add_argument(
        "--parent", type=int, metavar="PID", help="who starts this: COMMAND is not run without it, and ends with it"
    )
    parser.add_argument("command", nargs=argparse.REMAINDER)
    options = parser.parse_args()
    command = options.command[1:] if options.command[:1] == ["--"] else options.command
    if not command:
        parser.error("no command")
    libc = ctypes.CDLL(None, use_errno=True)
    if options.no_network:
        leave_network(libc)
    if options.cpus:
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: options.cpus])
    if options.address_space:
        resource.setrlimit(resource.RLIMIT_AS, (options.address_space, options.address_space))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    parent = os.getppid() if options.parent is None else options.parent
    libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != parent:  # it died before, and no signal will come
        sys.exit(1)
    os.execv(command[0], command)  # noqa: S606 - becoming the command is the point


def leave_network(libc: ctypes.CDLL) -> bool:
    """Enters a network namespace without interfaces. Returns whether the system allowed it; the launcher reads /proc
    and says so."""
    if libc.unshare(CLONE_NEWNET) == 0:
        return True
    # With a user namespace of its own, an unprivileged process may. Some systems allow that namespace and then not its
    # map (AppArmor on Ubuntu): there is no way back from there, so a copy tries it first.
    copy = os.fork()
    if copy == 0:
        os._exit(0 if enter_own_user(libc) else 1)
    return os.waitpid(copy, 0)[1] == 0 and enter_own_user(libc)


def enter_own_user(libc: ctypes.CDLL) -> bool:
    """A user namespace in which this user is itself and nobody else, and a network namespace that belongs to it."""
    uid, gid = os.getuid(), os.getgid()
    if libc.unshare(CLONE_NEWUSER | CLONE_NEWNET) != 0:
        return False
    try:
        Path("/proc/self/setgroups").write_text("deny")
        Path("/proc/self/uid_map").write_text(f"{uid} {uid} 1")
        Path("/proc/self/gid_map").write_text(f"{gid} {gid} 1")
    except OSError:
        return False
    return True


if __name__ == "__main__":
    main()
