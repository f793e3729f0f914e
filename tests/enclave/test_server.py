"""What the enclave answers, as a client meets it: over the real RPC, through the real sealed channel, after a real
boot. Only the engine echoes."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import json
import secrets
import threading
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import cbor2
import pytest

from attestation.verifier import AttestationResult, verify
from enclave.boot import Enclave
from enclave.generation import EngineFailed, Overloaded
from enclave.identity import MAX_KEYS, Identity, OfferedKey
from enclave.log import EventLog, Phase, Totals
from enclave.nsm import Nsm, NsmUnavailable, Transport
from enclave.pacing import PacedAnswer
from enclave.server import EVIDENCE_QUEUE, BoundedWorker, Server, longest_request
from tests.attested import Attested, software_nsm
from tests.engines import EchoEngine
from tests.house import EnclaveHouse, enclave_house
from vsockrpc.address import UnixAddress
from vsockrpc.messages import (
    Answer,
    ChatMessage,
    ChatRequest,
    Delta,
    DescribeRequest,
    Description,
    Done,
    Failure,
    MessageReader,
    Request,
    Start,
    decode_answer,
    encode_message,
)
from vsockrpc.sealed import (
    ANSWER_SALT_SIZE,
    HEADER_SIZE,
    OPENING_SIZE,
    REQUEST_RECORD_SIZE,
    TAG_SIZE,
    RecordSealer,
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
async def person(directory: Path, settings: str = SETTINGS) -> AsyncIterator[Person]:
    async with enclave_house(directory, settings) as house, connect(house.address) as rpc:
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
        for method, meta in (("evidence", {"nonce": bytes(32)}), ("sealed", {"key_id": bytes(16)})):
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
    assert "".join(answer.text for answer in answers if isinstance(answer, Delta)) == "what is said comes back"
    assert isinstance(answers[-1], Done)
    assert answers[-1].finish_reason == "stop"
    [asked] = client.house.engine.requests
    assert asked.messages == (ChatMessage("user", "what is said comes back"),)
    assert dataclasses.asdict(client.totals) | {"evidence": 1} == dataclasses.asdict(
        Totals(evidence=1, requests=1, answered=1)
    )


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
    heard = ["".join(piece.text for piece in answer if isinstance(piece, Delta)) for answer in answers]
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
    "an answer": Done("stop", 1, 1).encode(),
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
    sealer = RecordSealer(sealed.answer._keys.request, 3)
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
    monkeypatch.setattr("enclave.server.MAX_HALF_READ", arriving)
    server = client.house.server
    async with client.rpc.call("sealed", {"key_id": first.key_id}) as call:
        await call.send(first.body[:-1])
        while server._half_read < arriving - 1:  # noqa: ASYNC110 - the server tells nobody
            await asyncio.sleep(0)
        assert await client.refusal(second) == "overloaded"
        assert server._half_read == arriving - 1
        await call.send(first.body[-1:], end=True)
        assert (await client.read(call, first))[0] == Start("tiny")
    assert server._half_read == 0


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
    assert "a text of some length".startswith("".join(each.text for each in answers if isinstance(each, Delta)))


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
