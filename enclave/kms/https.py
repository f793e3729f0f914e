"""HTTPS to KMS over the tunnel: a urllib3 pool whose sockets are tunnel streams and whose time is the NSM's.

TLS ends here and trusts the configured authorities alone: nothing of the system, no environment, no file. OpenSSL does
not compare certificates with the clock, which is the host's; every certificate of the verified chain is compared with
the attestation document's time instead, before each request.
"""

from __future__ import annotations

import contextlib
import ssl
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextvars import ContextVar
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from urllib3 import HTTPSConnectionPool, Timeout
from urllib3.connection import HTTPSConnection
from urllib3.exceptions import HTTPError
from urllib3.exceptions import TimeoutError as PoolTimeoutError

from attestation.errors import StrongroomError
from attestation.secret import Secret
from enclave.kms.errors import KmsError
from enclave.kms.tunnel import TunnelStream
from vsockrpc.transport import ConnectionLost, Fault

MAX_RESPONSE = 262_144
"""Bytes of an answer's body; KMS's have some thousands."""
PIECE = 65_536
"""Bytes of it read at once."""
NO_CHECK_TIME = 0x20_0000
"""``X509_V_FLAG_NO_CHECK_TIME`` of OpenSSL, which :mod:`ssl` has no name for."""

Dial = Callable[[float], TunnelStream]
"""Makes a stream to KMS within so many seconds, from a thread. Raises Fault and ConnectionLost."""


@dataclass(frozen=True, slots=True)
class Credentials:
    """The parent's, for signing requests. What they may do is in the key policy."""

    access_key: str
    secret: Secret
    token: Secret | None
    expires: datetime | None


class Attempt:
    """One request on its way: when it is, who signs it, until when it may take; and a way to end it from outside."""

    def __init__(self, at: datetime, credentials: Credentials, *, seconds: float) -> None:
        self.at = at
        """The attestation document's time."""
        self.credentials = credentials
        self.stream: TunnelStream | None = None
        """What its thread blocks on, and nobody else's."""
        self._lock = threading.Lock()
        self._deadline = time.monotonic() + seconds
        self._expired = False

    @property
    def is_over(self) -> bool:
        return self._expired or time.monotonic() >= self._deadline

    def left(self) -> float:
        """Seconds, more than none. Raises KmsError ``kms_timeout``."""
        left = self._deadline - time.monotonic()
        if self._expired or left <= 0:
            raise timed_out()
        return left

    def use(self, stream: TunnelStream) -> None:
        """On the thread: it blocks on ``stream`` from now. Raises KmsError ``kms_timeout`` when it must not."""
        with self._lock:
            self.stream = stream
        self.left()

    def leave(self) -> None:
        """On the thread: once this returns, nothing here ends the stream, and another attempt may use it."""
        with self._lock:
            self.stream = None

    def expire(self) -> None:
        """On the loop: whoever blocks goes on at once."""
        with self._lock:
            self._expired = True
            if self.stream is not None:
                self.stream.abort(Fault("deadline_exceeded"))


ATTEMPT: ContextVar[Attempt] = ContextVar("attempt")
"""What this thread is at: signing and sending are called by botocore, which hands on nothing of its caller's."""


def timed_out() -> KmsError:
    return KmsError("kms_timeout", "KMS did not answer in time", passing=True)


def trusting(authorities: Sequence[bytes]) -> ssl.SSLContext:
    """For TLS of at least 1.2 to a server of the right name whose chain ends in one of ``authorities`` (DER).

    Raises StrongroomError ``bad_anchor`` when one of them is no certificate.
    """
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)  # which checks chain and name, and trusts nobody yet
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.verify_flags |= NO_CHECK_TIME
    context.set_alpn_protocols(["http/1.1"])
    for authority in authorities:
        try:
            context.load_verify_locations(cadata=authority)
        except (ssl.SSLError, ValueError):
            raise StrongroomError("bad_anchor", "an authority for TLS to KMS is no certificate (DER)") from None
    return context


class KmsPool:
    """Connections to one endpoint, kept for the next request. For threads, each at an :class:`Attempt`."""

    def __init__(self, host: str, port: int, authorities: Sequence[bytes], dial: Dial, *, kept: int) -> None:
        """At most ``kept`` connections wait for their next request. Raises StrongroomError as :func:`trusting`."""
        self._pool = _Pool(host, port, maxsize=kept, retries=False, ssl_context=trusting(authorities), dial=dial)

    def close(self) -> None:
        self._pool.close()

    def post(self, path: str, body: bytes, headers: Mapping[str, str]) -> tuple[int, Mapping[str, str], bytes]:
        """Status, headers and body of the answer. Raises KmsError."""
        attempt = ATTEMPT.get()
        with (
            _classified(attempt),
            self._pool.urlopen(
                "POST",
                path,
                body=body,
                headers=dict(headers),
                redirect=False,
                timeout=Timeout(total=attempt.left()),
                preload_content=False,
                decode_content=False,
            ) as response,
        ):
            content = bytearray()
            while piece := response.read(PIECE):  # the last of these notices a body that was cut short
                content += piece
                if len(content) > MAX_RESPONSE:
                    longest = f"at most {MAX_RESPONSE} bytes"
                    raise KmsError("kms_malformed", "KMS's answer is too long", expected=longest)
            return response.status, dict(response.headers), bytes(content)


class _Connection(HTTPSConnection):
    """Connects through the tunnel, and does TLS itself: urllib3's way has defaults and an environment."""

    ssl_context: ssl.SSLContext

    def __init__(self, *arguments: Any, dial: Dial, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self._dial = dial
        self._stream: TunnelStream | None = None
        self._validity = (0.0, 0.0)

    def connect(self) -> None:
        """Raises KmsError."""
        attempt = ATTEMPT.get()
        try:
            self._stream = self._dial(attempt.left())
        except (Fault, ConnectionLost) as error:
            raise _no_stream(error) from None
        attempt.use(self._stream)
        self._stream.socket.settimeout(attempt.left())
        try:
            tls = self.ssl_context.wrap_socket(self._stream.socket, server_hostname=self.host)
            self.sock = tls
            self._validity = _common_validity(tls)
        except OSError as error:  # ssl.SSLError too
            raise _no_handshake(error, attempt) from None
        self.is_verified = True

    def request(self, *arguments: Any, **options: Any) -> None:
        """Raises KmsError ``kms_tls`` before a byte is sent, when a certificate of the chain is not valid."""
        attempt = ATTEMPT.get()
        assert self._stream is not None, "a request is made on a connection"
        attempt.use(self._stream)
        first, last = self._validity
        if not first <= attempt.at.timestamp() <= last:
            raise KmsError(
                "kms_tls",
                "a certificate of KMS's chain is not valid at the time of the attestation document",
                expected=f"{_utc(first)} to {_utc(last)}",
                got=_utc(attempt.at.timestamp()),
            )
        super().request(*arguments, **options)

    def close(self) -> None:
        super().close()
        if self._stream is not None:
            self._stream.close()
            self._stream = None

    @property
    def has_stream(self) -> bool:
        return self._stream is not None


class _Pool(HTTPSConnectionPool):
    ConnectionCls = _Connection  # type: ignore[assignment]  # the arguments that it hands on are none of its concern

    def _put_conn(self, conn: Any) -> None:
        """urllib3 does this within the read that finds a body's end: from then on the stream is whoever's takes it."""
        if conn is not None and conn.has_stream:
            ATTEMPT.get().leave()
        super()._put_conn(conn)


def _common_validity(tls: ssl.SSLSocket) -> tuple[float, float]:
    """From when until when every certificate of the verified chain is valid, root included; POSIX seconds."""
    # The socket's own get_verified_chain() came with Python 3.13; this is what it calls.
    chain = tls._sslobj.get_verified_chain()  # type: ignore[attr-defined]
    periods = [certificate.get_info() for certificate in chain]
    starts = [ssl.cert_time_to_seconds(period["notBefore"]) for period in periods]
    ends = [ssl.cert_time_to_seconds(period["notAfter"]) for period in periods]
    return max(starts), min(ends)


def _utc(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


# --- What went wrong --------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def _classified(attempt: Attempt) -> Iterator[None]:
    """Foreign exceptions become KmsError here. None of them is kept as a cause: a request's headers have secrets."""
    try:
        yield
    except (HTTPError, OSError) as error:
        if isinstance(error, PoolTimeoutError):
            raise timed_out() from None
        raise _broken(attempt, type(error).__name__) from None
    finally:
        attempt.leave()


def _broken(attempt: Attempt, how: str) -> KmsError:
    """A connection that ended: the stream knows best why."""
    if attempt.is_over:
        return timed_out()
    why = attempt.stream.error if attempt.stream is not None else None
    if why is None:
        return KmsError("kms_unreachable", "the connection to KMS broke", got=how, passing=True)
    return _no_stream(why)


def _no_stream(error: Fault | ConnectionLost) -> KmsError:
    match error.code:
        case "deadline_exceeded":
            return timed_out()
        case "egress_refused":
            return KmsError("kms_unreachable", f"the parent's egress refuses: {error.message}", got=error.code)
        case "overloaded" | "too_many_calls":
            return KmsError("overloaded", "the parent's egress takes no more calls", got=error.code, passing=True)
        case code:
            return KmsError("kms_unreachable", f"no way to KMS: {error.message}", got=code, passing=True)


def _no_handshake(error: OSError, attempt: Attempt) -> KmsError:
    match error:
        case ssl.SSLCertVerificationError():
            return KmsError("kms_tls", f"whoever answers cannot show to be KMS: {error.verify_message}")
        case TimeoutError():
            return timed_out()
        case ssl.SSLEOFError() | ssl.SSLZeroReturnError():
            return _broken(attempt, type(error).__name__)
        case ssl.SSLError():
            return KmsError("kms_tls", "no TLS to KMS comes about", got=error.reason)
        case _:
            return _broken(attempt, type(error).__name__)
