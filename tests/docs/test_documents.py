"""The documents are held to the code: what they name exists, and what they list is what the code has."""

from __future__ import annotations

import ast
import re
from functools import cache
from pathlib import Path

import click
import pytest

from attestation.checks import KEY_STEPS, STEPS
from attestation.dependencies import ENCLAVE_DEPENDENCIES
from attestation.errors import AppraisalError, EvidenceError, PolicyError, StrongroomError
from enclave.boot import PHASES
from enclave.server import Server
from parent.modelstore import ModelStore
from strongroom import cli
from vsockrpc.frames import FrameType
from vsockrpc.http import STATUS_OF_FAULT

ROOT = Path(__file__).resolve().parents[2]
DOCUMENTS = sorted(
    [*ROOT.glob("*.md"), *ROOT.glob("bench/*.md"), *ROOT.glob("conformance/*.md"), *ROOT.glob("docs/**/*.md")]
)
EVERY_DOCUMENT = pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))


def read(name: str) -> str:
    return (ROOT / name).read_text()


def section(text: str, title: str) -> str:
    """From a heading to the next one of its level or above."""
    found = re.search(rf"^(#+) {re.escape(title)}$", text, re.MULTILINE)
    assert found is not None, title
    rest = text[found.end() :]
    following = re.search(rf"^#{{1,{len(found[1])}}} ", rest, re.MULTILINE)
    return rest[: following.start()] if following else rest


def rows(text: str) -> list[list[str]]:
    """The cells of every table row, without headings and rules."""
    lines = text.splitlines()
    rules = {index for index, line in enumerate(lines) if re.fullmatch(r"\|[-|: ]+\|", line)}
    found = []
    for index, line in enumerate(lines):
        if line.startswith("|") and index not in rules and index + 1 not in rules:
            found.append([cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]])
    return found


@cache
def names_in(path: Path) -> frozenset[str]:
    """What a module defines at its top and inside its classes, as ``name`` and ``Class.name``."""
    names: set[str] = set()

    def collect(body: list[ast.stmt], prefix: str) -> None:
        for node in body:
            match node:
                case ast.ClassDef():
                    names.add(prefix + node.name)
                    collect(node.body, f"{prefix}{node.name}.")
                case ast.FunctionDef() | ast.AsyncFunctionDef():
                    names.add(prefix + node.name)
                case ast.Assign():
                    names.update(prefix + target.id for target in node.targets if isinstance(target, ast.Name))
                case ast.AnnAssign(target=ast.Name(id=name)):
                    names.add(prefix + name)

    collect(ast.parse(path.read_text()).body, "")
    return frozenset(names)


# --- Links and names ------------------------------------------------------------------------------------------------


def slug(heading: str) -> str:
    return re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")


@EVERY_DOCUMENT
def test_links_lead_somewhere(path: Path) -> None:
    for target in re.findall(r"\[[^\]]*\]\(([^)\s]+)\)", path.read_text()):
        if re.match(r"[a-z]+:", target):
            continue
        name, _, anchor = target.partition("#")
        led_to = path.parent / name if name else path
        assert led_to.exists(), target
        if anchor:
            assert anchor in map(slug, re.findall(r"^#+ (.+)$", led_to.read_text(), re.MULTILINE)), target


@EVERY_DOCUMENT
def test_files_and_names_exist(path: Path) -> None:
    for file, name in re.findall(r"`((?:\w+/)+\w+\.py)(?::([\w.]+))?`", path.read_text()):
        if "NAME" in file:
            continue
        assert (ROOT / file).is_file(), file
        if name:
            assert name in names_in(ROOT / file), f"{file}:{name}"


def test_every_proof_of_the_threat_model_exists() -> None:
    text = read("THREAT_MODEL.md")
    proofs = re.findall(r"(tests/[\w/]+\.py)::(\w+)", text)
    assert len(proofs) > 50
    missing = [f"{file}::{name}" for file, name in proofs if name not in names_in(ROOT / file)]
    assert missing == []
    vectors = set(re.findall(r"`(\d\d-[\w-]+)`", text))
    assert {name for name in vectors if not (ROOT / "tests/vectors/evidence" / f"{name}.vector").is_file()} == set()


def test_every_threat_has_a_mitigation_and_a_proof() -> None:
    threats = [row for row in rows(read("THREAT_MODEL.md").partition("\n## Verifying\n")[2]) if len(row) == 3]
    assert len(threats) > 40
    for threat, mitigation, proof in threats:
        assert mitigation, threat
        assert re.search(r"::test_|vectors? `", proof), threat


# --- The command line -----------------------------------------------------------------------------------------------


def command_lines() -> list[tuple[str, list[str]]]:
    """Commands of the README with the words behind them."""
    lines = re.findall(r"(?:^ {4}|`)strongroom ([a-z]+[^`\n]*)", read("README.md"), re.MULTILINE)
    return [(words[0], words[1:]) for words in (line.partition("#")[0].partition("|")[0].split() for line in lines)]


def test_the_readme_names_every_command_and_no_other() -> None:
    assert {command for command, _ in command_lines()} == set(cli.COMMANDS)


def test_options_of_the_readme_exist() -> None:
    for name, words in command_lines():
        command: click.Command | None = cli.strongroom
        for part in (name, *words):
            if not isinstance(command, click.Group):
                break
            command = command.get_command(click.Context(command), part)
        assert command is not None, (name, words)
        options = {word.partition("=")[0] for word in words if word.startswith("--")}
        assert options <= {option for parameter in command.params for option in parameter.opts}, name


def test_exit_codes() -> None:
    codes = {int(row[0]) for row in rows(read("README.md")) if row[0].isdecimal()}
    raised = {error.exit_code for error in (AppraisalError, PolicyError, EvidenceError, StrongroomError)}
    assert raised == {AppraisalError.exit_code, cli.USAGE, EvidenceError.exit_code, cli.UNAVAILABLE}
    assert codes == {0, cli.DEFECT, cli.INTERRUPTED, cli.TERMINATED} | raised


def test_make_targets_exist() -> None:
    targets = set(re.findall(r"^([a-z-]+):", read("Makefile"), re.MULTILINE))
    for name in ("README.md", "CONTRIBUTING.md", "ARCHITECTURE.md", "docs/kms.md"):
        assert set(re.findall(r"`make ([a-z-]+)", read(name))) <= targets, name


# --- Lists that the code has too ------------------------------------------------------------------------------------


def test_every_dependency_of_the_enclave_is_defended() -> None:
    table = rows(section(read("ARCHITECTURE.md"), "The trusted computing base"))
    assert sorted(row[0] for row in table) == sorted(ENCLAVE_DEPENDENCIES)
    assert all(len(row[2]) > 10 for row in table)
    locked = set(re.findall(r"^([a-z0-9-]+)==", read("requirements/all.txt"), re.MULTILINE))
    assert set(ENCLAVE_DEPENDENCIES) <= locked


def test_the_boot_is_the_table_of_the_code() -> None:
    table = rows(section(read("ARCHITECTURE.md"), "Boot"))
    assert [(row[0], row[2]) for row in table] == [(phase.value, step.leads_to.value) for phase, step in PHASES.items()]


def test_the_steps_of_the_protocol() -> None:
    table = rows(section(read("PROTOCOL.md"), "3. Verification").partition("### 3.1")[0])
    assert [int(row[0]) for row in table] == [*STEPS, *KEY_STEPS]


def test_the_frames_of_the_protocol() -> None:
    table = rows(section(read("PROTOCOL.md"), "5.1 Frames"))
    named = [(int(row[0]), row[1]) for row in table if row[0].isdecimal()]
    assert named == [(kind.value, kind.name) for kind in FrameType]


def test_the_methods_of_the_protocol() -> None:
    """There is no other: no shell, no file transfer, no model that the parent chooses."""
    text = read("PROTOCOL.md")
    enclave = {row[0].strip("`") for row in rows(section(text, "5.2 Methods of the enclave"))}
    store = {row[0].strip("`") for row in rows(section(text, "5.3 Methods of the model store (the enclave calls it)"))}
    assert set(Server.__new__(Server).handlers) == enclave
    assert set(ModelStore.__new__(ModelStore).handlers) == store


def test_the_clear_faults_of_the_protocol() -> None:
    table = rows(section(read("PROTOCOL.md"), "8. HTTP"))
    assert {row[0].strip("`"): int(row[1]) for row in table if len(row) == 2} == dict(STATUS_OF_FAULT)
