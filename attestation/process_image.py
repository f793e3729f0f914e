"""Reference values of an emulated enclave: PCR0, 1 and 2 over the files that its process runs (PROTOCOL.md section 4,
"Image").

A function of files on disk alone: it talks to neither the enclave nor the NSM, so that what it gives can be pinned
before either of them exists. It asks the interpreter in question where its files are, in a process of its own that
imports nothing of what is measured.

The measurement holds for an interpreter that is started isolated (``-I``), so that no environment variable speaks, and
with a private bytecode cache (``-X pycache_prefix``), so that nothing in ``__pycache__`` is run; nothing there is
measured. The system's own libraries are outside, as is the host.
"""

from __future__ import annotations

import hashlib
import json
import os
import stat
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import cbor2

from attestation.dependencies import APPLICATION_PACKAGES, ENCLAVE_DEPENDENCIES, STANDARD_LIBRARY_SKIPPED
from attestation.errors import StrongroomError
from attestation.reference import PcrSet, h384, once_extended

CONFIGURATION_LABEL = "enclave.toml"

_BYTECODE_CACHE = "__pycache__"
_SITE_FOLDERS = frozenset({"site-packages", "dist-packages"})
_IMPORTABLE = (".py", ".pyc", ".so")

_INQUIRY_SECONDS = 60.0
_INQUIRY = """
import sys
at_start = {module.__file__ for module in list(sys.modules.values()) if getattr(module, "__file__", None)}
import glob, importlib.metadata, importlib.util, json, os, site, sysconfig
dependencies, packages = json.loads(sys.argv[1])
def library():
    with open("/proc/self/maps") as maps:
        mapped = {line.split(maxsplit=5)[5].strip() for line in maps if len(line.split(maxsplit=5)) == 6}
    return sorted(path for path in mapped if os.path.basename(path).startswith("libpython"))
def startup():
    for folder in site.getsitepackages():
        for file in sorted(at_start | set(glob.glob(os.path.join(folder, "*.pth")))):
            inside = os.path.relpath(file, folder).split(os.sep)
            if inside[0] != os.pardir:
                yield [folder, inside[0]]
def files(name):
    try:
        distribution = importlib.metadata.distribution(name)
    except importlib.metadata.PackageNotFoundError:
        return None
    return [str(distribution.locate_file("")), sorted({file.parts[0] for file in distribution.files or ()})]
def folder(name):
    spec = importlib.util.find_spec(name)
    return [] if spec is None else [path for path in spec.submodule_search_locations or () if os.path.isdir(path)]
def strays():
    known = {sysconfig.get_path("stdlib"), sysconfig.get_config_var("DESTSHARED"), *site.getsitepackages()}
    for folder in site.getsitepackages():
        for file in glob.glob(os.path.join(folder, "*.pth")):
            with open(file, errors="replace") as lines:
                known.update(os.path.join(folder, line.strip()) for line in lines)
    known = {os.path.realpath(entry) for entry in known if entry}
    return sorted({entry for entry in sys.path if os.path.exists(entry) and os.path.realpath(entry) not in known})
print(json.dumps({
    "interpreter": [os.path.realpath(sys.executable)],
    "library": library(),
    "standard_library": sysconfig.get_path("stdlib"),
    "extensions": sysconfig.get_config_var("DESTSHARED"),
    "startup": list(startup()),
    "strays": strays(),
    "dependencies": {name: files(name) for name in dependencies},
    "packages": {name: folder(name) for name in packages},
}))
"""


class MeasurementError(StrongroomError):
    """The image cannot be measured. Codes: ``no_interpreter``, ``missing_dependency``, ``missing_package``,
    ``unmeasured_path``, ``unreadable``."""


@dataclass(frozen=True, slots=True)
class ImageFile:
    """One measured file: ``path`` is the same on every machine, such as ``stdlib/abc.py``; ``size`` is in bytes, and
    ``sha384`` (48 bytes) over the content.
    """

    path: str
    size: int
    sha384: bytes


@dataclass(frozen=True, slots=True)
class ImageSection:
    """A measured part of an image: ``files`` sorted by the bytes of their paths."""

    files: tuple[ImageFile, ...]

    def digest(self) -> bytes:
        entries = [[file.path, file.size, file.sha384] for file in self.files]
        return h384("strongroom/1 image", cbor2.dumps(entries, canonical=True))


@dataclass(frozen=True, slots=True)
class ProcessImage:
    """An emulated enclave's image. ``boot``: interpreter, standard library, dependencies. ``application``: our packages
    and ``enclave.toml``."""

    boot: ImageSection
    application: ImageSection

    def pcrs(self) -> PcrSet:
        boot, application = self.boot.digest(), self.application.digest()
        return PcrSet(
            pcr0=once_extended(hashlib.sha384(boot + application).digest()),
            pcr1=once_extended(boot),
            pcr2=once_extended(application),
        )


def measure_process_image(python: Path, configuration: Path, *, application: Path | None = None) -> PcrSet:
    """PCR0, 1 and 2 of an enclave that ``python`` runs with ``configuration``; arguments as of
    :func:`process_image`. Raises MeasurementError."""
    return process_image(python, configuration, application=application).pcrs()


def process_image(python: Path, configuration: Path, *, application: Path | None = None) -> ProcessImage:
    """The files of an enclave that ``python`` runs with ``configuration`` as its ``enclave.toml``.

    ``python`` is the path by which the interpreter will be started: that of a virtual environment stays unresolved.
    ``application`` is the folder that holds ``attestation``, ``enclave`` and ``vsockrpc``; without it, those which
    ``python`` itself would import. Symbolic links count as what they lead to. Raises :class:`MeasurementError`.
    """
    found = _inquire(python)
    if found.strays:
        raise MeasurementError(
            "unmeasured_path",
            "the interpreter would import from a place that is not measured",
            expected="the standard library, site-packages and what a .pth file there names",
            got=", ".join(found.strays),
        )
    boot = [*_interpreter(found), *_standard_library(found), *_dependencies(found)]
    packages = _packages(found) if application is None else {name: application / name for name in APPLICATION_PACKAGES}
    own = [(CONFIGURATION_LABEL, configuration)]
    for name, folder in packages.items():
        own += _tree(name, folder)
    return ProcessImage(_section(boot), _section(own))


# --- Where the files are -----------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Found:
    """What the interpreter says of itself."""

    interpreter: list[str]
    library: list[str]
    standard_library: str
    extensions: str | None
    startup: list[tuple[str, str]]
    strays: list[str]
    dependencies: Mapping[str, tuple[str, list[str]] | None]
    packages: Mapping[str, list[str]]


def _inquire(python: Path) -> _Found:
    names = json.dumps([ENCLAVE_DEPENDENCIES, APPLICATION_PACKAGES])
    try:
        answer = subprocess.run(
            [python, "-I", "-B", "-c", _INQUIRY, names], capture_output=True, check=True, timeout=_INQUIRY_SECONDS
        )
        return _Found(**json.loads(answer.stdout))
    except (OSError, subprocess.SubprocessError, ValueError, TypeError) as error:
        raise MeasurementError("no_interpreter", f"{python} does not run as a Python interpreter") from error


def _interpreter(found: _Found) -> Iterator[tuple[str, Path]]:
    for path in found.interpreter:
        yield "interpreter/python", Path(path)
    for path in found.library:
        yield f"interpreter/{Path(path).name}", Path(path)


def _standard_library(found: _Found) -> Iterator[tuple[str, Path]]:
    standard_library = Path(found.standard_library)
    roots = [("stdlib", standard_library)]
    if found.extensions and not Path(found.extensions).is_relative_to(standard_library):
        roots.append(("stdlib/lib-dynload", Path(found.extensions)))
    for label, root in roots:
        for path, file in _tree(label, root, skipped=STANDARD_LIBRARY_SKIPPED | _SITE_FOLDERS):
            if path.endswith(_IMPORTABLE):
                yield path, file


def _dependencies(found: _Found) -> Iterator[tuple[str, Path]]:
    """What is imported from ``site-packages``: by ``site`` when the interpreter starts (``.pth`` files), and by the
    enclave.

    Whole folders, and beside a module that is a file everything of its name, not only the files that were installed:
    one added later could be imported in their place.
    """
    tops = {entry: Path(root, entry) for root, entry in found.startup}
    for name, distribution in found.dependencies.items():
        if distribution is None or not distribution[1]:
            raise MeasurementError(
                "missing_dependency",
                "the interpreter lacks a package that the enclave needs; the extra enclave brings it",
                expected=name,
            )
        root, entries = distribution
        for entry in entries:
            # Left out: scripts, and the installer's notes, which tell of the installation and not of the code.
            if entry not in ("..", _BYTECODE_CACHE) and not entry.endswith((".dist-info", ".egg-info")):
                tops[entry] = Path(root, entry)
                if entry.endswith(_IMPORTABLE):
                    module = entry.partition(".")[0]
                    beside = (path for path in Path(root).glob(f"{module}*") if path.name.partition(".")[0] == module)
                    tops.update((path.name, path) for path in beside)
    for entry, path in tops.items():
        if path.is_dir():
            yield from _tree(f"site-packages/{entry}", path)
        else:
            yield f"site-packages/{entry}", path


def _packages(found: _Found) -> dict[str, Path]:
    folders = {}
    for name, locations in found.packages.items():
        if len(locations) != 1:
            raise MeasurementError(
                "missing_package", f"the interpreter must find one folder of {name}", expected=1, got=len(locations)
            )
        folders[name] = Path(locations[0])
    return folders


def _tree(
    label: str, folder: Path, *, skipped: frozenset[str] = frozenset(), above: Sequence[tuple[int, int]] = ()
) -> Iterator[tuple[str, Path]]:
    """Every file below ``folder`` with its label; bytecode caches and folders of a name in ``skipped`` are left out."""
    try:
        status = folder.stat()
        with os.scandir(folder) as listing:
            entries = [(entry, entry.is_dir()) for entry in listing]
    except OSError as error:
        raise MeasurementError("unreadable", f"cannot list {folder}: {error.strerror}") from error
    here = (*above, (status.st_dev, status.st_ino))
    if here[-1] in above:
        raise MeasurementError("unreadable", f"{folder} leads back to a folder above it")
    for entry, is_folder in entries:
        if not is_folder:
            yield f"{label}/{entry.name}", Path(entry)
        elif entry.name != _BYTECODE_CACHE and entry.name not in skipped:
            yield from _tree(f"{label}/{entry.name}", Path(entry), skipped=skipped, above=here)


# --- What is in them ---------------------------------------------------------------------------------------------


def _section(files: Sequence[tuple[str, Path]]) -> ImageSection:
    with ThreadPoolExecutor(max_workers=min(4, os.cpu_count() or 1)) as pool:  # hashing leaves the interpreter's lock
        measured = list(pool.map(_measure, files))
    return ImageSection(tuple(sorted(measured, key=lambda file: file.path.encode())))


def _measure(labelled: tuple[str, Path]) -> ImageFile:
    label, path = labelled
    try:
        label.encode()
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)  # a FIFO must not make us wait
        with os.fdopen(descriptor, "rb", buffering=0) as file:
            if not stat.S_ISREG(os.fstat(descriptor).st_mode):
                raise MeasurementError("unreadable", f"{path} is not a regular file")
            digest = hashlib.file_digest(file, "sha384").digest()
            return ImageFile(label, file.tell(), digest)
    except UnicodeEncodeError as error:
        raise MeasurementError("unreadable", f"the name of {path!r} is no text") from error
    except OSError as error:
        raise MeasurementError("unreadable", f"cannot read {path}: {error.strerror}") from error
