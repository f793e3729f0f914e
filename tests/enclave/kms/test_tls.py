"""Whoever answers for KMS must show to be KMS: TLS that ends in the enclave, and a man in the middle on the parent."""

from __future__ import annotations

import asyncio
import contextlib
import ssl
from collections.abc import AsyncIterator, Iterator
from datetime import UTC, datetime, timedelta
from functools import partial
from http import HTTPStatus
from importlib.resources import files
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.hashes import SHA256, Hash
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

import enclave
from attestation.errors import StrongroomError
from attestation.process_image import _tree
from emulator.https import HttpAnswer, HttpRequest, HttpsServer
from emulator.tls import TlsAuthority
from enclave.kms import anchors
from enclave.kms.anchors import FINGERPRINTS, amazon_roots
from enclave.kms.https import NO_CHECK_TIME, trusting
from enclave.kms.service import KmsError
from parent.egress import Endpoint
from tests.kms_world import HOST, ONCE, World, kms_world, lasting


class Middle:
    """Stands where KMS should be, with a certificate of its own."""

    def __init__(self, authority: TlsAuthority, *, name: str = HOST, at: datetime | None = None) -> None:
        self.heard: list[HttpRequest] = []
        context = authority.server_context([name], at or datetime.now(UTC))
        self._server = HttpsServer(("127.0.0.1", 0), context, self._answer)
        self.endpoint = Endpoint("127.0.0.1", self._server.port)

    def _answer(self, request: HttpRequest) -> HttpAnswer:
        self.heard.append(request)
        return HttpAnswer(HTTPStatus.OK, body=b'{"Plaintext": "AAAA"}')

    def close(self) -> None:
        self._server.close()


@contextlib.contextmanager
def middle(authority: TlsAuthority, *, name: str = HOST, at: datetime | None = None) -> Iterator[Middle]:
    there = Middle(authority, name=name, at=at)
    try:
        yield there
    finally:
        there.close()


@pytest.fixture
async def world(tmp_path: Path) -> AsyncIterator[World]:
    async with kms_world(tmp_path, egress=False) as made:
        yield made


async def refused(world: World, authority: bytes | None = None) -> KmsError:
    """A request through whatever the egress leads to, at whatever time."""
    world.issue = partial(lasting, world)
    async with world.kms(ONCE, authority=authority) as kms:
        with pytest.raises(KmsError) as caught:
            await kms.generate_random(32)
    assert str(caught.value).isprintable()
    return caught.value


AUTHORITY = TlsAuthority.generate(datetime.now(UTC))


async def test_a_certificate_of_another_authority(world: World) -> None:
    with middle(AUTHORITY) as there:
        world.target = there.endpoint
        await world.start_egress()
        error = await refused(world)
        assert error.code == "kms_tls"
        assert not error.passing
        assert there.heard == [], "not a byte of a request"


async def test_a_certificate_of_an_authority_that_the_system_trusts(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Any authority of the web, or one that the operator has installed, vouches for nothing here."""
    bundle = tmp_path / "system.pem"
    bundle.write_bytes(AUTHORITY.root_pem)
    for variable in ("SSL_CERT_FILE", "REQUESTS_CA_BUNDLE", "AWS_CA_BUNDLE", "CURL_CA_BUNDLE"):
        monkeypatch.setenv(variable, str(bundle))
    monkeypatch.setenv("SSL_CERT_DIR", str(tmp_path))
    with middle(AUTHORITY) as there:
        system = ssl.create_default_context()
        system.check_hostname = False
        with contextlib.closing(await connected(system, there.endpoint)):
            pass  # for the system it is as good as any
        world.target = there.endpoint
        await world.start_egress()
        assert (await refused(world)).code == "kms_tls"
        assert there.heard == []


async def connected(context: ssl.SSLContext, endpoint: Endpoint) -> asyncio.StreamWriter:
    _, writer = await asyncio.open_connection(endpoint.host, endpoint.port, ssl=context)
    return writer


@pytest.mark.parametrize("name", ["kms.us-east-2.amazonaws.com", "kms.us-east-1.amazonaws.com.evil.test", "127.0.0.1"])
async def test_a_certificate_for_another_name(world: World, name: str) -> None:
    with middle(AUTHORITY, name=name) as there:
        world.target = there.endpoint
        await world.start_egress()
        error = await refused(world, AUTHORITY.root_der)
        assert error.code == "kms_tls"
        assert "not valid for 'kms.us-east-1.amazonaws.com'" in error.message
        assert there.heard == []


@pytest.mark.parametrize("ahead", [-timedelta(minutes=50), timedelta(days=29)])
async def test_within_the_certificates_validity(world: World, ahead: timedelta) -> None:
    with middle(AUTHORITY) as there:
        world.target, world.nsm_ahead = there.endpoint, ahead
        await world.start_egress()
        assert (await refused(world, AUTHORITY.root_der)).code == "kms_plaintext", "it is heard"


@pytest.mark.parametrize("days", [31, 400])
async def test_a_certificate_that_has_expired_by_the_documents_time(world: World, days: int) -> None:
    """The host's clock is where the certificate is valid; the module knows better."""
    with middle(AUTHORITY) as there:
        world.target, world.nsm_ahead = there.endpoint, timedelta(days=days)
        await world.start_egress()
        error = await refused(world, AUTHORITY.root_der)
        assert error.code == "kms_tls"
        assert "not valid at the time" in error.message
        assert error.got is not None
        assert error.got.startswith(f"{datetime.now(UTC) + world.nsm_ahead:%Y-%m-%d}")
        assert there.heard == [], "not a byte of a request"


async def test_a_certificate_that_is_not_yet_valid(world: World) -> None:
    with middle(AUTHORITY, at=datetime.now(UTC) + timedelta(hours=2)) as there:
        world.target = there.endpoint
        await world.start_egress()
        assert (await refused(world, AUTHORITY.root_der)).code == "kms_tls"
        assert there.heard == []


async def test_an_expired_certificate_is_good_where_it_is_valid(world: World) -> None:
    """The host's clock may be anywhere: it is not asked."""
    with middle(AUTHORITY, at=datetime.now(UTC) + timedelta(hours=12)) as there:
        world.target, world.nsm_ahead = there.endpoint, timedelta(hours=12)
        await world.start_egress()
        assert (await refused(world, AUTHORITY.root_der)).code == "kms_plaintext"


async def test_a_kept_connection_is_held_to_each_documents_time(tmp_path: Path) -> None:
    async with kms_world(tmp_path) as world, world.kms() as kms:
        world.issue = partial(lasting, world)
        await kms.generate_random(32)
        world.nsm_ahead = timedelta(days=31)
        with pytest.raises(KmsError) as caught:
            await kms.generate_random(32)
        assert caught.value.code == "kms_tls"
        assert world.connections == 1
        world.nsm_ahead = timedelta(0)
        await kms.generate_random(32)
        assert world.connections == 2, "what was refused is not kept"


@pytest.mark.parametrize(
    "greeting", [b"HTTP/1.1 200 OK\r\n\r\n", b"\x15\x03\x03\x00\x02\x02\x28", b"", b"\x16\x03\x03"]
)
async def test_no_tls(world: World, greeting: bytes) -> None:
    """Clear text, an alert, an end, an unfinished record."""

    async def greet(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read(1)
        writer.write(greeting)
        writer.close()
        with contextlib.suppress(OSError):
            await writer.wait_closed()

    server = await asyncio.start_server(greet, "127.0.0.1", 0)
    world.target = Endpoint("127.0.0.1", server.sockets[0].getsockname()[1])
    await world.start_egress()
    assert (await refused(world)).code == ("kms_unreachable" if len(greeting) in (0, 3) else "kms_tls")
    server.close()


async def test_tls_1_1_is_none(world: World) -> None:
    context = AUTHORITY.server_context([HOST], datetime.now(UTC))
    context.set_ciphers("ALL:@SECLEVEL=0")
    with pytest.warns(DeprecationWarning, match="TLSv1"):
        context.minimum_version, context.maximum_version = ssl.TLSVersion.TLSv1, ssl.TLSVersion.TLSv1_1
    server = HttpsServer(("127.0.0.1", 0), context, lambda request: HttpAnswer(HTTPStatus.OK))
    world.target = Endpoint("127.0.0.1", server.port)
    await world.start_egress()
    assert (await refused(world, AUTHORITY.root_der)).code == "kms_tls"
    server.close()


# --- Whom TLS trusts --------------------------------------------------------------------------------------------------

PUBLISHED = {
    "amazon-root-ca-1.der": "fbe3018031f9586bcbf41727e417b7d1c45c2f47f93be372a17b96b50757d5a2",
    "amazon-root-ca-2.der": "7f4296fc5b6a4e3b35d3c369623e364ab1af381d8fa7121533c9d6c633ea2461",
    "amazon-root-ca-3.der": "36abc32656acfc645c61b71613c4bf21c787f5cabbee48348d58597803d7abc9",
    "amazon-root-ca-4.der": "f7ecded5c66047d28ed6466b543c40e0743abe81d109254dcf845d4c2c7853c5",
    "starfield-services-root-g2.der": "2b071c59a0a0ae76b0eadb2bad23bad4580b69c3601b630c2eaf0613afa83f92",
}
"""SHA-256 of each root's SubjectPublicKeyInfo, from https://www.amazontrust.com/repository/."""


@pytest.mark.filterwarnings("ignore:Parsed a serial number")  # Starfield's is 0
def test_amazons_roots_have_the_keys_that_amazon_publishes() -> None:
    found = {}
    for name, der in zip(FINGERPRINTS, amazon_roots(), strict=True):
        key = x509.load_der_x509_certificate(der).public_key()
        digest = Hash(SHA256())
        digest.update(key.public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo))
        found[name] = digest.finalize().hex()
    assert found == PUBLISHED
    folder = files(anchors)
    assert {each.name for each in folder.iterdir() if each.name.endswith(".der")} == set(FINGERPRINTS)


def test_amazons_roots_are_measured_with_the_enclave() -> None:
    measured = {label for label, _ in _tree("enclave", Path(enclave.__path__[0]))}
    assert {f"enclave/kms/anchors/{name}" for name in FINGERPRINTS} <= measured


def test_another_certificate_in_a_roots_place(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(FINGERPRINTS, "amazon-root-ca-1.der", FINGERPRINTS["amazon-root-ca-2.der"])
    with pytest.raises(StrongroomError) as caught:
        amazon_roots()
    assert caught.value.code == "bad_anchor"


def test_nobody_but_the_given_authorities_is_trusted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bundle = tmp_path / "system.pem"
    bundle.write_bytes(AUTHORITY.root_pem)
    monkeypatch.setenv("SSL_CERT_FILE", str(bundle))
    monkeypatch.setenv("SSLKEYLOGFILE", str(tmp_path / "keys"))
    context = trusting(amazon_roots())
    subjects = str([each["subject"] for each in context.get_ca_certs()])
    assert all(f"'Amazon Root CA {number}'" in subjects for number in range(1, 5))
    assert "'Starfield Services Root Certificate Authority - G2'" in subjects
    assert context.cert_store_stats() == {"x509": 5, "crl": 0, "x509_ca": 5}
    assert context.verify_mode is ssl.CERT_REQUIRED
    assert context.check_hostname
    assert context.minimum_version is ssl.TLSVersion.TLSv1_2
    assert context.verify_flags & NO_CHECK_TIME
    assert not context.keylog_filename
    assert not (tmp_path / "keys").exists()


@pytest.mark.parametrize("data", [b"", b"no certificate", b"\x30\x03\x02\x01\x01"])
def test_an_authority_that_is_no_certificate(data: bytes) -> None:
    with pytest.raises(StrongroomError) as caught:
        trusting([data])
    assert caught.value.code == "bad_anchor"
