"""What KMS releases to an enclave, and every way in which it does not: a typed error each, and never a plaintext."""

from __future__ import annotations

import asyncio
import base64
import hashlib
import json
import threading
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from functools import cache, partial
from http import HTTPStatus
from pathlib import Path
from typing import Any

import cbor2
import pytest
from cryptography.hazmat.primitives.asymmetric import rsa
from hypothesis import given
from hypothesis import strategies as st
from urllib3 import HTTPSConnectionPool

from attestation.commitment import Purpose, UserData
from attestation.errors import StrongroomError
from attestation.keypolicy.document import KeyArn
from attestation.secret import Secret
from emulator.cms import ContentForm, envelop
from emulator.https import Cut, HttpAnswer
from emulator.kms_faults import (
    GARBAGE,
    INTERNAL,
    NO_DEPENDENCY,
    THROTTLED,
    UNAVAILABLE,
    WITH_PLAINTEXT,
    Alter,
    Delay,
    Refuse,
    another_key,
)
from emulator.nsm import boot_registers
from enclave.config import KmsSettings
from enclave.kms import service as kms_module
from enclave.kms.client import KmsClient
from enclave.kms.https import Attempt, Credentials
from enclave.kms.service import Kms, KmsError, Patience, _Document
from enclave.nsm import Nsm
from parent.credentials import Issued, NoCredentials
from parent.egress import Endpoint
from tests.attested import IMAGE, software_nsm
from tests.key_policies import ACCOUNT, policy, statement
from tests.kms_world import CONTEXT, HOST, ONCE, ROLE, Impostor, World, issued, kms_world, lasting, released_to
from vsockrpc.address import TcpAddress, UnixAddress
from vsockrpc.transport import Fault, IncomingCall

PLAINTEXT = bytes(range(100, 132))


@pytest.fixture
async def world(tmp_path: Path) -> AsyncIterator[World]:
    async with kms_world(tmp_path) as made:
        yield made


async def release(world: World, kms: Kms, context: Mapping[str, str] = CONTEXT) -> Secret:
    """The plaintext that the tests' wrapped key holds."""
    return await kms.decrypt(world.wrap(PLAINTEXT), key=world.key, context=context)


async def refused(work: Awaitable[object]) -> KmsError:
    with pytest.raises(KmsError) as caught:
        await work
    error = caught.value
    assert error.__cause__ is None
    text = f"{error} {error!r} {error.as_json()}"
    assert text.isprintable()
    assert not any(
        shape(PLAINTEXT) in text for shape in (bytes.hex, repr, lambda data: base64.b64encode(data).decode())
    )
    return error


async def until(condition: Callable[[], bool]) -> None:
    for _ in range(2000):
        if condition():
            return
        await asyncio.sleep(0.005)
    raise AssertionError("it never came to that")


# --- What is released -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ContentForm)
async def test_the_three_operations(world: World, form: ContentForm) -> None:
    world.emulator.kms.content_form = form
    async with world.kms() as kms:
        assert await release(world, kms) == Secret(PLAINTEXT)
        data_key, wrapped = await kms.generate_data_key(world.key, CONTEXT)
        assert len(data_key) == 32
        assert await kms.decrypt(wrapped, key=world.key, context=CONTEXT) == data_key
        ones = [await kms.generate_random(size) for size in (1, 256, 1024)]
        assert [len(one) for one in ones] == [1, 256, 1024]
    assert world.lookups == 1
    assert world.connections == 1


async def test_every_request_has_a_fresh_document_for_the_key_of_this_boot(world: World) -> None:
    async with world.kms() as kms, world.kms() as another:
        for _ in range(3):
            await release(world, kms)
        await release(world, another)
    *ours, other = world.nsm.documents
    assert len({document["nonce"] for document in (*ours, other)}) == 4
    (key,) = {document["public_key"] for document in ours}
    assert other["public_key"] != key
    for document in ours:
        assert len(document["nonce"]) == 32
        binding = UserData.decode(document["user_data"])
        assert binding == UserData(Purpose.KMS, hashlib.sha384(key).digest())


async def test_64_releases_at_once(world: World) -> None:
    async with world.kms(Patience()) as kms:
        released = await asyncio.gather(*(release(world, kms) for _ in range(64)))
    assert released == [Secret(PLAINTEXT)] * 64
    assert len(world.nsm.documents) == 64
    assert world.lookups == 1


async def test_releases_do_not_wait_for_each_other(world: World) -> None:
    together = threading.Barrier(8)

    def meet(answer: Mapping[str, Any]) -> Mapping[str, Any]:
        together.wait(30)
        return answer

    world.emulator.faults.inject(Alter(meet))
    async with world.kms(ONCE) as kms:
        assert await asyncio.gather(*(release(world, kms) for _ in range(8))) == [Secret(PLAINTEXT)] * 8


# --- What the key decides ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("register", [0, 3, 4])
async def test_a_denial_tells_what_to_compare(world: World, register: int) -> None:
    """Every register that the enclave has: a key's policy may name any."""
    world.nsm.restart(role_arn=ROLE)
    other = {"StringEqualsIgnoreCase": {f"kms:RecipientAttestation:PCR{register}": "00" * 48}}
    key = KeyArn.parse(world.emulator.create_key(released_to(other)))
    async with world.kms() as kms:
        error = await refused(kms.decrypt(world.wrap(PLAINTEXT, key=key), key=key, context=CONTEXT))
    assert error.code == "kms_denied"
    assert "compare the key's policy" in error.message
    assert error.expected == str(CONTEXT)
    assert error.got is not None
    registers = boot_registers(IMAGE, role_arn=ROLE)
    assert registers.keys() == {0, 1, 2, 3, 4}
    assert error.got == ", ".join(f"PCR{index} {registers[index].hex()}" for index in sorted(registers))
    assert len(world.nsm.documents) == 1, "a denial is not asked for again"


async def test_credentials_without_a_document_are_not_enough(world: World) -> None:
    """What the parent could do alone with what it gives away: nothing."""
    key = KeyArn.parse(world.emulator.create_key(policy(statement(ROLE, "kms:GenerateDataKey"))))
    async with world.kms() as kms:
        assert (
            await refused(kms.decrypt(world.wrap(PLAINTEXT, key=key), key=key, context=CONTEXT))
        ).code == "kms_denied"


async def test_a_wrapped_key_of_another_context(world: World) -> None:
    async with world.kms() as kms:
        moved = CONTEXT | {"strongroom:purpose": "model"}
        assert (await refused(release(world, kms, context=moved))).code == "kms_wrong_context"
        older = CONTEXT | {"strongroom:version": "2"}
        assert (await refused(release(world, kms, context=older))).code == "kms_wrong_context"
        assert (
            await refused(kms.decrypt(b"no ciphertext", key=world.key, context=CONTEXT))
        ).code == "kms_wrong_context"


async def test_a_wrapped_key_of_another_key_of_the_account(world: World) -> None:
    other = KeyArn.parse(world.emulator.create_key(released_to()))
    async with world.kms() as kms:
        swapped = world.wrap(PLAINTEXT, key=other)
        assert (await refused(kms.decrypt(swapped, key=world.key, context=CONTEXT))).code == "kms_wrong_key"


async def test_a_key_that_does_not_exist(world: World) -> None:
    gone = replace(world.key, key_id="00000000-0000-0000-0000-000000000000")
    async with world.kms() as kms:
        assert (await refused(kms.generate_data_key(gone, CONTEXT))).code == "kms_unusable_key"


@pytest.mark.parametrize(
    ("code", "expected"),
    [
        ("DisabledException", "kms_unusable_key"),
        ("KMSInvalidStateException", "kms_unusable_key"),
        ("InvalidKeyUsageException", "kms_unusable_key"),
        ("ValidationException", "kms_refused"),
        ("SerializationException", "kms_refused"),
        ("SignatureDoesNotMatch", "kms_no_credentials"),
        ("\x1b[2Jterminal", "kms_refused"),
    ],
)
async def test_refusals_by_their_codes(world: World, code: str, expected: str) -> None:
    world.emulator.faults.inject(Refuse(code, "words that may repeat the request"))
    async with world.kms() as kms:
        error = await refused(release(world, kms))
    assert error.code == expected
    assert len(world.nsm.documents) == 1
    if expected != "kms_unusable_key":
        assert "repeat the request" not in str(error)


@pytest.mark.parametrize("wrapped", [b"", bytes(6145)], ids=len)
async def test_what_cannot_be_a_wrapped_key_is_the_callers_mistake(world: World, wrapped: bytes) -> None:
    async with world.kms() as kms:
        with pytest.raises(ValueError, match="the wrapped key's bytes: 1 to 6144"):
            await kms.decrypt(wrapped, key=world.key, context=CONTEXT)
        with pytest.raises(ValueError, match="an encryption context is not empty"):
            await kms.decrypt(b"x", key=world.key, context={})
        for count in (0, 1025):
            with pytest.raises(ValueError, match="random bytes: 1 to 1024"):
                await kms.generate_random(count)
    assert world.nsm.documents == []


# --- Answers that lie -------------------------------------------------------------------------------------------------


def without_ciphertext(answer: Mapping[str, Any]) -> Mapping[str, Any]:
    """A KMS that knows nothing of Recipient answers like this."""
    plain = {name: value for name, value in answer.items() if name != "CiphertextForRecipient"}
    return {**plain, "Plaintext": base64.b64encode(PLAINTEXT).decode()}


def for_somebody_else(answer: Mapping[str, Any]) -> Mapping[str, Any]:
    other = rsa.generate_private_key(65537, 2048).public_key()
    return {**answer, "CiphertextForRecipient": base64.b64encode(envelop(PLAINTEXT, other)).decode()}


def member(name: str, value: object) -> Alter:
    return Alter(lambda answer: {**answer, name: value})


ANOTHER = f"arn:aws:kms:us-east-1:{ACCOUNT}:key/00000000-0000-0000-0000-000000000000"
LIES = {
    "plaintext-beside": (WITH_PLAINTEXT, "kms_plaintext"),
    "plaintext-instead": (Alter(without_ciphertext), "kms_plaintext"),
    "another-key": (another_key(ANOTHER), "kms_wrong_key"),
    "alias": (another_key(f"arn:aws:kms:us-east-1:{ACCOUNT}:alias/mine"), "kms_wrong_key"),
    "no-key": (Alter(lambda answer: {name: answer[name] for name in answer if name != "KeyId"}), "kms_wrong_key"),
    "key-of-another-type": (member("KeyId", ["\x1b[2J"]), "kms_wrong_key"),
    "garbage": (GARBAGE, "kms_malformed"),
    "empty": (member("CiphertextForRecipient", ""), "kms_malformed"),
    "null": (member("CiphertextForRecipient", None), "kms_malformed"),
    "number": (member("CiphertextForRecipient", 7), "kms_malformed"),
    "no-base64": (member("CiphertextForRecipient", "é"), "kms_malformed"),
    "another-recipient": (Alter(for_somebody_else), "kms_malformed"),
}


@pytest.mark.parametrize(("lie", "code"), LIES.values(), ids=LIES)
async def test_an_answer_that_lies(world: World, lie: Alter, code: str) -> None:
    world.emulator.faults.inject(lie)
    async with world.kms() as kms:
        error = await refused(release(world, kms))
        assert error.code == code
        assert not error.passing
        assert (await refused(kms.generate_data_key(world.key, CONTEXT))).code == code
        world.emulator.faults.clear()
        assert await release(world, kms) == Secret(PLAINTEXT), "the next answer is another matter"


@pytest.mark.parametrize("nothing", [None, ""])
async def test_a_plaintext_of_nothing_is_none(world: World, nothing: str | None) -> None:
    world.emulator.faults.inject(member("Plaintext", nothing))
    async with world.kms() as kms:
        assert await release(world, kms) == Secret(PLAINTEXT)


async def test_sizes_are_those_that_were_asked_for(world: World) -> None:
    def resized(size: int) -> Alter:
        key = kms._key.public_key()
        return member("CiphertextForRecipient", base64.b64encode(envelop(bytes(size), key)).decode())

    async with world.kms() as kms:
        for size in (16, 31, 33):
            world.emulator.faults.inject(resized(size), times=1)
            assert (await refused(kms.generate_data_key(world.key, CONTEXT))).code == "kms_malformed"
            world.emulator.faults.inject(resized(size), times=1)
            assert (await refused(kms.generate_random(32))).code == "kms_malformed"
        for wrapped in (None, "", base64.b64encode(bytes(6145)).decode()):
            world.emulator.faults.inject(member("CiphertextBlob", wrapped), times=1)
            assert (await refused(kms.generate_data_key(world.key, CONTEXT))).code == "kms_malformed"


@pytest.fixture
async def impostor(tmp_path: Path) -> AsyncIterator[tuple[Impostor, Kms]]:
    there = Impostor()
    async with kms_world(tmp_path, egress=False) as world:
        world.target = there.endpoint
        await world.start_egress()
        async with world.kms(authority=there.authority.root_der) as kms:
            yield there, kms
    there.close()


BODIES = {
    "nothing": b"",
    "no-json": b"<html>",
    "list": b"[]",
    "number": b"7",
    "empty": b"{}",
    "twice": b'{"KeyId": "a", "KeyId": "b"}',
    "deep": b'{"a":' * 20 + b"1" + b"}" * 20,
    "no-text": b'{"Plaintext": "\xff"}',
    "long": b'{"a": "' + bytes(300_000).replace(b"\0", b"x") + b'"}',
}


@pytest.mark.parametrize("body", BODIES.values(), ids=BODIES)
async def test_an_answer_that_cannot_be_read(impostor: tuple[Impostor, Kms], body: bytes) -> None:
    there, kms = impostor
    there.answer = HttpAnswer(HTTPStatus.OK, body=body)
    assert (await refused(kms.generate_random(32))).code == "kms_malformed"


@pytest.mark.parametrize("body", BODIES.values(), ids=BODIES)
@pytest.mark.parametrize(
    ("status", "code"),
    [
        (HTTPStatus.BAD_REQUEST, "kms_refused"),
        (HTTPStatus.FOUND, "kms_refused"),
        (HTTPStatus.TOO_MANY_REQUESTS, "kms_throttled"),
        (HTTPStatus.BAD_GATEWAY, "kms_failed"),
    ],
)
async def test_an_error_that_cannot_be_read(
    impostor: tuple[Impostor, Kms], body: bytes, status: HTTPStatus, code: str
) -> None:
    there, kms = impostor
    there.answer = HttpAnswer(status, {"Location": "https://elsewhere.test/"}, body)
    expected = "kms_malformed" if len(body) > 262_144 else code
    assert (await refused(kms.generate_random(32))).code == expected
    assert {request.target for request in there.asked} == {"/"}, "no redirect is followed"
    assert len(there.asked) == (4 if expected in ("kms_throttled", "kms_failed") else 1)


class Said:
    """For a KmsPool: one whose answer is given."""

    def __init__(self, status: int, body: bytes) -> None:
        self._answer = status, {"Content-Type": "application/x-amz-json-1.1"}, body

    def post(self, path: str, body: bytes, headers: Mapping[str, str]) -> tuple[int, Mapping[str, str], bytes]:
        return self._answer


MEMBERS = ["KeyId", "Plaintext", "CiphertextForRecipient", "CiphertextBlob", "__type", "message", "Error", "x"]
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.just(ANOTHER),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.sampled_from(MEMBERS), inner, max_size=2),
    max_leaves=4,
)


@given(st.dictionaries(st.sampled_from(MEMBERS), VALUES), st.sampled_from([200, 204, 302, 400, 403, 500]))
def test_any_members_of_an_answer_are_an_error(members: dict[str, Any], status: int) -> None:
    _require_error(Said(status, json.dumps(members).encode()))


@given(st.binary(), st.sampled_from([200, 400, 500]))
def test_any_bytes_of_an_answer_are_an_error(body: bytes, status: int) -> None:
    _require_error(Said(status, body))


@cache
def offline() -> tuple[Kms, _Document, Attempt]:
    """An enclave that is answered without a network; one for all examples."""
    nsm = software_nsm()
    settings = KmsSettings("us-east-1", TcpAddress(HOST, 443), UnixAddress("nowhere.sock"), None, None, None)
    kms = Kms(settings, nsm)
    document = kms._attest()
    return kms, document, Attempt(document.claims.timestamp, Credentials("AKIA", Secret(b"s"), None, None), seconds=600)


def _require_error(said: Said) -> None:
    kms, document, attempt = offline()
    kms._client = KmsClient("us-east-1", TcpAddress(HOST, 443), said)  # type: ignore[arg-type]
    key = KeyArn.parse(ANOTHER)
    with pytest.raises(KmsError) as caught:
        kms._ask("generate_data_key", attempt, document, {"KeyId": key.text, "KeySpec": "AES_256"}, key)
    assert str(caught.value).isprintable()


# --- A KMS that has trouble -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fault", "code"),
    [
        (THROTTLED, "kms_throttled"),
        (INTERNAL, "kms_failed"),
        (UNAVAILABLE, "kms_failed"),
        (NO_DEPENDENCY, "kms_failed"),
        (Cut.BEFORE_ANSWER, "kms_unreachable"),
        (Cut.WITHIN_ANSWER, "kms_unreachable"),
    ],
    ids=lambda value: str(getattr(value, "code", value)),
)
async def test_what_passes_is_tried_again_with_another_document(world: World, fault: Any, code: str) -> None:
    world.emulator.faults.inject(fault, times=3)
    async with world.kms() as kms:
        assert await release(world, kms) == Secret(PLAINTEXT)
        assert len({document["nonce"] for document in world.nsm.documents}) == 4
        world.emulator.faults.inject(fault, times=4)
        error = await refused(release(world, kms))
    assert error.code == code
    assert len(world.nsm.documents) == 8


async def test_a_slow_kms_meets_the_deadline(world: World) -> None:
    world.emulator.faults.inject(Delay(60))
    async with world.kms(Patience(attempts=2, attempt_seconds=0.3, first_pause_seconds=0.001)) as kms:
        assert (await refused(release(world, kms))).code == "kms_timeout"
        assert len(world.nsm.documents) == 2
    async with world.kms(Patience(total_seconds=0.3)) as kms:
        assert (await refused(release(world, kms))).code == "kms_timeout"
    async with world.kms(Patience(total_seconds=0.3, throttled_pause_seconds=60)) as kms:
        world.emulator.faults.clear()
        world.emulator.faults.inject(THROTTLED)
        assert (await refused(release(world, kms))).code == "kms_throttled", "the last thing that is known"


@pytest.mark.parametrize(("code", "first"), [("kms_failed", 0.2), ("kms_throttled", 0.8), ("overloaded", 0.8)])
def test_pauses_grow_and_vary(code: str, first: float) -> None:
    kms, *_ = offline()
    for failed in range(1, 4):
        pauses = {kms._pause(KmsError(code, "busy"), failed) for _ in range(10)}
        assert len(pauses) > 1
        longest = first * 2 ** (failed - 1)
        assert all(longest / 2 <= pause <= longest for pause in pauses)


async def test_nobody_answers(tmp_path: Path) -> None:
    async with kms_world(tmp_path, egress=False) as world, world.kms() as kms:
        error = await refused(release(world, kms))  # no egress
        assert (error.code, error.got) == ("kms_unreachable", "unreachable")
        await world.start_egress()
        assert await release(world, kms) == Secret(PLAINTEXT)
    async with kms_world(tmp_path, egress=False) as world, world.kms() as kms:
        world.target = Endpoint("127.0.0.1", 1)
        await world.start_egress()
        error = await refused(release(world, kms))  # no KMS
        assert (error.code, error.got) == ("kms_unreachable", "egress_unreachable")
        assert len(world.nsm.documents) == 4
    async with kms_world(tmp_path, egress=False) as world, world.kms() as kms:
        await world.start_egress("another.test")
        error = await refused(release(world, kms))
        assert (error.code, error.got) == ("kms_unreachable", "egress_refused")
        assert len(world.nsm.documents) == 1, "the list will not change in a moment"


async def test_an_egress_that_takes_no_more(tmp_path: Path) -> None:
    async def overloaded(call: IncomingCall) -> None:
        raise Fault("overloaded")

    async with kms_world(tmp_path, egress=False) as world, world.kms() as kms:
        world.handlers = {"egress.connect": overloaded}
        await world.start_egress()
        assert (await refused(release(world, kms))).code == "overloaded"
        assert len(world.nsm.documents) == 4


async def test_an_egress_that_is_killed_in_mid_call(world: World) -> None:
    world.emulator.faults.inject(Delay(60), times=1)
    async with world.kms() as kms:
        releasing = asyncio.create_task(release(world, kms))
        await until(lambda: world.is_struck)
        world.kill_egress()
        assert await releasing == Secret(PLAINTEXT), "over another connection, with another document"
        assert len(world.nsm.documents) == 2
    world.emulator.faults.inject(Delay(60), times=1)
    async with world.kms(ONCE) as kms:
        releasing = asyncio.create_task(release(world, kms))
        await until(lambda: world.is_struck)
        world.kill_egress()
        error = await refused(releasing)
        assert (error.code, error.got) == ("kms_unreachable", "connection_lost")


async def test_a_connection_that_was_lost_between_two_calls(world: World) -> None:
    async with world.kms(ONCE) as kms:
        await release(world, kms)
        tunnel = kms._tunnel
        assert tunnel is not None
        world.kill_egress()
        await until(lambda: not tunnel._pumps)
        assert await release(world, kms) == Secret(PLAINTEXT), "the first attempt has a new one"
        assert world.connections == 2


# --- Credentials ------------------------------------------------------------------------------------------------------


async def test_credentials_are_kept_until_shortly_before_their_end(world: World) -> None:
    world.issue = lambda: issued(world.principal(lifetime=timedelta(minutes=30)))
    async with world.kms() as kms:
        await release(world, kms)
        await release(world, kms)
        assert world.given == 1
        world.emulator.skew = world.nsm_ahead = timedelta(minutes=27)
        await release(world, kms)
        assert world.given == 1
        world.emulator.skew = world.nsm_ahead = timedelta(minutes=29)
        await release(world, kms)
        await release(world, kms)
        assert world.given == 3, "those that end so soon are used, and not kept"


async def test_credentials_without_an_end_are_asked_for_again(world: World) -> None:
    owner = world.emulator.principal("user/parent")
    world.key = KeyArn.parse(world.emulator.create_key(policy(statement(owner.arn, "kms:Decrypt"))))
    world.issue = lambda: issued(owner)
    async with world.kms() as kms:
        await release(world, kms)
        world.emulator.skew = world.nsm_ahead = timedelta(minutes=4)
        await release(world, kms)
        assert world.given == 1
        world.emulator.skew = world.nsm_ahead = timedelta(minutes=6)
        await release(world, kms)
        assert world.given == 2


async def test_a_parent_without_credentials(world: World) -> None:
    def none() -> Issued:
        raise NoCredentials("attach a role to this instance")

    world.issue = none
    async with world.kms() as kms:
        error = await refused(release(world, kms))
        assert error.code == "kms_no_credentials"
        assert "attach a role" in error.message
        world.issue = None
        assert await release(world, kms) == Secret(PLAINTEXT)


async def test_expired_credentials(world: World) -> None:
    late = datetime.now(UTC) + timedelta(hours=2)
    async with world.kms() as kms:
        # By KMS's clock, whatever the parent says.
        world.issue = lambda: issued(world.principal(lifetime=timedelta(seconds=-1)), expires=late)
        assert (await refused(release(world, kms))).code == "kms_expired_credentials"
        assert world.given == 4, "each attempt asks for others"
        await world.restart_egress()
        assert await release(world, kms) == Secret(PLAINTEXT)
        # By the document's time, before KMS is asked.
        world.nsm_ahead = timedelta(hours=3)
        error = await refused(release(world, kms))
        assert (error.code, error.message) == ("kms_expired_credentials", "the parent's credentials have expired")


async def test_credentials_that_kms_does_not_know(world: World) -> None:
    known = world.principal()
    wrong = issued(known)
    async with world.kms() as kms:
        for unknown in (
            replace(wrong, access_key=Secret(b"ASIA" + b"A" * 16)),
            replace(wrong, secret_key=Secret(b"wrong")),
            replace(wrong, token=Secret(b"wrong")),
        ):
            await world.restart_egress(partial(replace, unknown))
            error = await refused(release(world, kms))
            assert error.code == "kms_no_credentials"
            assert known.token is not None
            assert known.token.expose().decode() not in str(error)
        await world.restart_egress()
        assert await release(world, kms) == Secret(PLAINTEXT), "what KMS has refused is not kept"


CREDENTIALS: dict[str, object] = {"access_key": "AKIA" + "A" * 16, "secret_key": "s", "token": None, "expires": None}
WRONG: dict[str, list[object]] = {
    "access_key": ["", "a b", "a\r\nX-Evil: b", b"bytes", None, "é"],
    "secret_key": ["", "a\n", 7],
    "token": ["", "a\r\nb", "a" * 8193],
    "expires": [-1, 1 << 63, "never"],
}
UNREADABLE = {
    "nothing": b"",
    "list": cbor2.dumps([]),
    "missing": cbor2.dumps({"access_key": "a"}, canonical=True),
    "more": cbor2.dumps({**CREDENTIALS, "x": 1}, canonical=True),
    **{
        f"{name}-{number}": cbor2.dumps({**CREDENTIALS, name: value}, canonical=True)
        for name, values in WRONG.items()
        for number, value in enumerate(values)
    },
    "long": bytes(20_000),
}


@pytest.mark.parametrize("data", UNREADABLE.values(), ids=UNREADABLE)
async def test_credentials_that_cannot_be_read(tmp_path: Path, data: bytes) -> None:
    async def given(call: IncomingCall) -> None:
        await call.reply({})
        await call.send(data, end=True)

    async with kms_world(tmp_path, egress=False) as world, world.kms(ONCE) as kms:
        world.handlers = {"credentials.get": given}
        await world.start_egress()
        error = await refused(release(world, kms))
        assert error.code == ("kms_no_credentials" if len(data) < 16_384 else "kms_unreachable")
        assert "Evil" not in str(error)


# --- Time -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("hours", [-7, 7, 24 * 400])
async def test_the_documents_time_decides_and_not_the_clock(tmp_path: Path, hours: int) -> None:
    """KMS and the module agree; this machine's clock, the host's, is off."""
    async with kms_world(tmp_path, ahead=timedelta(hours=hours)) as world, world.kms() as kms:
        world.issue = partial(lasting, world)
        assert await release(world, kms) == Secret(PLAINTEXT)
        assert await release(world, kms) == Secret(PLAINTEXT)


async def test_a_document_that_is_replayed_is_refused(world: World) -> None:
    async with world.kms() as kms:
        await release(world, kms)
        old = world.nsm.documents
        assert len(old) == 1
        world.emulator.skew = timedelta(minutes=6)  # for KMS, the document of this moment is an old one
        error = await refused(release(world, kms))
    assert error.code in ("kms_refused", "kms_no_credentials")


# --- Limits and the end -----------------------------------------------------------------------------------------------


async def test_a_full_queue_refuses(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kms_module, "THREADS", 2)
    monkeypatch.setattr(kms_module, "ABANDONED", 1)
    world.emulator.faults.inject(Delay(60), times=2)
    async with world.kms(ONCE) as kms:
        waiting = [asyncio.create_task(release(world, kms)) for _ in range(3)]
        await until(lambda: world.is_struck)
        assert (await refused(release(world, kms))).code == "overloaded"
        for task in waiting:
            task.cancel()
        await asyncio.gather(*waiting, return_exceptions=True)
        await until(lambda: kms._queued == 0)
        assert await release(world, kms) == Secret(PLAINTEXT)


async def test_a_caller_who_leaves_frees_the_thread(world: World) -> None:
    world.emulator.faults.inject(Delay(60), times=1)
    async with world.kms(Patience(attempt_seconds=3600, total_seconds=3600)) as kms:
        leaving = asyncio.create_task(release(world, kms))
        await until(lambda: world.is_struck)
        leaving.cancel()
        with pytest.raises(asyncio.CancelledError):
            await leaving
        await until(lambda: kms._queued == 0)


async def test_a_caller_who_leaves_ends_nobody_elses_request(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not even when its connection was given back a moment ago, and is in use again."""
    given_back, taken = threading.Event(), threading.Event()
    to_leave, to_answer = threading.Event(), threading.Event()
    give_back = HTTPSConnectionPool._put_conn

    def give_back_and_wait(pool: HTTPSConnectionPool, connection: Any) -> None:
        give_back(pool, connection)
        if not given_back.is_set():
            given_back.set()
            to_leave.wait()

    def wait(answer: Mapping[str, Any]) -> Mapping[str, Any]:
        taken.set()
        to_answer.wait()
        return answer

    monkeypatch.setattr(HTTPSConnectionPool, "_put_conn", give_back_and_wait)
    async with world.kms(ONCE) as kms:
        try:
            leaving = asyncio.create_task(release(world, kms))
            await until(given_back.is_set)
            world.emulator.faults.inject(Alter(wait), times=1)
            staying = asyncio.create_task(release(world, kms))
            await until(taken.is_set)
            leaving.cancel()
            with pytest.raises(asyncio.CancelledError):
                await leaving
            await asyncio.sleep(0)  # the stream's pump would have been told by now
            to_answer.set()
            assert await staying == Secret(PLAINTEXT)
            assert world.connections == 1
        finally:
            to_leave.set()
            to_answer.set()


async def test_the_end_ends_what_is_under_way(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kms_module, "THREADS", 1)
    world.emulator.faults.inject(Delay(60))
    kms = await asyncio.to_thread(
        Kms, world.settings(), Nsm(world.nsm), patience=Patience(attempt_seconds=3600, total_seconds=3600)
    )
    waiting = [asyncio.create_task(release(world, kms)) for _ in range(3)]
    await until(lambda: world.connections == 1)
    await kms.close()
    for task in waiting:
        assert (await refused(task)).code == "kms_unreachable"
    assert (await refused(release(world, kms))).code == "kms_unreachable"
    await kms.close()


async def test_an_end_before_the_beginning(tmp_path: Path) -> None:
    async with kms_world(tmp_path, egress=False) as world, world.kms():
        pass


def test_a_configured_authority_that_is_none(tmp_path: Path) -> None:
    nowhere = UnixAddress(str(tmp_path / "egress.sock"))
    settings = KmsSettings("us-east-1", TcpAddress(HOST, 443), nowhere, b"no certificate", None, None)
    with pytest.raises(StrongroomError) as caught:
        Kms(settings, software_nsm())
    assert caught.value.code == "bad_anchor"
