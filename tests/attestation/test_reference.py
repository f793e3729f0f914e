"""How registers come to their values."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import replace

import pytest

from attestation.reference import ZERO_PCR, PcrSet, configuration_digest, extend, h384, once_extended

A, B, C, D = (bytes([value]) * 48 for value in range(1, 5))


def test_a_register_is_a_chain_of_hashes() -> None:
    assert bytes(48) == ZERO_PCR
    assert once_extended(b"x") == extend(ZERO_PCR, b"x") == hashlib.sha384(bytes(48) + b"x").digest()
    assert extend(once_extended(b"x"), b"y") != extend(once_extended(b"y"), b"x")


def test_labels_separate_domains() -> None:
    assert h384("a", b"b") == hashlib.sha384(b"a\x00b").digest()
    assert h384("ab", b"") != h384("a", b"b")
    assert configuration_digest(b"") == hashlib.sha384(b"strongroom/1 configuration\x00").digest()


def test_a_set_names_its_registers() -> None:
    assert PcrSet(A, B, C).as_registers() == {0: A, 1: B, 2: C}
    assert PcrSet(A, B, C, D).as_registers() == {0: A, 1: B, 2: C, 8: D}


@pytest.mark.parametrize(
    "make",
    [
        lambda: PcrSet(A[:-1], B, C),
        lambda: PcrSet(A, b"", C),
        lambda: PcrSet(A, B, C + b"x"),
        lambda: PcrSet(A, B, C, b""),
    ],
)
def test_a_set_holds_whole_registers(make: Callable[[], PcrSet]) -> None:
    with pytest.raises(ValueError, match="48 bytes"):
        make()


def test_two_releases_that_one_enclave_could_be() -> None:
    one, other = PcrSet(b"0" * 48, b"1" * 48, b"2" * 48), PcrSet(b"3" * 48, b"1" * 48, b"2" * 48)
    signed, by_another = replace(one, pcr8=b"8" * 48), replace(one, pcr8=b"9" * 48)
    assert one.is_ambiguous_beside(one)
    assert one.is_ambiguous_beside(signed)
    assert signed.is_ambiguous_beside(one)
    assert not signed.is_ambiguous_beside(by_another)
    assert not one.is_ambiguous_beside(other)
