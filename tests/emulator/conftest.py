"""Fixtures of the emulator's tests."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from emulator.kms_endpoint import KmsEmulator, kms_emulator
from tests.kms_clients import ANCHOR, kms_client


@pytest.fixture
def kms() -> Iterator[KmsEmulator]:
    with kms_emulator(anchor=ANCHOR) as kms:
        yield kms


@pytest.fixture
def root(kms: KmsEmulator) -> Iterator[Any]:
    """boto3's client as the account's root user."""
    with kms_client(kms) as client:
        yield client
