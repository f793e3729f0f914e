"""Credentials: for the enclave that asks, renewed ahead, and never where anybody else looks."""

from __future__ import annotations

import asyncio
import logging
import os
import threading
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta, timezone
from functools import partial
from pathlib import Path
from typing import Any

import cbor2
import pytest
from prometheus_client import CollectorRegistry, generate_latest

from attestation.secret import Secret
from parent import credentials as credentials_module
from parent.credentials import (
    AHEAD_SECONDS,
    REREAD_SECONDS,
    SHORTEST_PAUSE_SECONDS,
    Credentials,
    Issued,
    NoCredentials,
    from_instance_metadata,
    from_provider_chain,
    pause_before_renewal,
    warn_on_stderr,
)
from tests.metadata import ACCESS_KEY, CREDENTIALS_PATH, SECRET_KEY, SESSION_TOKEN, MetadataService, metadata_service
from vsockrpc.address import UnixAddress
from vsockrpc.transport import Fault, connect, serve

NOW = 1_700_000_000.0


def issued(number: int = 0, lasts: float | None = 3600.0) -> Issued:
    expires = None if lasts is None else datetime.fromtimestamp(NOW + lasts, UTC)
    return Issued.of(f"AKIA{number}", f"secret-{number}", None if lasts is None else f"token-{number}", expires)


@dataclass
class Provider:
    """A source that gives what it is told to, and remembers how often it was asked."""

    gives: list[Issued | BaseException]
    asked: int = 0
    gate: threading.Event | None = None
    was_asked: asyncio.Event = field(default_factory=asyncio.Event)

    def __post_init__(self) -> None:
        self._loop = asyncio.get_running_loop()

    def __call__(self) -> Issued:
        self.asked += 1
        self._loop.call_soon_threadsafe(self.was_asked.set)
        if self.gate is not None:
            self.gate.wait(30)
        given = self.gives.pop(0) if len(self.gives) > 1 else self.gives[0]
        if isinstance(given, BaseException):
            raise given
        return given


class Clock:
    """Seconds since 1970, when a test says so."""

    def __init__(self) -> None:
        self.now = NOW

    def __call__(self) -> float:
        return self.now


@dataclass
class Parent:
    """A provider of credentials with what it has said."""

    credentials: Credentials
    clock: Clock
    said: list[str]
    registry: CollectorRegistry
    address: UnixAddress

    async def get(self) -> dict[str, Any]:
        defects: list[BaseException] = []
        async with (
            serve(self.address, self.credentials.handlers, on_error=defects.append),
            connect(self.address) as client,
            client.call("credentials.get", {}) as call,
        ):
            await call.send(b"", end=True)
            assert await call.reply() == {}
            data = await call.read(1 << 16)
        assert defects == []
        found = cbor2.loads(data)
        assert cbor2.dumps(found, canonical=True) == data
        assert isinstance(found, dict)
        return found

    async def refusal(self) -> str:
        with pytest.raises(Fault) as caught:
            await self.get()
        assert caught.value.code == "no_credentials"
        return caught.value.message

    def sample(self, name: str, **labels: str) -> float | None:
        return self.registry.get_sample_value(f"strongroom_credentials_{name}", labels)


@pytest.fixture
def parent(tmp_path: Path) -> Callable[[Callable[[], Issued]], Parent]:
    def make(source: Callable[[], Issued]) -> Parent:
        clock, said, registry = Clock(), list[str](), CollectorRegistry()
        credentials = Credentials(source, warn=said.append, registry=registry, clock=clock)
        return Parent(credentials, clock, said, registry, UnixAddress(str(tmp_path / "egress.sock")))

    return make


# --- Who gets them, and when they are renewed -----------------------------------------------------------------------


async def test_they_are_given_to_whoever_calls(parent: Callable[..., Parent]) -> None:
    provider = Provider([issued(7)])
    house = parent(provider)
    assert provider.asked == 0
    for _ in range(3):
        assert await house.get() == {
            "access_key": "AKIA7",
            "secret_key": "secret-7",
            "token": "token-7",
            "expires": int((NOW + 3600) * 1000),
        }
    assert provider.asked == 1
    assert house.sample("calls_total", result="given") == 3
    assert house.sample("expires") == NOW + 3600


async def test_those_without_an_end_are_given_with_one_warning(parent: Callable[..., Parent]) -> None:
    house = parent(Provider([issued(lasts=None)]))
    async with house.credentials.renewed():
        for _ in range(2):
            assert await house.get() == {
                "access_key": "AKIA0",
                "secret_key": "secret-0",
                "token": None,
                "expires": None,
            }
    assert house.said == ["the enclave gets AWS credentials without an end: for development only"]


async def test_what_has_ended_is_never_given(parent: Callable[..., Parent]) -> None:
    house = parent(Provider([issued(1), issued(2, lasts=7200)]))
    assert (await house.get())["access_key"] == "AKIA1"
    house.clock.now += 3600 - credentials_module.USABLE_SECONDS
    assert (await house.get())["access_key"] == "AKIA2"
    house.clock.now += 3600
    assert "clock" in await house.refusal()


async def test_they_are_looked_up_at_once_and_again_ahead_of_their_end(
    parent: Callable[..., Parent], monkeypatch: pytest.MonkeyPatch
) -> None:
    pauses: list[float] = []
    slept, sleep, going_on = asyncio.Event(), asyncio.sleep, asyncio.Event()

    async def no_time(seconds: float) -> None:
        pauses.append(seconds)
        slept.set()
        await going_on.wait()
        going_on.clear()
        await sleep(0)

    provider = Provider([issued(1), issued(2, lasts=60_000)])
    house = parent(provider)
    monkeypatch.setattr("asyncio.sleep", no_time)
    async with house.credentials.renewed():
        await slept.wait()
        assert (await house.get())["access_key"] == "AKIA1"
        slept.clear()
        going_on.set()
        await slept.wait()
        assert (await house.get())["access_key"] == "AKIA2"
    assert pauses == [3600 - AHEAD_SECONDS, 60_000 - AHEAD_SECONDS]
    assert provider.asked == 2


async def test_a_renewal_that_fails_is_tried_again_and_leaves_what_there_is(
    parent: Callable[..., Parent], monkeypatch: pytest.MonkeyPatch
) -> None:
    pauses: list[float] = []
    done, sleep = asyncio.Event(), asyncio.sleep

    async def no_time(seconds: float) -> None:
        pauses.append(seconds)
        if len(pauses) == 10:
            done.set()
            await asyncio.Event().wait()
        await sleep(0)

    house = parent(Provider([issued(1), NoCredentials("because")]))
    monkeypatch.setattr("asyncio.sleep", no_time)
    async with house.credentials.renewed():
        await done.wait()
        assert (await house.get())["access_key"] == "AKIA1"
    assert pauses[1:] == [1, 2, 4, 8, 16, 32, 60, 60, 60]
    assert house.said == ["no credentials for the enclave: because"]


@pytest.mark.parametrize(
    ("lasts", "pause"),
    [
        (None, REREAD_SECONDS),
        (6 * 3600, 6 * 3600 - AHEAD_SECONDS),
        (900, 600),
        (300, 200),
        (6, SHORTEST_PAUSE_SECONDS),
        (-100, SHORTEST_PAUSE_SECONDS),
    ],
)
def test_when_they_are_looked_up_again(lasts: float | None, pause: float) -> None:
    assert pause_before_renewal(issued(lasts=lasts), NOW) == pause


async def test_callers_share_a_look_up_and_the_loop_goes_on(parent: Callable[..., Parent]) -> None:
    provider = Provider([issued(1)], gate=threading.Event())
    house = parent(provider)
    async with serve(house.address, house.credentials.handlers, on_error=print), connect(house.address) as client:

        async def one() -> bytes:
            async with client.call("credentials.get", {}) as call:
                return await call.read(1 << 16)

        asking = [asyncio.ensure_future(one()) for _ in range(64)]
        await provider.was_asked.wait()  # the loop runs while the source does not answer
        asking[0].cancel()
        assert provider.gate is not None
        provider.gate.set()
        first, *answers = await asyncio.gather(*asking, return_exceptions=True)
    assert isinstance(first, asyncio.CancelledError)
    assert set(map(type, answers)) == {bytes}
    assert len(set(map(str, answers))) == 1
    assert provider.asked == 1


async def test_a_source_that_never_answers_is_not_waited_for(
    parent: Callable[..., Parent], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(credentials_module, "ANSWER_SECONDS", 0.05)
    provider = Provider([issued(1)], gate=threading.Event())
    house = parent(provider)
    async with house.credentials.renewed():
        assert await house.refusal() == "the source does not answer"
    assert provider.gate is not None
    provider.gate.set()
    for thread in threading.enumerate():
        if thread.name == "credentials":
            thread.join()
    assert house.sample("calls_total", result="refused") == 1


async def test_after_a_refusal_the_next_caller_has_another_chance(parent: Callable[..., Parent]) -> None:
    house = parent(Provider([NoCredentials("sign in"), NoCredentials("sign in"), issued(3)]))
    assert await house.refusal() == "sign in"
    assert await house.refusal() == "sign in"
    assert (await house.get())["access_key"] == "AKIA3"
    assert house.said == ["no credentials for the enclave: sign in"]
    assert house.sample("lookups_total", result="failed") == 2
    assert house.sample("lookups_total", result="ok") == 1


async def test_of_a_source_that_breaks_only_the_class_is_told(parent: Callable[..., Parent]) -> None:
    house = parent(Provider([RuntimeError("canary-secret-key")]))
    reason = await house.refusal()
    assert "RuntimeError" in reason
    assert "canary" not in reason + "".join(house.said)


# --- Where they come from: instance metadata ------------------------------------------------------------------------


@pytest.fixture
async def service() -> AsyncIterator[MetadataService]:
    async with metadata_service() as service:
        yield service


async def from_metadata(service: MetadataService) -> Issued:
    return await asyncio.to_thread(from_instance_metadata, service.url)


async def no_metadata(service: MetadataService) -> str:
    with pytest.raises(NoCredentials) as caught:
        await from_metadata(service)
    return caught.value.message


async def test_an_instances_role(service: MetadataService) -> None:
    found = await from_metadata(service)
    assert (found.access_key, found.token) == (Secret(ACCESS_KEY.encode()), Secret(SESSION_TOKEN.encode()))
    assert found.secret_key == Secret(f"{SECRET_KEY}-1".encode())
    assert service.requests == [
        ("PUT", "/latest/api/token"),
        ("GET", CREDENTIALS_PATH),
        ("GET", CREDENTIALS_PATH + "enclave-role"),
    ]


@pytest.mark.parametrize("minutes", [1, 4, 10, 15, 30, 360])
async def test_their_end_is_the_one_that_the_service_names(service: MetadataService, minutes: int) -> None:
    """botocore would put it off as it comes near."""
    service.lasts = timedelta(minutes=minutes)
    before = datetime.now(UTC) + service.lasts
    found = await from_metadata(service)
    assert found.expires is not None
    assert -2 < found.expires - before.timestamp() < 60


async def test_version_1_is_never_asked(service: MetadataService, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(service, "enabled", False)
    assert "attach a role" in await no_metadata(service)
    assert {method for method, _ in service.requests} == {"PUT"}


async def test_an_instance_without_a_role(service: MetadataService) -> None:
    service.role = None
    assert "attach a role" in await no_metadata(service)


@pytest.mark.parametrize(
    "body",
    [
        "",
        "{",
        "{}",
        '{"Code": "AssumeRoleUnauthorizedAccess", "Message": "canary"}',
        '{"AccessKeyId": "a", "SecretAccessKey": "b", "Token": "c", "Expiration": "tomorrow"}',
        '{"AccessKeyId": "a", "SecretAccessKey": "b", "Token": "c", "Expiration": "2030-01-01T00:00:00"}',
        '{"AccessKeyId": "a", "SecretAccessKey": "b", "Token": "c", "Expiration": 5}',
        '{"AccessKeyId": 1, "SecretAccessKey": "b", "Token": "c", "Expiration": "2030-01-01T00:00:00Z"}',
        '{"AccessKeyId": "", "SecretAccessKey": "b", "Token": "c", "Expiration": "2030-01-01T00:00:00Z"}',
    ],
)
async def test_what_the_service_gives_must_be_credentials(service: MetadataService, body: str) -> None:
    service.body = body
    assert "canary" not in await no_metadata(service)


async def test_nobody_at_the_services_address(service: MetadataService, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(credentials_module, "METADATA_ATTEMPTS", 1)
    service.url = "http://127.0.0.1:1/"
    assert "attach a role" in await no_metadata(service)


async def test_the_environment_has_no_say(service: MetadataService, monkeypatch: pytest.MonkeyPatch) -> None:
    """A proxy would see the credentials in clear."""
    for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:1")
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("AWS_EC2_METADATA_SERVICE_ENDPOINT", "http://127.0.0.1:1")
    assert (await from_metadata(service)).access_key == Secret(ACCESS_KEY.encode())


async def test_end_to_end_from_the_instance_to_the_enclave(
    service: MetadataService, parent: Callable[..., Parent]
) -> None:
    house = parent(partial(from_instance_metadata, service.url))
    house.clock.now = datetime.now(UTC).timestamp()
    async with house.credentials.renewed():
        found = await house.get()
    assert (found["access_key"], found["token"]) == (ACCESS_KEY, SESSION_TOKEN)
    assert service.issued == 1


# --- Where they come from: the chain --------------------------------------------------------------------------------


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A person's AWS configuration, and nothing else of the environment."""
    for name in list(os.environ):
        if name.startswith("AWS_"):
            monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "config"))
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "credentials"))
    return tmp_path


def test_a_profile(home: Path) -> None:
    (home / "credentials").write_text("[dev]\naws_access_key_id = AKIADEV\naws_secret_access_key = s\n")
    assert from_provider_chain("dev") == Issued.of("AKIADEV", "s", None, None)


def test_the_environment(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "AKIAENV")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "s")
    monkeypatch.setenv("AWS_SESSION_TOKEN", "t")
    assert from_provider_chain() == Issued.of("AKIAENV", "s", "t", None)


def test_a_process_whose_credentials_end(home: Path) -> None:
    expires = (datetime.now(UTC) + timedelta(hours=1)).replace(microsecond=0)
    document = f'{{"Version": 1, "AccessKeyId": "AKIAP", "SecretAccessKey": "s", "SessionToken": "t", "Expiration": "{expires.isoformat()}"}}'  # noqa: E501
    (home / "document").write_text(document)
    (home / "config").write_text(f"[profile dev]\ncredential_process = cat {home / 'document'}\n")
    assert from_provider_chain("dev") == Issued.of("AKIAP", "s", "t", expires)


def test_what_was_changed_is_seen_the_next_time(home: Path) -> None:
    for key in ("AKIA1", "AKIA2"):
        (home / "credentials").write_text(f"[default]\naws_access_key_id = {key}\naws_secret_access_key = s\n")
        assert from_provider_chain().access_key == Secret(key.encode())


@pytest.mark.parametrize(
    ("profile", "configuration", "hint"),
    [
        (None, "", "aws configure"),
        ("dev", "", "no profile"),
        ("dev", "[profile dev]\nregion = us-east-1\n", "aws configure"),
        (
            "dev",
            "[profile dev]\nsso_session = s\nsso_account_id = 111122223333\nsso_role_name = r\n"
            "[sso-session s]\nsso_start_url = https://x.awsapps.com/start\nsso_region = us-east-1\n",
            "aws sso login",
        ),
    ],
)
def test_the_reason_says_what_to_do(home: Path, profile: str | None, configuration: str, hint: str) -> None:
    (home / "config").write_text(configuration)
    with pytest.raises(NoCredentials) as caught:
        from_provider_chain(profile)
    assert hint in caught.value.message


async def test_what_a_failing_process_says_stays_there(home: Path, parent: Callable[..., Parent]) -> None:
    (home / "config").write_text("[profile dev]\ncredential_process = sh -c 'echo canary-secret-key >&2; exit 1'\n")
    house = parent(partial(from_provider_chain, "dev"))
    assert "canary" not in await house.refusal()
    assert house.said
    assert "canary" not in "".join(house.said)


# --- Where they never are -------------------------------------------------------------------------------------------


async def test_nobody_else_sees_them(
    service: MetadataService,
    parent: Callable[..., Parent],
    caplog: pytest.LogCaptureFixture,
    capfd: pytest.CaptureFixture[str],
) -> None:
    caplog.set_level(logging.DEBUG)
    house = parent(partial(from_instance_metadata, service.url))
    house.clock.now = datetime.now(UTC).timestamp()
    async with house.credentials.renewed():
        await house.get()
    found = house.credentials._issued
    assert found is not None
    seen = [
        repr(found),
        str(found),
        repr(house.credentials),
        repr(vars(house.credentials)),
        generate_latest(house.registry).decode(),
        caplog.text,
        *capfd.readouterr(),
        *house.said,
        *map(str, os.environ.items()),
    ]
    for canary in (ACCESS_KEY, SECRET_KEY, SESSION_TOKEN):
        assert canary not in "".join(seen)


@pytest.mark.parametrize(
    ("access_key", "secret_key", "token", "expires"),
    [
        (None, "s", None, None),
        ("a", b"s", None, None),
        ("a", "s", 5, None),
        ("a", "", None, None),
        ("a", "s", None, datetime(2030, 1, 1)),
    ],
)
def test_a_set_that_is_none(access_key: object, secret_key: object, token: object, expires: datetime | None) -> None:
    with pytest.raises(NoCredentials):
        Issued.of(access_key, secret_key, token, expires)


def test_times_of_any_zone() -> None:
    there = datetime(2030, 1, 1, 2, tzinfo=timezone(timedelta(hours=2)))
    assert Issued.of("a", "s", None, there) == Issued.of("a", "s", None, datetime(2030, 1, 1, tzinfo=UTC))


def test_a_warning_that_nobody_reads_is_no_error(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    warn_on_stderr("heard")
    assert capsys.readouterr().err == "strongroom: heard\n"

    tried: list[object] = []

    def broken(*args: object, **kwargs: object) -> None:
        tried.extend(args)
        raise BrokenPipeError

    monkeypatch.setattr("builtins.print", broken)
    warn_on_stderr("unheard")
    assert tried == ["strongroom: unheard"]
