"""The operator's notebook: folders, their states and their locks."""

from __future__ import annotations

import fcntl
import json
import os
import signal
import stat
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from parent.registry import LONGEST_SOCKET, Instance, Registry, RegistryError, State, state_home
from vsockrpc.address import UNIX_PATH_LIMIT

STATE = State("demo", "process", 1, "SERVING", "unix:/x/rpc.sock", 1.5, pcrs={"0": "00"}, model="tiny sha384:00")


@pytest.fixture
def registry() -> Iterator[Registry]:
    """In a folder with a short name: sockets stand in it, and the longest name of an enclave must have room."""
    with tempfile.TemporaryDirectory(prefix="sr-") as folder:
        yield Registry(Path(folder))


@pytest.fixture
def held(registry: Registry) -> Iterator[Instance]:
    """A folder whose supervisor is at work, as far as others can see: this process holds its lock."""
    instance = registry.create("demo")
    lock = instance.lock()
    yield instance
    os.close(lock)


def code_of(error: pytest.ExceptionInfo[RegistryError]) -> str:
    assert error.value.exit_code == 2
    return error.value.code


# --- Names and folders --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["a", "0", "demo", "a-b-9", "a" * 31])
def test_a_name_that_is_short_and_plain(registry: Registry, name: str) -> None:
    instance = registry.create(name)
    assert instance.name == name
    assert registry.find(name) == instance
    assert stat.S_IMODE(instance.directory.stat().st_mode) == 0o700


@pytest.mark.parametrize(
    "name", ["", "-a", "A", "ä", "a" * 32, "a b", "a/b", "../a", ".", "..", "a\n", "a.b", "a\x00", "a_b"]
)
def test_a_name_that_is_not(registry: Registry, name: str) -> None:
    with pytest.raises(RegistryError) as caught:
        registry.create(name)
    assert code_of(caught) == "bad_name"
    with pytest.raises(RegistryError) as caught:
        registry.find(name)
    assert code_of(caught) == "unknown_enclave"
    assert registry.all() == []


def test_a_path_too_long_for_sockets_is_said_before_anything_is_made(tmp_path: Path) -> None:
    def registry_with(length: int) -> Registry:
        """One whose longest socket's path has so many bytes."""
        rest = length - len(os.fsencode(tmp_path / "d" / LONGEST_SOCKET)) - 1
        return Registry(tmp_path / ("x" * rest))

    assert registry_with(UNIX_PATH_LIMIT).create("d")
    longer = registry_with(UNIX_PATH_LIMIT + 1)
    with pytest.raises(RegistryError) as caught:
        longer.create("d")
    assert code_of(caught) == "path_too_long"
    assert "STRONGROOM_HOME" in caught.value.message
    assert not longer.root.exists()


def test_a_name_used_again_begins_with_an_empty_folder(registry: Registry) -> None:
    first = registry.create("demo")
    first.write_state(STATE)
    first.events.write_text("old")
    again = registry.create("demo")
    assert list(again.directory.iterdir()) == []


def test_all_are_listed_by_name_and_files_are_not(registry: Registry, tmp_path: Path) -> None:
    assert Registry(tmp_path / "nothing").all() == []
    for name in ("b", "a"):
        registry.create(name)
    (tmp_path / "file").touch()
    assert [instance.name for instance in registry.all()] == ["a", "b"]


def test_who_looks_for_an_unknown_one_is_told_which_there_are(registry: Registry) -> None:
    registry.create("demo")
    with pytest.raises(RegistryError) as caught:
        registry.find("demi")
    assert (caught.value.code, caught.value.expected, caught.value.got) == ("unknown_enclave", "demo", "demi")


def test_removing_twice_is_removing(registry: Registry) -> None:
    instance = registry.create("demo")
    instance.remove()
    instance.remove()
    assert registry.all() == []


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({"STRONGROOM_HOME": "/s", "XDG_STATE_HOME": "/x", "HOME": "/h"}, "/s"),
        ({"XDG_STATE_HOME": "/x", "HOME": "/h"}, "/x/strongroom"),
        ({"HOME": "/h"}, "/h/.local/state/strongroom"),
        ({"STRONGROOM_HOME": "", "XDG_STATE_HOME": "", "HOME": "/h"}, "/h/.local/state/strongroom"),
    ],
)
def test_where_the_state_is_kept(monkeypatch: pytest.MonkeyPatch, environment: dict[str, str], expected: str) -> None:
    for name in ("STRONGROOM_HOME", "XDG_STATE_HOME", "HOME"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert state_home() == Path(expected)
    assert Registry.of_user().root == Path(expected) / "run"


# --- States -------------------------------------------------------------------------------------------------------


def test_a_state_is_read_as_it_was_written(held: Instance) -> None:
    state = replace(STATE, error={"code": "x", "message": "y", "expected": None, "got": None})
    held.write_state(state)
    assert held.read_state() == state


def test_a_state_is_replaced_whole(held: Instance) -> None:
    """Who reads while another writes sees the one or the other."""
    held.write_state(STATE)
    with (held.directory / "state.json").open() as before:
        held.write_state(replace(STATE, phase="STOPPED"))
        assert json.load(before)["phase"] == "SERVING"
    assert [path.name for path in held.directory.iterdir() if path.name.startswith("state")] == ["state.json"]


@pytest.mark.parametrize(
    "content", [b"", b"{", b"[]", b"null", b"{}", b'{"name": 1}', b'{"unknown": 1}', b"\xff\xfe", b"9" * 5000]
)
def test_a_state_that_cannot_be_read_is_none(held: Instance, content: bytes) -> None:
    (held.directory / "state.json").write_bytes(content)
    assert held.read_state() is None


def test_no_state_is_none(registry: Registry) -> None:
    assert registry.create("demo").read_state() is None


@pytest.mark.parametrize("phase", ["MEASURING", "STARTING", "ENTROPY", "SERVING", "HALTED", "RESTARTING"])
def test_a_supervisor_that_is_gone_without_a_word_has_died(registry: Registry, phase: str) -> None:
    instance = registry.create("demo")
    instance.write_state(replace(STATE, phase=phase))
    state = instance.read_state()
    assert state is not None
    assert state.phase == "DIED"


@pytest.mark.parametrize("phase", ["STOPPED", "FAILED"])
def test_one_that_said_how_it_ended_has_not(registry: Registry, phase: str) -> None:
    instance = registry.create("demo")
    instance.write_state(replace(STATE, phase=phase))
    assert instance.read_state() == replace(STATE, phase=phase)


def test_one_that_ends_while_somebody_looks_has_not_died(registry: Registry, monkeypatch: pytest.MonkeyPatch) -> None:
    """Between the reading of its state and the look at its lock it stops, and says so."""
    instance = registry.create("demo")
    instance.write_state(STATE)

    def supervised(self: Instance) -> bool:
        self.write_state(replace(STATE, phase="STOPPED"))
        return False

    monkeypatch.setattr(Instance, "supervised", supervised)
    assert instance.read_state() == replace(STATE, phase="STOPPED")


# --- Locks --------------------------------------------------------------------------------------------------------


def test_a_folder_is_one_supervisors(held: Instance, registry: Registry) -> None:
    assert held.supervised()
    with pytest.raises(RegistryError) as caught:
        held.lock()
    assert code_of(caught) == "already_running"
    with pytest.raises(RegistryError) as caught:
        registry.create("demo")
    assert code_of(caught) == "already_running"
    assert held.directory.is_dir()


def test_a_lock_ends_with_its_descriptor(registry: Registry) -> None:
    instance = registry.create("demo")
    assert not instance.supervised()
    os.close(instance.lock())
    assert not instance.supervised()
    os.close(instance.lock())


def test_a_refused_lock_leaves_nothing_open(held: Instance) -> None:
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(3):
        with pytest.raises(RegistryError):
            held.lock()
        assert held.supervised()
    assert len(os.listdir("/proc/self/fd")) == before


def test_a_lock_ends_with_its_process(registry: Registry) -> None:
    instance = registry.create("demo")
    program = (
        "import sys; from pathlib import Path; from parent.registry import Instance\n"
        "lock = Instance(Path(sys.argv[1])).lock(); print('held', flush=True); sys.stdin.read()"
    )
    command = [sys.executable, "-c", program, str(instance.directory)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "held\n"
        assert instance.supervised()
        process.send_signal(signal.SIGKILL)
    assert not instance.supervised()


def test_those_who_look_do_not_take_each_other_for_a_supervisor(registry: Registry) -> None:
    instance = registry.create("demo")
    (instance.directory / "lock").touch()
    with (instance.directory / "lock").open() as other:
        fcntl.flock(other, fcntl.LOCK_SH)
        assert not instance.supervised()


def test_a_supervisor_starts_while_somebody_looks(registry: Registry, monkeypatch: pytest.MonkeyPatch) -> None:
    instance = registry.create("demo")
    (instance.directory / "lock").touch()
    with (instance.directory / "lock").open() as other:
        fcntl.flock(other, fcntl.LOCK_SH)
        monkeypatch.setattr("time.sleep", lambda seconds: fcntl.flock(other, fcntl.LOCK_UN))
        os.close(instance.lock())
