"""What a process gives up: its user, its descriptors, its core dumps and, by a seccomp filter, every system call that
decoding does not need.

Hand-made over prctl(2) and seccomp(2), without a library: it is a page, and it stands between a prompt that has taken
over llama.cpp and the enclave.
"""

from __future__ import annotations

import ctypes
import errno
import os
import platform
import resource
import struct
from collections.abc import Mapping, Set
from typing import Final

# linux/prctl.h, linux/seccomp.h, linux/audit.h
_PR_SET_PDEATHSIG, _PR_SET_DUMPABLE, _PR_SET_NO_NEW_PRIVS = 1, 4, 38
_SIGKILL = 9
_LINUX_CAPABILITY_VERSION_3 = 0x20080522
_SECCOMP_SET_MODE_FILTER, _SECCOMP_FILTER_FLAG_TSYNC = 1, 1
_RET_ALLOW, _RET_KILL_PROCESS, _RET_EPERM = 0x7FFF0000, 0x80000000, 0x00050000 | errno.EPERM
_PROT_EXEC = 4

# BPF: load a word of struct seccomp_data, jump if equal, jump if any bit is set, return.
_LOAD, _IF_EQUAL, _IF_BITS, _RETURN = 0x20, 0x15, 0x45, 0x06
_DATA_NUMBER, _DATA_ARCHITECTURE, _DATA_ARGUMENT_2 = 0, 4, 32

_X86_64: Final[Mapping[str, int]] = {
    "read": 0,
    "write": 1,
    "close": 3,
    "poll": 7,
    "lseek": 8,
    "mmap": 9,
    "mprotect": 10,
    "munmap": 11,
    "brk": 12,
    "rt_sigaction": 13,
    "rt_sigprocmask": 14,
    "rt_sigreturn": 15,
    "sched_yield": 24,
    "mremap": 25,
    "madvise": 28,
    "nanosleep": 35,
    "getpid": 39,
    "sendto": 44,
    "recvfrom": 45,
    "exit": 60,
    "gettimeofday": 96,
    "gettid": 186,
    "futex": 202,
    "restart_syscall": 219,
    "clock_gettime": 228,
    "clock_nanosleep": 230,
    "exit_group": 231,
    "set_robust_list": 273,
    "getrandom": 318,
    "rseq": 334,
}
_AARCH64: Final[Mapping[str, int]] = {
    "close": 57,
    "lseek": 62,
    "read": 63,
    "write": 64,
    "ppoll": 73,
    "exit": 93,
    "exit_group": 94,
    "futex": 98,
    "set_robust_list": 99,
    "nanosleep": 101,
    "clock_gettime": 113,
    "clock_nanosleep": 115,
    "sched_yield": 124,
    "restart_syscall": 128,
    "rt_sigaction": 134,
    "rt_sigprocmask": 135,
    "rt_sigreturn": 139,
    "gettimeofday": 169,
    "getpid": 172,
    "gettid": 178,
    "sendto": 206,
    "recvfrom": 207,
    "brk": 214,
    "munmap": 215,
    "mremap": 216,
    "mmap": 222,
    "mprotect": 226,
    "madvise": 233,
    "getrandom": 278,
    "rseq": 293,
}
_NO_EXECUTABLE_MEMORY: Final = frozenset({"mmap", "mprotect"})
"""Allowed without PROT_EXEC only, which is in the third argument of both."""
_MACHINES: Final[Mapping[str, tuple[int, int, Mapping[str, int]]]] = {
    # AUDIT_ARCH, the number of seccomp(2), the allow-list
    "x86_64": (0xC000003E, 317, _X86_64),
    "aarch64": (0xC00000B7, 277, _AARCH64),
}

_libc: Final = ctypes.CDLL(None, use_errno=True)


class _Program(ctypes.Structure):
    """struct sock_fprog"""

    _fields_ = (("length", ctypes.c_ushort), ("instructions", ctypes.c_char_p))


def forbid_core_dumps() -> None:
    """No core file, and no reading of this process's memory by others of its user (ptrace, /proc). Raises OSError."""
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    set_dumpable(False)


def set_dumpable(dumpable: bool) -> None:
    """Whether this process's memory and /proc entries belong to its user. Raises OSError."""
    _prctl(_PR_SET_DUMPABLE, int(dumpable))


def become(uid: int) -> bool:
    """Becomes the user and group ``uid``, for good; False where this process may not, being not root, or root of a user
    namespace without that user.

    Raises OSError when only half of it was done, also when the old user could be had back.
    """
    if os.geteuid() != 0:
        return False
    try:
        os.setgroups([])
        os.setresgid(uid, uid, uid)
    except OSError as error:
        if error.errno in (errno.EPERM, errno.EINVAL):
            return False
        raise
    os.setresuid(uid, uid, uid)
    if os.getresuid() != (uid, uid, uid) or os.getresgid() != (uid, uid, uid) or os.getgroups():
        raise PermissionError("the user did not change")
    return True


def drop_capabilities() -> None:
    """Gives up every capability, which a root that could not change its user would keep. Raises OSError."""
    header = struct.pack("<Ii", _LINUX_CAPABILITY_VERSION_3, 0)
    if _libc.capset(ctypes.c_char_p(header), ctypes.c_char_p(bytes(24))) != 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))


def die_with(parent: int) -> None:
    """SIGKILL to this process as soon as ``parent`` is gone, or at once if it is. After :func:`become`, which would
    clear it. Raises OSError.
    """
    _prctl(_PR_SET_PDEATHSIG, _SIGKILL)
    if os.getppid() != parent:
        raise ProcessLookupError("the parent process is gone")


def forbid_new_privileges() -> None:
    """No exec gives more rights than this process has. Raises OSError."""
    _prctl(_PR_SET_NO_NEW_PRIVS, 1)


def close_all_but(keep: Set[int]) -> None:
    """Closes every other descriptor above standard error."""
    highest = os.sysconf("SC_OPEN_MAX")
    start = 3
    for descriptor in sorted(number for number in keep if number > 2):
        os.closerange(start, descriptor)
        start = descriptor + 1
    os.closerange(start, highest)


def forbid_new_resources() -> None:
    """No new descriptor, process or thread, no growing file: the bounds that hold even where the kernel has no
    seccomp. Raises OSError.

    Descriptors that are open stay open. The bound on processes does not bind root.
    """
    for limit, value in ((resource.RLIMIT_NOFILE, 1), (resource.RLIMIT_NPROC, 0), (resource.RLIMIT_FSIZE, 0)):
        resource.setrlimit(limit, (value, value))


def allow_decoding_only() -> bool:
    """From here on every thread of this process can make the system calls of the allow-list; all others fail with
    EPERM, for good.

    False where the kernel or the architecture has no seccomp filters. Needs :func:`forbid_new_privileges` before.
    Raises OSError.
    """
    machine = _MACHINES.get(platform.machine())
    if machine is None:
        return False
    architecture, seccomp, allowed = machine
    instructions = _filter(architecture, allowed)
    program = _Program(len(instructions) // 8, instructions)
    ctypes.set_errno(0)
    result = _libc.syscall(
        ctypes.c_long(seccomp),
        ctypes.c_ulong(_SECCOMP_SET_MODE_FILTER),
        ctypes.c_ulong(_SECCOMP_FILTER_FLAG_TSYNC),
        ctypes.byref(program),
    )
    if result == 0:
        return True
    if result > 0:
        raise OSError(errno.ESRCH, "a thread could not be confined")
    number = ctypes.get_errno()
    if number in (errno.ENOSYS, errno.EINVAL):
        return False
    raise OSError(number, os.strerror(number))


def _filter(architecture: int, allowed: Mapping[str, int]) -> bytes:
    """The filter's instructions. A system call of another architecture's table (32-bit, x32) has other numbers, so it
    matches nothing here or dies.
    """

    def instruction(code: int, value: int, if_true: int = 0, if_false: int = 0) -> bytes:
        return struct.pack("<HBBI", code, if_true, if_false, value)

    code = [
        instruction(_LOAD, _DATA_ARCHITECTURE),
        instruction(_IF_EQUAL, architecture, if_true=1),
        instruction(_RETURN, _RET_KILL_PROCESS),
        instruction(_LOAD, _DATA_NUMBER),
    ]
    for name, number in allowed.items():
        if name in _NO_EXECUTABLE_MEMORY:
            code += [
                instruction(_IF_EQUAL, number, if_false=4),
                instruction(_LOAD, _DATA_ARGUMENT_2),
                instruction(_IF_BITS, _PROT_EXEC, if_false=1),
                instruction(_RETURN, _RET_EPERM),
                instruction(_RETURN, _RET_ALLOW),
            ]
        else:
            code += [instruction(_IF_EQUAL, number, if_false=1), instruction(_RETURN, _RET_ALLOW)]
    code.append(instruction(_RETURN, _RET_EPERM))
    return b"".join(code)


def _prctl(option: int, value: int) -> None:
    zero = ctypes.c_ulong(0)
    if _libc.prctl(ctypes.c_int(option), ctypes.c_ulong(value), zero, zero, zero) != 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))
