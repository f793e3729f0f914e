"""What an enclave may tell its supervisor, and what becomes of the rest."""

from __future__ import annotations

import asyncio
import json
import os
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from attestation.manifest import ModelManifest
from enclave.kms.errors import KMS_CODES
from enclave.log import Event, EventLog, Halted, KeyOffered, Phase, PhaseReached, Totals, WeightsReceived
from parent.events import MAX_LINE, PHASES, EventError, EventReader, parse_event
from parent.launch.process import MEMORY_SLACK, ProcessMachine
from parent.launch.supervisor import Launch, Supervisor
from parent.modelstore import ModelStore
from parent.registry import Registry
from strongroom.prepare import Settings, enclave_toml
from tests.gguf_files import tiny_model
from vsockrpc.transport import ConnectionLost, Fault

HALTED = {"event": "halted", "code": "c", "message": "m", "expected": None, "got": None}


def line(event: object) -> bytes:
    return json.dumps(event).encode()


# --- A line ------------------------------------------------------------------------------------------------------


async def test_every_event_of_an_enclave_is_one() -> None:
    log = EventLog()
    events: list[Event] = [
        *(PhaseReached(phase) for phase in Phase),
        Halted(Phase.COLD, "code", "message", "\u00e9", None),
        WeightsReceived(1, 2),
        KeyOffered("00"),
        Totals(),
        Totals(kms=dict.fromkeys(KMS_CODES, 10**9)),
    ]
    for event in events:
        log.write(event)
    log.close()
    async for text in log.follow():
        assert parse_event(text.encode()) == json.loads(text)


def test_the_phases_are_the_enclaves() -> None:
    assert set(Phase) == PHASES


def test_unknown_events_pass() -> None:
    assert parse_event(b'{"event":"new","x":[1]}') == {"event": "new", "x": [1]}


@pytest.mark.parametrize(
    "bad",
    [
        b"",
        b"nope",
        b"[]",
        b"{}",
        b"1" * 5000,
        b"[" * MAX_LINE,
        b'{"event": 1}',
        b'{"event": "x", "text": "\x9b"}',
        '{"event": "x", "text": "\u009b"}'.encode(),
        b'{"event": "x", "text": "\x7f"}',
        b'{"event": "x"}\r',
        line({"event": "halted"}),
        line(HALTED | {"code": None}),
        line(HALTED | {"got": 1}),
        line({"event": "phase"}),
        line({"event": "phase", "phase": []}),
        line({"event": "phase", "phase": "STOPPED"}),
        line({"event": "weights", "received": 1}),
        line({"event": "weights", "received": -1, "total": 1}),
        line({"event": "weights", "received": 1, "total": 10**400}),
        line({"event": "weights", "received": 1, "total": float("inf")}),
        line({"event": "x", "text": "x" * MAX_LINE}),
    ],
    ids=repr,
)
def test_a_line_that_is_no_event(bad: bytes) -> None:
    with pytest.raises(EventError) as caught:
        parse_event(bad)
    assert caught.value.code == "bad_event"
    assert len(str(caught.value)) < 500
    assert str(caught.value).isprintable()


def test_the_longest_line() -> None:
    longest = line({"event": "x", "text": ""}).replace(b'""', b'"' + b"x" * (MAX_LINE - 26) + b'"')
    assert len(longest) == MAX_LINE
    assert parse_event(longest)["event"] == "x"
    with pytest.raises(EventError):
        parse_event(longest.replace(b"x", b"xx", 1))


@given(st.lists(st.integers(0, 1000), max_size=5), st.integers(1, 40))
def test_lines_arrive_in_any_pieces(numbers: list[int], size: int) -> None:
    stream = b"".join(line({"event": "n", "number": number}) + b"\n" for number in numbers)
    reader = EventReader()
    pieces = [stream[start : start + size] for start in range(0, len(stream), size)]
    assert [event["number"] for piece in pieces for _, event in reader.feed(memoryview(piece))] == numbers


def test_a_line_that_never_ends_is_not_collected() -> None:
    reader = EventReader()
    assert list(reader.feed(b"x" * MAX_LINE)) == []
    with pytest.raises(EventError, match="too long"):
        list(reader.feed(b"x"))


# --- The supervisor ----------------------------------------------------------------------------------------------


@pytest.fixture
def launch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Launch:
    monkeypatch.setenv("STRONGROOM_HOME", str(tmp_path))
    model = tmp_path / "tiny.gguf"
    model.write_bytes(tiny_model().encode())
    manifest = ModelManifest.from_gguf(model)
    instance = Registry(Path(os.path.relpath(tmp_path / "run"))).create("t")
    instance.configuration.write_text(enclave_toml(manifest, Settings(context=64, threads=1)))
    return Launch(instance, ProcessMachine(instance, memory=MEMORY_SLACK), ModelStore(manifest, model))


def supervisor(launch: Launch, told: list[Any]) -> Supervisor:
    return Supervisor(launch, on_change=lambda state: told.append(state.phase), on_event=told.append)


async def pieces(*lines: bytes) -> AsyncIterator[bytes]:
    for each in lines:
        yield each + b"\n"


async def test_events_are_told_written_and_end_with_a_halt(launch: Launch) -> None:
    told: list[Any] = []
    phase = {"event": "phase", "phase": "ENTROPY"}
    halt = await supervisor(launch, told)._write_events(pieces(line(phase), line(HALTED), b"not looked at"))
    assert halt == {"code": "c", "message": "m", "expected": None, "got": None}
    assert told == [phase, "ENTROPY", HALTED]
    assert launch.instance.events.read_bytes() == line(phase) + b"\n" + line(HALTED) + b"\n"


@pytest.mark.parametrize("bad", [b"nope", b"[]", b"{}", b'{"event":"halted"}'])
async def test_a_line_that_is_no_event_is_a_death_with_its_reason_logged(launch: Launch, bad: bytes) -> None:
    told: list[Any] = []
    watching = supervisor(launch, told)
    following = asyncio.ensure_future(watching._write_events(pieces(line({"event": "x"}), bad)))
    await asyncio.wait([following])
    assert watching._end_of(following) is None
    assert "bad_event" in launch.instance.log.read_text()
    assert told == [{"event": "x"}]
    assert launch.instance.events.read_bytes() == line({"event": "x"}) + b"\n"


@pytest.mark.parametrize("death", [ConnectionLost("gone"), Fault("overloaded"), TimeoutError()])
async def test_a_death_has_its_reason_logged(launch: Launch, death: Exception) -> None:
    following: asyncio.Future[dict[str, str | None]] = asyncio.get_running_loop().create_future()
    following.set_exception(death)
    assert supervisor(launch, [])._end_of(following) is None
    assert str(death) in launch.instance.log.read_text()


@pytest.mark.parametrize("defect", [KeyError("phase"), OSError("what nobody foresaw")])
async def test_a_defect_of_the_supervisor_is_no_death(launch: Launch, defect: Exception) -> None:
    following: asyncio.Future[dict[str, str | None]] = asyncio.get_running_loop().create_future()
    following.set_exception(defect)
    with pytest.raises(type(defect)):
        supervisor(launch, [])._end_of(following)
    assert "Traceback" in launch.instance.log.read_text()


def test_a_halt_cannot_drive_a_terminal() -> None:
    halted = {"event": "halted", "code": "x", "message": "\x1b[2J", "expected": None, "got": None}
    assert parse_event(json.dumps(halted).encode())["message"] == "\\x1b[2J"
