"""The whole house in one process: store, enclave and proxy as they are, an engine without a model, and a place to stand
between them.

Nothing in it is faked but what the emulator fakes, and the engine: the enclave boots through its table, the proxy
serves on a real port, and between them are the real RPC and the real sealed channel.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeAlias

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from attestation.envelope import EnvelopePurpose
from attestation.manifest import ModelManifest
from attestation.policy import AppraisalPolicy
from attestation.rules import KeyRule
from enclave.boot import Enclave, KeyManagement
from enclave.config import EnclaveConfiguration, KmsSettings
from enclave.engine import Engine
from enclave.generation import GenerationEvent
from enclave.log import EventLog, Phase
from enclave.model import SealedModel
from enclave.nsm import Nsm
from enclave.server import Server
from parent.modelstore import ModelStore
from parent.proxy import Proxy
from strongroom.session import Session
from tests.attested import policy_for, software_nsm, write_policy
from tests.engines import EchoEngine, engine_settings
from tests.gguf_files import TEXT, Gguf
from vsockrpc.address import TcpAddress, UnixAddress
from vsockrpc.chat import ChatMessage, ChatRequest, CompletionRequest, GenerationRequest
from vsockrpc.http import SEALED_PATH
from vsockrpc.http_server import HttpServer, listen_on
from vsockrpc.messages import Delta, Done
from vsockrpc.transport import Limits, serve

MODEL_NAME = "tiny"
WEIGHTS = Gguf([("tokenizer.chat_template", TEXT, "{{ messages }}")]).encode()
SETTINGS = """\
[engine]
context = 256
[channel]
rotation_seconds = 300
lifetime_seconds = 600
[pacing]
tick_ms = 0
bucket_records = 4
"""


class HouseEngine(EchoEngine):
    """The echo, which remembers what it was asked, and waits before each step while ``gate`` says so."""

    def __init__(self) -> None:
        super().__init__(engine_settings(context=256), before_step=self._wait)
        self.requests: list[GenerationRequest] = []
        self.refuse: Exception | None = None
        self.say: str | None = None
        """What it answers with, instead of what it was asked."""
        self.script: Sequence[GenerationEvent] | None = None
        """What it answers, event by event: reasoning, calls, log probabilities."""
        self.gate: Callable[[], Awaitable[None]] | None = None
        self._going_on = asyncio.Event()
        self.idle = asyncio.Event()
        """Set when the last request in work has ended, however."""

    async def _wait(self) -> None:
        if self.gate is not None:
            await self.gate()

    async def generate(self, request: GenerationRequest) -> AsyncGenerator[GenerationEvent, None]:
        self.requests.append(request)
        if self.refuse is not None:
            raise self.refuse
        if self.script is not None:
            for event in self.script:
                yield event
            return
        if self.say is not None:
            request = _saying(request, self.say)
        self.idle.clear()
        try:
            async with contextlib.aclosing(super().generate(request)) as events:
                async for event in events:
                    yield event
        finally:
            if not self.in_work:
                self.idle.set()

    def hold_after(self, steps: int) -> asyncio.Event:
        """Stops all work after so many more steps, until :meth:`go_on`; the event says that it has come to that."""
        held, limit = asyncio.Event(), self.steps + steps
        self._going_on = asyncio.Event()

        async def hold() -> None:
            if self.steps >= limit:
                held.set()
                await self._going_on.wait()

        self.gate = hold
        return held

    def go_on(self) -> None:
        self.gate = None
        self._going_on.set()


@dataclass
class EnclaveHouse:
    """An enclave and its model's store, on Unix sockets in a folder. Stopped and started anew, it is another boot."""

    directory: Path
    settings: str = SETTINGS
    weights: bytes = WEIGHTS
    make_nsm: Callable[[], Nsm] = software_nsm
    make_kms: Callable[[KmsSettings, Nsm], KeyManagement] | None = None
    make_engine: Callable[[EnclaveConfiguration, SealedModel], Engine] | None = None
    """In place of the echo."""
    key_rules: Mapping[EnvelopePurpose, KeyRule] = field(default_factory=dict)
    """What the house's policy says of its KMS keys."""
    enclave: Enclave = field(init=False)
    engine: HouseEngine = field(init=False)
    server: Server = field(init=False)
    _running: contextlib.AsyncExitStack = field(default_factory=contextlib.AsyncExitStack, init=False)

    def __post_init__(self) -> None:
        self.model = self.directory / f"{MODEL_NAME}.gguf"
        self.model.write_bytes(self.weights)
        self.manifest = ModelManifest.from_gguf(self.model)
        self._store = ModelStore(self.manifest, self.model)
        self._store_address = UnixAddress(str(self.directory / "models.sock"))
        self.address = UnixAddress(str(self.directory / "rpc.sock"))
        self.configuration = EnclaveConfiguration.parse(
            f"""\
version = 1
[rpc]
listen = "{self.address}"
[nsm]
address = "unix:nsm.sock"
entropy = "host"
[model]
store = "{self._store_address}"
manifest = "sha384:{self.manifest.digest().hex()}"
{self.settings}""".encode()
        )

    @property
    def policy(self) -> AppraisalPolicy:
        return replace(policy_for(self.manifest.digest(), self.configuration.digest), kms=self.key_rules)

    def write_policy(self) -> Path:
        return write_policy(self.policy, self.directory)

    def encrypt_store(self, envelope: bytes) -> None:
        """From now on the store has the model in this, and no longer in plain."""
        sealed = self.directory / f"{MODEL_NAME}.sealed"
        sealed.write_bytes(envelope)
        self.model.unlink(missing_ok=True)
        self._store = ModelStore(self.manifest, sealed, encrypted=True)

    async def start(self) -> None:
        await self._boot()
        assert self.enclave.phase is Phase.SERVING, list(self.enclave.log._recent)
        async with contextlib.AsyncExitStack() as stack:
            stack.push_async_callback(self.enclave.close)
            self.server = Server(self.enclave)
            stack.callback(self.server.close)
            limits = Limits(drain=0.1)
            self._rpc = await stack.enter_async_context(
                serve(self.address, self.server.handlers, on_error=_fail, limits=limits)
            )
            self._running = stack.pop_all()

    async def halt(self) -> dict[str, Any]:
        """Boots to HALTED, and returns the event that says why."""
        await self._boot()
        try:
            assert self.enclave.phase is Phase.HALTED
        finally:
            await self.enclave.close()
        event: dict[str, Any] = json.loads(self.enclave.log._recent[-1])
        assert event["event"] == "halted"
        return event

    async def _boot(self) -> None:
        self.engine = HouseEngine()

        def make(configuration: EnclaveConfiguration, model: SealedModel, _: EventLog) -> Engine:
            return self.engine if self.make_engine is None else self.make_engine(configuration, model)

        self.enclave = Enclave(self.configuration, self.make_nsm(), make, EventLog(), make_kms=self.make_kms)
        async with serve(self._store_address, self._store.handlers, on_error=_fail, limits=Limits(drain=0.1)):
            await self.enclave.boot()

    async def stop(self) -> None:
        await self._running.aclose()

    def kill(self) -> None:
        """What a dead enclave is to the proxy: every connection ends in the middle of whatever it carries."""
        for peer in list(self._rpc._peers):
            peer.link.lose("killed")

    async def restart(self) -> None:
        await self.stop()
        await self.start()


def _saying(request: GenerationRequest, text: str) -> GenerationRequest:
    """The same request, with this in place of what is echoed."""
    if isinstance(request, CompletionRequest):
        return replace(request, prompt=text)
    return replace(request, messages=(ChatMessage("user", text),))


def _fail(error: BaseException) -> None:
    raise error


@contextlib.asynccontextmanager
async def enclave_house(directory: Path, settings: str = SETTINGS, **options: Any) -> AsyncIterator[EnclaveHouse]:
    house = EnclaveHouse(directory, settings, **options)
    await house.start()
    try:
        yield house
    finally:
        await house.stop()


@contextlib.asynccontextmanager
async def served(application: ASGIApp) -> AsyncIterator[str]:
    """The application on a free port of this machine; yields its URL."""
    listener = listen_on(TcpAddress("127.0.0.1", 0))
    port = listener.getsockname()[1]
    async with HttpServer(application).serving(listener):
        yield f"http://127.0.0.1:{port}"


Forged: TypeAlias = tuple[int, str, bytes]
"""Status, content type and body of an answer that is not the proxy's."""


class Broken(Exception):
    """Ends a conveyed answer in its middle, without an end."""


@dataclass
class Hostile:
    """A man in the middle, around the real proxy. It keeps all that it sees; what else it does is up to the test."""

    application: ASGIApp
    on_request: Callable[[str, int], Forged | None] = lambda path, count: None
    """Gets the path and how often it was asked for by now; may answer in the proxy's place, which hears nothing."""
    on_answer: Callable[[str, bytes], bytes] | None = None
    """Gets the path and an answer's whole body, and says what the client gets."""
    forge_after: Forged | None = None
    """The client gets this, once, for a sealed answer that the enclave has begun."""
    break_after: int | None = None
    """Sealed answers break off after so many bytes."""
    requests: list[tuple[str, str, bytearray]] = field(default_factory=list)
    """Method, path and body."""
    answers: list[tuple[str, bytearray]] = field(default_factory=list)
    """Path and body, as the proxy sent it."""

    def paths(self) -> list[str]:
        return [path for _, path, _ in self.requests]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.application(scope, receive, send)
            return
        path, asked, said = scope["path"], bytearray(), bytearray()
        self.requests.append((scope["method"], path, asked))

        async def seeing() -> Message:
            message = await receive()
            asked.extend(message.get("body", b""))
            return message

        async def kept(message: Message) -> None:
            said.extend(message.get("body", b""))
            await way(message)

        forged = self.on_request(path, self.paths().count(path))
        if forged is not None:
            while (await seeing()).get("more_body"):
                pass
            await _forge(send, forged)
            return
        self.answers.append((path, said))
        way = self._way(path, send)
        with contextlib.suppress(Broken):
            await self.application(scope, seeing, kept)

    def _way(self, path: str, send: Send) -> Send:
        """By which an answer leaves."""
        if self.on_answer is not None:
            return _altering(send, lambda body: self.on_answer(path, body))  # type: ignore[misc]
        if self.forge_after is not None and path == SEALED_PATH:
            forged, self.forge_after = self.forge_after, None
            return _forging(send, forged)
        if self.break_after is not None and path == SEALED_PATH:
            return _breaking(send, self.break_after)
        return send


def _altering(send: Send, alter: Callable[[bytes], bytes]) -> Send:
    head: list[Message] = []
    body = bytearray()

    async def altering(message: Message) -> None:
        if message["type"] == "http.response.start":
            head.append({**message, "headers": [each for each in message["headers"] if each[0] != b"content-length"]})
            return
        body.extend(message.get("body", b""))
        if not message.get("more_body"):
            await send(head[0])
            await send({"type": "http.response.body", "body": alter(bytes(body))})

    return altering


def _forging(send: Send, forged: Forged) -> Send:
    async def forging(message: Message) -> None:
        if message.get("body"):
            await _forge(send, forged)
            raise Broken

    return forging


def _breaking(send: Send, left: int) -> Send:
    async def breaking(message: Message) -> None:
        nonlocal left
        if message["type"] == "http.response.start":
            await send(message)
            return
        piece = message.get("body", b"")[:left]
        left -= len(piece)
        await send({"type": "http.response.body", "body": piece, "more_body": True})
        if not left:
            raise Broken

    return breaking


async def _forge(send: Send, forged: Forged) -> None:
    status, kind, body = forged
    await send({"type": "http.response.start", "status": status, "headers": [(b"content-type", kind.encode())]})
    await send({"type": "http.response.body", "body": body})


@dataclass
class House:
    """Enclave, proxy and whoever stands before it. ``url`` is what a client is told."""

    behind: EnclaveHouse
    proxy: Proxy
    hostile: Hostile
    url: str

    @property
    def engine(self) -> HouseEngine:
        return self.behind.engine

    @property
    def policy(self) -> AppraisalPolicy:
        return self.behind.policy

    @contextlib.asynccontextmanager
    async def session(self) -> AsyncIterator[Session]:
        async with Session(self.url, self.policy) as session:
            yield session


@contextlib.asynccontextmanager
async def house(directory: Path, settings: str = SETTINGS, **options: Any) -> AsyncIterator[House]:
    async with enclave_house(directory, settings, **options) as behind:
        proxy = Proxy(behind.address)
        hostile = Hostile(proxy.application())
        async with served(hostile) as url:
            yield House(behind, proxy, hostile, url)


# --- What a client does ------------------------------------------------------------------------------------------


def prompt(text: str) -> ChatRequest:
    return ChatRequest((ChatMessage("user", text),), temperature=0.0)


async def ask(session: Session, text: str) -> tuple[str, Done]:
    """The answer's text and its end."""
    pieces, done = [], None
    async for answer in session.chat(prompt(text)):
        match answer:
            case Delta(piece):
                pieces.append(piece)
            case Done():
                done = answer
    assert done is not None
    return "".join(pieces), done
