"""What an enclave answers: Evidence, sealed calls, prompts that waited, and its events. PROTOCOL.md sections 5.2 and 6.

The one page that matters is :meth:`Server.sealed`: a request comes in as ciphertext, becomes a prompt in this
process and nowhere before, goes to the engine, and its answer leaves as records of one size on a fixed beat.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import ParamSpec, TypeVar

from attestation.commitment import Evidence, Purpose, UserData
from attestation.envelope import LENGTH_SIZE, MAX_OPENING, MAX_TERMS, PROMPT_RECORD
from attestation.errors import StrongroomError
from attestation.verifier import NONCE_SIZE
from enclave.arrivals import ARRIVAL_SECONDS, Arrivals
from enclave.boot import Enclave
from enclave.identity import OfferedKey
from enclave.kms.errors import KmsError
from enclave.kms.release import EnvelopeReader
from enclave.log import TOTALS_INTERVAL_SECONDS, NsmFailed, Phase
from enclave.nsm import NsmError
from enclave.pacing import PacedAnswer
from vsockrpc.chat import ChatRequest, CompletionRequest
from vsockrpc.deferred import SECRET_SIZE, ReplyKeys, reply_secret_of, request_of
from vsockrpc.fields import MessageError
from vsockrpc.messages import Counted, CountRequest, DescribeRequest, Description, MessageReader, Request, Start
from vsockrpc.sealed import (
    HEADER_SIZE,
    LENGTH_PREFIX_SIZE,
    OPENING_SIZE,
    REQUEST_RECORD_SIZE,
    TAG_SIZE,
    AnswerKeys,
    ExchangeKeys,
    RecordOpener,
    SealedError,
    split_opening,
)
from vsockrpc.transport import Fault, Handler, IncomingCall

EVIDENCE_QUEUE = 32
OPENING_QUEUE = 256

P = ParamSpec("P")
T = TypeVar("T")


class BoundedWorker:
    """One thread with a bounded queue: work that must neither block the event loop nor pile up behind it.

    Work whose caller has left is done all the same and keeps its place until then, so that leaving early buys no
    second place.
    """

    def __init__(self, name: str, limit: int) -> None:
        self._executor = ThreadPoolExecutor(max_workers=1, thread_name_prefix=name)
        self._limit = limit
        self._queued = 0

    async def run(self, work: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """Raises Fault ``overloaded`` when the queue is full."""
        if self._queued >= self._limit:
            raise Fault("overloaded", "too many requests of this kind at once")
        self._queued += 1
        future = asyncio.wrap_future(self._executor.submit(work, *args, **kwargs))
        future.add_done_callback(self._leave)
        return await asyncio.shield(future)

    def _leave(self, _: asyncio.Future[T]) -> None:
        self._queued -= 1

    def close(self) -> None:
        self._executor.shutdown(wait=False, cancel_futures=True)


class Server:
    """The enclave's side of the RPC."""

    def __init__(self, enclave: Enclave) -> None:
        self._enclave = enclave
        self._log = enclave.log
        self._attesting = BoundedWorker("evidence", EVIDENCE_QUEUE)
        self._opening = BoundedWorker("opening", OPENING_QUEUE)
        self._arrivals = Arrivals()

    @property
    def handlers(self) -> Mapping[str, Handler]:
        return {
            "evidence": self.evidence,
            "sealed": self.sealed,
            "envelope": self.envelope,
            "events": self.events,
        }

    def close(self) -> None:
        self._attesting.close()
        self._opening.close()

    # --- Evidence ------------------------------------------------------------------------------------------------

    async def evidence(self, call: IncomingCall) -> None:
        """Fresh Evidence for the channel key on offer. The caller chooses the nonce and nothing else of what is
        attested."""
        nonce = call.meta.get("nonce")
        if set(call.meta) != {"nonce"} or not isinstance(nonce, bytes) or len(nonce) != NONCE_SIZE:
            raise Fault("malformed", f"evidence takes a nonce of {NONCE_SIZE} bytes")
        self._require_serving()
        self._log.totals.evidence += 1
        try:
            commitment = self._enclave.identity.current().commitment
        except SealedError as error:
            raise Fault("overloaded", error.message) from error
        binding = UserData(Purpose.CHANNEL, commitment.digest()).encode()
        try:
            document = await self._attesting.run(
                self._enclave.nsm.attestation, user_data=binding, nonce=nonce, public_key=None
            )
        except NsmError as error:
            self._log.write(NsmFailed(error.code))
            raise Fault("unavailable", "the NSM gave no document") from error
        await call.reply({})
        await call.send(Evidence(document, commitment.encode()).encode(), end=True)

    # --- Sealed calls --------------------------------------------------------------------------------------------

    async def sealed(self, call: IncomingCall) -> None:
        """One sealed request and its answer. Until the secret is opened a failure is a clear fault; from then on
        every one is sealed."""

        async def receive() -> _Received:
            opened = await self._open(call)
            return _Received(opened.keys, await self._accept(opened))

        await self._answered(call, receive)

    async def envelope(self, call: IncomingCall) -> None:
        """A prompt that has waited in an envelope, and its answer. Until the reply secret is known a failure is a clear
        fault. It may come again: whoever holds the envelope decides that, and each answer is sealed alike."""

        async def receive() -> _Received:
            if call.meta:
                raise Fault("malformed", "an envelope comes without anything beside it")
            return await self._open_envelope(_Body(call))

        await self._answered(call, receive)

    async def _answered(self, call: IncomingCall, receive: Callable[[], Awaitable[_Received]]) -> None:
        """Receives a request and answers it, and counts what became of it."""
        self._require_serving()
        self._log.totals.requests += 1
        received: _Received | None = None
        try:
            received = await receive()
            answered = await self._answer(call, received)
        except asyncio.CancelledError:
            self._log.totals.cancelled += 1
            raise
        except Exception:
            if received is None:
                self._log.totals.refused += 1
            else:
                self._log.totals.cancelled += 1
            raise
        if answered:
            self._log.totals.answered += 1
        else:
            self._log.totals.failed += 1

    async def _open(self, call: IncomingCall) -> _Opened:
        """Raises Fault: nothing can be sealed before the client's secret is known."""
        key_id = call.meta.get("key_id")
        if set(call.meta) != {"key_id"} or not isinstance(key_id, bytes):
            raise Fault("malformed", "a sealed call names its key")
        self._accepted_key(key_id)  # before anything is waited for
        body = _Body(call)
        try:
            async with asyncio.timeout(min(ARRIVAL_SECONDS, self._enclave.configuration.limits.request_seconds)):
                sealed = split_opening(await body.exactly(OPENING_SIZE))
            key = self._accepted_key(key_id)  # the opening may have come when the key had expired
            keys = await self._opening.run(key.private.open, sealed, key.commitment)
        except TimeoutError as error:
            raise Fault("unavailable", "the request did not arrive in time") from error
        except SealedError as error:
            raise Fault("malformed", "the sealed secret does not open") from error
        return _Opened(key, keys, body)

    def _accepted_key(self, key_id: bytes) -> OfferedKey:
        key = self._enclave.identity.find(key_id)
        if key is None:
            raise Fault("unknown_key", "this key is not accepted")
        return key

    async def _open_envelope(self, body: _Body) -> _Received:
        """Raises Fault: nothing can be sealed before the reply secret is known. Why an envelope is refused is not said:
        whoever brings it need not be who sealed it."""
        keys = self._enclave.prompt_keys
        if keys is None:
            raise Fault("not_released", "this enclave opens no envelopes")
        reader, digest, content = EnvelopeReader(keys), hashlib.sha384(), bytearray()
        limits = self._enclave.configuration.limits
        try:
            async with (
                asyncio.timeout(limits.request_seconds),
                contextlib.aclosing(self._bounded(body, longest_envelope(limits.request_bytes))) as chunks,
            ):
                async for chunk in chunks:
                    digest.update(chunk)
                    for piece in await reader.feed(chunk):
                        content += piece
            content += reader.finish()
            prompt = bytes(content)
            secret = reply_secret_of(prompt)
        except TimeoutError as error:
            raise Fault("unavailable", "the envelope did not arrive in time") from error
        except StrongroomError as error:
            if isinstance(error, KmsError):
                self._log.totals.count_kms(error.code)
            raise Fault(_fault_of(error), "the envelope was not opened") from error
        request: Request | Exception
        try:
            request = request_of(prompt, limit=limits.request_bytes)
        except Exception as error:  # a defect too is answered sealed, by whoever runs the answer
            request = error
        return _Received(ReplyKeys(secret, digest.digest()), request)

    async def _answer(self, call: IncomingCall, received: _Received) -> bool:
        """Whether it came to its end; else the client has been told why, sealed."""
        configuration = self._enclave.configuration
        answer = PacedAnswer(
            call,
            received.keys,
            configuration.pacing,
            seconds=configuration.limits.request_seconds,
            on_defect=self._count_defect,
        )

        async def work() -> None:
            if isinstance(received.request, Exception):
                raise received.request
            await self._work(received.request, answer)

        return await answer.run(work)

    async def _accept(self, opened: _Opened) -> Request | Exception:
        """The request, or why there is none; both are answered sealed. The replay tag goes in before any other work."""
        try:
            opened.key.secrets_seen.add(opened.keys.replay_tag)
            async with asyncio.timeout(self._enclave.configuration.limits.request_seconds):
                content = await self._read_content(opened)
            request = self._decode(content)
            self._enclave.identity.begin(opened.key, request.id)
        except TimeoutError:
            return StrongroomError("deadline_exceeded", "the request did not arrive in time")
        except Exception as error:  # a defect too is answered sealed, by whoever runs the answer
            return error
        return request

    async def _read_content(self, opened: _Opened) -> bytes:
        """The whole request: nothing of it is acted on before its final record."""
        limit = self._enclave.configuration.limits.request_bytes
        records, content = RecordOpener(opened.keys.request), bytearray()
        async with contextlib.aclosing(self._bounded(opened.body, longest_request(limit))) as chunks:
            async for chunk in chunks:
                content += records.feed(chunk)
                if len(content) > limit:
                    raise MessageError("the request is too large", param="request", expected=f"<= {limit}", got="more")
        records.finish()
        return bytes(content)

    async def _bounded(self, body: _Body, limit: int) -> AsyncGenerator[bytes]:
        """What arrives, up to ``limit`` bytes. Raises TimeoutError, MessageError, StrongroomError ``overloaded``."""
        received = 0
        async with contextlib.aclosing(self._arrivals.receive(body.rest())) as chunks:
            async for chunk in chunks:
                received += len(chunk)
                if received > limit:
                    raise MessageError("the request is too large", param="request", expected=f"<= {limit}", got="more")
                yield chunk

    def _decode(self, content: bytes) -> Request:
        messages = MessageReader(self._enclave.configuration.limits.request_bytes)
        decoded = list(messages.feed(content))
        if len(decoded) != 1 or messages.buffered:
            raise MessageError("a request is one message", param="request", expected=1, got=len(decoded))
        return Request.decode(decoded[0])

    async def _work(self, request: Request, answer: PacedAnswer) -> None:
        manifest, engine = self._enclave.model.manifest, self._enclave.engine
        match request.body:
            case DescribeRequest():
                context = self._enclave.configuration.engine.context
                await answer.write(Description(manifest.name, context, manifest.digest()).encode())
            case CountRequest(chat):
                self._require_model(chat.model)
                await answer.write(Counted(await engine.count(chat)).encode())
            case ChatRequest() | CompletionRequest() as generation:
                self._require_model(generation.model)
                await answer.write(Start(manifest.name).encode())
                async with contextlib.aclosing(engine.generate(generation)) as events:
                    async for event in events:
                        await answer.write(event.encode())

    def _require_model(self, name: str | None) -> None:
        served = self._enclave.model.manifest.name
        if name not in (None, served):
            message = "this enclave does not serve that model"
            raise StrongroomError("unknown_model", message, expected=served, got=name)

    # --- Events --------------------------------------------------------------------------------------------------

    async def events(self, call: IncomingCall) -> None:
        """Every recent event and then the new ones, one JSON text a line, until the caller has enough."""
        await call.reply({})
        async with contextlib.aclosing(self._log.follow()) as lines:
            async for line in lines:
                await call.send(line.encode() + b"\n")

    async def write_totals(self) -> None:
        """Closes an interval of totals for ever, once a fixed interval."""
        while True:
            await asyncio.sleep(TOTALS_INTERVAL_SECONDS)
            self._log.close_interval()

    def _count_defect(self) -> None:
        self._log.totals.defects += 1

    def _require_serving(self) -> None:
        if self._enclave.phase is not Phase.SERVING or self._enclave.engine.ended:
            raise Fault("unavailable", "the enclave is not serving")


_OTHERS_ENVELOPES = ("wrong_purpose", "wrong_key", "wrong_context", "rolled_back", "wrong_model", "wrong_configuration")
_REFUSED_BY_KMS = ("kms_denied", "kms_wrong_context", "kms_wrong_key", "kms_unusable_key")


def _fault_of(error: StrongroomError) -> str:
    """The clear fault for an envelope that was not opened."""
    if error.code in (*_OTHERS_ENVELOPES, *_REFUSED_BY_KMS):
        return "not_released"
    if error.code == "overloaded":
        return "overloaded"
    return "unavailable" if isinstance(error, KmsError | NsmError) else "malformed"


def longest_request(content: int) -> int:
    """Bytes of records of a request with so many bytes of content: their number is rounded up to a power of two
    (PROTOCOL.md section 6.2)."""
    needed = -(-content // (REQUEST_RECORD_SIZE - LENGTH_PREFIX_SIZE))
    return (1 << (needed - 1).bit_length()) * (HEADER_SIZE + REQUEST_RECORD_SIZE + TAG_SIZE)


def longest_envelope(message: int) -> int:
    """Bytes of the envelope of a prompt whose message has so many bytes, at most: the content is padded to a power of
    two of records (PROTOCOL.md section 6.5)."""
    content = LENGTH_SIZE + MAX_TERMS + SECRET_SIZE + LENGTH_SIZE + message
    return MAX_OPENING + (1 << (-(-content // PROMPT_RECORD) - 1).bit_length()) * (PROMPT_RECORD + TAG_SIZE)


@dataclass(frozen=True, slots=True)
class _Opened:
    """A sealed call whose secret is known, and the rest of its bytes."""

    key: OfferedKey
    keys: ExchangeKeys
    body: _Body


@dataclass(frozen=True, slots=True)
class _Received:
    """A request, or why there is none, and what its answer is sealed under."""

    keys: AnswerKeys
    request: Request | Exception


class _Body:
    """A call's incoming bytes, first so many of them, then the rest."""

    def __init__(self, call: IncomingCall) -> None:
        self._chunks = aiter(call)
        self._buffer = bytearray()

    async def exactly(self, size: int) -> bytes:
        """The next ``size`` bytes, or fewer when the body ends before."""
        while len(self._buffer) < size:
            try:
                self._buffer += await anext(self._chunks)
            except StopAsyncIteration:
                break
        piece = bytes(self._buffer[:size])
        del self._buffer[:size]
        return piece

    async def rest(self) -> AsyncIterator[bytes]:
        if self._buffer:
            yield bytes(self._buffer)
        async for chunk in self._chunks:
            yield bytes(chunk)
