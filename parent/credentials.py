"""AWS credentials for the enclave, which fetches them when it needs them: ``credentials.get``, PROTOCOL.md section 5.4.

They are the parent's own, so nothing is hidden from the parent by what happens here; but they go to the enclave that
asks and nowhere else: into no log, metric, environment, file or command line. With them alone nothing is decrypted:
that takes a document of the measured enclave.
"""

from __future__ import annotations

import asyncio
import contextlib
import sys
import threading
import time
from collections.abc import AsyncIterator, Callable, Mapping
from dataclasses import dataclass
from datetime import datetime
from functools import partial
from typing import TypeAlias

import cbor2
from prometheus_client import CollectorRegistry, Counter, Gauge

from attestation.errors import StrongroomError
from attestation.secret import Secret
from vsockrpc.transport import Fault, Handler, IncomingCall

INSTANCE_METADATA = "http://169.254.169.254/"
METADATA_SECONDS = 2.0
METADATA_ATTEMPTS = 3
AHEAD_SECONDS = 900.0
"""How long before their end credentials are renewed; short-lived ones when a third of their time is left. An instance's
metadata has new ones five minutes before the end at the latest.
"""
SHORTEST_PAUSE_SECONDS = 5.0
LONGEST_PAUSE_SECONDS = 60.0
"""Between attempts that fail; they begin at one second and double."""
REREAD_SECONDS = 300.0
"""Credentials without an end are looked up again this often: somebody may have changed them."""
USABLE_SECONDS = 5.0
"""What is to end sooner is not given away any more."""
ANSWER_SECONDS = 20.0
"""How long a caller waits for a source that does not answer."""


class NoCredentials(StrongroomError):
    """There are none to give. Code ``no_credentials``; the message says what to do, and nothing that a provider said:
    that could hold anything.
    """

    def __init__(self, message: str) -> None:
        super().__init__("no_credentials", message)


@dataclass(frozen=True, slots=True)
class Issued:
    """One set of credentials. ``expires`` is in seconds since 1970, None for those without a known end."""

    access_key: Secret
    secret_key: Secret
    token: Secret | None
    expires: float | None

    @classmethod
    def of(cls, access_key: object, secret_key: object, token: object, expires: datetime | None) -> Issued:
        """Raises NoCredentials when they are not texts, or the time is of no zone."""
        texts = [access_key, secret_key, *([] if token is None else [token])]
        if not all(isinstance(text, str) and text for text in texts) or (expires is not None and not expires.tzinfo):
            raise NoCredentials("what the source gives is no set of credentials")
        access, secret, *session = (Secret(str(text).encode()) for text in texts)
        end = None if expires is None else expires.timestamp()
        return cls(access, secret, session[0] if session else None, end)

    def encode(self) -> bytes:
        """As ``credentials.get`` answers: deterministic CBOR, the end in milliseconds."""
        return cbor2.dumps(
            {
                "access_key": self.access_key.expose().decode(),
                "secret_key": self.secret_key.expose().decode(),
                "token": None if self.token is None else self.token.expose().decode(),
                "expires": None if self.expires is None else int(self.expires * 1000),
            },
            canonical=True,
        )


Source: TypeAlias = Callable[[], Issued]
"""Looks credentials up. It may block, and raises NoCredentials to say what to do; of any other exception only the
class is told.
"""


# --- Where they come from ------------------------------------------------------------------------------------------


def from_instance_metadata(url: str = INSTANCE_METADATA) -> Issued:
    """Those of the role that is attached to this EC2 instance, from metadata service version 2 and no other; no proxy
    and nothing else of the environment has a say. A Source.
    """
    from botocore.exceptions import BotoCoreError  # 0.1 s that commands without credentials need not wait for
    from botocore.httpsession import URLLib3Session
    from botocore.utils import InstanceMetadataFetcher

    fetcher = InstanceMetadataFetcher(
        timeout=METADATA_SECONDS,
        num_attempts=METADATA_ATTEMPTS,
        base_url=url,
        env={},
        # The second: or the end that it names would be put off by up to twenty minutes as it comes near, for clients
        # that cannot renew ahead (botocore's own "expiration extension").
        config={"ec2_metadata_v1_disabled": True, "ec2_credential_refresh_window": -86_400},
    )
    # Its own would ask through the proxy of HTTP_PROXY.
    fetcher._session = direct = URLLib3Session(timeout=METADATA_SECONDS, proxies={})
    try:
        found = fetcher.retrieve_iam_role_credentials()
        if found:
            expires = datetime.fromisoformat(found["expiry_time"])
            return Issued.of(found["access_key"], found["secret_key"], found["token"], expires)
    except (BotoCoreError, ValueError, TypeError) as error:
        raise NoCredentials(f"{_NO_METADATA} ({type(error).__name__})") from None
    finally:
        direct.close()
    raise NoCredentials(_NO_METADATA)


_NO_METADATA = (
    "the instance's metadata service (version 2) gave no credentials: attach a role to this instance, and see that its "
    "metadata service is enabled; from within a container it needs a hop limit of 2"
)


def from_provider_chain(profile: str | None = None) -> Issued:
    """Those that botocore, and so boto3 and the AWS CLI, would use: profiles, the environment, SSO, processes. For
    development. A Source, once the profile is bound.
    """
    from botocore.exceptions import ProfileNotFound, SSOError, TokenRetrievalError
    from botocore.session import Session

    try:
        credentials = Session(profile=profile).get_credentials()  # a new one, which has nothing from last time
        if credentials is None:
            raise NoCredentials("no AWS credentials are configured here: run `aws configure sso`, or name a --profile")
        frozen = credentials.get_frozen_credentials()
        # botocore has no public name for it. What can be refreshed has an end; without one it is not what we know.
        expires = credentials._expiry_time if hasattr(credentials, "refresh_needed") else None
    except ProfileNotFound:
        raise NoCredentials("the AWS configuration has no profile of this name: name another --profile") from None
    except (SSOError, TokenRetrievalError):
        raise NoCredentials("the sign-in has expired: run `aws sso login`") from None
    return Issued.of(frozen.access_key, frozen.secret_key, frozen.token, expires)


# --- Who gets them -------------------------------------------------------------------------------------------------


def warn_on_stderr(text: str) -> None:
    """One line on standard error. That nobody reads it any more is no reason to give the enclave nothing."""
    with contextlib.suppress(OSError):
        print(f"strongroom: {text}", file=sys.stderr, flush=True)


class Credentials:
    """Keeps one set, and gives it to whoever calls. Callers share a look-up and wait for nothing else."""

    def __init__(
        self,
        source: Source,
        *,
        warn: Callable[[str], None] = warn_on_stderr,
        registry: CollectorRegistry | None = None,
        clock: Callable[[], float] = time.time,
    ) -> None:
        registry = registry or CollectorRegistry()
        self._source = source
        self._warn = warn
        self._clock = clock
        self._issued: Issued | None = None
        self._looking_up: asyncio.Task[Issued] | None = None
        self._complaint = ""
        self._warned = False
        self._calls = Counter("strongroom_credentials_calls", "Calls by result", ["result"], registry=registry)
        self._lookups = Counter("strongroom_credentials_lookups", "Look-ups by result", ["result"], registry=registry)
        self._expires = Gauge(
            "strongroom_credentials_expires", "When they end, in seconds since 1970; 0: never", registry=registry
        )

    @property
    def handlers(self) -> Mapping[str, Handler]:
        return {"credentials.get": self.get}

    async def get(self, call: IncomingCall) -> None:
        """Raises Fault ``no_credentials``, with what to do about it."""
        try:
            async with asyncio.timeout(ANSWER_SECONDS):
                issued = await self._usable()
        except (NoCredentials, TimeoutError) as error:
            self._calls.labels("refused").inc()
            reason = error.message if isinstance(error, NoCredentials) else "the source does not answer"
            raise Fault("no_credentials", reason) from None
        self._calls.labels("given").inc()
        await call.reply({})
        await call.send(issued.encode(), end=True)

    @contextlib.asynccontextmanager
    async def renewed(self) -> AsyncIterator[None]:
        """Within the block they are looked up at once, and again ahead of their end."""
        renewing = asyncio.get_running_loop().create_task(self._renew(), name="credentials")
        try:
            yield
        finally:
            tasks = [renewing, *([self._looking_up] if self._looking_up else [])]
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def _usable(self) -> Issued:
        if self._issued is None or not self._lasts(self._issued):
            self._issued = await asyncio.shield(self._look_up_once())
        return self._issued

    def _lasts(self, issued: Issued) -> bool:
        return issued.expires is None or issued.expires - self._clock() > USABLE_SECONDS

    async def _renew(self) -> None:
        failures = 0
        while True:
            try:
                issued = await asyncio.shield(self._look_up_once())
            except NoCredentials:
                pause = min(2.0**failures, LONGEST_PAUSE_SECONDS)
                failures = min(failures + 1, 10)
            else:
                pause, failures = pause_before_renewal(issued, self._clock()), 0
            await asyncio.sleep(pause)

    def _look_up_once(self) -> asyncio.Task[Issued]:
        if self._looking_up is None:
            self._looking_up = asyncio.get_running_loop().create_task(self._look_up())
            self._looking_up.add_done_callback(self._looked_up)
        return self._looking_up

    def _looked_up(self, task: asyncio.Task[Issued]) -> None:
        self._looking_up = None
        if not task.cancelled():
            task.exception()  # seen, also when everybody who waited for it has left

    async def _look_up(self) -> Issued:
        try:
            issued = await self._from_source()
        except NoCredentials as error:
            self._lookups.labels("failed").inc()
            if error.message != self._complaint:
                self._complaint = error.message
                self._warn(f"no credentials for the enclave: {error.message}")
            raise
        self._lookups.labels("ok").inc()
        self._complaint = ""
        self._issued = issued
        self._expires.set(issued.expires or 0)
        if issued.expires is None and not self._warned:
            self._warned = True
            self._warn("the enclave gets AWS credentials without an end: for development only")
        return issued

    async def _from_source(self) -> Issued:
        try:
            issued = await _on_a_thread(self._source)
        except NoCredentials:
            raise
        except Exception as error:  # providers run programs and call services: whatever those do wrong
            text = f"looking them up failed with {type(error).__name__}: `aws sts get-caller-identity` may say why"
            raise NoCredentials(text) from None
        if not self._lasts(issued):
            raise NoCredentials("what the source gives has expired: is this host's clock right?")
        return issued


def pause_before_renewal(issued: Issued, now: float) -> float:
    """Seconds until credentials that were looked up at ``now`` are looked up again."""
    if issued.expires is None:
        return REREAD_SECONDS
    left = issued.expires - now
    return max(left - min(AHEAD_SECONDS, left / 3), SHORTEST_PAUSE_SECONDS)


async def _on_a_thread(work: Source) -> Issued:
    """What ``work`` returns. The thread holds up neither the loop nor, should it never come back, the process's end:
    the loop's own executor would wait for it.
    """
    loop = asyncio.get_running_loop()
    future: asyncio.Future[Issued] = loop.create_future()

    def run() -> None:
        try:
            settle = partial(future.set_result, work())
        except BaseException as error:
            settle = partial(future.set_exception, error)
        with contextlib.suppress(RuntimeError):  # the loop has closed meanwhile
            loop.call_soon_threadsafe(lambda: None if future.done() else settle())

    threading.Thread(target=run, name="credentials", daemon=True).start()
    return await future
