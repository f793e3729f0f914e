"""The software NSM's core: what a raw client can do to it, the bytes of its documents, and its certificates'
renewal."""

from __future__ import annotations

import itertools
import json
from datetime import UTC, datetime, timedelta
from pathlib import Path

import cbor2
import pytest
from cryptography import x509
from hypothesis import given
from hypothesis import strategies as st

from attestation.chain import Anchor, Trust
from attestation.reference import ZERO_PCR, PcrSet, extend, once_extended
from attestation.verifier import authenticate
from emulator.nsm import MAX_REQUEST, MAX_RESPONSE, SoftwareNsm, boot_registers, new_module_id
from emulator.pki import DevelopmentRoot, PkiError

NOW = datetime(2026, 5, 4, 3, 2, 1, 987_654, tzinfo=UTC)
ROOT = DevelopmentRoot.generate(NOW)
IMAGE = PcrSet(once_extended(b"image"), once_extended(b"boot"), once_extended(b"application"), once_extended(b"signer"))
NITRO = Path(__file__).resolve().parents[3] / "shared" / "vectors" / "nitro"


class Clock:
    def __init__(self) -> None:
        self.now = NOW

    def __call__(self) -> datetime:
        return self.now


def make(*, root: DevelopmentRoot = ROOT, clock: Clock | None = None, debug: bool = False) -> SoftwareNsm:
    return SoftwareNsm(root, boot_registers(IMAGE, debug=debug), module_id=new_module_id(), clock=clock or Clock())


def ask(nsm: SoftwareNsm, request: object) -> object:
    return cbor2.loads(nsm.handle(cbor2.dumps(request)))


def register(nsm: SoftwareNsm, index: int) -> bytes:
    response = ask(nsm, {"DescribePCR": {"index": index}})
    assert isinstance(response, dict)
    data = response["DescribePCR"]["data"]
    assert isinstance(data, bytes)
    return data


def document(nsm: SoftwareNsm, **fields: bytes | None) -> bytes:
    response = ask(nsm, {"Attestation": fields})
    assert isinstance(response, dict)
    signed = response["Attestation"]["document"]
    assert isinstance(signed, bytes)
    return signed


# --- Registers ---------------------------------------------------------------------------------------------------


def test_image_role_and_instance_are_measured() -> None:
    registers = boot_registers(IMAGE, instance_id="i-026ae32a18c80f866", role_arn="arn:aws:iam::123456789012:role/r")
    nsm = SoftwareNsm(ROOT, registers, module_id=new_module_id("i-026ae32a18c80f866"), clock=Clock())
    assert [register(nsm, index) for index in (0, 1, 2, 8)] == [IMAGE.pcr0, IMAGE.pcr1, IMAGE.pcr2, IMAGE.pcr8]
    assert register(nsm, 3) == extend(ZERO_PCR, b"arn:aws:iam::123456789012:role/r")
    assert register(nsm, 4) == extend(ZERO_PCR, b"i-026ae32a18c80f866")
    assert {register(nsm, index) for index in (5, 6, 7, *range(9, 32))} == {ZERO_PCR}


def test_role_register_is_zero_without_a_role() -> None:
    assert register(make(), 3) == ZERO_PCR


def test_debug_enclave_hides_the_image_only() -> None:
    nsm = make(debug=True)
    assert {register(nsm, index) for index in (0, 1, 2, 8)} == {ZERO_PCR}
    assert register(nsm, 4) != ZERO_PCR


def test_instance_register_as_in_documents_signed_by_aws() -> None:
    if not NITRO.exists():
        pytest.skip(f"the shared vectors are not here ({NITRO.name})")
    answers = json.loads((NITRO / "pcr-known-answers.json").read_text())["pcr4"]
    assert answers
    for answer in answers:
        registers = boot_registers(IMAGE, instance_id=answer["instance_id"])
        assert registers[4].hex() == answer["pcr4"]


@pytest.mark.parametrize("registers", [{16: ZERO_PCR}, {-1: ZERO_PCR}, {0: bytes(32)}])
def test_registers_that_cannot_be(registers: dict[int, bytes]) -> None:
    with pytest.raises(ValueError):
        SoftwareNsm(ROOT, registers, module_id=new_module_id(), clock=Clock())


@pytest.mark.parametrize("module_id", ["", "i-1", "i-00000000000000000", "I-00000000000000000-enc0123456789abcdef"])
def test_module_id_that_no_certificate_can_name(module_id: str) -> None:
    with pytest.raises(PkiError) as raised:
        SoftwareNsm(ROOT, {}, module_id=module_id, clock=Clock())
    assert raised.value.code == "invalid_argument"


# --- Requests ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("request_bytes", "code"),
    [
        (b"", "InvalidOperation"),
        (b"\xff", "InvalidOperation"),
        (b"\x6bDescribeNSM\x00", "InvalidOperation"),
        (cbor2.dumps("LockPCR"), "InvalidOperation"),
        (cbor2.dumps("GetEverything"), "InvalidOperation"),
        (cbor2.dumps({}), "InvalidOperation"),
        (cbor2.dumps({"DescribeNSM": {}}), "InvalidOperation"),
        (cbor2.dumps({"LockPCR": {"index": 16}, "LockPCRs": {"range": 16}}), "InvalidOperation"),
        (b"\xa1\x67LockPCR\xa2\x65index\x10\x65index\x11", "InvalidOperation"),
        (cbor2.dumps({"LockPCR": {"index": True}}), "InvalidOperation"),
        (cbor2.dumps({"LockPCR": {"index": 16.0}}), "InvalidOperation"),
        (cbor2.dumps({"LockPCR": {"index": -1}}), "InvalidOperation"),
        (cbor2.dumps({"LockPCR": {"index": 0x1_0000}}), "InvalidOperation"),
        (cbor2.dumps({"LockPCR": {"index": 16, "more": 1}}), "InvalidOperation"),
        (cbor2.dumps({"LockPCR": {}}), "InvalidOperation"),
        (cbor2.dumps({"LockPCR": [16]}), "InvalidOperation"),
        (cbor2.dumps({"LockPCRs": {"range": "16"}}), "InvalidOperation"),
        (cbor2.dumps({"ExtendPCR": {"index": 16, "data": "text"}}), "InvalidOperation"),
        (cbor2.dumps({"ExtendPCR": {"index": 16}}), "InvalidOperation"),
        (cbor2.dumps({"ExtendPCR": {"index": 32, "data": b""}}), "InvalidIndex"),
        (cbor2.dumps({"Attestation": {"nonce": "text"}}), "InvalidOperation"),
        (cbor2.dumps({"Attestation": {"nonce": 0}}), "InvalidOperation"),
        (cbor2.dumps({"Attestation": {"pcrs": {}}}), "InvalidOperation"),
        (cbor2.dumps({"Attestation": None}), "InvalidOperation"),
        (bytes(MAX_REQUEST + 1), "InputTooLarge"),
    ],
)
def test_request_that_is_none_of_the_seven(request_bytes: bytes, code: str) -> None:
    nsm = make()
    before = [register(nsm, index) for index in range(32)]
    assert cbor2.loads(nsm.handle(request_bytes)) == {"Error": code}
    assert [register(nsm, index) for index in range(32)] == before


def test_fields_that_are_missing_are_null() -> None:
    nsm = make()
    for fields in ({}, {"nonce": b"n"}, {"user_data": None, "nonce": b"n", "public_key": None}):
        payload = cbor2.loads(cbor2.loads(document(nsm, **fields))[2])
        assert payload["user_data"] is None
        assert payload["nonce"] == fields.get("nonce")


def test_field_beyond_the_documents_definition_passes_as_on_the_device() -> None:
    """AWS's module does not enforce its own CDDL; what refuses such a document is every verifier, and our client before
    it asks."""
    nsm = make()
    assert cbor2.loads(cbor2.loads(document(nsm, nonce=bytes(1025)))[2])["nonce"] == bytes(1025)
    longest = bytes(MAX_REQUEST - len(cbor2.dumps({"Attestation": {"nonce": bytes(4000)}})) + 4000)
    response = nsm.handle(cbor2.dumps({"Attestation": {"nonce": longest}}))
    assert len(response) <= MAX_RESPONSE
    assert "Attestation" in cbor2.loads(response)


NSM = make()


@given(st.binary(max_size=MAX_REQUEST + 8))
def test_any_bytes_get_an_answer(request_bytes: bytes) -> None:
    response = cbor2.loads(NSM.handle(request_bytes))
    assert isinstance(response, dict)
    assert response.keys() <= {"DescribeNSM", "GetRandom", "Error"}


# --- Documents ---------------------------------------------------------------------------------------------------


def test_document_in_the_bytes_of_awss_since_2025() -> None:
    nsm = make()
    signed = document(nsm, user_data=b"u")
    assert signed[0] == 0x84  # untagged, four elements
    protected, unprotected, payload, signature = cbor2.loads(signed)
    assert protected == bytes.fromhex("a1013822")
    assert unprotected == {}
    assert len(signature) == 96
    assert payload[0] == 0xBF
    assert payload[-1] == 0xFF
    claims = cbor2.loads(payload)
    assert list(claims) == [
        "module_id",
        "digest",
        "timestamp",
        "pcrs",
        "certificate",
        "cabundle",
        "public_key",
        "user_data",
        "nonce",
    ]
    assert list(claims["pcrs"]) == list(range(16))
    assert claims["timestamp"] == int(NOW.timestamp() * 1000)
    assert claims["public_key"] is None
    assert claims["nonce"] is None
    assert claims["cabundle"][0] == ROOT.certificate_der
    assert all(len(certificate) <= 1024 for certificate in (*claims["cabundle"], claims["certificate"]))


def test_document_has_the_shape_of_a_real_one() -> None:
    path = NITRO / "20251110-mystenlabs-8e5652f3.cbor"
    if not path.exists():
        pytest.skip(f"the shared vectors are not here ({NITRO.name})")
    ours, real = (cbor2.loads(document(make()))), cbor2.loads(path.read_bytes())
    assert (ours[0], ours[1], ours[2][:1], len(ours[3])) == (real[0], real[1], real[2][:1], len(real[3]))
    ours, real = cbor2.loads(ours[2]), cbor2.loads(real[2])
    assert list(ours) == list(real)
    assert len(ours["cabundle"]) == len(real["cabundle"])
    certificates = zip([*ours["cabundle"], ours["certificate"]], [*real["cabundle"], real["certificate"]], strict=True)
    for mine, theirs in certificates:
        mine, theirs = x509.load_der_x509_certificate(mine), x509.load_der_x509_certificate(theirs)
        assert [name.oid for name in mine.subject] == [name.oid for name in theirs.subject]
        assert mine.signature_algorithm_oid == theirs.signature_algorithm_oid
        for kind in (x509.BasicConstraints, x509.KeyUsage):
            assert mine.extensions.get_extension_for_class(kind) == theirs.extensions.get_extension_for_class(kind)
        without = x509.CRLDistributionPoints.oid  # there is no list of revoked emulators
        assert {e.oid for e in mine.extensions} == {e.oid for e in theirs.extensions} - {without}
        assert "mazon" not in mine.subject.rfc4514_string()


def test_document_passes_the_verifier_under_its_anchor_only() -> None:
    signed = document(make(), nonce=bytes(32))
    authentic = authenticate(signed, anchor=Anchor(Trust.EMULATED, ROOT.certificate_der), at=NOW)
    assert authentic.claims.nonce == bytes(32)
    other = DevelopmentRoot.generate(NOW)
    with pytest.raises(Exception, match="untrusted_chain"):
        authenticate(signed, anchor=Anchor(Trust.EMULATED, other.certificate_der), at=NOW)


def test_document_is_signed_anew_each_time() -> None:
    nsm = make()
    assert document(nsm) != document(nsm)


# --- Time --------------------------------------------------------------------------------------------------------


def leaf(signed: bytes) -> bytes:
    certificate = cbor2.loads(cbor2.loads(signed)[2])["certificate"]
    assert isinstance(certificate, bytes)
    return certificate


def test_leaf_is_used_again_and_renewed_before_its_end() -> None:
    clock = Clock()
    nsm = make(clock=clock)
    anchor = Anchor(Trust.EMULATED, ROOT.certificate_der)
    leaves = []
    for _ in range(8):
        signed = document(nsm)
        authenticate(signed, anchor=anchor, at=clock.now)
        leaves.append(leaf(signed))
        clock.now += timedelta(hours=1)
    runs = [len(list(run)) for _, run in itertools.groupby(leaves)]
    assert runs == [3, 3, 2]


@pytest.mark.parametrize("jump", [timedelta(days=-30 * 365), timedelta(days=40 * 365)])
def test_clock_outside_the_roots_validity_is_an_internal_error(jump: timedelta) -> None:
    clock = Clock()
    nsm = make(clock=clock)
    clock.now += jump
    assert ask(nsm, {"Attestation": {}}) == {"Error": "InternalError"}
    assert register(nsm, 0) == IMAGE.pcr0
    clock.now = NOW
    authenticate(document(nsm), anchor=Anchor(Trust.EMULATED, ROOT.certificate_der), at=NOW)


def test_clock_that_jumps_back_gets_a_leaf_of_that_time() -> None:
    clock = Clock()
    root = DevelopmentRoot.generate(NOW - timedelta(days=30))
    nsm = make(root=root, clock=clock)
    clock.now -= timedelta(days=7)
    authenticate(document(nsm), anchor=Anchor(Trust.EMULATED, root.certificate_der), at=clock.now)
