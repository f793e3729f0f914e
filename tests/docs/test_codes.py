"""docs/codes.md has every code that the verifier, the client's commands, the building of images, the launchers and an
enclave's boot can end with, and no other.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator, Mapping
from functools import cache
from importlib import import_module
from pathlib import Path

import pytest

from attestation.errors import StrongroomError

ROOT = Path(__file__).resolve().parents[2]
ROOMS = (
    *("attestation/**/*.py", "strongroom/**/*.py", "parent/image/*.py", "parent/launch/*.py", "parent/nitro/*.py"),
    *(f"parent/{name}.py" for name in ("cache", "config", "registry")),
    *(f"enclave/{name}.py" for name in ("__main__", "boot", "cpu", "model", "parent")),
)
FILES = sorted(path for room in ROOMS for path in ROOT.glob(room))
PAGE = (ROOT / "docs/codes.md").read_text()
PROTOCOL = (ROOT / "PROTOCOL.md").read_text()

CODED = "Remark", "_as_json"
"""What takes a code as its first argument and is no error."""
ELSEWHERE = "ApiError", "SealedError"
"""Whose codes are OpenAI's, and those of PROTOCOL.md section 7."""


@cache
def errors() -> frozenset[str]:
    """The names of all classes of errors, by what they inherit."""
    files = [*FILES, *ROOT.glob("vsockrpc/*.py")]
    bases = {
        node.name: {base.id for base in node.bases if isinstance(base, ast.Name)}
        for path in files
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.ClassDef)
    }
    found = {"StrongroomError"}
    while more := {name for name, of in bases.items() if of & found} - found:
        found |= more
    return frozenset(found - {*ELSEWHERE})


def constants(tree: ast.Module) -> dict[str, set[str]]:
    """Every text that a name may stand for, anywhere in the module."""
    found: dict[str, set[str]] = {}
    for node in ast.walk(tree):
        match node:
            case (
                ast.Assign(targets=[ast.Name(id=name)], value=value)
                | ast.AnnAssign(target=ast.Name(id=name), value=ast.expr() as value)
            ):
                found.setdefault(name, set()).update(texts(value, {}))
    return found


def texts(node: ast.expr, names: Mapping[str, set[str]]) -> Iterator[str]:
    """The texts that an expression may be: those that stand there, or that a name in it stands for."""
    match node:
        case ast.Constant(value=str(text)):
            yield text
        case ast.IfExp(body=one, orelse=other):
            yield from (*texts(one, names), *texts(other, names))
        case ast.Name(id=name):
            yield from names.get(name, ())
        case ast.JoinedStr(values=[ast.Constant(value=str(text)), *_]):
            yield text + "NAME"


@cache
def places_in(path: Path) -> Mapping[str, int]:
    """The functions of a module that take a code, and as which argument."""
    places = {}
    for node in ast.walk(ast.parse(path.read_text())):
        match node:
            case ast.FunctionDef(name=name, args=ast.arguments(args=arguments)):
                parameters = [argument.arg for argument in arguments if argument.arg not in ("self", "cls")]
                if "code" in parameters:
                    places[name] = parameters.index("code")
    return places


def places_of_imports(tree: ast.Module) -> Iterator[tuple[str, int]]:
    """The same of what a module takes from others of ours."""
    for node in ast.walk(tree):
        match node:
            case ast.ImportFrom(module=str(module), names=aliases):
                path = ROOT / f"{module.replace('.', '/')}.py"
                if path in FILES:
                    places = places_in(path)
                    names = [(alias.name, alias.asname or alias.name) for alias in aliases]
                    yield from ((here, places[there]) for there, here in names if there in places)


def codes_in(path: Path) -> Iterator[str]:
    """The codes that a module gives: to an error, to a remark, or to whatever has a parameter of that name."""
    tree = ast.parse(path.read_text())
    names = constants(tree)
    places = {**dict(places_of_imports(tree)), **places_in(path)}
    for node in ast.walk(tree):
        match node:
            case ast.Call(func=ast.Name(id=name) | ast.Attribute(attr=name), args=given, keywords=keywords):
                place = 0 if name in errors() or name in CODED else places.get(name)
                if isinstance(node.func, ast.Attribute) and name == "__init__":
                    place = 0
                coded = [given[place]] if place is not None and place < len(given) else []
                coded += [keyword.value for keyword in keywords if keyword.arg == "code"]
                yield from (text for each in coded for text in texts(each, names))


@cache
def codes() -> Mapping[str, str]:
    """Each code with a file that gives it."""
    found = {}
    for path in FILES:
        for code in codes_in(path):
            if re.fullmatch(r"[a-z0-9_]+(?:NAME)?", code):
                found[code] = str(path.relative_to(ROOT))
    return found


def test_the_reading_of_code_finds_what_is_known() -> None:
    known = {"stale", "wrong_pcr", "malformed_bundle", "unreadable_manifest", "unreadable_policy", "missing_extra"}
    known |= {"qemu_refused", "no_heartbeat", "image_changed", "hugepages_missing", "unknown_enclave"}
    known |= {"register_in_use", "not_enough_memory", "store_failed", "cpu_lacks_features", "image_cut_off"}
    assert known <= codes().keys()


def test_every_code_is_told() -> None:
    told = {*re.findall(r"`(\w+)`", PAGE + PROTOCOL)}
    assert {code: path for code, path in codes().items() if code not in told} == {}


def test_no_other_code_is_told() -> None:
    told = {code for line in PAGE.splitlines() if line.startswith("| `") for code in re.findall(r"`(\w+)`", cell(line))}
    assert told - codes().keys() == set()


def cell(line: str) -> str:
    return line.split("|")[1]


@pytest.mark.parametrize(("name", "code"), re.findall(r"^`(\w+)`, exit code (\d)", PAGE, re.MULTILINE))
def test_exit_codes_are_those_of_the_classes(name: str, code: str) -> None:
    (path,) = (path for path in FILES if re.search(rf"^class {name}\(", path.read_text(), re.MULTILINE))
    error = getattr(import_module(".".join(path.relative_to(ROOT).with_suffix("").parts)), name)
    assert issubclass(error, StrongroomError)
    assert error.exit_code == int(code)
