"""The TLS root of emulated services: made once for each user, kept from everybody else, and no other root."""

from __future__ import annotations

import stat
from datetime import UTC, datetime
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.x509.oid import ExtendedKeyUsageOID

from emulator.pki import DevelopmentRoot, PkiError, ensure_development_root
from emulator.tls import LEAF_LIFETIME, TLS_CERTIFICATE_FILE, TLS_ROOT_FILE, TlsAuthority, ensure_tls_authority

NOW = datetime(2026, 3, 1, 12, 0, tzinfo=UTC)


def test_it_is_made_once_and_found_again(tmp_path: Path) -> None:
    directory = tmp_path / "pki"
    authority = ensure_tls_authority(directory)
    assert ensure_tls_authority(directory).root_der == authority.root_der
    assert (directory / TLS_CERTIFICATE_FILE).read_bytes() == authority.root_pem
    for file in (TLS_ROOT_FILE, TLS_CERTIFICATE_FILE):
        assert stat.S_IMODE((directory / file).stat().st_mode) == 0o600
    assert b"PRIVATE" not in authority.root_pem
    assert "redacted" in repr(authority)


def test_it_is_another_root_than_the_documents(tmp_path: Path) -> None:
    documents, tls = ensure_development_root(tmp_path / "pki"), ensure_tls_authority(tmp_path / "pki")
    assert documents.certificate_der != tls.root_der
    one, other = (x509.load_der_x509_certificate(each) for each in (documents.certificate_der, tls.root_der))
    assert one.subject != other.subject
    assert one.public_key() != other.public_key()


def test_a_key_that_others_may_read(tmp_path: Path) -> None:
    ensure_tls_authority(tmp_path / "pki")
    (tmp_path / "pki" / TLS_ROOT_FILE).chmod(0o640)
    with pytest.raises(PkiError) as caught:
        ensure_tls_authority(tmp_path / "pki")
    assert caught.value.code == "unsafe_permissions"


def test_a_certificate_file_of_another_root_is_replaced(tmp_path: Path) -> None:
    authority = ensure_tls_authority(tmp_path / "pki")
    (tmp_path / "pki" / TLS_CERTIFICATE_FILE).write_bytes(TlsAuthority.generate(NOW).root_pem)
    assert ensure_tls_authority(tmp_path / "pki").root_der == authority.root_der
    assert (tmp_path / "pki" / TLS_CERTIFICATE_FILE).read_bytes() == authority.root_pem


def test_what_it_issues(tmp_path: Path) -> None:
    authority = TlsAuthority(DevelopmentRoot.generate(NOW))
    certificate = x509.load_pem_x509_certificate(authority._issue(["localhost", "127.0.0.1"], NOW))
    names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    assert names.get_values_for_type(x509.DNSName) == ["localhost"]
    assert [str(each) for each in names.get_values_for_type(x509.IPAddress)] == ["127.0.0.1"]
    usage = certificate.extensions.get_extension_for_class(x509.ExtendedKeyUsage).value
    assert list(usage) == [ExtendedKeyUsageOID.SERVER_AUTH]
    assert certificate.not_valid_after_utc == NOW + LEAF_LIFETIME
    assert not certificate.extensions.get_extension_for_class(x509.BasicConstraints).value.ca
