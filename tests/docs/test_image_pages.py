"""The operator's and the auditor's page: every command on them is there, with its options."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import click
import pytest

from strongroom import cli

ROOT = Path(__file__).resolve().parents[2]
PAGES = ("docs/memory.md", "docs/nitro.md", "docs/reproduce.md")
DOORS = {
    "bootstrap-parent": "bootstrap",
    "build-eif": "build",
    "describe-enclaves": "describe",
    "launch-parent": "launch",
    "run-enclave": "run",
    "terminate-enclave": "terminate",
}
"""Scripts that hand over to a command of `strongroom nitro`."""


def command_lines() -> Iterator[list[str]]:
    for page in PAGES:
        for line in re.findall(r"^ {4}(\S.*)$", (ROOT / page).read_text(), re.MULTILINE):
            for part in re.split(r"(?:;|\s&&|\s&)(?:\s|$)", line.partition(" #")[0]):
                words = shlex.split(part.partition(" > ")[0])
                if words:
                    yield words[1:] if words[0] == "sudo" else words


def resolved(words: list[str]) -> click.Command:
    command: click.Command | None = cli.strongroom
    for word in words:
        if not isinstance(command, click.Group):
            break
        command = command.get_command(click.Context(command), word)
    assert command is not None, words
    return command


def options_of(words: list[str]) -> set[str]:
    own = words[: words.index("--")] if "--" in words else words
    return {word.partition("=")[0] for word in own if word.startswith("--")}


@pytest.mark.parametrize("words", list(command_lines()), ids=" ".join)
def test_a_command_of_the_pages_exists(words: list[str]) -> None:
    match words:
        case ["strongroom", *rest]:
            command = resolved(rest)
            known = {option for parameter in command.params for option in (*parameter.opts, *parameter.secondary_opts)}
            assert options_of(rest) <= known
        case [script, *rest] if script.startswith("scripts/"):
            assert (ROOT / script).is_file()
            door = DOORS.get(Path(script).name)
            if door is not None:
                test_a_command_of_the_pages_exists(["strongroom", "nitro", door, *rest])
            else:
                help_text = (ROOT / script).read_text() + (ROOT / "scripts/machine/lib.sh").read_text()
                assert all(option in help_text for option in options_of(rest))
        case ["make", target]:
            assert re.search(rf"^{target}:", (ROOT / "Makefile").read_text(), re.MULTILINE)
        case _:
            assert words[0].startswith(("MODEL=", "cp", ".")), words


def test_there_are_commands() -> None:
    assert len(list(command_lines())) > 30
