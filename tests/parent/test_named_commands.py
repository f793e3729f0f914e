"""Every command that a text of the parent's room tells somebody to run is there, with the option that it names."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import click
import pytest

import parent
from strongroom.cli import strongroom

NAMED = re.compile(r"(?:`|sudo |run )strongroom ([a-z][a-z -]*[a-z])")


def named_commands() -> Iterator[tuple[str, str]]:
    """Module and words of each, from the texts in its source: docstrings are help texts as well."""
    for path in sorted(Path(parent.__file__).parent.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                for words in NAMED.findall(" ".join(node.value.split())):
                    yield path.name, words


@pytest.mark.parametrize("words", sorted({words for _, words in named_commands()}))
def test_a_command_that_is_named_is_there(words: str) -> None:
    command: click.Command = strongroom
    names, *options = re.split(r" (?=--)", words)
    for name in names.split():
        if not isinstance(command, click.Group):
            break  # an argument, or what the text goes on with
        found = command.get_command(click.Context(command), name)
        assert found is not None, f"strongroom {words}: no {name}"
        command = found
    known = {option for parameter in command.params for option in (*parameter.opts, *parameter.secondary_opts)}
    for option in options:
        assert option.split()[0] in {*known, "--help"}, f"strongroom {words}"


def test_the_doctor_names_some() -> None:
    assert {("nitro.py", "nitro launch"), ("nitro.py", "nitro bootstrap")} <= set(named_commands())
