"""What an enclave's process may import: what is measured (:mod:`attestation.dependencies`), and nothing else.

Packages try names that need not exist: ``msvcrt`` of another system, ``org`` of Jython, an optional extra. What does
not exist is not measured. So a folder of such a name, laid beside the measured ones, would run under unchanged
registers.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from importlib.machinery import BuiltinImporter, FrozenImporter, ModuleSpec, PathFinder
from types import ModuleType

from attestation.dependencies import APPLICATION_PACKAGES, ENCLAVE_DEPENDENCIES, STANDARD_LIBRARY_SKIPPED


def only_measured() -> None:
    """From now on, in this process, the import of anything else fails with ModuleNotFoundError."""
    sys.meta_path.insert(0, _MeasuredOnly())


class _MeasuredOnly:
    """The first finder. It finds the standard library's modules itself, in the library's own folders alone, and leaves
    the measured packages to the finders behind it."""

    def __init__(self) -> None:
        self._measured = {*APPLICATION_PACKAGES, *(name for names in ENCLAVE_DEPENDENCIES.values() for name in names)}
        library = os.path.dirname(os.__file__)
        self._library = [entry for entry in sys.path if entry == library or os.path.basename(entry) == "lib-dynload"]

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        top, *below = name.split(".")
        if top in self._measured:
            return None
        if STANDARD_LIBRARY_SKIPPED.isdisjoint((top, *below)):
            if below:  # it lies in the folder of a package that was found here
                return None
            for finder, where in ((BuiltinImporter, None), (FrozenImporter, None), (PathFinder, self._library)):
                spec = finder.find_spec(name, where)
                if spec is not None:
                    return spec
        raise ModuleNotFoundError(f"{name} is not measured", name=name)
