"""A generated policy opens to its releases and to nothing else; a rollout adds and then removes; a lock locks."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from attestation.envelope import EnvelopePurpose
from attestation.keypolicy.attested import ReleasedTo
from attestation.keypolicy.decision import Request, decide, encryption_context, recipient_context
from attestation.keypolicy.document import MAX_POLICY, KeyPolicy, KeyPolicyError
from attestation.keypolicy.generate import closed, generate, locked, opening, roll_out
from attestation.keypolicy.lint import lint
from attestation.keypolicy.mutability import Locked, mutability
from tests.key_policies import (
    ADMIN,
    CONTEXT,
    KEY,
    METADATA,
    MODEL,
    PARENT,
    PROMPT,
    RELEASES,
    ROOT,
    SEALER,
    STRANGER,
    Json,
    allow,
    as_json,
    deny,
    good,
    parsed,
    release,
)
from tests.key_policies import opening as opening_json

READER = ADMIN.replace("admin", "reader")
REGISTERS = st.binary(min_size=48, max_size=48).filter(any)
INDEXES = {PROMPT: (0, 1, 2, 8, 16, 17), MODEL: (0, 1, 2, 8, 17)}


@st.composite
def released(draw: st.DrawFn) -> list[ReleasedTo]:
    """Some releases, whose registers may be alike; all are signed, or none is."""
    pool, are_signed = draw(st.lists(REGISTERS, min_size=2, max_size=3, unique=True)), draw(st.booleans())
    one, several = (
        st.sampled_from(pool).map(lambda each: (each,)),
        st.lists(st.sampled_from(pool), min_size=1, max_size=2),
    )
    return [
        ReleasedTo(
            draw(st.text(st.characters(min_codepoint=32, max_codepoint=0x2FF), min_size=1, max_size=8)),
            {
                **{index: draw(one) for index in (0, 1, 2)},
                **({8: draw(one)} if are_signed else {}),
                **{index: tuple(draw(several)) for index in (16, 17)},
            },
        )
        for _ in range(draw(st.integers(1, 3)))
    ]


def made(releases: Sequence[ReleasedTo] = RELEASES, **changes: Any) -> KeyPolicy:
    asked: dict[str, Any] = {
        "purpose": PROMPT,
        "context": CONTEXT,
        "users": [PARENT],
        "sealers": [SEALER],
        "administrators": [ADMIN],
        **changes,
    }
    return generate(releases, **asked)


def is_allowed(
    policy: KeyPolicy,
    action: str,
    who: str,
    registers: dict[int, bytes] | None = None,
    *,
    purpose: str = "prompt",
    context: str = CONTEXT,
) -> bool:
    pairs = {"strongroom": "1", "strongroom:purpose": purpose, "strongroom:context": context, "strongroom:version": "7"}
    keys = {**recipient_context(registers or {}), **encryption_context(pairs)}
    return decide(policy, (), Request(who, f"kms:{action}", KEY, keys)).allowed


@given(released(), st.sampled_from(EnvelopePurpose), st.data())
def test_it_opens_to_the_given_registers_and_to_no_others(
    releases: list[ReleasedTo], purpose: EnvelopePurpose, data: st.DataObject
) -> None:
    policy = KeyPolicy.parse(made(releases, purpose=purpose).encode())
    pool = sorted({value for each in releases for values in each.pcrs.values() for value in values})
    registers = {index: data.draw(st.sampled_from([*pool, bytes(48)])) for index in INDEXES[purpose]}
    for index in data.draw(st.sets(st.sampled_from(INDEXES[purpose]), max_size=1)):
        del registers[index]
    is_release = any(
        all(registers.get(index) in values for index, values in each.registers(purpose).items()) for each in releases
    )
    assert is_allowed(policy, "Decrypt", PARENT, registers, purpose=purpose.value) == is_release


@given(released(), st.sampled_from(EnvelopePurpose), st.data())
def test_it_opens_to_every_release_and_to_none_with_another_register(
    releases: list[ReleasedTo], purpose: EnvelopePurpose, data: st.DataObject
) -> None:
    policy = made(releases, purpose=purpose)
    for each in releases:
        registers = {index: data.draw(st.sampled_from(values)) for index, values in each.pcrs.items()}
        assert is_allowed(policy, "Decrypt", PARENT, registers, purpose=purpose.value)
        for index in each.registers(purpose):
            other = {**registers, index: hashlib.sha384(registers[index]).digest()}
            assert not is_allowed(policy, "Decrypt", PARENT, other, purpose=purpose.value)
        assert not is_allowed(policy, "Decrypt", SEALER, registers, purpose=purpose.value)
        assert not is_allowed(policy, "Decrypt", PARENT, registers, purpose="other")
        assert not is_allowed(policy, "Decrypt", PARENT, registers, purpose=purpose.value, context="staging")
    assert not is_allowed(policy, "Decrypt", PARENT, {}, purpose=purpose.value)


@given(released(), st.sampled_from(EnvelopePurpose))
def test_the_linter_finds_no_error_in_it(releases: list[ReleasedTo], purpose: EnvelopePurpose) -> None:
    policy = made(releases, purpose=purpose)
    for known in (releases, None):
        findings = lint(
            policy, releases=known, purpose=purpose, context=CONTEXT, administrators=[ADMIN], metadata=METADATA
        )
        assert {each.rule for each in findings} == {"changeable", "can_destroy"}


def test_who_may_do_what() -> None:
    policy = made()
    registers = {index: values[0] for index, values in RELEASES[1].pcrs.items()}
    everything = [
        *("Decrypt", "Encrypt", "GenerateDataKey", "PutKeyPolicy", "ScheduleKeyDeletion", "DescribeKey"),
        *("CreateGrant", "ReEncryptFrom", "ReplicateKey", "ImportKeyMaterial", "GetKeyPolicy", "ListGrants"),
    ]
    may = {
        who: {action for action in everything if is_allowed(policy, action, who, registers)}
        for who in (PARENT, SEALER, ADMIN, ROOT, STRANGER)
    }
    assert may == {
        PARENT: {"Decrypt"},
        SEALER: {"Encrypt", "GenerateDataKey", "DescribeKey", "GetKeyPolicy", "ListGrants"},
        ADMIN: {"PutKeyPolicy", "ScheduleKeyDeletion", "DescribeKey", "GetKeyPolicy", "ListGrants"},
        ROOT: set(),
        STRANGER: set(),
    }
    assert not is_allowed(policy, "Encrypt", SEALER, context="staging")


def test_its_shape() -> None:
    statements = as_json(made([RELEASES[0]]))["Statement"]
    assert [each["Sid"] for each in statements] == ["Release 1 0", "Seal", "Administer", "Read"]
    assert statements[0]["Principal"] == {"AWS": PARENT}
    assert statements[0]["Action"] == "kms:Decrypt"
    assert [key.rpartition(":")[2] for key in statements[0]["Condition"]["StringEqualsIgnoreCase"]] == [
        *("ImageSha384", "PCR0", "PCR1", "PCR2", "PCR8", "PCR16", "PCR17")
    ]
    of_model = as_json(made([RELEASES[0]], purpose=MODEL))["Statement"][0]["Condition"]
    assert "kms:RecipientAttestation:PCR16" not in of_model["StringEqualsIgnoreCase"]


def test_releases_whose_names_come_to_the_same() -> None:
    names = ("1.0", "1-0", "1/0", "…")
    sids = [
        each.sid for each in made([replace(RELEASES[0], name=name) for name in names], administrators=()).statements
    ]
    assert sids == ["Release 1 0", "Release 1 0 2", "Release 1 0 3", "Release", "Seal", "Read"]


def test_a_key_that_opens_to_nobody_yet() -> None:
    asked = {"purpose": PROMPT, "context": CONTEXT, "sealers": [SEALER], "administrators": [ADMIN]}
    policy = closed(**asked, readers=[READER])  # type: ignore[arg-type]
    assert sids(policy) == ["Seal", "Administer", "Read"]
    registers = {index: min(values) for index, values in RELEASES[0].registers(PROMPT).items()}
    for who in (PARENT, SEALER, ADMIN, READER):
        assert not is_allowed(policy, "Decrypt", who, registers)
    opened = roll_out(policy, opening(RELEASES, purpose=PROMPT, context=CONTEXT, users=[PARENT]), finish=True)
    assert {*opened.statements} == {*made(readers=[READER]).statements}
    for administrators, code in (([], "bad_principal"), ([SEALER], "same_principal")):
        with pytest.raises(KeyPolicyError) as raised:
            closed(**{**asked, "administrators": administrators})  # type: ignore[arg-type]
        assert raised.value.code == code


def test_readers_see_the_policy_and_no_more() -> None:
    policy = made(readers=[READER])
    assert is_allowed(policy, "GetKeyPolicy", READER)
    assert not is_allowed(policy, "GetKeyPolicy", PARENT)
    for action in ("Decrypt", "Encrypt", "PutKeyPolicy"):
        assert not is_allowed(policy, action, READER)


def test_without_administrators_nobody_can_change_it() -> None:
    assert mutability(made(administrators=())) == Locked()
    assert sids(made(administrators=(), sealers=())) == ["Release 1 0", "Release 2 0"]


@pytest.mark.parametrize(
    ("changes", "code"),
    [
        ({"releases": []}, "no_release"),
        ({"releases": [release(1, without=(17,))]}, "unpinned_register"),
        ({"releases": [release(1, without=(16,))]}, "unpinned_register"),
        ({"users": []}, "bad_principal"),
        ({"users": ["*"]}, "bad_principal"),
        ({"users": [ROOT]}, "bad_principal"),
        ({"users": [f"{PARENT}*"]}, "bad_principal"),
        ({"sealers": ["111122223333"]}, "bad_principal"),
        ({"sealers": ["arn:aws:sts::111122223333:assumed-role/seal/me"]}, "bad_principal"),
        ({"administrators": [f"{ADMIN}\n"]}, "bad_principal"),
        ({"administrators": [ADMIN, PARENT]}, "same_principal"),
        ({"administrators": [SEALER]}, "same_principal"),
        ({"context": ""}, "bad_context"),
        ({"context": "Production"}, "bad_context"),
        ({"context": "a" * 65}, "bad_context"),
        ({"releases": [release(number) for number in range(40)]}, "policy_too_large"),
    ],
)
def test_what_is_not_written(changes: dict[str, Any], code: str) -> None:
    with pytest.raises(KeyPolicyError) as caught:
        made(**changes)
    assert (caught.value.code, caught.value.exit_code) == (code, 2)


def test_twenty_releases_fit() -> None:
    assert len(made([release(number) for number in range(20)]).encode()) <= MAX_POLICY


# Rollouts


def wanted(*numbers: int) -> Any:
    releases = [release(number) for number in numbers]
    return opening(releases, purpose=PROMPT, context=CONTEXT, users=[PARENT])


def sids(policy: KeyPolicy) -> list[str | None]:
    return [each.sid for each in policy.statements]


def test_a_rollout_adds_and_then_removes() -> None:
    before = made([release(1)])
    both = roll_out(before, wanted(1, 2), finish=False)
    assert sids(both) == ["Release 2 0", "Release 1 0", "Seal", "Administer", "Read"]
    assert roll_out(both, wanted(1, 2), finish=True) == both
    after = roll_out(both, wanted(2), finish=True)
    assert set(after.statements) == set(made([release(2)]).statements)
    assert roll_out(after, wanted(2), finish=False) == after


def test_a_rollout_removes_whatever_else_opens() -> None:
    other = parsed(
        *as_json(good())["Statement"],
        opening_json(1, Principal={"AWS": STRANGER}, Sid="Release 1 0 again"),
        allow("kms:*", Sid="Everything"),
        deny("kms:Decrypt", Condition={"Bool": {"aws:SecureTransport": "false"}}, Sid="Insecure"),
    )
    assert roll_out(other, wanted(1, 2), finish=False) == other
    finished = roll_out(other, wanted(1, 2), finish=True)
    assert sids(finished) == ["Release 1 0", "Release 2 0", "Seal", "Administer", "Read", "Insecure"]


def test_a_statement_that_is_there_under_another_name_stays() -> None:
    policy = parsed(opening_json(1, Sid="by hand"), opening_json(2, Sid=None))
    assert roll_out(policy, wanted(1, 2), finish=True) == policy


def test_an_added_statement_has_a_name_of_its_own() -> None:
    policy = parsed(opening_json(1, Principal={"AWS": STRANGER}))
    assert sids(roll_out(policy, wanted(1), finish=False)) == ["Release 1 0 2", "Release 1 0"]


def test_a_rollout_that_does_not_fit() -> None:
    with pytest.raises(KeyPolicyError, match="too large"):
        roll_out(made([release(number) for number in range(20)]), wanted(*range(20, 40)), finish=False)


# Locks


def test_a_lock_takes_the_permission_to_change_and_leaves_the_rest() -> None:
    policy = made()
    assert mutability(policy) != Locked()
    after = locked(policy)
    assert mutability(after) == Locked()
    assert sids(after) == sids(policy)
    assert not is_allowed(after, "PutKeyPolicy", ADMIN)
    assert is_allowed(after, "ScheduleKeyDeletion", ADMIN)
    findings = lint(after, releases=RELEASES, purpose=PROMPT, context=CONTEXT, metadata=METADATA)
    assert {each.rule for each in findings} == {"can_destroy"}
    assert locked(after) == after


def test_a_lock_drops_a_statement_that_does_nothing_else() -> None:
    policy = parsed(
        allow("kms:DescribeKey", "kms:Get*"), allow("kms:PutKeyPolicy", "kms:CREATEGRANT"), deny("kms:Put*")
    )
    assert locked(policy).statements == (policy.statements[0], policy.statements[2])


def test_a_lock_leaves_what_a_not_action_allows_without_changes() -> None:
    policy = parsed(
        allow(Action=None, NotAction=["kms:PutKeyPolicy", "kms:CreateGrant", "kms:Re*", "kms:ImportKeyMaterial"]),
        deny(Action=None, NotAction="kms:Decrypt"),
    )
    assert locked(policy) == policy


@pytest.mark.parametrize(
    "statement",
    [
        allow("kms:*"),
        allow("kms:Put*", "kms:DescribeKey"),
        allow("kms:PutKeyPolic?"),
        allow(Action=None, NotAction="kms:Decrypt"),
        allow("kms:PutKeyPolicy"),
    ],
)
def test_what_cannot_be_locked(statement: Json) -> None:
    with pytest.raises(KeyPolicyError) as caught:
        locked(parsed(statement))
    assert caught.value.code == "unlockable_policy"
