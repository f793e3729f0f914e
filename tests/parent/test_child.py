"""What the processes of an enclave say: bounded in the log, and never read as a whole."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
from pathlib import Path

import pytest

from parent.launch import child as module
from parent.launch.child import BoundedLog, child, last_words
from parent.registry import Instance, Registry


@pytest.fixture
def instance(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Instance:
    monkeypatch.setenv("STRONGROOM_HOME", str(tmp_path))
    return Registry.of_user().create("t")


@pytest.mark.parametrize(
    ("log", "shown"),
    [
        (b"", ""),
        (b"  the end\n", "the end"),
        (b"x" * 4095 + "\u20ac end".encode(), "x" * 495 + "\u20ac end"),
        (b"\xff" * 5000, "\ufffd" * 500),
    ],
)
def test_the_last_words_are_the_end_of_the_log(instance: Instance, log: bytes, shown: str) -> None:
    instance.log.write_bytes(log)
    assert last_words(instance) == shown


def test_nobody_has_said_anything(instance: Instance) -> None:
    assert last_words(instance) == ""


def test_a_large_log_is_not_read(instance: Instance) -> None:
    with instance.log.open("wb") as log:
        log.truncate(1 << 40)
        log.seek(0, os.SEEK_END)
        log.write(b"\nthe end")
    assert last_words(instance).endswith("the end")


async def say(instance: Instance, text: str) -> int | None:
    program = [sys.executable, "-I", "-c", f"import sys; sys.stderr.write({text})"]
    async with BoundedLog(instance) as said, child(instance, program, stderr=subprocess.PIPE) as process:
        said.record(process.stderr)
        return await process.wait()


async def test_what_a_guest_makes_a_process_say_is_bounded(instance: Instance, monkeypatch: pytest.MonkeyPatch) -> None:
    """And the process goes on: what is too much is read."""
    monkeypatch.setattr(module, "MAX_SAID", 1000)
    assert await say(instance, "'a' * 400") == 0
    assert instance.log.read_text() == "a" * 400
    assert await say(instance, "'b' * 10_000_000") == 0
    note = "\nstrongroom: a process said more than is kept\n"
    assert instance.log.read_text() == "a" * 400 + "b" * 1000 + note
    assert last_words(instance).endswith(note.strip())


async def test_a_log_that_cannot_be_written_stops_nobody(instance: Instance) -> None:
    stream = asyncio.StreamReader()
    stream.feed_data(b"said\n")
    stream.feed_eof()
    async with BoundedLog(instance) as said:
        instance.log.mkdir()
        said.record(stream)
        await said.ended()
    assert stream.at_eof()
