"""``verify``, ``inspect`` and ``evidence`` on files, on standard input and on an enclave that answers."""

from __future__ import annotations

import base64
import json
import re
from collections.abc import Callable, Mapping
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import cbor2
import pytest

from attestation.anchors import AWS_NITRO_G1
from attestation.bundle import Bundle
from attestation.checks import KEY_STEPS, QUESTIONS, STEPS
from attestation.envelope import EnvelopePurpose
from attestation.keypolicy.document import KeyArn
from attestation.keyrelease import KeyFacts
from attestation.policy import AppraisalPolicy
from attestation.policy_writer import write_policy
from attestation.reference import PcrSet
from attestation.rules import DocumentBinding, Forbid, Ignore, Release
from strongroom import verification
from strongroom.kms.client import KmsError
from tests.key_facts import HEADER, KEYS, all_facts, facts, with_keys
from tests.key_policies import ADMIN, PROMPT, allow
from tests.pki import forge
from tests.terminal import Ran, Street, Terminal

LABELS = ["ARCHIVED", "EMULATED"]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Policies for the forged Evidence: for channels, and for bare documents."""
    (tmp_path / "root.der").write_bytes(forge.ROOT_DER)
    policy = AppraisalPolicy.parse(forge.POLICY, tmp_path)
    (tmp_path / "policy.toml").write_text(forge.POLICY)
    for_documents = replace(policy, binding=DocumentBinding(Forbid(), Ignore("a test")))
    (tmp_path / "documents.toml").write_text(write_policy(for_documents, root="root.der"))
    bundle = Bundle(forge.evidence(), forge.NONCE, forge.NOW, "http://127.0.0.1:8080")
    (tmp_path / "bundle.json").write_bytes(bundle.encode())
    (tmp_path / "evidence.cbor").write_bytes(forge.evidence())
    (tmp_path / "document.cbor").write_bytes(forge.document())
    (tmp_path / "debug.cbor").write_bytes(forge.evidence(forge.document(forge.payload_fields(pcrs=forge.DEBUG_PCRS))))
    return tmp_path


@pytest.fixture
def verify(strongroom: Terminal, folder: Path) -> Callable[..., Ran]:
    def run(file: str, *options: str, policy: str = "policy.toml", stdin: bytes = b"") -> Ran:
        path = file if file == "-" else str(folder / file)
        return strongroom("verify", path, "--policy", str(folder / policy), *options, stdin=stdin)

    return run


def _young(**changes: Any) -> bytes:
    """A document made now, under a chain of now."""
    now = datetime.now(UTC)
    shift = now.replace(microsecond=0) - forge.NOW

    def moved(spec: forge.Spec) -> forge.Spec:
        return replace(spec, not_before=spec.not_before + shift, not_after=spec.not_after + shift)

    chain = forge.chain(forge.ROOT, moved(forge.REGION), moved(forge.ZONE), moved(forge.INSTANCE), moved(forge.LEAF))
    timestamp = int(now.timestamp() * 1000)
    return forge.document(forge.payload_fields(chain=chain, timestamp=timestamp, **changes), key=chain.key)


# --- verify: archives -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("file", ["bundle.json", "evidence.cbor"])
def test_an_archive_says_that_it_is_one(verify: Callable[..., Ran], file: str) -> None:
    ran = verify(file, "--archived")
    assert (ran.code, ran.err) == (0, "")
    assert "ACCEPTED WHEN MADE  ARCHIVED  EMULATED  release one, made at 2026-03-01T12:00:00+00:00" in ran.out
    assert "ARCHIVED: judged at its own time" in ran.out
    assert "valid for" not in ran.out
    told = verify(file, "--archived", "--json").json
    assert (told["verdict"], told["labels"]) == ("accepted_when_made", LABELS)
    nonce = next(check for check in told["checks"] if check["step"] == 6)
    assert nonce["status"] == "ignored", "a saver's own nonce proves nothing"


def test_a_refused_archive_says_that_it_is_one(verify: Callable[..., Ran]) -> None:
    ran = verify("debug.cbor", "--archived")
    assert ran.code == 1
    assert (
        "REFUSED  ARCHIVED  DEBUG  EMULATED  the policy refuses this enclave: debug mode, image [debug_mode]" in ran.out
    )
    told = verify("debug.cbor", "--archived", "--json")
    assert (told.code, told.json["verdict"]) == (1, "refused")
    assert told.json["labels"] == ["ARCHIVED", "DEBUG", "EMULATED"]
    explained = verify("debug.cbor", "--archived", "--explain")
    assert (explained.code, "REFUSED  ARCHIVED" in explained.out) == (1, True)


def test_a_bundles_nonce_is_judged(verify: Callable[..., Ran], folder: Path) -> None:
    bundle = Bundle(forge.evidence(), bytes(32), forge.NOW, "x")
    (folder / "bundle.json").write_bytes(bundle.encode())
    ran = verify("bundle.json", "--archived")
    assert ran.code == 3
    assert (
        "REFUSED  ARCHIVED  EMULATED  the bundle names another nonce than its document answers [wrong_nonce]" in ran.out
    )
    told = verify("bundle.json", "--archived", "--json").json
    assert (told["verdict"], told["labels"], told["error"]["code"]) == ("refused", LABELS, "wrong_nonce")
    assert {check["step"] for check in told["checks"]} == set(range(1, 16))
    [failed] = [check for check in told["checks"] if check["status"] == "failed"]
    assert (failed["step"], failed["code"]) == (6, "wrong_nonce")
    assert (failed["expected"], failed["got"]) == (f"h'{bytes(32).hex()}'", f"h'{forge.NONCE.hex()}'")
    assert verify("bundle.json", "--archived", "--nonce", forge.NONCE.hex()).code == 0


def test_an_archived_document(verify: Callable[..., Ran]) -> None:
    ran = verify("document.cbor", "--archived", policy="documents.toml")
    assert ran.code == 0
    assert "ACCEPTED WHEN MADE  ARCHIVED  EMULATED" in ran.out
    assert [line.split()[0] for line in ran.out.splitlines() if " n/a " in line] == ["8", "9", "15"]


@pytest.mark.parametrize("encode", [bytes, base64.encodebytes, lambda data: data.hex().encode()])
def test_standard_input(verify: Callable[..., Ran], encode: Callable[[bytes], bytes]) -> None:
    assert verify("-", "--archived", stdin=encode(forge.evidence())).code == 0


# --- verify: as of now ------------------------------------------------------------------------------------------------


def test_a_file_as_of_now(verify: Callable[..., Ran], folder: Path) -> None:
    (folder / "young.cbor").write_bytes(forge.evidence(_young()))
    ran = verify("young.cbor", "--nonce", forge.NONCE.hex())
    assert ran.code == 0
    assert "ACCEPTED  EMULATED  release one, valid for " in ran.out
    assert verify("young.cbor", "--nonce", bytes(32).hex()).code == 3
    (folder / "document.cbor").write_bytes(_young(nonce=bytes(20)))
    judged = verify("document.cbor", "--nonce", bytes(20).hex(), "--json", policy="documents.toml")
    assert (judged.code, judged.json["verdict"], judged.json["public_key"]) == (0, "accepted", None)


def test_an_old_file_is_not_accepted_as_of_now(verify: Callable[..., Ran]) -> None:
    ran = verify("evidence.cbor", "--nonce", forge.NONCE.hex())
    assert ran.code == 3
    assert "ARCHIVED" not in ran.out
    assert ran.out.splitlines()[-1] == "made at 2026-03-01T12:00:00+00:00; --archived judges it at its own time"
    assert "a certificate is valid from 2026-02-25T12:00:00+00:00 to 2026-03-17T13:00:00+00:00 only" in ran.out


@pytest.mark.parametrize("file", ["bundle.json", "evidence.cbor", "-"])
def test_a_nonce_is_never_left_out_in_silence(verify: Callable[..., Ran], file: str) -> None:
    ran = verify(file, stdin=forge.evidence())
    assert (ran.code, ran.out) == (2, "")
    assert "--nonce" in ran.err
    assert "--archived" in ran.err


def test_a_policy_for_another_purpose(
    verify: Callable[..., Ran], strongroom: Terminal, street: Street, folder: Path
) -> None:
    ran = strongroom("verify", "--url", street.url, "--policy", str(folder / "documents.toml"))
    assert (ran.code, ran.out) == (2, "")
    assert "wrong_purpose" in ran.err
    for file, used, advised in (
        ("document.cbor", "policy.toml", "document"),
        ("evidence.cbor", "documents.toml", "channel"),
    ):
        ran = verify(file, "--archived", policy=used)
        assert (ran.code, ran.out) == (2, "")
        assert f"strongroom policy init --purpose {advised}" in ran.err


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("--archived",), "--archived judges a FILE"),
        (("--nonce", bytes(32).hex()), "--nonce is for a FILE"),
        (("x", "--url", "http://127.0.0.1:1", "--archived"), "not both"),
        (("x", "--nonce", "0g"), "not hexadecimal"),
        (("x", "--nonce", ""), "not hexadecimal"),
        (("x", "--nonce", "00"), "expected 32 to 2048 hexadecimal digits, got 2"),
        (("x", "--nonce", "0" * 33), "got 33"),
        (("x", "--nonce", "00 " * 16), "not hexadecimal"),
        (("absent.cbor", "--archived"), "No such file"),
        ((".", "--archived"), "directory"),
    ],
    ids=str,
)
def test_what_makes_no_sense(strongroom: Terminal, folder: Path, options: tuple[str, ...], said: str) -> None:
    ran = strongroom("verify", *options, "--policy", str(folder / "policy.toml"))
    assert (ran.code, ran.out) == (2, "")
    assert said in ran.err


def test_a_channels_nonce_has_one_size(verify: Callable[..., Ran]) -> None:
    ran = verify("evidence.cbor", "--nonce", bytes(16).hex())
    assert (ran.code, "32 bytes" in ran.err) == (2, True)


@pytest.mark.parametrize("content", [b"", b"{}", b"neither", b"\xa3", bytes([0x84]) * 200_000])
def test_a_file_that_is_no_evidence(verify: Callable[..., Ran], folder: Path, content: bytes) -> None:
    (folder / "wrong").write_bytes(content)
    assert verify("wrong", "--archived").code == 3
    told = verify("wrong", "--archived", "--json")
    assert (told.code, told.json["verdict"]) == (3, "refused")


# --- verify: explained ------------------------------------------------------------------------------------------------


def test_every_step_is_explained(verify: Callable[..., Ran], strongroom: Terminal, street: Street) -> None:
    ran = strongroom("verify", *street.options, "--explain")
    assert ran.code == 0
    heads = [line for line in ran.out.splitlines() if line[:2].strip().isdigit()]
    assert [int(line.split()[0]) for line in heads] == list(range(1, 16))
    assert all(f"    {QUESTIONS[step]}\n" in ran.out for step in STEPS)
    assert not any(QUESTIONS[step] in ran.out for step in KEY_STEPS)
    assert "…" not in ran.out
    assert "    ok\n      expected  COSE_Sign1, ES384\n      got       COSE_Sign1, ES384\n" in ran.out
    failed = verify("evidence.cbor", "--nonce", bytes(32).hex(), "--explain").out
    assert "FAILED  [untrusted_chain]" in failed
    assert failed.count("    not reached\n") == 11


# --- verify: KMS keys -------------------------------------------------------------------------------------------------


@pytest.fixture
def kms(folder: Path, monkeypatch: pytest.MonkeyPatch) -> dict[KeyArn, KeyFacts]:
    """What KMS says of the keys that ``keys.toml`` names."""
    named = with_keys(AppraisalPolicy.load(folder / "policy.toml"), *EnvelopePurpose)
    (folder / "model.sealed").write_bytes(HEADER.encode())
    (folder / "keys.toml").write_text(write_policy(named, root="root.der"))
    (folder / "young.cbor").write_bytes(forge.evidence(_young()))
    said = all_facts(named)
    monkeypatch.setattr(verification, "ask_of_keys", lambda policy: said)
    return said


NONCE = ("--nonce", forge.NONCE.hex())
BOTH_KEYS = f"key (model) MUTABLE-BY({ADMIN}), key (prompts) MUTABLE-BY({ADMIN})"


def test_keys_are_judged_with_the_evidence(verify: Callable[..., Ran], kms: dict[KeyArn, KeyFacts]) -> None:
    ran = verify("young.cbor", *NONCE, policy="keys.toml")
    assert ran.code == 0
    [verdict] = [line for line in ran.out.splitlines() if line.startswith("ACCEPTED")]
    assert verdict.endswith(f" s, {BOTH_KEYS}")
    rows = re.findall(r"^ *(\d+)  (\w.*?) \((model|prompts)\) ", ran.out, re.MULTILINE)
    assert rows == [(str(step), name, key) for key in ("model", "prompts") for step, name in KEY_STEPS.items()]
    told = verify("young.cbor", *NONCE, "--json", policy="keys.toml").json
    assert [check["step"] for check in told["checks"] if check["step"] > 15] == [*KEY_STEPS] * 2
    explained = verify("young.cbor", *NONCE, "--explain", policy="keys.toml").out
    assert all(explained.count(f"    {QUESTIONS[step]}\n") == 2 for step in KEY_STEPS)
    assert "    n/a  wrapped key (prompts)  each prompt has a wrapped key of its own\n" in explained


def test_a_key_that_is_open_refuses(verify: Callable[..., Ran], kms: dict[KeyArn, KeyFacts], folder: Path) -> None:
    named = AppraisalPolicy.load(folder / "keys.toml")
    kms[KEYS[PROMPT]] = facts(named, PROMPT, more=[allow("kms:Decrypt")])
    ran = verify("young.cbor", *NONCE, policy="keys.toml")
    assert ran.code == 1
    assert "REFUSED  EMULATED  the policy refuses this enclave: key policy (prompts) [open_key_policy]" in ran.out
    assert "\nkey policy (prompts) [open_key_policy]: KMS would release to something else" in ran.out
    told = verify("young.cbor", *NONCE, "--json", policy="keys.toml")
    assert (told.code, told.json["error"]["code"]) == (1, "open_key_policy")


def test_kms_that_is_away_is_no_verdict(
    verify: Callable[..., Ran], kms: dict[KeyArn, KeyFacts], monkeypatch: pytest.MonkeyPatch
) -> None:
    def away(policy: AppraisalPolicy) -> Mapping[KeyArn, KeyFacts]:
        raise KmsError("kms_unavailable", "KMS cannot be asked: a test")

    monkeypatch.setattr(verification, "ask_of_keys", away)
    ran = verify("young.cbor", *NONCE, policy="keys.toml")
    assert (ran.code, ran.out) == (4, "")
    assert "[kms_unavailable]" in ran.err
    archived = verify("young.cbor", "--archived", policy="keys.toml")
    assert archived.code == 0
    assert "(prompts)" not in archived.out


def test_a_key_that_nobody_was_asked_about(verify: Callable[..., Ran], kms: dict[KeyArn, KeyFacts]) -> None:
    kms.clear()
    ran = verify("young.cbor", *NONCE, policy="keys.toml")
    assert (ran.code, ran.out) == (2, "")
    assert "kms.model.key: the policy names a KMS key" in ran.err


# --- inspect ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("file", ["bundle.json", "evidence.cbor", "document.cbor"])
def test_what_is_inspected_is_unverified(strongroom: Terminal, folder: Path, file: str) -> None:
    ran = strongroom("inspect", str(folder / file))
    assert (ran.code, ran.err) == (0, "")
    lines = ran.out.strip().splitlines()
    assert lines[0] == lines[-1] == "UNVERIFIED: decoded and not judged. Anybody can write such bytes."
    assert "module_id     i-0123456789abcdef0-enc0123456789abcdef" in ran.out
    assert ran.out.count("certificate   CN=") == 5
    assert ("key_id" in ran.out) == (file != "document.cbor")
    told = strongroom("inspect", str(folder / file), "--json").json
    assert (told["verdict"], told["problems"]) == ("unverified", [])
    assert told["document"]["pcrs"]["0"] == forge.PCRS[0].hex()
    assert told["document"]["binding"]["purpose"] == "channel"
    assert ("bundle" in told) == (file == "bundle.json")


def test_an_enclave_is_inspected(strongroom: Terminal, street: Street) -> None:
    ran = strongroom("inspect", "--url", street.url, "--json")
    assert (ran.code, ran.json["subject"]) == (0, "Evidence")
    assert ran.json["bundle"]["nonce"] == ran.json["document"]["nonce"]


_COMMON_NAME = b"\x06\x03\x55\x04\x03"
NAME_IN_BITS = forge.GOOD_CHAIN.certificate.replace(_COMMON_NAME + b"\x0c", _COMMON_NAME + b"\x03")
"""A certificate whose names are BIT STRINGs: the library reads it, and fails at its names with an error of its own."""


@pytest.mark.parametrize(
    ("data", "code", "shown"),
    [
        (forge.document(protected=cbor2.dumps({1: -7})), "wrong_algorithm", "module_id     i-"),
        (forge.document(forge.payload_fields(pcrs={32: bytes(48)})), "malformed_document", "zero          PCR 32"),
        (forge.document(forge.payload_fields(certificate=b"\x30\x00")), "untrusted_chain", "certificate   unreadable"),
        (forge.document(forge.payload_fields(certificate=NAME_IN_BITS)), "untrusted_chain", "certificate   unreadable"),
        (forge.evidence(commitment=b"\xa0"), "malformed_commitment", "module_id     i-"),
        (forge.document(cbor2.dumps([])), "malformed_document", "UNVERIFIED"),
        (forge.document(forge.payload_fields(module_id="\x1b[2J")), "malformed_document", r"\x1b[2J"),
        (forge.document(forge.payload_fields(user_data=b"another's")), None, "user_data     616e6f74686572"),
    ],
    ids=["algorithm", "registers", "certificate", "name", "commitment", "payload", "escape", "user data"],
)
def test_what_is_not_as_specified_is_shown_all_the_same(
    strongroom: Terminal, data: bytes, code: str | None, shown: str
) -> None:
    ran = strongroom("inspect", "-", stdin=data)
    assert ran.code == 0
    assert shown in ran.out
    assert code is None or f"[{code}]" in ran.out
    assert "\x1b" not in ran.out
    problems = strongroom("inspect", "-", "--json", stdin=data).json["problems"]
    assert [problem["code"] for problem in problems] == ([] if code is None else [code])


PAYLOAD = forge.payload_fields()
TWICE = forge.raw_map([("module_id", "another"), *PAYLOAD.items()])
COMMITMENT = forge.COMMITMENT.encode()


@pytest.mark.parametrize(
    ("data", "code", "shown"),
    [
        (forge.evidence() + b"\x00", "malformed_evidence", ("subject       Evidence", "key_id", "module_id     i-")),
        (forge.document() + b"\x00", "malformed_cbor", ("subject       attestation document", "module_id     i-")),
        (forge.evidence(forge.document() + b"\x00"), "malformed_cbor", ("key_id", "module_id     i-", "signature")),
        (forge.document(TWICE), "malformed_cbor", ("module_id     i-", "PCR0          ")),
        (forge.document(forge.encode(PAYLOAD) + b"\x00"), "malformed_cbor", ("module_id     i-", "PCR0          ")),
        (
            cbor2.dumps({"v": 1, "document": forge.document(), "commitment": COMMITMENT, "more": 1}),
            "malformed_evidence",
            ("key_id", "module_id     i-"),
        ),
        (cbor2.dumps({"document": forge.document()}), "malformed_evidence", ("module_id     i-",)),
        (cbor2.dumps({"commitment": COMMITMENT, "document": 0}), "malformed_evidence", ("key_id", "lifetime")),
        (forge.evidence(b"\x00"), "malformed_cose", ("key_id", "lifetime")),
        (
            forge.evidence(commitment=COMMITMENT + b"\x00"),
            "malformed_commitment",
            ("lifetime      ", "module_id     i-"),
        ),
        (b"\xd9\xd9\xf7" + forge.document(), "malformed_cbor", ("module_id     i-",)),
        (forge.document(forge.encode({**PAYLOAD, "more": [1.5]})), "malformed_cbor", ("more          array of 1",)),
        (forge.document(forge.encode({**PAYLOAD, "more": 1 << 70000})), "malformed_cbor", ("integer of 70001 bits",)),
        (
            forge.document(forge.encode({**PAYLOAD, "timestamp": 1 << 60})),
            "malformed_document",
            ("1152921504606846976",),
        ),
        (
            forge.document(forge.encode({**PAYLOAD, "pcrs": dict.fromkeys(range(100), b"\x01")})),
            "malformed_document",
            ("PCR63         01", "and more      36"),
        ),
        (forge.document(forge.encode({**PAYLOAD, "certificate": 1})), "malformed_document", ("unreadable",)),
    ],
)
def test_what_is_broken_is_shown_as_far_as_it_can_be(
    strongroom: Terminal, data: bytes, code: str, shown: tuple[str, ...]
) -> None:
    ran = strongroom("inspect", "-", stdin=data)
    assert (ran.code, ran.err) == (0, "")
    lines = ran.out.strip().splitlines()
    assert lines[0] == lines[-1] == "UNVERIFIED: decoded and not judged. Anybody can write such bytes."
    assert f"[{code}]" in ran.out
    for words in shown:
        assert words in ran.out
    told = strongroom("inspect", "-", "--json", stdin=data)
    assert (told.json["verdict"], told.json["problems"][0]["code"]) == ("unverified", code)


def test_no_word_of_python(strongroom: Terminal, folder: Path) -> None:
    assert "debug         no\n" in strongroom("inspect", str(folder / "document.cbor")).out
    assert "debug         yes\n" in strongroom("inspect", str(folder / "debug.cbor")).out
    assert strongroom("inspect", str(folder / "debug.cbor"), "--json").json["document"]["debug"] is True


@pytest.mark.parametrize(
    "data", [b"", b"\x00", b"\xa0", b"\xff", cbor2.dumps([1, 2, 3, 4]), cbor2.dumps([1, 2, b"\xff", 4]), b"\x81" * 9999]
)
def test_nothing_to_inspect(strongroom: Terminal, data: bytes) -> None:
    ran = strongroom("inspect", "-", stdin=data)
    assert (ran.code, ran.out) == (3, "")


def test_a_certificate_is_taken_for_one(strongroom: Terminal, folder: Path) -> None:
    ran = strongroom("inspect", str(folder / "root.der"))
    assert (ran.code, ran.out) == (3, "")
    assert "a DER certificate?" in ran.err


def test_inspect_takes_one_place(strongroom: Terminal, folder: Path) -> None:
    ran = strongroom("inspect", str(folder / "evidence.cbor"), "--url", "http://127.0.0.1:1")
    assert (ran.code, ran.out) == (2, "")


# --- evidence ---------------------------------------------------------------------------------------------------------


def test_evidence_is_kept_and_verified_later(strongroom: Terminal, street: Street, tmp_path: Path) -> None:
    path = tmp_path / "kept.json"
    ran = strongroom("evidence", "--url", street.url, "--output", str(path))
    assert (ran.code, ran.out) == (0, f"wrote {path}, as it came\n")
    assert "not judged yet" in ran.err
    kept = Bundle.decode(path.read_bytes())
    assert kept.source == street.url
    assert abs(kept.fetched - datetime.now(UTC)) < timedelta(minutes=5)
    later = strongroom("verify", str(path), "--archived", "--policy", street.policy_file, "--json")
    assert (later.code, later.json["verdict"]) == (0, "accepted_when_made")


def test_evidence_is_not_overwritten(strongroom: Terminal, street: Street, tmp_path: Path) -> None:
    path = tmp_path / "kept.json"
    path.write_text("mine")
    ran = strongroom("evidence", "--url", street.url, "-o", str(path))
    assert (ran.code, ran.out, path.read_text()) == (2, "", "mine")
    assert "nothing was changed" in ran.err


def test_evidence_on_standard_output(strongroom: Terminal, street: Street) -> None:
    ran = strongroom("evidence", "--url", street.url, "-o", "-", "--nonce", bytes(32).hex())
    assert (ran.code, Bundle.decode(ran.out.encode()).nonce) == (0, bytes(32))


def test_evidence_for_a_program(strongroom: Terminal, street: Street, tmp_path: Path) -> None:
    path = tmp_path / "kept.json"
    ran = strongroom("evidence", "--url", street.url, "-o", str(path), "--json")
    assert (ran.code, ran.json["bundle"], ran.json["verified"]) == (0, str(path), False)
    assert ran.json["nonce"] == json.loads(path.read_text())["nonce"]


def test_nobody_to_ask(strongroom: Terminal, nobody: str, tmp_path: Path) -> None:
    path = tmp_path / "kept.json"
    for command in (("evidence", "-o", str(path)), ("inspect",)):
        ran = strongroom(*command, "--url", nobody)
        assert (ran.code, ran.out) == (4, "")
    assert not path.exists()
    for size in (1, 16, 33):
        ran = strongroom("evidence", "--url", nobody, "--nonce", bytes(size).hex())
        assert (ran.code, f"expected 64 hexadecimal digits, got {2 * size}" in ran.err) == (2, True)


def test_the_folder_is_looked_at_before_an_enclave_is_asked(strongroom: Terminal, nobody: str, tmp_path: Path) -> None:
    ran = strongroom("evidence", "--url", nobody, "-o", str(tmp_path / "nowhere" / "kept.json"))
    assert (ran.code, ran.err) == (2, f"strongroom: {tmp_path / 'nowhere'}: No such folder\n")
    (tmp_path / "link").symlink_to("nothing")
    assert "File exists" in strongroom("evidence", "--url", nobody, "-o", str(tmp_path / "link")).err


# --- AWS's own documents ----------------------------------------------------------------------------------------------

REAL = Path(__file__).resolve().parents[3] / "shared" / "vectors" / "nitro"


@pytest.mark.skipif(not REAL.is_dir(), reason="AWS's collected documents are not beside this repository")
def test_a_real_document(verify: Callable[..., Ran], strongroom: Terminal, folder: Path) -> None:
    index = json.loads((REAL / "INDEX.json").read_text())["documents"]
    entry = next(each for each in index if each["expected"] == "valid" and not each["debug_mode"])
    pcrs = [bytes.fromhex(entry["pcrs"][str(number)]) for number in (0, 1, 2)]
    anything = Ignore("a test")
    policy = replace(
        AppraisalPolicy.parse(forge.POLICY, folder),
        anchor=AWS_NITRO_G1,
        binding=DocumentBinding(anything, anything),
        releases=(Release("collected", PcrSet(*pcrs)),),
        model=anything,
        configuration=anything,
        pcrs={3: anything, 4: anything, 8: anything},
    )
    (folder / "aws.toml").write_text(write_policy(policy))
    path = REAL / entry["file"]
    ran = strongroom("verify", str(path), "--archived", "--policy", str(folder / "aws.toml"))
    assert ran.code == 0
    assert "ACCEPTED WHEN MADE  ARCHIVED  release collected" in ran.out
    assert "EMULATED" not in ran.out
    assert strongroom("inspect", str(path)).code == 0
