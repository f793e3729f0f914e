"""What a client remembers of histories: one contract for every memory, and what a folder of files adds to it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from attestation.release_heads import FileHeads, HeadError, HeadMemory, MemoryHeads
from attestation.release_signing import LocalSigner, ReleaseError
from attestation.releases import ReleaseHistory
from tests.release_files import ED25519, NAME, ONE, P384, TWO, history_of, verified

KEY = ED25519.public_key
THREE = history_of([ONE], [ONE, TWO], [TWO])
LINES = THREE.splitlines(keepends=True)
FIRST, SECOND, THIRD = (verified(b"".join(LINES[:count])) for count in (1, 2, 3))
FORK = verified(history_of([ONE], [TWO], [ONE], [TWO]))


def file_heads(folder: Path) -> FileHeads:
    return FileHeads(folder / "heads")


@pytest.fixture(params=[lambda folder: MemoryHeads(), file_heads], ids=["memory", "files"])
def memory(request: pytest.FixtureRequest, tmp_path: Path) -> HeadMemory:
    make: Callable[[Path], HeadMemory] = request.param
    return make(tmp_path)


# --- The contract --------------------------------------------------------------------------------------------------


def test_nothing_is_remembered_at_first(memory: HeadMemory) -> None:
    assert memory.recall(KEY, NAME) is None


def test_the_last_head_is_remembered(memory: HeadMemory) -> None:
    for history in (FIRST, FIRST, SECOND, THIRD, THIRD):
        memory.remember(history)
        assert memory.recall(KEY, NAME) == history.head
    assert verified(THREE, head=memory.recall(KEY, NAME)).head == THIRD.head


def test_an_older_history_is_refused(memory: HeadMemory) -> None:
    memory.remember(SECOND)
    with pytest.raises(ReleaseError) as caught:
        memory.remember(FIRST)
    assert caught.value.code == "rolled_back"
    assert memory.recall(KEY, NAME) == SECOND.head


def test_a_longer_history_that_lacks_what_is_remembered_is_refused(memory: HeadMemory) -> None:
    """As when two processes were shown two histories: the second to remember learns of it."""
    memory.remember(SECOND)
    with pytest.raises(ReleaseError) as caught:
        memory.remember(FORK)
    assert caught.value.code == "rolled_back"
    assert memory.recall(KEY, NAME) == SECOND.head


def test_keys_and_products_are_remembered_apart(memory: HeadMemory) -> None:
    memory.remember(SECOND)
    assert memory.recall(P384.public_key, NAME) is None
    assert memory.recall(KEY, "another") is None
    other = verified(history_of([ONE], signer=P384), key=P384.public_key)
    memory.remember(other)
    assert memory.recall(P384.public_key, NAME) == other.head
    assert memory.recall(KEY, NAME) == SECOND.head


def test_many_threads_end_at_the_last_head(memory: HeadMemory) -> None:
    together = threading.Barrier(6)

    def remember(history: ReleaseHistory) -> None:
        together.wait()
        for _ in range(10):
            try:
                memory.remember(history)
            except ReleaseError:
                assert history is not THIRD

    threads = [threading.Thread(target=remember, args=(each,)) for each in (FIRST, SECOND, THIRD) * 2]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert memory.recall(KEY, NAME) == THIRD.head


# --- Files ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "state" / "heads"


def only_file(folder: Path) -> Path:
    [path] = folder.iterdir()
    return path


def test_files_outlive_the_process(folder: Path) -> None:
    FileHeads(folder).remember(SECOND)
    assert FileHeads(folder).recall(KEY, NAME) == SECOND.head
    with pytest.raises(ReleaseError):
        FileHeads(folder).remember(FIRST)


def test_files_are_this_users_alone(folder: Path) -> None:
    umask = os.umask(0)
    try:
        FileHeads(folder).remember(FIRST)
    finally:
        os.umask(umask)
    assert folder.stat().st_mode & 0o777 == 0o700
    assert only_file(folder).stat().st_mode & 0o777 == 0o600


def test_a_head_that_is_known_is_not_written_again(folder: Path) -> None:
    heads = FileHeads(folder)
    heads.remember(FIRST)
    before = only_file(folder).stat().st_ino
    heads.remember(FIRST)
    assert only_file(folder).stat().st_ino == before
    heads.remember(SECOND)
    assert only_file(folder).stat().st_ino != before


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{}",
        b"\xff",
        b" " * 5000,
        b"null",
        {"v": 2},
        {"key": str(LocalSigner.generate().public_key)},
        {"name": "another"},
        {"sequence": 0},
        {"sequence": "1"},
        {"digest": "ab" * 47},
        {"digest": "xy" * 48},
        {"digest": None},
        {"another": 1},
    ],
)
def test_a_damaged_file_is_an_error_and_not_a_fresh_start(folder: Path, content: bytes | dict[str, object]) -> None:
    heads = FileHeads(folder)
    heads.remember(SECOND)
    path = only_file(folder)
    if isinstance(content, dict):
        content = json.dumps(json.loads(path.read_bytes()) | content).encode()
    path.write_bytes(content)
    attempts: list[Callable[[], object]] = [lambda: heads.recall(KEY, NAME), lambda: heads.remember(THIRD)]
    for attempt in attempts:
        with pytest.raises(HeadError) as caught:
            attempt()
        assert (caught.value.code, caught.value.exit_code) == ("damaged_head", 4)
        assert str(path) in caught.value.message
    assert path.read_bytes() == content


@pytest.mark.parametrize("mode", [0o620, 0o602, 0o666])
def test_a_file_that_others_may_change(folder: Path, mode: int) -> None:
    heads = FileHeads(folder)
    heads.remember(FIRST)
    only_file(folder).chmod(mode)
    with pytest.raises(HeadError) as caught:
        heads.recall(KEY, NAME)
    assert caught.value.code == "unsafe_permissions"


def test_a_folder_that_others_may_change(folder: Path) -> None:
    folder.mkdir(parents=True)
    folder.chmod(0o777)
    with pytest.raises(HeadError) as caught:
        FileHeads(folder).remember(FIRST)
    assert caught.value.code == "unsafe_permissions"
    assert list(folder.iterdir()) == []


def test_a_folder_of_another_user(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    FileHeads(folder).remember(FIRST)
    monkeypatch.setattr(os, "geteuid", lambda: folder.stat().st_uid + 1)
    with pytest.raises(HeadError) as caught:
        FileHeads(folder).recall(KEY, NAME)
    assert caught.value.code == "unsafe_permissions"


def test_a_folder_that_is_a_file(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"")
    with pytest.raises(HeadError) as caught:
        FileHeads(path).recall(KEY, NAME)
    assert caught.value.code == "heads_unavailable"


def test_a_link_in_a_files_place_is_not_followed(folder: Path, tmp_path: Path) -> None:
    heads = FileHeads(folder)
    heads.remember(FIRST)
    path = only_file(folder)
    path.rename(tmp_path / "elsewhere")
    path.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(HeadError) as caught:
        heads.recall(KEY, NAME)
    assert caught.value.code == "heads_unavailable"


def test_a_write_that_fails_leaves_what_was(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    heads = FileHeads(folder)
    heads.remember(FIRST)

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(HeadError) as caught:
            heads.remember(SECOND)
    assert caught.value.code == "heads_unavailable"
    assert only_file(folder).name.endswith(".json")
    assert heads.recall(KEY, NAME) == FIRST.head


PROCESS = """
import sys
from pathlib import Path
from attestation.release_heads import FileHeads
from attestation.release_signing import PublicKey, ReleaseError
from attestation.releases import ReleaseHistory
folder, file, key, name = sys.argv[1:]
lines = Path(file).read_bytes().splitlines(keepends=True)
histories = [
    ReleaseHistory.verify(b"".join(lines[:count]), key=PublicKey.parse(key), name=name, minimum_sequence=1, head=None)
    for count in range(1, len(lines) + 1)
]
heads = FileHeads(Path(folder))
print("ready", flush=True)
sys.stdin.readline()
seen = 0
for history in histories:
    try:
        heads.remember(history)
    except ReleaseError as error:
        assert error.code == "rolled_back", error
    head = heads.recall(history.key, name)
    assert head.sequence >= max(seen, history.head.sequence), "a head went back"
    history = histories[head.sequence - 1]
    assert history.head == head
    seen = head.sequence
"""


def test_two_processes_remember_at_once(folder: Path, tmp_path: Path) -> None:
    data = history_of(*([ONE], [TWO]) * 10)
    file = tmp_path / "releases.jsonl"
    file.write_bytes(data)
    command = [sys.executable, "-c", PROCESS, str(folder), str(file), str(KEY), NAME]
    processes = [
        subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        for _ in range(2)
    ]
    for process in processes:
        assert process.stdout is not None
        assert process.stdout.readline() == b"ready\n"
    for process in processes:
        assert process.stdin is not None
        process.stdin.write(b"go\n")
        process.stdin.flush()
    for process in processes:
        _, said = process.communicate()
        assert process.returncode == 0, said.decode()
    assert FileHeads(folder).recall(KEY, NAME) == verified(data).head
    assert only_file(folder).name.endswith(".json")
