"""What the enclave answers, as a client meets it: over the real RPC, through the real sealed channel, after a real
boot. Only the engine echoes."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import json
import re
import secrets
import threading
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import cbor2
import pytest

from attestation.envelope import MAX_TERMS, EnvelopeHeader, encryption_context
from attestation.secret import Secret
from attestation.verifier import AttestationResult, verify
from enclave.boot import Enclave
from enclave.config import KmsSettings
from enclave.generation import EngineFailed, Overloaded
from enclave.identity import MAX_KEYS, Identity, OfferedKey
from enclave.kms.errors import KMS_CODES, KmsError
from enclave.kms.release import AT_KMS, WAITING
from enclave.log import EventLog, Phase, Totals
from enclave.nsm import Nsm, NsmError, NsmErrorCode, NsmUnavailable, Transport
from enclave.pacing import PacedAnswer
from enclave.server import EVIDENCE_QUEUE, BoundedWorker, Server, longest_envelope, longest_request
from strongroom.prompt_file import Reply, open_answer
from strongroom.session import RequestFailed
from tests.attested import Attested, software_nsm
from tests.engines import EchoEngine, last_said
from tests.house import EnclaveHouse, enclave_house
from tests.sealing import (
    FLOOR,
    MODEL,
    OTHER_KEY,
    PROMPT,
    PROMPTS_KEY,
    LocalKms,
    Sealing,
    kms_toml,
    question,
    split_records,
)
from vsockrpc.address import UnixAddress
from vsockrpc.chat import ChatMessage, ChatRequest, CompletionRequest
from vsockrpc.messages import (
    Answer,
    Counted,
    CountRequest,
    Delta,
    DescribeRequest,
    Description,
    Done,
    Failure,
    MessageReader,
    Request,
    Start,
    Usage,
    decode_answer,
    encode_message,
)
from vsockrpc.sealed import (
    ANSWER_SALT_SIZE,
    HEADER_SIZE,
    OPENING_SIZE,
    REQUEST_RECORD_SIZE,
    TAG_SIZE,
    ExchangeKeys,
    RecordSealer,
    SealedError,
    SealedRequest,
    seal_request,
)
from vsockrpc.transport import Call, Client, Fault, connect, serve

SETTINGS = """\
[engine]
context = 256
[pacing]
tick_ms = 0
record_bytes = 128
bucket_records = 4
"""
REQUEST_RECORD = HEADER_SIZE + REQUEST_RECORD_SIZE + TAG_SIZE
ANSWER_RECORD = HEADER_SIZE + 128 + TAG_SIZE


def chat(text: str = "hello", **options: Any) -> Request:
    return Request(secrets.token_bytes(16), ChatRequest((ChatMessage("user", text),), **options))


def describe() -> Request:
    return Request(secrets.token_bytes(16), DescribeRequest())


@dataclass
class Person:
    """A client with its own connection to one enclave."""

    house: EnclaveHouse
    rpc: Client
    last_answer: bytes = field(default=b"", init=False)
    """The last sealed answer, as the parent saw it."""

    async def evidence(self, nonce: bytes) -> bytes:
        async with self.rpc.call("evidence", {"nonce": nonce}) as call:
            await call.send(b"", end=True)
            return await call.read(1 << 20)

    async def verified(self) -> AttestationResult:
        nonce = secrets.token_bytes(32)
        return verify(await self.evidence(nonce), policy=self.house.policy, nonce=nonce, at=datetime.now(UTC))

    async def sealed(self, request: Request) -> SealedRequest:
        return seal_request(await self.verified(), request.encode())

    async def send(self, sealed: SealedRequest, body: bytes | None = None, **meta: Any) -> list[Answer]:
        """The answers to a sealed request, whose body the way may have changed. Raises Fault."""
        async with self.rpc.call("sealed", meta or {"key_id": sealed.key_id}) as call:
            await call.send(sealed.body if body is None else body, end=True)
            return await self.read(call, sealed)

    async def read(self, call: Call, sealed: SealedRequest) -> list[Answer]:
        self.last_answer = await call.read(1 << 24)
        content = sealed.answer.feed(self.last_answer)
        sealed.answer.finish()
        return [decode_answer(message) for message in MessageReader().feed(content)]

    async def ask(self, request: Request) -> list[Answer]:
        return await self.send(await self.sealed(request))

    async def refusal(self, sealed: SealedRequest, body: bytes | None = None, **meta: Any) -> str:
        """The code of a sealed error. A clear fault is raised."""
        [failure] = await self.send(sealed, body, **meta)
        assert isinstance(failure, Failure)
        return failure.code

    @property
    def totals(self) -> Totals:
        return self.house.enclave.log.totals


@contextlib.asynccontextmanager
async def person(directory: Path, settings: str = SETTINGS, **options: Any) -> AsyncIterator[Person]:
    async with enclave_house(directory, settings, **options) as house, connect(house.address) as rpc:
        yield Person(house, rpc)


@pytest.fixture
async def client(tmp_path: Path) -> AsyncIterator[Person]:
    async with person(tmp_path) as opened:
        yield opened


@contextlib.contextmanager
def clear_fault(code: str) -> Any:
    with pytest.raises(Fault) as caught:
        yield
    assert caught.value.code == code


async def events(house: EnclaveHouse) -> list[dict[str, Any]]:
    house.enclave.log.close()
    return [json.loads(line) async for line in house.enclave.log.follow()]


# --- Evidence -----------------------------------------------------------------------------------------------------


async def test_evidence_is_of_this_enclave_and_this_nonce(client: Person) -> None:
    nonce = secrets.token_bytes(32)
    evidence = await client.evidence(nonce)
    result = verify(evidence, policy=client.house.policy, nonce=nonce, at=datetime.now(UTC))
    assert result.commitment == client.house.enclave.identity.current().commitment
    assert client.totals.evidence == 1


@pytest.mark.parametrize(
    "meta",
    [
        {},
        {"nonce": b""},
        {"nonce": bytes(31)},
        {"nonce": bytes(33)},
        {"nonce": "0" * 32},
        {"nonce": None},
        {"nonce": bytes(32), "user_data": bytes(48)},
        {"nonce": bytes(32), "public_key": b"k"},
        {"user_data": bytes(48)},
    ],
)
async def test_a_caller_supplies_a_nonce_and_nothing_else(client: Person, meta: dict[str, Any]) -> None:
    """An enclave that attests whatever it is asked to attests its parent's key."""
    with clear_fault("malformed"):
        async with client.rpc.call("evidence", meta) as call:
            await call.read(1 << 20)
    assert client.totals.evidence == 0


class Unwell(Transport):
    """An NSM that does something else."""

    def __init__(self, instead: Callable[[], bytes]) -> None:
        self._instead = instead

    def exchange(self, request: bytes) -> bytes:
        return self._instead()

    def close(self) -> None:
        pass


def gone() -> bytes:
    raise NsmUnavailable("no NSM at unix:/somewhere")


@pytest.mark.parametrize(
    ("instead", "code"),
    [
        (gone, "nsm_unavailable"),
        (lambda: cbor2.dumps({"Error": "InternalError"}), "InternalError"),
        (lambda: b"\xff", "InternalError"),
        (lambda: cbor2.dumps({"GetRandom": {"random": b"x"}}), "InvalidResponse"),
    ],
)
async def test_an_nsm_that_gives_no_document(client: Person, instead: Callable[[], bytes], code: str) -> None:
    client.house.enclave.nsm = Nsm(Unwell(instead))
    with clear_fault("unavailable"):
        await client.evidence(bytes(32))
    [event] = [event for event in await events(client.house) if event["event"] == "nsm_failed"]
    assert event["code"] == code
    assert event.keys() == {"event", "at", "code"}


async def test_more_evidence_than_the_nsm_makes_is_refused_and_the_rest_is_served(client: Person) -> None:
    released = threading.Event()
    nsm = client.house.enclave.nsm

    class Slow(Transport):
        def exchange(self, request: bytes) -> bytes:
            released.wait()
            return nsm.transport.exchange(request)

        def close(self) -> None:
            pass

    client.house.enclave.nsm = Nsm(Slow())
    asked = [asyncio.ensure_future(client.evidence(bytes(32))) for _ in range(EVIDENCE_QUEUE + 3)]
    try:
        done, _ = await asyncio.wait(asked, return_when=asyncio.FIRST_COMPLETED)
        assert all(isinstance(each.exception(), Fault) for each in done)
    finally:
        released.set()
    answers = await asyncio.gather(*asked, return_exceptions=True)
    faults = [answer.code for answer in answers if isinstance(answer, Fault)]
    assert faults == ["overloaded"] * 3
    assert len([answer for answer in answers if isinstance(answer, bytes)]) == EVIDENCE_QUEUE


async def test_no_evidence_while_too_many_keys_are_used_up(tmp_path: Path) -> None:
    async with person(tmp_path, SETTINGS + "[channel]\nmax_requests = 1\n") as client:
        for _ in range(MAX_KEYS):
            await client.ask(describe())
        with clear_fault("overloaded"):
            await client.evidence(bytes(32))


async def test_work_that_nobody_waits_for_keeps_its_place_until_it_is_done() -> None:
    """Else whoever asks and leaves, again and again, queues more than the bound."""
    worker, release = BoundedWorker("test", 2), threading.Event()
    for _ in range(2):
        leaving = asyncio.ensure_future(worker.run(release.wait))
        await asyncio.sleep(0)
        leaving.cancel()
        with pytest.raises(asyncio.CancelledError):
            await leaving
    with clear_fault("overloaded"):
        await worker.run(release.wait)
    release.set()
    while True:
        try:
            assert await worker.run(lambda: "free again") == "free again"
            break
        except Fault:
            await asyncio.sleep(0.001)
    worker.close()


async def test_a_workers_failure_is_the_callers() -> None:
    worker = BoundedWorker("test", 1)
    for _ in range(3):
        with pytest.raises(ZeroDivisionError):
            await worker.run(lambda: 1 // 0)
    worker.close()


# --- Before it serves ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("phase", [phase for phase in Phase if phase is not Phase.SERVING])
async def test_before_serving_there_are_events_and_nothing_else(tmp_path: Path, phase: Phase) -> None:
    house = EnclaveHouse(tmp_path, SETTINGS)
    enclave = Enclave(house.configuration, software_nsm(), lambda *_: pytest.fail("no engine"), EventLog())
    enclave.phase = phase
    server = Server(enclave)
    address = UnixAddress(str(tmp_path / "early.sock"))
    async with serve(address, server.handlers, on_error=print), connect(address) as rpc:
        asked: dict[str, dict[str, Any]] = {"evidence": {"nonce": bytes(32)}, "sealed": {"key_id": bytes(16)}}
        for method, meta in (asked | {"envelope": {}}).items():
            with clear_fault("unavailable"):
                async with rpc.call(method, meta) as call:
                    await call.send(bytes(OPENING_SIZE), end=True)
                    await call.read(1 << 20)
        async with rpc.call("events", {}) as call:
            await call.reply()
    assert enclave.log.totals == Totals()
    server.close()


# --- The way through ----------------------------------------------------------------------------------------------


async def test_a_prompt_comes_back_as_an_answer(client: Person) -> None:
    answers = await client.ask(chat("what is said comes back", model="tiny"))
    assert answers[0] == Start("tiny")
    assert "".join(answer.content for answer in answers if isinstance(answer, Delta)) == "what is said comes back"
    assert isinstance(answers[-1], Done)
    assert answers[-1].finish_reason == "stop"
    [asked] = client.house.engine.requests
    assert asked == ChatRequest((ChatMessage("user", "what is said comes back"),), model="tiny")
    assert dataclasses.asdict(client.totals) | {"evidence": 1} == dataclasses.asdict(
        Totals(evidence=1, requests=1, answered=1)
    )


async def test_text_goes_on_without_a_conversation(client: Person) -> None:
    body = CompletionRequest(prompt="what is begun goes on", model="tiny", stop=("s on",), cache_secret=bytes(32))
    answers = await client.ask(Request(secrets.token_bytes(16), body))
    assert answers[0] == Start("tiny")
    assert "".join(answer.content for answer in answers if isinstance(answer, Delta)) == "what is begun goe"
    assert isinstance(answers[-1], Done)
    assert client.house.engine.requests == [body]


async def test_a_prompt_is_counted_and_not_answered(client: Person) -> None:
    conversation = ChatRequest((ChatMessage("user", "how many?"),), model="tiny")
    assert await client.ask(Request(secrets.token_bytes(16), CountRequest(conversation))) == [
        Counted(len("user:how many?\n"))
    ]
    assert client.house.engine.requests == []
    assert client.totals.answered == 1


async def test_a_prompt_too_long_for_the_context_is_not_counted(client: Person) -> None:
    conversation = ChatRequest((ChatMessage("user", "x" * 300),))
    [failure] = await client.ask(Request(secrets.token_bytes(16), CountRequest(conversation)))
    assert isinstance(failure, Failure)
    assert (failure.code, failure.expected) == ("context_exceeded", "255")


@pytest.mark.parametrize(
    "body",
    [
        ChatRequest((ChatMessage("user", "x"),), model="other"),
        CompletionRequest(prompt="x", model="other"),
        CountRequest(ChatRequest((ChatMessage("user", "x"),), model="other")),
    ],
)
async def test_no_other_model_is_asked(client: Person, body: ChatRequest | CompletionRequest | CountRequest) -> None:
    [failure] = await client.ask(Request(secrets.token_bytes(16), body))
    assert isinstance(failure, Failure)
    assert (failure.code, failure.expected, failure.got) == ("unknown_model", "tiny", "other")
    assert client.house.engine.requests == []


async def test_whoever_finds_the_queue_full_is_told_when_to_come_again(client: Person) -> None:
    client.house.engine.refuse = Overloaded(expected="<= 2 at once", got=3, retry_seconds=8)
    failure = (await client.ask(chat("x")))[-1]
    assert isinstance(failure, Failure)
    assert (failure.code, failure.retry_seconds) == ("overloaded", 8)


async def test_every_parameter_reaches_the_engine(client: Person) -> None:
    parameters = {"max_tokens": 5, "temperature": 0.5, "top_p": 0.25, "top_k": 7, "min_p": 0.125, "seed": 9}
    await client.ask(chat("hello", stop=("x", "y"), **parameters))
    [asked] = client.house.engine.requests
    assert {name: getattr(asked, name) for name in parameters} == parameters
    assert asked.stop == ("x", "y")


async def test_an_enclave_describes_what_it_serves(client: Person) -> None:
    assert await client.ask(describe()) == [Description("tiny", 256, client.house.manifest.digest())]
    assert client.house.engine.requests == []


@pytest.mark.parametrize("text", ["", "x", "many words " * 20])
async def test_an_answer_shows_records_of_one_size_and_a_bucket_of_them(client: Person, text: str) -> None:
    await client.ask(chat(text, model=None))
    assert (len(client.last_answer) - ANSWER_SALT_SIZE) % (4 * ANSWER_RECORD) == 0


async def test_many_at_once_get_each_their_own(client: Person) -> None:
    result = await client.verified()
    texts = [f"person {number}" for number in range(20)]
    sealed = [seal_request(result, chat(text).encode()) for text in texts]
    answers = await asyncio.gather(*(client.send(each) for each in sealed))
    heard = ["".join(piece.content for piece in answer if isinstance(piece, Delta)) for answer in answers]
    assert heard == texts


async def test_a_request_may_come_in_any_pieces(client: Person) -> None:
    sealed = await client.sealed(chat("in pieces"))
    async with client.rpc.call("sealed", {"key_id": sealed.key_id}) as call:
        for start in range(0, len(sealed.body), 97):
            await call.send(sealed.body[start : start + 97])
        await call.send(b"", end=True)
        assert isinstance((await client.read(call, sealed))[-1], Done)


async def test_nothing_is_done_before_the_final_record(client: Person) -> None:
    sealed = await client.sealed(chat("long " * 2000))
    assert len(sealed.body) > OPENING_SIZE + 2 * REQUEST_RECORD
    async with client.rpc.call("sealed", {"key_id": sealed.key_id}) as call:
        await call.send(sealed.body[:-1])
        await client.verified()  # by then the enclave has read what came before
        assert client.house.engine.requests == []
        await call.send(sealed.body[-1:], end=True)
        assert isinstance((await client.read(call, sealed))[-1], Failure)  # longer than the context
    assert len(client.house.engine.requests) == 1


# --- Clear faults: before the secret is opened --------------------------------------------------------------------


async def test_a_key_that_is_not_this_enclaves(client: Person) -> None:
    sealed = await client.sealed(chat())
    for key_id in (bytes(16), b"", bytes(100)):
        with clear_fault("unknown_key"):
            await client.send(sealed, key_id=key_id)
    assert client.totals.refused == 3


async def test_a_key_that_has_seen_all_it_may(tmp_path: Path) -> None:
    async with person(tmp_path, SETTINGS + "[channel]\nmax_requests = 2\n") as client:
        result = await client.verified()
        for _ in range(2):
            assert isinstance((await client.send(seal_request(result, chat().encode())))[-1], Done)
        with clear_fault("unknown_key"):
            await client.send(seal_request(result, chat().encode()))
        assert isinstance((await client.ask(chat()))[-1], Done)


@pytest.mark.parametrize("finds", [1, 2])
async def test_a_key_that_expires_while_a_request_arrives(
    client: Person, monkeypatch: pytest.MonkeyPatch, finds: int
) -> None:
    """Before its opening is there, or between that and its end."""
    sealed = await client.sealed(chat())
    identity, find, left = client.house.enclave.identity, Identity.find, finds

    def find_and_expire(self: Identity, key_id: bytes) -> OfferedKey | None:
        nonlocal left
        key, left = find(self, key_id), left - 1
        if left == 0:
            identity.clock = lambda: 1e12
        return key

    monkeypatch.setattr(Identity, "find", find_and_expire)
    if finds == 1:
        with clear_fault("unknown_key"):
            await client.send(sealed)
    else:
        assert await client.refusal(sealed) == "key_expired"
    assert client.house.engine.requests == []


async def test_a_key_of_the_boot_before(client: Person) -> None:
    sealed = await client.sealed(chat())
    await client.house.restart()
    async with connect(client.house.address) as rpc:
        with clear_fault("unknown_key"):
            await Person(client.house, rpc).send(sealed)


@pytest.mark.parametrize("meta", [{"other": 1}, {"key_id": "0" * 16}, {"key_id": None}, {"key_id": bytes(16), "x": 1}])
async def test_a_call_that_does_not_name_its_key(client: Person, meta: dict[str, Any]) -> None:
    with clear_fault("malformed"):
        await client.send(await client.sealed(chat()), **meta)


@pytest.mark.parametrize("size", [0, 1, OPENING_SIZE - 1])
async def test_an_opening_that_is_cut_short(client: Person, size: int) -> None:
    sealed = await client.sealed(chat())
    with clear_fault("malformed"):
        await client.send(sealed, sealed.body[:size])


@pytest.mark.parametrize("version", [0, 2, 255])
async def test_an_opening_of_another_version(client: Person, version: int) -> None:
    sealed = await client.sealed(chat())
    with clear_fault("malformed"):
        await client.send(sealed, bytes([version]) + sealed.body[1:])


@pytest.mark.parametrize("position", [1, 600, OPENING_SIZE - 1])
async def test_an_opening_that_was_changed(client: Person, position: int) -> None:
    sealed = await client.sealed(chat())
    body = bytearray(sealed.body)
    body[position] ^= 1
    with clear_fault("malformed"):
        await client.send(sealed, bytes(body))
    assert client.totals == Totals(evidence=1, requests=1, refused=1)
    assert client.house.engine.requests == []


async def test_an_opening_for_another_enclave_under_this_ones_key(client: Person) -> None:
    other = seal_request(Attested().result(), chat().encode())
    sealed = await client.sealed(chat())
    with clear_fault("malformed"):
        await client.send(other, key_id=sealed.key_id)


# --- Sealed errors: the request is not what it was when it left ---------------------------------------------------


def records_of(sealed: SealedRequest) -> tuple[bytes, list[bytes]]:
    opening, records = sealed.body[:OPENING_SIZE], sealed.body[OPENING_SIZE:]
    return opening, [records[start : start + REQUEST_RECORD] for start in range(0, len(records), REQUEST_RECORD)]


def flipped(record: bytes) -> bytes:
    return record[:-1] + bytes([record[-1] ^ 1])


HARM: dict[str, tuple[Callable[[list[bytes]], Sequence[bytes]], str]] = {
    "no record": (lambda records: [], "truncated"),
    "without the last record": (lambda records: records[:-1], "truncated"),
    "cut inside a record": (lambda records: [*records[:-1], records[-1][:-1]], "truncated"),
    "a byte changed": (lambda records: [flipped(records[0]), *records[1:]], "tampered_record"),
    "the last one changed": (lambda records: [*records[:-1], flipped(records[-1])], "tampered_record"),
    "in another order": (lambda records: [records[1], records[0], *records[2:]], "tampered_record"),
    "one left out": (lambda records: records[1:], "tampered_record"),
    "one twice": (lambda records: [records[0], *records], "tampered_record"),
    "bytes behind it": (lambda records: [*records, b"\x00"], "after_final"),
    "the end moved": (lambda records: [b"\x01" + records[0][1:]], "tampered_record"),
    "an unknown flag": (lambda records: [b"\x02" + records[0][1:]], "malformed_record"),
    "a length out of bounds": (lambda records: [b"\x00\xff\xff\xff"], "malformed_record"),
}


@pytest.mark.parametrize("harm", HARM)
async def test_a_request_harmed_on_its_way_is_refused_sealed_and_never_asked(client: Person, harm: str) -> None:
    change, code = HARM[harm]
    sealed = await client.sealed(chat("long " * 2000))
    opening, records = records_of(sealed)
    assert len(records) == 4
    assert await client.refusal(sealed, opening + b"".join(change(records))) == code
    assert client.house.engine.requests == []
    assert client.totals == Totals(evidence=1, requests=1, failed=1)


async def test_records_of_another_request_do_not_open(client: Person) -> None:
    first, second = await client.sealed(chat("first")), await client.sealed(chat("second"))
    body = first.body[:OPENING_SIZE] + second.body[OPENING_SIZE:]
    assert await client.refusal(first, body) == "tampered_record"


async def test_a_replay_is_refused_and_the_engine_is_not_asked(client: Person) -> None:
    sealed = await client.sealed(chat("once"))
    assert isinstance((await client.send(sealed))[-1], Done)
    first = client.last_answer
    again = replace(sealed, answer=type(sealed.answer)(sealed.answer._keys))
    assert await client.refusal(again) == "replayed"
    assert len(client.house.engine.requests) == 1
    assert client.last_answer[:ANSWER_SALT_SIZE] != first[:ANSWER_SALT_SIZE]
    assert client.totals == Totals(evidence=1, requests=2, answered=1, failed=1)


async def test_a_replayed_secret_is_refused_whatever_follows_it(client: Person) -> None:
    """The tag goes in before any other work: a first attempt that never arrived whole uses its secret up too."""
    sealed = await client.sealed(chat())
    assert await client.refusal(sealed, sealed.body[:OPENING_SIZE]) == "truncated"
    again = replace(sealed, answer=type(sealed.answer)(sealed.answer._keys))
    assert await client.refusal(again) == "replayed"
    assert client.house.engine.requests == []


async def test_two_copies_at_once_are_one_request_and_one_replay(client: Person) -> None:
    sealed = await client.sealed(chat())
    copies = [replace(sealed, answer=type(sealed.answer)(sealed.answer._keys)) for _ in range(4)]
    ends = [(answers)[-1] for answers in await asyncio.gather(*(client.send(copy) for copy in copies))]
    assert [isinstance(end, Done) for end in ends].count(True) == 1
    assert [end.code for end in ends if isinstance(end, Failure)] == ["replayed"] * 3
    assert len(client.house.engine.requests) == 1


async def test_a_request_id_is_begun_once(client: Person) -> None:
    """A second attempt under a fresh secret, after a forged clear fault."""
    request = chat("once")
    assert isinstance((await client.ask(request))[-1], Done)
    [failure] = await client.ask(request)
    assert isinstance(failure, Failure)
    assert failure.code == "duplicate_request"
    assert len(client.house.engine.requests) == 1


# --- Sealed errors: the request itself ----------------------------------------------------------------------------


def message(**changes: Any) -> bytes:
    whole = {"v": 1, "id": bytes(16), "method": "chat", "body": {"messages": [{"role": "user", "content": "x"}]}}
    return encode_message({name: value for name, value in (whole | changes).items() if value is not None})


BAD: dict[str, bytes] = {
    "nothing": b"",
    "a length alone": b"\x00\x00\x00\x01",
    "less than it says": encode_message({"v": 1})[:-1],
    "more than a message may have": b"\xff\xff\xff\xff",
    "two messages": message() + message(id=bytes(15) + b"\x01"),
    "bytes behind it": message() + b"\x00",
    "bytes inside it, behind its map": (len(message()) - 3).to_bytes(4, "big") + message()[4:] + b"\x00",
    "no CBOR": b"\x00\x00\x00\x01\xff",
    "an array": b"\x00\x00\x00\x01\x80",
    "no id": message(id=None),
    "a short id": message(id=bytes(15)),
    "another version": message(v=2),
    "an unknown method": message(method="load"),
    "an unknown field": message(debug=True),
    "an unknown field of any length": message(**{"x" * 100_000: 1}),
    "no messages": message(body={"messages": []}),
    "an unknown role": message(body={"messages": [{"role": "tool", "content": "x"}]}),
    "a role of any length": message(body={"messages": [{"role": "r" * 100_000, "content": "x"}]}),
    "a number of any length": message(v=1 << 100_000),
    "an unbounded temperature": message(body={"messages": [{"role": "user", "content": "x"}], "temperature": 1e9}),
    "a date": message(v=cbor2.CBORTag(1, 0)),
    "a regular expression": message(v=cbor2.CBORTag(35, "(a+)+$")),
    "a value that holds itself": b"\x00\x00\x00\x07\xa1\x61v\xd8\x1c\x81\xd8\x1d\x00",
    "an answer": Done("stop", Usage(1, 1)).encode(),
}


@pytest.mark.parametrize("content", BAD.values(), ids=BAD)
async def test_a_request_that_is_none_is_refused_sealed(client: Person, content: bytes) -> None:
    assert await client.refusal(seal_request(await client.verified(), content)) == "invalid_request"
    assert client.house.engine.requests == []
    assert client.totals.failed == 1


async def test_a_request_larger_than_configured(tmp_path: Path) -> None:
    async with person(tmp_path, SETTINGS + "[limits]\nrequest_bytes = 20000\n") as client:
        overhead = len(chat("").encode()) + 2
        fits = await client.ask(chat("x" * (20_000 - overhead)))
        assert isinstance(fits[-1], Failure)
        assert fits[-1].code == "context_exceeded"
        [failure] = await client.ask(chat("x" * (20_001 - overhead)))
        assert isinstance(failure, Failure)
        assert (failure.code, failure.expected) == ("invalid_request", "<= 20000")
        [failure] = await client.send(seal_request(await client.verified(), bytes(4 << 20)))
        assert isinstance(failure, Failure)
        assert failure.code == "invalid_request"
        assert len(client.house.engine.requests) == 1


async def test_a_request_of_nothing_but_padding_comes_to_an_end(client: Person) -> None:
    """Records without content are cheap to send; they cost the enclave work all the same."""
    sealed = await client.sealed(chat())
    keys = sealed.answer._keys
    assert isinstance(keys, ExchangeKeys)
    sealer = RecordSealer(keys.request, 3)
    flood = b"".join(sealer.seal(b"", final=False) for _ in range(100))
    async with client.rpc.call("sealed", {"key_id": sealed.key_id}) as call:
        await call.send(sealed.body[:OPENING_SIZE])
        reading = asyncio.ensure_future(client.read(call, sealed))
        sent = 0
        limit = longest_request(client.house.configuration.limits.request_bytes)
        while not reading.done() and sent < 4 * limit:
            await call.send(flood)
            sent += len(flood)
            flood = b"".join(sealer.seal(b"", final=False) for _ in range(2000))
        [failure] = await reading
    assert isinstance(failure, Failure)
    assert failure.code == "invalid_request"


async def test_requests_that_arrive_at_once_hold_a_bounded_memory(
    client: Person, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second = [await client.sealed(chat("x" * 10_000)) for _ in range(2)]
    arriving = len(first.body) - OPENING_SIZE
    monkeypatch.setattr("enclave.arrivals.MAX_HALF_READ", arriving)
    server = client.house.server
    async with client.rpc.call("sealed", {"key_id": first.key_id}) as call:
        await call.send(first.body[:-1])
        while server._arrivals.size < arriving - 1:  # noqa: ASYNC110 - the server tells nobody
            await asyncio.sleep(0)
        assert (await client.send(second))[0] == Start("tiny")  # the oldest goes, and not the newcomer
        [failure] = await client.read(call, first)
        assert isinstance(failure, Failure)
        assert failure.code == "overloaded"
    assert server._arrivals.size == 0


async def test_a_request_larger_than_all_together_may_be_is_refused(
    client: Person, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("enclave.arrivals.MAX_HALF_READ", 1000)
    assert await client.refusal(await client.sealed(chat("x" * 10_000))) == "overloaded"
    assert client.house.server._arrivals.size == 0


@pytest.mark.parametrize("size", [1, 4094, 4095, 8188, 20_000, 1 << 20])
def test_the_longest_request_is_what_a_client_makes_of_it(size: int) -> None:
    sealed = seal_request(Attested().result(), bytes(size))
    assert len(sealed.body) == OPENING_SIZE + longest_request(size)


async def test_another_model_is_not_served(client: Person) -> None:
    [failure] = await client.ask(chat(model="gpt-4"))
    assert failure == Failure("unknown_model", "this enclave does not serve that model", "tiny", "gpt-4")
    assert client.house.engine.requests == []


async def test_the_engines_bounds_are_checked_before_it_is_asked(client: Person) -> None:
    sealed = await client.sealed(chat(top_p=0.0))
    answers = await client.send(sealed)
    assert isinstance(answers[-1], Failure)
    assert answers[-1].code == "invalid_request"
    assert client.house.engine.requests == []


# --- The engine ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("error", [EngineFailed("the engine process ended"), Overloaded(expected=1, got=2)])
async def test_what_the_engine_says_is_said_sealed(client: Person, error: Exception) -> None:
    client.house.engine.refuse = error
    answers = await client.ask(chat())
    assert answers[0] == Start("tiny")
    assert isinstance(answers[-1], Failure)
    assert answers[-1].code == getattr(error, "code", None)
    assert client.totals == Totals(evidence=1, requests=1, failed=1)


async def test_an_engine_that_dies_in_the_middle_leaves_what_it_said(client: Person) -> None:
    engine = client.house.engine
    held = engine.hold_after(5)
    asking = asyncio.ensure_future(client.ask(chat("a text of some length")))
    await held.wait()
    engine.fail()
    answers = await asking
    assert isinstance(answers[-1], Failure)
    assert answers[-1].code == "engine_failed"
    assert "a text of some length".startswith("".join(each.content for each in answers if isinstance(each, Delta)))


async def test_a_defect_is_counted_and_a_sealed_error_without_text(client: Person) -> None:
    client.house.engine.refuse = ZeroDivisionError("what the person said")
    answers = await client.ask(chat("what the person said"))
    assert answers[-1] == Failure("internal", "the enclave failed at this request")
    assert client.totals == Totals(evidence=1, requests=1, failed=1, defects=1)
    written = await events(client.house)
    assert not [event for event in written if event["event"] == "internal_error"]
    assert "person" not in json.dumps(written)


async def test_a_defect_in_reading_a_request_is_answered_sealed_too(
    client: Person, monkeypatch: pytest.MonkeyPatch
) -> None:
    def decode(_: object) -> Request:
        raise IndexError("what the person said")

    monkeypatch.setattr(Request, "decode", decode)
    assert await client.refusal(await client.sealed(chat())) == "internal"
    assert client.totals.defects == 1


async def test_an_enclave_without_an_engine_does_not_look_healthy(
    client: Person, monkeypatch: pytest.MonkeyPatch
) -> None:
    sealed = await client.sealed(chat())
    monkeypatch.setattr(EchoEngine, "ended", True)
    with clear_fault("unavailable"):
        await client.evidence(bytes(32))
    with clear_fault("unavailable"):
        await client.send(sealed)


async def test_a_client_that_leaves_stops_the_engine(client: Person) -> None:
    engine = client.house.engine
    held = engine.hold_after(3)
    sealed = await client.sealed(chat("a long story"))
    async with client.rpc.call("sealed", {"key_id": sealed.key_id}) as call:
        await call.send(sealed.body, end=True)
        await held.wait()
        assert engine.in_work == 1
    await engine.idle.wait()
    assert engine.in_work == 0
    await client.verified()
    assert client.totals == Totals(evidence=2, requests=1, cancelled=1)


async def test_a_client_whose_connection_breaks_stops_the_engine(client: Person) -> None:
    engine = client.house.engine
    held = engine.hold_after(3)
    sealed = await client.sealed(chat("a long story"))
    async with connect(client.house.address) as other, other.call("sealed", {"key_id": sealed.key_id}) as call:
        await call.send(sealed.body, end=True)
        await held.wait()
        other._link.lose("pulled out")
        await engine.idle.wait()
    assert engine.in_work == 0


async def test_a_client_that_leaves_before_its_request_is_whole(client: Person) -> None:
    sealed = await client.sealed(chat())
    async with client.rpc.call("sealed", {"key_id": sealed.key_id}) as call:
        await call.send(sealed.body[:-1])
        await client.verified()
    await client.verified()
    assert client.totals == Totals(evidence=3, requests=1, cancelled=1)
    assert client.house.engine.requests == []


async def test_an_answer_that_is_not_taken_counts_as_given_up(client: Person, monkeypatch: pytest.MonkeyPatch) -> None:
    async def not_taken(*_: object) -> bool:
        raise Fault("deadline_exceeded", "the answer was not taken in time")

    monkeypatch.setattr(PacedAnswer, "run", not_taken)
    with clear_fault("deadline_exceeded"):
        await client.ask(chat())
    assert client.totals == Totals(evidence=1, requests=1, cancelled=1)


# --- Time ---------------------------------------------------------------------------------------------------------

SHORT = SETTINGS + "[limits]\nrequest_seconds = 1\n"


async def test_an_opening_that_drips_is_given_up(tmp_path: Path) -> None:
    async with person(tmp_path, SHORT) as client:
        sealed = await client.sealed(chat())
        async with client.rpc.call("sealed", {"key_id": sealed.key_id}) as call:
            await call.send(sealed.body[: OPENING_SIZE - 1])
            with clear_fault("unavailable"):
                await call.reply()
        assert client.totals.refused == 1


async def test_a_request_that_drips_is_given_up_and_told_so_sealed(tmp_path: Path) -> None:
    async with person(tmp_path, SHORT) as client:
        sealed = await client.sealed(chat())
        async with client.rpc.call("sealed", {"key_id": sealed.key_id}) as call:
            await call.send(sealed.body[:-1])
            [failure] = await client.read(call, sealed)
        assert isinstance(failure, Failure)
        assert failure.code == "deadline_exceeded"
        assert client.house.engine.requests == []


async def test_an_engine_that_takes_too_long_is_stopped_and_told_so_sealed(tmp_path: Path) -> None:
    async with person(tmp_path, SHORT) as client:
        client.house.engine.hold_after(0)
        answers = await client.ask(chat())
        assert answers == [Start("tiny"), Failure("deadline_exceeded", "the request took too long", "<= 1 s", None)]
        assert client.house.engine.in_work == 0


# --- Events -------------------------------------------------------------------------------------------------------


async def test_events_are_lines_of_json_from_the_first_phase_on(client: Person) -> None:
    async with client.rpc.call("events", {}) as call:
        received = bytearray()
        async for piece in call:
            received += piece
            if b'"SERVING"' in received and received.endswith(b"\n"):
                break
        await client.verified()
        async for piece in call:
            received += piece
            if b"key_offered" in received and received.endswith(b"\n"):
                break
    lines = [json.loads(line) for line in bytes(received).splitlines()]
    assert [line["phase"] for line in lines if line["event"] == "phase"][-1] == "SERVING"
    [offered] = [line for line in lines if line["event"] == "key_offered"]
    assert offered["key_id"] == client.house.enclave.identity.current().commitment.key_id.hex()


async def test_a_closed_log_ends_the_events(client: Person) -> None:
    async with client.rpc.call("events", {}) as call:
        await call.reply()
        client.house.enclave.log.close()
        received = await call.read(1 << 20)
    assert received.endswith(b"\n")


async def test_nothing_of_a_request_is_in_any_event(client: Person) -> None:
    canary = "canary-4711"
    await client.ask(chat(canary))
    await client.ask(chat(canary, model=canary))
    client.house.engine.refuse = ValueError(canary)
    await client.ask(chat(canary))
    client.house.enclave.log.close_interval()
    written = json.dumps(await events(client.house))
    assert canary not in written
    assert "token" not in written


async def first_totals(lines: AsyncIterator[str], count: int) -> AsyncIterator[str]:
    while count:
        line = await anext(lines)
        if '"totals"' in line:
            count -= 1
            yield line


async def test_totals_close_once_an_interval(client: Person, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("enclave.server.TOTALS_INTERVAL_SECONDS", 0)
    server = Server(client.house.enclave)
    client.totals.requests = 7
    writing = asyncio.ensure_future(server.write_totals())
    log = client.house.enclave.log
    async with contextlib.aclosing(log.follow()) as lines:
        totals = [json.loads(line) async for line in first_totals(lines, 3)]
    writing.cancel()
    server.close()
    assert [each["requests"] for each in totals] == [7, 0, 0]


# --- Envelopes ----------------------------------------------------------------------------------------------------

WITH_PROMPTS = SETTINGS + kms_toml(UnixAddress("egress.sock"), prompts=PROMPTS_KEY)


@dataclass(kw_only=True)
class Sender(Person):
    """A person whose prompts wait in envelopes, and a KMS that counts."""

    kms: LocalKms

    @property
    def sealing(self) -> Sealing:
        manifest, configuration = self.house.manifest.digest(), self.house.configuration.digest
        return Sealing(self.kms.wrap, PROMPT, PROMPTS_KEY, (manifest,), (configuration,))

    async def bring(self, envelope: bytes, **meta: Any) -> bytes:
        """The sealed answer. Raises Fault."""
        async with self.rpc.call("envelope", meta) as call:
            await call.send(envelope, end=True)
            return await call.read(1 << 24)

    async def asks(self, asked: str | Request | bytes, **changed: Any) -> list[Answer]:
        envelope, reply = self.sealing.but(**changed).prompt(asked)
        return answers_to(await self.bring(envelope), reply)

    async def failure(self, asked: Request | bytes) -> RequestFailed:
        """A sealed error, to a prompt or to a body that begins with its reply secret."""
        secret = Secret(asked[:32]) if isinstance(asked, bytes) else None
        envelope, reply = self.sealing.prompt(asked, secret)
        with pytest.raises(RequestFailed) as caught:
            answers_to(await self.bring(envelope), reply)
        return caught.value

    async def fault(self, envelope: bytes, **meta: Any) -> str:
        """The code of a clear fault."""
        with pytest.raises(Fault) as caught:
            await self.bring(envelope, **meta)
        return caught.value.code


def answers_to(answer: bytes, reply: Reply) -> list[Answer]:
    return list(open_answer(answer, reply))


def text_of(answers: Sequence[Answer]) -> str:
    assert answers[0] == Start("tiny")
    assert isinstance(answers[-1], Done)
    return "".join(each.content for each in answers if isinstance(each, Delta))


@contextlib.asynccontextmanager
async def sending(directory: Path, settings: str = WITH_PROMPTS) -> AsyncIterator[Sender]:
    kms = LocalKms()

    def make_kms(_: KmsSettings, __: Nsm) -> LocalKms:
        return kms

    async with person(directory, settings, make_kms=make_kms) as opened:
        yield Sender(opened.house, opened.rpc, kms=kms)


@pytest.fixture
async def sender(tmp_path: Path) -> AsyncIterator[Sender]:
    async with sending(tmp_path) as opened:
        yield opened


async def test_a_prompt_that_waited_is_answered(sender: Sender) -> None:
    assert text_of(await sender.asks("what was sealed long ago")) == "what was sealed long ago"
    [asked] = sender.house.engine.requests
    assert last_said(asked) == "what was sealed long ago"
    assert sender.kms.asked == [(PROMPTS_KEY, encryption_context(PROMPT, "tests", FLOOR))]
    assert sender.totals == Totals(requests=1, answered=1)


async def test_parameters_of_a_prompt_that_waited(sender: Sender) -> None:
    parameters: dict[str, Any] = {"max_tokens": 5, "temperature": 0.5, "top_p": 0.25, "seed": 9, "model": "tiny"}
    await sender.asks(question("hello", **parameters))
    [asked] = sender.house.engine.requests
    assert {name: getattr(asked, name) for name in parameters} == parameters


async def test_the_same_envelope_is_answered_each_time_and_sealed_anew(sender: Sender) -> None:
    """At least once: whoever carries it decides how often. No two answers share a key."""
    envelope, reply = sender.sealing.prompt("again")
    first, second = await sender.bring(envelope), await sender.bring(envelope)
    assert text_of(answers_to(first, reply)) == text_of(answers_to(second, reply)) == "again"
    assert len(first) == len(second)
    assert first[:ANSWER_SALT_SIZE] != second[:ANSWER_SALT_SIZE]
    spread = range(ANSWER_SALT_SIZE + HEADER_SIZE, len(first) - 16, 16)
    assert all(first[at : at + 16] != second[at : at + 16] for at in spread)
    assert len(sender.house.engine.requests) == 2


async def test_an_answer_opens_for_its_envelope_alone(sender: Sender) -> None:
    """The same reply secret in two envelopes, as a careless sender might have it."""
    envelope, reply = sender.sealing.prompt("one")
    _, other = sender.sealing.prompt("two", reply.secret)
    answer = await sender.bring(envelope)
    assert text_of(answers_to(answer, reply)) == "one"
    with pytest.raises(SealedError):
        answers_to(answer, other)


@pytest.mark.parametrize("text", ["", "x", "many words " * 20])
async def test_an_answer_to_an_envelope_shows_a_bucket_of_records(sender: Sender, text: str) -> None:
    envelope, _ = sender.sealing.prompt(text)
    assert (len(await sender.bring(envelope)) - ANSWER_SALT_SIZE) % (4 * ANSWER_RECORD) == 0


async def test_many_envelopes_at_once_get_each_their_own(sender: Sender) -> None:
    texts = [f"person {number}" for number in range(20)]
    assert [text_of(each) for each in await asyncio.gather(*map(sender.asks, texts))] == texts


@pytest.mark.parametrize("size", [1, 97, 5000])
async def test_an_envelope_may_come_in_any_pieces(sender: Sender, size: int) -> None:
    envelope, reply = sender.sealing.prompt("in pieces")
    async with sender.rpc.call("envelope", {}) as call:
        for start in range(0, len(envelope), size):
            await call.send(envelope[start : start + size])
        await call.send(b"", end=True)
        assert text_of(answers_to(await call.read(1 << 20), reply)) == "in pieces"
    assert len(sender.kms.asked) == 1


async def test_nothing_of_an_envelope_is_done_before_its_final_record(sender: Sender) -> None:
    envelope, reply = sender.sealing.prompt("long " * 2000)
    async with sender.rpc.call("envelope", {}) as call:
        await call.send(envelope[:-1])
        await sender.verified()  # by then the enclave has read what came before
        assert sender.house.engine.requests == []
        await call.send(envelope[-1:], end=True)
        with pytest.raises(RequestFailed, match="context_exceeded"):
            answers_to(await call.read(1 << 20), reply)
    assert len(sender.house.engine.requests) == 1


# --- Envelopes that are not opened: a clear fault by its cause ----------------------------------------------------

FOREIGN: dict[str, dict[str, Any]] = {
    "another purpose": {"purpose": MODEL},
    "another key": {"key": OTHER_KEY},
    "another context": {"context": "production"},
    "an older version": {"version": FLOOR - 1},
}


@pytest.mark.parametrize("changed", FOREIGN.values(), ids=FOREIGN)
async def test_kms_is_not_asked_for_somebody_elses_envelope(sender: Sender, changed: dict[str, Any]) -> None:
    envelope, _ = sender.sealing.but(**changed).prompt("hello")
    assert await sender.fault(envelope) == "not_released"
    assert sender.kms.asked == []
    assert sender.totals == Totals(requests=1, refused=1)


@pytest.mark.parametrize("changed", [{"models": (bytes(48),)}, {"configurations": (bytes(48),)}])
async def test_an_envelope_whose_terms_allow_another_enclave(sender: Sender, changed: dict[str, Any]) -> None:
    """KMS has released its key; the enclave itself compares what the terms say."""
    envelope, _ = sender.sealing.but(**changed).prompt("hello")
    assert await sender.fault(envelope) == "not_released"
    assert len(sender.kms.asked) == 1
    assert sender.house.engine.requests == []


UNRELEASED = {
    "kms_denied": "not_released",
    "kms_wrong_context": "not_released",
    "kms_wrong_key": "not_released",
    "kms_unusable_key": "not_released",
    "overloaded": "overloaded",
    "kms_unreachable": "unavailable",
    "kms_timeout": "unavailable",
    "kms_throttled": "unavailable",
    "kms_failed": "unavailable",
    "kms_tls": "unavailable",
    "kms_no_credentials": "unavailable",
    "kms_expired_credentials": "unavailable",
    "kms_refused": "unavailable",
    "kms_plaintext": "unavailable",
    "kms_malformed": "unavailable",
}


@pytest.mark.parametrize(("code", "fault"), UNRELEASED.items())
async def test_a_key_that_kms_does_not_release(sender: Sender, code: str, fault: str) -> None:
    """A cause that may pass is told apart from one that will not; which it was, the operator's totals say."""
    envelope, reply = sender.sealing.prompt("hello")
    sender.kms.error = KmsError(code, "whatever KMS said")
    with pytest.raises(Fault) as caught:
        await sender.bring(envelope)
    assert (caught.value.code, caught.value.message) == (fault, "the envelope was not opened")
    assert sender.totals == Totals(requests=1, refused=1, kms={} if code == "overloaded" else {code: 1})
    sender.kms.error = None
    if code in ("kms_wrong_context", "kms_wrong_key"):
        assert await sender.fault(envelope) == "not_released"
        assert len(sender.kms.asked) == 1, "nothing changes what KMS has said"
        return
    assert text_of(answers_to(await sender.bring(envelope), reply)) == "hello"


def test_every_error_of_kms_is_in_this_table() -> None:
    assert KmsError.__doc__ is not None
    assert set(UNRELEASED) == set(re.findall(r"``(\w+)``", KmsError.__doc__)) == KMS_CODES | {"overloaded"}


async def test_worthless_envelopes_crowd_out_no_evidence(sender: Sender) -> None:
    """Anybody can write a header that fits; only KMS knows that the wrapped key in it is none."""
    sender.kms.held = asyncio.Event()
    worthless, _ = sender.sealing.but(wrapped_by=OTHER_KEY).prompt("hello")
    async with asyncio.TaskGroup() as group:
        flood = [group.create_task(sender.fault(worthless)) for _ in range(AT_KMS + WAITING)]
        guarded = sender.house.enclave._anybodys_kms
        while guarded is None or guarded._waiting < WAITING:  # noqa: ASYNC110 - nobody tells
            await asyncio.sleep(0)
        envelope, reply = sender.sealing.prompt("hello")
        assert await sender.fault(envelope) == "overloaded"
        await sender.verified()
        assert len(sender.kms.asked) == AT_KMS
        sender.kms.held.set()
    assert {task.result() for task in flood} == {"not_released"}
    assert len(sender.kms.asked) == AT_KMS, "whoever waited was told what KMS had said of the same by then"
    assert text_of(answers_to(await sender.bring(envelope), reply)) == "hello"


async def test_an_nsm_without_a_document_for_kms(sender: Sender) -> None:
    envelope, _ = sender.sealing.prompt("hello")
    sender.kms.error = NsmError(NsmErrorCode.INTERNAL_ERROR, "no document")
    assert await sender.fault(envelope) == "unavailable"


async def test_an_envelope_whose_wrapped_key_was_moved(sender: Sender) -> None:
    for moved in ({"wrapped_by": OTHER_KEY}, {"wrapped_under": encryption_context(PROMPT, "tests", FLOOR - 1)}):
        envelope, _ = sender.sealing.but(**moved).prompt("hello")
        assert await sender.fault(envelope) == "not_released"


@pytest.mark.parametrize("meta", [{"key_id": bytes(16)}, {"x": None}])
async def test_an_envelope_with_something_beside_it(sender: Sender, meta: dict[str, Any]) -> None:
    assert await sender.fault(sender.sealing.prompt("hello")[0], **meta) == "malformed"
    assert sender.kms.asked == []


def resalted(header: bytes) -> bytes:
    return replace(EnvelopeHeader.split(header)[0], salt=bytes(32)).encode()


ENVELOPE_HARM: dict[str, Callable[[bytes, list[bytes]], bytes]] = {
    "nothing": lambda header, records: b"",
    "a sealed request": lambda header, records: b"\x01" + bytes(2000),
    "half a header": lambda header, records: header[:100],
    "a header alone": lambda header, records: header,
    "without the last record": lambda header, records: header + b"".join(records[:-1]),
    "a record short": lambda header, records: header + records[0],
    "a byte changed": lambda header, records: header + b"".join([flipped(records[0]), *records[1:]]),
    "the last one changed": lambda header, records: header + b"".join([*records[:-1], flipped(records[-1])]),
    "in another order": lambda header, records: header + b"".join([records[1], records[0], *records[2:]]),
    "more behind it": lambda header, records: header + b"".join(records) + b"\x00",
    "another salt": lambda header, records: resalted(header) + b"".join(records),
}


@pytest.mark.parametrize("harm", ENVELOPE_HARM)
async def test_an_envelope_harmed_on_its_way(sender: Sender, harm: str) -> None:
    envelope, _ = sender.sealing.prompt("long " * 2000)
    header, records = split_records(envelope)
    assert len(records) == 4
    assert await sender.fault(ENVELOPE_HARM[harm](header, records)) == "malformed"
    assert sender.house.engine.requests == []
    assert sender.totals == Totals(requests=1, refused=1)


@pytest.mark.parametrize("size", [0, 1, 31])
async def test_an_envelope_without_a_reply_secret(sender: Sender, size: int) -> None:
    """There is nothing to seal a failure under."""
    assert await sender.fault(sender.sealing.prompt(bytes(size))[0]) == "malformed"


async def test_a_prompt_in_records_of_another_size(sender: Sender) -> None:
    """They would take as much memory as the envelope says, before a byte of it is authentic."""
    envelope, _ = sender.sealing.but(record=1 << 20).prompt("hello")
    assert await sender.fault(envelope) == "malformed"
    assert sender.kms.asked == []


async def test_an_enclave_without_a_key_for_prompts(client: Person) -> None:
    with clear_fault("not_released"):
        async with client.rpc.call("envelope", {}) as call:
            await call.send(b"strongroom/1 envelope\n", end=True)
            await call.read(1 << 20)
    assert client.totals == Totals(requests=1, refused=1)


# --- Envelopes that are opened: from the reply secret on every failure is sealed ----------------------------------


BAD_BODIES = BAD | {"bytes behind it": message() + b"\x00\x01"}
"""Zeros alone would be padding."""


@pytest.mark.parametrize("content", BAD_BODIES.values(), ids=BAD_BODIES)
async def test_a_prompt_that_is_none_is_refused_sealed(sender: Sender, content: bytes) -> None:
    assert (await sender.failure(bytes(32) + content)).code == "invalid_request"
    assert sender.house.engine.requests == []
    assert sender.totals == Totals(requests=1, failed=1)


async def test_what_the_engine_says_of_a_prompt_that_waited_is_said_sealed(sender: Sender) -> None:
    assert (await sender.failure(question("hello", model="gpt-4"))).code == "unknown_model"
    assert (await sender.failure(question("hello", top_p=0.0))).code == "invalid_request"
    sender.house.engine.refuse = EngineFailed("the engine process ended")
    assert (await sender.failure(question("hello"))).code == "engine_failed"
    sender.house.engine.refuse = ZeroDivisionError("what the person said")
    failed = await sender.failure(question("hello"))
    assert (failed.code, failed.message) == ("internal", "the enclave failed at this request")
    assert sender.totals == Totals(requests=4, failed=4, defects=1)


async def test_a_defect_in_reading_a_prompt_is_answered_sealed_too(
    sender: Sender, monkeypatch: pytest.MonkeyPatch
) -> None:
    def decode(_: object) -> Request:
        raise IndexError("what the person said")

    envelope, reply = sender.sealing.prompt("hello")
    monkeypatch.setattr(Request, "decode", decode)
    with pytest.raises(RequestFailed) as caught:
        answers_to(await sender.bring(envelope), reply)
    assert caught.value.code == "internal"
    assert sender.totals.defects == 1


async def test_a_prompt_may_ask_what_is_served(sender: Sender) -> None:
    envelope, reply = sender.sealing.prompt(describe())
    answer = await sender.bring(envelope)
    with pytest.raises(SealedError, match="out of order"):
        answers_to(answer, reply)  # for a sender of prompts it is no answer
    assert sender.totals == Totals(requests=1, answered=1)


def largest(size: int) -> int:
    """Characters of a prompt whose message has so many bytes, without its length."""
    count = size
    while len(question("x" * count).encode()) - 4 > size:
        count -= 1
    return count


# --- Envelopes and bounds -----------------------------------------------------------------------------------------


async def test_a_prompt_as_large_as_is_configured(tmp_path: Path) -> None:
    """Whatever else stands in its envelope: the bound is the message's."""
    async with sending(tmp_path, WITH_PROMPTS.replace("[kms]", "[limits]\nrequest_bytes = 8188\n[kms]")) as sender:
        room = largest(8188)
        many = (*(bytes([number]) * 48 for number in range(70)), sender.house.configuration.digest)
        for configurations in ((sender.house.configuration.digest,), many):
            sealing = sender.sealing.but(configurations=configurations)
            envelope, reply = sealing.prompt("x" * room)
            with pytest.raises(RequestFailed) as caught:
                answers_to(await sender.bring(envelope), reply)
            assert caught.value.code == "context_exceeded"
            envelope, reply = sealing.prompt("x" * (room + 1))
            with pytest.raises(RequestFailed) as caught:
                answers_to(await sender.bring(envelope), reply)
            assert (caught.value.code, caught.value.expected) == ("invalid_request", "<= 8188")


async def test_an_envelope_larger_than_any_prompt_is_not_read_to_its_end(sender: Sender) -> None:
    envelope, _ = sender.sealing.prompt(bytes(8 << 20))
    assert len(envelope) > longest_envelope(sender.house.configuration.limits.request_bytes)
    assert await sender.fault(envelope) == "malformed"
    assert sender.house.server._arrivals.size == 0


@pytest.mark.parametrize("size", [4096, 8188, 20_000, 1 << 20])
def test_the_longest_envelope_holds_whatever_a_sender_makes_of_it(size: int) -> None:
    kms = LocalKms()
    many = tuple(number.to_bytes(48, "big") for number in range(80))
    sealing = Sealing(kms.wrap, PROMPT, PROMPTS_KEY, (bytes(48),), many[:78])
    assert len(sealing.terms.encode()) > MAX_TERMS - 100
    envelope, _ = sealing.prompt("x" * largest(size))
    assert len(envelope) <= longest_envelope(size)
    assert longest_envelope(size) < 9 << 20, "more than a proxy takes"


async def test_envelopes_that_arrive_at_once_hold_a_bounded_memory(
    sender: Sender, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One budget with the sealed calls."""
    (first, _), (second, reply) = (sender.sealing.prompt("x" * 10_000) for _ in range(2))
    monkeypatch.setattr("enclave.arrivals.MAX_HALF_READ", len(first))
    server = sender.house.server
    async with sender.rpc.call("envelope", {}) as call:
        await call.send(first[:-1])
        while server._arrivals.size < len(first) - 1:  # noqa: ASYNC110 - the server tells nobody
            await asyncio.sleep(0)
        with pytest.raises(RequestFailed, match="context_exceeded"):
            answers_to(await sender.bring(second), reply)
        with clear_fault("overloaded"):
            await call.reply()
        sealed = await sender.sealed(chat("x"))
        monkeypatch.setattr("enclave.arrivals.MAX_HALF_READ", 1)
        assert await sender.refusal(sealed) == "overloaded"
    assert server._arrivals.size == 0
    assert sender.totals.kms == {}


@pytest.mark.parametrize("cause", ["denied", "tampered", "cut"])
async def test_an_envelope_that_is_refused_gives_its_budget_back(sender: Sender, cause: str) -> None:
    envelope, _ = sender.sealing.prompt("x" * 10_000)
    if cause == "denied":
        sender.kms.error = KmsError("kms_denied", "no")
    harmed = {"denied": envelope, "tampered": flipped(envelope), "cut": envelope[:-1]}[cause]
    await sender.fault(harmed)
    assert sender.house.server._arrivals.size == 0


async def test_a_sender_who_leaves_while_kms_is_asked(sender: Sender) -> None:
    sender.kms.held = asyncio.Event()
    envelope, _ = sender.sealing.prompt("hello")
    async with sender.rpc.call("envelope", {}) as call:
        await call.send(envelope, end=True)
        while not sender.kms.asked:  # noqa: ASYNC110 - KMS tells nobody
            await asyncio.sleep(0)
    await sender.verified()
    assert sender.totals == Totals(evidence=1, requests=1, cancelled=1)
    assert sender.house.server._arrivals.size == 0
    assert sender.house.engine.requests == []


async def test_a_sender_who_leaves_stops_the_engine(sender: Sender) -> None:
    held = sender.house.engine.hold_after(3)
    envelope, _ = sender.sealing.prompt("a long story")
    async with sender.rpc.call("envelope", {}) as call:
        await call.send(envelope, end=True)
        await held.wait()
    await sender.house.engine.idle.wait()
    await sender.verified()
    assert sender.totals == Totals(evidence=1, requests=1, cancelled=1)


@pytest.mark.parametrize("what", ["the envelope", "KMS"])
async def test_an_envelope_that_takes_too_long(tmp_path: Path, what: str) -> None:
    async with sending(tmp_path, WITH_PROMPTS.replace("[kms]", "[limits]\nrequest_seconds = 1\n[kms]")) as sender:
        envelope, _ = sender.sealing.prompt("hello")
        if what == "KMS":
            sender.kms.held = asyncio.Event()
        async with sender.rpc.call("envelope", {}) as call:
            await call.send(envelope if what == "KMS" else envelope[:-1])
            with clear_fault("unavailable"):
                await call.reply()
        assert sender.totals == Totals(requests=1, refused=1)
        assert sender.house.server._arrivals.size == 0


async def test_nothing_of_an_envelope_is_in_any_event(sender: Sender) -> None:
    canary = "canary-4711"
    await sender.asks(canary)
    await sender.failure(question(canary, model=canary))
    sender.kms.error = KmsError("kms_denied", canary)
    await sender.fault(sender.sealing.prompt(canary)[0])
    sender.house.enclave.log.close_interval()
    written = await events(sender.house)
    assert canary not in json.dumps(written)
    assert (written[-1]["requests"], written[-1]["kms"]) == (3, {"kms_denied": 1})
