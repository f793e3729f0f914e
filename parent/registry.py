"""The enclaves that this user started here: a private folder for each, with its sockets, its events and its state.

Nothing in it is secret and nothing in it is believed: it is the operator's notebook.
"""

from __future__ import annotations

import fcntl
import json
import os
import re
import shutil
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path

from attestation.errors import StrongroomError
from vsockrpc.address import UNIX_PATH_LIMIT

NAME = re.compile(r"[a-z0-9][a-z0-9-]{0,30}")
LONGEST_SOCKET = "models.sock"
"""Of the names of all launchers: an emulated machine's are shorter (``vm_5006``)."""
ENDED = ("STOPPED", "FAILED", "DIED")
"""Phases with no supervisor behind them. ``DIED`` is never written: it is what a reader sees of one that is gone."""
LOCK_PAUSES = (0.01, 0.02, 0.04, 0.08)
"""Seconds: someone who only looks whether the lock is held holds it for a moment."""


class RegistryError(StrongroomError):
    """No such enclave, or one that cannot be made."""

    exit_code = 2


def state_home() -> Path:
    """``$STRONGROOM_HOME``, or the state folder of the XDG base directory specification."""
    if home := os.environ.get("STRONGROOM_HOME"):
        return Path(home)
    base = os.environ.get("XDG_STATE_HOME")
    return (Path(base) if base else Path.home() / ".local" / "state") / "strongroom"


@dataclass(slots=True)
class State:
    """What the supervisor says of an enclave; it is the only writer."""

    name: str
    launcher: str
    pid: int
    phase: str
    address: str
    started_at: float
    restarts: int = 0
    network: str = "unknown"
    pcrs: dict[str, str] = field(default_factory=dict)
    model: str = ""
    error: dict[str, str | None] | None = None


@dataclass(frozen=True, slots=True)
class Instance:
    """One enclave's folder."""

    directory: Path

    @property
    def name(self) -> str:
        return self.directory.name

    @property
    def configuration(self) -> Path:
        return self.directory / "enclave.toml"

    @property
    def events(self) -> Path:
        return self.directory / "events.jsonl"

    @property
    def log(self) -> Path:
        return self.directory / "supervisor.log"

    @property
    def _state(self) -> Path:
        return self.directory / "state.json"

    def write_state(self, state: State) -> None:
        temporary = self._state.with_suffix(".new")
        temporary.write_text(json.dumps(asdict(state), indent=1))
        temporary.replace(self._state)

    def read_state(self) -> State | None:
        """The state last written, with phase ``DIED`` when the supervisor that wrote it is gone without saying so."""
        state = self._written_state()
        if state is not None and state.phase not in ENDED and not self.supervised():
            state = self._written_state()  # what it said last, if it ended just now
            if state is not None and state.phase not in ENDED:
                state.phase = "DIED"
        return state

    def _written_state(self) -> State | None:
        try:
            return State(**json.loads(self._state.read_text()))
        except (FileNotFoundError, ValueError, TypeError):
            return None

    def supervised(self) -> bool:
        """Whether a supervisor holds this folder's lock."""
        try:
            descriptor = os.open(self.directory / "lock", os.O_RDWR)
        except FileNotFoundError:
            return False
        try:
            fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)  # shared: two who look do not see each other
        except BlockingIOError:
            return True
        finally:
            os.close(descriptor)
        return False

    def lock(self) -> int:
        """Takes the folder for this process's lifetime. Raises RegistryError ``already_running``."""
        descriptor = os.open(self.directory / "lock", os.O_RDWR | os.O_CREAT, 0o600)
        for pause in (*LOCK_PAUSES, None):
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                if pause is not None:
                    time.sleep(pause)
            else:
                return descriptor
        os.close(descriptor)
        raise RegistryError("already_running", f"an enclave named {self.name} is running", got=self.name)

    def remove(self) -> None:
        shutil.rmtree(self.directory, ignore_errors=True)


@dataclass(frozen=True, slots=True)
class Registry:
    """All enclaves of this user on this host."""

    root: Path

    @classmethod
    def of_user(cls) -> Registry:
        return cls(state_home() / "run")

    def create(self, name: str) -> Instance:
        """A fresh folder. Raises RegistryError: ``bad_name``, ``already_running``, ``path_too_long``."""
        if not NAME.fullmatch(name):
            raise RegistryError("bad_name", "an enclave's name is short and plain", expected=NAME.pattern, got=name)
        instance = Instance(self.root / name)
        longest = str(instance.directory / LONGEST_SOCKET)
        if len(os.fsencode(longest)) > UNIX_PATH_LIMIT:
            raise RegistryError(
                "path_too_long",
                "the state folder's path is too long for Unix sockets: set STRONGROOM_HOME to a shorter one",
                expected=f"<= {UNIX_PATH_LIMIT} bytes",
                got=f"{len(os.fsencode(longest))} bytes: {longest}",
            )
        if instance.supervised():
            raise RegistryError("already_running", f"an enclave named {name} is running", got=name)
        instance.remove()
        instance.directory.mkdir(mode=0o700, parents=True)
        return instance

    def find(self, name: str) -> Instance:
        """Raises RegistryError ``unknown_enclave``."""
        instance = Instance(self.root / name)
        if not NAME.fullmatch(name) or not instance.directory.is_dir():
            known = ", ".join(each.name for each in self.all()) or "none"
            raise RegistryError("unknown_enclave", f"no enclave named {name}", expected=known, got=name)
        return instance

    def all(self) -> list[Instance]:
        if not self.root.is_dir():
            return []
        return [Instance(each) for each in sorted(self.root.iterdir()) if each.is_dir()]
