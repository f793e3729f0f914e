"""Every public name of the verifier says what it is, every field what it holds, and every function what it raises.

What a function raises is read from the code: its own ``raise`` statements and those of the package's functions that it
calls, less what it catches. ValueError is a caller's mistake, and said where it is raised; TypeError is one that a type
checker reports.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import pytest

import attestation

Function = ast.FunctionDef | ast.AsyncFunctionDef
Place = tuple[str, str]
"""A module, and a name in it: ``function``, ``Class`` or ``Class.method``."""

FOLDER = Path(attestation.__file__).parent
FILES = {path.stem: path for path in FOLDER.glob("[!_]*.py")}
FILES |= {path.parent.name: path for path in FOLDER.glob("*/__init__.py")}
FILES |= {f"{path.parent.name}.{path.stem}": path for path in FOLDER.glob("*/[!_]*.py")}
MODULES = {module: ast.parse(path.read_text()) for module, path in FILES.items()}


@dataclass(frozen=True)
class Definition:
    """A function, or what runs when a class is constructed."""

    said: str
    bodies: tuple[Function, ...]
    owner: str | None


def _defined() -> Iterator[tuple[Place, Definition]]:
    for module, tree in MODULES.items():
        for node in tree.body:
            if isinstance(node, Function):
                yield (module, node.name), Definition(ast.get_docstring(node) or "", (node,), None)
            elif isinstance(node, ast.ClassDef):
                methods = [each for each in node.body if isinstance(each, Function)]
                making = tuple(each for each in methods if each.name in ("__init__", "__post_init__"))
                said = " ".join(ast.get_docstring(each) or "" for each in (node, *making))
                yield (module, node.name), Definition(said, making, node.name)
                for each in methods:
                    said = f"{ast.get_docstring(node)} {ast.get_docstring(each)}"
                    yield (module, f"{node.name}.{each.name}"), Definition(said, (each,), node.name)


DEFINED = dict(_defined())


@cache
def _imported(module: str) -> dict[str, Place]:
    """What a name of ``module`` stands for: a place of another module, or with an empty name that module itself."""
    found: dict[str, Place] = {}
    for node in ast.walk(MODULES[module]):
        if isinstance(node, ast.ImportFrom) and node.module is not None and node.module.startswith("attestation"):
            for name in node.names:
                home = node.module.partition(".")[2]
                found[name.name] = (home, name.name) if home else (name.name, "")
    return found


def _resolved(module: str, owner: str | None, called: ast.expr, instances: Mapping[str, str]) -> Place | None:
    """The definition that a call leads to, where it is one of this package. ``instances``: the class of a variable."""
    place: Place | None = None
    match called:
        case ast.Attribute(value=ast.Name(id=variable), attr=name) if variable in instances:
            home, top = _imported(module).get(instances[variable], (module, instances[variable]))
            place = (home, f"{top}.{name}")
        case ast.Name(id=name):
            place = _imported(module).get(name, (module, name))
        case ast.Attribute(value=ast.Name(id="self" | "cls"), attr=name):
            place = (module, f"{owner}.{name}")
        case ast.Attribute(value=ast.Name(id=base), attr=name):
            home, top = _imported(module).get(base, (module, base))
            place = (home, f"{top}.{name}" if top else name)
    return place if place in DEFINED else None


def _caught(node: ast.Try) -> set[str]:
    types = [handler.type for handler in node.handlers if handler.type is not None]
    return {name.id for each in types for name in ast.walk(each) if isinstance(name, ast.Name)}


def _instances(function: Function) -> dict[str, str]:
    """Variables that are assigned what a class of the package makes: ``x = Class(...)``, ``x = Class.method(...)``; and
    what is given as one, ``x: Class``.
    """
    found = {}
    for node in ast.walk(function):
        match node:
            case ast.arg(arg=argument, annotation=ast.Name(id=kind)):
                found[argument] = kind
            case ast.Assign(
                targets=[ast.Name(id=variable)],
                value=ast.Call(func=ast.Name(id=made) | ast.Attribute(value=ast.Name(id=made))),
            ) if made.lstrip("_")[:1].isupper():
                found[variable] = made
    return found


_RULED_OUT = {("keyrelease", "_Judgement.key"): {"KeyPolicyError"}}
"""What cannot happen, as the caller gives nothing that would be refused: what a policy's keys are held to has every
register that the linter wants (``tests/attestation/test_keyrelease.py::test_what_a_key_is_held_to_is_pinned``).
"""


def _raised_in(place: Place, definition: Definition, seen: frozenset[Place]) -> set[str]:
    module, found = place[0], set[str]()
    instances: dict[str, str] = {}

    def visit(node: ast.AST, caught: frozenset[str]) -> None:
        errors: set[str] = set()
        match node:
            case ast.Try(body=body):
                for each in body:
                    visit(each, caught | _caught(node))
                for outside in (*node.handlers, *node.orelse, *node.finalbody):
                    visit(outside, caught)
                return
            case ast.Raise(exc=ast.Call(func=ast.Name(id=name))) if name.lstrip("_")[:1].isupper():
                errors = {name}
            case ast.Raise(exc=ast.Name(id=name)) if name in instances:
                errors = {instances[name]}
            case ast.Raise(exc=ast.Call(func=called)) if factory := _resolved(
                module, definition.owner, called, instances
            ):
                returns = DEFINED[factory].bodies[0].returns
                errors = {returns.id} if isinstance(returns, ast.Name) else set()
            case ast.Call(func=called) if callee := _resolved(module, definition.owner, called, instances):
                errors = raised(callee, seen) - {"ValueError"}
        found.update(errors - caught - _RULED_OUT.get(place, set()))
        for child in ast.iter_child_nodes(node):
            visit(child, caught)

    for body in definition.bodies:
        instances = _instances(body)
        for statement in body.body:
            visit(statement, frozenset())
    return found


def raised(place: Place, seen: frozenset[Place] = frozenset()) -> set[str]:
    """The names of the errors that leave a function, or a class's construction."""
    return set() if place in seen else _raised_in(place, DEFINED[place], seen | {place})


def _is_public(place: Place) -> bool:
    return not any(part.startswith("_") for part in place[1].split("."))


@pytest.mark.parametrize("name", attestation.__all__)
def test_every_public_name_says_what_it_is(name: str) -> None:
    (home,) = (module for module, tree in MODULES.items() if name in _said(tree))
    assert len(_said(MODULES[home])[name]) > 20


def _named(name: str) -> Iterator[str]:
    """The names in the public signatures and fields of a class or function."""
    every: list[ast.expr | None]
    found = [node for tree in MODULES.values() for node in tree.body if getattr(node, "name", None) == name]
    for each in (part for node in found for part in (node.body if isinstance(node, ast.ClassDef) else [node])):
        match each:
            case ast.FunctionDef(name=method, args=arguments, returns=returns) if not method.startswith("_"):
                every = [*(argument.annotation for argument in (*arguments.args, *arguments.kwonlyargs)), returns]
            case ast.AnnAssign(target=ast.Name(id=field), annotation=kind) if _is_field(field, kind):
                every = [kind]
            case _:
                continue
        yield from (part.id for kind in every if kind for part in ast.walk(kind) if isinstance(part, ast.Name))


_OF_THEIR_OWN = {"Entry", "Grant", "KeyMetadata", "KeyPolicy", "Progress", "ReleaseStatement", "Value"}
"""What modules give out that are not the verifier's own: histories for publishers, what KMS says of a key, files,
decoded CBOR.
"""


@pytest.mark.parametrize("name", attestation.__all__)
def test_what_a_public_signature_names_is_public_too(name: str) -> None:
    homes = {each for tree in MODULES.values() for each in _said(tree) if not each.startswith("_")}
    assert {*_named(name)} & homes - set(attestation.__all__) - _OF_THEIR_OWN == set()


def _said(tree: ast.Module) -> dict[str, str]:
    """What stands with each top-level name: its docstring, or the text behind a constant."""
    said: dict[str, str] = {}
    for node, behind in zip(tree.body, [*tree.body[1:], ast.Pass()], strict=True):
        match node, behind:
            case (ast.ClassDef() | ast.FunctionDef(), _):
                said[node.name] = ast.get_docstring(node) or ""
            case (
                ast.Assign(targets=[ast.Name(id=name)]) | ast.AnnAssign(target=ast.Name(id=name)),
                ast.Expr(value=ast.Constant(value=str(text))),
            ):
                said[name] = text
    return said


def _fields() -> Iterator[tuple[Place, str, str]]:
    """The fields of public dataclasses and tuples: place, type, and what is said of each: behind it, in the docstring
    of its class where that names it, or behind a field before it in whose text it is named.
    """
    for module, tree in MODULES.items():
        for node in tree.body:
            if not isinstance(node, ast.ClassDef) or not _has_fields(node):
                continue
            texts, own = [ast.get_docstring(node) or ""], dict[str, str]()
            for statement, behind in zip(node.body, [*node.body[1:], ast.Pass()], strict=True):
                match statement, behind:
                    case ast.AnnAssign(target=ast.Name(id=name)), ast.Expr(value=ast.Constant(value=str(text))):
                        own[name] = text
                        texts.append(text)
            for statement in node.body:
                match statement:
                    case ast.AnnAssign(target=ast.Name(id=name), annotation=kind) if _is_field(name, kind):
                        said = [own[name]] if name in own else []
                        said += [text for text in texts if f"``{name}``" in text]
                        yield (module, f"{node.name}.{name}"), ast.unparse(kind), " ".join(said)


def _has_fields(node: ast.ClassDef) -> bool:
    decorators = [ast.unparse(each) for each in node.decorator_list]
    bases = [ast.unparse(each) for each in node.bases]
    is_public = not node.name.startswith("_") or node.name in ("_Proven", "_Appraised")  # what results inherit
    return is_public and (any(each.startswith("dataclass") for each in decorators) or "NamedTuple" in bases)


def _is_field(name: str, kind: ast.expr) -> bool:
    return not name.startswith("_") and not ast.unparse(kind).startswith(("InitVar", "ClassVar"))


FIELDS = [*_fields()]
UNIT = re.compile(
    r"\d|DER|SHA-384|UTC"
    r"|\b(?:[Bb]ytes|[Ss]econds|[Cc]haracters|[Ss]teps?|[Ee]ncod(?:ed|ing|es)|[Vv]ersions?|number of)\b"
    r"|\b(?:[Tt]okens|[Ee]lements|[Ss]equences)\b"
)
"""What says how large a number is, of what, or in which form octets stand there."""


@pytest.mark.parametrize(("place", "kind", "said"), FIELDS, ids=[".".join(place) for place, _, _ in FIELDS])
def test_every_field_says_what_it_holds_and_in_which_unit(place: Place, kind: str, said: str) -> None:
    assert said, f"{'.'.join(place)}: nothing is said of it"
    if re.search(r"\b(?:int|float|bytes)\b", kind):
        assert UNIT.search(said), f"{'.'.join(place)}: {kind}, of what, or in which bounds? It says: {said!r}"


@pytest.mark.parametrize("place", [*filter(_is_public, DEFINED)], ids=".".join)
def test_what_a_function_raises_stands_in_its_docstring(place: Place) -> None:
    said = DEFINED[place].said
    for other in re.findall(r"as\s+:(?:meth|func|class):`(\w+)`", said):
        owner = DEFINED[place].owner
        said += DEFINED[place[0], f"{owner}.{other}" if owner else other].said
    errors = {name for name in raised(place) if not name.startswith("_")}
    missing = {name for name in errors if name not in said} - {"TypeError"}
    assert not missing, f"{'.'.join(place)} raises {', '.join(sorted(missing))}; it says: {said!r}"


def test_the_reading_of_code_finds_what_is_known() -> None:
    """Else an empty set would pass everywhere."""
    assert raised(("verifier", "verify")) >= {"EvidenceError", "AppraisalError"}
    assert raised(("policy", "AppraisalPolicy.load")) >= {"PolicyError"}
    assert raised(("reference", "PcrSet")) == {"ValueError"}
    assert {place for place, _, _ in FIELDS} >= {("checks", "Check.got"), ("policy", "AppraisalPolicy.leeway_seconds")}
