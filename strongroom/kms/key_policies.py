"""What a key policy is held against, how it is judged, and how that is shown: for the commands of ``kms``."""

from __future__ import annotations

import contextlib
import difflib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, Final, TypeVar

import click
from rich.console import Console
from rich.text import Text

from attestation.envelope import EnvelopePurpose
from attestation.errors import StrongroomError
from attestation.keypolicy.attested import ReleasedTo
from attestation.keypolicy.document import EVERYONE, KeyArn, KeyPolicy, KeyPolicyError, Principal, PrincipalKind
from attestation.keypolicy.findings import Finding, Severity
from attestation.keypolicy.generate import closed, generate
from attestation.keypolicy.lint import lint
from attestation.keypolicy.mutability import Mutability, mutability
from attestation.keyrelease import KeyFacts, released_to
from attestation.policy import AppraisalPolicy
from attestation.rules import KeyRule, SignedReleases
from strongroom.kms.client import KmsClient
from strongroom.options import load_policy, require_key
from strongroom.reference_options import ANY_FILE
from strongroom.render import printable, wrapped

F = TypeVar("F", bound=Callable[..., Any])

_STYLES: Final = {Severity.ERROR: "bold red", Severity.WARNING: "yellow", Severity.NOTE: "dim"}
_INDENT: Final = " " * 9


class KeyChangeError(StrongroomError):
    """A key or its policy was not changed as it was asked for. Codes: ``refused_key_policy``, ``still_changeable`` and
    ``not_confirmed``, before anything was changed (1); ``policy_not_kept``, after it was (4).
    """

    @property
    def exit_code(self) -> int:  # type: ignore[override]
        return 4 if self.code == "policy_not_kept" else 1


# --- What a key is for --------------------------------------------------------------------------------------------


def use_options(command: F) -> F:
    """``--use``, ``--context`` and ``--administrator``."""
    administrator = click.option(
        "--administrator",
        "administrators",
        metavar="ARN",
        multiple=True,
        help="Who may change the key policy; repeatable.  [default: the policy's]",
    )
    context = click.option(
        "--context", metavar="NAME", help="The name in the encryption context.  [default: the policy's]"
    )
    use = click.option(
        "--use",
        type=click.Choice([purpose.value for purpose in EnvelopePurpose]),
        help="What the key wraps: prompts that wait, or a model.  [default: what the policy says]",
    )
    return use(context(administrator(command)))


def principals_options(command: F) -> F:
    """``--user``, ``--sealer`` and ``--reader``."""
    reader = click.option(
        "--reader",
        "readers",
        metavar="ARN",
        multiple=True,
        help="A role of those who ask an enclave: it sees the key policy, to judge it; repeatable.",
    )
    sealer = click.option(
        "--sealer", "sealers", metavar="ARN", multiple=True, help="A role that seals, and opens nothing; repeatable."
    )
    user = click.option(
        "--user",
        "users",
        metavar="ARN",
        multiple=True,
        help="A parent's role, whose enclaves open; repeatable.",
    )
    return user(sealer(reader(command)))


optional_policy_option = click.option(
    "--policy",
    type=ANY_FILE,
    envvar="STRONGROOM_POLICY",
    show_envvar=True,
    help="The appraisal policy to hold it against.  [default: none, only the shape of each statement is judged]",
)


@dataclass(frozen=True, slots=True)
class Expected:
    """What a key policy is held against. None: whatever the key policy itself says."""

    policy: Path | None
    """The appraisal policy's file."""
    releases: tuple[ReleasedTo, ...] | None
    purpose: EnvelopePurpose | None
    context: str | None
    administrators: tuple[str, ...]
    """Those who are trusted to change it."""

    def judge(self, policy: KeyPolicy, facts: KeyFacts | None = None, copies: Sequence[KeyArn] = ()) -> Judged:
        """What is wrong with ``policy``, which is that of the key of ``facts`` or is to become it."""
        metadata, grants = (None, ()) if facts is None else (facts.metadata, facts.grants)
        findings = lint(
            policy,
            releases=self.releases,
            purpose=self.purpose,
            context=self.context,
            administrators=self.administrators,
            metadata=metadata,
            grants=grants,
            copies=copies,
        )
        return Judged(findings, mutability(policy, metadata, grants))


@dataclass(frozen=True, slots=True)
class Judged:
    """What the linter says of one key policy."""

    findings: tuple[Finding, ...]
    mutability: Mutability

    @property
    def errors(self) -> tuple[Finding, ...]:
        return tuple(finding for finding in self.findings if finding.severity is Severity.ERROR)

    def require_none(self, what: str) -> None:
        """Raises KeyChangeError ``refused_key_policy``, which says ``what``, when there is an error. That the key is
        not in use is none of its policy: a key may be disabled just until its policy has been changed.
        """
        rules = ", ".join(dict.fromkeys(finding.rule for finding in self.errors if finding.rule != "not_enabled"))
        if rules:
            raise KeyChangeError("refused_key_policy", what, expected="a key policy without errors", got=rules)

    def as_json(self) -> dict[str, object]:
        return {"mutability": str(self.mutability), "findings": [finding.as_json() for finding in self.findings]}


def expected(
    policy: Path | None, *, use: str | None, context: str | None, administrators: Sequence[str], key: KeyArn | None
) -> Expected:
    """By the options, and by what the appraisal policy says of this key.

    Raises click.UsageError for what is missing or contradictory; PolicyError ``wrong_key`` where the policy names
    another key; KeyPolicyError ``unpinned_register``; ReleaseError for signed releases that are not in force; and as
    :func:`load_policy`.
    """
    purpose = None if use is None else EnvelopePurpose(use)
    if policy is None:
        return Expected(None, None, purpose, context, tuple(administrators))
    accepted = load_policy(policy)
    if isinstance(accepted.releases, SignedReleases):
        leeway = timedelta(seconds=accepted.leeway_seconds)
        accepted.releases.history.require_in_force(datetime.now(UTC), leeway=leeway)
    purpose = purpose or _purpose_in(accepted, key)
    rule = accepted.kms.get(purpose)
    if rule is not None and key is not None:
        require_key(accepted, purpose, key.text)
    if rule is not None and context not in (None, rule.context):
        raise click.UsageError(f"the policy's context is {rule.context}, not {context}")
    releases = tuple(released_to(accepted, purpose))
    if not releases:
        raise KeyPolicyError(
            "unpinned_register",
            f"{policy} accepts any model or any configuration, so that a key would be opened to them all",
            expected="a policy that requires both",
            got="none required",
        )
    trusted = tuple(administrators) if rule is None else rule.administrators
    return Expected(policy, releases, purpose, context if rule is None else rule.context, trusted)


def _purpose_in(policy: AppraisalPolicy, key: KeyArn | None) -> EnvelopePurpose:
    def is_meant(rule: KeyRule) -> bool:
        return key is None or rule.key == key

    found = [purpose for purpose, rule in policy.kms.items() if is_meant(rule)]
    if len(found) != 1:
        raise click.UsageError("say what the key is for: --use prompt, or --use model")
    return found[0]


def generated(
    wanted: Expected,
    *,
    users: Sequence[str],
    sealers: Sequence[str],
    readers: Sequence[str],
    administrators: Sequence[str],
) -> KeyPolicy:
    """The policy of a key for what is ``wanted``; without ``administrators`` with those that are trusted. Held against
    no appraisal policy, it opens to nobody.

    Raises click.UsageError for what is missing, KeyPolicyError.
    """
    if wanted.purpose is None:
        raise click.UsageError("say what the key is for: --use prompt, or --use model")
    if wanted.context is None:
        raise click.UsageError("name the context: --context")
    administrators = administrators or wanted.administrators
    if wanted.releases is None:
        if users:
            raise click.UsageError("--closed opens the key to nobody: leave --user out")
        return closed(
            purpose=wanted.purpose,
            context=wanted.context,
            sealers=sealers,
            administrators=administrators,
            readers=readers,
        )
    if not users:
        raise click.UsageError("name --user: whose enclaves open")
    return generate(
        wanted.releases,
        purpose=wanted.purpose,
        context=wanted.context,
        users=users,
        sealers=sealers,
        readers=readers,
        administrators=administrators,
    )


# --- Ask ----------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def asking(console: Console, region: str | None, purpose: str) -> Iterator[KmsClient]:
    """A client of KMS, as :class:`KmsClient`; says where it asks when that is not AWS's own."""
    with KmsClient(region, purpose=purpose) as client:
        if not client.is_amazons:
            text = f"asking {printable(client.endpoint)}, which is not AWS's own KMS"
            console.print(Text(text, "yellow"), soft_wrap=True)
        yield client


# --- Show ---------------------------------------------------------------------------------------------------------


def show_findings(console: Console, findings: Sequence[Finding]) -> None:
    """Each finding with what to do about it, as they come."""
    for finding in findings:
        where = "the key" if finding.statement is None else finding.statement
        first, *others = wrapped(
            console, f"{finding.severity.value:<7}  {finding.rule}, {where}: {finding.why}", indent=_INDENT
        )
        console.print(Text(first[:9], _STYLES[finding.severity]).append(first[9:], "default"), soft_wrap=True)
        for line in (*others, *wrapped(console, f"-> {finding.fix}", first=_INDENT, indent=f"{_INDENT}   ")):
            console.print(Text(line), soft_wrap=True)


def show_judgement(console: Console, name: str, judged: Judged) -> None:
    """The findings, then how many errors and warnings there are of ``name``, and who can change it."""
    show_findings(console, judged.findings)
    counts = ", ".join(
        f"{count or 'no'} {severity.value}{'' if count == 1 else 's'}"
        for severity in (Severity.ERROR, Severity.WARNING)
        for count in [sum(finding.severity is severity for finding in judged.findings)]
    )
    console.print(Text(f"{printable(name)}: {counts}; {judged.mutability}"), soft_wrap=True)


def show_difference(console: Console, before: KeyPolicy, after: KeyPolicy) -> None:
    """What changes, line by line."""
    for line in difference(before, after):
        style = {"+": "green", "-": "red", "@": "cyan"}.get(line[0], "default")
        console.print(Text(printable(line), style), soft_wrap=True)


def difference(before: KeyPolicy, after: KeyPolicy) -> list[str]:
    """A unified diff of the two, as written for PutKeyPolicy."""
    now, then = before.encode().splitlines(), after.encode().splitlines()
    return list(difflib.unified_diff(now, then, "now", "then", lineterm=""))


def is_alike(one: KeyPolicy, other: KeyPolicy) -> bool:
    """Whether KMS would decide alike by both: it keeps a policy with its lists in an order of its own."""
    return set(_compared(one)) == set(_compared(other))


def _compared(policy: KeyPolicy) -> Iterator[tuple[object, ...]]:
    everybody: Mapping[Principal, Principal] = {EVERYONE: Principal(PrincipalKind.AWS, "*")}
    for each in policy.statements:
        yield (
            each.effect,
            frozenset(everybody.get(principal, principal) for principal in each.principals),
            frozenset(everybody.get(principal, principal) for principal in each.not_principals),
            *map(frozenset, (each.actions, each.not_actions, each.resources, each.not_resources)),
            frozenset((found.operator, found.key.lower(), frozenset(found.values)) for found in each.conditions),
        )
