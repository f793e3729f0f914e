"""``verify``, ``inspect`` and ``evidence``: the verdict, a look without one, and what an auditor keeps."""

from __future__ import annotations

import asyncio
import json
import secrets
import sys
from datetime import UTC, datetime
from pathlib import Path

import click
from click.core import ParameterSource

from attestation.appraisal import field_text
from attestation.bundle import Bundle, read_kept
from attestation.checks import STEPS, Check, Label, Status
from attestation.commitment import Evidence
from attestation.document import MAX_FIELD, AttestationDocument
from attestation.errors import AppraisalError, EvidenceError, PolicyError
from attestation.policy import AppraisalPolicy
from attestation.rules import ChannelBinding
from attestation.verifier import MIN_NONCE, NONCE_SIZE, ArchivedResult, verify, verify_archived, verify_document
from strongroom.files import read_evidence, require_new, write_new
from strongroom.inspection import inspect, show_inspection
from strongroom.kms.client import ask_of_keys
from strongroom.options import Octets, err, json_option, load_policy, out, policy_option, url_option
from strongroom.proxy_client import ProxyClient
from strongroom.render import (
    Verdict,
    explain_verdict,
    refusal_line,
    show_verdict,
    verdict_line,
    warn_of_labels,
)
from strongroom.session import Session

FILE = click.argument("file", required=False, type=click.Path(path_type=Path, allow_dash=True, dir_okay=False))


# --- verify -------------------------------------------------------------------------------------------------------


@click.command("verify")
@FILE
@url_option
@policy_option
@click.option(
    "--nonce",
    type=Octets(range(MIN_NONCE, MAX_FIELD + 1)),
    help="The nonce that you asked with; for a FILE that you judge as of now.",
)
@click.option("--archived", is_flag=True, help="Judge a FILE at its own time. Says ARCHIVED everywhere.")
@click.option("--explain", is_flag=True, help="Every step with the question that it asks, expected and got whole.")
@click.option("--full", is_flag=True, help="Print digests whole.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object: verdict, every check, claims.")
@click.pass_context
def verify_command(
    context: click.Context,
    file: Path | None,
    url: str,
    policy: Path,
    nonce: bytes | None,
    archived: bool,
    explain: bool,
    full: bool,
    as_json: bool,
) -> int:
    """Challenge an enclave and judge its Evidence, or judge what is in FILE (- is standard input). Every check is
    listed.

    FILE is a bundle of `strongroom evidence`, Evidence, or under a policy for documents the attestation document of any
    Nitro enclave; as bytes, in base64 or in hexadecimal digits. A nonce is never optional: whoever judges a FILE as of
    now gives the one that he asked with, and whoever cannot says --archived.

    \b
    Examples:
      strongroom verify --url http://127.0.0.1:8080 --policy policy.toml
      strongroom verify --explain
      strongroom verify evidence.json --archived
      strongroom verify document.cbor --nonce 000102030405060708090a0b0c0d0e0f --policy nitro.toml
      curl ... | strongroom verify - --archived --json

    Exit codes: 0 accepted, 1 refused by the policy, 2 usage or policy, 3 malformed or untrusted Evidence, 4 no enclave
    answers.
    """
    _require_sense(context, file, nonce, archived)
    judged_by = load_policy(policy)
    try:
        if file is None:
            result: Verdict = asyncio.run(_challenge(url, judged_by))
        else:
            result = _judge(read_evidence(file), judged_by, nonce, archived)
    except (EvidenceError, AppraisalError) as error:
        labels = sorted(error.labels | ({Label.ARCHIVED} if archived else set()))
        if as_json:
            checks = [check.as_json() for check in error.checks]
            click.echo(json.dumps({"verdict": "refused", "labels": labels, "error": error.as_json(), "checks": checks}))
        else:
            if explain:
                explain_verdict(out, error.checks)
            elif error.checks:
                show_verdict(out, error.checks, whole=full)
            out.print()
            out.print(refusal_line(error.message, error.code, labels), soft_wrap=True)
            if file is not None and not archived and (made := _made_long_ago(error)):
                out.print(f"made at {made}; --archived judges it at its own time", soft_wrap=True)
        return error.exit_code
    if as_json:
        click.echo(json.dumps(result.as_json()))
    else:
        if explain:
            explain_verdict(out, result.checks)
            out.print()
        else:
            show_verdict(out, result.checks, whole=full)
        out.print(verdict_line(result), soft_wrap=True)
        warn_of_labels(out, result)
    return 0


def _made_long_ago(error: EvidenceError | AppraisalError) -> str | None:
    """When the document was made, where its age is why it is refused as of now."""
    stated = [check.got for check in error.checks if check.step == 3 and check.status is Status.PASSED]
    is_old = error.code == "stale" or (error.code == "untrusted_chain" and "valid from" in (error.got or ""))
    return stated[0].rpartition(", ")[2] if is_old and stated and stated[0] else None


def _require_sense(context: click.Context, file: Path | None, nonce: bytes | None, archived: bool) -> None:
    """Raises click.UsageError for options that contradict each other, or leave the nonce out in silence."""
    if file is None:
        if archived:
            raise click.UsageError("--archived judges a FILE; what an enclave answers now is judged as of now")
        if nonce is not None:
            raise click.UsageError("--nonce is for a FILE; an enclave is asked with a fresh one")
    elif context.get_parameter_source("url") is ParameterSource.COMMANDLINE:
        raise click.UsageError("give a FILE or --url, not both")
    elif nonce is None and not archived:
        raise click.UsageError(
            "a FILE needs --nonce HEX, the one that you asked with, or --archived to judge it at its own time; "
            "the nonce that a bundle names is its saver's, and proves nothing to you"
        )


async def _challenge(url: str, policy: AppraisalPolicy) -> Verdict:
    async with Session(url, policy) as session:
        return await session.verify()


def _judge(data: bytes, policy: AppraisalPolicy, nonce: bytes | None, archived: bool) -> Verdict:
    kept = read_kept(data)
    evidence = kept.evidence if isinstance(kept, Bundle) else kept
    _require_kind(evidence, policy)
    if archived:
        result = verify_archived(evidence, policy=policy, nonce=nonce)
        if nonce is None and isinstance(kept, Bundle) and kept.nonce != result.claims.nonce:
            # A nonce that is equal proves nothing: whoever saved the bundle may have copied it out of the document.
            raise _wrong_nonce(kept, result)
        return result
    assert nonce is not None  # by _require_sense
    if not isinstance(policy.binding, ChannelBinding):
        return verify_document(evidence, policy=policy, nonce=nonce, at=datetime.now(UTC))
    if len(nonce) != NONCE_SIZE:
        raise click.BadParameter(f"a channel's has {NONCE_SIZE} bytes, got {len(nonce)}", param_hint="--nonce")
    return verify(evidence, policy=policy, nonce=nonce, at=datetime.now(UTC), keys=ask_of_keys(policy))


def _wrong_nonce(bundle: Bundle, result: ArchivedResult) -> EvidenceError:
    """With what became of every check: step 6, which the verifier ignored, is the one that failed."""
    error = EvidenceError(
        "wrong_nonce",
        "the bundle names another nonce than its document answers",
        expected=field_text(bundle.nonce),
        got=field_text(result.claims.nonce),
    )
    failed = Check(6, STEPS[6], Status.FAILED, error.expected, error.got, error.code, error.message)
    error.checks = tuple(failed if check.step == failed.step else check for check in result.checks)
    error.labels = result.labels
    return error


def _require_kind(data: bytes, policy: AppraisalPolicy) -> None:
    """Raises PolicyError ``wrong_purpose`` where the file and the policy are plainly about different things."""
    for_channels = isinstance(policy.binding, ChannelBinding)
    if Evidence.is_in(data) and not for_channels:
        what, purpose = "this is Evidence of a Strongroom channel, and the policy judges bare documents", "channel"
    elif AttestationDocument.is_in(data) and for_channels:
        what, purpose = "this is a bare document, and the policy judges channels", "document"
    else:
        return
    raise PolicyError(
        "wrong_purpose",
        f'{what}: use a policy with purpose = "{purpose}" (strongroom policy init --purpose {purpose})',
        field="binding.purpose",
        expected=purpose,
        got="channel" if for_channels else "document",
    )


# --- inspect ------------------------------------------------------------------------------------------------------


@click.command("inspect")
@FILE
@url_option
@json_option
@click.pass_context
def inspect_command(context: click.Context, file: Path | None, url: str, as_json: bool) -> int:
    """Decode Evidence without judging it: from an enclave, or from FILE (- is standard input).

    Nothing that it shows is proven, and it says so: anybody can write such bytes. Where something is not as specified,
    it says what, and shows the rest.

    \b
    Examples:
      strongroom inspect --url http://127.0.0.1:8080
      strongroom inspect evidence.json
      strongroom inspect - --json < document.cbor

    Exit codes: 0 decoded, 3 nothing could be decoded, 4 no enclave answers.
    """
    if file is None:
        kept: Bundle | bytes = asyncio.run(_fetch(url, secrets.token_bytes(NONCE_SIZE)))
    elif context.get_parameter_source("url") is ParameterSource.COMMANDLINE:
        raise click.UsageError("give a FILE or --url, not both")
    else:
        kept = read_kept(read_evidence(file))
    seen = inspect(kept)
    if as_json:
        click.echo(json.dumps(seen))
    else:
        show_inspection(out, seen)
    return 0


# --- evidence -----------------------------------------------------------------------------------------------------


@click.command("evidence")
@url_option
@click.option(
    "--output", "-o", type=click.Path(path_type=Path, allow_dash=True, dir_okay=False), default="evidence.json",
    show_default=True, help="Where the bundle goes; - is standard output.",
)  # fmt: skip
@click.option("--nonce", type=Octets([NONCE_SIZE]), help="32 bytes to ask with.  [default: fresh random ones]")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object about the bundle.")
def evidence_command(url: str, output: Path, nonce: bytes | None, as_json: bool) -> int:
    """Ask an enclave for Evidence and save it as a bundle, which an auditor can verify offline later.

    The bundle is saved as it came, and not judged. An existing file is not overwritten.

    \b
    Examples:
      strongroom evidence --url http://127.0.0.1:8080 --output evidence.json
      strongroom verify evidence.json --archived --policy policy.toml

    Exit codes: 0 saved, 2 usage, 4 no enclave answers.
    """
    to_stdout = str(output) == "-"
    if not to_stdout:
        require_new(output)  # before the enclave is asked: a nonce is good for one answer
    bundle = asyncio.run(_fetch(url, nonce or secrets.token_bytes(NONCE_SIZE)))
    encoded = bundle.encode()
    if to_stdout:
        sys.stdout.write(encoded.decode("ascii"))
    else:
        write_new(output, encoded)
    if as_json and not to_stdout:
        body = {
            "bundle": str(output),
            "fetched": bundle.fetched.isoformat(),
            "nonce": bundle.nonce.hex(),
            "verified": False,
        }
        click.echo(json.dumps(body))
    elif not to_stdout:
        click.echo(f"wrote {output}, as it came")
        err.print(f"not judged yet: strongroom verify {output} --archived", soft_wrap=True)
    return 0


async def _fetch(url: str, nonce: bytes) -> Bundle:
    async with ProxyClient(url) as proxy:
        evidence = await proxy.evidence(nonce)
        return Bundle(evidence, nonce, datetime.now(UTC), proxy.public_url)
