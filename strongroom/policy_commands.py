"""``policy``: make an appraisal policy, find its weaknesses, and say in plain words what it asks."""

from __future__ import annotations

import json
from datetime import UTC, datetime
from pathlib import Path

import click
from rich.text import Text

from strongroom.options import json_option, load_policy, out
from strongroom.policy_init import POLICY_TOML, init, remarks_as_json, show_remark
from strongroom.policy_text import explain, warnings
from strongroom.reference_options import ANY_FILE
from strongroom.render import printable, shorten, wrapped

INDENT = " " * 7
policy_argument = click.argument(
    "file", type=ANY_FILE, default=POLICY_TOML, envvar="STRONGROOM_POLICY", metavar="[FILE]"
)


@click.group()
def policy() -> None:
    """Make an appraisal policy, check it for weaknesses, or have it explained.

    A policy says which enclaves a client accepts. It is the client's: whoever writes it decides who may read a prompt.

    \b
    Examples:
      strongroom policy init --from-eif enclave.eif --model MODEL.gguf --configuration enclave.toml
      strongroom policy check policy.toml --strict
      strongroom policy explain policy.toml
    """


policy.add_command(init)


@policy.command()
@policy_argument
@click.option("--strict", is_flag=True, help="Exit with 1 when there is a warning.")
@json_option
def check(file: Path, strict: bool, as_json: bool) -> int:
    """Say what makes a policy weaker than it could be: a line for each warning, with a stable code.

    The files that it names are read too; a signed history is verified, and what is remembered of it moves forward. What
    is only worth knowing is a note. FILE defaults to policy.toml.

    \b
    Examples:
      strongroom policy check
      strongroom policy check demo/policy.toml --strict --json

    Exit codes: 0 it can be judged by, 1 with --strict for a warning, 2 it cannot, 3 a history that nothing vouches for.
    """
    remarks = warnings(load_policy(file), datetime.now(UTC))
    found = [remark for remark in remarks if not remark.is_note]
    if as_json:
        click.echo(json.dumps({"policy": str(file), **remarks_as_json(remarks)}))
    else:
        for remark in remarks:
            show_remark(out, remark)
        count = {0: "no warning", 1: "1 warning"}.get(len(found), f"{len(found)} warnings")
        out.print(f"{printable(str(file))}: can be judged by, {count}", soft_wrap=True)
    return 1 if strict and found else 0


@policy.command("explain")
@policy_argument
@click.option("--full", is_flag=True, help="Print digests whole.")
@json_option
def explain_command(file: Path, full: bool, as_json: bool) -> None:
    """Say in plain sentences what an enclave must prove for a policy to accept it, and what it need not.

    The numbers are those of the checklist in PROTOCOL.md, section 3, and of `strongroom verify`. FILE defaults to
    policy.toml.

    \b
    Examples:
      strongroom policy explain
      strongroom policy explain demo/policy.toml --full
    """
    sections = explain(load_policy(file))
    if as_json:
        told = [{"steps": each.steps, "title": each.title, "sentences": each.sentences} for each in sections]
        click.echo(json.dumps({"policy": str(file), "sections": told}))
        return
    out.print(
        f"{printable(str(file))} accepts an enclave that proves all of this, by the steps of PROTOCOL.md section 3:"
    )
    for section in sections:
        out.print(Text(f"\n{section.numbers:>5}  {section.title}".rstrip(), "bold"), soft_wrap=True)
        for sentence in section.sentences:
            hanging = INDENT + ("  " if sentence.startswith("- ") else "")
            for line in wrapped(out, sentence if full else shorten(sentence), first=INDENT, indent=hanging):
                out.print(Text(line), soft_wrap=True)
