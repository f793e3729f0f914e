"""The policy that accepts the forged good Evidence."""

from __future__ import annotations

from pathlib import Path

import pytest

from attestation.policy import AppraisalPolicy
from tests.pki import forge


@pytest.fixture(scope="session")
def policy_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the forged root, for policies to name."""
    folder = tmp_path_factory.mktemp("policy")
    (folder / "root.der").write_bytes(forge.ROOT_DER)
    return folder


@pytest.fixture(scope="session")
def policy(policy_folder: Path) -> AppraisalPolicy:
    return AppraisalPolicy.parse(forge.POLICY, policy_folder)
