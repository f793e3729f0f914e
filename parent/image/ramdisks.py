"""The two ramdisks of an enclave image, in the layout that AWS's init and ours expect.

What nitro-cli has linuxkit build (aws/aws-nitro-enclaves-cli at 3680b3055a01, enclave_build/src/yaml_generator.rs):
the first, which PCR1 is over, holds ``dev``, ``init`` and ``nsm.ko``; the second, which PCR2 is over, holds ``cmd``,
``env`` and ``rootfs`` with six directories. The init reads ``cmd`` and ``env`` one entry a line and makes ``rootfs``
the root (aws/aws-nitro-enclaves-sdk-bootstrap at 2ccb146f1629, init/init.c). Where ``cmd`` is empty it runs ``sh``.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from parent.image.tree import Content, Directory, Entry, File, ImageBuildError, Tree

ROOT: Final = "rootfs"
MOUNT_POINTS: Final = ("dev", "proc", "run", "sys", "tmp", "var")
"""In the root: what the init mounts on, and ``var``, which AWS's tool makes beside them."""
MAX_LINE: Final = (1 << 17) - 1
"""Bytes of an argument or a variable: Linux's MAX_ARG_STRLEN less the final NUL."""
MAX_LINES: Final = 4095
"""Of ``cmd``, and of ``env``; with ``MAX_LINES_SIZE`` what our init reads (enclave/machine/init.c)."""
MAX_LINES_SIZE: Final = (256 << 10) - 1
"""Bytes of each."""


def boot_ramdisk(*, init: Content, cmdline: str | None = None, nsm: Content | None = None) -> Tree:
    """The first ramdisk. ``cmdline`` is the kernel's, for an init that compares; ``nsm`` the driver, for a kernel whose
    own is a module. Raises OSError where a file is not there.
    """
    entries: list[Entry] = [Directory("dev", 0o755), File.of("init", init, 0o755)]
    if cmdline is not None:
        entries.append(File.holding("cmdline", cmdline.encode("utf-8")))
    if nsm is not None:
        entries.append(File.of("nsm.ko", nsm, 0o755))
    return Tree.of(entries)


def customer_ramdisk(root: Tree, *, cmd: Sequence[str], env: Sequence[str] = ()) -> Tree:
    """The second ramdisk: ``root`` and what to run in it, ``cmd`` with the variables ``env`` (``NAME=value``).

    Raises ImageBuildError: ``bad_command``, ``bad_environment`` for what would be read as something else;
    ``not_a_directory`` where the root has something else in the place of a mount point; ``bad_path``.
    """
    names = [line.partition("=")[0] for line in env]
    if not cmd or not cmd[0]:
        raise ImageBuildError("bad_command", "nothing to run", expected="a program", got=ascii(list(cmd)))
    for name, line in zip(names, env, strict=True):
        if not name or "=" not in line:
            raise ImageBuildError("bad_environment", "not a variable", expected="NAME=value", got=ascii(line)[:100])
        if names.count(name) > 1:
            raise ImageBuildError("bad_environment", "a variable is there twice", expected="one", got=ascii(name))
    return Tree.of(
        [
            File.holding("cmd", _lines("bad_command", cmd)),
            File.holding("env", _lines("bad_environment", env)),
            *_with_mount_points(root).under(ROOT).values(),
        ]
    )


def _with_mount_points(root: Tree) -> Tree:
    for path in MOUNT_POINTS:
        if not isinstance(root.get(path), Directory | None):
            got = type(root[path]).__name__
            raise ImageBuildError("not_a_directory", f"the root's {path}", expected="a directory or nothing", got=got)
    missing = [Directory(path, 0o755) for path in MOUNT_POINTS if path not in root]
    return Tree.of([*root.values(), *missing])


def _lines(code: str, lines: Sequence[str]) -> bytes:
    encoded = []
    for line in lines:
        try:
            encoded.append(line.encode("utf-8", "surrogateescape"))
        except UnicodeEncodeError as error:
            raise ImageBuildError(code, "not text", expected="UTF-8", got=ascii(line)[:100]) from error
        if "\n" in line or "\0" in line or len(encoded[-1]) > MAX_LINE:
            expected = f"at most {MAX_LINE} bytes without line feed and NUL"
            raise ImageBuildError(code, "not a line", expected=expected, got=ascii(line)[:100])
    written = b"".join(line + b"\n" for line in encoded)
    if len(lines) > MAX_LINES or len(written) > MAX_LINES_SIZE:
        expected, got = f"{MAX_LINES} lines, {MAX_LINES_SIZE} bytes", f"{len(lines)} lines, {len(written)} bytes"
        raise ImageBuildError(code, "more than the init reads", expected=f"at most {expected}", got=got)
    return written
