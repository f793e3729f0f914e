"""What a parent installs is what its extra asks for, at the versions that are tested."""

from __future__ import annotations

import re
import tomllib
from collections.abc import Mapping

import pytest

from tests.nitro_hosts import REPOSITORY

EXTRA = re.compile(r"strongroom\[([a-z,]+)\]")
NAME = re.compile(r"[A-Za-z0-9_.-]+")


def entries(lock: str) -> Mapping[str, str]:
    """Each pinned package with its hashes, by name."""
    text = (REPOSITORY / "requirements" / lock).read_text()
    parts = re.split(r"^(?=[a-z0-9][a-z0-9._-]*==)", text, flags=re.MULTILINE)[1:]
    return {part.partition("==")[0]: part.rstrip() for part in parts}


def of_extra(extra: str) -> set[str]:
    """The names that an extra of pyproject.toml asks for, those of the extras in it included."""
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]
    found: set[str] = set()
    for asked in project["optional-dependencies"][extra]:
        if match := EXTRA.match(asked):
            for other in match[1].split(","):
                found |= of_extra(other)
        else:
            name = NAME.match(asked)
            assert name is not None
            found.add(name[0])
    return found


@pytest.fixture(scope="module")
def direct() -> set[str]:
    lines = (REPOSITORY / "requirements/parent.in").read_text().splitlines()
    return {line for line in lines if line and not line.startswith(("#", "-"))}


def test_it_asks_for_the_extra_and_for_what_verification_needs(direct: set[str]) -> None:
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]
    base = {match[0] for each in project["dependencies"] if (match := NAME.match(each))}
    assert direct == base | of_extra("parent")


def test_every_version_is_one_that_is_tested(direct: set[str]) -> None:
    tested, pinned = entries("all.txt"), entries("parent.txt")
    assert direct <= pinned.keys()
    assert pinned.items() <= tested.items()
    assert all("--hash=sha256:" in entry for entry in pinned.values())


def test_the_locks_are_renewed_together() -> None:
    assert "parent.in -o parent.txt" in (REPOSITORY / "requirements/lock.sh").read_text()
