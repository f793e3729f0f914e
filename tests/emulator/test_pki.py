"""The development PKI: certificates in the shape of AWS's, and a root key that stays with its user."""

from __future__ import annotations

import itertools
import os
import stat
import subprocess
import sys
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID, SignatureAlgorithmOID

from emulator.pki import (
    ROOT_CERTIFICATE_FILE,
    ROOT_FILE,
    DevelopmentRoot,
    PkiError,
    default_directory,
    ensure_development_root,
    issue_chain,
)

NOW = datetime(2026, 5, 4, 3, 2, 1, tzinfo=UTC)
ROOT = DevelopmentRoot.generate(NOW)
MODULE = "i-026ae32a18c80f866-enc01780356441553dc"


def certificates(region: str = "ap-southeast-1") -> list[x509.Certificate]:
    chain = issue_chain(ROOT, MODULE, region, NOW)
    return [x509.load_der_x509_certificate(der) for der in (*chain.cabundle, chain.certificate)]


def test_each_is_signed_by_the_one_before() -> None:
    chain = certificates()
    for issuer, subject in itertools.pairwise(chain):
        subject.verify_directly_issued_by(issuer)


def test_algorithms() -> None:
    for certificate in certificates():
        key = certificate.public_key()
        assert isinstance(key, ec.EllipticCurvePublicKey)
        assert isinstance(key.curve, ec.SECP384R1)
        assert certificate.signature_algorithm_oid == SignatureAlgorithmOID.ECDSA_WITH_SHA384


def test_lifetimes_and_nesting() -> None:
    chain = certificates()
    lifetimes = [c.not_valid_after_utc - c.not_valid_before_utc for c in chain]
    hour = timedelta(hours=1)
    assert lifetimes == [
        timedelta(days=10958) + hour,
        timedelta(days=20) + hour,
        timedelta(days=6) + hour,
        timedelta(hours=24),
        timedelta(hours=3, seconds=3),
    ]
    assert chain[-1].not_valid_before_utc == NOW - timedelta(seconds=3)
    for issuer, subject in itertools.pairwise(chain):
        assert issuer.not_valid_before_utc <= subject.not_valid_before_utc
        assert subject.not_valid_after_utc <= issuer.not_valid_after_utc


def test_path_lengths_and_usages() -> None:
    *authorities, leaf = certificates()
    constraints = [c.extensions.get_extension_for_class(x509.BasicConstraints) for c in (*authorities, leaf)]
    assert all(constraint.critical for constraint in constraints)
    assert [constraint.value.path_length for constraint in constraints] == [None, 2, 1, 0, None]
    assert [constraint.value.ca for constraint in constraints] == [True, True, True, True, False]
    for authority in authorities:
        usage = authority.extensions.get_extension_for_class(x509.KeyUsage)
        assert usage.critical
        assert usage.value.key_cert_sign
    usage = leaf.extensions.get_extension_for_class(x509.KeyUsage)
    assert not usage.critical
    assert usage.value.digital_signature
    assert usage.value.content_commitment
    assert not usage.value.key_cert_sign
    assert len(leaf.extensions) == 2  # no identifiers, no names, no extended usage


@pytest.mark.parametrize("region", ["local", "us-east-1", "ap-southeast-1"])
def test_subjects_name_the_emulator(region: str) -> None:
    chain = certificates(region)
    for certificate in chain:
        (organisation,) = certificate.subject.get_attributes_for_oid(NameOID.ORGANIZATION_NAME)
        assert organisation.value == "Strongroom emulator"
    (name,) = chain[-1].subject.get_attributes_for_oid(NameOID.COMMON_NAME)
    assert name.value == f"{MODULE}.{region}.emulator"


def test_keys_and_serials_are_new_in_each_chain() -> None:
    first, second = certificates(), certificates()
    assert first[0] == second[0]
    for one, other in zip(first[1:], second[1:], strict=True):
        assert one.serial_number != other.serial_number
        assert one.public_key() != other.public_key()


@pytest.mark.parametrize("region", ["", "AP-SOUTH-1", "a" * 15, "é"])
def test_region_that_fits_no_certificate(region: str) -> None:
    with pytest.raises(PkiError) as raised:
        issue_chain(ROOT, MODULE, region, NOW)
    assert raised.value.code == "invalid_argument"


def test_root_that_is_not_valid_now() -> None:
    for now in (NOW - timedelta(days=1), NOW + timedelta(days=31 * 365)):
        with pytest.raises(PkiError) as raised:
            issue_chain(ROOT, MODULE, "local", now)
        assert raised.value.code == "unusable_root"


def test_keys_are_in_no_text() -> None:
    chain = issue_chain(ROOT, MODULE, "local", NOW)
    for text in (repr(ROOT), repr(chain)):
        assert "redacted" in text
        assert "EllipticCurve" not in text


# --- Keeping the root --------------------------------------------------------------------------------------------


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def test_made_once_then_the_same(tmp_path: Path) -> None:
    directory = tmp_path / "home" / "pki"
    root = ensure_development_root(directory)
    assert mode(directory) == 0o700
    assert mode(directory / ROOT_FILE) == 0o600
    assert ensure_development_root(directory).certificate_der == root.certificate_der
    assert (directory / ROOT_CERTIFICATE_FILE).read_bytes() == root.certificate_der
    assert sorted(os.listdir(directory)) == [ROOT_CERTIFICATE_FILE, ROOT_FILE]
    now = datetime.now(UTC)
    assert issue_chain(root, MODULE, "local", now).not_before <= now


def test_certificate_file_follows_the_root(tmp_path: Path) -> None:
    directory = tmp_path / "pki"
    root = ensure_development_root(directory)
    (directory / ROOT_CERTIFICATE_FILE).write_bytes(b"something else")
    ensure_development_root(directory)
    assert (directory / ROOT_CERTIFICATE_FILE).read_bytes() == root.certificate_der


def test_private_under_any_umask(tmp_path: Path) -> None:
    before = os.umask(0)
    try:
        ensure_development_root(tmp_path / "pki")
    finally:
        os.umask(before)
    assert mode(tmp_path / "pki") == 0o700
    assert mode(tmp_path / "pki" / ROOT_FILE) == 0o600


def test_processes_that_race_get_one_root(tmp_path: Path) -> None:
    script = (
        "import sys; from pathlib import Path; from emulator.pki import ensure_development_root; sys.stdin.read();"
        "print(ensure_development_root(Path(sys.argv[1])).certificate_der.hex())"
    )
    command = [sys.executable, "-c", script, str(tmp_path / "pki")]
    racers = [subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) for _ in range(4)]
    for racer in racers:
        assert racer.stdin is not None
        racer.stdin.close()  # the start signal, given when all have started
    answers = []
    for racer in racers:
        with racer:
            assert racer.stdout is not None
            answers.append(racer.stdout.read())
    assert {racer.returncode for racer in racers} == {0}
    assert len(set(answers)) == 1
    assert sorted(os.listdir(tmp_path / "pki")) == [ROOT_CERTIFICATE_FILE, ROOT_FILE]


def test_where_the_root_is_kept(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("STRONGROOM_HOME", raising=False)
    monkeypatch.delenv("XDG_DATA_HOME", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert default_directory() == tmp_path / ".local" / "share" / "strongroom" / "pki"
    monkeypatch.setenv("XDG_DATA_HOME", "/data")
    assert default_directory() == Path("/data/strongroom/pki")
    monkeypatch.setenv("STRONGROOM_HOME", str(tmp_path / "home"))
    assert default_directory() == tmp_path / "home" / "pki"
    root = ensure_development_root()
    assert (tmp_path / "home" / "pki" / ROOT_CERTIFICATE_FILE).read_bytes() == root.certificate_der


@pytest.mark.parametrize("permissions", [0o640, 0o604, 0o660, 0o666])
def test_key_that_others_may_read(tmp_path: Path, permissions: int) -> None:
    ensure_development_root(tmp_path / "pki")
    (tmp_path / "pki" / ROOT_FILE).chmod(permissions)
    with pytest.raises(PkiError) as raised:
        ensure_development_root(tmp_path / "pki")
    assert raised.value.code == "unsafe_permissions"
    assert raised.value.expected == "600"
    assert f"chmod 600 {tmp_path / 'pki' / ROOT_FILE}" in raised.value.message


def test_folder_that_others_may_enter(tmp_path: Path) -> None:
    (tmp_path / "pki").mkdir()
    (tmp_path / "pki").chmod(0o755)
    with pytest.raises(PkiError) as raised:
        ensure_development_root(tmp_path / "pki")
    assert raised.value.code == "unsafe_permissions"
    assert os.listdir(tmp_path / "pki") == []


def test_key_of_another_user(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ensure_development_root(tmp_path / "pki")
    monkeypatch.setattr(os, "geteuid", lambda: os.getuid() + 1)
    with pytest.raises(PkiError) as raised:
        ensure_development_root(tmp_path / "pki")
    assert raised.value.code == "unsafe_permissions"


def test_file_that_is_no_root(tmp_path: Path) -> None:
    directory = tmp_path / "pki"
    ensure_development_root(directory)
    good = (directory / ROOT_FILE).read_bytes()
    ensure_development_root(tmp_path / "other")
    other = (tmp_path / "other" / ROOT_FILE).read_bytes()
    begin = b"-----BEGIN CERTIFICATE-----"
    mixed = good[: good.index(begin)] + other[other.index(begin) :]
    for content in (b"", b"garbage", good[: good.index(begin)], good[: len(good) // 2], mixed):
        (directory / ROOT_FILE).write_bytes(content)
        with pytest.raises(PkiError) as raised:
            ensure_development_root(directory)
        assert raised.value.code == "unusable_root"


def test_folder_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for directory in (tmp_path / "file", tmp_path / "file" / "pki"):
        with pytest.raises(PkiError) as raised:
            ensure_development_root(directory)
        assert raised.value.code == "pki_unavailable"


def test_key_file_that_is_a_link(tmp_path: Path) -> None:
    ensure_development_root(tmp_path / "pki")
    (tmp_path / "pki" / ROOT_FILE).rename(tmp_path / "elsewhere")
    (tmp_path / "pki" / ROOT_FILE).symlink_to(tmp_path / "elsewhere")
    with pytest.raises(PkiError) as raised:
        ensure_development_root(tmp_path / "pki")
    assert raised.value.code == "pki_unavailable"
