"""The NSM's bytes in both directions: any request gets an answer, and any answer is read or refused."""

from __future__ import annotations

from collections.abc import Callable
from datetime import UTC, datetime

import cbor2

from attestation.reference import PcrSet, once_extended
from emulator.nsm import MAX_RESPONSE, SoftwareNsm, boot_registers, new_module_id
from emulator.pki import DevelopmentRoot
from enclave.nsm import Nsm, NsmError, encode_request

_NOW = datetime(2026, 1, 1, tzinfo=UTC)
_IMAGE = PcrSet(once_extended(b"image"), once_extended(b"boot"), once_extended(b"application"))
_NSM = SoftwareNsm(
    DevelopmentRoot.generate(_NOW), boot_registers(_IMAGE), module_id=new_module_id(), clock=lambda: _NOW
)
_RESPONSES = frozenset({"DescribeNSM", "GetRandom", "DescribePCR", "ExtendPCR", "Attestation", "Error"})


class _Answer:
    """A module that answers every request with the same bytes."""

    def __init__(self, response: bytes) -> None:
        self._response = response

    def exchange(self, _request: bytes) -> bytes:
        return self._response

    def close(self) -> None:
        """Nothing is open."""


def one_input(data: bytes) -> None:
    response = _NSM.handle(data)
    assert len(response) <= MAX_RESPONSE
    value = cbor2.loads(response)
    assert value in ("LockPCR", "LockPCRs") or (isinstance(value, dict) and value.keys() <= _RESPONSES)

    nsm = Nsm(_Answer(data))
    requests: tuple[Callable[[], object], ...] = (
        nsm.describe_nsm,
        nsm.get_random,
        lambda: nsm.describe_pcr(16),
        lambda: nsm.extend_pcr(16, b"data"),
        lambda: nsm.lock_pcr(16),
        lambda: nsm.lock_pcrs(16),
        nsm.attestation,
    )
    for request in requests:
        try:
            request()
        except NsmError:
            continue


def seeds() -> list[bytes]:
    attestation = {"user_data": b"u", "nonce": None, "public_key": b"k"}
    requests = [
        encode_request("DescribeNSM"),
        encode_request("GetRandom"),
        encode_request("DescribePCR", {"index": 0}),
        encode_request("ExtendPCR", {"index": 16, "data": b"data"}),
        encode_request("LockPCR", {"index": 31}),
        encode_request("LockPCRs", {"range": 17}),
        encode_request("Attestation", attestation),
    ]
    fresh = SoftwareNsm(
        DevelopmentRoot.generate(_NOW), boot_registers(_IMAGE), module_id=new_module_id(), clock=lambda: _NOW
    )
    return [*requests, *(fresh.handle(request) for request in requests), cbor2.dumps({"Error": "InvalidIndex"})]
