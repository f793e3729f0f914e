"""A host and an image for every test."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.nitro_hosts import IMAGE, NitroHost


@pytest.fixture
def host(tmp_path: Path) -> NitroHost:
    return NitroHost.make(tmp_path)


@pytest.fixture
def eif(host: NitroHost) -> Path:
    """A sound image."""
    path = host.folder / "enclave.eif"
    path.write_bytes(IMAGE.encode())
    return path
