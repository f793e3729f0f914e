"""``model encrypt``: weights that only an attested enclave can decrypt. PROTOCOL.md section 6.4."""

from __future__ import annotations

import json
from datetime import UTC, datetime
from pathlib import Path

import click

from attestation.envelope import MODEL_RECORD, EnvelopeHeader, EnvelopePurpose, encryption_context
from attestation.errors import StrongroomError
from attestation.keyrelease import judge_key
from attestation.manifest import ModelManifest
from attestation.reference import digest_text
from strongroom.files import require_new, write_new
from strongroom.kms.client import KmsClient
from strongroom.model_file import encrypt_model
from strongroom.options import err, json_option, key_option, load_policy, policy_option, require_key
from strongroom.render import hashing_bar, show_verdict, waiting, warn_of_labels


class ModelNotAccepted(StrongroomError):
    """The policy names other models (code ``model_not_accepted``)."""

    exit_code = 2


@click.command()
@click.argument("file", metavar="MODEL", type=click.Path(path_type=Path, exists=True, dir_okay=False))
@policy_option
@key_option
@click.option(
    "--out",
    "target",
    type=click.Path(path_type=Path, dir_okay=False),
    required=True,
    help="The encrypted model; its manifest gets .manifest behind it.",
)
@click.option(
    "--version",
    type=click.IntRange(1, (1 << 32) - 1),
    help="This wrapped key's number in your own count, at least the policy's minimum.  [default: the minimum]",
)
@json_option
def encrypt(file: Path, policy: Path, key: str | None, target: Path, version: int | None, as_json: bool) -> None:
    """Encrypt MODEL, a GGUF file, under a key that KMS releases to the policy's enclaves alone.

    The policy's [kms.model] names the key, and what KMS says of it is judged first. The configurations that the policy
    accepts may use the model: after a change of enclave.toml encrypt it anew. Credentials are boto3's.

    \b
    Example:
      strongroom model encrypt SmolLM2.gguf --policy policy.toml --out SmolLM2.sealed
    """
    manifest_file = target.with_name(f"{target.name}.manifest")
    require_new(target)
    require_new(manifest_file)
    accepted = load_policy(policy)
    rule = require_key(accepted, EnvelopePurpose.MODEL, key)
    version = version or rule.minimum_version
    if version < rule.minimum_version:
        raise click.BadParameter(f"the policy asks for {rule.minimum_version} at least", param_hint="--version")
    with hashing_bar(err, "hashing the model") as hashing:
        manifest = ModelManifest.from_gguf(file, progress=hashing)
    if manifest.digest() not in accepted.accepted_models:
        raise ModelNotAccepted(
            "model_not_accepted",
            f"{policy} does not accept the model {manifest.name}",
            expected=" or ".join(map(digest_text, accepted.accepted_models)),
            got=digest_text(manifest.digest()),
        )
    with (
        KmsClient(rule.key.region, purpose="encrypting a model", policy=accepted) as client,
        waiting(err, "asking KMS"),
    ):
        release = judge_key(accepted, EnvelopePurpose.MODEL, client.facts(rule.key), at=datetime.now(UTC))
        data_key, wrapped = client.generate_data_key(
            rule.key, encryption_context(EnvelopePurpose.MODEL, rule.context, version)
        )
    header = EnvelopeHeader(EnvelopePurpose.MODEL, rule.key, rule.context, version, wrapped, MODEL_RECORD)
    with hashing_bar(err, "encrypting") as progress:
        encrypt_model(
            file,
            target,
            manifest=manifest,
            header=header,
            configurations=release.configurations,
            data_key=data_key,
            progress=progress,
        )
    try:
        write_new(manifest_file, manifest.encode())
    except BaseException:
        target.unlink(missing_ok=True)
        raise
    if as_json:
        written = {"model": str(target), "manifest": str(manifest_file), "version": version}
        click.echo(json.dumps({**written, "digest": digest_text(manifest.digest()), **release.as_json()}))
    else:
        show_verdict(err, release.checks)
        warn_of_labels(err, release)
        click.echo(f"wrote {target}\nwrote {manifest_file}")
