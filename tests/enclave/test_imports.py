"""What an enclave's process may import, tried in processes of their own: the finder is there to stay."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[2]


def guarded(program: str, *folders: Path) -> subprocess.CompletedProcess[str]:
    """Runs a program behind the finder, with ``folders`` as further places of packages."""
    lines = ["import sys", f"sys.path += {[str(REPOSITORY), *map(str, folders)]!r}"]
    lines += ["from enclave.imports import only_measured", "only_measured()", program]
    return subprocess.run([sys.executable, "-I", "-c", "\n".join(lines)], capture_output=True, text=True, check=False)


def test_an_enclave_and_its_engine_process_import_all_that_they_need() -> None:
    done = guarded("import enclave.__main__, enclave.worker, sysconfig, distutils")
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("name", ["org", "django", "msvcrt", "sitecustomize_of_mine", "idlelib", "unittest.test"])
def test_what_nobody_measured_is_not_run(tmp_path: Path, name: str) -> None:
    """``msvcrt`` is the standard library's on another system, and tried by its ``subprocess`` on this one."""
    top, *_ = name.split(".")
    (tmp_path / top).mkdir()
    (tmp_path / top / "__init__.py").write_text("print('it runs')")
    done = guarded(f"import {name}", tmp_path)
    assert "it runs" not in done.stdout
    assert done.stderr.splitlines()[-1] == f"ModuleNotFoundError: {name} is not measured"


def test_the_standard_library_comes_from_its_own_folders(tmp_path: Path) -> None:
    (tmp_path / "wave.py").write_text("print('it runs')")
    done = guarded("sys.path.insert(0, sys.path[-1]); import wave; print(wave.Wave_read.__name__)", tmp_path)
    assert done.stdout == "Wave_read\n", done.stderr


@pytest.mark.parametrize("program", ["enclave", "enclave.worker"])
def test_the_finder_stands_before_anything_else_is_imported(program: str) -> None:
    code = f"""
import runpy, sys
sys.path.append({str(REPOSITORY)!r})
sys.argv = ["enclave", "--help"]
at_start = set(sys.modules)
import enclave.imports
class Noted:
    def find_spec(self, name, path=None, target=None):
        if sys.meta_path[0] is self and name.partition(".")[0] not in ("enclave", "attestation", "__main__"):
            early.append(name)
early = []
sys.meta_path.insert(0, Noted())
try:
    runpy.run_module({program!r}, run_name="__main__", alter_sys=True)
except (SystemExit, ValueError):  # the worker takes numbers
    pass
print(early, type(sys.meta_path[0]).__name__)
"""
    done = subprocess.run([sys.executable, "-I", "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[] _MeasuredOnly"
