"""Where the parent is. Measured configurations name it as CID 3, which it has on Nitro; an emulated machine's vsock
serves CID 2 alone, and says so on the kernel's command line (where ``enclave/machine/checks.h`` lets it). So one image,
with one set of registers, serves both.

Nothing rests on this number: the parent is believed in nothing, and neither would another peer be.
"""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import TypeVar

from attestation.errors import StrongroomError
from enclave.config import EnclaveConfiguration
from vsockrpc.address import VsockAddress, parse_address

T = TypeVar("T")

PARENT_CID = 3
CMDLINE = Path("/proc/cmdline")

_KEY = "parent_cid="
_MAX_CID = 0xFFFF_FFFE


class ParentError(StrongroomError):
    """The kernel's command line says something unusable of the parent (code ``bad_parent_cid``)."""


def parent_cid(cmdline: str) -> int:
    """What ``parent_cid=`` says, else 3. Raises ParentError for anything there but one CID (2 to 2^32 - 2)."""
    named = [word.removeprefix(_KEY) for word in cmdline.split() if word.startswith(_KEY)]
    if not named:
        return PARENT_CID
    if len(named) > 1 or not re.fullmatch(r"[1-9][0-9]{0,9}", named[0], re.ASCII) or not 2 <= int(named[0]) <= _MAX_CID:
        raise ParentError(
            "bad_parent_cid",
            "the kernel's command line names no CID of the parent",
            expected=f"one of {_KEY}2 to {_KEY}{_MAX_CID}",
            got=ascii(" ".join(named))[:40],
        )
    return int(named[0])


def find_parent(configuration: EnclaveConfiguration, cmdline: Path = CMDLINE) -> EnclaveConfiguration:
    """The configuration with every address of the parent as it is on this machine; its digest stays that of the file.

    Raises ParentError, or OSError when ``cmdline`` cannot be read; it is not looked at when nothing names CID 3.
    """
    kms, nsm = configuration.kms, configuration.nsm
    module = None if nsm.startswith("device:") else parse_address(nsm)
    if not any(map(_is_parents, (configuration.model_store, None if kms is None else kms.egress, module))):
        return configuration
    cid = parent_cid(cmdline.read_text())
    return replace(
        configuration,
        model_store=_at(configuration.model_store, cid),
        kms=None if kms is None else replace(kms, egress=_at(kms.egress, cid)),
        nsm=nsm if module is None else str(_at(module, cid)),
    )


def _is_parents(address: object) -> bool:
    return isinstance(address, VsockAddress) and address.cid == PARENT_CID


def _at(address: T, cid: int) -> T:
    if isinstance(address, VsockAddress) and _is_parents(address):
        return replace(address, cid=cid)
    return address
