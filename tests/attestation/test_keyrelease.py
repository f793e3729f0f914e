"""Steps 16 to 21: what KMS says of a key, in the same verdict as the Evidence; each alone refuses."""

from __future__ import annotations

import contextlib
import copy
import json
import pickle
import re
from collections.abc import Callable, Mapping
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from attestation.anchors import AWS_NITRO_G1
from attestation.checks import KEY_STEPS, STEPS, Check, Label, Status
from attestation.envelope import EnvelopePurpose
from attestation.errors import AppraisalError, EvidenceError, PolicyError
from attestation.keypolicy.attested import ReleasedTo, required
from attestation.keypolicy.document import KeyArn
from attestation.keypolicy.findings import Severity
from attestation.keypolicy.lint import lint
from attestation.keypolicy.mutability import Locked, MutableBy
from attestation.keyrelease import KeyFacts, KeyRelease, judge_key, released_to
from attestation.policy import AppraisalPolicy
from attestation.reference import PcrSet, once_extended
from attestation.release_signing import ReleaseError
from attestation.rules import (
    Forbid,
    Ignore,
    Measures,
    RegisterRule,
    Release,
    Released,
    Require,
    SignedReleases,
    WrappedKeyFile,
)
from attestation.verifier import AttestationResult, authenticate, verify, verify_archived
from tests.key_facts import FILE, HEADER, KEYS, PROMPTS_KEY, VERSION, all_facts, facts, key_policy, with_keys
from tests.key_policies import (
    ADMIN,
    COPY,
    KEY,
    MODEL,
    PROMPT,
    PURPOSE_KEY,
    ROOT,
    allow,
    deny,
    grant,
)
from tests.pki import forge
from tests.release_files import ISSUED, ONE, VALIDITY, history_of, verified

PROTOCOL = (Path(__file__).resolve().parents[2] / "PROTOCOL.md").read_text()
Purpose = EnvelopePurpose


def _verify(
    policy: AppraisalPolicy, keys: Mapping[KeyArn, KeyFacts], evidence: bytes | None = None
) -> AttestationResult:
    good = forge.evidence() if evidence is None else evidence
    return verify(good, policy=policy, nonce=forge.NONCE, at=forge.NOW, keys=keys)


def _refused(policy: AppraisalPolicy, keys: Mapping[KeyArn, KeyFacts], evidence: bytes | None = None) -> AppraisalError:
    with pytest.raises(AppraisalError) as caught:
        _verify(policy, keys, evidence)
    return caught.value


def _failed(checks: tuple[Check, ...]) -> list[tuple[int, str | None]]:
    return [(check.step, check.code) for check in checks if check.status is Status.FAILED]


def _of_keys(checks: tuple[Check, ...]) -> list[Check]:
    return [check for check in checks if check.step in KEY_STEPS]


@pytest.fixture
def two(policy: AppraisalPolicy) -> AppraisalPolicy:
    """Names both keys."""
    return with_keys(policy, *Purpose)


# --- One verdict --------------------------------------------------------------------------------------------------


def test_each_key_is_judged_behind_the_evidence(two: AppraisalPolicy) -> None:
    result = _verify(two, all_facts(two))
    judged = _of_keys(result.checks)
    assert result.checks[-12:] == tuple(judged)
    assert [(check.step, check.name) for check in judged] == [
        (step, f"{name} ({table})") for table in ("model", "prompts") for step, name in KEY_STEPS.items()
    ]
    assert [check.status for check in judged] == [*[Status.PASSED] * 11, Status.NOT_APPLICABLE]
    assert judged[-1].explanation == "each prompt has a wrapped key of its own"
    assert [check.got for check in judged if check.step == 20] == [f"MUTABLE-BY({ADMIN})"] * 2
    assert judged[5].got == f"for a model, under {KEY.text}, context production, version 3 (model.sealed)"
    assert result.release == "one"


def test_a_report_lists_the_keys(two: AppraisalPolicy) -> None:
    report = json.loads(json.dumps(_verify(two, all_facts(two)).as_json()))
    assert {check["step"] for check in report["checks"]} == {*STEPS, *KEY_STEPS}


def test_a_policy_that_names_no_key_says_nothing_of_any(policy: AppraisalPolicy) -> None:
    result = _verify(policy, all_facts(with_keys(policy, MODEL)))
    assert _of_keys(result.checks) == []


# For each code of steps 16 to 21: what is different from a good rule, and from what KMS says of a good key.
Case = tuple[Purpose, dict[str, Any], dict[str, Any]]
OTHER_ROLE = f"{ADMIN}-2"
UNKNOWN = ReleasedTo("unknown", {index: (bytes([index + 1]) * 48,) for index in (0, 1, 2, 8, 16, 17)})
UNKNOWN_STATEMENT = json.loads(key_policy([UNKNOWN], PROMPT).encode())["Statement"][0]

CASES: dict[tuple[int, str], list[Case]] = {
    (16, "wrong_key"): [
        (PROMPT, {}, {"arn": COPY}),
        (PROMPT, {}, {"arn": KEY}),
        (MODEL, {}, {"arn": replace(KEY, account="444455556666")}),
        (MODEL, {}, {"arn": replace(KEY, partition="aws-cn")}),
    ],
    (16, "unusable_key"): [
        (PROMPT, {}, {"enabled": False, "state": "Disabled"}),
        (PROMPT, {}, {"enabled": False, "state": "PendingDeletion"}),
        (PROMPT, {}, {"enabled": False}),
        (PROMPT, {}, {"state": "Unavailable"}),
        (PROMPT, {}, {"usage": "SIGN_VERIFY"}),
        (MODEL, {}, {"spec": "RSA_4096"}),
        (MODEL, {}, {"origin": "EXTERNAL"}),
        (MODEL, {}, {"origin": "AWS_CLOUDHSM"}),
        (MODEL, {}, {"manager": "AWS"}),
    ],
    (17, "copied_key"): [
        (PROMPT, {}, {"multi_region": True}),
        (MODEL, {}, {"multi_region": True, "primary": KEY, "replicas": (COPY,)}),
        (MODEL, {}, {"replicas": (COPY,)}),
    ],
    (18, "open_key_policy"): [
        (PROMPT, {}, {"more": [allow("kms:Decrypt")]}),
        (PROMPT, {}, {"more": [allow("kms:ReEncryptFrom")]}),
        (PROMPT, {}, {"more": [allow("kms:NoSuchAction")], "administrators": ()}),
        (PROMPT, {}, {"more": [UNKNOWN_STATEMENT]}),
        (PROMPT, {"context": "staging"}, {}),
        (MODEL, {"context": "staging", "wrapped_key": Ignore("a test")}, {}),
        (MODEL, {}, {"more": [allow("kms:Decrypt", principal={"AWS": ROOT})]}),
        (MODEL, {}, {"more": [allow("kms:Decrypt", Condition={"StringEquals": {PURPOSE_KEY: "model"}})]}),
    ],
    (19, "granted_key"): [
        (PROMPT, {}, {"grants": [grant("Decrypt")]}),
        (MODEL, {}, {"grants": [grant("DescribeKey"), grant("GenerateDataKey", "ReEncryptFrom")]}),
    ],
    (20, "mutable_key"): [
        (PROMPT, {"administrators": ()}, {}),
        (PROMPT, {"administrators": (OTHER_ROLE,)}, {}),
        (PROMPT, {}, {"administrators": [ADMIN, OTHER_ROLE]}),
        (MODEL, {}, {"grants": [grant("CreateGrant")]}),
        (MODEL, {}, {"more": [allow("kms:PutKeyPolicy")]}),
    ],
    (21, "wrong_wrapped_key"): [
        (MODEL, {"wrapped_key": WrappedKeyFile(FILE, replace(HEADER, key=PROMPTS_KEY))}, {}),
        (MODEL, {"wrapped_key": WrappedKeyFile(FILE, replace(HEADER, key=COPY))}, {}),
        (MODEL, {"wrapped_key": WrappedKeyFile(FILE, replace(HEADER, context="staging"))}, {}),
        (MODEL, {"wrapped_key": WrappedKeyFile(FILE, replace(HEADER, purpose=PROMPT))}, {}),
        (MODEL, {"wrapped_key": WrappedKeyFile(FILE, None)}, {}),
    ],
    (21, "rolled_back"): [
        (MODEL, {"wrapped_key": WrappedKeyFile(FILE, replace(HEADER, version=VERSION - 1))}, {}),
        (MODEL, {"minimum_version": VERSION + 1}, {}),
    ],
}  # fmt: skip
BESIDE = {"NoSuchAction": (20, "mutable_key")}
"""What nobody knows may also change the key."""


@pytest.mark.parametrize(
    ("expected", "case"),
    [(expected, case) for expected, cases in CASES.items() for case in cases],
    ids=lambda value: value[1] if isinstance(value[0], int) else value[0].value,
)
def test_each_alone_refuses(policy: AppraisalPolicy, expected: tuple[int, str], case: Case) -> None:
    """The Evidence is good, and so is the key but for one thing."""
    purpose, rule, said = case
    named = with_keys(policy, purpose, **rule)
    error = _refused(named, {KEYS[purpose]: facts(named, purpose, **said)})
    beside = [failure for word, failure in BESIDE.items() if word in str(said)]
    assert _failed(error.checks) == [expected, *beside]
    assert error.code == expected[1]
    assert KEY_STEPS[expected[0]] in error.message
    [failed, *_] = [check for check in error.checks if check.status is Status.FAILED]
    assert failed.explanation
    assert failed.expected
    assert failed.expected != failed.got
    assert Status.NOT_REACHED not in {check.status for check in error.checks}
    assert _failed(_verify(with_keys(policy, purpose), all_facts(with_keys(policy, purpose))).checks) == []


@pytest.mark.parametrize("purpose", Purpose)
@pytest.mark.parametrize(
    "said",
    [{}, *(said for (step, _), cases in CASES.items() if step <= 19 for _, _, said in cases)],
    ids=str,
)
def test_the_linter_and_the_verdict_agree(policy: AppraisalPolicy, purpose: Purpose, said: dict[str, Any]) -> None:
    """What the linter passes passes steps 16 to 19, and the reverse; who may change the key is step 20."""
    named = with_keys(policy, purpose)
    rule, known = named.kms[purpose], facts(named, purpose, **{**said, "arn": KEYS[purpose]})
    found = lint(
        known.policy,
        releases=tuple(released_to(named, purpose)),
        purpose=purpose,
        context=rule.context,
        administrators=rule.administrators,
        metadata=known.metadata,
        grants=known.grants,
    )
    errors = {each.rule for each in found if each.severity is Severity.ERROR} - {"untrusted_administrator"}
    try:
        checks = judge_key(named, purpose, known, at=forge.NOW).checks
    except AppraisalError as error:
        checks = error.checks
    refused = {step for step, _ in _failed(checks)} & {16, 17, 18, 19}
    assert bool(errors) == bool(refused), (errors, refused)


def test_the_codes_are_those_of_the_protocol() -> None:
    table = {int(step): codes for step, codes in re.findall(r"^\| (\d+) \|.*\| ([`\w, ]+) \|$", PROTOCOL, re.MULTILINE)}
    told = {(step, code) for step in KEY_STEPS for code in re.findall(r"`(\w+)`", table[step])}
    assert told == CASES.keys()


def test_facts_of_another_key_are_not_of_this_one(policy: AppraisalPolicy) -> None:
    named = with_keys(policy, PROMPT)
    error = _refused(named, {PROMPTS_KEY: facts(with_keys(policy, PROMPT), PROMPT, arn=KEY)})
    assert (error.code, error.expected, error.got) == (
        "wrong_key",
        f"{PROMPTS_KEY.text}: Enabled, ENCRYPT_DECRYPT, SYMMETRIC_DEFAULT, origin AWS_KMS, managed by CUSTOMER",
        f"{KEY.text}: Enabled, ENCRYPT_DECRYPT, SYMMETRIC_DEFAULT, origin AWS_KMS, managed by CUSTOMER",
    )


def test_every_failure_of_a_key_is_listed(two: AppraisalPolicy) -> None:
    """And of the enclave, and of the other key."""
    bad = facts(two, PROMPT, enabled=False, multi_region=True, grants=[grant("Decrypt")], more=[allow("kms:*")])
    old = replace(two.kms[MODEL], minimum_version=VERSION + 1)
    both = replace(two, kms={**two.kms, MODEL: old}, model=Require((b"\x01" * 48,)))
    # What was made for another model: the model's key does not ask for one, that of prompts does.
    error = _refused(both, {KEY: facts(two, MODEL), PROMPTS_KEY: bad})
    assert _failed(error.checks) == [
        (12, "wrong_model"),
        (21, "rolled_back"),
        (16, "unusable_key"),
        (17, "copied_key"),
        (18, "open_key_policy"),
        (19, "granted_key"),
        (20, "mutable_key"),
    ]
    assert error.code == "wrong_model"
    assert error.message.startswith("the policy refuses this enclave: model, wrapped key (model), KMS key (prompts), ")
    [opened] = [check.got or "" for check in error.checks if check.code == "open_key_policy"]
    assert "(unknown_release); " in opened
    assert "(wildcard_action)" in opened


def test_a_finding_of_the_key_itself_says_so(policy: AppraisalPolicy) -> None:
    named = with_keys(policy, PROMPT)
    error = _refused(named, {PROMPTS_KEY: facts(named, PROMPT, multi_region=True)})
    assert error.got == f"the key: {PROMPTS_KEY.text} (multi_region)"


# --- Neither without the other ------------------------------------------------------------------------------------


def test_a_good_key_does_not_help_an_enclave_that_is_refused(policy: AppraisalPolicy, two: AppraisalPolicy) -> None:
    changed = forge.evidence(forge.document(forge.payload_fields(pcrs={**forge.PCRS, 1: forge.measured("x")})))
    error = _refused(two, all_facts(two), changed)
    assert _failed(error.checks) == [(11, "wrong_image")]
    assert {check.status for check in _of_keys(error.checks)} == {Status.PASSED, Status.NOT_APPLICABLE}
    with pytest.raises(EvidenceError) as caught:
        _verify(two, all_facts(two), forge.evidence(forge.document(signature=bytes(96))))
    assert caught.value.code == "bad_signature"
    assert [check.step for check in caught.value.checks] == [*STEPS, *KEY_STEPS]
    assert {check.status for check in _of_keys(caught.value.checks)} == {Status.NOT_REACHED}


@pytest.mark.parametrize("evidence", [None, b""])
@pytest.mark.parametrize("known", [[], [MODEL], [PROMPT]])
def test_without_what_kms_says_there_is_no_verdict(
    two: AppraisalPolicy, known: list[Purpose], evidence: bytes | None
) -> None:
    keys = {KEYS[purpose]: facts(two, purpose) for purpose in known}
    with pytest.raises(PolicyError) as caught:
        _verify(two, keys, evidence)
    missing = PROMPT if known == [MODEL] else MODEL
    assert (caught.value.code, caught.value.exit_code) == ("key_facts_missing", 2)
    assert (caught.value.field, caught.value.expected) == (f"kms.{missing.table}.key", KEYS[missing].text)


def test_silence_about_keys_is_not_consent(two: AppraisalPolicy) -> None:
    with pytest.raises(PolicyError) as caught:
        verify(forge.evidence(), policy=two, nonce=forge.NONCE, at=forge.NOW)
    assert caught.value.code == "key_facts_missing"


def test_archived_evidence_is_judged_without_keys(policy: AppraisalPolicy, two: AppraisalPolicy) -> None:
    archived = verify_archived(forge.evidence(), policy=two)
    assert archived.checks == verify_archived(forge.evidence(), policy=policy).checks
    assert _of_keys(archived.checks) == []
    with pytest.raises(EvidenceError) as caught:
        verify_archived(b"", policy=two)
    assert [check.step for check in caught.value.checks] == list(STEPS)


def test_an_authentic_document_is_about_no_key(policy: AppraisalPolicy) -> None:
    authentic = authenticate(forge.document(), anchor=policy.anchor, at=forge.NOW)
    assert [check.step for check in authentic.checks] == [1, 2, 3, 4, 5]


# --- Who may change it --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("trusted", "can", "got"),
    [
        ((), (), "LOCKED"),
        ((ADMIN,), (), "LOCKED"),
        ((ADMIN,), (ADMIN,), f"MUTABLE-BY({ADMIN})"),
        ((ADMIN, OTHER_ROLE), (ADMIN,), f"MUTABLE-BY({ADMIN})"),
        ((OTHER_ROLE, ADMIN), (ADMIN, OTHER_ROLE), f"MUTABLE-BY({ADMIN}, {OTHER_ROLE})"),
        ((), (ADMIN,), None),
        ((OTHER_ROLE,), (ADMIN, OTHER_ROLE), None),
        ((ROOT,), (ADMIN,), None),
    ],
)
def test_locked_or_changed_by_those_who_are_trusted(
    policy: AppraisalPolicy, trusted: tuple[str, ...], can: tuple[str, ...], got: str | None
) -> None:
    named = with_keys(policy, PROMPT, administrators=trusted)
    said = {PROMPTS_KEY: facts(named, PROMPT, administrators=can)}
    if got is None:
        error = _refused(named, said)
        assert _failed(error.checks) == [(20, "mutable_key")]
        assert error.got == f"MUTABLE-BY({', '.join(can)})"
        assert error.expected == ("LOCKED" if not trusted else f"LOCKED, or MUTABLE-BY({', '.join(trusted)})")
    else:
        [check] = [check for check in _verify(named, said).checks if check.step == 20]
        assert (check.status, check.got) == (Status.PASSED, got)


def test_what_everybody_is_denied_locks_the_key(policy: AppraisalPolicy) -> None:
    named = with_keys(policy, PROMPT, administrators=())
    lock = deny("kms:PutKeyPolicy", "kms:CreateGrant")
    result = _verify(named, {PROMPTS_KEY: facts(named, PROMPT, more=[lock])})
    assert [check.got for check in result.checks if check.step == 20] == ["LOCKED"]


def test_an_administrator_does_not_see_what_is_inside(policy: AppraisalPolicy) -> None:
    """Trusted to change the policy is not trusted to decrypt."""
    named = with_keys(policy, PROMPT)
    more = [allow("kms:Decrypt", principal={"AWS": ADMIN})]
    assert _failed(_refused(named, {PROMPTS_KEY: facts(named, PROMPT, more=more)}).checks) == [(18, "open_key_policy")]


# --- Releases -----------------------------------------------------------------------------------------------------


def test_a_key_may_open_to_some_of_the_releases(two: AppraisalPolicy) -> None:
    """One that it does not open to gets nothing, which is nobody's harm."""
    for purpose in Purpose:
        one, other = released_to(two, purpose)
        named = with_keys(two, purpose)
        for some in ((one,), (other,), (one, other)):
            said = replace(facts(two, purpose), policy=key_policy(some, purpose))
            assert _failed(_verify(named, {KEYS[purpose]: said}).checks) == []


def test_releases_are_not_mixed(policy: AppraisalPolicy) -> None:
    """PCR0 of one with PCR1 of the other, in one statement as in two that were exchanged."""
    one, other = released_to(with_keys(policy, PROMPT), PROMPT)
    exchanged = ReleasedTo("exchanged", {**one.pcrs, 1: other.pcrs[1]})
    statement = json.loads(key_policy([one], PROMPT).encode())["Statement"][0]
    equals = statement["Condition"]["StringEqualsIgnoreCase"]
    listed = {
        **equals,
        **{f"kms:RecipientAttestation:PCR{index}": [one.pcrs[index][0].hex(), other.pcrs[index][0].hex()]
           for index in (0, 1, 2)},
    }  # fmt: skip
    del listed["kms:RecipientAttestation:ImageSha384"]
    named = with_keys(policy, PROMPT)
    for more in (
        [{**statement, "Condition": {**statement["Condition"], "StringEqualsIgnoreCase": listed}}],
        json.loads(key_policy([exchanged], PROMPT).encode())["Statement"][:1],
    ):
        assert _failed(_refused(named, {PROMPTS_KEY: facts(named, PROMPT, more=more)}).checks) == [
            (18, "open_key_policy")
        ]


def test_a_release_that_was_taken_back_opens_the_key_no_more(policy: AppraisalPolicy) -> None:
    before = with_keys(policy, PROMPT)
    after = replace(before, releases=(policy.accepted_releases[0],), pcrs=policy.pcrs)
    assert _failed(_refused(after, all_facts(before)).checks) == [(18, "open_key_policy")]


IMAGES = [PcrSet(*(bytes([number, index]) * 24 for index in (1, 2, 3))) for number in (1, 2, 3)]
M, C = b"\x0a" * 48, b"\x0b" * 48


def test_a_key_is_asked_for_what_may_run(policy: AppraisalPolicy) -> None:
    releases = (
        Release("one", IMAGES[0], (M,), (C, M)),
        Release("without a model", IMAGES[1], (), (C,)),
        Release("without a configuration", replace(IMAGES[2], pcr8=b"\x08" * 48), (M,), ()),
    )
    rules: dict[int, RegisterRule] = {3: Ignore("any"), 4: Ignore("any"), 8: Forbid()}
    stated = replace(policy, releases=releases, model=Released(), configuration=Released(), pcrs=rules)
    named = with_keys(stated, MODEL, PROMPT)
    [for_prompts] = released_to(named, PROMPT)
    [for_model] = released_to(named, MODEL)
    assert for_prompts.name == for_model.name == "one"
    assert for_prompts.pcrs == {
        0: (IMAGES[0].pcr0,),
        1: (IMAGES[0].pcr1,),
        2: (IMAGES[0].pcr2,),
        16: (once_extended(M),),
        17: (once_extended(C), once_extended(M)),
    }
    assert for_model.pcrs == {index: values for index, values in for_prompts.pcrs.items() if index != 16}


def test_what_a_key_is_held_to_is_pinned(two: AppraisalPolicy) -> None:
    """Else the linter would refuse the releases in place of judging the key: a verdict is no place for that."""
    for purpose in Purpose:
        for policy in (two, replace(two, model=Require((M, C)), configuration=Require((C,)))):
            for release in released_to(policy, purpose):
                assert {*required(purpose)} <= release.registers(purpose).keys()
    with pytest.raises(PolicyError, match="released to named digests"):
        replace(two, model=Ignore("any"))
    with pytest.raises(PolicyError, match="released to named digests"):
        replace(two, configuration=Ignore("any"))


def test_a_signers_register_is_asked_for(policy: AppraisalPolicy) -> None:
    one, other = released_to(with_keys(policy, PROMPT), PROMPT)
    assert 8 not in one.pcrs
    assert other.pcrs[8] == (forge.measured("signer"),)


def test_a_key_is_asked_for_further_registers_that_the_policy_names(policy: AppraisalPolicy) -> None:
    """Else KMS would release to the same image under another role, which the policy refuses."""
    role, signer, zero = Measures(("arn:aws:iam::1:role/a", "arn:aws:iam::1:role/b")), Require((M,)), bytes(48)
    named = with_keys(policy, MODEL)
    rules = {**named.pcrs, 3: role, 4: Ignore("any"), 8: signer, 9: Require((M, zero)), 10: Forbid()}
    one, other = released_to(replace(named, pcrs=rules), MODEL)
    assert (one.pcrs[3], one.pcrs[8]) == (role.values, (M,))
    assert other.pcrs[8] == (forge.measured("signer"),), "a release's own counts"
    assert {4, 9, 10}.isdisjoint(one.pcrs)
    asked_less = replace(facts(named, MODEL), policy=key_policy(list(released_to(named, MODEL)), MODEL))
    with pytest.raises(AppraisalError) as caught:
        judge_key(replace(named, pcrs=rules), MODEL, asked_less, at=forge.NOW)
    assert _failed(caught.value.checks) == [(18, "open_key_policy")]


@given(values=st.lists(st.binary(min_size=48, max_size=48), min_size=1, max_size=4, unique=True), data=st.data())
def test_a_key_that_asks_for_another_value_is_refused(
    policy: AppraisalPolicy, values: list[bytes], data: st.DataObject
) -> None:
    """Whatever may run: what is made for it passes, and one register's value that is not among it refuses."""
    named = replace(with_keys(policy, PROMPT), configuration=Require(tuple(values)))
    [release, _] = released_to(named, PROMPT)
    evil = data.draw(st.binary(min_size=48, max_size=48).filter(any))
    index = data.draw(st.sampled_from(sorted(release.pcrs)))
    known = evil in release.pcrs[index]
    changed = ReleasedTo("changed", {**release.pcrs, index: (evil,)})
    for releases, is_accepted in (([release], True), ([changed], known)):
        said = replace(facts(named, PROMPT), policy=key_policy(releases, PROMPT))
        with contextlib.nullcontext() if is_accepted else pytest.raises(AppraisalError, match="key policy") as caught:
            judge_key(named, PROMPT, said, at=forge.NOW)
        assert caught is None or _failed(caught.value.checks) == [(18, "open_key_policy")]


# --- The wrapped key ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("version", [VERSION, VERSION + 1, 2**32 - 1])
def test_a_wrapped_key_that_is_new_enough(policy: AppraisalPolicy, version: int) -> None:
    wrapped = WrappedKeyFile(FILE, replace(HEADER, version=version))
    named = with_keys(policy, MODEL, wrapped_key=wrapped)
    assert _failed(_verify(named, all_facts(named)).checks) == []


def test_a_wrapped_key_is_ignored_with_a_reason_alone(policy: AppraisalPolicy) -> None:
    named = with_keys(policy, MODEL, wrapped_key=Ignore("the operator keeps it"))
    [check] = [check for check in _verify(named, all_facts(named)).checks if check.step == 21]
    assert (check.name, check.status) == ("wrapped key (model)", Status.IGNORED)
    assert check.explanation == "the operator keeps it"


def test_a_wrapped_key_for_something_else_shows_what_differs(policy: AppraisalPolicy) -> None:
    named = with_keys(policy, MODEL, wrapped_key=WrappedKeyFile(FILE, replace(HEADER, purpose=PROMPT)))
    error = _refused(named, all_facts(named))
    assert error.expected == f"for a model, under {KEY.text}, context production, version 3 or later"
    assert error.got == f"for a prompt, under {KEY.text}, context production, version 3 (model.sealed)"
    absent = with_keys(policy, MODEL, wrapped_key=WrappedKeyFile(FILE, None))
    assert _refused(absent, all_facts(absent)).got == "no file model.sealed"


# --- Without an enclave -------------------------------------------------------------------------------------------


@pytest.fixture
def release(two: AppraisalPolicy) -> KeyRelease:
    return judge_key(two, PROMPT, facts(two, PROMPT), at=forge.NOW)


@pytest.mark.parametrize("purpose", Purpose)
def test_a_key_is_judged_alone(two: AppraisalPolicy, purpose: Purpose) -> None:
    release = judge_key(two, purpose, facts(two, purpose), at=forge.NOW)
    assert (release.key, release.purpose, release.rule) == (KEYS[purpose], purpose, two.kms[purpose])
    assert isinstance(release.mutability, MutableBy)
    assert (release.models, release.configurations) == (
        (forge.COMMITMENT.model,),
        (forge.COMMITMENT.configuration,),
    )
    assert [check.step for check in release.checks] == list(KEY_STEPS)
    assert release.checks[-1].status is Status.NOT_APPLICABLE
    assert release.checks[-1].name == f"wrapped key ({purpose.table})"
    assert release.checks[-1].explanation == "a new one is about to be made"
    report = json.loads(json.dumps(release.as_json()))
    assert report == {
        "verdict": "accepted",
        "labels": ["EMULATED"],
        "key": KEYS[purpose].text,
        "purpose": purpose.value,
        "mutability": f"MUTABLE-BY({ADMIN})",
        "checks": [check.as_json() for check in release.checks],
    }


def test_a_locked_key_says_so(policy: AppraisalPolicy) -> None:
    locked = with_keys(policy, PROMPT, administrators=())
    release = judge_key(locked, PROMPT, facts(locked, PROMPT, administrators=()), at=forge.NOW)
    assert (release.mutability, release.as_json()["mutability"]) == (Locked(), "LOCKED")


def test_a_model_that_is_still_to_be_encrypted_has_no_wrapped_key(policy: AppraisalPolicy) -> None:
    named = with_keys(policy, MODEL, wrapped_key=WrappedKeyFile(FILE, None))
    assert judge_key(named, MODEL, facts(named, MODEL), at=forge.NOW).key == KEY


def test_hardware_has_no_label(two: AppraisalPolicy) -> None:
    real = replace(two, anchor=AWS_NITRO_G1)
    assert judge_key(real, PROMPT, facts(real, PROMPT), at=forge.NOW).labels == frozenset()


def test_a_key_that_is_refused_alone(two: AppraisalPolicy) -> None:
    with pytest.raises(AppraisalError) as caught:
        judge_key(two, PROMPT, facts(two, PROMPT, enabled=False, grants=[grant("Decrypt")]), at=forge.NOW)
    error = caught.value
    assert error.message == "the policy refuses this key: KMS key (prompts), grants (prompts)"
    assert (error.code, error.exit_code, error.labels) == ("unusable_key", 1, frozenset((Label.EMULATED,)))
    assert error.got == f"{PROMPTS_KEY.text}: Enabled (not enabled), " + (
        "ENCRYPT_DECRYPT, SYMMETRIC_DEFAULT, origin AWS_KMS, managed by CUSTOMER"
    )
    assert [check.step for check in error.checks] == list(KEY_STEPS)


def test_a_key_that_the_policy_does_not_name(policy: AppraisalPolicy) -> None:
    named = with_keys(policy, PROMPT)
    with pytest.raises(PolicyError) as caught:
        judge_key(named, MODEL, facts(named, MODEL), at=forge.NOW)
    assert (caught.value.code, caught.value.field) == ("missing_field", "kms.model")


def test_nothing_is_sealed_to_releases_that_are_not_in_force(policy: AppraisalPolicy) -> None:
    signed = replace(
        policy,
        releases=SignedReleases("releases.jsonl", 1, verified(history_of([ONE]))),
        model=Released(),
        configuration=Released(),
    )
    named = with_keys(signed, PROMPT)
    expires = ISSUED + VALIDITY
    last = judge_key(named, PROMPT, facts(named, PROMPT), at=expires - timedelta(seconds=1))
    assert (last.models, last.configurations) == (ONE.models, ONE.configurations)
    with pytest.raises(ReleaseError) as caught:
        judge_key(named, PROMPT, facts(named, PROMPT), at=expires)
    assert caught.value.code == "expired_release"
    earliest = ISSUED - timedelta(seconds=named.leeway_seconds)
    judge_key(named, PROMPT, facts(named, PROMPT), at=earliest)
    with pytest.raises(ReleaseError) as caught:
        judge_key(named, PROMPT, facts(named, PROMPT), at=earliest - timedelta(seconds=1))
    assert caught.value.code == "unissued_release"


# --- Only judge_key makes one -------------------------------------------------------------------------------------


def test_a_verdict_on_a_key_cannot_be_constructed_elsewhere(release: KeyRelease) -> None:
    fields: dict[str, Any] = {
        name: getattr(release, name) for name in KeyRelease.__dataclass_fields__ if name not in ("_", "proof")
    }
    for proof in ({}, {"proof": None}, {"proof": object()}):
        with pytest.raises(TypeError):
            KeyRelease(**fields, **proof)


def test_a_verdict_on_a_key_cannot_be_copied_into_another(release: KeyRelease) -> None:
    with pytest.raises((TypeError, ValueError)):
        replace(release, key=KEY)  # type: ignore[call-arg]
    copying: Callable[[object], object]
    for copying in (copy.copy, copy.deepcopy, pickle.dumps):
        with pytest.raises(TypeError, match="does not travel"):
            copying(release)
    with pytest.raises(AttributeError):
        release.key = KEY  # type: ignore[misc]


def test_the_real_clock_is_not_asked(two: AppraisalPolicy) -> None:
    for at in (datetime(1990, 1, 1, tzinfo=UTC), datetime(2090, 1, 1, tzinfo=UTC)):
        assert judge_key(two, PROMPT, facts(two, PROMPT), at=at).key == PROMPTS_KEY
