"""KMS, the parent and whoever stands between them at their worst, around an enclave that boots from an encrypted model
and opens prompts that waited. Each fault is a typed error that says what to do, and none a plaintext.

The house is whole and in one process; at the end it is one of real processes.
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import json
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric import rsa
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

from attestation.commitment import Evidence
from attestation.envelope import EnvelopeHeader, encryption_context
from attestation.reference import ZERO_PCR, once_extended
from attestation.rules import Require
from attestation.secret import Secret
from emulator.https import Cut
from emulator.kms_faults import GARBAGE, INTERNAL, THROTTLED, WITH_PLAINTEXT, Delay, another_key
from emulator.nsm import boot_registers
from enclave.kms.cms import CmsError, open_enveloped
from enclave.kms.errors import KmsError
from enclave.kms.service import Patience
from parent.credentials import Issued, NoCredentials
from parent.egress import Endpoint
from tests.canaries import where
from tests.engines import last_said
from tests.key_policies import ACCOUNT
from tests.kms_clients import kms_client, refused
from tests.kms_house import WEIGHTS_CANARY, KmsHouse, kms_house, served_kms_house, text_of
from tests.kms_world import HOST, ONCE, QUICK, Impostor, issued
from tests.sealing import FLOOR, MODEL, PROMPT
from vsockrpc.address import UnixAddress
from vsockrpc.transport import Fault, connect


@pytest.fixture
async def home(tmp_path: Path) -> AsyncIterator[KmsHouse]:
    async with kms_house(tmp_path) as opened:
        yield opened


async def fault(home: KmsHouse, envelope: bytes) -> str:
    """The clear fault that an envelope gets: the engine has heard nothing of it."""
    asked = len(home.behind.engine.requests)
    with pytest.raises(Fault) as caught:
        await home.bring(envelope)
    assert len(home.behind.engine.requests) == asked
    return caught.value.code


async def kms_error(home: KmsHouse, work: Awaitable[object]) -> KmsError:
    with pytest.raises(KmsError) as caught:
        await work
    return caught.value


# --- The way as it should be ------------------------------------------------------------------------------------------


async def test_a_house_boots_from_an_encrypted_model_and_answers_what_waited(home: KmsHouse) -> None:
    assert await home.ask("Why is the sky blue?") == "Why is the sky blue?"
    enclave = home.behind.enclave
    assert enclave.identity.model == home.behind.manifest.digest()
    # Three documents: for randomness, for the model's key and for the prompt's.
    assert len(home.world.nsm.documents) == 3
    assert len({document["public_key"] for document in home.world.nsm.documents}) == 1


async def test_64_prompts_at_once(home: KmsHouse) -> None:
    texts = [f"person {number}" for number in range(64)]
    assert await asyncio.gather(*map(home.ask, texts)) == texts
    assert home.world.given == 1, "credentials are fetched once"


async def test_through_the_parents_proxy(tmp_path: Path) -> None:
    import httpx2

    from vsockrpc.http import ANSWER_TYPE, ENVELOPE_PATH, ENVELOPE_TYPE

    async with served_kms_house(tmp_path) as (home, _, url), httpx2.AsyncClient(base_url=url) as client:

        async def post(envelope: bytes) -> Any:
            return await client.post(ENVELOPE_PATH, content=envelope, headers={"Content-Type": ENVELOPE_TYPE})

        envelope, reply = home.sealing().prompt("hello")
        said = await post(envelope)
        assert (said.status_code, said.headers["content-type"]) == (200, ANSWER_TYPE)
        assert text_of(said.content, reply) == "hello"
        older, _ = home.sealing().but(version=FLOOR - 1).prompt("hello")
        said = await post(older)
        assert (said.status_code, said.json()) == (403, {"fault": "not_released"})


# --- Trouble, at the boot and for a prompt ----------------------------------------------------------------------------


@dataclass(frozen=True)
class Trouble:
    spoil: Callable[[KmsHouse], Awaitable[None]]
    code: str
    words: str
    """Of what the operator is told."""
    fault: str = "unavailable"
    patience: Patience = QUICK


def injected(fault: Any, operation: str | None = None) -> Callable[[KmsHouse], Awaitable[None]]:
    async def inject(home: KmsHouse) -> None:
        home.world.emulator.faults.inject(fault, operation=operation)

    return inject


async def nobody_at_kms(home: KmsHouse) -> None:
    home.world.target = Endpoint("127.0.0.1", 1)
    await home.world.restart_egress()


async def not_on_the_list(home: KmsHouse) -> None:
    await home.world.stop_egress()
    await home.world.start_egress("another.test")


async def no_egress(home: KmsHouse) -> None:
    await home.world.stop_egress()


async def no_credentials(home: KmsHouse) -> None:
    def none() -> Issued:
        raise NoCredentials("attach a role to this instance")

    await with_credentials(home, none)


async def expired_credentials(home: KmsHouse) -> None:
    late = datetime.now(UTC) + timedelta(hours=2)
    await with_credentials(home, lambda: issued(home.world.principal(lifetime=timedelta(seconds=-1)), expires=late))


async def somebody_elses_credentials(home: KmsHouse) -> None:
    unknown = Secret(b"ASIA" + b"A" * 16)
    await with_credentials(home, lambda: replace(issued(home.world.principal()), access_key=unknown))


async def with_credentials(home: KmsHouse, issue: Callable[[], Issued]) -> None:
    await home.world.restart_egress(issue)
    for kms in home.made:
        kms._credentials._kept = None  # else what was fetched before would serve until it ends


async def a_policy_for_another_configuration(home: KmsHouse) -> None:
    home.open_keys(replace(home.policy, configuration=Require((b"\x77" * 48,))))


async def a_disabled_key(home: KmsHouse) -> None:
    for key in home.keys.values():
        found = home.world.emulator.kms.keys.find(key.text, account=key.account, region=key.region).key
        found.enabled, found.key_state = False, "Disabled"


ANOTHER_KEY = another_key(f"arn:aws:kms:us-east-1:{ACCOUNT}:key/00000000-0000-0000-0000-000000000000")
TROUBLE: dict[str, Trouble] = {
    "KMS unreachable": Trouble(nobody_at_kms, "kms_unreachable", "no way to KMS: no connection"),
    "not on the parent's list": Trouble(not_on_the_list, "kms_unreachable", "not on the parent's allow-list"),
    "no egress": Trouble(no_egress, "kms_unreachable", "nothing answers at"),
    "throttled": Trouble(injected(THROTTLED), "kms_throttled", "asked too often"),
    "slow": Trouble(
        injected(Delay(600)),
        "kms_timeout",
        "did not answer in time",
        patience=Patience(attempt_seconds=1.0, attempts=1),
    ),
    "an internal error": Trouble(injected(INTERNAL), "kms_failed", "KMS failed"),
    "cut off": Trouble(injected(Cut.WITHIN_ANSWER), "kms_unreachable", "broke"),
    "no credentials": Trouble(no_credentials, "kms_no_credentials", "attach a role to this instance"),
    "expired credentials": Trouble(expired_credentials, "kms_expired_credentials", "credentials have expired"),
    "unknown credentials": Trouble(somebody_elses_credentials, "kms_no_credentials", "the parent's credentials"),
    "a plaintext": Trouble(injected(WITH_PLAINTEXT), "kms_plaintext", "not encrypted to this enclave"),
    "garbage": Trouble(injected(GARBAGE), "kms_malformed", ""),
    "another key answers": Trouble(injected(ANOTHER_KEY, "Decrypt"), "kms_wrong_key", "another key", "not_released"),
    "denied": Trouble(
        a_policy_for_another_configuration, "kms_denied", "compare the key's policy with this", "not_released"
    ),
    "a disabled key": Trouble(a_disabled_key, "kms_unusable_key", "the key cannot be used", "not_released"),
}


@pytest.mark.parametrize("name", TROUBLE)
async def test_trouble_at_the_boot_halts_it_and_says_why(tmp_path: Path, name: str) -> None:
    trouble = TROUBLE[name]
    async with kms_house(tmp_path, started=False, patience=trouble.patience) as home:
        await trouble.spoil(home)
        halted = await home.behind.halt()
    assert (halted["phase"], halted["code"]) == ("MODEL_COMMITTED", trouble.code)
    assert trouble.words in halted["message"]
    assert WEIGHTS_CANARY.decode() not in json.dumps(halted)
    register = home.behind.enclave.nsm.describe_pcr(16)
    assert (register.data, register.lock) == (ZERO_PCR, False)


@pytest.mark.parametrize("name", TROUBLE)
async def test_trouble_for_a_prompt_is_a_clear_fault_and_no_more(tmp_path: Path, name: str) -> None:
    trouble = TROUBLE[name]
    async with kms_house(tmp_path, patience=trouble.patience) as home:
        envelope, _ = home.sealing().prompt("hello")
        await trouble.spoil(home)
        assert await fault(home, envelope) == trouble.fault
        totals = home.behind.enclave.log.totals
        assert (totals.kms, totals.refused) == ({trouble.code: 1}, 1)
        header, _ = EnvelopeHeader.split(envelope)
        error = await kms_error(
            home, home.kms.decrypt(header.wrapped, key=header.key, context=header.encryption_context)
        )
        assert error.code == trouble.code
        assert trouble.words in error.message


async def test_what_passes_has_harmed_nothing(home: KmsHouse) -> None:
    """The same envelope is answered when KMS is there again."""
    envelope, reply = home.sealing().prompt("hello")
    await nobody_at_kms(home)
    assert await fault(home, envelope) == "unavailable"
    home.world.target = None
    await home.world.restart_egress()
    assert text_of(await home.bring(envelope), reply) == "hello"
    home.world.emulator.faults.inject(THROTTLED, times=3)
    assert text_of(await home.bring(envelope), reply) == "hello"


async def test_a_denial_tells_what_to_compare(tmp_path: Path) -> None:
    """The encryption context that was asked for, and every register in use: a key policy may name any."""
    async with kms_house(tmp_path, started=False) as home:
        await a_policy_for_another_configuration(home)
        halted = await home.behind.halt()
        registers = boot_registers(home.policy.accepted_releases[0].pcrs)
        registers[17] = once_extended(home.behind.configuration.digest)
        assert registers.keys() == {0, 1, 2, 4, 17}
        assert halted["got"] == ", ".join(f"PCR{index} {registers[index].hex()}" for index in sorted(registers))
        assert halted["expected"] == str(encryption_context(MODEL, "tests", FLOOR))
        assert "kms:Decrypt" in halted["message"]


async def test_the_egress_killed_in_mid_call(home: KmsHouse) -> None:
    """Over another connection, with another document."""
    envelope, reply = home.sealing().prompt("hello")
    before = len(home.world.nsm.documents)
    home.world.emulator.faults.inject(Delay(600), times=1)
    bringing = asyncio.ensure_future(home.bring(envelope))
    while not home.world.is_struck:  # noqa: ASYNC110 - KMS is on another thread
        await asyncio.sleep(0.001)
    home.world.kill_egress()
    assert text_of(await bringing, reply) == "hello"
    assert len(home.world.nsm.documents) == before + 2


async def test_the_egress_killed_in_mid_call_for_good(tmp_path: Path) -> None:
    async with kms_house(tmp_path, patience=ONCE) as home:
        envelope, reply = home.sealing().prompt("hello")
        home.world.emulator.faults.inject(Delay(600), times=1)
        bringing = asyncio.ensure_future(fault(home, envelope))
        while not home.world.is_struck:  # noqa: ASYNC110 - KMS is on another thread
            await asyncio.sleep(0.001)
        home.world.kill_egress()
        assert await bringing == "unavailable"
        assert home.behind.enclave.log.totals.kms == {"kms_unreachable": 1}
        assert text_of(await home.bring(envelope), reply) == "hello"


async def test_the_egress_killed_in_mid_boot(tmp_path: Path) -> None:
    async with kms_house(tmp_path, started=False) as home:
        home.world.emulator.faults.inject(Delay(600), operation="Decrypt", times=1)
        booting = asyncio.ensure_future(home.behind.start())
        while not home.world.is_struck:  # noqa: ASYNC110 - KMS is on another thread
            await asyncio.sleep(0.001)
        home.world.kill_egress()
        await booting
        assert await home.ask("hello") == "hello"
        await home.behind.stop()


# --- Time -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("hours", [-7, 7, 24 * 400])
async def test_a_hosts_clock_that_is_hours_off_does_not_matter(tmp_path: Path, hours: int) -> None:
    """KMS and the NSM agree; the host's clock is another matter."""
    async with kms_house(tmp_path, started=False, ahead=timedelta(hours=hours)) as home:
        home.world.issue = lambda: replace(issued(home.world.principal()), expires=2e10)
        await home.behind.start()
        assert await home.ask("hello") == "hello"
        await home.behind.stop()


@pytest.mark.parametrize("hours", [-1, 1, 7])
async def test_an_nsm_whose_clock_is_hours_off_gets_nothing(home: KmsHouse, hours: int) -> None:
    """KMS takes no signature of another time, nor a document."""
    envelope, _ = home.sealing().prompt("hello")
    header, _ = EnvelopeHeader.split(envelope)
    await with_credentials(home, lambda: replace(issued(home.world.principal()), expires=2e10))
    home.world.nsm_ahead = timedelta(hours=hours)
    assert await fault(home, envelope) == "unavailable"
    error = await kms_error(home, home.kms.decrypt(header.wrapped, key=header.key, context=header.encryption_context))
    assert error.code == "kms_no_credentials"
    assert "at the NSM's time" in error.message


# --- Whoever stands between -------------------------------------------------------------------------------------------


@contextlib.asynccontextmanager
async def impostor(home: KmsHouse) -> AsyncIterator[None]:
    """On the parent, at the end of the tunnel: TLS by another authority, to which no request may come."""
    there = Impostor()
    home.world.target = there.endpoint
    await home.world.restart_egress()
    try:
        yield
    finally:
        there.close()
    assert home.world.connections > 0, "it was at the end of the tunnel"
    assert there.asked == []


async def test_a_man_in_the_middle_on_the_parent(tmp_path: Path) -> None:
    async with kms_house(tmp_path, started=False) as home, impostor(home):
        halted = await home.behind.halt()
        assert (halted["code"], halted["phase"]) == ("kms_tls", "MODEL_COMMITTED")
        assert "cannot show to be KMS" in halted["message"]


async def test_a_man_who_comes_later(home: KmsHouse) -> None:
    envelope, _ = home.sealing().prompt("hello")
    async with impostor(home):
        assert await fault(home, envelope) == "unavailable"
        assert home.behind.enclave.log.totals.kms == {"kms_tls": 1}


async def test_a_document_in_the_parents_hands(home: KmsHouse) -> None:
    """It has credentials that KMS knows, a document of the enclave's own and the envelope. What it gets for them opens
    for nobody but the enclave.
    """
    envelope, _ = home.sealing().prompt("hello")
    header, _ = EnvelopeHeader.split(envelope)
    asked = {
        "KeyId": header.key.text,
        "CiphertextBlob": header.wrapped,
        "EncryptionContext": header.encryption_context,
    }
    document = (await asyncio.to_thread(home.kms._attest)).encoded
    home.world.nsm_ahead = timedelta(minutes=-6)
    old = (await asyncio.to_thread(home.kms._attest)).encoded
    home.world.nsm_ahead = timedelta(0)
    async with connect(home.behind.address) as rpc, rpc.call("evidence", {"nonce": bytes(32)}) as call:
        evidence = Evidence.decode(await call.read(1 << 20))

    def recipient(document: bytes) -> dict[str, object]:
        return {"KeyEncryptionAlgorithm": "RSAES_OAEP_SHA_256", "AttestationDocument": document}

    def replay() -> Mapping[str, Any]:
        with kms_client(home.world.emulator, home.world.principal()) as client:
            with refused("AccessDeniedException"):
                client.decrypt(**asked)
            with refused("ValidationException", "no public key"):
                client.decrypt(**asked, Recipient=recipient(evidence.document))
            own = rsa_key().public_key().public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)
            changed = document.replace(home.kms._recipient, own)
            assert changed != document
            with refused("ValidationException", "not authentic"):
                client.decrypt(**asked, Recipient=recipient(changed))
            with refused("ValidationException", "not within 5 minutes"):
                client.decrypt(**asked, Recipient=recipient(old))
            answer: Mapping[str, Any] = client.decrypt(**asked, Recipient=recipient(document))
        return answer

    answer = await asyncio.to_thread(replay)
    assert "Plaintext" not in answer
    for key in (rsa_key(), rsa_key()):
        with pytest.raises(CmsError):
            open_enveloped(answer["CiphertextForRecipient"], key)
    assert len(open_enveloped(answer["CiphertextForRecipient"], home.kms._key)) == 32


def rsa_key() -> rsa.RSAPrivateKey:
    return rsa.generate_private_key(65537, 2048)


# --- Wrapped keys out of their place ----------------------------------------------------------------------------------

MOVED: dict[str, tuple[Callable[[KmsHouse, Any], dict[str, Any]], str, bool]] = {
    "swapped with another key's of the account": (
        lambda home, purpose: {"wrapped_by": home.another_key(purpose)},
        "kms_wrong_key",
        True,
    ),
    "of another key, and says so": (lambda home, purpose: {"key": home.another_key(purpose)}, "wrong_key", False),
    "of the other purpose's key": (
        lambda home, purpose: {"key": home.keys[PROMPT if purpose is MODEL else MODEL]},
        "wrong_key",
        False,
    ),
    "moved from another context": (
        lambda home, purpose: {"wrapped_under": encryption_context(purpose, "production", FLOOR)},
        "kms_wrong_context",
        True,
    ),
    "moved from another purpose": (
        lambda home, purpose: {
            "wrapped_under": encryption_context(PROMPT if purpose is MODEL else MODEL, "tests", FLOOR)
        },
        "kms_wrong_context",
        True,
    ),
    "of another context, and says so": (lambda home, purpose: {"context": "production"}, "wrong_context", False),
    "older than the floor": (lambda home, purpose: {"version": FLOOR - 1}, "rolled_back", False),
    "older, under a newer number": (
        lambda home, purpose: {"wrapped_under": encryption_context(purpose, "tests", FLOOR - 1)},
        "kms_wrong_context",
        True,
    ),
}


@pytest.mark.parametrize("name", MOVED)
async def test_a_models_wrapped_key_out_of_its_place(tmp_path: Path, name: str) -> None:
    changed, code, asked = MOVED[name]
    async with kms_house(tmp_path, started=False) as home:
        home.encrypt(**changed(home, MODEL))
        halted = await home.behind.halt()
        assert (halted["phase"], halted["code"]) == ("MODEL_COMMITTED", code)
        assert len(home.world.nsm.documents) == 1 + asked, "KMS is asked for nothing that is not configured"


async def test_a_prompts_wrapped_key_out_of_its_place(home: KmsHouse) -> None:
    for name, (changed, _, asked) in MOVED.items():
        before = len(home.world.nsm.documents)
        envelope, _ = home.sealing().but(**changed(home, PROMPT)).prompt("hello")
        assert await fault(home, envelope) == "not_released", name
        assert len(home.world.nsm.documents) == before + asked, name
    said = Counter(code for _, code, asked in MOVED.values() if asked)
    assert home.behind.enclave.log.totals.kms == said
    assert await home.ask("hello") == "hello"


async def test_a_prompt_for_another_enclave_under_the_same_key(home: KmsHouse) -> None:
    """KMS releases to each of them; the terms name another."""
    for changed in ({"models": (bytes(48),)}, {"configurations": (bytes(48),)}):
        envelope, _ = home.sealing().but(**changed).prompt("hello")
        assert await fault(home, envelope) == "not_released"


# --- What the parent holds --------------------------------------------------------------------------------------------


class Tap:
    """A relay that keeps every byte in both directions."""

    def __init__(self, dial: Callable[[], Awaitable[tuple[asyncio.StreamReader, asyncio.StreamWriter]]]) -> None:
        self.recorded = bytearray()
        self._dial = dial

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        there, back = await self._dial()
        async with asyncio.TaskGroup() as group:
            group.create_task(self._carry(reader, back))
            group.create_task(self._carry(there, writer))

    async def _carry(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(ConnectionError):
            while data := await reader.read(65_536):
                self.recorded += data
                writer.write(data)
                await writer.drain()
        writer.close()


@dataclass
class Tapped:
    home: KmsHouse
    rpc: Tap
    """Between the enclave and the egress."""
    tcp: Tap
    """Between the egress and KMS."""


@contextlib.asynccontextmanager
async def tapped_house(directory: Path) -> AsyncIterator[Tapped]:
    way = UnixAddress(str(directory / "tap.sock"))
    async with kms_house(directory, started=False, egress=way) as home:
        rpc = Tap(lambda: asyncio.open_unix_connection(home.world.address.path))
        tcp = Tap(lambda: asyncio.open_connection("127.0.0.1", home.world.emulator.port))
        async with (
            await asyncio.start_unix_server(rpc.serve, way.path),
            await asyncio.start_server(tcp.serve, "127.0.0.1", 0) as to_kms,
        ):
            home.world.target = Endpoint("127.0.0.1", to_kms.sockets[0].getsockname()[1])
            await home.world.restart_egress()
            await home.behind.start()
            try:
                yield Tapped(home, rpc, tcp)
            finally:
                await home.behind.stop()
                await home.world.stop_egress()


async def test_the_parent_holds_no_plaintext(tmp_path: Path) -> None:
    """Weights, data keys, prompts and answers: in none of the bytes that pass the parent, and in nothing that it keeps.
    The same search finds each where it belongs.
    """
    prompt, said = "canary-in-the-prompt-7f3a91c4", "canary-in-the-answer-0b77d2e1"
    async with tapped_house(tmp_path) as tapped:
        home = tapped.home
        home.behind.engine.say = said
        model = home.sealing(MODEL)
        home.encrypt(data_key=model.data_key)
        await home.behind.restart()
        home.behind.engine.say = said
        sealing = home.sealing()
        envelope, reply = sealing.prompt(prompt)
        answer = await home.bring(envelope)
        assert text_of(answer, reply) == said
        assert [last_said(each) for each in home.behind.engine.requests] == [prompt]
        home.behind.enclave.log.close_interval()
        held = {
            "RPC": bytes(tapped.rpc.recorded),
            "TCP": bytes(tapped.tcp.recorded),
            "envelope": envelope,
            "answer": answer,
            "store": home.behind._store.path.read_bytes(),
            "events": "\n".join(home.behind.enclave.log._recent).encode(),
        }
        assert len(held["RPC"]) > len(held["TCP"]) > 10_000
        assert HOST.encode() in held["TCP"], "the name that TLS asks for"
        texts = [prompt, said, WEIGHTS_CANARY.decode()]
        keys = [model.data_key, sealing.data_key, reply.secret.expose()]
        assert where(texts[2:], home.behind.weights)
        for what, haystack in held.items():
            assert where(texts, haystack) == [], what
            for key in keys:
                assert not any(shape in haystack for shape in shapes_of(key)), what
    for path in tmp_path.rglob("*"):
        if path.is_file():
            assert where(texts, path.read_bytes()) == [], path


def shapes_of(key: bytes) -> list[bytes]:
    return [key, key[::-1], key.hex().encode(), key.hex().upper().encode(), base64.b64encode(key).rstrip(b"=")]
