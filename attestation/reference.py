"""Reference values: what the registers of a good enclave hold, and how a register comes to its value.

PROTOCOL.md sections 1 and 4.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

DIGEST_SIZE = 48
"""Bytes in a PCR and in a SHA-384 digest."""

ZERO_PCR = bytes(DIGEST_SIZE)

DIGEST_PREFIX = "sha384:"
"""Begins a digest that is written for people or in JSON: 96 hexadecimal digits follow."""

PCR_IMAGE, PCR_BOOT, PCR_APPLICATION = 0, 1, 2
PCR_ROLE, PCR_INSTANCE, PCR_SIGNER = 3, 4, 8
PCR_MODEL, PCR_CONFIGURATION = 16, 17


def h384(label: str, data: bytes) -> bytes:
    """SHA-384 of ``data`` in the domain of ``label``: ``SHA-384(label || 0x00 || data)``."""
    return hashlib.sha384(label.encode("ascii") + b"\x00" + data).digest()


def digest_text(digest: bytes) -> str:
    """``digest`` as it is written everywhere: ``sha384:`` and its digits."""
    return f"{DIGEST_PREFIX}{digest.hex()}"


def extend(old: bytes, data: bytes) -> bytes:
    """A register's value after one ExtendPCR: ``SHA-384(old || data)``."""
    return hashlib.sha384(old + data).digest()


def once_extended(data: bytes) -> bytes:
    """The value of a register that was extended exactly once, from zero."""
    return extend(ZERO_PCR, data)


def configuration_digest(enclave_toml: bytes) -> bytes:
    """The digest of a measured configuration, as committed to PCR17: over the file's bytes, so that no parser stands
    between.
    """
    return h384("strongroom/1 configuration", enclave_toml)


@dataclass(frozen=True, slots=True)
class PcrSet:
    """The measurements of one image.

    They are only ever compared together: each alone says little (Trail of Bits, 2024-02). ValueError for a value that
    is not 48 bytes.
    """

    pcr0: bytes
    """48 bytes: the whole image."""
    pcr1: bytes
    """48 bytes: what boots. Of an EIF its kernel, command line and first ramdisk."""
    pcr2: bytes
    """48 bytes: the application. Of an EIF every ramdisk but the first."""
    pcr8: bytes | None = None
    """48 bytes: the certificate that signs the image. None for an image that is not signed."""

    def __post_init__(self) -> None:
        for value in (self.pcr0, self.pcr1, self.pcr2, *(() if self.pcr8 is None else (self.pcr8,))):
            if len(value) != DIGEST_SIZE:
                raise ValueError(f"a PCR has {DIGEST_SIZE} bytes, not {len(value)}")

    def is_ambiguous_beside(self, other: PcrSet) -> bool:
        """Whether one enclave could be both: the same image, and not two different signers."""
        same_image = (self.pcr0, self.pcr1, self.pcr2) == (other.pcr0, other.pcr1, other.pcr2)
        return same_image and (self.pcr8 == other.pcr8 or None in (self.pcr8, other.pcr8))

    def as_registers(self) -> dict[int, bytes]:
        registers = {PCR_IMAGE: self.pcr0, PCR_BOOT: self.pcr1, PCR_APPLICATION: self.pcr2}
        if self.pcr8 is not None:
            registers[PCR_SIGNER] = self.pcr8
        return registers
