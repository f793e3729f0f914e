"""What an enclave boots from beside its root: kernel, command line, init and, for a kernel that has it as a module, the
NSM's driver. AWS's where nitro-cli has installed them, else ours, which ``scripts/machine`` builds into the cache.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from attestation.eif import Architecture
from attestation.errors import EvidenceError
from attestation.strict_json import decode_foreign
from parent.cache import entries
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

SOURCES: Final = Path(__file__).resolve().parents[2] / "enclave" / "machine"
"""What our init is made from, where this package is run from a checkout; an installation has nothing there."""
MAX_BLOB: Final = 256 << 20
"""Bytes of a kernel, an init or a driver; ours have 8 MB, AWS's 10."""

_DIGESTS: Final = {"kernel.json": "image_sha256", "init.json": "init_sha256"}
"""What a description calls the digest of what it describes."""
_SOURCE_DIGESTS: Final = {"init_c_sha256": "init.c", "checks_h_sha256": "checks.h", "cmdline_sha256": "cmdline"}
"""What the init's description calls the digests of its sources."""
_MAX_RECIPE: Final = 128
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
class Blob:
    """A file as it was read, once: these bytes are described, hashed and written, whatever becomes of the file."""

    path: Path
    data: bytes = field(repr=False)
    description: Mapping[str, str] = field(default_factory=dict)
    """What our scripts have written beside it: its version, compiler and sources. Empty for one that is not ours."""

    @classmethod
    def read(cls, path: Path, description: str | None = None) -> Blob:
        """``description`` is the name of the file beside it. Raises ImageBuildError ``bad_blob``,
        ``bad_description``, and OSError.
        """
        with path.open("rb") as file:
            data = file.read(MAX_BLOB + 1)
        if len(data) > MAX_BLOB:
            raise ImageBuildError("bad_blob", f"{str(path)!a} is too large", expected=f"at most {MAX_BLOB} bytes")
        blob = cls(path, data, {} if description is None else _described(path.with_name(description)))
        claimed = None if description is None else blob.description.get(_DIGESTS[description])
        if claimed not in (None, blob.sha256):
            message = f"{str(path)!a} is not what {description} beside it was written for: make it anew"
            raise ImageBuildError("bad_blob", message, expected=ascii(claimed)[1:-1][:100], got=blob.sha256)
        return blob

    @property
    def sha256(self) -> str:
        """Hexadecimal."""
        return hashlib.sha256(self.data).hexdigest()

    def material(self, name: str) -> Material:
        """For the record of a build, with the description."""
        return Material(name, {"sha256": self.sha256}, self.description)


@dataclass(frozen=True, slots=True)
class Blobs:
    """What an image boots from."""

    origin: str
    """For a person."""
    kernel: Blob
    kernel_version: str
    init: Blob
    cmdline: str
    nsm_module: Blob | None
    cmdline_copy: bool

    def materials(self) -> Iterator[Material]:
        """Each of them with its digest."""
        yield self.kernel.material("kernel")
        yield self.init.material("init")
        yield Material("cmdline", {"sha256": hashlib.sha256(self.cmdline.encode()).hexdigest()})
        if self.nsm_module is not None:
            yield self.nsm_module.material("nsm.ko")


def find_blobs(choice: BlobChoice, architecture: Architecture) -> Blobs:
    """The blobs that ``choice`` means, read.

    Of ours, the newest kernel and init that the cache has, where all that it has are made by one recipe: another recipe
    is another kernel, and then the caller has to say which. In a checkout only inits of the checkout's own sources
    count. Raises ImageBuildError: ``missing_blobs``, ``ambiguous_blobs``, ``stale_blobs``, ``bad_blob``,
    ``bad_description``; CacheError; and OSError.
    """
    folder, own = choice.folder, False
    if choice.kernel is not None and choice.init is not None and choice.cmdline is not None and folder is None:
        base, origin = _Folder(None, None, None, None), "given one by one"
    elif folder == OWN or (folder is None and not (AWS_FOLDER / KERNELS[architecture]).is_file()):
        base, origin, own = _own(choice, architecture), "ours, from the cache", True
    else:
        place = AWS_FOLDER if folder in (None, AWS) else Path(str(folder))
        base, origin = _of_folder(place, architecture), f"in {place}"
    kernel_file = _required(choice.kernel or base.kernel, KERNELS[architecture], "scripts/machine/kernel", own)
    init_file = _required(choice.init or base.init, "init", "scripts/machine/init", own)
    cmdline = base.cmdline if choice.cmdline is None else choice.cmdline
    if cmdline is None:
        raise _missing("the kernel's command line", "--cmdline TEXT, or a file cmdline in the folder")
    kernel = Blob.read(kernel_file, DESCRIPTIONS["kernel"])
    module = choice.nsm_module or base.nsm_module
    return Blobs(
        origin=origin,
        kernel=kernel,
        kernel_version=_kernel_version(kernel),
        init=Blob.read(init_file, DESCRIPTIONS["init"]),
        cmdline=cmdline,
        nsm_module=None if module is None else Blob.read(module),
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


def _own(choice: BlobChoice, architecture: Architecture) -> _Folder:
    kernel = init = cmdline = None
    if choice.kernel is None:
        found = _of_one_recipe("kernel", entries("kernel", KERNELS[architecture]))
        kernel = None if found is None else found / KERNELS[architecture]
    if choice.init is None or choice.cmdline is None:
        found = _of_one_recipe("init", _of_these_sources(entries("init", "init")))
        init, cmdline = (None, None) if found is None else (found / "init", _own_cmdline(found))
    return _Folder(kernel, init, cmdline, None)


def _own_cmdline(init: Path) -> str | None:
    """The one that the init compares with. Raises ImageBuildError ``bad_blob``."""
    cmdline, claimed = _read_cmdline(init / "cmdline"), _described(init / DESCRIPTIONS["init"]).get("cmdline_sha256")
    if cmdline is not None and claimed is not None:
        got = hashlib.sha256(cmdline.encode("latin-1")).hexdigest()
        if got != claimed:
            message = f"{str(init / 'cmdline')!a} is not what {DESCRIPTIONS['init']} beside it was written for"
            raise ImageBuildError("bad_blob", message, expected=ascii(claimed)[1:-1][:100], got=got)
    return cmdline


def _of_one_recipe(script: str, found: Sequence[Path]) -> Path | None:
    """The newest: entries of one recipe differ in the version of what it was made from."""
    if len({_recipe(entry) for entry in found}) > 1:
        raise ImageBuildError(
            "ambiguous_blobs",
            f"the cache has what scripts/machine/{script} made by several recipes: name one, or remove the others",
            expected=f"--{script} FILE, in the folder that scripts/machine/{script} prints",
            got=", ".join(sorted(entry.name for entry in found)),
        )
    return found[0] if found else None


def _recipe(entry: Path) -> bytes:
    """What lib.sh writes into each entry; one without it is of a recipe of its own."""
    try:
        with (entry / "recipe").open("rb") as file:
            return file.read(_MAX_RECIPE)
    except FileNotFoundError:
        return os.fsencode(entry.name)


def _of_these_sources(found: Sequence[Path]) -> Sequence[Path]:
    """In a checkout, those of the inits that are made from what it has now."""
    if not found or not (SOURCES / "init.c").is_file():
        return found
    here = {name: _digest_of_source(SOURCES / file) for name, file in _SOURCE_DIGESTS.items()}
    matching = [
        entry
        for entry in found
        if (said := _described(entry / DESCRIPTIONS["init"])) and all(said.get(name) == here[name] for name in here)
    ]
    if not matching:
        raise ImageBuildError(
            "stale_blobs",
            "no init in the cache is made from the sources of this checkout: run scripts/machine/init, or name one",
            expected=f"init.c {here['init_c_sha256']}",
            got=", ".join(sorted(entry.name for entry in found)),
        )
    return matching


def _digest_of_source(path: Path) -> str:
    """The command line as the script keeps it: without line feeds."""
    data = path.read_bytes()
    return hashlib.sha256(data.replace(b"\n", b"") if path.name == "cmdline" else data).hexdigest()


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


def _kernel_version(kernel: Blob) -> str:
    """From the configuration beside the kernel, as nitro-cli does, or from the bzImage itself."""
    config = kernel.path.with_name(f"{kernel.path.name}.config")
    if config.is_file():
        with config.open("rb") as file:
            said = _CONFIG_VERSION.search(file.read(_MAX_CONFIG))
        if said is not None:
            return said[1].decode("ascii", "backslashreplace")
    if kernel.data[_BZIMAGE_MAGIC] == b"HdrS":
        said = _VERSION.match(kernel.data, 0x200 + int.from_bytes(kernel.data[_BZIMAGE_VERSION], "little"))
        if said is not None:
            return said[1].decode("ascii")
    return "unknown"


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
