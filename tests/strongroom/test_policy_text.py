"""A policy in words: every rule is told, nothing ignored goes unsaid, and each weakness has its code."""

from __future__ import annotations

from dataclasses import replace
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given

from attestation.anchors import AWS_NITRO_G1
from attestation.checks import KEY_STEPS, STEPS
from attestation.envelope import EnvelopeHeader
from attestation.manifest import ManifestFile, ModelManifest
from attestation.policy import AppraisalPolicy
from attestation.reference import PcrSet
from attestation.rules import (
    DocumentBinding,
    Forbid,
    Ignore,
    Manifests,
    Measures,
    Release,
    Released,
    Require,
    SignedReleases,
    WrappedKeyFile,
)
from strongroom.policy_text import Remark, explain, warnings
from tests.key_facts import HEADER, PROMPTS_KEY, with_keys
from tests.key_policies import ADMIN, KEY, MODEL, PROMPT, ROOT
from tests.pki import forge
from tests.policies import policies
from tests.release_files import ED25519, ISSUED, NAME, ONE, TWO, VALIDITY, history_of, verified

REASON = Ignore("because of it")
OTHER = PcrSet(b"\x21" * 48, b"\x22" * 48, b"\x23" * 48, b"\x28" * 48)


@pytest.fixture
def policy(tmp_path: Path) -> AppraisalPolicy:
    """One release, nothing ignored but the module id, under AWS's anchor."""
    (tmp_path / "root.der").write_bytes(forge.ROOT_DER)
    made = AppraisalPolicy.parse(forge.POLICY, tmp_path)
    signed = [release for release in made.accepted_releases if release.pcrs.pcr8 is not None]
    pcrs = {index: rule for index, rule in made.pcrs.items() if index != 8}
    return replace(made, anchor=AWS_NITRO_G1, releases=tuple(signed), pcrs=pcrs)


def told(policy: AppraisalPolicy, step: int) -> str:
    return "\n".join(line for section in explain(policy) if step in section.steps for line in section.sentences)


def unchecked(policy: AppraisalPolicy) -> tuple[str, ...]:
    return explain(policy)[-1].sentences


def codes(policy: AppraisalPolicy, now: datetime = forge.NOW) -> list[str]:
    return [remark.code for remark in warnings(policy, now)]


# --- Any policy ---------------------------------------------------------------------------------------------------


@given(policy=policies())
def test_any_policy_is_explained(policy: AppraisalPolicy) -> None:
    sections = explain(policy)
    assert [step for section in sections for step in section.steps] == [*STEPS, *(KEY_STEPS if policy.kms else ())]
    assert sections[-1].title == "Not checked"
    for section in sections:
        assert section.sentences
        for sentence in section.sentences:
            assert sentence.isprintable()
            assert sentence.startswith("- ") or sentence[0].isupper()
            assert sentence[-1] in ".:" or sentence.startswith("- ") or policy.accept_debug is not None
    everything = "\n".join(sentence for section in sections for sentence in section.sentences)
    for release in policy.accepted_releases:
        assert f"- {release.name}: PCR0 {release.pcrs.pcr0.hex()}, PCR1 " in everything
    for rule in (policy.model, policy.configuration, *policy.pcrs.values()):
        if isinstance(rule, Require):
            assert all(value.hex() in everything or not any(value) for value in rule.values)
        if isinstance(rule, Measures):
            assert all(text in everything for text in rule.texts)
    for key in policy.kms.values():
        assert all(each in everything for each in (key.key.text, key.context, *key.administrators))


@given(policy=policies())
def test_nothing_is_ignored_in_silence(policy: AppraisalPolicy) -> None:
    rules: list[object] = [policy.model, policy.configuration, *policy.pcrs.values(), policy.module_id]
    if isinstance(policy.binding, DocumentBinding):
        rules += [policy.binding.public_key, policy.binding.user_data]
    rules += [key.wrapped_key for key in policy.kms.values()]
    reasons = [rule.reason for rule in rules if isinstance(rule, Ignore)]
    said = [remark for remark in warnings(policy, forge.NOW) if remark.code.startswith("ignored_")]
    assert len({remark.code for remark in said}) == len(said) == len(reasons)
    ends = [line for line in unchecked(policy) if line.startswith("- ")]
    for reason in reasons:
        assert any(remark.text.endswith(f": {reason}") for remark in said)
        assert any(line.endswith(f": {reason}") for line in ends)


@given(policy=policies())
def test_any_policy_is_checked(policy: AppraisalPolicy) -> None:
    found = warnings(policy, forge.NOW)
    assert all(remark.text.isprintable() for remark in found)
    have = {remark.code for remark in found}
    assert ("emulated_anchor" in have) == policy.anchor.is_emulated
    assert ("debug_accepted" in have) == (policy.accept_debug is not None)
    assert ("long_maximum_age" in have) == (policy.max_age_seconds > 3600)
    assert ("rollout" in have) == (len(policy.accepted_releases) > 1)
    assert ("changeable_key" in have) == any(key.administrators for key in policy.kms.values())
    absent = (isinstance(key.wrapped_key, WrappedKeyFile) for key in policy.kms.values())
    assert ("refused_wrapped_key" in have) == any(absent)
    assert {remark.code for remark in found if remark.is_note} <= {"rollout", "ignored_module_id", "changeable_key"}


# --- Warnings -----------------------------------------------------------------------------------------------------


def test_a_strict_policy_has_no_warning(policy: AppraisalPolicy) -> None:
    [remark] = warnings(policy, forge.NOW)
    assert remark == Remark("ignored_module_id", "not checked: the module id: it changes at every start", is_note=True)
    assert codes(replace(policy, module_id=Require(("i-0-enc0",)))) == []


@pytest.mark.parametrize(
    ("change", "code"),
    [
        ({"accept_debug": "to look inside"}, "debug_accepted"),
        ({"max_age_seconds": 3601}, "long_maximum_age"),
        ({"model": REASON}, "ignored_model"),
        ({"configuration": REASON}, "ignored_configuration"),
        ({"pcrs": {3: REASON, 4: Forbid()}}, "ignored_pcr3"),
        ({"pcrs": {3: Forbid(), 4: REASON}}, "ignored_pcr4"),
        ({"pcrs": {3: Forbid(), 4: Forbid(), 9: REASON}}, "ignored_pcr9"),
        ({"binding": DocumentBinding(REASON, Forbid())}, "ignored_public_key"),
        ({"binding": DocumentBinding(Forbid(), REASON)}, "ignored_user_data"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_each_weakness_has_its_code(policy: AppraisalPolicy, change: dict[str, Any], code: str) -> None:
    assert codes(replace(policy, **change)) in ([code, "ignored_module_id"], ["ignored_module_id", code])


def test_an_hour_is_not_long(policy: AppraisalPolicy) -> None:
    assert codes(replace(policy, max_age_seconds=3600)) == ["ignored_module_id"]
    [remark] = [each for each in warnings(replace(policy, max_age_seconds=7200), forge.NOW) if not each.is_note]
    assert "2 hours" in remark.text


@pytest.mark.parametrize(
    ("rule", "unsigned"),
    [(Forbid(), True), (REASON, True), (Require((bytes(47) + b"\x01",)), False), (Measures(("a certificate",)), False)],
)
def test_an_image_that_nobody_signed(policy: AppraisalPolicy, rule: Any, unsigned: bool) -> None:
    [release] = policy.accepted_releases
    plain = replace(release, name="plain", pcrs=replace(OTHER, pcr8=None))
    changed = replace(policy, releases=(release, plain), pcrs={**policy.pcrs, 8: rule})
    said = [remark.text for remark in warnings(changed, forge.NOW) if remark.code == "unsigned_image"]
    assert [text.endswith(": plain") for text in said] == [True] * unsigned


def test_trust_on_first_use_is_known_by_the_release(policy: AppraisalPolicy) -> None:
    [release] = policy.accepted_releases
    named = replace(policy, releases=(replace(release, name="trusted on first use, 2026-03-01T12:00:00Z"),))
    assert codes(named) == ["ignored_module_id", "trust_on_first_use"]


def signed(policy: AppraisalPolicy, *, minimum_sequence: int = 1) -> AppraisalPolicy:
    history = verified(history_of([ONE], [TWO]))
    return replace(policy, releases=SignedReleases("releases.jsonl", minimum_sequence, history))


EXPIRES = ISSUED + timedelta(days=1) + VALIDITY


@pytest.mark.parametrize(
    ("now", "code"),
    [
        (EXPIRES - timedelta(days=14, seconds=1), None),
        (EXPIRES - timedelta(days=14), "releases_expire_soon"),
        (EXPIRES - timedelta(seconds=1), "releases_expire_soon"),
        (EXPIRES, "releases_expired"),
        (EXPIRES + timedelta(days=1), "releases_expired"),
    ],
)
def test_signed_releases_expire(policy: AppraisalPolicy, now: datetime, code: str | None) -> None:
    assert codes(signed(policy), now) == ["ignored_module_id", *([] if code is None else [code])]


def test_releases_that_are_signed_or_written_are_both_fine(policy: AppraisalPolicy) -> None:
    assert codes(signed(policy), ISSUED) == codes(policy)


# --- Sentences ----------------------------------------------------------------------------------------------------


def test_whose_word_it_is(policy: AppraisalPolicy) -> None:
    assert "AWS's root" in told(policy, 4)
    assert "EMULATED" not in "".join(line for section in explain(policy) for line in section.sentences)


def test_an_emulated_anchor_is_told_where_it_counts(tmp_path: Path) -> None:
    (tmp_path / "root.der").write_bytes(forge.ROOT_DER)
    emulated = AppraisalPolicy.parse(forge.POLICY, tmp_path)
    assert "EMULATED" in told(emulated, 4)
    assert "EMULATED" in told(emulated, 15)


def test_times_are_told_in_units(policy: AppraisalPolicy) -> None:
    assert "at most 5 minutes old" in told(policy, 7)
    assert "7 minutes old or 2 minutes ahead" in told(policy, 7)
    exact = replace(policy, max_age_seconds=61, leeway_seconds=0)
    assert told(exact, 7) == "The document is at most 61 seconds old, and not from the future."
    assert "at most 1 hour old" in told(replace(policy, max_age_seconds=3600), 7)


def test_a_bare_document_commits_to_nothing(policy: AppraisalPolicy) -> None:
    bare = replace(policy, binding=DocumentBinding(Require((b"\x01\x02",)), Forbid()))
    assert "any Nitro enclave" in told(bare, 1)
    assert "16 to 1024 bytes" in told(bare, 6)
    assert told(bare, 8).startswith("Does not apply")
    assert told(bare, 15).startswith("Does not apply")
    assert "The document's public key is h'0102'." in told(bare, 14)
    assert "The document carries no user data." in told(bare, 14)


def test_debug_mode_is_told(policy: AppraisalPolicy) -> None:
    assert "not in debug mode" in told(policy, 10)
    accepting = replace(policy, accept_debug="to look inside")
    assert told(accepting, 10).endswith("is accepted, although its host reads its memory: to look inside")
    assert unchecked(accepting)[0].endswith(": to look inside")


def test_signed_releases_are_told_with_their_publisher(policy: AppraisalPolicy) -> None:
    said = told(signed(policy, minimum_sequence=2), 11)
    assert f"The publisher of {NAME} has signed the release, with the key {ED25519.public_key}: entry 2" in said
    assert f"until {EXPIRES:%Y-%m-%dT%H:%M:%SZ}" in said
    assert "fewer entries than 2" in said
    assert f"- {TWO.name}: PCR0 {'09' * 48}" in said


def test_several_releases_are_told_as_such(policy: AppraisalPolicy) -> None:
    [one] = policy.accepted_releases
    assert "The image is this release" in told(policy, 11)
    assert "The image is one of these" in told(
        replace(policy, releases=(one, replace(one, name="other", pcrs=OTHER))), 11
    )


def test_released_models_are_told_release_by_release(policy: AppraisalPolicy) -> None:
    [one] = policy.accepted_releases
    with_models = Release("with", OTHER, models=(b"\x0a" * 48, b"\x0b" * 48), configurations=(b"\x0c" * 48,))
    changed = replace(policy, releases=(one, with_models), model=Released(), configuration=Released())
    said = told(changed, 12).splitlines()
    assert said == [
        "PCR16 commits to a model manifest that the matched release names:",
        f"- {one.name}: none, so that none is accepted",
        f"- with: sha384:{'0a' * 48} or sha384:{'0b' * 48}",
    ]
    assert f"- with: sha384:{'0c' * 48}" in told(changed, 13)


def test_manifests_are_told_by_version(policy: AppraisalPolicy) -> None:
    manifests = [
        ModelManifest("small", (ManifestFile("small.gguf", 1, bytes(48)),), "{{ template }}", version=version)
        for version in (2, 3)
    ]
    rule = Manifests(tuple((f"{each.version}.manifest", each) for each in manifests), minimum_version=3)
    said = told(replace(policy, model=rule), 12).splitlines()
    assert said[0] == "PCR16 commits to one of these manifests, of version 3 or newer:"
    assert said[1].endswith(f"small, version 2, sha384:{manifests[0].digest().hex()}; too old, and refused")
    assert said[2] == f"- 3.manifest: small, version 3, sha384:{manifests[1].digest().hex()}"


def test_registers_are_told_by_what_they_are_for(policy: AppraisalPolicy) -> None:
    arn = "arn:aws:iam::123456789012:role/enclave"
    rules: dict[int, Any] = {3: Measures((arn,)), 4: Forbid(), 9: Require((b"\x09" * 48,)), 10: REASON}
    said = told(replace(policy, pcrs=rules, module_id=Require(("i-0-enc0", "i-1-enc1"))), 14).splitlines()
    assert said == [
        f"PCR3 (the IAM role of the parent instance) was extended once, with the text {arn}.",
        "PCR4 (the parent instance's id) is zero, or not in the document.",
        f"PCR9 holds {'09' * 48}.",
        "Every register that this policy does not name is zero, or not in the document.",
        "The module id is i-0-enc0 or i-1-enc1.",
    ]


def test_the_signers_register_is_for_releases_without_one(policy: AppraisalPolicy) -> None:
    [one] = policy.accepted_releases
    plain = replace(one, name="plain", pcrs=replace(OTHER, pcr8=None))
    rules = {**policy.pcrs, 8: Forbid()}
    alone, mixed = (replace(policy, releases=each, pcrs=rules) for each in ((plain,), (one, plain)))
    assert "PCR8 (the image's signing certificate) is zero" in told(alone, 14)
    assert "PCR8 (the image's signing certificate), for a release that names none, is zero" in told(mixed, 14)


# --- KMS keys -----------------------------------------------------------------------------------------------------


def test_without_a_key_nothing_is_said_of_kms(policy: AppraisalPolicy) -> None:
    assert "KMS" not in "".join(line for section in explain(policy) for line in section.sentences)


def test_keys_are_told_step_by_step(policy: AppraisalPolicy) -> None:
    named = with_keys(policy, MODEL, PROMPT)
    assert [section.title for section in explain(named) if section.steps and section.steps[0] > 15] == [
        *KEY_STEPS.values()
    ]
    assert told(named, 16).splitlines()[-2:] == [
        f"- for the model: {KEY.text}",
        f"- for prompts that wait: {PROMPTS_KEY.text}",
    ]
    assert "no prompt is sent" in told(named, 16)
    assert "key of one region" in told(named, 17)
    assert "to the releases of step 11 and to nothing else" in told(named, 18)
    assert told(named, 18).splitlines()[-2:] == ["- the model: production", "- prompts that wait: production"]
    assert told(named, 19).startswith("No grant")
    assert told(named, 20).splitlines()[:2] == [
        "Of the key for the model: nobody can change this later but these, whom the policy trusts with it:",
        f"- {ADMIN}",
    ]
    assert told(named, 21).splitlines() == [
        "The model's, in model.sealed, is under its key, for its context, and of version 3 or newer.",
        "Each prompt that waits has one of its own, sealed as version 3.",
    ]
    assert any("KMS itself" in line for line in unchecked(named))


def test_a_locked_key_is_told_as_such(policy: AppraisalPolicy) -> None:
    locked = with_keys(policy, PROMPT, administrators=())
    assert told(locked, 20) == "Of the key for prompts that wait: LOCKED, so that nobody can ever change this."
    assert codes(locked) == codes(policy)


def test_a_wrapped_key_that_is_ignored_is_told_at_the_end(policy: AppraisalPolicy) -> None:
    ignored = with_keys(policy, MODEL, wrapped_key=REASON)
    assert told(ignored, 21) == "The model's is not checked: see the end."
    assert "- The wrapped key of the model: because of it" in unchecked(ignored)
    assert codes(ignored) == ["ignored_module_id", "ignored_wrapped_key", "changeable_key"]


@pytest.mark.parametrize(
    ("wrapped", "text"),
    [
        (HEADER, None),
        (None, "there is no model.sealed"),
        (replace(HEADER, version=2), "older than is accepted; expected version 3 or later, got version 2"),
        (replace(HEADER, key=PROMPTS_KEY), "sealed under another KMS key"),
        (replace(HEADER, context="staging"), "expected production, got staging"),
        (replace(HEADER, purpose=PROMPT), "expected model, got prompt"),
    ],
)
def test_a_wrapped_key_that_will_be_refused_is_a_warning(
    policy: AppraisalPolicy, wrapped: EnvelopeHeader | None, text: str | None
) -> None:
    named = with_keys(policy, MODEL, wrapped_key=WrappedKeyFile("model.sealed", wrapped))
    said = [remark for remark in warnings(named, forge.NOW) if remark.code == "refused_wrapped_key"]
    assert [text is not None and text in remark.text for remark in said] == [True] * (text is not None)
    assert not any(remark.is_note for remark in said)


def test_those_who_may_change_a_key_are_told(policy: AppraisalPolicy) -> None:
    [remark] = [each for each in warnings(with_keys(policy, PROMPT), forge.NOW) if each.code == "changeable_key"]
    assert remark.text == f"these may change what the key for prompts that wait opens to: {ADMIN}"
    assert remark.is_note
    whole = with_keys(policy, PROMPT, administrators=(ADMIN, ROOT))
    [warning] = [each for each in warnings(whole, forge.NOW) if each.code == "account_administers"]
    assert ROOT in warning.text
    assert not warning.is_note
