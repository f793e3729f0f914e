"""Key material does not get out by accident."""

from __future__ import annotations

import copy
import pickle

import pytest

from attestation.secret import Secret


def test_a_secret_shows_its_length_and_nothing_else() -> None:
    secret = Secret(b"canary")
    assert {str(secret), repr(secret), f"{secret}", f"{secret!s:>3}"} == {"Secret(6 bytes)"}
    assert "canary" not in repr([secret])
    with pytest.raises(TypeError):
        pickle.dumps(secret)
    with pytest.raises(TypeError):
        hash(secret)
    with pytest.raises(TypeError):
        copy.copy(secret)
    assert len(secret) == 6
    assert secret == Secret(b"canary")
    assert secret != Secret(b"other")
    assert secret != b"canary"
