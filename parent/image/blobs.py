"""What an enclave boots from beside its root: kernel, command line, init and, for a kernel that has it as a module, the
NSM's driver. AWS's where nitro-cli has installed them, else ours, which ``scripts/machine`` builds into the cache.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from attestation.eif import Architecture
from attestation.errors import EvidenceError
from attestation.strict_json import decode_foreign
from parent.cache import newest
from parent.image.source import Material
from parent.image.tree import ImageBuildError

AWS_FOLDER: Final = Path("/usr/share/nitro_enclaves/blobs")
"""Where nitro-cli's packages put them."""
AWS: Final = "aws"
OWN: Final = "own"
KERNELS: Final = {Architecture.X86_64: "bzImage", Architecture.AARCH64: "Image"}
"""What AWS calls the kernel, by architecture; so do we."""

DESCRIPTIONS: Final = {"kernel": "kernel.json", "init": "init.json"}
"""The files that our scripts write beside what they build."""

_MAX_CMDLINE_FILE: Final = 4096
_MAX_DESCRIPTION: Final = 65_536
_MAX_CONFIG: Final = 4 << 20
_CONFIG_VERSION: Final = re.compile(rb"^# Linux/\S+ (\S{1,64}) Kernel Configuration$", re.MULTILINE)
_VERSION: Final = re.compile(rb"([!-~]{1,64})[ \x00]")
_BZIMAGE_MAGIC: Final = slice(0x202, 0x206)
_BZIMAGE_VERSION: Final = slice(0x20E, 0x210)
"""Linux, Documentation/arch/x86/boot.rst: where the text with the kernel's version is, less 0x200."""


@dataclass(frozen=True, slots=True, kw_only=True)
class BlobChoice:
    """What a caller wants to boot from. What is None comes from the folder."""

    folder: str | None = None
    """A folder as nitro-cli has it, ``aws`` or ``own``. None: AWS's where they are installed, else ours."""
    kernel: Path | None = None
    init: Path | None = None
    cmdline: str | None = None
    nsm_module: Path | None = None
    cmdline_copy: bool | None = None
    """Whether the first ramdisk holds the command line for the init to compare. None: unless the init is AWS's."""


@dataclass(frozen=True, slots=True)
class Blobs:
    """What an image boots from."""

    origin: str
    """For a person."""
    kernel: Path
    kernel_version: str
    init: Path
    cmdline: str
    nsm_module: Path | None
    cmdline_copy: bool

    def materials(self) -> Iterator[Material]:
        """Each of them with its digest. Raises ImageBuildError ``bad_description``, OSError."""
        yield _material("kernel", self.kernel, DESCRIPTIONS["kernel"])
        yield _material("init", self.init, DESCRIPTIONS["init"])
        yield Material("cmdline", {"sha256": hashlib.sha256(self.cmdline.encode()).hexdigest()})
        if self.nsm_module is not None:
            yield _material("nsm.ko", self.nsm_module)


def find_blobs(choice: BlobChoice, architecture: Architecture) -> Blobs:
    """The blobs that ``choice`` means. Raises ImageBuildError ``missing_blobs``."""
    folder, own = choice.folder, False
    if choice.kernel is not None and choice.init is not None and choice.cmdline is not None and folder is None:
        base, origin = _Folder(None, None, None, None), "given one by one"
    elif folder == OWN or (folder is None and not (AWS_FOLDER / KERNELS[architecture]).is_file()):
        base, origin, own = _own(architecture), "ours, from the cache", True
    else:
        place = AWS_FOLDER if folder in (None, AWS) else Path(str(folder))
        base, origin = _of_folder(place, architecture), f"in {place}"
    kernel = _required(choice.kernel or base.kernel, KERNELS[architecture], "scripts/machine/kernel", own)
    init = _required(choice.init or base.init, "init", "scripts/machine/init", own)
    cmdline = base.cmdline if choice.cmdline is None else choice.cmdline
    if cmdline is None:
        raise _missing("the kernel's command line", "--cmdline TEXT, or a file cmdline in the folder")
    return Blobs(
        origin=origin,
        kernel=kernel,
        kernel_version=_kernel_version(kernel),
        init=init,
        cmdline=cmdline,
        nsm_module=choice.nsm_module or base.nsm_module,
        cmdline_copy=(own or choice.init is not None) if choice.cmdline_copy is None else choice.cmdline_copy,
    )


@dataclass(frozen=True, slots=True)
class _Folder:
    kernel: Path | None
    init: Path | None
    cmdline: str | None
    nsm_module: Path | None


def _of_folder(folder: Path, architecture: Architecture) -> _Folder:
    def found(name: str) -> Path | None:
        return folder / name if (folder / name).is_file() else None

    return _Folder(found(KERNELS[architecture]), found("init"), _read_cmdline(found("cmdline")), found("nsm.ko"))


def _own(architecture: Architecture) -> _Folder:
    kernel, init = newest("kernel", KERNELS[architecture]), newest("init", "init")
    return _Folder(
        None if kernel is None else kernel / KERNELS[architecture],
        None if init is None else init / "init",
        None if init is None else _read_cmdline(init / "cmdline"),
        None,
    )


def _read_cmdline(path: Path | None) -> str | None:
    """As nitro-cli takes the file: without the white space around the line."""
    if path is None or not path.is_file():
        return None
    with path.open("rb") as file:
        return file.read(_MAX_CMDLINE_FILE).decode("latin-1").strip()


def _required(path: Path | None, name: str, script: str, own: bool) -> Path:
    if path is None or not path.is_file():
        hint = f"run {script} once, which builds it into the cache" if own else f"a file {name}"
        raise _missing(name if path is None else f"{str(path)!a}", f"{hint}; or name one, see --help")
    return path


def _missing(what: str, expected: str) -> ImageBuildError:
    return ImageBuildError("missing_blobs", f"nothing to boot the image from: {what} is not there", expected=expected)


def _kernel_version(kernel: Path) -> str:
    """From the configuration beside the kernel, as nitro-cli does, or from the bzImage itself."""
    config = kernel.with_name(f"{kernel.name}.config")
    if config.is_file():
        with config.open("rb") as file:
            said = _CONFIG_VERSION.search(file.read(_MAX_CONFIG))
        if said is not None:
            return said[1].decode("ascii", "backslashreplace")
    with kernel.open("rb") as file:
        head = file.read(0x210)
        if head[_BZIMAGE_MAGIC] == b"HdrS":
            file.seek(0x200 + int.from_bytes(head[_BZIMAGE_VERSION], "little"))
            said = _VERSION.match(file.read(65))
            if said is not None:
                return said[1].decode("ascii")
    return "unknown"


def _material(name: str, path: Path, description: str | None = None) -> Material:
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return Material(name, {"sha256": digest}, {} if description is None else _described(path.with_name(description)))


def _described(path: Path) -> Mapping[str, str]:
    """What our scripts write beside what they build: its version, compiler and sources."""
    if not path.is_file():
        return {}
    with path.open("rb") as file:
        data = file.read(_MAX_DESCRIPTION)
    try:
        fields = decode_foreign(data, code="bad_description", max_depth=2)
    except EvidenceError as error:
        raise ImageBuildError(error.code, f"{str(path)!a}: {error.message}") from error
    if not isinstance(fields, dict):
        raise ImageBuildError("bad_description", f"{str(path)!a}", expected="an object", got=type(fields).__name__)
    return {name: value for name, value in fields.items() if isinstance(value, str)}
