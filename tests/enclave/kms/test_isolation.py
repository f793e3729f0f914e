"""The client of KMS takes nothing from where it runs, and leaves nothing there: environment, files, network, logs."""

from __future__ import annotations

import asyncio
import json
import logging
import os
import sys
from base64 import b64encode
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from attestation.secret import Secret
from emulator.https import HttpAnswer, HttpRequest
from emulator.kms_faults import THROTTLED, WITH_PLAINTEXT, Refuse
from emulator.nsm import NsmServer
from enclave.kms.https import Attempt, Credentials
from enclave.kms.service import KmsError
from tests.kms_world import CONTEXT, HOST, World, kms_world
from vsockrpc.address import UnixAddress
from vsockrpc.sockets import listen_socket

REPOSITORY = Path(__file__).resolve().parents[3]
PLAINTEXT = bytes(range(100, 132))

# --- Where it runs ----------------------------------------------------------------------------------------------------

PROGRAM = """
import sys
names = ("repository", "host", "egress", "nsm", "root", "key", "wrapped", "context")
given = dict(zip(names, sys.argv[1:], strict=True))
sys.path.append(given["repository"])
from enclave.imports import only_measured
only_measured()
import asyncio, json, socket
seen = []
def audit(event, arguments):
    if event == "open" and not isinstance(arguments[0], int):  # a descriptor is of what was opened before
        seen.append(["open", str(arguments[0])])
    elif event in ("socket.connect", "socket.sendto"):
        seen.append(["connect", str(arguments[1])])
    elif event in ("socket.getaddrinfo", "socket.gethostbyname", "subprocess.Popen", "os.system"):
        seen.append([event, str(arguments[0])])
    elif event == "import" and "evil" in str(arguments[0]):
        seen.append(["import", str(arguments[0])])
sys.addaudithook(audit)
from enclave.config import KmsSettings
from enclave.kms.service import Kms
from enclave.nsm import open_nsm
from attestation.keypolicy.document import KeyArn
from vsockrpc.address import TcpAddress, UnixAddress
async def main():
    endpoint, egress = TcpAddress(given["host"], 443), UnixAddress(given["egress"])
    settings = KmsSettings("us-east-1", endpoint, egress, bytes.fromhex(given["root"]), None, None)
    kms = await asyncio.to_thread(Kms, settings, open_nsm(given["nsm"]))
    key, context = KeyArn.parse(given["key"]), json.loads(given["context"])
    released = await kms.decrypt(bytes.fromhex(given["wrapped"]), key=key, context=context)
    await kms.close()
    return released.expose().hex()
print(json.dumps([asyncio.run(main()), seen, sorted(sys.modules)]))
"""


@pytest.fixture
def hostile(tmp_path: Path) -> dict[str, str]:
    """An environment that leads a client of AWS astray at every turn, with a home folder to match."""
    home = tmp_path / "home"
    model = home / ".aws" / "models" / "kms" / "2014-11-01"
    model.mkdir(parents=True)
    (model / "service-2.json").write_text("{}")
    (home / ".aws" / "config").write_text(
        "[default]\nregion = eu-evil-1\nendpoint_url = https://evil.test\nca_bundle = /evil\n"
    )
    (home / ".aws" / "credentials").write_text(
        "[default]\naws_access_key_id = EVILEVILEVILEVIL\naws_secret_access_key = evil\n"
    )
    (home / "evil_plugin.py").write_text("print('it runs')")
    evil = "https://evil.test"
    return {
        "HOME": str(home),
        "PATH": os.environ["PATH"],
        **dict.fromkeys(("HTTPS_PROXY", "https_proxy", "ALL_PROXY", "HTTP_PROXY"), "http://evil.test:3128"),
        **dict.fromkeys(("AWS_ENDPOINT_URL", "AWS_ENDPOINT_URL_KMS"), evil),
        **dict.fromkeys(
            ("AWS_CA_BUNDLE", "REQUESTS_CA_BUNDLE", "SSL_CERT_FILE", "CURL_CA_BUNDLE"), str(home / "evil.pem")
        ),
        **dict.fromkeys(("AWS_REGION", "AWS_DEFAULT_REGION"), "eu-evil-1"),
        **dict.fromkeys(("AWS_PROFILE", "AWS_DEFAULT_PROFILE"), "evil"),
        **dict.fromkeys(("AWS_USE_FIPS_ENDPOINT", "AWS_USE_DUALSTACK_ENDPOINT", "AWS_CSM_ENABLED"), "true"),
        "AWS_ACCESS_KEY_ID": "EVILEVILEVILEVIL",
        "AWS_SECRET_ACCESS_KEY": "evil",
        "AWS_SESSION_TOKEN": "evil-token",
        "AWS_BEARER_TOKEN_KMS": "evil-bearer",
        "AWS_CONTAINER_CREDENTIALS_FULL_URI": evil,
        "AWS_DATA_PATH": str(home / ".aws" / "models"),
        "AWS_CONFIG_FILE": str(home / ".aws" / "config"),
        "AWS_SHARED_CREDENTIALS_FILE": str(home / ".aws" / "credentials"),
        "AWS_RETRY_MODE": "evil",
        "AWS_MAX_ATTEMPTS": "99",
        "AWS_DEFAULTS_MODE": "auto",
        "AWS_SDK_UA_APP_ID": "evil-app",
        "AWS_EXECUTION_ENV": "evil-execution",
        "BOTOCORE_EXPERIMENTAL__PLUGINS": "evil=evil_plugin",
        "SSLKEYLOGFILE": str(home / "evil-keys"),
        "PYTHONPATH": str(home),
    }


async def test_nothing_around_it_has_a_say(tmp_path: Path, hostile: dict[str, str]) -> None:
    async with kms_world(tmp_path) as world:
        heard = listened(world)
        (world.directory / "nsm").mkdir()
        nsm = UnixAddress(str(world.directory / "nsm" / "nsm.sock"))
        listener, stop = await listen_socket(nsm), asyncio.Event()
        serving = asyncio.create_task(NsmServer(world.nsm._nsm).serve(listener, stop))
        arguments = [REPOSITORY, HOST, world.address.path, nsm, world.emulator.root_der.hex(), world.key.text]
        arguments += [world.wrap(PLAINTEXT).hex(), json.dumps(CONTEXT)]
        process = await asyncio.create_subprocess_exec(
            sys.executable, "-I", "-B", "-c", PROGRAM, *map(str, arguments), env=hostile, stdout=-1, stderr=-1
        )
        said, complained = await process.communicate()
        stop.set()
        await serving
        listener.close()
    assert process.returncode == 0, complained.decode()
    assert complained == b""
    released, seen, modules = json.loads(said)
    assert bytes.fromhex(released) == PLAINTEXT
    assert {event for event, _ in seen} == {"connect", "open"}, "no name is looked up, no other program run"
    assert {where for event, where in seen if event == "connect"} == {world.address.path, nsm.path}
    opened = {path for event, path in seen if event == "open"}
    python = (f"{sys.prefix}/", f"{sys.base_prefix}/", f"{REPOSITORY}/")
    assert [path for path in opened if not path.startswith(python)] == []
    assert [path for path in opened if path.endswith((".pem", ".crt", ".pth"))] == []
    assert not {name for name in modules if "evil" in name or name.startswith(("boto3", "s3transfer", "certifi"))}
    assert not Path(hostile["SSLKEYLOGFILE"]).exists()
    (request,) = heard
    headers = str(request.headers).lower()
    assert "evil" not in headers
    assert {name.lower() for name, _ in request.headers} == {
        "host",
        "accept-encoding",
        "content-length",
        "content-type",
        "user-agent",
        "x-amz-target",
        "x-amz-date",
        "x-amz-security-token",
        "amz-sdk-invocation-id",
        "amz-sdk-request",
        "authorization",
    }
    assert request.header("user-agent") == "strongroom"


def listened(world: World) -> list[HttpRequest]:
    """What the emulator hears from now on."""
    heard: list[HttpRequest] = []
    server = world.emulator._server._server
    answer = server.answer

    def listening(request: HttpRequest) -> HttpAnswer:
        heard.append(request)
        return answer(request)

    server.answer = listening
    return heard


# --- What it leaves ---------------------------------------------------------------------------------------------------


class Everything(logging.Handler):
    """Keeps every record of every logger, as anything would show it."""

    def __init__(self) -> None:
        super().__init__(logging.NOTSET)
        self.records: list[logging.LogRecord] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.records.append(record)


@pytest.fixture
def logged() -> Iterator[Everything]:
    """A program that logs all there is."""
    root, everything = logging.getLogger(), Everything()
    level = root.level
    root.addHandler(everything)
    root.setLevel(logging.NOTSET)
    try:
        yield everything
    finally:
        root.removeHandler(everything)
        root.setLevel(level)


async def test_no_log_hears_of_it(tmp_path: Path, logged: Everything, capfd: pytest.CaptureFixture[str]) -> None:
    errors: list[KmsError] = []
    async with kms_world(tmp_path) as world, world.kms() as kms:

        async def attempt() -> None:
            try:
                await kms.decrypt(world.wrap(PLAINTEXT), key=world.key, context=CONTEXT)
            except KmsError as error:
                errors.append(error)

        await attempt()
        for fault in (THROTTLED, WITH_PLAINTEXT, Refuse("SignatureDoesNotMatch", "it repeats the request")):
            world.emulator.faults.clear()
            world.emulator.faults.inject(fault)
            await attempt()
        world.kill_egress()
        world.emulator.faults.clear()
        await attempt()
        secrets = secrets_of(world)
        shown = f"{kms} {kms!r} {kms._credentials._kept} {vars(kms)}"
    assert len(errors) == 3
    assert {record.name.partition(".")[0] for record in logged.records} <= {"asyncio"}
    told = [shown, *capfd.readouterr(), *(record.getMessage() for record in logged.records)]
    told += [f"{error} {error!r} {error.__cause__!r} {error.as_json()}" for error in errors]
    assert not [secret for secret in secrets for text in told if secret in text]


def secrets_of(world: World) -> list[str]:
    (principal,) = world.principals
    assert principal.token is not None
    hidden = [principal.secret.expose(), principal.token.expose(), PLAINTEXT]
    shapes: list[Any] = [bytes.hex, repr, lambda data: b64encode(data).decode(), lambda data: data.decode("latin-1")]
    return [shape(secret) for secret in hidden for shape in shapes]


def test_what_is_held_shows_no_secret() -> None:
    from datetime import UTC, datetime

    credentials = Credentials("AKIAEXAMPLE", Secret(b"the-secret"), Secret(b"the-token"), None)
    attempt = Attempt(datetime.now(UTC), credentials, seconds=1)
    shown = f"{credentials} {credentials!r} {attempt!r} {vars(attempt)}"
    assert "AKIAEXAMPLE" in shown
    assert "the-secret" not in shown
    assert "the-token" not in shown
