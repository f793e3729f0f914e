"""What an enclave must show before a key is opened to it: what a release accepts, and what a key policy asks.

KMS takes the registers from the attestation document of a request (KMS Developer Guide, "Condition keys for Nitro
Enclaves"): ``kms:RecipientAttestation:PCR`` and the number, and ``ImageSha384``, which is PCR0. Of a request without a
document it has none of them.
"""

from __future__ import annotations

import difflib
import operator
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Final, TypeAlias

from attestation.document import PCR_COUNT
from attestation.envelope import EnvelopePurpose
from attestation.keypolicy.conditions import Operator, Quantifier
from attestation.keypolicy.decision import ENCRYPTION_CONTEXT, RECIPIENT
from attestation.keypolicy.document import Condition, KeyPolicyError
from attestation.reference import (
    DIGEST_SIZE,
    PCR_APPLICATION,
    PCR_BOOT,
    PCR_CONFIGURATION,
    PCR_IMAGE,
    PCR_MODEL,
    PCR_SIGNER,
    ZERO_PCR,
)

Registers: TypeAlias = Mapping[int, frozenset[bytes]]
"""Registers by their number, each with the values that are accepted there."""

IMAGE_KEY: Final = f"{RECIPIENT}ImageSha384"
PURPOSE_KEY: Final = f"{ENCRYPTION_CONTEXT}strongroom:purpose"
CONTEXT_KEY: Final = f"{ENCRYPTION_CONTEXT}strongroom:context"

IMAGE_REGISTERS: Final = frozenset((PCR_IMAGE, PCR_BOOT, PCR_APPLICATION, PCR_SIGNER))
"""Those of which one release has one value each."""
VARIABLE: Final = "${"
"""Begins a policy variable, which stands for whatever the request says."""

_REGISTER_KEY: Final = re.compile(rf"{RECIPIENT}(?:ImageSha384|PCR(0|[1-9][0-9]?))", re.IGNORECASE)
_NITRO_TPM_KEY: Final = re.compile(rf"{RECIPIENT}NitroTPM.*", re.IGNORECASE)
_DIGITS: Final = re.compile(rf"[0-9a-fA-F]{{{2 * DIGEST_SIZE}}}")
_LIKE: Final = 0.7
"""How much a key must look like one of KMS's to be taken for a slip."""
_LONGEST: Final = 2 * len(IMAGE_KEY)


def register_key(index: int) -> str:
    """The condition key of a register."""
    return f"{RECIPIENT}PCR{index}"


_KEYS: Final = (IMAGE_KEY, *map(register_key, range(PCR_COUNT)))


def register_of(key: str) -> int | None:
    """The register that a condition key is about. None: no condition key of an enclave's register."""
    found = _REGISTER_KEY.fullmatch(key)
    index = int(found[1] or PCR_IMAGE) if found else PCR_COUNT
    return index if index < PCR_COUNT else None


def is_of_nitro_tpm(key: str) -> bool:
    """Whether the condition key is about an instance's NitroTPM, which no enclave has."""
    return _NITRO_TPM_KEY.fullmatch(key) is not None


def meant(key: str) -> str | None:
    """The condition key that somebody may have meant who wrote ``key``, which KMS does not have. None: it is one of
    KMS's, or looks like none that is about a register.
    """
    if register_of(key) is not None or is_of_nitro_tpm(key) or len(key) > _LONGEST:
        return None
    found, likeness = max(
        ((each, difflib.SequenceMatcher(None, key.lower(), each.lower()).ratio()) for each in _KEYS),
        key=operator.itemgetter(1),
    )
    return found if likeness > _LIKE else None


@dataclass(frozen=True, slots=True)
class ReleasedTo:
    """One release to which a key is to be opened. Construction raises ValueError for values that no register of a good
    enclave has, and for an image without PCR0, PCR1 and PCR2, one value each.
    """

    name: str
    """The appraisal policy's name for it."""
    pcrs: Mapping[int, tuple[bytes, ...]]
    """What each register must be, 48 bytes: one of these. Those of the image have one value each."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "pcrs", MappingProxyType(dict(sorted(self.pcrs.items()))))
        if not {PCR_IMAGE, PCR_BOOT, PCR_APPLICATION} <= self.pcrs.keys():
            raise ValueError("an image has PCR0, PCR1 and PCR2")
        for index, values in self.pcrs.items():
            if not 0 <= index < PCR_COUNT or not values:
                raise ValueError(f"PCR{index}: no such register, or no value")
            if index in IMAGE_REGISTERS - {PCR_SIGNER} and len(values) > 1:
                raise ValueError(f"PCR{index}: one release has one image")
            if any(len(value) != DIGEST_SIZE or value == ZERO_PCR for value in values):
                raise ValueError(f"PCR{index}: expected {DIGEST_SIZE} bytes that are not all zero")

    def registers(self, purpose: EnvelopePurpose) -> Registers:
        """What a key of this purpose asks for. A model's key is released before PCR16 is extended, so it is left out.

        Raises KeyPolicyError with ``unpinned_register`` when the release accepts any model, or any configuration, where
        the key would be opened to them all.
        """
        for index in required(purpose):
            if index not in self.pcrs:
                what = "model" if index == PCR_MODEL else "configuration"
                raise KeyPolicyError(
                    "unpinned_register",
                    f"release {self.name} accepts any {what}, so that the key would be opened to every {what}",
                    expected=f"a {what} that the appraisal policy requires",
                    got="none",
                )
        left_out = PCR_MODEL if purpose is EnvelopePurpose.MODEL else None
        return {index: frozenset(values) for index, values in self.pcrs.items() if index != left_out}


def required(purpose: EnvelopePurpose) -> tuple[int, ...]:
    """The registers that a statement asks for, whatever the release."""
    of_model = (PCR_MODEL,) if purpose is EnvelopePurpose.PROMPT else ()
    return (PCR_IMAGE, PCR_BOOT, PCR_APPLICATION, *of_model, PCR_CONFIGURATION)


# --- What is asked ------------------------------------------------------------------------------------------------


def digest_of(value: str) -> bytes | None:
    """The register that a condition's value stands for. None: no register's value."""
    return bytes.fromhex(value) if _DIGITS.fullmatch(value) else None


def operator_of(condition: Condition) -> Operator | None:
    """The condition's operator. None: IAM has no such operator."""
    try:
        return Operator.parse(condition.operator)
    except KeyPolicyError:
        return None


def asked(conditions: Iterable[Condition]) -> dict[int, frozenset[bytes]]:
    """The registers that an Allow with these conditions certainly asks for, each with the values that satisfy it.

    Only what holds for no request without a document counts: plain equality. A value that no register has satisfies
    nobody, and a policy variable may satisfy everybody.
    """
    found: dict[int, frozenset[bytes]] = {}
    for condition in conditions:
        if operator_of(condition) in _EQUALITY:
            _narrow(found, condition)
    return found


def withheld(condition: Condition) -> dict[int, frozenset[bytes]]:
    """The register, with its values, that a Deny with this one condition leaves; empty for one that leaves others.

    A negation is true of a request without a document, so that such a request is denied as well.
    """
    found: dict[int, frozenset[bytes]] = {}
    match operator_of(condition):
        case Operator(compares, is_negated=True, quantifier=quantifier) if quantifier is not Quantifier.FOR_ANY_VALUE:
            if Operator(compares) in _EQUALITY:
                _narrow(found, condition)
    return found


_EQUALITY: Final = (Operator("StringEquals"), Operator("StringEqualsIgnoreCase"))


def _narrow(found: dict[int, frozenset[bytes]], condition: Condition) -> None:
    index = register_of(condition.key)
    if index is None or any(VARIABLE in value for value in condition.values):
        return
    values = frozenset(digest for digest in map(digest_of, condition.values) if digest is not None)
    found[index] = found.get(index, values) & values


def both(one: Registers, other: Registers) -> dict[int, frozenset[bytes]]:
    """What is left when both must hold."""
    return {
        index: one.get(index, other.get(index, frozenset())) & other.get(index, one.get(index, frozenset()))
        for index in one.keys() | other.keys()
    }


@dataclass(frozen=True, slots=True)
class Gap:
    """By how much what is asked falls short of one release: the nearest."""

    missing: tuple[int, ...]
    """Registers that are not asked for, by number, 0 to 31."""
    foreign: Registers
    """Values that are accepted and are not the release's."""
    is_mixed: bool
    """Each of those values is another release's."""


def gap(found: Registers, releases: Sequence[Registers]) -> Gap | None:
    """None: every request that satisfies ``found`` comes from one of ``releases``, of which there is one at least."""
    gaps = [_gap(found, release, releases) for release in releases]
    nearest = min(gaps, key=lambda each: len(each.missing) + len(each.foreign))
    return nearest if nearest.missing or nearest.foreign else None


def _gap(found: Registers, release: Registers, releases: Sequence[Registers]) -> Gap:
    missing = tuple(index for index in release if index not in found)
    foreign = {index: found[index] - values for index, values in release.items() if index in found}
    foreign = {index: values for index, values in foreign.items() if values}
    others = {index: frozenset[bytes]().union(*(other.get(index, ()) for other in releases)) for index in foreign}
    return Gap(missing, foreign, all(values <= others[index] for index, values in foreign.items()))


def gap_of_one(found: Registers, purpose: EnvelopePurpose) -> Gap | None:
    """As :func:`gap` without any release to compare with: whether ``found`` has the shape of one."""
    missing = tuple(index for index in required(purpose) if index not in found)
    zeros = {index: frozenset((ZERO_PCR,)) for index, values in found.items() if ZERO_PCR in values}
    several = {index: found[index] for index in sorted(IMAGE_REGISTERS & found.keys()) if len(found[index]) > 1}
    foreign = {**several, **zeros}
    return Gap(missing, foreign, is_mixed=not zeros) if missing or foreign else None
