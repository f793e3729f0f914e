"""Every code of a real parent is told, in the class and on the page, with its exit code."""

from __future__ import annotations

import re

import parent.nitro.errors
from parent.nitro.ec2 import Ec2Error
from parent.nitro.errors import EXIT_CODES, NitroError
from tests.nitro_hosts import REPOSITORY

PAGE = (REPOSITORY / "docs/codes.md").read_text().partition("## A real parent\n")[2].partition("\n## ")[0]
CODE = re.compile(r"NitroError\(\s*\"([a-z_]+)\"")
TABLES = [*parent.nitro.errors._ADVICE.values(), *((code, words) for _, code, words in parent.nitro.errors._REFUSALS)]


def codes() -> set[str]:
    files = [*(REPOSITORY / "parent/nitro").glob("*.py"), REPOSITORY / "parent/launch/nitro.py"]
    return {code for path in files for code in CODE.findall(path.read_text())} | {code for code, _ in TABLES}


def told(text: str) -> set[str]:
    return set(re.findall(r"`{1,2}([a-z0-9]+_[a-z0-9_]+)`{1,2}", text))


def test_the_class_names_every_code_and_no_other() -> None:
    assert told(NitroError.__doc__ or "") == codes()


def test_the_page_names_every_code_and_no_other() -> None:
    assert told(PAGE) == codes() | told(Ec2Error.__doc__ or "")


def test_the_page_has_the_exit_codes() -> None:
    assert EXIT_CODES.keys() <= codes()
    for code in codes():
        said = re.search(rf"`{code}`(?: \(([23])\b)?", PAGE)
        assert said is not None
        assert int(said[1] or 4) == NitroError(code, "").exit_code, code
