"""``kms policy``: key policies written, judged and tried. PROTOCOL.md section 3.2."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import click
from rich.text import Text

from attestation import cbor
from attestation.anchors import AWS_NITRO_G1
from attestation.bundle import Bundle, read_kept
from attestation.chain import Anchor
from attestation.commitment import Evidence
from attestation.cose import COSE_SIGN1_TAG, CoseSign1
from attestation.document import MAX_CERTIFICATE, AttestationDocument
from attestation.keypolicy.answers import Grant
from attestation.keypolicy.decision import Decision, Request, decide, encryption_context, recipient_context
from attestation.keypolicy.document import MAX_POLICY, KeyArn, KeyPolicy, KeyPolicyError
from attestation.keyrelease import KeyFacts
from attestation.verifier import authenticate
from strongroom.files import read_bounded, read_evidence
from strongroom.kms.key_commands import key as key_group
from strongroom.kms.key_policies import (
    Expected,
    Judged,
    asking,
    expected,
    generated,
    optional_policy_option,
    principals_options,
    show_findings,
    show_judgement,
    use_options,
)
from strongroom.kms.options import Arn
from strongroom.options import err, json_option, out, policy_option
from strongroom.reference_options import ANY_FILE
from strongroom.render import printable

POLICY_FILE = click.Path(path_type=Path, dir_okay=False, allow_dash=True)


@click.group()
def kms() -> None:
    """Keys that AWS KMS releases to measured enclaves, and to nothing else.

    Credentials, endpoint and region are boto3's: its environment variables and files.

    \b
    Examples:
      strongroom kms key create --policy policy.toml --use prompt --context production \\
        --user arn:aws:iam::111122223333:role/parent --sealer arn:aws:iam::111122223333:role/client \\
        --administrator arn:aws:iam::111122223333:role/key-admin
      strongroom kms policy lint --key arn:aws:kms:us-east-1:111122223333:key/... --policy policy.toml
    """


@kms.group()
def policy() -> None:
    """Write a key policy, find what is wrong with one, or try it with an attestation document."""


kms.add_command(key_group)


# --- generate -----------------------------------------------------------------------------------------------------


@policy.command()
@policy_option
@use_options
@principals_options
def generate(
    policy: Path,
    use: str | None,
    context: str | None,
    administrators: tuple[str, ...],
    users: tuple[str, ...],
    sealers: tuple[str, ...],
    readers: tuple[str, ...],
) -> None:
    """Print the policy of a key that opens to the appraisal policy's releases and to nothing else.

    One statement opens it, for each release; others let sealers encrypt, and administrators change the policy and keep
    the key. Without administrators nobody can ever change it.

    \b
    Example:
      strongroom kms policy generate --policy policy.toml --use model --context production \\
        --user arn:aws:iam::111122223333:role/parent --sealer arn:aws:iam::111122223333:role/publisher \\
        --administrator arn:aws:iam::111122223333:role/key-admin > key-policy.json
    """
    wanted = expected(policy, use=use, context=context, administrators=administrators, key=None)
    made = generated(wanted, users=users, sealers=sealers, readers=readers, administrators=administrators)
    judged = wanted.judge(made)
    show_findings(err, judged.findings)
    judged.require_none("the appraisal policy does not trust these administrators; nothing was written")
    click.echo(made.encode())


# --- lint ---------------------------------------------------------------------------------------------------------


@policy.command()
@click.argument("file", type=POLICY_FILE, required=False, metavar="[FILE]")
@click.option("--key", type=Arn(), metavar="ARN", help="In place of a file: this key's policy and grants, from KMS.")
@optional_policy_option
@use_options
@json_option
def lint(
    file: Path | None,
    key: KeyArn | None,
    policy: Path | None,
    use: str | None,
    context: str | None,
    administrators: tuple[str, ...],
    as_json: bool,
) -> int:
    """Say what is wrong with a key policy: whether the key opens to anything but the accepted releases.

    FILE is what GetKeyPolicy answers; "-" is standard input. With --key also the key's grants are judged, what it is,
    and the policies of its copies in other regions. docs/key-policies.md has every rule.

    \b
    Examples:
      strongroom kms policy lint key-policy.json --policy policy.toml --use prompt --context production
      strongroom kms policy lint --key arn:aws:kms:us-east-1:111122223333:key/... --policy policy.toml --json

    Exit codes: 0 no error, 1 an error, 2 no key policy, 4 KMS does not answer.
    """
    if (file is None) == (key is None):
        raise click.UsageError("name one of FILE and --key")
    wanted = expected(policy, use=use, context=context, administrators=administrators, key=key)
    if key is not None:
        judged = dict(_judged_with_copies(key, wanted))
    else:
        assert file is not None
        judged = {str(file): wanted.judge(read_policy(file))}
    if as_json:
        entries = [{"policy": name, **each.as_json()} for name, each in judged.items()]
        against = None if policy is None else str(policy)
        click.echo(json.dumps({"held_against": against, "key_policies": entries}))
    else:
        for name, each in judged.items():
            show_judgement(out, name, each)
        against = "no appraisal policy: only the shape of each statement" if policy is None else str(policy)
        out.print(Text(f"held against {printable(against)}"), soft_wrap=True)
    return 1 if any(each.errors for each in judged.values()) else 0


def _judged_with_copies(key: KeyArn, wanted: Expected) -> list[tuple[str, Judged]]:
    facts = _facts_of(key)
    metadata = facts.metadata
    others = {each for each in (metadata.primary, *metadata.replicas) if each is not None} - {key}
    copies = sorted(others, key=lambda each: each.text)
    everything = [(key, facts), *((each, _facts_of(each)) for each in copies)]
    return [(each.text, wanted.judge(known.policy, known, [key, *copies])) for each, known in everything]


def _facts_of(key: KeyArn) -> KeyFacts:
    with asking(err, key.region, "judging a KMS key") as client:
        return client.facts(key)


# --- check --------------------------------------------------------------------------------------------------------


@policy.command()
@click.option("--document", required=True, type=POLICY_FILE, help="An attestation document, Evidence or a bundle.")
@click.option("--policy-file", type=POLICY_FILE, help="A key policy.")
@click.option("--key", type=Arn(), metavar="ARN", help="The key that is asked for; its policy, without --policy-file.")
@click.option("--principal", required=True, metavar="ARN", help="Who asks: a user, or a session of a role.")
@click.option("--action", default="kms:Decrypt", show_default=True, metavar="kms:NAME", help="What is asked for.")
@click.option(
    "--encryption-context", "pairs", metavar="NAME=VALUE", multiple=True, help="A pair of the context; repeatable."
)
@click.option("--anchor", type=ANY_FILE, metavar="FILE.der", help="An emulator's root.  [default: AWS's root]")
@click.option("--unverified", is_flag=True, help="Take the document's registers, whoever signed it.")
@json_option
def check(
    document: Path,
    policy_file: Path | None,
    key: KeyArn | None,
    principal: str,
    action: str,
    pairs: tuple[str, ...],
    anchor: Path | None,
    unverified: bool,
    as_json: bool,
) -> int:
    """Say what KMS would decide of a request with this attestation document, and by which statement or grant.

    The document's chain and signature are verified at the time that it states, as KMS would have done then. IAM
    policies are not known here: a statement that names an account leaves the decision to them, and so allows nobody
    else.

    \b
    Example:
      strongroom kms policy check --document evidence.json --policy-file key-policy.json \\
        --principal arn:aws:sts::111122223333:assumed-role/parent/i-0123456789abcdef0 \\
        --encryption-context strongroom:purpose=prompt --encryption-context strongroom:context=production

    Exit codes: 0 allowed, 1 denied, 3 no genuine document, 4 KMS does not answer.
    """
    if unverified and anchor is not None:
        raise click.UsageError("--anchor is for a document that is verified")
    registers = _registers(document, anchor, unverified=unverified)
    grants: tuple[Grant, ...] = ()
    if policy_file is not None:
        key_policy, key = read_policy(policy_file), key or _some_key_of(principal)
    elif key is not None:
        facts = _facts_of(key)
        key_policy, grants = facts.policy, facts.grants
    else:
        raise click.UsageError("name --policy-file, or --key")
    context = {**recipient_context(registers), **encryption_context(dict(map(_pair, pairs)))}
    decision = decide(key_policy, grants, Request(principal, action, key, context))
    if as_json:
        click.echo(json.dumps({"verified": not unverified, **_as_json(decision)}))
    else:
        if unverified:
            out.print(Text("UNVERIFIED: nobody asked who signed this document; KMS does.", "bold yellow"))
        for line in decision.explain():
            out.print(Text(printable(line)), soft_wrap=True)
    return 0 if decision.allowed else 1


def _registers(file: Path, root: Path | None, *, unverified: bool) -> dict[int, bytes]:
    """Raises EvidenceError."""
    kept = read_kept(read_evidence(file))
    evidence = kept.evidence if isinstance(kept, Bundle) else kept
    document = Evidence.decode(evidence).document if Evidence.is_in(evidence) else evidence
    signed = CoseSign1.from_cbor(cbor.decode(document, optional_tag=COSE_SIGN1_TAG))
    claims = AttestationDocument.from_cbor(cbor.decode(signed.payload, indefinite_top_map=True))
    if not unverified:
        anchor = AWS_NITRO_G1 if root is None else Anchor.emulated(read_bounded(root, MAX_CERTIFICATE))
        claims = authenticate(document, anchor=anchor, at=claims.timestamp).claims
    return dict(claims.pcrs)


def _pair(text: str) -> tuple[str, str]:
    name, equals, value = text.partition("=")
    if not name or not equals:
        raise click.BadParameter("expected NAME=VALUE", param_hint="--encryption-context")
    return name, value


def _some_key_of(principal: str) -> KeyArn:
    """A key that stands for the one whose policy is in a file: of the account of whoever asks."""
    try:
        return KeyArn("aws", "us-east-1", principal.split(":")[4], "00000000-0000-0000-0000-000000000000")
    except (IndexError, KeyPolicyError) as error:
        raise click.UsageError("name the key: --key") from error


def _as_json(decision: Decision) -> dict[str, object]:
    return {
        "allowed": decision.allowed,
        "by": next((each.name for each in decision.considered if each.rule is decision.by), None),
        "considered": [
            {"name": each.name, "applies": each.applies, "why_not": [str(clause) for clause in each.why_not]}
            for each in decision.considered
        ],
    }


def read_policy(file: Path) -> KeyPolicy:
    """A key policy in a file, or from standard input for ``-``. Raises KeyPolicyError, FileError, OSError."""
    data = sys.stdin.buffer.read(MAX_POLICY + 1) if str(file) == "-" else read_bounded(file, MAX_POLICY)
    return KeyPolicy.parse(data.decode("utf-8", "replace"))
