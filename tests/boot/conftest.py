"""Real boots: enclave images in the emulated machine, from the root file system that ``Dockerfile.enclave`` makes.
``make test-boot`` runs them, and names that root file system; ``make test`` passes over this folder.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from strongroom.prepare import installed_model
from tests.end_to_end.conftest import Home, home_folder

LAYOUT = "STRONGROOM_BOOT_LAYOUT"
"""The environment variable with the folder of the OCI layout."""
BLOBS = "STRONGROOM_BOOT_BLOBS"
"""The environment variable with the folder of kernel, init and command line; else those of the cache."""
PATIENCE_SECONDS = 600
"""For a command to end: a machine without hardware acceleration boots in about half a minute when it is alone."""


def pytest_ignore_collect() -> bool | None:
    return None if LAYOUT in os.environ else True


@pytest.fixture(scope="session")
def layout() -> Path:
    return Path(os.environ[LAYOUT])


@pytest.fixture(scope="session")
def blobs() -> tuple[str, ...]:
    """The options of ``strongroom image build`` that mean what the image is to boot from."""
    return ("--blobs", os.environ.get(BLOBS, "own"), "--cmdline-copy")


@pytest.fixture(scope="session")
def model() -> Path:
    path = installed_model()
    assert path is not None, "the smollm2 extra is installed by make setup"
    return path


@pytest.fixture(scope="session")
def home() -> Iterator[Home]:
    with home_folder() as folder:
        home = Home(folder, patience=PATIENCE_SECONDS)
        try:
            yield home
        finally:
            home.close()
