"""A client's session with an enclave: challenge, verify, appraise, seal, stream.

Nothing leaves this process for the enclave before :func:`attestation.verifier.verify` has returned a result, and what
leaves is sealed to the key that the result vouches for. A result is kept for as long as it says, on the monotonic
clock; an enclave that restarts or rotates its key is verified anew.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import secrets
import time
from collections.abc import AsyncGenerator, Callable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from types import TracebackType
from typing import Self
from urllib.parse import urlsplit

import httpx2

from attestation.errors import StrongroomError
from attestation.policy import AppraisalPolicy
from attestation.verifier import NONCE_SIZE, AttestationResult, verify
from vsockrpc.http import (
    EVIDENCE_PATH,
    EVIDENCE_TYPE,
    KEY_ID_HEADER,
    MAX_EVIDENCE_BYTES,
    SEALED_PATH,
    SEALED_TYPE,
    STATUS_OF_FAULT,
    is_loopback,
)
from vsockrpc.messages import (
    REQUEST_ID_SIZE,
    Answer,
    ChatRequest,
    DescribeRequest,
    Description,
    Done,
    Failure,
    MessageError,
    MessageReader,
    Request,
    Start,
    decode_answer,
)
from vsockrpc.sealed import AnswerOpener, SealedError, SealedRequest, Truncated, seal_request

MAX_FAULT_BYTES = 4096
CONNECT_SECONDS = 10.0
EVIDENCE_SECONDS = 60.0
"""For Evidence as a whole, however it drips. The proxy gives an enclave half of it."""
"""Of one request: the second only after a clear ``unknown_key`` and a new verification (section 6.3)."""
SILENCE_SECONDS = 300.0
"""How long an answer may be silent. With pacing on, an enclave never is."""


class Unreachable(StrongroomError):
    """Nobody answers at the address (``unreachable``), or not with this protocol (``not_strongroom``), or it is no
    address (``bad_url``).
    """

    @property
    def exit_code(self) -> int:  # type: ignore[override]
        return 2 if self.code == "bad_url" else 4


class ClearFault(StrongroomError):
    """A refusal in clear. Anybody on the way can forge one: it changes no verdict and no parameter."""


class EnclaveRestarted(StrongroomError):
    """Another boot answers than the one that the request was sealed to.

    That one has been verified, and the next request is sealed to it.
    """


class RequestFailed(StrongroomError):
    """The enclave itself, through the sealed channel, says that the request failed, and why."""

    @property
    def exit_code(self) -> int:  # type: ignore[override]  # what the person asked for, or what the enclave could not do
        return 2 if self.code in ("invalid_request", "context_exceeded", "unknown_model") else 4


@dataclass(frozen=True, slots=True)
class _Verified:
    result: AttestationResult
    until: float


def _wall_clock() -> datetime:
    return datetime.now(UTC)


class Session:
    """One proxy's address and one policy. Use it as an asynchronous context manager, or :meth:`close` it.

    ``monotonic`` (seconds) decides how long a result is kept, ``now`` (with a time zone) is what Evidence is judged at.
    """

    def __init__(
        self,
        url: str,
        policy: AppraisalPolicy,
        *,
        silence_seconds: float = SILENCE_SECONDS,
        monotonic: Callable[[], float] = time.monotonic,
        now: Callable[[], datetime] = _wall_clock,
    ) -> None:
        """Raises Unreachable ``bad_url``."""
        self.url = url.rstrip("/")
        self.policy = policy
        self._silence_seconds = silence_seconds
        self._monotonic = monotonic
        self._now = now
        self._verified: _Verified | None = None
        self._verification: asyncio.Future[AttestationResult] | None = None
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
        if self._verification is not None:
            self._verification.cancel()
        await self._http.aclose()

    # --- Verification --------------------------------------------------------------------------------------------

    async def verify(self) -> AttestationResult:
        """Challenges the enclave with a fresh nonce and judges its Evidence.

        Raises EvidenceError or AppraisalError when it is refused, Unreachable or ClearFault when there is none.
        """
        self._verified = None
        return await self.result()

    async def result(self, *, instead_of: AttestationResult | None = None) -> AttestationResult:
        """The result in force: the last one while it is valid and not ``instead_of``, else a new one.

        Raises as :meth:`verify`.
        """
        kept = self._verified
        if kept is not None and kept.result is not instead_of and self._monotonic() < kept.until:
            return kept.result
        if self._verification is None:  # whoever needs a result while one is on its way waits for that one
            self._verification = asyncio.ensure_future(self._verify())
            self._verification.add_done_callback(self._verification_ended)
        return await asyncio.shield(self._verification)

    async def _verify(self) -> AttestationResult:
        self._verified = None
        nonce = secrets.token_bytes(NONCE_SIZE)
        requested = self._monotonic()
        evidence = await self._fetch_evidence(nonce)
        result = verify(evidence, policy=self.policy, nonce=nonce, at=self._now())
        self._verified = _Verified(result, requested + result.valid_seconds)
        return result

    def _verification_ended(self, verification: asyncio.Future[AttestationResult]) -> None:
        self._verification = None
        if not verification.cancelled():
            verification.exception()  # seen, also when everybody who waited for it has left

    async def _fetch_evidence(self, nonce: bytes) -> bytes:
        try:
            async with (
                asyncio.timeout(EVIDENCE_SECONDS),
                self._http.stream("GET", EVIDENCE_PATH, params={"nonce": nonce.hex()}) as response,
            ):
                await _require(response, EVIDENCE_TYPE)
                return await _read_bounded(response, MAX_EVIDENCE_BYTES)
        except (httpx2.HTTPError, TimeoutError) as error:
            raise self._unreachable(error) from error

    # --- Requests ------------------------------------------------------------------------------------------------

    async def chat(self, request: ChatRequest) -> AsyncGenerator[Answer]:
        """Sends a prompt and yields Start, Delta and Done as they arrive.

        Read it to its end: what follows Done is padding, and leaving before it shows the answer's length. Raises
        RequestFailed when the enclave says so, SealedError when the answer was tampered with or cut short, Unreachable
        or ClearFault when there was none, and what :meth:`verify` raises.
        """
        started = False
        async with contextlib.aclosing(self._exchange(_new_request(request))) as answers:
            async for answer in answers:
                if isinstance(answer, Description) or isinstance(answer, Start) is started:
                    raise SealedError("malformed", "the answer's messages are out of order")
                started = True
                yield answer

    async def describe(self) -> Description:
        """Asks what the enclave serves. Raises as :meth:`chat`."""
        description: Description | None = None
        async with contextlib.aclosing(self._exchange(_new_request(DescribeRequest()))) as answers:
            async for answer in answers:
                if isinstance(answer, Description):
                    description = answer
        if description is None:
            raise SealedError("malformed", "the enclave did not describe itself")
        return description

    async def _exchange(self, request: Request) -> AsyncGenerator[Answer]:
        """One attempt, and after a clear ``unknown_key`` one more with the same request id.

        Anybody can forge that fault after the enclave has begun, so there is a second attempt only where the enclave
        would refuse to run it as well: within one boot, and while that boot remembers the id.
        """
        content = request.encode()
        result, begun = await self.result(), self._monotonic()
        try:
            async with contextlib.aclosing(self._attempt(seal_request(result, content))) as answers:
                async for answer in answers:
                    yield answer
            return
        except ClearFault as fault:
            if fault.code != "unknown_key" or self._monotonic() - begun > result.commitment.lifetime:
                raise
        renewed = await self.result(instead_of=result)
        if renewed.commitment.boot_id != result.commitment.boot_id:
            raise EnclaveRestarted(
                "enclave_restarted",
                "the enclave was booted anew and has been verified; whether the one before has begun on this request "
                "nobody can tell: ask again if it may run twice",
            )
        async with contextlib.aclosing(self._attempt(seal_request(renewed, content))) as answers:
            async for answer in answers:
                yield answer

    async def _attempt(self, sealed: SealedRequest) -> AsyncGenerator[Answer]:
        headers = {"Content-Type": SEALED_TYPE, KEY_ID_HEADER: sealed.key_id.hex()}
        messages = MessageReader()
        begun, ended = False, False
        failure: Failure | None = None
        try:
            async with self._http.stream("POST", SEALED_PATH, content=sealed.body, headers=headers) as response:
                await _require(response, SEALED_TYPE)
                begun = True
                async for chunk in self._while_records_come(response, sealed.answer):
                    for answer in _decoded(messages, sealed.answer.feed(chunk)):
                        if ended:
                            raise SealedError("malformed", "the answer goes on after its end")
                        ended = isinstance(answer, Done | Description | Failure)
                        if isinstance(answer, Failure):
                            failure = answer  # the padding behind it is read too: nobody learns from when we leave
                        else:
                            yield answer
        except httpx2.HTTPError as error:
            if not begun:
                raise self._unreachable(error) from error
            if not ended:
                self._verified = None  # most likely another boot answers next: it is verified before it is spoken to
                raise Truncated("the answer broke off: the enclave, the proxy or the network went away") from error
        if failure is not None:
            raise RequestFailed(failure.code, failure.message, expected=failure.expected, got=failure.got)
        sealed.answer.finish()
        if not ended or messages.buffered:
            raise SealedError("malformed", "the answer has no end")

    async def _while_records_come(self, response: httpx2.Response, answer: AnswerOpener) -> AsyncGenerator[bytes]:
        """The response's bytes. A peer that drips them is as silent as one that sends none: whole records count.

        Raises Truncated.
        """
        loop = asyncio.get_running_loop()
        opened, due = 0, loop.time() + self._silence_seconds
        async with contextlib.aclosing(response.aiter_raw()) as chunks:
            while True:
                try:
                    async with asyncio.timeout_at(due):
                        chunk = await anext(chunks, None)
                except TimeoutError as error:
                    raise Truncated(f"no record of the answer came for {self._silence_seconds:g} s") from error
                if chunk is None:
                    return
                yield chunk
                if answer.opened > opened:
                    opened, due = answer.opened, loop.time() + self._silence_seconds

    def _unreachable(self, error: Exception) -> Unreachable:
        return Unreachable(
            "unreachable", f"nobody answers at {self.url}: {error or type(error).__name__}", got=type(error).__name__
        )


def _new_request(body: ChatRequest | DescribeRequest) -> Request:
    return Request(secrets.token_bytes(REQUEST_ID_SIZE), body)


def _decoded(messages: MessageReader, content: bytes) -> Iterator[Answer]:
    try:
        for message in messages.feed(content):
            yield decode_answer(message)
    except MessageError as error:
        raise SealedError("malformed", error.message, expected=error.expected, got=error.got) from error


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
}


async def _read_bounded(response: httpx2.Response, limit: int) -> bytes:
    data = bytearray()
    async for chunk in response.aiter_raw():
        data += chunk
        if len(data) > limit:
            raise Unreachable("not_strongroom", "the answer is too large", expected=f"<= {limit} bytes", got="more")
    return bytes(data)


def _host_of(url: str) -> str:
    """Raises Unreachable ``bad_url``."""
    try:
        parts = urlsplit(url)
        if parts.scheme in ("http", "https") and parts.hostname and parts.port != 0:
            return parts.hostname
    except ValueError:  # brackets without an IPv6 address, or a port out of range
        pass
    raise Unreachable("bad_url", "this is no address of a proxy", expected="http://HOST:PORT", got=ascii(url)[:128])
