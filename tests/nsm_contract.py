"""One contract for the Nitro Secure Module, held to every backend. Expectations are those of AWS's ``nsm-check`` and
driver.

Registers stay locked on a device, so each test takes registers that are still free, and the test that locks all of
them comes last.
"""

from __future__ import annotations

from datetime import UTC, datetime

import cbor2
import pytest

from attestation.chain import Anchor, Trust
from attestation.reference import ZERO_PCR, PcrSet, extend, once_extended
from attestation.verifier import authenticate
from emulator.pki import DevelopmentRoot
from enclave.nsm import MAX_REQUEST, Nsm, NsmError, NsmErrorCode, Transport, decode_response, encode_request

INSTANCE = "i-026ae32a18c80f866"
IMAGE = PcrSet(once_extended(b"image"), once_extended(b"boot"), once_extended(b"application"))


class Backend:
    def __init__(self, nsm: Nsm, transport: Transport, anchor: DevelopmentRoot | None) -> None:
        self.nsm = nsm
        self.transport = transport
        self.anchor = anchor
        """None for a real device, whose anchor is AWS's."""

    def free(self, count: int = 1) -> list[int]:
        locked = self.nsm.describe_nsm().locked_pcrs
        free = [index for index in range(16, 32) if index not in locked]
        if len(free) < count:
            pytest.skip("the device has no unlocked registers left: restart the enclave to run this test")
        return free[:count]


def refused(code: NsmErrorCode) -> pytest.RaisesExc[NsmError]:
    return pytest.raises(NsmError, check=lambda error: error.code == code)


def payload(document: bytes) -> dict[str, object]:
    value = cbor2.loads(cbor2.loads(document)[2])
    assert isinstance(value, dict)
    return value


class NsmContract:
    """The tests; a subclass's module has the fixture ``backend``."""

    beyond_8_bits = NsmErrorCode.INVALID_INDEX
    """What a module says to an index or a range above 255. AWS's API has 16 bits for it; QEMU's module reads 8."""

    def out_of_range(self, index: int) -> NsmErrorCode:
        return self.beyond_8_bits if index > 0xFF else NsmErrorCode.INVALID_INDEX

    def test_describes_itself(self, backend: Backend) -> None:
        description = backend.nsm.describe_nsm()
        assert description.max_pcrs == 32
        assert description.digest == "SHA384"
        assert "-enc" in description.module_id, description.module_id
        assert set(description.locked_pcrs) >= set(range(16))
        assert list(description.locked_pcrs) == sorted(description.locked_pcrs)

    def test_registers_at_boot(self, backend: Backend) -> None:
        if backend.anchor is None:
            pytest.skip("a device's upper registers may have been used since its enclave started")
        assert backend.nsm.describe_nsm().locked_pcrs == tuple(range(16))
        filled = {**IMAGE.as_registers(), 4: once_extended(INSTANCE.encode())}
        for index in range(32):
            register = backend.nsm.describe_pcr(index)
            assert register.lock == (index < 16)
            assert register.data == filled.get(index, ZERO_PCR)

    def test_extend_chains_over_what_the_register_held(self, backend: Backend) -> None:
        (index,) = backend.free()
        value = backend.nsm.describe_pcr(index).data
        for data in (b"first", b"", bytes(48), b"first"):
            value = extend(value, data)
            assert backend.nsm.extend_pcr(index, data) == value
        register = backend.nsm.describe_pcr(index)
        assert register.data == value
        assert not register.lock

    @pytest.mark.parametrize("index", [32, 255, 256, 0xFFFF])
    def test_index_out_of_range(self, backend: Backend, index: int) -> None:
        with refused(self.out_of_range(index)):
            backend.nsm.describe_pcr(index)
        with refused(self.out_of_range(index)):
            backend.nsm.extend_pcr(index, b"data")
        with refused(self.out_of_range(index)):
            backend.nsm.lock_pcr(index)

    def test_index_that_the_request_cannot_hold(self, backend: Backend) -> None:
        for index in (-1, 0x1_0000):
            with refused(NsmErrorCode.INVALID_ARGUMENT):
                backend.nsm.describe_pcr(index)
            with refused(NsmErrorCode.INVALID_ARGUMENT):
                backend.nsm.lock_pcrs(index)

    def test_last_register_is_a_register(self, backend: Backend) -> None:
        assert len(backend.nsm.describe_pcr(31).data) == 48

    @pytest.mark.parametrize("index", [0, 4, 15])
    def test_registers_of_the_system_are_read_only(self, backend: Backend, index: int) -> None:
        before = backend.nsm.describe_pcr(index)
        with refused(NsmErrorCode.READ_ONLY_INDEX):
            backend.nsm.extend_pcr(index, b"data")
        with refused(NsmErrorCode.READ_ONLY_INDEX):
            backend.nsm.lock_pcr(index)
        assert backend.nsm.describe_pcr(index) == before

    def test_lock_is_for_good(self, backend: Backend) -> None:
        (index,) = backend.free()
        backend.nsm.extend_pcr(index, b"data")
        backend.nsm.lock_pcr(index)
        locked = backend.nsm.describe_pcr(index)
        assert locked.lock
        with refused(NsmErrorCode.READ_ONLY_INDEX):
            backend.nsm.lock_pcr(index)
        with refused(NsmErrorCode.READ_ONLY_INDEX):
            backend.nsm.extend_pcr(index, b"data")
        assert backend.nsm.describe_pcr(index) == locked
        assert index in backend.nsm.describe_nsm().locked_pcrs

    def test_random_is_256_bytes_and_new_each_time(self, backend: Backend) -> None:
        drawn = [backend.nsm.get_random() for _ in range(16)]
        assert {len(random) for random in drawn} == {256}
        assert len(set(drawn)) == 16

    def test_document_holds_locked_registers_only(self, backend: Backend) -> None:
        first, second = backend.free(2)
        backend.nsm.extend_pcr(first, b"first")
        backend.nsm.extend_pcr(second, b"second")
        pcrs = payload(backend.nsm.attestation())["pcrs"]
        assert isinstance(pcrs, dict)
        assert tuple(pcrs) == backend.nsm.describe_nsm().locked_pcrs
        backend.nsm.lock_pcr(first)
        after = payload(backend.nsm.attestation())["pcrs"]
        assert after == {**pcrs, first: backend.nsm.describe_pcr(first).data}

    def test_document_carries_what_was_asked_and_null_otherwise(self, backend: Backend) -> None:
        assert {payload(backend.nsm.attestation())[name] for name in ("user_data", "nonce", "public_key")} == {None}
        claims = payload(backend.nsm.attestation(user_data=b"u", nonce=b"n", public_key=b"k"))
        assert (claims["user_data"], claims["nonce"], claims["public_key"]) == (b"u", b"n", b"k")
        assert claims["module_id"] == backend.nsm.describe_nsm().module_id
        assert claims["digest"] == "SHA384"

    @pytest.mark.parametrize("size", [1, 512, 513, 1024])
    def test_field_sizes_that_fit(self, backend: Backend, size: int) -> None:
        claims = payload(backend.nsm.attestation(user_data=bytes(size), nonce=bytes(size), public_key=bytes(size)))
        assert {claims[name] for name in ("user_data", "nonce", "public_key")} == {bytes(size)}

    @pytest.mark.parametrize("name", ["user_data", "nonce", "public_key"])
    def test_field_of_1025_bytes_is_never_asked_for(self, backend: Backend, name: str) -> None:
        with refused(NsmErrorCode.INPUT_TOO_LARGE):
            backend.nsm.attestation(**{name: bytes(1025)})

    def test_document_passes_the_verifier_under_its_own_anchor(self, backend: Backend) -> None:
        if backend.anchor is None:
            pytest.skip("AWS's own documents are verified in the attestation tests")
        document = backend.nsm.attestation(user_data=b"u", nonce=bytes(32))
        anchor = Anchor(Trust.EMULATED, backend.anchor.certificate_der)
        authenticate(document, anchor=anchor, at=datetime.now(UTC))

    def test_request_of_4096_bytes_and_one_more(self, backend: Backend) -> None:
        (index,) = backend.free()
        overhead = len(encode_request("ExtendPCR", {"index": index, "data": bytes(1000)})) - 1000
        value = backend.nsm.describe_pcr(index).data
        longest = bytes(MAX_REQUEST - overhead)
        assert len(encode_request("ExtendPCR", {"index": index, "data": longest})) == 0x1000
        assert backend.nsm.extend_pcr(index, longest) == extend(value, longest)
        with refused(NsmErrorCode.INPUT_TOO_LARGE):
            backend.nsm.extend_pcr(index, longest + b"\x00")

    def test_oversized_request_is_refused_behind_the_client_too(self, backend: Backend) -> None:
        request = encode_request("ExtendPCR", {"index": 31, "data": bytes(MAX_REQUEST)})
        with refused(NsmErrorCode.INPUT_TOO_LARGE):  # the driver says it by errno, the software NSM by a response
            decode_response("ExtendPCR", backend.transport.exchange(request))
        assert backend.nsm.describe_pcr(31).data == ZERO_PCR or backend.anchor is None

    def test_unknown_request(self, backend: Backend) -> None:
        response = cbor2.loads(backend.transport.exchange(cbor2.dumps({"UnlockPCR": {"index": 16}})))
        assert response == {"Error": "InvalidOperation"}

    def test_ranges(self, backend: Backend) -> None:
        first = min(backend.free(2))
        before = backend.nsm.describe_nsm().locked_pcrs
        backend.nsm.lock_pcrs(0)
        backend.nsm.lock_pcrs(16)
        assert backend.nsm.describe_nsm().locked_pcrs == before
        for count in (33, 255, 256, 0xFFFF):
            with refused(self.out_of_range(count)):
                backend.nsm.lock_pcrs(count)
        assert backend.nsm.describe_nsm().locked_pcrs == before
        backend.nsm.lock_pcrs(first + 1)
        assert first in backend.nsm.describe_nsm().locked_pcrs

    def test_range_of_all_registers_even_when_locked(self, backend: Backend) -> None:
        """Last in this file: no register of a real device is free after it."""
        backend.nsm.lock_pcrs(32)
        assert backend.nsm.describe_nsm().locked_pcrs == tuple(range(32))
        backend.nsm.lock_pcrs(32)
        for index in range(32):
            with refused(NsmErrorCode.READ_ONLY_INDEX):
                backend.nsm.extend_pcr(index, b"data")
        assert len(payload(backend.nsm.attestation())["pcrs"]) == 32  # type: ignore[arg-type]
