"""``strongroom run``: everything on this machine, in one command. Start, verify, ask or chat, stop.

The enclave and the proxy are the same programs that ``start`` and ``proxy`` run, as processes of their own, which end
with this one.
"""

from __future__ import annotations

import contextlib
import json
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
from strongroom.commands import err, model_or_installed, out
from strongroom.conversation import Sampling, Spoken, open_session, sampling_options, talk, write_now
from strongroom.prepare import Prepared, Settings, prepare
from strongroom.render import show_verdict, verdict_line, warn_of_labels
from vsockrpc.messages import ChatMessage

STOP_SECONDS = 30


class RunError(StrongroomError):
    """One of the processes behind ``run`` did not come up. It has said why."""


@click.command()
@click.argument("model", required=False, type=click.Path(path_type=Path, exists=True, dir_okay=False))
@click.option("--prompt", help="Ask this and end. Without it, a conversation.")
@sampling_options
@click.option(
    "--context",
    type=click.IntRange(64, 1 << 20),
    default=2048,
    show_default=True,
    help="Tokens, prompt and answer together.",
)
@click.option(
    "--threads",
    type=click.IntRange(0, 256),
    default=0,
    show_default=True,
    help="Threads that decode; 0: one for each CPU.",
)
def run(
    model: Path | None,
    prompt: str | None,
    system: str | None,
    max_tokens: int,
    temperature: float,
    seed: int | None,
    context: int,
    threads: int,
) -> None:
    """Start an emulated enclave with MODEL, verify it, ask or chat, and stop it again.

    MODEL is a GGUF file with a chat template; without it, the one of the smollm2 extra.

    \b
    Example:
      strongroom run SmolLM2.gguf --prompt "Why is the sky blue?"
      strongroom run
    """
    model = model_or_installed(model)
    sampling = Sampling(system, max_tokens, temperature, seed)
    if prompt is not None:
        sampling.request(ChatMessage("user", prompt))  # a prompt that nobody would accept is said before the wait
    folder = Path(tempfile.mkdtemp(prefix="strongroom-"))
    try:
        err.print(f"Reference values for {model.name}, from the files on this disk, before any enclave", style="bold")
        prepared = prepare(model, folder, Settings(context=context, threads=threads), progress=_tell)
        err.print("Enclave", style="bold")
        with _enclave(prepared, model) as name, _proxy(name) as url:
            _converse(url, prepared, prompt, sampling)
    finally:
        shutil.rmtree(folder)


def _converse(url: str, prepared: Prepared, prompt: str | None, sampling: Sampling) -> None:
    with open_session(url, prepared.policy) as (runner, session):
        result = runner.run(session.verify())
        out.print("Verdict, every check of PROTOCOL.md section 3", style="bold")
        show_verdict(out, result.checks)
        out.print(verdict_line(result))
        warn_of_labels(out, result)
        out.print()
        if prompt is None:
            talk(runner, session, sampling)
            return
        out.print(Text(prompt, "bold"))
        spoken = Spoken(write_now)
        runner.run(spoken.listen(session, sampling.request(ChatMessage("user", prompt))))
        assert spoken.done is not None
        digest = f"sha384:{prepared.manifest.digest().hex()}"
        out.print(f"\n\nmodel        {prepared.manifest.name}  {digest}", soft_wrap=True)
        out.print(f"first token  {spoken.seconds_to_first * 1000:.0f} ms, with the pacing tick")
        out.print(f"speed        {spoken.tokens_per_second:.1f} tokens/s over {spoken.done.completion_tokens} tokens")


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
    jail = [sys.executable, "-m", "parent.launch.jail", "--"]
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
