"""``kms key``: a key made with its policy, a rollout of images, and the end of all changes."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Final

import click
from rich.text import Text

from attestation.keypolicy.actions import covered
from attestation.keypolicy.answers import KeyMetadata
from attestation.keypolicy.attested import asked
from attestation.keypolicy.document import Effect, KeyArn, KeyPolicy, KeyPolicyError
from attestation.keypolicy.generate import locked, opening, roll_out
from attestation.keypolicy.mutability import Locked, mutability, name_of
from attestation.keyrelease import KeyFacts
from strongroom.kms.client import KmsClient, KmsError
from strongroom.kms.key_policies import (
    Expected,
    KeyChangeError,
    asking,
    difference,
    expected,
    generated,
    is_alike,
    principals_options,
    show_difference,
    show_findings,
    show_judgement,
    use_options,
)
from strongroom.kms.options import Arn
from strongroom.options import err, json_option, out, policy_option
from strongroom.render import printable

DESCRIPTION: Final = "Released to measured enclaves alone (strongroom)"
FOR_EVER: Final = (
    "This CANNOT BE UNDONE. Afterwards nobody can change what this key opens to, its owner and AWS's console included:"
    " a release that is not in the key policy now will never open what is encrypted under this key."
)
ONCE_MORE: Final = "Once more: this cannot be undone. No administrator, and no account's root user, can take it back."

UNLISTED_GRANTS: Final = (
    "Grants that were made in the last minutes may not be listed yet, and a lock ends none: judge the key again in 5"
    " minutes, with `strongroom kms policy lint --key`."
)
"""KMS API Reference, CreateGrant: "usually less than five minutes" until a grant is known throughout KMS."""

key_argument = click.argument("key", type=Arn(), metavar="ARN")
dry_run_option = click.option("--dry-run", is_flag=True, help="Say what would be done, and change nothing.")


@click.group()
def key() -> None:
    """Make a key, roll out images to it, or lock its policy for ever."""


# --- create -------------------------------------------------------------------------------------------------------


@key.command()
@policy_option
@click.option("--closed", is_flag=True, help="In place of a policy: open to nobody yet.")
@use_options
@principals_options
@click.option("--description", default=DESCRIPTION, show_default=True, help="What KMS shows beside the key.")
@click.option("--region", help="Where the key is made.  [default: boto3's]")
@dry_run_option
@json_option
def create(
    policy: Path,
    closed: bool,
    use: str | None,
    context: str | None,
    administrators: tuple[str, ...],
    users: tuple[str, ...],
    sealers: tuple[str, ...],
    readers: tuple[str, ...],
    description: str,
    region: str | None,
    dry_run: bool,
    as_json: bool,
) -> None:
    """Make a symmetric key with the policy that `kms policy generate` writes, and print its ARN.

    With --closed it opens to nobody yet: an image is measured with the ARN of its key, so that the key comes first, and
    `rotate-image` opens it. There is no moment at which it has another policy. You must be one of its administrators:
    KMS refuses to make a key whose policy its maker could not change.

    \b
    Examples:
      strongroom kms key create --closed --use model --context production \\
        --sealer arn:aws:iam::111122223333:role/publisher --administrator arn:aws:iam::111122223333:role/key-admin
      strongroom kms key create --policy policy.toml --use prompt --context production \\
        --user arn:aws:iam::111122223333:role/parent --sealer arn:aws:iam::111122223333:role/client \\
        --administrator arn:aws:iam::111122223333:role/key-admin --dry-run
    """
    wanted = expected(None if closed else policy, use=use, context=context, administrators=administrators, key=None)
    if not (administrators or wanted.administrators):
        raise click.UsageError("name --administrator: who may change it, until `kms key lock` ends that")
    made = generated(wanted, users=users, sealers=sealers, readers=readers, administrators=administrators)
    judged = wanted.judge(made)
    show_findings(err, judged.findings)
    judged.require_none("the appraisal policy does not trust these administrators; nothing was made")
    if dry_run:
        click.echo(json.dumps({"key": None, "key_policy": json.loads(made.encode())}) if as_json else made.encode())
        err.print("nothing was made: --dry-run")
        return
    with asking(err, region, "making a KMS key") as client:
        answer = client.ask(
            "create_key",
            Policy=made.encode(),
            Description=description,
            KeyUsage="ENCRYPT_DECRYPT",
            KeySpec="SYMMETRIC_DEFAULT",
            Origin="AWS_KMS",
            MultiRegion=False,
        )
        try:
            arn = KeyMetadata.from_api(answer).arn
        except KeyPolicyError as error:
            raise KmsError("bad_kms_answer", error.message, expected=error.expected, got=error.got) from error
        err.print(Text(f"made {arn.text}"), soft_wrap=True)
        facts = _kept(client, arn, made)
    report = wanted.judge(facts.policy, facts)
    report.require_none(f"KMS made another key than was asked for: {arn.text}")
    click.echo(json.dumps({"key": arn.text, **report.as_json()}) if as_json else arn.text)


# --- rotate-image -------------------------------------------------------------------------------------------------


@key.command("rotate-image")
@key_argument
@policy_option
@use_options
@click.option(
    "--user", "users", metavar="ARN", multiple=True, help="A parent's role; repeatable.  [default: the key policy's]"
)
@click.option("--finish", is_flag=True, help="Also close the key to every release that the policy does not accept.")
@dry_run_option
@json_option
def rotate_image(
    key: KeyArn,
    policy: Path,
    use: str | None,
    context: str | None,
    administrators: tuple[str, ...],
    users: tuple[str, ...],
    finish: bool,
    dry_run: bool,
    as_json: bool,
) -> None:
    """Open the key to the appraisal policy's releases: first beside those that it is open to, then to them alone.

    A rollout has two steps. Accept the new release beside the old one in the appraisal policy, and open the key to it;
    start its enclaves. Then accept the new one alone, and --finish. What the key policy says else stays as it is.

    \b
    Examples:
      strongroom kms key rotate-image arn:aws:kms:us-east-1:111122223333:key/... --policy policy.toml
      strongroom kms key rotate-image arn:aws:kms:us-east-1:111122223333:key/... --policy policy.toml --finish

    Exit codes: 0 done, or nothing to do; 1 the key policy would have errors, and was not changed; 4 KMS refused.
    """
    wanted = expected(policy, use=use, context=context, administrators=administrators, key=key)
    with asking(err, key.region, "changing a KMS key") as client:
        facts = client.facts(key)
        assert wanted.releases is not None
        assert wanted.purpose is not None
        if wanted.context is None:
            raise click.UsageError("name the context: --context")
        statements = opening(
            wanted.releases, purpose=wanted.purpose, context=wanted.context, users=users or _users(facts.policy)
        )
        after = roll_out(facts.policy, statements, finish=finish)
        hint = "" if finish else "; where it is about a release that the policy no longer accepts, --finish removes it"
        _change(client, wanted, facts, after, hint=hint, dry_run=dry_run, as_json=as_json)


def _users(policy: KeyPolicy) -> Sequence[str]:
    """Those whom the key policy lets open the key under attestation."""
    names = {
        name_of(principal): None
        for statement in policy.statements
        if statement.effect is Effect.ALLOW and "kms:Decrypt" in covered(statement)[0] and asked(statement.conditions)
        for principal in statement.principals
    }
    if not names:
        raise click.UsageError("the key policy opens to nobody under attestation yet: name --user")
    return tuple(names)


# --- lock ---------------------------------------------------------------------------------------------------------


@key.command()
@key_argument
@policy_option
@use_options
@click.option(
    "--yes-i-know-it-cannot-be-undone", "is_sure", is_flag=True, help="Do not ask; for programs, and for nobody else."
)
@dry_run_option
@json_option
def lock(
    key: KeyArn,
    policy: Path,
    use: str | None,
    context: str | None,
    administrators: tuple[str, ...],
    is_sure: bool,
    dry_run: bool,
    as_json: bool,
) -> None:
    """Take everybody's permission to change what the key opens to. THIS CANNOT BE UNDONE.

    From then on a verdict calls the key LOCKED, and needs to trust no administrator. No other release can ever be
    added; what is encrypted under the key opens to the releases that are in its policy now, or to nothing. Who may
    disable or delete the key may still do so. What AWS Support may do for an account whose key nobody manages is beyond
    any key policy: to trust KMS is to trust AWS with that.

    A grant that was made in the last minutes may not be listed yet, and goes on: judge the key again after 5 minutes.

    It cannot be undone: it is done only when the key policy has no error, and after you have typed the key's id.

    \b
    Examples:
      strongroom kms key lock arn:aws:kms:us-east-1:111122223333:key/... --policy policy.toml --dry-run
      strongroom kms key lock arn:aws:kms:us-east-1:111122223333:key/... --policy policy.toml

    Exit codes: 0 locked; 1 the key policy has errors, or somebody could still change it; 4 KMS refused.
    """
    wanted = expected(policy, use=use, context=context, administrators=administrators, key=key)
    with asking(err, key.region, "locking a KMS key") as client:
        facts = client.facts(key)
        after = locked(facts.policy)
        left = mutability(after, facts.metadata, facts.grants)
        if not isinstance(left, Locked):
            raise KeyChangeError(
                "still_changeable",
                "somebody could still change what the key opens to; nothing was changed",
                expected=Locked(),
                got="; ".join(f"{each.principal} by {each.statement}" for each in left.changers),
            )

        def agree() -> None:
            for text in (FOR_EVER, ONCE_MORE):
                err.print(Text(text, "bold red"), soft_wrap=True)
            if not is_sure:
                _confirm(key)

        _change(client, wanted, facts, after, agree=agree, for_ever=True, dry_run=dry_run, as_json=as_json)
        if not (dry_run or as_json):
            err.print(Text(UNLISTED_GRANTS, "yellow"), soft_wrap=True)


def _confirm(key: KeyArn) -> None:
    """Raises KeyChangeError unless somebody types the key's id."""
    question = f"Type the key's id, {key.key_id}, to lock it for ever"
    typed = click.prompt(question, err=True, default="", show_default=False)
    if typed != key.key_id:
        raise KeyChangeError("not_confirmed", "that is not the key's id; nothing was changed", expected=key.key_id)


# --- Both ---------------------------------------------------------------------------------------------------------


def _change(
    client: KmsClient,
    wanted: Expected,
    facts: KeyFacts,
    after: KeyPolicy,
    *,
    hint: str = "",
    agree: Callable[[], None] = lambda: None,
    for_ever: bool = False,
    dry_run: bool,
    as_json: bool,
) -> None:
    """Shows what changes, has it judged, lets somebody ``agree``, puts it, and reads it back.

    Raises KeyChangeError, KmsError.
    """
    arn, lines = facts.metadata.arn, difference(facts.policy, after)
    judged = wanted.judge(after, facts)
    if not as_json:
        show_difference(out, facts.policy, after)
        show_judgement(err, arn.text, judged)
    judged.require_none(f"the key policy would have errors, nothing was changed{hint}")
    is_change = after != facts.policy
    changes = is_change and not dry_run
    if changes:
        agree()
        client.ask(
            "put_key_policy",
            KeyId=arn.text,
            PolicyName="default",
            Policy=after.encode(),
            BypassPolicyLockoutSafetyCheck=for_ever,
        )
        err.print(Text(f"KMS has the new policy of {arn.text}"), soft_wrap=True)
        facts = _kept(client, arn, after)
        judged = wanted.judge(facts.policy, facts)
    if as_json:
        body = {"key": arn.text, "changed": changes, "difference": lines, **judged.as_json()}
        click.echo(json.dumps(body))
    elif changes:
        out.print(Text(f"changed the policy of {printable(arn.text)}: {judged.mutability}"), soft_wrap=True)
    else:
        out.print("nothing was changed: --dry-run" if is_change else "nothing to change")


def _kept(client: KmsClient, key: KeyArn, policy: KeyPolicy) -> KeyFacts:
    """What KMS says of the key now, whose policy is to be ``policy``."""
    facts = client.facts(key)
    if not is_alike(facts.policy, policy):
        raise KeyChangeError(
            "policy_not_kept",
            "KMS answers with another key policy than was put: it was changed by somebody else, or KMS is not that far"
            " yet; look with `strongroom kms policy lint --key`",
            expected="the policy that was put",
            got="; ".join(difference(policy, facts.policy)[:4]),
        )
    return facts
