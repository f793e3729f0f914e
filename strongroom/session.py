"""A client's session with an enclave: challenge, verify, appraise, seal, stream.

Nothing leaves this process for the enclave before :func:`attestation.verifier.verify` has returned a result, and what
leaves is sealed to the key that the result vouches for. A result is kept for as long as it says, on the monotonic
clock; an enclave that restarts or rotates its key is verified anew.
"""

from __future__ import annotations

import asyncio
import contextlib
import secrets
import time
from collections.abc import AsyncGenerator, Callable, Iterator, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from types import TracebackType
from typing import Self, TypeVar

import httpx2

from attestation.chain import ChainCache
from attestation.errors import StrongroomError
from attestation.keypolicy.document import KeyArn
from attestation.keyrelease import KeyFacts
from attestation.policy import AppraisalPolicy
from attestation.verifier import NO_KEYS, NONCE_SIZE, AttestationResult, verify
from strongroom.kms.client import ask_of_keys
from strongroom.proxy_client import ClearFault, ProxyClient
from vsockrpc.chat import ChatRequest, CompletionRequest, GenerationRequest
from vsockrpc.fields import MessageError
from vsockrpc.messages import (
    REQUEST_ID_SIZE,
    Answer,
    Counted,
    CountRequest,
    DescribeRequest,
    Description,
    Done,
    Failure,
    MessageReader,
    Request,
    RequestBody,
    Start,
    decode_answer,
)
from vsockrpc.sealed import AnswerOpener, SealedError, SealedRequest, Truncated, seal_request

SILENCE_SECONDS = 300.0
"""How long an answer may be silent. With pacing on, an enclave never is."""
A = TypeVar("A", Counted, Description)


class EnclaveRestarted(StrongroomError):
    """Another boot answers than the one that the request was sealed to.

    That one has been verified, and the next request is sealed to it.
    """


class RequestFailed(StrongroomError):
    """The enclave itself, through the sealed channel, says that the request failed, and why. ``retry_seconds``: after
    which an enclave that has too much to do would be asked again.
    """

    def __init__(
        self,
        code: str,
        message: str,
        *,
        expected: object | None = None,
        got: object | None = None,
        retry_seconds: int | None = None,
    ) -> None:
        super().__init__(code, message, expected=expected, got=got)
        self.retry_seconds = retry_seconds

    @classmethod
    def of(cls, failure: Failure) -> Self:
        return cls(
            failure.code,
            failure.message,
            expected=failure.expected,
            got=failure.got,
            retry_seconds=failure.retry_seconds,
        )

    @property
    def exit_code(self) -> int:  # type: ignore[override]  # what the person asked for, or what the enclave could not do
        return 2 if self.code in ("invalid_request", "context_exceeded", "answer_exceeded", "unknown_model") else 4


@dataclass(frozen=True, slots=True)
class _Verified:
    result: AttestationResult
    until: float


def _wall_clock() -> datetime:
    return datetime.now(UTC)


class Session:
    """One proxy's address and one policy. Use it as an asynchronous context manager, or :meth:`close` it.

    ``reread`` gives the policy anew for every verification but the first, so that a session which lives for weeks sees
    what was changed or taken back; what it raises ends that verification. For a policy that names KMS keys
    ``ask_of_keys`` asks KMS before each verification; what stands there uses boto3's own credentials. ``monotonic``
    (seconds) decides how long a result is kept, ``now`` (with a time zone) is what Evidence is judged at.
    """

    def __init__(
        self,
        url: str,
        policy: AppraisalPolicy,
        *,
        reread: Callable[[], AppraisalPolicy] | None = None,
        silence_seconds: float = SILENCE_SECONDS,
        monotonic: Callable[[], float] = time.monotonic,
        now: Callable[[], datetime] = _wall_clock,
        ask_of_keys: Callable[[AppraisalPolicy], Mapping[KeyArn, KeyFacts]] = ask_of_keys,
    ) -> None:
        """Raises Unreachable ``bad_url``."""
        self.policy = policy
        self._reread = reread
        self._has_judged = False
        self._silence_seconds = silence_seconds
        self._monotonic = monotonic
        self._now = now
        self._ask_of_keys = ask_of_keys
        self._certificates = ChainCache()
        self._verified: _Verified | None = None
        self._verification: asyncio.Future[AttestationResult] | None = None
        self._proxy = ProxyClient(url, silence_seconds=silence_seconds)

    @property
    def url(self) -> str:
        return self._proxy.url

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self.close()

    async def close(self) -> None:
        if self._verification is not None:
            self._verification.cancel()
        await self._proxy.close()

    # --- Verification --------------------------------------------------------------------------------------------

    async def verify(self) -> AttestationResult:
        """Challenges the enclave with a fresh nonce and judges its Evidence, with what KMS says of the policy's keys.

        Raises EvidenceError or AppraisalError when it is refused, Unreachable or ClearFault when there is none, and
        what ``ask_of_keys`` raises: KmsError, MissingExtra.
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
        if self._reread is not None and self._has_judged:
            self.policy = await asyncio.to_thread(self._reread)
        self._has_judged = True
        policy = self.policy
        nonce = secrets.token_bytes(NONCE_SIZE)
        requested = self._monotonic()
        # Within the result's time, which counts from here; and first, so that no Evidence grows old while KMS answers.
        keys = await asyncio.to_thread(self._ask_of_keys, policy) if policy.kms else NO_KEYS
        evidence = await self._proxy.evidence(nonce)
        result = verify(evidence, policy=policy, nonce=nonce, at=self._now(), cache=self._certificates, keys=keys)
        self._verified = _Verified(result, requested + result.valid_seconds)
        return result

    def _verification_ended(self, verification: asyncio.Future[AttestationResult]) -> None:
        self._verification = None
        if not verification.cancelled():
            verification.exception()  # seen, also when everybody who waited for it has left

    # --- Requests ------------------------------------------------------------------------------------------------

    def chat(self, request: ChatRequest) -> AsyncGenerator[Answer]:
        """Sends a conversation and yields Start, Delta and Done as they arrive.

        Read it to its end: what follows Done is padding, and leaving before it shows the answer's length. Raises
        RequestFailed when the enclave says so, SealedError when the answer was tampered with or cut short, Unreachable
        or ClearFault when there was none, and what :meth:`verify` raises.
        """
        return self._generated(request)

    def complete(self, request: CompletionRequest) -> AsyncGenerator[Answer]:
        """Sends a text that is to be gone on with. Yields and raises as :meth:`chat`."""
        return self._generated(request)

    async def count(self, request: ChatRequest) -> int:
        """The tokens that the prompt of ``request`` has. Raises as :meth:`chat`."""
        return (await self._only(CountRequest(request), Counted)).prompt_tokens

    async def describe(self) -> Description:
        """Asks what the enclave serves. Raises as :meth:`chat`."""
        return await self._only(DescribeRequest(), Description)

    async def _generated(self, request: GenerationRequest) -> AsyncGenerator[Answer]:
        started = False
        async with contextlib.aclosing(self._exchange(request)) as answers:
            async for answer in answers:
                if isinstance(answer, Counted | Description) or isinstance(answer, Start) is started:
                    raise SealedError("malformed", "the answer's messages are out of order")
                started = True
                yield answer

    async def _only(self, body: RequestBody, kind: type[A]) -> A:
        """An answer of one message."""
        found: A | None = None
        async with contextlib.aclosing(self._exchange(body)) as answers:
            async for answer in answers:
                if not isinstance(answer, kind):
                    raise SealedError("malformed", "the enclave answered another question", expected=kind.__name__)
                found = answer
        assert found is not None, "an answer has an end, or raises"
        return found

    async def _exchange(self, body: RequestBody) -> AsyncGenerator[Answer]:
        """One attempt, and after a clear ``unknown_key`` one more with the same request id.

        Anybody can forge that fault after the enclave has begun, so there is a second attempt only where the enclave
        would refuse to run it as well: within one boot, and while that boot remembers the id.
        """
        content = Request(secrets.token_bytes(REQUEST_ID_SIZE), body).encode()
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
        messages = MessageReader()
        begun, ended = False, False
        failure: Failure | None = None
        try:
            async with self._proxy.sealed(sealed.body, sealed.key_id) as response:
                begun = True
                async for chunk in self._while_records_come(response, sealed.answer):
                    for answer in _decoded(messages, sealed.answer.feed(chunk)):
                        if ended:
                            raise SealedError("malformed", "the answer goes on after its end")
                        ended = isinstance(answer, Done | Counted | Description | Failure)
                        if isinstance(answer, Failure):
                            failure = answer  # the padding behind it is read too: nobody learns from when we leave
                        else:
                            yield answer
        except httpx2.HTTPError as error:
            if not begun:
                raise self._proxy.unreachable(error) from error
            if not ended:
                self._verified = None  # most likely another boot answers next: it is verified before it is spoken to
                raise Truncated("the answer broke off: the enclave, the proxy or the network went away") from error
        if failure is not None:
            raise RequestFailed.of(failure)
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


def _decoded(messages: MessageReader, content: bytes) -> Iterator[Answer]:
    try:
        for message in messages.feed(content):
            yield decode_answer(message)
    except MessageError as error:
        raise SealedError("malformed", error.message, expected=error.expected, got=error.got) from error
