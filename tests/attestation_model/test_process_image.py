"""The measurement of an emulated image: what changes it, what does not, and that it covers what the enclave runs."""

from __future__ import annotations

import ast
import hashlib
import importlib.metadata
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import cbor2
import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from attestation.dependencies import APPLICATION_PACKAGES, ENCLAVE_DEPENDENCIES
from attestation.process_image import (
    ImageSection,
    MeasurementError,
    measure_process_image,
    process_image,
)
from attestation.reference import PcrSet, extend, h384

REPOSITORY = Path(__file__).resolve().parents[2]


class Installation:
    """A small interpreter's installation on disk. ``python`` answers the inquiry as a real one does, with these
    folders."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.python = root / "python"
        self.configuration = self.write("enclave.toml", b"[nsm]\n")
        self.answer = {
            "interpreter": [str(self.write("bin/python3", b"ELF"))],
            "library": [str(self.write("lib/libpython3.so.1.0", b"ELF library"))],
            "standard_library": str(root / "lib/python3"),
            "extensions": str(root / "lib/python3/lib-dynload"),
            "startup": [[str(root / "site-packages"), "start.pth"], [str(root / "site-packages"), "started"]],
            "strays": [],
            "dependencies": {name: [str(root / "site-packages"), [name]] for name in ENCLAVE_DEPENDENCIES},
            "packages": {name: [str(root / "application" / name)] for name in APPLICATION_PACKAGES},
        }
        self.write("lib/python3/abc.py", b"abc")
        self.write("lib/python3/email/parser.py", b"parser")
        self.write("lib/python3/lib-dynload/_ssl.so", b"ssl")
        for name in ENCLAVE_DEPENDENCIES:
            self.write(f"site-packages/{name}/__init__.py", name.encode())
        self.write("site-packages/start.pth", b"import started")
        self.write("site-packages/started/__init__.py", b"started")
        for name in APPLICATION_PACKAGES:
            self.write(f"application/{name}/__init__.py", name.encode())
        self.write("application/attestation/anchors/root.der", b"der")
        self.publish()

    def write(self, path: str, content: bytes) -> Path:
        file = self.root / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(content)
        return file

    def publish(self) -> None:
        self.write("answer.json", json.dumps(self.answer).encode())
        self.python.write_text(f"#!/bin/sh\nexec cat '{self.root}/answer.json'\n")
        self.python.chmod(0o755)

    def measure(self) -> PcrSet:
        return measure_process_image(self.python, self.configuration)


def changed_files(before: ImageSection, after: ImageSection) -> list[str]:
    """The paths of the files in which two sections differ."""
    return sorted({file.path for file in set(before.files) ^ set(after.files)})


@pytest.fixture
def installation(tmp_path: Path) -> Installation:
    return Installation(tmp_path / "one")


def changed(before: PcrSet, after: PcrSet) -> set[int]:
    return {index for index, value in before.as_registers().items() if after.as_registers()[index] != value}


# --- What changes which register ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "path",
    [
        "application/enclave/__init__.py",
        "application/vsockrpc/__init__.py",
        "application/attestation/__init__.py",
        "application/attestation/anchors/root.der",
        "application/enclave/added.py",
        "application/enclave/deep/added.txt",
        "application/enclave/sourceless.pyc",
        "enclave.toml",
    ],
)
def test_application_or_configuration_changes_pcr0_and_pcr2(installation: Installation, path: str) -> None:
    before = installation.measure()
    installation.write(path, b"changed")
    assert changed(before, installation.measure()) == {0, 2}


@pytest.mark.parametrize(
    "path",
    [
        "bin/python3",
        "lib/libpython3.so.1.0",
        "lib/python3/abc.py",
        "lib/python3/email/parser.py",
        "lib/python3/lib-dynload/_ssl.so",
        "lib/python3/added.py",
        "lib/python3/sourceless.pyc",
        "site-packages/cbor2/__init__.py",
        "site-packages/start.pth",
        "site-packages/started/__init__.py",
        "site-packages/numpy/added-after-the-installation.so",
    ],
)
def test_interpreter_or_dependency_changes_pcr0_and_pcr1(installation: Installation, path: str) -> None:
    before = installation.measure()
    installation.write(path, b"changed")
    assert changed(before, installation.measure()) == {0, 1}


def test_extension_modules_that_stand_outside_the_library_are_measured(installation: Installation) -> None:
    """So some distributions build Python: ``DESTSHARED`` is another folder."""
    inside = installation.measure()
    extension = installation.root / "lib/python3/lib-dynload"
    extension.rename(installation.root / "lib/extensions")
    installation.answer["extensions"] = str(installation.root / "lib/extensions")
    installation.publish()
    assert installation.measure() == inside
    installation.write("lib/extensions/_ssl.so", b"changed")
    assert changed(inside, installation.measure()) == {0, 1}
    installation.answer["extensions"] = ""
    installation.publish()
    assert changed(inside, installation.measure()) == {0, 1}


@pytest.mark.parametrize(
    "path",
    [
        "application/enclave/__pycache__/__init__.cpython-311.pyc",
        "lib/python3/__pycache__/abc.cpython-311.pyc",
        "site-packages/cbor2/__pycache__/__init__.cpython-311.pyc",
        "lib/python3/test/test_abc.py",
        "lib/python3/unittest/tests/test_case.py",
        "lib/python3/idlelib/idle.py",
        "lib/python3/site-packages/other.py",
        "lib/python3/LICENSE.txt",
        "site-packages/unrelated/__init__.py",
        "application/parent/__init__.py",
    ],
)
def test_what_is_never_run_changes_nothing(installation: Installation, path: str) -> None:
    before = installation.measure()
    installation.write(path, b"changed")
    assert installation.measure() == before


def test_every_byte_counts(installation: Installation) -> None:
    file = installation.write("application/enclave/__init__.py", b"content")
    seen = {installation.measure().pcr2}
    for position in range(7):
        content = bytearray(b"content")
        content[position] ^= 1
        file.write_bytes(content)
        seen.add(installation.measure().pcr2)
    assert len(seen) == 8


def test_name_and_border_between_files_count(installation: Installation) -> None:
    one = installation.write("application/enclave/a.py", b"ab")
    two = installation.write("application/enclave/b.py", b"c")
    before = installation.measure()
    one.write_bytes(b"a")
    two.write_bytes(b"bc")
    moved = installation.measure()
    assert changed(before, moved) == {0, 2}
    one.rename(one.with_name("c.py"))
    assert changed(moved, installation.measure()) == {0, 2}


def test_place_time_and_order_do_not_count(installation: Installation, tmp_path: Path) -> None:
    other = Installation(tmp_path / "another" / "place")
    for path in sorted(other.root.rglob("*"), reverse=True):
        os.utime(path, (0, 0))
    assert other.measure() == installation.measure()


def test_link_counts_as_what_it_leads_to(installation: Installation) -> None:
    before = installation.measure()
    init = installation.root / "application/enclave/__init__.py"
    target = installation.write("elsewhere/init.py", init.read_bytes())
    init.unlink()
    init.symlink_to(target)
    folder = installation.root / "application/vsockrpc"
    folder.rename(installation.root / "elsewhere/vsockrpc")
    folder.symlink_to(installation.root / "elsewhere/vsockrpc")
    assert installation.measure() == before
    target.write_bytes(b"changed")
    assert changed(before, installation.measure()) == {0, 2}


def test_application_folder_may_be_named(installation: Installation) -> None:
    staged = installation.root / "staged"
    shutil.copytree(installation.root / "application", staged)
    before = installation.measure()
    assert measure_process_image(installation.python, installation.configuration, application=staged) == before
    (staged / "enclave" / "__init__.py").write_bytes(b"changed")
    after = measure_process_image(installation.python, installation.configuration, application=staged)
    assert changed(before, after) == {0, 2}


# --- The arithmetic and the difference ---------------------------------------------------------------------------


def test_registers_as_the_protocol_defines_them(installation: Installation) -> None:
    image = process_image(installation.python, installation.configuration)
    assert [file.path for file in image.application.files] == [
        "attestation/__init__.py",
        "attestation/anchors/root.der",
        "enclave.toml",
        "enclave/__init__.py",
        "vsockrpc/__init__.py",
    ]
    entries = [[file.path, file.size, file.sha384] for file in image.application.files]
    assert entries[2] == ["enclave.toml", 6, hashlib.sha384(b"[nsm]\n").digest()]
    application = h384("strongroom/1 image", cbor2.dumps(entries))
    boot = image.boot.digest()
    zero = bytes(48)
    assert image.application.digest() == application
    assert image.pcrs() == PcrSet(
        extend(zero, hashlib.sha384(boot + application).digest()), extend(zero, boot), extend(zero, application)
    )


# --- What cannot be measured -------------------------------------------------------------------------------------


def absent_dependency(installation: Installation) -> None:
    installation.answer["dependencies"]["numpy"] = None  # type: ignore[index]
    installation.publish()


def dependency_without_files(installation: Installation) -> None:
    installation.answer["dependencies"]["numpy"] = ["/", []]  # type: ignore[index]
    installation.publish()


def absent_package(installation: Installation) -> None:
    installation.answer["packages"]["enclave"] = []  # type: ignore[index]
    installation.publish()


def package_in_two_places(installation: Installation) -> None:
    installation.answer["packages"]["enclave"] = ["/a", "/b"]  # type: ignore[index]
    installation.publish()


def code_in_another_place(installation: Installation) -> None:
    installation.answer["strays"] = ["/usr/lib/python311.zip"]
    installation.publish()


def absent_interpreter(installation: Installation) -> None:
    installation.python.unlink()


def failing_interpreter(installation: Installation) -> None:
    installation.python.write_text("#!/bin/sh\nexit 1\n")


def talkative_interpreter(installation: Installation) -> None:
    installation.write("answer.json", b"hello")


def other_program(installation: Installation) -> None:
    installation.write("answer.json", b"{}")


def absent_configuration(installation: Installation) -> None:
    installation.configuration.unlink()


def configuration_that_is_a_folder(installation: Installation) -> None:
    installation.configuration.unlink()
    installation.configuration.mkdir()


def broken_link(installation: Installation) -> None:
    (installation.root / "application/enclave/broken.py").symlink_to("nowhere")


def link_to_itself(installation: Installation) -> None:
    (installation.root / "application/enclave/loop.py").symlink_to("loop.py")


def pipe(installation: Installation) -> None:
    os.mkfifo(installation.root / "application/enclave/pipe.py")


def folder_within_itself(installation: Installation) -> None:
    (installation.root / "application/enclave/again").symlink_to(installation.root / "application/enclave")


def name_that_is_no_text(installation: Installation) -> None:
    (installation.root / "application/enclave" / os.fsdecode(b"\xff.py")).write_bytes(b"")


@pytest.mark.parametrize(
    ("spoil", "code"),
    [
        (absent_dependency, "missing_dependency"),
        (dependency_without_files, "missing_dependency"),
        (absent_package, "missing_package"),
        (package_in_two_places, "missing_package"),
        (code_in_another_place, "unmeasured_path"),
        (absent_interpreter, "no_interpreter"),
        (failing_interpreter, "no_interpreter"),
        (talkative_interpreter, "no_interpreter"),
        (other_program, "no_interpreter"),
        (absent_configuration, "unreadable"),
        (configuration_that_is_a_folder, "unreadable"),
        (broken_link, "unreadable"),
        (link_to_itself, "unreadable"),
        (pipe, "unreadable"),
        (folder_within_itself, "unreadable"),
        (name_that_is_no_text, "unreadable"),
    ],
)
def test_what_cannot_be_measured(installation: Installation, spoil: Callable[[Installation], None], code: str) -> None:
    spoil(installation)
    with pytest.raises(MeasurementError) as raised:
        installation.measure()
    assert raised.value.code == code


# --- The running interpreter -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def dependencies_are_installed() -> None:
    for name in ENCLAVE_DEPENDENCIES:
        try:
            importlib.metadata.distribution(name)
        except importlib.metadata.PackageNotFoundError:
            pytest.skip(f"{name} is not installed here")


@pytest.mark.usefixtures("dependencies_are_installed")
def test_real_interpreter(tmp_path: Path) -> None:
    configuration = tmp_path / "enclave.toml"
    configuration.write_bytes(b"")
    python = Path(sys.executable)
    image = process_image(python, configuration, application=REPOSITORY)
    paths = [file.path for file in (*image.boot.files, *image.application.files)]
    assert len(paths) == len(set(paths))
    assert {path.split("/")[0] for path in paths} == {
        *("interpreter", "stdlib", "site-packages"),
        *APPLICATION_PACKAGES,
        "enclave.toml",
    }
    assert not [path for path in paths if path.startswith("/") or "__pycache__" in path or ".." in path.split("/")]
    for expected in (
        "interpreter/python",
        "stdlib/asyncio/base_events.py",
        "attestation/process_image.py",
        "enclave/nsm.py",
    ):
        assert expected in paths
    assert any(re.fullmatch(r"stdlib/lib-dynload/_ctypes\..*so", path) for path in paths) or "_ctypes" in (
        sys.builtin_module_names
    )
    for package in ("cbor2", "cryptography", "jinja2", "llama_cpp", "numpy"):
        assert f"site-packages/{package}/__init__.py" in paths
    assert image == process_image(python, configuration, application=REPOSITORY)


@pytest.mark.usefixtures("dependencies_are_installed")
def test_every_loaded_module_of_the_enclaves_is_measured(tmp_path: Path) -> None:
    """Seen from the other side: what importing the dependencies loads from disk is in the list."""
    script = (
        "import sys, cbor2, cryptography.x509, cryptography.hazmat.primitives.hpke, jinja2, json, asyncio, ssl\n"
        "print(json.dumps([m.__file__ for m in sys.modules.values() if getattr(m, '__file__', None)]))"
    )
    loaded = json.loads(subprocess.run([sys.executable, "-I", "-c", script], capture_output=True, check=True).stdout)
    configuration = tmp_path / "enclave.toml"
    configuration.write_bytes(b"")
    measured = {
        file.sha384 for file in process_image(Path(sys.executable), configuration, application=REPOSITORY).boot.files
    }
    for file in loaded:
        assert hashlib.sha384(Path(file).read_bytes()).digest() in measured, file


def test_what_runs_when_python_starts_is_measured(tmp_path: Path) -> None:
    """A ``.pth`` file is code that every process of this interpreter runs first."""
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", tmp_path / "venv"], check=True)
    python = tmp_path / "venv" / "bin" / "python"
    where = [str(python), "-I", "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"]
    packages = Path(subprocess.run(where, capture_output=True, check=True, text=True).stdout.strip())
    for name in ENCLAVE_DEPENDENCIES:  # as installed, as far as the interpreter can tell
        module = name.replace("-", "_")
        (packages / f"{module}.py").touch()
        (packages / f"{module}-1.dist-info").mkdir()
        (packages / f"{module}-1.dist-info" / "METADATA").write_text(f"Name: {name}\nVersion: 1\n")
        (packages / f"{module}-1.dist-info" / "RECORD").write_text(f"{module}.py,,\n{module}-1.dist-info/METADATA,,\n")
    configuration = tmp_path / "enclave.toml"
    configuration.touch()

    def boot() -> ImageSection:
        return process_image(python, configuration, application=REPOSITORY).boot

    before = boot()
    (packages / "startup_hook").mkdir()
    (packages / "startup_hook" / "__init__.py").write_text("")
    assert boot() == before
    (packages / "hook.pth").write_text("import startup_hook\n")
    assert changed_files(before, boot()) == [
        "site-packages/hook.pth",
        "site-packages/startup_hook/__init__.py",
    ]

    before = boot()
    (packages / "typing_extensions").mkdir()  # would be imported in place of the file beside it
    (packages / "typing_extensions" / "__init__.py").touch()
    assert changed_files(before, boot()) == ["site-packages/typing_extensions/__init__.py"]

    (packages / "checkout.pth").write_text(f"{REPOSITORY}\n")
    boot()
    (packages / "stray.pth").write_text(f"import sys; sys.path.append({str(tmp_path)!r})\n")
    with pytest.raises(MeasurementError) as raised:
        boot()
    assert (raised.value.code, raised.value.got) == ("unmeasured_path", str(tmp_path))


@pytest.mark.usefixtures("dependencies_are_installed")
def test_the_names_by_which_dependencies_are_imported() -> None:
    owners = importlib.metadata.packages_distributions()
    for name, modules in ENCLAVE_DEPENDENCIES.items():
        owned = {module for module, names in owners.items() if name in {str(canonicalize_name(each)) for each in names}}
        assert set(modules) == {module for module in owned if module.isidentifier()}, name


@pytest.mark.usefixtures("dependencies_are_installed")
def test_dependencies_are_closed_under_what_they_require() -> None:
    required = {"botocore", "cbor2", "cryptography", "jinja2", "llama-cpp-python", "pyasn1"}
    waiting = list(required)
    while waiting:
        for line in importlib.metadata.requires(waiting.pop()) or ():
            requirement = Requirement(line)
            name = canonicalize_name(requirement.name)
            if (requirement.marker is None or requirement.marker.evaluate({"extra": ""})) and name not in required:
                required.add(name)
                waiting.append(name)
    assert sorted(required) == list(ENCLAVE_DEPENDENCIES)


def imported(file: Path) -> set[str]:
    """Every dotted name that ``file`` may import, with the packages above it."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(file.read_bytes())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return {".".join(parts[:end]) for parts in (name.split(".") for name in names) for end in range(1, len(parts) + 1)}


@pytest.mark.usefixtures("dependencies_are_installed")
def test_everything_that_the_enclave_imports_is_measured() -> None:
    waiting = set((REPOSITORY / "enclave").rglob("*.py"))
    seen: set[Path] = set()
    foreign: set[str] = set()
    while waiting:
        file = waiting.pop()
        seen.add(file)
        for name in imported(file):
            path = REPOSITORY.joinpath(*name.split("."))
            ours = {candidate for candidate in (path.with_suffix(".py"), path / "__init__.py") if candidate.is_file()}
            waiting |= ours - seen
            foreign.add(name.partition(".")[0])
    assert {file.relative_to(REPOSITORY).parts[0] for file in seen} <= set(APPLICATION_PACKAGES)
    foreign -= {*sys.stdlib_module_names, *APPLICATION_PACKAGES}
    owners = importlib.metadata.packages_distributions()
    assert {canonicalize_name(name) for module in foreign for name in owners[module]} <= set(ENCLAVE_DEPENDENCIES)
