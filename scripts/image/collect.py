"""Runs in the build stage of Dockerfile.enclave: lays out the root file system of an enclave image, and says how
large each part of it is.

What is in it is what is named here, and what that needs: the interpreter with its standard library, the packages of
requirements/enclave.txt, our own, every shared library that one of them is linked to, and a few lines of text. There is
no shell and no package manager to remove, because none was put there.
"""

from __future__ import annotations

import argparse
import base64
import filecmp
import fnmatch
import os
import re
import runpy
import shutil
import subprocess
import sys
import sysconfig
import textwrap
import zipfile
from collections.abc import Iterator, Sequence, Set
from pathlib import Path

ENGINE_UID = 64001
"""The engine's own user: ``engine.uid`` of enclave.toml, by default."""

OUR_FILES = ("*.py", "*.der", "py.typed")

NOT_OF_THE_LIBRARY = (
    # Build machinery, installers, graphical and interactive programs, tests, documentation.
    *("config-*", "distutils", "ensurepip", "idlelib", "lib2to3", "pydoc_data", "site-packages", "tkinter", "turtle*"),
    *("test", "tests", "unittest", "venv", "LICENSE.txt", "EXTERNALLY-MANAGED", "sitecustomize.py"),
    # Modules whose only use is a library that the image does not have.
    *("_curses*", "curses", "_dbm*", "_gdbm*", "dbm", "nis.*", "readline.*", "_tkinter*", "_test*", "xx*"),
)
NOT_OF_THE_PACKAGES = (
    # Tests, what only a compiler or a type checker reads, and a server and a translator that nothing imports.
    *("*/tests/*", "*.pyi", "*.pxd", "*.pyx", "*.a", "*.h", "*.c", "*.so.lib", "*.dist-info/RECORD"),
    *("numpy/f2py/*", "numpy/_core/include/*", "llama_cpp/server/*", "botocore/cacert.pem"),
)
BOTOCORE_DATA = (
    *("botocore/data/kms/*", "botocore/data/endpoints.json", "botocore/data/partitions.json"),
    *("botocore/data/_retry.json", "botocore/data/sdk-default-configuration.json"),
)
"""Of its descriptions of all of AWS's services, what a client of KMS reads."""

PASSWD = f"root:x:0:0::/:\nengine:x:{ENGINE_UID}:{ENGINE_UID}::/:\n"
GROUP = f"root:x:0:\nengine:x:{ENGINE_UID}:\n"
LAST_FILE = "/~last"
"""Comes behind every other path where they are sorted, as in our images and in what docker exports. The enclave does
not begin without it."""
EMPTY_FOLDERS = ("dev", "proc", "run", "sys", "tmp", "var")


class Image:
    """The root file system that grows in a folder; paths are those that the running image will see."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.root.mkdir()
        for link in ("bin", "lib", "lib32", "lib64", "libx32", "sbin"):  # the base's own layout: /lib is /usr/lib, ...
            if os.path.islink(f"/{link}"):
                self.link(f"/{link}", os.readlink(f"/{link}"))
        for folder in EMPTY_FOLDERS:
            (root / folder).mkdir()

    def at(self, path: str | Path) -> Path:
        """Where ``path`` of the image is here, its folder made."""
        inside = self.root / Path(path).relative_to("/")
        inside.parent.mkdir(parents=True, exist_ok=True)
        return inside

    def link(self, path: str, target: str) -> None:
        os.symlink(target, self.at(path))

    def write(self, path: str, content: str) -> None:
        self.at(path).write_text(content)

    def copy(self, source: Path, path: str | Path) -> None:
        shutil.copyfile(source, self.at(path))

    def copy_tree(self, source: Path, path: str | Path, *, skipped: Sequence[str]) -> None:
        """Copies links as what they lead to."""
        shutil.copytree(
            source, self.at(path), ignore=shutil.ignore_patterns("__pycache__", *skipped), copy_function=shutil.copyfile
        )

    def files(self) -> Iterator[Path]:
        for folder, _, names in os.walk(self.root):
            yield from (Path(folder, name) for name in names)

    def finish(self) -> None:
        """The modes: everybody reads, nobody but root writes, and only programs and shared libraries are executable."""
        for folder, _, names in os.walk(self.root):
            os.chmod(folder, 0o1777 if folder == str(self.root / "tmp") else 0o755)
            for name in names:
                path = Path(folder, name)
                if not path.is_symlink():
                    path.chmod(0o755 if is_elf(path) else 0o644)


def is_elf(path: Path) -> bool:
    with path.open("rb") as file:
        return file.read(4) == b"\x7fELF"


def add_interpreter(image: Image) -> None:
    interpreter = Path(sys.executable).resolve()
    image.copy(interpreter, interpreter)
    if not os.path.lexists(image.at("/usr/bin/python3")):
        image.link("/usr/bin/python3", os.path.relpath(interpreter, "/usr/bin"))
    for path in sorted(
        {Path(sysconfig.get_path("stdlib")).resolve(), Path(sysconfig.get_path("platstdlib")).resolve()}
    ):
        image.copy_tree(path, path, skipped=NOT_OF_THE_LIBRARY)


def add_dependencies(image: Image, wheels: Path, site: Path, names: Set[str]) -> None:
    """Of each wheel what goes by one of ``names``, with the libraries and the licences that it brings along."""
    for wheel in sorted(wheels.glob("*.whl")):
        with zipfile.ZipFile(wheel) as archive:
            for entry in archive.infolist():
                top, _, kind = entry.filename.partition("/")[0].partition(".")
                mine = top in names or kind == "libs" or entry.filename.partition("/")[0].endswith(".dist-info")
                if mine and not entry.is_dir() and _wanted(entry.filename):
                    image.at(site / entry.filename).write_bytes(archive.read(entry))
    libraries = image.at(site / "llama_cpp" / "lib")
    _link_equals(libraries)
    shutil.copyfile(wheels / "cpu-features", libraries / "cpu-features")


def _wanted(name: str) -> bool:
    if any(fnmatch.fnmatchcase(name, pattern) for pattern in NOT_OF_THE_PACKAGES):
        return False
    if name.startswith("botocore/data/"):
        return any(fnmatch.fnmatchcase(name, pattern) for pattern in BOTOCORE_DATA)
    return True


def _link_equals(folder: Path) -> None:
    """A wheel has no links: a library's three names are three copies of it. The one that other libraries ask for stays
    (``libNAME.so.N``)."""
    for kept in sorted(folder.glob("*.so.*")):
        if re.search(r"\.so\.[0-9]+$", kept.name):
            for other in sorted(folder.glob(f"{kept.name.partition('.so')[0]}.so*")):
                if other != kept and filecmp.cmp(kept, other, shallow=False):
                    other.unlink()
                    other.symlink_to(kept.name)


def add_packages(image: Image, source: Path, site: Path, names: Sequence[str]) -> None:
    for package in names:
        for pattern in OUR_FILES:
            for path in sorted((source / package).rglob(pattern)):
                image.copy(path, site / path.relative_to(source))


def add_texts(image: Image, source: Path, configuration: Path) -> None:
    image.write("/etc/passwd", PASSWD)
    image.write("/etc/group", GROUP)
    image.write(LAST_FILE, "The last file of the image: where it is missing, the image was cut off.\n")
    image.copy(configuration, "/etc/strongroom/enclave.toml")
    # Whatever asks for the system's authorities gets those that TLS to KMS may lead to, and no others.
    roots = sorted((source / "enclave" / "kms" / "anchors").glob("*.der"))
    image.write("/etc/ssl/certs/ca-certificates.crt", "".join(map(_pem, roots)))


def _pem(path: Path) -> str:
    lines = textwrap.wrap(base64.b64encode(path.read_bytes()).decode(), 64)
    return "\n".join(["-----BEGIN CERTIFICATE-----", *lines, "-----END CERTIFICATE-----", ""])


def add_libraries(image: Image) -> None:
    """Every shared library that something in the image is linked to, as the dynamic linker itself finds it here."""
    programs = [path for path in image.files() if not path.is_symlink() and is_elf(path)]
    linked = subprocess.run(["ldd", *programs], capture_output=True, text=True, check=True, env={"LC_ALL": "C"})
    for line in linked.stdout.splitlines():
        if "not found" in line:
            sys.exit(f"collect: a library is missing: {line.strip()}")
        found = re.match(r"\s+(?:\S+ => )?(/\S+) \(0x", line)
        if found and not Path(found[1]).is_relative_to(image.root):
            library = Path(found[1])
            place = library.parent.resolve() / library.name
            if not image.at(place).exists():
                image.copy(library.resolve(), place)


def report(image: Image, site: Path, ours: Sequence[str]) -> None:
    """Sizes in MB (10^6 bytes) by part, largest first."""
    parts: dict[str, int] = {}
    for path in image.files():
        inside = Path("/", path.relative_to(image.root))
        if inside.is_relative_to(site):
            package = inside.relative_to(site).parts[0]
            part = "strongroom" if package in ours else package.partition("-")[0].partition(".")[0]
        elif inside.is_relative_to("/opt"):
            part = "weights"
        elif inside.is_relative_to(sysconfig.get_path("stdlib")) or inside.parent == Path("/usr/bin"):
            part = "python"
        elif inside.is_relative_to("/usr"):
            part = "libraries"
        else:
            part = "configuration"
        parts[part] = parts.get(part, 0) + path.lstat().st_size
    for part, size in sorted(parts.items(), key=lambda item: -item[1]):
        print(f"{size / 1e6:8.1f} MB  {part}")
    print(f"{sum(parts.values()) / 1e6:8.1f} MB  in all")


def main() -> None:
    parser = argparse.ArgumentParser(prog="collect.py", description="Lay out the root file system of an enclave image.")
    parser.add_argument("root", type=Path, help="where it goes; must not exist")
    parser.add_argument("--source", type=Path, required=True, help="the folder with our packages")
    parser.add_argument("--wheels", type=Path, required=True, help="the dependencies, and cpu-features")
    parser.add_argument("--configuration", type=Path, required=True, help="enclave.toml")
    parser.add_argument("--weights", type=Path, help="a GGUF file to put into /opt/strongroom")
    options = parser.parse_args()
    site = Path(sysconfig.get_path("purelib"))
    named = runpy.run_path(str(options.source / "attestation" / "dependencies.py"))
    ours, dependencies = named["APPLICATION_PACKAGES"], named["ENCLAVE_DEPENDENCIES"]
    image = Image(options.root)
    add_interpreter(image)
    add_dependencies(image, options.wheels, site, {name for names in dependencies.values() for name in names})
    add_packages(image, options.source, site, ours)
    add_texts(image, options.source, options.configuration)
    add_libraries(image)
    if options.weights is not None:
        image.copy(options.weights, f"/opt/strongroom/{options.weights.name}")
    image.finish()
    report(image, site, ours)


if __name__ == "__main__":
    main()
