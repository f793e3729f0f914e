"""The package's own names: one list, for programs, for type checkers and for ``import *``; loaded when asked for."""

from __future__ import annotations

import ast
import importlib
import subprocess
import sys
from pathlib import Path

import attestation


def test_every_public_name_is_there() -> None:
    (checked,) = (node for node in ast.parse(Path(attestation.__file__).read_text()).body if isinstance(node, ast.If))
    seen = []
    for node in checked.body:
        assert isinstance(node, ast.ImportFrom)
        home = importlib.import_module(node.module or "")
        for name in node.names:
            seen.append(name.name)
            assert getattr(attestation, name.name) is getattr(home, name.name)
    assert sorted(attestation.__all__) == sorted(seen)


def test_another_name_is_not() -> None:
    assert not hasattr(attestation, "nothing")


def test_nothing_is_loaded_before_it_is_asked_for() -> None:
    """An enclave's processes import the package before they have shut out what nobody measured."""
    folder = str(Path(attestation.__file__).parents[1])
    program = f"""
import sys
sys.path.insert(0, {folder!r})
before = set(sys.modules)
import attestation
print(*set(sys.modules) - before)
"""
    done = subprocess.run([sys.executable, "-I", "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["attestation"]
