"""``strongroom prompt``: sealed, brought and read as a person does it, with a KMS that really decides and an enclave
that really asks it.
"""

from __future__ import annotations

import asyncio
import json
import os
import stat
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from starlette.types import Receive, Scope, Send

from attestation.anchors import AWS_NITRO_G1
from attestation.envelope import EnvelopeHeader
from attestation.keypolicy.document import KeyPolicy
from attestation.policy_writer import write_policy as policy_text
from attestation.rules import Require
from emulator.kms_faults import THROTTLED
from strongroom import prompt_commands
from strongroom.files import write_new
from strongroom.prompt_file import MAX_ANSWER
from tests.attested import write_policy
from tests.house import Forged
from tests.kms_house import HouseDesk, KmsHouse, KmsStreet, kms_street
from tests.sealing import CONTEXT, FLOOR, MODEL, OTHER_KEY, PROMPT, split_records
from tests.terminal import Ran, Terminal
from vsockrpc.chat import ChatRequest
from vsockrpc.http import ANSWER_TYPE, ENVELOPE_PATH


@pytest.fixture(scope="module")
def street(tmp_path_factory: pytest.TempPathFactory) -> Iterator[KmsStreet]:
    with kms_street(tmp_path_factory.mktemp("street")) as opened:
        opened.home.behind.write_policy()
        yield opened


@pytest.fixture
def desk(
    street: KmsStreet, strongroom: Terminal, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[HouseDesk]:
    """A folder with nothing in it, in which somebody who may seal sits."""
    home = street.home
    monkeypatch.setenv("STRONGROOM_POLICY", str(home.behind.directory / "policy.toml"))
    monkeypatch.setenv("STRONGROOM_URL", street.url)
    monkeypatch.chdir(tmp_path)
    yield HouseDesk(home, strongroom, monkeypatch)
    home.world.emulator.faults.clear()
    home.open_keys()
    street.hostile.on_request = lambda path, count: None
    street.hostile.on_answer = None
    home.behind.engine.refuse = None


def sealed(desk: HouseDesk, text: str = "Why is the sky blue?", *options: str) -> Ran:
    return desk("prompt", "seal", text, "--out", "q.sealed", *options)


def nothing_written() -> bool:
    return os.listdir() == []


# --- From a question to its answer ------------------------------------------------------------------------------------


def test_sealed_brought_and_read(desk: HouseDesk, street: KmsStreet) -> None:
    ran = sealed(desk)
    assert ran.code == 0, ran.err
    assert ran.out == "wrote q.sealed\nwrote q.sealed.reply  (keep it: nothing else opens the answer)\n"
    assert "EMULATED" in ran.err
    assert "key policy (prompts)" in ran.err.lower()
    assert stat.S_IMODE(Path("q.sealed.reply").stat().st_mode) == 0o600
    assert b"sky" not in Path("q.sealed").read_bytes() + Path("q.sealed.reply").read_bytes()
    ran = desk("prompt", "submit", "q.sealed", "--out", "a.sealed")
    assert (ran.code, ran.out, ran.err) == (0, "wrote a.sealed\n", "")
    ran = desk("prompt", "open", "a.sealed", "--reply", "q.sealed.reply")
    assert (ran.code, ran.out, ran.err) == (0, "Why is the sky blue?\n", "")


def test_the_same_for_programs(desk: HouseDesk) -> None:
    ran = sealed(desk, "hello", "--json")
    assert (ran.code, ran.err) == (0, "")
    said = ran.json
    assert (said["envelope"], said["reply"]) == ("q.sealed", "q.sealed.reply")
    assert (said["verdict"], said["purpose"], said["key"]) == ("accepted", "prompt", desk.home.keys[PROMPT].text)
    assert said["labels"] == ["EMULATED"]
    assert said["mutability"].startswith("MUTABLE-BY(")
    assert {check["step"] for check in said["checks"]} == {16, 17, 18, 19, 20, 21}
    ran = desk("prompt", "submit", "q.sealed", "--out", "a.sealed", "--json")
    assert (ran.code, ran.err) == (0, "")
    assert ran.json == {"answer": "a.sealed", "bytes": Path("a.sealed").stat().st_size}
    ran = desk("prompt", "open", "a.sealed", "--reply", "q.sealed.reply", "--json")
    assert (ran.json["text"], ran.json["finish_reason"]) == ("hello", "stop")
    assert ran.json["reasoning"] == ""
    assert set(ran.json["usage"]) == {"prompt_tokens", "completion_tokens", "cached_tokens", "reasoning_tokens"}


def test_what_kms_is_asked_for(desk: HouseDesk) -> None:
    """It is judged before a data key is made."""
    assert sealed(desk).code == 0
    assert desk.asked == ["DescribeKey", "GetKeyPolicy", "ListGrants", "GenerateDataKey"]
    header, _ = EnvelopeHeader.split(Path("q.sealed").read_bytes())
    assert (header.key, header.context, header.version) == (desk.home.keys[PROMPT], CONTEXT, FLOOR)


def test_an_enclave_that_is_verified_as_well(desk: HouseDesk, nobody: str, street: KmsStreet) -> None:
    assert sealed(desk, "hello", "--url", street.url).code == 0
    assert desk.asked.count("DescribeKey") == 3  # both keys for the enclave's verdict, and the prompts' for its own
    Path("q.sealed").unlink()
    Path("q.sealed.reply").unlink()
    asked = len(desk.asked)
    ran = sealed(desk, "hello", "--url", nobody)
    assert ran.code == 4
    assert "nobody answers" in ran.err
    assert "GenerateDataKey" not in desk.asked[asked:]
    assert nothing_written()


def test_standard_input_and_sampling(desk: HouseDesk) -> None:
    options = ("--system", "Be brief.", "--max-tokens", "7", "--temperature", "0.25", "--seed", "3")
    ran = desk("prompt", "seal", "-", "--out", "q.sealed", *options, stdin="aus dem Rohr: é\n".encode())
    assert ran.code == 0
    assert desk("prompt", "submit", "q.sealed", "--out", "a.sealed").code == 0
    asked = desk.home.behind.engine.requests[-1]
    assert isinstance(asked, ChatRequest)
    assert [message.content for message in asked.messages] == ["Be brief.", "aus dem Rohr: é\n"]
    assert (asked.max_tokens, asked.temperature, asked.seed) == (7, 0.25, 3)


def test_an_envelope_that_is_brought_twice(desk: HouseDesk) -> None:
    assert sealed(desk, "again").code == 0
    for name in ("one", "two"):
        assert desk("prompt", "submit", "q.sealed", "--out", name).code == 0
        assert desk("prompt", "open", name, "--reply", "q.sealed.reply").out == "again\n"
    assert Path("one").read_bytes() != Path("two").read_bytes()


# --- Sealing that does not come about ---------------------------------------------------------------------------------


def refused(ran: Ran, code: int, error: str) -> None:
    """The exit code, and the error's; and nothing was written."""
    assert ran.code == code, ran.err
    assert f"[{error}]" in ran.err
    assert ran.out == ""
    assert nothing_written()


def test_another_key_than_the_policys(desk: HouseDesk) -> None:
    refused(sealed(desk, "hello", "--key", OTHER_KEY.text), 2, "wrong_key")
    refused(sealed(desk, "hello", "--key", desk.home.keys[MODEL].text), 2, "wrong_key")
    assert desk.asked == []
    assert sealed(desk, "hello", "--key", desk.home.keys[PROMPT].text).code == 0


@pytest.mark.parametrize("left", [(), (MODEL,)])
def test_a_policy_without_a_key_for_prompts(
    desk: HouseDesk, tmp_path_factory: pytest.TempPathFactory, left: Any
) -> None:
    rules = {purpose: rule for purpose, rule in desk.home.policy.kms.items() if purpose in left}
    policy = write_policy(replace(desk.home.policy, kms=rules), tmp_path_factory.mktemp("policy"))
    ran = sealed(desk, "hello", "--policy", str(policy))
    refused(ran, 2, "missing_field")
    assert "add [kms.prompts]" in ran.err


@pytest.mark.parametrize("name", ["q.sealed", "q.sealed.reply"])
def test_files_that_are_there(desk: HouseDesk, name: str) -> None:
    """Nothing is overwritten, and nobody is asked: a reply secret may be the last copy."""
    Path(name).write_text("precious")
    ran = sealed(desk)
    assert ran.code == 2
    assert name in ran.err
    assert "File exists" in ran.err
    assert os.listdir() == [name]
    assert Path(name).read_text() == "precious"
    assert desk.asked == []


def test_no_place_to_write(desk: HouseDesk) -> None:
    ran = desk("prompt", "seal", "hello", "--out", "nowhere/q.sealed")
    assert ran.code == 2
    assert "No such folder" in ran.err
    assert desk.asked == []


def test_a_second_file_that_cannot_be_written_takes_the_first_back(
    desk: HouseDesk, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(path: Path, data: bytes, **options: Any) -> None:
        if path.name == "q.sealed":
            raise OSError(28, "No space left on device", str(path))
        write_new(path, data, **options)

    monkeypatch.setattr(prompt_commands, "write_new", full)
    ran = sealed(desk)
    assert ran.code == 4
    assert "No space left" in ran.err
    assert nothing_written()


@pytest.mark.parametrize("arguments", [(), ("--out", "q"), ("hello",), ("hello", "--out", ".")])
def test_usage(desk: HouseDesk, arguments: tuple[str, ...]) -> None:
    ran = desk("prompt", "seal", *arguments)
    assert ran.code == 2
    assert nothing_written()


def test_no_credentials(desk: HouseDesk) -> None:
    desk.have_no_credentials()
    ran = sealed(desk)
    refused(ran, 4, "kms_unavailable")
    assert "Unable to locate credentials" in ran.err


def test_somebody_elses_credentials(desk: HouseDesk) -> None:
    desk.become("assumed-role/stranger/me")
    refused(sealed(desk), 4, "kms_refused")
    desk.become("arn:aws:iam::444455556666:user/eve")
    refused(sealed(desk), 4, "kms_refused")


def test_kms_that_is_away(desk: HouseDesk, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL_KMS", "https://127.0.0.1:1")
    refused(sealed(desk), 4, "kms_unavailable")


def test_a_policy_of_aws_and_a_kms_that_is_not_aws_own(
    desk: HouseDesk, tmp_path_factory: pytest.TempPathFactory
) -> None:
    policy = tmp_path_factory.mktemp("policy") / "policy.toml"
    policy.write_text(policy_text(replace(desk.home.policy, anchor=AWS_NITRO_G1)))
    refused(sealed(desk, "hello", "--policy", str(policy)), 3, "foreign_kms")
    assert desk.asked == []


def test_errors_for_programs(desk: HouseDesk) -> None:
    desk.have_no_credentials()
    ran = sealed(desk, "hello", "--json")
    assert (ran.code, ran.err) == (4, "")
    assert ran.json["error"]["code"] == "kms_unavailable"


def opened(home: KmsHouse, statement: dict[str, Any]) -> None:
    """One more statement in the policy of the prompts' key."""
    key = home.keys[PROMPT]
    found = home.world.emulator.kms.keys.find(key.text, account=key.account, region=key.region).key
    document = json.loads(found.policy)
    document["Statement"].append({"Effect": "Allow", "Resource": "*", **statement})
    found.policy = KeyPolicy.parse(json.dumps(document)).encode()


STRANGER = {"AWS": "arn:aws:iam::111122223333:role/stranger"}
UNSAFE: dict[str, tuple[dict[str, Any], str]] = {
    "opens without attestation": ({"Principal": STRANGER, "Action": "kms:Decrypt"}, "open_key_policy"),
    "may be opened by a grant": ({"Principal": STRANGER, "Action": "kms:CreateGrant"}, "open_key_policy"),
    "may be changed by a stranger": ({"Principal": STRANGER, "Action": "kms:PutKeyPolicy"}, "mutable_key"),
}


@pytest.mark.parametrize("name", UNSAFE)
def test_a_key_that_releases_to_somebody_else_gets_nothing_sealed(desk: HouseDesk, name: str) -> None:
    statement, code = UNSAFE[name]
    opened(desk.home, statement)
    ran = sealed(desk)
    assert ran.code == 1
    assert code in ran.err
    assert "GenerateDataKey" not in desk.asked
    assert nothing_written()
    ran = sealed(desk, "hello", "--json")
    assert (ran.code, ran.json["error"]["code"]) == (1, code)
    assert nothing_written()


def test_a_key_that_releases_to_another_configuration(desk: HouseDesk) -> None:
    desk.home.open_keys(replace(desk.home.policy, configuration=Require((b"\x77" * 48,))))
    ran = sealed(desk)
    assert ran.code == 1
    assert nothing_written()


def test_a_prompt_that_no_enclave_takes(desk: HouseDesk) -> None:
    """It would be noticed when it is too late, perhaps."""
    for text in (b"x" * ((1 << 20) + 1), "\N{SNOWMAN}".encode() * ((1 << 20) + 1)):
        ran = desk("prompt", "seal", "-", "--out", "q.sealed", stdin=text)
        assert ran.code == 2
        assert nothing_written()
    assert desk.asked == []
    three = "\N{SNOWMAN}" * (1 << 20)
    ran = desk("prompt", "seal", "-", "--out", "q.sealed", "--system", three, stdin=three.encode())
    assert ran.code == 2, "each is short enough, and both together are not"
    assert nothing_written()


# --- Bringing ---------------------------------------------------------------------------------------------------------


def brought(desk: HouseDesk, *options: str) -> Ran:
    return desk("prompt", "submit", "q.sealed", "--out", "a.sealed", *options)


def write_envelope(desk: HouseDesk, text: str = "hello", **changed: Any) -> None:
    """As somebody else may have sealed it."""
    envelope, reply = desk.home.sealing().but(**changed).prompt(text)
    Path("q.sealed").write_bytes(envelope)
    Path("q.sealed.reply").write_bytes(reply.encode())


def fails(ran: Ran, code: int, error: str, *words: str) -> None:
    assert ran.code == code, ran.err
    assert f"[{error}]" in ran.err
    assert all(word in ran.err for word in words), ran.err
    assert not Path("a.sealed").exists()
    assert not [name for name in os.listdir() if name.startswith(".")]


@pytest.mark.parametrize(
    "changed",
    [
        {"version": FLOOR - 1},
        {"context": "production"},
        {"key": OTHER_KEY, "wrapped_by": "own"},
        {"models": (bytes(48),)},
        {"wrapped_under": {"strongroom": "1"}},
    ],
)
def test_an_envelope_that_is_not_for_this_enclave(desk: HouseDesk, changed: dict[str, Any]) -> None:
    if changed.get("wrapped_by") == "own":
        changed["wrapped_by"] = desk.home.keys[PROMPT]
    write_envelope(desk, **changed)
    fails(brought(desk), 4, "not_released", "KMS or the enclave's configuration refuses")
    assert brought(desk, "--json").json["error"]["code"] == "not_released"


def test_an_enclave_that_reaches_no_kms(desk: HouseDesk) -> None:
    write_envelope(desk)
    desk.home.world.emulator.faults.inject(THROTTLED)
    fails(brought(desk), 4, "unavailable", "reaches no KMS", "bring the envelope again")
    desk.home.world.emulator.faults.clear()
    assert brought(desk).code == 0


def test_an_envelope_changed_on_its_way(desk: HouseDesk) -> None:
    write_envelope(desk)
    header, records = split_records(Path("q.sealed").read_bytes())
    Path("q.sealed").write_bytes(header + b"".join([*records[:-1], records[-1][:-1] + b"\x00"]))
    fails(brought(desk), 4, "malformed", "changed on its way")


def test_nobody_there(desk: HouseDesk, nobody: str) -> None:
    write_envelope(desk)
    fails(brought(desk, "--url", nobody), 4, "unreachable")
    fails(brought(desk, "--url", "no address"), 2, "bad_url")


def test_nothing_but_a_prompts_envelope_is_shown_to_a_parent(desk: HouseDesk, street: KmsStreet) -> None:
    """Least of all the file of its reply secret, which is called much like it."""
    before = len(street.hostile.requests)
    write_envelope(desk)
    ran = desk("prompt", "submit", "q.sealed.reply", "--out", "a.sealed")
    fails(ran, 3, "malformed_envelope")
    Path("q.sealed").write_bytes(desk.home.sealing(MODEL).seal(b"weights"))
    fails(brought(desk), 3, "wrong_purpose")
    Path("q.sealed").write_bytes(bytes(prompt_commands.MAX_ENVELOPE + 1))
    fails(brought(desk), 2, "too_large")
    Path("q.sealed").unlink()
    assert brought(desk).code == 2
    assert len(street.hostile.requests) == before


def test_an_answer_that_is_there(desk: HouseDesk, street: KmsStreet) -> None:
    before = len(street.hostile.requests)
    write_envelope(desk)
    Path("a.sealed").write_text("precious")
    ran = brought(desk)
    assert ran.code == 2
    assert "File exists" in ran.err
    assert Path("a.sealed").read_text() == "precious"
    assert len(street.hostile.requests) == before


FORGED: dict[str, tuple[Forged, str]] = {
    "another type": ((200, "text/html", b"<html>"), "not_strongroom"),
    "a sealed answer's type": ((200, "application/vnd.strongroom.sealed", b"x"), "not_strongroom"),
    "an error of something else": ((500, "text/plain", b"oops"), "not_strongroom"),
    "a fault": ((403, "application/json", b'{"fault": "not_released"}'), "not_released"),
    "a fault that is none": ((403, "application/json", b'{"fault": "\\u001b[2J"}'), "not_strongroom"),
    "too much": ((200, ANSWER_TYPE, bytes(MAX_ANSWER + 1)), "not_strongroom"),
}


@pytest.mark.parametrize("name", FORGED)
def test_a_proxy_that_answers_something_else(desk: HouseDesk, street: KmsStreet, name: str) -> None:
    forged, code = FORGED[name]
    write_envelope(desk)
    street.hostile.on_request = lambda path, count: forged if path == ENVELOPE_PATH else None
    fails(brought(desk), 4, code)


def test_an_answer_that_breaks_off(desk: HouseDesk, street: KmsStreet, monkeypatch: pytest.MonkeyPatch) -> None:
    write_envelope(desk)
    monkeypatch.setattr(street.hostile, "break_after", 100)
    monkeypatch.setattr("tests.house.SEALED_PATH", ENVELOPE_PATH)
    fails(brought(desk), 4, "truncated", "bring the envelope again")


@pytest.mark.parametrize("begins", [False, True])
def test_an_answer_that_drips(
    desk: HouseDesk, street: KmsStreet, monkeypatch: pytest.MonkeyPatch, begins: bool
) -> None:
    """A byte now and then is no silence, and no answer either."""
    headers = [(b"content-type", ANSWER_TYPE.encode())]

    async def drip(scope: Scope, receive: Receive, send: Send) -> None:
        async def left() -> None:
            while (await receive())["type"] != "http.disconnect":
                pass

        leaving = asyncio.ensure_future(left())
        if begins:
            await send({"type": "http.response.start", "status": 200, "headers": headers})
        while not leaving.done():
            if begins:
                await send({"type": "http.response.body", "body": b"x", "more_body": True})
            await asyncio.sleep(0.001)

    write_envelope(desk)
    monkeypatch.setattr(street.hostile, "application", drip)
    ran = brought(desk, "--timeout", "0.5")
    error = "truncated" if "[truncated]" in ran.err and begins else "unreachable"
    fails(ran, 4, error, "did not end within 0.5 s" if error == "truncated" else "TimeoutError")
    assert brought(desk, "--timeout", "0").code == 2


def test_a_proxy_forges_no_answer(desk: HouseDesk, street: KmsStreet) -> None:
    """It may be kept, but nobody who has the reply file takes it for one."""
    write_envelope(desk)
    street.hostile.on_answer = lambda path, body: body[:-1] + b"\x00"
    assert brought(desk).code == 0
    ran = desk("prompt", "open", "a.sealed", "--reply", "q.sealed.reply")
    assert (ran.code, ran.out) == (3, "")
    assert "[tampered_record]" in ran.err


# --- Reading ----------------------------------------------------------------------------------------------------------


def read(desk: HouseDesk, *options: str) -> Ran:
    return desk("prompt", "open", "a.sealed", "--reply", "q.sealed.reply", *options)


@pytest.fixture
def answered(desk: HouseDesk) -> HouseDesk:
    write_envelope(desk)
    assert brought(desk).code == 0
    return desk


def test_an_answer_to_another_envelope(answered: HouseDesk) -> None:
    Path("a.sealed").rename("former")
    write_envelope(answered)
    Path("former").rename("a.sealed")
    ran = read(answered)
    assert (ran.code, ran.out) == (3, "")
    assert "[tampered_record]" in ran.err


def test_an_answer_cut_short(answered: HouseDesk) -> None:
    whole = Path("a.sealed").read_bytes()
    for size in (0, 20, len(whole) // 2, len(whole) - 1):
        Path("a.sealed").write_bytes(whole[:size])
        ran = read(answered)
        assert (ran.code, ran.out) == (4, "")
        assert "[truncated]" in ran.err


def test_an_answer_that_is_a_failure(desk: HouseDesk) -> None:
    write_envelope(desk, "long " * 1000)
    assert brought(desk).code == 0
    ran = read(desk)
    assert (ran.code, ran.out) == (2, "")
    assert "[context_exceeded]" in ran.err
    assert read(desk, "--json").json["error"]["code"] == "context_exceeded"


def test_files_that_are_something_else(answered: HouseDesk) -> None:
    ran = answered("prompt", "open", "a.sealed", "--reply", "q.sealed")
    assert ran.code == 2
    assert "[too_large]" in ran.err
    ran = answered("prompt", "open", "a.sealed", "--reply", "a.sealed")
    assert ran.code == 2
    ran = answered("prompt", "open", "q.sealed", "--reply", "q.sealed.reply")
    assert ran.code == 3
    assert "this is the envelope, not the answer to it" in ran.err
    for missing in (("nothing", "--reply", "q.sealed.reply"), ("a.sealed", "--reply", "nothing"), ("a.sealed",)):
        assert answered("prompt", "open", *missing).code == 2


def test_the_reply_secret_is_never_shown(answered: HouseDesk) -> None:
    secret = json.loads(Path("q.sealed.reply").read_text())["secret"]
    for ran in (read(answered), read(answered, "--json")):
        assert secret not in ran.out + ran.err
    Path("q.sealed.reply").write_text(json.dumps({"v": 1, "envelope": "00", "secret": secret}))
    ran = read(answered)
    assert ran.code == 2
    assert "[malformed_reply]" in ran.err
    assert secret not in ran.out + ran.err


def test_help_has_examples_of_each(desk: HouseDesk) -> None:
    for name in ("seal", "submit", "open"):
        ran = desk("prompt", name, "--help")
        assert ran.code == 0
        assert f"strongroom prompt {name} " in ran.out
        assert f"\n  {name} " in desk("prompt", "--help").out
