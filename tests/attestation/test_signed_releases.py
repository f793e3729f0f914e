"""Policies that accept what a publisher signs: rollouts, withdrawals, rollbacks and expiry, through to the verdict."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from attestation.checks import Status
from attestation.errors import AppraisalError, PolicyError
from attestation.policy import AppraisalPolicy
from attestation.policy_writer import write_policy
from attestation.reference import PcrSet
from attestation.release_heads import MemoryHeads
from attestation.release_signing import LocalSigner, ReleaseError
from attestation.releases import ReleasedImage, Source, append
from attestation.rules import Released, SignedReleases
from attestation.verifier import verify, verify_archived
from tests.pki import forge

SIGNER = LocalSigner.generate()
NAME = "assistant"
SOURCE = Source("https://example.org/assistant.git", "a" * 40)
GOOD = ReleasedImage(
    "1.0",
    PcrSet(forge.PCRS[0], forge.PCRS[1], forge.PCRS[2]),
    None,
    SOURCE,
    (forge.COMMITMENT.model,),
    (forge.COMMITMENT.configuration,),
)
NEXT = ReleasedImage("2.0", PcrSet(b"\x01" * 48, b"\x02" * 48, b"\x03" * 48), None, SOURCE, (), ())

START = forge.POLICY.index("[[release]]")
END = forge.POLICY.index("[model]")
TEXT = f"""{forge.POLICY[:START]}[releases]
history = "releases.jsonl"
key = "{SIGNER.public_key}"
name = "{NAME}"
minimum_sequence = 1
{forge.POLICY[END:]}"""
RELEASED = TEXT.replace(f'require = ["sha384:{forge.COMMITMENT.model.hex()}"]', "released = true").replace(
    f'require = ["sha384:{forge.COMMITMENT.configuration.hex()}"]', "released = true"
)


def _history(*statements: Sequence[ReleasedImage], signer: LocalSigner = SIGNER) -> bytes:
    history = b""
    for releases in statements:
        history += append(
            history,
            signer=signer,
            name=NAME,
            releases=releases,
            issued=forge.NOW - timedelta(days=1),
            expires=forge.NOW + timedelta(days=30),
        )
    return history


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "root.der").write_bytes(forge.ROOT_DER)
    return tmp_path


def _policy(folder: Path, history: bytes, heads: MemoryHeads, text: str = TEXT) -> AppraisalPolicy:
    (folder / "releases.jsonl").write_bytes(history)
    (folder / "policy.toml").write_text(text)
    return AppraisalPolicy.load(folder / "policy.toml", heads=heads)


def _verdict(policy: AppraisalPolicy, at: datetime = forge.NOW) -> str | None:
    return verify(forge.evidence(), policy=policy, nonce=forge.NONCE, at=at).release


def test_what_a_publisher_signs_is_accepted(folder: Path) -> None:
    policy = _policy(folder, _history([GOOD]), MemoryHeads())
    assert isinstance(policy.releases, SignedReleases)
    assert policy.expires == forge.NOW + timedelta(days=30)
    assert _verdict(policy) == "1.0"
    assert _verdict(_policy(folder, _history([GOOD], [NEXT, GOOD]), MemoryHeads())) == "1.0"


def test_models_and_configurations_go_with_their_release(folder: Path) -> None:
    policy = _policy(folder, _history([GOOD, NEXT]), MemoryHeads(), RELEASED)
    assert (policy.model, policy.configuration) == (Released(), Released())
    assert _verdict(policy) == "1.0"
    with pytest.raises(PolicyError) as caught:
        _policy(folder, _history([NEXT]), MemoryHeads(), RELEASED)
    assert (caught.value.code, caught.value.field) == ("contradiction", "model.released")


def test_a_release_that_was_taken_back_is_refused(folder: Path) -> None:
    with pytest.raises(AppraisalError) as caught:
        _verdict(_policy(folder, _history([GOOD], [NEXT]), MemoryHeads()))
    assert caught.value.code == "wrong_image"
    with pytest.raises(PolicyError) as nothing:
        _policy(folder, _history([GOOD], []), MemoryHeads())
    assert nothing.value.code == "no_release"


def test_an_older_history_is_refused(folder: Path) -> None:
    """Whoever serves the file offers it as it was before the release was taken back."""
    heads = MemoryHeads()
    whole = _history([GOOD], [NEXT])
    _policy(folder, whole, heads)
    with pytest.raises(ReleaseError) as caught:
        _policy(folder, whole[: whole.index(b"\n") + 1], heads)
    assert caught.value.code == "rolled_back"
    with pytest.raises(ReleaseError) as other:
        _policy(folder, _history([GOOD], [GOOD], [GOOD]), heads)
    assert other.value.code == "rolled_back"


def test_a_client_that_has_seen_nothing_goes_by_its_policy(folder: Path) -> None:
    text = TEXT.replace("minimum_sequence = 1", "minimum_sequence = 2")
    with pytest.raises(ReleaseError) as caught:
        _policy(folder, _history([GOOD]), MemoryHeads(), text)
    assert caught.value.code == "rolled_back"
    assert _verdict(_policy(folder, _history([GOOD], [GOOD]), MemoryHeads(), text)) == "1.0"


@pytest.mark.parametrize(
    ("text", "last"),
    [
        (TEXT, []),
        (RELEASED, [NEXT]),
        (TEXT, [replace(GOOD, pcrs=replace(GOOD.pcrs, pcr8=b"\x08" * 48))]),
    ],
    ids=["every release", "every model", "every unsigned image"],
)
def test_what_was_taken_back_is_remembered_whatever_becomes_of_the_policy(
    folder: Path, text: str, last: list[ReleasedImage]
) -> None:
    """In an emergency a policy is left with nothing to accept: just then nobody may go back to the day before."""
    heads = MemoryHeads()
    whole = _history([GOOD], last)
    _policy(folder, whole[: whole.index(b"\n") + 1], heads, text)
    with pytest.raises(PolicyError):
        _policy(folder, whole, heads, text)
    with pytest.raises(ReleaseError) as caught:
        _policy(folder, whole[: whole.index(b"\n") + 1], heads, text)
    assert caught.value.code == "rolled_back"


def test_a_history_that_is_not_renewed_expires(folder: Path) -> None:
    """Whoever holds back a withdrawal can do so until the last statement that got through expires."""
    issued = forge.NOW - timedelta(days=1)
    for expires, accepted in ((forge.NOW + timedelta(seconds=1), True), (forge.NOW, False)):
        history = append(b"", signer=SIGNER, name=NAME, releases=[GOOD], issued=issued, expires=expires)
        policy = _policy(folder, history, MemoryHeads())
        if accepted:
            assert _verdict(policy) == "1.0"
            continue
        with pytest.raises(AppraisalError) as caught:
            _verdict(policy)
        failed = [check for check in caught.value.checks if check.status is Status.FAILED]
        assert [(check.step, check.code) for check in failed] == [(11, "expired_release")]


def test_releases_expire_by_the_clients_clock(folder: Path) -> None:
    """And not by the document's: a verdict is as of now."""
    issued, expires = forge.NOW - timedelta(days=1), forge.NOW + timedelta(seconds=60)
    history = append(b"", signer=SIGNER, name=NAME, releases=[GOOD], issued=issued, expires=expires)
    policy = _policy(folder, history, MemoryHeads())
    assert _verdict(policy, forge.NOW + timedelta(seconds=59)) == "1.0"
    with pytest.raises(AppraisalError) as caught:
        _verdict(policy, forge.NOW + timedelta(seconds=60))
    assert caught.value.code == "expired_release"


@pytest.mark.parametrize(
    ("old", "new", "code", "field"),
    [
        ("[releases]", '[releases]\nmore = "x"', "unknown_field", "releases.more"),
        ("[releases]", f"{forge.POLICY[START:END]}[releases]", "contradiction", ""),
        ("releases.jsonl", "absent.jsonl", "unreadable_history", "releases.history"),
        ("ed25519:", "ed448:", "malformed_key", "releases.key"),
        ("minimum_sequence = 1", "", "missing_field", "releases.minimum_sequence"),
        ("minimum_sequence = 1", "minimum_sequence = 0", "wrong_value", "releases.minimum_sequence"),
        ("minimum_sequence = 1", "minimum_sequence = 4097", "wrong_value", "releases.minimum_sequence"),
        (f'name = "{NAME}"\n', "", "missing_field", "releases.name"),
    ],
)
def test_what_is_wrong_is_named(folder: Path, old: str, new: str, code: str, field: str) -> None:
    assert old in TEXT
    with pytest.raises(PolicyError) as caught:
        _policy(folder, _history([GOOD]), MemoryHeads(), TEXT.replace(old, new, 1))
    assert (caught.value.code, caught.value.field) == (code, field)


def test_a_history_without_a_memory_is_refused(folder: Path) -> None:
    _policy(folder, _history([GOOD]), MemoryHeads())
    with pytest.raises(PolicyError) as caught:
        AppraisalPolicy.load(folder / "policy.toml")
    assert caught.value.code == "no_memory"


def test_a_history_of_another_key_is_refused(folder: Path) -> None:
    with pytest.raises(ReleaseError) as caught:
        _policy(folder, _history([GOOD], signer=LocalSigner.generate()), MemoryHeads())
    assert caught.value.code == "wrong_key"


def test_what_is_written_is_read_back(folder: Path) -> None:
    policy = _policy(folder, _history([GOOD]), MemoryHeads(), RELEASED)
    text = write_policy(policy, root="root.der")
    assert AppraisalPolicy.parse(text, folder, heads=MemoryHeads()) == policy


# --- archives: what was in force then ---------------------------------------------------------------------------------


def _over_time(*statements: tuple[Sequence[ReleasedImage], timedelta, timedelta]) -> bytes:
    """Statements, each with its issue and its expiry relative to the Evidence."""
    history = b""
    for releases, issued, expires in statements:
        history += append(
            history,
            signer=SIGNER,
            name=NAME,
            releases=releases,
            issued=forge.NOW + issued,
            expires=forge.NOW + expires,
        )
    return history


DAY = timedelta(days=1)


@pytest.mark.parametrize(
    ("statements", "code"),
    [
        ([([GOOD], -9 * DAY, 9 * DAY), ([NEXT], DAY, 99 * DAY)], None),
        ([([GOOD], DAY, 9 * DAY)], "wrong_image"),
        ([([GOOD], -9 * DAY, -DAY), ([GOOD], DAY, 9 * DAY)], "expired_release"),
        ([([GOOD], -9 * DAY, 9 * DAY), ([NEXT], -DAY, 9 * DAY), ([GOOD], DAY, 9 * DAY)], "wrong_image"),
    ],
    ids=["superseded later", "first stated later", "expired then, renewed later", "withdrawn then, added again later"],
)
def test_an_archive_is_judged_by_what_was_in_force_then(folder: Path, statements: list[Any], code: str | None) -> None:
    policy = _policy(folder, _over_time(*statements), MemoryHeads())
    if code is None:
        assert verify_archived(forge.evidence(), policy=policy).release == "1.0"
        return
    with pytest.raises(AppraisalError) as caught:
        verify_archived(forge.evidence(), policy=policy)
    assert caught.value.code == code


@pytest.mark.parametrize(("ahead", "accepted"), [(120, True), (121, False)])
def test_a_statement_from_the_future_does_not_count_yet(folder: Path, ahead: int, accepted: bool) -> None:
    """Beyond the leeway for clocks."""
    policy = _policy(folder, _over_time(([GOOD], timedelta(seconds=ahead), 9 * DAY)), MemoryHeads())
    if accepted:
        assert _verdict(policy) == "1.0"
        return
    with pytest.raises(AppraisalError) as caught:
        _verdict(policy)
    assert caught.value.code == "unissued_release"


def test_a_verdict_lasts_no_longer_than_its_releases(folder: Path) -> None:
    policy = _policy(folder, _over_time(([GOOD], -DAY, timedelta(seconds=7))), MemoryHeads())
    assert verify(forge.evidence(), policy=policy, nonce=forge.NONCE, at=forge.NOW).valid_seconds == 7
