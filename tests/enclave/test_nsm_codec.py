"""The NSM's bytes: requests exactly as AWS's library encodes them, and answers that are read or refused, never anything
else."""

from __future__ import annotations

import cbor2
import pytest
from hypothesis import given
from hypothesis import strategies as st

from enclave.nsm import (
    MAX_RESPONSE,
    Nsm,
    NsmDescription,
    NsmError,
    NsmErrorCode,
    PcrDescription,
    decode_response,
    encode_request,
    open_nsm,
)
from vsockrpc.errors import AddressError

PCR = bytes(range(48))
DESCRIPTION = {
    "version_major": 1,
    "version_minor": 0,
    "version_patch": 0,
    "module_id": "i-026ae32a18c80f866-enc01780356441553dc",
    "max_pcrs": 32,
    "locked_pcrs": list(range(16)),
    "digest": "SHA384",
}


class Scripted:
    """Answers every request with the same bytes, and keeps what it was asked."""

    def __init__(self, response: bytes) -> None:
        self.response = response
        self.asked: list[bytes] = []

    def exchange(self, request: bytes) -> bytes:
        self.asked.append(request)
        return self.response

    def close(self) -> None:
        """Nothing is open."""


def every_request(nsm: Nsm) -> list[object]:
    """What each of the seven requests gives: its value or its error."""
    results: list[object] = []
    for ask in (
        nsm.describe_nsm,
        nsm.get_random,
        lambda: nsm.describe_pcr(0),
        lambda: nsm.extend_pcr(16, b"data"),
        lambda: nsm.lock_pcr(16),
        lambda: nsm.lock_pcrs(16),
        nsm.attestation,
    ):
        try:
            results.append(ask())
        except NsmError as error:
            results.append(error)
    return results


def test_requests_byte_for_byte() -> None:
    transport = Scripted(b"")
    every_request(Nsm(transport))
    assert transport.asked == [
        b"\x6bDescribeNSM",
        b"\x69GetRandom",
        b"\xa1\x6bDescribePCR\xa1\x65index\x00",
        b"\xa1\x69ExtendPCR\xa2\x65index\x10\x64data\x44data",
        b"\xa1\x67LockPCR\xa1\x65index\x10",
        b"\xa1\x68LockPCRs\xa1\x65range\x10",
        b"\xa1\x6bAttestation\xa3\x69user_data\xf6\x65nonce\xf6\x6apublic_key\xf6",
    ]


def test_attestation_request_keeps_the_order_of_its_fields() -> None:
    transport = Scripted(b"")
    with pytest.raises(NsmError):
        Nsm(transport).attestation(public_key=b"k", nonce=b"n", user_data=b"u")
    assert transport.asked == [b"\xa1\x6bAttestation\xa3\x69user_data\x41u\x65nonce\x41n\x6apublic_key\x41k"]


def test_answers_as_the_device_gives_them() -> None:
    def answer(value: object) -> Nsm:
        return Nsm(Scripted(cbor2.dumps(value)))

    assert answer({"DescribeNSM": DESCRIPTION}).describe_nsm() == NsmDescription(
        1, 0, 0, "i-026ae32a18c80f866-enc01780356441553dc", 32, tuple(range(16)), "SHA384"
    )
    # The head that the kernel's own random number driver compares byte for byte.
    assert Nsm(Scripted(b"\xa1\x69GetRandom\xa1\x66random\x42\x01\x02")).get_random() == b"\x01\x02"
    assert answer({"DescribePCR": {"lock": True, "data": PCR}}).describe_pcr(0) == PcrDescription(True, PCR)
    assert answer({"ExtendPCR": {"data": PCR}}).extend_pcr(16, b"") == PCR
    answer("LockPCR").lock_pcr(16)
    answer("LockPCRs").lock_pcrs(16)
    assert answer({"Attestation": {"document": b"\x84"}}).attestation() == b"\x84"


def test_field_that_a_later_module_adds_is_ignored() -> None:
    nsm = Nsm(Scripted(cbor2.dumps({"DescribePCR": {"lock": False, "data": PCR, "since": 7}})))
    assert nsm.describe_pcr(16) == PcrDescription(False, PCR)


@pytest.mark.parametrize("code", list(NsmErrorCode))
def test_every_error_code_is_raised_by_every_request(code: NsmErrorCode) -> None:
    for error in every_request(Nsm(Scripted(cbor2.dumps({"Error": code.value})))):
        assert isinstance(error, NsmError)
        assert error.code == code


@pytest.mark.parametrize(
    ("response", "code"),
    [
        (b"", NsmErrorCode.INTERNAL_ERROR),
        (b"\xff", NsmErrorCode.INTERNAL_ERROR),
        (b"\xa1\x6bDescribePCR", NsmErrorCode.INTERNAL_ERROR),
        (cbor2.dumps({"DescribePCR": {"lock": False, "data": PCR}}) + b"\x00", NsmErrorCode.INTERNAL_ERROR),
        (cbor2.dumps({"DescribePCR": {"lock": False, "data": PCR}})[:-1], NsmErrorCode.INTERNAL_ERROR),
        (b"\xa1\x6bDescribePCR\xa2\x64lock\xf4\x64lock\xf4", NsmErrorCode.INTERNAL_ERROR),
        (cbor2.dumps({"DescribePCR": {"lock": 0, "data": PCR}}), NsmErrorCode.INTERNAL_ERROR),
        (cbor2.dumps({"DescribePCR": {"lock": False}}), NsmErrorCode.INTERNAL_ERROR),
        (cbor2.dumps({"DescribePCR": {"lock": False, "data": PCR[:32]}}), NsmErrorCode.INTERNAL_ERROR),
        (cbor2.dumps({"DescribePCR": {"lock": False, "data": PCR.hex()}}), NsmErrorCode.INTERNAL_ERROR),
        (cbor2.dumps({"DescribePCR": [False, PCR]}), NsmErrorCode.INTERNAL_ERROR),
        (cbor2.dumps("DescribePCR"), NsmErrorCode.INTERNAL_ERROR),
        (cbor2.dumps({}), NsmErrorCode.INTERNAL_ERROR),
        (cbor2.dumps({"DescribePCR": {}, "Error": "InternalError"}), NsmErrorCode.INTERNAL_ERROR),
        (cbor2.dumps({"Error": "Success"}), NsmErrorCode.INTERNAL_ERROR),
        (cbor2.dumps({"Error": 3}), NsmErrorCode.INTERNAL_ERROR),
        (cbor2.dumps({"Error": [1]}), NsmErrorCode.INTERNAL_ERROR),
        (cbor2.dumps(7), NsmErrorCode.INTERNAL_ERROR),
        (cbor2.dumps("LockPCR"), NsmErrorCode.INVALID_RESPONSE),
        (cbor2.dumps({"ExtendPCR": {"data": PCR}}), NsmErrorCode.INVALID_RESPONSE),
        (cbor2.dumps({7: {}}), NsmErrorCode.INVALID_RESPONSE),
    ],
)
def test_answer_that_cannot_be_used(response: bytes, code: NsmErrorCode) -> None:
    with pytest.raises(NsmError) as raised:
        Nsm(Scripted(response)).describe_pcr(16)
    assert raised.value.code == code


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("version_major", True),
        ("max_pcrs", 0x1_0000),
        ("max_pcrs", -1),
        ("module_id", ""),
        ("module_id", "i" * 101),
        ("locked_pcrs", list(range(33))),
        ("locked_pcrs", [1, "2"]),
        ("locked_pcrs", [False]),
        ("digest", None),
    ],
)
def test_description_out_of_bounds(field: str, value: object) -> None:
    with pytest.raises(NsmError) as raised:
        Nsm(Scripted(cbor2.dumps({"DescribeNSM": {**DESCRIPTION, field: value}}))).describe_nsm()
    assert raised.value.code == NsmErrorCode.INTERNAL_ERROR


def test_empty_random_is_no_random() -> None:
    with pytest.raises(NsmError):
        Nsm(Scripted(cbor2.dumps({"GetRandom": {"random": b""}}))).get_random()


def test_number_out_of_16_bits_is_not_sent() -> None:
    transport = Scripted(b"")
    for number in (-1, 0x1_0000):
        with pytest.raises(NsmError) as raised:
            Nsm(transport).extend_pcr(number, b"")
        assert raised.value.code == NsmErrorCode.INVALID_ARGUMENT
    assert transport.asked == []


@given(st.binary(max_size=1024) | st.none(), st.binary(max_size=1024) | st.none(), st.binary(max_size=1024) | st.none())
def test_attestation_request_round_trip(user_data: bytes | None, nonce: bytes | None, public_key: bytes | None) -> None:
    arguments = {"user_data": user_data, "nonce": nonce, "public_key": public_key}
    assert cbor2.loads(encode_request("Attestation", arguments)) == {"Attestation": arguments}


@given(st.integers(0, 0xFFFF), st.binary(max_size=4096))
def test_extend_request_round_trip(index: int, data: bytes) -> None:
    assert cbor2.loads(encode_request("ExtendPCR", {"index": index, "data": data})) == {
        "ExtendPCR": {"index": index, "data": data}
    }


@given(st.booleans(), st.binary(min_size=48, max_size=48))
def test_register_round_trip(lock: bool, data: bytes) -> None:
    nsm = Nsm(Scripted(cbor2.dumps({"DescribePCR": {"lock": lock, "data": data}})))
    assert nsm.describe_pcr(16) == PcrDescription(lock, data)


_VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.text(max_size=8)
    | st.binary(max_size=64)
    | st.floats(allow_nan=False),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8) | st.integers(), inner, max_size=3),
    max_leaves=8,
)
_NAMES = st.sampled_from(
    ["DescribeNSM", "GetRandom", "DescribePCR", "ExtendPCR", "LockPCR", "LockPCRs", "Attestation", "Error"]
)


@given(
    st.binary(max_size=200)
    | _VALUES.map(cbor2.dumps)
    | st.tuples(_NAMES, _VALUES).map(lambda p: cbor2.dumps(dict([p])))
)
def test_any_answer_is_read_or_refused(response: bytes) -> None:
    for result in every_request(Nsm(Scripted(response))):
        assert isinstance(result, NsmDescription | PcrDescription | bytes | NsmError | None)


def test_answer_longer_than_the_buffer_is_refused() -> None:
    response = cbor2.dumps({"Attestation": {"document": bytes(MAX_RESPONSE)}})
    with pytest.raises(NsmError):
        decode_response("Attestation", response).data("document", 1, MAX_RESPONSE - 1)


def test_address_that_is_none() -> None:
    with pytest.raises(AddressError):
        open_nsm("/dev/nsm")
