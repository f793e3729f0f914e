"""``prompt``: it waits in a bucket or a queue until an attested enclave opens it. PROTOCOL.md section 6.5."""

from __future__ import annotations

import asyncio
import contextlib
import json
from datetime import UTC, datetime
from pathlib import Path

import click
import httpx2

from attestation.envelope import EnvelopeHeader, EnvelopePurpose, encryption_context, require_equal
from attestation.keyrelease import judge_key
from attestation.policy import AppraisalPolicy
from strongroom.conversation import Sampling, Voice, prompt_text, sampling_options
from strongroom.files import new_file, read_bounded, require_new, write_new
from strongroom.kms.client import KmsClient
from strongroom.options import err, json_option, key_option, load_policy, policy_option, require_key, url_option
from strongroom.prompt_file import MAX_ANSWER, MAX_REPLY, Reply, open_answer, seal_prompt
from strongroom.proxy_client import ClearFault, ProxyClient, bounded
from strongroom.render import show_verdict, waiting, warn_of_labels
from strongroom.session import SILENCE_SECONDS, Session
from vsockrpc.chat import ChatMessage
from vsockrpc.messages import Delta, Done
from vsockrpc.sealed import Truncated

FILE = click.Path(path_type=Path, dir_okay=False)
MAX_ENVELOPE = 9 << 20
"""Bytes: what a proxy takes."""
ANSWER_SECONDS = 900.0
"""Half as long again as an enclave takes for a request, unless its configuration says otherwise."""


@click.group()
def prompt() -> None:
    """Seal a prompt now, have it answered later, read the answer.

    The envelope can wait in a bucket or a queue and be brought to an enclave by anybody: only one that KMS releases the
    key to can open it, and only the reply file, which stays here, opens the answer. Delivery is at least once: whoever
    has the envelope can have it answered again.

    \b
    Example:
      strongroom prompt seal "Why is the sky blue?" --policy policy.toml --out question.sealed
      strongroom prompt submit question.sealed --url http://parent:8080 --out answer.sealed
      strongroom prompt open answer.sealed --reply question.sealed.reply
    """


@prompt.command()
@click.argument("text", metavar="PROMPT")
@policy_option
@key_option
@click.option("--out", "target", type=FILE, required=True, help="The envelope; its reply file gets .reply behind it.")
@click.option(
    "--url", default=None, help="A parent's proxy: have its enclave verified as well, before anything is sealed."
)
@sampling_options
@json_option
def seal(
    text: str,
    policy: Path,
    key: str | None,
    target: Path,
    url: str | None,
    system: str | None,
    max_tokens: int,
    temperature: float,
    seed: int | None,
    as_json: bool,
) -> None:
    """Seal PROMPT for whatever enclave the policy accepts. "-" reads it from standard input.

    The policy's [kms.prompts] names the key. What KMS says of it is judged first: that it releases to the policy's
    releases and to nothing else. Credentials are boto3's.

    \b
    Example:
      strongroom prompt seal "Why is the sky blue?" --policy policy.toml --out question.sealed
      strongroom prompt seal - --policy policy.toml --out review.sealed --system "Review this change." < change.diff
    """
    request = Sampling(system, max_tokens, temperature, seed).request(ChatMessage("user", prompt_text(text)))
    reply_file = target.with_name(f"{target.name}.reply")
    require_new(target)
    require_new(reply_file)
    accepted = load_policy(policy)
    rule = require_key(accepted, EnvelopePurpose.PROMPT, key)
    if url is not None:
        _verify(url, accepted)
    with (
        KmsClient(rule.key.region, purpose="sealing a prompt", policy=accepted) as client,
        waiting(err, "asking KMS"),
    ):
        release = judge_key(accepted, EnvelopePurpose.PROMPT, client.facts(rule.key), at=datetime.now(UTC))
        context = encryption_context(EnvelopePurpose.PROMPT, rule.context, rule.minimum_version)
        data_key, wrapped = client.generate_data_key(rule.key, context)
    envelope, reply = seal_prompt(release, request, data_key=data_key, wrapped=wrapped)
    write_new(reply_file, reply.encode(), mode=0o600)
    try:
        write_new(target, envelope)
    except BaseException:
        reply_file.unlink(missing_ok=True)
        raise
    if as_json:
        click.echo(json.dumps({"envelope": str(target), "reply": str(reply_file), **release.as_json()}))
    else:
        show_verdict(err, release.checks)
        warn_of_labels(err, release)
        click.echo(f"wrote {target}\nwrote {reply_file}  (keep it: nothing else opens the answer)")


def _verify(url: str, policy: AppraisalPolicy) -> None:
    async def verify() -> None:
        async with Session(url, policy) as session:
            result = await session.verify()
        warn_of_labels(err, result)

    asyncio.run(verify())


@prompt.command()
@click.argument("file", type=FILE)
@url_option
@click.option("--out", "target", type=FILE, required=True, help="Where the sealed answer goes.")
@click.option(
    "--timeout",
    "seconds",
    type=click.FloatRange(min=0, min_open=True),
    default=ANSWER_SECONDS,
    show_default=True,
    metavar="SECONDS",
    help="How long the answer may take as a whole.",
)
@json_option
def submit(file: Path, url: str, target: Path, seconds: float, as_json: bool) -> None:
    """Bring the envelope FILE to an enclave, and keep its sealed answer.

    This takes neither policy nor key: what is brought is ciphertext, and so is the answer.

    \b
    Example:
      strongroom prompt submit question.sealed --url http://parent:8080 --out answer.sealed
    """
    envelope = read_bounded(file, MAX_ENVELOPE)
    _require_prompt(envelope)
    require_new(target)
    with waiting(err, "waiting for the answer"):
        size = asyncio.run(_submit(envelope, url, target, seconds))
    click.echo(json.dumps({"answer": str(target), "bytes": size}) if as_json else f"wrote {target}")


def _require_prompt(envelope: bytes) -> None:
    """That nothing else is shown to a parent: a reply file is called much like its envelope. Raises EnvelopeError."""
    header, _ = EnvelopeHeader.split(envelope)
    require_equal("wrong_purpose", "no prompt's envelope", EnvelopePurpose.PROMPT.value, header.purpose.value)


async def _submit(envelope: bytes, url: str, target: Path, seconds: float) -> int:
    """Bytes of the answer, which comes within ``seconds`` or not at all: its records cannot be told from forged ones
    here, so that no number of them is progress. Raises Unreachable, ClearFault; Truncated when it broke off.
    """
    size = 0
    async with ProxyClient(url, silence_seconds=SILENCE_SECONDS) as proxy:
        try:
            async with (
                asyncio.timeout(seconds),
                proxy.envelope(envelope) as response,
                contextlib.aclosing(bounded(response, MAX_ANSWER)) as chunks,
            ):
                with new_file(target) as file:
                    async for chunk in chunks:
                        size += len(chunk)
                        file.write(chunk)
        except ClearFault as fault:
            raise ClearFault(fault.code, _FAULTS.get(fault.code, fault.message)) from fault
        except (httpx2.HTTPError, TimeoutError) as error:
            if size:
                why = f"did not end within {seconds:g} s" if isinstance(error, TimeoutError) else "broke off"
                raise Truncated(f"the answer {why}: bring the envelope again, it is answered anew") from error
            raise proxy.unreachable(error) from error
    return size


_FAULTS = {
    "unavailable": "no enclave that serves is reached, or it reaches no KMS: look at the enclave's logs and at the "
    "egress's metrics, and bring the envelope again",
    "malformed": "the envelope was changed on its way, or is larger than this enclave takes",
}
"""What a clear fault means for an envelope, where that is another thing than for a sealed request."""


@prompt.command(name="open")
@click.argument("file", type=FILE)
@click.option("--reply", type=FILE, required=True, help="The reply file that was written with the envelope.")
@json_option
def open_command(file: Path, reply: Path, as_json: bool) -> None:
    """Read the sealed answer FILE.

    \b
    Example:
      strongroom prompt open answer.sealed --reply question.sealed.reply
    """
    answers = list(open_answer(read_bounded(file, MAX_ANSWER), Reply.decode(read_bounded(reply, MAX_REPLY))))
    deltas = [each for each in answers if isinstance(each, Delta)]
    if not as_json:
        with Voice() as voice:
            for delta in deltas:
                voice.say(delta)
        return
    [done] = [each for each in answers if isinstance(each, Done)]
    body = {
        "text": "".join(delta.content for delta in deltas),
        "reasoning": "".join(delta.reasoning for delta in deltas),
        "finish_reason": done.finish_reason,
        "usage": done.usage.as_map(),
    }
    click.echo(json.dumps(body))
