"""The options that name KMS keys, for the commands that write a policy, and the rules that they come to."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

import click

from attestation.envelope import EnvelopePurpose
from attestation.keypolicy.document import KeyArn, KeyPolicyError
from attestation.rules import Ignore, KeyRule, WrappedKeyFile
from strongroom.options import F

ENCRYPTED_MODEL: Final = "model.sealed"
"""What a policy calls its encrypted model, unless it is named otherwise."""


class Arn(click.ParamType[KeyArn]):
    """The full ARN of a key: an alias may lead to another key tomorrow."""

    name = "arn"

    def convert(self, value: object, param: click.Parameter | None, ctx: click.Context | None) -> KeyArn:
        try:
            return value if isinstance(value, KeyArn) else KeyArn.parse(str(value))
        except KeyPolicyError as error:
            self.fail(str(error), param, ctx)


@dataclass(frozen=True, slots=True)
class NamedKeys:
    """The KMS keys that were named, and what is accepted of them."""

    keys: Mapping[EnvelopePurpose, KeyArn]
    """One or two, of one region."""
    context: str
    administrators: tuple[str, ...]
    """ARNs that the policy trusts with changing what the keys release to. None: their policies are locked."""
    encrypted_model: str
    """The encrypted model's file, relative to the policy's folder."""

    @property
    def region(self) -> str:
        return next(iter(self.keys.values())).region

    def rules(self) -> dict[EnvelopePurpose, KeyRule]:
        """For a policy, with wrapped keys of version 1 on. Raises PolicyError."""
        wrapped: Mapping[EnvelopePurpose, WrappedKeyFile | Ignore | None] = {
            EnvelopePurpose.MODEL: WrappedKeyFile(self.encrypted_model, None),
            EnvelopePurpose.PROMPT: None,
        }
        return {
            purpose: KeyRule(key, self.context, 1, self.administrators, wrapped[purpose])
            for purpose, key in self.keys.items()
        }


def key_options(command: F) -> F:
    """``--kms-model-key``, ``--kms-prompts-key`` and what goes with them: :func:`take_keys` takes them."""
    for option in (
        click.option(
            "--encrypted-model",
            metavar="FILE",
            help=f"The encrypted model, relative to the policy's folder.  [default: {ENCRYPTED_MODEL}]",
        ),
        click.option(
            "--kms-administrator",
            "kms_administrators",
            metavar="ARN",
            multiple=True,
            help="Who may change what the keys release to; repeatable.  [default: nobody, their policies are locked]",
        ),
        click.option("--kms-context", metavar="NAME", help="The name in the encryption context."),
        click.option("--kms-prompts-key", type=Arn(), metavar="ARN", help="The key of waiting prompts."),
        click.option("--kms-model-key", type=Arn(), metavar="ARN", help="The key of an encrypted model."),
    ):
        command = option(command)
    return command


def take_keys(options: dict[str, Any]) -> NamedKeys | None:
    """Takes the options of :func:`key_options` out of ``options``. None where no key is named.

    Raises click.UsageError for options that do not go together.
    """
    named = {purpose: options.pop(f"kms_{purpose.table}_key") for purpose in EnvelopePurpose}
    context, administrators = options.pop("kms_context"), options.pop("kms_administrators")
    model = options.pop("encrypted_model")
    keys = {purpose: key for purpose, key in named.items() if key is not None}
    if not keys and (context or administrators or model):
        raise click.UsageError("name the key: --kms-model-key, --kms-prompts-key, or both")
    if not keys:
        return None
    if context is None:
        raise click.UsageError("a KMS key goes with --kms-context NAME")
    if model is not None and EnvelopePurpose.MODEL not in keys:
        raise click.UsageError("--encrypted-model goes with --kms-model-key")
    if len({key.region for key in keys.values()}) > 1:
        raise click.UsageError("both KMS keys must be of one region")
    return NamedKeys(keys, context, administrators, model or ENCRYPTED_MODEL)
