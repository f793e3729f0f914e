"""What a client says to a parent's proxy over HTTP, and what it takes for an answer (PROTOCOL.md section 8).

Nothing in here is trusted, and nothing is judged: Evidence goes to the verifier, sealed records to the channel. What is
held to is sizes, times and media types.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncGenerator
from types import TracebackType
from typing import Self
from urllib.parse import urlsplit

import httpx2

from attestation.errors import StrongroomError
from vsockrpc.http import (
    ANSWER_TYPE,
    ENVELOPE_PATH,
    ENVELOPE_TYPE,
    EVIDENCE_PATH,
    EVIDENCE_TYPE,
    KEY_ID_HEADER,
    MAX_EVIDENCE_BYTES,
    SEALED_PATH,
    SEALED_TYPE,
    STATUS_OF_FAULT,
    is_loopback,
)

MAX_FAULT_BYTES = 4096
CONNECT_SECONDS = 10.0
EVIDENCE_SECONDS = 60.0
"""For Evidence as a whole, however it drips. The proxy gives an enclave half of it."""


class Unreachable(StrongroomError):
    """Nobody answers at the address (``unreachable``), or not with this protocol (``not_strongroom``), or it is no
    address (``bad_url``).
    """

    @property
    def exit_code(self) -> int:  # type: ignore[override]
        return 2 if self.code == "bad_url" else 4


class ClearFault(StrongroomError):
    """A refusal in clear. Anybody on the way can forge one: it changes no verdict and no parameter."""


class ProxyClient:
    """One proxy. Use it as an asynchronous context manager, or :meth:`close` it."""

    def __init__(self, url: str, *, silence_seconds: float = EVIDENCE_SECONDS) -> None:
        """``silence_seconds`` is how long a proxy may send nothing. Raises Unreachable ``bad_url``."""
        self.url = url.rstrip("/")
        self._http = httpx2.AsyncClient(
            base_url=self.url,
            timeout=httpx2.Timeout(silence_seconds, connect=CONNECT_SECONDS),
            trust_env=not is_loopback(_host_of(self.url)),
            limits=httpx2.Limits(max_connections=None),
            headers={"Accept-Encoding": "identity"},  # sealed bytes do not compress, and nobody on the way should try
        )

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self.close()

    async def close(self) -> None:
        await self._http.aclose()

    async def evidence(self, nonce: bytes) -> bytes:
        """Evidence that answers ``nonce`` (32 bytes), as received: at most ``MAX_EVIDENCE_BYTES`` of whatever came.

        Raises Unreachable, ClearFault.
        """
        try:
            async with (
                asyncio.timeout(EVIDENCE_SECONDS),
                self._http.stream("GET", EVIDENCE_PATH, params={"nonce": nonce.hex()}) as response,
            ):
                await _require(response, EVIDENCE_TYPE)
                evidence = await _read_bounded(response, MAX_EVIDENCE_BYTES)
        except (httpx2.HTTPError, TimeoutError) as error:
            raise self.unreachable(error) from error
        if not evidence:
            raise Unreachable("not_strongroom", "this is not a Strongroom proxy", expected="Evidence", got="no bytes")
        return evidence

    @property
    def public_url(self) -> str:
        """The address without the user and password that it may hold: what may be written down."""
        parts = urlsplit(self.url)
        return parts._replace(netloc=parts.netloc.rpartition("@")[2]).geturl()

    @contextlib.asynccontextmanager
    async def sealed(self, body: bytes, key_id: bytes) -> AsyncGenerator[httpx2.Response]:
        """The response to a sealed request, once it has begun to come. Raises Unreachable, ClearFault; the library's
        HTTPError for what happens on the way, which means another thing before the answer and within it.
        """
        headers = {"Content-Type": SEALED_TYPE, KEY_ID_HEADER: key_id.hex()}
        async with self._http.stream("POST", SEALED_PATH, content=body, headers=headers) as response:
            await _require(response, SEALED_TYPE)
            yield response

    @contextlib.asynccontextmanager
    async def envelope(self, envelope: bytes) -> AsyncGenerator[httpx2.Response]:
        """The response to the envelope of a prompt, once it has begun to come. Raises as :meth:`sealed`."""
        headers = {"Content-Type": ENVELOPE_TYPE}
        async with self._http.stream("POST", ENVELOPE_PATH, content=envelope, headers=headers) as response:
            await _require(response, ANSWER_TYPE)
            yield response

    def unreachable(self, error: Exception) -> Unreachable:
        return Unreachable(
            "unreachable",
            f"nobody answers at {self.url}: {str(error) or type(error).__name__}",
            got=type(error).__name__,
        )


async def _require(response: httpx2.Response, media_type: str) -> None:
    """Raises ClearFault for a refusal, and Unreachable when what answers is no Strongroom proxy."""
    if response.status_code != httpx2.codes.OK:
        raise await _fault_of(response)
    got = response.headers.get("content-type", "none")
    if got != media_type:
        raise Unreachable("not_strongroom", "this is not a Strongroom proxy", expected=media_type, got=got[:64])


async def _fault_of(response: httpx2.Response) -> ClearFault | Unreachable:
    """The clear fault in a response, or that this is no Strongroom proxy."""
    try:
        fault = json.loads(await _read_bounded(response, MAX_FAULT_BYTES))["fault"]
    except (ValueError, KeyError, TypeError, RecursionError, Unreachable):
        fault = None
    if not isinstance(fault, str) or fault not in STATUS_OF_FAULT:
        return Unreachable(
            "not_strongroom",
            "this is not a Strongroom proxy",
            expected="a clear fault",
            got=f"HTTP {response.status_code}",
        )
    return ClearFault(fault, FAULT_TEXTS[fault])


FAULT_TEXTS = {
    "unknown_key": "the enclave does not know the key that it was verified with: it restarted, or is another one",
    "overloaded": "the enclave has too much to do; try again",
    "unavailable": "the proxy reaches no enclave that serves; is one running?",
    "malformed": "the request was refused as malformed",
    "not_released": "the envelope's key is not released to this enclave: KMS or the enclave's configuration refuses",
}


async def bounded(response: httpx2.Response, limit: int) -> AsyncGenerator[bytes]:
    """The response's bytes as they come, at most ``limit`` of them. Raises Unreachable; the library's HTTPError."""
    size = 0
    async with contextlib.aclosing(response.aiter_raw()) as chunks:
        async for chunk in chunks:
            size += len(chunk)
            if size > limit:
                raise Unreachable("not_strongroom", "the answer is too large", expected=f"<= {limit} bytes", got="more")
            yield chunk


async def _read_bounded(response: httpx2.Response, limit: int) -> bytes:
    async with contextlib.aclosing(bounded(response, limit)) as chunks:
        return b"".join([chunk async for chunk in chunks])


def _host_of(url: str) -> str:
    """Raises Unreachable ``bad_url``."""
    try:
        parts = urlsplit(url)
        if parts.scheme in ("http", "https") and parts.hostname and parts.port != 0:
            return parts.hostname
    except ValueError:  # brackets without an IPv6 address, or a port out of range
        pass
    raise Unreachable("bad_url", "this is no address of a proxy", expected="http://HOST:PORT", got=ascii(url)[:128])
