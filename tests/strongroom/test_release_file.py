"""A publisher's files: every change is one signed entry, safe to repeat, and never on top of what does not verify."""

from __future__ import annotations

import hashlib
import itertools
import multiprocessing
from collections.abc import Sequence
from dataclasses import replace
from datetime import timedelta
from pathlib import Path

import pytest

from attestation.release_heads import MemoryHeads
from attestation.release_signing import LocalSigner, ReleaseError, SigningError
from attestation.releases import ReleaseHistory
from strongroom.release_file import Outcome, ReleaseFile, read_key, write_key
from tests.release_files import ED25519, ISSUED, NAME, ONE, P384, PCRS, TWO, VALIDITY, history_of, verified

DAY = timedelta(days=1)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "releases.jsonl"


@pytest.fixture
def file(path: Path) -> ReleaseFile:
    return ReleaseFile(path, ED25519, NAME, MemoryHeads())


def what_counts(path: Path) -> list[str]:
    return [release.name for release in verified(path.read_bytes()).current.releases]


def test_a_life(file: ReleaseFile, path: Path) -> None:
    def done(outcome: Outcome, names: Sequence[str]) -> ReleaseHistory:
        assert outcome.is_changed
        assert what_counts(path) == list(names)
        assert outcome.history.head == verified(path.read_bytes()).head
        return outcome.history

    done(file.add(ONE, at=ISSUED, validity=VALIDITY), ["1.0"])
    done(file.add(TWO, at=ISSUED + DAY, validity=VALIDITY), ["1.0", "2.0"])
    done(file.withdraw("1.0", at=ISSUED + 2 * DAY, validity=VALIDITY), ["2.0"])
    history = done(file.refresh(at=ISSUED + 3 * DAY, validity=DAY), ["2.0"])
    assert history.head.sequence == 4
    assert history.expires == ISSUED + 4 * DAY


def test_saying_it_again_changes_nothing(file: ReleaseFile, path: Path) -> None:
    file.add(ONE, at=ISSUED, validity=VALIDITY)
    file.add(TWO, at=ISSUED, validity=VALIDITY)
    file.withdraw("2.0", at=ISSUED, validity=VALIDITY)
    before = path.read_bytes()
    for outcome in (
        file.add(ONE, at=ISSUED + DAY, validity=VALIDITY),
        file.withdraw("2.0", at=ISSUED + DAY, validity=VALIDITY),
    ):
        assert not outcome.is_changed
        assert outcome.history.head.sequence == 3
    assert path.read_bytes() == before


def test_saying_again_what_has_expired_signs_anew(file: ReleaseFile) -> None:
    file.add(ONE, at=ISSUED, validity=DAY)
    outcome = file.add(ONE, at=ISSUED + DAY, validity=DAY)
    assert outcome.is_changed
    assert outcome.history.expires == ISSUED + 2 * DAY


def test_another_release_of_the_same_name(file: ReleaseFile) -> None:
    file.add(ONE, at=ISSUED, validity=VALIDITY)
    with pytest.raises(SigningError) as caught:
        file.add(replace(ONE, image=None), at=ISSUED, validity=VALIDITY)
    assert (caught.value.code, caught.value.exit_code) == ("release_exists", 2)


def test_a_release_that_never_was(file: ReleaseFile) -> None:
    file.add(ONE, at=ISSUED, validity=VALIDITY)
    with pytest.raises(SigningError) as caught:
        file.withdraw("1.O", at=ISSUED, validity=VALIDITY)
    assert caught.value.code == "no_such_release"


def test_only_adding_begins_a_history(file: ReleaseFile, path: Path) -> None:
    for attempt in (file.refresh, lambda **when: file.withdraw("1.0", **when)):
        with pytest.raises(SigningError) as caught:
            attempt(at=ISSUED, validity=VALIDITY)
        assert caught.value.code == "no_history"
    assert not path.exists()


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{}\n",
        history_of([ONE])[:-1],
        history_of([ONE], [TWO])[1:],
        history_of([ONE], [TWO]).splitlines(keepends=True)[1],
        history_of([ONE], signer=P384),
    ],
)
def test_nothing_is_written_over_what_does_not_verify(file: ReleaseFile, path: Path, content: bytes) -> None:
    path.write_bytes(content)
    for attempt in (
        file.refresh,
        lambda **when: file.add(TWO, **when),
        lambda **when: file.withdraw("1.0", **when),
    ):
        with pytest.raises(ReleaseError):
            attempt(at=ISSUED + 10 * DAY, validity=VALIDITY)
    assert path.read_bytes() == content
    assert list(path.parent.iterdir()) == [path]


def test_what_no_reader_would_take_is_not_written(file: ReleaseFile, path: Path) -> None:
    file.add(ONE, at=ISSUED, validity=VALIDITY)
    before = path.read_bytes()
    with pytest.raises(SigningError) as caught:
        file.add(TWO, at=ISSUED - DAY, validity=VALIDITY)
    assert caught.value.code == "unusable_statement"
    assert path.read_bytes() == before


def test_a_signer_that_fails_changes_nothing(path: Path) -> None:
    class Failing:
        public_key = ED25519.public_key

        def sign(self, data: bytes) -> bytes:
            raise SigningError("kms_unavailable", "no")

    ReleaseFile(path, ED25519, NAME, MemoryHeads()).add(ONE, at=ISSUED, validity=VALIDITY)
    before = path.read_bytes()
    with pytest.raises(SigningError):
        ReleaseFile(path, Failing(), NAME, MemoryHeads()).add(TWO, at=ISSUED, validity=VALIDITY)
    assert path.read_bytes() == before
    assert list(path.parent.iterdir()) == [path]


def test_the_files_mode_stays_and_a_link_leads_to_the_file(path: Path, tmp_path: Path) -> None:
    link = tmp_path / "link.jsonl"
    link.symlink_to(path)
    ReleaseFile(link, ED25519, NAME, MemoryHeads()).add(ONE, at=ISSUED, validity=VALIDITY)
    assert path.stat().st_mode & 0o777 == 0o644
    path.chmod(0o640)
    ReleaseFile(link, ED25519, NAME, MemoryHeads()).add(TWO, at=ISSUED, validity=VALIDITY)
    assert link.is_symlink()
    assert path.stat().st_mode & 0o777 == 0o640
    assert what_counts(path) == ["1.0", "2.0"]


def _publish(path: Path, key: bytes, names: list[str]) -> None:
    file = ReleaseFile(path, LocalSigner.from_pem(key), NAME, MemoryHeads())
    for name in names:
        pcrs = replace(PCRS, pcr0=hashlib.sha384(name.encode()).digest())  # of another image each
        file.add(replace(ONE, name=name, pcrs=pcrs), at=ISSUED, validity=VALIDITY)


def test_two_processes_at_once_lose_nothing(path: Path) -> None:
    names = [[f"{process}.{number}" for number in range(6)] for process in range(2)]
    context = multiprocessing.get_context("spawn")
    processes = [context.Process(target=_publish, args=(path, ED25519.to_pem(), each)) for each in names]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
        assert process.exitcode == 0
    assert sorted(what_counts(path)) == sorted(itertools.chain(*names))
    assert verified(path.read_bytes()).head.sequence == 12


# --- Keys ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("signer", [ED25519, P384], ids=["ed25519", "p384"])
def test_a_key_is_kept_for_its_owner(tmp_path: Path, signer: LocalSigner) -> None:
    path = tmp_path / "publisher.pem"
    write_key(path, signer)
    assert path.stat().st_mode & 0o777 == 0o600
    assert read_key(path).public_key == signer.public_key
    with pytest.raises(FileExistsError):
        write_key(path, LocalSigner.generate())
    assert read_key(path).public_key == signer.public_key


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o644])
def test_a_key_that_others_may_read(tmp_path: Path, mode: int) -> None:
    path = tmp_path / "publisher.pem"
    write_key(path, ED25519)
    path.chmod(mode)
    with pytest.raises(SigningError) as caught:
        read_key(path)
    assert (caught.value.code, caught.value.exit_code) == ("unsafe_permissions", 2)
    assert caught.value.got == f"{mode:o}"


def test_what_was_signed_here_is_remembered(path: Path) -> None:
    """Yesterday's file put back, or none: a second entry 2 would be one that clients who saw the first refuse."""
    heads = MemoryHeads()
    file = ReleaseFile(path, ED25519, NAME, heads)
    file.add(ONE, at=ISSUED, validity=VALIDITY)
    yesterday = path.read_bytes()
    file.withdraw(ONE.name, at=ISSUED, validity=VALIDITY)
    today = path.read_bytes()
    path.write_bytes(yesterday)
    with pytest.raises(ReleaseError) as caught:
        file.add(TWO, at=ISSUED, validity=VALIDITY)
    assert caught.value.code == "rolled_back"
    assert path.read_bytes() == yesterday
    path.unlink()
    with pytest.raises(SigningError) as missing:
        file.add(TWO, at=ISSUED, validity=VALIDITY)
    assert missing.value.code == "history_missing"
    path.write_bytes(today)
    assert file.add(TWO, at=ISSUED, validity=VALIDITY).history.head == heads.recall(ED25519.public_key, NAME)
