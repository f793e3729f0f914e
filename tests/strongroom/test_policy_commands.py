"""``strongroom policy``: from every source to a verdict, and nothing written that nobody vouches for."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from attestation.anchors import AWS_NITRO_G1
from attestation.bundle import Bundle
from attestation.chain import Anchor
from attestation.checks import Label
from attestation.commitment import Purpose, UserData
from attestation.errors import AppraisalError
from attestation.manifest import ModelManifest
from attestation.policy import AppraisalPolicy
from attestation.reference import PcrSet, configuration_digest
from attestation.release_heads import MemoryHeads
from attestation.releases import ReleasedImage, append
from attestation.rules import (
    ChannelBinding,
    DocumentBinding,
    Forbid,
    Ignore,
    Manifests,
    Measures,
    Release,
    Released,
    Require,
    SignedReleases,
)
from attestation.verifier import verify, verify_archived, verify_document
from strongroom.options import out
from tests.gguf_files import TEXT, Gguf
from tests.pki import forge
from tests.release_files import ED25519, NAME, ONE, P384, TWO
from tests.sound_images import SIGNER, sound
from tests.terminal import Ran, Terminal

REAL = Path(__file__).resolve().parents[3] / "shared" / "vectors" / "nitro"

EIF = sound()
MODEL = Gguf([("tokenizer.chat_template", TEXT, "{{ messages }}")]).encode()
CONFIGURATION = b"version = 1\n"
IMAGE = PcrSet(forge.PCRS[0], forge.PCRS[1], forge.PCRS[2])
IGNORED = ("--ignore-model", "any will do", "--ignore-configuration", "any will do")
EMULATED = ("--anchor", "root.der")
FIRST_USE = "trusted on first use, 2026-03-01T12:00:00Z"
BUNDLE = Bundle(forge.evidence(), forge.NONCE, forge.NOW, "http://127.0.0.1:8080")
PIN = str(ED25519.public_key)
RELEASE = ("--from-release", "releases.jsonl", "--key", PIN, "--product", NAME)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where the commands run, with every kind of source."""
    measurements = {
        "HashAlgorithm": "Sha384 { ... }",
        **{f"PCR{index}": value.hex() for index, value in IMAGE.as_registers().items()},
    }
    files = {
        "root.der": forge.ROOT_DER,
        "enclave.eif": EIF.encode(),
        "signed.eif": EIF.signed(SIGNER).encode(),
        "build.json": json.dumps({"Measurements": measurements}).encode(),
        "bundle.json": BUNDLE.encode(),
        "evidence.cbor": forge.evidence(),
        "document.cbor": forge.document(),
        "model.gguf": MODEL,
        "enclave.toml": CONFIGURATION,
    }
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
    for version in (2, 3):
        manifest = replace(ModelManifest.from_gguf(tmp_path / "model.gguf"), version=version)
        (tmp_path / f"{version}.manifest").write_bytes(manifest.encode())
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def init(strongroom: Terminal, folder: Path) -> Init:
    return Init(strongroom, folder)


class Init:
    """``policy init`` in the folder."""

    def __init__(self, terminal: Terminal, folder: Path) -> None:
        self.terminal = terminal
        self.folder = folder

    def __call__(self, *arguments: str, stdin: bytes = b"") -> Ran:
        return self.terminal("policy", "init", *arguments, stdin=stdin)

    def policy(self, *arguments: str, stdin: bytes = b"") -> AppraisalPolicy:
        """The policy that was written."""
        ran = self(*arguments, stdin=stdin)
        assert (ran.code, ran.out.splitlines()[0]) == (0, "wrote policy.toml"), ran.err
        return AppraisalPolicy.load(self.folder / "policy.toml", heads=MemoryHeads())

    def refused(self, *arguments: str, stdin: bytes = b"") -> Ran:
        """What is said when nothing is written."""
        before = sorted(self.folder.iterdir())
        ran = self(*arguments, stdin=stdin)
        assert ran.code != 0
        assert ran.out == ""
        assert sorted(self.folder.iterdir()) == before
        return ran

    def publish(self, *statements: Sequence[ReleasedImage], signer: Any = ED25519, days: int = 90) -> bytes:
        now, history = datetime.now(UTC), b""
        for releases in statements:
            expires = now + timedelta(days=days)
            history += append(history, signer=signer, name=NAME, releases=releases, issued=now, expires=expires)
        (self.folder / "releases.jsonl").write_bytes(history)
        return history


# --- Help ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["init", "check", "explain"])
def test_every_command_has_examples(strongroom: Terminal, name: str) -> None:
    ran = strongroom("policy", name, "--help")
    assert ran.code == 0
    assert f"\n    strongroom policy {name}" in ran.out.partition("\n  Examples:\n")[2]
    assert f"\n  {name} " in strongroom("policy", "--help").out


# --- init: images -------------------------------------------------------------------------------------------------


def test_from_an_image_file(init: Init) -> None:
    policy = init.policy("--from-eif", "enclave.eif", "--model", "model.gguf", "--configuration", "enclave.toml")
    assert policy.accepted_releases == (Release("enclave.eif", PcrSet(*EIF.registers())),)
    assert policy.anchor == AWS_NITRO_G1
    assert policy.binding == ChannelBinding()
    assert policy.model == Require((ModelManifest.from_gguf(init.folder / "model.gguf").digest(),))
    assert policy.configuration == Require((configuration_digest(CONFIGURATION),))
    assert policy.pcrs == {
        3: Ignore("no role was given to policy init"),
        4: Ignore("no instance was given to policy init"),
        8: Forbid(),
    }
    assert (policy.max_age_seconds, policy.leeway_seconds, policy.accept_debug) == (300, 120, None)


def test_from_a_signed_image_file(init: Init) -> None:
    policy = init.policy("--from-eif", "signed.eif", *IGNORED, "--release", "1.0")
    [release] = policy.accepted_releases
    assert release.name == "1.0"
    assert release.pcrs.pcr8 is not None
    assert policy.pcrs.keys() == {3, 4}


def test_everything_can_be_said(init: Init) -> None:
    arn, digest = "arn:aws:iam::123456789012:role/enclave", f"sha384:{'AB' * 48}"
    policy = init.policy(
        "--from-eif", "enclave.eif", "--purpose", "document", "--role", arn, "--role", f"{arn}2", "--instance", "i-1",
        "--model", digest, "--model", "2.manifest", "--configuration", digest, "--configuration", "enclave.toml",
        "--max-age", "60", "--leeway", "5", *EMULATED,
    )  # fmt: skip
    assert policy.pcrs == {3: Measures((arn, f"{arn}2")), 4: Measures(("i-1",)), 8: Forbid()}
    manifest = ModelManifest.decode((init.folder / "2.manifest").read_bytes())
    assert policy.model == Require((b"\xab" * 48, manifest.digest()))
    assert policy.configuration == Require((b"\xab" * 48, configuration_digest(CONFIGURATION)))
    assert (policy.max_age_seconds, policy.leeway_seconds) == (60, 5)
    assert policy.anchor == Anchor.emulated(forge.ROOT_DER)
    assert isinstance(policy.binding, DocumentBinding)
    assert isinstance(policy.binding.public_key, Ignore)


def test_from_what_nitro_cli_printed(init: Init) -> None:
    """And a verdict on what it pins."""
    digests = (f"sha384:{forge.COMMITMENT.model.hex()}", f"sha384:{forge.COMMITMENT.configuration.hex()}")
    arguments = ("--from-measurements", "build.json", "--model", digests[0], "--configuration", digests[1], *EMULATED)
    policy = init.policy(*arguments, "--instance", "i-0123456789abcdef0")
    assert verify(forge.evidence(), policy=policy, nonce=forge.NONCE, at=forge.NOW).release == "build.json"
    (init.folder / "policy.toml").unlink()
    elsewhere = init.policy(*arguments, "--instance", "i-0000000000000000f")
    with pytest.raises(AppraisalError) as caught:
        verify(forge.evidence(), policy=elsewhere, nonce=forge.NONCE, at=forge.NOW)
    assert caught.value.code == "wrong_pcr"


def test_manifests_are_named_as_files(init: Init) -> None:
    (init.folder / "policies").mkdir()
    arguments = ("--minimum-version", "3", "--model", "2.manifest", "--model", "3.manifest")
    output = init.folder / "policies" / "policy.toml"
    ran = init("--from-eif", "enclave.eif", *arguments, "--ignore-configuration", "any", "--output", str(output))
    assert ran.code == 0
    rule = AppraisalPolicy.load(output).model
    assert isinstance(rule, Manifests)
    assert [name for name, _ in rule.files] == ["../2.manifest", "../3.manifest"]
    assert rule.minimum_version == 3


# --- init: Evidence -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["bundle.json", "evidence.cbor", "-"])
def test_from_evidence(init: Init, name: str) -> None:
    policy = init.policy("--from-evidence", name, *EMULATED, stdin=forge.evidence().hex().encode())
    assert policy.accepted_releases == (Release(FIRST_USE, IMAGE),)
    assert policy.model == Require((forge.COMMITMENT.model,))
    assert policy.configuration == Require((forge.COMMITMENT.configuration,))
    result = verify(forge.evidence(), policy=policy, nonce=forge.NONCE, at=forge.NOW)
    assert result.release == FIRST_USE
    other = forge.payload_fields(pcrs={**forge.PCRS, 2: forge.measured("another application")})
    with pytest.raises(AppraisalError) as caught:
        verify(forge.evidence(forge.document(other)), policy=policy, nonce=forge.NONCE, at=forge.NOW)
    assert caught.value.code == "wrong_image"


def test_trust_on_first_use_says_what_it_is(init: Init) -> None:
    ran = init("--from-evidence", "bundle.json", *EMULATED)
    assert f"trust_on_first_use: {FIRST_USE}" in ran.err
    notes = [line for line in (init.folder / "policy.toml").read_text().splitlines() if "TRUST ON FIRST USE" in line]
    assert [line[0] for line in notes] == ["#"]
    assert "trust_on_first_use" in init.terminal("policy", "check").out


def test_trust_on_first_use_under_another_name(init: Init) -> None:
    ran = init("--from-evidence", "bundle.json", *EMULATED, "--release", "mine", "--json")
    assert ran.json["trust_on_first_use"] is True
    assert [release["name"] for release in ran.json["releases"]] == ["trusted on first use, mine"]
    assert [each["code"] for each in ran.json["warnings"]].count("trust_on_first_use") == 1
    assert "trust_on_first_use" in init.terminal("policy", "check").out


def test_from_a_bare_document(init: Init) -> None:
    policy = init.policy("--from-evidence", "document.cbor", *EMULATED, *IGNORED)
    assert isinstance(policy.binding, DocumentBinding)
    assert policy.binding.public_key == Forbid()
    assert isinstance(policy.binding.user_data, Ignore)
    result = verify_document(forge.document(), policy=policy, nonce=forge.NONCE, at=forge.NOW)
    assert result.release == FIRST_USE


def test_from_the_document_in_evidence(init: Init) -> None:
    policy = init.policy("--from-evidence", "bundle.json", "--purpose", "document", *EMULATED, *IGNORED)
    assert verify_archived(forge.document(), policy=policy, nonce=forge.NONCE).labels >= {Label.ARCHIVED}


def test_what_a_document_has_in_other_registers_is_pinned(init: Init) -> None:
    pcrs = {**forge.PCRS, 8: forge.measured("signer"), 9: forge.measured("more"), 20: forge.measured("still more")}
    document = forge.document(forge.payload_fields(pcrs=pcrs))
    policy = init.policy("--from-evidence", "-", *EMULATED, *IGNORED, stdin=document)
    assert policy.accepted_releases[0].pcrs.pcr8 == pcrs[8]
    assert {index: rule for index, rule in policy.pcrs.items() if index > 4} == {
        9: Require((pcrs[9],)),
        20: Require((pcrs[20],)),
    }


def _evidence(**changes: Any) -> bytes:
    return forge.evidence(forge.document(forge.payload_fields(**changes)))


ANOTHER = replace(forge.COMMITMENT, lifetime=60).encode()
UNVOUCHED = {
    "another root": ((), forge.evidence(), "untrusted_chain", 3),
    "altered": (EMULATED, forge.evidence(forge.document(signature=bytes(95) + b"\x01")), "bad_signature", 3),
    "another commitment": (EMULATED, forge.evidence(commitment=ANOTHER), "wrong_binding", 3),
    "no commitment": (EMULATED, forge.evidence(commitment=b""), "malformed_commitment", 3),
    "for a key service": (
        EMULATED,
        _evidence(user_data=UserData(Purpose.KMS, forge.COMMITMENT.digest()).encode()),
        "wrong_binding",
        3,
    ),
    "another nonce": (EMULATED, replace(BUNDLE, nonce=bytes(32)).encode(), "wrong_nonce", 3),
    "in debug mode": (EMULATED, _evidence(pcrs=forge.DEBUG_PCRS), "debug_mode", 1),
    "a register of zero": (EMULATED, _evidence(pcrs={**forge.PCRS, 1: bytes(48)}), "contradiction", 2),
    "without an image": (EMULATED, _evidence(pcrs={16: forge.PCRS[16]}), "no_measurements", 2),
    "nothing": (EMULATED, b"", "malformed_bundle", 3),
    "no Evidence": (EMULATED, b"\xa0", "malformed_evidence", 3),
    "no document": ((*EMULATED, *IGNORED), b"\x80", "malformed_cose", 3),
    "no text": (EMULATED, b"====", "malformed_bundle", 3),
}


@pytest.mark.parametrize(("options", "data", "code", "exit_code"), UNVOUCHED.values(), ids=UNVOUCHED)
def test_what_nobody_vouches_for_is_never_written(
    init: Init, options: tuple[str, ...], data: bytes, code: str, exit_code: int
) -> None:
    ran = init.refused("--from-evidence", "-", *options, stdin=data)
    assert f"[{code}]" in ran.err
    assert ran.code == exit_code
    (init.folder / "source").write_bytes(data)
    as_json = init("--from-evidence", "source", *options, "--json")
    assert (as_json.code, as_json.json["error"]["code"]) == (exit_code, code)


def test_a_policy_that_refuses_its_own_evidence_is_not_written(init: Init) -> None:
    ran = init.refused("--from-evidence", "bundle.json", *EMULATED, "--model", "model.gguf")
    assert ran.code == 1
    assert "[wrong_model]" in ran.err
    ran = init.refused("--from-evidence", "bundle.json", *EMULATED, "--role", "arn:aws:iam::123456789012:role/other")
    assert "[wrong_pcr]" in ran.err


def test_a_bare_document_opens_no_channel(init: Init) -> None:
    ran = init.refused("--from-evidence", "document.cbor", "--purpose", "channel", *EMULATED, *IGNORED)
    assert (ran.code, "[wrong_purpose]" in ran.err) == (2, True)


def test_a_document_is_held_to_what_was_named(init: Init) -> None:
    document = forge.document(forge.payload_fields(public_key=b"a key", user_data=b"some data"))
    (init.folder / "document.cbor").write_bytes(document)
    source = ("--from-evidence", "document.cbor", *EMULATED, *IGNORED)
    policy = init.policy(
        *source,
        *("--public-key", b"a key".hex(), "--public-key", b"another".hex(), "--user-data", b"some data".hex()),
        *("--module-id", "i-0123456789abcdef0-enc0123456789abcdef"),
    )
    assert policy.binding == DocumentBinding(Require((b"a key", b"another")), Require((b"some data",)))
    assert policy.module_id == Require(("i-0123456789abcdef0-enc0123456789abcdef",))
    (init.folder / "policy.toml").unlink()
    for option, value in (("--public-key", "00"), ("--user-data", "00"), ("--module-id", "another")):
        ran = init.refused(*source, option, value)
        assert ran.code == 1


def test_what_an_image_file_cannot_say_of_documents(init: Init) -> None:
    policy = init.policy(*FROM_EIF, *IGNORED, "--purpose", "document", "--user-data", "ab")
    assert isinstance(policy.binding, DocumentBinding)
    assert policy.binding.user_data == Require((b"\xab",))


def test_a_channel_has_its_own_key_and_data(init: Init) -> None:
    for option in ("--public-key", "--user-data"):
        ran = init.refused(*FROM_EIF, *IGNORED, option, "ab")
        assert (ran.code, "for --purpose document" in ran.err) == (2, True)
    assert (
        "expected 2 to 2048 hexadecimal digits, got 2050"
        in init.refused(*FROM_EIF, *IGNORED, "--user-data", "ab" * 1025).err
    )
    assert "--module-id: " in init.refused(*FROM_EIF, *IGNORED, "--module-id", "two\nlines").err


def test_evidence_of_an_emulated_enclave_needs_its_root(init: Init) -> None:
    ran = init.refused("--from-evidence", "bundle.json")
    assert (ran.code, "[untrusted_chain]" in ran.err) == (3, True)
    assert "another root than the anchor AWS-NITRO-G1" in ran.err
    assert "--anchor FILE.der" in ran.err


def test_a_history_that_was_rolled_back_is_named(init: Init) -> None:
    init.publish([GOOD], [GOOD])
    assert init(*RELEASE).code == 0
    (init.folder / "policy.toml").unlink()
    init.publish([GOOD])
    ran = init.refused(*RELEASE)
    assert (ran.code, "releases.jsonl: the history has 1 entry, and 2 were seen before" in ran.err) == (3, True)


def test_the_help_says_what_is_ignored_unasked(strongroom: Terminal) -> None:
    said = " ".join(strongroom("policy", "init", "--help").out.split())
    assert "for what you do not name the policy accepts any, in so many words, and a warning says so" in said


def test_more_than_evidence_can_be(init: Init) -> None:
    (init.folder / "large").write_bytes(bytes(200_000))
    for place, stdin in (("large", b""), ("-", bytes(200_000))):
        ran = init.refused("--from-evidence", place, *EMULATED, stdin=stdin)
        assert (ran.code, "not of a size that Evidence has" in ran.err) == (3, True)


def test_aws_documents(init: Init) -> None:
    """Each real document of a production enclave makes a policy that accepts it; no other makes any."""
    if not REAL.is_dir():
        pytest.skip("AWS's collected documents are not beside this repository: ../shared/vectors/nitro")
    made = 0
    for entry in json.loads((REAL / "INDEX.json").read_text())["documents"]:
        arguments = ("--from-evidence", str(REAL / entry["file"]), *IGNORED)
        if entry["expected"] == "valid" and not entry["debug_mode"]:
            policy = init.policy(*arguments)
            result = verify_archived((REAL / entry["file"]).read_bytes(), policy=policy)
            assert (result.release or "").startswith("trusted on first use")
            (init.folder / "policy.toml").unlink()
            made += 1
        else:
            assert init.refused(*arguments).code == (1 if entry["expected"] == "valid" else 3)
    assert made == 20


# --- init: releases -----------------------------------------------------------------------------------------------

GOOD = replace(
    ONE,
    pcrs=IMAGE,
    models=(forge.COMMITMENT.model,),
    configurations=(forge.COMMITMENT.configuration,),
)


def test_from_a_release_history(init: Init) -> None:
    init.publish([GOOD], [GOOD, TWO])
    policy = init.policy(*RELEASE, *EMULATED)
    assert isinstance(policy.releases, SignedReleases)
    assert (policy.releases.file, policy.releases.minimum_sequence) == ("releases.jsonl", 2)
    assert (policy.model, policy.configuration) == (Released(), Released())
    [issued] = {entry.statement.issued for entry in policy.releases.history.entries}
    assert policy.expires == issued + timedelta(days=90)
    checked = init.terminal("policy", "check", "--json").json
    assert "trust_on_first_use" not in [each["code"] for each in checked["warnings"]]
    assert "rollout" in [each["code"] for each in checked["notes"]]


def test_a_history_of_which_less_is_asked(init: Init) -> None:
    init.publish([GOOD], [GOOD])
    policy = init.policy(*RELEASE, "--minimum-sequence", "1")
    assert isinstance(policy.releases, SignedReleases)
    assert policy.releases.minimum_sequence == 1


def test_releases_that_name_nothing_more(init: Init) -> None:
    init.publish([TWO])
    assert "--ignore-model" in init.refused(*RELEASE).err
    policy = init.policy(*RELEASE, *IGNORED)
    assert policy.model == Ignore("any will do")
    assert policy.pcrs.keys() == {3, 4}


@pytest.mark.parametrize(
    ("arguments", "code", "exit_code"),
    [
        ((*RELEASE[:3], str(P384.public_key), *RELEASE[4:]), "wrong_key", 3),
        ((*RELEASE[:5], "other"), "wrong_name", 3),
        ((*RELEASE, "--minimum-sequence", "2"), "rolled_back", 3),
    ],
)
def test_a_history_that_nothing_vouches_for(init: Init, arguments: tuple[str, ...], code: str, exit_code: int) -> None:
    init.publish([GOOD])
    ran = init.refused(*arguments)
    assert (ran.code, f"[{code}]" in ran.err) == (exit_code, True)


def test_a_history_that_takes_everything_back(init: Init) -> None:
    init.publish([GOOD], [])
    assert "[no_release]" in init.refused(*RELEASE).err


def test_an_older_history_than_one_that_was_seen(init: Init) -> None:
    """The policy and the root that was copied for it are gone again."""
    whole = init.publish([GOOD], [GOOD])
    init.policy(*RELEASE)
    (init.folder / "policy.toml").unlink()
    (init.folder / "releases.jsonl").write_bytes(whole[: whole.index(b"\n") + 1])
    (init.folder / "elsewhere").mkdir()
    (init.folder / "root.der").rename(init.folder / "elsewhere" / "root.der")
    ran = init.refused(*RELEASE, "--anchor", "elsewhere/root.der")
    assert (ran.code, "[rolled_back]" in ran.err) == (3, True)


def test_a_history_that_will_expire_soon(init: Init) -> None:
    init.publish([GOOD], days=7)
    assert "releases_expire_soon" in init(*RELEASE).err


# --- init: usage --------------------------------------------------------------------------------------------------

FROM_EIF = ("--from-eif", "enclave.eif")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (IGNORED, "name one of --from-eif"),
        ((*FROM_EIF, "--from-measurements", "build.json", *IGNORED), "name one of --from-eif"),
        (FROM_EIF, "--ignore-model"),
        ((*FROM_EIF, "--ignore-model", "x"), "--ignore-configuration"),
        (("--from-evidence", "document.cbor", *EMULATED), "--ignore-model"),
        ((*FROM_EIF, *IGNORED, "--model", "model.gguf"), "contradict"),
        ((*FROM_EIF, *IGNORED, "--configuration", "enclave.toml"), "contradict"),
        ((*FROM_EIF, *IGNORED, "--key", PIN), "for --from-release"),
        ((*FROM_EIF, *IGNORED, "--product", NAME), "for --from-release"),
        ((*FROM_EIF, *IGNORED, "--minimum-sequence", "1"), "for --from-release"),
        ((*RELEASE, "--release", "1.0"), "--release"),
        (RELEASE[:4], "--product"),
        ((*RELEASE[:2], *RELEASE[4:]), "--key"),
        ((*RELEASE[:3], "ed25519:00", *RELEASE[4:]), "--key"),
        ((*FROM_EIF, *IGNORED, "--minimum-version", "1"), "--minimum-version"),
        ((*FROM_EIF, "--model", "model.gguf", "--minimum-version", "1"), "--minimum-version"),
        ((*FROM_EIF, "--model", "3.manifest", "--minimum-version", "4", *IGNORED[2:]), "--minimum-version: every"),
        ((*FROM_EIF, "--model", "sha384:00", *IGNORED[2:]), "--model"),
        ((*FROM_EIF, "--configuration", "sha384:xx", *IGNORED[:2]), "--configuration"),
        ((*FROM_EIF, "--model", "absent.gguf", *IGNORED[2:]), "absent.gguf"),
        ((*FROM_EIF, "--model", "enclave.toml", *IGNORED[2:]), "not_gguf"),
        ((*FROM_EIF, "--configuration", "absent.toml", *IGNORED[:2]), "absent.toml"),
        (("--from-eif", "absent.eif", *IGNORED), "absent.eif"),
        (("--from-eif", "model.gguf", *IGNORED), "not_eif"),
        (("--from-measurements", "model.gguf", *IGNORED), "malformed_measurements"),
        (("--from-evidence", "absent", *IGNORED), "absent"),
        ((*FROM_EIF, *IGNORED, "--anchor", "model.gguf"), "bad_anchor"),
        ((*FROM_EIF, *IGNORED, "--anchor", "absent.der"), "absent.der"),
        ((*FROM_EIF, *IGNORED, "--release", "two\nlines"), "--release"),
        ((*FROM_EIF, "--ignore-model", "", *IGNORED[2:]), "--ignore-model: "),
        ((*FROM_EIF, *IGNORED, "--role", "two\nlines"), "--role: "),
        ((*FROM_EIF, *IGNORED, "--max-age", "86401"), "--max-age"),
        ((*FROM_EIF, *IGNORED, "--leeway", "601"), "--leeway"),
        ((*FROM_EIF, *IGNORED, "--output", "nowhere/policy.toml"), "nowhere: No such folder"),
    ],
)  # fmt: skip
def test_what_cannot_be_meant(init: Init, arguments: tuple[str, ...], words: str) -> None:
    init.publish([GOOD])
    ran = init.refused(*arguments)
    assert ran.code == 2
    assert words in ran.err
    assert init(*arguments, "--json").json["error"]["code"]


def test_a_running_enclaves_word_is_no_measurement(init: Init) -> None:
    (init.folder / "describe.json").write_text(json.dumps([{"EnclaveID": "i-0-enc0"}]))
    assert "[not_reference_values]" in init.refused("--from-measurements", "describe.json", *IGNORED).err


def test_a_name_that_no_policy_can_hold(init: Init) -> None:
    (init.folder / "two\nlines.der").write_bytes(forge.ROOT_DER)
    ran = init.refused(*FROM_EIF, *IGNORED, "--anchor", "two\nlines.der")
    assert (ran.code, "anchor.root" in ran.err) == (2, True)


# --- init: files --------------------------------------------------------------------------------------------------


def test_nothing_is_overwritten(init: Init) -> None:
    (init.folder / "policy.toml").write_text("mine")
    ran = init.refused(*FROM_EIF, *IGNORED)
    assert (ran.code, "policy.toml" in ran.err) == (2, True)
    assert (init.folder / "policy.toml").read_text() == "mine"


@pytest.mark.parametrize("content", [b"mine", bytes(5000), AWS_NITRO_G1.der], ids=["short", "long", "another root"])
def test_no_root_is_overwritten(init: Init, content: bytes) -> None:
    (init.folder / "demo").mkdir()
    (init.folder / "demo" / "root.der").write_bytes(content)
    arguments = (*FROM_EIF, *IGNORED, *EMULATED, "--output", "demo/policy.toml")
    ran = init.refused(*arguments)
    assert (ran.code, "demo/root.der" in ran.err) == (2, True)
    assert [path.name for path in (init.folder / "demo").iterdir()] == ["root.der"]
    assert (init.folder / "demo" / "root.der").read_bytes() == content


def test_the_root_is_copied_beside_the_policy(init: Init) -> None:
    (init.folder / "demo").mkdir()
    arguments = (*FROM_EIF, *IGNORED, *EMULATED, "--json")
    assert init(*arguments, "--output", "demo/policy.toml").json["wrote"] == ["demo/root.der", "demo/policy.toml"]
    assert (init.folder / "demo" / "root.der").read_bytes() == forge.ROOT_DER
    assert init(*arguments, "--output", "demo/second.toml").json["wrote"] == ["demo/second.toml"]
    assert AppraisalPolicy.load(init.folder / "demo" / "second.toml").anchor.is_emulated


def test_for_a_program(init: Init) -> None:
    ran = init(*FROM_EIF, *IGNORED, *EMULATED, "--json")
    assert (ran.code, ran.err) == (0, "")
    said = ran.json
    assert {name: said[name] for name in ("policy", "source", "trust_on_first_use", "purpose")} == {
        "policy": "policy.toml",
        "source": "eif",
        "trust_on_first_use": False,
        "purpose": "channel",
    }
    assert said["releases"][0]["pcrs"] == {str(index): value.hex() for index, value in enumerate(EIF.registers())}
    assert [each["code"] for each in said["warnings"]] == [
        "emulated_anchor",
        "ignored_model",
        "ignored_configuration",
        "ignored_pcr3",
        "ignored_pcr4",
        "unsigned_image",
    ]
    assert [each["code"] for each in said["notes"]] == ["ignored_module_id"]


# --- check --------------------------------------------------------------------------------------------------------


@pytest.fixture
def policy_file(folder: Path) -> Path:
    path = folder / "policy.toml"
    path.write_text(forge.POLICY)
    return path


def test_check(strongroom: Terminal, policy_file: Path) -> None:
    lines = strongroom("policy", "check").out.splitlines()
    assert [line.split(":")[0].split() for line in lines[:-1] if line[0] != " "] == [
        ["warning", "emulated_anchor"],
        ["note", "ignored_module_id"],
        ["warning", "unsigned_image"],
        ["note", "rollout"],
    ]
    assert lines[-1] == "policy.toml: can be judged by, 2 warnings"
    said = strongroom("policy", "check", str(policy_file), "--json").json
    assert said["policy"] == str(policy_file)
    assert [each["code"] for each in said["warnings"]] == ["emulated_anchor", "unsigned_image"]


@pytest.mark.parametrize("columns", [50, 120])
def test_remarks_fit_their_terminal(
    monkeypatch: pytest.MonkeyPatch, strongroom: Terminal, policy_file: Path, columns: int
) -> None:
    monkeypatch.setattr(out, "width", columns)
    lines = strongroom("policy", "check").out.splitlines()
    assert max(map(len, lines)) <= columns
    assert "whoever holds its key can sign anything" in " ".join(" ".join(lines).split())


def test_check_strictly(monkeypatch: pytest.MonkeyPatch, strongroom: Terminal, policy_file: Path, init: Init) -> None:
    assert strongroom("policy", "check", "--strict").code == 1
    assert strongroom("policy", "check", "--strict", "--json").code == 1
    strict = ("--from-eif", "signed.eif", "--model", "model.gguf", "--configuration", "enclave.toml")
    arguments = (*strict, "--role", "arn:aws:iam::123456789012:role/enclave", "--instance", "i-1")
    assert init(*arguments, "--output", "strict.toml").code == 0
    monkeypatch.setenv("STRONGROOM_POLICY", "strict.toml")
    ran = strongroom("policy", "check", "--strict")
    assert (ran.code, ran.out.splitlines()[-1]) == (0, "strict.toml: can be judged by, no warning")


@pytest.mark.parametrize("command", ["check", "explain"])
def test_a_policy_that_cannot_be_judged_by(strongroom: Terminal, policy_file: Path, command: str) -> None:
    policy_file.write_text(forge.POLICY.replace("max_age_seconds = 300\n", ""))
    ran = strongroom("policy", command)
    assert (ran.code, ran.out) == (2, "")
    assert "freshness.max_age_seconds" in ran.err
    assert strongroom("policy", command, "--json").json["error"]["code"] == "missing_field"
    (policy_file.parent / "root.der").unlink()
    policy_file.write_text(forge.POLICY)
    assert "[unreadable_anchor]" in strongroom("policy", command).err
    assert strongroom("policy", command, "absent.toml").code == 2


@pytest.mark.parametrize("command", ["check", "explain"])
def test_a_policy_whose_history_nothing_vouches_for(init: Init, command: str) -> None:
    init.publish([GOOD])
    init.policy(*RELEASE)
    init.publish([GOOD], signer=P384)
    ran = init.terminal("policy", command)
    assert (ran.code, "[wrong_key]" in ran.err) == (3, True)


# --- explain ------------------------------------------------------------------------------------------------------


def test_explain(strongroom: Terminal, policy_file: Path) -> None:
    ran = strongroom("policy", "explain")
    assert (ran.code, ran.err) == (0, "")
    lines = ran.out.splitlines()
    assert lines[0].startswith("policy.toml accepts an enclave that proves all of this")
    titles = [line.split(maxsplit=1)[0] for line in lines[1:] if line and not line.startswith(" " * 7)]
    assert titles == ["1-3", "4-5", "6", "7", "8-9", "10", "11", "12", "13", "14", "15"]
    assert lines[lines.index("       Not checked") + 1] == "       - The module id: it changes at every start"
    assert max(map(len, lines)) <= 120
    digest = forge.PCRS[0].hex()
    assert f"- one: PCR0 {digest[:8]}…{digest[-6:]}, PCR1" in ran.out
    assert digest not in ran.out
    assert digest in strongroom("policy", "explain", "--full").out


def test_explain_to_a_program(strongroom: Terminal, policy_file: Path) -> None:
    said = strongroom("policy", "explain", str(policy_file), "--json").json
    assert [step for section in said["sections"] for step in section["steps"]] == list(range(1, 16))
    assert said["sections"][-1]["title"] == "Not checked"
    assert forge.PCRS[0].hex() in "".join(said["sections"][6]["sentences"])


def test_long_words_are_not_broken(strongroom: Terminal, monkeypatch: pytest.MonkeyPatch, policy_file: Path) -> None:
    monkeypatch.setattr("strongroom.policy_commands.out.width", 10)
    assert forge.PCRS[0].hex() in strongroom("policy", "explain", "--full").out
