"""``strongroom run``: everything on this machine, in one command. Start, verify, ask or chat, stop.

The enclave and the proxy are the same programs that ``start`` and ``proxy`` run, as processes of their own, which end
with this one.
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import click
from rich.text import Text

from attestation.errors import StrongroomError
from attestation.reference import digest_text
from attestation.verifier import AttestationResult
from strongroom.conversation import Sampling, Spoken, Voice, open_session, sampling_options, talk
from strongroom.initialise import model_or_installed
from strongroom.options import engine_options, err, out
from strongroom.prepare import Prepared, Settings, prepare
from strongroom.render import hashing_bar, show_verdict, verdict_line, warn_of_labels
from vsockrpc.chat import ChatMessage

STOP_SECONDS = 30


class RunError(StrongroomError):
    """One of the processes behind ``run`` did not come up. It has said why."""


@click.command()
@click.argument("model", required=False, type=click.Path(path_type=Path, exists=True, dir_okay=False))
@click.option("--prompt", help="Ask this and end. Without it, a conversation.")
@sampling_options
@engine_options
@click.option("--json", "as_json", is_flag=True, help="With --prompt: one JSON object when the answer is whole.")
def run(
    model: Path | None,
    prompt: str | None,
    system: str | None,
    max_tokens: int,
    temperature: float,
    seed: int | None,
    context: int,
    parallel: int,
    prompt_tokens: int,
    answer_tokens: int,
    reasoning_tokens: int,
    threads: int,
    as_json: bool,
) -> None:
    """Start an emulated enclave with MODEL, verify it, ask or chat, and stop it again.

    MODEL is a GGUF file with a chat template; without it, the one of the smollm2 extra.

    \b
    Example:
      strongroom run SmolLM2.gguf --prompt "Why is the sky blue?"
      strongroom run
    """
    if as_json and prompt is None:
        raise click.UsageError("--json goes with --prompt")
    model = model_or_installed(model)
    sampling = Sampling(system, max_tokens, temperature, seed)
    if prompt is not None:
        sampling.request(ChatMessage("user", prompt))  # a prompt that nobody would accept is said before the wait
    settings = Settings(
        context=context,
        parallel=parallel,
        prompt_tokens=prompt_tokens,
        answer_tokens=answer_tokens,
        reasoning_tokens=reasoning_tokens,
        threads=threads,
    )
    folder = Path(tempfile.mkdtemp(prefix="strongroom-"))
    try:
        title = f"Reference values for {model.name}, from the files on this disk, before any enclave runs"
        err.print(title, style="bold")
        with hashing_bar(err, "model") as hashing:
            prepared = prepare(model, folder, settings, progress=_tell, hashing=hashing)
        err.print("Enclave", style="bold")
        with _enclave(prepared, model) as name, _proxy(name) as url:
            if prompt is None:
                _talk(url, prepared, sampling)
            else:
                _ask(url, prepared, prompt, sampling, as_json)
    finally:
        shutil.rmtree(folder)


def _talk(url: str, prepared: Prepared, sampling: Sampling) -> None:
    with open_session(url, prepared.policy) as (runner, session):
        _show_verdict(runner.run(session.verify()))
        talk(runner, session, sampling)


def _ask(url: str, prepared: Prepared, prompt: str, sampling: Sampling, as_json: bool) -> None:
    with Voice() as voice, open_session(url, prepared.policy) as (runner, session):
        spoken = Spoken() if as_json else Spoken(voice.say)
        result = runner.run(session.verify())
        if not as_json:
            _show_verdict(result)
            out.print(Text(prompt, "bold"))
        runner.run(spoken.listen(session, sampling.request(ChatMessage("user", prompt))))
    if as_json:
        click.echo(json.dumps(spoken.as_json(result)))
        return
    assert spoken.done is not None
    digest = digest_text(prepared.manifest.digest())
    out.print(f"\nmodel        {prepared.manifest.name}  {digest}", soft_wrap=True)
    out.print(f"first token  {spoken.seconds_to_first * 1000:.0f} ms, with the pacing tick")
    out.print(f"speed        {spoken.tokens_per_second:.1f} tokens/s over {spoken.done.usage.completion_tokens} tokens")


def _show_verdict(result: AttestationResult) -> None:
    out.print("Verdict, every check of PROTOCOL.md section 3", style="bold")
    show_verdict(out, result.checks)
    out.print(verdict_line(result))
    warn_of_labels(out, result)
    out.print()


@contextlib.contextmanager
def _enclave(prepared: Prepared, model: Path) -> Iterator[str]:
    """An enclave of a name of its own, for as long as the block is open."""
    name = f"run-{secrets.token_hex(3)}"
    arguments = ["--config", str(prepared.configuration), "--model", str(model), "--name", name]
    try:
        with _ending_with_us("start", *arguments, "--foreground") as process:
            _first_line(process)
            yield name
    finally:
        # It has ended; this removes its folder. There is none when it was interrupted early.
        subprocess.run([*_command("stop"), name], check=False, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


@contextlib.contextmanager
def _proxy(enclave: str) -> Iterator[str]:
    with _ending_with_us("proxy", "--enclave", enclave, "--listen", "127.0.0.1:0", "--json") as process:
        yield f"http://{json.loads(_first_line(process))['listening']}"


def _command(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "strongroom.cli", *arguments]


@contextlib.contextmanager
def _ending_with_us(*arguments: str) -> Iterator[subprocess.Popen[bytes]]:
    """A command of ours as a child that ends with this block, and by the kernel's hand if this process is killed."""
    jail = [sys.executable, "-m", "parent.launch.jail", "--parent", str(os.getpid()), "--"]
    process = subprocess.Popen(
        [*jail, *_command(*arguments)], stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, process_group=0
    )
    try:
        yield process
    finally:
        process.terminate()
        try:
            process.wait(STOP_SECONDS)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _first_line(process: subprocess.Popen[bytes]) -> bytes:
    """What a child says when it is ready. Raises RunError when it ends without."""
    assert process.stdout is not None
    line: bytes = process.stdout.readline()
    if not line:
        raise RunError(
            "not_started", "a process behind this command did not come up", got=f"exit code {process.wait()}"
        )
    return line


def _tell(text: str) -> None:
    err.print(f"  {text}")
