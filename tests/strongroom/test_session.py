"""The session: what leaves, when, and what becomes of it when the proxy, the network or the clock is against it."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
from collections.abc import AsyncIterator, Callable, Mapping
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime, timedelta
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from attestation.chain import Anchor
from attestation.checks import KEY_STEPS, Status
from attestation.envelope import EnvelopePurpose
from attestation.errors import AppraisalError, EvidenceError, PolicyError, StrongroomError
from attestation.keypolicy.document import KeyArn
from attestation.keyrelease import KeyFacts
from attestation.policy import AppraisalPolicy
from attestation.reference import PcrSet
from attestation.rules import Require
from emulator.kms_endpoint import kms_emulator
from emulator.pki import DevelopmentRoot
from enclave.generation import AnswerExceeded, ContextExceeded, EngineFailed, Overloaded
from strongroom import proxy_client
from strongroom.kms import client as kms_client
from strongroom.kms.client import KmsError
from strongroom.proxy_client import ClearFault, ProxyClient, Unreachable
from strongroom.session import EnclaveRestarted, RequestFailed, Session
from tests import kms_clients
from tests.house import SETTINGS, Forged, House, ask, house, prompt, served
from tests.key_facts import KEYS, all_facts, facts, with_keys
from tests.key_policies import MODEL, PROMPT, allow
from vsockrpc.chat import CompletionRequest
from vsockrpc.http import EVIDENCE_PATH, EVIDENCE_TYPE, SEALED_PATH
from vsockrpc.messages import Counted, Delta, Description, Done, Start, Usage, encode_message
from vsockrpc.sealed import ANSWER_SALT_SIZE, HEADER_SIZE, TAG_SIZE, SealedError

RECORD = 512 + HEADER_SIZE + TAG_SIZE
FAULT_TYPE = "application/json"
ELSE = PcrSet(b"\xaa" * 48, b"\xbb" * 48, b"\xcc" * 48)
"""Another image."""


@dataclass
class Clocks:
    """A client's two clocks, under a test's control."""

    monotonic: float = 1000.0
    skew: timedelta = field(default_factory=timedelta)

    def read(self) -> float:
        return self.monotonic

    def now(self) -> datetime:
        return datetime.now(UTC) + self.skew


@contextlib.asynccontextmanager
async def clocked(home: House, clocks: Clocks, policy: AppraisalPolicy | None = None) -> AsyncIterator[Session]:
    async with Session(home.url, policy or home.policy, monotonic=clocks.read, now=clocks.now) as session:
        yield session


# --- How long a verdict is kept ------------------------------------------------------------------------------------


async def test_an_answer_streams_from_start_to_done(session: Session) -> None:
    answers = [answer async for answer in session.chat(prompt("what is said comes back"))]
    assert answers[0] == Start("tiny")
    assert "".join(answer.content for answer in answers if isinstance(answer, Delta)) == "what is said comes back"
    assert isinstance(answers[-1], Done)
    assert [type(answer) for answer in answers].count(Done) == 1


async def test_a_result_is_reused_while_it_is_valid(home: House, session: Session) -> None:
    for number in range(3):
        assert (await ask(session, f"question {number}"))[0] == f"question {number}"
    assert home.hostile.paths() == [EVIDENCE_PATH, SEALED_PATH, SEALED_PATH, SEALED_PATH]


async def test_a_result_expires_on_the_monotonic_clock_and_not_before(home: House) -> None:
    clocks = Clocks()
    async with clocked(home, clocks) as session:
        valid = (await session.verify()).valid_seconds
        clocks.monotonic += valid - 1
        first = await session.result()
        clocks.monotonic += 2
        second = await session.result()
    assert first is not second
    assert home.hostile.paths() == [EVIDENCE_PATH] * 2


async def test_validity_counts_from_the_request_not_from_its_answer(home: House) -> None:
    clocks = Clocks()
    dawdled = 100.0

    def dawdle(path: str, count: int) -> None:
        clocks.monotonic += dawdled

    home.hostile.on_request = dawdle
    async with clocked(home, clocks) as session:
        result = await session.verify()
        clocks.monotonic += result.valid_seconds - dawdled
        assert await session.result() is not result


async def test_the_lifetime_of_a_key_bounds_its_result(tmp_path: Path) -> None:
    settings = SETTINGS.replace("lifetime_seconds = 600", "lifetime_seconds = 7")
    async with house(tmp_path, settings) as home, home.session() as session:
        assert (await session.verify()).valid_seconds == 7


async def test_many_who_need_a_result_at_once_share_one_verification(home: House, session: Session) -> None:
    answers = await asyncio.gather(*(ask(session, f"question {number}") for number in range(40)))
    assert [text for text, _ in answers] == [f"question {number}" for number in range(40)]
    assert home.hostile.paths().count(EVIDENCE_PATH) == 1


async def test_leaving_a_shared_verification_does_not_spoil_it_for_the_others(home: House, session: Session) -> None:
    first = asyncio.ensure_future(session.result())
    second = asyncio.ensure_future(session.result())
    await asyncio.sleep(0)
    first.cancel()
    assert (await second).release == "test"
    assert home.hostile.paths() == [EVIDENCE_PATH]


async def test_a_new_verification_that_fails_leaves_no_old_result_behind(home: House, session: Session) -> None:
    await session.verify()
    home.hostile.on_request = lambda path, count: (503, FAULT_TYPE, b'{"fault": "unavailable"}')
    with pytest.raises(ClearFault):
        await session.verify()
    with pytest.raises(ClearFault):
        await ask(session, "secret")
    assert SEALED_PATH not in home.hostile.paths()


# --- Keys that come and go -----------------------------------------------------------------------------------------


async def test_a_restarted_enclave_is_verified_anew(home: House, session: Session) -> None:
    before = await session.verify()
    await home.behind.restart()
    with pytest.raises(EnclaveRestarted):  # whether the boot before has begun on it, nobody can tell
        await ask(session, "hello")
    assert home.hostile.paths() == [EVIDENCE_PATH, SEALED_PATH, EVIDENCE_PATH]
    assert (await ask(session, "hello"))[0] == "hello"
    after = await session.result()
    assert after.commitment.boot_id != before.commitment.boot_id
    assert home.hostile.paths() == [EVIDENCE_PATH, SEALED_PATH, EVIDENCE_PATH, SEALED_PATH]


async def test_a_restarted_enclave_that_the_policy_refuses_gets_nothing_more(home: House, session: Session) -> None:
    await session.verify()
    await home.behind.restart()
    session.policy = replace(home.policy, model=Require((bytes(48),)))
    with pytest.raises(AppraisalError) as caught:
        await ask(session, "hello")
    assert caught.value.code == "wrong_model"
    assert home.engine.requests == []


async def test_a_rotated_key_is_accepted_to_the_end_of_its_lifetime(home: House, session: Session) -> None:
    skipped = 0.0
    identity = home.behind.enclave.identity
    real = identity.clock
    identity.clock = lambda: real() + skipped
    old = (await session.verify()).commitment.key_id
    skipped = 301.0
    assert (await ask(session, "with the old key"))[0] == "with the old key"
    assert (await session.result()).commitment.key_id == old
    skipped = 901.0
    assert (await ask(session, "with a new key"))[0] == "with a new key"
    assert (await session.result()).commitment.key_id != old
    assert home.hostile.paths().count(EVIDENCE_PATH) == 2


async def test_what_was_taken_back_is_refused_at_the_next_verification(home: House) -> None:
    """A session may live for weeks; the policy that it was opened with need not."""
    changed: list[AppraisalPolicy] = []
    reread = 0

    def read() -> AppraisalPolicy:
        nonlocal reread
        reread += 1
        return changed[-1] if changed else home.policy

    async with Session(home.url, home.policy, reread=read) as session:
        first = await session.verify()
        assert reread == 0
        changed.append(replace(home.policy, model=Require((bytes(48),))))
        assert await session.result() is first
        with pytest.raises(AppraisalError):
            await session.result(instead_of=first)
        assert reread == 1
        changed.append(home.policy)
        assert (await ask(session, "accepted again"))[0] == "accepted again"


async def test_a_policy_that_cannot_be_read_ends_the_session(home: House) -> None:
    def broken() -> AppraisalPolicy:
        raise PolicyError("unreadable_policy", "a test")

    async with Session(home.url, home.policy, reread=broken) as session:
        await session.verify()
        with pytest.raises(PolicyError):
            await session.verify()
        with pytest.raises(PolicyError):
            await ask(session, "nothing of this leaves")


async def test_a_full_replay_set_costs_one_verification_and_no_prompt(tmp_path: Path) -> None:
    settings = SETTINGS.replace("[channel]", "[channel]\nmax_requests = 2")
    async with house(tmp_path, settings) as home, home.session() as session:
        for number in range(5):
            assert (await ask(session, f"question {number}"))[0] == f"question {number}"
        assert home.hostile.paths().count(EVIDENCE_PATH) == 3
        assert len(home.engine.requests) == 5


# --- Forged clear faults -------------------------------------------------------------------------------------------


async def test_unknown_key_leads_to_one_new_attempt_and_never_a_third(home: House, session: Session) -> None:
    def refuse(path: str, count: int) -> Forged | None:
        return (409, FAULT_TYPE, b'{"fault": "unknown_key"}') if path == SEALED_PATH else None

    home.hostile.on_request = refuse
    with pytest.raises(ClearFault) as caught:
        await ask(session, "secret")
    assert caught.value.code == "unknown_key"
    assert home.hostile.paths() == [EVIDENCE_PATH, SEALED_PATH] * 2


async def test_a_forged_unknown_key_changes_neither_verdict_nor_parameters(home: House, session: Session) -> None:
    def refuse(path: str, count: int) -> Forged | None:
        return (409, FAULT_TYPE, b'{"fault": "unknown_key"}') if path == SEALED_PATH and count == 1 else None

    home.hostile.on_request = refuse
    answers = [answer async for answer in session.chat(replace(prompt("hello"), max_tokens=7, seed=5))]
    assert isinstance(answers[-1], Done)
    [request] = home.engine.requests
    assert (request.max_tokens, request.seed, request.temperature) == (7, 5, 0.0)
    assert (await session.result()).release == "test"


async def test_a_fault_forged_in_mid_work_never_runs_the_prompt_twice(home: House, session: Session) -> None:
    home.hostile.forge_after = (409, FAULT_TYPE, b'{"fault": "unknown_key"}')
    with pytest.raises(RequestFailed) as caught:
        await ask(session, "pay 100 to Mallory")
    assert caught.value.code == "duplicate_request"
    assert home.engine.requests == [prompt("pay 100 to Mallory")]
    assert home.hostile.paths() == [EVIDENCE_PATH, SEALED_PATH] * 2


@pytest.mark.parametrize("fault", ["overloaded", "unavailable", "malformed"])
async def test_other_clear_faults_end_a_request_at_once(home: House, session: Session, fault: str) -> None:
    await session.verify()
    home.hostile.on_request = lambda path, count: (503, FAULT_TYPE, json.dumps({"fault": fault}).encode())
    with pytest.raises(ClearFault) as caught:
        await ask(session, "secret")
    assert (caught.value.code, caught.value.exit_code) == (fault, 4)
    assert home.hostile.paths() == [EVIDENCE_PATH, SEALED_PATH]


NOT_STRONGROOM = {
    "html": (200, "text/html", b"<html>Please log in</html>"),
    "html error": (502, "text/html", b"<html>Bad Gateway</html>"),
    "redirect": (302, "text/plain", b""),
    "another fault": (503, FAULT_TYPE, b'{"fault": "try_plaintext"}'),
    "a fault that is no text": (503, FAULT_TYPE, b'{"fault": ["unknown_key"]}'),
    "a fault that is no map": (503, FAULT_TYPE, b'["unknown_key"]'),
    "nested": (503, FAULT_TYPE, b"[" * 4000),
    "huge": (503, FAULT_TYPE, b'{"fault": "unknown_key", "x": "' + bytes(1 << 20) + b'"}'),
    "not UTF-8": (503, FAULT_TYPE, b"\xff\xfe\xfd"),
    "empty": (500, FAULT_TYPE, b""),
    "no content": (204, FAULT_TYPE, b""),
}


@pytest.mark.parametrize("path", [EVIDENCE_PATH, SEALED_PATH])
@pytest.mark.parametrize("answer", NOT_STRONGROOM.values(), ids=NOT_STRONGROOM.keys())
async def test_what_is_no_proxy_is_said_to_be_none(home: House, session: Session, path: str, answer: Forged) -> None:
    home.hostile.on_request = lambda where, count: answer if where == path else None
    with pytest.raises(Unreachable) as caught:
        await ask(session, "secret")
    assert (caught.value.code, caught.value.exit_code) == ("not_strongroom", 4)


async def test_evidence_that_is_too_large_is_not_read_to_its_end(home: House, session: Session) -> None:
    home.hostile.on_request = lambda path, count: (200, EVIDENCE_TYPE, bytes(1 << 20))
    with pytest.raises(Unreachable) as caught:
        await session.verify()
    assert caught.value.code == "not_strongroom"


async def test_evidence_that_drips_is_given_up(monkeypatch: pytest.MonkeyPatch, home: House, session: Session) -> None:
    never = asyncio.Event()

    async def silent(*_: object) -> None:
        await never.wait()

    monkeypatch.setattr(proxy_client, "EVIDENCE_SECONDS", 0.01)
    home.hostile.application = silent
    with pytest.raises(Unreachable) as caught:
        await session.verify()
    never.set()
    assert caught.value.got == "TimeoutError"


async def test_an_answer_of_no_bytes(home: House) -> None:
    async def nothing(scope: Any, receive: Any, send: Any) -> None:
        headers = [(b"content-type", EVIDENCE_TYPE.encode())]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        await send({"type": "http.response.body"})

    home.hostile.application = nothing
    async with ProxyClient(home.url) as proxy:
        with pytest.raises(Unreachable) as caught:
            await proxy.evidence(bytes(32))
    assert caught.value.code == "not_strongroom"


def test_an_address_is_written_down_without_its_password() -> None:
    assert ProxyClient("http://me:secret@[::1]:8080/x").public_url == "http://[::1]:8080/x"
    assert ProxyClient("http://127.0.0.1:8080/").public_url == "http://127.0.0.1:8080"


async def test_nobody_at_the_address(tmp_path: Path) -> None:
    async with house(tmp_path) as home:
        url = home.url
    async with Session(url, home.policy) as session:
        with pytest.raises(Unreachable) as caught:
            await session.verify()
    assert (caught.value.code, caught.value.exit_code) == ("unreachable", 4)


@pytest.mark.parametrize(
    "url",
    ["", "127.0.0.1:8080", "ftp://127.0.0.1", "http://", "http://[::1", "http://h:99999", "http://h:x", "unix:/x"],
)
async def test_what_is_no_url_is_the_callers_mistake(home: House, url: str) -> None:
    with pytest.raises(Unreachable) as caught:
        Session(url, home.policy)
    assert (caught.value.code, caught.value.exit_code) == ("bad_url", 2)


async def test_a_proxy_of_the_environment_is_not_asked_about_this_machine(
    monkeypatch: pytest.MonkeyPatch, home: House
) -> None:
    for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    async with home.session() as session:
        assert (await session.verify()).release == "test"


# --- Nothing before the verdict ------------------------------------------------------------------------------------


async def test_nothing_of_a_prompt_leaves_when_the_policy_refuses(home: House) -> None:
    policy = replace(home.policy, configuration=Require((bytes(48),)))
    async with Session(home.url, policy) as session:
        for _ in range(2):
            with pytest.raises(AppraisalError) as caught:
                await ask(session, "CANARY")
            assert caught.value.code == "wrong_configuration"
    assert [method for method, _, _ in home.hostile.requests] == ["GET", "GET"]
    assert all(body == b"" for _, _, body in home.hostile.requests)


async def test_another_anchor_proves_nothing(home: House) -> None:
    other = Anchor.emulated(DevelopmentRoot.generate(datetime.now(UTC)).certificate_der)
    async with Session(home.url, replace(home.policy, anchor=other)) as session:
        with pytest.raises(EvidenceError) as caught:
            await ask(session, "CANARY")
    assert caught.value.code == "untrusted_chain"
    assert home.hostile.paths() == [EVIDENCE_PATH]


async def test_what_passes_the_proxy_is_ciphertext_of_one_size(home: House, session: Session) -> None:
    for text in ("CANARY", "CANARY " * 20):
        assert (await ask(session, text))[0] == text
    sizes = {len(body) for method, _, body in home.hostile.requests if method == "POST"}
    assert len(sizes) == 1
    seen = b"".join([body for _, _, body in home.hostile.requests] + [body for _, body in home.hostile.answers])
    assert b"CANARY" not in seen


async def test_old_evidence_does_not_answer_a_new_nonce(home: House, session: Session) -> None:
    await session.verify()
    old = bytes(home.hostile.answers[0][1])
    home.hostile.on_answer = lambda path, body: old if path == EVIDENCE_PATH else body
    with pytest.raises(EvidenceError) as caught:
        await session.verify()
    assert caught.value.code == "wrong_nonce"
    with pytest.raises(EvidenceError):
        await ask(session, "CANARY")
    assert SEALED_PATH not in home.hostile.paths()


async def test_altered_evidence_is_refused(home: House, session: Session) -> None:
    for position in (0, 10, 2000, -1):

        def alter(path: str, body: bytes, position: int = position) -> bytes:
            altered = bytearray(body)
            altered[position] ^= 1
            return bytes(altered)

        home.hostile.on_answer = alter
        with pytest.raises(EvidenceError):
            await session.verify()


# --- KMS keys: neither verdict without the other --------------------------------------------------------------------


@dataclass
class Kms:
    """What KMS says, under a test's control, and how often it was asked."""

    says: Callable[[AppraisalPolicy], Mapping[KeyArn, KeyFacts]] = all_facts
    asked: list[AppraisalPolicy] = field(default_factory=list)

    def __call__(self, policy: AppraisalPolicy) -> Mapping[KeyArn, KeyFacts]:
        self.asked.append(policy)
        return self.says(policy)


def with_an_open_key(policy: AppraisalPolicy) -> Mapping[KeyArn, KeyFacts]:
    [purpose] = policy.kms
    return {KEYS[purpose]: facts(policy, purpose, more=[allow("kms:Decrypt")])}


def unreachable(policy: AppraisalPolicy) -> Mapping[KeyArn, KeyFacts]:
    raise KmsError("kms_unavailable", "a test")


@pytest.mark.parametrize("purposes", [[MODEL], [PROMPT], [MODEL, PROMPT]])
async def test_a_prompt_leaves_when_both_verdicts_pass(home: House, purposes: list[EnvelopePurpose]) -> None:
    kms = Kms()
    async with Session(home.url, with_keys(home.policy, *purposes), ask_of_keys=kms) as session:
        assert (await ask(session, "hello"))[0] == "hello"
        result = await session.result()
    assert [check.step for check in result.checks if check.step > 15] == list(KEY_STEPS) * len(purposes)
    assert len(kms.asked) == 1


@pytest.mark.parametrize("purpose", [MODEL, PROMPT])
async def test_a_key_alone_refuses(home: House, purpose: EnvelopePurpose) -> None:
    async with Session(home.url, with_keys(home.policy, purpose), ask_of_keys=Kms(with_an_open_key)) as session:
        for _ in range(2):
            with pytest.raises(AppraisalError) as caught:
                await ask(session, "CANARY")
            failed = [check.code for check in caught.value.checks if check.status is Status.FAILED]
            assert failed == [caught.value.code] == ["open_key_policy"]
    assert_only_challenged(home, 2)


async def test_the_evidence_alone_refuses(home: House) -> None:
    policy = with_keys(replace(home.policy, releases=(replace(home.policy.accepted_releases[0], pcrs=ELSE),)), PROMPT)
    async with Session(home.url, policy, ask_of_keys=Kms()) as session:
        with pytest.raises(AppraisalError) as caught:
            await ask(session, "CANARY")
        failed = [check.code for check in caught.value.checks if check.status is Status.FAILED]
        assert failed == [caught.value.code] == ["wrong_image"]
        home.hostile.on_answer = lambda path, body: body[:-1]
        with pytest.raises(EvidenceError):
            await ask(session, "CANARY")
    assert_only_challenged(home, 2)


def assert_only_challenged(home: House, times: int) -> None:
    assert [(method, path) for method, path, _ in home.hostile.requests] == [("GET", EVIDENCE_PATH)] * times
    assert all(body == b"" for _, _, body in home.hostile.requests)
    assert home.engine.requests == []


async def test_nothing_leaves_while_kms_cannot_be_asked(home: House) -> None:
    kms = Kms(unreachable)
    async with Session(home.url, with_keys(home.policy, PROMPT), ask_of_keys=kms) as session:
        for _ in range(2):
            with pytest.raises(KmsError) as caught:
                await ask(session, "CANARY")
            assert (caught.value.code, caught.value.exit_code) == ("kms_unavailable", 4)
        assert home.hostile.requests == []
        kms.says = all_facts
        assert (await ask(session, "hello"))[0] == "hello"


async def test_nothing_leaves_when_kms_was_asked_about_another_key(home: House) -> None:
    for says, code in (
        (lambda policy: {}, "key_facts_missing"),
        (lambda policy: {KEYS[MODEL]: facts(policy, MODEL)}, "key_facts_missing"),
        (lambda policy: {KEYS[PROMPT]: facts(policy, PROMPT, arn=KEYS[MODEL])}, "wrong_key"),
    ):
        async with Session(home.url, with_keys(home.policy, PROMPT), ask_of_keys=Kms(says)) as session:
            with pytest.raises(StrongroomError) as caught:
                await ask(session, "CANARY")
            assert caught.value.code == code
    assert_only_challenged(home, 3)


async def test_kms_is_asked_anew_at_each_verification(home: House) -> None:
    """A key that was opened since the last one is found by the next, and a prompt waits for it."""
    clocks, kms = Clocks(), Kms()
    policy = with_keys(home.policy, PROMPT)
    async with Session(home.url, policy, monotonic=clocks.read, now=clocks.now, ask_of_keys=kms) as session:
        for number in range(3):
            assert (await ask(session, f"question {number}"))[0] == f"question {number}"
        assert len(kms.asked) == 1
        await session.verify()
        assert len(kms.asked) == 2
        kms.says = with_an_open_key
        assert (await ask(session, "within the result's time"))[0] == "within the result's time"
        clocks.monotonic += (await session.result()).valid_seconds
        before = len(home.engine.requests)
        with pytest.raises(AppraisalError) as caught:
            await ask(session, "CANARY")
        assert caught.value.code == "open_key_policy"
        assert len(home.engine.requests) == before
        assert len(kms.asked) == 3
        await home.behind.restart()
        kms.says = all_facts
        assert (await ask(session, "hello"))[0] == "hello"
        assert len(kms.asked) == 4


async def test_what_kms_said_counts_from_when_it_was_asked(home: House) -> None:
    clocks, dawdled = Clocks(), 100.0

    def dawdle(policy: AppraisalPolicy) -> Mapping[KeyArn, KeyFacts]:
        clocks.monotonic += dawdled
        return all_facts(policy)

    kms = Kms(dawdle)
    policy = with_keys(home.policy, PROMPT)
    async with Session(home.url, policy, monotonic=clocks.read, now=clocks.now, ask_of_keys=kms) as session:
        result = await session.verify()
        clocks.monotonic += result.valid_seconds - dawdled
        assert await session.result() is not result
    assert len(kms.asked) == 2


async def test_a_policy_that_names_a_key_from_now_on(home: House) -> None:
    kms = Kms(with_an_open_key)
    named = with_keys(home.policy, PROMPT)
    async with Session(home.url, home.policy, reread=lambda: named, ask_of_keys=kms) as session:
        assert (await ask(session, "hello"))[0] == "hello"
        assert kms.asked == []
        with pytest.raises(AppraisalError):
            await session.verify()
        assert kms.asked == [named]


async def test_a_policy_that_changes_while_kms_answers_is_for_the_next_time(home: House) -> None:
    named = with_keys(home.policy, PROMPT)

    def change(policy: AppraisalPolicy) -> Mapping[KeyArn, KeyFacts]:
        session.policy = replace(named, model=Require((bytes(48),)))
        return all_facts(policy)

    async with Session(home.url, named, ask_of_keys=change) as session:
        assert (await session.verify()).release == "test"
        with pytest.raises(AppraisalError):
            await session.verify()


async def test_kms_is_asked_with_boto3_unless_told_otherwise(home: House, monkeypatch: pytest.MonkeyPatch) -> None:
    """The whole way: keys, their policy and its change at an emulated KMS, over HTTPS."""
    monkeypatch.setattr(kms_client, "ATTEMPTS", 1)
    with kms_emulator() as kms:
        for name, value in kms.environment(kms.principal("assumed-role/seal/me")).items():
            monkeypatch.setenv(name, value)
        monkeypatch.delenv("AWS_PROFILE", raising=False)
        good = facts(home.policy, PROMPT).policy.encode()
        named = with_keys(home.policy, PROMPT, key=KeyArn.parse(kms.create_key(good)))
        async with Session(home.url, named) as session:
            assert (await ask(session, "hello"))[0] == "hello"
            opened = facts(home.policy, PROMPT, more=[allow("kms:Decrypt")]).policy.encode()
            with kms_clients.kms_client(kms, kms.principal("assumed-role/admin/me")) as admin:
                await asyncio.to_thread(admin.put_key_policy, KeyId=named.kms[PROMPT].key.text, Policy=opened)
            with pytest.raises(AppraisalError) as refused:
                await session.verify()
            assert refused.value.code == "open_key_policy"
            await asyncio.to_thread(kms.close)
            with pytest.raises(KmsError) as caught:
                await ask(session, "CANARY")
            assert caught.value.code == "kms_unavailable"
    assert home.engine.requests == [prompt("hello")]


# --- Hostile answers -----------------------------------------------------------------------------------------------


def _records(body: bytes) -> tuple[bytes, list[bytes]]:
    salt, records = body[:ANSWER_SALT_SIZE], body[ANSWER_SALT_SIZE:]
    return salt, [records[start : start + RECORD] for start in range(0, len(records), RECORD)]


def tamper_content(body: bytes) -> bytes:
    return body[:100] + bytes([body[100] ^ 1]) + body[101:]


def tamper_salt(body: bytes) -> bytes:
    return bytes([body[0] ^ 1]) + body[1:]


def tamper_flag(body: bytes) -> bytes:
    salt, [first, *rest] = _records(body)
    return salt + b"\x01" + first[1:] + b"".join(rest)


def drop_first(body: bytes) -> bytes:
    salt, records = _records(body)
    return salt + b"".join(records[1:])


def drop_middle(body: bytes) -> bytes:
    salt, [first, _, *rest] = _records(body)
    return salt + first + b"".join(rest)


def swap(body: bytes) -> bytes:
    salt, [first, second, *rest] = _records(body)
    return salt + second + first + b"".join(rest)


def repeat(body: bytes) -> bytes:
    salt, [first, *rest] = _records(body)
    return salt + first + first + b"".join(rest)


def append(body: bytes) -> bytes:
    return body + _records(body)[1][0]


def huge_record(body: bytes) -> bytes:
    return body[:ANSWER_SALT_SIZE] + b"\x00\xff\xff\xff" + body[ANSWER_SALT_SIZE + 4 :]


@pytest.mark.parametrize(
    ("alter", "code"),
    [
        (tamper_content, "tampered_record"),
        (tamper_salt, "tampered_record"),
        (tamper_flag, "tampered_record"),
        (drop_first, "tampered_record"),
        (drop_middle, "tampered_record"),
        (swap, "tampered_record"),
        (repeat, "tampered_record"),
        (append, "after_final"),
        (huge_record, "malformed_record"),
    ],
)
async def test_an_altered_answer_is_refused(
    home: House, session: Session, alter: Callable[[bytes], bytes], code: str
) -> None:
    home.hostile.on_answer = lambda path, body: alter(body) if path == SEALED_PATH else body
    with pytest.raises(SealedError) as caught:
        await ask(session, "hello")
    assert (caught.value.code, caught.value.exit_code) == (code, 3)


async def test_an_answer_to_another_request_is_refused(home: House, session: Session) -> None:
    await ask(session, "transfer 1")
    old = bytes(home.hostile.answers[-1][1])
    home.hostile.on_answer = lambda path, body: old
    with pytest.raises(SealedError) as caught:
        await ask(session, "transfer 1")
    assert caught.value.code == "tampered_record"


async def test_a_whole_answer_without_its_last_record_is_truncated(home: House, session: Session) -> None:
    home.hostile.on_answer = lambda path, body: body[:-RECORD] if path == SEALED_PATH else body
    with pytest.raises(SealedError) as caught:
        await ask(session, "hello")
    assert caught.value.code == "truncated"


@pytest.mark.parametrize("size", [0, 1, ANSWER_SALT_SIZE, ANSWER_SALT_SIZE + 3, ANSWER_SALT_SIZE + RECORD])
async def test_an_answer_that_breaks_off_is_truncated(home: House, session: Session, size: int) -> None:
    home.hostile.break_after = size
    with pytest.raises(SealedError) as caught:
        await ask(session, "hello")
    assert caught.value.code == "truncated"
    home.hostile.break_after = None
    assert (await ask(session, "hello"))[0] == "hello"


async def test_padding_that_breaks_off_is_truncated_too(home: House, session: Session) -> None:
    """Whoever waits for the end of an answer must not take its last words for it."""
    answers = []
    home.hostile.break_after = ANSWER_SALT_SIZE + 3 * RECORD
    with pytest.raises(SealedError) as caught:
        async for answer in session.chat(prompt("hello")):
            answers.append(answer)
    assert caught.value.code == "truncated"
    assert isinstance(answers[-1], Done)


async def test_a_proxy_that_went_away_after_the_verdict(home: House) -> None:
    async with contextlib.AsyncExitStack() as leaving:
        url = await leaving.enter_async_context(served(home.proxy.application()))
        async with Session(url, home.policy) as session:
            await session.verify()
            await leaving.aclose()
            with pytest.raises(Unreachable) as caught:
                await ask(session, "hello")
    assert caught.value.code == "unreachable"


async def test_an_enclave_that_dies_in_mid_answer_is_said_and_the_next_request_works(
    home: House, session: Session
) -> None:
    held = home.engine.hold_after(PROMPT_AND_SOME)
    asking = asyncio.ensure_future(ask(session, "a long answer of many small pieces"))
    await held.wait()
    home.behind.kill()
    with pytest.raises(SealedError) as caught:
        await asking
    assert caught.value.code == "truncated"
    await home.behind.restart()
    assert (await ask(session, "hello"))[0] == "hello"


# --- Failures inside the channel -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("error", "exit_code"),
    [
        (ContextExceeded("the prompt is longer than the context", expected="<= 255", got=300), 2),
        (AnswerExceeded("max_tokens is more than an answer may have here", expected="<= 6", got=7), 2),
        (Overloaded(expected="<= 64 waiting", got=65), 4),
        (Overloaded(expected="<= 64 waiting", got=65, retry_seconds=7), 4),
        (EngineFailed("the engine process ended"), 4),
    ],
)
async def test_the_enclaves_own_failure_comes_whole(
    home: House, session: Session, error: StrongroomError, exit_code: int
) -> None:
    home.engine.refuse = error
    with pytest.raises(RequestFailed) as caught:
        await ask(session, "hello")
    failure = caught.value
    assert (failure.code, failure.message, failure.expected, failure.got) == (
        error.code,
        error.message,
        error.expected,
        error.got,
    )
    assert failure.retry_seconds == getattr(error, "retry_seconds", None)
    assert failure.exit_code == exit_code


async def test_a_defect_in_the_enclave_says_nothing_of_itself(home: House, session: Session) -> None:
    home.engine.refuse = RuntimeError("CANARY")
    with pytest.raises(RequestFailed) as caught:
        await ask(session, "hello")
    assert caught.value.code == "internal"
    assert "CANARY" not in str(caught.value)


async def test_a_failure_is_reported_with_all_that_came_before_it(home: House, session: Session) -> None:
    steps = itertools.count()

    async def gate() -> None:
        if next(steps) == 12:
            home.engine.fail()

    home.engine.gate = gate
    text = ""
    with pytest.raises(RequestFailed) as caught:
        async for answer in session.chat(prompt("a long answer of many small pieces")):
            if isinstance(answer, Delta):
                text += answer.content
    assert caught.value.code == "engine_failed"
    assert text
    assert "a long answer of many small pieces".startswith(text)


async def test_a_prompt_without_a_place_in_the_context_is_the_callers_to_shorten(session: Session) -> None:
    with pytest.raises(RequestFailed) as caught:
        await ask(session, "too long " * 60)
    assert (caught.value.code, caught.value.exit_code) == ("context_exceeded", 2)


# --- Answers of an enclave that breaks its own protocol ------------------------------------------------------------

START, DELTA = Start("tiny").encode(), Delta("x").encode()
DONE = Done("stop", Usage(1, 1)).encode()


@pytest.mark.parametrize(
    "messages",
    [
        [],
        [DELTA, DONE],
        [DONE],
        [START, START, DONE],
        [START, DELTA],
        [START, DONE, DELTA],
        [START, DONE, DONE],
        [START, Description("m", 1, bytes(48)).encode()],
        [START, Counted(5).encode()],
        [Counted(5).encode()],
        [START, encode_message({"delta": 5}), DONE],
        [START, encode_message({"unheard of": 1}), DONE],
        [START, b"\x00\x00\x00\x01\xff", DONE],
        [START, DONE, b"\x00\x00"],
        [START, b"\xff\xff\xff\xff"],
    ],
)
async def test_messages_out_of_order_or_form_are_a_broken_channel(
    monkeypatch: pytest.MonkeyPatch, home: House, session: Session, messages: list[bytes]
) -> None:
    async def misbehave(server: object, request: object, answer: object) -> None:
        for message in messages:
            await answer.write(message)  # type: ignore[attr-defined]

    monkeypatch.setattr("enclave.server.Server._work", misbehave)
    with pytest.raises(SealedError) as caught:
        async for _ in session.chat(prompt("hello")):
            pass
    assert caught.value.code == "malformed"


DESCRIPTION, COUNTED = Description("m", 1, bytes(48)).encode(), Counted(5).encode()


async def test_a_description_is_what_was_asked_for(home: House, session: Session) -> None:
    description = await session.describe()
    assert (description.name, description.context) == ("tiny", 256)
    assert description.manifest == home.behind.manifest.digest()


async def test_a_count_is_what_was_asked_for(session: Session) -> None:
    _, done = await ask(session, "hello there")
    assert await session.count(prompt("hello there")) == done.usage.prompt_tokens


async def test_a_text_is_gone_on_with(home: House, session: Session) -> None:
    request = CompletionRequest(prompt="once upon", max_tokens=20, seed=5)
    answers = [answer async for answer in session.complete(request)]
    assert answers[0] == Start("tiny")
    assert "".join(answer.content for answer in answers if isinstance(answer, Delta)) == "once upon"
    assert isinstance(answers[-1], Done)
    assert home.engine.requests == [request]


@pytest.mark.parametrize(
    ("messages", "of_description", "of_count"),
    [
        ([DESCRIPTION], True, False),
        ([COUNTED], False, True),
        ([START, DONE], False, False),
        ([], False, False),
        ([DESCRIPTION, DESCRIPTION], False, False),
        ([COUNTED, DONE], False, False),
    ],
)
async def test_an_answer_to_another_question_is_a_broken_channel(
    monkeypatch: pytest.MonkeyPatch, session: Session, messages: list[bytes], of_description: bool, of_count: bool
) -> None:
    async def misbehave(server: object, request: object, answer: object) -> None:
        for message in messages:
            await answer.write(message)  # type: ignore[attr-defined]

    monkeypatch.setattr("enclave.server.Server._work", misbehave)
    for question, is_answered in ((session.describe, of_description), (partial(session.count, prompt("x")), of_count)):
        if is_answered:
            assert await question() in (Description("m", 1, bytes(48)), 5)
            continue
        with pytest.raises(SealedError) as caught:
            await question()
        assert caught.value.code == "malformed"


# --- Clocks --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("skew", "code"), [(timedelta(hours=2), "stale"), (timedelta(minutes=-10), "from_the_future")])
async def test_a_clock_that_jumped_is_a_verdict_and_passes_with_it(home: House, skew: timedelta, code: str) -> None:
    clocks = Clocks()
    async with clocked(home, clocks) as session:
        await session.verify()
        clocks.skew = skew
        assert (await ask(session, "hello"))[0] == "hello"  # the result in force does not depend on the wall clock
        clocks.monotonic += 400
        with pytest.raises(EvidenceError) as caught:
            await ask(session, "hello")
        assert caught.value.code in (code, "untrusted_chain")  # a jump that leaves the leaf's validity is found first
        clocks.skew = timedelta()
        assert (await ask(session, "hello"))[0] == "hello"


@pytest.mark.parametrize("skew", [timedelta(seconds=100), timedelta(seconds=-100)])
async def test_a_clock_within_the_leeway_serves(home: House, skew: timedelta) -> None:
    async with clocked(home, Clocks(skew=skew)) as session:
        assert (await ask(session, "hello"))[0] == "hello"


# --- Leaving -------------------------------------------------------------------------------------------------------


PROMPT_AND_SOME = 4
"""Steps by which the prompt is read and a part of the answer said."""


async def test_leaving_early_stops_the_enclaves_work(home: House, session: Session) -> None:
    home.engine.hold_after(PROMPT_AND_SOME)
    async with contextlib.aclosing(session.chat(prompt("a long answer of many small pieces"))) as answers:
        async for answer in answers:
            if isinstance(answer, Delta):
                assert home.engine.in_work == 1
                break
    await home.engine.idle.wait()
    home.engine.go_on()
    assert home.engine.steps == PROMPT_AND_SOME


async def test_cancelling_whoever_waits_stops_the_enclaves_work(home: House, session: Session) -> None:
    held = home.engine.hold_after(0)
    asking = asyncio.ensure_future(ask(session, "hello"))
    await held.wait()
    asking.cancel()
    with pytest.raises(asyncio.CancelledError):
        await asking
    await home.engine.idle.wait()
    assert home.engine.steps == 0


# --- Between client and proxy --------------------------------------------------------------------------------------


async def test_an_unused_session_closes(home: House) -> None:
    async with home.session():
        pass
    assert home.hostile.requests == []


async def test_a_session_that_closes_gives_up_its_verification(home: House, session: Session) -> None:
    begun, never = asyncio.Event(), asyncio.Event()

    async def silent(*_: object) -> None:
        begun.set()
        await never.wait()

    home.hostile.application = silent
    waiting = asyncio.ensure_future(session.result())
    await begun.wait()
    await session.close()
    with pytest.raises(asyncio.CancelledError):
        await waiting
    never.set()
