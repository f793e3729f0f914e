"""Installations of the wheel, each in an environment of its own that holds what the wheel and its extras ask for, and
nothing else. Nothing is fetched: what they ask for is linked from the environment that runs the tests.
"""

from __future__ import annotations

import email
import importlib.metadata
import os
import shutil
import subprocess
import sys
import venv
import zipfile
from dataclasses import dataclass
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

REPOSITORY = Path(__file__).resolve().parents[2]
PIP = [sys.executable, "-I", "-m", "pip", "--disable-pip-version-check"]
_NOT_SOURCE = shutil.ignore_patterns(".*", "__pycache__", "build", "mutants", "*.egg-info", "results")


def build(folder: Path) -> Path:
    """The wheel, from a copy: a build writes into its tree, and takes what an earlier one left there."""
    source, wheels = folder / "source", folder / "wheels"
    shutil.copytree(REPOSITORY, source, ignore=_NOT_SOURCE)
    offline = ["--no-index", "--no-deps", "--no-build-isolation", "--quiet"]
    subprocess.run([*PIP, "wheel", *offline, "--wheel-dir", str(wheels), str(source)], check=True)
    (wheel,) = wheels.iterdir()
    return wheel


def requirements(wheel: Path) -> list[str]:
    """The wheel's own words: ``Requires-Dist``."""
    with zipfile.ZipFile(wheel) as archive:
        (name,) = (name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
        return email.message_from_bytes(archive.read(name)).get_all("Requires-Dist", [])


def required(wheel: Path, extra: str = "") -> dict[str, bool]:
    """Every distribution that the wheel with ``extra`` asks for, and whether it asks for it itself."""
    found: dict[str, bool] = {}
    waiting, seen = [("strongroom", extra)], set[tuple[str, str]]()
    while waiting:
        asking, wanted = waiting.pop()
        if (asking, wanted) in seen:
            continue
        seen.add((asking, wanted))
        lines = requirements(wheel) if asking == "strongroom" else importlib.metadata.requires(asking) or []
        for requirement in map(Requirement, lines):
            if requirement.marker is None or requirement.marker.evaluate({"extra": wanted}):
                name = str(canonicalize_name(requirement.name))
                waiting += [(name, each) for each in ("", *requirement.extras)]
                if name != "strongroom":
                    found[name] = found.get(name, False) or asking == "strongroom"
    if extra:
        return {**required(wheel), **found}
    return found


@dataclass(frozen=True)
class Installation:
    """An environment with the wheel in it, and a folder to work in."""

    folder: Path

    @property
    def python(self) -> str:
        return str(self.folder / "venv/bin/python")

    def run(self, *command: str) -> subprocess.CompletedProcess[str]:
        """A program of the environment, such as ``python``, from a folder that holds none of the source."""
        program, *arguments = command
        return subprocess.run(
            [str(self.folder / "venv/bin" / program), *arguments],
            cwd=self.folder,
            env={"PATH": os.environ["PATH"]},
            capture_output=True,
            text=True,
            check=False,
        )


def install(wheel: Path, folder: Path, extra: str = "") -> Installation:
    environment = folder / "venv"
    venv.create(environment, symlinks=True, with_pip=False)
    (packages,) = environment.glob("lib/python*/site-packages")
    for name in required(wheel, extra):
        distribution = importlib.metadata.distribution(name)
        for top in {file.parts[0] for file in distribution.files or ()} - {"..", "__pycache__"}:
            (packages / top).symlink_to(Path(str(distribution.locate_file(top))))
    offline = ["--no-index", "--no-deps", "--no-compile", "--quiet"]
    here = [*PIP, "--python", str(environment / "bin/python")]
    subprocess.run([*here, "install", *offline, str(wheel)], check=True)
    subprocess.run([*here, "check"], check=True, stdout=subprocess.DEVNULL)
    return Installation(folder)
